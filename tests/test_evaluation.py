"""Scores, metrics, intervals, and what is recorded about drift."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model_folder
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from forgetless.evaluation.drift import measure_coverage, record_inputs
from forgetless.evaluation.matrix import AccuracyMatrix, paired_bootstrap, wilson
from forgetless.evaluation.scorers import Prediction, _beginning, _greedy, _likelihoods, _prefill, failures, likelihoods_plain, normalize, score_rows
from forgetless.models import linear_modules
from forgetless.tasks import Example, Task


@pytest.fixture(scope="module")
def model(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny)


def make_task(labels=("red", "good bad maybe", "good bad", "cat dog bird yes")):
    rows = [
        Example(text, labels[i % len(labels)], i)
        for i, text in enumerate(["cat sits", "dog runs happy sad calm river apple", "bird", "stone river", "yes no"])
    ]
    return Task("t", "Text : {sentence} Answer :", rows, rows, rows, labels=list(labels) if labels else None)


# -- scorers -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("shared", [True, False])
def test_the_tree_of_labels_scores_as_whole_sequences_do(shared, kind, tokenizer, tmp_path):
    """Padded batch, labels as branches in one pass, what the prompts begin with read once = one plain forward a (row, label)."""
    model = AutoModelForCausalLM.from_pretrained(make_model_folder(tmp_path / "model", kind=kind)).eval()
    task = make_task()
    prompts = [task.encode_prompt(tokenizer, e.text) for e in task.test]
    labels = [task.encode_answer(tokenizer, label) for label in task.labels]
    assert {len(label) for label in labels} == {2, 3, 4, 5}
    with torch.no_grad():
        beginning = _beginning(model, prompts, least=1)
        assert beginning.length > 0
        for _ in range(2):  # the second batch finds it as the first did
            tree = _likelihoods(model, _prefill(model, prompts, beginning if shared else None), labels)
        lengths = torch.tensor([len(label) - 1 for label in labels])
        for whole, normalized, prompt in zip(tree.whole, tree.normalized, prompts, strict=True):
            torch.testing.assert_close(whole, likelihoods_plain(model, prompt, labels), atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(normalized, likelihoods_plain(model, prompt, [label[:-1] for label in labels]) / lengths, atol=2e-5, rtol=1e-5)


SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
UNUSUAL = {  # what a token sees here is more than a mask over keys and values
    "mistral": SMALL | {"sliding_window": 8}, "gemma3_text": SMALL | {"sliding_window": 12, "head_dim": 8},
    "qwen3_next": SMALL | {"head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "layer_types": ["linear_attention", "full_attention"]},
    "mpt": dict(d_model=32, n_heads=4, n_layers=2), "bloom": dict(hidden_size=32, n_head=4, n_layer=2), "mamba": dict(hidden_size=32, num_hidden_layers=2),
    "gpt_neo": dict(hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNUSUAL)
def test_models_whose_cache_cannot_be_branched_are_scored_row_by_row(kind, tokenizer):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), tie_word_embeddings=False, eos_token_id=1, pad_token_id=1, bos_token_id=None, **UNUSUAL[kind]
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    task = make_task()
    labels = [task.encode_answer(tokenizer, label) for label in task.labels]
    for found in score_rows(model, tokenizer, task, task.test, ["choice", "calibrated", "exact_match"]):
        prompt = task.encode_prompt(tokenizer, task.test[found.row])
        with torch.no_grad():
            assert found.choice == task.labels[int(likelihoods_plain(model, prompt, labels).argmax())]
            ids = list(prompt)
            for _ in range(max(map(len, labels)) + 1):
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        said = ids[len(prompt) :]
        assert found.text == tokenizer.decode(said[: said.index(1)] if 1 in said else said, skip_special_tokens=True)


@pytest.mark.parametrize("shared", [True, False])
def test_greedy_after_the_tree_is_generate(shared, model, tokenizer):
    """The branches stay in the cache; what is generated afterwards must not see them."""
    task = make_task()
    prompts = [task.encode_prompt(tokenizer, e.text) for e in task.test]
    labels = [task.encode_answer(tokenizer, label) for label in task.labels]
    with torch.no_grad():
        state = _prefill(model, prompts, _beginning(model, prompts, least=1) if shared else None)
        _likelihoods(model, state, labels)
        texts = _greedy(model, tokenizer, state, 4)
        for text, prompt in zip(texts, prompts, strict=True):
            out = model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=5, do_sample=False, pad_token_id=1
            )
            assert text == tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)


def test_batch_size_and_order_do_not_change_a_score(model, tokenizer):
    task = make_task()
    one = score_rows(model, tokenizer, task, task.test, ["choice", "exact_match"], batch_size=1)
    many = score_rows(model, tokenizer, task, task.test, ["choice", "exact_match"], batch_size=5)
    back = score_rows(model, tokenizer, task, task.test[::-1], ["choice", "exact_match"], batch_size=2)
    assert one == many == back[::-1]
    assert [p.row for p in one] == [0, 1, 2, 3, 4]


def test_calibration_removes_a_bias_toward_one_label(model, tokenizer):
    """A head that always shouts `red` is told nothing new by any text."""
    import copy

    loud = copy.deepcopy(model)
    red = tokenizer(" red").input_ids[0]
    task = make_task(labels=("red", "blue", "green"))
    loud.lm_head.bias = torch.nn.Parameter(8.0 * torch.nn.functional.one_hot(torch.tensor(red), loud.lm_head.out_features).float())
    plain = [p.calibrated for p in score_rows(model, tokenizer, task, task.test, ["calibrated"])]
    both = score_rows(loud, tokenizer, task, task.test, ["choice", "calibrated"])
    assert [p.calibrated for p in both] == plain
    assert {p.choice for p in both} == {"red"}  # uncalibrated, the bias is all one sees


def test_free_text_tasks_have_no_choice(model, tokenizer):
    predictions = score_rows(
        model, tokenizer, Task("t", "{sentence}", [], [], [], labels=None), [Example("cat", "red", 0)], ["choice", "exact_match"]
    )
    assert predictions[0].choice is None and predictions[0].score("choice") is None and predictions[0].score("exact_match") in (0.0, 1.0)


@pytest.mark.parametrize(("a", "b"), [("Red.", "red"), ("  very   Negative ", "very negative"), ("U.S.", "us")])
def test_exact_match_ignores_case_punctuation_and_spaces(a, b):
    assert normalize(a) == normalize(b)


def test_failures_are_split_into_drift_and_confusion():
    own, other = Task("own", "{sentence}", [], [], [], labels=["red", "blue"]), Task("other", "{sentence}", [], [], [], labels=["cat", "Blue"])
    predictions = [Prediction(i, "own", "red", text=text) for i, text in enumerate(["red", "blue", "Cat", "xyz"])]
    assert failures(predictions, own, [own, other]) == {"other_task_label": 0.25, "wrong_in_set": 0.25}


# -- metrics ---------------------------------------------------------------------------------------------------------------------------

M = AccuracyMatrix(["a", "b", "c"], [[0.9, 0.3, 0.2], [0.5, 0.8, 0.4], [0.7, 0.6, 0.9]], before=[0.1, 0.2, 0.25])


def test_every_metric_by_hand():
    assert M.average_accuracy() == pytest.approx((0.7 + 0.6 + 0.9) / 3)
    assert M.backward_transfer() == pytest.approx(((0.7 - 0.9) + (0.6 - 0.8)) / 2)  # over T - 1 tasks
    assert M.forgetting() == pytest.approx(((0.9 - 0.7) + (0.8 - 0.6)) / 2)
    assert M.worst_forgetting() == pytest.approx(0.2)
    assert M.learning_accuracy() == pytest.approx((0.9 + 0.8 + 0.9) / 3)
    assert M.forward_transfer() == pytest.approx(((0.3 - 0.2) + (0.4 - 0.25)) / 2)
    assert M.intransigence([1.0, 0.9, None]) == pytest.approx(0.1)


def test_forgetting_is_from_the_best_ever_and_bwt_from_the_diagonal():
    m = AccuracyMatrix(["a", "b", "c"], [[0.5, None, None], [0.9, 0.5, None], [0.6, 0.5, 0.5]])
    assert m.backward_transfer() == pytest.approx(0.05) and m.forgetting() == pytest.approx(0.15)


def test_bwt_where_the_last_task_has_no_such_score():
    m = AccuracyMatrix(["a", "b", "text"], [[0.9, None, None], [0.8, 0.9, None], [0.7, 0.8, None]])
    assert m.backward_transfer() == pytest.approx(((0.7 - 0.9) + (0.8 - 0.9)) / 2) and m.forgetting() == pytest.approx(0.15)


def test_an_unfinished_run_and_missing_cells():
    empty = AccuracyMatrix(["a", "b"])
    assert set(empty.metrics().values()) == {None}
    one = AccuracyMatrix(["a", "b"], [[0.5, None]])
    assert one.average_accuracy() == one.learning_accuracy() == 0.5 and one.backward_transfer() is None and one.forward_transfer() is None


@given(p=st.floats(0, 1), n=st.integers(1, 2000))
def test_wilson_is_an_interval_around_p(p, n):
    low, high = wilson(p, n)
    assert 0 <= low <= p + 1e-9 and p - 1e-9 <= high <= 1 and high - low > 0


def test_paired_bootstrap_sees_a_difference_and_its_absence():
    a, b = [1.0] * 80 + [0.0] * 20, [0.0] * 30 + [1.0] * 50 + [0.0] * 20
    d, low, high = paired_bootstrap(a, b)
    assert d == pytest.approx(0.3) and 0.2 < low < 0.3 < high < 0.4
    assert paired_bootstrap(a, a) == (0.0, 0.0, 0.0)


# -- drift -----------------------------------------------------------------------------------------------------------------------------


def test_recorded_inputs_show_how_far_a_layers_answer_moved(tiny, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    recorded = record_inputs(model, tokenizer, make_task(), seed=0)
    names = linear_modules(model)
    assert {k[:-2] for k in recorded} == set(names)
    same = measure_coverage(model, recorded, {})
    assert same["inputs"] == 0.0 and same["output_change"] < 1e-6
    full = {n: torch.eye(m.in_features) for n, m in names.items()}
    assert measure_coverage(model, recorded, full)["inputs"] == pytest.approx(1.0, abs=1e-3)
    with torch.no_grad():
        for m in names.values():
            m.weight.mul_(1.1)
    assert measure_coverage(model, recorded, {})["output_change"] == pytest.approx(0.1, abs=1e-3)


def test_forgetting_of_a_score_that_an_earlier_row_did_not_have_is_unknown():
    assert AccuracyMatrix(["a", "b"], [[None, None], [0.5, 0.5]]).forgetting() is None


@pytest.mark.parametrize(
    ("answer", "said", "right"),
    [("-5", "5", 0.0), ("1.5", "15", 0.0), ("+", "", 0.0), ("Yes!", "yes", 1.0), ("co-op", "coop", 1.0), ("3", "3.", 1.0)],
)
def test_exact_match_drops_punctuation_but_not_a_number_s(answer, said, right):
    assert Prediction(0, "t", answer, text=said).score("exact_match") == right

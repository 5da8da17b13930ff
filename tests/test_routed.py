"""Methods that choose at test time: the increments and routers of `routed`, what it exports, and the prompts of `prompt`."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import make_model_folder, run_config
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import forgetless as fl
from forgetless.adapters import carrying
from forgetless.batches import answer_logits
from forgetless.config import load_config
from forgetless.errors import ConfigError, DataError
from forgetless.lineage import load_memory, model_sha256
from forgetless.methods import get
from forgetless.methods._statistics import batch_of
from forgetless.methods.base import Memory
from forgetless.methods.prompt import SoftPrompt
from forgetless.prompts import prompted
from forgetless.routed import RoutedSet, export_routed, load_routed
from forgetless.router import Analytic, Keys, choose, directions, features
from forgetless.tasks import Example, Task, load_stream

F64 = torch.float64


@pytest.fixture
def model(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny).eval()


@pytest.fixture
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture(scope="module")
def learned(tiny, tmp_path_factory):
    """method -> (config, result) of a run of two tasks that were learned well enough to tell."""
    done = {}

    def run(name, tasks=("colour", "animal"), source=tiny, **options):
        key = json.dumps([name, tasks, source, options])
        if key not in done:
            config = run_config(source, tmp_path_factory.mktemp("routed"), {"name": name, **options}, tasks)
            config["train"] |= {"learning_rate": 1e-2, "max_steps": 12}
            done[key] = config, fl.run(config)
        return done[key]

    return run


def state(result, task):
    return load_memory(result.path / "tasks" / task / "state")


# -- the router's arithmetic ------------------------------------------------------------------------------------------------------------


def test_ridge_by_hand():
    """E = 1 and ridge 1: two rows on different axes leave M = diag(1 / 2, 2 / 5)."""
    router = Analytic(torch.eye(2), torch.zeros(2, 0, dtype=F64), torch.eye(2, dtype=F64))
    router.learn(torch.tensor([[1.0, -3.0]], dtype=F64), 0)  # relu takes the -3
    router.learn(torch.tensor([[0.0, 2.0]], dtype=F64), 1)
    torch.testing.assert_close(router.M, torch.tensor([[0.5, 0.0], [0.0, 0.4]], dtype=F64))
    torch.testing.assert_close(router.R, torch.tensor([[0.5, 0.0], [0.0, 0.2]], dtype=F64))
    torch.testing.assert_close(router.scores(torch.tensor([[2.0, 0.0]], dtype=F64)), torch.tensor([[1.0, 0.0]], dtype=F64))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("batch", [1, 7, 300])
def test_the_recursion_ends_at_the_joint_solution_in_whatever_order(order, batch):
    g = torch.Generator().manual_seed(1)
    x = {task: torch.randn(300 if task else 40, 12, generator=g, dtype=F64) + task for task in range(3)}
    router = Analytic.new(12, 96, 0.1)
    for task in order:  # a number that comes before those below it leaves empty columns for them
        for part in x[task][torch.randperm(len(x[task]), generator=g)].split(batch):
            router.learn(part, task)
    Phi = router.expand(torch.cat([x[task] for task in range(3)]))
    Y = torch.cat([torch.eye(3, dtype=F64)[task].expand(len(x[task]), 3) for task in range(3)])
    A = Phi.mT @ Phi + 0.1 * torch.eye(96, dtype=F64)
    torch.testing.assert_close(router.M, torch.linalg.solve(A, Phi.mT @ Y), atol=1e-8, rtol=0)
    torch.testing.assert_close(router.R, torch.linalg.inv(A), atol=1e-8, rtol=0)


def test_the_random_features_are_the_same_in_every_process():
    assert torch.equal(Analytic.new(5, 7, 1.0).E, Analytic.new(5, 7, 2.0).E)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    Analytic.new(5, 7, 1.0)
    assert torch.equal(before, torch.get_rng_state())


def test_keys_are_the_directions_that_rows_gather_round():
    x = torch.tensor([[1.0, 0.1], [2.0, -0.2], [0.1, 1.0], [-0.1, 1.0]], dtype=F64)
    found = directions(x, 2)
    assert sorted(found.round(decimals=6).tolist()) == [[0.0, 1.0], [1.0, 0.0]]  # mirror images: their means lie on the axes
    assert len(directions(x[:1].expand(5, 2), 3)) == 1  # the same row five times
    router = Keys.new(2)
    router.learn(x[:2], 0, 1)
    router.learn(x[2:], 1, 1)
    torch.testing.assert_close(
        router.scores(torch.tensor([[0.0, 3.0], [3.0, 3.0]], dtype=F64)), torch.tensor([[0.0, 1.0], [0.5**0.5] * 2], dtype=F64)
    )
    router.learn(torch.tensor([[0.0, -1.0], [0.0, 1.0]], dtype=F64), 2, 2)  # of several keys the nearest counts
    assert router.scores(torch.tensor([[0.0, 3.0]], dtype=F64))[0, 2] == 1.0


def test_the_choice_and_its_weights():
    scores = torch.tensor([[0.9, 0.2, 0.8]], dtype=F64)
    assert choose(scores) == [((0, 1.0),)]
    ((first, second),) = choose(scores, 2, 0.1)
    assert (first[0], second[0]) == (0, 2)
    assert first[1] / second[1] == pytest.approx(torch.e) and first[1] + second[1] == pytest.approx(1)  # exp(0.1 / 0.1)
    assert len(choose(scores, 5)[0]) == 3


# -- what the router sees ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "layer"), [("llama", 1), ("llama", 2), ("llama", 9), ("gpt2", 1), ("t5", 1)])
def test_features_are_the_mean_of_normalised_hidden_states_of_the_prompt(kind, layer, tmp_path):
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    model = auto.from_pretrained(make_model_folder(tmp_path / "m", kind=kind)).train()
    prompts = [[5, 6, 7], [9, 8, 4, 3, 2]]
    x = features(model, prompts, layer)
    assert model.training and x.dtype == F64
    reader = model.get_encoder() if kind == "t5" else model.base_model
    stack = {"llama": "layers", "gpt2": "h", "t5": "block"}[kind]
    assert (len(prompts), reader.config.hidden_size) == x.shape
    outputs = []
    getattr(reader, stack)[min(layer, 2) - 1].register_forward_hook(lambda m, a, out: outputs.append(out if torch.is_tensor(out) else out[0]))
    for ids, row in zip(prompts, x, strict=True):
        outputs.clear()
        with torch.no_grad():
            reader.eval()(input_ids=torch.tensor([ids]))
        h = outputs[0][0].double()
        torch.testing.assert_close(row, (h * h.shape[1] ** 0.5 / h.norm(dim=1, keepdim=True)).mean(0))


def test_blocks_after_the_router_are_not_run(model):
    ran = []
    model.model.layers[1].register_forward_hook(lambda *_: ran.append(1))
    features(model, [[5, 6]], 1)
    assert not ran and not model.model.layers[0]._forward_hooks


@pytest.mark.parametrize("options", [{"width": 128}, {"router": "keys"}])
def test_rows_of_tasks_that_read_differently_find_their_task(options, model, tokenizer):
    """Prompts that were never seen, of three tasks with words of their own in front."""
    method, memory = get("routed", **options), Memory()
    method.tokenizer = tokenizer
    words = ["red", "green", "blue", "yes", "no", "maybe"]
    tasks = [
        Task(name, f"{lead} {{sentence}}", [Example(f"{a} {b}", "good", i) for i, (a, b) in enumerate(zip(words, words[::-1], strict=True))], [], [])
        for name, lead in (("a", "cat sits"), ("b", "stone river :"), ("c", "happy mood colour"))
    ]
    for task in tasks:
        method.end_task(method.begin_task(model, task, memory), task, memory)
    unseen = [Example(f"{word} apple", "good", i) for i, word in enumerate(words)]
    for number, task in enumerate(tasks):
        routes = RoutedSet.of(memory).route(model, [task.encode_prompt(tokenizer, row) for row in unseen])
        assert routes == [((number, 1.0),)] * len(unseen)
    assert method.answering(model, tasks[0], [], memory) == []  # one of several processes may have no row


# -- increments --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"width": 64}, {"router": "keys", "top": 2}])
def test_a_later_task_leaves_the_base_and_every_earlier_increment_alone(options, learned, tiny):
    config, result = learned("routed", **options)
    first, second = state(result, "00-colour"), state(result, "01-animal")
    earlier = {key for key in first.tensors if key.startswith("routed/00/")}
    assert len(earlier) == 2 * 2 * 2 and all(torch.equal(first.tensors[key], second.tensors[key]) for key in earlier)
    assert {key.replace("/00/", "/01/") for key in earlier} == {key for key in second.tensors if key.startswith("routed/01/")}
    assert all(second.tensors[key].any() for key in second.tensors if key.endswith("lora_B"))  # both learned something
    model, tokenizer = AutoModelForCausalLM.from_pretrained(result.path / "model"), AutoTokenizer.from_pretrained(tiny)
    untouched = model_sha256(AutoModelForCausalLM.from_pretrained(tiny))
    assert model_sha256(model) == untouched
    method = get("routed", **options)
    method.tokenizer, task = tokenizer, load_stream(load_config(config))[0]
    for places, answerer in method.answering(model, task, task.test, second):
        assert places
        with answerer as speaker:
            speaker(input_ids=torch.tensor([[5, 6]]))
    assert model_sha256(model) == untouched and not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_a_carried_increment_is_the_trained_adapter_and_the_merged_weight(kind, tmp_path):
    """Conv1D stores its weight transposed; PEFT, the hook and the sum must agree."""
    from forgetless.adapters import adapter_tensors, adapters, add_delta, detach
    from forgetless.models import load

    model, tokenizer = load(make_model_folder(tmp_path / "m", kind=kind), dtype=F64)
    task = Task("t", "{sentence}", [Example("cat red", "red", 0)], [], [])
    row = task.encode(tokenizer, task.train[0])
    method, memory = get("routed", width=8, lora_dropout=0.0), Memory()
    method.tokenizer = tokenizer

    def logits():
        return answer_logits(model, batch_of(model, [row]))[0].detach()

    plain, model = logits(), method.begin_task(model, task, memory)
    for layer in adapters(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    trained = logits()
    assert adapter_tensors(model)
    method.end_task(model, task, memory)
    assert torch.equal(logits(), plain)
    ((places, answerer),) = method.answering(model, task, task.train, memory)
    with answerer as speaker:
        assert speaker is model
        torch.testing.assert_close(logits(), trained, atol=1e-12, rtol=0)
    merged = method.begin_task(model, task, memory)
    for name, layer in adapters(merged).items():
        layer.lora_A["default"].weight.data = memory.tensors[f"routed/00/{name}.lora_A"]
        layer.lora_B["default"].weight.data = memory.tensors[f"routed/00/{name}.lora_B"]
        add_delta(layer)
    detach(merged, merge=False)
    torch.testing.assert_close(logits(), trained, atol=1e-12, rtol=0)
    assert not torch.allclose(trained, plain)


def test_a_mixture_is_the_weighted_sum(model):
    g = torch.Generator().manual_seed(0)
    name = "model.layers.0.self_attn.q_proj"
    increments = [{f"{name}.lora_A": torch.randn(2, 32, generator=g), f"{name}.lora_B": torch.randn(32, 2, generator=g)} for _ in range(2)]
    both = RoutedSet({"adapter": {"lora_alpha": 6, "r": 2}}, None, increments).increment(((1, 0.25), (0, 0.75)))
    A, B = both[name]
    expected = 3 * sum(p * increments[k][f"{name}.lora_B"] @ increments[k][f"{name}.lora_A"] for k, p in ((1, 0.25), (0, 0.75)))
    torch.testing.assert_close(B @ A, expected)
    ids = torch.tensor([[5, 6, 7]])
    with carrying(model, both), torch.no_grad():
        carried = model(input_ids=ids).logits
    with torch.no_grad():
        model.get_submodule(name).weight += expected
        torch.testing.assert_close(model(input_ids=ids).logits, carried)


def test_bf16_weights_do_not_swallow_an_increment(tiny):
    """A hundredth of an ulp of the weights: merged it would be gone."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).eval()
    layer = model.model.layers[0].self_attn.q_proj
    x, A, B = torch.ones(1, 32, dtype=torch.bfloat16), torch.full((1, 32), 1e-3), torch.full((32, 1), 1e-3)
    seen = []
    layer.register_forward_hook(lambda m, a, out: seen.append(out))  # before the increment's
    with carrying(model, {"model.layers.0.self_attn.q_proj": (A, B)}), torch.no_grad():
        layer.weight.zero_()
        out = layer(x)
    assert out.dtype == torch.bfloat16 and not seen[0].any()
    torch.testing.assert_close(out.float(), torch.full((1, 32), 32e-6), rtol=1e-2, atol=0)


def test_an_exception_while_answering_leaves_nothing_behind(model):
    A, B = torch.ones(1, 32), torch.ones(32, 1)
    with pytest.raises(KeyError), carrying(model, {"model.layers.0.self_attn.q_proj": (A, B)}):
        raise KeyError
    assert not model.model.layers[0].self_attn.q_proj._forward_hooks


# -- the exported set --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"width": 64}, {"router": "keys", "top": 2}])
def test_the_exported_set_routes_and_answers_as_the_one_in_memory(options, learned, tiny, tmp_path):
    from peft import PeftModel

    config, result = learned("routed", **options)
    out = export_routed(result.path, tmp_path / "out")
    assert sorted(p.name for p in out.iterdir()) == ["adapters", "base", "routed.json", "router.safetensors"]
    assert sorted(p.name for p in (out / "adapters").iterdir()) == ["00-colour", "01-animal"]
    loaded, memory = load_routed(out), state(result, "01-animal")
    model, ours = AutoModelForCausalLM.from_pretrained(tiny), RoutedSet.of(memory)
    assert loaded.info == ours.info and model_sha256(loaded.model) == model_sha256(model)
    stream = load_stream(load_config(config))
    prompts = [task.encode_prompt(loaded.tokenizer, row) for task in stream for row in task.test]
    assert loaded.route(loaded.model, prompts) == ours.route(model, prompts)
    pairs = list(zip(loaded.answering(loaded.model, prompts), ours.answering(model, prompts), strict=True))
    assert len(pairs) >= 2
    for (places, theirs), (same, mine) in pairs:
        assert places == same
        with theirs as a, mine as b, torch.no_grad():
            for place in places:
                ids = torch.tensor([prompts[place]])
                assert torch.equal(a(input_ids=ids).logits, b(input_ids=ids).logits)
    ids = torch.tensor([prompts[0]])
    for number, name in enumerate(("00-colour", "01-animal")):  # every adapter as PEFT alone loads it
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out / "base"), out / "adapters" / name).eval()
        with carrying(model, ours.increment(((number, 1.0),))) as carried, torch.no_grad():
            torch.testing.assert_close(peft(input_ids=ids).logits, carried(input_ids=ids).logits, atol=1e-6, rtol=0)


def test_what_cannot_be_exported_or_loaded_is_named(learned, tmp_path):
    _, result = learned("routed", width=64)
    with pytest.raises(ConfigError, match="not the folder of a run"):
        export_routed(tmp_path, tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        export_routed(result.path, tmp_path / "there")
    _, plain = learned("inclora", tasks=("colour",))
    with pytest.raises(ConfigError, match="no task was learned by the method routed"):
        export_routed(plain.path, tmp_path / "out")
    out = export_routed(result.path, tmp_path / "out")
    (out / "adapters" / "01-animal" / "adapter_model.safetensors").unlink()
    with pytest.raises(DataError, match="not all of it"):
        load_routed(out)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"top": 2}, "set router: keys"), ({"router": "knn"}, "router: Input should be 'analytic' or 'keys'"), ({"ridge": 0}, "ridge: "),
        ({"router_layer": 0}, "router_layer: "), ({"widht": 3}, "did you mean 'width'"),
    ],
)  # fmt: skip
def test_options_that_cannot_work_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        get("routed", **options)


def test_a_task_without_its_rows_cannot_teach_the_router(model):
    method = get("routed")
    with pytest.raises(ConfigError, match="give end_task the task"):
        method.end_task(method.begin_task(model, None, Memory()), None, Memory())


# -- prompt: soft prompts ---------------------------------------------------------------------------------------------------------------


def rows_of(tokenizer, lengths=(3, 9, 5)):
    """Encoded rows of unequal length, so that a batch is padded; two answer tokens and an end each."""
    g = torch.Generator().manual_seed(0)
    rows = []
    for n in lengths:
        ids = torch.randint(2, len(tokenizer), (n + 3,), generator=g).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * n + ids[n:]})
    return rows


def loud(kind, folder, dtype=F64):
    """A model whose weights are large enough for what stands in front to matter."""
    from forgetless import models

    model, tokenizer = models.load(make_model_folder(folder, kind=kind), dtype=dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5 if p.ndim > 1 else 1)
    return model, tokenizer


def plainly(model, P, ids):
    """Logits of the text [P, ids] of one row, without padding, mask, positions or hooks, at the positions of ids."""
    embeds = torch.cat([P, model.get_input_embeddings()(torch.tensor(ids))])[None]
    with torch.no_grad():
        return model(inputs_embeds=embeds).logits[0, len(P) :]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_a_padded_batch_reads_each_row_behind_the_prompt(kind, tmp_path):
    model, tokenizer = loud(kind, tmp_path / "m")
    P, rows = torch.randn(4, 32, dtype=F64, generator=torch.Generator().manual_seed(2)), rows_of(tokenizer)
    bare = answer_logits(model, batch_of(model, rows))[0].detach()
    with prompted(model, P) as speaker:
        batch = batch_of(model, rows)
        logits, target, outputs = answer_logits(speaker, batch)
        whole = speaker(**{key: value for key, value in batch.items() if key != "labels"})
        alone = speaker(input_ids=torch.tensor([rows[0]["input_ids"]])).logits[0]
    assert whole.logits.shape[:2] == batch["input_ids"].shape  # of the text alone
    for i, row in enumerate(rows):
        expected = plainly(model, P, row["input_ids"])
        torch.testing.assert_close(logits[i], expected[-4:-1], atol=1e-12, rtol=0)
        torch.testing.assert_close(whole.logits[i, -len(expected) :], expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(alone, plainly(model, P, rows[0]["input_ids"]), atol=1e-12, rtol=0)
    assert (logits - bare).abs().max() > 1e-3
    assert torch.equal(answer_logits(model, batch_of(model, rows))[0], bare)  # nothing is left behind
    labelled = batch | {"labels": batch["labels"]}
    with prompted(model, P) as speaker:  # transformers' own loss counts the same positions
        loss = speaker(**labelled).loss
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()).float())


def test_an_encoder_reads_the_prompt_and_the_decoder_sees_it(tmp_path):
    model, tokenizer = loud("t5", tmp_path / "m")
    P, rows = torch.randn(4, 32, dtype=F64, generator=torch.Generator().manual_seed(2)), rows_of(tokenizer)
    with prompted(model, P) as speaker:
        logits, _, _ = answer_logits(speaker, batch_of(model, rows))
    bare = answer_logits(model, batch_of(model, rows))[0]
    for i, row in enumerate(rows):
        ids, answer = row["input_ids"][:-3], row["input_ids"][-3:]
        embeds = torch.cat([P, model.get_encoder().embed_tokens(torch.tensor(ids))])[None]
        expected = model(inputs_embeds=embeds, decoder_input_ids=torch.tensor([[0, *answer[:-1]]])).logits[0]
        torch.testing.assert_close(logits[i], expected, atol=1e-10, rtol=0)
    assert (logits - bare).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_the_scorers_read_every_label_and_generate_behind_the_prompt(kind, tmp_path):
    """Through the shared beginning, the cache, the tree of labels and greedy steps: against plain sequences."""
    from forgetless.evaluation.scorers import _beginning, _greedy, _likelihoods, _prefill

    model, tokenizer = loud(kind, tmp_path / "m", torch.float32)
    P = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    shared = [2, 9, 4, 7, 3, 8, 5, 6, 11, 10]
    prompts, labels = [[*shared, 5], [*shared, 6, 12, 13], [*shared, 20, 21]], [[15, 1], [16, 17, 1], [16, 18, 19, 1]]
    with torch.no_grad(), prompted(model, P) as speaker:
        beginning = _beginning(speaker, prompts)
        assert (beginning is None) == (kind == "t5")
        state = _prefill(speaker, prompts, beginning)
        whole = _likelihoods(speaker, state, labels).whole
        texts = _greedy(speaker, tokenizer, state, 4, 1)
        again = _likelihoods(speaker, _prefill(speaker, prompts), labels).whole
    torch.testing.assert_close(whole, again, atol=1e-4, rtol=1e-5)
    embed = model.get_input_embeddings()

    def said(prompt, answer):
        """Logits that foretell each token of the answer, and the one after it."""
        if kind == "t5":
            embeds = torch.cat([P, embed(torch.tensor(prompt))])[None]
            return model(inputs_embeds=embeds, decoder_input_ids=torch.tensor([[0, *answer]])).logits[0]
        return plainly(model, P, prompt + answer)[len(prompt) - 1 :]

    with torch.no_grad():
        for i, prompt in enumerate(prompts):
            for k, label in enumerate(labels):
                value = said(prompt, label)[:-1].log_softmax(-1)[torch.arange(len(label)), label].sum()
                assert float(whole[i, k]) == pytest.approx(float(value), rel=1e-5, abs=1e-4)
            written = []
            while len(written) <= 4 and (token := int(said(prompt, written)[-1].argmax())) != 1:
                written.append(token)
            assert texts[i] == tokenizer.decode(written, skip_special_tokens=True)


@pytest.mark.parametrize("options", [{"prompt_length": 3}, {"prompt_length": 3, "bottleneck": 8}])
def test_one_step_moves_the_new_prompt_and_nothing_else(options, tmp_path):
    """In the order of the paper, [P_2, P_1], and every gradient is the new prompt's."""
    model, tokenizer = loud("llama", tmp_path / "m")
    method, memory, task = get("prompt", **options), Memory(), Task("t", "{sentence}", [Example("cat red", "red", 0)], [], [])
    untouched = model_sha256(model)
    torch.manual_seed(0)
    method.end_task(method.begin_task(model, task, memory), task, memory)
    first = memory.tensors["prompt/00"].clone()
    assert first.shape == (3, 32)
    if "bottleneck" not in options:  # it begins as embeddings of the vocabulary
        assert all((model.get_input_embeddings().weight == row).all(1).any() for row in first)
    model = method.begin_task(model, task, memory)
    prompt = model.get_submodule("soft_prompt")
    optimizer = method.optimizer(method.param_groups(model), lr=0.1)
    assert torch.equal(prompt()[3:], first)
    rows = rows_of(tokenizer)
    logits, target, _ = answer_logits(model, batch_of(model, rows))
    torch.testing.assert_close(
        logits[1], plainly_hooked(model, method, torch.cat([prompt.trained(), first]), rows[1]["input_ids"]), atol=1e-12, rtol=0
    )
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
    assert all(p.grad is not None and p.grad.any() for group in method.param_groups(model) for p in group["params"])
    before = prompt.trained().detach().clone()
    optimizer.step()
    learned = prompt.trained().detach().clone()
    assert not torch.equal(before, learned) and torch.equal(prompt()[3:], first)
    method.end_task(model, task, memory)
    assert torch.equal(memory.tensors["prompt/00"], first) and torch.equal(memory.tensors["prompt/01"], learned)
    assert model_sha256(model) == untouched and not hasattr(model, "soft_prompt")
    assert not model._forward_pre_hooks and not model._forward_hooks


def plainly_hooked(model, method, P, ids):
    """plainly() on a copy that carries no prompt of its own."""
    bare = copy.deepcopy(model)
    for handle in bare.get_submodule("soft_prompt").handles:
        handle.remove()
    return plainly(bare, P.detach(), ids)[-4:-1]


def test_each_task_is_answered_by_its_own_prompts(learned, tiny):
    config, result = learned("prompt", tasks=("colour", "animal", "mood"), prompt_length=4)
    first, last = state(result, "00-colour"), state(result, "02-mood")
    assert torch.equal(first.tensors["prompt/00"], last.tensors["prompt/00"])
    assert model_sha256(AutoModelForCausalLM.from_pretrained(result.path / "model")) == model_sha256(AutoModelForCausalLM.from_pretrained(tiny))
    for rows in result.matrices["choice"].rows[1:]:  # what does not change is not forgotten
        assert rows[0] == result.matrices["choice"].rows[0][0]
    model, method = AutoModelForCausalLM.from_pretrained(tiny).eval(), get("prompt", prompt_length=4)
    P = [last.tensors[f"prompt/0{k}"] for k in range(3)]
    stream, ids = load_stream(load_config(config)), [5, 6, 7]
    for number, task in enumerate(stream):
        ((places, answerer),) = method.answering(model, task, task.test, last)
        assert places == list(range(len(task.test)))
        with answerer as speaker, torch.no_grad():
            logits = speaker(input_ids=torch.tensor([ids])).logits[0]
        torch.testing.assert_close(logits, plainly(model, torch.cat(P[number::-1]), ids), atol=1e-5, rtol=0)
    other = Task("never learned", "{sentence}", [], [], task.test)
    ((_, answerer),) = method.answering(model, other, other.test, last)
    with answerer as speaker:
        assert speaker is model and not model._forward_hooks


def test_what_a_prompt_cannot_stand_in_front_of_is_refused(small_run, tmp_path):
    with pytest.raises(ConfigError, match="packing: method prompt gives each row something of its own"):
        fl.run(small_run("prompt", tasks=("colour",), packing=True))
    with pytest.raises(ConfigError, match=r"the model takes 4;.*positions are 64, of which 60 are the prompts'; a smaller prompt_length"):
        fl.run(small_run({"name": "prompt", "prompt_length": 30}, tasks=("colour", "animal"), output_dir=str(tmp_path / "other")))
    assert not (tmp_path / "other" / "current").exists()  # before the first step, though the first task would have had room
    with pytest.raises(ConfigError, match="prompt_length: "):
        get("prompt", prompt_length=0)

    class Recurrent(torch.nn.Module):
        config = type("Config", (), {"is_encoder_decoder": False})

        def forward(self, input_ids):
            pass

    with pytest.raises(ConfigError, match="Recurrent takes no position_ids"):
        get("prompt").check(Recurrent())


def test_the_residual_network_adds_to_the_vectors_and_goes():
    """P = Z + W_2 tanh(W_1 Z + b_1) + b_2, by hand: W_1 = W_2 = 1, b_1 = 0, b_2 = 2."""
    prompt = SoftPrompt(torch.tensor([[0.5]]), torch.tensor([[7.0]]), 1)
    with torch.no_grad():
        for layer, bias in ((prompt.network[0], 0.0), (prompt.network[2], 2.0)):
            layer.weight.fill_(1.0)
            layer.bias.fill_(bias)
    expected = 0.5 + torch.tanh(torch.tensor(0.5)) + 2
    torch.testing.assert_close(prompt().detach(), torch.tensor([[expected], [7.0]]))

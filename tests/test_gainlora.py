"""GainLoRA: gates that are shut for earlier tasks' inputs, and rows that are answered with their own."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from conftest import make_model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from forgetless.adapters import adapters
from forgetless.batches import IGNORED, LABELS_SEEN, Collate, answer_logits, answer_loss
from forgetless.errors import ConfigError
from forgetless.evaluation.scorers import score_rows
from forgetless.gates import Gates, activations, before_the_answer, gate, pooled, prompts_pooled
from forgetless.lineage import model_sha256
from forgetless.methods import get
from forgetless.methods._statistics import batch_of
from forgetless.methods.base import Memory
from forgetless.methods.gainlora import PLACE
from forgetless.models import load
from forgetless.tasks import Example, Task

F64 = torch.float64


def task_of(name: str, lead: str, words: list[str], labels: list[str]) -> Task:
    rows = [Example(f"{word} {words[-1]}" if i % 2 else word, labels[i % len(labels)], i) for i, word in enumerate(words)]
    return Task(name, f"{lead} {{sentence}}", rows, rows, rows, labels=labels)


FIRST = task_of("first", "cat sits", ["red", "green", "blue", "yes"], ["dog", "bird"])
SECOND = task_of("second", "stone : river", ["happy", "sad", "calm", "no"], ["good", "bad"])


def learn(method, model, task: Task, memory: Memory, steps: int = 25, rate: float = 1e-2, decay: float = 0.1):
    """The task, by AdamW with weight decay; every step has all its rows."""
    method.begin_task(model, task, memory)
    opt = method.optimizer(method.param_groups(model), lr=rate, weight_decay=decay, max_grad_norm=1.0)
    batch = batch_of(model, [task.encode(method.tokenizer, row) for row in task.train])
    for _ in range(steps):
        model.zero_grad()
        answer_loss(model, batch)[0].backward()
        opt.step()
    method.end_task(model, task, memory)


def prompts(task: Task, tokenizer) -> list[list[int]]:
    return [task.encode_prompt(tokenizer, row) for row in task.train]


def answers(method, model, task: Task, memory: Memory) -> torch.Tensor:
    """The logits after each row's prompt, through answering."""
    found = {}
    for places, answerer in method.answering(model.eval(), task, task.train, memory):
        with answerer as speaker, torch.no_grad():
            for k in places:
                found[k] = speaker(input_ids=torch.tensor([task.encode_prompt(method.tokenizer, task.train[k])])).logits[0, -1]
    return torch.stack([found[k] for k in range(len(task.train))])


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture(scope="module")
def learned(tiny, tokenizer):
    """(method, model, memory after the first task, after the second), every direction of the first one's gate inputs kept."""
    torch.manual_seed(0)
    model, method, memory = AutoModelForCausalLM.from_pretrained(tiny), get("gainlora", gate_energy=1.0, lora_dropout=0.0, gate_width=40), Memory()
    method.tokenizer = tokenizer
    learn(method, model, FIRST, memory)
    first = copy.deepcopy(memory)
    learn(method, model, SECOND, memory)
    return method, model, first, memory


# -- the gate's arithmetic --------------------------------------------------------------------------------------------------------------


def test_a_gate_by_hand():
    """d = 2, h = 1: p_1 = silu(2) = 2 sigmoid(2), p_2 = (silu(p_1), silu(-p_1)), b = p_2[0] - 3 p_2[1]."""
    G = [torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [-1.0]]), torch.tensor([[1.0, -3.0]])]
    p = torch.tensor([[1.0, 1.0]])
    p_1 = 2 / (1 + math.exp(-2))
    p_2 = [p_1 / (1 + math.exp(-p_1)), -p_1 / (1 + math.exp(p_1))]
    b = p_2[0] - 3 * p_2[1]
    assert [x.tolist()[0] for x in activations(G, p)] == [[1.0, 1.0], pytest.approx([p_1]), pytest.approx(p_2)]
    assert gate(G, p).item() == pytest.approx(abs(2 / (1 + math.exp(-b)) - 1))
    assert gate([*G[:2], -G[2]], p).item() == gate(G, p).item()  # |.|: either sign opens it
    assert gate([*G[:2], 0 * G[2]], p).item() == 0.0  # f(0) = 0


def test_gates_are_in_0_and_1(learned, tokenizer):
    method, model, _, memory = learned
    g = torch.cat([method.gates(model, prompts(task, tokenizer), memory) for task in (FIRST, SECOND)])
    assert g.shape == (8, 2) and bool((g >= 0).all() and (g <= 1).all())
    G = [torch.full((3, 4), 1e3), torch.full((4, 3), 1e3), torch.full((1, 4), -1e3)]
    assert gate(G, torch.tensor([[9.0, 9, 9, 9], [-9, -9, -9, -9], [0, 0, 0, 0]])).tolist() == [[1.0], [0.0], [0.0]]


def test_a_prompt_ends_where_the_last_answer_begins():
    n = IGNORED
    labels = [
        [n, n, n, n, 7, 8],  # padded on the left, or not: that is the mask's matter
        [n, n, 5, 6, n, 7],  # an earlier turn of the conversation is part of the prompt
        [n, n, 5, n, 7, n],  # and what closes the last turn is not
        [n, 5, 6, 7, 8, 9],
        [n, n, n, n, n, n],
    ]
    assert before_the_answer(torch.tensor(labels)).sum(1).tolist() == [4, 5, 4, 1, 6]
    assert before_the_answer(torch.tensor(labels))[2].tolist() == [True] * 4 + [False] * 2


def test_the_pooled_embedding_is_of_the_prompt_alone(learned, tokenizer):
    """Padding and answers change nothing, so training and answering see the same."""
    _, model, *_ = learned
    rows = [FIRST.encode(tokenizer, row) for row in FIRST.train]
    batch = Collate(model)(rows)
    assert len({len(row["input_ids"]) for row in rows}) > 1
    x = pooled(model, batch["input_ids"], batch["attention_mask"].bool() & before_the_answer(batch["labels"]))
    for found, ids, alone in zip(x, prompts(FIRST, tokenizer), prompts_pooled(model, prompts(FIRST, tokenizer)), strict=True):
        mean = model.get_input_embeddings().weight[ids].detach().mean(0)
        torch.testing.assert_close(found, mean / mean.square().mean().sqrt())
        torch.testing.assert_close(found, alone[0])
    assert not pooled(model, batch["input_ids"], torch.zeros_like(batch["input_ids"]).bool()).any()  # a row without a prompt


def test_the_first_gate_begins_open(tiny, tokenizer):
    """One row: G_3 points along its p_2, so b is STEEP and g = 2 sigmoid(4) - 1."""
    model, method = AutoModelForCausalLM.from_pretrained(tiny), get("gainlora")
    method.tokenizer = tokenizer
    method.begin_task(model, Task("t", "{sentence}", [Example("cat red", "dog", 0)], [], []), Memory())
    gates = model.get_submodule(PLACE)
    gates.values = None
    answer_logits(model, batch_of(model, [{"input_ids": tokenizer("cat red dog").input_ids, "labels": [IGNORED, IGNORED, 5]}]))
    assert gates.values.shape == (1, 1, 1)
    assert gates.values.item() == pytest.approx(2 / (1 + math.exp(-4)) - 1, rel=1e-5)


# -- the promise -------------------------------------------------------------------------------------------------------------------------


def test_a_new_gate_is_shut_for_old_inputs_after_adamw_with_weight_decay(learned, tokenizer):
    method, model, _, memory = learned
    old, new = (method.gates(model, prompts(task, tokenizer), memory)[:, 1] for task in (FIRST, SECOND))
    assert old.max() < 1e-5
    assert new.min() > 0.05


def test_old_inputs_keep_their_activations_in_the_new_gate(learned, tokenizer):
    """What makes M_2 and M_3, measured with the old gate, the right spaces for the new one, whose G_1 and G_2 have moved."""
    _, model, _, memory = learned
    p = torch.cat(list(prompts_pooled(model, prompts(FIRST, tokenizer))))
    old, new = ([memory.tensors[f"gainlora/{t}/G.{l}"] for l in (1, 2, 3)] for t in ("00", "01"))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(old, new, strict=True))
    for a, b in zip(activations(old, p), activations(new, p), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_answers_to_old_inputs_stay(learned):
    method, model, first, memory = learned
    with torch.no_grad():
        base = torch.stack([model(input_ids=torch.tensor([ids])).logits[0, -1] for ids in prompts(FIRST, method.tokenizer)])
    before, after = (answers(method, model, FIRST, m) for m in (first, memory))
    assert (before - base).abs().max() > 0.1  # the first task has learned something
    assert (answers(method, model, SECOND, memory) - answers(method, model, SECOND, first)).abs().max() > 0.1  # and the second
    assert (after - before).abs().max() < 1e-5


def test_branches_and_gates_of_old_tasks_are_bit_identical_after_a_new_one(learned, tiny):
    _, model, first, memory = learned
    kept = [key for key in first.tensors if key.startswith("gainlora/00/")]
    assert len(kept) == 2 * 2 * 2 + 3
    assert all(torch.equal(first.tensors[key], memory.tensors[key]) for key in kept)
    assert all(key.replace("/00/", "/01/") in memory.tensors for key in kept)
    assert model_sha256(model) == model_sha256(AutoModelForCausalLM.from_pretrained(tiny))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()) and not hasattr(model, LABELS_SEEN)


def test_the_spaces_hold_the_share_of_the_inputs_energy(tiny, tokenizer):
    ranks = {}
    for energy in (0.9, 0.9999):
        torch.manual_seed(0)
        model, method, memory = AutoModelForCausalLM.from_pretrained(tiny), get("gainlora", gate_energy=energy), Memory()
        method.tokenizer = tokenizer
        learn(method, model, FIRST, memory, steps=2)
        G = [memory.tensors[f"gainlora/00/G.{l}"] for l in (1, 2, 3)]
        inputs = activations(G, torch.cat(list(prompts_pooled(model, prompts(FIRST, tokenizer)))))
        for l, x in enumerate(inputs, 1):
            M = memory.spaces()[f"{PLACE}.{l}"].basis
            assert (x @ M).square().sum() >= energy * x.square().sum() * (1 - 1e-6)
        ranks[energy] = [memory.spaces()[f"{PLACE}.{l}"].rank for l in (1, 2, 3)]
        assert method.report(memory)["modules"] == 3 and method.spaced(model) == {f"{PLACE}.1": 32, f"{PLACE}.2": 100, f"{PLACE}.3": 32}
    assert all(a < b for a, b in zip(*ranks.values(), strict=True))


def test_a_third_gate_is_shut_for_the_inputs_of_both_tasks_before_it(learned, tokenizer):
    method, model, _, memory = learned
    memory, third = copy.deepcopy(memory), task_of("third", "apple", ["flies", "runs", "maybe", "good"], ["yes", "no"])
    learn(method, model, third, memory)
    opened = [method.gates(model, prompts(task, tokenizer), memory)[:, 2] for task in (FIRST, SECOND, third)]
    assert opened[0].max() < 1e-5 and opened[1].max() < 1e-5 and opened[2].min() > 0.01


@pytest.mark.parametrize("rows", [3, 40])  # kept one by one, or summed up, being more than the width
def test_prompts_that_differ_in_one_word_of_thousands_are_told_apart(rows, tiny, tokenizer):
    """What of their inputs is not common to all is less than fp32 holds in a sum of squares."""
    long = Task(
        "t",
        "{sentence}",
        [Example("cat " * 3000 + word, "dog", 0) for word in ["red", "green", "blue"] * (rows // 3 + 1)][:rows],
        [],
        [],
        max_prompt_tokens=9999,
    )
    model, method, memory = AutoModelForCausalLM.from_pretrained(tiny), get("gainlora", gate_energy=1.0), Memory()
    method.tokenizer = tokenizer
    method.end_task(method.begin_task(model, long, memory), long, memory)
    M = memory.spaces()[f"{PLACE}.1"].basis.double()
    assert M.shape == (32, 3)
    for p in prompts_pooled(model, prompts(long, tokenizer)[:3]):
        assert (p.double() - p.double() @ M @ M.mT).norm() < 1e-5 * p.norm()


def test_a_task_with_an_earlier_ones_prompts_finds_its_gate_shut(learned, caplog):
    method, model, first, _ = learned
    memory = copy.deepcopy(first)
    again = Task("again", FIRST.prompt, [Example(row.text, "calm", row.row) for row in FIRST.train], [], [], labels=["calm", "sad"])
    learn(method, model, again, memory)
    assert "'again' are to its gate what earlier tasks' were" in caplog.text
    assert (answers(method, model, FIRST, memory) - answers(method, model, FIRST, first)).abs().max() < 1e-5


# -- training and answering are the same -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_a_padded_batch_in_training_is_each_row_answered_alone(kind, tmp_path):
    """Branches of two tasks and a third one's, with gates of each row's own, against the increments that answering puts beside the weights."""
    torch.manual_seed(0)
    model, tokenizer = load(make_model_folder(tmp_path / "m", kind=kind), dtype=F64)
    method, memory = get("gainlora", lora_dropout=0.0, gate_width=20, gate_energy=0.9), Memory()
    method.tokenizer = tokenizer
    tasks = [FIRST, SECOND, task_of("third", "apple", ["flies", "runs", "maybe", "good"], ["yes", "no"])]
    rows = [(task, row) for task in tasks for row in task.train[:2]]
    encoded = [task.encode(tokenizer, row) for task, row in rows]
    for task in tasks:
        model = method.begin_task(model.eval(), task, memory)
        for layer in adapters(model).values():
            torch.nn.init.normal_(layer.lora_B["default"].weight)
        with torch.no_grad():
            logits, target, _ = answer_logits(model, batch_of(model, encoded))
        values = model.get_submodule(PLACE).values
        method.end_task(model, task, memory)
    assert values.shape == (6, 1, 3) and len(values.unique()) == 18
    for k, (task, row) in enumerate(rows):
        ((_, answerer),) = method.answering(model, task, [row], memory)
        torch.testing.assert_close(method.gates(model, [task.encode_prompt(tokenizer, row)], memory)[0], values[k, 0], atol=1e-12, rtol=0)
        with answerer as speaker, torch.no_grad():
            alone, same, _ = answer_logits(speaker, batch_of(speaker, [encoded[k]]))
        torch.testing.assert_close(logits[k][target[k] != IGNORED], alone[0][same[0] != IGNORED], atol=1e-9, rtol=0)


def test_rows_scored_together_are_rows_scored_one_by_one(learned):
    method, model, _, memory = learned

    def scored(rows):
        found = {}
        for places, answerer in method.answering(model, FIRST, rows, memory):
            with answerer as speaker:
                found |= zip(places, score_rows(speaker, method.tokenizer, FIRST, [rows[k] for k in places], ["choice", "exact_match"]), strict=True)
        return [found[k] for k in range(len(rows))]

    rows = FIRST.train[::-1]  # not by length, as the scorer sorts them
    assert scored(rows) == [p for row in rows for p in scored([row])]
    assert [p.row for p in scored(rows)] == [row.row for row in rows]
    together, alone = answers(method, model, FIRST, memory), [dataclasses.replace(FIRST, train=[row]) for row in FIRST.train]
    assert torch.equal(together, torch.cat([answers(method, model, one, memory) for one in alone]))
    assert method.answering(model, FIRST, [], memory) == []  # one of several processes may have no row


def test_gates_are_computed_in_fp32_under_autocast():
    torch.manual_seed(0)
    G = [torch.randn(5, 8), torch.randn(8, 5), torch.randn(1, 8) / 8]
    gates, p = Gates(G, [G]), torch.randn(3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gates(p)
    assert found.dtype == torch.float32 and torch.equal(found, gates(p))
    assert [name for name, _ in gates.named_parameters()] == ["new.0", "new.1", "new.2"]


# -- bad input ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [({"gate_energy": 0}, "gate_energy: "), ({"gate_energy": 1.1}, "gate_energy: "), ({"gate_width": 0}, "gate_width: "), ({"gate_widht": 3}, "did you mean 'gate_width'")],
)  # fmt: skip
def test_options_that_cannot_work_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        get("gainlora", **options)


def test_what_cannot_be_gated_is_refused(learned, tokenizer):
    method, model, first, _ = learned
    with pytest.raises(ConfigError, match=r"method\.gate_width: 7, and the gates of earlier tasks have 40"):
        get("gainlora", gate_width=7).begin_task(copy.deepcopy(model), None, copy.deepcopy(first))
    model = method.begin_task(copy.deepcopy(model), None, Memory())
    with pytest.raises(ConfigError, match="give end_task the task"):
        method.end_task(model, None, Memory())
    with pytest.raises(ConfigError, match=r"packing: .*gainlora"):
        answer_loss(model, Collate(model, packing=True)([FIRST.encode(tokenizer, row) for row in FIRST.train]))
    model.get_submodule(PLACE).values = torch.ones(2, 1, 1)
    with pytest.raises(ConfigError, match=r"method\.lora_modules: a layer reads inputs of shape \(6, "):
        next(iter(adapters(model).values()))(torch.ones(6, 32))  # two rows of three tokens in one

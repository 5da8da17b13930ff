"""Replay, and the upper bounds mtl and per_task: the share of old rows exact, what is kept of the data and what is not, whose answers are trained on."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import CHAT, make_model_folder, write_task
from safetensors.torch import load_file
from test_contract import Killed, kill_at
from test_distributed import config_file, torchrun
from transformers import AutoModelForCausalLM

import forgetless as fl
import forgetless.loop
import forgetless.trainer
from forgetless import models
from forgetless.batches import IGNORED, Collate
from forgetless.config import load_config
from forgetless.errors import ConfigError
from forgetless.evaluation.scorers import score_rows
from forgetless.methods import _generation, get
from forgetless.methods._afresh import take
from forgetless.methods._generation import answers, made_up
from forgetless.methods._rehearsal import Replaying, epoch_rows, exact, pack, row_keys, subset, trained_rows, unpack
from forgetless.methods.base import Memory
from forgetless.methods.per_task import speaking
from forgetless.progress import Progress
from forgetless.tasks import Example, Task, TaskStream, load_stream, sample
from forgetless.trainer import train_task

RATES = [0.01, 0.05, 0.1, 0.5]

SHORT = {mode: {"max_new_tokens": 4} for mode in ("on_policy", "self_synthesised")}  # of what is generated


@pytest.fixture
def loaded(tiny):
    return models.load(tiny)


def some_task(name: str, rows: int, labels=("red", "green", "blue"), text="cat sits {} {}") -> Task:
    fillers = ("apple", "stone", "river", "happy", "sad", "calm", "good")
    examples = [Example(text.format(fillers[i % 7], fillers[i // 7 % 7]), labels[i % len(labels)], i) for i in range(rows)]
    return Task(name, "Text: {sentence}\nAnswer:", examples, [], examples[:4], labels=list(labels))


def order(sampler: Replaying, epochs: int) -> list[int]:
    rows = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        rows += list(sampler)
        assert len(rows) == (epoch + 1) * len(sampler)
    return rows


# -- the share ---------------------------------------------------------------------------------------------------------------------------


def test_the_order_of_a_few_rows_written_out():
    def kinds(*given, epochs=1):
        return "".join("or"[i >= given[0]] for i in order(Replaying(*given), epochs))

    assert kinds(3, 1, exact(0.5), 0) == "ororo"  # an epoch: the three rows of the task, and what comes between
    assert kinds(3, 1, exact(0.5), 0, epochs=2) == "ororororor"  # the second goes on where the first stopped
    assert kinds(3, 9, exact(0.25), 0, epochs=3) == "ooo" + "roo" + "oro"  # every fourth of all, not of an epoch
    assert kinds(8, 2, exact(0.2), 0, 9) == "oooooooor" and kinds(8, 2, exact(0.2), 0, 18, epochs=2) == "o" * 15 + "r" * 3
    assert [epoch_rows(own, exact(rate)) for own, rate in ((95, 0.05), (96, 0.05), (99, 0.01), (1, 0.5), (54, 0.05))] == [99, 101, 99, 1, 56]
    assert exact(0.1) * 10 == 1  # the binary 0.1 is a little more, and its tenth replayed row would come too early or late


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("buffer", [1, 7, 400])
def test_the_share_is_exact_in_every_window(rate, buffer):
    own, epochs = 130, 4
    sampler = Replaying(own, buffer, exact(rate), seed=3)
    rows = order(sampler, epochs)
    old = [int(i >= own) for i in rows]
    before = [0]
    for is_old in old:
        before.append(before[-1] + is_old)
    for n in range(len(rows) + 1):
        assert before[n] == int(n * exact(rate))  # among the first n
    for window in (8, 16, 8 * 4, 100):  # a batch, two, a step of four micro-batches, and any other stretch, wherever it begins
        for i in range(len(rows) - window + 1):
            assert abs(before[i + window] - before[i] - window * rate) < 1
    # every row of the task once before one comes again, and so with the buffer's
    for low, high in ((0, own), (own, own + buffer)):
        seen = [i for i in rows if low <= i < high]
        for k in range(0, len(seen), high - low):
            assert len(set(seen[k : k + high - low])) == len(seen[k : k + high - low])
    assert sorted(i for i in rows[: len(sampler)] if i < own) == list(range(own))


def test_the_order_is_another_in_each_epoch_and_for_each_seed_and_the_same_again():
    one, two, other = (Replaying(60, 20, exact(0.1), seed) for seed in (0, 0, 1))
    rows = order(one, 3)
    assert rows == order(two, 3) != order(other, 3)
    epochs = [rows[i : i + len(one)] for i in range(0, len(rows), len(one))]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    for low, high in ((0, 60), (60, 80)):  # and among themselves both the task's rows and the old ones
        own = [i for i in order(one, 12) if low <= i < high]
        assert len({tuple(own[k : k + high - low]) for k in (0, high - low, 2 * (high - low))}) == 3
    one.set_epoch(1)
    assert list(one) == epochs[1] == list(one)  # whatever came before: a resumed epoch


def test_an_order_of_the_method_beside_is_kept():
    class Backwards:
        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            return iter(range(4, -1, -1) if self.epoch == 0 else range(5))

    rows = order(Replaying(5, 2, exact(0.5), 0, inner=Backwards()), 2)
    assert [i for i in rows if i < 5][:10] == [4, 3, 2, 1, 0, 0, 1, 2, 3, 4][: len([i for i in rows if i < 5])]


@pytest.mark.parametrize(
    ("train", "trained"),
    [
        ({}, 56), ({"num_train_epochs": 3}, 168), ({"max_steps": 2}, 16), ({"max_steps": -1, "num_train_epochs": 0.5}, 32),
        ({"max_steps": 8}, 56 + 8), ({"max_steps": 4, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 3}, 56),  # 10 batches, 4 steps
        ({"max_steps": 5, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 3}, 56 + 18),
        ({"max_steps": 9, "per_device_train_batch_size": 6, "dataloader_drop_last": True}, 54),
        ({"max_steps": 10, "per_device_train_batch_size": 6, "dataloader_drop_last": True}, 56 + 6),  # places in the order, two of which are never trained
    ],
)  # fmt: skip
def test_how_many_rows_a_task_trains_on(train, trained):
    assert trained_rows(train, 56) == trained


def collected(config: dict, monkeypatch) -> list[list[list[int]]]:
    """By task, the token ids of the rows that reach the collator, in their order."""
    tasks: list[list[list[int]]] = []

    class Watching(Collate):
        def __init__(self, *given):
            super().__init__(*given)
            tasks.append([])

        def __call__(self, rows):
            tasks[-1] += [row["input_ids"] for row in rows]
            return super().__call__(rows)

    with monkeypatch.context() as patch:
        patch.setattr(forgetless.trainer, "Collate", Watching)
        fl.run(config)
    return tasks


@pytest.mark.parametrize("mode", ["mixed", "consolidation"])
@pytest.mark.parametrize(
    ("rate", "train"),
    [
        (0.05, {"max_steps": 14, "per_device_train_batch_size": 8}), (0.5, {"num_train_epochs": 2, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 3}),
        (0.1, {"max_steps": 5, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}),
    ],
)  # fmt: skip
def test_the_share_is_exact_in_what_reaches_the_model(mode, rate, train, small_run, monkeypatch):
    train = {"learning_rate": 1e-4, "bf16": False, "use_cpu": True} | train
    config = small_run({"name": "replay", "mode": mode, "rate": rate, "buffer": 5}, tasks=("colour", "animal"), train=train)
    first, second = collected(config, monkeypatch)
    stream, (_, tokenizer) = load_stream(load_config(config)), models.load(config["model"])
    own, other = ({tuple(task.encode(tokenizer, e)["input_ids"]) for e in task.train} for task in (stream[1], stream[0]))
    assert all(tuple(row) in other for row in first)
    old = [tuple(row) in other for row in second]
    assert all(was_old or tuple(row) in own for row, was_old in zip(second, old, strict=True)) and not own & other
    n = len(second)
    if mode == "mixed":
        assert all(sum(old[:k]) == int(k * exact(rate)) for k in range(n + 1))
    else:
        assert old == [False] * (n - int(n * exact(rate))) + [True] * int(n * exact(rate))
    assert len({tuple(row) for row, was_old in zip(second, old, strict=True) if was_old}) == min(5, sum(old))


def test_the_first_task_trains_as_if_there_were_no_replay(small_run, tmp_path):
    plain, replay = (fl.run(small_run(name, tasks=("colour",), output_dir=str(tmp_path / name))) for name in ("seqft", "replay"))
    ours, theirs = (load_file(result.path / "model" / "model.safetensors") for result in (replay, plain))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


# -- what is kept ------------------------------------------------------------------------------------------------------------------------


def test_rows_as_tensors_and_back():
    rows = [{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [8], "labels": [8]}, {"input_ids": [9, 1], "labels": [IGNORED, 1]}]
    packed = pack(rows) | {"keys": torch.tensor([0.3, 0.1, 0.2])}
    assert packed["ids"].tolist() == [5, 6, 7, 8, 9, 1] and packed["ids"].dtype == torch.int32
    assert packed["answers"].tolist() == [False, True, True, True, False, True] and packed["lengths"].tolist() == [3, 1, 2]
    assert unpack(packed) == rows
    less = subset(packed, torch.tensor([2, 0]))
    assert unpack(less) == [rows[2], rows[0]] and less["keys"].tolist() == packed["keys"][[2, 0]].tolist()
    assert unpack(pack([])) == []


def test_rows_come_back_with_their_own_prompt_and_answer(loaded):
    model, tokenizer = loaded
    first, second = some_task("one", 20), some_task("two", 20, ("yes", "no"), "dog runs {} {}")
    first.prompt = "colour : {sentence}\nAnswer:"
    method, memory = get("replay", buffer=6), Memory()
    method.tokenizer = tokenizer
    for task in (first, second):
        method.end_task(method.begin_task(model, task, memory), task, memory)
    third = some_task("three", 9, ("bird", "dog"))
    rows = method.train_data(third, memory)
    assert rows[:9] == third.train and method.replayed == 12
    every = [[task.encode(tokenizer, e) for e in task.train] for task in (first, second)]
    assert all(row in every[k] for k in (0, 1) for row in rows[9:][6 * k : 6 * k + 6])
    sampler = method.sampler(rows, 0)
    assert len(sampler) == epoch_rows(9, exact(0.05)) and max(order(sampler, 60)) == 20


@pytest.mark.parametrize("name", ["replay-lora", "replay-gorp"])
def test_what_the_method_beside_keeps_and_what_replay_keeps_stand_side_by_side(name, loaded):
    model, tokenizer = loaded
    on = name.removeprefix("replay-")
    method, alone, memory, own = get("replay", buffer=4, on=on), get(on), Memory(), Memory()
    method.tokenizer = alone.tokenizer = tokenizer
    task, twin = some_task("one", 9), copy.deepcopy(model)
    for k in (1, 2):
        torch.manual_seed(k)
        method.end_task(method.begin_task(model, task, memory), task, memory)
        torch.manual_seed(k)
        alone.end_task(alone.begin_task(twin, task, own), task, own)
        assert len(memory.of("replay")["lengths"]) == 4 * k
        assert {k: t for k, t in memory.tensors.items() if not k.startswith("replay/")}.keys() == own.tensors.keys()


def test_as_many_rows_of_each_label(loaded):
    labels = ["red"] * 90 + ["green"] * 9 + ["blue"] * 2
    task = some_task("one", 101)
    task.train = [Example(e.text, label, e.row) for e, label in zip(task.train, labels, strict=True)]

    def said(method, memory) -> Counter:
        rows = unpack(memory.of("replay"))
        return Counter(loaded[1].decode([t for t in row["labels"] if t != IGNORED][:1]) for row in rows)

    def kept(other: Task | None = None, **options) -> Counter:
        method, memory = get("replay", **options), Memory()
        method.tokenizer = loaded[1]
        for one in (task, other) if other else (task,):
            method.end_task(loaded[0], one, memory)
        return said(method, memory)

    assert kept(buffer=6) == {"red": 2, "green": 2, "blue": 2}
    assert kept(buffer=12) == {"red": 5, "green": 5, "blue": 2}  # there are no more
    assert kept(buffer=200) == {"red": 90, "green": 9, "blue": 2}
    assert kept(buffer=20, choose="reservoir")["red"] > 10
    # of all: each label of each task counts alike, whenever it came
    other = some_task("two", 60, ("yes", "no"))
    assert kept(other, buffer=10, per="total") == {"red": 2, "green": 2, "blue": 2, "yes": 2, "no": 2}
    assert sum(kept(other, buffer=10).values()) == 20


def test_answers_that_are_free_text_count_as_one_label(loaded):
    task = some_task("one", 30)
    task.labels = None
    other = some_task("two", 30, ("yes", "no"))
    method, memory = get("replay", buffer=9, per="total"), Memory()
    method.tokenizer = loaded[1]
    for one in (task, other):
        method.end_task(loaded[0], one, memory)
    rows, free = unpack(memory.of("replay")), [task.encode(loaded[1], e) for e in task.train]
    assert sum(row in free for row in rows) == 3


def test_a_reservoir_keeps_every_row_with_equal_chance():
    """Rows of two tasks of unlike size, 8 kept of 40 in all; over 3,000 seeds each is kept a fifth of the time, give or take five standard deviations."""
    kept, trials = torch.zeros(40), 3000
    for seed in range(trials):
        keys = torch.cat([row_keys([None] * 10, 2 * seed, False).sort().values[:8], row_keys([None] * 30, 2 * seed + 1, False).sort().values[:8]])
        rows = torch.cat([row_keys([None] * 10, 2 * seed, False).argsort()[:8], row_keys([None] * 30, 2 * seed + 1, False).argsort()[:8] + 10])
        kept[rows[keys.argsort()[:8]]] += 1
    assert float((kept / trials - 0.2).abs().max()) < 5 * (0.2 * 0.8 / trials) ** 0.5


def test_a_reservoir_over_tasks_is_the_smallest_keys_of_all(loaded):
    """What `joined` keeps, task by task, is what one draw over all rows would."""
    method, memory, tokenizer = get("replay", buffer=8, per="total", choose="reservoir"), Memory(), loaded[1]
    method.tokenizer = tokenizer
    tasks = [some_task("one", 10, text="cat {} {} red"), some_task("two", 30, text="dog {} {} blue"), some_task("three", 20, text="bird {} {} sad")]
    keys, rows = [], []
    for seed, task in enumerate(tasks):
        torch.manual_seed(seed)
        method.begin_task(loaded[0], task, memory)
        method.end_task(loaded[0], task, memory)
        keys.append(row_keys([None] * len(task.train), seed, False))
        rows += [task.encode(tokenizer, e) for e in task.train]
        chosen = torch.cat(keys).argsort()[:8].tolist()
        assert sorted(map(str, unpack(memory.of("replay")))) == sorted(str(rows[i]) for i in chosen)


# -- privacy -----------------------------------------------------------------------------------------------------------------------------

SECRET, ANSWER = "apple river apple calm apple", "stone sad stone happy stone"


def found_in(folder: Path, text: str, tokenizer) -> set[str]:
    """Files under `folder` that hold a text, as such or as token ids in any integer type."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    needles = [text.encode()] + [torch.tensor(ids, dtype=kind).numpy().tobytes() for kind in (torch.int16, torch.int32, torch.int64)]
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and any(needle in p.read_bytes() for needle in needles)}


@pytest.mark.parametrize(
    ("mode", "store", "keeps"),
    [("mixed", "rows", (True, True)), ("on_policy", "prompts", (True, False)), ("self_synthesised", "nothing", (False, False))],
)
def test_no_more_of_a_row_is_in_the_run_folder_than_the_mode_keeps(mode, store, keeps, small_run, tmp_path):
    config = small_run(
        {"name": "replay", "mode": mode, "rate": 0.3, **SHORT.get(mode, {})}, tasks=(), store=store, evaluate={"scorers": ["exact_match"]}
    )
    for name, word in (("one", "cat"), ("two", "dog")):
        rows = [{"prompt": f"{word} {SECRET}", "completion": f"{ANSWER} {word}"}] * 6
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        data = str(tmp_path / f"{name}.jsonl")
        config["tasks"].append({"name": name, "data": data, "test": data, "dev": data, "format": "prompt_completion"})
    path, (_, tokenizer) = fl.run(config).path, models.load(config["model"])
    for text, kept in zip((SECRET, ANSWER), keeps, strict=True):
        where = {name for name in found_in(path, text, tokenizer) if not name.startswith("model/")}
        allowed = {f"tasks/{t}/{file}" for t in ("00-one", "01-two") for file in ("state/method.safetensors", "predictions.jsonl")}
        assert bool(where) == kept and where <= allowed, where
        assert not kept or "tasks/01-two/state/method.safetensors" in where


def test_under_on_policy_nothing_that_is_kept_depends_on_the_answers(loaded):
    """Two tasks of the same prompts and other answers leave the same memory, to the last bit."""
    kept = []
    for labels in (("red", "green"), ("yes", "no", "maybe")):
        method, memory = get("replay", mode="on_policy", buffer=10), Memory()
        method.tokenizer = loaded[1]
        method.end_task(loaded[0], some_task("one", 30, labels), memory)
        kept.append(memory.of("replay"))
    assert kept[0].keys() == kept[1].keys() == {"ids", "lengths", "ends", "keys"}
    assert all(torch.equal(kept[0][key], kept[1][key]) for key in kept[0])


@pytest.mark.parametrize(
    ("mode", "store", "refused"),
    [
        ("mixed", "prompts", "rows"), ("mixed", "nothing", "rows"), ("consolidation", "prompts", "rows"), ("on_policy", "nothing", "prompts"),
        ("mixed", "rows", None), ("on_policy", "prompts", None), ("self_synthesised", "nothing", None),
    ],
)  # fmt: skip
def test_a_run_that_may_not_keep_what_the_mode_needs_is_refused(mode, store, refused, small_run):
    config = small_run({"name": "replay", "mode": mode, **SHORT.get(mode, {})}, tasks=("colour",), store=store)
    config["train"]["max_steps"] = 1
    if refused is None:
        fl.run(config)
        return
    with pytest.raises(ConfigError, match=f"store: {store} forbids what method replay keeps of each task: {refused}"):
        fl.run(config)
    assert not Path(config["output_dir"]).exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rate": 0}, "rate: .*greater than 0"), ({"rate": 1.0}, "rate: .*less than 1"), ({"buffer": 0}, "buffer"), ({"mode": "mix"}, "mode"),
        ({"mode": "on_policy", "choose": "balanced"}, "choose: balanced asks for each prompt's label"),
        ({"seed_text": ["cat"]}, "seed_text: is what self_synthesised begins with, and mode is mixed"),
        ({"on": {"rank": 3}}, "on: names the method it goes beside"), ({"on": "replay"}, "once is enough"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_meant_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        get("replay", **options)


def test_a_task_without_a_tokenizer_is_refused(loaded):
    method, task = get("replay"), some_task("one", 3)
    with pytest.raises(ConfigError, match="task 'one' cannot be read without a tokenizer"):
        method.end_task(method.begin_task(loaded[0], task, Memory()), task, Memory())


# -- what the model says -----------------------------------------------------------------------------------------------------------------


def naively(model, prompt: list[int], end: int, longest: int) -> list[int]:
    """Greedy, one row, one token after another, no cache."""
    said: list[int] = []
    with torch.no_grad():
        while len(said) < longest and (not said or said[-1] != end):
            more = {"decoder_input_ids": torch.tensor([[Collate(model).first, *said]])} if model.config.is_encoder_decoder else {}
            ids = torch.tensor([prompt if more else prompt + said])
            said.append(int(model(input_ids=ids, **more).logits[0, -1].argmax()))
    return said


@pytest.fixture(params=["llama", "gpt2", "t5"])
def of_a_kind(request, tmp_path):
    model, tokenizer = models.load(make_model_folder(tmp_path / "m", kind=request.param))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)  # far from ties, and not the same word for ever
    return model, tokenizer


def test_the_answers_of_on_policy_are_the_model_s(of_a_kind):
    """Of the model as it is when the next task begins, whatever it answered when the prompts were kept, and whatever settings it brings for generation."""
    model, tokenizer = of_a_kind
    method, memory = get("replay", mode="on_policy", rate=0.5, buffer=12, max_new_tokens=5), Memory()
    method.tokenizer = tokenizer
    first, second = some_task("one", 30), some_task("two", 9)
    method.end_task(method.begin_task(model, first, memory), first, memory)
    assert not method.generated
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    model.generation_config.repetition_penalty = 9.0
    method.begin_task(model.train(), second, memory)
    assert model.training and model.generation_config.repetition_penalty == 9.0
    rows = method.train_data(second, memory)[9:]
    prompts = [first.encode_prompt(tokenizer, e) for e in first.train]
    assert len(rows) == epoch_rows(9, exact(0.5)) - 9 == 8 and len({str(r["input_ids"]) for r in rows}) > 4
    for row in rows:
        cut = sum(label == IGNORED for label in row["labels"])
        prompt, answer = row["input_ids"][:cut], row["input_ids"][cut:]
        assert prompt in prompts and row["labels"][cut:] == answer
        assert answer == naively(model.eval(), prompt, tokenizer.eos_token_id, 5)
    assert len({str(row["labels"]) for row in rows}) > 1


def test_an_answer_ends_with_its_own_end_token_and_within_the_model_s_positions(loaded):
    model, _ = loaded
    prompts = [[5, 6, 7], [8] * 62, [9, 10], [4] * 70]
    say = [naively(model, p, 1, 64 - len(p)) for p in prompts[:3]]
    assert answers(model, prompts, [1] * 4, 100) == [*say, []]
    cut = say[2][1]  # a word of an answer, where it ends one row; the other goes past it
    assert answers(model, [prompts[2]] * 2, [cut, 1], 9) == [say[2][: say[2].index(cut) + 1], say[2][:9]]


def test_sampling_follows_the_probabilities():
    scores = torch.tensor([[0.1, 0.2, 0.7], [0.1, 0.2, 0.7], [0.1, 0.2, 0.7], [0.0, 1.0, 0.0]]).log()
    draws = torch.tensor([[0.05, 0.1], [0.299, 0.31], [0.999999, 0.29], [0.0, 0.9999999999999999]], dtype=torch.float64)
    choose = _generation._draw(draws, 1.0)
    assert choose(None, scores).argmax(-1).tolist() == [0, 1, 2, 1]
    assert choose(None, scores).argmax(-1).tolist() == [1, 2, 1, 1]  # the second column: 0.1 is where the second begins
    hot = _generation._draw(torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1, None], 1e9)
    drawn = hot(None, scores[:1].expand(1000, 3)).argmax(-1)
    assert torch.bincount(drawn).tolist() == pytest.approx([333, 333, 334], abs=1)  # at a high temperature all alike


def test_made_up_rows_are_the_same_whatever_the_batch_and_others_for_another_seed(loaded, monkeypatch):
    model, tokenizer = loaded
    rows = made_up(model, tokenizer, 20, 6, seed=0)
    assert len(rows) == 20 and len({str(r) for r in rows}) == 20
    for row in rows:  # no bos: what eos ends, a text begins after
        assert row["input_ids"][0] == tokenizer.eos_token_id and row["labels"] == [IGNORED, *row["input_ids"][1:]]
        assert 2 <= len(row["input_ids"]) <= 7 and tokenizer.eos_token_id not in row["input_ids"][1:-1]
    monkeypatch.setattr(_generation, "BATCH", 3)
    assert made_up(model, tokenizer, 20, 6, seed=0) == rows != made_up(model, tokenizer, 20, 6, seed=1)
    begun = made_up(model, tokenizer, 4, 3, seed=0, beginnings=["cat sits", "dog"])
    assert [tokenizer.decode(r["input_ids"][: r["labels"].count(IGNORED)]) for r in begun] == ["cat sits", "dog"] * 2


def test_a_chat_model_makes_up_both_turns_and_learns_the_answer(tmp_path):
    model, tokenizer = models.load(make_model_folder(tmp_path / "m", chat_template=CHAT))
    rows = made_up(model, tokenizer, 12, 5, seed=0)
    assert rows and len(rows) <= 12
    for row in rows:
        cut = row["labels"].count(IGNORED)
        prompt, answer = tokenizer.decode(row["input_ids"][:cut]), row["input_ids"][cut:]
        assert prompt.startswith("user : ") and prompt.endswith("<eos> assistant :") and len(prompt.split()) > 5
        assert 1 <= len(answer) <= 5 and row["labels"][cut:] == answer and tokenizer.eos_token_id not in answer[:-1]


def test_made_up_rows_come_before_the_first_task_too_and_nothing_is_kept(loaded):
    model, tokenizer = loaded
    method, memory, task = get("replay", mode="self_synthesised", rate=0.5, buffer=7, max_new_tokens=4), Memory(), some_task("one", 20)
    method.tokenizer = tokenizer
    method.begin_task(model, task, memory)
    rows = method.train_data(task, memory)
    assert rows[:20] == task.train and len(rows) == 27  # 19 are wanted, and `buffer` bounds them
    method.end_task(model, task, memory)
    assert not memory.tensors and not memory.info
    again = get("replay", mode="self_synthesised", rate=0.5, buffer=7, max_new_tokens=4)
    again.resume_task(model, task, memory, method.state_dict())
    assert again.train_data(task, memory) == rows


def test_an_encoder_decoder_model_needs_something_to_answer(tmp_path):
    model, tokenizer = models.load(make_model_folder(tmp_path / "m", kind="t5"))
    with pytest.raises(ConfigError, match="writes answers and no prompts; give seed_text"):
        get("replay", mode="self_synthesised").check(model)
    get("replay", mode="self_synthesised", seed_text=["cat sits"]).check(model)
    rows = made_up(model, tokenizer, 3, 4, seed=0, beginnings=["cat sits"])
    assert all(r["input_ids"][:2] == tokenizer("cat sits").input_ids and 1 <= len(r["input_ids"]) - 2 <= 4 for r in rows)


def test_what_a_mode_says_of_itself():
    said = {mode: get("replay", mode=mode) for mode in ("mixed", "consolidation", "on_policy", "self_synthesised")}
    assert [m.stores for m in said.values()] == ["rows", "rows", "prompts", "nothing"]
    assert [m.needs_old_data for m in said.values()] == [True, True, True, False]
    assert [bool(m.extra_forward) for m in said.values()] == [False, False, True, True]
    assert said["self_synthesised"].bytes_a_task == "none" and get("replay", per="total").bytes_a_task.startswith("none")


# -- two processes -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["on_policy"])
def test_two_processes_replay_what_one_does(mode, small_run, tmp_path):
    """They share the prompts to answer, and each trains on its part of every batch."""
    config = small_run({"name": "replay", "mode": mode, "rate": 0.3, "max_new_tokens": 4}, tasks=("colour", "animal"))
    done = torchrun("-m", "forgetless", "run", config_file(config, tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    config["train"]["per_device_train_batch_size"] *= 2
    alone = fl.run(config | {"output_dir": str(tmp_path / "alone")})
    for name in ("00-colour", "01-animal"):
        ours, other = (load_file(path / "tasks" / name / "model" / "model.safetensors") for path in (tmp_path / "run", alone.path))
        for key, W in ours.items():  # the rows of a step are the same, and added up in another order
            torch.testing.assert_close(W, other[key], atol=2e-4, rtol=0)
        ours, other = (load_file(path / "tasks" / name / "state" / "method.safetensors") for path in (tmp_path / "run", alone.path))
        assert ours.keys() == other.keys() and all(torch.equal(ours[key], other[key]) for key in ours)


# -- mtl ---------------------------------------------------------------------------------------------------------------------------------


def test_mtl_trains_on_every_row_of_every_task_so_far_with_its_own_prompt(small_run, monkeypatch):
    config = small_run("mtl", train={"learning_rate": 1e-4, "num_train_epochs": 1, "per_device_train_batch_size": 8, "bf16": False, "use_cpu": True})
    config["tasks"][0]["prompt"] = "colour : {sentence} yes"
    seen = collected(config, monkeypatch)
    stream, (_, tokenizer) = load_stream(load_config(config)), models.load(config["model"])
    every = [[task.encode(tokenizer, e)["input_ids"] for e in task.train] for task in stream]
    for k in range(3):
        assert sorted(seen[k]) == sorted(sum(every[: k + 1], []))
    assert {tuple(row) for row in seen[2][: len(every[0])]} - {tuple(row) for row in every[0]}  # shuffled: not task by task


def test_mtl_is_training_on_the_joined_rows_from_the_untouched_model(small_run, tmp_path):
    config = small_run("mtl", tasks=("colour", "animal"))
    result = fl.run(config)
    model, tokenizer = models.load(config["model"])
    first, second = load_stream(load_config(config))
    joined = Task("joined", second.prompt, [*first.train, *second.train], [], [], labels=[*second.labels, *first.labels])
    torch.manual_seed(1)
    train_task(model, tokenizer, joined, get("seqft"), joined.train, config["train"] | {"max_steps": 12}, 1, Progress())
    ours = load_file(result.path / "model" / "model.safetensors")
    assert all(torch.equal(ours[key], value) for key, value in model.state_dict().items())


def test_mtl_gets_the_steps_of_all_its_tasks():
    method = get("mtl")
    assert [method.settings({"max_steps": 40, "learning_rate": 1.0}, i) for i in (0, 2)] == [
        {"max_steps": n, "learning_rate": 1.0} for n in (40, 120)
    ]
    for train in ({}, {"max_steps": -1}, {"num_train_epochs": 2}):
        assert method.settings(train, 3) == train


@pytest.mark.parametrize("name", ["mtl", "per_task"])
def test_every_task_begins_at_the_untouched_model(name, small_run, loaded, monkeypatch):
    starts, base = [], loaded[0].state_dict()
    prepare = forgetless.trainer.prepare

    def watched(model, *given):
        starts.append({key: value.clone() for key, value in model.state_dict().items()})
        return prepare(model, *given)

    monkeypatch.setattr(forgetless.trainer, "prepare", watched)
    fl.run(small_run(name, tasks=("colour", "animal")))
    assert len(starts) == 2 and all(torch.equal(start[key], base[key]) for start in starts for key in base)


@pytest.mark.parametrize("name", ["mtl", "per_task"])
@pytest.mark.parametrize("on", ["lora", "gorp"])
def test_the_method_beside_an_upper_bound_knows_of_no_other_task(name, on, small_run):
    """lora begins with a new adapter, gorp with no space."""
    result = fl.run(small_run({"name": name, "on": on}, tasks=("colour", "animal")))
    if on == "lora":  # the committed adapter alone is what the task taught
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(load_config(result.path / "run.yaml").model)
        ours = PeftModel.from_pretrained(base, result.path / "tasks/01-animal/state").merge_and_unload().state_dict()
        merged = AutoModelForCausalLM.from_pretrained(result.path / "model").state_dict()
        assert all(torch.allclose(ours[key], merged[key], atol=1e-6) for key in merged)
    events = [json.loads(line) for line in (result.path / "timing.jsonl").read_text().splitlines()]
    assert all(not e["update_leak"] for e in events if e["event"] == "step")  # nothing is protected, so nothing can leak


@pytest.mark.parametrize("name", ["mtl", "per_task"])
def test_killed_and_resumed_the_method_beside_an_upper_bound_still_knows_of_no_other_task(name, small_run, tmp_path, monkeypatch):
    config = small_run({"name": name, "on": {"name": "gorp", "energy": 0.5}}, tasks=("colour", "animal"))
    whole = (fl.run(config | {"output_dir": str(tmp_path / "whole")}).path / "lineage.jsonl").read_text()
    broken = config | {"checkpoint_every": 2}
    with pytest.raises(Killed), monkeypatch.context() as patch:
        kill_at(patch, 6 + 4)
        fl.run(broken)
    assert (fl.run(broken).path / "lineage.jsonl").read_text() == whole


@pytest.mark.parametrize("name", ["mtl", "per_task"])
def test_a_resumed_task_finds_the_untouched_weights(name, tiny, loaded):
    """Those that are quantised while a task trains are in no checkpoint."""
    method, tasks = get(name), [some_task(n, 4) for n in ("one", "two")]
    method.stream, method.untouched, method.committed = TaskStream(tasks), lambda: models.load(tiny)[0], lambda name: Path(tiny)
    model, base = loaded[0], models.load(tiny)[0].state_dict()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    again = method.resume_task(model, tasks[1], Memory(), {})
    assert all(torch.equal(value, base[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize("name", ["mtl", "per_task"])
def test_an_upper_bound_protects_no_prompts(name, small_run, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "cat red"}\n')
    config = small_run({"name": name, "on": "gorp"}, tasks=("colour",), protect_from=str(tmp_path / "prompts.jsonl"))
    with pytest.raises(ConfigError, match=f"method {name} keeps no protected input space"):
        fl.run(config)


# -- per_task ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def routed(tiny, tmp_path_factory):
    """A run of three tasks, with a watch set."""
    folder = tmp_path_factory.mktemp("routed")
    watch = write_task(folder / "data", "mood") | {"name": "watched"}
    config = {
        "model": tiny, "tasks": [write_task(folder / "data", name) for name in ("colour", "animal", "mood")], "method": {"name": "per_task"}, "watch": [watch],
        "train": {"learning_rate": 5e-3, "max_steps": 25, "per_device_train_batch_size": 6, "bf16": False, "use_cpu": True},
        "evaluate": {"limit": 12, "unseen": True}, "output_dir": str(folder / "run"),
    }  # fmt: skip
    return config, fl.run(config)


def test_with_a_model_a_task_nothing_is_forgotten(routed):
    config, result = routed
    for matrix in result.matrices.values():
        for j in range(3):
            assert {row[j] for row in matrix.rows[j:]} == {matrix.rows[j][j]}  # from its own on the column stays as it is
        assert matrix.forgetting() == 0.0 and matrix.backward_transfer() == 0.0
    assert all(result.matrices["choice"].rows[j][j] > 0.8 for j in range(3))
    lines = [[json.loads(line) for line in (p / "predictions.jsonl").read_text().splitlines()] for p in sorted((result.path / "tasks").iterdir())]
    of_the_first = [[line for line in row if line["task"] == "colour"] for row in lines]
    assert of_the_first[0] == of_the_first[1] == of_the_first[2]  # answer for answer


def test_each_committed_model_gives_its_own_task_s_scores_and_the_last_one_the_rest(routed):
    config, result = routed
    stream = load_stream(load_config(config))
    for j, name in enumerate(("00-colour", "01-animal", "02-mood")):
        model, tokenizer = models.load(str(result.path / "tasks" / name / "model"))

        def score(task, model=model, tokenizer=tokenizer):
            rows = score_rows(model, tokenizer, task, sample(task.test, 12, 0), ["choice"])
            return sum(p.score("choice") for p in rows) / len(rows)

        scores = result.matrices["choice"].rows[j]
        assert scores[j:] == [score(task) for task in stream.tasks[j:]]  # its own, and those not learned yet
        assert result.watch["watched"]["choice"][j + 1] == score(stream.watch[0])


def test_after_another_model_has_spoken_the_weights_are_the_same_bits(tiny, loaded, tmp_path):
    other = make_model_folder(tmp_path / "other", seed=5)
    model = loaded[0]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    places = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="boom"), speaking(model, Path(other), models.load) as speaker:
        theirs = models.load(other)[0].state_dict()
        assert speaker is model and all(torch.equal(value, theirs[key]) for key, value in model.state_dict().items())
        raise RuntimeError("boom")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [p.data_ptr() for p in model.parameters()] == places


@pytest.mark.parametrize("keep", ["last 1", "last 2"])
def test_a_run_that_lets_go_of_models_is_refused_before_it_trains_without_one(keep, small_run, tmp_path, monkeypatch):
    trained, train = [], forgetless.loop.train_task
    monkeypatch.setattr(forgetless.loop, "train_task", lambda *given: trained.append(1) or train(*given))
    config = small_run("per_task", keep=keep)
    config["tasks"].append(write_task(tmp_path / "data", "colour") | {"name": "again"})
    with pytest.raises(ConfigError, match="method per_task: answers with every task's own model, and that of 'colour' is gone; it needs keep: all"):
        fl.run(config)
    assert len(trained) == len((Path(config["output_dir"]) / "lineage.jsonl").read_text().splitlines()) == int(keep[-1]) + 1


def test_the_untouched_weights_are_put_where_the_model_s_are(loaded, tmp_path):
    model = models.load(make_model_folder(tmp_path / "tied", tied=True))[0]
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    base = models.load(str(tmp_path / "tied"))[0]
    take(model, base)
    assert model.lm_head.weight is model.model.embed_tokens.weight and torch.equal(model.lm_head.weight, base.lm_head.weight)


def test_without_a_stream_they_act_on_what_they_are_given(loaded):
    model, tokenizer = loaded
    task = some_task("one", 6)
    for name in ("mtl", "per_task", "replay"):
        method, memory = get(name), Memory()
        method.tokenizer = tokenizer
        assert method.begin_task(model, task, memory) is model
        assert method.train_data(task, memory) == task.train and method.sampler(task.train, 0) is None
        (places, speaker), *_ = method.answering(model, task, task.train, memory)
        with speaker as speaks:
            assert places == list(range(6)) and speaks is model
        method.end_task(model, task, memory)


def test_the_stream_decides_who_answers(loaded, tmp_path):
    method = get("per_task")
    tasks = [some_task(name, 4) for name in ("one", "two", "three")]
    method.stream, method.committed = TaskStream(tasks), lambda name: Path(tmp_path / name)
    method.look(tasks[1])
    others = [method.answering(loaded[0], task, task.train, Memory())[0][1] for task in (*tasks, some_task("watched", 4))]
    assert [type(o).__name__ for o in others] == ["_GeneratorContextManager", "nullcontext", "nullcontext", "nullcontext"]

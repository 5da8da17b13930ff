"""What a method measures on data before or after a task: row by row, in bounded memory, with a progress bar."""

from __future__ import annotations

import gc

import pytest
import torch
from conftest import make_model_folder, write_task
from transformers import AutoModelForCausalLM, AutoTokenizer

from forgetless.config import TaskConfig
from forgetless.fake import is_fake
from forgetless.methods import REGISTRY, get
from forgetless.methods.base import Memory
from forgetless.progress import Progress
from forgetless.tasks import TaskStream, load_task

# what else reads rows when it is told to
VARIANTS = {name: {} for name in REGISTRY} | {
    "gainlora": {"gate_width": 16}, "osft-inputs": {"protect": "inputs"}, "routed-keys": {"router": "keys"}, "replay-on_policy": {"mode": "on_policy", "max_new_tokens": 4},
    "replay-self_synthesised": {"mode": "self_synthesised", "max_new_tokens": 4, "rate": 0.5}, "ewc-inclora": {"on": "inclora"},
}  # fmt: skip
# rows that are measured must not pile up; ogd keeps a gradient a row, routed and replay what they are made of
STREAMED = ("ewc", "ewc-inclora", "esacl", "gainlora", "gpm", "inflora", "osft-inputs")


class Seen(Progress):
    """Notes every stage with its total and what it was advanced to, and calls `look` at each advance."""

    def __init__(self, look=lambda: None):
        self.stages: list[tuple[str, int, list[int]]] = []
        self.look = look

    def stage(self, name: str, total: int) -> None:
        self.stages.append((name, total, []))

    def advance(self, done: int, note: str = "") -> None:
        self.stages[-1][2].append(done)
        self.look()


@pytest.fixture
def loaded(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)


def tasks_of(folder, rows):
    return [load_task(TaskConfig(**write_task(folder / str(rows), name, rows=rows))) for name in ("colour", "animal")]


def method_of(variant, tokenizer, tasks, model, progress):
    method = get(variant.split("-")[0], **VARIANTS[variant])
    method.tokenizer, method.stream, method.progress = tokenizer, TaskStream(tasks), progress
    method.untouched, method.committed = lambda: model, lambda name: None
    return method


@pytest.mark.parametrize("variant", VARIANTS)
def test_whoever_reads_rows_shows_how_far_it_is(variant, loaded, tmp_path):
    """A pass through the model that is no training step belongs to a stage, which says how many rows there are and is brought to its end."""
    model, tokenizer = loaded
    tasks, seen, passes = tasks_of(tmp_path, 12), Seen(), []
    model.register_forward_pre_hook(lambda *_: passes.append(len(seen.stages)))
    method, memory = method_of(variant, tokenizer, tasks, model, seen), Memory()
    for task in tasks:
        model = method.begin_task(model, task, memory)
        method.train_data(task, memory)
        model = method.end_task(model, task, memory)
    assert not passes or min(passes) > 0, "the model is asked before anybody is told"
    assert all(done and done[-1] == total and done == sorted(done) for _, total, done in seen.stages), seen.stages
    assert variant not in STREAMED or seen.stages
    assert not passes or method.extra_forward, "the registry says that nothing is computed beside a plain step"


def most_held(variant, rows, tokenizer, folder) -> int:
    """Bytes of all tensors at once, at the most, while a task of so many rows is measured; every eighth row is looked at."""
    counted = []

    def look():
        counted.append(0 if len(counted) % 8 else sum(storages().values()))

    model, tasks = AutoModelForCausalLM.from_pretrained(make_model_folder(folder / f"model{rows}")), tasks_of(folder, rows)
    method, memory = method_of(variant, tokenizer, tasks, model, Seen(look)), Memory()
    if hasattr(method.options, "rows"):
        method.options.rows = rows
    gc.collect()
    method.end_task(method.begin_task(model, tasks[0], memory), tasks[0], memory)
    return max(counted)


def storages() -> dict[int, int]:
    tensors = [found.untyped_storage() for found in gc.get_objects() if isinstance(found, torch.Tensor) and not is_fake(found)]
    return {storage.data_ptr(): storage.nbytes() for storage in tensors}


@pytest.mark.parametrize("variant", [pytest.param(v, marks=[pytest.mark.slow] if v in ("inflora", "gainlora", "esacl") else []) for v in STREAMED])
def test_memory_does_not_grow_with_the_rows_that_are_measured(variant, loaded, tmp_path, monkeypatch):
    monkeypatch.setattr("forgetless.batches.READ_TOKENS", 32)  # a few rows, which would else be read at once
    few, many = (most_held(variant, rows, loaded[1], tmp_path) for rows in (80, 200))  # of 80 rows already more tokens than any layer has inputs
    assert 0 < many <= 1.02 * few

"""Replay: rows of earlier tasks come back while a new one is learned, beside any other method (`on`).

    mixed             a memory of rows M, a share `rate` of everything that is trained on (Chaudhry et al. 2019, arXiv 1902.10486)
    consolidation     the same share, but at the end: the task first, then the old rows alone, in one run of the optimizer (TRACE, Wang et al. 2023, arXiv 2310.06762)
    on_policy         M holds prompts x alone; before each task the current model theta_{t-1} answers them greedily, y = theta_{t-1}(x), and (x, y) is replayed
                      (On-Policy Replay, Chen et al. 2026, arXiv 2605.29495)
    self_synthesised  M is empty; before each task the current model makes up rows by sampling, prompt and answer (LAMOL, Sun et al. 2019, arXiv 1909.03329)

Exact, not on average: with positions g = 0, 1, 2, ... of the rows in the order they are trained on, position g is a replayed row where floor((g + 1) rate) >
floor(g rate). So any n rows in a row have n * rate of them, give or take one, whatever the batch, the accumulation and the size of M. An epoch is the fewest rows of
which as many as the task has are its own, 1 / (1 - rate) times as long as without; the next goes on where it stopped. The task's rows and M are each gone through in seeded
passes, none a second time before all have come once.

At a task's end its rows join M: as many from each label (`choose: balanced`), or all alike with equal chance (`reservoir`; Vitter 1985), by a seeded key for each row,
of which the smallest stay. Rows are kept as token ids with their own prompt. What a mode keeps is in `stores`; a run whose `store` allows less is refused.

Read of On-Policy Replay's paper: its abstract and summaries of it, not its text.

Where we depart: On-Policy Replay drops answers that a task's reward finds bad, which takes the true answers; here none are kept, so none is dropped. TRACE's released
code replays a share of each past task and all of LIMA after each task; here the phase is as long as the other modes' share. LAMOL also trains on its tasks' prompts, so
as to make up rows like theirs; here the tasks' loss is as it is, and what a model makes up, before the first task too, is what it would say by itself.

What a model generates for a task is drawn once, before it, and lies in the task's checkpoints, which go at its commit.

When not to use it: where no data may be kept and the answers matter to the letter (self_synthesised rehearses what a model likes to say, not a task); where rows change
their meaning (the old answer would be taught again); with encoder-decoder models self_synthesised needs `seed_text`, for they write answers and no prompts.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..batches import IGNORED, is_seq2seq
from ..errors import ConfigError
from ._generation import answers, made_up, row_of
from ._rehearsal import Replaying, a_pass, epoch_rows, exact, pack, row_keys, subset, trained_rows, unpack
from ._statistics import Row
from .base import Memory
from .beside import Beside, BesideOptions

STORES = {"mixed": "rows", "consolidation": "rows", "on_policy": "prompts", "self_synthesised": "nothing"}
GENERATES = {"on_policy": "greedy answers to the replayed prompts, before each task", "self_synthesised": "sampled rows, before each task"}


class ReplayOptions(BesideOptions):
    mode: Literal["mixed", "consolidation", "on_policy", "self_synthesised"] = "mixed"
    """When old rows come, and what is kept. on_policy keeps prompts: of a conversation all that stands before its last answer, earlier answers too; it and
    self_synthesised generate as many rows as one epoch replays, and go through them again in later ones."""
    rate: float = Field(0.05, gt=0, lt=1)
    """Share of all rows trained on that are replayed ones; 0.01 to 0.1 is usual."""
    buffer: int = Field(100, ge=1)
    """Most rows (on_policy: prompts) kept of each task, or of all (`per`); self_synthesised, which keeps none: most rows made up before a task."""
    per: Literal["task", "total"] = "task"
    """What `buffer` counts; total: the memory does not grow with the number of tasks."""
    choose: Literal["balanced", "reservoir"] | None = None
    """Which rows are kept: as many of each label (with per: total of each label of each task; answers that are free text count as one), or any with equal chance.
    null: balanced; under on_policy reservoir, since a prompt's label is its answer."""
    max_new_tokens: int = Field(128, ge=1)
    """on_policy, self_synthesised: longest answer, or part of a made-up row, that is generated."""
    temperature: float = Field(1.0, gt=0)
    """Of self_synthesised's sampling."""
    seed_text: list[str] = []
    """self_synthesised: what the rows begin with, in turn, such as a task's own instruction; [] for the chat template's user header, or bos."""

    @model_validator(mode="after")
    def _nothing_ignored(self) -> ReplayOptions:
        if self.choose == "balanced" and self.mode == "on_policy":
            raise ValueError(
                "choose: balanced asks for each prompt's label, and mode: on_policy keeps nothing of the answers; take it out, or choose: reservoir"
            )
        generated = {"max_new_tokens": ("on_policy", "self_synthesised"), "temperature": ("self_synthesised",)}
        for key, modes in generated.items():
            if self.mode not in modes and getattr(self, key) != ReplayOptions.model_fields[key].default:
                raise ValueError(f"{key} is read in mode: {' and '.join(modes)}, and the mode is {self.mode}; take it out")
        if self.mode == "self_synthesised" and (self.choose is not None or self.per != "task"):
            raise ValueError("choose and per say which rows are kept, and mode: self_synthesised keeps none; take them out")
        if not all(text.strip() for text in self.seed_text):
            raise ValueError("seed_text: an empty text is no beginning; take it out")
        if self.seed_text and self.mode != "self_synthesised":
            raise ValueError(f"seed_text: is what self_synthesised begins with, and mode is {self.mode}; take it out")
        return self


class Replay(Beside):
    name = "replay"
    summary = "rows of earlier tasks, or what the model says of them, mixed into each batch, beside another method"
    paper = "arXiv 1902.10486"
    needs_old_data = True
    stores = "rows"
    bytes_a_task = "token ids and a label mask of `buffer` rows"
    Options = ReplayOptions

    def __init__(self, /, **options: Any):
        super().__init__(**options)
        o = self.options
        order = ("nothing", "prompts", "rows")
        self.stores = max(STORES[o.mode], self.on.stores, key=order.index)
        self.needs_old_data = self.on.needs_old_data or STORES[o.mode] != "nothing"
        self.extra_forward = GENERATES.get(o.mode, self.on.extra_forward)
        if o.mode == "self_synthesised":
            self.bytes_a_task = "none"
        elif o.per == "total":
            self.bytes_a_task = "none; token ids of `buffer` rows"
        self.generated: list[Row] = []
        self.replayed = 0  # how many of the rows of train_data, the last ones, are replayed
        self.train: dict[str, Any] | None = None
        self.seed = 0

    def check(self, model: nn.Module) -> None:
        self.refuse(
            ("prompt", "per_task"), "rows of earlier tasks are answered by what those tasks left, which training on them again does not change"
        )
        if STORES[self.options.mode] != "nothing":
            self.refuse(("mtl",), "it trains on every row of every task as it is")
        super().check(model)
        if self.options.mode == "self_synthesised" and is_seq2seq(model) and not self.options.seed_text:
            raise ConfigError(
                "method replay: mode: self_synthesised: an encoder-decoder model writes answers and no prompts; give seed_text, or another mode"
            )

    # -- a task ----------------------------------------------------------------------------------------------------------------------

    def begin_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        self.seed = torch.initial_seed()  # of the task; the generator itself is left to the method beside
        self.generated = self.generate(model, task, memory.of(self.name)) if task is not None and self.options.mode in GENERATES else []
        return super().begin_task(model, task, memory)

    def resume_task(self, model: nn.Module, task: Any, memory: Memory, state: dict[str, Tensor]) -> nn.Module:
        self.seed = torch.initial_seed()
        return super().resume_task(model, task, memory, state)

    def generate(self, model: nn.Module, task: Any, kept: dict[str, Tensor]) -> list[Row]:
        """As many rows as an epoch of the task replays."""
        o, progress = self.options, self.progress
        count = max(1, epoch_rows(len(task.train), exact(o.rate)) - len(task.train))
        if o.mode == "self_synthesised":
            count = min(count, o.buffer)
            progress.stage(f"{task.name}: making up {count} rows", count)
            begun = dict(seed=self.seed, temperature=o.temperature, beginnings=o.seed_text)
            rows = made_up(model, self.read(task), count, o.max_new_tokens, **begun, advance=progress.advance)
            if not rows:
                progress.say(f"warning: {task.name}: the model made up no row, so nothing is replayed; give method.seed_text")
            return rows
        if not kept:
            return []
        prompts, ends = unpack(kept), kept["ends"].tolist()
        chosen = a_pass(len(prompts), self.seed, 0)[:count]
        prompts, ends = [prompts[i]["input_ids"] for i in chosen], [ends[i] for i in chosen]
        progress.stage(f"{task.name}: answering {len(prompts)} prompts of earlier tasks", len(prompts))
        said = answers(model, prompts, ends, o.max_new_tokens, advance=progress.advance)
        return [row_of(prompt, answer) for prompt, answer in zip(prompts, said, strict=True) if answer]

    def read(self, task: Any) -> Any:
        if self.tokenizer is None:
            raise ConfigError(f"method replay: task '{task.name}' cannot be read without a tokenizer; set method.tokenizer before begin_task")
        return self.tokenizer

    def train_data(self, task: Any, memory: Memory) -> list:
        rows, kept = super().train_data(task, memory), memory.of(self.name)
        old = self.generated if self.options.mode in GENERATES else unpack(kept) if kept else []
        self.replayed = len(old)
        return [*rows, *old]

    def settings(self, train: dict[str, Any], index: int) -> dict[str, Any]:
        self.train = super().settings(train, index)
        return self.train

    def sampler(self, rows: list, seed: int) -> torch.utils.data.Sampler[int] | None:
        own, rate = len(rows) - self.replayed, exact(self.options.rate)
        inner = super().sampler(rows[:own], seed)
        if not self.replayed:
            return inner
        end = trained_rows(self.train or {}, epoch_rows(own, rate)) if self.options.mode == "consolidation" else None
        return Replaying(own, self.replayed, rate, seed, end, inner)

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | (pack(self.generated) if self.generated else {})

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.generated = unpack(state) if state else []

    def end_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        model = super().end_task(model, task, memory)
        if task is not None and STORES[self.options.mode] != "nothing":
            memory.put(self.name, self.joined(memory.of(self.name), task))
        return model

    # -- what is kept ----------------------------------------------------------------------------------------------------------------

    def joined(self, kept: dict[str, Tensor], task: Any) -> dict[str, Tensor]:
        """The memory with the task's rows in it, those of the smallest keys."""
        o, tokenizer = self.options, self.read(task)
        balanced = o.mode != "on_policy" and o.choose != "reservoir"
        keys = row_keys([e.answer if task.labels else "" for e in task.train] if balanced else [None] * len(task.train), self.seed, balanced)
        chosen = keys.argsort(stable=True)[: o.buffer]
        examples = [task.train[i] for i in chosen.tolist()]
        if o.mode == "on_policy":
            rows = [{"input_ids": (ids := task.encode_prompt(tokenizer, e)), "labels": [IGNORED] * len(ids)} for e in examples]
            new = pack(rows) | {"ends": torch.tensor([task.end_token(tokenizer, e) for e in examples], dtype=torch.int32)}
            del new["answers"]
        else:
            new = pack([task.encode(tokenizer, e) for e in examples])
        new["keys"] = keys[chosen]
        if not kept:
            return new
        both = {key: torch.cat([kept[key], new[key]]) for key in new}
        return subset(both, both["keys"].argsort(stable=True)[: o.buffer].sort().values) if o.per == "total" else both

"""What replay is made of: which rows are kept, how they are kept as tensors, and an order of training in which their share is exact."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from .. import distributed
from ..batches import IGNORED
from ._statistics import Row

# -- what is kept ----------------------------------------------------------------------------------------------------------------------


def row_keys(labels: list[Any], seed: int, balanced: bool) -> Tensor:
    """A key a row, of which the smallest are kept: u uniform in [0, 1), so that any are as likely as any others, also over several tasks; balanced: u plus how many
    rows of its label have a smaller u, so that the smallest are one row of each label, then another of each."""
    u = torch.rand(len(labels), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if balanced:
        before: Counter = Counter()
        for i in u.argsort(stable=True).tolist():
            u[i] += before[labels[i]]
            before[labels[i]] += 1
    return u


def pack(rows: list[Row]) -> dict[str, Tensor]:
    """Rows as tensors: ids of all one after another, which of them are answers, and the rows' lengths."""
    ids = torch.tensor([t for row in rows for t in row["input_ids"]], dtype=torch.int32)
    learned = torch.tensor([t != IGNORED for row in rows for t in row["labels"]], dtype=torch.bool)
    return {"ids": ids, "answers": learned, "lengths": torch.tensor([len(row["input_ids"]) for row in rows], dtype=torch.int32)}


def unpack(packed: dict[str, Tensor]) -> list[Row]:
    """The inverse of pack; without "answers", of prompts, in which nothing is learned."""
    ids, lengths = packed["ids"].long(), packed["lengths"].tolist()
    labels = ids.where(packed["answers"], IGNORED) if "answers" in packed else torch.full_like(ids, IGNORED)
    parts = zip(ids.split(lengths), labels.split(lengths), strict=True)
    return [{"input_ids": i.tolist(), "labels": l.tolist()} for i, l in parts]


def subset(packed: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Only these rows of packed ones."""
    lengths, out = packed["lengths"].tolist(), {}
    for key, tensor in packed.items():
        parts = tensor.split(lengths if key in ("ids", "answers") else 1)
        out[key] = torch.cat([parts[i] for i in rows.tolist()])
    return out


# -- the order -------------------------------------------------------------------------------------------------------------------------


class Replaying(torch.utils.data.Sampler[int]):
    """An order of the rows 0 .. own - 1 in which a share `rate` are the `replayed` ones that stand behind them, spread evenly.

    end: how many rows are trained on in all, where the replayed ones come last. inner: the order of the own rows, where it matters.
    """

    def __init__(self, own: int, replayed: int, rate: Fraction, seed: int, end: int | None = None, inner: Any = None):
        self.own, self.rate, self.seed = own, rate, seed
        self.start = None if end is None else end - end * rate.numerator // rate.denominator
        self.old = Passes(lambda k: [own + i for i in a_pass(replayed, seed + 1, k)])
        self.new = Passes(lambda k: a_pass(own, seed, k) if inner is None else inner.set_epoch(k) or list(inner))
        self.epoch = 0

    def __len__(self) -> int:
        return epoch_rows(self.own, self.rate)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def before(self, position: int) -> int:
        """How many of the rows before this position of the whole training are replayed."""
        return position * self.rate.numerator // self.rate.denominator if self.start is None else max(0, position - self.start)

    def __iter__(self) -> Iterator[int]:
        for g in range(self.epoch * len(self), (self.epoch + 1) * len(self)):
            n = self.before(g)
            yield self.old[n] if self.before(g + 1) > n else self.new[g - n]


class Passes:
    """Something gone through again and again, each time in the order draw(k) of the k-th pass, as one endless sequence."""

    def __init__(self, draw: Callable[[int], list[int]]):
        self.draw, self.number, self.order = draw, 0, draw(0)

    def __getitem__(self, k: int) -> int:
        number, place = divmod(k, len(self.order))
        if number != self.number:
            self.number, self.order = number, self.draw(number)
        return self.order[place]


def a_pass(n: int, seed: int, number: int) -> list[int]:
    """The number-th order of n rows."""
    return torch.randperm(n, generator=torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)).tolist()


def exact(rate: float) -> Fraction:
    return Fraction(str(rate))  # 0.05 is a twentieth, not the nearest binary fraction


def epoch_rows(own: int, rate: Fraction) -> int:
    """The fewest rows of which `own` are the task's: L - floor(L rate) = own."""
    return math.floor((own - 1) / (1 - rate)) + 1


def trained_rows(train: dict[str, Any], epoch: int) -> int:
    """How many rows a task trains on in all, by the config's section `train`, as the Trainer counts: batches do not reach across epochs."""
    batch = train.get("per_device_train_batch_size", 8) * distributed.world_size()
    step = batch * train.get("gradient_accumulation_steps", 1)
    used = epoch // batch * batch if train.get("dataloader_drop_last") else epoch
    an_epoch = max(1, math.ceil(used / step))
    steps = train["max_steps"] if train.get("max_steps", -1) > 0 else math.ceil(train.get("num_train_epochs", 1) * an_epoch)
    whole, last = divmod(steps - 1, an_epoch)
    return whole * epoch + min(used, (last + 1) * step)

"""Merging: what is committed after a task is made of the models of all tasks so far, entry by entry. theta_t is the model as trained on task t, theta_0 the pretrained one.

    average      M_t = mean of theta_1 .. theta_t
    ema          M_t = (1 - rate) M_(t-1) + rate theta_t,  M_0 = theta_0
    arithmetic   M_t = theta_0 + scale  sum of tau_i                                    task arithmetic (Ilharco et al. 2023, arXiv 2212.04089)
    dare         M_t = theta_0 + scale  sum of (m_i o tau_i) / (1 - drop),  m_i = 0 with probability drop     (Yu et al. 2024, arXiv 2311.03099)
    magmax       M_t = theta_0 + scale  the tau_i that is largest in size, entry by entry             (Marczak et al. 2024, arXiv 2407.06322)
    ties         each tau_i keeps its `keep` largest entries in size (of all weights together), an entry's sign is that of the sum over i, and
                 M_t = theta_0 + scale  mean of the entries with that sign that were kept                 (Yadav et al. 2023, arXiv 2306.01708)

start says which weights the next task is trained from: those of theta_0 (task arithmetic, DARE and TIES: tasks apart from one another), those the last task ended with
(MagMax: plain sequential training, merged on the side), or the merged ones. tau_i = theta_i - theta_0, but for arithmetic and dare, which add vectors up, it is the change
since the task began, or with last and merged the earlier tasks would count again in each.

Every rule has a running form, so nothing grows with the tasks: sums, counts and the largest entry so far (for ties the sums and counts of positive and of negative
entries). What is kept, in numbers a weight that learns: nothing for average and ema from `merged`; otherwise theta_0, or the weights the last task ended with, for
`start`; for magmax theta_0 and the largest entries; for ties theta_0, two sums and two counts of half the size; magmax and ties with start: last those weights too.

Beside a constrained method, average, ema and arithmetic from `merged` scale each permitted change, which stays permitted; the others choose entry by entry or go back to
earlier weights, and what was protected is then protected only while a task trains.

When not to use it: many tasks with little in common (an average of t models has a share 1 / t of each); where the last task must be learned in full.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..errors import ConfigError
from ..subspace import working_dtype
from ._after import After
from .base import Memory
from .beside import BesideOptions

STARTS = {"average": "merged", "ema": "merged", "arithmetic": "pretrained", "dare": "pretrained", "magmax": "last", "ties": "pretrained"}


class MergeOptions(BesideOptions):
    rule: Literal["average", "ema", "arithmetic", "dare", "magmax", "ties"] = "average"
    start: Literal["pretrained", "last", "merged"] | None = None
    """Which weights the next task is trained from; null: as the rule's paper has it, and merged for average and ema."""
    scale: float = Field(1.0, gt=0)
    """What the merged task vector is multiplied by (arithmetic, dare, magmax, ties)."""
    rate: float = Field(0.5, gt=0, le=1)
    """ema: the share of the last task's model."""
    keep: float = Field(0.2, gt=0, le=1)
    """ties: the share of a task vector's entries that is kept (paper: 0.2)."""
    drop: float = Field(0.9, ge=0, lt=1)
    """dare: the share of a task vector's entries that is dropped (paper: 0.9 or more)."""

    @model_validator(mode="after")
    def _merges(self) -> MergeOptions:
        used = {"rate": ("ema",), "keep": ("ties",), "drop": ("dare",), "scale": ("arithmetic", "dare", "magmax", "ties")}
        for key, rules in used.items():
            if self.rule not in rules and getattr(self, key) != MergeOptions.model_fields[key].default:
                raise ValueError(f"{key} is read by rule: {' and '.join(rules)}, and the rule is {self.rule}; take it out")
        if self.rule == "arithmetic" and self.scale == 1 and self.start in ("last", "merged"):
            raise ValueError(f"rule: arithmetic with start: {self.start} and scale: 1 adds up to plain sequential training; give a scale below 1")
        return self


class Merge(After):
    name = "merge"
    summary = "beside another: the committed model is merged from the models of all tasks"
    paper = "arXiv 2407.06322"
    bytes_a_task = "none; up to five numbers a weight that learns, by rule and start"
    constrained = property(lambda self: self.on.constrained and self.begins == "merged" and self.options.rule in ("average", "ema", "arithmetic"))
    Options = MergeOptions

    def __init__(self, /, **options: Any):
        super().__init__(**options)
        self.merged: dict[str, Tensor] = {}  # the committed weights, where the task is trained from others
        self.seed = 0

    @property
    def begins(self) -> str:
        return self.options.start or STARTS[self.options.rule]

    # -- a task ----------------------------------------------------------------------------------------------------------------------

    def check(self, model: nn.Module) -> None:
        self.refuse(("mtl", "per_task"), "it begins every task at the untouched model, so there is nothing to merge with")
        if self.begins != "merged" and any(part.name == "lwf" for part in self.inner()):
            raise ConfigError(f"method merge: with start: {self.begins} lwf would hold on to other weights than the last commit's; set start: merged")
        super().check(model)

    def begin_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        self.place(model, memory)
        return super().begin_task(model, task, memory)

    def resume_task(self, model: nn.Module, task: Any, memory: Memory, state: dict[str, Tensor]) -> nn.Module:
        self.place(model, memory)
        return super().resume_task(model, task, memory, state)

    @torch.no_grad()
    def place(self, model: nn.Module, memory: Memory) -> None:
        """Bring the model, which is as it was committed, to the weights that the task is trained from."""
        self.seed = torch.initial_seed()  # the same for a task that is resumed
        parameters, self.merged = dict(model.named_parameters()), {}
        for key, weights in memory.of(self.name).items():
            kind, _, name = key.partition("/")
            if kind == self.begins:
                self.merged[name] = parameters[name].to("cpu", copy=True)
                parameters[name].copy_(weights)

    def settle(self, model: nn.Module, learned: dict[str, nn.Parameter], memory: Memory) -> None:
        o, kept, info = self.options, memory.of(self.name), memory.info.get(self.name, {"tasks": 0})
        if not info["tasks"] and (self.begins == "pretrained" or o.rule in ("magmax", "ties")):
            kept = {f"pretrained/{name}": weights for name, weights in self.start.items()}
        generator, cut = torch.Generator().manual_seed(self.seed), 0.0
        if o.rule == "ties":
            cut = cut_of([vector(p, kept[f"pretrained/{name}"]) for name, p in learned.items()], o.keep)
        for name, p in learned.items():
            M, theta = self.merged.get(name, self.start[name]).double(), p.detach().to("cpu", torch.float64)
            if o.rule == "average":
                M = M + (theta - M) / (info["tasks"] + 1)
            elif o.rule == "ema":
                M = M + o.rate * (theta - M)
            elif o.rule == "arithmetic":
                M = M + o.scale * (theta - self.start[name].double())
            elif o.rule == "dare":
                M = M + o.scale * dropped(theta - self.start[name].double(), o.drop, generator)
            else:
                joined = larger if o.rule == "magmax" else elected
                M = kept[f"pretrained/{name}"].double() + o.scale * joined(kept, name, vector(p, kept[f"pretrained/{name}"]), cut).double()
            if self.begins == "last":
                kept[f"last/{name}"] = p.detach().to("cpu", copy=True)
            p.copy_(M.to(p.dtype))
        memory.put(self.name, kept)
        memory.info[self.name] = {"tasks": info["tasks"] + 1}
        self.merged = {}

    def held_bytes(self) -> int:
        return super().held_bytes() + sum(t.nbytes for t in self.merged.values())


# -- the rules: what is kept of a weight is in `kept`, under a letter or two and its name, and is brought up to date --------------------------


def vector(p: Tensor, origin: Tensor) -> Tensor:
    """tau = theta - theta_0, on the CPU, in fp32 or better."""
    return (p.detach().to("cpu", torch.float64) - origin.double()).to(working_dtype(p.dtype))


def dropped(tau: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """DARE: tau with each entry 0 by chance, of probability `share`, and the others larger by 1 / (1 - share), so that the mean stays."""
    return tau * (torch.rand(tau.shape, generator=generator) >= share) / (1 - share)


def larger(kept: dict[str, Tensor], name: str, tau: Tensor, cut: float) -> Tensor:
    """MagMax: of each entry the largest in size so far; the earlier one of two alike."""
    most = kept.get(f"most/{name}", torch.zeros_like(tau))
    kept[f"most/{name}"] = torch.where(tau.abs() > most.abs(), tau, most)
    return kept[f"most/{name}"]


def elected(kept: dict[str, Tensor], name: str, tau: Tensor, cut: float) -> Tensor:
    """TIES: of each entry the mean of those so far that are `cut` or more in size and have the sign of their sum."""
    for sign, part in (("+", tau.clamp_min(0)), ("-", tau.clamp_max(0))):
        part = torch.where(tau.abs() >= cut, part, 0)
        kept[f"sum{sign}/{name}"] = kept.get(f"sum{sign}/{name}", 0) + part
        kept[f"count{sign}/{name}"] = kept.get(f"count{sign}/{name}", 0) + (part != 0).to(torch.int16)
    up, down = (kept[f"sum{sign}/{name}"] for sign in "+-")
    n_up, n_down = (kept[f"count{sign}/{name}"].clamp_min(1) for sign in "+-")
    return torch.where(up + down > 0, up / n_up, torch.where(up + down < 0, down / n_down, 0))


def cut_of(vectors: list[Tensor], share: float) -> float:
    """The size that the share `share` of all entries, of all vectors together, have or exceed.

    Found by halving the range of bit patterns, which are in the order of the numbers: no copy of all entries is sorted.

    >>> cut_of([torch.tensor([3.0, -1.0]), torch.tensor([[-2.0, 0.5]])], 0.5)
    2.0
    """
    kind = max((v.dtype for v in vectors), key=lambda dtype: dtype.itemsize)
    bits = torch.int64 if kind == torch.float64 else torch.int32
    wanted = max(1, int(share * sum(v.numel() for v in vectors)))
    low, high = 0, max(int(v.to(kind).abs().view(bits).max()) for v in vectors)
    while low < high:
        middle = (low + high + 1) // 2
        if sum(int((v.to(kind).abs().view(bits) >= middle).sum()) for v in vectors) >= wanted:
            low = middle
        else:
            high = middle - 1
    return float(torch.tensor(low, dtype=bits).view(kind))

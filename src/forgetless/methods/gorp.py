"""GORP: gradient low-rank projection for continual learning (Wang et al., ACL 2025, arXiv 2507.02503). Full-rank branch.

    R = G Q,  Q (in x r) = top right singular directions of G (I - S S^T)      (eq. 3-4, one-sided, S on the input side)
    dW = -lr * full_lr_ratio * AdamW(R) Q^T                                     the state is out x r, the update stays in span(Q), orthogonal to S
    after the task: M' = M - M S S^T, its top directions join S until S holds the share `energy` of M   (eq. 6-8)

M is the raw gradient's statistic, before any projection: a sketch of the whole task's gradients, or Adam's first moment at its end (the paper). A gradient row is
a combination of the layer's inputs (G = delta^T X), so S spans inputs the old tasks used, and dW S = 0 leaves their outputs alone.

When not to use it: tasks that contradict each other (a new fact must replace an old one); one task only (use any optimizer); a model whose head or
embeddings must move (they are frozen here).
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..models import match_modules
from ..sketch import Sketch
from ..subspace import Constraint, Subspace, coverage, extend, working_dtype
from .base import Memory, Method, Options, clip_factor

log = logging.getLogger(__name__)


class GORPOptions(Options):
    rank: int | None = Field(8, ge=1)
    """Directions the optimizer's state lives in (paper: 8); null keeps dense Adam inside the permitted space."""
    refresh_gap: int = Field(10, ge=1)
    """Steps between two choices of Q (paper: 10)."""
    refresh: Literal["cold", "warm", "exact", "svd"] = "cold"
    moments: Literal["rotate", "reset"] = "rotate"
    full_lr_ratio: float = Field(10.0, gt=0)
    """Learning rate of the full-rank branch, times train.learning_rate."""
    full_modules: str | list[str] | None = None
    """Which linear layers: a regex over whole dotted names, or a list of names; absent: all but the head."""
    side: Literal["inputs", "outputs"] = "inputs"
    """Which side of W the space lives on. The paper's S S^T G, read with row vectors, is the input side."""
    use_shared_space: bool = True
    """False trains the same way but protects nothing (an ablation of the paper)."""
    space_from: Literal["sketch", "first_moment"] = "sketch"
    energy: float = Field(0.95, gt=0, le=1)
    """Share of a task's gradient energy the space must hold after it."""
    max_rank: int | None = Field(None, ge=1)
    """Largest space a module may have; beyond it the directions of least energy are given up, and said so."""
    sketch_size: int = Field(256, ge=8)
    """Directions the sketch keeps while a task trains."""


class GORP(Method):
    name = "gorp"
    summary = "gradient low-rank projection: updates stay off the input directions earlier tasks used"
    paper = "arXiv 2507.02503"
    constrained = True
    Options = GORPOptions

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.max_grad_norm: float | None = 1.0
        self.spaces: dict[str, Subspace] = {}
        self.statistics: dict[str, Sketch | Tensor] = {}

    # -- a task ----------------------------------------------------------------------------------------------------------------------

    def begin_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        self.load_spaces(memory)
        self.statistics = {}
        return model

    def load_spaces(self, memory: Memory) -> None:
        names = {key.removesuffix(".basis") for key in memory.tensors if key.endswith(".basis")}
        self.spaces = {name: Subspace(memory.tensors[f"{name}.basis"], memory.tensors[f"{name}.energy"]) for name in names}

    def modules(self, model: nn.Module) -> dict[str, nn.Linear]:
        return match_modules(model, self.options.full_modules, "method.full_modules")

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        o = self.options
        common = dict(rank=o.rank, refresh_gap=o.refresh_gap, refresh=o.refresh, moments=o.moments, side=o.side, lr_scale=o.full_lr_ratio)
        groups = []
        for name, module in self.modules(model).items():
            space = self.spaces.get(name)
            constraint = Constraint(**{o.side: space}) if o.use_shared_space and space is not None and space.rank else None
            if o.rank is None and constraint is None:  # an empty space, so that weight decay pulls toward the task's start here too
                constraint = Constraint(**{o.side: Subspace.empty(module.in_features if o.side == "inputs" else module.out_features)})
            groups.append({"params": [module.weight], "names": [f"{name}.weight"], "constraint": constraint, **common})
        return groups

    @torch.no_grad()
    def on_step(self, model: nn.Module) -> None:
        """Collect the raw gradient, clipped as a whole so that one wild step does not own the space."""
        o = self.options
        if not o.use_shared_space:
            return
        modules = {n: m for n, m in self.modules(model).items() if m.weight.grad is not None}
        factor = clip_factor([m.weight.grad for m in modules.values()], self.max_grad_norm)
        for i, (name, module) in enumerate(modules.items()):
            G = module.weight.grad if o.side == "inputs" else module.weight.grad.mT
            if o.space_from == "sketch":
                if name not in self.statistics:
                    self.statistics[name] = Sketch(G.shape[1], min(o.sketch_size, G.shape[1]), seed=i)
                self.statistics[name].update(G, factor)
            else:
                if name not in self.statistics:
                    self.statistics[name] = torch.zeros(G.shape, dtype=working_dtype(G.dtype), device=G.device)
                M = self.statistics[name]
                M.lerp_(G.to(M.dtype) * factor, 0.1)  # Adam's first moment, beta1 = 0.9

    @torch.no_grad()
    def end_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        o = self.options
        evicted, short = 0, []
        for name, statistic in self.statistics.items():
            if isinstance(statistic, Sketch):
                statistic.compress()
                A, total = statistic.rows, float(statistic.total)
            else:
                A, total = statistic, None
            space = self.spaces.get(name) or Subspace.empty(A.shape[1], A.dtype)
            space, lost = extend(space.to(A), A, o.energy, max_rank=o.max_rank, total=total)
            if o.max_rank is None and total and coverage(A, space.basis) * float((A.double() ** 2).sum()) < 0.99 * o.energy * total:
                short.append(name)  # the sketch has dropped more than the space may lack
            evicted += lost
            self.spaces[name] = space = space.to("cpu")
            memory.tensors[f"{name}.basis"], memory.tensors[f"{name}.energy"] = space.basis, space.energy
        memory.info["evicted"] = memory.info.get("evicted", 0) + evicted
        if evicted:
            log.warning("gorp: max_rank %s is reached; %d directions of least energy were given up and are no longer protected", o.max_rank, evicted)
        if short:
            log.warning(
                "gorp: %d modules do not reach energy %g, because their sketch dropped too much; raise sketch_size (%d)",
                len(short),
                o.energy,
                o.sketch_size,
            )
        self.statistics = {}
        return model

    # -- saving ----------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for name, statistic in self.statistics.items():
            if isinstance(statistic, Sketch):
                state.update({f"{name}:{key}": value for key, value in statistic.state_dict().items()})
            else:
                state[name] = statistic
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.statistics = {}
        sketches: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, part = key.partition(":")
            if part:
                sketches.setdefault(name, {})[part] = value
            else:
                self.statistics[name] = value.clone()
        for name, parts in sketches.items():
            n = parts["rows"].shape[1]
            self.statistics[name] = sketch = Sketch(n, min(self.options.sketch_size, n))
            sketch.load_state_dict(parts)

    def statistics_bytes(self, model: nn.Module) -> int:
        o = self.options
        if not o.use_shared_space:
            return 0
        total = 0
        for module in self.modules(model).values():
            m, n = module.weight.shape if o.side == "inputs" else module.weight.shape[::-1]
            total += 4 * m * n if o.space_from == "first_moment" else 4 * n * (2 * min(o.sketch_size, n) + 16)
        return total

    def protected_inputs(self, memory: Memory) -> dict[str, Tensor]:
        if self.options.side != "inputs" or not self.options.use_shared_space:
            return {}
        return {key.removesuffix(".basis"): V for key, V in memory.tensors.items() if key.endswith(".basis")}

    def report(self, memory: Memory) -> dict[str, Any] | None:
        bases = [t for key, t in memory.tensors.items() if key.endswith(".basis")]
        if not bases or not self.options.use_shared_space:
            return None
        ranks = [t.shape[1] for t in bases]
        share = sum(t.shape[1] / t.shape[0] for t in bases) / len(bases)
        numbers = {"modules": len(bases), "rank_mean": sum(ranks) / len(ranks), "rank_max": max(ranks), "share": share}
        return numbers | {"evicted": memory.info.get("evicted", 0), "bytes": sum(t.nbytes for t in bases)}

"""Sequential fine-tuning: one task after another, nothing protected. The baseline every method must beat, tuned like everything else.

`state` says what Adam keeps, to compare cost with: all of it (adam), or for the weights of the linear layers (m x n, m >= n) in r coordinates of the gradient, R = G Q
    galore        2 r m + r n numbers; Adam's step on R is lifted back by Q                     (Zhao et al. 2024, arXiv 2403.03507; optim/subspace_adamw.py)
    fira          as galore; what of G the coordinates do not hold is added, scaled             (Chen et al. 2024, arXiv 2410.01623; optim/scaled.py)
    apollo        2 r m numbers, R = G P with a random P; G is the step, each row scaled        (Zhu et al. 2024, arXiv 2412.05270; optim/scaled.py)
    apollo-mini   as apollo with r = 1, and one factor for the whole matrix
Norms, biases, embeddings and the head keep Adam's whole state. Weight decay, where it is set, pulls these weights toward the task's start, as in all low-rank states here.

When not to use it: where earlier tasks matter.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from ..models import logical, match_modules, stored_transposed
from .base import Method, Options

# rank, steps between two choices of directions (both the papers'; rank of their fine-tuning), scale
LOW_RANK = {"galore": (8, 200, 1.0), "fira": (8, 200, 1.0), "apollo": (8, 200, 1.0), "apollo-mini": (1, 200, 128.0)}


class SeqFTOptions(Options):
    modules: str | list[str] | None = None
    """Train only the weights of these linear layers (a regex or a list of names, as gorp's full_modules); absent: every parameter. "linear": all linear layers but the head."""
    state: Literal["adam", "galore", "fira", "apollo", "apollo-mini"] = "adam"
    """What Adam keeps of the linear layers' weights; the others are for comparing cost."""
    rank: int | None = Field(None, ge=1)
    """r, with a low-rank state; null: 8, or 1 for apollo-mini."""
    gap: int | None = Field(None, ge=1)
    """Steps between two choices of directions, with a low-rank state; null: 200."""
    scale: float | None = Field(None, gt=0)
    """Multiplies a low-rank state's step (GaLore's alpha, 0.25 in its pre-training), under a square root for apollo and apollo-mini; null: 1, or 128 for apollo-mini."""

    @model_validator(mode="after")
    def _low_rank(self) -> SeqFTOptions:
        if self.state == "adam" and (given := [key for key in ("rank", "gap", "scale") if getattr(self, key) is not None]):
            raise ValueError(f"{' and '.join(given)} belong to a low-rank state; add state: galore, fira, apollo or apollo-mini, or take it out")
        return self


class SeqFT(Method):
    name = "seqft"
    summary = "sequential full fine-tuning: nothing is protected"
    Options = SeqFTOptions

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        pattern = self.options.modules
        if pattern is None and self.options.state == "adam":
            return _all_weights(model)
        found = match_modules(model, None if pattern == "linear" else pattern, "method.modules")
        if self.options.state == "adam":
            return [{"params": [m.weight for m in found.values()], "names": [f"{n}.weight" for n in found]}]
        groups = self.low_rank(found)
        return groups if pattern is not None else groups + _all_weights(model, {p for group in groups for p in group["params"]})

    def low_rank(self, layers: dict[str, nn.Module]) -> list[dict[str, Any]]:
        """Their weights, those of one shape after another: R is on the shorter side, and what is stored (in, out) is read so."""
        o = self.options
        rank, gap, scale = (own if own is not None else given for own, given in zip((o.rank, o.gap, o.scale), LOW_RANK[o.state], strict=True))
        state = {
            "rank": rank,
            "refresh_gap": gap,
            "scale": scale,
            "refresh": "svd",
            "moments": "keep",
            "form": None if o.state == "galore" else o.state,
        }
        groups: dict[tuple[str, bool], dict[str, Any]] = {}
        for name, layer in layers.items():
            out, inputs = logical(layer.weight, layer).shape
            key = side, transposed = "inputs" if out >= inputs else "outputs", stored_transposed(layer)
            group = groups.setdefault(key, {"params": [], "names": [], "side": side, "transposed": transposed} | state)
            group["params"].append(layer.weight)
            group["names"].append(f"{name}.weight")
        return list(groups.values())

    def optimizer(self, groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
        from ..optim.scaled import ScaledAdamW

        return super().optimizer(groups, **settings) if self.options.state in ("adam", "galore") else ScaledAdamW(groups, **settings)


def _all_weights(model: nn.Module, but: set[nn.Parameter] = frozenset()) -> list[dict[str, Any]]:
    """Every parameter, `but` these; weight decay, where it is set, leaves out biases and norms, as the Trainer's own groups do."""
    named = [(n, p) for n, p in model.named_parameters() if p not in but]
    matrices, vectors = ([(n, p) for n, p in named if (p.ndim < 2) == vector] for vector in (False, True))
    groups = [{"params": [p for _, p in part], "names": [n for n, _ in part]} for part in (matrices, vectors) if part]
    if vectors:
        groups[-1]["weight_decay"] = 0.0
    return groups

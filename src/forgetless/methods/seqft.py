"""Sequential fine-tuning: one task after another, nothing protected. The baseline every method must beat, tuned like everything else."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..models import match_modules
from .base import Method, Options


class SeqFTOptions(Options):
    modules: str | list[str] | None = None
    """Train only the weights of these linear layers (a regex or a list of names, as gorp's full_modules); absent: every parameter. "linear": all linear layers but the head."""


class SeqFT(Method):
    name = "seqft"
    summary = "sequential full fine-tuning: nothing is protected"
    Options = SeqFTOptions

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        pattern = self.options.modules
        if pattern is None:
            return _all_weights(model)
        found = match_modules(model, None if pattern == "linear" else pattern, "method.modules")
        return [{"params": [m.weight for m in found.values()], "names": [f"{n}.weight" for n in found]}]


def _all_weights(model: nn.Module) -> list[dict[str, Any]]:
    """Every parameter; weight decay, where it is set, leaves out biases and norms, as the Trainer's own groups do."""
    named = list(model.named_parameters())
    matrices, vectors = ([(n, p) for n, p in named if (p.ndim < 2) == vector] for vector in (False, True))
    groups = [{"params": [p for _, p in part], "names": [n for n, _ in part]} for part in (matrices, vectors) if part]
    if vectors:
        groups[-1]["weight_decay"] = 0.0
    return groups

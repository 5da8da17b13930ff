"""What methods share that train the weights of linear layers, each under a Constraint of its own, and nothing else."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..models import logical, match_modules, stored_transposed
from ..subspace import Constraint
from .base import Method, Options


class LayerOptions(Options):
    modules: str | list[str] | None = None
    """Linear layers to train: a regex over whole dotted names, or a list of names; absent: all but the head. All else is frozen."""


class OverLayers(Method):
    Options = LayerOptions

    def check(self, model: nn.Module) -> None:
        self.layers(model)

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        return match_modules(model, self.options.modules, "method.modules")

    def constraint(self, name: str, layer: nn.Module) -> Constraint:
        """Where the weight (out, in) of a layer may not go: nowhere that it may not, but weight decay pulls it to where the task began."""
        W = logical(layer.weight, layer)
        return Constraint(inputs=W.new_empty(W.shape[1], 0))

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        return [
            {"params": [m.weight], "names": [f"{n}.weight"], "constraint": self.constraint(n, m), "transposed": stored_transposed(m)}
            for n, m in self.layers(model).items()
        ]

"""GPM: Gradient Projection Memory (Saha, Garg, Roy, ICLR 2021, arXiv 2103.09762): updates stay off the inputs that the layers had in earlier tasks.

    R (in x tokens)     a layer's inputs on rows of the task just learned, one column a token, as they come: not brought to one length
    R' = R - M M^T R    what the memory M (in x k), orthonormal, does not hold yet                                                     (eq. 8)
    M <- [M, U_1..U_j]  the leading left singular vectors of R', as few as make ||M M^T R||^2 + ||R'_j||^2 >= eps ||R||^2              (eq. 9)
    dW <- dW - dW M M^T so that an input x in span(M) is answered as before: (W + dW) x = W x                                          (eq. 6-7)

eps is `threshold` + `increment` a task, at most 1: later tasks get less room and have less left. Kept: M of every layer, in x k numbers; no row.

Where we depart: the paper projects gradients and trains by SGD. Here the *applied* update is projected, after Adam's division, which would bring a part of each update
back; weight decay pulls toward the task's start, inside what is permitted. R R^T is summed up as rows are read, so that no R is held. Of a row every token counts, with its
answer. Embeddings, norms, biases and the head are frozen: the promise is a layer's, and holds for the model only while what feeds the layer stays.

When not to use it: many tasks on a narrow model, where M fills the space and nothing can be learned (the record's `share` says how full it is); and where the raw
inputs of a few huge tokens own R, so that a high eps protects little else (gorp's space is of gradients, and `protect_from` of inputs brought to one length).
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor, nn

from ..models import logical
from ..subspace import Constraint, Subspace
from ._layers import LayerOptions, OverLayers
from ._statistics import encoded, spaces_report
from .base import Memory


class GPMOptions(LayerOptions):
    threshold: float = Field(0.95, gt=0, le=1)
    """eps of the first task: share of the energy of a layer's inputs that its space must hold (paper: 0.95 to 0.99)."""
    increment: float = Field(0.003, ge=0, lt=1)
    """What eps grows by with each task (paper: 0.003 where there are ten)."""
    samples: int = Field(300, ge=1)
    """Rows of a task that the layers' inputs are measured on (paper: 100 to 300)."""


class GPM(OverLayers):
    name = "gpm"
    summary = "gradient projection memory: updates stay off the inputs that layers had in earlier tasks"
    paper = "arXiv 2103.09762"
    constrained = True
    extra_forward = "a pass over 300 rows, at a task's end"
    bytes_a_task = "a basis of every layer's new input directions: in numbers a direction"
    Options = GPMOptions

    def __init__(self, /, **options: Any):
        super().__init__(**options)
        self.spaces: dict[str, Subspace] = {}

    def begin_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        self.spaces = memory.spaces()
        return model

    def resume_task(self, model: nn.Module, task: Any, memory: Memory, state: dict[str, Tensor]) -> nn.Module:
        self.spaces = memory.spaces()
        return model

    def constraint(self, name: str, layer: nn.Module) -> Constraint:
        return Constraint(inputs=self.spaces[name]) if name in self.spaces else super().constraint(name, layer)

    def protect(self, model: nn.Module, prompts: list[list[int]], memory: Memory, advance: Any = None) -> None:
        self.extend(model, prompts, self.options.threshold, memory, advance)

    def end_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        o, learned = self.options, memory.info.get("gpm", {}).get("tasks", 0)
        rows = encoded(self.tokenizer, task, o.samples)
        self.progress.stage(f"{task.name}: the layers' inputs", len(rows))
        self.extend(model, rows, min(1.0, o.threshold + o.increment * learned), memory, self.progress.advance)
        memory.info["gpm"] = {"tasks": learned + 1}
        return model

    def extend(self, model: nn.Module, rows: list, eps: float, memory: Memory, advance: Any) -> None:
        """Each layer's space grows until it holds the share eps of its inputs on `rows`."""
        from ..protect import input_spaces

        layers, known = self.layers(model), memory.spaces()
        memory.keep(input_spaces(model, layers, rows, eps, known=known, normalise=False, autocast=self.autocast, advance=advance))

    # -- planning and the record -----------------------------------------------------------------------------------------------------

    def spaced(self, model: nn.Module) -> dict[str, int]:
        return {name: logical(m.weight, m).shape[1] for name, m in self.layers(model).items()}

    def protected_inputs(self, memory: Memory) -> dict[str, Tensor]:
        return {name: space.basis for name, space in memory.spaces().items()}

    def report(self, memory: Memory) -> dict[str, Any] | None:
        return spaces_report(memory.spaces())

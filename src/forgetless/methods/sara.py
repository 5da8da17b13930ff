"""SaRA: progressive sparse low-rank adaptation (Hu et al., ICLR 2025, arXiv 2409.06633): only the weights that are next to zero are trained.

    M = [ |P| < theta_t ]                      the mask of a weight matrix P: its smallest numbers, which do next to nothing yet
    P <- P + M o dP                            all others stay as they are, to the bit
    L = L_task + lambda ||M o (P - P_0)||_*    the nuclear norm of the change, so that it is of low rank (P_0: P as the task began)
    next task: M anew                          among what is small then: weights that have grown are kept from it by their size

theta_t is each matrix' own, so that M holds the `share` of its smallest numbers. Nothing is kept: what a task may change is read from the weights it begins with.

Where we depart: the paper has one theta_t for all matrices, puts the nuclear norm on M o P, and takes it of one matrix a step, drawn at random; here it is on the change
and of every matrix. Half way through its training the paper selects again, among the chosen that are still small; here each task does, among all. Adam's moments are
kept for all of a matrix: what is saved here is forgetting, not memory (the paper's saving of memory is a backward pass of its own).

When not to use it: where a task needs more than a few small weights can give; and on a pruned model, whose zeros would be filled in. Small weights hold little of what
was pretrained, but what the last tasks taught may be small still, and is then open to the next.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..models import logical
from ..subspace import Constraint, tolerance, working_dtype
from ._layers import LayerOptions, OverLayers
from .base import Memory


class SaRAOptions(LayerOptions):
    share: float = Field(0.05, gt=0, le=1)
    """Share of each matrix' numbers that are trained, the smallest (paper: 0.006 to 0.06 of the model)."""
    nuclear: float = Field(0.0, ge=0)
    """lambda: weight of the nuclear norm of each matrix' change. Not 0: a singular value decomposition of every matrix in every step, and a copy of the weights."""


class SaRA(OverLayers):
    name = "sara"
    summary = "sparse fine-tuning: only the smallest weights of each matrix are trained"
    paper = "arXiv 2409.06633"
    constrained = True
    extra_forward = "with nuclear: a decomposition of every matrix a step"
    Options = SaRAOptions

    def __init__(self, /, **options: Any):
        super().__init__(**options)
        self.start: dict[str, Tensor] = {}  # P_0, where the nuclear norm asks for it

    def begin_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        return self.note(model)

    def resume_task(self, model: nn.Module, task: Any, memory: Memory, state: dict[str, Tensor]) -> nn.Module:
        return self.note(model)  # with the weights of the last commit, as the task began

    def end_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        self.start = {}
        return model

    def note(self, model: nn.Module) -> nn.Module:
        layers = self.layers(model) if self.options.nuclear else {}
        self.start = {name: m.weight.detach().to(working_dtype(m.weight.dtype), copy=True) for name, m in layers.items()}
        return model

    def constraint(self, name: str, layer: nn.Module) -> Constraint:
        return Constraint(mask=smallest(logical(layer.weight, layer).detach(), self.options.share))

    @torch.no_grad()
    def on_step(self, model: nn.Module) -> None:
        """The penalty's gradient, matrix by matrix: in the loss it would hold every decomposition until backward. What of it lies outside M the optimizer drops."""
        for name, layer in self.layers(model).items() if self.start else ():
            P = layer.weight
            if P.grad is not None:
                P.grad.add_(nuclear_gradient(P.to(self.start[name].dtype) - self.start[name]).to(P.grad.dtype), alpha=self.options.nuclear)

    def held_bytes(self) -> int:
        return sum(P.nbytes for P in self.start.values())


def smallest(W: Tensor, share: float) -> Tensor:
    """Mask of the `share` of W's entries that are smallest in magnitude, at least one; of equals those that come first.

    >>> smallest(torch.tensor([[3.0, -1.0], [2.0, -4.0]]), 0.5)
    tensor([[False,  True],
            [ True, False]])
    """
    size = W.abs().flatten()
    k = max(1, round(share * len(size)))
    edge = size.kthvalue(k).values
    chosen, equal = size < edge, size == edge
    return (chosen | equal & (equal.cumsum(0) <= k - chosen.sum())).reshape(W.shape)


def nuclear_gradient(D: Tensor) -> Tensor:
    """U V^T of D = U S V^T: the gradient of the sum of D's singular values, 0 along those that are 0."""
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    return (U * S.gt(tolerance(D.dtype) * S[0])) @ Vh

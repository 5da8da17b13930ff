"""The guarantee round any torch optimizer: keep its update of a weight off protected directions.

    handle = constrain(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), {model.fc.weight: Constraint(inputs=V)})

The optimizer object stays what it was (schedulers, Accelerate and checkpoints see no difference): a hook keeps a copy of each constrained weight before
`step`, and after it replaces W by W_before + permitted(W - W_before). The difference carries the rounding of one addition in the weight's dtype; SubspaceAdamW,
which projects before it adds, does not. Costs one copy of the constrained weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..products import full_precision
from ..subspace import Constraint, working_dtype


class Handle:
    """Undo with `remove()`."""

    def __init__(self, *hooks):
        self._hooks = hooks

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def constrain(optimizer: torch.optim.Optimizer, constraints: dict[Tensor, Constraint]) -> Handle:
    """Hold `optimizer` to `constraints` (weight -> Constraint) from its next step on. Raises ValueError for a weight it does not train or a basis that does not fit."""
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    for p, constraint in constraints.items():
        if p not in trained:
            raise ValueError(f"constrain: a constrained weight of shape {tuple(p.shape)} is not among the optimizer's parameters")
        constraint.check(p.shape)
    before: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def keep(*_) -> None:
        before.update({p: p.detach().clone() for p in constraints})  # also without a gradient yet: a closure makes it inside step

    @torch.no_grad()
    @full_precision()
    def restrict(*_) -> None:
        for p, W in before.items():
            dtype = working_dtype(p.dtype)
            D = constraints[p].to(p.device, dtype).permitted(p.to(dtype) - W.to(dtype))
            p.copy_((W.to(dtype) + D).to(p.dtype))
        before.clear()

    return Handle(optimizer.register_step_pre_hook(keep), optimizer.register_step_post_hook(restrict))

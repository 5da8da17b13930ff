"""The guarantee round any torch optimizer: keep its update of a weight off protected directions.

    handle = constrain(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), {model.fc.weight: Constraint(inputs=V)})

The optimizer object stays what it was (schedulers, Accelerate and checkpoints see no difference): a hook keeps a copy of each constrained weight before
`step`, and after it replaces W by W_before + permitted(W - W_before). The difference carries the rounding of one addition in the weight's dtype; SubspaceAdamW,
which projects before it adds, does not. Costs one copy of the constrained weights.

    constrain_together(optimizer, {model.fc.weight: B, model.fc.bias: b})       # B (k, out, in) and b (k, out) are the two parts of k directions

does the same for directions in the space of several tensors read as one long vector.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..products import full_precision
from ..subspace import Constraint, working_dtype
from . import rounding

BLOCK = 1 << 22  # numbers of a part of a basis that are converted at once


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


def constrain_together(optimizer: torch.optim.Optimizer, bases: dict[Tensor, Tensor]) -> Handle:
    """Hold what `optimizer` changes in several tensors, read as one long vector d, off k directions: d <- d - B^T (B B^T)^-1 B d, from its next step on.

    bases: tensor -> its part (k, *shape) of B (k, all). B need not be orthonormal, as one kept in bf16 is not; its rows must be independent. What a master holds of a
    coarse weight counts as the weight. Costs one copy of the tensors beside B. Raises ValueError for a tensor it does not train, parts that do not fit, dependent rows.
    """
    trained = {p: group for group in optimizer.param_groups for p in group["params"]}
    for p, B in bases.items():
        if p not in trained:
            raise ValueError(f"constrain_together: a tensor of shape {tuple(p.shape)} is not among the optimizer's parameters")
        if B.shape[1:] != p.shape or len(B) != len(next(iter(bases.values()))):
            raise ValueError(
                f"constrain_together: a part of shape {tuple(B.shape)} for a tensor of shape {tuple(p.shape)}; it must be (k, *shape), k the same for all"
            )
    gram = sum(_gram(B) for B in bases.values())
    L, failed = torch.linalg.cholesky_ex(gram)
    if int(failed) or not bool(L.diagonal().square().min() > 1e-8 * gram.diagonal().max()):
        raise ValueError(f"constrain_together: the {len(gram)} directions depend on each other; leave out those that add nothing")
    places = {p: i for i, p in enumerate(bases)}
    before: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def keep(*_) -> None:
        before.update({p: rounding.value(p, optimizer.state.get(p, {})).detach().clone() for p in bases})

    @torch.no_grad()
    @full_precision()
    def restrict(*_) -> None:
        c = sum(along(bases[p], rounding.value(p, optimizer.state.get(p, {})) - W).to("cpu", torch.float64) for p, W in before.items())
        before.clear()
        c = -torch.cholesky_solve(c[:, None], L)[:, 0]
        for p, B in bases.items():
            state, precision = optimizer.state[p], trained[p].get("precision", "plain")
            rounding.prepare(p, state, precision)
            seeds = (getattr(optimizer, "seed", 0), places[p], int(state.get("updates", 0)), 2)
            rounding.add(p, combined(B, c, working_dtype(p.dtype)), state, precision, seeds)

    return Handle(optimizer.register_step_pre_hook(keep), optimizer.register_step_post_hook(restrict))


def along(B: Tensor, d: Tensor) -> Tensor:
    """B d (k,) of a part B (k, *shape) and d (*shape), in d's dtype."""
    flat = d.reshape(-1)
    return sum((block.to(d.dtype) @ flat[where] for where, block in _blocks(B)), d.new_zeros(len(B)))


def combined(B: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    """B^T c (*shape) of a part B (k, *shape) and c (k,)."""
    out, c = torch.empty(B[0].numel(), dtype=dtype, device=B.device), c.to(B.device, dtype)
    for where, block in _blocks(B):
        torch.mv(block.to(dtype).mT, c, out=out[where])
    return out.view(B.shape[1:])


def _gram(B: Tensor) -> Tensor:
    """B B^T (k, k) in fp64, on the CPU."""
    exact = torch.float64 if B.device.type in ("cpu", "cuda") else torch.float32
    return sum((block @ block.mT for block in (block.to(exact) for _, block in _blocks(B))), torch.zeros((), device=B.device)).to(
        "cpu", torch.float64
    )


def _blocks(B: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Which numbers of a tensor, and of each direction those: few enough that all of them in another dtype are no matter."""
    flat = B.reshape(len(B), -1)
    size = max(1, BLOCK // len(B))
    for i in range(0, flat.shape[1], size):
        yield slice(i, i + size), flat[:, i : i + size]

"""Read a linear layer's gradient in given coordinates without ever keeping it: R = P^T G Q, G = dY^T X (out, in), as R = (dY P)^T (X Q) where that is less work.

For a square layer of n with half of its directions open that is so below about 3 n tokens. Elsewhere G is made, read and let go within the layer's own backward.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..models import plain_forwards
from ..products import product
from ..subspace import working_dtype

if TYPE_CHECKING:
    from .subspace_adamw import SubspaceAdamW


def read(dY: Tensor, X: Tensor, P: Tensor | None, Q: Tensor | None) -> Tensor:
    """R (p, q) of dY (tokens, out) and X (tokens, in) for P (out, p) and Q (in, q), either of which may be None: that side stays whole."""
    (tokens, m), n = dY.shape, X.shape[1]
    p, q = m if P is None else P.shape[1], n if Q is None else Q.shape[1]
    outputs, inputs = (m * p if P is not None else 0), (n * q if Q is not None else 0)
    if tokens * (outputs + inputs + p * q) <= tokens * m * n + inputs * m + (m * p * q if P is not None else 0):
        left, right = dY if P is None else product(dY, P.to(dY.dtype)), X if Q is None else product(X, Q.to(X.dtype))
        return product(left.mT, right)
    G = product(dY.mT, X)
    G = G if Q is None else product(G.to(Q.dtype), Q)
    return G if P is None else product(P.mT, G.to(P.dtype))


class _Linear(torch.autograd.Function):
    """y = W x, whose backward hands R to `take` in place of a gradient of W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, take: ReleasedForward) -> Tensor:
        ctx.take, ctx.dtype = take, x.dtype
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # which autocast leaves alone
            dtype = torch.get_autocast_dtype(x.device.type)
            x, W = x.to(dtype), W.to(dtype)
        ctx.save_for_backward(x, W)
        return nn.functional.linear(x, W)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        x, W = ctx.saved_tensors
        (dY,) = gradients
        ctx.take.receive(dY.reshape(-1, dY.shape[-1]), x.reshape(-1, x.shape[-1]))
        dX = product(dY.reshape(-1, dY.shape[-1]), W).reshape(*dY.shape[:-1], W.shape[1]).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return dX, None, None


class ReleasedForward:
    """The forward of a layer (nn.Linear, Conv1D) that `release` has put in place of its own. Its bias, if any, learns nothing."""

    def __init__(self, layer: nn.Module, group: dict[str, Any], optimizer: SubspaceAdamW):
        self.layer, self.group, self.optimizer = layer, group, weakref.ref(optimizer)

    def __call__(self, input: Tensor) -> Tensor:
        layer, W = self.layer, self.layer.weight
        if not torch.is_grad_enabled() or not W.requires_grad or self.optimizer() is None:
            return type(layer).forward(layer, input)
        y = _Linear.apply(input, W.mT if self.group["flipped"] else W, self)
        return y if layer.bias is None else y + layer.bias.detach().to(y.dtype)

    def receive(self, dY: Tensor, X: Tensor) -> None:
        optimizer = self.optimizer()
        if optimizer is None:
            return
        dY, X = (X, dY) if self.group["flipped"] else (dY, X)  # the group's directions speak of the weight as stored
        (P, Q), constraint = self.group["directions"], self.group["constraint"]
        closed = None if constraint is None else constraint.outputs if P is None else constraint.inputs if Q is None else None
        # where a side stays whole, what is closed there is taken off R; off the fewer rows of dY, or X, where these are fewer than R's columns
        exact = torch.promote_types(dY.dtype, X.dtype) == working_dtype(self.layer.weight.dtype)  # in bf16 a projection is no good
        few = exact and closed is not None and len(X) < min(B.shape[1] for B in (P, Q) if B is not None)
        if few and P is None:
            dY = dY - product(product(dY, closed), closed.mT)
        elif few:
            X = X - product(product(X, closed), closed.mT)
        optimizer.receive(self.group, self.layer.weight, read(dY, X, P, Q), permitted=few)


def release(layer: nn.Module, optimizer: SubspaceAdamW) -> None:
    """From now on `layer` hands `optimizer`, which trains its weight in given directions, the gradient in their coordinates. Raises ValueError where it does not.

    A layer with a forward of its own is left alone: the optimizer's hook reads its gradient once it is there. Ends with keep(model), or with the optimizer.
    """
    group = next((g for g in optimizer.param_groups for p in g["params"] if p is layer.weight), None)
    if group is None or group["directions"] is None:
        raise ValueError("release: the optimizer does not train this layer's weight in given directions")
    if type(layer).forward in plain_forwards():
        layer.forward = ReleasedForward(layer, group, optimizer)


def keep(model: nn.Module) -> None:
    """Every layer of `model` has its own forward, and its weight a gradient, again."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), ReleasedForward):
            del module.forward

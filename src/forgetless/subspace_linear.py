"""A linear layer with a trainable change between given directions: y = W x + P C Q^T x, W frozen. OSFT's adapter form (arXiv 2504.07097).

P (out, p) and Q (in, q) are orthonormal and fixed; C (p, q), zero at first, learns. dW = P C Q^T lies in span(P) x span(Q) whatever an optimizer does to C, and the
gradient of W, as large as W, is never formed. A side without directions stays whole: C is as large as the layer there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .models import logical, replace
from .products import product
from .subspace import working_dtype


class SubspaceLinear(nn.Module):
    """Stands in the place of `base_layer` (nn.Linear, Conv1D), whose parameters it freezes. P and Q are not part of its state_dict: whoever made it makes them again.

    >>> layer = SubspaceLinear(nn.Linear(3, 3), torch.eye(3)[:, :1], torch.eye(3)[:, 1:]); layer.C.shape
    torch.Size([1, 2])
    """

    def __init__(self, base_layer: nn.Module, P: Tensor | None, Q: Tensor | None):
        super().__init__()
        W = logical(base_layer.weight, base_layer)
        self.base_layer = base_layer.requires_grad_(False)
        self.register_buffer("P", P, persistent=False)
        self.register_buffer("Q", Q, persistent=False)
        p, q = (side if B is None else B.shape[1] for B, side in zip((P, Q), W.shape, strict=True))
        self.C = nn.Parameter(
            torch.zeros(p, q, dtype=working_dtype(W.dtype), device=W.device)
        )  # fp32 also on a bf16 layer, which would swallow small steps

    @property
    def weight(self) -> Tensor:  # T5 looks at its layers' dtypes
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if not torch.is_autocast_enabled(x.device.type):
            return y + _Branch.apply(x.to(self.C.dtype), self.C, self.P, self.Q).to(y.dtype)
        z = x if self.Q is None else x @ self.Q
        z = nn.functional.linear(z, self.C)
        z = z if self.P is None else nn.functional.linear(z, self.P)
        return y + z.to(y.dtype)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """P C Q^T (out, in)."""
        left = self.C if self.P is None else product(self.P, self.C)
        return left.detach() if self.Q is None else product(left, self.Q.mT)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """The base layer with W + P C Q^T, rounded once to its dtype, trainable again."""
        W = logical(self.base_layer.weight, self.base_layer)
        W.copy_((W.to(self.C.dtype) + self.delta()).to(W.dtype))
        return self.base_layer.requires_grad_(True)


class _Branch(torch.autograd.Function):
    """P C Q^T x of x (..., in), with a gradient for x and C."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, C: Tensor, P: Tensor | None, Q: Tensor | None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        z = flat if Q is None else product(flat, Q)
        ctx.save_for_backward(z, C, P, Q)
        y = product(z, C.mT)
        y = y if P is None else product(y, P.mT)
        return y.reshape(*x.shape[:-1], y.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor):
        z, C, P, Q = ctx.saved_tensors
        (dY,) = gradients
        g = dY.reshape(-1, dY.shape[-1])
        g = g if P is None else product(g, P)
        dC = product(g.mT, z) if ctx.needs_input_grad[1] else None
        dx = None
        if ctx.needs_input_grad[0]:
            dx = product(g, C)
            dx = dx if Q is None else product(dx, Q.mT)
            dx = dx.reshape(*dY.shape[:-1], dx.shape[1])
        return dx, dC, None, None


def attach(model: nn.Module, name: str, layer: SubspaceLinear | nn.Module) -> None:
    """Put `layer` in the place of the module called `name`, under each name that it has."""
    replace(model, model.get_submodule(name), layer)


def attached(model: nn.Module) -> dict[str, SubspaceLinear]:
    """The layers of a model that carry such a change, by the name of the layer each stands for."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SubspaceLinear)}

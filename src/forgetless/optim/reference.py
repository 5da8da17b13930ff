"""Slow, obvious versions of the update rules, one tensor at a time, in the order the formulas are written. tests/test_optim.py holds the fast ones to these."""

from __future__ import annotations

import torch
from torch import Tensor

from ..subspace import Constraint, project_out


class ReferenceAdamW:
    """One weight, full matrices: AdamW (Loshchilov & Hutter, 2019), the state in r directions where `rank` is set, the forbidden part of the step removed.

    W: (out, in), changed in place by step(G). `basis_of(P)` gives Q (in, r) from the permitted gradient P: exact SVD by default.
    """

    def __init__(self, W: Tensor, lr: float, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, constraint: Constraint | None = None,
                 rank: int | None = None, refresh_gap: int = 10, moments: str = "rotate", scale: float = 1.0):  # fmt: skip
        self.W, self.W_start = W, W.clone()
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.constraint, self.rank, self.refresh_gap, self.moments, self.scale = constraint, rank, refresh_gap, moments, scale
        self.t = self.updates = 0
        self.Q = self.M = self.v = None

    def step(self, G: Tensor) -> Tensor:
        """Apply one step for the gradient G (out, in); returns the change made, dW."""
        P = G if self.constraint is None else self.constraint.permitted(G)
        R = P
        if self.rank is not None:
            if self.updates % self.refresh_gap == 0:
                self.refresh(G)
            R = G @ self.Q  # = P Q: Q is orthogonal to the protected inputs
        if self.M is None:
            self.M, self.v = torch.zeros_like(R), torch.zeros_like(R)
        self.t += 1
        self.updates += 1
        b1, b2 = self.betas
        self.M = b1 * self.M + (1 - b1) * R
        self.v = b2 * self.v + (1 - b2) * R * R
        step = (self.M / (1 - b1**self.t)) / ((self.v / (1 - b2**self.t)).sqrt() + self.eps)
        D = -self.lr * step if self.rank is None else -self.lr * self.scale * step @ self.Q.mT
        if self.constraint is None and self.rank is None:
            D = D - self.lr * self.weight_decay * self.W
        else:
            D = D - self.lr * self.weight_decay * (self.W - self.W_start)
        if self.constraint is not None:
            D = self.constraint.permitted(D)
        self.W += D
        return D

    def refresh(self, G: Tensor) -> None:
        V = None if self.constraint is None else self.constraint.inputs
        Q = torch.linalg.svd(project_out(G, V), full_matrices=False).Vh[: self.rank].mT
        if self.Q is not None:
            O = self.Q.mT @ Q
            if self.moments == "rotate":
                mean = self.v.mean(1, keepdim=True)
                self.M, self.v = self.M @ O, self.v @ (O * O) + mean * (1 - (O * O).sum(0))
            elif self.moments == "reset":
                self.M = self.v = None
                self.t = 0
        self.Q = Q

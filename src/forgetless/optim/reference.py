"""Slow, obvious versions of the update rules, one tensor at a time, in the order the formulas are written. tests/test_optim.py holds the fast ones to these."""

from __future__ import annotations

import torch
from torch import Tensor

from ..subspace import Constraint, project_out


class ReferenceAdamW:
    """One weight, full matrices: AdamW (Loshchilov & Hutter, 2019), the state in r directions where `rank` is set, the forbidden part of the step removed.

    W: (out, in), changed in place by step(G). side "inputs": the state is out x r, in the directions Q (in, r); "both": r x r, in P (out, r) and Q.
    tolerance: entries of an r x r R below this share of its largest are round-off. directions: P (out, p) and Q (in, q) for good, in place of a rank; None is I.
    """

    def __init__(self, W: Tensor, lr: float, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, constraint: Constraint | None = None,
                 rank: int | None = None, refresh_gap: int = 10, moments: str = "rotate", scale: float = 1.0, side: str = "inputs",
                 tolerance: float = 1e-12, directions: tuple[Tensor | None, Tensor | None] | None = None):  # fmt: skip
        self.W, self.W_start = W, W.clone()
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.constraint, self.rank, self.refresh_gap, self.moments, self.scale = constraint, rank, refresh_gap, moments, scale
        self.side, self.tolerance = side, tolerance
        self.directions = None
        if directions is not None:
            self.directions = [torch.eye(size, dtype=W.dtype) if B is None else B for B, size in zip(directions, W.shape, strict=True)]
        self.t = self.updates = 0
        self.P = self.Q = self.M = self.v = None

    def step(self, G: Tensor) -> Tensor:
        """Apply one step for the gradient G (out, in); returns the change made, dW."""
        permitted = G if self.constraint is None else self.constraint.permitted(G)
        R = permitted
        if self.rank is not None:
            if self.updates % self.refresh_gap == 0:
                self.refresh(G)
            if self.side == "both":
                R = self.P.mT @ permitted @ self.Q
                R = torch.where(R.abs() > self.tolerance * R.abs().max(), R, torch.zeros_like(R))
            else:
                R = G @ self.Q  # = permitted Q where the inputs are protected: Q is orthogonal to them
        if self.directions is not None:
            P, Q = self.directions
            R = P.mT @ permitted @ Q
        if self.M is None:
            self.M, self.v = torch.zeros_like(R), torch.zeros_like(R)
        self.t += 1
        self.updates += 1
        b1, b2 = self.betas
        self.M = b1 * self.M + (1 - b1) * R
        self.v = b2 * self.v + (1 - b2) * R * R
        step = (self.M / (1 - b1**self.t)) / ((self.v / (1 - b2**self.t)).sqrt() + self.eps)
        if self.directions is not None:
            D = -self.lr * self.scale * P @ step @ Q.mT
        elif self.rank is None:
            D = -self.lr * step
        elif self.side == "both":
            D = -self.lr * self.scale * self.P @ step @ self.Q.mT
        else:
            D = -self.lr * self.scale * step @ self.Q.mT
        if self.constraint is None and self.rank is None and self.directions is None:
            D = D - self.lr * self.weight_decay * self.W
        else:
            D = D - self.lr * self.weight_decay * (self.W - self.W_start)
        if self.constraint is not None:
            D = self.constraint.permitted(D)
        self.W += D
        return D

    def refresh(self, G: Tensor) -> None:
        """New directions from G (out, in) by an exact SVD."""
        if self.side == "both":
            U, _, Vh = torch.linalg.svd(G if self.constraint is None else self.constraint.permitted(G), full_matrices=False)
            self.change(Vh[: self.rank].mT, U[:, : self.rank])
        else:
            V = None if self.constraint is None else self.constraint.inputs
            self.change(torch.linalg.svd(project_out(G, V), full_matrices=False).Vh[: self.rank].mT)

    def change(self, Q: Tensor, P: Tensor | None = None) -> None:
        """From the old directions to Q (in, r) and P (out, r), with what becomes of the moments."""
        if self.Q is not None and self.moments == "rotate":
            O = self.Q.mT @ Q
            mean = self.v.mean(1, keepdim=True)
            self.M, self.v = self.M @ O, self.v @ (O * O) + mean * (1 - (O * O).sum(0))
            if P is not None:  # the same for the rows
                O = self.P.mT @ P
                mean = self.v.mean(0, keepdim=True)
                self.M, self.v = O.mT @ self.M, (O * O).mT @ self.v + (1 - (O * O).sum(0))[:, None] * mean
        elif self.Q is not None and self.moments == "reset":
            self.M = self.v = None
            self.t = 0
        self.P, self.Q = P, Q


class ReferenceFactors:
    """OSFT's factor form ("Sculpting Subspaces", arXiv 2504.07097), as the released implementations have it: W = U_h S_h V_h + U S V, and U, S, V learn.

    W: (out, in); frozen: k, how many of its singular directions, largest first, are closed. U (out, R - k), S (R - k,), V (R - k, in) with R = min(out, in) are
    leaf tensors for any torch optimizer. Projecting their gradients alone keeps plain gradient descent off the closed directions to first order; what Adam makes
    of them it does not. To first order the update is the permitted gradient times S^2, not the projected gradient; this class is here to be compared with.
    """

    def __init__(self, W: Tensor, frozen: int):
        U, S, V = torch.linalg.svd(W, full_matrices=False)
        self.U_high, self.V_high = U[:, :frozen], V[:frozen]
        self.high = self.U_high @ (S[:frozen, None] * self.V_high)
        self.U, self.S, self.V = (t.clone().requires_grad_(True) for t in (U[:, frozen:], S[frozen:], V[frozen:]))

    def weight(self) -> Tensor:
        """W (out, in) as it stands."""
        return self.high + self.U @ (self.S[:, None] * self.V)

    def project_gradients(self) -> None:
        """Before an optimizer's step: no gradient toward the closed directions."""
        self._project(self.U.grad, self.V.grad)

    @torch.no_grad()
    def project_parameters(self) -> None:
        """After it: what the optimizer put there all the same is taken out of the factors."""
        self._project(self.U, self.V)

    def _project(self, U: Tensor, V: Tensor) -> None:
        U -= self.U_high @ (self.U_high.mT @ U)
        V -= (V @ self.V_high.mT) @ self.V_high

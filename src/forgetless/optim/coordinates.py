"""Coordinates for low-rank state: which directions a weight's gradient is read in, when they are chosen anew, and how a step in them goes back to the weight.

    R = G Q                  Q (n, r), the top right singular directions of the permitted gradient     (GaLore, arXiv 2403.03507; GORP eq. 3-4)
    dW = step(R) Q^T         Q is orthogonal to what the constraint protects on its side, whatever an optimizer does to R

Functions of a parameter group and of one tensor's state ("basis", and Adam's moments where they exist). The gradient is read with the reduced side last:
G (out, in) for side "inputs", its transpose for "outputs", (m, n) below.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..subspace import orthonormalize, project_out, rotate_moments, tolerance, top_subspace
from .rounding import seeded

SIDES = ("inputs", "outputs")
REFRESH = ("cold", "warm", "exact", "svd")
MOMENTS = ("rotate", "reset", "keep")


def read(group: dict[str, Any], G: Tensor) -> Tensor:
    """G (out, in) with the side that is reduced last; its own inverse."""
    return G.mT if group["side"] == "outputs" else G


def protected(group: dict[str, Any]) -> Tensor | None:
    """The basis (n, b) that Q is drawn orthogonal to."""
    constraint = group["constraint"]
    if constraint is None or constraint.forbid == "both":
        return None
    return constraint.inputs if group["side"] == "inputs" else constraint.outputs


def covers(group: dict[str, Any]) -> bool:
    """Is every step in these coordinates permitted by construction? If not, the dense update has to be projected."""
    constraint = group["constraint"]
    if constraint is None or constraint.empty:
        return True
    if constraint.mask is not None or constraint.forbid == "both":
        return False
    return _width(constraint.inputs) + _width(constraint.outputs) == _width(protected(group))


def sizes(group: dict[str, Any], shape: torch.Size) -> tuple[int, int, int]:
    """(m, n, r) for a weight of this shape: r directions, fewer where less is left of the side."""
    m, n = shape[::-1] if group["side"] == "outputs" else shape
    return m, n, min(group["rank"], n - _width(protected(group)), m)


def _width(V: Tensor | None) -> int:
    return 0 if V is None else V.shape[1]


def gradient(group: dict[str, Any], state: dict[str, Any], G: Tensor, seed: int, index: int) -> Tensor | None:
    """R (m, r) of the gradient G (out, in), after a new choice of Q where one is due. None: no gradient yet, or nothing is permitted."""
    updates = int(state.get("updates", 0))
    if updates % group["refresh_gap"] == 0 or "basis" not in state:
        choose(group, state, G, (seed, index, updates))
    return (read(group, G) @ state["basis"]).contiguous() if "basis" in state else None


def choose(group: dict[str, Any], state: dict[str, Any], G: Tensor, seeds: tuple[int, int, int]) -> None:
    """Choose Q for the gradient G (out, in) and carry the moments over: orthonormal and orthogonal to what is protected, whatever the rank of G."""
    V = protected(group)
    _, n, r = sizes(group, G.shape)
    scale = torch.linalg.matrix_norm(G)
    if r < 1 or not scale > 0:
        return
    A = project_out(read(group, G), V)  # (m, n)
    if not torch.linalg.matrix_norm(A) > tolerance(A.dtype) * scale:
        return  # the whole gradient lies in the protected space
    old = state.get("basis")
    if group["refresh"] in ("svd", "exact"):
        Q = top_subspace(A, r, "svd" if group["refresh"] == "svd" else "gram").basis
    elif group["refresh"] == "warm" and old is not None and old.shape[1] == r:
        Q = top_subspace(A, r, "power", start=old, iterations=1).basis
    else:
        # seeded by tensor and step, so that a resumed run draws the same numbers without saving a generator
        start = torch.randn(n, min(2 * r, n), generator=seeded(*seeds), dtype=torch.float32).to(A.device, A.dtype)
        Q = top_subspace(A, r, "power", start=start).basis
    Q = orthonormalize(Q, against=V)
    if Q.shape[1] == 0:
        return
    if old is not None and "exp_avg" in state:
        _carry_moments(group, state, Q)
    state["basis"] = Q


def _carry_moments(group: dict[str, Any], state: dict[str, Any], Q: Tensor) -> None:
    M, v = state["exp_avg"], state["exp_avg_sq"]
    if group["moments"] == "rotate":
        state["exp_avg"], state["exp_avg_sq"] = rotate_moments(M, v, state["basis"], Q)
    elif group["moments"] == "reset" or Q.shape != state["basis"].shape:  # "keep" has nothing to keep when the rank changed
        state["exp_avg"], state["exp_avg_sq"] = M.new_zeros(M.shape[0], Q.shape[1]), M.new_zeros(M.shape[0], Q.shape[1])
        state["step"] = torch.zeros_like(state["step"])


def factors(group: dict[str, Any], state: dict[str, Any], delta: Tensor) -> tuple[Tensor, Tensor]:
    """L (out, r) and K (r, in) with dW = L K, for a step delta (m, r) in the coordinates."""
    Q = state["basis"]
    return (Q, delta.mT) if group["side"] == "outputs" else (delta, Q.mT)


def leak(group: dict[str, Any], state: dict[str, Any], delta: Tensor) -> float:
    """||forbidden part|| / ||update|| of a step delta (m, r), through the small products. Only where `covers(group)`."""
    V, delta = protected(group), delta.double()
    norm = float(delta.norm())  # = ||dW||, Q is orthonormal
    if _width(V) == 0 or norm == 0:
        return 0.0
    return float((delta @ (state["basis"].mT.double() @ V.double())).norm()) / norm

"""Coordinates for low-rank state: which directions a weight's gradient is read in, when they are chosen anew, and how a step in them goes back to the weight.

    R = G Q          dW = step(R) Q^T         Q (n, r): top right singular directions of the permitted gradient (GaLore, arXiv 2403.03507)
    R = P^T G Q      dW = P step(R) Q^T       side "both": P (m, r) its top left ones, R (r, r)                 (GORP, arXiv 2507.02503, eq. 3-4)

P and Q are orthogonal to what the constraint protects on their side, so dW is, whatever an optimizer does to R element by element.

    R = P^T G Q          P and Q given and never chosen anew ("directions"); a side without one stays whole        (OSFT, arXiv 2504.07097)

Functions of a parameter group and of one tensor's state ("basis" is Q, "basis_left" P, and Adam's moments where they exist). The gradient is read with the
side that Q reduces last, (m, n) below. The group's constraint and side speak of the weight as stored.

Of a weight whose rows are spread over processes (`part`), all of these are called by every process, with its own rows of the gradient, of P and Q where they read that
side, and of R where its rows come from that side; what they send is as thin as P and Q.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..fake import is_fake
from ..products import coarse_product, product
from ..sharding import ALONE, Imagined, Rows, Sent, Spread, counting, rows_of
from ..subspace import Constraint, less, orthonormalize, project_out_, renewed, rotate_moments, tolerance, top_subspace
from . import moments
from .rounding import seeded

SIDES = ("inputs", "outputs", "both")
REFRESH = ("cold", "warm", "exact", "svd")
MOMENTS = ("rotate", "reset", "keep")
PROJECTIONS = ("fp32", "bf16")


def flipped(group: dict[str, Any]) -> bool:
    """Is the gradient read as its transpose? For side "outputs"; and for both sides of a weight stored (in, out), so that it learns as if stored (out, in)."""
    return group["side"] == "outputs" or group["side"] == "both" and group["flipped"]


def read(group: dict[str, Any], G: Tensor) -> Tensor:
    """G, of the weight's shape, as (m, n); its own inverse."""
    return G.mT if flipped(group) else G


def protected(group: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """The bases (m, a) and (n, b) that P and Q are drawn orthogonal to."""
    constraint = group["constraint"]
    if constraint is None or constraint.forbid == "both":
        return None, None
    left, right = (constraint.inputs, constraint.outputs) if flipped(group) else (constraint.outputs, constraint.inputs)
    return (left if group["side"] == "both" else None), right


def part(group: dict[str, Any], p: Tensor) -> dict[str, Any]:
    """The group as it is for the own rows of p; the group itself where all are here. The bases are views of the group's."""
    rows = rows_of(p)
    return group if rows is ALONE else of_rows(group, rows)


def of_rows(group: dict[str, Any], rows: Rows) -> dict[str, Any]:
    """The group as it is for who holds these rows of a weight."""
    own, constraint, directions = group | {"rows": rows}, group.get("constraint"), group.get("directions")
    own["constraint"] = None if constraint is None else constraint.spread(rows)
    own["directions"] = None if directions is None else (None if directions[0] is None else rows.own(directions[0]), directions[1])
    return own


def spread(group: dict[str, Any]) -> tuple[Rows, Rows]:
    """How the rows (m) and columns (n) of a gradient as it is read are spread."""
    rows = group.get("rows", ALONE)
    return (ALONE, rows) if flipped(group) else (rows, ALONE)


def spread_state(group: dict[str, Any], name: str) -> Rows:
    """How the rows of R, and of the moments, are spread ("exp_avg" and "exp_avg_sq"), and those of any other tensor of the state."""
    rows, columns = spread(group)
    if name == "basis":
        return columns
    if name == "basis_left":
        return rows
    if name.startswith("exp_avg") and group["directions"] is not None:
        P = group["directions"][0]
        return group.get("rows", ALONE) if P is None else group.get("rows", ALONE).among(P.shape[1])
    if name.startswith("exp_avg") and group["rank"] is not None:
        return ALONE if group["side"] == "both" else rows
    return group.get("rows", ALONE)


def reduced(group: dict[str, Any]) -> bool:
    """Does Adam run in coordinates, and not on the weight's own entries?"""
    return group["rank"] is not None or group["directions"] is not None


def protects(group: dict[str, Any]) -> bool:
    """Is there anywhere that the update of this group's weights must not go?"""
    constraint = group.get("constraint")
    return constraint is not None and not constraint.empty or group.get("directions") is not None


def closed_share(group: dict[str, Any], shape: torch.Size) -> float:
    """The share of both sides' directions that is closed to a weight of this shape as stored, at most 1; 1 for a mask."""
    constraint, directions = group.get("constraint"), group.get("directions") or (None, None)
    sides = () if constraint is None else (constraint.outputs, constraint.inputs)
    closed = [V.shape[1] / side for V, side in zip(sides, shape, strict=False) if V is not None]
    closed += [1 - B.shape[1] / side for B, side in zip(directions, shape, strict=True) if B is not None] if len(shape) == 2 else []
    return min(1.0, sum(closed)) if closed else 1.0


def forbidden_norm(group: dict[str, Any], D: Tensor) -> float:
    """||the part of D that must not be there|| of a change D of the weight as stored: what the constraint forbids, and all outside given directions. In D's precision."""
    inner, rows = D, group.get("rows", ALONE)
    P, Q = (None if B is None else B.to(D) for B in group.get("directions") or (None, None))
    inner = inner if Q is None else product(product(inner, Q), Q.mT)
    inner = inner if P is None else product(P, rows.sum(product(P.mT, inner)))
    constraint = group.get("constraint")
    inside = 0.0 if constraint is None else constraint.to(D.device, D.dtype).forbidden_norm(inner)
    return (float(rows.norm((D - inner).double())) ** 2 + inside**2) ** 0.5


def check_directions(group: dict[str, Any], shape: torch.Size) -> None:
    """Raise ValueError unless the group's given P (out, p) and Q (in, q) fit a weight of this (out, in) shape and what its constraint protects."""
    P, Q = group["directions"]
    constraint = group["constraint"]
    if group["rank"] is not None or P is None and Q is None:
        raise ValueError("SubspaceAdamW: directions are a pair (P, Q) of bases, of which one may be None, and take the place of a rank")
    if constraint is not None and (constraint.mask is not None or constraint.forbid == "both"):
        raise ValueError("SubspaceAdamW: directions go with a constraint that protects whole sides; a mask or forbid='both' needs the dense form")
    for B, side, axis in ((P, "outputs", 0), (Q, "inputs", 1)):
        if B is None:
            continue
        if B.ndim != 2 or len(shape) != 2 or B.shape[0] != shape[axis]:
            raise ValueError(f"SubspaceAdamW: directions of the {side} of shape {tuple(B.shape)} for a weight of shape {tuple(shape)} (out, in)")
        if is_fake(B):
            continue
        V = None if constraint is None else getattr(constraint, side)
        if B.shape[1] and not float((product(B.mT, B) - torch.eye(B.shape[1], dtype=B.dtype, device=B.device)).abs().max()) < 1e-4:
            raise ValueError(f"SubspaceAdamW: the directions of the {side} are not orthonormal; pass them through forgetless.subspace.orthonormalize")
        if _width(V) and B.shape[1] and not float(product(B.mT, V.to(B)).abs().max()) < 1e-4:
            raise ValueError(f"SubspaceAdamW: the directions of the {side} are not orthogonal to what the constraint protects there")


def covers(group: dict[str, Any]) -> bool:
    """Is every step in these coordinates permitted by construction? If not, the dense update has to be projected."""
    constraint = group["constraint"]
    if constraint is None or constraint.empty or group["directions"] is not None:
        return True
    if constraint.mask is not None or constraint.forbid == "both":
        return False
    return _width(constraint.inputs) + _width(constraint.outputs) == sum(map(_width, protected(group)))


def restrict_whole_side_(group: dict[str, Any], R: Tensor) -> Tensor:
    """R in given directions becomes its permitted part, in place: a side that stays whole is kept off what is protected there."""
    (P, Q), constraint = group["directions"], group["constraint"]
    if constraint is not None and Q is None:
        project_out_(R, constraint.inputs)
    if constraint is not None and P is None:
        project_out_(R.mT, constraint.outputs, constraint.rows)
    return R


def sizes(group: dict[str, Any], shape: torch.Size) -> tuple[int, int, int]:
    """(m, n, r) for a weight of this shape: r directions, fewer where less is left of a side."""
    m, n = shape[::-1] if flipped(group) else shape
    U, V = protected(group)
    return m, n, min(group["rank"], m - _width(U), n - _width(V))


def numbers(group: dict[str, Any], shape: torch.Size) -> int:
    """Numbers in R for a weight of this shape."""
    if group["directions"] is not None:
        m, n = (side if B is None else B.shape[1] for B, side in zip(group["directions"], shape, strict=True))
        return m * n
    m, _, r = sizes(group, shape)
    return r * (r if group["side"] == "both" else m)


def chosen_numbers(group: dict[str, Any], shape: torch.Size) -> int:
    """Numbers in the bases that are chosen for a weight of this shape: those of them that are here."""
    if group["directions"] is not None:
        return 0
    (m, n, r), (rows, columns) = sizes(group, shape), spread(group)
    return columns.held(n * r) + (rows.held(m * r) if group["side"] == "both" else 0)


def _width(V: Tensor | None) -> int:
    return 0 if V is None else V.shape[1]


def due(group: dict[str, Any], state: dict[str, Any], index: int) -> bool:
    """Are directions to be chosen anew for the next step of the weight with this place among all?"""
    turn = int(state.get("updates", 0)) + (index if group["stagger"] else 0)
    return turn % group["refresh_gap"] == 0 or "basis" not in state


def gradient(
    group: dict[str, Any],
    state: dict[str, Any],
    G: Tensor,
    seed: int,
    index: int,
    refresh: bool = True,
    chosen: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor | None:
    """R (m, r) or (r, r) of the gradient G, after a new choice of directions where one is due, unless `refresh` is False; chosen(G, R) is called after one. None:
    no gradient yet, or nothing is permitted. R is linear in G but for that choice; `cleaned` comes after the sum over micro-batches."""
    if group["directions"] is not None:
        R = in_directions(group, G)
        return restrict_whole_side_(group, R) if spread_state(group, "exp_avg").shape(R).numel() else None  # the same in every process
    times = coarse_product if group["projection"] == "bf16" else product
    anew = refresh and due(group, state, index) and choose(group, state, G, (seed, index, int(state.get("updates", 0))))
    if "basis" not in state:
        return None
    if group["side"] != "both":
        R = spread(group)[1].sum(times(read(group, G), state["basis"]))
    else:
        permitted = G if covers(group) else group["constraint"].permitted(G)
        R = group.get("rows", ALONE).sum(state["basis_left"].mT @ times(read(group, permitted), state["basis"]))
    if anew and chosen is not None:
        chosen(G, R)
    return R


def best_energy(group: dict[str, Any], G: Tensor) -> Tensor:
    """||R||^2 if the directions were the best for G, its strongest permitted ones, as eight iterations from four times as many find them."""
    U, V = protected(group)
    rows, columns = spread(group)
    m, n, r = sizes(group, group.get("rows", ALONE).shape(G))
    A, off = (read(group, G), V) if U is None and covers(group) else (read(group, group["constraint"].permitted(G)), None)
    start = _start(A, n, 4 * r, off, seeded(0), columns)
    return top_subspace(A, r, "power", start=start, iterations=8, off=off, rows=rows, columns=columns).energy.sum()


def _start(A: Tensor, n: int, count: int, off: Tensor | None, generator: torch.Generator, columns: Rows) -> Tensor:
    """Own rows of (n, count) random directions, off `off`, for subspace iteration on A (m, n)."""
    start = columns.own(torch.randn(n, min(count, n), generator=generator, dtype=torch.float32)).to(A.device, A.dtype)
    return less(start, off, columns)


def sent(group: dict[str, Any], shape: torch.Size, processes: int) -> tuple[Sent, Sent]:
    """(what one of `processes` that hold the rows of a weight of this shape sends in a step that chooses directions, in another), in fp32 and but for norms.

    Found by doing on made-up numbers, with what that process would hold, all of a step that exchanges thin matrices; the group's bases need only have shapes. As on a CPU:
    elsewhere what is closed on a side that is spread is taken off twice.
    """
    constraint, share = group["constraint"], 1 - 1 / processes
    if constraint is None and not reduced(group):
        return Sent(), Sent()
    own = of_rows(group | {"constraint": _zeros_like(constraint)}, Spread(shape[0], Imagined(processes)))
    G = torch.randn(own["rows"].held(shape.numel()) // shape[1:].numel(), *shape[1:], generator=seeded(0))
    # is the update held to the constraint once it has the weight's shape?
    dense = constraint is not None and (not reduced(group) or bool(group["weight_decay"]) or not covers(group))

    def restricted() -> None:
        if dense:
            own["constraint"].restrict_(G)

    with counting() as other:
        restricted()
        if constraint is not None and not reduced(group):
            restricted()  # the gradient
        if group["directions"] is not None and group["directions"][0] is None and constraint is not None:
            R = torch.randn(len(G), numbers(group, shape) // shape[0], generator=seeded(0))
            for _ in range(2):  # of the gradient, of the update
                restrict_whole_side_(own, R)
    if group["directions"] is not None and group["directions"][0] is not None:  # R is summed and shared out; what Adam makes of it is gathered
        rows = group["directions"][0].shape[1]
        padded = numbers(group, shape) // max(rows, 1) * -(-rows // processes) * processes
        other.numbers, other.exchanges = other.numbers + 2 * share * padded, other.exchanges + 2
    if group["rank"] is None:
        return other, other
    gathers, state = group["refresh"] in ("exact", "svd"), {}
    own = own | {"refresh": "cold"} if gathers else own
    R = gradient(own, state, G, 0, 0)
    if R is None:  # nothing is left to choose from
        return Sent(), Sent()
    moments.write(state, (torch.zeros_like(R), torch.zeros_like(R)), "fp32")
    state |= {"updates": torch.tensor(group["refresh_gap"]), "step": torch.zeros(())}
    with counting() as chosen:
        gradient(own, state, G, 0, 0)
        restricted()
    with counting() as plain:
        gradient(own, state, G, 0, 0, refresh=False)
    other = Sent(other.numbers + plain.numbers, other.exchanges + plain.exchanges)
    return Sent(other.numbers + share * shape.numel(), other.exchanges + 1) if gathers else chosen, other


def _zeros_like(constraint: Constraint | None) -> Constraint | None:
    """A constraint whose bases have the same shapes and forbid nothing."""
    if constraint is None:
        return None
    made = object.__new__(Constraint)
    made.forbid, made.mask = constraint.forbid, None if constraint.mask is None else torch.ones(1, 1, dtype=torch.bool).expand(constraint.mask.shape)
    made.inputs, made.outputs = (None if V is None else torch.zeros(1, 1).expand(V.shape) for V in (constraint.inputs, constraint.outputs))
    return made


def cleaned(group: dict[str, Any], R: Tensor) -> Tensor:
    """R without what is round-off in it: in its own singular directions a gradient is diagonal, and Adam, which divides by the rest, would make whole steps of it."""
    return R if group["rank"] is None or group["side"] != "both" else R * (R.abs() > tolerance(R.dtype) * R.abs().max())


def in_directions(group: dict[str, Any], G: Tensor) -> Tensor:
    """P^T G Q in the group's given directions; a side without them stays whole, and may still hold what is protected there."""
    P, Q = group["directions"]
    R = G if Q is None else product(G, Q)
    return (R if P is None else spread_state(group, "exp_avg").share(product(P.mT, R))).contiguous()


def choose(group: dict[str, Any], state: dict[str, Any], G: Tensor, seeds: tuple[int, int, int]) -> bool:
    """Choose Q, and P, for the gradient G and carry the moments over: orthonormal and orthogonal to what is protected, whatever the rank of G. False where G, which
    may be zero, no number, or wholly protected, gives none."""
    U, V = protected(group)
    whole, (rows, columns) = group.get("rows", ALONE), spread(group)
    _, n, r = sizes(group, whole.shape(G))
    scale = whole.norm(G)
    if r < 1 or not 0 < float(scale) < math.inf:
        return False
    both = group["side"] == "both" and group["constraint"] is not None
    A = read(group, group["constraint"].permitted(G) if both else G)  # (m, n)
    old = state.get("basis")
    if group["refresh"] in ("svd", "exact"):
        found = top_subspace(A, r, "svd" if group["refresh"] == "svd" else "gram", off=None if both else V, rows=rows, columns=columns)
        found.basis = renewed(found.basis, V, columns) if found.rank else found.basis
    elif group["refresh"] == "warm" and old is not None and old.shape[1] == r:
        found = top_subspace(A, r, "power", start=old, iterations=1, off=V, rows=rows, columns=columns)
    else:
        # seeded by tensor and step, so that a resumed run draws the same numbers without saving a generator
        start = _start(A, n, 2 * r, V, seeded(*seeds), columns)
        found = top_subspace(A, r, "power", start=start, off=V, rows=rows, columns=columns)
    if not found.energy.sum().sqrt() > tolerance(A.dtype) * scale:
        return False  # the whole gradient lies in the protected space
    Q = found.basis
    # (m, r): A Q = P diag(sigma) for singular directions Q
    P = orthonormalize(columns.sum(A @ Q), against=U, rows=rows) if group["side"] == "both" else None
    if Q.shape[1] == 0 or P is not None and P.shape[1] == 0:
        return False
    if old is not None and moments.NAMES[0] in state:
        _carry_moments(group, state, P, Q)
    state["basis"] = Q
    if P is not None:
        state["basis_left"] = P
    return True


def _carry_moments(group: dict[str, Any], state: dict[str, Any], P: Tensor | None, Q: Tensor) -> None:
    """From the directions in `state` to P and Q: M <- (P_old^T P)^T M (Q_old^T Q), the second moments likewise (rotate_moments), on columns, then on rows."""
    M, v = moments.read(state)
    rows, columns = spread(group)
    shape = (M.shape[0] if P is None else P.shape[1], Q.shape[1])
    if group["moments"] == "rotate":
        M, v = rotate_moments(M, v, state["basis"], Q, columns)
        if P is not None:
            M, v = (t.mT.contiguous() for t in rotate_moments(M.mT, v.mT, state["basis_left"], P, rows))
    elif group["moments"] == "reset" or M.shape != shape:  # "keep" has nothing to keep when the rank changed
        M, v = M.new_zeros(shape), v.new_zeros(shape)
        state["step"] = torch.zeros_like(state["step"])
    moments.write(state, (M, v), group["optimizer_state"])


def factors(group: dict[str, Any], state: dict[str, Any], delta: Tensor) -> tuple[Tensor, Tensor]:
    """Two thin factors L, K with dW = L K in the weight's shape, for a step delta (m, r) or (r, r) in the coordinates."""
    if group["directions"] is not None:
        P, Q = group["directions"]
        delta = delta if P is None else spread_state(group, "exp_avg").whole(delta)
        return (P, delta) if Q is None else (delta if P is None else product(P, delta), Q.mT)
    left, Q = delta if group["side"] != "both" else state["basis_left"] @ delta, state["basis"]
    return (Q, left.mT) if flipped(group) else (left, Q.mT)


def leak(group: dict[str, Any], state: dict[str, Any], delta: Tensor) -> float:
    """||forbidden part|| / ||update|| of a step delta (m, r) or (r, r), through the small products. Only where `covers(group)`."""
    rows, columns = (group.get("rows", ALONE), ALONE) if group["directions"] is not None else spread(group)
    of_R = spread_state(group, "exp_avg")
    delta = delta.double()
    norm = float(of_R.norm(delta))  # = ||dW||: P and Q are orthonormal
    if norm == 0:
        return 0.0
    if group["directions"] is not None:
        (P, Q), constraint = group["directions"], group["constraint"]
        if P is not None:
            delta, of_R = of_R.whole(delta), ALONE
        U, V = (None, None) if constraint is None else (constraint.outputs, constraint.inputs)
        left = 0.0 if P is None or _width(U) else float((delta.mT @ _defect(P, rows)).norm())
        strays = [left, 0.0 if Q is None or _width(V) else float(of_R.norm(delta @ _defect(Q, columns)))]
    else:
        (U, V), P, Q, strays = protected(group), state.get("basis_left"), state["basis"], []
    right = float(of_R.norm(delta @ (V.double() if Q is None else columns.sum(Q.mT.double() @ V.double())))) if _width(V) else 0.0
    left = 0.0
    if _width(U):
        seen = rows.sum(U.mT.double() @ delta) if P is None else rows.sum(U.mT.double() @ P.double()) @ delta
        left = float(seen.norm())
    return sum(x**2 for x in (right, left, *strays)) ** 0.5 / norm


def _defect(B: Tensor, rows: Rows) -> Tensor:
    """B^T B - I: how far B B^T is from a projection onto span(B)."""
    B = B.double()
    return rows.sum(B.mT @ B) - torch.eye(B.shape[1], dtype=B.dtype, device=B.device)

"""Subspaces and constraints: the linear algebra every method stands on. Pure functions, no state, nothing of a model.

Convention: a weight is W (out x in), y = W x. A subspace of the input side is an orthonormal basis V (in x k); a set of
gradients is a matrix whose ROWS live in that space, so G (out x in) has its input-side energy in ||G V||^2. GORP's space S
(arXiv 2507.02503, eq. 5-8), OSFT's U_h and V_h (arXiv 2504.07097, eq. 3) and GaLore's projector are all built from these.

Of a matrix that lies spread over processes each passes its own rows, or columns, and a Rows that says so (sharding.py); every process must call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .fake import is_fake
from .products import add_product_, product
from .sharding import ALONE, Rows

TOLERANCE = 1e-5  # directions below this fraction of the largest singular value are noise in fp32
TOLERANCE_FP64 = 1e-12


def tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE_FP64 if dtype == torch.float64 else TOLERANCE


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What moments, bases and statistics of a weight of this dtype are kept in: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class Subspace:
    """A basis with an energy per direction.

    basis: (n, k), orthonormal columns. energy: (k,), >= 0, in the unit its maker chose (for GORP: share of a task's gradient
    energy, summed over tasks). k may be 0: an empty space protects nothing.
    """

    basis: Tensor
    energy: Tensor

    @classmethod
    def empty(cls, n: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Subspace:
        return cls(torch.zeros(n, 0, dtype=dtype, device=device), torch.zeros(0, dtype=dtype, device=device))

    @property
    def rank(self) -> int:
        return self.basis.shape[1]

    def to(self, *args, **kwargs) -> Subspace:
        return Subspace(self.basis.to(*args, **kwargs), self.energy.to(*args, **kwargs))


def project_out(A: Tensor, V: Tensor | None) -> Tensor:
    """A (m, n) without its part in span(V), V (n, k) orthonormal: A - (A V) V^T. Twice, because once leaves eps * ||A|| of it."""
    if V is None or V.shape[1] == 0:
        return A
    A = A - product(product(A, V), V.mT)
    return A - product(product(A, V), V.mT)


def project_out_(A: Tensor, V: Tensor | None, columns: Rows = ALONE) -> Tensor:
    """project_out in place, and with a second pass only if the first took nine tenths of A or more. columns: how A's, and V's rows, are spread.

    One pass leaves about eps ||A||, which is eps to 10 eps of what is left. ("Twice is enough", and once is where the norm holds: Giraud et al. 2005.)
    No temporary of A's size is written, which is what a step waits for where several processes share a machine's memory.
    """
    if V is None or V.shape[1] == 0:
        return A
    Y = columns.sum(product(A, V))
    # elsewhere than on a CPU the question would cost more than the answer: a wait for the device
    once = A.device.type == "cpu" and bool(torch.linalg.vector_norm(Y) ** 2 < 0.99 * columns.norm(A) ** 2)
    add_product_(A, Y, V.mT, alpha=-1)
    return A if once else add_product_(A, columns.sum(product(A, V)), V.mT, alpha=-1)


def less(Y: Tensor, V: Tensor | None, rows: Rows = ALONE) -> Tensor:
    """Y (n, l) without its part in span(V), V (n, k): Y - V V^T Y, once, which leaves eps * ||Y|| of it."""
    return Y if V is None or V.shape[1] == 0 else Y - product(V, rows.sum(product(V.mT, Y)))


def complement(V: Tensor) -> Tensor:
    """Orthonormal basis (n, n - k) of all that is orthogonal to V (n, k), orthonormal."""
    return torch.linalg.qr(V, mode="complete")[0][:, V.shape[1] :].contiguous()


def orthonormalize(A: Tensor, against: Tensor | None = None, scale: float | Tensor | None = None, rows: Rows = ALONE) -> Tensor:
    """Orthonormal basis (n, k') of span(A) within the complement of `against`; A (n, k), against (n, b) orthonormal.

    Directions weaker than tolerance * scale are dropped (scale: the largest singular value of A by default), so a rank-deficient A gives fewer columns and a
    zero A none. Without the drop and the second projection, QR fills null directions with arbitrary vectors, also inside `against` (measured: a leak of 0.38).
    """
    n = rows.shape(A)[0]
    b = 0 if against is None else against.shape[1]
    if A.shape[1] == 0 or b >= n:
        return A.new_zeros(len(A), 0)
    if is_fake(A):
        return A.new_empty(n, min(A.shape[1], n - b))
    if scale is None:
        scale = rows.norm(A)  # Frobenius: within sqrt(k) of the largest singular value, and free
    P = less(A, against, rows)
    Q, R = rows.qr(P)
    U, s, Vh = torch.linalg.svd(R)
    r = min(int((s > tolerance(A.dtype) * scale).sum()), n - b)  # a host sync; k is small
    # full rank: the orthonormal matrix nearest to P (its polar factor), so that columns keep their meaning: Adam's coordinates are not rotation-free
    Q = Q @ (U @ Vh if r == A.shape[1] else U[:, :r])
    if r and b:  # twice: with scale 0 a column may be what rounding left of one inside `against`
        Q = less(less(Q, against, rows), against, rows)
    return _qr(Q, rows) if r else Q.contiguous()


def renewed(Q: Tensor, against: Tensor | None = None, rows: Rows = ALONE) -> Tensor:
    """Q (n, k), whose columns are orthonormal and off `against` but for rounding, made so to the last digit; with fewer columns only where that was not so."""
    P = less(Q, against, rows)
    if P is not Q and bool(rows.sum(torch.linalg.vector_norm(P, dim=0) ** 2).min() < 0.25):
        return orthonormalize(Q, against, rows=rows)
    return _qr(P, rows)


def _qr(A: Tensor, rows: Rows = ALONE) -> Tensor:
    """Orthonormal factor of A (n, k), full rank, with the signs of A's columns."""
    Q, R = rows.qr(A)
    return (Q * R.diagonal().sign()).contiguous()


def top_subspace(
    A: Tensor, k: int | None = None, method: str = "gram", start: Tensor | None = None, iterations: int = 2, off: Tensor | None = None,
    rows: Rows = ALONE, columns: Rows = ALONE,
) -> Subspace:  # fmt: skip
    """The k leading right singular directions of A (m, n), or of A (I - V V^T) for V = `off`, strongest first, with energy = squared singular values.

    method: `svd` (exact), `gram` (eigh of the smaller Gram matrix in fp64: exact, several times faster), `power` (`iterations` of subspace iteration from
    `start` (n, l), l >= k, which lies off `off` already; approximate, 2 `iterations` products as thin as `start`, and `off` is taken from thin matrices only,
    from the directions found to the last digit),
    `symmetric` (A is the Gram matrix (n, n) of the rows that are meant, already off `off`).
    Directions under the tolerance are dropped, so fewer than k may come back, none for a zero A.
    rows, columns: how A is spread over processes. `power` exchanges matrices as thin as `start`; the exact methods gather A.
    """
    if method in ("svd", "gram") and (rows is not ALONE or columns is not ALONE):
        A, off = columns.whole(rows.whole(A).mT).mT, None if off is None else columns.whole(off)
        found = top_subspace(A, k, method, off=off)
        return Subspace(columns.own(found.basis).contiguous(), found.energy)
    m, n = rows.shape(A)[0], columns.shape(A.mT)[0]
    k = min(m, n) if k is None else min(k, m, n)
    # a Gram matrix squares the condition number: its small eigenvalues are noise
    floor = max(tolerance(A.dtype) ** 2, 0 if method == "svd" else 4 * max(m, n) * torch.finfo(torch.float64).eps)
    if method == "power":
        if start is None:
            raise ValueError("top_subspace(method='power') needs `start`, an (n, k) matrix to iterate from")
        return _iterated(A, k, start, iterations, off, floor, rows, columns)
    if method in ("svd", "gram"):
        A = project_out(A, off)
    if method == "svd":
        _, s, Vh = torch.linalg.svd(A, full_matrices=False)
        V, energy = Vh.mT, s**2
    elif method == "symmetric":
        lam, V = torch.linalg.eigh(A)  # in fp64 what the matrix itself was rounded to would be no better known
        V, energy = V.flip(1), lam.flip(0)
    elif method == "gram":
        D = A.double()
        if n <= m:
            lam, V = torch.linalg.eigh(D.mT @ D)
            V, energy = V.flip(1), lam.flip(0)
        else:
            lam, U = torch.linalg.eigh(D @ D.mT)
            lam, U = lam.flip(0), U.flip(1)
            V, energy = (D.mT @ U) / lam.clamp_min(torch.finfo(D.dtype).tiny).sqrt(), lam
    else:
        raise ValueError(f"top_subspace: unknown method '{method}' (svd, gram, power, symmetric)")
    V, energy = V[:, :k], energy[:k].clamp_min(0)
    V = V[:, : _above(energy, floor)]
    energy = energy[: V.shape[1]]
    if method == "gram" and n > m and V.shape[1]:
        V = torch.linalg.qr(V)[0]  # D^T U / sqrt(lam) is orthonormal only to eps * condition^2
    # clone: a slice would keep the whole factor alive, and is column-major
    return Subspace(V.to(A.dtype).contiguous().clone(), energy.to(A.dtype).clone())


def _iterated(A: Tensor, k: int, start: Tensor, iterations: int, off: Tensor | None, floor: float, rows: Rows, columns: Rows) -> Subspace:
    """top_subspace(method="power"). What it does to small matrices is most of what it costs, hence as few of them as will do."""
    Q = start
    for i in range(iterations):
        U = columns.sum(product(A, Q))  # (m, l)
        U = rows.qr(U)[0] if i == iterations - 1 else U
        Q = rows.sum(product(A.mT, U))  # (n, l)
        Q = less(Q, off, columns)  # once is enough: what is left of `off` would only be found a little less well
        Q = columns.qr(Q)[0] if i < iterations - 1 else Q
    # the right singular directions of U^T A (l, n), whose rows span what the iteration has found
    lam, P = torch.linalg.eigh(columns.sum(Q.mT @ Q).double())
    lam = lam.flip(0)[:k]
    lam = lam[: _above(lam, floor)]
    V = Q @ (P.flip(1)[:, : len(lam)] / lam.sqrt()).to(Q.dtype)
    V = renewed(V, off, columns) if len(lam) else V
    return Subspace(V, lam[: V.shape[1]].to(A.dtype))


def _above(energy: Tensor, floor: float) -> int:
    """How many of the energies, which fall, are above this share of the first."""
    return int((energy > floor * energy[:1].clamp_min(torch.finfo(energy.dtype).tiny)).sum())


def energy_rank(energies: Tensor, threshold: float, held: float = 0.0, total: float | None = None) -> int:
    """Smallest k with held + energies[:k].sum() >= threshold * total: GORP's rule, counting what the space already holds.

    energies: (p,), descending. total: all energy there is (default: held + energies.sum()). At least 1 when nothing is held and there is energy.

    >>> energy_rank(torch.tensor([6.0, 3.0, 1.0]), 0.9)
    2
    """
    slack = 1 - 16 * torch.finfo(energies.dtype).eps  # what rounding takes away must not cost a direction
    energies = energies.double()
    total = float(held + energies.sum()) if total is None else float(total)
    if total <= 0 or held >= threshold * total * slack:
        return 0
    reached = held + torch.cumsum(energies, 0) >= threshold * total * slack
    return int(reached.to(torch.int8).argmax()) + 1 if bool(reached.any()) else int((energies > 0).sum())


def extend(
    space: Subspace, A: Tensor, energy: float, max_rank: int | None = None, total: float | None = None, gram: bool = False
) -> tuple[Subspace, int]:
    """Grow `space` until it holds the share `energy` of the rows of A (m, n); returns the new space and how many directions max_rank evicted.

    M' = A - A S S^T, its leading right singular directions are appended (GORP eq. 7-8), orthonormalised twice. Energies are shares of this
    call's total (||A||^2, or `total` where A is a sketch that misses some), added to what each direction already had: max_rank keeps the strongest.
    gram: `A` is not the rows, but their A^T A (n, n).
    """
    V = space.basis
    if total is None:
        total = A.diagonal().double().sum() if gram else (A.double() ** 2).sum()
    total = float(total)
    if total <= 0:
        return space, 0
    inside = (V * (A @ V)).double().sum(0).clamp_min(0) if gram else ((A @ V).double() ** 2).sum(0)  # (k,)
    rest = Subspace.empty(A.shape[1], A.dtype, A.device)
    if space.rank < A.shape[1]:
        M = project_out(project_out(A, V).mT, V) if gram else project_out(A, V)
        rest = top_subspace(M, min(A.shape[0], A.shape[1] - space.rank), "symmetric" if gram else "gram")
    k = energy_rank(rest.energy, energy, held=float(inside.sum()), total=total)
    new = orthonormalize(rest.basis[:, :k], against=V, scale=1.0)
    k = new.shape[1]
    basis = torch.cat([V, new], 1)
    weights = torch.cat([space.energy.double() + inside / total, rest.energy[:k].double() / total])
    evicted = 0
    if max_rank is not None and basis.shape[1] > max_rank:
        # S diag(sqrt e) has orthogonal columns, so truncating its SVD is keeping the columns of largest e
        keep = weights.argsort(descending=True, stable=True)[:max_rank].sort().values
        evicted = basis.shape[1] - max_rank
        basis, weights = basis[:, keep], weights[keep]
    return Subspace(basis.contiguous().clone(), weights.to(A.dtype)), evicted


def rotate_moments(M: Tensor, v: Tensor, Q_old: Tensor, Q_new: Tensor, columns: Rows = ALONE) -> tuple[Tensor, Tensor]:
    """Adam's moments (out, r_old) carried from basis Q_old (n, r_old) to Q_new (n, r_new): O = Q_old^T Q_new. columns: how the rows of both bases are spread.

    M <- M O. v <- v (O o O) + rowmean(v) (1 - column sums of O o O): a direction new to the basis gets the row's mean second moment; with v = 0 there its
    first steps would be 2-6 times too long.
    """
    O = columns.sum(Q_old.mT @ Q_new)  # (r_old, r_new)
    O2 = O * O
    fresh = (1 - O2.sum(0)).clamp(0, 1)  # (r_new,)
    return (M @ O).contiguous(), (v @ O2 + v.mean(1, keepdim=True) * fresh).contiguous()


def coverage(X: Tensor, V: Tensor) -> float:
    """Share of the energy of the inputs X (tokens, in) that lies in the protected span(V): ||X V||^2 / ||X||^2; 0 for X = 0."""
    energy = float((X.double() ** 2).sum())
    return float(((X @ V).double() ** 2).sum()) / energy if energy > 0 else 0.0


def spectrum(W: Tensor, k: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The k leading singular directions of W (out, in), all R = min(out, in) by default: U (out, k), S (k,) descending, V (in, k), W = U diag(S) V^T.

    By eigh of the smaller Gram matrix. Both bases are orthonormal whatever the rank of W: directions of a zero singular
    value are arbitrary ones that complete the basis. fp64 for fp64, else fp32.
    """
    W = W.detach().to(working_dtype(W.dtype))
    tall = W.shape[0] >= W.shape[1]
    k = min(W.shape) if k is None else min(k, *W.shape)
    E = _small_side(W, k)[1][:, :k]
    # A E = Q diag(S) but for rounding; QR, because A E / S is orthonormal only where S is large
    Q, T = torch.linalg.qr((W if tall else W.mT).to(E.dtype) @ E)
    S, order = T.diagonal().abs().sort(descending=True, stable=True)
    Q = Q * torch.where(T.diagonal() < 0, -1, 1)
    U, V = (Q, E) if tall else (E, Q)
    return U[:, order].to(W.dtype).contiguous(), S.to(W.dtype), V[:, order].to(W.dtype).contiguous()


def split(W: Tensor, k: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """W (out, in) cut at its k-th singular direction, 0 <= k < R = min(out, in): U_high (out, k), U_low (out, R - k), V_high (in, k), V_low (in, R - k).

    high: the k leading singular directions, strongest first. low: an orthonormal basis of the rest of that side's space: the other singular directions,
    strongest first, on the smaller side (on V of a square W), arbitrary ones on U of a square W, and None on the longer side of any other, where the rest is
    more than R - k directions. [high low] is orthonormal whatever the rank of W, and W V_low lies off U_high but for rounding. fp64 for fp64, else fp32.

    Faster than `spectrum` and than an SVD, because only the cut has to be right: V_high captures all but SHUFFLED of the energy ||W V||^2 that k directions can.

    >>> U_high, U_low, V_high, V_low = split(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 1)
    >>> V_high.abs().mT, U_low.shape
    (tensor([[0., 1., 0.]]), torch.Size([3, 2]))
    """
    W = W.detach().to(working_dtype(W.dtype))
    R, tall, square = min(W.shape), W.shape[0] >= W.shape[1], W.shape[0] == W.shape[1]
    if not 0 <= k < R:
        raise ValueError(f"split: {k} directions of a matrix {tuple(W.shape)}, which has {R}; give 0 <= k < {R}")
    for dtype in dict.fromkeys((W.dtype, torch.float64)):
        A = (W if tall else W.mT).to(dtype)  # (m, R)
        energy, E = torch.linalg.eigh(_gram(A))
        energy, E = energy.flip(0).clamp_min(0), E.flip(1)
        noise = 4 * torch.finfo(dtype).eps * energy[0]  # of an eigenvalue: what the Gram matrix and eigh round away
        # a leading direction this close to the first low one may have changed places with it
        if noise * (energy[:k] < energy[k] + noise).sum() <= SHUFFLED * energy[:k].sum():
            break
    X, low = product(A, E[:, :k]), None
    if square:  # singular directions on this side too, A E_low made orthonormal off high, took a sixth more time for the whole
        high, low = _completed(X)
    elif bool((16 * energy[:k] <= energy[0]).any()):
        high = _nearest_orthonormal(X)
    else:  # columns of A E are orthogonal to noise / energy: here as good as E's own, and to be scaled only
        high = X / torch.linalg.vector_norm(X, dim=0, dtype=torch.float64).to(dtype)
    sides = [B if B is None else B.to(W.dtype).contiguous() for B in (high, low, E[:, :k], E[:, k:])]
    return tuple(sides if tall else sides[2:] + sides[:2])


# of the leading directions' energy, what `split` may lose to rounding before it goes to fp64. In fp32 it loses 1e-12 to 1e-8 on a language model's weights,
# 1e-7 where the cut is at a thousandth of the largest singular value, and at worst (one strong direction, all others alike) 4e-6
SHUFFLED = 1e-6


def _gram(A: Tensor) -> Tensor:
    """The lower triangle of A^T A (n, n), A (m, n), which is all that eigh reads; above it are numbers without meaning. Five eighths of the whole product."""
    n = A.shape[1]
    rows = A.mT.contiguous()
    G = A.new_zeros(n, n)
    step = -(-n // 4)
    for i in range(0, n, step):
        G[i : i + step, : i + step] = product(rows[i : i + step], rows[: i + step].mT)
    return G


def _completed(X: Tensor) -> tuple[Tensor, Tensor]:
    """Q (m, k) of a QR of X (m, k), k <= m, and an orthonormal basis (m, m - k) of all that is orthogonal to it.

    The product of the k reflections as I - Y T Y^T (Schreiber and Van Loan 1989), with T^-1 = the upper triangle of Y^T Y, and 1 / tau on its diagonal (Puglisi
    1992): products of large matrices, where LAPACK goes through the reflections in small blocks.
    """
    m, k = X.shape
    H, tau = torch.geqrf(X)
    if k == 0 or not bool((tau != 0).all()):  # a column with nothing below its diagonal is reflected by nothing
        return torch.linalg.qr(X, mode="complete")[0].tensor_split((k,), dim=1)
    Y = H.tril(-1)
    Y.diagonal().fill_(1)
    inverse = product(Y.mT, Y).triu(1)
    inverse.diagonal().copy_(1 / tau)
    Q = product(Y, torch.linalg.solve_triangular(inverse, Y.mT, upper=True)).neg_()
    Q.diagonal().add_(1)
    return Q.tensor_split((k,), dim=1)


def _nearest_orthonormal(X: Tensor) -> Tensor:
    """Orthonormal basis (m, k) of span(X), X (m, k) with columns orthogonal but for rounding; arbitrary directions complete it where X has less rank.

    The nearest one, X (X^T X)^(-1/2), by its power series: three products, half the time of a QR of many rows. QR where rounding is not small.
    """
    Y = X / torch.linalg.vector_norm(X, dim=0)
    G = _gram(Y)
    D = G.tril() + G.tril(-1).mT
    D.diagonal().sub_(1)
    # the series' next term is 5/16 D^3; a zero column makes D no number, and the comparison false
    if torch.linalg.matrix_norm(D) < torch.finfo(X.dtype).eps ** (1 / 3):
        return add_product_(Y.clone(), Y, add_product_(D.clone(), D, D, alpha=-0.75), alpha=-0.5)
    return torch.linalg.qr(X)[0]


def without_lowest(W: Tensor, count: int) -> tuple[Tensor, float]:
    """W (out, in) without its `count` weakest singular directions, and the share of ||W||^2 that they held. Only the smaller side is decomposed."""
    W = W.detach().to(working_dtype(W.dtype))
    tall, R = W.shape[0] >= W.shape[1], min(W.shape)
    energy, E = _small_side(W, R)
    low = E[:, R - count :].to(W.dtype)
    rest = project_out(W, low) if tall else project_out(W.mT, low).mT
    return rest.contiguous(), float(energy[R - count :].sum() / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny))


# below this share of the largest eigenvalue a Gram matrix of the dtype tells directions apart no longer: it squares the condition number
RESOLVED = {torch.float32: 1e-3, torch.float64: 1e-6}


def _small_side(W: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Squared singular values (R,) of W (out, in), descending, and the singular directions (R, R) of its smaller side; precise enough for the first k.

    An fp32 W whose k-th direction is too weak for fp32 is done in fp64, which resolves whatever fp32 can hold; an fp64 one then by an SVD.
    """
    A = W if W.shape[0] >= W.shape[1] else W.mT  # (m, R)
    for dtype in dict.fromkeys((W.dtype, torch.float64)):
        D = A.to(dtype)
        energy, E = torch.linalg.eigh(D.mT @ D)
        energy, E = energy.flip(0).clamp_min(0), E.flip(1)
        if energy[k - 1] >= RESOLVED[dtype] * energy[0] or dtype != W.dtype:
            return energy, E
    _, S, Vh = torch.linalg.svd(A, full_matrices=False)
    return S**2, Vh.mT


def _basis(space: Tensor | Subspace | None, name: str) -> Tensor | None:
    if space is None:
        return None
    V = space.basis if isinstance(space, Subspace) else space
    if V.ndim != 2:
        raise ValueError(f"Constraint({name}=...): a basis is a matrix (dimension, directions), got shape {tuple(V.shape)}")
    if V.shape[1] > V.shape[0]:
        raise ValueError(
            f"Constraint({name}=...): {V.shape[1]} directions cannot be orthonormal in {V.shape[0]} dimensions; is the basis transposed?"
        )
    if is_fake(V):
        return V
    if V.shape[1]:
        error = float((V.mT.double() @ V.double() - torch.eye(V.shape[1], dtype=torch.float64, device=V.device)).abs().max())
        if not error < 1e-4:
            raise ValueError(
                f"Constraint({name}=...): columns are not orthonormal (max |V^T V - I| = {error:.1e}); pass them through forgetless.subspace.orthonormalize"
            )
    V = orthonormalize(V.detach(), scale=0.0) if V.shape[1] and error > 1e-5 else V.detach()
    # one direction counts as contiguous with any stride, and the last bit of a product may depend on it: a reload from disk would change it
    return V if V.stride() == (V.shape[1], 1) else V.clone(memory_format=torch.contiguous_format)


def _version(V: Tensor | None) -> int:
    """A count that rises where V is written to; of no tensor, and in inference mode, nothing counts."""
    return 0 if V is None or V.is_inference() else V._version


def _rest(V: Tensor | None) -> Tensor | None:
    """Basis (n, n - k) of what lies off V (n, k), where that is the smaller."""
    if V is None or 2 * V.shape[1] <= V.shape[0] or V.shape[1] == V.shape[0]:
        return None
    return V.new_empty(V.shape[0], V.shape[0] - V.shape[1]) if is_fake(V) else complement(V)


class Constraint:
    """Where the change dW (out, in) of a weight may NOT go.

    inputs: V (in, b) or Subspace: dW V = 0, so inputs in span(V) see no change. outputs: U (out, a): U^T dW = 0. forbid "either" (default): both of these;
    "both": only the block U U^T dW V V^T is removed (OSFT as its paper states it). mask: boolean (out, in), True where the weight may change; not with a basis,
    since projecting onto one breaks the other. Raises ValueError for shapes or combinations that mean nothing.
    """

    rows: Rows = ALONE  # how those of dW are spread over processes
    open: tuple[Tensor | None, Tensor | None] = (None, None)  # of inputs and outputs, a basis of what is not closed, where prepare() has made one
    made_of: tuple[tuple[Tensor | None, int], ...] = ((None, 0), (None, 0))  # what these two were made of

    def __init__(
        self, inputs: Tensor | Subspace | None = None, outputs: Tensor | Subspace | None = None, forbid: str = "either", mask: Tensor | None = None
    ):
        self.inputs, self.outputs, self.forbid, self.mask = _basis(inputs, "inputs"), _basis(outputs, "outputs"), forbid, mask
        if forbid not in ("either", "both"):
            raise ValueError(f"Constraint(forbid={forbid!r}): 'either' or 'both'")
        if forbid == "both" and (self.inputs is None or self.outputs is None):
            raise ValueError("Constraint(forbid='both') removes the block inputs x outputs: give both bases")
        if mask is not None and (self.inputs is not None or self.outputs is not None):
            raise ValueError("Constraint: a mask and a basis cannot both be honoured; give one")
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError(f"Constraint(mask=...): boolean, True where the weight may change; got {mask.dtype}")

    def prepare(self, outputs: bool = True) -> None:
        """For who restricts again and again: of a side of which more than half is closed, make a basis of the rest, which is smaller, and project onto it from now on.

        That is less work the more is closed, and leaves no more behind: a part inside the rest is never the small difference of two large ones. Once `inputs` or
        `outputs` is another tensor, or other numbers, its rest is used no more. outputs: False where dW's rows are spread over processes, which have no use for theirs.
        """
        if self.mask is None and self.forbid == "either":
            sides = (self.inputs, self.outputs if outputs else None)
            self.open, self.made_of = tuple(map(_rest, sides)), tuple((B, _version(B)) for B in sides)

    def check(self, shape: torch.Size) -> None:
        """Raise ValueError unless the constraint fits a weight of this (out, in) shape."""
        for V, axis, name in ((self.inputs, 1, "inputs"), (self.outputs, 0, "outputs")):
            if V is not None and (len(shape) != 2 or V.shape[0] != shape[axis]):
                raise ValueError(f"Constraint({name}=...): basis of dimension {V.shape[0]} for a weight of shape {tuple(shape)} (out, in)")
        if self.mask is not None and self.mask.shape != shape:
            raise ValueError(f"Constraint(mask=...): shape {tuple(self.mask.shape)} for a weight of shape {tuple(shape)}")

    @property
    def empty(self) -> bool:
        return self.mask is None and all(V is None or V.shape[1] == 0 for V in (self.inputs, self.outputs))

    @property
    def full(self) -> bool:
        """Is nothing permitted? (What a projection leaves then is rounding, which Adam would divide by itself.)"""
        sides = ((self.inputs, ALONE), (self.outputs, self.rows))
        full = [V is not None and V.shape[1] == rows.shape(V)[0] for V, rows in sides]
        return all(full) if self.forbid == "both" else any(full)

    def to(self, device: torch.device, dtype: torch.dtype) -> Constraint:
        """The same constraint on another device and in another dtype; itself when nothing has to move."""
        tensors = [t for t in (self.inputs, self.outputs) if t is not None]
        if all(t.device == device and t.dtype == dtype for t in tensors) and (self.mask is None or self.mask.device == device):
            return self
        moved = object.__new__(Constraint)
        moved.forbid, moved.mask = self.forbid, None if self.mask is None else self.mask.to(device)
        moved.inputs, moved.outputs = (None if V is None else V.to(device, dtype) for V in (self.inputs, self.outputs))
        moved.rows = self.rows
        return moved

    def spread(self, rows: Rows) -> Constraint:
        """The same constraint for who holds some rows of a weight only: its bases are views of this one's."""
        part = object.__new__(Constraint)
        part.forbid, part.inputs, part.rows, part.open, part.made_of = self.forbid, self.inputs, rows, (self.open[0], None), self.made_of
        part.outputs, part.mask = (None if t is None else rows.own(t) for t in (self.outputs, self.mask))
        return part

    @property
    def transposed(self) -> Constraint:
        """The same constraint for the weight stored as its transpose (in, out): inputs and outputs change places."""
        turned = object.__new__(Constraint)
        turned.forbid, turned.inputs, turned.outputs = self.forbid, self.outputs, self.inputs
        turned.mask = None if self.mask is None else self.mask.mT.contiguous()
        return turned

    def permitted(self, D: Tensor) -> Tensor:
        """The part of D (out, in) that may be applied."""
        return self.restrict_(D.clone())

    def restrict_(self, D: Tensor) -> Tensor:
        """D (out, in) becomes its permitted part, in place."""
        if self.mask is not None:
            return D.mul_(self.mask)
        U, V = self.outputs, self.inputs
        if self.forbid == "both":
            for _ in range(2):
                D.sub_(U @ (self.rows.sum(U.mT @ D @ V) @ V.mT))
            return D
        known = zip(self.open, self.made_of, (V, U), strict=True)
        inputs, outputs = (rest if made_of is B and version == _version(B) else None for rest, (made_of, version), B in known)
        project_out_(D, V) if inputs is None else D.copy_(product(product(D, inputs), inputs.mT))
        project_out_(D.mT, U, self.rows) if outputs is None else D.copy_(product(outputs, product(outputs.mT, D)))
        return D

    def forbidden_norm(self, D: Tensor) -> float:
        """||the part of D that must not be there||, through the small products and in D's precision: in fp32 what is below 1e-7 ||D|| is round-off."""
        if self.mask is not None:
            return float(self.rows.norm(D[~self.mask].double()))
        U, V = (None if B is None else B.to(D) for B in (self.outputs, self.inputs))
        if self.forbid == "both":
            return float(self.rows.sum(product(product(U.mT, D), V)).double().norm())
        inside = product(D, V) if V is not None and V.shape[1] else D.new_zeros(D.shape[0], 0)
        outside = D.new_zeros(0, D.shape[1])
        if U is not None and U.shape[1]:
            outside = product(U.mT, D)
            outside = outside - product(product(U.mT, inside), V.mT) if inside.shape[1] else outside
            outside = self.rows.sum(outside)
        return float(torch.stack([self.rows.norm(inside.double()), outside.double().norm()]).norm())


def leak(D: Tensor, constraint: Constraint) -> float:
    """||forbidden part of D|| / ||D|| of a change D (out, in): the invariant of this library is that it is round-off. 0 for D = 0.

    >>> round(leak(torch.eye(2), Constraint(inputs=torch.tensor([[1.0], [0.0]]))), 4)
    0.7071
    """
    norm = float(D.double().norm())
    return constraint.to(D.device, torch.float64).forbidden_norm(D.double()) / norm if norm > 0 else 0.0

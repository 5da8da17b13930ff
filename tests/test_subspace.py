"""Properties of the linear algebra, and the authors' arithmetic it is held to."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from forgetless.subspace import (
    Constraint,
    Subspace,
    coverage,
    energy_rank,
    extend,
    leak,
    orthonormalize,
    project_out,
    rotate_moments,
    spectrum,
    split,
    top_subspace,
    without_lowest,
)

GOLDEN = Path(__file__).parent / "golden" / "gorp"
EYE = {torch.float32: 2e-6, torch.float64: 1e-13}

sizes = st.integers(1, 24)
seeds = st.integers(0, 10_000)
dtypes = st.sampled_from([torch.float32, torch.float64])


def matrix(m: int, n: int, seed: int, dtype=torch.float64, rank: int | None = None, scale: float = 1.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    if rank is None:
        return scale * torch.randn(m, n, generator=g, dtype=torch.float64).to(dtype)
    return (scale * torch.randn(m, rank, generator=g, dtype=torch.float64) @ torch.randn(rank, n, generator=g, dtype=torch.float64)).to(dtype)


def basis(n: int, k: int, seed: int, dtype=torch.float64) -> torch.Tensor:
    return torch.linalg.qr(matrix(n, k, seed))[0].to(dtype).contiguous()


def assert_orthonormal(V: torch.Tensor) -> None:
    eye = torch.eye(V.shape[1], dtype=torch.float64)
    assert (V.double().mT @ V.double() - eye).abs().max().item() < EYE[V.dtype] if V.shape[1] else True
    assert V.is_contiguous()


# -- orthonormalize --------------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(n=sizes, k=sizes, b=st.integers(0, 24), rank=st.integers(0, 24), seed=seeds, dtype=dtypes, scale=st.sampled_from([1e-8, 1.0, 1e6]))
def test_orthonormalize_is_orthonormal_and_off_the_protected_space_whatever_the_rank(n, k, b, rank, seed, dtype, scale):
    V = basis(n, min(b, n), seed, dtype)
    Q = orthonormalize(matrix(n, k, seed + 1, dtype, rank=min(rank, k), scale=scale), against=V)
    assert_orthonormal(Q)
    assert Q.shape[1] <= min(rank, k, n - V.shape[1])
    if Q.shape[1] and V.shape[1]:
        assert (V.mT @ Q).abs().max().item() < EYE[dtype]


def test_orthonormalize_of_a_matrix_inside_the_protected_space_is_empty():
    V = basis(12, 4, 0)
    assert orthonormalize(V @ matrix(4, 3, 1), against=V).shape == (12, 0)


@settings(max_examples=40, deadline=None)
@given(m=sizes, n=sizes, k=sizes, seed=seeds)
def test_project_out_is_idempotent_and_linear(m, n, k, seed):
    A, V = matrix(m, n, seed), basis(n, min(k, n), seed + 1)
    P = project_out(A, V)
    torch.testing.assert_close(project_out(P, V), P)
    torch.testing.assert_close(project_out(3 * A, V), 3 * P)
    assert (P @ V).abs().max().item() < 1e-13


# -- top_subspace ----------------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(m=sizes, n=sizes, k=sizes, rank=st.integers(0, 24), seed=seeds, method=st.sampled_from(["svd", "gram"]))
def test_top_subspace_captures_the_best_energy(m, n, k, rank, seed, method):
    A = matrix(m, n, seed, rank=min(rank, m, n))
    space = top_subspace(A, k, method)
    assert_orthonormal(space.basis)
    assert space.rank <= min(k, max(0, min(rank, m, n)))
    best = (torch.linalg.svdvals(A)[:k] ** 2).sum()
    assert math.isclose(float(((A @ space.basis) ** 2).sum()), float(best), rel_tol=1e-9, abs_tol=1e-12)
    assert bool((space.energy.diff() <= 1e-9 * space.energy[:1].sum()).all())


@settings(max_examples=25, deadline=None)
@given(m=sizes, n=sizes, seed=seeds, flip=seeds)
def test_the_subspace_does_not_depend_on_signs_or_row_order(m, n, seed, flip):
    A = matrix(m, n, seed)
    g = torch.Generator().manual_seed(flip)
    B = (A * torch.randint(0, 2, (m, 1), generator=g, dtype=torch.int64).mul(2).sub(1))[torch.randperm(m, generator=g)]
    k = max(1, min(m, n) // 2)
    P, R = (top_subspace(X, k).basis for X in (A, B))
    gap = torch.linalg.svdvals(A)
    if k < len(gap) and gap[k - 1] - gap[k] < 1e-3 * gap[0]:
        return  # without a spectral gap the subspace itself is not unique
    torch.testing.assert_close(P @ P.mT, R @ R.mT, atol=1e-7, rtol=0)


def test_power_finds_a_dominant_subspace_and_orders_it():
    U, V = basis(60, 40, 0, torch.float32), basis(40, 40, 1, torch.float32)
    A = U * torch.logspace(2, -3, 40) @ V.mT
    exact = top_subspace(A, 5, "svd")
    power = top_subspace(A, 5, "power", start=matrix(40, 10, 2, torch.float32))
    assert float(power.energy.sum() / exact.energy.sum()) > 0.999
    assert (power.energy.diff() <= 0).all()
    assert_orthonormal(power.basis)
    with pytest.raises(ValueError, match="start"):
        top_subspace(A, 5, "power")


def test_top_subspace_of_zero_is_empty_and_does_not_hold_the_factor_alive():
    assert top_subspace(torch.zeros(5, 4)).rank == 0
    V = top_subspace(matrix(30, 20, 0), 2, "svd").basis
    assert V.untyped_storage().nbytes() == V.nbytes


# -- spectrum, without_lowest ----------------------------------------------------------------------------------------------------------

CLOSE = {torch.float32: 1e-5, torch.float64: 1e-12}  # of the largest singular value


def with_spectrum(m: int, n: int, S: torch.Tensor, seed: int, dtype=torch.float64) -> torch.Tensor:
    """A matrix (m, n) of which the singular values are known."""
    R = len(S)
    return (basis(m, R, seed) * S.double() @ basis(n, R, seed + 1).mT).to(dtype)


@settings(max_examples=120, deadline=None)
@given(
    m=sizes, n=sizes, rank=st.integers(0, 24), k=st.none() | sizes, seed=seeds, dtype=dtypes, scale=st.sampled_from([1e-8, 1.0, 1e6]), low=st.integers(0, 24)
)  # fmt: skip
def test_spectrum_is_the_svd_whatever_the_rank(m, n, rank, k, seed, dtype, scale, low):
    W = matrix(m, n, seed, dtype, rank=min(rank, m, n), scale=scale)
    U, S, V = spectrum(W, k)
    true = torch.linalg.svdvals(W.double())
    kept, atol = min(k or m, m, n), CLOSE[dtype] * float(true[0])
    assert U.shape == (m, kept) and S.shape == (kept,) and V.shape == (n, kept) and U.dtype == S.dtype == V.dtype == dtype
    assert_orthonormal(U)
    assert_orthonormal(V)
    assert bool((S >= 0).all()) and bool((S.diff() <= 0).all())
    torch.testing.assert_close(S.double(), true[:kept], atol=atol, rtol=0)
    torch.testing.assert_close(W @ V, U * S, atol=8 * atol, rtol=0)
    # what is left is no more than the best approximation leaves
    left = torch.linalg.matrix_norm(W.double() - (U.double() * S.double()) @ V.double().mT)
    assert float(left) <= float(true[kept:].norm()) + 8 * atol

    count = min(low, m, n)
    rest, share = without_lowest(W, count)
    keep = min(m, n) - count
    assert rest.dtype == dtype and rest.is_contiguous()
    assert math.isclose(float((W.double() - rest.double()).norm()), float(true[keep:].norm()), rel_tol=1e-3, abs_tol=8 * atol)
    torch.testing.assert_close(torch.linalg.svdvals(rest.double())[:keep], true[:keep], atol=8 * atol, rtol=0)
    assert share == pytest.approx(float((true[keep:] ** 2).sum() / (true**2).sum().clamp_min(1e-300)), rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("shape", [(60, 60), (90, 40), (40, 90)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5, 1e6, 1e9])
def test_spectrum_of_an_ill_conditioned_matrix(shape, dtype, condition):
    """An fp32 Gram matrix would be noise below 3e-4 of the largest singular value; what fp32 itself can hold must come out."""
    true = torch.logspace(0, -math.log10(condition), min(shape), dtype=torch.float64)
    W = with_spectrum(*shape, true, 0, dtype)
    U, S, V = spectrum(W)
    assert_orthonormal(U)
    assert_orthonormal(V)
    assert float((S.double() - true).abs().max()) < CLOSE[dtype]
    torch.testing.assert_close((U * S) @ V.mT, W, atol=CLOSE[dtype], rtol=0)
    rest, _ = without_lowest(W, 20)
    assert float((W.double() - rest.double()).norm()) == pytest.approx(float(true[-20:].norm()), rel=1e-2, abs=CLOSE[dtype])
    # the directions themselves, where the dtype's own rounding of W leaves them defined
    if condition * torch.finfo(dtype).eps < 1e-3:
        gone, exact = W.double() - rest.double(), torch.linalg.svd(W.double())
        best = (exact.U[:, : min(shape)] * exact.S)[:, -20:] @ exact.Vh[: min(shape)][-20:]
        assert float((gone - best).norm()) < 0.02 * float(best.norm()) + CLOSE[dtype]


def test_gram_matrices_in_fp32_alone_would_not_do(monkeypatch):
    """Break it once: without the second precision the weakest directions are not those of W."""
    import forgetless.subspace

    true = torch.logspace(0, -5, 60, dtype=torch.float64)
    W = with_spectrum(60, 60, true, 0, torch.float32)
    monkeypatch.setattr(forgetless.subspace, "RESOLVED", {torch.float32: 0.0, torch.float64: 0.0})
    rest, _ = without_lowest(W, 10)
    assert float((W - rest).norm()) > 1.5 * float(true[-10:].norm())


def test_spectrum_of_weights_in_bf16_and_of_parameters():
    W = torch.nn.Parameter(matrix(12, 8, 0, torch.float32).bfloat16())
    U, S, V = spectrum(W)
    assert U.dtype == torch.float32 and not U.requires_grad
    torch.testing.assert_close((U * S) @ V.mT, W.detach().float(), atol=1e-5, rtol=0)
    assert not without_lowest(W, 2)[0].requires_grad


# -- split -----------------------------------------------------------------------------------------------------------------------------


def assert_split(W: torch.Tensor, k: int, lost: float | None = None) -> None:
    """Orthonormal bases of the right sizes, the leading directions but for the share `lost` of their energy, and W block diagonal in them."""
    R, dtype = min(W.shape), torch.float64 if W.dtype == torch.float64 else torch.float32
    lost = lost or {torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    U_high, U_low, V_high, V_low = split(W, k)
    for n, high, low in ((W.shape[0], U_high, U_low), (W.shape[1], V_high, V_low)):
        assert high.shape == (n, k) and (low is None) == (n > R)
        assert high.dtype == dtype and high.is_contiguous() and not high.requires_grad
        if low is not None:
            assert low.shape == (n, R - k) and low.dtype == dtype and low.is_contiguous() and not low.requires_grad
        assert_orthonormal(high if low is None else torch.cat([high, low], 1))
    D = W.detach().double()
    true = torch.linalg.svdvals(D)
    U, V = torch.linalg.qr(U_high.double())[0], torch.linalg.qr(V_high.double())[0]  # the spans, without the round-off of their lengths
    best, energy = float((true[:k] ** 2).sum()), (lambda A: float((A**2).sum()))
    assert energy(D @ V) >= (1 - lost) * best and energy(U.mT @ D) >= (1 - lost) * best
    # a Gram matrix rounds by eps S[0]^2, which beside a weak k-th direction is more than the eps S[0] that W itself is rounded by: there the energy decides
    tol = 8 * CLOSE[dtype] * float(true[0])
    if k and float(true[k - 1]) < float(true[0]) / 30:
        tol = max(tol, (lost * best) ** 0.5)
    # U_high spans W V_high, and W takes the low directions off it
    assert float((D @ V - U @ (U.mT @ D @ V)).norm()) <= tol
    if U_low is not None:
        assert float((U_low.double().mT @ D @ V).norm()) <= tol
    if V_low is not None:
        assert float((U.mT @ D @ V_low.double()).norm()) <= tol
    strength = U_low.double().mT @ D if V_low is None else (D @ V_low.double()).mT
    assert bool((strength.norm(dim=1).square().diff() <= 8 * CLOSE[dtype] * float(true[0]) ** 2).all())  # singular directions, strongest first


@settings(max_examples=120, deadline=None)
@given(
    m=sizes, n=sizes, rank=st.integers(0, 24), k=st.integers(0, 23), seed=seeds, dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    scale=st.sampled_from([1e-8, 1.0, 1e6]),
)  # fmt: skip
def test_split_cuts_at_the_leading_directions_whatever_the_rank(m, n, rank, k, seed, dtype, scale):
    W = matrix(m, n, seed, torch.float64, rank=min(rank, m, n), scale=scale).to(dtype)
    assert_split(W, min(k, min(m, n) - 1))


@pytest.mark.parametrize("shape", [(80, 80), (120, 50), (50, 120)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [1e1, 1e2, 1e4, 1e6, 1e9])
def test_split_of_an_ill_conditioned_matrix(shape, dtype, condition):
    R = min(shape)
    W = with_spectrum(*shape, torch.logspace(0, -math.log10(condition), R, dtype=torch.float64), 0, dtype)
    for k in (0, 1, R // 2, 3 * R // 4, R - 1):
        assert_split(W, k)


@pytest.mark.parametrize("shape", [(12, 12), (20, 8), (8, 20), (1, 1), (1, 5)])
def test_split_of_zero_of_ties_and_of_one_direction(shape):
    for W in (torch.zeros(shape), torch.eye(*shape), torch.ones(shape), 1e-25 * torch.eye(*shape)):
        for k in range(min(shape)):
            assert_split(W, k)


def outlier(n: int, seed: int = 0) -> torch.Tensor:
    """One direction of strength 1 and n - 1 of energy 1e-5 to 2e-5: in fp32's Gram matrix they differ by less than its rounding."""
    energy = 1e-5 * (1 + torch.linspace(1, 0, n, dtype=torch.float64))
    energy[0] = 1
    return with_spectrum(n, n, energy.sqrt(), seed, torch.float32)


def test_split_goes_to_fp64_where_fp32_does_not_tell_the_leading_directions(monkeypatch):
    import forgetless.subspace

    W = outlier(400)
    assert_split(W, 200)
    monkeypatch.setattr(forgetless.subspace, "SHUFFLED", 1.0)  # break it once
    with pytest.raises(AssertionError):
        assert_split(W, 200)
    assert_split(W, 200, lost=1e-5)  # all that was lost


def test_split_stays_in_fp32_where_that_does(monkeypatch):
    """A weight's usual spectrum: the second precision would double the time for nothing."""
    eigh = torch.linalg.eigh
    seen = []
    monkeypatch.setattr(torch.linalg, "eigh", lambda G: (seen.append(G.dtype), eigh(G))[1])
    for W in (matrix(256, 256, 0, torch.float32), matrix(300, 100, 0, torch.float32)):
        for k in (min(W.shape) // 2, 3 * min(W.shape) // 4):
            split(W, k)
    assert seen == [torch.float32] * 4


@pytest.mark.parametrize("decades", [0.4, 1.0, 2.0, 4.0])
def test_the_longer_side_is_orthonormal_by_each_of_its_ways(decades, monkeypatch):
    """By lengths alone, by the power series, by QR: the weaker the last direction, the more there is to do."""
    import forgetless.subspace

    W = with_spectrum(400, 100, torch.logspace(0, -decades, 100, dtype=torch.float64), 0, torch.float32)
    taken = []
    real, qr = forgetless.subspace._nearest_orthonormal, torch.linalg.qr
    monkeypatch.setattr(forgetless.subspace, "_nearest_orthonormal", lambda X: (taken.append("series"), real(X))[1])
    monkeypatch.setattr(torch.linalg, "qr", lambda X: (taken.append("qr"), qr(X))[1])
    split(W, 90)
    assert taken == {0.4: [], 1.0: ["series"], 2.0: ["series"], 4.0: ["series", "qr"]}[decades]
    monkeypatch.undo()
    assert_split(W, 90)


def test_the_power_series_is_round_off_up_to_where_it_is_used():
    """Two columns with a cosine of 3e-3: the series' first term alone would leave 7e-6."""
    import forgetless.subspace

    Q = basis(50, 3, 0, torch.float32)
    X = torch.stack([Q[:, 0], 3e-3 * Q[:, 0] + Q[:, 1], 1e-3 * Q[:, 2]], 1)
    Y = forgetless.subspace._nearest_orthonormal(X)
    assert_orthonormal(Y)
    assert float((Y - Q).abs().max()) < 2e-3  # the nearest: the error is shared out, where QR would leave the first column as it is
    assert float((Y[:, 0] - Q[:, 0]).norm()) == pytest.approx(1.5e-3, rel=0.01)


def test_split_refuses_what_is_no_cut():
    for k in (-1, 4, 5):
        with pytest.raises(ValueError, match="0 <= k < 4"):
            split(torch.eye(4, 6), k)


# -- energy_rank and extend ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=20),
    low=st.floats(0.01, 1.0),
    more=st.floats(0.0, 0.99),
    held=st.floats(0, 1e6),
)
def test_energy_rank_is_the_smallest_k_and_monotone(values, low, more, held):
    e = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    k = energy_rank(e, low, held=held)
    total = held + float(e.sum())
    assert 0 <= k <= len(e)
    assert energy_rank(e, min(1.0, low + more), held=held) >= k
    if total > 0:
        assert held + float(e[:k].sum()) >= low * total * (1 - 1e-9)
        assert k == 0 or held + float(e[: k - 1].sum()) < low * total
    if held == 0 and total > 0:
        assert k >= 1  # never empty when there is energy


@settings(max_examples=40, deadline=None)
@given(m=sizes, n=st.integers(2, 24), k=st.integers(0, 8), rank=st.integers(0, 24), seed=seeds, energy=st.floats(0.05, 1.0), dtype=dtypes)
def test_extend_reaches_its_energy_and_keeps_what_it_had(m, n, k, rank, seed, energy, dtype):
    old = Subspace(basis(n, min(k, n), seed, dtype), torch.ones(min(k, n), dtype=dtype))
    A = matrix(m, n, seed + 1, dtype, rank=min(rank, m, n))
    new, evicted = extend(old, A, energy)
    assert evicted == 0
    assert_orthonormal(new.basis)
    torch.testing.assert_close(new.basis[:, : old.rank], old.basis)
    assert coverage(A, new.basis) >= min(energy, 1 - 1e-5) - 1e-5 or float(A.norm()) == 0
    assert (new.energy >= 0).all() and len(new.energy) == new.rank
    again, _ = extend(new, A, energy)
    assert again.rank == new.rank  # what is held needs nothing more


def test_extend_by_a_gram_matrix_is_extend_by_its_rows():
    torch.manual_seed(0)
    A = torch.randn(300, 40) * torch.linspace(1, 0.05, 40)
    space = Subspace(torch.linalg.qr(torch.randn(40, 5))[0], torch.linspace(0.5, 0.1, 5))
    for bound in (None, 12):
        by_rows, by_gram = (extend(space, M, 0.9, max_rank=bound, gram=gram)[0] for M, gram in ((A, False), (A.T @ A, True)))
        assert by_rows.rank == by_gram.rank < 40 and by_gram.basis.dtype == torch.float32
        torch.testing.assert_close(by_gram.basis @ by_gram.basis.T, by_rows.basis @ by_rows.basis.T, atol=2e-4, rtol=0)
        torch.testing.assert_close(by_gram.energy, by_rows.energy, atol=1e-5, rtol=1e-4)
    few = torch.zeros(60, 40)
    few[:, :3] = torch.randn(60, 3)
    assert extend(Subspace.empty(40), few.T @ few, 1.0, gram=True)[0].rank == 3  # rounding gives the rest no direction
    assert extend(space, torch.zeros(40, 40), 0.9, gram=True) == (space, 0)


def test_extend_counts_energy_it_cannot_see_against_the_total():
    A = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    assert extend(Subspace.empty(3), A, 0.6)[0].rank == 1
    assert extend(Subspace.empty(3), A, 0.6, total=20.0)[0].rank == 2


def test_max_rank_evicts_the_least_energy():
    space, evicted = extend(Subspace.empty(4), torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])), 1.0, max_rank=2)
    assert (space.rank, evicted) == (2, 2)
    torch.testing.assert_close(space.basis.abs(), torch.eye(4)[:, :2])
    # a later task with energy along a direction already held makes that direction harder to evict
    space, evicted = extend(space, torch.diag(torch.tensor([0.0, 1.0, 5.0, 0.0])), 1.0, max_rank=2)
    assert evicted == 1 and coverage(torch.eye(4)[2:3], space.basis) == pytest.approx(1.0)


def test_the_authors_basis_growth():
    """The energy rule on the authors' first moments. Theirs is on the output side (M is out x k) at 0.9 and starts one vector short on the first task,
    so that a dominant first moment leaves an empty space; later tasks use the same inclusive rule as ours."""
    data = load_file(GOLDEN / "basis.safetensors")
    rows = json.loads((GOLDEN / "golden.json").read_text())["files"]["basis.safetensors"]["rows"]
    for name, _, r1, r2, acc2, r3, acc3, *_ in rows:
        M1, M2, M3, B1, B2, B3 = (data[f"{name}/{x}"] for x in ("M1", "M2", "M3", "B1", "B2", "B3"))
        ours = extend(Subspace.empty(M1.shape[0]), M1.mT, 0.9)[0]
        assert ours.rank == r1 + 1 or (ours.rank == 1 and r1 == 0)
        distinct = (torch.linalg.svdvals(M1).diff().abs() > 1e-3).all()  # among equal singular values any basis is as good
        if r1 and distinct:
            torch.testing.assert_close(torch.linalg.svdvals(ours.basis[:, :r1].mT @ B1), torch.ones(r1), atol=1e-5, rtol=0)
        for M, old, new, added, acc in ((M2, B1, B2, r2, acc2), (M3, B2, B3, r3, acc3)):
            assert coverage(M.mT, old) == pytest.approx(acc, abs=1e-5)
            grown = extend(Subspace(old.contiguous(), torch.ones(old.shape[1])), M.mT, 0.9)[0]
            assert grown.rank == old.shape[1] + added, name
            if added:
                torch.testing.assert_close(grown.basis @ grown.basis.mT, new @ new.mT, atol=2e-5, rtol=0)


# -- moments ---------------------------------------------------------------------------------------------------------------------------


def test_rotate_moments_keeps_the_update_rms_flat_across_a_change_of_basis():
    """White gradients of constant scale: v is flat, so |M| / sqrt(v) must not jump when the basis changes, whether it overlaps the old one or not."""
    g = torch.Generator().manual_seed(0)
    Q_old = basis(200, 8, 1)
    for Q_new in (basis(200, 8, 2), torch.cat([Q_old[:, :4], basis(200, 4, 3)], 1)):
        Q_new = torch.linalg.qr(Q_new)[0]
        M, v = torch.randn(500, 8, generator=g, dtype=torch.float64), torch.rand(500, 8, generator=g, dtype=torch.float64) * 0.2 + 0.9
        M2, v2 = rotate_moments(M, v, Q_old, Q_new)
        assert 0.8 < float(v2.mean() / v.mean()) < 1.2
        fresh_gradient = torch.randn(500, 8, generator=g, dtype=torch.float64)  # what the next step divides by sqrt(v2)
        assert 0.8 < float((fresh_gradient / v2.sqrt()).pow(2).mean().sqrt()) < 1.25
        plain = v @ (Q_old.mT @ Q_new) ** 2
        assert float((fresh_gradient / plain.sqrt()).pow(2).mean().sqrt()) > 1.25  # the obvious rule fails exactly here
        assert M2.shape == v2.shape == (500, 8) and (v2 > 0).all()


def test_rotate_moments_by_a_signed_permutation_is_exact():
    Q = basis(20, 5, 0)
    M, v = matrix(7, 5, 1), matrix(7, 5, 2).abs()
    order, sign = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([1.0, -1, 1, -1, -1], dtype=torch.float64)
    M2, v2 = rotate_moments(M, v, Q, Q[:, order] * sign)
    torch.testing.assert_close(M2, M[:, order] * sign)
    torch.testing.assert_close(v2, v[:, order])


# -- constraints -----------------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(2, 20),
    n=st.integers(2, 20),
    a=st.integers(0, 20),
    b=st.integers(0, 20),
    seed=seeds,
    forbid=st.sampled_from(["either", "both"]),
    prepared=st.booleans(),
    dtype=dtypes,
)
def test_permitted_is_a_projection_without_leak(m, n, a, b, seed, forbid, prepared, dtype):
    c = Constraint(inputs=basis(n, min(b, n), seed, dtype), outputs=basis(m, min(a, m), seed + 1, dtype), forbid=forbid)
    if prepared:
        c.prepare()
    D = matrix(m, n, seed + 2, dtype)
    P = c.permitted(D)
    assert c.forbidden_norm(P) <= (1e-6 if dtype == torch.float32 else 1e-14) * float(D.norm())
    torch.testing.assert_close(c.permitted(P), P, atol=1e-5 if dtype == torch.float32 else 1e-12, rtol=1e-5)
    # what is removed and what is left are orthogonal, so the norms add up
    assert float((D.double() ** 2).sum()) == pytest.approx(float((P.double() ** 2).sum()) + c.forbidden_norm(D) ** 2, rel=1e-4)


def test_leak_sees_exactly_the_forbidden_share():
    V = torch.eye(4)[:, :1]
    D = torch.zeros(3, 4)
    D[:, 0], D[:, 1] = 3.0, 4.0
    assert leak(D, Constraint(inputs=V)) == pytest.approx(0.6)
    assert leak(torch.zeros(3, 4), Constraint(inputs=V)) == 0.0
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[:, 1] = False
    assert leak(D, Constraint(mask=mask)) == pytest.approx(0.8)
    assert torch.equal(Constraint(mask=mask).permitted(D)[:, 1], torch.zeros(3))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(inputs=torch.ones(4, 2)), "not orthonormal"),
        (dict(inputs=torch.ones(2, 4)), "transposed"),
        (dict(inputs=torch.ones(4)), "matrix"),
        (dict(inputs=torch.eye(4)[:, :1], forbid="neither"), "either"),
        (dict(inputs=torch.eye(4)[:, :1], forbid="both"), "both bases"),
        (dict(inputs=torch.eye(4)[:, :1], mask=torch.ones(3, 4, dtype=torch.bool)), "cannot both"),
        (dict(mask=torch.ones(3, 4)), "boolean"),
    ],
)
def test_a_constraint_that_means_nothing_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Constraint(**kwargs)


def test_a_constraint_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 5\)"):
        Constraint(inputs=torch.eye(4)[:, :2]).check(torch.Size([3, 5]))
    with pytest.raises(ValueError, match="mask"):
        Constraint(mask=torch.ones(3, 4, dtype=torch.bool)).check(torch.Size([3, 5]))


@pytest.mark.parametrize("kind", ["inputs", "outputs", "either", "both", "mask"])
def test_the_transposed_constraint_is_the_constraint_of_the_transpose(kind):
    D = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    V, U = torch.linalg.qr(D).Q[:, :2], torch.eye(5)[:, 3:]
    c = {
        "inputs": Constraint(inputs=V), "outputs": Constraint(outputs=U), "either": Constraint(inputs=V, outputs=U),
        "both": Constraint(inputs=V, outputs=U, forbid="both"), "mask": Constraint(mask=D > 0.3),
    }[kind]  # fmt: skip
    torch.testing.assert_close(c.transposed.permitted(D.mT), c.permitted(D).mT)
    assert c.transposed.forbidden_norm(D.mT) == pytest.approx(c.forbidden_norm(D)) and c.forbidden_norm(D) > 0.1
    torch.testing.assert_close(c.transposed.transposed.permitted(D), c.permitted(D))
    c.transposed.check(torch.Size([5, 5]))


def test_coverage():
    X = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert coverage(X, torch.eye(2)[:, :1]) == pytest.approx(9 / 25)
    assert coverage(torch.zeros(2, 2), torch.eye(2)) == 0.0
    assert coverage(X, torch.zeros(2, 0)) == 0.0


@pytest.mark.parametrize("outside", [1.0, 0.2, 0.05, 1e-3])
def test_one_pass_is_enough_where_it_is_the_only_one(outside):
    """However much of a step lies in the space, what is left of it does not."""
    torch.manual_seed(0)
    V = orthonormalize(torch.randn(64, 16))
    inside = torch.randn(48, 16) @ V.mT
    rest = project_out(torch.randn(48, 64), V)
    D = inside / inside.norm() + outside * rest / rest.norm()
    c = Constraint(inputs=V)
    P = c.permitted(D)
    assert P.norm() == pytest.approx(outside, rel=1e-4) and leak(P, c) < 1e-6


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("outside", [1.0, 0.05, 1e-4])
@pytest.mark.parametrize("closed", [32, 40, 60])
def test_where_more_than_half_is_closed_a_step_is_projected_onto_the_rest(closed, outside, side):
    """The smaller basis says the same, and is as far off what is closed however little of a step is left."""
    torch.manual_seed(0)
    V = orthonormalize(torch.randn(64, closed))
    inside, rest = torch.randn(48, closed) @ V.mT, project_out(torch.randn(48, 64), V)
    D = inside / inside.norm() + outside * rest / rest.norm()
    exact = Constraint(inputs=V.double()).permitted(D.double())
    c = Constraint(inputs=V) if side == "inputs" else Constraint(outputs=V)
    c.prepare()
    made = c.open[side == "outputs"]
    assert made is None if closed == 32 else made.shape == (64, 64 - closed)
    P = c.permitted(D if side == "inputs" else D.mT)
    torch.testing.assert_close(P if side == "inputs" else P.mT, exact.float(), rtol=0, atol=1e-6)
    assert P.norm() == pytest.approx(outside, rel=3e-3) and leak(P, c) < (1e-6 if made is None else 5e-7)
    gone = c.to(torch.device("cpu"), torch.float64)  # elsewhere it is made anew
    assert gone.open == (None, None) and gone.transposed.open == (None, None)


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("how", ["another tensor", "other numbers"])
def test_what_was_prepared_for_other_directions_is_not_used(how, side):
    V, W = (orthonormalize(torch.randn(64, 40, generator=torch.Generator().manual_seed(seed))) for seed in (0, 1))
    c = Constraint(**{side: V.clone()})
    c.prepare()
    setattr(c, side, W) if how == "another tensor" else getattr(c, side).copy_(W)
    D = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    assert leak(c.permitted(D), c) < 1e-6
    c.prepare()
    assert leak(c.permitted(D), c) < 1e-6 and c.open[side == "outputs"].shape == (64, 24)


@pytest.mark.parametrize(("n", "closed", "columns"), [(576, 570, 6), (256, 250, 6), (64, 60, 4)])
def test_a_basis_is_off_a_space_that_leaves_hardly_anything_also_where_nothing_is_dropped(n, closed, columns):
    V = torch.linalg.qr(matrix(n, closed, 0, torch.float32))[0]
    A = V[:, :columns] + 1e-7 * matrix(n, columns, 1, torch.float32)  # columns that lie in the space but for a little
    Q = orthonormalize(A, against=V, scale=0.0)
    assert Q.shape[1] == columns and float((V.mT @ Q).abs().max()) < 1e-6
    assert_orthonormal(Q)


def test_subspace_iteration_off_a_space_is_that_of_the_projected_matrix():
    A, V = matrix(60, 40, 0, torch.float32), torch.linalg.qr(matrix(40, 10, 1, torch.float32))[0]
    A += 100 * A @ V @ V.mT  # nearly all of it lies in the space
    start = matrix(40, 12, 2, torch.float32)
    found, same = (
        top_subspace(A, 6, "power", start=project_out(start.mT, V).mT, off=V),
        top_subspace(project_out(A, V), 6, "power", start=project_out(start.mT, V).mT),
    )
    torch.testing.assert_close(found.energy, same.energy, rtol=1e-3, atol=1e-3)
    assert float((V.mT @ found.basis).abs().max()) < 1e-6


def test_the_weakest_directions_of_an_iteration_are_as_orthonormal_as_the_strongest():
    A = matrix(60, 40, 1, torch.float32) @ torch.diag(torch.logspace(0, -8, 40)) @ torch.linalg.qr(matrix(40, 40, 2, torch.float32))[0].mT
    V = orthonormalize(A[:3].mT + 0.1 * matrix(40, 3, 3, torch.float32))  # most of A's energy
    start = project_out(matrix(40, 24, 4, torch.float32).mT, V).mT
    found = top_subspace(A, 12, "power", start=start, off=V)
    energy = found.energy / found.energy[0]
    assert found.rank == 12 and float(energy[-1]) < 1e-3
    assert float((found.basis.mT @ found.basis - torch.eye(12)).abs().max()) < 1e-6
    assert float((found.basis.mT @ V).abs().max()) < 2e-7

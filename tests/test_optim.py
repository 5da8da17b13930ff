"""The optimizer: equal to what it claims to equal, held to the reference, and no leak in any situation contract row 1 names."""

from __future__ import annotations

import functools
import io
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from forgetless import Constraint, SubspaceAdamW, constrain, methods
from forgetless.errors import ConfigError
from forgetless.evaluation.drift import leak_bound, weight_leak
from forgetless.methods.base import Memory
from forgetless.optim.reference import ReferenceAdamW
from forgetless.optim.rounding import stochastic_round
from forgetless.subspace import leak, orthonormalize, rotate_moments, tolerance

GOLDEN = Path(__file__).parent / "golden" / "gorp"
M, N = 24, 16


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def basis(n, k, seed=0, dtype=torch.float32):
    return torch.linalg.qr(rand(n, k, seed=seed, dtype=torch.float64))[0].to(dtype).contiguous()


def weight(dtype=torch.float32, seed=7):
    return nn.Parameter(rand(M, N, seed=seed, dtype=dtype))


def gradient(W, t, seed=100):
    """A gradient with decaying spectrum that depends on W, so that errors compound."""
    G = rand(M, N, seed=seed + t, dtype=torch.float64) * torch.logspace(0, -2, N, dtype=torch.float64)
    return (G + 0.1 * W.detach().double()).to(W.dtype)


def train(opt, W, steps, grad=gradient):
    for t in range(steps):
        W.grad = grad(W, t)
        opt.step()
    return W.detach()


# -- equal to what it is said to be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_plain_tensor_is_torchs_adamw_to_the_bit(weight_decay):
    W, X = weight(), weight()
    ours, theirs = SubspaceAdamW([W], lr=1e-2, weight_decay=weight_decay), torch.optim.AdamW([X], lr=1e-2, weight_decay=weight_decay, fused=True)
    assert torch.equal(train(ours, W, 30), train(theirs, X, 30))


KINDS = {
    "plain": {},
    "inputs": dict(inputs=5),
    "outputs": dict(outputs=6),
    "either": dict(inputs=4, outputs=5),
    "both": dict(inputs=6, outputs=8, forbid="both"),
}
MOST = {"most inputs": dict(inputs=11), "most of either": dict(inputs=10, outputs=16)}


def constraint(kind, dtype=torch.float32):
    spec = dict((KINDS | MOST)[kind])
    forbid = spec.pop("forbid", "either")
    dims = {"inputs": N, "outputs": M}
    return Constraint(**{k: basis(dims[k], v, seed=3, dtype=dtype) for k, v in spec.items()}, forbid=forbid) if spec else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rank", "side", "moments"),
    [(None, "inputs", "rotate"), *((4, side, moments) for side in ("inputs", "both") for moments in ("rotate", "reset", "keep"))],
)
def test_fast_equals_reference_for_100_steps(kind, rank, side, moments, dtype):
    c = constraint(kind, dtype)
    W = weight(dtype)
    opt = SubspaceAdamW(
        [{"params": [W], "constraint": c, "rank": rank, "side": side, "refresh": "svd", "moments": moments, "scale": 0.5}],
        lr=3e-3,
        weight_decay=0.05 if c or rank else 0.0,
    )
    slow = ReferenceAdamW(
        weight(torch.float64).detach().clone(),
        3e-3,
        weight_decay=0.05 if c or rank else 0.0,
        constraint=constraint(kind, torch.float64),
        rank=rank,
        moments=moments,
        scale=0.5,
        side=side,
        tolerance=tolerance(dtype),
    )
    for t in range(100):
        G = gradient(slow.W, t)
        W.grad = G.to(dtype)
        opt.step()
        if rank:  # the optimizer's own directions: singular vectors have no sign, and kept moments would see it
            slow.refresh = lambda G: slow.change(*(opt.state[W][key].double() for key in ("basis", "basis_left") if key in opt.state[W]))
        slow.step(G)
    torch.testing.assert_close(W.detach().double(), slow.W, atol=1e-9 if dtype == torch.float64 else 5e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", MOST)
def test_where_most_is_closed_it_is_so_too(kind, dtype):
    """And the basis of what is open is counted."""
    test_fast_equals_reference_for_100_steps(kind, None, "inputs", "rotate", dtype)
    W = weight(dtype)
    opt = SubspaceAdamW([{"params": [W], "constraint": constraint(kind, dtype)}], lr=1e-3)
    W.grad = gradient(W, 0)
    opt.step()
    bases = sum(N * N if side == "inputs" else M * M for side in MOST[kind])  # closed and open directions are all there are
    assert opt.state_bytes() == (2 * M * N + bases) * dtype.itemsize + 4


def test_the_references_own_refresh_is_the_top_of_the_permitted_gradient():
    V = basis(N, 3, dtype=torch.float64)
    slow = ReferenceAdamW(rand(M, N, dtype=torch.float64), 1e-2, constraint=Constraint(inputs=V), rank=2)
    slow.refresh(rand(M, N, seed=5, dtype=torch.float64))
    assert (V.mT @ slow.Q).abs().max() < 1e-12 and slow.Q.shape == (N, 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("refresh", ["exact", "svd", "cold", "warm"])
def test_two_sided_directions_are_the_references(kind, refresh):
    """Compared as spans: singular vectors have no sign. G has rank 3, its permitted part at most 6, so that two iterations of 6 vectors are exact too."""
    c, G = constraint(kind, torch.float64), rand(M, 3, seed=5, dtype=torch.float64) @ rand(3, N, seed=6, dtype=torch.float64)
    slow = ReferenceAdamW(rand(M, N, dtype=torch.float64), 1e-2, constraint=c, rank=3, side="both")
    slow.refresh(G)
    W = weight(torch.float64)
    opt = SubspaceAdamW([{"params": [W], "constraint": c, "rank": 3, "side": "both", "refresh": refresh}])
    W.grad = G.clone()
    opt.step()
    P, Q = opt.state[W]["basis_left"], opt.state[W]["basis"]
    assert P.shape == (M, 3) and Q.shape == (N, 3)
    torch.testing.assert_close(P @ P.mT, slow.P @ slow.P.mT, atol=1e-10, rtol=0)
    torch.testing.assert_close(Q @ Q.mT, slow.Q @ slow.Q.mT, atol=1e-10, rtol=0)
    permitted = G if c is None else c.permitted(G)
    torch.testing.assert_close(P.mT @ permitted @ Q, torch.linalg.svdvals(permitted)[:3].diag(), atol=1e-9, rtol=0)  # pairs, strongest first


def galore_run(optimizer, steps=(1, 10, 50, 100)):
    """Weights after some of 100 steps on fixed gradients."""
    (group,) = optimizer.param_groups
    (W,) = group["params"]
    kept = {}
    for t in range(100):
        W.grad = rand(M, N, seed=500 + t) * torch.logspace(0, -1, N)
        optimizer.step()
        if t + 1 in steps:
            kept[str(t + 1)] = W.detach().clone()
    return kept


GALORE = {"rank": 4, "scale": 0.25}


@pytest.mark.parametrize("refresh", ["svd", "exact"])  # the sign of a singular vector is free, and Adam does not see it: R and its step flip together
def test_unconstrained_equals_galore_torch(refresh):
    """galore-torch keeps its moments when the basis changes and puts eps before the bias correction; with one basis and a tiny eps the two are the same method.
    tests/golden/galore_torch.safetensors holds what galore-torch 1.0 gave; where it is installed (extra: bench) it is run again."""
    ours = galore_run(SubspaceAdamW([{"params": [weight()], **GALORE, "refresh_gap": 1000, "refresh": refresh}], lr=1e-2, eps=1e-12))
    for step, expected in load_file(GOLDEN.parent / "galore_torch.safetensors").items():
        torch.testing.assert_close(ours[step], expected, atol=3e-5, rtol=0)


def test_the_galore_golden_is_what_galore_torch_gives():
    galore = pytest.importorskip("galore_torch", reason="galore-torch (extra: bench) is not installed; its golden file is tested above")
    theirs = galore.GaLoreAdamW(
        [{"params": [weight()], **GALORE, "update_proj_gap": 1000, "proj_type": "right"}], lr=1e-2, eps=1e-12, no_deprecation_warning=True
    )
    golden = load_file(GOLDEN.parent / "galore_torch.safetensors")
    for step, W in galore_run(theirs).items():
        torch.testing.assert_close(W, golden[step], atol=1e-5, rtol=0)


# -- given directions (OSFT's coordinates) ------------------------------------------------------------------------------------------------

DIRECTIONS = {  # which sides are read in coordinates, and which the constraint protects
    "both": ("PQ", ("outputs", "inputs")),
    "inputs": ("Q", ("outputs", "inputs")),
    "outputs": ("P", ("outputs", "inputs")),
    "inputs, no more": ("Q", ("inputs",)),
    "outputs, inputs whole": ("P", ("inputs",)),
    "free": ("PQ", ()),
}


def given(case, dtype):
    """(constraint, directions): the protected bases, and on the sides named all that is left of them."""
    sides, protects = DIRECTIONS[case]
    protected = {"outputs": basis(M, 5, seed=3, dtype=dtype), "inputs": basis(N, 4, seed=4, dtype=dtype)}
    rest = [
        torch.linalg.qr(V, mode="complete").Q[:, V.shape[1] :] if name in sides else None for name, V in zip("PQ", protected.values(), strict=True)
    ]
    return Constraint(**{side: protected[side] for side in protects}) if protects else None, tuple(rest)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", DIRECTIONS)
def test_given_directions_equal_the_reference_for_100_steps(case, dtype, transposed):
    c, directions = given(case, dtype)
    W = weight(dtype)
    stored = torch.nn.Parameter(W.detach().mT.contiguous()) if transposed else W
    opt = SubspaceAdamW(
        [{"params": [stored], "constraint": c, "directions": directions, "transposed": transposed, "scale": 0.5}],
        lr=3e-3,
        weight_decay=0.05,
        max_grad_norm=None,
    )
    c64, directions64 = given(case, torch.float64)
    slow = ReferenceAdamW(weight(torch.float64).detach().clone(), 3e-3, weight_decay=0.05, constraint=c64, directions=directions64, scale=0.5)
    opt.track_leak = True
    planned = opt.planned_bytes()
    for t in range(100):
        G = gradient(slow.W, t)
        stored.grad = (G.mT.contiguous() if transposed else G).to(dtype)
        opt.step()
        slow.step(G)
        assert c is None or opt.update_leak < (1e-13 if dtype == torch.float64 else 1e-5)
    learned = stored.detach().mT if transposed else stored.detach()
    torch.testing.assert_close(learned.double(), slow.W, atol=1e-9 if dtype == torch.float64 else 5e-5, rtol=0)
    assert c is None or leak(learned - weight(dtype).detach(), c) < (1e-12 if dtype == torch.float64 else 1e-4)
    assert opt.state_bytes() == planned


def test_given_directions_without_decay_leak_nothing_and_come_from_the_program_after_a_reload():
    c, directions = given("inputs", torch.float32)
    W, X = weight(torch.float32), weight(torch.float32)
    a, b = (SubspaceAdamW([{"params": [p], "constraint": c, "directions": directions}], lr=3e-3, max_grad_norm=1.0) for p in (W, X))
    a.track_leak = True
    for t in range(20):
        if t == 10:
            X.data.copy_(W.data)
            b.load_state_dict(a.state_dict())
            assert "directions" not in a.state_dict()["param_groups"][0]
        G = gradient(W.detach(), t)
        W.grad, X.grad = G.clone(), G.clone()
        a.step()
        assert a.update_leak < 1e-6
        if t >= 10:
            b.step()
    assert torch.equal(W, X)
    assert leak(W.detach() - weight(torch.float32).detach(), c) < 1e-4


@pytest.mark.parametrize(
    ("group", "says"),
    [
        (dict(directions=(None, None)), "one may be None"),
        (dict(rank=2, directions=(None, basis(N, 3))), "place of a rank"),
        (dict(directions=(basis(N, 3), None)), "directions of the outputs"),
        (dict(directions=(None, 2 * basis(N, 3))), "not orthonormal"),
        (dict(directions=(None, basis(N, 3)), constraint=Constraint(inputs=basis(N, 2))), "not orthogonal"),
        (dict(directions=(None, basis(N, 3)), constraint=Constraint(inputs=basis(N, 2), outputs=basis(M, 2), forbid="both")), "dense form"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_given_directions_that_cannot_be_honoured_are_refused(group, says):
    with pytest.raises(ValueError, match=says):
        SubspaceAdamW([{"params": [weight(torch.float32)], **group}])


# -- the authors' arithmetic (tests/golden/gorp) ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "weight_decay"), [("plain", 0.0), ("plain_wd", None)])
def test_the_authors_plain_adamw(case, weight_decay):
    data = load_file(GOLDEN / "adamw.safetensors")
    W = nn.Parameter(data["W0"].clone())
    opt = SubspaceAdamW([W], lr=1e-2, eps=1e-6)
    first = None
    for t, (G, expected) in enumerate(zip(data["grads"], data[f"{case}/traj"], strict=True), 1):
        opt.param_groups[0]["eps"] = their_eps(t)
        before = W.detach().clone()
        W.grad = G.clone()
        opt.step()
        if weight_decay is None:  # theirs decays after the step by lr * wd * W; find wd in the first step, hold it in all others
            first = first if first is not None else float(((W.detach() - expected) / W.detach()).mean())
            W.data = W.data * (1 - first)
        torch.testing.assert_close(W.detach(), expected, atol=2e-6, rtol=0)
        assert not torch.equal(before, W.detach())
    torch.testing.assert_close(opt.state[W]["exp_avg"], data[f"{case}/exp_avg"], atol=1e-6, rtol=1e-5)


def test_the_authors_low_rank_adamw_until_its_basis_changes_and_after_with_their_rule():
    """Their state is in GaLore's "right" coordinates with the moments kept at a refresh; ours in mode "keep" is the same arithmetic, up to the sign of singular vectors."""
    data = load_file(GOLDEN / "adamw.safetensors")
    W = nn.Parameter(data["W0"].clone())
    opt = SubspaceAdamW([{"params": [W], "rank": 3, "refresh_gap": 1000, "refresh": "svd", "moments": "keep"}], lr=1e-2, eps=1e-6)
    gap = next((t for t in range(1, 25) if not _same_basis(data, t)), 25)
    for t in range(gap):
        opt.param_groups[0]["eps"] = their_eps(t + 1)
        W.grad = data["grads"][t].clone()
        opt.step()
        torch.testing.assert_close(W.detach(), data["galore/traj"][t], atol=3e-6, rtol=0)
    assert gap >= 5


def their_eps(t):
    """They add eps before the bias correction, torch after it: the same number once divided by sqrt(1 - beta2^t)."""
    return 1e-6 / (1 - 0.999**t) ** 0.5


def _same_basis(data, t):
    """Do their first t+1 steps all lie in the row space of the first one?"""
    D = data["galore/traj"][t] - data["W0"]
    first = torch.linalg.svd(data["galore/traj"][0] - data["W0"]).Vh[:3]
    return float((D - D @ first.mT @ first).norm() / D.norm()) < 1e-4


def test_the_authors_projected_gradient_leaks_and_ours_does_not():
    """`gp`: the gradient is projected, then Adam divides element by element: the applied update comes back into the protected space. B is out x 3."""
    data = load_file(GOLDEN / "adamw.safetensors")
    c = Constraint(outputs=data["B"].contiguous())
    D = data["gp/traj"][-1] - data["gp/traj"][0]
    assert leak(D, c) > 0.1
    W = nn.Parameter(data["W0"].clone())
    opt = SubspaceAdamW([{"params": [W], "constraint": c}], lr=1e-2, eps=1e-6)
    for G in data["grads"]:
        W.grad = G.clone()
        opt.step()
    assert leak(W.detach().double() - data["W0"].double(), Constraint(outputs=data["B"].double())) < 1e-5


@pytest.mark.parametrize("shape", ["14x10", "12x12", "9x3"])
@pytest.mark.parametrize("r", [3, 8])
def test_the_authors_projector(shape, r):
    """l0 = G Q and b0 = scale * l0 Q^T of the "right" projector, and after a refresh l2: our first step's gradient lives in the same coordinates."""
    data = load_file(GOLDEN / "projector.safetensors")
    G = data[f"G_{shape}"]
    W = nn.Parameter(torch.zeros_like(G))
    opt = SubspaceAdamW([{"params": [W], "rank": r, "refresh": "svd"}])
    W.grad = G.clone()
    opt.step()
    Q = opt.state[W]["basis"]
    k = min(r, *G.shape)
    torch.testing.assert_close((G @ Q).abs(), data[f"{shape}/right/r{r}/l0"][:, :k].abs(), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(0.25 * G @ Q @ Q.mT, data[f"{shape}/right/r{r}/b0"], atol=2e-5, rtol=1e-4)


# -- contract row 1: no leak ----------------------------------------------------------------------------------------------------------


def full_gradient(W, t):
    return gradient(W, t)


def rank_deficient(W, t):
    return (rand(M, 2, seed=t) @ rand(2, N, seed=9)).to(W.dtype)


def sometimes_zero(W, t):
    return torch.zeros_like(W) if t % 3 == 0 else gradient(W, t)


@pytest.mark.parametrize("grad", [full_gradient, rank_deficient, sometimes_zero], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("rank", "side", "refresh"),
    [(None, "inputs", "cold"), *((4, side, how) for side in ("inputs", "outputs", "both") for how in ("cold", "warm", "exact", "svd"))],
)
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])  # without it a low-rank step is kept off the space by its directions alone
def test_no_leak_after_50_steps_with_decay_and_clipping(weight_decay, kind, refresh, rank, side, grad, dtype):
    c = constraint(kind, dtype)
    W = weight(dtype)
    start = W.detach().clone()
    group = {"params": [W], "constraint": c, "rank": rank, "refresh": refresh, "side": side}
    opt = SubspaceAdamW([group], lr=1e-3, weight_decay=weight_decay, max_grad_norm=0.5)
    opt.track_leak = True
    worst = 0.0
    for t in range(50):
        W.grad = grad(W, t)
        opt.step()
        worst = max(worst, opt.update_leak or 0.0)
    assert worst < (1e-5 if dtype == torch.float32 else 1e-10)
    D = W.detach().double() - start.double()
    assert float(D.norm()) > 1e-3  # it did learn
    assert c.to(D.device, torch.float64).forbidden_norm(D) <= leak_bound({"constraint": c}, W.detach(), float(D.norm()), 50)


def test_the_leak_tests_would_fail_without_the_projection_after_adam():
    """Break it once: Adam on the projected gradient alone, as released code does."""
    c, W = constraint("inputs"), weight()
    opt = torch.optim.AdamW([W], lr=1e-3)
    start = W.detach().clone()
    for t in range(50):
        W.grad = c.permitted(gradient(W, t))
        opt.step()
    assert leak(W.detach() - start, c) > 0.05


@pytest.mark.parametrize(("side", "protect"), [("inputs", "inputs"), ("outputs", "outputs"), ("both", "inputs"), ("both", "outputs")])
def test_the_leak_measured_in_coordinates_is_that_of_the_whole_update(side, protect):
    """With directions that were not drawn beside the space: a measure that always says zero would pass every test above."""
    c = Constraint(**{protect: basis({"inputs": N, "outputs": M}[protect], 5, seed=8, dtype=torch.float64)})
    W = weight(torch.float64)
    opt = SubspaceAdamW([{"params": [W], "constraint": c, "rank": 4, "side": side}], lr=1e-2)
    train(opt, W, 1)
    for key, V in opt.state[W].items():
        if key.startswith("basis"):
            V.copy_(basis(V.shape[0], 4, seed=9, dtype=torch.float64))
    start, opt.track_leak = W.detach().clone(), True
    W.grad = gradient(W, 1)
    opt.step()
    assert opt.update_leak == pytest.approx(leak(W.detach() - start, c), rel=1e-6) and opt.update_leak > 0.1


@pytest.mark.parametrize("left", [0, 1, 2])
@pytest.mark.parametrize("side", ["inputs", "outputs", "both"])
@pytest.mark.parametrize("protect", ["inputs", "outputs"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_space_that_leaves_fewer_than_r_directions(weight_decay, protect, side, left):
    n = {"inputs": N, "outputs": M}[protect]
    c = Constraint(**{protect: basis(n, n - left)})
    W = weight()
    start = W.detach().clone()
    opt = SubspaceAdamW([{"params": [W], "constraint": c, "rank": 4, "side": side, "weight_decay": weight_decay}], lr=1e-2, max_grad_norm=0.5)
    train(opt, W, 25)
    if side in (protect, "both"):  # the directions are drawn beside the space
        found = {key: V.shape for key, V in opt.state[W].items() if key.startswith("basis")}
        dims = {"inputs": {"basis": N}, "outputs": {"basis": M}, "both": {"basis": N, "basis_left": M}}[side]
        assert found == ({key: (dim, left) for key, dim in dims.items()} if left else {})
    if left == 0:
        assert float((W.detach() - start).abs().max()) < (1e-12 if side in (protect, "both") else 1e-6)
    else:
        assert leak(W.detach().double() - start.double(), c) < 1e-4 and float((W.detach() - start).norm()) > 1e-3


@pytest.mark.parametrize(("rank", "side"), [(None, "inputs"), (2, "inputs"), (2, "both")])
def test_a_gradient_wholly_inside_the_space_moves_nothing(rank, side):
    V = basis(N, 3)
    W = weight()
    start = W.detach().clone()
    opt = SubspaceAdamW([{"params": [W], "constraint": Constraint(inputs=V), "rank": rank, "side": side}], lr=1e-2)
    train(opt, W, 10, lambda W, t: rand(M, 3, seed=t) @ V.mT)
    assert float((W.detach() - start).abs().max()) < (1e-12 if rank else 0.5)
    assert leak(W.detach() - start, Constraint(inputs=V)) < 1e-4


@pytest.mark.parametrize("kind", ["both", "mask"])
def test_a_gradient_wholly_inside_a_forbidden_block_or_mask_gives_two_sided_coordinates_no_directions(kind):
    if kind == "both":
        c = constraint(kind)
        forbidden = c.outputs @ rand(8, 6) @ c.inputs.mT
    else:
        c = Constraint(mask=rand(M, N, seed=3) > 0)
        forbidden = rand(M, N) * ~c.mask
    W = weight()
    opt = SubspaceAdamW([{"params": [W], "constraint": c, "rank": 2, "side": "both"}], lr=1e-2)
    start = W.detach().clone()
    train(opt, W, 3, lambda W, t: forbidden.clone())
    assert "basis" not in opt.state[W] and torch.equal(W.detach(), start)
    train(opt, W, 20)
    D = W.detach().double() - start.double()
    assert leak(D, c) < 1e-4 and float(D.norm()) > 1e-2


@pytest.mark.parametrize("side", ["inputs", "outputs", "both"])
def test_the_whole_zero_gradient_chooses_no_basis(side):
    W = weight()
    opt = SubspaceAdamW([{"params": [W], "rank": 2, "side": side}])
    train(opt, W, 3, lambda W, t: torch.zeros_like(W))
    assert "basis" not in opt.state[W]
    train(opt, W, 1)
    assert opt.state[W]["basis"].shape == ((M if side == "outputs" else N), 2)


# -- both sides --------------------------------------------------------------------------------------------------------------------------


def test_the_first_two_sided_step_is_along_the_singular_directions_and_not_along_round_off():
    """R is diagonal then. Adam divides each entry by its own size: without a floor the off-diagonal round-off would be stepped at full length too."""
    W = nn.Parameter(torch.zeros(M, N))
    W.grad = gradient(weight(), 0)
    U, _, Vh = torch.linalg.svd(W.grad)
    SubspaceAdamW([{"params": [W], "rank": 4, "side": "both", "refresh": "svd"}], lr=1e-2).step()
    torch.testing.assert_close(W.detach(), -1e-2 * U[:, :4] @ Vh[:4], atol=1e-6, rtol=0)


def test_two_sided_coordinates_of_full_rank_can_reach_every_weight():
    """With r = min(out, in) nothing is left out: the loss of a least-squares problem goes to zero as with dense Adam."""
    W, target = nn.Parameter(torch.zeros(8, 8)), rand(8, 8)
    opt = SubspaceAdamW([{"params": [W], "rank": 8, "side": "both"}], lr=3e-2)
    train(opt, W, 400, lambda W, t: W.detach() - target)
    assert float((W.detach() - target).norm() / target.norm()) < 0.02


def test_two_sided_moments_are_rotated_reset_or_kept():
    def state(moments, steps):
        W = weight(torch.float64)
        opt = SubspaceAdamW([{"params": [W], "rank": 3, "side": "both", "moments": moments, "refresh_gap": 5, "refresh": "exact"}], lr=1e-3)
        train(opt, W, steps)
        W.grad = gradient(W, steps)
        opt.param_groups[0]["betas"] = (1.0 - 1e-12, 1.0 - 1e-12)  # the step that refreshes adds nothing of its own
        before = {key: value.clone() for key, value in opt.state[W].items()}
        opt.step()
        return before, opt.state[W]

    before, after = state("rotate", 5)
    O, L = before["basis"].mT @ after["basis"], before["basis_left"].mT @ after["basis_left"]
    torch.testing.assert_close(after["exp_avg"], L.mT @ before["exp_avg"] @ O, atol=1e-10, rtol=0)
    assert float(after["exp_avg_sq"].min()) > 0.05 * float(before["exp_avg_sq"].mean())
    before, after = state("reset", 5)
    assert float(after["exp_avg"].abs().max()) < 1e-9 and float(after["step"]) == 1
    before, after = state("keep", 5)
    torch.testing.assert_close(after["exp_avg"], before["exp_avg"], atol=1e-9, rtol=0)


# -- transposed: weights stored (in, out) --------------------------------------------------------------------------------------------------


def logical_constraint(kind, shape, dtype=torch.float64):
    """On inputs and outputs that differ also where the weight is square."""
    if kind == "mask":
        return Constraint(mask=rand(*shape, seed=13) > -0.5)
    spec = dict(KINDS[kind])
    forbid = spec.pop("forbid", "either")
    seeds = {"inputs": (shape[1], 11), "outputs": (shape[0], 12)}
    return Constraint(**{k: basis(seeds[k][0], v, seed=seeds[k][1], dtype=dtype) for k, v in spec.items()}, forbid=forbid) if spec else None


def linear_and_conv1d(shape, kind, **options):
    """The same layer twice, as nn.Linear (out, in) and as Conv1D (in, out), each with its optimizer."""
    from transformers.pytorch_utils import Conv1D

    linear, conv = nn.Linear(shape[1], shape[0], bias=False).double(), Conv1D(shape[0], shape[1]).double()
    conv.bias.requires_grad_(False)
    with torch.no_grad():
        linear.weight.copy_(rand(*shape, seed=7, dtype=torch.float64))
        conv.weight.copy_(linear.weight.T)
    groups = [{"params": [layer.weight], "constraint": logical_constraint(kind, shape), **options} for layer in (linear, conv)]
    groups[1]["transposed"] = True
    return (linear, conv), [SubspaceAdamW([group], lr=1e-2, max_grad_norm=20.0) for group in groups]


def train_layers(layers, optimizers, shape, first, last):
    """Yields the step's number after each step."""
    for t in range(first, last):
        x, y = rand(32, shape[1], seed=t, dtype=torch.float64), rand(32, shape[0], seed=900 + t, dtype=torch.float64)
        for layer, opt in zip(layers, optimizers, strict=True):
            opt.zero_grad()
            (layer(x) - y).square().sum().backward()
            opt.step()
        yield t


@pytest.mark.parametrize("shape", [(M, N), (N, N)], ids=["wide", "square"])  # no shape gives away a transpose that was forgotten on a square weight
@pytest.mark.parametrize("kind", [*KINDS, "mask"])
@pytest.mark.parametrize(
    ("rank", "side", "refresh"),
    [(None, "inputs", "cold"), *((4, side, how) for side in ("inputs", "outputs", "both") for how in ("cold", "warm", "exact", "svd"))],
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_conv1d_learns_as_the_linear_layer_it_is(weight_decay, rank, side, refresh, kind, shape):
    layers, optimizers = linear_and_conv1d(shape, kind, rank=rank, side=side, refresh=refresh, weight_decay=weight_decay)
    assert optimizers[0].planned_bytes() == optimizers[1].planned_bytes()
    for _ in train_layers(layers, optimizers, shape, 0, 23):
        W, X = layers[0].weight.detach(), layers[1].weight.detach().T
        torch.testing.assert_close(X, W, atol=1e-12, rtol=0)
    assert optimizers[0].state_bytes() == optimizers[1].state_bytes() == optimizers[1].planned_bytes()
    D = X - rand(*shape, seed=7, dtype=torch.float64)
    c = logical_constraint(kind, shape)
    assert float(D.norm()) > 1e-2 and (c is None or leak(D, c) < 1e-10)
    start = {layers[1].weight: rand(*shape, seed=7, dtype=torch.float64).T}
    found = weight_leak(optimizers[1], start, 23)
    assert found is None if c is None else found["leak"] <= found["bound"]


@pytest.mark.parametrize("side", ["inputs", "outputs", "both"])
def test_a_transposed_group_is_not_turned_twice(side):
    """By a checkpoint, by using the caller's groups again, or by making an optimizer from another one's groups."""
    shape = (N, N)
    (linear, conv), (opt, turned) = linear_and_conv1d(shape, "either", rank=4, side=side, weight_decay=0.1)
    for _ in train_layers((linear, conv), (opt, turned), shape, 0, 13):
        pass
    buffer = io.BytesIO()
    torch.save(turned.state_dict(), buffer)
    buffer.seek(0)
    group = {
        "params": [conv.weight],
        "constraint": logical_constraint("either", shape),
        "rank": 4,
        "side": side,
        "weight_decay": 0.1,
        "transposed": True,
    }
    SubspaceAdamW([group])
    assert group["side"] == side and group["transposed"]
    again = SubspaceAdamW([group], lr=1e-2, max_grad_norm=20.0)
    from_groups = SubspaceAdamW(again.param_groups, lr=1e-2, max_grad_norm=20.0)
    saved = torch.load(buffer, weights_only=True)
    again.load_state_dict(saved)
    from_groups.load_state_dict(saved)
    start = conv.weight.detach().clone()
    fresh = [SubspaceAdamW([group], lr=1e-2, max_grad_norm=20.0), SubspaceAdamW(SubspaceAdamW([group]).param_groups, lr=1e-2, max_grad_norm=20.0)]
    fresh[1].param_groups[0]["lr"] = 1e-2
    results = []
    for optimizer in (turned, again, from_groups, *fresh):
        with torch.no_grad():
            conv.weight.copy_(start)
        for _ in train_layers((conv,), (optimizer,), shape, 13, 30):
            pass
        results.append(conv.weight.detach().clone())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2]) and torch.equal(results[3], results[4])
    assert leak((results[0] - start).T, logical_constraint("either", shape)) < 1e-10 and not torch.equal(results[0], start)


# -- precision: weights that are too coarse for their updates ----------------------------------------------------------------------------

PRECISIONS = ("fp32_master", "stochastic_rounding", "kahan", "plain")
COARSE = {  # what a group can be, for a bf16 weight of ROWS x COLUMNS
    "plain": {},
    "decay": dict(weight_decay=1.0),
    "constraint": dict(inputs=6, outputs=8, weight_decay=1.0),
    "rank": dict(rank=4, scale=4.0),
    "rank-outputs": dict(rank=4, scale=4.0, side="outputs", weight_decay=1.0),
    "rank-both": dict(rank=4, scale=6.0, side="both", weight_decay=1.0),
    "rank-constraint": dict(rank=4, scale=4.0, inputs=6),
    "rank-both-constraint": dict(rank=4, scale=6.0, side="both", inputs=6, outputs=8),
    "rank-constraint-uncovered": dict(rank=4, scale=4.0, inputs=6, outputs=8),
}
ROWS, COLUMNS, STEPS, RATE = 64, 48, 300, 1e-4
coarse = pytest.mark.parametrize("kind", COARSE)


def coarse_start():
    """In 1 to 2, where half an ulp is 2^-8 in bf16 and 2^-11 in fp16: over every update of the tests below."""
    return 1.1 + 0.75 * torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))


def coarse_optimizer(W, kind, precision="fp32_master", lr=RATE, **more):
    group = dict(COARSE[kind]) | {"params": [W]}
    dims = {"inputs": COLUMNS, "outputs": ROWS}
    spaces = {side: basis(dims[side], group.pop(side), seed=4) for side in dims if side in group}
    return SubspaceAdamW([group | {"constraint": Constraint(**spaces) if spaces else None}], lr=lr, precision=precision, **more)


def steady_gradient(t):
    """Bf16 numbers of rank 2 and little noise, so that the weight goes somewhere."""
    G = rand(ROWS, 2, seed=50) @ rand(2, COLUMNS, seed=51) + 0.1 * rand(ROWS, COLUMNS, seed=1000 + t)
    return G.to(torch.bfloat16)


def run_coarse(kind, precision, dtype, steps=STEPS, **more):
    """W after some steps from a start that both dtypes hold, and its optimizer."""
    W = nn.Parameter(coarse_start().to(torch.bfloat16).to(dtype))
    opt = coarse_optimizer(W, kind, precision, **more)
    for t in range(steps):
        W.grad = steady_gradient(t).to(dtype)
        opt.step()
    return W, opt


@functools.cache
def fp32_run(kind):
    """The weight (ROWS, COLUMNS) after STEPS steps in fp32, and the length of the way each element went."""
    X, opt = run_coarse(kind, "fp32_master", torch.float32, steps=0)
    path = torch.zeros_like(X)
    for t in range(STEPS):
        before, X.grad = X.detach().clone(), steady_gradient(t).float()
        opt.step()
        path += (X.detach() - before).abs()
    return X.detach(), path.detach()


def displacement(W):
    return W.detach().double() - coarse_start().to(torch.bfloat16).double()


@coarse
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_coarse_weight_stalls_where_the_update_is_under_half_an_ulp(kind, dtype):
    W, opt = run_coarse(kind, "plain", dtype)
    assert torch.equal(displacement(W), torch.zeros(ROWS, COLUMNS, dtype=torch.float64))
    assert not {"master", "compensation"} & set(opt.state[W])


@coarse
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fp32_master_is_the_fp32_run_to_the_bit_and_the_weight_its_rounding(kind, dtype):
    W, opt = run_coarse(kind, "fp32_master", dtype)
    X, _ = fp32_run(kind)
    master = opt.state[W]["master"]
    assert master.dtype == torch.float32 and torch.equal(master, X)
    assert torch.equal(W.detach(), X.to(dtype)) and float(displacement(W).norm()) > 0.1


@coarse
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kahan_compensation_goes_where_fp32_goes(kind, dtype):
    """Weight and compensation together hold 16 bits or more: the compensation, at most half an ulp of the weight, is rounded to 2^-9 of itself each step."""
    W, opt = run_coarse(kind, "kahan", dtype)
    X, _ = fp32_run(kind)
    lost = opt.state[W]["compensation"]
    D, expected = displacement(W) + lost.double(), displacement(X)
    assert lost.dtype == torch.bfloat16
    assert float((D - expected).abs().max()) < STEPS * (torch.finfo(dtype).eps / 2 * 2**-9 + 2**-22)
    assert float((D * expected).sum() / (expected**2).sum()) == pytest.approx(1.0, abs=0.02)
    assert float(lost.abs().max()) <= torch.finfo(dtype).eps / 2  # what is held back is at most half an ulp


@coarse
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_goes_where_fp32_goes_in_the_mean(kind, dtype):
    W, opt = run_coarse(kind, "stochastic_rounding", dtype)
    assert not {"master", "compensation"} & set(opt.state[W])
    X, path = fp32_run(kind)
    D, expected = displacement(W), displacement(X)
    # an update of u ulps is one ulp with probability u: a variance of u (1 - u) ulp^2 a step, at most path * ulp in the end
    variance = path.double() * torch.finfo(dtype).eps
    noise = float((expected**2 * variance).sum().sqrt() / (expected**2).sum())
    assert float((D * expected).sum() / (expected**2).sum()) == pytest.approx(1.0, abs=4 * noise) and noise < 0.05
    assert float((D - expected).mean()) == pytest.approx(0.0, abs=4 * float(variance.sum().sqrt()) / D.numel())
    assert float(((D - expected) ** 2).sum()) < 1.1 * float(variance.sum())


def test_the_draws_of_stochastic_rounding_are_independent_over_steps():
    """Were consecutive seeds' numbers alike, the spread after n steps would not be that of n independent draws."""
    W = nn.Parameter(torch.full((128, 64), 1.25, dtype=torch.bfloat16))
    opt = SubspaceAdamW([W], lr=RATE, precision="stochastic_rounding")
    for _ in range(STEPS):
        W.grad = -torch.ones_like(W)
        opt.step()
    u = RATE * 2**7  # ulps a step
    jumps = (W.detach().double() - 1.25) * 2**7
    assert float(jumps.mean()) == pytest.approx(STEPS * u, abs=4 * math.sqrt(STEPS * u * (1 - u) / W.numel()))
    assert float(jumps.var()) == pytest.approx(STEPS * u * (1 - u), rel=4 * math.sqrt(2 / W.numel()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "x", [1.001, -1.001, 0.9999, -0.9999, 3e-6, -3e-6, 1e-8, -1e-8, 1234.567]
)  # fp16: 3e-6 is subnormal, 1e-8 under the smallest
def test_stochastic_rounding_has_the_mean_of_what_it_rounds(x, dtype):
    X = torch.full((200_000,), x)
    rounded = stochastic_round(X, dtype, torch.Generator().manual_seed(0)).double()
    low, high = sorted(set(rounded.tolist()))
    near = torch.tensor(x).to(dtype)
    ends = {float(torch.nextafter(near.float(), torch.tensor(s * math.inf)).to(dtype)) for s in (-1, 1)} | {float(near)}
    assert low < x < high and float(near) in (low, high) and len(ends) == 1
    spread = math.sqrt((high - x) * (x - low) / X.numel())
    assert float(rounded.mean()) == pytest.approx(float(X[0].double()), abs=4 * spread)
    assert stochastic_round(torch.tensor([(low + high) / 2]), dtype, torch.Generator().manual_seed(0)).item() in (low, high)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_leaves_alone_what_the_dtype_holds(dtype):
    big = torch.finfo(dtype).max
    x = torch.tensor([0.0, -0.0, 1.0, -2.0, 1.5, big, -big, math.inf, -math.inf, math.nan, torch.finfo(dtype).tiny])
    rounded = stochastic_round(x, dtype, torch.Generator().manual_seed(0))
    torch.testing.assert_close(rounded, x.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@coarse
def test_precision_is_nothing_to_fp32_and_fp64_weights(kind, dtype, precision):
    (W, opt), (X, other) = run_coarse(kind, precision, dtype, steps=12), run_coarse(kind, "fp32_master", dtype, steps=12)
    assert torch.equal(W.detach(), X.detach()) and opt.state_bytes() == other.state_bytes() == opt.planned_bytes()
    assert set(opt.state[W]) == set(other.state[X]) and not {"master", "compensation"} & set(opt.state[W])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@coarse
def test_a_coarse_weight_continues_from_a_file_as_if_never_stopped(kind, dtype, precision):
    W, opt = run_coarse(kind, precision, dtype, steps=13, lr=1e-2)
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    buffer.seek(0)
    X = nn.Parameter(W.detach().clone())
    again = coarse_optimizer(X, kind, precision, lr=1e-2)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert {k: (v.dtype, v.shape) for k, v in again.state[X].items()} == {k: (v.dtype, v.shape) for k, v in opt.state[W].items()}
    for t in range(13, 30):
        W.grad, X.grad = steady_gradient(t).to(dtype), steady_gradient(t).to(dtype)
        opt.step()
        again.step()
    assert torch.equal(W, X) and not torch.equal(W, coarse_start().to(torch.bfloat16).to(dtype))
    assert all(torch.equal(opt.state[W][k], v) for k, v in again.state[X].items())


def test_other_seeds_and_other_tensors_round_differently():
    def last(*tensors, seed=0):
        opt = SubspaceAdamW(list(tensors), lr=RATE, precision="stochastic_rounding", seed=seed)
        for t in range(20):
            for W in tensors:
                W.grad = steady_gradient(t)
            opt.step()
        return [W.detach() for W in tensors]

    def fresh():
        return nn.Parameter(coarse_start().to(torch.bfloat16))

    first, second = last(fresh(), fresh())
    (again,) = last(fresh())
    (other,) = last(fresh(), seed=1)
    assert torch.equal(first, again) and not torch.equal(first, second) and not torch.equal(first, other)


def test_a_master_saved_with_a_bf16_weight_is_dropped_for_an_fp32_one():
    """It would no longer move, and the weight leak would be measured on it."""
    W, opt = run_coarse("constraint", "fp32_master", torch.bfloat16, steps=3)
    X = nn.Parameter(W.detach().float())
    again = coarse_optimizer(X, "constraint")
    again.load_state_dict(opt.state_dict())
    assert "master" not in again.state[X] and torch.equal(again.state[X]["exp_avg"], opt.state[W]["exp_avg"])


def test_a_state_saved_before_an_option_existed_takes_the_programs():
    W, opt = run_coarse("plain", "kahan", torch.bfloat16, steps=3)
    saved = opt.state_dict()
    del saved["param_groups"][0]["precision"]
    again = coarse_optimizer(nn.Parameter(W.detach().clone()), "plain", "kahan")
    again.load_state_dict(saved)
    assert again.param_groups[0]["precision"] == "kahan"


@pytest.mark.parametrize("kind", [k for k in COARSE if "constraint" in k])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_weight_leak_holds_for_coarse_weights_with_masters_and_not_without(kind, dtype):
    leaks = {}
    for precision in PRECISIONS:
        W, opt = run_coarse(kind, precision, dtype, steps=0, lr=1e-2, max_grad_norm=0.5)
        start, opt.track_leak = {W: W.detach().clone()}, True
        for t in range(50):
            W.grad = steady_gradient(t).to(dtype)
            opt.step()
            assert opt.update_leak < 1e-5
        assert float(displacement(W).norm()) > 0.1
        found = weight_leak(opt, start, 50)
        leaks[precision] = found["leak"] / found["bound"]
    assert leaks.pop("fp32_master") <= 1.0
    assert min(leaks.values()) > 10.0  # round-off of the weight itself


# -- constrain: any torch optimizer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
    ],
)
def test_constrain_any_torch_optimizer(make):
    W, free = weight(torch.float64), nn.Parameter(rand(3, 3, dtype=torch.float64))
    c = Constraint(inputs=basis(N, 4, dtype=torch.float64))
    opt = make([W, free])
    handle = constrain(opt, {W: c})
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 10)  # still a torch optimizer to everyone else
    start, free_start = W.detach().clone(), free.detach().clone()
    for t in range(50):
        W.grad, free.grad = gradient(W, t), torch.ones_like(free)
        opt.step()
        scheduler.step()
    assert leak(W.detach() - start, c) < 1e-10 and float((W.detach() - start).norm()) > 1e-3
    assert not torch.equal(free.detach(), free_start)
    handle.remove()
    train(opt, W, 2)
    assert leak(W.detach() - start, c) > 1e-9


def test_constrain_holds_when_a_closure_makes_the_gradient_inside_step():
    W, c = weight(torch.float64), Constraint(inputs=basis(N, 4, dtype=torch.float64))
    opt = torch.optim.LBFGS([W], lr=0.1)
    start = W.detach().clone()
    constrain(opt, {W: c})

    def closure():
        opt.zero_grad()
        loss = (W - 1).square().sum() + (W @ torch.ones(N, dtype=torch.float64)).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        opt.step(closure)
    assert float((W.detach() - start).norm()) > 1e-3 and leak(W.detach() - start, c) < 1e-10


def test_constrain_refuses_a_weight_the_optimizer_does_not_train():
    with pytest.raises(ValueError, match="not among"):
        constrain(torch.optim.SGD([weight()], lr=0.1), {weight(): Constraint(inputs=basis(N, 2))})


# -- state ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["inputs", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_survives_a_file_loaded_with_weights_only_and_stays_fp32(dtype, side):
    def make(W, free):
        group = {"params": [W], "constraint": Constraint(inputs=basis(N, 3)), "rank": 4, "side": side, "weight_decay": 0.1}
        return SubspaceAdamW([group, {"params": [free]}], lr=1e-2, max_grad_norm=1.0)

    def steps(opt, W, free, a, b):
        for t in range(a, b):
            W.grad, free.grad = gradient(W, t), rand(5, seed=t).to(dtype)
            opt.step()

    W, free = weight(dtype), nn.Parameter(rand(5).to(dtype))
    opt = make(W, free)
    steps(opt, W, free, 0, 13)
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    buffer.seek(0)
    W2, free2 = nn.Parameter(W.detach().clone()), nn.Parameter(free.detach().clone())
    again = make(W2, free2)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert all(v.dtype == torch.float32 for v in again.state[W2].values() if v.is_floating_point())
    steps(opt, W, free, 13, 35)
    steps(again, W2, free2, 13, 35)
    assert torch.equal(W, W2) and torch.equal(free, free2)
    assert all(torch.is_tensor(v) for s in again.state.values() for v in s.values())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_planned_bytes_are_the_measured_ones(weight_decay, dtype, precision):
    c = Constraint(inputs=basis(N, 3), outputs=basis(M, 2))
    most = {"inputs": basis(N, N - 3), "outputs": basis(M, M - 2)}
    groups = [
        {"constraint": c, "rank": 4}, {"constraint": c, "rank": 4, "side": "outputs"}, {"constraint": c}, {}, {"rank": 30},
        {"constraint": Constraint(**most)}, {"constraint": Constraint(**most), "rank": 2}, {"constraint": Constraint(**most), "rank": 2, "side": "both"},
        {"constraint": c, "rank": 4, "side": "both"}, {"constraint": c, "rank": 30, "side": "both"}, {"rank": 30, "side": "both"},
        {"constraint": Constraint(outputs=basis(M, 20)), "rank": 30, "side": "both"}, {"constraint": Constraint(mask=torch.ones(M, N, dtype=torch.bool))},
    ]  # fmt: skip
    weights = [[weight(dtype, seed=2 * i), weight(dtype, seed=2 * i + 1)] for i in range(len(groups))]
    opt = SubspaceAdamW([{"params": W} | g for W, g in zip(weights, groups, strict=True)], lr=1e-2, precision=precision, weight_decay=weight_decay)
    planned = opt.planned_bytes()
    for t in range(12):
        for W in sum(weights, []):
            W.grad = gradient(W, t)
        opt.step()
    assert opt.state_bytes() == planned


def test_clipping_is_after_the_projection():
    """A huge forbidden part must not shrink the permitted step."""
    V = basis(N, 2)
    small = Constraint(inputs=V).permitted(gradient(weight(), 0)) * 1e-3
    W = weight()
    opt = SubspaceAdamW([{"params": [W], "constraint": Constraint(inputs=V)}], lr=1e-2, max_grad_norm=1.0)
    W.grad = small + 1e4 * rand(M, 2) @ V.mT
    opt.step()
    assert float(opt.grad_norm) < 1.0


@pytest.mark.parametrize(("signal", "least"), [(0.0, 0.5), (1.0, 0.4)])  # with a few strong entries the mean that new directions start from is high
@pytest.mark.parametrize("side", ["inputs", "outputs", "both"])
def test_the_update_rms_is_flat_across_a_refresh(side, signal, least):
    W = nn.Parameter(torch.zeros(64, 48))
    opt = SubspaceAdamW([{"params": [W], "rank": 8, "side": side, "refresh_gap": 20}], lr=1e-3)
    steady = signal * rand(64, 4, seed=1001) @ rand(4, 48, seed=1002) / 2
    sizes = []
    for t in range(60):
        before = W.detach().clone()
        W.grad = steady + rand(64, 48, seed=t)
        opt.step()
        sizes.append(float((W.detach() - before).norm()))
    for refresh in (20, 40):
        assert least < sizes[refresh] / sizes[refresh - 1] < 2.0


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (dict(rank=0), "at least 1"), (dict(refresh="never"), "refresh='never'"), (dict(side="top"), "side='top'"), (dict(moments="forget"), "moments"),
        (dict(constraint=Constraint(inputs=basis(5, 2))), "dimension 5"), (dict(refresh_gap=0), "at least 1"),
        (dict(precision="bf16"), "precision='bf16'; one of fp32_master"), (dict(transposed="yes"), "transposed='yes'"),
        (dict(constraint=Constraint(inputs=basis(N, 2)), transposed=True), r"dimension 16 for a weight of shape \(16, 24\) \(out, in\)"),
    ],
)  # fmt: skip
def test_bad_groups_are_refused(group, message):
    with pytest.raises(ValueError, match=message):
        SubspaceAdamW([{"params": [weight()], **group}])
    with pytest.raises(ValueError, match="matrix"):
        SubspaceAdamW([{"params": [nn.Parameter(torch.zeros(3))], "rank": 2}])
    with pytest.raises(ValueError, match="only a matrix"):
        SubspaceAdamW([{"params": [nn.Parameter(torch.zeros(3))], "transposed": True}])


def test_orthonormalize_and_rotate_are_what_the_optimizer_uses():
    """Guard the import: a copy of these in the optimizer would escape their tests."""
    import forgetless.optim.coordinates as module

    assert module.orthonormalize is orthonormalize and module.rotate_moments is rotate_moments


@pytest.mark.parametrize("rank", [None, 4])
def test_a_space_that_fills_the_whole_input_stops_the_weight_and_holds_no_state(rank):
    """Adam would divide what a projection's rounding leaves by itself."""
    torch.manual_seed(0)
    W = torch.nn.Parameter(torch.randn(16, 32))
    before = W.detach().clone()
    opt = SubspaceAdamW(
        [{"params": [W], "constraint": Constraint(inputs=torch.linalg.qr(torch.randn(32, 32))[0]), "rank": rank}], lr=0.1, max_grad_norm=1.0
    )
    opt.track_leak = True
    for _ in range(3):
        W.grad = torch.randn(16, 32)
        opt.step()
    assert torch.equal(W, before) and opt.update_leak is None and opt.state_bytes() == opt.planned_bytes()


def test_a_basis_a_little_off_orthonormal_does_not_leak():
    torch.manual_seed(0)
    W = torch.nn.Parameter(torch.randn(16, 32))
    opt = SubspaceAdamW([{"params": [W], "constraint": Constraint(inputs=torch.linalg.qr(torch.randn(32, 8))[0] * (1 + 4.4e-5))}], lr=0.1)
    opt.track_leak = True
    W.grad = torch.randn(16, 32)
    opt.step()
    assert opt.update_leak < 1e-6


def test_staggered_tensors_choose_their_directions_in_turn_each_every_gap_steps():
    gap, steps = 3, 8
    weights = [torch.nn.Parameter(torch.randn(12, 9, generator=torch.Generator().manual_seed(seed))) for seed in range(4)]
    opt = SubspaceAdamW([{"params": [W], "rank": 2, "refresh_gap": gap, "stagger": True} for W in weights], lr=1e-3)
    chose = []
    for t in range(steps):
        before = [opt.state[W].get("basis") for W in weights]
        for i, W in enumerate(weights):
            W.grad = torch.randn(12, 9, generator=torch.Generator().manual_seed(100 * t + i))
        opt.step()
        chose.append([i for i, W in enumerate(weights) if opt.state[W]["basis"] is not before[i]])
    assert chose[0] == [0, 1, 2, 3]  # the first step needs directions for all
    assert chose[1:] == [[i for i in range(4) if (t + i) % gap == 0] for t in range(1, steps)]
    reloaded = SubspaceAdamW([{"params": [W], "rank": 2} for W in weights], lr=1e-3)
    reloaded.load_state_dict(opt.state_dict())
    assert all(group["stagger"] for group in reloaded.param_groups)


def test_stagger_without_a_rank_is_refused():
    with pytest.raises(ConfigError, match="stagger: true"):
        methods.get("gorp", stagger=True)
    assert methods.get("gorp", stagger=True, rank=4).options.stagger


# -- gradients read in bf16 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["inputs", "outputs", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_read_in_bf16_are_near_and_what_is_protected_is_as_safe(side, dtype):
    U, V = basis(M, 5, 1), basis(N, 6, 2)
    closed = Constraint(inputs=V if side != "outputs" else None, outputs=U if side != "inputs" else None)
    moments = {}
    for projection in ("fp32", "bf16"):
        W = weight(dtype)
        group = {"params": [W], "constraint": closed, "rank": 4, "refresh_gap": 5, "side": side, "projection": projection}
        opt = SubspaceAdamW([group], lr=1e-2)
        opt.track_leak = True
        for t in range(8):
            most = 10 * rand(M, 6, seed=t) @ V.mT + 10 * U @ rand(5, N, seed=50 + t)  # closed
            W.grad = (gradient(weight(), t) + most).to(dtype)
            opt.step()
            assert opt.update_leak < 2e-7  # of both: a choice that leaves what iterating left of the closed part has 1e-6 here
            moments[projection, t] = opt.state[W]["exp_avg"].clone()
            assert leak(opt.state[W].get("master", W).detach().double() - weight(dtype).detach().double(), closed) < 1e-4  # rounding into W
    off = (moments["bf16", 0] - moments["fp32", 0]).norm() / moments["fp32", 0].norm()
    assert 1e-4 < off < 0.1  # 2^-9 of a gradient of which nearly all is closed


def test_bf16_products_are_those_of_bf16():
    from forgetless.products import coarse_product

    for m, n, r in ((64, 48, 8), (8, 48, 64), (300, 200, 40)):
        A, B = rand(m, n), rand(n, r, seed=1)
        for X, Y in ((A, B), (A.mT.contiguous().mT, B), (A, B.mT.contiguous().mT)):
            found, exact = coarse_product(X, Y), A.bfloat16().double() @ B.bfloat16().double()
            assert found.dtype == torch.float32 and float(((found - exact).abs() / exact.abs().clamp_min(1e-3 * n)).max()) < 2**-8


def test_bf16_projection_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="projection='bf16'"):
        SubspaceAdamW([{"params": [weight()], "projection": "bf16"}])
    with pytest.raises(ValueError, match="not for fp64"):
        SubspaceAdamW([{"params": [weight(torch.float64)], "projection": "bf16", "rank": 2}])
    with pytest.raises(ValueError, match="one of fp32, bf16"):
        SubspaceAdamW([{"params": [weight()], "projection": "fp16", "rank": 2}])
    with pytest.raises(ConfigError, match="projection: bf16"):
        methods.get("gorp", projection="bf16")
    gorp, model = methods.get("gorp", projection="bf16", rank=2), nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    gorp.begin_task(model, None, Memory())
    assert [group["projection"] for group in gorp.param_groups(model)] == ["bf16", "bf16"]


# -- how much of the gradient the directions hold ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("side", ["inputs", "outputs", "both"])
@pytest.mark.parametrize("refresh", ["exact", "cold", "svd"])
def test_the_energy_that_directions_hold_is_noted_when_they_are_chosen(refresh, side, release):
    """A gradient with singular values 3, 2, 1: one direction holds 9/14 of it, and 4/14 where the strongest is closed."""
    U, V = basis(M, 3, seed=1), basis(N, 3, seed=2)
    G = U @ torch.diag(torch.tensor([3.0, 2.0, 1.0])) @ V.mT
    closed = Constraint(outputs=U[:, :1]) if side == "outputs" else Constraint(inputs=V[:, :1])
    for constraint, share in ((None, 9 / 14), (closed, 4 / 14)):
        W, seen = nn.Parameter(torch.zeros(M, N)), []
        group = {"params": [W], "rank": 1, "side": side, "refresh": refresh, "refresh_gap": 2, "constraint": constraint, "release": release}
        optimizer = SubspaceAdamW([group, {"params": [weight()]}], lr=1e-3)
        optimizer.track_captured = True
        for _ in range(3):
            (W * G).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append((optimizer.captured, optimizer.captured_of_best))
        close = functools.partial(pytest.approx, rel=1e-4 if refresh != "cold" else 0.2)
        assert seen[0] == (close(share), close(1.0)) and seen[1] == (None, None)
        assert seen[2] == (close(share), None)  # the best there is is looked for in every tenth choice
        assert seen[0][0] <= share * (1 + 1e-5)
    untracked = SubspaceAdamW([{"params": [W], "rank": 1}], lr=1e-3)
    W.grad = G
    untracked.step()
    assert untracked.captured is None and untracked.captured_of_best is None

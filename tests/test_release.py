"""Gradients of low-rank groups that are read within backward and let go: the same steps, the same spaces, no two whole gradients at once."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import forgetless as fl
from forgetless import Constraint, SubspaceAdamW
from forgetless.config import load_config
from forgetless.errors import ConfigError
from forgetless.estimate import estimate
from forgetless.lineage import load_memory
from forgetless.methods import get
from forgetless.methods.base import clip_factor
from forgetless.subspace import leak, orthonormalize

N = 20


def layers(count=4):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(N, N, bias=False).double() for _ in range(count)))


def basis(k):
    return orthonormalize(torch.randn(N, k, generator=torch.Generator().manual_seed(5), dtype=torch.float64))


def trained(release, micro=1, told=True, steps=7, protect="inputs", **group):
    """(model, optimizer) after a few steps; each of `micro` backward passes sees other rows."""
    model, V = layers(), basis(4)
    common = {"rank": 3, "refresh_gap": 3, "release": release, "constraint": Constraint(**{protect: V})} | group
    optimizer = SubspaceAdamW([common | {"params": [p]} for p in model.parameters()], lr=1e-2, max_grad_norm=1.0, weight_decay=0.1)
    optimizer.micro_batches = micro if told else 1
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(micro):
            x = torch.randn(9, N, generator=generator, dtype=torch.float64)
            (model(x).square().sum() / micro).backward()
        optimizer.step()
    return model, optimizer


GROUPS = [
    {}, {"side": "outputs", "protect": "outputs"}, {"side": "both"}, {"stagger": True}, {"refresh": "warm"}, {"transposed": True}, {"side": "outputs"},
]  # fmt: skip


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_the_steps_are_the_same(group, micro):
    kept, released = (trained(r, micro, **group)[0] for r in (False, True))
    for a, b in zip(kept.parameters(), released.parameters(), strict=True):
        assert not torch.equal(a, layers()[0].weight)
        torch.testing.assert_close(a, b, atol=0 if micro == 1 else 1e-10, rtol=0)


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_nothing_leaks_where_nobody_says_how_many_passes_make_a_step(group):
    """Directions are chosen for the first pass then, and the others add up in them."""
    model, optimizer = trained(True, micro=3, told=False, **group)
    sides = [group.get("protect", "inputs")]
    for p, start in zip(model.parameters(), layers().parameters(), strict=True):
        D = (p - start).detach()
        assert D.norm() > 1e-3 and leak(D.mT if group.get("transposed") else D, Constraint(**dict.fromkeys(sides, basis(4)))) < 1e-10
    assert optimizer.state_bytes() == optimizer.planned_bytes()


@pytest.mark.parametrize("micro", [1, 2])
def test_no_two_whole_gradients_live_at_once_but_those_that_choose_directions(micro):
    model, seen = layers(), []
    optimizer = SubspaceAdamW([{"params": [p], "rank": 3, "release": True, "refresh_gap": 4, "observe": seen.append} for p in model.parameters()])
    optimizer.micro_batches, alive = micro, []
    for p in model.parameters():  # after the optimizer's own hooks, which come first
        p.register_post_accumulate_grad_hook(lambda _: alive.append(sum(q.grad is not None for q in model.parameters())))
    for _ in range(2):
        for _ in range(micro):
            model(torch.randn(5, N, dtype=torch.float64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    first = [0] * 4 if micro == 1 else [1, 2, 3, 4] + [4] * 4
    assert alive == first + [0] * 4 * micro
    assert len(seen) == 4 * 2  # of two passes a step only the second step's are let go
    del optimizer
    model(torch.randn(5, N, dtype=torch.float64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())  # the hooks ended with it


@pytest.mark.parametrize("micro", [1, 2])
def test_a_run_is_the_same_run(micro, small_run, tmp_path):
    """With accumulation the energy of a step is known from probes only, so the spaces may differ a little; their strongest directions do not."""
    memories, lines = [], []
    for release in (False, True):
        config = small_run(
            {"name": "gorp", "rank": 4, "refresh_gap": 3, "release_gradients": release, "use_lora": True, "lora_dropout": 0.0},
            tasks=("colour", "animal"),
        )
        config["train"] |= {"gradient_accumulation_steps": micro}
        result = fl.run(config | {"output_dir": str(tmp_path / str(release))})
        memories.append(load_memory(result.path / "tasks" / "00-colour" / "state"))
        lines.append(
            [(line["model_sha256"], line["state_sha256"]) for line in map(json.loads, (result.path / "lineage.jsonl").read_text().splitlines())]
        )
        tasks = [json.loads(line) for line in (result.path / "timing.jsonl").read_text().splitlines()]
        assert all(0.1 < task["captured"] < 1 and 0.5 < task["captured_of_best"] < 1 + 1e-6 for task in tasks if task["event"] == "task")
    if micro == 1:
        assert lines[0] == lines[1]
    spaces = [memory.spaces() for memory in memories]
    assert len(spaces[0]) == 14 == len(spaces[1])
    for name, space in spaces[0].items():
        other = spaces[1][name]
        assert abs(space.rank - other.rank) <= (0 if micro == 1 else 2)
        k = min(space.rank, other.rank, 3)  # the strongest directions
        assert torch.linalg.svdvals(space.basis[:, :k].mT @ other.basis)[-1] > 0.9, name


def test_a_run_releases_where_the_steps_stay_the_same_and_refuses_where_it_cannot(small_run, monkeypatch):
    model = nn.Sequential(nn.Linear(N, N, bias=False))
    for options, micro, expected in (
        ({}, 1, False), ({"rank": 4}, 1, True), ({"rank": 4}, 2, False), ({"rank": 4, "release_gradients": True}, 2, True),
        ({"rank": 4, "release_gradients": False}, 1, False), ({"rank": 4, "space_from": "first_moment"}, 1, False),
        ({"rank": 4, "space_from": "first_moment", "use_shared_space": False}, 1, True),
    ):  # fmt: skip
        method = get("gorp", full_modules=".*", **options)
        method.micro_batches = micro
        (group,) = method.optimizer(method.param_groups(model), lr=1e-3).param_groups
        assert group["release"] is expected, options
    for options in ({}, {"rank": 4, "space_from": "first_moment"}, {"rank": 4, "use_full_rank": False, "use_lora": True}):
        with pytest.raises(ConfigError, match="release_gradients: true reads gradients in coordinates"):
            get("gorp", release_gradients=True, **options)
    with pytest.raises(ConfigError, match="release_gradients works in one process"), monkeypatch.context() as patch:
        patch.setattr("forgetless.distributed.world_size", lambda: 2)
        get("gorp", rank=4, release_gradients=True).check(model)
    with pytest.raises(ConfigError, match="release_gradients works in one process"), monkeypatch.context() as patch:
        patch.setattr("forgetless.distributed.world_size", lambda: 2)  # a run that has begun in one process
        method = get("gorp", rank=4, release_gradients=True)
        method.optimizer(method.param_groups(model), lr=1e-3)
    with pytest.raises(ValueError, match="release=True needs directions or a rank"):
        SubspaceAdamW([{"params": [nn.Parameter(torch.zeros(4, 4))], "release": True}])


def test_estimates_count_what_is_let_go(small_run):
    def gradients(micro=1, **method):
        config = small_run({"name": "gorp", "rank": 4, **method}, tasks=("colour",))
        config["train"] |= {"gradient_accumulation_steps": micro}
        return estimate(load_config(config), tokens=12)["peak"]["gradients"]

    kept, released = gradients(release_gradients=False), gradients()
    layers = get("gorp").full_layers(fl.models.load(small_run()["model"])[0]).values()
    assert kept == sum(layer.weight.nbytes for layer in layers)
    assert gradients(2, release_gradients=True) == gradients(2, release_gradients=True, stagger=True) == gradients(2) == kept
    assert released == sum(4 * 4 * layer.weight.shape[0] for layer in layers) + max(layer.weight.nbytes for layer in layers)


@pytest.mark.parametrize("release", [False, True])
def test_a_gradient_that_is_zero_or_no_number_is_not_counted_as_captured(release):
    V, W = nn.Parameter(torch.zeros(8, 6)), nn.Parameter(torch.zeros(8, 6))
    optimizer = SubspaceAdamW([{"params": [p], "rank": 2, "refresh_gap": 1, "release": release} for p in (V, W)], lr=1e-3)
    optimizer.track_captured = True
    G = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    for step in range(22):  # the best there is is looked for in choices 0, 10, of W, and 20
        factor = {1: 0.0, 10: float("nan"), 21: float("inf")}.get(step, 1.0)
        ((V * G).sum() + (W * G * factor).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert 0 < optimizer.captured <= 1 + 1e-6, step


def test_a_reload_decides_when_directions_are_chosen():
    def make(gap):
        return SubspaceAdamW([{"params": [W], "rank": 2, "refresh_gap": gap, "release": True}], lr=1e-3)

    W = nn.Parameter(torch.zeros(8, 6))
    state = make(100).state_dict()
    optimizer, bases = make(1), []
    optimizer.load_state_dict(state)
    for t in range(3):
        (W * torch.randn(8, 6, generator=torch.Generator().manual_seed(t))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        bases.append(optimizer.state[W]["basis"].clone())
    assert torch.equal(bases[0], bases[2])


def test_clipping_counts_gradients_of_which_only_the_norm_is_left():
    G = [torch.full((3, 4), 2.0), torch.full((2, 2), 1.0)]
    norm, norms = (12 * 4 + 4) ** 0.5, [torch.linalg.vector_norm(g) for g in G]
    assert clip_factor(G, 1.0) == clip_factor(G[:1], 1.0, norms[1:]) == clip_factor([], 1.0, norms) == pytest.approx(1 / (norm + 1e-6), rel=1e-6)
    assert clip_factor([], 1.0) == clip_factor([], None, norms) == 1.0

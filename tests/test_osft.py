"""OSFT. Its factor form (optim/reference.py) is held to recorded runs of it: in fp64, of mini_trainer and of PEFT's OSF, two tasks of 20 steps on three linear layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import forgetless as fl
from forgetless import models
from forgetless.errors import ConfigError
from forgetless.lineage import load_memory
from forgetless.methods import get
from forgetless.methods.base import Memory
from forgetless.models import linear_modules
from forgetless.optim import SubspaceAdamW
from forgetless.optim.reference import ReferenceFactors
from forgetless.subspace import Subspace

GOLDEN = Path(__file__).parent / "golden" / "osft"
SAYS = json.loads((GOLDEN / "golden.json").read_text())
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=5e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0),
}


def train(dtype: torch.dtype, optimizer: str, reproject: bool):
    """({key of the golden file: dense weight}, losses) of the recorded problem: tall, square and wide layers, half frozen, then three quarters."""
    problem = {k: v.to(dtype) for k, v in load_file(GOLDEN / "problem.safetensors").items()}
    W = {name: problem[f"{name}.weight"] for name in SAYS["shapes_out_in"]}
    seen, losses = {}, []
    for task, fraction in enumerate(SAYS["frozen_fraction_per_task"]):
        x, y = problem[f"task{task}.x"], problem[f"task{task}.y"]
        layers = {name: ReferenceFactors(w, int(min(w.shape) * fraction)) for name, w in W.items()}
        opt = OPTIMIZERS[optimizer]([t for layer in layers.values() for t in (layer.U, layer.S, layer.V)])
        for step in range(1, SAYS["steps_per_task"] + 1):
            l1, l2, l3 = (layer.weight() for layer in layers.values())
            loss = torch.nn.functional.mse_loss(torch.tanh(torch.tanh(x @ l1.mT) @ l2.mT + problem["l2.bias"]) @ l3.mT, y)
            losses.append(loss.item())
            opt.zero_grad()
            loss.backward()
            for layer in layers.values():
                layer.project_gradients()
            opt.step()
            for layer in layers.values() if reproject else ():
                layer.project_parameters()
            if step in (1, SAYS["steps_per_task"]):
                seen |= {f"t{task}.{name}.W_step{step}": layer.weight().detach() for name, layer in layers.items()}
        W = {name: layer.weight().detach() for name, layer in layers.items()}
    return seen, losses


@pytest.mark.parametrize("run", SAYS["runs"])
def test_the_factor_form_is_that_of_the_recorded_runs(run):
    who, optimizer, *rest = run.split("_")
    dtype, atol = (torch.float64, 1e-10) if who == "ref64" else (torch.float32, 2e-5)
    seen, losses = train(dtype, optimizer, "paramproj" in rest)
    golden = load_file(GOLDEN / SAYS["runs"][run]["file"])
    assert len(seen) == 12
    for key, W in seen.items():
        torch.testing.assert_close(W, golden[key], atol=atol, rtol=0)
    assert losses == pytest.approx(SAYS["runs"][run]["loss"], abs=max(atol / 10, 1e-10))


@pytest.mark.parametrize(("optimizer", "reproject", "leaks"), [("sgd", False, False), ("adamw", True, False), ("adamw", False, True)])
def test_without_reprojection_adam_puts_a_quarter_of_the_update_where_it_must_not_be(optimizer, reproject, leaks):
    W = load_file(GOLDEN / "problem.safetensors")
    seen, _ = train(torch.float64, optimizer, reproject)
    for name in SAYS["shapes_out_in"]:
        start = W[f"{name}.weight"]
        closed = ReferenceFactors(start, min(start.shape) // 2)
        dW = seen[f"t0.{name}.W_step20"] - start
        inside = dW - closed.U_high @ (closed.U_high.mT @ dW)
        inside -= (inside @ closed.V_high.mT) @ closed.V_high
        share = float((dW - inside).norm() / dW.norm())
        assert 0.2 < share < 0.35 if leaks else share < 1e-11


# -- the method --------------------------------------------------------------------------------------------------------------------------


def matrices(*shapes):
    """A module whose linear layers have these (out, in) shapes, in fp64."""
    torch.manual_seed(0)
    return torch.nn.ModuleDict({f"l{i}": torch.nn.Linear(n, m, bias=False, dtype=torch.float64) for i, (m, n) in enumerate(shapes)})


SHAPES = ((12, 12), (20, 12), (12, 20))


def stepped(block, *, shapes=SHAPES, **options):
    """{name: (W before, dW, U_h, V_h)} after a few steps of the method's optimizer."""
    model = matrices(*shapes)
    method = get("osft", block=block, **options)
    before = {name: layer.weight.detach().clone() for name, layer in model.items()}
    opt = SubspaceAdamW(method.param_groups(method.begin_task(model, None, Memory())), lr=1e-2)
    for seed in range(5):
        for i, layer in enumerate(model.values()):
            layer.weight.grad = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(seed * 10 + i), dtype=torch.float64)
        opt.step()
    found = {}
    for name, layer in model.items():
        U, _, Vh = torch.linalg.svd(before[name], full_matrices=False)
        k = method.frozen(name, min(before[name].shape), 0)
        found[name] = before[name], layer.weight.detach() - before[name], U[:, :k], Vh[:k].mT
    return found


def test_low_low_closes_each_side_and_nothing_more():
    for W, dW, U, V in stepped("low_low").values():
        assert max((U.mT @ dW).norm(), (dW @ V).norm()) < 1e-12 * dW.norm()
        free = (W.shape[0] - U.shape[1]) * (W.shape[1] - V.shape[1])  # every permitted direction learns, those of the longer side too
        assert torch.linalg.matrix_rank(dW) == min(W.shape[0] - U.shape[1], W.shape[1] - V.shape[1])
        steps = torch.stack(
            [
                (torch.eye(W.shape[0]).double() - U @ U.mT) @ torch.randn(W.shape, dtype=torch.float64) @ (torch.eye(W.shape[1]).double() - V @ V.mT)
                for _ in range(free + 2)
            ]
        )
        assert torch.linalg.matrix_rank(steps.flatten(1)) == free


def test_paper_closes_only_the_block_of_both():
    for _, dW, U, V in stepped("paper").values():
        assert (U.mT @ dW @ V).norm() < 1e-12 * dW.norm()
        assert min((U.mT @ dW).norm(), (dW @ V).norm()) > 0.1 * dW.norm()


def test_a_longer_side_stays_whole():
    """Thin factors would reach only the span of U: of a tall matrix, the 8 other output directions must learn too."""
    ((W, dW, U, V),) = stepped("low_low", shapes=((20, 12),)).values()
    outside = torch.linalg.qr(torch.linalg.svd(W, full_matrices=True).U[:, 12:]).Q
    assert (outside.mT @ dW).norm() > 0.3 * dW.norm()


@pytest.mark.parametrize(
    ("options", "k"),
    [
        ({}, [6, 6, 6]),
        ({"frozen_ratio": 0.3}, [3, 3, 3]),
        ({"frozen_ratio": 0}, [0, 0, 0]),
        ({"frozen_ratio": 5}, [5, 5, 5]),
        ({"frozen_ratio": {"l0": 2, "l[01]": 0.75, ".*": 0.0}}, [2, 9, 0]),
    ],
    ids=str,
)
def test_frozen_ratio(options, k):
    method = get("osft", **options)
    assert [method.frozen(f"l{i}", 12, 0) for i in range(3)] == k
    assert [V.shape[1] for _, _, _, V in stepped("low_low", **options).values()] == k


def test_the_schedule_goes_up_by_one_nth_a_task_and_stays_there():
    method, memory = get("osft", frozen_ratio="schedule", tasks=4), Memory()
    model, ranks = matrices((12, 12)), []
    for _ in range(6):
        method.begin_task(model, None, memory)
        ranks.append(method.parts["l0"][0].inputs.shape[1])
        method.end_task(model, None, memory)
    assert ranks == [0, 3, 6, 9, 9, 9]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"frozen_ratio": 1.0}, "1.0 is no share"),
        ({"frozen_ratio": -0.1}, "-0.1 is no share"),
        ({"frozen_ratio": -1}, "-1 directions"),
        ({"frozen_ratio": True}, "frozen_ratio"),
        ({"frozen_ratio": "adaptve"}, "frozen_ratio"),
        ({"frozen_ratio": {"(": 0.5}}, "no regular expression"),
        ({"frozen_ratio": {".*": 1.5}}, "1.5 is no share"),
        ({"frozen_ratio": "schedule"}, "tasks: N"),
        ({"tasks": 3}, "tasks: N"),
        ({"block": "low_high"}, "low_low"),
        ({"frozen_ration": 0.5}, "frozen_ratio"),
        ({"frozen_ratio": 12}, "nothing would be left to train"),
        ({"frozen_ratio": {"l0": 0.5}}, "no pattern that matches l1"),
        ({"target_modules": ["l9"]}, "matches no linear layer"),
        ({"protect": "inputs", "frozen_ratio": 0.5}, "mean nothing"),
        ({"protect_energy": 0.5}, "mean nothing"),
        ({"protect": "both", "block": "paper"}, "block: paper leaves"),
        ({"protect": "both", "frozen_ratio": 11, "max_share": 0.5}, "no room for inputs"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_cannot_be_is_refused_before_anything_begins(options, says):
    with pytest.raises(ConfigError, match=says):
        get("osft", **options).check(matrices(*SHAPES))


# -- protection that knows the data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protect", ["inputs", "both"])
def test_the_second_task_leaves_the_inputs_of_the_first_alone(protect, small_run):
    path = fl.run(small_run({"name": "osft", "protect": protect}, tasks=("colour", "animal"))).path / "tasks"
    spaces = {k.removesuffix(".basis"): V.double() for k, V in load_memory(path / "00-colour" / "state").tensors.items() if k.endswith(".basis")}
    first, second = (linear_modules(models.load(str(path / n / "model"))[0]) for n in ("00-colour", "01-animal"))
    assert spaces.keys() == first.keys()
    for name, S in spaces.items():
        W = first[name].weight.detach().double()
        dW = second[name].weight.detach().double() - W
        rounding = 2.0**-24 * 6**0.5 * W.norm()
        assert 0 < S.shape[1] <= 0.75 * W.shape[1] and dW.norm() > 0  # max_share
        if protect == "inputs":  # beside the spectrum there may not be room for all of it
            assert (dW @ S).norm() <= 1e-4 * dW.norm() + rounding
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        k = min(W.shape) // 2
        if protect == "both":
            assert max((dW @ Vh[:k].mT).norm(), (U[:, :k].mT @ dW).norm()) <= 1e-4 * dW.norm() + rounding
        else:  # the spectrum is free
            assert (dW @ Vh[:k].mT).norm() > 0.1 * dW.norm()


def test_weights_and_inputs_together_never_close_everything():
    """Beside half of the spectrum there is room for a quarter of the directions: those that carry most of the inputs' energy outside it."""
    method = get("osft", protect="both")
    W = matrices((12, 12))["l0"].weight.detach()
    V = torch.linalg.svd(W).Vh.mT
    energy = torch.tensor([5.0, 9.0, 1.0, 3.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    S = Subspace(torch.stack([V[:, i] for i in (0, 1, 7, 8, 9, 10, 11)], 1), energy)  # the first two are closed already
    constraint, (U_low, V_low) = method.part(W, 6, S)
    assert constraint.inputs.shape[1] == 9 and V_low.shape[1] == 3 and U_low.shape[1] == 6
    for i, closed in ((8, True), (10, True), (11, True), (7, False), (9, False)):
        assert float((constraint.inputs.mT @ V[:, i]).norm()) == pytest.approx(float(closed), abs=1e-10)
    assert float((constraint.inputs.mT @ V_low).norm()) < 1e-12


def test_spaces_of_inputs_grow_from_task_to_task_within_their_bound(small_run, caplog):
    method = {"name": "osft", "protect": "inputs", "protect_energy": 0.99, "max_share": 0.2}
    path = fl.run(small_run(method, tasks=("colour", "animal"))).path / "tasks"
    one, two = ({k: V for k, V in load_memory(path / n / "state").tensors.items() if k.endswith(".basis")} for n in ("00-colour", "01-animal"))
    assert all(V.shape[1] <= 0.2 * V.shape[0] for V in two.values()) and "given up" in caplog.text
    assert sum(V.shape[1] for V in two.values()) >= sum(V.shape[1] for V in one.values()) > 0


def test_protect_from_closes_inputs_where_osft_looks_at_inputs(small_run, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"text": "cat dog bird"}\n{"text": "happy sad"}\n')
    config = small_run({"name": "osft", "protect": "inputs"}, tasks=("colour",), protect_from=str(tmp_path / "prompts.jsonl"))
    timing = (fl.run(config).path / "timing.jsonl").read_text().splitlines()
    assert json.loads(timing[-1])["update_leak"] < 1e-5  # measured: something was closed in the first task
    with pytest.raises(ConfigError, match="protect: inputs"):
        fl.run(config | {"method": {"name": "osft"}, "output_dir": str(tmp_path / "other")})

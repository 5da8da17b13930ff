"""OSFT. Its factor form (optim/reference.py) is held to recorded runs of it: in fp64, of mini_trainer and of PEFT's OSF, two tasks of 20 steps on three linear layers."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path

import pytest
import torch
from conftest import make_model_folder
from safetensors.torch import load_file
from torch import nn

import forgetless as fl
from forgetless import models
from forgetless.errors import ConfigError
from forgetless.lineage import load_memory
from forgetless.methods import get
from forgetless.methods.base import Memory
from forgetless.models import linear_modules
from forgetless.optim import SubspaceAdamW
from forgetless.optim.reference import ReferenceFactors
from forgetless.optim.released import keep
from forgetless.optim.released import release as read_within_backward
from forgetless.subspace import Subspace
from forgetless.subspace_linear import SubspaceLinear
from forgetless.tasks import Example, Task

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
        k = method.frozen(model, name, min(before[name].shape), Memory())
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
        ({"protect": "weights"}, [6, 6, 6]),
        ({"frozen_ratio": 0.3}, [3, 3, 3]),
        ({"frozen_ratio": 0}, [0, 0, 0]),
        ({"frozen_ratio": 5}, [5, 5, 5]),
        ({"frozen_ratio": {"l0": 2, "l[01]": 0.75, ".*": 0.0}}, [2, 9, 0]),
    ],
    ids=str,
)
def test_frozen_ratio(options, k):
    method = get("osft", **options)
    assert [method.frozen(matrices(*SHAPES), f"l{i}", 12, Memory()) for i in range(3)] == k
    assert [V.shape[1] for _, _, _, V in stepped("low_low", **options).values()] == k


def test_the_schedule_goes_up_by_one_nth_a_task_and_stays_there():
    method, memory = get("osft", frozen_ratio="schedule", tasks=4), Memory()
    model, ranks = matrices((12, 12)), []
    for _ in range(6):
        method.begin_task(model, None, memory)
        ranks.append(method.parts["l0"].closed_inputs().shape[1])
        method.end_task(model, None, memory)
    assert ranks == [0, 3, 6, 9, 9, 9]


@pytest.mark.parametrize(
    ("options", "protects"),
    [
        ({}, "inputs"),
        ({"protect_energy": 0.5, "max_share": 0.5, "form": "coordinates", "thin": False, "release_gradients": False}, "inputs"),
        ({"protect": "both"}, "both"),
        ({"protect": "inputs", "form": "adapter"}, "inputs"),
        ({"frozen_ratio": 0.5}, "weights"),
        ({"block": "low_low"}, "weights"),
        ({"remember": "union"}, "weights"),
        ({"form": "adapter"}, "weights"),
        ({"release_gradients": True}, "weights"),
    ],
    ids=str,
)
def test_what_is_protected_where_nobody_says(options, protects):
    """Inputs, unless something is said of the weights' directions; spelt out in run.yaml, so that it stays so."""
    found = get("osft", **options).options
    assert found.protect == protects and type(found)(**found.model_dump()) == found


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
        ({"protect": "inputs", "frozen_ratio": 0.6}, "mean nothing"),
        ({"protect": "weights", "protect_energy": 0.5}, "means nothing"),
        ({"frozen_ratio": "adaptive"}, "finds no blocks"),
        ({"protect": "weights", "max_share": 0.5}, "means nothing"),
        ({"min_ratio": 0.5}, "adaptive only"),
        ({"remember": "union", "protect": "inputs"}, "mean nothing"),
        ({"form": "adapter", "block": "paper"}, "no form: adapter"),
        ({"thin": True}, "form: adapter only"),
        ({"thin": True, "form": "adapter", "protect": "inputs"}, "where directions of the weights are closed"),
        ({"frozen_ratio": "adaptive", "target_ratio": 0.05}, "below min_ratio"),
        ({"release_gradients": True, "form": "adapter"}, "needs fixed coordinates"),
        ({"release_gradients": True, "block": "paper"}, "needs fixed coordinates"),
        ({"remember": "union", "max_share": 0.3}, "leaves no room"),
        ({"protect": "both", "block": "paper"}, "block: paper leaves"),
        ({"protect": "both", "frozen_ratio": 11, "max_share": 0.5}, "leaves no room"),
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
    part = method.part(W, 6, S=S)
    closed, (U_low, V_low) = part.closed_inputs(), part.directions
    assert closed.shape[1] == 9 and V_low.shape[1] == 3 and U_low.shape[1] == 6
    for i, inside in ((8, 1), (10, 1), (11, 1), (7, 0), (9, 0)):
        assert float((closed.mT @ V[:, i]).norm()) == pytest.approx(inside, abs=1e-10)
    assert float((closed.mT @ V_low).norm()) < 1e-12


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
        fl.run(config | {"method": {"name": "osft", "protect": "weights"}, "output_dir": str(tmp_path / "other")})


# -- forms ---------------------------------------------------------------------------------------------------------------------------------


def trained(steps=12, rounds=2, micro=1, rows=16, shapes=SHAPES, own=True, **options):
    """The model after so many tasks of so many steps on a regression, its leaks, and the method and memory that made it. own: by the method's own optimizer."""
    model, memory, leaks = Chain(shapes), Memory(), []
    method = get("osft", **{"protect": "weights"} | options)
    for task in range(rounds):
        method.begin_task(model, None, memory)
        settings = dict(lr=1e-2, weight_decay=0.1, max_grad_norm=0.5)
        groups = method.param_groups(model)
        optimizer = method.optimizer(groups, **settings) if own else SubspaceAdamW([g | {"release": True} for g in groups], **settings)
        for step in range(steps):
            optimizer.zero_grad()
            for part in range(micro):
                g = torch.Generator().manual_seed(1000 * task + 10 * step + part)
                x, y = (torch.randn(rows, n, generator=g, dtype=torch.float64) for n in (shapes[0][1], shapes[-1][0]))
                ((model(x) - y) ** 2).mean().div(micro).backward()
            optimizer.step()
        method.end_task(model, None, memory)
        leaks.append(method.merge_leak)
    return model, leaks, method, memory


class Chain(torch.nn.Module):
    """Linear layers of these (out, in) shapes one after another, in fp64."""

    def __init__(self, shapes):
        super().__init__()
        self.l = matrices(*shapes)

    def forward(self, x):
        for layer in self.l.values():
            x = torch.tanh(layer(x))
        return x


FITTING = ((20, 12), (12, 20), (12, 12))  # tall, wide, square: each takes what the one before gives


@pytest.mark.parametrize(
    "options",
    [{}, {"frozen_ratio": 3}, {"frozen_ratio": "schedule", "tasks": 3}, {"remember": "union"}, {"frozen_ratio": 0}],
    ids=str,
)
def test_both_forms_take_the_same_steps(options):
    """With weight decay and clipping, over two tasks: the adapter is W's change written in the coordinates."""
    one, none, *_ = trained(shapes=FITTING, **options)
    two, leaks, *_ = trained(shapes=FITTING, form="adapter", **options)
    start = Chain(FITTING)
    for (name, a), b, w in zip(one.state_dict().items(), two.state_dict().values(), start.state_dict().values(), strict=True):
        assert (a - w).norm() > 0.05 * w.norm(), name
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    assert (
        none == [None, None] and all(e is None or e["leak"] <= e["bound"] for e in leaks) and (leaks[1]["leak"] > 0 or options == {"frozen_ratio": 0})
    )  # nothing is closed


@pytest.mark.parametrize("options", [{"protect": "inputs"}, {"protect": "both"}, {"protect": "both", "frozen_ratio": 0}], ids=str)
def test_both_forms_take_the_same_steps_where_inputs_are_closed(options):
    known = torch.linalg.qr(torch.randn(20, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    found = []
    for form in ("coordinates", "adapter"):
        model, method, memory = Chain(FITTING), get("osft", form=form, **options), Memory()
        for name, layer in linear_modules(model).items():
            basis = torch.linalg.qr(known[: layer.weight.shape[1], :3])[0]
            memory.keep({name: Subspace(basis, torch.ones(3, dtype=torch.float64))})
        method.begin_task(model, None, memory)
        optimizer = method.optimizer(method.param_groups(model), lr=1e-2)
        for seed in range(6):
            x, y = (torch.randn(16, 12, generator=torch.Generator().manual_seed(10 * seed + i), dtype=torch.float64) for i in (0, 1))
            optimizer.zero_grad()
            ((model(x) - y) ** 2).mean().backward()
            optimizer.step()
        keep(model)
        method.merge(model)
        for name, layer in linear_modules(model).items():
            D = layer.weight.detach() - Chain(FITTING).get_submodule(name).weight.detach()
            assert (D @ memory.spaces()[name].basis).norm() < 1e-12 * D.norm()
        found.append(model.state_dict())
    for a, b in zip(found[0].values(), found[1].values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_an_adapter_on_a_bf16_layer_learns_in_fp32_and_is_rounded_once():
    model, method = Chain(SHAPES[:1]).to(torch.bfloat16), get("osft", form="adapter")
    method.begin_task(model, None, Memory())
    layer = model.l["l0"]
    assert layer.C.dtype == layer.P.dtype == torch.float32
    W = layer.base_layer.weight.detach().clone()
    with torch.no_grad():
        layer.C.fill_(1e-3)
    merged = (W.float() + layer.delta()).bfloat16()
    assert model(torch.randn(2, 12).bfloat16()).dtype == torch.bfloat16
    method.merge(model)
    assert torch.equal(model.l["l0"].weight, merged) and method.merge_leak["leak"] < 1e-5  # of what was merged, before it is rounded


def test_an_adapter_needs_a_task_begun_and_a_layer_with_a_forward_of_its_own_keeps_it():
    with pytest.raises(ConfigError, match="begin_task first"):
        get("osft", form="adapter").param_groups(Chain(SHAPES))

    class Twice(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = torch.nn.ModuleDict({"a": Twice(12, 12, bias=False, dtype=torch.float64)})
    method, x = get("osft", protect="weights"), torch.randn(3, 12, dtype=torch.float64)
    before = model["a"](x)
    method.begin_task(model, None, Memory())
    optimizer = method.optimizer(method.param_groups(model), lr=1e-2)
    y = model["a"](x)
    assert torch.equal(before, y)
    y.sum().backward()
    assert model["a"].weight.grad is None and len(optimizer._released) == 1  # by the hook


def test_what_has_no_room_is_said_and_counted(caplog):
    model, method, memory = Chain(((64, 64),)), get("osft", remember="union", max_share=0.6), Memory()
    for seed in range(2):
        torch.nn.init.normal_(model.l["l0"].weight, generator=torch.Generator().manual_seed(seed))
        method.begin_task(model, None, memory)
        assert bool(caplog.records) == (seed == 1)
        method.end_task(model, None, memory)
    assert method.report(memory)["evicted"] == 2 * (32 - 6) and "no room for 52 directions" in caplog.text


def test_an_adapter_is_off_the_model_after_its_task_and_what_it_learned_is_in_the_weights():
    model, *_ = trained(rounds=1, form="adapter")
    assert [type(layer) for layer in model.l.values()] == [torch.nn.Linear] * 3 and all(p.requires_grad for p in model.parameters())
    assert not torch.equal(model.l["l0"].weight, Chain(SHAPES).l["l0"].weight)


def test_an_adapter_forms_no_gradient_of_the_weight_and_keeps_small_state():
    model, method = Chain(((12, 12),)), get("osft", form="adapter", frozen_ratio=0.75)
    method.begin_task(model, None, Memory())
    optimizer = SubspaceAdamW(method.param_groups(model), lr=1e-2)
    model(torch.randn(4, 12, dtype=torch.float64)).sum().backward()
    optimizer.step()
    layer = model.l["l0"]
    assert layer.base_layer.weight.grad is None and layer.C.shape == layer.C.grad.shape == (3, 3)
    assert optimizer.state_bytes() == 2 * 9 * 8 + 4


def test_a_layer_under_two_names_has_one_adapter_under_both():
    model, method = torch.nn.ModuleDict({"a": matrices((12, 12))["l0"]}), get("osft", form="adapter")
    model["b"] = model["a"]
    method.begin_task(model, None, Memory())
    assert model["a"] is model["b"]
    torch.nn.init.ones_(model["a"].C)
    x = torch.randn(3, 12, dtype=torch.float64)
    y = model["b"](model["a"](x))
    method.merge(model)
    assert model["a"] is model["b"] and type(model["a"]) is torch.nn.Linear
    torch.testing.assert_close(model["b"](model["a"](x)), y)


def test_thin_keeps_the_change_within_the_singular_directions():
    for shape in ((20, 12), (12, 20)):
        start = Chain((shape,)).l["l0"].weight.detach()
        U, _, Vh = torch.linalg.svd(start, full_matrices=False)
        whole, thin = (
            trained(rounds=1, shapes=(shape,), form="adapter", **options)[0].l["l0"].weight.detach() - start for options in ({}, {"thin": True})
        )
        outside = [(D - U @ (U.mT @ D @ Vh.mT) @ Vh).norm() / D.norm() for D in (whole, thin)]
        assert outside[0] > 0.3 and outside[1] < 1e-10
        assert max((U[:, :6].mT @ thin).norm(), (thin @ Vh[:6].mT).norm()) < 1e-10 * thin.norm()


# -- gradients let go ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("rows", [3, 8, 100])  # what is closed taken off the rows; R through P and Q first; through a gradient that is let go
def test_released_gradients_give_the_same_steps(micro, rows):
    kept, within, after = (
        trained(shapes=FITTING, micro=micro, rows=rows, release_gradients=r, own=own)[0].state_dict()
        for r, own in ((False, True), (True, True), (True, False))
    )
    for a, b, c in zip(kept.values(), within.values(), after.values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
        torch.testing.assert_close(a, c, atol=0 if micro == 1 else 1e-12, rtol=0)


@pytest.mark.parametrize("tokens", [1, 5, 60])
@pytest.mark.parametrize("sides", ["both", "outputs", "inputs"])
def test_a_gradient_read_in_coordinates_is_the_gradient_in_coordinates(tokens, sides):
    from forgetless.optim.released import read

    X, dY = torch.randn(tokens, 9).double(), torch.randn(tokens, 7).double()
    P, Q = (None if sides == other else torch.linalg.qr(torch.randn(n, 4).double())[0] for n, other in ((7, "inputs"), (9, "outputs")))
    G = dY.mT @ X
    expected = G if Q is None else G @ Q
    torch.testing.assert_close(read(dY, X, P, Q), expected if P is None else P.mT @ expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_whose_layers_release_their_gradients_computes_what_it_did(kind, autocast, tmp_path):
    """Outputs, the gradients that go on to earlier layers, and R; biases and transposed weights with them; under checkpointed activations too."""
    from forgetless.batches import Collate, answer_loss

    model, tokenizer = models.load(make_model_folder(tmp_path / "m", kind=kind))
    method, seen = get("osft", protect="weights"), []
    method.begin_task(model, None, Memory())
    task = Task("t", "{sentence}", [], [], [])
    batch = Collate(model)([task.encode(tokenizer, Example(s, "red", 0)) for s in ("cat red dog", "happy")])
    for release in (False, True, "checkpointed") if kind == "llama" else (False, True):  # the others drop out where they train
        groups = method.param_groups(model)
        optimizer = method.optimizer(groups, lr=1e-3) if release else SubspaceAdamW(groups, lr=1e-3)
        if release == "checkpointed":
            model.gradient_checkpointing_enable()
            model.train()
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = answer_loss(model, dict(batch), None)
        loss.backward()
        embedding = model.get_input_embeddings().weight.grad.clone()
        R = [(optimizer._released[p] if release else optimizer._gradient(g, p, 0)).clone() for g in optimizer.param_groups for p in g["params"]]
        assert not release or all(p.grad is None for g in optimizer.param_groups for p in g["params"])
        seen.append([loss.detach(), embedding, *R])
    keep(model)
    assert not any("forward" in module.__dict__ for module in model.modules() if isinstance(module, torch.nn.Linear))
    for other in seen[1:]:
        for a, b in zip(seen[0], other, strict=True):
            assert (a - b).norm() <= (0.03 if autocast else 1e-5) * a.norm() + 1e-7


def test_a_copy_of_a_model_whose_gradients_are_released_computes_with_its_own_weights():
    model, method = Chain(SHAPES[:1]), get("osft", protect="weights")
    method.begin_task(model, None, Memory())
    optimizer = method.optimizer(method.param_groups(model), lr=1e-2)
    again = copy.deepcopy(model)
    with torch.no_grad():
        again.l["l0"].weight.zero_()
    x = torch.randn(4, 12, dtype=torch.float64)
    assert again(x).abs().sum() == 0 and model(x).abs().sum() > 0
    again(x).sum().backward()
    assert list(optimizer._released) == [again.l["l0"].weight]  # which it does not train
    before = model.l["l0"].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model.l["l0"].weight, before)


def test_a_released_gradient_is_gone_before_the_next_one_is_there():
    shapes = ((12, 12),) * 4
    model, method = Chain(shapes), get("osft", protect="weights")
    method.begin_task(model, None, Memory())
    optimizer, alive = SubspaceAdamW([g | {"release": True} for g in method.param_groups(model)], lr=1e-2), []
    for p in model.parameters():  # after the optimizer's own hooks, which come first
        p.register_post_accumulate_grad_hook(lambda _: alive.append(sum(q.grad is not None for q in model.parameters())))
    model(torch.randn(4, 12, dtype=torch.float64)).sum().backward()
    assert alive == [0, 0, 0, 0]
    before = model.l["l0"].weight.detach().clone()
    optimizer.zero_grad()  # also what has been read of them
    optimizer.step()
    assert torch.equal(before, model.l["l0"].weight)
    del optimizer
    model(torch.randn(4, 12, dtype=torch.float64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())  # the hooks ended with it


# -- what is remembered of the weights -------------------------------------------------------------------------------------------------------


def test_union_closes_what_earlier_tasks_had_closed_and_spectrum_does_not():
    """After the first task the weights are replaced by others: a fresh decomposition knows nothing of what was there."""
    shape, leak = ((12, 12),), {}
    for remember in ("spectrum", "union"):
        options = {"frozen_ratio": 4, "remember": remember}
        model, method, memory = Chain(shape), get("osft", **options), Memory()
        layer = model.l["l0"]
        first = torch.linalg.svd(layer.weight.detach())
        method.begin_task(model, None, memory)
        method.end_task(model, None, memory)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(12, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
        start, second = layer.weight.detach().clone(), torch.linalg.svd(layer.weight.detach())
        method.begin_task(model, None, memory)
        optimizer = SubspaceAdamW(method.param_groups(model), lr=1e-2)
        layer.weight.grad = torch.randn(12, 12, dtype=torch.float64)
        optimizer.step()
        D = layer.weight.detach() - start
        assert max((second.U[:, :4].mT @ D).norm(), (D @ second.Vh[:4].mT).norm()) < 1e-12 * D.norm()
        leak[remember] = float(max((first.U[:, :4].mT @ D).norm(), (D @ first.Vh[:4].mT).norm()) / D.norm())
    assert leak["union"] < 1e-12 and leak["spectrum"] > 0.3


@pytest.mark.parametrize("block", ["low_low", "paper"])
def test_union_is_capped_and_gives_up_what_has_least_energy(block):
    model, method, memory = Chain(FITTING), get("osft", frozen_ratio=0.5, remember="union", max_share=0.6, block=block), Memory()
    for task in range(4):
        for layer in model.l.values():
            torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(task))
        method.begin_task(model, None, memory)
        method.end_task(model, None, memory)
    for kind, sides in (("outputs", (20, 12, 12)), ("inputs", (12, 20, 12))):
        spaces = memory.spaces(kind)
        for space, side in zip(spaces.values(), sides, strict=True):
            assert space.rank == int(0.6 * side)
            assert float((space.basis.mT @ space.basis - torch.eye(space.rank, dtype=torch.float64)).abs().max()) < 1e-10
    method = get("osft", remember="union", frozen_ratio=2, max_share=0.5)  # of the five earlier directions two have room: the strongest
    W = torch.diag(torch.arange(8.0, 0, -1, dtype=torch.float64))
    known = Subspace(torch.eye(8, dtype=torch.float64)[:, [0, 3, 4, 5, 6]], torch.tensor([9.0, 1.0, 3.0, 2.0, 0.5], dtype=torch.float64))
    part = method.part(W, 2, known, known)
    closed = part.closed_inputs()
    assert closed.shape[1] == 4 and float((closed.mT @ torch.eye(8, dtype=torch.float64)[:, [0, 1, 4, 5]]).norm()) == pytest.approx(2)
    total = float((W**2).sum())
    assert part.closed[1].energy[0] == pytest.approx(64 / total + 9)  # what it holds of this weight, beside what it held


def test_without_earlier_tasks_union_and_spectrum_are_the_same():
    for a, b in zip(*(trained(rounds=1, remember=r)[0].state_dict().values() for r in ("spectrum", "union")), strict=True):
        assert torch.equal(a, b)


# -- a share by importance -------------------------------------------------------------------------------------------------------------------


def test_adaptive_closes_more_of_what_leaves_its_inputs_as_they_are():
    method = get("osft", frozen_ratio="adaptive", min_ratio=0.1, target_ratio=0.6)
    memory = Memory()
    assert method.adaptive("a", memory) == pytest.approx(0.6)  # nothing measured: every block as the mean one
    memory.info["importance"] = {"a": 0.9, "b": 0.6, "c": -0.3, "d": 2.8}
    assert [method.adaptive(b, memory) for b in "abcd"] == pytest.approx([0.1 + 0.9 * 0.5, 0.1 + 0.6 * 0.5, 0.1, 0.95])
    assert method.adaptive(None, memory) == pytest.approx(0.6)  # in no block


def test_importance_is_measured_on_the_task_just_learned(small_run, tmp_path):
    from forgetless.importance import block_importance, block_of

    config = small_run({"name": "osft", "frozen_ratio": "adaptive"}, tasks=("colour", "animal"))
    path = fl.run(config).path / "tasks"
    info = load_memory(path / "00-colour" / "state").info["importance"]
    model, tokenizer = models.load(str(path / "00-colour" / "model"))
    names = list(linear_modules(model))
    assert {block_of(model, name) for name in names} == set(info) == {f"model.layers.{i}" for i in range(len(model.model.layers))}
    text = "cat red"
    x = tokenizer(text, return_tensors="pt")
    hidden = model(**x, output_hidden_states=True).hidden_states  # the last one is after the final norm
    found = block_importance(model, names, [x.input_ids[0].tolist()])
    assert found["model.layers.0"] == pytest.approx(torch.nn.functional.cosine_similarity(hidden[0], hidden[1], dim=-1).mean().item(), abs=1e-5)
    rows = [[5, 6, 7], [8, 9, 10, 11, 12], [7, 5, 6]]  # several at a time, every token counts as much
    each = [block_importance(model, names, [row]) for row in rows]
    for block, mean in block_importance(model, names, rows).items():
        assert mean == pytest.approx(sum(len(row) * one[block] for row, one in zip(rows, each, strict=True)) / 11, abs=1e-6)
    closed = [json.loads((path / task / "metrics.json").read_text())["protection"]["space"]["rank_mean"] for task in ("00-colour", "01-animal")]
    sizes = [min(layer.weight.shape) for layer in linear_modules(model).values()]
    assert closed[0] == sum(int(0.8 * size) for size in sizes) / len(sizes)  # as for mean importance: none was known
    mean = sum(info.values()) / len(info)
    later = {name: int((0.1 + info[block_of(model, name)] / mean * 0.7) * min(layer.weight.shape)) for name, layer in linear_modules(model).items()}
    assert closed[1] == sum(later.values()) / len(later) and len(set(later.values())) > 2


# -- the decomposition's cache -----------------------------------------------------------------------------------------------------------------


def test_a_decomposition_is_found_again_by_its_weights_and_by_nothing_else(tmp_path, caplog, monkeypatch):
    from forgetless import decomposition

    made, split = [], decomposition.split
    monkeypatch.setattr(decomposition, "split", lambda W, k: made.append(k) or split(W, k))
    for shape in SHAPES:
        W = matrices(shape)["l0"].weight.detach()
        one, two = (decomposition.cached_split(W, 6, tmp_path) for _ in range(2))
        assert made == [6] and all(a is b is None or torch.equal(a, b) for a, b in zip(one, two, strict=True))
        decomposition.cached_split(W, 5, tmp_path)
        decomposition.cached_split(W * 1.01, 6, tmp_path)
        assert made == [6, 5, 6] and not caplog.records
        # another weight's file under this one's name, and one that is cut short
        path = tmp_path / f"{decomposition.fingerprint(W, 6)}.safetensors"
        content = path.read_bytes()
        stranger = torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=W.dtype)
        decomposition.cached_split(stranger, 6, tmp_path)
        for bad, says in (
            ((tmp_path / f"{decomposition.fingerprint(stranger, 6)}.safetensors").read_bytes(), "of other weights"),
            (content[:-50], "cannot be read"),
        ):
            path.write_bytes(bad)
            again = decomposition.cached_split(W, 6, tmp_path)
            assert says in caplog.text and all(a is b is None or torch.equal(a, b) for a, b in zip(one, again, strict=True))
            assert path.read_bytes() == content
            caplog.clear()
        made.clear()


@pytest.mark.parametrize("call", [1, 5])  # before the first checkpoint, and after it
def test_a_resumed_task_does_not_decompose_again(call, small_run, monkeypatch):
    from forgetless import decomposition

    made, split = [], decomposition.split
    monkeypatch.setattr(decomposition, "split", lambda W, k: made.append(k) or split(W, k))
    released, release = [], importlib.import_module("forgetless.optim.released").release
    monkeypatch.setattr("forgetless.optim.released.release", lambda layer, optimizer: released.append(layer) or release(layer, optimizer))
    config = small_run({"name": "osft", "protect": "weights"}, tasks=("colour",), checkpoint_every=2)
    with monkeypatch.context() as patch:
        patch.setattr("forgetless.trainer.answer_loss", killed_at(call))
        with pytest.raises(KeyboardInterrupt):
            fl.run(config)
    first = len(made)
    released.clear()  # of the model that was killed
    path = fl.run(config).path
    assert released and first > 0 and len(made) == first and not any("forward" in m.__dict__ for m in released)
    assert not list(path.rglob("scratch"))  # it went with the commit


def killed_at(call):
    import forgetless.trainer as trainer

    calls, real = [], trainer.answer_loss

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    return counted


@pytest.mark.parametrize("sides", ["both", "outputs", "inputs"])
def test_the_gradients_of_an_adapter_are_those_of_its_formula(sides):
    draw = torch.Generator().manual_seed(0)
    P, Q = (torch.linalg.qr(torch.randn(n, k, generator=draw, dtype=torch.float64))[0] for n, k in ((6, 4), (5, 3)))
    layer = SubspaceLinear(nn.Linear(5, 6, dtype=torch.float64), P if sides != "inputs" else None, Q if sides != "outputs" else None)
    layer.C.data = torch.randn(layer.C.shape, generator=draw, dtype=torch.float64)
    x = torch.randn(2, 7, 5, generator=draw, dtype=torch.float64, requires_grad=True)

    def apply(x, C):
        return torch.func.functional_call(layer, {"C": C}, (x,))

    assert torch.autograd.gradcheck(apply, (x, layer.C))
    (g,) = torch.autograd.grad(apply(x, layer.C).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):  # an error, where wrong numbers would be worse
        g.sum().backward()


@pytest.mark.parametrize("shape", [(64,), (3, 64), (300, 16, 64)])
def test_a_released_layer_gives_its_inputs_their_gradient_in_any_shape(shape):
    layer = nn.Linear(64, 128, bias=False)
    P, Q = torch.linalg.qr(torch.randn(128, 30))[0], torch.linalg.qr(torch.randn(64, 20))[0]
    optimizer = SubspaceAdamW([{"params": [layer.weight], "directions": (P, Q), "release": True}], lr=1e-3)
    x = torch.randn(shape, requires_grad=True)
    layer(x).sum().backward()
    expected = x.grad.clone()
    x.grad, layer.weight.grad = None, None
    optimizer.zero_grad()
    read_within_backward(layer, optimizer)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)
    assert layer.weight.grad is None

"""OSFT. Its factor form (optim/reference.py) is held to recorded runs of it: in fp64, of mini_trainer and of PEFT's OSF, two tasks of 20 steps on three linear layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from forgetless.optim.reference import ReferenceFactors

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

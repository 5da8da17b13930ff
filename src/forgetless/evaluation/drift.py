"""Was the promise kept? Leaks of the weights, and what the layers still do on inputs recorded when each task was learned.

Recorded for each task and linear layer: X (tokens, in), a few input vectors on the task's own training prompts, and Y = W X as it was then. Later:
coverage ||X V||^2 / ||X||^2 says how much of what the task used is protected; ||Y_now - Y|| / ||Y|| how much the layer's answer to it has changed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import Collate, forward
from ..models import linear_modules, logical
from ..optim import coordinates
from ..sharding import ALONE, local
from ..subspace import coverage
from ..tasks import Task

RECORDED_TOKENS = 32


@torch.inference_mode()
def record_inputs(model: nn.Module, tokenizer, task: Task, seed: int, rows: int = 16) -> dict[str, Tensor]:
    """{"<module>.x": (tokens, in) bf16, "<module>.y": (tokens, out) fp32} for every linear layer but the head, on prompts of the task's training rows."""
    from ..tasks import sample

    modules = linear_modules(model)
    kept: dict[str, list[Tensor]] = {name: [] for name in modules}
    generator = torch.Generator().manual_seed(seed)
    chosen = sample(task.train, rows, seed)
    per_row = math.ceil(RECORDED_TOKENS / len(chosen))
    pick: dict[int, Tensor] = {}  # by number of tokens: an encoder and its decoder read different ones

    def hook(name: str):
        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            X = args[0].detach().reshape(-1, args[0].shape[-1])
            if X.shape[0] not in pick:
                pick[X.shape[0]] = torch.randperm(X.shape[0], generator=generator)[:per_row]
            kept[name].append(X[pick[X.shape[0]].to(X.device)].to("cpu", torch.bfloat16))

        return record

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    device = next(model.parameters()).device
    collate, was_training = Collate(model), model.training
    model.eval()  # with dropout on, what is recorded would be noise
    try:
        for example in chosen:
            pick.clear()
            forward(model, {k: v.to(device) for k, v in collate([task.encode(tokenizer, example)]).items()}, logits_to_keep=1)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    out = {}
    for name, module in modules.items():
        if kept[name]:
            x = torch.cat(kept[name])
            out[f"{name}.x"], out[f"{name}.y"] = x, nn.functional.linear(x.float(), logical(module.weight, module).float().cpu())
    return out


@torch.inference_mode()
def measure_coverage(model: nn.Module, recorded: dict[str, Tensor], spaces: dict[str, Tensor]) -> dict[str, float]:
    """{"inputs": mean share of the recorded inputs' energy that is protected (0 where nothing is), "output_change": mean ||Y_now - Y|| / ||Y||}.

    spaces: module name -> protected input basis V (in, k).
    """
    modules = linear_modules(model)
    inside, change = [], []
    for name, module in modules.items():
        if f"{name}.x" not in recorded:
            continue
        X, Y = recorded[f"{name}.x"].float(), recorded[f"{name}.y"].float()
        V = spaces.get(name)
        inside.append(coverage(X, V.float().cpu()) if V is not None else 0.0)
        now = nn.functional.linear(X, logical(module.weight, module).float().cpu())
        change.append(float((now - Y).norm() / Y.norm().clamp_min(1e-12)))
    return {"inputs": sum(inside) / len(inside), "output_change": sum(change) / len(change)} if inside else {}


@torch.no_grad()
def weight_leak(optimizer: torch.optim.Optimizer, start: dict[Tensor, Tensor], steps: int) -> dict[str, Any] | None:
    """The worst module's ||forbidden part of W - W_start|| / ||W - W_start||, with its bound; None where nothing is constrained.

    Bound on the norm: 1e-5 ||dW|| + 2^-24 sqrt(steps b / in) ||W||: the second term is the rounding of `steps` additions in fp32 (eps/2 a step, a random walk,
    of which b of `in` directions are looked at). W is the fp32 master where the optimizer keeps one: rounding it into a bf16 weight is not counted. A bf16 weight
    without a master is measured as it is, and is over the bound.
    """
    worst = None
    for group in optimizer.param_groups:
        if not coordinates.protects(group):
            continue
        for p in group["params"]:
            W = optimizer.state.get(p, {}).get("master", local(p.detach()))
            worst = worse(worst, leak_of(coordinates.part(group, p), W, local(start[p]), steps))
    return worst


def leak_of(group: dict[str, Any], W: Tensor, start: Tensor, steps: int) -> dict[str, Any] | None:
    """{"leak", "bound", "name"} of one weight of a parameter group, as weight_leak has them; None where it has not moved."""
    D = W.double() - start.double()
    size = float(group.get("rows", ALONE).norm(D))
    if size == 0:
        return None
    bound = leak_bound(group, W, size, steps)
    return {"leak": coordinates.forbidden_norm(group, D.double()) / size, "bound": bound / size, "name": (group.get("names") or ["?"])[0]}


def worse(one: dict[str, Any] | None, other: dict[str, Any] | None) -> dict[str, Any] | None:
    """Of two leaks the one that is nearer to its bound, or farther beyond it."""
    if one is None or other is None:
        return other or one
    return other if other["leak"] / other["bound"] > one["leak"] / one["bound"] else one


def leak_bound(group: dict[str, Any], W: Tensor, size: float, steps: int) -> float:
    """The largest ||forbidden part|| that round-off explains after `steps` steps that moved W, of the parameter group `group`, by `size`."""
    rows = group.get("rows", ALONE)
    share = coordinates.closed_share(group, rows.shape(W))
    relative, unit = (1e-10, 2.0**-53) if W.dtype == torch.float64 else (1e-5, 2.0**-24)
    return relative * size + unit * math.sqrt(steps * share) * float(rows.norm(W.double()))

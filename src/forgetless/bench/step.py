"""`python -m forgetless.bench step`: one optimizer step over all linear weights of a model, GORP's beside AdamW and the optimizers it is compared with.

A cell is a model's shapes, a rank r and a space of k closed input directions a layer. Every contender steps the same weights, given the same gradients, in turns. What
chooses its directions anew every so often is measured twice: in plain steps, and in steps that choose each time. From these the mean step at a gap of 10 and 50
follows. The state is everything that can be reached from the optimizer but weights and gradients, each storage once.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..optim import SubspaceAdamW
from ..subspace import Constraint, orthonormalize
from .measure import interleaved, live_bytes, ratio, summary
from .options import add_common, begin, clock, count, fused, libraries, measure_all, results_file, say
from .results import Results, environment, table, versions
from .shapes import BLOCKS, falling

SUMMARY = "one optimizer step over a model's linear weights: GORP's beside AdamW, GaLore, Fira, APOLLO and GORP as released"
EXAMPLE = """examples:
  python -m forgetless.bench step
  python -m forgetless.bench step --layers 2 --rank 8 128 --contenders gorp gorp-warm galore-torch

The optional peers: pip install galore-torch, and pip install --no-deps pytorch_optimizer. gorp-released is found from the repository's root."""

PACKAGES = ("forgetless", "torch", "galore-torch", "pytorch_optimizer")
KEY = ("shapes", "layers", "rank", "space")
GAPS = (10, 50)
NEVER = 10**9
ADAMW = dict(lr=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)  # a rate at which a hundred steps leave the weights what they are


@dataclass
class Problem:
    """The weights, the rank, and one basis (in, k) of closed input directions a weight."""

    weights: list[Tensor]
    rank: int
    spaces: list[Tensor]


Make = Callable[[Problem, int], torch.optim.Optimizer]  # of a problem and the steps between two choices of directions


def adamw(problem: Problem, gap: int, **options: Any) -> torch.optim.Optimizer:
    options = options or {"fused": fused(problem.weights[0].device)}
    return torch.optim.AdamW(problem.weights, **ADAMW, **options)


def gorp(problem: Problem, gap: int, closed: bool = True, rank: bool = True, **options: Any) -> torch.optim.Optimizer:
    groups = [
        {"params": [W], "constraint": Constraint(inputs=S) if closed else None, "rank": problem.rank if rank else None, "refresh_gap": gap, **options}
        for W, S in zip(problem.weights, problem.spaces, strict=True)
    ]
    return SubspaceAdamW(groups, **ADAMW)


def galore_torch(problem: Problem, gap: int) -> torch.optim.Optimizer:
    group = {"params": problem.weights, "rank": problem.rank, "update_proj_gap": gap, "scale": 1.0, "proj_type": "std"}
    return importlib.import_module("galore_torch").GaLoreAdamW([group], **ADAMW, no_deprecation_warning=True)


def pytorch_optimizer(problem: Problem, gap: int, name: str, **options: Any) -> torch.optim.Optimizer:
    group = {"params": problem.weights, "rank": problem.rank, "update_proj_gap": gap, "scale": 1.0, **options}
    return getattr(importlib.import_module("pytorch_optimizer"), name)([group], **ADAMW)


def released(problem: Problem, gap: int) -> torch.optim.Optimizer:
    peer = importlib.import_module("benchmarks.peers.gorp_released")
    group = {"params": problem.weights, "kind": "full", "lr": ADAMW["lr"], "rank": problem.rank, "gap": gap, "scale": 1.0, "projection": "std"}
    return peer.ReleasedGORP([group], mode="as_released")


CONTENDERS: dict[str, tuple[Make, bool]] = {  # and whether it chooses directions anew
    "adamw": (adamw, False),
    "adamw-foreach": (partial(adamw, foreach=True), False),
    "gorp": (partial(gorp, refresh="cold"), True),
    "gorp-warm": (partial(gorp, refresh="warm"), True),
    "gorp-exact": (partial(gorp, refresh="exact"), True),
    "gorp-bf16": (partial(gorp, refresh="cold", projection="bf16"), True),
    "gorp-open": (partial(gorp, closed=False, refresh="cold"), True),
    "gorp-dense": (partial(gorp, rank=False), False),
    "gorp-released": (released, True),
    "galore-torch": (galore_torch, True),
    "pytorch-optimizer-galore": (partial(pytorch_optimizer, name="GaLore", projection_type="std"), True),
    "pytorch-optimizer-fira": (partial(pytorch_optimizer, name="Fira", projection_type="std"), True),
    "pytorch-optimizer-apollo": (partial(pytorch_optimizer, name="APOLLO", projection_type="std"), True),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", choices=BLOCKS, default=["smollm2"], help="whose linear layers; default: smollm2")
    parser.add_argument("--layers", type=count, help="blocks of the model; default: all it has")
    parser.add_argument("--rank", nargs="+", type=count, default=[8], help="directions of the low-rank state; default: 8")
    parser.add_argument("--space", nargs="+", type=int, default=[64], help="closed input directions of each layer; default: 64")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="default: all; adamw always takes part")
    parser.add_argument(
        "--refreshes", type=count, default=3, help="measured steps that choose directions anew; default: 3, after 1 that is not measured"
    )
    add_common(parser, "step", 15)


def run(options: argparse.Namespace) -> None:
    """Measure what is not there yet, write it cell by cell, and print the table of all cells asked for."""
    common = begin(options)
    names = [name for name in CONTENDERS if name in ("adamw", *options.contenders)]
    absent = missing(names, options.device)
    for name, reason in absent.items():
        say(f"without {name}: {reason}")
    names = [name for name in names if name not in absent]
    settings = common | {"contenders": names, "refreshes": options.refreshes, "fused_adamw": fused(options.device), **libraries()}
    results = Results(results_file(options, "step"), KEY)
    head = {"benchmark": "step", "environment": environment(options.device), "missing": absent}
    wanted = [
        dict(zip(KEY, (shapes, options.layers or BLOCKS[shapes][1], rank, space), strict=True))
        for shapes in options.shapes
        for rank in options.rank
        for space in options.space
    ]
    for key in wanted:
        check(key)
    cells = measure_all(
        results, wanted, settings, versions(*PACKAGES), head, options.again,
        lambda key: f"{key['layers']} blocks of {key['shapes']}, rank {key['rank']}, {key['space']} directions closed", names,
        lambda key: {"missing": absent} | measure(key, names, settings, options.device),
    )  # fmt: skip
    print(table([row for cell in cells for row in rows(cell)]))
    for name, reason in absent.items():
        print(f"without {name}: {reason}")
    say(f"written to {results.path}")


def check(key: dict[str, Any]) -> None:
    """Raise ConfigError for a rank or a space that does not fit the narrowest layer."""
    narrowest = min(min(pair) for pair in BLOCKS[key["shapes"]][0])
    if key["space"] < 0 or key["rank"] + key["space"] > narrowest:
        raise ConfigError(f"--rank {key['rank']} and --space {key['space']} do not fit the narrowest layer of {key['shapes']}, of {narrowest}")


def missing(names: list[str], device: torch.device) -> dict[str, str]:
    """Which of these contenders cannot run here, and why: each has stepped a small weight once, which also loads what it needs before any time is taken."""
    reasons = {}
    for name in names:
        W = nn.Parameter(torch.randn(24, 16, device=device))
        W.grad = torch.randn_like(W)
        try:
            CONTENDERS[name][0](Problem([W], 4, [torch.eye(16, 2, device=device)]), 1).step()
        except ImportError as error:
            reasons[name] = str(error)
    return reasons


# -- one cell --------------------------------------------------------------------------------------------------------------------------


def measure(key: dict[str, Any], names: list[str], settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Every contender at one cell, in turns: plain steps, then steps that choose directions anew."""
    shapes = BLOCKS[key["shapes"]][0] * key["layers"]
    weights = [nn.Parameter(0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(device)) for i, shape in enumerate(shapes)]
    gradients = [falling(*shape, seed=i).to(device) for i, shape in enumerate(shapes)]
    spaces = [orthonormalize(torch.randn(n, key["space"], generator=torch.Generator().manual_seed(i))).to(device) for i, (_, n) in enumerate(shapes)]
    problem = Problem(weights, key["rank"], spaces)

    def give() -> None:  # a contender may change the gradients it is given
        for W, G in zip(weights, gradients, strict=True):
            if W.grad is None:
                W.grad = G.clone()
            else:
                W.grad.copy_(G)

    give()
    plain = {name: CONTENDERS[name][0](problem, NEVER) for name in names}
    steps = {name: {"step": optimizer.step} for name, optimizer in plain.items()}
    interleaved(steps, 2, device, give)
    times = interleaved(steps, settings["repeats"], device, give)
    known = live_bytes(weights)
    state = {name: live_bytes(optimizer, weights) - known for name, optimizer in plain.items()}
    hidden = {name: state[name] - optimizer.state_bytes() for name, optimizer in plain.items() if isinstance(optimizer, SubspaceAdamW)}
    del plain, steps
    choosing = {name: CONTENDERS[name][0](problem, 1) for name in names if CONTENDERS[name][1]}
    anew = {name: {"step": optimizer.step} for name, optimizer in choosing.items()}
    interleaved(anew, 1, device, give)
    refreshes = interleaved(anew, settings["refreshes"], device, give)
    by = clock(settings)
    found: dict[str, dict[str, Any]] = {}
    adamw_step, adamw_state = getattr(times["adamw"], by), state["adamw"]
    for name in names:
        own = {"seconds": {"cpu": summary(times[name].cpu), "wall": summary(times[name].wall)}, "bytes": state[name]}
        own["ratio"] = {"plain": ratio(getattr(times[name], by), adamw_step), "bytes": state[name] / adamw_state}
        own["raw"] = {"cpu": times[name].cpu, "wall": times[name].wall}
        if name in hidden:
            own["hidden_bytes"] = hidden[name]
        if name in refreshes:
            own["refresh"] = {"cpu": summary(refreshes[name].cpu), "wall": summary(refreshes[name].wall)}
            extra = max(own["refresh"][by]["median"] / summary(adamw_step)["median"] - own["ratio"]["plain"], 0.0)
            own["ratio"] |= {f"gap {gap}": own["ratio"]["plain"] + extra / gap for gap in GAPS}
        found[name] = own
    return {"elements": sum(W.numel() for W in weights), "contenders": found}


def rows(cell: dict[str, Any]) -> list[dict[str, str]]:
    """A cell's lines of the table: times with the half distance between their quartiles."""
    by, lines = clock(cell["settings"]), []
    for name, own in cell["contenders"].items():
        seconds, ratios = own["seconds"][by], own["ratio"]
        line = {"shapes": f"{cell['shapes']} x {cell['layers']}", "rank": str(cell["rank"]), "space": str(cell["space"]), "contender": name}
        line |= {
            f"ms ({by})": f"{1e3 * seconds['median']:.1f}",
            "+-": f"{500 * (seconds['high'] - seconds['low']):.1f}",
            "x adamw": f"{ratios['plain']:.2f}",
        }
        line |= {"choosing ms": f"{1e3 * own['refresh'][by]['median']:.0f}" if "refresh" in own else ""}
        line |= {f"gap {gap}": f"{ratios[f'gap {gap}']:.2f}" if f"gap {gap}" in ratios else "" for gap in GAPS}
        lines.append(line | {"state MB": f"{own['bytes'] / 1e6:.1f}", "MB x adamw": f"{ratios['bytes']:.3f}"})
    return lines

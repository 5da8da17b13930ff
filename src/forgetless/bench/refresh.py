"""`python -m forgetless.bench refresh`: choosing the directions of one layer's low-rank state, by each rule: seconds, and how much of the gradient they hold.

A cell is a layer's shape, a rank r and a space of k closed input directions. The gradient drifts from one choice to the next, as training's does: what is kept of it is
`KEPT` in its norm, the rest is new. Every rule chooses for the same gradients, in turns. Captured is ||G Q||^2 over what the best r directions outside the space hold.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..optim import coordinates
from ..subspace import Constraint, orthonormalize, project_out, top_subspace
from .measure import Phases, interleaved, summary
from .options import add_common, begin, clock, count, libraries, measure_all, results_file, say
from .osft import shape
from .results import Results, environment, table, versions
from .shapes import falling

SUMMARY = "choosing the directions of a layer's low-rank state: seconds by each rule, and the share of the best directions' energy that they hold"
EXAMPLE = """examples:
  python -m forgetless.bench refresh
  python -m forgetless.bench refresh --shapes smollm2 4096x4096 --rank 8 128 --rules cold warm"""

PACKAGES = ("forgetless", "torch")
KEY = ("shape", "rank", "space")
RULES = ("cold", "warm", "exact", "svd", "truncated-svd")
KEPT = 0.9


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes", nargs="+", type=shape, default=[shape("smollm2"), shape("t5-large")], help="OUTxIN, or a model's; default: smollm2 t5-large"
    )
    parser.add_argument("--rank", nargs="+", type=count, default=[8], help="directions to choose; default: 8")
    parser.add_argument("--space", nargs="+", type=int, default=[64], help="closed input directions; default: 64")
    parser.add_argument(
        "--rules",
        nargs="+",
        choices=RULES,
        default=list(RULES),
        help="default: all; truncated-svd is the SVD of the projected gradient alone, as GaLore takes it",
    )
    add_common(parser, "refresh", 5)


def run(options: argparse.Namespace) -> None:
    """Measure what is not there yet, write it cell by cell, and print the table of all cells asked for."""
    settings = begin(options) | {"rules": options.rules, **libraries()}
    results = Results(results_file(options, "refresh"), KEY)
    head = {"benchmark": "refresh", "environment": environment(options.device)}
    shapes = dict.fromkeys(pair for pairs in options.shapes for pair in pairs)
    wanted = [dict(zip(KEY, (list(pair), rank, space), strict=True)) for pair in shapes for rank in options.rank for space in options.space]
    for key in wanted:
        if key["space"] < 0 or key["rank"] + key["space"] > min(key["shape"]):
            raise ConfigError(f"--rank {key['rank']} and --space {key['space']} do not fit a layer of {key['shape'][0]}x{key['shape'][1]}")
    cells = measure_all(
        results, wanted, settings, versions(*PACKAGES), head, options.again,
        lambda key: f"{key['shape'][0]}x{key['shape'][1]}, rank {key['rank']}, {key['space']} directions closed", options.rules,
        lambda key: {"rules": measure(key, settings, options.device)},
    )  # fmt: skip
    print(table([row for cell in cells for row in rows(cell)]))
    say(f"written to {results.path}")


def measure(key: dict[str, Any], settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    (m, n), r, repeats = key["shape"], key["rank"], settings["repeats"]
    S = orthonormalize(torch.randn(n, key["space"], generator=torch.Generator().manual_seed(0))).to(device)
    gradients = [falling(m, n, seed=0).to(device)]
    for seed in range(1, repeats + 2):
        gradients.append(KEPT * gradients[-1] + (1 - KEPT**2) ** 0.5 * falling(m, n, seed=seed).to(device))
    chosen: dict[str, list[Tensor]] = {rule: [] for rule in settings["rules"]}

    def step(rule: str) -> Phases:
        group = {"constraint": Constraint(inputs=S), "rank": r, "directions": None, "side": "inputs", "flipped": False}
        group |= {"refresh": rule, "moments": "rotate"}
        state: dict[str, Any] = {}

        def choose() -> None:
            G = gradients[len(chosen[rule])]
            if rule == "truncated-svd":
                Q = torch.linalg.svd(project_out(G, S), full_matrices=False)[2][:r].mT
            else:
                coordinates.choose(group, state, G, (0, 0, len(chosen[rule])))
                Q = state["basis"]
            chosen[rule].append(Q)

        return {"choose": choose}

    steps = {rule: step(rule) for rule in settings["rules"]}
    interleaved(steps, 2, device)
    times = interleaved(steps, repeats, device)
    best = [float(top_subspace(G, r, off=S).energy.double().sum()) for G in gradients[2:]]
    found = {}
    for rule, bases in chosen.items():
        held = [float(((G.double() @ Q.double()) ** 2).sum()) / most for G, Q, most in zip(gradients[2:], bases[2:], best, strict=True)]
        closed = max(float((S.double().mT @ Q.double()).abs().max()) for Q in bases) if S.shape[1] else 0.0
        own = {"seconds": {"cpu": summary(times[rule].cpu), "wall": summary(times[rule].wall)}, "captured": summary(held), "closed": closed}
        found[rule] = own | {"raw": {"cpu": times[rule].cpu, "wall": times[rule].wall}}
    return found


def rows(cell: dict[str, Any]) -> list[dict[str, str]]:
    by, lines = clock(cell["settings"]), []
    for rule, own in cell["rules"].items():
        seconds = own["seconds"][by]
        line = {"shape": "x".join(map(str, cell["shape"])), "rank": str(cell["rank"]), "space": str(cell["space"]), "rule": rule}
        line |= {f"ms ({by})": f"{1e3 * seconds['median']:.2f}", "+-": f"{500 * (seconds['high'] - seconds['low']):.2f}"}
        lines.append(line | {"captured": f"{own['captured']['median']:.4f}", "in the space": f"{own['closed']:.0e}"})
    return lines

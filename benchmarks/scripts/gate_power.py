"""The gate's power, false alarms and stopping time, by simulation (docs/gate.md): no model, numbers only.

    python benchmarks/scripts/gate_power.py            # what is missing of benchmarks/results/gate_power.json; two processes, about 15 minutes
    python benchmarks/scripts/gate_power.py --print    # what is in it

A gate here is a family of ten tasks under max_worst_task with margin 0.02, alpha and beta 0.05, unless said. Of a task's rows a share flips between right and wrong,
more of them down by the task's drop. Looks at 200 rows, then doubling, to all the rows of the file, as in a run. `judge` itself decides in the cells "judge" and "named";
elsewhere the same capitals (gate.capital), of many gates at once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from forgetless.evaluation import gate
from runs import RESULTS, cpu_name

FILE = RESULTS / "gate_power.json"
TASKS, MARGIN, ALPHA, BETA, LOOK, GATES = 10, 0.02, 0.05, 0.05, 200, 1000
FLIPS = (0.02, 0.05, 0.1, 0.2)
Draw = Callable[[np.random.Generator, int, int], NDArray]  # (generator, gates, rows) -> drops (gates, rows)


# -- drops ---------------------------------------------------------------------------------------------------------------------------


def flips(share: float, drop: float, rng: np.random.Generator, gates: int, rows: int, u: NDArray | None = None) -> NDArray:
    """0/1 scores: 1 where a row was right and is not, -1 the other way round; as many rows flip as the drop needs at least."""
    share, u = max(share, drop), rng.random((gates, rows)) if u is None else u
    return np.where(u < (share + drop) / 2, 1.0, np.where(u < share, -1.0, 0.0))


def parts(share: float, drop: float, rng: np.random.Generator, gates: int, rows: int) -> NDArray:
    """Scores between 0 and 1: the flips, each by a uniform part of 1, with the drop as its mean. E[d^2] = share / 3."""
    return flips(share, 2 * drop, rng, gates, rows) * rng.random((gates, rows))


def noise(scale: float, drop: float, rng: np.random.Generator, gates: int, rows: int) -> NDArray:
    """Every row's score moves a little (Laplace), about the drop."""
    return drop + np.clip(rng.laplace(0, scale, (gates, rows)), -0.5, 0.5)


def together(share: float, drops: list[float], same: float, rng: np.random.Generator, gates: int, rows: int) -> list[NDArray]:
    """Tasks whose i-th rows flip together, in a share `same` of the rows."""
    common = rng.random((gates, rows))
    return [flips(share, drop, rng, gates, rows, np.where(rng.random((gates, rows)) < same, common, rng.random((gates, rows)))) for drop in drops]


# -- gates ---------------------------------------------------------------------------------------------------------------------------


def crossings(d: NDArray, limit: float, family: int = TASKS, margin: float = MARGIN) -> tuple[NDArray, NDArray]:
    """The rows after which each gate's capital had won, against `kept` and against `broken`; infinity where it never did."""

    def first(capital: NDArray, level: float) -> NDArray:
        won = capital >= -math.log(level)
        return np.where(won.any(1), won.argmax(1) + 1.0, np.inf)

    n, level = d.shape[1], ALPHA / family
    kept = first(gate.capital(d - limit, 1 + limit, margin, n, level, gate.KEPT), level)
    return kept, first(gate.capital(limit + margin - d, 1 - limit - margin, margin, n, BETA, gate.BROKEN), BETA)


def looks(rows: int) -> list[int]:
    out = [min(LOOK, rows)]
    while out[-1] < rows:
        out.append(min(2 * out[-1], rows))
    return out


def outcomes(broken: NDArray, keep: NDArray, rows: int) -> dict[str, NDArray]:
    """broken, keep (gates, tasks) -> of each gate its outcome, the look it ended at, and the rows scored of each task."""
    gates, tasks = broken.shape
    outcome, last, used = np.full(gates, "undecided"), np.full(gates, rows), np.zeros((gates, tasks))
    going, undecided = np.ones(gates, bool), np.ones((gates, tasks), bool)
    for look in looks(rows):
        scored = undecided & going[:, None]
        used[scored] = look
        rejected = (scored & (broken <= look)).any(1)
        undecided &= ~(scored & (keep <= look))
        accepted = going & ~rejected & ~undecided.any(1)
        outcome[rejected], outcome[accepted] = "reject", "accept"
        last[rejected | accepted] = look
        going &= ~(rejected | accepted)
    return {"outcome": outcome, "last": last, "used": used}


def family(draws: list[Draw] | Callable, rows: int, limit: float = 0.0, gates: int = GATES, seed: int = 0) -> dict[str, NDArray]:
    """Many gates of a family of tasks, in pieces that fit a small memory. draws: one a task, or one that draws them all."""
    done, rng, piece = [], np.random.default_rng(seed), max(1, 1_000_000 // rows)
    for begun in range(0, gates, piece):
        many = min(piece, gates - begun)
        tasks = draws(rng, many, rows) if callable(draws) else (draw(rng, many, rows) for draw in draws)
        pairs = [crossings(d, limit, TASKS) for d in tasks]
        done.append([np.stack(side, 1) for side in zip(*pairs, strict=True)])
    broken, keep = (np.concatenate(side) for side in zip(*done, strict=True))
    return outcomes(broken, keep, rows) | {"broken": broken, "keep": keep}


def shares(found: dict[str, NDArray]) -> dict[str, float]:
    return {name: float((found["outcome"] == name).mean()) for name in ("accept", "undecided", "reject")}


def one_drops(share: float, drop: float) -> list[Draw]:
    return [partial(flips, share, drop if i == 0 else 0.0) for i in range(TASKS)]


# -- tests with a fixed number of rows -----------------------------------------------------------------------------------------------

LOG_FACTORIAL = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, 20001)))])


def binomial(n: int, p: float) -> NDArray:
    k = np.arange(n + 1)
    if p in (0.0, 1.0):
        return (k == n * p).astype(float)
    return np.exp(LOG_FACTORIAL[n] - LOG_FACTORIAL[k] - LOG_FACTORIAL[n - k] + k * math.log(p) + (n - k) * math.log(1 - p))


def mcnemar(rows: int, share: float, drop: float, level: float) -> float:
    """Power of the exact one-sided McNemar test (the sign test on the rows that flip)."""
    share, power = max(share, drop), 0.0
    for flipped, chance in enumerate(binomial(rows, share)):
        if chance > 1e-9:
            tail = np.cumsum(binomial(flipped, 0.5)[::-1])[::-1]
            least = int(np.argmax(tail <= level)) if (tail <= level).any() else flipped + 1
            power += chance * float(binomial(flipped, (share + drop) / 2 / share)[least:].sum())
    return power


def mcnemar_rows(share: float, drop: float, level: float) -> int:
    """The fewest rows with which it has 95 %, to 0.5 %."""
    low, high = 50, 20000
    while high - low > max(2, low // 200):
        rows = (low + high) // 2
        low, high = (low, rows) if mcnemar(rows, share, drop, level) >= 0.95 else (rows, high)
    return high


def t_test(d: NDArray, level: float) -> float:
    """Power of the one-sided t-test, of hundreds of rows or more."""
    n = d.shape[1]
    return float((d.mean(1) >= NormalDist().inv_cdf(1 - level) * d.std(1, ddof=1) / math.sqrt(n)).mean())


# -- cells ---------------------------------------------------------------------------------------------------------------------------


def power(share: float) -> dict:
    """One task drops by the margin, nine do not: the share of gates that reject, at the rows rows_needed() names."""
    rows = gate.rows_needed(share, MARGIN, TASKS)
    found, level = family(one_drops(share, MARGIN), rows, gates=2000), ALPHA / TASKS
    won = np.minimum(found["broken"][:, 0], rows)
    test = np.concatenate([flips(share, MARGIN, np.random.default_rng(i), 200, rows) for i in range(10)])
    fixed = mcnemar_rows(share, MARGIN, level)
    return shares(found) | {
        "rows_needed": rows,
        "mcnemar_rows": fixed,
        "ratio": rows / fixed,
        "mcnemar": mcnemar(rows, share, MARGIN, level),
        "t_test": t_test(test, level),
        "mean_rows_to_reject": float(won.mean()),
        "mean_ratio": float(won.mean() / fixed),
        "kept_at_drop_0": float((found["keep"][:, 1:] <= rows).mean()),
    }


def named(share: float, drop: float) -> dict:
    """rows_to_decide as named after a first look of 200 rows, and what a file of so many rows decides then, of one task in a family of ten."""
    rng, rows, decided, limits = np.random.default_rng(1), [], 0, one_limit(0.0)
    while len(rows) < 600:
        d = flips(share, drop, rng, 1, LOOK)[0]
        verdict = judge_all(limits, [d] * TASKS, [LOOK] * TASKS)
        if verdict.outcome != "undecided":
            continue  # it needs no more rows
        n = verdict.criteria[0].rows_to_decide
        decided += outcomes(*(side[:, None] for side in crossings(flips(share, drop, rng, 1, n), 0.0)), n)["outcome"][0] == (
            "reject" if drop else "accept"
        )
        rows.append(n)
    low, middle, high = (float(q) for q in np.quantile(rows, [0.1, 0.5, 0.9]))
    return {"decided": decided / len(rows), "rows": [low, middle, high], "with_the_true_share": gate.rows_needed(share, MARGIN, TASKS)}


def alarms(share: float, limit: float, same: float = 0.0) -> dict:
    """Nothing is worse than the limit: the share of gates that reject, up to each look at a file of 6,400 rows."""
    drops = [limit] * TASKS
    draws = partial(together, share, drops, same) if same else [partial(flips, share, drop) for drop in drops]
    found = family(draws, 6400, limit, seed=2)
    rejected = found["outcome"] == "reject"
    return {"rejected_by": {str(n): float((rejected & (found["last"] <= n)).mean()) for n in looks(6400)}} | shares(found)


def by_rows(share: float, drop: float) -> dict:
    """One task of ten drops: outcomes with files of so many rows."""
    needed = gate.rows_needed(share, MARGIN, TASKS)
    files = [100, 200, 400, 800, 1600, needed, 2 * needed, 4 * needed]
    return {str(n): shares(family(one_drops(share, drop), n, gates=300 if n <= needed else 100, seed=3)) for n in files}


def stops(share: float, drop: float) -> dict:
    """One task of ten drops, and every file has 10,000 rows: the rows that are scored."""
    found = family(one_drops(share, drop), 10_000, gates=100, seed=4)
    used = found["used"]
    return shares(found) | {
        "rows_of_that_task": float(used[:, 0].mean()),
        "rows_of_each": float(used.mean()),
        "won_after": float(np.quantile(np.minimum(found["broken" if drop else "keep"][:, 0], 10_000), 0.5)),
    }


def reading(share: float, drop: float) -> dict:
    """max_worst_task: 0.02, one task of ten drops by so much, the others do not."""
    rows = gate.rows_needed(share, MARGIN, TASKS, limit=0.02)
    return {"rows": rows} | shares(family(one_drops(share, drop), rows, 0.02, gates=300, seed=5))


def other(kind: str, drop: float) -> dict:
    """Scores that are not 0/1, at the rows that rows_needed() names for their mean of d^2."""
    draw, square = {"parts of 1 in 15 % of the rows": (partial(parts, 0.15), 0.05), "a little in every row": (partial(noise, 0.1), 0.0188)}[kind]
    rows = gate.rows_needed(square, MARGIN, TASKS)
    return {"rows": rows} | shares(family([partial(draw, drop if i == 0 else 0.0) for i in range(TASKS)], rows, seed=6))


def correlated(share: float, same: float) -> dict:
    """Rows of the tasks flip together; one task drops by the margin."""
    rows = gate.rows_needed(share, MARGIN, TASKS)
    return {"rows": rows} | shares(family(partial(together, share, [MARGIN] + [0.0] * (TASKS - 1), same), rows, seed=7))


def mean_drop(share: float, drop: float) -> dict:
    """max_forgetting: 0 alone, every one of ten tasks drops by so much; rows of each task as named for a tenth of a task's variance."""
    v = share / TASKS
    rows, rng, won = gate._rows(max(v, MARGIN * (1 - MARGIN) / TASKS), MARGIN, 1, ALPHA, BETA), np.random.default_rng(8), []
    for _ in range(20):
        mean = np.mean([flips(share, drop, rng, 100, rows) for _ in range(TASKS)], axis=0)
        won.append(np.stack(crossings(mean, 0.0, 1), 1))
    broken, keep = np.concatenate(won).T
    return {"rows": rows} | shares(outcomes(broken[:, None], keep[:, None], rows))


def sizes(share: float, tasks: int) -> dict:
    """The task that drops, in a family of another size: at the rows named for it, with a drop of the margin and with none."""
    rows, rng, out = gate.rows_needed(share, MARGIN, tasks), np.random.default_rng(11), {}
    for drop in (MARGIN, 0.0):
        pairs = [crossings(flips(share, drop, rng, 100, rows), 0.0, tasks) for _ in range(GATES // 100)]
        out[f"drop {drop}"] = shares(outcomes(*(np.concatenate(side)[:, None] for side in zip(*pairs, strict=True)), rows))
    return {"rows": rows} | out


def bets(share: float) -> dict:
    """What each part of the bet is for: share of gates that call a drop of the margin broken, with files of 1, 1.2, 1.35 and 1.5 times McNemar's rows."""
    fixed, level, rng, out = mcnemar_rows(share, MARGIN, ALPHA / TASKS), ALPHA / TASKS, np.random.default_rng(9), {}
    for times in (1.0, 1.2, 1.35, 1.5):
        n, found = int(times * fixed), {"grid": 0, "largest and grid": 0, "all three": 0, "aimed": 0}
        for _ in range(10):
            x = flips(share, MARGIN, rng, 100, n)
            top = 0.999
            largest, grid = np.cumsum(np.log1p(top * x), 1), [np.cumsum(np.log1p(top / 2**k * x), 1) for k in range(6)]
            capitals = {
                "grid": np.logaddexp.reduce(grid) - math.log(6),
                "largest and grid": np.logaddexp(largest, np.logaddexp.reduce(grid[1:]) - math.log(5)) - math.log(2),
                "all three": gate.capital(x, 1.0, MARGIN, n, level, gate.KEPT),
                "aimed": gate._aimed(x, top, n, level),
            }
            for name, capital in capitals.items():
                found[name] += int((capital.max(1) >= -math.log(level)).sum())
        out[str(times)] = {"rows": n, "mcnemar": mcnemar(n, share, MARGIN, level)} | {k: v / 1000 for k, v in found.items()}
    return out


def one_limit(limit: float) -> SimpleNamespace:
    absent = dict.fromkeys(("max_forgetting", "min_new_task", "max_drift_kl", "max_general_drop"))
    return SimpleNamespace(max_worst_task=limit, margin=MARGIN, alpha=ALPHA, beta=BETA, **absent)


def judge_all(limits: SimpleNamespace, drops: list[NDArray], available: list[int]) -> gate.Verdict:
    """gate.judge of drops, as scores before and now."""
    pairs = {str(i): (np.maximum(d, 0), np.maximum(-d, 0)) for i, d in enumerate(drops)}
    return gate.judge(limits, "choice", pairs, {}, "new", [1.0], None, {str(i): n for i, n in enumerate(available)} | {"new": 1})


def judged(drop: float) -> dict:
    """gate.judge driven look by look, as a run does: does it say what the capitals of many gates at once said?"""
    rows, rng, agree, tally = 1600, np.random.default_rng(10), 0, []
    for _ in range(50):
        tasks = [draw(rng, 1, rows) for draw in one_drops(0.05, drop)]
        expected = outcomes(*(np.stack(side, 1) for side in zip(*(crossings(d, 0.0) for d in tasks), strict=True)), rows)
        seen = [LOOK] * TASKS
        while (verdict := judge_all(one_limit(0.0), [d[0, :n] for d, n in zip(tasks, seen, strict=True)], [rows] * TASKS)).wanted:
            seen = [min(2 * n, rows) if str(i) in verdict.wanted else n for i, n in enumerate(seen)]
        agree += verdict.outcome == expected["outcome"][0] and seen == list(expected["used"][0])
        tally.append(verdict.outcome)
    return {"agree": agree / 50} | {name: tally.count(name) / 50 for name in ("accept", "undecided", "reject")}


def cells() -> dict[str, Callable[[], dict]]:
    out: dict[str, Callable[[], dict]] = {f"power {f}": partial(power, f) for f in FLIPS}
    out |= {f"bets {f}": partial(bets, f) for f in FLIPS}
    out |= {f"family of {n}, {f}": partial(sizes, f, n) for n in (1, 3, 40) for f in FLIPS[:3]}
    out |= {f"named {f} drop {d}": partial(named, f, d) for f in FLIPS[:3] for d in (0.0, 0.02)}
    out |= {f"alarms {f} limit {limit}": partial(alarms, f, limit) for f, limit in itertools.product(FLIPS[:3], (0.0, 0.02))}
    out |= {"alarms 0.2 limit 0.0": partial(alarms, 0.2, 0.0)}
    out |= {f"alarms {f} same rows {s}": partial(alarms, f, 0.0, s) for f in FLIPS[1:2] for s in (0.5, 1.0)}
    out |= {f"by rows {f} drop {d}": partial(by_rows, f, d) for f in FLIPS[1:2] for d in (0.0, 0.01, 0.02, 0.04)}
    out |= {f"stops {f} drop {d}": partial(stops, f, d) for f in (0.05, 0.1) for d in (0.0, 0.02, 0.05, 0.1, 0.3)}
    out |= {f"reading {f} drop {d}": partial(reading, f, d) for f in (0.05, 0.1) for d in (0.0, 0.02, 0.03, 0.04, 0.05)}
    out |= {f"other {k} drop {d}": partial(other, k, d) for k in ("parts of 1 in 15 % of the rows", "a little in every row") for d in (0.0, 0.02)}
    out |= {f"correlated {f} same rows {s}": partial(correlated, f, s) for f in FLIPS[1:2] for s in (0.5, 1.0)}
    out |= {f"mean {f} drop {d}": partial(mean_drop, f, d) for f in FLIPS for d in (0.0, 0.02)}
    return out | {f"judge drop {d}": partial(judged, d) for d in (0.0, 0.02, 0.1)}


def work(name: str) -> tuple[str, dict]:
    begun = time.time()
    return name, cells()[name]() | {"seconds": round(time.time() - begun, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    found = json.loads(FILE.read_text())["cells"] if FILE.exists() else {}
    if not args.print:
        with ProcessPoolExecutor(args.workers) as pool:
            for name, cell in pool.map(work, [name for name in cells() if name not in found]):
                found[name] = cell
                content = {
                    "command": "python benchmarks/scripts/gate_power.py",
                    "gates": GATES,
                    "environment": {"cpu": cpu_name(), "threads": 1, "numpy": np.__version__},
                    "cells": found,
                }
                FILE.write_text(json.dumps(content, indent=1))
                print(name, json.dumps(cell), flush=True)
    for name, cell in found.items():
        print(f"{name:<40} {json.dumps({k: v for k, v in cell.items() if k != 'seconds'})}")


if __name__ == "__main__":
    main()

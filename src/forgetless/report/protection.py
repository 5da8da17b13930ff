"""Views of what protected the earlier tasks: leaks, coverage, the protected space and what of it is shared, drift, its forecast, and what each task cost."""

from __future__ import annotations

from typing import Any

from .numbers import count, fixed, get, mapping, number, percent, size, small
from .read import Commit, Run
from .scores import shade


def records(run: Run) -> list[tuple[int, dict[str, Any]]]:
    """(index, what timing.jsonl says) of each finished task; where it lacks one, what metrics.json says, without the clock."""
    noted = run.timing["tasks"]
    beside = {c.index: {"task": c.task, **mapping(c.metrics.get("protection"))} for c in run.commits if c.index not in noted}
    return sorted((noted | {index: record for index, record in beside.items() if len(record) > 1}).items())


def cost_rows(run: Run) -> list[dict[str, Any]]:
    """One row a task, values as text, None where nothing was recorded: steps, seconds, peak bytes; and, of low-rank states, the share of gradient energy held."""
    rows = []
    for index, record in records(run):
        cost = [count(record.get("steps")), fixed(record.get("train_seconds")), fixed(record.get("eval_seconds")), size(record.get("peak_bytes"))]
        held = [percent(record.get("captured")), percent(record.get("captured_of_best"))]
        rows.append({"name": f"{index + 1}. {record['task']}", "cost": cost, "captured": held})
    return rows


def leak_rows(run: Run) -> list[dict[str, Any]]:
    """One row a task: the largest update leak, the weight leak, its bound, and whether it is over that."""
    rows = []
    for index, record in records(run):
        leak, bound = number(record.get("weight_leak")), number(record.get("weight_leak_bound"))
        over = leak is not None and bound is not None and leak > bound
        rows.append(
            {
                "name": f"{index + 1}. {record['task']}",
                "update_leak": small(record.get("update_leak")),
                "weight_leak": small(leak),
                "bound": small(bound),
                "over": over,
            }
        )
    return rows if any(row["update_leak"] or row["weight_leak"] for row in rows) else []


def space_rows(run: Run) -> list[dict[str, Any]]:
    """One row a task: layers, mean and largest rank, share of the input directions that is protected, its bytes, and where any were the directions evicted for max_rank."""
    rows = []
    for index, record in records(run):
        if space := mapping(record.get("space")):
            share = number(space.get("share"))
            numbers = [
                count(space.get("modules")),
                fixed(space.get("rank_mean")),
                count(space.get("rank_max")),
                percent(share),
                size(space.get("bytes")),
                count(space.get("evicted")),
            ]
            rows.append({"index": index, "task": str(record["task"]), "name": f"{index + 1}. {record['task']}", "share": share, "numbers": numbers})
    evicts = any(row["numbers"][-1] not in (None, "0") for row in rows)
    return rows if evicts else [{**row, "numbers": row["numbers"][:-1]} for row in rows]


def coverage_map(run: Run) -> dict[str, Any] | None:
    """Rows: the task just trained. Columns: each task's inputs, recorded when it was learned. Cell: their share inside the protected space; small: how far outputs moved."""
    measured = [(record["task"], coverage) for _, record in records(run) if (coverage := mapping(record.get("coverage")))]
    columns = list(dict.fromkeys(task for _, coverage in measured for task in coverage))
    rows = []
    for after, coverage in measured:
        pairs = [(task, get(coverage.get(task), "inputs"), get(coverage.get(task), "output_change")) for task in columns]
        rows.append({"label": f"after {after}", "cells": [coverage_cell(*pair) for pair in pairs]})
    return {"title": "Inputs inside the protected space", "tasks": [(task, None) for task in columns], "rows": rows} if columns else None


def coverage_cell(task: str, inputs: Any, change: Any) -> dict[str, Any]:
    if number(inputs) is None and number(change) is None:
        return {"text": None, "tip": f"{task}: not measured", "own": False}
    moved = percent(change, digits=2)
    tip = f"{task}: {percent(inputs) or 'unknown'} % of the inputs' energy is inside, the outputs moved by {moved or 'unknown'} %"
    return {
        "text": percent(inputs) or "?",
        "shade": shade(number(inputs) or 0.0),
        "small": "" if moved is None else f"Δ {moved}",
        "tip": tip,
        "own": False,
    }


def overlap_map(run: Run) -> dict[str, Any] | None:
    """Rows: a new task, before it was trained. Columns: earlier tasks. Cell: the share of the energy of the new task's
    gradient that lies in the directions of the earlier one's inputs.
    """
    measured = [(c, overlap) for c in [*run.commits, *run.rejected] if (overlap := mapping(mapping(c.metrics.get("forecast")).get("overlap")))]
    columns = list(dict.fromkeys(task for _, overlap in measured for task in overlap))

    def shown(column: str) -> str:
        """Where no inputs may be stored, the overlap is with all that the method protects."""
        return "all that is protected" if column == "protected" and column not in run.matrix["tasks"] else column

    rows = []
    for commit, overlap in measured:
        label = f"{commit.task}, refused" if commit in run.rejected else commit.task
        rows.append({"label": label, "cells": [overlap_cell(commit.task, task, number(overlap.get(task))) for task in columns]})
    return {"title": "Overlap with earlier tasks", "tasks": [(shown(task), None) for task in columns], "rows": rows} if columns else None


def overlap_cell(new: str, task: str, share: float | None) -> dict[str, Any]:
    if share is None:
        return {"text": None, "tip": f"{task}: not measured", "own": False}
    tip = f"{percent(share)} % of the gradient of {new} lies in directions of {task}"
    return {"text": percent(share), "shade": shade(share), "small": "", "tip": tip, "own": False}


def drift_rows(run: Run) -> list[dict[str, Any]]:
    """One row a task: the two mean KLs in nats with prompts and tokens behind them, the expected mean drop of the earlier tasks and the one that came."""
    rows = []
    for commit in [*run.commits, *run.rejected]:
        drift, forecast = mapping(commit.metrics.get("drift")), mapping(commit.metrics.get("forecast"))
        if not drift and number(forecast.get("expected_forgetting")) is None:
            continue
        refused = commit in run.rejected
        # a refused model is compared with the current branch only if it began there
        known = not refused or run.began.get(commit.folder) == run.head[: commit.index]
        rows.append({
            "name": f"{commit.index + 1}. {commit.task}" + (", refused" if refused else ""),
            "kl": fixed(drift.get("kl"), 3), "base_kl": fixed(drift.get("base_kl"), 3),
            "prompts": count(drift.get("prompts")), "tokens": count(drift.get("tokens")),
            "expected": percent(forecast.get("expected_forgetting")), "observed": percent(dropped(run, commit)) if known else None,
        })  # fmt: skip
    return rows


def dropped(run: Run, commit: Commit) -> float | None:
    """Mean drop of the earlier tasks from the commit before this one to it, by drop_scorer; None for the first task."""
    scorer, earlier = drop_scorer(run), slice(commit.index)
    before = get(get(run.matrix["scores"].get(scorer), commit.index - 1), earlier) if commit.index else None
    after = get(mapping(commit.metrics.get("scores")).get(scorer), earlier)
    pairs = [(number(a), number(b)) for a, b in zip(before or (), after or (), strict=False)]
    drops = [a - b for a, b in pairs if a is not None and b is not None]
    return sum(drops) / len(drops) if drops else None


def drop_scorer(run: Run) -> str:
    """What the forecast speaks of: the score that the gate names, else the run's first."""
    named = mapping(run.config.get("gate")).get("scorer")
    return named if isinstance(named, str) and named in run.matrix["scores"] else next(iter(run.matrix["scores"]), "")

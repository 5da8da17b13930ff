"""Views of what was measured: heat maps, curves over the tasks, rows that flipped, the table of metrics, several runs side by side.

Text and shades only, nothing that knows of HTML.
"""

from __future__ import annotations

import json
from typing import Any

from forgetless.evaluation.matrix import wilson

from .numbers import count, get, mapping, number, objects, percent
from .read import Commit, Run, read_predictions

SCORERS = {"choice": "Choice", "exact_match": "Exact match"}
OWN = "Each task's metric"
SUMMARY = {"average_accuracy": max, "backward_transfer": max, "forgetting": min, "learning_accuracy": max}  # which way is best
METRICS = {
    "average_accuracy": ("Average accuracy", "mean over the tasks at the end"),
    "backward_transfer": ("Backward transfer", "mean change of the earlier tasks since each was learned; below zero is forgetting"),
    "forgetting": ("Forgetting", "mean drop of the earlier tasks from the best each has been"),
    "worst_forgetting": ("Worst forgetting", "the same drop, for the task that lost most"),
    "learning_accuracy": ("Learning accuracy", "mean score of each task right after it was learned"),
    "forward_transfer": ("Forward transfer", "mean gain on a task before it is trained, against the untouched model"),
    "intransigence": ("Intransigence", "mean of what a model trained on that task alone scores above this one"),
}
FAILURES = {"other_task_label": "A word of another task's labels", "wrong_in_set": "Wrong within the task's own labels"}
BEFORE = "before training"
EXAMPLES, EXAMPLES_SHOWN = 3, 60  # flipped rows of one task after another, and of a run


def scorers_of(matrix: dict[str, Any]) -> list[str]:
    """The run's scorers, the ones every run has in one order."""
    order = ["metric", *SCORERS]
    return [*(s for s in order if s in matrix["scores"]), *(s for s in matrix["scores"] if s not in order)]


def title(scorer: str) -> str:
    return OWN if scorer == "metric" else SCORERS.get(scorer, scorer)


def named_scorer(scorer: Any) -> str:
    """A scorer in the middle of a sentence."""
    return "each task's metric" if scorer == "metric" else title(str(scorer)).lower()


def kinds(scorer: str, matrix: dict[str, Any]) -> str:
    """Which metric each task has, in words, where the scorer is that."""
    return ", ".join(f"{task}: {matrix['metric_of'][task]}" for task in matrix["tasks"] if task in matrix["metric_of"]) if scorer == "metric" else ""


# ---- several runs


def summary_view(runs: list[dict[str, Any]], scorers: dict[str, str] = SCORERS) -> dict[str, Any]:
    """One row a run; the best value of a column is marked only among finished runs that were tested on the same rows."""
    finished = [run for run in runs if run["finished"]]
    same = len({json.dumps([sorted(run["tasks"]), run["n"], run["seed"], run["data"]], sort_keys=True) for run in finished}) == 1
    cells: list[list[dict[str, Any]]] = [[] for _ in runs]
    for scorer in scorers:
        for metric, best in SUMMARY.items():
            values = [number(run["metrics"].get(scorer, {}).get(metric)) for run in runs]
            ranked = [round(v, 3) for run, v in zip(runs, values, strict=True) if v is not None and run["finished"]]
            top = best(ranked) if same and len(ranked) > 1 else None
            for row, run, value in zip(cells, runs, values, strict=True):
                is_best = None not in (top, value) and run["finished"] and round(value, 3) == top
                row.append({"text": percent(value, metric), "best": is_best})
    return {"cells": cells, "same": same or len(finished) < 2, "unfinished": len(runs) - len(finished), "n": [n_text(run) for run in runs]}


def n_text(run: dict[str, Any]) -> str:
    """How many rows stand behind the averages: the tasks learned so far."""
    counts = [number(run["n"].get(task)) for task in run["tasks"][: run["done"]]]
    if not counts or None in counts:
        return "not stated"
    return f"{len(counts)} × {counts[0]:g}" if len(set(counts)) == 1 else f"{sum(counts):g} in {len(counts)} tasks"


# ---- heat maps


def score_map(scorer: str, matrix: dict[str, Any]) -> dict[str, Any]:
    """The accuracy matrix of one scorer, with the row before training on top where there is one."""
    view = heat_map(matrix, matrix["scores"][scorer], matrix["ci95"].get(scorer))
    before = []
    for j, task in enumerate(matrix["tasks"]):
        n, value = matrix["n"].get(task), number(get(matrix["before"].get(scorer), j))
        before.append(cell(task, n, value, share_interval(value, n)))
    untouched = [{"label": BEFORE, "cells": before}] if any(c["text"] is not None for c in before) else []
    return {"title": title(scorer), **view, "rows": [*untouched, *view["rows"]], "kinds": kinds(scorer, matrix)}


def watch_map(matrix: dict[str, Any]) -> dict[str, Any] | None:
    """Before the first task and after each (rows), each score of each watch set (columns)."""
    columns = []
    for name, scores in matrix["watch"].items():
        for scorer, values in scores.items():
            kind = matrix["metric_of"].get(name, "metric") if scorer == "metric" else title(scorer).lower()
            columns.append((f"{name}, {kind}", matrix["n"].get(name), values))
    if not columns:
        return None
    rows = []
    for i, label in enumerate([BEFORE, *(f"after {task}" for task in matrix["tasks"])]):
        found = [(shown, n, number(get(values, i))) for shown, n, values in columns]
        rows.append({"label": label, "cells": [cell(shown, n, value, share_interval(value, n)) for shown, n, value in found]})
    return {"title": "Watched, never trained", "tasks": [(shown, n) for shown, n, _ in columns], "rows": rows}


def share_interval(value: float | None, n: Any) -> tuple[float, float] | None:
    """The Wilson interval of what matrix.json has none for; None where it cannot be told."""
    return wilson(value, n) if number(n) and value is not None and 0 <= value <= 1 else None


def heat_map(matrix: dict[str, Any], values: list[list], ci95: list | None = None) -> dict[str, Any]:
    """Every task's row, those not reached yet too, as cells."""
    tasks, n = matrix["tasks"], matrix["n"]
    rows = []
    for i, after in enumerate(tasks):
        cells = [cell(task, n.get(task), get(get(values, i), j), get(get(ci95, i), j), own=i == j) for j, task in enumerate(tasks)]
        rows.append({"label": f"after {after}", "cells": cells})
    return {"tasks": [(task, n.get(task)) for task in tasks], "rows": rows}


def cell(task: str, n: int | None, value: Any, interval: Any = None, own: bool = False) -> dict[str, Any]:
    """{text, shade, small, tip, own}; a cell that was not measured has text None. `own`: measured right after learning this task."""
    value, low, high = number(value), number(get(interval, 0)), number(get(interval, 1))
    if value is None:
        return {"text": None, "tip": f"{task}: not measured", "own": own}
    known = low is not None and high is not None
    spread = f"95 % interval {100 * low:.1f} to {100 * high:.1f} %" if known else "no interval recorded"
    tip = f"{task}: {100 * value:.1f} %, n = {'not stated' if n is None else n}, {spread}"
    return {"text": percent(value), "shade": shade(value), "small": f"{100 * low:.0f}–{100 * high:.0f}" if known else "", "tip": tip, "own": own}


def shade(value: float) -> str:
    return f"{min(max(value, 0.0), 1.0):.3f}"


def metric_table(scorers: list[str], metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a metric, every key that is there, the known ones first."""
    found = {key for scorer in scorers for key in metrics.get(scorer) or {}}
    rows = []
    for key in [*(key for key in METRICS if key in found), *sorted(found - set(METRICS))]:
        name, meaning = METRICS.get(key, (key.replace("_", " ").capitalize(), ""))
        rows.append({"title": name, "meaning": meaning, "numbers": [percent(get(metrics.get(s), key), key) for s in scorers]})
    return rows


# ---- curves


def curves(run: Run) -> list[dict[str, Any]]:
    """One curve a task and watch set: {name, n, watched, trained: (from, to) or None, lines: [{scorer, points, looks}]}, x in tasks learned, 0 the untouched model.

    `looks` are the live probes, [(x, score)] within each task: a few rows each, so they may lie beside the points.
    """
    matrix, scorers = run.matrix, scorers_of(run.matrix)
    found = []
    for j, task in enumerate(matrix["tasks"]):
        columns = {s: [get(matrix["before"].get(s), j), *(get(row, j) for row in matrix["scores"][s])] for s in scorers}
        found.append(curve(run, task, columns, (j, j + 1)))
    for name, columns in matrix["watch"].items():
        found.append(curve(run, name, {s: columns[s] for s in sorted(columns, key=lambda s: [*scorers, s].index(s))}, None))
    return [one for one in found if one["lines"]]


def curve(run: Run, name: str, columns: dict[str, list], trained: tuple[int, int] | None) -> dict[str, Any]:
    lines = []
    for scorer, values in columns.items():
        points = [(float(x), value) for x, v in enumerate(values) if (value := number(v)) is not None]
        if points:
            lines.append({"scorer": title(scorer), "points": points, "looks": [looks(commit, name, scorer) for commit in run.commits]})
    return {"name": name, "n": run.matrix["n"].get(name), "watched": trained is None, "trained": trained, "lines": lines}


def looks(commit: Commit, name: str, scorer: str) -> list[tuple[float, float]]:
    """[(x, score)] of the live probes of one task's training, x from the task's index to the next."""
    probes = objects(commit.metrics.get("probes"))
    steps = [number(probe.get("step")) for probe in probes]
    last = max([number(mapping(commit.metrics.get("protection")).get("steps")) or 0.0, *(s for s in steps if s is not None)], default=0.0) or 1.0
    values = [number(mapping(mapping(probe.get("scores")).get(name)).get(scorer)) for probe in probes]
    return [(commit.index + step / last, value) for step, value in zip(steps, values, strict=True) if step is not None and value is not None]


# ---- rows that flipped


def flips(run: Run) -> dict[str, Any] | None:
    """Between each commit and the next: how many rows of each earlier task and watch set were right and are wrong, how many the other way, and examples where words were stored.

    Counted by the first of the run's scorers that says right or wrong (0 or 1) of each of a task's rows. None where no two commits have rows in common.
    """
    scorers, watched = [*(s for s in scorers_of(run.matrix) if s != "metric"), "calibrated", "metric"], list(run.matrix["watch"])
    rows, examples, by = [], [], set()
    was: dict[tuple[str, Any], dict[str, Any]] = {}
    for place, commit in enumerate(run.commits):
        now, cells = read_predictions(commit), {}
        for name in [*(c.task for c in run.commits[:place]), *watched] if was else ():
            pairs = [(row, line, now[task, row]) for (task, row), line in was.items() if task == name and (task, row) in now]
            scorer = next((s for s in scorers if pairs and all(right(line, s) is not None for _, *both in pairs for line in both)), None)
            if scorer is None:
                continue
            lost = [(row, a, b) for row, a, b in pairs if right(a, scorer) and not right(b, scorer)]
            cells[name] = flip_cell(name, len(lost), sum(not right(a, scorer) and right(b, scorer) for _, a, b in pairs), len(pairs), scorer)
            by.add(named_scorer(scorer))
            for row, a, b in lost[:EXAMPLES]:
                said = [get(line.get("prediction"), "exact_match" if scorer == "metric" else scorer) for line in (a, b)]
                if "answer" in b and None not in said:
                    examples.append(
                        {"after": commit.task, "task": name, "row": row, "answer": b["answer"], "was": said[0], "is": said[1], "lost": len(lost)}
                    )
        if cells:
            rows.append({"label": f"after {commit.task}", "found": cells})
        was = now
    if not rows:
        return None
    columns = [name for name in [*(c.task for c in run.commits), *watched] if any(name in row["found"] for row in rows)]
    for row in rows:
        found = row.pop("found")
        row["cells"] = [found.get(name, {"text": None, "tip": f"{name}: not learned yet, or not measured", "own": False}) for name in columns]
    shown = sorted(range(len(examples)), key=lambda k: -examples[k]["lost"])[:EXAMPLES_SHOWN]  # those of the tasks that lost most
    return {
        "title": "Right before, wrong now", "by": ", ".join(sorted(by)), "rows": rows,
        "tasks": [(name, run.matrix["n"].get(name)) for name in columns],
        "examples": [examples[k] for k in sorted(shown)], "more": len(examples) - len(shown),
    }  # fmt: skip


def right(line: dict[str, Any], scorer: str) -> bool | None:
    """Was the row right? None where the score is not 0 or 1."""
    value = number(get(line.get("score"), scorer))
    return None if value not in (0.0, 1.0) else value == 1.0


def flip_cell(name: str, lost: int, gained: int, n: int, scorer: str) -> dict[str, Any]:
    """As many lost as won would leave the mean as it was, and yet be another model: both are told."""
    tip = f"{name}: of {n} rows {lost} were right and are wrong, {gained} were wrong and are right ({named_scorer(scorer)})"
    return {
        "text": f"−{count(lost)}" if lost else "0",
        "shade": shade(lost / n),
        "small": f"+{count(gained)}" if gained else "",
        "tip": tip,
        "own": False,
    }

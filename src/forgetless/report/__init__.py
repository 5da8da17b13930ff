"""The report of one run, or of several compared: one HTML file, no network, no script, the same bytes from the same run folders.

`write_report` reads what a run leaves (run.yaml, matrix.json, timing.jsonl, lineage.jsonl), turns it into plain views (numbers already
formatted, nothing but text) and fills `report.html.j2`.
Whatever comes from data is escaped: by Jinja in the template, by `Markup.format` in the SVG.
"""

from __future__ import annotations

import json
import math
import os
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from forgetless.errors import DataError
from forgetless.evaluation.matrix import wilson

Points = list[tuple[float, float]]  # (step, loss)
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
SIGNED = {"backward_transfer", "forward_transfer"}
POINTS_A_CHART = 1200  # more would only make the file heavier: the chart is about 900 pixels wide


def write_report(run_dirs: list[Path], out: Path) -> Path:
    """Write the report of `run_dirs` (one or several, in the order given) to `out`, whole or not at all, and return `out`.

    Raises:
        DataError: no run folder given; a folder is missing, empty or not a run; run.yaml or matrix.json is missing or malformed.
    """
    if not run_dirs:
        raise DataError("no run folder to report on: name at least one, such as runs/first")
    paths = [Path(run_dir) for run_dir in run_dirs]
    names = [path.resolve().name for path in paths]
    runs = [read_run(path, name if names.count(name) == 1 else path.as_posix()) for path, name in zip(paths, names, strict=True)]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8"))
    scorers = ({"metric": OWN} if any("metric" in run["metrics"] for run in runs) else {}) | SCORERS
    html = template.render(runs=runs, summary=summary_view(runs, scorers), scorers=scorers, metric_text=METRICS)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.tmp")
    partial.write_bytes(html.encode("utf-8", "replace"))  # a lone surrogate in a prompt is no reason to have no report
    os.replace(partial, out)
    return out


# ---- reading a run folder


def read_run(path: Path, name: str) -> dict[str, Any]:
    """Everything the template shows about one run, as text and views."""
    if not path.is_dir() or not any(path.iterdir()):
        what = "the folder is empty" if path.is_dir() else "no such folder"
        raise DataError(f"{path}: {what}; name the output_dir of a run, which holds run.yaml and matrix.json")
    config_text, config = read_config(path / "run.yaml")
    matrix = read_matrix(path / "matrix.json")
    tasks = matrix["tasks"]
    timing = read_timing(path / "timing.jsonl", tasks)
    lineage, lineage_skipped = read_jsonl(path / "lineage.jsonl")
    method = config.get("method")
    order = ["metric", *SCORERS]
    scorers = [*(s for s in order if s in matrix["scores"]), *(s for s in matrix["scores"] if s not in order)]
    done = max((len(rows) for rows in matrix["scores"].values()), default=0)
    return {
        "name": name,
        "model": config.get("model", "not stated"),
        "method": method.get("name", "not stated") if isinstance(method, dict) else method or "not stated",
        "seed": config.get("seed", "not stated"),
        "tasks": tasks,
        "done": done,
        "data": [line.get("data_sha256") for line in sorted(lineage, key=lambda line: str(line.get("task")))],
        "finished": done >= len(tasks),
        "n": {task: matrix["n"][task] for task in tasks if task in matrix["n"]},
        "metrics": {scorer: dict(matrix["metrics"].get(scorer) or {}) for scorer in scorers},
        "heat_maps": [score_map(scorer, matrix) for scorer in scorers],
        "watch": watch_map(matrix),
        "failures": [{"title": FAILURES.get(kind, kind), **heat_map(matrix, rows)} for kind, rows in matrix["failures"].items()],
        "metric_table": metric_table(scorers, matrix["metrics"]),
        "loss_chart": loss_chart([(i, tasks[i], points) for i, points in sorted(timing["loss"].items())]),
        "costs": [cost_row(i, timing["tasks"][i]) for i in sorted(timing["tasks"])],
        "captured": any("captured" in record for record in timing["tasks"].values()),
        "coverage": coverage_table(timing["tasks"]),
        "config": config_text,
        "lineage": lineage,
        "not_measured": not_measured(path, matrix, scorers, timing),
        "skipped": [f"{count} {what}" for count, what in [*timing["skipped"], (lineage_skipped, "unreadable line(s) of lineage.jsonl")] if count],
    }


def read_config(path: Path) -> tuple[str, dict[str, Any]]:
    """The text of run.yaml and what it says."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; every run has one: is {path.parent} the output_dir of a run?")
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not YAML ({' '.join(str(error).split())}); the run wrote it and nobody should edit it") from error
    if not isinstance(config, dict):
        raise DataError(f"{path}: a mapping with model, method, seed and tasks was expected, found {type(config).__name__}")
    return text, config


def read_matrix(path: Path) -> dict[str, Any]:
    """matrix.json, its optional parts filled in with nothing."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; it is written after the first task of a run: wait for one, or name another run folder")
    try:
        matrix = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        matrix.update({part: dict(matrix.get(part) or {}) for part in ("before", "n", "ci95", "metrics", "failures", "watch", "metric_of")})
        if not matrix["tasks"] or not all(isinstance(row, list) for rows in matrix["scores"].values() for row in rows):
            raise TypeError("no tasks, or scores that are not rows")
        if not all(isinstance(row, list) for scores in matrix["watch"].values() for row in scores.values()):
            raise TypeError("watch holds scores that are not rows")
        matrix["tasks"] = [str(task) for task in matrix["tasks"]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: not an accuracy matrix ({type(error).__name__}: {error}); running the same config again writes it anew") from error
    return matrix


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSON Lines file and how many lines could not be read; a last line cut short by a kill is not counted."""
    if not path.is_file():
        return [], 0
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records, bad = [], 0
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line) if line.strip() else None
            if record is not None:
                records.append(dict(record))
        except (ValueError, TypeError):
            bad += number < len(lines)  # a whole line ends in a newline, so what follows the last newline is a line cut short
    return records, bad


def read_timing(path: Path, tasks: list[str]) -> dict[str, Any]:
    """Loss points and the last task record by task index. What a retrained task logged the first time is dropped."""
    records, bad = read_jsonl(path)
    loss: dict[int, list[tuple[float, float | None]]] = {}
    done: dict[int, dict[str, Any]] = {}
    foreign = 0
    for record in records:
        index, step = record.get("index"), number(record.get("step"))
        if not isinstance(index, int) or not 0 <= index < len(tasks) or record.get("task") != tasks[index]:
            foreign += 1
        elif record.get("event") == "task":
            done[index] = record
        elif record.get("event") == "step" and step is not None:
            points = loss.setdefault(index, [])
            while points and points[-1][0] >= step:  # resumed from a checkpoint, or from the beginning
                points.pop()
            points.append((step, number(record.get("loss"))))
    broken = sum(value is None for points in loss.values() for _, value in points)
    loss = {index: kept for index, points in loss.items() if (kept := [p for p in points if p[1] is not None])}
    skipped = [(bad, "unreadable line(s) of timing.jsonl"), (foreign, "line(s) of timing.jsonl that belong to no task of this run")]
    return {"loss": loss, "tasks": done, "skipped": [*skipped, (broken, "step(s) whose loss is not a number")]}


# ---- views


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
    counts = [run["n"].get(task) for task in run["tasks"][: run["done"]]]
    if not counts or None in counts:
        return "not stated"
    return f"{len(counts)} × {counts[0]}" if len(set(counts)) == 1 else f"{sum(counts)} in {len(counts)} tasks"


def score_map(scorer: str, matrix: dict[str, Any]) -> dict[str, Any]:
    """The accuracy matrix of one scorer, with the row before training on top."""
    view = heat_map(matrix, matrix["scores"][scorer], matrix["ci95"].get(scorer))
    before = [cell(task, matrix["n"].get(task), get(matrix["before"].get(scorer), j)) for j, task in enumerate(matrix["tasks"])]
    return {"title": title(scorer), **view, "rows": [{"label": "before training", "cells": before}, *view["rows"]], "kinds": kinds(scorer, matrix)}


def title(scorer: str) -> str:
    return OWN if scorer == "metric" else SCORERS.get(scorer, scorer)


def kinds(scorer: str, matrix: dict[str, Any]) -> str:
    """Which metric each task has, in words, where the scorer is that."""
    return ", ".join(f"{task}: {matrix['metric_of'][task]}" for task in matrix["tasks"] if task in matrix["metric_of"]) if scorer == "metric" else ""


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
    for i, label in enumerate(["before training", *(f"after {task}" for task in matrix["tasks"])]):
        found = [(shown, n, number(get(values, i))) for shown, n, values in columns]
        cells = [
            cell(shown, n, value, wilson(value, n) if number(n) and value is not None and 0 <= value <= 1 else None) for shown, n, value in found
        ]
        rows.append({"label": label, "cells": cells})
    return {"title": "Watched, never trained", "tasks": [(shown, n) for shown, n, _ in columns], "rows": rows}


def heat_map(matrix: dict[str, Any], values: list[list], ci95: list | None = None) -> dict[str, Any]:
    """Every task's row, those not reached yet too, as cells."""
    tasks, n = matrix["tasks"], matrix["n"]
    rows = []
    for i, after in enumerate(tasks):
        cells = [cell(task, n.get(task), get(get(values, i), j), get(get(ci95, i), j), own=i == j) for j, task in enumerate(tasks)]
        rows.append({"label": f"after {after}", "cells": cells})
    return {"tasks": [(task, n.get(task)) for task in tasks], "rows": rows}


def cell(task: str, n: int | None, value: Any, interval: Any = None, own: bool = False) -> dict[str, Any]:
    """{text, shade, interval, tip, own}; a cell that was not measured has text None. `own`: measured right after learning this task."""
    value, low, high = number(value), number(get(interval, 0)), number(get(interval, 1))
    if value is None:
        return {"text": None, "tip": f"{task}: not measured", "own": own}
    known = low is not None and high is not None
    spread = f"95 % interval {100 * low:.1f} to {100 * high:.1f} %" if known else "no interval recorded"
    tip = f"{task}: {100 * value:.1f} %, n = {'not stated' if n is None else n}, {spread}"
    shade, short = f"{min(max(value, 0.0), 1.0):.3f}", f"{100 * low:.0f}–{100 * high:.0f}" if known else ""
    return {"text": percent(value), "shade": shade, "interval": short, "tip": tip, "own": own}


def metric_table(scorers: list[str], metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a metric, every key that is there, the known ones first."""
    found = {key for scorer in scorers for key in metrics.get(scorer) or {}}
    rows = []
    for key in [*(key for key in METRICS if key in found), *sorted(found - set(METRICS))]:
        title, meaning = METRICS.get(key, (key.replace("_", " ").capitalize(), ""))
        rows.append({"title": title, "meaning": meaning, "values": [percent(get(metrics.get(s), key), key) for s in scorers]})
    return rows


def cost_row(index: int, record: dict[str, Any]) -> dict[str, Any]:
    """One task's seconds, bytes, leaks and protected space as text; None where nothing was recorded."""
    leak, bound, space = number(record.get("weight_leak")), number(record.get("weight_leak_bound")), record.get("space")
    return {
        "name": f"{index + 1}. {record['task']}",
        "cost": [
            record.get("steps"),
            fixed(record.get("train_seconds")),
            fixed(record.get("eval_seconds")),
            size(record.get("peak_bytes")),
        ],
        "update_leak": small(record.get("update_leak")),
        "weight_leak": small(leak),
        "bound": small(bound),
        "over": None not in (leak, bound) and leak > bound,
        "captured": [percent(record.get("captured")), percent(record.get("captured_of_best"))],
        "space": [get(space, "modules"), fixed(get(space, "rank_mean")), get(space, "rank_max"), percent(get(space, "share"))],
    }


def coverage_table(tasks: dict[int, dict[str, Any]]) -> dict[str, Any] | None:
    """Rows: the task just trained. Columns: the earlier tasks, in the order they first appear."""
    measured = {i: record["coverage"] for i, record in sorted(tasks.items()) if record.get("coverage")}
    columns = list(dict.fromkeys(earlier for coverage in measured.values() for earlier in coverage))
    rows = []
    for i, coverage in measured.items():
        pairs = [(get(coverage.get(task), "inputs"), get(coverage.get(task), "output_change")) for task in columns]
        rows.append({"task": tasks[i]["task"], "cells": [(percent(inputs), percent(change, digits=2)) for inputs, change in pairs]})
    return {"columns": columns, "rows": rows} if columns else None


def not_measured(path: Path, matrix: dict, scorers: list[str], timing: dict[str, Any]) -> list[str]:
    """What a reader might look for and this run did not record."""
    tasks, rows = matrix["tasks"], [row for scorer in scorers for row in enumerate(matrix["scores"][scorer])]
    records = timing["tasks"].values()
    missing = {
        "the untouched model (no before row)": not matrix["before"],
        "tasks not yet trained (evaluate.unseen was off)": any(number(get(row, j)) is None for i, row in rows for j in range(i + 1, len(tasks))),
        "some tasks already trained": any(number(get(row, j)) is None for i, row in rows for j in range(min(i + 1, len(tasks)))),
        **{f"{SCORERS[scorer].lower()} scores": scorer not in scorers for scorer in SCORERS},
        "forward transfer": all(number(get(matrix["metrics"].get(s), "forward_transfer")) is None for s in scorers),
        "95 % intervals": not matrix["ci95"],
        "how exact match failed": not matrix["failures"],
        "loss, time and memory (no timing.jsonl)": not (path / "timing.jsonl").is_file(),
        "leaks": all(number(r.get(leak)) is None for r in records for leak in ("update_leak", "weight_leak")),
        "coverage of earlier inputs": not any(r.get("coverage") for r in records),
        "lineage (no lineage.jsonl)": not (path / "lineage.jsonl").is_file(),
    }
    return [what for what, is_missing in missing.items() if is_missing]


# ---- the loss chart (inline SVG; colours come from the page's style sheet)


def loss_chart(segments: list[tuple[int, str, Points]], width: int = 960, height: int = 270) -> Markup | None:
    """One line a task, (index, task, [(step, loss)]) each, along the whole stream; faint is what was logged, strong its running mean."""
    if not segments:
        return None
    left, right, top, bottom = 44, 8, 30, 40
    total = sum(points[-1][0] for _, _, points in segments) or 1.0
    ceiling, tick = nice_ceiling(max(loss for _, _, points in segments for _, loss in points))
    floor = min(0.0, min(loss for _, _, points in segments for _, loss in points))
    parts, said, start = [], [], 0.0

    def x(step: float) -> float:
        return left + (width - left - right) * step / total

    def y(loss: float) -> float:
        return top + (height - top - bottom) * (ceiling - loss) / (ceiling - floor)

    for level in (tick * k for k in range(round(ceiling / tick) + 1)):
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(left, width - right, y(level), y(level)))
        parts.append(Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{:g}</text>').format(left - 8, y(level) + 4, level))
    for index, task, points in segments:
        end = start + points[-1][0]
        said.append(f"{task} from {points[0][1]:.3g} to {points[-1][1]:.3g} in {points[-1][0]:g} steps")
        room = int((x(end) - x(start) - 10) / 7)  # characters of about 7 pixels; a task too narrow for a word shows its number
        label = task if len(task) <= room else f"{task[: room - 1]}…" if room >= 5 else str(index + 1)
        parts.append(Markup('<line class="boundary" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>').format(x(start), top - 18, height - bottom))
        parts.append(Markup('<text class="label" x="{:.1f}" y="{}">{}<title>{}</title></text>').format(x(start) + 6, top - 8, label, task))
        parts.append(Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="end">{:g}</text>').format(x(end), height - bottom + 16, end))
        thin = thinned(points, max(2, POINTS_A_CHART // len(segments)))
        for kind, line in (("raw", thin), ("mean", running_mean(thin, max(1, len(thin) // 24)))):
            drawn = " ".join(f"{x(start + step):.1f},{y(loss):.1f}" for step, loss in line)
            parts.append(Markup('<polyline class="{}" points="{}"><title>{}</title></polyline>').format(kind, drawn, said[-1]))
        start = end
    parts.append(Markup('<text class="tick" x="{}" y="{}">training steps over the stream</text>').format(left, height - 6))
    title = f"Training loss over the stream: {'; '.join(said)}"
    head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}"><title>{}</title>').format(width, height, title, title)
    return head + Markup("").join(parts) + Markup("</svg>")


def nice_ceiling(value: float) -> tuple[float, float]:
    """The top of an axis and the distance of its ticks: 3 to 6 ticks of 1, 2, 2.5 or 5 times a power of ten.

    >>> nice_ceiling(2.3)
    (2.5, 0.5)
    """
    if value <= 0:
        return 1.0, 0.5
    power = 10.0 ** math.floor(math.log10(value))
    tick = next(power * k for k in (0.2, 0.25, 0.5, 1.0, 2.0, 2.5) if value / (power * k) <= 5)
    return tick * math.ceil(value / tick), tick


def thinned(points: Points, most: int) -> Points:
    """At most `most` points, each the mean loss of a bucket of neighbours at the bucket's last step."""
    size = math.ceil(len(points) / most)
    buckets = [points[i : i + size] for i in range(0, len(points), size)]
    return [(bucket[-1][0], sum(loss for _, loss in bucket) / len(bucket)) for bucket in buckets]


def running_mean(points: Points, window: int) -> Points:
    """Mean of up to `window` neighbours on each side (a mean of the past alone would hang above a falling loss)."""
    smooth = []
    for i, (step, _) in enumerate(points):
        reach = min(window, i, len(points) - 1 - i)
        near = [loss for _, loss in points[i - reach : i + reach + 1]]
        smooth.append((step, sum(near) / len(near)))
    return smooth


# ---- numbers


def number(value: Any) -> float | None:
    """A finite number, or None: NaN, infinity, text and absent values are all `not measured`."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None


def get(container: Any, key: Any) -> Any:
    """container[key], or None when any of it is not there (rows of an unfinished run are short)."""
    try:
        return container[key]
    except (TypeError, LookupError):
        return None


def percent(value: Any, metric: str = "", digits: int = 1) -> str | None:
    """0.8754 -> '87.5'; a transfer carries its sign; the minus is a minus, not a hyphen."""
    value = number(value)
    if value is None:
        return None
    text = f"{100 * value:{'+' if metric in SIGNED else ''}.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", "−")


def fixed(value: Any) -> str | None:
    return None if number(value) is None else f"{value:.1f}"


def small(value: Any) -> str | None:
    """A leak: two digits and a power of ten, and an exact zero as 0."""
    return None if number(value) is None else f"{value:.1e}" if value else "0"


def size(value: Any) -> str | None:
    return None if number(value) is None else f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"

"""Read what a run folder holds for its report: run.yaml, matrix.json, timing.jsonl, lineage.jsonl, and each commit's metrics.json and predictions.

No torch: a report is written in a blink. Only run.yaml and matrix.json must be there. A folder of an older version lacks some of the rest, and an interrupted one holds
half a line: neither is an error, and what could not be read is said.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from forgetless.errors import DataError

from .numbers import number


@dataclass
class Commit:
    """A model that was committed, or refused: its folder's name, its task, what metrics.json says, and where that lies."""

    folder: str
    index: int
    task: str
    metrics: dict[str, Any]
    path: Path


@dataclass
class Run:
    """A run folder as read. `commits` are those from the first task to the current one, `rejected` those the gate refused, in the order of the lineage."""

    path: Path
    name: str
    config_text: str
    config: dict[str, Any]
    matrix: dict[str, Any]
    timing: dict[str, Any]
    lineage: list[dict[str, Any]]
    commits: list[Commit] = field(default_factory=list)
    rejected: list[Commit] = field(default_factory=list)
    current: str = ""
    head: list[str] = field(default_factory=list)  # folders from the first task to the current one
    began: dict[str, list[str]] = field(default_factory=dict)  # folder under rejected/: the folders whose last one it began from
    tags: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


def read_run(path: Path, name: str = "") -> Run:
    """Everything a report shows about one run.

    Raises:
        DataError: the folder is missing, empty or not a run; run.yaml or matrix.json is missing or malformed.
    """
    if not path.is_dir() or not any(path.iterdir()):
        what = "the folder is empty" if path.is_dir() else "no such folder"
        raise DataError(f"{path}: {what}; name the output_dir of a run, which holds run.yaml and matrix.json")
    config_text, config = read_config(path / "run.yaml")
    matrix = read_matrix(path / "matrix.json")
    lineage, bad_lines = read_jsonl(path / "lineage.jsonl")
    current = (path / "current").read_text(encoding="utf-8", errors="replace").strip() if (path / "current").is_file() else ""
    branches, head, began = follow(lineage)
    head = branches.get(current, head)
    timing = read_timing(path / "timing.jsonl", matrix["tasks"], set(head) if current else set(), {folder_of(line) for line in lineage})
    run = Run(path, name or path.resolve().name, config_text, config, matrix, timing, lineage, current=current, head=head, began=began)
    refused = dict.fromkeys(folder_of(line) for line in lineage if line.get("kind") == "reject")
    here = sorted(p.name for p in (path / "rejected").iterdir() if p.is_dir() and not p.name.startswith(".")) if (path / "rejected").is_dir() else []
    damaged: list[str] = []
    run.commits = [commit for folder in head if (commit := read_commit(path / "tasks", folder, damaged))]
    run.rejected = [commit for folder in dict.fromkeys([*refused, *here]) if (commit := read_commit(path / "rejected", folder, damaged))]
    run.tags = read_tags(path / "tags.json")
    counted = [*timing["skipped"], (bad_lines, "unreadable line(s) of lineage.jsonl"), (len(damaged), "unreadable metrics.json")]
    run.skipped = [f"{count} {what}" for count, what in counted if count]
    return run


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
    for place, line in enumerate(lines, 1):
        try:
            record = json.loads(line) if line.strip() else None
            if record is not None:
                records.append(dict(record))
        except (ValueError, TypeError):
            bad += place < len(lines)  # a whole line ends in a newline, so what follows the last newline is a line cut short
    return records, bad


def read_timing(path: Path, tasks: list[str], head: set[str], known: set[str]) -> dict[str, Any]:
    """Loss points and the last task record by task index. What a retrained task logged the first time is dropped, and what led to a model that is not current.

    head: the folders that are; known: all that the lineage names. Without a head every line counts.
    """
    records, bad = read_jsonl(path)
    loss: dict[int, list[tuple[float, float | None]]] = {}
    done: dict[int, dict[str, Any]] = {}
    foreign = 0
    for record in records:
        index, step = record.get("index"), number(record.get("step"))
        folder = folder_of(record)
        if head and folder in known - head:
            continue  # rolled back, or refused
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


def read_commit(room: Path, folder: str, damaged: list[str]) -> Commit | None:
    """What a folder in tasks/ or rejected/ says of itself; None without metrics.json, and its name joins `damaged` where that cannot be read."""
    file = room / folder / "metrics.json"
    if Path(folder).name != folder or not file.is_file():  # a name in a damaged lineage may be any path
        return None
    try:
        metrics = dict(json.loads(file.read_text(encoding="utf-8", errors="replace")))
        return Commit(folder, int(metrics["index"]), str(metrics["task"]), metrics, room / folder)
    except (ValueError, TypeError, KeyError):
        damaged.append(folder)
        return None


def read_predictions(commit: Commit) -> dict[tuple[str, Any], dict[str, Any]]:
    """{(task, row): line} of one commit's predictions.jsonl; empty where it has none."""
    lines, _ = read_jsonl(commit.path / "predictions.jsonl")
    return {(str(line["task"]), row): line for line in lines if "task" in line and isinstance(row := line.get("row"), (int, str))}


def read_tags(path: Path) -> dict[str, str]:
    """{tag: folder under tasks/}; empty where it cannot be read, since tags decide nothing here."""
    try:
        return {str(tag): str(folder) for tag, folder in json.loads(path.read_text(encoding="utf-8", errors="replace")).items()}
    except (OSError, ValueError, AttributeError):
        return {}


# ---- the lineage, as in lineage.py, which needs torch and a whole folder; this one takes what there is


def folder_of(line: dict[str, Any]) -> str:
    """The folder's name of a task or reject line, and of a line of timing.jsonl; of a rollback the one that became current."""
    index = line.get("index")
    own = f"{index:02d}-{line.get('task')}" if isinstance(index, int) else ""
    return str(line.get("to") or line.get("folder") or own)


def follow(lineage: list[dict[str, Any]]) -> tuple[dict[str, list[str]], list[str], dict[str, list[str]]]:
    """({folder: the folders from the first task to it} of every commit, the same of where the last line leaves the run, and of where each refused model began)."""
    branches: dict[str, list[str]] = {}
    began: dict[str, list[str]] = {}
    head: list[str] = []
    for line in lineage:
        if line.get("kind") == "rollback":
            head = branches.get(folder_of(line), head)
        elif line.get("kind") == "reject":
            began[folder_of(line)] = head
        elif isinstance(line.get("index"), int):
            head = branches[folder_of(line)] = [*head[: line["index"]], folder_of(line)]
    return branches, head, began

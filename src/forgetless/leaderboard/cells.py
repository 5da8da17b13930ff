"""One cell: a finished run as a JSON file, with all that the table is made of and what it was measured on."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import yaml

from ..bench.results import cpu_model
from ..errors import DataError
from ..files import write_atomic
from . import protocols
from .spec import Also, Cell, Spec

CODE = 2  # raised by hand when a fix changes numbers: cells of an earlier code are done again. 2: every task under bf16 autocast
THREADS = 1  # of each process: two of one thread are faster than one of two


def place(results: Path, cell: Cell) -> Path:
    return results / f"{cell.name}.json"


def read(path: Path) -> dict[str, Any] | None:
    """A cell's content, None where there is none of today's code. Raises DataError where the file is damaged."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if content["code"] == CODE else None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is not a cell of a leaderboard ({error}); take the file away, and its run is done again") from None


def measured(folder: Path, also: Also | None) -> dict[str, Any]:
    """What was measured beside the scores, from a finished run's folder, by its key in a cell: unseen, general, relearning."""
    from ..evaluation import general, relearn
    from ..evaluation.unseen import unseen

    found: dict[str, Any] = {}
    parts = also.parts() if also else set()
    if "unseen" in parts:
        found["unseen"] = unseen(folder)
    if "general" in parts:
        before, after = json.loads((folder / general.FILE).read_text(encoding="utf-8"))["measured"]
        suites = {name: {"n": now["n"], "before": before["suites"][name]["score"], "after": now["score"]} for name, now in after["suites"].items()}
        found["general"] = {"suites": {name: one | after["change"][name] for name, one in suites.items()}, "mean_change": after["mean_change"]}
    if "relearning" in parts:
        found["relearning"] = json.loads((folder / relearn.FILE).read_text(encoding="utf-8"))
    return found


def content(
    spec: Spec, cell: Cell, config: dict[str, Any], chosen: dict[str, Any] | None, total_seconds: float | None, extra: dict[str, Any]
) -> dict[str, Any]:
    """What a finished run says, from its folder. extra: relearning, unseen, general, where they were measured."""
    folder = Path(config["output_dir"])
    matrix = json.loads((folder / "matrix.json").read_text(encoding="utf-8"))
    timing = [json.loads(line) for line in (folder / "timing.jsonl").read_text(encoding="utf-8").splitlines()]
    done = [event for event in timing if event["event"] == "task"]
    learned = [scored(folder, i, task) for i, task in enumerate(matrix["tasks"])]
    last = scored(folder, len(learned) - 1, matrix["tasks"][-1])
    scorers, tasks = list(matrix["scores"]), matrix["tasks"]  # a task's own metric is among them
    return {
        "cell": cell.name, "row": cell.row, "stream": cell.stream, "prompt": cell.prompt, "seed": cell.seed,
        "protocol": protocols.get(cell.protocol).content(), "chosen": chosen, "method": config["method"], "learning_rate": config["train"]["learning_rate"],
        "config": config | {"output_dir": ""}, "environment": environment((folder / "run.yaml").read_text(encoding="utf-8")),
        "code": CODE, **{key: matrix[key] for key in ("tasks", "scores", "before", "ci95", "metrics", "failures")},
        "n": {task: matrix["n"][task] for task in tasks},  # and of no watch set
        "rows": {
            "final": {s: by_task(s, [last] * len(tasks), tasks) for s in scorers},
            "learned": {s: by_task(s, learned, tasks) for s in scorers},
        },
        "protection": done,
        "seconds": {
            "train": total(done, "train_seconds"), "train_cpu": total(done, "train_cpu_seconds"), "evaluation": total(done, "eval_seconds"), "total": total_seconds,
        },
        "bytes": {
            "optimizer": max(event.get("state_bytes") or 0 for event in done), "memory": done[-1].get("memory_bytes"),
            "peak": max((event["peak_bytes"] for event in done if event.get("peak_bytes")), default=None),
        },
        "stored_rows": stored_rows(config, matrix),
        **extra,
    }  # fmt: skip


def finished(folder: Path, config: dict[str, Any]) -> bool:
    """Has a run learned all its tasks? Its weights may be gone by then."""
    try:
        matrix = json.loads((folder / "matrix.json").read_text(encoding="utf-8"))
        return len(matrix["scores"][config["evaluate"]["scorers"][0]]) == len(config["tasks"])
    except (OSError, ValueError, KeyError):
        return False


def spent(folder: Path) -> bool:
    """Have a run's weights gone, as they do once its cell is written?"""
    return not any(folder.glob("tasks/*/model/*.safetensors"))


def too_late(folder: Path, config: dict[str, Any], also: Also | None) -> bool:
    """Has a run ended and let go of its weights without a measurement that is asked of them?"""
    from ..evaluation.relearn import FILE

    return bool(also and also.relearn) and finished(folder, config) and spent(folder) and not (folder / FILE).is_file()


def scored(folder: Path, index: int, task: str) -> dict[str, list[dict[str, Any]]]:
    """{task: its scored rows in order} when the `index`-th task was committed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in (folder / "tasks" / f"{index:02d}-{task}" / "predictions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["task"], []).append(row)
    return {name: sorted(rows, key=lambda row: row["row"]) for name, rows in found.items()}


def by_task(scorer: str, found: list[dict[str, list[dict[str, Any]]]], tasks: list[str]) -> dict[str, str | list[float]]:
    """Of each task the scores of its rows, from `found` a task; a task without this score (choice, where answers are free text) is left out."""
    values = {task: [row["score"].get(scorer) for row in rows[task]] for task, rows in zip(tasks, found, strict=True)}
    return {task: digits(scores) for task, scores in values.items() if None not in scores}


def digits(values: list[float]) -> str | list[float]:
    """Scores as a digit each where they are 0 and 1, as numbers where they lie between."""
    return "".join(str(int(v)) for v in values) if all(v in (0, 1) for v in values) else [round(v, 4) for v in values]


def total(events: list[dict[str, Any]], key: str) -> float | None:
    """None where any task's was not measured: a part of a sum is no sum."""
    values = [event.get(key) for event in events]
    return None if any(value is None for value in values) else round(sum(values), 2)


def stored_rows(config: dict[str, Any], matrix: dict[str, Any]) -> int | None:
    """Rows of all tasks that the method holds or reads again after the last: what its buffer may hold, or what is trained on a task; None where that is not known."""
    from ..methods import get

    method = get(config["method"]["name"], **{k: v for k, v in config["method"].items() if k != "name"})
    if method.stores == "nothing" and not method.needs_old_data:
        return 0
    tasks = len(matrix["tasks"])
    buffer, per = getattr(method.options, "buffer", None), getattr(method.options, "per", "task")
    if buffer is not None:
        return buffer * (tasks if per == "task" else 1)
    train = config["train"]
    if train.get("max_steps"):
        return train["max_steps"] * train["per_device_train_batch_size"] * tasks  # as many as a task trains on
    return None


def environment(run_yaml: str) -> dict[str, Any]:
    """What a run ran on; run_yaml: the file's text, with the versions in its first line."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    autocast = bool(yaml.safe_load(run_yaml)["train"].get("bf16"))
    versions = run_yaml.splitlines()[0].removeprefix("# ")
    return {"machine": platform.machine(), "cpu": cpu_model(), "device": device, "threads": THREADS, "bf16_autocast": autocast, "versions": versions}


def failed(spec: Spec, cell: Cell, config: dict[str, Any], chosen: dict[str, Any] | None, why: str) -> dict[str, Any]:
    """A cell whose training diverged: a result too, and not to be run again."""
    return {
        "cell": cell.name, "row": cell.row, "stream": cell.stream, "prompt": cell.prompt, "seed": cell.seed, "protocol": protocols.get(cell.protocol).content(),
        "chosen": chosen, "method": config["method"], "learning_rate": config["train"]["learning_rate"], "config": config | {"output_dir": ""}, "code": CODE, "failed": why,
    }  # fmt: skip


def write(results: Path, cell: Cell, found: dict[str, Any]) -> None:
    path = place(results, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    # a line for each entry of the first level: a file that can be read, and compared line by line
    write_atomic(path, "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in found.items()) + "\n}\n")

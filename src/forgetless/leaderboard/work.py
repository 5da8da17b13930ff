"""The queue: every missing cell in a process of its own, as many at once as asked for. A finished cell is never done again; an interrupted run goes on where it was."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from threading import Lock
from typing import Any

from ..errors import ConfigError
from ..files import write_atomic
from ..lock import FolderLock
from . import cells as files
from . import protocols
from .spec import Cell, Relearning, Spec, also_of, cells, run_config, trials

FAILED, DIVERGED = 1, 5  # exit statuses of `forgetless run`


@dataclass
class Plan:
    """What there is to do: the trials and cells of a spec, and which of them are there."""

    trials: list[Cell]
    cells: list[Cell]
    done: dict[str, dict[str, Any]]

    def missing(self, of: Sequence[Cell]) -> list[Cell]:
        return [cell for cell in of if cell.name not in self.done]


def plan(spec: Spec) -> Plan:
    """Reads every cell that is there; one of settings that its row no longer has, or that its trials did not choose, does not count. Raises DataError where one is damaged."""
    tuning, table = trials(spec), cells(spec)
    settings, done = {row.row: row.trials() for row in spec.rows}, {}
    for cell in tuning:
        content = files.read(files.place(spec.results, cell))
        if content and (content["method"], content["learning_rate"]) == settings[cell.row][cell.trial]:
            done[cell.name] = content
    picks = {row: chosen(spec, row, done) for row in settings}
    for cell in table:
        if content := files.read(files.place(spec.results, cell)):
            own = settings[cell.row]
            lacking = (also.parts() if (also := also_of(spec, cell)) else set()) - content.keys()
            as_chosen = (content["method"], content["learning_rate"]) in (own if (pick := picks[cell.row]) is None else [own[pick["trial"]]])
            if as_chosen and ("failed" in content or not lacking):
                done[cell.name] = content
    return Plan(tuning, table, done)


def chosen(spec: Spec, row: str, done: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """{trial, of, score} of a row's best trial on the tuning stream; None while one is missing. Of equals the first. Where the protocol tunes nothing: its only trial."""
    protocol = protocols.get(spec.protocol)
    if not protocol.tuning:
        return {"trial": 0, "of": 1, "score": None}
    own = [cell for cell in trials(spec) if cell.row == row]
    if not own or any(cell.name not in done for cell in own):
        return None
    scores = [-1.0 if "failed" in (found := done[cell.name]) else found["metrics"][headline(found)]["average_accuracy"] for cell in own]
    best = max(range(len(own)), key=scores.__getitem__)
    if scores[best] < 0:
        raise ConfigError(f"row '{row}': all {len(own)} trials diverged; give it lower learning rates")
    return {"trial": best, "of": len(own), "score": scores[best]}


def work_through(spec: Spec, workers: int, only: str = "", tune_only: bool = False, say: Callable[[str], None] = print) -> bool:
    """Do what is missing, tier by tier and trials first, of the cells whose names hold `only`; writes each as it ends. Returns whether all of those are there now."""
    stages = [(spec.model_copy(update={"tiers": [tier]}), stage) for tier in spec.tiers for stage in ("trials", "cells")[: 1 if tune_only else 2]]
    return all([_stage(part, stage, workers, only, say) for part, stage in stages])


def _stage(spec: Spec, stage: str, workers: int, only: str, say: Callable[[str], None]) -> bool:
    found = plan(spec)
    todo, waiting = [], []
    for cell in found.missing(found.trials if stage == "trials" else found.cells):
        if only not in cell.name:
            continue
        pick = {"trial": cell.trial} if cell.trial is not None else chosen(spec, cell.row, found.done)
        todo.append((cell, pick)) if pick is not None else waiting.append(cell)
    if waiting:
        say(f"{len(waiting)} cells wait for trials on the tuning stream: {', '.join(dict.fromkeys(cell.row for cell in waiting))}")
    return Queue(spec, found, say).run(todo, workers) and not waiting


def repeat(spec: Spec, folder: Path, workers: int, only: str = "", say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Run cells that are there once more, into `folder`, and compare: [{cell, same_rows, difference, low, high}] of those that ran, difference = mean over tasks of the final
    score by the first scorer, again minus before, with its 95 % interval over rows. same_rows: every row of every task was answered as right or wrong as before, at both
    times. Raises ConfigError where no cell is meant."""
    from .comparing import difference
    from .reading import read

    found, fresh = plan(spec), spec.model_copy(update={"results": folder, "runs": folder / "runs"})
    todo = [cell for cell in found.cells if only in cell.name and "failed" not in found.done.get(cell.name, {"failed": ""})]
    if not todo:
        raise ConfigError(f"none of the {len(found.cells) - len(found.missing(found.cells))} cells that are there has '{only}' in its name")
    known = plan(fresh)
    settings = {row.row: row.trials() for row in spec.rows}
    missing = []
    for cell in todo:
        if cell.name not in known.done:  # by its settings: their place in the grid may have changed since
            was = found.done[cell.name]
            missing.append((cell, was["chosen"] | {"trial": settings[cell.row].index((was["method"], was["learning_rate"]))}))
    Queue(fresh, known, say).run(missing, workers)
    out = []
    for cell in todo:
        if files.read(files.place(folder, cell)) is None:
            continue
        before, again = read(files.place(spec.results, cell)), read(files.place(folder, cell))
        minus = difference([again], [before], next(iter(before.scores)))
        content = found.done[cell.name]["rows"], files.read(files.place(folder, cell))["rows"]
        same = all(content[0][when] == content[1][when] for when in content[0])
        out.append({"cell": cell.name, "same_rows": same, "difference": minus.mean, "low": minus.low, "high": minus.high})
    return out


def default_workers() -> int:
    """One a core; where there is a GPU one, since runs would share its memory."""
    import torch

    return 1 if torch.cuda.is_available() else os.cpu_count() or 1


class Queue:
    """Cells at work. say: where a line about each goes."""

    def __init__(self, spec: Spec, found: Plan, say: Callable[[str], None]):
        self.spec, self.say, self.lock = spec, say, Lock()
        self.costs = [content["seconds"]["total"] for content in found.done.values() if content.get("seconds", {}).get("total")]
        self.finished, self.count, self.workers = 0, 0, 1

    def run(self, todo: list[tuple[Cell, dict[str, Any]]], workers: int) -> bool:
        if not todo:
            return True
        self.count, self.workers = len(todo), min(workers, len(todo))
        self.say(f"{self.count} to do, {self.workers} at once{self.left()}")
        with ThreadPoolExecutor(self.workers) as pool:
            futures = [pool.submit(self.one, cell, pick) for cell, pick in todo]
            try:
                return all([future.result() for future in futures])
            except BaseException:
                for future in futures:
                    future.cancel()
                raise

    def one(self, cell: Cell, pick: dict[str, Any]) -> bool:
        spec, folder = self.spec, self.spec.runs / f"code{files.CODE}" / cell.name
        if cell.name in plan(spec).done:  # another process did it meanwhile
            return True
        own = next(row for row in spec.rows if row.row == cell.row).trials()
        method, rate = own[pick["trial"]]
        with self.lock:  # it writes the files of the tuning stream, which others read
            config = run_config(spec, cell, method, rate, folder, spec.runs / spec.protocol / "tuning" / "data")
        path = folder.with_name(folder.name + ".yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        also = also_of(spec, cell)
        other = path.is_file() and json.loads(path.read_text(encoding="utf-8")) != json.loads(json.dumps(config))
        if folder.exists() and (other or files.too_late(folder, config, also)):
            try:
                FolderLock(folder).release()
            except ConfigError as error:
                self.say(f"{cell.name}: {error}")
                return False
            shutil.rmtree(folder)  # a half-done run of other settings: its trials came out otherwise, or the spec was edited
        write_atomic(path, json.dumps(config, indent=1))
        log, begun = folder.with_name(folder.name + ".log"), time.time()
        fresh = not folder.exists()
        status = 0 if files.finished(folder, config) else launch(path, log)
        if status == 0 and also and also.relearn and not files.spent(folder):
            # a relearning that diverges says nothing of the run
            status = 0 if relearn(folder, config["tasks"][0]["name"], also.relearn, log) == 0 else FAILED
        seconds, last = time.time() - begun, last_line(log)
        record = {"trial": pick["trial"], "of": len(own), "score": pick.get("score")}
        if status == 0:
            # of a run that went on from an earlier process nobody knows the whole
            found = files.content(spec, cell, config, record, round(seconds, 1) if fresh else None, files.measured(folder, also))
        elif status == DIVERGED:
            found = files.failed(spec, cell, config, record, last.removeprefix("error: "))
        else:
            self.say(f"{cell.name}: exit {status}, see {log}: {last}")
            return False
        files.write(spec.results, cell, found)
        for weights in folder.rglob("*.safetensors"):  # gigabytes; what the cell is made of stays
            weights.unlink()
        with self.lock:
            self.finished += 1
            self.costs.append(seconds)
            told = f"diverged: {found['failed']}" if "failed" in found else summary(found)
            self.say(f"{self.finished} of {self.count}  {cell.name}: {told}, {seconds:.0f} s{self.left()}")
        return True

    def left(self) -> str:
        """How long the rest will take, from what cells took so far."""
        rest = self.count - self.finished
        if not self.costs or not rest:
            return ""
        minutes = median(self.costs) * rest / self.workers / 60
        return f", about {minutes / 60:.1f} h to go" if minutes >= 90 else f", about {minutes:.0f} min to go"


def launch(config: Path, log: Path) -> int:
    """`forgetless run` of a config. Returns its exit status."""
    return command(log, "run", str(config), "--progress", "none")


def relearn(folder: Path, task: str, asked: Relearning, log: Path) -> int:
    """`forgetless relearn` of a finished run. Returns its exit status."""
    return command(log, "relearn", str(folder), "--task", task, "--steps", str(asked.steps), "--learning-rate", str(asked.learning_rate), "--json")


def command(log: Path, *arguments: str) -> int:
    """A command of forgetless in a process of its own, what it says at the end of `log`. Returns its exit status."""
    env = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(files.THREADS)) | {"TOKENIZERS_PARALLELISM": "false"}
    with log.open("a", encoding="utf-8") as out:
        return subprocess.run([sys.executable, "-m", "forgetless", *arguments], stdout=out, stderr=out, env=env).returncode


def last_line(log: Path) -> str:
    """What a run said last, which of a failed one is why: its last error, whatever a library has to say after it."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")


def headline(found: dict[str, Any]) -> str:
    """What a cell's trial is chosen by: the first of its scorers, each task's own metric where there is one."""
    return next(iter(found["metrics"]))


def summary(found: dict[str, Any]) -> str:
    scorer = headline(found)
    m = found["metrics"][scorer]
    bwt = "" if m["backward_transfer"] is None else f", BWT {m['backward_transfer']:+.3f}"
    return f"{scorer} {m['average_accuracy']:.3f}{bwt}"

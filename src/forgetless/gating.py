"""The gate of a run: which rows are scored for it, what they are compared with, and what becomes of a model it refuses. The tests themselves are in evaluation/gate.py.

An earlier task is compared with itself as it was when it was learned, a watch set with what the untouched model made of it, row by row. Each cell of the matrix has
scored evaluate.limit rows already; while those so far do not decide, as many more are scored, up to gate.max_rows. What they are compared with was scored when the
task was learned (further_scores in its metrics.json, watch_scores.json), so no earlier model is needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .config import RunConfig
from .errors import ConfigError, GateRejected
from .evaluation import gate
from .evaluation.gate import Verdict
from .evaluation.scorers import Prediction
from .files import canonical, read, text_sha256
from .lineage import RunFolder, folder_of
from .progress import Progress
from .record import config_sha256, head
from .tasks import Example, Task, TaskStream, shuffled

Score = Callable[..., list[Prediction]]  # (task, rows, of=rows whose longest answer bounds a generated one)
Found = dict[str, dict[int, Prediction]]  # task or watch set, row
EXAMPLES = 3


@dataclass
class Judged:
    """A verdict, and every row that was scored for it."""

    verdict: Verdict
    found: Found


class Gate:
    """Of one run. `on` where any limit is set."""

    def __init__(self, config: RunConfig, folder: RunFolder, stream: TaskStream, progress: Progress):
        self.config, self.folder, self.stream, self.progress = config, folder, stream, progress
        self.settings, self.on = config.gate, config.gate.on
        self.scorer = config.gate.scorer or config.scorers[0]
        if self.on and (bare := [t.name for t in (*stream, *stream.watch) if not t.missing and not self.scorer_of(t)]):
            raise ConfigError(f"gate: '{bare[0]}' has no labels, and of evaluate.scorers only those that need some are asked for; add exact_match")
        if self.on and self.scorer not in config.scorers:
            raise ConfigError(f"gate.scorer: {self.scorer} is not among the run's scorers ({', '.join(config.scorers)}); see evaluate.scorers")

    def scorer_of(self, task: Task) -> str:
        """The gate's scorer, or where a task has no such score (choice of one without labels) the run's first that it has."""

        def scored(scorer: str) -> bool:
            return task.labels is not None or scorer not in ("choice", "calibrated")

        return next((s for s in (self.scorer, *self.config.scorers) if scored(s)), "")

    def compared(self, index: int) -> tuple[list[Task], list[Task]]:
        """(earlier tasks, watch sets) that can be held against what they were: their rows are there, and so are the scores of before."""
        known = [(t, self.learned(t, i)) for i, t in enumerate(self.stream.tasks[:index])], [(t, self.untouched(t)) for t in self.stream.watch]
        return tuple([t for t, before in sets if not t.missing and any(x.row in before for x in self.rows(t))] for sets in known)

    def rows(self, task: Task) -> list[Example]:
        """The rows the gate may score, those of the matrix first; the same ones every time, in an order that has nothing to do with them."""
        e = self.config.evaluate
        most = None if e.limit is None else max(e.limit, self.settings.max_rows or 0)
        return shuffled(task.split(e.split), self.config.seed)[:most]

    def attempt(self, task: Task, index: int) -> dict[str, Any]:
        """What of a lineage line says that two attempts at a task are the same."""
        own = self.config.tasks[index].train
        same = {"index": index, "task": task.name, "data_sha256": task.sha256, "config_sha256": config_sha256(self.config)} | (
            {"train": own} if own else {}
        )
        same |= {"probes": self.config.probes.model_dump()} if self.on and self.config.probes.stop else {}  # they may end it early
        return same | ({"gate_sha256": text_sha256(canonical(self.settings.model_dump())), "began_at": head(self.folder)} if self.on else {})

    def kept_aside(self, task: Task, index: int) -> dict[str, Any] | None:
        """The lineage line where this very attempt was refused before: it would be again."""
        if not self.on:
            return None
        asked = self.attempt(task, index)
        there = [
            line
            for line in self.folder.lineage()
            if line["kind"] == "reject" and (self.folder.path / "rejected" / folder_of(line) / "metrics.json").is_file()
        ]
        return next((line for line in there if all(line.get(key) == asked.get(key) for key in {*asked, "train", "probes"})), None)

    def keeps_aside(self, judged: Judged | None) -> bool:
        outcome = judged.verdict.outcome if judged else "accept"
        if outcome == "undecided" and self.settings.on_undecided == "accept":
            return False
        return outcome != "accept"

    def stop(self, line: dict[str, Any]) -> str:
        """Say why the run ends here: raises GateRejected where a limit is broken; where the rows did not suffice it warns, and returns what it says."""
        folder = self.folder.path / "rejected" / folder_of(line)
        criteria = self.folder.metrics(folder.name, "rejected")["gate"]["criteria"]
        worst = "broken" if line["gate"] == "reject" else "undecided"
        why = "; ".join(gate.sentence(c) for c in criteria if c["outcome"] == worst)
        gone = "" if (folder / "model").is_dir() else " (its weights were let go)"
        stays = "the one before it stays current" if self.folder.current else "nothing is learned yet"
        text = f"task '{line['task']}': {why}. The new model is kept aside in {folder}{gone}; {stays}"
        if line["gate"] == "reject":
            raise GateRejected(
                f"{text}. Change the task's data or the section gate, or take the task out; other method settings need another output_dir"
            )
        self.progress.say(f"warning: {text} (gate.on_undecided: hold)")
        return text

    def doubts(self, metrics: dict[str, Any]) -> list[str]:
        """What the rows did not decide, a sentence each."""
        return [gate.sentence(c) for c in metrics.get("gate", {}).get("criteria", ()) if c["outcome"] == "undecided"]

    def entry(self, judged: Judged | None) -> dict[str, Any]:
        return {"gate": judged.verdict.outcome} if judged else {}

    def metrics(self, index: int, judged: Judged | None, further: dict[str, dict[str, float]]) -> dict[str, Any]:
        """What metrics.json says of the gate."""
        return ({"gate": self.written(judged, index)} if judged else {}) | ({"further_scores": further} if further else {})

    def further(self, task: Task, predictions: list[Prediction], judged: Judged | None, score: Score) -> dict[str, dict[str, float]]:
        """{scorer: {row: score}} of the new task's rows beyond those of the matrix, which the gate may look at one day."""
        if judged is None or self.keeps_aside(judged):
            return {}
        done = judged.found[task.name]
        done = done | self._scored(task, [x for x in self.rows(task) if x.row not in done], score)
        cell = {p.row for p in predictions if p.task == task.name}
        scores = {name: {str(r): v for r, p in done.items() if r not in cell and (v := p.score(name)) is not None} for name in self.config.scorers}
        return scores if len(done) > len(cell) else {}

    def reference(self, task: Task, predictions: list[Prediction], score: Score) -> dict[str, dict[str, float]]:
        """{scorer: {row: score}} of all rows of a watch set that the gate may look at, before the first task."""
        done = {p.row: p for p in predictions if p.task == task.name}
        if self.on:
            done = done | self._scored(task, [x for x in self.rows(task) if x.row not in done], score)
        return {name: {str(r): v for r, p in done.items() if (v := p.score(name)) is not None} for name in self.config.scorers}

    def _scored(self, task: Task, rows: list[Example], score: Score) -> dict[int, Prediction]:
        if not rows:
            return {}
        self.progress.stage(f"gate: {len(rows)} more rows of {task.name}", len(rows))
        return {p.row: p for p in score(task, rows, of=self.rows(task))}

    def learned(self, task: Task, index: int) -> dict[int, float]:
        """{row: score} of a task as it was when it was learned."""
        name, scorer = self.folder.committed()[index], self.scorer_of(task)
        metrics = self.folder.metrics(name)
        if scorer == "metric" and scorer not in metrics["scores"]:  # no task named a metric then: each one's was one of the other scores
            scorer = task.own_metric
        further = metrics.get("further_scores", {}).get(scorer, {})
        return self.folder.scores(name, task.name, scorer) | {int(row): value for row, value in further.items()}

    def untouched(self, task: Task) -> dict[int, float]:
        """{row: score} of a watch set before the first task; in a run whose version did not write them, after the first."""
        scores, scorer = json.loads(read(self.folder.path / "watch_scores.json") or "{}").get(task.name, {}), self.scorer_of(task)
        found = scores.get(task.own_metric if scorer == "metric" and scorer not in scores else scorer)
        if found is None:
            done = self.folder.committed()
            return self.folder.scores(done[0], task.name, scorer) if done else {}
        return {int(row): value for row, value in found.items()}

    def judge(self, index: int, predictions: list[Prediction], score: Score, drift_kl: float | None = None) -> Judged | None:
        """The verdict on the model that has just learned task `index`; None without a gate.

        predictions: those of the matrix; score: the model's answers to further rows; drift_kl: what max_drift_kl is held to.
        """
        if not self.on:
            return None
        new, (earlier, watch) = self.stream[index], self.compared(index)
        for task in (*self.stream.tasks[:index], *self.stream.watch):
            if task not in (*earlier, *watch):
                self.progress.say(
                    f"warning: gate: '{task.name}' is not compared, {'its rows are gone' if task.missing else 'no scores of before are there'}"
                )
        places = {t.name: i for i, t in enumerate(self.stream.tasks)}
        before = {t.name: self.learned(t, places[t.name]) for t in earlier} | {t.name: self.untouched(t) for t in watch}
        every = [*earlier, *watch, new]
        rows = {t.name: [x for x in self.rows(t) if x.row in before.get(t.name, {x.row})] for t in every}
        found: Found = {t.name: {p.row: p for p in predictions if p.task == t.name} for t in every}
        while True:
            now = {t.name: {x.row: found[t.name][x.row].score(self.scorer_of(t)) for x in rows[t.name] if x.row in found[t.name]} for t in every}
            pairs = {name: ([before[name][row] for row in now[name]], list(now[name].values())) for name in before}
            verdict = gate.judge(
                self.settings, self.scorer, {t.name: pairs[t.name] for t in earlier}, {t.name: pairs[t.name] for t in watch},
                new.name, list(now[new.name].values()), drift_kl, {name: len(r) for name, r in rows.items()},
            )  # fmt: skip
            more = [t for t in every if t.name in verdict.wanted and len(now[t.name]) < len(rows[t.name])]
            if not more:
                unknown = [t for t in self.stream.tasks[:index] if t not in earlier], [t for t in self.stream.watch if t not in watch]
                return Judged(gate.with_unknown(verdict, self.settings, *([t.name for t in sets] for sets in unknown)), found)
            for task in more:
                rest = [x for x in rows[task.name] if x.row not in found[task.name]][: len(now[task.name])]
                found[task.name] |= self._scored(task, rest, score)

    def written(self, judged: Judged, index: int) -> dict[str, Any]:
        """metrics.json's "gate": the verdict, and under store: rows up to three rows of each broken task that were right and are not."""
        content = judged.verdict.content()
        broken = {c["name"]: c["limit"] for c in content["criteria"] if c["outcome"] == "broken"}
        if self.config.store != "rows":
            return content
        shown = {}
        for i, task in enumerate(self.stream.tasks[: index + 1]):
            known = {} if i == index else self.learned(task, i)
            # of the mean of all earlier tasks, those that are a part of why
            if task.name in broken or (
                broken.get(None) == "max_forgetting" and i < index and self._lost(task, known, judged.found.get(task.name, {}))
            ):
                said = self.folder.answers(self.folder.committed()[i], task.name) if i < index else {}
                shown[task.name] = self._examples(task, known if i < index else None, said, judged.found[task.name])
        for task in self.stream.watch:
            if task.name in broken:
                shown[task.name] = self._examples(task, self.untouched(task), {}, judged.found[task.name])
        return content | {"examples": shown}

    def _lost(self, task: Task, before: dict[int, float], found: dict[int, Prediction]) -> bool:
        return sum(before[row] - p.score(self.scorer_of(task)) for row, p in found.items() if row in before) > 0

    def _examples(self, task: Task, before: dict[int, float] | None, said: dict[int, dict], found: dict[int, Prediction]) -> list[dict[str, Any]]:
        """Rows that were answered better `before`; with None, for a new task, that are answered wrong."""
        scorer, rows = self.scorer_of(task), {x.row: x for x in self.rows(task)}
        was = dict.fromkeys(found, 1.0) if before is None else before
        lost = sorted((p.score(scorer) - was[row], row) for row, p in found.items() if p.score(scorer) < was.get(row, 0.0))
        key = scorer if scorer in ("choice", "calibrated") else "exact_match"
        return [
            {"row": row, "text": rows[row].text, "answer": rows[row].answer, "before": said.get(row, {}).get(key), "after": found[row].said.get(key)}
            for _, row in lost[:EXAMPLES]
        ]

"""Live probes: every few steps, a few rows of each earlier task, of the new one and of each watch set are scored while a task trains. A curve a set, and an early end.

    probe = Probe.of(config, tokenizer, stream, index, method, train, gate, progress)      # None where config.probes.every is absent
    trained = train_task(..., probe=probe)
    metrics |= probe.noted(trained.steps)                                            # {"probes": [{"step", "scores"}, ...], "probe_rows", "stopped_at"}

Training does not notice: random states, the modes and forwards of all modules and gradients are after a look as they were before it, so that the weights are the same,
bit for bit, with probes and without. A look lies in the trainer's log beside the step it follows, and so in every checkpoint; of a task that goes on from
one, none is made twice.

Who answers: the model that trains, as it stands at that step (adapters beside the weights, quantised layers quantised), for every row. After the task it may
be another: `merge`, `lines`, `slao` and `esacl` write the weights anew at a task's end. Of a method that leaves several models (kind: routed) earlier tasks and watch
sets are answered by what it left of them or by whom it chooses then, which no step changes or tells: only the new task is probed. Of gainlora nothing is, whose
gates are one row's own and cannot be told to the scorer's cache.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from . import distributed
from .config import GateConfig, RunConfig
from .evaluation import gate
from .evaluation.scorers import score_rows
from .methods.base import Method
from .methods.beside import Beside
from .progress import Progress
from .tasks import Example, Task, TaskStream, shuffled

if TYPE_CHECKING:
    from .gating import Gate

Scores = dict[str, dict[str, float]]  # name of a task or watch set: scorer: mean over the probed rows
Rows = dict[str, dict[int, float]]  # name: row: score
BoundToFail = Callable[[Rows, int], str | None]  # the rows as answered at the k-th look -> why the gate would refuse this model, or None
# methods of which what is seen in training does not tell what is committed, and why
UNSURE = dict.fromkeys(("merge", "lines", "slao", "esacl"), "writes the weights anew when the task ends") | {
    "mtl": "begins at the untouched model, which has not learned the earlier tasks yet",
    "replay": "learns the old rows last (mode: consolidation)",
}


class Probe:
    """The looks at one task's training; the trainer calls before() and after_step(). sets: the tasks and watch sets with the rows of each, the same seeded ones every time, the
    first of those that evaluation and the gate take.

    bound_to_fail, with the scorer it reads of each: what ends the task early, where two looks in a row say so.
    """

    def __init__(
        self, tokenizer: Any, sets: list[tuple[Task, list[Example]]], config: RunConfig, autocast: bool, progress: Progress,
        bound_to_fail: BoundToFail | None = None, scorer_of: Callable[[Task], str] = lambda task: "",
    ):  # fmt: skip
        self.tokenizer, self.sets, self.config, self.autocast, self.progress = tokenizer, sets, config, autocast, progress
        self.bound_to_fail, self.scorer_of = bound_to_fail, scorer_of
        self.waiting: list[dict[str, Any]] = []  # the look before the first step, until that step has an entry in the log

    @classmethod
    def of(
        cls, config: RunConfig, tokenizer: Any, stream: TaskStream, index: int, method: Method, train: dict[str, Any], judge: Gate, progress: Progress
    ) -> Probe | None:  # fmt: skip
        """The probe that `config` asks for of the task `index`; None where it asks for none, or the method leaves nothing to look at.

        train: the task's section `train`, with bf16 resolved. judge: for probes.stop, what each earlier task and watch set is compared with.
        """
        p, task = config.probes, stream[index]
        if p.every is None:
            return None
        parts = [method, *(method.inner() if isinstance(method, Beside) else ())]
        if any(part.name == "gainlora" for part in parts):
            progress.say(f"{task.name}: no probes: the gates of method gainlora cannot be read while they train")
            return None
        earlier, watch = (
            ([], []) if method.kind == "routed" else ([t for t in stream.tasks[:index] if not t.missing], [t for t in stream.watch if not t.missing])
        )
        sets = [(t, shuffled(t.split(config.evaluate.split), config.seed)[: p.rows]) for t in (*earlier, task, *watch)]
        probe = cls(tokenizer, sets, config, bool(train["bf16"]), progress)
        if p.stop and (unsure := not_to_be_stopped(config, method, parts)):
            progress.say(f"{task.name}: probes.stop: {unsure}; it is trained to its end")
        elif p.stop:
            learned = {t.name: judge.learned(t, i) for i, t in enumerate(stream.tasks[:index]) if not t.missing}
            before = learned | {t.name: judge.untouched(t) for t in watch}
            probe.scorer_of = judge.scorer_of
            probe.bound_to_fail = partial(bound_to_fail, config.gate, judge.scorer, before, [t.name for t in earlier], [t.name for t in watch])
        return probe

    def before(self, model: nn.Module, log: list[dict[str, Any]]) -> None:
        """The look at step 0. log: the trainer's; where a task goes on from a checkpoint it holds that look already."""
        if not log:
            self.waiting = [self._look(model, 0)[0]]

    def after_step(self, model: nn.Module, log: list[dict[str, Any]]) -> bool:
        """After the step that the last entry of `log` is about: look, where one is due, and note it there. True where the task should end now."""
        entry = log[-1]
        looks, self.waiting = self.waiting, []
        if entry["step"] % self.config.probes.every == 0:
            look, why = self._look(model, entry["step"])
            looks.append(look)
            if why and any(past["step"] == entry["step"] - self.config.probes.every and past.get("failing") for past in looks_in(log)):
                entry["stopped"] = True
                self.progress.say(f"step {entry['step']}: the gate is bound to refuse this model: {why}. Training ends here (probes.stop)")
        if looks:
            entry["probe"] = looks
        return "stopped" in entry

    def noted(self, steps: list[dict[str, Any]]) -> dict[str, Any]:
        """What metrics.json says of the looks, taken out of the trainer's log: probes, probe_rows, and stopped_at where the task was ended early."""
        looks = looks_in(steps)
        stopped = next((entry["step"] for entry in steps if entry.pop("stopped", False)), None)
        for entry in steps:
            entry.pop("probe", None)
        rows = {task.name: len(rows) for task, rows in self.sets}
        found = {"probes": [{key: look[key] for key in ("step", "scores")} for look in looks], "probe_rows": rows}
        return found if stopped is None else found | {"stopped_at": stopped}

    def _look(self, model: nn.Module, step: int) -> tuple[dict[str, Any], str | None]:
        scores: Scores = {}
        values: Rows = {}
        e, n, done = self.config.evaluate, distributed.world_size(), 0
        total = sum(len(rows) for _, rows in self.sets)
        with undisturbed(model):
            for task, rows in self.sets:
                mine = distributed.shared(range(len(rows)))
                predictions = score_rows(
                    model, self.tokenizer, task, [rows[i] for i in mine], self.config.scorers, batch_size=e.batch_size, autocast=self.autocast,
                    advance=lambda k, done=done: self.progress.advance(step, f"probing, {done + k * n} of {total} rows"), of=rows,
                )  # fmt: skip
                done += len(rows)
                found = [p for _, p in sorted(distributed.gathered(list(zip(mine, predictions, strict=True))), key=lambda pair: pair[0])]
                columns = {name: [p.score(name) for p in found] for name in self.config.scorers}
                scores[task.name] = {name: sum(v) / len(v) for name, v in columns.items() if None not in v}
                values[task.name] = {p.row: s for p in found if (s := p.score(self.scorer_of(task))) is not None} if self.bound_to_fail else {}
        first = self.config.scorers[0]
        self.progress.advance(step, "probed: " + ", ".join(f"{name} {found[first]:.2f}" for name, found in scores.items() if first in found))
        why = self.bound_to_fail(values, step // self.config.probes.every) if self.bound_to_fail and step else None
        return {"step": step, "scores": scores} | ({"failing": True} if why else {}), why


def noted(probe: Probe | None, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """What metrics.json says of a task's looks; of a task that was begun with probes and went on without, nothing, and its log neither."""
    found = probe.noted(steps) if probe else {}
    for entry in steps:
        entry.pop("probe", None), entry.pop("stopped", None)
    return found


def looks_in(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [look for entry in log for look in entry.get("probe", ())]


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Whatever is read from `model` inside, what trains it goes on as if nothing had been: random states, modes, what stands in the place of a module's forward."""
    cuda, mps = torch.cuda.is_available() and torch.cuda.is_initialized(), torch.backends.mps.is_available()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices, metal = torch.cuda.get_rng_state_all() if cuda else None, torch.mps.get_rng_state() if mps else None
    # one by one: a method may keep some of its modules in another mode; and the scorer's fp32 head takes away the forward that it finds
    modules = [(module, module.training, module.__dict__.get("forward")) for module in model.modules()]
    try:
        yield
    finally:
        for module, training, forward in modules:
            module.training = training
            if forward is not None:
                module.forward = forward
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if devices is not None:
            torch.cuda.set_rng_state_all(devices)
        if metal is not None:
            torch.mps.set_rng_state(metal)


# -- the early end -----------------------------------------------------------------------------------------------------------------------


def not_to_be_stopped(config: RunConfig, method: Method, parts: list[Method]) -> str:
    """Why what is seen of a model in training binds no gate; "" where it does. parts: the method and those it goes beside."""
    if method.kind == "routed":
        return f"method {method.name} answers earlier tasks by what it left of them, which no step changes"
    for part in parts:
        if part.name in UNSURE and getattr(part.options, "mode", "consolidation") == "consolidation":
            return f"method {part.name} {UNSURE[part.name]}"
    return "with quantize the model is another while it trains" if config.quantize else ""


def bound_to_fail(limits: GateConfig, scorer: str, before: Rows, tasks: list[str], watch: list[str], now: Rows, k: int) -> str | None:
    """Why the gate would refuse the model that answers `now` at the k-th look, as it stands; None where the probed rows do not say so.

    The gate's own test, of its limits on drops, at the level alpha / (k (k + 1)): over all looks and limits the chance that a model is stopped which keeps every
    limit is at most alpha. Each row is paired with what it was answered `before`; rows, and sets, that are not there are left out.
    """
    level = limits.alpha / (k * (k + 1))
    asked = limits.model_copy(
        update={"alpha": level, "min_new_task": None, "max_drift_kl": None} | ({} if all(map(before.get, tasks)) else {"max_forgetting": None})
    )
    pairs = {}
    for name in (*tasks, *watch):
        rows = [row for row in now[name] if row in before.get(name, {})]  # in the sets' order, which has nothing to do with them
        if rows:
            pairs[name] = [before[name][row] for row in rows], [now[name][row] for row in rows]
    earlier, watched = ({name: pairs[name] for name in names if name in pairs} for names in (tasks, watch))
    verdict = gate.judge(asked, scorer, earlier, watched, "", [], None, {name: len(pair[0]) for name, pair in pairs.items()})
    return "; ".join(gate.sentence(asdict(c)) for c in verdict.criteria if c.outcome == "broken") or None

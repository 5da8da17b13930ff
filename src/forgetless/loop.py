"""The loop. For each task of the stream: prepare the model, train, consolidate, evaluate one row of the matrix, commit to the lineage.

    result = run("examples/demo/gorp.yaml")

Read this file first. Running it again resumes after the last committed task; tasks appended to the config are learned; any other change is refused.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from . import models
from .config import RunConfig, load_config
from .errors import ConfigError
from .evaluation.drift import measure_coverage, record_inputs, weight_leak
from .evaluation.matrix import AccuracyMatrix, wilson
from .evaluation.scorers import Prediction, failures, score_rows
from .lineage import RunFolder, canonical, write_atomic
from .methods import get
from .methods.base import Memory, Method
from .progress import Progress
from .tasks import Task, TaskStream, load_stream, sample
from .trainer import bf16_pays, train_task, training_arguments


@dataclass
class Result:
    """What a run leaves: `matrix` of the first scorer measured (choice before exact_match), all of them in `matrices`, the folder in `path`."""

    path: Path
    matrices: dict[str, AccuracyMatrix] = field(default_factory=dict)
    resumed_at: int = 0  # tasks that were already committed

    @property
    def matrix(self) -> AccuracyMatrix:
        return next(iter(self.matrices.values()))


def run(config: str | Path | dict | RunConfig, overrides: list[str] | tuple[str, ...] = (), progress: Progress | None = None) -> Result:
    """Learn the tasks of `config`, one after another. Raises ForgetlessError subclasses; what is committed stays."""
    config, progress = load_config(config, overrides), progress or Progress()
    method = get(config.method.name, **config.method.options)
    training_arguments(config.train, config.seed, config.output_dir)  # refuse bad names before anything is read
    stream = load_stream(config)
    for task in stream:
        if task.overlap:
            progress.say(f"warning: task '{task.name}': {task.overlap} test texts also stand in its training rows")
    folder = RunFolder(config.output_dir)
    try:
        folder.repair()
        done = check_same_run(folder, config, stream)
        if len(done) < len(stream):
            learn(folder, config, stream, method, done, progress)
        return Result(folder.path, write_matrix(folder, config, stream), len(done))
    finally:
        folder.close()


def learn(folder: RunFolder, config: RunConfig, stream: TaskStream, method: Method, done: list[str], progress: Progress) -> None:
    """Every task of the stream that is not committed yet."""
    source = str(folder.path / "tasks" / done[-1] / "model") if done else config.model
    model, tokenizer = models.load(source, trust_remote_code=config.trust_remote_code)
    if torch.cuda.is_available() and not config.train.get("use_cpu"):
        model.cuda()
    for task in stream:
        task.encode_prompt(tokenizer, "")  # a prompt that cannot fit is refused now, not after hours
    memory = folder.memory(done[-1]) if done else Memory()
    if not done:
        method.param_groups(model)  # no module matched: say so before the folder has anything in it
        write_atomic(folder.path / "run.yaml", yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True))
        if config.evaluate.unseen:
            scores, *_ = evaluate(model, tokenizer, stream, len(stream) - 1, config, bf16_pays(), progress)
            write_atomic(folder.path / "before.json", json.dumps(scores))
    for index in range(len(done), len(stream)):
        task, seed = stream[index], config.seed * 1000 + index
        torch.manual_seed(seed)
        model = method.begin_task(model, task, memory)
        begun = time.perf_counter()
        trained = train_task(model, tokenizer, task, method, method.train_data(task, memory), config.train, seed, progress)
        leak = weight_leak(trained.optimizer, trained.start, len(trained.steps))
        state_bytes = trained.optimizer.state_bytes()
        trained.optimizer = trained.start = None  # moments and copies are not needed while scoring
        model = method.end_task(model, task, memory)
        train_seconds, begun = time.perf_counter() - begun, time.perf_counter()

        last = len(stream) - 1 if config.evaluate.unseen else index
        scores, counts, drift, predictions = evaluate(model, tokenizer, stream, last, config, trained.autocast, progress)
        recorded = {} if config.store == "nothing" else record_inputs(model, tokenizer, task, seed)
        covered = cover(folder, stream, index, model, method.protected_inputs(memory), recorded)
        record = measured(trained.steps, leak, method.report(memory), covered) | {"state_bytes": state_bytes}
        metrics = {"task": task.name, "index": index, "scores": scores, "n": counts, "failures": drift, "protection": record}
        entry = {"data_sha256": task.sha256, "config_sha256": config_sha256(config), "scores": scores}
        folder.commit(index, task.name, model, tokenizer, memory, recorded, metrics, [stored(p, stream, config) for p in predictions], entry, config.keep)

        for step in trained.steps:
            folder.note_time(event="step", task=task.name, index=index, **step)
        folder.note_time(event="task", task=task.name, index=index, train_seconds=train_seconds, eval_seconds=time.perf_counter() - begun, peak_bytes=peak_bytes(), **record)
        write_matrix(folder, config, stream)
        progress.say(summary(task.name, index, stream, scores))


def evaluate(model, tokenizer, stream: TaskStream, last: int, config: RunConfig, autocast: bool, progress: Progress):
    """One row of the matrix: tasks 0..last. ({scorer: row}, {task: n}, {task: failure shares}, predictions)."""
    e = config.evaluate
    batches = [(j, sample(stream[j].split(e.split), e.limit, config.seed)) for j in range(last + 1)]
    progress.stage(f"{stream[min(last, len(stream) - 1)].name}: scoring {last + 1} task{'s' if last else ''}", sum(len(rows) for _, rows in batches))
    scores: dict[str, list[float | None]] = {name: [None] * len(stream) for name in e.scorers}
    counts, drift, every, before = {}, {}, [], 0
    for j, rows in batches:
        if not rows:
            raise ConfigError(f"evaluate.split: task '{stream[j].name}' has no {e.split} rows")
        predictions = score_rows(model, tokenizer, stream[j], rows, e.scorers, batch_size=e.batch_size, autocast=autocast, advance=lambda k, b=before: progress.advance(b + k))
        before += len(rows)
        counts[stream[j].name] = len(rows)
        for name in e.scorers:
            values = [p.score(name) for p in predictions]
            scores[name][j] = None if None in values else sum(values) / len(values)
        drift[stream[j].name] = failures(predictions, stream[j], stream.tasks)
        every += predictions
    return scores, counts, drift, every


# -- what is written down --------------------------------------------------------------------------------------------------------------


def cover(folder: RunFolder, stream: TaskStream, index: int, model, spaces: dict, recorded: dict) -> dict[str, dict[str, float]]:
    """For this task and each earlier one: share of its recorded inputs inside the protected space, and how far each layer's answer to them has moved."""
    inputs = {task.name: folder.recorded(f"{i:02d}-{task.name}") for i, task in enumerate(stream.tasks[:index])} | {stream[index].name: recorded}
    return {name: measure_coverage(model, r, spaces) for name, r in inputs.items() if r}


def measured(steps: list[dict], leak: dict | None, space: dict | None, coverage: dict) -> dict[str, Any]:
    update_leaks = [s["update_leak"] for s in steps if s["update_leak"] is not None]
    return {
        "steps": len(steps), "update_leak": max(update_leaks, default=None), "weight_leak": leak and leak["leak"], "weight_leak_bound": leak and leak["bound"],
        "space": space, "coverage": coverage,
    }  # fmt: skip


def stored(p: Prediction, stream: TaskStream, config: RunConfig) -> dict[str, Any]:
    """A prediction as the privacy mode allows it: words only under store: rows."""
    line: dict[str, Any] = {"row": p.row, "task": p.task, "score": {name: p.score(name) for name in config.evaluate.scorers}}
    if config.store == "rows":
        line |= {"answer": p.answer, "prediction": {"choice": p.choice, "exact_match": p.text}}
    return line


def write_matrix(folder: RunFolder, config: RunConfig, stream: TaskStream) -> dict[str, AccuracyMatrix]:
    """matrix.json from the committed tasks, and the matrices themselves."""
    done, names = folder.committed(), [t.name for t in stream]
    rows = [folder.metrics(name) for name in done]
    before = json.loads((folder.path / "before.json").read_text()) if (folder.path / "before.json").is_file() else None
    width = len(names)
    matrices = {
        s: AccuracyMatrix(names, [(r["scores"][s] + [None] * width)[:width] for r in rows], (before[s] + [None] * width)[:width] if before else None)
        for s in config.evaluate.scorers
    }
    n = {k: v for r in rows for k, v in r["n"].items()}
    ci = {s: [[None if a is None else wilson(a, n[names[j]]) for j, a in enumerate(row)] for row in m.rows] for s, m in matrices.items()}
    lost = {key: [[r["failures"].get(t, {}).get(key) for t in names] for r in rows] for key in ("other_task_label", "wrong_in_set")}
    content = {
        "tasks": names, "before": before, "scores": {s: m.rows for s, m in matrices.items()}, "n": n, "ci95": ci,
        "metrics": {s: m.metrics() for s, m in matrices.items()}, "failures": lost,
    }  # fmt: skip
    write_atomic(folder.path / "matrix.json", json.dumps(content, indent=1))
    return matrices


def summary(name: str, index: int, stream: TaskStream, scores: dict[str, list[float | None]]) -> str:
    parts = [f"{stream[j].name} {a:.2f}" for j, a in enumerate(next(iter(scores.values()))) if a is not None]
    return f"committed {index + 1}/{len(stream)} {name}: {', '.join(parts)}"


# -- is this the same run? -------------------------------------------------------------------------------------------------------------


def config_sha256(config: RunConfig) -> str:
    return hashlib.sha256(canonical(comparable(config)).encode()).hexdigest()


def comparable(config: RunConfig) -> dict[str, Any]:
    """What must not change between sittings of one run: everything but where it lies, what is kept, and which tasks are still to come."""
    return {k: v for k, v in config.model_dump().items() if k not in ("output_dir", "keep", "tasks")}


def check_same_run(folder: RunFolder, config: RunConfig, stream: TaskStream) -> list[str]:
    """The committed tasks, after making sure that this config continues them. Raises ConfigError with the key that changed."""
    done = folder.committed()
    if not done:
        return done
    old = load_config(yaml.safe_load((folder.path / "run.yaml").read_text()))
    before, now = comparable(old), comparable(config)
    for key, was, value in differences(before, now):
        raise ConfigError(f"output_dir {folder.path}: holds a run with {key}: {was}, now {key}: {value}. Choose another output_dir, or the old setting")
    for line, task in zip(folder.lineage(), [*stream, *[None] * len(done)], strict=False):
        if task is None or line["task"] != task.name or line["data_sha256"] != task.sha256:
            what = "is missing" if task is None else "has another name" if line["task"] != task.name else "has other data or another prompt"
            raise ConfigError(f"output_dir {folder.path}: tasks.{line['index']} ('{line['task']}', already learned) {what}; only tasks after the learned ones may change")
    if len(stream) > len(done):
        write_atomic(folder.path / "run.yaml", yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True))
    return done


def differences(a: Any, b: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, value in a, value in b) where two nested mappings differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for k in {**a, **b} for d in differences(a.get(k), b.get(k), f"{key}.{k}" if key else str(k))]
    return [] if a == b else [(key, a, b)]


def peak_bytes() -> int:
    """Peak of the accelerator's memory where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

"""The loop. For each task of the stream: prepare the model, train, consolidate, evaluate one row of the matrix, commit to the lineage.

    result = run("examples/demo/gorp.yaml")

Read this file first. Running it again resumes after the last committed task; tasks appended to the config are learned; any other change is refused.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import models
from .config import RunConfig, load_config
from .evaluation.drift import record_inputs, weight_leak
from .evaluation.matrix import AccuracyMatrix
from .lineage import RunFolder, write_atomic
from .methods import get
from .methods.base import Memory, Method
from .progress import Progress
from .record import check_same_run, config_sha256, cover, evaluate, peak_bytes, protection, resolve, stored, watched, write_config, write_matrix
from .tasks import TaskStream, load_stream
from .trainer import train_task, training_arguments


@dataclass
class Result:
    """What a run leaves: the folder in `path`, an AccuracyMatrix for each scorer in `matrices`, the first that has values in `matrix`.

    The first is `metric` where a task names one, else choice as a rule.
    """

    path: Path
    matrices: dict[str, AccuracyMatrix] = field(default_factory=dict)
    resumed_at: int = 0  # tasks that were committed before this call
    watch: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)  # name, scorer: before the first task, after each

    @property
    def matrix(self) -> AccuracyMatrix:
        return next((m for m in self.matrices.values() if m.average_accuracy() is not None), next(iter(self.matrices.values())))


def run(config: str | Path | dict | RunConfig, overrides: list[str] | tuple[str, ...] = (), progress: Progress | None = None) -> Result:
    """Learn the tasks of `config`, one after another. Raises ForgetlessError subclasses; what is committed stays."""
    # everything that can be refused is refused here, before the first step
    config, progress = load_config(config, overrides), progress or Progress()
    method = get(config.method.name, **config.method.options)
    config = resolve(config, method, training_arguments(config.train, config.seed, config.output_dir))
    stream = load_stream(config)
    for warning in stream.warnings(config.evaluate.split):
        progress.say(f"warning: {warning}")
    folder = RunFolder(config.output_dir)
    try:
        folder.repair()  # an interrupted commit is as if it had not begun
        done = check_same_run(folder, config, stream)
        if len(done) < len(stream):
            learn(folder, config, stream, method, done, progress)
        return Result(folder.path, write_matrix(folder, config, stream), len(done), watched(folder, stream))
    finally:
        folder.close()


def learn(folder: RunFolder, config: RunConfig, stream: TaskStream, method: Method, done: list[str], progress: Progress) -> None:
    """Every task of the stream that is not committed yet."""
    model, tokenizer, memory = start(folder, config, stream, method, done, progress)
    for index in range(len(done), len(stream)):
        task, seed = stream[index], config.seed * 1000 + index
        progress.tasks(index, len(stream))
        torch.manual_seed(seed)
        begun = time.perf_counter()

        # prepare, train, consolidate
        model = method.begin_task(model, task, memory)
        trained = train_task(model, tokenizer, task, method, method.train_data(task, memory), config.train, seed, progress)
        leak = weight_leak(trained.optimizer, trained.start, len(trained.steps))
        state_bytes = trained.optimizer.state_bytes()
        trained.optimizer = trained.start = None  # moments and copies are not needed while scoring
        model = method.end_task(model, task, memory)
        trained_at = time.perf_counter()

        # evaluate: one row of the matrix, and what has become of the inputs of earlier tasks
        row = evaluate(model, tokenizer, stream, len(stream) if config.evaluate.unseen else index + 1, config, trained.autocast, progress)
        recorded = {} if config.store == "nothing" else record_inputs(model, tokenizer, task, seed)
        coverage = cover(folder, stream, index, model, method.protected_inputs(memory), recorded)
        kept = protection(trained.steps, leak, method.report(memory), coverage, state_bytes)

        # commit: after this line the task is learned, whatever happens
        entry = {"data_sha256": task.sha256, "config_sha256": config_sha256(config), "scores": row.scores}
        if stream.watch:
            entry |= {"watch": row.watch, "watch_sha256": {task.name: task.sha256 for task in stream.watch}}
        metrics = {
            "task": task.name,
            "index": index,
            "scores": row.scores,
            "n": row.n,
            "failures": row.failures,
            "watch": row.watch,
            "protection": kept,
            "steps": trained.steps,
        }
        folder.commit(index, task.name, model, tokenizer, memory, recorded, metrics, stored(row.predictions, config), entry, config.keep)

        seconds = {"train_seconds": trained_at - begun, "eval_seconds": time.perf_counter() - trained_at, "peak_bytes": peak_bytes()}
        folder.note_task(metrics, seconds)
        write_matrix(folder, config, stream)
        progress.say(f"committed {index + 1}/{len(stream)} {task.name}: {row.summary()}")


def start(folder: RunFolder, config: RunConfig, stream: TaskStream, method: Method, done: list[str], progress: Progress):
    """(model, tokenizer, memory) where the run stands: after the last committed task, or at the pretrained model."""
    source = str(folder.path / "tasks" / done[-1] / "model") if done else config.model
    model, tokenizer = models.load(source, trust_remote_code=config.trust_remote_code)
    if torch.cuda.is_available() and not config.train.get("use_cpu"):
        model.cuda()
    memory = folder.memory(done[-1]) if done else Memory()
    for task in (*stream, *stream.watch):
        task.check(tokenizer)
    if not done:
        method.param_groups(model)  # no module matched: likewise
    write_config(folder, config)
    if done:
        folder.check_model(model, done[-1])
    else:
        for name in ("before.json", "watch.json"):
            (folder.path / name).unlink(missing_ok=True)  # of an attempt that committed nothing
    if not done and (config.evaluate.unseen or stream.watch):
        before = evaluate(model, tokenizer, stream, len(stream) if config.evaluate.unseen else 0, config, config.train["bf16"], progress)
        if config.evaluate.unseen:
            write_atomic(folder.path / "before.json", json.dumps(before.scores))
        if stream.watch:
            write_atomic(folder.path / "watch.json", json.dumps(before.watch))
    return model, tokenizer, memory

"""The loop. For each task of the stream: prepare the model, train, consolidate, evaluate one row of the matrix, commit to the lineage.

    result = run("examples/demo/gorp.yaml")

Read this file first. Running it again resumes after the last committed task; tasks appended to the config are learned; any other change is refused.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from . import bits, distributed, models, shared_model
from .batches import check_packing
from .checkpoint import Checkpoints
from .config import RunConfig, load_config
from .errors import ConfigError, ForgetlessError, GateRejected
from .estimate import check_bits
from .evaluation import drift_kl, general
from .evaluation.drift import record_inputs, weight_leak
from .evaluation.matrix import AccuracyMatrix
from .files import write_atomic
from .forecast import forecast
from .gating import Gate
from .lineage import RunFolder
from .methods import get
from .methods.base import Memory, Method
from .probes import Probe, noted
from .products import full_precision
from .progress import Progress
from .protect import encode, fingerprint, read_prompts
from .record import (
    answers,
    check_same_run,
    check_store,
    checkpoint_key,
    cover,
    evaluate,
    measured,
    peak_bytes,
    protection,
    resolve,
    stored,
    watched,
    write_config,
    write_matrix,
)
from .state import model_sha256, tensors_sha256
from .tasks import Known, TaskStream, load_stream
from .tracking import Tracker, check_installed, tracked
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
    gate: dict[str, dict[str, Any] | None] = field(default_factory=dict)  # of each learned task: metrics.json's "gate", None where there was none
    held: str = ""  # why the last task is kept aside (gate.on_undecided: hold); "" where it is not

    @property
    def matrix(self) -> AccuracyMatrix:
        return next((m for m in self.matrices.values() if m.average_accuracy() is not None), next(iter(self.matrices.values())))


def run(
    config: str | Path | dict | RunConfig, overrides: list[str] | tuple[str, ...] = (), progress: Progress | None = None,
    learned: dict[str, Known] | None = None,
) -> Result:  # fmt: skip
    """Learn the tasks of `config`, one after another. Raises ForgetlessError subclasses; what is committed stays.

    learned: the tasks whose rows may be gone, see load_stream; `add` gives it.
    """
    # everything that can be refused is refused here, before the first step
    config, progress = load_config(config, overrides), progress or Progress()
    method = get(config.method.name, **config.method.options)
    config = resolve(config, method, training_arguments(config.train, config.seed, config.output_dir))
    check_store(config, method)
    shared_model.check(config, method)
    check_installed(config)
    for task in config.tasks:
        training_arguments(config.train | task.train, config.seed, config.output_dir)
    stream = load_stream(config, learned)
    for warning in stream.warnings(config.evaluate.split):
        progress.say(f"warning: {warning}")
    with opened(config, stream) as (folder, done), tracked(folder, config, progress) as tracker, general.around(folder, config, progress):
        try:
            held = learn(folder, config, stream, method, done, progress, tracker) if len(done) < len(stream) else ""
        except GateRejected:
            distributed.on_main(lambda: write_matrix(folder, measured(config, stream)))
            raise
        matrices = distributed.on_main(lambda: write_matrix(folder, measured(config, stream)))
        distributed.leave_at_exit()
        verdicts = {task.name: folder.metrics(name).get("gate") for task, name in zip(stream, folder.committed(), strict=False)}
        return Result(folder.path, matrices, len(done), watched(folder, [task.name for task in stream.watch]), verdicts, held)


def learn(folder: RunFolder, config: RunConfig, stream: TaskStream, method: Method, done: list[str], progress: Progress, tracker: Tracker) -> str:
    """Every task of the stream that is not committed yet. Returns why it ended before the last one (gate.on_undecided: hold), "" where it did not."""
    gate = Gate(config, folder, stream, progress)
    model, tokenizer, memory = start(folder, config, stream, method, gate, done, progress)
    for index in range(len(done), len(stream)):
        task, seed = stream[index], config.seed * 1000 + index
        if line := gate.kept_aside(task, index):
            if distributed.is_main():
                shutil.rmtree(folder.training(index, task.name), ignore_errors=True)  # a kill may have come between the refusal and this
            return gate.stop(line)
        progress.tasks(index, len(stream))
        set_seed(seed)  # torch, numpy and Python: a method may draw from any
        begun, cpu = time.perf_counter(), time.process_time()
        ahead = distributed.on_main(partial(forecast, model, tokenizer, stream, index, folder, config, method, memory, progress)) if gate.on else None

        # prepare (or go on from a checkpoint), train, consolidate
        key = checkpoint_key(folder, gate.attempt(task, index), memory)
        checkpoints = Checkpoints(folder.training(index, task.name), config.checkpoint_every, key, shared=bool(config.sharding))
        method.scratch = checkpoints.folder / "scratch" if config.checkpoint_every else None
        if checkpoints.step:
            progress.say(f"{task.name}: goes on from step {checkpoints.step}")
            with full_precision():
                model = method.resume_task(model, task, memory, checkpoints.method_state())
        else:
            with full_precision():
                model = method.begin_task(model, task, memory)
        rows = method.train_data(task, memory)
        train = method.settings(checkpoints.batch(config.train | config.tasks[index].train), index)
        options = (config.precision, config.packing, config.quantize, config.optimizer_state)
        probe = Probe.of(config, tokenizer, stream, index, method, train, gate, progress)
        tracker.begin(index, checkpoints.log)
        trained = train_task(model, tokenizer, task, method, rows, train, seed, progress, checkpoints, *options, probe, tracker, config.sharding)
        with trained.whole:  # what is quantised is whole again, once moments and copies have made room for it
            leak = weight_leak(trained.optimizer, trained.start, len(trained.steps))
            state_bytes = trained.state_bytes()
            trained.optimizer = trained.start = None
            gc.collect()  # the Trainer, which holds the optimizer, and its callbacks hold each other
        state_bytes += method.held_bytes()
        with full_precision():
            model = method.end_task(model, task, memory)
        leak = method.merge_leak or leak
        trained_at, cpu = time.perf_counter(), time.process_time() - cpu

        # evaluate: one row of the matrix, and what has become of the inputs of earlier tasks
        seen = len(stream) if config.evaluate.unseen else index + 1
        row = evaluate(model, tokenizer, stream, seen, config, trained.autocast, progress, method, memory)
        score = partial(answers, model, tokenizer, config, trained.autocast, progress, method, memory)
        for what, digest in (("models", partial(model_sha256, model)), ("memories", partial(tensors_sha256, memory.tensors))):
            if distributed.world_size() > 1 and distributed.differ(digest()):  # of a routed set the memory is what was learned
                raise ForgetlessError(f"task '{task.name}': the processes hold different {what} after training; nothing was committed")
        drift = drift_kl.measure(model, tokenizer, task, folder, config, trained.autocast, progress, method, memory).noted() if gate.on else None
        judged = gate.judge(index, row.predictions, score, drift and drift["kl"])
        further = gate.further(task, row.predictions, judged, score)

        # commit, or keep aside what the gate refuses: after this line it is so, whatever happens
        if distributed.is_main():
            recorded = {} if config.store == "nothing" else record_inputs(model, tokenizer, task, seed)
            coverage = cover(folder, stream, index, model, method.protected_inputs(memory), recorded)
            kept = protection(trained.steps, leak, method.report(memory), coverage, state_bytes, memory)
            probed = noted(probe, trained.steps)
            metrics = row.metrics(task.name, index) | {"protection": kept, "steps": trained.steps} | probed
            metrics |= {key: value for key, value in (("forecast", ahead), ("drift", drift)) if value} | gate.metrics(index, judged, further)
            entry = gate.attempt(task, index) | row.entry(task, config, stream, folder) | gate.entry(judged)
            content = (index, task.name, model, tokenizer, memory, recorded, metrics, stored(row.predictions, config), entry)
            put = folder.reject if gate.keeps_aside(judged) else folder.commit
            put(*content, config.keep, config.tasks[index].model_dump())
            checkpoints.drop()
            matrices = {}
            if not gate.keeps_aside(judged):
                seconds = {"train_seconds": trained_at - begun + checkpoints.seconds, "eval_seconds": time.perf_counter() - trained_at}
                seconds |= {"train_cpu_seconds": cpu} if not checkpoints.seconds else {}  # of the processes before this one nobody knows
                folder.note_task(metrics, seconds | {"peak_bytes": peak_bytes()}, folder.current)
                matrices = write_matrix(folder, measured(config, stream))
                progress.say(f"committed {index + 1}/{len(stream)} {task.name}: {row.summary()}")
                for why in gate.doubts(metrics):
                    progress.say(f"warning: gate undecided: {why}")
            tracker.end(metrics, matrices)
        distributed.barrier()
        if gate.keeps_aside(judged):
            return gate.stop(folder.lineage()[-1])
    return ""


@contextmanager
def opened(config: RunConfig, stream: TaskStream) -> Iterator[tuple[RunFolder, list[str]]]:
    """(the run's folder, what is committed in it), locked by the main process."""
    held: list[RunFolder] = []

    def open_and_check() -> list[str]:
        held.append(RunFolder(config.output_dir))
        held[0].repair()  # an interrupted commit is as if it had not begun
        return check_same_run(held[0], config, stream)

    try:
        done = distributed.on_main(open_and_check)
        yield held[0] if held else RunFolder(config.output_dir, lock=False), done
    finally:
        for folder in held:
            folder.close()


def start(folder: RunFolder, config: RunConfig, stream: TaskStream, method: Method, gate: Gate, done: list[str], progress: Progress):
    """(model, tokenizer, memory) where the run stands: after the last committed task, or at the pretrained model."""
    prompts = read_prompts(config.protect_from) if config.protect_from and not done else []  # later it is in the method's memory
    source = str(folder.path / "tasks" / done[-1] / "model") if done else config.model
    if done and distributed.is_main():
        folder.check_files(folder.lines()[-1:])
    load = partial(models.load, trust_remote_code=config.trust_remote_code, dtype=getattr(torch, config.dtype))
    model, tokenizer = load(source)
    if torch.cuda.is_available() and not config.train.get("use_cpu"):
        model.cuda()
    memory = folder.memory(done[-1]) if done else Memory()
    method.tokenizer, method.progress, method.stream = tokenizer, progress, stream
    method.autocast = bool(config.train["bf16"])
    method.untouched, method.committed, method.load = lambda: load(config.model)[0], folder.model_of, load
    for task in (*stream, *stream.watch):
        task.check(tokenizer, models.positions(model))
    if config.packing:
        check_packing(model)
        if not method.packs:
            raise ConfigError(f"packing: method {method.name} gives each row something of its own, and packed rows are one to a model; take it out")
    if config.quantize and method.needs_whole_weights:
        raise ConfigError(f"quantize: method {method.name} holds the weights where they were, which quantised ones are not; take one of them out")
    for option, wanted in (("quantize", config.quantize), ("optimizer_state", config.optimizer_state == "8bit")):
        if wanted:
            bits.check(option, model.device)
    if not done:
        method.check(model)  # no module matched: likewise
        check_bits(config, method, model.config)
    if distributed.is_main():
        write_config(folder, config)
    if done:
        folder.check_model(model, done[-1])
    elif distributed.is_main():
        for name in ("before.json", "watch.json", "watch_scores.json"):
            (folder.path / name).unlink(missing_ok=True)  # of an attempt that committed nothing
    if prompts:
        progress.stage("protecting the inputs of protect_from", len(prompts))
        with full_precision():
            method.protect(model, [encode(tokenizer, prompt) for prompt in prompts], memory, progress.advance)
        memory.info["protect_from"] = {"prompts": len(prompts), "sha256": fingerprint(prompts)}
        if space := method.report(memory):
            progress.say(f"protected from {len(prompts)} prompts: {space['share']:.1%} of the input directions of {space['modules']} layers")
    if not done and (config.evaluate.unseen or stream.watch):
        before = evaluate(model, tokenizer, stream, len(stream) if config.evaluate.unseen else 0, config, config.train["bf16"], progress)
        if config.evaluate.unseen and distributed.is_main():
            write_atomic(folder.path / "before.json", json.dumps({"scores": before.scores, "n": before.n}))
        score = partial(answers, model, tokenizer, config, config.train["bf16"], progress, None, None)
        rows = {task.name: gate.reference(task, before.predictions, score) for task in stream.watch}
        if stream.watch and distributed.is_main():
            write_atomic(folder.path / "watch_scores.json", json.dumps(rows))
            write_atomic(folder.path / "watch.json", json.dumps(before.watch))
    return model, tokenizer, memory

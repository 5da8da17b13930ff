"""What a run writes down beside the model: one evaluated row, the numbers of protection, matrix.json, and whether a config continues a run."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml

from . import distributed
from .config import MethodConfig, RunConfig, load_config
from .errors import ConfigError
from .evaluation.drift import measure_coverage
from .evaluation.matrix import AccuracyMatrix, wilson
from .evaluation.scorers import Prediction, failures, score_rows
from .files import canonical, file_sha256, write_atomic
from .lineage import RunFolder
from .methods import get
from .methods.base import Memory, Method
from .progress import Progress
from .tasks import Example, Task, TaskStream, sample
from .trainer import DEFAULTS


@dataclass
class Row:
    """One row of the matrix: scores[scorer][j], rows scored and failure shares by task name, each prediction; watch[name][scorer] of the watch sets."""

    scores: dict[str, list[float | None]]
    n: dict[str, int] = field(default_factory=dict)
    failures: dict[str, dict[str, float]] = field(default_factory=dict)
    predictions: list[Prediction] = field(default_factory=list)
    watch: dict[str, dict[str, float]] = field(default_factory=dict)

    def metrics(self, task: str, index: int) -> dict[str, Any]:
        """What metrics.json says of the row."""
        return {"task": task, "index": index, "scores": self.scores, "n": self.n, "failures": self.failures, "watch": self.watch}

    def entry(self, task: Task, config: RunConfig, stream: TaskStream, folder: RunFolder) -> dict[str, Any]:
        """What the lineage says of it, and of what was scored."""
        watch = {"watch": self.watch, "watch_sha256": {task.name: task.sha256 for task in stream.watch}}
        if (file := folder.path / "watch_scores.json").is_file():
            watch["watch_scores_sha256"] = file_sha256(file)
        return {"scores": self.scores, "scored_sha256": task.scored_sha256(config.evaluate.split)} | (watch if stream.watch else {})

    def summary(self) -> str:
        """The first scorer's scores, for one line of progress."""
        measured = [a for a in next(iter(self.scores.values())) if a is not None]
        return ", ".join(f"{name} {a:.2f}" for name, a in zip(self.n, measured, strict=False))


def evaluate(
    model, tokenizer, stream: TaskStream, tasks: int, config: RunConfig, autocast: bool, progress: Progress,
    method: Method | None = None, memory: Memory | None = None,
) -> Row:  # fmt: skip
    """Score the first `tasks` tasks of the stream and every watch set, the same seeded rows every time; several processes share the rows.

    method: which model answers which row, as its `answering` says from its memory; None: `model` all.
    """
    e, scorers = config.evaluate, config.scorers
    row = Row({name: [None] * len(stream) for name in scorers})
    scored = [*stream.tasks[:tasks], *stream.watch]
    chosen = [sample(task.split(e.split), e.limit, config.seed) for task in scored]
    counted = [f"{tasks} task{'s' if tasks > 1 else ''}"] * (tasks > 0) + [f"{len(stream.watch)} watched"] * bool(stream.watch)
    progress.stage(f"{stream[tasks - 1].name if tasks else 'before'}: scoring {' and '.join(counted)}", sum(map(len, chosen)))
    for j, (task, rows) in enumerate(zip(scored, chosen, strict=True)):
        if task.missing:
            continue
        predictions = answers(model, tokenizer, config, autocast, progress, method, memory, task, rows, before=len(row.predictions))
        values = {name: [p.score(name) for p in predictions] for name in scorers}
        means = {name: None if None in v else sum(v) / len(v) for name, v in values.items()}
        row.n[task.name] = len(rows)
        row.predictions += predictions
        if j < tasks:
            for name, mean in means.items():
                row.scores[name][j] = mean
            row.failures[task.name] = failures(predictions, task, stream.tasks)
        else:
            row.watch[task.name] = {name: mean for name, mean in means.items() if mean is not None}
    return row


def answers(
    model, tokenizer, config: RunConfig, autocast: bool, progress: Progress, method: Method | None, memory: Memory | None,
    task: Task, rows: list[Example], of: list[Example] | None = None, before: int = 0,
) -> list[Prediction]:  # fmt: skip
    """Score `rows` of one task, by the model that the method answers them with; several processes share the rows.

    before: rows of the stage that are done; of: the rows whose longest answer says how long a generated one may be, `rows` by default.
    """
    mine, found = distributed.shared(range(len(rows))), []
    for places, answerer in (method or Method()).answering(model, task, [rows[i] for i in mine], memory):
        chosen, done = [mine[k] for k in places], before + len(found) * distributed.world_size()
        with answerer as speaker:
            predictions = score_rows(
                speaker, tokenizer, task, [rows[i] for i in chosen], config.scorers, batch_size=config.evaluate.batch_size, autocast=autocast,
                advance=lambda k, done=done: progress.advance(done + k * distributed.world_size()), of=of or rows,
            )  # fmt: skip
        found += zip(chosen, predictions, strict=True)
    return [p for _, p in sorted(distributed.gathered(found), key=lambda pair: pair[0])]


def cover(folder: RunFolder, stream: TaskStream, index: int, model, spaces: dict, recorded: dict) -> dict[str, dict[str, float]]:
    """For this task and each earlier one: share of its recorded inputs inside the protected space, and how far each layer's answer to them has moved."""
    coverage = {}
    for task, name in zip(stream.tasks[:index], folder.committed(), strict=False):
        if inputs := folder.recorded(name):  # one task's at a time: of a large model they are many
            coverage[task.name] = measure_coverage(model, inputs, spaces)
    return coverage | ({stream[index].name: measure_coverage(model, recorded, spaces)} if recorded else {})


def protection(steps: list[dict], leak: dict | None, space: dict | None, coverage: dict, state_bytes: int, memory: Memory) -> dict[str, Any]:
    """The leaks, the space, the coverage of one task, the mean share of gradient energy in its low-rank coordinates, in the names the report reads; and the bytes
    that the optimizer held, and that the method keeps for the next task."""
    update_leaks = [s["update_leak"] for s in steps if s["update_leak"] is not None]
    # where a low-rank state's directions were chosen
    captured = {key: [s[key] for s in steps if key in s] for key in ("captured", "captured_of_best")}
    return {key: sum(shares) / len(shares) for key, shares in captured.items() if shares} | {
        "steps": len(steps), "update_leak": max(update_leaks, default=None), "weight_leak": leak and leak["leak"], "weight_leak_bound": leak and leak["bound"],
        "space": space, "coverage": coverage, "state_bytes": state_bytes,
        "memory_bytes": sum(t.nbytes for t in memory.tensors.values()),
    }  # fmt: skip


def stored(predictions: list[Prediction], config: RunConfig) -> list[dict[str, Any]]:
    """Predictions as the privacy mode allows them: words only under store: rows."""
    lines = []
    for p in predictions:
        line: dict[str, Any] = {"row": p.row, "task": p.task, "score": {name: p.score(name) for name in config.scorers}}
        if config.store == "rows":
            line |= {"answer": p.answer, "prediction": p.said}
        lines.append(line)
    return lines


@dataclass
class Measured:
    """What a run measures: the scorers, and the tasks and watch sets, each with its own metric."""

    scorers: list[str]
    tasks: dict[str, str]
    watch: dict[str, str]


def measured(config: RunConfig, stream: TaskStream) -> Measured:
    return Measured(config.scorers, {t.name: t.own_metric for t in stream}, {t.name: t.own_metric for t in stream.watch})


def measured_in(folder: RunFolder) -> Measured:
    """The same of a run that is there, from run.yaml and matrix.json: no data is read."""
    from .adding import standing_config

    config = standing_config(folder.path)
    own = (_read_json(folder, "matrix.json") or {}).get("metric_of", {})
    return Measured(config.scorers, {t.name: own.get(t.name, "") for t in config.tasks}, {t.name: own.get(t.name, "") for t in config.watch})


def write_matrix(folder: RunFolder, of: Measured) -> dict[str, AccuracyMatrix]:
    """matrix.json from the committed tasks, and the matrices themselves by scorer."""
    names, width = list(of.tasks), len(of.tasks)
    done = [folder.metrics(name) for name in folder.committed()]
    before = _read_json(folder, "before.json")
    if before and "n" not in before:  # of a version that noted no names
        before = {"scores": before, "n": dict.fromkeys(names)}

    def padded(row: dict[str, Any], scorer: str) -> list[float | None]:
        # tasks may have joined the stream since, or taken the place of others that were measured unseen
        def own(scores: list[float | None]) -> list[float | None]:
            return [a if name in row["n"] else None for a, name in zip([*scores, *[None] * width], names, strict=False)]

        rows = {name: own(scores) for name, scores in row["scores"].items()}
        if scorer == "metric" and scorer not in rows:  # nor did any task name a metric then: each one's was one of the other scores
            rows[scorer] = [rows.get(own, [None] * width)[j] for j, own in enumerate(of.tasks.values())]
        return rows[scorer]

    matrices = {
        scorer: AccuracyMatrix(
            names,
            [padded(r, scorer) for r in done],
            padded(before, scorer) if before and (scorer in before["scores"] or scorer == "metric") else None,
        )
        for scorer in of.scorers
    }
    n = {k: v for r in done for k, v in r["n"].items()}
    content = {
        "tasks": names,
        "before": {s: m.before for s, m in matrices.items()} if before else None,
        "scores": {s: m.rows for s, m in matrices.items()},
        "n": n,
        "ci95": {s: [[None if a is None else wilson(a, n[names[j]] or 0) for j, a in enumerate(row)] for row in m.rows] for s, m in matrices.items()},
        "metrics": {s: m.metrics() for s, m in matrices.items()},
        "failures": {key: [[r["failures"].get(t, {}).get(key) for t in names] for r in done] for key in ("other_task_label", "wrong_in_set")},
        "watch": watched(folder, list(of.watch)),
    }
    if "metric" in matrices:
        content["metric_of"] = of.tasks | of.watch
    write_atomic(folder.path / "matrix.json", json.dumps(content, indent=1))
    return matrices


def watched(folder: RunFolder, names: list[str]) -> dict[str, dict[str, list[float | None]]]:
    """{name: {scorer: [before the first task, after each]}} of the watch sets."""
    rows = [_read_json(folder, "watch.json"), *(folder.metrics(name)["watch"] for name in folder.committed())] if names else []
    found: dict[str, dict[str, list[float | None]]] = {}
    for name in names:
        values = [(row or {}).get(name, {}) for row in rows]
        found[name] = {scorer: [v.get(scorer) for v in values] for scorer in dict.fromkeys(s for v in values for s in v)}
    return found


def _read_json(folder: RunFolder, name: str) -> Any:
    file = folder.path / name
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


# -- is this the same run? -------------------------------------------------------------------------------------------------------------


def comparable(config: RunConfig) -> dict[str, Any]:
    """What must not change between two starts of one run: everything but where it lies, what is kept, how often, and which tasks are still to come.

    Of the watch sets this is the config; their rows are in the lineage, as those of the tasks are.
    """
    return {
        k: v
        for k, v in config.model_dump().items()
        if k not in ("output_dir", "keep", "tasks", "checkpoint_every", "gate", "probes", "report_to", "sharding")
    }


def resolve(config: RunConfig, method: Method, args) -> RunConfig:
    """The config with every default of the method and the trainer written out, bf16 as this machine decides it: what run.yaml holds and a resume is held to."""
    options = MethodConfig(name=config.method.name, **method.options.model_dump())
    return config.model_copy(update={"method": options, "train": DEFAULTS | {"bf16": bool(args.bf16)} | config.train})


def config_sha256(config: RunConfig) -> str:
    return hashlib.sha256(canonical(comparable(config)).encode()).hexdigest()


def checkpoint_key(folder: RunFolder, attempt: dict[str, Any], memory: Memory) -> dict[str, Any]:
    """What must be the same for a task to go on from a checkpoint: the settings, its data, its place, the commit before it, and what was protected first."""
    return attempt | {"parent": head(folder), "protect_from": memory.info.get("protect_from")}


def head(folder: RunFolder) -> str:
    """The hash of the current commit's line; "" before the first."""
    return folder.lines()[-1]["hash"] if folder.current else ""


def check_same_run(folder: RunFolder, config: RunConfig, stream: TaskStream) -> list[str]:
    """The committed tasks' folders, after making sure that this config continues them. Raises ConfigError with the key that changed."""
    done = folder.committed()
    if not done:
        return done
    old = load_config(folder.path / "run.yaml")
    if old.method.name == config.method.name:  # an option that the run's version did not have was as its default is
        old.method = MethodConfig(name=old.method.name, **get(old.method.name, **old.method.options).options.model_dump())
    for key, was, now in differences(comparable(old), comparable(config)):
        raise ConfigError(f"output_dir {folder.path}: holds a run with {key}: {was}, now {key}: {now}. Choose another output_dir, or the old setting")
    for line, task in zip(folder.lines(), [*stream, *[None] * len(done)], strict=False):
        own = {} if task is None or line["index"] >= len(config.tasks) else config.tasks[line["index"]].train
        if task is None or line["task"] != task.name or line["data_sha256"] != task.sha256 or line.get("train", {}) != own:
            changed = "has other data or another prompt, metric, answer length or train settings"
            what = "is missing" if task is None else "has another name" if line["task"] != task.name else changed
            place = f"tasks.{line['index']} ('{line['task']}', already learned)"
            raise ConfigError(f"output_dir {folder.path}: {place} {what}; only tasks after the learned ones may change")
    known = folder.lines()[0].get("watch_sha256", {})
    for watched in stream.watch:
        if known.get(watched.name) != watched.sha256:
            raise ConfigError(
                f"output_dir {folder.path}: watch '{watched.name}' has other rows than when the run began, so its scores could not be compared; "
                "bring the old rows back, or choose another output_dir"
            )
    return done


def differences(a: Any, b: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, value in a, value in b) where two nested mappings differ; of two lists of watch sets the names, where those differ."""
    if all(isinstance(x, list) and all(isinstance(entry, dict) for entry in x) for x in (a, b)):
        names = [[entry.get("name") for entry in x] for x in (a, b)]
        a, b = names if names[0] != names[1] else ({str(i): entry for i, entry in enumerate(x)} for x in (a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for k in {**a, **b} for d in differences(a.get(k), b.get(k), f"{key}.{k}" if key else str(k))]
    return [] if a == b else [(key, a, b)]


def check_store(config: RunConfig, method: Method) -> None:
    """Raises ConfigError where the method has to keep more of the data than `store` allows."""
    allowed = ("nothing", "prompts", "rows")
    if allowed.index(method.stores) > allowed.index(config.store):
        raise ConfigError(
            f"store: {config.store} forbids what method {method.name} keeps of each task: {method.stores}; allow it, or choose another method"
        )


def write_config(folder: RunFolder, config: RunConfig) -> None:
    """run.yaml: the config as resolved, with the versions that ran it as a comment (they are not settings)."""
    import transformers

    from . import __version__

    versions = f"# forgetless {__version__}, torch {torch.__version__}, transformers {transformers.__version__}, Python {sys.version.split()[0]}\n"
    write_atomic(folder.path / "run.yaml", versions + yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True))


def peak_bytes() -> int:
    """Peak of the accelerator's memory where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resident_bytes()


def resident_bytes() -> int:
    """The most memory this process has held."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil  # which accelerate needs

        return psutil.Process().memory_info().peak_wset
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

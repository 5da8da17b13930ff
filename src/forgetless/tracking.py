"""`report_to`: the numbers of a run while it goes, to TensorBoard, Weights & Biases or trackio. A run folder is one run there, whose step goes on from task to task.

A run that was killed goes on under the same name: what was sent of the task in progress is sent again from its last checkpoint. No row's text is sent.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from . import distributed
from .config import RunConfig
from .errors import ConfigError
from .files import read, write_atomic
from .lineage import RunFolder
from .progress import Progress

FILE = "tracking.json"  # in the run's folder: the id that the run has elsewhere
VERDICTS = {"accept": 1, "undecided": 0, "reject": -1}


class Sink(Protocol):
    """One place that numbers go to."""

    def log(self, values: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's own folder. What an interrupted process wrote beyond the step where this one begins is hidden."""

    def __init__(self, config: RunConfig, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(Path(config.output_dir) / "tensorboard", purge_step=step + 1)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of the project WANDB_PROJECT, or forgetless. Its x axis is our step: wandb's own never goes back, as a task that begins again does."""

    def __init__(self, config: RunConfig, step: int):
        import wandb

        said = {"project": os.environ.get("WANDB_PROJECT", "forgetless"), "id": identity(config), "name": Path(config.output_dir).name}
        settings = wandb.Settings(console="off")  # or it would send what this process prints
        self.run = wandb.init(**said, resume="allow", config=settings_sent(config), settings=settings)
        self.run.define_metric("*", step_metric="step")

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values | {"step": step})

    def close(self) -> None:
        self.run.finish(quiet=True)


class Trackio:
    """A run of the project TRACKIO_PROJECT, or forgetless; on this machine unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names another place."""

    def __init__(self, config: RunConfig, step: int):
        import trackio

        name = f"{Path(config.output_dir).name}-{identity(config)}"  # a name is all it knows a run by
        self.library, project = trackio, os.environ.get("TRACKIO_PROJECT", "forgetless")
        trackio.init(project, name=name, resume="allow", config=settings_sent(config), embed=False)

    def log(self, values: dict[str, float], step: int) -> None:
        self.library.log(values, step=step)

    def close(self) -> None:
        self.library.finish()


SINKS = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


def check_installed(config: RunConfig) -> None:
    """Raises ConfigError where a package that report_to names is missing."""
    for name in config.report_to:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"report_to: {name} is not installed. Run: pip install {name}")


class Tracker:
    """Sends a run's numbers to `sinks`; to none of them in all processes but the main one. Training goes on without a sink that fails."""

    def __init__(self, sinks: dict[str, Sink], step: int, progress: Progress):
        self.sinks, self.step, self.progress = sinks, step, progress  # step: of the run, as the last task that is committed left it

    def _log(self, values: dict[str, float], step: int) -> None:
        for name, sink in list(self.sinks.items()):
            try:
                sink.log(values, step)
            except Exception as error:  # each library has its own kind, and none is worth a run
                del self.sinks[name]
                self.progress.say(f"warning: report_to: {name} failed and gets nothing more ({type(error).__name__}: {str(error)[:200]})")

    def begin(self, index: int, log: list[dict[str, Any]]) -> None:
        """A task begins, or goes on after the steps in `log`."""
        self.index = index
        for entry in log:
            self.log_step(entry)

    def log_step(self, entry: dict[str, Any]) -> None:
        """One optimizer step, as the trainer logs it."""
        if self.sinks:
            values = {f"train/{key}": value for key, value in entry.items() if key != "step" and value is not None}
            self._log(values | {"train/task": self.index}, self.step + entry["step"])

    def end(self, metrics: dict[str, Any], matrices: dict[str, Any]) -> None:
        """A task is committed, or refused (no matrices): then the model stays as it was, and its scores too."""
        steps = metrics["protection"]["steps"]
        if self.sinks:
            self._log(of_gate(metrics.get("gate")) | (of_task(metrics, matrices) if matrices else {}), self.step + steps)
        self.step += steps

    def close(self) -> None:
        for name, sink in self.sinks.items():
            try:
                sink.close()
            except Exception as error:
                self.progress.say(f"warning: report_to: {name} could not be closed ({type(error).__name__}: {str(error)[:200]})")


def of_task(metrics: dict[str, Any], matrices: dict[str, Any]) -> dict[str, float]:
    """One row of the matrix, the watch sets, what the matrix says by now, and the numbers of protection."""
    row = {scorer: dict(zip(matrices[scorer].tasks, scores, strict=False)) for scorer, scores in metrics["scores"].items()}
    summary = {scorer: matrix.metrics() for scorer, matrix in matrices.items()}
    parts = {
        "score": row,
        "watch": metrics["watch"],
        "matrix": summary,
        "protection": {k: v for k, v in metrics["protection"].items() if k != "steps"},
    }
    return dict(numbers(parts))


def of_gate(gate: dict[str, Any] | None) -> dict[str, float]:
    """The verdict as 1, 0 (undecided) or -1, and of each limit what was observed and what is allowed."""
    if gate is None:
        return {}
    names = {"/".join(filter(None, (c["limit"], c["name"]))): c for c in gate["criteria"]}
    return {"gate/verdict": VERDICTS[gate["outcome"]]} | {
        f"gate/{name}/{key}": c[key] for name, c in names.items() for key in ("observed", "allowed")
    }


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """(path/to/it, number) of a nested dict, what is no number left out.

    >>> dict(numbers({"score": {"choice": {"cities": 0.5, "kinds": None}}}))
    {'score/choice/cities': 0.5}
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, f"{name}/{key}" if name else str(key))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, float(value)


def identity(config: RunConfig) -> str:
    """The id that this run folder has elsewhere, the same whenever it goes on."""
    file = Path(config.output_dir) / FILE
    if not (known := read(file)):
        write_atomic(file, known := json.dumps({"id": uuid.uuid4().hex[:8]}))
    return json.loads(known)["id"]


def settings_sent(config: RunConfig) -> dict[str, Any]:
    """What is said of the run; a model in a folder of this machine is named without its path."""
    model = Path(config.model).name if os.path.isdir(config.model) else config.model
    named = {"model": model, "tasks": [task.name for task in config.tasks], "method": config.method.model_dump()}
    return named | {key: getattr(config, key) for key in ("train", "dtype", "precision", "packing", "quantize", "optimizer_state", "seed")}


@contextlib.contextmanager
def tracked(folder: RunFolder, config: RunConfig, progress: Progress) -> Iterator[Tracker]:
    """The run's tracker, from the step that it has reached. Raises ConfigError where a library refuses to begin."""
    sinks: dict[str, Sink] = {}

    def begin() -> int:
        step = sum(folder.metrics(name)["protection"]["steps"] for name in folder.committed())
        for name in config.report_to:
            try:
                with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
                    sinks[name] = SINKS[name](config, step)
            except Exception as error:  # likewise
                hint = "; log in with `wandb login`, or set WANDB_MODE=offline" if name == "wandb" else ""
                raise ConfigError(
                    f"report_to: {name} could not begin ({type(error).__name__}: {' '.join(str(error).split())[:200]}){hint}"
                ) from error
        return step

    tracker = Tracker(sinks, distributed.on_main(begin) if config.report_to else 0, progress)
    try:
        yield tracker
    finally:
        with contextlib.redirect_stdout(sys.stderr):
            tracker.close()

"""One more task on a finished run, any day: `forgetless add`. Needs the run's folder and the new rows; of the old data only what is still there is measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import RunConfig, TaskConfig, load_config, parse_override
from .errors import ConfigError, DataError, nearest
from .progress import Progress

if TYPE_CHECKING:
    from .loop import Result

# what may change from one task to the next without making earlier scores incomparable
OF_THE_RUN = ("gate", "probes", "keep", "checkpoint_every")


def add(
    run_dir: str | Path,
    name: str,
    data: str | None = None,
    options: list[str] | tuple[str, ...] = (),
    progress: Progress | None = None,
    discard: bool = False,
) -> Result:
    """Learn the task `name` from the rows of `data` on top of the run in `run_dir`.

    options: key=value on the new task's own keys (format=..., labels=..., train.max_steps=...) and on gate, probes, keep and checkpoint_every of the run. A task or watch
    set whose rows are gone, or are others by now, is not measured, and said so. discard: take tasks that run.yaml names and nobody has learned out of it.
    Every file of the run is checked before. Raises ConfigError, DataError (exit 4) where a file of the run is damaged, GateRejected.
    """
    from .lineage import RunFolder, chain_damage
    from .loop import run
    from .tasks import Known

    config, folder = read_run(run_dir), RunFolder(run_dir, lock=False)
    lines = folder.lines()
    if not lines:
        raise ConfigError(f"{run_dir}: no task is learned there yet; finish the run first: forgetless run {run_dir}/run.yaml")
    if found := chain_damage(folder.lineage()):
        raise DataError(f"{run_dir}: damaged: {found[0]}. Nothing was changed")
    folder.check_files([line for line in folder.lineage() if line["kind"] != "rollback"])
    learned = [line["task"] for line in lines]
    again = learned[-1] == name  # the same command once more: finished, or refused because it is not the same
    if name in learned[:-1]:
        raise ConfigError(f"{run_dir}: task '{name}' is learned already; give the new rows a name of their own")
    known = {line["task"] for line in folder.lineage()}
    waiting = [t.name for t in config.tasks[len(learned) :] if t.name != name and t.name not in known]
    if waiting and not discard:
        raise ConfigError(
            f"{run_dir}: not finished, {', '.join(waiting)} still to come. Finish it with: forgetless run {run_dir}/run.yaml; or take what is not learned out, "
            "with --discard"
        )
    content = config.model_dump()
    content |= {"tasks": [*content["tasks"][: len(learned) - again], _task(name, data, options)], "output_dir": str(run_dir)}
    for key, value in map(parse_override, options):
        if key[0] in OF_THE_RUN:
            _put(content, key, value)
    remembered = {line["task"]: Known(line["data_sha256"], line.get("scored_sha256", "")) for line in lines[: len(lines) - again]}
    remembered |= {watched: Known(sha) for watched, sha in lines[0].get("watch_sha256", {}).items()}
    return run(load_config(content), progress=progress, learned=remembered)


def _task(name: str, data: str | None, options: list[str] | tuple[str, ...]) -> dict[str, Any]:
    task: dict[str, Any] = {"name": name} | ({"data": data} if data else {})
    for option in options:
        key, value = parse_override(option)
        if key[0] in TaskConfig.model_fields:
            _put(task, key, value)
        elif key[0] not in OF_THE_RUN:
            why = (
                "is the same for all tasks of a run"
                if key[0] in RunConfig.model_fields
                else f"is no key of a task{nearest(key[0], TaskConfig.model_fields)}"
            )
            raise ConfigError(f"'{option}': {key[0]} {why}; what may be given: a task's own keys (train.KEY too), and {', '.join(OF_THE_RUN)}")
    return task


def _put(content: dict[str, Any], key: list[str], value: Any) -> None:
    for part in key[:-1]:
        content = content.setdefault(part, {})
    content[key[-1]] = value


def read_run(run_dir: str | Path) -> RunConfig:
    """The config of the run in a folder. Raises DataError where there is none."""
    file = Path(run_dir) / "run.yaml"
    if not file.is_file():
        raise DataError(f"{run_dir}: not a run's folder, it has no run.yaml; give the output_dir of a run")
    return load_config(file)

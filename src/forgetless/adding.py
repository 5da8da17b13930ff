"""One more task on a finished run, any day: `forgetless add`. Needs the run's folder and the new rows; of the old data only what is still there is measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import RunConfig, TaskConfig, apply_override, load_config, parse_override
from .errors import ConfigError, DataError, nearest
from .progress import Progress

if TYPE_CHECKING:
    from .loop import Result

# what may change from one task to the next without making earlier scores incomparable
OF_THE_RUN = ("gate", "probes", "keep", "checkpoint_every", "report_to")


def add(
    run_dir: str | Path,
    name: str,
    data: str | None = None,
    options: list[str] | tuple[str, ...] = (),
    progress: Progress | None = None,
    discard: bool = False,
) -> Result:
    """Learn the task `name` from the rows of `data` on top of the run in `run_dir`.

    options: key=value on the new task's own keys (format=..., labels=..., train.max_steps=...) and on gate, probes, keep, checkpoint_every, report_to. A task or watch
    set whose rows are gone, or are others by now, is not measured, and said so. discard: take tasks that run.yaml names and nobody has learned out of it.
    Every file of the run is checked before. Raises ConfigError, DataError (exit 4) where a file of the run is damaged, GateRejected.
    """
    from .lineage import RunFolder, chain_damage
    from .loop import run
    from .tasks import Known

    config, folder = standing_config(run_dir), RunFolder(run_dir, lock=False)
    lines = folder.lines()
    if not lines:
        raise ConfigError(f"{run_dir}: no task is learned there yet; finish the run first: forgetless run {run_dir}/run.yaml")
    if found := chain_damage(folder.lineage()):
        raise DataError(f"{run_dir}: damaged: {found[0]}. Nothing was changed")
    # of what was refused, what is still there: nothing stands on it
    folder.check_files([line for line in folder.lineage() if line["kind"] == "task" or line["kind"] == "reject" and folder.place(line).is_dir()])
    learned = [line["task"] for line in lines]
    again = learned[-1] == name  # the same command once more: finished, or refused because it is not the same
    if name in learned[:-1]:
        raise ConfigError(f"{run_dir}: task '{name}' is learned already; give the new rows a name of their own")
    known = {line["task"] for line in folder.lineage()}
    waiting = [t.name for t in config.tasks[len(learned) :] if t.name != name and t.name not in known]
    if waiting and not discard:
        raise ConfigError(
            f"{run_dir}: not finished, {', '.join(waiting)} still to come. Finish it with: forgetless run {run_dir}/run.yaml, or the `add` that "
            "began it; or take what is not learned out, with --discard"
        )
    content = config.model_dump()
    content |= {"tasks": [*content["tasks"][: len(learned) - again], _task(name, data, options)], "output_dir": str(run_dir)}
    for option in options:
        if parse_override(option)[0][0] in OF_THE_RUN:
            apply_override(content, option)
    remembered = {line["task"]: Known(line["data_sha256"], line.get("scored_sha256", "")) for line in lines[: len(lines) - again]}
    remembered |= {watched: Known(sha) for watched, sha in lines[0].get("watch_sha256", {}).items()}
    return run(load_config(content), progress=progress, learned=remembered)


def _task(name: str, data: str | None, options: list[str] | tuple[str, ...]) -> dict[str, Any]:
    task: dict[str, Any] = {"name": name} | ({"data": data} if data else {})
    for option in options:
        key, _ = parse_override(option)
        if key[0] in task and key[0] in ("name", "data"):
            raise ConfigError(f"'{option}': {key[0]} is given already, as --{key[0]}")
        if key[0] in TaskConfig.model_fields:
            apply_override(task, option)
        elif key[0] not in OF_THE_RUN:
            why = (
                "is the same for all tasks of a run"
                if key[0] in RunConfig.model_fields
                else f"is no key of a task{nearest(key[0], TaskConfig.model_fields)}"
            )
            raise ConfigError(f"'{option}': {key[0]} {why}; what may be given: a task's own keys (train.KEY too), and {', '.join(OF_THE_RUN)}")
    return task


def read_run(run_dir: str | Path) -> RunConfig:
    """The config of the run in a folder. Raises DataError where there is none."""
    file = Path(run_dir) / "run.yaml"
    if not file.is_file():
        raise DataError(f"{run_dir}: not a run's folder, it has no run.yaml; give the output_dir of a run")
    return load_config(file)


def standing_config(run_dir: str | Path, left: list[str] | None = None) -> RunConfig:
    """The config of a run as it stands: its tasks are those that led to the current one, and after them what run.yaml has more, where it begins with the same.

    left: the commits that led to where a rollback came from. run.yaml is of that branch, so of what the two have in common its entries count, of the rest those that
    each commit keeps. Without it run.yaml counts wherever its names fit.
    """
    from .lineage import RunFolder, task_of

    config, folder = read_run(run_dir), RunFolder(run_dir, lock=False)
    done, names = folder.committed(), [task.name for task in config.tasks]
    if left is None:
        left = done if names[: len(done)] == [task_of(name) for name in done] else []
    tasks = []
    for i, name in enumerate(done):
        shared = left[: i + 1] == done[: i + 1] and names[i : i + 1] == [task_of(name)]
        kept = None if shared else folder.settings(name)
        entry = TaskConfig.model_validate(kept) if kept else next((task for task in config.tasks if task.name == task_of(name)), None)
        if entry is None:
            raise DataError(
                f"{run_dir}: the settings of task '{task_of(name)}' are neither in its commit nor in run.yaml; put them back into run.yaml"
            )
        tasks.append(entry)
    more = config.tasks[len(tasks) :] if names[: len(tasks)] == [task.name for task in tasks] else []
    return config.model_copy(update={"tasks": [*tasks, *more]})

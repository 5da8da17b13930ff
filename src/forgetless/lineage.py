"""The durable record of a run: what was learned, in which order, from what, and where the model is that came of it.

A commit: everything of a task is written beside, synced, renamed into tasks/NN-name; then `current` is replaced, which decides; then its line joins lineage.jsonl. A kill
between the last two leaves a line to come, which the task's folder holds in line.json: whoever reads sees it there, whoever writes next appends it. Whatever else lies
beyond `current` was interrupted and is done again. Nothing hashed depends on the clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .errors import ConfigError, DataError, nearest
from .files import (
    FULL,
    Manifest,
    canonical,
    file_sha256,
    lines_of,
    link_or_copy,
    link_unchanged,
    manifest,
    read,
    sync,
    sync_tree,
    text_sha256,
    write,
    write_atomic,
)
from .lock import FolderLock
from .methods.base import Memory
from .state import folder_sha256, load_memory, model_sha256, save_memory

# where the file system has no links to folders: of which task's model `model` is a copy
COPY_OF = ".model_of"
FILES = {"run.yaml", "lineage.jsonl", "timing.jsonl", "matrix.json",
         "report.html", "report.md", "card.md", "tasks", "rejected", "current", "model", "before.json", "watch.json", "watch_scores.json",
         "tags.json", "relearning.json", "general.json", "tracking.json", "tensorboard", ".lock", COPY_OF}  # fmt: skip
TRAINING = ".training"  # tasks/.NN-name.training: checkpoints of the task in progress
GONE = "model.gone"  # in a task's folder: its model was let go on purpose
SETTINGS = "task.json"  # in a task's folder: its entry in the config
BESIDE = {"line.json", "files.json", SETTINGS, GONE}  # what files.json does not name
# a crash may leave one of these half-written; they are ours too
TEMPORARY = {f".{name}.tmp" for name in FILES} | {".model"}


class RunFolder:
    """One run's folder, locked for as long as this object lives; with lock=False only looked at."""

    def __init__(self, path: str | Path, lock: bool = True):
        self.path = Path(path)
        self._lock: FolderLock | None = None
        if not lock:
            return
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"output_dir {self.path}: is a file")
        if self.path.is_dir():
            self._refuse_foreign()
        self._found = self.path.is_dir()
        try:
            (self.path / "tasks").mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.path)
        except OSError as error:
            raise ConfigError(f"output_dir {self.path}: cannot be written ({error.strerror})") from None

    def _refuse_foreign(self) -> None:
        """A folder of somebody else is never written to, not even one that has names of ours in it."""
        entries = sorted(p.name for p in self.path.iterdir())
        tasks = self.path / "tasks"
        ours = "current" in entries or (written := self.path / "run.yaml").is_file() and written.read_bytes().startswith(b"# forgetless ")
        # beside a run of ours anything may lie: only tasks/, rejected/ and model are ever cleaned
        foreign = [] if ours else [name for name in entries if name not in FILES | TEMPORARY]
        foreign += [f"tasks/{p.name}" for p in sorted(tasks.iterdir()) if not re.match(r"\.?\d\d+-", p.name)] if tasks.is_dir() else []
        if (model := self.path / "model").exists() and not model.is_symlink() and not (self.path / COPY_OF).is_file():
            if "current" in entries and not foreign:
                raise ConfigError(f"output_dir {self.path}: model is not the link to the current task's model; move it away, the link comes back")
            foreign.append("model")
        if foreign or (entries and not ours and ".lock" not in entries):
            found = ", ".join((foreign or entries)[:3])
            raise ConfigError(
                f"output_dir {self.path}: not empty and not a run of forgetless (it has {found}). Nothing was touched; choose another folder"
            )

    def close(self) -> None:
        """Unlock. A folder in which nothing began is left as it was found."""
        if self._lock is None:
            return
        if not (self.path / "run.yaml").exists():
            with contextlib.suppress(OSError):
                (self.path / "tasks").rmdir()  # fails where something is in it
                (self.path / ".lock").unlink()
                if not self._found:
                    self.path.rmdir()
        self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- where the run stands ----------------------------------------------------------------------------------------------------------

    @property
    def current(self) -> str:
        """The folder under tasks/ that is current; "" before the first commit."""
        return read(self.path / "current").strip()

    def lineage(self) -> list[dict[str, Any]]:
        """Every commit, rejection and rollback, in order; the one that a kill kept from the file too. Raises DataError where the file is not what was written."""
        lines, torn = self._written()
        if torn:
            raise self._damaged(f"line {len(lines) + 1} of lineage.jsonl is not one that forgetless wrote")
        return lines + self._to_come(lines)

    def _written(self) -> tuple[list[dict[str, Any]], str]:
        """(the whole lines, what cannot be read). The end of the file may be half a line, which was being written when the power went."""
        lines, torn = [], ""
        for text in lines_of(read(self.path / "lineage.jsonl")):
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                line = None
            if torn or not isinstance(line, dict) or not {"kind", "index", "task", "hash"} <= line.keys():
                torn += text if text.endswith("\n") or torn else ""
            else:
                lines.append(line)
        if not self.current and (tasks := [line for line in lines if line["kind"] == "task"]):
            if len(lines) == 1 and "files_sha256" not in lines[0]:
                return [], ""  # of a version that appended the line before it replaced `current`, and was killed between them
            # never of a kill, as `current` is replaced whole; to take it for a run in which nothing is committed would be to delete every commit
            name = folder_of(tasks[-1])
            raise self._damaged(
                f"current is missing or empty, and lineage.jsonl has commits; where it ended at {name}, `echo {name} > current` brings it back"
            )
        return lines, torn

    def _to_come(self, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What `current` or a folder under rejected/ says has happened, and lineage.jsonl does not say yet."""
        last = lines[-1]["hash"] if lines else ""
        candidates = [self.path / "tasks" / self.current] if self.current else []
        candidates += sorted(p for p in _entries(self.path / "rejected") if not p.name.startswith("."))
        for folder in candidates:
            with contextlib.suppress(ValueError):
                line = json.loads(read(folder / "line.json") or "{}")
                if line.get("parent") == last and line.get("hash") not in {x["hash"] for x in lines}:
                    return [line]
        paths, head = branches(lines)
        if self.current in paths and self.current != (head[-1] if head else ""):
            return [_rollback_line(lines, self.current)]
        return []

    def committed(self) -> list[str]:
        """Folder names under tasks/ from the first task to the current one."""
        if not self.current:
            return []
        for _ in range(3):  # a commit may come between the two readings
            current = self.current
            paths, _ = branches(self.lineage())
            if current == self.current:
                break
        if not read(self.path / "current").endswith("\n"):  # 01-cities~2 cut short is 01-cities
            raise self._damaged("current is cut short")
        if self.current not in paths:
            raise self._damaged(f"`current` says {self.current}, which lineage.jsonl does not know")
        done = paths[self.current]
        for file in ("run.yaml", *(f"tasks/{name}/metrics.json" for name in done)):
            if not (self.path / file).is_file():
                raise self._damaged(f"{file} is missing")
        return done

    def lost(self, lines: list[dict[str, Any]]) -> list[str]:
        """Where lineage.jsonl lacks a line that no kill can have kept from it: the commit or rejection that a kill interrupts follows the last line that is written."""
        written, _ = self._written()
        last, found = written[-1]["hash"] if written else "", []
        for room, kind in (("tasks", "task"), ("rejected", "reject")):
            known = {folder_of(line) for line in lines if line["kind"] == kind}
            for folder in _entries(self.path / room):
                with contextlib.suppress(ValueError):
                    if (
                        folder.name not in known
                        and json.loads(read(folder / "line.json") or "{}").get("parent", last) != last
                        and not folder.name.startswith(".")
                    ):
                        found.append(f"lineage.jsonl lacks the line of {room}/{folder.name}")
        return found

    def lines(self) -> list[dict[str, Any]]:
        """The lineage lines of `committed()`."""
        by_folder = {folder_of(line): line for line in self.lineage() if line["kind"] == "task"}
        return [by_folder[name] for name in self.committed()]

    def _damaged(self, what: str) -> DataError:
        return DataError(f"{self.path}: damaged: {what}. Bring the folder back from a copy, or start another output_dir")

    def repair(self) -> None:
        """Finish or drop what was interrupted."""
        done = len(self.committed())  # a damaged folder is left as it is
        lines = self.lineage()
        if found := chain_damage(lines) + self.lost(lines):
            raise self._damaged(found[0])
        kept = "".join(canonical(line) + "\n" for line in lines)
        if kept != read(self.path / "lineage.jsonl"):  # a torn last line too: the next commit would go on behind it
            write_atomic(self.path / "lineage.jsonl", kept)
        for room, kind in (("tasks", "task"), ("rejected", "reject")):
            known = {folder_of(line) for line in lines if line["kind"] == kind}
            for folder in filter(Path.is_dir, _entries(self.path / room)):
                # its checkpoints say themselves if they count
                in_progress = folder.name.startswith(f".{done:02d}-") and folder.name.endswith(TRAINING)
                if folder.name not in known and not in_progress:
                    shutil.rmtree(folder)
                elif (folder / GONE).exists() and (folder / "model").exists():
                    shutil.rmtree(folder / "model")
        for name in TEMPORARY - {".report.html.tmp", ".relearning.json.tmp"}:  # written by whoever looks, without the lock
            _remove(self.path / name)
        self._point_model()
        self.restore_timing()

    # -- commits -----------------------------------------------------------------------------------------------------------------------

    def commit(
        self, index: int, task: str, model: nn.Module, tokenizer, memory: Memory, recorded: dict[str, Tensor],
        metrics: dict[str, Any], predictions: list[dict], entry: dict[str, Any], keep: str, settings: dict[str, Any] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Make task `index` durable, and its model the current one; returns its lineage line. settings: the task's entry in the config."""
        line = self._write("task", index, task, model, tokenizer, memory, recorded, metrics, predictions, entry, settings)
        write_atomic(self.path / "current", folder_of(line) + "\n")
        self._append(line)
        self._point_model()
        self.let_go(keep)
        return line

    def reject(
        self, index: int, task: str, model: nn.Module, tokenizer, memory: Memory, recorded: dict[str, Tensor],
        metrics: dict[str, Any], predictions: list[dict], entry: dict[str, Any], keep: str = "all", settings: dict[str, Any] | None = None,
    ) -> Path:  # fmt: skip
        """Keep a model that was refused under rejected/, and record it; the current one stays. Returns its folder. Of those refused before `keep` may let the models go."""
        self.let_go(keep)
        line = self._write("reject", index, task, model, tokenizer, memory, recorded, metrics, predictions, entry, settings)
        self._append(line)
        return self.path / "rejected" / folder_of(line)

    def _write(
        self, kind: str, index: int, task: str, model: nn.Module, tokenizer, memory: Memory, recorded: dict[str, Tensor],
        metrics: dict[str, Any], predictions: list[dict], entry: dict[str, Any], settings: dict[str, Any] | None,
    ) -> dict[str, Any]:  # fmt: skip
        previous, name = self.lineage(), f"{index:02d}-{task}"
        again = sum(x["kind"] == kind and (x["index"], x["task"]) == (index, task) for x in previous)
        folder = f"{name}~{again + 1}" if again else name
        room = self.path / ("tasks" if kind == "task" else "rejected")
        work, final = room / f".{name}", room / folder
        shutil.rmtree(work, ignore_errors=True)
        (work / "state").mkdir(parents=True)
        sync(self.path)
        model.save_pretrained(work / "model")
        tokenizer.save_pretrained(work / "model")
        save_memory(work / "state", memory, recorded)
        write(work / "metrics.json", json.dumps(metrics, indent=1))
        write(work / "predictions.jsonl", "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in predictions))
        files = manifest(work)
        if self.current:
            earlier = self.path / "tasks" / self.current
            link_unchanged(work, files, earlier, read_manifest(earlier))
        write(work / "files.json", text := json.dumps({"version": 1, "files": files, SETTINGS: settings is not None}, indent=1, sort_keys=True))
        line = {"kind": kind, "index": index, "task": task, **({"folder": folder} if again else {}), **entry}
        line |= {"state_sha256": folder_sha256(work / "state"), "model_sha256": model_sha256(model), "files_sha256": text_sha256(text)}
        line = _chained(line, previous)
        write(work / "line.json", canonical(line))
        if (
            settings is not None
        ):  # so that the config of a branch that was left can be told, when a rollback leads to it again; paths in it are of this machine,
            # so it has a hash of its own and none in the lineage
            write(work / SETTINGS, canonical({"settings": settings, "sha256": text_sha256(canonical(settings))}))
        sync_tree(work)
        shutil.rmtree(final, ignore_errors=True)
        work.rename(final)
        sync(room)
        return line

    def _append(self, line: dict[str, Any]) -> None:
        with (self.path / "lineage.jsonl").open("a", encoding="utf-8", newline="\n") as f:
            f.write(canonical(line) + "\n")
            f.flush()
            os.fsync(f.fileno())
        sync(self.path)

    def rollback(self, to: str) -> dict[str, Any]:
        """Make an earlier commit the current one, by a task's name, a tag or a folder's name; returns the line that records it.

        Nothing is deleted: a rollback may itself be rolled back. Raises ConfigError for an unknown name, DataError where the model was let go.
        """
        name = self.find(to)
        if name == self.current:
            raise ConfigError(f"{self.path}: {to} is current already")
        if not (self.path / "tasks" / name / "model").is_dir() or (self.path / "tasks" / name / GONE).exists():
            kept = [x for x in self.folders() if (self.path / "tasks" / x / "model").is_dir()]
            raise DataError(f"{self.path}: the model of {name} is not there, `keep` has let it go. Kept: {', '.join(kept)}")
        line = _rollback_line(self.lineage(), name)
        write_atomic(self.path / "current", name + "\n")
        self._append(line)
        self._point_model()
        return line

    def folders(self) -> list[str]:
        """Every committed task's folder, those that were rolled back too, in the order they were committed."""
        return list(branches(self.lineage())[0])

    def find(self, name: str) -> str:
        """The folder under tasks/ of a task, tag or folder name; of several tasks of one name the one that led to where the run stands, else the latest."""
        folders, tags = self.folders(), self.tags()
        of_task = [x for x in folders if task_of(x) == name]
        if name in tags and (name in folders or of_task):
            raise ConfigError(
                f"{self.path}: '{name}' is a tag and a task's name; say which by the folder's name: {', '.join([tags[name], *of_task])}"
            )
        if name in folders or name in tags:
            return tags.get(name, name)
        if not of_task:
            known = {*map(task_of, folders), *tags}
            raise ConfigError(f"{self.path}: no committed task or tag '{name}'{nearest(name, known)}")
        return next((x for x in of_task if x in self.committed()), of_task[-1])

    def tags(self) -> dict[str, str]:
        """{tag: folder under tasks/}."""
        try:
            return json.loads(read(self.path / "tags.json") or "{}")
        except ValueError:
            raise self._damaged("tags.json is not valid JSON") from None

    def tag(self, name: str, tag: str | None) -> None:
        """Give the commit `name` a tag, or with None take all of its tags away."""
        folder = self.find(name)
        if tag is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", tag):
            raise ConfigError(f"tag {tag!r}: letters, digits, '.', '_' and '-', starting with a letter or digit, at most 64")
        if tag is not None and tag in {*map(task_of, self.folders()), *self.folders()}:
            raise ConfigError(f"tag {tag!r}: is the name of a task here; `rollback --to {tag}` would not know which is meant")
        kept = {t: f for t, f in self.tags().items() if f != folder} if tag is None else self.tags() | {tag: folder}
        write_atomic(self.path / "tags.json", json.dumps(kept, indent=1, sort_keys=True))

    def model_is_current(self) -> bool:
        """Is `model` the link to the current task's model, or the copy of it?"""
        link, target = self.path / "model", Path("tasks") / self.current / "model"
        if link.is_symlink():
            return link.readlink() == target and link.is_dir()
        return link.is_dir() and read(self.path / COPY_OF) == target.as_posix()

    def _point_model(self) -> None:
        link, copy_of, temporary = self.path / "model", self.path / COPY_OF, self.path / ".model"
        target = Path("tasks") / self.current / "model"
        if self.current and self.model_is_current():
            return
        if copy_of.is_file() and not link.is_symlink():  # ours to replace
            shutil.rmtree(link, ignore_errors=True)
        if not self.current:
            link.unlink(missing_ok=True)
            return
        _remove(temporary)
        try:
            temporary.symlink_to(target, target_is_directory=True)
        except OSError as error:  # Windows allows them to developers alone, some file systems to nobody
            if error.errno in FULL:
                raise
            write_atomic(copy_of, "")  # while it says nothing the copy is made again
            shutil.copytree(self.path / target, temporary, copy_function=link_or_copy)
        if link.is_symlink() and (os.name == "nt" or not temporary.is_symlink()):
            link.unlink()  # which a rename would not replace
        temporary.replace(link)
        copy_of.unlink(missing_ok=True) if link.is_symlink() else write_atomic(copy_of, target.as_posix())
        sync(self.path)  # before `keep` lets go the model it led to

    def going(self, keep: str) -> list[Path]:
        """The folders whose models `keep` (all, last N, tagged) does not keep, refused ones among them. The current model always stays."""
        if keep == "all":
            return []
        stays = {self.current, *self.tags().values()}
        if keep != "tagged":
            stays |= set(self.committed()[-int(keep.split()[1]) :])
        gone = [self.path / "tasks" / name for name in self.folders() if name not in stays]
        gone += [p for p in _entries(self.path / "rejected") if not p.name.startswith(".")]
        return [folder for folder in gone if (folder / "model").is_dir()]

    def let_go(self, keep: str) -> None:
        """Delete the models that `keep` does not keep."""
        for folder in self.going(keep):
            (folder / GONE).touch()  # first: a kill in between leaves half a model, and says that it is none
            sync(folder)
            shutil.rmtree(folder / "model")

    # -- reading back ------------------------------------------------------------------------------------------------------------------

    def training(self, index: int, task: str) -> Path:
        """Where the checkpoints of a task in progress lie."""
        return self.path / "tasks" / f".{index:02d}-{task}{TRAINING}"

    def model_of(self, task: str) -> Path:
        """The model that was committed with a task. Raises DataError where `keep` has let it go."""
        for name in self.committed():
            if task_of(name) == task and (model := self.path / "tasks" / name / "model").is_dir():
                return model
        raise DataError(f"{self.path}: the model of task '{task}' is not there; `keep: all` keeps every task's")

    def memory(self, name: str) -> Memory:
        return load_memory(self.path / "tasks" / name / "state")

    def recorded(self, name: str) -> dict[str, Tensor]:
        from safetensors.torch import load

        file = self.path / "tasks" / name / "state" / "inputs.safetensors"
        # of its bytes: safetensors 0.8 keeps 56 of them for every tensor it reads from a file, and these are read again after every task
        return load(file.read_bytes()) if file.is_file() else {}

    def metrics(self, name: str, room: str = "tasks") -> dict[str, Any]:
        file = self.path / room / name / "metrics.json"
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise self._damaged(f"{file.relative_to(self.path)} is not valid JSON") from None

    def scores(self, name: str, task: str, scorer: str) -> dict[int, float]:
        """{row: score} of one task's rows as they were scored when `name` was committed."""
        lines = map(json.loads, lines_of(read(self.path / "tasks" / name / "predictions.jsonl")))
        return {line["row"]: line["score"][scorer] for line in lines if line["task"] == task and line["score"].get(scorer) is not None}

    def answers(self, name: str, task: str) -> dict[int, dict[str, str | None]]:
        """{row: what the model said} of one task when `name` was committed; empty where the run stores no rows."""
        lines = map(json.loads, lines_of(read(self.path / "tasks" / name / "predictions.jsonl")))
        return {line["row"]: line["prediction"] for line in lines if line["task"] == task and "prediction" in line}

    def note_task(self, metrics: dict[str, Any], seconds: dict[str, Any], folder: str = "") -> None:
        """Append a task's steps and numbers to timing.jsonl, which is beside the lineage because clocks differ."""
        place = {"task": metrics["task"], "index": metrics["index"]} | ({"folder": folder} if "~" in folder else {})
        events = [{"event": "step", **place, **step} for step in metrics["steps"]] + [{"event": "task", **place, **seconds, **metrics["protection"]}]
        file = self.path / "timing.jsonl"
        torn = file.is_file() and not file.read_bytes().endswith(b"\n")
        with file.open("a", encoding="utf-8", newline="\n") as f:
            f.write("\n" * torn + "".join(json.dumps(event) + "\n" for event in events))

    def restore_timing(self) -> None:
        """A kill right after a commit loses its lines in timing.jsonl: write them again, without the seconds, which nobody measured."""
        noted = set()
        for line in lines_of(read(self.path / "timing.jsonl")):
            if '"event": "task"' not in line:  # the steps are many, and need not be read
                continue
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a torn line notes nothing
                event = json.loads(line)
                noted.add(event.get("folder") or f"{event['index']:02d}-{event['task']}")
        for name in self.committed():
            if name not in noted:
                self.note_task(self.metrics(name), {}, name)

    def check_model(self, model: nn.Module, name: str) -> None:
        """Raise DataError unless `model` is what the commit `name` recorded."""
        if model_sha256(model) != next(x for x in self.lines() if folder_of(x) == name)["model_sha256"]:
            raise self._damaged(f"tasks/{name}/model is not the model that was committed (its hash differs from lineage.jsonl)")

    def settings(self, name: str, room: str = "tasks") -> dict[str, Any] | None:
        """The entry in the config that a commit's task had; None where it is not there, or not what was written."""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            found = json.loads(read(self.path / room / name / SETTINGS) or "{}")
            if text_sha256(canonical(found["settings"])) == found["sha256"]:
                return found["settings"]
        return None

    def place(self, line: dict[str, Any]) -> Path:
        """Where the files of a commit or a refusal lie."""
        return self.path / ("tasks" if line["kind"] == "task" else "rejected") / folder_of(line)

    def damage(self, line: dict[str, Any]) -> list[str]:
        """What is wrong with the files of one commit or rejection, a sentence each, beginning with the file; empty where all is as it was written."""
        place = f"{'tasks' if line['kind'] == 'task' else 'rejected'}/{folder_of(line)}"
        folder = self.path / place
        if not folder.is_dir():
            return [f"{place}: is missing"]
        if "files_sha256" not in line:  # of a version that had no files.json: what its line knows of
            return [] if folder_sha256(folder / "state") == line["state_sha256"] else [f"{place}/state: is not what was committed"]
        if text_sha256(read(folder / "files.json")) != line["files_sha256"]:
            return [f"{place}/files.json: is not what was committed"]
        gone, found = (folder / GONE).exists(), []
        if read(folder / "line.json") != canonical(line):
            found.append(f"{place}/line.json: is not this commit's line of lineage.jsonl")
        files = read_manifest(folder)
        if json.loads(read(folder / "files.json")).get(SETTINGS) and self.settings(folder_of(line), place.partition("/")[0]) is None:
            found.append(f"{place}/{SETTINGS}: is missing or not what was written")
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            if (path := file.relative_to(folder).as_posix()) not in files and path not in BESIDE:
                found.append(f"{place}/{path}: was not committed; a model's folder is read whole, so take it out")
        for path, entry in files.items():
            file = folder / path
            if gone and path.startswith("model/"):
                continue
            if not file.is_file():
                found.append(f"{place}/{path}: is missing")
            elif file.stat().st_size != entry["bytes"]:
                found.append(f"{place}/{path}: has {file.stat().st_size} bytes, {entry['bytes']} were committed")
            elif file_sha256(file) != entry["sha256"]:
                found.append(f"{place}/{path}: its bytes are not those that were committed")
        return found

    def check_files(self, lines: list[dict[str, Any]]) -> None:
        """Raise DataError, naming the files, where those of the given commits are not what was written."""
        if found := [what for line in lines for what in self.damage(line)]:
            raise self._damaged("; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else ""))


def folder_of(line: dict[str, Any]) -> str:
    """The folder's name of a task or reject line, of a rollback the one that became current."""
    return line.get("to") or line.get("folder") or f"{line['index']:02d}-{line['task']}"


def task_of(folder: str) -> str:
    """The task's name in that of its folder.

    >>> task_of("01-cities"), task_of("01-cities~2")
    ('cities', 'cities')
    """
    return folder.partition("-")[2].partition("~")[0]


def branches(lines: list[dict[str, Any]]) -> tuple[dict[str, list[str]], list[str]]:
    """({folder: the folders from the first task to it} of every commit, the same of where the last line leaves the run)."""
    paths: dict[str, list[str]] = {}
    head: list[str] = []
    for line in lines:
        if line["kind"] == "task":
            head = paths[folder_of(line)] = [*head[: line["index"]], folder_of(line)]
        elif line["kind"] == "rollback":
            head = paths.get(line.get("to", ""), head)  # get: the hashes are checked later
    return paths, head


def chain_damage(lines: list[dict[str, Any]]) -> list[str]:
    """What is wrong with the lines themselves: each one's hash is over its own content, and its parent the hash before it."""
    found, parent = [], ""
    for number, line in enumerate(lines, 1):
        content = {key: value for key, value in line.items() if key != "hash"}
        if text_sha256(canonical(content)) != line["hash"]:
            found.append(f"line {number} of lineage.jsonl ({line['kind']} {line['task']}) is not what was written")
        elif line.get("parent") != parent:
            found.append(f"line {number} of lineage.jsonl ({line['kind']} {line['task']}) does not follow the one before it")
        parent = line["hash"]
    return found


def read_manifest(folder: Path) -> Manifest:
    try:
        return json.loads(read(folder / "files.json") or "{}").get("files", {})
    except ValueError:
        return {}


def _chained(line: dict[str, Any], previous: list[dict[str, Any]]) -> dict[str, Any]:
    """The line with its parent's hash and its own, over its canonical JSON."""
    line = line | {"parent": previous[-1]["hash"] if previous else ""}
    return line | {"hash": text_sha256(canonical(line))}


def _rollback_line(lines: list[dict[str, Any]], to: str) -> dict[str, Any]:
    target = next(x for x in lines if x["kind"] == "task" and folder_of(x) == to)
    return _chained({"kind": "rollback", "index": target["index"], "task": target["task"], "to": to}, lines)


def _remove(path: Path) -> None:
    """A file, a link, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []

"""The durable record of a run: what was learned, in which order, from what, and where the model is that came of it.

A commit is one rename: everything of a task is written beside, synced, renamed into tasks/NN-name, then a line joins lineage.jsonl, then `current` is replaced.
`current` is the truth: whatever lies beyond it was interrupted and is done again. Nothing hashed depends on the clock.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError, DataError
from .methods.base import Memory

FILES = {"run.yaml", "lineage.jsonl", "timing.jsonl", "matrix.json", "report.html", "tasks", "current", "model", "before.json", "watch.json", ".lock"}
TRAINING = ".training"  # tasks/.NN-name.training: checkpoints of the task in progress
# a crash may leave one of these half-written; they are ours too
TEMPORARY = {f".{name}.tmp" for name in FILES} | {".model"}


class RunFolder:
    """One run's folder, locked for as long as this object lives; with lock=False only looked at, by the other processes of the one that holds it."""

    def __init__(self, path: str | Path, lock: bool = True):
        self.path = Path(path)
        self._lock = None
        if not lock:
            return
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"output_dir {self.path}: is a file")
        if self.path.is_dir():
            self._refuse_foreign()
        self._found = self.path.is_dir()
        try:
            (self.path / "tasks").mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a")
        except OSError as error:
            raise ConfigError(f"output_dir {self.path}: cannot be written ({error.strerror})") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self.path / ".lock")):
                raise BlockingIOError  # whoever held it has just closed and removed it
        except OSError:
            self._lock.close()
            raise ConfigError(f"output_dir {self.path}: another process is running there; wait for it, or choose another folder") from None

    def _refuse_foreign(self) -> None:
        """A folder of somebody else is never written to, not even one that has names of ours in it."""
        entries = sorted(p.name for p in self.path.iterdir())
        tasks = self.path / "tasks"
        ours = "current" in entries or (written := self.path / "run.yaml").is_file() and written.read_bytes().startswith(b"# forgetless ")
        # beside a run of ours anything may lie: only tasks/ and model are ever cleaned
        foreign = [] if ours else [name for name in entries if name not in FILES | TEMPORARY]
        foreign += [f"tasks/{p.name}" for p in sorted(tasks.iterdir()) if not re.match(r"\.?\d\d+-", p.name)] if tasks.is_dir() else []
        if (model := self.path / "model").exists() and not model.is_symlink():
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
        self._lock.close()

    # -- the commits -----------------------------------------------------------------------------------------------------------------

    def repair(self) -> None:
        """Drop what an interrupted commit left beyond `current`."""
        done = self.committed()
        kept = "".join(canonical(line) + "\n" for line in self.lineage()[: len(done)])
        if kept != _read(self.path / "lineage.jsonl"):  # a torn last line too: the next commit would go on behind it
            write_atomic(self.path / "lineage.jsonl", kept)
        for folder in (self.path / "tasks").iterdir():
            in_progress = folder.name.startswith(f".{len(done):02d}-") and folder.name.endswith(
                TRAINING
            )  # its checkpoints say themselves if they count
            if folder.name not in done and not in_progress:
                shutil.rmtree(folder)
        self._point_model()
        self.restore_timing()

    def committed(self) -> list[str]:
        """Folder names under tasks/ in order, up to `current`."""
        current = self.path / "current"
        if not current.is_file():
            return []
        last = current.read_text().strip()
        names = [f"{line['index']:02d}-{line['task']}" for line in self.lineage()]
        if last not in names:
            raise self._damaged(f"`current` says {last}, which lineage.jsonl does not know")
        done = names[: names.index(last) + 1]
        for file in ("run.yaml", *(f"tasks/{name}/metrics.json" for name in done)):
            if not (self.path / file).is_file():
                raise self._damaged(f"{file} is missing")
        return done

    def _damaged(self, what: str) -> DataError:
        return DataError(f"{self.path}: damaged: {what}. Bring the folder back from a copy, or start another output_dir")

    def lineage(self) -> list[dict[str, Any]]:
        lines = []
        for text in _read(self.path / "lineage.jsonl").splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                break  # the line being written when the power went
            if not isinstance(line, dict) or not {"index", "task", "hash"} <= line.keys():
                break
            lines.append(line)
        return lines

    def commit(
        self, index: int, task: str, model: nn.Module, tokenizer, memory: Memory, recorded: dict[str, Tensor],
        metrics: dict[str, Any], predictions: list[dict], entry: dict[str, Any], keep: str,
    ) -> dict[str, Any]:  # fmt: skip
        """Make task `index` durable; returns its lineage line."""
        name = f"{index:02d}-{task}"
        work, final = self.path / "tasks" / f".{name}", self.path / "tasks" / name
        shutil.rmtree(work, ignore_errors=True)
        (work / "state").mkdir(parents=True)
        model.save_pretrained(work / "model")
        tokenizer.save_pretrained(work / "model")
        save_memory(work / "state", memory, recorded)
        (work / "metrics.json").write_text(json.dumps(metrics, indent=1))
        (work / "predictions.jsonl").write_text("".join(json.dumps(p, ensure_ascii=False) + "\n" for p in predictions))
        line = {"kind": "task", "index": index, "task": task, **entry}
        line["state_sha256"] = _sha_files(work / "state")
        line["model_sha256"] = model_sha256(model)
        previous = self.lineage()
        line["parent"] = previous[-1]["hash"] if previous else ""
        line["hash"] = hashlib.sha256(canonical(line).encode()).hexdigest()
        sync_tree(work)
        shutil.rmtree(final, ignore_errors=True)
        work.rename(final)
        _sync(final.parent)
        with (self.path / "lineage.jsonl").open("a") as f:
            f.write(canonical(line) + "\n")
            f.flush()
            os.fsync(f.fileno())
        write_atomic(self.path / "current", name + "\n")
        self._point_model()
        self._forget_old(keep)
        return line

    def _point_model(self) -> None:
        done = self.committed()
        link = self.path / "model"
        if not done:
            link.unlink(missing_ok=True)
            return
        temporary = self.path / ".model"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(Path("tasks") / done[-1] / "model")
        temporary.replace(link)

    def _forget_old(self, keep: str) -> None:
        if keep != "all":
            for name in self.committed()[: -int(keep.split()[1])]:
                shutil.rmtree(self.path / "tasks" / name / "model", ignore_errors=True)

    # -- reading back ----------------------------------------------------------------------------------------------------------------

    def training(self, index: int, task: str) -> Path:
        """Where the checkpoints of a task in progress lie."""
        return self.path / "tasks" / f".{index:02d}-{task}{TRAINING}"

    def model_of(self, task: str) -> Path:
        """The model that was committed with a task. Raises DataError where `keep` has let it go."""
        for name in self.committed():
            if name.partition("-")[2] == task and (model := self.path / "tasks" / name / "model").is_dir():
                return model
        raise DataError(f"{self.path}: the model of task '{task}' is not there; `keep: all` keeps every task's")

    def memory(self, name: str) -> Memory:
        return load_memory(self.path / "tasks" / name / "state")

    def recorded(self, name: str) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        file = self.path / "tasks" / name / "state" / "inputs.safetensors"
        return load_file(file) if file.is_file() else {}

    def metrics(self, name: str) -> dict[str, Any]:
        file = self.path / "tasks" / name / "metrics.json"
        try:
            return json.loads(file.read_text())
        except ValueError:
            raise self._damaged(f"{file.relative_to(self.path)} is not valid JSON") from None

    def note_task(self, metrics: dict[str, Any], seconds: dict[str, Any]) -> None:
        """Append a task's steps and numbers to timing.jsonl, which is beside the lineage because clocks differ."""
        place = {"task": metrics["task"], "index": metrics["index"]}
        events = [{"event": "step", **place, **step} for step in metrics["steps"]] + [{"event": "task", **place, **seconds, **metrics["protection"]}]
        file = self.path / "timing.jsonl"
        torn = file.is_file() and not file.read_bytes().endswith(b"\n")
        with file.open("a") as f:
            f.write("\n" * torn + "".join(json.dumps(event) + "\n" for event in events))

    def restore_timing(self) -> None:
        """A kill right after a commit loses its lines in timing.jsonl: write them again, without the seconds, which nobody measured."""
        noted = _read(self.path / "timing.jsonl")
        for name in self.committed():
            metrics = self.metrics(name)
            if f'"event": "task", "task": {json.dumps(metrics["task"])}, "index": {metrics["index"]},' not in noted:
                self.note_task(metrics, {})

    def check_model(self, model: nn.Module, name: str) -> None:
        """Raise DataError unless `model` is what the commit `name` recorded."""
        line = next(x for x in self.lineage() if f"{x['index']:02d}-{x['task']}" == name)
        if model_sha256(model) != line["model_sha256"]:
            raise self._damaged(f"tasks/{name}/model is not the model that was committed (its hash differs from lineage.jsonl)")


def save_memory(folder: Path, memory: Memory, recorded: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in memory.tensors.items()}, folder / "method.safetensors")
    (folder / "method.json").write_text(json.dumps(memory.info, sort_keys=True))
    if "adapter_config" in memory.info:  # the same tensors under the name PEFT looks for
        (folder / "adapter_config.json").write_text(json.dumps(memory.info["adapter_config"], sort_keys=True))
        adapter = {k: v.contiguous() for k, v in memory.tensors.items() if k.startswith("base_model.model.")}
        if len(adapter) == len(memory.tensors):
            os.link(folder / "method.safetensors", folder / "adapter_model.safetensors")
        else:  # what else a method keeps is not PEFT's to read
            save_file(adapter, folder / "adapter_model.safetensors")
    if recorded:
        save_file(recorded, folder / "inputs.safetensors")


def load_memory(folder: str | Path) -> Memory:
    """A method's memory from a committed task's state/ folder."""
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / "method.safetensors").is_file():
        raise DataError(f"{folder}: no method.safetensors; give the state folder of a committed task, such as runs/first/tasks/00-cities/state")
    # clone: safetensors leaves a tensor at any address of its file, and by a matrix's address modulo 64 a product may round otherwise than in the process that made it
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / "method.safetensors").items()}
    return Memory(tensors, json.loads((folder / "method.json").read_text()))


def model_sha256(model: nn.Module) -> str:
    """sha256 over (name, dtype, shape, raw bytes) of the sorted state dict, a tied tensor once."""
    digest, seen = hashlib.sha256(), set()
    for name, tensor in sorted(model.state_dict().items()):
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape))
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def write_atomic(path: Path, text: str) -> None:
    """Replace a file so that a reader, or a crash, sees the old text or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)
    _sync(path.parent)


def _read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def _sha_files(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    for directory, _, files in os.walk(folder):
        for file in files:
            _sync(Path(directory) / file)
        _sync(Path(directory))

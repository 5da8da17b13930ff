"""Checkpoints of the task in progress: the Trainer's own (weights, optimizer, scheduler, random states, data position), beside them what the method collects.

A checkpoint counts only once its last file, forgetless.json, is there: written and synced after all others, so that a kill leaves the one before. It goes on only in
the run, after the commit, with the settings and as many processes as it was made in. All loads are weights_only; the folder goes at the commit.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import distributed
from .errors import ConfigError
from .files import sync_tree, write_atomic


class Checkpoints:
    """Of one task, in `folder`, every `every` steps (None: none are made; one that is there is gone on from). key: what must be the same for that.

    shared: the model is sharded, and its checkpoints hold whole tensors, from which any number of processes goes on.
    """

    def __init__(self, folder: Path, every: int | None, key: dict[str, Any], shared: bool = False):
        self.folder, self.every = folder, every
        self.key = key | ({"shared": True} if shared else {"world_size": distributed.world_size()})
        self.path = distributed.on_main(self._latest)
        self.found: dict[str, Any] = json.loads((self.path / "forgetless.json").read_text(encoding="utf-8")) if self.path else {}

    def _latest(self) -> Path | None:
        for path in _newest_first(self.folder):
            stamp = path / "forgetless.json"
            if stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8"))["key"] == self.key:
                return path
        for path in _newest_first(self.folder):  # of another attempt, with other settings; what a method has put beside them goes by its own names
            shutil.rmtree(path)
        return None

    @property
    def step(self) -> int:
        """The optimizer step to go on from; 0 where there is no checkpoint."""
        return self.found.get("step", 0)

    @property
    def trained(self) -> bool:
        """Was the checkpoint the last step's? Then only what comes after training is left."""
        return self.found.get("trained", False)

    def batch(self, train: dict[str, Any]) -> dict[str, Any]:
        """The config's section `train` for as many processes as there are now: a step's rows are those that it had when the checkpoint was made."""
        before, now, key = self.found.get("processes"), distributed.world_size(), "per_device_train_batch_size"
        if before in (None, now):
            return train
        rows = train.get(key, 8) * before
        if rows % now:
            raise ConfigError(
                f"{self.path}: {before} processes took {rows} rows a step, which {now} cannot share evenly; go on with a number of processes that divides {rows}"
            )
        return train | {key: rows // now}

    @property
    def log(self) -> list[dict[str, Any]]:
        """The steps up to the checkpoint, as the trainer logged them."""
        return list(self.found.get("log", ()))

    @property
    def seconds(self) -> float:
        """Seconds spent on the task before this process."""
        return self.found.get("seconds", 0.0)

    def method_state(self) -> dict[str, Tensor]:
        return torch.load(self.path / "method.pt", weights_only=True, map_location="cpu")

    def finish(self, step: int, trained: bool, method_state: dict[str, Tensor], log: list[dict[str, Any]], seconds: float) -> None:
        """Called when the Trainer has written checkpoint-<step>: complete it, then forget the older ones."""
        distributed.barrier()  # every process' random state is in it
        if distributed.is_main():
            path = self.folder / f"checkpoint-{step}"
            torch.save(method_state, path / "method.pt")
            sync_tree(path)
            stamp = {"key": self.key, "processes": distributed.world_size(), "step": step, "trained": trained, "log": log, "seconds": seconds}
            write_atomic(path / "forgetless.json", json.dumps(stamp))
            for old in _newest_first(self.folder):
                if old != path:
                    shutil.rmtree(old)

    def drop(self) -> None:
        """The task is committed, or begins anew."""
        if distributed.is_main():
            shutil.rmtree(self.folder, ignore_errors=True)


def _newest_first(folder: Path) -> list[Path]:
    found = [p for p in folder.iterdir() if re.fullmatch(r"checkpoint-\d+", p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: -int(p.name.split("-")[1]))

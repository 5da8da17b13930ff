"""A model a task: an upper bound on learning, without forgetting and without transfer.

theta_t is the untouched model theta_0 trained on D_t alone, by the method `on`. A row of task t is answered by theta_t, whatever was learned since, so somebody has to say
which task a row belongs to. Tasks that are not learned yet, and watch sets, are answered by the model trained last.

The models are the run's commits themselves: a run whose `keep` lets go of them is refused at the first task that finds one gone.

When not to use it: where nobody says which task a row is of, or where one model has to do; it grows by a whole model a task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..errors import ConfigError, DataError
from ._afresh import Afresh, take
from .base import Memory


class PerTask(Afresh):
    name = "per_task"
    summary = "upper bound on learning: a model a task, chosen by the task's name at test time"
    kind = "routed"
    several = ("routed", "gainlora", "prompt")
    needs_task_id = needs_models = True
    bytes_a_task = "a whole model, the task's commit"

    def __init__(self, /, **options: Any):
        super().__init__(**options)
        self.at: int | None = None  # place of the task that `model` was trained on last

    def begin_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        self.look(task)
        return super().begin_task(model, task, memory)

    def resume_task(self, model: nn.Module, task: Any, memory: Memory, state: dict[str, Tensor]) -> nn.Module:
        self.look(task)
        return super().resume_task(model, task, memory, state)

    def look(self, task: Any) -> None:
        """Note the task's place, and that the models of those before it are there."""
        self.at = self.place(task)
        for earlier in self.stream.tasks[: self.at or 0] if self.stream else ():
            self.model_of(earlier.name)

    def model_of(self, name: str) -> Path:
        try:
            return self.committed(name)
        except DataError as error:
            raise ConfigError(
                f"method per_task: answers with every task's own model, and that of '{name}' is gone; it needs keep: all ({error})"
            ) from None

    def answering(self, model: nn.Module, task: Any, rows: list, memory: Memory) -> list:
        place = self.place(task)
        if place is None or self.committed is None or self.at is None or place >= self.at:
            return super().answering(model, task, rows, memory)
        return [(list(range(len(rows))), speaking(model, self.model_of(task.name), self.load or models.load))]


@contextmanager
def speaking(model: nn.Module, folder: Path, load: Callable[[str], tuple[nn.Module, Any]]) -> Iterator[nn.Module]:
    """`model` with the weights that are in `folder`, then with its own again."""
    own = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    try:
        take(model, load(str(folder))[0])
        yield model
    finally:
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(own[name])

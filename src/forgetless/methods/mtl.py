"""Multi-task learning: all tasks at once, an upper bound. No continual learning: every row of every task so far is read again.

For the t-th task the untouched model theta_0 is trained on the union of D_1, ..., D_t, each row with its own task's prompt, shuffled, by the method `on`; so row t of the
matrix is what joint training of the first t tasks would have given. It gets t times the steps of one task (`max_steps` times t; epochs are longer by themselves).

When not to use it: to learn a stream. It costs t times the training of its last task at every task, and needs all data for ever.
"""

from __future__ import annotations

from typing import Any

from ..errors import DataError
from ._afresh import Afresh
from .base import Memory


class MTL(Afresh):
    name = "mtl"
    summary = "upper bound: the untouched model trained on the rows of all tasks so far at once"
    needs_old_data = True
    several = ("prompt",)

    def train_data(self, task: Any, memory: Memory) -> list:
        """The task's own rows, and those of the tasks before it as token ids: only the task at hand would encode a row of another with its own prompt."""
        earlier = self.stream.tasks[: self.place(task) or 0] if self.stream else []
        rows: list = []
        if earlier:
            self.progress.stage(f"{task.name}: reading the rows of earlier tasks", sum(len(other.train) for other in earlier))
        for other in earlier:
            if not other.train:
                raise DataError(
                    f"method mtl: trains on the rows of all tasks, and those of '{other.name}' are not there ({other.missing or 'no training rows'})"
                )
            for example in other.train:
                rows.append(other.encode(self.tokenizer, example))
                self.progress.advance(len(rows))
        return [*rows, *super().train_data(task, memory)]  # what replay adds stands last, where its order looks for it

    def settings(self, train: dict[str, Any], index: int) -> dict[str, Any]:
        train = super().settings(train, index)
        steps = train.get("max_steps", -1)
        return train | {"max_steps": steps * (index + 1)} if steps > 0 else train

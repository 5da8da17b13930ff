"""What the two upper bounds share: every task begins at the untouched model, and the method they go beside knows of no other task."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Memory, Method
from .beside import Beside


class Afresh(Beside):
    def check(self, model: nn.Module) -> None:
        self.refuse(self.several, "what it leaves of each task is not in one model's weights")
        for part in self.inner():
            if needs_a_past(part):
                self.refuse((part.name,), "it acts by what earlier tasks have left, and here every task begins anew")
        super().check(model)

    several: tuple[str, ...] = ()  # methods it cannot go beside
    protect = Method.protect  # a space would be gone with the first task's end: refused, in Method's words

    def begin_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        return super().begin_task(self.afresh(model, task), task, Memory())

    def resume_task(self, model: nn.Module, task: Any, memory: Memory, state: dict[str, Tensor]) -> nn.Module:
        return super().resume_task(self.afresh(model, task), task, Memory(), state)

    def end_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        model = super().end_task(model, task, own := Memory())
        memory.tensors |= own.tensors
        memory.info |= own.info
        return model

    def place(self, task: Any) -> int | None:
        """Of a task in the stream, from 0; None where there is no stream, or it is of a watch set."""
        return next((i for i, other in enumerate(self.stream or ()) if task is not None and other.name == task.name), None)

    def afresh(self, model: nn.Module, task: Any) -> nn.Module:
        if self.untouched is not None and self.place(task):  # the first task finds it as it is
            take(model, self.untouched())
        return model


def needs_a_past(method: Method) -> bool:
    """Does it do nothing, or harm, in a task that knows of no earlier one?"""
    o: Any = method.options
    return (
        method.name in ("ewc", "merge") or (method.name == "lwf" and not o.first_task) or (method.name == "replay" and o.mode != "self_synthesised")
    )


@torch.no_grad()
def take(model: nn.Module, other: nn.Module) -> None:
    """Put the weights of `other`, of the same kind, into `model`, where they are."""
    weights = other.state_dict()
    for name, tensor in model.state_dict().items():
        tensor.copy_(weights[name])

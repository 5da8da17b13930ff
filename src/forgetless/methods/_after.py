"""What `lines` and `merge` share: a method that goes beside another and, when a task ends, writes the weights that learned once more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Diverged
from ._statistics import readers, trained_names
from .base import Memory
from .beside import Beside


class After(Beside):
    # an adapter that goes on from task to task (lora) is no longer what is in the weights afterwards
    kind = property(lambda self: "plain" if self.on.kind == "adapter" else self.on.kind)

    def __init__(self, /, **options: Any):
        super().__init__(**options)
        self.start: dict[str, Tensor] = {}  # what learns, as the task began: by name in the plain model, on the CPU

    def settle(self, model: nn.Module, learned: dict[str, nn.Parameter], memory: Memory) -> None:
        """Write `learned`, the weights of the plain model that have learned, anew."""
        raise NotImplementedError

    def check(self, model: nn.Module) -> None:
        self.refuse((), "it leaves several models, and one is needed", "routed")
        self.refuse(("slao",), "its next task takes the adapter it has left out of the weights again, and would find others")
        self.refuse(("esacl",), "what it has pruned would not stay 0")
        self.refuse(("ewc",), f"the weights it holds on to would not be those that are committed; the other way round they are: ewc on: {self.name}")
        super().check(model)

    def begin_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        return self.remember(super().begin_task(model, task, memory))

    def resume_task(self, model: nn.Module, task: Any, memory: Memory, state: dict[str, Tensor]) -> nn.Module:
        return self.remember(super().resume_task(model, task, memory, state))

    @torch.no_grad()
    def remember(self, model: nn.Module) -> nn.Module:
        named = readers(model, trained_names(self.on.param_groups(model)))
        self.start = {name: read().to("cpu", copy=True) for name, read in named.items()}
        return model

    @torch.no_grad()
    def end_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        with torch.enable_grad():  # a method beside this one may have gradients to measure
            model = super().end_task(model, task, memory)
        parameters = dict(model.named_parameters())
        self.settle(model, {name: parameters[name] for name in self.start}, memory)
        if not all(bool(torch.isfinite(parameters[name]).all()) for name in self.start):
            raise Diverged(f"method {self.name}: the weights are no longer finite; nothing of this task is committed. Lower its options")
        memory.info.pop("adapter_config", None)
        self.start = {}
        return model

    def held_bytes(self) -> int:
        return super().held_bytes() + sum(t.nbytes for t in self.start.values())

"""A new low-rank adapter for each task, merged into the weights at its end (IncLoRA). Nothing is protected: a baseline, and gorp's LoRA branch without its space.

y += s B A x, s = lora_alpha / lora_rank. A is drawn and B zeroed at each task's start, so the rank never grows and what is left is a plain model.

When not to use it: where earlier tasks matter (use gorp).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..adapters import detach
from .base import Memory
from .lora import LoRA


class IncLoRA(LoRA):
    name = "inclora"
    summary = "a new LoRA adapter a task, merged at its end"
    kind = "plain"
    bytes_a_task = "none"

    def begin_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        self.attach(model)
        return model

    def end_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        return detach(model)

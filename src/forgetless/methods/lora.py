"""One low-rank adapter through all tasks (SeqLoRA; LoRA: Hu et al. 2021, arXiv 2106.09685). Nothing is protected: a baseline.

y += s B A x, s = lora_alpha / lora_rank; A (rank x in) and B (out x rank) go on from task to task. Each commit's model/ has the adapter merged in, its state/ holds
the adapter itself, as PEFT reads it: PeftModel.from_pretrained(pretrained, "runs/first/tasks/00-cities/state").

When not to use it: where earlier tasks matter (use gorp), or where later tasks need more room than one adapter has (inclora).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import LoraOptions, adapter_config, adapter_tensors, adapters, add_delta, attach, detach, factors, lora_layers
from .base import Memory, Method

PREFIX = "base_model.model."  # of PEFT's names: what else is in the memory belongs to a method that goes beside this one


class LoRA(Method):
    name = "lora"
    summary = "sequential LoRA: one adapter through all tasks"
    paper = "arXiv 2106.09685"
    kind = "adapter"
    bytes_a_task = "none; A and B of every adapted layer"
    Options = LoraOptions

    def check(self, model: nn.Module) -> None:
        lora_layers(model, self.options.lora_modules)

    def begin_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        return self.go_on(model, memory)

    def resume_task(self, model: nn.Module, task: Any, memory: Memory, state: dict[str, Tensor]) -> nn.Module:
        self.go_on(model, memory)  # weights that are quantised while a task trains are not in its checkpoint
        self.load_state_dict(state)
        return model

    @torch.no_grad()
    def go_on(self, model: nn.Module, memory: Memory) -> nn.Module:
        """The adapter of the last commit, or a new one; what of it the weights have merged in is taken out."""
        self.attach(model)
        went = any(key.startswith(PREFIX) for key in memory.tensors)
        for name, layer in adapters(model).items() if went else ():
            for factor, letter in zip(factors(layer), "AB", strict=True):
                factor.copy_(memory.tensors[f"{PREFIX}{name}.lora_{letter}.weight"])
            add_delta(layer, -1.0)
        return model

    def attach(self, model: nn.Module) -> dict[str, nn.Module]:
        o = self.options
        return attach(model, list(lora_layers(model, o.lora_modules)), o.lora_rank, o.lora_alpha, o.lora_dropout)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        found = adapters(model)
        params = [p for layer in found.values() for p in factors(layer)]
        return [{"params": params, "names": [f"{name}.lora_{letter}" for name in found for letter in "AB"]}]

    def end_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        memory.tensors = {key: t for key, t in memory.tensors.items() if not key.startswith(PREFIX)} | adapter_tensors(model)
        memory.info["adapter_config"] = adapter_config(model, self.options)
        return detach(model)

"""One low-rank adapter through all tasks (SeqLoRA; LoRA: Hu et al. 2021, arXiv 2106.09685). Nothing is protected: a baseline.

y += s B A x, s = lora_alpha / lora_rank; A (rank x in) and B (out x rank) go on from task to task. Each commit's model/ has the adapter merged in, its state/ holds
the adapter itself, as PEFT reads it: PeftModel.from_pretrained(pretrained, "runs/first/tasks/00-cities/state").

When not to use it: where earlier tasks matter (use gorp), or where later tasks need more room than one adapter has (inclora).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import LoraOptions, adapter_tensors, adapters, add_delta, attach, detach, factors, lora_layers
from .base import Memory, Method


class LoRA(Method):
    name = "lora"
    summary = "sequential LoRA: one adapter through all tasks"
    paper = "arXiv 2106.09685"
    kind = "adapter"
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
        for name, layer in adapters(model).items() if memory.tensors else ():
            for factor, letter in zip(factors(layer), "AB", strict=True):
                factor.copy_(memory.tensors[f"base_model.model.{name}.lora_{letter}.weight"])
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
        o = self.options
        memory.tensors = adapter_tensors(model)
        memory.info["adapter_config"] = {
            "peft_type": "LORA", "r": o.lora_rank, "lora_alpha": o.lora_alpha, "lora_dropout": o.lora_dropout, "bias": "none", "inference_mode": True,
            "target_modules": sorted(adapters(model)), "fan_in_fan_out": any(layer.fan_in_fan_out for layer in adapters(model).values()),
        }  # fmt: skip
        return detach(model)

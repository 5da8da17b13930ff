"""GORP's released arithmetic (gorp_released.py) as a method that forgetless can run on a language model, for the same table as ours.

    method: {name: "benchmarks.peers.gorp_released_method:Released", mode: as_released}

A new adapter a task on query and value, merged at its end; full-rank weights as the paper names them (gate_proj in a Llama). A commit holds what the mode keeps: as
released, the full-rank updates of a task are gone before it is scored here (the release scores once with them; at its rates they are too small to be seen).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

import forgetless as fl
from forgetless.adapters import LoraOptions, adapters, attach, detach, factors, family_modules, lora_layers
from forgetless.methods.base import Memory
from forgetless.models import match_modules

from .gorp_released import ReleasedGORP


class ReleasedOptions(LoraOptions):
    mode: Literal["as_released", "persist_only", "as_intended"] = "as_released"
    full_lr_ratio: float = Field(0.01, gt=0)
    """The release: 1e-5 against 1e-3 (T5), 1e-6 against 2e-4 (LLaMA)."""
    rank: int = Field(8, ge=1)
    gap: int = Field(10, ge=1)
    scale: float = Field(1.0, gt=0)


class Released(fl.Method):
    name = "gorp-released"
    summary = "the released arithmetic of GORP"
    paper = "arXiv 2507.02503"
    Options = ReleasedOptions

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.spaces: dict[str, Tensor] = {}
        self.running: ReleasedGORP | None = None

    def full_layers(self, model: nn.Module) -> dict[str, nn.Module]:
        return match_modules(model, family_modules(model, "full", "method.full_modules"), "method.full_modules")

    def check(self, model: nn.Module) -> None:
        self.full_layers(model)
        lora_layers(model, self.options.lora_modules)

    def begin_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        o = self.options
        self.spaces = dict(memory.tensors)
        attach(model, list(lora_layers(model, o.lora_modules)), o.lora_rank, o.lora_alpha, o.lora_dropout)
        return model

    def resume_task(self, model: nn.Module, task: Any, memory: Memory, state: dict[str, Tensor]) -> nn.Module:
        return self.begin_task(model, task, memory)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        o, found, full = self.options, adapters(model), self.full_layers(model)
        groups = [
            {
                "params": [factors(layer)[k] for layer in found.values()],
                "names": [f"{name}.lora_{'AB'[k]}" for name in found],
                "kind": f"lora_{'AB'[k]}",
            }
            for k in (0, 1)
        ]
        weights = {"params": [layer.weight for layer in full.values()], "names": [f"{name}.weight" for name in full], "kind": "full"}
        return [*groups, weights | {"rank": o.rank, "gap": o.gap, "scale": o.scale}]

    def optimizer(self, groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
        for group in groups:
            group["lr"] = settings["lr"] * (self.options.full_lr_ratio if group["kind"] == "full" else 1.0)
        kept = {key: settings[key] for key in ("betas", "weight_decay")}
        self.running = ReleasedGORP([{k: v for k, v in g.items() if k != "names"} for g in groups], lr=settings["lr"], mode=self.options.mode, **kept)
        self.names = {p: name for g in groups for p, name in zip(g["params"], g["names"], strict=True)}
        for p, name in self.names.items():
            if name in self.spaces:
                self.running.state[p]["space"] = self.spaces[name].to(p)
        return self.running

    def end_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        self.running.end_task()
        spaces = {name: self.running.state[p]["space"] for p, name in self.names.items() if "space" in self.running.state[p]}
        memory.tensors = {name: S.detach().cpu().contiguous() for name, S in spaces.items()}
        self.running = None
        return detach(model)

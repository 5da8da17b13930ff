"""PEFT's OSF as a method that forgetless can run on a language model, for the same table as ours.

    method: {name: "benchmarks.peers.peft_osf_method:PeftOSF", effective_rank: 0.5}

Used as it has to be for one task after another: attached anew before each task, which decomposes the weights as they are then, and merged (merge_and_unload) after it.
Its factors are trained by torch's AdamW; its hooks project their gradients, and nothing projects their update.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import nn

import forgetless as fl
from forgetless.methods.base import Memory, Options
from forgetless.models import linear_modules


class PeftOSFOptions(Options):
    effective_rank: float = Field(0.5, gt=0, lt=1)
    """The share of each matrix' singular directions that is kept as it is."""


class PeftOSF(fl.Method):
    name = "peft-osf"
    summary = "PEFT's OSF, attached and merged around each task"
    paper = "arXiv 2504.07097"
    Options = PeftOSFOptions
    tuner: Any = None

    def check(self, model: nn.Module) -> None:
        linear_modules(model)

    def begin_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        from peft import OSFConfig
        from peft.tuners.osf import OSFModel

        config = OSFConfig(target_modules=list(linear_modules(model)), effective_rank=self.options.effective_rank)
        self.tuner = OSFModel(model, {"default": config}, "default")
        return model

    def resume_task(self, model: nn.Module, task: Any, memory: Memory, state: dict) -> nn.Module:
        return self.begin_task(model, task, memory)  # decomposes the weights of the last commit again; the checkpoint's factors are loaded over them

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        found = {name: p for name, p in model.named_parameters() if "osf_svd_params" in name}
        return [{"params": list(found.values()), "names": list(found)}]

    def optimizer(self, groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
        kept = {key: settings[key] for key in ("lr", "betas", "eps", "weight_decay")}
        return torch.optim.AdamW([{"params": g["params"]} for g in groups], **kept)

    def end_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        model = self.tuner.merge_and_unload()
        self.tuner = None
        if hasattr(model, "peft_config"):
            del model.peft_config
        return model

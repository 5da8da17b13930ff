"""SLAO: a single adapter that is merged with itself after each task ("Merge before Forget", Qiao and Mahdavi, ICLR 2026, arXiv 2512.23017).

    y = W_0 x + s B A x                     A (rank x in), B (out x rank); W_0 is the model before the first task, whose weights never change
    task t begins at                        A = Q^T of A_(t-1)^T = Q R with diag(R) > 0 (orthonormal rows, the span of the last A),   B = B_(t-1)
    after it                                A_merge = A_t,   B_merge = B_merge + (B_t - B_merge) / sqrt(t)

A_t and B_t are what task t left before merging, and the next task goes on from them. What is served, scored and committed is W_0 + s B_merge A_merge. The two factors
are treated apart because they do different work in LoRA: A reads, B writes. 1 / sqrt(t) is the paper's, for updates of different tasks that are nearly orthogonal.
Kept: A_t, B_t, B_merge, whatever the number of tasks. state/ holds the merged adapter as PEFT reads it, on the model before the first task.

The first task's A is drawn as in LoRA (Kaiming; ours), its B is 0. The model that is trained in task t is not the one that was served after task t - 1.
Read of the paper: implementations of it, not its text.

When not to use it: over few tasks that need their full update (the second is already scaled by 0.71); where later tasks need more room than one adapter has;
with bf16 weights, where taking the old adapter out and putting the new one in rounds W_0 twice a task.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import adapters, factors, lora_layers
from ..errors import ConfigError
from ..models import logical
from .base import Memory
from .lora import LoRA


class SLAO(LoRA):
    name = "slao"
    summary = "one LoRA adapter: each task begins at the last one's A, made orthonormal, and its B is averaged into the merged B"
    paper = "arXiv 2512.23017"
    bytes_a_task = "none; A and two B of every adapted layer"

    def __init__(self, /, **options: Any):
        super().__init__(**options)
        self.merged: dict[str, Tensor] = {}  # B_merge of each layer as the task began

    def check(self, model: nn.Module) -> None:
        rank = self.options.lora_rank
        for name, layer in lora_layers(model, self.options.lora_modules).items():
            n = logical(layer.weight, layer).shape[1]
            if rank > n:
                raise ConfigError(f"method slao: lora_rank {rank}: {name} has {n} inputs, in which no {rank} rows of A are orthonormal; at most {n}")

    @torch.no_grad()
    def go_on(self, model: nn.Module, memory: Memory) -> nn.Module:
        """What was served is taken out of the weights; the adapter begins at what the last task left before merging."""
        super().go_on(model, memory)
        self.merged, last = {}, memory.of(self.name)
        for name, layer in adapters(model).items() if last else ():
            A, B = factors(layer)
            self.merged[name] = B.clone()
            A.copy_(orthonormal_rows(A))
            B.copy_(last[f"{name}.B"])
        return model

    @torch.no_grad()
    def end_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        t, last = memory.info.get("tasks", 0) + 1, {}
        for name, layer in adapters(model).items():
            _, B = factors(layer)
            last[f"{name}.B"] = B.clone()
            if name in self.merged:
                B.copy_(self.merged[name] + (B - self.merged[name]) / t**0.5)
        model = super().end_task(model, task, memory)
        memory.info["tasks"] = t
        memory.put(self.name, last)
        return model

    def held_bytes(self) -> int:
        return sum(B.nbytes for B in self.merged.values())


def orthonormal_rows(A: Tensor) -> Tensor:
    """Q^T (rank, in) of A^T = Q R, A (rank, in), with the signs that make diag(R) positive: without them a row of A may come back turned round, against its B."""
    Q, R = torch.linalg.qr(A.mT)
    return (Q * torch.where(R.diagonal() < 0, -1.0, 1.0).to(Q)).mT

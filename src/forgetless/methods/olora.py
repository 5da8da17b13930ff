"""O-LoRA: orthogonal low-rank adapters (Wang et al., Findings of EMNLP 2023, arXiv 2310.14152).

    y = W x + s B A x                       A (rank x in), B (out x rank) of the task at hand; W holds all earlier tasks, merged
    loss += l1 * sum over layers, i < t     sum_jk |A_i A_t^T|_jk      (the paper's L_orth; here A_old, all A_i on top of each other, (rank (t - 1) x in))
          + l2 * sum over layers            ||A_t||_2 + ||B_t||_2      (Frobenius norms, not squared, as the authors compute them)

What an adapter does to x depends on A x: where the rows of A_t are orthogonal to those of A_old, inputs that an old adapter answered to are not answered to by the
new one. Kept: every A, so memory grows by one adapter's half a task. The paper keeps old adapters beside the weights, frozen; merged they give the same outputs, and
what is left is a plain model. The penalty is computed in the adapter's own precision, also under autocast.

When not to use it: over many tasks (memory and the penalty grow with each, and there is room for in / rank of them at most); where a bound is wanted: a penalty
promises nothing, a shorter A lowers it as well as an orthogonal one, and what l1 means depends on rank and number of layers. gorp and inflora bound the update itself.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..adapters import LoraOptions, adapters, detach, factors
from ..batches import unwrapped
from ..sharding import whole
from .base import Memory
from .inclora import IncLoRA


class OLoRAOptions(LoraOptions):
    l1: float = Field(0.5, ge=0, allow_inf_nan=False)
    """Weight of the overlap with earlier tasks' A, summed over layers and entries. The paper: 0.5, and 5 for the last of 15 tasks."""
    l2: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Weight of the norms of the new A and B. The paper: 0, 0.1 or 0.3, by the order of the tasks."""


class OLoRA(IncLoRA):
    name = "olora"
    summary = "a new LoRA adapter a task, penalised where its A is not orthogonal to those of earlier tasks"
    paper = "arXiv 2310.14152"
    bytes_a_task = "A of every adapted layer: rank x in numbers"
    Options = OLoRAOptions

    def __init__(self, /, **options: Any):
        super().__init__(**options)
        self.old: dict[str, Tensor] = {}  # A_old of each layer

    def begin_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        return self.go_on(model, memory)

    def go_on(self, model: nn.Module, memory: Memory) -> nn.Module:
        layers, old = self.attach(model), memory.of(self.name)
        self.old = {name: old[name].to(factors(layer)[0]) for name, layer in layers.items() if name in old}
        return model

    def extra_loss(self, model: nn.Module, inputs: dict[str, Tensor], outputs: Any) -> Tensor | None:
        o, terms = self.options, []
        for name, layer in adapters(unwrapped(model)).items():
            A, B = map(whole, factors(layer))
            if o.l1 and name in self.old:
                with torch.autocast(A.device.type, enabled=False):
                    terms.append(o.l1 * (self.old[name] @ A.mT).abs().sum())
            if o.l2:
                terms.append(o.l2 * (torch.linalg.vector_norm(A) + torch.linalg.vector_norm(B)))
        return torch.stack(terms).sum() if terms else None

    def end_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        old, new = memory.of(self.name), {name: factors(layer)[0].detach().cpu() for name, layer in adapters(model).items()}
        memory.put(self.name, old | {name: torch.cat([old[name], A]) if name in old else A.clone() for name, A in new.items()})
        return detach(model)

    def sent_each_step(self, model: nn.Module) -> int:
        return sum(p.numel() for layer in adapters(model).values() for p in factors(layer))  # gathered for the penalty

    def held_bytes(self) -> int:
        return sum(A.nbytes for A in self.old.values())

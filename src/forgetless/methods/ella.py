"""ELLA: efficient lifelong learning for adapters (Das Biswas et al., EACL 2026, arXiv 2601.02232).

    dW_t = s B A                            A (rank x in), B (out x rank) of the task at hand; W holds all earlier tasks, merged
    loss += strength * sum over layers      ||dW_t o W_past||_F^2 = sum_ij (dW_t)_ij^2 (W_past)_ij^2,      W_past = sum of dW_i, i < t

o is the product entry by entry. An entry is shrunk the more, the farther earlier tasks have moved it, and is free where they have not: the paper's anisotropic
shrinkage. Kept: W_past (out x in) of each adapted layer, whatever the number of tasks. dW_t is formed for one layer at a time, its gradients for A and B with it,
and let go. The first task has no penalty.

Read of the paper: its penalty, not the value of its weight; the default is ours. Entries of W_past of about 1e-3, as adapters leave them in a language model, are 1e-6 when
squared, so it has to be large: on SmolLM2-135M after 20 steps at a rate of 1e-3, the penalty of a dW_t = W_past pulls as hard as the loss does at 7e3.

When not to use it: where W_past, as large as the adapted weights, is too much to keep (olora keeps r rows a task, inclora nothing); where a bound is wanted
(gorp, inflora); where updates of earlier tasks cancel in an entry, which then counts as free.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..adapters import ADAPTER, LoraOptions, adapters, detach, factors, lora_layers
from ..batches import unwrapped
from ._statistics import of_product
from .base import Memory
from .inclora import IncLoRA


class ELLAOptions(LoraOptions):
    strength: float = Field(1e4, ge=0, allow_inf_nan=False)
    """Weight of the penalty, the paper's lambda. Ours and tuned on nothing: the paper's value was not at hand. It goes with the fourth power of the updates' size: where
    rates are ten times as high, far less of it is needed."""


class ELLA(IncLoRA):
    name = "ella"
    summary = "a new LoRA adapter a task, penalised entry by entry where earlier tasks have moved the weights"
    paper = "arXiv 2601.02232"
    bytes_a_task = "none; one number a weight of the adapted layers"
    Options = ELLAOptions

    def __init__(self, /, **options: Any):
        super().__init__(**options)
        self.past: dict[str, Tensor] = {}  # W_past of each layer, (out, in)

    def begin_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        return self.go_on(model, memory)

    def go_on(self, model: nn.Module, memory: Memory) -> nn.Module:
        layers, past = self.attach(model), memory.of(self.name)
        self.past = {name: past[name].to(factors(layer)[0]) for name, layer in layers.items() if name in past}
        return model

    def extra_loss(self, model: nn.Module, inputs: dict[str, Tensor], outputs: Any) -> Tensor | None:
        terms = []
        for name, layer in adapters(unwrapped(model)).items() if self.options.strength else ():
            if name in self.past:
                A, B = factors(layer)
                terms.append(layer.scaling[ADAPTER] ** 2 * of_product(B, A, partial(_overlap, self.past[name])))
        return self.options.strength * torch.stack(terms).sum() if terms else None

    @torch.no_grad()
    def end_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        past = memory.of(self.name)
        for name, layer in adapters(model).items():
            A, B = factors(layer)
            dW = (layer.scaling[ADAPTER] * (B @ A)).cpu()
            past[name] = past[name] + dW if name in past else dW
        memory.put(self.name, past)
        return detach(model)

    def statistics_bytes(self, model: nn.Module) -> int:
        """W_past, from the second task on."""
        return sum(4 * layer.weight.numel() for layer in lora_layers(model, self.options.lora_modules).values())

    def held_bytes(self) -> int:
        return sum(W.nbytes for W in self.past.values())


def _overlap(W_past: Tensor, P: Tensor) -> tuple[Tensor, Tensor]:
    E = P * W_past
    return E.square().sum(), E.mul_(W_past).mul_(2)

"""N-LoRA: adapters that change few entries, so that those of different tasks seldom meet (Yang et al., COLING 2025, arXiv 2410.10179).

    y = W x + s B A x                       A (rank x in), B (out x rank) of the task at hand; W holds all earlier tasks, merged
    loss += l1 * sum over layers            ||B A||_1 = sum_ij |B A|_ij

Two tasks collide where both change an entry of W. If each changes a share p of the entries, p^2 of them are changed by both: sparse updates collide seldom, and
are then nearly orthogonal too. Nothing is kept, and nothing is asked of earlier tasks. B A (out x in) is formed for one layer at a time, its gradients for A and B
with it, and let go.

The released code takes the norm of A B (rank x rank), which is not the update and exists for square weights only; the paper's 0.4 to 1.8 are weights of that. Of
the update's out x in entries the sum is far larger, so l1 is far smaller here.

When not to use it: where a bound is wanted (gorp, inflora): an l1 norm also shrinks what the new task needs, Adam turns it round zero instead of to zero, and two
products of low rank have few entries that are exactly 0.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..adapters import LoraOptions, adapters, factors
from ..batches import unwrapped
from ._statistics import of_product
from .inclora import IncLoRA


class NLoRAOptions(LoraOptions):
    l1: float = Field(1e-4, ge=0, allow_inf_nan=False)
    """Weight of the sum of |B A| over all entries of all adapted layers. Ours and tuned on nothing, since the paper's values belong to another sum: a twentieth of the
    root mean square entry (2e-3) of the loss's gradient on SmolLM2-135M."""


class NLoRA(IncLoRA):
    name = "nlora"
    summary = "a new LoRA adapter a task, with an l1 penalty on the update so that tasks change different entries"
    paper = "arXiv 2410.10179"
    Options = NLoRAOptions

    def extra_loss(self, model: nn.Module, inputs: dict[str, Tensor], outputs: Any) -> Tensor | None:
        if not self.options.l1:
            return None
        norms = [of_product(B, A, _l1) for A, B in map(factors, adapters(unwrapped(model)).values())]
        return self.options.l1 * torch.stack(norms).sum()


def _l1(P: Tensor) -> tuple[Tensor, Tensor]:
    return P.abs().sum(), P.sign()

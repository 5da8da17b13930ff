"""LiNeS: layer-increasing network scaling (Wang et al., ICLR 2025, arXiv 2410.17146). What a task has changed is scaled down when it ends, shallow blocks most.

    theta <- theta_start + lambda_l tau,    tau = theta_end - theta_start,    lambda_l = alpha + beta (l - 1) / (L - 1),    l = 1 .. L the block

Weights outside the blocks (embeddings, the last norm, the head) are scaled by alpha, as in the released code. For a single model beta = 1 - alpha: the last block keeps
what it has learned, the first a share alpha of it. In an encoder-decoder model each stack counts its own depth. No data and no training is needed.

theta_start is the model of the last commit: the rule is applied to every task's own change, where the paper applies it once, to one task or to a merged model.
A change scaled by one number for a whole weight is permitted wherever the change was, so what the method beside it protects stays protected. Computed in fp64 and
rounded once.

When not to use it: tasks that are learned in the shallow blocks (a new language or script); tasks that were hardly learned to begin with.
"""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import nn

from ..importance import block_of
from ._after import After
from .base import Memory
from .beside import BesideOptions


class LiNeSOptions(BesideOptions):
    alpha: float = Field(0.5, ge=0)
    """Share of its change that the first block keeps, and whatever lies outside the blocks. The paper finds it on held-out rows; 1 changes nothing."""
    beta: float | None = None
    """What the last block keeps more than the first; null: 1 - alpha."""

    @model_validator(mode="after")
    def _no_share_below_zero(self) -> LiNeSOptions:
        if self.beta is not None and self.alpha + self.beta < 0:
            raise ValueError(
                f"alpha {self.alpha:g} and beta {self.beta:g} would turn the last block's change round; alpha + beta must not be below 0"
            )
        return self


class LiNeS(After):
    name = "lines"
    summary = "beside another: each task's change is scaled down at its end, shallow blocks most"
    paper = "arXiv 2410.17146"
    Options = LiNeSOptions

    def settle(self, model: nn.Module, learned: dict[str, nn.Parameter], memory: Memory) -> None:
        for name, p in learned.items():
            share = self.share(model, name)
            if share != 1:
                start, end = self.start[name].to(p.device, torch.float64), p.double()
                p.copy_((start + share * (end - start)).to(p.dtype))

    def share(self, model: nn.Module, name: str) -> float:
        """lambda_l of a weight."""
        alpha = self.options.alpha
        beta = 1 - alpha if self.options.beta is None else self.options.beta
        block = block_of(model, name)
        if block is None:
            return alpha
        stack, _, index = block.rpartition(".")
        last = len(model.get_submodule(stack)) - 1
        return alpha + beta * (int(index) / last if last else 1.0)

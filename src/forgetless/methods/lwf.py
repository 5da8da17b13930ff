"""LwF: learning without forgetting (Li and Hoiem 2016, arXiv 1606.09282). The new model answers the new task's rows much as the old one did.

    L = L_task + lambda T^2 KL( softmax(z_old / T) || softmax(z_new / T) )        mean over the answer tokens of the batch, z the logits (vocab) before each

z_old is the model of the last commit, which has not seen the task. It is the model at hand with its old weights in the place of those that learn: of a whole model
a second set of weights, beside frozen weights only a new adapter as it was made, which adds nothing. It runs in eval mode on the same batch; the new model is not
run twice. No row of an earlier task is needed: what the old model says of rows it was not made for stands for all that it knows.

Where we depart: KL in place of the cross-entropy with answers raised to 1 / T (the same gradient, and zero where nothing has changed); T^2 (Hinton et al. 2015), or a
larger T would also be a smaller lambda; no heads of single tasks and no warm-up of a new one, since a language model has one head; and from the second task on
(`first_task`: from the first, as in the paper, whose old network is the pretrained one).

When not to use it: tasks whose inputs are nothing like the earlier ones' (the old model's answers there say little); a model that may not learn to answer a kind of
prompt otherwise than before. Every step costs a forward pass more.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..batches import IGNORED, answer_logits, unwrapped
from ..errors import ConfigError
from ..subspace import working_dtype
from .base import Memory
from .beside import Beside, BesideOptions, add


class LwFOptions(BesideOptions):
    strength: float = Field(1.0, ge=0)
    """lambda (paper: 1)."""
    temperature: float = Field(2.0, gt=0)
    """T (paper: 2): above 1, small probabilities count for more."""
    first_task: bool = False
    """Hold on to the pretrained model's answers while the first task trains."""


class LwF(Beside):
    name = "lwf"
    summary = "beside another: answers to the new task's rows stay close to the last model's"
    paper = "arXiv 1606.09282"
    adds_to_gradients = True
    extra_forward = "a forward pass of the last model"
    Options = LwFOptions

    def __init__(self, /, **options: Any):
        super().__init__(**options)
        self.old: dict[str, Tensor] = {}  # of what learns, by name in the model that trains: as the task began

    def check(self, model: nn.Module) -> None:
        self.refuse((), "it leaves several models, and one is asked for what the old one says", "routed")
        self.refuse(("mtl", "per_task"), "it begins at the untouched model, which is then what would be held on to")
        if any(part.name == "merge" and part.begins != "merged" for part in self.inner()):
            raise ConfigError(
                "method lwf: on: merge trains from weights that are not the last commit's, which would be held on to; set its start: merged"
            )
        super().check(model)

    def begin_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        model = super().begin_task(model, task, memory)
        self.keep(model, memory)
        return model

    def resume_task(self, model: nn.Module, task: Any, memory: Memory, state: dict[str, Tensor]) -> nn.Module:
        model = super().resume_task(model, task, memory, state)
        self.keep(model, memory)  # the model of the last commit still: what was learned since is loaded afterwards
        return model

    def keep(self, model: nn.Module, memory: Memory) -> None:
        learns = {p for group in self.on.param_groups(model) for p in group["params"]}
        wanted = self.options.first_task or self.name in memory.info
        self.old = {name: p.detach().clone() for name, p in model.named_parameters() if p in learns} if wanted else {}

    def extra_loss(self, model: nn.Module, inputs: dict[str, Tensor], outputs: Any) -> Tensor | None:
        other = super().extra_loss(model, inputs, outputs)
        if not self.old:
            return other
        new, target, _ = answer_logits(model, inputs, outputs)
        inner = unwrapped(model)
        was_training = inner.training
        inner.eval()
        try:
            with torch.no_grad():
                old, _, _ = answer_logits(inner, inputs, weights=self.old)
        finally:
            inner.train(was_training)
        loss = distillation(new, old, target != IGNORED, self.options.temperature)
        return add(self.options.strength * self.batch_share * loss, other)

    def end_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        self.old = {}
        model = super().end_task(model, task, memory)
        memory.info[self.name] = {"tasks": memory.info.get(self.name, {"tasks": 0})["tasks"] + 1}
        return model

    def held_bytes(self) -> int:
        return super().held_bytes() + sum(t.nbytes for t in self.old.values())

    def statistics_bytes(self, model: nn.Module) -> int:
        """Of the first task, for planning, what later ones hold."""
        later = sum(p.nbytes for group in self.on.param_groups(model) for p in group["params"]) if not self.old else 0
        return super().statistics_bytes(model) + later


def distillation(new: Tensor, old: Tensor, answers: Tensor, T: float) -> Tensor:
    """T^2 KL(softmax(old / T) || softmax(new / T)) of logits (B, L, vocab), mean over the positions where `answers` (B, L)."""
    log_q, log_p = (nn.functional.log_softmax(z.to(working_dtype(z.dtype)) / T, -1) for z in (new[answers], old[answers]))
    return T * T * (log_p.exp() * (log_p - log_q)).sum() / answers.sum().clamp_min(1)

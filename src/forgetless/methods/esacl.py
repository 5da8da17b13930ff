"""EsaCL: train where the loss is flat, prune without retraining, give what is pruned to the next task (Ren and Honavar 2024, arXiv 2401.05667).

    sharpness   the gradient of each step is taken at W + rho g / ||g||                                        (SAM: Foret et al. 2020, arXiv 2010.01412)
    rows        of `rows` of the task those `critical` share with the largest error ||softmax(z) - y|| over the answer's tokens
    pruning     s = F W^2, F the mean squared gradient of these rows; of the weights this task could train the `prune` share of least s becomes 0
    capacity    exactly these may change in the next task (a mask on the applied update); all others stay as they are, to the bit

s / 2 is what the loss rises by to second order when a weight alone becomes 0, with F in place of the curvature; in flat directions it is small, and training for flatness
makes more of them. Kept: which weights are free (a byte a weight). After t tasks of share prune each, prune^t of the weights are left to the next.

Read of the paper: its abstract, which names these parts (sharpness-informed directional pruning without retraining, an "intelligent data selection" of the rows that
matter for the loss landscape), not its equations. So s, the choice of rows (the error norm of Paul et al. 2021, arXiv 2107.07075) and the numbers below are ours.
So is the step of sharpness: SAM's second pass a step is saved by taking g of the step before, which is the direction as of one step ago.

When not to use it: where the pretrained model's own skills matter: the first task trains every weight of the layers and prunes some of what the model already knew with them;
for long streams with a small `prune`; where the model must not be sparse.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..batches import IGNORED, answer_logits
from ..errors import ConfigError
from ..models import logical
from ..subspace import Constraint, working_dtype
from ._layers import LayerOptions, OverLayers
from ._statistics import Row, batch_of, encoded, fisher
from .base import Memory


class EsaCLOptions(LayerOptions):
    prune: float = Field(0.3, gt=0, lt=1)
    """Share of the weights a task could train that are 0 after it, and free for the next: more of it leaves more room and costs more of what was learned."""
    rho: float = Field(0.05, ge=0)
    """Length of the step toward higher loss at whose end gradients are taken (SAM's default); 0: plain training."""
    rows: int = Field(64, ge=1)
    """Rows of a task that are looked at for its end."""
    critical: float = Field(0.5, gt=0, le=1)
    """Share of these rows, those of largest error, that the curvature is measured on."""


class EsaCL(OverLayers):
    name = "esacl"
    summary = "sharpness-aware training; at a task's end the least needed weights become 0 and are what the next task may train"
    paper = "arXiv 2401.05667"
    constrained = True
    extra_forward = "gradients of some rows at a task's end"
    bytes_a_task = "none; a byte a weight"
    Options = EsaCLOptions

    free: dict[str, Tensor] = {}  # layer -> which weights (out, in) may change; none before the first task has ended
    flat: dict[str, Tensor] = {}  # weight -> its value, while the model stands a step aside of it

    def check(self, model: nn.Module) -> None:
        super().check(model)
        if self.options.rho and any(layer.weight.dtype != working_dtype(layer.weight.dtype) for layer in self.layers(model).values()):
            raise ConfigError(
                "method esacl: rho: a step aside of this length is lost in the rounding of 16-bit weights; set dtype: float32, or rho: 0"
            )

    def begin_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        self.free, self.flat = memory.of(self.name), {}
        if self.free and not any(bool(mask.any()) for mask in self.free.values()):
            raise ConfigError(
                "method esacl: no weight is left for another task; prune a larger share from the first task on, or choose another method"
            )
        return model

    def resume_task(self, model: nn.Module, task: Any, memory: Memory, state: dict[str, Tensor]) -> nn.Module:
        self.free = memory.of(self.name)
        return super().resume_task(model, task, memory, state)

    def constraint(self, name: str, layer: nn.Module) -> Constraint:
        return Constraint(mask=self.free[name].to(layer.weight.device)) if name in self.free else super().constraint(name, layer)

    # -- sharpness -------------------------------------------------------------------------------------------------------------------

    def optimizer(self, groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
        optimizer = super().optimizer(groups, **settings)
        weights = {name: p for group in groups for name, p in zip(group["names"], group["params"], strict=True)}
        if self.options.rho:
            optimizer.register_step_post_hook(lambda *_: self.step_aside(weights))
        return optimizer

    @torch.no_grad()
    def step_aside(self, weights: dict[str, Tensor]) -> None:
        """To W + rho g / ||g||, g as the step has used it: so within what may change."""
        gradients = {name: p.grad for name, p in weights.items() if p.grad is not None}
        norms = [torch.linalg.vector_norm(g.to(working_dtype(g.dtype))) for g in gradients.values()]
        norm = float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
        if not 0 < norm < math.inf:
            return
        for name, g in gradients.items():
            self.flat[name] = weights[name].detach().clone()
            weights[name].add_(g.to(weights[name].dtype), alpha=self.options.rho / norm)

    @torch.no_grad()
    def step_back(self, model: nn.Module) -> None:
        for name, W in self.flat.items():
            model.get_parameter(name).copy_(W)
        self.flat = {}

    def on_step(self, model: nn.Module) -> None:
        self.step_back(model)  # the gradient is there; it is W that moves by it

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.flat)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.flat = dict(state)

    def statistics_bytes(self, model: nn.Module) -> int:
        return sum(layer.weight.nbytes for layer in self.layers(model).values()) if self.options.rho else 0

    # -- a task's end ----------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def end_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        o, layers = self.options, self.layers(model)
        self.step_back(model)
        rows = encoded(self.tokenizer, task, o.rows)
        self.progress.stage(f"{task.name}: which rows it errs on", len(rows))
        rows = critical(model, rows, o.critical, self.progress.advance)
        self.progress.stage(f"{task.name}: how much each weight is needed", len(rows))
        with torch.enable_grad():
            F = fisher(model, rows, [f"{name}.weight" for name in layers], self.progress, answers="given")
        found = {}
        for name, layer in layers.items():
            W = logical(layer.weight, layer)
            found[name] = least(logical(F.pop(f"{name}.weight"), layer) * W.to(working_dtype(W.dtype)) ** 2, self.free.get(name), o.prune)
            W.masked_fill_(found[name], 0)
        memory.put(self.name, found)
        self.free = {}
        return model

    def report(self, memory: Memory) -> dict[str, Any] | None:
        """The share of the weights that no later task may change."""
        free = memory.of(self.name)
        total = sum(mask.numel() for mask in free.values())
        return {"modules": len(free), "share": 1 - sum(int(mask.sum()) for mask in free.values()) / total} if free else None


def least(s: Tensor, free: Tensor | None, share: float) -> Tensor:
    """A mask of the shape of s: of the entries where `free` is, by default all, the share with the least s.

    >>> least(torch.tensor([[4.0, 1.0], [2.0, 3.0]]), torch.tensor([[True, False], [True, True]]), 0.4)
    tensor([[False, False],
            [ True, False]])
    """
    free = torch.ones_like(s, dtype=torch.bool) if free is None else free.to(s.device)
    found = torch.zeros_like(free).reshape(-1)
    s = s.masked_fill(~free, math.inf).reshape(-1)
    found[s.topk(int(share * int(free.sum())), largest=False).indices] = True
    return found.reshape(free.shape)


@torch.no_grad()
def critical(model: nn.Module, rows: list[Row], share: float, advance: Callable[[int], None] | None = None) -> list[Row]:
    """The share of `rows`, at least one, that the model errs on most: ||softmax(z) - y|| over the answer's tokens. In their order. advance(done) after each row."""
    was_training = model.training
    model.eval()
    errors = []
    for row in rows:
        logits, target, _ = answer_logits(model, batch_of(model, [row]))
        known = target != IGNORED
        p = logits[known].to(working_dtype(logits.dtype)).softmax(-1)
        p[torch.arange(len(p)), target[known]] -= 1
        errors.append(float((p.double() ** 2).sum()))
        if advance:
            advance(len(errors))
    model.train(was_training)
    chosen = sorted(range(len(rows)), key=lambda i: -errors[i])[: max(1, int(share * len(rows)))]
    return [rows[i] for i in sorted(chosen)]

"""What several methods measure of a task at its end, row by row with bounded memory: gradients of single rows, the diagonal of the Fisher information; and the
weights a model has while it trains, adapters included. (Inputs of layers: protect.py.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..adapters import ADAPTER, adapters, factors
from ..batches import IGNORED, Collate, answer_logits, unwrapped
from ..models import logical
from ..progress import Progress
from ..subspace import Subspace, working_dtype
from ..subspace_linear import attached
from ..tasks import Task, sample

Row = dict[str, list[int]]  # {"input_ids", "labels"}


def encoded(tokenizer: Any, task: Task, limit: int | None, seed: int = 0) -> list[Row]:
    """At most `limit` of a task's training rows, the same ones for the same seed, as token ids."""
    return [task.encode(tokenizer, row) for row in sample(task.train, limit, seed)]


def batch_of(model: nn.Module, rows: list[Row]) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in Collate(model)(rows).items()}


def trained_names(groups: list[dict[str, Any]]) -> list[str]:
    """The plain model's parameters that these groups train, by name: of an adapter the weight it is beside."""
    return list(dict.fromkeys(re.sub(r"\.(lora_[AB]|C)$", ".weight", name) for group in groups for name in group["names"]))


def current(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """{name in the plain model: the parameter as it is now}, differentiable; of a layer that carries an adapter W + s B A, as W is stored."""
    return {name: read() for name, read in readers(model, names).items()}


def readers(model: nn.Module, names: Iterable[str]) -> dict[str, Callable[[], Tensor]]:
    """What `current` is made of: {name: a function that gives the parameter as it is when asked}, for who looks at one after another and lets each go."""
    model = unwrapped(model)
    plain, beside = dict(model.named_parameters()), {}
    for name, layer in adapters(model).items():
        beside[f"{name}.weight"] = layer
    coordinates = {f"{name}.weight": layer for name, layer in attached(model).items()}

    def read(name: str) -> Tensor:
        if name in beside:
            layer = beside[name]
            A, B = factors(layer)
            base = layer.get_base_layer()
            return base.weight + logical(layer.scaling[ADAPTER] * (B @ A), base)
        if name in coordinates:
            layer = coordinates[name]
            D = layer.C if layer.P is None else layer.P @ layer.C
            return layer.weight + logical(D if layer.Q is None else D @ layer.Q.mT, layer.base_layer)
        return plain[name]

    return {name: partial(read, name) for name in names}


def row_gradients(
    model: nn.Module,
    rows: list[Row],
    names: list[str],
    progress: Progress | None = None,
    answers: Literal["given", "sampled"] = "given",
    seed: int = 0,
    of: Literal["loss", "logits"] = "loss",
) -> Iterator[dict[str, Tensor]]:
    """For each row the gradient of its answer's negative log-likelihood (summed over its tokens) with respect to the parameters `names` of a plain model.

    answers: the row's own, or tokens drawn from what the model foretells after the row's own beginnings, as the Fisher information has it. In eval mode.
    of: "logits" for the gradient of the sum of the answer tokens' logits instead. progress.advance(done) after each row.
    """
    parameters = dict(model.named_parameters())
    targets = [parameters[name] for name in names]
    generator = torch.Generator().manual_seed(seed)
    required, was_training = [p.requires_grad for p in targets], model.training
    model.eval()
    for p in targets:
        p.requires_grad_(True)
    try:
        for done, row in enumerate(rows, 1):
            logits, target, _ = answer_logits(model, batch_of(model, [row]))
            logits = logits.to(working_dtype(logits.dtype))
            if answers == "sampled":
                p = logits.detach().softmax(-1).flatten(0, -2).cpu()
                drawn = torch.multinomial(p, 1, generator=generator).reshape(target.shape).to(target.device)
                target = torch.where(target == IGNORED, target, drawn)
            loss = nn.functional.cross_entropy(logits.flatten(0, -2), target.flatten(), ignore_index=IGNORED, reduction="sum")
            if of == "logits":
                loss = logits.gather(-1, target.clamp_min(0)[..., None])[..., 0].masked_fill(target == IGNORED, 0).sum()
            found = torch.autograd.grad(loss, targets, allow_unused=True)
            yield {name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, targets, found, strict=True)}
            if progress:
                progress.advance(done)
    finally:
        for p, needed in zip(targets, required, strict=True):
            p.requires_grad_(needed)
        model.train(was_training)


def fisher(
    model: nn.Module,
    rows: list[Row],
    names: list[str],
    progress: Progress | None = None,
    answers: Literal["given", "sampled"] = "sampled",
    seed: int = 0,
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information of the parameters `names` of a plain model: the mean over `rows` of their squared gradients, in fp32 or better."""
    total: dict[str, Tensor] = {}
    for gradients in row_gradients(model, rows, names, progress, answers, seed):
        for name, g in gradients.items():
            g = g.to(working_dtype(g.dtype))
            total[name] = total[name].addcmul_(g, g) if name in total else g * g
    return {name: F / len(rows) for name, F in total.items()}


def spaces_report(spaces: dict[str, Subspace]) -> dict[str, Any] | None:
    """What Method.report says of one protected space a module."""
    return bases_report([space.basis for space in spaces.values()])


def bases_report(bases: list[Tensor]) -> dict[str, Any] | None:
    if not bases:
        return None
    ranks = [V.shape[1] for V in bases]
    share = sum(V.shape[1] / V.shape[0] for V in bases) / len(bases)
    numbers = {"modules": len(bases), "rank_mean": sum(ranks) / len(ranks), "rank_max": max(ranks), "share": share}
    return numbers | {"bytes": sum(V.nbytes for V in bases)}


def of_product(B: Tensor, A: Tensor, f: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """A number that depends on P = B A (out, in), B (out, r), A (r, in): f gives it and its gradient dP. In B's precision, also under autocast.

    Both gradients are taken at once and P is let go: a penalty on the updates of all layers holds one of them at a time.
    """
    return _OfProduct.apply(B, A, f)


class _OfProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, B: Tensor, A: Tensor, f: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        with torch.autocast(B.device.type, enabled=False):
            value, dP = f(B @ A)
            ctx.save_for_backward(dP @ A.mT, B.mT @ dP)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor):
        (g,) = gradients
        dB, dA = ctx.saved_tensors
        return g * dB, g * dA, None

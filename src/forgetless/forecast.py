"""Before a task trains: how much of its gradient lies where earlier tasks' inputs do, and what that has cost so far in this run.

    overlap_j = sum_l sum_r ||G_lr V_lj||^2 / sum_l sum_r ||G_lr||^2

G_lr (out, in) is the gradient of training row r's answer at layer l, of the model the task begins from; V_lj (in, k) the leading directions of the inputs that layer l
had on task j when it was learned, as recorded in its commit. Where a step along G changes what the layer makes of task j's inputs it lies in span(V): a share of 0
promises that the first step leaves task j's layers as they are, a share of 1 that all of it is felt there. It speaks of the gradient before a method's constraint.

G = dY^T X (dY the gradients of the layer's outputs, X its inputs, a row a token), so ||G V||^2 = ||dY^T (X V)||^2 and ||G||^2 = <dY dY^T, X X^T>: no gradient of a
weight is ever formed, and what it takes is the memory of one row's forward and backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .batches import IGNORED, answer_logits
from .config import RunConfig
from .lineage import RunFolder
from .methods._statistics import Row, batch_of, encoded
from .methods.base import Memory, Method
from .models import linear_modules
from .probes import undisturbed
from .progress import Progress
from .subspace import energy_rank, top_subspace, working_dtype
from .tasks import TaskStream

ROWS = 16
ENERGY = 0.9  # share of a task's recorded inputs, each brought to length 1, that its directions hold
LEAST_PAIRS = 4
Spaces = dict[str, Tensor]  # layer: V (in, k), orthonormal columns


def forecast(
    model: nn.Module,
    tokenizer: Any,
    stream: TaskStream,
    index: int,
    folder: RunFolder,
    config: RunConfig,
    method: Method,
    memory: Memory,
    progress: Progress,
) -> dict[str, Any] | None:
    """The block "forecast" of metrics.json, on the plain model that task `index` begins from; None where there is nothing to overlap with.

    overlap: share by earlier task, or of the method's protected space under "protected" where no task's inputs are recorded (store: nothing). expected_forgetting: what
    each earlier task is expected to lose of the run's first score (the gate's, where it names one), on average, by the least-squares line through
    (overlap, drop) of the run's own tasks; null until there are four such pairs.
    """
    task, done = stream[index], folder.committed()
    spaces = {
        earlier.name: leading for earlier, name in zip(stream.tasks, done, strict=False) if (leading := leading_directions(folder.recorded(name)))
    }
    if not spaces and (protected := {name: V for name, V in method.protected_inputs(memory).items() if V.shape[1]}):
        spaces = {"protected": protected}
    if not spaces:
        return None
    rows = encoded(tokenizer, task, ROWS, config.seed)
    progress.stage(f"{task.name}: overlap with what is remembered", len(rows))
    shares = overlap(model, rows, spaces, progress)
    return {"overlap": shares, "expected_forgetting": expected(shares, folder, config.gate.scorer or config.scorers[0])}


def leading_directions(recorded: dict[str, Tensor]) -> Spaces:
    """Of a task's recorded inputs {"<module>.x": (tokens, in)} the directions that hold the share ENERGY of them, by layer."""
    found = {}
    for key, X in recorded.items():
        if key.endswith(".x"):
            X = X.to(working_dtype(X.dtype))
            X = X / torch.linalg.vector_norm(X, dim=1, keepdim=True).clamp_min(torch.finfo(X.dtype).tiny)  # else a few huge tokens are all there is
            space = top_subspace(X)
            found[key.removesuffix(".x")] = space.basis[:, : energy_rank(space.energy, ENERGY)].contiguous()
    return found


def overlap(model: nn.Module, rows: list[Row], spaces: dict[str, Spaces], progress: Progress | None = None) -> dict[str, float]:
    """By the name of each of `spaces`, the share of the energy of the rows' gradients, over all layers it has, that lies in it. The model is left as it was."""
    layers = {name: module for name, module in linear_modules(model).items() if any(name in space for space in spaces.values())}
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    handles = [
        layer.register_forward_hook(lambda module, args, Y, name=name: seen.setdefault(name, []).append((args[0], Y)))
        for name, layer in layers.items()
    ]
    inside, whole = dict.fromkeys(spaces, 0.0), dict.fromkeys(spaces, 0.0)
    required = [(p, p.requires_grad) for p in model.parameters()]
    with undisturbed(model):
        model.eval()
        try:
            for p, _ in required:
                p.requires_grad_(p.is_floating_point())  # so that every layer's output is of a graph
            for done, row in enumerate(rows, 1):
                seen.clear()
                logits, target, _ = answer_logits(model, batch_of(model, [row]))
                logits = logits.to(working_dtype(logits.dtype))
                loss = nn.functional.cross_entropy(logits.flatten(0, -2), target.flatten(), ignore_index=IGNORED, reduction="sum")
                outputs = [Y for pairs in seen.values() for _, Y in pairs]
                gradients = iter(torch.autograd.grad(loss, outputs, allow_unused=True))
                for name, pairs in seen.items():
                    dY, X = _tokens([(next(gradients), X) for X, _ in pairs])
                    energy = float(((dY @ dY.mT) * (X @ X.mT)).sum(dtype=torch.float64)) if len(dY) else 0.0
                    for key, space in spaces.items():
                        if name in space and len(dY):
                            inside[key] += float((dY.mT @ (X @ space[name].to(X))).square().sum(dtype=torch.float64))
                            whole[key] += energy
                if progress:
                    progress.advance(done)
        finally:
            seen.clear()
            for handle in handles:
                handle.remove()
            for p, needed in required:
                p.requires_grad_(needed)
    return {key: inside[key] / whole[key] if whole[key] > 0 else 0.0 for key in spaces}


def _tokens(pairs: list[tuple[Tensor | None, Tensor]]) -> tuple[Tensor, Tensor]:
    """(dY (tokens, out), X (tokens, in)) of a layer, of all the times that it was called for the row."""
    known = [(dY.flatten(0, -2), X.detach().flatten(0, -2)) for dY, X in pairs if dY is not None]
    if not known:
        return torch.zeros(0, 1), torch.zeros(0, 1)
    dY, X = (torch.cat(side) for side in zip(*known, strict=True))
    return dY.to(working_dtype(dY.dtype)), X.to(working_dtype(X.dtype))


def expected(overlaps: dict[str, float], folder: RunFolder, scorer: str) -> float | None:
    """The mean over `overlaps` of what the line through the run's (overlap, drop) pairs says of each; None with fewer than LEAST_PAIRS, or all of one overlap."""
    known = pairs([folder.metrics(name) for name in folder.committed()], scorer)
    if len(known) < LEAST_PAIRS or max(x for x, _ in known) == min(x for x, _ in known):
        return None
    slope, level = line(known)
    return sum(level + slope * share for share in overlaps.values()) / len(overlaps)


def pairs(metrics: list[dict[str, Any]], scorer: str) -> list[tuple[float, float]]:
    """(overlap forecast for an earlier task, what it lost of its score while the task was learned) over the tasks of a run, from their metrics.json in order."""
    found = []
    names = [m["task"] for m in metrics]
    for before, after in zip(metrics, metrics[1:], strict=False):
        for name, share in ((after.get("forecast") or {}).get("overlap") or {}).items():
            if name in names:  # not the protected space as a whole, which no score belongs to
                j = names.index(name)
                scores = [m["scores"].get(scorer, [])[j : j + 1] for m in (before, after)]
                if all(score and score[0] is not None for score in scores):
                    found.append((share, scores[0][0] - scores[1][0]))
    return found


def line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """(slope, value at 0) of the least-squares line through (x, y).

    >>> line([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)])
    (2.0, 1.0)
    """
    x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
    slope = sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)
    return slope, y - slope * x

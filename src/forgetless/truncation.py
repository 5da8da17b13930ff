"""`forgetless doctor --truncation`: are the weakest singular directions of this model free?

Methods that keep a weight's strong directions and train the weak ones (OSFT) take it that little is lost with those. Measured here: the loss on the config's own dev
rows, untouched and without the lowest p % of the singular directions of every target matrix, then of one kind of matrix at a time. Nothing is trained or written.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import models
from .batches import IGNORED, Collate, Encoded, answer_loss
from .config import RunConfig
from .errors import ConfigError, DataError
from .progress import Progress
from .subspace import without_lowest
from .tasks import TaskStream, load_stream, sample

PERCENT = (1, 5, 10, 25, 50)  # of each matrix's singular directions, the weakest
KINDS_AT = 10  # the one of PERCENT at which each kind of matrix is measured alone
ROWS = 64  # dev rows a task, at most


def measure(config: RunConfig, progress: Progress | None = None) -> dict[str, Any]:
    """{"model", "tasks": dev rows by name, "tokens", "loss", "removed": [one entry a percentage], "kinds_percent", "kinds": [one entry a kind]}.

    An entry: {"layers", "directions" removed, "share" of ||W||^2 removed (mean over the layers), "loss"}, with its "percent" or "kind". Losses are means over
    the answer tokens, in fp32 whatever the config's dtype. Raises ConfigError for a task without dev rows, DataError for a model whose loss is no number.
    """
    progress = progress or Progress()
    stream = load_stream(config)
    for task in stream:
        if not task.dev:
            raise ConfigError(f"doctor --truncation measures on dev rows, and task '{task.name}' has none; give it a dev file, or more data")
    model, tokenizer = models.load(config.model, trust_remote_code=config.trust_remote_code)  # fp32: in bf16 rounding fills what was removed
    for task in stream:
        task.check(tokenizer, models.positions(model))
    if torch.cuda.is_available() and not config.train.get("use_cpu"):
        model.cuda()
    layers = models.match_modules(model, None, "doctor --truncation")
    rows = {task.name: len(sample(task.dev, ROWS, config.seed)) for task in stream}
    batches = dev_batches(model, tokenizer, stream, config)
    tokens = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
    progress.stage("untouched: loss", len(batches))
    untouched = mean_loss(model, batches, tokens, progress.advance)
    if not math.isfinite(untouched):
        raise DataError(f"model '{config.model}': its loss is {untouched} before anything was removed; the weights are damaged")
    removed, kinds = without(model, layers, lambda advance: mean_loss(model, batches, tokens, advance), len(batches), progress)
    return {
        "model": config.model, "tasks": rows, "tokens": tokens, "loss": untouched, "removed": removed, "kinds_percent": KINDS_AT,
        "kinds": sorted(kinds, key=lambda entry: -entry["loss"]),
    }  # fmt: skip


def dev_batches(model: nn.Module, tokenizer, stream: TaskStream, config: RunConfig) -> list[dict[str, Tensor]]:
    """At most ROWS dev rows of each task, the same ones every time, rows of a length together."""
    encoded = [row for task in stream for row in Encoded(task, tokenizer, sample(task.dev, ROWS, config.seed))]
    encoded.sort(key=lambda row: len(row["input_ids"]))
    collate, device, size = Collate(model), next(model.parameters()).device, config.evaluate.batch_size
    parts = [encoded[i : i + size] for i in range(0, len(encoded), size)]
    return [{key: tensor.to(device) for key, tensor in collate(part).items()} for part in parts]


@torch.no_grad()
def mean_loss(model: nn.Module, batches: list[dict[str, Tensor]], tokens: int, advance: Callable[[int], None]) -> float:
    """Cross-entropy of the answer tokens, their mean over all batches."""
    total = 0.0
    for done, batch in enumerate(batches, 1):
        total += float(answer_loss(model, batch, 1)[0])
        advance(done)
    return total / tokens


def without(
    model: nn.Module, layers: dict[str, nn.Module], loss: Callable[[Callable[[int], None]], float], steps: int, progress: Progress
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:  # fmt: skip
    """The entries of "removed" and "kinds". The weights themselves are put aside, not changed, so that what comes back is what was there, to the bit.

    loss(advance) measures in `steps` steps. One matrix is decomposed at a time; beside the model there is one more copy of the target matrices.
    """
    originals = {name: layer.weight.data for name, layer in layers.items()}
    kinds: dict[str, list[str]] = {}
    for name in layers:
        kinds.setdefault(name.rsplit(".", 1)[-1], []).append(name)

    def put(weights: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            layers[name].weight.data = weight

    all_at_once, alone = [], []
    try:
        for percent in PERCENT:
            each = percent == KINDS_AT
            progress.stage(f"without the lowest {percent} %", len(layers) + steps * (1 + each * len(kinds)))
            done, cut, parts = 0, {}, []
            for kind, names in kinds.items():
                part = []
                for name in names:
                    W = models.logical(originals[name], layers[name])
                    count = round(min(W.shape) * percent / 100)
                    rest, share = without_lowest(W, count)
                    cut[name] = models.logical(rest, layers[name]).contiguous()
                    part.append((count, share))
                    progress.advance(done := done + 1)
                if each:
                    put({name: cut[name] for name in names})
                    alone.append({"kind": kind, **_entry(part), "loss": loss(lambda i, done=done: progress.advance(done + i))})
                    put({name: originals[name] for name in names})
                    done += steps
                parts += part
            put(cut)
            all_at_once.append({"percent": percent, **_entry(parts), "loss": loss(lambda i, done=done: progress.advance(done + i))})
            put(originals)
    finally:
        put(originals)
    return all_at_once, alone


def _entry(parts: list[tuple[int, float]]) -> dict[str, Any]:
    return {"layers": len(parts), "directions": sum(count for count, _ in parts), "share": sum(share for _, share in parts) / len(parts)}


def show_truncation(found: dict[str, Any]) -> None:
    """The same, for people."""
    from rich.console import Console

    console, base, kinds = Console(), found["loss"], found["kinds"]
    rows = ", ".join(f"{name} {n}" for name, n in found["tasks"].items())
    console.print(f"{found['model']}: loss {base:.3f} (answer tokens: {found['tokens']}; dev rows: {rows})", highlight=False, markup=False)
    every = [(f"{entry['percent']} %", entry) for entry in found["removed"]]
    console.print(_table(f"without the lowest singular directions of all {every[0][1]['layers']} matrices", "lowest", every, base))
    console.print(_table(f"without the lowest {found['kinds_percent']} % of one kind", "kind", [(entry["kind"], entry) for entry in kinds], base))
    console.print(
        "A change near 0: those directions are free as far as these rows show; what other text needs of them was not measured.", highlight=False
    )


def _table(title: str, first: str, rows: list[tuple[str, dict[str, Any]]], base: float):
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for column in ("matrices", "directions", "of ||W||^2", "loss", "change"):
        table.add_column(column, justify="right")
    for name, entry in rows:
        share = f"{100 * entry['share']:.3g} %"
        table.add_row(name, str(entry["layers"]), f"{entry['directions']:,}", share, f"{entry['loss']:.3f}", f"{entry['loss'] - base:+.3f}")
    return table

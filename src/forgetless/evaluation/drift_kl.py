"""How far a new task has moved the model on that task's own prompts: mean KL(before || after) of the next token, in nats. No data of earlier tasks is read.

The forward KL of the fine-tuned from the original model on the new task's prompts goes with what is forgotten (Shenfeld, Pari and Agrawal 2025, "RL's Razor",
arXiv 2509.04259). Here it is taken exactly, over the whole vocabulary and without a sampled answer, at positions of the prompt: each foretells the token after it, the
last one the answer's first. An encoder-decoder model reads the prompt by its encoder and is asked at the one position before the answer. Each prompt counts the
same, whatever its length; at most PROMPTS prompts, of each at most its last POSITIONS positions, so that its log-probabilities take 64 vocabularies of fp32 (13 MB
at 49,000 tokens) whatever there is to read.

The model before is loaded again from where it was committed, once, after the task: nothing is held while the task trains, nothing has to travel with a checkpoint,
and the numbers are exact, where log-probabilities kept in 16 bits would have noise of 1e-3 nats. For that moment two models are in memory and no optimizer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import distributed
from ..batches import Collate, forward, is_seq2seq
from ..config import RunConfig
from ..errors import ForgetlessError
from ..lineage import RunFolder
from ..methods.base import Memory, Method
from ..progress import Progress
from ..subspace import working_dtype
from ..tasks import Example, Task, sample
from .scorers import _autocast, _fp32_head

log = logging.getLogger(__name__)
PROMPTS, POSITIONS = 64, 64


@dataclass
class Drift:
    """prompts: each prompt's mean KL(before || after) over its positions, in nats; base: the same from the pretrained model, None where it is not to be had."""

    prompts: list[float] = field(default_factory=list)
    base: list[float] | None = None
    tokens: int = 0

    def noted(self) -> dict[str, Any]:
        """The block "drift" of metrics.json."""
        return {
            "kl": _mean(self.prompts),
            "base_kl": None if self.base is None else _mean(self.base),
            "prompts": len(self.prompts),
            "tokens": self.tokens,
        }


def measure(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    folder: RunFolder,
    config: RunConfig,
    autocast: bool,
    progress: Progress,
    method: Method,
    memory: Memory,
) -> Drift:
    """The drift of `model`, which has just learned `task` and is not committed yet, from the last committed model of `folder` and from the pretrained one.

    Rows as evaluation takes them (its split and seed); several processes share them. Of a method that leaves several models the one that answers each row.
    """
    rows = sample(task.split(config.evaluate.split), PROMPTS, config.seed)
    done = folder.committed()
    progress.stage(f"{task.name}: how far the model has moved", len(rows) * (2 if done else 1))
    prompts = [task.encode_prompt(tokenizer, row) for row in rows]

    def from_(source: Callable[[], nn.Module], remembered: Memory | None, advance: Callable[[int], None]) -> list[tuple[float, int]]:
        earlier = _beside(model, source())
        found = []
        for i in distributed.shared(range(len(rows))):
            with _answering(method, model, task, rows[i], memory) as speaker:
                after = log_probabilities(speaker, prompts[i], autocast)
            with _answering(method, earlier, task, rows[i], remembered) as speaker:
                kl = divergence(log_probabilities(speaker, prompts[i], autocast).to(after.device), after)
            found.append((i, float(kl.mean()), len(kl)))
            advance(len(found) * distributed.world_size())
        return [(kl, n) for _, kl, n in sorted(distributed.gathered(found))]

    if not done:
        found = from_(method.untouched, None, progress.advance)
        return Drift([kl for kl, _ in found], [kl for kl, _ in found], sum(n for _, n in found))
    found = from_(lambda: method.load(str(folder.path / "tasks" / done[-1] / "model"))[0], folder.memory(done[-1]), progress.advance)
    try:
        base = [kl for kl, _ in from_(method.untouched, None, lambda n: progress.advance(len(rows) + n))]
    except ForgetlessError as error:  # a run goes on where the model it began from is gone
        log.warning("drift from the pretrained model is not measured: %s", error)
        base = None
    return Drift([kl for kl, _ in found], base, sum(n for _, n in found))


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """KL(before || after) in nats of each of many distributions, (..., vocab) log-probabilities -> (...), in fp64.

    >>> divergence(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()).round(decimals=4)
    tensor(0.1438, dtype=torch.float64)
    """
    return (before.exp() * (before - after)).sum(-1, dtype=torch.float64)


@torch.inference_mode()
def log_probabilities(model: nn.Module, prompt: list[int], autocast: bool = False) -> Tensor:
    """(positions, vocab): of the token after each of the prompt's last POSITIONS tokens; after a whole prompt, of the answer's first, for an encoder-decoder model."""
    device, modes = next(model.parameters()).device, [(module, module.training) for module in model.modules()]
    batch = {"input_ids": torch.tensor([prompt], device=device)}
    if is_seq2seq(model):
        batch["decoder_input_ids"] = torch.tensor([[Collate(model).first]], device=device)
    kept = min(len(prompt), POSITIONS)
    model.eval()
    try:
        with _autocast(model, autocast), _fp32_head(model):
            logits = forward(model, batch, logits_to_keep=kept).logits[0, -kept:]
    finally:
        for module, training in modes:
            module.training = training
    return logits.to(working_dtype(logits.dtype)).log_softmax(-1)


def _answering(method: Method, model: nn.Module, task: Task, row: Example, memory: Memory | None) -> AbstractContextManager[nn.Module]:
    """The model that answers this row; `model` itself where a method remembers nothing yet."""
    if memory is None:
        return nullcontext(model)
    [(_, speaker)] = method.answering(model, task, [row], memory)
    return speaker


def _beside(model: nn.Module, other: nn.Module) -> nn.Module:
    """`other` where `model` is, if there is room for it; else where it was loaded, which takes longer."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if room < 1.1 * sum(t.nbytes for t in other.state_dict().values()):
            return other
    return other.to(device)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)

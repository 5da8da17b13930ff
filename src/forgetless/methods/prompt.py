"""Progressive prompts: a soft prompt a task in front of those of the tasks before it, the model itself frozen (Razdaibiedina et al. 2023, arXiv 2301.12314).

For task k the vectors P_k (n x d) are trained, in front of the frozen ones of earlier tasks and the row's own embeddings E(x):
    min over P_k of  -sum log p(y | [P_k, P_{k-1}, ..., P_1, E(x)])
and a row of task j is answered behind [P_j, ..., P_1]: the task of a row has to be known. P_k begins as the embeddings of tokens drawn from the vocabulary. With `bottleneck`
it is trained through a residual network, P_k = Z + W_2 tanh(W_1 Z + b_1) + b_2, W_1 (b x d), W_2 (d x b), of which only P_k stays.

Kept: P_k of every task. model/ of each commit is the base model.

Where we depart: the released code cuts rows with their prompts off at a fixed length, at the cost of the row's end; here nothing is cut, and a row that does not fit into the
model's positions is refused before training. It also trains on with the best epoch's prompt by validation accuracy; here the last is taken. A row of a task that
was not learned is answered without a prompt. prompts.py says how the vectors come in front of padded rows and into the scorer's cache.

When not to use it: where rows do not say which task they are of (routed), where every token of context counts (each task makes later prompts n longer), or where one plain
model is wanted. Prompts want far larger rates than weights: the paper's T5 runs have 0.3.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..errors import ConfigError, DataError
from ..models import positions
from ..prompts import check, prompted, put_in_front
from ..subspace import working_dtype
from .base import Memory, Method, Options

PLACE = "soft_prompt"  # the trained module's name in the model


class PromptOptions(Options):
    prompt_length: int = Field(10, ge=1)
    """Vectors a task, n."""
    bottleneck: int | None = Field(None, ge=1)
    """Width of the residual network that a prompt is trained through (the released code has 800); null: the vectors themselves are trained."""


class SoftPrompt(nn.Module):
    """[P_k, P_{k-1}, ..., P_1], of which P_k is trained. start (n, d): where P_k begins; earlier (m, d)."""

    def __init__(self, start: Tensor, earlier: Tensor, bottleneck: int | None):
        super().__init__()
        self.new = nn.Parameter(start)
        self.register_buffer("earlier", earlier, persistent=False)  # memory has it
        d, through = start.shape[1], {"device": start.device, "dtype": start.dtype}
        self.network = nn.Sequential(nn.Linear(d, bottleneck, **through), nn.Tanh(), nn.Linear(bottleneck, d, **through)) if bottleneck else None

    def trained(self) -> Tensor:
        """P_k (n, d)."""
        return self.new if self.network is None else self.new + self.network(self.new)

    def forward(self) -> Tensor:
        return torch.cat([self.trained(), self.earlier])


class Prompt(Method):
    name = "prompt"
    summary = "a soft prompt a task in front of the earlier ones, the model frozen (progressive prompts)"
    paper = "arXiv 2301.12314"
    kind = "routed"
    packs = False
    needs_task_id = True
    extra_forward = "every row is longer by all prompts so far"
    bytes_a_task = "prompt_length x width numbers"
    Options = PromptOptions

    def check(self, model: nn.Module) -> None:
        check(model)
        for number, task in enumerate(self.stream or ()):
            self._check_room(model, task, number)

    def _check_room(self, model: nn.Module, task: Any, before: int) -> None:
        room, taken = positions(model), (before + 1) * self.options.prompt_length
        if room is None or self.tokenizer is None:
            return
        try:
            task.check(self.tokenizer, max(1, room - taken))
        except DataError as error:
            raise ConfigError(
                f"{error}. The model's positions are {room}, of which {taken} are the prompts'; a smaller prompt_length takes less"
            ) from None

    def begin_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        if task is not None:
            self._check_room(model, task, len(memory.of(self.name)))
        return self._attach(model, memory)

    def resume_task(self, model: nn.Module, task: Any, memory: Memory, state: dict[str, Tensor]) -> nn.Module:
        return self._attach(model, memory)  # what is drawn here the checkpoint replaces

    @torch.no_grad()
    def _attach(self, model: nn.Module, memory: Memory) -> nn.Module:
        embedding = model.get_input_embeddings()
        ids = torch.randint(embedding.weight.shape[0], (self.options.prompt_length,)).to(embedding.weight.device)
        start = embedding(ids)
        start = start.to(working_dtype(start.dtype)).clone()
        earlier = self._stack(memory, len(memory.of(self.name)))
        prompt = SoftPrompt(start, start[:0].clone() if earlier is None else earlier.to(start), self.options.bottleneck)
        model.add_module(PLACE, prompt)
        prompt.handles = put_in_front(model, prompt, len(start) + len(prompt.earlier))
        return model

    def _stack(self, memory: Memory, tasks: int) -> Tensor | None:
        """[P_k, ..., P_1] of the first so many tasks."""
        kept = memory.of(self.name)
        return torch.cat([kept[f"{number:02d}"] for number in reversed(range(tasks))]) if tasks else None

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        named = dict(model.get_submodule(PLACE).named_parameters())
        return [{"params": list(named.values()), "names": [f"{PLACE}.{name}" for name in named]}]

    @torch.no_grad()
    def end_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        prompt, kept, names = model.get_submodule(PLACE), memory.of(self.name), memory.info.get(self.name, {"tasks": []})["tasks"]
        memory.put(self.name, kept | {f"{len(kept):02d}": prompt.trained().clone()})
        memory.info[self.name] = {"tasks": [*names, getattr(task, "name", None)]}
        for handle in prompt.handles:
            handle.remove()
        delattr(model, PLACE)
        return model

    def answering(self, model: nn.Module, task: Any, rows: list, memory: Memory) -> list[tuple[list[int], AbstractContextManager[nn.Module]]]:
        names = memory.info[self.name]["tasks"]
        if task.name not in names:
            return super().answering(model, task, rows, memory)
        return [(list(range(len(rows))), prompted(model, self._stack(memory, names.index(task.name) + 1)))]

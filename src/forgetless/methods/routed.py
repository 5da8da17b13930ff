"""One low-rank increment a task, and a router that chooses among them for each row at test time: the base weights never change, so nothing can be forgotten but the way.

Training is LoRA's: task t learns its own y = (W + s B_t A_t) x, A_t (rank x in), B_t (out x rank), s = lora_alpha / lora_rank, with W as it was before the first
task. At the task's end (A_t, B_t) is put into memory and the router learns from the task's prompts; at test time no task is named. Two routers (router.py has the equations):

analytic: Any-SSR (Tong et al. 2025, "Analytic Subspace Routing", arXiv 2503.13575). Mean hidden states x after block 4 of the base model, random features
    phi = relu(x E), E (d x w), ridge regression onto task indicators by recursive least squares: M (w x tasks), R = (Phi^T Phi + ridge I)^-1 (w x w). Without a row of
    an earlier task it equals the solution for all rows at once. The task with the largest phi M answers.
keys: SLM (Peng et al. 2024, JARe and DTKR, arXiv 2404.07470). A few key vectors a task, compared with a row's x by cosine; the increment of the `top` nearest
    tasks' answers, weighted where they are several.

Where we depart. Any-SSR: hidden states are normalised token by token (its code runs the model's last norm over them), all layers named may carry an increment, not
only those above the router's, and features are always the base model's; the released code has no nonlinearity between x and M and, from the third task on, feeds the rows
of all tasks so far into the recursion again, which counts old rows several times and needs them. SLM: x is ours, not a sentence encoder's, whole and not in
groups; the keys are the centres of the task's x, found at the task's end, where SLM trains orthogonal vectors with a loss; weights are a softmax of the cosines; each row
chooses for itself, where the released code averages the similarities of a batch, rows of one task, before it chooses. Read of the papers:
their abstracts and the released code, not their text.

Kept: A and B of every task; of the router E, M and R, or the keys. model/ of each commit is the base model; routed.py exports base, increments and router.

When not to use it: where tasks cannot be told apart by their prompts (the router sees nothing else), where tasks should help each other, where one plain model is wanted,
or where there are so many tasks that an increment for each is too much.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from ..adapters import LoraOptions, adapter_config, adapter_tensors, detach
from ..errors import ConfigError
from ..routed import ROUTERS, RoutedSet, under
from ..router import Analytic, Keys, blocks, features
from ..tasks import sample
from .base import Memory
from .lora import LoRA


class RoutedOptions(LoraOptions):
    router: Literal["analytic", "keys"] = "analytic"
    """How a row's task is told: ridge regression on random features (analytic), or the nearest of some vectors a task (keys)."""
    router_layer: int = Field(4, ge=1)
    """The router looks at what this block of the base model says, counted from 1; the last, where there are fewer."""
    router_rows: int | None = Field(1000, ge=1)
    """At most this many of a task's prompts teach the router, so that a large task does not outweigh a small one; null: all."""
    width: int = Field(2048, ge=1)
    """analytic: random features, w. R has w x w numbers in fp64."""
    ridge: float = Field(1.0, gt=0)
    """analytic: what is added to the diagonal of Phi^T Phi."""
    keys: int = Field(8, ge=1)
    """keys: vectors a task."""
    top: int = Field(1, ge=1)
    """keys: of how many tasks the increments are mixed. Above 1 each row has a mixture of its own and is answered alone, which takes longer."""
    temperature: float = Field(0.1, gt=0)
    """keys: the mixture's weights are softmax(cosine / temperature)."""

    @model_validator(mode="after")
    def _mixing(self) -> RoutedOptions:
        if self.top > 1 and self.router != "keys":
            raise ValueError("top: increments are mixed by similarity to keys; set router: keys, or leave top at 1")
        return self


class Routed(LoRA):
    name = "routed"
    summary = "a LoRA increment a task beside frozen weights, chosen for each row by a router"
    paper = "arXiv 2503.13575"
    kind = "routed"
    extra_forward = "each prompt once through the first blocks, at the task's end and at test time"
    bytes_a_task = "A and B of every adapted layer, a column of the router's M or its keys; the router's E and R"
    Options = RoutedOptions

    def check(self, model: nn.Module) -> None:
        super().check(model)
        blocks(model)

    def go_on(self, model: nn.Module, memory: Memory) -> nn.Module:
        self.attach(model)
        return model

    def end_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        if task is None:
            raise ConfigError("method routed: the router learns from the task's prompts; give end_task the task")
        o = self.options
        kept, info = memory.of(self.name), memory.info.get(self.name, {"tasks": []})
        number, config = len(info["tasks"]), adapter_config(model, o)
        for key, tensor in adapter_tensors(model).items():
            kept[f"{number:02d}/{key.removeprefix('base_model.model.').removesuffix('.weight')}"] = tensor
        detach(model, merge=False)
        rows = sample(task.train, o.router_rows, 0)
        self.progress.stage(f"{task.name}: teaching the router", len(rows))
        x = features(model, [task.encode_prompt(self.tokenizer, row) for row in rows], o.router_layer, self.progress.advance)
        router = self._router(under(kept, "router/"), x.shape[1])
        router.learn(x, number, **({"each": o.keys} if o.router == "keys" else {}))
        memory.put(self.name, kept | {f"router/{key}": tensor for key, tensor in router.tensors().items()})
        memory.info[self.name] = {
            "tasks": [*info["tasks"], task.name], "router": o.router, "router_layer": o.router_layer, "top": o.top, "temperature": o.temperature, "adapter": config,
        }  # fmt: skip
        return model

    def _router(self, tensors: dict[str, Tensor], d: int) -> Analytic | Keys:
        o = self.options
        if tensors:
            return ROUTERS[o.router].of(tensors)
        return Keys.new(d) if o.router == "keys" else Analytic.new(d, o.width, o.ridge)

    def answering(self, model: nn.Module, task: Any, rows: list, memory: Memory) -> list[tuple[list[int], AbstractContextManager[nn.Module]]]:
        return RoutedSet.of(memory).answering(model, [task.encode_prompt(self.tokenizer, row) for row in rows])

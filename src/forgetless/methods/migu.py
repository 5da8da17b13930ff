"""MIGU: magnitude-based gradient updating (Du et al., EMNLP 2024 Findings, arXiv 2406.17245): only the weights behind a layer's largest outputs change in a step.

    h = W x                         a linear layer's output (out)
    n_i = sum over tokens of |h_i|  how large output unit i was on the rows of this step, all micro-batches and processes together
    mask_i = 1 for the `share` of the layer's units with the largest n_i, else 0                        (the paper's top 30 %)
    dW_i <- mask_i dW_i             row i of W, which makes h_i, moves or stays as a whole; from the second task on

Which units are large differs from task to task, so tasks tend to move different rows. No old data, no task labels; kept is nothing but whether a task has been learned.

Where we depart: the released code multiplies gradients by the mask, and Adam's moments then move masked rows all the same, as does weight decay. Here the *applied*
update is masked (and the gradient, so that moments see what they did there): masked rows stay as they are to the bit. Padding does not count. A decoder's own rows are
taken to end with their last id that is not 0. As in the released code n is compared as it is summed, not brought to one length token by token. Embeddings, norms,
biases and the head are frozen, where the paper trains them along.

When not to use it: where a promise is needed. A row that one task moved is open to the next wherever it is large again: forgetting is made less likely, not bounded.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from .. import distributed
from ..batches import IGNORED
from ..errors import ConfigError
from ..models import logical
from ..optim import rounding
from ..subspace import Constraint, working_dtype
from ._layers import LayerOptions, OverLayers
from .base import Memory


class MIGUOptions(LayerOptions):
    share: float = Field(0.3, gt=0, le=1)
    """Share of a layer's output units whose weights may change in a step (paper: 0.3)."""


class MIGU(OverLayers):
    name = "migu"
    summary = "magnitude-based updating: only the weights behind a layer's largest outputs change in a step"
    paper = "arXiv 2406.17245"
    Options = MIGUOptions

    def __init__(self, /, **options: Any):
        super().__init__(**options)
        self.sums: dict[str, Tensor] = {}  # layer -> n (out,) of this step
        self.permits: dict[
            str, tuple[Constraint, torch.Size, bool]
        ] = {}  # layer -> the optimizer's constraint, its weight's shape as stored, is that (in, out)?
        self.hooks: list[Any] = []

    def begin_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        return self.watch(model, memory)

    def resume_task(self, model: nn.Module, task: Any, memory: Memory, state: dict[str, Tensor]) -> nn.Module:
        return self.watch(model, memory)  # a checkpoint stands between two steps, where nothing is summed up

    def end_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        self.unwatch()
        memory.info["migu"] = {"tasks": memory.info.get("migu", {}).get("tasks", 0) + 1}
        return model

    def optimizer(self, groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
        if settings.get("precision") == "kahan" and any(rounding.is_coarse(p) for group in groups for p in group["params"]):
            raise ConfigError(
                "method migu: precision: kahan may add to a masked row what rounding lost in an earlier step; take fp32_master, the default"
            )
        optimizer = super().optimizer(groups, **settings)
        # the constraints as the optimizer has turned and moved them; not its groups, which a reload replaces, and which would keep its state alive
        held = [
            (group["names"][0].removesuffix(".weight"), group["constraint"], group["params"][0].shape, group["flipped"])
            for group in optimizer.param_groups
        ]
        self.permits = {name: (constraint, shape, turned) for name, constraint, shape, turned in held}
        optimizer.register_step_post_hook(partial(_open, [constraint for _, constraint, *_ in held]))
        return optimizer

    @torch.no_grad()
    def on_step(self, model: nn.Module) -> None:
        if not self.sums or not self.permits:
            return
        distributed.add_up(list(self.sums.values()))
        for name, (constraint, shape, turned) in self.permits.items():
            n = self.sums[name]
            rows = torch.zeros_like(n, dtype=torch.bool)
            rows[n.topk(max(1, round(self.options.share * len(n)))).indices] = True
            constraint.mask = (rows[None, :] if turned else rows[:, None]).expand(shape)  # until the step is taken
        for n in self.sums.values():
            n.zero_()

    def statistics_bytes(self, model: nn.Module) -> int:
        return sum(logical(m.weight, m).shape[0] * working_dtype(m.weight.dtype).itemsize for m in self.layers(model).values())

    # -- magnitudes ------------------------------------------------------------------------------------------------------------------

    def watch(self, model: nn.Module, memory: Memory) -> nn.Module:
        """Sum up what the layers give out whenever the model is read to be trained; nothing before a task is learned."""
        self.unwatch()
        if not memory.info.get("migu"):
            return model
        layers = self.layers(model)
        self.sums = {name: m.weight.new_zeros(logical(m.weight, m).shape[0], dtype=working_dtype(m.weight.dtype)) for name, m in layers.items()}
        self.hooks = _sum_up(model, layers, self.sums)
        return model

    def unwatch(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.sums, self.permits, self.hooks = {}, {}, []


def _open(constraints: list[Constraint], *_: Any) -> None:
    """Between steps nothing is closed: what was in one step says nothing of the task, and a leak measured against it would not either."""
    for constraint in constraints:
        constraint.mask = None


def _sum_up(model: nn.Module, layers: dict[str, nn.Module], sums: dict[str, Tensor]) -> list[Any]:
    """Hooks that add sum |h| over the tokens that are no padding to `sums` whenever `model` is called with gradients on. Not in between: not when gradient
    checkpointing computes a block again."""
    real: dict[str, Any] = {}  # while the model runs: which tokens are no padding, of what the encoder reads and of what the decoder does
    encoder = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else None
    encoding = {id(m) for m in encoder.modules()} if encoder is not None else set()

    def begin(module: nn.Module, args: Any, given: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            mask, answer, labels = (given.get(key) for key in ("attention_mask", "decoder_input_ids", "labels"))
            real["read"] = real["text"] = None if mask is None else mask.bool()
            if encoder is not None and answer is None and labels is not None:  # the model makes its decoder's tokens of them, shifted by one
                real["text"] = labels != IGNORED
            elif answer is not None:
                real["text"] = (answer != 0).flip(1).cumsum(1).flip(1) > 0
                real["text"][:, 0] = True  # the start token may be 0

    def encoded(module: nn.Module, args: Any, output: Any) -> None:
        real["states"] = output[0]

    def add(name: str, module: nn.Module, args: tuple[Tensor, ...], h: Tensor) -> None:
        if "text" not in real:
            return
        of_encoder = id(module) in encoding or args[0] is real.get("states")  # keys and values of cross-attention read what the encoder wrote
        mask, size = real["read" if of_encoder else "text"], h.detach().abs().reshape(-1, h.shape[-1])
        if mask is not None and mask.numel() == len(size):  # of experts each reads some tokens only
            size.masked_fill_(~mask.reshape(-1, 1), 0)
        sums[name] += size.sum(0, dtype=sums[name].dtype)

    def end(*_: Any) -> None:
        real.clear()

    hooks = [model.register_forward_pre_hook(begin, with_kwargs=True), model.register_forward_hook(end, always_call=True)]
    hooks += [encoder.register_forward_hook(encoded)] if encoder is not None else []
    return hooks + [m.register_forward_hook(partial(add, name)) for name, m in layers.items()]

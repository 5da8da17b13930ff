"""Gates of low-rank branches: a number in [0, 1] for each row and task, from the row's prompt alone. What the method `gainlora` trains and asks.

    p_0 = the mean embedding of the prompt's tokens (d), brought to mean square 1     p_l = silu(G_l p_{l-1})     g = |2 sigmoid(G_{L+1} p_L) - 1|

with L = 2, G_1 (h x d), G_2 (d x h), G_3 (1 x d), and so g = 0 where G_3 p_2 = 0. Gates are computed in fp32 or better, also under autocast.

While a task trains, hooks compute the gates of each row of a batch before its forward pass and weigh the branches by them. For that they have to know where a prompt ends,
which batches.forward tells a model that asks for it. At test time a row's gates are known before, and its branches go beside the weights as one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import ADAPTER, adapters, carrying
from .batches import IGNORED, LABELS_SEEN, is_seq2seq
from .errors import ConfigError
from .subspace import working_dtype

Branches = dict[str, tuple[Tensor, Tensor]]  # of several tasks side by side: {layer: (A (tasks r, in), s B (out, tasks r))}


def pooled(model: nn.Module, ids: Tensor, prompt: Tensor) -> Tensor:
    """p_0 (B, d) of the tokens ids (B, L) where prompt (B, L) is true; a row without one has p_0 = 0."""
    with torch.no_grad():
        x = model.get_input_embeddings()(ids)  # (B, L, d)
        x = x.to(working_dtype(x.dtype)).masked_fill(~prompt[..., None], 0)
        mean = x.sum(1) / prompt.sum(1, keepdim=True).clamp_min(1)
        return mean / mean.square().mean(1, keepdim=True).sqrt().clamp_min(torch.finfo(mean.dtype).tiny)


def prompts_pooled(model: nn.Module, prompts: Iterable[list[int]]) -> Iterator[Tensor]:
    """p_0 (1, d) of each prompt."""
    device = next(model.parameters()).device
    for ids in prompts:
        row = torch.tensor([ids], device=device)
        yield pooled(model, row, torch.ones_like(row, dtype=torch.bool))


def before_the_answer(labels: Tensor) -> Tensor:
    """(B, L), true before the last run of labels (B, L) begins: the answer to what comes before it, earlier turns of a conversation too. All, where there is no label."""
    learned = labels != IGNORED
    begins = learned & ~torch.nn.functional.pad(learned, (1, 0))[:, :-1]
    place = torch.arange(labels.shape[1], device=labels.device)
    last = torch.where(begins, place, -1).amax(1, keepdim=True)
    return (place < last) | (last < 0)


def activations(G: Sequence[Tensor], p: Tensor) -> list[Tensor]:
    """[p_0, ..., p_L], the inputs of G_1 ... G_{L+1}, for p_0 (B, d)."""
    found = [p]
    for matrix in G[:-1]:
        found.append(nn.functional.silu(found[-1] @ matrix.mT))
    return found


def gate(G: Sequence[Tensor], p: Tensor) -> Tensor:
    """g (B, 1) of p_0 (B, d)."""
    return torch.tanh(activations(G, p)[-1] @ G[-1].mT / 2).abs()  # |2 sigmoid(b) - 1|


class Gates(nn.Module):
    """The gate that learns, `new`, and those of earlier tasks, `old`; values: what they said of the last batch's rows, (B, 1, tasks), the new one's last."""

    def __init__(self, new: Sequence[Tensor], old: Sequence[Sequence[Tensor]]):
        super().__init__()
        self.new = nn.ParameterList(nn.Parameter(G) for G in new)
        self.old = old  # memory has them
        self.values: Tensor | None = None
        self.handles: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"values": None}  # of a graph, which no copy of a model can have

    def forward(self, p: Tensor) -> Tensor:
        """(B, 1, tasks) of p_0 (B, d)."""
        with torch.autocast(p.device.type, enabled=False):
            return torch.cat([gate(G, p) for G in (*self.old, tuple(self.new))], 1)[:, None]


def put_on(model: nn.Module, place: str, gates: Gates, old: Branches) -> None:
    """Give a model with adapters the module `gates` under the name `place`, and weigh each row's branches: the adapters, which are new, and the old ones."""
    model.add_module(place, gates)
    seq2seq = is_seq2seq(model)
    setattr(model, LABELS_SEEN, not seq2seq)
    gates.handles = [model.register_forward_pre_hook(partial(_look, gates, seq2seq), with_kwargs=True)]
    for name, layer in adapters(model).items():
        layer.lora_A[ADAPTER].register_forward_hook(partial(_weigh, gates))  # goes with the adapter
        if name in old:
            gates.handles.append(layer.register_forward_hook(partial(_old_beside, gates, *old[name])))


def take_off(model: nn.Module, place: str) -> None:
    """Undo put_on, but for what goes with the adapters."""
    for handle in model.get_submodule(place).handles:
        handle.remove()
    delattr(model, place)
    delattr(model, LABELS_SEEN)


def _look(gates: Gates, seq2seq: bool, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    kwargs = dict(kwargs)
    labels = kwargs.pop(LABELS_SEEN, kwargs.get("labels"))
    ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
    if mask is None and kwargs.get("position_ids") is not None:
        raise ConfigError("packing: packed rows are one row to a model, and method gainlora has a gate for each; take packing out")
    prompt = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if labels is not None and not seq2seq:
        prompt = prompt & before_the_answer(labels)
    gates.values = gates(pooled(model, ids, prompt))
    return args, kwargs


def _of_rows(gates: Gates, x: Tensor) -> Tensor:
    if x.ndim != 3 or len(x) != len(gates.values):
        raise ConfigError(
            f"method.lora_modules: a layer reads inputs of shape {tuple(x.shape)}, in which the {len(gates.values)} rows of a batch cannot be told apart "
            "to be weighed by their gates; leave it out"
        )
    return gates.values


def _weigh(gates: Gates, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output * _of_rows(gates, output)[..., -1:]


def _old_beside(gates: Gates, A: Tensor, B: Tensor, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    old = _of_rows(gates, output)[..., :-1].detach()
    x = nn.functional.linear(args[0].to(A.dtype), A)  # (B, L, tasks r)
    return (output + nn.functional.linear(x * old.repeat_interleave(A.shape[0] // old.shape[-1], -1), B)).to(output.dtype)


@contextlib.contextmanager
def weighed(model: nn.Module, branches: Branches, values: Tensor) -> Iterator[nn.Module]:
    """The plain model with all branches, weighed by the gates `values` (tasks) of one row, while this is open."""
    increments = {name: (A, B * values.to(B.dtype).repeat_interleave(A.shape[0] // len(values))) for name, (A, B) in branches.items()}
    with carrying(model, increments):
        yield model

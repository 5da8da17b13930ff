"""Soft prompts: vectors in front of a model's input embeddings (Lester et al. 2021, arXiv 2104.08691), put there by hooks while the model stays what it is.

Whoever calls the model gives and gets what it would without them: token ids, a mask and positions of the text alone, logits of the text alone, and a cache that may be
gone on from. Decoder-only: the n vectors P take positions 0 to n - 1, those of the text begin at n; they stand before a row's padding, which the mask hides and
the positions do not count. Encoder-decoder: they stand in front of what the encoder reads, and the decoder sees them there.

PEFT's prompt tuning drops position_ids, and with them the answers of every row that is padded on the left; its prefix would also have to be told to the scorer's cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .batches import IGNORED, is_seq2seq, takes
from .errors import ConfigError

Vectors = Callable[[], Tensor]  # gives P (n, d)


def check(model: nn.Module) -> None:
    """Raise ConfigError for a model whose text cannot be moved along by position_ids."""
    if not is_seq2seq(model) and not takes(type(model), "position_ids"):
        raise ConfigError(
            f"method prompt: {type(model).__name__} takes no position_ids, so nothing can be put in front of padded rows; choose another method"
        )


@contextlib.contextmanager
def prompted(model: nn.Module, P: Tensor) -> Iterator[nn.Module]:
    """The model with the vectors P (n, d) in front of every input while this is open."""
    P = P.to(next(model.parameters()).device)
    handles = put_in_front(model, lambda: P, len(P))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def put_in_front(model: nn.Module, vectors: Vectors, n: int) -> list[RemovableHandle]:
    """Hooks that put the n vectors that vectors() gives in front of every input of the model from now on."""
    if is_seq2seq(model):
        return [
            model.get_encoder().register_forward_pre_hook(partial(_encode, vectors, n), with_kwargs=True),
            model.get_decoder().register_forward_pre_hook(partial(_see, n), with_kwargs=True),
        ]
    return [
        model.register_forward_pre_hook(partial(_begin, vectors, n), with_kwargs=True),
        model.register_forward_hook(partial(_without, n), with_kwargs=True),
    ]


def _embedded(model: nn.Module, ids: Tensor, P: Tensor) -> Tensor:
    text = model.get_input_embeddings()(ids)  # (B, L, d)
    return torch.cat([P.to(text.dtype).expand(len(ids), *P.shape), text], 1)


def _begin(vectors: Vectors, n: int, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Of a decoder-only model: in front of a text that begins; to one that goes on from a cache, which holds them, only as positions and mask."""
    kwargs = dict(kwargs)
    cache, mask, positions = (kwargs.get(key) for key in ("past_key_values", "attention_mask", "position_ids"))
    if mask is None and positions is not None:
        raise ConfigError("packing: packed rows have one beginning, and method prompt puts its vectors in front of each; take packing out")
    if mask is not None:
        seen = mask.new_zeros if mask.is_floating_point() else mask.new_ones  # a mask of numbers is added to the attention's scores
        kwargs["attention_mask"] = torch.cat([seen(*mask.shape[:-1], n), mask], -1)
    if positions is not None:
        kwargs["position_ids"] = positions + n
    if cache is not None and cache.get_seq_length():
        return args, kwargs
    ids = kwargs.pop("input_ids")
    kwargs["inputs_embeds"] = _embedded(model, ids, vectors())
    if positions is not None:
        kwargs["position_ids"] = torch.cat([torch.arange(n, device=ids.device).expand(len(ids), n), kwargs["position_ids"]], 1)
    if kwargs.get("labels") is not None:
        kwargs["labels"] = torch.cat([kwargs["labels"].new_full((len(ids), n), IGNORED), kwargs["labels"]], 1)
    return args, kwargs


def _without(n: int, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Logits of all positions are of the text alone."""
    if "inputs_embeds" in kwargs and not kwargs.get("logits_to_keep"):
        output.logits = output.logits[:, n:]
    return output


def _encode(vectors: Vectors, n: int, encoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    kwargs = dict(kwargs)
    ids, mask = kwargs.pop("input_ids"), kwargs.get("attention_mask")
    kwargs["inputs_embeds"] = _embedded(encoder, ids, vectors())
    if mask is not None:
        kwargs["attention_mask"] = torch.cat([mask.new_ones(len(ids), n), mask], 1)
    return args, kwargs


def _see(n: int, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The decoder's mask of what the encoder has read is the caller's, of the text alone."""
    mask = kwargs.get("encoder_attention_mask")
    if mask is None:
        return args, kwargs
    return args, kwargs | {"encoder_attention_mask": torch.cat([mask.new_ones(len(mask), n), mask], 1)}

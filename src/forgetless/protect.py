"""Protect what a model can do before anything is trained: the input spaces of given prompts (`protect_from`), for skills that nobody trained here.

For each layer the prompts' input vectors x (one a token, brought to length 1, so that a few huge ones do not own the space) are summed up as sum x x^T; its leading
directions, as many as hold the share `energy`, are the space. Later updates keep dW V = 0 there, as with the spaces of learned tasks.
"""

from __future__ import annotations

import hashlib
import json
import logging
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Readable, read
from .chat import parse
from .errors import DataError, nearest
from .products import add_product_
from .rows import raw_rows, text_of
from .subspace import Subspace, extend, working_dtype

log = logging.getLogger(__name__)
COLUMNS = ("messages", "prompt", "text", "sentence")
MAX_TOKENS = 512  # a prompt's last ones
STRIP = 192  # rows of a Gram matrix that are summed up at once


def read_prompts(source: str) -> list[Any]:
    """The prompts of a data source (rows.py says which there are): text, or messages, from the first of the columns messages, prompt, text, sentence a row has."""
    prompts = []
    for place, row in raw_rows(source, "protect_from"):
        column = next((c for c in COLUMNS if isinstance(row, dict) and c in row), None)
        if column is None:
            raise DataError(
                f"{place}: a prompt is a row with {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}{nearest('prompt', row) if isinstance(row, dict) else ''}"
            )
        prompts.append(parse(place, column, row[column]) if column == "messages" else text_of(place, column, row[column]))
    if not prompts:
        raise DataError(f"protect_from: {source} has no rows")
    return prompts


def fingerprint(prompts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(prompts, ensure_ascii=False).encode()).hexdigest()


def encode(tokenizer, prompt: Any) -> list[int]:
    """Token ids of a text, or of a conversation through the chat template, at most the last MAX_TOKENS."""
    if isinstance(prompt, str):
        return tokenizer(prompt).input_ids[-MAX_TOKENS:]
    if not tokenizer.chat_template:
        raise DataError("protect_from: the rows are conversations and the model's tokenizer has no chat template; give rows with a prompt or text")
    ids = tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in prompt], tokenize=True, return_dict=True)["input_ids"]
    return list(ids)[-MAX_TOKENS:]


class Sum:
    """X^T X summed over many X (tokens, n): the rows themselves, until they are more than n; from then on the matrix (n, n), which is as large."""

    def __init__(self, like: Tensor):
        self.rows, self.gram = like.new_zeros(0, like.shape[1]), None

    def add(self, X: Tensor) -> None:
        if self.gram is None:
            X = self.rows = torch.cat([self.rows, X])
            if X.shape[0] <= X.shape[1]:
                return
            self.rows, self.gram = X[:0].clone(), X.new_zeros(X.shape[1], X.shape[1])
        Xt = X.mT.contiguous()
        for i in range(0, len(Xt), STRIP):  # the matrix is symmetric: what lies left of a strip's own square is made of the rest at the end
            add_product_(self.gram[i : i + STRIP, i:], Xt[i : i + STRIP], Xt[i:].mT)

    @property
    def of(self) -> tuple[Tensor, bool]:
        """What was summed, and whether it is the matrix."""
        return (self.rows, False) if self.gram is None else (self.gram.triu() + self.gram.triu(1).mT, True)


@torch.inference_mode()
def input_spaces(
    model: nn.Module,
    layers: dict[str, nn.Module],
    prompts: list[Readable],
    energy: float,
    *,
    max_rank: int | None = None,
    max_share: float | None = None,
    known: dict[str, Subspace] | None = None,
    normalise: bool = True,
    autocast: bool = False,
    advance=None,
) -> dict[str, Subspace]:
    """{layer name: space (in, k) that holds the share `energy` of its inputs on `prompts`, or rows}. advance(done) is called after each batch of them.

    known: spaces to start from; what they hold already counts. A space is bounded by max_rank directions, or by the share max_share of a layer's; beyond it the
    weakest are given up, of the known ones too. normalise: each input vector is brought to length 1 first. autocast: the inputs as they are under bf16 autocast.
    """
    sums, same = input_sums(model, layers, prompts, normalise=normalise, autocast=autocast, advance=advance)
    spaces, evicted = {}, 0
    for name in list(sums):
        A, gram = sums.pop(name).of  # let go one after another
        space = (known or {}).get(name) or Subspace.empty(A.shape[1])
        bound = max_rank if max_share is None else int(max_share * A.shape[1])
        space, lost = extend(space.to(A), A, energy, max_rank=bound, gram=gram)
        spaces[name], evicted = space.to("cpu"), evicted + lost
    if evicted:
        log.warning("input spaces are bounded (max_rank or max_share): %d directions of least energy were given up and are not protected", evicted)
    return spaces | {name: Subspace(spaces[other].basis.clone(), spaces[other].energy.clone()) for name, other in same.items()}


@torch.inference_mode()
def input_sums(
    model: nn.Module, layers: dict[str, nn.Module], prompts: list[Readable], normalise: bool = False, autocast: bool = False, advance=None
) -> tuple[dict[str, Sum], dict[str, str]]:
    """({layer name: its inputs summed up as X^T X}, {layer: another that reads the same inputs, and has them}) on `prompts`, or rows.

    normalise: each input vector brought to length 1. autocast: as they are under bf16 autocast. Sums are in fp32 or better. advance(done) is called after each batch.
    """
    seen: dict[str, Sum] = {}
    same: dict[str, str] = {}  # a layer that reads what the one before it reads (key and value after query, up after gate) -> that one
    last: list[Any] = [None, ""]

    def hook(name: str):
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args[0] is last[0]:
                same[name] = last[1]
                return
            last[:] = args[0], name
            X = args[0].detach().reshape(-1, args[0].shape[-1])
            X = X.to(working_dtype(X.dtype))
            if normalise:
                X = X / torch.linalg.vector_norm(X, dim=1, keepdim=True).clamp_min(torch.finfo(X.dtype).tiny)
            seen.setdefault(name, Sum(X)).add(X)

        return see

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        read(model, prompts, advance, whole=model.get_output_embeddings() in layers.values(), autocast=autocast)
    finally:
        for handle in handles:
            handle.remove()
    return seen, same

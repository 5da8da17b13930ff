"""Rows as padded or packed batches, and the loss on their answers: for decoder-only models in one sequence, for encoder-decoder ones the prompt to the encoder."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError
from .tasks import Example, Task

IGNORED = -100  # cross_entropy's ignore_index
READ_TOKENS = 1024  # that go through a model at a time where it only reads: below, a CPU waits for its weights
LABELS_SEEN = (
    "labels_seen"  # set to True on a model by who hooks its forward: the batch's labels come along under this name, for the hook to take out again
)
NO_PACKING = "packing: an encoder-decoder model reads prompts and answers apart and cannot take several rows as one; take it out"


Encodable = Example | dict[str, list[int]]  # a row of the task at hand, or any row that is encoded already: {"input_ids", "labels"}


class Encoded(torch.utils.data.Dataset):
    """Rows tokenised when they are asked for: 40 steps of 8 need not read 5,000."""

    def __init__(self, task: Task, tokenizer, rows: list[Encodable]):
        self.task, self.tokenizer, self.rows = task, tokenizer, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        row = self.rows[i]
        return row if isinstance(row, dict) else self.task.encode(self.tokenizer, row)


class Collate:
    """Batches of encoded rows {"input_ids", "labels"}: padded, where padding is masked by position, never by id (pad may be eos), or packed.

    Decoder-only: padded on the left, so that answers end together. Encoder-decoder (`seq2seq`): input_ids is the prompt, labels and decoder_input_ids (the
    answer shifted right, beginning with the model's start token) are the answer, padded on the right.
    Packed (`packing`, decoder-only): all rows in one sequence (1, L) without padding or mask; each row's positions begin at 0, by which transformers' attention
    keeps them apart. check_packing says whether a model does.
    """

    def __init__(self, model: nn.Module, packing: bool = False):
        self.seq2seq, self.packing = is_seq2seq(model), packing
        if self.seq2seq:
            config = model.config
            first = getattr(config, "decoder_start_token_id", None)
            self.first = first if first is not None else config.pad_token_id

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        if self.packing:
            ids = torch.tensor([[t for r in rows for t in r["input_ids"]]])
            labels = torch.tensor([[t for r in rows for t in (IGNORED, *r["labels"][1:])]])  # nothing foretells a first token
            positions = torch.cat([torch.arange(len(r["input_ids"])) for r in rows])[None]
            return {"input_ids": ids, "labels": labels, "position_ids": positions}
        if not self.seq2seq:
            ids, mask = padded([r["input_ids"] for r in rows], left=True)
            labels, _ = padded([r["labels"] for r in rows], left=True, fill=IGNORED)
            return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0), "labels": labels}
        cuts = [next(i for i, label in enumerate(r["labels"]) if label != IGNORED) for r in rows]
        ids, mask = padded([r["input_ids"][:k] for r, k in zip(rows, cuts, strict=True)])
        labels, _ = padded([r["labels"][k:] for r, k in zip(rows, cuts, strict=True)], fill=IGNORED)
        given, _ = padded([[self.first, *r["input_ids"][k:-1]] for r, k in zip(rows, cuts, strict=True)])
        return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": given, "labels": labels}


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Raise ConfigError unless a packed row's loss is the same whatever row stands before it, but for rounding (a router's experts round by how many tokens they get)."""
    if is_seq2seq(model):
        raise ConfigError(NO_PACKING)
    if any(b.ndim == 4 and b.shape[-1] == b.shape[-2] > 1 for b in model.buffers()):
        raise ConfigError(f"packing: {type(model).__name__} holds a mask of fixed length, which packed rows would outgrow; take it out")
    collate, device, was_training = Collate(model, packing=True), next(model.parameters()).device, model.training
    model.eval()
    try:
        losses = []
        for token in (0, 1, 2):
            before = {"input_ids": [token] * 5, "labels": [IGNORED] * 5}
            batch = collate([before, {"input_ids": [0, 1, 2, 1], "labels": [IGNORED, IGNORED, 2, 1]}])
            losses.append(float(answer_loss(model, {key: value.to(device) for key, value in batch.items()})[0]))
    finally:
        model.train(was_training)
    if not max(losses) - min(losses) <= 2e-6 * max(losses):
        raise ConfigError(
            f"packing: {type(model).__name__} reads packed rows as one text, so that each would learn from the one before it; take it out"
        )


def padded(sequences: list[list[int]], left: bool = False, fill: int = 0) -> tuple[Tensor, Tensor]:
    """(ids (B, L), mask (B, L): 1 where a real token stands)."""
    length = max(map(len, sequences))
    ids = torch.full((len(sequences), length), fill, dtype=torch.long)
    mask = torch.zeros(len(sequences), length, dtype=torch.long)
    for i, s in enumerate(sequences):
        where = slice(length - len(s), None) if left else slice(len(s))
        ids[i, where], mask[i, where] = torch.tensor(s, dtype=torch.long), 1
    return ids, mask


def is_seq2seq(model: nn.Module) -> bool:
    return bool(getattr(unwrapped(model).config, "is_encoder_decoder", False))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


@lru_cache
def takes(kind: type, argument: str) -> bool:
    """Does the forward of this class of models have such an argument?"""
    return argument in inspect.signature(kind.forward).parameters


def known(model: nn.Module, **arguments: Any) -> dict[str, Any]:
    """The arguments that this model's forward knows: not every architecture has position_ids or logits_to_keep."""
    return {key: value for key, value in arguments.items() if takes(type(unwrapped(model)), key)}


def forward(model: nn.Module, batch: dict[str, Tensor], logits_to_keep: int | Tensor = 0, weights: dict[str, Tensor] | None = None) -> Any:
    """The model's output for a batch of Collate; where the model can, logits of the last `logits_to_keep` positions only (0: of all), or of those listed.

    weights: by name, in the place of the model's own for this once.
    """
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    arguments = known(model, **inputs, logits_to_keep=logits_to_keep) | {"use_cache": False}
    if "labels" in batch and getattr(unwrapped(model), LABELS_SEEN, False):
        arguments[LABELS_SEEN] = batch["labels"]
    return model(**arguments) if weights is None else torch.func.functional_call(unwrapped(model), weights, kwargs=arguments)


Readable = list[int] | dict[str, list[int]]  # a prompt's token ids, or an encoded row with its answer


def read(model: nn.Module, prompts: list[Readable], advance: Any = None, whole: bool = False, autocast: bool = False) -> None:
    """Pass prompts or rows through the model in eval mode, for hooks to look at. advance(done) after each batch. whole: the head reads every position, not the last alone.

    Rows of one length go together, READ_TOKENS at a time and a row at least: nothing is padded, so whatever a layer is given is of these rows, in whatever order a model
    passes its tokens on. An encoder-decoder is read one row at a time, and its decoder reads the row's answer, as in training; of a prompt, which has none, its first token.

    autocast: in bf16, as a run that trains under bf16 autocast does, where the rows' inputs are the ones the layers have in training.
    """
    device, was_training, collate, done = next(model.parameters()).device, model.training, Collate(model), 0
    model.eval()
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            for rows in [[item] for item in prompts] if collate.seq2seq else _alike(prompts):
                forward(model, {key: value.to(device) for key, value in _readable(collate, rows).items()}, logits_to_keep=0 if whole else 1)
                done += len(rows)
                if advance:
                    advance(done)
    finally:
        model.train(was_training)


def _alike(prompts: list[Readable]) -> Iterator[list[Readable]]:
    """All of them, the shortest first, in lists of one length and at most READ_TOKENS."""
    for length, found in itertools.groupby(sorted(prompts, key=lambda item: len(_ids(item))), key=lambda item: len(_ids(item))):
        rows, most = list(found), max(1, READ_TOKENS // max(1, length))
        yield from (rows[i : i + most] for i in range(0, len(rows), most))


def _ids(item: Readable) -> list[int]:
    return item["input_ids"] if isinstance(item, dict) else item


def _readable(collate: Collate, rows: list[Readable]) -> dict[str, Tensor]:
    """A batch, without labels, of rows or prompts of one length."""
    if not collate.seq2seq:
        return {"input_ids": torch.tensor([_ids(item) for item in rows])}
    (item,) = rows
    return collate(rows) if isinstance(item, dict) else {"input_ids": torch.tensor([item]), "decoder_input_ids": torch.tensor([[collate.first]])}


def answer_loss(model: nn.Module, batch: dict[str, Tensor], num_items: Tensor | int | None = None) -> tuple[Tensor, Any]:
    """Mean cross-entropy of the answer tokens: sum over them / num_items (all answer tokens of the optimizer step), or / their own number.

    outputs is the model's own.
    """
    logits, target, outputs = answer_logits(model, batch)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), target.reshape(-1), ignore_index=IGNORED, reduction="sum")
    return loss / (num_items if num_items is not None else (batch["labels"] != IGNORED).sum()), outputs


def answer_logits(
    model: nn.Module, batch: dict[str, Tensor], outputs: Any = None, weights: dict[str, Tensor] | None = None
) -> tuple[Tensor, Tensor, Any]:
    """(logits (B, T, vocab) where the answers are, the tokens they foretell (B, T), IGNORED where there is none, the model's output).

    A decoder-only row is padded on the left, so answers end together and the head runs over the last few positions only; of packed rows over those before a
    token of an answer. outputs: what the model gave for this batch here before, so that it need not be asked again. weights: as for forward().
    """
    labels = batch["labels"]  # (B, L)
    if is_seq2seq(model):
        outputs = forward(model, batch, weights=weights) if outputs is None else outputs
        logits, target = outputs.logits, labels
    elif "attention_mask" not in batch:  # packed
        learned = (labels[0] != IGNORED).nonzero()[:, 0]
        outputs = forward(model, batch, logits_to_keep=learned - 1, weights=weights) if outputs is None else outputs
        logits, target = outputs.logits, labels[:, learned]
        logits = logits if logits.shape[1] == len(learned) else logits[:, learned - 1]
    else:
        seen = (labels != IGNORED).any(0)  # an answer may have gaps: earlier turns of a conversation
        answer = labels.shape[1] - int(seen.to(torch.int8).argmax())  # position t predicts token t + 1
        outputs = forward(model, batch, logits_to_keep=answer + 1, weights=weights) if outputs is None else outputs
        logits, target = outputs.logits[:, -answer - 1 : -1], labels[:, -answer:]
    return logits, target, outputs

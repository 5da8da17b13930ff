"""What a model says of itself, as token ids: its greedy answers to prompts, and whole rows that it makes up by sampling. For methods that train on it.

Several processes share the prompts and end with the same answers. A sampled token is where a uniform number, drawn beforehand for its row and place, falls among the
cumulated probabilities: so what is drawn depends neither on batches nor on the number of processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .. import chat, distributed
from ..batches import IGNORED, Collate, padded
from ..errors import ConfigError
from ..models import positions
from ._statistics import Row

BATCH = 16
USER = "\ue000"  # of Unicode's private use: stands where a chat template puts what the user says


@torch.no_grad()
def answers(
    model: nn.Module, prompts: list[list[int]], ends: list[int], longest: int, *, draws: Tensor | None = None, temperature: float = 1.0,
    advance: Callable[[int], None] | None = None,
) -> list[list[int]]:  # fmt: skip
    """What the model says after each prompt, up to and with the row's own token of `ends`, at most `longest` tokens and no more than it has positions for.

    Greedy; with draws (rows, longest), uniform in [0, 1), sampled at `temperature`. advance(done) after each batch.
    """
    limit, found, was_training = positions(model), [], model.training
    room = [longest if limit is None else min(longest, limit - len(prompt)) for prompt in prompts]
    mine = sorted(distributed.shared(range(len(prompts))), key=lambda i: (ends[i], len(prompts[i])))  # rows of one end together, and little padding
    model.eval()
    try:
        with _own_settings(model):
            while mine:
                batch = [i for i in mine[:BATCH] if ends[i] == ends[mine[0]] and room[i] == longest] or mine[:1]  # with less room each ends elsewhere
                mine, first = mine[len(batch) :], batch[0]
                drawn = draws if draws is None else draws[batch]
                said = _say(model, [prompts[i] for i in batch], ends[first], room[first], drawn, temperature) if room[first] > 0 else [[]]
                found += zip(batch, said, strict=True)
                if advance:
                    advance(len(found) * distributed.world_size())
    finally:
        model.train(was_training)
    return [said for _, said in sorted(distributed.gathered(found), key=lambda pair: pair[0])]


@contextlib.contextmanager
def _own_settings(model: nn.Module) -> Iterator[None]:
    """Without the settings a model brings (a repetition penalty, a temperature, top_k), which would be in what it says and be trained into it."""
    from transformers import GenerationConfig

    brought = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = brought


def _say(model: nn.Module, prompts: list[list[int]], end: int, longest: int, draws: Tensor | None, temperature: float) -> list[list[int]]:
    from transformers import GenerationConfig

    collate = Collate(model)
    device = next(model.parameters()).device
    ids, mask = (t.to(device) for t in padded(prompts, left=not collate.seq2seq))
    start = {"decoder_start_token_id": collate.first} if collate.seq2seq else {}
    settings = GenerationConfig(max_new_tokens=longest, do_sample=False, eos_token_id=end, pad_token_id=end, **start)
    choose = [] if draws is None else [_draw(draws, temperature)]
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, logits_processor=choose)
    said = out[:, 1 if collate.seq2seq else ids.shape[1] :].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in said]


def _draw(draws: Tensor, temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    """A logits processor after which the greedy choice is the drawn one."""
    places = iter(draws.mT)

    def choose(ids: Tensor, scores: Tensor) -> Tensor:
        cumulated = (scores.float().cpu().double() / temperature).softmax(-1).cumsum(-1)  # (B, vocab); MPS has no fp64
        token = torch.searchsorted(cumulated, next(places)[:, None] * cumulated[:, -1:], right=True).clamp_max(scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token.to(scores.device), 0.0)

    return choose


def made_up(
    model: nn.Module, tokenizer, count: int, longest: int, *, seed: int, temperature: float = 1.0, beginnings: list[str] | None = None,
    advance: Callable[[int], None] | None = None,
) -> list[Row]:  # fmt: skip
    """At most `count` rows that the model samples: what follows `beginnings`, in turn, each learned whole.

    Without beginnings: of a chat model what a user would say after the template's user header, then the answer to it, which alone is learned (Xu et al. 2024, arXiv
    2406.08464); of any other a text after bos (eos, where there is none). A turn in which the user says nothing makes no row.
    """
    first, second = torch.rand(2, count, longest, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    talks = not beginnings and bool(getattr(tokenizer, "chat_template", None))
    if talks:
        header, turn_end, end = _turns(tokenizer)
        starts = [header]
    elif beginnings:
        starts, turn_end = [tokenizer(text).input_ids for text in beginnings], tokenizer.eos_token_id
    else:
        starts, turn_end = [[tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]], tokenizer.eos_token_id
    prompts = [starts[i % len(starts)] for i in range(count)]
    said = answers(model, prompts, [turn_end] * count, longest, draws=first, temperature=temperature, advance=advance)
    if talks:
        texts = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in said]
        kept = [i for i, text in enumerate(texts) if text]
        prompts = [chat.prompt(tokenizer, (("user", texts[i]),), "a turn the model made up") for i in kept]
        said = answers(model, prompts, [end] * len(kept), longest, draws=second[kept], temperature=temperature, advance=advance)
    return [row_of(prompt, answer) for prompt, answer in zip(prompts, said, strict=True) if answer]


def row_of(prompt: list[int], answer: list[int]) -> Row:
    return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}


def _turns(tokenizer) -> tuple[list[int], int, int]:
    """(what the chat template writes before a user's first turn, the token that closes it, the token that closes an answer)."""
    where = "a conversation of one turn"
    before, found, after = chat.render(tokenizer, (("user", USER),), where, ask=True).partition(USER)
    header, closing = (tokenizer(text, add_special_tokens=False).input_ids for text in (before, after))
    special = set(tokenizer.all_special_ids) | {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if not found or not header:
        raise ConfigError(
            "mode: self_synthesised: the chat template writes nothing before a user's turn that a model could go on from; give seed_text"
        )
    end = chat.encode(tokenizer, (("user", "a"), ("assistant", "b")), where).end
    return header, next((token for token in closing if token in special), end), end

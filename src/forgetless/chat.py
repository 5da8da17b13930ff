"""A conversation as tokens, through the tokenizer's own chat template: what the assistant says in it, and where the prompt of its last turn ends.

Which tokens are the assistant's comes from the template's {% generation %} part where it has one. Elsewhere from prefixes: the conversation before a turn, with
what asks for an answer, and the conversation with that turn, must each begin the whole one; what lies between is the turn. A template that rewrites earlier turns
breaks that, and is refused rather than guessed about.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .errors import DataError, nearest
from .rows import text_of

Messages = tuple[tuple[str, str], ...]  # (role, content) in order; the last is the assistant's
ROLES = ("system", "user", "assistant")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Conversation:
    """ids end with the last assistant turn; said: [start, end) of each assistant turn, with the token that closes it, which is `end`."""

    ids: list[int]
    said: list[tuple[int, int]]
    end: int


def parse(place: str, column: str, value: Any) -> Messages:
    """The messages of one row, up to the assistant's last: what follows it has no answer to learn. Raises DataError naming row and message."""
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(f"{place}: '{column}' is {str(value)[:80]!r}; it must be a list of {{'role': ..., 'content': ...}}")
    messages = []
    for number, message in enumerate(value, 1):
        where = f"{place}, message {number}"
        if not isinstance(message, dict):
            raise DataError(f"{where}: expected {{'role': ..., 'content': ...}}, got {type(message).__name__}")
        for key in ("role", "content"):
            if key not in message:
                raise DataError(f"{where}: no '{key}'{nearest(key, message)}")
        if message["role"] not in ROLES:
            raise DataError(f"{where}: 'role' is {message['role']!r}; one of: {', '.join(ROLES)}")
        if message.get("tool_calls"):
            raise DataError(f"{where}: it calls tools, which format: messages does not read; drop the row")
        messages.append((message["role"], text_of(where, "content", message["content"])))
    while messages and messages[-1][0] != "assistant":
        messages.pop()
    if not messages:
        raise DataError(f"{place}: no message is the assistant's, so there is no answer to learn")
    if messages[0][0] == "assistant":
        raise DataError(f"{place}: the conversation begins with the assistant, so nothing asks for its answer")
    return tuple(messages)


def transcript(messages: Messages) -> str:
    """What stands before the last turn, as text to hash and to show."""
    return "\n".join(f"{role}: {content}" for role, content in messages[:-1])


def check_template(tokenizer) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "format: messages needs a chat template, and this model's tokenizer has none; take a chat or instruct model, or put chat_template into its tokenizer_config.json"
        )


def render(tokenizer, messages: Messages, where: str, ask: bool = False) -> str:
    """The conversation as text; `ask`: with what asks for the assistant's next turn."""
    check_template(tokenizer)
    try:
        return tokenizer.apply_chat_template(_dicts(messages), tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # a template may raise anything, on purpose or not
        raise DataError(f"{where}: the model's chat template refuses the conversation ({type(error).__name__}: {str(error)[:200]})") from error


def prompt(tokenizer, messages: Messages, where: str) -> list[int]:
    """Token ids of a conversation that waits for the assistant."""
    return _tokens(tokenizer, render(tokenizer, messages, where, ask=True))


def encode(tokenizer, messages: Messages, where: str) -> Conversation:
    """Token ids of a conversation and what of it is the assistant's. Raises DataError, beginning with `where`, when the template leaves that open."""
    turns = [i for i, (role, _) in enumerate(messages) if role == "assistant"]
    full = render(tokenizer, messages, where)
    special = _special(tokenizer)
    if tokenizer.is_fast and GENERATION.search(tokenizer.get_chat_template()):
        ids, said = _marked(tokenizer, messages)
        if len(said) != len(turns):
            raise DataError(f"{where}: the chat template's {{% generation %}} part marks {len(said)} turns, and {len(turns)} are the assistant's")
        end = next((t for t in reversed(ids[said[-1][0] :]) if t in special), None)
        if end is not None and any(end not in ids[start:stop] for start, stop in said):
            raise DataError(
                f"{where}: the chat template's {{% generation %}} part leaves out {tokenizer.decode([end])!r}, which closes a turn, so a model could not "
                "learn where an answer ends; put {% endgeneration %} behind it"
            )
    else:
        cuts = []
        for i in turns:
            before, after = render(tokenizer, messages[:i], where, ask=True), render(tokenizer, messages[: i + 1], where)
            if not (after.startswith(before) and full.startswith(after)):
                raise DataError(
                    f"{where}: the model's chat template writes the conversation before message {i + 1} differently once more follows, so which tokens are the "
                    "assistant's is not known; put {% generation %} ... {% endgeneration %} round the assistant's part of chat_template in tokenizer_config.json"
                )
            cuts += [len(before), len(after)]
        ids, said = _between(tokenizer, full, cuts)
        closing = [max((k for k in range(*turn) if ids[k] in special), default=None) for turn in said]
        end = None if None in closing else ids[closing[-1]]
        if end is not None:
            for k, (_, stop) in zip(closing, said, strict=True):
                if tokenizer.decode(ids[k + 1 : stop]).strip():
                    end = None  # a special token inside the turn, not at its end
            said = [(start, k + 1) for k, (start, _) in zip(closing, said, strict=True)]  # what the template puts between turns is not said
    if end is None:
        raise DataError(
            f"{where}: the model's chat template closes an assistant turn with no special token, so a model could not learn where an answer ends"
        )
    return Conversation(ids[: said[-1][1]], said, end)


def _marked(tokenizer, messages: Messages) -> tuple[list[int], list[tuple[int, int]]]:
    out = tokenizer.apply_chat_template(_dicts(messages), return_dict=True, return_assistant_tokens_mask=True)
    mask = [0, *out["assistant_masks"], 0]
    edges = [i for i in range(len(mask) - 1) if mask[i] != mask[i + 1]]
    return out["input_ids"], list(zip(edges[::2], edges[1::2], strict=True))


def _between(tokenizer, text: str, cuts: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of `text` and the places of its 1st to 2nd, 3rd to 4th, ... cut among them.

    As one text where its tokens keep to the cuts. Where one would reach across (an answer that begins with a line break, after a prompt that ends in one), piece
    by piece: a prompt must have the tokens it will have when nothing follows it yet.
    """
    ids, places = _tokens(tokenizer, text), []
    for cut in cuts:
        head = _tokens(tokenizer, text[:cut])
        if ids[: len(head)] != head:
            break
        places.append(len(head))
    if len(places) < len(cuts):
        ids, places = [], []
        for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
            ids += _tokens(tokenizer, text[start:stop])
            places.append(len(ids))
    return ids, list(zip(places[: len(cuts) : 2], places[1 : len(cuts) : 2], strict=True))


def _tokens(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids if text else []  # the template has put the special ones in


@lru_cache(maxsize=4)
def _special(tokenizer) -> frozenset[int]:
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}


def _dicts(messages: Messages) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in messages]

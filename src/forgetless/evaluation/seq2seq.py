"""The scorers' three steps for encoder-decoder models (T5): the encoder reads each prompt once, the decoder is asked about every label, or writes.

The counterparts of scorers._prefill, _likelihoods and _greedy; B prompts, K labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import Collate, padded


@dataclass
class Read:
    """Prompts as the encoder left them: hidden (B, P, width), mask (B, P) 1 where a real token stands."""

    hidden: Tensor
    mask: Tensor


def prefill(model: nn.Module, prompts: list[list[int]]) -> Read:
    device = next(model.parameters()).device
    ids, mask = (t.to(device) for t in padded(prompts))
    return Read(model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state, mask)


def likelihoods(model: nn.Module, state: Read, labels: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(log-probability of each whole label after each prompt (B, K), of its end token alone (B, K)); one label after another, B rows each."""
    device, first = state.mask.device, Collate(model).first
    whole, end = [], []
    for label in labels:
        given = torch.tensor([[first, *label[:-1]]], device=device).expand(state.mask.shape[0], -1)
        said = _decode(model, state, given).logits.float().log_softmax(-1)  # (B, len(label), vocab)
        picked = said[:, torch.arange(len(label)), label]  # (B, len(label))
        whole.append(picked.sum(1))
        end.append(picked[:, -1])
    return torch.stack(whole, 1), torch.stack(end, 1)


def greedy(model: nn.Module, tokenizer, state: Read, longest: int, end: int) -> list[str]:
    """Greedy answers up to the token `end`, or one token more than the longest answer needs (then it matches none)."""
    given = torch.full((state.mask.shape[0], 1), Collate(model).first, device=state.mask.device)
    done = torch.zeros(state.mask.shape[0], dtype=torch.bool, device=state.mask.device)
    tokens: list[list[int]] = [[] for _ in done]
    for _ in range(longest + 1):
        token = _decode(model, state, given).logits[:, -1].argmax(-1)
        done |= token == end
        if bool(done.all()):
            break
        for i in range(len(tokens)):
            if not done[i]:
                tokens[i].append(int(token[i]))
        given = torch.cat([given, token[:, None]], 1)
    return [tokenizer.decode(t, skip_special_tokens=True) for t in tokens]


def _decode(model: nn.Module, state: Read, given: Tensor) -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    encoded = BaseModelOutput(last_hidden_state=state.hidden)
    return model(encoder_outputs=encoded, attention_mask=state.mask, decoder_input_ids=given, use_cache=False)

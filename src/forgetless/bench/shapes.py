"""Linear layers (out, in) of models that people train, and weights like theirs."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCKS = {  # name: the linear layers of a block, and how many blocks
    "smollm2": ([(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)], 30),  # SmolLM2-135M
    "t5-large": ([(1024, 1024)] * 4 + [(4096, 1024), (1024, 4096)], 24),  # the encoder's, of T5 as it was first published
    "llama-7b": ([(4096, 4096)] * 4 + [(11008, 4096), (11008, 4096), (4096, 11008)], 32),
}


def falling(out: int, inputs: int, seed: int = 0) -> Tensor:
    """A seeded matrix (out, in) whose singular values fall as those of trained layers do, over more than a decade: a random one with scaled rows or columns.

    What a decomposition costs depends on it: equally strong directions are easier to tell from noise.
    """
    W = torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed))
    scales = torch.logspace(0, -1, min(out, inputs))
    return 0.04 * (W * scales if inputs <= out else W * scales[:, None])


MODELS = {  # as transformers' LlamaConfig takes them
    "smollm2": dict(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
    "llama-7b": dict(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, vocab_size=32000
    ),
    "tiny": dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        tie_word_embeddings=True,
    ),
}

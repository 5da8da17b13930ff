"""How much each block of a model leaves its input as it is: OSFT's layer importance, mean cos(X, block(X)) over tokens ("Sculpting Subspaces", arXiv 2504.07097, section 3).

The paper takes the cosine of each matrix' input and output, which live in different spaces and may have different lengths. So it is taken of whole blocks, whose
input and output live in the same one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Readable, read


def block_of(model: nn.Module, name: str) -> str | None:
    """The name of the block that a module lies in: the outermost element of an nn.ModuleList round it ("model.layers.3"). None where there is none."""
    for found in re.finditer(r"\.\d+(?=\.|$)", name):
        parent = name[: found.start()]
        if isinstance(model.get_submodule(parent), nn.ModuleList):
            return name[: found.end()]
    return None


@torch.inference_mode()
def block_importance(
    model: nn.Module, modules: Iterable[str], prompts: list[Readable], autocast: bool = False, advance: Any = None
) -> dict[str, float]:
    """{block: mean cosine of its input and output over the tokens of `prompts`} for the blocks that hold `modules`. advance(done) is called after each batch.

    autocast: as they are under bf16 autocast.
    """
    sums: dict[str, list[float]] = {}

    def hook(name: str):
        def see(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            y = output if isinstance(output, Tensor) else output[0]
            cosines = nn.functional.cosine_similarity(x.float(), y.float(), dim=-1)
            total = sums.setdefault(name, [0.0, 0.0])
            total[0] += float(cosines.sum())
            total[1] += cosines.numel()

        return see

    blocks = sorted({block for name in modules if (block := block_of(model, name)) is not None})
    handles = [model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in blocks]
    try:
        read(model, prompts, advance, autocast=autocast)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / count for name, (total, count) in sums.items()}

"""Frozen linear layers in 4 or 8 bits while a task trains, whole again when it ends (`quantize`; QLoRA, Dettmers et al. 2023, arXiv 2305.14314), by bitsandbytes.

While a task trains the whole weights lie in files. What was learned beside them is then added to the weights as they were, so nothing is quantised twice, no rounding
piles up from task to task, and every commit is a plain model. What learns is trained against the quantised weights and used with the whole ones.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import distributed
from .bits import bitsandbytes
from .errors import ConfigError
from .fake import is_fake
from .models import linear_modules, logical, plain_forwards, replace, tied_weights

BLOCK = {"4bit": 64, "8bit": 256}  # numbers that share a scale
NESTED = 256  # of 4bit's scales share one of their own, and are then a byte each


class QuantisedLinear(nn.Module):
    """y = Q(W) x + b in the place of a frozen linear layer (nn.Linear, Conv1D). Q: NF4 with quantised scales in "4bit", dynamic 8-bit blocks in "8bit".

    Its only parameter is the bias: a checkpoint made meanwhile holds nothing of W. Of a weight without data the codes have none either, but their sizes.
    """

    def __init__(self, layer: nn.Module, kind: str):
        super().__init__()
        W = logical(layer.weight, layer).detach()
        self.kind, self.shape, self.dtype, self.bias = kind, W.shape, W.dtype, layer.bias
        flat = W.reshape(-1)  # of rows that are no whole number of blocks, bitsandbytes 0.50 reads the wrong scales on a CPU
        if is_fake(W):
            self.codes, self.state = W.new_empty(quantised_bytes(W, kind), dtype=torch.uint8), None
        elif kind == "4bit":
            self.codes, self.state = bitsandbytes().quantize_4bit(flat, blocksize=BLOCK[kind], compress_statistics=True, quant_type="nf4")
        else:
            self.codes, self.state = bitsandbytes().quantize_blockwise(flat, blocksize=BLOCK[kind])

    @property
    def weight(self) -> Tensor:
        """Q(W), for models that read a layer's weight, or its dtype, themselves."""
        return self.whole(self.dtype)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """Q(W) (out, in)."""
        if self.state is None:
            return self.codes.new_empty(self.shape, dtype=dtype)
        read = bitsandbytes().dequantize_4bit if self.kind == "4bit" else bitsandbytes().dequantize_blockwise
        return read(self.codes, self.state).reshape(self.shape).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = _Frozen.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Frozen(torch.autograd.Function):
    """Q(W) x, with a gradient for x, for which W is read again: it is never kept whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        device = x.device.type
        ctx.layer, ctx.dtype = layer, x.dtype
        ctx.read = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return nn.functional.linear(x.to(ctx.read), layer.whole(ctx.read))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor):
        (dY,) = gradients
        return (dY @ ctx.layer.whole(ctx.read)).to(ctx.dtype), None


@contextlib.contextmanager
def quantised(model: nn.Module, kind: str, folder: Path) -> Iterator[None]:
    """While this is open, the `frozen` layers are quantised, their whole weights in files of this process under `folder`. kind: 4bit or 8bit.

    Raises ConfigError where no layer is frozen. A layer that fails to be put aside, or to come back, does not keep the others from coming back.
    """
    layers, whole = frozen(model), folder / f"whole-{distributed.rank()}"
    shutil.rmtree(whole, ignore_errors=True)  # of a process that was killed
    whole.mkdir(parents=True)
    aside: list[tuple[nn.Module, QuantisedLinear, torch.device, Path]] = []
    try:
        for i, layer in enumerate(layers):
            save_file({"weight": layer.weight.detach().contiguous()}, whole / f"{i}.safetensors")
            stand_in = QuantisedLinear(layer, kind)
            replace(model, layer, stand_in)
            aside.append((layer, stand_in, layer.weight.device, whole / f"{i}.safetensors"))
            layer.weight.data = layer.weight.new_empty(0)
        yield
    finally:
        errors = []
        for layer, stand_in, device, file in aside:
            try:
                if not layer.weight.numel():
                    layer.weight.data = load_file(file)["weight"].to(device, copy=True)  # at an address of its own
                replace(model, stand_in, layer)
            except Exception as error:  # whatever it is, the other layers still come back; said below
                errors.append(error)
        if errors:
            raise OSError(
                f"quantize: {len(errors)} of {len(aside)} whole weights cannot be read back from {whole}; the model is not whole"
            ) from errors[0]
        shutil.rmtree(whole)


def frozen(model: nn.Module) -> list[nn.Module]:
    """The linear layers but the head of which nothing learns; adapters stand on them. Raises ConfigError where there are none."""
    tied = tied_weights(model)
    found = {
        id(layer): layer
        for layer in linear_modules(model).values()
        if type(layer).forward in plain_forwards() and id(layer.weight) not in tied and not any(p.requires_grad for p in layer.parameters())
    }
    if not found:
        raise ConfigError(
            "quantize: every linear layer learns, and what learns is kept whole; take it out, or train beside frozen weights (lora, inclora, osft with form: adapter)"
        )
    return list(found.values())


def stand_ins(model: nn.Module, kind: str) -> Iterator[tuple[nn.Module, QuantisedLinear]]:
    """Put a QuantisedLinear in the place of each frozen layer, for good. Gives the layer, and what stands there now."""
    for layer in frozen(model):
        stand_in = QuantisedLinear(layer, kind)
        replace(model, layer, stand_in)
        yield layer, stand_in


def quantised_bytes(W: Tensor, kind: str) -> int:
    """Bytes of Q(W): its codes, and the scales of its blocks."""
    blocks = -(-W.numel() // BLOCK[kind])
    return -(-W.numel() // 2) + blocks + 4 * -(-blocks // NESTED) if kind == "4bit" else W.numel() + 4 * blocks

"""Adam's moments between two steps: in fp32, or in 8 bits (`optimizer_state: 8bit`; Dettmers et al. 2022, arXiv 2110.02861), by bitsandbytes.

In 8 bits each block of 256 numbers has a scale and its numbers a dynamic code, signed for the first moment, positive for the second: 1.02 bytes a number. They are read
into fp32 for a step and rounded again after it, tensor by tensor. Tensors of fewer than 4096 numbers stay in fp32, as do moments of fp64 weights in fp64.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..bits import bitsandbytes

KINDS = ("fp32", "8bit")
NAMES = ("exp_avg", "exp_avg_sq")
LEAST = 4096  # numbers of a tensor
BLOCK = 256


def read(state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The two moments, in the precision of the step: where they are kept so, the tensors themselves."""
    return tuple(_read(state, name) for name in NAMES)


def write(state: dict[str, Any], moments: tuple[Tensor, Tensor], kind: str) -> None:
    """Keep both for the next step."""
    for name, M in zip(NAMES, moments, strict=True):
        if is_small(M, kind):
            (code, zero), flat = _code(name == "exp_avg", M.device), M.reshape(-1)
            codes, found = bitsandbytes().quantize_blockwise(flat, code=code, blocksize=BLOCK)
            if name == "exp_avg_sq":  # a second moment that became 0 beside a first that did not would make a step of a thousand rates
                codes.clamp_(min=zero + 1)
            codes.masked_fill_(flat == 0, zero)  # bitsandbytes' CPU kernel makes a small number of 0, and what has no gradient would move
            state[name], state[f"{name}_scale"] = codes.reshape(M.shape), found.absmax
        else:
            state[name] = M
            state.pop(f"{name}_scale", None)  # of a tensor that has become too small for it


def is_small(M: Tensor, kind: str) -> bool:
    return kind == "8bit" and M.dtype == torch.float32 and M.numel() >= LEAST


def planned_bytes(numbers: int, dtype: torch.dtype, kind: str) -> int:
    """Bytes of both moments of so many numbers each."""
    small = kind == "8bit" and dtype == torch.float32 and numbers >= LEAST
    return 2 * (numbers + 4 * -(-numbers // BLOCK) if small else numbers * dtype.itemsize)


def _read(state: dict[str, Any], name: str) -> Tensor:
    M, scale = state[name], state.get(f"{name}_scale")
    if scale is None:
        return M
    code, _ = _code(name == "exp_avg", M.device)
    return bitsandbytes().dequantize_blockwise(M.reshape(-1), absmax=scale, code=code, blocksize=BLOCK).reshape(M.shape)


@cache
def _code(signed: bool, device: torch.device) -> tuple[Tensor, int]:
    """The 256 values of the dynamic code, in [-1, 1] or [0, 1], and which of them is 0."""
    code = bitsandbytes().create_dynamic_map(signed=signed)
    return code.to(device), int(code.abs().argmin())

"""Adding an update to a weight that is too coarse for it: bf16 keeps 8 bits, so an update under half an ulp of W (at most 2^-8 |W|) vanishes when W + dW is rounded.

`precision` of a parameter group chooses what to do about it. It has no effect on fp32 and fp64 weights, and costs them nothing.
- "fp32_master": state["master"] is the weight in fp32; updates go to it and the weight is its rounding. 4 bytes an element; the run is the fp32 run, rounded.
- "stochastic_rounding": W + dW is rounded up or down with probabilities that make its mean exact. No bytes an element; the noise of one ulp a step adds up.
- "kahan": state["compensation"], in bf16, holds what the last rounding lost and joins the next update. 2 bytes an element. Together they hold 16 bits or
  more, so an update under 2^-17 of the weight can still vanish.
- "plain": W + dW as it comes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..subspace import working_dtype

PRECISIONS = ("fp32_master", "stochastic_rounding", "kahan", "plain")
COMPENSATION = torch.bfloat16  # for fp16 weights too: what they lose would be subnormal in fp16


def seeded(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for (seed, tensor, step, ...): a resumed run draws the same numbers without saving one."""
    folded = 0
    for number in numbers:
        folded = folded * 1_000_003 + number
    return torch.Generator(device).manual_seed(folded % 2**63)


def is_coarse(p: Tensor) -> bool:
    """Is p kept in less than the fp32 its updates are computed in?"""
    return p.dtype != working_dtype(p.dtype)


def counts_updates(p: Tensor, precision: str) -> bool:
    """Does adding to p draw random numbers, seeded by a count of its updates? (Adam's own count starts again at some refreshes.)"""
    return is_coarse(p) and precision == "stochastic_rounding"


def prepare(p: Tensor, state: dict[str, Any], precision: str) -> None:
    """Make what `precision` keeps, at the first update: the master starts as the weight is then."""
    if is_coarse(p) and precision == "fp32_master" and "master" not in state:
        state["master"] = p.detach().to(working_dtype(p.dtype), memory_format=torch.contiguous_format)
    if is_coarse(p) and precision == "kahan" and "compensation" not in state:
        state["compensation"] = torch.zeros_like(p, dtype=COMPENSATION, memory_format=torch.contiguous_format)


def planned_bytes(p: Tensor, precision: str) -> int:
    """Bytes `prepare` will take."""
    return p.numel() * {"fp32_master": 4, "kahan": COMPENSATION.itemsize}.get(precision, 0) if is_coarse(p) else 0


def exact(p: Tensor, state: dict[str, Any]) -> Tensor | None:
    """The tensor in working precision that updates may be added to: the weight itself, its master, or None where there is neither."""
    return state.get("master") if is_coarse(p) else p


def value(p: Tensor, state: dict[str, Any]) -> Tensor:
    """The weight as exactly as it is known, in working precision."""
    W = exact(p, state)
    if W is None:
        W = p.to(working_dtype(p.dtype))
        W = W + state["compensation"] if "compensation" in state else W
    return W


def add(p: Tensor, delta: Tensor, state: dict[str, Any], precision: str, seeds: tuple[int, ...]) -> None:
    """W <- W + delta, delta in working precision; what that leaves in a coarse weight is `precision`'s matter. seeds: of the draws of stochastic rounding."""
    W = exact(p, state)
    if W is not None:
        W.add_(delta)
        settle(p, W)
    elif precision == "kahan":
        W, lost = p.to(delta.dtype), state["compensation"]
        delta = delta + lost
        p.copy_(W + delta)
        lost.copy_(delta - (p.to(delta.dtype) - W))
    elif precision == "stochastic_rounding":
        p.copy_(stochastic_round(p.to(delta.dtype) + delta, p.dtype, seeded(*seeds, device=p.device)))
    else:
        p.add_(delta.to(p.dtype))


def settle(p: Tensor, W: Tensor) -> None:
    """After W, the weight's exact form, has changed: round it into the weight."""
    if W is not p:
        p.copy_(W)


def stochastic_round(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """x rounded to one of its two neighbours in a 16-bit float dtype, with mean x: up with probability (x - lower) / (upper - lower).

    What the dtype holds stays as it is; infinities, NaN and what is beyond the largest finite number are rounded as usual.
    """
    near = x.to(dtype)
    error = (x - near.to(x.dtype)).abs()
    away = torch.where(near.to(x.dtype).abs() < x.abs(), 1, -1).to(
        torch.int16
    )  # the bits of a float, read as an integer, count up with its magnitude
    other = (near.view(torch.int16) + away).view(dtype)
    gap = (other.to(x.dtype) - near.to(x.dtype)).abs()
    u = torch.rand(x.shape, generator=generator, dtype=torch.float32, device=x.device)
    return torch.where(u * gap < error, other, near)

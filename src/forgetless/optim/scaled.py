"""Adam's state in r coordinates, and beside it the gradient that they do not hold, scaled by what Adam does in them: Fira and APOLLO.

G (m, n) is a gradient read so that the longer side stays (m >= n), R (m, r) its coordinates, N = m_hat / (sqrt(v_hat) + eps) Adam's step on R.

    Fira     dW = -lr scale (N Q^T + limit(phi o (G - R Q^T)))    R = G Q, Q GaLore's directions; phi (m,) = ||N_i|| / ||R_i||    (Chen et al. 2024, arXiv 2410.01623)
    APOLLO   dW = -lr sqrt(scale) limit(phi o G)                  R = G P, P (n, r) ~ N(0, 1 / r), drawn anew every refresh_gap    (Zhu et al. 2024, arXiv 2412.05270)
             APOLLO-mini: one phi = ||N|| / ||R|| for the whole matrix, with r = 1
    limit    S / max(||S|| / ||S of the step before|| / 1.01, 1): in norm it grows by a hundredth a step at most

Without bias correction in N, phi and limit, which comes after them, as the authors' code has it. P is a function of (seed, tensor, refresh) and is not kept. Both were made for
training without a protected space: a constraint is refused, because G is not in the coordinates that would keep out of it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..products import product
from ..subspace import working_dtype
from . import coordinates, moments, rounding
from .subspace_adamw import SubspaceAdamW, Used

FORMS = (None, "fira", "apollo", "apollo-mini")
GROWTH = 1.01  # of the norm of what is beside the coordinates, from step to step, at most
TINY = 1e-8


class ScaledAdamW(SubspaceAdamW):
    """SubspaceAdamW whose groups may carry `form`: "fira", "apollo" or "apollo-mini"; without one they are what they are there.

    With a form a group needs a rank; its `side` is the shorter one of its weights, as GaLore has it. Raises ValueError for an unknown form, or one with what it does not go with.
    """

    _used: dict[Tensor, Tensor] = {}  # weight -> R of the step in progress

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        form = group.setdefault("form", None)
        if form not in FORMS:
            raise ValueError(f"ScaledAdamW: form={form!r}; one of {', '.join(map(str, FORMS))}")
        if form and (group["rank"] is None or group["side"] == "both" or group["release"] or group["constraint"] is not None):
            raise ValueError(f"ScaledAdamW: form={form!r} needs a rank and one side, and goes with no constraint, and with gradients that are kept")

    def projection(self, group: dict[str, Any], p: Tensor, index: int, n: int) -> Tensor:
        """P (n, r) of APOLLO, for the weight with this place among all."""
        refresh, rank = int(self.state[p].get("updates", 0)) // group["refresh_gap"], coordinates.sizes(group, p.shape)[2]
        drawn = torch.randn(n, rank, generator=rounding.seeded(self.seed, index, refresh, 2), dtype=torch.float32)
        return drawn.to(p.device, working_dtype(p.dtype)) / math.sqrt(rank)

    def _reduce(self, group: dict[str, Any], p: Tensor, index: int, refresh: bool = True) -> Tensor | None:
        if not (group["form"] or "").startswith("apollo"):
            return super()._reduce(group, p, index, refresh)
        G = coordinates.read(group, p.grad.to(working_dtype(p.dtype)))
        return product(G, self.projection(group, p, index, G.shape[1]))

    def _update(self, batch: list[Used]) -> list[float]:
        self._used = {p: R for group, p, R, _ in batch if group["form"]}
        leaks = super()._update(batch)
        self._used = {}
        return leaks

    def _apply(self, group: dict[str, Any], p: Tensor, delta: Tensor, index: int) -> float:
        if not group["form"]:
            return super()._apply(group, p, delta, index)
        state, rate, R = self.state[p], float(group["lr"]) * group["lr_scale"], self._used[p]
        t, (beta1, beta2) = float(state["step"]), group["betas"]
        corrected = math.sqrt(1 - beta2**t)
        m, v = moments.read(state)
        N = m / (v.sqrt() + group["eps"] * corrected)
        whole = None if group["form"] == "apollo-mini" else 1
        phi = torch.linalg.vector_norm(N, dim=whole, keepdim=True) / (torch.linalg.vector_norm(R, dim=whole, keepdim=True) + TINY)  # (m, 1) or (1, 1)
        G = coordinates.read(group, p.grad.to(R.dtype)) * self._clipped()
        if group["form"] == "fira":
            S = self._limit(state, phi * (G - product(R, state["basis"].mT)))
            S = (S + product(N, state["basis"].mT)) * group["scale"]
        else:
            S = self._limit(state, phi * G) * math.sqrt(group["scale"])
        D = coordinates.read(group, S * (-rate * corrected / (1 - beta1**t)))
        if decay := rate * group["weight_decay"]:
            D = D - decay * (rounding.value(p, state) - state["start"])
        rounding.add(p, D, state, group["precision"], (self.seed, index, int(state["updates"]), 1))
        return 0.0

    def _clipped(self) -> float:
        """By how much this step's R were shortened, and so what is beside them."""
        return 1.0 if self.grad_norm is None else min(1.0, self.max_grad_norm / (float(self.grad_norm) + 1e-6))

    def _limit(self, state: dict[str, Any], S: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(S)
        shorter = (norm / (state["beside"] + TINY)).clamp(min=GROWTH) / GROWTH if "beside" in state else torch.ones_like(norm)
        state["beside"] = norm / shorter
        return S / shorter

    def planned_bytes(self) -> int:
        return super().planned_bytes() + sum(self._extra(group, p) for group, p in self._each() if group["form"])

    def _extra(self, group: dict[str, Any], p: Tensor) -> int:
        """Bytes of `beside`, less those of the directions that APOLLO does not keep."""
        kept = 0 if group["form"] == "fira" else coordinates.chosen_numbers(group, p.shape)
        return (1 - kept) * working_dtype(p.dtype).itemsize

"""How much of their gradients' energy the directions of low-rank states hold, noted as they are chosen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..sharding import ALONE, norms
from . import coordinates

EVERY = 10  # choices: then one tensor, each in its turn, is held against the best directions there are


class Captured:
    """Of the choices since the last `take`: ||R||^2 / ||G||^2 of each, and of one tensor in every tenth choice the most r directions could hold."""

    def __init__(self) -> None:
        self.shares: list[Tensor] = []
        self.of_best: list[Tensor] = []

    def note(self, group: dict[str, Any], updates: int, place: int, count: int, G: Tensor, R: Tensor) -> None:
        """R are the new coordinates of G. place, count: of the tensor among all that have a rank."""
        parts = [(coordinates.spread_state(group, "exp_avg"), R), (group.get("rows", ALONE), G)]
        energy, whole = (norm.double() ** 2 for norm in norms(parts))
        choice = updates // group["refresh_gap"]
        self.shares.append(energy / whole)
        if choice % EVERY == 0 and choice // EVERY % count == place and (best := coordinates.best_energy(group, G).double()) > 0:
            self.of_best.append(energy / best)

    def take(self) -> tuple[float | None, float | None]:
        """The mean share, and the share of the best; None where nothing was noted."""
        shares, of_best = self.shares, self.of_best
        self.shares, self.of_best = [], []
        mean = float(torch.stack([share.to(shares[0].device) for share in shares]).mean()) if shares else None
        return mean, float(of_best[0]) if of_best else None

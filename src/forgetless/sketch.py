"""A running summary of many gradients: sum over steps of G^T G in far less room than that matrix takes.

Each G (m, n) is first compressed to `probes` rows Omega G, Omega Gaussian (probes, m), scaled to ||G||: proportional to G^T G in expectation; the rows are
then merged into at most `size` directions by truncated SVD (Frequent Directions, Liberty 2013, without the shrinkage: what is truncated is counted in `total`
instead, so the energy rule sees what the sketch does not hold). `total` is the exact sum of ||G||^2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .products import product
from .sharding import ALONE, laid_out
from .subspace import working_dtype


class Sketch:
    """rows: (<= 2 * size, n), whose Gram matrix approximates sum G^T G. total: () exact energy. updates with seed seed the probes."""

    def __init__(self, n: int, size: int, probes: int = 16, seed: int = 0):
        self.n, self.size, self.probes, self.seed = n, size, probes, seed
        self.rows = torch.zeros(0, n)
        self.total = torch.zeros((), dtype=torch.float64)
        self.updates = 0

    def update(self, G: Tensor, scale: float = 1.0) -> None:
        """Add scale * G, G (m, n)."""
        Y, norm = self.probe(G)
        self.add(Y, float(norm) * scale)

    def probe(self, G: Tensor) -> tuple[Tensor, Tensor]:
        """(Omega G, ||G||) for G (m, n), which may be spread over processes: all that `add` needs of it. Linear in G until the next `add`."""
        G, rows, columns = laid_out(G)
        m = rows.shape(G)[0]
        G = G.to(working_dtype(G.dtype))
        if m <= self.probes:
            Y = rows.whole(G)
        else:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.updates) % 2**63)
            omega = torch.randn(self.probes, m, generator=generator).to(G.device, G.dtype)
            Y = rows.sum(product(rows.own(omega.mT).mT, G))
        return columns.whole(Y.mT).mT, (columns if rows is ALONE else rows).norm(G)

    def norm(self, Y: Tensor, m: int) -> Tensor:
        """||G|| of G (m, n) as its probes Y have it, with an error of some per cent; exact where they are G itself."""
        return torch.linalg.vector_norm(Y) / (1.0 if m <= self.probes else self.probes**0.5)

    def add(self, Y: Tensor, energy: float) -> None:
        """Add a gradient of this norm by its probes Y."""
        # the probes estimate ||G||^2 with an error of some per cent, which would blur the energy rule; it is known exactly, so say it
        Y = Y * (energy / torch.linalg.vector_norm(Y).clamp_min(torch.finfo(Y.dtype).tiny))
        self.updates += 1
        self.total += energy**2
        self.rows = torch.cat([self.rows.to(Y), Y])
        if self.rows.shape[0] >= 2 * self.size:
            self.compress()

    def compress(self) -> None:
        """Keep the `size` strongest directions of the rows."""
        if self.rows.shape[0] <= self.size:
            return
        D = self.rows.double()
        lam, U = torch.linalg.eigh(D @ D.mT)  # (2 size, 2 size), however large n is
        self.rows = (U[:, -self.size :].mT @ D).to(self.rows.dtype).contiguous()

    def state_dict(self) -> dict[str, Tensor]:
        return {"rows": self.rows.contiguous(), "total": self.total.clone(), "updates": torch.tensor(self.updates), "seed": torch.tensor(self.seed)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.rows, self.total = state["rows"], state["total"]
        self.updates, self.seed = int(state["updates"]), int(state["seed"])

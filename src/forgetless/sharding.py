"""Matrices whose rows are spread over processes, as torch's fully_shard spreads a weight's (FSDP2: DTensor parameters, Shard(0)). The only file that knows DTensor.

A Rows says which rows of a matrix are here, and does what takes all of them: a sum over the processes, the QR of a tall matrix. ALONE, all rows in one process, does
nothing, so that the linear algebra is written once: R = G Q needs no other process' rows, G^T U is a sum over the processes, of (in x r) numbers and not (out x in).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    Group = dist.ProcessGroup | "Imagined" | None


class Rows:
    """All rows of a matrix, in this process."""

    def sum(self, X: Tensor) -> Tensor:
        """The sum of all processes' X."""
        return X

    def whole(self, X: Tensor) -> Tensor:
        """All rows, of own rows X."""
        return X

    def own(self, X: Tensor) -> Tensor:
        """Own rows, a view, of all rows X."""
        return X

    def share(self, X: Tensor) -> Tensor:
        """Own rows of the sum of all processes' X, which has all rows."""
        return X

    def among(self, total: int) -> Rows:
        """How so many other rows lie over the same processes."""
        return self

    def shape(self, X: Tensor) -> torch.Size:
        """The shape of the matrix of which X are the own rows."""
        return X.shape

    def norm(self, X: Tensor) -> Tensor:
        """||X|| over all rows, of own rows X."""
        return torch.linalg.vector_norm(X)

    def qr(self, A: Tensor) -> tuple[Tensor, Tensor]:
        """(own rows of Q, all of R) of the QR of a matrix of which A (m, k) are the own rows."""
        return torch.linalg.qr(A)

    def held(self, numbers: int) -> int:
        """How many of so many numbers are here, if they lie as the rows do."""
        return numbers


ALONE = Rows()


@dataclass(frozen=True)
class Imagined:
    """A process group that is not there, of which this is the first process: exchanges are counted, and hand back numbers of the right shape."""

    processes: int


def _processes(group: Group) -> int:
    return group.processes if isinstance(group, Imagined) else dist.get_world_size(group)


class Spread(Rows):
    """`total` rows over the processes of `group` in chunks of ceil(total / processes), in order, as torch.chunk has them: the last processes may have fewer, or none."""

    def __init__(self, total: int, group: Group = None):
        self.total, self.group = total, group
        self.processes = _processes(group)
        self.chunk = -(-total // self.processes)
        self.start = 0 if isinstance(group, Imagined) else min(dist.get_rank(group) * self.chunk, total)
        self.stop = min(self.start + self.chunk, total)

    def sum(self, X: Tensor) -> Tensor:
        X = X.contiguous()  # of the caller's making, so that it may be written to
        _all_reduce(X, self.group)
        return X

    def whole(self, X: Tensor) -> Tensor:
        found = X.new_empty(self.processes * self.chunk, *X.shape[1:])
        _all_gather(found, self._padded(X, self.chunk), self.group)
        return found[: self.total]

    def own(self, X: Tensor) -> Tensor:
        return X[self.start : self.stop]

    def share(self, X: Tensor) -> Tensor:
        found = X.new_empty(self.chunk, *X.shape[1:])
        _reduce_scatter(found, self._padded(X, self.processes * self.chunk), self.group)
        return found[: self.stop - self.start]

    def among(self, total: int) -> Rows:
        return Spread(total, self.group)

    def shape(self, X: Tensor) -> torch.Size:
        return torch.Size((self.total, *X.shape[1:]))

    def norm(self, X: Tensor) -> Tensor:
        return self.sum(torch.linalg.vector_norm(X).square()).sqrt()

    def qr(self, A: Tensor) -> tuple[Tensor, Tensor]:
        # of each process' rows, then of the k x k triangles on top of each other (TSQR: Demmel et al. 2012)
        m, k = min(self.total, A.shape[1]), A.shape[1]
        Q, T = torch.linalg.qr(A)
        triangles = self.among(self.processes * k)
        outer, R = torch.linalg.qr(triangles.whole(self._padded(T, k)))
        return Q @ triangles.own(outer)[: Q.shape[1], :m], R[:m]

    def held(self, numbers: int) -> int:
        return numbers // self.total * (self.stop - self.start) if self.total else 0

    @staticmethod
    def _padded(X: Tensor, rows: int) -> Tensor:
        return X.contiguous() if len(X) == rows else torch.cat([X, X.new_zeros(rows - len(X), *X.shape[1:])])


def norms(parts: list[tuple[Rows, Tensor]]) -> list[Tensor]:
    """||X|| over all rows, of own rows X each, in one exchange for all that lie over the same processes."""
    found = [torch.linalg.vector_norm(X) for _, X in parts]
    for group in {rows.group for rows, _ in parts if isinstance(rows, Spread)}:
        places = [i for i, (rows, _) in enumerate(parts) if isinstance(rows, Spread) and rows.group == group]
        squares = torch.stack([found[i].double() for i in places]).square()
        _all_reduce(squares, group)
        for i, norm in zip(places, squares.sqrt(), strict=True):
            found[i] = norm.to(found[i].dtype)
    return found


# -- what is sent ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Sent:
    """Numbers that this process has sent in exchanges, as rings have it: an all-reduce hands every part round twice, a gather and a reduce-scatter once."""

    numbers: float = 0.0
    exchanges: int = 0


_counts: list[Sent] = []


@contextlib.contextmanager
def counting() -> Iterator[Sent]:
    """Counts what this file's exchanges send while it is open."""
    _counts.append(Sent())
    try:
        yield _counts[-1]
    finally:
        _counts.pop()


def _count(rounds: int, whole: Tensor, group: Group) -> None:
    for count in _counts:
        count.numbers += rounds * whole.numel() * (1 - 1 / _processes(group))
        count.exchanges += 1


def _all_reduce(X: Tensor, group: Group) -> None:
    _count(2, X, group)
    if not isinstance(group, Imagined):
        dist.all_reduce(X, group=group)


def _all_gather(found: Tensor, X: Tensor, group: Group) -> None:
    _count(1, found, group)
    if isinstance(group, Imagined):
        found.view(group.processes, *X.shape).copy_(X)
        return
    (getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)(found, X, group=group)  # torch 2.13's name, and the older one


def _reduce_scatter(found: Tensor, X: Tensor, group: Group) -> None:
    _count(1, X, group)
    if isinstance(group, Imagined):
        found.copy_(X[: len(found)])
        return
    (getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor)(found, X, group=group)


# -- DTensor ---------------------------------------------------------------------------------------------------------------------------


def is_sharded(t: Any) -> bool:
    found = sys.modules.get("torch.distributed.tensor")  # slow to import, and nobody has made one without it
    return found is not None and isinstance(t, found.DTensor)


def rows_of(t: Tensor) -> Rows:
    """How the rows of t lie. Raises ValueError for a DTensor that is spread otherwise than by rows over one axis of its mesh."""
    if not is_sharded(t):
        return ALONE
    axes = [axis for axis, place in enumerate(t.placements) if not place.is_replicate()]
    if not axes:
        return ALONE
    if len(axes) > 1 or not t.placements[axes[0]].is_shard(0) or type(t.placements[axes[0]]).__name__ != "Shard":
        raise ValueError(
            f"a tensor of shape {tuple(t.shape)} is spread as {t.placements}; forgetless trains plain tensors and such as fully_shard spreads by rows, "
            "Shard(0) on one axis of the mesh: leave out tensor parallelism and a shard_placement_fn"
        )
    return Spread(t.shape[0], t.device_mesh.get_group(axes[0]))


def laid_out(G: Tensor) -> tuple[Tensor, Rows, Rows]:
    """What is here of a matrix G (m, n), how its rows are spread, and how its columns: G may be the transpose of a weight that is spread by rows."""
    if is_sharded(G) and any(place.is_shard(1) for place in G.placements):
        own, columns, rows = laid_out(G.mT)
        return own.mT, rows, columns
    return local(G), rows_of(G), ALONE


def local(t: Tensor) -> Tensor:
    """The own rows of t, sharing its memory; differentiable: their gradient becomes t's."""
    return t.to_local() if is_sharded(t) else t


def whole(t: Tensor) -> Tensor:
    """All rows of t; every process must ask. Differentiable: every process hands the own rows of its gradient back, which must be the same everywhere."""
    return t.full_tensor() if is_sharded(t) else t


def like(t: Tensor, X: Tensor, rows: int | None = None) -> Tensor:
    """Own rows X as a tensor that is spread as t is; rows: how many there are in all, where there are not as many as in t."""
    if not is_sharded(t):
        return X
    from torch.distributed.tensor import DTensor

    shape = torch.Size((t.shape[0] if rows is None else rows, *X.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(X, t.device_mesh, t.placements, run_check=False, shape=shape, stride=stride)


def spread_like(t: Tensor, X: Tensor) -> Tensor:
    """X (m, n), whole, spread as t (m, n) is."""
    _, rows, columns = laid_out(t)
    own = rows.own(columns.own(X.mT).mT).clone(memory_format=torch.contiguous_format)
    return like(t, own) if columns is ALONE else like(t.mT, own.mT.contiguous()).mT


def gathered(tensors: dict[str, Any], everywhere: bool = False) -> dict[str, Any]:
    """The same with whole tensors on the CPU, one gathered after another, in the first process, or `everywhere`; every process must ask."""
    keep, found = everywhere or dist.get_rank() == 0, {}
    for key, t in tensors.items():
        t = whole(t.detach()) if torch.is_tensor(t) else t
        if keep:
            found[key] = t.cpu() if torch.is_tensor(t) else t
    return found


def gathered_state(optimizer: torch.optim.Optimizer, everywhere: bool = False) -> dict[str, Any]:
    """optimizer.state_dict() likewise."""
    saved = optimizer.state_dict()
    return saved | {"state": {index: gathered(values, everywhere) for index, values in saved["state"].items()}}

"""Which of the learned tasks a prompt is of, told from the base model's own hidden states, without a label: what the method `routed` asks at test time.

Features: the hidden states h (d) of a prompt's tokens after one block, each brought to mean square 1 (or the first token, a hundred times as long as the others in many
models, would be all there is), and their mean x (d), in fp64. One prompt at a time, and only the blocks up to that one are run. Two routers over them:

Analytic, the ridge solution of the task indicators on random features:  phi = relu(x E), E (d, w) drawn once, and M = (Phi^T Phi + ridge I)^-1 Phi^T Y, (w, tasks),
by recursive least squares. R = (Phi^T Phi + ridge I)^-1 is kept; n new rows Phi (n, w) with indicators Y (n, tasks) make of them (Woodbury)
    K = R Phi^T (I + Phi R Phi^T)^-1,   M <- M + K (Y - Phi M),   R <- R - K Phi R
and a new task is a new column of zeros, as no row before it was of that task. The result is that of all rows at once, in whatever order they came.

Keys, the nearest of some vectors of each task by cosine.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .batches import read
from .errors import ConfigError
from .importance import block_of
from .models import linear_modules

BATCH = 256  # rows that enter the recursion together


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that read a prompt, in their order; of an encoder-decoder model the encoder's."""
    names = list(dict.fromkeys(block for name in linear_modules(model) if (block := block_of(model, name)) is not None))
    if not names:
        raise ConfigError(f"method.router_layer: this {type(model).__name__} has no list of blocks, after one of which the router could look")
    stack = names[0].rpartition(".")[0]
    return [model.get_submodule(name) for name in names if name.rpartition(".")[0] == stack]


class _Enough(Exception):
    """The block that was asked for has answered; those after it need not run."""


@torch.no_grad()
def features(model: nn.Module, prompts: list[list[int]], layer: int, advance: Any = None) -> Tensor:
    """x (len(prompts), d) in fp64 on the CPU: what block `layer`, counted from 1, or the last if there are fewer, makes of each prompt. advance(done) after each."""
    found: list[Tensor] = []

    def see(module: nn.Module, args: tuple, output: Any) -> None:
        h = (output if isinstance(output, Tensor) else output[0])[0].double()  # (tokens, d)
        found.append((h / h.square().mean(1, keepdim=True).sqrt().clamp_min(torch.finfo(h.dtype).tiny)).mean(0).cpu())
        raise _Enough

    every = blocks(model)
    handle = every[min(layer, len(every)) - 1].register_forward_hook(see)
    try:
        for done, ids in enumerate(prompts, 1):
            with contextlib.suppress(_Enough):
                read(model, [ids])
            if advance:
                advance(done)
    finally:
        handle.remove()
    return torch.stack(found)


@dataclass
class Analytic:
    """E (d, w) in fp32, M (w, tasks) and R (w, w) in fp64; R is None where nothing more is to be learned."""

    E: Tensor
    M: Tensor
    R: Tensor | None

    @classmethod
    def new(cls, d: int, width: int, ridge: float) -> Analytic:
        E = torch.randn(d, width, generator=torch.Generator().manual_seed(0)) / d**0.5
        return cls(E, torch.zeros(width, 0, dtype=torch.float64), torch.eye(width, dtype=torch.float64) / ridge)

    def expand(self, x: Tensor) -> Tensor:
        return (x @ self.E.double()).relu()

    def learn(self, x: Tensor, task: int) -> None:
        """Rows x (n, d) of the task of this number, known or new."""
        self.M = torch.cat([self.M, self.M.new_zeros(len(self.M), max(0, task + 1 - self.M.shape[1]))], 1)
        for part in x.split(BATCH):
            Phi = self.expand(part)  # (n, w)
            Y = torch.zeros(len(Phi), self.M.shape[1], dtype=Phi.dtype)
            Y[:, task] = 1.0
            P = self.R @ Phi.mT  # (w, n)
            inner = torch.linalg.cholesky(torch.eye(len(Phi), dtype=Phi.dtype) + Phi @ P)
            K = torch.cholesky_solve(P.mT, inner).mT  # (w, n)
            self.M = self.M + K @ (Y - Phi @ self.M)
            R = self.R - K @ P.mT
            self.R = (R + R.mT) / 2  # symmetric but for rounding, which would grow

    def scores(self, x: Tensor) -> Tensor:
        """(n, tasks): near 1 where a row is of the task, near 0 where not."""
        return self.expand(x) @ self.M

    def tensors(self) -> dict[str, Tensor]:
        return {"E": self.E, "M": self.M} | ({} if self.R is None else {"R": self.R})

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Analytic:
        return cls(tensors["E"], tensors["M"], tensors.get("R"))


@dataclass
class Keys:
    """keys (k, d) of length 1 in fp64, owner (k): the number of each one's task; at most `each` a task."""

    keys: Tensor
    owner: Tensor

    @classmethod
    def new(cls, d: int) -> Keys:
        return cls(torch.zeros(0, d, dtype=torch.float64), torch.zeros(0, dtype=torch.long))

    def learn(self, x: Tensor, task: int, each: int) -> None:
        found = directions(x, each)
        self.keys = torch.cat([self.keys, found])
        self.owner = torch.cat([self.owner, torch.full((len(found),), task)])

    def scores(self, x: Tensor) -> Tensor:
        """(n, tasks): the cosine with the nearest key of each task."""
        cosines = nn.functional.normalize(x, dim=1) @ self.keys.mT
        return torch.stack([cosines[:, self.owner == task].amax(1) for task in range(int(self.owner.max()) + 1)], 1)

    def tensors(self) -> dict[str, Tensor]:
        return {"keys": self.keys, "owner": self.owner}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Keys:
        return cls(tensors["keys"], tensors["owner"])


def directions(x: Tensor, count: int, rounds: int = 50) -> Tensor:
    """At most `count` unit vectors (k, d) that rows x (n, d) gather round by cosine: k-means on the sphere, begun with the rows' mean and each time the row that is
    farthest from all so far, so that nothing is drawn."""
    x = nn.functional.normalize(x, dim=1)
    centres = nn.functional.normalize(x.mean(0, keepdim=True), dim=1)
    while len(centres) < min(count, len(x)):
        centres = torch.cat([centres, x[(x @ centres.mT).amax(1).argmin()][None]])
    nearest = None
    for _ in range(rounds):
        previous, nearest = nearest, (x @ centres.mT).argmax(1)
        if previous is not None and torch.equal(previous, nearest):
            break
        members = nn.functional.one_hot(nearest, len(centres)).to(x.dtype)  # (n, k)
        sums = members.mT @ x
        centres = torch.where(members.any(0)[:, None], nn.functional.normalize(sums, dim=1), centres)
    return centres[nearest.unique()]  # one that no row is nearest to says nothing


Choice = tuple[tuple[int, float], ...]  # (task, weight), the weights adding up to 1


def choose(scores: Tensor, top: int = 1, temperature: float = 1.0) -> list[Choice]:
    """For each row of scores (n, tasks) the `top` tasks and their weights, softmax(score / temperature) over them."""
    values, tasks = scores.topk(min(top, scores.shape[1]), 1)
    weights = (values / temperature).softmax(1)
    return [tuple(zip(t, w, strict=True)) for t, w in zip(tasks.tolist(), weights.tolist(), strict=True)]

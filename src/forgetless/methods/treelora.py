"""TreeLoRA: a tree over the earlier tasks by how alike their gradients are, searched by a bandit (Qian et al., ICML 2025, arXiv 2506.10355).

One adapter goes on through all tasks, so that gradients of its factors mean the same from task to task. Of each task n and adapted layer the direction of its gradient is
kept: g_hat = G / ||G||_1, G the mean over the task's steps of the gradient of A (rank x in) and B (out x rank).

    tree       node = a group of tasks; depth d splits a group by the distances ||g_hat_n - g_hat_k||_1 at layer d, a leaf is one task
    search     for each layer and step, from the root to a leaf, the child of least   LCB_k = mu_hat_k - 2 sqrt(log t / n_k)
               mu_hat_k: mean distance of this task's step gradients to those of the tasks in the node that were picked so far, n_k: how often
    update     W <- W - alpha (g + lambda ||g||_1 g_hat_k)   toward where the picked task's gradient has pointed; then Adam

So a step costs one distance a layer however many tasks there are.

Read of the paper: its abstract and summaries of it, not its text. By them the paper's: the tree by L1 distance of gradient directions, one depth a layer, 64 for language
models; LCB with the 2; an L1 term lambda ||g_hat_n - g_hat_k||_1, lambda 0.5 in its scripts. What is ours: a node is split round its two farthest tasks (the released
code's median of inner products cannot tell two equally strong groups apart); distances are halved, into [0, 1], the scale LCB's second term has; an inner node pools
what its tasks have seen; the term's effect is to first order a pull along g_hat_k, and so it is added to the gradient; "sparse" is the adapter itself.

The released code is not followed: what it calls gradients are the values of A, its tree is built of differences of successive tasks' values, its picks are drawn by softmax.

When not to use it: where tasks contradict one another (it pulls toward an old task, however far the nearest is); below some tens of steps a task, in which the bandit has
not yet looked at every task; where a direction of A and B a task is too much to keep.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..adapters import LoraOptions, adapters, factors
from ..subspace import working_dtype
from .base import Memory
from .lora import LoRA


class TreeLoRAOptions(LoraOptions):
    reg: float = Field(0.5, ge=0)
    """lambda: length (L1) of the pull toward the picked task's direction, as a share of the gradient's."""
    exploration: float = Field(2.0, ge=0)
    """The factor of sqrt(log t / n_k) (paper: 2); 0: always the task that has looked nearest so far."""
    depth: int = Field(64, ge=1)
    """At most so many levels of the tree; a leaf may then hold several tasks."""


@dataclass
class Node:
    tasks: list[int]
    children: list[Node] = field(default_factory=list)


def grow(distances: list[Tensor], tasks: list[int], depth: int = 0) -> Node:
    """The tree over `tasks` from one (K, K) matrix of distances a level: each group is split into those nearer to one and to the other of its two farthest tasks."""
    node = Node(tasks)
    if len(tasks) == 1 or depth == len(distances):
        return node
    D = distances[depth][tasks][:, tasks]
    a, b = divmod(int(D.argmax()), len(tasks))
    first = [task for task, row in zip(tasks, D, strict=True) if row[a] <= row[b]]
    groups = [first, [task for task in tasks if task not in first]]
    if not groups[1]:  # alike to the last bit at this layer: the next may tell them apart
        return Node(tasks, grow(distances, tasks, depth + 1).children)
    node.children = [grow(distances, group, depth + 1) for group in groups]
    return node


def direction(G: Tensor) -> Tensor:
    return G / G.abs().sum().clamp_min(torch.finfo(G.dtype).tiny)


class TreeLoRA(LoRA):
    name = "treelora"
    summary = "one adapter, pulled in each layer toward the gradient direction of an old task that a bandit on a tree of tasks picks"
    paper = "arXiv 2506.10355"
    extra_forward = "a distance of gradients a layer"
    bytes_a_task = "the gradient direction of A and B of every adapted layer"
    Options = TreeLoRAOptions

    known: dict[str, Tensor] = {}  # layer -> directions (tasks, numbers of A and B)

    def go_on(self, model: nn.Module, memory: Memory) -> nn.Module:
        model = super().go_on(model, memory)
        self.known, self.sums, self.steps = memory.of(self.name), {}, 0
        self.layers = list(adapters(model))
        tasks = next((len(directions) for directions in self.known.values()), 0)
        self.seen, self.counts = (torch.zeros(tasks, len(self.layers), dtype=dtype) for dtype in (torch.float64, torch.int64))
        levels = [torch.cdist(X, X, p=1) for X in (self.known[name] for name in self.layers[: self.options.depth])] if tasks else []
        self.tree = grow(levels, list(range(tasks))) if tasks else None
        return model

    # -- the bandit ------------------------------------------------------------------------------------------------------------------

    def bound(self, tasks: list[int], layer: int) -> float:
        """LCB of a group of tasks at a layer: least where they look near, or have been looked at little."""
        n = int(self.counts[tasks, layer].sum())
        if n == 0:
            return -math.inf
        return float(self.seen[tasks, layer].sum()) / n - self.options.exploration * math.sqrt(math.log(self.steps) / n)

    def pick(self, layer: int) -> int:
        """The task of least bound, from the root of the tree downwards."""
        node = self.tree
        while node.children:
            node = min(node.children, key=lambda child: self.bound(child.tasks, layer))
        return min(node.tasks, key=lambda task: self.bound([task], layer))

    @torch.no_grad()
    def on_step(self, model: nn.Module) -> None:
        """Note the raw gradient, look at one earlier task a layer, and turn the gradient toward it."""
        self.steps += 1
        looked: list[tuple[int, int, Tensor]] = []
        for index, (name, layer) in enumerate(adapters(model).items()):
            pair = factors(layer)
            if any(factor.grad is None for factor in pair):
                continue
            g = torch.cat([factor.grad.to(working_dtype(factor.dtype)).reshape(-1) for factor in pair])
            self.sums[name] = g if name not in self.sums else self.sums[name].to(g.device).add_(g)
            if self.tree is None:
                continue
            task = self.pick(index)
            old = self.known[name][task].to(g)
            looked.append((task, index, (direction(g) - old).abs().sum() / 2))
            pull = self.options.reg * g.abs().sum() * old
            for factor, part in zip(pair, pull.split([factor.numel() for factor in pair]), strict=True):
                factor.grad.add_(part.reshape(factor.shape))
        if looked:
            distances = torch.stack([d for *_, d in looked]).cpu().double()  # one wait for the device
            for (task, index, _), distance in zip(looked, distances, strict=True):
                self.seen[task, index] += distance
                self.counts[task, index] += 1

    # -- a task's end, and saving ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def end_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        new = {}
        for name, layer in adapters(model).items():
            G = self.sums.get(name, torch.cat([torch.zeros_like(factor).reshape(-1) for factor in factors(layer)]))
            found = direction(G).cpu()[None]
            new[name] = torch.cat([self.known[name].to(found), found]) if name in self.known else found
        model = super().end_task(model, task, memory)
        memory.put(self.name, new)
        self.sums, self.known, self.tree = {}, {}, None
        return model

    def state_dict(self) -> dict[str, Tensor]:
        numbers = {"steps": torch.tensor(self.steps), "seen": self.seen, "counts": self.counts}
        return numbers | {f"sums/{name}": G for name, G in self.sums.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state:
            self.steps, self.seen, self.counts = int(state["steps"]), state["seen"].clone(), state["counts"].clone()
        self.sums = {key.removeprefix("sums/"): G.clone() for key, G in state.items() if key.startswith("sums/")}

    def statistics_bytes(self, model: nn.Module) -> int:
        return sum(4 * factor.numel() for layer in adapters(model).values() for factor in factors(layer))

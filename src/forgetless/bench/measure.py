"""Time and memory of contenders that take turns: a step of A, a step of B, a step of C, again from A, so that whatever else the machine does meets all alike.

CPU time counts what this process computed, whatever else ran; wall time is the one that means something where a GPU or several threads do the work.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

Phases = dict[str, Callable[[], object]]  # of one step, in order


@dataclass
class Times:
    """Seconds of each measured step; of its phases CPU seconds, and none on a GPU, which runs one phase while the next is being queued."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=dict)

    def add(self, phases: Phases, device: torch.device) -> None:
        """Run one step and write down what it took."""
        synchronize(device)
        wall, cpu = time.perf_counter(), time.process_time()
        before = cpu
        for name, phase in phases.items():
            phase()
            if device.type == "cpu":
                now = time.process_time()
                self.phases.setdefault(name, []).append(now - before)
                before = now
        synchronize(device)
        self.cpu.append(time.process_time() - cpu)
        self.wall.append(time.perf_counter() - wall)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def interleaved(contenders: dict[str, Phases], repeats: int, device: torch.device, before: Callable[[], object] | None = None) -> dict[str, Times]:
    """`repeats` rounds, in each one step of every contender. No warming up is done here, and no garbage is collected. before(): ahead of each step, not timed."""
    times = {name: Times() for name in contenders}
    gc.disable()
    try:
        for _ in range(repeats):
            for name, phases in contenders.items():
                if before:
                    before()
                times[name].add(phases, device)
    finally:
        gc.enable()
    return times


def summary(values: list[float]) -> dict[str, float]:
    """Median and quartiles.

    >>> summary([3.0, 1.0, 2.0])
    {'median': 2.0, 'low': 1.5, 'high': 2.5}
    """
    low, median, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return {"median": median, "low": low, "high": high}


def ratio(values: list[float], reference: list[float]) -> float:
    """Median over the rounds of value / reference of the same round, which met the same machine.

    >>> ratio([1.0, 2.0, 9.0], [2.0, 4.0, 3.0])
    0.5
    """
    return summary([a / b for a, b in zip(values, reference, strict=True)])["median"]


def live_bytes(*roots: Any) -> int:
    """Bytes of every tensor, gradients included, that can be reached from `roots`, each storage once however many tensors share it.

    >>> W = torch.zeros(4, 3)
    >>> live_bytes([W, W[:2], W.T]), live_bytes(W, torch.zeros(2))
    (48, 56)
    """
    storages, seen, waiting = {}, {}, list(roots)  # what was seen is held, lest its id be given to another object
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, str, bytes)):
            continue
        seen[id(item)] = item
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr(), item.device] = storage.nbytes()
            waiting.append(item.grad if item.is_leaf else None)
        elif isinstance(item, Mapping):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            waiting += item
        if hasattr(item, "__dict__") and not isinstance(item, torch.Tensor):
            waiting += vars(item).values()
    return sum(storages.values())

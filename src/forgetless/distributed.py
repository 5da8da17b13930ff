"""Several processes as one: the only file that knows process groups. Started by torchrun or accelerate launch; alone, everything here is free and trivial.

Every process trains the same model on its share of each batch (transformers' Trainer, DistributedDataParallel). What happens once (the run folder, commits)
happens on the main process, and its errors reach all.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .errors import ForgetlessError

T = TypeVar("T")


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    return rank() == 0


def launched_rank() -> int:
    """The rank the launcher gave this process, known before any process group is."""
    return int(os.environ.get("RANK", "0"))


def on_main(work: Callable[[], T]) -> T:
    """work() on the main process; its result, or its ForgetlessError, on every process. The result must be picklable."""
    if world_size() == 1:
        return work()
    box: list[Any] = [None, None]
    if is_main():
        try:
            box[0] = work()
        except ForgetlessError as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def shared(items: Sequence[T]) -> list[T]:
    """This process' share of `items`: every world_size-th."""
    return list(items[rank() :: world_size()])


def gathered(items: list[T]) -> list[T]:
    """The lists of all processes, one after another, on every process."""
    if world_size() == 1:
        return items
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, items)
    return [item for part in box for item in part]


def mean(value: float, device: torch.device | str = "cpu") -> float:
    """The mean over the processes."""
    if world_size() == 1:
        return value
    box = torch.tensor(value, dtype=torch.float64, device=device if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(box)
    return float(box) / world_size()


def add_up(tensors: Sequence[torch.Tensor]) -> None:
    """Each tensor becomes its sum over the processes, in place; the same in every process. Of one dtype, on one device."""
    if world_size() == 1:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    for t, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(total.view_as(t))


def differ(text: str) -> bool:
    """Do the processes disagree about `text`?"""
    return len(set(gathered([text]))) > 1


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def lost_contact(error: BaseException) -> bool:
    """Is this error only the echo of another process' end?"""
    if launched_rank() == 0 and os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    text = str(error).lower()
    words = ("connection closed by peer", "connection reset by peer", "gloo", "nccl", "broken pipe", "socket")
    return isinstance(error, (RuntimeError, ConnectionError)) and any(w in text for w in words)


def leave_at_exit() -> None:
    """End the process group when this process ends. Left to the interpreter, gloo's threads abort one exit in twenty, and the launcher then ends the whole job."""
    if world_size() > 1:
        atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()

"""What every benchmark's command line has, and how it speaks while it works."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import native
from ..errors import ConfigError
from ..products import prefers_onednn
from .results import Results, commit, device_name, load_average


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def add_common(parser: argparse.ArgumentParser, name: str, repeats: int) -> None:
    parser.add_argument(
        "--repeats", type=count, default=repeats, help=f"measured steps of each contender; default: {repeats}, after 2 that are not measured"
    )
    parser.add_argument("--threads", type=count, default=1, help="default: 1")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda; default: cpu")
    parser.add_argument("--out", type=Path, help=f"default: benchmarks/results/bench_{name}_DEVICE.json")
    parser.add_argument("--again", action="store_true", help="measure cells again that the file already holds")


def begin(options: argparse.Namespace) -> dict[str, Any]:
    """Threads and device as asked for; the settings all benchmarks write down. Raises ConfigError for a GPU that is not there."""
    if options.device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here")
    torch.set_num_threads(options.threads)
    return {"device": device_name(options.device), "threads": options.threads, "repeats": options.repeats}


def results_file(options: argparse.Namespace, name: str) -> Path:
    return options.out or Path("benchmarks/results") / f"bench_{name}_{options.device.type}.json"


def clock(settings: dict[str, Any]) -> str:
    """CPU time where one thread does all the work, wall time elsewhere."""
    return "cpu" if settings["device"] == "cpu" and settings["threads"] == 1 else "wall"


def libraries() -> dict[str, bool]:
    """What multiplies our fp32 matrices on a CPU: oneDNN rather than torch's own choice; thin ones in C, which is said only where it is so."""
    return {"onednn": prefers_onednn()} | ({"native": True} if native.library() is not None else {})


def fused(device: torch.device) -> bool:
    """Has torch's AdamW a fused kernel there?"""
    return device.type in ("cpu", "cuda")


def measure_all(
    results: Results, wanted: list[dict[str, Any]], settings: dict[str, Any], present: dict[str, str | None], head: dict[str, Any], again: bool,
    title: Callable[[dict[str, Any]], str], names: list[str], measure: Callable[[dict[str, Any]], dict[str, Any]],
) -> list[dict[str, Any]]:  # fmt: skip
    """The cells of the keys `wanted`, each measured unless the file holds it with the same settings and versions, and written as soon as it is."""
    cells = []
    for index, key in enumerate(wanted, 1):
        cell = None if again else results.find(**key, settings=settings, versions=present)
        say(f"[{index}/{len(wanted)}] {title(key)}: {'measured before, kept' if cell else ' '.join(names)}")
        if cell is None:
            told = {"settings": settings, "versions": present, "commit": commit(), "at": time.strftime("%Y-%m-%d"), "load": load_average()}
            cell = key | told | measure(key)
            results.put(cell, head)
        cells.append(cell)
    return cells


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

"""What every benchmark's command line has, and how it speaks while it works."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from .results import device_name


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


def fused(device: torch.device) -> bool:
    """Has torch's AdamW a fused kernel there?"""
    return device.type in ("cpu", "cuda")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

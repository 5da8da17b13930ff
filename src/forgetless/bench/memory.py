"""`python -m forgetless.bench memory`: the most memory a process holds while it trains, by method, each in a process of its own.

A cell is a model's shape (random weights), rows and tokens of a step, and a space of k closed input directions a layer. Three steps are taken, the first of which
chooses directions where a method has any to choose. On a CPU the peak is that of the process' resident set, less what it held once the libraries were loaded; on a GPU
that of the memory allocated there.
"""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ..record import resident_bytes
from .measure import live_bytes
from .options import add_common, begin, libraries, measure_all, results_file, say
from .results import Results, environment, table, versions
from .train import CONTENDERS as METHODS
from .train import PACKAGES, SHAPE, adamw, add_model_options, make_batch, make_model, ours, phases, title, wanted

SUMMARY = "the most memory a process holds while it trains a language model, by method"
EXAMPLE = """examples:
  python -m forgetless.bench memory
  python -m forgetless.bench memory --rows 1 --tokens 16 --contenders gorp-rank-8 gorp-rank-8-kept"""

CONTENDERS: dict[str, dict[str, Any]] = METHODS | {
    "gorp-rank-8-kept": {"name": "gorp", "rank": 8, "release_gradients": False},
    "osft-75-kept": {"name": "osft", "frozen_ratio": 0.75, "release_gradients": False},
}
DEFAULT = ("gorp", "gorp-rank-8", "gorp-rank-8-kept", "osft-75", "osft-75-kept", "osft-adapter-75", "osft-adapter-75-4bit", "lora", "lora-4bit")
STEPS = 3


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser, CONTENDERS, DEFAULT)
    add_common(parser, "memory", 1)


def run(options: argparse.Namespace) -> None:
    """Measure what is not there yet, write it cell by cell, and print the table of all cells asked for."""
    names = ["adamw", *options.contenders]
    settings = begin(options) | {"contenders": names, "autocast": options.autocast, **libraries()}
    results = Results(results_file(options, "memory"), SHAPE)
    cells = measure_all(
        results, wanted(options), settings, versions(*PACKAGES), {"benchmark": "memory", "environment": environment(options.device)}, options.again,
        title, names,
        lambda key: {"contenders": {name: apart(key, name, settings, str(options.device)) for name in names}},
    )  # fmt: skip
    print(table([row for cell in cells for row in rows(cell)]))
    say(f"written to {results.path}")


def apart(key: dict[str, Any], name: str, settings: dict[str, Any], device: str) -> dict[str, Any]:
    """`peaks` in a new process, where nothing else has ever been held; of several the one of the median peak."""
    runs = []
    for _ in range(settings["repeats"]):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            runs.append(pool.submit(peaks, key, name, settings, device).result())
    return sorted(runs, key=lambda run: run["peak"])[len(runs) // 2]


def peaks(key: dict[str, Any], name: str, settings: dict[str, Any], device: str) -> dict[str, int]:
    """Bytes: the process' peak while it trains; the weights; what lives at the end of a backward pass, activations gone, as in `bench train`."""
    torch.set_num_threads(settings["threads"])
    ours(make_model(key | {"shapes": "tiny", "layers": 1}, torch.device("cpu")), {"name": "lora"}, 1)  # imports what any contender imports
    before, batch, model = resident("VmRSS"), make_batch(key, torch.device(device)), make_model(key, torch.device(device))
    weights = live_bytes(model)
    if name == "adamw":
        optimizer, method = adamw(model)
    else:
        model, optimizer, method = ours(model, CONTENDERS[name], key["space"])
    steps, held = phases(model, optimizer, method, batch, settings["autocast"]), 0
    for _ in range(STEPS):
        for phase in ("forward", "backward", "statistics"):
            steps[phase]()
        held = live_bytes(model, optimizer, method)
        steps["step"]()
    peak = torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else resident("VmHWM") - before
    return {"peak": peak, "weights": weights, "after_backward": held}


def resident(which: str) -> int:
    """Bytes this process holds (VmRSS) or has held at most (VmHWM), where the system says so; else the most it has held."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))
    except (OSError, StopIteration):
        return resident_bytes()


def rows(cell: dict[str, Any]) -> list[dict[str, str]]:
    found, lines = cell["contenders"], []
    for name, own in found.items():
        line = {"shapes": f"{cell['shapes']} x {cell['layers']}", "tokens": f"{cell['rows']} x {cell['tokens']}", "contender": name}
        line |= {"peak MB": f"{own['peak'] / 1e6:.0f}", "x adamw": f"{own['peak'] / found['adamw']['peak']:.2f}"}
        kept = found.get(f"{name}-kept")
        line |= {"x kept": f"{own['peak'] / kept['peak']:.2f}" if kept else "", "after backward MB": f"{own['after_backward'] / 1e6:.0f}"}
        lines.append(line)
    return lines

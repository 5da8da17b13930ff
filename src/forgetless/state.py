"""What a method carries from task to task, on disk: state/ of a committed task. Safetensors and JSON, with the version of their layout.

Committed state is never rewritten, since its hash is in the lineage: one of an older version is brought up to date each time it is read (MIGRATIONS).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import DataError
from .files import link_or_copy, write
from .methods.base import Memory

VERSION = 1  # 0: before there was a version
# from a version to the next: what a memory of that version becomes
MIGRATIONS: dict[int, Callable[[Memory], Memory]] = {0: lambda memory: memory}  # 1 says its version, nothing else changed


def save_memory(folder: Path, memory: Memory, recorded: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in memory.tensors.items()}, folder / "method.safetensors")
    write(folder / "method.json", json.dumps(memory.info, sort_keys=True))
    write(folder / "version.json", json.dumps({"version": VERSION}))
    if "adapter_config" in memory.info:  # the same tensors under the name PEFT looks for
        write(folder / "adapter_config.json", json.dumps(memory.info["adapter_config"], sort_keys=True))
        adapter = {k: v.contiguous() for k, v in memory.tensors.items() if k.startswith("base_model.model.")}
        if len(adapter) == len(memory.tensors):
            link_or_copy(folder / "method.safetensors", folder / "adapter_model.safetensors")
        else:  # what else a method keeps is not PEFT's to read
            save_file(adapter, folder / "adapter_model.safetensors")
    if recorded:
        save_file(recorded, folder / "inputs.safetensors")


def load_memory(folder: str | Path) -> Memory:
    """A method's memory from a committed task's state/ folder, whatever version of forgetless wrote it. Raises DataError where a later one did."""
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / "method.safetensors").is_file():
        raise DataError(f"{folder}: no method.safetensors; give the state folder of a committed task, such as runs/first/tasks/00-cities/state")
    version = state_version(folder)
    if version > VERSION:
        raise DataError(f"{folder}: state of version {version}, which a later forgetless wrote; this one reads up to {VERSION}. Upgrade forgetless")
    # clone: safetensors leaves a tensor at any address of its file, and by a matrix's address modulo 64 a product may round otherwise than in the process that made it
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / "method.safetensors").items()}
    memory = Memory(tensors, json.loads((folder / "method.json").read_text(encoding="utf-8")))
    for old in range(version, VERSION):
        memory = MIGRATIONS[old](memory)
    return memory


def state_version(folder: Path) -> int:
    file = folder / "version.json"
    return json.loads(file.read_text(encoding="utf-8"))["version"] if file.is_file() else 0


def model_sha256(model: nn.Module) -> str:
    """sha256 over (name, dtype, shape, raw bytes) of the sorted state dict, a tied tensor once."""
    return tensors_sha256(model.state_dict())


def tensors_sha256(tensors: dict[str, Tensor]) -> str:
    digest, seen = hashlib.sha256(), set()
    for name, tensor in sorted(tensors.items()):
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape))
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def folder_sha256(folder: Path) -> str:
    """Over the names and bytes of the files in a folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()

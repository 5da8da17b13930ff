"""A routed set: the base model, one low-rank increment a task beside its weights, and a router that chooses among them for each prompt.

    export_routed("runs/first", "out")            # base/, adapters/00-cities/, ..., router.safetensors, routed.json
    loaded = load_routed("out")
    for places, speaker in loaded.answering(loaded.model, prompts):      # prompts: token ids
        with speaker as model:                                          # the base model with the increment of prompts[places]
            ...

base/ is a plain Hugging Face folder, and each of adapters/ one that PeftModel.from_pretrained(base, folder) reads; the router alone is ours.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import models
from .adapters import carrying
from .errors import ConfigError, DataError
from .methods.base import Memory
from .router import Analytic, Choice, Keys, choose, features
from .state import load_memory

OWNER = "routed"  # under which the method keeps its memory
ROUTERS = {"analytic": Analytic, "keys": Keys}


@dataclass
class RoutedSet:
    """What the router needs and chooses among. increments: of each task {"LAYER.lora_A": (r, in), "LAYER.lora_B": (out, r)}, in the tasks' order.

    info: tasks (their names), router, router_layer, top, temperature, and adapter, PEFT's config of all increments.
    """

    info: dict[str, Any]
    router: Analytic | Keys
    increments: list[dict[str, Tensor]]
    model: nn.Module | None = None  # where it was loaded from a folder
    tokenizer: Any = None

    @classmethod
    def of(cls, memory: Memory) -> RoutedSet:
        """As the method `routed` keeps it."""
        kept, info = memory.of(OWNER), memory.info.get(OWNER)
        if info is None:
            raise ConfigError("no task was learned by the method routed; there is nothing to choose among")
        increments = [under(kept, f"{k:02d}/") for k in range(len(info["tasks"]))]
        return cls(info, ROUTERS[info["router"]].of(under(kept, "router/")), increments)

    def route(self, model: nn.Module, prompts: list[list[int]]) -> list[Choice]:
        """The tasks, by number, and their weights that the router chooses for each prompt. model: the base, carrying nothing."""
        if not prompts:
            return []
        scores = self.router.scores(features(model, prompts, self.info["router_layer"]))
        return choose(scores, self.info["top"], self.info["temperature"])

    def answering(self, model: nn.Module, prompts: list[list[int]]) -> list[tuple[list[int], AbstractContextManager[nn.Module]]]:
        """The prompts grouped by what was chosen for them: (their places, a context that gives the model with that increment)."""
        groups: dict[Choice, list[int]] = {}
        for place, choice in enumerate(self.route(model, prompts)):
            groups.setdefault(choice, []).append(place)
        return [(places, carrying(model, self.increment(choice))) for choice, places in groups.items()]

    def increment(self, choice: Choice) -> dict[str, tuple[Tensor, Tensor]]:
        """{layer: (A, B)} of the weighted sum of the increments chosen: their ranks side by side."""
        scale = self.info["adapter"]["lora_alpha"] / self.info["adapter"]["r"]
        out = {}
        for key in self.increments[choice[0][0]]:
            if key.endswith(".lora_A"):
                name = key.removesuffix(".lora_A")
                A = torch.cat([self.increments[task][key] for task, _ in choice])
                B = torch.cat([self.increments[task][f"{name}.lora_B"] * (scale * weight) for task, weight in choice], 1)
                out[name] = A, B
        return out


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def folder_names(tasks: list[str]) -> Iterator[str]:
    return (f"{k:02d}-{task}" for k, task in enumerate(tasks))


def export_routed(run: str | Path, out: str | Path) -> Path:
    """Write what a run with the method routed has learned so far into the folder `out`: all of it or nothing.

    Raises ConfigError where `run` has learned nothing by that method, or `out` exists.
    """
    from safetensors.torch import save_file

    run, out = Path(run), Path(out)
    if not (run / "current").is_file():
        raise ConfigError(f"{run}: not the folder of a run that has learned a task; there is nothing to export")
    if out.exists():
        raise ConfigError(f"{out}: exists already; name another folder. Nothing was touched")
    committed = run / "tasks" / (run / "current").read_text(encoding="utf-8").strip()
    found = RoutedSet.of(load_memory(committed / "state"))
    work = out.with_name(f".{out.name}.tmp")
    try:
        shutil.rmtree(work, ignore_errors=True)  # of an export that was killed
        work.mkdir(parents=True)
        shutil.copytree(committed / "model", work / "base")
        for name, increment in zip(folder_names(found.info["tasks"]), found.increments, strict=True):
            folder = work / "adapters" / name
            folder.mkdir(parents=True)
            (folder / "adapter_config.json").write_text(json.dumps(found.info["adapter"], sort_keys=True), encoding="utf-8")
            tensors = {f"base_model.model.{key}.weight": tensor for key, tensor in increment.items()}
            save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        router = {key: tensor for key, tensor in found.router.tensors().items() if key != "R"}  # R is for learning more
        save_file(router, work / "router.safetensors")
        (work / "routed.json").write_text(json.dumps(found.info, indent=1), encoding="utf-8")
        work.replace(out)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error.strerror}); name another folder") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def load_routed(folder: str | Path, dtype: torch.dtype | str = torch.float32) -> RoutedSet:
    """What export_routed has written, with its base model and tokenizer. Raises DataError where something of it is missing."""
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        info = json.loads((folder / "routed.json").read_text(encoding="utf-8"))
        router = ROUTERS[info["router"]].of(load_file(folder / "router.safetensors"))
        increments = []
        for name in folder_names(info["tasks"]):
            tensors = load_file(folder / "adapters" / name / "adapter_model.safetensors")
            # clone: as in load_memory, a product may round otherwise by a tensor's address
            increments.append({key.removeprefix("base_model.model.").removesuffix(".weight"): tensor.clone() for key, tensor in tensors.items()})
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: not a routed set as export_routed writes it, or not all of it ({error})") from None
    return RoutedSet(info, router, increments, *models.load(str(folder / "base"), dtype=dtype))

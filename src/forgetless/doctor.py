"""`forgetless doctor`: what is installed and what the machine can; with a config what it would train, the bytes it would hold, and the data; and for each warning what to do."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from . import machine
from .config import RunConfig
from .errors import ConfigError
from .machine import GB, Found, Warning

LOOKED_AT = 200  # training rows of each task that are tokenised
AN_HOUR = 3600
# what accelerate launch puts into the environment of each process
LAUNCHERS = {"fsdp": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "deepspeed": {"ACCELERATE_USE_DEEPSPEED": "true"}}


def examine(config: RunConfig | None) -> dict[str, Any]:
    """Versions, hardware, warnings; with a config also the model's parameters, the matched modules, the bytes, the disk, and each task's rows and lengths."""
    import torch

    from .trainer import bf16_pays

    autocast = bool(config.train["bf16"]) if config and "bf16" in config.train else bf16_pays()
    warnings: list[Warning] = []

    def noted(found: Found) -> dict[str, Any]:
        warnings.extend(found[1])
        return found[0]

    versions = noted(machine.packages())
    found: dict[str, Any] = {
        "forgetless": importlib.metadata.version("forgetless"), **machine.about(),
        "packages": {name: entry["installed"] for name, entry in versions.items()}, "supported": {name: entry["supported"] for name, entry in versions.items()},
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "devices": noted(machine.devices()), "bf16_autocast": autocast, "bf16": noted(machine.bf16(autocast)), "threads": noted(machine.threads()),
        "launchers": noted(launchers()), "hub": noted(machine.hub(config.model if config else None)), "FORGETLESS_DATA": bool(os.environ.get("FORGETLESS_DATA")),
    }  # fmt: skip
    if config is None:
        found["disk"] = noted(machine.disk(Path("."), None))
    else:
        warnings += for_config(config)
        found["sharding"] = noted(sharding(config))
        about, more = planned(config, found["devices"])
        found |= examine_config(config, warnings) | {"plan": about}
        warnings += more
        present = sum(p.stat().st_size for p in Path(config.output_dir).rglob("*") if p.is_file() and not p.is_symlink())
        found["disk"] = noted(machine.disk(Path(config.output_dir), max(0, about["disk_bytes"] - present) if about else None))
    return found | {"warnings": [dataclasses.asdict(w) for w in warnings]}


def launchers() -> Found:
    """What training would say to FSDP2 and DeepSpeed: None where it would train, else why not; and which of them accelerate's configuration asks for."""
    from .trainer import check_launcher

    found: dict[str, Any] = {}
    for name, variables in LAUNCHERS.items():
        with environment(variables):
            found[name] = refusal(check_launcher)
    asked = refusal(check_launcher)
    found |= {"world_size": int(os.environ.get("WORLD_SIZE", "1")), "accelerate_config": accelerate_config()}
    if asked is None and (found["accelerate_config"] or "").lower() in LAUNCHERS:
        asked = found[found["accelerate_config"].lower()]
    do = "torchrun --nproc-per-node N -m forgetless run CONFIG (each process holds the whole model), or an accelerate configuration for MULTI_GPU"
    return found, [Warning("launchers", asked, do)] if asked else []


def sharding(config: RunConfig) -> Found:
    """May several processes share the model of this config (`sharding: fsdp2`)? None where they may, else why not; and what the config asks for."""
    from . import shared_model
    from .methods import get

    method = get(config.method.name, **config.method.options)
    found = {"asked": config.sharding, "fsdp2": refusal(partial(shared_model.check, config.model_copy(update={"sharding": "fsdp2"}), method))}
    if config.sharding and found["fsdp2"] is None and os.environ.get("WORLD_SIZE", "1") == "1":
        what = f"sharding: {config.sharding}, and one process: it would hold the whole model, as without"
        return found, [Warning("sharding", what, "torchrun --nproc-per-node N -m forgetless run CONFIG")]
    return found, []


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def refusal(ask: Any) -> str | None:
    try:
        ask()
    except ConfigError as error:
        return str(error)
    return None


def accelerate_config() -> str | None:
    """distributed_type of the file that `accelerate config` has written; None where there is none."""
    import yaml
    from accelerate.commands.config.config_args import default_yaml_config_file

    with contextlib.suppress(OSError, ValueError, AttributeError, yaml.YAMLError):
        return yaml.safe_load(Path(default_yaml_config_file).read_text(encoding="utf-8")).get("distributed_type")
    return None


def for_config(config: RunConfig) -> list[Warning]:
    """What the config asks for that would disappoint, before anything is loaded."""
    warnings = []
    for name in config.report_to:
        if importlib.util.find_spec(name) is None:
            warnings.append(Warning("report_to", f"{name} is not installed", f"pip install {name}"))
    if config.evaluate.general and importlib.util.find_spec("lm_eval") is None:
        warnings.append(Warning("evaluate", "evaluate.general asks lm-eval, which is not installed", "pip install 'forgetless[eval]'"))
    if config.dtype == "bfloat16" and config.precision == "plain":
        what = "bfloat16 weights with precision: plain lose every update smaller than 1/256 of the weight"
        warnings.append(Warning("precision", what, "precision: fp32_master, or stochastic_rounding or kahan where memory is short"))
    return warnings


def planned(config: RunConfig, devices: dict[str, Any]) -> Found:
    """Peak memory, disk and seconds as `forgetless estimate` has them; {} for a method or a model that cannot be planned."""
    from .estimate import duration, estimate

    try:
        plan = estimate(config)
    except ConfigError:  # the model is loaded below, where the same is said again if it is not for planning alone
        return {}, []
    found = {key: plan[key] for key in ("peak_bytes", "disk_bytes", "seconds")}
    on_gpu = plan["device"] == "cuda"
    there = devices["gpus"][0]["memory_free"] if on_gpu else devices["memory_available"]
    warnings = []
    if plan["peak_bytes"] > there:
        what = f"training will take {plan['peak_bytes'] / GB:.1f} GB of {'GPU ' * on_gpu}memory, and {there / GB:.1f} GB are free"
        largest = max(plan["peak"], key=plan["peak"].get).replace("_", " ")
        do = "a smaller train.per_device_train_batch_size, train.gradient_checkpointing: true, dtype: bfloat16, method lora, or several GPUs with sharding: fsdp2"
        warnings.append(Warning("memory", f"{what}; the largest part: {largest}", do))
    longest = max((s or 0.0 for s in plan["seconds"].values()), default=0.0)
    if longest > AN_HOUR and config.checkpoint_every is None:
        what = f"a task trains for about {duration(longest)}, and a run that is killed begins its task again"
        warnings.append(Warning("checkpoints", what, "checkpoint_every: 100"))
    return found, warnings


def examine_config(config: RunConfig, warnings: list[Warning] | None = None) -> dict[str, Any]:
    """The model, what of it the method trains, bytes, tasks. warnings: gets what is found on the way. Raises what `forgetless run` would raise before its first step."""
    import torch

    from . import bits, models, shared_model
    from .batches import check_packing
    from .methods import get
    from .methods.base import Memory
    from .optim.coordinates import protects
    from .quantised import frozen, quantised_bytes
    from .tasks import load_stream
    from .trainer import training_arguments

    warnings = [] if warnings is None else warnings
    method = get(config.method.name, **config.method.options)
    args = training_arguments(config.train, config.seed, config.output_dir)
    shared_model.check(config, method)
    method.micro_batches = args.gradient_accumulation_steps
    stream = load_stream(config)
    model, tokenizer = models.load(config.model, trust_remote_code=config.trust_remote_code, dtype=getattr(torch, config.dtype))
    method.check(model)
    if config.packing:
        check_packing(model)
    for option, wanted in (("quantize", config.quantize), ("optimizer_state", config.optimizer_state == "8bit")):
        if wanted:
            bits.check(option, model.device)
    parameters, layers = sum(p.numel() for p in model.parameters()), kinds(model)
    model = method.begin_task(model, None, Memory())  # adapters attached, where the method has some
    groups = method.param_groups(model)
    learning = {p for g in groups for p in g["params"]}
    trained = sum(p.numel() for p in learning)
    names = [name for g in groups for name in g.get("names") or ["?"] * len(g["params"])]  # a method of one's own may not name them
    tasks = []
    for i, task in enumerate(stream):
        about, more = examine_task(task, tokenizer, f"tasks.{i}")
        tasks.append(about)
        warnings += more
    warnings += [
        Warning("data", text, "take them out of the training rows, or read the scores knowing it") for text in stream.warnings(config.evaluate.split)
    ]
    attention = model.config._attn_implementation
    longest = max(task["tokens_max"] for task in tasks)
    if attention == "eager" and longest > 512:
        what = f"{type(model).__name__} has eager attention alone, whose memory grows with the square of {longest} tokens"
        warnings.append(Warning("attention", what, "shorter rows (max_prompt_tokens), or another model"))
    if config.quantize:  # of layers that are frozen while a task trains
        for p in model.parameters():
            p.requires_grad_(p in learning)
        small = sum(quantised_bytes(layer.weight, config.quantize) - layer.weight.nbytes for layer in frozen(model))
    optimizer = method.optimizer(groups, lr=1e-4, weight_decay=args.weight_decay, precision=config.precision, optimizer_state=config.optimizer_state)
    held, spaces = method.innermost().held_bytes(), method.spaced(model)  # an adapter's: only its constrained factors are copied
    in_training = {name for name, p in model.named_parameters() if p in learning} | set(names)
    return {
        "model": {"name": config.model, "class": type(model).__name__, "parameters": parameters, "attention": attention},
        "method": {"name": method.name, "options": method.options.model_dump(), "trained_parameters": trained, "trained_tensors": names},
        "modules": matched(layers, in_training, method),
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


def examine_task(task: Any, tokenizer: Any, key: str) -> tuple[dict[str, Any], list[Warning]]:
    """Rows, labels, lengths, and how many of the first rows lose a part of their text. key: where the task stands in the config."""
    looked = task.train[:LOOKED_AT]
    lengths = sorted(len(task.encode(tokenizer, e)["input_ids"]) for e in looked)
    free = dataclasses.replace(task, max_prompt_tokens=10**9, max_text_tokens=None, sha256=task.sha256)
    whole = [len(free.encode_prompt(tokenizer, e)) for e in looked]
    cut = [n for n, e in zip(whole, looked, strict=True) if n > len(task.encode_prompt(tokenizer, e))]
    about = {
        "name": task.name, "rows": {"train": len(task.train), "dev": len(task.dev), "test": len(task.test)}, "labels": task.labels,
        "tokens_median": lengths[len(lengths) // 2], "tokens_max": lengths[-1], "overlap": task.overlap, "looked_at": len(looked), "cut": len(cut),
    }  # fmt: skip
    if not cut:
        return about, []
    lost = "beginning" if task.chat or task.prompt == "{sentence}" else "end"
    what = f"task '{task.name}': {len(cut)} of the first {len(looked)} rows lose the {lost} of their text (the longest prompt has {max(cut)} tokens)"
    limits = {"max_prompt_tokens": task.max_prompt_tokens if max(cut) > task.max_prompt_tokens else None, "max_text_tokens": task.max_text_tokens}
    raised = " and ".join(f"{key}.{name} (now {value})" for name, value in limits.items() if value is not None)
    return about, [Warning("data", what, f"raise {raised}, if what is lost matters and memory allows")]


def kinds(model: Any) -> dict[str, dict[str, Any]]:
    """{last part of the name: names, parameters, bytes, why it may be left out} of the linear layers; {"": ...} of all other parameters."""
    from . import models

    head, tied, found = model.get_output_embeddings(), models.tied_weights(model), {}
    seen: set[int] = set()
    for name, layer in models.named_layers(model).items():
        if not models.is_linear(layer):
            continue
        why = ""
        if layer is head:
            why = (
                f"the head, whose weight is that of {tied[id(layer.weight)][0]}"
                if id(layer.weight) in tied
                else "the head, left out unless it is named"
            )
        entry = found.setdefault(name.rsplit(".", 1)[-1], {"layers": [], "parameters": 0, "bytes": 0, "why": why})
        entry["layers"].append(name)
        if id(layer.weight) not in tied:
            seen.add(id(layer.weight))
            entry["parameters"] += layer.weight.numel()
            entry["bytes"] += layer.weight.nbytes
    rest = [p for p in model.parameters() if id(p) not in seen]
    found[""] = {
        "layers": [],
        "parameters": sum(p.numel() for p in rest),
        "bytes": sum(p.nbytes for p in rest),
        "why": "embeddings, norms, biases: no linear layers",
    }
    return found


def matched(layers: dict[str, dict[str, Any]], in_training: set[str], method: Any) -> list[dict[str, Any]]:
    """Of each kind of linear layer how many are trained, themselves or by an adapter, and why the others are not."""
    linear = [name for entry in layers.values() for name in entry["layers"]]
    found = []
    for kind, entry in layers.items():
        if kind:
            trained = sum(any(f".{name}." in f".{tensor}" for tensor in in_training) for name in entry["layers"])
        else:
            trained = sum(not any(f".{name}." in f".{tensor}" for name in linear) for tensor in in_training)
        options = [name for name, value in method.options.model_dump().items() if "modules" in name and value is not None]
        why = "" if trained else entry["why"] or (f"{' and '.join(options)} does not name it" if options else f"method {method.name} leaves it out")
        found.append(
            {
                "kind": kind or "others",
                "layers": len(entry["layers"]),
                "trained": trained,
                "parameters": entry["parameters"],
                "bytes": entry["bytes"],
                "why": why,
            }
        )
    return found


def show(found: dict[str, Any]) -> None:
    """The same, for people."""
    devices, bf16, threads, disk = found["devices"], found["bf16"], found["threads"], found["disk"]
    print(f"forgetless {found['forgetless']}, Python {found['python']}, {found['system']}")
    installed = [f"{name} {version}" for name, version in found["packages"].items() if version]
    missing = [name for name, version in found["packages"].items() if not version]
    print(f"installed  {', '.join(installed)}" + (f"\nmissing    {', '.join(missing)} (optional)" if missing else ""))
    for gpu in devices["gpus"]:
        print(f"GPU        {gpu['name']}, {gpu['memory_free'] / GB:.0f} of {gpu['memory'] / GB:.0f} GB free, compute capability {gpu['capability']}")
    busy = "" if threads["load"] is None else f", load {threads['load']:g}"
    print(
        f"CPU        {devices['cpu']}, {threads['cores']} cores, {threads['torch']} threads{busy}, {devices['memory_available'] / GB:.1f} of {devices['memory'] / GB:.0f} GB free"
    )
    measured = (
        f"; a product takes {bf16['share_of_fp32_seconds']:.2f} of its time in fp32, and is {bf16['error']:.1%} off"
        if bf16["works"]
        else "; it does not work here"
    )
    print(f"bf16       autocast {'on' if found['bf16_autocast'] else 'off'}{measured}")
    for name, why in ((name, found["launchers"][name]) for name in LAUNCHERS):
        print(f"{name:<10} by accelerate launch: {'trains under it' if why is None else f'no: {why}'}")
    hub = found["hub"]
    print(
        f"hub        {'offline' if hub['offline'] else 'is asked'}, {'logged in' if hub['logged_in'] else 'nobody logged in'}, cache {hub['cache']}"
    )
    needed = "" if disk["needed"] is None else f", the run will take {disk['needed'] / GB:.2f} GB more"
    can = [f"{'' if disk[key] else 'no '}{key.replace('_', ' ')}" for key in ("hard_links", "folder_links")]
    print(f"disk       {disk['folder']}: {disk['free'] / GB:.1f} GB free{needed}, {', '.join(can)}")
    if "model" in found:
        show_config(found)
    for warning in found["warnings"]:
        print(f"\nwarning    {warning['what']}\n           do: {warning['do']}")
    print("\nno warnings" if not found["warnings"] else f"\n{len(found['warnings'])} warning{'s' * (len(found['warnings']) > 1)}")


def show_config(found: dict[str, Any]) -> None:
    m, method, sizes, plan = found["model"], found["method"], found["bytes"], found["plan"]
    print(f"\nmodel      {m['name']}: {m['class']}, {m['parameters']:,} parameters, attention {m['attention']}")
    names = method["trained_tensors"]
    print(f"method     {method['name']} trains {method['trained_parameters']:,} parameters in {len(names)} tensors: {names[0]} .. {names[-1]}")
    why = found["sharding"]["fsdp2"]
    print(f"processes  each with the whole model (torchrun), or sharing it: {'sharding: fsdp2' if why is None else f'no: {why}'}")
    for entry in found["modules"]:
        count = f"{entry['trained']} of {entry['layers']} layers" if entry["layers"] else f"{entry['trained']} tensors"
        why = f": {entry['why']}" if entry["why"] and not entry["trained"] else ""
        print(f"  {entry['kind']:<12} {count} trained, {entry['parameters']:,} parameters, {entry['bytes'] / 2**20:,.0f} MB{why}")
    print("bytes      " + "  ".join(f"{key.replace('_', ' ')} {value / 2**20:,.0f} MB" for key, value in sizes.items()))
    if plan:
        print(f"peak       {plan['peak_bytes'] / GB:.2f} GB while training (forgetless estimate has the parts)")
    for task in found["tasks"]:
        r = task["rows"]
        kind = f"{len(task['labels'])} labels" if task["labels"] else "free text"
        rows = f"{r['train']} train, {r['dev']} dev, {r['test']} test rows"
        cut = f", {task['cut']} of {task['looked_at']} cut" if task["cut"] else ""
        print(f"task       {task['name']}: {rows}, {kind}, {task['tokens_median']} tokens a row (median), {task['tokens_max']} at most{cut}")
    for watched in found["watch"]:
        print(f"watch      {watched['name']}: {watched['rows']} rows, never trained")

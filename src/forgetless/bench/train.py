"""`python -m forgetless.bench train`: a whole training step of a language model, by the methods beside AdamW on the same linear layers.

A cell is a model's shape (random weights, as many blocks as asked for), rows and tokens a step, a space of k closed input directions a layer, as earlier tasks leave
it, and a contender. A step is forward, backward, the method's statistics, clipping, and the optimizer; the loss is that of the last few tokens, as of an answer. Each
contender trains its own model, in turns with AdamW's.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import IGNORED, answer_loss
from ..errors import ConfigError
from ..methods import get
from ..methods.base import Memory, Method
from ..models import linear_modules
from ..quantised import stand_ins
from ..subspace import Subspace, orthonormalize
from .measure import Phases, interleaved, live_bytes, ratio, summary
from .options import add_common, begin, clock, count, fused, libraries, measure_all, results_file, say
from .results import Results, environment, table, versions
from .shapes import MODELS

SUMMARY = "a whole training step of a language model, by the methods beside AdamW on the same layers"
EXAMPLE = """examples:
  python -m forgetless.bench train
  python -m forgetless.bench train --layers 6 --rows 8 --tokens 512 --contenders gorp osft-75 osft-adapter-75 --autocast"""

PACKAGES = ("forgetless", "torch", "transformers", "peft")
SHAPE = ("shapes", "layers", "rows", "tokens", "space")
KEY = (*SHAPE, "contender")
ANSWER = 4  # tokens of a row that the loss is of
ADAMW = dict(lr=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
MAX_NORM = 1.0

CONTENDERS: dict[str, dict[str, Any]] = {  # method and options; the reference, adamw, is none of them
    "gorp": {"name": "gorp"},
    "gorp-rank-8": {"name": "gorp", "rank": 8},
    "gorp-rank-8-warm": {"name": "gorp", "rank": 8, "refresh": "warm"},
    "gorp-paper": {"name": "gorp", "preset": "paper"},
    "osft-50": {"name": "osft", "frozen_ratio": 0.5},
    "osft-75": {"name": "osft", "frozen_ratio": 0.75},
    "osft-adapter-75": {"name": "osft", "frozen_ratio": 0.75, "form": "adapter"},
    "osft-inputs": {"name": "osft", "protect": "inputs"},
    "lora": {"name": "lora"},
    "lora-4bit": {"name": "lora", "quantize": "4bit"},
    "osft-adapter-75-4bit": {"name": "osft", "frozen_ratio": 0.75, "form": "adapter", "quantize": "4bit"},
}


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser, CONTENDERS, tuple(CONTENDERS))
    add_common(parser, "train", 10)


def add_model_options(parser: argparse.ArgumentParser, contenders: dict[str, dict[str, Any]], default: tuple[str, ...]) -> None:
    """A model, the rows of its steps, the closed directions of its layers, and the methods that train it."""
    parser.add_argument("--shapes", choices=MODELS, default="smollm2", help="default: smollm2")
    parser.add_argument("--layers", type=count, help="blocks; default: all the model has")
    parser.add_argument("--rows", type=count, default=8, help="rows of a step; default: 8")
    parser.add_argument("--tokens", nargs="+", type=count, default=[64], help="tokens of a row; default: 64")
    parser.add_argument("--space", type=int, default=64, help="closed input directions of each layer, where a method closes inputs; default: 64")
    said = "all" if len(default) == len(contenders) else " ".join(default)
    parser.add_argument("--contenders", nargs="+", choices=contenders, default=list(default), help=f"default: {said}; adamw always takes part")
    parser.add_argument("--autocast", action="store_true", help="compute in bf16 over fp32 weights")


def wanted(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The shapes asked for. Raises ConfigError for a space or a row that does not fit."""
    shape = MODELS[options.shapes]
    if options.space < 0 or options.space >= shape["hidden_size"]:
        raise ConfigError(f"--space {options.space}: the layers of {options.shapes} have {shape['hidden_size']} inputs")
    if min(options.tokens) <= ANSWER:
        raise ConfigError(f"--tokens {min(options.tokens)}: a row needs more than the {ANSWER} tokens its loss is of")
    layers = options.layers or shape["num_hidden_layers"]
    return [dict(zip(SHAPE, (options.shapes, layers, options.rows, tokens, options.space), strict=True)) for tokens in options.tokens]


def run(options: argparse.Namespace) -> None:
    """Measure what is not there yet, write it cell by cell, and print the table of all cells asked for."""
    common = begin(options)
    settings = common | {"autocast": options.autocast, "fused_adamw": fused(options.device), **libraries()}
    results = Results(results_file(options, "train"), KEY)
    head = {"benchmark": "train", "environment": environment(options.device)}
    cells = measure_all(
        results, [key | {"contender": name} for key in wanted(options) for name in options.contenders], settings, versions(*PACKAGES), head, options.again,
        lambda key: f"{key['contender']}: {title(key)}", ["beside adamw"], lambda key: measure(key, CONTENDERS[key["contender"]], settings, options.device),
    )  # fmt: skip
    print(table([row(cell) for cell in cells]))
    say(f"written to {results.path}")


def title(key: dict[str, Any]) -> str:
    return f"{key['layers']} blocks of {key['shapes']}, {key['rows']} rows of {key['tokens']} tokens, {key['space']} directions closed"


# -- one contender ---------------------------------------------------------------------------------------------------------------------


def make_batch(key: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    ids = torch.randint(10, MODELS[key["shapes"]]["vocab_size"], (key["rows"], key["tokens"]), generator=torch.Generator().manual_seed(1)).to(device)
    labels = ids.clone()
    labels[:, :-ANSWER] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def make_model(key: dict[str, Any], device: torch.device) -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    shape = MODELS[key["shapes"]] | {"num_hidden_layers": key["layers"]}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.float32)
    if device.type == "cpu":
        model.set_attn_implementation("eager")  # as in training
    return model.to(device).train()


def adamw(model: nn.Module) -> tuple[torch.optim.Optimizer, Method | None]:
    weights = [layer.weight for layer in linear_modules(model).values()]
    only(model, weights)
    return torch.optim.AdamW(weights, **ADAMW, fused=fused(weights[0].device)), None


def ours(model: nn.Module, spec: dict[str, Any], space: int) -> tuple[nn.Module, torch.optim.Optimizer, Method]:
    """A method at a task that comes after others: each of its spaces holds `space` directions."""
    method, memory = get(spec["name"], **{k: v for k, v in spec.items() if k not in ("name", "quantize")}), Memory()
    bases = {
        name: orthonormalize(torch.randn(n, space, generator=torch.Generator().manual_seed(i)))
        for i, (name, n) in enumerate((method.spaced(model) or {}).items())
    }
    memory.keep({name: Subspace(V, torch.ones(space)) for name, V in bases.items()})
    model = method.begin_task(model, None, memory)
    groups = method.param_groups(model)
    only(model, [p for group in groups for p in group["params"]])
    if hasattr(method, "max_grad_norm"):
        method.max_grad_norm = MAX_NORM
    optimizer = method.optimizer(groups, **ADAMW, max_grad_norm=MAX_NORM)
    for layer, _ in stand_ins(model, spec["quantize"]) if "quantize" in spec else ():
        layer.weight.data = layer.weight.new_empty(0)
    optimizer.track_captured = True  # as in training
    return model, optimizer, method


def only(model: nn.Module, weights: list[Tensor]) -> None:
    learning = set(weights)
    for p in model.parameters():
        p.requires_grad_(p in learning)


def phases(model: nn.Module, optimizer: torch.optim.Optimizer, method: Method | None, batch: dict[str, Tensor], autocast: bool) -> Phases:
    losses: list[Tensor] = []
    device = batch["input_ids"].device.type
    weights = [p for group in optimizer.param_groups for p in group["params"]]

    def forward() -> None:
        with torch.autocast(device, dtype=torch.bfloat16) if autocast else contextlib.nullcontext():
            losses.append(answer_loss(model, batch)[0])

    def backward() -> None:
        losses.pop().backward()

    def statistics() -> None:
        if method is not None:
            method.on_step(model)

    def step() -> None:
        if method is None:
            torch.nn.utils.clip_grad_norm_(weights, MAX_NORM)  # ours clip within their step
        optimizer.step()
        optimizer.zero_grad()

    return {"forward": forward, "backward": backward, "statistics": statistics, "step": step}


def measure(key: dict[str, Any], spec: dict[str, Any], settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """One contender and AdamW in turns. Held: bytes at the end of a backward pass of what can be reached from model, optimizer and method."""
    gc.collect()
    batch = make_batch(key, device)
    plain = make_model(key, device)
    reference = adamw(plain)
    model, optimizer, method = ours(make_model(key, device), spec, key["space"])
    both = {"adamw": (plain, *reference), "own": (model, optimizer, method)}
    steps = {name: phases(*of, batch, settings["autocast"]) for name, of in both.items()}
    interleaved(steps, 1, device)
    held = {}
    for name, own in steps.items():  # a second step warms up, and in it the memory is counted
        for phase in ("forward", "backward", "statistics"):
            own[phase]()
        held[name] = live_bytes(*both[name])
        own["step"]()
    times = interleaved(steps, settings["repeats"], device)
    by = clock(settings)
    found = {"seconds": {"cpu": summary(times["own"].cpu), "wall": summary(times["own"].wall)}, "bytes": held["own"]}
    found["phases"] = {phase: summary(values)["median"] for phase, values in times["own"].phases.items()}
    found["adamw"] = {"seconds": summary(getattr(times["adamw"], by)), "bytes": held["adamw"]}
    found["adamw"]["phases"] = {phase: summary(values)["median"] for phase, values in times["adamw"].phases.items()}
    # every refresh_gap-th step is a longer one, so the mean counts, and not the median
    mean = sum(getattr(times["own"], by)) / sum(getattr(times["adamw"], by))
    found["ratio"] = {"time": mean, "median": ratio(getattr(times["own"], by), getattr(times["adamw"], by)), "bytes": held["own"] / held["adamw"]}
    return found | {"raw": {name: {"cpu": t.cpu, "wall": t.wall} for name, t in times.items()}}


def row(cell: dict[str, Any]) -> dict[str, str]:
    by, ratios = clock(cell["settings"]), cell["ratio"]
    line = {"shapes": f"{cell['shapes']} x {cell['layers']}", "tokens": f"{cell['rows']} x {cell['tokens']}", "contender": cell["contender"]}
    line |= {f"ms ({by})": f"{1e3 * cell['seconds'][by]['median']:.0f}", "adamw ms": f"{1e3 * cell['adamw']['seconds']['median']:.0f}"}
    line |= {"x adamw": f"{ratios['time']:.2f}", "median": f"{ratios['median']:.2f}"}
    return line | {"MB": f"{cell['bytes'] / 1e6:.0f}", "MB x adamw": f"{ratios['bytes']:.2f}"}

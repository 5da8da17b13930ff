"""`python -m forgetless.bench osft`: one linear layer trained under OSFT's constraint, ours and the peers' beside full fine-tuning.

A cell is a shape, a number of tokens and a share of frozen directions. In it every contender trains its own copy of one layer on the same inputs, in turns.
Measured are the seconds of forward, backward and optimizer step, the bytes that live at the end of the backward pass, the seconds of initialisation (the
decomposition), and how much of an update lies where it must not.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..subspace import split
from .layers import CONTENDERS, Side, Trained, leak, missing
from .measure import Phases, Times, interleaved, ratio, summary
from .options import add_common, begin, clock, count, fused, libraries, measure_all, results_file, say
from .results import Results, environment, table, versions
from .shapes import BLOCKS, falling

SUMMARY = "one linear layer under OSFT's constraint: seconds a step, bytes, seconds of initialisation, leak; beside PEFT, mini_trainer and AdamW"
EXAMPLE = """examples:
  python -m forgetless.bench osft --shapes 1024x1024 --tokens 512 --frozen 0.5 --repeats 5
  python -m forgetless.bench osft --shapes t5-large 2048x2048 --contenders adamw peft-osf coordinates

A cell that the file holds with the same settings and versions is not measured again, unless --again is given.
The optional peer: pip install --no-deps rhai-innovation-mini-trainer"""

SHAPES = {  # (out, in) of the linear layers of a block
    **{name: list(dict.fromkeys(layers)) for name, (layers, _) in BLOCKS.items() if name != "llama-7b"},
    "square": [(2048, 2048)],
    "llama-7b": [(4096, 4096), (11008, 4096)],
}
PACKAGES = ("forgetless", "torch", "peft", "rhai-innovation-mini-trainer")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
REFERENCES = ("adamw", "peft-osf")
KEY = ("shape", "tokens", "frozen")
COPIES = {"adamw": 4}  # of the weight in fp32, roughly, that a contender holds: for planning only
OTHER_COPIES, MEASURING_COPIES = 7, 12  # of every other contender; while one is made or its leak is measured


def shape(text: str) -> list[tuple[int, int]]:
    """The shapes (out, in) that a name or NxM stands for."""
    out, _, inputs = text.partition("x")
    if text in SHAPES:
        return SHAPES[text]
    if out.isdigit() and inputs.isdigit() and int(out) > 1 and int(inputs) > 1:
        return [(int(out), int(inputs))]
    raise argparse.ArgumentTypeError(f"'{text}' is neither OUTxIN, such as 1024x4096, nor one of {', '.join(SHAPES)}")


def share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no share of the directions between 0 and 1")
    return value


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes", nargs="+", type=shape, default=list(SHAPES.values()), help=f"OUTxIN, or {', '.join(SHAPES)}; default: all of these"
    )
    parser.add_argument("--tokens", nargs="+", type=count, default=[512, 2048, 8192], help="rows of the layer's input; default: 512 2048 8192")
    parser.add_argument(
        "--frozen", nargs="+", type=share, default=[0.5, 0.75], help="share of min(out, in) directions that is closed; default: 0.5 0.75"
    )
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="default: all; adamw always takes part")
    parser.add_argument("--init-repeats", type=count, default=1, help="measured initialisations of each contender; default: 1")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of weights and inputs; default: fp32")
    parser.add_argument(
        "--memory", type=float, help="GB that contenders may fill at once; beyond it they go in groups, each with adamw; default: 60 %% of the free"
    )
    add_common(parser, "osft", 9)


def run(options: argparse.Namespace) -> None:
    """Measure what is not there yet, write it cell by cell, and print the table of all cells asked for."""
    common = begin(options)
    device, names = options.device, list(dict.fromkeys(["adamw", *options.contenders]))
    absent = missing(names, device, DTYPES[options.dtype])
    for name, reason in absent.items():
        say(f"without {name}: {reason}")
    names = [name for name in CONTENDERS if name in names and name not in absent]
    settings = common | {"contenders": names, "dtype": options.dtype, "init_repeats": options.init_repeats, "fused_adamw": fused(device)}
    settings |= libraries()
    limit = free_bytes(device) * 0.6 if options.memory is None else options.memory * 1e9
    results = Results(results_file(options, "osft"), KEY)
    head = {"benchmark": "osft", "environment": environment(device), "missing": absent}
    shapes = dict.fromkeys(pair for pairs in options.shapes for pair in pairs)
    wanted = [dict(zip(KEY, (list(pair), tokens, frozen), strict=True)) for pair in shapes for frozen in options.frozen for tokens in options.tokens]
    cells = measure_all(
        results, wanted, settings, versions(*PACKAGES), head, options.again, describe, names,
        lambda key: {"missing": absent} | measure(key, names, settings, device, limit),
    )  # fmt: skip
    print(table([row for cell in cells for row in rows(cell)]))
    for name, reason in absent.items():
        print(f"without {name}: {reason}")
    say(f"written to {results.path}")


def describe(key: dict[str, Any]) -> str:
    return f"{key['shape'][0]}x{key['shape'][1]}, {key['tokens']} tokens, {key['frozen']:g} frozen"


# -- one cell --------------------------------------------------------------------------------------------------------------------------


def measure(key: dict[str, Any], names: list[str], settings: dict[str, Any], device: torch.device, limit: float) -> dict[str, Any]:
    """Every contender at one cell, in turns; in groups where `limit` bytes do not hold all of them at once."""
    (out, inputs), tokens = key["shape"], key["tokens"]
    W = falling(out, inputs).to(device, DTYPES[settings["dtype"]])
    draw = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(tokens, n, generator=draw).to(W) for n in (inputs, out))
    x.requires_grad_()
    k = int(key["frozen"] * min(out, inputs))
    U_high, _, V_high, _ = split(W, k)
    closed = (("closed", U_high), ("closed", V_high))
    together, measured = groups(names, out * inputs * 4, limit), []
    for group in together:
        found = measure_group(group, W, k, x, dy, closed, settings)
        add_ratios(found, settings)
        measured.append(found)
    return {"groups": together, "contenders": merge(measured)}


def groups(names: list[str], size: int, limit: float) -> list[list[str]]:
    """Contenders that may be alive at once, of a weight of `size` bytes: as many as `limit` holds, and adamw in every group.

    >>> groups(["adamw", "peft-osf", "adapter"], 1, 100), groups(["adamw", "peft-osf", "adapter"], 1, 24)
    ([['adamw', 'peft-osf', 'adapter']], [['adamw', 'peft-osf'], ['adamw', 'adapter']])
    """
    others = [name for name in names if name != "adamw"]
    room = int((limit / size - MEASURING_COPIES - COPIES["adamw"]) // OTHER_COPIES)
    room = max(room, 1)
    return [["adamw", *others[i : i + room]] for i in range(0, len(others), room)] or [["adamw"]]


def measure_group(
    names: list[str], W: Tensor, k: int, x: Tensor, dy: Tensor, closed: tuple[Side, Side], settings: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    gc.collect()  # the contenders of the group before, some of which refer to themselves
    built: dict[str, Trained] = {}
    starts = {name: Times() for name in names}
    for _ in range(settings["init_repeats"]):
        for name in names:
            built.pop(name, None)
            layer = nn.Linear(W.shape[1], W.shape[0], bias=False, device=W.device, dtype=W.dtype)
            layer.weight.data.copy_(W)
            starts[name].add({"initialise": lambda name=name, layer=layer: built.update({name: CONTENDERS[name](layer, k)})}, W.device)
    phases = {name: trained.phases(x, dy) for name, trained in built.items()}
    interleaved(phases, 1, W.device)
    held = {}
    for name, steps in phases.items():  # a second step warms up, and in it the memory is counted
        steps["forward"]()
        steps["backward"]()
        held[name] = built[name].bytes()
        steps["step"]()
    times = interleaved(phases, settings["repeats"], W.device)
    found = {}
    for name, trained in built.items():
        found[name] = {
            "seconds": {"cpu": summary(times[name].cpu), "wall": summary(times[name].wall)},
            "phases": {phase: summary(values)["median"] for phase, values in times[name].phases.items()},
            "init": None if name == "adamw" else {"cpu": summary(starts[name].cpu), "wall": summary(starts[name].wall)},
            "bytes": held[name],
            "trains": trained.trains(),
            "leak": update_leak(trained, phases[name], W, closed),
            "raw": {"cpu": times[name].cpu, "wall": times[name].wall, "init": {"cpu": starts[name].cpu, "wall": starts[name].wall}},
        }
    return found


def update_leak(trained: Trained, phases: Phases, W: Tensor, closed: tuple[Side, Side]) -> float:
    """The share of one more update, as the model applies it, that lies in closed directions: by the contender's own, where it has computed its own."""
    unit = torch.eye(W.shape[1], device=W.device, dtype=W.dtype)
    before = trained.dense(unit)
    for phase in phases.values():
        phase()
    return leak(trained.dense(unit) - before, trained.sides or closed)


# -- ratios ----------------------------------------------------------------------------------------------------------------------------


def add_ratios(found: dict[str, dict[str, Any]], settings: dict[str, Any]) -> None:
    """To each contender its time, bytes and initialisation over those of the references that ran in its group; of times the median over the rounds."""
    by = clock(settings)
    for own in found.values():
        own["ratio"] = {}
        for reference in REFERENCES:
            if reference in found:
                other = found[reference]
                own["ratio"][reference] = {
                    "time": ratio(own["raw"][by], other["raw"][by]),
                    "bytes": own["bytes"] / other["bytes"],
                    "init": own["init"][by]["median"] / other["init"][by]["median"] if own["init"] and other["init"] else None,
                }


def merge(measured: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The groups' contenders as one. A reference that ran in another group is reached by way of adamw, which ran in both, and the ratio says so."""
    merged: dict[str, dict[str, Any]] = {}
    for found in measured:
        merged = found | merged
    if "peft-osf" in merged:
        bridge = merged["peft-osf"]
        for own in merged.values():
            if "peft-osf" not in own["ratio"]:
                mine, its = own["ratio"]["adamw"], bridge["ratio"]["adamw"]
                init = own["init"]["wall"]["median"] / bridge["init"]["wall"]["median"] if own["init"] else None
                own["ratio"]["peft-osf"] = {
                    "time": mine["time"] / its["time"],
                    "bytes": mine["bytes"] / its["bytes"],
                    "init": init,
                    "through": "adamw",
                }
    return merged


# -- the table -------------------------------------------------------------------------------------------------------------------------


def rows(cell: dict[str, Any]) -> list[dict[str, str]]:
    """A cell's lines of the table: times with the half distance between their quartiles."""
    by, lines = clock(cell["settings"]), []
    for name, own in cell["contenders"].items():
        seconds, ratios = own["seconds"][by], own["ratio"]
        line = {"shape": "x".join(map(str, cell["shape"])), "tokens": str(cell["tokens"]), "frozen": f"{cell['frozen']:g}", "contender": name}
        line |= {f"ms ({by})": f"{1e3 * seconds['median']:.1f}", "+-": f"{500 * (seconds['high'] - seconds['low']):.1f}"}
        line |= {f"x {reference}": number(ratios.get(reference), "time") for reference in REFERENCES}
        line |= {"MB": f"{own['bytes'] / 1e6:.1f}"} | {f"MB x {reference}": number(ratios.get(reference), "bytes") for reference in REFERENCES}
        line |= {"init s": f"{own['init'][by]['median']:.2f}" if own["init"] else "", "init x peft-osf": number(ratios.get("peft-osf"), "init")}
        lines.append(line | {"leak": f"{own['leak']:.1e}"})
    return lines


def number(ratios: dict[str, Any] | None, of: str) -> str:
    return "" if ratios is None or ratios[of] is None else f"{ratios[of]:.2f}" + ("~" if "through" in ratios else "")


def free_bytes(device: torch.device) -> int:
    """Memory that is free now, on the device. 8 GB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 8_000_000_000
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))

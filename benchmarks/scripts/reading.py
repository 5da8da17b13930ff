"""What does it cost to look at a task's inputs, and do they lie elsewhere under bf16 autocast? One row at a time in fp32, several, and several under autocast.

    python benchmarks/scripts/reading.py            # a few minutes on one core -> benchmarks/results/reading.json

SmolLM2-135M on the demo's first task: the space of every linear layer that holds 0.9 of its inputs' energy, as osft closes it after a task. Seconds are CPU time of
one thread: of the passes through the model with the sums, and of the directions that are taken of them. A space's share is how much of the inputs' energy in fp32,
of the same rows and of others of the task, it holds; beside the fp32 space of other rows, which is what another choice of rows would have made of it.
"""

from __future__ import annotations

import json
import time

import torch

from runs import RESULTS, cpu_name

FILE = RESULTS / "reading.json"
ENERGY, ROWS = 0.9, 100


def share(spaces: dict, sums: dict) -> dict[str, float]:
    """Of the energy of the inputs summed up, by layer, what the spaces hold of it."""
    held = []
    for name, (A, is_matrix) in sums.items():
        V = spaces[name].basis.double()
        G = A.double() if is_matrix else A.double().mT @ A.double()
        held.append(float((V * (G @ V)).sum() / G.diagonal().sum()))
    return {"mean": sum(held) / len(held), "least": min(held)}


def measure() -> dict:
    from forgetless import batches, models
    from forgetless.config import load_config
    from forgetless.methods._statistics import encoded
    from forgetless.models import match_modules
    from forgetless.protect import input_spaces, input_sums
    from forgetless.tasks import load_stream

    torch.set_num_threads(1)
    tasks = [{"name": "languages", "suite": "demo/languages"}]
    config = load_config({"model": "bundled:smollm2-135m", "tasks": tasks, "method": {"name": "seqft"}, "output_dir": "unused"})
    model, tokenizer = models.load(config.model)
    layers = match_modules(model, None, "layers")
    rows = encoded(tokenizer, load_stream(config).tasks[0], 2 * ROWS)
    rows, others = rows[::2], rows[1::2]
    exact, unseen = ({name: s.of for name, s in input_sums(model, layers, given, normalise=True)[0].items()} for given in (rows, others))
    ways, spaces = {}, {}
    together = batches.READ_TOKENS
    for way, tokens, autocast in (("one row at a time", 0, False), ("several", together, False), ("several, bf16 autocast", together, True)):
        batches.READ_TOKENS = tokens
        begun = time.process_time()
        input_sums(model, layers, rows, normalise=True, autocast=autocast)
        passes = time.process_time() - begun
        begun = time.process_time()
        spaces[way] = input_spaces(model, layers, rows, ENERGY, autocast=autocast)
        ways[way] = {"passes_seconds": passes, "directions_seconds": time.process_time() - begun - passes}
    spaces["several, of other rows"], ways["several, of other rows"] = input_spaces(model, layers, others, ENERGY), {}
    for way, found in spaces.items():
        V, W = ([one[name].basis for name in exact] for one in (found, spaces["one row at a time"]))
        overlap = [float((a.mT @ b).square().sum() / max(a.shape[1], b.shape[1])) for a, b in zip(V, W, strict=True)]
        ways[way] |= {
            "directions": sum(B.shape[1] for B in V) / len(V), "of_these_rows": share(found, exact), "of_other_rows": share(found, unseen),
            "overlap": {"mean": sum(overlap) / len(overlap), "least": min(overlap)},
        }  # fmt: skip
    return {
        "command": "python benchmarks/scripts/reading.py", "cpu": cpu_name(), "torch": torch.__version__, "rows": ROWS, "energy": ENERGY,
        "tokens": sum(len(row["input_ids"]) for row in rows), "layers": len(layers), "ways": ways,
    }  # fmt: skip


def main() -> None:
    found = measure()
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

"""What would bf16 do to the products that a low-rank step reads its gradient with? R = G Q in bf16 beside fp32, on real gradients with a real space closed.

    python benchmarks/scripts/bf16_projection.py            # half a minute on one core -> benchmarks/results/bf16_projection.json

SmolLM2-135M on the demo's tasks: each linear layer's space holds 0.95 of the energy of its inputs on 50 rows of the first task; G is the gradient of 8 rows of the
second; Q are the r best directions of G off the space. Errors are ||R - R exact|| / ||R exact||, of the dense form (G without its closed part) likewise, both against
fp64. Seconds are of the products alone, conversions counted, CPU time of one thread.
"""

from __future__ import annotations

import json
import time

import torch
from torch import Tensor

from runs import RESULTS, cpu_name

FILE = RESULTS / "bf16_projection.json"
ENERGY, ROWS, BATCH, RANKS = 0.95, 50, 8, (8, 32, 128)


def gradients() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """({layer: G (out, in)}, {layer: V (in, k)})."""
    from forgetless import models
    from forgetless.adapters import match_modules
    from forgetless.config import load_config
    from forgetless.methods._statistics import encoded
    from forgetless.protect import input_spaces
    from forgetless.tasks import load_stream

    tasks = [{"name": name, "suite": f"demo/{name}"} for name in ("languages", "cities")]
    config = load_config({"model": "bundled:smollm2-135m", "tasks": tasks, "method": {"name": "seqft"}, "output_dir": "unused"})
    first, second = load_stream(config)
    model, tokenizer = models.load(config.model)
    layers = match_modules(model, None, "layers")
    spaces = input_spaces(model, layers, encoded(tokenizer, first, ROWS), ENERGY)
    model.train()
    for row in encoded(tokenizer, second, BATCH):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        (model(input_ids=ids, labels=labels).loss / BATCH).backward()
    return {name: layer.weight.grad for name, layer in layers.items()}, {name: space.basis for name, space in spaces.items()}


def off(A: Tensor, V: Tensor) -> Tensor:
    return A - (A @ V) @ V.mT


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def timed(product, times: int = 10) -> float:
    product()
    begun = time.process_time()
    for _ in range(times):
        product()
    return (time.process_time() - begun) / times


def quantiles(values: list[float]) -> dict[str, float]:
    found = torch.tensor(values, dtype=torch.float64)
    return {"median": float(found.median()), "nine tenths": float(found.quantile(0.9)), "most": float(found.max())}


def measure() -> dict:
    from forgetless.products import coarse_product, product
    from forgetless.subspace import top_subspace

    torch.set_num_threads(1)
    G, V = gradients()
    closed, dense, found = [], [], {}
    for name in G:
        exact = off(off(G[name].double(), V[name].double()), V[name].double())
        closed.append(1 - float(exact.norm() / G[name].norm()) ** 2)
        dense.append(error(off(G[name].bfloat16(), V[name].bfloat16()), exact))
    for r in RANKS:
        fine, rough, seconds = [], [], [0.0, 0.0]
        for name in G:
            Q = top_subspace(G[name], r, off=V[name]).basis
            exact = G[name].double() @ Q.double()
            fine.append(error(product(G[name], Q), exact))
            rough.append(error(coarse_product(G[name], Q), exact))
            seconds[0] += timed(lambda name=name, Q=Q: product(G[name], Q))
            seconds[1] += timed(lambda name=name, Q=Q: coarse_product(G[name], Q))
        found[r] = {"fp32": quantiles(fine), "bf16": quantiles(rough), "seconds_fp32": seconds[0], "seconds_bf16": seconds[1]}
    return {
        "command": "python benchmarks/scripts/bf16_projection.py", "cpu": cpu_name(), "torch": torch.__version__, "layers": len(G),
        "closed_share_of_energy": quantiles(closed), "dense_bf16": quantiles(dense), "ranks": found,
    }  # fmt: skip


def main() -> None:
    found = measure()
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

"""SmolLM2-135M trained for 20 steps by one process, and by two that share it (`sharding: fsdp2`), on the same rows: losses, captured energy, what each holds and sends.

    python benchmarks/scripts/sharding.py              # on a CPU, gloo, fp32, one thread a process; writes benchmarks/results/sharding.json
    python benchmarks/scripts/sharding.py markdown     # the table of docs/scaling.md
    python benchmarks/scripts/sharding.py plan         # its other table: 70B on 64 GPUs, by arithmetic

gorp, 8 directions a weight, chosen anew every 5 steps, no adapters; a step is 4 rows: of one process, or 2 each of two.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from runs import RESULTS, ROOT

FILE = RESULTS / "sharding.json"
STEPS, ROWS, GAP, RANK = 20, 4, 5, 8


def measure(out: str) -> None:
    """In one of the processes."""
    from forgetless import distributed, models, sharding
    from forgetless.bench.results import cpu_model, versions
    from forgetless.config import TaskConfig
    from forgetless.methods import get
    from forgetless.methods.base import Memory
    from forgetless.optim import SubspaceAdamW
    from forgetless.progress import Progress
    from forgetless.tasks import load_task
    from forgetless.trainer import train_task, training_arguments

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    train = {
        "learning_rate": 1e-4, "max_steps": STEPS, "per_device_train_batch_size": ROWS // processes, "bf16": False, "use_cpu": True, "weight_decay": 0.0,
    }  # fmt: skip
    training_arguments(train, 0, out)  # the process group, where there is one
    model, tokenizer = models.load("bundled:smollm2-135m")
    task = load_task(TaskConfig(name="cities", suite="demo/cities"))
    task.train = task.train[: STEPS * ROWS]
    method, memory = get("gorp", rank=RANK, refresh_gap=GAP, release_gradients=False if processes == 1 else None), Memory()
    method.tokenizer = tokenizer
    weights = sum(p.numel() for p in model.parameters())

    steps: list[dict[str, float]] = []
    take = SubspaceAdamW.step

    def counted(self: SubspaceAdamW, *args: Any) -> Any:
        begun = time.perf_counter()
        with sharding.counting() as sent:
            result = take(self, *args)
        steps.append({"seconds": time.perf_counter() - begun, "sent": sent.numbers})
        return result

    SubspaceAdamW.step = counted
    model = method.begin_task(model, task, memory)
    trained = train_task(model, tokenizer, task, method, task.train, train, 0, Progress(), sharding="fsdp2")
    learning = [p for group in trained.optimizer.param_groups for p in group["params"]]
    found = {
        "processes": processes, "loss": [s["loss"] for s in trained.steps], "captured": [s["captured"] for s in trained.steps if "captured" in s],
        "update_leak": max(s["update_leak"] for s in trained.steps if s["update_leak"] is not None) if any(s["update_leak"] for s in trained.steps) else None,
        "weights": weights, "own_weights": sum(sharding.local(p.detach()).numel() for p in learning), "learning": sum(p.numel() for p in learning),
        "state_bytes": sum(t.nbytes for state in trained.optimizer.state.values() for t in state.values()),
        "sent_bytes": [4 * s["sent"] for s in steps], "step_seconds": [s["seconds"] for s in steps],
        "gather_bytes": 4 * sum(p.numel() for p in learning) * (1 - 1 / processes), "cpu": cpu_model(), "versions": versions("torch", "transformers", "accelerate"),
    }  # fmt: skip
    if distributed.is_main():
        Path(out).write_text(json.dumps(found))
    distributed.barrier()
    distributed.leave_at_exit()


def main() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    found = {}
    for name, launcher in (("alone", []), ("shared", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"])):
        out = ROOT / "runs" / f"sharding-{name}.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, *launcher, __file__, str(out)], check=True, env=environment, cwd=ROOT)
        found[name] = json.loads(out.read_text())
    a, b = found["alone"], found["shared"]
    found["difference"] = {
        "loss": max(abs(x - y) for x, y in zip(a["loss"], b["loss"], strict=True)),
        "captured": max(abs(x - y) for x, y in zip(a["captured"], b["captured"], strict=True)),
    }
    found["fewer_bytes_a_refresh"] = b["gather_bytes"] / max(b["sent_bytes"])
    FILE.write_text(json.dumps(found, indent=1))
    markdown(found)


def markdown(found: dict[str, Any]) -> None:
    a, b = found["alone"], found["shared"]
    refresh = [i for i in range(STEPS) if i % GAP == 0]
    rest = [i for i in range(STEPS) if i % GAP]

    def mean(values: list[float], places: list[int]) -> float:
        return sum(values[i] for i in places) / len(places)

    print("| | one process | two, shared |\n|---|---|---|")
    print(f"| weights that learn, numbers held in the first process | {a['own_weights']:,} | {b['own_weights']:,} |")
    print(f"| optimizer's state there, bytes | {a['state_bytes']:,} | {b['state_bytes']:,} |")
    print(f"| sent in a step that chooses directions, MB | | {mean(b['sent_bytes'], refresh) / 1e6:.2f} |")
    print(f"| sent in another, MB | | {mean(b['sent_bytes'], rest) / 1e6:.4f} |")
    print(f"| to gather the gradients instead, MB | | {b['gather_bytes'] / 1e6:.1f} |")
    print(f"| largest difference of a step's loss, of {STEPS} | | {found['difference']['loss']:.1e} |")
    print(f"| largest difference of the captured share | | {found['difference']['captured']:.1e} |")
    print(f"\nFewer bytes by {found['fewer_bytes_a_refresh']:.0f}; torch {torch.__version__}")


# -- by arithmetic ---------------------------------------------------------------------------------------------------------------------

LAYERS = 80  # of Llama-3.1-70B; (out, in) of a layer's matrices
SHAPES = [(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672)]
REST = 2 * 128256 * 8192  # embedding and head, frozen
LINK = 50e9  # bytes a second between two GPUs of different machines: a 400 Gb/s adapter each, from the data sheet


def refresh_numbers(n: int, rank: int, processes: int) -> float:
    """Numbers a process sends to choose `rank` of n input directions (optim/coordinates.choose, "cold"): rings, as sharding.Sent counts them."""
    l, share = 2 * rank, 1 - 1 / processes
    sums = 2 * n * l + 1  # G^T U twice; the scale
    triangles = processes * l * l  # of the tall QR
    return share * (2 * sums + triangles)


def plan(processes: int = 64, rank: int = RANK, kept: int = 256, sketch: int = 64) -> None:
    weights = LAYERS * sum(m * n for m, n in SHAPES)
    inputs = LAYERS * sum(n for _, n in SHAPES)
    gib = 1 << 30
    block = max(sum(m * n for m, n in SHAPES), REST) * 2
    rows = {
        "weights in bf16, own rows": (weights + REST) * 2 / processes,
        "their fp32 masters, own rows": weights * 4 / processes,
        "gradients in bf16, own rows": weights * 2 / processes,
        f"moments in {rank} directions, own rows": LAYERS * sum(2 * m * rank * 4 for m, _ in SHAPES) / processes,
        f"the {rank} directions, whole": inputs * rank * 4,
        f"gorp's spaces at max_rank: {kept}, whole": inputs * kept * 4,
        f"the task's sketch at sketch_size: {sketch}, whole": inputs * (2 * sketch + 16) * 4,
        "the largest part that is whole while it computes, and its gradient": 2 * block,
    }
    print("| held by a process | GiB |\n|---|---|")
    for name, size in rows.items():
        print(f"| {name} | {size / gib:.1f} |")
    print(f"| together, without activations | {sum(rows.values()) / gib:.1f} |")
    sent = 4 * LAYERS * sum(refresh_numbers(n, rank, processes) for _, n in SHAPES)
    gather = 4 * weights * (1 - 1 / processes)
    sketched = 4 * LAYERS * sum(2 * 16 * n for _, n in SHAPES)
    print("\n| sent by a process | GB | seconds at 50 GB/s |\n|---|---|---|")
    for name, size in (
        ("all directions chosen anew", sent), ("all gradients gathered instead", gather), ("the sketch, every step", sketched),
        ("fully_shard itself, every step: weights twice, gradients once, in bf16", 3 * 2 * (weights + REST)),
    ):  # fmt: skip
        print(f"| {name} | {size / 1e9:.2f} | {size / LINK:.3f} |")
    print(f"\nfewer by {gather / sent:.0f}")


if __name__ == "__main__":
    if sys.argv[1:] == ["plan"]:
        plan()
    elif sys.argv[1:] == ["markdown"]:
        markdown(json.loads(FILE.read_text()))
    elif sys.argv[1:]:
        measure(sys.argv[1])
    else:
        main()

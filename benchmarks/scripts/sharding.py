"""SmolLM2-135M trained for 20 steps by one process, and by two that share it (`sharding: fsdp2`), on the same rows: losses, captured energy, what each holds and sends.

    python benchmarks/scripts/sharding.py              # on a CPU, gloo, fp32, one thread a process; writes benchmarks/results/sharding.json
    torchrun --nproc_per_node 2 benchmarks/scripts/sharding.py link     # gloo's rate and latency here, and a choice's exchanges foretold by them; sharding_link.json
    python benchmarks/scripts/sharding.py markdown     # the table of docs/scaling.md
    python benchmarks/scripts/sharding.py memory       # peaks of two processes beside what `forgetless estimate --world 2` says; sharding_memory.json

gorp, 8 directions a weight, chosen anew every 5 steps, no adapters; a step is 4 rows: of one process, or 2 each of two.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
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


def link(out: str) -> None:
    """In one of two processes: seconds of an exchange of next to nothing, bytes a second of a large one (gloo, as rings have it), and of a choice of directions as sent."""
    import statistics

    import torch.distributed as dist

    dist.init_process_group("gloo")
    share, found = 2 * (1 - 1 / dist.get_world_size()), {}

    def seconds(numbers: int, in_a_row: int) -> float:
        X, times = torch.zeros(numbers), []
        for _ in range(10):
            dist.barrier()
            begun = time.perf_counter()
            for _ in range(in_a_row):
                dist.all_reduce(X)
            times.append((time.perf_counter() - begun) / in_a_row)
        return statistics.median(times)

    found["seconds_an_exchange"] = seconds(1, 200)  # one after another, as a choice's come
    found["link_bytes_a_second"] = share * 4 * (1 << 24) / seconds(1 << 24, 4)
    sizes = [2 * n for n in (576 * 16,) * 6 + (1536 * 16,)] * 30  # a choice of 8 directions for SmolLM2-135M's 210 weights: G^T U twice, a weight
    times = []
    for _ in range(10):
        dist.barrier()
        begun = time.perf_counter()
        for n in sizes:
            for numbers in (n // 2, n // 2, 256, 1):
                dist.all_reduce(torch.zeros(numbers))
        times.append(time.perf_counter() - begun)
    numbers = sum(n + 257 for n in sizes)
    found |= {"choice_seconds": statistics.median(times), "choice_bytes": share * 4 * numbers, "choice_exchanges": 4 * len(sizes)}
    found["choice_seconds_foretold"] = found["choice_bytes"] / found["link_bytes_a_second"] + found["choice_exchanges"] * found["seconds_an_exchange"]
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found, indent=1) + "\n")
        print(found)
    dist.barrier()
    dist.destroy_process_group()


# -- what was planned for several processes, held to what they took -----------------------------------------------------------------------

MEMORY = RESULTS / "sharding_memory.json"
RUNS = {  # name: (method, further keys of the config, steps); gorp's sketch is full after 17 steps
    "seqft, each with the whole model": ({"name": "seqft"}, {}, 6),
    "seqft, shared": ({"name": "seqft"}, {"sharding": "fsdp2"}, 6),
    "gorp, 8 directions, shared": ({"name": "gorp", "rank": RANK}, {"sharding": "fsdp2"}, 20),
    "osft, half closed, shared": ({"name": "osft", "protect": "weights"}, {"sharding": "fsdp2"}, 6),
}


def memory() -> None:
    """Runs of one task by two processes on this machine: the first process' peak beside that of `forgetless estimate --world 2`.

    Large pieces of memory go back to the system at once (MALLOC_MMAP_THRESHOLD_): left to itself glibc's heap keeps what gathered blocks leave behind, and a shared model's
    resident memory grows by two thirds within ten steps.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    found = json.loads(MEMORY.read_text()) if MEMORY.exists() else {}
    for name, (method, keys, steps) in RUNS.items():
        if name in found:
            continue
        folder = Path(tempfile.mkdtemp(prefix="forgetless-"))
        config = {
            "model": "bundled:smollm2-135m", "tasks": [{"name": "cities", "suite": "demo/cities"}], "method": method, "output_dir": str(folder / "run"),
            "train": {"learning_rate": 1e-4, "max_steps": steps, "per_device_train_batch_size": 4, "use_cpu": True}, "evaluate": {"limit": 32},
        } | keys  # fmt: skip
        path = folder / "run.yaml"
        path.write_text(json.dumps(config))  # JSON is YAML
        planned = subprocess.run(
            [sys.executable, "-m", "forgetless", "estimate", str(path), "--world", "2", "--closed", "0", "--json"],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "forgetless", "run", str(path)]
        subprocess.run([sys.executable, *launcher], check=True, env=environment | {"MALLOC_MMAP_THRESHOLD_": "200000"})
        events = [json.loads(line) for line in (folder / "run" / "timing.jsonl").read_text().splitlines()]
        peak = next(event["peak_bytes"] for event in events if event["event"] == "task")
        estimate = json.loads(planned.stdout)
        found[name] = {"measured": peak, **{key: estimate[key] for key in ("peak", "peak_bytes", "between_tasks_bytes")}}
        MEMORY.write_text(json.dumps(found, indent=1))
        shutil.rmtree(folder)
    print("| two processes on one machine | estimated, GB | measured, GB |\n|---|---|---|")
    for name, one in found.items():
        print(f"| {name} | {one['peak_bytes'] / 1e9:.2f} | {one['measured'] / 1e9:.2f} |")


if __name__ == "__main__":
    if sys.argv[1:] == ["memory"]:
        memory()
    elif sys.argv[1:] == ["link"]:
        link(str(RESULTS / "sharding_link.json"))
    elif sys.argv[1:] == ["markdown"]:
        markdown(json.loads(FILE.read_text()))
    elif sys.argv[1:]:
        measure(sys.argv[1])
    else:
        main()

"""Every method over the demo's four tasks, once, with few steps: does it run, how long does it take, what does it keep? Not a comparison: nothing is tuned.

    python benchmarks/scripts/every_method.py              # about a minute and a half a method; --only and --workers choose entries and processes
    python benchmarks/scripts/every_method.py markdown     # the table of docs/methods.md

15 steps of 8 rows a task, 50 test rows a task, seed 0; weights learn at 1e-4, adapters at 1e-3, prompts at 3e-2.
"""

from __future__ import annotations

import argparse
import json

from runs import RESULTS, ROOT, Queue, work_through

RUNS = ROOT / "runs" / "every_method"
TASKS = ("languages", "cities", "polarity", "kinds")
ADAPTERS = 1e-3
WEIGHTS = 1e-4
PROMPTS = 3e-2
METHODS: dict[str, tuple[dict, float]] = {
    **{name: ({"name": name}, WEIGHTS) for name in ("seqft", "gorp", "gpm", "migu", "sara", "esacl", "ewc", "lwf", "replay", "lines", "merge")},
    **{
        name: ({"name": name}, ADAPTERS)
        for name in ("lora", "inclora", "olora", "nlora", "inflora", "ella", "slao", "treelora", "badam", "routed", "gainlora")
    },
    "ogd, 2 samples": (
        {"name": "ogd", "modules": "linear", "samples": 2, "keep_in": "bf16"},
        WEIGHTS,
    ),  # 0.4 GB a task; its own 20 of all weights take 11
    "osft, weights": ({"name": "osft", "protect": "weights"}, WEIGHTS),
    "osft, inputs": ({"name": "osft", "protect": "inputs"}, WEIGHTS),
    "replay, on_policy": ({"name": "replay", "mode": "on_policy"}, WEIGHTS),
    "replay, self_synthesised": ({"name": "replay", "mode": "self_synthesised"}, WEIGHTS),
    "replay on gorp": ({"name": "replay", "on": {"name": "gorp"}}, WEIGHTS),
    "gorp, post: lines": ({"name": "gorp", "post": "lines"}, WEIGHTS),
    "merge, ties": ({"name": "merge", "rule": "ties"}, WEIGHTS),
    "merge, magmax": ({"name": "merge", "rule": "magmax"}, WEIGHTS),
    "ewc, inclora": ({"name": "ewc", "on": {"name": "inclora"}}, ADAPTERS),
    "prompt": ({"name": "prompt"}, PROMPTS),
    "mtl": ({"name": "mtl"}, WEIGHTS),
    "per_task": ({"name": "per_task"}, WEIGHTS),
}


def queue() -> Queue:
    entries = [{"name": t, "suite": f"demo/{t}", "max_text_tokens": 32} for t in TASKS]
    evaluate = {"limit": 50, "scorers": ["choice", "exact_match"]}
    return {
        name: {
            "model": "bundled:smollm2-135m", "tasks": entries, "method": method, "evaluate": evaluate, "keep": "all" if name == "per_task" else "last 1", "seed": 0,
            "train": {"learning_rate": rate, "max_steps": 15, "per_device_train_batch_size": 8, "warmup_steps": 2, "lr_scheduler_type": "constant_with_warmup"},
        }
        for name, (method, rate) in METHODS.items()
    }  # fmt: skip


def markdown() -> str:
    runs = json.loads((RESULTS / "every_method.json").read_text())["runs"]
    lines = ["| method | choice: end | BWT | learned | exact match: end | training, s | state while training, MB | kept after four tasks, MB |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, run in runs.items():
        choice, exact, last = run["metrics"]["choice"], run["metrics"]["exact_match"], run["protection"][-1]
        seconds = sum(task["train_seconds"] for task in run["protection"])
        lines.append(
            f"| {name} | {choice['average_accuracy']:.3f} | {choice['backward_transfer']:+.3f} | {choice['learning_accuracy']:.3f} | {exact['average_accuracy']:.3f} "
            f"| {seconds:.0f} | {last['state_bytes'] / 1e6:.0f} | {last['memory_bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("run", "markdown"), default="run")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="the run to do, or a substring of those to do")
    args = parser.parse_args()
    if args.what == "markdown":
        print(markdown())
    else:
        work_through(queue(), RUNS, RESULTS / "every_method.json", "python benchmarks/scripts/every_method.py", args.workers, args.only)

"""Standard CL order 1 (dbpedia, amazon, yahoo, agnews) on SmolLM2-135M: sequential fine-tuning against GORP, 40 steps of 8 a task.

    FORGETLESS_DATA=... python benchmarks/scripts/standard_cl.py tune      # eight settings of gorp on dev rows, seed 100
    FORGETLESS_DATA=... python benchmarks/scripts/standard_cl.py final     # seeds 0 and 1, on test, two prompts
    python benchmarks/scripts/standard_cl.py table                         # benchmarks/results/standard_cl_order1.json as a table

A resumable queue: each entry is one run folder under runs/standard_cl; finished ones are read, interrupted ones resume. Two processes of one thread each
(two one-thread processes beat one two-thread process on a small machine); --workers changes that.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUNS, RESULTS = ROOT / "runs" / "standard_cl", ROOT / "benchmarks" / "results"
ORDER = ("dbpedia", "amazon", "yahoo", "agnews")
TRAIN = {
    "learning_rate": 1e-4, "max_steps": 40, "per_device_train_batch_size": 8, "warmup_steps": 4,
    "lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1e-5, "power": 1.0},
}  # fmt: skip  # the recipe: warm-up over the first tenth, then linear to a tenth

METHODS = {
    "gorp": {"name": "gorp", "full_lr_ratio": 10.0, "energy": 0.95},  # how they were chosen: dev/LOG.md
    "seqft": {"name": "seqft"},
    "seqft-linear": {"name": "seqft", "modules": "linear"},  # the weights gorp trains
}


def config(method: dict, options: bool, seed: int, split: str, limit: int, where: Path, scorers=("choice", "calibrated", "exact_match")) -> dict:
    tasks = [{"name": t, "suite": f"standard_cl/{t}", "suite_options": {"options_in_prompt": options}, "max_text_tokens": 48} for t in ORDER]
    return {
        "model": "bundled:smollm2-135m", "tasks": tasks, "method": method, "train": TRAIN, "seed": seed, "keep": "last 1", "store": "prompts",
        "evaluate": {"split": split, "limit": limit, "scorers": list(scorers)}, "output_dir": str(where),
    }  # fmt: skip


TRIALS = (  # rank, full_lr_ratio, energy of gorp; rank None is dense Adam inside the permitted space
    (None, 1.0, 0.95), (8, 20.0, 0.95), (8, 10.0, 0.95), (8, 10.0, 0.9), (None, 1.0, 0.9), (8, 20.0, 0.98), (32, 10.0, 0.95), (8, 5.0, 0.95),
)  # fmt: skip


def tuning() -> dict[str, dict]:
    """gorp's settings on dev rows of the stream, with a seed of their own; test rows are never looked at."""
    queue = {}
    for options, tag in ((True, "options"), (False, "bare")):
        for rank, ratio, energy in TRIALS:
            name = f"tune-{tag}-rank{rank}-ratio{ratio:g}-energy{energy:g}"
            method = {"name": "gorp", "rank": rank, "full_lr_ratio": ratio, "energy": energy}
            queue[name] = config(method, options, 100, "dev", 100, RUNS / name, ("choice", "exact_match"))
    return queue


def final(seeds=(0, 1)) -> dict[str, dict]:
    # the comparison first, the second baseline last: an interrupted queue has the most it can
    order = [("gorp", "seqft"), ("seqft-linear",)]
    return {
        f"final-{tag}-{name}-seed{seed}": config(METHODS[name], options, seed, "test", 200, RUNS / f"final-{tag}-{name}-seed{seed}")
        for names in order
        for seed in seeds
        for options, tag in ((True, "options"), (False, "bare"))
        for name in names
    }


def work(name: str, settings: dict, results: Path) -> tuple[str, int]:
    """One run in a process of its own, one thread; nothing where its result is there already."""
    if name in recorded({name: settings}, results):
        return name, 0
    RUNS.mkdir(parents=True, exist_ok=True)
    path = RUNS / f"{name}.yaml"
    path.write_text(json.dumps(settings, indent=1))  # JSON is YAML
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    begun = time.time()
    with (RUNS / f"{name}.log").open("a") as log:
        status = subprocess.run([sys.executable, "-m", "forgetless", "run", str(path)], stderr=log, stdout=log, env=env, cwd=ROOT).returncode
    print(f"{name}: exit {status}, {time.time() - begun:.0f} s", flush=True)
    return name, status


def read(name: str, settings: dict) -> dict | None:
    """A finished run as an entry of the result file; None where it is not finished."""
    folder = RUNS / name
    if not (folder / "matrix.json").is_file():
        return None
    matrix = json.loads((folder / "matrix.json").read_text())
    scorers, tasks = settings["evaluate"]["scorers"], matrix["tasks"]
    if len(matrix["scores"][scorers[0]]) < len(tasks):
        return None
    last = folder / "tasks" / f"{len(tasks) - 1:02d}-{tasks[-1]}" / "predictions.jsonl"
    rows = sorted((json.loads(line) for line in last.read_text().splitlines()), key=lambda p: (p["task"], p["row"]))
    timing = [json.loads(line) for line in (folder / "timing.jsonl").read_text().splitlines()]
    return {
        "config": comparable(settings),
        "versions": (folder / "run.yaml").read_text().splitlines()[0].removeprefix("# "),
        **{k: matrix[k] for k in ("tasks", "scores", "n", "ci95", "metrics", "failures")},
        "protection": [t for t in timing if t["event"] == "task"],
        # every test row at the end, right 1 or wrong 0, by task and row: what paired differences are made of
        "final_rows": {s: {t: "".join(str(int(p["score"][s])) for p in rows if p["task"] == t) for t in tasks} for s in scorers},
    }


def comparable(settings: dict) -> dict:
    return {k: v for k, v in settings.items() if k != "output_dir"}


def recorded(queue: dict[str, dict], results: Path) -> dict[str, dict]:
    """Entries of the runs of `queue` that are finished here, or were when the result file was written, with the same settings."""
    old = json.loads(results.read_text())["runs"] if results.is_file() else {}
    found = {name: read(name, settings) or old.get(name) for name, settings in queue.items()}
    return {name: entry for name, entry in found.items() if entry and entry["config"] == comparable(queue[name])}


def collect(queue: dict[str, dict], results: Path) -> None:
    """Every finished run with what it ran on, and the differences, in one JSON file."""
    runs = recorded(queue, results)
    environment = {"machine": platform.machine(), "cpu": cpu_name(), "threads": 1, "device": "CPU", "bf16_autocast": True}
    content = {"command": f"python benchmarks/scripts/standard_cl.py {results.stem.split('_')[-1]}", "environment": environment}
    RESULTS.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(content | {"differences": differences(runs), "runs": runs}, indent=1))
    print(f"{len(runs)} of {len(queue)} runs -> {results.relative_to(ROOT)}", flush=True)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def differences(runs: dict[str, dict], seeds=(0, 1)) -> list[dict]:
    """gorp minus each baseline in final accuracy over the same test rows (as many a task), with a 95 % paired bootstrap interval, over the seeds both have."""
    from forgetless.evaluation.matrix import paired_bootstrap

    entries = []
    for tag in ("options", "bare"):
        for other in ("seqft", "seqft-linear"):
            pairs = [(runs.get(f"final-{tag}-gorp-seed{s}"), runs.get(f"final-{tag}-{other}-seed{s}"), s) for s in seeds]
            pairs = [p for p in pairs if p[0] and p[1]]
            for scorer in ("choice", "calibrated", "exact_match") if pairs else ():
                a, b = ["".join(p[side]["final_rows"][scorer][t] for p in pairs for t in ORDER) for side in (0, 1)]
                d, low, high = paired_bootstrap([float(x) for x in a], [float(x) for x in b])
                where = {"prompt": tag, "gorp_minus": other, "scorer": scorer}
                entries.append(where | {"difference": d, "ci95": [low, high], "rows": len(a), "seeds": [p[2] for p in pairs]})
    return entries


def table(path: Path) -> None:
    content = json.loads(path.read_text())
    print(f"{'run':<34}" + "".join(f"{s:<21}" for s in ("choice AA/BWT/LA", "calibrated", "exact match")) + "update leak  space")
    for name, r in content["runs"].items():
        cells = []
        for scorer in ("choice", "calibrated", "exact_match"):
            m = r["metrics"].get(scorer)
            cells.append(f"{m['average_accuracy']:.3f} {m['backward_transfer']:+.3f} {m['learning_accuracy']:.3f}" if m else "-")
        p = r["protection"][-1]
        space = f"{p['update_leak']:.1e}      {p['space']['share']:.2f}" if p["space"] else "-            -"
        print(f"{name:<34}" + "".join(f"{c:<21}" for c in cells) + space)
    for d in content["differences"]:
        low, high = d["ci95"]
        print(
            f"{d['prompt']:<9}gorp - {d['gorp_minus']:<14}{d['scorer']:<13}{d['difference']:+.3f}  [{low:+.3f}, {high:+.3f}]  {d['rows']} rows, seeds {d['seeds']}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tune", "final", "table"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="substring of the runs to do")
    args = parser.parse_args()
    if args.what == "table":
        for path in sorted(RESULTS.glob("standard_cl_order1_*.json")):
            print(path.name)
            table(path)
        return
    queue, results = tuning() if args.what == "tune" else final(), RESULTS / f"standard_cl_order1_{args.what}.json"
    todo = {k: v for k, v in queue.items() if args.only in k}
    with ThreadPoolExecutor(args.workers) as pool:
        for _ in pool.map(lambda item: work(*item, results), todo.items()):
            collect(queue, results)


if __name__ == "__main__":
    main()

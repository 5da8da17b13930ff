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


def work(name: str, settings: dict) -> tuple[str, int]:
    """One run in a process of its own, one thread; nothing where it is finished."""
    if finished(name, settings):
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


def finished(name: str, settings: dict) -> bool:
    matrix = read(name)
    return matrix is not None and len(next(iter(matrix["scores"].values()))) == len(settings["tasks"])


def read(name: str) -> dict | None:
    folder = RUNS / name
    if not (folder / "matrix.json").is_file():
        return None
    matrix = json.loads((folder / "matrix.json").read_text())
    timing = [json.loads(line) for line in (folder / "timing.jsonl").read_text().splitlines()]
    matrix["protection"] = [t for t in timing if t["event"] == "task"]
    return matrix


def collect(queue: dict[str, dict], out: Path) -> None:
    """Every finished run with what it ran on, and the differences, in one JSON file."""
    runs = {}
    for name, settings in queue.items():
        matrix = read(name)
        if finished(name, settings):
            where = {k: v for k, v in settings.items() if k != "output_dir"}
            versions = (RUNS / name / "run.yaml").read_text().splitlines()[0].removeprefix("# ")
            runs[name] = {
                "config": where,
                "versions": versions,
                **{k: matrix[k] for k in ("tasks", "scores", "n", "ci95", "metrics", "failures", "protection")},
            }
    environment = {"machine": platform.machine(), "cpu": cpu_name(), "threads": 1, "device": "CPU", "bf16_autocast": True}
    content = {
        "command": f"python benchmarks/scripts/standard_cl.py {out.stem.split('_')[-1]}",
        "environment": environment,
        "differences": differences(),
        "runs": runs,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1))
    print(f"{len(runs)} of {len(queue)} runs -> {out.relative_to(ROOT)}", flush=True)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def last_task(name: str) -> Path:
    return RUNS / name / "tasks" / f"{len(ORDER) - 1:02d}-{ORDER[-1]}"


def final_scores(name: str) -> dict[tuple, dict[str, float]]:
    """{(task, row): {scorer: 0 or 1}} of the last commit of a run."""
    rows = (last_task(name) / "predictions.jsonl").read_text().splitlines()
    return {(p["task"], p["row"]): p["score"] for p in map(json.loads, rows)}


def differences(seeds=(0, 1)) -> list[dict]:
    """gorp minus each baseline in final accuracy over the same test rows (as many a task), with a 95 % paired bootstrap interval, over the seeds both have."""
    from forgetless.evaluation.matrix import paired_bootstrap

    entries = []
    for tag in ("options", "bare"):
        for other in ("seqft", "seqft-linear"):
            pairs = [(f"final-{tag}-gorp-seed{s}", f"final-{tag}-{other}-seed{s}", s) for s in seeds]
            pairs = [p for p in pairs if last_task(p[0]).is_dir() and last_task(p[1]).is_dir()]
            for scorer in ("choice", "calibrated", "exact_match") if pairs else ():
                a, b = [], []
                for ours, theirs, _ in pairs:
                    x, y = final_scores(ours), final_scores(theirs)
                    assert x.keys() == y.keys()
                    a += [x[k][scorer] for k in sorted(x)]
                    b += [y[k][scorer] for k in sorted(x)]
                d, low, high = paired_bootstrap(a, b)
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
    queue = tuning() if args.what == "tune" else final()
    todo = {k: v for k, v in queue.items() if args.only in k}
    with ThreadPoolExecutor(args.workers) as pool:
        for _ in pool.map(lambda item: work(*item), todo.items()):
            collect(queue, RESULTS / f"standard_cl_order1_{args.what}.json")


if __name__ == "__main__":
    main()

"""Kill a run of four tasks with SIGKILL at random moments until it is through, and compare what it left with an uninterrupted run of the same config.

    python benchmarks/scripts/sigkill.py            # 50 kills -> benchmarks/results/sigkill.json; exit 1 where anything differs

A tiny random Llama, a gate that takes more rows where it has to, a watch set, checkpoints, `keep: last 2`. A kill lands anywhere between the first line of a run
folder and its end, at a moment drawn so that most of them fall on one run; and since a commit is short, where one begins the moment is drawn anew to fall within it.
Every start after a kill is the same command.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "sigkill.json"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks" / "scripts")]

MORE = {
    "thing": [("yes apple", "apple"), ("no stone", "stone"), ("maybe river", "river")],
    "opinion": [("apple good", "good"), ("river bad", "bad"), ("stone maybe", "maybe")],
}  # fmt: skip
PATIENT = 0.4  # so many starts are left alone until a commit begins; whoever reaches one is killed within SPREAD seconds of its beginning
SPREAD = 0.15


def make_config(folder: Path, method, steps: int) -> dict:
    import conftest

    conftest.TASKS |= MORE

    def task(name: str) -> dict:
        entry = conftest.write_task(folder / "data", name, rows=120)
        shutil.copy(entry["data"], entry["test"])  # rows enough for a gate that asks for more of them
        return entry

    return {
        "model": conftest.make_model_folder(folder / "model"), "tasks": [task(name) for name in ("colour", "animal", "mood", "thing")], "watch": [task("opinion")],
        "method": method, "train": {"learning_rate": 1e-3, "max_steps": steps, "per_device_train_batch_size": 4, "bf16": True, "use_cpu": True},
        "evaluate": {"limit": 12}, "gate": {"max_worst_task": 0.3, "max_general_drop": 0.5, "margin": 0.2, "max_rows": 96}, "probes": {"every": 20, "rows": 4},
        "checkpoint_every": 5, "keep": "last 2",
    }  # fmt: skip


def start(config: dict, folder: Path) -> subprocess.Popen:
    """`forgetless run` in a process of its own, which holds the run's lock when this returns, or has ended."""
    run = Path(config["output_dir"])
    path = folder / f"{run.name}.yaml"
    path.write_text(json.dumps(config))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "forgetless", "run", "--progress", "none", str(path)]
    with (folder / "errors").open("w") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
    while process.poll() is None and f'"pid": {process.pid},' not in read(run / ".lock"):
        time.sleep(0.001)
    return process


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path)) if path.is_dir() else []


def committing(run: Path) -> bool:
    return any(name.startswith(".") and not name.endswith(".training") for name in names(run / "tasks"))


def kill(process: subprocess.Popen, run: Path, draw: random.Random, window: float) -> bool:
    """Kill it within `window` seconds; False where it ended before."""
    due, redrawn = time.monotonic() + (math.inf if draw.random() < PATIENT else draw.uniform(0, window)), False
    while process.poll() is None:
        if not redrawn and committing(run):
            redrawn, due = True, time.monotonic() + draw.uniform(0, SPREAD)
        if time.monotonic() >= due:
            process.send_signal(signal.SIGKILL)
            return process.wait() == -signal.SIGKILL
        time.sleep(0.001)
    return False


def half_checkpoints(run: Path) -> set[Path]:
    return {path for path in (run / "tasks").glob(".*.training/checkpoint-*") if not (path / "forgetless.json").is_file()}


def stage(run: Path, began_at: str, half_before: set[Path]) -> str:
    """Where in its work a run was when it was killed, by what lies in its folder. What was current when it started, and which checkpoints a kill before had left half."""
    tasks, current = names(run / "tasks"), read(run / "current").strip()
    if any(name.startswith(".") and not name.endswith(".training") for name in tasks):
        return "in a commit: writing it beside"
    if any(name > current for name in tasks if not name.startswith(".")):
        return "in a commit: renamed, not current yet"
    lines = read(run / "lineage.jsonl").splitlines()
    if len(lines) < sum(not name.startswith(".") for name in tasks):
        return "in a commit: current, its line not written yet"
    if current and not ((run / "model").is_symlink() and os.readlink(run / "model") == f"tasks/{current}/model"):
        return "in a commit: its line written, `model` not moved yet"
    places = [run / "tasks" / name for name in tasks if not name.startswith(".")]
    if any((p / "model.gone").exists() and (p / "model").exists() for p in places) or sum((p / "model").exists() for p in places) > 2:
        return "in a commit: letting an older model go"
    if current != began_at and read(run / "timing.jsonl").count('"event": "task"') < len(lines):
        return "after a commit: its times not noted yet"
    if current != began_at and len(json.loads(read(run / "matrix.json") or '{"scores": {"choice": []}}')["scores"]["choice"]) < len(lines):
        return "after a commit: matrix.json not written yet"
    training = [run / "tasks" / name for name in tasks if name.endswith(".training")]
    points = [path for folder in training for path in folder.glob("checkpoint-*")]
    if half_checkpoints(run) - half_before:
        return "in a checkpoint: writing it"
    if len(points) > len(training) and not half_before:
        return "in a checkpoint: deleting the one before"
    if not current and not points:
        return "before the first checkpoint: measuring the watch set, or in the first steps"
    return "in training, scoring or the gate"


def state(run: Path) -> dict[str, str]:
    """What must be the same: the lineage (it holds every commit's model_sha256 and files_sha256), the matrix, and the bytes of the model and the last state."""
    files = [run / "lineage.jsonl", run / "matrix.json", run / "current", *(p for p in sorted((run / "tasks").rglob("*")) if p.is_file())]
    return {p.relative_to(run).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def wrong(run: Path, whole: dict[str, str]) -> list[str]:
    """How a finished run differs from the uninterrupted one, what `verify` finds, and what it left lying about."""
    from forgetless.history import verify

    found = state(run)
    out = [f"{name} differs" for name in sorted(whole.keys() | found.keys()) if whole.get(name) != found.get(name)]
    out += [f"verify: {sentence}" for sentence in verify(run)["damage"]]
    left = [p.relative_to(run).as_posix() for p in run.rglob(".*") if p != run / ".lock"]
    return out + [f"left behind: {name}" for name in left] + ["the lock is not released"] * bool(read(run / ".lock"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", default="gorp", help="a registry name, or YAML such as '{name: gorp, use_lora: true}'")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps a task; a checkpoint every 5")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    import torch
    import yaml

    from runs import cpu_name

    draw, begun = random.Random(args.seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="forgetless-sigkill-") as scratch:
        folder = Path(scratch)
        base = make_config(folder, yaml.safe_load(args.method), args.steps)
        whole, broken = (base | {"output_dir": str(folder / name)} for name in ("whole", "broken"))
        process = start(whole, folder)
        locked = time.monotonic()
        while process.poll() is None and not list((Path(whole["output_dir"]) / "tasks").glob("*/checkpoint-*/forgetless.json")):
            time.sleep(0.01)
        first = time.monotonic() - locked  # before it, a kill loses everything
        if process.wait():
            print(f"the uninterrupted run ended with {process.returncode}: {read(folder / 'errors')[-500:]}")
            return 1
        gain = (time.monotonic() - locked - first) / args.kills / 3
        # so that a start that is not patient gains a third of one part of --kills on average: (window - first)^2 / (2 window)
        window = first + gain + math.sqrt(gain**2 + 2 * first * gain)
        print(f"uninterrupted: {time.monotonic() - locked:.1f} s after the lock; each start is killed within {window:.1f} s of it", flush=True)
        expected = state(Path(whole["output_dir"]))
        run, kills, starts, through, found = Path(broken["output_dir"]), 0, 0, 0, Counter()
        while True:
            began = read(run / "current").strip(), half_checkpoints(run)
            process = start(broken, folder)
            starts += 1
            if kills < args.kills and kill(process, run, draw, window):
                kills += 1
                found[where := stage(run, *began)] += 1
                print(f"{kills:>3}  after {read(run / 'current').strip() or 'nothing'}: {where}", flush=True)
                continue
            if process.wait():
                print(f"start {starts} ended with {process.returncode}: {read(folder / 'errors')[-500:]}")
                return 1
            through += 1
            if different := wrong(run, expected):
                print("\n".join(different))
                return 1
            if kills >= args.kills:
                break
            shutil.rmtree(run)  # through before its kills: the rest of them fall on another one
        lines = [json.loads(line) for line in (run / "lineage.jsonl").read_text().splitlines()]
        metrics = [json.loads((run / "tasks" / f"{line['index']:02d}-{line['task']}" / "metrics.json").read_text()) for line in lines]
    given = "".join(
        f" --{key} {getattr(args, key)!r}" for key in ("kills", "seed", "method", "steps") if getattr(args, key) != parser.get_default(key)
    )
    versions = {"python": platform.python_version(), "torch": torch.__version__.partition("+")[0], "system": platform.system()}
    content = {
        "command": f"python benchmarks/scripts/sigkill.py{given}", "environment": {"cpu": cpu_name(), "threads": 1, **versions},
        "kills": kills, "starts": starts, "runs": through, "tasks": len(lines), "differences": 0, "stages": dict(sorted(found.items())),
        "model_sha256": lines[-1]["model_sha256"], "lineage_sha256": expected["lineage.jsonl"], "matrix_sha256": expected["matrix.json"],
        "gate": [{"task": m["task"], "outcome": m["gate"]["outcome"], "rows": {c["name"]: c["rows"] for c in m["gate"]["criteria"]}} for m in metrics],
        "probes": any("probes" in m for m in metrics), "seconds": round(time.monotonic() - begun),
    }  # fmt: skip
    args.out.write_text(json.dumps(content, indent=1) + "\n")
    same = "the same model, lineage, matrix and files as the uninterrupted run; verify finds nothing"
    print(f"{kills} kills in {starts} starts, {through} run{'s' * (through > 1)} of {len(lines)} tasks: {same}")
    for where, n in sorted(found.items()):
        print(f"  {n:>3}  {where}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

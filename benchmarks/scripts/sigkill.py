"""Kill a run with SIGKILL at random moments until it is through, and compare what it left with an uninterrupted run of the same config.

    python benchmarks/scripts/sigkill.py --kills 20          # prints the count; exit 1 where model or lineage differ

A tiny random Llama learns three small tasks (a few seconds of work after the imports). A kill lands anywhere between the first line of a run folder and its end:
in a step, in a checkpoint being written, in scoring, in a commit. Every start after a kill is the same command.
"""

from __future__ import annotations

import argparse
import json
import os
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
sys.path[:0] = [str(ROOT / "tests")]


def command(config: dict, folder: Path) -> list[str]:
    path = folder / f"{Path(config['output_dir']).name}.yaml"
    path.write_text(json.dumps(config))
    return [sys.executable, "-m", "forgetless", "run", "--progress", "none", str(path)]


def stage(run: Path) -> str:
    """Where in its work a run was when it was killed, by what lies in its folder."""
    tasks = run / "tasks"
    names = [p.name for p in tasks.iterdir()] if tasks.is_dir() else []
    half = [p for p in names if p.startswith(".") and not p.endswith(".training")]
    current = (run / "current").read_text().strip() if (run / "current").is_file() else "nothing"
    writing = any(not (c / "forgetless.json").is_file() for p in names if p.endswith(".training") for c in (tasks / p).glob("checkpoint-*"))
    beyond = [p for p in names if not p.startswith(".") and p > current] if current != "nothing" else [p for p in names if not p.startswith(".")]
    where = "in a commit" if half or beyond else "in a checkpoint" if writing else "in training or scoring"
    return f"{where}, after {current}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", default="gorp", help="a registry name, or YAML such as '{name: gorp, use_lora: true}'")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps a task; a checkpoint every 5")
    args = parser.parse_args()
    import yaml
    from conftest import make_model_folder, write_task

    draw = random.Random(args.seed)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory(prefix="forgetless-sigkill-") as scratch:
        folder = Path(scratch)
        model = make_model_folder(folder / "model")
        method = yaml.safe_load(args.method)
        base = {
            "model": model, "tasks": [write_task(folder / "data", name) for name in ("colour", "animal", "mood")], "method": method,
            "train": {"learning_rate": 1e-3, "max_steps": args.steps, "per_device_train_batch_size": 4, "bf16": True, "use_cpu": True},
            "evaluate": {"limit": 12}, "checkpoint_every": 5,
        }  # fmt: skip
        whole, broken = (base | {"output_dir": str(folder / name)} for name in ("whole", "broken"))
        begun = time.monotonic()
        process = subprocess.Popen(command(whole, folder), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not Path(whole["output_dir"]).is_dir() and process.poll() is None:
            time.sleep(0.01)
        imports = time.monotonic() - begun  # most of a start of so small a run
        if process.wait():
            print("the uninterrupted run failed")
            return 1
        work = time.monotonic() - begun - imports
        kills, starts, found = 0, 0, Counter()
        run = Path(broken["output_dir"])
        while True:
            process = subprocess.Popen(command(broken, folder), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            starts += 1
            if kills < args.kills:
                try:
                    process.wait(imports * 0.95 + draw.uniform(0.0, work * 0.5))
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    kills += 1
                    found[stage(run)] += 1
                    continue
            _, error = process.communicate()
            if process.returncode:
                print(f"start {starts} ended with {process.returncode}: {error.decode()[-500:]}")
                return 1
            if kills >= args.kills:
                break
            # through before its kills: begin again in a fresh folder, the kills so far count
            if not same(Path(whole["output_dir"]), run):
                return 1
            shutil.rmtree(run)
        if not same(Path(whole["output_dir"]), run):
            return 1
    print(f"{kills} kills in {starts} starts: same model_sha256 and lineage as the uninterrupted run")
    for where, n in sorted(found.items()):
        print(f"  {n:>3}  {where}")
    return 0


def same(whole: Path, broken: Path) -> bool:
    """Byte-identical lineage (it holds every model_sha256) and model file."""
    for name in ("lineage.jsonl", "model/model.safetensors"):
        if (whole / name).read_bytes() != (broken / name).read_bytes():
            print(f"{name} differs")
            return False
    left = [p.name for p in (broken / "tasks").iterdir() if p.name.startswith(".")]
    if left:
        print(f"left behind: {left}")
    return not left


if __name__ == "__main__":
    sys.exit(main())

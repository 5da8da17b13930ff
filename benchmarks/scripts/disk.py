"""Bytes on disk of a run's folder: measured on SmolLM2-135M for some methods under each `keep`, and what `forgetless estimate` says of the same and of a 7B model.

    python benchmarks/scripts/disk.py              # measure what is missing, two minutes a method; one process at a time, one thread
    python benchmarks/scripts/disk.py plan         # the estimates alone, again
    python benchmarks/scripts/disk.py markdown     # the tables of docs/disk.md

Three tasks of the demo, two steps of 4 rows each: what a commit weighs does not depend on how long it was trained, but for the spaces of gorp, whose share of the input
directions is in the file beside their bytes. 4 rows a task are scored. Hard links count once, where they come first.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from runs import RESULTS, ROOT

FILE = RESULTS / "disk.json"
RUNS = ROOT / "runs" / "disk"
TASKS = ("cities", "polarity", "kinds")
METHODS: dict[str, dict[str, Any]] = {name: {"name": name} for name in ("seqft", "gorp", "lora", "olora", "replay", "routed")}
METHODS["osft"] = {"name": "osft", "protect": "weights"}
KEEPS = ("all", "last 1", "last 2", "tagged")  # tagged: one task beside the current one
PARTS = ("model", "state", "predictions", "rest")
SEVEN_B = dict(
    hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, intermediate_size=11008, vocab_size=32000
)  # Llama 2
TOKENS = 256  # of a row of the 7B model


def config(method: str, out: Path) -> dict[str, Any]:
    return {
        "model": "bundled:smollm2-135m", "tasks": [{"name": name, "suite": f"demo/{name}", "max_text_tokens": 32} for name in TASKS], "method": METHODS[method],
        "train": {"learning_rate": 1e-4, "max_steps": 2, "per_device_train_batch_size": 4}, "evaluate": {"limit": 4, "scorers": ["choice"]}, "output_dir": str(out),
    }  # fmt: skip


# -- measured --------------------------------------------------------------------------------------------------------------------------


def measure(method: str) -> dict[str, Any]:
    run, path = RUNS / method, RUNS / f"{method}.yaml"
    RUNS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config(method, run)))
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(
        [sys.executable, "-m", "forgetless", "run", "--progress", "none", str(path)], check=True, env=env, cwd=ROOT, stdout=subprocess.DEVNULL
    )
    folders = sorted((run / "tasks").iterdir())
    spaces = [json.loads((folder / "metrics.json").read_text())["protection"]["space"] for folder in folders]
    found = {
        "method": METHODS[method],
        "versions": (run / "run.yaml").read_text().splitlines()[0].removeprefix("# "),
        "commits": weigh(folders),
        "state_files": [{p.name: p.stat().st_size for p in sorted((folder / "state").iterdir())} for folder in folders],
        "closed": [space and space["share"] for space in spaces],
        "beside_the_commits": sum(p.stat().st_size for p in run.iterdir() if p.is_file()),
        "keep": {keep: kept(run, keep) for keep in KEEPS},
    }
    shutil.rmtree(run)
    return found


def weigh(folders: list[Path]) -> list[dict[str, int]]:
    """Bytes of each commit's folder by part; a file that an earlier one shares counts there."""
    seen: set[int] = set()
    out = []
    for folder in folders:
        sizes = dict.fromkeys(PARTS, 0)
        for file in (p for p in folder.rglob("*") if p.is_file()):
            status, part = file.stat(), file.relative_to(folder).parts[0].removesuffix(".jsonl")
            if status.st_ino not in seen:
                sizes[part if part in PARTS else "rest"] += status.st_size
            seen.add(status.st_ino)
        out.append(sizes)
    return out


def kept(run: Path, keep: str) -> dict[str, int]:
    """Bytes of all commits by part after `keep` has been applied to a copy of hard links."""
    from forgetless import history

    copy = run.with_name(f"{run.name}.copy")
    shutil.copytree(run, copy, copy_function=os.link, symlinks=True)
    (copy / ".lock").unlink(missing_ok=True)
    (copy / "lineage.jsonl").unlink()
    shutil.copy(run / "lineage.jsonl", copy)  # what may be written to is a file of its own
    if keep == "tagged":
        history.tag(copy, TASKS[0], "kept")
    history.collect(copy, keep)
    found = weigh(sorted((copy / "tasks").iterdir()))
    shutil.rmtree(copy)
    return {part: sum(commit[part] for commit in found) for part in PARTS}


# -- estimated -------------------------------------------------------------------------------------------------------------------------


def plan(measured: dict[str, Any]) -> dict[str, Any]:
    """What estimate says of the disk: of the runs that were measured, with the share that gorp has closed, and of a 7B model in bf16 with its own assumption."""
    from transformers import LlamaConfig

    from forgetless import estimate
    from forgetless.config import load_config

    big = RUNS / "7b"
    LlamaConfig(**SEVEN_B, architectures=["LlamaForCausalLM"]).save_pretrained(big)
    found: dict[str, Any] = {"135m": {}, "7b": {}}
    for method in METHODS:
        closed = (measured.get(method) or {}).get("closed") or [None]
        small = config(method, RUNS / method)
        large = small | {
            "model": str(big),
            "dtype": "bfloat16",
            "tasks": [{"name": f"t{i}", "data": "not read", "labels": ["a", "b"]} for i in range(3)],
        }
        for name, settings, share, tokens in (("135m", small, closed[-1] or 0.0, None), ("7b", large, estimate.CLOSED, TOKENS)):
            found[name][method] = {
                keep: estimate.estimate(load_config(settings | {"keep": keep}), "h200", share if method == "gorp" else estimate.CLOSED, tokens)[
                    "disk"
                ]
                for keep in KEEPS
            }
    return found


# -- the file --------------------------------------------------------------------------------------------------------------------------


def write(content: dict[str, Any]) -> None:
    beside = FILE.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(FILE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("run", "plan", "markdown"), default="run")
    parser.add_argument("--only", choices=METHODS, help="measure this method again")
    args = parser.parse_args()
    content = json.loads(FILE.read_text()) if FILE.is_file() else {}
    if args.what == "markdown":
        print(markdown(content))
        return
    import torch

    from forgetless.bench.results import environment

    content |= {"command": "python benchmarks/scripts/disk.py", "environment": environment(torch.device("cpu"))}
    content.setdefault("measured", {})
    for method in METHODS if args.what == "run" else ():
        if args.only in (method, None) and (args.only or method not in content["measured"]):
            content["measured"][method] = measure(method)
            write(content)
            print(method, json.dumps(content["measured"][method]["commits"]), flush=True)
    content["estimated"] = plan(content["measured"])
    write(content)


def markdown(content: dict[str, Any]) -> str:
    lines = [
        "| method | a model | state/ of a task: inputs | of it the method's memory, tasks 1, 2, 3 | all | last 2, or one tagged | last 1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, found in content["measured"].items():
        model, inputs = found["commits"][0]["model"], found["state_files"][0]["inputs.safetensors"]
        memory = ", ".join(mb(files["method.safetensors"]) for files in found["state_files"])
        whole = [mb(sum(found["keep"][keep].values()), 0) for keep in ("all", "last 2", "last 1")]
        lines.append("| " + " | ".join([method, mb(model, 0), mb(inputs), memory, *whole]) + " |")
    lines += ["", "| method | estimated / measured, all | last 2 | last 1 |", "|---|---|---|---|"]
    for method, found in content["measured"].items():
        pairs = [
            (sum(content["estimated"]["135m"][method][keep].values()), sum(found["keep"][keep].values())) for keep in ("all", "last 2", "last 1")
        ]
        lines.append(f"| {method} | " + " | ".join(f"{mb(a, 0)} / {mb(b, 0)} ({a / b - 1:+.1%})" for a, b in pairs) + " |")
    lines += [
        "",
        "| method | a model | inputs of a task | memory, or spaces, of three tasks | all | last 2 | last 1, or tagged with no tag |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, keeps in content["estimated"]["7b"].items():
        disk = keeps["all"]
        cells = [mb(v, 1) for v in (keeps["last 1"]["models"], disk["inputs"] // len(TASKS), disk["memory"] + disk["spaces"])]
        lines.append(
            "| " + " | ".join([method, *cells, *(f"{sum(keeps[keep].values()) / 1e9:.1f} GB" for keep in ("all", "last 2", "last 1"))]) + " |"
        )
    return "\n".join(lines)


def mb(size: float, digits: int = 2) -> str:
    return f"{size / 1e6:,.{digits}f} MB"


if __name__ == "__main__":
    main()

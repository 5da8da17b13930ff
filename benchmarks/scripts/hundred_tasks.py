"""A hundred tasks in a row on a small model: do memory, what is kept, and the time a task takes stay flat? Drawn as docs/img/hundred_tasks.png (needs matplotlib).

    python benchmarks/scripts/hundred_tasks.py             # what is missing, one process after another; an interrupted run goes on
    python benchmarks/scripts/hundred_tasks.py plot

A random Llama of width 128 learns 100 tasks of 48 rows, 6 steps of 8 each: `run` with four methods, and `add` a task at a time, every tenth by the command line in a process
of its own. Seconds are of a wall clock (timing.jsonl) and of the processor, which on a machine with other work are what is to be looked at. Parts of the work are timed where they
are called. Resident memory is read after each commit, once garbage is collected.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from runs import RESULTS, ROOT

FILE = RESULTS / "hundred_tasks.json"
RUNS = ROOT / "runs" / "hundred_tasks"
TASKS, ROWS, STEPS, MAX_RANK, BY_COMMAND = 100, 48, 6, 32, 10
LABELS = ("yes", "no", "maybe")
FILLERS = [f"word{i}" for i in range(40)]
CODE = 2  # raised by hand when the library's part of the work has changed
CONFIGS: dict[str, dict[str, Any]] = {
    "gorp, max_rank": {"name": "gorp", "max_rank": MAX_RANK}, "add": {"name": "gorp", "max_rank": MAX_RANK}, "gorp": {"name": "gorp"}, "seqft": {"name": "seqft"},
    "osft": {"name": "osft", "protect": "weights"},
}  # fmt: skip
Column = dict[str, list]

# -- the tasks and the model -----------------------------------------------------------------------------------------------------------


def make_model(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<eos>", "Text", "Answer", ":", *LABELS, *FILLERS, *(cue(i, label) for i in range(TASKS) for label in LABELS)]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    shape = dict(
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64
    )
    config = AutoConfig.for_model(
        "llama", vocab_size=len(words), tie_word_embeddings=False, eos_token_id=1, pad_token_id=1, bos_token_id=None, **shape
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>").save_pretrained(folder)


def cue(task: int, label: str) -> str:
    """The word of a task by which its label is told."""
    return f"cue{task}{label}"


def write_task(index: int) -> dict[str, Any]:
    draw, folder = random.Random(index), RUNS / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", ROWS), ("test", 12)):
        lines = []
        for i in range(rows):
            label = LABELS[i % 3]
            text = [*draw.sample(FILLERS, 3), cue(index, label)]
            draw.shuffle(text)
            lines.append(json.dumps({"sentence": " ".join(text), "label": label}))
        (folder / f"{index:03d}.{name}.jsonl").write_text("\n".join(lines) + "\n")
    return {
        "name": f"t{index}",
        "data": str(folder / f"{index:03d}.train.jsonl"),
        "test": str(folder / f"{index:03d}.test.jsonl"),
        "labels": list(LABELS),
    }


def settings(name: str) -> dict[str, Any]:
    return {
        "model": str(RUNS / "model"), "tasks": [write_task(i) for i in range(TASKS)], "method": CONFIGS[name],
        "train": {"learning_rate": 1e-3, "max_steps": STEPS, "per_device_train_batch_size": 8, "bf16": False, "use_cpu": True},
        "evaluate": {"limit": 6, "scorers": ["choice"]}, "keep": "last 2", "output_dir": str(RUNS / name),
    }  # fmt: skip


# -- measured in a process of its own --------------------------------------------------------------------------------------------------


class Clock:
    """Processor seconds of the calls of some functions, by name, since the last `take`."""

    def __init__(self):
        self.spent: dict[str, float] = defaultdict(float)

    def watch(self, owner: Any, name: str, where: str) -> None:
        inner = getattr(owner, name)

        def timed(*args, **kwargs):
            begun = time.process_time()
            try:
                return inner(*args, **kwargs)
            finally:
                self.spent[where] += time.process_time() - begun

        setattr(owner, name, timed)

    def take(self) -> dict[str, float]:
        spent, self.spent = dict(self.spent), defaultdict(float)
        return {key: round(value, 4) for key, value in spent.items()}


def watched_parts() -> Clock:
    """Where the time of a task could grow with the number of tasks."""
    from forgetless import adding, loop
    from forgetless.lineage import RunFolder

    clock = Clock()
    for owner, name in (
        (loop, "train_task"), (loop, "evaluate"), (loop, "cover"), (loop, "write_matrix"), (loop, "load_stream"), (loop, "start"), (loop, "write_config"),
        (RunFolder, "commit"), (RunFolder, "note_task"), (RunFolder, "check_files"), (RunFolder, "repair"), (RunFolder, "_write"), (RunFolder, "lineage"),
        (adding, "read_run"),
    ):  # fmt: skip
        clock.watch(owner, name, name.strip("_"))
    return clock


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS:")).split()[1])


def meter(name: str, clock: Clock):
    """A Progress that writes down, after each commit, what the process holds and what the task has cost."""
    from forgetless.progress import Progress

    class Meter(Progress):
        def tasks(self, done: int, total: int) -> None:
            self.index, self.begun = done, time.process_time()
            self.trained = self.begun

        def stage(self, text: str, total: int) -> None:
            if ": scoring" in text:
                self.trained = time.process_time()

        def say(self, text: str) -> None:
            if not text.startswith("committed"):
                return
            now = time.process_time()
            gc.collect()
            entry = {
                "index": self.index, "pid": os.getpid(), "train_cpu": self.trained - self.begun, "rest_cpu": now - self.trained, "resident": resident(),
                "objects": len(gc.get_objects()),
                "open_files": len(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task")), "parts": clock.take(),
            }  # fmt: skip
            note(name, entry)

    return Meter()


def note(name: str, entry: dict[str, Any]) -> None:
    with (RUNS / f"{name}.jsonl").open("a") as f:
        f.write(json.dumps(entry) + "\n")


def do_run(name: str) -> None:
    import forgetless as fl

    fl.run(settings(name), progress=meter(name, watched_parts()))


def do_add(name: str) -> None:
    """One task after another by `add`, in this process; every BY_COMMAND-th by the command line."""
    import forgetless as fl
    from forgetless import adding
    from forgetless.lineage import RunFolder

    config, run = settings(name), RUNS / name
    clock = watched_parts()
    if not (run / "current").is_file():
        fl.run(config | {"tasks": config["tasks"][:1]}, progress=meter(name, clock))
    for index in range(len(RunFolder(run, lock=False).committed()), TASKS):
        task = config["tasks"][index]
        options = [f"test={task['test']}", f"labels={json.dumps(LABELS)}"]  # quoted: to YAML yes and no are no text
        wall, cpu = time.perf_counter(), time.process_time()
        if index % BY_COMMAND:
            adding.add(run, task["name"], task["data"], options, meter(name, clock))
            note(
                name, {"index": index, "add_seconds": time.perf_counter() - wall, "add_cpu": time.process_time() - cpu, "parts_of_add": clock.take()}
            )
        else:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            command = [
                sys.executable,
                "-m",
                "forgetless",
                "add",
                str(run),
                "--name",
                task["name"],
                "--data",
                task["data"],
                *options,
                "--progress",
                "none",
            ]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            used = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
            note(name, {"index": index, "command_seconds": time.perf_counter() - wall, "command_cpu": spent})


# -- the file --------------------------------------------------------------------------------------------------------------------------


def read(name: str) -> dict[str, Any] | None:
    """A finished run as columns, one entry a task."""
    notes, run = RUNS / f"{name}.jsonl", RUNS / name
    found: list[dict[str, Any]] = [{} for _ in range(TASKS)]
    for line in map(json.loads, notes.read_text().splitlines()) if notes.is_file() else ():
        found[line.pop("index")] |= line
    began = next((entry.get("pid") for entry in found if entry), None)
    for entry in found:
        if entry.pop("pid", None) != began:  # interrupted and gone on from: another process, whose memory tells nothing of the tasks before
            entry |= {"resident": None, "objects": None}
    timing = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()] if (run / "timing.jsonl").is_file() else []
    done = {line["index"]: line for line in timing if line["event"] == "task"}
    if len(done) < TASKS:
        return None
    for index, entry in enumerate(found):
        folder = run / "tasks" / f"{index:02d}-t{index}"
        entry |= {key: done[index].get(key) for key in ("train_seconds", "eval_seconds", "memory_bytes", "state_bytes")}
        entry["space_rank_max"] = (done[index]["space"] or {}).get("rank_max")
        entry["space_share"] = (done[index]["space"] or {}).get("share")
        entry["method_bytes"] = (folder / "state" / "method.safetensors").stat().st_size
        entry["kept_state_bytes"] = sum(p.stat().st_size for p in (folder / "state").iterdir())
        entry["beside_state_bytes"] = sum(p.stat().st_size for p in folder.iterdir() if p.is_file())
    matrix = json.loads((run / "matrix.json").read_text())
    files = {p.name: p.stat().st_size for p in run.iterdir() if p.is_file()}
    return {"config": settings(name)["method"], "code": CODE, "files": files, "metrics": matrix["metrics"]["choice"], "tasks": columns(found)}


def columns(rows: list[dict[str, Any]]) -> Column:
    """{name: a value a task, None where it has none}; parts as part.name."""
    flat = []
    for row in rows:
        nested = {f"{kind}.{part}": value for kind in ("parts", "parts_of_add") for part, value in row.pop(kind, {}).items()}
        flat.append(row | nested)
    return {name: [rounded(row.get(name)) for row in flat] for name in sorted({key for row in flat for key in row})}


def rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def collect() -> dict[str, Any]:
    import torch

    from forgetless.bench.results import environment, load_average, versions

    old = json.loads(FILE.read_text())["runs"] if FILE.is_file() else {}
    runs = {name: read(name) or old.get(name) for name in CONFIGS}
    content = {
        "command": "python benchmarks/scripts/hundred_tasks.py", "environment": environment(torch.device("cpu")) | {"threads": 1},
        "versions": versions("forgetless", "torch", "transformers", "accelerate"), "load_average": load_average(),
        "settings": {"tasks": TASKS, "rows": ROWS, "steps": STEPS, "max_rank": MAX_RANK, "scored_rows_a_task": 6, "keep": "last 2"},
        "runs": {name: entry for name, entry in runs.items() if entry and entry.get("code") == CODE},
    }  # fmt: skip
    beside = FILE.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps(content).replace('"tasks": {', '\n"tasks": {').replace("], ", "],\n") + "\n")
    beside.replace(FILE)
    return content


def slopes(column: list[float | None]) -> dict[str, float]:
    """Median of the first and of the last fifth of a column, and what each task adds by the median of all pairwise slopes (Theil and Sen)."""
    from statistics import median

    points = [(i, v) for i, v in enumerate(column) if v is not None]
    pairs = [(b - a) / (j - i) for k, (i, a) in enumerate(points) for j, b in points[k + 1 :]]
    fifth = max(1, len(points) // 5)
    return {"first": median(v for _, v in points[:fifth]), "last": median(v for _, v in points[-fifth:]), "a_task": median(pairs)}


def show(content: dict[str, Any]) -> None:
    for name, run in content["runs"].items():
        print(name, {k: round(v, 3) for k, v in run["metrics"].items() if isinstance(v, float)}, run["files"])
        for column, values in run["tasks"].items():
            if sum(v is not None for v in values) > 4:
                s = slopes(values)
                print(f"  {column:<28}{s['first']:>16.4f}{s['last']:>16.4f}   {s['a_task']:+.6f} a task")


# -- the picture -----------------------------------------------------------------------------------------------------------------------


def plot(content: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = content["runs"]
    figure, axes = pyplot.subplots(1, 4, figsize=(13, 3.2))
    for name, run in runs.items():
        if name == "add":
            continue
        t, x = run["tasks"], range(1, TASKS + 1)
        axes[0].plot(x, [v and v / 1e6 for v in t["resident"]], label=name, linewidth=1.2)
        axes[1].plot(x, [v / 1e6 for v in t["method_bytes"]], label=name, linewidth=1.2)
        line = axes[2].plot(x, smooth(t["train_cpu"]), label=name, linewidth=1.2)
        axes[2].plot(x, smooth(t["rest_cpu"]), linestyle=":", linewidth=1.2, color=line[0].get_color())
    t = runs["add"]["tasks"]
    x = [i + 1 for i, v in enumerate(t["add_cpu"]) if v is not None]
    whole, used = [t["add_cpu"][i - 1] for i in x], [0.0] * len(x)
    parts = {
        "train_cpu": "training", "parts.evaluate": "scoring all tasks", "parts.cover": "inputs of all tasks", "parts.check_files": "hashing all commits",
        "parts.repair": "repair", "parts.start": "start",
    }  # fmt: skip
    for part, label in parts.items():
        values = smooth([t[part][i - 1] or 0.0 for i in x])
        top = [a + b for a, b in zip(used, values, strict=True)]
        axes[3].fill_between(x, used, top, label=label, alpha=0.7, linewidth=0)
        used = top
    axes[3].plot(x, smooth(whole), color="black", linewidth=1.2, label="all of it")
    titles = (
        "resident memory, MB",
        "state/ of the method, MB",
        "CPU seconds a task\n(dotted: scoring and commit)",
        "CPU seconds of one add (gorp, max_rank)",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xlabel="tasks learned", ylim=(0, None))
        axis.set_title(title, fontsize=9)
        axis.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "img" / "hundred_tasks.png", dpi=110)


def smooth(column: list[float | None], width: int = 9) -> list[float]:
    """Running median: other work on the machine leaves spikes."""
    from statistics import median

    near = [[v for v in column[max(0, i - width // 2) : i + width // 2 + 1] if v is not None] for i in range(len(column))]
    return [median(values) for values in near]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("run", "one", "show", "plot"), default="run")
    parser.add_argument("--only", choices=CONFIGS)
    args = parser.parse_args()
    if args.what == "one":
        import peft  # noqa: F401
        import transformers.trainer  # noqa: F401  what a first task would import is not its growth

        (do_add if args.only == "add" else do_run)(args.only)
        return
    if args.what == "run":
        env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
        if not (RUNS / "model").is_dir():
            make_model(RUNS / "model")
        for name in [args.only] if args.only else CONFIGS:
            if read(name) is None:
                subprocess.run([sys.executable, __file__, "one", "--only", name], check=True, env=env, cwd=ROOT)
            collect()
    content = json.loads(FILE.read_text())
    plot(content) if args.what == "plot" else show(content)


if __name__ == "__main__":
    main()

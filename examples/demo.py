"""The demo: a pretrained model learns four small tasks by plain fine-tuning (seqft) and by gorp, side by side; then the two are compared.

    make demo                                # or, once installed: python examples/demo.py

Each method is `python -m forgetless run CONFIG --progress json` in a process of its own, with one thread (two such processes beat one with two threads on two
cores). This process draws the JSON lines that both write to stderr. Run again after an interruption, it resumes; run again after the end, it compares again.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

CONFIGS = Path(__file__).resolve().parent / "demo"
METHODS = ("seqft", "gorp")
# one thread a process, and no other library's bars among ours; set before torch and tqdm are imported
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "PYTHONIOENCODING": "utf-8"}


@dataclass
class Lane:
    """One method's process, and what its lines have told so far."""

    name: str
    command: list[str]
    tasks: list[str]
    stage: str = "starting"
    total: int | None = None  # units of the stage: training steps, or rows to score
    done: int = 0
    note: str = ""
    learned: int = 0  # tasks
    said: deque[str] = field(default_factory=lambda: deque(maxlen=40))  # lines that are no events: an error, a traceback
    process: subprocess.Popen | None = None

    def read(self, line: str, display: Lines | Bars) -> None:
        """Take in one line of the child's stderr, and have it drawn."""
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            self.said += [line.rstrip()] if line.strip() else []
        elif "stage" in event:
            self.stage, self.total, self.done, self.note = event["stage"], event["total"], 0, ""
            task = self.stage.partition(":")[0]  # "cities: training" says that the tasks before cities are learned, by this run or by an earlier one
            self.learned = self.tasks.index(task) if task in self.tasks else self.learned
            display.stage(self)
        elif "done" in event:
            self.done, self.note = event["done"], event.get("note", "")
            display.moved(self)
        elif "say" in event:
            display.say(f"{self.name}: {event['say']}")

    def finish(self, display: Lines | Bars) -> None:
        self.stage, self.note, self.total, self.learned = "finished", "", self.total or 1, len(self.tasks)
        self.done = self.total
        display.stage(self)


class Lines:
    """No terminal: one line a stage."""

    def __init__(self, lanes: list[Lane]):
        pass

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stage(self, lane: Lane) -> None:
        self.say(f"{lane.name}: {lane.stage}")

    def moved(self, lane: Lane) -> None:
        pass

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class Bars:
    """A line a method, and one for the tasks that both have learned."""

    def __init__(self, lanes: list[Lane]):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        name, stage, note = (TextColumn(text, markup=False) for text in ("{task.description:<13}", "{task.fields[stage]:<28}", "{task.fields[note]}"))
        self.bars = Progress(name, stage, BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), note, console=Console(stderr=True))
        self.lanes = lanes
        self.ids = {lane.name: self.bars.add_task(lane.name, total=None, stage=lane.stage, note="") for lane in lanes}
        self.every = self.bars.add_task("tasks learned", total=sum(len(lane.tasks) for lane in lanes), stage="", note="")

    def __enter__(self) -> Bars:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def stage(self, lane: Lane) -> None:
        self.bars.reset(self.ids[lane.name], total=lane.total, completed=lane.done, stage=lane.stage, note=lane.note)
        self.bars.update(self.every, completed=sum(each.learned for each in self.lanes))

    def moved(self, lane: Lane) -> None:
        self.bars.update(self.ids[lane.name], completed=lane.done, note=lane.note)

    def say(self, text: str) -> None:
        self.bars.console.print(text, highlight=False, markup=False)


def follow(lanes: list[Lane], display: Lines | Bars) -> Lane | None:
    """Run all lanes at once and draw them. Returns the first that failed, or None; however it ends, no process is left behind."""
    lines: queue.Queue[tuple[Lane, str | None]] = queue.Queue()
    try:
        for lane in lanes:
            lane.process = subprocess.Popen(
                lane.command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                text=True, encoding="utf-8", errors="replace", env=os.environ | ENVIRONMENT,
            )  # fmt: skip
            threading.Thread(target=listen, args=(lane, lines), daemon=True).start()
        running = len(lanes)
        while running:
            lane, line = lines.get()
            if line is None:
                running -= 1
                if lane.process.wait():
                    return lane
                lane.finish(display)
            else:
                lane.read(line, display)
        return None
    except KeyboardInterrupt:
        display.say("stopping both runs")
        raise
    finally:
        stop([lane.process for lane in lanes if lane.process is not None])


def listen(lane: Lane, lines: queue.Queue) -> None:
    """A child's stderr into the queue; None at its end."""
    for line in lane.process.stderr:
        lines.put((lane, line))
    lines.put((lane, None))


def stop(processes: list[subprocess.Popen], patience: float = 15.0) -> None:
    """As Ctrl-C would, and harder for one that takes too long: what is committed survives either."""
    left = [process for process in processes if process.poll() is None]
    for process in left:
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + patience
    for process in left:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def compare(folders: dict[str, Path], out: Path) -> None:
    """Both matrices, a line a method, and the path of the report, on stdout."""
    from forgetless.evaluation.matrix import AccuracyMatrix
    from forgetless.report import write_report
    from forgetless.report.terminal import print_matrix

    found = {name: json.loads((folder / "matrix.json").read_text(encoding="utf-8")) for name, folder in folders.items()}
    for name, matrix in found.items():
        for scorer, rows in matrix["scores"].items():
            print_matrix(AccuracyMatrix(matrix["tasks"], rows, (matrix["before"] or {}).get(scorer)), scorer, name)
            print()
    print(comparison({name: matrix["metrics"] for name, matrix in found.items()}))
    print(f"\nreport  {write_report(list(folders.values()), out)}")


def comparison(metrics: dict[str, dict[str, dict[str, float | None]]]) -> str:
    """One line a method, in %: the mean over the tasks at the end, how far the earlier ones moved since they were learned, and how well each was learned.

    >>> print(comparison({"gorp": {"choice": {"average_accuracy": 0.5, "backward_transfer": -0.25, "learning_accuracy": 0.75}}}))
    gorp   choice: average accuracy 50.0, backward transfer -25.0, learning accuracy 75.0
    """

    def value(x: float | None, sign: str = "") -> str:
        return "-" if x is None else f"{100 * x:{sign}.1f}"

    lines = []
    for name, scorers in metrics.items():
        parts = [
            f"{scorer.replace('_', ' ')}: average accuracy {value(m['average_accuracy'])}, backward transfer {value(m['backward_transfer'], '+')}, "
            f"learning accuracy {value(m['learning_accuracy'])}"
            for scorer, m in scorers.items()
        ]
        lines.append(f"{name:<7}" + "; ".join(parts))
    return "\n".join(lines)


def demo(steps: int | None, limit: int | None, out: Path) -> int:
    """Prepare the model, run both methods, compare. Returns the exit status."""
    from rich.console import Console

    from forgetless.cli import quiet_libraries
    from forgetless.config import load_config

    os.environ.update(ENVIRONMENT)
    console = Console(stderr=True)
    overrides = [f"{key}={value}" for key, value in (("train.max_steps", steps), ("evaluate.limit", limit)) if value is not None]
    lanes, folders, models = [], {}, set()
    for name in METHODS:
        path, own = CONFIGS / f"{name}.yaml", [*overrides, f"output_dir={json.dumps(str(out / name))}"]
        config = load_config(path, own)
        lanes.append(
            Lane(name, [sys.executable, "-m", "forgetless", "run", str(path), *own, "--progress", "json"], [task.name for task in config.tasks])
        )
        folders[name] = Path(config.output_dir)
        models.add(config.model)

    begun = time.monotonic()
    with (Bars if console.is_interactive else Lines)(lanes) as display:
        display.say("preparing the bundled model")
        from forgetless.models import resolve  # imports torch, which takes seconds

        quiet_libraries()
        for model in models:  # here, once: two processes would both unpack it
            resolve(model)
        failed = follow(lanes, display)
    if failed is not None:
        status = failed.process.returncode
        print(
            *failed.said,
            f"{failed.name} failed (exit status {status}); the other run was stopped. What was committed is kept under {out}",
            sep="\n",
            file=sys.stderr,
        )
        return status if status > 0 else 128 - status  # negative: ended by that signal
    compare(folders, out / "report.html")
    console.print(f"took {(time.monotonic() - begun) / 60:.1f} minutes", highlight=False)
    return 0


def main(arguments: list[str] | None = None) -> int:
    example = "example:\n  python examples/demo.py --steps 10 --limit 30 --out runs/short\n\n"
    example += "A short run learns little; it shows the parts. A folder keeps its settings: other ones need another --out."
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=example, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, help="training steps of 8 rows a task (in the configs: 40)")
    parser.add_argument("--limit", type=positive, help="test rows a task (in the configs: 100)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for both runs and the report; default: runs/demo")
    args = parser.parse_args(arguments)

    from forgetless.errors import ForgetlessError

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return demo(args.steps, args.limit, args.out)
    except KeyboardInterrupt:
        print("\ninterrupted, both runs are stopped; run the same command again to resume", file=sys.stderr)
        return 130
    except ForgetlessError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())

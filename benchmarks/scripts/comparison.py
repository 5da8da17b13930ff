"""Methods side by side under one protocol: Standard CL on SmolLM2-135M, 40 steps of 8 a task, four tuning trials for every method on a stream of its own.

The tuning stream is the dev rows of two other tasks (10 % of train by hash, which final runs never train on), four fifths of them to train and one fifth to score; the
best final choice accuracy wins. Final runs: three seeds, with and without options in the prompt. A resumable queue (runs.py).
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import dataclass

from runs import RESULTS, ROOT, Queue, difference, recorded, show, work_through
from standard_cl import PROMPTS, TRAIN, config

ORDERS = {1: ("dbpedia", "amazon", "yahoo", "agnews"), 2: ("dbpedia", "amazon", "agnews", "yahoo")}
SEEDS = (0, 1, 2)
TUNING = ("amazon", "sst-2")
EACH = 4  # trials a method
MARKDOWN_HEAD = "| method | seeds | choice: end | BWT | learned | exact match: end | BWT | choice minus seqft |"
Trials = dict[str, list[tuple[dict, float]]]  # name -> [(method, learning rate)]


def train(rate: float) -> dict:
    """The recipe at another rate: linear to a tenth of it, whatever it is."""
    return TRAIN | {"learning_rate": rate, "lr_scheduler_kwargs": TRAIN["lr_scheduler_kwargs"] | {"lr_end": rate / 10}}


def grid(method: dict, rates: tuple, **options: tuple) -> list[tuple[dict, float]]:
    """[(method, learning rate)]: as many for every method."""
    found = [(method | dict(zip(options, values, strict=True)), rate) for rate, *values in itertools.product(rates, *options.values())]
    assert len(found) == EACH
    return found


@dataclass
class Comparison:
    """Of the methods of `trials`, under the name of its files. baselines: a comparison whose final runs stand beside these. general: measure general text too."""

    name: str
    trials: Trials
    baselines: Comparison | None = None
    general: bool = False

    @property
    def runs(self):
        return ROOT / "runs" / self.name

    def file(self, what: str):
        return RESULTS / f"{self.name}_{what}.json"

    def tuning(self) -> Queue:
        from forgetless import suites

        folder = self.runs / "tuning"
        folder.mkdir(parents=True, exist_ok=True)
        tasks = []
        for name in TUNING:
            suite = suites.load(f"standard_cl/{name}", options_in_prompt=True)
            cut = len(suite.dev) * 4 // 5
            for part, rows in (("train", suite.dev[:cut]), ("test", suite.dev[cut:])):
                (folder / f"{name}_{part}.jsonl").write_text(
                    "".join(json.dumps({"sentence": r["sentence"], "label": r["label"]}) + "\n" for r in rows)
                )
            where = folder.relative_to(ROOT)
            files = {part: str(where / f"{name}_{part}.jsonl") for part in ("train", "test")}
            tasks.append(
                {
                    "name": name,
                    "data": files["train"],
                    "test": files["test"],
                    "labels": list(suite.labels),
                    "prompt": suite.prompt,
                    "max_text_tokens": 48,
                }
            )
        queue = {}
        for i, name in itertools.product(range(EACH), self.trials):  # every method's first trial first: an interrupted queue compares
            method, rate = self.trials[name][i]
            settings = config(method, True, 100, limit=100, scorers=("choice", "exact_match"))
            queue[f"tune-{name}-{i}"] = settings | {"tasks": tasks, "train": train(rate)}
        return queue

    def best(self) -> dict[str, tuple[dict, float]]:
        """Each method's trial with the best final choice accuracy on the tuning stream; only methods whose trials are all done."""
        done = recorded(self.tuning(), self.runs, self.file("tune"))
        chosen = {}
        for name, trials in self.trials.items():
            scores = [done[f"tune-{name}-{i}"]["metrics"]["choice"]["average_accuracy"] for i in range(EACH) if f"tune-{name}-{i}" in done]
            if len(scores) == EACH:
                chosen[name] = trials[max(range(EACH), key=scores.__getitem__)]
        return chosen

    def final(self, order: int) -> Queue:
        return {
            f"order{order}-{tag}-{name}-seed{seed}": config(method, options, seed, tasks=ORDERS[order]) | {"train": train(rate)}
            for seed in SEEDS
            for tag, options in PROMPTS.items()
            for name, (method, rate) in self.best().items()
        }

    def differences(self, runs: dict[str, dict]) -> dict:
        """Every method minus seqft, over the same test rows and the seeds both have."""
        known = dict(runs)
        for order in ORDERS if self.baselines else ():
            path = self.baselines.file(f"order{order}")
            known = (json.loads(path.read_text())["runs"] if path.is_file() else {}) | known
        entries = []
        for order, tag, name in itertools.product(ORDERS, PROMPTS, self.trials):
            pairs = [(known.get(f"order{order}-{tag}-{name}-seed{s}"), known.get(f"order{order}-{tag}-seqft-seed{s}"), s) for s in SEEDS]
            pairs = [p for p in pairs if p[0] and p[1]]
            for scorer in ("choice", "calibrated", "exact_match") if pairs and name != "seqft" else ():
                found = difference([p[0] for p in pairs], [p[1] for p in pairs], scorer)
                entries.append(
                    {"prompt": tag, "order": order, "of": name, "minus": "seqft", "scorer": scorer, **found, "seeds": [p[2] for p in pairs]}
                )
        return {"differences": entries}

    def markdown(self, order: int) -> str:
        """The final runs as tables, one a prompt: means over the seeds that are there, and the difference from seqft over the same rows with its interval."""
        content = json.loads(self.file(f"order{order}").read_text())
        runs, differences = dict(content["runs"]), content["differences"]
        if self.baselines and self.baselines.file(f"order{order}").is_file():
            runs |= json.loads(self.baselines.file(f"order{order}").read_text())["runs"]
        lines = []
        for tag in PROMPTS:
            if not any(key.startswith(f"order{order}-{tag}-") for key in runs):
                continue
            lines += [
                f"Order {order}, {'options in the prompt' if tag == 'options' else 'without options'}:",
                "",
                MARKDOWN_HEAD,
                "|---|---|---|---|---|---|---|---|",
            ]
            for name in {**(self.baselines.trials if self.baselines else {}), **self.trials}:
                found = [runs[key] for s in SEEDS if (key := f"order{order}-{tag}-{name}-seed{s}") in runs]
                if not found:
                    continue
                cells = [name, str(len(found))]
                for scorer, keys in (
                    ("choice", ("average_accuracy", "backward_transfer", "learning_accuracy")),
                    ("exact_match", ("average_accuracy", "backward_transfer")),
                ):
                    cells += [
                        f"{sum(r['metrics'][scorer][key] for r in found) / len(found):{'+' if key == 'backward_transfer' else ''}.3f}" for key in keys
                    ]
                own = [d for d in differences if (d["prompt"], d["order"], d["of"], d["scorer"]) == (tag, order, name, "choice")]
                cells.append(f"{own[0]['difference']:+.3f} [{own[0]['ci95'][0]:+.3f}, {own[0]['ci95'][1]:+.3f}]" if own else "")
                lines.append("| " + " | ".join(cells) + " |")
            lines.append("")
        return "\n".join(lines)

    def main(self, description: str | None) -> None:
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("what", choices=("tune", "final", "table", "markdown"))
        parser.add_argument("--order", type=int, choices=ORDERS, default=1)
        parser.add_argument("--workers", type=int, default=2)
        parser.add_argument("--only", default="", help="the run to do, or a substring of those to do")
        args = parser.parse_args()
        if args.what == "markdown":
            print(self.markdown(args.order))
            return
        if args.what == "table":
            for path in sorted(RESULTS.glob(f"{self.name}_*.json")):
                show(path)
            return
        command = f"python benchmarks/scripts/{self.name}.py {args.what}" + (f" --order {args.order}" if args.what == "final" else "")
        if args.what == "tune":
            work_through(self.tuning(), self.runs, self.file("tune"), command, args.workers, args.only)
        else:
            work_through(
                self.final(args.order),
                self.runs,
                self.file(f"order{args.order}"),
                command,
                args.workers,
                args.only,
                self.differences,
                self.general,
            )

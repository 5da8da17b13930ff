"""The GORP paper's ablation under one protocol: Standard CL order 1 on SmolLM2-135M, 40 steps of 8 a task, four tuning trials for every method on a stream of its own.

    FORGETLESS_DATA=... python benchmarks/scripts/gorp_ablation.py tune      # 4 trials x 8 methods on amazon and SST-2, on rows that nothing else trains on
    FORGETLESS_DATA=... python benchmarks/scripts/gorp_ablation.py final     # each method's best settings, 3 seeds, two prompts: order 1
    FORGETLESS_DATA=... python benchmarks/scripts/gorp_ablation.py final --order 2
    python benchmarks/scripts/gorp_ablation.py table

B is the LoRA branch, L the full-rank branch, S the shared space. B alone is inclora: our projection is onto the complement of S, and without S that is everything.
The tuning stream is the dev rows of both tasks (10 % of train by hash, which final runs never train on), four fifths of them to train and one fifth to score; the best
final choice accuracy wins. A resumable queue (runs.py): about three core-hours to tune and ten for an order. Which space, energy, modules and rank: `standard_cl.py tune`.
"""

from __future__ import annotations

import argparse
import itertools
import json

from runs import RESULTS, ROOT, Queue, difference, recorded, show, work_through
from standard_cl import PROMPTS, TRAIN, config

RUNS = ROOT / "runs" / "gorp_ablation"
ORDERS = {1: ("dbpedia", "amazon", "yahoo", "agnews"), 2: ("dbpedia", "amazon", "agnews", "yahoo")}
SEEDS = (0, 1, 2)
TUNING = ("amazon", "sst-2")

LORA = {"name": "gorp", "use_full_rank": False, "use_lora": True}
BOTH = {"name": "gorp", "use_lora": True}
RELEASED = {"name": "benchmarks.peers.gorp_released_method:Released", "mode": "as_released"}


def train(rate: float) -> dict:
    """The recipe at another rate: linear to a tenth of it, whatever it is."""
    return TRAIN | {"learning_rate": rate, "lr_scheduler_kwargs": TRAIN["lr_scheduler_kwargs"] | {"lr_end": rate / 10}}


def grid(method: dict, rates: tuple, **options: tuple) -> list[tuple[dict, float]]:
    """[(method, learning rate)]: as many for every method."""
    found = [(method | dict(zip(options, values, strict=True)), rate) for rate, *values in itertools.product(rates, *options.values())]
    assert len(found) == EACH
    return found


EACH = 4
ADAPTER_RATES = (3e-4, 1e-3, 2e-3, 4e-3)
DENSE_RATES = (2e-5, 5e-5, 1e-4, 2e-4)
TRIALS: dict[str, list[tuple[dict, float]]] = {
    "seqft": grid({"name": "seqft"}, DENSE_RATES),
    "lora": grid({"name": "lora"}, ADAPTER_RATES),
    "inclora": grid({"name": "inclora"}, ADAPTER_RATES),
    "B+L": grid(BOTH | {"use_shared_space": False}, (1e-3, 2e-3), full_lr_ratio=(0.03, 0.1)),
    "B+S": grid(LORA, ADAPTER_RATES),
    "B+L+S": grid(BOTH, (1e-3, 2e-3), full_lr_ratio=(0.03, 0.1)),
    "L+S": grid({"name": "gorp"}, DENSE_RATES),
    "released": grid(RELEASED, (1e-3, 2e-3), full_lr_ratio=(0.01, 0.1)),
}


def tuning() -> Queue:
    from forgetless import suites

    folder = RUNS / "tuning"
    folder.mkdir(parents=True, exist_ok=True)
    tasks = []
    for name in TUNING:
        suite = suites.load(f"standard_cl/{name}", options_in_prompt=True)
        cut = len(suite.dev) * 4 // 5
        for part, rows in (("train", suite.dev[:cut]), ("test", suite.dev[cut:])):
            (folder / f"{name}_{part}.jsonl").write_text("".join(json.dumps({"sentence": r["sentence"], "label": r["label"]}) + "\n" for r in rows))
        where = folder.relative_to(ROOT)
        files = {part: str(where / f"{name}_{part}.jsonl") for part in ("train", "test")}
        tasks.append(
            {"name": name, "data": files["train"], "test": files["test"], "labels": list(suite.labels), "prompt": suite.prompt, "max_text_tokens": 48}
        )
    queue = {}
    for name, trials in TRIALS.items():
        for i, (method, rate) in enumerate(trials):
            settings = config(method, True, 100, limit=100, scorers=("choice", "exact_match"))
            queue[f"tune-{name}-{i}"] = settings | {"tasks": tasks, "train": train(rate)}
    return queue


def best() -> dict[str, tuple[dict, float]]:
    """Each method's trial with the best final choice accuracy on the tuning stream; only methods whose trials are all done."""
    queue = tuning()
    done = recorded(queue, RUNS, RESULTS / "gorp_ablation_tune.json")
    chosen = {}
    for name, trials in TRIALS.items():
        scores = [done[f"tune-{name}-{i}"]["metrics"]["choice"]["average_accuracy"] for i in range(EACH) if f"tune-{name}-{i}" in done]
        if len(scores) == EACH:
            chosen[name] = trials[max(range(EACH), key=scores.__getitem__)]
    return chosen


def final(order: int) -> Queue:
    return {
        f"order{order}-{tag}-{name}-seed{seed}": config(method, options, seed, tasks=ORDERS[order]) | {"train": train(rate)}
        for seed in SEEDS
        for tag, options in PROMPTS.items()
        for name, (method, rate) in best().items()
    }


def differences(runs: dict[str, dict]) -> dict:
    """Every method minus seqft, over the same test rows and the seeds both have."""
    entries = []
    for (order, tag), name in itertools.product(itertools.product(ORDERS, PROMPTS), TRIALS):
        pairs = [(runs.get(f"order{order}-{tag}-{name}-seed{s}"), runs.get(f"order{order}-{tag}-seqft-seed{s}"), s) for s in SEEDS]
        pairs = [p for p in pairs if p[0] and p[1]]
        for scorer in ("choice", "calibrated", "exact_match") if pairs and name != "seqft" else ():
            found = difference([p[0] for p in pairs], [p[1] for p in pairs], scorer)
            entries.append({"prompt": tag, "order": order, "of": name, "minus": "seqft", "scorer": scorer, **found, "seeds": [p[2] for p in pairs]})
    return {"differences": entries}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tune", "final", "table"))
    parser.add_argument("--order", type=int, choices=ORDERS, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="the run to do, or a substring of those to do")
    args = parser.parse_args()
    if args.what == "table":
        for path in sorted(RESULTS.glob("gorp_ablation_*.json")):
            show(path)
        return
    command = f"python benchmarks/scripts/gorp_ablation.py {args.what}" + (f" --order {args.order}" if args.what == "final" else "")
    if args.what == "tune":
        work_through(tuning(), RUNS, RESULTS / "gorp_ablation_tune.json", command, args.workers, args.only)
    else:
        work_through(final(args.order), RUNS, RESULTS / f"gorp_ablation_order{args.order}.json", command, args.workers, args.only, differences)


if __name__ == "__main__":
    main()

"""Standard CL order 1 (dbpedia, amazon, yahoo, agnews) on SmolLM2-135M: sequential fine-tuning against GORP, 40 steps of 8 a task.

    FORGETLESS_DATA=... python benchmarks/scripts/standard_cl.py tune      # settings of gorp on dev rows, seed 100
    FORGETLESS_DATA=... python benchmarks/scripts/standard_cl.py final     # seeds 0 and 1, on test, two prompts
    python benchmarks/scripts/standard_cl.py table                         # benchmarks/results/standard_cl_order1_*.json as tables

A resumable queue (runs.py): each entry is one run folder under runs/standard_cl. --only and --workers choose entries and processes.
"""

from __future__ import annotations

import argparse

from runs import RESULTS, ROOT, Queue, difference, show, work_through

RUNS = ROOT / "runs" / "standard_cl"
ORDER = ("dbpedia", "amazon", "yahoo", "agnews")
PROMPTS = {"options": True, "bare": False}
TRAIN = {
    "learning_rate": 1e-4, "max_steps": 40, "per_device_train_batch_size": 8, "warmup_steps": 4,
    "lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1e-5, "power": 1.0},
}  # fmt: skip  # the recipe: warm-up over the first tenth, then linear to a tenth

METHODS = {
    "gorp": {"name": "gorp", "rank": None, "full_lr_ratio": 1.0, "energy": 0.95},  # chosen on dev: dev/LOG.md
    "seqft": {"name": "seqft"},
    "seqft-linear": {"name": "seqft", "modules": "linear"},  # the weights gorp trains
    "gorp-rank8": {"name": "gorp", "rank": 8, "full_lr_ratio": 10.0, "energy": 0.95},  # the first choice, one seed
}


def config(
    method: dict, options: bool, seed: int, split: str = "test", limit: int = 200, scorers=("choice", "calibrated", "exact_match"), tasks=ORDER
) -> dict:
    entries = [{"name": t, "suite": f"standard_cl/{t}", "suite_options": {"options_in_prompt": options}, "max_text_tokens": 48} for t in tasks]
    return {
        "model": "bundled:smollm2-135m", "tasks": entries, "method": method, "train": TRAIN, "seed": seed, "keep": "last 1", "store": "prompts",
        "evaluate": {"split": split, "limit": limit, "scorers": list(scorers)},
    }  # fmt: skip


TRIALS = {  # one thing changed at a time; rank None is dense Adam inside the permitted space
    "default": {}, "energy0.9": {"energy": 0.9}, "energy0.98": {"energy": 0.98}, "first_moment": {"space_from": "first_moment"}, "ratio2": {"full_lr_ratio": 2.0},
    "attention": {"full_modules": r".*self_attn\..*"}, "mlp": {"full_modules": r".*mlp\..*"},
    "rank64": {"rank": 64, "full_lr_ratio": 3.0}, "rank8": {"rank": 8, "full_lr_ratio": 10.0}, "rank8-ratio20": {"rank": 8, "full_lr_ratio": 20.0},
}  # fmt: skip


def tuning() -> Queue:
    """gorp's settings on dev rows of the stream, with a seed of their own; test rows are never looked at."""
    return {
        f"tune-{tag}-{name}": config(METHODS["gorp"] | changes, options, 100, "dev", 100, ("choice", "exact_match"))
        for tag, options in PROMPTS.items()
        for name, changes in TRIALS.items()
    }


def final() -> Queue:
    # the comparison first, the second baseline next: an interrupted queue has the most it can
    order = [(("gorp", "seqft"), (0, 1)), (("seqft-linear",), (0, 1)), (("gorp-rank8",), (0,))]
    return {
        f"final-{tag}-{name}-seed{seed}": config(METHODS[name], options, seed)
        for names, seeds in order
        for seed in seeds
        for tag, options in PROMPTS.items()
        for name in names
    }


def differences(runs: dict[str, dict]) -> dict:
    """gorp minus each baseline in final accuracy over the same test rows (as many a task), over the seeds both have."""
    entries = []
    for tag in PROMPTS:
        for other in ("seqft", "seqft-linear", "gorp-rank8"):
            pairs = [(runs.get(f"final-{tag}-gorp-seed{s}"), runs.get(f"final-{tag}-{other}-seed{s}"), s) for s in (0, 1)]
            pairs = [p for p in pairs if p[0] and p[1]]
            for scorer in ("choice", "calibrated", "exact_match") if pairs else ():
                found = difference([p[0] for p in pairs], [p[1] for p in pairs], scorer)
                entries.append({"prompt": tag, "of": "gorp", "minus": other, "scorer": scorer, **found, "seeds": [p[2] for p in pairs]})
    return {"differences": entries}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tune", "final", "table"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="the run to do, or a substring of those to do")
    args = parser.parse_args()
    if args.what == "table":
        for path in sorted(RESULTS.glob("standard_cl_order1_*.json")):
            show(path)
        return
    queue, command = tuning() if args.what == "tune" else final(), f"python benchmarks/scripts/standard_cl.py {args.what}"
    extra = differences if args.what == "final" else None
    work_through(queue, RUNS, RESULTS / f"standard_cl_order1_{args.what}.json", command, args.workers, args.only, extra)


if __name__ == "__main__":
    main()

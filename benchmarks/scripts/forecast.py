"""How well is forgetting foretold? The overlap known before a task trains and the drift KL known after it, beside what each earlier task then lost.

    python benchmarks/scripts/forecast.py              # 8 runs of four demo tasks, 15 steps a task, two to four minutes each on one core; resumes where it was stopped
    python benchmarks/scripts/forecast.py summary      # the correlations again, from the result file

seqft and gorp, each in four orders (every task once in every place), seed 0, at the settings of every_method.py; 100 test rows a task. For each task after a run's
first, from the commits: the overlap of its gradients with each earlier task's recorded inputs at the model it began from (forecast.py), mean KL(before || after)
on its own prompts (evaluation/drift_kl.py), and each earlier task's drop in the score. Spearman's rank correlation; the intervals are of a bootstrap over whole runs,
whose numbers hang together.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from runs import RESULTS, ROOT, Queue, cpu_name, read, work

RUNS = ROOT / "runs" / "forecast"
FILE = RESULTS / "forecast.json"
ORDERS = (
    ("languages", "cities", "polarity", "kinds"),
    ("kinds", "polarity", "cities", "languages"),
    ("cities", "kinds", "languages", "polarity"),
    ("polarity", "languages", "kinds", "cities"),
)
SCORERS = ("choice", "exact_match")
PREDICTORS = ("overlap", "kl", "last_kl", "base_kl")  # last_kl: at the prompt's last position alone, where the answer begins


def queue() -> Queue:
    return {
        f"{method}-{k}": {
            "model": "bundled:smollm2-135m", "tasks": [{"name": t, "suite": f"demo/{t}", "max_text_tokens": 32} for t in order],
            "method": {"name": method}, "evaluate": {"limit": 100, "scorers": list(SCORERS)}, "keep": "all", "seed": 0,
            "train": {"learning_rate": 1e-4, "max_steps": 15, "per_device_train_batch_size": 8, "warmup_steps": 2, "lr_scheduler_type": "constant_with_warmup"},
        }
        for k, order in enumerate(ORDERS) for method in ("seqft", "gorp")
    }  # fmt: skip


def transitions(run: Path) -> list[dict[str, Any]]:
    """Of each task but the first: {task, overlap {earlier task}, kl, last_kl, base_kl, drop {scorer: {earlier task}}}."""
    from forgetless import models
    from forgetless.config import load_config
    from forgetless.evaluation.drift_kl import PROMPTS, divergence, log_probabilities
    from forgetless.forecast import ROWS, leading_directions, overlap
    from forgetless.lineage import RunFolder
    from forgetless.methods._statistics import encoded
    from forgetless.tasks import load_stream, sample

    folder, config = RunFolder(run, lock=False), load_config(run / "run.yaml")
    stream, names = load_stream(config), folder.committed()
    base, tokenizer = models.load(config.model)
    model = models.load(str(run / "tasks" / names[0] / "model"))[0]
    metrics, found = [folder.metrics(name) for name in names], []
    for i in range(1, len(names)):
        task, earlier = stream[i], stream.tasks[:i]
        spaces = {t.name: leading_directions(folder.recorded(name)) for t, name in zip(earlier, names, strict=False)}
        shares = overlap(model, encoded(tokenizer, task, ROWS, config.seed), spaces)
        after = models.load(str(run / "tasks" / names[i] / "model"))[0]
        kls = []
        for row in sample(task.split(config.evaluate.split), PROMPTS, config.seed):
            ids = task.encode_prompt(tokenizer, row)
            now = log_probabilities(after, ids)
            kls.append([divergence(log_probabilities(m, ids), now) for m in (model, base)])
        mean = {key: sum(values) / len(kls) for key, values in (
            ("kl", [float(kl.mean()) for kl, _ in kls]), ("last_kl", [float(kl[-1]) for kl, _ in kls]), ("base_kl", [float(kl.mean()) for _, kl in kls]),
        )}  # fmt: skip
        drops = {s: {t.name: metrics[i - 1]["scores"][s][j] - metrics[i]["scores"][s][j] for j, t in enumerate(earlier)} for s in SCORERS}
        found.append({"task": task.name, "overlap": shares, **mean, "drop": drops})
        model = after
    return found


def points(entry: dict[str, Any], predictor: str, scorer: str) -> list[tuple[float, float]]:
    """(predictor, drop): of overlap one for each earlier task of each transition, of a KL one for each transition, with the mean drop."""
    out = []
    for t in entry["transitions"]:
        drops = t["drop"][scorer]
        if predictor == "overlap":
            out += [(t["overlap"][name], drop) for name, drop in drops.items()]
        else:
            out.append((t[predictor], sum(drops.values()) / len(drops)))
    return out


def correlations(entries: dict[str, dict]) -> list[dict[str, Any]]:
    """Spearman's correlation of each predictor with the drop, over all runs and each method's, with a 95 % interval by 2,000 bootstraps over runs."""
    import numpy as np

    out = []
    for method in ("all", "seqft", "gorp"):
        runs = [entry for name, entry in entries.items() if method in ("all", entry["config"]["method"]["name"])]
        if len(runs) < 2:
            continue
        for scorer in SCORERS:
            for predictor in PREDICTORS:
                groups = [points(entry, predictor, scorer) for entry in runs]
                generator = np.random.default_rng(0)
                draws = [spearman([p for k in generator.integers(len(groups), size=len(groups)) for p in groups[k]]) for _ in range(2000)]
                known = [d for d in draws if d is not None]
                low, high = np.quantile(known, [0.025, 0.975]) if known else (None, None)
                whole = [p for group in groups for p in group]
                out.append({
                    "method": method, "scorer": scorer, "predictor": predictor, "spearman": spearman(whole), "ci95": [low and float(low), high and float(high)],
                    "n": len(whole), "runs": len(runs), "mean_drop": sum(y for _, y in whole) / len(whole),
                })  # fmt: skip
    return out


def spearman(pairs: list[tuple[float, float]]) -> float | None:
    """Rank correlation, ties at their mean rank; None where one side is constant."""
    import numpy as np

    ranks = []
    for side in zip(*pairs, strict=True):
        values = np.asarray(side)
        ranks.append(np.array([((values < v).sum() + (values <= v).sum() - 1) / 2 for v in values]))
    if any(r.std() == 0 for r in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def main(only: str) -> None:
    entries = json.loads(FILE.read_text())["runs"] if FILE.is_file() else {}
    todo = queue()
    entries = {name: entry for name, entry in entries.items() if name in todo and entry["config"] == todo[name]}
    for name, settings in todo.items():
        if name in entries or only not in name:
            continue
        status = work(name, settings, RUNS, FILE)
        run = read(name, settings, RUNS)
        if status or run is None:
            continue
        kept = {key: run[key] for key in ("config", "versions", "tasks", "scores", "n", "metrics")}
        entries[name] = kept | {"transitions": transitions(RUNS / name)}
        write(entries)
        shutil.rmtree(RUNS / name)  # 2.5 GB of weights


def write(entries: dict[str, dict]) -> None:
    environment = {"cpu": cpu_name(), "threads": 1, "device": "CPU"}
    content = {"command": "python benchmarks/scripts/forecast.py", "environment": environment, "correlations": correlations(entries), "runs": entries}
    beside = FILE.with_suffix(".tmp")
    beside.write_text(json.dumps(content, indent=1))
    beside.replace(FILE)
    print(f"{len(entries)} of {len(queue())} runs -> {FILE.name}", flush=True)


def summary() -> None:
    for c in json.loads(FILE.read_text())["correlations"]:
        interval = "" if c["ci95"][0] is None else f"[{c['ci95'][0]:+.2f}, {c['ci95'][1]:+.2f}]"
        value = "  -  " if c["spearman"] is None else f"{c['spearman']:+.2f}"
        print(
            f"{c['method']:<6} {c['scorer']:<12} {c['predictor']:<8} {value} {interval:<16} n {c['n']:<3} runs {c['runs']}  mean drop {c['mean_drop']:+.3f}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("run", "summary"), default="run")
    parser.add_argument("--only", default="", help="a substring of the runs to do")
    args = parser.parse_args()
    if args.what == "run":
        main(args.only)
    summary()

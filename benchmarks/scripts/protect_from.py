"""What is left of skills nobody trained: perplexity and KL to the untouched model on general text, after four tasks, with and without `protect_from`.

    FORGETLESS_DATA=... python benchmarks/scripts/protect_from.py          # benchmarks/results/protect_from.json

200 prompts of LIMA (TRACE's copy) are protected; 100 other conversations of it are measured: exp(mean loss) of all their tokens, and the mean over tokens of
KL(untouched || tuned). The tasks are Standard CL order 1, options in the prompt, seed 0; the runs without protection are those of standard_cl.py final.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
from pathlib import Path

import standard_cl
from runs import RESULTS, ROOT, Queue, collect, work_through

RUNS = standard_cl.RUNS
COMMAND = "python benchmarks/scripts/protect_from.py"
PROMPTS, HELD, TOKENS = 200, 100, 256
ENERGIES = (0.8, 0.9)  # share of the prompts' input energy that is protected


def lima() -> list[dict]:
    folder = Path(os.environ["FORGETLESS_DATA"]) / "trace" / "500" / "Lima"
    file = next(f for f in (folder / "train.json", folder / "train.json.gz") if f.is_file())
    return json.loads((gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()).decode())


def queue() -> Queue:
    final = standard_cl.final()
    without = {name: final[name] for name in ("final-options-seqft-seed0", "final-options-gorp-seed0")}
    RUNS.mkdir(parents=True, exist_ok=True)
    prompts = RUNS / "lima.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in lima()[:PROMPTS]))
    protected = without["final-options-gorp-seed0"] | {"protect_from": str(prompts.relative_to(ROOT))}
    return without | {f"protected-{energy}": protected | {"method": protected["method"] | {"protect_energy": energy}} for energy in ENERGIES}


def general(entries: dict[str, dict]) -> dict:
    """{"general": {run: {perplexity, kl}}} of the untouched model and of each finished run's last model."""
    import torch

    from forgetless import models

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    base, tokenizer = models.load("bundled:smollm2-135m")
    rows = [tokenizer(row["prompt"] + "\n" + row["answer"]).input_ids[:TOKENS] for row in lima()[PROMPTS : PROMPTS + HELD]]
    tokens = sum(len(ids) - 1 for ids in rows)
    found = {}
    for name in ("untouched", *entries):
        if name != "untouched" and not (RUNS / name / "model").exists():
            continue
        tuned = base if name == "untouched" else models.load(str(RUNS / name / "model"))[0]
        loss = kl = 0.0
        with torch.inference_mode():
            for ids in rows:  # one by one: a row's log-probabilities take 50 MB
                before, after = (model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1) for model in (base, tuned))
                loss -= float(after[torch.arange(len(ids) - 1), ids[1:]].sum())
                kl += float((before.exp() * (before - after)).sum())
        found[name] = {"perplexity": math.exp(loss / tokens), "kl": kl / tokens}
        print(name, found[name], flush=True)
    return {"general": found, "held_out_tokens": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="substring of the runs to do; what is measured is measured when none is given")
    args = parser.parse_args()
    todo, results = queue(), RESULTS / "protect_from.json"
    work_through(todo, RUNS, results, COMMAND, args.workers, args.only)
    if not args.only:
        collect(todo, RUNS, results, COMMAND, general)


if __name__ == "__main__":
    main()

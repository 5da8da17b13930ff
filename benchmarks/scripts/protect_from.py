"""What is left of skills nobody trained: perplexity and KL to the untouched model on general text, after four tasks, with and without `protect_from`.

    FORGETLESS_DATA=... python benchmarks/scripts/protect_from.py          # benchmarks/results/protect_from.json

200 prompts of LIMA (TRACE's copy) are protected; 100 other conversations of it are measured (general.py). The tasks are Standard CL order 1, options in the prompt,
seed 0, gorp and seqft with the settings of standard_cl.py final.
"""

from __future__ import annotations

import argparse
import json

import standard_cl
from general import BASE, PROMPTS, lima, measure
from runs import RESULTS, ROOT, Queue, work_through

RUNS = ROOT / "runs" / "protect_from"
ENERGIES = (0.8, 0.9)  # share of the prompts' input energy that is protected


def queue() -> Queue:
    final = standard_cl.final()
    without = {name: final[f"final-options-{name}-seed0"] for name in ("seqft", "gorp")}
    RUNS.mkdir(parents=True, exist_ok=True)
    prompts = RUNS / "lima.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in lima()[:PROMPTS]))
    protected = without["gorp"] | {"protect_from": str(prompts.relative_to(ROOT))}
    return without | {f"gorp-protected-{energy}": protected | {"method": protected["method"] | {"protect_energy": energy}} for energy in ENERGIES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="the run to do, or a substring of those to do")
    args = parser.parse_args()
    untouched = measure(BASE)
    command = "python benchmarks/scripts/protect_from.py"
    work_through(queue(), RUNS, RESULTS / "protect_from.json", command, args.workers, args.only, lambda _: {"untouched": untouched}, general=True)


if __name__ == "__main__":
    main()

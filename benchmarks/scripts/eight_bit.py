"""`optimizer_state: 8bit` on the tuning stream of the GORP ablation: seqft and gorp (L+S) at the rate that won there, beside the same runs with fp32 moments.

    FORGETLESS_DATA=... python benchmarks/scripts/eight_bit.py

The runs with fp32 moments are those of gorp_ablation_tune.json: same rows, steps and seed.
"""

from __future__ import annotations

from gorp_ablation import ABLATION
from runs import RESULTS, ROOT, show, work_through

METHODS = ("seqft", "L+S")


def queue() -> dict[str, dict]:
    tuning, found = ABLATION.tuning(), {}
    for name in METHODS:
        method, rate = ABLATION.best()[name]
        config = next(
            c for key, c in tuning.items() if key.startswith(f"tune-{name}-") and (c["method"], c["train"]["learning_rate"]) == (method, rate)
        )
        found |= {f"{name}-8bit": config | {"optimizer_state": "8bit"}}
    return found


if __name__ == "__main__":
    results = RESULTS / "eight_bit.json"
    work_through(queue(), ROOT / "runs" / "eight_bit", results, "python benchmarks/scripts/eight_bit.py", workers=2)
    show(results)

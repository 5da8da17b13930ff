"""The GORP paper's ablation under one protocol (comparison.py): Standard CL on SmolLM2-135M, four tuning trials for every method on a stream of its own.

    FORGETLESS_DATA=... python benchmarks/scripts/gorp_ablation.py tune      # 4 trials x 8 methods on amazon and SST-2, on rows that nothing else trains on
    FORGETLESS_DATA=... python benchmarks/scripts/gorp_ablation.py final     # each method's best settings, 3 seeds, two prompts: order 1
    FORGETLESS_DATA=... python benchmarks/scripts/gorp_ablation.py final --order 2
    python benchmarks/scripts/gorp_ablation.py table

B is the LoRA branch, L the full-rank branch, S the shared space. B alone is inclora: our projection is onto the complement of S, and without S that is everything.
About three core-hours to tune and ten for an order. Which space, energy, modules and rank: `standard_cl.py tune`.
"""

from __future__ import annotations

from comparison import Comparison, grid

LORA = {"name": "gorp", "use_full_rank": False, "use_lora": True}
BOTH = {"name": "gorp", "use_lora": True}
RELEASED = {"name": "benchmarks.peers.gorp_released_method:Released", "mode": "as_released"}
ADAPTER_RATES = (3e-4, 1e-3, 2e-3, 4e-3)
DENSE_RATES = (2e-5, 5e-5, 1e-4, 2e-4)

ABLATION = Comparison(
    "gorp_ablation",
    {
        "seqft": grid({"name": "seqft"}, DENSE_RATES),
        "lora": grid({"name": "lora"}, ADAPTER_RATES),
        "inclora": grid({"name": "inclora"}, ADAPTER_RATES),
        "B+L": grid(BOTH | {"use_shared_space": False}, (1e-3, 2e-3), full_lr_ratio=(0.03, 0.1)),
        "B+S": grid(LORA, ADAPTER_RATES),
        "B+L+S": grid(BOTH, (1e-3, 2e-3), full_lr_ratio=(0.03, 0.1)),
        "L+S": grid({"name": "gorp"}, DENSE_RATES),
        "released": grid(RELEASED, (1e-3, 2e-3), full_lr_ratio=(0.01, 0.1)),
    },
)

if __name__ == "__main__":
    ABLATION.main(__doc__)

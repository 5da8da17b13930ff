"""OSFT under the protocol of the GORP ablation (comparison.py): what of the spectrum to close, whether the data should have a say, and PEFT's OSF beside it.

    FORGETLESS_DATA=... python benchmarks/scripts/osft_comparison.py tune      # 4 trials x 9 methods on amazon and SST-2
    FORGETLESS_DATA=... python benchmarks/scripts/osft_comparison.py final     # each method's best rate, 3 seeds, two prompts; --order 2
    python benchmarks/scripts/osft_comparison.py table

seqft and gorp (L+S) are those of gorp_ablation.py: the same rows, steps, trials and seeds. `form: adapter` is not a method of its own here: it takes the same steps as
`form: coordinates` (tests/test_osft.py holds both to 1e-10). After each final run also perplexity and KL to the untouched model on general text (general.py).
"""

from __future__ import annotations

from comparison import Comparison, grid
from gorp_ablation import ABLATION

RATES = (5e-5, 1e-4, 2e-4, 4e-4)
OSFT = {"name": "osft"}

COMPARISON = Comparison(
    "osft_comparison",
    {
        "low_low-50": grid(OSFT | {"frozen_ratio": 0.5}, RATES),
        "inputs": grid(OSFT | {"protect": "inputs"}, RATES),
        "both-50": grid(OSFT | {"frozen_ratio": 0.5, "protect": "both"}, RATES),
        "peft-osf-50": grid({"name": "benchmarks.peers.peft_osf_method:PeftOSF", "effective_rank": 0.5}, RATES),
        "low_low-90": grid(OSFT | {"frozen_ratio": 0.9}, RATES),
        "low_low-75": grid(OSFT | {"frozen_ratio": 0.75}, RATES),
        "union-50": grid(OSFT | {"frozen_ratio": 0.5, "remember": "union"}, RATES),
        "paper-50": grid(OSFT | {"frozen_ratio": 0.5, "block": "paper"}, RATES),
        "adaptive": grid(OSFT | {"frozen_ratio": "adaptive"}, RATES),
    },
    baselines=ABLATION,
    general=True,
)

if __name__ == "__main__":
    COMPARISON.main(__doc__)

"""The README's picture from the committed numbers: choice accuracy while four tasks are learned.

python benchmarks/scripts/picture.py        # benchmarks/results/standard_cl_order1_final.json -> docs/img/standard_cl.png      (needs matplotlib)
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[2]
METHODS = {
    "gorp": ("GORP", "#1b6ca8", "-"),
    "seqft-linear": ("sequential, the same weights", "#b0641e", "--"),
    "seqft": ("sequential, all weights", "#8a8a8a", "-"),
}
PROMPTS = {"options": "instruction and options in the prompt", "bare": "text only in the prompt"}


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = json.loads((ROOT / "benchmarks" / "results" / "standard_cl_order1_final.json").read_text())["runs"]
    figure, axes = plt.subplots(2, 2, figsize=(9.5, 6), sharex=True, sharey=True)
    for column, (prompt, title) in enumerate(PROMPTS.items()):
        for method, (label, colour, style) in METHODS.items():
            found = [r["scores"]["choice"] for name, r in runs.items() if name.startswith(f"final-{prompt}-{method}-seed")]
            if not found:
                continue
            first = [[row[0] for row in rows] for rows in found]
            seen = [[mean(row[: i + 1]) for i, row in enumerate(rows)] for rows in found]
            for ax, values in ((axes[0][column], first), (axes[1][column], seen)):
                for one in values:
                    ax.plot(range(len(one)), one, color=colour, linestyle=style, alpha=0.35, linewidth=1)
                middle = [mean(v) for v in zip(*values, strict=True)]
                ax.plot(
                    range(len(middle)),
                    middle,
                    color=colour,
                    linestyle=style,
                    linewidth=2.2,
                    label=f"{label} ({len(values)} seed{'s' if len(values) > 1 else ''})",
                )
        tasks = next(iter(runs.values()))["tasks"]
        axes[0][column].set_title(title, fontsize=10)
        axes[1][column].set_xticks(range(len(tasks)), [f"after {t}" for t in tasks], fontsize=8)
    axes[0][0].set_ylabel("accuracy on the first task")
    axes[1][0].set_ylabel("mean accuracy, tasks so far")
    axes[0][0].legend(fontsize=8, frameon=False, loc="lower left")
    for ax in axes.flat:
        ax.set_ylim(0, 1)
        ax.grid(alpha=0.2)
        ax.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    out = ROOT / "docs" / "img" / "standard_cl.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    print(out.relative_to(ROOT))


if __name__ == "__main__":
    main()

"""What an optimizer step costs against rank, closed directions, tasks and width, drawn from bench_step_sweep_cpu.json (docs/img/step.png). Needs matplotlib.

S="python -m forgetless.bench step --contenders gorp gorp-warm gorp-open --out benchmarks/results/bench_step_sweep_cpu.json"
$S --layers 4 --rank 1 2 4 8 16 32 64 128
$S --layers 4 --space 0 16 32 48 64 80 96 128 160 184
$S --layers 1 --shapes smollm2 t5-large llama-7b
python benchmarks/scripts/plot_step.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from runs import RESULTS, ROOT

LINES = {"gorp": "cold", "gorp-warm": "warm", "gorp-open": "cold, nothing closed"}
WIDTHS = {"smollm2": 576, "t5-large": 1024, "llama-7b": 4096}
A_TASK, MAX_RANK, TASKS = 16, 96, 10  # directions a task closes, and the bound, of the panel over tasks
Cell = dict[str, Any]


def panels(cells: list[Cell]) -> dict[str, tuple[list, list[Cell]]]:
    """Title of a panel: its places on the axis, and the cell at each."""
    swept = {(c["rank"], c["space"]): c for c in cells if (c["shapes"], c["layers"]) == ("smollm2", 4)}
    ranks = sorted(rank for rank, space in swept if space == 64)
    spaces = sorted(space for rank, space in swept if rank == 8)
    tasks = [t for t in range(TASKS + 1) if (8, min(A_TASK * t, MAX_RANK)) in swept]
    wide = sorted((c for c in cells if c["layers"] == 1 and c["rank"] == 8), key=lambda c: WIDTHS[c["shapes"]])
    return {
        "rank (64 directions closed)": (ranks, [swept[r, 64] for r in ranks]),
        "closed directions (rank 8)": (spaces, [swept[8, s] for s in spaces]),
        f"tasks, {A_TASK} directions each, max_rank {MAX_RANK}": (tasks, [swept[8, min(A_TASK * t, MAX_RANK)] for t in tasks]),
        "width (rank 8, 64 closed)": ([WIDTHS[c["shapes"]] for c in wide], wide),
    }


def draw(cells: list[Cell], ratio: str, path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(13, 3.2), sharey=False)
    for axis, (title, (places, row)) in zip(axes, panels(cells).items(), strict=True):
        for name, label in LINES.items():
            axis.plot(places, [c["contenders"][name]["ratio"][ratio] for c in row], marker="o", markersize=3, label=label)
        axis.axhline(1, color="0.6", linewidth=0.8)
        axis.set(xlabel=title, ylim=(0, None))
        if max(places) > 50 * min(p for p in places if p):
            axis.set_xscale("log", base=2)
    axes[0].set_ylabel(f"step time over AdamW's, {ratio}")
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(made: Callable[[list[Cell], str, Any], None] = draw) -> None:
    cells = json.loads((RESULTS / "bench_step_sweep_cpu.json").read_text())["cells"]
    made(cells, "gap 50", ROOT / "docs" / "img" / "step.png")


if __name__ == "__main__":
    main()

"""Cells of the leaderboard with general text measured too (general.py), on each run's last model before its weights are let go: the forms of osft, order 1, options.

    FORGETLESS_DATA=... python benchmarks/scripts/general_cells.py            # trials that are missing come first
    FORGETLESS_DATA=... python benchmarks/scripts/general_cells.py beside     # rows measured before this was: seed 0 again, benchmarks/results/general_text.json

A cell that is there already is not done again by the first, measured or not. The second leaves the leaderboard's cells alone, and says whether they came out again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from forgetless.leaderboard import cells
from forgetless.leaderboard.spec import Also, Spec, Tier, load_spec
from forgetless.leaderboard.spec import cells as the_cells
from forgetless.leaderboard.work import repeat, work_through
from runs import RESULTS, ROOT

SPEC = ROOT / "benchmarks" / "leaderboards" / "standard_cl.yaml"
FORMS = (
    "osft, weights 75 %",
    "osft, weights 90 %",
    "osft, both 50 %",
    "osft, paper's block 50 %",
    "osft, weights 50 %, union",
    "osft, weights 50 %",
    "osft, adaptive",
)
BESIDE = "seqft", "gorp", "osft-peft (peer)", "osft, inputs"


def with_text(folder: Path, also: Also | None) -> dict[str, Any]:
    """What a cell measures beside its scores, and general text (not of a trial), in a process of its own."""
    found = measured(folder, also)
    if "tuning" in folder.parts:
        return found
    subprocess.run([sys.executable, str(Path(__file__).with_name("general.py")), str(folder)], check=True)
    return found | {"general": found.get("general", {}) | {"text": json.loads((folder / "general_text.json").read_text())}}


measured = cells.measured


def of(spec: Spec, rows: tuple[str, ...], seeds: list[int]) -> Spec:
    return spec.model_copy(update={"tiers": [Tier(streams=["order1"], prompts=["options"], seeds=seeds, rows=list(rows))]})


def beside(spec: Spec, workers: int, only: str) -> None:
    """Seed 0 of the rows of BESIDE once more, into runs/, and what general text says of it into RESULTS."""
    folder, again = ROOT / "runs" / "general_cells", of(spec, BESIDE, [0])
    print(*repeat(again, folder, workers, only), sep="\n")
    found = {cell.row: content for cell in the_cells(again) if (content := cells.read(cells.place(folder, cell)))}
    kept = ("learning_rate", "metrics", "environment")
    rows = {row: {key: content[key] for key in kept} | {"text": content["general"]["text"]} for row, content in found.items()}
    (RESULTS / "general_text.json").write_text(
        json.dumps({"command": "python benchmarks/scripts/general_cells.py beside", "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="?", choices=["forms", "beside"], default="forms")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="a part of the names of the cells to do")
    args = parser.parse_args()
    cells.measured = with_text  # of every cell that this process finishes; the queue asks for it by this name
    spec = load_spec(SPEC)
    if args.rows == "beside":
        beside(spec, args.workers, args.only)
    else:
        sys.exit(not work_through(of(spec, FORMS, [0, 1, 2]), args.workers, args.only))

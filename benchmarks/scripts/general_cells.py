"""Cells of the leaderboard with general text measured too (general.py), on each run's last model before its weights are let go: the forms of osft, one seed.

    FORGETLESS_DATA=... python benchmarks/scripts/general_cells.py        # order 1, options, seed 0; trials that are missing come first

A cell that is there already is not done again, measured or not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from forgetless.leaderboard import cells
from forgetless.leaderboard.spec import Also, Tier, load_spec
from forgetless.leaderboard.work import work_through
from runs import ROOT

SPEC = ROOT / "benchmarks" / "leaderboards" / "standard_cl.yaml"
FORMS = "osft, weights 75 %", "osft, weights 90 %", "osft, both 50 %", "osft, paper's block 50 %", "osft, weights 50 %, union", "osft, adaptive"


def with_text(folder: Path, also: Also | None) -> dict[str, Any]:
    """What a cell measures beside its scores, and general text (not of a trial), in a process of its own."""
    found = beside(folder, also)
    if "tuning" in folder.parts:
        return found
    subprocess.run([sys.executable, str(Path(__file__).with_name("general.py")), str(folder)], check=True)
    return found | {"general": found.get("general", {}) | {"text": json.loads((folder / "general_text.json").read_text())}}


beside = cells.measured

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="a part of the names of the cells to do")
    args = parser.parse_args()
    cells.measured = with_text  # of every cell that this process finishes; the queue asks for it by this name
    spec = load_spec(SPEC)
    tier = Tier(streams=["order1"], prompts=["options"], seeds=[0], rows=list(FORMS))
    sys.exit(not work_through(spec.model_copy(update={"tiers": [tier]}), args.workers, args.only))

"""`forgetless estimate` held to the peaks that finished runs had: every run of the result files, its estimated and its measured peak memory.

    FORGETLESS_DATA=... python benchmarks/scripts/estimates.py                                # all runs of gorp_ablation_order1.json of seed 0
    FORGETLESS_DATA=... python benchmarks/scripts/estimates.py FILE.json --only options

Runs are on a CPU, where the peak is the process' largest resident set.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from runs import RESULTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=[RESULTS / "gorp_ablation_order1.json"])
    parser.add_argument("--only", default="seed0", help="of the runs whose name holds this; default: seed0")
    args = parser.parse_args()
    from forgetless.cli import quiet_libraries
    from forgetless.config import load_config

    quiet_libraries()
    from forgetless.estimate import estimate

    gb = 1e9
    print(f"{'run':<36}{'estimated GB':>14}{'measured GB':>14}{'ratio':>8}")
    for path in args.files:
        for name, run in json.loads(path.read_text())["runs"].items():
            if args.only in name and "peers" not in run["config"]["method"]["name"]:
                found = estimate(load_config(run["config"] | {"output_dir": "runs/estimate"}))["peak_bytes"]
                measured = max(task["peak_bytes"] for task in run["protection"])
                print(f"{name:<36}{found / gb:>14.2f}{measured / gb:>14.2f}{found / measured:>8.2f}")


if __name__ == "__main__":
    main()

"""`forgetless estimate` held to the peaks that finished runs had: every run of the result files, its estimated and its measured peak memory.

    FORGETLESS_DATA=... python benchmarks/scripts/estimates.py                                # all runs of gorp_ablation_order1.json of seed 0
    FORGETLESS_DATA=... python benchmarks/scripts/estimates.py FILE.json --only options

Runs are on a CPU, where the peak is the process' largest resident set. Each estimate is the command's own, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from runs import RESULTS


def estimated(config: dict, folder: str) -> float:
    path = Path(folder) / "run.yaml"
    path.write_text(json.dumps(config | {"output_dir": "runs/estimate"}))  # JSON is YAML
    said = subprocess.run([sys.executable, "-m", "forgetless", "estimate", str(path), "--json"], capture_output=True, text=True, check=True).stdout
    return json.loads(said)["peak_bytes"] / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=[RESULTS / "gorp_ablation_order1.json"])
    parser.add_argument("--only", default="seed0", help="of the runs whose name holds this; default: seed0")
    args = parser.parse_args()
    print(f"{'run':<36}{'estimated GB':>14}{'measured GB':>14}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for path in args.files:
            for name, run in json.loads(path.read_text())["runs"].items():
                if args.only in name and "peers" not in run["config"]["method"]["name"]:
                    found, measured = estimated(run["config"], folder), max(task["peak_bytes"] for task in run["protection"]) / 1e9
                    print(f"{name:<36}{found:>14.2f}{measured:>14.2f}{found / measured:>8.2f}", flush=True)


if __name__ == "__main__":
    main()

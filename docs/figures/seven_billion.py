"""The table of docs/faq.md: what forgetless estimate says of a model of Llama-2-7B's shape, by method. Built from its configuration alone; nothing is fetched.

    python docs/figures/seven_billion.py          # prints the table, -> benchmarks/results/seven_billion.json; a minute or two

For a model of the hub the same comes from: forgetless estimate examples/llama-2-7b-chat/order1.yaml --gpu h100 --tokens 512
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = ROOT / "benchmarks" / "results" / "seven_billion.json"
GPU, TOKENS, ROWS = "h100", 512, 8
METHODS = {  # what stands in the table: (method, other keys of the config)
    "`seqft`": ({"name": "seqft"}, {}),
    "`gorp`": ({"name": "gorp"}, {}),
    "`gorp`, `rank: 8`": ({"name": "gorp", "rank": 8}, {}),
    "`osft`, half closed": ({"name": "osft", "protect": "weights"}, {}),
    "`osft`, `form: adapter`, `quantize: 4bit`": ({"name": "osft", "form": "adapter", "frozen_ratio": 0.75}, {"quantize": "4bit"}),
    "`lora`": ({"name": "lora"}, {}),
    "`lora`, `quantize: 4bit`": ({"name": "lora"}, {"quantize": "4bit"}),
}


def plan() -> dict[str, dict[str, float]]:
    """{row: {peak, state, all, last}} in bytes: memory at the most, of it the optimizer's state, disk of three tasks with keep: all and last 1."""
    from transformers import LlamaConfig

    from forgetless.config import load_config
    from forgetless.estimate import estimate

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(architectures=["LlamaForCausalLM"], dtype="bfloat16").save_pretrained(folder)  # transformers' own defaults are Llama-2-7B's
        for name, (method, more) in METHODS.items():
            config = {
                "model": folder, "dtype": "bfloat16", "precision": "stochastic_rounding", "method": method, "output_dir": f"{folder}/run",
                "tasks": [{"name": name, "suite": f"synthetic/{name}"} for name in ("first", "second", "third")],
                "train": {"max_steps": 100, "per_device_train_batch_size": ROWS, "gradient_checkpointing": True},
            } | more  # fmt: skip
            made = estimate(load_config(config), GPU, tokens=TOKENS)
            models = made["disk"]["models"]
            found[name] = {
                "peak": made["peak_bytes"], "state": made["peak"]["optimizer_state"],
                "all": made["disk_bytes"], "last": made["disk_bytes"] - models + models // made["models_kept"],
            }  # fmt: skip
    return found


def markdown(found: dict[str, dict[str, float]]) -> str:
    lines = ["| method | peak memory | of it optimizer state | disk of three tasks, `keep: last 1` | `keep: all` |", "|---|---|---|---|---|"]
    for name, bytes_of in found.items():
        lines.append(f"| {name} | " + " | ".join(f"{bytes_of[key] / 1e9:.1f} GB" for key in ("peak", "state", "last", "all")) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    found = plan()
    NUMBERS.write_text(
        json.dumps({"command": "python docs/figures/seven_billion.py", "gpu": GPU, "tokens": TOKENS, "rows": ROWS, "methods": found}, indent=1) + "\n"
    )
    print(markdown(found))

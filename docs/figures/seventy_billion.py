"""The tables of docs/scaling.md: what forgetless estimate says of a model of Llama-3.1-70B's shape that 64 processes share. Built from its configuration alone; nothing is fetched.

    python docs/figures/seventy_billion.py          # prints the tables, -> benchmarks/results/seventy_billion.json; a quarter of a minute

For the model of the hub the same comes from: forgetless estimate CONFIG model=meta-llama/Llama-3.1-70B dtype=bfloat16 sharding=fsdp2 --world 64 --gpu h200 --tokens 1024
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = ROOT / "benchmarks" / "results" / "seventy_billion.json"
GPU, TOKENS, PROCESSES = "h200", 1024, 64
METHODS = {
    "`seqft`": {"name": "seqft"},
    "`gorp`": {"name": "gorp", "max_rank": 256, "sketch_size": 64},
    "`gorp`, `rank: 8`": {"name": "gorp", "rank": 8, "max_rank": 256, "sketch_size": 64},
    "`osft`, half closed": {"name": "osft", "protect": "weights"},
}
PARTS = {  # of the estimate's peak, as the table names them
    "weights": "weights, own rows", "gradients": "gradients, own rows", "optimizer_state": "moments and fp32 masters, own rows; bases, whole",
    "method_statistics": "the task's sketch, whole", "copy_for_the_weight_leak": "copy for the weight leak, own rows",
    "activations": "activations of a row, its blocks computed again", "exchange": "weights that are whole while they compute, their gradients",
}  # fmt: skip


def plan() -> dict[str, dict[str, Any]]:
    from transformers import LlamaConfig

    from forgetless.config import load_config
    from forgetless.estimate import estimate

    shape = dict(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, vocab_size=128256,
        max_position_embeddings=131072, tie_word_embeddings=False,
    )  # fmt: skip
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(architectures=["LlamaForCausalLM"], dtype="bfloat16", **shape).save_pretrained(folder)
        for name, method in METHODS.items():
            config = {
                "model": folder, "dtype": "bfloat16", "sharding": "fsdp2", "method": method, "output_dir": f"{folder}/run",
                "tasks": [{"name": name, "suite": f"synthetic/{name}"} for name in ("first", "second")],
                "train": {"max_steps": 100, "per_device_train_batch_size": 1, "gradient_checkpointing": True},
            }  # fmt: skip
            made = estimate(load_config(config), GPU, tokens=TOKENS, world=PROCESSES)
            found[name] = {key: made[key] for key in ("peak", "between_tasks_bytes", "sent", "assumed")}
    return found


def markdown(found: dict[str, dict[str, Any]]) -> str:
    heads = "| " + " | ".join(found) + " |\n" + "|---" * (len(found) + 1) + "|"

    def row(name: str, values: list[Any], form: str) -> str:
        return f"| {name} | " + " | ".join("" if value is None else format(value, form) for value in values) + " |"

    each = found.values()
    lines = [f"| held by a process, GB {heads}"]
    lines += [row(said, [one["peak"][part] / 1e9 for one in each], ".1f") for part, said in PARTS.items()]
    lines.append(row("together, with 0.6 of CUDA's own", [sum(one["peak"].values()) / 1e9 for one in each], ".1f"))
    lines.append(row("between tasks in `forgetless run`: all weights beside it", [one["between_tasks_bytes"] / 1e9 for one in each], ".1f"))
    lines += ["", f"| sent by a process {heads}"]
    steps = {"weights": "weights, twice a step, GB", "gradients": "gradients, GB a step", "statistics": "sketch, GB a step"}
    for part, said in (steps | {"coordinates": "coordinates, GB a step"}).items():
        lines.append(row(said, [one["sent"]["a_step"].get(part, 0) / 1e9 or None for one in each], ".2f"))
    lines.append(row("seconds of a step at 50 GB/s", [one["sent"]["seconds_a_step"] for one in each], ".2f"))
    chooses = [one["sent"] if one["sent"]["a_choice"] else {} for one in each]
    lines.append(row("all directions chosen anew, GB", [s["a_choice"] / 1e9 if s else None for s in chooses], ".2f"))
    lines.append(row("exchanges that takes", [s.get("exchanges_a_choice") for s in chooses], ",.0f"))
    lines.append(row("seconds at 50 GB/s and 30 µs an exchange", [s.get("seconds_a_choice") for s in chooses], ".2f"))
    lines.append(row("the gradients gathered instead, GB", [s["gradients_gathered_instead"] / 1e9 if s else None for s in chooses], ".1f"))
    return "\n".join(lines)


if __name__ == "__main__":
    found = plan()
    NUMBERS.write_text(
        json.dumps(
            {"command": "python docs/figures/seventy_billion.py", "gpu": GPU, "tokens": TOKENS, "processes": PROCESSES, "methods": found}, indent=1
        )
        + "\n"
    )
    print(markdown(found))

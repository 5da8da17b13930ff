"""A place in which the commands of the documentation run in a second: tiny models, small files under the names that the pages use, a finished run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import conftest
import pandas
import pytest
import torch
import yaml
from conftest import CHAT, TASKS, make_model_folder, write_task
from docs_reader import ROOT, Command

from forgetless.config import fix_yaml

TINY_TRAIN = {"max_steps": 2, "per_device_train_batch_size": 4, "bf16": False, "use_cpu": True, "gradient_checkpointing": False}
# task of a page -> whose words its rows have
WORDS = {"tickets": "colour", "mails": "animal", "cities": "colour", "polarity": "animal"}
LABELS = "bug question praise billing shipping legal".split()  # of the pages' tasks, which the tiny models have to know as words
# what cannot run here, by a pattern over the whole command, and why
HELD = {
    r"model=\w[\w-]+/\w|--base \w+[\w-]*/": "names a model of the hub",
    r"--gpu": "reads the configuration of a model of real size",
    r"push .*--yes": "uploads",
    r"--as gguf": "the tiny model's tokenizer has no place in GGUF (tests/test_gguf.py)",
    r"leaderboard": "hours (tests/test_leaderboard.py runs one)",
    r"export my/model": "a model of somebody's own",
}


def make_models(folder: Path) -> dict[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conftest, "WORDS", [*conftest.WORDS, *LABELS])
        return {
            "llama": make_model_folder(folder / "llama", chat_template=CHAT, dtype=torch.bfloat16),
            "t5": make_model_folder(folder / "t5", kind="t5"),
        }


def make_files(folder: Path) -> None:
    """Every data file that a page names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, words in WORDS.items():
        write_task(folder, words)
        for ending in ("", "_test"):
            rows = [json.loads(line) for line in (folder / f"{words}{ending}.jsonl").read_text().splitlines()]
            if name == "tickets":  # the pages' labels
                own = dict(zip([label for _, label in TASKS[words]], ["bug", "question", "praise"], strict=True))
                rows = [row | {"label": own[row["label"]]} for row in rows]
            if name == "mails":
                rows = [{"body": row["sentence"], "folder": row["label"]} for row in rows]
            _write(folder / f"{name}{ending}.jsonl", rows)
    chats = [
        [("user", "cat red Answer"), ("assistant", "yes good")],
        [("user", "dog green"), ("assistant", "no"), ("user", "bird"), ("assistant", "blue")],
    ]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    _write(
        folder / "chats.jsonl",
        [
            {"messages": [{"role": "user", "content": f"{a} {b}"}, {"role": "assistant", "content": b}]}
            for a in ("cat", "dog", "bird", "apple", "river", "stone")
            for b in ("red", "green", "blue", "happy", "sad")
        ],
    )
    _write(folder / "held_prompts.jsonl", rows * 6)
    _write(folder / "prompts.jsonl", [{"prompt": f"{a} {b}"} for a in ("cat",) for b in ("red", "sits")])
    _write(folder / "sums.jsonl", [{"prompt": "cat red", "completion": "yes"}])
    pandas.DataFrame(
        [{"prompt": f"{a} {b}", "completion": b} for a in ("cat", "dog", "bird", "apple") for b in ("red", "green", "blue", "happy", "sad")]
    ).to_parquet(folder / "notes.parquet")


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def shrunk(config: dict[str, Any], models: dict[str, str]) -> dict[str, Any]:
    """The same run on a tiny model, in two steps a task, its suites' tasks read from the files above."""
    config = fix_yaml(config)
    t5 = "t5" in config["model"]
    tasks = [
        {"name": task["name"], "data": f"{task['name']}.jsonl", "test": f"{task['name']}_test.jsonl"} if "suite" in task else task
        for task in config["tasks"]
    ]
    gate = {
        key: value for key, value in config.get("gate", {}).items() if key not in ("min_new_task", "on_undecided")
    }  # nothing is learned in two steps
    return config | {
        "model": models["t5" if t5 else "llama"], "tasks": tasks, "train": {**TINY_TRAIN, "learning_rate": config.get("train", {}).get("learning_rate", 1e-3)},
        "evaluate": config.get("evaluate", {}) | {"limit": 8}, "gate": gate,
    }  # fmt: skip


def save_config(path: Path, text: str, models: dict[str, str]) -> None:
    path.write_text(yaml.safe_dump(shrunk(yaml.safe_load(text), models), sort_keys=False))


def first_config() -> str:
    return (ROOT / "src" / "forgetless" / "first.yaml").read_text()


def held(command: Command) -> str | None:
    return next((reason for pattern, reason in HELD.items() if re.search(pattern, " ".join(command.words))), None)

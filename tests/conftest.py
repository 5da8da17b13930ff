"""Shared fixtures: a tiny random Llama with a word-level tokenizer, made in seconds, saved as a plain Hugging Face folder."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import peft  # noqa: F401
import pytest
import torch
import transformers.trainer  # noqa: F401

torch.set_num_threads(1)

# a run collects garbage after each task, and so does Accelerate: 0.3 s each among the objects of these imports, two thirds of a small run. Nothing of them is garbage
gc.collect()
gc.freeze()

WORDS = "red green blue cat dog bird sits runs flies apple stone river happy sad calm Text Answer : yes no maybe good bad colour animal mood N / A".split()

# closes every turn with the end token, as chat models do
CHAT = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)  # fmt: skip


def make_model_folder(path, seed: int = 0, tied: bool = False, dtype=torch.float32, kind: str = "llama", chat_template: str | None = None):
    """A 2-layer model of width 32 with its tokenizer in `path`: llama, qwen3, gpt2 (Conv1D) or t5 (encoder-decoder); with a chat template it knows the roles as words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

    vocab = {w: i for i, w in enumerate(["<unk>", "<eos>", *WORDS, *(("system", "user", "assistant") if chat_template else ())])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = chat_template
    torch.manual_seed(seed)
    common = dict(vocab_size=len(vocab), tie_word_embeddings=tied, eos_token_id=1, pad_token_id=1, bos_token_id=None)
    llama = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    sizes = {
        "llama": llama, "qwen3": llama | {"head_dim": 8}, "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64),
        "t5": dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, feed_forward_proj="gated-gelu"),
    }  # fmt: skip
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(kind, **common, **sizes[kind])).to(dtype)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    return make_model_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def chatty(tmp_path_factory) -> str:
    """The tiny model with a chat template."""
    return make_model_folder(tmp_path_factory.mktemp("chatty") / "model", chat_template=CHAT)


TASKS = {
    "colour": [("cat red", "red"), ("dog green", "green"), ("bird blue", "blue")],
    "animal": [("cat sits", "cat"), ("dog runs", "dog"), ("bird flies", "bird")],
    "mood": [("happy apple", "happy"), ("sad stone", "sad"), ("calm river", "calm")],
}


def write_task(folder, name: str, rows: int = 60) -> dict:
    """A task file pair for the tiny model and its config entry."""
    fillers = ["apple", "stone", "river", "runs", "sits", "flies", "yes", "no", "maybe", "good"]
    lines = []
    for i in range(rows):
        text, label = TASKS[name][i % 3]
        lines.append({"sentence": f"{fillers[i % 10]} {text} {fillers[(i // 3 + i) % 10]} {fillers[(i // 7) % 10]}", "label": label})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (folder / f"{name}_test.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines[:12]))
    return {
        "name": name,
        "data": str(folder / f"{name}.jsonl"),
        "test": str(folder / f"{name}_test.jsonl"),
        "labels": [label for _, label in TASKS[name]],
    }


@pytest.fixture
def small_run(tiny, tmp_path):
    """config(method, **changes): a run of three tasks of a few steps on the tiny model."""

    def make(method="gorp", tasks=("colour", "animal", "mood"), **changes) -> dict:
        return run_config(tiny, tmp_path, method, tasks) | changes

    return make


def run_config(model, folder: Path, method, tasks) -> dict:
    """A run of a few steps a task on a tiny model, with its data and its record in `folder`."""
    return {
        "model": model,
        "tasks": [write_task(folder / "data", name) for name in tasks],
        "method": method if isinstance(method, dict) else {"name": method},
        "train": {"learning_rate": 1e-3, "max_steps": 6, "per_device_train_batch_size": 4, "bf16": False, "use_cpu": True},
        "evaluate": {"limit": 8},
        "output_dir": str(folder / "run"),
    }


@pytest.fixture
def forgetless_(monkeypatch, capsys):
    """The command line, in this process: (exit status, stdout, stderr)."""

    from forgetless import cli

    def call(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["forgetless", *argv])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, *capsys.readouterr()

    return call

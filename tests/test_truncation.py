"""`forgetless doctor --truncation`: the loss is that of the model without its weakest directions, and the model comes back as it was."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_model_folder
from safetensors.torch import load_file, save_file

from forgetless import models, truncation
from forgetless.batches import Collate, answer_loss
from forgetless.config import load_config
from forgetless.lineage import model_sha256
from forgetless.models import linear_modules, logical
from forgetless.progress import Progress
from forgetless.tasks import load_stream

KINDS = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}, "gpt2": {"c_attn", "c_proj", "c_fc"},
    "t5": {"q", "k", "v", "o", "wi_0", "wi_1", "wo"},
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def config(kind, tmp_path, small_run):
    return load_config(small_run(model=make_model_folder(tmp_path / "m", kind=kind, tied=kind == "t5"), tasks=("colour", "animal")))


def loss_by_hand(config, percent: float, only: str | None = None) -> float:
    """Row by row, every dev row, the truncation by torch's SVD."""
    model, tokenizer = models.load(config.model)
    with torch.no_grad():
        for name, layer in linear_modules(model).items():
            if only is None or name.endswith("." + only):
                W = logical(layer.weight, layer)
                U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
                S[len(S) - round(len(S) * percent / 100) :] = 0
                W.copy_((U * S) @ Vh)
        total, tokens = 0.0, 0
        for task in load_stream(config):
            for example in task.dev:
                batch = Collate(model)([task.encode(tokenizer, example)])
                total, tokens = total + float(answer_loss(model, batch, 1)[0]), tokens + int((batch["labels"] != -100).sum())
    return total / tokens


def test_the_losses_are_those_of_the_truncated_model(config, kind):
    found = truncation.measure(config)
    assert found["loss"] == pytest.approx(loss_by_hand(config, 0), abs=1e-5)
    assert [entry["percent"] for entry in found["removed"]] == list(truncation.PERCENT)
    for entry in found["removed"]:
        assert entry["loss"] == pytest.approx(loss_by_hand(config, entry["percent"]), abs=1e-5)
    assert {entry["kind"] for entry in found["kinds"]} == KINDS[kind]
    for entry in found["kinds"]:
        assert entry["loss"] == pytest.approx(loss_by_hand(config, found["kinds_percent"], entry["kind"]), abs=1e-5)
    whole = next(entry for entry in found["removed"] if entry["percent"] == found["kinds_percent"])
    for key in ("layers", "directions"):
        assert sum(entry[key] for entry in found["kinds"]) == whole[key]
    shares = [entry["share"] for entry in found["removed"]]
    assert shares == sorted(shares) and 0 < shares[-1] < 0.5  # the lower half of the directions holds less than half of the norm


def test_the_model_comes_back_as_it_was_to_the_bit_also_after_an_error(config, kind):
    model, _ = models.load(config.model)
    layers = linear_modules(model)
    before, addresses = model_sha256(model), [layer.weight.data_ptr() for layer in layers.values()]
    seen = []

    def loss(advance, stop=0):
        seen.append(model_sha256(model))
        if len(seen) == stop:
            raise KeyboardInterrupt
        return 1.0

    truncation.without(model, layers, loss, 1, Progress())
    measured = len(truncation.PERCENT) + len(KINDS[kind])
    assert len(set(seen)) == len(seen) == measured and seen[0] == before  # the lowest 1 % of 32 directions is none
    for stop in range(2, measured + 1):
        seen.clear()
        with pytest.raises(KeyboardInterrupt):
            truncation.without(model, layers, partial(loss, stop=stop), 1, Progress())
        assert model_sha256(model) == before and len(seen) == stop
    assert addresses == [layer.weight.data_ptr() for layer in layers.values()]


def test_dev_rows_are_bounded_and_no_other_rows_are_used(tiny, small_run, monkeypatch):
    config = load_config(small_run(tasks=("colour", "animal")))
    monkeypatch.setattr(truncation, "ROWS", 2)
    used, real = [], truncation.Encoded
    monkeypatch.setattr(truncation, "Encoded", lambda task, tokenizer, rows: used.extend((task, row) for row in rows) or real(task, tokenizer, rows))
    found = truncation.measure(config)
    assert found["tasks"] == {"colour": 2, "animal": 2} and len(used) == 4
    assert all(row in task.dev and row not in task.test for task, row in used)


def test_weights_in_bf16_are_measured_in_fp32(tmp_path, small_run):
    """In bf16, rounding would fill again what was removed."""
    folder = make_model_folder(tmp_path / "m", dtype=torch.bfloat16)
    config = load_config(small_run(model=folder, tasks=("colour",), dtype="bfloat16"))
    assert truncation.measure(config)["removed"][-1]["loss"] == pytest.approx(loss_by_hand(config, 50), abs=1e-5)


# -- the command -----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(small_run, tmp_path, monkeypatch) -> dict:
    monkeypatch.chdir(tmp_path)
    config = small_run(tasks=("colour", "animal"))
    Path("first.yaml").write_text(yaml.safe_dump(config))
    return config


def test_the_command(here, forgetless_):
    status, out, err = forgetless_("doctor", "--truncation", "first.yaml", "--json")
    found = json.loads(out)
    assert status == 0 and found["model"] == here["model"] and math.isfinite(found["removed"][-1]["loss"]) and not Path("run").exists()
    assert "without the lowest 50 %" in err  # progress is not mixed with results
    status, out, _ = forgetless_("doctor", "--truncation", "first.yaml", "tasks.0.limit=10")
    assert status == 0 and f"loss {found['loss']:.3f}" in out and f"{found['removed'][-1]['loss']:.3f}" in out
    assert all(word in out for word in ("50 %", "down_proj", "colour", "directions"))


def test_without_a_config(forgetless_):
    status, out, err = forgetless_("doctor", "--truncation")
    assert status == 2 and out == "" and err.count("\n") == 1 and "forgetless doctor --truncation first.yaml" in err


def test_a_task_without_dev_rows(here, forgetless_):
    rows = Path(here["tasks"][1]["data"])
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:2]))
    status, out, err = forgetless_("doctor", "--truncation", "first.yaml")
    assert status == 2 and out == "" and "'animal' has none" in err and "dev file" in err


def test_a_damaged_model(here, tmp_path, forgetless_):
    folder = make_model_folder(tmp_path / "m")
    weights = load_file(Path(folder) / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    status, out, err = forgetless_("doctor", "--truncation", "first.yaml", f"model={folder}")
    assert status == 4 and out == "" and "loss is nan before anything was removed" in err

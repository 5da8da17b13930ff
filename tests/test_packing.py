"""`packing: true`: the rows of a batch in one sequence are learned as if each stood alone, or the run is refused."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from conftest import make_model_folder
from transformers import MambaConfig, MambaForCausalLM

import forgetless as fl
from forgetless import models
from forgetless.batches import IGNORED, Collate, answer_loss, check_packing
from forgetless.errors import ConfigError

trainer = importlib.import_module("forgetless.trainer")
ROWS = [  # a prompt with an answer; a conversation whose first answer is learned too; the shortest row there is; a long one
    ([5, 6, 7, 8, 9], [IGNORED, IGNORED, IGNORED, 8, 9]),
    ([9, 3, 4, 5, 6, 7], [IGNORED, 3, IGNORED, IGNORED, 6, 7]),
    ([2, 3], [IGNORED, 3]),
    ([7, 6, 5, 4, 3, 2, 8, 9, 7], [IGNORED] * 6 + [8, 9, 7]),
]


class Killed(BaseException): ...


def test_the_token_a_row_begins_with_is_foretold_by_nothing():
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4, 5], "labels": [4, 5]}]
    model = torch.nn.Linear(1, 1)
    model.config = None
    assert Collate(model, packing=True)(rows)["labels"].tolist() == [[IGNORED, 2, 3, IGNORED, 5]]


@pytest.mark.parametrize("kind, attention", [("llama", "eager"), ("llama", "sdpa"), ("qwen3", "eager"), ("gpt2", "eager"), ("gpt2", "sdpa")])
def test_a_packed_batch_has_the_loss_and_the_gradients_of_the_padded_one(kind, attention, tmp_path):
    model, _ = models.load(make_model_folder(tmp_path, kind=kind))
    model.set_attn_implementation(attention)
    model.eval()
    check_packing(model)
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in ROWS]
    gradients, losses = [], []
    for packing in (False, True):
        batch = Collate(model, packing)(rows)
        assert batch["input_ids"].shape == ((1, 22) if packing else (4, 9))
        loss, outputs = answer_loss(model, batch, 8)
        assert not packing or outputs.logits.shape[1] == 9  # the head before tokens of an answer only
        model.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for name, G in gradients[0].items():
        assert float((gradients[1][name] - G).norm()) <= 1e-5 * float(G.norm()) + 1e-8, name


def test_a_model_whose_rows_would_see_each_other_is_refused(small_run, tmp_path):
    recurrent = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1, expand=2))
    with pytest.raises(ConfigError, match="packing: MambaForCausalLM reads packed rows as one text"):
        check_packing(recurrent)
    fixed = models.load(make_model_folder(tmp_path / "fixed"))[0]
    fixed.register_buffer("mask", torch.ones(1, 1, 16, 16, dtype=torch.bool))
    with pytest.raises(ConfigError, match="packing: LlamaForCausalLM holds a mask of fixed length"):
        check_packing(fixed)
    config = small_run("seqft", tasks=("colour",), model=make_model_folder(tmp_path / "t5", kind="t5", tied=True), packing=True)
    with pytest.raises(ConfigError, match="packing: an encoder-decoder model"):
        fl.run(config)
    assert not (tmp_path / "run" / "lineage.jsonl").exists()


def test_a_packed_run_learns_what_a_padded_one_learns_and_goes_on_after_a_kill(small_run, tmp_path, monkeypatch):
    config = small_run("gorp", tasks=("colour",), packing=True, checkpoint_every=2)
    config["train"] |= {"gradient_accumulation_steps": 2}
    runs = {packing: fl.run(config | {"packing": packing, "output_dir": str(tmp_path / str(packing))}) for packing in (True, False)}
    found = [json.loads((runs[p].path / "tasks" / "00-colour" / "metrics.json").read_text()) for p in (True, False)]
    packed, padded = ([s["loss"] for s in metrics["steps"]] for metrics in found)
    assert packed == pytest.approx(padded, rel=1e-3) and len(packed) == 6
    shapes, calls, real = [], [], trainer.answer_loss

    def killed(model, batch, *more):
        calls.append(1)
        shapes.append(batch["input_ids"].shape)
        if len(calls) == 8:  # the fourth step
            raise Killed
        return real(model, batch, *more)

    with pytest.raises(Killed), monkeypatch.context() as patch:
        patch.setattr(trainer, "answer_loss", killed)
        fl.run(config)
    assert all(shape[0] == 1 for shape in shapes)
    assert (fl.run(config).path / "lineage.jsonl").read_text() == (runs[True].path / "lineage.jsonl").read_text()

"""`quantize: 4bit | 8bit`: frozen layers are small while a task trains, and whole, to the bit, when it ends."""

from __future__ import annotations

import copy
import importlib
import json

import pytest
import torch
from conftest import make_model_folder
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import forgetless as fl
from forgetless import models
from forgetless.config import load_config
from forgetless.errors import ConfigError, DataError, Diverged
from forgetless.estimate import estimate
from forgetless.methods import get
from forgetless.methods.base import Memory
from forgetless.quantised import QuantisedLinear, quantised, quantised_bytes

small_weights = importlib.import_module("forgetless.quantised")
trainer = importlib.import_module("forgetless.trainer")
ERROR = {"4bit": 0.11, "8bit": 0.02}  # ||Q(W) - W|| / ||W|| of Gaussian numbers, measured 0.092 and 0.011
BESIDE = {  # what trains beside frozen weights
    "lora": {"name": "lora"}, "inclora": {"name": "inclora"}, "gorp": {"name": "gorp", "use_full_rank": False, "use_lora": True},
    "osft": {"name": "osft", "form": "adapter"},
}  # fmt: skip


class Killed(BaseException): ...


def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(96, 64), nn.Linear(33, 7, bias=False), Conv1D(48, 80), nn.Linear(300, 257)]


@pytest.mark.parametrize("kind", ERROR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_gives_what_a_linear_layer_of_its_rounded_weight_gives(kind, dtype):
    for layer in layers():
        layer = layer.to(dtype).requires_grad_(False)
        W = models.logical(layer.weight, layer)
        small = QuantisedLinear(layer, kind)
        Q = small.whole(dtype)
        assert Q.shape == W.shape and 0 < float((Q - W).float().norm() / W.float().norm()) < ERROR[kind]
        x = torch.randn(2, 5, W.shape[1], dtype=dtype, requires_grad=True)
        y, expected = small(x), nn.functional.linear(x, Q, layer.bias)
        close = {} if dtype == torch.float32 else dict(rtol=0.02, atol=4e-3)  # torch adds the bias before it rounds
        torch.testing.assert_close(y, expected, **close)
        dY = torch.randn_like(y)
        (dx,), (wanted,) = torch.autograd.grad(y, x, dY), torch.autograd.grad(expected, x, dY)
        torch.testing.assert_close(dx, wanted, **close)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert small(x).dtype == torch.bfloat16
        held = small.codes.nbytes + sum(t.nbytes for t in scales(small.state))
        assert held == pytest.approx(quantised_bytes(W, kind), abs=4 + 1024 * (W.numel() < 10_000))  # the table of 16 or 256 values is shared


def scales(state) -> list[torch.Tensor]:
    return [state.absmax, *([state.state2.absmax] if getattr(state, "nested", False) else [])]


def attached(folder, method: dict) -> tuple[nn.Module, object]:
    model, _ = models.load(folder)
    method = get(method["name"], **{k: v for k, v in method.items() if k != "name"})
    model = method.begin_task(model, None, Memory())
    learning = {p for group in method.param_groups(model) for p in group["params"]}
    for p in model.parameters():
        p.requires_grad_(p in learning)
    return model, method


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_all_frozen_layers_are_whole_again_even_after_an_error(kind, tmp_path):
    model, _ = attached(make_model_folder(tmp_path / "model", kind=kind), BESIDE["lora"])
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    ids = torch.randint(2, 20, (2, 6))
    batch = {"input_ids": ids} | ({"decoder_input_ids": ids} if kind == "t5" else {})
    whole, expected = model(**batch).logits, len(models.linear_modules(model))
    with pytest.raises(ZeroDivisionError), quantised(model, "4bit", tmp_path / "scratch"):
        small = [m for m in model.modules() if isinstance(m, QuantisedLinear)]
        assert len(small) == expected == len(list((tmp_path / "scratch" / "whole-0").iterdir()))
        difference = ((model(**batch).logits - whole).norm() / whole.norm()).detach()
        assert 1e-4 < float(difference) < 0.5
        raise ZeroDivisionError
    assert dict(model.named_modules()) == modules and not list((tmp_path / "scratch").iterdir())
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(model(**batch).logits, whole)


@pytest.mark.parametrize("method, kind", [("lora", "8bit"), ("gorp", "4bit"), ("osft", "4bit")])
def test_a_run_trains_beside_quantised_weights_and_commits_whole_ones(method, kind, small_run, tmp_path, monkeypatch):
    config, seen, real = small_run(BESIDE[method], tasks=("colour", "animal")), [], trainer.answer_loss

    def look(model, *more):
        seen.append(sum(isinstance(m, QuantisedLinear) for m in model.modules()))
        return real(model, *more)

    monkeypatch.setattr(trainer, "answer_loss", look)
    runs = {q: fl.run(config | {"quantize": q, "output_dir": str(tmp_path / str(q))}).path for q in (None, kind)}
    assert seen == [0] * 12 + [14] * 12  # each linear layer of the two blocks
    start = models.load(config["model"])[0].state_dict()
    for task in ("00-colour", "01-animal"):
        small, plain = (load_file(run / "tasks" / task / "model" / "model.safetensors") for run in (runs[kind], runs[None]))
        metrics = [json.loads((run / "tasks" / task / "metrics.json").read_text()) for run in (runs[kind], runs[None])]
        losses = [[step["loss"] for step in m["steps"]] for m in metrics]
        assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.1)
        touched = {name for name in plain if not torch.equal(plain[name], start[name])}
        assert touched and touched == {name for name in small if not torch.equal(small[name], start[name])}  # what did not learn is whole, to the bit
        if method.startswith("osft"):
            kept = metrics[0]["protection"]
            assert kept["weight_leak"] <= kept["weight_leak_bound"]


@pytest.mark.parametrize("method", ["lora", "gorp", "osft"])
def test_no_rounding_is_committed(method, small_run):
    config = small_run(BESIDE[method], tasks=("colour", "animal"), quantize="4bit")
    config["train"]["learning_rate"] = 1e-10  # nothing is learned, so all that could move a weight is its quantisation
    path = fl.run(config).path
    start, end = models.load(config["model"])[0].state_dict(), load_file(path / "model" / "model.safetensors")
    for name, W in end.items():
        assert float((W - start[name]).norm()) <= 1e-6 * float(start[name].norm()), name


@pytest.mark.parametrize("method", ["lora", "gorp", "osft"])
def test_a_killed_task_goes_on_to_the_same_commit(method, small_run, tmp_path, monkeypatch):
    config = small_run(BESIDE[method], tasks=("colour", "animal"), quantize="4bit", checkpoint_every=2)
    whole = fl.run(config | {"output_dir": str(tmp_path / "whole")})
    calls, real = [], trainer.answer_loss

    def killed(*given):
        calls.append(1)
        if len(calls) == 11:  # in the second task, which may find something in the weights that the first has put there
            raise Killed
        return real(*given)

    with pytest.raises(Killed), monkeypatch.context() as patch:
        patch.setattr(trainer, "answer_loss", killed)
        fl.run(config)
    checkpoint = next((tmp_path / "run" / "tasks" / ".01-animal.training").glob("checkpoint-*"))
    left = tmp_path / "run" / "tasks" / ".01-animal.training" / "whole-0"
    left.mkdir()
    (left / "0.safetensors").write_bytes(b"half of a file, as SIGKILL leaves it")
    assert not [key for key in load_file(checkpoint / "model.safetensors") if key.endswith("proj.base_layer.weight")]
    assert (fl.run(config).path / "lineage.jsonl").read_text() == (whole.path / "lineage.jsonl").read_text()


def test_a_loss_that_is_no_number_leaves_nothing_behind(small_run, tmp_path, monkeypatch):
    real = trainer.answer_loss
    monkeypatch.setattr(trainer, "answer_loss", lambda *given: (real(*given)[0] * float("nan"), None))
    with pytest.raises(Diverged):
        fl.run(small_run({"name": "lora"}, tasks=("colour",), quantize="4bit"))
    assert not list((tmp_path / "run").rglob("whole*"))


def test_bad_input_ends_in_one_message(small_run, monkeypatch):
    for method in ("seqft", {"name": "osft"}, {"name": "gorp"}):
        with pytest.raises(ConfigError, match="quantize: every linear layer learns"):
            fl.run(small_run(method, quantize="4bit"))
    with pytest.raises(ConfigError, match="quantize: .*'4bit' or '8bit'"):
        fl.run(small_run("lora", quantize="3bit"))
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.functional", raising=False)
    with pytest.raises(ConfigError, match=r"quantize: bitsandbytes cannot be imported.*forgetless\[quantize\]"):
        fl.run(small_run("lora", quantize="4bit"))


def test_a_model_that_is_stored_quantised_is_refused(small_run, tmp_path):
    folder = make_model_folder(tmp_path / "stored")
    config = json.loads((tmp_path / "stored" / "config.json").read_text())
    (tmp_path / "stored" / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    )
    for what in (fl.run, lambda c: estimate(load_config(c))):
        with pytest.raises(DataError, match="stored quantised .bitsandbytes.*give the whole model"):
            what(small_run("lora", model=folder))


def test_a_disk_that_is_full_leaves_the_model_whole(tmp_path, monkeypatch):
    model, _ = attached(make_model_folder(tmp_path / "model"), BESIDE["lora"])
    before, modules, real, saved = copy.deepcopy(model.state_dict()), dict(model.named_modules()), small_weights.save_file, []

    def full(tensors, file):
        saved.append(file)
        if len(saved) == 6:
            raise OSError(28, "No space left on device")
        real(tensors, file)

    monkeypatch.setattr(small_weights, "save_file", full)
    with pytest.raises(OSError, match="No space left"), quantised(model, "4bit", tmp_path / "scratch"):
        raise AssertionError("nothing may be trained")
    assert dict(model.named_modules()) == modules and all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_a_weight_that_does_not_come_back_keeps_no_other_away(tmp_path):
    model, _ = attached(make_model_folder(tmp_path / "model"), BESIDE["lora"])
    modules = dict(model.named_modules())
    with pytest.raises(OSError, match="1 of 14 whole weights cannot be read back from .*whole-0"), quantised(model, "4bit", tmp_path / "scratch"):
        (tmp_path / "scratch" / "whole-0" / "3.safetensors").write_bytes(b"")
    assert sum(module is not modules[name] for name, module in model.named_modules()) == 1


def test_what_cannot_work_is_refused_before_anything_is_scored(small_run, forgetless_, tmp_path):
    with pytest.raises(ConfigError, match="quantize: every linear layer learns"):
        fl.run(small_run("gorp", quantize="4bit", evaluate={"limit": 8, "unseen": True}))
    assert not (tmp_path / "run" / "before.json").exists()
    (tmp_path / "c.yaml").write_text(json.dumps(small_run("gorp", quantize="4bit")))
    assert forgetless_("doctor", str(tmp_path / "c.yaml"))[0] == 2
    (tmp_path / "c.yaml").write_text(json.dumps(small_run("lora", quantize="4bit")))
    status, out, _ = forgetless_("doctor", str(tmp_path / "c.yaml"), "--json")
    sizes = json.loads(out)["bytes"]
    assert status == 0 and sizes["weights_while_a_task_trains"] < 0.5 * sizes["weights"]


def test_a_task_trained_without_a_run_has_its_weights_back_when_it_says_so(small_run, tmp_path):
    from forgetless.progress import Progress
    from forgetless.tasks import load_stream

    config = small_run("lora", tasks=("colour",))
    model, tokenizer = models.load(config["model"])
    method, before = get("lora"), copy.deepcopy(model.state_dict())
    model, task = method.begin_task(model, None, Memory()), load_stream(load_config(config)).tasks[0]
    trained = trainer.train_task(model, tokenizer, task, method, task.train, config["train"], 0, Progress(), quantize="4bit")
    assert any(isinstance(m, QuantisedLinear) for m in model.modules())
    trained.whole.close()
    assert all(p.requires_grad for p in model.parameters())
    after = {key.replace(".base_layer", ""): t for key, t in model.state_dict().items() if "lora" not in key}
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def test_some_layers_may_learn_whole_beside_quantised_ones(small_run):
    result = fl.run(small_run({"name": "gorp", "full_modules": r".*\.gate_proj"}, tasks=("colour",), quantize="8bit"))
    start, end = models.load(small_run()["model"])[0].state_dict(), load_file(result.path / "model" / "model.safetensors")
    assert {name for name in end if not torch.equal(start[name], end[name])} == {name for name in end if "gate_proj" in name}


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_the_estimate_counts_small_weights_while_training_and_whole_ones_between(kind, small_run):
    config = small_run({"name": "lora"}, train=small_run()["train"] | {"bf16": True})
    small, whole = estimate(load_config(config | {"quantize": kind})), estimate(load_config(config))
    linear = list(models.linear_modules(models.load(config["model"])[0]).values())
    saved = sum(layer.weight.nbytes - quantised_bytes(layer.weight, kind) for layer in linear)
    assert whole["peak"]["weights"] - small["peak"]["weights"] == saved
    assert small["peak"]["activations"] < whole["peak"]["activations"]  # autocast keeps a bf16 copy of each whole weight
    assert small["between_tasks_bytes"] >= whole["peak"]["weights"] + small["peak"]["adapters"] > 0
    assert small["disk"]["whole_weights"] == sum(layer.weight.nbytes for layer in linear)
    with pytest.raises(ConfigError, match="quantize: every linear layer learns"):
        estimate(load_config(small_run("seqft", quantize=kind)))

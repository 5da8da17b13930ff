"""forgetless estimate: what can be known is the same as on the loaded model; what autograd keeps is counted as on real tensors; nothing is loaded or moved."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import make_model_folder
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig

import forgetless as fl
from forgetless import doctor, models
from forgetless.batches import IGNORED, Collate, answer_loss, forward
from forgetless.config import load_config
from forgetless.errors import ConfigError
from forgetless.estimate import duration, estimate
from forgetless.lineage import RunFolder
from forgetless.methods import get

METHODS = {
    "seqft": {"name": "seqft"}, "lora": {"name": "lora", "lora_rank": 2}, "gorp": {"name": "gorp"}, "gorp-all": {"name": "gorp", "use_lora": True, "rank": 4},
    "gorp-paper": {"name": "gorp", "preset": "paper"}, "gorp-free": {"name": "gorp", "use_shared_space": False},
    "osft": {"name": "osft", "protect": "weights"}, "osft-adapter": {"name": "osft", "form": "adapter"},
    "osft-thin": {"name": "osft", "form": "adapter", "thin": True}, "osft-both": {"name": "osft", "protect": "both"},
}  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "gpt2", "t5"])
def folder(request, tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("models") / request.param, kind=request.param)


@pytest.mark.parametrize("name", METHODS)
def test_the_bytes_of_a_first_task_are_those_of_the_loaded_model(name, folder, small_run):
    config = load_config(small_run(METHODS[name], model=folder) | {"train": small_run()["train"] | {"weight_decay": 0.1}})
    found, known = estimate(config, closed=0.0), doctor.examine_config(config)
    peak, sizes = found["peak"], known["bytes"]
    assert found["parameters"] == known["model"]["parameters"] and found["trained_parameters"] == known["method"]["trained_parameters"]
    assert peak["weights"] == sum(p.nbytes for p in models.load(folder)[0].parameters())
    assert peak["optimizer_state"] + peak["method_bases"] == sizes["optimizer_state"]
    assert peak["method_statistics"] == sizes["method_statistics_at_most"] and peak["copy_for_the_weight_leak"] == sizes["copy_for_the_weight_leak"]
    if name in ("osft", "osft-both", "gorp-all"):  # gradients that are let go are as large as what is read of them
        assert peak["gradients"] < sizes["gradients"]
    else:
        assert peak["gradients"] == sizes["gradients"]
    assert found["peak_bytes"] == sum(peak.values())
    assert name != "gorp-free" or not peak["copy_for_the_weight_leak"]  # nothing is protected, so nothing is copied to measure it


def test_spaces_of_earlier_tasks_count(small_run, folder):
    config = load_config(small_run("gorp", model=folder))
    empty, half = (estimate(config, closed=share) for share in (0.0, 0.5))
    layers = models.linear_modules(models.load(folder)[0])
    inputs = [models.logical(m.weight, m).shape[1] for m in layers.values()]
    spaces = sum(4 * n * (n // 2) for n in inputs)
    assert half["peak"]["optimizer_state"] - empty["peak"]["optimizer_state"] == spaces
    assert half["disk"]["spaces"] == spaces * (1 + 2 + 3) // 3  # of three tasks' states, which grow evenly up to it
    assert set(get("gorp").spaced(models.load(folder)[0])) == set(layers)


@pytest.mark.parametrize("name", ["seqft", "lora", "olora", "routed"])
def test_the_disk_is_that_of_a_run(name, small_run):
    config = small_run(name) | {"keep": "last 2"}
    result = fl.run(config)
    folder = RunFolder(result.path, lock=False)
    done = folder.committed()
    memories = [sum(t.nbytes for t in folder.memory(commit).tensors.values()) for commit in done]
    inputs = [sum(t.nbytes for t in folder.recorded(commit).values()) for commit in done]
    files = {file.stat().st_ino: file for file in (result.path / "tasks").glob("*/model/model.safetensors")}  # a shared one once
    weights = [sum(t.nbytes for t in load_file(file).values()) for file in files.values()]
    disk = estimate(load_config(config))["disk"]
    assert len(weights) == (1 if name == "routed" else 2)
    assert disk == {
        "models": sum(weights),
        "whole_weights": 0,
        "spaces": 0,
        "memory": sum(memories),
        "inputs": sum(inputs),
        "checkpoint": 0,
    }
    assert (disk["memory"] > 0) == (name != "seqft") and (memories[2] > memories[1]) == (name in ("olora", "routed"))
    assert estimate(load_config(config | {"store": "nothing"}))["disk"]["inputs"] == 0


@pytest.mark.parametrize("keep, models", [("all", 3), ("last 2", 2), ("last 9", 3), ("tagged", 1)])
def test_models_are_counted_as_keep_keeps_them_and_memory_stays_of_every_task(keep, models, small_run):
    every, found = (estimate(load_config(small_run("lora") | {"keep": k})) for k in ("all", keep))
    assert found["models_kept"] == models and found["disk"]["models"] * 3 == every["disk"]["models"] * models
    assert {k: v for k, v in found["disk"].items() if k != "models"} == {k: v for k, v in every["disk"].items() if k != "models"}


@pytest.mark.parametrize("bf16, packing", [(False, False), (True, False), (False, True)])
def test_what_autograd_keeps_is_counted_as_on_real_tensors(bf16, packing, small_run, folder):
    config = load_config(small_run("seqft", model=folder) | {"train": small_run()["train"] | {"bf16": bf16}, "packing": packing})
    model = models.load(folder)[0].train()
    if packing and model.config.is_encoder_decoder:
        with pytest.raises(ConfigError, match="packing: an encoder-decoder"):
            estimate(config, tokens=12)
        return
    found = estimate(config, tokens=12)
    model.set_attn_implementation("eager")
    own, kept = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}, {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    answer, size = found["assumed"]["answer"], 4
    split = model.config.is_encoder_decoder
    batch = {"input_ids": torch.zeros(size, 12 - answer if split else 12, dtype=torch.long)}
    batch |= {"decoder_input_ids": torch.zeros(size, answer, dtype=torch.long)} if split else {}
    rows = [{"input_ids": [0] * 12, "labels": [IGNORED] * (12 - answer) + [0] * answer}] * size
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        if packing:
            answer_loss(model, Collate(model, packing)(rows))
        else:
            logits = forward(model, batch, logits_to_keep=0 if split else answer + 1).logits[:, -answer:].float()
            nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), torch.zeros(size * answer, dtype=torch.long))
    real = sum(t.untyped_storage().nbytes() for t in kept.values())
    assert found["peak"]["activations"] == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("blocks", ["alike", "layer_types differ", "the first is another"])
def test_a_deep_model_is_as_if_all_of_it_were_run(blocks, small_run, tmp_path, monkeypatch):
    from forgetless import estimate as module

    ran, plan = [], module.plan_blocks

    def spy(*args, **kwargs):
        if kwargs.get("run", True):
            ran.append(args[6].num_hidden_layers)
        return plan(*args, **kwargs)

    monkeypatch.setattr(module, "plan_blocks", spy)
    kind = {"alike": "llama", "layer_types differ": "qwen3", "the first is another": "llama"}[blocks]
    config = load_config(small_run("gorp", model=make_model_folder(tmp_path / "m", kind=kind)))
    path = tmp_path / "m" / "config.json"
    known = json.loads(path.read_text()) | {"num_hidden_layers": 5}
    if blocks == "layer_types differ":
        known |= {
            "layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention", "full_attention"],
            "use_sliding_window": True,
            "sliding_window": 8,
        }
    path.write_text(json.dumps(known))
    if blocks == "the first is another":  # as where the first blocks are dense and the rest experts
        make = models.without_data

        def uneven(config, *rest):
            model = make(config, *rest)
            model.model.layers[0].mlp.up_proj.register_parameter("extra", nn.Parameter(torch.zeros(3)))
            if config.num_hidden_layers == 5:
                model.model.layers[3].mlp.up_proj.register_parameter("extra", nn.Parameter(torch.zeros(3)))
            return model

        monkeypatch.setattr(models, "without_data", uneven)
    found = estimate(config)
    assert ran == ([1, 2] if blocks == "alike" else [1, 2, 5] if blocks == "the first is another" else [5])
    args = module.training_arguments(config.train, 0, "x")
    rows = module.Rows("", None, 0.0, found["assumed"]["tokens"], found["assumed"]["answer"], 0)
    whole, _ = plan(config, get("gorp"), args, rows, module.CLOSED, False, models.configuration("m", str(tmp_path / "m")))
    assert found["peak"]["activations"] == whole.activations and found["peak"]["weights"] == whole.weights
    assert found["peak"]["optimizer_state"] == whole.optimizer_state and found["trained_parameters"] == whole.trained


def test_the_longest_answer_counts_whichever_task_has_it(small_run, tmp_path):
    def peak(*tasks):
        rows = {"long": [("word " * 40, "a")], "answer": [("word", "b " * 40)], "turns": None}
        entries = []
        for name in tasks:
            path = tmp_path / f"{name}.jsonl"
            path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows[name] * 4))
            entries.append({"name": name, "data": str(path), "test": str(path), "format": "prompt_completion"})
        return estimate(load_config(small_run("seqft") | {"tasks": entries}))

    together, alone = peak("long", "answer"), [peak("long"), peak("answer")]
    assert together["assumed"]["answer"] == max(a["assumed"]["answer"] for a in alone)
    assert together["peak"]["activations"] >= max(a["peak"]["activations"] for a in alone)


def test_checkpointing_counts_the_block_that_is_computed_again(small_run, tmp_path):
    folder = make_model_folder(tmp_path / "m", kind="llama")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 6}))
    configs = [
        load_config(small_run("seqft", model=folder) | {"train": small_run()["train"] | {"gradient_checkpointing": on}}) for on in (False, True)
    ]
    plain, again = (estimate(config)["peak"]["activations"] for config in configs)
    assert plain / 6 < again < 0.6 * plain


def test_a_gpu_computes_in_the_dtype_of_training(small_run):
    fast, slow = (
        estimate(load_config(small_run("seqft") | {"train": small_run()["train"] | {"bf16": bf16}}), "h100")["assumed"]["operations_a_second"]
        for bf16 in (True, False)
    )
    assert fast > 10 * slow


def test_a_method_that_has_to_look_at_numbers_is_said_to_be_unplannable(small_run, monkeypatch):
    monkeypatch.setattr(
        get("gorp").__class__, "begin_task", lambda self, model, task, memory: float(next(model.parameters()).detach().sum()) and model
    )
    with pytest.raises(ConfigError, match="cannot be planned without its weights"):
        estimate(load_config(small_run("gorp")))


def test_a_model_that_fits_nowhere_is_planned_in_no_memory(small_run, tmp_path, forgetless_):
    shape = dict(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, intermediate_size=28672, vocab_size=128256)
    LlamaConfig(**shape, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "big")
    config = tmp_path / "c.yaml"
    missing = {"name": "t", "data": "nowhere.jsonl", "labels": ["a", "b"]}  # --tokens: the data is not read
    config.write_text(json.dumps(small_run("gorp") | {"model": str(tmp_path / "big"), "dtype": "bfloat16", "tasks": [missing], "keep": "last 1"}))
    status, out, err = forgetless_("estimate", str(config), "--gpu", "h200", "--tokens", "256", "--json")
    found = json.loads(out)
    assert status == 0 and found["parameters"] == 70_553_706_496 and not found["fits"] and found["seconds"]["t"] > 0
    assert found["disk"]["models"] == 2 * 70_553_706_496
    status, out, _ = forgetless_("estimate", str(config), "--gpu", "h200", "--tokens", "256")
    assert status == 0 and "does not fit a h200" in out and "peak" in out and "1 versions kept" in out
    _, out, _ = forgetless_("estimate", str(config), "method={name: lora}", "checkpoint_every=5", "--gpu", "b200", "--tokens", "64", "--json")
    small = json.loads(out)
    assert small["fits"] and small["disk"]["checkpoint"] > small["peak"]["weights"]


def test_bad_input_and_no_trace_left(small_run, forgetless_, tmp_path):
    apply = nn.Module._apply
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps(small_run("lora")))
    status, _, err = forgetless_("estimate", str(config), "--gpu", "h20")
    assert status == 2 and "--gpu h20" in err and "h200" in err
    status, _, err = forgetless_("estimate", str(config), "--closed", "1.5")
    assert status == 2 and "--closed 1.5" in err
    status, _, err = forgetless_("estimate", str(config), "method={name: lora, lora_modules: nothing}")
    assert status == 2 and "matches no linear layer" in err
    assert nn.Module._apply is apply
    with pytest.raises(ConfigError):
        estimate(load_config(small_run("gorp")), gpu="abacus")
    assert not (tmp_path / "run").exists() and duration(7200) == "2.0 h"


# -- several processes -----------------------------------------------------------------------------------------------------------------


def test_of_processes_that_each_hold_the_model_one_holds_what_it_would_alone(small_run, folder):
    train = {key: value for key, value in small_run()["train"].items() if key != "max_steps"}
    config = load_config(small_run("seqft", model=folder) | {"train": train | {"num_train_epochs": 2, "per_device_train_batch_size": 1}})
    one, four = estimate(config, closed=0.0), estimate(config, closed=0.0, world=4)
    assert four["peak"] == one["peak"] | {"exchange": 0, "process": four["peak"]["process"]}
    assert four["sent"]["a_step"] == {"gradients": 2 * 0.75 * one["peak"]["gradients"], "coordinates": 0} and not four["sent"]["a_choice"]
    assert "sent" not in one and all(2 * math.ceil(n // 2 / 4) == four["steps"][name] for name, n in one["steps"].items())


@pytest.mark.parametrize("name", ["seqft", "gorp", "gorp-paper", "osft", "osft-adapter", "lora", "gpm", "olora"])
def test_of_processes_that_share_the_model_one_has_its_rows(name, folder, small_run):
    method = METHODS.get(name, {"name": name})
    config = load_config(small_run(method, model=folder) | {"train": small_run()["train"] | {"weight_decay": 0.1}})
    shared = load_config(small_run(method, model=folder) | {"train": small_run()["train"] | {"weight_decay": 0.1}, "sharding": "fsdp2"})
    one, three = estimate(config, closed=0.0), estimate(shared, closed=0.0, world=3)
    parameters = list(models.load(folder)[0].parameters())
    assert three["peak"]["weights"] == sum(-(-p.shape[0] // 3) * p[0].numel() * p.element_size() for p in parameters)
    assert three["peak"]["gradients"] < 0.5 * sum(p.nbytes for p in parameters) and three["peak"]["optimizer_state"] < one["peak"]["optimizer_state"]
    assert three["between_tasks_bytes"] > one["peak"]["weights"] + three["peak"]["optimizer_state"]  # whole again, beside what trained them
    assert three["peak_bytes"] == max(sum(three["peak"].values()), three["between_tasks_bytes"])
    total = sum(p.nbytes for p in parameters)
    weights = three["sent"]["a_step"]["weights"]
    assert weights == pytest.approx(2 * 2 / 3 * total) if name in ("seqft", "gorp", "osft", "gpm") else weights > 2 * 2 / 3 * total  # adapters too
    assert (three["sent"]["a_choice"] > 0) == (name == "gorp-paper")
    assert (three["sent"]["a_step"]["statistics"] > 0) == (name in ("gorp", "olora"))  # a first moment is spread, and needs nothing sent
    alone = estimate(shared, closed=0.0)  # one process trains as without the key
    assert alone["peak"] | {"process": 0} == one["peak"] | {"process": 0}


@pytest.mark.parametrize("space_from, side", [("sketch", "inputs"), ("sketch", "outputs"), ("first_moment", "inputs")])
def test_statistics_of_processes_that_share_the_model(space_from, side, small_run, folder):
    method = {"name": "gorp", "space_from": space_from, "side": side, "rank": 2}
    one, two = (estimate(load_config(small_run(method, model=folder) | {"sharding": "fsdp2"}), closed=0.0, world=w) for w in (1, 2))
    ratio = two["peak"]["method_statistics"] / one["peak"]["method_statistics"]
    assert (
        ratio == pytest.approx(0.5, abs=0.01) if space_from == "first_moment" else 0.5 < ratio <= 1
    )  # a sketch is whole; probes of let-go gradients wait in one process only


def test_max_rank_bounds_what_is_assumed_closed(small_run, folder):
    free, bound = (estimate(load_config(small_run({"name": "gorp", "max_rank": most}, model=folder)), closed=0.5) for most in (None, 2))
    assert 0 < bound["disk"]["spaces"] < free["disk"]["spaces"] and bound["peak"]["optimizer_state"] < free["peak"]["optimizer_state"]


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({"method": {"name": "ogd"}, "sharding": "fsdp2"}, {"world": 2}, "method ogd reads whole weights or gradients"),
        ({"method": {"name": "gorp", "rank": 2, "release_gradients": True}}, {"world": 2}, "release_gradients works in one process"),
        ({}, {"world": 2, "link": 0.0}, "--link 0: at least one process, and a rate above 0"),
        ({}, {"world": 0}, "--world 0"),
    ],
)
def test_what_several_processes_cannot_do_is_said(changes, options, said, small_run, folder):
    with pytest.raises(ConfigError, match=said):
        estimate(load_config(small_run("gorp", model=folder) | changes), **options)


def test_every_weight_s_choice_is_counted(small_run, tmp_path):
    config = load_config(small_run({"name": "gorp", "rank": 2}, model=make_model_folder(tmp_path / "m", kind="llama")) | {"sharding": "fsdp2"})
    path, sent = tmp_path / "m" / "config.json", {}
    for layers in (2, 6):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": layers}))
        sent[layers] = estimate(config, tokens=12, world=2)["sent"]
    assert all(sent[6][key] == pytest.approx(3 * sent[2][key]) for key in ("a_choice", "exchanges_a_choice", "gradients_gathered_instead"))


def test_a_slower_link_takes_longer_and_the_command_says_what_is_sent(small_run, folder, tmp_path, capsys):
    from typer.testing import CliRunner

    from forgetless.cli import app

    config = small_run({"name": "gorp", "rank": 2}, model=folder) | {"sharding": "fsdp2"}
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(config))
    fast, slow = (estimate(load_config(config), world=2, link=rate)["sent"] for rate in (10e9, 5e9))
    assert slow["seconds_a_step"] == pytest.approx(2 * fast["seconds_a_step"]) and slow["seconds_a_choice"] > fast["seconds_a_choice"]
    said = CliRunner().invoke(app, ["estimate", str(path), "--world", "2", "--link", "5"]).output
    assert "by each of 2 processes in a step: weights" in said and "at 5 GB/s" in said and "to choose directions" in said
    assert "sent" not in CliRunner().invoke(app, ["estimate", str(path)]).output
    alone = CliRunner().invoke(app, ["estimate", str(path), "--link", "5"])
    assert alone.exit_code != 0 and "give --world too" in str(alone.exception)

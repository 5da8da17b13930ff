"""`forgetless export`: other software loads what it writes, it is what was committed, and bad input leaves nothing behind. The first part is --as lora."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import make_model_folder, run_config
from peft import PeftModel, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import forgetless as fl
from forgetless import models
from forgetless.batches import Collate, forward
from forgetless.delta import _adapter_config
from forgetless.errors import ConfigError, DataError
from forgetless.export import export
from forgetless.lineage import RunFolder, folder_of
from forgetless.models import linear_modules, logical
from forgetless.prompts import prompted
from forgetless.report.card import model_card
from forgetless.state import model_sha256

KINDS = ["llama", "gpt2", "t5"]


def change(base: str, out: Path, rank: int | None, layers=lambda name: True, dtype: torch.dtype | None = None) -> str:
    """A model folder: `base` with a change of `rank` (None: full) in its linear layers, of ranks 1 to `rank` in turn."""
    model, tokenizer = models.load(base)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for i, (name, layer) in enumerate(linear_modules(model).items()):
            if layers(name):
                W = logical(layer.weight, layer)
                m, n = W.shape
                r = min(m, n) if rank is None else 1 + i % rank
                W.add_(0.3 * torch.randn(m, r, generator=g) @ torch.randn(r, n, generator=g) / n**0.5)
    model.to(dtype).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return str(out)


def answers(model: torch.nn.Module, tokenizer) -> torch.Tensor:
    rows = []
    for prompt, answer in (("cat red : dog", " green bird"), ("happy apple :", " sad river stone")):
        ids, said = tokenizer(prompt).input_ids, tokenizer(answer).input_ids
        rows.append({"input_ids": ids + said, "labels": [-100] * len(ids) + said})
    with torch.no_grad():
        return forward(model, Collate(model)(rows)).logits


def export_lora(trained: str | Path, base: str, out: Path, **options) -> dict:
    return export(trained, out, "lora", base=base, **options)


def with_adapter(base: str, adapter: Path) -> tuple[torch.nn.Module, object]:
    model, tokenizer = models.load(base)
    return PeftModel.from_pretrained(model, str(adapter)).eval(), tokenizer


@pytest.fixture(scope="module", params=KINDS)
def base(request, tmp_path_factory) -> str:
    return make_model_folder(tmp_path_factory.mktemp("base") / request.param, kind=request.param, tied=request.param == "t5")


def test_a_change_of_low_rank_comes_back_exactly(base, tmp_path):
    trained = change(base, tmp_path / "trained", rank=3)
    found = export_lora(trained, base, tmp_path / "adapter", energy=1 - 1e-9)
    assert found["error"] < 1e-5 and {layer["rank"] for layer in found["layers"].values()} == {1, 2, 3}
    (model, tokenizer), (before, _) = models.load(trained), models.load(base)
    peft, _ = with_adapter(base, tmp_path / "adapter")
    true, now = answers(model, tokenizer), answers(peft.base_model.model, tokenizer)
    assert (answers(before, tokenizer) - true).abs().max() > 0.01
    torch.testing.assert_close(now, true, atol=1e-5, rtol=1e-5)
    for name, layer in linear_modules(peft.merge_and_unload()).items():
        torch.testing.assert_close(layer.weight, model.get_submodule(name).weight, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, None])
def test_each_layer_keeps_the_energy_asked_for_and_no_direction_more(base, tmp_path, energy):
    trained = change(base, tmp_path / "trained", rank=None)
    found = export_lora(trained, base, tmp_path / "adapter", energy=energy)
    energy = energy or 0.99
    assert found["energy"] == energy and json.loads((tmp_path / "adapter" / "export.json").read_text()).items() <= found.items()
    (old, _), (new, _) = models.load(base), models.load(trained)
    merged = linear_modules(with_adapter(base, tmp_path / "adapter")[0].merge_and_unload())
    sizes, misses = [], []
    for name, layer in linear_modules(old).items():
        D = logical((new.get_submodule(name).weight - layer.weight).detach().double(), layer)
        missed = (merged[name].weight - new.get_submodule(name).weight).detach().double().norm()
        S, r = torch.linalg.svdvals(D), found["layers"][name]["rank"]
        assert (S[:r] ** 2).sum() >= energy * (S**2).sum() * (1 - 1e-9) and (S[: r - 1] ** 2).sum() < energy * (S**2).sum()
        assert float(missed / D.norm()) == pytest.approx(found["layers"][name]["error"], rel=1e-3, abs=1e-6)
        assert found["layers"][name]["norm"] == pytest.approx(float(D.norm()), rel=1e-5)
        sizes.append(float(D.norm()) ** 2)
        misses.append(float(missed) ** 2)
    assert found["error"] == pytest.approx(math.sqrt(sum(misses) / sum(sizes)), rel=1e-3) and found["error"] <= math.sqrt(1 - energy) + 1e-6


def test_a_rank_is_the_rank_of_every_layer_or_all_it_has(base, tmp_path):
    trained = change(base, tmp_path / "trained", rank=None)
    found = export_lora(trained, base, tmp_path / "two", rank=2)
    assert {layer["rank"] for layer in found["layers"].values()} == {2} and found["rank"] == 2 and "energy" not in found
    assert found["layer_parameters"] == sum(layer.weight.numel() for layer in linear_modules(models.load(base)[0]).values())
    assert found["parameters"] == sum(t.numel() for t in load_file(tmp_path / "two" / "adapter_model.safetensors").values())
    whole = export_lora(trained, base, tmp_path / "whole", rank=1000)
    assert whole["error"] < 1e-5 < found["error"]
    assert all(layer["rank"] == min(linear_modules(models.load(base)[0])[name].weight.shape) for name, layer in whole["layers"].items())


def test_only_the_layers_that_changed_get_an_adapter(base, tmp_path):
    chosen = list(linear_modules(models.load(base)[0]))[1::3]
    found = export_lora(change(base, tmp_path / "trained", rank=2, layers=lambda name: name in chosen), base, tmp_path / "adapter")
    assert list(found["layers"]) == chosen
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(chosen) and config["r"] == 2 == config["lora_alpha"]


def test_each_of_many_layers_gets_its_own_rank(tiny, tmp_path):
    """More layers than PEFT lists one by one, layer 1 and layer 11 among them."""
    _, tokenizer = models.load(tiny)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny, num_hidden_layers=12)).save_pretrained(tmp_path / "deep")
    tokenizer.save_pretrained(tmp_path / "deep")
    base, trained = str(tmp_path / "deep"), change(str(tmp_path / "deep"), tmp_path / "trained", rank=5)
    export_lora(trained, base, tmp_path / "adapter", energy=1 - 1e-9)
    merged, new = with_adapter(base, tmp_path / "adapter")[0].merge_and_unload(), models.load(trained)[0]
    for name, layer in linear_modules(new).items():
        torch.testing.assert_close(merged.get_submodule(name).weight, layer.weight, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("first", ["proj", "part.proj"])
def test_ranks_stay_apart_where_one_layers_name_ends_anothers(first):
    """PEFT's patterns match the ends of names: that of `proj` must not catch `part.proj`."""
    model = nn.Module()
    model.part, model.proj, model.config = nn.Module(), nn.Linear(8, 8), SimpleNamespace(is_encoder_decoder=False)
    model.part.proj = nn.Linear(8, 8)
    ranks = {first: {"rank": 2}, ({"proj", "part.proj"} - {first}).pop(): {"rank": 5}}
    inject_adapter_in_model(_adapter_config(model, "base", ranks), model)
    for name, layer in ranks.items():
        adapted = model.get_submodule(name)
        assert adapted.lora_A["default"].weight.shape[0] == layer["rank"] and adapted.scaling["default"] == 1.0


def test_a_head_of_its_own_is_a_linear_layer_too(tiny, tmp_path):
    model, tokenizer = models.load(tiny)
    with torch.no_grad():
        model.lm_head.weight[0] += 1
    model.save_pretrained(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    found = export_lora(tmp_path / "trained", tiny, tmp_path / "adapter")
    assert list(found["layers"]) == ["lm_head"] and found["layers"]["lm_head"]["rank"] == 1
    peft, _ = with_adapter(tiny, tmp_path / "adapter")
    torch.testing.assert_close(answers(peft.base_model.model, tokenizer), answers(model, tokenizer), atol=1e-5, rtol=1e-5)


def test_a_model_kept_in_another_dtype_than_its_base(tiny, tmp_path):
    trained = change(tiny, tmp_path / "trained", rank=2, dtype=torch.float64)
    found = export_lora(trained, tiny, tmp_path / "adapter")
    assert found["error"] < 1e-5 and len(found["layers"]) == 14


def test_what_a_coarser_dtype_alone_has_changed_no_training_has(tiny, tmp_path):
    """bf16 rounds embeddings, norms and layers that never learned; the adapter is of those that did."""
    trained = change(tiny, tmp_path / "trained", rank=None, layers=lambda name: "q_proj" in name, dtype=torch.bfloat16)
    found = export_lora(trained, tiny, tmp_path / "adapter", rank=64)
    assert found["layers"] and all("q_proj" in name for name in found["layers"])


# -- the command -----------------------------------------------------------------------------------------------------------------------------


def test_a_run_knows_its_base(small_run, tmp_path, forgetless_):
    config = small_run("lora", tasks=("colour", "animal"))
    fl.run(config)
    status, out, err = forgetless_("export-lora", config["output_dir"], "--out", str(tmp_path / "deep" / "adapter"))
    said = ("4 linear layers changed", "% of the layers' own", "of ||dW||", str(tmp_path / "deep" / "adapter"))
    assert status == 0 and all(words in out for words in said)
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["adapter"]
    peft, tokenizer = with_adapter(config["model"], tmp_path / "deep" / "adapter")
    true = answers(models.load(config["output_dir"] + "/model")[0], tokenizer)
    assert (answers(peft.base_model.model, tokenizer) - true).abs().max() < 0.1 * (
        answers(models.load(config["model"])[0], tokenizer) - true
    ).abs().max()
    status, out, _ = forgetless_(
        "export-lora", config["output_dir"], "--out", str(tmp_path / "a"), "--rank", "8", "--base", config["model"], "--json"
    )
    found = json.loads(out)
    assert status == 0 and found["base"] == config["model"] and found["error"] < 1e-4  # one LoRA of rank 8 through both tasks


def other_model(tmp_path: Path) -> str:
    return make_model_folder(tmp_path / "other", kind="qwen3")


def with_a_norm(tiny: str, tmp_path: Path) -> str:
    model, tokenizer = models.load(change(tiny, tmp_path / "linear", rank=1))
    with torch.no_grad():
        model.model.norm.weight += 1
    model.save_pretrained(tmp_path / "norm")
    tokenizer.save_pretrained(tmp_path / "norm")
    return str(tmp_path / "norm")


def damaged(tiny: str, tmp_path: Path) -> str:
    model, tokenizer = models.load(tiny)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    model.save_pretrained(tmp_path / "damaged")
    tokenizer.save_pretrained(tmp_path / "damaged")
    return str(tmp_path / "damaged")


@pytest.mark.parametrize(
    ("trained", "options", "status", "said"),
    [
        ("change", ["--rank", "0"], 2, "rank 0: an adapter has at least rank 1"),
        ("change", ["--energy", "0"], 2, "energy 0.0: the share of ||dW||^2 to keep, above 0 and at most 1"),
        ("change", ["--energy", "1.5"], 2, "energy 1.5"),
        ("change", ["--energy", "nan"], 2, "energy nan"),
        ("change", ["--rank", "2", "--energy", "0.9"], 2, "not both"),
        ("change", ["--base", ""], 2, "name that model with --base"),
        ("change", ["--out", "full"], 2, "full: exists already and is not empty"),
        ("change", ["--out", "file"], 2, "file: exists already and is a file"),
        ("change", ["--out", "file/deep"], 2, "file/deep: cannot be written"),
        ("same", [], 4, "the same weights; there is nothing to export"),
        ("other", [], 4, "was not trained from"),
        ("missing/folder/x", [], 4, "no such folder"),
        (
            "norm",
            [],
            4,
            "1 of the 15 tensors that training changed are no weights of linear layers, and a LoRA adapter cannot carry them: model.norm.weight",
        ),
        ("damaged", [], 4, "'model.layers.1.mlp.up_proj' changed by something that is not a number"),
        ("empty_run", [], 2, "has not learned a task yet"),
    ],
)
def test_bad_input_ends_in_one_message_and_leaves_nothing(tiny, tmp_path, monkeypatch, forgetless_, trained, options, status, said):
    made = {
        "change": lambda: change(tiny, tmp_path / "trained", rank=1), "same": lambda: tiny, "other": lambda: other_model(tmp_path),
        "norm": lambda: with_a_norm(tiny, tmp_path), "damaged": lambda: damaged(tiny, tmp_path), "empty_run": lambda: "run",
    }  # fmt: skip
    (tmp_path / "work" / "full").mkdir(parents=True)
    (tmp_path / "work" / "run").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("full/mine").write_text("mine")
    Path("file").write_text("mine")
    Path("run/run.yaml").write_text(yaml.safe_dump({"model": tiny}))
    trained = made.get(trained, lambda: trained)()
    options = ["--base", tiny, "--out", "adapter", *options]
    if "" in options:
        options = options[2:4]
    before = sorted(Path().rglob("*"))
    code, out, err = forgetless_("export-lora", trained, *options)
    message = err[err.index("error: ") :]
    assert code == status and out == "" and said in message and message.count("\n") == 1
    assert sorted(Path().rglob("*")) == before and Path("file").read_text() == Path("full/mine").read_text() == "mine"


def test_an_empty_folder_is_filled_and_a_failed_write_leaves_none(tiny, tmp_path, monkeypatch):
    import safetensors.torch

    trained = change(tiny, tmp_path / "trained", rank=1)
    (tmp_path / "adapter").mkdir()

    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", no_space)
        with pytest.raises(ConfigError, match="No space left"):
            export_lora(trained, tiny, tmp_path / "adapter")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "trained"] and not any((tmp_path / "adapter").iterdir())
    export_lora(trained, tiny, tmp_path / "adapter")
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "export.json"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "trained"]


def test_another_shape_is_another_model(tiny, tmp_path):
    _, tokenizer = models.load(tiny)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny, intermediate_size=64)).save_pretrained(tmp_path / "wider")
    tokenizer.save_pretrained(tmp_path / "wider")
    with pytest.raises(DataError, match=r"mlp.gate_proj.weight is \(48, 32\) and \(64, 32\)"):
        export_lora(tmp_path / "wider", tiny, tmp_path / "adapter")


# -- the adapter that was trained ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "slao"])
def test_a_run_that_trained_one_adapter_gives_that_adapter(small_run, tmp_path, method):
    config = small_run(method, tasks=("colour", "animal"))
    run = fl.run(config).path
    found = export(run, tmp_path / "adapter", "lora")
    own, out = (load_file(folder / "adapter_model.safetensors") for folder in (run / "tasks" / "01-animal" / "state", tmp_path / "adapter"))
    assert own.keys() == out.keys() and all(torch.equal(own[key], out[key]) for key in own)
    assert found["own"] and found["error"] < 1e-4 and "energy" not in found
    peft, tokenizer = with_adapter(config["model"], tmp_path / "adapter")
    model = models.load(str(run / "model"))[0]
    torch.testing.assert_close(answers(peft.base_model.model, tokenizer), answers(model, tokenizer), atol=1e-5, rtol=1e-5)
    assert "own" not in export(run, tmp_path / "decomposed", "lora", rank=1)


# -- the model -------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(tiny, tmp_path_factory) -> Path:
    """A run of two tasks, which nobody may change."""
    return fl.run(run_config(tiny, tmp_path_factory.mktemp("learned"), "gorp", ("colour", "animal"))).path


@pytest.fixture
def run(learned, tmp_path) -> Path:
    return Path(shutil.copytree(learned, tmp_path / "run", symlinks=True))


def line_of(run: Path, folder: str) -> dict:
    return next(line for line in RunFolder(run, lock=False).lineage() if folder_of(line) == folder)


def test_the_exported_model_is_the_one_that_was_committed(run, tmp_path):
    found = export(run, tmp_path / "deep" / "model")
    out = tmp_path / "deep" / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model_sha256(model) == line_of(run, "01-animal")["model_sha256"] == found["model_sha256"]
    assert tokenizer("cat red").input_ids == AutoTokenizer.from_pretrained(run / "model")("cat red").input_ids
    names = {p.relative_to(run / "model").as_posix() for p in (run / "model").rglob("*")}
    assert {p.name for p in out.iterdir()} == names | {"README.md"} and "generation_config.json" in names
    assert (out / "README.md").read_text() == model_card(run)
    assert found["files"] == {p.name: p.stat().st_size for p in out.iterdir()} and found["bytes"] == sum(found["files"].values())


def test_nothing_of_the_copy_hangs_on_the_run(run, tmp_path):
    export(run, tmp_path / "model")
    assert all(not p.is_symlink() and p.stat().st_nlink == 1 for p in (tmp_path / "model").rglob("*") if p.is_file())
    shutil.rmtree(run)
    models.load(str(tmp_path / "model"))


def test_the_model_as_it_was_at_an_earlier_task(run, tmp_path):
    found = export(run, tmp_path / "model", task="colour")
    assert model_sha256(models.load(str(tmp_path / "model"))[0]) == line_of(run, "00-colour")["model_sha256"] == found["model_sha256"]
    assert found["model_sha256"] != line_of(run, "01-animal")["model_sha256"]
    assert not (tmp_path / "model" / "README.md").exists()  # the card tells of the run as it stands, not as it stood


@pytest.mark.parametrize("form", ["plain", "lora"])
@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_flipped_byte_is_never_exported(run, tmp_path, forgetless_, form, file):
    damaged = run / "tasks" / "01-animal" / "model" / file
    content = bytearray(damaged.read_bytes())
    content[-20] ^= 1
    damaged.unlink()
    damaged.write_bytes(bytes(content))
    status, _, err = forgetless_("export", str(run), "--out", str(tmp_path / "out"), "--as", form)
    assert status == 4 and f"tasks/01-animal/model/{file}" in err and not (tmp_path / "out").exists()
    assert forgetless_("export", str(run), "--out", str(tmp_path / "out"), "--task", "colour")[0] == 0  # the other commit is whole


def test_what_goes_wrong_while_copying_is_found_by_loading_the_copy(run, tmp_path, monkeypatch):
    copy = shutil.copyfile

    def flip(source, target):
        copy(source, target)
        if Path(source).name == "model.safetensors":
            content = bytearray(target.read_bytes())
            content[-2] ^= 1
            target.write_bytes(bytes(content))

    monkeypatch.setattr(shutil, "copyfile", flip)
    with pytest.raises(DataError, match=r"model_sha256 differs from lineage.jsonl\); nothing was exported"):
        export(run, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_the_folder_is_there_whole_or_not_at_all(run, tmp_path, monkeypatch, forgetless_):
    """Also after a kill, which leaves what lies beside it."""
    out, copy = tmp_path / "out", shutil.copyfile

    def full(source, target):
        assert not out.exists()
        if Path(source).name == "tokenizer.json":
            raise OSError(28, "No space left on device")
        copy(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        status, _, err = forgetless_("export", str(run), "--out", str(out))
        assert status == 4 and "error: the disk is full" in err and sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "half").write_text("")
    out.mkdir()
    assert forgetless_("export", str(run), "--out", str(out))[0] == 0
    assert not (out / "half").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_whichever_file_it_is_stopped_at_the_folder_is_not_there(run, tmp_path, monkeypatch):
    copy, out = shutil.copyfile, tmp_path / "out"
    files = len(list((run / "model").rglob("*")))
    for last in range(2 * files):
        calls = []

        def stop(source, target, *, follow_symlinks=True, calls=calls, last=last):
            if len(calls) == last:
                raise KeyboardInterrupt
            calls.append(source)
            return copy(source, target)

        monkeypatch.setattr(shutil, "copyfile", stop)
        try:
            export(run, out)
        except KeyboardInterrupt:
            assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
        else:
            assert last == files and len(list(out.iterdir())) == files + 1
            break


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["nowhere"], 2, "nowhere: not the folder of a run that has learned a task; there is nothing to export"),
        (["begun"], 2, "begun: this run has not learned a task yet"),
        (["run", "--task", "color"], 2, "did you mean 'colour'?"),
        (["last", "--task", "colour"], 4, "the model of 00-colour is not there, `keep` has let it go. Kept: 01-animal"),
        (["run", "--out", "full"], 2, "full: exists already and is not empty"),
        (["run", "--out", "full/mine"], 2, "exists already and is a file"),
        (["run", "--out", "run/model2"], 2, "lies in the run's own folder"),
        (["run", "--as", "onnx"], 2, "--as onnx: one of plain, lora, routed, prompt, gguf"),
        (["run", "--rank", "2"], 2, "are of --as lora; an export as plain has none of them"),
        (["run", "--base", "x", "--as", "gguf"], 2, "are of --as lora; an export as gguf"),
        (["run", "--as", "routed"], 2, "was trained by gorp, which leaves no routed set; --as plain is the model"),
        (["run", "--as", "prompt"], 2, "was trained by gorp, which leaves no prompt set"),
        (["run", "--as", "gguf"], 2, "the tokenizer is a WordLevel model that is not plain byte-level BPE"),
        (["run", "--as", "lora", "--rank", "0"], 2, "at least rank 1"),
    ],
)
def test_bad_input_of_a_run(run, tmp_path, monkeypatch, forgetless_, arguments, status, said):
    monkeypatch.chdir(tmp_path)
    Path("begun").mkdir()
    Path("begun/run.yaml").write_text("# forgetless 0\n")
    Path("full").mkdir()
    Path("full/mine").write_text("mine")
    with RunFolder(shutil.copytree(run, "last", symlinks=True)) as folder:
        folder.let_go("last 1")
    before = sorted(Path().rglob("*"))
    code, out, err = forgetless_("export", *arguments, *([] if "--out" in arguments else ["--out", "out"]))
    message = err[err.index("error: ") :]
    assert code == status and out == "" and said in message and message.count("\n") == 1
    assert sorted(Path().rglob("*")) == before and Path("full/mine").read_text() == "mine"


# -- methods that leave more than one model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_prompts_are_prompt_tuning_that_peft_loads(small_run, tmp_path, kind):
    base = make_model_folder(tmp_path / "base", kind=kind)
    method = {"name": "prompt", "prompt_length": 3}
    run = fl.run(small_run(method, tasks=("colour", "animal"), model=base)).path
    found = export(run, tmp_path / "out")
    out, memory = tmp_path / "out", RunFolder(run, lock=False).memory("01-animal").of("prompt")
    assert found["as"] == "prompt" and sorted(p.name for p in out.iterdir()) == ["README.md", "base", "prompts"]
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    ids = torch.tensor([[5, 6, 7, 12], [8, 9, 1, 1]])
    for folder, P in (("00-colour", memory["00"]), ("01-animal", torch.cat([memory["01"], memory["00"]]))):
        plain, tokenizer = models.load(str(out / "base"))
        peft = PeftModel.from_pretrained(auto.from_pretrained(out / "base"), out / "prompts" / folder).eval()
        for rows, mask in ((ids[:1], None), (ids, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))):  # alone, and padded on the right
            mask = torch.ones_like(rows) if mask is None else mask
            batch = {"input_ids": rows, "attention_mask": mask} | ({"decoder_input_ids": rows[:, :2]} if kind == "t5" else {})
            with torch.no_grad(), prompted(plain, P) as model:
                ours = model(**batch).logits
            with torch.no_grad():
                theirs = peft(**batch).logits[:, -ours.shape[1] :]
            kept = mask.bool() if kind != "t5" else torch.ones(ours.shape[:2], dtype=torch.bool)
            torch.testing.assert_close(theirs[kept], ours[kept], atol=1e-5, rtol=1e-5)
            if len(rows) == 1 and kind != "t5":
                said = peft.generate(input_ids=rows, attention_mask=mask, max_new_tokens=4, do_sample=False)[:, rows.shape[1] :]
                for token in said[0]:  # greedily, and never from a cache
                    with torch.no_grad(), prompted(plain, P) as model:
                        logits = model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits
                    assert token == logits[0, -1].argmax()
                    rows = torch.cat([rows, token.view(1, 1)], 1)
            assert not torch.allclose(plain(**batch).logits[kept], ours[kept], atol=1e-4)


@pytest.mark.parametrize(
    ("method", "arguments", "said"),
    [
        ("prompt", ["--as", "plain"], "leaves the weights as they were, what it has learned is beside them; export it --as prompt"),
        ("routed", ["--as", "lora"], "export it --as routed"),
        ("routed", ["--task", "colour"], "leave --task out"),
        ("gainlora", [], "method gainlora cannot be exported: its branches are weighed for each row by gates that read the prompt"),
        ("gainlora", ["--as", "gguf"], "method gainlora cannot be exported"),
        ({"name": "per_task", "on": "lora"}, [], "only you know which is wanted; name one with --task: colour"),
    ],
)
def test_one_model_is_not_passed_off_as_what_several_have_learned(small_run, tmp_path, forgetless_, method, arguments, said):
    run = fl.run(small_run(method, tasks=("colour",))).path
    status, _, err = forgetless_("export", str(run), "--out", str(tmp_path / "out"), *arguments)
    assert status == 2 and said in err and not (tmp_path / "out").exists()


def test_a_routed_run_is_exported_as_a_set_whatever_goes_beside_it(small_run, tmp_path, forgetless_):
    run = fl.run(small_run({"name": "replay", "on": "routed"}, tasks=("colour", "animal"))).path
    status, out, _ = forgetless_("export", str(run), "--out", str(tmp_path / "set"))
    names = {"README.md", "adapters", "base", "routed.json", "router.safetensors"}
    assert status == 0 and " as routed: " in out and {p.name for p in (tmp_path / "set").iterdir()} == names
    assert {p.name for p in (tmp_path / "set" / "adapters").iterdir()} == {"00-colour", "01-animal"}
    assert forgetless_("export-routed", str(run), "--out", str(tmp_path / "again"))[0] == 0
    assert {p.name for p in (tmp_path / "again").iterdir()} == names


def test_per_task_gives_the_model_of_the_task_that_is_named(small_run, tmp_path):
    run = fl.run(small_run({"name": "per_task", "on": "lora"}, tasks=("colour", "animal"))).path
    found = export(run, tmp_path / "model", task="colour")
    assert model_sha256(models.load(str(tmp_path / "model"))[0]) == line_of(run, "00-colour")["model_sha256"] == found["model_sha256"]


# -- the card ----------------------------------------------------------------------------------------------------------------------------------


def test_the_card_says_how_to_load_what_lies_beside_it(run, tmp_path):
    export(run, tmp_path / "adapter", "lora", rank=2)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card and card.rstrip().endswith("how much of the change it misses.") and "AutoModel" not in card
    assert card.split("## How to load")[0].replace("library_name: peft", "library_name: transformers") == model_card(run).split("## How to load")[0]

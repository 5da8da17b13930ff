"""Adapters: attached and merged without a trace, `lora`'s own kept for PEFT, gorp's LoRA branch measured on the dense weight."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import make_model_folder
from test_contract import batches, learn
from transformers import AutoModelForCausalLM, AutoTokenizer

import forgetless as fl
from forgetless import adapters, models
from forgetless.errors import ConfigError
from forgetless.methods import get
from forgetless.methods.base import Memory
from forgetless.models import linear_modules, logical


@pytest.fixture(params=["llama", "qwen3", "gpt2", "t5"])
def model(request, tmp_path):
    return models.load(make_model_folder(tmp_path / request.param, kind=request.param))[0]


def outputs(model) -> torch.Tensor:
    ids = torch.randint(2, 20, (3, 7), generator=torch.Generator().manual_seed(0))
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        return model.eval()(input_ids=ids, **more).logits


def test_merging_changes_no_answer_and_leaves_a_plain_model(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    names = list(adapters.lora_layers(model, None))
    found = adapters.attach(model, names, 4, 8.0, 0.1)
    assert list(found) == names and linear_modules(model).keys() >= set(names)
    for layer in found.values():
        torch.nn.init.normal_(adapters.factors(layer)[1], std=0.1)
    asked = outputs(model)
    adapters.detach(model)
    torch.testing.assert_close(outputs(model), asked, atol=1e-5, rtol=1e-5)
    after = model.state_dict()
    assert list(after) == list(before) and type(model).__module__.startswith("transformers.")
    changed = {k for k in after if not torch.equal(after[k], before[k])}
    assert changed == {f"{n}.weight" for n in names}
    assert all(p.requires_grad for p in model.parameters())


def test_defaults_of_each_family(model):
    kind = model.config.model_type
    lora = {n.split(".", 3)[-1] if kind != "t5" else n.split(".", 5)[-1] for n in adapters.lora_layers(model, None)}
    full = adapters.family_modules(model, "full", "x")
    assert lora == {
        "llama": {"self_attn.q_proj", "self_attn.v_proj"}, "qwen3": {"self_attn.q_proj", "self_attn.v_proj"}, "gpt2": {"attn.c_attn"},
        "t5": {"SelfAttention.q", "SelfAttention.v"},
    }[kind]  # fmt: skip
    assert models.match_modules(model, full, "x")


def test_a_family_nobody_named_is_asked_for_its_layers(tmp_path):
    model, _ = models.load(make_model_folder(tmp_path / "m"))
    model.config.model_type = "something-new"
    with pytest.raises(ConfigError, match=r"method\.lora_modules: no default for a model of type 'something-new'; name the layers"):
        get("lora").check(model)
    get("lora", lora_modules=["q_proj"]).check(model)


def test_the_adapter_of_lora_is_peft_s_and_the_model_holds_it(small_run, tiny):
    """After two tasks: pretrained + state/'s adapter through PEFT = model/."""
    from peft import PeftModel

    result = fl.run(small_run({"name": "lora", "lora_rank": 4}, tasks=("colour", "animal")))
    for folder in sorted((result.path / "tasks").iterdir()):
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), folder / "state").eval()
        merged = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
        torch.testing.assert_close(outputs(peft), outputs(merged), atol=1e-5, rtol=1e-5)
    assert json.loads((folder / "state" / "adapter_config.json").read_text())["r"] == 4


def test_lora_goes_on_with_its_adapter_and_inclora_draws_a_new_one(tiny):
    model, tokenizer = (kind.from_pretrained(tiny) for kind in (AutoModelForCausalLM, AutoTokenizer))
    method, memory = get("lora", lora_dropout=0.0), Memory()
    learn(model, tokenizer, method, memory, 5, seed=0)
    first = dict(memory.tensors)
    method.begin_task(model, None, memory)
    for key, tensor in adapters.adapter_tensors(model).items():
        assert torch.equal(tensor, first[key])
    base = AutoModelForCausalLM.from_pretrained(tiny)
    for name, layer in adapters.adapters(model).items():  # what is under the adapter is the pretrained weight again, up to rounding
        torch.testing.assert_close(layer.get_base_layer().weight, base.get_submodule(name).weight, atol=1e-6, rtol=0)
    adapters.detach(model)

    method = get("inclora")
    for _ in range(2):
        method.begin_task(model, None, Memory())
        assert all(not factors[1].any() for factors in map(adapters.factors, adapters.adapters(model).values()))
        method.end_task(model, None, Memory())


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_the_lora_branch_adds_to_the_weight_stays_out_of_the_space(side, kind, tmp_path):
    """The invariant is on the dense weight: dW = s B A, merged."""
    model, tokenizer = models.load(make_model_folder(tmp_path / "m", kind=kind))
    method, memory = get("gorp", use_full_rank=False, use_lora=True, energy=0.5, side=side, lora_dropout=0.0), Memory()
    learn(model, tokenizer, method, memory, 10, seed=0)
    spaces = {k.removesuffix(".basis"): V for k, V in memory.tensors.items() if k.endswith(".basis") and V.shape[1]}
    assert spaces
    before = {n: logical(model.get_submodule(n).weight, model.get_submodule(n)).detach().clone() for n in spaces}
    learn(model, tokenizer, method, memory, 30, seed=1, weight_decay=0.1, max_grad_norm=1.0)
    for name, V in spaces.items():
        W = logical(model.get_submodule(name).weight, model.get_submodule(name)).detach()
        D = (W - before[name]).double()
        D = D if side == "inputs" else D.mT
        assert D.norm() > 1e-3
        assert (D @ V.double()).norm() <= 1e-5 * D.norm() + 2.0**-24 * W.norm()


def test_an_adapter_that_starts_inside_the_space_would_leak(tiny, monkeypatch):
    """Break it once: A drawn anywhere, only its steps projected."""
    import forgetless.methods.gorp as gorp

    model, tokenizer = (k.from_pretrained(tiny) for k in (AutoModelForCausalLM, AutoTokenizer))
    method, memory = get("gorp", use_full_rank=False, use_lora=True, energy=0.5, lora_dropout=0.0), Memory()
    learn(model, tokenizer, method, memory, 10, seed=0)
    before = {n: m.weight.detach().clone() for n, m in linear_modules(model).items()}
    spaces = {k.removesuffix(".basis"): V for k, V in memory.tensors.items() if k.endswith(".basis") and V.shape[1]}
    monkeypatch.setattr(gorp, "project_out", lambda A, V: A)
    learn(model, tokenizer, method, memory, 30, seed=1)
    D = {n: linear_modules(model)[n].weight - before[n] for n in spaces}
    assert max(float((D[n].detach() @ V).norm() / D[n].detach().norm()) for n, V in spaces.items()) > 0.05


def test_both_branches_speak_in_the_joint_space(tiny):
    """s B^T is zero at first, so the adapters' gradients are far smaller than the weights': each branch is brought to energy 1 before they are joined."""
    model, tokenizer = (k.from_pretrained(tiny) for k in (AutoModelForCausalLM, AutoTokenizer))
    method, memory = get("gorp", use_lora=True, lora_dropout=0.0, energy=1.0), Memory()
    method.begin_task(model, None, memory)
    for batch in batches(tokenizer, 3, 0):
        model.zero_grad()
        model(**batch).loss.backward()
        for layer in adapters.adapters(model).values():
            torch.nn.init.normal_(adapters.factors(layer)[1], std=1e-4)
        method.on_step(model)
    name = "model.layers.0.self_attn.q_proj"
    full, lora = (method.statistics[f"{branch}/{name}"] for branch in ("full", "lora"))
    assert float(lora.total) < 1e-4 * float(full.total)
    method.end_task(model, None, memory)
    energy = memory.tensors[f"{name}.energy"]
    assert float(energy.sum()) == pytest.approx(1.0, abs=1e-3)
    V = memory.tensors[f"{name}.basis"]
    held = float(((lora.rows @ V) ** 2).sum() / (lora.rows**2).sum())
    assert held > 0.999  # the small one is held as wholly as the large one

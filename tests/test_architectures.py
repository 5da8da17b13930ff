"""The contract on other architectures: Qwen3, GPT-2 (Conv1D, weights stored transposed) and T5 (encoder-decoder), all tiny and random."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import make_model_folder
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import forgetless as fl
from forgetless import models
from forgetless.batches import Collate, answer_loss
from forgetless.errors import ConfigError
from forgetless.evaluation import scorers
from forgetless.lineage import model_sha256
from forgetless.methods import get
from forgetless.models import linear_modules, logical
from forgetless.tasks import Example, Task

KINDS = ["qwen3", "gpt2", "t5"]
METHODS = {
    "seqft": {"name": "seqft"}, "lora": {"name": "lora"}, "inclora": {"name": "inclora"}, "gorp": {"name": "gorp"},
    "gorp-all": {"name": "gorp", "use_lora": True, "rank": 4}, "gorp-both": {"name": "gorp", "rank": 4, "side": "both"}, "gorp-paper": {"name": "gorp", "preset": "paper"},
    "osft": {"name": "osft", "protect": "weights"}, "osft-adapter": {"name": "osft", "form": "adapter"},
    "osft-adaptive": {"name": "osft", "frozen_ratio": "adaptive", "min_ratio": 0.5, "target_ratio": 0.6, "remember": "union"},
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("models") / request.param, kind=request.param, tied=request.param == "t5")


def load(path):
    return (
        AutoModelForSeq2SeqLM if json.loads((path / "config.json").read_text()).get("is_encoder_decoder") else AutoModelForCausalLM
    ).from_pretrained(path)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_leaks_nothing_is_saved_as_measured_and_resumes(name, folder, small_run, tmp_path):
    config = small_run(METHODS[name], tasks=("colour", "animal"), model=folder, checkpoint_every=4)
    result = fl.run(config)
    lines = [json.loads(line) for line in (result.path / "lineage.jsonl").read_text().splitlines()]
    for line in lines:  # row 5
        assert model_sha256(load(result.path / "tasks" / f"{line['index']:02d}-{line['task']}" / "model")) == line["model_sha256"]
    assert lines[0]["model_sha256"] != lines[1]["model_sha256"]
    base, after = (models.load(p)[0] for p in (folder, str(result.path / "model")))
    if name != "seqft":  # row 6: norms, embeddings and the head stay
        moved = {n for (n, a), (_, b) in zip(base.named_parameters(), after.named_parameters(), strict=True) if not torch.equal(a, b)}
        assert moved and moved <= {f"{n}.weight" for n in linear_modules(base)}
    if name.startswith("gorp"):  # row 1, on what the two commits hold: the second task's change of W against the space as the first left it
        from safetensors.torch import load_file

        first = load(result.path / "tasks" / "00-colour" / "model")
        memory = load_file(result.path / "tasks" / "00-colour" / "state" / "method.safetensors")
        spaces = {k.removesuffix(".basis"): V for k, V in memory.items() if k.endswith(".basis") and V.shape[1]}
        assert spaces
        old, new = linear_modules(first), linear_modules(after)
        for module, V in spaces.items():
            D = (logical(new[module].weight, new[module]) - logical(old[module].weight, old[module])).detach().double()
            assert (D @ V.double()).norm() <= 1e-5 * D.norm() + 2.0**-24 * (6 * V.shape[1] / V.shape[0]) ** 0.5 * new[module].weight.norm()
        timing = [json.loads(line) for line in (result.path / "timing.jsonl").read_text().splitlines()]
        assert timing[-1]["update_leak"] < 1e-5 and timing[-1]["coverage"]["colour"]["inputs"] > 0
    if name.startswith("osft"):  # row 1 again: the second task's change against the leading singular directions of the first commit's weights
        first = load(result.path / "tasks" / "00-colour" / "model")
        old, new = linear_modules(first), linear_modules(after)
        for module in old:
            W, X = (logical(layers[module].weight, layers[module]).detach().double() for layers in (old, new))
            U, _, Vh = torch.linalg.svd(W, full_matrices=False)
            k = min(W.shape) // 2
            D, rounding = X - W, 2.0**-24 * 6**0.5 * X.norm()
            assert (D @ Vh[:k].mT).norm() <= 1e-4 * D.norm() + rounding and (U[:, :k].mT @ D).norm() <= 1e-4 * D.norm() + rounding and D.norm() > 0
    assert fl.run(config).resumed_at == 2


@pytest.fixture
def loaded(folder):
    return models.load(folder)


def example_task(**more) -> Task:
    rows = [Example("cat sits", "red", 0)]
    return Task("t", "Text : {sentence} Answer :", rows, rows, rows, labels=["red", "happy blue", "calm"], **more)


def test_nothing_matched_names_the_nearest_layers(loaded):
    model, _ = loaded
    leaf = next(iter(linear_modules(model))).rsplit(".", 1)[-1]
    with pytest.raises(ConfigError, match=rf"matches no linear layer.*\b{leaf}\b"):
        get("gorp", full_modules=[leaf + "x"]).check(model)


def test_a_tied_head_is_refused(loaded):
    model, _ = loaded
    if model.config.tie_word_embeddings:
        with pytest.raises(ConfigError, match="shares its weight"):
            get("gorp", full_modules="lm_head").check(model)


def test_padding_does_not_change_the_loss(loaded):
    model, tokenizer = loaded
    t = example_task()
    rows = [
        t.encode(tokenizer, Example(text, label, 0))
        for text, label in (("cat sits", "red"), ("dog runs happy sad calm river", "happy blue"), ("bird", "calm"))
    ]
    collate = Collate(model)
    loss, _ = answer_loss(model, collate(rows))
    singles = [answer_loss(model, collate([r]))[0] * sum(x != -100 for x in r["labels"]) for r in rows]
    answers = sum(x != -100 for r in rows for x in r["labels"])
    assert float(loss.detach()) == pytest.approx(float(sum(singles).detach()) / answers, rel=1e-5)
    if model.config.is_encoder_decoder:  # transformers' own: labels in, loss out
        r = rows[1]
        k = r["labels"].index(next(x for x in r["labels"] if x != -100))
        own = model(input_ids=torch.tensor([r["input_ids"][:k]]), labels=torch.tensor([r["labels"][k:]])).loss
        assert float(own.detach()) == pytest.approx(float(answer_loss(model, collate([r]))[0].detach()), rel=1e-5)


@torch.inference_mode()
def test_scores_are_those_of_plain_forward_passes(loaded):
    model, tokenizer = loaded
    t = example_task()
    texts = ["cat sits", "dog runs happy sad calm river", "bird"]
    labels = [t.encode_answer(tokenizer, label) for label in t.labels]
    prompts = [t.encode_prompt(tokenizer, text) for text in texts]
    state = scorers._prefill(model, prompts)
    found = scorers._likelihoods(model, state, labels)
    written = scorers._greedy(model, tokenizer, state, 4)
    for i, prompt in enumerate(prompts):
        for k, label in enumerate(labels):
            row = {"input_ids": prompt + label, "labels": [-100] * len(prompt) + label}
            total = -float(answer_loss(model, Collate(model)([row]))[0]) * len(label)
            assert float(found.whole[i, k]) == pytest.approx(total, abs=1e-4)
        one = scorers._prefill(model, [prompt])
        assert scorers._greedy(model, tokenizer, one, 4) == [written[i]]
        generated = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=1,
            pad_token_id=1,
        )[0]
        new = generated[1:] if model.config.is_encoder_decoder else generated[len(prompt) :]
        new = new.tolist()
        new = new[: new.index(1)] if 1 in new else new
        assert tokenizer.decode(new, skip_special_tokens=True) == written[i]

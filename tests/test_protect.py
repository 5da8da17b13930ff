"""protect_from: the input spaces of given prompts are closed before the first task."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import CHAT, make_model_folder
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import forgetless as fl
from forgetless import models
from forgetless.batches import read
from forgetless.config import load_config
from forgetless.errors import ConfigError, DataError
from forgetless.protect import Sum, encode, input_spaces, input_sums, read_prompts
from forgetless.subspace import coverage
from forgetless.tasks import load_stream, sample

PROMPTS = ["cat sits", "dog runs happy", "red apple", "bird flies calm river"]


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def inputs_of(model, layer, ids) -> torch.Tensor:
    seen = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().reshape(-1, args[0].shape[-1])))
    with torch.inference_mode():
        for row in ids:
            model(input_ids=torch.tensor([row]))
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("rows", [None, 40], ids=["few tokens", "more tokens than directions"])
def test_the_space_holds_the_share_and_no_direction_more(kind, rows, tmp_path):
    model, tokenizer = models.load(make_model_folder(tmp_path / "m", kind=kind))
    layers = models.linear_modules(model)
    ids = [encode(tokenizer, p) for p in PROMPTS]
    assert sum(map(len, ids)) < 32  # the inputs of most layers
    if rows:
        ids = torch.randint(2, 30, (rows, 9), generator=torch.Generator().manual_seed(0)).tolist()
    spaces = input_spaces(model, layers, ids, 0.8)
    assert spaces.keys() == layers.keys()
    for name, layer in layers.items():
        X = inputs_of(model, layer, ids)
        X = X / X.norm(dim=1, keepdim=True)
        best = torch.linalg.eigvalsh(X.T @ X).flip(0)
        needed = int((best.cumsum(0) / best.sum() < 0.8).sum()) + 1
        V = spaces[name].basis
        assert coverage(X, V) == pytest.approx(0.8, abs=0.15) and coverage(X, V) >= 0.8 - 1e-5 and V.shape[1] == needed


def summed(found: Sum) -> torch.Tensor:
    A, is_matrix = found.of
    return A if is_matrix else A.mT @ A


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "t5"])
@pytest.mark.parametrize("given", ["prompts", "rows"])
def test_rows_that_are_read_together_are_summed_up_as_alone(kind, given, tmp_path, monkeypatch):
    """Of any lengths: those of one length together, no padding in the sums, each row at its own positions."""
    model, _ = models.load(make_model_folder(tmp_path / "m", kind=kind), dtype=torch.float64)
    layers = models.linear_modules(model) | {"head": model.get_output_embeddings()}
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, 20, (2 + i * 5 % 4 * 3,), generator=draw).tolist() for i in range(14)]
    if given == "rows":
        rows = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in rows]
    monkeypatch.setattr("forgetless.batches.READ_TOKENS", 20)
    passes, seen = [], {}
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    sums, same = input_sums(model, layers, rows, normalise=True)
    assert len(passes) == (14 if kind == "t5" else 7)
    handles = [
        layer.register_forward_pre_hook(lambda module, args, name=name: seen.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1])))
        for name, layer in layers.items()
    ]
    for row in rows:  # each by itself, whole
        read(model, [row], whole=True)
    for handle in handles:
        handle.remove()
    assert (sums.keys() | same.keys()) == layers.keys()
    for name in layers:
        X = torch.cat(seen[name])
        X = X / X.norm(dim=1, keepdim=True)
        torch.testing.assert_close(summed(sums[same.get(name, name)]), X.mT @ X, rtol=1e-10, atol=1e-10)


def test_a_layer_that_sees_some_of_the_tokens_in_an_order_of_its_own_is_summed_up(tmp_path):
    """As an expert of several does, or a model that puts positions before rows: what it is given does not say which row it is of."""

    class Some(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            flat = x.reshape(-1, x.shape[-1])
            chosen = flat[:, 0] > flat[:, 1]
            made = self.inner(flat[chosen].flip(0)).flip(0)
            return flat.new_zeros(len(flat), self.inner.out_features).index_put((chosen,), made).view(*x.shape[:-1], -1)

    model, _ = models.load(make_model_folder(tmp_path / "m"), dtype=torch.float64)
    mlp = model.model.layers[1].mlp
    mlp.gate_proj = Some(mlp.gate_proj)
    layers, rows, done = models.linear_modules(model), [list(range(2 + i, 3 + i + n)) for i, n in enumerate((9, 3, 9, 12, 3))], []
    sums, same = input_sums(model, layers, rows, advance=done.append)
    for name, layer in layers.items():
        X = inputs_of(model, layer, rows)
        torch.testing.assert_close(summed(sums[same.get(name, name)]), X.mT @ X, rtol=1e-10, atol=1e-10)
    assert done == [2, 4, 5]


def test_inputs_under_autocast_are_summed_up_in_fp32(tmp_path):
    """What a layer is given under bf16 autocast, and no rounding more."""
    model, _ = models.load(make_model_folder(tmp_path / "m"))
    layers, rows = models.linear_modules(model), torch.randint(2, 20, (40, 9), generator=torch.Generator().manual_seed(0)).tolist()
    sums, same = input_sums(model, layers, rows, autocast=True)
    plain, _ = input_sums(model, layers, rows)
    others = []
    for name, layer in layers.items():
        with torch.autocast("cpu", torch.bfloat16):
            X = inputs_of(model, layer, rows).double()
        got = summed(sums[same.get(name, name)])
        assert got.dtype == torch.float32
        # a row read with others may be rounded the other way now and then
        assert float(torch.linalg.matrix_norm(got - X.mT @ X) / torch.linalg.matrix_norm(X.mT @ X)) < 2e-4, name
        others.append(float(torch.linalg.matrix_norm(got - summed(plain[same.get(name, name)])) / torch.linalg.matrix_norm(got)))
    assert max(others) > 1e-3


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("method", ["osft", "gpm", "ewc on gpm"])
def test_a_run_measures_the_inputs_its_training_has(method, bf16, small_run, tmp_path):
    config = small_run({"name": "ewc", "on": "gpm"} if " on " in method else {"name": method}, tasks=("colour",))
    config["train"]["bf16"] = bf16
    result = fl.run(config)
    model, tokenizer = models.load(str(result.path / "model"))
    task = load_stream(load_config(config)).tasks[0]
    rows = sample(task.train, 200, 0) if method == "osft" else task.train
    rows, known = [task.encode(tokenizer, row) for row in rows], load_file(result.path / "tasks" / "00-colour" / "state" / "method.safetensors")
    how = {"energy": 0.9, "max_share": 0.75} if method == "osft" else {"energy": 0.95, "normalise": False}
    for autocast in (True, False):
        spaces = input_spaces(model, models.linear_modules(model), rows, **how, autocast=autocast)
        assert all(torch.equal(space.basis, known[f"{name}.basis"]) for name, space in spaces.items()) == (autocast == bf16)


@pytest.mark.parametrize("n", [8, 192, 200, 500])
def test_a_sum_of_rows_is_their_gram_matrix(n):
    found, every = Sum(torch.zeros(0, n, dtype=torch.float64)), []
    for i in range(12):
        every.append(torch.randn(60, n, dtype=torch.float64, generator=torch.Generator().manual_seed(i)))
        found.add(every[-1])
    A, is_matrix = found.of
    assert is_matrix and torch.equal(A, A.mT)
    torch.testing.assert_close(A, torch.cat(every).mT @ torch.cat(every), rtol=1e-12, atol=1e-10)


def test_what_the_prompts_use_does_not_move_in_the_first_task(small_run, tiny, tmp_path):
    """All of the prompts' input energy protected: the model answers them as the untouched one does, layer by layer and as a whole."""
    source = write(tmp_path / "prompts.jsonl", [{"prompt": p} for p in PROMPTS])
    config = small_run({"name": "gorp", "protect_energy": 1.0}, tasks=("colour",))
    ids = [encode(AutoTokenizer.from_pretrained(tiny), p) for p in PROMPTS]
    base = AutoModelForCausalLM.from_pretrained(tiny)

    def moved(result) -> float:
        after = AutoModelForCausalLM.from_pretrained(result.path / "model")
        with torch.inference_mode():
            return max(float((after(input_ids=torch.tensor([i])).logits - base(input_ids=torch.tensor([i])).logits).abs().max()) for i in ids)

    kept = fl.run(config | {"protect_from": source, "output_dir": str(tmp_path / "kept")})
    lost = fl.run(config | {"output_dir": str(tmp_path / "lost")})
    assert moved(kept) < 1e-4 < 1e-2 < moved(lost)
    info = json.loads((kept.path / "tasks/00-colour/state/method.json").read_text())["protect_from"]
    assert info["prompts"] == 4 and len(info["sha256"]) == 64
    events = [json.loads(line) for line in (kept.path / "timing.jsonl").read_text().splitlines()]
    assert 0 < events[-1]["update_leak"] < 1e-5  # there was something to leak into, in the first task already


def test_conversations_and_texts(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(make_model_folder(tmp_path / "m", chat_template=CHAT))
    turns = [{"role": "user", "content": "cat sits"}, {"role": "assistant", "content": "red"}]
    source = write(tmp_path / "p.jsonl", [{"messages": turns}, {"text": "dog runs"}, {"prompt": "bird", "completion": "blue"}])
    prompts = read_prompts(source)
    assert tokenizer.decode(encode(tokenizer, prompts[0])).split()[:4] == ["user", ":", "cat", "sits"]
    assert prompts[1:] == ["dog runs", "bird"] and len(encode(tokenizer, "cat " * 2000)) == 512


@pytest.mark.parametrize(
    ("rows", "method", "error", "said"),
    [
        ([{"promt": "x"}], "gorp", DataError, "line 1: a prompt is a row with.*did you mean 'promt'|line 1: a prompt is a row with"),
        ([{"prompt": ""}], "gorp", DataError, "line 1.*not empty"),
        ([], "gorp", DataError, "has no rows"),
        ([{"prompt": "cat"}], "seqft", ConfigError, "seqft keeps no protected input space"),
        ([{"prompt": "cat"}], {"name": "gorp", "side": "outputs"}, ConfigError, "side: inputs or both"),
        ([{"messages": [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "red"}]}], "gorp", DataError, "no chat template"),
    ],
)
def test_what_cannot_be_protected_is_refused(rows, method, error, said, small_run, tmp_path):
    config = small_run(method, tasks=("colour",), protect_from=write(tmp_path / "p.jsonl", rows))
    with pytest.raises(error, match=said):
        fl.run(config)


def test_a_first_task_that_goes_on_from_a_checkpoint_is_protected_too(small_run, tmp_path, monkeypatch):
    from test_contract import Killed, kill_at

    config = small_run("gorp", tasks=("colour",), protect_from=write(tmp_path / "p.jsonl", [{"prompt": p} for p in PROMPTS]), checkpoint_every=2)
    whole = (fl.run(config | {"output_dir": str(tmp_path / "whole")}).path / "lineage.jsonl").read_text()
    with pytest.raises(Killed), monkeypatch.context() as patch:
        kill_at(patch, 4)
        fl.run(config)
    result = fl.run(config)
    assert (result.path / "lineage.jsonl").read_text() == whole
    (tmp_path / "p.jsonl").unlink()  # what it protects is in the run's memory by now
    assert fl.run(config).resumed_at == 1


def test_other_prompts_begin_the_first_task_anew(small_run, tmp_path, monkeypatch):
    from test_contract import Killed, kill_at

    source = tmp_path / "p.jsonl"
    config = small_run("gorp", tasks=("colour",), protect_from=write(source, [{"prompt": PROMPTS[0]}]), checkpoint_every=2)
    with pytest.raises(Killed), monkeypatch.context() as patch:
        kill_at(patch, 4)
        fl.run(config)
    write(source, [{"prompt": PROMPTS[2]}])
    calls = kill_at(monkeypatch, 0)
    fl.run(config)
    assert len(calls) == 6


def test_a_decoder_of_its_own_is_seen_with_the_answers_it_learned(small_run, tmp_path):
    """OSFT on an encoder-decoder model: the encoder reads prompts without answers, and the decoder's inputs are those of the whole answers."""
    folder = make_model_folder(tmp_path / "m", kind="t5")
    result = fl.run(small_run({"name": "osft", "protect": "inputs", "max_share": 0.99}, tasks=("colour",), model=folder))
    model, tokenizer = models.load(str(result.path / "model"))
    task = load_stream(load_config(small_run({"name": "osft"}, tasks=("colour",), model=folder))).tasks[0]
    rows = [task.encode(tokenizer, row) for row in task.train]
    memory = load_file(result.path / "tasks" / "00-colour" / "state" / "method.safetensors")
    for part, tokens in (("encoder", lambda r: r["labels"].count(-100)), ("decoder", lambda r: len(r["labels"]) - r["labels"].count(-100))):
        name = f"{part}.block.0.layer.0.SelfAttention.q"
        seen = []
        handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].detach()[0]))
        read(model, rows)
        handle.remove()
        assert [len(X) for X in seen] == [tokens(r) for r in rows], part
        X = torch.cat(seen)
        assert len(rows) <= len(X) and coverage(X / X.norm(dim=1, keepdim=True), memory[f"{name}.basis"]) > 0.85, part
    assert max(len(r["labels"]) - r["labels"].count(-100) for r in rows) > 1  # a label and its end: more than the first position

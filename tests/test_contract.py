"""What every method in the registry must pass. Each row is a defect measured in existing software. Rows are numbered as in docs/contract.md."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import make_model_folder, run_config
from transformers import AutoModelForCausalLM, AutoTokenizer

import forgetless as fl
from forgetless import models
from forgetless.batches import answer_loss
from forgetless.errors import ConfigError
from forgetless.evaluation.drift import weight_leak
from forgetless.lineage import RunFolder, load_memory, model_sha256
from forgetless.methods import REGISTRY, get
from forgetless.methods.base import Memory
from forgetless.optim import SubspaceAdamW
from forgetless.tasks import Example, Task

VARIANTS = {
    "seqft": {}, "seqft-linear": {"modules": "linear"},
    "seqft-galore": {"modules": "linear", "state": "galore", "rank": 4, "gap": 3}, "seqft-fira": {"modules": "linear", "state": "fira", "rank": 4, "gap": 3},
    "seqft-apollo": {"modules": "linear", "state": "apollo", "rank": 4, "gap": 3}, "seqft-apollo-mini": {"modules": "linear", "state": "apollo-mini"},
    "lora": {}, "inclora": {},
    "gorp": {}, "gorp-rank": {"rank": 8}, "gorp-first_moment": {"space_from": "first_moment"}, "gorp-outputs": {"side": "outputs", "rank": 8},
    "gorp-both": {"side": "both", "rank": 8}, "gorp-max_rank": {"rank": 8, "max_rank": 6}, "gorp-some": {"full_modules": r".*\.(gate|up|down)_proj"},
    # the branches and the space, one by one: the rows of the paper's ablation are lora (B alone, with projection B+S), both branches (B+L), and all (B+L+S)
    "gorp-no_space": {"use_shared_space": False}, "gorp-lora": {"use_full_rank": False, "use_lora": True},
    "gorp-lora-no_space": {"use_full_rank": False, "use_lora": True, "use_shared_space": False},
    "gorp-lora-outputs": {"use_full_rank": False, "use_lora": True, "side": "outputs"},
    "gorp-branches": {"use_lora": True}, "gorp-branches-rank": {"use_lora": True, "rank": 4},
    "gorp-branches-no_space": {"use_lora": True, "use_shared_space": False}, "gorp-paper": {"preset": "paper"},
    "osft": {"protect": "weights"}, "osft-paper": {"block": "paper"}, "osft-schedule": {"frozen_ratio": "schedule", "tasks": 4},
    "osft-inputs": {"protect": "inputs"}, "osft-both": {"protect": "both"}, "osft-kept": {"release_gradients": False},
    "osft-union": {"remember": "union"}, "osft-union-paper": {"remember": "union", "block": "paper"}, "osft-union-both": {"remember": "union", "protect": "both"},
    "osft-adaptive": {"frozen_ratio": "adaptive", "target_ratio": 0.5},
    "osft-adapter": {"form": "adapter"}, "osft-adapter-thin": {"form": "adapter", "thin": True},
    "osft-adapter-inputs": {"form": "adapter", "protect": "inputs"}, "osft-adapter-both": {"form": "adapter", "protect": "both"},
    "osft-adapter-union": {"form": "adapter", "remember": "union"},
    "olora": {}, "olora-l2": {"l1": 5.0, "l2": 0.001}, "nlora": {}, "ella": {"strength": 1.0}, "slao": {},
    "inflora": {}, "inflora-tasks": {"tasks": 2, "energy": 0.5}, "inflora-wide": {"energy": 0.999, "normalise": True, "lora_rank": 4},
    "gpm": {}, "gpm-low": {"threshold": 0.6, "increment": 0.2}, "migu": {}, "migu-half": {"share": 0.5},
    "sara": {}, "sara-nuclear": {"nuclear": 0.01, "share": 0.2}, "ogd": {}, "ogd-bf16": {"keep_in": "bf16", "samples": 5, "modules": "linear"},
    "badam": {}, "treelora": {}, "esacl": {}, "esacl-plain": {"rho": 0.0, "prune": 0.5},
    "ewc": {}, "ewc-online": {"form": "online"}, "ewc-inclora": {"on": "inclora"}, "ewc-gorp": {"on": {"name": "gorp", "rank": 8, "energy": 0.5}},
    "lines": {}, "lines-gorp": {"on": {"name": "gorp", "energy": 0.5}}, "merge": {}, "merge-inclora": {"on": "inclora"}, "merge-ema": {"rule": "ema"},
    "merge-magmax": {"rule": "magmax"}, "merge-ties": {"rule": "ties", "keep": 0.5}, "merge-dare": {"rule": "dare", "drop": 0.2},
    "merge-gorp": {"on": {"name": "gorp", "energy": 0.5}},
    "lwf": {}, "lwf-inclora": {"on": "inclora"}, "lwf-gorp": {"on": {"name": "gorp", "energy": 0.5}, "first_task": True},
    "replay": {}, "replay-consolidation": {"mode": "consolidation"}, "replay-on_policy": {"mode": "on_policy", "max_new_tokens": 8},
    "replay-self_synthesised": {"mode": "self_synthesised", "max_new_tokens": 8}, "replay-gorp": {"on": {"name": "gorp", "energy": 0.5}}, "mtl": {}, "per_task": {},
    "routed": {"width": 64}, "routed-keys": {"router": "keys"}, "routed-mixed": {"router": "keys", "top": 2},
    "gainlora": {}, "gainlora-all": {"gate_energy": 1.0, "gate_width": 12},
    "prompt": {"prompt_length": 6}, "prompt-network": {"prompt_length": 6, "bottleneck": 32},
}  # fmt: skip
ADAPTERS = {
    "lora",
    "inclora",
    "badam",
    "olora",
    "nlora",
    "inflora",
    "ella",
    "slao",
    "routed",
    "gainlora",
    "treelora",
}  # adapters, whose few numbers have to go further
EVERYTHING = {"seqft", "ogd"}  # methods that train norms and embeddings too, unless they are told what to train
MASKED = {"migu", "sara", "esacl"}  # methods that train some of each weight's numbers, which likewise have to go further
ROUTED = {"routed", "gainlora", "prompt"}  # methods whose model/ is the base model: what a task taught is in state/, and answering() brings it in
OWN_OPTIMIZER = {"badam", "seqft"}  # methods whose optimizer may keep another state than SubspaceAdamW's, and then plans its bytes itself


def trains(name: str, options: dict) -> tuple[str, dict]:
    """(name, options) of the method that says which weights train: of one that goes beside others, the innermost."""
    on = getattr(get(name, **options), "on", None)
    if on is None:
        return name, options
    given = options.get("on", on.name)
    return trains(on.name, {k: v for k, v in given.items() if k != "name"} if isinstance(given, dict) else {})


EVERY = [(v.split("-")[0], options) for v, options in VARIANTS.items()]
# of each method its defaults, and these: the rest is `slow`, which `make test-all` runs
OFTEN = {
    "gorp-rank",
    "gorp-branches",
    "gorp-max_rank",
    "osft-inputs",
    "osft-both",
    "osft-adapter",
    "osft-union",
    "ewc-inclora",
    "ewc-gorp",
    "replay-gorp",
    "merge-ties",
}
# all rows of a variant in one process of the test run, where they share what `finished` has run
PARAMS = {
    v: pytest.param(*e, id=v, marks=[pytest.mark.xdist_group(v)] + [pytest.mark.slow] * (v != e[0] and v not in OFTEN))
    for v, e in zip(VARIANTS, EVERY, strict=True)
}
every = pytest.mark.parametrize(("name", "options"), PARAMS.values())
CONSTRAINED = (
    "gorp",
    "esacl",
    "osft",
    "gpm",
    "sara",
    "inflora",
    "gainlora",
    "ewc-gorp",
    "replay-gorp",
)  # first parts of the ids of variants that promise to stay out of something
constrained = pytest.mark.parametrize(("name", "options"), [p for v, p in PARAMS.items() if v.startswith(CONSTRAINED) and "no_space" not in v])


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """(name, options) -> (config, result) of a run of two tasks; done once for all tests that only look at it."""
    done = {}

    def run(name, options):
        key = json.dumps([name, options], sort_keys=True)
        if key not in done:
            config = run_config(tiny, tmp_path_factory.mktemp("finished"), {"name": name, **options}, ("colour", "animal"))
            done[key] = config, fl.run(config)
        return done[key]

    return run


@every
def test_options_as_a_run_writes_them_out_are_accepted_again(name, options):
    """run.yaml spells every option out, defaults too."""
    method = get(name, **options)
    assert get(name, **method.options.model_dump()).options == method.options


def test_every_method_of_the_registry_is_here():
    assert {name for name, _ in EVERY} == set(REGISTRY)


def batches(tokenizer, steps, seed):
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(2, len(tokenizer), (4, 12), generator=g)
        yield {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": ids.index_fill(1, torch.tensor([0]), -100),
        }  # nothing foretells the first


def learn(model, tokenizer, method, memory, steps, seed, rate=1e-3, **optimizer):
    """One task without the Trainer: what a user's own loop would do."""
    method.tokenizer, task = tokenizer, some_task()
    method.begin_task(model, task, memory)
    opt = method.optimizer(method.param_groups(model), lr=rate, **optimizer)
    opt.track_leak = True
    start = {p: p.detach().clone() for g in opt.param_groups for p in g["params"]}
    worst = 0.0
    for batch in batches(tokenizer, steps, seed):
        model.zero_grad()
        loss, outputs = answer_loss(model, batch)
        extra = method.extra_loss(model, batch, outputs)
        (loss if extra is None else loss + extra).backward()
        method.on_step(model)
        opt.step()
        worst = max(worst, getattr(opt, "update_leak", None) or 0.0)  # None while nothing is protected
    leak = weight_leak(opt, start, steps)
    method.end_task(model, task, memory)
    return opt, worst, method.merge_leak or leak


def some_task() -> Task:
    rows = [Example("cat red", "red", 0), Example("dog runs happy", "blue", 1)]
    return Task("t", "{sentence}", rows, rows, rows)


@pytest.fixture
def loaded(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)


# -- row 1: the leak -------------------------------------------------------------------------------------------------------------------


@constrained
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_row_1_no_leak_on_a_model_after_50_steps_with_decay_and_clipping(name, options, dtype, loaded):
    model, tokenizer = loaded
    model.to(dtype)
    method, memory = get(name, **({"energy": 0.5} if name == "gorp" else {}), **options), Memory()
    learn(model, tokenizer, method, memory, 10, seed=0)
    assert all(t.shape[1] > 0 for k, t in memory.tensors.items() if k.endswith(".basis"))  # a leak of zero against an empty space says nothing
    _, update, weights = learn(model, tokenizer, method, memory, 50, seed=1, weight_decay=0.1, max_grad_norm=1.0)
    assert update < (1e-5 if dtype == torch.float32 else 1e-10)
    assert weights["leak"] <= weights["bound"]
    assert (
        update > 0.0 or options.get("thin") or name in ("inflora", "esacl", "sara")
    )  # there nothing is left for an optimizer to get wrong; a mask leaves exact zeros


def test_row_1_fails_for_a_method_that_projects_gradients_only(loaded):
    """Break it once: plain AdamW on projected gradients, judged by the same measure."""
    model, tokenizer = loaded
    method, memory = get("gorp", energy=0.5), Memory()
    learn(model, tokenizer, method, memory, 10, seed=0)
    method.begin_task(model, None, memory)
    judge = SubspaceAdamW(method.param_groups(model), lr=1e-3)
    opt = torch.optim.AdamW([p for g in judge.param_groups for p in g["params"]], lr=1e-3)
    start = {p: p.detach().clone() for g in judge.param_groups for p in g["params"]}
    for batch in batches(tokenizer, 50, 1):
        model.zero_grad()
        model(**batch).loss.backward()
        for g in judge.param_groups:
            for p in g["params"]:
                p.grad = g["constraint"].permitted(p.grad)
        opt.step()
    assert weight_leak(judge, start, 50)["leak"] > 0.05


# -- row 2: two tasks, and a reload ------------------------------------------------------------------------------------------------------


def louder(source: str, folder: Path) -> str:
    """The model with weights ten times as large: fresh ones are so small that attention is an average and no input, and no prompt, can make much of a difference."""
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10 if p.ndim > 1 else 1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


@every
def test_row_2_what_a_task_taught_is_in_the_weights_after_a_reload(name, options, small_run, tiny, tmp_path):
    few = (
        trains(name, options)[0] in ADAPTERS
        or not options.get("use_full_rank", True)
        or options.get("preset") == "paper"
        or "full_modules" in options
    )
    few = few or name in MASKED or "state" in options or name == "osft" and options.get("protect") != "inputs"
    rate = 3e-2 if name == "prompt" else 1e-2 if few else 1e-3  # where few weights learn, they have to go further in 25 steps
    config = small_run(
        {"name": name, **options},
        tasks=("colour", "animal"),
        train={"learning_rate": rate, "max_steps": 25, "per_device_train_batch_size": 6, "bf16": False, "use_cpu": True},
    )
    if name == "prompt":
        config["model"] = louder(tiny, tmp_path / "louder")
    result = fl.run(config)
    folders = [result.path / "tasks" / n / "model" for n in ("00-colour", "01-animal")]
    first, second = (AutoModelForCausalLM.from_pretrained(f) for f in folders)
    base = AutoModelForCausalLM.from_pretrained(config["model"])
    if name in ROUTED:
        assert model_sha256(first) == model_sha256(base) == model_sha256(second)
    else:
        assert model_sha256(first) != model_sha256(base) != model_sha256(second)
    from forgetless.config import load_config
    from forgetless.evaluation.scorers import score_rows
    from forgetless.tasks import load_stream

    stream, tokenizer = load_stream(load_config(config)), AutoTokenizer.from_pretrained(folders[0])
    for i, model in enumerate((first, second)):
        rows = fl.load_config(config).evaluate.limit
        from forgetless.tasks import sample

        test_rows = sample(stream[i].test, rows, 0)
        if name in ROUTED:
            method, memory = get(name, **options), load_memory(folders[i].parent / "state")
            method.tokenizer, again = tokenizer, []
            for places, answerer in method.answering(model.eval(), stream[i], test_rows, memory):
                with answerer as speaker:
                    again += score_rows(speaker, tokenizer, stream[i], [test_rows[k] for k in places], ["choice"])
        else:
            again = score_rows(model.eval(), tokenizer, stream[i], test_rows, ["choice"])
        score = sum(p.score("choice") for p in again) / len(again)
        assert score == result.matrices["choice"].rows[i][i]
        assert score > 0.5  # chance is 1/3: it did learn


# -- row 3: killed and resumed = never killed ----------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Not an Exception: nothing in between may catch it, as nothing catches a SIGKILL (benchmarks/scripts/sigkill.py sends real ones)."""


def kill_at(monkeypatch, call: int, where: str = "forgetless.trainer.answer_loss"):
    """Raise Killed at the call-th call of `where`; returns the list of calls."""
    module, _, name = where.rpartition(".")
    calls, real = [], getattr(importlib.import_module(module), name)

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(where, counted)
    return calls


@every
def test_row_3_killed_inside_a_task_and_resumed_is_never_killed(name, options, small_run, tmp_path, monkeypatch):
    train = {"learning_rate": 1e-3, "num_train_epochs": 2, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "weight_decay": 0.1, "bf16": False,
             "use_cpu": True, "lr_scheduler_type": "linear"}  # fmt: skip  # 54 rows: 5 steps an epoch, the last one short
    config = small_run({"name": name, **options}, tasks=("colour", "animal"), train=train)
    whole = (fl.run(config | {"output_dir": str(tmp_path / "whole")}).path / "lineage.jsonl").read_text()

    begun = []
    begin = type(get(name, **options)).begin_task
    monkeypatch.setattr(type(get(name, **options)), "begin_task", lambda *a: begun.append(1) or begin(*a))
    broken = config | {"output_dir": str(tmp_path / "broken"), "checkpoint_every": 3}
    with pytest.raises(Killed), monkeypatch.context() as patch:
        kill_at(patch, 18 + 15)  # the second task's eighth step; its last checkpoint is of the sixth, in the second epoch
        fl.run(broken)
    calls = kill_at(monkeypatch, 0)
    result = fl.run(broken)
    assert (result.path / "lineage.jsonl").read_text() == whole
    # never begun again; steps 7 to 10, of which the last has one batch; mtl's second task has the rows of both: 17 batches an epoch, 12 of which came in 6 steps
    last, left = (18, 2 * 17 - 12) if name == "mtl" else (10, 2 * 4 - 1)
    assert len(begun) == 2 and len(calls) == left
    steps = [e for e in map(json.loads, (result.path / "timing.jsonl").read_text().splitlines()) if e["event"] == "step"]
    assert [e["step"] for e in steps] == [*range(1, 11), *range(1, last + 1)]
    assert [e["learning_rate"] for e in steps] == pytest.approx([1e-3 * (n - i) / n for n in (10, last) for i in range(n)])  # as the step was taken
    assert not [p for p in (result.path / "tasks").iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    "where", ["forgetless.checkpoint.sync_tree", "forgetless.lineage.save_memory", "forgetless.lineage.sync_tree", "forgetless.lineage.write_atomic"]
)
@pytest.mark.parametrize("call", [1, 2, 3])
def test_row_3_killed_while_writing(where, call, small_run, tmp_path, monkeypatch):
    """In a checkpoint, and in every part of a commit: what is half written is as if it were not there."""
    config = small_run({"name": "gorp", "use_lora": True}, tasks=("colour", "animal"), checkpoint_every=2)
    whole = (fl.run(config | {"output_dir": str(tmp_path / "whole")}).path / "lineage.jsonl").read_text()
    with monkeypatch.context() as patch:
        kill_at(patch, call, where)
        with contextlib.suppress(Killed):
            fl.run(config)
    assert (fl.run(config).path / "lineage.jsonl").read_text() == whole


def test_row_3_a_checkpoint_of_other_settings_is_not_gone_on_from(small_run, tmp_path, monkeypatch):
    config = small_run("gorp", tasks=("colour",), checkpoint_every=2)
    with pytest.raises(Killed), monkeypatch.context() as patch:
        kill_at(patch, 4)
        fl.run(config)
    other = config | {"train": config["train"] | {"learning_rate": 5e-4}}  # nothing is committed yet, so the settings may change
    whole = (fl.run(other | {"output_dir": str(tmp_path / "whole")}).path / "lineage.jsonl").read_text()
    calls = kill_at(monkeypatch, 0)
    assert (fl.run(other).path / "lineage.jsonl").read_text() == whole and len(calls) == 6


def test_row_3_the_time_before_a_kill_counts(small_run, monkeypatch):
    config = small_run("gorp", tasks=("colour",), checkpoint_every=2)
    with pytest.raises(Killed), monkeypatch.context() as patch:
        kill_at(patch, 4)
        fl.run(config)
    (stamp,) = (Path(config["output_dir"]) / "tasks").glob(".*.training/*/forgetless.json")
    saved = json.loads(stamp.read_text())
    stamp.write_text(json.dumps(saved | {"seconds": 1000.0}))
    events = [json.loads(line) for line in (fl.run(config).path / "timing.jsonl").read_text().splitlines()]
    assert 1000 < events[-1]["train_seconds"] < 1100


# -- row 5: the exported model is the model in memory ------------------------------------------------------------------------------------


@every
def test_row_5_the_saved_model_is_the_one_that_was_measured(name, options, finished):
    _, result = finished(name, options)
    folder = RunFolder(result.path)
    for line in folder.lineage():
        saved = AutoModelForCausalLM.from_pretrained(result.path / "tasks" / f"{line['index']:02d}-{line['task']}" / "model")
        assert model_sha256(saved) == line["model_sha256"]
    assert (result.path / "model").resolve().parent.name == folder.committed()[-1] == "01-animal"
    folder.close()


@pytest.mark.parametrize("tied", [False, True])
def test_row_5_tied_weights_are_saved_and_hashed_once(tied, tmp_path, small_run):
    source = make_model_folder(tmp_path / "m", tied=tied)
    result = fl.run(small_run("gorp", tasks=("colour",), model=source))
    saved = AutoModelForCausalLM.from_pretrained(result.path / "model")
    assert (saved.lm_head.weight.data_ptr() == saved.model.embed_tokens.weight.data_ptr()) == tied


# -- row 6: what is matched, what is left alone ------------------------------------------------------------------------------------------


@every
def test_row_6_parameters_outside_the_groups_stay_bit_identical(name, options, finished, tiny):
    _, result = finished(name, options)
    base, after = AutoModelForCausalLM.from_pretrained(tiny), AutoModelForCausalLM.from_pretrained(result.path / "model")
    again = copy.deepcopy(base)
    method = get(name, **options)
    groups = method.param_groups(method.begin_task(again, None, Memory()))
    trained = {re.sub("(lora_[AB]|C)$", "weight", n) for g in groups for n in g["names"]}
    moved = {n for (n, a), (_, b) in zip(base.named_parameters(), after.named_parameters(), strict=True) if not torch.equal(a, b)}
    assert bool(moved) == (name not in ROUTED) and moved <= trained
    if trains(name, options) not in [(everything, {}) for everything in EVERYTHING]:
        assert not any("norm" in n or "embed" in n or "lm_head" in n for n in moved)


@pytest.mark.parametrize(
    ("name", "options"),
    [("gorp", {"full_modules": ["q_prj"]}), ("gorp", {"use_lora": True, "lora_modules": ["q_prj"]}), ("seqft", {"modules": ["q_prj"]})]
    + [(name, {"lora_modules": ["q_prj"]}) for name in ("lora", "inclora", "olora", "nlora", "inflora", "ella", "slao")],
)
def test_row_6_no_module_matched_names_the_nearest(name, options, loaded):
    with pytest.raises(ConfigError, match=r"q_prj.*matches no linear layer.*q_proj"):
        get(name, **options).check(loaded[0])


def test_row_6_a_tied_head_is_refused_as_a_target(tmp_path):
    model, _ = models.load(make_model_folder(tmp_path / "m", tied=True))
    with pytest.raises(ConfigError, match="shares its weight"):
        get("gorp", full_modules="lm_head").param_groups(model)


def test_row_6_the_bias_of_a_constrained_layer_is_frozen(loaded):
    model, _ = loaded
    layer = model.model.layers[0].mlp.down_proj
    layer.bias = torch.nn.Parameter(torch.zeros(layer.out_features))
    assert not any(p is layer.bias for g in get("gorp").param_groups(model) for p in g["params"])


# -- row 7 (what exists of it): bytes, and gradients under accumulation ------------------------------------------------------------------


@every
def test_row_7_declared_bytes_are_measured_bytes(name, options, loaded):
    model, tokenizer = loaded
    method, memory = get(name, **({"energy": 0.5} if name == "gorp" else {}), **options), Memory()
    learn(model, tokenizer, method, memory, 3, seed=0)
    groups = method.param_groups(method.begin_task(copy.deepcopy(model), None, memory))
    own = name in OWN_OPTIMIZER
    planned = (method.optimizer(groups, lr=1e-3) if own else SubspaceAdamW(groups, lr=1e-3)).planned_bytes()
    opt, *_ = learn(model, tokenizer, method, memory, 3, seed=1)
    assert (own or isinstance(opt, SubspaceAdamW)) and opt.state_bytes() == planned


@pytest.mark.parametrize("name", REGISTRY)
def test_row_7_accumulation_gives_the_gradient_and_loss_of_one_large_batch(name, small_run, tmp_path, monkeypatch):
    """Rows of unequal answer length, so that a mean of micro-batch means would be wrong."""
    seen = []
    monkeypatch.setattr(
        get(name).__class__,
        "on_step",
        lambda self, model: seen.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}),
    )
    rows = [{"prompt": f"cat {w}", "completion": answer} for w in ("red", "green", "blue", "apple") for answer in ("dog", "bird runs happy sad calm")]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    losses = []
    for batch, accumulation in ((8, 1), (2, 4)):
        train = {
            "learning_rate": 1e-3,
            "max_steps": 1,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "bf16": False,
            "use_cpu": True,
        }
        task = {"name": "t", "data": str(data), "test": str(data), "dev": str(data), "format": "prompt_completion"}
        result = fl.run(
            {
                "model": small_run()["model"],
                "tasks": [task],
                "method": {"name": name}
                | ({"lora_dropout": 0} if "lora" in name or name in ADAPTERS else {"release_gradients": False} if name == "osft" else {}),
                "train": train,
                "evaluate": {"scorers": ["exact_match"]},
                "output_dir": str(tmp_path / f"{batch}"),
            }
        )
        losses.append(json.loads((result.path / "timing.jsonl").read_text().splitlines()[0])["loss"])
    one, four = seen
    assert one.keys() == four.keys() and one
    for key in one:
        torch.testing.assert_close(one[key], four[key], atol=1e-6, rtol=1e-4)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# -- row 8: the same seed ----------------------------------------------------------------------------------------------------------------


@every
def test_row_8_same_seed_same_weights_and_lineage(name, options, finished, tmp_path):
    config, result = finished(name, options)
    one = (result.path / "lineage.jsonl").read_text()
    assert one == (fl.run(config | {"output_dir": str(tmp_path / "two")}).path / "lineage.jsonl").read_text()
    other = fl.run(config | {"output_dir": str(tmp_path / "three"), "seed": 1, "tasks": config["tasks"][:1]})  # its first task says enough
    if name in ROUTED:
        states = [load_memory(path / "tasks" / "00-colour" / "state").tensors for path in (result.path, other.path)]
        assert states[0].keys() == states[1].keys() and not all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        return
    hashes = [json.loads(text.splitlines()[0])["model_sha256"] for text in (one, (other.path / "lineage.jsonl").read_text())]
    assert hashes[0] != hashes[1]


@every
def test_method_state_survives_a_file_loaded_with_weights_only(name, options, loaded):
    """Contract row 3's part that exists: what a method collects inside a task goes through torch.save and weights_only=True and comes back the same."""
    model, tokenizer = loaded
    one, two = get(name, **options), get(name, **options)
    plain = copy.deepcopy(model)
    one.begin_task(model, None, Memory())
    model.eval()  # without dropout
    for batch in batches(tokenizer, 3, 0):
        model.zero_grad()
        model(**batch).loss.backward()
        one.on_step(model)
    buffer = io.BytesIO()
    torch.save(one.state_dict(), buffer)
    buffer.seek(0)
    two.resume_task(plain, None, Memory(), torch.load(buffer, weights_only=True))
    for batch in batches(tokenizer, 3, 1):
        model.zero_grad()
        model(**batch).loss.backward()
        one.on_step(model)
        two.on_step(model)
    a, b = Memory(), Memory()
    one.tokenizer = two.tokenizer = tokenizer
    two.end_task(copy.deepcopy(model), some_task(), b)
    one.end_task(model, some_task(), a)
    assert a.tensors.keys() == b.tensors.keys() and all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)


def test_the_state_folder_holds_no_pickle(small_run):
    result = fl.run(small_run("gorp", tasks=("colour",)))
    kinds = {p.suffix for p in (result.path / "tasks").rglob("*") if p.is_file()}
    assert kinds <= {".safetensors", ".json", ".jsonl", ".jinja"}
    assert load_memory(result.path / "tasks" / "00-colour" / "state").tensors


# -- found by review: each was wrong once --------------------------------------------------------------------------------------------------


def test_the_largest_seed_works(small_run):
    fl.run(small_run("gorp", tasks=("colour",), seed=4_000_000))


def test_a_stale_before_row_of_an_attempt_that_committed_nothing_is_dropped(small_run, monkeypatch):
    import forgetless.loop as loop

    def killed(*_, **__):
        raise KeyboardInterrupt

    config = small_run("gorp", tasks=("colour",))
    monkeypatch.setattr(loop, "train_task", killed)
    with pytest.raises(KeyboardInterrupt):
        fl.run(config | {"evaluate": {"limit": 8, "unseen": True}})
    monkeypatch.undo()
    assert fl.run(config).matrix.before is None


def test_a_kill_right_after_the_commit_loses_no_leak_and_no_loss(small_run, monkeypatch):
    config = small_run("gorp", tasks=("colour",))

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "note_task", killed)
    with pytest.raises(KeyboardInterrupt):
        fl.run(config)
    monkeypatch.undo()
    result = fl.run(config)
    events = [json.loads(line) for line in (result.path / "timing.jsonl").read_text().splitlines()]
    assert result.resumed_at == 1 and [e["event"] for e in events] == ["step"] * 6 + ["task"] and events[-1]["steps"] == 6
    fl.run(config)
    assert len((result.path / "timing.jsonl").read_text().splitlines()) == 7  # once


def test_a_model_changed_behind_the_lineage_is_refused(small_run):
    from safetensors.torch import load_file, save_file

    from forgetless.errors import DataError

    config = small_run("gorp", tasks=("colour",))
    path = fl.run(config).path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(DataError, match="tasks/00-colour/model/model.safetensors: its bytes are not those that were committed"):
        fl.run(small_run("gorp", tasks=("colour", "animal")))


def test_run_yaml_holds_every_default_and_a_changed_default_is_a_changed_run(small_run):
    import yaml

    config = small_run("gorp", tasks=("colour",))
    saved = yaml.safe_load((fl.run(config).path / "run.yaml").read_text())
    assert (
        saved["method"]["rank"] is None
        and saved["method"]["energy"] == 0.95
        and saved["train"]["lr_scheduler_type"] == "constant"
        and saved["train"]["bf16"] is False
    )
    fl.run(config | {"method": {"name": "gorp", "rank": None}})  # the same, said aloud
    with pytest.raises(ConfigError, match=r"method\.energy: 0\.95, now method\.energy: 0\.9\."):
        fl.run(config | {"method": {"name": "gorp", "energy": 0.9}})


def test_recording_inputs_leaves_no_dropout_and_no_mode_behind(loaded):
    from forgetless.evaluation.drift import record_inputs

    model, tokenizer = loaded
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(module.training))
    model.train()
    record_inputs(model, tokenizer, some_task(), seed=0)
    assert seen and not any(seen) and model.training


# -- bf16 weights ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["seqft", "gorp", "gorp-rank", "gorp-branches", "lora"])
def test_bf16_weights_learn_with_fp32_masters_and_stall_without(name, small_run, tmp_path):
    """At a rate of 1e-6 a step is far below half an ulp of bf16: plain rounding moves next to nothing, masters as far as fp32 weights go, up to their last rounding."""
    method = {"name": name.split("-")[0], **VARIANTS[name]}
    train = {"learning_rate": 3e-6, "max_steps": 60, "per_device_train_batch_size": 4, "bf16": False, "use_cpu": True}

    def moved(where: str, **changes) -> float:
        config = small_run(method, tasks=("colour",), train=train, evaluate={"limit": 2}, **changes)
        after = AutoModelForCausalLM.from_pretrained(fl.run(config | {"output_dir": str(tmp_path / where)}).path / "model", dtype=torch.float32)
        base = AutoModelForCausalLM.from_pretrained(config["model"]).to(getattr(torch, changes.get("dtype", "float32"))).float()
        return float(sum((a - b).detach().double().norm() ** 2 for a, b in zip(after.parameters(), base.parameters(), strict=True)) ** 0.5)

    exact = moved("fp32")
    master, plain = (moved(p, dtype="bfloat16", precision=p) for p in ("fp32_master", "plain"))
    assert exact > 0
    if name == "lora":  # an adapter is fp32 whatever the weights are; what is left of it in a bf16 weight is another matter
        return
    assert plain < 0.75 * exact and master > 0.9 * exact


@pytest.mark.parametrize("name", ["gorp", "seqft", "lora"])
def test_row_3_under_bf16_autocast(name, small_run, tmp_path, monkeypatch):
    """Every task is trained under it, not only the first of a process, which is what a resumed run would begin with."""
    train = {"learning_rate": 1e-3, "max_steps": 6, "per_device_train_batch_size": 4, "bf16": True, "use_cpu": True}
    config = small_run(name, tasks=("colour", "animal"), train=train)
    dtypes, linear, loss = [], torch.nn.functional.linear, importlib.import_module("forgetless.trainer").answer_loss

    def step(*args):
        with monkeypatch.context() as patch:
            patch.setattr("torch.nn.functional.linear", lambda *a: dtypes.append((y := linear(*a)).dtype) or y)
            return loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr("forgetless.trainer.answer_loss", step)
        whole = (fl.run(config | {"output_dir": str(tmp_path / "whole")}).path / "lineage.jsonl").read_text()
    assert set(dtypes) == {torch.bfloat16} and len(dtypes) % 12 == 0
    with pytest.raises(Killed), monkeypatch.context() as patch:
        kill_at(patch, 9)
        fl.run(config)
    assert (fl.run(config).path / "lineage.jsonl").read_text() == whole


@pytest.mark.parametrize("precision", ["fp32_master", "stochastic_rounding", "kahan"])
def test_row_3_with_bf16_weights(precision, small_run, tmp_path, monkeypatch):
    """Masters, compensation and the draws of stochastic rounding go on where they were."""
    config = small_run("gorp", tasks=("colour",), dtype="bfloat16", precision=precision, checkpoint_every=2)
    whole = (fl.run(config | {"output_dir": str(tmp_path / "whole")}).path / "lineage.jsonl").read_text()
    with pytest.raises(Killed), monkeypatch.context() as patch:
        kill_at(patch, 4)
        fl.run(config)
    result = fl.run(config)
    assert (result.path / "lineage.jsonl").read_text() == whole
    assert AutoModelForCausalLM.from_pretrained(result.path / "model", dtype="auto").dtype == torch.bfloat16


def test_row_1_bf16_weights_with_masters_keep_the_bound(small_run):
    config = small_run("gorp", tasks=("colour", "animal"), dtype="bfloat16")
    events = [json.loads(line) for line in (fl.run(config).path / "timing.jsonl").read_text().splitlines()]
    last = [e for e in events if e["event"] == "task"][-1]
    assert 0 < last["weight_leak"] <= last["weight_leak_bound"] and last["update_leak"] < 1e-5

"""Methods beside methods: what goes together, what is refused by name, and what a review found to go wrong in silence."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
import yaml
from conftest import make_model_folder, write_task
from test_beside import trained, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

import forgetless as fl
from forgetless.config import TaskConfig
from forgetless.errors import ConfigError, Diverged
from forgetless.methods import REGISTRY, get
from forgetless.methods._statistics import row_gradients
from forgetless.methods.base import Memory
from forgetless.methods.esacl import critical
from forgetless.models import linear_modules
from forgetless.protect import input_sums
from forgetless.tasks import load_task

REFUSED = [
    ({"name": "per_task", "on": "routed"}, "per_task: not on: routed: what it leaves of each task is not in one model's weights"),
    ({"name": "per_task", "on": "prompt"}, "per_task: not on: prompt"),
    ({"name": "mtl", "on": "prompt"}, "mtl: not on: prompt"),
    ({"name": "ewc", "on": "prompt"}, "ewc: not on: prompt: it leaves several models"),
    ({"name": "lwf", "on": "routed"}, "lwf: not on: routed: it leaves several models"),
    ({"name": "ewc", "on": "mtl"}, "ewc: not on: mtl: it learns all tasks anew"),
    ({"name": "replay", "on": "mtl"}, "replay: not on: mtl: it trains on every row"),
    ({"name": "mtl", "on": "ewc"}, "mtl: not on: ewc: it acts by what earlier tasks have left"),
    ({"name": "per_task", "on": "lwf"}, "per_task: not on: lwf: it acts by"),
    ({"name": "per_task", "on": "replay"}, "per_task: not on: replay: it acts by"),
    ({"name": "mtl", "on": {"name": "merge", "rule": "ema"}}, "mtl: not on: merge: it acts by"),
    ({"name": "lwf", "on": "mtl"}, "lwf: not on: mtl: it begins at the untouched model"),
    ({"name": "lwf", "on": {"name": "merge", "rule": "arithmetic"}}, "lwf: on: merge trains from weights that are not the last commit's"),
    ({"name": "merge", "rule": "arithmetic", "on": "lwf"}, "merge: with start: pretrained lwf would hold on to other weights"),
    ({"name": "merge", "rule": "ema", "on": "mtl"}, "merge: not on: mtl"),
    ({"name": "lines", "on": "per_task"}, "lines: not on: per_task: it leaves several models"),
    ({"name": "lines", "on": "slao"}, "lines: not on: slao"),
    ({"name": "merge", "on": "esacl"}, "merge: not on: esacl: what it has pruned would not stay 0"),
    ({"name": "ewc", "post": "lines"}, "lines: not on: ewc: .*ewc on: lines"),
    ({"name": "replay", "on": "prompt"}, "replay: not on: prompt"),
    ({"name": "replay", "on": {"name": "ewc", "on": "replay"}}, "replay: on: has replay in it again"),
]


@pytest.mark.parametrize(("method", "said"), REFUSED, ids=[json.dumps(m)[:60] for m, _ in REFUSED])
def test_what_would_make_no_sense_is_refused_before_the_first_step(method, said, small_run):
    with pytest.raises(ConfigError, match=said):
        fl.run(small_run(method, tasks=("colour",)))


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"name": "merge", "keep": 0.5}, "keep is read by rule: ties, and the rule is average"),
        ({"name": "ewc", "gamma": 0.1}, "gamma is how fast form: online forgets"),
        ({"name": "replay", "temperature": 2.0}, "temperature is read in mode: self_synthesised"),
        ({"name": "replay", "mode": "self_synthesised", "per": "total"}, "self_synthesised keeps none"),
        ({"name": "replay", "mode": "self_synthesised", "seed_text": [" "]}, "an empty text is no beginning"),
        ({"name": "lines", "beta": -5.0}, "would turn the last block's change round"),
        ({"name": "lines", "beta": float("nan")}, "beta: .*finite"),
        ({"name": "merge", "rule": "ties", "scale": float("inf")}, "scale: .*finite"),
        ({"name": "seqft", "self": 1}, "unknown option 'self'"),
        ({"name": "ewc", "on": {"name": "gorp", "rnk": 4}}, "method gorp: unknown option 'rnk'; did you mean 'rank'"),
    ],
)
def test_options_that_would_do_nothing_or_harm_are_refused(method, said):
    with pytest.raises(ConfigError, match=said):
        get(**method)


NOT_BEFORE = {  # what `post` cannot come after, and in which words it says so
    "routed": "leaves several models", "gainlora": "leaves several models", "prompt": "leaves several models", "per_task": "leaves several models",
    "slao": "takes the adapter it has left out", "esacl": "would not stay 0", "ewc": "the other way round they are: ewc on: lines",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in REGISTRY if name != "lines"])
def test_lines_come_after_any_method(name, tiny, tmp_path):
    """With alpha and beta 0 nothing of what a task has changed is left: two tasks by any method, and the model is what it was. Or it is refused, and says why."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tasks = [load_task(TaskConfig(**write_task(tmp_path / "data", task, rows=12))) for task in ("colour", "animal")]
    model, method, memory = AutoModelForCausalLM.from_pretrained(tiny), get("lines", alpha=0.0, beta=0.0, on=name), Memory()
    if name in NOT_BEFORE:
        with pytest.raises(ConfigError, match=NOT_BEFORE[name]):
            method.check(model)
        return
    method.check(model)
    start, ends, end = {key: W.clone() for key, W in model.state_dict().items()}, [], method.on.end_task
    method.on.end_task = lambda *given: ends.append(weights(out := end(*given))) or out
    for task in tasks:
        model = trained(method, model, tokenizer, task, memory)
        assert any(not torch.equal(W, start[key]) for key, W in ends[-1].items()), "nothing was learned"
        assert model.state_dict().keys() == start.keys()
        for key, W in model.state_dict().items():
            torch.testing.assert_close(W, start[key], rtol=0, atol=1e-6)  # an adapter is taken out and put in again


def test_beside_an_upper_bound_goes_what_acts_without_earlier_tasks(tiny):
    for on in ({"name": "lwf", "first_task": True}, {"name": "replay", "mode": "self_synthesised"}, {"name": "lines"}, {"name": "gorp"}):
        get("mtl", on=on).check(AutoModelForCausalLM.from_pretrained(tiny))
        get("per_task", on=on).check(AutoModelForCausalLM.from_pretrained(tiny))


def test_post_takes_no_on(small_run):
    with pytest.raises(ConfigError, match="post: goes beside the method it stands in"):
        fl.load_config(small_run({"name": "gorp", "post": {"name": "lines", "on": "seqft"}}))


@pytest.mark.parametrize("method", ["prompt", "gainlora", {"name": "replay", "on": "gainlora"}])
def test_packing_is_refused_where_rows_have_something_of_their_own(method, small_run):
    with pytest.raises(ConfigError, match="packing: method .* gives each row something of its own"):
        fl.run(small_run(method, tasks=("colour",), packing=True))


def test_ewc_and_quantised_weights_are_refused_before_anything_is_trained(small_run, monkeypatch):
    monkeypatch.setattr("forgetless.loop.train_task", lambda *a: pytest.fail("trained"))
    with pytest.raises(ConfigError, match="quantize: method ewc holds the weights where they were"):
        fl.run(small_run({"name": "ewc", "on": "inclora"}, tasks=("colour",), quantize="4bit"))


def test_a_step_aside_that_bf16_would_round_away_is_refused(small_run):
    with pytest.raises(ConfigError, match="esacl: rho.*16-bit"):
        fl.run(small_run("esacl", tasks=("colour",), dtype="bfloat16"))


def test_what_is_not_finite_after_the_task_is_not_committed(small_run, monkeypatch):
    module = importlib.import_module("forgetless.methods.lines")
    monkeypatch.setattr(module.LiNeS, "share", lambda self, model, name: float("inf"))
    config = small_run({"name": "gorp", "post": "lines"}, tasks=("colour",))
    with pytest.raises(Diverged, match="lines: the weights are no longer finite"):
        fl.run(config)


def test_a_task_too_small_for_a_whole_batch_is_refused_beside_replay_too(small_run, tmp_path):
    """What is replayed is no row of the task: it made the task look large enough, and it was committed without a step."""
    config = small_run("replay", tasks=("colour", "animal"))
    config["tasks"][1]["limit"] = 6
    config["train"] |= {"dataloader_drop_last": True, "per_device_train_batch_size": 8}
    with pytest.raises(ConfigError, match="task 'animal': 6 rows make no whole batch of 8"):
        fl.run(config)


def test_beside_mtl_what_replay_adds_is_what_comes_at_its_rate(small_run, monkeypatch):
    """The rows of earlier tasks are the task's own to replay's order; only what it has made up is replayed."""
    seen = []
    module = importlib.import_module("forgetless.methods.replay")
    real = module.Replaying
    monkeypatch.setattr(module, "Replaying", lambda own, replayed, *a: seen.append((own, replayed)) or real(own, replayed, *a))
    method = {"name": "mtl", "on": {"name": "replay", "mode": "self_synthesised", "max_new_tokens": 4}}
    kept = []
    train = module.Replay.train_data
    monkeypatch.setattr(module.Replay, "train_data", lambda self, *a: kept.append(self) or train(self, *a))
    rows = []
    mtl = importlib.import_module("forgetless.methods.mtl").MTL
    whole = mtl.train_data
    monkeypatch.setattr(mtl, "train_data", lambda self, *a: rows.append(whole(self, *a)) or rows[-1])
    fl.run(small_run(method, tasks=("colour", "animal")))
    made = kept[-1].generated
    assert made and rows[-1][-len(made) :] == made and seen[-1] == (len(rows[-1]) - len(made), len(made))


def test_lwf_pulls_the_same_however_a_batch_is_cut(small_run, tmp_path, monkeypatch):
    """Rows of unequal answer length: a mean of micro-batch means would be another pull. In the second step, where the models differ."""
    seen = []
    monkeypatch.setattr(get("seqft").__class__, "on_step", lambda self, model: seen.append([p.grad.clone() for p in model.parameters()]))
    rows = [{"prompt": f"cat {w}", "completion": a} for w in ("red", "green", "blue", "apple") for a in ("dog", "bird runs happy sad calm cat dog")]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    task = {"name": "t", "data": str(data), "test": str(data), "dev": str(data), "format": "prompt_completion"}
    for batch, accumulation in ((8, 1), (2, 4)):
        train = {
            "learning_rate": 1e-2,
            "max_steps": 2,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "bf16": False,
        }
        fl.run(
            {"model": small_run()["model"], "tasks": [task], "method": {"name": "lwf", "strength": 50.0, "first_task": True}, "train": train | {"use_cpu": True},
             "evaluate": {"scorers": ["exact_match"]}, "output_dir": str(tmp_path / f"{batch}")}
        )  # fmt: skip
    for whole, cut in zip(seen[1], seen[3], strict=True):
        torch.testing.assert_close(cut, whole, atol=2e-5, rtol=1e-3)


def test_an_option_that_is_new_to_the_method_beside_counts_as_its_default(small_run):
    config = small_run({"name": "ewc", "on": {"name": "gorp", "rank": 4}}, tasks=("colour",))
    path = fl.run(config).path / "run.yaml"
    saved = yaml.safe_load(path.read_text())
    assert saved["method"]["on"].pop("stagger") is False
    path.write_text(yaml.safe_dump(saved))
    assert fl.run(config).resumed_at == 1


def test_a_head_s_inputs_are_those_of_every_token(tiny):
    """The head is asked for its last position alone, where nobody says otherwise: a protected head would be protected on one token a row."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    layers = {"lm_head": model.lm_head, "down": model.model.layers[0].mlp.down_proj}
    sums, _ = input_sums(model, layers, [[2, 3, 4, 5], [6, 7, 8]])
    assert [len(sums[name].of[0]) for name in layers] == [7, 7]
    sums, _ = input_sums(model, {"down": layers["down"]}, [[2, 3, 4, 5]])
    assert len(sums["down"].of[0]) == 4


def test_rows_are_measured_without_dropout(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_model_folder(tmp_path / "m", kind="gpt2"))
    assert model.config.resid_pdrop > 0
    model.train()
    rows = [{"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]}, {"input_ids": [7, 8, 9], "labels": [-100, 8, 9]}]
    name = next(iter(linear_modules(model))) + ".weight"
    one, two = ([g[name] for g in row_gradients(model, rows, [name])] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True)) and model.training
    torch.manual_seed(0)
    chosen = critical(model, rows * 8, 0.5)
    torch.manual_seed(1)
    assert critical(model, rows * 8, 0.5) == chosen and model.training

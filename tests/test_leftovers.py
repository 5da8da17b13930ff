"""What one task leaves to the next in one process, and options of `train` that must work or be refused."""

from __future__ import annotations

import importlib
import json
import random
import weakref

import pytest
import torch
import yaml
from conftest import CHAT, make_model_folder

import forgetless as fl
from forgetless import models
from forgetless.errors import ConfigError
from forgetless.lineage import load_memory
from forgetless.methods import get
from forgetless.methods.seqft import SeqFT

trainer = importlib.import_module("forgetless.trainer")
loop = importlib.import_module("forgetless.loop")


class Killed(BaseException): ...


def kill_at(monkeypatch, call):
    real, calls = trainer.answer_loss, []

    def counted(*args):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return real(*args)

    monkeypatch.setattr(trainer, "answer_loss", counted)


def lineage(result):
    return (result.path / "lineage.jsonl").read_text()


def without_pad(folder, **kind):
    source = make_model_folder(folder, **kind)
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | {"pad_token_id": None}))
    return source


def test_a_model_without_a_pad_token_is_resumed_as_it_was(small_run, tmp_path, monkeypatch):
    """Reloaded with one, its nn.Embedding would give that token no gradient; it closes every turn of a conversation."""
    rows = [[{"role": r, "content": c} for r, c in (("user", a), ("assistant", "red"), ("user", "cat dog"), ("assistant", b))]
            for a in ("cat", "dog", "bird", "apple") for b in ("yes", "no", "maybe")]  # fmt: skip
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"messages": m}) + "\n" for m in rows))
    tasks = [{"name": n, "data": str(data), "test": str(data), "format": "messages", "metric": "nll"} for n in ("one", "two")]
    source = without_pad(tmp_path / "m", chat_template=CHAT)
    config = small_run("seqft", model=source) | {"tasks": tasks, "evaluate": {"limit": 4, "scorers": ["exact_match"]}}
    whole = lineage(fl.run(config | {"output_dir": str(tmp_path / "whole")}))
    with pytest.raises(Killed), monkeypatch.context() as patch:
        kill_at(patch, 9)
        fl.run(config)
    assert lineage(fl.run(config)) == whole


def test_a_commit_keeps_the_config_of_the_pretrained_model(small_run, tmp_path):
    source = without_pad(tmp_path / "m")
    path = fl.run(small_run("gorp", tasks=("colour",), model=source)).path / "model"
    for name in ("config.json", "generation_config.json"):
        before, after = (json.loads((p / name).read_text()) for p in (tmp_path / "m", path))
        assert {k: v for k, v in after.items() if before.get(k) != v and k != "transformers_version"} == {}


@pytest.mark.parametrize("said", ["bf16", "fp16"])
def test_the_environment_does_not_choose_the_precision(said, small_run, tmp_path, monkeypatch):
    config = small_run("gorp", tasks=("colour",))
    plain = lineage(fl.run(config))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", said)
    assert lineage(fl.run(config | {"output_dir": str(tmp_path / "again")})) == plain
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    with pytest.raises(ConfigError, match="ACCELERATE_DYNAMO_BACKEND"):
        fl.run(config | {"output_dir": str(tmp_path / "third")})


@pytest.mark.parametrize(
    "train",
    [
        {"torch_compile": True}, {"torch_compile_backend": "eager"}, {"use_liger_kernel": True}, {"fsdp": True}, {"parallelism_config": {}},
        {"eval_on_start": True}, {"load_best_model_at_end": True}, {"auto_find_batch_size": True}, {"enable_jit_checkpoint": True},
        {"ignore_data_skip": True}, {"accelerator_config": {"use_seedable_sampler": False}}, {"average_tokens_across_devices": False},
        {"optim_args": "a=1"}, {"debug": "underflow_overflow"}, {"max_steps": 0}, {"num_train_epochs": 0},
        {"lr_scheduler_type": "cosine_with_min_lr"}, {"lr_scheduler_type": "warmup_stable_decay"}, {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"nonsense": 1}},
        {"lr_scheduler_kwargs": {"nonsense": 1}}, {"warmup_steps": 3}, {"adam_beta2": 2.0}, {"adam_beta1": "0.9"}, {"log_level": "loud"},
        {"max_steps": -1, "dataloader_drop_last": True, "per_device_train_batch_size": 500},
    ],
    ids=str,
)  # fmt: skip
def test_an_option_works_or_is_refused_in_one_message(train, small_run):
    config = small_run("gorp", tasks=("colour",))
    with pytest.raises(ConfigError, match="train"):
        fl.run(config | {"train": config["train"] | train})


def test_batches_of_like_length_are_the_same_after_a_kill(small_run, tmp_path, monkeypatch):
    train = {"learning_rate": 1e-3, "num_train_epochs": 2, "per_device_train_batch_size": 6, "train_sampling_strategy": "group_by_length", "bf16": False,
             "use_cpu": True}  # fmt: skip
    config = small_run("gorp", tasks=("colour",), train=train, checkpoint_every=3)
    whole = lineage(fl.run(config | {"output_dir": str(tmp_path / "whole")}))
    with pytest.raises(Killed), monkeypatch.context() as patch:
        kill_at(patch, 14)
        fl.run(config)
    assert lineage(fl.run(config)) == whole


def test_checkpoint_every_may_change_at_a_resume(small_run, monkeypatch):
    config = small_run("gorp", tasks=("colour",), checkpoint_every=2)
    config["train"]["max_steps"] = 12
    with pytest.raises(Killed), monkeypatch.context() as patch:
        kill_at(patch, 6)
        fl.run(config)
    saved, finish = [], trainer.Checkpoints.finish
    monkeypatch.setattr(trainer.Checkpoints, "finish", lambda self, step, *a: saved.append(step) or finish(self, step, *a))
    fl.run(config | {"checkpoint_every": 5})
    assert saved == [5, 10, 12]


def test_the_optimizer_is_gone_while_scoring_and_no_hook_stays(small_run, monkeypatch):
    refs, alive, hooks = [], [], []
    train, score = loop.train_task, loop.evaluate

    def training(*a, **k):
        result = train(*a, **k)
        refs.append(weakref.ref(result.optimizer))
        return result

    def scoring(model, *a, **k):
        alive.append(sum(r() is not None for r in refs))
        hooks.append(sum(len(m._forward_hooks) for m in model.modules()))
        return score(model, *a, **k)

    monkeypatch.setattr(loop, "train_task", training)
    monkeypatch.setattr(loop, "evaluate", scoring)
    config = small_run("seqft")
    fl.run(config | {"train": config["train"] | {"gradient_checkpointing": True}})
    assert alive == [0, 0, 0] and hooks == [0, 0, 0]


class Draws(SeqFT):
    name = "draws"

    def train_data(self, task, memory):
        return random.sample(task.train, 20)


def test_a_method_may_draw_from_pythons_generator(small_run, tmp_path):
    config = small_run({"name": f"{__name__}:Draws"}, tasks=("colour",))
    assert lineage(fl.run(config)) == lineage(fl.run(config | {"output_dir": str(tmp_path / "again")}))


def test_first_moments_of_a_checkpoint_go_to_the_gradients_device():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        method, G = get("gorp", space_from="first_moment", full_modules=".*"), torch.empty(4, 4, device="cuda")
        method.max_grad_norm = None
        method.gradients = lambda model: {"full/x": G}
        method.load_state_dict({"full/x": torch.zeros(4, 4)})
        method.on_step(None)
        assert method.statistics["full/x"].device.type == "cuda"


def test_weight_decay_leaves_norms_and_biases_alone(small_run):
    config = small_run("seqft", tasks=("colour",))
    before = models.load(config["model"])[0]
    config["train"] |= {"learning_rate": 1e-30, "weight_decay": 1e28}  # a decay of one hundredth a step, and next to no step of Adam's
    after = models.load(str(fl.run(config).path / "model"))[0]
    decayed = {n for (n, p), q in zip(before.named_parameters(), after.parameters(), strict=True) if not torch.equal(p, q)}
    assert decayed == {n for n, p in before.named_parameters() if p.ndim > 1}


@pytest.mark.parametrize(
    "train", [{"num_train_epochs": 1.5}, {"num_train_epochs": 0.5}, {"num_train_epochs": 2, "dataloader_drop_last": True}], ids=str
)
def test_the_steps_shown_are_the_steps_taken(train, small_run):
    shown = []

    class Shown(fl.progress.Progress):
        def stage(self, name, total):
            shown.append(total) if "training" in name else None
            super().stage(name, total)

    config = small_run("gorp", tasks=("colour",))
    config["train"] = {k: v for k, v in config["train"].items() if k != "max_steps"} | train
    result = fl.run(config, progress=Shown())
    assert shown == [len(json.loads((result.path / "tasks/00-colour/metrics.json").read_text())["steps"])]


def test_what_is_loaded_lies_where_what_is_made_does(small_run):
    """torch allocates at multiples of 64; safetensors leaves tensors at any address, and there a product may round otherwise."""
    path = (
        fl.run(small_run({"name": "gorp", "use_lora": True, "side": "outputs", "use_full_rank": False}, tasks=("colour",))).path / "tasks/00-colour"
    )
    loaded = [*load_memory(path / "state").tensors.values(), *models.load(str(path / "model"))[0].parameters()]
    assert {t.data_ptr() % 64 for t in loaded} == {0}


def test_a_run_of_a_version_without_an_option_goes_on(small_run):
    """What an older version wrote lacks the options that have come since: they count as their defaults, and nothing else may differ."""
    config = small_run("seqft", tasks=("colour",))
    path = fl.run(config).path / "run.yaml"
    saved = yaml.safe_load(path.read_text())
    assert saved["method"].pop("state") == "adam"
    path.write_text(yaml.safe_dump(saved))
    more = small_run("seqft", tasks=("colour", "animal"))
    assert fl.run(more).resumed_at == 1
    with pytest.raises(ConfigError, match=r"method\.state: adam, now method\.state: galore"):
        fl.run(more | {"method": {"name": "seqft", "state": "galore"}})

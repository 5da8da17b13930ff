"""forgetless in other people's training loops: transformers' Trainer and Seq2SeqTrainer, TRL's SFTTrainer, Fabric, a loop by hand. What a run promises holds there too."""

from __future__ import annotations

import gc
import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model_folder, run_config, write_task
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback, TrainingArguments, set_seed

import forgetless as fl
from forgetless import foreign, models
from forgetless.batches import Collate, Encoded, answer_loss
from forgetless.config import TaskConfig
from forgetless.errors import ConfigError, DataError, Diverged
from forgetless.evaluation.drift import weight_leak
from forgetless.methods import REGISTRY, get
from forgetless.methods.base import Memory
from forgetless.optim import SubspaceAdamW
from forgetless.progress import Progress
from forgetless.state import load_memory
from forgetless.tasks import load_task
from forgetless.trainer import train_task

TRAIN = {
    "learning_rate": 1e-3, "max_steps": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "weight_decay": 0.1, "max_grad_norm": 1.0,
    "bf16": False, "use_cpu": True,
}  # fmt: skip
QUIET = {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "lr_scheduler_type": "constant"}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    return [load_task(TaskConfig(**write_task(folder, name))) for name in ("colour", "animal")]


class Answers(Trainer):
    """A Trainer of somebody else, whose loss is the answer's: so that what differs from ours can only be how the method is called."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return answer_loss(model, inputs, num_items_in_batch)[0] * self.args.world_size  # the items are counted over all processes


def arguments(folder, kind=TrainingArguments, **changes):
    return kind(**({"output_dir": str(folder), "remove_unused_columns": False} | QUIET | TRAIN | changes))


def trainer_of(model, tokenizer, task, folder, callback=None, optimizer=None, **changes):
    trainer = Answers(
        model, arguments(folder, **changes), train_dataset=Encoded(task, tokenizer, task.train), data_collator=Collate(model), processing_class=tokenizer,
        callbacks=[callback] if callback else None, optimizer_cls_and_kwargs=optimizer or fl.optimizer_cls_and_kwargs(callback.method),
    )  # fmt: skip
    trainer.model_accepts_loss_kwargs = True  # answer_loss divides by the tokens of the whole step
    return trainer


def in_a_trainer(folder, model_folder, tasks, method, options, dtype=torch.float64, given=False, **changes):
    """(model, memory, callbacks) after these tasks, a Trainer and a callback for each; each state through a folder. given: the callback is told the task's rows."""
    model, tokenizer = models.load(model_folder, dtype=dtype)
    state, callbacks = None, []
    for i, task in enumerate(tasks):
        callback = fl.ContinualCallback(get(method, **options), task=task if given else task.name, state=state, save_to=folder / task.name)
        trainer_of(model, tokenizer, task, folder / "out", callback, seed=i, **changes).train()
        state, callbacks = folder / task.name, [*callbacks, callback]
    return model, load_memory(state), callbacks


def by_ourselves(model_folder, tasks, method, options, dtype=torch.float64, memory=None, first=0, model=None):
    """(model, memory) after the same tasks as a run trains them; memory, first and model: where it goes on."""
    loaded, tokenizer = models.load(model_folder, dtype=dtype)
    model, memory, method = model or loaded, memory or Memory(), get(method, **options)
    for i, task in enumerate(tasks, first):
        method.tokenizer = tokenizer
        set_seed(i)
        model = method.begin_task(model, task, memory)
        train_task(model, tokenizer, task, method, task.train, dict(TRAIN), i, Progress())
        model = method.end_task(model, task, memory)
    return model, memory


def same_attention(monkeypatch):
    monkeypatch.setattr("forgetless.trainer.eager_pays", lambda *_: False)  # our own Trainer chooses it by speed, which rounds otherwise


def farthest(one, other) -> float:
    """The largest difference of two models, or of two memories with the same names."""
    one, other = (x.tensors if isinstance(x, Memory) else x.state_dict() for x in (one, other))
    assert set(one) == set(other)
    return max((float((one[key].double() - other[key].double()).abs().max()) for key in one if one[key].numel()), default=0.0)


def span_distance(V, W) -> float:
    """||V V^T - W W^T||: nought where two bases are of one space."""
    V, W = V.double(), W.double()
    return float(torch.linalg.matrix_norm(V @ V.mT - W @ W.mT))


# -- the same numbers ----------------------------------------------------------------------------------------------------------------------

METHODS = {
    "seqft": {}, "gorp": {}, "gorp-rank": {"rank": 8}, "gorp-branches": {"use_lora": True, "rank": 4}, "osft": {"protect": "weights"}, "osft-adapter": {"form": "adapter"},
    "osft-inputs": {"protect": "inputs"}, "gpm": {}, "migu": {}, "sara": {}, "lora": {}, "inclora": {}, "olora": {}, "inflora": {},
    "ewc-gorp": {"on": {"name": "gorp", "energy": 0.5}}, "ogd": {}, "treelora": {}, "esacl": {}, "nlora": {}, "ella": {"strength": 1.0}, "slao": {}, "ewc": {},
    "lines": {"on": {"name": "gorp"}}, "merge": {"on": "inclora"}, "sara-nuclear": {"nuclear": 0.01, "share": 0.2}, "gorp-paper": {"preset": "paper"},
    "gorp-outputs": {"side": "outputs", "rank": 8}, "osft-adaptive": {"frozen_ratio": "adaptive", "target_ratio": 0.5}, "seqft-galore": {"state": "galore"},
    "gorp-kept": {"rank": 8, "release_gradients": False},
}  # fmt: skip
OFTEN = {"seqft", "gorp", "gorp-branches", "osft", "osft-inputs", "gpm", "migu", "sara", "lora", "inclora", "olora", "inflora", "ewc-gorp", "esacl"}
REFUSED = {
    "replay": "trains on rows beside the task's", "mtl": "trains on rows beside the task's", "per_task": "leaves several models", "routed": "leaves several models",
    "gainlora": "leaves several models", "prompt": "leaves several models", "lwf": "reads the batches", "badam": "reads the batches",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options"), [pytest.param(v.split("-")[0], o, id=v, marks=[pytest.mark.slow] * (v not in OFTEN)) for v, o in METHODS.items()]
)
def test_two_trainers_in_a_row_do_what_a_run_does(tiny, tasks, tmp_path, monkeypatch, name, options):
    """With weight decay, clipping and accumulation, in fp64: the weights after the second task, and all that is kept for a third."""
    same_attention(monkeypatch)
    model, memory, callbacks = in_a_trainer(tmp_path, tiny, tasks, name, options, given=name in ("inflora", "ogd"))
    expected, kept = by_ourselves(tiny, tasks, name, options)
    assert farthest(model, expected) <= 1e-13
    assert farthest(memory, kept) <= 1e-13
    for info in (memory.info, kept.info):
        info.get("ewc", {}).pop("constant", None)  # a sum, that rounds
    assert memory.info == kept.info
    assert [n for n, _ in model.named_modules()] == [n for n, _ in expected.named_modules()]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_every_method_of_the_registry_runs_or_says_why_not():
    assert {name.split("-")[0] for name in METHODS} | set(REFUSED) == set(REGISTRY)
    for name, why in REFUSED.items():
        for make in (fl.ContinualCallback, fl.optimizer_cls_and_kwargs):
            with pytest.raises(ConfigError, match=rf"method {name}: {why}.*forgetless run"):
                make(name)
    with pytest.raises(ConfigError, match="method replay"):
        fl.ContinualCallback("ewc", on={"name": "replay"})  # whichever part of it


@pytest.mark.parametrize("trainer_first", [True, False], ids=["a Trainer first", "a run first"])
def test_a_state_is_the_same_to_a_trainer_and_to_a_run(tiny, tasks, tmp_path, monkeypatch, trainer_first):
    """Task 1 in one, task 2 in the other: as if one had done both."""
    same_attention(monkeypatch)
    expected, kept = by_ourselves(tiny, tasks, "gorp", {"rank": 8})
    if trainer_first:
        model, memory, _ = in_a_trainer(tmp_path, tiny, tasks[:1], "gorp", {"rank": 8})
        model, memory = by_ourselves(tiny, tasks[1:], "gorp", {"rank": 8}, memory=memory, first=1, model=model)
    else:
        model, memory = by_ourselves(tiny, tasks[:1], "gorp", {"rank": 8})
        callback = fl.ContinualCallback("gorp", rank=8, state=memory)
        trainer_of(model, models.load(tiny)[1], tasks[1], tmp_path, callback, seed=1).train()
        memory = callback.memory
    assert farthest(model, expected) <= 1e-13
    assert farthest(memory, kept) <= 1e-13


@pytest.mark.parametrize(("name", "asked"), [("gpm", "arguments"), ("gpm", "launcher"), ("ewc", "arguments")])
def test_what_is_measured_for_the_next_task_is_measured_as_in_a_run(tiny, tasks, tmp_path, name, asked, monkeypatch):
    """Inputs as the Trainer's autocast makes them, gradients without: Accelerate leaves its bf16 wrapper round the model's forward."""
    model, tokenizer = models.load(tiny)
    callback = fl.ContinualCallback(name)
    if asked == "launcher":  # as `accelerate launch --mixed_precision bf16` asks
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    trainer_of(model, tokenizer, tasks[0], tmp_path, callback, bf16=asked == "arguments").train()
    assert hasattr(model, "_original_forward")
    del model.forward
    expected, method = Memory(), get(name)
    method.tokenizer, method.autocast = tokenizer, True
    method.param_groups(model)
    method.end_task(model, tasks[0], expected)
    assert farthest(callback.memory, expected) == 0


# -- TRL -----------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sft(monkeypatch, tmp_path):
    """sft(model, tokenizer, rows, callback, **arguments): an SFTTrainer that sends nothing anywhere."""
    pytest.importorskip("trl")
    from datasets import Dataset, disable_progress_bars
    from trl import SFTConfig, SFTTrainer

    monkeypatch.setenv("CI", "1")  # TRL tells its makers of a trainer it makes, but in continuous integration
    disable_progress_bars()

    def make(model, tokenizer, rows, callback, **changes):
        given = {"output_dir": str(tmp_path / "out"), "max_length": None} | QUIET | {"bf16": False, "use_cpu": True, "max_steps": 6} | changes
        return SFTTrainer(
            model, SFTConfig(**given), train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[callback],
            optimizer_cls_and_kwargs=fl.optimizer_cls_and_kwargs(callback.method),
        )  # fmt: skip

    return make


def test_an_sft_trainer_gives_a_runs_weights_and_spaces(tiny, tmp_path, sft):
    """Two tasks in a row by gorp, from the same rows and settings, in fp32: every weight within 1e-6 of `forgetless run`'s, the protected spaces alike.

    adam_epsilon 1e-6: TRL sums the loss in another order, and Adam with 1e-8 makes steps of what that leaves where a gradient is nought.
    """
    settings = {"learning_rate": 3e-4, "adam_epsilon": 1e-6, "per_device_train_batch_size": 4}
    config = run_config(tiny, tmp_path, "gorp", ("colour", "animal"))
    config["train"] |= settings
    fl.run(config)
    model, tokenizer = models.load(tiny)
    state, begun = None, {name: p.detach().clone() for name, p in model.named_parameters()}
    for i, entry in enumerate(config["tasks"]):
        task = load_task(TaskConfig(**entry))
        rows = [task.encode(tokenizer, example) for example in task.train]
        callback = fl.ContinualCallback("gorp", task=task.name, state=state, save_to=tmp_path / task.name)
        sft(model, tokenizer, rows, callback, seed=i, **settings).train()
        state, committed = tmp_path / task.name, tmp_path / "run" / "tasks" / f"{i:02d}-{task.name}"
        expected, _ = models.load(str(committed / "model"))
        assert farthest(model, expected) <= 1e-6
        assert farthest(model, models.load(tiny)[0]) > 1e-3  # it has learned
        ours, theirs = load_memory(state), load_memory(committed / "state")
        assert set(ours.tensors) == set(theirs.tensors) and ours.info == theirs.info
        for name, space in ours.spaces().items():
            assert span_distance(space.basis, theirs.spaces()[name].basis) <= 1e-4
    assert callback.update_leak < 1e-5
    assert all(torch.equal(p, begun[name]) for name, p in model.named_parameters() if "proj" not in name)  # embeddings, norms, head


GENERATION = (
    "{% for m in messages %}{{ m['role'] }} : {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} <eos> {% endgeneration %}"
    "{% else %}{{ m['content'] }} <eos> {% endif %}{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)  # fmt: skip
CHATS = [
    {"messages": [{"role": "user", "content": f"{a} {b}"}, {"role": "assistant", "content": c}]}
    for a, b, c in [("cat", "red", "red"), ("dog runs", "green", "green"), ("bird", "blue", "blue"), ("apple stone", "red", "red")] * 4
]


@pytest.mark.parametrize("changes", [{"assistant_only_loss": True}, {"packing": True, "max_length": 24}], ids=["assistant only", "packing"])
@pytest.mark.parametrize("method", ["gorp", "gpm"])
def test_chats_packed_or_by_the_assistants_part(chatty, sft, tmp_path, changes, method):
    model, tokenizer = models.load(chatty)
    tokenizer.chat_template = GENERATION
    state = None
    for i in range(2):
        callback = fl.ContinualCallback(method, task=f"chat {i}", state=state, save_to=tmp_path / f"chat {i}")
        trainer = sft(model, tokenizer, CHATS, callback, seed=i, per_device_train_batch_size=2, learning_rate=1e-3, **changes)
        trainer.train()
        state = tmp_path / f"chat {i}"
    assert callback.update_leak < 1e-5
    assert len(load_memory(state).spaces()) == 14  # the layers of both blocks
    assert farthest(model, models.load(chatty)[0]) > 1e-3
    row = trainer.train_dataset[0]
    assert "packing" not in changes or len(row["seq_lengths"]) > 1
    assert "packing" in changes or sum(row["assistant_masks"] if "assistant_masks" in row else (t != -100 for t in row["labels"])) == 2


def test_rows_that_a_method_measures_are_those_of_the_loader(chatty, sft):
    """Of a packed row one conversation, as it would stand alone; of a padded batch no padding."""
    model, tokenizer = models.load(chatty)
    alone = {tuple(tokenizer(tokenizer.apply_chat_template(row["messages"], tokenize=False))["input_ids"]) for row in CHATS}
    for changes in ({"packing": True, "max_length": 24}, {"pad_to_multiple_of": 16}):
        trainer = sft(model, tokenizer, CHATS, fl.ContinualCallback("seqft"), per_device_train_batch_size=2, **changes)
        task = foreign.Given("chats")
        task.loader, task.model = trainer.get_train_dataloader(), model
        seen = [task.encode(tokenizer, example) for example in task.train]
        assert seen and {tuple(row["input_ids"]) for row in seen} <= alone
        assert all(row["labels"][0] == -100 and row["labels"][1:] == row["input_ids"][1:] for row in seen)
        del trainer, task
        gc.collect()  # with the callback goes the task it has begun


# -- the promise ---------------------------------------------------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """Measures every step's leak."""

    def __init__(self):
        self.leaks = []

    def on_pre_optimizer_step(self, args, state, control, optimizer, **_):
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        self.handles = [self.optimizer.register_step_pre_hook(self.look), self.optimizer.register_step_post_hook(self.note)]

    def look(self, optimizer, *_):
        optimizer.track_leak = True

    def note(self, optimizer, *_):
        self.leaks.append(optimizer.update_leak)
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("alone", [False, True], ids=["with the callback", "the optimizer alone"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("gorp", {}), ("gorp", {"rank": 8}), ("gpm", {}), ("osft", {"protect": "weights"})],
    ids=["gorp", "gorp-rank", "gpm", "osft"],
)
def test_nothing_leaks_in_a_trainer_with_decay_clipping_and_accumulation(tiny, tasks, tmp_path, name, options, alone):
    model, _, _ = in_a_trainer(tmp_path, tiny, tasks[:1], name, options, dtype=torch.float32)
    tokenizer, method, watch = models.load(tiny)[1], get(name, **options), Watch()
    callback = None if alone else fl.ContinualCallback(method, state=tmp_path / "colour")
    optimizer = fl.optimizer_cls_and_kwargs(method, state=tmp_path / "colour", learning_rate=1e-3, weight_decay=0.1)
    trainer = trainer_of(model, tokenizer, tasks[1], tmp_path, callback, optimizer, max_steps=50, max_grad_norm=0.2)
    trainer.add_callback(watch)
    begun = {p: p.detach().clone() for p in model.parameters()}
    trainer.train()
    assert len(watch.leaks) == 50 and max(watch.leaks) < 1e-5
    worst = weight_leak(watch.optimizer, begun, 50)
    assert worst["leak"] <= worst["bound"]
    assert all(torch.equal(p, begun[p]) for n, p in model.named_parameters() if "proj" not in n)
    assert max(float((p.detach() - begun[p]).abs().max()) for p in model.parameters()) > 1e-3
    assert alone or max(watch.leaks) >= callback.update_leak > 0
    assert trainer.args.max_grad_norm == 0.2


def test_the_optimizer_alone_is_the_full_rank_branch(tiny, tasks, tmp_path):
    """It takes what the Trainer's arguments do not tell it from its own; and says so where it cannot do without the callback."""
    model, tokenizer = models.load(tiny)
    trainer = trainer_of(model, tokenizer, tasks[0], tmp_path, optimizer=fl.optimizer_cls_and_kwargs("gorp", rank=4, learning_rate=2e-4))
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, SubspaceAdamW) and {g["rank"] for g in optimizer.param_groups} == {4} and optimizer.defaults["lr"] == 2e-4
    assert optimizer.max_grad_norm is None and not any(g["weight_decay"] for g in optimizer.param_groups)
    assert not any(g["release"] for g in optimizer.param_groups)  # it is not told of micro-batches, and the Trainer clips what it would not see
    with pytest.raises(ConfigError, match="give learning_rate"):
        trainer_of(model, tokenizer, tasks[0], tmp_path, optimizer=fl.optimizer_cls_and_kwargs("gorp")).train()
    for name, options in (("lora", {}), ("gorp", {"use_lora": True}), ("osft", {"form": "adapter"}), ("lines", {})):
        with pytest.raises(ConfigError, match=r"ContinualCallback"):
            trainer_of(model, tokenizer, tasks[0], tmp_path, optimizer=fl.optimizer_cls_and_kwargs(name, learning_rate=1e-3, **options)).train()
    assert [n for n, _ in model.named_modules()] == [n for n, _ in models.load(tiny)[0].named_modules()]


def test_the_optimizer_alone_masks_what_the_method_masks_step_by_step(tiny, tasks, tmp_path):
    """migu permits the rows behind the step's largest outputs: in one step 30 % of them move."""
    model, tokenizer = models.load(tiny)
    begun = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = fl.optimizer_cls_and_kwargs("migu", state=Memory({}, {"migu": {"tasks": 1}}), learning_rate=1e-3)
    trainer_of(model, tokenizer, tasks[0], tmp_path, optimizer=optimizer, max_steps=1, weight_decay=0.0).train()
    W = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert int((begun["model.layers.0.mlp.up_proj.weight"] != W).any(1).sum()) == round(0.3 * 48)


def test_the_trainers_arguments_reach_the_optimizer_through_the_callback(tiny, tasks, tmp_path):
    model, tokenizer = models.load(tiny)
    callback = fl.ContinualCallback("gorp")
    args = {"learning_rate": 3e-4, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "weight_decay": 0.01, "max_grad_norm": 0.5, "seed": 7}
    trainer = trainer_of(model, tokenizer, tasks[0], tmp_path, callback, max_steps=1, **args)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "proj" in n
    }  # no other gradient is made
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert [optimizer.defaults[key] for key in ("lr", "betas", "eps", "weight_decay")] == [3e-4, (0.9, 0.95), 1e-6, 0.01]
    assert (optimizer.max_grad_norm, optimizer.seed, callback.method.max_grad_norm) == (0.5, 7, 0.5)
    own = trainer_of(model, tokenizer, tasks[0], tmp_path, again := fl.ContinualCallback("gorp"),
                     fl.optimizer_cls_and_kwargs(again.method, model=model, learning_rate=1e-5, eps=1e-7, seed=3), **args)  # fmt: skip
    optimizer = own.create_optimizer()
    assert [optimizer.defaults[key] for key in ("lr", "eps", "weight_decay")] == [1e-5, 1e-7, 0.01] and optimizer.seed == 3


# -- adapters ------------------------------------------------------------------------------------------------------------------------------


def test_an_adapter_is_there_while_it_trains_and_merged_at_the_end(tiny, tasks, tmp_path):
    from peft import PeftModel

    model, tokenizer = models.load(tiny)
    callback = fl.ContinualCallback("lora", save_to=tmp_path / "state", lora_dropout=0.0)
    trainer = trainer_of(model, tokenizer, tasks[0], tmp_path, callback)
    assert any("lora_A" in name for name, _ in model.named_parameters())
    trainer.train()
    assert not any("lora" in name for name, _ in model.named_parameters())
    adapted = PeftModel.from_pretrained(models.load(tiny)[0], tmp_path / "state").merge_and_unload()
    assert farthest(model, adapted) <= 1e-6 < farthest(model, models.load(tiny)[0])
    trainer.save_model(tmp_path / "saved")
    assert farthest(models.load(str(tmp_path / "saved"))[0], model) == 0


def test_what_others_have_adapted_or_quantised_is_refused(tiny, tasks, tmp_path):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(models.load(tiny)[0], LoraConfig(target_modules=["q_proj"]))
    for name in ("gorp", "lora", "seqft"):
        with pytest.raises(ConfigError, match=f"method {name}: the model carries adapters of PEFT already.*SubspaceAdamW"):
            fl.ContinualCallback(name).begin(wrapped)
        with pytest.raises(ConfigError, match="adapters of PEFT"):
            fl.optimizer_cls_and_kwargs(name, model=wrapped)
    model = models.load(tiny)[0]
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ConfigError, match="weights are quantised.*quantize: 4bit"):
        fl.ContinualCallback("inclora").begin(model)


def test_peft_adapters_train_by_the_optimizer_and_keep_off_a_space(tiny, tasks, tmp_path):
    """SubspaceAdamW over what get_peft_model lets train: A of each adapter off the inputs that gorp protects."""
    from peft import LoraConfig, get_peft_model

    _, memory, _ = in_a_trainer(tmp_path, tiny, tasks[:1], "gorp", {}, dtype=torch.float32)
    model, tokenizer = models.load(tiny)
    spaces = {name: V for name, V in memory.spaces().items() if name.endswith("q_proj")}
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    groups = []
    for name, p in peft.named_parameters():
        if p.requires_grad:
            space = next(V for layer, V in spaces.items() if f".{layer}." in name)
            groups.append({"params": [p], "constraint": fl.Constraint(inputs=space) if "lora_A" in name else None})
    begun = {p: p.detach().clone() for group in groups for p in group["params"]}
    optimizer = fl.SubspaceAdamW(groups, lr=1e-3, weight_decay=0.1)
    rows = Encoded(tasks[1], tokenizer, tasks[1].train)
    Trainer(peft, arguments(tmp_path), train_dataset=rows, data_collator=Collate(model), optimizers=(optimizer, None)).train()
    worst = weight_leak(optimizer, begun, 6)
    assert worst["leak"] <= worst["bound"] and all(not torch.equal(p, begun[p]) for p in begun)


def test_adapters_on_a_quantised_base_train_by_the_optimizer(tiny, tasks, tmp_path):
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base = AutoModelForCausalLM.from_pretrained(tiny, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32))
    with pytest.raises(ConfigError, match="quantised"):
        fl.ContinualCallback("lora").begin(base)
    peft = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"]))
    learns = [p for p in peft.parameters() if p.requires_grad]
    before, tokenizer = [p.detach().clone() for p in learns], models.load(tiny)[1]
    rows, optimizer = Encoded(tasks[0], tokenizer, tasks[0].train), fl.SubspaceAdamW(learns, lr=1e-3)
    Trainer(peft, arguments(tmp_path), train_dataset=rows, data_collator=Collate(base), optimizers=(optimizer, None)).train()
    assert all(not torch.equal(p, old) and bool(torch.isfinite(p).all()) for p, old in zip(learns, before, strict=True))


# -- encoder-decoder, and loops by hand ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gorp", "gpm", "migu"])
def test_a_seq2seq_trainer(tmp_path, tasks, method):
    folder = make_model_folder(tmp_path / "t5", kind="t5")
    model, tokenizer = models.load(folder)
    state, leaks = None, []
    for i, task in enumerate(tasks):
        rows = [{"input_ids": task.encode_prompt(tokenizer, e), "labels": task.encode_answer(tokenizer, e)} for e in task.train]
        callback = fl.ContinualCallback(method, task=task.name, state=state, save_to=tmp_path / task.name)
        trainer = Seq2SeqTrainer(
            model, arguments(tmp_path, Seq2SeqTrainingArguments, seed=i), train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer, model),
            processing_class=tokenizer, callbacks=[callback],
        )  # fmt: skip
        trainer.optimizer_cls_and_kwargs = fl.optimizer_cls_and_kwargs(callback.method)  # its constructor does not take it
        trainer.train()
        state, leaks = tmp_path / task.name, [*leaks, callback.update_leak]
    assert method == "migu" or leaks[0] is None and leaks[1] < 1e-5
    assert farthest(model, models.load(folder)[0]) > 1e-3


def batches(task, tokenizer, model, number=6):
    rows = Encoded(task, tokenizer, task.train)
    return [Collate(model)([rows[(4 * i + k) % len(rows)] for k in range(4)]) for i in range(number)]


def loop(model, optimizer, data, closure=False):
    for batch in data:

        def made(batch=batch):
            optimizer.zero_grad()
            loss = answer_loss(model, batch)[0]
            loss.backward()
            return loss

        if closure:
            optimizer.step(made)
        else:
            made()
            optimizer.step()


@pytest.mark.parametrize(("name", "options"), [("gorp", {"rank": 8}), ("olora", {}), ("gpm", {})], ids=["gorp", "olora", "gpm"])
def test_a_loop_by_hand_and_one_that_makes_gradients_in_a_closure(tiny, tasks, tmp_path, name, options):
    """Lightning gives step() a closure. Both do the same; and the second task keeps off what the first has left."""
    found = []
    for closure in (False, True):
        model, tokenizer = models.load(tiny)
        state = None
        for i, task in enumerate(tasks):
            learning = fl.ContinualCallback(name, task=task.name, state=state, save_to=tmp_path / f"{closure}" / task.name, **options)
            set_seed(i)
            loader = torch.utils.data.DataLoader(Encoded(task, tokenizer, task.train), collate_fn=Collate(model))
            learning.begin(model, tokenizer, loader)
            optimizer = learning.optimizer(learning_rate=1e-3, weight_decay=0.1, max_grad_norm=1.0)
            loop(model, optimizer, batches(task, tokenizer, model, 10), closure)
            memory = learning.end()
            state = tmp_path / f"{closure}" / task.name
        found.append((model, memory))
        optimizer.step()  # is the loop's own affair again
        assert learning.steps == 10 and (name == "olora" or learning.update_leak < 1e-5)
    (model, memory), (other, others) = found
    assert farthest(model, other) == 0 and farthest(memory, others) == 0 and memory.tensors
    said = json.loads((state / "training.json").read_text())
    assert (said["method"], said["task"], said["steps"]) == (name, "animal", 10) and said["update_leak"] == learning.update_leak


def test_fabric(tiny, tasks, tmp_path):
    """Fabric wraps the model and the optimizer; the method's hooks go with the latter."""
    Fabric = pytest.importorskip("lightning_fabric").Fabric
    model, tokenizer = models.load(tiny)
    data, found = batches(tasks[0], tokenizer, model), []
    for wrap in (False, True):
        model, _ = models.load(tiny)
        learning = fl.ContinualCallback("gorp", rank=8)
        learning.begin(model)
        optimizer = learning.optimizer(learning_rate=1e-3)
        if wrap:
            fabric = Fabric(accelerator="cpu")
            wrapped, outer = fabric.setup(model, optimizer)
            for batch in data:
                wrapped.train()
                outer.zero_grad()
                loss = wrapped(**batch).loss
                fabric.backward(loss)
                outer.step()
        else:
            for batch in data:
                model.train()
                optimizer.zero_grad()
                model(**batch).loss.backward()
                optimizer.step()
        found.append((model, learning.end()))
    assert farthest(found[0][0], found[1][0]) == 0 and farthest(found[0][1], found[1][1]) == 0 and found[1][1].spaces()


@pytest.mark.slow
def test_two_processes_equal_one(tiny, tmp_path):
    """DistributedDataParallel under a foreign Trainer: half the batch in each, one state written."""
    from test_distributed import HERE, run, torchrun

    tasks = json.dumps([write_task(tmp_path / "data", name) | {"limit": 48} for name in ("colour", "animal")])
    found = []
    for launch, name, batch in ((torchrun, "two", "2"), (lambda *command: run([sys.executable, *command]), "one", "4")):
        done = launch(str(HERE / "dropin_child.py"), tiny, tasks, str(tmp_path / f"{name}.pt"), batch)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(torch.load(tmp_path / f"{name}.pt", weights_only=True))
        assert sorted(p.name for p in (tmp_path / name).iterdir() if not p.name.startswith("out")) == ["animal", "colour"]
    one, two = found
    assert one.keys() == two.keys() and any(key.endswith(".basis") for key in one)
    for key in one:
        if key.endswith(".basis"):
            assert span_distance(one[key], two[key]) <= 1e-8
        else:
            torch.testing.assert_close(one[key], two[key], atol=1e-8, rtol=0)


# -- checkpoints ---------------------------------------------------------------------------------------------------------------------------


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 3:
            control.should_save = True

    def on_save(self, args, state, control, **_):
        raise KeyboardInterrupt


RESUMED = {
    "gorp-branches": {"use_lora": True, "rank": 4},
    "sara": {},
    "ewc-gorp": {"on": {"name": "gorp", "energy": 0.5}},
    "osft": {"protect": "weights"},
    "esacl": {},
    "treelora": {},
}


@pytest.mark.parametrize(
    ("name", "options"),
    [pytest.param(v.split("-")[0], o, id=v, marks=[pytest.mark.slow] * (v not in ("gorp-branches", "sara"))) for v, o in RESUMED.items()],
)
def test_a_trainer_that_resumes_ends_as_if_it_had_not_stopped(tiny, tasks, tmp_path, name, options):
    model, memory, _ = in_a_trainer(tmp_path / "whole", tiny, tasks, name, options)
    first, _, _ = in_a_trainer(tmp_path / "part", tiny, tasks[:1], name, options)
    first.save_pretrained(tmp_path / "first")
    _, tokenizer = models.load(tiny)
    for resume in (False, True):
        again = type(first).from_pretrained(tmp_path / "first", dtype=torch.float64)
        callback = fl.ContinualCallback(get(name, **options), task="animal", state=tmp_path / "part" / "colour")
        trainer = trainer_of(again, tokenizer, tasks[1], tmp_path / "out", callback, seed=1)
        if not resume:
            trainer.add_callback(Stop())
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert farthest(again, model) == 0 and farthest(callback.memory, memory) == 0


def test_a_checkpoint_without_what_the_method_collects_is_refused(tiny, tasks, tmp_path):
    model, tokenizer = models.load(tiny)
    trainer = trainer_of(model, tokenizer, tasks[0], tmp_path, fl.ContinualCallback("gorp"), save_strategy="steps", save_steps=3)
    trainer.train()
    (tmp_path / "checkpoint-3" / "forgetless.pt").unlink()
    model, _ = models.load(tiny)
    with pytest.raises(ConfigError, match="goes on from step 3.*forgetless.pt is not there"):
        trainer_of(model, tokenizer, tasks[0], tmp_path, fl.ContinualCallback("gorp")).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    model, _ = models.load(tiny)
    alone = fl.optimizer_cls_and_kwargs("osft", learning_rate=1e-3)
    with pytest.raises(ConfigError, match="add the ContinualCallback"):
        trainer_of(model, tokenizer, tasks[0], tmp_path, optimizer=alone, save_strategy="steps", save_steps=3).train()
        trainer_of(model, tokenizer, tasks[0], tmp_path, optimizer=alone).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


# -- where state comes from, and what is refused -------------------------------------------------------------------------------------------


def test_state_may_be_a_run_a_task_of_it_or_a_state_folder(tiny, tmp_path):
    fl.run(run_config(tiny, tmp_path, "gorp", ("colour", "animal")))
    run = tmp_path / "run"
    of = {
        "run": fl.ContinualCallback("gorp", state=run).memory, "current": load_memory(run / "tasks" / "01-animal" / "state"),
        "task": fl.ContinualCallback("gorp", state=str(run / "tasks" / "00-colour")).memory,
        "state": fl.ContinualCallback("gorp", state=run / "tasks" / "00-colour" / "state").memory,
    }  # fmt: skip
    assert farthest(of["run"], of["current"]) == 0 and farthest(of["task"], of["state"]) == 0
    assert of["run"].spaces()["model.layers.0.mlp.up_proj"].rank > of["task"].spaces()["model.layers.0.mlp.up_proj"].rank
    copied = fl.ContinualCallback("gorp", state=of["task"]).memory
    assert copied is not of["task"] and farthest(copied, of["task"]) == 0


def test_a_state_that_does_not_fit_is_refused(tiny, tmp_path, tasks):
    with pytest.raises(DataError, match="no method.safetensors"):
        fl.ContinualCallback("gorp", state=tmp_path)
    with pytest.raises(DataError, match="no method.safetensors"):
        fl.optimizer_cls_and_kwargs("gorp", state=tmp_path / "nowhere")
    in_a_trainer(tmp_path, tiny, tasks[:1], "osft", {"protect": "weights"})
    with pytest.raises(ConfigError, match="spaces of no layer, and method gorp would protect nothing"):
        fl.ContinualCallback("gorp", state=tmp_path / "colour").begin(models.load(tiny)[0])
    V = torch.eye(16)[:, :2]
    other = Memory({"model.layers.0.mlp.up_proj.basis": V, "model.layers.0.mlp.up_proj.energy": torch.ones(2)})
    with pytest.raises(ConfigError, match="up_proj has 16 dimensions, and the layer here 32; it is of another model"):
        fl.ContinualCallback("gpm", state=other).begin(models.load(tiny)[0])
    with pytest.raises(ConfigError, match=r"spaces of other layers \(h.0.mlp\)"):
        fl.optimizer_cls_and_kwargs("gorp", state=Memory({"h.0.mlp.basis": V, "h.0.mlp.energy": torch.ones(2)}), model=models.load(tiny)[0])


def test_a_callback_and_its_optimizer_belong_together(tiny, tasks, tmp_path):
    def train(callback, optimizer, model=None):
        model = model or models.load(tiny)[0]
        trainer_of(model, models.load(tiny)[1], tasks[0], tmp_path, callback, optimizer, max_steps=1).train()

    method = get("gorp", rank=4)
    with pytest.raises(ConfigError, match=r"options differ; make the method once.*give it to both"):
        train(fl.ContinualCallback(method), fl.optimizer_cls_and_kwargs("gorp", learning_rate=1e-3))
    with pytest.raises(ConfigError, match="of method gpm and the callback of gorp"):
        train(fl.ContinualCallback(method), fl.optimizer_cls_and_kwargs("gpm"))
    train(fl.ContinualCallback("gorp", rank=4), fl.optimizer_cls_and_kwargs("gorp", rank=4))  # twice the same words
    with pytest.raises(ConfigError, match="trains by an optimizer of its own"):
        train(fl.ContinualCallback(method), (torch.optim.AdamW, {"lr": 1e-3}))
    with pytest.raises(ConfigError, match="another model than the one given as model="):
        train(None, fl.optimizer_cls_and_kwargs(method, model=models.load(tiny)[0], learning_rate=1e-3))
    state = Memory({"model.layers.0.mlp.up_proj.basis": torch.eye(32)[:, :1], "model.layers.0.mlp.up_proj.energy": torch.ones(1)})
    with pytest.raises(ConfigError, match="the optimizer goes on from a Memory and the callback from no state"):
        train(fl.ContinualCallback(method), fl.optimizer_cls_and_kwargs(method, state=state))
    train(fl.ContinualCallback(method, state=state), fl.optimizer_cls_and_kwargs(method, state=state))
    with pytest.raises(ConfigError, match="rank would be options of it; give them to fl.methods.get"):
        fl.ContinualCallback(method, rank=8)
    with pytest.raises(ConfigError, match="unknown option 'rang'"):
        fl.optimizer_cls_and_kwargs("gorp", rang=8)


def test_arguments_are_as_they_were_after_an_error_within_a_step(tiny, tasks, tmp_path):
    model, tokenizer = models.load(tiny)
    trainer = trainer_of(model, tokenizer, tasks[0], tmp_path, fl.ContinualCallback("gorp"), max_grad_norm=0.3)
    trainer.compute_loss = lambda *_, **__: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    args, callback = trainer.args, fl.ContinualCallback("gorp")
    del trainer
    gc.collect()
    model, _ = models.load(tiny)
    again = Trainer(model, args, callbacks=[callback], optimizer_cls_and_kwargs=fl.optimizer_cls_and_kwargs(callback.method))
    assert again.create_optimizer().max_grad_norm == args.max_grad_norm == 0.3


def test_a_callback_is_for_one_task_of_one_model(tiny, tasks, tmp_path):
    model, tokenizer = models.load(tiny)
    callback = fl.ContinualCallback("gorp", save_to=tmp_path / "state")
    trainer = trainer_of(model, tokenizer, tasks[0], tmp_path, callback, max_steps=1)
    with pytest.raises(ConfigError, match="another task has begun on this model"):
        fl.ContinualCallback("gorp").begin(model)
    trainer.train()
    with pytest.raises(ConfigError, match="has ended; train the next task with a Trainer and a ContinualCallback of its own"):
        trainer.train()
    with pytest.raises(ConfigError, match="a ContinualCallback is for one task"):
        callback.begin(model)
    with pytest.raises(ConfigError, match="has ended already"):
        callback.end()
    with pytest.raises(ConfigError, match="state: is there already"):
        fl.ContinualCallback("gorp", save_to=tmp_path / "state")
    late = trainer_of(
        models.load(tiny)[0], tokenizer, tasks[0], tmp_path, optimizer=fl.optimizer_cls_and_kwargs("gorp", learning_rate=1e-3), max_steps=1
    )
    late.add_callback(fl.ContinualCallback("gorp"))
    with pytest.raises(ConfigError, match="must be among callbacks= when the Trainer is made"):
        late.train()
    with pytest.raises(ConfigError, match=r"call begin\(model\) before"):
        fl.ContinualCallback("gorp").optimizer(1e-3)


def test_what_cannot_be_trained_is_said_before_the_first_step(tiny, tasks, tmp_path, monkeypatch):
    model, tokenizer = models.load(tiny)
    with monkeypatch.context() as launch, pytest.raises(ConfigError, match="ACCELERATE_USE_FSDP=true, which forgetless does not train under"):
        launch.setenv("ACCELERATE_USE_FSDP", "true")
        cls, kwargs = fl.optimizer_cls_and_kwargs("gorp", learning_rate=1e-3)
        cls()(model, **kwargs)
    with pytest.raises(ConfigError, match=r"its rows are text, so give begin\(model, tokenizer\)"):
        fl.ContinualCallback("gpm", task=tasks[0]).begin(model)
    with pytest.raises(ConfigError, match="matches no linear layer.*Nearest"):
        trainer_of(model, tokenizer, tasks[0], tmp_path, fl.ContinualCallback("gorp", full_modules=["q_projj"]))
    with pytest.raises(ConfigError, match="matches no linear layer"):
        fl.optimizer_cls_and_kwargs("gorp", model=model, full_modules=["q_projj"])
    with pytest.raises(ConfigError, match="auto_find_batch_size: forgetless does not train under it"):
        trainer_of(model, tokenizer, tasks[0], tmp_path, fl.ContinualCallback("gorp"), auto_find_batch_size=True)
    with pytest.raises(ConfigError, match="reads rows of the task where the training loop has given none"):
        trainer_of(model, tokenizer, tasks[0], tmp_path, fl.ContinualCallback("inflora"))
    fl.ContinualCallback("gorp").begin(model)  # nothing has begun


def test_a_diverged_task_leaves_nothing(tiny, tasks, tmp_path):
    model, tokenizer = models.load(tiny)
    callback = fl.ContinualCallback("gorp", task="colour", save_to=tmp_path / "state")
    with pytest.raises(Diverged, match="task 'colour', step 6: the weights are no longer finite; nothing is saved"):
        trainer_of(model, tokenizer, tasks[0], tmp_path, callback, learning_rate=1e38).train()
    assert not (tmp_path / "state").exists() and not list(tmp_path.glob(".state*"))


def test_a_state_folder_is_whole_or_not_there(tiny, tasks, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    model, tokenizer = models.load(tiny)
    monkeypatch.setattr("forgetless.dropin.sync_tree", full)
    with pytest.raises(OSError, match="no space left"):
        trainer_of(model, tokenizer, tasks[0], tmp_path, fl.ContinualCallback("gorp", save_to=tmp_path / "state"), max_steps=1).train()
    assert not (tmp_path / "state").exists()


# -- the examples --------------------------------------------------------------------------------------------------------------------------

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("name", ["sft_trainer", "trainer", "plain_loop"])
def test_an_example_runs_and_says_what_is_protected(name, tiny, chatty, tmp_path, monkeypatch, capsys):
    if name == "sft_trainer":
        pytest.importorskip("trl")
    monkeypatch.setenv("CI", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--model", chatty if name == "sft_trainer" else tiny, "--steps", "4", "--out", str(tmp_path / "out")])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "update leak" in out and os.path.isdir(tmp_path / "out")
    states = sorted((tmp_path / "out").glob("*/state"))
    assert len(states) == 2 and all(load_memory(state).spaces() for state in states)

"""Processes that share the model (torch's fully_shard, FSDP2): two gloo ranks take the steps of one process, keep off the same directions, and hold a part each."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_config, write_task
from safetensors.torch import load_file
from sharding_child import CASES, LEAKS
from test_distributed import port, run, torchrun

import forgetless as fl
from forgetless import foreign, shared_model
from forgetless.config import load_config
from forgetless.errors import ConfigError
from forgetless.methods import get

HERE = Path(__file__).parent

# -- the optimizer -----------------------------------------------------------------------------------------------------------------------

BOTH = [f"{case}{stored}" for case in CASES for stored in ("", "-transposed")]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What sharding_child.py finds with two processes."""
    out = tmp_path_factory.mktemp("sharded") / "found.json"
    done = torchrun(str(HERE / "sharding_child.py"), str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


pytestmark = pytest.mark.xdist_group("sharded")  # all in one process of the run, which starts the ranks once


@pytest.mark.parametrize("case", BOTH)
def test_sharded_weights_take_the_steps_of_whole_ones(case, found):
    """fp64, rows that do not divide and a process that has none of a weight, over three choices of directions; state kept by each process for its rows alone."""
    assert found["processes"] == 2
    assert found[case]["moved"] > 0.05
    assert found[case]["difference"] < 1e-8 and found[case]["leak"] < 1e-12 and found[case]["norm"] < 1e-10
    assert found[case]["state_bytes"] < 0.72 * found[case]["whole_bytes"]


@pytest.mark.parametrize("case", LEAKS)
def test_sharded_weights_keep_off_what_is_protected(case, found):
    """Row 1 of the contract, fp32, 50 steps with weight decay and clipping."""
    leaks = found[case]["leaks"]
    assert leaks["update"] < 1e-5 and leaks["weight"] <= leaks["bound"] and leaks["weight"] < 1e-5


@pytest.mark.parametrize("case", ["rank-inputs", "either", "directions"])
@pytest.mark.parametrize("what", ["checkpointed_before", "checkpointed_within", "resumed_alone", "replaced"])
def test_state_is_lazy_symmetric_and_reshards(what, case, found):
    """torch.distributed.checkpoint's zero-gradient step changes nothing, its state goes on in another optimizer, whole state in one process, and parameters may be
    replaced by sharded ones after the optimizer was made."""
    assert found[case][what] < 1e-8


def test_a_choice_of_directions_sends_a_tenth_of_the_gradient_or_less(found):
    sent = found["sent"]
    assert sent["gather"] / sent["refresh"] > 10
    assert sent["step"] < 100  # without a choice: norms only


@pytest.mark.parametrize("case", BOTH)
def test_what_is_planned_for_several_processes_is_what_they_send_and_hold(case, found):
    """forgetless estimate --world counts with no other process there: numbers, exchanges and bytes of state are those of two."""
    got = found[case]
    assert got["plan_bytes"] == got["bytes"] and got["plan_other"] == got["other"]
    if "exact" in case or "svd" in case:  # whole gradients are gathered; what is thin beside them is not counted
        assert got["plan_choice"] == pytest.approx(got["choice"], rel=0.03)
    else:
        assert (got["plan_choice"], got["plan_exchanges"]) == (got["choice"], got["exchanges"])


@pytest.mark.parametrize("case", [f"{side}, {stored}" for side in ("inputs", "outputs") for stored in ("linear", "conv1d")])
def test_what_is_planned_for_sketches_is_what_they_send(case, found):
    sent, planned = found["statistics"][case]
    assert 0 < planned <= sent <= planned + 40  # norms: a few numbers a weight


# -- methods -----------------------------------------------------------------------------------------------------------------------------

# as in test_distributed.py: a spectral gap and exact bases, so that the order of summation cannot choose another subspace
METHODS = {
    "seqft": {"name": "seqft"},
    "seqft-galore": {"name": "seqft", "state": "galore", "gap": 3, "rank": 3},
    "gorp": {"name": "gorp", "energy": 0.5},
    "gorp-rank": {"name": "gorp", "rank": 3, "refresh": "svd", "refresh_gap": 3, "energy": 0.5, "space_from": "first_moment", "max_rank": 4},
    "gorp-branches": {"name": "gorp", "use_lora": True, "lora_dropout": 0.0, "energy": 0.5, "max_rank": 4},
    "lora": {"name": "lora", "lora_dropout": 0.0},
    "inclora": {"name": "inclora", "lora_dropout": 0.0},
    "olora": {"name": "olora", "lora_dropout": 0.0, "l2": 0.001},
    "osft": {"name": "osft", "protect": "weights"},
    "osft-paper": {"name": "osft", "block": "paper"},
    "osft-adapter": {"name": "osft", "form": "adapter"},
    "ewc": {"name": "ewc"},
    "ewc-gorp": {"name": "ewc", "on": {"name": "gorp", "energy": 0.5}},
    "replay": {"name": "replay", "rate": 0.3, "buffer": 8},
    "gpm": {"name": "gpm", "threshold": 0.6},
}


@pytest.fixture(scope="module")
def one_and_two(tiny, tmp_path_factory):
    """{method: what it ended with} of one process with batches of 4, and of two that share the model with batches of 2: two tasks in fp64."""
    folder = tmp_path_factory.mktemp("shared")
    tasks = json.dumps([write_task(folder / "data", n) | {"limit": 48} for n in ("colour", "animal")])
    (folder / "methods.json").write_text(json.dumps(METHODS))
    two = torchrun(str(HERE / "shared_child.py"), tiny, tasks, str(folder / "two"), str(folder / "methods.json"), "2", timeout=900)
    assert two.returncode == 0, two.stderr[-3000:]
    alone = [sys.executable, str(HERE / "ddp_child.py"), tiny, tasks, str(folder / "one"), str(folder / "methods.json"), "4"]
    one = run(alone, timeout=900)
    assert one.returncode == 0, one.stderr[-3000:]
    return tuple(torch.load(folder / n, weights_only=True) for n in ("one", "two"))


@pytest.mark.parametrize("name", METHODS)
def test_row_4_two_processes_that_share_the_model_equal_one(name, one_and_two):
    """Weights, memory and losses of two tasks, to 1e-8, the same to the bit in both processes."""
    one, two = (found[name] for found in one_and_two)
    assert not two["apart"] and one["tensors"].keys() == two["tensors"].keys()
    for key, a in one["tensors"].items():
        b = two["tensors"][key]
        if key.endswith(".basis"):  # a space is its projector
            a, b = a @ a.mT, b @ b.mT
        torch.testing.assert_close(a, b, atol=1e-8, rtol=0, msg=lambda said, key=key: f"{key}: {said}")


def test_every_method_that_may_be_sharded_is_here():
    assert {method["name"] for method in METHODS.values()} == set(shared_model.METHODS)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": {"name": "ogd"}}, "method ogd reads whole weights or gradients while it trains; take sharding out"),
        ({"method": {"name": "replay", "on": {"name": "lwf"}}}, "method lwf reads whole weights"),
        ({"method": {"name": "seqft", "state": "fira"}}, "state: fira reads whole gradients; use adam or galore"),
        ({"method": {"name": "ewc", "on": {"name": "olora"}}}, "put a method without adapters under on:"),
        ({"method": {"name": "lora"}, "quantize": "4bit"}, "quantize needs whole weights in every process"),
        ({"optimizer_state": "8bit"}, "optimizer_state: 8bit needs whole weights"),
        ({"probes": {"every": 2}}, "probes.every needs whole weights"),
    ],
)
def test_what_does_not_go_with_sharding_is_refused_by_name(changes, said, small_run):
    config = load_config(small_run("seqft", tasks=("colour",)) | {"sharding": "fsdp2"} | changes)
    with pytest.raises(ConfigError, match=said):
        shared_model.check(config, get(config.method.name, **config.method.options))


def test_one_process_trains_as_without(small_run):
    plain = fl.run(small_run("seqft", tasks=("colour",)))
    before = (plain.path / "lineage.jsonl").read_text()
    again = fl.run(small_run("seqft", tasks=("colour",), sharding="fsdp2"))  # sharding is no other run
    assert again.resumed_at == 1 and (plain.path / "lineage.jsonl").read_text() == before


# -- whole runs --------------------------------------------------------------------------------------------------------------------------

DYING = """
import os, sys
import forgetless.trainer as trainer
from forgetless import cli
from forgetless.errors import DataError

calls, real = [], trainer.answer_loss
def fail(*args, **kwargs):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 6:
        raise DataError("row 7 is gone")
    return real(*args, **kwargs)
trainer.answer_loss = fail
sys.argv = ["forgetless", "run", "--progress", "json", {path!r}]
cli.main()
"""


def config_of(tiny: str, folder: Path, method: dict, rows: int) -> dict:
    """A run of two tasks, `rows` rows a step and process."""
    config = run_config(tiny, folder, method, ("colour", "animal")) | {"sharding": "fsdp2", "checkpoint_every": 2, "evaluate": {"limit": 8}}
    config["train"] |= {"per_device_train_batch_size": rows, "max_steps": 6, "weight_decay": 0.1}
    config["tasks"] = [task | {"limit": 48} for task in config["tasks"]]  # whole steps: at an epoch's ragged end Accelerate fills up a batch
    (folder / "config.yaml").write_text(json.dumps(config))
    return config


def weights(run: Path, task: str) -> dict[str, torch.Tensor]:
    return load_file(run / "tasks" / task / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def shared_run(tiny, tmp_path_factory):
    """(folder, config, what the process said) of a run by two processes of which one dies in the first task's sixth step."""
    folder = tmp_path_factory.mktemp("run")
    config = config_of(tiny, folder, {"name": "gorp", "rank": 2, "refresh_gap": 3, "use_lora": True, "lora_dropout": 0.0}, 6)
    (folder / "dying.py").write_text(DYING.format(path=str(folder / "config.yaml")))
    return folder, config, torchrun(str(folder / "dying.py"))


@pytest.mark.slow
def test_a_process_that_dies_speaks_first_and_leaves_a_checkpoint_of_whole_tensors(shared_run):
    folder, config, died = shared_run
    speaks = [line for line in died.stderr.splitlines() if line.startswith("rank ")]
    assert died.returncode and speaks[0].startswith("rank 1: error: row 7 is gone"), died.stderr[-3000:]
    (checkpoint,) = (folder / "run" / "tasks" / ".00-colour.training").glob("checkpoint-*")
    assert json.loads((checkpoint / "forgetless.json").read_text())["processes"] == 2
    assert load_file(checkpoint / "model.safetensors").keys() >= {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"}
    torch.load(checkpoint / "optimizer.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_checkpoint_of_two_processes_goes_on_in_one_two_and_three(processes, shared_run, tiny, tmp_path):
    """The steps' rows are those they would have been: the weights end where an undisturbed run of one process ends, and one process reads the commits."""
    folder, config, _ = shared_run
    shutil.copytree(folder / "run", tmp_path / "run")
    mine = config | {"output_dir": str(tmp_path / "run")}
    (tmp_path / "config.yaml").write_text(json.dumps(mine))
    command = ["-m", "forgetless", "run", "--progress", "json", str(tmp_path / "config.yaml")]
    if processes == 1:
        done = run([sys.executable, *command], timeout=300)
    else:
        done = torchrun(*command, processes=processes)
    assert done.returncode == 0 and "colour: goes on from step 4" in done.stderr, done.stderr[-3000:]
    assert done.stdout.count("average accuracy") == 2  # one table a scorer, printed once

    alone = tmp_path / "alone"
    alone.mkdir()
    undisturbed = fl.run(config_of(tiny, alone, config["method"], 12))
    ours, other = weights(tmp_path / "run", "00-colour"), weights(undisturbed.path, "00-colour")
    assert ours.keys() == other.keys()
    for name, W in ours.items():
        torch.testing.assert_close(W, other[name], atol=1e-4, rtol=0)
    assert fl.run(mine).resumed_at == 2  # alone: all is there, the model is the one that was committed
    metrics = json.loads((tmp_path / "run" / "tasks" / "01-animal" / "metrics.json").read_text())["protection"]
    assert metrics["update_leak"] < 1e-5 and metrics["weight_leak"] <= metrics["weight_leak_bound"]


@pytest.mark.slow
def test_accelerate_launch_and_a_number_of_processes_that_cannot_share_a_step(shared_run, tmp_path):
    folder, config, _ = shared_run
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "config.yaml").write_text(json.dumps(config | {"output_dir": str(tmp_path / "run")}))
    refused = torchrun("-m", "forgetless", "run", "--progress", "none", str(tmp_path / "config.yaml"), processes=5)
    assert refused.returncode and "2 processes took 12 rows a step, which 5 cannot share evenly" in refused.stderr, refused.stderr[-3000:]
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--main_process_port", port(), "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [*launcher, "-m", "forgetless", "run", "--progress", "none", str(tmp_path / "config.yaml")]
    done = run(command, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "current").read_text() == "01-animal\n"


# -- in somebody else's Trainer ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_transformers_trainer_on_a_model_that_transformers_has_sharded(tiny, tmp_path):
    """from_pretrained(distributed_config=...) leaves a process its rows; the optimizer and the callback go with them, and two processes end where one does, to 1e-8."""
    config = pytest.importorskip("transformers.distributed").DistributedConfig
    if "fsdp_size" not in config.__dataclass_fields__:
        pytest.skip("this transformers shards no model as it loads it")
    tasks = json.dumps([write_task(tmp_path / "data", n) | {"limit": 48} for n in ("colour", "animal")])
    child = [str(HERE / "shared_trainer_child.py"), tiny, tasks]
    two = torchrun(*child, str(tmp_path / "two"), "2")
    assert two.returncode == 0, two.stderr[-3000:]
    alone = run([sys.executable, *child, str(tmp_path / "one"), "4"], timeout=300)
    assert alone.returncode == 0, alone.stderr[-3000:]
    a, b = (torch.load(tmp_path / n, weights_only=True) for n in ("one", "two"))
    assert a.keys() == b.keys() and {key.split("/")[0] for key in a} == {"seqft0", "gorp1", "gorp4"}
    for key, W in a.items():
        torch.testing.assert_close(b[key], W, atol=1e-8, rtol=0, msg=lambda said, key=key: f"{key}: {said}")


SHARDED_BY_HAND = """
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import TrainingArguments

import forgetless as fl
from forgetless import foreign, models
from forgetless.errors import ConfigError

dist.init_process_group("gloo", init_method="tcp://127.0.0.1:{port}", rank=0, world_size=1)
model, tokenizer = models.load({tiny!r})
fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
for method in ("osft", "olora", "gpm"):
    try:
        fl.ContinualCallback(method).begin(model, tokenizer)
    except ConfigError as error:
        print(error)
callback = fl.ContinualCallback("gorp")
callback.begin(model, tokenizer)
callback.optimizer(1e-3)
args = TrainingArguments(output_dir="unused", use_cpu=True, save_strategy="steps")
try:
    callback.on_train_begin(args, type("State", (), dict(global_step=0, max_steps=1)), None, model=model, optimizer=callback.trained)
except ConfigError as error:
    print(error)
"""


def test_what_a_foreign_trainer_cannot_shard_is_refused(tiny, tmp_path):
    code = SHARDED_BY_HAND.format(port=port(), tiny=tiny)
    said = run([sys.executable, "-c", code], timeout=120)
    assert said.returncode == 0, said.stderr[-3000:]
    lines = said.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["method osft", "method olora", "method gpm"]
    assert all("are spread over processes (fully_shard)" in line and "forgetless run with sharding: fsdp2" in line for line in lines[:3])
    assert "save_strategy='no'" in lines[3]


@pytest.mark.parametrize(("key", "said"), [("fsdp", "docs/scaling.md"), ("deepspeed", "its ZeRO optimizers flatten weights and gradients")])
def test_fsdp_and_deepspeed_of_the_arguments_are_refused_with_a_way_out(key, said):
    arguments = type("Arguments", (), {"n_gpu": 0, key: True})
    with pytest.raises(ConfigError, match=f"TrainingArguments.{key}: .*{said}.*sharding: fsdp2"):
        foreign.check_arguments(arguments)


def test_fsdp_and_deepspeed_of_a_config_name_sharding(small_run):
    for key in ("fsdp", "deepspeed"):
        config = small_run("seqft", tasks=("colour",))
        config["train"][key] = "x"
        with pytest.raises(ConfigError, match=f"train.{key} cannot be set; .*sharding: fsdp2"):
            load_config(config)

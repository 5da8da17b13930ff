"""Several processes: contract row 4 (two gloo ranks equal one process), whole runs through torchrun and accelerate launch, and the end of a rank."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_task
from safetensors.torch import load_file
from test_contract import EVERY, VARIANTS

import forgetless as fl
from forgetless.errors import GateRejected
from forgetless.methods import REGISTRY, get_class

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}


def port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def run(command: list[str], timeout: int = 300) -> subprocess.CompletedProcess:
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)


def torchrun(*command: str, processes: int = 2, timeout: int = 300) -> subprocess.CompletedProcess:
    return run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", port(), *command], timeout)


# -- row 4 -------------------------------------------------------------------------------------------------------------------------------

# every method of the registry; a spectral gap and exact bases, so that the order of summation cannot choose another subspace
METHODS = {name: {"name": name} for name in REGISTRY} | {
    "gorp": {"name": "gorp", "rank": None, "full_lr_ratio": 1.0, "energy": 0.5},
    "gorp-rank": {"name": "gorp", "rank": 3, "refresh": "svd", "energy": 0.5, "space_from": "first_moment", "max_rank": 4},
    "gorp-branches": {"name": "gorp", "use_lora": True, "energy": 0.5, "max_rank": 4},
    "olora": {"name": "olora", "l2": 0.001},
    "osft-adapter": {"name": "osft", "form": "adapter"},
    "ewc-lwf": {"name": "ewc", "on": {"name": "lwf"}},
    "replay": {"name": "replay", "buffer": 8},
    "gpm": {"name": "gpm", "threshold": 0.6},
    "inflora": {"name": "inflora", "energy": 0.6},
    "merge": {"name": "merge", "rule": "magmax"},
}
# and what else each can be told: test_contract.py's variants
FURTHER = {variant: {"name": name, **options} for variant, (name, options) in zip(VARIANTS, EVERY, strict=True) if options}


def comparable(method: dict) -> dict:
    """An adapter's dropout is drawn for the rows a process has, so that with it no two divisions of a batch are the same; and an epoch beside replay in whole batches."""
    if "on" in method:
        on = {"name": method["on"]} if isinstance(method["on"], str) else method["on"]
        method = method | {"on": comparable(on)}
    known = get_class(method["name"]).Options.model_fields
    return method | {key: value for key, value in (("lora_dropout", 0.0), ("rate", 0.3)) if key in known and method["name"] != "merge"}


def one_and_two(model, folder, methods):
    """{method: what it ended with} of one process with batches of 4, and of two with batches of 2."""
    # 48 rows: whole steps of 2 x 2 x 2; at the ragged end of an epoch Accelerate fills up the last process' batch with rows from its beginning
    tasks = json.dumps([write_task(folder / "data", n) | {"limit": 48} for n in ("colour", "animal")])
    (folder / "methods.json").write_text(json.dumps({name: comparable(method) for name, method in methods.items()}))
    arguments = [str(HERE / "ddp_child.py"), model, tasks]
    two = torchrun(*arguments, str(folder / "two"), str(folder / "methods.json"), "2", timeout=900)
    assert two.returncode == 0, two.stderr[-2000:]
    one = run([sys.executable, *arguments, str(folder / "one"), str(folder / "methods.json"), "4"], timeout=900)
    assert one.returncode == 0, one.stderr[-2000:]
    return tuple(torch.load(folder / n, weights_only=True) for n in ("one", "two"))


@pytest.fixture(scope="module")
def ranks(tiny, tmp_path_factory):
    return one_and_two(tiny, tmp_path_factory.mktemp("ranks"), METHODS)


@pytest.fixture(scope="module")
def further(tiny, tmp_path_factory):
    return one_and_two(tiny, tmp_path_factory.mktemp("further"), FURTHER)


def check_row_4(one: dict, two: dict) -> None:
    """What a method ends with: the model's weights, its memory, the loss of each step."""
    assert not two["apart"], "the processes end with different weights or memories"
    assert one["tensors"].keys() == two["tensors"].keys() and rounded(one["info"]) == rounded(two["info"])
    for key, a in one["tensors"].items():
        b = two["tensors"][key]
        if key.endswith(".basis"):  # a space is its projector: directions of equal energy may come out in another mixture
            a, b = a @ a.mT, b @ b.mT
        torch.testing.assert_close(a, b, atol=1e-8, rtol=0, msg=lambda said, key=key: f"{key}: {said}")


def rounded(info: dict) -> dict:
    return json.loads(json.dumps(info), parse_float=lambda digits: round(float(digits), 8))


def test_every_method_of_the_registry_is_here():
    assert {method["name"] for method in METHODS.values()} == set(REGISTRY)


@pytest.mark.xdist_group("ranks")  # all in one process of the run, which makes the two ranks once
@pytest.mark.parametrize("name", METHODS)
def test_row_4_two_ranks_equal_one_process(name, ranks):
    check_row_4(*(found[name] for found in ranks))
    assert [found[name]["buckets"] for found in ranks] == [[], [True]]  # two processes send gradients from where they are
    if name.startswith("gorp"):
        assert any(key.endswith(".basis") and t.shape[1] for key, t in ranks[0][name]["tensors"].items())


@pytest.mark.slow
@pytest.mark.xdist_group("further")
@pytest.mark.parametrize("name", FURTHER)
def test_row_4_for_all_that_a_method_can_be_told(name, further):
    check_row_4(*(found[name] for found in further))


# -- whole runs --------------------------------------------------------------------------------------------------------------------------


def config_file(config: dict, tmp_path: Path) -> str:
    (tmp_path / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    return str(tmp_path / "config.yaml")


LEAVING = """
import atexit, sys
import torch.distributed as dist
from forgetless import cli

atexit.register(lambda: print("group at exit:", dist.is_initialized(), file=sys.stderr))  # runs after all that is registered later
sys.argv = ["forgetless", "run", "--progress", "json", {path!r}]
cli.main()
"""


@pytest.fixture(scope="module")
def through_torchrun(tiny, tmp_path_factory):
    """(config, what the process said) of a run of two tasks by two processes."""
    folder = tmp_path_factory.mktemp("torchrun")
    config = {
        "model": tiny, "tasks": [write_task(folder / "data", name) for name in ("colour", "animal")], "method": {"name": "gorp"},
        "train": {"learning_rate": 1e-3, "max_steps": 6, "per_device_train_batch_size": 4, "bf16": False, "use_cpu": True},
        "evaluate": {"limit": 8}, "output_dir": str(folder / "run"),
    }  # fmt: skip
    script = folder / "run.py"
    script.write_text(LEAVING.format(path=config_file(config, folder)))
    done = torchrun(str(script))
    assert done.returncode == 0, done.stderr[-2000:]
    return config, done


@pytest.mark.xdist_group("through torchrun")  # the run they share is made once
def test_a_run_through_torchrun_commits_once_and_is_loaded_by_one_process(through_torchrun):
    config, done = through_torchrun
    assert done.stdout.count("average accuracy") == 2  # one table a scorer, printed once
    folder = Path(config["output_dir"])
    lines = [json.loads(line) for line in (folder / "lineage.jsonl").read_text().splitlines()]
    assert [line["task"] for line in lines] == ["colour", "animal"]
    rows = [json.loads(line) for line in (folder / "tasks" / "01-animal" / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 16 and sorted({r["task"] for r in rows}) == ["animal", "colour"]  # every row once, whoever scored it
    again = fl.run(config)  # alone: all is there, the model is the one that was committed
    assert again.resumed_at == 2
    assert done.stderr.count("group at exit: False") == 2  # left to the interpreter, one exit in twenty aborts and takes the other process with it


def test_two_processes_put_their_whole_weights_aside_each_for_itself(small_run, tmp_path):
    config = small_run({"name": "lora", "lora_dropout": 0.0}, tasks=("colour", "animal"), quantize="4bit")
    done = torchrun("-m", "forgetless", "run", config_file(config, tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    config["train"]["per_device_train_batch_size"] *= 2
    alone = fl.run(config | {"output_dir": str(tmp_path / "apart")})
    ours, other = (load_file(path / "model" / "model.safetensors") for path in (tmp_path / "run", alone.path))
    for name, W in ours.items():  # the rows of a step are the same, and added up in another order
        torch.testing.assert_close(W, other[name], atol=2e-4, rtol=0)
    assert not list((tmp_path / "run").rglob("whole*"))


def test_a_run_through_accelerate_launch(small_run, tmp_path):
    config = small_run("seqft", tasks=("colour",))
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--main_process_port", port(), "--mixed_precision", "no", "--dynamo_backend", "no"]
    done = run([*launcher, "-m", "forgetless", "run", "--progress", "none", config_file(config, tmp_path)])
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("average accuracy") == 2
    steps = [json.loads(line) for line in (Path(config["output_dir"]) / "timing.jsonl").read_text().splitlines()]
    assert sum(s["event"] == "step" for s in steps) == 6


DYING = """
import os, sys
import forgetless.trainer as trainer
from forgetless import cli
from forgetless.errors import DataError

calls, real = [], trainer.answer_loss
def fail(*args, **kwargs):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 9:
        raise {error}
    return real(*args, **kwargs)
trainer.answer_loss = fail
sys.argv = ["forgetless", "run", "--progress", "none", {path!r}]
cli.main()
"""


@pytest.mark.xdist_group("through torchrun")
@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("DataError('row 7 is gone')", "rank 1: error: row 7 is gone"),
        pytest.param("RuntimeError('boom')", "rank 1: internal error", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_dies_ends_the_job_with_its_error_first(error, said, through_torchrun, tmp_path):
    config = through_torchrun[0] | {"output_dir": str(tmp_path / "run"), "checkpoint_every": 2}
    script = tmp_path / "dying.py"
    script.write_text(DYING.format(error=error, path=config_file(config, tmp_path)))
    ended = torchrun(str(script), timeout=120)
    assert ended.returncode != 0
    speaks = [line for line in ended.stderr.splitlines() if line.startswith("rank ")]
    assert speaks and speaks[0].startswith(said), ended.stderr[-3000:]
    folder = Path(config["output_dir"])
    assert (folder / "current").read_text() == "00-colour\n"  # the ninth loss is in the second task: the first is kept
    if "row 7" in said:  # row 3, for two processes: both go on from the second task's checkpoint, and end where the undisturbed run did
        assert list((folder / "tasks" / ".01-animal.training").glob("checkpoint-2/forgetless.json"))
        again = torchrun("-m", "forgetless", "run", "--progress", "json", config_file(config, tmp_path))
        assert again.returncode == 0 and "goes on from step 2" in again.stderr, again.stderr[-2000:]
        assert (folder / "lineage.jsonl").read_text() == (Path(through_torchrun[0]["output_dir"]) / "lineage.jsonl").read_text()


def test_a_gate_in_two_processes(small_run, tmp_path):
    """They share the rows that are scored and come to one verdict: refused once, nothing current, exit status 3 of the one that speaks, no process left waiting."""
    config = small_run("seqft", tasks=("colour",), gate={"min_new_task": 1.0, "max_drift_kl": 1000.0, "max_rows": 12}, probes={"every": 3, "rows": 5})
    config["train"] |= {"learning_rate": 1e-6, "max_steps": 3}
    ended = torchrun("-m", "forgetless", "run", "--progress", "none", config_file(config, tmp_path), timeout=120)
    assert ended.returncode and "exitcode  : 3" in ended.stderr and "min_new_task asks for 100" in ended.stderr
    folder = Path(config["output_dir"])
    (line,) = map(json.loads, (folder / "lineage.jsonl").read_text().splitlines())
    assert (line["kind"], line["gate"]) == ("reject", "reject") and not (folder / "current").exists()
    metrics = json.loads((folder / "rejected/00-colour/metrics.json").read_text())
    assert metrics["drift"]["prompts"] == 12 and [look["step"] for look in metrics["probes"]] == [0, 3] and metrics["probe_rows"] == {"colour": 5}
    one = config | {"output_dir": str(tmp_path / "one"), "train": config["train"] | {"per_device_train_batch_size": 8}}
    with pytest.raises(GateRejected):
        fl.run(one)
    alone = json.loads((tmp_path / "one/rejected/00-colour/metrics.json").read_text())
    assert alone["gate"] == metrics["gate"] and alone["probes"] == metrics["probes"]


APART = """
import os, sys
import torch
from forgetless import cli
from forgetless.methods.seqft import SeqFT

def model_apart(self, model, task, memory):
    with torch.no_grad():
        next(model.parameters()).add_(float(os.environ["RANK"]))
    return model

def memory_apart(self, model, task, memory):
    memory.put("seqft", {{"of": torch.full((2,), float(os.environ["RANK"]))}})
    return model

for SeqFT.end_task, path in zip((model_apart, memory_apart), {paths!r}):
    sys.argv = ["forgetless", "run", "--progress", "none", path]
    try:
        cli.main()
    except SystemExit as end:
        assert end.code == 1
"""


def test_processes_that_hold_different_models_or_memories_commit_nothing(small_run, tmp_path):
    """A routed set's model is the same in every process, come what may: what was learned is in its memory."""
    runs = [small_run("seqft", tasks=("colour",), output_dir=str(tmp_path / name)) for name in ("model", "memory")]
    paths = [tmp_path / "model.yaml", tmp_path / "memory.yaml"]
    for config, path in zip(runs, paths, strict=True):
        path.write_text(json.dumps(config))
    script = tmp_path / "apart.py"
    script.write_text(APART.format(paths=[str(path) for path in paths]))
    ended = torchrun(str(script), timeout=120)
    assert ended.returncode == 0 and "different models" in ended.stderr and "different memories" in ended.stderr, ended.stderr[-2000:]
    assert not any((Path(config["output_dir"]) / "current").exists() for config in runs)

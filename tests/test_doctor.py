"""`forgetless doctor`: what it finds, and each of its warnings provoked once, with what to do about it."""

from __future__ import annotations

import errno
import json
import os
import re
import types
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_model_folder

from forgetless import doctor, machine
from forgetless.config import load_config

Memory = namedtuple("Memory", "total available")


@pytest.fixture
def calm(monkeypatch):
    """A machine of two cores with nothing to warn of."""
    import psutil

    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 0.5, 0.5), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(machine, "_seconds", lambda B: 1e-3)
    monkeypatch.setattr("forgetless.trainer.bf16_pays", lambda use_cpu=False: True)
    monkeypatch.setattr(doctor, "accelerate_config", lambda: None)
    for name in ("OMP_NUM_THREADS", "WORLD_SIZE", "HF_HUB_OFFLINE", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def config(small_run):
    """A run of two tasks without overlap, in the order of warnings: none."""

    def make(**changes):
        given = small_run("gorp", tasks=("colour", "animal")) | changes
        for task in given["tasks"]:
            trained = [json.loads(line) for line in Path(task["data"]).read_text().splitlines()]
            Path(task["test"]).write_text("".join(json.dumps(row | {"sentence": row["sentence"] + " N / A"}) + "\n" for row in trained[:12]))
        given["train"] = {key: value for key, value in given["train"].items() if key != "bf16"} | changes.get("train", {})
        return given

    return make


def warnings(about: str, config=None) -> list[tuple[str, str]]:
    """(what, do) of the warnings about one thing."""
    found = doctor.examine(None if config is None else load_config(config))["warnings"]
    return [(w["what"], w["do"]) for w in found if w["about"] == about]


def one(about: str, config=None) -> tuple[str, str]:
    found = warnings(about, config)
    assert len(found) == 1, found
    return found[0]


# -- what it finds -------------------------------------------------------------------------------------------------------------------------


def test_a_calm_machine_and_a_sound_config_have_no_warning(calm, config, monkeypatch, forgetless_, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config()))
    for given in ([], ["c.yaml"]):
        status, out, err = forgetless_("doctor", *given)
        assert status == 0 and out.rstrip().endswith("no warnings") and err == ""
    found = json.loads(forgetless_("doctor", "c.yaml", "--json")[1])
    assert found["warnings"] == [] and not Path("run").exists() and not list(tmp_path.glob(".forgetless*"))


def test_what_there_is_without_a_config(forgetless_):
    found = json.loads(forgetless_("doctor", "--json")[1])
    assert (
        found["packages"]["torch"] == torch.__version__ and found["supported"]["transformers"].startswith(">=") and "pytest" not in found["packages"]
    )
    assert found["devices"]["memory"] > found["devices"]["memory_available"] > 0 and found["threads"]["torch"] == torch.get_num_threads()
    assert found["bf16"]["works"] and found["bf16"]["error"] < 0.02 and found["disk"]["hard_links"] and found["disk"]["sync_seconds"] >= 0
    assert {"fsdp", "deepspeed", "world_size", "accelerate_config"} <= found["launchers"].keys() and found["hub"]["cache"]


@pytest.mark.parametrize("method", ["gorp", "lora", "seqft", {"name": "gorp", "full_modules": ["q_proj", "up_proj"]}])
def test_which_layers_are_trained_and_why_the_others_are_not(calm, config, method):
    found = doctor.examine(load_config(config(method=method)))
    kinds = {entry["kind"]: entry for entry in found["modules"]}
    assert sum(entry["parameters"] for entry in found["modules"]) == found["model"]["parameters"]
    name = method if isinstance(method, str) else "some"
    trained = {kind: (entry["trained"], entry["layers"]) for kind, entry in kinds.items()}
    assert trained["q_proj"] == (2, 2) and trained["v_proj"] == ((0, 2) if name == "some" else (2, 2))
    assert (trained["lm_head"] == (1, 1)) == (name == "seqft") == (kinds["others"]["trained"] > 0)
    assert (kinds["lm_head"]["why"] == "") == (name == "seqft") and kinds["q_proj"]["why"] == ""
    if name == "some":
        assert kinds["v_proj"]["why"] == "full_modules does not name it"
        assert kinds["lm_head"]["why"] == "the head, left out unless it is named" and "no linear layers" in kinds["others"]["why"]


def test_a_tied_head_is_said_to_be_one(calm, config, tmp_path):
    folder = make_model_folder(tmp_path / "tied", tied=True)
    kinds = {entry["kind"]: entry for entry in doctor.examine(load_config(config(model=folder)))["modules"]}
    assert kinds["lm_head"]["why"] == "the head, whose weight is that of model.embed_tokens" and kinds["lm_head"]["parameters"] == 0


def test_the_verdict_on_launchers_is_the_trainers_own(calm, monkeypatch):
    from forgetless import trainer

    found, _ = doctor.launchers()
    for name, variables in doctor.LAUNCHERS.items():
        with doctor.environment(variables):
            assert found[name] == doctor.refusal(trainer.check_launcher)
    monkeypatch.setattr(trainer, "check_launcher", lambda: None)
    assert doctor.launchers()[0]["fsdp"] is None and not set(doctor.LAUNCHERS["fsdp"]) & os.environ.keys()


def test_the_plan_is_that_of_estimate_and_what_is_there_is_taken_off(calm, config):
    given = config()
    found = doctor.examine(load_config(given))
    assert found["plan"]["peak_bytes"] > 0 and found["disk"]["needed"] == found["plan"]["disk_bytes"]
    Path(given["output_dir"]).mkdir()
    (Path(given["output_dir"]) / "something").write_bytes(bytes(10_000))
    assert doctor.examine(load_config(given))["disk"]["needed"] == found["plan"]["disk_bytes"] - 10_000


# -- each warning --------------------------------------------------------------------------------------------------------------------------


def test_a_version_outside_what_is_supported(calm, monkeypatch):
    real = machine.importlib.metadata.version
    monkeypatch.setattr(machine.importlib.metadata, "version", lambda name: "4.57.0" if name == "transformers" else real(name))
    what, do = one("versions")
    assert "transformers 4.57.0 is installed, and forgetless supports >=" in what and do.startswith("pip install 'transformers>=")


def test_a_package_that_is_missing(calm, monkeypatch):
    def version(name):
        if name in ("platformdirs", "matplotlib"):  # the second is optional
            raise machine.importlib.metadata.PackageNotFoundError(name)
        return "99"

    monkeypatch.setattr(machine.importlib.metadata, "version", version)
    found, missing = machine.packages()
    assert [w.what for w in missing] == ["platformdirs is not installed, and forgetless needs it"] and missing[
        0
    ].do == "pip install 'platformdirs>=4'"
    assert found["matplotlib"]["installed"] is None and found["matplotlib"]["extra"] == "plots"


def gpus(monkeypatch, count: int, free: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i=0: (free, 80_000_000_000))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i=0: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i=0: "a GPU")


def test_a_gpu_that_others_use(calm, monkeypatch):
    gpus(monkeypatch, 1, 30_000_000_000)
    found, (warning,) = machine.devices()
    assert warning.what == "50.0 of 80 GB of GPU 0 are taken by other processes" and "nvidia-smi" in warning.do
    assert found["gpus"] == [{"name": "a GPU", "memory": 80_000_000_000, "memory_free": 30_000_000_000, "capability": "9.0"}]


def test_several_gpus_and_one_process(calm, monkeypatch):
    gpus(monkeypatch, 2, 80_000_000_000)
    (warning,) = machine.devices()[1]
    assert warning.what.startswith("2 GPUs are visible and one process") and "torchrun --nproc-per-node 2" in warning.do
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert machine.devices()[1] == []


def test_a_build_for_cuda_without_a_gpu(calm, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    what, do = one("devices")
    assert "torch is built for CUDA 13.0 and sees no GPU" in what and "nvidia-smi" in do


def test_bf16_that_is_emulated(calm, monkeypatch):
    monkeypatch.setattr(machine, "_seconds", lambda B: 3e-3 if B.dtype == torch.bfloat16 else 1e-3)
    what, do = one("bf16")
    assert "takes 3.0 times as long as in fp32" in what and "train.bf16: false" in do


def test_bf16_that_is_off_where_it_pays(calm, config):
    what, do = one("bf16", config(train={"bf16": False}))
    assert what == "train.bf16 is false, and this machine has instructions for it" and "take train.bf16 out" in do


def test_bf16_that_does_not_work(calm, monkeypatch):
    def refuse(B):
        if B.dtype == torch.bfloat16:
            raise RuntimeError("not implemented for 'BFloat16'")
        return 1e-3

    monkeypatch.setattr(machine, "_seconds", refuse)
    what, do = one("bf16")
    assert what == "torch has no product in bf16 on this device" and do == "train.bf16: false, and dtype: float32"


@pytest.mark.parametrize("threads, do", [(1, "OMP_NUM_THREADS=2"), (8, "OMP_NUM_THREADS=2")])
def test_too_few_threads_and_too_many(calm, monkeypatch, threads, do):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    what, said = one("threads")
    assert f"torch uses {threads} " in what and do in said


def test_a_machine_that_is_busy(calm, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (7.25, 7, 7), raising=False)
    what, do = one("threads")
    assert "7.2 want one of 2 cores" in what and "wait" in do


@pytest.mark.parametrize("name", ["ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_USE_DEEPSPEED"])
def test_a_launcher_that_asks_for_what_is_not_trained_under(calm, monkeypatch, name):
    monkeypatch.setenv(name, "INDUCTOR" if "DYNAMO" in name else "true")
    what, do = one("launchers")
    assert name in what or "deepspeed" in what.lower()
    assert "torchrun" in do


def test_an_accelerate_configuration_that_asks_for_it(calm, monkeypatch, tmp_path):
    (tmp_path / "default_config.yaml").write_text("distributed_type: DEEPSPEED\n")
    monkeypatch.undo()
    monkeypatch.setattr("accelerate.commands.config.config_args.default_yaml_config_file", str(tmp_path / "default_config.yaml"))
    assert doctor.accelerate_config() == "DEEPSPEED"
    found, (warning,) = doctor.launchers()
    assert warning.what == found["deepspeed"] and warning.about == "launchers"


def test_offline_without_the_model(calm, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found, (warning,) = machine.hub("somebody/a-model-that-is-not-there")
    assert found["offline"] and not found["model_in_cache"]
    assert "'somebody/a-model-that-is-not-there' is not in" in warning.what and "hf download somebody/a-model-that-is-not-there" in warning.do
    assert machine.hub("bundled:smollm2-135m")[1] == machine.hub(str(tmp_path))[1] == machine.hub(None)[1] == []


def test_too_little_disk(calm, config, monkeypatch):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    what, do = one("disk", config())
    assert re.search(r"will take [\d.]+ GB, and 0.0 GB are free", what) and "keep: last 1" in do


def test_a_file_system_without_links(calm, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(Path, "symlink_to", refuse)
    hard, folders = warnings("disk")
    assert "has no hard links" in hard[0] and "keep: last 1" in hard[1]
    assert "model/ will be a copy" in folders[0] and folders[1]


def test_a_folder_that_cannot_be_written(calm, monkeypatch):
    def refuse(**_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(machine.tempfile, "TemporaryDirectory", refuse)
    what, do = one("disk")
    assert what.endswith("cannot be written (Permission denied)") and do == "another output_dir"


def test_a_disk_that_syncs_slowly(calm, monkeypatch):
    clock = iter(range(0, 1000, 9))
    monkeypatch.setattr(machine, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    what, do = machine.disk(Path("."), None)[1][0].what, machine.disk(Path("."), None)[1][0].do
    assert "to sync 1 MB takes 9 s" in what and "local disk" in do


def test_too_little_memory(calm, config, monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(1_000_000_000, 100_000_000))
    what, do = one("memory", config())
    assert (
        re.search(r"training will take [\d.]+ GB of memory, and 0.1 GB are free; the largest part: process", what) and "gradient_checkpointing" in do
    )


def test_a_long_task_without_checkpoints(calm, config, monkeypatch):
    monkeypatch.setattr("forgetless.estimate.measured_speed", lambda *_: 1e3)
    what, do = one("checkpoints", config())
    assert "begins its task again" in what and do == "checkpoint_every: 100"
    assert warnings("checkpoints", config(checkpoint_every=5)) == []


def test_rows_that_are_cut(calm, config):
    given = config()
    given["tasks"][0]["max_prompt_tokens"] = 8
    what, do = one("data", given)
    found = doctor.examine(load_config(given))["tasks"]
    assert found[0]["cut"] == found[0]["looked_at"] == found[0]["rows"]["train"] and found[1]["cut"] == 0
    assert "rows lose the end of their text (the longest prompt has 9 tokens)" in what and "raise tasks.0.max_prompt_tokens (now 8)" in do
    given["tasks"][0] |= {"max_prompt_tokens": 512, "max_text_tokens": 3}
    assert "raise tasks.0.max_text_tokens (now 3)," in one("data", given)[1]
    Path(given["tasks"][0]["data"]).write_text("".join(json.dumps({"prompt": "red " * n, "completion": "cat"}) + "\n" for n in range(1, 13)))
    free = {"name": "colour", "data": given["tasks"][0]["data"], "format": "prompt_completion", "max_prompt_tokens": 8}
    what, do = one("data", given | {"tasks": [free]})
    assert "rows lose the beginning of their text" in what and "raise tasks.0.max_prompt_tokens (now 8)," in do


def test_texts_that_are_trained_and_scored(calm, config):
    given = config()
    Path(given["tasks"][1]["test"]).write_text(Path(given["tasks"][1]["data"]).read_text())
    what, do = one("data", given)
    assert "'animal'" in what and "also stand in its training rows" in what and "take them out" in do


def test_eager_attention_and_long_rows(calm, config, monkeypatch):
    from forgetless import models

    real = models.load

    def eager(*given, **options):
        model, tokenizer = real(*given, **options)
        model.set_attn_implementation("eager")
        return model, tokenizer

    monkeypatch.setattr(models, "load", eager)
    assert warnings("attention", config()) == []
    monkeypatch.setattr(doctor, "examine_task", lambda *_: ({"tokens_max": 600}, []))
    what, do = one("attention", config())
    assert "eager attention alone" in what and "600 tokens" in what and "max_prompt_tokens" in do


def test_bfloat16_that_loses_updates(calm, config):
    what, do = one("precision", config(dtype="bfloat16", precision="plain"))
    assert "precision: plain lose every update smaller" in what and "fp32_master" in do


def test_packages_that_the_config_asks_for(calm, config, monkeypatch):
    real = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name in ("wandb", "lm_eval") else real(name))
    found = doctor.for_config(load_config(config(report_to="wandb", evaluate={"general": ["boolq"]})))
    assert [(w.about, w.do) for w in found] == [("report_to", "pip install wandb"), ("evaluate", "pip install 'forgetless[eval]'")]


def test_every_warning_is_printed_with_what_to_do(calm, monkeypatch, forgetless_):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    _, out, _ = forgetless_("doctor")
    assert "\nwarning    torch uses 1 of 2 cores\n           do: unset OMP_NUM_THREADS" in out and out.rstrip().endswith("1 warning")


def test_may_several_processes_share_the_model(calm, config, monkeypatch, forgetless_, tmp_path):
    """As the run itself would say; a config that asks for it and may not have it is refused, as there."""
    given = config()
    assert doctor.examine(load_config(given))["sharding"] == {"asked": None, "fsdp2": None}
    found, quantised = (
        doctor.sharding(load_config(config(method="lora", quantize="4bit")))[0],
        config(method="lora", quantize="4bit", sharding="fsdp2"),
    )
    assert found["asked"] is None and "sharding: fsdp2: quantize needs whole weights" in found["fsdp2"]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(quantised))
    status, out, err = forgetless_("doctor", str(tmp_path / "c.yaml"))
    assert status == 2 and found["fsdp2"] in err
    what, do = one("sharding", given | {"sharding": "fsdp2"})
    assert "one process: it would hold the whole model" in what and "torchrun" in do
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert doctor.sharding(load_config(given | {"sharding": "fsdp2"}))[1] == []


def test_bf16_that_a_gpu_emulates_is_not_switched_on(monkeypatch):
    from forgetless.trainer import bf16_pays

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not bf16_pays()

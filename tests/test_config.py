"""The configuration: overrides, short forms, defaults, and that reading one costs no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from forgetless.config import RunConfig, TaskConfig, load_config
from forgetless.errors import ConfigError

LEAST = {"model": "m", "tasks": [{"name": "a", "data": "a.jsonl"}, {"name": "b", "suite": "demo/cities"}], "method": "gorp", "output_dir": "runs/x"}


# -- overrides ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("seed=3", lambda c: c.seed, 3),
        ("method.rank=4", lambda c: c.method.options, {"rank": 4}),
        ("method.rank=null", lambda c: c.method.options, {"rank": None}),
        ("method={name: seqft, modules: linear}", lambda c: (c.method.name, c.method.options), ("seqft", {"modules": "linear"})),
        ("method.full_modules=[q_proj, v_proj]", lambda c: c.method.options["full_modules"], ["q_proj", "v_proj"]),
        ("method.full_modules=.*=.*", lambda c: c.method.options["full_modules"], ".*=.*"),
        ("train.learning_rate=1e-4", lambda c: c.train, {"learning_rate": 1e-4}),
        ("train.learning_rate=1.5E+3", lambda c: c.train, {"learning_rate": 1500.0}),
        ("method.energy=9e-1", lambda c: c.method.options, {"energy": 0.9}),
        ("train.lr_scheduler_kwargs.num_cycles=1e0", lambda c: c.train, {"lr_scheduler_kwargs": {"num_cycles": 1.0}}),
        ("tasks.0.data=x.jsonl", lambda c: c.tasks[0].data, "x.jsonl"),
        ("tasks.1.suite_options.hard=true", lambda c: c.tasks[1].suite_options, {"hard": True}),
        ("tasks.1={name: c, data: c.jsonl}", lambda c: (len(c.tasks), c.tasks[1].name), (2, "c")),
        ("tasks.0.labels=['yes', 'no']", lambda c: c.tasks[0].labels, ["yes", "no"]),
        ("evaluate.limit=null", lambda c: c.evaluate.limit, None),
        ("output_dir=runs/1e-4", lambda c: c.output_dir, "runs/1e-4"),
    ],
)
def test_an_override_reaches_its_key(override, read, value):
    found = read(load_config(LEAST, [override]))
    assert found == value and type(found) is type(value)


def test_later_overrides_win_and_sections_that_were_not_there_are_made():
    config = load_config(LEAST, ["train.max_steps=3", "train.max_steps=4", "evaluate.split=dev"])
    assert config.train == {"max_steps": 4} and config.evaluate.split == "dev"


def test_a_number_without_a_dot_is_a_number_in_the_file_too(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(LEAST) + "train: {learning_rate: 1e-4, adam_epsilon: 1E-8, logging_dir: 1e-4x}\n")
    assert load_config(tmp_path / "c.yaml").train == {"learning_rate": 1e-4, "adam_epsilon": 1e-8, "logging_dir": "1e-4x"}


# -- sources -----------------------------------------------------------------------------------------------------------------------------


def test_a_file_a_dict_and_a_run_config_are_the_same(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(LEAST))
    one = load_config(LEAST, ["method.rank=4"])
    assert one == load_config(tmp_path / "c.yaml", ["method.rank=4"]) == load_config(str(tmp_path / "c.yaml"), ["method.rank=4"])
    assert (
        one == load_config(one) == load_config(load_config(LEAST), ["method.rank=4"]) == load_config(yaml.safe_load(yaml.safe_dump(one.model_dump())))
    )


def test_what_is_given_is_not_changed():
    given = {**LEAST, "tasks": [dict(LEAST["tasks"][0])], "train": {"learning_rate": "1e-4"}}
    config = load_config(given)
    load_config(given, ["train.max_steps=1", "tasks.0.name=z", "method.rank=4"])
    load_config(config, ["train.max_steps=1", "tasks.0.name=z", "method.rank=4"])
    assert given["tasks"][0]["name"] == config.tasks[0].name == "a" and given["train"] == {"learning_rate": "1e-4"} and given["method"] == "gorp"
    assert config.train == {"learning_rate": 1e-4} and config.method.options == {}


def test_a_method_may_be_its_name():
    assert load_config(LEAST).method == load_config(LEAST | {"method": {"name": "gorp"}}).method
    assert load_config(LEAST).method.options == {}


def test_defaults_are_gentle_and_not_shared():
    one, other = load_config(LEAST), load_config(LEAST)
    assert (one.trust_remote_code, one.seed, one.keep, one.store, one.train) == (False, 0, "all", "rows", {})
    assert (one.evaluate.limit, one.evaluate.split, one.evaluate.unseen, one.evaluate.scorers) == (200, "test", False, ["choice", "exact_match"])
    assert (one.tasks[0].format, one.tasks[0].labels, one.tasks[0].max_prompt_tokens) == ("classification", None, 512)
    one.train["max_steps"] = 1
    one.evaluate.scorers.clear()
    one.tasks[0].columns["sentence"] = "text"
    one.tasks[0].suite_options["hard"] = True
    assert other == load_config(LEAST) and other.train == {} and other.tasks[1].columns == {} and other.tasks[1].suite_options == {}


def test_every_mistake_is_told_at_once():
    with pytest.raises(ConfigError) as error:
        load_config(LEAST | {"sead": 1, "keep": "some", "evaluate": {"limit": 0}})
    assert all(part in str(error.value) for part in ("config: ", "unknown key 'sead'; did you mean 'seed'?", "keep: 'some'", "evaluate.limit"))


@pytest.mark.parametrize("name", ["a", "A-1.b_c", "0", "x" * 64])
def test_names_that_are_folders(name):
    assert TaskConfig(name=name, data="x").name == name


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "-a", "a/b", "a\\b", "a..b", "a b", "ä", "a\n", "x" * 65, "../../etc"])
def test_names_that_are_not(name):
    with pytest.raises(ValidationError):
        TaskConfig(name=name, data="x")


@pytest.mark.parametrize("prompt", ["{sentence}", "{{x}} {sentence}", "Text: {sentence}\nAnswer:"])
def test_prompts_with_the_text_in_them(prompt):
    assert TaskConfig(name="a", data="x", prompt=prompt).prompt == prompt


@pytest.mark.parametrize("prompt", ["", "Text:", "{{sentence}}", "{0}", "{}", "{sentence", "{sentence.upper.x}", "{sentence} {label}"])
def test_prompts_without(prompt):
    with pytest.raises(ValidationError, match="must contain {sentence}"):
        TaskConfig(name="a", data="x", prompt=prompt)


def test_the_config_that_comes_with_the_package_is_valid():
    from importlib.resources import files

    assert isinstance(load_config(yaml.safe_load(files("forgetless").joinpath("first.yaml").read_text())), RunConfig)


# -- what it costs -----------------------------------------------------------------------------------------------------------------------

HEAVY = "torch, transformers, accelerate, safetensors, numpy"
CLI = "from forgetless.cli import main\ntry: main()\nexcept SystemExit as stop: print('status', stop.code)\n"


@pytest.mark.parametrize(
    ("code", "argv", "status"),
    [
        ("import forgetless\nforgetless.RunConfig, forgetless.load_config, forgetless.methods.REGISTRY, dir(forgetless)\nprint('status 0')\n", [], 0),
        (CLI, ["--help"], 0),
        (CLI, ["run", "--help"], 0),
        (CLI, ["run", "bad.yaml"], 2),
        (CLI, ["run", "bad.yaml", "method=gorb"], 2),
        (CLI, ["init", "new.yaml"], 0),
    ],
    ids=["import", "help", "help of a command", "unknown key", "unknown method", "init"],
)
def test_no_torch_before_it_is_needed(tmp_path, code, argv, status):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(LEAST | {"metod": 1}))
    code += f"import sys\nprint('heavy', [name for name in '{HEAVY}'.split(', ') if name in sys.modules])\n"
    ran = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert ran.stdout.splitlines()[-2:] == [f"status {status}", "heavy []"], ran.stderr
    assert Path(tmp_path / "new.yaml").is_file() == ("init" in argv)


# -- where rows come from, and what is measured ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source", ["hub:a/b", "hub:b", "hub:a/b:train", "hub:a/b:train[:10]", "hub:a/b:c:train[1:2]", "hub:a/b@v1:c:test", "hub:./d", "x.csv", "hub"]
)
def test_sources(source):
    assert TaskConfig(name="a", data=source, test=source, dev=source).dev == source


@pytest.mark.parametrize(
    "source",
    ["hub:", "hub::train", "hub:a/b:", "hub:a/b::train", "hub:a/b:c:d:e", "hub:a/b@:train", "hub:@v1", "hub:a/b:train[:1", "hub:a/b:train:c@v1:x"],
)
@pytest.mark.parametrize("key", ["data", "test", "dev"])
def test_hub_sources_that_are_none(source, key):
    with pytest.raises(ValidationError, match="write hub:OWNER/NAME"):
        TaskConfig(**{"name": "a", "data": "x", key: source})


def test_metric_is_a_scorer_only_where_one_is_named():
    assert load_config(LEAST).scorers == ["choice", "exact_match"]
    free = {"name": "c", "data": "x", "format": "prompt_completion", "metric": "nll"}
    assert load_config(LEAST | {"tasks": [*LEAST["tasks"], free], "evaluate": {"scorers": ["exact_match"]}}).scorers == ["metric", "exact_match"]
    config = load_config(LEAST | {"watch": [free]}, ["watch.0.data=y"])
    assert (
        config.scorers == ["metric", "choice", "exact_match"] and config.watch[0].data == "y" and config.evaluate.scorers == ["choice", "exact_match"]
    )


def test_the_key_on_is_not_yaml_s_true(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "model: m\ntasks: [{name: a, data: a.jsonl}]\nmethod: {name: replay, on: {name: ewc, on: {name: gorp, energy: 9e-1}}}\noutput_dir: out\n"
    )
    options = load_config(tmp_path / "c.yaml").method.options
    assert options == {"on": {"name": "ewc", "on": {"name": "gorp", "energy": 0.9}}}


def test_post_is_the_method_that_goes_beside(tmp_path):
    base = {"model": "m", "tasks": [{"name": "a", "data": "a.jsonl"}], "output_dir": "out"}
    method = load_config(base | {"method": {"name": "gorp", "rank": 8, "post": "lines"}}).method
    assert (method.name, method.options) == ("lines", {"on": {"name": "gorp", "rank": 8}})
    method = load_config(base | {"method": {"name": "gorp", "post": {"name": "merge", "rule": "ema"}}}).method
    assert (method.name, method.options) == ("merge", {"rule": "ema", "on": {"name": "gorp"}})
    with pytest.raises(ConfigError, match="post: one of lines, merge.*got 'replay'"):
        load_config(base | {"method": {"name": "gorp", "post": "replay"}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probes": {"stop": True}}, "probes.stop .* needs probes.every"),
        ({"probes": {"stop": True, "every": 5}}, "needs gate.max_worst_task"),
        ({"gate": {"max_wurst_task": 0.1}}, "unknown key 'gate.max_wurst_task'; did you mean 'max_worst_task'"),
        ({"gate": {"max_worst_task": 2}}, "gate.max_worst_task"),
        ({"keep": "last 0"}, "one of: all, last N, tagged"),
    ],
)
def test_gate_probes_and_keep(changes, message):
    with pytest.raises(ConfigError, match=message):
        load_config({"model": "m", "tasks": [{"name": "a", "data": "a.jsonl"}], "method": "gorp", "output_dir": "r", **changes})

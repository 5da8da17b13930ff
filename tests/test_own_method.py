"""A method of the user's own, one file: named as module:Class, with an optimizer of its own."""

from __future__ import annotations

import json
import sys

import pytest

import forgetless as fl
from forgetless.errors import ConfigError

MINE = """
import torch
import forgetless as fl
from forgetless.methods.base import Options

class Mine(fl.Method):
    name = "mine"
    class Options(Options):
        momentum: float = 0.9
    def param_groups(self, model):
        return [{"params": [p for n, p in model.named_parameters() if "mlp" in n], "names": [n for n, _ in model.named_parameters() if "mlp" in n]}]
    def optimizer(self, groups, **settings):
        return torch.optim.SGD([g["params"][i] for g in groups for i in range(len(g["params"]))], lr=settings["lr"], momentum=self.options.momentum)

not_a_class = 3
def not_a_method(**options): pass
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_method.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_method", raising=False)  # the documentation has one of that name


def test_it_runs_resumes_and_is_recorded(mine, small_run, monkeypatch):
    from test_contract import Killed, kill_at

    config = small_run({"name": "my_method:Mine", "momentum": 0.5}, tasks=("colour", "animal"), checkpoint_every=2)
    whole = (fl.run(config | {"output_dir": "whole"}).path / "lineage.jsonl").read_text()
    with pytest.raises(Killed), monkeypatch.context() as patch:
        kill_at(patch, 10)
        fl.run(config)
    result = fl.run(config)
    assert (result.path / "lineage.jsonl").read_text() == whole
    events = [json.loads(line) for line in (result.path / "timing.jsonl").read_text().splitlines()]
    assert events[-1]["state_bytes"] > 0 and events[-1]["update_leak"] is None
    with pytest.raises(ConfigError, match="method.momentum"):
        fl.run(config | {"method": {"name": "my_method:Mine"}})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("my_method:Mime", "method my_method:Mime: module my_method has no class Mime; did you mean 'Mine'"),
        ("my_methods:Mine", "cannot be imported from the working directory"),
        ("my_method:not_a_class", "has no class not_a_class"),
        ("my_method:not_a_method", "is not a subclass of forgetless.Method"),
    ],
)
def test_what_is_no_method_is_refused(mine, small_run, name, said):
    with pytest.raises(ConfigError, match=said):
        fl.run(small_run({"name": name}, tasks=("colour",)))

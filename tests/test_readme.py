"""What the README says works: its config is valid, its Python runs, its commands and paths exist."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import yaml
from torch import nn

import forgetless as fl
from forgetless.config import load_config
from forgetless.methods import catalogue

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_config_of_the_readme_is_valid():
    (text,) = blocks("yaml")
    config = load_config(yaml.safe_load(text))
    assert [t.name for t in config.tasks] == ["tickets", "mails", "notes"] and [t.name for t in config.watch] == ["general"]


def test_the_first_python_block_runs(small_run):
    config = small_run("gorp", tasks=("colour", "animal"))
    code = blocks("python")[0].replace('"first.yaml"', "config")
    exec(code, {"config": config})


def test_the_optimizer_block_runs(tiny):
    from transformers import AutoModelForCausalLM

    layer = nn.Linear(8, 4, bias=False)
    any_torch_optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scope = {
        "fl": fl,
        "X_old": torch.randn(30, 2) @ torch.randn(2, 8),
        "layer": layer,
        "model": AutoModelForCausalLM.from_pretrained(tiny),
        "any_torch_optimizer": any_torch_optimizer,
    }
    lines = blocks("python")[1]
    exec(lines, scope)
    before = layer(scope["X_old"]).detach()
    layer(torch.randn(5, 8)).square().sum().backward()
    any_torch_optimizer.step()
    torch.testing.assert_close(layer(scope["X_old"]), before, atol=1e-5, rtol=1e-5)  # old inputs see no change
    assert not torch.equal(layer(torch.ones(8)), before[0])


def test_the_table_of_methods_is_the_registry_s():
    between = README.partition(f"<!-- {catalogue.MADE_BY} -->\n")[2].partition("<!-- end -->")[0]
    assert between == catalogue.markdown(catalogue.rows()) + "\n"


def test_every_path_the_readme_names_exists():
    for path in re.findall(r"\]\(([\w./-]+)\)|`((?:benchmarks|docs|dev|src|tests|examples)/[\w./-]+)`", README):
        name = path[0] or path[1]
        assert (ROOT / name).exists(), name

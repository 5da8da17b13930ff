"""The commands as a user meets them: what they print, what they leave, and that a run can be stopped and gone on with."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import write_task

import forgetless.trainer
from forgetless import cli
from forgetless.config import load_config
from forgetless.loop import run as learn
from forgetless.methods import REGISTRY, catalogue

COMMANDS = [command.name or command.callback.__name__ for command in cli.app.registered_commands if not command.hidden]
STEPS = 6


def settings(folder: Path, model: str, tasks=("colour", "animal")) -> dict:
    return {
        "model": model, "tasks": [write_task(folder / "data", name) for name in tasks], "method": {"name": "gorp"},
        "train": {"learning_rate": 1e-3, "max_steps": STEPS, "per_device_train_batch_size": 4, "bf16": False, "use_cpu": True},
        "evaluate": {"limit": 8}, "output_dir": str(folder / "run"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    """A run of two tasks, never interrupted."""
    return learn(settings(tmp_path_factory.mktemp("finished"), tiny)).path


@pytest.fixture
def here(tiny, tmp_path, monkeypatch) -> dict:
    """A config of two tasks in the working directory, first.yaml."""
    monkeypatch.chdir(tmp_path)
    config = settings(tmp_path, tiny)
    Path("first.yaml").write_text(yaml.safe_dump(config))
    return config


def lineage(run: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(run, "lineage.jsonl").read_text().splitlines()]


# -- help --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example(forgetless_, command):
    status, out, err = forgetless_(command, "--help")
    assert status == 0 and err == "" and f"Example: forgetless {command}" in out or f"&& forgetless {command}" in out


def test_help_names_every_command(forgetless_):
    status, out, _ = forgetless_("--help")
    assert status == 0 and all(re.search(rf"^  {command} ", out, re.M) for command in COMMANDS)
    status, out, err = forgetless_()
    assert status == 2 and err.startswith("Usage: ") and "error:" not in err


# -- methods, init, doctor, report ---------------------------------------------------------------------------------------------------------


def test_methods(forgetless_):
    status, out, _ = forgetless_("methods")
    assert status == 0 and all(re.search(rf"^{name} ", out, re.M) for name in REGISTRY) and "gradient low-rank projection" in out


def test_methods_name_says_what_the_file_says_and_what_each_option_does(forgetless_):
    status, out, _ = forgetless_("methods", "gorp")
    assert status == 0 and "When not to use it" in out and "energy: 0.95\n      Share of a task's gradient energy" in out
    status, _, err = forgetless_("methods", "gropp")
    assert status == 2 and "did you mean 'gorp'" in err


UNREAD = ("treelora", "esacl", "routed", "replay", "gainlora", "slao", "badam", "ella")
UNTUNED = {"ella": "strength", "nlora": "l1", "ewc": "strength"}


def test_what_was_not_read_of_a_paper_and_what_is_tuned_on_nothing_is_said_where_a_user_looks():
    papers = (Path(__file__).parents[1] / "docs" / "papers.md").read_text(encoding="utf-8").partition("## What was not read")[2].partition("\n## ")[0]
    for name in UNREAD:
        assert re.search(r"Read of [^:.]*papers?: ", " ".join(catalogue.page(*catalogue.rows([name])).split())) and f"| `{name}`" in papers, name
    for name, option in UNTUNED.items():
        (row,) = catalogue.rows([name])
        assert "tuned on nothing" in row["options"][option]["help"] and f"| `{name}`: `{option}`" in papers, name


def test_methods_json(forgetless_):
    status, out, _ = forgetless_("methods", "--json")
    found = json.loads(out)
    assert status == 0 and [m["name"] for m in found] == list(REGISTRY)
    assert {"name", "summary", "paper", "kind", "constrained", "options"} <= found[0].keys()
    assert next(m for m in found if m["name"] == "gorp")["options"]["energy"]["default"] == 0.95


def test_init_writes_a_config_that_is_valid_and_keeps_what_is_there(here, forgetless_):
    status, out, _ = forgetless_("init", "new/second.yaml")
    assert status == 0 and "forgetless run new/second.yaml" in out
    text = Path("new/second.yaml").read_text()
    assert load_config("new/second.yaml").method.name in REGISTRY and text.startswith("# forgetless run")
    Path("new/second.yaml").write_text("mine")
    status, _, err = forgetless_("init", "new/second.yaml")
    assert status == 2 and "--force" in err and Path("new/second.yaml").read_text() == "mine"
    assert forgetless_("init", "new/second.yaml", "--force")[0] == 0 and Path("new/second.yaml").read_text() == text


def test_doctor(forgetless_):
    status, out, _ = forgetless_("doctor")
    assert status == 0 and all(word in out for word in ("forgetless", "Python", "torch", "bf16"))


def test_doctor_of_a_config(here, forgetless_):
    status, out, _ = forgetless_("doctor", "first.yaml", "--json")
    found = json.loads(out)
    assert status == 0 and found["model"]["class"] == "LlamaForCausalLM" and found["method"]["options"]["energy"] == 0.95
    assert len(found["method"]["trained_tensors"]) == 14 and found["bytes"]["optimizer_state"] >= found["bytes"]["adamw_state_same_tensors"]  # dense
    assert [t["name"] for t in found["tasks"]] == ["colour", "animal"] and found["tasks"][0]["rows"]["test"] == 12
    assert not Path("run").exists()
    fewer = json.loads(forgetless_("doctor", "first.yaml", "method.rank=2", "--json")[1])
    assert fewer["bytes"]["optimizer_state"] < 0.3 * found["bytes"]["optimizer_state"]
    status, out, _ = forgetless_("doctor", "first.yaml")
    assert status == 0 and re.search(r"^method     gorp trains [\d,]+ parameters in 14 tensors", out, re.M) and "task       animal: " in out


def test_report(here, finished, forgetless_):
    shutil.copytree(finished, "run", symlinks=True)
    status, out, _ = forgetless_("report", "run", "--out", "deep/page.html")
    assert status == 0 and out.strip() == "deep/page.html" and "colour" in Path("deep/page.html").read_text()
    status, out, _ = forgetless_("report", "run", str(finished))
    assert status == 0 and Path("run/report.html").is_file()
    status, out, _ = forgetless_("report", "run", "--json")
    assert status == 0 and json.loads(out) == {"run": json.loads(Path("run/matrix.json").read_text())}


# -- run -----------------------------------------------------------------------------------------------------------------------------------


def test_a_run_and_the_same_run_again(here, finished, forgetless_):
    status, out, err = forgetless_("run", "first.yaml")
    assert status == 0 and "gorp, choice (%)" in out and str(Path("run/report.html").resolve()) in out
    assert "colour: training" in err and "committed 2/2 animal" in err  # progress is not mixed with results
    assert lineage("run") == lineage(finished)
    before = {p: p.stat().st_mtime_ns for p in Path("run/tasks").rglob("*")}
    status, out, _ = forgetless_("run", "first.yaml")
    assert status == 0 and "finished already (2 tasks)" in out and "gorp, choice (%)" in out
    assert {p: p.stat().st_mtime_ns for p in Path("run/tasks").rglob("*")} == before


def test_run_json_from_a_real_process(here):
    """stdout is one JSON document, stderr one object a line, whatever the libraries would like to say."""
    ran = subprocess.run(
        [sys.executable, "-m", "forgetless", "run", "first.yaml", "--json", "--progress", "json"], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == json.loads(Path("run/matrix.json").read_text())
    stages = [json.loads(line).get("stage") for line in ran.stderr.splitlines() if line.startswith("{")]
    assert "colour: training" in stages and "animal: scoring 2 tasks" in stages and "Traceback" not in ran.stderr


def test_a_task_added_at_the_end_is_learned(here, finished, forgetless_, tmp_path):
    shutil.copytree(finished, "run", symlinks=True)
    here["tasks"].append(write_task(tmp_path / "data", "mood"))
    Path("first.yaml").write_text(yaml.safe_dump(here))
    status, out, err = forgetless_("run", "first.yaml", "--json")
    matrix = json.loads(out)
    assert status == 0 and matrix["tasks"] == ["colour", "animal", "mood"] and len(matrix["scores"]["choice"]) == 3
    assert "committed 3/3 mood" in err and "colour: training" not in err
    assert lineage("run")[:2] == lineage(finished) and lineage("run")[2]["parent"] == lineage(finished)[1]["hash"]


@pytest.mark.parametrize("method", ["gorp", "seqft"])
def test_interrupted_and_run_again_is_never_interrupted(here, forgetless_, monkeypatch, method):
    """Ctrl-C in the second task: exit 130, the first one stays; the same command ends with the same models and the same lineage."""
    calls, real = [], forgetless.trainer.answer_loss

    def interrupted(*args):
        calls.append(1)
        if len(calls) == STEPS + 3:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(forgetless.trainer, "answer_loss", interrupted)
        status, out, err = forgetless_("run", "first.yaml", f"method={method}")
    assert status == 130 and out == "" and "run the same command again to resume" in err and "Traceback" not in err
    assert Path("run/current").read_text() == "00-colour\n" and len(lineage("run")) == 1
    assert Path("run/model").resolve() == Path("run/tasks/00-colour/model").resolve()
    status, _, err = forgetless_("run", "first.yaml", f"method={method}")
    assert status == 0 and "colour: training" not in err and "animal: training" in err
    assert forgetless_("run", "first.yaml", f"method={method}", "output_dir=whole", "--progress", "none")[0] == 0
    assert lineage("run") == lineage("whole") and len(lineage("run")) == 2  # hashes of models, states, configs and data
    assert Path("run/matrix.json").read_text() == Path("whole/matrix.json").read_text()


def test_power_lost_while_a_line_was_written(here, finished, forgetless_, tmp_path):
    """Half a line at the end of lineage.jsonl and a half-made folder are dropped; the next commit does not go on behind them."""
    shutil.copytree(finished, "run", symlinks=True)
    with Path("run/lineage.jsonl").open("a") as f:
        f.write('{"kind":"task","ind')
    Path("run/tasks/.02-mood/state").mkdir(parents=True)
    Path("run/tasks/02-mood").mkdir()
    here["tasks"].append(write_task(tmp_path / "data", "mood"))
    Path("first.yaml").write_text(yaml.safe_dump(here))
    for _ in range(2):
        assert forgetless_("run", "first.yaml", "--progress", "none")[0] == 0
    assert [line["task"] for line in lineage("run")] == ["colour", "animal", "mood"]
    assert sorted(p.name for p in Path("run/tasks").iterdir()) == ["00-colour", "01-animal", "02-mood"]

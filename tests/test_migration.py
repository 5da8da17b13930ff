"""A run's folder of an earlier version: today's library reads it, goes on with it, and loads what that version loaded; a later version's is refused.

tests/golden/run_v0 is as it was written before state/ had a version; its README.txt says how.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import TASKS

import forgetless as fl
from forgetless import adding, models, state
from forgetless.config import load_config
from forgetless.errors import ConfigError, DataError
from forgetless.files import read
from forgetless.lineage import GONE, RunFolder
from forgetless.state import model_sha256

GOLDEN = Path(__file__).parent / "golden" / "run_v0"
MOOD = {"name": "mood", "data": "data/mood.jsonl", "test": "data/mood_test.jsonl", "labels": [label for _, label in TASKS["mood"]]}
ADD_MOOD = ["test=data/mood_test.jsonl", "labels=[happy, sad, calm]"]


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """The run in a copy of the golden folder, which is the working directory: its paths are relative."""
    shutil.copytree(GOLDEN, tmp_path / "v0", symlinks=True)
    monkeypatch.chdir(tmp_path / "v0")
    return Path("run")


def digest(memory) -> dict:
    """As README.txt has it."""
    found = hashlib.sha256()
    for name, tensor in sorted(memory.tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode() + tensor.contiguous().numpy().tobytes())
    return {"tensors": found.hexdigest(), "info": memory.info}


def config(**changes) -> dict:
    found = yaml.safe_load(Path("config.yaml").read_text())
    return found | {"tasks": [*found["tasks"], MOOD]} | changes


def committed_bytes(run: Path) -> dict[str, bytes]:
    files = (p for name in ("00-colour", "01-animal") for p in sorted((run / "tasks" / name).rglob("*")))
    return {p.as_posix(): p.read_bytes() for p in files if p.is_file() and p.name != GONE}


def test_the_fixture_is_old_and_holds_no_path_of_a_machine(old):
    assert not list(old.rglob("version.json")) and not list(old.rglob("files.json")) and not (old / "watch_scores.json").exists()
    assert "gate" not in yaml.safe_load((old / "run.yaml").read_text())
    assert sum(p.stat().st_size for p in GOLDEN.rglob("*") if p.is_file()) < 400_000
    for file in (p for p in GOLDEN.rglob("*") if p.is_file() and p.suffix != ".safetensors"):
        assert not any(word in file.read_text() for word in ("/tmp", "/home", "/root", "/work")), file


def test_what_the_old_code_loaded_is_loaded(old):
    folder = RunFolder(old, lock=False)
    known = json.loads(Path("memory.json").read_text())
    assert {name: digest(folder.memory(name)) for name in folder.committed()} == known and len(known) == 2


def test_it_is_read_by_every_command_that_reads(old, forgetless_, tmp_path):
    before = committed_bytes(old)
    status, out, _ = forgetless_("log", str(old), "--json")
    assert status == 0 and [(line["kind"], line["task"], line["model"]) for line in json.loads(out)] == [
        ("task", "colour", False),
        ("task", "animal", True),
    ]
    status, out, _ = forgetless_("verify", str(old), "--json")
    found = json.loads(out)
    assert status == 0 and found["damage"] == [] and found["commits"] == 2 and set(found["stored"]) == {"tasks/00-colour", "tasks/01-animal"}
    for form in ("html", "md", "card"):
        status, out, err = forgetless_("report", str(old), "--format", form)
        assert status == 0, err
        assert "animal" in Path(out.strip()).read_text()
    status, _, err = forgetless_("export", str(old), "--out", str(tmp_path / "model"))
    assert status == 0, err
    assert model_sha256(models.load(str(tmp_path / "model"))[0]) == json.loads(read(old / "lineage.jsonl").splitlines()[1])["model_sha256"]
    assert committed_bytes(old) == before


def test_a_flipped_byte_of_it_is_named(old, forgetless_):
    file = old / "tasks" / "00-colour" / "state" / "method.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    status, _, err = forgetless_("verify", str(old))
    assert status == 4 and "00-colour/state" in err
    with pytest.raises(DataError, match="00-colour/state"):
        adding.add(old, "mood", MOOD["data"], ADD_MOOD)


def test_a_flipped_byte_of_its_model_is_found_too(old, forgetless_):
    """Its version hashed no files: the model itself is held to the lineage."""
    (file,) = (old / "model").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    status, out, _ = forgetless_("verify", str(old))
    assert status == 4 and "/model: is not the model that was committed" in out


def test_a_run_goes_on_with_a_task_appended(old):
    lines, before, matrix = read(old / "lineage.jsonl"), committed_bytes(old), json.loads(read(old / "matrix.json"))
    result = fl.run(config(keep="all"))
    assert result.resumed_at == 2 and [len(m.rows) for m in result.matrices.values()] == [3, 3]
    for scorer, m in result.matrices.items():
        assert [row[:2] for row in m.rows[:2]] == matrix["scores"][scorer]
    assert result.watch["held"]["choice"][:3] == matrix["watch"]["held"]["choice"] and len(result.watch["held"]["choice"]) == 4
    assert (
        read(old / "lineage.jsonl").startswith(lines) and committed_bytes(old) == before
    )  # an old commit is never rewritten: its hash is in the lineage
    folder = RunFolder(old, lock=False)
    line = folder.lineage()[2]
    assert line["parent"] == json.loads(lines.splitlines()[1])["hash"] and "files_sha256" in line
    assert state.state_version(old / "tasks" / "02-mood" / "state") == state.VERSION
    assert digest(folder.memory("02-mood")) != digest(folder.memory("01-animal"))
    assert fl.run(config(keep="all")).resumed_at == 3


def test_the_same_run_again_is_finished(old):
    before = {p: p.read_bytes() for p in old.rglob("*.jsonl")}
    assert fl.run(load_config("config.yaml")).resumed_at == 2
    assert {p: p.read_bytes() for p in old.rglob("*.jsonl")} == before


@pytest.mark.parametrize("option, default, other", [("stagger", False, True), ("protect_energy", 0.9, 0.5)])
def test_an_option_that_its_version_did_not_have_is_as_its_default_is(old, option, default, other):
    written = yaml.safe_load((old / "run.yaml").read_text())
    assert written["method"].pop(option) == default
    (old / "run.yaml").write_text("# forgetless 0.0.9\n" + yaml.safe_dump(written))
    given = yaml.safe_load(Path("config.yaml").read_text())
    assert fl.run(given).resumed_at == 2
    assert fl.run(given | {"method": given["method"] | {option: default}}).resumed_at == 2
    (old / "run.yaml").write_text("# forgetless 0.0.9\n" + yaml.safe_dump(written))
    other = {option: other} | ({"rank": 2} if option == "stagger" else {})
    with pytest.raises(ConfigError, match="holds a run with method\\."):
        fl.run(given | {"method": given["method"] | other})


def test_a_task_is_added_with_a_gate_and_rolled_back(old, forgetless_):
    argv = [
        "add",
        str(old),
        "--data",
        MOOD["data"],
        "--name",
        "mood",
        *ADD_MOOD,
        "keep=last 2",
        "gate.max_worst_task=1.0",
        "gate.max_general_drop=1.0",
    ]
    status, _, err = forgetless_(*argv, "--progress", "none")
    assert status == 0, err
    assert read(old / "current") == "02-mood\n"
    verdict = json.loads(read(old / "tasks" / "02-mood" / "metrics.json"))["gate"]
    # each task is held to its rows as its own commit has them, a watch set to those after the first task: its rows before it were not noted then
    rows = [json.loads(line) for line in read(old / "tasks" / "00-colour" / "predictions.jsonl").splitlines()]
    after = [json.loads(line) for line in read(old / "tasks" / "02-mood" / "predictions.jsonl").splitlines()]
    drops = {
        name: sum(a["score"]["choice"] - b["score"]["choice"] for a in rows for b in after if a["task"] == b["task"] == name and a["row"] == b["row"])
        / 6
        for name in ("colour", "held")
    }
    assert {c["name"]: pytest.approx(c["observed"]) for c in verdict["criteria"] if c["name"] in drops} == drops and len(verdict["criteria"]) == 3
    assert forgetless_("verify", str(old))[0] == 0
    status, _, err = forgetless_("rollback", str(old), "--to", "animal")
    assert status == 0, err
    assert read(old / "current") == "01-animal\n" and (old / "model").resolve() == (old / "tasks" / "01-animal" / "model").resolve()
    assert len(json.loads(read(old / "matrix.json"))["scores"]["choice"]) == 2
    status, _, err = forgetless_("rollback", str(old), "--to", "colour")
    assert status == 4 and "let it go" in err  # the old version kept one model
    assert forgetless_("rollback", str(old), "--to", "mood")[0] == 0 and forgetless_("verify", str(old))[0] == 0


def test_a_task_is_added_where_old_rows_are_gone(old, forgetless_):
    Path("data/colour.jsonl").unlink()
    status, _, err = forgetless_("add", str(old), "--data", MOOD["data"], "--name", "mood", *ADD_MOOD, "--progress", "json")
    assert status == 0 and "'colour' is not measured" in err, err
    row = json.loads(read(old / "matrix.json"))["scores"]["choice"][2]
    assert row[0] is None and None not in row[1:]


def test_a_damaged_model_of_it_is_not_gone_on_from(old):
    file = old / "tasks" / "01-animal" / "model" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(DataError, match="01-animal"):
        adding.add(old, "mood", MOOD["data"], ADD_MOOD)


def test_state_of_a_later_version_is_refused_and_says_upgrade(old, forgetless_, monkeypatch):
    with monkeypatch.context() as later:
        later.setattr(state, "VERSION", state.VERSION + 1)
        later.setitem(state.MIGRATIONS, state.VERSION - 1, lambda memory: memory)
        adding.add(old, "mood", MOOD["data"], ADD_MOOD)
    before = read(old / "lineage.jsonl")
    again = json.dumps(config(tasks=[*config()["tasks"], MOOD | {"name": "more"}]))
    Path("more.yaml").write_text(again)
    for argv in (["add", str(old), "--data", MOOD["data"], "--name", "more", *ADD_MOOD], ["run", "more.yaml"]):
        status, _, err = forgetless_(*argv, "--progress", "none")
        assert status == 4 and f"version {state.VERSION + 1}" in err and "Upgrade" in err, err
    assert read(old / "lineage.jsonl") == before and forgetless_("verify", str(old))[0] == 0


def test_migrations_are_applied_in_order_each_time_a_state_is_read(old, monkeypatch):
    def note(step: int):
        def migrate(memory):
            memory.info["migrated"] = [*memory.info.get("migrated", ()), step]
            return memory

        return migrate

    monkeypatch.setattr(state, "VERSION", 3)
    monkeypatch.setattr(state, "MIGRATIONS", {version: note(version) for version in (2, 0, 1)})
    folder, before = RunFolder(old, lock=False), committed_bytes(old)
    for _ in range(2):
        assert folder.memory("00-colour").info["migrated"] == [0, 1, 2]
    adding.add(old, "mood", MOOD["data"], ADD_MOOD)
    new = old / "tasks" / "02-mood" / "state"
    assert json.loads(read(new / "method.json"))["migrated"] == [0, 1, 2] and state.state_version(new) == 3  # what a task went on from was up to date
    assert folder.memory("02-mood").info["migrated"] == [0, 1, 2]  # and is not migrated again
    (new / "version.json").write_text('{"version": 2}')
    assert folder.memory("02-mood").info["migrated"] == [0, 1, 2, 2]
    assert committed_bytes(old).items() <= before.items()


def test_there_is_a_migration_from_every_version():
    assert sorted(state.MIGRATIONS) == list(range(state.VERSION))

"""A commit cannot corrupt a run: not by an error, a full disk, a kill or a power cut at any call that writes; and what is damaged later is found and refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run_config, write_task

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "scripts"))

import faults
import forgetless as fl
import power_cut
from forgetless import history
from forgetless.files import canonical, lines_of, text_sha256
from forgetless.lineage import RunFolder

OPERATIONS = {"first commit", "commit", "commit, keep: last 1", "commit after a rollback", "reject", "rollback", "tag", "gc", "repair"}
SCRIPT = Path(faults.__file__)
pytestmark = pytest.mark.xdist_group("faults")  # what they share is made once


# -- faults while it writes --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def struck(tmp_path_factory) -> dict:
    """A sample of what benchmarks/scripts/faults.py does; it asks for a C compiler, and runs in a process of its own, as its library is preloaded."""
    return run_script(tmp_path_factory.mktemp("faults"), "--sample", "90")


def run_script(folder: Path, *options: str) -> dict:
    try:
        faults.compiled(folder)
    except RuntimeError as error:
        pytest.skip(str(error))
    out = folder / "faults.json"
    process = subprocess.run([sys.executable, SCRIPT, "--out", out, *options], capture_output=True, text=True)
    assert out.is_file(), process.stderr[-2000:]
    return json.loads(out.read_text())


def test_no_fault_corrupts_a_run(struck):
    assert struck["problems"] == [] and struck["corrupted"] == 0 and struck["cells"] == 90


def test_the_sample_holds_every_operation_and_every_kind_of_fault(struck):
    assert struck["operations"].keys() == OPERATIONS
    assert {mode for op in struck["operations"].values() for mode in op["cells"]} == {*faults.MODES, *power_cut.LOST}
    ends = {end for op in struck["operations"].values() for mode in op["cells"].values() for end in mode}
    assert {"before", "after"} <= ends


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_everything_is_synced_before_it_is_put_in_its_place(struck, name):
    """Each file before the folder is renamed, the folder of folders before `current` is replaced, that before the line is written, and nothing is left unsynced."""
    operation = struck["operations"][name]
    assert operation["order"] == []
    assert operation["calls"] > 5 and "fsync" in operation["kinds"]


def test_a_repair_takes_away_what_a_kill_left_half_written(sound, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(sound, run, symlinks=True)
    before = contents(run)
    for name in (".current.tmp", ".lineage.jsonl.tmp", ".tags.json.tmp", "tasks/.02-more/model/config.json", "rejected/.02-more/metrics.json"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("ha")
    with RunFolder(run) as folder:
        folder.repair()
    assert contents(run) == before


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_fault_at_any_call_corrupts_a_run(tmp_path):
    found = run_script(tmp_path)
    assert found["problems"] == [] and found["cells"] > 2000


def test_the_harness_sees_what_a_power_cut_would_take(tmp_path):
    """Of a file renamed into its place before it was synced only the name would be there."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_bytes(b"sure")
    disk = power_cut.Disk(tmp_path / "run")
    steps = [
        power_cut.Call(1, "create", ".new.tmp", ".", 0, b""), power_cut.Call(2, "write", ".new.tmp", ".", 0, b"bytes"), power_cut.Call(3, "rename", ".new.tmp", "new", 0, b""),
        power_cut.Call(4, "write", "old", ".", 4, b", and not"),
    ]  # fmt: skip
    for step in steps:
        disk.apply(step)
    assert disk.unsynced() == ["new", "old"]
    left = {}
    for lost in ("nothing", "data", "all"):
        disk.write(tmp_path / lost, lost, random.Random(0))
        left[lost] = {p.name: p.read_bytes() for p in (tmp_path / lost).iterdir()}
    assert (
        left["nothing"] == {"old": b"sure, and not", "new": b"bytes"}
        and left["data"] == {"old": b"sure", "new": b""}
        and left["all"] == {"old": b"sure"}
    )
    for path in ("new", "old", "."):
        disk.apply(power_cut.Call(5, "fsync", path, ".", 0, b""))
    assert disk.unsynced() == []


# -- damage that comes later -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tiny, tmp_path_factory) -> Path:
    """The folder of a run of two tasks that was rolled back once and brought forward again, and what `add` needs for a third."""
    folder = tmp_path_factory.mktemp("sound")
    path = fl.run(run_config(tiny, folder, "gorp", ("colour", "animal")) | {"watch": [write_task(folder / "data", "mood")]}).path
    for to in ("colour", "animal"):
        history.rollback(path, to)
    return path


def flipped(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= draw.randrange(1, 256)
    path.write_bytes(content)


def cut_short(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


def removed(path: Path, draw: random.Random) -> None:
    path.unlink()


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def files_of(run: Path) -> list[str]:
    """Every file of every commit, and what says which of them count. task.json is as run.yaml, settings that name places on this machine: no hash is over it."""
    files = [p.relative_to(run).as_posix() for p in sorted((run / "tasks").rglob("*")) if p.is_file() and p.name != "task.json"]
    return ["lineage.jsonl", "current", *files]


def broken(sound: Path, tmp_path: Path, damage, draw: random.Random):
    """(file, a copy of the run in which it alone is damaged) of every file."""
    run = tmp_path / "run"
    for name in files_of(sound):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(sound, run, symlinks=True)
        damage(run / name, draw)
        yield name, run


@pytest.mark.parametrize("damage", [flipped, cut_short, removed])
@pytest.mark.parametrize("seed", [0, 1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_verify_names_the_damaged_file(sound, tmp_path, damage, seed):
    whole = RunFolder(sound, lock=False).lineage()
    for name, run in broken(sound, tmp_path, damage, random.Random(seed)):
        found = history.verify(run)["damage"]
        if name == "lineage.jsonl" and not found:  # cut at its end as by a kill: what is left is read, and no commit is missing from it
            lines = RunFolder(run, lock=False).lineage()
            assert lines == whole[: len(lines)] and [line["kind"] for line in whole[len(lines) :]] in ([], ["rollback"], ["rollback", "rollback"])
        else:
            assert [what for what in found if name in what], (name, found)


def test_verify_exits_with_4_and_says_which_file(sound, tmp_path, forgetless_):
    run = tmp_path / "run"
    shutil.copytree(sound, run, symlinks=True)
    assert forgetless_("verify", str(run))[0] == 0
    flipped(run / "tasks/00-colour/state/method.safetensors", random.Random(0))
    code, out, error = forgetless_("verify", str(run))
    assert code == 4 and "damaged  tasks/00-colour/state/method.safetensors: its bytes" in out and "tasks/00-colour/state/method.safetensors" in error


@pytest.mark.parametrize("damage", [flipped, removed])
def test_add_refuses_a_damaged_run_and_changes_nothing(sound, tmp_path, damage, forgetless_):
    data = write_task(tmp_path / "data", "mood")
    for name, run in broken(sound, tmp_path, damage, random.Random(1)):
        before = contents(run)
        code, _, error = forgetless_("add", str(run), "--name", "new", "--data", data["data"], "--progress", "none")
        assert code == 4 and "damaged" in error and name in error, (name, code, error)
        assert contents(run) == before, name


def test_a_lost_current_does_not_cost_the_commits(sound, tmp_path, forgetless_):
    """Without it no commit counts, and what does not count is deleted by the next start: so it is refused, and the message brings it back."""
    run = tmp_path / "run"
    shutil.copytree(sound, run, symlinks=True)
    (run / "current").unlink()
    before = contents(run)
    code, _, error = forgetless_("run", str(run / "run.yaml"), "--progress", "none", f"output_dir={run}")
    assert code == 4 and "`echo 01-animal > current` brings it back" in error and contents(run) == before
    (run / "current").write_text("01-animal\n")
    assert forgetless_("verify", str(run))[0] == 0


@pytest.mark.parametrize("kept", [0, 1])
def test_a_lineage_that_lost_lines_does_not_cost_their_commits(sound, tmp_path, forgetless_, kept):
    """A commit that was interrupted follows the last line there is; one that follows another has lost its line, and is not deleted for it."""
    run = tmp_path / "run"
    shutil.copytree(sound, run, symlinks=True)
    shutil.copytree(run / "tasks/01-animal", run / "tasks/02-more")
    line = json.loads((run / "tasks/01-animal/line.json").read_text())
    (run / "tasks/02-more/line.json").write_text(json.dumps(line | {"index": 2, "task": "more", "parent": line["hash"], "hash": "0" * 64}))
    (run / "lineage.jsonl").write_text("".join((sound / "lineage.jsonl").read_text().splitlines(keepends=True)[:kept]))
    (run / "current").write_text("00-colour\n")
    before = contents(run)
    code, _, error = forgetless_("run", str(run / "run.yaml"), "--progress", "none", f"output_dir={run}")
    assert code == 4 and f"lineage.jsonl lacks the line of tasks/{'02-more' if kept else '01-animal'}" in error and contents(run) == before
    assert forgetless_("verify", str(run))[0] == 4


@pytest.mark.parametrize(
    ("name", "at", "byte"),
    [
        ("current", -1, b""),
        ("lineage.jsonl", -1, b" "),
        ("lineage.jsonl", -1, b"\r"),
        ("tasks/01-animal/files.json", 1, b"\r"),
        ("tasks/01-animal/line.json", 5, b"\xff"),
    ],
)
def test_a_byte_that_a_parser_would_forgive_is_damage(sound, tmp_path, name, at, byte):
    """A newline turned into another blank, or lost: JSON does not mind, and the next line would be written behind it."""
    run = tmp_path / "run"
    shutil.copytree(sound, run, symlinks=True)
    content = (run / name).read_bytes()
    assert at != 1 or content[at : at + 1] == b"\n"
    (run / name).write_bytes(content[:at] + byte + (content[at + 1 :] if at != -1 else b""))
    found, lines = history.verify(run)["damage"], RunFolder(sound, lock=False).lineage()
    assert [what for what in found if name in what], found
    if name == "lineage.jsonl":  # what it says is known to be right, and written anew
        assert RunFolder(run, lock=False).lineage() == lines
        with RunFolder(run) as folder:
            folder.repair()
        assert (run / name).read_bytes() == content


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("key", ["parent", "hash", "index"])
def test_each_line_of_the_lineage_is_held_to_its_hash_and_its_parent(sound, tmp_path, number, key):
    """A rollback stands in no other file: the chain alone tells that it was changed, also where its own hash was made to fit."""
    run = tmp_path / "run"
    shutil.copytree(sound, run, symlinks=True)
    lines = [json.loads(line) for line in (sound / "lineage.jsonl").read_text().splitlines()]
    lines[number - 1][key] = 7 if key == "index" else "0" * 64
    if key == "parent":
        content = {k: v for k, v in lines[number - 1].items() if k != "hash"}
        lines[number - 1]["hash"] = text_sha256(canonical(content))
    (run / "lineage.jsonl").write_text("".join(canonical(line) + "\n" for line in lines))
    found = history.verify(run)["damage"]
    assert found[0].startswith(f"line {number} of lineage.jsonl"), found


def test_a_line_of_other_form_with_the_same_meaning_is_damage(sound, tmp_path):
    """1E-05 for 1e-05 is one flipped bit; all the hashes are over what a line means."""
    run = tmp_path / "run"
    shutil.copytree(sound, run, symlinks=True)
    lines = (sound / "lineage.jsonl").read_text().splitlines(keepends=True)
    (run / "lineage.jsonl").write_text(lines[0] + lines[1].replace(":1,", ": 1,", 1) + "".join(lines[2:]))
    (what,) = history.verify(run)["damage"]
    assert what.startswith("lineage.jsonl: says what was written, in other bytes")


def test_a_sign_that_ends_a_line_elsewhere_may_stand_in_a_row(sound):
    """JSON leaves U+2028 and U+0085 in a string as they are, and str.splitlines ends a line there."""
    assert lines_of('{"a": "x\u2028y\x85z"}\n{"b": 1}') == ['{"a": "x\u2028y\x85z"}\n', '{"b": 1}']

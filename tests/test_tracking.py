"""`report_to`: what arrives where, over several tasks, after a kill, after a refusal; and that a run is the same with and without it."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import types
from pathlib import Path

import pytest

from forgetless import tracking
from forgetless.config import load_config
from forgetless.errors import ConfigError, GateRejected
from forgetless.lineage import RunFolder
from forgetless.loop import run
from forgetless.progress import Progress
from forgetless.trainer import make_trainer


class Said(Progress):
    def __init__(self):
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


class Recorded:
    """In the place of a sink: everything that is sent, in order."""

    begun: list[Recorded] = []

    def __init__(self, config, step):
        self.first, self.sent, self.closed = step, [], False
        Recorded.begun.append(self)

    def log(self, values, step):
        self.sent.append((step, values))

    def close(self):
        self.closed = True


@pytest.fixture
def recorded(monkeypatch):
    """The sinks that runs have made, each in the place of trackio."""
    monkeypatch.setattr(Recorded, "begun", [])
    monkeypatch.setattr(tracking, "SINKS", {"trackio": Recorded})
    monkeypatch.setattr(tracking, "check_installed", lambda config: None)
    monkeypatch.setattr("forgetless.loop.check_installed", lambda config: None)
    return Recorded.begun


def killed_at(step: int, monkeypatch) -> None:
    def dying(*given):
        trainer = make_trainer(*given)
        take = trainer.training_step
        trainer.training_step = lambda *a, **k: pytest.exit("killed") if trainer.state.global_step == step else take(*a, **k)
        return trainer

    monkeypatch.setattr("forgetless.trainer.make_trainer", dying)


def test_the_step_goes_on_from_task_to_task_and_each_task_ends_with_its_row(small_run, recorded):
    config = small_run({"name": "gorp", "rank": 4}, report_to="trackio", gate={"max_worst_task": 0.9, "max_general_drop": 0.9})
    result = run(config | {"watch": [config["tasks"].pop() | {"name": "notes"}]})
    (sink,) = recorded
    steps = [(step, values) for step, values in sink.sent if "train/loss" in values]
    assert [step for step, _ in steps] == list(range(1, 13)) and [values["train/task"] for _, values in steps] == [0] * 6 + [1] * 6
    assert steps[0][1]["train/learning_rate"] == 1e-3 and 0 < steps[0][1]["train/captured"] <= 1
    assert "train/update_leak" in steps[11][1] and "train/update_leak" not in steps[6][1]  # measured every tenth step, and in the last
    ends = [(step, values) for step, values in sink.sent if "train/loss" not in values]
    assert [step for step, _ in ends] == [6, 12] and sink.closed and sink.first == 0
    (_, first), (_, second) = ends
    matrix = result.matrices["choice"]
    assert first["score/choice/colour"] == matrix.rows[0][0] and "score/choice/animal" not in first
    assert [second[f"score/choice/{name}"] for name in ("colour", "animal")] == matrix.rows[1]
    assert second["matrix/choice/backward_transfer"] == matrix.backward_transfer() and second["watch/notes/choice"] is not None
    kept = RunFolder(config["output_dir"], lock=False).metrics("01-animal")["protection"]
    for name in ("update_leak", "weight_leak", "weight_leak_bound", "captured", "state_bytes"):
        assert second[f"protection/{name}"] == kept[name] is not None
    assert second["protection/space/share"] == kept["space"]["share"] and any(name.startswith("protection/coverage/colour/") for name in second)
    assert (
        second["gate/verdict"] in (0, 1) and second["gate/max_worst_task/colour/allowed"] == 0.9 and "gate/max_general_drop/notes/observed" in second
    )
    assert all(isinstance(value, (int, float)) for _, values in sink.sent for value in values.values())


def test_a_killed_run_sends_the_rest_and_again_what_came_after_nothing_it_kept(small_run, recorded, monkeypatch):
    config = small_run("seqft", tasks=("colour", "animal"), report_to=["trackio"], checkpoint_every=2)
    run(config | {"tasks": config["tasks"][:1]})
    with monkeypatch.context() as patch, pytest.raises(pytest.exit.Exception):
        killed_at(5, patch)
        run(config)
    assert recorded[1].closed and [step for step, _ in recorded[1].sent] == [7, 8, 9, 10, 11]
    run(config)
    assert [sink.first for sink in recorded] == [0, 6, 6]
    assert [step for step, _ in recorded[2].sent] == [7, 8, 9, 10, 11, 12, 12]  # 7 to 10 from the checkpoint's log
    assert recorded[2].sent[:4] == recorded[1].sent[:4]
    run(config)  # finished: nothing is sent
    assert recorded[3].sent == []


def test_a_refused_task_sends_its_verdict_and_no_scores_of_a_model_that_was_not_taken(small_run, recorded):
    config = small_run("seqft", tasks=("colour",), report_to="trackio", gate={"min_new_task": 1.0, "margin": 0.01})
    with pytest.raises(GateRejected):
        run(config | {"train": config["train"] | {"learning_rate": 1e-8}})
    step, values = recorded[0].sent[-1]
    assert step == 6 and values["gate/verdict"] == -1 and all(name.startswith("gate/") for name in values)
    assert values["gate/min_new_task/colour/allowed"] == 1.0


def test_the_weights_are_the_same_with_and_without_and_it_may_change_from_start_to_start(small_run, recorded):
    config = small_run("gorp", tasks=("colour", "animal"))
    hashes = []
    for name in ("", "trackio"):
        run(config | {"output_dir": config["output_dir"] + name, "report_to": name or []})
        hashes.append(RunFolder(config["output_dir"] + name, lock=False).lines())
    assert [line["hash"] for line in hashes[0]] == [line["hash"] for line in hashes[1]]
    assert run(config | {"report_to": "trackio"}).resumed_at == 2


def test_a_sink_that_fails_is_said_once_and_training_goes_on(small_run, recorded, monkeypatch):
    def full(self, values, step):
        raise RuntimeError("no more room there")

    monkeypatch.setattr(Recorded, "log", full)
    said = Said()
    result = run(small_run("seqft", tasks=("colour",), report_to="trackio"), progress=said)
    warnings = [line for line in said.lines if "report_to" in line]
    assert warnings == ["warning: report_to: trackio failed and gets nothing more (RuntimeError: no more room there)"]
    assert len(result.matrix.rows) == 1


def test_one_that_cannot_begin_is_an_error_before_the_first_step(small_run, monkeypatch):
    config = small_run("seqft", tasks=("colour",), report_to="wandb")
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="report_to: wandb is not installed. Run: pip install wandb"):
        run(config)
    assert not Path(config["output_dir"]).exists()

    def refuse(**_):
        raise RuntimeError("api_key not configured")

    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse, Settings=dict))
    with pytest.raises(
        ConfigError, match=r"report_to: wandb could not begin \(RuntimeError: api_key not configured\); log in with .*WANDB_MODE=offline"
    ):
        run(config)


def test_what_is_said_of_the_run_names_no_folder_of_this_machine(small_run, tmp_path):
    config = load_config(small_run("gorp", report_to="wandb"))
    sent = json.dumps(tracking.settings_sent(config))
    assert str(tmp_path) not in sent and str(Path(config.model).parent) not in sent
    assert tracking.settings_sent(config)["tasks"] == ["colour", "animal", "mood"] and tracking.settings_sent(config)["method"]["name"] == "gorp"


@pytest.mark.parametrize("given, read", [("wandb", ["wandb"]), ("none", []), (None, []), (["trackio", "trackio"], ["trackio"])])
def test_one_name_or_several(small_run, given, read):
    assert load_config(small_run("seqft", report_to=given)).report_to == read


@pytest.mark.parametrize("given", ["mlflow", ["all"], 3])
def test_a_name_that_is_none_of_them_is_refused(small_run, given):
    with pytest.raises(ConfigError, match="report_to"):
        load_config(small_run("seqft", report_to=given))
    with pytest.raises(ConfigError, match="train.report_to cannot be set; use report_to at the top level"):
        load_config(small_run("seqft", train={"report_to": given}))


# -- the libraries themselves ----------------------------------------------------------------------------------------------------------------


def test_tensorboard_holds_the_run_and_after_a_kill_each_point_once(small_run, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = small_run(
        {"name": "gorp", "rank": 4}, tasks=("colour", "animal"), report_to="tensorboard", checkpoint_every=2, gate={"max_worst_task": 0.9}
    )
    run(config | {"tasks": config["tasks"][:1]})
    with monkeypatch.context() as patch, pytest.raises(pytest.exit.Exception):
        killed_at(5, patch)
        run(config)
    result = run(config)
    events = EventAccumulator(str(Path(config["output_dir"]) / "tensorboard"))
    events.Reload()

    def points(tag):
        return [(event.step, event.value) for event in events.Scalars(tag)]

    timing = map(json.loads, (Path(config["output_dir"]) / "timing.jsonl").read_text().splitlines())
    losses = [event["loss"] for event in timing if event["event"] == "step"]
    assert points("train/loss") == [(step, pytest.approx(loss)) for step, loss in enumerate(losses, 1)]
    rows = result.matrices["choice"].rows
    assert points("score/choice/colour") == [(6, pytest.approx(rows[0][0])), (12, pytest.approx(rows[1][0]))]
    assert [step for step, _ in points("train/captured")] == [1, 7]  # where a low-rank state chose its directions
    assert [step for step, _ in points("gate/verdict")] == [6, 12]
    assert {"matrix/choice/average_accuracy", "protection/update_leak", "protection/weight_leak", "train/update_leak"} <= set(
        events.Tags()["scalars"]
    )


def wandb_records(file: Path) -> list:
    """What a .wandb file holds: after 7 bytes, in blocks of 32 KB, records of LevelDB's log format (checksum 4, length 2, type 1: whole, first, middle, last part)."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole, records = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            records.append(wandb_internal_pb2.Record.FromString(whole))
            whole = b""
    return records


def run_twice(config: dict, tmp_path: Path, **variables: str) -> str:
    """A task, then it and another, in a process of its own: both libraries read their variables when they are imported, and trackio prints when one ends."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    code = "import json, sys; from forgetless.loop import run; c = json.load(open(sys.argv[1])); run(c | {'tasks': c['tasks'][:1]}); run(c)"
    given = os.environ | variables | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "config.json")], env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wandb_offline_holds_the_run(small_run, tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed")
    config = small_run("seqft", tasks=("colour", "animal"), report_to="wandb")
    run_twice(config, tmp_path, WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    files = sorted(tmp_path.rglob("run-*.wandb"), key=lambda p: p.stat().st_mtime)
    records = [record for file in files for record in wandb_records(file)]
    ids = {record.run.run_id for record in records if record.WhichOneof("record_type") == "run"}
    assert ids == {json.loads((Path(config["output_dir"]) / tracking.FILE).read_text())["id"]}  # one run, once they are synced
    lines = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in r.history.item}
        for r in records
        if r.WhichOneof("record_type") == "history"
    ]
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "score/choice/colour" in line] == [6, 12]
    assert not [record for record in records if record.WhichOneof("record_type") in ("output", "output_raw")]  # what the process prints stays here
    assert any(record.metric.glob_name == "*" and record.metric.step_metric == "step" for record in records)


def test_trackio_on_this_machine_holds_the_run(small_run, tmp_path):
    pytest.importorskip("trackio", reason="trackio is not installed")
    config = small_run("seqft", tasks=("colour", "animal"), report_to="trackio")
    assert run_twice(config, tmp_path, TRACKIO_DIR=str(tmp_path / "trackio")) == ""  # stdout is for results
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "forgetless.db")) as db:
        rows = [(name, step, json.loads(values)) for name, step, values in db.execute("select run_name, step, metrics from metrics order by id")]
    identity = json.loads((Path(config["output_dir"]) / tracking.FILE).read_text())["id"]
    assert {name for name, _, _ in rows} == {f"run-{identity}"}
    assert [step for _, step, values in rows if "train/loss" in values] == list(range(1, 13))
    assert [step for _, step, values in rows if "score/choice/colour" in values] == [6, 12]

"""`store` says what a run's folder may hold of the data. Words nobody else uses are planted in every place a row has, and the whole folder is searched for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import write_task

import forgetless as fl
from forgetless.errors import ConfigError, GateRejected
from forgetless.history import verify

# words of the tiny tokenizer's, in pairs that stand nowhere else: its vocabulary, which lies beside the model, has only single words
TEXT, ANSWER, WATCHED = "maybe river stone", "red green", "flies good yes"
SECRETS = (TEXT, ANSWER, WATCHED)


def planted(folder: Path, name: str) -> dict:
    """A task whose texts and one of whose labels are secrets; labels are left to the data, so no setting names them."""
    task = write_task(folder, name)
    for file in (task["data"], task["test"]):
        rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
        rows = [{"sentence": f"{TEXT} {row['sentence']}", "label": ANSWER if i % 3 == 0 else row["label"]} for i, row in enumerate(rows)]
        Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {key: value for key, value in task.items() if key != "labels"}


def secrets_in(folder: Path) -> set[tuple[str, str]]:
    """(file, secret) of every file below, those that a killed run leaves behind too."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert len(files) > 15
    return {(p.relative_to(folder).as_posix(), s) for p in files for s in SECRETS if s.encode() in p.read_bytes()}


@pytest.fixture
def left(small_run, tmp_path, monkeypatch):
    """(store) -> the folder of a run with everything that writes: a watch set, probes, a gate that accepts one task and refuses the next, checkpoints, a report."""

    def make(store: str, killed: bool = False) -> Path:
        watch = write_task(tmp_path / "data", "mood")
        rows = [{"sentence": f"{WATCHED} happy apple {i}", "label": ("happy", "sad", "calm")[i % 3]} for i in range(12)]
        Path(watch["data"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = small_run("gorp", tasks=()) | {
            "tasks": [planted(tmp_path / "data", name) for name in ("colour", "animal")],
            "watch": [{"name": "skills", "data": watch["data"]}],
            "store": store, "checkpoint_every": 2, "probes": {"every": 2, "rows": 4},
            "gate": {"max_worst_task": 0.0, "margin": 0.5, "max_general_drop": 0.9, "max_drift_kl": 100.0, "alpha": 0.49},
        }  # fmt: skip
        real = __import__("forgetless.record", fromlist=["score_rows"]).score_rows

        def forgets(model, tokenizer, task, rows, scorers, **options):
            found = real(model, tokenizer, task, rows, scorers, **options)
            done = Path(config["output_dir"], "current").exists()
            for p in found:
                if task.name == "colour":
                    p.choice = p.text = "nothing" if done else p.answer
            return found

        monkeypatch.setattr("forgetless.record.score_rows", forgets)
        if killed:
            calls, loss = [], __import__("forgetless.trainer", fromlist=["answer_loss"]).answer_loss
            monkeypatch.setattr(
                "forgetless.trainer.answer_loss",
                lambda *a: loss(*a) if calls.append(1) or len(calls) < 10 else (_ for _ in ()).throw(KeyboardInterrupt),
            )
        with pytest.raises(KeyboardInterrupt if killed else GateRejected):
            fl.run(config)
        from forgetless.report import write_report

        write_report([Path(config["output_dir"])], Path(config["output_dir"], "report.html"))
        return Path(config["output_dir"])

    return make


@pytest.mark.parametrize("store", ["nothing", "prompts"])
@pytest.mark.parametrize("killed", [False, True])
def test_no_word_of_the_data_is_written(store, killed, left):
    folder = left(store, killed)
    assert (folder / "rejected/01-animal/metrics.json").is_file() != killed and any((folder / "tasks").glob(".*.training/checkpoint-*")) == killed
    assert secrets_in(folder) == set()
    inputs = (folder / "tasks/00-colour/state/inputs.safetensors").exists()
    assert inputs == (store == "prompts")  # vectors that prompts made


def test_under_rows_they_are_where_the_docs_say(left):
    folder = left("rows")
    assert secrets_in(folder) == {
        ("tasks/00-colour/predictions.jsonl", ANSWER),
        ("rejected/01-animal/predictions.jsonl", ANSWER),
        ("rejected/01-animal/metrics.json", TEXT),
        ("rejected/01-animal/metrics.json", ANSWER),
        ("report.html", TEXT),
        ("report.html", ANSWER),
    }


def test_verify_says_what_is_kept_of_each_task(left, forgetless_):
    stored = verify(left("rows"))["stored"]
    assert "words of 16 scored rows" in stored["tasks/00-colour"][0] and any("3 rows as examples" in what for what in stored["rejected/01-animal"])
    assert all(any("derived from its data" in what for what in kept) and kept[-1] == "a model that was trained on it" for kept in stored.values())


def test_verify_where_nothing_is_stored(left):
    stored = verify(left("nothing"))["stored"]
    assert "numbers and scores of 16 rows, no words" in stored["tasks/00-colour"][0] and not any(
        "inputs.safetensors" in what for what in stored["tasks/00-colour"]
    )


@pytest.mark.parametrize("method", ["replay", {"name": "lwf", "on": {"name": "replay"}}])
def test_a_method_that_keeps_rows_is_refused(method, small_run):
    with pytest.raises(ConfigError, match="store: nothing forbids what method"):
        fl.run(small_run(method, store="nothing"))

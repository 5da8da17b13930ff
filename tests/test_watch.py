"""Watch sets: skills the model already has, measured before the first task and after each, never trained, and the same from start to end."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import write_task
from transformers import AutoModelForCausalLM, AutoTokenizer

import forgetless.loop
import forgetless.trainer
from forgetless.config import TaskConfig
from forgetless.errors import ConfigError
from forgetless.evaluation.scorers import score_rows
from forgetless.loop import run as learn
from forgetless.tasks import load_task, sample


def settings(folder: Path, model: str, **changes) -> dict:
    """Two tasks; one watch set with labels and one of free text, scored by nll."""
    mood = write_task(folder / "data", "mood")
    (folder / "data/notes.jsonl").write_text(
        "".join(json.dumps({"prompt": f"happy {w}", "completion": f"sad {w}"}) + "\n" for w in ("cat", "dog", "bird", "apple", "stone", "river"))
    )
    watch = [
        {"name": "mood", "data": mood["test"], "labels": mood["labels"]},
        {"name": "notes", "data": str(folder / "data/notes.jsonl"), "format": "prompt_completion", "metric": "nll"},
    ]
    return {
        "model": model, "tasks": [write_task(folder / "data", name) for name in ("colour", "animal")], "watch": watch, "method": {"name": "gorp"},
        "train": {"learning_rate": 1e-3, "max_steps": 6, "per_device_train_batch_size": 4, "bf16": False, "use_cpu": True},
        "evaluate": {"limit": 8}, "output_dir": str(folder / "run"),
    } | changes  # fmt: skip


@pytest.fixture(scope="module")
def watched(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    config = settings(folder, tiny)
    return config, learn(config)


@pytest.fixture
def here(tiny, tmp_path, monkeypatch) -> dict:
    monkeypatch.chdir(tmp_path)
    config = settings(tmp_path, tiny)
    Path("first.yaml").write_text(yaml.safe_dump(config))
    return config


def read(path) -> dict:
    return json.loads(Path(path).read_text())


def lineage(run) -> list[dict]:
    return [json.loads(line) for line in Path(run, "lineage.jsonl").read_text().splitlines()]


# -- what is measured --------------------------------------------------------------------------------------------------------------------


def test_measured_before_the_first_task_and_after_each(watched):
    """Each number is what the model of that moment scores on the same rows, asked again from its files."""
    config, result = watched
    matrix = read(result.path / "matrix.json")
    assert matrix["watch"] == result.watch and list(matrix["watch"]) == ["mood", "notes"]
    assert list(matrix["watch"]["mood"]) == ["metric", "choice", "exact_match"] and list(matrix["watch"]["notes"]) == ["metric", "exact_match"]
    assert matrix["metric_of"] == {"colour": "choice", "animal": "choice", "mood": "choice", "notes": "nll"}
    assert (matrix["n"]["mood"], matrix["n"]["notes"]) == (8, 6)
    for row, model in enumerate([config["model"], *(result.path / "tasks" / name / "model" for name in ("00-colour", "01-animal"))]):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
        for entry in config["watch"]:
            task = load_task(TaskConfig(**entry), watch=True)
            predictions = score_rows(model, tokenizer, task, sample(task.test, 8, 0), ["metric", "choice", "exact_match"])
            for scorer, values in matrix["watch"][task.name].items():
                assert values[row] == pytest.approx(sum(p.score(scorer) for p in predictions) / len(predictions), abs=1e-6)
    assert len(set(matrix["watch"]["notes"]["metric"])) == 3  # the model did change


def test_what_a_task_leaves_of_it(watched):
    _, result = watched
    matrix = read(result.path / "matrix.json")
    for i, name in enumerate(("00-colour", "01-animal")):
        metrics = read(result.path / "tasks" / name / "metrics.json")
        assert metrics["watch"] == {w: {s: values[i + 1] for s, values in scores.items()} for w, scores in matrix["watch"].items()}
        lines = [json.loads(line) for line in (result.path / "tasks" / name / "predictions.jsonl").read_text().splitlines()]
        assert [sum(p["task"] == w for p in lines) for w in ("mood", "notes")] == [8, 6]
    assert [line["watch"] for line in lineage(result.path)] == [
        read(result.path / "tasks" / n / "metrics.json")["watch"] for n in ("00-colour", "01-animal")
    ]
    assert set(lineage(result.path)[0]["watch_sha256"]) == {"mood", "notes"}


def test_watching_trains_nothing_and_changes_nothing(watched, tmp_path):
    config, result = watched
    plain = learn({key: value for key, value in config.items() if key != "watch"} | {"output_dir": str(tmp_path / "plain")})
    assert [line["model_sha256"] for line in lineage(plain.path)] == [line["model_sha256"] for line in lineage(result.path)]
    assert plain.matrices["choice"].rows == result.matrices["choice"].rows and plain.watch == {}
    assert "watch" not in lineage(plain.path)[0] and read(plain.path / "matrix.json")["watch"] == {} and not (plain.path / "watch.json").exists()


def test_unseen_tasks_and_watch_sets_share_the_row_before(watched, tmp_path):
    config, result = watched
    both = learn(config | {"evaluate": {"limit": 8, "unseen": True}, "output_dir": str(tmp_path / "both")})
    assert both.watch == result.watch and None not in both.matrix.before and result.matrix.before is None
    assert list(both.matrices) == ["metric", "choice", "exact_match"]


def test_under_dev_the_dev_rows_are_watched(watched, tmp_path):
    """Settings are chosen without a look at the watch sets' test rows."""
    config, _ = watched
    mood = write_task(tmp_path / "data", "mood") | {"dev": str(tmp_path / "dev.jsonl")}
    (tmp_path / "dev.jsonl").write_text('{"sentence": "sad stone", "label": "sad"}\n')
    result = learn(config | {"watch": [mood], "evaluate": {"split": "dev"}, "output_dir": str(tmp_path / "run")})
    assert read(result.path / "matrix.json")["n"]["mood"] == 1


def test_a_watch_set_of_a_suite_and_of_conversations(chatty, tmp_path):
    pytest.importorskip("vaderSentiment")
    config = settings(tmp_path, chatty)
    talk = [{"messages": [{"role": "user", "content": f"cat {w}"}, {"role": "assistant", "content": w}]} for w in ("red", "blue", "green")]
    (tmp_path / "talk.json").write_text(json.dumps(talk))
    watch = [
        {"name": "polarity", "suite": "demo/polarity", "max_text_tokens": 8, "label_words": {"negative": "bad", "positive": "good"}},
        {"name": "talk", "data": str(tmp_path / "talk.json"), "format": "messages", "metric": "nll"},
    ]
    config["tasks"][1] = {"name": "chats", "data": str(tmp_path / "talk.json"), "test": str(tmp_path / "talk.json"), "format": "messages"}
    said = Said()
    result = learn(config | {"watch": watch, "store": "prompts"}, progress=said)
    assert list(result.watch) == ["polarity", "talk"] and all(
        len(v) == 3 and None not in v for scores in result.watch.values() for v in scores.values()
    )
    assert "warning: watch 'talk': 3 of its texts also stand in the training rows of task 'chats'" in said.lines
    assert "warning: task 'chats': 3 test texts also stand in its training rows" in said.lines
    lines = [json.loads(line) for line in (result.path / "tasks/01-chats/predictions.jsonl").read_text().splitlines()]
    assert {p["task"] for p in lines} == {"colour", "chats", "polarity", "talk"} and all(set(p) == {"row", "task", "score"} for p in lines)


class Said(forgetless.loop.Progress):
    def __init__(self):
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


# -- the same from start to end ----------------------------------------------------------------------------------------------------------


def test_interrupted_and_run_again_is_never_interrupted(here, forgetless_, monkeypatch):
    calls, real = [], forgetless.trainer.answer_loss

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 6 + 3:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(forgetless.trainer, "answer_loss", interrupted)
        assert forgetless_("run", "first.yaml")[0] == 130
    assert len(lineage("run")) == 1 and len(read("run/watch.json")["mood"]) == 3
    before = Path("run/watch.json").read_bytes()
    status, out, err = forgetless_("run", "first.yaml")
    assert status == 0 and "before: scoring" not in err and Path("run/watch.json").read_bytes() == before
    before, *_, now = (100 * value for value in read("run/matrix.json")["watch"]["notes"]["metric"])
    assert "watched, never trained (%)" in out and "after animal" in out
    assert re.search(rf"notes +│ metric +│ +{before:.1f} │ +{now:.1f} │ +{re.escape(f'{now - before:+.1f}')} │", out)
    assert forgetless_("run", "first.yaml", "output_dir=whole")[0] == 0
    assert lineage("run") == lineage("whole") and Path("run/matrix.json").read_text() == Path("whole/matrix.json").read_text()


def test_a_row_before_of_an_attempt_that_committed_nothing_is_measured_again(here, forgetless_, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    for last in ([], ["watch=[]"], []):
        with monkeypatch.context() as patch:
            patch.setattr(forgetless.loop, "train_task", killed)
            assert forgetless_("run", "first.yaml", *last)[0] == 130
        assert Path("run/watch.json").exists() == (not last)
    assert list(read("run/watch.json")) == ["mood", "notes"]
    Path("run/watch.json").write_text('{"mood": {"choice": 7.0}}')
    assert forgetless_("run", "first.yaml", "watch.0.name=temper")[0] == 0  # nothing is committed: it may still change
    assert list(read("run/watch.json")) == ["temper", "notes"] and max(read("run/matrix.json")["watch"]["temper"]["choice"]) <= 1


def drop_a_row(config: dict) -> None:
    file = Path(config["watch"][0]["data"])
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))


def change_a_word(config: dict) -> None:
    file = Path(config["watch"][1]["data"])
    file.write_text(file.read_text().replace("sad apple", "sad stone"))


@pytest.mark.parametrize(
    ("change", "overrides", "parts"),
    [
        (drop_a_row, [], ["watch 'mood' has other rows than when the run began", "bring the old rows back, or choose another output_dir"]),
        (change_a_word, [], ["watch 'notes' has other rows"]),
        (None, ["watch.0.prompt='{sentence} :'"], ["holds a run with watch.0.prompt: None, now watch.0.prompt: {sentence} :"]),
        (None, ["watch.1.metric=exact_match"], ["watch.1.metric: nll, now watch.1.metric: exact_match"]),
        (None, ["watch=[]"], ["holds a run with watch: ['mood', 'notes'], now watch: []"]),
        (None, ["watch.1.name=letters"], ["watch: ['mood', 'notes'], now watch: ['mood', 'letters']"]),
    ],
    ids=["a row less", "another word", "another prompt", "another metric", "none", "another name"],
)
def test_what_is_watched_may_not_change_inside_a_run(here, forgetless_, change, overrides, parts):
    assert forgetless_("run", "first.yaml", "tasks=[" + json.dumps(here["tasks"][0]) + "]")[0] == 0
    before = {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}
    if change:
        change(here)
    status, out, err = forgetless_("run", "first.yaml", "--progress", "none", *overrides)
    assert status == 2 and out == "" and err.startswith("error: output_dir ") and all(part in err for part in parts), err
    assert {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()} == before


def test_a_watch_set_joining_a_run_is_refused(watched, tmp_path):
    config, _ = watched
    plain = {key: value for key, value in config.items() if key != "watch"} | {"output_dir": str(tmp_path / "run")}
    learn(plain)
    with pytest.raises(ConfigError, match=r"holds a run with watch: \[\], now watch: \['mood', 'notes'\]"):
        learn(plain | {"watch": config["watch"]})


def test_doctor_reads_the_watch_sets_too(here, forgetless_):
    status, out, _ = forgetless_("doctor", "first.yaml", "--json")
    assert status == 0 and json.loads(out)["watch"] == [{"name": "mood", "rows": 12}, {"name": "notes", "rows": 6}]
    assert "watch      notes: 6 rows" in forgetless_("doctor", "first.yaml")[1]
    status, _, err = forgetless_("doctor", "first.yaml", "watch.0.data=nowhere.jsonl")
    assert status == 4 and "task 'mood': no such data file: nowhere.jsonl" in err

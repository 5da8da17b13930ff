"""The gate in a run: which rows it looks at, what becomes of a model it refuses, and what is written of it. Its statistics are in test_gate_statistics.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import TASKS, write_task

import forgetless as fl
from forgetless.errors import ConfigError, GateRejected
from forgetless.evaluation.scorers import Prediction
from forgetless.history import verify
from forgetless.lineage import RunFolder

TEST_ROWS = 200


@pytest.fixture
def scripted(small_run, tmp_path, monkeypatch):
    """config(right, **changes): a run whose answers are scripted. right(learned, name, row) -> is the row answered rightly by the model that has learned so many tasks?"""
    data = tmp_path / "data"

    def make(right, tasks=("colour", "animal"), **changes):
        config = small_run("seqft", tasks=tasks, **changes) | {
            "train": {"max_steps": 1, "per_device_train_batch_size": 4, "bf16": False, "use_cpu": True}
        }
        for name in tasks:
            rows = [{"sentence": f"{i} {TASKS[name][i % 3][0]}", "label": TASKS[name][i % 3][1]} for i in range(TEST_ROWS)]
            (data / f"{name}_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config["evaluate"] = {"limit": 50}
        asked = []

        def score_rows(model, tokenizer, task, rows, scorers, **_):
            learned = len(RunFolder(config["output_dir"], lock=False).committed()) + (
                0 if task.name == "watched" and not Path(config["output_dir"], "watch.json").exists() else 1
            )
            asked.extend((learned, task.name, row.row) for row in rows)
            wrong = {a: b for a, b in zip(task.labels, [*task.labels[1:], task.labels[0]], strict=True)}
            said = [row.answer if right(learned, task.name, row.row) else wrong[row.answer] for row in rows]
            return [
                Prediction(row.row, task.name, row.answer, choice=word, text=word, metric=float(word == row.answer))
                for row, word in zip(rows, said, strict=True)
            ]

        monkeypatch.setattr("forgetless.record.score_rows", score_rows)
        return config, asked

    return make


def lineage(config) -> list[dict]:
    return [json.loads(line) for line in Path(config["output_dir"], "lineage.jsonl").read_text().splitlines()]


def metrics(config, place: str) -> dict:
    return json.loads(Path(config["output_dir"], place, "metrics.json").read_text())


def test_a_model_that_forgot_is_kept_aside(scripted, forgetless_, tmp_path):
    """colour falls from 100 % to 40 %: refused, the model before stays current, three rows of what broke are shown, exit 3."""
    config, _ = scripted(lambda learned, name, row: name != "colour" or learned == 1 or row % 5 < 2, gate={"max_worst_task": 0.02})
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    status, _, err = forgetless_("run", str(tmp_path / "c.yaml"), "--progress", "none")
    assert status == 3 and "colour lost" in err and "max_worst_task allows 2" in err and "rejected/01-animal" in err
    path = Path(config["output_dir"])
    assert (path / "current").read_text() == "00-colour\n" and (path / "model").resolve().parent.name == "00-colour"
    assert (path / "rejected/01-animal/model/model.safetensors").is_file() and not (path / "tasks/01-animal").exists()
    accepted, refused = lineage(config)
    assert (accepted["kind"], accepted["gate"], refused["kind"], refused["gate"]) == ("task", "accept", "reject", "reject")
    verdict = metrics(config, "rejected/01-animal")["gate"]
    (broken,) = (c for c in verdict["criteria"] if c["outcome"] == "broken")
    assert broken["name"] == "colour" and broken["observed"] == pytest.approx(0.6, abs=0.1) and broken["allowed"] == 0.02
    assert [e["before"] == e["answer"] != e["after"] for e in verdict["examples"]["colour"]] == [True] * 3
    assert all(TASKS["colour"][e["row"] % 3][0] in e["text"] for e in verdict["examples"]["colour"])
    assert len(json.loads((path / "matrix.json").read_text())["scores"]["choice"]) == 1
    assert (path / "report.html").is_file() and verify(path)["damage"] == []

    begun = Path(config["output_dir"], "timing.jsonl").read_text()
    status, _, err = forgetless_("run", str(tmp_path / "c.yaml"), "--progress", "none")  # it would be refused again: nothing is trained
    assert (
        status == 3 and "rejected/01-animal" in err and len(lineage(config)) == 2 and Path(config["output_dir"], "timing.jsonl").read_text() == begun
    )
    status, out, _ = forgetless_("run", str(tmp_path / "c.yaml"), "--progress", "none", "gate.max_worst_task=0.9")  # the gate may change
    assert status == 0 and "gate    animal: accept" in out and (path / "current").read_text() == "01-animal\n"


def test_what_is_kept_is_accepted_and_flips_without_a_drop_are_no_drop(scripted):
    config, _ = scripted(lambda learned, name, row: name != "colour" or row % 10 != learned, gate={"max_worst_task": 0.1, "margin": 0.3})
    fl.run(config)
    assert [line["gate"] for line in lineage(config)] == ["accept", "accept"]


def test_more_rows_are_scored_until_it_knows(scripted):
    """50 rows of the matrix do not decide a drop of 30 points, so 50 more are scored, then 100; those of a task just learned are scored at once, for the day they are needed."""
    right = lambda learned, name, row: name != "colour" or learned == 1 or (row * 7) % 10 < 7  # noqa: E731
    gate = {"max_worst_task": 0.15, "margin": 0.05, "max_rows": 200}
    config, asked = scripted(right, gate=gate, tasks=("colour", "animal"))
    with pytest.raises(GateRejected):
        fl.run(config)
    assert len({row for learned, name, row in asked if (learned, name) == (1, "colour")}) == 200
    assert len(metrics(config, "tasks/00-colour")["further_scores"]["choice"]) == 150
    looked = [row for learned, name, row in asked if (learned, name) == (2, "colour")]
    (criterion,) = metrics(config, "rejected/01-animal")["gate"]["criteria"]
    assert len(looked) == len(set(looked)) == criterion["rows"] > 50 and criterion["available"] == 200
    assert len(metrics(config, "rejected/01-animal")["scores"]["choice"]) == 2  # the matrix has its own rows as ever
    cell = [json.loads(x) for x in Path(config["output_dir"], "rejected/01-animal/predictions.jsonl").read_text().splitlines()]
    assert sum(x["task"] == "colour" for x in cell) == 50


def test_without_max_rows_no_more_are_scored(scripted):
    config, asked = scripted(lambda learned, name, row: True, gate={"max_worst_task": 0.0, "margin": 0.01})
    fl.run(config)
    assert len(asked) == 50 + 2 * 50 and "further_scores" not in metrics(config, "tasks/00-colour")
    assert [line["gate"] for line in lineage(config)] == ["accept", "undecided"]


@pytest.mark.parametrize("policy", ["accept", "hold"])
def test_undecided(policy, scripted, forgetless_, tmp_path):
    """Two rows of fifty lost: too few to tell at a margin of two points. Accepted with a warning that says how many rows would do, or kept aside; exit 0 either way."""
    right = lambda learned, name, row: name != "colour" or learned == 1 or row > 10  # noqa: E731
    config, _ = scripted(right, gate={"max_worst_task": 0.0, "on_undecided": policy})
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    for _ in range(2):
        status, out, err = forgetless_("run", str(tmp_path / "c.yaml"), "--progress", "json")
        said = out + err
        assert status == 0 and "would do, there are 50" in said
        held = [line["kind"] for line in lineage(config)] == ["task", "reject"]
        assert held == (policy == "hold") and (Path(config["output_dir"], "current").read_text() == "00-colour\n") == held
        assert len(lineage(config)) == 2  # the second time nothing is done again
    criterion = metrics(config, "rejected/01-animal" if held else "tasks/01-animal")["gate"]["criteria"][0]
    assert criterion["outcome"] == "undecided" and criterion["rows_to_decide"] > 50


def test_the_new_task_must_be_learned(scripted):
    config, _ = scripted(lambda learned, name, row: row % 4 == 0, gate={"min_new_task": 0.6}, tasks=("colour",))
    with pytest.raises(GateRejected, match=r"colour has 32\.0 points on 50 rows \(min_new_task asks for 60\)"):
        fl.run(config)
    path = Path(config["output_dir"])
    assert not (path / "current").exists() and not (path / "model").exists() and lineage(config)[0]["parent"] == ""
    assert verify(path)["damage"] == []


def test_watch_sets_are_held_to_what_the_untouched_model_made_of_them(scripted, tmp_path):
    """A slow erosion too: ten points a task are let pass one by one against the task before, and add up against the beginning."""
    watched = write_task(tmp_path / "data", "mood") | {"name": "watched"}
    (tmp_path / "data/mood_test.jsonl").write_text(
        "".join(json.dumps({"sentence": f"{i} happy apple", "label": "happy"}) + "\n" for i in range(TEST_ROWS))
    )
    right = lambda learned, name, row: name != "watched" or row % 10 >= learned * 3  # noqa: E731
    config, _ = scripted(right, gate={"max_general_drop": 0.15, "max_rows": 200}, watch=[watched | {"data": watched["test"], "test": None}])
    with pytest.raises(GateRejected, match="watched lost"):
        fl.run(config)
    assert lineage(config)[0]["kind"] == "reject"
    scores = json.loads(Path(config["output_dir"], "watch_scores.json").read_text())["watched"]["choice"]
    assert len(scores) == 200 and set(scores.values()) == {1.0}


@pytest.mark.parametrize("store", ["nothing", "prompts"])
def test_no_examples_where_rows_may_not_be_stored(store, scripted):
    config, _ = scripted(lambda learned, name, row: name != "colour" or learned == 1, gate={"max_worst_task": 0.02}, store=store)
    with pytest.raises(GateRejected):
        fl.run(config)
    assert "examples" not in metrics(config, "rejected/01-animal")["gate"]


def test_a_task_without_labels_is_held_to_what_it_has(small_run, tmp_path, forgetless_):
    """choice of a task that has labels, exact match of one that has none; and a gate that could hold it to nothing is refused before anything begins."""
    rows = [{"prompt": f"{i} happy apple", "completion": "happy"} for i in range(40)]
    (tmp_path / "free.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    free = {"name": "free", "data": str(tmp_path / "free.jsonl"), "format": "prompt_completion"}
    config = small_run("seqft", tasks=("colour",), gate={"max_worst_task": 1.0, "min_new_task": 0.0, "margin": 0.9})
    config["tasks"] = [free, *config["tasks"]]
    fl.run(config)
    assert {c["name"] for c in metrics(config, "tasks/01-colour")["gate"]["criteria"]} == {"free", "colour"}
    with pytest.raises(ConfigError, match="'free' has no labels.*add exact_match"):
        fl.run(config | {"evaluate": {"limit": 8, "scorers": ["choice"]}, "output_dir": str(tmp_path / "other")})


def test_the_rows_come_in_an_order_that_has_nothing_to_do_with_them(scripted):
    """A test file sorted by label, of which the model forgets the last label's: taken in file order the first rows would say that nothing is lost, or, reversed, everything."""
    config, asked = scripted(lambda *_: True, gate={"max_worst_task": 0.5, "max_rows": 200})
    fl.run(config)
    from forgetless.config import load_config
    from forgetless.gating import Gate
    from forgetless.progress import Progress
    from forgetless.tasks import load_stream

    settings = load_config(config)
    rows = [
        x.row for x in Gate(settings, RunFolder(config["output_dir"], lock=False), load_stream(settings), Progress()).rows(load_stream(settings)[0])
    ]
    assert sorted(rows) == list(range(200)) and 60 < sum(rows[:50]) / 50 < 140 and rows[:50] != sorted(rows[:50])
    assert {row for learned, name, row in asked if (learned, name) == (1, "colour")} == set(rows)


def test_a_task_with_a_metric_does_not_switch_the_gate_off_for_the_others(scripted):
    """With it the run's first scorer is `metric`, which the earlier task was not scored by: it is held to what its own was."""
    config, _ = scripted(lambda learned, name, row: name != "colour" or learned == 1, tasks=("colour", "animal"))
    fl.run(config | {"tasks": config["tasks"][:1]})
    config["tasks"][1]["metric"] = "exact_match"
    with pytest.raises(GateRejected, match="colour lost 100"):
        fl.run(config | {"gate": {"max_worst_task": 0.02}})


def test_other_settings_of_the_task_are_tried_again(scripted):
    config, _ = scripted(lambda learned, name, row: name != "colour" or learned == 1, gate={"max_worst_task": 0.02})
    tasks = [config["tasks"][0], config["tasks"][1] | {"train": {"max_steps": 2}}]
    for attempt, kept in ((tasks, 2), (tasks, 2), (config["tasks"], 3), (config["tasks"], 3)):
        with pytest.raises(GateRejected):
            fl.run(config | {"tasks": attempt})
        assert len(lineage(config)) == kept


def test_hold_at_the_first_task(scripted, forgetless_, tmp_path):
    config, _ = scripted(lambda learned, name, row: row % 2, gate={"min_new_task": 0.5, "on_undecided": "hold"}, tasks=("colour",))
    assert fl.run(config).held.startswith("task 'colour': colour has")
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    status, out, _ = forgetless_("run", str(tmp_path / "c.yaml"), "--progress", "none")
    assert status == 0 and "held    task 'colour'" in out


def test_what_cannot_be_compared_is_undecided(scripted):
    """The test rows of colour are gone: nothing says that it was kept."""
    from forgetless.adding import add

    config, _ = scripted(lambda *_: True, tasks=("colour",))
    fl.run(config)
    for key in ("data", "test"):
        Path(config["tasks"][0][key]).unlink()
    new = write_task(Path(config["tasks"][0]["data"]).parent, "animal")
    add(config["output_dir"], "animal", new["data"], [f"test={new['test']}", "gate.max_worst_task=0.1"])
    (criterion,) = metrics(config, "tasks/01-animal")["gate"]["criteria"]
    assert (criterion["name"], criterion["outcome"], criterion["rows"]) == ("colour", "undecided", 0) and lineage(config)[1]["gate"] == "undecided"


@pytest.mark.parametrize(("limits", "name"), [({"max_forgetting": 0.02}, "colour"), ({"min_new_task": 0.9}, "animal")])
def test_examples_of_every_limit(limits, name, scripted):
    config, _ = scripted(lambda learned, task, row: learned == 1 or task == "colour" and "max_forgetting" not in limits, gate=limits)
    with pytest.raises(GateRejected):
        fl.run(config)
    examples = metrics(config, "rejected/01-animal")["gate"]["examples"]
    assert list(examples) == [name] and len(examples[name]) == 3 and all(e["after"] != e["answer"] for e in examples[name])


def test_refused_models_go_as_keep_says(scripted):
    config, _ = scripted(lambda learned, name, row: name != "colour" or learned == 1, gate={"max_worst_task": 0.02}, keep="last 1")
    for margin in (0.02, 0.03, 0.04):
        with pytest.raises(GateRejected):
            fl.run(config | {"gate": {"max_worst_task": 0.02, "margin": margin}})
    rejected = sorted(Path(config["output_dir"], "rejected").iterdir())
    assert [(p / "model").is_dir() for p in rejected] == [False, False, True]


def test_a_scorer_the_run_does_not_have(scripted):
    config, _ = scripted(lambda *_: True, gate={"max_worst_task": 0.02, "scorer": "metric"})
    with pytest.raises(ConfigError, match="gate.scorer: metric is not among the run's scorers"):
        fl.run(config)
    assert not Path(config["output_dir"]).exists()


def test_a_run_without_a_gate_writes_nothing_of_it(scripted):
    config, _ = scripted(lambda *_: False)
    fl.run(config)
    assert all("gate" not in line and "began_at" not in line for line in lineage(config)) and "gate" not in metrics(config, "tasks/01-animal")


def test_killed_between_the_refusal_and_its_line(scripted, monkeypatch):
    config, _ = scripted(lambda learned, name, row: name != "colour" or learned == 1, gate={"max_worst_task": 0.02})
    with monkeypatch.context() as patch:
        append = RunFolder._append
        patch.setattr(
            RunFolder, "_append", lambda self, line: (_ for _ in ()).throw(KeyboardInterrupt) if line["kind"] == "reject" else append(self, line)
        )
        with pytest.raises(KeyboardInterrupt):
            fl.run(config)
    assert len(lineage(config)) == 1 and [line["kind"] for line in RunFolder(config["output_dir"], lock=False).lineage()] == ["task", "reject"]
    with pytest.raises(GateRejected):
        fl.run(config)
    assert len(lineage(config)) == 2 and verify(config["output_dir"])["damage"] == []

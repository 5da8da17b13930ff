"""The leaderboard's queue: what a spec asks for, cells that are never done twice, trials before cells, one file a cell. The analysis has a file of its own."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import yaml

from forgetless.config import RunConfig
from forgetless.errors import ConfigError, DataError
from forgetless.leaderboard import cells as files
from forgetless.leaderboard import protocols, reading, work
from forgetless.leaderboard.protocols import Protocol
from forgetless.leaderboard.spec import Also, Cell, Row, Spec, Tier, also_of, cells, folder_of, load_spec, run_config, trials
from forgetless.lock import FolderLock
from forgetless.suites import MODULES, SuiteTask
from tests.conftest import TASKS

ROWS = [
    {"row": "seqft", "method": {"name": "seqft"}, "grid": {"learning_rate": [1e-3, 1e-2]}},
    {"row": "replay, 20 %", "method": {"name": "replay"}, "grid": {"learning_rate": [1e-3], "rate": [0.2, 0.5]}},
]
SEQFT = {"streams": ["two"], "seeds": [0], "prompts": ["bare"], "rows": ["seqft"]}


@pytest.fixture
def toy(monkeypatch):
    """A suite of three tasks and a protocol on it: two prompts, two trials, two steps."""

    def load(task: str, *, seed: int = 0, options_in_prompt: bool = False) -> SuiteTask:
        rows = [
            {"sentence": f"{a} {text} {b}", "label": label}
            for a in ("apple", "stone", "river")
            for b in ("yes", "no", "maybe")
            for text, label in TASKS[task]
        ]
        labels = [label for _, label in TASKS[task]]
        head = " ".join(labels) + " " if options_in_prompt else ""
        return SuiteTask(rows[:12], rows[12:22], rows[22:], labels, head + "Text : {sentence} Answer :", "made here")

    module = types.ModuleType("forgetless.suites.toy")
    module.TASKS, module.load = TASKS, load
    monkeypatch.setitem(sys.modules, "forgetless.suites.toy", module)
    monkeypatch.setitem(MODULES, "toy", "toy")
    protocol = Protocol(
        "toy-v1", "for a test", {"two": ("toy/colour", "toy/animal"), "other": ("toy/animal", "toy/colour")}, {"bare": {}, "options": {"options_in_prompt": True}},
        {"max_steps": 2, "per_device_train_batch_size": 4, "lr_scheduler_type": "polynomial", "bf16": False, "use_cpu": True}, final_rate_share=0.1,
        test_rows=4, scorers=("choice", "exact_match"), trials=2, tuning=("toy/mood",), tuning_prompt="bare", tuning_rows=2,
    )  # fmt: skip
    monkeypatch.setattr(protocols, "protocols", lambda: {"toy-v1": protocol})


@pytest.fixture
def spec(toy, tiny, tmp_path):
    """spec(tiers, rows): a spec read from a file, with all it writes in tmp_path."""

    def make(*tiers: dict, rows=ROWS, **changes):
        content = {
            "protocol": "toy-v1",
            "model": tiny,
            "rows": rows,
            "tiers": list(tiers),
            "results": str(tmp_path / "cells"),
            "runs": str(tmp_path / "runs"),
        }
        (tmp_path / "spec.yaml").write_text(yaml.safe_dump(content | changes))
        return load_spec(tmp_path / "spec.yaml")

    return make


@pytest.fixture
def here(monkeypatch):
    """Runs in this process; the configs that were run, in order."""
    from forgetless.config import load_config
    from forgetless.loop import run

    done = []

    def launch(config, log) -> int:
        done.append(json.loads(config.read_text()))
        run(load_config(config))
        return 0

    monkeypatch.setattr(work, "launch", launch)
    return done


# -- what is asked for -------------------------------------------------------------------------------------------------------------------


def test_cells_come_seed_by_seed_and_tier_by_tier(spec):
    found = cells(spec({"streams": ["two"], "seeds": [0, 1], "prompts": ["bare"]}, {"streams": ["other"], "seeds": [0], "rows": ["seqft"]}))
    assert [c.name for c in found] == [
        "toy-v1/two-bare/seqft/seed0", "toy-v1/two-bare/replay-20/seed0", "toy-v1/two-bare/seqft/seed1", "toy-v1/two-bare/replay-20/seed1",
        "toy-v1/other-bare/seqft/seed0", "toy-v1/other-options/seqft/seed0",
    ]  # fmt: skip


def test_every_row_has_as_many_trials(spec):
    assert [c.name.removeprefix("toy-v1/tuning/") for c in trials(spec(SEQFT | {"rows": None}))] == [
        "seqft/trial0", "replay-20/trial0", "seqft/trial1", "replay-20/trial1",
    ]  # fmt: skip
    assert [c.row for c in trials(spec(SEQFT))] == ["seqft", "seqft"], "rows of no tier need no trials"
    with pytest.raises(ConfigError, match="its grid makes 1 trials, and toy-v1 gives every row 2"):
        spec(SEQFT, rows=[ROWS[0] | {"grid": {"learning_rate": [1e-3]}}])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"protocol": "toy-v2"}, "there is no protocol 'toy-v2'; did you mean 'toy-v1'"),
        ({"tiers": [SEQFT | {"streams": ["tow"]}]}, "streams: there is no 'tow'; did you mean 'two'"),
        ({"tiers": [SEQFT | {"rows": ["seqtf"]}]}, "rows: there is no 'seqtf'; did you mean 'seqft'"),
        ({"tiers": [SEQFT | {"prompts": ["bear"]}]}, "prompts: there is no 'bear'; did you mean 'bare'"),
        ({"rows": [*ROWS, ROWS[0] | {"row": "seqft "}]}, "two rows have the name, or the folder"),
        ({"rows": [ROWS[0] | {"method": {"name": "seqtf"}}]}, "seqtf.*did you mean 'seqft'"),
        ({"rows": [ROWS[0] | {"method": {"name": "replay", "rat": 1}}]}, "rat"),
        ({"rows": [ROWS[0] | {"grid": {"rate": [1]}}]}, "grid.learning_rate is missing"),
        ({"rows": [ROWS[0] | {"row": "a|b"}]}, "has no line break and none of"),
        ({"seeds": [1]}, "seeds: Extra inputs"),
        ({"also": {"seeds": [0]}}, "also: nothing is asked for"),
        ({"also": {"unseen": ["toy/colour"]}}, "'toy/colour' is trained in the stream two"),
        ({"also": {"rows": ["seqtf"], "relearn": {}}}, "also: rows: there is no 'seqtf'; did you mean 'seqft'"),
        ({"train": {"learning_rate": 1e-4}}, "train.learning_rate is the protocol's"),
        ({"rows": []}, "rows"),
    ],
)
def test_a_wrong_spec_ends_in_one_clear_message(spec, changes, said):
    with pytest.raises(ConfigError, match=said) as error:
        spec(SEQFT, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "benchmarks" / "leaderboards").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_project_s_own_specs_hold_to_their_protocols(path):
    found = load_spec(path)
    assert len(cells(found)) == len({cell.name for cell in cells(found)})


def test_a_spec_that_is_no_yaml_or_not_there(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_spec(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("rows: [")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_spec(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_text("- rows")
    with pytest.raises(ConfigError, match="expected keys such as protocol"):
        load_spec(tmp_path / "bad.yaml")


# -- what is done ------------------------------------------------------------------------------------------------------------------------


def test_trials_come_first_and_the_best_one_s_settings_are_used(spec, here, tmp_path, monkeypatch):
    """The whole road: two trials on dev rows alone, one cell; and nothing is done a second time."""
    s, said = spec(SEQFT), []
    assert work.work_through(s, 1, say=said.append)
    assert [c["train"]["learning_rate"] for c in here[:2]] == [1e-3, 1e-2] and len(here) == 3
    trial = [files.read(tmp_path / "cells" / "toy-v1/tuning/seqft" / f"trial{i}.json") for i in (0, 1)]
    scores = [t["metrics"]["choice"]["average_accuracy"] for t in trial]
    best = scores.index(max(scores))
    cell = files.read(tmp_path / "cells/toy-v1/two-bare/seqft/seed0.json")
    assert cell["chosen"] == {"trial": best, "of": 2, "score": scores[best]} and cell["learning_rate"] == [1e-3, 1e-2][best]
    assert here[2]["train"]["lr_scheduler_kwargs"]["lr_end"] == pytest.approx(cell["learning_rate"] / 10)
    assert "3 of" not in said[-1] and "1 of 1  toy-v1/two-bare/seqft/seed0: choice" in said[-1]
    assert not list((tmp_path / "runs").rglob("*.safetensors")), "weights go once the cell is written"
    assert work.work_through(s, 1, say=said.append) and len(here) == 3, "a finished cell is never done again"

    # lost cells of a run that is there are read again, not run again
    (tmp_path / "cells/toy-v1/two-bare/seqft/seed0.json").unlink()
    assert work.work_through(s, 1) and len(here) == 3
    again = files.read(tmp_path / "cells/toy-v1/two-bare/seqft/seed0.json")
    assert again | {"seconds": 0} == cell | {"seconds": 0} and again["seconds"]["total"] is None, "how long it took nobody knows any more"

    # results of an older code are done again
    monkeypatch.setattr(files, "CODE", files.CODE + 1)
    assert work.work_through(s, 1) and len(here) == 6


def test_the_tuning_stream_is_made_of_dev_rows_alone(spec, here, tmp_path):
    work.work_through(spec(SEQFT), 1, tune_only=True)
    (entry,) = here[0]["tasks"]
    rows = [json.loads(line) for part in ("data", "test") for line in Path(entry[part]).read_text().splitlines()]
    suite = sys.modules["forgetless.suites.toy"].load("mood")
    assert rows == [{"sentence": r["sentence"], "label": r["label"]} for r in suite.dev]
    assert len(Path(entry["data"]).read_text().splitlines()) == 8 and here[0]["seed"] == 100


def test_a_cell_holds_what_the_table_is_made_of(spec, here, tmp_path):
    work.work_through(spec({"streams": ["two"], "seeds": [3], "prompts": ["options"], "rows": ["replay, 20 %"]}), 1)
    cell = files.read(tmp_path / "cells/toy-v1/two-options/replay-20/seed3.json")
    assert cell["row"] == "replay, 20 %" and cell["protocol"]["name"] == "toy-v1" and cell["protocol"]["steps"] == 2
    assert cell["tasks"] == ["colour", "animal"] and cell["config"]["tasks"][0]["suite_options"] == {"options_in_prompt": True}
    for when, place in (("final", -1), ("learned", None)):
        for j, task in enumerate(cell["tasks"]):
            digits, row = cell["rows"][when]["choice"][task], cell["scores"]["choice"][j if place is None else place]
            assert len(digits) == cell["n"][task] == 4 and sum(map(int, digits)) / 4 == row[j]
    assert cell["stored_rows"] == 200 and cell["bytes"]["memory"] > 0 and cell["bytes"]["optimizer"] > 0
    assert cell["seconds"]["train_cpu"] > 0 and cell["seconds"]["total"] > 0
    assert "torch" in cell["environment"]["versions"] and cell["environment"]["bf16_autocast"] is False


def test_cells_without_their_trials_wait_and_say_so(spec, here, tmp_path):
    said = []
    assert not work.work_through(spec(SEQFT), 1, only="two-bare", say=said.append)
    assert not here and "1 cells wait for trials on the tuning stream: seqft" in said


def test_diverged_training_is_a_result_and_no_trial_wins_by_it(spec, here, tmp_path, monkeypatch):
    inner = work.launch

    def launch(config, log) -> int:
        if json.loads(config.read_text())["train"]["learning_rate"] == 1e-3:
            log.write_text("error: training diverged at step 2\n")
            return 5
        return inner(config, log)

    monkeypatch.setattr(work, "launch", launch)
    s, said = spec(SEQFT), []
    assert work.work_through(s, 1, say=said.append)
    assert files.read(tmp_path / "cells/toy-v1/tuning/seqft/trial0.json")["failed"] == "training diverged at step 2"
    assert files.read(tmp_path / "cells/toy-v1/two-bare/seqft/seed0.json")["chosen"]["trial"] == 1
    monkeypatch.setattr(work, "launch", lambda config, log: log.write_text("error: training diverged") and 5)
    with pytest.raises(ConfigError, match="all 2 trials diverged"):
        work.work_through(spec(SEQFT | {"rows": ["replay, 20 %"]}), 1)


def test_a_failed_run_is_named_and_the_others_go_on(spec, here, tmp_path, monkeypatch):
    inner = work.launch
    monkeypatch.setattr(
        work, "launch", lambda config, log: log.write_text("error: no data\n") and 4 if "trial0" in str(config) else inner(config, log)
    )
    said = []
    assert not work.work_through(spec(SEQFT), 2, say=said.append)
    assert any("toy-v1/tuning/seqft/trial0: exit 4" in line and "error: no data" in line for line in said)
    assert files.read(tmp_path / "cells/toy-v1/tuning/seqft/trial1.json") and not list((tmp_path / "cells").rglob("seed0.json"))


def test_a_half_done_run_of_other_settings_is_not_gone_on_from(spec, here, tmp_path):
    s = spec(SEQFT)
    work.work_through(s, 1, tune_only=True)
    cell = Cell("seqft", "two", "bare", 0, protocol="toy-v1")
    folder = tmp_path / "runs" / f"code{files.CODE}" / cell.name
    folder.mkdir(parents=True)
    (folder / "half").write_text("")
    folder.with_name("seed0.yaml").write_text(json.dumps({"of": "another grid"}))
    assert work.work_through(s, 1) and not (folder / "half").exists()


def test_a_changed_grid_does_again_what_it_changed(spec, here, tmp_path):
    """Trials are known by their settings, not by their place; and a cell that its row's trials no longer choose is done again."""
    work.work_through(spec(SEQFT), 1)
    best = files.read(tmp_path / "cells/toy-v1/two-bare/seqft/seed0.json")["learning_rate"]
    other = next(rate for rate in (1e-3, 1e-2) if rate != best)
    s = spec(SEQFT, rows=[ROWS[0] | {"grid": {"learning_rate": [other, 0.5]}}])
    found = work.plan(s)
    assert [c.name for c in found.missing(found.cells)] == ["toy-v1/two-bare/seqft/seed0"]
    assert len(found.missing(found.trials)) == (1 if other == 1e-3 else 2)
    del here[:]
    work.work_through(s, 1)
    assert files.read(tmp_path / "cells/toy-v1/two-bare/seqft/seed0.json")["learning_rate"] in (other, 0.5)
    assert not work.plan(s).missing(found.cells)


def test_a_damaged_cell_is_named(spec, tmp_path):
    s = spec(SEQFT)
    path = files.place(s.results, cells(s)[0])
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(DataError, match="seed0.json: is not a cell"):
        work.plan(s)


def test_a_cell_run_again_here_answers_every_row_as_before(spec, here, tmp_path, forgetless_):
    s = spec(SEQFT, page=str(tmp_path / "docs" / "leaderboard.md"))
    code, out, err = forgetless_("leaderboard", str(tmp_path / "spec.yaml"), "--workers", "1")
    assert code == 0 and "1 of 1 cells and 2 of 2 trials are there" in out and "2 to do" in err
    assert "| seqft |" in (tmp_path / "docs" / "leaderboard.md").read_text()
    code, out, _ = forgetless_("leaderboard", str(tmp_path / "spec.yaml"), "--again", str(tmp_path / "again"))
    assert (code, out) == (0, "toy-v1/two-bare/seqft/seed0: every row as before\n")
    assert not work.repeat(s, tmp_path / "again", 1)[0]["difference"]

    path = tmp_path / "again/toy-v1/two-bare/seqft/seed0.json"  # as on a machine that answers otherwise
    cell = json.loads(path.read_text())
    cell["rows"]["final"]["choice"], cell["scores"]["choice"][-1] = {"colour": "1111", "animal": "1111"}, [1.0, 1.0]
    cell["rows"]["learned"]["choice"]["animal"] = "1111"
    path.write_text(json.dumps(cell))
    (found,) = work.repeat(s, tmp_path / "again", 1)
    assert not found["same_rows"] and found["difference"] == pytest.approx(1 - cell["metrics"]["choice"]["average_accuracy"])
    with pytest.raises(ConfigError, match="none of the 1 cells that are there has 'order9'"):
        work.repeat(s, tmp_path / "again", 1, only="order9")


def test_what_is_asked_beside_the_scores_is_in_the_cell_and_missing_cells_are_done_again(spec, here, tmp_path, monkeypatch):
    """unseen and relearn on the road of a run; and a cell that lacks them is not finished."""
    from forgetless.evaluation.relearn import relearn

    work.work_through(spec(SEQFT), 1)
    path = tmp_path / "cells/toy-v1/two-bare/seqft/seed0.json"
    plain = files.read(path)
    calls = []

    def command(log, *arguments) -> int:
        calls.append(arguments)
        relearn(arguments[1], arguments[3], int(arguments[5]), float(arguments[7]))
        return 0

    monkeypatch.setattr(work, "command", command)
    also = {"unseen": ["toy/mood"], "relearn": {"steps": 1, "learning_rate": 1e-3}}
    s = spec(SEQFT, also=also)
    assert [c.name for c in work.plan(s).missing(cells(s))] == ["toy-v1/two-bare/seqft/seed0"]
    del here[:]
    assert work.work_through(s, 1) and len(here) == 1 and len(calls) == 1, "no trial is done again"
    cell = files.read(path)
    assert all(cell[key] == plain[key] for key in ("scores", "rows", "n", "metrics")), "to look changes nothing"
    assert set(cell["unseen"]["tasks"]) == {"mood"} and set(cell["relearning"]["tasks"]) == {"colour"}
    assert cell["relearning"]["steps"] == [0, 1] and cell["relearning"]["tasks"]["colour"]["learning_rate"] == 1e-3
    assert work.work_through(s, 1) and len(here) == 1
    path.unlink()
    assert work.work_through(s, 1) and (len(here), len(calls)) == (1, 1), "what was measured before the weights went is read again"
    assert reading.load(tmp_path / "cells")

    # relearning asked for after the weights went: the run is done again, with the same outcome
    path.unlink()
    (tmp_path / "runs" / f"code{files.CODE}" / "toy-v1/two-bare/seqft/seed0/relearning.json").unlink()
    assert work.work_through(s, 1) and (len(here), len(calls)) == (2, 2)
    assert files.read(path)["relearning"] == cell["relearning"]

    elsewhere = spec(SEQFT, also=also | {"seeds": [5]})
    assert not work.plan(elsewhere).missing(cells(elsewhere)), "asked of other cells only"


def test_a_relearning_that_fails_leaves_no_cell(spec, here, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "command", lambda log, *arguments: log.write_text("error: diverged\n") and 5)
    said = []
    assert not work.work_through(spec(SEQFT, also={"relearn": {}}), 1, say=said.append)
    assert any("two-bare/seqft/seed0: exit 1" in line and "error: diverged" in line for line in said)
    assert not (tmp_path / "cells/toy-v1/two-bare/seqft/seed0.json").exists()


def test_general_ability_comes_from_the_run_s_own_measurement(tmp_path):
    suites = [{"facts": {"n": 4, "score": score, "values": []}} for score in (0.5, 0.75)]
    entries = [{"suites": suites[0]}, {"suites": suites[1], "change": {"facts": {"change": 0.25, "ci95": [0.0, 0.5]}}, "mean_change": 0.25}]
    (tmp_path / "general.json").write_text(json.dumps({"measured": entries}))
    assert files.measured(tmp_path, Also(general=["facts"])) == {
        "general": {"suites": {"facts": {"n": 4, "before": 0.5, "after": 0.75, "change": 0.25, "ci95": [0.0, 0.5]}}, "mean_change": 0.25}
    }


def test_a_routed_row_is_asked_only_what_it_can_answer(spec):
    rows = [{"row": "routed", "method": {"name": "routed"}, "grid": {"learning_rate": [1e-3, 1e-2]}}]
    also = {"unseen": ["toy/mood"], "general": ["boolq"], "relearn": {}}
    s = spec(SEQFT | {"rows": None}, rows=rows, also=also)
    assert also_of(s, cells(s)[0]).parts() == {"unseen"}
    s = spec(SEQFT | {"rows": None}, rows=rows, also={"relearn": {}})
    assert also_of(s, cells(s)[0]) is None
    config = run_config(
        spec(SEQFT, also=also), Cell("seqft", "two", "bare", 0, protocol="toy-v1"), {"name": "seqft"}, 1e-3, Path("out"), Path("data")
    )
    assert [entry["suite"] for entry in config["watch"]] == ["toy/mood"] and config["evaluate"]["general"] == ["boolq"]
    assert RunConfig(**config)


def test_a_task_without_labels_is_scored_by_its_own_metric_alone(spec, here, tmp_path, monkeypatch):
    """As in TRACE: the metric comes first, and choice has no rows where answers are free text."""
    inner = sys.modules["forgetless.suites.toy"].load

    def free(task, **options):
        made = inner(task, **options)
        made.labels, made.metric = (None, "exact_match") if task == "animal" else (made.labels, made.metric)
        return made

    monkeypatch.setattr(sys.modules["forgetless.suites.toy"], "load", free)
    monkeypatch.setattr(sys.modules["forgetless.suites.toy"], "METRICS", {"animal": "exact_match"}, raising=False)
    said = []
    assert work.work_through(spec(SEQFT), 1, say=said.append)
    cell = files.read(tmp_path / "cells/toy-v1/two-bare/seqft/seed0.json")
    assert set(cell["rows"]["final"]["metric"]) == {"colour", "animal"} and set(cell["rows"]["final"]["choice"]) == {"colour"}
    assert "two-bare/seqft/seed0: metric 0." in said[-1]
    assert reading.load(tmp_path / "cells")


def test_a_folder_that_another_process_holds_is_left_alone(spec, here, tmp_path):
    s, said = spec(SEQFT), []
    work.work_through(s, 1, tune_only=True)
    folder = tmp_path / "runs" / f"code{files.CODE}" / "toy-v1/two-bare/seqft/seed0"
    folder.mkdir(parents=True)
    folder.with_name("seed0.yaml").write_text(json.dumps({"of": "another grid"}))
    held = FolderLock(folder)
    assert not work.work_through(s, 1, say=said.append)
    assert folder.is_dir() and any("another process is running there" in line for line in said)
    held.release()


def test_a_cell_is_repeated_with_its_settings_wherever_they_stand_in_the_grid(spec, here, tmp_path):
    work.work_through(spec(SEQFT), 1)
    used = files.read(tmp_path / "cells/toy-v1/two-bare/seqft/seed0.json")["learning_rate"]
    s = spec(SEQFT, rows=[ROWS[0] | {"grid": {"learning_rate": [1e-2, 1e-3]}}])
    del here[:]
    assert work.repeat(s, tmp_path / "again", 1)[0]["same_rows"]
    assert [config["train"]["learning_rate"] for config in here] == [used]


def test_the_last_error_is_told_whatever_a_library_says_after_it(tmp_path):
    (tmp_path / "log").write_text("error: no data\nFailed to load something else\n")
    assert work.last_line(tmp_path / "log") == "error: no data"


def test_the_command_says_what_is_missing(spec, tmp_path, forgetless_):
    spec(SEQFT)
    code, out, _ = forgetless_("leaderboard", str(tmp_path / "spec.yaml"), "--table", "--json")
    assert code == 0 and json.loads(out)["missing"] == [
        "toy-v1/tuning/seqft/trial0", "toy-v1/tuning/seqft/trial1", "toy-v1/two-bare/seqft/seed0",
    ]  # fmt: skip
    code, _, err = forgetless_("leaderboard", str(tmp_path / "spec.yaml"), "--only", "two-bare")
    assert code == 4 and "wait for trials" in err and "not all cells" in err


def test_folders_are_plain_words():
    assert folder_of("osft-peft (peer)") == "osft-peft-peer" and folder_of("gorp") == "gorp"


def test_the_protocols_that_come_with_it(tmp_path):
    """Streams of known tasks, one statement each, and a schedule that every row shares."""
    found = protocols.protocols()
    assert {"clean-v1", "clean-500-v1", "paper-olora", "paper-gorp", "trace-500", "trace-5000", "synthetic-v1"} <= set(found)
    for name, protocol in found.items():
        assert protocol.name == name and protocol.about and "learning_rate" not in protocol.train
        assert json.loads(json.dumps(protocol.content()))["name"] == name
        spec = Spec(
            protocol=name,
            rows=[Row(row="seqft", method={"name": "seqft"}, grid={"learning_rate": [1e-4]})],
            tiers=[Tier(streams=[next(iter(protocol.streams))])],
        )
        for stream, prompt in ((s, p) for s in protocol.streams for p in protocol.prompts):  # each makes a config that a run accepts
            made = RunConfig(**run_config(spec, Cell("seqft", stream, prompt, 0, protocol=name), {"name": "seqft"}, 1e-4, tmp_path / "run", tmp_path))
            assert ("metric" in made.scorers) == name.startswith("trace")
        for tasks in protocol.streams.values():
            for task in tasks:
                suite, _, short = task.partition("/")
                assert suite in MODULES and short in __import__(f"forgetless.suites.{MODULES[suite]}", fromlist=["TASKS"]).TASKS

"""The demo's drawing process: what it makes of the JSON lines of its children, and what becomes of them. The children here are a line of Python each."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

from forgetless.config import load_config

ROOT = Path(__file__).resolve().parents[1]
TASKS = ["languages", "cities"]


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("forgetless_demo", ROOT / "examples" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


class Seen:
    """A display that remembers."""

    def __init__(self):
        self.stages, self.moves, self.texts = [], [], []

    def stage(self, lane):
        self.stages.append((lane.name, lane.stage, lane.learned))

    def moved(self, lane):
        self.moves.append((lane.done, lane.note))

    def say(self, text):
        self.texts.append(text)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def writes(*events: dict, then: str = "") -> list[str]:
    lines = "".join(json.dumps(event) + "\n" for event in events)
    return python(f"import sys, time; sys.stderr.write({lines!r}); sys.stderr.flush(); {then}")


def test_a_stage_says_how_many_tasks_are_learned_and_a_line_that_is_no_event_is_kept(demo):
    lane, seen = demo.Lane("gorp", [], TASKS), Seen()
    for line in (
        '{"stage": "cities: training", "total": 40}',
        '{"done": 3, "note": "loss 1.2"}',
        '{"say": "stage"}',
        "error: no room",
        "",
        "[1]",
        "17",
    ):
        lane.read(line + "\n", seen)
    assert seen.stages == [("gorp", "cities: training", 1)]  # resumed: languages was learned before
    assert seen.moves == [(3, "loss 1.2")] and lane.total == 40
    assert seen.texts == ["gorp: stage"]
    assert list(lane.said) == ["error: no room", "[1]", "17"]


def test_both_run_to_their_end(demo):
    training = {"stage": "languages: training", "total": 2}
    lanes, seen = [demo.Lane(name, writes(training, {"done": 2, "note": ""}), TASKS) for name in demo.METHODS], Seen()
    assert demo.follow(lanes, seen) is None
    for name in demo.METHODS:
        assert [stage for stage in seen.stages if stage[0] == name] == [(name, "languages: training", 0), (name, "finished", 2)]


def test_one_that_fails_is_named_with_its_words_and_the_other_is_stopped(demo):
    patient = demo.Lane("gorp", writes({"stage": "languages: training", "total": 2}, then="time.sleep(60)"), TASKS)
    broken = demo.Lane("seqft", python("import sys; print('error: no data', file=sys.stderr); sys.exit(4)"), TASKS)
    begun = time.monotonic()
    assert demo.follow([patient, broken], Seen()) is broken
    assert broken.process.returncode == 4 and list(broken.said) == ["error: no data"]
    assert patient.process.poll() is not None and time.monotonic() - begun < 30


def test_both_displays_take_every_call(demo):
    for display in (demo.Lines, demo.Bars):
        lanes = [demo.Lane(name, [], TASKS) for name in demo.METHODS]
        with display(lanes) as shown:
            for line in ('{"stage": "[b]: training", "total": 2}', '{"done": 1, "note": "[/b]"}', '{"say": "[/]"}'):
                lanes[0].read(line, shown)
            lanes[0].finish(shown)


def test_the_two_configs_differ_in_the_method_and_the_folder_alone():
    seqft, gorp = (load_config(ROOT / "examples" / "demo" / f"{name}.yaml").model_dump() for name in ("seqft", "gorp"))
    assert {key for key in seqft if seqft[key] != gorp[key]} == {"method", "output_dir"}
    assert (seqft["output_dir"], gorp["output_dir"]) == ("runs/demo/seqft", "runs/demo/gorp")


def test_the_comparison_is_a_line_a_method(demo):
    m = {"average_accuracy": 0.5, "backward_transfer": None, "learning_accuracy": 0.75}
    text = demo.comparison({"seqft": {"choice": m}, "gorp": {"choice": m | {"backward_transfer": 0.01}, "exact_match": m}})
    first, second = text.splitlines()
    assert first == "seqft  choice: average accuracy 50.0, backward transfer -, learning accuracy 75.0"
    assert second == f"gorp   {first[7:].replace('transfer -', 'transfer +1.0')}; {first[7:].replace('choice', 'exact match')}"

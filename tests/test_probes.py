"""Live probes: a curve a task while another trains, which training does not notice; an early end where the gate is bound to refuse. And how far the model has moved."""

from __future__ import annotations

import importlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model_folder, run_config, write_task
from test_distributed import torchrun
from torch import nn
from transformers import set_seed

import forgetless as fl
from forgetless import models, probes
from forgetless.batches import forward
from forgetless.checkpoint import Checkpoints
from forgetless.config import GateConfig, load_config
from forgetless.evaluation import drift_kl
from forgetless.evaluation.scorers import score_rows
from forgetless.methods import REGISTRY, get
from forgetless.methods.base import Memory
from forgetless.optim.released import ReleasedForward
from forgetless.probes import Probe, bound_to_fail, undisturbed
from forgetless.progress import Progress
from forgetless.tasks import TaskStream, load_task, sample

trainer = importlib.import_module("forgetless.trainer")
TRAIN = {"learning_rate": 1e-3, "max_steps": 6, "per_device_train_batch_size": 4, "bf16": False, "use_cpu": True}


class Said(Progress):
    def __init__(self):
        self.lines, self.notes = [], []

    def say(self, text):
        self.lines.append(text)

    def advance(self, done, note=""):
        self.notes.append((done, note))


class FakeGate:
    """What each task was answered when it was learned: every row right."""

    scorer = "choice"

    def scorer_of(self, task):
        return self.scorer

    def learned(self, task, index):
        return {example.row: 1.0 for example in task.test}

    untouched = lambda self, task: self.learned(task, 0)  # noqa: E731


def learn_two(model_folder, folder, method="seqft", probed=True, train=(), every=2, rows=6, checkpoints=None, **changes):
    """Two tasks learned by train_task as the loop does it. Returns (weights, the second task's log, its probe, what was said, a draw from each generator).

    checkpoints: a folder for the second task's, made every two steps, from the last of which it goes on where there is one.
    """
    method = {"name": method} if isinstance(method, str) else method
    config = load_config(run_config(model_folder, folder, method, ("colour", "animal")) | {"probes": {"every": every, "rows": rows}} | changes)
    for task in config.tasks:
        task.test = task.data  # 60 rows to look at
    stream = TaskStream([load_task(task) for task in config.tasks], [])
    model, tokenizer = models.load(model_folder)
    how, memory, said = get(config.method.name, **config.method.options), Memory(), Said()
    how.tokenizer, how.progress, how.stream, how.untouched = tokenizer, said, stream, lambda: models.load(model_folder)[0]
    how.committed, how.load = lambda name: model_folder, models.load
    for index, task in enumerate(stream):
        set_seed(index)
        saved = Checkpoints(checkpoints, 2, {}) if checkpoints and index else None
        model = how.resume_task(model, task, memory, saved.method_state()) if saved and saved.step else how.begin_task(model, task, memory)
        given = how.settings(TRAIN | dict(train), index)
        probe = Probe.of(config, tokenizer, stream, index, how, given, FakeGate(), said) if probed else None
        trained = trainer.train_task(
            model, tokenizer, task, how, how.train_data(task, memory), given, index, said, saved, config.precision, config.packing, probe=probe
        )
        trained.whole.close()
        steps = trained.steps
        model = how.end_task(model, task, memory)
        how.answering(model, task, task.test[:2], memory)
    tensors = {name: t.clone() for name, t in model.state_dict().items()} | {f"memory/{k}": t.clone() for k, t in memory.tensors.items()}
    return tensors, steps, probe, said, (random.random(), np.random.rand(), float(torch.rand(())))


# -- what is looked at -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def looked(tiny, tmp_path_factory):
    return learn_two(tiny, tmp_path_factory.mktemp("looked"))


def test_a_look_before_the_first_step_and_after_every_kth_at_the_earlier_tasks_and_the_new_one(looked):
    _, steps, probe, _, _ = looked
    noted = probe.noted([dict(step) for step in steps])
    assert [look["step"] for look in noted["probes"]] == [0, 2, 4, 6] and noted["probe_rows"] == {"colour": 6, "animal": 6}
    for look in noted["probes"]:
        assert list(look["scores"]) == ["colour", "animal"] and all(set(v) == {"choice", "exact_match"} for v in look["scores"].values())
    assert "stopped_at" not in noted


def test_the_last_look_is_what_evaluation_says_of_the_same_rows_and_they_are_among_the_matrix_cells(looked, tiny):
    weights, steps, probe, _, _ = looked
    model, tokenizer = models.load(tiny)
    model.load_state_dict(weights)
    for task, rows in probe.sets:
        assert sorted(rows, key=lambda x: x.row) == sample(task.test, 6, 0) and {x.row for x in rows} < {x.row for x in sample(task.test, 8, 0)}
        found = score_rows(model, tokenizer, task, rows, ["choice", "exact_match"])
        for scorer, value in steps[-1]["probe"][-1]["scores"][task.name].items():
            assert value == pytest.approx(sum(p.score(scorer) for p in found) / 6)


def test_noted_takes_the_looks_out_of_the_log(looked):
    _, steps, probe, _, _ = looked
    log = [dict(step) for step in steps]
    assert "probe" in log[0]  # the look before the first step travels with it
    probe.noted(log)
    assert all(set(step) == {"step", "loss", "learning_rate", "update_leak"} for step in log)


def test_progress_says_what_is_probed_and_what_came_of_it(looked):
    notes = [note for _, note in looked[3].notes]
    assert "probing, 12 of 12 rows" in notes and any(note.startswith("probed: colour 0.") and "animal" in note for note in notes)


def test_watch_sets_are_probed_and_missing_tasks_are_not(tiny, tmp_path):
    config = run_config(tiny, tmp_path, "seqft", ("colour", "animal"))
    mood = write_task(tmp_path / "data", "mood")
    config |= {"watch": [{"name": "mood", "data": mood["test"], "labels": mood["labels"]}], "probes": {"every": 1, "rows": 3}}
    config = load_config(config)
    tasks, watch = [load_task(t) for t in config.tasks], [load_task(t, watch=True) for t in config.watch]
    of = lambda stream: Probe.of(config, None, stream, 1, get("seqft"), TRAIN, FakeGate(), Progress())  # noqa: E731
    assert {task.name: len(rows) for task, rows in of(TaskStream(tasks, watch)).sets} == {"colour": 3, "animal": 3, "mood": 3}
    tasks[0].missing = "gone"
    assert [task.name for task, _ in of(TaskStream(tasks, watch)).sets] == ["animal", "mood"]
    config.probes.every = None
    assert of(TaskStream(tasks, watch)) is None


@pytest.mark.parametrize(
    ("method", "sets"), [("routed", ["animal"]), ("prompt", ["animal"]), ("per_task", ["animal"]), ("gainlora", None), ("lora", ["colour", "animal"])]
)
def test_of_a_method_that_leaves_several_models_the_new_task_alone_is_probed(method, sets, tiny, tmp_path):
    config = load_config(run_config(tiny, tmp_path, method, ("colour", "animal")) | {"probes": {"every": 1}})
    stream, said = TaskStream([load_task(t) for t in config.tasks], []), Said()
    probe = Probe.of(config, None, stream, 1, get(method), TRAIN, FakeGate(), said)
    assert (probe and [task.name for task, _ in probe.sets]) == sets
    assert bool(said.lines) == (sets is None)  # what is asked for and not done is said


# -- training does not notice ------------------------------------------------------------------------------------------------------------


def same(a, b):
    assert a[0].keys() == b[0].keys()
    for name, tensor in a[0].items():
        assert torch.equal(tensor, b[0][name]), name
    assert a[4] == b[4]  # torch, numpy and Python draw what they would have drawn
    assert [step["loss"] for step in a[1]] == [step["loss"] for step in b[1]]


CASES = {
    "dropout": (dict(method="seqft"), "dropout"),
    "lora_dropout": (dict(method="lora"), None),
    "accumulation": (dict(method="gorp", train={"gradient_accumulation_steps": 2}), None),
    "bf16": (dict(method="seqft", train={"bf16": True}), "dropout"),
    "checkpointing": (dict(method="lora", train={"gradient_checkpointing": True}), None),
    "released": (dict(method={"name": "osft", "protect": "weights"}), None),
    "released, rank": (dict(method={"name": "gorp", "rank": 4, "release_gradients": True}), None),
    "packing": (dict(method="lora", packing=True), None),
}


@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_the_same_bit_for_bit_as_without_probes(case, tiny, tmp_path, tmp_path_factory):
    given, dropout = CASES[case]
    folder = tiny
    if dropout:
        folder = make_model_folder(tmp_path / "model")
        config = json.loads((tmp_path / "model/config.json").read_text())
        (tmp_path / "model/config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}))
    same(learn_two(folder, tmp_path / "a", every=1, **given), learn_two(folder, tmp_path / "b", probed=False, **given))


QUICK = {"seqft", "gorp", "osft", "lora", "ewc", "replay", "prompt"}  # one of each way of training; the others in make test-all


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(REGISTRY)])
def test_of_every_method_too(name, tiny, tmp_path):
    same(learn_two(tiny, tmp_path / "a", name), learn_two(tiny, tmp_path / "b", name, probed=False))


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_and_of_every_kind_of_model(kind, tmp_path):
    folder = make_model_folder(tmp_path / "model", kind=kind)  # both have dropout in them
    same(learn_two(folder, tmp_path / "a", every=1), learn_two(folder, tmp_path / "b", probed=False))


def test_undisturbed_gives_back_random_states_modes_and_forwards():
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2)).train()
    model[0].eval()  # a method may keep a part of a training model still
    released = model[1].forward = ReleasedForward(model[1], {}, model)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with pytest.raises(KeyError), undisturbed(model):
        model.train()
        random.random(), np.random.rand(), torch.rand(3)
        del model[1].forward
        raise KeyError
    assert [m.training for m in model.modules()] == [True, False, True] and model[1].forward is released
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1] and torch.equal(torch.get_rng_state(), before[2])


# -- killed and resumed, and two processes -----------------------------------------------------------------------------------------------


class Killed(BaseException): ...


def killed_in(step, monkeypatch):
    """From now on the Trainer dies at this step of a task, after its checkpoint, if it makes one."""
    real = trainer.answer_loss
    calls = []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6 + step + 1:  # six steps are the first task's
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(trainer, "answer_loss", dies)


@pytest.mark.parametrize("every", [1, 3])
def test_a_killed_and_resumed_task_has_the_looks_of_one_that_was_not(every, tiny, tmp_path, monkeypatch):
    given = dict(method="lora", every=every)
    whole = learn_two(tiny, tmp_path / "a", checkpoints=tmp_path / "whole", **given)
    with monkeypatch.context() as patch:
        killed_in(3, patch)
        with pytest.raises(Killed):
            learn_two(tiny, tmp_path / "b", checkpoints=tmp_path / "killed", **given)
    assert Checkpoints(tmp_path / "killed", 2, {}).step == 2
    again = learn_two(tiny, tmp_path / "b", checkpoints=tmp_path / "killed", **given)
    same(whole, again)
    assert whole[2].noted(whole[1]) == again[2].noted(again[1]) and whole[1] == again[1]


def test_a_task_that_was_ended_early_is_not_trained_on_when_it_is_resumed(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "bound_to_fail", lambda gate, scorer, before, tasks, watch, now, k: "much" if k >= 3 else None)
    first = stopping(tiny, tmp_path, checkpoints=tmp_path / "saved")
    assert first[1][-1]["step"] == 4 and Checkpoints(tmp_path / "saved", 2, {}).trained
    again = stopping(tiny, tmp_path, checkpoints=tmp_path / "saved")
    assert again[1] == first[1] and again[2].noted(again[1])["stopped_at"] == 4
    for name, tensor in first[0].items():
        assert torch.equal(tensor, again[0][name])


TWO = """
import os, sys
from pathlib import Path
sys.path.insert(0, {here!r})
import torch
from test_probes import learn_two
import forgetless.probes as probes
from forgetless import distributed
folder = Path({folder!r}) / os.environ["RANK"]
found, scored = [], []
real = probes.score_rows
probes.score_rows = lambda model, tokenizer, task, rows, *args, **given: scored.append(len(rows)) or real(model, tokenizer, task, rows, *args, **given)
for probed in (True, False):
    weights, steps, probe, said, drawn = learn_two({tiny!r}, folder / str(probed), "lora", probed=probed, rows=5)
    found.append([weights, [s["loss"] for s in steps], probe.noted(steps) if probe else None, list(drawn), scored])
assert distributed.world_size() == 2
torch.save(found, folder / "found.pt")
distributed.leave_at_exit()
"""


@pytest.mark.slow
def test_two_processes_share_the_rows_agree_on_every_score_and_train_as_without(tiny, tmp_path):
    (tmp_path / "two.py").write_text(TWO.format(here=str(Path(__file__).parent), folder=str(tmp_path), tiny=tiny))
    done = torchrun(str(tmp_path / "two.py"))
    assert done.returncode == 0, done.stderr[-2000:]
    one, other = (torch.load(tmp_path / rank / "found.pt", weights_only=True) for rank in "01")
    for probed, plain in (one, other):
        assert all(torch.equal(W, plain[0][name]) for name, W in probed[0].items())
        assert probed[1] == plain[1] and probed[3] == plain[3]
    noted = one[0][2]
    assert noted == other[0][2] and noted["probe_rows"] == {"colour": 5, "animal": 5}
    # 4 looks at the first task alone and 4 at both, 5 rows a set: the first process has 3 of them, the second 2
    assert (one[0][4], other[0][4]) == ([3] * 12, [2] * 12)
    model, tokenizer = models.load(tiny)
    model.load_state_dict({name: W for name, W in one[0][0].items() if not name.startswith("memory/")})
    config = load_config(run_config(tiny, tmp_path / "c", "lora", ("colour", "animal")))
    for entry in config.tasks:  # all five rows of each, whoever scored them
        entry.test = entry.data
        task = load_task(entry)
        found = score_rows(model, tokenizer, task, sample(task.test, 5, 0), ["choice", "exact_match"])
        assert noted["probes"][-1]["scores"][task.name] == pytest.approx({s: sum(p.score(s) for p in found) / 5 for s in ("choice", "exact_match")})


def test_a_run_that_was_killed_and_goes_on_has_the_same_probes_to_the_byte(small_run, tmp_path, monkeypatch):
    """Through fl.run; and without probes it is the same model."""
    config = small_run("gorp", tasks=("colour", "animal"), probes={"every": 2, "rows": 4}, checkpoint_every=2)
    whole = fl.run(config)
    plain = fl.run({key: value for key, value in config.items() if key != "probes"} | {"output_dir": str(tmp_path / "plain")})
    config["output_dir"] = str(tmp_path / "killed")
    with monkeypatch.context() as patch:
        killed_in(3, patch)
        with pytest.raises(Killed):
            fl.run(config)
    killed = fl.run(config)
    ours, theirs = ((run.path / "tasks/01-animal/metrics.json").read_bytes() for run in (whole, killed))
    assert ours == theirs and json.loads(ours)["probe_rows"] == {"colour": 4, "animal": 4}
    assert [look["step"] for look in json.loads(ours)["probes"]] == [0, 2, 4, 6]
    assert not any("probe" in step for step in json.loads(ours)["steps"])
    assert "probes" not in json.loads((plain.path / "tasks/01-animal/metrics.json").read_text())
    hashes = [json.loads((run.path / "lineage.jsonl").read_text().splitlines()[-1])["model_sha256"] for run in (whole, killed, plain)]
    assert len(set(hashes)) == 1


# -- an early end ------------------------------------------------------------------------------------------------------------------------


def stopping(tiny, tmp_path, monkeypatch=None, **changes):
    changes = {"gate": {"max_worst_task": 0.02}, "probes": {"every": 1, "rows": 48, "stop": True}} | changes
    return learn_two(tiny, tmp_path, train={"learning_rate": 3e-2, "max_steps": 20}, **changes)


def test_training_ends_at_the_second_look_in_a_row_that_says_the_gate_must_refuse(tiny, tmp_path, monkeypatch):
    _, steps, probe, said, _ = stopping(tiny, tmp_path)
    noted = probe.noted(steps)
    assert noted["stopped_at"] == steps[-1]["step"] == noted["probes"][-1]["step"] < 20
    assert [set(look) for look in noted["probes"]] == [{"step", "scores"}] * len(noted["probes"])
    assert any("bound to refuse" in line and "colour lost" in line and "max_worst_task" in line for line in said.lines)
    # and not at the first: one look may be a step astray
    calls = iter([None, "much", None, "much", "much"])
    monkeypatch.setattr(probes, "bound_to_fail", lambda gate, scorer, before, tasks, *_: next(calls, None) if tasks else None)
    assert stopping(tiny, tmp_path)[1][-1]["step"] == 5


def test_without_stop_or_where_the_limit_is_kept_it_is_trained_to_its_end(tiny, tmp_path):
    assert len(stopping(tiny, tmp_path, probes={"every": 1, "rows": 48})[1]) == 20
    assert len(stopping(tiny, tmp_path, gate={"max_worst_task": 1.0})[1]) == 20


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"method": "merge"}, "method merge writes the weights anew"), ({"method": "per_task"}, "by what it left of them"),
     ({"method": {"name": "lines", "on": "gorp"}}, "method lines writes the weights anew"), ({"method": "mtl"}, "begins at the untouched model"),
     ({"method": {"name": "replay", "mode": "consolidation"}}, "learns the old rows last")],
)  # fmt: skip
def test_what_binds_no_gate_stops_nothing_and_is_said(changes, why, tiny, tmp_path):
    _, steps, _, said, _ = stopping(tiny, tmp_path, **changes)
    assert len(steps) >= 20 and any(why in line for line in said.lines)  # mtl takes more


def test_replay_that_mixes_its_rows_may_be_stopped(tiny, tmp_path):
    config = load_config(run_config(tiny, tmp_path, "replay", ("colour",)) | {"gate": {"max_worst_task": 0.02}})
    how = get("replay")
    assert probes.not_to_be_stopped(config, how, [how]) == ""


def rows(*values):
    return dict(enumerate(values))


def test_what_the_gate_is_bound_to_refuse():
    gate = GateConfig(max_worst_task=0.02, max_general_drop=0.3, min_new_task=0.9, max_drift_kl=0.1)  # of the last two nothing is known yet
    before = {"a": rows(*[1.0] * 32), "b": rows(*[1.0] * 32), "w": rows(*[1.0] * 32)}
    judge = lambda now, k=1, gate=gate, before=before: bound_to_fail(gate, "choice", before, ["a", "b"], ["w"], now | {"new": rows(0.0)}, k)  # noqa: E731
    kept, gone, some = rows(*[1.0] * 32), rows(*[0.0] * 32), rows(*[1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0] * 4)
    assert judge({"a": kept, "b": kept, "w": kept}) is None
    assert all(said in judge({"a": gone, "b": kept, "w": kept}) for said in ("a lost 100.0 points", "32 rows", "max_worst_task"))
    assert all(said in judge({"a": kept, "b": kept, "w": gone}) for said in ("w lost 100.0 points", "32 rows", "max_general_drop"))
    assert ";" not in judge({"a": gone, "b": kept, "w": kept})  # of the one that is broken alone
    assert judge({"a": some, "b": kept, "w": kept}) is None  # four of 32 do not suffice
    assert judge({"a": gone, "b": kept, "w": kept}, k=10_000) is None  # the ten thousandth look asks for more than 32 rows have
    mean = GateConfig(max_forgetting=0.1)
    assert "the earlier tasks together lost 100.0" in judge({"a": gone, "b": gone, "w": kept}, gate=mean)
    assert "lost 50.0" in judge({"a": gone, "b": kept, "w": kept}, gate=mean)
    only_a = {"a": before["a"], "b": {}, "w": {}}
    assert judge({"a": gone, "b": gone, "w": gone}, gate=mean, before=only_a) is None  # of a mean all its parts are needed
    assert judge({"a": gone, "b": gone, "w": gone}, before=only_a).startswith("a lost") and "b lost" not in judge(
        {"a": gone, "b": gone, "w": gone}, before=only_a
    )
    few = {"a": rows(*[1.0] * 4), "b": {}, "w": {}}  # compared with what there is
    assert judge({"a": gone, "b": gone, "w": gone}, before=few) is None


@pytest.mark.slow
def test_the_chance_to_stop_a_model_that_keeps_the_limit_is_at_most_alpha():
    """The worst cases at the limit: rows that are lost often and gained nearly as often, and rows that are hardly ever lost. 3 tasks, 5 looks, each at a fresh model."""
    generator = np.random.default_rng(0)
    gate, names = GateConfig(max_worst_task=0.05), ["a", "b", "c"]
    for lost, gained in ((0.05, 0.0), (0.3, 0.25), (0.525, 0.475)):
        stopped = 0
        for _ in range(100):
            for k in range(1, 6):
                d = generator.choice([-1, 1, 0], p=[gained, lost, 1 - lost - gained], size=(3, 24))
                before, now = ({n: rows(*(0.5 + sign * x / 2)) for n, x in zip(names, d, strict=True)} for sign in (1, -1))
                if bound_to_fail(gate, "choice", before, names, [], now, k):
                    stopped += 1
                    break
        assert stopped / 100 <= gate.alpha


# -- drift -------------------------------------------------------------------------------------------------------------------------------


def test_divergence_is_the_mean_log_ratio_under_the_model_before():
    p, q = torch.tensor([[0.7, 0.2, 0.1], [1 / 3] * 3]), torch.tensor([[0.1, 0.2, 0.7], [1 / 3] * 3])
    expected = [float((a * (a / b).log()).sum()) for a, b in zip(p, q, strict=True)]
    assert drift_kl.divergence(p.log(), q.log()).tolist() == pytest.approx(expected, abs=1e-7)
    assert torch.all(drift_kl.divergence(q.log(), q.log()) == 0)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_every_position_of_a_prompt_foretells_the_token_after_it(kind, tmp_path, monkeypatch):
    model, tokenizer = models.load(make_model_folder(tmp_path / "model", kind=kind))
    model.train()
    ids = tokenizer("Text : cat red apple Answer :").input_ids
    found = drift_kl.log_probabilities(model, ids)
    assert model.training and found.exp().sum(-1).tolist() == pytest.approx([1.0] * len(found), abs=1e-5)
    model.eval()
    batch = {"input_ids": torch.tensor([ids])} | ({"decoder_input_ids": torch.tensor([[0]])} if kind == "t5" else {})
    plain = forward(model, batch).logits[0].log_softmax(-1)
    assert len(found) == (1 if kind == "t5" else len(ids))
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=0)
    monkeypatch.setattr(drift_kl, "POSITIONS", 3)  # bounded: the last ones
    torch.testing.assert_close(drift_kl.log_probabilities(model, ids), plain[-3:], atol=1e-5, rtol=0)
    monkeypatch.setattr(drift_kl, "forward", lambda model, batch, logits_to_keep: forward(model, batch))  # a model that gives them all
    torch.testing.assert_close(drift_kl.log_probabilities(model, ids), plain[-3:], atol=1e-5, rtol=0)


class Folder:
    """Of a run that has committed models at these places."""

    def __init__(self, path, done):
        self.path, self.done = path, done

    def committed(self):
        return self.done

    def memory(self, name):
        return Memory()


@pytest.fixture
def moved(tiny, tmp_path):
    """(measure(model, done), the task): drift of a model, with or without a task committed before it."""
    config = load_config(run_config(tiny, tmp_path, "seqft", ("colour",)))
    task, method = load_task(config.tasks[0]), get("seqft")
    base, tokenizer = models.load(tiny)
    other = models.load(make_model_folder(tmp_path / "run/tasks/00-a/model", seed=1))[0]
    method.untouched, method.load = lambda: models.load(tiny)[0], models.load
    said = Said()

    def measure(model, done):
        return drift_kl.measure(
            model, tokenizer, task, Folder(tmp_path / "run", ["00-a"] if done else []), config, False, said, method, Memory()
        ), said

    return measure, task, base, other, tokenizer


def test_a_model_that_was_not_moved_has_no_drift(moved):
    measure, task, base, other, _ = moved
    found, _ = measure(base, done=False)
    assert found.noted() == {"kl": 0.0, "base_kl": 0.0, "prompts": 12, "tokens": found.tokens} and found.tokens > 12
    found, said = measure(other, done=True)
    assert found.noted()["kl"] == 0.0 and found.noted()["base_kl"] > 0.01
    assert max(done for done, _ in said.notes) == 24  # both comparisons are on the bar


def test_drift_is_from_the_last_committed_model_and_from_the_pretrained_one_row_by_row(moved):
    measure, task, base, other, tokenizer = moved
    tuned = models.load(other.name_or_path)[0]
    with torch.no_grad():
        tuned.lm_head.weight.mul_(1.5)
    found, _ = measure(tuned, done=True)
    for kls, before in ((found.prompts, other), (found.base, base)):
        assert len(kls) == 12
        for row, kl in zip(sample(task.test, drift_kl.PROMPTS, 0), kls, strict=True):
            ids = task.encode_prompt(tokenizer, row)
            p, q = (drift_kl.log_probabilities(m, ids).double() for m in (before, tuned))
            assert kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4) and kl > 1e-3
    assert found.noted()["kl"] == pytest.approx(sum(found.prompts) / 12)


def test_a_pretrained_model_that_is_gone_leaves_base_kl_open(moved, caplog):
    from forgetless.errors import DataError

    measure, *_, other, _ = moved
    method = next(cell.cell_contents for cell in measure.__closure__ if hasattr(cell.cell_contents, "untouched"))

    def gone():
        raise DataError("the folder is gone")

    method.untouched = gone
    found, _ = measure(other, done=True)
    assert found.noted()["kl"] == 0.0 and found.noted()["base_kl"] is None and "the folder is gone" in caplog.text


@pytest.mark.parametrize("name", ["routed", "prompt", "gainlora", "per_task"])
def test_of_a_method_that_leaves_several_models_it_is_the_one_that_answers_each_row(name, tiny, tmp_path):
    """Their model/ is the same before and after (per_task's is not), and what was learned is in memory: drift would be 0 if that were not asked."""
    config = load_config(run_config(tiny, tmp_path, name, ("colour",)) | {"train": TRAIN | {"learning_rate": 1e-2}})
    task, how, memory = load_task(config.tasks[0]), get(name), Memory()
    model, tokenizer = models.load(tiny)
    how.tokenizer, how.stream, how.untouched, how.load = tokenizer, TaskStream([task], []), lambda: models.load(tiny)[0], models.load
    how.committed = lambda name: tiny
    model = how.begin_task(model, task, memory)
    trainer.train_task(model, tokenizer, task, how, how.train_data(task, memory), config.train, 0, Progress()).whole.close()
    model = how.end_task(model, task, memory)
    found = drift_kl.measure(model, tokenizer, task, Folder(tmp_path, []), config, False, Progress(), how, memory)
    assert found.noted()["kl"] > 1e-5

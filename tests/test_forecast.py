"""The forecast before training: the share of a new task's gradients that lies where earlier tasks' inputs do, and what the run's own past makes of it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from conftest import make_model_folder, run_config
from test_probes import Said

from forgetless import forecast, models
from forgetless.config import load_config
from forgetless.evaluation.drift import record_inputs
from forgetless.forecast import expected, leading_directions, line, overlap, pairs
from forgetless.methods import get
from forgetless.methods._statistics import encoded, row_gradients
from forgetless.methods.base import Memory
from forgetless.models import linear_modules, logical
from forgetless.subspace import Subspace
from forgetless.tasks import TaskStream, load_task


@pytest.fixture
def two(tiny, tmp_path):
    """(config, stream) of two tasks."""
    config = load_config(run_config(tiny, tmp_path, "seqft", ("colour", "animal")))
    return config, TaskStream([load_task(task) for task in config.tasks], [])


class Folder:
    """Of a run that has committed these: name: (recorded inputs, metrics)."""

    def __init__(self, commits):
        self.commits = commits

    def committed(self):
        return list(self.commits)

    def recorded(self, name):
        return self.commits[name][0]

    def metrics(self, name):
        return self.commits[name][1]


METRICS = {"task": "colour", "scores": {"choice": [0.5, None]}}


# -- the overlap -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_the_share_is_that_of_the_gradients_themselves(kind, two, tmp_path):
    """Against row_gradients, which forms each G: sum ||G V||^2 / sum ||G||^2 over rows and layers."""
    config, stream = two
    model, tokenizer = models.load(make_model_folder(tmp_path / "model", kind=kind))
    rows = encoded(tokenizer, stream[1], 5)
    layers = linear_modules(model)
    torch.manual_seed(0)
    spaces = {
        "some": {name: torch.linalg.qr(torch.randn(logical(m.weight, m).shape[1], 3))[0] for name, m in layers.items()},
        "one": {name: torch.linalg.qr(torch.randn(logical(m.weight, m).shape[1], 7))[0] for name, m in list(layers.items())[2:3]},
        "all": {name: torch.eye(logical(m.weight, m).shape[1]) for name, m in layers.items()},
    }
    inside, whole = dict.fromkeys(spaces, 0.0), dict.fromkeys(spaces, 0.0)
    for gradients in row_gradients(model, rows, [f"{name}.weight" for name in layers]):
        for key, space in spaces.items():
            for name, V in space.items():
                G = logical(gradients[f"{name}.weight"], layers[name])
                inside[key] += float((G @ V).square().sum())
                whole[key] += float(G.square().sum())
    found = overlap(model, rows, spaces)
    assert found == pytest.approx({key: inside[key] / whole[key] for key in spaces}, rel=1e-4)
    assert found["all"] == pytest.approx(1.0, abs=1e-5) and 0 < found["some"] < 1


def test_a_new_task_that_reads_what_an_old_one_read_lies_in_it_and_one_that_reads_nothing_of_it_does_not(two, tiny):
    config, stream = two
    model, tokenizer = models.load(tiny)
    rows = encoded(tokenizer, stream[1], 4)
    seen: dict[str, list] = {}
    handles = [
        m.register_forward_pre_hook(lambda m, a, n=n: seen.setdefault(n, []).append(a[0].detach().flatten(0, -2)))
        for n, m in linear_modules(model).items()
    ]
    for row in rows:
        model(input_ids=torch.tensor([row["input_ids"]]))
    for handle in handles:
        handle.remove()
    own = {name: torch.linalg.svd(torch.cat(X), full_matrices=True)[2].mT for name, X in seen.items()}
    ranks = {name: int(torch.linalg.matrix_rank(torch.cat(X), rtol=1e-5)) for name, X in seen.items()}
    spaces = {"read": {n: V[:, : ranks[n]] for n, V in own.items()}, "never": {n: V[:, ranks[n] :] for n, V in own.items() if ranks[n] < len(V)}}
    found = overlap(model, rows, {key: space for key, space in spaces.items() if space})
    assert found["read"] == pytest.approx(1.0, abs=1e-4) and found.get("never", 0.0) < 1e-4


def test_leading_directions_hold_nine_tenths_of_the_inputs_each_of_length_one():
    torch.manual_seed(0)
    huge = 1e4 * torch.eye(12)[:1]  # one token beside which all others are nothing
    X = torch.cat([huge, torch.randn(31, 4) @ torch.eye(12)[4:8]]).to(torch.bfloat16)
    V = leading_directions({"a.x": X, "a.y": torch.zeros(32, 5)})
    assert list(V) == ["a"] and V["a"].shape[1] in (3, 4)
    unit = torch.nn.functional.normalize(X.float(), dim=1)
    assert float((unit @ V["a"]).square().sum() / unit.square().sum()) >= 0.9
    torch.testing.assert_close(V["a"].mT @ V["a"], torch.eye(V["a"].shape[1]), atol=1e-5, rtol=0)


def test_the_model_and_all_random_states_are_left_as_they_were(two, tiny):
    config, stream = two
    model, tokenizer = models.load(tiny)
    model.train()
    model.lm_head.requires_grad_(False)
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    folder = Folder({"00-colour": (record_inputs(model, tokenizer, stream[0], 0), METRICS)})
    found = [forecast.forecast(model, tokenizer, stream, 1, folder, config, get("seqft"), Memory(), Said()) for _ in range(2)]
    assert found[0] == found[1]  # and the same whenever it is asked
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2] and torch.equal(torch.get_rng_state(), states[2])
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())
    assert not model.lm_head.weight.requires_grad and model.model.norm.weight.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# -- the block of metrics.json -----------------------------------------------------------------------------------------------------------


def test_it_names_each_earlier_task_and_shows_progress(two, tiny):
    config, stream = two
    model, tokenizer = models.load(tiny)
    said = Said()

    def ask(index, commits, memory=None, method="seqft"):
        return forecast.forecast(model, tokenizer, stream, index, Folder(commits), config, get(method), memory or Memory(), said)

    assert ask(0, {}) is None  # nothing is remembered yet
    found = ask(1, {"00-colour": (record_inputs(model, tokenizer, stream[0], 0), METRICS)})
    assert list(found["overlap"]) == ["colour"] and 0.2 < found["overlap"]["colour"] <= 1 and found["expected_forgetting"] is None
    assert max(done for done, _ in said.notes) == forecast.ROWS
    # store: nothing: what the method protects, as a whole
    assert ask(1, {"00-colour": ({}, METRICS)}) is None
    memory = Memory()
    memory.keep({name: Subspace(torch.eye(m.in_features)[:, :2], torch.ones(2)) for name, m in linear_modules(model).items()})
    found = ask(1, {"00-colour": ({}, METRICS)}, memory, "gpm")
    assert list(found["overlap"]) == ["protected"] and 0 < found["overlap"]["protected"] < 1


def history(*shares, slope=0.5, level=0.1):
    """Metrics of a run of len(shares) + 1 tasks: the i-th entry's forecasts, and drops that lie on a line."""
    metrics, scores = [{"task": "t0", "scores": {"choice": [0.9]}}], [0.9]
    for i, overlaps in enumerate(shares, 1):
        scores = [a - level - slope * overlaps[j] for j, a in enumerate(scores)] + [0.9]
        metrics.append({"task": f"t{i}", "scores": {"choice": scores}, "forecast": {"overlap": {f"t{j}": x for j, x in enumerate(overlaps)}}})
    return metrics


def test_pairs_are_of_each_task_and_each_earlier_one():
    found = pairs(history([0.2], [0.4, 0.1]), "choice")
    assert found == [(0.2, pytest.approx(0.2)), (0.4, pytest.approx(0.3)), (0.1, pytest.approx(0.15))]
    assert pairs(history([0.2]), "exact_match") == []  # not measured
    whole = history([0.2])
    whole[1]["forecast"]["overlap"] = {"protected": 0.2}
    assert pairs(whole, "choice") == [] and pairs([{"task": "t0", "scores": {"choice": [None]}}, whole[1]], "choice") == []


def test_what_is_expected_is_on_the_line_through_the_runs_own_pairs():
    folder = lambda metrics: Folder({m["task"]: ({}, m) for m in metrics})  # noqa: E731
    six = history([0.2], [0.4, 0.1], [0.3, 0.6, 0.5])
    assert expected({"t0": 0.2, "t1": 0.6}, folder(six), "choice") == pytest.approx(0.1 + 0.5 * 0.4)
    assert expected({"t0": 0.2}, folder(history([0.2], [0.4, 0.1])), "choice") is None  # three pairs
    assert expected({"t0": 0.2}, folder(history([0.3], [0.3, 0.3], [0.3, 0.3, 0.3])), "choice") is None  # no line through one place
    assert line([(1.0, 2.0), (2.0, 2.0), (3.0, 5.0)]) == (pytest.approx(1.5), pytest.approx(0.0))

"""The gate's tests: the bets by hand and by enumeration, Holm's rule, what each limit is held to, what more rows are asked for, and what cannot be judged."""

from __future__ import annotations

import itertools
import json
import math
import warnings

import numpy as np
import pytest

from forgetless.config import GateConfig
from forgetless.evaluation import gate
from forgetless.evaluation.gate import BROKEN, KEPT, capital, judge, rows_needed, sentence

PLENTY = 10_000


@pytest.fixture(autouse=True)
def no_warning_from_numpy():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def pair(n: int, down: int = 0, up: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(before, now) of n rows, of which `down` are lost and `up` are gained, in a seeded order."""
    d = np.random.default_rng(0).permutation([1.0] * down + [-1.0] * up + [0.0] * (n - down - up))
    return np.where(d < 0, 0.0, 1.0), np.where(d > 0, 0.0, 1.0)


def verdict(earlier=None, watch=None, new=(1.0,) * 400, drift=None, available=None, **limits):
    earlier, watch = earlier or {}, watch or {}
    there = {name: len(p[0]) for name, p in (earlier | watch).items()} | {"new": len(new)} | (available or {})
    return judge(GateConfig(**limits), "choice", earlier, watch, "new", new, drift, there)


def found(v) -> dict[tuple[str, str | None], str]:
    return {(c.limit, c.name): c.outcome for c in v.criteria}


def flips(rng, share: float, drop: float, shape) -> np.ndarray:
    u = rng.random(shape)
    return np.where(u < (share + drop) / 2, 1.0, np.where(u < share, -1.0, 0.0))


class TestBets:
    def test_three_rows_by_hand(self):
        """Lost, unchanged, lost, of 100 rows, against E[d] <= 0 with margin 0.5 at level 0.05. The parts are 1/6, 1/3, 1/2.

        Largest bet 0.999: 1.999, 1.999, 3.996. Grid, one bet of 0.4995: 1.4995, 1.4995, 2.2485. Aimed at 40, half of the level: the stakes are
        sqrt(2 ln(40) / (1 * 100)) = 0.27162, then sqrt(2 ln(40 / 1.27162) / (1 * 99)) = 0.26395, then sqrt(2 ln(40 / 1.27162) / (2/3 * 98)) = 0.32491.
        """
        K = np.exp(capital(np.array([[1.0, 0.0, 1.0]]), 1.0, 0.5, 100, 0.05, KEPT))[0]
        assert K[0] == pytest.approx(1.999 / 6 + 1.4995 / 3 + 1.2716203 / 2)
        assert K[1] == pytest.approx(K[0])
        assert K[2] == pytest.approx(1.999**2 / 6 + 1.4995**2 / 3 + 1.2716203 * 1.3249138 / 2)

    @pytest.mark.parametrize("drop", [-0.3, 0.0, 0.25])
    @pytest.mark.parametrize("parts", [KEPT, BROKEN])
    def test_of_every_way_six_rows_can_go_the_mean_capital_is_one(self, drop, parts):
        """Over all 3^6 outcomes, with the limit at the true drop: 1 after each row, whatever one stops at. With a smaller drop: less."""
        paths = np.array(list(itertools.product([1.0, 0.0, -1.0], repeat=6)))
        chance = {1.0: 0.3 + drop / 2, 0.0: 0.4, -1.0: 0.3 - drop / 2}
        p = np.prod(np.vectorize(chance.get)(paths), 1)
        for x, loss in ((paths - drop, 1 + drop), (drop - paths, 1 - drop)):
            K = np.exp(capital(x, loss, 0.02, 8, 0.05, parts))
            assert p @ K == pytest.approx(np.ones(6), abs=1e-12)
            assert (p @ np.exp(capital(x - 0.01, loss + 0.01, 0.02, 8, 0.05, parts)) < 1).all()

    def test_of_every_way_eight_rows_can_go_few_ever_reach_the_level(self):
        paths = np.array(list(itertools.product([1.0, -1.0], repeat=8)))
        for level in (0.5, 0.2, 0.05):
            K = capital(paths, 1.0, 0.1, 8, level, KEPT)
            assert 0 < (K.max(1) >= -math.log(level)).mean() <= level

    def test_scores_of_any_kind_cannot_ruin_the_bettor_and_one_row_more_does_not_change_the_rows_before(self):
        x = np.random.default_rng(0).uniform(-1, 1, (3, 300))
        x[:, 7] = -1  # all that can be lost
        whole = capital(x, 1.0, 0.02, 400, 0.005, KEPT)
        assert np.isfinite(whole).all()
        assert np.array_equal(whole[:, :123], capital(x[:, :123], 1.0, 0.02, 400, 0.005, KEPT))

    def test_holm_by_hand(self):
        """Three hypotheses at 0.05: 60 for the largest capital, then 40, then 20."""
        outcomes = lambda *K: gate._outcomes([(math.log(kept), math.log(broken)) for kept, broken in K], 0.05, 0.05)  # noqa: E731
        assert outcomes((19, 1), (61, 1), (41, 1)) == ["undecided", "broken", "broken"]
        assert outcomes((21, 1), (61, 1), (41, 1)) == ["broken"] * 3
        assert outcomes((50, 1), (59, 1), (50, 1)) == ["undecided"] * 3  # the first to fail shields the rest
        assert outcomes((61, 30), (39, 21), (1, 19)) == ["broken", "keep", "undecided"]


class TestVerdicts:
    def test_a_model_that_changes_no_row_is_accepted_after_199_rows_of_10000(self):
        """No test can do with fewer than 149, as 0.98^148 > 0.05: so often would a model that loses 2 rows of 100 lose none."""
        outcome = lambda n: verdict({"a": pair(n)}, available={"a": PLENTY}, max_worst_task=0).outcome  # noqa: E731
        assert [outcome(n) for n in (1, 149, 198, 199, 200)] == ["undecided", "undecided", "undecided", "accept", "accept"]

    @pytest.mark.parametrize(("tasks", "rows"), [(1, 7), (10, 11), (100, 14)])
    def test_rows_that_are_all_lost_are_found_at_once_and_among_more_tasks_later(self, tasks, rows):
        """1.999^n / 6 reaches 20 at n = 6.9, 200 at 10.2 and 2,000 at 13.6; the other bets help a little."""
        others = {str(i): pair(1) for i in range(1, tasks)}
        for n, outcome in ((rows - 1, "undecided"), (rows, "reject")):
            assert verdict({"0": pair(n, down=n)} | others, available={"0": PLENTY}, max_worst_task=0).outcome == outcome

    def test_what_is_decided_stays_so_however_many_rows_follow(self):
        d = np.concatenate([np.ones(15), -np.ones(385)])  # lost at first, then gained
        before, now = np.maximum(d, 0), np.maximum(-d, 0)
        assert all(verdict({"a": (before[:n], now[:n])}, available={"a": 400}, max_worst_task=0).outcome == "reject" for n in (15, 30, 400))

    def test_between_the_limit_and_the_margin_it_is_undecided_and_asks_for_more_of_that_task_only(self):
        v = verdict({"a": pair(300, 6, 3), "b": pair(300)}, available={"a": 900, "b": 900}, max_worst_task=0)
        assert found(v) == {("max_worst_task", "a"): "undecided", ("max_worst_task", "b"): "keep"}
        assert (v.outcome, v.wanted) == ("undecided", {"a"})
        a, b = v.criteria
        assert (a.observed, a.rows, a.available, b.rows_to_decide) == (pytest.approx(0.01), 300, 900, None)
        assert a.rows_to_decide > 900

    def test_where_there_are_no_more_rows_none_are_asked_for(self):
        v = verdict({"a": pair(300, 6, 3)}, max_worst_task=0)
        assert (v.outcome, v.wanted) == ("undecided", frozenset())

    def test_one_broken_limit_rejects_and_ends_it(self):
        v = verdict({"a": pair(300, 100), "b": pair(300, 6, 3)}, available={"a": 900, "b": 900}, max_worst_task=0)
        assert (v.outcome, v.wanted) == ("reject", frozenset())
        assert found(v) == {("max_worst_task", "a"): "broken", ("max_worst_task", "b"): "undecided"}

    def test_a_wider_limit_lets_the_same_rows_pass(self):
        rows = {"a": pair(400, 40)}
        assert [verdict(rows, max_worst_task=limit).outcome for limit in (0, 0.04, 0.1, 0.2)] == ["reject", "reject", "undecided", "accept"]

    def test_a_wider_margin_needs_fewer_rows(self):
        assert [verdict({"a": pair(60)}, max_worst_task=0, margin=margin).outcome for margin in (0.02, 0.05, 0.1)] == [
            "undecided",
            "undecided",
            "accept",
        ]

    def test_the_mean_of_the_tasks_is_held_to_its_own_limit_on_the_rows_of_the_shortest(self):
        v = verdict({"a": pair(400, 40), "b": pair(200, 0, 20)}, available={"a": 400, "b": 500}, max_forgetting=0, margin=0.1)
        (c,) = v.criteria
        before, now = pair(400, 40)
        assert c.observed == pytest.approx(((before - now)[:200].mean() - 0.1) / 2)
        assert (c.limit, c.name, c.rows, c.available, c.outcome) == ("max_forgetting", None, 200, 400, "keep")
        v = verdict({"a": pair(60), "b": pair(40)}, available={"a": 400, "b": 500}, max_forgetting=0)
        assert v.wanted == {"b"}  # more of a would pair with nothing
        assert v.criteria[0].rows_to_decide < 1000  # of a mean of two tasks, for which fewer rows do

    def test_one_task_may_break_while_the_mean_does_not(self):
        tasks = {"bad": pair(400, 80)} | {str(i): pair(400) for i in range(9)}
        v = verdict(tasks, max_forgetting=0.1, max_worst_task=0.1, margin=0.05)
        assert found(v)["max_forgetting", None] == "keep"
        assert found(v)["max_worst_task", "bad"] == "broken"

    def test_among_ten_tasks_the_last_bet_is_aimed_at_what_ten_tasks_take(self):
        """120 rows lost and 80 gained of 1,000: a capital of 202, where 200 is enough. Aimed at what one task alone takes, it would have stopped at 31."""
        others = {str(i): pair(1) for i in range(9)}
        assert [verdict({"a": pair(1000, 120 - n, 80 + n)} | others, max_worst_task=0, margin=0.05).outcome for n in (0, 2)] == [
            "reject",
            "undecided",
        ]

    def test_a_watch_set_has_its_own_limit(self):
        v = verdict({"a": pair(300, 100)}, {"general": pair(300, 40)}, max_general_drop=0.02, max_worst_task=0.5)
        assert found(v) == {("max_worst_task", "a"): "keep", ("max_general_drop", "general"): "broken"}
        assert v.criteria[1].observed == pytest.approx(40 / 300)

    @pytest.mark.parametrize(("right", "outcome"), [(60, "broken"), (160, "undecided"), (195, "keep")])
    def test_the_new_task_must_score(self, right, outcome):
        v = (
            verdict(new=[1.0] * right + [0.0] * (200 - right), min_new_task=0.85)
            if right == 195
            else verdict(new=mixed(right, 200), min_new_task=0.85)
        )
        (c,) = v.criteria
        assert (c.limit, c.name, c.allowed, c.observed, c.outcome) == ("min_new_task", "new", 0.85, pytest.approx(right / 200), outcome)

    def test_where_95_of_100_must_be_right_two_wrong_answers_in_a_row_are_enough(self):
        """They have a chance of 0.0025 where the limit is kept, and one alone has 0.05."""
        assert [verdict(new=[0.0] * n, available={"new": 100}, min_new_task=0.95).outcome for n in (1, 2)] == ["undecided", "reject"]

    def test_the_drift_is_held_to_its_limit_and_is_no_test(self):
        for drift, outcome in ((0.2, "keep"), (0.21, "broken")):
            v = verdict({"a": pair(200)}, drift=drift, max_drift_kl=0.2, max_worst_task=0)
            assert found(v) == {("max_worst_task", "a"): "keep", ("max_drift_kl", None): outcome}
            assert v.outcome == ("accept" if outcome == "keep" else "reject")

    def test_the_first_task_has_only_its_own_score_to_keep(self):
        every = {"max_forgetting": 0.0, "max_worst_task": 0.0, "max_general_drop": 0.0}
        assert found(verdict(min_new_task=0.5, **every)) == {("min_new_task", "new"): "keep"}
        v = verdict(**every)
        assert (v.outcome, v.criteria, v.wanted) == ("accept", (), frozenset())

    def test_limits_at_the_ends(self):
        assert verdict({"a": pair(10, 10)}, max_worst_task=1).outcome == "accept"  # nothing can lose more
        assert verdict({"a": pair(10, 10)}, max_worst_task=0.99, margin=0.02).outcome == "accept"
        assert verdict(new=mixed(300, 400), min_new_task=1).outcome == "reject"
        assert verdict(new=[0.0] * 400, min_new_task=0).outcome == "accept"

    def test_scores_that_are_no_yes_or_no(self):
        rng = np.random.default_rng(1)
        before = rng.uniform(0.3, 0.9, 400)
        for lost, outcome in ((0.0, "accept"), (0.1, "reject")):
            now = np.clip(before - lost + rng.normal(0, 0.05, 400), 0, 1)
            assert verdict({"a": (before, now)}, max_worst_task=0.02, margin=0.05).outcome == outcome

    def test_what_is_written_of_it(self):
        v = verdict({"a": pair(300, 100), "b": pair(300, 6, 3)}, drift=0.5, max_worst_task=0, max_drift_kl=1, min_new_task=0.5)
        content = json.loads(json.dumps(v.content()))
        assert list(content) == ["outcome", "scorer", "alpha", "beta", "margin", "criteria"]
        assert list(content["criteria"][0]) == ["limit", "name", "allowed", "observed", "rows", "available", "outcome", "rows_to_decide"]
        a, b, new, drift = map(sentence, content["criteria"])
        assert a == "a lost 33.3 points on 300 rows (max_worst_task allows 0)"
        assert b.startswith("b lost 1.0 points on 300 rows (max_worst_task allows 0), too few to tell: about ") and b.endswith(", there are 300")
        assert new == "new has 100.0 points on 400 rows (min_new_task asks for 50)"
        assert drift == "the model moved by 0.5 nats on the new task's prompts (max_drift_kl allows 1)"


class TestRows:
    def test_rows_needed_by_hand(self):
        """10 % of the rows flip, one task: 1.16 * 0.1 * (1.960 + 1.645)^2 / 0.02^2 = 3,769; 1.05 * 0.1 * (2.128 + 1.645)^2 / 0.02^2 + 1.5 ln(60) / 0.02 = 4,044."""
        assert rows_needed(0.1, 0.02, 1) == 4044
        assert rows_needed(0.1, 0.02, 10) == math.ceil(1.16 * 0.1 * (2.8070338 + 1.6448536) ** 2 / 0.02**2) == 5748

    def test_more_flips_and_tasks_need_more_rows_and_a_wider_margin_fewer(self):
        assert rows_needed(0.05, 0.02, 10) < rows_needed(0.1, 0.02, 10) < rows_needed(0.1, 0.02, 40)
        assert rows_needed(0.1, 0.05, 10) < rows_needed(0.1, 0.02, 10) / 6
        assert rows_needed(0.0, 0.02, 10) == rows_needed(0.0196, 0.02, 10)  # a drop of 2 points takes 2 % of flips

    def test_rows_to_decide_are_those_of_the_flips_seen(self):
        few, many = (verdict({"a": pair(200, n, n)}, max_worst_task=0).criteria[0].rows_to_decide for n in (5, 20))
        assert rows_needed(0.05, 0.02, 1) < few < 1.5 * rows_needed(0.05, 0.02, 1)
        assert rows_needed(0.2, 0.02, 1) < many < 1.3 * rows_needed(0.2, 0.02, 1)

    def test_where_the_rows_it_named_did_not_decide_the_next_are_for_half_the_margin(self):
        rows = tuple(np.tile(side, 7) for side in pair(1000, 60, 50))
        c = verdict({"a": rows} | {str(i): pair(1) for i in range(9)}, max_worst_task=0, beta=0.01).criteria[0]
        named = rows_needed(0.11, 0.02, 10, beta=0.01)
        assert c.outcome == "undecided"
        assert named < 7000 < c.rows_to_decide < 4.4 * named

    def test_at_the_rows_it_names_a_drop_of_the_margin_is_rejected_and_no_drop_is_let_pass(self):
        """400 gates each; benchmarks/scripts/gate_power.py has the same of thousands, with other shares of flips, margins and families."""
        n, rng = rows_needed(0.2, 0.1, 10), np.random.default_rng(0)
        dropped, same = flips(rng, 0.2, 0.1, (400, n)), flips(rng, 0.2, 0.0, (400, n))
        assert (capital(dropped, 1.0, 0.1, n, 0.005, KEPT).max(1) >= math.log(200)).mean() >= 0.95
        assert (capital(0.1 - same, 0.9, 0.1, n, 0.05, BROKEN).max(1) >= math.log(20)).mean() >= 0.95

    def test_of_ten_tasks_that_lose_nothing_none_is_called_broken_more_than_one_time_in_twenty(self):
        """200 gates, looked at after every row."""
        kept = capital(flips(np.random.default_rng(0), 0.1, 0.0, (2000, 600)), 1.0, 0.02, 600, 0.005, KEPT).max(1).reshape(200, 10)
        alarms = sum("broken" in gate._outcomes([(K, 0.0) for K in row], 0.05, 0.05) for row in kept)
        assert 0 < alarms <= 10


class TestBadInput:
    @pytest.mark.parametrize(
        ("before", "now", "message"),
        [
            ([1, 0, 1], [1, 0], "'a' has 3 scores before and 2 now; they must be of the same rows"),
            ([1, None], [1, 0], "row 1 of 'a' has the score nan, which is no number from 0 to 1"),
            ([1, 0], [1, 1.5], "row 1 of 'a' has the score 1.5"),
            ([-0.1, 0], [1, 1], "row 0 of 'a' has the score -0.1"),
            ([], [], "'a' has no rows that were scored"),
        ],
    )
    def test_scores_that_cannot_be_compared(self, before, now, message):
        with pytest.raises(ValueError, match=message):
            verdict({"a": (before, now)}, max_worst_task=0)

    @pytest.mark.parametrize("drift", [None, math.nan, math.inf])
    def test_a_drift_that_was_not_measured(self, drift):
        with pytest.raises(ValueError, match=r"gate\.max_drift_kl: the drift was not measured"):
            verdict(drift=drift, max_drift_kl=0.2)

    @pytest.mark.parametrize("bad", [{"flip_rate": 1.1}, {"margin": 0.0}, {"family": 0}, {"limit": -0.1}])
    def test_rows_that_cannot_be_planned(self, bad):
        with pytest.raises(ValueError, match="flip_rate"):
            rows_needed(**{"flip_rate": 0.1, "margin": 0.02, "family": 1} | bad)


def mixed(right: int, n: int) -> list[float]:
    """n scores, `right` of them 1, in a seeded order."""
    return list(np.random.default_rng(0).permutation([1.0] * right + [0.0] * (n - right)))

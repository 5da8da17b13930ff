"""The leaderboard's numbers, page and pictures, from cells made by hand whose answers are known."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest

from forgetless.errors import DataError
from forgetless.leaderboard import analysis, pages
from forgetless.leaderboard.cells import CODE
from forgetless.leaderboard.comparing import Estimate, difference, stratified_bootstrap, verdict
from forgetless.leaderboard.published import PUBLISHED

PROTOCOL = {"name": "clean-v1", "about": "forty steps", "steps": 40, "trials": 4}
TWO = {"a": 10, "b": 10}


def digits(right: int, n: int) -> str:
    return "1" * right + "0" * (n - right)


def cell(
    row="seqft",
    seed=0,
    learned=(8, 6),
    final=(4, 6),
    n=TWO,
    stream="order1",
    prompt="bare",
    exact=None,
    words=(0.0, 0.0),
    within=(0.0, 0.0),
    **changes,
):
    """One run of two tasks or more. learned, final: right rows a task, in choice (the last task's are the final ones); exact: the same pair for exact match, where it differs."""
    tasks, T = list(n), len(n)

    def matrix(of):
        then, now = of
        rows = [[None] * T for _ in tasks]
        for j, task in enumerate(tasks):
            for i in range(j, T):
                rows[i][j] = (now[j] if i == T - 1 else then[j]) / n[task]
        return rows

    pairs = {"choice": (learned, final), "exact_match": exact or (learned, final)}
    scores = {s: ((*then[:-1], now[-1]), now) for s, (then, now) in pairs.items()}  # the last task was learned last
    rows = {
        when: {s: {t: digits(of[k][j], n[t]) for j, t in enumerate(tasks)} for s, of in scores.items()} for k, when in enumerate(("learned", "final"))
    }
    shares = {
        key: [[None if j > i else (now if i == T - 1 else then) for j in range(T)] for i in range(T)]
        for key, (then, now) in {"other_task_label": words, "wrong_in_set": within}.items()
    }
    content = {
        "cell": f"clean-v1/{stream}-{prompt}/{row}/seed{seed}", "row": row, "stream": stream, "prompt": prompt, "seed": seed, "protocol": PROTOCOL,
        "chosen": {"trial": 1, "of": 4, "score": 0.69}, "method": {"name": row.split()[0]}, "learning_rate": 1e-4, "config": {}, "environment": {"cpu": "one"},
        "code": CODE, "tasks": tasks, "scores": {s: matrix(of) for s, of in scores.items()}, "before": {s: [0.1] * T for s in scores}, "n": dict(n), "metrics": {},
        "failures": shares, "rows": rows, "protection": [{"update_leak": None, "coverage": {}} for _ in tasks],
        "seconds": {"train": 90.0, "train_cpu": 80.0, "total": 100.0}, "bytes": {"optimizer": 2e6, "memory": 1e6, "peak": None}, "stored_rows": 0,
    }  # fmt: skip
    return content | changes


@pytest.fixture
def put(tmp_path):
    """Writes cells into a results folder and returns it."""

    def write(*cells):
        for content in cells:
            path = tmp_path / "results" / f"{re.sub('[^A-Za-z0-9/_-]', '_', content['cell'])}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
        return tmp_path / "results"

    return write


@pytest.fixture
def tables(put):
    return lambda *cells: analysis.analyse(analysis.load(put(*cells)))


@pytest.fixture
def page(put, tmp_path):
    def written(*cells, planned=None, pictures=None):
        pages.write_page(put(*cells), tmp_path / "docs" / "leaderboard.md", pictures, planned)
        return (tmp_path / "docs" / "leaderboard.md").read_text()

    return written


def line(text: str, row: str) -> list[str]:
    """The cells of the first table line whose first column is `row`."""
    return next(
        cells
        for cells in ([c.strip() for c in found.strip("|").split("|")] for found in text.splitlines() if found.startswith("| "))
        if cells[0] == row
    )


# -- metrics -------------------------------------------------------------------------------------------------------------------------


def test_metrics_of_a_row_are_means_over_seeds_with_their_spread(tables):
    # seed 0: a 0.8 -> 0.4, b 0.6; seed 1: a 0.8 -> 0.6, b 0.6
    (group,) = tables(cell(seed=0), cell(seed=1, final=(6, 6)))
    found = group.rows[0].metrics["choice"]
    assert found["average_accuracy"].mean == pytest.approx((0.5 + 0.6) / 2)
    assert found["average_accuracy"].spread == pytest.approx(np.std([0.5, 0.6], ddof=1))
    assert found["backward_transfer"].mean == pytest.approx((-0.4 - 0.2) / 2)
    assert found["worst_forgetting"].mean == pytest.approx(0.3) and found["learning_accuracy"].mean == pytest.approx(0.7)
    assert found["before"].mean == pytest.approx(0.1)
    assert found["average_accuracy"].seeds == (0, 1)


def test_one_seed_has_no_spread_but_an_interval(tables):
    (group,) = tables(cell())
    aa = group.rows[0].metrics["choice"]["average_accuracy"]
    assert aa.spread is None and aa.low < aa.mean < aa.high


def test_backward_transfer_has_an_interval_where_the_rows_as_learned_are_kept_and_none_elsewhere(tables):
    # all four rows that were lost are of one task, so the paired interval is that of 4 losses in 10 rows
    bwt = tables(cell())[0].rows[0].metrics["choice"]["backward_transfer"]
    assert -0.75 < bwt.low < -0.4 < bwt.high < 0
    old = cell(row="gorp")
    old["rows"].pop("learned")
    found = tables(cell(), old)[0].row("gorp").metrics["choice"]
    assert (
        found["backward_transfer"].mean == pytest.approx(-0.4) and found["backward_transfer"].low is None and found["learning_accuracy"].low is None
    )
    assert found["average_accuracy"].low is not None


def test_rows_that_moved_both_ways_widen_the_interval_though_their_mean_is_the_same(tables):
    still, moved = cell(row="still", learned=(5, 5), final=(5, 5)), cell(row="moved", learned=(5, 5), final=(5, 5))
    moved["rows"]["final"]["choice"]["a"] = "0000011111"
    rows = {row.name: row.metrics["choice"]["backward_transfer"] for row in tables(still, moved)[0].rows}
    assert (rows["still"].low, rows["still"].high) == (0, 0) and rows["moved"].low < -0.3 and rows["moved"].high > 0.3


def test_forward_transfer_needs_the_scores_of_tasks_not_yet_trained(tables):
    unseen = cell()
    unseen["scores"]["choice"][0][1] = 0.3
    assert tables(unseen)[0].rows[0].metrics["choice"]["forward_transfer"].mean == pytest.approx(0.2)
    assert "forward_transfer" not in tables(cell())[0].rows[0].metrics["choice"]


def test_intransigence_is_against_the_cell_of_per_task_with_the_same_seed(tables):
    (group,) = tables(cell(seed=0), cell(seed=1), cell(row="per_task", seed=0, learned=(9, 8), final=(9, 8)))
    found = group.row("seqft").metrics["choice"]["intransigence"]
    assert found.mean == pytest.approx((0.1 + 0.2) / 2) and found.seeds == (0,)
    assert "intransigence" not in tables(cell(stream="order2"))[-1].rows[0].metrics["choice"]


# -- intervals and differences -------------------------------------------------------------------------------------------------------


def test_the_interval_covers_the_truth_nineteen_times_in_twenty():
    rng, hits, trials = np.random.default_rng(0), 0, 200
    truth = (0.6 + 0.3) / 2
    for i in range(trials):
        blocks = [(0.5, rng.binomial(1, 0.6, 100).astype(float)), (0.5, rng.binomial(1, 0.3, 60).astype(float))]
        _, low, high = stratified_bootstrap(blocks, draws=400, seed=i)
        hits += low <= truth <= high
    assert 0.90 <= hits / trials <= 0.99


def test_drawing_counts_of_values_is_the_bootstrap_over_rows():
    rng = np.random.default_rng(1)
    values = rng.choice([-1.0, 0.0, 0.25, 1.0], 50)
    drawn = values[rng.integers(50, size=(20000, 50))].mean(1)
    _, low, high = stratified_bootstrap([(1.0, values)], draws=20000)
    assert (low, high) == (pytest.approx(np.quantile(drawn, 0.025), abs=0.01), pytest.approx(np.quantile(drawn, 0.975), abs=0.01))


def test_a_task_with_many_rows_weighs_no_more_than_one_with_few(tables):
    n = {"few": 10, "many": 400}
    a = cell(row="gorp", n=n, learned=(10, 0), final=(10, 0))
    b = cell(row="seqft", n=n, learned=(0, 0), final=(0, 0))
    (group,) = tables(a, b)
    gorp = group.row("gorp")
    assert gorp.metrics["choice"]["average_accuracy"].mean == pytest.approx(0.5)  # over rows it would be 10 / 410
    assert gorp.minus["seqft"]["choice"].mean == pytest.approx(0.5)
    assert gorp.minus["seqft"]["choice"].low == gorp.minus["seqft"]["choice"].high == 0.5  # nothing varies within a task, and tasks are not drawn


def test_the_difference_is_over_the_seeds_both_have_and_paired_row_by_row(tables):
    (group,) = tables(cell(row="gorp", seed=0, final=(6, 6)), cell(row="gorp", seed=2, final=(0, 0)), cell(seed=0), cell(seed=1, final=(0, 0)))
    d = group.row("gorp").minus["seqft"]["choice"]
    assert d.mean == pytest.approx(0.1) and d.seeds == (0,)
    same = cell(row="gorp", final=(4, 6))
    flipped = cell(row="gorp", final=(4, 6))
    flipped["rows"]["final"]["choice"]["a"] = "0000001111"
    (paired,), (crossed,) = (tables(cell(), c) for c in (same, flipped))
    assert paired.row("gorp").minus["seqft"]["choice"] == Estimate(0.0, (0,), None, 0.0, 0.0)
    assert crossed.row("gorp").minus["seqft"]["choice"].high > 0.1  # the same score from other rows is no certainty


def test_differences_are_from_mtl_too_and_a_row_is_not_compared_with_itself(tables):
    (group,) = tables(cell(), cell(row="mtl", final=(9, 9)), cell(row="gorp", final=(6, 6)))
    assert group.row("gorp").minus["mtl"]["choice"].mean == pytest.approx(0.6 - 0.9)
    assert group.row("mtl").minus.keys() == {"seqft"} and group.row("seqft").minus.keys() == {"mtl"}
    assert [row.name for row in group.rows] == ["mtl", "gorp", "seqft"]


def test_rows_that_are_not_the_same_test_rows_are_refused(put):
    a, b = analysis.load(put(cell(), cell(row="gorp", n={"a": 20, "b": 10}, learned=(8, 6), final=(4, 6))))
    with pytest.raises(DataError, match="not the same rows"):
        difference([a], [b], "choice")
    with pytest.raises(DataError, match="count of test rows differs"):
        analysis.analyse([a, b])


# -- verdicts ------------------------------------------------------------------------------------------------------------------------

UP, NONE, DOWN = (Estimate(m, low=m - 0.05, high=m + 0.05) for m in (0.1, 0.0, -0.1))


@pytest.mark.parametrize(
    ("choice", "exact", "learning", "word"),
    [
        (UP, UP, 0.0, "wins"),
        (UP, NONE, 0.02, "wins"),
        (UP, NONE, -0.02, "wins"),
        (UP, NONE, 0.021, "ahead"),
        (UP, NONE, -0.021, "ahead"),
        (UP, DOWN, 0.0, "split"),
        (NONE, UP, 0.0, "undecided"),
        (NONE, DOWN, 0.0, "undecided"),
        (DOWN, NONE, 0.0, "loses"),
        (DOWN, DOWN, 0.03, "behind"),
        (DOWN, UP, 0.0, "split"),
    ],
)
def test_a_row_wins_in_choice_without_losing_exact_match_at_matched_learning(choice, exact, learning, word):
    assert verdict(choice, exact, learning) == word


def test_a_verdict_takes_the_learning_accuracy_of_the_seeds_both_have(tables):
    n = {"a": 100, "b": 100}
    ours = [cell(row="gorp", seed=0, n=n, learned=(80, 80), final=(79, 80)), cell(row="gorp", seed=1, n=n, learned=(10, 10), final=(10, 10))]
    (group,) = tables(*ours, cell(seed=0, n=n, learned=(80, 80), final=(30, 80)))
    assert group.row("gorp").verdicts == {"seqft": "wins"}
    (group,) = tables(ours[0], cell(seed=0, n=n, learned=(90, 80), final=(30, 80)))
    assert group.row("gorp").verdicts == {"seqft": "ahead"}


# -- answer words --------------------------------------------------------------------------------------------------------------------


def test_answer_word_drift_on_a_worked_example(tables):
    # old task a: exact match 0.8 -> 0.2. Of the 8 rows in 10 that fail at the end 5 say a word of another task, 2 another label of a, 1 something else;
    # when it was learned 0 and 2 did
    run = cell(exact=((8, 6), (2, 6)), words=(0.0, 0.5), within=(0.2, 0.2))
    found = tables(run)[0].rows[0].drift
    assert (found.failed, found.words, found.within, found.neither) == tuple(pytest.approx(x) for x in (0.8, 0.5, 0.2, 0.1))
    assert found.share == pytest.approx(5 / 8)
    assert found.bwt_words == pytest.approx(-0.5) and found.bwt_rest == pytest.approx(-0.1)
    assert found.bwt_words + found.bwt_rest == pytest.approx(tables(run)[0].rows[0].metrics["exact_match"]["backward_transfer"].mean)


def test_without_failures_or_a_measured_split_there_is_no_share(tables):
    assert tables(cell(exact=((10, 10), (10, 10))))[0].rows[0].drift.share is None
    unmeasured = cell()
    unmeasured["failures"]["other_task_label"] = [[None, None], [None, None]]
    assert tables(unmeasured)[0].rows[0].drift is None


# -- costs ---------------------------------------------------------------------------------------------------------------------------


def test_costs_are_the_worst_over_seeds_and_seconds_relative_on_the_same_cpu(tables):
    leak = [
        {"update_leak": 1e-7, "coverage": {}},
        {"update_leak": 3e-6, "coverage": {"a": {"inputs": 0.6, "output_change": 0.01}, "b": {"inputs": 0.0, "output_change": 0.0}}},
    ]
    ours = cell(
        row="gorp",
        protection=leak,
        seconds={"train": 300.0, "train_cpu": 120.0, "total": 400.0},
        bytes={"optimizer": 5e6, "memory": 7e6, "peak": None},
    )
    (group,) = tables(cell(), ours, cell(row="gorp", seed=1), cell(row="ewc", environment={"cpu": "another"}))
    costs = group.row("gorp").costs
    assert costs.seconds.mean == 100 and not costs.wall and costs.against == 1.5
    assert (costs.optimizer, costs.kept, costs.update_leak) == (5e6, 7e6, 3e-6)
    assert (costs.inputs, costs.change) == (0.6, 0.01)  # of old tasks only
    assert group.row("ewc").costs.against is None


def test_where_cpu_time_was_not_recorded_the_wall_time_says_so(page):
    old = cell(seconds={"train": 90.0, "train_cpu": None, "total": None}, bytes={"optimizer": 2e6, "memory": None, "peak": None}, stored_rows=None)
    columns = dict(zip(line(text := page(old), "row"), line(text, "seqft"), strict=True))
    assert columns["CPU s"] == "90 wall" and columns["kept MB"] == columns["stored"] == "-"


# -- orders --------------------------------------------------------------------------------------------------------------------------


def test_orders_are_repeated_measures_of_the_rows_that_have_all_of_them(tables):
    swapped = {"b": 10, "a": 10}
    groups = tables(
        *(cell(seed=s) for s in (0, 1)), cell(row="gorp", final=(6, 6)), cell(row="ewc"),
        cell(stream="order2", n=swapped, final=(8, 6)), cell(row="gorp", stream="order2", n=swapped, final=(9, 9)),
        cell(stream="other", n={"c": 10, "d": 10}),
    )  # fmt: skip
    (found,) = analysis.orders(groups)
    assert found.streams == ("order1", "order2") and list(found.rows) == ["gorp", "seqft"]
    metrics, minus = found.rows["gorp"]
    assert metrics["choice"]["average_accuracy"].mean == pytest.approx((0.6 + 0.9) / 2)
    assert minus["seqft"]["choice"].mean == pytest.approx((0.1 + 0.2) / 2)  # order1 over seed 0, which both have
    assert minus["seqft"]["choice"].low < 0.15 < minus["seqft"]["choice"].high and minus["seqft"]["choice"].spread == pytest.approx(0.0707, abs=1e-4)


# -- reading -------------------------------------------------------------------------------------------------------------------------


def broken(change):
    content = cell()
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"cell": "x", ', "not a whole cell"),
        ("[1]", "the file: Input should be a valid dictionary"),
        ("{}", "'cell' is missing"),
        (broken(lambda c: c.pop("rows")), "'rows' is missing"),
        (broken(lambda c: c.update(colour=1)), "unknown key 'colour'"),
        (broken(lambda c: c["scores"]["choice"][1].__setitem__(0, 40.0)), "scores.choice.1.0"),
        (broken(lambda c: c["scores"]["choice"].pop()), "choice: not 2 rows of 2 numbers"),
        (broken(lambda c: c["rows"]["final"]["choice"].update(a="110")), "3 rows of a, n says 10"),
        (broken(lambda c: c["rows"]["final"]["choice"].update(a="1111111111")), "have a mean of 1.000, its score is 0.400"),
        (broken(lambda c: c["rows"]["learned"]["choice"].update(a="0000000000")), "rows.learned.choice: the rows of a have a mean of 0.000"),
        (broken(lambda c: c["n"].pop("b")), "n: nothing about b"),
        (broken(lambda c: c["before"].update(choice=[0.1])), "before.choice: 1 numbers, not 2"),
        (broken(lambda c: c.update(protocol={})), "protocol: it has no name"),
    ],
)
def test_a_damaged_or_foreign_file_is_one_error_that_names_it(put, text, why):
    results = put(cell(row="gorp"))
    (results / "clean-v1" / "broken.json").write_text(text)
    with pytest.raises(DataError, match=re.escape(why)) as error:
        analysis.load(results)
    assert "broken.json" in str(error.value) and "\n" not in str(error.value)


def test_a_cell_may_say_what_it_was_imported_from(put):
    assert analysis.load(put(cell(**{"from": "gorp_ablation_order1.json"})))[0].imported == "gorp_ablation_order1.json"


def test_tuning_trials_are_not_read_and_a_missing_folder_is_an_error(put, tmp_path):
    results = put(cell())
    (results / "clean-v1" / "tuning" / "gorp").mkdir(parents=True)
    (results / "clean-v1" / "tuning" / "gorp" / "trial0.json").write_text("no cell at all")
    assert [c.row for c in analysis.load(results)] == ["seqft"]
    with pytest.raises(DataError, match="no such folder"):
        analysis.load(tmp_path / "nowhere")


def test_the_same_run_twice_and_one_protocol_stated_differently_are_refused(put):
    results = put(cell())
    (results / "again.json").write_text(json.dumps(cell()))
    with pytest.raises(DataError, match=r"seed0\.json: the same run as .*again\.json"):
        analysis.load(results)
    (results / "again.json").write_text(json.dumps(cell(row="gorp", protocol=PROTOCOL | {"steps": 62})))
    with pytest.raises(DataError, match="protocol's steps differs"):
        analysis.analyse(analysis.load(results))
    (results / "again.json").write_text(json.dumps(cell(row="gorp", protocol=PROTOCOL | {"new": 1})))
    assert len(analysis.analyse(analysis.load(results))[0].rows) == 2  # a key that older cells do not have is no contradiction


# -- the page ------------------------------------------------------------------------------------------------------------------------


def test_each_line_begins_with_the_rows_name_and_the_best_stands_first(page):
    text = page(cell(), cell(row="gorp + lines", final=(7, 6)), cell(row="peft-osf (peer)", final=(6, 6)))
    first = [found.split("|")[1].strip() for found in text.splitlines() if found.startswith("| ")]
    assert first[2:5] == ["gorp + lines", "peft-osf (peer)", "seqft"]
    columns = dict(zip(line(text, "row"), line(text, "gorp + lines"), strict=True))
    assert columns["seeds"] == "1" and columns["choice AA"] == "0.650" and columns["choice BWT"] == "-0.100" and columns["choice LA"] == "0.700"
    assert re.fullmatch(r"\+0\.150 \[\+0\.\d{3}, \+0\.\d{3}\]", columns["minus seqft"]) and columns["minus mtl"] == "-"
    assert columns["optimizer MB"] == "2.0" and columns["kept MB"] == "1.0" and columns["CPU s"] == "80"
    assert line(text, "row against peer")[1] == "peft-osf (peer)"
    against = page(cell(row="mtl", final=(9, 9))).split("| row against peer |")[1].split("\n\n")[0]
    assert "| seqft |" in against and "| mtl |" not in against  # a bound is no contestant


def test_a_partial_table_says_what_it_lacks(page):
    planned = {("clean-v1", "order1", "bare"): (["seqft", "gorp", "ewc"], [0, 1]), ("clean-v1", "order2", "bare"): (["seqft"], [0])}
    text = page(cell(), cell(row="gorp"), cell(row="gorp", seed=1), planned=planned)
    assert "3 of 7 planned cells are there. **This is a partial table.**" in text
    assert "**Partial: 3 of 6 planned cells are there.** Missing: seqft (seeds 1); ewc (no seed yet)." in text
    assert "### order2, prompt: bare\n\n**Partial: 0 of 1 planned cell are there.**" in text
    whole = page(cell(), cell(row="gorp"), cell(row="gorp", seed=1), planned={("clean-v1", "order1", "bare"): (["gorp"], [0, 1])})
    assert "2 of 2 planned cells are there, and 1 beside the plan." in whole and "artial" not in whole
    assert "3 cells." in page(planned=None)


def test_the_protocol_states_its_budget_seeds_and_how_settings_were_chosen(page):
    text = page(cell(), cell(row="gorp", seed=2))
    for said in (
        "forty steps.",
        "- steps: 40",
        "- seeds: 0, 2",
        "- prompts: bare",
        "- settings: each row&#39;s best of 4 trials".replace("&#39;", "'"),
    ):
        assert said in text
    uneven = page(cell(row="gorp", seed=2, chosen={"trial": 0, "of": 8, "score": 0.5}))
    assert "NOT alike: the best of between 4 and 8 trials" in uneven
    assert line(text, "gorp")[0] == "gorp" and "| gorp | gorp | 0.0001 | 2 of 4 | 0.690 |" in text


def test_small_test_sets_are_flagged(page):
    text = page(cell(n={"cb": 28, "big": 200}, learned=(8, 6), final=(4, 6)))
    assert "cb (n = 28, **few test rows**), big (n = 200)." in text


def test_a_name_with_a_pipe_or_html_stays_text(page):
    text = page(cell(row="gorp | <script>x</script> *b* _c_"), cell(stream="<b>", row="per_task"))
    assert "<script>" not in text and "<b>" not in text
    assert all(len(re.findall(r"(?<!\\)\|", found)) > 2 for found in text.splitlines() if found.startswith("| "))
    assert line(text, "gorp &#124; &lt;script&gt;x&lt;/script&gt; &#42;b&#42; &#95;c&#95;") and line(text, "per_task")


def test_the_same_cells_make_the_same_page_and_their_order_on_disk_does_not_matter(page, tmp_path):
    cells = [cell(), cell(row="gorp", seed=1), cell(row="ewc", stream="order2"), cell(row="gorp")]
    once = page(*cells)
    for path in sorted((tmp_path / "results").rglob("*.json")):
        path.unlink()
    assert page(*reversed(cells)) == once


def test_notes_by_hand_are_copied_in_and_published_numbers_stand_apart(page, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / pages.NOTES).write_text("GORP's claim holds **here**.\n")
    text = page(cell())
    assert "\nGORP's claim holds **here**.\n" in text
    ours, apart = text.split("## Published numbers")
    assert all(p.source and p.protocol and p.model for p in PUBLISHED)
    assert "| Standard CL, mean of orders 1-3 | T5-large | O-LoRA |" in apart and "T5-large" not in ours
    assert len([found for found in apart.splitlines() if found.startswith("| ")]) == len(PUBLISHED) + 2


def test_a_diverged_run_is_named_and_one_of_an_earlier_code_left_out(page):
    kept = ("cell", "row", "stream", "prompt", "seed", "protocol", "chosen", "method", "learning_rate", "config", "code")
    lost = {key: cell(row="ewc")[key] for key in kept} | {"failed": "the loss is nan"}
    text = page(cell(), lost, cell(row="gorp", code=CODE - 1), planned={("clean-v1", "order1", "bare"): (["seqft", "ewc"], [0])})
    assert "Diverged: ewc, seed 0 (the loss is nan)." in text and "2 of 2 planned cells" in text
    assert "1 cells of an earlier code are left out." in text and "| gorp |" not in text


def relearned(at_start, back, untouched):
    """relearning.json of a run, as `forgetless relearn` writes it."""
    scores = {"scores": {"choice": [at_start, 0.8]}, "back_after": {"choice": back}}
    control = {"scores": {"choice": [0.1, 0.5]}, "back_after": {"choice": untouched}}
    return {"steps": [0, 4], "tasks": {"a": {"learned": {"choice": 0.8}, "relearned": scores, "control": control}}}


def test_relearning_unseen_and_general_are_tables_where_cells_have_them(page):
    text = page(
        cell(relearning=relearned(0.2, 4, None)), cell(seed=1, relearning=relearned(0.4, None, None)), cell(seed=2),
        cell(row="gorp", unseen={"tasks": {"imdb": {"choice": [0.5, 0.7]}, "cb": {"choice": [0.4, 0.3]}, "free": {"exact_match": [0.1, 0.2]}}}),
        cell(row="gorp", seed=1, unseen={"tasks": {"imdb": {"choice": [0.5, 0.6]}}}),
    )  # fmt: skip
    assert "| row | task | when learned | 0 steps | 4 steps | back after | untouched model |" in text
    assert "| seqft | a | 0.800 | 0.300 | 0.800 | 4, not | not, not |" in text
    assert "| row | seeds | imdb | cb | mean change |" in text and "General" not in text
    assert "| gorp | 2 | 0.500, 0.650 | 0.400, 0.300 | +0.075 |" in text, "(0.2 - 0.1) / 2 of the first seed, 0.1 of the second"
    asked = {"suites": {"facts": {"n": 40, "before": 0.7, "after": 0.65, "change": -0.05, "ci95": [-0.2, 0.1]}}, "mean_change": -0.05}
    text = page(cell(general=asked), cell(seed=1, general={"text": {"perplexity": 31.25, "kl": 0.3, "tokens": 9}}))
    assert "| seqft | 1 | 0.700, 0.650 | -0.050 |" in text and "| seqft | 1 | 31.25 | 0.300 |" in text


# -- pictures ------------------------------------------------------------------------------------------------------------------------


def test_without_matplotlib_the_error_names_the_command(page, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DataError, match=r"pip install 'forgetless\[plots\]'"):
        page(cell(), pictures=tmp_path / "docs" / "img")


def many(count=12):
    return [
        cell(row=f"method number {i}", final=(4 + i // 4, 6), stored_rows=0, bytes={"optimizer": 2e6 * (1 + i % 3), "memory": 0.0, "peak": None})
        for i in range(count)
    ]


def test_twelve_names_do_not_cover_each_other_even_where_points_coincide(tables):
    pytest.importorskip("matplotlib")
    from forgetless.leaderboard import plots

    (group,) = tables(*many())
    figure = plots.pareto(group)
    renderer = figure.canvas.get_renderer()
    for axis in figure.axes:
        boxes = [text.get_window_extent(renderer) for text in axis.texts]
        assert len(boxes) == 12
        assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]


def test_the_page_shows_its_pictures_by_relative_paths_and_they_are_the_same_each_time(page, tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "docs" / "img"
    text = page(cell(), cell(row="gorp", final=(7, 6)), pictures=folder)
    shown = re.findall(r"!\[[^]]*\]\((img/[^)]+\.png)\)", text)
    assert len(shown) == 2 and all((tmp_path / "docs" / path).is_file() for path in shown)
    before = {path: (tmp_path / "docs" / path).read_bytes() for path in shown}
    page(pictures=folder)
    assert before == {path: (tmp_path / "docs" / path).read_bytes() for path in shown}


def test_the_front_is_what_nothing_else_beats_and_bounds_are_not_on_it(tables):
    pytest.importorskip("matplotlib")
    from forgetless.leaderboard import plots

    assert plots.front([(2, 0.5), (1, 0.5), (3, 0.4), (4, 0.6)]) == [(1, 0.5), (4, 0.6)]
    (group,) = tables(cell(), cell(row="mtl", final=(9, 9), stored_rows=10))
    figure = plots.pareto(group)
    assert max(y for line in figure.axes[0].lines for y in line.get_ydata()) == pytest.approx(0.5)

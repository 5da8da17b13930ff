"""The report: the numbers of a run are on the page, what came from data stays text, and what was not measured is said, not guessed."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from forgetless.errors import DataError
from forgetless.evaluation.matrix import wilson
from forgetless.lineage import branches
from forgetless.report import model_card, write_card, write_markdown, write_report
from forgetless.report.charts import loss_chart, nice_ceiling, running_mean, thinned
from forgetless.report.markdown import plain
from forgetless.report.numbers import percent
from forgetless.report.read import Commit, follow
from forgetless.report.scores import looks

EVIL = "<script>alert(1)</script>\"'&"
VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Reads a page strictly: every tag is closed in order. Keeps the tags, their attributes and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str, **attrs: str) -> list[dict[str, str | None]]:
        return [have for name, have in self.tags if name == tag and all(value in (have.get(key) or "").split() for key, value in attrs.items())]


def matrix(tasks: tuple[str, ...] = ("cities", "tickets", "mood"), rows: int = 3) -> dict[str, Any]:
    """Three tasks, the upper triangle not measured; `rows` of them learned."""
    choice = [[0.915, None, None], [0.875, 0.825, None], [0.805, 0.785, 0.905]][:rows]
    exact = [[0.901, None, None], [0.702, 0.803, None], [0.504, 0.605, 0.886]][:rows]
    ci95 = [[None if v is None else [v - 0.043, v + 0.037] for v in row] for row in choice]
    metrics = {"average_accuracy": 0.8317, "backward_transfer": -0.075, "forgetting": 0.0751, "worst_forgetting": 0.11}
    metrics = {**metrics, "learning_accuracy": 0.8817, "forward_transfer": None}
    return {
        "tasks": list(tasks),
        "before": {"choice": [0.333, 0.25, None], "exact_match": [0.0, 0.01, 0.02]},
        "scores": {"choice": choice, "exact_match": exact},
        "n": dict.fromkeys(tasks, 200),
        "ci95": {"choice": ci95, "exact_match": ci95},
        "metrics": {"choice": metrics, "exact_match": {**metrics, "average_accuracy": 0.665}},
        "failures": {
            "other_task_label": [[0.031, None, None], [0.222, 0.09, None], [0.413, 0.2, 0.05]][:rows],
            "wrong_in_set": [[0.068, None, None]],
        },
    }


def step(index: int, task: str, at: int, loss: Any) -> dict[str, Any]:
    return {"event": "step", "task": task, "index": index, "step": at, "loss": loss, "learning_rate": 1e-4, "update_leak": 1e-7}


def done(index: int, task: str, **more: Any) -> dict[str, Any]:
    record = {
        "event": "task",
        "task": task,
        "index": index,
        "steps": 40,
        "train_seconds": 61.25,
        "eval_seconds": 9.5,
        "peak_bytes": 3 * 2**29,
    }
    leaks = {"update_leak": 3.1e-7, "weight_leak": 2.2e-5, "weight_leak_bound": 4.4e-5}
    return {**record, **leaks, "space": {"modules": 210, "rank_mean": 23.4, "rank_max": 64, "share": 0.041}, "coverage": None, **more}


def timing(tasks: tuple[str, ...]) -> list[dict[str, Any]]:
    records = []
    for index, task in enumerate(tasks):
        records += [step(index, task, at, 2.5 - at / 40) for at in range(1, 41)]
        coverage = {earlier: {"inputs": 0.937, "output_change": 0.0042} for earlier in tasks[:index]}
        records.append(done(index, task, coverage=coverage or None))
    return records


def make_run(
    path: Path, tasks: tuple[str, ...] = ("cities", "tickets", "mood"), rows: int = 3, seed: int = 0, method: str = "gorp", **change: Any
) -> Path:
    """A whole run folder; `change` replaces keys of matrix.json."""
    path.mkdir(parents=True)
    config = {
        "model": "bundled:smollm2-135m",
        "method": {"name": method, "rank": 8},
        "seed": seed,
        "tasks": [{"name": task} for task in tasks],
    }
    (path / "run.yaml").write_text(json.dumps(config, indent=1))  # JSON is YAML
    (path / "matrix.json").write_text(json.dumps({**matrix(tasks, rows), **change}))
    write_lines(path / "timing.jsonl", timing(tasks[:rows]))
    line = {"kind": "task", "model_sha256": "ab" * 32, "hash": "cd" * 32, "parent": "", "scores": {}}
    write_lines(path / "lineage.jsonl", [{**line, "index": index, "task": task} for index, task in enumerate(tasks[:rows])])
    return path


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def report(*runs: Path) -> tuple[str, Page]:
    out = runs[0].parent / "out" / "report.html"
    assert write_report(list(runs), out) == out
    html = out.read_text(encoding="utf-8")
    return html, Page(html)


def edit(path: Path, **change: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


# ---- one whole run


def test_numbers_of_a_run_are_on_the_page(tmp_path: Path) -> None:
    _, page = report(make_run(tmp_path / "first"))
    for shown in (
        "91.5",
        "87.5",
        "80.5",
        "50.4",
        "83.2",
        "66.5",
        "−7.5",
        "11.0",
        "88.2",
        "33.3",
    ):  # cells, metrics, the row before training
        assert shown in page.text, shown
    for shown in ("41.3", "61.2", "9.5", "1.50 GiB", "3.1e-07", "2.2e-05", "4.4e-05", "210", "23.4", "64", "4.1", "93.7", "Δ 0.42"):
        assert shown in page.text, shown
    assert "abababababab" in page.text and "ab" * 7 not in page.text and "cdcdcdcdcdcd" in page.text
    assert '"rank": 8' in page.text, "the configuration as resolved"
    assert "3 × 200" in page.text


def test_a_cell_says_its_n_and_interval(tmp_path: Path) -> None:
    _, page = report(make_run(tmp_path / "first"))
    assert any(cell.get("title") == "cities: 91.5 %, n = 200, 95 % interval 87.2 to 95.2 %" for cell in page.all("td"))
    assert "87–95" in page.text
    low, high = wilson(0.333, 200)
    shown = f"cities: 33.3 %, n = 200, 95 % interval {100 * low:.1f} to {100 * high:.1f} %"
    assert any(cell.get("title") == shown for cell in page.all("td")), "before training too, for which matrix.json has none"


def test_cells_not_measured_are_hatched_and_never_zero(tmp_path: Path) -> None:
    _, page = report(make_run(tmp_path / "first", failures=None))
    hatched = page.all("td", **{"class": "hatched"})
    assert len(hatched) == 3 + 3 + 1 + 1, "the upper triangle of both scorers, one cell before training, and what the first task has no coverage of"
    assert all("not measured" in (cell["title"] or "") and "style" not in cell for cell in hatched)
    assert "tasks not yet trained (evaluate.unseen was off)" in page.text and "forward transfer" in page.text


def test_every_metric_found_is_shown_even_an_unknown_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first", metrics={"choice": {"average_accuracy": 0.5, "novel_measure": 0.123}})
    _, page = report(run)
    assert "Novel measure" in page.text and "12.3" in page.text


def test_weight_leak_over_its_bound_is_marked(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first")
    assert "over its bound" not in report(run)[1].text
    write_lines(run / "timing.jsonl", [done(0, "cities", weight_leak=9e-5)])
    assert "over its bound" in report(run)[1].text


def test_what_a_low_rank_state_holds_is_shown_where_there_is_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first")
    assert "Energy held" not in report(run)[1].text
    write_lines(run / "timing.jsonl", [done(0, "cities", captured=0.437, captured_of_best=0.972), done(1, "tickets")])
    html, page = report(run)
    assert "Energy held, %" in page.text and "43.7" in page.text and "97.2" in page.text
    table = html[html.index("Energy held, %") :].partition("</table>")[0]
    assert [len(re.findall("<t[dh]", row)) for row in table.split("<tr>")[1:]] == [7, 7], "every row has a cell for every column"


# ---- what came from data stays text; nothing is loaded


def test_hostile_text_is_escaped_everywhere(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first", tasks=(EVIL, "tickets", "mood"), method=EVIL)
    edit(run / "run.yaml", model=EVIL, seed=EVIL)
    other = {EVIL: {EVIL: 0.5}}
    edit(
        run / "matrix.json",
        failures={EVIL: [[0.1]]},
        metrics={**matrix()["metrics"], **other},
        scores={**matrix()["scores"], EVIL: [[0.5]]},
    )
    write_lines(run / "lineage.jsonl", [{"kind": EVIL, "index": EVIL, "task": EVIL, "model_sha256": EVIL, "hash": EVIL}])
    write_lines(run / "timing.jsonl", [*timing((EVIL, "tickets")), done(2, "mood", steps=EVIL, space={"modules": EVIL, "rank_max": EVIL})])
    html, page = report(run)
    assert "<script" not in html.lower() and not page.all("script")
    assert page.text.count("<script>alert(1)</script>") > 20, "shown as text: tables, chart labels, tooltips, configuration"
    assert any("<script>alert(1)" in (svg["aria-label"] or "") for svg in page.all("svg"))
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]


def test_run_folder_names_are_escaped_too(tmp_path: Path) -> None:
    html, page = report(make_run(tmp_path / "<b onclick=x>&"))
    assert not page.all("b", onclick="x") and "<b onclick=x>&" in page.text and "<b onclick" not in html


def test_nothing_is_fetched(tmp_path: Path) -> None:
    html, page = report(make_run(tmp_path / "first"))
    assert "http://" not in html and "https://" not in html and "url(" not in html and "@import" not in html
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img", "iframe", "object", "embed"})
    assert all((attrs.get("href") or "#").startswith("#") and "src" not in attrs for _, attrs in page.tags)
    assert any("default-src 'none'" in (meta.get("content") or "") for meta in page.all("meta"))


def test_same_folder_same_bytes_and_no_leftover(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first")
    assert report(run)[0] == report(run)[0]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]


# ---- reading without sight, and in either light


def test_tables_have_headers_and_charts_have_names(tmp_path: Path) -> None:
    _, page = report(make_run(tmp_path / "first"))
    charts = page.all("svg")
    assert len(charts) == 3 + 2 + 1, "a curve a task, the loss for a wide and a narrow page, the growth of the space"
    assert all(svg.get("role") == "img" and svg.get("aria-label") for svg in charts)
    said = " | ".join(svg["aria-label"] or "" for svg in charts)
    assert said.count("cities from 2.48 to 1.5 in 40 steps") == 2 and "Choice 33.3 before, 91.5 after 1, 87.5 after 2, 80.5 after 3" in said
    assert "4.1 after cities; 4.1 after tickets" in said
    whole = report(make_durable(tmp_path / "durable"))[1]
    assert all(header.get("scope") in {"row", "col", "colgroup"} for header in page.all("th") + whole.all("th"))
    assert len(page.all("table")) == len(page.all("thead")) == 10
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) and {(a["href"] or "")[1:] for a in page.all("a")} <= set(ids), "every link leads somewhere"


def test_numbers_are_readable_at_every_shade_in_both_schemes(tmp_path: Path) -> None:
    html, _ = report(make_run(tmp_path / "first"))
    schemes = [dict(re.findall(r"--([a-z]+): ([^;]+);", block)) for block in re.findall(r":root \{(.*?)\}", html, re.S)]
    assert len(schemes) == 3, "light, dark, print"
    for colours in schemes:
        page, ink = rgb(colours["page"]), rgb(colours["ink"])
        for tone in (rgb(colours["heat"]), rgb(colours["bad"])):
            for shade in range(11):
                cell = tuple(p + (t - p) * shade / 10 for p, t in zip(page, tone, strict=True))
                assert contrast(cell, ink) >= 4.5, (tone, shade)
        assert contrast(page, rgb(colours["soft"])) >= 4.5 and contrast(rgb(colours["card"]), rgb(colours["warn"])) >= 4.5


def rgb(text: str) -> tuple[float, ...]:
    if not text.startswith("#"):
        return tuple(float(part) for part in text.split())
    digits = text[1:] if len(text) == 7 else "".join(2 * digit for digit in text[1:])
    return tuple(float(int(digits[i : i + 2], 16)) for i in (0, 2, 4))


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """The contrast ratio of WCAG 2.1; 4.5 is its level AA for body text."""
    linear = [[c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour] for colour in (one, other)]
    low, high = sorted(0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in linear)
    return (high + 0.05) / (low + 0.05)


# ---- parts that are missing


def test_unfinished_run(tmp_path: Path) -> None:
    _, page = report(make_run(tmp_path / "first", rows=1))
    assert "1 of 3 tasks learned (unfinished)" in page.text and "after mood" in page.text
    assert "1 × 200" in page.text, "n counts the tasks behind the average"


def test_only_the_two_required_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first", before=None, ci95={}, failures=None, n={}, metrics={})
    (run / "timing.jsonl").unlink()
    (run / "lineage.jsonl").unlink()
    _, page = report(run)
    for said in ("No loss was recorded", "No cost was recorded", "No leak was recorded", "No coverage", "No lineage", "No metrics"):
        assert said in page.text, said
    for missing in (
        "the untouched model",
        "95 % intervals",
        "no timing.jsonl",
        "no lineage.jsonl",
        "how exact match failed",
        "leaks",
        "coverage",
    ):
        assert missing in page.text.split("Not measured:")[1], missing
    assert [svg["class"] for svg in page.all("svg")] == ["chart small"] * 3 and "91.5" in page.text, "the curves need matrix.json only"


def test_truncated_last_line_is_ignored_and_a_broken_one_before_it_is_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first")
    with (run / "timing.jsonl").open("a") as file:
        file.write('{"event": "step", "task": "mo')
    _, page = report(run)
    assert "Left out" not in page.text and "1.50 GiB" in page.text
    with (run / "timing.jsonl").open("a") as file:  # the resumed run went on writing behind the cut
        file.write(json.dumps(done(2, "mood")) + "\n")
    assert "1 unreadable line(s) of timing.jsonl" in report(run)[1].text


def test_retrained_task_replaces_what_it_logged_before(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first")
    first = [step(0, "cities", at, 9.0) for at in range(1, 31)] + [done(0, "cities", train_seconds=1111.0)]
    again = [step(0, "cities", at, 2.0) for at in range(1, 21)] + [done(0, "cities", train_seconds=2222.0)]
    write_lines(run / "timing.jsonl", [*first, *again])
    _, page = report(run)
    assert "cities from 2 to 2 in 20 steps" in (page.all("svg", **{"class": "wide"})[0]["aria-label"] or "")
    assert "2222.0" in page.text and "1111.0" not in page.text


def test_resumed_from_a_checkpoint_keeps_the_steps_before_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first")
    write_lines(run / "timing.jsonl", [step(0, "cities", at, 3.0) for at in range(1, 31)] + [step(0, "cities", at, 1.0) for at in range(21, 41)])
    _, page = report(run)
    assert "cities from 3 to 1 in 40 steps" in (page.all("svg", **{"class": "wide"})[0]["aria-label"] or "")
    assert len((page.all("polyline", **{"class": "raw"})[0]["points"] or "").split()) == 40, "steps 21 to 30 are drawn once"


def test_lines_of_another_task_and_losses_that_are_no_numbers_are_left_out_and_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first")
    broken = [step(0, "cities", 3, float("nan")), step(0, "cities", 4, None)]
    write_lines(run / "timing.jsonl", [step(0, "cities", 1, 2.0), step(0, "gone", 2, 1.0), step(9, "cities", 2, 1.0), *broken])
    _, page = report(run)
    assert "2 line(s) of timing.jsonl that belong to no task" in page.text and "2 step(s) whose loss is not a number" in page.text
    assert "nan" not in page.text.lower()


# ---- several runs


def best_of(page_html: str) -> list[str]:
    return re.findall(r"<strong>([^<]*)</strong>", page_html)


def test_two_runs_are_compared_and_the_best_is_bold(tmp_path: Path) -> None:
    good, bad = make_run(tmp_path / "gorp"), make_run(tmp_path / "seqft", method="seqft")
    metrics = {"average_accuracy": 0.4111, "backward_transfer": -0.66, "forgetting": 0.67, "learning_accuracy": 0.95}
    edit(bad / "matrix.json", metrics={"choice": metrics, "exact_match": metrics})
    html, page = report(good, bad)
    assert "2 runs compared" in page.text and "seqft" in page.text and "−66.0" in page.text
    assert best_of(html) == ["83.2", "−7.5", "7.5", "66.5", "−7.5", "7.5", "95.0", "95.0"], "higher is better but for forgetting"
    assert [a["href"] for a in page.all("a") if (a["href"] or "").count("-") == 1] == ["#run-1", "#run-2"] and page.all("article", id="run-2")


def test_ties_are_both_bold_and_one_run_has_no_best(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    assert len(best_of(report(one, two)[0])) == 16
    assert best_of(report(one)[0]) == []


def test_runs_on_other_rows_are_not_ranked(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "a"), make_run(tmp_path / "b", n={"cities": 20, "tickets": 20, "mood": 20})
    for other in (two, make_run(tmp_path / "c", seed=7)):  # as many rows, but the seed chose them
        html, page = report(one, other)
        assert best_of(html) == [] and "not tested on the same tasks and rows" in page.text


def test_an_unfinished_run_is_not_ranked(tmp_path: Path) -> None:
    whole, half = make_run(tmp_path / "a"), make_run(tmp_path / "b", rows=2)
    html, page = report(whole, half)
    assert best_of(html) == [] and "Unfinished runs are not ranked." in page.text and "2 of 3 tasks" in page.text


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "x" / "first"), make_run(tmp_path / "y" / "first")
    text = report(one, two)[1].text
    assert "x/first" in text and "y/first" in text


# ---- refusals


def test_no_folder_given(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run folder"):
        write_report([], tmp_path / "report.html")


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda run: [path.unlink() for path in run.iterdir()], "folder is empty"),
        (lambda run: run.rename(run.with_name("moved")), "no such folder"),
        (lambda run: (run / "run.yaml").unlink(), "run.yaml: no such file"),
        (lambda run: (run / "matrix.json").unlink(), "matrix.json: no such file"),
        (lambda run: (run / "run.yaml").write_text("a: [1"), "run.yaml: not YAML"),
        (lambda run: (run / "run.yaml").write_text("hello"), "run.yaml: a mapping"),
        (lambda run: (run / "matrix.json").write_text('{"tasks": ["a"'), "not an accuracy matrix"),
        (lambda run: (run / "matrix.json").write_text("[]"), "not an accuracy matrix"),
        (lambda run: (run / "matrix.json").write_text('{"tasks": ["a"]}'), "not an accuracy matrix"),
        (lambda run: (run / "matrix.json").write_text('{"tasks": ["a"], "scores": {"choice": 3}}'), "not an accuracy matrix"),
        (lambda run: (run / "matrix.json").write_text('{"tasks": ["a"], "scores": {"choice": [3]}}'), "not an accuracy matrix"),
        (lambda run: (run / "matrix.json").write_text('{"tasks": ["a"], "scores": {}, "n": [1]}'), "not an accuracy matrix"),
    ],
)
def test_a_folder_that_is_no_run_is_one_clear_error_and_leaves_no_report(tmp_path: Path, break_it: Any, said: str) -> None:
    run = make_run(tmp_path / "first")
    break_it(run)
    with pytest.raises(DataError, match=said) as caught:
        write_report([run], tmp_path / "report.html")
    assert str(run) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


# ---- the small functions


def test_percent() -> None:
    assert [percent(v) for v in (0.8754, 0, 1, -0.0001, None, float("nan"), "x", True)] == [
        "87.5",
        "0.0",
        "100.0",
        "0.0",
        None,
        None,
        None,
        None,
    ]
    assert [percent(v, "backward_transfer") for v in (0.02, -0.02, 0.0)] == ["+2.0", "−2.0", "0.0"]


def test_loss_axis_holds_every_loss() -> None:
    for value in (1e-6, 0.3, 0.99, 1.0, 2.3, 5.0, 9.99, 10.0, 250.0):
        top, tick = nice_ceiling(value)
        assert value <= top * (1 + 1e-9) and 2 <= round(top / tick) <= 6
    assert nice_ceiling(0.0) == (1.0, 0.5)


def test_loss_chart_of_a_long_run_stays_small() -> None:
    points = [(float(at), 2.0) for at in range(100_000)]
    assert len(thinned(points, 600)) <= 600 and {loss for _, loss in running_mean(thinned(points, 600), 20)} == {2.0}
    chart = loss_chart([(0, "a", points), (1, "b", points)])
    assert chart is not None and len(chart) < 60_000 and chart.count("boundary") == 2
    assert loss_chart([]) is None and "nan" not in str(loss_chart([(0, "a", [(0.0, 0.0)])]))


def test_narrow_tasks_show_their_number() -> None:
    chart = str(loss_chart([(i, f"a-rather-long-task-name-{i}", [(1.0, 1.0)]) for i in range(40)]))
    assert ">40<title>a-rather-long-task-name-39</title>" in chart


def test_no_torch_needed(tmp_path: Path) -> None:
    run = make_durable(tmp_path / "first")
    code = (
        "import sys; from pathlib import Path; from forgetless.report import write_report, write_markdown; "
        f"run = Path({str(run)!r}); write_report([run], run / 'report.html'); write_markdown([run], run / 'report.md'); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- watch sets, and metrics of the tasks' own


def test_watch_sets_are_a_table_with_intervals(tmp_path: Path) -> None:
    watch = {"general": {"metric": [0.625, 0.612, 0.6, 0.581], "exact_match": [0.5, None, 0.4, 0.375]}}
    n = dict.fromkeys(("cities", "tickets", "mood"), 200) | {"general": 80}
    run = make_run(tmp_path / "first", watch=watch, n=n, metric_of={"general": "nll"})
    _, page = report(run)
    assert "Watched, never trained" in page.text and "general, nll n = 80" in page.text and "general, exact match n = 80" in page.text
    for shown in ("62.5", "58.1", "37.5"):
        assert shown in page.text, shown
    low, high = wilson(0.581, 80)
    assert any(
        cell.get("title") == f"general, nll: 58.1 %, n = 80, 95 % interval {100 * low:.1f} to {100 * high:.1f} %" for cell in page.all("td")
    )  # fmt: skip
    assert len(page.all("table")) == 11 and "3 × 200" in page.text, "the summary counts the tasks' rows only"


def test_no_watch_sets_no_table(tmp_path: Path) -> None:
    assert "Watched" not in report(make_run(tmp_path / "first"))[1].text


def test_each_tasks_own_metric_stands_first_and_is_named(tmp_path: Path) -> None:
    scores = {"metric": [[0.111, None, None], [0.222, 0.333, None], [0.123, 0.456, 0.789]], **matrix()["scores"]}
    metrics = {"metric": {"average_accuracy": 0.4567}, **matrix()["metrics"]}
    kinds = {"cities": "choice", "tickets": "rouge_l", "mood": "exact_match", "general": "nll"}
    one, other = make_run(tmp_path / "one", scores=scores, metrics=metrics, metric_of=kinds), make_run(tmp_path / "other")
    html, page = report(one)
    assert html.index("Each task&#39;s metric") < html.index(">Choice<") and "45.7" in page.text and "78.9" in page.text
    assert "Each task's metric: cities: choice, tickets: rouge_l, mood: exact_match." in page.text
    both = report(one, other)[1].text
    assert both.count("cities: choice") == 1 and "45.7" in both
    assert "Each task's metric" not in report(other)[1].text


@pytest.mark.parametrize("watch", [{"general": 3}, {"general": {"choice": 0.5}}, {"general": ["choice"]}])
def test_a_watch_part_that_is_none_is_malformed(tmp_path: Path, watch: Any) -> None:
    with pytest.raises(DataError, match="not an accuracy matrix"):
        report(make_run(tmp_path / "first", watch=watch))


def test_the_name_of_a_watch_set_stays_text(tmp_path: Path) -> None:
    html, page = report(make_run(tmp_path / "first", watch={EVIL: {"metric": [0.5]}}, metric_of={"cities": EVIL}))
    assert "<script>" not in html and f"{EVIL}, metric" in page.text


# ---- a run with a gate, probes, forecasts, a refused model and a rollback


def limit(kind: str, name: str | None, allowed: float, observed: float, outcome: str = "keep", decide: int | None = None) -> dict[str, Any]:
    return {
        "limit": kind,
        "name": name,
        "allowed": allowed,
        "observed": observed,
        "rows": 48,
        "available": 120,
        "outcome": outcome,
        "rows_to_decide": decide,
    }


def gate(outcome: str, *criteria: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"outcome": outcome, "scorer": "choice", "alpha": 0.05, "beta": 0.1, "margin": 0.02, "criteria": list(criteria), **more}


def write_commit(folder: Path, index: int, task: str, metrics: dict[str, Any], predictions: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    kept = {"steps": 40, "update_leak": 1e-7, "weight_leak": 1e-6, "weight_leak_bound": 1e-5}
    (folder / "metrics.json").write_text(json.dumps({"index": index, "task": task, "scores": {}, "protection": kept, **metrics}))
    write_lines(folder / "predictions.jsonl", predictions)


def predictions(task: str, right: str, text: bool = True) -> list[dict[str, Any]]:
    """One line a row, right where the string has a 1."""
    lines = []
    for row, mark in enumerate(right):
        line: dict[str, Any] = {"row": row, "task": task, "score": {"choice": float(mark), "exact_match": 0.0}}
        words = {"answer": f"{task}-answer-{row}", "prediction": {"choice": f"{task}-{'right' if mark == '1' else 'wrong'}-{row}", "exact_match": ""}}
        lines.append(line | (words if text else {}))
    return lines


def make_durable(path: Path, text: bool = True) -> Path:
    """cities, tickets (rolled back and learned again), mood (refused once, then learned)."""
    run = make_run(path)
    lines = json.loads(json.dumps([{"kind": "task", "index": i, "task": t} for i, t in enumerate(("cities", "tickets", "mood"))]))
    cities, tickets, mood = ({**line, "gate": "accept", "model_sha256": "ab" * 32, "hash": f"{line['index']}1" * 32} for line in lines)
    refused = {**mood, "kind": "reject", "gate": "reject", "hash": "99" * 32}
    back = {"kind": "rollback", "index": 0, "task": "cities", "to": "00-cities", "hash": "77" * 32}
    again = {**tickets, "folder": "01-tickets~2", "gate": "undecided", "hash": "55" * 32}
    write_lines(run / "lineage.jsonl", [cities, tickets, back, again, refused, mood])
    (run / "current").write_text("02-mood\n")
    (run / "tags.json").write_text(json.dumps({"shipped": "00-cities"}))
    probes = [{"step": at, "scores": {"cities": {"choice": 0.9 - at / 400}, "tickets": {"choice": at / 50}}} for at in (0, 20, 40)]
    new = limit("min_new_task", "tickets", 0.6, 0.825)
    write_commit(
        run / "tasks" / "00-cities",
        0,
        "cities",
        {"gate": gate("accept", limit("min_new_task", None, 0.7, 0.915))},
        predictions("cities", "11110", text),
    )
    write_commit(
        run / "tasks" / "01-tickets",
        1,
        "tickets",
        {"gate": gate("accept", limit("max_worst_task", "cities", 0.03, 0.0123))},
        predictions("cities", "00000", text),
    )
    write_commit(
        run / "tasks" / "01-tickets~2", 1, "tickets",
        {
            "gate": gate("undecided", new, limit("max_worst_task", "cities", 0.05, 0.041, "undecided", 3410)), "probes": probes,
            "probe_rows": {"cities": 16},
            "scores": {"choice": [0.875, 0.825, None]}, "forecast": {"overlap": {"cities": 0.617}, "expected_forgetting": None},
            "drift": {"kl": 0.4321, "base_kl": None, "prompts": 200, "tokens": 5123},
        },
        predictions("cities", "10001", text) + predictions("tickets", "111", text),
    )  # fmt: skip
    mood_metrics = {
        "scores": {"choice": [0.805, 0.785, 0.905]}, "forecast": {"overlap": {"cities": 0.21, "tickets": 0.34}, "expected_forgetting": 0.0456},
        "drift": {"kl": 0.1, "base_kl": 0.777, "prompts": 200, "tokens": 4000},
    }  # fmt: skip
    kept = gate(
        "accept", limit("max_forgetting", None, 0.05, 0.021), limit("max_drift_kl", None, 2.0, 0.1), limit("max_general_drop", "general", 0.1, -0.013)
    )
    write_commit(
        run / "tasks" / "02-mood",
        2,
        "mood",
        {**mood_metrics, "gate": kept},
        predictions("cities", "10001", text) + predictions("tickets", "100", text),
    )
    lost = [
        {"row": 17, "text": "where is Ulm", "answer": "germany", "before": "germany", "after": "calm"},
        {"row": 18, "text": "x", "answer": "y", "before": None, "after": "z"},
    ]
    broken = gate(
        "reject",
        limit("max_worst_task", "tickets", 0.05, 0.01),
        limit("max_worst_task", "cities", 0.05, 0.333, "broken"),
        **({"examples": {"cities": lost}} if text else {}),
    )
    write_commit(run / "rejected" / "02-mood", 2, "mood", {"gate": broken, "stopped_at": 30, "scores": {"choice": [0.1, 0.2, 0.9]}}, [])
    return run


def part(html: str, name: str) -> str:
    """The text of one part of a run's page."""
    body = html[html.index(f'id="run-1-{name}"') :]
    return " ".join(re.sub(r"<[^>]*>", " ", body.partition("<h3")[0].partition(">")[2]).split())


def test_the_gates_verdicts_name_each_limit_and_the_rows_behind_it(tmp_path: Path) -> None:
    said = part(report(make_durable(tmp_path / "first"))[0], "gate")
    assert re.findall(r"\d\. \w+: [a-z, ]+?(?= (?:\d+ limit))", said) == [
        "1. cities: accepted",
        "2. tickets: undecided, accepted",
        "3. mood: refused",
        "3. mood: accepted",
    ], "as they came"
    for shown in (
        "Score of cities, the new task kept 91.5 ≥ 70.0 48 of 120", "Drop of cities undecided 3 410 rows would decide 4.1 ≤ 5.0 48 of 120",
        "Drop of cities broken 33.3 ≤ 5.0", "Drop of tickets kept 1.0", "Mean drop of the earlier tasks kept 2.1", "Drift on the new prompts, nats kept 0.100 ≤ 2.000",
        "Drop of general, watched kept −1.3 ≤ 10.0", "by choice, alpha 0.05, beta 0.1, margin 2.0 points", "kept in rejected/02-mood", "ended at step 30",
    ):  # fmt: skip
        assert shown in said, shown
    assert said.index("broken") < said.index("Drop of tickets"), "what is broken stands first"
    assert "1.2 ≤ 3.0" not in said, "the verdict on a model that was rolled back is in the history only"


def test_rows_that_a_refused_model_lost_are_shown_where_words_were_stored(tmp_path: Path) -> None:
    said = part(report(make_durable(tmp_path / "first"))[0], "gate")
    assert "cities, 17 where is Ulm germany germany calm" in said and "cities, 18 x y — not measured z" in said
    assert "Rows it lost" not in part(report(make_durable(tmp_path / "other", text=False))[0], "gate")


def test_the_history_holds_refusals_rollbacks_tags_and_what_is_current(tmp_path: Path) -> None:
    html, page = report(make_durable(tmp_path / "first"))
    said = part(html, "record")
    for shown in (
        "1 learned 1. cities tag shipped accepted", "2 learned 2. tickets rolled back accepted", "3 rolled back to 1. cities — not measured", "4 learned 2. tickets undecided",
        "5 refused 3. mood kept aside in rejected/02-mood refused", "6 learned 3. mood current accepted",
    ):  # fmt: skip
        assert shown in said, shown
    assert "4 commits, 1 refusal, 1 rollback" in page.text and "2 accepted, 1 undecided and accepted, 1 refused" in page.text


def test_the_lineage_is_followed_as_the_run_follows_it() -> None:
    def learned(index: int, task: str, **more: str) -> dict[str, Any]:
        return {"kind": "task", "index": index, "task": task, "hash": "", **more}

    back = [{"kind": "rollback", "index": i, "task": t, "to": f"0{i}-{t}", "hash": ""} for i, t in ((0, "a"), (2, "c"))]
    refused = learned(3, "d") | {"kind": "reject"}
    lines = [learned(0, "a"), learned(1, "b"), learned(2, "c"), back[0], learned(1, "b", folder="01-b~2"), back[1], refused, learned(3, "d")]
    paths, head, began = follow(lines)
    assert head == ["00-a", "01-b", "02-c", "03-d"] and paths["01-b~2"] == ["00-a", "01-b~2"] and began == {"03-d": ["00-a", "01-b", "02-c"]}
    assert all(follow(lines[:k])[:2] == branches(lines[:k]) for k in range(len(lines) + 1)), "lineage.py says the same"


def test_an_undecided_model_that_was_held_is_told_from_one_that_was_accepted(tmp_path: Path) -> None:
    run = make_durable(tmp_path / "first")
    edit(run / "rejected" / "02-mood" / "metrics.json", gate=gate("undecided", limit("max_worst_task", "cities", 0.05, 0.06, "undecided", 90)))
    assert "3. mood: undecided, kept aside" in part(report(run)[0], "gate")
    edit(run / "rejected" / "02-mood" / "metrics.json", gate=gate("undecided", limit("max_forgetting", None, 0.05, 0.06, "undecided", 90)))
    assert "90 rows of each task would decide" in part(report(run)[0], "gate"), "of a mean"


def test_flipped_rows_are_counted_between_the_models_that_are_current(tmp_path: Path) -> None:
    html, page = report(make_durable(tmp_path / "first"))
    said = part(html, "flips")
    assert "after tickets −3 +1" in said, "cities went from 11110 to 10001"
    assert "after mood 0 −2" in said, "nothing of cities, two of tickets; 01-tickets was rolled back and counts nowhere"
    assert any("cities: of 5 rows 3 were right and are wrong, 1 were wrong and are right (choice)" in (c.get("title") or "") for c in page.all("td"))
    assert "cities, 1 tickets cities-answer-1 cities-right-1 cities-wrong-1" in said and "tickets, 2 mood tickets-answer-2" in said
    silent = part(report(make_durable(tmp_path / "other", text=False))[0], "flips")
    assert "−3 +1" in silent and "answer" not in silent.lower(), "no words where the run stored none"


def test_at_most_three_examples_a_task_and_only_of_scores_that_say_right_or_wrong(tmp_path: Path) -> None:
    run = make_durable(tmp_path / "first")
    write_lines(run / "tasks" / "00-cities" / "predictions.jsonl", predictions("cities", "1" * 9))
    write_lines(run / "tasks" / "01-tickets~2" / "predictions.jsonl", predictions("cities", "0" * 9))
    said = part(report(run)[0], "flips")
    assert "−9" in said and said.count("cities-wrong") == 3
    for folder, score in (("00-cities", 0.7), ("01-tickets~2", 0.2)):
        write_lines(run / "tasks" / folder / "predictions.jsonl", [{"row": 0, "task": "cities", "score": {"metric": score, "choice": None}}])
    assert "after tickets" not in (part(report(run)[0], "flips") if 'run-1-flips"' in report(run)[0] else "")


def test_watch_sets_flip_too(tmp_path: Path) -> None:
    run = make_durable(tmp_path / "first")
    edit(run / "matrix.json", watch={"general": {"choice": [0.5, 0.4, 0.3, 0.2]}})
    for folder, right in (("00-cities", "1111"), ("01-tickets~2", "1100"), ("02-mood", "1100")):
        with (run / "tasks" / folder / "predictions.jsonl").open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in predictions("general", right)))
    said = part(report(run)[0], "flips")
    assert "after tickets −3 +1" in said and "−2" in said and "general, 2 tickets" in said


def test_probes_are_drawn_inside_the_task_they_watched(tmp_path: Path) -> None:
    commit = Commit(
        "01-tickets",
        1,
        "tickets",
        {"probes": [{"step": k, "scores": {"a": {"choice": 0.5}}} for k in (0, 10, 20)], "protection": {"steps": 40}},
        tmp_path,
    )
    assert looks(commit, "a", "choice") == [(1.0, 0.5), (1.25, 0.5), (1.5, 0.5)] and looks(commit, "b", "choice") == []
    html, page = report(make_durable(tmp_path / "first"))
    assert len(re.findall('class="raw"', part_of_html(html, "curves"))) == 2, "cities and tickets, while tickets was learned"
    assert "live probes" in page.text and "live probes" not in report(make_run(tmp_path / "old"))[1].text


def part_of_html(html: str, name: str) -> str:
    return html[html.index(f'id="run-1-{name}"') :].partition("<h3")[0]


def test_a_curve_a_task_and_watch_set(tmp_path: Path) -> None:
    watch = {"general": {"choice": [0.625, 0.612, 0.6, 0.581]}}
    _, page = report(make_run(tmp_path / "first", watch=watch))
    said = [svg["aria-label"] or "" for svg in page.all("svg", **{"class": "small"})]
    assert [text.partition(",")[0] for text in said] == ["cities", "tickets", "mood", "general"]
    assert "Choice 62.5 before, 61.2 after 1, 60.0 after 2, 58.1 after 3" in said[3] and "Exact match 2.0 before, 88.6 after 3" in said[2]
    assert "80.5" in page.text, "the last value stands at the line's end"


def test_overlap_drift_and_forecast(tmp_path: Path) -> None:
    html, _ = report(make_durable(tmp_path / "first"))
    assert "tickets 61.7" in part(html, "protection") and "mood 21.0 34.0" in part(html, "protection")
    drift = part(html, "drift")
    assert "2. tickets 0.432 — not measured 200 5 123 — not measured 4.0" in drift, "4.0 is 91.5 less 87.5"
    assert "3. mood 0.100 0.777 200 4 000 4.6 5.5" in drift, "5.5 is the mean of 87.5 less 80.5 and of 82.5 less 78.5"


def test_the_observed_drop_is_of_the_score_that_the_forecast_speaks_of(tmp_path: Path) -> None:
    run = make_durable(tmp_path / "first")
    edit(run / "run.yaml", gate={"scorer": "exact_match"})
    edit(run / "tasks" / "02-mood" / "metrics.json", scores={"exact_match": [0.504, 0.605, 0.886]})
    said = part(report(run)[0], "drift")
    assert "4 000 4.6 19.8" in said and "by exact match" in said, "19.8 is the mean of 70.2 less 50.4 and of 80.3 less 60.5"


def test_a_refused_model_is_not_compared_with_a_branch_it_did_not_begin_from(tmp_path: Path) -> None:
    run = make_durable(tmp_path / "first")
    edit(run / "rejected" / "02-mood" / "metrics.json", drift={"kl": 3.0}, scores={"choice": [0.1, 0.2, 0.9]})
    assert "3. mood, refused 3.000" in part(report(run)[0], "drift") and "70.0" in part(report(run)[0], "drift")
    lines = (run / "lineage.jsonl").read_text().splitlines()
    (run / "lineage.jsonl").write_text("\n".join([lines[0], lines[1], lines[4], lines[2], lines[3], lines[5]]) + "\n")  # refused before the rollback
    assert "3. mood, refused 3.000" in part(report(run)[0], "drift") and "70.0" not in part(report(run)[0], "drift")


def test_overlap_with_all_that_is_protected_is_named_so(tmp_path: Path) -> None:
    run = make_durable(tmp_path / "first")
    edit(run / "tasks" / "02-mood" / "metrics.json", forecast={"overlap": {"protected": 0.123}, "expected_forgetting": None})
    assert "all that is protected" in part(report(run)[0], "protection") and "12.3" in part(report(run)[0], "protection")


def test_growth_of_the_protected_space(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first")
    space = {"modules": 210, "rank_mean": 23.4, "rank_max": 64, "bytes": 3 * 2**20}
    write_lines(
        run / "timing.jsonl", [done(i, t, space={**space, "share": (i + 1) / 10, "evicted": 0}) for i, t in enumerate(("cities", "tickets", "mood"))]
    )
    html, page = report(run)
    assert any("10.0 after cities; 20.0 after tickets; 30.0 after mood" in (svg["aria-label"] or "") for svg in page.all("svg"))
    assert "3. mood 210 23.4 64 30.0 3 MiB" in part(html, "protection") and "Evicted" not in page.text
    write_lines(run / "timing.jsonl", [done(0, "cities", space={**space, "share": 0.1, "evicted": 7})])
    assert "Evicted" in report(run)[1].text


def test_numbers_of_metrics_json_stand_in_where_timing_was_lost(tmp_path: Path) -> None:
    run = make_durable(tmp_path / "first")
    (run / "timing.jsonl").unlink()
    assert "3. mood 1.0e-07 1.0e-06 1.0e-05" in part(report(run)[0], "protection")


def test_what_led_to_a_model_that_is_not_current_is_not_in_the_loss_and_not_called_foreign(tmp_path: Path) -> None:
    run = make_durable(tmp_path / "first")
    timed = [step(0, "cities", 1, 2.0), step(1, "tickets", 1, 9.0), done(1, "tickets", train_seconds=1111.0)]
    again = [{**record, "folder": "01-tickets~2"} for record in (step(1, "tickets", 1, 3.0), done(1, "tickets", train_seconds=2222.0))]
    for records in ([*timed, *again], [timed[0], *again, *timed[1:]]):  # in either order
        write_lines(run / "timing.jsonl", records)
        _, page = report(run)
        assert "tickets from 3 to 3" in (page.all("svg", **{"class": "wide"})[0]["aria-label"] or "")
        assert "2222.0" in page.text and "1111.0" not in page.text and "Left out" not in page.text


def test_facts_say_what_wrote_the_run_and_what_it_kept(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first")
    (run / "run.yaml").write_text("# forgetless 0.9.1, torch 2.13.0, Python 3.11.7\nmodel: m\nmethod: {name: gorp}\nstore: nothing\n")
    text = report(run)[1].text
    assert "Versions forgetless 0.9.1, torch 2.13.0, Python 3.11.7" in text and "Kept of the data nothing: no text" in text


def test_a_folder_of_an_older_version_has_none_of_the_new_parts(tmp_path: Path) -> None:
    html, page = report(make_run(tmp_path / "first"))
    for name in ("gate", "flips", "drift", "watch"):
        assert f'id="run-1-{name}"' not in html, name
    for missing in ("verdicts", "rows that flipped", "probes inside tasks", "overlap between tasks", "drift"):
        assert missing in page.text.split("Not measured:")[1], missing


@pytest.mark.parametrize(
    "change",
    [
        {"gate": 3}, {"gate": gate("accept", {"outcome": []}, {"outcome": {}, "limit": [], "allowed": "x", "name": {}}, scorer=[1])},
        {"gate": {"outcome": 5, "criteria": "x", "examples": [1]}}, {"gate": gate("reject", {"limit": None}, examples={"cities": [None, {}]})},
        {"probes": "x"},
        {"probes": [{"step": "a", "scores": 3}]}, {"forecast": [], "drift": 4}, {"forecast": {"overlap": {"cities": "much"}}}, {"protection": None}, {"scores": []},
    ],
    ids=lambda change: json.dumps(change)[:40],
)  # fmt: skip
def test_a_part_that_is_malformed_is_no_reason_to_have_no_report(tmp_path: Path, change: dict[str, Any]) -> None:
    run = make_durable(tmp_path / "first")
    for folder in ("tasks/01-tickets~2", "rejected/02-mood"):
        edit(run / folder / "metrics.json", **change)
    assert "91.5" in report(run)[1].text and write_markdown([run], run / "report.md") and model_card(run)


def test_metrics_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    run = make_durable(tmp_path / "first")
    (run / "tasks" / "02-mood" / "metrics.json").write_text('{"index": 2, "ta')
    assert "1 unreadable metrics.json" in report(run)[1].text


def test_a_name_in_the_lineage_leads_nowhere_outside(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first")
    write_commit(tmp_path / "outside", 0, "cities", {"gate": gate("reject", limit("max_forgetting", None, 0.1, 0.777, "broken"))}, [])
    (run / "rejected").mkdir()
    write_lines(run / "lineage.jsonl", [{"kind": "reject", "index": 0, "task": "cities", "folder": "../../outside", "hash": "ab" * 32}])
    assert "77.7" not in report(run)[1].text


def test_of_a_hundred_limits_that_were_kept_the_nearest_are_shown(tmp_path: Path) -> None:
    run = make_durable(tmp_path / "first")
    many = [limit("max_worst_task", f"task-{k}", 0.05, k / 4000) for k in range(100)]
    edit(run / "tasks" / "02-mood" / "metrics.json", gate=gate("accept", *many))
    said = part(report(run)[0], "gate")
    assert "100 limits kept" in said and "and 88 more that were kept" in said and "Drop of task-99" in said and "Drop of task-3 " not in said


# ---- text from data, in a page and in Markdown

HOSTILE = f"{EVIL}| `x` **b** [a](http://b.c) ![i](j) </td></details>\n# head\n\u202e$y$ @someone"


def make_hostile(path: Path) -> Path:
    """A durable run in which every text that comes from data is markup."""
    run = make_durable(path)
    for folder in ("tasks/00-cities", "tasks/01-tickets~2", "tasks/02-mood", "rejected/02-mood"):
        for name in ("metrics.json", "predictions.jsonl"):
            file = run / folder / name
            said = file.read_text()
            for word in ("cities", "where is Ulm", "germany", "calm", "right", "wrong", "choice", "keep"):
                said = said.replace(word, json.dumps(HOSTILE)[1:-1])
            file.write_text(said)
    tasks = [HOSTILE, "tickets", "mood"]
    edit(run / "matrix.json", tasks=tasks, n={HOSTILE: 5, "tickets": HOSTILE}, watch={HOSTILE: {HOSTILE: [0.5, 0.4]}}, metric_of={HOSTILE: HOSTILE})
    matrix_text = (run / "matrix.json").read_text().replace('"choice"', json.dumps(HOSTILE))
    (run / "matrix.json").write_text(matrix_text)
    lines = [json.loads(line) for line in (run / "lineage.jsonl").read_text().splitlines()]
    write_lines(
        run / "lineage.jsonl",
        [
            {**line, "gate": HOSTILE, "task": HOSTILE if line["index"] == 0 else line["task"], "model_sha256": HOSTILE, "hash": HOSTILE}
            for line in lines
        ],
    )
    (run / "lineage.jsonl").write_text((run / "lineage.jsonl").read_text().replace('"kind": "rollback"', f'"kind": {json.dumps(HOSTILE)}'))
    (run / "tags.json").write_text(json.dumps({HOSTILE: "01-tickets~2"}))
    settings = {
        "model": HOSTILE,
        "method": {"name": HOSTILE},
        "seed": HOSTILE,
        "store": HOSTILE,
        "tasks": [{"name": HOSTILE, "suite": HOSTILE, "format": HOSTILE, "data": HOSTILE}],
    }
    (run / "run.yaml").write_text(f"# forgetless {EVIL}, torch\n" + json.dumps({**settings, "evaluate": {"split": HOSTILE}}))
    return run


def test_hostile_rows_answers_prompts_and_names_stay_text_in_the_page(tmp_path: Path) -> None:
    html, page = report(make_hostile(tmp_path / "first"))
    assert "<script" not in html.lower() and not page.all("script") and not page.all("b", onclick="x")
    assert page.text.count("<script>alert(1)</script>") > 40
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert {attrs["href"] for attrs in page.all("a")} == {
        f"#run-1-{n}" for n in ("accuracy metrics curves gate flips watch failures loss protection drift cost record".split())
    }


def markdown_tokens(text: str) -> list[Any]:
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)


def check_markdown(text: str) -> None:
    """Tables are whole, and of HTML there is only <code> around plain text."""
    tokens = markdown_tokens(text)
    assert not [t.content for t in tokens if t.type in ("html_block", "code_block")]
    inline = [child for token in tokens for child in token.children or ()]
    assert {child.content for child in inline if child.type == "html_inline"} <= {"<code>", "</code>"}
    assert not [c for c in inline if c.type in ("image", "em_open", "code_inline") and "someone" in c.content]
    assert all(c.attrs["href"].startswith("https://arxiv.org/abs/") for c in inline if c.type == "link_open")
    cells: list[int] = []
    for token in tokens:
        if token.type in ("table_open", "tr_open"):
            cells = [] if token.type == "table_open" else [*cells, 0]
        elif token.type in ("td_open", "th_open"):
            cells[-1] += 1
        elif token.type == "table_close":
            assert len(set(cells)) == 1 and len(cells) > 1, cells
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == sum(t.type == "tr_open" for t in tokens) + sum(t.type == "table_open" for t in tokens), (
        "every line that looks like a row is one"
    )


def test_hostile_text_can_neither_end_a_cell_nor_become_markup_in_markdown(tmp_path: Path) -> None:
    run = make_hostile(tmp_path / "first")
    text = write_markdown([run], tmp_path / "report.md").read_text()
    check_markdown(text)
    card = model_card(run)
    check_markdown(card.partition("\n---\n")[2].partition("```")[0])
    for said in (text, card):
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in said and "<script" not in said and "\u202e" not in said
        headings = [line for line in said.splitlines() if line.startswith("#")]
        assert not [line for line in headings if line == "# head"]


def test_escaped_text_reads_as_it_was() -> None:
    from markdown_it import MarkdownIt

    for text in ("a|b", "x_y", "_x_", "*a*", "<b>&amp;", "`c`", "\\|", "[a](b)", "$x$", "#1", "www.a.b", "a: b", "C:\\d", "http://a.b"):
        inline = MarkdownIt("commonmark").enable("table").parse(f"| h |\n| --- |\n| {plain(text)} |")
        assert "".join(c.content for t in inline for c in t.children or ()) == "h" + text, text


# ---- report.md


def test_markdown_holds_the_same_numbers(tmp_path: Path) -> None:
    run = make_durable(tmp_path / "first")
    out = write_markdown([run], tmp_path / "report.md")
    text = out.read_text()
    check_markdown(text)
    for shown in (
        "91.5 (87–95)", "| Backward transfer | −7.5 |", "| **3. mood: refused** | Drop of cities | **broken** | ≤ 5.0 | 33.3 | 48 of 120 |",
        "undecided, 3\u2009410 rows would decide",
        "| after tickets | −3 (+1) |", "<code>where is Ulm</code>", "| 3 | rolled back to 1. cities |", "3.1e-07", "| tickets | 61.7 |", "0.432", "Not measured:",
    ):  # fmt: skip
        assert shown in text, shown
    assert text == write_markdown([run], tmp_path / "again.md").read_text()


def test_markdown_compares_runs(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "a"), make_run(tmp_path / "b", method="seqft")
    edit(two / "matrix.json", metrics={"choice": {"average_accuracy": 0.4}})
    text = write_markdown([one, two], tmp_path / "both.md").read_text()
    check_markdown(text)
    assert "# 2 runs compared" in text and "| b | seqft | 0 | 40.0 |" in text and "**83.2**" in text and text.count("\n## ") == 2


# ---- the model card


def card_data(run: Path) -> tuple[Any, str]:
    from huggingface_hub import ModelCard

    card = ModelCard(model_card(run))
    return card.data, card.text


def test_a_card_is_what_the_hub_reads(tmp_path: Path) -> None:
    run = make_durable(tmp_path / "first")
    edit(
        run / "run.yaml",
        model="Qwen/Qwen3-0.6B",
        store="rows",
        tasks=[{"name": "cities", "suite": "demo/cities"}, {"name": "tickets", "data": "/home/me/secret/t.jsonl"}],
    )
    data, text = card_data(run)
    assert data.to_dict() == {
        "base_model": "Qwen/Qwen3-0.6B", "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["continual-learning", "forgetless", "gorp"],
    }  # fmt: skip
    check_markdown(text.partition("```")[0])
    for shown in (
        "| 1 | cities | demo/cities |", "| 2 | tickets | a local file |", "91.5 (87–95)", "cities (n = 200)", "| Forgetting | 7.5 |", "**broken**", "`store: rows`",
        "[arXiv 2507.02503](https://arxiv.org/abs/2507.02503)", "AutoModelForCausalLM.from_pretrained(name)",
    ):  # fmt: skip
        assert shown in text, shown
    assert [line for line in text.splitlines() if line.startswith("## ")][-1] == "## How to load", "an export puts its own words there"
    assert "secret" not in text and str(tmp_path) not in text, "nothing of this machine"
    assert "where is Ulm" not in text and "cities-answer" not in text, "no rows, even where the run stored them"


def test_a_card_of_a_local_or_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "first")
    assert card_data(run)[0].base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    edit(run / "run.yaml", model="/data/models/inhouse")
    data, text = card_data(run)
    assert data.base_model is None and "inhouse" not in text and "A local model" in text
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    edit(run / "run.yaml", model="models/mine")
    assert card_data(run)[0].base_model is None, "a folder here, not an id"


def test_a_card_of_an_encoder_decoder(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first")
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text(json.dumps({"is_encoder_decoder": True}))
    data, text = card_data(run)
    assert data.pipeline_tag == "text2text-generation" and "AutoModelForSeq2SeqLM.from_pretrained" in text


def test_a_card_of_several_models_does_not_promise_one(tmp_path: Path) -> None:
    text = card_data(make_run(tmp_path / "first", method="routed"))[1]
    assert "forgetless export" in text and "from_pretrained" not in text


def test_a_card_runs_no_module_of_a_users_own_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_method.py").write_text("raise SystemExit('was run')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "evil" in model_card(make_run(tmp_path / "first", method="evil_method:Evil"))


def test_a_card_is_a_function_of_the_folder_and_writes_nothing(tmp_path: Path) -> None:
    run = make_durable(tmp_path / "first")
    before = sorted(p.as_posix() for p in tmp_path.rglob("*"))
    assert model_card(run) == model_card(str(run)) and sorted(p.as_posix() for p in tmp_path.rglob("*")) == before
    assert write_card(run, tmp_path / "README.md").read_text() == model_card(run)


def test_the_command_writes_each_format(tmp_path: Path, forgetless_: Any) -> None:
    run = make_run(tmp_path / "first")
    for form, name, begins in (
        ("html", "report.html", "<!doctype html>"),
        ("md", "report.md", "# What was learned"),
        ("card", "card.md", "---\nbase_model"),
    ):
        status, out, _ = forgetless_("report", str(run), "--format", form)
        assert status == 0 and out.strip() == str(run / name) and (run / name).read_text().lstrip().startswith(begins)
    assert forgetless_("report", str(run), "--format", "pdf")[0] == 2
    status, _, err = forgetless_("report", str(run), str(run), "--format", "card")
    assert status == 2 and "of one run" in err


# ---- in a browser


def screenshots() -> Any:
    spec = importlib.util.spec_from_file_location("report_screenshot", Path(__file__).parents[1] / "benchmarks" / "scripts" / "report_screenshot.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_screenshot_script_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = screenshots()
    monkeypatch.setattr(sys, "argv", ["report_screenshot.py", str(make_run(tmp_path / "first"))])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert script.main() == 1 and "apt-get install chromium" in capsys.readouterr().err


needs_chromium = pytest.mark.skipif(screenshots().browser() is None, reason=screenshots().INSTALL)


@needs_chromium
def test_a_hostile_page_runs_nothing_fetches_nothing_and_fits_a_phone(tmp_path: Path) -> None:
    script, page = screenshots(), write_report([make_hostile(tmp_path / "first")], tmp_path / "report.html")
    with script.started(script.browser()) as browser:
        for device in script.DEVICES:
            for shade in script.SHADES:
                picture = tmp_path / f"{device}-{shade}.png"
                found = script.look(browser, page, device, shade, picture, 1200)
                assert script.faults(found) == [] and picture.read_bytes().startswith(b"\x89PNG")
        assert browser.evaluate("document.body.innerText").count("<script>alert(1)</script>") > 40
        assert "[object" not in browser.evaluate("document.body.innerText") and "<built-in" not in browser.evaluate("document.body.innerText")


@needs_chromium
def test_the_browser_check_sees_what_it_looks_for(tmp_path: Path) -> None:
    script = screenshots()
    pages = {
        "dialog": "<p>x<script>alert(1)</script>", "script elements": "<p>x<script>1</script>", "exception": "<p>x<script>throw 1</script>",
        "console": "<p>x<script>console.log(1)</script>",
        "request": "<p>x<img src='file:///nowhere.png'>", "pixels wide": "<p style='width: 500px'>x", "empty": "",
    }  # fmt: skip
    with script.started(script.browser()) as browser:
        for what, body in pages.items():
            page = tmp_path / "page.html"
            page.write_text(f"<!doctype html><meta name=viewport content='width=device-width'>{body}")
            assert what in " ".join(script.faults(script.look(browser, page, "phone", "light", None))), what

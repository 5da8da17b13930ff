"""The report: the numbers of a run are on the page, what came from data stays text, and what was not measured is said, not guessed."""

from __future__ import annotations

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
from forgetless.report import loss_chart, nice_ceiling, percent, running_mean, thinned, write_report

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
    for shown in ("41.3", "61.2", "9.5", "1.50 GiB", "3.1e-07", "2.2e-05", "4.4e-05", "210", "23.4", "64", "4.1", "93.7 %", "0.42 %"):
        assert shown in page.text, shown
    assert "abababababab" in page.text and "ab" * 7 not in page.text and "cdcdcdcdcdcd" in page.text
    assert '"rank": 8' in page.text, "the configuration as resolved"
    assert "3 × 200" in page.text


def test_a_cell_says_its_n_and_interval(tmp_path: Path) -> None:
    _, page = report(make_run(tmp_path / "first"))
    assert any(cell.get("title") == "cities: 91.5 %, n = 200, 95 % interval 87.2 to 95.2 %" for cell in page.all("td"))
    assert "87–95" in page.text


def test_cells_not_measured_are_hatched_and_never_zero(tmp_path: Path) -> None:
    _, page = report(make_run(tmp_path / "first", failures=None))
    hatched = page.all("td", **{"class": "hatched"})
    assert len(hatched) == 3 + 3 + 1, "the upper triangle of both scorers, and one cell before training"
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
    assert [len(re.findall("<t[dh]", row)) for row in table.split("<tr>")[1:]] == [14, 14], "every row has a cell for every column"


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
    assert len(page.all("svg")) == 1
    assert all(svg.get("role") == "img" and "cities from 2.48 to 1.5 in 40 steps" in (svg.get("aria-label") or "") for svg in page.all("svg"))
    assert all(header.get("scope") in {"row", "col", "colgroup"} for header in page.all("th"))
    assert len(page.all("table")) == len(page.all("thead")) == 9


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
    for said in ("No loss was recorded", "No cost and no leak was recorded", "No coverage", "No lineage", "No metrics"):
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
    assert not page.all("svg") and "91.5" in page.text


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
    assert "cities from 2 to 2 in 20 steps" in (page.all("svg")[0]["aria-label"] or "")
    assert "2222.0" in page.text and "1111.0" not in page.text


def test_resumed_from_a_checkpoint_keeps_the_steps_before_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first")
    write_lines(run / "timing.jsonl", [step(0, "cities", at, 3.0) for at in range(1, 31)] + [step(0, "cities", at, 1.0) for at in range(21, 41)])
    _, page = report(run)
    assert "cities from 3 to 1 in 40 steps" in (page.all("svg")[0]["aria-label"] or "")
    assert len((page.all("polyline")[0]["points"] or "").split()) == 40, "steps 21 to 30 are drawn once"


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
    assert [a["href"] for a in page.all("a")] == ["#run-1", "#run-2"] and page.all("article", id="run-2")


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


def test_no_torch_needed() -> None:
    code = "import sys, forgetless.report; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
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
    assert len(page.all("table")) == 10 and "3 × 200" in page.text, "the summary counts the tasks' rows only"


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

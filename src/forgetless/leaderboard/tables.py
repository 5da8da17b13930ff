"""The tables of one stream and prompt, in Markdown: a line a row, its name first."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import Any

from ..report.markdown import plain, table
from .analysis import Estimate, Group, RowResult
from .comparing import average, compared

BOUNDS = ("mtl", "per_task")  # no contestants: they read old data, or are told the task
SIGNED = ("backward_transfer", "forward_transfer", "intransigence")


def main_table(group: Group) -> list[str]:
    one, own = group.scorer, "choice" if group.scorer == "choice" else plain(group.scorer)
    second = "exact_match" if one != "exact_match" else None
    head = ["row", "seeds", f"{own} AA", f"{own} BWT", f"{own} LA", *(["exact AA", "exact BWT"] if second else [])]
    head += ["minus seqft", "minus mtl", "against seqft", "words", "optimizer MB", "kept MB", "stored", "CPU s"]
    body = []
    for row in group.rows:
        numbers = [number(row, one, "average_accuracy"), number(row, one, "backward_transfer"), number(row, one, "learning_accuracy")]
        numbers += [number(row, second, "average_accuracy"), number(row, second, "backward_transfer")] if second else []
        body.append([
            plain(row.name), str(len(row.cells)), *numbers,
            *(interval(row.minus.get(reference, {}).get(one)) for reference in ("seqft", "mtl")), row.verdicts.get("seqft"),
            percent(row.drift.share) if row.drift else None, megabytes(row.costs.optimizer), megabytes(row.costs.kept),
            None if row.costs.stored_rows is None else f"{row.costs.stored_rows:,.0f}", seconds(row),
        ])  # fmt: skip
    return table(head, body)


def more_table(group: Group) -> list[str]:
    """The rest of the metrics, in columns of which any row has a number."""
    one = group.scorer
    columns = {
        f"{plain(one)} AA [95 %]": lambda row: bounded(row, one, "average_accuracy"),
        "BWT [95 %]": lambda row: bounded(row, one, "backward_transfer"),
        "forgetting": lambda row: number(row, one, "forgetting"),
        "worst task": lambda row: number(row, one, "worst_forgetting"),
        "FWT": lambda row: number(row, one, "forward_transfer"),
        "intransigence": lambda row: number(row, one, "intransigence"),
        "calibrated AA": lambda row: number(row, "calibrated", "average_accuracy"),
        "calibrated BWT": lambda row: number(row, "calibrated", "backward_transfer"),
        "exact minus seqft": lambda row: interval(row.minus.get("seqft", {}).get("exact_match")) if one != "exact_match" else None,
        "exact BWT by words": lambda row: f"{row.drift.bwt_words:+.3f}" if row.drift else None,
        "exact BWT, the rest": lambda row: f"{row.drift.bwt_rest:+.3f}" if row.drift else None,
        "wrong within the set": lambda row: percent(row.drift.within / row.drift.failed) if row.drift and row.drift.failed else None,
        "CPU s over seqft": lambda row: None if row.costs.against is None else f"{row.costs.against:.2f}",
        "worst update leak": lambda row: None if row.costs.update_leak is None else f"{row.costs.update_leak:.1e}",
        "old inputs protected": lambda row: percent(row.costs.inputs),
        "old outputs changed": lambda row: None if row.costs.change is None else f"{row.costs.change:.4f}",
    }
    return of_columns("row", [(plain(row.name), row) for row in group.rows], columns)


def of_columns(first: str, rows: list[tuple[str, Any]], columns: Mapping[str, Any]) -> list[str]:
    filled = {title: [column(row) for _, row in rows] for title, column in columns.items()}
    filled = {title: cells for title, cells in filled.items() if any(cell is not None for cell in cells)}
    body = [[name, *(cells[i] for cells in filled.values())] for i, (name, _) in enumerate(rows)]
    return table([first, *filled], body) if filled else []


def peers_table(group: Group) -> list[str]:
    """Each of our rows against each peer row, by the criterion."""
    peers = [row for row in group.rows if row.peer]
    ours = [row for row in group.rows if not row.peer and row.name not in BOUNDS]
    if not peers or not ours:
        return []
    return table(
        ["row against peer", *(plain(peer.name) for peer in peers)],
        [[plain(row.name), *(compared(row.cells, peer.cells) for peer in peers)] for row in ours],
        left=len(peers) + 1,
    )


def diverged(group: Group | None) -> str:
    found = sorted(group.diverged, key=lambda cell: (cell.row, cell.seed)) if group else []
    return "Diverged: " + "; ".join(f"{plain(cell.row)}, seed {cell.seed} ({plain(cell.failed)})" for cell in found) + "." if found else ""


def extras(group: Group) -> list[list[str] | str]:
    """Relearning, unseen tasks and general ability, where cells have them: means over the seeds that do."""
    found: list[list[str] | str] = []
    if curves := relearning(group):
        found += [
            "Relearning: the score of an earlier task after so many steps of 8 of its rows, and of each seed the steps that brought it back:",
            curves,
        ]
    unseen = {row.name: [unseen_scores(cell.unseen, group.scorer) for cell in row.cells if cell.unseen] for row in group.rows}
    general = {row.name: [general_scores(cell.general) for cell in row.cells if cell.general] for row in group.rows}
    for measured, title in (
        (unseen, f"Tasks never trained, {group.scorer} of the untouched model and after the last task:"),
        (general, "General ability by lm-eval, of the untouched model and after the last task:"),
    ):
        names = list(dict.fromkeys(name for runs in measured.values() for run in runs for name in run))
        body = []
        for row, runs in measured.items():
            each = [[run[name] for run in runs if name in run] for name in names]
            if runs := [run for run in runs if run]:
                changes = [mean(after - before for before, after in run.values()) for run in runs]
                shown = [f"{mean(b for b, _ in one):.3f}, {mean(a for _, a in one):.3f}" if one else None for one in each]
                body.append([plain(row), str(len(runs)), *shown, f"{mean(changes):+.3f}"])
        if body:
            found += [title, table(["row", "seeds", *(plain(name) for name in names), "mean change"], body)]
    if lines := text_of_no_task(group):
        found += ["Text of no task, by the last model: perplexity, and KL from the untouched model:", lines]
    return found


def unseen_scores(content: Mapping[str, Any], scorer: str) -> dict[str, tuple[float, float]]:
    """{task: (before, after)} of what evaluation/unseen.py found."""
    return {task: (scores[scorer][0], scores[scorer][1]) for task, scores in content["tasks"].items() if scorer in scores}


def general_scores(content: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """{suite: (before, after)} of a cell's general ability."""
    return {name: (suite["before"], suite["after"]) for name, suite in content.get("suites", {}).items()}


def text_of_no_task(group: Group) -> list[str]:
    """What cells made by benchmarks/scripts/osft_comparison.py hold: perplexity of text of no task, and its KL from the untouched model."""
    body = []
    for row in group.rows:
        if found := [cell.general["text"] for cell in row.cells if cell.general and "text" in cell.general]:
            body.append(
                [plain(row.name), str(len(found)), f"{mean(one['perplexity'] for one in found):.2f}", f"{mean(one['kl'] for one in found):.3f}"]
            )
    return table(["row", "seeds", "perplexity", "KL"], body) if body else []


def relearning(group: Group) -> list[str]:
    """What evaluation/relearn.py wrote of each row's runs, a line a task."""
    of = {row.name: [cell.relearning for cell in row.cells if cell.relearning] for row in group.rows}
    steps = next((found["steps"] for runs in of.values() for found in runs), [])
    body = []
    for name, runs in of.items():
        for task in dict.fromkeys(task for found in runs for task in found["tasks"]):
            entries = [found["tasks"][task] for found in runs if found["steps"] == steps and task in found["tasks"]]
            curves = [entry["relearned"]["scores"][group.scorer] for entry in entries]
            back = [[entry[kind]["back_after"][group.scorer] for entry in entries if kind in entry] for kind in ("relearned", "control")]
            values = [average(entry["learned"][group.scorer] for entry in entries), *(average(column) for column in zip(*curves, strict=True))]
            body.append([
                plain(name), plain(task), *(None if v is None else f"{v:.3f}" for v in values),
                *(", ".join("not" if n is None else str(n) for n in one) or None for one in back),
            ])  # fmt: skip
    head = ["row", "task", "when learned", *(f"{n} steps" for n in steps), "back after", "untouched model"]
    return table(head, body, left=2) if body else []


# -- numbers as text -----------------------------------------------------------------------------------------------------------------


def given(e: Estimate | None, sign: str = "") -> str | None:
    return None if e is None else f"{e.mean:{sign}.3f}" + (f" ± {e.spread:.3f}" if e.spread is not None else "")


def number(row: RowResult, scorer: str, metric: str) -> str | None:
    return given(row.metrics.get(scorer, {}).get(metric), "+" if metric in SIGNED else "")


def interval(e: Estimate | None, sign: str = "+") -> str | None:
    return None if e is None else f"{e.mean:{sign}.3f}" + (f" [{e.low:{sign}.3f}, {e.high:{sign}.3f}]" if e.low is not None else "")


def bounded(row: RowResult, scorer: str, metric: str) -> str | None:
    e = row.metrics.get(scorer, {}).get(metric)
    return None if e is None or e.low is None else interval(e, "+" if metric in SIGNED else "")


def percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.0f} %"


def megabytes(n: float | None) -> str | None:
    return None if n is None else f"{n / 1e6:,.1f}"


def seconds(row: RowResult) -> str | None:
    spent = row.costs.seconds
    return None if spent is None else f"{spent.mean:,.0f}{' wall' if row.costs.wall else ''}"

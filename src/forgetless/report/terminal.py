"""The accuracy matrix as a table on stdout."""

from __future__ import annotations

from ..evaluation.matrix import AccuracyMatrix


def print_matrix(matrix: AccuracyMatrix, scorer: str, title: str) -> None:
    """Rows: after each task; columns: tasks; cells in %."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{title}, {scorer} (%)", title_justify="left")
    table.add_column("after")
    for task in matrix.tasks:
        table.add_column(task, justify="right")
    if matrix.before is not None:
        table.add_row("(untouched)", *map(_cell, matrix.before))
    for task, row in zip(matrix.tasks, matrix.rows, strict=False):
        table.add_row(task, *map(_cell, row))
    console = Console()
    console.print(table)
    m = matrix.metrics()
    names = {
        "average_accuracy": "average accuracy",
        "backward_transfer": "backward transfer",
        "learning_accuracy": "learning accuracy",
        "forgetting": "forgetting",
    }
    console.print("  ".join(f"{label} {_signed(m[key], key)}" for key, label in names.items() if m[key] is not None), highlight=False)


def print_watch(watch: dict[str, dict[str, list[float | None]]], last: str) -> None:
    """One row for each score of each watch set: before the first task, after the task `last`, and the difference, in %. What lies between is in the report."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="watched, never trained (%)", title_justify="left")
    table.add_column("watch set")
    table.add_column("score", no_wrap=True)
    for name in ("before", f"after {last}", "change"):
        table.add_column(name, justify="right")
    for name, scores in watch.items():
        for scorer, (before, *_, now) in scores.items():
            change = "" if None in (before, now) else f"{100 * (now - before):+.1f}"
            table.add_row(name, scorer, _cell(before), _cell(now), change)
    Console().print(table)


def _cell(score: float | None) -> str:
    return "" if score is None else f"{100 * score:.1f}"


def _signed(value: float, key: str) -> str:
    return f"{100 * value:+.1f}" if key == "backward_transfer" else f"{100 * value:.1f}"

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


def _cell(score: float | None) -> str:
    return "" if score is None else f"{100 * score:.1f}"


def _signed(value: float, key: str) -> str:
    return f"{100 * value:+.1f}" if key == "backward_transfer" else f"{100 * value:.1f}"

"""Write a report: report.html (one file, no network, no script), report.md, or a model card, whole or not at all, and the same bytes from the same folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from forgetless.errors import DataError

from .card import model_card
from .markdown import runs_in_markdown
from .read import read_run
from .scores import METRICS, OWN, SCORERS, summary_view
from .views import run_view


def write_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write the HTML report of `run_dirs` (one or several, in the order given) to `out` and return `out`.

    Raises:
        DataError: no run folder given; a folder is missing, empty or not a run; run.yaml or matrix.json is missing or malformed.
    """
    runs, scorers = views_of(run_dirs)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8"))
    return write_whole(out, template.render(runs=runs, summary=summary_view(runs, scorers), scorers=scorers, metric_text=METRICS))


def write_markdown(run_dirs: Sequence[Path], out: Path) -> Path:
    """The same numbers as tables in Markdown, for a pull request or a wiki. Raises DataError as write_report does."""
    runs, scorers = views_of(run_dirs)
    return write_whole(out, runs_in_markdown(runs, summary_view(runs, scorers), scorers))


def write_card(run_dir: Path, out: Path) -> Path:
    """The Hugging Face model card of the run's current model. Raises DataError as write_report does."""
    return write_whole(out, model_card(run_dir))


def views_of(run_dirs: Sequence[Path]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """(the view of each run, {scorer: its title} of the columns that compare them)."""
    if not run_dirs:
        raise DataError("no run folder to report on: name at least one, such as runs/first")
    paths = [Path(run_dir) for run_dir in run_dirs]
    names = [path.resolve().name for path in paths]
    runs = [run_view(read_run(path, name if names.count(name) == 1 else path.as_posix())) for path, name in zip(paths, names, strict=True)]
    return runs, ({"metric": OWN} if any("metric" in run["metrics"] for run in runs) else {}) | SCORERS


def write_whole(out: Path, text: str) -> Path:
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.tmp")
    partial.write_bytes(text.encode("utf-8", "replace"))  # a lone surrogate in a prompt is no reason to have no report
    os.replace(partial, out)
    return out

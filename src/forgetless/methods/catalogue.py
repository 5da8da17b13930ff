"""What `forgetless methods` and the README's table say of the methods, from the methods themselves: their class attributes, their file's docstring, their options.

python -m forgetless.methods.catalogue        # the README's table
"""

from __future__ import annotations

import inspect
import json
import sys
import textwrap
from typing import Any

from . import REGISTRY, get, get_class

QUESTIONS = {
    "needs_old_data": "old data", "stores": "stores", "needs_task_id": "task id", "extra_forward": "beside a plain step", "bytes_a_task": "bytes a task",
}  # fmt: skip


def rows(names: list[str] | None = None) -> list[dict[str, Any]]:
    """One object a method. Raises ConfigError for a name that the registry does not have."""
    return [_row(name) for name in names or REGISTRY]


def _row(name: str) -> dict[str, Any]:
    cls, method = get_class(name), get(name)
    options = {
        key: {
            "default": field.get_default(call_default_factory=True),
            "type": str(field.annotation).replace("typing.", ""),
            "help": _line(field.description),
        }
        for key, field in cls.Options.model_fields.items()
    }
    needs = {key: getattr(method, key) for key in QUESTIONS}
    about = {"summary": cls.summary, "paper": cls.paper, "kind": method.kind, "constrained": method.constrained}
    return {"name": name, **about, **needs, "grows": grows(method), "options": options}


def grows(method: Any) -> bool:
    """Does its memory grow with every task?"""
    return not method.bytes_a_task.startswith("none")


def _line(text: str | None) -> str:
    return " ".join((text or "").split())


def listing(found: list[dict[str, Any]]) -> str:
    """One line a method, and what its last columns mean."""
    lines = [f"{'method':<11}{'old data':<10}{'grows':<7}{'task id':<9}{'extra pass':<12}what it does"]
    for row in found:
        marks = ("yes" if row["needs_old_data"] else "-", "yes" if row["grows"] else "-", "yes" if row["needs_task_id"] else "-")
        extra = "yes" if row["extra_forward"] else "-"
        paper = f" ({row['paper']})" if row["paper"] else ""
        lines.append(f"{row['name']:<11}{marks[0]:<10}{marks[1]:<7}{marks[2]:<9}{extra:<12}{row['summary']}{paper}")
    return "\n".join(
        [*lines, "", "old data: needs rows of earlier tasks. grows: its memory does, with every task. forgetless methods NAME says more of each."]
    )


def page(row: dict[str, Any]) -> str:
    """A method's file on top, what it needs, and its options."""
    doc = inspect.cleandoc(sys.modules[get_class(row["name"]).__module__].__doc__ or "")
    lines = [f"{row['name']}: {row['summary']}", "", doc, ""]
    for key, question in QUESTIONS.items():
        answer = {True: "yes", False: "no"}.get(row[key], row[key]) if isinstance(row[key], bool) else row[key] or "nothing"
        lines.append(f"{question:<20} {answer}")
    lines += ["", "options" if row["options"] else "no options"]
    for key, option in row["options"].items():
        lines.append(f"  {key}: {json.dumps(option['default'])}")
        lines += textwrap.wrap(option["help"], 120, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


MADE_BY = "from the registry: python -m forgetless.methods.catalogue"


def markdown(found: list[dict[str, Any]]) -> str:
    """The README's table."""
    lines = [
        "| method | what it does | old data | grows by, a task | task id at test | beside a plain step | paper |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        paper = row["paper"]
        if paper.startswith("arXiv "):
            paper = f"[{paper.removeprefix('arXiv ')}](https://arxiv.org/abs/{paper.removeprefix('arXiv ')})"
        old = row["stores"] if row["stores"] != "nothing" else "read again" if row["needs_old_data"] else ""
        _, _, held = row["bytes_a_task"].partition("; ")
        grown = row["bytes_a_task"] if row["grows"] else f"nothing; holds {held}" if held else ""
        cells = [f"`{row['name']}`", row["summary"], old, grown, "yes" if row["needs_task_id"] else "", row["extra_forward"], paper]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(rows()))

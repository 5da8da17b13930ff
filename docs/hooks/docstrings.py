"""Docstrings are plain prose: what Markdown would take for markup in them (R[i][j], ||dW||, M_T, <name>) is escaped, and a doctest becomes a block of Python."""

from __future__ import annotations

import re
from typing import Any

import griffe

MARKUP = re.compile(r"([\[\]<>*_|~^])")


class Prose(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """A docstring in Markdown: code spans and indented lines as they are, doctests fenced, everything else escaped."""
    lines, prompt = [], False
    for line in text.splitlines():
        if line.startswith(">>> ") and not prompt:
            lines.append("```pycon")
            prompt = True
        elif prompt and not line.strip():
            lines.append("```")
            prompt = False
        elif line.startswith("- ") and lines and lines[-1].strip() and not lines[-1].startswith("- "):
            lines.append("")
        lines.append(
            line
            if prompt or line.startswith("    ")
            else "".join(part if part.startswith("`") else MARKUP.sub(r"\\\1", part) for part in re.split(r"(`[^`]*`)", line))
        )
    return "\n".join([*lines, "```"] if prompt else lines)

"""What README.md and docs/ hold that can be run or followed: fenced blocks, the commands in them, links. Read as text, so that what a reader sees is what is tested."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md"))]
MARKER = re.compile(r"<!-- not run: (.+) -->")
FENCE = re.compile(r"^( *)(`{3,})([\w+-]*)(.*)$")
PROGRAMS = ("forgetless", "python", "pip", "make", "torchrun", "accelerate", "cd", "mkdir", "export", "cat", ".", "source")
LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass
class Block:
    page: str
    line: int
    language: str
    title: str | None  # the file a reader is to save it as
    reason: str | None  # of the marker before it: why it is not run
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass
class Command:
    words: list[str]
    heredoc: str | None = None

    def __str__(self) -> str:
        return shlex.join(self.words)


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order. A fence without a language is bash where every line is a command, and text where none is (README.md)."""
    found, lines, start = [], (ROOT / page).read_text(encoding="utf-8").splitlines(), None
    for number, line in enumerate(lines, 1):
        match = FENCE.match(line)
        if start is None and match:
            start = (number, match)
        elif start is not None and line.strip() == start[1][2]:
            indent, _, language, info = start[1].groups()
            text = "\n".join(x.removeprefix(indent) for x in lines[start[0] : number - 1]) + "\n"
            before = next((x for x in reversed(lines[: start[0] - 1]) if x.strip()), "")
            reason, title = MARKER.fullmatch(before.strip()), re.search(r'title="([^"]+)"', info)
            found.append(Block(page, start[0], language or _guess(text), title and title[1], reason and reason[1], text))
            start = None
    assert start is None, f"{page}:{start[0]}: the block does not end"
    return found


def _guess(text: str) -> str:
    first_words = {line.split()[0] for line in text.splitlines() if line.strip() and not line.startswith("#")}
    if first_words <= set(PROGRAMS):
        return "bash"
    return "text" if not first_words & {"forgetless", "python", "pip", "import", "from"} else "nothing known"


def commands(text: str) -> list[Command]:
    """The commands of a shell block, a pipeline's parts apart, comments and settings of variables left out; a here-document goes with the command that reads it."""
    found, lines = [], iter(text.splitlines())
    for line in lines:
        while line.endswith("\\"):
            line = line[:-1] + next(lines)
        heredoc = re.search(r"<<'(\w+)'", line)
        body = None
        if heredoc:
            body = "".join(f"{x}\n" for x in iter(lambda: next(lines), heredoc[1]))
            line = line.replace(heredoc[0], "")
        reader = shlex.shlex(line, posix=True, punctuation_chars="&|;>")
        reader.whitespace_split = True
        parts: list[list[str]] = [[]]
        for word in reader:
            if set(word) <= set("&|;"):
                parts.append([])
            elif word == ">":
                parts[-1].append(">")
            else:
                parts[-1].append(word)
        for words in parts:
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                found.append(Command(words, body))
    return found


def slug(heading: str) -> str:
    """The anchor that GitHub and the site give a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def prose(page: str) -> list[tuple[int, str]]:
    """(number, line) of a page outside its fenced blocks."""
    found, fence = [], None
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        match = FENCE.match(line)
        if fence is None and match:
            fence = match[2]
        elif fence is not None and line.strip() == fence:
            fence = None
        elif fence is None:
            found.append((number, line))
    return found


def anchors(page: str) -> set[str]:
    return {slug(line.lstrip("#")) for _, line in prose(page) if re.match(r"#{1,6} ", line)}


def links(page: str) -> list[tuple[int, str]]:
    return [(number, link) for number, line in prose(page) for link in LINK.findall(re.sub(r"`[^`]*`", "", line))]

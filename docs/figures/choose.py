"""The two made parts of docs/choose.md: what each method needs, from the registry, and what has been measured, from the tables of docs/leaderboard.md.

python docs/figures/choose.py          # writes them into the page, between their comments
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE, BOARD = ROOT / "docs" / "choose.md", ROOT / "docs" / "leaderboard.md"
STREAM, PROMPTS = "order1", {"options": "options in the prompt", "bare": "text only"}
NOT_A_CHOICE = ("(peer)", "no space", "LoRA alone")  # other people's code, and halves of gorp
COLUMNS = ("seeds", "choice AA", "choice BWT", "choice LA", "exact AA", "exact BWT", "optimizer MB")


def needs() -> str:
    """One line a question, with the methods of the registry that answer it so."""
    from forgetless.methods import catalogue

    rows = catalogue.rows()

    def names(wanted) -> str:
        return ", ".join(f"`{row['name']}`" for row in rows if wanted(row))

    lines = [
        "| | methods |",
        "|---|---|",
        f"| need nothing of earlier tasks' data, and no task's name at test time | {names(lambda r: not r['needs_old_data'] and not r['needs_task_id'])} |",
        f"| keep or read old rows | {names(lambda r: r['needs_old_data'])} |",
        f"| must be told at test time which task a row is of | {names(lambda r: r['needs_task_id'])} |",
        f"| hold every update to a protected space, and measure its leak | {names(lambda r: r['constrained'])} |",
        f"| keep more with every task | {names(lambda r: r['grows'])} |",
        f"| leave several models, or parts of one, of which one is chosen for each row | {names(lambda r: r['kind'] == 'routed')} |",
        f"| go beside another method (`on:`) | {names(lambda r: r['summary'].startswith('beside ') or 'beside another' in r['summary'])} |",
    ]
    return "\n".join(lines)


def board() -> dict[str, dict[str, dict[str, str]]]:
    """{prompt: {row: {column: cell}}} of the stream's main table on the leaderboard's page."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for part in re.split(r"^### ", BOARD.read_text(encoding="utf-8"), flags=re.M)[1:]:
        title = part.splitlines()[0]
        prompt = title.removeprefix(f"{STREAM}, prompt: ")
        if prompt not in PROMPTS or prompt in found:  # the first protocol that has it
            continue
        table = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]
        header = table[0]
        rows = table[2 : next((i for i, line in enumerate(table[2:], 2) if line[0] == header[0] and i > 2), len(table))]
        found[prompt] = {row[0]: dict(zip(header, row, strict=True)) for row in rows if len(row) == len(header)}
    return found


def measured() -> str:
    """A table a prompt, in the leaderboard's order: best final choice first."""
    parts = []
    for prompt, said in PROMPTS.items():
        rows = board().get(prompt, {})
        lines = [f"{said[0].upper()}{said[1:]}:", "", "| row | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
        for name, cells in rows.items():
            if not any(part in name for part in NOT_A_CHOICE):
                lines.append(f"| {name} | " + " | ".join(cells[column] for column in COLUMNS) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


MADE = {"from the registry: python docs/figures/choose.py": needs, "from docs/leaderboard.md: python docs/figures/choose.py": measured}


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for mark, make in MADE.items():
        before, _, rest = text.partition(f"<!-- {mark} -->\n")
        text = f"{before}<!-- {mark} -->\n{make()}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

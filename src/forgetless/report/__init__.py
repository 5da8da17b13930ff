"""Reports of a run: report.html, report.md and a model card, all from the same views.

read.py reads a run folder; scores.py, verdicts.py and protection.py turn it into text and shades, charts.py into drawings, views.py puts them
together; report.html.j2, markdown.py and card.py show them; write.py writes the file. Only a card needs torch, for the paper of its method.
"""

from .card import model_card
from .read import read_run
from .write import write_card, write_markdown, write_report

__all__ = ["model_card", "read_run", "write_card", "write_markdown", "write_report"]

"""Progress of long work: silent, as rich bars on stderr, or as JSON lines that another process draws."""

from __future__ import annotations

import json
import sys
import time
from typing import TextIO


class Progress:
    """Silent. `stage` opens a bar, `advance` moves it, `say` prints a line about something that matters."""

    def tasks(self, done: int, total: int) -> None: ...

    def stage(self, name: str, total: int) -> None: ...

    def advance(self, done: int, note: str = "") -> None: ...

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


class JsonProgress(Progress):
    """One JSON object a line: {"tasks", "of"}, {"stage", "total"}, {"done", "note"}, {"say"}."""

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stderr
        self._last = 0.0

    def _write(self, **event) -> None:
        print(json.dumps(event, ensure_ascii=False), file=self.stream, flush=True)

    def tasks(self, done: int, total: int) -> None:
        self._write(tasks=done, of=total)

    def stage(self, name: str, total: int) -> None:
        self._write(stage=name, total=total)
        self._last = 0.0

    def advance(self, done: int, note: str = "") -> None:
        if time.monotonic() - self._last > 0.2:
            self._last = time.monotonic()
            self._write(done=done, note=note)

    def say(self, text: str) -> None:
        self._write(say=text)


class RichProgress(Progress):
    """A bar on stderr; plain lines when stderr is not a terminal."""

    def __init__(self):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self.console = Console(stderr=True)
        columns = [
            TextColumn("{task.description:<34}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        ]
        self.bars = Bars(*columns, console=self.console)
        self.bars.start()
        self.bar = self.whole = None

    def tasks(self, done: int, total: int) -> None:
        if self.whole is None:
            self.whole = self.bars.add_task("tasks learned", total=total, note="")
        self.bars.update(self.whole, completed=done, total=total)

    def stage(self, name: str, total: int) -> None:
        if not self.console.is_terminal:
            self.console.print(name, highlight=False)
        if self.bar is not None:
            self.bars.remove_task(self.bar)
        self.bar = self.bars.add_task(name, total=total, note="")

    def advance(self, done: int, note: str = "") -> None:
        if self.bar is not None:
            self.bars.update(self.bar, completed=done, note=note)

    def say(self, text: str) -> None:
        self.bars.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        for bar in (self.bar, self.whole):
            if bar is not None:
                self.bars.remove_task(bar)
        self.bar = self.whole = None
        self.bars.stop()

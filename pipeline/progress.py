"""How far a long piece of work is, on stderr: a live line on a terminal, else a few lines and then one a minute."""

import sys
from time import monotonic
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TextColumn
from rich.table import Column

from pipeline.tables import at_words

LOG_EVERY_S, LOG_LATER_S, FIRST_LINES = 5.0, 60.0, 5
"""Where nobody looks on, lines are seconds apart until it is clear that all is well, then a minute: a job of a night
writes some hundred, and not thousands."""
DRAW_EVERY_S = 0.2
BAR_COLUMNS = 110
"""Terminals of this width have room for a bar."""


class ProgressLine:
    """Shows done, rate, time left, and a note such as the bottleneck. As a context manager it ends the live line."""

    def __init__(self, title: str, unit: str, *, stream: TextIO | None = None) -> None:
        console = Console(file=stream or sys.stderr)
        self._title, self._unit, self._stream = title, unit, console.file
        self._live = console.is_terminal and not (console.is_dumb_terminal or console.no_color)
        self._last, self._lines = -1e9, 0
        self._task: Task | None = None
        gives_way = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        self._progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=gives_way),
            *([BarColumn(bar_width=20)] if console.width >= BAR_COLUMNS else []),
            TextColumn("{task.fields[state]}", markup=False, table_column=Column(no_wrap=True)),
            console=console,
            auto_refresh=False,
            expand=True,
        )

    def update(self, done: int, total: int, note: str = "") -> None:
        """Show the state, at most every few moments, and at the end."""
        if not total or (self._task and self._task.finished):
            return
        if self._task is None:
            self._progress.add_task(self._title, total=total, state="", first=done)
            (self._task,) = self._progress.tasks
        self._progress.update(self._task.id, completed=done, total=total)
        now = monotonic()
        if now - self._last < self._wait_s and done < total:
            return
        self._last, self._lines = now, self._lines + 1
        state = f"{done:,}/{total:,} {self._unit}{_speed(self._task)}" + (f"  {note}" if note else "")
        if not self._live:
            self._stream.write(f"{self._title}  {state}\n")
            self._stream.flush()
            return
        self._progress.update(self._task.id, state=state, refresh=True)
        if not self._progress.live.is_started:
            self._progress.start()
            self._progress.console.show_cursor(True)  # Ctrl-C ends the process at once and would leave it hidden

    @property
    def _wait_s(self) -> float:
        if self._live:
            return DRAW_EVERY_S
        return LOG_EVERY_S if self._lines < FIRST_LINES else LOG_LATER_S

    def close(self) -> None:
        """End the live line."""
        if self._progress.live.is_started:
            self._progress.stop()

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _speed(task: Task) -> str:
    """The rate of late and the time left, or the mean rate and the time taken; nothing where too little is done."""
    elapsed = task.elapsed or 0.0
    if elapsed < 0.5 or not task.speed:
        return ""
    if task.finished:
        return f"  {(task.completed - task.fields['first']) / elapsed:,.0f}/s  in {clock(elapsed)}"
    return f"  {task.speed:,.0f}/s  {clock(task.time_remaining or 0.0)} left"


def say(line: str) -> None:
    """One line on stderr, where progress goes; on a terminal it is broken between words."""
    sys.stderr.write(at_words(line, sys.stderr) + "\n")
    sys.stderr.flush()


def clock(seconds: float) -> str:
    """Seconds as 7 s, 3:05 min or 2:10 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"

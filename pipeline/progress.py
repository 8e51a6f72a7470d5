"""One live line on a terminal, a log line every few seconds elsewhere; always on stderr."""

import sys
from shutil import get_terminal_size
from time import monotonic
from typing import TextIO

LOG_EVERY_S = 5.0
DRAW_EVERY_S = 0.2


class ProgressLine:
    """Shows how far a long piece of work is: done, rate, time left, and a note such as the bottleneck."""

    def __init__(self, title: str, unit: str, *, stream: TextIO | None = None) -> None:
        self._title, self._unit = title, unit
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._begin = monotonic()
        self._last = -1e9
        self._first_done: int | None = None
        self._ended = False

    def update(self, done: int, total: int, note: str = "") -> None:
        """Show the state, at most every few moments, and at the end."""
        now = monotonic()
        if self._first_done is None:
            self._first_done, self._begin = done, now
        every = DRAW_EVERY_S if self._live else LOG_EVERY_S
        if (now - self._last < every and done < total) or not total or self._ended:
            return
        self._ended = done >= total
        self._last = now
        state = f"  {done:,}/{total:,} {self._unit}{self._speed(done, total, now)}"
        state += f"  {note}" if note else ""
        if self._live:
            self._stream.write("\r\x1b[K" + fitted(self._title, state, get_terminal_size().columns - 1))
        else:
            self._stream.write(f"{self._title}{state}\n")
        self._stream.flush()

    def _speed(self, done: int, total: int, now: float) -> str:
        elapsed, since = now - self._begin, done - (self._first_done or 0)
        if elapsed < 0.5 or since <= 0:
            return ""
        rate = since / elapsed
        left = (total - done) / rate
        return f"  {rate:,.0f}/s  " + (f"{clock(left)} left" if done < total else f"in {clock(elapsed)}")

    def close(self) -> None:
        """End the live line."""
        if self._live and self._last > 0:
            self._stream.write("\n")
            self._stream.flush()


def fitted(title: str, state: str, columns: int) -> str:
    """Title and state in one line of a terminal; a long title gives way, since it does not change."""
    room = columns - len(state)
    short = title if len(title) <= room else title[: max(room - 1, 0)] + "…"
    return (short + state)[:columns]


def say(line: str) -> None:
    """One line on stderr, where progress goes."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def clock(seconds: float) -> str:
    """Seconds as 7 s, 3:05 min or 2:10 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"

"""Tables of plain text for a terminal."""

import sys
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from shutil import get_terminal_size
from textwrap import wrap
from typing import TextIO

from g2l_core.report.wrapping import narrowest, wrapped

COLUMNS = 80
GAP = "  "
_UNLIMITED = 10_000


def table_text(
    rows: Iterable[Sequence[str]], *, header: Sequence[str] = (), right: Sequence[int] = (), width: int = COLUMNS
) -> str:
    """Rows in aligned columns, two spaces apart; what is too long goes on in the next line of its column.

    No word is broken but long names, at their hyphens and the like: where the rest does not fit, the table is wider.

    Args:
        rows: The cells of each row.
        header: Titles of the columns; none where there are none.
        right: Columns, by number, that are aligned on the right.
        width: Columns of the terminal that the table may take.
    """
    lines = [list(row) for row in ([header] if header else []) + list(rows)]
    columns = list(zip(*lines, strict=True))
    widths = _fitted(
        [max(map(len, cells)) for cells in columns],
        [max(map(narrowest, cells)) for cells in columns],
        width - len(GAP) * (len(columns) - 1),
    )
    text = []
    for line in lines:
        cells = [[cell] if len(cell) <= room else wrapped(cell, room) for cell, room in zip(line, widths, strict=True)]
        for parts in zip_longest(*cells, fillvalue=""):
            aligned = (
                part.rjust(room) if column in right else part.ljust(room)
                for column, (part, room) in enumerate(zip(parts, widths, strict=True))
            )
            text.append(GAP.join(aligned).rstrip())
    return "\n".join(text)


def _fitted(wanted: list[int], least: list[int], room: int) -> list[int]:
    """Widths of columns that together fit the room as far as can be: the widest give way, none below its least."""
    widths = list(wanted)
    while sum(widths) > room:
        wide = [i for i in range(len(widths)) if widths[i] > least[i]]
        if not wide:
            break
        widths[max(wide, key=lambda i: widths[i])] -= 1
    return widths


def stdout_width() -> int:
    """Columns of the terminal; without one, as in a pipe, lines are as long as what they say."""
    return get_terminal_size().columns if sys.stdout.isatty() else _UNLIMITED


def at_words(text: str, stream: TextIO) -> str:
    """Text as it is, or, on a terminal, with its lines broken between words where the terminal would break inside."""
    if not stream.isatty():
        return text
    width = max(20, get_terminal_size().columns)
    lines = [
        wrap(line, width, break_long_words=False, break_on_hyphens=False, drop_whitespace=True) or [""]
        if len(line) > width and not line.startswith(" ")
        else [line]
        for line in text.split("\n")
    ]
    return "\n".join("\n".join(parts) for parts in lines)


def bytes_text(size: float) -> str:
    """A number of bytes for people: `1.2 GB`, `340.0 MB`, `12.5 kB`; powers of 1,000."""
    for unit, bytes_of in (("GB", 1e9), ("MB", 1e6)):
        if size >= 0.1 * bytes_of:
            return f"{size / bytes_of:,.1f} {unit}"
    return f"{size / 1e3:,.1f} kB"

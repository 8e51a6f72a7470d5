"""Tables of plain text for a terminal."""

import sys
from collections.abc import Iterable, Sequence
from shutil import get_terminal_size
from textwrap import wrap
from typing import TextIO

from rich.console import Console
from rich.table import Table

COLUMNS = 80
_UNLIMITED = 10_000


def table_text(
    rows: Iterable[Sequence[str]], *, header: Sequence[str] = (), right: Sequence[int] = (), width: int = COLUMNS
) -> str:
    """Rows in aligned columns, two spaces apart; what is too long goes on in the next line of its column.

    No word is broken: where words do not fit beside each other, the table is wider.

    Args:
        rows: The cells of each row.
        header: Titles of the columns; none where there are none.
        right: Columns, by number, that are aligned on the right.
        width: Columns of the terminal that the table may take.
    """
    lines = [list(row) for row in rows]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=bool(header), header_style="")
    longest_words: list[int] = []
    for column in range(len(header or next(iter(lines), ()))):
        justify = "right" if column in right else "left"
        title = header[column] if header else ""
        longest = max(
            (len(word) for text in (title, *(line[column] for line in lines)) for word in text.split()), default=0
        )
        longest_words.append(longest)
        table.add_column(title, justify=justify, overflow="fold", min_width=longest)  # type: ignore[arg-type]
    for line in lines:
        table.add_row(*line)
    needed = sum(longest_words) + 2 * (len(longest_words) - 1)
    console = Console(width=max(width, needed), color_system=None, markup=False, highlight=False, emoji=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


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

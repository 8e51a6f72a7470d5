"""A benchmark's results as files: JSON to compute with, CSV, Markdown, and a self-contained HTML page.

`results.json` holds the whole report and is what the others are made from; equal reports give equal bytes.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from math import isnan
from pathlib import Path
from textwrap import wrap

from rich.console import Console
from rich.table import Table
from rich.text import Text

from g2l_core.errors import RunError, require_output_folder, writing
from g2l_core.files import csv_row, parse_json, replacing
from g2l_core.report.html import page
from g2l_core.report.json import FORMAT, json_text, report_of
from g2l_core.report.markdown import markdown
from g2l_core.report.tables import TaskPart, beside, decimals, estimate_text, few_patients, meaning_of, task_parts
from g2l_core.report.wrapping import narrowest, wrapped
from g2l_core.results import Comparison, Report, Result

_GAP, _MIN_TITLE, _MIN_COLUMN = 2, 18, 12
_WIDEST = 10_000


FILES = ("results.json", "results.csv", "comparisons.csv", "results.md", "report.html")


def require_report_folder(folder: Path) -> None:
    """Refuse a folder that holds something else than a report, before anything is computed for it.

    Other files beside a report's own are left alone. What an interrupted `write_report` left is no obstacle.

    Raises:
        RunError: It holds files and no report.
    """
    require_output_folder(folder, FILES, "report of g2l bench")


def write_report(report: Report, folder: Path) -> list[Path]:
    """Writes results.json, results.csv, comparisons.csv, results.md and report.html.

    All are written to temporary files first and then renamed, so that none is ever seen half written and a failure
    leaves the previous report as it was.

    Args:
        report: All of one benchmark run.
        folder: Where to; made if it is not there.

    Returns:
        The files' paths.

    Raises:
        RunError: If the folder cannot be written.
        TaskError: If two results have the same task, metric and encoder.
    """
    tables = _results_csv(report.results), _comparisons_csv(report.comparisons)
    texts = dict(zip(FILES, (json_text(report), *tables, markdown(report), page(report)), strict=True))
    try:
        with writing(folder), ExitStack() as finished:
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in texts.items():
                file = finished.enter_context(replacing(folder / name))
                # Names from a file system may hold lone surrogates, which UTF-8 cannot.
                file.write(text.encode("utf-8", errors="backslashreplace"))
                file.flush()
    except OSError as error:
        raise RunError(
            f"the report cannot be written into {folder}: {error.strerror}; name a folder that can be"
        ) from error
    return [folder / name for name in texts]


def read_report(folder: Path) -> Report:
    """Reads the report that `write_report` left in a folder; equal to it but that NaN differs from NaN.

    Raises:
        RunError: If there is no results.json, or it is not one that this version reads.
    """
    path = folder / "results.json"
    try:
        raw = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"no report can be read from {path}: {error.strerror}; give a folder of `g2l bench`") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is not JSON ({error}); write the report again") from error
    found = raw.get("format") if isinstance(raw, dict) else None
    if found != FORMAT:
        raise RunError(f"{path} should be of format {FORMAT}, is {found}; read it with the g2l that wrote it")
    try:
        return report_of(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{path} is not a report ({error!r}); write it again") from error


def _csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """NaN and None are empty cells; floats are written by repr."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(csv_row(header))
    for row in rows:
        writer.writerow(csv_row("" if isinstance(cell, float) and isnan(cell) else cell for cell in row))
    return buffer.getvalue()


def _results_csv(results: Sequence[Result]) -> str:
    names = sorted({name for row in results for name in row.settings})
    header = ["task", "metric", "encoder", "value", "low", "high", "n", "clusters", "unit", "method", "better"]
    rows = (
        [
            *(row.task, row.metric, row.encoder, row.estimate.value, row.estimate.low, row.estimate.high),
            *(row.n, row.estimate.clusters, row.estimate.unit, row.estimate.method, row.better),
            *map(row.settings.get, names),
        ]
        for row in results
    )
    return _csv_text(header + [f"settings.{name}" for name in names], rows)


def _comparisons_csv(comparisons: Sequence[Comparison]) -> str:
    header = ["task", "metric", "encoder", "reference", "difference", "low", "high", "p_value", "method"]
    header += ["p_holm", "tests", "margin", "p_equivalent"]
    rows = (
        [
            *(row.task, row.metric, row.encoder, row.reference, row.difference.value, row.difference.low),
            *(row.difference.high, row.p_value, row.difference.method, row.p_holm, row.tests),
            *(row.margin, row.p_equivalent),
        ]
        for row in comparisons
    )
    return _csv_text(header, rows)


def terminal_table(report: Report | Sequence[Result], width: int = 80) -> str:
    """The metric values as plain text: for each task, a row for each metric and a column for each encoder.

    Columns that do not fit are printed below the others, and names are wrapped. No value is ever cut, so a line is
    longer than `width` only where a single value beside 18 characters of name is.

    Args:
        report: A whole report, whose notes, cautions and failures are printed as well, or results alone.
        width: In characters.

    Raises:
        TaskError: If two results have the same task, metric and encoder.
    """
    if not isinstance(report, Report):
        report = Report(
            title="", summary=(), encoders=(), results=tuple(report), comparisons=(), failures=(), provenance={}
        )
    lines = [line for note in report.notes for line in _lines(f"note: {note}", width)]
    lines += [""] if lines else []
    for part in task_parts(report):
        if part.results:
            few = few_patients(part)
            asides = dict.fromkeys(filter(None, (beside(part, metric) for metric in part.results)))
            told = [*filter(None, [few]), *(f"robustness: {aside}" for aside in asides)]
            lines += [line for text in (part.name, *told) for line in _lines(text, width)]
            lines += _terminal_part(part, width)
    for facts in report.encoders:
        if facts.note:
            lines += _lines(f"{facts.key}: {facts.note}", width)
    for failure in report.failures:
        where = f"{failure.task}, {failure.encoder}" if failure.encoder else failure.task
        lines += _lines(f"not evaluated: {where}: {failure.reason}", width)
    return "\n".join(lines).rstrip() + "\n"


def _printable(text: str) -> str:
    """Names come from files; none may move the cursor or color the terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _lines(text: str, width: int) -> list[str]:
    return wrap(_printable(text), width) or [""]


def _terminal_part(part: TaskPart, width: int) -> list[str]:
    titles = [_printable(meaning_of(metric).title) for metric in part.results]
    digits = [decimals(result.estimate for result in row.values()) for row in part.results.values()]
    columns = {
        key: [
            estimate_text(row[key].estimate, places) if key in row else part.gap(key)
            for row, places in zip(part.results.values(), digits, strict=True)
        ]
        for key in part.encoders
    }
    widths = {
        key: max(_MIN_COLUMN, narrowest(_printable(key), _MIN_COLUMN), *map(len, cells))
        for key, cells in columns.items()
    }
    title_width = min(max(map(len, titles)), max(_MIN_TITLE, width - sum(widths.values()) - _GAP * len(widths)))
    lines = []
    for keys in _packed(widths, width - title_width):
        table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="")
        table.add_column("", width=title_width, overflow="fold")
        for key in keys:
            table.add_column(Text("\n".join(wrapped(_printable(key), widths[key]))), width=widths[key], overflow="fold")
        for i, title in enumerate(titles):
            table.add_row(Text("\n".join(_lines(title, title_width))), *(columns[key][i] for key in keys))
        lines += [*_rendered(table), ""]
    return lines


def _packed(widths: Mapping[str, int], room: int) -> list[list[str]]:
    """Columns in as few blocks as hold them in order; a column wider than the room is alone in its block."""
    blocks: list[list[str]] = []
    left = 0
    for key, width in widths.items():
        if not blocks or width + _GAP > left:
            blocks.append([])
            left = room
        blocks[-1].append(key)
        left -= width + _GAP
    return blocks


def _rendered(table: Table) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=_WIDEST, color_system=None, highlight=False, markup=False, emoji=False).print(table)
    return [line.rstrip() for line in file.getvalue().rstrip("\n").split("\n")]

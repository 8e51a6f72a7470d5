"""A benchmark's figures as files: JSON to compute with, CSV, Markdown, and a page that stands on its own.

`results.json` holds the whole report and is what the others are made from; equal reports give equal bytes.
"""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from math import isnan
from pathlib import Path
from textwrap import wrap

from g2l_core.errors import RunError
from g2l_core.report.html import page
from g2l_core.report.json import FORMAT, json_text, report_of
from g2l_core.report.tables import (
    ExpectedVsFound,
    TaskPart,
    best,
    decimals,
    encoder_order,
    figure,
    held_against,
    interval,
    meaning_of,
    number,
    p_text,
    published_text,
    support,
    task_parts,
)
from g2l_core.results import Comparison, Pictures, Report, Result

_GAP = 2
_MIN_TITLE = 18


def write_report(report: Report, folder: Path) -> list[Path]:
    """Writes results.json, results.csv, comparisons.csv, results.md and report.html.

    All are written beside their places first and then moved there, so that none is ever seen half written and a
    failure leaves the former report as it was.

    Args:
        report: All of one benchmark run.
        folder: Where to; made if it is not there.

    Returns:
        The files' paths.

    Raises:
        RunError: If the folder cannot be written.
        TaskError: If two results have the same task, metric and encoder.
    """
    texts = {
        "results.json": json_text(report),
        "results.csv": _results_csv(report.results),
        "comparisons.csv": _comparisons_csv(report.comparisons),
        "results.md": _markdown(report),
        "report.html": page(report),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _publish(texts, folder)
    except OSError as error:
        raise RunError(
            f"the report cannot be written into {folder}: {error.strerror}; name a folder that can be"
        ) from error


def _publish(texts: Mapping[str, str], folder: Path) -> list[Path]:
    drafts = {folder / name: folder / f".{name}.{os.getpid()}.tmp" for name in texts}
    try:
        for path, draft in drafts.items():
            # Names taken from a file system may hold lone surrogates, which UTF-8 cannot.
            draft.write_bytes(texts[path.name].encode("utf-8", errors="backslashreplace"))
        for path, draft in drafts.items():
            draft.replace(path)
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)
    return list(drafts)


def read_report(folder: Path) -> Report:
    """Reads the report that `write_report` left in a folder; equal to it but that NaN differs from NaN.

    Raises:
        RunError: If there is no results.json, or it is not one that this version reads.
    """
    path = folder / "results.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"no report can be read from {path}: {error.strerror}; give a folder of `g2l bench`") from error
    except ValueError as error:
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
    writer.writerow(header)
    for row in rows:
        writer.writerow(["" if isinstance(cell, float) and isnan(cell) else cell for cell in row])
    return buffer.getvalue()


def _results_csv(results: Sequence[Result]) -> str:
    names = sorted({name for row in results for name in row.settings})
    header = ["task", "metric", "encoder", "value", "low", "high", "n", "method", "better"]
    rows = (
        [
            *(row.task, row.metric, row.encoder, row.estimate.value, row.estimate.low, row.estimate.high),
            *(row.n, row.estimate.method, row.better, *map(row.settings.get, names)),
        ]
        for row in results
    )
    return _csv_text(header + [f"settings.{name}" for name in names], rows)


def _comparisons_csv(comparisons: Sequence[Comparison]) -> str:
    header = ["task", "metric", "encoder", "reference", "difference", "low", "high", "p_value", "method"]
    header += ["p_holm", "tests"]
    rows = (
        [
            *(row.task, row.metric, row.encoder, row.reference, row.difference.value, row.difference.low),
            *(row.difference.high, row.p_value, row.difference.method, row.p_holm, row.tests),
        ]
        for row in comparisons
    )
    return _csv_text(header, rows)


def _md(text: str) -> str:
    """Text that Markdown shows as it is, in a table cell as well."""
    for mark in "\\`*[]|":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())


def _md_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]


def _markdown(report: Report) -> str:
    lines = [f"# {_md(report.title)}", "", *(f"{_md(sentence)}\n" for sentence in report.summary)]
    if report.notes:
        lines += ["## Before you read the figures", "", *(f"- {_md(note)}" for note in report.notes), ""]
    parts = task_parts(report)
    lines += _md_overview(parts, encoder_order(report))
    for part in parts:
        if part.is_shown:
            lines += [f"## {_md(part.name)}", "", *_md_figures(part), *_md_expected(held_against(part, report))]
            lines += [*_md_comparisons(part.comparisons), *_md_matrices(part.pictures)]
    if report.failures:
        lines += ["## Not evaluated", ""]
        lines += _md_table(
            ["task", "encoder", "reason"],
            ([_md(row.task), _md(row.encoder) or "all", _md(row.reason)] for row in report.failures),
        )
    lines += ["## Encoders", ""]
    lines += _md_table(
        ["encoder", "name", "weights", "dim", "pooling", "precision", "digest", "note"],
        ([_md(str(getattr(row, field.name))) for field in fields(row)] for row in report.encoders),
    )
    lines += ["## Provenance", ""]
    lines += _md_table(["what", "value"], ([_md(key), _md(text)] for key, text in sorted(report.provenance.items())))
    return "\n".join(lines)


def _md_overview(parts: Sequence[TaskPart], order: Sequence[str]) -> list[str]:
    headlines = [(part, metric, part.figures[metric]) for part in parts if (metric := part.headline())]
    if len(headlines) < 2:
        return []
    keys = [key for key in order if any(key in row for _, _, row in headlines)]
    rows = (
        [_md(part.name), _md(meaning_of(metric).title), _md(support(row)), *_md_cells(part, row, keys)]
        for part, metric, row in headlines
    )
    return ["## Overview", "", *_md_table(["task", "figure", "support", *map(_md, keys)], rows)]


def _md_expected(held: Sequence[ExpectedVsFound]) -> list[str]:
    if not held:
        return []
    rows = (
        [
            _md(meaning_of(row.expected.metric).title),
            _md(row.expected.encoder),
            figure(row.found, decimals([row.found], spare=1)) if row.found else "-",
            published_text(row.expected),
            row.verdict,
            _md(row.expected.source),
        ]
        for row in held
    )
    return _md_table(["figure", "encoder", "found", "published", "tolerance", "source"], rows)


def _md_matrices(pictures: Pictures) -> list[str]:
    lines = []
    for cka in pictures.cka:
        names = [*map(_md, cka.encoders)]
        values = ([name, *(number(v, 2) for v in row)] for name, row in zip(names, cka.values, strict=True))
        lines += _md_table(["CKA, debiased", *names], values)
    for matrix in pictures.confusions:
        names = [*map(_md, matrix.classes)]
        counts = ([name, *map(str, row)] for name, row in zip(names, matrix.counts, strict=True))
        lines += _md_table([f"{_md(matrix.classifier)} of {_md(matrix.encoder)}: true, predicted", *names], counts)
    return lines


def _md_figures(part: TaskPart) -> list[str]:
    if not part.figures:
        return []
    rows = (
        [_md(meaning_of(metric).title), *_md_cells(part, row, part.encoders)] for metric, row in part.figures.items()
    )
    return _md_table(["figure", *map(_md, part.encoders)], rows)


def _md_cells(part: TaskPart, row: Mapping[str, Result], keys: Sequence[str]) -> Iterator[str]:
    digits, leading = decimals((result.estimate for result in row.values()), spare=1), best(row)
    for key in keys:
        if key not in row:
            yield part.gap(key)
            continue
        value, bounds = number(row[key].estimate.value, digits), interval(row[key].estimate, digits)
        yield f"**{value}** {bounds}".rstrip() if key in leading else f"{value} {bounds}".rstrip()


def _md_comparisons(comparisons: Sequence[Comparison]) -> list[str]:
    if not comparisons:
        return []
    rows = (
        [
            _md(meaning_of(row.metric).title),
            f"{_md(row.encoder)} - {_md(row.reference)}",
            figure(row.difference, decimals([row.difference], spare=1), "+"),
            p_text(row.p_value),
            p_text(row.p_holm) + (f" over {row.tests} tasks" if row.tests > 1 else ""),
        ]
        for row in comparisons
    )
    return _md_table(["figure", "difference", "value", "p", "adjusted (Holm)"], rows)


def terminal_table(report: Report | Sequence[Result], width: int = 80) -> str:
    """The figures as plain text: for each task, a row a metric and a column an encoder.

    Columns that do not fit are set below the others, and names are wrapped; no figure is ever cut, so a line is
    longer than `width` only where a single figure beside 18 characters of name is.

    Args:
        report: A whole report, whose notes, cautions and failures are told as well, or results alone.
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
        if part.figures:
            lines += [*_lines(part.name, width), *_terminal_part(part, width)]
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
    return wrap(_printable(text), max(width, 1)) or [""]


def _terminal_part(part: TaskPart, width: int) -> list[str]:
    titles = [meaning_of(metric).title for metric in part.figures]
    digits = [decimals(result.estimate for result in row.values()) for row in part.figures.values()]
    columns = {
        key: [
            figure(row[key].estimate, places) if key in row else part.gap(key)
            for row, places in zip(part.figures.values(), digits, strict=True)
        ]
        for key in part.encoders
    }
    widths = {key: max(12, *map(len, cells)) + _GAP for key, cells in columns.items()}
    title_width = min(max(map(len, titles)), max(_MIN_TITLE, width - sum(widths.values())))
    lines = []
    for keys in _packed(widths, width - title_width):
        lines += _block(titles, title_width, {key: columns[key] for key in keys}, widths)
    return lines


def _packed(widths: Mapping[str, int], room: int) -> list[list[str]]:
    """Columns dealt into as few blocks as hold them in order; a column wider than the room stands alone."""
    blocks: list[list[str]] = []
    left = 0
    for key, width in widths.items():
        if not blocks or width > left:
            blocks.append([])
            left = room
        blocks[-1].append(key)
        left -= width
    return blocks


def _block(
    titles: Sequence[str], title_width: int, columns: Mapping[str, Sequence[str]], widths: Mapping[str, int]
) -> list[str]:
    lines = _row(title_width, [""], [(_lines(key, widths[key] - _GAP), widths[key]) for key in columns])
    for i, title in enumerate(titles):
        cells = [([cells[i]], widths[key]) for key, cells in columns.items()]
        lines += _row(title_width, _lines(title, title_width), cells)
    return [*lines, ""]


def _row(title_width: int, title: Sequence[str], cells: Sequence[tuple[Sequence[str], int]]) -> list[str]:
    """One row of the table on as many lines as its tallest cell has."""
    height = max(len(title), *(len(cell) for cell, _ in cells))
    columns = [(title, title_width), *cells]
    filled = [[*cell, *[""] * (height - len(cell))] for cell, _ in columns]
    indent = [0] + [_GAP] * len(cells)
    return [
        "".join(
            " " * gap + cell[line].ljust(wide - gap)
            for cell, gap, (_, wide) in zip(filled, indent, columns, strict=True)
        ).rstrip()
        for line in range(height)
    ]

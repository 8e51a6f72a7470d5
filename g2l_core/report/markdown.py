"""A report as Markdown: its tables, without plots."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from g2l_core.report.tables import (
    TaskPart,
    against_published,
    beside,
    beside_difference,
    cells,
    decimals,
    encoder_order,
    estimate_text,
    few_patients,
    is_as_good,
    meaning_of,
    number,
    p_text,
    published_text,
    support,
    task_parts,
)
from g2l_core.results import Plots, Report, Result

_ENCODER_COLUMNS = {
    "key": "encoder", "name": "name", "stored_key": "key in the store", "weights": "weights", "dim": "dim",
    "pooling": "pooling", "precision": "precision", "digest": "digest", "nested_in": "nested in", "note": "note",
    "speed": "speed",
}  # fmt: skip
"""What the table of encoders tells of each, with the heads of its columns."""


def markdown(report: Report) -> str:
    """The whole report.

    Raises:
        TaskError: If two results have the same task, metric and encoder.
    """
    lines = [f"# {_escaped(report.title)}", "", *(f"{_escaped(sentence)}\n" for sentence in report.summary)]
    if report.notes:
        lines += ["## Before you read the results", "", *(f"- {_escaped(note)}" for note in report.notes), ""]
    parts = task_parts(report)
    lines += _overview(parts, encoder_order(report))
    for part in parts:
        if part.is_shown:
            lines += [f"## {_escaped(part.name)}", "", *_values(part), *_published(part, report)]
            lines += [*_differences(part), *_matrices(part.pictures)]
    if report.failures:
        lines += ["## Not evaluated", ""]
        rows = ([row.task, row.encoder or "all", row.reason] for row in report.failures)
        lines += _table(["task", "encoder", "reason"], (map(_escaped, row) for row in rows))
    lines += ["## Encoders", ""]
    lines += _table(
        [*_ENCODER_COLUMNS.values()],
        ([_escaped(str(getattr(row, name))) for name in _ENCODER_COLUMNS] for row in report.encoders),
    )
    lines += ["## Provenance", ""]
    lines += _table(["what", "value"], (map(_escaped, item) for item in sorted(report.provenance.items())))
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, in a table cell as well."""
    for mark in "\\`*[]|":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())


def _table(header: Sequence[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a table whose cells are Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]


def _title(metric: str) -> str:
    return _escaped(meaning_of(metric).title)


def _with_aside(metric: str, aside: str) -> str:
    return _title(metric) + (f" ({_escaped(aside)})" if aside else "")


def _overview(parts: Sequence[TaskPart], order: Sequence[str]) -> list[str]:
    headlines = [(part, metric, part.results[metric]) for part in parts if (metric := part.headline())]
    if len(headlines) < 2:
        return []
    keys = [key for key in order if any(key in row for _, _, row in headlines)]
    rows = (
        [_escaped(part.name), _title(metric), _escaped(_supported(part, metric)), *_cells(part, row, keys)]
        for part, metric, row in headlines
    )
    return ["## Overview", "", *_table(["task", "metric", "support", *map(_escaped, keys)], rows)]


def _values(part: TaskPart) -> list[str]:
    if not part.results:
        return []
    rows = (
        [_title(metric), _escaped(_supported(part, metric)), *_cells(part, row, part.encoders)]
        for metric, row in part.results.items()
    )
    few = few_patients(part)
    table = _table(["metric", "support", *map(_escaped, part.encoders)], rows)
    return [*([f"**{_escaped(few)}**", ""] if few else []), *table]


def _supported(part: TaskPart, metric: str) -> str:
    return "; ".join(filter(None, (support(part.results[metric]), beside(part, metric))))


def _cells(part: TaskPart, row: Mapping[str, Result], keys: Sequence[str]) -> Iterator[str]:
    for cell in cells(part, row, keys):
        text = f"**{cell.text}**" if cell.kind == "best" else cell.text
        yield f"{text} {cell.interval}".rstrip()


def _published(part: TaskPart, report: Report) -> list[str]:
    if not part.expected:
        return []
    rows = (
        [
            _with_aside(row.expected.metric, beside(part, row.expected.metric)),
            _escaped(row.expected.encoder),
            estimate_text(row.found, decimals([row.found], spare=1)) if row.found else "-",
            published_text(row.expected),
            row.verdict,
            _escaped(row.expected.source),
        ]
        for row in against_published(part, report)
    )
    return _table(["metric", "encoder", "found", "published", "tolerance", "source"], rows)


def _differences(part: TaskPart) -> list[str]:
    if not part.comparisons:
        return []
    rows = (
        [
            _with_aside(row.metric, beside_difference(part, row)),
            f"{_escaped(row.encoder)} - {_escaped(row.reference)}",
            estimate_text(row.difference, decimals([row.difference], spare=1), "+"),
            p_text(row.p_value),
            p_text(row.p_holm) + (f" over {row.tests}" if row.tests > 1 else ""),
            f"within {row.margin:g}" if is_as_good(row) else "",
        ]
        for row in part.comparisons
    )
    return _table(["metric", "difference", "value", "p", "adjusted (Holm)", "as good"], rows)


def _matrices(pictures: Plots) -> list[str]:
    lines = []
    for cka in pictures.cka:
        names = [*map(_escaped, cka.encoders)]
        values = ([name, *(number(v, 2) for v in row)] for name, row in zip(names, cka.values, strict=True))
        lines += _table(["CKA, debiased", *names], values)
    for matrix in pictures.confusions:
        names = [*map(_escaped, matrix.classes)]
        counts = ([name, *map(str, row)] for name, row in zip(names, matrix.counts, strict=True))
        lines += _table(
            [f"{_escaped(matrix.classifier)} of {_escaped(matrix.encoder)}: true, predicted", *names], counts
        )
    return lines

"""A report as one HTML page with its style sheet and pictures inside: no script, no network."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import isnan

from markupsafe import Markup

from g2l_core.report.meanings import Meaning
from g2l_core.report.names import named
from g2l_core.report.page import render
from g2l_core.report.pictures import pictures_of
from g2l_core.report.plots import Curve, ForestGroup, Row, curves, forest
from g2l_core.report.tables import (
    Cell,
    TaskPart,
    against_published,
    beside,
    beside_difference,
    cells,
    decimals,
    encoder_order,
    estimate_text,
    few_patients,
    interval,
    is_as_good,
    meaning_of,
    number,
    p_text,
    published_text,
    reasons,
    settings_text,
    split_k,
    support,
    task_parts,
)
from g2l_core.results import Better, Comparison, Estimate, Report, Result

BYTES = 2
"""Of one feature, float16, as stores keep them."""

_BETTER: Mapping[Better, str] = {"higher": "", "lower": "lower is better", "neither": "neither way is better"}
_DIFFERENCE_CAPTION = (
    "Right of the line: higher than the reference, on the same patients. p is adjusted by Holm's method over all that "
    'this report compares of the same two encoders. "Within" the margin: two one-sided tests find the two as good.'
)


def page(report: Report) -> str:
    """The whole report as HTML. Every text of the report is escaped.

    Raises:
        TaskError: If two results have the same task, metric and encoder.
    """
    report = named(report)
    parts = [part for part in task_parts(report) if part.is_shown]
    order = encoder_order(report)
    headlines = [(i, metric, part.results[metric]) for i, part in enumerate(parts) if (metric := part.headline())]
    stems = (meaning_of(split_k(metric)[0]) for part in parts for metric in part.results)
    return render(
        "report.html",
        title=report.title,
        report=report,
        parts=parts,
        order=order,
        headlines=headlines,
        headline_encoders=[key for key in order if any(key in row for _, _, row in headlines)],
        summaries={encoder.key: encoder for encoder in report.encoders},
        meanings={meaning.title: meaning.sentence for meaning in stems if meaning.sentence},
        better=_BETTER,
        difference_caption=_DIFFERENCE_CAPTION,
        against_published=against_published,
        beside=beside,
        cells=cells,
        curves_over_k=_curves_over_k,
        differences=_differences,
        few_patients=few_patients,
        found_cell=_found_cell,
        how_computed=_how_computed,
        widths=[(part.name, *chart) for part in parts if (chart := _over_bytes(part, report, order))],
        intervals=_intervals,
        meaning_of=meaning_of,
        pictures_of=pictures_of,
        published_text=published_text,
        reasons=reasons,
        support=support,
        supported=_supported,
    )


def _supported(part: TaskPart) -> Iterator[tuple[str, Mapping[str, Result], str]]:
    """Each metric and its results, with what they are computed from where it differs from the row above."""
    above = ""
    for metric, row in part.results.items():
        text = support(row)
        yield metric, row, "; ".join(filter(None, (text if text != above else "", beside(part, metric))))
        above = text


def _found_cell(found: Estimate | None) -> Cell:
    if found is None:
        return Cell(text="-", kind="-")
    digits = decimals([found], spare=1)
    return Cell(text=number(found.value, digits), interval=interval(found, digits))


def _metrics_by_stem(part: TaskPart) -> dict[str, list[tuple[int, str]]]:
    """The metrics that differ in their k alone, each with its k, by their common stem; only where there are several."""
    stems: dict[str, list[tuple[int, str]]] = {}
    for metric in part.results:
        stem, k = split_k(metric)
        if k is not None:
            stems.setdefault(stem, []).append((k, metric))
    return {stem: sorted(metrics) for stem, metrics in stems.items() if len(metrics) > 1}


def _curves_over_k(part: TaskPart, order: Sequence[str]) -> Iterator[tuple[Meaning, Markup]]:
    for stem, by_k in _metrics_by_stem(part).items():
        meaning = meaning_of(stem)
        aside = beside(part, stem)
        caption = ". ".join(filter(None, (meaning.sentence.rstrip("."), aside and aside[0].upper() + aside[1:]))) + "."
        lines = [
            Curve(
                label=key,
                series=order.index(key),
                points=tuple(
                    (k, part.results[metric][key].estimate) for k, metric in by_k if key in part.results[metric]
                ),
            )
            for key in part.encoders
        ]
        yield (
            replace(meaning, sentence=caption if aside else meaning.sentence),
            curves(
                [line for line in lines if line.points],
                x_label="k nearest neighbors",
                label=f"{meaning.title} over k",
                neutral=meaning.neutral,
                is_log=True,
            ),
        )


def _over_bytes(part: TaskPart, report: Report, order: Sequence[str]) -> tuple[Meaning, Markup] | None:
    """The headline metric over the bytes a patch that float16 features take, where a nested encoder's widths are there.

    Each nested encoder is a line through its widths; every other encoder is a point to compare with.
    """
    metric = part.headline()
    of_each = {summary.key: summary for summary in report.encoders if metric and summary.key in part.results[metric]}
    lines: dict[str, list[str]] = {}
    for key, summary in of_each.items():
        lines.setdefault(summary.nested_in or key, []).append(key)
    if metric is None or all(len(keys) < 2 for keys in lines.values()):
        return None
    meaning = meaning_of(metric)
    drawn = [
        Curve(
            label=name,
            series=order.index(keys[0]),
            points=tuple(
                sorted(
                    ((BYTES * of_each[key].dim, part.results[metric][key].estimate) for key in keys),
                    key=lambda point: point[0],
                )
            ),
        )
        for name, keys in lines.items()
    ]
    chart = curves(
        drawn,
        x_label="bytes a patch",
        label=f"{meaning.title} over bytes a patch",
        neutral=meaning.neutral,
        is_log=True,
    )
    aside = beside(part, metric)
    return (replace(meaning, title=f"{meaning.title} ({aside})") if aside else meaning), chart


def _intervals(part: TaskPart, order: Sequence[str]) -> Iterator[Markup]:
    """Forest plots of the metrics that no curve shows, one for each scale."""
    curved = {metric for by_k in _metrics_by_stem(part).values() for _, metric in by_k}
    scales: dict[str, list[str]] = {}
    for metric in part.results:
        if metric not in curved:
            scales.setdefault(meaning_of(metric).scale, []).append(metric)
    for metrics in scales.values():
        groups = [_interval_group(metric, part, order) for metric in metrics]
        yield forest(groups, neutral=meaning_of(metrics[0]).neutral, label=f"Metrics of {part.name}")


def _interval_group(metric: str, part: TaskPart, order: Sequence[str]) -> ForestGroup:
    row = part.results[metric]
    digits = decimals((result.estimate for result in row.values()), spare=1)
    rows = tuple(
        Row(
            label=key,
            series=order.index(key),
            estimate=row[key].estimate,
            text=estimate_text(row[key].estimate, digits),
        )
        for key in part.encoders
        if key in row
    )
    aside = beside(part, metric)
    return ForestGroup(title=meaning_of(metric).title + (f" ({aside})" if aside else ""), rows=rows)


def _differences(part: TaskPart, order: Sequence[str]) -> Iterator[tuple[str, list[Markup]]]:
    """For each reference encoder, forest plots of the differences from it, one for each scale."""
    panels: dict[str, dict[str, dict[str, list[Comparison]]]] = {}
    for row in part.comparisons:
        panel = panels.setdefault(row.reference, {}).setdefault(meaning_of(row.metric).scale, {})
        panel.setdefault(row.metric, []).append(row)
    for reference, scales in panels.items():
        yield (
            reference,
            [
                forest(
                    [_difference_group(metric, rows, part, order) for metric, rows in panel.items()],
                    neutral=0.0,
                    label=f"Differences from {reference}",
                )
                for panel in scales.values()
            ],
        )


def _difference_group(
    metric: str, comparisons: Sequence[Comparison], part: TaskPart, order: Sequence[str]
) -> ForestGroup:
    digits = decimals((row.difference for row in comparisons), spare=1)
    rows = tuple(
        Row(
            label=row.encoder,
            series=order.index(row.encoder),
            estimate=row.difference,
            text=estimate_text(row.difference, digits, "+"),
            aside=p_text(row.p_value if isnan(row.p_holm) else row.p_holm)
            + (f", within {row.margin:g}" if is_as_good(row) else ""),
        )
        for row in comparisons
    )
    told = {row.encoder: beside_difference(part, row) for row in comparisons}
    same = len(set(told.values())) == 1
    aside = told[comparisons[0].encoder] if same else "; ".join(f"{key}: {text}" for key, text in told.items())
    return ForestGroup(title=meaning_of(metric).title + (f" ({aside})" if aside else ""), rows=rows)


def _how_computed(part: TaskPart) -> list[list[str]]:
    """Metric, rows, interval method and settings, with the encoders that share them."""
    alike: dict[tuple[str, str, str, str], list[str]] = {}
    for row in (result for results in part.results.values() for result in results.values()):
        facts = (meaning_of(row.metric).title, f"{row.n:,}", row.estimate.method, settings_text(row.settings))
        alike.setdefault(facts, []).append(row.encoder)
    return [[*facts, ", ".join(keys)] for facts, keys in alike.items()]

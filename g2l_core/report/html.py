"""A report as one HTML page with its style sheet and pictures inside: no script, no network."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from math import isnan

from g2l_core.report.page import document, table
from g2l_core.report.pictures import pictures_of
from g2l_core.report.plots import Curve, Group, Row, curves, forest
from g2l_core.report.svg import key_mark
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
    proper,
    published_text,
    reasons,
    split_k,
    support,
    task_parts,
)
from g2l_core.results import Better, Comparison, EncoderSummary, Failure, Report, Result

_DIGEST_SHOWN = 12
_BETTER: Mapping[Better, str] = {"higher": "", "lower": "lower is better", "neither": "neither way is better"}
_VERDICTS = {True: "within", False: "beyond", None: "quiet"}


def page(report: Report) -> str:
    """The whole report as HTML. Every text of the report is escaped.

    Raises:
        TaskError: If two results have the same task, metric and encoder.
    """
    parts = task_parts(report)
    order = encoder_order(report)
    shown = [part for part in parts if part.is_shown]
    body = [
        _head(report, shown),
        _notes(report.notes),
        _failures(report.failures),
        _overview(shown, order),
        _encoders(report.encoders, order),
        *(_task(part, i, order, report) for i, part in enumerate(shown)),
        _glossary(shown),
        _provenance(report.provenance),
    ]
    return document(report.title, "".join(body))


def _figure(caption: str, plot: str) -> str:
    return (
        f'<figure><figcaption class="quiet">{caption}</figcaption>'
        f'<div class="scroll" tabindex="0">{plot}</div></figure>\n'
    )


def _badge(note: str) -> str:
    return f'<span class="badge">{escape(note)}</span>' if note else ""


def _head(report: Report, shown: Sequence[TaskPart]) -> str:
    lead = "".join(f'<p class="lead">{escape(sentence)}</p>\n' for sentence in report.summary)
    links = "".join(f'<a href="#task-{i}">{escape(part.name)}</a>' for i, part in enumerate(shown))
    nav = f'<nav aria-label="Tasks">{links}</nav>\n' if len(shown) > 1 else ""
    return f'<header><p class="over">G2L benchmark</p>\n<h1>{escape(report.title)}</h1>\n{lead}{nav}</header>\n'


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>\n" for note in notes)
    return f'<div class="notes"><h2>Before you read the figures</h2>\n<ul>{items}</ul></div>\n'


def _overview(shown: Sequence[TaskPart], order: Sequence[str]) -> str:
    """One figure a task and encoder; of a single task, its own table says as much."""
    headlines = {i: metric for i, part in enumerate(shown) if (metric := part.headline())}
    if len(headlines) < 2:
        return ""
    keys = [key for key in order if any(key in shown[i].figures[metric] for i, metric in headlines.items())]
    rows = []
    for i, metric in headlines.items():
        row = shown[i].figures[metric]
        told = "".join(f'<span class="sub">{escape(line)}</span>' for line in (meaning_of(metric).title, support(row)))
        name = f'<a href="#task-{i}" class="name">{escape(shown[i].name)}</a>{told}'
        rows.append([name, *_cells(shown[i], row, keys)])
    header = ["Task", *(f'{key_mark(order.index(key))}<span class="name">{escape(key)}</span>' for key in keys)]
    caption = "One figure a task with its 95 % interval; all others are in the tasks' own tables."
    return f'<section>\n<h2>Overview</h2>\n{table(header, rows, "figures")}<p class="quiet">{caption}</p>\n</section>\n'


def _failures(failures: Sequence[Failure]) -> str:
    if not failures:
        return ""
    items = "".join(f"<li><b>{escape(where)}</b>: {escape(reason)}</li>\n" for where, reason in reasons(failures))
    return f'<div class="failures"><h2>Not evaluated</h2>\n<ul>{items}</ul></div>\n'


def _encoders(encoders: Sequence[EncoderSummary], order: Sequence[str]) -> str:
    if not encoders:
        return ""
    rows = [
        [
            _encoder_heading(facts, order.index(facts.key)),
            escape(facts.weights),
            f"{facts.dim:,}",
            escape(facts.pooling),
            escape(facts.precision),
            f'<code title="{escape(facts.digest)}">{escape(facts.digest[:_DIGEST_SHOWN])}</code>',
        ]
        for facts in encoders
    ]
    header = ("Encoder", "Weights", "Dim", "Pooling", "Precision", "Digest")
    return f"<section>\n<h2>Encoders</h2>\n{table(header, rows, 'encoders')}</section>\n"


def _encoder_heading(facts: EncoderSummary, number_on_page: int) -> str:
    name = f'<span class="sub">{escape(facts.name)}</span>' if facts.name != facts.key else ""
    return f'{key_mark(number_on_page)}<span class="name">{escape(facts.key)}</span> {_badge(facts.note)}{name}'


def _task(part: TaskPart, i: int, order: Sequence[str], report: Report) -> str:
    return (
        f'<section id="task-{i}">\n<h2>{escape(part.name)}</h2>\n{_task_table(part, order, report.encoders)}'
        f"{_expected(held_against(part, report))}"
        f"{''.join(_over_k(part, order))}{''.join(_intervals(part, order))}"
        f"{''.join(_differences(part.comparisons, order))}{pictures_of(part.pictures, order)}"
        f"{_how_made(part)}</section>\n"
    )


def _expected(held: Sequence[ExpectedVsFound]) -> str:
    if not held:
        return ""
    rows = (
        [
            escape(meaning_of(row.expected.metric).title),
            escape(row.expected.encoder),
            _found(row),
            f'<span class="whole">{escape(proper(published_text(row.expected)))}</span>',
            f'<span class="{_VERDICTS[row.within]}">{escape(proper(row.verdict))}</span>',
            escape(row.expected.source),
        ]
        for row in held
    )
    header = ("Figure", "Encoder", "Found", "Published", "Tolerance", "Source")
    return f"<h3>Beside published figures</h3>\n{table(header, rows, 'expected')}"


def _found(held: ExpectedVsFound) -> str:
    if held.found is None:
        return "\u2013"
    digits = decimals([held.found], spare=1)
    bounds = proper(interval(held.found, digits))
    return f'{proper(number(held.found.value, digits))}<span class="interval">{bounds}</span>'


def _task_table(part: TaskPart, order: Sequence[str], encoders: Sequence[EncoderSummary]) -> str:
    if not part.figures:
        return ""
    facts = {encoder.key: encoder for encoder in encoders}
    header = ["Figure"]
    for key in part.encoders:
        pooling, note = (facts[key].pooling, facts[key].note) if key in facts else ("", "")
        told = f'<span class="sub">{escape(pooling)} {_badge(note)}</span>' if pooling or note else ""
        header.append(f'{key_mark(order.index(key))}<span class="name">{escape(key)}</span>{told}')
    rows, above = [], ""
    for metric, row in part.figures.items():
        told = support(row)
        rows.append([_metric_heading(metric, row, told if told != above else ""), *_cells(part, row, part.encoders)])
        above = told
    caption = (
        "Values with 95 % intervals. Bold is the best value of a row, which alone does not make it a lead. Below a "
        "figure's name stands what it rests on; where nothing does, the same as above."
    )
    return f'{table(header, rows, "figures")}<p class="quiet">{caption}</p>\n'


def _metric_heading(metric: str, row: Mapping[str, Result], told: str) -> str:
    meaning = meaning_of(metric)
    direction = _BETTER[next(iter(row.values())).better]
    lines = "".join(f'<span class="sub">{escape(line)}</span>' for line in (told, direction) if line)
    return f'<span title="{escape(meaning.sentence or metric)}">{escape(meaning.title)}</span>{lines}'


def _cells(part: TaskPart, row: Mapping[str, Result], keys: Sequence[str]) -> Iterator[str]:
    digits, leading = decimals((result.estimate for result in row.values()), spare=1), best(row)
    for key in keys:
        if key in row:
            value = proper(number(row[key].estimate.value, digits))
            bounds = proper(interval(row[key].estimate, digits))
            yield (f"<b>{value}</b>" if key in leading else value) + f'<span class="interval">{bounds}</span>'
        else:
            gap = part.gap(key)
            yield '<span class="failed">failed</span>' if gap == "failed" else "\u2013"


def _k_families(part: TaskPart) -> dict[str, list[str]]:
    """The metrics that differ in their k alone, by their common stem; only where there are several."""
    families: dict[str, list[str]] = {}
    for metric in part.figures:
        stem, k = split_k(metric)
        if k is not None:
            families.setdefault(stem, []).append(metric)
    return {stem: metrics for stem, metrics in families.items() if len(metrics) > 1}


def _over_k(part: TaskPart, order: Sequence[str]) -> Iterator[str]:
    for stem, metrics in _k_families(part).items():
        meaning = meaning_of(stem)
        by_k = sorted((k, metric) for metric in metrics if (k := split_k(metric)[1]) is not None)
        lines = [
            Curve(
                label=key,
                encoder=order.index(key),
                points=tuple((k, row[key].estimate) for k, metric in by_k if key in (row := part.figures[metric])),
            )
            for key in part.encoders
        ]
        drawn = [line for line in lines if line.points]
        plot = curves(drawn, neutral=meaning.neutral, label=f"{meaning.title} over k")
        yield f"<h3>{escape(meaning.title)} over k</h3>\n{_figure(escape(meaning.sentence), plot)}"


def _intervals(part: TaskPart, order: Sequence[str]) -> Iterator[str]:
    """Forest plots of the figures that no curve shows, one a scale."""
    curved = {metric for metrics in _k_families(part).values() for metric in metrics}
    scales: dict[str, list[str]] = {}
    for metric in part.figures:
        if metric not in curved:
            scales.setdefault(meaning_of(metric).scale, []).append(metric)
    for i, metrics in enumerate(scales.values()):
        groups = [_interval_group(metric, part, order) for metric in metrics]
        title = "<h3>Figures with 95 % intervals</h3>\n" if i == 0 else ""
        plot = forest(groups, neutral=meaning_of(metrics[0]).neutral, label=f"Figures of {part.name}")
        yield title + _figure("", plot)


def _interval_group(metric: str, part: TaskPart, order: Sequence[str]) -> Group:
    row = part.figures[metric]
    digits = decimals((result.estimate for result in row.values()), spare=1)
    rows = tuple(
        Row(
            label=key,
            encoder=order.index(key),
            estimate=row[key].estimate,
            text=figure(row[key].estimate, digits),
        )
        for key in part.encoders
        if key in row
    )
    return Group(title=meaning_of(metric).title, rows=rows)


def _differences(comparisons: Sequence[Comparison], order: Sequence[str]) -> Iterator[str]:
    """Forest plots of the differences from a reference encoder, one a reference and scale."""
    panels: dict[tuple[str, str], dict[str, list[Comparison]]] = {}
    for row in comparisons:
        panel = panels.setdefault((row.reference, meaning_of(row.metric).scale), {})
        panel.setdefault(row.metric, []).append(row)
    references = [reference for reference, _ in panels]
    together = sorted(panels.items(), key=lambda item: references.index(item[0][0]))
    for i, ((reference, _), panel) in enumerate(together):
        groups = [_difference_group(metric, rows, order) for metric, rows in panel.items()]
        first = i == 0 or together[i - 1][0][0] != reference
        title = f"<h3>Difference from {escape(reference)}</h3>\n" if first else ""
        caption = (
            "Right of the line: higher than the reference, both taken on the same draws. p is adjusted by Holm's "
            "method over the tasks that compare the same two encoders by the same figure."
        )
        yield title + _figure(
            caption if first else "", forest(groups, neutral=0.0, label=f"Differences from {reference}")
        )


def _difference_group(metric: str, comparisons: Sequence[Comparison], order: Sequence[str]) -> Group:
    digits = decimals((row.difference for row in comparisons), spare=1)
    rows = tuple(
        Row(
            label=row.encoder,
            encoder=order.index(row.encoder),
            estimate=row.difference,
            text=figure(row.difference, digits, "+"),
            aside=p_text(row.p_value if isnan(row.p_holm) else row.p_holm),
        )
        for row in comparisons
    )
    return Group(title=meaning_of(metric).title, rows=rows)


def _how_made(part: TaskPart) -> str:
    results = [result for row in part.figures.values() for result in row.values()]
    if not results:
        return ""
    alike: dict[tuple[str, str, str, str], list[str]] = {}
    for row in results:
        settings = ", ".join(f"{name}={value}" for name, value in sorted(row.settings.items()))
        facts = (meaning_of(row.metric).title, f"{row.n:,}", row.estimate.method, settings)
        alike.setdefault(facts, []).append(row.encoder)
    rows = ([*map(escape, facts), escape(", ".join(keys))] for facts, keys in alike.items())
    shown = table(("Figure", "Rows", "Interval", "Settings", "Encoders"), rows)
    return f"<details><summary>How each figure was made</summary>\n{shown}</details>\n"


def _glossary(shown: Sequence[TaskPart]) -> str:
    stems = (meaning_of(split_k(metric)[0]) for part in shown for metric in part.figures)
    known = {meaning.title: meaning.sentence for meaning in stems if meaning.sentence}
    if not known:
        return ""
    words = "".join(f"<dt>{escape(title)}</dt><dd>{escape(sentence)}</dd>\n" for title, sentence in known.items())
    return f"<section>\n<h2>What the figures say</h2>\n<dl>{words}</dl></section>\n"


def _provenance(provenance: Mapping[str, str]) -> str:
    if not provenance:
        return ""
    rows = ([escape(key), f'<span class="mono">{escape(text)}</span>'] for key, text in sorted(provenance.items()))
    return f"<section>\n<h2>Provenance</h2>\n{table(('What', 'Value'), rows, 'provenance')}</section>\n"

"""A report as one HTML page with its style sheet and pictures inside: no script, no network."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape

from g2l_core.metrics.results import Comparison, EncoderFacts, Failure, Report, Result
from g2l_core.report_plots import COLORS, Curve, Group, Row, curves, forest, key_mark
from g2l_core.report_tables import (
    TaskPart,
    best,
    decimals,
    encoder_order,
    figure,
    interval,
    meaning_of,
    number,
    p_text,
    proper,
    split_k,
    task_parts,
)

_DIGEST_SHOWN = 12

_LIGHT = ("#005a9c", "#c24e00", "#00875f", "#a4407f", "#4a4a4a", "#2f93cf")
_DARK = ("#4fa3e8", "#f07c33", "#3ccb9f", "#e585bd", "#f0d060", "#b3dcf7")
"""After Okabe & Ito (2008), moved until every pair stays 14 CIELAB units apart to all three kinds of colour blindness
(as Machado et al. 2009 simulate them), and every colour has a contrast of 3 with the page."""

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --muted: #59636e; --rule: #d8dee4;
  --soft: #f5f7f9; --warn: #8a4b00; --warn-rule: #e0a458; --warn-soft: #fff7ea; %LIGHT% }
@media screen and (prefers-color-scheme: dark) {
  :root { --page: #14171b; --ink: #e6e9ed; --muted: #9aa5b1; --rule: #323941;
    --soft: #1c2127; --warn: #f2c078; --warn-rule: #80561d; --warn-soft: #2a2115; %DARK% } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 -apple-system, "Segoe UI", Roboto,
  "Noto Sans", "Helvetica Neue", "Liberation Sans", Arial, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 56px 28px 96px; }
h1, h2, h3 { line-height: 1.2; text-wrap: balance; overflow-wrap: anywhere; }
h1 { font-size: 2.1rem; font-weight: 650; letter-spacing: -.02em; margin: 0 0 1.25rem; }
h2 { font-size: 1.4rem; font-weight: 650; letter-spacing: -.01em; margin: 0 0 1rem; }
h3 { font-size: 1rem; font-weight: 600; margin: 2.25rem 0 .35rem; }
p { margin: 0 0 .6rem; max-width: 46rem; }
section { margin-top: 3.5rem; padding-top: 2rem; border-top: 1px solid var(--rule); }
.over { color: var(--muted); font-size: .8rem; letter-spacing: .09em; text-transform: uppercase; margin: 0 0 .5rem; }
.lead { font-size: 1.1rem; }
.quiet { color: var(--muted); font-size: .88rem; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.4rem; margin-top: 1.5rem; font-size: .95rem; }
a { color: var(--e0); text-underline-offset: .2em; text-decoration-thickness: 1px; }
.scroll { overflow-x: auto; margin: 0 0 .75rem; }
.scroll:focus-visible, summary:focus-visible, a:focus-visible { outline: 2px solid var(--e0); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; line-height: 1.4; }
th, td { padding: .6rem 1.4rem .6rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
th:last-child, td:last-child { padding-right: 0; }
thead th { font-weight: 600; font-size: .85rem; vertical-align: top; border-bottom: 1.5px solid var(--ink); }
tbody th { font-weight: 500; }
.figures thead th, .figures td { min-width: 8.5rem; }
.figures thead th { width: 12.5rem; }
.figures tbody th, .figures thead th:first-child { position: sticky; left: 0; background: var(--page);
  width: auto; min-width: 8rem; }
td { font-variant-numeric: tabular-nums; }
td b { font-weight: 700; }
.interval { display: block; color: var(--muted); font-size: .85rem; white-space: nowrap; }
.failed { color: var(--warn); }
code, .mono { font: .86em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
  overflow-wrap: anywhere; }
.name { overflow-wrap: anywhere; }
.sub { display: block; color: var(--muted); font-size: .85rem; font-weight: 400; }
.badge { display: inline-block; padding: 0 .5em; border: 1px solid var(--warn-rule); border-radius: 1em;
  background: var(--warn-soft); color: var(--warn); font-size: .75rem; font-weight: 600; line-height: 1.5; }
.failures { margin-top: 2rem; padding: 1.1rem 1.3rem .7rem; border: 1px solid var(--warn-rule); border-radius: 8px;
  background: var(--warn-soft); }
.failures h2 { font-size: 1.05rem; color: var(--warn); margin: 0 0 .5rem; }
ul { margin: 0; padding: 0 0 0 1.1rem; }
li { margin: 0 0 .4rem; overflow-wrap: anywhere; }
figure { margin: 0; }
figcaption { margin-bottom: .75rem; }
.plot { display: block; width: 100%; min-width: 700px; height: auto; }
.key { width: 1em; height: 1em; margin-right: .35em; vertical-align: -.12em; overflow: visible; }
.plot text { font-size: 14px; fill: var(--ink); }
.plot .title { font-weight: 600; }
.plot .tick { font-size: 12.5px; fill: var(--muted); }
.plot .figure { font-size: 13px; fill: var(--muted); font-variant-numeric: tabular-nums; }
.plot .middle { text-anchor: middle; }
.plot .end { text-anchor: end; }
.grid, .rule, .neutral, .bar, .track { fill: none; stroke: var(--rule); stroke-width: 1; }
.grid { opacity: .75; }
.neutral { stroke: var(--muted); stroke-width: 1.5; stroke-dasharray: 4 3; }
.bar { stroke: currentColor; stroke-width: 2.25; stroke-linecap: round; }
.track { stroke: currentColor; stroke-width: 1.75; stroke-linejoin: round; opacity: .6; }
.mark { fill: currentColor; stroke: var(--page); stroke-width: 1; vector-effect: non-scaling-stroke; }
details { margin-top: 1.75rem; }
summary { cursor: pointer; color: var(--muted); font-size: .92rem; }
details .scroll { margin-top: .75rem; }
details table, .provenance { font-size: .85rem; }
.encoders td:first-of-type { min-width: 12rem; }
.encoders tbody th { min-width: 13rem; }
.encoders code { white-space: nowrap; }
dl { margin: 0; max-width: 46rem; }
dt { font-weight: 600; margin-top: .9rem; }
dd { margin: .1rem 0 0; color: var(--muted); }
%COLORS%
@media (max-width: 640px) { main { padding: 32px 18px 64px; } h1 { font-size: 1.65rem; }
  .figures tbody th, .figures thead th:first-child { max-width: 9rem; }
  section { margin-top: 2.5rem; padding-top: 1.5rem; } }
@media print { @page { margin: 16mm 15mm; } html { font-size: 9.5pt; } body { font-size: 1rem; }
  main { max-width: none; padding: 0; } nav { display: none; } .scroll { overflow: visible; } .plot { min-width: 0; }
  th, td { padding-top: .3rem; padding-bottom: .3rem; } .interval { display: inline; margin-left: .5em; }
  section { margin-top: 1.5rem; padding-top: 1rem; } figure, tr, .failures, dt { break-inside: avoid; }
  h2, h3, figcaption, thead, dt { break-after: avoid; } a { color: inherit; }
  .figures tbody th, .figures thead th { position: static; }
  details::details-content { content-visibility: visible; display: block; height: auto; } }
"""


def page(report: Report) -> str:
    """The whole report as HTML. Every text of the report is escaped.

    Raises:
        TaskError: If two results have the same task, metric and encoder.
    """
    parts = task_parts(report)
    order = encoder_order(report)
    notes = {facts.key: facts.note for facts in report.encoders if facts.note}
    shown = [part for part in parts if part.figures or part.comparisons]
    body = [
        _head(report, shown),
        _failures(report.failures),
        _encoders(report.encoders, order),
        *(_task(part, i, order, notes) for i, part in enumerate(shown)),
        _glossary(shown),
        _provenance(report.provenance),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(report.title)}</title>\n<style>{_style()}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(body)}</main>\n</body>\n</html>\n"
    )


def _style() -> str:
    def variables(colors: Sequence[str]) -> str:
        return " ".join(f"--e{i}: {color};" for i, color in enumerate(colors))

    classes = "\n".join(f".e{i} {{ color: var(--e{i}); }}" for i in range(COLORS))
    style = _STYLE.replace("%LIGHT%", variables(_LIGHT)).replace("%DARK%", variables(_DARK))
    return style.replace("%COLORS%", classes)


def _table(header: Iterable[str], rows: Iterable[Iterable[str]], style: str = "") -> str:
    """A table in a box of its own to scroll in; the cells are HTML, the first of each row its heading."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = "".join(f"<tr>{_table_row(row)}</tr>\n" for row in rows)
    return (
        f'<div class="scroll" tabindex="0"><table class="{style}">\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody></table></div>\n"
    )


def _table_row(cells: Iterable[str]) -> str:
    first, *rest = cells
    return f'<th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest)


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


def _failures(failures: Sequence[Failure]) -> str:
    if not failures:
        return ""
    items = "".join(
        f"<li><b>{escape(row.task)}{escape(f', {row.encoder}') if row.encoder else ''}</b>: {escape(row.reason)}</li>\n"
        for row in failures
    )
    return f'<div class="failures"><h2>Not evaluated</h2>\n<ul>{items}</ul></div>\n'


def _encoders(encoders: Sequence[EncoderFacts], order: Sequence[str]) -> str:
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
    return f"<section>\n<h2>Encoders</h2>\n{_table(header, rows, 'encoders')}</section>\n"


def _encoder_heading(facts: EncoderFacts, number_on_page: int) -> str:
    name = f'<span class="sub">{escape(facts.name)}</span>' if facts.name != facts.key else ""
    return f'{key_mark(number_on_page)}<span class="name">{escape(facts.key)}</span> {_badge(facts.note)}{name}'


def _task(part: TaskPart, i: int, order: Sequence[str], notes: Mapping[str, str]) -> str:
    return (
        f'<section id="task-{i}">\n<h2>{escape(part.name)}</h2>\n{_task_table(part, order, notes)}'
        f"{''.join(_over_k(part, order))}{''.join(_intervals(part, order))}"
        f"{''.join(_differences(part.comparisons, order))}{_how_made(part)}</section>\n"
    )


def _task_table(part: TaskPart, order: Sequence[str], notes: Mapping[str, str]) -> str:
    if not part.figures:
        return ""
    header = ["Figure"]
    for key in part.encoders:
        note = f'<span class="sub">{_badge(notes[key])}</span>' if key in notes else ""
        header.append(f'{key_mark(order.index(key))}<span class="name">{escape(key)}</span>{note}')
    rows = ([_metric_heading(metric, row), *_cells(part, row)] for metric, row in part.figures.items())
    caption = "Values with 95 % intervals. Bold is the best value of a row, which alone does not make it a lead."
    return f'{_table(header, rows, "figures")}<p class="quiet">{caption}</p>\n'


def _metric_heading(metric: str, row: Mapping[str, Result]) -> str:
    meaning = meaning_of(metric)
    higher = next(iter(row.values())).higher_is_better
    direction = "" if higher else '<span class="sub">lower is better</span>'
    return f'<span title="{escape(meaning.sentence or metric)}">{escape(meaning.title)}</span>{direction}'


def _cells(part: TaskPart, row: Mapping[str, Result]) -> Iterator[str]:
    digits, leading = decimals((result.estimate for result in row.values()), spare=1), best(row)
    for key in part.encoders:
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
    for i, ((reference, _), panel) in enumerate(panels.items()):
        groups = [_difference_group(metric, rows, order) for metric, rows in panel.items()]
        first = i == references.index(reference)
        title = f"<h3>Difference from {escape(reference)}</h3>\n" if first else ""
        caption = "Right of the line: higher than the reference, both taken on the same draws." if first else ""
        yield title + _figure(caption, forest(groups, neutral=0.0, label=f"Differences from {reference}"))


def _difference_group(metric: str, comparisons: Sequence[Comparison], order: Sequence[str]) -> Group:
    digits = decimals((row.difference for row in comparisons), spare=1)
    rows = tuple(
        Row(
            label=row.encoder,
            encoder=order.index(row.encoder),
            estimate=row.difference,
            text=figure(row.difference, digits, "+"),
            aside=p_text(row.p_value),
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
    table = _table(("Figure", "Rows", "Interval", "Settings", "Encoders"), rows)
    return f"<details><summary>How each figure was made</summary>\n{table}</details>\n"


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
    return f"<section>\n<h2>Provenance</h2>\n{_table(('What', 'Value'), rows, 'provenance')}</section>\n"

"""An HTML page that stands on its own: style sheet inside, light and dark, no script, no network."""

from collections.abc import Iterable, Sequence
from html import escape

from g2l_core.report.svg import COLORS

_LIGHT = ("#005a9c", "#c24e00", "#00875f", "#a4407f", "#4a4a4a", "#2f93cf")
_DARK = ("#4fa3e8", "#f07c33", "#3ccb9f", "#e585bd", "#f0d060", "#b3dcf7")
"""After Okabe & Ito (2008), moved until every pair stays 14 CIELAB units apart to all three kinds of color blindness
(as Machado et al. 2009 simulate them), and every color has a contrast of 3 with the page."""

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
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem 2rem;
  margin-top: 1rem; align-items: start; }
.tiles.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); }
.tiles figure { min-width: 0; }
.tiles figcaption { font-size: .88rem; margin-bottom: .4rem; }
.over-tiles { margin: 1.5rem 0 0; font-size: .92rem; overflow-wrap: anywhere; }
.pair { display: flex; gap: .75rem; }
.pair div { flex: 1 1 0; min-width: 0; max-width: 19rem; }
.plane, .map { display: block; width: 100%; height: auto; }
.plane { background: var(--soft); border: 1px solid var(--rule); border-radius: 4px; }
.map { max-width: 19rem; }
.map text { font-size: 13px; fill: var(--muted); }
.cells { shape-rendering: crispEdges; }
.dots { fill: currentColor; opacity: .7; }
.scalebar { stroke: var(--ink); stroke-width: 3; fill: none; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; list-style: none; padding: 0; margin: 0 0 .2rem;
  font-size: .88rem; }
.heat { width: auto; font-size: .85rem; }
.heat th, .heat td { padding: .3rem .55rem; border-bottom: 0; vertical-align: middle; }
.heat tbody th { padding-left: 0; max-width: 22rem; }
.heat td, .heat thead th { text-align: center; min-width: 3.4rem; }
.heat thead th:first-child { text-align: left; padding-left: 0; }
.heat thead th { vertical-align: bottom; border-bottom: 0; max-width: 8rem; }
.heat.upright thead th:not(:first-child) .name { writing-mode: vertical-rl; transform: rotate(180deg);
  max-height: 15rem; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.heat.upright, .heat.upright thead th { font-size: .75rem; }
.heat td:last-child, .heat thead th:last-child { padding-right: .55rem; }
.heat.upright th, .heat.upright td, .heat.upright tr > :last-child { padding: .25rem; min-width: 2.1rem; }
.heat.upright tbody th, .heat.upright thead th:first-child { padding-left: 0; min-width: 8rem; max-width: 10rem; }
.heat.upright .name { overflow-wrap: break-word; }
.heat td { background: color-mix(in srgb, var(--e0) calc(var(--share) * 50%), var(--soft));
  border: 1px solid var(--page); }
.heat td .sub { color: inherit; opacity: .8; font-size: .8em; }
.notes { margin-top: 1.5rem; padding: 1.1rem 1.3rem .7rem; border: 1px solid var(--rule);
  border-left: 4px solid var(--e0); border-radius: 8px; background: var(--soft); }
.notes h2 { font-size: 1.05rem; margin: 0 0 .5rem; }
.expected td:last-child { min-width: 12rem; }
.whole { white-space: nowrap; }
.within { font-weight: 600; }
.beyond { font-weight: 600; color: var(--warn); }
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
  section { margin-top: 1.5rem; padding-top: 1rem; } figure, tr, .failures, .notes, dt { break-inside: avoid; }
  h2, h3, figcaption, thead, dt, summary, h3 + .quiet, summary + .quiet, .over-tiles, .legend { break-after: avoid; }
  a { color: inherit; }
  .figures tbody th, .figures thead th { position: static; }
  .heat td, .map, .plane { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  details::details-content { content-visibility: visible; display: block; height: auto; } }
"""


def document(title: str, body: str) -> str:
    """The whole page. `body` is HTML, the title text."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{_style()}</style>\n</head>\n"
        f"<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )


def _style() -> str:
    def variables(colors: Sequence[str]) -> str:
        return " ".join(f"--e{i}: {color};" for i, color in enumerate(colors))

    classes = "\n".join(f".e{i} {{ color: var(--e{i}); }}" for i in range(COLORS))
    style = _STYLE.replace("%LIGHT%", variables(_LIGHT)).replace("%DARK%", variables(_DARK))
    return style.replace("%COLORS%", classes)


def table(header: Iterable[str], rows: Iterable[Iterable[str]], style: str = "") -> str:
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


def heat_table(
    corner: str, header: Iterable[str], rows: Iterable[tuple[str, Iterable[tuple[float, str]]]], style: str = ""
) -> str:
    """A table whose cells are shaded by a share from 0 to 1, and say it.

    Args:
        corner: HTML of the cell above the rows' headings.
        header: HTML of the columns' headings.
        rows: HTML of a heading, and of each cell its share (beyond 0 and 1, as these; NaN as 0) and its HTML.
        style: Classes besides "heat".
    """
    head = "".join(f'<th scope="col">{cell}</th>' for cell in (corner, *header))
    body = "".join(
        f'<tr><th scope="row">{name}</th>'
        + "".join(f'<td style="--share:{_shade(share)}">{cell}</td>' for share, cell in cells)
        + "</tr>\n"
        for name, cells in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="{f"heat {style}".rstrip()}">\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody></table></div>\n"
    )


def _shade(share: float) -> str:
    return f"{min(max(share, 0.0), 1.0):.2f}" if share == share else "0"

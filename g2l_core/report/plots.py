"""Forest plots and curves as SVG that takes its colors and fonts from the page's style sheet.

Matplotlib places everything. Its artists carry style sheet classes as their `gid`, and only what has one is kept, in
elements without any style of their own: so charts follow the page's light and dark mode, and are small. Class `eN`
colors what belongs to series N of the page, and the shapes of the marks distinguish the same series without color.

Lengths are SVG user units. The style sheet sets larger type on narrow screens, where a unit is half a pixel, and the
room for texts is measured by that.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import StringIO
from math import ceil, floor, inf, isfinite, log10
from string import ascii_uppercase
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from markupsafe import Markup

from g2l_core.report.page import COLORS, mark
from g2l_core.report.tables import proper, shortened
from g2l_core.results import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.transforms import Transform

WIDTH = 720
_ROW, _TITLE, _GROUP_GAP, _LINE = 22, 26, 12, 21
_CURVES_HEIGHT, _TOP, _BELOW = 270, 14, 52
_LABEL_ROOM = 205
_TYPE_SIZE = 17
"""The size of the type on narrow screens."""
_EMS = (
    dict.fromkeys(ascii_uppercase, 0.7)
    | dict.fromkeys("fijlrt.,:;'|!()[]- ", 0.32)
    | dict.fromkeys("mwMW@%\u2026", 0.92)
)
_DRAWABLE = 1e12
_CLASSES = frozenset(("grid", "rule", "neutral", "bar", "track", "mark", "tick", "title", "label", "value"))
_SVG = "{http://www.w3.org/2000/svg}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One interval of a forest plot."""

    label: str
    series: int
    """Its color and mark on the page."""
    estimate: Estimate
    text: str
    """The value in words, to the right."""
    aside: str = ""
    """What is printed further right."""


@dataclass(frozen=True, kw_only=True)
class ForestGroup:
    """Rows under one title."""

    title: str
    rows: tuple[Row, ...]

    def height(self) -> int:
        """The height of the drawn group."""
        return _TITLE + _ROW * len(self.rows) + _GROUP_GAP


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a chart."""

    label: str
    series: int
    """Its color and mark on the page."""
    points: tuple[tuple[float, Estimate], ...]
    """Each x with its value; bounds that are finite are drawn as an upright bar."""
    is_marked: bool = True
    """Whether each point gets a mark."""

    def finite(self) -> list[tuple[float, Estimate]]:
        """The points that can be drawn."""
        return [point for point in self.points if isfinite(point[1].value)]


class _Texts(list[tuple[str, str]]):
    """The texts of a chart, short and in full.

    Matplotlib gets their numbers instead: it measures and parses what it draws, and a name may be anything.
    """

    def add(self, text: str, room: float = WIDTH) -> str:
        self.append((_fitted(text, room), text))
        return str(len(self) - 1)


def _fitted(text: str, room: float = _LABEL_ROOM) -> str:
    return next(short for chars in range(len(text), -1, -1) if _width(short := shortened(text, chars)) <= room)


def _width(text: str) -> float:
    """About the width of a text in the type of narrow screens, rather too much: the reader's font is unknown."""
    return _TYPE_SIZE * sum(_EMS.get(letter, 0.57 if letter < "\u2e80" else 1.0) for letter in text)


def forest(groups: Sequence[ForestGroup], *, neutral: float | None, label: str) -> Markup:
    """Draw estimates with their intervals below one another on one axis.

    Args:
        groups: At least one, each with at least one row.
        neutral: Where to draw a line to compare with, if anywhere.
        label: What the plot shows, for screen readers.

    Returns:
        One svg element. An estimate that is not finite has no mark; a bound that is not finite, no bar.
    """
    rows = [row for group in groups for row in group.rows]
    bottom = sum(group.height() for group in groups)
    aside = max(_width(row.aside) + 14 * bool(row.aside) for row in rows)
    left = 34 + max(_width(_fitted(row.label)) for row in rows)
    right = max(WIDTH - aside - max(_width(row.text) for row in rows) - 12, left + 40)
    with _style():
        figure, axes, texts = *_figure(bottom + 30, left, right, 0, bottom), _Texts()
        axes.set_ylim(bottom, 0)
        axes.yaxis.set_visible(False)
        places, names = ticks(_values((row.estimate for row in rows), neutral), right - left)
        _axis(axes.xaxis, places, map(texts.add, names), grid=True)
        if neutral is not None:
            axes.axvline(neutral, gid="neutral")
        top = 0
        for group in groups:
            _forest_group(axes, group, top, texts, WIDTH - aside)
            top += group.height()
        return _svg(figure, texts, label)


def _forest_group(axes: "Axes", group: ForestGroup, top: int, texts: _Texts, values_end: float) -> None:
    from matplotlib.transforms import IdentityTransform, blended_transform_factory

    beside = blended_transform_factory(IdentityTransform(), axes.transData)

    def write(x: float, y: float, number: str, style: str, align: str = "left") -> None:
        _write(axes, x, y, number, style, beside, align)

    write(0, top + _TITLE / 2 + 3, texts.add(group.title), "title")
    for i, row in enumerate(group.rows):
        y = top + _TITLE + _ROW * (i + 0.5)
        _mark(axes, [6], [y], row.series, beside)
        write(20, y, texts.add(row.label, _LABEL_ROOM), "label")
        write(values_end, y, texts.add(proper(row.text)), "value", "right")
        if row.aside:
            write(WIDTH, y, texts.add(row.aside), "value", "right")
        low, value, high = _within(row.estimate, axes.get_xlim())
        if isfinite(value):
            if isfinite(high - low):
                _line(axes, [low, high], [y, y], f"bar e{row.series % COLORS}")
            _mark(axes, [value], [y], row.series)
    _line(axes, [0, WIDTH], [top + group.height()] * 2, "rule", beside)


def curves(
    lines: Sequence[Curve], *, x_label: str, label: str, neutral: float | None = None, is_log: bool = False
) -> Markup:
    """Draw lines over one axis, named at their right ends.

    Args:
        lines: At least one, each with at least one point.
        x_label: The name of the axis below.
        label: What the plot shows, for screen readers.
        neutral: Where to draw a line to compare with, if anywhere.
        is_log: Whether x, then above 0, is on a logarithmic scale with a tick at each x, and the lines' points at
            the same x stand beside each other.

    Returns:
        One svg element; points that are not finite are left out.
    """
    height = max(_CURVES_HEIGHT, _LINE * len(lines) + _TOP)
    xs = sorted({x for line in lines for x, _ in line.points})
    places, names = ticks(_values((e for line in lines for _, e in line.points), neutral))
    left = 10 + max(map(_width, names))
    right = WIDTH - 36 - max(_width(_fitted(line.label)) for line in lines)
    with _style():
        figure, axes, texts = *_figure(height + _BELOW, left, right, _TOP, height), _Texts()
        _axis(axes.yaxis, places, map(texts.add, names), grid=True)
        axes.set_xlabel(texts.add(x_label), gid="tick")
        if is_log:
            spread = (xs[-1] / xs[0]) ** 0.08 if xs[-1] > xs[0] else 2.0
            axes.set_xscale("log")
            _axis(axes.xaxis, xs, (texts.add(f"{x:g}") for x in xs), (xs[0] / spread, xs[-1] * spread))
        else:
            x_places, x_names = ticks(xs, right - left)
            _axis(axes.xaxis, x_places, map(texts.add, x_names))
        if neutral is not None:
            axes.axhline(neutral, gid="neutral")
        for i, line in enumerate(lines):
            _curve(axes, line, 6.0 * (i - (len(lines) - 1) / 2) if is_log else 0.0)
        _ends(axes, [line for line in lines if line.finite()], texts, height + _BELOW - _TOP, right)
        return _svg(figure, texts, label)


def _curve(axes: "Axes", line: Curve, shift: float) -> None:
    """One line, shifted sideways by a few units so that bars at the same x do not hide one another."""
    from matplotlib.transforms import Affine2D

    place = axes.transData + Affine2D().translate(shift, 0)
    points = [(x, *_within(estimate, axes.get_ylim())) for x, estimate in line.finite()]
    xs, values = [x for x, *_ in points], [value for _, _, value, _ in points]
    _line(axes, xs, values, f"track e{line.series % COLORS}", place)
    for x, low, _, high in points:
        if isfinite(high - low):
            _line(axes, [x, x], [low, high], f"bar e{line.series % COLORS}", place)
    if line.is_marked:
        _mark(axes, xs, values, line.series, place)


def _ends(axes: "Axes", lines: Sequence[Curve], texts: _Texts, top: float, right: float) -> None:
    """Write the names at the right ends, in the order of the ends."""
    from matplotlib.transforms import IdentityTransform

    heights = [
        float(axes.transData.transform((line.finite()[-1][0], _within(line.finite()[-1][1], axes.get_ylim())[1]))[1])
        for line in lines
    ]
    order = sorted(range(len(lines)), key=heights.__getitem__)
    for y, i in zip(apart([heights[i] for i in order], _LINE, top), order, strict=True):
        _mark(axes, [right + 20], [y], lines[i].series, IdentityTransform())
        _write(axes, right + 31, y, texts.add(lines[i].label, _LABEL_ROOM), "label", IdentityTransform())


def apart(heights: Sequence[float], gap: float, top: float) -> list[float]:
    """Ascending heights moved up no further than needed for a gap between each two, then down to stay below `top`."""
    placed: list[float] = []
    for y in heights:
        placed.append(max(y, placed[-1] + gap) if placed else y)
    return [min(y, top - gap * (len(placed) - 1 - i)) for i, y in enumerate(placed)]


def ticks(values: Iterable[float], room: float = inf) -> tuple[list[float], list[str]]:
    """Multiples of 1, 2 or 5 times a power of ten that enclose the values, and their labels.

    Args:
        values: Those that are not finite, or cannot be drawn, do not count.
        room: How long the axis is; fewer ticks are chosen where labels would touch.
    """
    from matplotlib.ticker import MaxNLocator

    drawn = [value for value in values if isfinite(value) and abs(value) < _DRAWABLE] or [0.0]
    low, high = min(drawn), max(drawn)
    size = max(abs(low), abs(high), 1e-3)
    if high - low < 1e-6 * size:
        low, high = low - size / 2, high + size / 2
    for bins in range(6, 0, -1):
        places = [
            float(place) for place in MaxNLocator(bins, steps=[1, 2, 5, 10], min_n_ticks=1).tick_values(low, high)
        ]
        digits = max(0, -floor(log10(places[1] - places[0]) + 1e-9))
        names = [f"{place:z,.{digits}f}" if abs(place) < 1e7 else f"{place:.3g}" for place in places]
        if (len(names) - 1) * (max(map(_width, names)) + 6) <= room:
            break
    return places, [proper(name) for name in names]


def _values(estimates: Iterable[Estimate], neutral: float | None) -> Iterator[float]:
    for estimate in estimates:
        yield from (estimate.value, estimate.low, estimate.high)
    if neutral is not None:
        yield neutral


def _within(estimate: Estimate, limits: tuple[float, float]) -> tuple[float, float, float]:
    """The low bound, the value and the high bound, moved to the ends of the axis where they lie beyond."""
    low, value, high = (
        min(max(number, limits[0]), limits[1]) if isfinite(number) else number
        for number in (estimate.low, estimate.value, estimate.high)
    )
    return low, value, high


# Matplotlib


def _style() -> AbstractContextManager[None]:
    """Matplotlib's own defaults, whatever the user's are, with texts kept as texts."""
    from matplotlib import style

    return style.context(
        ["default", {"svg.fonttype": "none", "font.size": 14, "xtick.labelsize": 12.5, "ytick.labelsize": 12.5}]
    )


def _figure(height: float, left: float, right: float, top: float, bottom: float) -> tuple["Figure", "Axes"]:
    """A figure with one pair of axes between these edges, where a unit is a pixel; `top` and `bottom` from above."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
    box = (left / WIDTH, 1 - bottom / height, (right - left) / WIDTH, (bottom - top) / height)
    axes = figure.add_axes(box)
    axes.spines[:].set_visible(False)
    return figure, axes


def _axis(
    axis: "Axis",
    places: Sequence[float],
    names: Iterable[str],
    limits: tuple[float, float] | None = None,
    *,
    grid: bool = False,
) -> None:
    """Set the ticks, and the limits to the outermost of them unless given."""
    axis.set_ticks(places, list(names))
    axis.set_tick_params(length=0, pad=8)
    axis.minorticks_off()
    axis.set_view_interval(*(limits or (places[0], places[-1])), ignore=True)
    for tick in axis.get_major_ticks():
        tick.label1.set_gid("tick")
        if grid:
            tick.gridline.set(visible=True, gid="grid")


def _line(axes: "Axes", xs: Sequence[float], ys: Sequence[float], style: str, place: "Transform | None" = None) -> None:
    from matplotlib.lines import Line2D

    axes.figure.add_artist(Line2D(xs, ys, gid=style, transform=place or axes.transData))


def _mark(
    axes: "Axes", xs: Sequence[float], ys: Sequence[float], series: int, place: "Transform | None" = None
) -> None:
    from matplotlib.lines import Line2D

    transform = place or axes.transData
    axes.figure.add_artist(Line2D(xs, ys, gid=f"mark {series}", transform=transform, marker="o", linestyle="none"))


def _write(axes: "Axes", x: float, y: float, number: str, style: str, place: "Transform", align: str = "left") -> None:
    axes.figure.text(x, y, number, gid=style, ha=align, va="center", transform=place)


def _svg(figure: "Figure", texts: _Texts, label: str) -> Markup:
    """The drawn artists that have a style sheet class, as elements of that class."""
    file = StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    parts = []
    for group in ElementTree.fromstring(file.getvalue()).iter(f"{_SVG}g"):
        style, _, series = group.get("id", "").partition(" ")
        if style not in _CLASSES:
            continue
        for path in group.findall(f"{_SVG}path"):
            line = Markup('<path d="{}" class="{}"/>')
            parts.append(line.format(_rounded(path.get("d", "")), f"{style} {series}".rstrip()))
        parts += [mark(int(series), *_place(use)) for use in group.iter(f"{_SVG}use") if style == "mark"]
        parts += [_text(text, style, *texts[int(text.text or 0)]) for text in group.findall(f"{_SVG}text")]
    plot = Markup('<svg class="plot" role="img" aria-label="{}" viewBox="0 0 {} {}">{}</svg>')
    height = ceil(figure.get_figheight() * 72)
    return plot.format(label, WIDTH, height, Markup("").join(parts))


def _text(text: ElementTree.Element, style: str, short: str, full: str) -> Markup:
    anchor = re.search(r"text-anchor: (\w+)", text.get("style", ""))
    classes = f"{style} {anchor[1]}" if anchor and anchor[1] != "start" else style
    more = Markup("<title>{}</title>").format(full) if short != full else ""
    return Markup('<text x="{}" y="{}" class="{}">{}{}</text>').format(*_place(text), classes, short, more)


def _place(element: ElementTree.Element) -> tuple[str, str]:
    return _rounded(element.get("x", "0")), _rounded(element.get("y", "0"))


def _rounded(numbers: str) -> str:
    """Coordinates to a tenth of a unit."""
    return " ".join(word if word.isalpha() else f"{float(word):z.1f}".removesuffix(".0") for word in numbers.split())

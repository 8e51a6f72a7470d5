"""Forest plots and curves as SVG text that takes its colors and fonts from the page's style sheet.

Lengths are SVG user units, x to the right and y down. Class `eN` colors what belongs to the page's encoder N; the
shapes tell the same encoders apart without color.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite, log

from g2l_core.report.svg import COLORS, WIDTH, Axis, axis_for, line_to, picture, shape, shortened, text_at
from g2l_core.report.tables import number, proper
from g2l_core.results import Estimate

_TITLE, _ROW, _GROUP_GAP = 26, 24, 14
_LABEL_X, _PLOT_X, _TEXT_X = 20, 236, 676
_LABEL_CHARS = 27
_CURVE_BOTTOM, _CURVE_LEFT, _CURVE_RIGHT = 276, 48, 690
_LABEL_ROW = 20


@dataclass(frozen=True, kw_only=True)
class Row:
    """One interval of a forest plot."""

    label: str
    encoder: int
    estimate: Estimate
    text: str
    """The figure in words, to the right."""
    aside: str = ""
    """What is said further right."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Rows under one title."""

    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One encoder's figure over k."""

    label: str
    encoder: int
    points: tuple[tuple[int, Estimate], ...]

    def finite(self) -> tuple[tuple[int, Estimate], ...]:
        """The points that can be drawn."""
        return tuple(point for point in self.points if isfinite(point[1].value))


def _drawn_values(estimates: Iterable[Estimate], neutral: float | None) -> Iterator[float]:
    for estimate in estimates:
        yield from (estimate.value, estimate.low, estimate.high)
    if neutral is not None:
        yield neutral


def forest(groups: Sequence[Group], *, neutral: float | None, label: str) -> str:
    """Estimates with their intervals below one another on one axis.

    Args:
        groups: At least one, each with at least one row.
        neutral: Where to draw a line to compare with, if anywhere.
        label: What the picture shows, for screen readers.

    Returns:
        One svg element. An estimate that is not finite has no mark; a bound that is not finite, no bar.
    """
    estimates = [row.estimate for group in groups for row in group.rows]
    axis = axis_for(_drawn_values(estimates, neutral), _PLOT_X + 8, _TEXT_X - 28)
    bottom = sum(_TITLE + _ROW * len(group.rows) + _GROUP_GAP for group in groups)
    parts = list(_vertical_grid(axis, bottom, neutral))
    top = 0
    for group in groups:
        parts += _forest_group(group, axis, top)
        top += _TITLE + _ROW * len(group.rows) + _GROUP_GAP
        parts.append(line_to(0, top, WIDTH, top, "rule"))
    return picture(WIDTH, bottom + 26, label, parts)


def _vertical_grid(axis: Axis, bottom: float, neutral: float | None) -> Iterator[str]:
    for tick in axis.ticks:
        x = axis.at(tick)
        yield line_to(x, 0, x, bottom, "grid")
        yield text_at(x, bottom + 19, proper(number(tick, axis.digits)), "tick middle")
    if neutral is not None:
        yield line_to(axis.at(neutral), 0, axis.at(neutral), bottom, "neutral")


def _forest_group(group: Group, axis: Axis, top: float) -> Iterator[str]:
    yield text_at(0, top + 21, group.title, "title")
    for i, row in enumerate(group.rows):
        y = top + _TITLE + _ROW * (i + 0.5)
        yield f"<g><title>{escape(f'{row.label}: {row.text} {row.aside}'.rstrip())}</title>"
        yield shape(row.encoder, 6, y) + text_at(_LABEL_X, y + 5, shortened(row.label, _LABEL_CHARS), "label")
        yield _bar(row.estimate, row.encoder, axis, y)
        yield text_at(_TEXT_X, y + 5, proper(row.text), "figure") + text_at(WIDTH, y + 5, row.aside, "figure end")
        yield "</g>"


def _bar(estimate: Estimate, encoder: int, axis: Axis, y: float) -> str:
    if not isfinite(estimate.value):
        return ""
    bar = ""
    if isfinite(estimate.low) and isfinite(estimate.high):
        bar = line_to(axis.at(estimate.low), y, axis.at(estimate.high), y, f"bar e{encoder % COLORS}")
    return bar + shape(encoder, axis.at(estimate.value), y)


def curves(lines: Sequence[Curve], *, neutral: float | None, label: str) -> str:
    """Each encoder's figure over k, k on a logarithmic axis, with its intervals as upright bars.

    Args:
        lines: At least one, each with at least one point; every k at least 1.
        neutral: Where to draw a line to compare with, if anywhere.
        label: What the picture shows, for screen readers.

    Returns:
        One svg element; points that are not finite are left out.
    """
    bottom = max(_CURVE_BOTTOM, _LABEL_ROW * len(lines))
    ks = sorted({k for line in lines for k, _ in line.points})
    estimates = (estimate for line in lines for _, estimate in line.points)
    axis = axis_for(_drawn_values(estimates, neutral), bottom, 14)
    parts = list(_horizontal_grid(axis, neutral))
    parts += [text_at(_k_at(k, ks), bottom + 20, str(k), "tick middle") for k in ks]
    parts.append(text_at((_CURVE_LEFT + _CURVE_RIGHT) / 2, bottom + 42, "k nearest neighbors", "tick middle"))
    for i, line in enumerate(lines):
        parts += _curve(line, ks, axis, shift=(i - (len(lines) - 1) / 2) * 7)
    parts += _curve_labels(lines, axis)
    return picture(WIDTH, bottom + 48, label, parts)


def _k_at(k: int, ks: Sequence[int]) -> float:
    left, right = _CURVE_LEFT + 36, _CURVE_RIGHT - 36
    share = log(k / ks[0]) / log(ks[-1] / ks[0]) if ks[-1] > ks[0] else 0.5
    return round(left + share * (right - left), 1)


def _horizontal_grid(axis: Axis, neutral: float | None) -> Iterator[str]:
    for tick in axis.ticks:
        y = axis.at(tick)
        yield line_to(_CURVE_LEFT, y, _CURVE_RIGHT, y, "grid")
        yield text_at(_CURVE_LEFT - 10, y + 4, proper(number(tick, axis.digits)), "tick end")
    if neutral is not None:
        yield line_to(_CURVE_LEFT, axis.at(neutral), _CURVE_RIGHT, axis.at(neutral), "neutral")


def _curve(line: Curve, ks: Sequence[int], axis: Axis, shift: float) -> Iterator[str]:
    """Shifted sideways by a few units so that bars at the same k do not hide one another."""
    color = f"e{line.encoder % COLORS}"
    points = [(_k_at(k, ks) + shift, estimate) for k, estimate in line.finite()]
    track = "L".join(f"{x} {axis.at(estimate.value)}" for x, estimate in points)
    if track:
        yield f'<path d="M{track}" class="track {color}"/>'
    for x, estimate in points:
        if isfinite(estimate.low) and isfinite(estimate.high):
            yield line_to(x, axis.at(estimate.low), x, axis.at(estimate.high), f"bar {color}")
    yield from (shape(line.encoder, x, axis.at(estimate.value)) for x, estimate in points)


def _curve_labels(lines: Sequence[Curve], axis: Axis) -> Iterator[str]:
    """Names at the right ends, in the order of the ends."""
    ends = [(axis.at(line.finite()[-1][1].value), i) for i, line in enumerate(lines) if line.finite()]
    order = [lines[i] for _, i in sorted(ends)]
    for y, line in zip(_apart(sorted(y for y, _ in ends), axis.start), order, strict=True):
        yield shape(line.encoder, _CURVE_RIGHT + 16, y)
        yield f"<g><title>{escape(line.label)}</title>"
        yield text_at(_CURVE_RIGHT + 28, y + 5, shortened(line.label, _LABEL_CHARS - 2), "label")
        yield "</g>"


def _apart(heights: Sequence[float], lowest: float) -> list[float]:
    """Ascending heights moved no further than needed for a row of text each, none below `lowest` on the page."""
    placed: list[float] = []
    for y in heights:
        placed.append(max(y, placed[-1] + _LABEL_ROW) if placed else y)
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], lowest - _LABEL_ROW * (len(placed) - 1 - i))
    return placed

"""A task's pictures as HTML: heat tables, features in the plane, slides in the colors of their components."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import floor, isfinite, log10, nan
from typing import TypeVar

from markupsafe import Markup

from g2l_core.report.page import COLORS, render
from g2l_core.report.tables import settings_text, split_k
from g2l_core.results import Plots, Projection, SlideMap

_T = TypeVar("_T")

_SIDE, _EDGE = 400, 12
_LAYERS = 4
"""Classes are drawn in turns, so that the last does not hide the others."""
_DOTS = (
    "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0",
    "m-4-4h8v8h-8z",
    "m0-5 5 5-5 5-5-5z",
    "m0-5 5 9h-10z",
    "m0 5 5-9h-10z",
    "m-2-5h4v3h3v4h-3v3h-4v-3h-3v-4h3z",
    "m0-5 5 4-2 6h-6l-2-6z",
)
"""The shapes of the marks from their middles, in relative commands alone, within about 5."""
_MAP_SIDE = 300
_ROOMY_CLASSES = 4
"""More classes than this are set in small type, their names upright."""
_CLASSIFIERS = {
    "knn": "kNN vote",
    "probe": "Linear probe",
    "slide_probe": "Slide probe",
    "slide_vote": "Slide vote",
    "abmil": "ABMIL",
}


def pictures_of(pictures: Plots, order: Sequence[str]) -> Markup:
    """All pictures of one task.

    Args:
        pictures: Of that task alone.
        order: All encoders of the page, which gives each its mark.
    """
    return render(
        "pictures.html",
        pictures=pictures,
        order=order,
        methods=_grouped((plane.method, plane) for plane in pictures.projections),
        slides=_grouped((drawn.slide, drawn) for drawn in pictures.slides),
        side=_SIDE,
        map_side=_MAP_SIDE,
        roomy_classes=_ROOMY_CLASSES,
        classifier=lambda name: _CLASSIFIERS.get(split_k(name)[0], name),
        colorings=_colorings,
        dots=_dots,
        scale_bar=_scale_bar,
        settings_text=settings_text,
        share=lambda count, line: count / sum(line) if sum(line) else nan,
        size=_size,
        squares=_squares,
    )


def _grouped(items: Iterable[tuple[str, _T]]) -> dict[str, list[_T]]:
    groups: dict[str, list[_T]] = {}
    for name, item in items:
        groups.setdefault(name, []).append(item)
    return groups


def _colorings(plane: Projection) -> list[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """What the points can be colored by: a column that names something for at least some of them."""
    columns = [("Class", plane.classes, plane.class_of), ("Center", plane.centers, plane.center_of)]
    return [column for column in columns if any(column[1])] or [("Patches", ("",), (0,) * len(plane.x))]


def _dots(plane: Projection, codes: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Color and SVG path of each code's points. One path has many points, so that a thousand stay small."""
    half = _SIDE / 2 - _EDGE
    groups: dict[tuple[int, int], list[str]] = {}
    for i, (x, y, code) in enumerate(zip(plane.x, plane.y, codes, strict=True)):
        if abs(x) <= 1 and abs(y) <= 1:  # NaN is not
            dot = f"M{round(_SIDE / 2 + half * x)} {round(_SIDE / 2 - half * y)}{_DOTS[code % len(_DOTS)]}"
            groups.setdefault((i % _LAYERS, code), []).append(dot)
    return ((code % COLORS, "".join(dots)) for (_, code), dots in sorted(groups.items()))


def _size(drawn: SlideMap) -> tuple[float, float]:
    """The side of a cell and the height of the slide in SVG units, so that it fits its square."""
    across, down = max(drawn.columns, default=0) + 1, max(drawn.rows, default=0) + 1
    unit = _MAP_SIDE / max(across, down)
    return unit, down * unit


def _squares(drawn: SlideMap) -> Mapping[str, str]:
    """The SVG path of the cells of each color, a square each."""
    cells = zip(drawn.columns, drawn.rows, drawn.colors, strict=True)
    squares = _grouped((color, f"M{column} {row}h1v1h-1z") for column, row, color in cells)
    return {color: "".join(paths) for color, paths in sorted(squares.items())}


def _scale_bar(drawn: SlideMap) -> tuple[float, str] | None:
    """The longest of 1, 2 or 5 times a power of ten millimeters that takes at most a third of the picture."""
    if not (isfinite(drawn.cell_mm) and drawn.cell_mm > 0):
        return None
    mm_per_unit = drawn.cell_mm / _size(drawn)[0]
    longest = _MAP_SIDE / 3 * mm_per_unit
    power = 10.0 ** floor(log10(longest))
    length = max(factor * power for factor in (1, 2, 5) if factor * power <= longest)
    return round(length / mm_per_unit, 1), f"{length:g} mm"

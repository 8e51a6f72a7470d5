"""A task's pictures as HTML: heat tables, features in the plane, slides in the colors of their components."""

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from math import floor, isfinite, log10, nan

from g2l_core.report.page import heat_table
from g2l_core.report.svg import dots, key_mark, line_to, picture, text_at
from g2l_core.report.tables import number, proper, settings_text, split_k
from g2l_core.results import CkaMatrix, ConfusionMatrix, Pictures, Projection, SlideMap

_SIDE, _EDGE = 400, 12
_LAYERS = 4
"""Classes are drawn in turns, so that the last does not hide the others."""
_MAP_WIDTH, _MAP_HEIGHT, _BAR_HEIGHT = 300, 300, 26
_ROOMY_CLASSES = 4
"""More classes than this are set in small type, their names upright."""
_CLASSIFIERS = {
    "knn": "kNN vote",
    "probe": "Linear probe",
    "slide_probe": "Slide probe",
    "slide_vote": "Slide vote",
    "abmil": "ABMIL",
}


def pictures_of(pictures: Pictures, order: Sequence[str]) -> str:
    """All pictures of one task.

    Args:
        pictures: Of that task alone.
        order: All encoders of the page, which gives each its mark.
    """
    parts = [
        *(_cka(matrix, order) for matrix in pictures.cka),
        _projections(pictures.projections),
        _slides(pictures.slides, order),
        _confusions(pictures.confusions, order),
    ]
    return "".join(parts)


def _encoder(key: str, order: Sequence[str]) -> str:
    return f'{key_mark(order.index(key))}<span class="name">{escape(key)}</span>'


def _some(used: int, there: int, what: str) -> str:
    return f"all {there:,} {what}" if used == there else f"{used:,} of {there:,} {what}, drawn by seed"


# Heat tables


def _cka(matrix: CkaMatrix, order: Sequence[str]) -> str:
    rows = [
        (_encoder(key, order), [(value, proper(number(value, 2))) for value in line])
        for key, line in zip(matrix.encoders, matrix.values, strict=True)
    ]
    header = [f'<span title="{escape(key)}">{key_mark(order.index(key))}</span>' for key in matrix.encoders]
    told = _some(matrix.n, matrix.of, f"{'test ' if matrix.rows == 'test' else ''}patches")
    caption = f"Debiased linear CKA of every pair, on {told}; the columns bear the marks of the rows."
    return f'<h3>CKA of all pairs</h3>\n<p class="quiet">{caption}</p>\n{heat_table("Encoder", header, rows, "marks")}'


def _confusions(matrices: Sequence[ConfusionMatrix], order: Sequence[str]) -> str:
    if not matrices:
        return ""
    drawn = "".join(_confusion(matrix, order) for matrix in matrices)
    caption = (
        "Rows are the true classes, columns the predicted ones, pooled over the folds. Shade and figure are the share "
        "of the row; the number of patches stands below it or, where classes are many, shows when pointed at."
    )
    return (
        f'<details><summary>Confusion matrices</summary>\n<p class="quiet">{caption}</p>\n'
        f'<div class="tiles">{drawn}</div></details>\n'
    )


def _confusion(matrix: ConfusionMatrix, order: Sequence[str]) -> str:
    crowded = len(matrix.classes) > _ROOMY_CLASSES
    names = [f'<span class="name">{escape(name)}</span>' for name in matrix.classes]
    rows = [(name, [*_shares(line, crowded)]) for name, line in zip(names, matrix.counts, strict=True)]
    title = escape(_CLASSIFIERS.get(split_k(matrix.classifier)[0], matrix.classifier))
    shown = heat_table("True class", names, rows, "upright" if crowded else "")
    return (
        f"<figure><figcaption>{_encoder(matrix.encoder, order)} {title}"
        f'<span class="sub">{escape(settings_text(matrix.settings))}</span></figcaption>\n{shown}</figure>\n'
    )


def _shares(counts: Sequence[int], crowded: bool) -> Iterator[tuple[float, str]]:
    """Each count's share of its row, and the cell that says both."""
    total = sum(counts)
    for count in counts:
        share = count / total if total else nan
        text = number(share, 2)
        below = f'<span class="sub">{count:,}</span>'
        yield share, f'<span title="{count:,}">{text}</span>' if crowded else text + below


# Features in the plane


def _projections(planes: Sequence[Projection]) -> str:
    """One section a method. Encoders bear no marks here, as the same marks tell classes and centers apart."""
    methods = dict.fromkeys(plane.method for plane in planes)
    return "".join(_method(method, [p for p in planes if p.method == method]) for method in methods)


def _method(method: str, planes: Sequence[Projection]) -> str:
    """Planes under one legend where all encoders have the same classes and centers."""
    alike = len({(plane.classes, plane.centers) for plane in planes}) == 1
    first = planes[0]
    told = _some(len(first.x), first.of, "patches")
    note = (
        "Both axes have one scale. What lies near in the plane need not be near in all dimensions. UMAP is shown as "
        "well where umap-learn is installed."
        if method == "PCA"
        else "Distances between clusters mean little."
    )
    figures = "".join(_plane(plane, legend=not alike) for plane in planes)
    return (
        f'<h3>{escape(method)} of the features</h3>\n<p class="quiet">{told[:1].upper()}{told[1:]}, by class and by '
        f"center. {note}</p>\n{_legends(first) if alike else ''}"
        f'<div class="tiles">{figures}</div>\n'
    )


def _colorings(plane: Projection) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """What the points can be colored by: a column that names something for at least some of them."""
    found = [("Class", plane.classes, plane.class_of), ("Center", plane.centers, plane.center_of)]
    named = [coloring for coloring in found if any(coloring[1])]
    yield from named or [("Patches", ("",), (0,) * len(plane.x))]


def _legends(plane: Projection) -> str:
    return "".join(_legend(title, names, codes) for title, names, codes in _colorings(plane) if any(names))


def _legend(title: str, names: Sequence[str], codes: Sequence[int]) -> str:
    items = "".join(
        f'<li>{key_mark(i)}{escape(name) or "not given"} <span class="quiet">{codes.count(i):,}</span></li>'
        for i, name in enumerate(names)
    )
    return f'<ul class="legend"><li><b>{title}</b></li>{items}</ul>\n'


def _plane(plane: Projection, *, legend: bool) -> str:
    shares = ""
    if plane.shares:
        told = " and ".join(f"{100 * share:.0f} %" for share in plane.shares)
        shares = f'<span class="sub">{told} of the variance along x and y</span>'
    panels = "".join(
        f'<div><span class="quiet">{title}</span>{_points(plane, title, codes)}</div>'
        for title, _, codes in _colorings(plane)
    )
    legends = _legends(plane) if legend else ""
    return (
        f'<figure><figcaption><span class="name">{escape(plane.encoder)}</span>{shares}</figcaption>{legends}'
        f'<div class="pair">{panels}</div></figure>\n'
    )


def _points(plane: Projection, title: str, codes: Sequence[int]) -> str:
    half = _SIDE / 2 - _EDGE
    groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for i, (x, y, code) in enumerate(zip(plane.x, plane.y, codes, strict=True)):
        if abs(x) <= 1 and abs(y) <= 1:  # NaN is not
            place = (round(_SIDE / 2 + half * x), round(_SIDE / 2 - half * y))
            groups.setdefault((i % _LAYERS, code), []).append(place)
    parts = [dots(code, points) for (_, code), points in sorted(groups.items())]
    label = f"{plane.method} of {plane.encoder} by {title.lower()}"
    return picture(_SIDE, _SIDE, label, parts, "plane")


# Slides


def _slides(maps: Sequence[SlideMap], order: Sequence[str]) -> str:
    if not maps:
        return ""
    caption = (
        "Each patch in the first three principal components of its features as red, green and blue: alike colors are "
        "alike features. Colors compare over the slides of one encoder, not between encoders."
    )
    slides = dict.fromkeys(slide_map.slide for slide_map in maps)
    drawn = "".join(_slide(slide, [m for m in maps if m.slide == slide], order) for slide in slides)
    return f'<h3>Slides by their features</h3>\n<p class="quiet">{caption}</p>\n{drawn}'


def _slide(slide: str, maps: Sequence[SlideMap], order: Sequence[str]) -> str:
    figures = "".join(
        f"<figure><figcaption>{_encoder(drawn.encoder, order)}</figcaption>{_map(drawn)}</figure>\n" for drawn in maps
    )
    told = f"<b>{escape(slide)}</b>, {maps[0].patches:,} patches"
    return f'<p class="over-tiles">{told}</p>\n<div class="tiles small">{figures}</div>\n'


def _map(drawn: SlideMap) -> str:
    """One square a cell; the squares of one color are one path."""
    across, down = max(drawn.columns, default=0) + 1, max(drawn.rows, default=0) + 1
    unit = min(_MAP_WIDTH / across, _MAP_HEIGHT / down)
    squares: dict[str, list[str]] = {}
    for column, row, color in zip(drawn.columns, drawn.rows, drawn.colors, strict=True):
        squares.setdefault(color, []).append(f"M{column} {row}h1v1h-1z")
    paths = "".join(f'<path fill="#{escape(color)}" d="{"".join(d)}"/>' for color, d in sorted(squares.items()))
    parts = [f'<g class="cells" transform="scale({unit:.3f})">{paths}</g>', *_scale_bar(drawn, unit, down * unit)]
    label = f"Slide {drawn.slide} by the features of {drawn.encoder}"
    return picture(_MAP_WIDTH, round(down * unit + _BAR_HEIGHT), label, parts, "map")


def _scale_bar(drawn: SlideMap, unit: float, top: float) -> Iterable[str]:
    """The longest of 1, 2 or 5 times a power of ten millimeters that takes at most a third of the picture."""
    if not (isfinite(drawn.cell_mm) and drawn.cell_mm > 0):
        return []
    most = _MAP_WIDTH / 3 / unit * drawn.cell_mm
    power = 10.0 ** floor(log10(most))
    length = max(factor * power for factor in (1, 2, 5) if factor * power <= most)
    pixels = round(length / drawn.cell_mm * unit, 1)
    y = round(top + 14, 1)
    return [line_to(0, y, pixels, y, "scalebar"), text_at(pixels + 8, y + 4, f"{length:g} mm", "tick")]

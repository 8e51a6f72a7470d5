"""Areas of a slide as GeoJSON (RFC 7946) in level-0 pixels, which QuPath reads and writes.

Both directions are exact: outlines run along the edges of a mask's pixels, and a pixel belongs to an area if its center
does. So a mask that is written, and read again at its own scale, is the same mask.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import cv2
import numpy as np
from jaxtyping import Bool, Float

from g2l_core.errors import ReadError
from g2l_core.files import parse_json
from g2l_core.tissue.classes import ClassChoice, Use, class_name, object_type
from g2l_core.types import TissueMask

TISSUE_CLASS = {"name": "Tissue", "color": [0, 158, 115]}

Ring: TypeAlias = Float[np.ndarray, "_ 2"]
"""Corners of a closed outline, x and y. The first is not repeated at the end."""

Area: TypeAlias = tuple[list[Ring], bool]
"""The rings of a polygon, and whether it counts or is to be subtracted."""

AREAS = ("Polygon", "MultiPolygon")
WITHOUT_AREA = ("Point", "MultiPoint", "LineString", "MultiLineString")

EVERY_CLASS = ClassChoice()

Vertex: TypeAlias = tuple[int, int]


# ---- from a mask ------------------------------------------------------------------------------------------------


def areas_of(mask: TissueMask, downsample: float) -> dict[str, Any]:
    """A mask as a FeatureCollection: one Polygon, with its holes, for each part connected by pixel edges.

    Args:
        mask: bool (height, width).
        downsample: Level-0 pixels per mask pixel.

    Returns:
        Annotations of the class `Tissue` in level-0 pixels. Every polygon is simple, and holes turn the other way.
    """
    _, part = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    loops: dict[int, list[list[Vertex]]] = {}
    for loop, owner in _loops(part):
        loops.setdefault(owner, []).append(loop)
    features = []
    for _, part_loops in sorted(loops.items()):
        outline_first = sorted(part_loops, key=_twice_area, reverse=True)
        rings = [_scaled(loop, downsample) for loop in outline_first]
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": rings},
                "properties": {"objectType": "annotation", "classification": TISSUE_CLASS},
            }
        )
    return {"type": "FeatureCollection", "features": features}


def _loops(part: np.ndarray) -> Iterator[tuple[list[Vertex], int]]:
    """Simple closed paths along the pixel edges around each part, with the part on their right; and which part it is.

    A path that meets itself, where two pixels touch only at a corner, is cut there, so that no path touches itself.
    """
    onward = _edges(part)
    while onward:
        owner, start = next(iter(onward))
        path, place = [start], {start: 0}
        while path:
            ends = onward[owner, path[-1]]
            vertex = ends.pop()
            if not ends:
                del onward[owner, path[-1]]
            if vertex not in place:
                place[vertex] = len(path)
                path.append(vertex)
                continue
            loop = path[place[vertex] :]
            yield loop, owner
            del path[place[vertex] + 1 :]
            for gone in loop[1:]:
                del place[gone]
            if (owner, vertex) not in onward:  # only the start can be exhausted: elsewhere the path came in
                path.pop()


def _edges(part: np.ndarray) -> dict[tuple[int, Vertex], list[Vertex]]:
    """The ends of the pixel edges around each part, by part and start. The part is on the right of an edge.

    On the right of an edge along x means towards larger y, as on a screen.
    """
    height, width = part.shape
    padded = np.pad(part, 1)
    inside = padded[1:-1, 1:-1]
    onward: dict[tuple[int, Vertex], list[Vertex]] = {}
    # neighbor's offset, then the edge's two ends relative to the pixel's upper left corner
    for (dy, dx), (x0, y0), (x1, y1) in (
        ((-1, 0), (0, 0), (1, 0)),
        ((0, 1), (1, 0), (1, 1)),
        ((1, 0), (1, 1), (0, 1)),
        ((0, -1), (0, 1), (0, 0)),
    ):
        beyond = padded[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]
        ys, xs = np.nonzero((inside != 0) & (beyond != inside))
        for owner, x, y in zip(inside[ys, xs].tolist(), xs.tolist(), ys.tolist(), strict=True):
            onward.setdefault((owner, (x + x0, y + y0)), []).append((x + x1, y + y1))
    return onward


def _twice_area(loop: Sequence[Vertex]) -> int:
    """Twice the area inside a loop by the shoelace formula: positive for an outline, negative for a hole."""
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(loop, [*loop[1:], loop[0]], strict=True))


def _scaled(loop: Sequence[Vertex], downsample: float) -> list[list[int | float]]:
    """The corners of a loop in level-0 pixels, to a hundredth; the first is repeated at the end, as RFC 7946 asks."""
    before, after = [loop[-1], *loop[:-1]], [*loop[1:], loop[0]]
    corners = [b for a, b, c in zip(before, loop, after, strict=True) if not (a[0] == c[0] or a[1] == c[1])]
    values = [[_short(x * downsample), _short(y * downsample)] for x, y in corners]
    return [*values, values[0]]


def _short(value: float) -> int | float:
    rounded = round(value, 2)
    return int(rounded) if rounded == int(rounded) else rounded


# ---- to a mask --------------------------------------------------------------------------------------------------


def read_areas(text: str, choice: ClassChoice = EVERY_CLASS) -> tuple[list[Area], Counter[str]]:
    """Read the areas of a GeoJSON document.

    Args:
        text: A FeatureCollection, one Feature, a bare list of them (QuPath exports each), or a bare geometry.
        choice: Which classes count.

    Returns:
        For each polygon its rings in level-0 pixels, and whether it counts; False means to subtract it. And how many
        objects do not count, by what they are: `class Necrosis (subtracted)`, `cell`, `Point`.

    Raises:
        ReadError: It is not such a document.
    """
    try:
        document = parse_json(text)
    except ValueError as error:
        raise ReadError(f"it is no JSON: {error}") from error
    areas, left_out = list[Area](), Counter[str]()
    for index, feature in enumerate(_features(document)):
        _read_feature(feature, index, choice, areas, left_out)
    return areas, left_out


def _features(document: Any) -> list[Any]:
    if isinstance(document, list):
        return document
    if isinstance(document, Mapping) and isinstance(document.get("features"), list):
        return document["features"]
    if isinstance(document, Mapping) and "type" in document:
        return [document]
    raise ReadError("it is no GeoJSON: expected a FeatureCollection or a list of features")


def _read_feature(feature: Any, index: int, choice: ClassChoice, areas: list[Area], left_out: Counter[str]) -> None:
    if not isinstance(feature, Mapping):
        raise ReadError(f"feature {index} is no GeoJSON object but {type(feature).__name__}")
    kind, name = object_type(feature), class_name(feature)
    if kind != "annotation":
        left_out[kind] += 1
        return
    use = choice.use_of(name)
    if use is not Use.COUNT:
        left_out[f"class {name or 'none'}" + (" (subtracted)" if use is Use.SUBTRACT else "")] += 1
    if use is Use.LEAVE:
        return
    for shape, coordinates in _shapes(feature.get("geometry", feature), index, left_out):
        try:
            polygons = [coordinates] if shape == "Polygon" else coordinates
            areas.extend(([_ring(ring) for ring in rings], use is Use.COUNT) for rings in polygons)
        except (TypeError, ValueError) as error:
            raise ReadError(
                f"feature {index}: the coordinates of its {shape} are not lists of x, y: {error}"
            ) from error


def _shapes(geometry: Any, index: int, left_out: Counter[str]) -> Iterator[tuple[str, Any]]:
    """The kinds and coordinates of the areas in a geometry; what encloses nothing is counted."""
    kind = geometry.get("type") if isinstance(geometry, Mapping) else None
    if kind in AREAS:
        yield kind, geometry.get("coordinates")
    elif kind == "GeometryCollection" and isinstance(geometry.get("geometries"), list):
        for part in geometry["geometries"]:
            yield from _shapes(part, index, left_out)
    elif kind in WITHOUT_AREA:
        left_out[kind] += 1
    elif geometry is None:
        left_out["object without geometry"] += 1
    else:
        raise ReadError(f"feature {index} is a {kind or 'thing without geometry'}: expected {', '.join(AREAS)}")


def _ring(corners: Sequence[Sequence[float]]) -> Ring:
    ring = np.array([(x, y) for x, y, *_ in corners], np.float64).reshape(-1, 2)
    if not np.isfinite(ring).all():
        raise ValueError("a corner is not finite")
    return ring


def mask_of(areas: Sequence[Area], downsample: float, shape: tuple[int, int]) -> TissueMask:
    """The mask of the pixels whose centers lie in an area that counts and in none that is subtracted.

    Args:
        areas: As `read_areas` gives them first, in level-0 pixels. Rings of one polygon cancel out (even-odd rule).
        downsample: Level-0 pixels per mask pixel.
        shape: Height and width of the mask.

    Returns:
        bool (height, width).
    """
    wanted, unwanted = np.zeros(shape, bool), np.zeros(shape, bool)
    for rings, counts in areas:
        _fill(wanted if counts else unwanted, [ring / downsample for ring in rings])
    return wanted & ~unwanted


def _fill(mask: Bool[np.ndarray, "height width"], rings: Sequence[Ring]) -> None:
    """Set the pixels whose centers lie inside an odd number of the rings, which are in mask pixels."""
    crossings = [_crossings(ring, mask.shape[0]) for ring in rings if len(ring) >= 3]
    if not crossings:
        return
    row, x = np.concatenate([r for r, _ in crossings]), np.concatenate([x for _, x in crossings])
    if not len(row):
        return
    top, bottom = int(row.min()), int(row.max()) + 1
    column = np.clip(np.ceil(x - 0.5), 0, mask.shape[1]).astype(np.int64)
    left, right = int(column.min()), int(column.max())
    turns = np.zeros((bottom - top, right - left + 1), np.int64)
    np.add.at(turns, (row - top, column - left), 1)
    mask[top:bottom, left:right] |= np.cumsum(turns, axis=1)[:, :-1] % 2 == 1


def _crossings(ring: Ring, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a mask whose center lines the ring crosses, and at which x."""
    (x0, y0), (x1, y1) = ring.T, np.roll(ring, -1, axis=0).T
    low, high = np.minimum(y0, y1), np.maximum(y0, y1)
    first = np.clip(np.ceil(low - 0.5), 0, height).astype(np.int64)
    count = np.clip(np.ceil(high - 0.5), 0, height).astype(np.int64) - first
    edge = np.repeat(np.arange(len(ring)), count)
    row = first[edge] + np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count)
    slope = (x1 - x0)[edge] / (y1 - y0)[edge]
    return row, x0[edge] + (row + 0.5 - y0[edge]) * slope

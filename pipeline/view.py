"""A store as one page to send to a colleague, behind `g2l view`: slides, colors of their features, similar patches.

Features and tables come from the store. Pixels come from the slides where these are at hand and still those that were
cached; without them the page has maps of colors alone. No network is run.
"""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float32
from markupsafe import Markup

from g2l_core.benchmark.projections import cells_of, chosen_rows, component_colors, means_of_cells, principal_components
from g2l_core.encoders.resolve import find_stored
from g2l_core.errors import ReadError, RunError, SlideError, StoreMissingError, UnknownNameError, writing
from g2l_core.files import parse_json, write_text
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.render import PatchReader, SlidePatches, open_patches
from g2l_core.report.page import render
from g2l_core.rng import keyed_generator
from g2l_core.slides.fingerprint import fingerprint
from g2l_core.slides.slide import open_slide
from g2l_core.store.features import FeatureStore, StoredSlide
from g2l_core.store.schema import STATUS
from g2l_core.tissue.overview import overview_folder
from g2l_core.types import Mpp, Rgb
from pipeline.interruption import if_interrupted
from pipeline.progress import ProgressLine
from pipeline.settings import ViewSettings

PAGE = "index.html"
SIDE = 400
"""The long side of a slide on the page, in SVG units and in pixels of its picture."""
FACE_PX = 72
"""The side of a patch's picture."""
MAX_CELLS = 1600
"""Cells of a slide; patches of larger slides are put together."""
MAX_FITTED = 4000
"""Patches that the principal components are found from."""
NEIGHBORS = 8
COMPONENTS = 3
THUMBNAIL_QUALITY, FACE_QUALITY = 72, 70


@dataclass(frozen=True, kw_only=True)
class Viewed:
    """The page that was written."""

    page: Path
    size: int
    """Its bytes."""
    encoder: str
    slides: int
    with_pictures: int
    """Slides that were at hand."""
    notes: tuple[str, ...] = ()


@dataclass
class _Shown:
    """A slide on its way to the page."""

    slide: StoredSlide
    rows: np.ndarray
    """Its good patches."""
    corners: np.ndarray
    """int64 (patch, 2): top-left corners of these, in level-0 pixels, or places in a mosaic."""
    side: int
    size: tuple[int, int]
    """Width and height of what is shown, in the unit of the corners."""
    features: Float32[np.ndarray, "patch dim"]
    chosen: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Which of the good patches can be clicked."""
    faces: list[str] = field(default_factory=list)
    image: str = ""

    @property
    def scale(self) -> float:
        """SVG units per unit of the corners."""
        return SIDE / max(self.size)


def run_view(store_path: Path, out: Path, settings: ViewSettings, slide_ids: Sequence[str] = ()) -> Viewed:
    """Write the page of a store.

    Args:
        store_path: The store.
        out: A file that ends in .html, or a folder, which gets index.html.
        settings: What is shown.
        slide_ids: The slides to show; all, or those that the seed draws, if none are given.

    Raises:
        StoreMissingError: No slide has whole features of the encoder.
        UnknownNameError: The store has no such slide or encoder.
        TaskError: The features are the same for all patches.
        RunError: The page cannot be written.
    """
    store = FeatureStore.open(store_path)
    if not store.encoders:
        raise StoreMissingError(f"{store_path} has no features yet: g2l cache-teacher makes them")
    key = find_stored(settings.encoder, store.encoders) if settings.encoder else next(iter(store.encoders))
    have, notes = _slides(store, key, settings, slide_ids)
    target = out if out.suffix == ".html" else out / PAGE
    _make_folder(target.parent)
    with if_interrupted(lambda: "no page was written; the same command begins again"):
        shown = [_shown(slide, key) for slide in have]
        _choose(shown, settings)
        grid = GridSpec.from_json(store.grid)
        with ProgressLine("view", "slides") as line:
            for done, one in enumerate(shown, start=1):
                notes += _pictures(one, grid)
                line.update(done, len(shown))
        page = _page(store, key, shown, store_path, notes)
        with writing(target):
            write_text(target, page)
    return Viewed(
        page=target,
        size=target.stat().st_size,
        encoder=key,
        slides=len(shown),
        with_pictures=sum(bool(one.image or one.faces) for one in shown),
        notes=tuple(notes),
    )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the folder {folder}: {error.strerror}; give another --out") from error


def _slides(
    store: FeatureStore, key: str, settings: ViewSettings, slide_ids: Sequence[str]
) -> tuple[list[StoredSlide], list[str]]:
    """The slides to show, with what must be said of the others."""
    whole = {slide.slide_id: slide for slide in store.slides() if _has_view(slide, key)}
    if unknown := [slide_id for slide_id in slide_ids if slide_id not in whole]:
        raise UnknownNameError(f"slide with features of {key}", unknown[0], sorted(whole), "g2l store ls lists them.")
    if not whole:
        raise StoreMissingError(
            f"no slide of {store.path} has whole features of {key} yet: g2l store ls shows what it has"
        )
    if slide_ids:
        return [whole[slide_id] for slide_id in dict.fromkeys(slide_ids)], []
    ids = sorted(whole)
    drawn = chosen_rows(len(ids), settings.slides, settings.seed)
    notes = [f"{len(drawn):,} of {len(ids):,} slides, drawn by seed {settings.seed}."] if len(drawn) < len(ids) else []
    return [whole[ids[i]] for i in drawn], notes


def _has_view(slide: StoredSlide, key: str) -> bool:
    if key not in slide.encoder_keys:
        return False
    is_whole = {shard.name for shard in slide.shards([0])} <= slide.records(key, [0]).keys()
    return is_whole and bool((slide.patch_status == STATUS["ok"]).any())


def _shown(slide: StoredSlide, key: str) -> _Shown:
    rows = np.flatnonzero(slide.patch_status == STATUS["ok"])
    features = slide.features(key)[rows].astype(np.float32)
    if slide.patch_ids is not None:  # images of their own have no places: they are shown as a mosaic
        across = max(1, round(len(rows) ** 0.5))
        places = np.arange(len(rows))
        corners = np.stack([places % across, places // across], axis=1)
        size = across, -(-len(rows) // across)
        return _Shown(slide=slide, rows=rows, corners=corners, side=1, size=size, features=features)
    corners, side = slide.coords[rows].astype(np.int64), slide.facts.patch_px_level0
    width, height = slide.facts.level0_size
    if not (width and height):  # imported without the slide
        width, height = (int(n) for n in corners.max(axis=0) + side)
    return _Shown(slide=slide, rows=rows, corners=corners, side=side, size=(width, height), features=features)


def _choose(shown: Sequence[_Shown], settings: ViewSettings) -> None:
    """Draw the patches that can be clicked, about as many of each slide."""
    share = settings.patches // len(shown)
    for one in shown:
        if count := min(len(one.rows), share):
            drawn = keyed_generator("viewed patches", settings.seed, one.slide.slide_id).permutation(len(one.rows))
            one.chosen = np.sort(drawn[:count])


# -- pictures ---------------------------------------------------------------------------------------------


def _pictures(one: _Shown, grid: GridSpec) -> list[str]:
    """Read a slide's thumbnail and chosen patches, where it is at hand; else say in a sentence why not."""
    path, slide_id = Path(one.slide.facts.source), one.slide.slide_id
    try:
        if not path.exists():
            return [f"{slide_id}: its file is not at hand ({path}); g2l store relocate finds it elsewhere."]
        if one.slide.patch_ids is None and fingerprint(path) != one.slide.facts.fingerprint:
            return [f"{slide_id}: {path} is not the file that was cached, so it is not shown."]
        if one.slide.patch_ids is None:
            one.image = _thumbnail(one, path, icc=grid.icc)
        reader = open_patches(one.slide, grid, path)
        try:
            one.faces = [_face(reader, int(one.rows[place])) for place in one.chosen]
        finally:
            if isinstance(reader, SlidePatches):
                reader.close()
    except SlideError as error:
        return [f"{slide_id}: {error}"]
    return []


def _thumbnail(one: _Shown, path: Path, *, icc: bool) -> str:
    with open_slide(path, manifest_mpp=one.slide.facts.mpp, icc=icc) as slide:
        image = slide.read_thumbnail(Mpp(max(slide.level0_size) * slide.mpp / SIDE)).image
    width, height = (max(1, round(length * one.scale)) for length in one.size)
    return _jpeg(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), THUMBNAIL_QUALITY)


def _face(reader: PatchReader, row: int) -> str:
    try:
        return _jpeg(cv2.resize(reader.read(row), (FACE_PX, FACE_PX), interpolation=cv2.INTER_AREA), FACE_QUALITY)
    except ReadError:  # a patch that has become unreadable is shown by its color
        return ""


def _jpeg(image: Rgb, quality: int) -> str:
    done, content = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done
    return "data:image/jpeg;base64," + base64.b64encode(content.tobytes()).decode()


def _tissue(one: _Shown, folder: Path) -> str:
    """The outlines of a slide's tissue beside the store, as an SVG path; empty where there are none."""
    try:
        document = parse_json((folder / f"{one.slide.slide_id}.geojson").read_bytes())
        shapes = [feature["geometry"] for feature in document["features"]]
        polygons = [shape["coordinates"] for shape in shapes if shape["type"] == "Polygon"]
        polygons += [polygon for shape in shapes if shape["type"] == "MultiPolygon" for polygon in shape["coordinates"]]
        rings = [np.asarray(ring, np.float64)[:, :2] for polygon in polygons for ring in polygon]
    except (OSError, ValueError, KeyError, TypeError, IndexError):  # edited by hand, or never written
        return ""
    smooth = [cv2.approxPolyDP((ring * one.scale).astype(np.float32), 0.7, closed=True)[:, 0] for ring in rings]
    return "".join(f"M{'L'.join(f'{x:.0f} {y:.0f}' for x, y in ring)}z" for ring in smooth if len(ring) > 2)


# -- the page ---------------------------------------------------------------------------------------------


def _page(store: FeatureStore, key: str, shown: Sequence[_Shown], path: Path, notes: Sequence[str]) -> str:
    fitted, colors = _colors(shown)
    facts, patches = store.encoders[key], _patches(shown, colors)
    labels = [(one.slide.slide_id, one.slide.labels) for one in shown]
    names = sorted({name for _, values in labels for name, value in values.items() if value})
    counted = sum(len(one.rows) for one in shown)
    data = {"slides": [one.slide.slide_id for one in shown], "patches": patches}
    numbers, paired = iter(range(len(patches))), zip(shown, colors, strict=True)
    return render(
        "view.html",
        title=path.resolve().name,
        summary=f"Slides: {len(shown):,}. Patches: {counted:,}, with {facts.dim:,} features each.",
        notes=notes,
        encoder=key,
        shares=f"{fitted.sum():.0%}",
        has_spots=bool(patches),
        spots=f"{len(patches):,}",
        slides=[_on_page(one, cells, numbers, overview_folder(path)) for one, (cells, _) in paired],
        labels=[(slide_id, [values.get(name, "") for name in names]) for slide_id, values in labels] if names else [],
        label_names=names,
        data=Markup(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")),
    )


_Colored = tuple[Mapping[str, Any], list[str]]


def _colors(shown: Sequence[_Shown]) -> tuple[np.ndarray, list[_Colored]]:
    """The shares of the variance; for each slide its cells by color, and the color of each chosen patch."""
    features = np.concatenate([one.features for one in shown])
    fitted = principal_components(features[chosen_rows(len(features), MAX_FITTED, 0)], COMPONENTS)
    scores = [fitted.transform(one.features.astype(np.float64)) for one in shown]
    cells = [cells_of(one.corners, one.side, MAX_CELLS) for one in shown]
    means = [means_of_cells(score, cell.of_patch) for score, cell in zip(scores, cells, strict=True)]
    together = component_colors(np.concatenate(means))
    colored, start = list[_Colored](), 0
    for one, cell, mean in zip(shown, cells, means, strict=True):
        of_cell = together[start : start + len(mean)]
        start += len(mean)
        paths: dict[str, list[str]] = {}
        for color, column, row in zip(of_cell, cell.columns, cell.rows, strict=True):
            paths.setdefault(color, []).append(f"M{column} {row}h1v1h-1z")
        drawn = {"cells": {c: "".join(p) for c, p in sorted(paths.items())}, "side": cell.side}
        colored.append((drawn, [of_cell[cell.of_patch[place]] for place in one.chosen]))
    return fitted.explained_variance_ratio_, colored


def _patches(shown: Sequence[_Shown], colors: Sequence[_Colored]) -> list[dict[str, Any]]:
    """What the page knows of each patch that can be clicked, with its neighbors among them all, and of other slides."""
    of_slide = np.concatenate([np.full(len(one.chosen), i) for i, one in enumerate(shown)])
    if len(of_slide) < 2:
        return []
    features = np.concatenate([one.features[one.chosen] for one in shown])
    features /= np.maximum(np.linalg.norm(features, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    similar = features @ features.T
    np.fill_diagonal(similar, -np.inf)
    apart = np.where(of_slide[:, None] == of_slide[None], -np.inf, similar)
    faces = [face for one in shown for face in (one.faces or [""] * len(one.chosen))]
    shades = [shade for _, of_patch in colors for shade in of_patch]
    labels = [label for one in shown for label in _patch_labels(one)]
    return [
        {
            "slide": int(of_slide[i]), "color": shades[i], "image": faces[i], "label": labels[i],
            "near": _nearest(similar[i]), "others": _nearest(apart[i]),
        }
        for i in range(len(of_slide))
    ]  # fmt: skip


def _nearest(similar: np.ndarray) -> list[tuple[int, float]]:
    order = np.argsort(-similar, kind="stable")[:NEIGHBORS]
    return [(int(i), round(float(similar[i]), 3)) for i in order if np.isfinite(similar[i])]


def _patch_labels(one: _Shown) -> Iterable[str]:
    if not one.slide.has_patch_labels:
        return [""] * len(one.chosen)
    labels = one.slide.patch_labels
    return [", ".join(v for k, v in sorted(labels[one.rows[p]].items()) if k != "patch_id") for p in one.chosen]


def _on_page(one: _Shown, colored: Mapping[str, Any], numbers: Iterable[int], folder: Path) -> dict[str, Any]:
    """A slide as the template draws it, in SVG units."""
    scale, low = one.scale, one.corners.min(axis=0)
    places = one.corners[one.chosen] * scale
    side = max(one.side * scale, 4.0)
    kept = (one.corners * scale).round(1) if one.slide.patch_ids is None and len(one.rows) <= MAX_CELLS else ()
    edge = f"{one.side * scale:.1f}"
    mpp = f", {one.slide.facts.mpp:.4g} um/px" if one.slide.facts.mpp else ""
    mpp += ", images without places, in stored order" if one.slide.patch_ids is not None else ""
    numbered = zip(places, numbers, strict=False)
    return {
        "slide_id": one.slide.slide_id,
        "words": f"{len(one.rows):,} patches{mpp}",
        "width": round(one.size[0] * scale), "height": round(one.size[1] * scale),
        "image": one.image,
        "left": f"{low[0] * scale:.2f}", "top": f"{low[1] * scale:.2f}", "cell": f"{colored['side'] * scale:.4f}",
        "cells": colored["cells"],
        "kept": "".join(f"M{x:g} {y:g}h{edge}v{edge}h-{edge}z" for x, y in kept),
        "tissue": _tissue(one, folder),
        "spots": [
            {"number": number, "x": f"{x:.1f}", "y": f"{y:.1f}", "side": f"{side:.1f}"} for (x, y), number in numbered
        ],
    }  # fmt: skip

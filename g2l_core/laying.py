"""Lay a slide's patches: scale, tissue, grid, views' parameters. Reads thumbnails only."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from g2l_core.engine import run_ahead
from g2l_core.errors import G2LError, NoTissueError, ReadError, SlideError, StoreMismatchError
from g2l_core.grid import GridSpec, image_order, lay_grid, patch_side_level0
from g2l_core.manifest import Source
from g2l_core.patches import read_image
from g2l_core.slides import fingerprint, open_slide
from g2l_core.store.features import FeatureStore, StoredSlide
from g2l_core.tissue import THUMBNAIL_MPP, tissue_method
from g2l_core.types import Coords
from g2l_core.views import COLUMNS, ViewSpec, sample_views


@dataclass(frozen=True, kw_only=True)
class LaidSlide:
    """A slide's patches, not yet in a store."""

    facts: dict[str, object]
    coords: Coords
    patch_ids: tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class LayOutcome:
    """What came of laying one source: patches, or the reason why not."""

    source: Source
    laid: LaidSlide | None = None
    error: G2LError | None = None


def lay_source(source: Source, grid: GridSpec, mpp_override: float | None) -> LaidSlide:
    """Lay one source's patches.

    Raises:
        SlideError: It cannot be opened or read, its scale is unknown or too coarse, or it has no tissue.
    """
    laid = _lay_images(source, grid, mpp_override) if source.patch_ids else _lay_slide(source, grid, mpp_override)
    laid.facts["source"] = str(source.path.resolve())
    laid.facts["labels"] = dict(source.labels)
    return laid


def _lay_slide(source: Source, grid: GridSpec, mpp_override: float | None) -> LaidSlide:
    with open_slide(source.path, manifest_mpp=source.mpp, mpp_override=mpp_override) as slide:
        side = patch_side_level0(grid, slide.mpp)
        method = tissue_method(grid.tissue)
        tissue, downsample = None, 1.0
        if method is not None:
            thumbnail = slide.read_thumbnail(THUMBNAIL_MPP)
            tissue, downsample = method(thumbnail.image, thumbnail.mpp), thumbnail.downsample
        coords = lay_grid(slide.level0_size, side, tissue, downsample, grid, source.slide_id)
        if not len(coords):
            raise NoTissueError(
                f"tissue method {grid.tissue!r} leaves no patch of {side} level-0 px in "
                f"{slide.level0_size[0]} x {slide.level0_size[1]} px. If there is tissue, try --tissue none "
                "or a smaller --min-tissue"
            )
        facts = {
            "kind": "slide",
            "fingerprint": fingerprint(source.path),
            "mpp": float(slide.mpp),
            "mpp_source": slide.mpp_source,
            "level0_size": list(slide.level0_size),
            "patch_px_level0": int(side),
        }
    return LaidSlide(facts=facts, coords=coords, patch_ids=None)


def _lay_images(source: Source, grid: GridSpec, mpp_override: float | None) -> LaidSlide:
    names = source.patch_ids
    _require_first_image(source, grid)
    order = image_order(len(names), grid, source.slide_id)[: grid.max_patches]
    facts: dict[str, object] = {
        "kind": "patches",
        "fingerprint": _images_fingerprint(source.path, names),
        "mpp": source.mpp if source.mpp is not None else mpp_override,
        "mpp_source": "manifest" if source.mpp is not None else "override" if mpp_override else "not known",
        "level0_size": [grid.patch_px, grid.patch_px],
        "patch_px_level0": grid.patch_px,
    }
    patch_ids = tuple(names[i] for i in order)
    return LaidSlide(facts=facts, coords=np.zeros((len(order), 2), np.int32), patch_ids=patch_ids)


def _require_first_image(source: Source, grid: GridSpec) -> None:
    """Refuse a whole set whose images have another size than the store's patches."""
    try:
        read_image(source.path / source.patch_ids[0], grid.patch_px)
    except ReadError as error:
        raise ReadError(f"{error}. Give their size with --patch-px") from error


def _images_fingerprint(folder: Path, names: Sequence[str]) -> str:
    """Hexadecimal xxh3-128 over the images' names and sizes."""
    state = xxhash.xxh3_128()
    for name in sorted(names):
        try:
            state.update(f"{name}|{(folder / name).stat().st_size}\n".encode())
        except OSError as error:
            raise ReadError(f"cannot read {folder / name}: {error.strerror}") from error
    return state.hexdigest()


def lay_sources(
    sources: Iterable[Source], grid: GridSpec, *, mpp_override: float | None, workers: int
) -> Iterator[LayOutcome]:
    """Lay many sources in threads, in order; a source that cannot be used costs that source alone."""

    def lay(source: Source) -> LayOutcome:
        try:
            return LayOutcome(source=source, laid=lay_source(source, grid, mpp_override))
        except SlideError as error:
            return LayOutcome(source=source, error=error)

    return run_ahead(lay, sources, workers=workers, lookahead=2 * max(1, workers))


def store_laid(store: FeatureStore, source: Source, laid: LaidSlide, views: ViewSpec, n_views: int) -> StoredSlide:
    """Write a laid slide into a store with the parameters of its first `n_views` views."""
    params = sample_views(views, source.slide_id, laid.coords, range(n_views), laid.patch_ids)
    return store.lay_slide(
        source.slide_id, laid.facts, coords=laid.coords, view_params=params, columns=COLUMNS, patch_ids=laid.patch_ids
    )


def refresh_stored(stored: StoredSlide, source: Source, views: ViewSpec, n_views: int) -> StoredSlide:
    """Bring a slide that is in the store already up to date: its place, labels, and parameters of further views.

    Raises:
        StoreMismatchError: The file is not the one that was cached.
        ReadError: It cannot be read.
    """
    require_same_slide(stored, source.path)
    if str(source.path.resolve()) != stored.facts["source"]:
        stored.set_source(source.path, stored.facts["fingerprint"])
    if source.labels and source.labels != stored.labels:
        stored.set_labels({**stored.labels, **source.labels})
    known = stored.n_views
    if known < n_views:
        further = range(known, n_views)
        stored.extend_views(sample_views(views, stored.slide_id, stored.coords, further, stored.patch_ids))
    return stored


def require_same_slide(stored: StoredSlide, path: Path) -> None:
    """Refuse a slide whose file has changed since stage one.

    Raises:
        StoreMismatchError: Its fingerprint differs.
        ReadError: It cannot be read.
    """
    names = stored.patch_ids
    found = fingerprint(path) if names is None else _images_fingerprint(path, names)
    if found != stored.facts["fingerprint"]:
        raise StoreMismatchError(
            f"slide {stored.slide_id}: {path} is not the file that was cached (fingerprint {found[:12]}, "
            f"stored {stored.facts['fingerprint'][:12]}). Restore it, or use another --store"
        )

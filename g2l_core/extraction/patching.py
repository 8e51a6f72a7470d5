"""Lay a slide's patches: scale, tissue, grid, views' parameters. Reads small scales only."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from g2l_core.concurrency import run_ahead
from g2l_core.errors import G2LError, NoTissueError, ReadError, SlideError, StoreMismatchError
from g2l_core.patches.grid import GridSpec, grid_coords, image_order, patch_side_level0
from g2l_core.patches.identity import images_fingerprint, require_same_slide
from g2l_core.patches.render import read_image
from g2l_core.patches.views import COLUMNS, ViewSpec, sample_views
from g2l_core.slides.fingerprint import fingerprint
from g2l_core.slides.manifest import Source
from g2l_core.slides.slide import Slide, open_slide
from g2l_core.store.features import FeatureStore, StoredSlide
from g2l_core.tissue.methods import FoundTissue, TissueMethod, resolve_tissue
from g2l_core.tissue.overview import SlideOverview, write_overview
from g2l_core.tissue.thresholds import THUMBNAIL_MPP
from g2l_core.types import Coords, Level0Px


@dataclass(frozen=True, kw_only=True)
class PatchedSlide:
    """A slide's patches, not yet in a store."""

    facts: dict[str, object]
    coords: Coords
    patch_ids: tuple[str, ...] | None
    remarks: tuple[str, ...] = ()
    """What the user should hear of, though nothing is lost: a picture that could not be written."""


@dataclass(frozen=True, kw_only=True)
class PatchingOutcome:
    """What came of laying one source: patches, or the reason why not."""

    source: Source
    laid: PatchedSlide | None = None
    error: G2LError | None = None


def patch_source(
    source: Source,
    grid: GridSpec,
    mpp_override: float | None,
    tissue: TissueMethod | None = None,
    qc: Path | None = None,
) -> PatchedSlide:
    """Lay one source's patches.

    Args:
        source: A slide, or patch images, which need no tissue and get no picture.
        grid: The patches.
        mpp_override: Micrometers per level-0 pixel where header and manifest give none.
        tissue: The method that `grid.tissue` names; None finds it by that name, which does for thresholds.
        qc: Folder of the slide's picture and outlines (see `overview.overview_folder`); None writes none.
            They are written also where no patch is left.

    Raises:
        SlideError: It cannot be opened or read, its scale is unknown or too coarse, or it has no tissue.
        UsageError: The tissue method cannot be used.
    """
    if source.patch_ids:
        laid = _patch_images(source, grid, mpp_override)
    else:
        laid = _patch_slide(source, grid, mpp_override, tissue or resolve_tissue(grid.tissue), qc)
    laid.facts["source"] = str(source.path.resolve())
    laid.facts["labels"] = dict(source.labels)
    return laid


def _patch_slide(
    source: Source, grid: GridSpec, mpp_override: float | None, tissue: TissueMethod, qc: Path | None
) -> PatchedSlide:
    with open_slide(source.path, manifest_mpp=source.mpp, mpp_override=mpp_override) as slide:
        side = patch_side_level0(grid, slide.mpp)
        found = tissue.find(slide, source.slide_id)
        downsample = slide.thumbnail_frame(THUMBNAIL_MPP).downsample
        coords = grid_coords(slide.level0_size, side, found.mask, downsample, grid, source.slide_id)
        laying = SlideOverview(
            slide_id=source.slide_id,
            coords=coords,
            side=side,
            mask=found.mask,
            downsample=downsample,
            method=tissue.identity,
        )
        remarks = _write_overview(qc, slide, laying, found) if qc is not None else ()
        if not len(coords):
            raise NoTissueError(_nothing_left(slide, side, tissue))
        facts = {
            "kind": "slide",
            "fingerprint": fingerprint(source.path),
            "mpp": float(slide.mpp),
            "mpp_source": slide.mpp_source,
            "level0_size": list(slide.level0_size),
            "patch_px_level0": int(side),
            **found.facts,
        }
    return PatchedSlide(facts=facts, coords=coords, patch_ids=None, remarks=remarks)


def _nothing_left(slide: Slide, side: Level0Px, tissue: TissueMethod) -> str:
    width, height = slide.level0_size
    return (
        f"tissue method {tissue.identity!r} leaves no patch of {side} level-0 px in {width} x {height} px. "
        "If there is tissue, try --tissue none or a smaller --min-tissue"
    )


def _write_overview(qc: Path, slide: Slide, laying: SlideOverview, found: FoundTissue) -> tuple[str, ...]:
    """Write the slide's picture and outlines; what goes wrong is a remark, for the patches do not need them."""
    try:
        remark = write_overview(qc, slide, laying, found.thumbnail)
    except ReadError as error:
        remark = f"slide {laying.slide_id}: no picture of it: {error}"
    except OSError as error:
        remark = f"slide {laying.slide_id}: cannot write its picture into {qc}: {error.strerror or error}"
    return (remark,) if remark else ()


def _patch_images(source: Source, grid: GridSpec, mpp_override: float | None) -> PatchedSlide:
    names = source.patch_ids
    _require_first_image(source, grid)
    order = image_order(len(names), grid, source.slide_id)[: grid.max_patches]
    facts: dict[str, object] = {
        "kind": "patches",
        "fingerprint": images_fingerprint(source.path, names),
        "mpp": source.mpp if source.mpp is not None else mpp_override,
        "mpp_source": "manifest" if source.mpp is not None else "override" if mpp_override else "not known",
        "level0_size": [grid.patch_px, grid.patch_px],
        "patch_px_level0": grid.patch_px,
    }
    patch_ids = tuple(names[i] for i in order)
    return PatchedSlide(facts=facts, coords=np.zeros((len(order), 2), np.int32), patch_ids=patch_ids)


def _require_first_image(source: Source, grid: GridSpec) -> None:
    """Refuse a whole set whose images have another size than the store's patches."""
    try:
        read_image(source.path / source.patch_ids[0], grid.patch_px)
    except ReadError as error:
        raise ReadError(f"{error}. Give their size with --patch-px") from error


def patch_sources(
    sources: Iterable[Source],
    grid: GridSpec,
    *,
    mpp_override: float | None,
    workers: int,
    tissue: TissueMethod | None = None,
    qc: Path | None = None,
) -> Iterator[PatchingOutcome]:
    """Lay many sources in threads, in order; a source that cannot be used costs that source alone.

    The arguments are those of `patch_source`.
    """

    def lay(source: Source) -> PatchingOutcome:
        try:
            return PatchingOutcome(source=source, laid=patch_source(source, grid, mpp_override, tissue, qc))
        except SlideError as error:
            return PatchingOutcome(source=source, error=error)

    return run_ahead(lay, sources, workers=workers, lookahead=2 * max(1, workers))


def store_patched(
    store: FeatureStore, source: Source, laid: PatchedSlide, views: ViewSpec, n_views: int
) -> StoredSlide:
    """Write a laid slide into a store with the parameters of its first `n_views` views."""
    params = sample_views(views, source.slide_id, laid.coords, range(n_views), laid.patch_ids)
    return store.add_slide(
        source.slide_id, laid.facts, coords=laid.coords, view_params=params, columns=COLUMNS, patch_ids=laid.patch_ids
    )


def refresh_stored(
    stored: StoredSlide, source: Source, views: ViewSpec, n_views: int, tissue: TissueMethod | None = None
) -> StoredSlide:
    """Bring a slide that is in the store already up to date: its place, labels, and parameters of further views.

    Raises:
        StoreMismatchError: The file is not the one that was cached, or its annotation has changed since.
        ReadError: It cannot be read.
    """
    require_same_slide(stored, source.path)
    if tissue is not None:
        _require_same_annotation(stored, tissue)
    if str(source.path.resolve()) != stored.facts["source"]:
        stored.set_source(source.path, stored.facts["fingerprint"])
    if source.labels and source.labels != stored.labels:
        stored.set_labels({**stored.labels, **source.labels})
    known = stored.n_views
    if known < n_views:
        further = range(known, n_views)
        stored.extend_views(sample_views(views, stored.slide_id, stored.coords, further, stored.patch_ids))
    return stored


def _require_same_annotation(stored: StoredSlide, tissue: TissueMethod) -> None:
    """Refuse a slide whose annotation is another than it was laid by; one that is no longer there says nothing."""
    found = tissue.file_sha256(stored.slide_id)
    kept = stored.facts.get("tissue_sha256")
    if found is not None and found != kept:
        raise StoreMismatchError(
            f"slide {stored.slide_id}: its annotation has changed since its patches were laid (sha256 {found[:12]}, "
            f"stored {str(kept)[:12]} of {stored.facts.get('tissue_file')}). Restore it, or use another --store"
        )

"""Find the patches of a slide: its scale, its tissue, the grid, the parameters of views. Reads small scales only."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from g2l_core.concurrency import run_ahead
from g2l_core.errors import G2LError, MppError, NoTissueError, ReadError, SlideError, StoreMismatchError
from g2l_core.extraction.given_coords import patch_coords
from g2l_core.patches.grid import GridSpec, image_order, patch_side_level0
from g2l_core.patches.identity import images_fingerprint, require_same_slide
from g2l_core.patches.render import read_image
from g2l_core.patches.views import ViewSpec, columns_of, sample_views
from g2l_core.slides.boundary import slide_errors, within
from g2l_core.slides.fingerprint import file_state, fingerprint
from g2l_core.slides.manifest import Source
from g2l_core.slides.mpp import TOLD
from g2l_core.slides.notes import Note
from g2l_core.slides.slide import Slide, open_slide
from g2l_core.slides.under_way import UnderWay
from g2l_core.store.facts import SlideFacts
from g2l_core.store.features import FeatureStore, StoredSlide
from g2l_core.tissue.glass import colored_glass
from g2l_core.tissue.methods import COORDINATES, FoundTissue, TissueMethod, resolve_tissue
from g2l_core.tissue.overview import SlideOverview, thumbnail_to_show, write_overview
from g2l_core.tissue.thresholds import THUMBNAIL_MPP
from g2l_core.types import Coords, Level0Px

IMAGE_TOLERANCE = 0.1
"""Maximum relative difference between the scale of patch images and that of the store: that of an encoder's card."""


@dataclass(frozen=True, kw_only=True)
class PatchedSlide:
    """A slide's patches, not yet in a store."""

    facts: SlideFacts
    coords: Coords
    patch_ids: tuple[str, ...] | None
    """File names of patch images; None for a slide."""
    remarks: tuple[str, ...] = ()
    """Warnings about what is not needed for the patches: an overview that could not be written."""
    notes: tuple[Note, ...] = ()
    """What is not as expected about the slide or its annotation."""


@dataclass(frozen=True, kw_only=True)
class PatchingOutcome:
    """The patches of one source, or the reason why there are none."""

    source: Source
    patched: PatchedSlide | None = None
    error: G2LError | None = None


def patch_source(
    source: Source,
    grid: GridSpec,
    mpp_override: float | None,
    tissue: TissueMethod | None = None,
    qc: Path | None = None,
) -> PatchedSlide:
    """Find the patches of one source.

    Args:
        source: A slide, or patch images, which need no tissue and get no overview.
        grid: The patches.
        mpp_override: Micrometers per level-0 pixel where header and manifest give none.
        tissue: The method that `grid.tissue` names; None finds a threshold by that name.
        qc: Folder of the slide's overview and outlines (see `overview.overview_folder`); None writes none.
            They are written even if no patch is left.

    Raises:
        SlideError: It cannot be opened or read, its scale is unknown or too coarse, or it has no tissue.
        UsageError: The tissue method cannot be used.
    """
    if source.patch_ids:
        return _patch_images(source, grid, mpp_override)
    return _patch_slide(source, grid, mpp_override, tissue or resolve_tissue(grid.tissue), qc)


def _patch_slide(
    source: Source, grid: GridSpec, mpp_override: float | None, tissue: TissueMethod, qc: Path | None
) -> PatchedSlide:
    with open_slide(source.path, manifest_mpp=source.mpp, mpp_override=mpp_override, icc=grid.icc) as slide:
        side = patch_side_level0(grid, slide.mpp)
        found = tissue.find(slide, source.slide_id)
        coords, left_out = patch_coords(slide, side, found, grid, source.slide_id)
        overview = SlideOverview(
            slide_id=source.slide_id,
            coords=coords,
            side=side,
            mask=found.mask,
            downsample=slide.thumbnail_frame(THUMBNAIL_MPP).downsample,
            method=tissue.identity,
        )
        remarks = _write_overview(qc, slide, overview, found) if qc is not None else ()
        notes = (*slide.notes, *found.notes, *left_out, *_glass_notes(slide, found, may_read=qc is not None))
        if not len(coords):
            raise NoTissueError(_nothing_left(slide, side, tissue, notes))
        facts = SlideFacts(
            kind="slide",
            fingerprint=fingerprint(source.path),
            file_state=file_state(source.path),
            mpp=float(slide.mpp),
            mpp_source=slide.mpp_source,
            level0_size=slide.level0_size,
            tissue_file=found.facts.get("tissue_file", ""),
            tissue_sha256=found.facts.get("tissue_sha256", ""),
            patch_px_level0=int(side),
            source=str(source.path.resolve()),
            labels=dict(source.labels),
        )
    return PatchedSlide(facts=facts, coords=coords, patch_ids=None, remarks=remarks, notes=notes)


def _glass_notes(slide: Slide, found: FoundTissue, *, may_read: bool) -> Iterator[Note]:
    """A note if the slide's glass is colored, as far as there is a thumbnail or one may be read."""
    thumbnail = found.thumbnail
    if thumbnail is None and may_read:
        with suppress(ReadError):  # the remark about the overview says it
            thumbnail = thumbnail_to_show(slide, None)
    color = None if thumbnail is None else colored_glass(thumbnail.image)
    if color is not None:
        text = "the brightest part is neither near white nor gray, so the colors may be decoded wrongly"
        yield Note(text=text, detail="red {} green {} blue {}".format(*color))


def _nothing_left(slide: Slide, side: Level0Px, tissue: TissueMethod, notes: Sequence[Note]) -> str:
    width, height = slide.level0_size
    said = "".join(f"; {note.text} ({note.detail})" for note in notes)
    if tissue.identity == COORDINATES:
        return f"its coordinates leave no patch of {side} level-0 px in {width} x {height} px{said}"
    return (
        f"tissue method {tissue.identity!r} leaves no patch of {side} level-0 px in {width} x {height} px{said}. "
        "If there is tissue, try --tissue none or a smaller --min-tissue"
    )


def _write_overview(qc: Path, slide: Slide, overview: SlideOverview, found: FoundTissue) -> tuple[str, ...]:
    """Write the slide's overview and outlines; a failure is only a remark, for the patches do not need them."""
    try:
        remark = write_overview(qc, slide, overview, found.thumbnail)
    except ReadError as error:
        remark = f"slide {overview.slide_id}: no picture of it: {error}"
    except OSError as error:
        remark = f"slide {overview.slide_id}: cannot write its picture into {qc}: {error.strerror or error}"
    return (remark,) if remark else ()


def _patch_images(source: Source, grid: GridSpec, mpp_override: float | None) -> PatchedSlide:
    names = source.patch_ids
    mpp = source.mpp if source.mpp is not None else mpp_override
    remark = _require_scale(mpp, "manifest" if source.mpp is not None else "--mpp-override", grid, source.slide_id)
    _require_first_image(source, grid)
    order = image_order(len(names), grid, source.slide_id)[: grid.max_patches]
    patch_ids = tuple(names[i] for i in order)
    facts = SlideFacts(
        kind="patches",
        fingerprint=images_fingerprint(source.path, patch_ids),
        mpp=mpp,
        mpp_source="manifest" if source.mpp is not None else "override" if mpp_override else "not known",
        level0_size=(grid.patch_px, grid.patch_px),
        patch_px_level0=grid.patch_px,
        source=str(source.path.resolve()),
        labels=dict(source.labels),
    )
    coords = np.zeros((len(order), 2), np.int32)
    remarks = (remark,) if remark else ()
    return PatchedSlide(facts=facts, coords=coords, patch_ids=patch_ids, remarks=remarks)


def _require_scale(mpp: float | None, source: str, grid: GridSpec, slide_id: str) -> str:
    """Refuse patch images at another scale than the store's, for they are encoded as they are; a remark on a small one.

    Raises:
        MppError: The scale differs by more than `IMAGE_TOLERANCE`.
    """
    if mpp is None:
        return ""
    share = abs(mpp - grid.mpp) / grid.mpp
    given = f"its {source} gives {mpp:g} um/px, the store's patches have {grid.mpp:g}"
    if share > IMAGE_TOLERANCE + 1e-9:
        raise MppError(
            f"{given}, and patch images are not resampled. Cache them with --mpp {mpp:g} into a store of their own "
            f"(--force-mpp if the encoder expects another scale), or resample the images to {grid.mpp:g} um/px"
        )
    return f"slide {slide_id}: {given}; patch images are encoded as they are" if share > TOLD else ""


def _require_first_image(source: Source, grid: GridSpec) -> None:
    """Refuse a set of images if the first one has another size than the store's patches.

    Raises:
        ReadError: It has, or it cannot be read.
    """
    try:
        read_image(source.path / source.patch_ids[0], grid.patch_px, icc=grid.icc)
    except ReadError as error:
        advice = ". Give their size with --patch-px" if "the store's patches" in str(error) else ""
        raise ReadError(f"{error}{advice}") from error


def patch_sources(
    sources: Iterable[Source],
    grid: GridSpec,
    *,
    mpp_override: float | None,
    workers: int,
    tissue: TissueMethod | None = None,
    qc: Path | None = None,
    watch: UnderWay | None = None,
    timeout: float | None = None,
) -> Iterator[PatchingOutcome]:
    """Find the patches of many sources in threads, in order. If a source cannot be used, only that source fails.

    The arguments are those of `patch_source`, and `workers`, the number of threads; `watch`, where each source is
    marked while it is read; and `timeout`, the seconds that one source may take.
    """

    def patch(source: Source) -> PatchingOutcome:
        try:
            with slide_errors(SlideError), watch.reading(source.slide_id) if watch else nullcontext():
                find = partial(patch_source, source, grid, mpp_override, tissue, qc)
                return PatchingOutcome(source=source, patched=within(timeout, find, "finding its patches"))
        except SlideError as error:
            return PatchingOutcome(source=source, error=error)

    return run_ahead(patch, sources, workers=workers, lookahead=2 * max(1, workers))


def store_patched(
    store: FeatureStore, source: Source, patched: PatchedSlide, views: ViewSpec, n_views: int
) -> StoredSlide:
    """Write a slide's patches into a store with the parameters of their first `n_views` views."""
    coords, patch_ids = patched.coords, patched.patch_ids
    params = sample_views(views, source.slide_id, coords, range(n_views), patch_ids)
    facts = replace(patched.facts, notes=tuple(note.text for note in patched.notes))
    slide = store.add_slide(
        source.slide_id, facts, coords=coords, view_params=params, columns=columns_of(views), patch_ids=patch_ids
    )
    if source.patch_labels:
        slide.set_patch_labels(_patch_labels(source, patch_ids or ()))
    return slide


def _patch_labels(source: Source, patch_ids: Sequence[str]) -> list[Mapping[str, str]]:
    """The labels of each patch image, in the order of its stored file names."""
    rows = zip(*source.patch_labels.values(), strict=True)
    by_name = dict(zip(source.patch_ids, rows, strict=False))
    return [dict(zip(source.patch_labels, by_name.get(name, ()), strict=False)) for name in patch_ids]


def refresh_stored(
    stored: StoredSlide,
    source: Source,
    views: ViewSpec,
    n_views: int,
    tissue: TissueMethod | None = None,
    timeout: float | None = None,
) -> StoredSlide:
    """Update a slide that is in the store already: its place, its labels, and the parameters of further views.

    Raises:
        StoreMismatchError: The file is not the one that was cached, or its annotation has changed.
        ReadError: It cannot be read.
    """
    ids = source.patch_ids
    within(timeout, lambda: require_same_slide(stored, source.path, ids), "comparing it with what was cached")
    if tissue is not None and not ids:
        _require_same_annotation(stored, source.path, tissue)
    kept, state = stored.patch_ids, file_state(source.path)
    current = stored.facts.fingerprint if kept is None else images_fingerprint(source.path, kept)
    now = str(source.path.resolve()), current, state
    if now != (stored.facts.source, stored.facts.fingerprint, stored.facts.file_state):
        stored.set_source(source.path, current, state)
    _refresh_labels(stored, source)
    known = stored.n_views
    if known < n_views:
        further = range(known, n_views)
        stored.extend_views(sample_views(views, stored.slide_id, stored.coords, further, stored.patch_ids))
    return stored


def _refresh_labels(stored: StoredSlide, source: Source) -> None:
    """Let a manifest's columns replace what they said before, also where they say nothing now; others stay."""
    labels = {column: value for column, value in stored.labels.items() if column not in source.columns}
    if {**labels, **source.labels} != stored.labels:
        stored.set_labels({**labels, **source.labels})
    if not source.columns or not source.patch_ids:
        return
    asked = {*source.columns, "patch_id"}
    others = [{c: v for c, v in old.items() if c not in asked} for old in stored.patch_labels]
    new = _patch_labels(source, stored.patch_ids or ())
    stored.set_patch_labels([{**old, **own} for old, own in zip(others, new, strict=True)])


def _require_same_annotation(stored: StoredSlide, path: Path, tissue: TissueMethod) -> None:
    """Refuse a slide whose annotation or coordinates have changed since its patches were found; they may be absent."""
    current, kept = tissue.file_sha256(stored.slide_id, path), stored.facts.tissue_sha256 or None
    if current is not None and current != kept:
        what = "coordinates have" if tissue.identity == COORDINATES else "annotation has"
        raise StoreMismatchError(
            f"slide {stored.slide_id}: its {what} changed since its patches were laid (sha256 {current[:12]}, "
            f"stored {str(kept)[:12]} of {stored.facts.tissue_file or None}). Restore it, or use another --store"
        )

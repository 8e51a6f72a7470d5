"""Make a store of features that another tool has extracted: `g2l store import`.

What was encoded is not known but by name: the views, the preprocessing and the precision are those of the encoder's
card until `proof` has shown it, and no pixel hash is known. Features are kept as float16, as all of a store's are.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from g2l_core.encoders.spec import EncoderSpec, spec_to_json
from g2l_core.errors import EncoderError, MppError, ReadError, SlideError, StoreError, UsageError
from g2l_core.extraction.foreign import LAYOUTS, ForeignFile, ForeignSlide, Scale, read_slide
from g2l_core.extraction.import_sources import Places, manifest_rows
from g2l_core.patches.grid import GridSpec, cell_order
from g2l_core.patches.views import ViewSpec, columns_of, sample_views
from g2l_core.slides.fingerprint import file_state, fingerprint
from g2l_core.slides.slide import open_slide
from g2l_core.store.consolidated import consolidate
from g2l_core.store.facts import EncoderFacts, SlideFacts
from g2l_core.store.features import FeatureStore, StoredSlide
from g2l_core.store.location import locate
from g2l_core.store.locks import LOCKS, locked
from g2l_core.store.provenance import digest
from g2l_core.store.writer import FeatureWriter, is_lost
from g2l_core.tissue.coord_files import patches_of
from g2l_core.tissue.methods import COORDINATES
from g2l_core.types import Level0Px

UNPROVED = (
    "imported: nobody knows how its patches were preprocessed; g2l store verify --recompute N compares them where the "
    "slides are at hand"
)
"""Stands in the notes of an imported encoder, and so in reports, until its features are proved."""

TOLERANCE = 0.1
"""Maximum relative difference between the size of a patch by its pixels and by its file: that of encoders' cards."""
TOLD = 0.02
"""From this difference on it is noted."""

_IDS = frozenset({"slide_id", "path", "patch_id", "mpp", "x", "y"})


@dataclass(frozen=True, kw_only=True)
class ImportSettings:
    """What the files do not say."""

    mpp: float | None = None
    """Micrometers per pixel of a patch."""
    patch_px: int | None = None
    """Side of a patch in pixels at `mpp`."""
    mpp_override: float | None = None
    """Micrometers per level-0 pixel, where neither the slide nor the file says it."""
    slides: Path | None = None
    """Folder of the slides, at any depth."""
    coords: Path | None = None
    """Folder of the coordinates, where they are in files of their own."""
    manifest: Path | None = None
    """A table with slide_id, labels, and if you like path and mpp."""


@dataclass(frozen=True, kw_only=True)
class ImportSummary:
    """What an import has done."""

    store: Path
    encoder: str
    """Key of the encoder; empty if nothing was imported."""
    slides: int
    patches: int
    with_slides: int
    """Slides whose pixels are at hand."""
    failed: Mapping[str, str]
    """Reason by slide."""
    known: bool
    """Whether G2L can build the encoder, so that its features can be proved."""


def import_features(
    layout: str,
    source: Path,
    store_path: Path,
    name: str,
    spec: EncoderSpec | None,
    settings: ImportSettings | None = None,
    *,
    dry_run: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> ImportSummary:
    """Write features and coordinates of another tool into a store, which is made or completed.

    Patches are stored in the order of `GridSpec`'s cells, whatever their order in the files. A slide that is stored
    already gets the features of a further encoder if its coordinates are the same.

    Args:
        layout: A name of `foreign.LAYOUTS`.
        source: Its folder.
        store_path: The store.
        name: The encoder, as the user names it.
        spec: Its spec; None if G2L does not know it.
        settings: What the files do not say.
        dry_run: Read and check everything, and write nothing.
        report: Is told how many files are done, and of how many.

    Raises:
        UsageError: There is nothing to import, or it is not clear what.
        ManifestError: The manifest cannot be read.
        StoreError: The store is of other patches, or cannot be written to.
    """
    settings = settings or ImportSettings()
    if not source.is_dir():
        raise UsageError(f"no such folder: {source}")
    files = LAYOUTS[layout].find(source, name, settings.coords)
    if not files:
        raise UsageError(f"{source} has no features in layout {layout}; is it another layout, or a folder above?")
    work = _Import(layout, store_path, name, spec, settings, dry_run=dry_run)
    holder = "another g2l command writes into it"
    with nullcontext() if dry_run else locked(store_path / LOCKS / "writer", wait_s=0, holder=holder):
        twice = {slide_id for slide_id, n in Counter(file.slide_id for file in files).items() if n > 1}
        for done, file in enumerate(files, start=1):
            work.add(file, is_only=file.slide_id not in twice)
            report(done, len(files))
        return work.finish()


class _Import:
    """An import under way."""

    def __init__(
        self, layout: str, path: Path, name: str, spec: EncoderSpec | None, settings: ImportSettings, *, dry_run: bool
    ) -> None:
        self._layout, self._path, self._name, self._spec, self._settings = layout, path, name, spec, settings
        self._dry_run, self._first = dry_run, Scale()
        place = locate(path)  # a dry run may be of a store at an address
        self._store = FeatureStore.open(place, writable=not dry_run) if (place / "zarr.json").exists() else None
        self._places = Places(settings.slides)
        self._rows = manifest_rows(settings.manifest)
        self._encoder: EncoderFacts | None = None
        self._key = ""
        self._failed: dict[str, tuple[str, str]] = {}
        self._slides = self._patches = self._with_slides = 0

    def add(self, file: ForeignFile, *, is_only: bool) -> None:
        """Import one slide; if it cannot be, only it fails."""
        try:
            if not is_only:
                raise ReadError(f"{file.features}: another file has features of slide {file.slide_id!r} too: keep one")
            found = read_slide(LAYOUTS[self._layout], file, self._name)
            with _naming(file):
                self._add(file, found)
        except (SlideError, EncoderError) as error:
            self._failed[file.slide_id] = (str(file.features), str(error))

    def _add(self, file: ForeignFile, found: ForeignSlide) -> None:
        row = self._rows.get(file.slide_id, {})
        facts = _slide_facts(file, self._places.find(file.slide_id, row), row, found, self._settings)
        scale = _resolve(found.scale, facts, self._settings)
        corners = _level0_corners(found, facts)
        _require_on_slide(corners, found.scale, facts)
        features = _as_stored(found.features)
        self._require_alike(scale)
        self._require_encoder(found)
        if self._dry_run:
            self._compare(file.slide_id, corners)
            self._count(len(corners), bool(facts.fingerprint))
            return
        store, key = self._open_store(scale), self._key
        assert self._encoder
        store.add_encoder(key, self._encoder)
        facts = replace(facts, patch_px_level0=round(scale.side or 0), notes=_notes(scale, facts))
        order = cell_order(corners, Level0Px(facts.patch_px_level0), GridSpec.from_json(store.grid), file.slide_id)
        features = features[order]
        slide, features = _stored_slide(store, file.slide_id, facts, corners[order], features)
        writer = FeatureWriter.open(slide, key, digest=store.encoders[key].digest, dim=features.shape[1], n_views=1)
        for shard in writer.missing([0]):
            n = shard.stop - shard.start
            writer.write(shard, features[shard.start : shard.stop], np.zeros(n, np.uint64), np.zeros(n, np.uint8))
        self._count(len(corners), bool(slide.facts.fingerprint))

    def _compare(self, slide_id: str, corners: np.ndarray) -> None:
        """Refuse what does not fit the store that is there."""
        if self._store is None:
            return
        if slide_id in self._store.slide_ids():
            _same_patches(self._store.slide(slide_id), corners)
        if self._encoder and self._key in self._store.encoders:
            self._store.add_encoder(self._key, self._encoder)  # adds nothing, but refuses another one

    def _count(self, patches: int, has_slide: bool) -> None:
        self._slides, self._patches = self._slides + 1, self._patches + patches
        self._with_slides += has_slide

    def _open_store(self, scale: Scale) -> FeatureStore:
        """The store, made for the first slide."""
        assert scale.patch_px
        assert scale.mpp
        view_px = scale.view_px or scale.patch_px
        if self._store is None:
            grid = GridSpec(mpp=scale.mpp, patch_px=scale.patch_px, tissue=COORDINATES, min_tissue=0, artifacts=())
            views = ViewSpec(patch_px=scale.patch_px, crop_px=view_px)
            self._store = FeatureStore.create(self._path, grid=grid.to_json(), views=views.to_json())
        return self._store

    def _require_alike(self, scale: Scale) -> None:
        """Refuse patches of another size than those of the store, or of the first slide."""
        assert scale.patch_px
        assert scale.mpp
        view_px = scale.view_px or scale.patch_px
        if self._store is not None:
            there = (self._store.grid["patch_px"], self._store.views["crop_px"], self._store.grid["mpp"])
        else:
            self._first = self._first if self._first.mpp else scale
            there = (self._first.patch_px, self._first.view_px or self._first.patch_px, self._first.mpp or 0.0)
        if there[:2] != (scale.patch_px, view_px) or abs(scale.mpp - there[2]) > TOLERANCE * there[2]:
            raise MppError(
                f"its patches are {scale.patch_px} px at {scale.mpp:.4g} um/px, of which {view_px} px were encoded; "
                f"those of {self._path} are {there[0]} px at {there[2]:.4g} um/px, of which {there[1]} px. Import them "
                "into another --store, or give --mpp and --patch-px if the file is wrong"
            )

    def _require_encoder(self, found: ForeignSlide) -> None:
        """Refuse features that were encoded otherwise than those of the first slide, which decides."""
        dim = found.features.shape[1]
        if self._encoder is None:
            if self._spec and self._spec.dim not in {None, dim}:
                raise ReadError(
                    f"it has {dim} features a patch, {self._name} gives {self._spec.dim}. If the mean of the patch "
                    f"tokens stands behind the class token, the encoder is {self._name}+cls_mean"
                )
            self._encoder = _encoder_facts(self._layout, self._name, self._spec, dim, found.encoder_digest)
            self._key = _key(self._name)
        if dim != self._encoder.dim:
            raise ReadError(f"it has {dim} features a patch, the other slides have {self._encoder.dim}")
        if found.encoder_digest != self._encoder.extra.get("exported_digest", ""):
            raise ReadError(
                "it was exported from features of another encoder than the other slides: their digests differ"
            )

    def finish(self) -> ImportSummary:
        """Keep what failed, and the index of the store."""
        if self._store is not None and not self._dry_run:
            for slide_id, (source, reason) in self._failed.items():
                with suppress(StoreError):  # an id that no store can hold, which the summary names all the same
                    self._store.fail_slide(slide_id, source, reason, _labels(self._rows.get(slide_id, {})))
            consolidate(self._store.slides())
            self._store.save_catalogue()
        return ImportSummary(
            store=self._path,
            encoder=self._key,
            slides=self._slides,
            patches=self._patches,
            with_slides=self._with_slides,
            failed={slide_id: reason for slide_id, (_, reason) in self._failed.items()},
            known=self._spec is not None,
        )


@contextmanager
def _naming(file: ForeignFile) -> Iterator[None]:
    """Say which file an error is about."""
    try:
        yield
    except (SlideError, EncoderError) as error:
        raise ReadError(f"{file.features}: {error}") from error
    except StoreError as error:
        if isinstance(error.__cause__, OSError):
            raise
        raise ReadError(f"{file.features}: {error}") from error


# -- the encoder ------------------------------------------------------------------------------------------


def _key(name: str) -> str:
    return f"{re.sub(r'[^A-Za-z0-9_]+', '-', name).strip('-')}-imported"


def _encoder_facts(layout: str, name: str, spec: EncoderSpec | None, dim: int, exported_digest: str) -> EncoderFacts:
    """What the store keeps of an imported encoder: the spec as far as it is known, and that nothing is proved."""
    described: dict[str, Any] = spec_to_json(spec) if spec else {"name": name}
    described = {**described, "dim": dim}
    if exported_digest:
        described["exported_digest"] = exported_digest
    facts = {**described, "imported": layout, "weights_notes": [UNPROVED]}
    return EncoderFacts.from_json({**facts, "digest": digest({"imported": layout, **described})})


def _as_stored(features: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        stored = features.astype(np.float16)
    lost = np.flatnonzero(is_lost(features, stored))
    if len(lost):
        largest = float(np.abs(features[lost[0]]).max())
        raise ReadError(f"row {lost[0]} of its features, up to {largest:.3g}, is beyond float16, which stores have")
    return stored


# -- the slide --------------------------------------------------------------------------------------------


def _labels(row: Mapping[str, str]) -> dict[str, str]:
    return {column: value for column, value in row.items() if value and column not in _IDS}


def _slide_facts(
    file: ForeignFile, path: Path | None, row: Mapping[str, str], found: ForeignSlide, settings: ImportSettings
) -> SlideFacts:
    """What the store keeps of a slide: what its own file says where it is at hand, else what the features' file says.

    Raises:
        SlideError: The slide cannot be opened, or its scale is not known.
    """
    given = _manifest_mpp(row)
    mpp = given or settings.mpp_override or found.scale.slide_mpp
    facts = SlideFacts(
        kind="slide",
        source=str(file.features.resolve()),
        labels=_labels(row),
        mpp=mpp,
        mpp_source="manifest" if given else "override" if settings.mpp_override else "imported" if mpp else "not known",
        level0_size=found.scale.level0_size or (0, 0),
        tissue_file=file.features.name,
        tissue_sha256="" if found.in_um else patches_of(found.corners).sha256,
    )
    if path is None:
        return facts
    with open_slide(path, manifest_mpp=given, mpp_override=settings.mpp_override or found.scale.slide_mpp) as slide:
        return replace(
            facts,
            source=str(path.resolve()),
            fingerprint=fingerprint(path),
            file_state=file_state(path),
            mpp=float(slide.mpp),
            mpp_source=slide.mpp_source,
            level0_size=slide.level0_size,
        )


def _manifest_mpp(row: Mapping[str, str]) -> float | None:
    """The um/px of level 0 that a manifest gives."""
    text = row.get("mpp", "")
    try:
        mpp = float(text) if text else None
    except ValueError:
        mpp = 0.0
    if mpp is not None and not 0 < mpp < 100:
        raise MppError(f"the manifest gives it the mpp {text!r}, expected um/px above 0")
    return mpp


def _level0_corners(found: ForeignSlide, facts: SlideFacts) -> np.ndarray:
    """The corners in level-0 pixels, int32 (n, 2)."""
    corners = found.corners
    if found.in_um:
        if not facts.mpp:
            raise MppError(
                "its coordinates are micrometers, and nothing says its um/px: give --slides or --mpp-override"
            )
        corners = np.rint(corners / facts.mpp)
    return corners.astype(np.int32)


def _require_on_slide(corners: np.ndarray, scale: Scale, facts: SlideFacts) -> None:
    size = facts.level0_size
    if facts.fingerprint and scale.level0_size and scale.level0_size != size:
        raise ReadError(
            "its coordinates are of a slide of {} x {} px, and {} has {} x {}".format(
                *scale.level0_size, facts.source, *size
            )
        )
    outside = np.flatnonzero(((corners < 0) | ((corners >= size) & (min(size) > 0))).any(axis=1))
    if len(outside):
        x, y = corners[outside[0]].tolist()
        raise ReadError(
            f"{len(outside):,} of its {len(corners):,} coordinates lie outside of its {size[0]} x {size[1]} px, such "
            f"as {x}, {y}: expected top-left corners in level-0 pixels"
        )


def _resolve(scale: Scale, facts: SlideFacts, settings: ImportSettings) -> Scale:
    """Everything about the size of patches, of which two things follow from the others.

    Raises:
        MppError: Too little is known, or it contradicts itself.
    """
    mpp, patch_px = settings.mpp or scale.mpp, settings.patch_px or scale.patch_px
    side, of_slide = scale.side, facts.mpp
    if mpp is None and side and of_slide and patch_px:
        mpp = side * of_slide / patch_px
    if patch_px is None and side and of_slide and mpp:
        patch_px = round(side * of_slide / mpp)
    if side is None and mpp and patch_px and of_slide:
        side = patch_px * mpp / of_slide
    if not (mpp and patch_px and side):
        lacking = {"--mpp": mpp, "--patch-px": patch_px, "--slides or --mpp-override": side}
        raise MppError(
            "its file does not say at which scale its patches were encoded: give "
            + ", ".join(option for option, value in lacking.items() if not value)
        )
    found = replace(scale, mpp=mpp, patch_px=patch_px, side=side)
    if _difference(found, facts) > TOLERANCE:
        raise MppError(
            f"its patches are {side:g} level-0 px of {of_slide:.4g} um, that is {side * (of_slide or 0):.4g} um, but "
            f"{patch_px} px at {mpp:.4g} um/px are {patch_px * mpp:.4g} um: give --mpp or --patch-px as it was encoded"
        )
    return found


def _difference(scale: Scale, facts: SlideFacts) -> float:
    """By how much a patch's size on the slide differs from what it is meant to have, relative."""
    assert scale.side
    assert scale.mpp
    assert scale.patch_px
    meant = scale.patch_px * scale.mpp
    return abs(scale.side * facts.mpp - meant) / meant if facts.mpp else 0.0


def _notes(scale: Scale, facts: SlideFacts) -> tuple[str, ...]:
    if _difference(scale, facts) <= TOLD:
        return ()
    return ("imported patches are up to 10 % larger or smaller than their scale says",)


def _complete_source(slide: StoredSlide, facts: SlideFacts) -> None:
    """Let a slide that was imported without its file, or without its scale, know them now.

    Raises:
        ReadError: It has another file.
    """
    known = slide.facts
    if not facts.fingerprint or (facts.fingerprint == known.fingerprint and known.mpp):
        return
    if known.fingerprint not in {"", facts.fingerprint}:
        raise ReadError(f"the store has slide {slide.slide_id!r} of another file, {known.source}")
    scale = {} if known.mpp else {"mpp": facts.mpp, "mpp_source": facts.mpp_source}
    slide.set_source(Path(facts.source), facts.fingerprint, facts.file_state, level0_size=facts.level0_size, **scale)


def _same_patches(slide: StoredSlide, corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What sorts some corners, and what sorts those of a stored slide, which must be the same.

    Raises:
        ReadError: They are not.
    """
    there = slide.coords
    order, wanted = np.lexsort(corners.T), np.lexsort(there.T)
    if len(there) != len(corners) or not np.array_equal(corners[order], there[wanted]):
        raise ReadError(f"the store has slide {slide.slide_id!r} with other patches: import it into another --store")
    return order, wanted


def _stored_slide(
    store: FeatureStore, slide_id: str, facts: SlideFacts, corners: np.ndarray, features: np.ndarray
) -> tuple[StoredSlide, np.ndarray]:
    """The slide in the store, added or found there, and the features in the order of its patches.

    Raises:
        ReadError: A slide of that id has other patches.
    """
    stored = {slide.slide_id for slide in store.slides()}
    if slide_id not in stored:
        views = ViewSpec.from_json(store.views)
        params, columns = sample_views(views, slide_id, corners, range(1)), columns_of(views)
        slide = store.add_slide(slide_id, facts, coords=corners, view_params=params, columns=columns, patch_ids=None)
        return slide, features
    slide = store.slide(slide_id)
    order, wanted = _same_patches(slide, corners)
    _complete_source(slide, facts)
    if facts.labels and facts.labels != slide.labels:
        slide.set_labels({**slide.labels, **facts.labels})
    ordered = np.empty_like(features)
    ordered[wanted] = features[order]
    return slide, ordered

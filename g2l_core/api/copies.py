"""Stores from stores: a part of one, or several in one. Everything goes through the writers that stage one uses."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from g2l_core.api.archive import Archive
from g2l_core.api.selection import Part, Selection
from g2l_core.benchmark.columns import SlideColumns
from g2l_core.errors import StoreError, StoreMismatchError, UsageError
from g2l_core.files import sync_folder
from g2l_core.store import schema
from g2l_core.store.boundary import writing
from g2l_core.store.columns import read_column, write_column
from g2l_core.store.consolidated import consolidate
from g2l_core.store.facts import FAILED, EncoderFacts, SlideFacts
from g2l_core.store.features import FeatureStore, StoredSlide
from g2l_core.store.ids import refusals
from g2l_core.store.location import Location
from g2l_core.store.provenance import differences
from g2l_core.store.writer import FeatureWriter


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What of a store is copied."""

    encoders: frozenset[str] | None = None
    """Keys; None is all."""
    n_views: int | None = None
    """The first views; None is all."""
    without: frozenset[str] = frozenset()
    """Columns of labels that are left out."""
    is_public: bool = False
    """Whether places on this machine are left out, and with them slides that failed."""
    archive: Archive | None = None
    """How features are rounded and packed; None keeps them as they are."""
    report: Callable[[int, int], None] = field(default=lambda done, total: None, compare=False)
    """Is told how many slides are written, and of how many."""

    def views(self, stored: int) -> int:
        """How many of some stored views."""
        return stored if self.n_views is None else min(stored, self.n_views)

    def has(self, encoder: str) -> bool:
        """Whether an encoder is copied."""
        return self.encoders is None or encoder in self.encoders


@dataclass(frozen=True, kw_only=True)
class Copied:
    """What was written into a new store, or would be."""

    slides: int
    patches: int
    encoders: Mapping[str, EncoderFacts]
    feature_bytes: int
    """Of features as float16, without compression."""

    def to_json(self) -> dict[str, object]:
        """Its counts, and the encoders' keys, as plain values."""
        counts = {"slides": self.slides, "patches": self.patches, "feature_bytes": self.feature_bytes}
        return {**counts, "encoders": sorted(self.encoders)}


def write_store(selections: Sequence[Selection], out: Path, kept: Kept, *, dry_run: bool = False) -> Copied:
    """Write the slides of some selections into a new store; with `dry_run` only check that this can be done.

    Raises:
        StoreError: There is something at `out`, or it cannot be written.
        StoreMismatchError: The stores do not fit together. The message names what differs, and nothing is written.
        UsageError: A selection has parts of slides.
        StoreCorruptError: A slide that is to be copied is damaged.
    """
    if kept.n_views is not None and kept.n_views < 1:
        raise UsageError(f"views is how many views to keep, the canonical one first, at least 1; got {kept.n_views}")
    parts = [selection.parts() for selection in selections]
    for part in (part for of_store in parts for part in of_store):
        if len(part) != len(part.slide):
            raise UsageError(
                f"a store holds whole slides, but {len(part):,} of {len(part.slide):,} patches of {part.slide_id} are "
                "chosen. Choose slides, or write the patches with to_parquet"
            )
    stores = [selection.store for selection in selections]
    encoders = _require_one_identity(stores, kept)
    by_slide = _require_same_slides(parts, kept)
    require_new(out)
    copied = _counted(by_slide, encoders, kept)
    if not dry_run:
        _write(selections, by_slide, encoders, out, kept)
    return copied


def _counted(by_slide: Mapping[str, list[Part]], encoders: Mapping[str, EncoderFacts], kept: Kept) -> Copied:
    """What the slides come to; an encoder that several copies of a slide have counts once."""
    widths = [
        len(copies[0]) * 2 * encoders[key].dim * max(kept.views(f.n_views) for f in found)
        for copies in by_slide.values()
        for key in encoders
        if (found := [part.slide.facts.features[key] for part in copies if key in part.slide.facts.features])
    ]
    patches = sum(len(copies[0]) for copies in by_slide.values())
    return Copied(slides=len(by_slide), patches=patches, encoders=encoders, feature_bytes=sum(widths))


def _write(
    selections: Sequence[Selection],
    by_slide: Mapping[str, list[Part]],
    encoders: Mapping[str, EncoderFacts],
    out: Path,
    kept: Kept,
) -> None:
    stores = [selection.store for selection in selections]
    with new_folder(out) as folder:
        new = FeatureStore.create(folder, grid=stores[0].grid, views=stores[0].views)
        for key, facts in encoders.items():
            facts = _public_encoder(facts) if kept.is_public else facts
            new.add_encoder(key, kept.archive.marked(facts) if kept.archive else facts)
        for run in stores[0].facts.runs if len(stores) == 1 and not kept.is_public else ():
            new.add_run(run)
        for done, copies in enumerate(by_slide.values(), start=1):
            _write_slide(new, copies, kept)
            kept.report(done, len(by_slide))
        if kept.archive:
            kept.archive.describe(new, encoders)
        if not kept.is_public:
            _write_failed(new, selections)
        consolidate(new.slides())
        new.save_catalogue()


def _public_encoder(facts: EncoderFacts) -> EncoderFacts:
    """An encoder whose weights came from a file or folder of this machine, by the name of that alone."""
    kind, colon, place = facts.weights.partition(":")
    return replace(facts, weights=f"{kind}:{Path(place).name}") if colon and kind in {"file", "run"} else facts


def _public_slide(facts: SlideFacts) -> SlideFacts:
    """A slide without the place of its file."""
    folder = f"{Path(facts.source).parent}{os.sep}"
    return replace(
        facts,
        source=Path(facts.source).name,
        file_state=None,
        notes=tuple(note.replace(folder, "") for note in facts.notes),
        unreadable={row: reason.replace(folder, "") for row, reason in facts.unreadable.items()},
    )


def require_new(out: Path) -> None:
    """Refuse a place where something is.

    Raises:
        StoreError: There is something.
    """
    if out.exists():
        raise StoreError(f"{out} is there already; give another place, or delete it")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder aside that becomes `out` when the block ends without an error."""
    aside = out.with_name(f"{out.name}.{os.getpid()}{schema.LEFTOVER}")
    try:
        yield aside
        with writing(str(out)):
            aside.rename(out)
            sync_folder(out.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _require_one_identity(stores: Sequence[FeatureStore], kept: Kept) -> Mapping[str, EncoderFacts]:
    """The encoders of all stores, which must have the same grid, views and, under one key, the same encoder."""
    first, encoders = stores[0], dict[str, EncoderFacts]()
    owner = dict[str, Location]()
    for store in stores:
        mine, theirs = ({"grid": s.grid, "views": s.views} for s in (first, store))
        changed = [f"{name} is {there!r} there, {here!r} here" for name, there, here in differences(mine, theirs)]
        if changed:
            raise StoreMismatchError(f"{store.path} does not fit {first.path}: {'; '.join(changed)}")
        for key, facts in store.encoders.items():
            known = encoders.setdefault(key, facts)
            if (known.digest, known.rounded_bits) != (facts.digest, facts.rounded_bits):
                fields = ", ".join(name for name, *_ in differences(known.to_json(), facts.to_json()))
                raise StoreMismatchError(
                    f"{store.path} has features of another encoder under {key} than {owner[key]}: {fields} differ"
                )
            owner.setdefault(key, store.path)
    return {key: facts for key, facts in encoders.items() if kept.has(key)}


def _require_same_slides(parts: Sequence[Sequence[Part]], kept: Kept) -> Mapping[str, list[Part]]:
    """The slides by id, each with the copies of it that the stores have, which must not contradict each other."""
    by_slide: dict[str, list[Part]] = {}
    for part in (part for of_store in parts for part in of_store):
        copies = by_slide.setdefault(part.slide_id, [])
        if copies and (what := _contradiction(copies[0], part, kept)):
            raise StoreMismatchError(
                f"slide {part.slide_id} of {part.slide.folder} is not that of {copies[0].slide.folder}: {what} differ. "
                "Rename one of them, or leave it out"
            )
        copies.append(part)
    for reason in refusals(by_slide, ()).values():
        raise StoreMismatchError(f"the slides do not fit into one store: {reason}")
    return dict(sorted(by_slide.items()))


def _contradiction(first: Part, second: Part, kept: Kept) -> str:
    """What two slides of one id differ in; empty where they are the same."""
    a, b = first.slide.facts, second.slide.facts
    for name in ("kind", "fingerprint", "n_patches", "patch_px_level0", "mpp"):
        if getattr(a, name) != getattr(b, name):
            return name
    for name in {*a.tables, *b.tables}:
        one, other = a.tables.get(name, {}), b.tables.get(name, {})
        shared = [block for block in one if block in other]
        if any(one[block] != other[block] for block in shared) and not _is_filled_in(name, first.slide, second.slide):
            return name
    for key in filter(kept.has, a.features.keys() & b.features.keys()):
        left, right = a.features[key].shards, b.features[key].shards
        if any(left[shard].crc32c != right[shard].crc32c for shard in left.keys() & right.keys()):
            return f"features of {key}"
    labels = [_slide_labels(part.columns, kept) for part in (first, second)]
    clash = next((c for c in sorted(labels[0].keys() & labels[1].keys()) if labels[0][c] != labels[1][c]), "")
    return f"labels {clash}" if clash else ""


def _is_filled_in(name: str, first: StoredSlide, second: StoredSlide) -> bool:
    """Whether two tables of pixel hashes differ only where one of them does not know any."""
    if name != "pixel_hash":
        return False
    n = min(first.n_views, second.n_views)
    a, b = first.pixel_hash[:, :n], second.pixel_hash[:, :n]
    return bool(((a == b) | (a == schema.UNKNOWN_HASH) | (b == schema.UNKNOWN_HASH)).all())


def _slide_labels(columns: SlideColumns, kept: Kept) -> dict[str, str]:
    """The labels of the whole slide that hold, those of label files included."""
    values = {name: columns.constant(name) for name in columns.names - {"slide_id"} - kept.without}
    return {name: value for name, value in values.items() if value}


def _write_slide(new: FeatureStore, copies: Sequence[Part], kept: Kept) -> None:
    """Write a slide: its tables, its labels, its added columns, and every encoder's features from all copies."""
    widest = max(copies, key=lambda part: part.slide.n_views)
    slide, n_views = widest.slide, kept.views(widest.slide.n_views)
    labels = {name: value for part in reversed(copies) for name, value in _slide_labels(part.columns, kept).items()}
    facts = _public_slide(slide.facts) if kept.is_public else slide.facts
    stored = new.add_slide(
        slide.slide_id,
        replace(facts, features={}, labels=labels),
        coords=slide.coords,
        view_params=slide.view_params[:, :n_views],
        columns=list(slide.array("view_params").attrs["columns"]),
        patch_ids=slide.patch_ids,
    )
    hashes = np.zeros((len(slide), n_views), np.uint64)
    for part in copies:
        known = part.slide.pixel_hash[:, :n_views]
        hashes[:, : known.shape[1]] = np.where(known == schema.UNKNOWN_HASH, hashes[:, : known.shape[1]], known)
    stored.put_table("patch_status", slide.patch_status)
    stored.put_table("pixel_hash", hashes)
    for part in reversed(copies):  # the first store has the last word
        _write_columns(stored, part, kept)
    for part in copies:
        for encoder in filter(kept.has, part.slide.encoder_keys):
            _write_features(new, part.slide, encoder, kept)


def _write_columns(stored: StoredSlide, part: Part, kept: Kept) -> None:
    """Write what single patches have: labels of a manifest or a file, and columns that were added."""
    columns = part.columns
    of_patches = {name for name in columns.names - kept.without if columns.constant(name) is None}
    given = (
        {name for of_patch in part.slide.patch_labels for name in of_patch} if part.slide.has_patch_labels else set()
    )
    from_manifest = {name for name in of_patches & given if not columns.is_typed(name) and not _is_of_file(part, name)}
    if from_manifest:
        old = [{k: v for k, v in labels.items() if k in from_manifest} for labels in part.slide.patch_labels]
        stored.set_patch_labels([{**here, **own} for here, own in zip(stored.patch_labels, old, strict=True)])
    for name in sorted(of_patches - from_manifest):
        typed = columns.is_typed(name)
        values = read_column(part.slide, name) if typed else columns.column(name, np.arange(len(part.slide)))
        write_column(stored, name, values)


def _is_of_file(part: Part, name: str) -> bool:
    return any(name in labels.columns for labels in part.labels)


def _write_features(new: FeatureStore, slide: StoredSlide, encoder: str, kept: Kept) -> None:
    """Write the recorded shards of an encoder that the new slide does not have yet."""
    stored = new.slide(slide.slide_id)
    facts = slide.feature_facts(encoder)
    n_views = kept.views(facts.n_views)
    records = slide.records(encoder, range(n_views))
    if kept.archive and encoder not in stored.encoder_keys:
        kept.archive.prepare(stored, encoder, facts.digest, n_views, facts.dim)
        stored = new.slide(slide.slide_id)
    writer = FeatureWriter.open(stored, encoder, digest=facts.digest, dim=facts.dim, n_views=n_views)
    status, hashes = slide.patch_status, slide.pixel_hash
    for shard in writer.missing(range(n_views)):
        if shard.name in records:
            rows = slice(shard.start, shard.stop)
            features = slide.read_rows(encoder, shard.start, shard.stop, view=shard.view)
            features = kept.archive.rounded(encoder, features) if kept.archive else features
            writer.write(shard, features, hashes[rows, shard.view], status[rows])


def _write_failed(new: FeatureStore, selections: Sequence[Selection]) -> None:
    """Keep the slides that stage one could not use, where stores are copied whole."""
    known = set(new.slide_ids())
    for store in (selection.store for selection in selections if not selection.steps):
        for slide_id, entry in store.entries.items():
            if slide_id not in known and entry.facts is not None and entry.facts.status == FAILED:
                new.fail_slide(slide_id, entry.facts.source, entry.facts.reason, entry.facts.labels)
                known.add(slide_id)

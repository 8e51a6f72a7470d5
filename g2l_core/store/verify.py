"""Check a store: everything that is recorded is read again and compared, and what is damaged can be dropped."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, UInt64

from g2l_core.concurrency import run_ahead
from g2l_core.errors import StoreCorruptError, StoreError, StoreUnreadError
from g2l_core.store import schema
from g2l_core.store.catalogue import CATALOGUE
from g2l_core.store.columns import column_tables
from g2l_core.store.facts import ShardRecord
from g2l_core.store.features import FeatureStore, Shard, StoredSlide, leftovers
from g2l_core.store.hollow import MARK, is_hollow
from g2l_core.store.location import below, can_list

ADVICE = "g2l store verify --repair drops it, and the caching command computes this shard alone"
THREADS = 4
"""Slides that are read at a time: the disk is slower than the checksums."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong, or not there yet."""

    kind: Literal["damaged", "missing", "failed", "leftover", "unproved", "unread"]
    """damaged: not what was written. missing: not written yet. failed: a slide that stage one could not use.
    leftover: a temporary file of a killed writer, without meaning. unproved: imported features that are as they were
    written, but not what their encoder gives. unread: a file that this machine may not, or cannot, read."""
    slide_id: str = ""
    encoder: str = ""
    shard: Shard | None = None
    """The shard that is damaged, where it is one."""
    table: str = ""
    """The array other than features that is damaged, where it is one."""
    what: str
    """A sentence for people: what was found, where, and what to do."""

    def __str__(self) -> str:
        place = " ".join(filter(None, [self.slide_id and f"slide {self.slide_id}", self.encoder]))
        return f"{self.kind:8} {f'{place}: ' if place else ''}{self.what}"


@dataclass(frozen=True)
class Checked:
    """One slide that has been read again, or the store as a whole, whose `slide_id` is empty."""

    slide_id: str
    problems: tuple[Problem, ...]


def verify(store: FeatureStore) -> Iterator[Problem]:
    """Yield whatever is damaged, missing, failed or left over in a store. Reads every feature once.

    Args:
        store: Opened for reading is enough; nothing is changed.
    """
    for checked in verify_slides(store):
        yield from checked.problems


def verify_slides(store: FeatureStore) -> Iterator[Checked]:
    """Check the store as a whole, then slide by slide, so that a caller can show how far it is."""
    left = [
        Problem(kind="leftover", what=f"{below(path, store.path)} of a killed writer; it may be deleted")
        for path in leftovers(store.path)
    ]
    failed = [Problem(kind="failed", slide_id=i, what=reason) for i, reason in store.failed_slides().items()]
    damaged = [Problem(kind="damaged", slide_id=i, what=damage) for i, damage in store.damaged.items()]
    yield Checked("", (*left, *failed, *damaged))

    def check(slide: StoredSlide) -> Checked:
        problems = _verify_document(slide) or list(_verify_tables(slide)) or _verify_features(store, slide)
        return Checked(slide.slide_id, tuple(problems))

    yield from run_ahead(check, store.slides(), workers=THREADS, lookahead=2 * THREADS)


def _verify_document(slide: StoredSlide) -> list[Problem]:
    """Read the document of a slide whose facts came from the catalogue, as they do where nothing can be listed."""
    if can_list(slide.folder):
        return []
    try:
        slide.reload()
    except StoreCorruptError as error:
        return [Problem(kind="damaged", slide_id=slide.slide_id, what=str(error))]
    return []


def _verify_tables(slide: StoredSlide) -> Iterator[Problem]:
    """Check that the arrays other than the features are what was written."""
    texts = [schema.PATCH_ID] * slide.has_patch_ids + [schema.PATCH_LABELS] * slide.has_patch_labels
    for name in [*schema.TABLES, *texts, *column_tables(slide.facts).values()]:
        try:
            slide.read_table(name)
        except (StoreCorruptError, StoreUnreadError) as error:
            yield Problem(kind=_kind_of(error), slide_id=slide.slide_id, table=name, what=str(error))


def _verify_features(store: FeatureStore, slide: StoredSlide) -> Iterator[Problem]:
    for encoder in sorted({*store.encoders, *slide.encoder_keys}):
        if encoder not in slide.encoder_keys:
            yield Problem(kind="missing", slide_id=slide.slide_id, encoder=encoder, what="no features yet")
            continue
        yield from _encoder_problems(store, slide, encoder)


def _encoder_problems(store: FeatureStore, slide: StoredSlide, encoder: str) -> Iterator[Problem]:
    """What is wrong with one encoder's features of one slide."""
    facts = slide.feature_facts(encoder)
    known = store.encoders.get(encoder)
    digest, has_hashes = (known.digest, not known.imported) if known else (None, True)

    problem = partial(Problem, slide_id=slide.slide_id, encoder=encoder)
    if facts.digest and facts.digest != digest:
        what = f"written by an encoder of digest {facts.digest[:12]}, the store lists {str(digest)[:12]}"
        yield problem(kind="damaged", what=what)
    try:
        shape = slide.features_array(encoder).shape
    except (StoreCorruptError, StoreUnreadError) as error:
        yield problem(kind=_kind_of(error), what=str(error))
        return
    if shape[0] != len(slide):
        what = f"{shape[0]} rows of features, but the slide has {len(slide)} patches"
        yield problem(kind="damaged", what=what)
        return
    for view in range(facts.n_views):
        yield from _view_problems(store, slide, encoder, view, has_hashes=has_hashes)


def _view_problems(
    store: FeatureStore, slide: StoredSlide, encoder: str, view: int, *, has_hashes: bool
) -> Iterator[Problem]:
    """What is wrong with one view of one encoder's features of one slide."""
    problem = partial(Problem, slide_id=slide.slide_id, encoder=encoder)
    records, shards = slide.feature_facts(encoder).shards, slide.shards([view])
    recorded = [s for s in shards if s.name in records]
    hollow = [s for s in recorded if _is_spool(store) and is_hollow(slide.shard_path(encoder, s))]
    for count, what in (
        (len(shards) - len(recorded), "not written yet"),
        (len(hollow), "only at the address that they were sent to"),
    ):
        if count:
            yield problem(kind="missing", what=f"view {view}: {count} of {len(shards)} shards are {what}")
    good, hashes = slide.patch_status == schema.STATUS["ok"], slide.pixel_hash
    for shard in (s for s in recorded if s not in hollow):
        rows = slice(shard.start, shard.stop)
        seen = hashes[rows, view] if has_hashes else np.ones(rows.stop - rows.start, np.uint64)
        try:
            what = _shard_damage(slide, encoder, shard, records[shard.name], good[rows], seen)
        except StoreUnreadError as error:
            yield problem(kind="unread", what=str(error))
            continue
        if what:
            path = below(slide.shard_path(encoder, shard), store.path)
            place = f"view {view}, rows {rows.start} to {rows.stop}"
            yield problem(kind="damaged", shard=shard, what=f"{place}: {what}. The file is {path}; {ADVICE}")


def _is_spool(store: FeatureStore) -> bool:
    return isinstance(store.path, Path) and (store.path / MARK).exists()


def _kind_of(error: StoreError) -> Literal["damaged", "unread"]:
    return "unread" if isinstance(error, StoreUnreadError) else "damaged"


def _shard_damage(
    slide: StoredSlide,
    encoder: str,
    shard: Shard,
    record: ShardRecord,
    good: Bool[np.ndarray, " row"],
    hashes: UInt64[np.ndarray, " row"],
) -> str:
    """What is wrong with a recorded shard, for people; empty where nothing is."""
    if not slide.has_file(encoder, shard, record):
        return "its file is absent, empty or of another size than was written"
    try:
        features = slide.read_unproven_rows(encoder, shard.start, shard.stop, view=shard.view)
    except StoreCorruptError as error:
        return f"its file cannot be read ({error.__cause__})"
    damage = slide.shard_damage(encoder, shard, features)
    if damage:
        return damage
    if not np.isfinite(features[good]).all():
        return "features of readable patches are not finite"
    return "" if hashes[good].all() else "pixel hashes of its patches are absent"


def repair(store: FeatureStore, problem: Problem) -> str:
    """Drop what a problem says is damaged, so that stage one computes it again and nothing else.

    Of a slide whose document is damaged, the copy in the catalogue is put back if it passes its checksum; the next
    `verify` compares the slide's arrays with it. Tables are the affair of those who can derive them, see
    `extraction.repair`.

    Args:
        store: Opened for writing, and locked by the caller.
        problem: What `verify` has found.

    Returns:
        What was done, for people; empty where nothing can be dropped.

    Raises:
        StoreError: The disk is full, or cannot be written to.
    """
    if problem.kind == "leftover":
        store.sweep()
        return "deleted"
    if problem.kind != "damaged" or problem.table:
        return ""
    if problem.shard is not None:
        store.slide(problem.slide_id).drop(problem.encoder, problem.shard)
        return "dropped; the caching command computes it again"
    if problem.encoder:
        store.slide(problem.slide_id).drop_encoder(problem.encoder)
        return f"all features of {problem.encoder} dropped; the caching command computes them again"
    if store.restore_document(problem.slide_id):
        return f"its document was put back from {CATALOGUE}; verify again"
    store.remove_slide(problem.slide_id)
    return "the slide was removed; the caching command caches it anew"


def repair_all(store: FeatureStore, problems: list[Problem]) -> Iterator[tuple[Problem, str]]:
    """Repair one problem after another; yields each with what was done, or why it could not be."""
    for problem in problems:
        try:
            yield problem, repair(store, problem)
        except StoreError as error:
            yield problem, f"not repaired: {error}"

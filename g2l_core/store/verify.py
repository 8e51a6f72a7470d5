"""Check a store: every recorded shard is read again and compared with its completion record."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, UInt64
from numcodecs.checksum32 import CRC32C

from g2l_core.errors import StoreCorruptError
from g2l_core.store import schema
from g2l_core.store.facts import ShardRecord
from g2l_core.store.features import FeatureStore, Shard, StoredSlide

ADVICE = "delete that file and run the caching command again: it computes this shard alone"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong, or not there yet."""

    kind: Literal["damaged", "missing", "failed", "leftover"]
    """damaged: not what was written. missing: not written yet. failed: a slide that stage one could not use.
    leftover: a temporary file of a killed writer, without meaning."""
    slide_id: str = ""
    encoder: str = ""
    what: str
    """A sentence for people: what was found, where, and what to do."""

    def __str__(self) -> str:
        place = " ".join(filter(None, [self.slide_id and f"slide {self.slide_id}", self.encoder]))
        return f"{self.kind:8} {f'{place}: ' if place else ''}{self.what}"


def verify(store: FeatureStore) -> Iterator[Problem]:
    """Yield whatever is damaged, missing, failed or left over in a store. Reads every feature once.

    Args:
        store: Opened for reading is enough; nothing is changed.
    """
    for path in leftovers(store):
        yield Problem(kind="leftover", what=f"{path.relative_to(store.path)} of a killed writer; it may be deleted")
    for slide_id, reason in store.failed_slides().items():
        yield Problem(kind="failed", slide_id=slide_id, what=reason)
    for slide in store.slides():
        tables = list(_verify_tables(slide))
        yield from tables
        if not tables:
            yield from _verify_features(store, slide)


def leftovers(store: FeatureStore) -> list[Path]:
    """The temporary files of killed writers, sorted. Those of a writer at work are among them."""
    return sorted(store.path.rglob(f"*{schema.LEFTOVER}"))


def _verify_tables(slide: StoredSlide) -> Iterator[Problem]:
    """Check that the arrays other than the features are readable and of one length."""
    n, v = len(slide), slide.n_views
    min_shapes: dict[str, tuple[int, ...]] = {
        "coords": (n, 2), "patch_status": (n,), "view_params": (n, v), "pixel_hash": (n, v)
    }  # fmt: skip
    if slide.facts.kind == "patches":
        min_shapes["patch_id"] = (n,)
    for name, min_shape in min_shapes.items():
        try:
            shape = slide.read_table(name).shape
        except StoreCorruptError as error:
            yield Problem(kind="damaged", slide_id=slide.slide_id, what=str(error))
            continue
        is_short = any(size < wanted for size, wanted in zip(shape, min_shape, strict=False))
        if len(shape) < len(min_shape) or shape[0] != n or is_short:
            text = f"{name} has shape {shape}, but the slide has {n} patches and {v} views. Cache it into a new store"
            yield Problem(kind="damaged", slide_id=slide.slide_id, what=text)


def _verify_features(store: FeatureStore, slide: StoredSlide) -> Iterator[Problem]:
    for encoder in sorted({*store.encoders, *slide.encoder_keys}):
        if encoder not in slide.encoder_keys:
            yield Problem(kind="missing", slide_id=slide.slide_id, encoder=encoder, what="no features yet")
            continue
        for kind, what in _encoder_problems(store, slide, encoder):
            yield Problem(kind=kind, slide_id=slide.slide_id, encoder=encoder, what=what)


def _encoder_problems(
    store: FeatureStore, slide: StoredSlide, encoder: str
) -> Iterator[tuple[Literal["damaged", "missing"], str]]:
    """Yield (kind, what) for one encoder's features of one slide."""
    array, facts = slide.features_array(encoder), slide.feature_facts(encoder)
    digest = store.encoders[encoder].digest if encoder in store.encoders else None
    if facts.digest and facts.digest != digest:
        yield "damaged", f"written by an encoder of digest {facts.digest[:12]}, the store lists {str(digest)[:12]}"
    if array.shape[0] != len(slide):
        yield "damaged", f"{array.shape[0]} rows of features, but the slide has {len(slide)} patches"
        return
    good, hashes = slide.patch_status == schema.STATUS["ok"], slide.pixel_hash
    for view in range(array.shape[1]):
        shards = slide.shards([view])
        recorded = [s for s in shards if s.name in facts.shards]
        if len(recorded) < len(shards):
            yield "missing", f"view {view}: {len(shards) - len(recorded)} of {len(shards)} shards are not written yet"
        for shard in recorded:
            rows = slice(shard.start, shard.stop)
            what = _shard_damage(slide, encoder, shard, facts.shards[shard.name], good[rows], hashes[rows, view])
            if what:
                path = slide.shard_path(encoder, shard).relative_to(store.path)
                yield "damaged", f"view {view}, rows {rows.start} to {rows.stop}: {what}. The file is {path}; {ADVICE}"


def _shard_damage(
    slide: StoredSlide,
    encoder: str,
    shard: Shard,
    record: ShardRecord,
    good: Bool[np.ndarray, " row"],
    hashes: UInt64[np.ndarray, " row"],
) -> str | None:
    """What is wrong with a recorded shard, for people; None where nothing is."""
    if not slide.has_file(encoder, shard, record):
        return "its file is absent or empty"
    try:
        features = slide.read_rows(encoder, shard.start, shard.stop, view=shard.view)
    except StoreCorruptError as error:
        return f"its file cannot be read ({error.__cause__})"
    checksum = int(CRC32C.checksum(np.ascontiguousarray(features)))
    if (len(features), checksum) != (record.rows, record.crc32c):
        return f"{len(features)} rows of crc32c {checksum:08x}, recorded {record.rows} of {record.crc32c:08x}"
    if not np.isfinite(features[good]).all():
        return "features of readable patches are not finite"
    return None if hashes[good].all() else "pixel hashes of its patches are absent"

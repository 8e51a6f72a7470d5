"""Behind `g2l store compact` and `g2l store pack`: smaller copies for archives, and quick copies for random access."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from g2l_core.api.archive import Archive, packed_bytes, require_exact
from g2l_core.api.copies import Copied, Kept, write_store
from g2l_core.api.packs import Packed, write_pack
from g2l_core.api.selection import Selection
from g2l_core.errors import StoreMissingError
from g2l_core.store.features import FeatureStore

Report = Callable[[int, int], None]

TRIED_SHARDS = 3
"""Shards of each encoder on which --dry-run measures."""


@dataclass(frozen=True, kw_only=True)
class Compacted:
    """What a store came to when it was compacted, or would."""

    copied: Copied
    bits: int
    """Bits of the mantissa that are kept."""
    bytes: int
    """Of the features on disk; of --dry-run, estimated."""
    errors: Mapping[str, Mapping[str, float]]
    """By encoder: the largest and mean relative error, the least and mean cosine."""
    words: Mapping[str, str]
    """The same for people."""

    @property
    def ratio(self) -> float:
        """How many times smaller the features are."""
        return self.copied.feature_bytes / max(self.bytes, 1)


def compact_store(
    path: Path, out: Path, encoders: Sequence[str], bits: int, *, dry_run: bool, report: Report
) -> Compacted:
    """Write a copy of a store whose features are rounded and packed.

    Args:
        path: The store.
        out: The new store, which must not be there.
        encoders: Encoders to keep; empty is all.
        bits: Bits of the mantissa that are kept, of 10.
        dry_run: Measure on a few shards, and write nothing.
        report: Is told how many slides are written, and of how many.

    Raises:
        StoreError: There is something at `out`, it cannot be written, or features are compacted already.
        StoreMissingError: There are no features.
        UsageError: There are no such bits.
        UnknownNameError: There is no such encoder.
    """
    selection = Selection(store=FeatureStore.open(path))
    archive = Archive(bits=bits)
    keys = frozenset(map(selection.encoder, encoders)) or None
    kept = Kept(encoders=keys, archive=archive, report=report)
    copied = write_store([selection], out, kept, dry_run=True)
    if not copied.feature_bytes:
        raise StoreMissingError(f"{path} has no features to compact")
    require_exact(copied.encoders)
    if dry_run:
        size = _estimate(selection, copied, archive)
    else:
        write_store([selection], out, kept)
        size = features_on_disk(FeatureStore.open(out))
    found = {key: archive.errors[key] for key in copied.encoders}
    return Compacted(
        copied=copied,
        bits=bits,
        bytes=size,
        errors={key: errors.to_json() for key, errors in found.items()},
        words={key: str(errors) for key, errors in found.items()},
    )


def _estimate(selection: Selection, copied: Copied, archive: Archive) -> int:
    """The bytes of all features when packed, from the first shards of each encoder."""
    before = after = 0
    for key in copied.encoders:
        slides = (slide for slide in selection.store.slides() if key in slide.facts.features)
        shards = ((slide, shard) for slide in slides for shard in slide.shards([0]) if shard.name in slide.records(key))
        for slide, shard in islice(shards, TRIED_SHARDS):
            features = slide.read_rows(key, shard.start, shard.stop, view=0)
            before, after = before + features.nbytes, after + packed_bytes(archive.rounded(key, features))
    return round(copied.feature_bytes * after / max(before, 1))


def features_on_disk(store: FeatureStore) -> int:
    """The bytes of the files of all features."""
    records = (facts.shards.values() for slide in store.slides() for facts in slide.facts.features.values())
    return sum(record.size or 0 for of_slide in records for record in of_slide)


def pack_store(path: Path, encoders: Sequence[str], view: int, *, dry_run: bool, report: Report) -> dict[str, Packed]:
    """Pack one view of encoders of a store, all of them if none is named, one file each.

    Raises:
        StoreMissingError: There are no such features.
        StoreError: The store cannot be written, or another command writes into it.
        UnknownNameError: There is no such encoder.
    """
    selection = Selection(store=FeatureStore.open(path))
    store = selection.store
    keys = dict.fromkeys(map(selection.encoder, encoders)) or store.encoders
    if not keys:
        raise StoreMissingError(f"{path} has no features of any encoder yet")
    store.require_undamaged()
    slides = list(store.slides())
    return {
        key: write_pack(path, slides, key, store.encoders[key].dim, view=view, dry_run=dry_run, report=report)
        for key in keys
    }

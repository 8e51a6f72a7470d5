"""One slide of a store: its tables, its features, and which of their shards are complete.

A shard is `SHARD_ROWS` rows of one view: one file, one writer. It counts only once its completion record (row
count, checksum, failed patches) is in the features array's attributes, which are replaced atomically after the
shard's file is. What is recorded is never recomputed; what is not recorded is.
"""

import errno
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from g2l_core.errors import StoreCorruptError, StoreError, StoreMissingError, UnknownNameError
from g2l_core.store import schema
from g2l_core.store.facts import OK, FeatureFacts, ShardRecord, SlideFacts
from g2l_core.types import Coords, Features, PatchStatus, PixelHash, ViewParams


@dataclass(frozen=True, order=True)
class Shard:
    """One unit of writing: rows [start, stop) of one view."""

    start: int
    stop: int
    view: int

    @property
    def name(self) -> str:
        """Its key in the completion records: row block and view."""
        return f"{self.start // schema.SHARD_ROWS}.{self.view}"


KEPT_REASONS = 100
"""How many unreadable patches of a slide keep their reason in words; the others have only their code."""


class StoredSlide:
    """One slide of a store.

    Attributes:
        slide_id: Its id, with its folders.
        facts: What stage one wrote about it.
    """

    def __init__(self, slide_id: str, group: zarr.Group, folder: Path) -> None:
        self.slide_id = slide_id
        self.facts = SlideFacts.from_json(group.attrs[schema.ATTRIBUTE])
        self._group, self._folder = group, folder

    @property
    def has_patches(self) -> bool:
        """Whether it has patches."""
        return self.facts.status == OK

    def __len__(self) -> int:
        return self.facts.n_patches

    @property
    def labels(self) -> dict[str, str]:
        """patient_id, medical_center and whatever else the manifest gave for the whole slide."""
        return dict(self.facts.labels)

    @property
    def coords(self) -> Coords:
        """int32 (n, 2): x, y of the top-left corners in level-0 pixels; zeros for patch images."""
        return self.read_table("coords")

    @property
    def patch_status(self) -> PatchStatus:
        """uint8 (n,): 0 where the patch is good, else a reason code."""
        return self.read_table("patch_status")

    @property
    def view_params(self) -> ViewParams:
        """float32 (n, views, parameters)."""
        return self.read_table("view_params")

    @property
    def pixel_hash(self) -> PixelHash:
        """uint64 (n, views): xxh3-64 of each view's pixels, 0 where not rendered yet."""
        return self.read_table("pixel_hash")

    @property
    def patch_ids(self) -> list[str] | None:
        """File names of patch images in stored order; None for a slide."""
        return [str(name) for name in self.read_table("patch_id")] if "patch_id" in self._group else None

    @property
    def n_views(self) -> int:
        """Views whose parameters are stored, the canonical one included."""
        return self.facts.n_views

    def read_table(self, name: str) -> Any:
        """A whole array other than the features, by its name in the store. Checksums are checked.

        Raises:
            StoreCorruptError: It is not what was written.
        """
        with _reading(f"slide {self.slide_id}: {name}"):
            return self.array(name)[:]

    def set_labels(self, labels: Mapping[str, str]) -> None:
        """Replace the labels of the slide."""
        self._set_facts(labels=dict(labels))

    def set_source(self, path: Path, fingerprint: str) -> None:
        """Replace the file that the slide is read from."""
        self._set_facts(source=str(path.resolve()), fingerprint=fingerprint)

    @property
    def unreadable(self) -> dict[int, str]:
        """Why each unreadable patch could not be read, by row; reasons beyond the first `KEPT_REASONS` are not kept."""
        rows = np.flatnonzero(self.patch_status == schema.STATUS["unreadable"]).tolist()
        kept = self.facts.unreadable
        return {row: kept.get(str(row), f"row {row}: reason not kept") for row in rows}

    def note_losses(self, reasons: Mapping[int, str]) -> None:
        """Keep why patches could not be read, by row."""
        kept = {**self.facts.unreadable, **{str(row): reason for row, reason in reasons.items()}}
        self._set_facts(unreadable=dict(list(kept.items())[-KEPT_REASONS:]))

    def forget(self, start: int) -> None:
        """Drop the completion records of all encoders and views of the shard that begins at row `start`.

        When patches that were unreadable can be read, everything that holds NaN for them has to be computed again.
        """
        block = str(start // schema.SHARD_ROWS)
        for encoder in self.encoder_keys:
            facts = self.feature_facts(encoder)
            kept = {name: record for name, record in facts.shards.items() if name.partition(".")[0] != block}
            self.set_feature_facts(encoder, replace(facts, shards=kept, complete=False))

    def extend_views(self, view_params: ViewParams) -> None:
        """Add the parameters of further views after the stored ones. They count once `n_views` says so."""
        params, hashes = self.array("view_params"), self.array("pixel_hash")
        n_views = self.n_views + view_params.shape[1]
        with writing(f"views of slide {self.slide_id}"):
            hashes.resize((len(self), n_views))
            params.resize((len(self), n_views, params.shape[2]))
            params[:, self.n_views :] = view_params
        self._set_facts(n_views=n_views)

    def _set_facts(self, **changes: Any) -> None:
        """Replace some facts, in the store first."""
        facts = replace(self.facts, **changes)
        with writing(f"slide {self.slide_id}"):
            self._group.attrs[schema.ATTRIBUTE] = facts.to_json()
        self.facts = facts

    def array(self, path: str) -> zarr.Array:
        """A Zarr array of the slide by its path below the slide's group, such as `coords`; nothing is checked."""
        return self._group[path]

    def new_features(self, encoder: str, *, n_views: int, dim: int) -> zarr.Array:
        """Make the array of an encoder that has none here, float16 (n, n_views, dim)."""
        schema.create_features(self._group, encoder, len(self), n_views, dim)
        return self.array(f"features/{encoder}")

    @property
    def encoder_keys(self) -> list[str]:
        """Keys of the encoders that have features of this slide, whole or not."""
        folder = self._folder / "features"
        return sorted(members(folder)) if folder.is_dir() else []

    def features_array(self, encoder: str) -> zarr.Array:
        """The Zarr array of an encoder, float16 (n, views, dim), whatever has been written of it.

        Raises:
            UnknownNameError: That encoder has none here.
        """
        if encoder not in self.encoder_keys:
            raise UnknownNameError("encoder", encoder, self.encoder_keys, f"Asked of slide {self.slide_id}.")
        return self.array(f"features/{encoder}")

    def features(self, encoder: str, *, view: int = 0) -> Features:
        """The features of one view, float16 (n, dim), in stored order; NaN rows where patch_status is not 0.

        Raises:
            UnknownNameError: The encoder has no features of this slide.
            StoreMissingError: They are not complete.
            StoreCorruptError: They are not what was written.
        """
        self.require_complete(encoder, view)
        return self.read_rows(encoder, 0, len(self), view=view)

    def read_rows(self, encoder: str, start: int, stop: int, *, view: int) -> Features:
        """The features of rows [start, stop) of one view as they stand, float16 (rows, dim), checksums checked.

        Raises:
            UnknownNameError: The encoder has no features of this slide.
            StoreCorruptError: They are not what was written.
        """
        array = self.features_array(encoder)
        with _reading(f"slide {self.slide_id}: rows {start} to {stop} of {encoder}, view {view},"):
            return np.asarray(array[start:stop, view])

    def require_complete(self, encoder: str, view: int) -> None:
        """Refuse a view whose shards are not all recorded.

        Raises:
            UnknownNameError: The encoder has no features of this slide.
            StoreMissingError: Some are not. The message names the slide, the encoder and the view.
        """
        self.features_array(encoder)
        records = self.records(encoder)
        missing = [s for s in self.shards([view]) if s.name not in records]
        if missing:
            raise StoreMissingError(
                f"slide {self.slide_id}: view {view} of {encoder} is not complete "
                f"({len(missing)} of {len(self.shards([view]))} shards missing). "
                "Run the command that caches it again"
            )

    def shards(self, views: Sequence[int]) -> list[Shard]:
        """All shards of the given views, rows first."""
        starts = range(0, len(self), schema.SHARD_ROWS)
        return [Shard(a, min(a + schema.SHARD_ROWS, len(self)), v) for a in starts for v in views]

    def records(self, encoder: str) -> dict[str, ShardRecord]:
        """The completion records of an encoder's shards whose file is there, by shard name; empty where it has none.

        So a damaged file is repaired by deleting it and running the caching command again.
        """
        if encoder not in self.encoder_keys:
            return {}
        kept = self.feature_facts(encoder).shards
        shards = [s for s in self.shards(range(self.features_array(encoder).shape[1])) if s.name in kept]
        return {s.name: kept[s.name] for s in shards if self.has_file(encoder, s, kept[s.name])}

    def feature_facts(self, encoder: str) -> FeatureFacts:
        """The digest of an encoder's features and all their completion records, whatever became of the files.

        Raises:
            UnknownNameError: That encoder has none here.
        """
        return FeatureFacts.from_json(self.features_array(encoder).attrs.get(schema.ATTRIBUTE, {}))

    def set_feature_facts(self, encoder: str, facts: FeatureFacts) -> None:
        """Replace the digest and the completion records of an encoder's features.

        Raises:
            StoreError: The disk is full, or cannot be written to.
        """
        with writing(f"features of slide {self.slide_id}"):
            self.features_array(encoder).attrs[schema.ATTRIBUTE] = facts.to_json()

    def shard_path(self, encoder: str, shard: Shard) -> Path:
        """The file of a shard."""
        block = shard.start // schema.SHARD_ROWS
        return self._folder / "features" / encoder / "c" / str(block) / str(shard.view) / "0"

    def has_file(self, encoder: str, shard: Shard, record: ShardRecord) -> bool:
        """Whether a recorded shard's file is there; Zarr writes none where no patch was readable: all is fill value."""
        path = self.shard_path(encoder, shard)
        return record.failed == record.rows or (path.is_file() and path.stat().st_size > 0)


def members(folder: Path) -> list[str]:
    """Names of the groups and arrays in a group's folder. Zarr's own listing warns about files of killed writers."""
    return [path.name for path in folder.iterdir() if (path / "zarr.json").is_file()]


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Translate the errors of Zarr's codecs and of the operating system about damaged files.

    Raises:
        StoreCorruptError: The block raised one of them.
    """
    try:
        yield
    except (ValueError, RuntimeError, KeyError, OSError) as error:  # the checksum raises ValueError, zstd RuntimeError
        raise StoreCorruptError(f"{what} cannot be read: {error}. g2l store verify names the damaged files") from error


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Translate the errors of the operating system about a full disk, or one that cannot be written to.

    Raises:
        StoreError: The block raised one of them.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        raise StoreError(
            f"cannot write {what}: {error.strerror or error}; {'free space' if full else 'make the store writable'} "
            "and run the same command again: what is recorded is kept"
        ) from error

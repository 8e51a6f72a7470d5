"""One slide of a store: its tables, its features, and which of their shards are complete.

A shard is `SHARD_ROWS` rows of one view: one file, one writer. It counts once its completion record is in the slide's
facts, which are replaced after the shard's file is on the disk. Whatever is read is compared with recorded checksums.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from g2l_core.errors import StoreCorruptError, StoreError, StoreMissingError, UnknownNameError
from g2l_core.store import format1, schema
from g2l_core.store.boundary import reading, writing
from g2l_core.store.changes import dropped, merged, with_features, without
from g2l_core.store.documents import read_slide_again, write_group
from g2l_core.store.facts import OK, FeatureFacts, ShardRecord, SlideFacts
from g2l_core.store.location import Location, folder_of, size_of
from g2l_core.store.plain_shards import read_features
from g2l_core.store.provenance import canonical_json
from g2l_core.store.tables import Shard, block_checksums, block_name, changed_blocks, checksum, require_unchanged
from g2l_core.store.zarr_files import create_array, open_array
from g2l_core.types import Coords, Features, PatchStatus, PixelHash, ViewParams

KEPT_REASONS = 100
"""Unreadable patches of a slide that keep their reason in words; the others have only their code."""


class StoredSlide:
    """One slide of a store.

    Attributes:
        slide_id: Its id, with its folders.
        facts: What the store says about it.
        folder: Where it is.
    """

    def __init__(
        self, slide_id: str, facts: SlideFacts, folder: Location, *, store_format: int, writable: bool
    ) -> None:
        self.slide_id, self.facts, self.folder = slide_id, facts, folder
        self._format, self._writable = store_format, writable
        self._arrays: dict[str, zarr.Array] = {}

    def __repr__(self) -> str:
        return f"<StoredSlide {self.slide_id}: {len(self):,} patches, {', '.join(self.encoder_keys) or 'no features'}>"

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
        return [str(name) for name in self.read_table(schema.PATCH_ID)] if self.has_patch_ids else None

    @property
    def has_patch_ids(self) -> bool:
        """Whether it is a set of patch images, which have file names."""
        return self.facts.kind == "patches"

    @property
    def has_patch_labels(self) -> bool:
        """Whether its patch images have labels of their own."""
        return schema.PATCH_LABELS in self.facts.tables

    @property
    def patch_labels(self) -> list[Mapping[str, str]]:
        """What the manifest gives for each patch image alone, by column, in stored order; empty where nothing is."""
        if not self.has_patch_labels:
            return [{}] * len(self)
        known: dict[str, Mapping[str, str]] = {}
        texts = map(str, self.read_table(schema.PATCH_LABELS))
        with reading(f"slide {self.slide_id}: {schema.PATCH_LABELS}"):
            return [known[text] if text in known else known.setdefault(text, json.loads(text)) for text in texts]

    def set_patch_labels(self, labels: Sequence[Mapping[str, str]]) -> None:
        """Replace the labels of single patch images; values that are empty are left out.

        Args:
            labels: Those of each, by column, in stored order. If none has any, the table is dropped.

        Raises:
            StoreError: The disk is full, or cannot be written to.
        """
        name = schema.PATCH_LABELS
        kept = [{column: value for column, value in of_patch.items() if value} for of_patch in labels]
        values = np.array([canonical_json(of_patch) for of_patch in kept], dtype=object)
        if not any(kept) and self.has_patch_labels:
            self.forget_table(name)
        elif any(kept) and self.facts.tables.get(name) != block_checksums(values, False):
            self.put_column(name, values)

    def put_column(self, name: str, values: np.ndarray) -> None:
        """Make an array of one value a patch, in the place of one of that name, and record its checksums.

        Args:
            name: Its path below the slide's folder.
            values: (n,) numbers, truth values or, of dtype object, texts.

        Raises:
            StoreError: The disk is full, or cannot be written to.
        """
        dtype = str if values.dtype == object else values.dtype
        with writing(f"{name} of slide {self.slide_id}"):
            self.forget_table(name)
            self._arrays[name] = create_array(self.folder / name, schema.column_layout(len(self), dtype))
        self.put_table(name, values)

    @property
    def n_views(self) -> int:
        """Views whose parameters are stored, the canonical one included."""
        return self.facts.n_views

    def read_table(self, name: str) -> Any:
        """A whole array other than the features, by its name in the store. Checksums are compared.

        Raises:
            StoreCorruptError: It is not what was written.
        """
        return self.read_block(name, 0, len(self))

    def read_block(self, name: str, start: int, stop: int, *, view: int | None = None) -> Any:
        """Rows [start, stop) of an array other than the features: of one view, or of all.

        Args:
            name: Its name in the store.
            start: A multiple of `SHARD_ROWS`.
            stop: The end of a block.
            view: Which view; None reads all that are known, along the second axis.

        Raises:
            StoreCorruptError: It is not what was written.
        """
        views = slice(0, self.n_views) if view is None else slice(view, view + 1)
        has_views = name in schema.TABLES and schema.TABLES[name].has_views
        with reading(f"slide {self.slide_id}: {name}"):
            array = self.array(name)
            values = array[start:stop, views] if has_views else array[start:stop]
        self._require_shape(name, array.shape)
        if self._changed(name, values, start, views.start):
            self.reload()  # a writer may have replaced both since
            require_unchanged(self.slide_id, name, self._changed(name, values, start, views.start))
        return values[:, 0] if has_views and view is not None else values

    def _changed(self, name: str, values: np.ndarray, start: int, first_view: int) -> list[str]:
        return changed_blocks(name, values, self.facts.tables.get(name, {}), first_row=start, first_view=first_view)

    def _require_shape(self, name: str, shape: tuple[int, ...]) -> None:
        has_views = name in schema.TABLES and schema.TABLES[name].has_views
        if shape[:1] != (len(self),) or (has_views and (len(shape) < 2 or shape[1] < self.n_views)):
            raise StoreCorruptError(
                f"slide {self.slide_id}: {name} has shape {shape}, but the slide has {len(self)} patches and "
                f"{self.n_views} views. g2l store verify --repair mends or drops it"
            )

    def write_block(self, name: str, start: int, values: np.ndarray) -> dict[str, int]:
        """Write a block of an array without views. It counts once its checksum is among the facts.

        A recorded checksum is dropped first where the block changes: a kill then leaves a block that nobody vouches
        for, never one that looks damaged.

        Args:
            name: Its name in the store.
            start: First row, a multiple of `SHARD_ROWS`.
            values: Its rows.

        Returns:
            The block's checksum by its name, to be recorded; empty where it is recorded already.
        """
        new = self._to_write(name, {block_name(start): checksum(values)})
        if new:
            self.array(name)[start : start + len(values)] = values
        return new

    def write_views(self, name: str, start: int, values: np.ndarray, views: Sequence[int]) -> dict[str, int]:
        """As `write_block`, for some views of an array that has views; the first axis of the values is the view."""
        rows = slice(start, start + values.shape[1])
        found = {block_name(start, view): checksum(of_view) for view, of_view in zip(views, values, strict=True)}
        new = self._to_write(name, found)
        if new and list(views) == list(range(views[0], views[-1] + 1)):
            self.array(name)[rows, views[0] : views[-1] + 1] = values.T
        elif new:
            for view, of_view in zip(views, values, strict=True):
                self.array(name)[rows, view] = of_view
        return new

    def _to_write(self, name: str, checksums: Mapping[str, int]) -> dict[str, int]:
        """Those of some blocks that are not recorded as they are; what is recorded of them otherwise is dropped."""
        recorded = self.facts.tables.get(name, {})
        new = {block: crc for block, crc in checksums.items() if recorded.get(block) != crc}
        if any(block in recorded for block in new):
            self._update(lambda facts: replace(facts, tables=without(facts.tables, name, list(new))))
        return new

    def put_table(self, name: str, values: np.ndarray) -> None:
        """Replace a whole table, and record its checksums.

        Args:
            name: Its name in the store.
            values: All of it, for the views that are known.

        Raises:
            StoreError: The disk is full, or cannot be written to.
        """
        has_views = name in schema.TABLES and schema.TABLES[name].has_views
        with writing(f"{name} of slide {self.slide_id}"):
            self.forget_table(name)
            array = self.array(name)
            array[(slice(None), slice(0, self.n_views)) if has_views else slice(None)] = values
        new = {name: block_checksums(values, has_views)}
        self._update(lambda facts: replace(facts, tables=merged(facts.tables, new)))

    def forget_table(self, name: str) -> None:
        """Drop the checksums of a whole table, which then does not count."""
        self._update(lambda facts: replace(facts, tables={k: v for k, v in facts.tables.items() if k != name}))

    def extend_views(self, view_params: ViewParams) -> None:
        """Add the parameters of further views after the stored ones. They count once `n_views` says so."""
        known, n_views = self.n_views, self.n_views + view_params.shape[1]
        with writing(f"views of slide {self.slide_id}"):
            params, hashes = self.array("view_params"), self.array("pixel_hash")
            hashes.resize((len(self), n_views))
            params.resize((len(self), n_views, params.shape[2]))
            params[:, known:] = view_params
        new = {"view_params": block_checksums(view_params, True, first_view=known)}
        self._update(lambda facts: replace(facts, n_views=n_views, tables=merged(facts.tables, new)))

    def set_labels(self, labels: Mapping[str, str]) -> None:
        """Replace the labels of the slide."""
        self._update(lambda facts: replace(facts, labels=dict(labels)))

    def set_source(self, path: Path, fingerprint: str, file_state: tuple[int, int] | None = None, **scale: Any) -> None:
        """Replace the file that the slide is read from, and of its scale what was not known before, by field."""
        known: dict[str, Any] = {"source": str(path.resolve()), "fingerprint": fingerprint, "file_state": file_state}
        self._update(lambda facts: replace(facts, **known, **scale))

    @property
    def unreadable(self) -> dict[int, str]:
        """Why each unreadable patch could not be read, by row; reasons beyond the first `KEPT_REASONS` are not kept."""
        rows = np.flatnonzero(self.patch_status == schema.STATUS["unreadable"]).tolist()
        kept = self.facts.unreadable
        return {row: kept.get(str(row), f"row {row}: reason not kept") for row in rows}

    def note_losses(self, reasons: Mapping[int, str]) -> None:
        """Keep why patches could not be read, by row."""
        new = {str(row): reason for row, reason in reasons.items()}

        def noted(facts: SlideFacts) -> SlideFacts:
            return replace(facts, unreadable=dict(list({**facts.unreadable, **new}.items())[-KEPT_REASONS:]))

        self._update(noted)

    def add_note(self, text: str) -> None:
        """Keep what is not as expected about the slide, once."""
        if text not in self.facts.notes:
            self._update(lambda facts: replace(facts, notes=(*facts.notes, text)))

    def forget(self, start: int) -> None:
        """Drop the completion records of all encoders and views of the shard that begins at row `start`.

        When patches that were unreadable can be read, everything that holds NaN for them has to be computed again.
        """
        names = {shard.name for shard in self.shards(range(self.n_views)) if shard.start == start}
        self._update(lambda facts: replace(facts, features={k: dropped(f, names) for k, f in facts.features.items()}))

    def drop(self, encoder: str, shard: Shard) -> None:
        """Drop a shard: its completion record, then its file. Stage one will compute it again."""

        def shrunk(facts: SlideFacts) -> SlideFacts:
            return with_features(facts, encoder, dropped(facts.features[encoder], {shard.name}))

        self._update(shrunk)
        folder_of(self.shard_path(encoder, shard)).unlink(missing_ok=True)

    def drop_encoder(self, encoder: str) -> None:
        """Drop all features of an encoder: their facts, then their files."""

        def shrunk(facts: SlideFacts) -> SlideFacts:
            return replace(facts, features={key: kept for key, kept in facts.features.items() if key != encoder})

        self._update(shrunk)
        self._arrays.pop(f"{schema.FEATURES}/{encoder}", None)
        shutil.rmtree(folder_of(self.folder) / schema.FEATURES / encoder, ignore_errors=True)

    def record(self, encoder: str, records: Mapping[str, ShardRecord], tables: Mapping[str, Mapping[str, int]]) -> None:
        """Let shards count, by their names, and the blocks of tables that were written with them."""

        def recorded(facts: SlideFacts) -> SlideFacts:
            of_encoder = facts.features[encoder]
            shards = {**of_encoder.shards, **records}
            is_complete = len(shards) == len(self.shards([0])) * of_encoder.n_views
            facts = replace(facts, tables=merged(facts.tables, tables))
            return with_features(facts, encoder, replace(of_encoder, shards=shards, complete=is_complete))

        self._update(recorded)

    def put_records(self, encoder: str, of_encoder: FeatureFacts) -> None:
        """Replace all completion records of an encoder, whose files are there."""
        self._update(lambda facts: with_features(facts, encoder, of_encoder))

    def _update(self, change: Callable[[SlideFacts], SlideFacts]) -> None:
        """Change the facts, in the store first, from what stands there now: another object may have changed them."""
        format1.refuse_writing(self._format, self.folder)
        if not self._writable:
            raise StoreError(f"slide {self.slide_id} was opened for reading only")
        with writing(f"slide {self.slide_id}"):
            self.reload()
            facts = change(self.facts)
            write_group(self.folder, facts.to_json())
        self.facts = facts

    def reload(self) -> None:
        """Read the facts as they stand now. Raises StoreCorruptError as `documents.read_slide_again`."""
        self.facts = read_slide_again(self.folder, self.facts, self.slide_id, self._format)

    def array(self, path: str) -> zarr.Array:
        """A Zarr array of the slide by its path below the slide's folder, such as `coords`; no content is checked."""
        if path not in self._arrays:
            self._arrays[path] = open_array(self.folder / path)
        return self._arrays[path]

    def require_features(self, encoder: str, *, digest: str, n_views: int, dim: int) -> None:
        """Make the array of an encoder, float16 (n, n_views, dim), or give the one there room for so many views."""
        path, known = f"{schema.FEATURES}/{encoder}", self.facts.features.get(encoder)
        if known is not None and known.n_views >= n_views:
            return
        with writing(f"features of slide {self.slide_id}"):
            if known is None:
                write_group(self.folder / schema.FEATURES)
                layout = schema.features_layout(len(self), n_views, dim)
                self._arrays[path] = create_array(self.folder / path, layout)
            else:
                self.array(path).resize((len(self), n_views, dim))
        facts = replace(known or FeatureFacts(encoder=encoder, digest=digest, dim=dim), n_views=n_views, complete=False)
        self._update(lambda slide: with_features(slide, encoder, facts))

    @property
    def encoder_keys(self) -> list[str]:
        """Keys of the encoders that have features of this slide, whole or not."""
        return sorted(self.facts.features)

    def feature_facts(self, encoder: str) -> FeatureFacts:
        """The digest of an encoder's features and all their completion records, whatever became of the files.

        Raises:
            UnknownNameError: That encoder has none here.
        """
        if encoder not in self.facts.features:
            raise UnknownNameError("encoder", encoder, self.encoder_keys, f"Asked of slide {self.slide_id}.")
        return self.facts.features[encoder]

    def features_array(self, encoder: str) -> zarr.Array:
        """The Zarr array of an encoder, float16 (n, views, dim), whatever has been written of it.

        Raises:
            UnknownNameError: That encoder has none here.
            StoreCorruptError: It cannot be opened.
        """
        self.feature_facts(encoder)
        with reading(f"slide {self.slide_id}: the array of {encoder}"):
            return self.array(f"{schema.FEATURES}/{encoder}")

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
        """The features of rows [start, stop) of one view as they stand, float16 (rows, dim).

        The checksum of every chunk is compared, and that of every recorded shard that lies in these rows as a whole.

        Raises:
            UnknownNameError: The encoder has no features of this slide.
            StoreCorruptError: They are not what was written.
        """
        features = self.read_unproven_rows(encoder, start, stop, view=view)
        whole = [s for s in self.shards([view]) if start <= s.start and s.stop <= stop]
        for shard in whole:
            rows = features[shard.start - start : shard.stop - start]
            damage = self.shard_damage(encoder, shard, rows)
            if damage:
                raise StoreCorruptError(
                    f"slide {self.slide_id}: {encoder}, view {view}, rows {shard.start} to {shard.stop}: {damage}. "
                    f"The file is {self.shard_path(encoder, shard)}. g2l store verify --repair drops it, and the "
                    "caching command computes it again"
                )
        return features

    def read_unproven_rows(self, encoder: str, start: int, stop: int, *, view: int) -> Features:
        """As `read_rows`, but nothing is compared with completion records.

        Raises:
            UnknownNameError: The encoder has no features of this slide.
            StoreCorruptError: A chunk cannot be read.
        """
        array, what = self.features_array(encoder), f"rows {start} to {stop} of {encoder}, view {view},"
        with reading(f"slide {self.slide_id}: {what}"):
            return read_features(array, self.folder / schema.FEATURES / encoder, start, stop, view)

    def shard_damage(self, encoder: str, shard: Shard, features: Features) -> str:
        """How the features of a shard differ from its completion record; empty where they do not, or have none."""
        record = self.feature_facts(encoder).shards.get(shard.name)
        found = checksum(features)
        if record is not None and (len(features), found) != (record.rows, record.crc32c):
            self.reload()  # a writer may have replaced both since
            record = self.feature_facts(encoder).shards.get(shard.name)
        if record is None or (len(features), found) == (record.rows, record.crc32c):
            return ""
        return f"{len(features)} rows of crc32c {found:08x}, recorded {record.rows} of {record.crc32c:08x}"

    def require_complete(self, encoder: str, view: int) -> None:
        """Refuse a view whose shards are not all recorded.

        Raises:
            UnknownNameError: The encoder has no features of this slide.
            StoreMissingError: Some are not. The message names the slide, the encoder and the view.
        """
        self.feature_facts(encoder)
        shards, records = self.shards([view]), self.records(encoder, [view])
        missing = [s for s in shards if s.name not in records]
        if missing:
            raise StoreMissingError(
                f"slide {self.slide_id}: view {view} of {encoder} is not complete "
                f"({len(missing)} of {len(shards)} shards missing). Run the command that caches it again"
            )

    def shards(self, views: Sequence[int]) -> list[Shard]:
        """All shards of the given views, rows first."""
        starts = range(0, len(self), schema.SHARD_ROWS)
        return [Shard(a, min(a + schema.SHARD_ROWS, len(self)), v) for a in starts for v in views]

    def records(self, encoder: str, views: Sequence[int] | None = None) -> dict[str, ShardRecord]:
        """The completion records of an encoder's shards whose file is there, by shard name; empty where it has none.

        A file of another size than the recorded one does not count, so a shard that was cut short is computed again.

        Args:
            encoder: Key of the encoder.
            views: Of which views; None is all.
        """
        facts = self.facts.features.get(encoder)
        if facts is None:
            return {}
        shards = [s for s in self.shards(range(facts.n_views) if views is None else views) if s.name in facts.shards]
        return {s.name: facts.shards[s.name] for s in shards if self.has_file(encoder, s, facts.shards[s.name])}

    def shard_path(self, encoder: str, shard: Shard) -> Location:
        """The file of a shard."""
        folder, block = self.folder / schema.FEATURES / encoder, shard.start // schema.SHARD_ROWS
        if self._format == format1.FORMAT:
            return format1.shard_path(folder_of(folder), block, shard.view)
        return folder / f"c.{block}.{shard.view}.0"

    def has_file(self, encoder: str, shard: Shard, record: ShardRecord) -> bool:
        """Whether a recorded shard's file is there, or nobody can list what is: over HTTP, reading tells."""
        # Zarr writes none where no patch was readable: all is fill value.
        size = None if record.failed == record.rows else size_of(self.shard_path(encoder, shard))
        return size is None or (size > 0 and record.size in {None, size})

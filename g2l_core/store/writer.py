"""Write features into a store, shard by shard, each with its completion record."""

import warnings
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float16, Float32, UInt8, UInt64

from g2l_core.errors import EncoderError, StoreMismatchError
from g2l_core.store import schema
from g2l_core.store.facts import ShardRecord
from g2l_core.store.slide import Shard, StoredSlide, writing
from g2l_core.store.tables import checksum
from g2l_core.types import Features, PatchStatus


class FeatureWriter:
    """Writes one encoder's features of one slide. One writer at a time."""

    def __init__(self, slide: StoredSlide, encoder: str) -> None:
        self.slide_id = slide.slide_id
        self._slide = slide
        self._encoder = encoder

    @classmethod
    def open(cls, slide: StoredSlide, encoder: str, *, digest: str, dim: int, n_views: int) -> "FeatureWriter":
        """A writer for an encoder's features of a slide; its array is made or widened as needed.

        Args:
            slide: The slide.
            encoder: Key of the encoder.
            digest: Digest of the encoder, kept with the features.
            dim: Width of a feature.
            n_views: Number of views that the array must hold, the canonical one included.

        Raises:
            StoreError: The disk is full, or cannot be written to.
        """
        slide.require_features(encoder, digest=digest, n_views=n_views, dim=dim)
        return cls(slide, encoder)

    def missing(self, views: Sequence[int]) -> list[Shard]:
        """The shards of these views that have no completion record, in the order of their rows."""
        records = self._slide.records(self._encoder, views)
        return [s for s in self._slide.shards(views) if s.name not in records]

    def write(
        self,
        shard: Shard,
        features: Float32[np.ndarray, "rows dim"] | Float16[np.ndarray, "rows dim"],
        hashes: UInt64[np.ndarray, " rows"],
        status: UInt8[np.ndarray, " rows"],
    ) -> None:
        """Write one shard, then its completion record. Arguments and errors as for `write_views`."""
        self.write_views([shard], features[None], hashes[None], status)

    def write_views(
        self,
        shards: Sequence[Shard],
        features: Float32[np.ndarray, "view rows dim"] | Float16[np.ndarray, "view rows dim"],
        hashes: UInt64[np.ndarray, "view rows"],
        status: UInt8[np.ndarray, " rows"],
    ) -> None:
        """Write the shards of some rows in several views, then their completion records, all at once.

        Args:
            shards: Which rows and views; the rows are the same in all.
            features: Their features; NaN in rows whose status is not 0.
            hashes: Pixel hash of each row's view.
            status: Reason code of each row.

        Raises:
            EncoderError: A good patch has features that float16 cannot hold: NaN, infinite or too large.
            StoreMismatchError: The pixels are not those that another encoder was given.
            StoreError: The disk is full, or cannot be written to.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # overflow becomes infinity, refused below
            stored = np.ascontiguousarray(features, dtype=np.float16)
        for shard, of_view in zip(shards, stored, strict=True):
            self._require_finite(shard, of_view, status)
        known = np.stack([self._known_hashes(s, h, status) for s, h in zip(shards, hashes, strict=True)])
        rows = slice(shards[0].start, shards[0].stop)
        with writing(f"features of slide {self.slide_id}"):
            tables = {
                "pixel_hash": self._slide.write_views("pixel_hash", rows.start, known, [s.view for s in shards]),
                "patch_status": self._slide.write_block("patch_status", rows.start, status),
            }
            array = self._slide.features_array(self._encoder)
            for shard, of_view in zip(shards, stored, strict=True):
                # No record vouches for what may be there, and Zarr would read it to write the rest of the file.
                self._slide.shard_path(self._encoder, shard).unlink(missing_ok=True)
                array[rows, shard.view] = of_view
            records = {s.name: self._record_of(s, f, status) for s, f in zip(shards, stored, strict=True)}
        self._slide.record(self._encoder, records, tables)

    def _record_of(self, shard: Shard, features: Features, status: PatchStatus) -> ShardRecord:
        path = self._slide.shard_path(self._encoder, shard)
        return ShardRecord(
            rows=shard.stop - shard.start,
            failed=int(np.count_nonzero(status)),
            crc32c=checksum(features),
            size=path.stat().st_size if path.exists() else 0,
        )

    def _require_finite(self, shard: Shard, features: Features, status: PatchStatus) -> None:
        bad = np.flatnonzero(~np.isfinite(features).all(axis=1) & (status == schema.STATUS["ok"]))
        if len(bad):
            raise EncoderError(self.not_finite(shard.start + int(bad[0]), shard.view))

    def not_finite(self, row: int, view: int) -> str:
        """The message about a patch whose features are NaN, infinite or too large for float16."""
        x, y = self._slide.coords[row]
        return (
            f"{self._encoder} gave features that are not finite in float16 for row {row} at ({x}, {y}), view {view}. "
            "Nothing of this shard is stored. Try --precision fp32; if it stays, the weights are damaged"
        )

    def _known_hashes(
        self, shard: Shard, hashes: UInt64[np.ndarray, " rows"], status: PatchStatus
    ) -> UInt64[np.ndarray, " rows"]:
        """The hashes of a shard's pixels as far as any encoder has seen them."""
        stored = self._slide.read_block("pixel_hash", shard.start, shard.stop, view=shard.view)
        other = (stored != hashes) & (stored != schema.UNKNOWN_HASH) & (status == schema.STATUS["ok"])
        if other.any():
            row = shard.start + int(np.flatnonzero(other)[0])
            raise StoreMismatchError(
                f"slide {self._slide.slide_id}, row {row}, view {shard.view}: the pixels are not those "
                "cached before. Has the slide, OpenSlide or OpenCV changed? See g2l store info"
            )
        return np.where(status == 0, hashes, stored)

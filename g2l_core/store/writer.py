"""Write features into a store, shard by shard, each with its completion record."""

import warnings
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float16, Float32, UInt8, UInt64

from g2l_core.errors import EncoderError, StoreMismatchError
from g2l_core.store import schema
from g2l_core.store.boundary import writing
from g2l_core.store.facts import ShardRecord
from g2l_core.store.location import folder_of
from g2l_core.store.slide import StoredSlide
from g2l_core.store.tables import Shard, checksum
from g2l_core.types import Features, PatchStatus

SMALLEST = float(np.finfo(np.float16).smallest_normal)
"""Below it float16 loses digits, and in the end all of them."""


def is_lost(given: np.ndarray, stored: Features) -> Bool[np.ndarray, " row"]:
    """Which rows of features float16 cannot hold: some are not finite in it, or all are below its normal numbers."""
    largest = np.abs(given).max(axis=1, initial=0)
    return ~np.isfinite(stored).all(axis=1) | ((largest > 0) & (largest < SMALLEST))


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
            hashes: Pixel hash of each row's view; 0 where the pixels are not known.
            status: Reason code of each row.

        Raises:
            EncoderError: A good patch has features that float16 cannot hold: NaN, infinite, too large, or all of them
                too small; or at least `MIN_DIFFERENT` different views all have the same.
            StoreMismatchError: The pixels are not those that another encoder was given.
            StoreError: The disk is full, or cannot be written to.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # overflow becomes infinity, refused below
            stored = np.ascontiguousarray(features, dtype=np.float16)
        for shard, of_view, given in zip(shards, stored, features, strict=True):
            self._require_held(shard, given, of_view, status)
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
                folder_of(self._slide.shard_path(self._encoder, shard)).unlink(missing_ok=True)
                array[rows, shard.view] = of_view
            records = {s.name: self._record_of(s, f, status) for s, f in zip(shards, stored, strict=True)}
        self._slide.record(self._encoder, records, tables)

    def _record_of(self, shard: Shard, features: Features, status: PatchStatus) -> ShardRecord:
        path = folder_of(self._slide.shard_path(self._encoder, shard))
        return ShardRecord(
            rows=shard.stop - shard.start,
            failed=int(np.count_nonzero(status)),
            crc32c=checksum(features),
            size=path.stat().st_size if path.exists() else 0,
        )

    def _require_held(self, shard: Shard, given: np.ndarray, stored: Features, status: PatchStatus) -> None:
        """Refuse a shard if float16 cannot hold the features of one of its good patches."""
        lost = np.flatnonzero(is_lost(given, stored) & (status == schema.STATUS["ok"]))
        if len(lost):
            row = int(lost[0])
            raise EncoderError(self.not_held(shard.start + row, shard.view, float(np.abs(given[row]).max())))

    def not_held(self, row: int, view: int, largest: float) -> str:
        """The message about a patch whose features float16 cannot hold; `largest` is the largest absolute value."""
        x, y = self._slide.coords[row]
        precise = "Try --precision fp32; if it stays, the weights are damaged"
        what, advice = "not finite in float16", precise
        if largest < SMALLEST:
            what = f"too small for float16 (at most {largest:.1e}, the smallest normal number is {SMALLEST:.1e})"
            advice = f"{precise}, or the network needs a normalization behind it"
        return (
            f"{self._encoder} gave features that are {what} for row {row} at ({x}, {y}), view {view}. "
            f"Nothing of this shard is stored. {advice}"
        )

    def _known_hashes(
        self, shard: Shard, hashes: UInt64[np.ndarray, " rows"], status: PatchStatus
    ) -> UInt64[np.ndarray, " rows"]:
        """The hashes of a shard's pixels as far as any encoder has seen them."""
        stored = self._slide.read_block("pixel_hash", shard.start, shard.stop, view=shard.view)
        known = (stored != schema.UNKNOWN_HASH) & (hashes != schema.UNKNOWN_HASH)
        other = (stored != hashes) & known & (status == schema.STATUS["ok"])
        if other.any():
            row = shard.start + int(np.flatnonzero(other)[0])
            raise StoreMismatchError(
                f"slide {self._slide.slide_id}, row {row}, view {shard.view}: the pixels are not those "
                "cached before. Has the slide, OpenSlide or OpenCV changed? See g2l store info"
            )
        return np.where((status == 0) & (hashes != schema.UNKNOWN_HASH), hashes, stored)

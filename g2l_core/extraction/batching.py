"""Views of many slides, gathered into batches of one static size and encoded in a thread of their own.

A batch is filled while the one before it is encoded and a third waits, so the encoder never waits for the filling.
"""

from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter

import numpy as np
import torch
from jaxtyping import Bool, Float16, Float32, UInt8, UInt64

from g2l_core.encoders.loading import LoadedEncoder, encode
from g2l_core.errors import EncoderError
from g2l_core.extraction.unfinished import UnfinishedShard
from g2l_core.store.features import Shard, StoredSlide
from g2l_core.store.schema import STATUS
from g2l_core.store.writer import FeatureWriter, is_lost
from g2l_core.types import PatchStatus

IN_FLIGHT = 2
"""How many batches may be at the encoder, or wait there, while another is filled."""


MIN_DIFFERENT = 8
"""From so many different views on, features that are the same for all of them are refused."""


def describe_sameness(
    features: Float16[np.ndarray, "view row dim"], hashes: UInt64[np.ndarray, "view row"], status: PatchStatus
) -> str:
    """Features that say nothing, as they are the same for many different pixels; empty where they are not.

    Equal patches may well have equal features, so views count only as far as their pixel hashes differ.
    """
    good = np.flatnonzero(status == STATUS["ok"])
    rows = (of_view[row] for of_view in features for row in good)
    first = next(rows, None)
    if first is None or any((row != first).any() for row in rows):
        return ""
    different = len(np.unique(hashes[:, good]))
    what = "the same features" if first.any() else "zeros alone"
    return f"{what} for all {different:,} different views" if different >= MIN_DIFFERENT else ""


class ShardBuffer:
    """The features of one encoder for the rows of one shard, over some views, until all of them are there.

    It holds rows x views x dim float16: 38 MB for 4,096 rows, 3 views and 1,536 dimensions.
    """

    def __init__(
        self, slide: StoredSlide, writer: FeatureWriter, encoder: LoadedEncoder, shards: Sequence[Shard]
    ) -> None:
        self.encoder, self.slide, self.shards = encoder, slide, tuple(shards)
        self.start, self.stop = shards[0].start, shards[0].stop
        self._writer = writer
        rows = self.stop - self.start
        self.features = np.full((len(shards), rows, encoder.dim), np.nan, np.float16)
        self.hashes = np.zeros((len(shards), rows), np.uint64)
        self.status = slide.patch_status[self.start : self.stop]
        self.todo: Bool[np.ndarray, "view row"] = np.ones((len(shards), rows), bool)
        self.handed: Bool[np.ndarray, " row"] = np.zeros(rows, bool)
        """The rows that were read in this call."""
        self.kept: Bool[np.ndarray, "view row"] = np.zeros((len(shards), rows), bool)
        """The features that a killed run leaves to the next one."""
        self.refused = ""
        """Why its features cannot be stored; empty where they can."""
        self._file: UnfinishedShard | None = None

    def keep_in(self, file: UnfinishedShard) -> None:
        """Take what a killed run has left of this shard, and leave what this one encodes to the next one."""
        self._file = file
        self.kept = file.read(self.shards, self.features, self.hashes)
        self.todo &= ~self.kept

    def save(self) -> None:
        """Keep what is new, for the case that the run is killed before the shard is whole."""
        new = ~self.todo & ~self.kept & (self.status == STATUS["ok"])
        if self._file and new.any() and self._file.append(self.shards, self.features, self.hashes, new):
            self.kept |= new

    def forget(self) -> None:
        """Delete what was kept for the next run."""
        if self._file:
            self._file.forget()

    @property
    def at_risk(self) -> Bool[np.ndarray, " row"]:
        """The rows that were read, and would be read again by the next run if this one were killed."""
        return self.handed & ~self.kept.all(axis=0)

    def retry(self, again: Bool[np.ndarray, " row"], missing: Collection[Shard]) -> None:
        """Try rows again that could not be read before.

        Args:
            again: Which rows; of shards that are recorded, the other rows are taken from the store.
            missing: The shards that are not recorded; all of their rows are encoded.
        """
        self.status[again] = STATUS["ok"]
        for view, shard in enumerate(self.shards):
            if shard in missing:
                continue
            stored = self.slide.read_rows(self.encoder.key, self.start, self.stop, view=shard.view)
            self.features[view, ~again] = stored[~again]
            self.hashes[view] = self.slide.pixel_hash[self.start : self.stop, shard.view]
            self.todo[view, ~again] = False

    @property
    def is_complete(self) -> bool:
        """Whether every feature is there."""
        return not self.todo.any()

    def place(self, view: int, row: int, features: Float32[np.ndarray, " dim"]) -> None:
        """Take the features of one view of one patch. If float16 cannot hold them, the shard is refused."""
        with np.errstate(over="ignore", under="ignore"):
            self.features[view, row] = features
        self.todo[view, row] = False
        if not self.refused and is_lost(features[None], self.features[view, row][None])[0]:
            largest = float(np.abs(features).max())
            self.refused = self._writer.not_held(self.start + row, self.shards[view].view, largest)

    def flush(self) -> None:
        """Write every view's shard.

        Raises:
            EncoderError: float16 cannot hold some features, or all are the same; nothing is written.
            StoreMismatchError: The pixels are not those that another encoder was given.
            StoreError: The disk is full, or cannot be written to.
        """
        if self.refused:
            raise EncoderError(self.refused)
        if same := describe_sameness(self.features, self.hashes, self.status):
            raise EncoderError(
                f"{self.encoder.key} gave {same} of rows {self.start} to {self.stop}. Nothing of this shard is stored. "
                "Are these the network's own weights, its mean and its std?"
            )
        before = self.slide.patch_status[self.start : self.stop]
        if ((before == STATUS["unreadable"]) & (self.status == STATUS["ok"])).any():
            self.slide.forget(self.start)
        self._writer.write_views(self.shards, self.features, self.hashes, self.status)


class Batcher:
    """Gathers views of any slides for one encoder, and encodes them in batches of one size."""

    def __init__(self, encoder: LoadedEncoder, batch_size: int, crop_px: int, thread: ThreadPoolExecutor) -> None:
        self._encoder, self._thread = encoder, thread
        pinned = encoder.device.type == "cuda"  # so that the copy to the device does not wait
        shape = (batch_size, crop_px, crop_px, 3)
        self._free = deque(
            torch.zeros(shape, dtype=torch.uint8, pin_memory=pinned).numpy() for _ in range(IN_FLIGHT + 1)
        )
        self._filling = self._free.popleft()
        self._places: list[tuple[ShardBuffer, int, int]] = []
        self._in_flight: deque[tuple[Future[np.ndarray], np.ndarray, list[tuple[ShardBuffer, int, int]]]] = deque()
        self.seconds_busy = 0.0
        """Seconds in which the encoder was at work."""

    def add(self, pixels: UInt8[np.ndarray, "height width 3"], buffer: ShardBuffer, view: int, row: int) -> None:
        """Take one view. If it fills the batch, the batch is sent to the encoder."""
        self._filling[len(self._places)] = pixels
        self._places.append((buffer, view, row))
        if len(self._places) == len(self._filling):
            self._send()

    def finish(self) -> None:
        """Encode what has gathered, padded with blanks, and collect all features that are still in flight."""
        if self._places:
            self._filling[len(self._places) :] = 0
            self._send()
        while self._in_flight:
            self._collect()

    def _send(self) -> None:
        if not self._free:
            self._collect()
        future = self._thread.submit(self._encode, self._filling)
        self._in_flight.append((future, self._filling, self._places))
        self._filling, self._places = self._free.popleft(), []

    def _encode(self, batch: np.ndarray) -> np.ndarray:
        begin = perf_counter()
        features = encode(self._encoder, batch)
        self.seconds_busy += perf_counter() - begin
        return features

    def _collect(self) -> None:
        future, batch, places = self._in_flight.popleft()
        for (buffer, view, row), features in zip(places, future.result(), strict=False):
            buffer.place(view, row, features)
        self._free.append(batch)

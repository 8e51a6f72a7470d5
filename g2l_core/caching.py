"""Stage one's stream: patches are read ahead, batched across slides, encoded, and written as shards fill.

A batch always has the same size, so a patch's features do not depend on its neighbours; what is still missing
at a restart is computed again with the same bits.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from g2l_core.artefacts import ArtefactSpec
from g2l_core.encoder_loading import LoadedEncoder, encode
from g2l_core.engine import run_ahead
from g2l_core.errors import EncoderError, SlideError, StoreMismatchError
from g2l_core.grid import GridSpec, blocks
from g2l_core.patches import PatchReader, RenderedBlock, open_patches, render_block
from g2l_core.store.features import FeatureStore, FeatureWriter, Shard, StoredSlide
from g2l_core.types import Level0Px, ViewParams
from g2l_core.views import ViewSpec


@dataclass
class CacheProgress:
    """What stage one has done so far, and where its time went."""

    patches_total: int = 0
    patches_done: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: {"read": 0.0, "augment": 0.0, "encode": 0.0, "write": 0.0, "wait": 0.0}
    )
    """read and augment: sums over threads; wait: the encoder idle for want of patches."""
    failed_slides: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, list[str]] = field(default_factory=dict)
    """Reasons of unreadable patches, by slide."""

    @property
    def bottleneck(self) -> str:
        """The part that the others wait for: read, augment, encode or write."""
        s = self.seconds
        if s["wait"] > max(s["encode"], s["write"]):
            return max("read", "augment", key=s.__getitem__)
        return max("encode", "write", key=s.__getitem__)


@dataclass(frozen=True)
class _ShardJob:
    """The missing views of a run of rows of one slide, and where their features gather."""

    slide: StoredSlide
    rows: tuple[int, int]
    buffers: tuple["_ShardBuffer", ...]


class _ShardBuffer:
    """The features of one encoder for the rows of a shard, over its missing views, until all are there."""

    def __init__(self, writer: FeatureWriter, encoder: LoadedEncoder, shards: Sequence[Shard]) -> None:
        rows = shards[0].stop - shards[0].start
        self.encoder, self.writer, self.shards = encoder, writer, list(shards)
        self.features = np.full((len(shards), rows, encoder.dim), np.nan, np.float32)
        self.hashes = np.zeros((len(shards), rows), np.uint64)
        self.status = np.zeros(rows, np.uint8)
        self.remaining = len(shards) * rows

    def flush(self) -> None:
        """Write every view's shard."""
        for shard, features, hashes in zip(self.shards, self.features, self.hashes, strict=True):
            self.writer.write(shard, features, hashes, self.status)


@dataclass(frozen=True)
class _BlockJob:
    """Rows read together, with the parameters of the views wanted of them."""

    shard_job: _ShardJob
    reader: PatchReader
    start: int
    stop: int
    views: tuple[int, ...]
    params: ViewParams
    status: np.ndarray
    artefacts: ArtefactSpec | None


class _Batcher:
    """Gathers views into batches of one static size for one encoder, whatever slides they come from."""

    def __init__(self, encoder: LoadedEncoder, batch_size: int, crop_px: int) -> None:
        self._encoder = encoder
        self._batch = np.zeros((batch_size, crop_px, crop_px, 3), np.uint8)
        self._places: list[tuple[_ShardBuffer, int, int]] = []

    def add(self, pixels: np.ndarray, buffer: _ShardBuffer, view: int, row: int) -> bool:
        """Take one view; True when the batch is full."""
        self._batch[len(self._places)] = pixels
        self._places.append((buffer, view, row))
        return len(self._places) == len(self._batch)

    def run(self) -> list[_ShardBuffer]:
        """Encode what has gathered; return the buffers that this completed."""
        if not self._places:
            return []
        self._batch[len(self._places) :] = 0
        features = encode(self._encoder, self._batch)
        complete = []
        for i, (buffer, view, row) in enumerate(self._places):
            buffer.features[view, row] = features[i]
            buffer.remaining -= 1
            if not buffer.remaining:
                complete.append(buffer)
        self._places.clear()
        return complete


def missing_patches(
    store: FeatureStore, slide_ids: Sequence[str], encoders: Sequence[LoadedEncoder], n_views: int
) -> int:
    """How many patches have a view that is not recorded for some encoder."""
    total = 0
    for slide in map(store.slide, slide_ids):
        starts: dict[int, int] = {}
        for encoder in encoders:
            records = slide.records(encoder.key)
            starts |= {s.start: s.stop - s.start for s in slide.shards(range(n_views)) if s.name not in records}
        total += sum(starts.values())
    return total


def cache_features(
    store: FeatureStore,
    slide_ids: Sequence[str],
    encoders: Sequence[LoadedEncoder],
    *,
    n_views: int,
    batch_size: int,
    workers: int,
    report: Callable[[CacheProgress], None],
) -> CacheProgress:
    """Encode whatever these slides still miss, each patch read and augmented once for all encoders.

    Args:
        store: Open for writing; the slides are laid.
        slide_ids: Which slides.
        encoders: Entered in the store.
        n_views: Views of each patch, the canonical one included.
        batch_size: Static size of every batch.
        workers: Threads that read and augment.
        report: Called after every block with the progress so far.

    Returns:
        The final progress, with every slide and patch that failed.
    """
    views = ViewSpec(**store.views)
    progress = CacheProgress(patches_total=missing_patches(store, slide_ids, encoders, n_views))
    batchers = {encoder.key: _Batcher(encoder, batch_size, views.crop_px) for encoder in encoders}
    jobs = _block_jobs(store, slide_ids, encoders, n_views, progress)

    def render(job: _BlockJob) -> tuple[_BlockJob, RenderedBlock]:
        rows = range(job.start, job.stop)
        return job, render_block(job.reader, rows, job.params, job.status, views, job.artefacts)

    waiting_since = perf_counter()
    for job, block in run_ahead(render, jobs, workers=workers, lookahead=2 * workers + 1):
        progress.seconds["wait"] += perf_counter() - waiting_since
        _take_block(job, block, batchers, progress)
        progress.patches_done += job.stop - job.start
        report(progress)
        waiting_since = perf_counter()
    for batcher in batchers.values():
        _run_batch(batcher, progress)
    report(progress)
    return progress


def _block_jobs(
    store: FeatureStore,
    slide_ids: Sequence[str],
    encoders: Sequence[LoadedEncoder],
    n_views: int,
    progress: CacheProgress,
) -> Iterator[_BlockJob]:
    """All blocks that miss something, slide by slide, shard by shard."""
    grid = GridSpec(**store.grid)
    for slide_id in slide_ids:
        slide = store.slide(slide_id)
        shard_jobs = _shard_jobs(slide, encoders, n_views)
        if not shard_jobs:
            continue
        try:
            reader = open_patches(slide, grid)
        except SlideError as error:
            progress.failed_slides[slide_id] = str(error)
            continue
        side = Level0Px(slide.facts["patch_px_level0"])
        cells = blocks(slide.coords, side, grid)
        params, status = slide.view_params, slide.patch_status
        artefacts = ArtefactSpec(names=grid.artefacts, mpp=grid.mpp) if slide.facts["kind"] == "slide" else None
        for job in shard_jobs:
            wanted = tuple(sorted({shard.view for buffer in job.buffers for shard in buffer.shards}))
            for start, stop in _within(cells, *job.rows):
                mine = params[start:stop, list(wanted)]
                yield _BlockJob(job, reader, start, stop, wanted, mine, status[start:stop], artefacts)


def _shard_jobs(slide: StoredSlide, encoders: Sequence[LoadedEncoder], n_views: int) -> list[_ShardJob]:
    buffers: dict[tuple[int, int], list[_ShardBuffer]] = {}
    for encoder in encoders:
        writer = slide.writer(encoder.key, digest=encoder.digest, dim=encoder.dim, n_views=n_views)
        by_rows: dict[tuple[int, int], list[Shard]] = {}
        for shard in writer.missing(range(n_views)):
            by_rows.setdefault((shard.start, shard.stop), []).append(shard)
        for rows, shards in by_rows.items():
            buffers.setdefault(rows, []).append(_ShardBuffer(writer, encoder, shards))
    return [_ShardJob(slide, rows, tuple(found)) for rows, found in sorted(buffers.items())]


def _within(cells: Sequence[tuple[int, int]], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The parts of the row ranges `cells` that lie in [start, stop)."""
    for a, b in cells:
        if a < stop and b > start:
            yield max(a, start), min(b, stop)


def _take_block(
    job: _BlockJob, block: RenderedBlock, batchers: Mapping[str, _Batcher], progress: CacheProgress
) -> None:
    """Hand a block's views to the encoders, and its hashes and reason codes to the shards."""
    slide_id = job.shard_job.slide.slide_id
    if block.reasons:
        progress.unreadable.setdefault(slide_id, []).extend(block.reasons)
    progress.seconds["read"] += block.seconds_read
    progress.seconds["augment"] += block.seconds_augment
    first = job.shard_job.rows[0]
    for buffer in job.shard_job.buffers:
        buffer.status[job.start - first : job.stop - first] = block.status
        batcher = batchers[buffer.encoder.key]
        for v, shard in enumerate(buffer.shards):
            column = job.views.index(shard.view)
            buffer.hashes[v, job.start - first : job.stop - first] = block.hashes[:, column]
            for i in range(job.stop - job.start):
                if block.status[i]:
                    buffer.remaining -= 1
                elif batcher.add(block.pixels[i, column], buffer, v, job.start - first + i):
                    _run_batch(batcher, progress)
        if not buffer.remaining:
            _flush(buffer, progress)


def _run_batch(batcher: _Batcher, progress: CacheProgress) -> None:
    begin = perf_counter()
    complete = batcher.run()
    progress.seconds["encode"] += perf_counter() - begin
    for buffer in complete:
        _flush(buffer, progress)


def _flush(buffer: _ShardBuffer, progress: CacheProgress) -> None:
    """Write a complete shard; if its content is refused, that costs the slide, not the run."""
    if not buffer.shards:
        return
    begin = perf_counter()
    try:
        buffer.flush()
    except (EncoderError, StoreMismatchError) as error:
        progress.failed_slides[buffer.writer.slide_id] = str(error)
    buffer.shards.clear()
    progress.seconds["write"] += perf_counter() - begin

"""Stage one's stream: patches are read ahead, batched across slides, encoded, and written as shards fill.

A batch always has the same size, so a patch's features do not depend on its neighbors; what is still missing
at a restart is computed again with the same bits.

Memory does not grow with the cohort nor with a slide. It holds at most 2 workers + 1 blocks of pixels (64 patches
x views x 147 KiB at 224 px) and, for every encoder, the shard buffers of those blocks and of the batches in flight:
one or two for large slides, one a slide for small ones, each no larger than its slide.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import numpy as np

from g2l_core.concurrency import run_ahead
from g2l_core.encoders.loading import LoadedEncoder
from g2l_core.errors import EncoderError, SlideError, StoreMismatchError
from g2l_core.extraction.batching import Batcher, ShardBuffer
from g2l_core.patches.artifacts import ArtifactSpec
from g2l_core.patches.grid import GridSpec, blocks
from g2l_core.patches.render import PatchReader, RenderedBlock, open_patches, render_block
from g2l_core.patches.views import ViewSpec
from g2l_core.slides.staging import Stage
from g2l_core.store import schema
from g2l_core.store.features import FeatureStore, Shard, StoredSlide
from g2l_core.store.schema import STATUS
from g2l_core.store.writer import FeatureWriter
from g2l_core.types import Level0Px, PatchStatus, ViewParams


@dataclass
class ExtractionProgress:
    """What stage one has done so far, and where its time went."""

    patches_total: int = 0
    patches_done: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: {"read": 0.0, "augment": 0.0, "encode": 0.0, "write": 0.0, "wait": 0.0}
    )
    """read and augment: sums over threads; encode: the encoder at work; wait: it starves for want of patches."""
    elapsed: float = 0.0
    """Seconds since the first patch was asked for."""
    failed_slides: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, list[str]] = field(default_factory=dict)
    """Reasons of unreadable patches, by slide."""

    @property
    def utilization(self) -> float:
        """Share of the time in which the encoder was at work."""
        return min(1.0, self.seconds["encode"] / self.elapsed) if self.elapsed else 0.0

    @property
    def bottleneck(self) -> str:
        """The part that the others wait for: read, augment, encode or write."""
        s = self.seconds
        if s["wait"] > max(s["encode"], s["write"]):
            return max("read", "augment", key=s.__getitem__)
        return max("encode", "write", key=s.__getitem__)


@dataclass(frozen=True)
class _ShardJob:
    """Rows [start, stop) of one slide, and the buffers in which their features gather, one an encoder."""

    slide: StoredSlide
    start: int
    buffers: tuple[ShardBuffer, ...]

    @property
    def todo(self) -> np.ndarray:
        """Of which rows some view is to be encoded, bool (rows,)."""
        return np.any([buffer.todo.any(axis=0) for buffer in self.buffers], axis=0)


@dataclass(frozen=True)
class _BlockJob:
    """Rows read together, with the parameters of the views wanted of them."""

    shard_job: _ShardJob
    reader: PatchReader
    rows: np.ndarray
    views: tuple[int, ...]
    params: ViewParams
    status: PatchStatus
    artifacts: ArtifactSpec | None


def missing_patches(
    store: FeatureStore,
    slide_ids: Sequence[str],
    encoders: Sequence[LoadedEncoder],
    n_views: int,
    *,
    retry_unreadable: bool = False,
) -> int:
    """How many patches have a view that is not recorded for some encoder, or are to be tried again."""
    total = 0
    for slide in map(store.slide, slide_ids):
        rows = np.zeros(len(slide), bool)
        for encoder in encoders:
            records = slide.records(encoder.key)
            for shard in slide.shards(range(n_views)):
                rows[shard.start : shard.stop] |= shard.name not in records
        if retry_unreadable:
            rows |= slide.patch_status == STATUS["unreadable"]
        total += int(rows.sum())
    return total


def extract_features(
    store: FeatureStore,
    slide_ids: Sequence[str],
    encoders: Sequence[LoadedEncoder],
    *,
    n_views: int,
    batch_size: int,
    workers: int,
    report: Callable[[ExtractionProgress], None],
    retry_unreadable: bool = False,
    stage: Stage | None = None,
) -> ExtractionProgress:
    """Encode whatever these slides still miss, each patch read and augmented once for all encoders.

    Args:
        store: Open for writing; the slides are laid.
        slide_ids: Which slides.
        encoders: Entered in the store.
        n_views: Views of each patch, the canonical one included.
        batch_size: Static size of every batch.
        workers: Threads that read and augment.
        report: Called after every block with the progress so far.
        retry_unreadable: Try the patches again that could not be read before.
        stage: Where slides are copied to before they are read; None reads them where they are.

    Returns:
        The final progress, with every slide and patch that failed.
    """
    views = ViewSpec.from_json(store.views)
    total = missing_patches(store, slide_ids, encoders, n_views, retry_unreadable=retry_unreadable)
    progress = ExtractionProgress(patches_total=total)
    jobs = _block_jobs(store, slide_ids, encoders, n_views, progress, retry_unreadable, stage)

    def render(job: _BlockJob) -> tuple[_BlockJob, RenderedBlock]:
        rows = job.rows.tolist()
        return job, render_block(job.reader, rows, job.params, job.status, views, job.artifacts)

    with ThreadPoolExecutor(1, thread_name_prefix="g2l-encode") as thread:
        stream = _Stream(progress, {e.key: Batcher(e, batch_size, views.crop_px, thread) for e in encoders})
        begin = waiting_since = perf_counter()
        last: StoredSlide | None = None
        for job, block in run_ahead(render, jobs, workers=workers, lookahead=2 * workers + 1):
            progress.seconds["wait"] += perf_counter() - waiting_since
            stream.take(job, block)
            if stage and last and last is not job.shard_job.slide:
                stage.release(Path(last.facts["source"]))
            last = job.shard_job.slide
            progress.patches_done += len(job.rows)
            progress.elapsed = perf_counter() - begin
            report(progress)
            waiting_since = perf_counter()
        stream.finish()
    progress.elapsed = perf_counter() - begin
    report(progress)
    return progress


def _block_jobs(
    store: FeatureStore,
    slide_ids: Sequence[str],
    encoders: Sequence[LoadedEncoder],
    n_views: int,
    progress: ExtractionProgress,
    retry_unreadable: bool,
    stage: Stage | None,
) -> Iterator[_BlockJob]:
    """All blocks that miss something, slide by slide, shard by shard; a slide that has failed is left."""
    grid = GridSpec.from_json(store.grid)
    for slide_id in slide_ids:
        slide = store.slide(slide_id)
        reader: PatchReader | None = None
        cells = blocks(slide.coords, Level0Px(slide.facts["patch_px_level0"]), grid)
        params = slide.view_params
        artifacts = ArtifactSpec(names=grid.artifacts, mpp=grid.mpp) if slide.facts["kind"] == "slide" else None
        for job in _shard_jobs(slide, encoders, n_views, retry_unreadable):
            try:
                source = Path(slide.facts["source"])
                reader = reader or open_patches(slide, grid, stage.path_of(source) if stage else source)
            except SlideError as error:
                progress.failed_slides[slide_id] = str(error)
                if stage:
                    stage.release(source)
                break
            wanted = tuple(sorted({shard.view for buffer in job.buffers for shard in buffer.shards}))
            todo, status = job.todo, job.buffers[0].status
            for start, stop in _within(cells, job.start, job.start + len(todo)):
                rows = start + np.flatnonzero(todo[start - job.start : stop - job.start])
                if len(rows):
                    chosen = params[rows][:, list(wanted)]
                    yield _BlockJob(job, reader, rows, wanted, chosen, status[rows - job.start], artifacts)
            if slide_id in progress.failed_slides:
                break


def _shard_jobs(
    slide: StoredSlide, encoders: Sequence[LoadedEncoder], n_views: int, retry_unreadable: bool
) -> Iterator[_ShardJob]:
    """One job for every shard's rows that miss something; buffers are made only when their turn comes."""
    views = range(n_views)
    writers = [FeatureWriter.open(slide, e.key, digest=e.digest, dim=e.dim, n_views=n_views) for e in encoders]
    for start in sorted({shard.start for shard in slide.shards(views)}):
        buffers = []
        for encoder, writer in zip(encoders, writers, strict=True):
            missing = [shard for shard in writer.missing(views) if shard.start == start]
            again = _unreadable_rows(slide, start) if retry_unreadable else np.zeros(0, bool)
            shards = [s for s in slide.shards(views) if s.start == start] if again.any() else missing
            if shards:
                buffers.append(_buffer(ShardBuffer(slide, writer, encoder, shards), missing, again))
        if buffers:
            yield _ShardJob(slide, start, tuple(buffers))


def _unreadable_rows(slide: StoredSlide, start: int) -> np.ndarray:
    """Which rows of the shard at `start` could not be read before, bool (rows,)."""
    return slide.patch_status[start : start + schema.SHARD_ROWS] == STATUS["unreadable"]


def _buffer(buffer: ShardBuffer, missing: Sequence[Shard], again: np.ndarray) -> ShardBuffer:
    """The buffer, where rows are tried again, with everything else that is recorded taken from the store."""
    if again.any():
        buffer.status[again] = STATUS["ok"]
        for view, shard in enumerate(buffer.shards):
            if shard not in missing:
                buffer.keep_stored(view, ~again)
    return buffer


def _within(cells: Sequence[tuple[int, int]], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The parts of the row ranges `cells` that lie in [start, stop)."""
    for a, b in cells:
        if a < stop and b > start:
            yield max(a, start), min(b, stop)


class _Stream:
    """Takes rendered blocks to the encoders, and complete shards to the store."""

    def __init__(self, progress: ExtractionProgress, batchers: Mapping[str, Batcher]) -> None:
        self._progress, self._batchers = progress, batchers
        self._open: list[ShardBuffer] = []

    def take(self, job: _BlockJob, block: RenderedBlock) -> None:
        """Hand a block's views to the encoders, and its hashes and reason codes to the shards."""
        progress, slide_id = self._progress, job.shard_job.slide.slide_id
        if block.reasons:
            progress.unreadable.setdefault(slide_id, []).extend(block.reasons.values())
            job.shard_job.slide.note_losses(block.reasons)
        progress.seconds["read"] += block.seconds_read
        progress.seconds["augment"] += block.seconds_augment
        for buffer in job.shard_job.buffers:
            if buffer not in self._open:
                self._open.append(buffer)
            self._fill(buffer, job, block)
        self._write_complete()

    def _fill(self, buffer: ShardBuffer, job: _BlockJob, block: RenderedBlock) -> None:
        batcher = self._batchers[buffer.encoder.key]
        rows = job.rows - buffer.start
        buffer.status[rows] = block.status
        for view, shard in enumerate(buffer.shards):
            column = job.views.index(shard.view)
            for i, row in enumerate(rows.tolist()):
                if not buffer.todo[view, row]:
                    continue
                buffer.hashes[view, row] = block.hashes[i, column]
                if block.status[i]:
                    buffer.todo[view, row] = False
                else:
                    batcher.add(block.pixels[i, column], buffer, view, row)

    def finish(self) -> None:
        """Encode what is left, and write it."""
        for batcher in self._batchers.values():
            batcher.finish()
        self._write_complete()

    def _write_complete(self) -> None:
        """Write complete shards; one whose content is refused costs its slide, not the run."""
        self._progress.seconds["encode"] = sum(batcher.seconds_busy for batcher in self._batchers.values())
        begin = perf_counter()
        for buffer in [b for b in self._open if b.is_complete or b.refused]:
            try:
                buffer.flush()
            except (EncoderError, StoreMismatchError) as error:
                self._progress.failed_slides.setdefault(buffer.slide.slide_id, str(error))
            self._open.remove(buffer)
        self._progress.seconds["write"] += perf_counter() - begin

"""Where a patch becomes a feature: the flow from the patches in a store to their features in the same store.

    patching.py             finds the patches of a slide and stores them with the parameters of their views
        |
    _blocks                 yields the rows of one cell that miss something: a `_Block`
        |
    render_block            reads each patch once and renders its views (`workers` threads, ahead of the rest)
        |
    Batcher.add             copies views of any slides into batches of one static size
        |
    encode                  turns a batch of pixels into features (one thread, behind the back of the others)
        |
    ShardBuffer.place       gathers features, hashes and reason codes until a shard of a slide is whole
        |
    FeatureWriter.write     writes one file a view, then its completion record

A batch always has the same size, so a patch's features do not depend on its neighbors: what is missing after a
restart is computed again with the same bits.

Memory grows neither with the cohort nor with a slide. It holds at most 2 workers + 1 blocks of pixels (64 patches
x views x 147 KiB at 224 px) and, for every encoder, the shard buffers of those blocks and of the batches in flight:
one or two for large slides, one a slide for small ones, each no larger than its slide.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np

from g2l_core.concurrency import run_ahead
from g2l_core.encoders.loading import LoadedEncoder
from g2l_core.errors import EncoderError, ReadError, SlideError, StoreCorruptError, StoreMismatchError
from g2l_core.extraction.batching import Batcher, ShardBuffer
from g2l_core.extraction.unfinished import SAVE_EVERY_S, UnfinishedShard
from g2l_core.patches.artifacts import ArtifactSpec
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.grid import blocks as row_blocks
from g2l_core.patches.render import ImagePatches, PatchReader, RenderedBlock, open_patches, render_block
from g2l_core.patches.views import ViewSpec
from g2l_core.slides.boundary import within
from g2l_core.slides.icc import NO_PROFILE
from g2l_core.slides.images import TURNED
from g2l_core.slides.staging import Stage
from g2l_core.slides.under_way import UnderWay
from g2l_core.store.features import FeatureStore, StoredSlide
from g2l_core.store.location import folder_of
from g2l_core.store.schema import STATUS
from g2l_core.store.writer import FeatureWriter
from g2l_core.types import Level0Px, PatchStatus, ViewParams


@dataclass
class ExtractionProgress:
    """What stage one has done so far, and where its time went."""

    patches_total: int = 0
    patches_done: int = 0
    patches_kept: int = 0
    """Those of them that the same call again would not encode, if this one were killed now."""
    seconds: dict[str, float] = field(
        default_factory=lambda: {"read": 0.0, "augment": 0.0, "encode": 0.0, "write": 0.0, "wait": 0.0}
    )
    """read and augment are sums over threads, encode is the encoder at work, and wait is when it had no patches."""
    elapsed: float = 0.0
    """Seconds since the first patch was asked for."""
    failed_slides: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, list[str]] = field(default_factory=dict)
    """Reasons of unreadable patches, by slide."""
    turned: dict[str, int] = field(default_factory=dict)
    """How many images were turned as EXIF says, by set of patch images."""
    unprofiled: dict[str, int] = field(default_factory=dict)
    """How many images have no ICC profile where colors are to be converted by it, by set of patch images."""

    @property
    def utilization(self) -> float:
        """Fraction of the time in which the encoder was at work."""
        return min(1.0, self.seconds["encode"] / self.elapsed) if self.elapsed else 0.0

    @property
    def bottleneck(self) -> str:
        """The part that the others wait for: read, augment, encode or write."""
        s = self.seconds
        if s["wait"] > max(s["encode"], s["write"]):
            return max("read", "augment", key=s.__getitem__)
        return max("encode", "write", key=s.__getitem__)


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Rows of one slide that are read together, and what is wanted of them."""

    slide: StoredSlide
    reader: PatchReader
    rows: np.ndarray
    status: PatchStatus
    """Reason codes of the rows as they are known before reading."""
    views: tuple[int, ...]
    params: ViewParams
    """Parameters of these views."""
    artifacts: ArtifactSpec | None
    buffers: tuple[ShardBuffer, ...]
    """Where the features of the rows gather, one an encoder; all blocks of a shard share them."""


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """How slides are opened."""

    watch: UnderWay
    timeout: float | None
    stage: Stage | None

    def open(self, slide: StoredSlide, grid: GridSpec, source: Path) -> PatchReader:
        """Open a slide, or its copy, for reading.

        Raises:
            SlideError: It cannot be opened.
        """
        path = self.stage.path_of(source) if self.stage else source
        with self.watch.reading(slide.slide_id):
            return within(self.timeout, lambda: open_patches(slide, grid, path), "opening it")


def missing_patches(
    store: FeatureStore,
    slide_ids: Sequence[str],
    encoder_keys: Sequence[str],
    n_views: int,
    *,
    retry_unreadable: bool = False,
) -> int:
    """How many patches have a view that is not recorded for some encoder, or are to be tried again."""
    total = 0
    for slide in map(store.slide, slide_ids):
        rows = np.zeros(len(slide), bool)
        for key in encoder_keys:
            records = slide.records(key)
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
    timeout: float | None = None,
) -> ExtractionProgress:
    """Encode whatever these slides still miss, each patch read and augmented once for all encoders.

    Args:
        store: Open for writing; the slides have patches.
        slide_ids: Which slides.
        encoders: They are known to the store.
        n_views: Views of each patch, the canonical one included.
        batch_size: Static size of every batch.
        workers: Threads that read and augment.
        report: Called after every block with the progress so far.
        retry_unreadable: Whether to try the patches again that could not be read before.
        stage: Where slides are copied to before they are read; None reads them where they are.
        timeout: Seconds that opening a slide, or reading a block of its patches, may take; then the slide fails.

    Returns:
        The final progress, with every slide and patch that failed.
    """
    views = ViewSpec.from_json(store.views)
    keys = [encoder.key for encoder in encoders]
    total = missing_patches(store, slide_ids, keys, n_views, retry_unreadable=retry_unreadable)
    progress = ExtractionProgress(patches_total=total)

    watch, lost = UnderWay(folder_of(store.path)), set[StoredSlide]()

    def render(block: _Block) -> tuple[_Block, RenderedBlock | SlideError]:
        reading = partial(
            render_block, block.reader, block.rows.tolist(), block.params, block.status, views, block.artifacts
        )
        try:
            if block.slide in lost:
                raise ReadError("it has failed already")
            with watch.reading(block.slide.slide_id):
                return block, within(timeout, reading, f"reading {len(block.rows)} patches")
        except SlideError as error:
            return block, error

    with ThreadPoolExecutor(1, thread_name_prefix="g2l-encode") as thread:
        batchers = {e.key: Batcher(e, batch_size, views.crop_px, thread) for e in encoders}
        unfinished, saved_at = list[ShardBuffer](), perf_counter()
        reading = _Reading(watch=watch, timeout=timeout, stage=stage)
        blocks = _blocks(store, slide_ids, encoders, n_views, progress, retry_unreadable, reading)
        begin = waiting_since = perf_counter()
        last: StoredSlide | None = None
        for block, rendered in run_ahead(render, blocks, workers=workers, lookahead=2 * workers + 1):
            progress.seconds["wait"] += perf_counter() - waiting_since
            if isinstance(rendered, SlideError):
                lost.add(block.slide)
                progress.failed_slides.setdefault(block.slide.slide_id, str(rendered))
                unfinished = [buffer for buffer in unfinished if buffer.slide is not block.slide]
                progress.patches_kept = _kept(progress, unfinished)
                waiting_since = perf_counter()
                continue
            _note(block, rendered, progress)
            unfinished += [buffer for buffer in block.buffers if buffer not in unfinished]
            for buffer in block.buffers:
                _fill(buffer, batchers[buffer.encoder.key], block, rendered)
            _write_complete(unfinished, batchers, progress)
            saved_at = _keep(unfinished, progress, saved_at)
            if stage and last and last is not block.slide:
                stage.release(Path(last.facts.source))
            last = block.slide
            progress.elapsed = perf_counter() - begin
            report(progress)
            waiting_since = perf_counter()
        for batcher in batchers.values():
            batcher.finish()
        _write_complete(unfinished, batchers, progress)
        progress.patches_kept = _kept(progress, unfinished)
    progress.elapsed = perf_counter() - begin
    report(progress)
    return progress


# -- from a slide to the blocks that miss something -------------------------------------------------------


def _blocks(
    store: FeatureStore,
    slide_ids: Sequence[str],
    encoders: Sequence[LoadedEncoder],
    n_views: int,
    progress: ExtractionProgress,
    retry_unreadable: bool,
    reading: _Reading,
) -> Iterator[_Block]:
    """All blocks that miss something, slide by slide and shard by shard; the rest of a slide that fails is skipped."""
    grid = GridSpec.from_json(store.grid)
    for slide_id in slide_ids:
        source = None
        try:
            slide = store.slide(slide_id)
            source = Path(slide.facts.source)
            shards = _shard_buffers(store, slide, encoders, n_views, retry_unreadable, progress)
            for block in _slide_blocks(slide, grid, shards, reading):
                yield block
                if slide_id in progress.failed_slides:
                    break
        except (SlideError, StoreCorruptError) as error:
            progress.failed_slides[slide_id] = str(error)
            if reading.stage and source:
                reading.stage.release(source)


def _slide_blocks(
    slide: StoredSlide, grid: GridSpec, shards: Iterator[tuple[ShardBuffer, ...]], reading: _Reading
) -> Iterator[_Block]:
    """The blocks of one slide; it is opened for the first of them.

    Raises:
        SlideError: It cannot be opened.
        StoreCorruptError: Its tables are not what was written.
    """
    reader: PatchReader | None = None
    cells = row_blocks(slide.coords, Level0Px(slide.facts.patch_px_level0), grid)
    params = slide.view_params
    artifacts = ArtifactSpec(names=grid.artifacts, mpp=grid.mpp) if slide.facts.kind == "slide" else None
    for buffers in shards:
        reader = reader or reading.open(slide, grid, Path(slide.facts.source))
        views = tuple(sorted({shard.view for buffer in buffers for shard in buffer.shards}))
        for rows in _missing_rows(buffers, cells):
            yield _Block(
                slide=slide,
                reader=reader,
                rows=rows,
                status=buffers[0].status[rows - buffers[0].start],
                views=views,
                params=params[rows][:, list(views)],
                artifacts=artifacts,
                buffers=buffers,
            )


def _shard_buffers(
    store: FeatureStore,
    slide: StoredSlide,
    encoders: Sequence[LoadedEncoder],
    n_views: int,
    retry_unreadable: bool,
    progress: ExtractionProgress,
) -> Iterator[tuple[ShardBuffer, ...]]:
    """The buffers of each shard's rows, one an encoder that misses some of them; each is made only when it is due.

    They hold what a killed run has left of them, which counts as done.
    """
    shards = slide.shards(range(n_views))
    writers = [FeatureWriter.open(slide, e.key, digest=e.digest, dim=e.dim, n_views=n_views) for e in encoders]
    missing = [set(writer.missing(range(n_views))) for writer in writers]
    unreadable = (slide.patch_status == STATUS["unreadable"]) & retry_unreadable
    for start in sorted({shard.start for shard in shards}):
        here = [shard for shard in shards if shard.start == start]
        again = unreadable[start : here[0].stop]
        buffers = []
        for encoder, writer, absent in zip(encoders, writers, missing, strict=True):
            if again.any():
                buffers.append(ShardBuffer(slide, writer, encoder, here))
                buffers[-1].retry(again, absent)
            elif absent.intersection(here):
                buffers.append(ShardBuffer(slide, writer, encoder, [shard for shard in here if shard in absent]))
                file = UnfinishedShard(store, slide, encoder.key, encoder.digest, encoder.dim, start)
                buffers[-1].keep_in(file)
        if buffers and not again.any():
            progress.patches_done += int((~_is_missing(buffers)).sum())
        if buffers:
            yield tuple(buffers)


def _is_missing(buffers: Sequence[ShardBuffer]) -> np.ndarray:
    """Of which rows of a shard some buffer misses a view."""
    return np.any([buffer.todo.any(axis=0) for buffer in buffers], axis=0)


def _missing_rows(buffers: Sequence[ShardBuffer], cells: Sequence[tuple[int, int]]) -> Iterator[np.ndarray]:
    """The stored rows of a shard of which some buffer misses a view, cell by cell."""
    first, last = buffers[0].start, buffers[0].stop
    is_missing = _is_missing(buffers)
    for start, stop in ((max(a, first), min(b, last)) for a, b in cells if a < last and b > first):
        rows = start + np.flatnonzero(is_missing[start - first : stop - first])
        if len(rows):
            yield rows


# -- from rendered blocks to the encoders and to the store ------------------------------------------------


def _note(block: _Block, rendered: RenderedBlock, progress: ExtractionProgress) -> None:
    """Count a rendered block, and keep why patches of it could not be read, and what images lack or need."""
    progress.patches_done += len(block.rows)
    progress.seconds["read"] += rendered.seconds_read
    progress.seconds["augment"] += rendered.seconds_augment
    if rendered.reasons:
        progress.unreadable.setdefault(block.slide.slide_id, []).extend(rendered.reasons.values())
        block.slide.note_losses(rendered.reasons)
    if not isinstance(block.reader, ImagePatches):
        return
    reader, slide_id = block.reader, block.slide.slide_id
    for rows, told, text in (
        (reader.turned, progress.turned, TURNED),
        (reader.unprofiled, progress.unprofiled, NO_PROFILE),
    ):
        if found := rows.intersection(block.rows.tolist()):
            told[slide_id] = told.get(slide_id, 0) + len(found)
            block.slide.add_note(text)


def _fill(buffer: ShardBuffer, batcher: Batcher, block: _Block, rendered: RenderedBlock) -> None:
    """Hand the views that a buffer misses to its encoder, and their hashes and reason codes to the buffer."""
    rows = block.rows - buffer.start
    buffer.status[rows], buffer.handed[rows] = rendered.status, True
    for view, shard in enumerate(buffer.shards):
        column = block.views.index(shard.view)
        for i, row in enumerate(rows.tolist()):
            if not buffer.todo[view, row]:
                continue
            buffer.hashes[view, row] = rendered.hashes[i, column]
            if rendered.status[i]:
                buffer.todo[view, row] = False
            else:
                batcher.add(rendered.pixels[i, column], buffer, view, row)


def _write_complete(
    unfinished: list[ShardBuffer], batchers: Mapping[str, Batcher], progress: ExtractionProgress
) -> None:
    """Write the buffers that are complete and drop them. If the content of one is refused, only its slide fails."""
    progress.seconds["encode"] = sum(batcher.seconds_busy for batcher in batchers.values())
    begin = perf_counter()
    for buffer in [b for b in unfinished if b.is_complete or b.refused]:
        try:
            buffer.flush()
        except (EncoderError, StoreMismatchError, StoreCorruptError) as error:
            progress.failed_slides.setdefault(buffer.slide.slide_id, str(error))
        buffer.forget()
        unfinished.remove(buffer)
    progress.seconds["write"] += perf_counter() - begin


def _keep(unfinished: Sequence[ShardBuffer], progress: ExtractionProgress, saved_at: float) -> float:
    """Keep what is new of shards that are not whole, if it is time; count what is kept; and when that was last done."""
    if perf_counter() - saved_at > SAVE_EVERY_S:
        for buffer in unfinished:
            buffer.save()
        saved_at = perf_counter()
    progress.patches_kept = _kept(progress, unfinished)
    return saved_at


def _kept(progress: ExtractionProgress, unfinished: Sequence[ShardBuffer]) -> int:
    """How many of the patches that are done would not be encoded again."""
    at_risk: dict[tuple[str, int], np.ndarray] = {}
    for buffer in unfinished:
        place = buffer.slide.slide_id, buffer.start
        at_risk[place] = at_risk.get(place, False) | buffer.at_risk
    return progress.patches_done - sum(int(rows.sum()) for rows in at_risk.values())

"""Features of some rows of a slide, encoded now, or taken from where they are kept.

What is encoded goes to the files of shards that are not whole (`unfinished`), where a killed run finds it again, and
where a run over the whole slide takes it from: no patch is encoded twice. In the store itself nothing changes.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float16, Int64

from g2l_core.concurrency import run_ahead
from g2l_core.encoders.loading import LoadedEncoder
from g2l_core.errors import EncoderError
from g2l_core.extraction.batching import Batcher, ShardBuffer, describe_sameness
from g2l_core.extraction.unfinished import UnfinishedShard
from g2l_core.patches.artifacts import ArtifactSpec
from g2l_core.patches.grid import GridSpec, blocks
from g2l_core.patches.render import PatchReader, RenderedBlock, render_block
from g2l_core.patches.views import ViewSpec
from g2l_core.slides.boundary import within
from g2l_core.slides.under_way import UnderWay
from g2l_core.store.features import FeatureStore, Shard, StoredSlide
from g2l_core.store.location import folder_of
from g2l_core.store.schema import STATUS
from g2l_core.store.writer import FeatureWriter
from g2l_core.types import Level0Px, PatchStatus


@dataclass(frozen=True, kw_only=True)
class SomeRows:
    """Where the canonical features of some rows of one slide come from."""

    store: FeatureStore
    slide: StoredSlide
    key: str
    """Of the encoder in the store."""
    encoder: LoadedEncoder | None
    """None if all of the slide is stored."""
    reader: PatchReader
    batch_size: int
    workers: int
    timeout: float | None
    """Seconds that reading 64 patches may take; then the slide fails."""

    def features(self, rows: Int64[np.ndarray, " row"]) -> tuple[Float16[np.ndarray, "row dim"], PatchStatus, int]:
        """The features of rows, their reason codes, and how many of them were encoded now.

        Features of rows whose code is not 0 mean nothing.

        Raises:
            EncoderError: float16 cannot hold some, or all are the same.
            SlideError: Reading takes too long, or fails as a whole.
            StoreError: What is stored is damaged.
        """
        facts = self.store.encoders[self.key]
        found = np.zeros((len(rows), facts.dim), np.float16)
        status, hashes, encoded = np.zeros(len(rows), np.uint8), np.zeros((1, len(rows)), np.uint64), 0
        recorded = self.slide.records(self.key, [0])
        for shard in self.slide.shards([0]):
            here = np.flatnonzero((rows >= shard.start) & (rows < shard.stop))
            if not len(here):
                continue
            own = rows[here] - shard.start
            if shard.name in recorded:
                found[here] = self.slide.read_rows(self.key, shard.start, shard.stop, view=0)[own]
                status[here], hashes[0, here] = (
                    self.slide.patch_status[rows[here]],
                    self.slide.pixel_hash[rows[here], 0],
                )
            else:
                buffer, new = self._encoded(shard, own)
                found[here], status[here], hashes[0, here] = (
                    buffer.features[0, own],
                    buffer.status[own],
                    buffer.hashes[0, own],
                )
                encoded += new
        if same := describe_sameness(found[None], hashes, status):
            raise EncoderError(f"{self.key} gave {same}. Are these the network's own weights, its mean and its std?")
        return found, status, encoded

    def _encoded(self, shard: Shard, wanted: Int64[np.ndarray, " row"]) -> tuple[ShardBuffer, int]:
        """The buffer of a shard with these of its rows, and how many were encoded now."""
        encoder = self.encoder
        assert encoder is not None
        writer = FeatureWriter.open(self.slide, self.key, digest=encoder.digest, dim=encoder.dim, n_views=1)
        buffer = ShardBuffer(self.slide, writer, encoder, [shard])
        buffer.keep_in(UnfinishedShard(self.store, self.slide, self.key, encoder.digest, encoder.dim, shard.start))
        todo = np.zeros(len(buffer.status), bool)
        todo[wanted] = buffer.todo[0, wanted]
        views = ViewSpec.from_json(self.store.views)
        with ThreadPoolExecutor(1, thread_name_prefix="g2l-encode") as thread:
            batcher = Batcher(encoder, self.batch_size, views.crop_px, thread)
            pieces = self._pieces(shard, np.flatnonzero(todo))
            render = partial(self._render, views, buffer)
            for rows, rendered in run_ahead(render, pieces, workers=self.workers, lookahead=2 * self.workers + 1):
                buffer.status[rows], buffer.hashes[0, rows] = rendered.status, rendered.hashes[:, 0]
                for i in np.flatnonzero(rendered.status == STATUS["ok"]).tolist():
                    batcher.add(rendered.pixels[i, 0], buffer, 0, int(rows[i]))
                buffer.save()
            batcher.finish()
        buffer.save()
        if buffer.refused:
            raise EncoderError(buffer.refused)
        return buffer, int(todo.sum())

    def _pieces(self, shard: Shard, todo: Int64[np.ndarray, " row"]) -> Iterator[np.ndarray]:
        """Rows of the shard that are read together: they lie in one cell of the slide."""
        grid = GridSpec.from_json(self.store.grid)
        for start, stop in blocks(self.slide.coords, Level0Px(self.slide.facts.patch_px_level0), grid):
            rows = todo[(todo + shard.start >= start) & (todo + shard.start < stop)]
            if len(rows):
                yield rows

    def _render(self, views: ViewSpec, buffer: ShardBuffer, rows: np.ndarray) -> tuple[np.ndarray, RenderedBlock]:
        grid = GridSpec.from_json(self.store.grid)
        artifacts = ArtifactSpec(names=grid.artifacts, mpp=grid.mpp) if self.slide.facts.kind == "slide" else None
        stored: Sequence[int] = (rows + buffer.start).tolist()
        params = self.slide.view_params[stored][:, :1]
        reading = partial(render_block, self.reader, stored, params, buffer.status[rows], views, artifacts)
        with UnderWay(folder_of(self.store.path)).reading(self.slide.slide_id):
            return rows, within(self.timeout, reading, f"reading {len(rows)} patches")

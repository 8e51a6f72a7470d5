"""Stage one's memory does not grow with the cohort, nor with a slide."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from g2l_core.extraction import batching
from g2l_core.store import schema
from tests.conftest import TEACHER
from tests.extraction.test_extract import cache

ROOT = Path(__file__).resolve().parents[2]

STAGE_ONE = """
import json, resource, sys
from pathlib import Path
from g2l_core.encoders.resolve import resolve_encoder
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.views import ViewSpec
from pipeline.cache_teacher import run_extraction
from pipeline.extract import ExtractionSettings

folder, store, teacher = sys.argv[1:]
encoder = resolve_encoder(teacher, weights="random:0")
grid = GridSpec(tissue="none")
settings = ExtractionSettings(views=1, batch_size=16)
summary = run_extraction([Path(folder)], Path(store), [encoder], grid, ViewSpec(), settings)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"slides": summary.slides, "patches": summary.patches, "peak_mib": peak}))
"""


def stage_one(cohort, folder, n_slides):
    folder.mkdir()
    slides = sorted((cohort.parent / "slides").glob("*.tiff"))
    for i in range(n_slides):
        (folder / f"{i:02d}.tiff").write_bytes(slides[i % len(slides)].read_bytes() + bytes(i))  # no slide twice
    command = [sys.executable, "-c", STAGE_ONE, str(folder), f"{folder}.zarr", TEACHER]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.slow
def test_forty_slides_need_what_four_need(cohort, tmp_path):
    few, many = stage_one(cohort, tmp_path / "few", 4), stage_one(cohort, tmp_path / "many", 40)
    assert (few["slides"], many["slides"]) == (4, 40)
    assert many["patches"] > 9 * few["patches"]
    assert many["peak_mib"] < 1.1 * few["peak_mib"], (few, many)


def test_a_slide_of_many_shards_holds_few_of_them_at_a_time(cohort, tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "SHARD_ROWS", 4)
    monkeypatch.setattr(schema, "CHUNK_ROWS", 4)
    alive, most, made = set(), [], []
    init, flush = batching.ShardBuffer.__init__, batching.ShardBuffer.flush

    def counted_init(self, *arguments):
        init(self, *arguments)
        alive.add(self)
        made.append(self.start)
        most.append(len(alive))

    def counted_flush(self):
        flush(self)
        alive.discard(self)

    monkeypatch.setattr(batching.ShardBuffer, "__init__", counted_init)
    monkeypatch.setattr(batching.ShardBuffer, "flush", counted_flush)
    slide = cohort.parent / "slides/p01-1.tiff"
    summary = cache([slide], tmp_path / "s.zarr", tissue="none")
    assert len(made) == -(-summary.patches // 4) == 9
    # five blocks read ahead, and three batches of eight views (two a patch) on their way: four shards of four rows
    assert max(most) <= 5 + 4
    assert not alive
    assert np.array_equal(sorted(made), made)

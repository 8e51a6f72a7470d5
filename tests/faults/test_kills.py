"""`kill -9` at many moments of each command after stage one: the same command again ends with the same bits."""

import json
import os
import time

import numpy as np
import pytest

from g2l_core.encoders.resolve import resolve_encoder
from g2l_core.patches.spec import GridSpec, ViewSpec
from g2l_core.store.features import FeatureStore
from pipeline.cache_teacher import run_extraction
from pipeline.settings import ExtractionSettings
from tests.faults.killed_process import start
from tests.faults.small_run import OPTIONS, STUDENT, STUDENT_WEIGHTS

KILLS = int(os.environ.get("G2L_KILLS", "6"))
"""Kills of each command. 20 were tried for docs/reliability.md: `G2L_KILLS=20 pytest tests/faults/test_kills.py`."""


@pytest.fixture(scope="module")
def inputs(cohort, tmp_path_factory):
    """A small store with two encoders, and the files that the commands read."""
    folder = tmp_path_factory.mktemp("inputs")
    store, grid = folder / "s.zarr", GridSpec(max_patches=6)
    for weights, views in (("random:0", 1), (STUDENT_WEIGHTS, 0)):
        encoder = resolve_encoder(STUDENT, weights=weights)
        settings = ExtractionSettings(views=views, batch_size=16, pictures=False)
        run_extraction([cohort], store, [encoder], grid, ViewSpec(), settings)
    opened = FeatureStore.open(store)
    (folder / "student").write_text(next(key for key in opened.encoders if key.endswith("random1")))
    labels = "".join(f"{slide.slide_id},{i % 2}\n" for i, slide in enumerate(opened.slides()))
    (folder / "labels.csv").write_text("slide_id,kind\n" + labels)
    task = 'labels = "labels.csv"\nlabel = "kind"\nfolds = 2\nmetrics = ["cka", "knn"]\nknn_k = 3\n'
    (folder / "tasks.toml").write_text(f"[tasks.a]\n{task}")
    base = "".join(f"{name} = {json.dumps(value)}\n" for name, value in {**OPTIONS, "steps": 1}.items())
    (folder / "seeds.toml").write_text(f"[base]\n{base}[grid]\nseed = [0, 1]\n")
    return folder


def results(out):
    """The bytes of every file that is a function of the input: not run.json, log.csv and pages, which hold times."""
    named = {"results.csv", "comparisons.csv", "results.json", "validation.csv"}
    return {
        path.relative_to(out): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.suffix in {".safetensors", ".h5"} or path.name in named
    }


def finish(command, inputs, out):
    process = start(command, inputs, out)
    process.join(60)
    assert process.exitcode == 0, command


@pytest.mark.slow
@pytest.mark.parametrize("command", ["distill", "bench", "export", "sweep"])
def test_killed_again_and_again(inputs, tmp_path, command):
    """Each process goes on with what the killed one has left, until one ends; then another folder is begun."""
    finish(command, inputs, tmp_path / "whole")
    begin = time.monotonic()
    finish(command, inputs, tmp_path / "timed")
    duration = time.monotonic() - begin
    whole = results(tmp_path / "whole")
    assert whole
    assert results(tmp_path / "timed") == whole
    rng = np.random.default_rng(0)
    kills, folders = 0, 1
    while kills < KILLS:
        process = start(command, inputs, tmp_path / str(folders))
        process.join(rng.uniform(0, duration))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0
            assert results(tmp_path / str(folders)) == whole
            folders += 1
    finish(command, inputs, tmp_path / str(folders))
    assert results(tmp_path / str(folders)) == whole

"""kill -9 at any moment of stage one and the same command again: the same arrays, and finished shards untouched."""

import json
import os
import random
import signal
from time import sleep

import numpy as np
import pytest
import zarr

from g2l_core.extraction.batching import IN_FLIGHT
from g2l_core.store import schema
from g2l_core.store.features import FeatureStore
from g2l_core.store.verify import verify
from tests.pipeline.stage_one_process import BATCH_SIZE, N_VIEWS, SHARD_ROWS, start

KEY = "timm-mobilenetv3_small_050-64-random0"
KILLS = int(os.environ.get("G2L_KILLS", "8"))
"""Kills of one run. 20 were tried for docs/reliability.md: `G2L_KILLS=20 pytest tests/pipeline/test_resume.py`."""
SEED = int(os.environ.get("G2L_KILL_SEED", "2"))
"""Seed of the moments of the kills."""

SHARD_SET = SHARD_ROWS * N_VIEWS
"""Views that are in work together: one shard of rows, all of its views."""


def to_the_end(manifest, store, log):
    process = start(manifest, store, log)
    process.join(timeout=120)
    assert process.exitcode == 0
    return json.loads(log.with_suffix(".json").read_text())


def batches_in(log):
    return log.stat().st_size if log.exists() else 0


def kill_during(process, reached, delay):
    """SIGKILL once `reached()` holds and `delay` seconds have passed; whether the process was still at work."""
    while process.is_alive() and not reached():
        sleep(0.001)
    sleep(delay)
    process.kill()
    process.join(timeout=60)
    return process.exitcode == -signal.SIGKILL


def recorded_shards(store):
    """Inode and time of change of every shard file that has a completion record."""
    found = {}
    for slide in FeatureStore.open(store).slides() if (store / "zarr.json").exists() else []:
        for shard in slide.shards(range(slide.n_views)):
            if KEY in slide.encoder_keys and shard.name in slide.feature_facts(KEY).shards:
                file = slide.shard_path(KEY, shard)
                found[file] = (file.stat().st_ino, file.stat().st_mtime_ns)
    return found


def require_equal_arrays(left, right):
    ours, theirs = (zarr.open_group(path, mode="r") for path in (left, right))
    slides = FeatureStore.open(left).slide_ids()
    assert slides == FeatureStore.open(right).slide_ids()
    for slide in slides:
        for name in ("coords", "patch_status", "view_params", "pixel_hash", f"features/{KEY}"):
            a, b = (root[f"slides/{slide}/{name}"] for root in (ours, theirs))
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert np.array_equal(a[:].view(np.uint8), b[:].view(np.uint8)), f"{slide} {name}"
            assert dict(a.attrs) == dict(b.attrs)


@pytest.mark.slow
def test_kill_nine_and_the_same_command_again(cohort, tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "SHARD_ROWS", SHARD_ROWS)
    whole, killed, log = tmp_path / "whole.zarr", tmp_path / "killed.zarr", tmp_path / "log"
    reference = to_the_end(cohort, whole, tmp_path / "whole.log")
    assert reference["complete"]
    batches = batches_in(tmp_path / "whole.log")
    rng = random.Random(SEED)
    moments = [lambda: (killed / "zarr.json").exists(), *([None] * (KILLS - 1))]
    kills = 0
    for moment in moments:
        before = recorded_shards(killed)
        target = batches_in(log) + rng.randrange(batches // (KILLS + 12), batches // (KILLS + 4))
        process = start(cohort, killed, log)
        kills += kill_during(process, moment or (lambda t=target: batches_in(log) >= t), rng.uniform(0, 0.03))
        after = recorded_shards(killed)
        assert before.items() <= after.items()
    assert kills == KILLS
    before = recorded_shards(killed)
    assert before  # the kills fell into the middle of the work
    summary = to_the_end(cohort, killed, log)
    assert summary["complete"]
    assert 0 < summary["encoded"] < reference["patches"]
    assert before.items() <= recorded_shards(killed).items()
    require_equal_arrays(killed, whole)

    assert {problem.kind for problem in verify(FeatureStore.open(killed))} <= {"leftover"}
    # A kill costs what was encoded of one unfinished shard set, the batches in flight and the one in work; each
    # run pads one batch.
    encoded_twice = batches_in(log) * BATCH_SIZE - reference["patches"] * N_VIEWS
    assert encoded_twice <= kills * (SHARD_SET + (IN_FLIGHT + 1) * BATCH_SIZE) + (kills + 1) * BATCH_SIZE

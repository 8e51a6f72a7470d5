"""A set of patch images is one shard: a kill in its middle loses what was encoded in the last moments alone."""

import shutil

import numpy as np
import pytest

from g2l_core.encoders.resolve import resolve_encoder
from g2l_core.extraction import batching, extract, unfinished
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.views import ViewSpec
from g2l_core.store.features import FeatureStore
from g2l_core.store.verify import verify
from pipeline.cache_teacher import run_extraction
from pipeline.extract import ExtractionSettings
from tests.conftest import TEACHER

KEY = "timm-mobilenetv3_small_050-64-random0"
BATCH, VIEWS = 16, 2


class Killed(BaseException):
    """Stands in for a signal: nothing of G2L catches it."""


@pytest.fixture
def images(crc_patches, tmp_path):
    """96 real patches of one set; the 11th cannot be decoded."""
    folder = tmp_path / "patches"
    folder.mkdir()
    for i, path in enumerate(sorted(crc_patches.rglob("*.jpg"))[:48] * 2):
        shutil.copy(path, folder / f"{i:03d}.jpg")
    (folder / "010.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture
def encoded(monkeypatch):
    """The batches that were encoded; a number in `encoded.stop` ends the run before that batch."""
    real = batching.encode

    class Log(list):
        stop = None

    log = Log()

    def encode(encoder, pixels):
        if log.stop is not None and len(log) >= log.stop:
            raise Killed
        log.append(len(pixels))
        return real(encoder, pixels)

    monkeypatch.setattr(batching, "encode", encode)
    monkeypatch.setattr(extract, "SAVE_EVERY_S", 0.0)
    return log


def cache(images, store, weights="random:0"):
    settings = ExtractionSettings(views=VIEWS - 1, batch_size=BATCH, workers=1)
    grid = GridSpec(patch_px=224)
    spec = resolve_encoder(TEACHER, weights=weights)
    return run_extraction([images], store, [spec], grid, ViewSpec(patch_px=224, crop_px=224), settings)


def content(store):
    (slide,) = FeatureStore.open(store).slides()
    return [slide.patch_status, slide.pixel_hash, *(slide.features(KEY, view=view) for view in range(VIEWS))]


def same(left, right):
    return all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in zip(left, right, strict=True))


def left_over(tmp_path):
    return sorted((tmp_path / ".killed.zarr.unfinished").glob("*"))


def killed_after(batches, encoded, images, store):
    encoded.clear()
    encoded.stop = batches
    with pytest.raises(Killed):
        cache(images, store)
    encoded.stop = None
    encoded.clear()


def test_a_kill_inside_of_a_shard_loses_the_last_moments_alone(images, encoded, tmp_path):
    cache(images, tmp_path / "whole.zarr")
    in_all = len(encoded)
    killed_after(7, encoded, images, tmp_path / "killed.zarr")
    (file,) = left_over(tmp_path)
    (slide,) = FeatureStore.open(tmp_path / "killed.zarr").slides()
    assert not slide.records(KEY)  # nothing of this counts in the store
    with file.open("ab") as torn:
        torn.write(b"torn")
    again = cache(images, tmp_path / "killed.zarr")
    # the batches in flight and the blocks read ahead, no more
    assert in_all - 7 <= len(encoded) <= in_all - 7 + batching.IN_FLIGHT + 64 * VIEWS // BATCH
    assert next(iter(again.unreadable.values()))[0].startswith("row")  # a loss is told, however often it is interrupted
    assert same(content(tmp_path / "killed.zarr"), content(tmp_path / "whole.zarr"))
    assert list(verify(FeatureStore.open(tmp_path / "killed.zarr"))) == []
    assert not (tmp_path / ".killed.zarr.unfinished").exists()


@pytest.mark.parametrize("damage", ["flipped", "another encoder's", "in the way"])
def test_what_is_left_is_used_only_if_it_is_what_was_written(images, encoded, tmp_path, damage):
    cache(images, tmp_path / "whole.zarr")
    in_all = len(encoded)
    killed_after(7, encoded, images, tmp_path / "killed.zarr")
    (file,) = left_over(tmp_path)
    whole = file.read_bytes()
    if damage == "flipped":
        middle = len(whole) // 2
        file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    elif damage == "another encoder's":
        file.write_bytes(whole.replace(b'"digest": "', b'"digest": "0', 1))
    else:
        file.unlink()
        file.parent.rmdir()
        file.parent.write_text("in the way")
    cache(images, tmp_path / "killed.zarr")
    assert (len(encoded) < in_all) == (damage == "flipped")
    assert same(content(tmp_path / "killed.zarr"), content(tmp_path / "whole.zarr"))


def test_what_is_kept_is_counted_as_it_is(images, encoded, tmp_path, monkeypatch):
    """The count that Ctrl-C tells: never more than the next call is spared."""
    counts = []
    kept = extract._kept

    def watched(progress, buffers):
        counts.append(kept(progress, buffers))
        return counts[-1]

    monkeypatch.setattr(extract, "_kept", watched)
    killed_after(7, encoded, images, tmp_path / "killed.zarr")
    told = counts[-1]
    assert 0 < told < 96
    (file,) = left_over(tmp_path)
    assert file.stat().st_size > 0
    reads = []
    real = extract.render_block
    monkeypatch.setattr(extract, "render_block", lambda r, rows, *a: (reads.extend(rows), real(r, rows, *a))[1])
    cache(images, tmp_path / "killed.zarr")
    assert told - 2 <= 96 - len(reads) <= told + BATCH * (batching.IN_FLIGHT + 1)


def test_a_file_of_rows_reads_back_what_was_appended(tmp_path, cached_store):
    from g2l_core.store.features import Shard

    store = FeatureStore.open(shutil.copytree(cached_store, tmp_path / "s.zarr"))
    slide = next(store.slides())
    n, shards = len(slide), [Shard(0, len(slide), 0), Shard(0, len(slide), 2)]
    rng = np.random.default_rng(0)
    features = rng.standard_normal((2, n, 5)).astype(np.float16)
    hashes = rng.integers(1, 2**60, (2, n)).astype(np.uint64)
    new = rng.random((2, n)) < 0.5
    file = unfinished.UnfinishedShard(store, slide, "e", "d", 5, 0)
    assert file.append(shards, features, hashes, new & (np.arange(n) < n // 2))
    assert file.append(shards, features, hashes, new & (np.arange(n) >= n // 2))
    got, got_hashes = np.zeros_like(features), np.zeros_like(hashes)
    kept = unfinished.UnfinishedShard(store, slide, "e", "d", 5, 0).read(shards, got, got_hashes)
    assert np.array_equal(kept, new)
    assert np.array_equal(got[kept], features[kept])
    assert np.array_equal(got_hashes[kept], hashes[kept])
    assert not unfinished.UnfinishedShard(store, slide, "e", "other", 5, 0).read(shards, got, got_hashes).any()
    assert not file.path.exists()


def test_a_run_that_wants_fewer_views_than_the_killed_one_still_writes_its_shards(tmp_path, cached_store):
    """All that it wants was kept: nothing would be encoded, and so nothing be written."""
    from g2l_core.store.features import Shard

    store = FeatureStore.open(shutil.copytree(cached_store, tmp_path / "s.zarr"))
    slide = next(store.slides())
    n, three = len(slide), [Shard(0, len(slide), view) for view in range(3)]
    features, hashes = np.ones((3, n, 5), np.float16), np.ones((3, n), np.uint64)
    file = unfinished.UnfinishedShard(store, slide, "e", "d", 5, 0)
    assert file.append(three, features, hashes, np.ones((3, n), bool))
    for shards in (three[:1], three[:2], three):
        kept = file.read(shards, features[: len(shards)], hashes[: len(shards)])
        assert (~kept).sum() == 1

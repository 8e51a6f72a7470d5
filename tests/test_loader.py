"""The replayed stream: a permutation, a function of (seed, epoch), resumable anywhere, checked against the store."""

import shutil

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from g2l_core.errors import StoreCorruptError, StoreMismatchError, StoreMissingError, UsageError
from g2l_core.loader import EpochOrder, ReplayLoader, ReplaySpec, good_rows, read_canonical
from g2l_core.store.features import FeatureStore
from g2l_core.views import pixel_hash

KEY = "timm-mobilenetv3_small_050-64-random0"


def spec(**changes):
    return ReplaySpec(**{"encoder": KEY, "n_augmented": 2, "batch_size": 8, "pool_blocks": 2, **changes})


@pytest.fixture(scope="module")
def store(cached_store):
    return FeatureStore.open(cached_store)


@pytest.fixture(scope="module")
def rows(store):
    return {slide.slide_id: good_rows(slide) for slide in store.slides()}


def drain(order):
    batches = []
    while (batch := order.draw()) is not None:
        batches.append(batch)
    return batches


@given(st.lists(st.integers(1, 64), min_size=1, max_size=40), st.integers(1, 8), st.integers(2, 16), st.integers(0, 3))
def test_an_epoch_draws_every_row_once(block_rows, pool, batch_size, epoch):
    order = EpochOrder(block_rows, spec(pool_blocks=pool, batch_size=batch_size), epoch)
    drawn = [(int(order.order[p]), r) for batch in drain(order) for p, r in batch.tolist()]
    everything = {(b, r) for b, n in enumerate(block_rows) for r in range(n)}
    assert len(drawn) == len(set(drawn)) == sum(block_rows) // batch_size * batch_size
    assert set(drawn) <= everything


@given(st.lists(st.integers(1, 64), min_size=2, max_size=30), st.integers(0, 20))
def test_waiting_is_what_is_still_to_come(block_rows, steps):
    order = EpochOrder(block_rows, spec(), 0)
    for _ in range(steps):
        order.draw()
    waiting = {(p, r) for p, found in order.waiting() for r in found.tolist()}
    drawn = {(p, r) for batch in drain(order) for p, r in batch.tolist()}
    assert drawn <= waiting
    assert len(waiting - drawn) < 8


def test_a_pool_of_256_blocks_mixes_a_batch():
    order = EpochOrder([64] * 2000, spec(pool_blocks=256, batch_size=32), 0)
    distinct = [len(np.unique(order.draw()[:, 0])) for _ in range(200)]
    assert np.mean(distinct) >= 30.1  # what independent draws would give: 256 (1 - (255/256)^32)


def test_epochs_and_seeds_differ():
    orders = [EpochOrder([64] * 20, spec(seed=s), e).draw().tolist() for s, e in ((0, 0), (0, 1), (1, 0))]
    assert len({str(order) for order in orders}) == 3
    assert EpochOrder([64] * 20, spec(), 0).draw().tolist() == orders[0]


def first(loader, count, start=0):
    stream = loader.batches(start)
    return [next(stream) for _ in range(count)]


def test_batches_do_not_depend_on_threads_or_on_where_they_start(store, rows):
    whole = first(ReplayLoader(store, rows, spec(), workers=3), 40)
    per_epoch = ReplayLoader(store, rows, spec(), workers=1).batches_per_epoch
    assert per_epoch < 40  # the stream crosses into a second epoch
    for start in (0, 5, per_epoch - 1, per_epoch + 2):
        again = first(ReplayLoader(store, rows, spec(), workers=1), 3, start)
        for ours, theirs in zip(again, whole[start:], strict=False):
            assert (ours.position, ours.epoch) == (theirs.position, theirs.epoch)
            assert np.array_equal(ours.pixels, theirs.pixels)
            assert np.array_equal(ours.targets, theirs.targets)


def test_pixels_and_targets_belong_together(store, rows):
    of_hash = {}
    for slide in store.slides():
        hashes = slide.pixel_hash
        for view in (1, 2):
            features = slide.features(KEY, view=view)
            of_hash |= {int(h): f for h, f in zip(hashes[:, view], features, strict=True)}
    for batch in first(ReplayLoader(store, rows, spec(), workers=2), 10):
        for h, target in zip(pixel_hash(batch.pixels), batch.targets, strict=True):
            assert np.array_equal(of_hash[int(h)], target)


def test_two_epochs_show_both_views_of_every_patch(store, rows):
    loader = ReplayLoader(store, rows, spec(batch_size=2), workers=2)
    seen = {int(h) for b in first(loader, 2 * loader.batches_per_epoch) for h in pixel_hash(b.pixels)}
    stored = {int(h) for slide in store.slides() for h in slide.pixel_hash[:, 1:].ravel()}
    assert seen <= stored
    assert len(stored - seen) <= 2  # an odd row out an epoch


def test_canonical_set_is_view_zero_and_bounded(store, rows):
    found = read_canonical(store, rows, KEY, limit=50, seed=0)
    stored = {int(h) for slide in store.slides() for h in slide.pixel_hash[:, 0]}
    assert len(found.pixels) == 50
    assert {int(h) for h in pixel_hash(found.pixels)} <= stored


@pytest.fixture
def copy(cached_store, tmp_path):
    return shutil.copytree(cached_store, tmp_path / "copy.zarr")


def slide_group(path):
    return zarr.open_group(path)["slides/p01-1"]


def test_other_pixels_are_refused(copy, rows):
    slide_group(copy)["pixel_hash"][:, 1:] = 7
    loader = ReplayLoader(FeatureStore.open(copy), {"p01-1": rows["p01-1"]}, spec())
    with pytest.raises(StoreMismatchError, match=r"slide p01-1, row \d+, view [12]: the pixels are not those"):
        next(loader.batches())


def test_nan_targets_are_refused(copy, rows):
    slide_group(copy)[f"features/{KEY}"][:, 1:, 3] = np.nan
    loader = ReplayLoader(FeatureStore.open(copy), {"p01-1": rows["p01-1"]}, spec())
    with pytest.raises(StoreCorruptError, match="p01-1.*not finite"):
        next(loader.batches())


def test_a_changed_slide_is_refused(copy, rows):
    group = slide_group(copy)
    group.attrs["g2l"] = {**group.attrs["g2l"], "fingerprint": "0" * 32}
    with pytest.raises(StoreMismatchError, match="p01-1.*is not the file that was cached"):
        ReplayLoader(FeatureStore.open(copy), rows, spec())


def test_missing_views_are_refused(store, rows):
    with pytest.raises(StoreMissingError, match=r"view 3 of .* is not complete"):
        ReplayLoader(store, rows, spec(n_augmented=3))


def test_fewer_rows_than_a_batch_are_refused(store, rows):
    with pytest.raises(UsageError, match=r"patches to train on are fewer than one batch of 4096"):
        ReplayLoader(store, rows, spec(batch_size=4096))


def test_a_batch_of_one_is_refused():
    with pytest.raises(UsageError, match="no batch statistics"):
        spec(batch_size=1)

"""The replayed stream: a permutation, a function of (seed, epoch), resumable anywhere, checked against the store."""

import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from g2l_core.distillation.held_out import read_held_out
from g2l_core.distillation.loader import Reading, ReplayDataset
from g2l_core.distillation.replay import ReplaySpec, good_rows
from g2l_core.distillation.sampling import SEGMENT_BLOCKS, BatchOrder, plan_segment
from g2l_core.errors import StoreCorruptError, StoreMismatchError, StoreMissingError, UsageError
from g2l_core.patches.pixel_cache import PixelCache
from g2l_core.patches.reader_pool import ReaderPool
from g2l_core.patches.views import pixel_hash
from g2l_core.rng import keyed_generator
from g2l_core.store.features import FeatureStore
from tests.store.toy import change_facts

KEY = "timm-mobilenetv3_small_050-64-random0"


def spec(**changes):
    return ReplaySpec(**{"encoders": (KEY,), "n_augmented": 2, "batch_size": 8, "pool_blocks": 2, **changes})


@pytest.fixture(scope="module")
def store(cached_store):
    return FeatureStore.open(cached_store)


@pytest.fixture(scope="module")
def rows(store):
    return {slide.slide_id: good_rows(slide) for slide in store.slides()}


def plan(block_rows, *, batch_size=8, pool=2, seed=0):
    sizes = np.array(block_rows, np.uint8)
    return plan_segment(sizes, batch_size=batch_size, pool_blocks=pool, rng=keyed_generator("epoch", seed))


def order_of(block_rows, *, batch_size=8, seed=0, share=slice(None), segment_blocks=SEGMENT_BLOCKS):
    sizes = np.array(block_rows, np.uint8)
    return BatchOrder(
        sizes, batch_size=batch_size, pool_blocks=2, seed=seed, share=share, segment_blocks=segment_blocks
    )


@given(st.lists(st.integers(0, 64), min_size=1, max_size=40), st.integers(2, 16), st.integers(0, 3), st.integers(1, 50))
def test_an_epoch_draws_every_row_once(block_rows, batch_size, epoch, segment_blocks):
    """But for a remainder of each segment. Blocks of which nothing is chosen do no harm."""
    order = order_of(block_rows, batch_size=batch_size, segment_blocks=segment_blocks)
    per_epoch = order.batches_per_epoch
    segments = -(-len(block_rows) // segment_blocks)
    assert per_epoch == max(0, sum(block_rows) // batch_size - (segments - 1))
    if not per_epoch:
        return
    reads = order.reads(epoch * per_epoch)
    drawn = []
    while len(drawn) < per_epoch * batch_size:
        read = next(reads)
        assert read.epoch == epoch
        drawn += [(read.block, row) for row in read.rows.tolist()]
    everything = {(b, r) for b, n in enumerate(block_rows) for r in range(n)}
    assert len(drawn) == len(set(drawn)) == per_epoch * batch_size
    assert set(drawn) <= everything
    found = list(itertools.islice(order.batches(epoch * per_epoch), per_epoch + 1))
    assert [batch.epoch for batch in found] == [epoch] * per_epoch + [epoch + 1]
    assert [batch.position for batch in found] == list(range(epoch * per_epoch, (epoch + 1) * per_epoch + 1))


@given(st.lists(st.integers(1, 64), min_size=5, max_size=40), st.integers(0, 200), st.integers(2, 50))
def test_the_order_is_the_same_from_wherever_it_starts(block_rows, start, segment_blocks):
    order = order_of(block_rows, segment_blocks=segment_blocks)
    if order.batches_per_epoch:
        whole = list(itertools.islice(order.batches(0), start + 3))
        again = list(itertools.islice(order_of(block_rows, segment_blocks=segment_blocks).batches(start), 3))
        assert [b.rows.tolist() for b in again] == [b.rows.tolist() for b in whole[start:]]
        assert [b.epoch for b in again] == [b.epoch for b in whole[start:]]


@given(st.lists(st.integers(1, 64), min_size=2, max_size=30), st.integers(0, 20), st.sampled_from([1, 2, 4]))
def test_a_plan_lists_what_a_rank_has_still_to_read(block_rows, steps, world):
    found = plan(block_rows)
    part = 8 // world
    read = []
    for rank in range(world):
        reads = found.reads(slice(steps, None), slice(rank * part, (rank + 1) * part))
        assert [place for place, _ in reads] == sorted({place for place, _ in reads})
        assert all((np.diff(rows) > 0).all() for _, rows in reads)
        read += [(place, row) for place, rows in reads for row in rows.tolist()]
    assert sorted(read) == sorted(map(tuple, found.batches[steps:].reshape(-1, 2).tolist()))


@given(st.lists(st.integers(1, 64), min_size=8, max_size=40), st.integers(1, 6))
def test_a_batch_is_drawn_from_a_pool_of_so_many_blocks(block_rows, pool):
    """Nothing is drawn before the blocks ahead of it have shrunk to the pool: places lie close to the oldest left."""
    found = plan(block_rows, pool=pool)
    left = {(p, r) for p, n in enumerate(block_rows) for r in range(n)}
    for batch in found.batches:
        furthest = int(batch[:, 0].max())
        waiting = sum(1 for p, _ in left if p < furthest)
        assert waiting < pool * 64
        left -= set(map(tuple, batch.tolist()))


def test_a_pool_of_256_blocks_mixes_a_batch():
    found = plan([64] * 2000, pool=256, batch_size=32)
    distinct = [len(np.unique(batch[:, 0])) for batch in found.batches[:200]]
    assert np.mean(distinct) >= 30.1  # what independent draws would give: 256 (1 - (255/256)^32)


def test_epochs_and_seeds_differ():
    orders = [order_of([64] * 20, seed=seed) for seed in (0, 0, 1)]
    starts = [0, orders[0].batches_per_epoch, 0]
    firsts = [
        sorted((order.reads(start).__next__().block, *next(order.batches(start)).rows[0].tolist()))
        for order, start in zip(orders, starts, strict=True)
    ]
    assert len({str(found) for found in firsts}) == 3


def first(loader, count, start=0):
    stream = loader.batches(start)
    return [next(stream) for _ in range(count)]


def test_batches_do_not_depend_on_threads_or_on_where_they_start(store, rows):
    whole = first(ReplayDataset(store, rows, spec(), Reading(workers=3)), 40)
    per_epoch = ReplayDataset(store, rows, spec(), Reading(workers=1)).batches_per_epoch
    assert per_epoch < 40  # the stream crosses into a second epoch
    for start in (0, 5, per_epoch - 1, per_epoch + 2):
        again = first(ReplayDataset(store, rows, spec(), Reading(workers=1)), 3, start)
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
    for batch in first(ReplayDataset(store, rows, spec(), Reading(workers=2)), 10):
        for h, target in zip(pixel_hash(batch.pixels), batch.targets, strict=True):
            assert np.array_equal(of_hash[int(h)], target)


def test_two_epochs_show_both_views_of_every_patch(store, rows):
    loader = ReplayDataset(store, rows, spec(batch_size=2), Reading(workers=2))
    seen = {int(h) for b in first(loader, 2 * loader.batches_per_epoch) for h in pixel_hash(b.pixels)}
    stored = {int(h) for slide in store.slides() for h in slide.pixel_hash[:, 1:].ravel()}
    assert seen <= stored
    assert len(stored - seen) <= 2  # an odd row out an epoch


def test_canonical_set_is_view_zero_and_bounded(store, rows):
    found = read_held_out(store, rows, [KEY], limit=50, seed=0)
    stored = {int(h) for slide in store.slides() for h in slide.pixel_hash[:, 0]}
    assert len(found.pixels) == 50
    assert {int(h) for h in pixel_hash(found.pixels)} <= stored


@pytest.fixture
def copy(cached_store, tmp_path):
    return shutil.copytree(cached_store, tmp_path / "copy.zarr")


def first_slide(path):
    return FeatureStore.open(path, writable=True).slide("p01-1")


def test_other_pixels_are_refused(copy, rows):
    slide = first_slide(copy)
    hashes = slide.pixel_hash
    hashes[:, 1:] = 7
    slide.put_table("pixel_hash", hashes)
    loader = ReplayDataset(FeatureStore.open(copy), {"p01-1": rows["p01-1"]}, spec())
    with pytest.raises(StoreMismatchError, match=r"slide p01-1, row \d+, view [12]: the pixels are not those"):
        next(loader.batches())


@pytest.mark.parametrize("value", [np.nan, 1.0])
def test_other_targets_than_were_written_are_refused(copy, rows, value):
    zarr.open_group(copy)[f"slides/p01-1/features/{KEY}"][:, 1:, 3] = value
    chosen = {"p01-1": rows["p01-1"]}
    with pytest.raises(StoreCorruptError, match="p01-1.*recorded"):
        ReplayDataset(FeatureStore.open(copy), chosen, spec())
    loader = ReplayDataset(FeatureStore.open(copy), chosen, spec(), Reading(targets_gb=0))
    with pytest.raises(StoreCorruptError, match="p01-1.*recorded"):
        next(loader.batches())


def test_shards_that_were_swapped_are_refused(copy, rows):
    one, other = (copy / f"slides/{slide_id}/features/{KEY}/c.0.1.0" for slide_id in ("p01-1", "p02-1"))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    with pytest.raises((StoreCorruptError, StoreMissingError), match=r"p0[12]-1"):
        next(ReplayDataset(FeatureStore.open(copy), rows, spec(), Reading(targets_gb=0)).batches())


def test_a_changed_slide_is_refused(copy, rows):
    change_facts(first_slide(copy), fingerprint="0" * 32, file_state=None)
    with pytest.raises(StoreMismatchError, match="p01-1.*is not the file that was cached"):
        ReplayDataset(FeatureStore.open(copy), rows, spec())


def test_all_good_rows_need_not_be_listed(store, rows):
    listed = first(ReplayDataset(store, rows, spec(), Reading(workers=2)), 12)
    assert same_batches(first(ReplayDataset(store, dict.fromkeys(rows), spec()), 12), listed)


def test_missing_views_are_refused(store, rows):
    with pytest.raises(StoreMissingError, match=r"view 3 of .* is not complete"):
        ReplayDataset(store, rows, spec(n_augmented=3))


def test_fewer_rows_than_a_batch_are_refused(store, rows):
    with pytest.raises(UsageError, match=r"patches to train on are fewer than one batch of 4096"):
        ReplayDataset(store, rows, spec(batch_size=4096))


def test_a_batch_of_one_is_refused():
    with pytest.raises(UsageError, match="no batch statistics"):
        spec(batch_size=1)


# ---- as a dataset for PyTorch -----------------------------------------------------------------------------------


def test_a_data_loader_gives_the_batches_as_tensors(store, rows):
    loader = DataLoader(ReplayDataset(store, rows, spec()), batch_size=None, num_workers=0)
    for found, wanted in zip(loader, first(ReplayDataset(store, rows, spec()), 5), strict=False):
        assert (found.position, found.epoch) == (wanted.position, wanted.epoch)
        assert isinstance(found.pixels, torch.Tensor)
        assert np.array_equal(found.pixels, wanted.pixels)
        assert np.array_equal(found.targets, wanted.targets)


def test_a_state_dict_resumes_with_the_same_batches(store, rows):
    whole = ReplayDataset(store, rows, spec())
    count = whole.batches_per_epoch + 2
    stream = iter(DataLoader(whole, batch_size=None, num_workers=0))
    states, batches = [], []
    for _ in range(count):
        states.append(whole.state_dict())
        batches.append(next(stream))
    assert states == [{"position": i} for i in range(count)]
    for i in (0, 3, count - 2):
        resumed = ReplayDataset(store, rows, spec(), Reading(workers=1))
        resumed.load_state_dict(states[i])
        again = list(itertools.islice(DataLoader(resumed, batch_size=None, num_workers=0), 2))
        assert same_batches(again, batches[i : i + 2])
        assert resumed.state_dict() == {"position": i + 2}
        assert next(iter(resumed)).position == i + 2  # iterating goes on where it ended


def test_worker_processes_are_refused(store, rows, monkeypatch):
    dataset = ReplayDataset(store, rows, spec())
    monkeypatch.setattr("g2l_core.distillation.loader.get_worker_info", object)  # as in a worker process
    with pytest.raises(UsageError, match="reads ahead in threads of its own"):
        next(iter(dataset))


# ---- ranks, memory, new views, the pixel cache ------------------------------------------------------------------


def same_batches(ours, theirs):
    return len(ours) == len(theirs) and all(
        np.array_equal(a.pixels, b.pixels) and np.array_equal(a.targets, b.targets) and a.epoch == b.epoch
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("start", [0, 7])
def test_ranks_share_the_batches_of_one(store, rows, start):
    whole = first(ReplayDataset(store, rows, spec()), 30, start)
    parts = [
        first(ReplayDataset(store, rows, spec(), Reading(workers=1, rank=rank, world=2)), 30, start) for rank in (0, 1)
    ]
    for batch, low, high in zip(whole, *parts, strict=True):
        assert np.array_equal(batch.pixels, np.concatenate([low.pixels, high.pixels]))
        assert np.array_equal(batch.targets, np.concatenate([low.targets, high.targets]))
    with pytest.raises(UsageError, match="a batch of 8 cannot be parted among 3 ranks"):
        ReplayDataset(store, rows, spec(), Reading(world=3))


def test_targets_are_the_same_from_memory_and_from_blocks(store, rows):
    held = ReplayDataset(store, rows, spec(), Reading(targets_gb=1))
    read = ReplayDataset(store, rows, spec(), Reading(targets_gb=0))
    assert same_batches(first(held, 12), first(read, 12))


def test_a_live_teacher_can_have_new_views_every_epoch(store, rows):
    """View 1 + epoch of every patch; those that are stored have the stored pixels, later ones none seen before."""
    loader = ReplayDataset(store, rows, spec(encoders=(), n_augmented=0), Reading(workers=2))
    stream = loader.batches()
    epochs = [
        [int(h) for _ in range(loader.batches_per_epoch) for h in pixel_hash(next(stream).pixels)] for _ in range(4)
    ]
    stored = [{int(h) for s in store.slides() for h in s.pixel_hash[:, view]} for view in (1, 2)]
    assert set(epochs[0]) <= stored[0]
    assert set(epochs[1]) <= stored[1]
    assert not set(epochs[2]) & (stored[0] | stored[1])
    assert not set(epochs[2]) & set(epochs[3])
    assert next(stream).targets.shape == (8, 0)
    with pytest.raises(UsageError, match="a new view every epoch needs a teacher that runs live"):
        spec(n_augmented=0)


def test_the_pixel_cache_gives_the_same_batches_without_the_slides(store, rows, tmp_path, monkeypatch):
    wanted = first(ReplayDataset(store, rows, spec(), Reading(workers=2)), 30)
    cached = ReplayDataset(store, rows, spec(), Reading(workers=2, pixel_cache=PixelCache(tmp_path, 1.0)))
    assert same_batches(first(cached, 30), wanted)
    again = ReplayDataset(store, rows, spec(), Reading(workers=2, pixel_cache=PixelCache(tmp_path, 1.0)))
    monkeypatch.setattr("g2l_core.distillation.replay.open_patches", None)  # what is kept needs no slide
    per_epoch = again.batches_per_epoch
    assert same_batches(first(again, min(30, per_epoch)), wanted[:per_epoch])


def test_the_pixel_cache_is_bounded_and_distrusts_torn_patches(store, rows, tmp_path):
    size = 256 * 256 * 3
    first(ReplayDataset(store, rows, spec(), Reading(pixel_cache=PixelCache(tmp_path, 10.5 * size / 1e9))), 30)
    kept = sum(int(np.count_nonzero(np.fromfile(p, np.uint64))) for p in tmp_path.glob("*.hashes"))
    assert kept == 10
    for path in tmp_path.glob("*.pixels"):
        pixels = np.memmap(path, np.uint8, "r+")
        pixels[pixels > 0] = 1
    torn = ReplayDataset(store, rows, spec(), Reading(pixel_cache=PixelCache(tmp_path, 10.5 * size / 1e9)))
    assert same_batches(first(torn, 30), first(ReplayDataset(store, rows, spec()), 30))


def test_a_pixel_cache_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot make the pixel cache"):
        PixelCache(tmp_path / "file" / "cache", 1.0)


class Counted:
    """A reader that knows how many are open."""

    open = 0
    most = 0

    def __init__(self):
        Counted.open += 1
        Counted.most = max(Counted.most, Counted.open)
        self.closed = False

    def read(self, row):
        assert not self.closed
        return row

    def close(self):
        assert not self.closed
        self.closed = True
        Counted.open -= 1


def test_no_more_slides_are_open_than_may_be_and_none_is_closed_while_read():
    Counted.open = Counted.most = 0
    slides = ReaderPool(lambda _: Counted(), max_open=4)

    def read(i):
        with slides.reading(f"s{i * 7 % 30}") as reader:
            return reader.read(i)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(3000))) == list(range(3000))
    assert Counted.open <= 4
    assert Counted.most <= 4 + 2 * 8  # those being read, and those opened twice at once
    with slides.reading("kept") as reader:
        for i in range(50):
            read(i)
        assert reader.read(1) == 1

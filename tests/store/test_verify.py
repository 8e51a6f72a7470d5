"""verify() finds what was damaged, names it, and calls unfinished work by its milder name."""

from dataclasses import replace

import numpy as np
import pytest
import zarr
from numcodecs.checksum32 import CRC32C

from g2l_core.errors import StoreCorruptError
from g2l_core.store.changes import merged
from g2l_core.store.features import FeatureStore, Shard, leftovers
from g2l_core.store.verify import verify
from g2l_core.store.writer import FeatureWriter
from tests.store.test_features import DAMAGES
from tests.store.toy import DIM, ENCODER, change_facts, change_features, fill, lay


def problems(store):
    return list(verify(FeatureStore.open(store.path)))


def only(store):
    (found,) = problems(store)
    return found


def features_group(store):
    return zarr.open_group(store.path)["slides/a/x/features"]


def test_a_sound_store_has_no_problem(toy):
    assert problems(toy) == []


def test_a_cached_store_has_no_problem(cached_store):
    assert list(verify(FeatureStore.open(cached_store))) == []


def test_unreadable_patches_are_no_damage(toy):
    fill(lay(toy, "e", n=20), status=np.array([1] * 16 + [0, 1, 0, 0], np.uint8))
    assert problems(toy) == []


@pytest.mark.parametrize("damage", [*DAMAGES.values(), lambda _: b""], ids=[*DAMAGES, "empty"])
@pytest.mark.parametrize("shard", [Shard(0, 16, 1), Shard(16, 20, 0)], ids=["whole shard", "last shard"])
def test_a_damaged_file_is_named(toy, damage, shard):
    path = toy.slide("b/x").shard_path(ENCODER, shard)
    path.write_bytes(damage(path.read_bytes()))
    found = only(toy)
    assert (found.kind, found.slide_id, found.encoder) == ("damaged", "b/x", ENCODER)
    assert f"view {shard.view}, rows {shard.start} to {shard.stop}: its file" in found.what
    assert f"The file is {path.relative_to(toy.path)}; g2l store verify --repair drops it" in found.what
    assert str(found).startswith("damaged  slide b/x toy: view")
    path.unlink()
    fill(toy.slide("b/x"))
    assert problems(toy) == []


def test_values_that_zarr_wrote_but_nobody_recorded(toy):
    features_group(toy)[ENCODER][3, 1, 2] = 9.0
    found = only(toy)
    assert (found.kind, found.shard) == ("damaged", Shard(0, 16, 1))
    assert "view 1, rows 0 to 16: 16 rows of crc32c" in found.what


def test_features_that_are_not_finite(toy):
    array = features_group(toy)[ENCODER]
    array[17, 0, 2] = np.nan
    slide = FeatureStore.open(toy.path, writable=True).slide("a/x")
    shards = dict(slide.facts.features[ENCODER].shards)
    shards["1.0"] = replace(shards["1.0"], crc32c=CRC32C.checksum(np.ascontiguousarray(array[16:, 0])))
    change_features(slide, ENCODER, shards=shards)
    assert "view 0, rows 16 to 20: features of readable patches are not finite" in only(toy).what


def test_absent_pixel_hashes(toy):
    slide = FeatureStore.open(toy.path, writable=True).slide("a/x")
    last = slide.pixel_hash[16:, 1].copy()
    last[2] = 0
    new = {"pixel_hash": slide.write_views("pixel_hash", 16, last[None], [1])}
    change_facts(slide, tables=merged(slide.facts.tables, new))
    assert "view 1, rows 16 to 20: pixel hashes of its patches are absent" in only(toy).what


def test_tables_that_disagree(toy):
    slide = zarr.open_group(toy.path)["slides/a/x"]
    slide["coords"].resize((19, 2))
    slide["pixel_hash"].resize((20, 1))
    found = problems(toy)
    assert {p.kind for p in found} == {"damaged"}
    assert [p.table for p in found] == ["coords", "pixel_hash"]
    places = ["slide a/x: coords has shape (19", "slide a/x: pixel_hash has shape (20"]
    assert [p.what.partition(",")[0] for p in found] == places


def test_a_table_that_cannot_be_read(toy):
    path = toy.path / "slides/a/x/coords/c.0.0"
    path.write_bytes(path.read_bytes()[:-1])
    assert only(toy).what.startswith("slide a/x: coords cannot be read")


@pytest.mark.parametrize("name", ["coords", "view_params", "pixel_hash"])
def test_a_table_whose_chunk_is_gone_reads_as_zeros_for_zarr_alone(toy, name):
    for path in (toy.path / "slides/a/x" / name).glob("c.*"):
        path.unlink()
    assert not zarr.open_group(toy.path)[f"slides/a/x/{name}"][:].any()
    found = only(toy)
    assert (found.kind, found.table) == ("damaged", name)
    assert "is not what was written: the checksum of block 0" in found.what
    with pytest.raises(StoreCorruptError, match=f"slide a/x: {name} is not what was written"):
        toy.slide("a/x").read_table(name)


@pytest.mark.parametrize("name", ["coords/c.0.0", "pixel_hash/c.0.0", "patch_status/c.0", "features/toy/c.0.1.0"])
def test_files_that_were_swapped(toy, name):
    fill(lay(toy, "e", n=40), status=np.array([1] * 3 + [0] * 37, np.uint8))
    one, other = (toy.path / "slides" / slide_id / name for slide_id in ("a/x", "e"))
    if not one.exists():
        one.write_bytes(other.read_bytes())
    else:
        content = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(content)
    assert {"damaged"} <= {p.kind for p in problems(toy)}


def test_a_table_that_is_gone(toy):
    (toy.path / "slides/a/x/pixel_hash/zarr.json").unlink()
    assert only(toy).what.startswith("slide a/x: pixel_hash cannot be read")


def test_features_of_another_length(toy):
    features_group(toy)[ENCODER].resize((18, 2, DIM))
    assert only(toy).what == "18 rows of features, but the slide has 20 patches"


def test_features_of_another_encoder_under_the_key(toy):
    change_features(FeatureStore.open(toy.path, writable=True).slide("a/x"), ENCODER, digest="f" * 64)
    assert only(toy).what == "written by an encoder of digest ffffffffffff, the store lists 000000000000"


def test_unfinished_work_is_missing(toy):
    lay(toy, "e")
    slide = lay(toy, "f", n=40)
    writer = FeatureWriter.open(slide, ENCODER, digest="0" * 64, dim=DIM, n_views=2)
    writer.write(
        Shard(0, 16, 0), np.ones((16, DIM), np.float16), np.arange(1, 17, dtype=np.uint64), np.zeros(16, np.uint8)
    )
    found = [(p.kind, p.slide_id, p.what) for p in problems(toy)]
    assert found == [
        ("missing", "e", "no features yet"),
        ("missing", "f", "view 0: 2 of 3 shards are not written yet"),
        ("missing", "f", "view 1: 3 of 3 shards are not written yet"),
    ]


def test_failed_slides_are_listed(toy):
    toy.fail_slide("z", "/z.svs", "no tissue")
    assert str(only(toy)) == "failed   slide z: no tissue"


def test_leftovers_are_found_and_nothing_else(toy):
    left = [toy.path / "slides/a/zarr.1.partial", toy.path / "slides/a/x/features/toy/.c.0.0.0.partial"]
    for path in left:
        path.write_bytes(b"half")
    assert {p.kind for p in problems(toy)} == {"leftover"}
    assert toy.slide_ids() == ["a/x", "b/x"]  # and no warning, which would fail this test
    assert toy.slide("a/x").encoder_keys == [ENCODER]
    assert leftovers(toy.path) == sorted(left)

"""The store's format as others read it, its identity, its completion records, and what it refuses."""

import json
import resource
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numcodecs.checksum32 import CRC32C

from g2l_core import files as files_module
from g2l_core.errors import (
    EncoderError,
    StoreCorruptError,
    StoreError,
    StoreMismatchError,
    StoreMissingError,
    UnknownNameError,
)
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.views import COLUMNS, ViewSpec, sample_views
from g2l_core.store import schema
from g2l_core.store.facts import EncoderFacts
from g2l_core.store.features import FeatureStore, Shard
from g2l_core.store.writer import FeatureWriter
from tests.store.toy import DIM, ENCODER, create, facts, features_of, fill, hashes_of, lay

KEY = "timm-mobilenetv3_small_050-64-random0"


def files(folder):
    return {p.relative_to(folder).as_posix(): zlib.crc32(p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def shard_files(slide):
    found = files(slide.folder / "features" / ENCODER)
    return {name: content for name, content in found.items() if name.startswith("c.")}


def reopened(store):
    return FeatureStore.open(store.path, writable=True)


# ---- the format, read with Zarr and NumPy alone ----------------------------------------------------------


def test_root_attributes(cached_store):
    attributes = zarr.open_group(cached_store, mode="r").attrs["g2l"]
    assert attributes["format"] == 2
    assert attributes["grid"] == GridSpec().to_json()
    assert attributes["views"] == json.loads(json.dumps(ViewSpec().to_json()))
    assert attributes["patch_status"] == {"ok": 0, "unreadable": 1, "pen": 2, "black": 3, "blurred": 4, "absent": 5}
    assert attributes["encoders"][KEY]["dim"] == 1024
    assert len(attributes["encoders"][KEY]["digest"]) == 64
    assert {"torch", "zarr", "numpy", "g2l"} <= set(attributes["software"])
    assert attributes["created"].endswith("+00:00")


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "chunks"),
    [
        ("coords", "int32", (2,), (4096, 2)),
        ("patch_status", "uint8", (), (4096,)),
        ("view_params", "float32", (3, 12), (4096, 1, 12)),
        ("pixel_hash", "uint64", (3,), (4096, 1)),
        (f"features/{KEY}", "float16", (3, 1024), (256, 1, 1024)),
    ],
)
def test_arrays_of_a_slide(cached_store, name, dtype, shape, chunks):
    slide = zarr.open_group(cached_store, mode="r")["slides/p01-1"]
    array = slide[name]
    assert (array.dtype, array.shape, array.chunks) == (dtype, (slide.attrs["g2l"]["n_patches"], *shape), chunks)
    files = {"coords": (32768, 2), "patch_status": (32768,), "view_params": (32768, 8, 12), "pixel_hash": (32768, 8)}
    assert array.shards == files.get(name, (4096, 1, 1024))
    assert np.isfinite(array[:].astype(np.float64)).all()


def test_facts_of_a_slide(cached_store):
    slide = zarr.open_group(cached_store, mode="r")["slides/p02-1"]
    found = slide.attrs["g2l"]
    assert (found["status"], found["kind"], found["n_views"], found["patch_px_level0"]) == ("ok", "slide", 3, 512)
    assert found["labels"] == {"patient_id": "p02", "medical_center": "south"}
    assert found["level0_size"] == [3072, 3072]
    assert found["mpp"] == pytest.approx(0.25)
    assert slide["view_params"].attrs["columns"] == list(COLUMNS)
    assert (slide["coords"][:] % 512 == 0).all()
    assert len(np.unique(slide["coords"][:], axis=0)) == found["n_patches"]


def test_completion_records(cached_store):
    slide = zarr.open_group(cached_store, mode="r")["slides/p01-1"]
    array, found = slide[f"features/{KEY}"], slide.attrs["g2l"]["features"][KEY]
    assert found["complete"]
    assert set(found["shards"]) == {"0.0", "0.1", "0.2"}
    for view in range(3):
        values = np.ascontiguousarray(array[:, view])
        size = (cached_store / f"slides/p01-1/features/{KEY}/c.0.{view}.0").stat().st_size
        record = {"rows": len(values), "failed": 0, "crc32c": CRC32C.checksum(values), "size": size}
        assert found["shards"][f"0.{view}"] == record


def test_a_shard_is_one_file(toy):
    found = {p for p in files(toy.path / "slides/a/x/features/toy") if p.startswith("c.")}
    assert found == {f"c.{block}.{view}.0" for block in (0, 1) for view in (0, 1)}


def test_what_is_written_is_read(toy):
    for slide in reopened(toy).slides():
        wanted = features_of(slide.slide_id, 20, 2)
        for view in (0, 1):
            assert np.array_equal(slide.features(ENCODER, view=view), wanted[:, view])
            assert np.array_equal(slide.pixel_hash[:, view], hashes_of(20, 9)[:, view])


@given(st.integers(1, 100), st.integers(1, 3))
def test_shards_cover_every_row_of_every_view_once(tmp_path_factory, n, n_views):
    store = create(tmp_path_factory.mktemp("cover") / "s.zarr")
    slide = lay(store, "x", n=n, n_views=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "SHARD_ROWS", 16)
        shards = slide.shards(range(n_views))
        assert len({s.name for s in shards}) == len(shards)
    covered = [(row, s.view) for s in shards for row in range(s.start, s.stop)]
    assert sorted(covered) == [(row, view) for row in range(n) for view in range(n_views)]


# ---- identity --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "views", "field"),
    [
        ({"mpp": 0.25}, {}, r"grid\.mpp is 0\.5 there, 0\.25 asked"),
        ({"max_patches": 3}, {}, r"grid\.max_patches is None there, 3 asked"),
        ({"tissue": "none"}, {}, r"grid\.tissue"),
        ({}, {"seed": 7}, r"views\.seed is 0 there, 7 asked"),
        ({}, {"blur_sigma": (0.1, 3.0)}, r"views\.blur_sigma"),
        ({"seed": 1}, {"hflip": 0.4}, r"grid\.seed.*views\.hflip"),
    ],
)
def test_other_settings_are_refused_by_name(toy, grid, views, field):
    with pytest.raises(StoreMismatchError, match=field):
        FeatureStore.create(toy.path, grid=GridSpec(**grid).to_json(), views=ViewSpec(**views).to_json())


def test_equal_settings_open_the_store_again(toy):
    before = files(toy.path)
    again = create(toy.path)
    assert again.slide_ids() == ["a/x", "b/x"]
    assert files(toy.path) == before


def test_another_encoder_stands_beside(toy):
    toy.add_encoder("other", EncoderFacts(digest="1" * 64, dim=3))
    slide = reopened(toy).slide("a/x")
    writer = FeatureWriter.open(slide, "other", digest="1" * 64, dim=3, n_views=1)
    for s in writer.missing([0]):
        writer.write(s, np.ones((s.stop - s.start, 3), np.float32), hashes_of(20, 9)[s.start : s.stop, 0], np.zeros(
            s.stop - s.start, np.uint8))  # fmt: skip
    slide = reopened(toy).slide("a/x")
    assert slide.encoder_keys == ["other", ENCODER]
    assert np.array_equal(slide.features("other"), np.ones((20, 3)))
    assert np.array_equal(slide.features(ENCODER), features_of("a/x", 20, 2)[:, 0])
    assert sorted(reopened(toy).encoders) == ["other", ENCODER]


def test_another_digest_under_the_same_key_is_refused(toy):
    with pytest.raises(StoreMismatchError, match="another encoder under 'toy' .*precision: None there, 'bf16' now"):
        toy.add_encoder(ENCODER, EncoderFacts(digest="1" * 64, dim=DIM, precision="bf16"))
    toy.add_encoder(ENCODER, EncoderFacts(digest="0" * 64, dim=DIM))


def test_a_newer_format_is_refused(toy):
    root = zarr.open_group(toy.path)
    root.attrs["g2l"] = {**root.attrs["g2l"], "format": 3}
    with pytest.raises(StoreError, match="has store format 3; this version reads up to 2"):
        FeatureStore.open(toy.path)


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(StoreMissingError, match="there is no store at"):
        FeatureStore.open(tmp_path / "absent")
    with pytest.raises(StoreMissingError, match="there is no store at"):
        FeatureStore.open(tmp_path)
    zarr.create_group(tmp_path / "foreign")
    with pytest.raises(StoreError, match="is a Zarr group but no G2L store"):
        create(tmp_path / "foreign")
    (tmp_path / "note.txt").write_text("x")
    for path in (tmp_path, tmp_path / "note.txt"):
        with pytest.raises(StoreError, match="exists and is no store"):
            create(path)
    (tmp_path / "foreign" / "zarr.json").write_text("{")
    with pytest.raises(StoreCorruptError, match="zarr.json is damaged"):
        FeatureStore.open(tmp_path / "foreign")


# ---- slides ----------------------------------------------------------------------------------------------


def test_ids_keep_their_folders(tmp_path):
    store = create(tmp_path / "s.zarr")
    ids = ["a/x", "b/deep/x", "b/x", "plain", "with.dots/y.z"]
    for slide_id in reversed(ids):
        lay(store, slide_id)
    assert reopened(store).slide_ids() == ids
    assert [s.slide_id for s in store.slides()] == ids
    assert store.slide("b/deep/x").labels == {"patient_id": "p1"}


def test_an_unknown_slide_is_answered_with_the_nearest(toy):
    with pytest.raises(UnknownNameError, match="Did you mean"):
        toy.slide("a/y")
    with pytest.raises(UnknownNameError, match="unknown slide 'a'"):
        toy.slide("a")


def test_a_failed_slide_keeps_its_reason_until_it_is_laid(tmp_path):
    store = create(tmp_path / "s.zarr")
    store.fail_slide("a/x", "/s.svs", "no tissue")
    assert reopened(store).failed_slides() == {"a/x": "no tissue"}
    assert list(store.slides()) == []
    assert reopened(store).slide_ids() == ["a/x"]
    lay(store, "a/x")
    store.fail_slide("a/x", "/s.svs", "a later, wrong call")
    assert reopened(store).failed_slides() == {}
    assert [len(s) for s in store.slides()] == [20]


def test_patch_ids_and_labels(tmp_path):
    store = create(tmp_path / "s.zarr")
    names = [f"é{i}.png" for i in range(5)]
    params = sample_views(ViewSpec(), "set", np.zeros((5, 2), np.int32), range(1), names)
    slide = store.add_slide(
        "set", facts(kind="patches"), coords=np.zeros((5, 2), np.int32), view_params=params, columns=COLUMNS,
        patch_ids=names,
    )  # fmt: skip
    slide.set_labels({"label": "Tumor"})
    again = reopened(store).slide("set")
    assert again.patch_ids == names
    assert again.labels == {"label": "Tumor"}
    assert zarr.open_group(store.path)["slides/set/patch_id"][:].tolist() == names


# ---- completion ------------------------------------------------------------------------------------------


def test_what_is_not_recorded_is_nan_and_refused(tmp_path, small_shards):
    slide = lay(create(tmp_path / "s.zarr"), "x")
    writer = FeatureWriter.open(slide, ENCODER, digest="0" * 64, dim=DIM, n_views=2)
    rows = np.ones((16, DIM), np.float16)
    writer.write(Shard(0, 16, 1), rows, hashes_of(16, 1)[:, 0], np.zeros(16, np.uint8))
    array = slide.features_array(ENCODER)
    assert np.isfinite(array[:16, 1]).all()
    assert np.isnan(array[16:, 1]).all()
    assert np.isnan(array[:, 0]).all()
    assert [s.name for s in writer.missing([0, 1])] == ["0.0", "1.0", "1.1"]
    assert not slide.feature_facts(ENCODER).complete
    with pytest.raises(StoreMissingError, match=r"slide x: view 1 of toy is not complete \(1 of 2 shards missing\)"):
        slide.features(ENCODER, view=1)
    with pytest.raises(UnknownNameError, match="unknown encoder 'tow'"):
        slide.features("tow")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 65520.0, -1e6])
def test_features_that_float16_cannot_hold_are_refused(tmp_path, small_shards, value):
    slide = lay(create(tmp_path / "s.zarr"), "a/x")
    features = np.zeros((16, DIM), np.float32)
    features[5, 2] = features[7, 0] = value
    writer = FeatureWriter.open(slide, ENCODER, digest="0" * 64, dim=DIM, n_views=1)
    before = files(tmp_path)
    place = r"not finite in float16 for row 5 at \(1285, 0\), view 0"
    with pytest.raises(EncoderError, match=place):
        writer.write(Shard(0, 16, 0), features, hashes_of(16, 1)[:, 0], np.zeros(16, np.uint8))
    assert files(tmp_path) == before


def test_the_largest_float16_is_kept(tmp_path):
    slide = lay(create(tmp_path / "s.zarr"), "x", n=1)
    writer = FeatureWriter.open(slide, ENCODER, digest="0" * 64, dim=1, n_views=1)
    writer.write(Shard(0, 1, 0), np.array([[65504.0]], np.float32), hashes_of(1, 1)[:, 0], np.zeros(1, np.uint8))
    assert slide.features(ENCODER).tolist() == [[65504.0]]


def test_unreadable_rows_are_nan_and_the_others_fine(tmp_path, small_shards):
    slide = lay(create(tmp_path / "s.zarr"), "x", n=40)
    status = np.zeros(40, np.uint8)
    status[[3, *range(16, 32)]] = schema.STATUS["unreadable"]  # of the second shard nothing is left
    wanted = fill(slide, status=status)
    found = slide.features(ENCODER)
    assert np.array_equal(found, wanted[:, 0], equal_nan=True)
    assert np.array_equal(np.isnan(found).any(axis=1), status != 0)
    assert np.array_equal(slide.patch_status, status)
    assert (slide.pixel_hash[status != 0] == 0).all()
    assert slide.records(ENCODER)["1.0"].failed == 16
    assert not FeatureWriter.open(slide, ENCODER, digest="0" * 64, dim=DIM, n_views=2).missing([0, 1])


def test_other_pixels_than_another_encoder_saw_are_refused(toy):
    slide = toy.slide("a/x")
    writer = FeatureWriter.open(slide, "other", digest="1" * 64, dim=2, n_views=1)
    hashes = hashes_of(20, 9)[:16, 0]
    hashes[4] += 1
    with pytest.raises(StoreMismatchError, match="slide a/x, row 4, view 0: the pixels are not those"):
        writer.write(Shard(0, 16, 0), np.zeros((16, 2), np.float32), hashes, np.zeros(16, np.uint8))
    assert not slide.records("other")


def test_views_added_later_leave_old_shards_untouched(toy):
    slide = toy.slide("a/x")
    before = shard_files(slide)
    params = slide.view_params
    further = sample_views(ViewSpec(), "a/x", slide.coords, range(2, 4))
    slide.extend_views(further)
    writer = FeatureWriter.open(slide, ENCODER, digest="0" * 64, dim=DIM, n_views=4)
    assert not slide.feature_facts(ENCODER).complete
    assert {s.view for s in writer.missing(range(4))} == {2, 3}
    fill(slide, n_views=4)
    again = reopened(toy).slide("a/x")
    assert again.n_views == 4
    assert np.array_equal(again.view_params, np.concatenate([params, further], axis=1))
    assert again.feature_facts(ENCODER).complete
    after = shard_files(slide)
    assert before.items() <= after.items()
    assert len(after) == 2 * len(before)


# ---- damage ----------------------------------------------------------------------------------------------

DAMAGES = {
    "first byte": lambda b: bytes([b[0] ^ 1]) + b[1:],
    "last byte": lambda b: b[:-1] + bytes([b[-1] ^ 128]),
    "a byte of the index": lambda b: b[:-20] + bytes([b[-20] ^ 4]) + b[-19:],
    "cut short": lambda b: b[: len(b) // 2],
    "almost nothing": lambda b: b[:3],
    "zeros": lambda b: bytes(len(b)),
    "something behind": lambda b: b + b"x",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_noticed_on_reading(toy, damage):
    slide = toy.slide("a/x")
    path = slide.shard_path(ENCODER, Shard(0, 16, 1))
    original = path.read_bytes()
    path.write_bytes(damage(original))
    if path.stat().st_size == len(original):
        with pytest.raises(StoreCorruptError, match="slide a/x: rows 0 to 20 of toy, view 1, cannot be read"):
            slide.features(ENCODER, view=1)
    else:  # and the caching command computes it again
        with pytest.raises(StoreMissingError, match=r"view 1 of toy is not complete \(1 of 2 shards missing\)"):
            slide.features(ENCODER, view=1)
    assert np.array_equal(slide.features(ENCODER), features_of("a/x", 20, 2)[:, 0])


@pytest.mark.parametrize("damage", [None, lambda _: b""], ids=["deleted", "empty"])
def test_a_shard_without_its_file_is_written_again(toy, damage):
    slide = toy.slide("a/x")
    path = slide.shard_path(ENCODER, Shard(0, 16, 1))
    original = path.read_bytes()
    if damage:
        path.write_bytes(damage(original))
    else:
        path.unlink()
    with pytest.raises(StoreMissingError, match=r"view 1 of toy is not complete \(1 of 2 shards missing\)"):
        slide.features(ENCODER, view=1)
    fill(slide)
    assert path.read_bytes() == original


@pytest.mark.parametrize("name", ["coords", "view_params", "pixel_hash"])
def test_a_changed_bit_of_a_table_is_noticed(toy, name):
    slide = toy.slide("a/x")
    path = next(p for p in sorted((toy.path / "slides/a/x" / name).glob("c.*")) if p.is_file())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    with pytest.raises(StoreCorruptError, match=f"slide a/x: {name} cannot be read"):
        getattr(slide, name)


# ---- a disk that is full, a process that dies ------------------------------------------------------------


@contextmanager
def files_limited_to(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_what_is_recorded(tmp_path, small_shards):
    store = create(tmp_path / "s.zarr")
    slide = lay(store, "x", n=16)
    writer = FeatureWriter.open(slide, ENCODER, digest="0" * 64, dim=4096, n_views=2)
    arguments = np.ones((16, 4096), np.float16), hashes_of(16, 1)[:, 0], np.zeros(16, np.uint8)
    writer.write(Shard(0, 16, 0), *arguments)
    with files_limited_to(20_000), pytest.raises(
        StoreError, match=r"cannot write features of slide x: File too large; raise the limit of file sizes"
    ):  # fmt: skip
        writer.write(Shard(0, 16, 1), *arguments)
    assert [s.name for s in writer.missing([0, 1])] == ["0.1"]
    writer.write(Shard(0, 16, 1), *arguments)
    assert np.array_equal(slide.features(ENCODER, view=1), arguments[0])
    with files_limited_to(100), pytest.raises(StoreError, match="cannot write slide y: File too large"):
        lay(store, "y")
    assert reopened(store).slide_ids() == ["x"]


def test_a_store_that_cannot_be_written_to(toy):
    slide = toy.slide("a/x")
    (toy.path / "slides/a/x/features/other").write_text("in the way")
    with pytest.raises(StoreError, match="cannot write features of slide a/x: .*; make the store writable"):
        FeatureWriter.open(slide, "other", digest="1" * 64, dim=2, n_views=1)


class Killed(Exception):  # noqa: N818
    """The process is gone: nothing is written any more."""


@contextmanager
def killed_at(write):
    """Die at the given write or rename, with half a temporary file left; so after the one before it, too."""
    replacing, rename, count = files_module.replacing, Path.rename, 0

    def step(path):
        nonlocal count
        count += 1
        if count == write and path.parent.is_dir():
            path.with_name(f".{path.name}.partial").write_bytes(b"{")
        if count >= write:
            raise Killed

    def replacing_or_killed(path, *arguments, **options):
        step(path)
        return replacing(path, *arguments, **options)

    def rename_or_killed(path, target):
        step(path / "zarr.json")
        return rename(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files_module, "replacing", replacing_or_killed)
        patch.setattr(Path, "rename", rename_or_killed)
        yield


def stage_one(path, n_views):
    """Everything that a run of stage one does to a store, in its order; does again what was not finished."""
    store = create(path)
    known = {slide.slide_id: slide for slide in store.slides()}
    slide = known.get("a/x")
    if slide is None:
        store.fail_slide("a/x", "/s.svs", "a first reason")
        slide = lay(store, "a/x", n=10, n_views=n_views)
    if slide.n_views < n_views:
        further = range(slide.n_views, n_views)
        slide.extend_views(sample_views(ViewSpec(), "a/x", slide.coords, further))
    slide.set_labels({"patient_id": "p2"})
    fill(slide, n_views=n_views)


def content(path):
    """All arrays and attributes but the date of creation."""
    root = zarr.open_group(path, mode="r")
    slide = root["slides/a/x"]
    names = ["coords", "patch_status", "view_params", "pixel_hash", f"features/{ENCODER}"]
    arrays = {name: slide[name][:].tobytes() for name in names}
    attributes = [dict(slide[name].attrs) for name in names] + [dict(slide.attrs)]
    of_root = {key: value for key, value in root.attrs["g2l"].items() if key not in {"created", "crc32c"}}
    return arrays, json.dumps([*attributes, of_root], sort_keys=True)


def run_to_the_end(path):
    stage_one(path, 1)
    stage_one(path, 2)


def test_death_at_any_write_changes_nothing(tmp_path, small_shards):
    run_to_the_end(tmp_path / "whole.zarr")
    wanted = content(tmp_path / "whole.zarr")
    for write in range(1, 1000):
        path = tmp_path / f"{write}.zarr"
        try:
            with killed_at(write):
                run_to_the_end(path)
        except Killed:
            run_to_the_end(path)
            assert content(path) == wanted, f"killed at write {write}"
        else:
            break
    assert 20 < write < 100

"""Features that are read past Zarr are what Zarr reads, and what Zarr refuses is refused."""

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from g2l_core.store import plain_shards, schema
from g2l_core.store.plain_shards import read_features
from g2l_core.store.zarr_files import create_array, open_array

ROWS, VIEWS, DIM = 45, 3, 6
"""Three shards of 16 rows a view, the last of them short; the second of view 1 and a chunk of view 2 are absent."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "features"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "SHARD_ROWS", 16)
        patch.setattr(schema, "CHUNK_ROWS", 4)
        array = create_array(folder, schema.features_layout(ROWS, VIEWS, DIM))
    values = np.random.default_rng(0).normal(size=(ROWS, VIEWS, DIM)).astype(np.float16)
    values[16:32, 1] = values[20:24, 2] = np.nan
    array[:] = values
    assert not (folder / "c.1.1.0").exists()
    return folder


@pytest.fixture
def no_zarr(monkeypatch):
    """Refuses what is left to Zarr."""
    monkeypatch.setattr(zarr.Array, "__getitem__", lambda *_: pytest.fail("it was left to Zarr"))


@given(st.integers(0, ROWS - 1), st.integers(1, ROWS), st.integers(0, VIEWS - 1), st.sampled_from([2, 3, 1024]))
def test_any_rows_are_those_that_zarr_reads(folder, start, n, view, buffers):
    array, stop = open_array(folder), min(start + n, ROWS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain_shards, "BUFFERS", buffers)
        patch.setattr(zarr.Array, "__getitem__", lambda *_: pytest.fail("it was left to Zarr"))
        found = read_features(array, folder, start, stop, view)
    np.testing.assert_array_equal(found, array[start:stop, view])
    assert (found.dtype, found.shape) == (np.float16, (stop - start, DIM))


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_changed_byte_is_refused_wherever_it_is(folder, place, flip):
    path = folder / "c.0.0.0"
    content = path.read_bytes()
    changed = bytearray(content)
    changed[place % len(changed)] ^= flip
    try:
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"of c\.0\.0\.0 does not have the checksum|does not have the checksum"):
            read_features(open_array(folder), folder, 0, 16, 0)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("kept", [0, 5, 67, 68, 200])
def test_a_file_that_is_cut_short_is_refused(folder, kept):
    path = folder / "c.0.0.0"
    content = path.read_bytes()
    try:
        path.write_bytes(content[:kept])
        with pytest.raises(ValueError, match="too few for a shard|does not have the checksum"):
            read_features(open_array(folder), folder, 0, 16, 0)
    finally:
        path.write_bytes(content)


def test_chunks_in_any_order_are_found(folder, no_zarr):
    """As another writer may put them: the index tells where they are."""
    path = folder / "c.0.0.0"
    content = path.read_bytes()
    array = open_array(folder)
    before = read_features(array, folder, 0, 16, 0)
    size = 4 * DIM * 2 + 4
    chunks, index = [content[i * size : (i + 1) * size] for i in range(4)], np.frombuffer(content[-68:-4], "<u8").copy()
    index[[0, 2, 4, 6]] = [3 * size + 7, 0, 2 * size + 7, size]
    body = chunks[1] + chunks[3] + b"7 bytes" + chunks[2] + chunks[0]
    crc = int(plain_shards.CRC32C.checksum(index.tobytes()))
    try:
        path.write_bytes(body + index.tobytes() + crc.to_bytes(4, "little"))
        np.testing.assert_array_equal(read_features(array, folder, 0, 16, 0), before)
        np.testing.assert_array_equal(read_features(array, folder, 3, 10, 0), before[3:10])
    finally:
        path.write_bytes(content)


def test_other_layouts_are_left_to_zarr(tmp_path):
    """Packed ones, of `g2l store compact`, and those whose shards lie elsewhere."""
    values = np.random.default_rng(0).normal(size=(20, 2, DIM)).astype(np.float16)
    for name, change in {
        "packed": {"compressors": [zarr.codecs.ZstdCodec()]},
        "bare": {"compressors": None},
        "deep": {"chunk_key_encoding": {"name": "default", "separator": "/"}},
        "unsharded": {"shards": None},
    }.items():
        array = create_array(tmp_path / name, {**schema.features_layout(20, 2, DIM), **change})
        array[:] = values
        np.testing.assert_array_equal(read_features(array, tmp_path / name, 3, 18, 1), values[3:18, 1])

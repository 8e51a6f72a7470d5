"""Compressed chunks that unpack to more than they should are refused before they are unpacked."""

import gzip
import zlib
from contextlib import suppress

import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from g2l_core.errors import ReadError, SlideError
from g2l_core.slides.limits import PIXELS, _declared_size, require_unpacked
from g2l_core.slides.ome_zarr import open_ome_zarr
from g2l_core.slides.slide import open_slide

CODECS = {
    "zstd": numcodecs.Zstd(level=1),
    "blosc zstd": numcodecs.Blosc(cname="zstd", clevel=5),
    "blosc lz4": numcodecs.Blosc(cname="lz4", clevel=5),
    "gzip": numcodecs.GZip(level=1),
    "zlib": numcodecs.Zlib(level=1),
}
SIDE = 64


def draw(path, codec):
    """A slide of one level in OME-Zarr 0.4, whose chunks are compressed by a codec."""
    group = zarr.create_group(path, zarr_format=2)
    pixels = np.random.default_rng(0).integers(150, 250, (3, 4 * SIDE, 4 * SIDE), dtype=np.uint8)
    group.create_array("0", shape=pixels.shape, dtype="uint8", chunks=(3, SIDE, SIDE), compressors=codec)[:] = pixels
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "yx"]
    scale = [{"type": "scale", "scale": [1.0, 0.5, 0.5]}]
    datasets = [{"path": "0", "coordinateTransformations": scale}]
    group.attrs["multiscales"] = [
        {"version": "0.4", "axes": [{"name": "c", "type": "channel"}, *axes], "datasets": datasets}
    ]
    return pixels.transpose(1, 2, 0)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_a_chunk_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch, codec):
    path = tmp_path / "x.zarr"
    pixels = draw(path, codec)
    monkeypatch.setenv(PIXELS, "1000000")
    region = np.asarray(open_ome_zarr(path).read_region((0, 0), 0, (SIDE, SIDE)))[..., :3]
    assert np.array_equal(region, pixels[:SIDE, :SIDE])
    bomb = bytes(codec.encode(np.zeros(64_000_000, np.uint8)))
    assert len(bomb) < 700_000
    next(path.glob("0/0.0.0")).write_bytes(bomb)
    with pytest.raises(ValueError, match=f"set {PIXELS} to more"):
        open_ome_zarr(path).read_region((0, 0), 0, (SIDE, SIDE))
    with open_slide(path) as slide, pytest.raises(SlideError, match=f"set {PIXELS} to more"):
        slide.read_thumbnail(10.0)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@given(size=st.integers(1, 200_000), value=st.integers(0, 255))
def test_sound_chunks_pass_and_declare_their_size(codec, size, value):
    content = bytes(codec.encode(np.full(size, value, np.uint8)))
    require_unpacked(content, "a chunk")
    assert _declared_size(content) in {None, size}


@given(st.binary(max_size=400))
def test_any_bytes_are_looked_at_without_an_error(content):
    require_unpacked(content, "a chunk")
    for begin in (b"\x28\xb5\x2f\xfd", b"\x1f\x8b\x08", b"\x78\x9c"):
        with suppress(ReadError):
            require_unpacked(begin + content, "a chunk")


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_deflate_is_counted_no_further_than_the_limit(monkeypatch, pack):
    monkeypatch.setenv(PIXELS, "100000")
    require_unpacked(pack(bytes(299_000)), "a chunk")
    with pytest.raises(ReadError, match="unpacks to more than 300,000 bytes"):
        require_unpacked(pack(bytes(50_000_000)), "a chunk")

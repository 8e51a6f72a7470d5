"""Small files that unpack to gigabytes, and text that is nested without end, are refused by the header."""

import json
import os
import struct
import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from g2l_core.encoders.resolve import resolve_encoder, run_encoder
from g2l_core.errors import EncoderError, G2LError, NotASlideError, ReadError, RunError, UsageError
from g2l_core.patches.render import read_image
from g2l_core.report.write import read_report
from g2l_core.slides.limits import JSON_BYTES, PIXELS
from g2l_core.slides.ome_zarr import is_ome_zarr
from g2l_core.slides.slide import Frame, open_slide
from g2l_core.synthetic.cohort import write_pyramid
from g2l_core.tissue.annotations import read_annotation
from g2l_core.tissue.geojson import read_areas
from g2l_core.tissue.network import load_network
from g2l_core.types import Mpp
from pipeline.config import read_toml
from pipeline.runs import read_run
from tests.faults.test_untrusted_code import ome_zarr_2

SIDE = 65_500
"""Squared it is 4.3 gigapixels, which is 12.9 GB of RGB."""


def png_bomb() -> bytes:
    """A valid PNG header of SIDE squared, over data of a few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def patched_size(content: bytes, marker: bytes, at: int) -> bytes:
    """A sound image whose header says SIDE squared."""
    place = content.index(marker) + at
    return content[:place] + struct.pack(">HH", SIDE, SIDE) + content[place + 4 :]


def jpeg_bomb() -> bytes:
    return patched_size(jpeg(), b"\xff\xc0", 5)


def jpeg(side: int = 64) -> bytes:
    return bytes(imagecodecs.jpeg8_encode(np.full((side, side, 3), 200, np.uint8)))


def bmp_bomb() -> bytes:
    file = BytesIO()
    Image.new("RGB", (8, 8)).save(file, "BMP")
    return file.getvalue()[:18] + struct.pack("<ii", SIDE, SIDE) + file.getvalue()[26:]


def tiff_bomb() -> bytes:
    file = BytesIO()
    tifffile.imwrite(file, shape=(SIDE, SIDE, 3), dtype="u1", photometric="rgb", compression="deflate", data=blank())
    return file.getvalue()


def blank():
    yield from (np.zeros((1, 3), "u1") for _ in range(0))


def webp_bomb() -> bytes:
    """An extended WebP header of 16,384 x 32,768."""
    flags = struct.pack("<I", 0) + (16_383).to_bytes(3, "little") + (32_767).to_bytes(3, "little")
    file = BytesIO()
    Image.new("RGB", (8, 8)).save(file, "WEBP", lossless=True)
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + flags + file.getvalue()[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


BOMBS = {"png": png_bomb, "jpg": jpeg_bomb, "bmp": bmp_bomb, "webp": webp_bomb}


@pytest.fixture(autouse=True)
def little_memory():
    """What would unpack to gigabytes fails the test, and not the machine."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("kind", BOMBS)
def test_a_patch_image(tmp_path, kind):
    path = tmp_path / f"bomb.{kind}"
    path.write_bytes(BOMBS[kind]())
    with pytest.raises(
        ReadError, match=r"store's patches 224 x 224|no image that Pillow knows|set G2L_MAX_IMAGE_PIXELS"
    ):
        read_image(path, 224)


@pytest.mark.parametrize("kind", BOMBS)
def test_a_plain_image_as_a_slide(tmp_path, kind):
    path = tmp_path / f"bomb.{kind}"
    path.write_bytes(BOMBS[kind]())
    with pytest.raises(NotASlideError, match=f"(px|pixels).*set {PIXELS} to more|cannot be read"):
        open_slide(path, mpp_override=0.5)


def test_the_limit_can_be_raised_and_lowered(tmp_path, monkeypatch):
    Image.new("RGB", (300, 200)).save(tmp_path / "a.png")
    monkeypatch.setenv(PIXELS, "59999")
    with pytest.raises(NotASlideError, match=f"300 x 200 px.*set {PIXELS}"):
        open_slide(tmp_path / "a.png", mpp_override=0.5)
    monkeypatch.setenv(PIXELS, "60000")
    open_slide(tmp_path / "a.png", mpp_override=0.5).close()
    monkeypatch.setenv(PIXELS, "many")
    with pytest.raises(UsageError, match="expected a whole number above 0"):
        open_slide(tmp_path / "a.png", mpp_override=0.5)


def test_a_mask_image(tmp_path):
    (tmp_path / "x.png").write_bytes(png_bomb())
    with pytest.raises(ReadError, match=f"x.png: .*set {PIXELS}"):
        read_annotation(tmp_path, "x", (1000, 1000), Frame(size=(10, 10), downsample=100, mpp=Mpp(8.0)))


def slide(path: Path, side: int = 1024) -> Path:
    write_pyramid(path, np.full((side, side, 3), 200, np.uint8), mpp=0.5, downsamples=(1,), quality=80)
    return path


def set_tag(path: Path, tag: str, value: int) -> None:
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages[0].tags[tag].overwrite(value)


def test_tiles_too_large_by_the_tiff_header(tmp_path):
    path = slide(tmp_path / "x.tiff")
    for tag in ("TileWidth", "TileLength"):
        set_tag(path, tag, 65_536)
    with pytest.raises(NotASlideError, match=f"a tile of its level 0 has 65,536 x 65,536 px.*set {PIXELS}"):
        open_slide(path)


def test_a_tile_whose_own_header_says_more(tmp_path):
    """The page says 256 px, the JPEG in it 65,500: nothing of that size is made, and the patch is unreadable."""
    path = slide(tmp_path / "x.tiff")
    content = path.read_bytes()
    assert content.count(b"\xff\xc0") >= 4
    parts = content.split(b"\xff\xc0")
    path.write_bytes(b"\xff\xc0".join([parts[0], *(p[:3] + struct.pack(">HH", SIDE, SIDE) + p[7:] for p in parts[1:])]))
    with open_slide(path) as opened, pytest.raises(ReadError):
        opened.read_patch(0, 0, 224, 224)


def test_a_thumbnail_too_large(tmp_path):
    path = slide(tmp_path / "x.tiff")
    for tag in ("ImageWidth", "ImageLength"):
        set_tag(path, tag, 1 << 24)
    with pytest.raises(G2LError), open_slide(path) as opened:
        opened.read_thumbnail(Mpp(2.0))


@pytest.mark.parametrize("version", [2, 3])
def test_a_chunk_of_a_zarr_slide(tmp_path, version):
    path = ome_zarr_2(tmp_path / "x.zarr")
    if version == 3:
        import zarr

        (path / "0/.zarray").unlink()
        zarr.create_array(path / "0", shape=(3, SIDE, SIDE), chunks=(3, SIDE, SIDE), dtype="u1")
    else:
        facts = json.loads((path / "0/.zarray").read_text())
        (path / "0/.zarray").write_text(json.dumps(facts | {"shape": [3, SIDE, SIDE], "chunks": [3, SIDE, SIDE]}))
    with pytest.raises(NotASlideError, match=f"a chunk of its level 0 has .*set {PIXELS}"):
        open_slide(path)


def test_a_chunk_file_too_large(tmp_path):
    path = ome_zarr_2(tmp_path / "x.zarr")
    with (path / "0/0.0.0").open("r+b") as file:
        file.truncate(1 << 40)
    with open_slide(path) as opened, pytest.raises(ReadError, match=f"more than .* bytes|{JSON_BYTES}"):
        opened.read_patch(0, 0, 32, 32)


def test_json_too_large(tmp_path, monkeypatch):
    monkeypatch.setenv(JSON_BYTES, "1000")
    (tmp_path / "x.geojson").write_text(json.dumps([0] * 1000))
    with pytest.raises(ReadError, match=f"more than 1,000 are not read.*set {JSON_BYTES}"):
        read_annotation(tmp_path, "x", (1000, 1000), Frame(size=(10, 10), downsample=100, mpp=Mpp(8.0)))
    path = ome_zarr_2(tmp_path / "y.zarr")
    (path / ".zattrs").write_text((path / ".zattrs").read_text() + " " * 1000)
    with pytest.raises(NotASlideError, match=f"set {JSON_BYTES}"):
        open_slide(path)


DEEP_JSON = "[" * 200_000
DEEP_TOML = "a = " + "[" * 3_000


def test_json_nested_without_end(tmp_path):
    with pytest.raises(ReadError, match="nested too deeply"):
        read_areas(DEEP_JSON)
    (tmp_path / "results.json").write_text(DEEP_JSON)
    with pytest.raises(RunError, match="nested too deeply"):
        read_report(tmp_path)
    (tmp_path / "run.json").write_text(DEEP_JSON)
    with pytest.raises(RunError, match="nested too deeply"):
        read_run(tmp_path)
    (tmp_path / "student").mkdir()
    (tmp_path / "student/encoder.json").write_text(DEEP_JSON)
    with pytest.raises(EncoderError, match=r"encoder.json .*nested too deeply"):
        run_encoder(tmp_path)


@pytest.mark.parametrize("name", [".zattrs", ".zgroup", "0/.zarray", "zarr.json"])
def test_a_zarr_slide_nested_without_end(tmp_path, name):
    path = ome_zarr_2(tmp_path / "x.zarr")
    (path / name).write_text(DEEP_JSON)
    assert is_ome_zarr(path)
    if name != ".zgroup":  # which nobody reads
        with pytest.raises(NotASlideError):
            open_slide(path)


def test_toml_nested_without_end(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(DEEP_TOML)
    from g2l_core.benchmark.task_file import task_tables

    for read in (
        read_toml,
        task_tables,
        lambda p: resolve_encoder(str(p)),
        lambda p: load_network(p.with_suffix(".pt")),
    ):
        with pytest.raises(UsageError, match="x.toml.*: it is nested too deeply"):
            read(path)


@pytest.mark.parametrize(
    "text", ["{", "[]", "3", '{"name": 3}', '{"std": 0, "mean": 1, "name": "", "architecture": "x"}']
)
def test_a_damaged_record_of_a_student(tmp_path, text):
    (tmp_path / "student").mkdir()
    (tmp_path / "student/encoder.json").write_text(text)
    with pytest.raises(EncoderError, match="encoder.json"):
        run_encoder(tmp_path)


def test_what_opencv_decodes_is_what_pillow_announces(tmp_path):
    """The look at the header costs no patch: every format of patch images is still read, bit for bit."""
    image = np.random.default_rng(0).integers(0, 255, (224, 224, 3), np.uint8)
    for suffix in ("png", "jpg", "bmp", "webp", "tiff"):
        path = tmp_path / f"a.{suffix}"
        cv2.imwrite(str(path), image)
        np.testing.assert_array_equal(read_image(path, 224), cv2.imread(str(path), cv2.IMREAD_COLOR_RGB))


def test_the_command_line_needs_no_more_memory(tmp_path):
    """A whole process with 3 GB of address space tells a bomb, and goes on with the slide beside it."""
    (tmp_path / "in").mkdir()
    slide(tmp_path / "in/good.tiff")
    bad = slide(tmp_path / "in/bad.tiff")
    for tag in ("TileWidth", "TileLength"):
        set_tag(bad, tag, 65_536)
    call = [sys.executable, "-m", "pipeline.cli", "cache-teacher", "in", "--store", "s.zarr", "--views", "0"]
    call += ["--teacher", "timm:mobilenetv3_small_050@64", "--weights", "random:0", "--tissue", "none", "--mpp", "0.5"]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "failed  bad: a tile of its level 0 has 65,536 x 65,536 px" in done.stderr
    assert "of 1 slides" in done.stdout

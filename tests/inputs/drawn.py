"""Slides that are written tile by tile, so that a test decides on every byte."""

import io
import struct

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

from tests.patches.test_views import he_patch
from tests.slides.test_readers import element, sequence

TILE = 256
RESOLUTION = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}
APERIO = "Aperio Image Library v11.2.1\n{0}x{1} [0,0 {0}x{1}] ({2}x{2}) JPEG/RGB Q=70|AppMag = 20|MPP = 0.5"


def picture(columns=3, rows=3):
    """H&E of whole tiles, uint8 (height, width, 3)."""
    lines = [np.concatenate([he_patch(x + 7 * y) for x in range(columns)], axis=1) for y in range(rows)]
    image = np.full((rows * TILE, columns * TILE, 3), 255, np.uint8)
    drawn = np.concatenate(lines)[: rows * TILE, : columns * TILE]
    image[: drawn.shape[0], : drawn.shape[1]] = drawn
    return image


def jfif(tile):
    file = io.BytesIO()
    Image.fromarray(tile).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def adobe(tile):
    """A JPEG of RGB with Adobe's marker."""
    return imagecodecs.jpeg8_encode(tile, level=95, colorspace="RGB", outcolorspace="RGB")


def without_segment(code, marker):
    """A JPEG without its first segment of a kind."""
    at = code.index(marker)
    return code[:at] + code[at + 2 + int.from_bytes(code[at + 2 : at + 4]) :]


def named_rgb(tile):
    """A JPEG whose components are named R, G, B, without a marker."""
    code = without_segment(adobe(tile), b"\xff\xee")
    for marker, first, step in ((b"\xff\xc0", 10, 3), (b"\xff\xda", 5, 2)):
        at = code.index(marker)
        for i, name in enumerate(b"RGB"):
            code = code[: at + first + i * step] + bytes([name]) + code[at + first + i * step + 1 :]
    return code


def subsampled(tile):
    """A JPEG of YCbCr with halved chroma, without a marker."""
    file = io.BytesIO()
    Image.fromarray(tile).save(file, "JPEG", quality=95, subsampling=2)
    return without_segment(file.getvalue(), b"\xff\xe0")


def jpeg2000(tile, mct=True):
    return imagecodecs.jpeg2k_encode(tile, level=60, codecformat="j2k", mct=mct)


def write_tiles(
    path, image, encode, *, compression="jpeg", photometric=2, description=None, absent=(), levels=(), tags=None
):
    """A tiled TIFF of encoded tiles, whose tag is set afterwards. Tiles named in `absent` have no bytes.

    `absent` has the index of a tile of level 0, or (level, index).
    """
    missing = {(0, at) if isinstance(at, int) else at for at in absent}
    with tifffile.TiffWriter(path) as tiff:
        for level, pixels in enumerate((image, *levels)):
            height, width = pixels.shape[:2]
            padded = np.pad(pixels, ((0, -height % TILE), (0, -width % TILE), (0, 0)), mode="edge")
            tiles = [
                encode(np.ascontiguousarray(padded[y : y + TILE, x : x + TILE]))
                for y in range(0, height, TILE)
                for x in range(0, width, TILE)
            ]
            coded = [b"" if (level, i) in missing else tile for i, tile in enumerate(tiles)]
            tiff.write(
                iter(coded), shape=pixels.shape, dtype="uint8", photometric="rgb", compression=compression,
                tile=(TILE, TILE), metadata=None, subfiletype=int(level > 0 and description is None),
                **({"software": False} | (tags or {**RESOLUTION, "description": description if level == 0 else None})),
            )  # fmt: skip
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for page in tiff.pages:
            page.aspage().tags[262].overwrite(photometric)
    return path


def write_dicom(path, image, encode, syntax, photometric):
    """A whole-slide image of one level in compressed frames."""
    height, width = image.shape[:2]
    frames = [
        encode(np.ascontiguousarray(image[y : y + TILE, x : x + TILE]))
        for y in range(0, height, TILE)
        for x in range(0, width, TILE)
    ]
    wsi = "1.2.840.10008.5.1.4.1.1.77.1.6"
    meta = [(2, "UI", wsi), (3, "UI", "1.2.3.4"), (0x10, "UI", syntax), (0x12, "UI", "1.2.3")]
    head = element(2, 1, "OB", b"\0\1") + b"".join(element(2, number, kind, value) for number, kind, value in meta)
    body = [
        element(8, 8, "CS", "ORIGINAL\\PRIMARY\\VOLUME\\NONE"), element(8, 0x16, "UI", wsi),
        element(8, 0x18, "UI", "1.2.3.4"), element(0x20, 0xE, "UI", "1.2.3.5"),
        element(0x20, 0x9311, "CS", "TILED_FULL"), element(0x28, 2, "US", 3), element(0x28, 4, "CS", photometric),
        element(0x28, 6, "US", 0), element(0x28, 8, "IS", str(len(frames))),
        element(0x28, 0x10, "US", TILE), element(0x28, 0x11, "US", TILE), element(0x28, 0x100, "US", 8),
        element(0x28, 0x101, "US", 8), element(0x28, 0x102, "US", 7), element(0x28, 0x103, "US", 0),
        element(0x48, 6, "UL", width), element(0x48, 7, "UL", height),
        sequence(0x48, 0x105, element(0x48, 0x112, "DS", "40")),
        sequence(0x5200, 0x9229, sequence(0x28, 0x9110, element(0x28, 0x30, "DS", "0.0005\\0.0005"))),
        struct.pack("<HH2sxxI", 0x7FE0, 0x10, b"OB", 0xFFFFFFFF), _item(b""), *map(_item, frames),
        struct.pack("<HHI", 0xFFFE, 0xE0DD, 0),
    ]  # fmt: skip
    path.write_bytes(bytes(128) + b"DICM" + element(2, 0, "UL", len(head)) + head + b"".join(body))
    return path


def _item(content):
    content += b"\0" * (len(content) % 2)
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(content)) + content

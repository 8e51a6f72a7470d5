"""Decode one tile or strip of a TIFF page from its bytes, into an array whose size the page's tags give.

Every decoder refuses content that gives another size, so that a small file cannot fill the memory.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import imagecodecs
import numpy as np

from g2l_core.slides.color_space import RGB, YCBCR, jpeg_space
from g2l_core.types import Rgb

Decode = Callable[[bytes, np.ndarray], np.ndarray]
"""Fills an array of uint8, (height, width, 3) or (height, width) of one plane, with the pixels of a tile."""

JPEG, JPEG2000_YCBCR, JPEG2000_RGB = 7, 33003, 33005
JPEG2000 = frozenset({JPEG2000_YCBCR, 33004, JPEG2000_RGB, 34712})

PHOTOMETRIC = {6: YCBCR, 2: RGB}
"""Values of the tag PhotometricInterpretation that are read here."""

HORIZONTAL = 2
"""The predictor that stores differences along a row."""

_IMAGES: Mapping[int, Callable[..., np.ndarray]] = {
    34933: imagecodecs.png_decode,
    34927: imagecodecs.webp_decode,
    50001: imagecodecs.webp_decode,
    50002: imagecodecs.jpegxl_decode,
    52546: imagecodecs.jpegxl_decode,
}
"""Compressions that are image formats of their own, whose pixels are always RGB."""

_BYTES: Mapping[int, Callable[..., Any]] = {
    1: lambda data, out: data,
    5: imagecodecs.lzw_decode,
    8: imagecodecs.zlib_decode,
    32946: imagecodecs.zlib_decode,
    32773: imagecodecs.packbits_decode,
    34925: imagecodecs.lzma_decode,
    34926: imagecodecs.zstd_decode,
    50000: imagecodecs.zstd_decode,
}


def is_rgb(page: Any) -> bool:
    """Whether a page has three samples of 8 bits."""
    return page.samplesperpixel == 3 and page.bitspersample == 8 and page.tiledepth == 1


def decoder_beside_openslide(page: Any, *, differs: bool) -> Callable[[bytes, Rgb], np.ndarray] | None:
    """The function that decodes the page's tiles as OpenSlide does; None for a format that only OpenSlide reads.

    The markers of a tile decide on its color space; the tag does where they say nothing.

    Args:
        page: Of tifffile.
        differs: Whether tiles are coded in another color space than the tag says.
    """
    if not is_rgb(page) or page.planarconfig != 1:
        return None
    compression, tagged = int(page.compression), PHOTOMETRIC.get(int(page.photometric))
    if compression == JPEG and tagged:
        return partial(_jpeg, page.jpegtables, tagged)
    if (compression == JPEG2000_RGB and tagged == RGB) or (compression == JPEG2000_YCBCR and differs):
        return _jpeg2000  # the codestream's own transform gives RGB
    return None


def decoder(page: Any, *, differs: bool) -> Decode | None:
    """The function that decodes the page's tiles or strips; None if its compression or color space is not read.

    Args:
        page: Of tifffile, with three samples of 8 bits: interleaved, or in planes that are coded one by one.
        differs: Whether tiles are coded in another color space than the tag says.
    """
    compression, tagged = int(page.compression), PHOTOMETRIC.get(int(page.photometric))
    if compression == JPEG and tagged:
        return partial(_jpeg, page.jpegtables, tagged)
    if compression in JPEG2000 and (tagged == RGB or differs):
        return _jpeg2000
    if tagged != RGB:
        return None
    if compression in _IMAGES:
        return partial(_image, _IMAGES[compression])
    if compression in _BYTES and int(page.predictor) in {1, HORIZONTAL} and int(page.fillorder) == 1:
        return partial(_unpacked, _BYTES[compression], int(page.predictor))
    return None


def _jpeg(tables: bytes | None, tagged: str, data: bytes, tile: np.ndarray) -> np.ndarray:
    if tile.ndim == 2:
        return imagecodecs.jpeg8_decode(data, tables=tables, out=tile)
    return imagecodecs.jpeg8_decode(
        data, tables=tables, colorspace=jpeg_space(data) or tagged, outcolorspace=RGB, out=tile
    )


def _jpeg2000(data: bytes, tile: np.ndarray) -> np.ndarray:
    return imagecodecs.jpeg2k_decode(data, out=tile)


def _image(decode: Callable[..., np.ndarray], data: bytes, tile: np.ndarray) -> np.ndarray:
    return decode(data, out=tile)


def _unpacked(unpack: Callable[..., Any], predictor: int, data: bytes, tile: np.ndarray) -> np.ndarray:
    content = unpack(data, out=bytearray(tile.nbytes))
    if len(content) < tile.nbytes:
        raise ValueError(f"it unpacks to {len(content)} bytes where {tile.nbytes} are expected")
    tile[...] = np.frombuffer(content, np.uint8, tile.nbytes).reshape(tile.shape)
    return imagecodecs.delta_decode(tile, axis=1, out=tile) if predictor == HORIZONTAL else tile

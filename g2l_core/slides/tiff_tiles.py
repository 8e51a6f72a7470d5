"""Decode the tiles of a TIFF slide from their bytes, each once however many patches share it.

OpenSlide decodes a tile again for every region that touches it, unless its own small cache still holds it, and
composes regions in a slower pixel format. Here a tile's bytes go once through libjpeg-turbo or OpenJPEG. These are
OpenSlide's own libraries, and the pixels are the same: 0 gray levels of difference on every slide tried.

A read goes like this. `open_tiles` finds the page of each level, `TilePyramid.read` collects the tiles that a region
touches, and `_decode` decodes those that the cache does not hold. Everything else (other formats, missing or damaged
tiles, regions over the slide's edge) gives None and is read through OpenSlide, so that a store does not depend on which
of the two has read.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile

from g2l_core.types import Rgb

CACHE_BYTES = 128 << 20
"""Decoded tiles kept by default. Each of six threads needs two rows of tiles of a cell, 20 MB at 0.25 um/px."""

VENDORS = frozenset({"aperio", "generic-tiff"})
"""OpenSlide's names of the formats whose levels are plain tiled TIFF pages without overlap."""

JPEG, JPEG2000_RGB = 7, 33005
YCBCR, RGB = 6, 2

_UNREADABLE = (
    ValueError, RuntimeError, OSError, KeyError, IndexError, TypeError, OverflowError, MemoryError,
    tifffile.TiffFileError,
)  # fmt: skip
"""What tifffile and imagecodecs raise on bytes that they cannot read."""


@dataclass(frozen=True, kw_only=True)
class _Level:
    """One page of tiles."""

    size: tuple[int, int]
    tile: tuple[int, int]
    offsets: np.ndarray
    counts: np.ndarray
    decode: Callable[[bytes, Rgb], np.ndarray]

    @property
    def columns(self) -> int:
        return -(-self.size[0] // self.tile[0])


class TilePyramid:
    """The tiles of an open slide. Safe to read from several threads."""

    def __init__(self, path: Path, levels: Sequence[_Level | None], cache_bytes: int) -> None:
        self._file = os.open(path, os.O_RDONLY)
        self._levels = levels
        self._cache: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._room = cache_bytes
        self._lock = threading.Lock()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Free the file and the tiles."""
        with self._lock:
            file, self._file = self._file, -1
            self._cache.clear()
        if file >= 0:
            os.close(file)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Rgb | None:
        """Read a region of one level, uint8 (height, width, 3).

        Args:
            level: OpenSlide's number of the level.
            x: Left edge, pixels of that level.
            y: Upper edge, pixels of that level.
            width: Pixels of that level.
            height: Pixels of that level.

        Returns:
            None where the region leaves the level, or a tile is missing or cannot be decoded.
        """
        page = self._levels[level]
        if page is None or x < 0 or y < 0 or x + width > page.size[0] or y + height > page.size[1]:
            return None
        tile_width, tile_height = page.tile
        region = np.empty((height, width, 3), np.uint8)
        for row in range(y // tile_height, -(-(y + height) // tile_height)):
            for column in range(x // tile_width, -(-(x + width) // tile_width)):
                tile = self._tile(level, page, row * page.columns + column)
                if tile is None:
                    return None
                left, top = column * tile_width, row * tile_height
                x0, x1 = max(x, left), min(x + width, left + tile_width)
                y0, y1 = max(y, top), min(y + height, top + tile_height)
                region[y0 - y : y1 - y, x0 - x : x1 - x] = tile[y0 - top : y1 - top, x0 - left : x1 - left]
        return region

    def _tile(self, level: int, page: _Level, index: int) -> np.ndarray | None:
        key = level, index
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        tile = self._decode(page, index)
        if tile is not None:
            with self._lock:
                if key not in self._cache:
                    self._cache[key] = tile
                    self._room -= tile.nbytes
                while self._room < 0:
                    _, oldest = self._cache.popitem(last=False)
                    self._room += oldest.nbytes
        return tile

    def _decode(self, page: _Level, index: int) -> np.ndarray | None:
        if not page.counts[index]:
            return None
        try:
            content = os.pread(self._file, int(page.counts[index]), int(page.offsets[index]))
            if len(content) < page.counts[index]:
                return None  # libjpeg would fill in what is missing
            return page.decode(content, np.empty((page.tile[1], page.tile[0], 3), np.uint8))
        except _UNREADABLE:
            return None


def open_tiles(
    path: Path, level_sizes: Sequence[tuple[int, int]], cache_bytes: int = CACHE_BYTES
) -> TilePyramid | None:
    """The tiles of a TIFF or SVS file.

    Args:
        path: The file.
        level_sizes: Width and height of OpenSlide's levels, which are looked up among the file's tiled pages.
        cache_bytes: Maximum number of bytes of decoded tiles that are kept.

    Returns:
        None if no level can be read this way.
    """
    try:
        with tifffile.TiffFile(path) as tiff:
            pages = [page for page in _pages(tiff) if page.is_tiled]
            levels = [_level(pages, size) for size in level_sizes]
    except _UNREADABLE:
        return None
    return TilePyramid(path, levels, cache_bytes) if any(levels) else None


def _pages(tiff: tifffile.TiffFile) -> list[Any]:
    """All pages, those of sub-directories included."""
    pages = []
    for page in tiff.pages:
        full = page.aspage()
        pages += [full, *(sub.aspage() for sub in full.pages or ())]
    return pages


def _level(pages: Sequence[Any], size: tuple[int, int]) -> _Level | None:
    fitting = [page for page in pages if (page.imagewidth, page.imagelength) == size]
    decode = _decoder(fitting[0]) if len(fitting) == 1 else None  # two of one size: which of them is the slide?
    if decode is None:
        return None
    page = fitting[0]
    return _Level(
        size=size,
        tile=(page.tilewidth, page.tilelength),
        offsets=np.array(page.dataoffsets, np.int64),
        counts=np.array(page.databytecounts, np.int64),
        decode=decode,
    )


def _decoder(page: Any) -> Callable[[bytes, Rgb], np.ndarray] | None:
    """The function that decodes the page's tiles; None for a format that only OpenSlide reads.

    It decodes into an array of the tile's size, and refuses by its header an image of any other size.
    """
    if page.samplesperpixel != 3 or page.bitspersample != 8 or page.planarconfig != 1 or page.tiledepth != 1:
        return None
    compression, photometric = int(page.compression), int(page.photometric)
    if compression == JPEG and photometric in {YCBCR, RGB}:
        tables, space = page.jpegtables, "YCBCR" if photometric == YCBCR else "RGB"
        return lambda data, tile: imagecodecs.jpeg8_decode(
            data, tables=tables, colorspace=space, outcolorspace="RGB", out=tile
        )
    if compression == JPEG2000_RGB and photometric == RGB:
        return lambda data, tile: imagecodecs.jpeg2k_decode(data, out=tile)
    return None

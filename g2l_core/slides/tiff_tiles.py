"""Decode the tiles of a TIFF slide from their bytes, each once however many patches share it.

OpenSlide decodes a tile again for every region that touches it, unless its own small cache still holds it, and
composes regions in a slower pixel format. Here a tile's bytes go once through libjpeg-turbo or OpenJPEG. These are
OpenSlide's own libraries, and the pixels are the same: 0 gray levels of difference on every slide tried.

A read goes like this. `open_tiles` finds the page of each level, `TilePyramid.read` collects the tiles that a region
touches, and `_decode` decodes those that the cache does not hold. Everything else (other formats, missing or damaged
tiles, regions over the slide's edge) gives None and is read through OpenSlide, so that a store does not depend on which
of the two has read. `pyramid_of` has the pages that OpenSlide does not read at all (`tiff_slide`), in more formats.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from g2l_core.errors import NotASlideError, refuse_open_files
from g2l_core.slides.color_space import jpeg2000_is_transformed, jpeg_space
from g2l_core.slides.tiff_codecs import (
    JPEG,
    JPEG2000,
    JPEG2000_YCBCR,
    PHOTOMETRIC,
    Decode,
    decoder,
    decoder_beside_openslide,
)
from g2l_core.types import Rgb

CACHE_BYTES = 128 << 20
"""Decoded tiles kept by default. Each of six threads needs two rows of tiles of a cell, 20 MB at 0.25 um/px."""

VENDORS = frozenset({"aperio", "generic-tiff"})
"""OpenSlide's names of the formats whose levels are plain tiled TIFF pages without overlap."""

SEPARATE = 2
"""The value of the tag PlanarConfiguration for samples that lie in planes."""

LOOKED_AT = 5
"""Tiles of a level, spread over it, whose color space is compared with the tag."""

UNREADABLE = (
    ValueError, RuntimeError, OSError, KeyError, IndexError, TypeError, OverflowError, MemoryError,
    tifffile.TiffFileError,
)  # fmt: skip
"""What tifffile and imagecodecs raise on bytes that they cannot read."""


@dataclass(frozen=True, kw_only=True)
class _Level:
    """One page of tiles, or of strips, which are tiles as wide as the page."""

    size: tuple[int, int]
    tile: tuple[int, int]
    offsets: np.ndarray
    """Of each tile, (planes, tiles): one plane if the samples of a pixel lie together, else three."""
    counts: np.ndarray
    """Bytes of each tile, (planes, tiles)."""
    is_striped: bool
    """Whether the last tile ends with the page; tiles are filled up beyond it."""
    decode: Decode | None
    """None for a format that only OpenSlide reads."""
    only_here: bool
    """Whether OpenSlide does not read the page, takes the tag's color space against the tiles' own, or reads tiles that
    lie nowhere."""
    bits: int
    """Bits of a sample."""
    resolution: float
    """Pixels per unit of length by the tags; 0 where they do not say."""

    @property
    def columns(self) -> int:
        return -(-self.size[0] // self.tile[0])

    @property
    def present(self) -> np.ndarray:
        """Whether the file has a tile, bool (tiles,)."""
        return np.all(self.counts > 0, axis=0)

    def shape(self, index: int) -> tuple[int, int]:
        """Height and width of a tile's pixels."""
        width, height = self.tile
        left = self.size[1] - index // self.columns * height
        return (min(height, left) if self.is_striped else height), width


class TilePyramid:
    """The tiles of an open slide. Safe to read from several threads."""

    def __init__(self, path: Path, levels: Sequence[_Level | None], cache_bytes: int) -> None:
        self._file = os.open(path, os.O_RDONLY)
        self._levels = levels
        self._cache: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._room = cache_bytes
        self._lock = threading.Lock()

    @property
    def only_here(self) -> frozenset[int]:
        """The levels that OpenSlide must not read, because it takes the colors or the absence of tiles wrongly."""
        return frozenset(i for i, level in enumerate(self._levels) if level is not None and level.only_here)

    @property
    def absent_shares(self) -> dict[int, float]:
        """The fraction of each level's tiles that the file does not have."""
        return {i: float(1 - level.present.mean()) for i, level in enumerate(self._levels) if level is not None}

    @property
    def bits(self) -> int:
        """Most bits of a sample in any level; OpenSlide makes 8 of them."""
        return max(level.bits for level in self._levels if level is not None)

    @property
    def declared_downsamples(self) -> list[float | None]:
        """Level-0 pixels per pixel of each level by the tags' resolution; None where they do not say."""
        first = self._levels[0].resolution if self._levels[0] is not None else 0.0
        resolutions = [level.resolution if level is not None else 0.0 for level in self._levels]
        return [first / at if first and at and at != first else None for at in resolutions]

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
        if (
            page is None
            or page.decode is None
            or x < 0
            or y < 0
            or x + width > page.size[0]
            or y + height > page.size[1]
        ):
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

    def present(self, level: int, left: int, top: int, right: int, bottom: int) -> Iterator[tuple[int, int, int, int]]:
        """The parts of a region in tiles that the file has: left, top, width and height in pixels of the level."""
        page = self._levels[level]
        if page is None:
            return
        width, height = page.tile
        for row in range(top // height, -(-bottom // height)):
            for column in range(left // width, -(-right // width)):
                if (page.counts[:, row * page.columns + column] > 0).all():
                    x, y = max(left, column * width), max(top, row * height)
                    yield x, y, min(right, (column + 1) * width) - x, min(bottom, (row + 1) * height) - y

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
        planes = [self._decode_plane(page, index, plane) for plane in range(len(page.counts))]
        decoded = [plane for plane in planes if plane is not None]
        if len(decoded) < len(planes):
            return None
        return decoded[0] if len(decoded) == 1 else np.stack(decoded, axis=-1)

    def _decode_plane(self, page: _Level, index: int, plane: int) -> np.ndarray | None:
        count, shape = int(page.counts[plane, index]), page.shape(index)
        if page.decode is None or not count:
            return None
        try:
            content = os.pread(self._file, count, int(page.offsets[plane, index]))
            if len(content) < count:
                return None  # libjpeg would fill in what is missing
            return page.decode(content, np.empty((*shape, 3) if len(page.counts) == 1 else shape, np.uint8))
        except UNREADABLE:
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
        None if no level is found, though OpenSlide may read it.

    Raises:
        NotASlideError: The tiles are coded in another color space than the tags say, and cannot be read this way.
    """
    try:
        with tifffile.TiffFile(path) as tiff:
            pages = [page for page in _pages(tiff) if page.is_tiled]
            levels = [_level(tiff, pages, size) for size in level_sizes]
    except UNREADABLE as error:
        refuse_open_files(error, path, NotASlideError)  # else the pixels would be those of OpenSlide
        return None
    return TilePyramid(path, levels, cache_bytes) if any(levels) else None


def require_tagged_space(path: Path) -> None:
    """Refuse a TIFF that only OpenSlide reads if its tiles are coded in another color space than the tags say.

    Files of other formats pass.

    Raises:
        NotASlideError: They are.
    """
    try:
        with tifffile.TiffFile(path) as tiff:
            for page in _pages(tiff):
                if page.is_tiled and _differs(tiff, page):
                    raise _contradiction(page)
    except UNREADABLE as error:
        refuse_open_files(error, path, NotASlideError)
        return


def _contradiction(page: Any) -> NotASlideError:
    return NotASlideError(
        f"the tiles of its level of {page.imagewidth} x {page.imagelength} px are coded in another color space than "
        f"its TIFF tags say (compression {int(page.compression)}, photometric {int(page.photometric)}), and they "
        "cannot be decoded directly: correct the tag, or convert the slide again"
    )


def _pages(tiff: tifffile.TiffFile) -> list[Any]:
    """All pages, those of sub-directories included."""
    pages = []
    for page in tiff.pages:
        full = page.aspage()
        pages += [full, *(sub.aspage() for sub in full.pages or ())]
    return pages


def pyramid_of(path: Path, tiff: tifffile.TiffFile, pages: Sequence[Any]) -> TilePyramid:
    """The tiles or strips of pages that OpenSlide does not read. Strips that were decoded once are all kept.

    Args:
        path: The file.
        tiff: The same, opened.
        pages: The levels, the finest first; `tiff_codecs.is_rgb` holds for them.

    Raises:
        NotASlideError: The compression or the color space of one is not read.
    """
    levels = []
    for page in pages:
        differs = _differs(tiff, page, any_jpeg2000=True)
        decode = decoder(page, differs=differs)
        if decode is None:
            raise NotASlideError(
                f"its level of {page.imagewidth} x {page.imagelength} px has compression {_name(page.compression)} "
                f"and photometric interpretation {_name(page.photometric)}, which are not read: convert it to a tiled "
                "TIFF of RGB with JPEG, LZW or Deflate"
            )
        levels.append(_level_of(page, decode, only_here=True))
    strips = sum(3 * page.imagewidth * page.imagelength for page in pages if not page.is_tiled)
    return TilePyramid(path, levels, CACHE_BYTES + strips)


def _name(value: Any) -> str:
    return f"{int(value)} ({getattr(value, 'name', 'unknown')})"


def _level(tiff: tifffile.TiffFile, pages: Sequence[Any], size: tuple[int, int]) -> _Level | None:
    fitting = [page for page in pages if (page.imagewidth, page.imagelength) == size]
    differing = [page for page in fitting if _differs(tiff, page)]
    decode = None
    if len(fitting) == 1:  # of two, which is it?
        decode = decoder_beside_openslide(fitting[0], differs=bool(differing))
    if decode is None and differing:
        raise _contradiction(differing[0])
    return _level_of(fitting[0], decode, only_here=bool(differing)) if len(fitting) == 1 else None


def _level_of(page: Any, decode: Decode | None, *, only_here: bool) -> _Level:
    """The level of a page. OpenSlide reads tiles that lie nowhere, so that such a page is read here alone."""
    size = page.imagewidth, page.imagelength
    planes = 3 if page.planarconfig == SEPARATE and page.samplesperpixel == 3 else 1
    offsets, counts = (np.array(of, np.int64).reshape(planes, -1) for of in (page.dataoffsets, page.databytecounts))
    nowhere = offsets == 0
    return _Level(
        size=size,
        tile=(page.tilewidth, page.tilelength) if page.is_tiled else (size[0], min(page.rowsperstrip, size[1])),
        offsets=offsets,
        counts=np.where(nowhere, 0, counts),
        is_striped=not page.is_tiled,
        decode=decode,
        only_here=only_here or (decode is not None and bool((nowhere & (counts != 0)).any())),
        bits=int(page.bitspersample),
        resolution=_resolution(page),
    )


def _resolution(page: Any) -> float:
    tag = page.tags.get("XResolution")
    numerator, denominator = tag.value if tag is not None else (0, 1)
    return numerator / denominator if denominator else 0.0


def _differs(tiff: tifffile.TiffFile, page: Any, *, any_jpeg2000: bool = False) -> bool:
    """Whether some of the tiles are coded in another color space than the page's tags say.

    Aperio's compression 33003 means color differences whatever the other tag says; `any_jpeg2000` asks for all others
    as well.
    """
    compression, tagged = int(page.compression), PHOTOMETRIC.get(int(page.photometric))
    asked = {JPEG, *(JPEG2000 if any_jpeg2000 else [JPEG2000_YCBCR])}
    if compression not in asked or page.samplesperpixel != 3 or tagged is None:
        return False
    present = np.flatnonzero(np.array(page.databytecounts, np.int64) * np.array(page.dataoffsets, np.int64))
    for index in np.unique(present[np.linspace(0, len(present) - 1, LOOKED_AT).astype(int)] if len(present) else []):
        tiff.filehandle.seek(page.dataoffsets[index])
        tile = tiff.filehandle.read(page.databytecounts[index])
        if compression != JPEG:
            differs = jpeg2000_is_transformed(tile) is True
        else:
            differs = jpeg_space(tile) not in {None, tagged}
        if differs:
            return True
    return False

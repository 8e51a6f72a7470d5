"""Open a slide with the reader that knows it (`readers`), and read squares of it at a wanted scale."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import inf, log2
from pathlib import Path

import cv2
import numpy as np
import openslide
from PIL import Image

from g2l_core.errors import AbsentPixelsError, MppError, NotASlideError, ReadError
from g2l_core.slides.boundary import slide_errors
from g2l_core.slides.color_space import require_dicom_space
from g2l_core.slides.icc import ToSrgb, profile_notes, slide_to_srgb
from g2l_core.slides.limits import require_pixels
from g2l_core.slides.mpp import Scale, ScaleFacts, find_scale, objective_power
from g2l_core.slides.notes import Note
from g2l_core.slides.readers import SlideHandle, open_handle
from g2l_core.slides.tiff_slide import TiffSlide
from g2l_core.slides.tiff_tiles import VENDORS, TilePyramid, open_tiles, require_tagged_space
from g2l_core.types import Level0Px, Mpp, Rgb

THUMBNAIL_BLOCK_PX = 4096

ABSENT_SHARE = 0.05
"""Maximum fraction of a patch in tiles that the file does not have; their pixels are the background's color."""

LEVEL_ROUNDING_PX = 2
"""Maximum difference of a level's width and height from level 0's, divided by the level's scale."""

NEAR_POWER = 0.1
"""A level whose scale is this near to a power of two is meant to have that scale; what differs is padding or a cut."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The geometry of a slide's thumbnail: pixel i covers level-0 pixels i to i + 1 times the downsample."""

    size: tuple[int, int]
    """Width and height in pixels. A rest of less than a pixel at the right and lower edge is left out."""
    downsample: int | float
    """Level-0 pixels per pixel, the same in x and y."""
    mpp: Mpp


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """A slide at small scale."""

    image: Rgb
    downsample: int | float
    """Level-0 pixels per pixel, the same in x and y."""
    mpp: Mpp


class Slide:
    """One open slide. Safe to read from several threads.

    Attributes:
        path: The file.
        level0_size: Width and height in level-0 pixels.
        mpp: Micrometers per level-0 pixel.
        mpp_source: Where `mpp` came from: "header: KEY", "manifest" or "override".
        notes: What is not as expected.
    """

    def __init__(
        self,
        path: Path,
        handle: SlideHandle,
        mpp: Mpp,
        mpp_source: str,
        tiles: TilePyramid | None = None,
        to_srgb: ToSrgb | None = None,
    ) -> None:
        self.path = path
        self.level0_size: tuple[int, int] = handle.dimensions
        self.mpp = mpp
        self.mpp_source = mpp_source
        self._handle = handle
        self._tiles = tiles
        self._to_srgb = to_srgb
        self._lock = threading.Lock()
        self._downsamples = tuple(float(d) for d in handle.level_downsamples)
        self._level_sizes = tuple(handle.level_dimensions)
        color = handle.properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, "ffffff")
        self._background = tuple(bytes.fromhex(color))
        declared = getattr(handle, "declared_downsamples", None) or (tiles.declared_downsamples if tiles else ())
        self._levels = [0, *(i for i in range(1, len(self._downsamples)) if self._shows_level0(i, declared))]
        absent = tiles.absent_shares if tiles is not None else getattr(handle, "absent_shares", {})
        self._whole_levels = [i for i in self._levels if absent.get(i, 0.0) <= absent.get(0, 0.0) + ABSENT_SHARE]
        self.notes: tuple[Note, ...] = (*self._level_notes(), *getattr(handle, "notes", ()), *_depth_notes(tiles))

    def _shows_level0(self, level: int, declared: Sequence[float | None]) -> bool:
        """Whether a level has the proportions of level 0 at its own scale, so that it is neither padded nor cut."""
        scales = [*_possible_scales(self.level0_size, self._level_sizes[level])]
        low, high = max(low for low, _ in scales), min(high for _, high in scales)
        power = 2.0 ** round(log2(self._downsamples[level]))
        meant = [power] if abs(self._downsamples[level] / power - 1) < NEAR_POWER else []
        meant += [
            scale for scale in declared[level : level + 1] if scale and 0.5 < scale / self._downsamples[level] < 2
        ]
        return low <= high and all(low <= scale <= high for scale in meant)

    def _level_notes(self) -> Iterator[Note]:
        for levels, text in (
            (set(range(len(self._downsamples))) - {*self._levels}, "a lower level is padded, cut or of another aspect"),
            ({*self._levels} - {*self._whole_levels}, "a lower level has absent tiles"),
        ):
            if levels:
                yield Note(text=f"{text}; another is read", detail=f"level {', '.join(map(str, sorted(levels)))}")

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the file."""
        self._handle.close()
        if self._tiles is not None:
            self._tiles.close()

    def read_patch(self, x: int, y: int, side: Level0Px, patch_px: int, max_absent: float = 1.0) -> Rgb:
        """Read the square at (x, y), resampled once from the nearest finer level.

        Args:
            x: Left edge, level-0 pixels.
            y: Upper edge, level-0 pixels.
            side: Side, level-0 pixels.
            patch_px: Side of the result.
            max_absent: Maximum fraction of pixels that the file does not have.

        Returns:
            uint8 (patch_px, patch_px, 3). Shrinking averages over areas (each source pixel weighs as much
            as it overlaps); enlarging is bilinear.

        Raises:
            AbsentPixelsError: The file does not have too many of the pixels.
            ReadError: The pixels cannot be decoded.
        """
        level, downsample = self._exact_level(x, y, side, patch_px)
        width = side // downsample
        region, absent = self._read((x, y), level, (width, width))
        if absent > ABSENT_SHARE and level > 0:
            finest, missing = self._read((x, y), 0, (side, side))
            if missing <= ABSENT_SHARE:
                region, absent, width = finest, missing, side
        if absent > max_absent:
            raise AbsentPixelsError(f"{absent:.0%} of the patch at {x}, {y} lie in tiles that the file does not have")
        if width == patch_px:
            return region
        interpolation = cv2.INTER_AREA if width > patch_px else cv2.INTER_LINEAR
        return cv2.resize(region, (patch_px, patch_px), interpolation=interpolation)

    def thumbnail_frame(self, mpp: Mpp) -> Frame:
        """The scale and the size of what `read_thumbnail` gives at `mpp`. No pixel is read."""
        level, factor = self._thumbnail_scale(mpp)
        width, height = (max(1, n // factor) for n in self._handle.level_dimensions[level])
        downsample = self._downsamples[level] * factor
        return Frame(size=(width, height), downsample=downsample, mpp=Mpp(self.mpp * downsample))

    def read_thumbnail(self, mpp: Mpp, window: tuple[int, int, int, int] | None = None) -> Thumbnail:
        """Read the slide, or a window of it, at about `mpp` but no coarser, by averaging whole blocks of pixels.

        It takes the memory of one block of `THUMBNAIL_BLOCK_PX` squared, whatever the size of the slide.

        Args:
            mpp: Wanted micrometers per pixel.
            window: Left, top, width and height in pixels of `thumbnail_frame(mpp)`. Outside of the slide it has the
                background color. None is the whole frame.

        Raises:
            ReadError: The pixels cannot be decoded.
        """
        frame = self.thumbnail_frame(mpp)
        level, factor = self._thumbnail_scale(mpp)
        x, y, width, height = window or (0, 0, *frame.size)
        require_pixels(width, height, f"its thumbnail at {mpp:g} um/px")
        image = np.empty((height, width, 3), np.uint8)
        step = max(1, THUMBNAIL_BLOCK_PX // factor)
        for top in range(0, height, step):
            for left in range(0, width, step):
                image[top : top + step, left : left + step] = self._shrunk_block(
                    level, factor, x + left, y + top, min(step, width - left), min(step, height - top)
                )
        return Thumbnail(image=image, downsample=frame.downsample, mpp=frame.mpp)

    def _thumbnail_scale(self, mpp: Mpp) -> tuple[int, int]:
        """The level that thumbnails of that scale are read from, and the whole factor by which they shrink it."""
        wanted = max(1.0, mpp / self.mpp)
        level = max(i for i in self._whole_levels if self._downsamples[i] <= wanted * 1.001)
        return level, max(1, int(wanted / self._downsamples[level] + 0.001))

    def _shrunk_block(self, level: int, factor: int, left: int, top: int, width: int, height: int) -> Rgb:
        """A block of the thumbnail. All arguments but `level` are in thumbnail pixels."""
        scale = self._downsamples[level] * factor
        origin = round(left * scale), round(top * scale)
        region, _ = self._read(origin, level, (width * factor, height * factor))
        return cv2.resize(region, (width, height), interpolation=cv2.INTER_AREA)

    def _exact_level(self, x: int, y: int, side: int, patch_px: int) -> tuple[int, int]:
        """The coarsest level, no coarser than the patch, on whose whole pixels it starts and ends; and its downsample.

        On other levels OpenSlide would interpolate between pixels, which resamples a second time.
        """
        for level in reversed(self._levels[1:]):
            downsample = self._downsamples[level]
            if downsample * patch_px <= side and downsample.is_integer():
                whole = int(downsample)
                if x % whole == 0 and y % whole == 0 and side % whole == 0:
                    return level, whole
        return 0, 1

    def _read(self, origin: tuple[int, int], level: int, size: tuple[int, int]) -> tuple[Rgb, float]:
        """Pixels over the slide's background color, and the fraction of them that the file does not have.

        `origin` is in level-0 pixels, `size` in pixels of the level.
        """
        pixels, absent = self._as_stored(origin, level, size)
        return pixels if self._to_srgb is None else self._to_srgb(pixels), absent

    def _as_stored(self, origin: tuple[int, int], level: int, size: tuple[int, int]) -> tuple[Rgb, float]:
        if self._tiles is not None and level in self._tiles.only_here:
            return self._decoded_alone(self._tiles, origin, level, size)
        pixels = self._decoded(origin, level, size)
        return self._read_region(origin, level, size) if pixels is None else (pixels, 0.0)

    def _decoded_alone(
        self, tiles: TilePyramid, origin: tuple[int, int], level: int, size: tuple[int, int]
    ) -> tuple[Rgb, float]:
        """The region of a level that OpenSlide gets wrong: it starts at a whole pixel, and is cut to the level.

        Raises:
            ReadError: A tile is damaged.
        """
        (left, top), end = (round(at / self._downsamples[level]) for at in origin), self._level_sizes[level]
        right, bottom = min(left + size[0], end[0]), min(top + size[1], end[1])
        region, present = np.full((size[1], size[0], 3), self._background, np.uint8), 0
        for x, y, width, height in tiles.present(level, max(left, 0), max(top, 0), right, bottom):
            pixels = tiles.read(level, x, y, width, height)
            if pixels is None:
                raise ReadError(f"cannot decode {size[0]} x {size[1]} px at {origin}, level {level}: a tile is damaged")
            region[y - top : y - top + height, x - left : x - left + width] = pixels
            present += width * height
        return region, 1 - present / (size[0] * size[1])

    def _decoded(self, origin: tuple[int, int], level: int, size: tuple[int, int]) -> Rgb | None:
        """The region decoded from the tiles' bytes; None if it starts between pixels or cannot be decoded this way."""
        downsample = self._downsamples[level]
        if self._tiles is None or any(at % downsample for at in origin):
            return None
        return self._tiles.read(level, int(origin[0] / downsample), int(origin[1] / downsample), *size)

    def _read_region(self, origin: tuple[int, int], level: int, size: tuple[int, int]) -> tuple[Rgb, float]:
        handle = self._handle
        try:
            pixels = np.asarray(handle.read_region(origin, level, size))
        except (openslide.OpenSlideError, OSError, ValueError) as error:
            self._reopen(handle)
            reason = " ".join(str(error).split())  # OpenSlide passes on the lines of its libraries
            raise ReadError(f"cannot decode {size[0]} x {size[1]} px at {origin}, level {level}: {reason}") from error
        if pixels[..., 3].min() == 255:
            return np.ascontiguousarray(pixels[..., :3]), 0.0
        absent = 0.0 if isinstance(handle, openslide.ImageSlide) else float((pixels[..., 3] == 0).mean())
        canvas = Image.new("RGBA", size, (*self._background, 255))
        canvas.alpha_composite(Image.fromarray(pixels, "RGBA"))
        return np.ascontiguousarray(np.asarray(canvas)[..., :3]), absent

    def _reopen(self, failed: object) -> None:
        """Replace a handle that has failed, since OpenSlide refuses every call after the first error."""
        with self._lock, suppress(NotASlideError):  # a file that has gone keeps the failed handle, and fails again
            if self._handle is failed:
                self._handle = open_handle(self.path)


def _depth_notes(tiles: TilePyramid | None) -> Iterator[Note]:
    if tiles is not None and tiles.bits > 8:
        yield Note(text="more than 8 bits a sample: the upper 8 are read", detail=f"{tiles.bits} bits")


def _possible_scales(level0: tuple[int, int], size: tuple[int, int]) -> Iterator[tuple[float, float]]:
    """The least and the greatest scale that explain a level's width, and those that explain its height."""
    for finest, n in zip(level0, size, strict=True):
        yield finest / (n + LEVEL_ROUNDING_PX), finest / (n - LEVEL_ROUNDING_PX) if n > LEVEL_ROUNDING_PX else inf


def open_slide(
    path: Path,
    *,
    manifest_mpp: float | None = None,
    mpp_override: float | None = None,
    own_tiles: bool = True,
    icc: bool = False,
) -> Slide:
    """Open a slide of any format that a reader knows.

    If its um/px differ in x and y, `Slide.mpp` is their mean. `mpp.audit_scale` reports such slides.

    Args:
        path: The file, or the folder of an OME-Zarr.
        manifest_mpp: Micrometers per level-0 pixel, used where the header gives none that can be trusted.
        mpp_override: The same, used where neither header nor manifest gives one.
        own_tiles: Decode tiles of TIFF and SVS files directly. False reads all through OpenSlide, with the same pixels;
            it has no effect on a slide whose tags contradict the color space of its tiles.
        icc: Convert all pixels to sRGB by the slide's ICC profile, before they are resampled. A slide without one has a
            note.

    Raises:
        NotASlideError: No reader opens the file, its header gives what no reader expects, or its ICC profile cannot be
            used.
        MppError: No source gives plausible micrometers per pixel.
    """
    with slide_errors(NotASlideError):
        handle, scale = _open_scaled(path, manifest_mpp, mpp_override)
        try:
            tiles = _own_tiles(path, handle)
        except NotASlideError:
            handle.close()
            raise
        if tiles is not None and not own_tiles and not tiles.only_here:
            tiles.close()
            tiles = None
        try:
            conversion = slide_to_srgb(handle) if icc else None
        except NotASlideError:
            handle.close()
            raise
        slide = Slide(path, handle, scale.mpp, scale.source, tiles, conversion)
        slide.notes += profile_notes(conversion) if icc else ()
        return slide


def _own_tiles(path: Path, handle: SlideHandle) -> TilePyramid | None:
    """The tiles of a file that can be decoded directly.

    Raises:
        NotASlideError: The header contradicts the color space of tiles that only OpenSlide reads.
    """
    if isinstance(handle, TiffSlide):
        return handle.tiles
    vendor = handle.properties.get(openslide.PROPERTY_NAME_VENDOR)
    if vendor in VENDORS:
        return open_tiles(path, handle.level_dimensions)
    if vendor == "dicom":
        require_dicom_space(path, handle.properties.get("dicom.PhotometricInterpretation", ""))
    elif path.is_file():
        require_tagged_space(path)
    return None


def read_scale(
    path: Path, slide_id: str, *, manifest_mpp: float | None = None, mpp_override: float | None = None
) -> ScaleFacts:
    """Read a slide's scale from its header. Arguments and errors are those of `open_slide`."""
    with slide_errors(NotASlideError):
        handle, scale = _open_scaled(path, manifest_mpp, mpp_override)
        facts = ScaleFacts(
            slide_id=slide_id,
            scale=scale,
            objective_power=objective_power(handle.properties),
            manifest_mpp=manifest_mpp,
            level0_size=handle.dimensions,
        )
        handle.close()
        return facts


def _open_scaled(path: Path, manifest_mpp: float | None, mpp_override: float | None) -> tuple[SlideHandle, Scale]:
    handle = open_handle(path)
    try:
        scale = find_scale(handle.properties, handle.dimensions, manifest_mpp=manifest_mpp, mpp_override=mpp_override)
    except MppError:
        handle.close()
        raise
    return handle, scale

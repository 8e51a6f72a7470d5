"""Open a slide and read it: the only module that touches OpenSlide.

Plain images (PNG, JPEG, untiled TIFF) obey the same interface through OpenSlide's `ImageSlide`.
"""

import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import openslide
import xxhash
from PIL import Image, UnidentifiedImageError

from g2l_core.errors import MppError, NotASlideError, ReadError
from g2l_core.types import Level0Px, Mpp, Rgb

SLIDE_SUFFIXES = frozenset(".svs .tif .tiff .ndpi .mrxs .scn .bif .vms .vmu .svslide .dcm .qptiff".split())
IMAGE_SUFFIXES = frozenset(".png .jpg .jpeg .bmp .webp".split())

PLAUSIBLE_MPP = (0.05, 20.0)
"""Outside this range a header's figure is a mistake: resolution tags of 72 dpi say 353 um/px."""

_PLAUSIBLE_IN_WORDS = f"the plausible range {PLAUSIBLE_MPP[0]:g} to {PLAUSIBLE_MPP[1]:g}"

SAMPLED_BYTES = 1 << 20
THUMBNAIL_BLOCK_PX = 4096


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Where the pixels of a slide's thumbnail lie: pixel i covers level-0 pixels i to i + 1 times the downsample."""

    size: tuple[int, int]
    """Width and height in pixels. What is left at the right and lower edge is less than a pixel."""
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
        mpp: Micrometres per level-0 pixel.
        mpp_source: Where that came from: "header", "manifest" or "override".
    """

    def __init__(self, path: Path, handle: openslide.AbstractSlide, mpp: Mpp, mpp_source: str) -> None:
        self.path = path
        self.level0_size: tuple[int, int] = handle.dimensions
        self.mpp = mpp
        self.mpp_source = mpp_source
        self._handle = handle
        self._lock = threading.Lock()
        self._downsamples = tuple(float(d) for d in handle.level_downsamples)
        colour = handle.properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, "ffffff")
        self._background = tuple(bytes.fromhex(colour))

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the file."""
        self._handle.close()

    def read_patch(self, x: int, y: int, side: Level0Px, patch_px: int) -> Rgb:
        """The square at (x, y), resampled once from the nearest finer level.

        Args:
            x: Left edge, level-0 pixels.
            y: Upper edge, level-0 pixels.
            side: Side, level-0 pixels.
            patch_px: Side of the result.

        Returns:
            uint8 (patch_px, patch_px, 3). Shrinking averages over areas (each source pixel weighs as much
            as it overlaps); enlarging is bilinear.

        Raises:
            ReadError: The pixels cannot be decoded.
        """
        level, downsample = self._exact_level(x, y, side, patch_px)
        width = side // downsample
        region = self._read((x, y), level, (width, width))
        if width == patch_px:
            return region
        how = cv2.INTER_AREA if width > patch_px else cv2.INTER_LINEAR
        return cv2.resize(region, (patch_px, patch_px), interpolation=how)

    def thumbnail_frame(self, mpp: Mpp) -> Frame:
        """The scale and the size that `read_thumbnail` gives at `mpp`; nothing is read."""
        level, factor = self._thumbnail_scale(mpp)
        width, height = (max(1, n // factor) for n in self._handle.level_dimensions[level])
        downsample = self._downsamples[level] * factor
        return Frame(size=(width, height), downsample=downsample, mpp=Mpp(self.mpp * downsample))

    def read_thumbnail(self, mpp: Mpp, window: tuple[int, int, int, int] | None = None) -> Thumbnail:
        """The slide, or a window of it, at about `mpp`, at most that coarse: whole blocks of level pixels averaged.

        Memory stays at one block of `THUMBNAIL_BLOCK_PX` squared whatever the slide's size.

        Args:
            mpp: Wanted micrometres per pixel.
            window: Left, top, width and height in pixels of `thumbnail_frame(mpp)`; what lies outside the slide
                has its background colour. None is the whole frame.

        Raises:
            ReadError: The pixels cannot be decoded.
        """
        frame = self.thumbnail_frame(mpp)
        level, factor = self._thumbnail_scale(mpp)
        x, y, width, height = window or (0, 0, *frame.size)
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
        level = max(i for i, d in enumerate(self._downsamples) if d <= wanted * 1.001)
        return level, max(1, int(wanted / self._downsamples[level] + 0.001))

    def _shrunk_block(self, level: int, factor: int, left: int, top: int, width: int, height: int) -> Rgb:
        """A block of the thumbnail; all but `level` in thumbnail pixels."""
        scale = self._downsamples[level] * factor
        origin = round(left * scale), round(top * scale)
        region = self._read(origin, level, (width * factor, height * factor))
        return cv2.resize(region, (width, height), interpolation=cv2.INTER_AREA)

    def _exact_level(self, x: int, y: int, side: int, patch_px: int) -> tuple[int, int]:
        """The coarsest level, no coarser than the patch, on whose pixels it starts and ends; its downsample.

        Anywhere else OpenSlide would interpolate between that level's pixels, a second resampling.
        """
        for level in range(len(self._downsamples) - 1, 0, -1):
            downsample = self._downsamples[level]
            if downsample * patch_px <= side and downsample.is_integer():
                whole = int(downsample)
                if x % whole == 0 and y % whole == 0 and side % whole == 0:
                    return level, whole
        return 0, 1

    def _read(self, origin: tuple[int, int], level: int, size: tuple[int, int]) -> Rgb:
        """Pixels on the slide's background colour; `origin` in level-0 pixels, `size` in the level's."""
        handle = self._handle
        try:
            pixels = np.asarray(handle.read_region(origin, level, size))
        except (openslide.OpenSlideError, OSError, ValueError) as error:
            self._reopen(handle)
            raise ReadError(f"cannot decode {size[0]} x {size[1]} px at {origin}, level {level}: {error}") from error
        if pixels[..., 3].min() == 255:
            return np.ascontiguousarray(pixels[..., :3])
        canvas = Image.new("RGBA", size, (*self._background, 255))
        canvas.alpha_composite(Image.fromarray(pixels, "RGBA"))
        return np.ascontiguousarray(np.asarray(canvas)[..., :3])

    def _reopen(self, failed: openslide.AbstractSlide) -> None:
        """Replace a handle that has failed: OpenSlide refuses every call after the first error."""
        with self._lock, suppress(NotASlideError):  # a file that has gone keeps the failed handle, and fails again
            if self._handle is failed:
                self._handle = _open_handle(self.path)


def open_slide(path: Path, *, manifest_mpp: float | None = None, mpp_override: float | None = None) -> Slide:
    """Open a slide of any format that OpenSlide or Pillow reads.

    Args:
        path: The file.
        manifest_mpp: Micrometres per level-0 pixel, used where the header gives none that is plausible.
        mpp_override: The same, used where neither header nor manifest gives one.

    Raises:
        NotASlideError: No reader opens the file.
        MppError: No source gives plausible micrometres per pixel, or the header's differ in x and y.
    """
    handle = _open_handle(path)
    try:
        mpp, source = _mpp(handle, manifest_mpp, mpp_override)
    except MppError:
        handle.close()
        raise
    return Slide(path, handle, mpp, source)


def fingerprint(path: Path) -> str:
    """Hexadecimal xxh3-128 over the file's size and its first, middle and last MiB.

    Enough to notice another or a rewritten slide without reading gigabytes.

    Raises:
        ReadError: The file cannot be read.
    """
    try:
        size = path.stat().st_size
        state = xxhash.xxh3_128(str(size).encode())
        with path.open("rb") as file:
            for offset in (0, size // 2, max(0, size - SAMPLED_BYTES)):
                file.seek(offset)
                state.update(file.read(SAMPLED_BYTES))
    except OSError as error:
        raise ReadError(f"cannot read {path}: {error.strerror}") from error
    return state.hexdigest()


def _open_handle(path: Path) -> openslide.AbstractSlide:
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError:
        return _open_image(path)
    except openslide.OpenSlideError as error:
        raise NotASlideError(f"OpenSlide cannot open it ({error}); is the file complete?") from error


def _open_image(path: Path) -> openslide.ImageSlide:
    """A plain image, decoded at once: Pillow's lazy decoding mixes up pixels when two threads begin it."""
    try:
        with Image.open(path) as image:
            image.load()
    except UnidentifiedImageError as error:
        raise NotASlideError(
            "it is neither a slide that OpenSlide reads (SVS, NDPI, MRXS, SCN, BIF, tiled TIFF, DICOM) "
            "nor an image that Pillow reads"
        ) from error
    except OSError as error:
        raise NotASlideError(f"it cannot be read: {error.strerror or error}") from error
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise NotASlideError(f"Pillow cannot decode it ({error}); is the file complete?") from error
    if image.mode[0] in "IF":
        raise NotASlideError(f"its samples have more than 8 bits (Pillow's mode {image.mode}): convert it to 8-bit RGB")
    return openslide.ImageSlide(image)


def _mpp(handle: openslide.AbstractSlide, manifest_mpp: float | None, mpp_override: float | None) -> tuple[Mpp, str]:
    """Micrometres per level-0 pixel and its source: the header if plausible, else the manifest, else the override."""
    header = _header_mpp(handle)
    usable = header if header is not None and _is_plausible(header) else None
    for value, source in ((usable, "header"), (manifest_mpp, "manifest"), (mpp_override, "override")):
        if value is None:
            continue
        if not _is_plausible(value):
            raise MppError(f"its {source} gives {value:g} um/px, outside {_PLAUSIBLE_IN_WORDS}")
        return Mpp(value), source
    raise MppError(
        (
            "its header has no micrometres per pixel (looked for openslide.mpp-x and -y). "
            if header is None
            else f"its header gives {header:g} um/px, outside {_PLAUSIBLE_IN_WORDS}. "
        )
        + "Give them with --mpp-override UM_PER_PX or in the manifest's column mpp"
    )


def _header_mpp(handle: openslide.AbstractSlide) -> float | None:
    keys = openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y
    if not all(key in handle.properties for key in keys):
        return None
    x, y = (float(handle.properties[key]) for key in keys)
    if abs(x - y) > 0.05 * max(x, y):
        raise MppError(f"its header gives {x:g} um/px across but {y:g} um/px down: pixels are not square")
    return (x + y) / 2


def _is_plausible(mpp: float) -> bool:
    return PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1]

"""From a stored patch to the pixels of its views: the one path that extraction and distillation share."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from time import perf_counter
from typing import NamedTuple, Protocol, runtime_checkable

import cv2
import numpy as np
from jaxtyping import UInt8, UInt64
from PIL import Image

from g2l_core.errors import AbsentPixelsError, ReadError, refuse_open_files
from g2l_core.patches.artifacts import ArtifactSpec, artifact_of
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.views import ViewSpec, apply_views, pixel_hash
from g2l_core.slides.boundary import slide_errors
from g2l_core.slides.icc import to_srgb
from g2l_core.slides.images import UPRIGHT, orientation_of, over_white, read_plain_image, require_8_bits
from g2l_core.slides.limits import opened_image, require_file_or_folder
from g2l_core.slides.slide import ABSENT_SHARE, Slide, open_slide
from g2l_core.store.features import StoredSlide
from g2l_core.store.schema import STATUS
from g2l_core.types import Level0Px, PatchStatus, Rgb, ViewParams


@runtime_checkable
class PatchReader(Protocol):
    """Reads the patches of one slide, or of one set of images, by row. Safe in several threads."""

    def read(self, row: int, max_absent: float = 1.0) -> Rgb:
        """The patch of a stored row, uint8 (patch_px, patch_px, 3).

        Raises:
            AbsentPixelsError: The file does not have more than `max_absent` of its pixels.
            ReadError: Its pixels cannot be read.
        """

    def close(self) -> None:
        """Close its files. Nothing is read after that."""


class SlidePatches:
    """The patches of an open slide."""

    def __init__(self, slide: Slide, coords: np.ndarray, side: Level0Px, patch_px: int) -> None:
        self._slide, self._coords, self._side, self._patch_px = slide, coords, side, patch_px

    def read(self, row: int, max_absent: float = 1.0) -> Rgb:
        """The square at the coordinates of the row, resampled once."""
        x, y = self._coords[row].tolist()
        with slide_errors(ReadError):
            return self._slide.read_patch(x, y, self._side, self._patch_px, max_absent)

    def close(self) -> None:
        """Close the slide."""
        self._slide.close()


class ImagePatches:
    """Patches that are image files of their own.

    Attributes:
        turned: The rows of those that were turned as EXIF says, among all that were read.
        unprofiled: The rows of those without an ICC profile, where colors are to be converted by it.
    """

    def __init__(self, folder: Path, names: Sequence[str], patch_px: int, *, icc: bool = False) -> None:
        self._folder, self._names, self._patch_px, self._icc = folder, names, patch_px, icc
        self.turned = set[int]()
        self.unprofiled = set[int]()

    def read(self, row: int, max_absent: float = 1.0) -> Rgb:
        """The image of the row. It must have the store's patch size, for nothing is resampled."""
        with slide_errors(ReadError):
            decoded = _read_upright(self._folder / self._names[row], self._patch_px, icc=self._icc)
        if decoded.orientation != UPRIGHT:
            self.turned.add(row)
        if self._icc and not decoded.has_profile:
            self.unprofiled.add(row)
        return decoded.image

    def close(self) -> None:
        """Do nothing, for no file stays open."""


def read_image(path: Path, patch_px: int, *, icc: bool = False) -> Rgb:
    """An image file of patch_px squared as RGB, with `icc` in sRGB by its ICC profile, if it has one.

    Raises:
        ReadError: It cannot be decoded, has another size, or a profile that cannot be used.
    """
    return _read_upright(path, patch_px, icc=icc).image


class _Upright(NamedTuple):
    """A decoded image."""

    image: Rgb
    orientation: int
    """What its EXIF says, `UPRIGHT` if nothing."""
    has_profile: bool
    """Whether it carries an ICC profile."""


def _read_upright(path: Path, patch_px: int, *, icc: bool) -> _Upright:
    """The image as `read_image` gives it, with what was found in its header."""
    require_file_or_folder(path)
    try:
        encoded = path.read_bytes()
    except OSError as error:
        raise ReadError(f"cannot read {path}: {error.strerror}") from error
    try:
        with opened_image(BytesIO(encoded)) as header:  # reads no pixels
            require_8_bits(header)
            size, is_plain, profile = header.size, _is_plain(header), header.info.get("icc_profile") or b""
        if size != (patch_px, patch_px):
            raise ReadError(f"it is {size[0]} x {size[1]} px, the store's patches {patch_px} x {patch_px}")
        if not is_plain:
            decoded, orientation = read_plain_image(BytesIO(encoded))
            image: np.ndarray | None = np.asarray(over_white(decoded))
        else:
            orientation = UPRIGHT
            image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
        if image is None or image.shape != (patch_px, patch_px, 3):
            raise ReadError("it is no image that OpenCV decodes")
        if icc and profile:
            image = to_srgb(profile)(image)
    except ReadError as error:
        raise ReadError(f"{path}: {error}") from error
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise ReadError(f"{path} is no image that Pillow knows: {error}") from error
    return _Upright(image=image, orientation=orientation, has_profile=bool(profile))


def _is_plain(image: Image.Image) -> bool:
    """Whether OpenCV, which is faster, decodes the same pixels. The EXIF of a PNG may follow the pixels."""
    has_colors = image.mode in {"1", "L", "P", "RGB"} and not image.has_transparency_data
    return has_colors and image.format != "PNG" and orientation_of(image) == UPRIGHT


def open_patches(stored: StoredSlide, grid: GridSpec, path: Path | None = None) -> PatchReader:
    """A reader for a slide's stored patches.

    Args:
        stored: The slide.
        grid: The store's grid.
        path: Where the slide is now; None means where stage one found it.

    Raises:
        SlideError: The slide cannot be opened any more.
    """
    path = path or Path(stored.facts.source)
    names = stored.patch_ids
    if names is not None:
        return ImagePatches(path, names, grid.patch_px, icc=grid.icc)
    slide = open_slide(path, manifest_mpp=stored.facts.mpp, icc=grid.icc)
    return SlidePatches(slide, stored.coords, Level0Px(stored.facts.patch_px_level0), grid.patch_px)


@dataclass(frozen=True, kw_only=True)
class RenderedBlock:
    """The views of a run of patches."""

    pixels: UInt8[np.ndarray, "patch view height width 3"]
    hashes: UInt64[np.ndarray, "patch view"]
    status: PatchStatus
    """Where it is not 0, pixels and hashes of the patch are zeros that mean nothing."""
    reasons: Mapping[int, str]
    """Why patches could not be read, by stored row."""
    seconds_read: float
    seconds_augment: float


def render_block(
    reader: PatchReader,
    rows: Sequence[int],
    params: ViewParams,
    status: PatchStatus,
    spec: ViewSpec,
    artifacts: ArtifactSpec | None = None,
) -> RenderedBlock:
    """Read patches once each and render their views.

    Args:
        reader: Where the patches come from.
        rows: Their stored rows.
        params: Parameters of the wanted views, (len(rows), views, parameters).
        status: Their reason codes as they are known; a patch whose code is not 0 is not read.
        spec: The views.
        artifacts: Patches that show one of these, or lack more than `ABSENT_SHARE` of their pixels, get the code and
            are not rendered. They have no reason in words, for nothing is lost. None renders all patches, as for views
            that are stored already.

    Raises:
        ReadError: Too many files are open, which says nothing about a patch.
    """
    n, n_views = params.shape[:2]
    pixels = np.zeros((n, n_views, spec.crop_px, spec.crop_px, 3), np.uint8)
    hashes = np.zeros((n, n_views), np.uint64)
    new_status, reasons = status.copy(), dict[int, str]()
    seconds_read = seconds_augment = 0.0
    for i, row in enumerate(rows):
        if status[i] != STATUS["ok"]:
            continue
        begin = perf_counter()
        try:
            patch = reader.read(row) if artifacts is None else reader.read(row, ABSENT_SHARE)
        except AbsentPixelsError:
            new_status[i] = STATUS["absent"]
            continue
        except ReadError as error:
            refuse_open_files(error, f"the patch of row {row}", ReadError)
            new_status[i] = STATUS["unreadable"]
            reasons[row] = f"row {row}: {error}"
            continue
        read = perf_counter()
        new_status[i] = STATUS["ok"] if artifacts is None else artifact_of(patch, artifacts)
        if new_status[i] != STATUS["ok"]:
            seconds_read += perf_counter() - begin
            continue
        pixels[i] = apply_views(patch, params[i], spec)
        hashes[i] = pixel_hash(pixels[i])
        seconds_read += read - begin
        seconds_augment += perf_counter() - read
    return RenderedBlock(
        pixels=pixels,
        hashes=hashes,
        status=new_status,
        reasons=reasons,
        seconds_read=seconds_read,
        seconds_augment=seconds_augment,
    )

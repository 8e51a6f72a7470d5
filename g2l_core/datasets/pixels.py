"""Turn published files into patches: images fitted to a square, arrays, and masks as patch labels."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float64

from g2l_core.datasets.spec import Cell
from g2l_core.errors import ManifestError
from g2l_core.patches.grid import GridSpec, patch_side_level0
from g2l_core.slides.slide import open_slide
from g2l_core.types import Rgb

FITTED_PX = 224
"""Side of fitted images, the usual input size of encoders."""
MIN_COVER = 0.5
"""Minimum fraction of a patch that its class must cover in the masks."""
BLOCK_ROWS = 1024


def fitted(path: Path, side: int = FITTED_PX) -> Rgb:
    """Resize an image's center square, as eva's `ResizeAndCrop` does (kaiko-ai/eva).

    Args:
        path: The image, of any size.
        side: Wanted side in pixels.

    Returns:
        uint8 (side, side, 3), RGB, shrunk by averaging or enlarged by cubic interpolation.

    Raises:
        ManifestError: It cannot be decoded.
    """
    encoded = np.fromfile(path, np.uint8)
    image = cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB) if len(encoded) else None
    if image is None:
        raise ManifestError(f"{path} is no image that OpenCV decodes; is the download complete?")
    short = min(image.shape[:2])
    top, left = (image.shape[0] - short) // 2, (image.shape[1] - short) // 2
    square = image[top : top + short, left : left + short]
    method = cv2.INTER_AREA if short > side else cv2.INTER_CUBIC
    return square.copy() if short == side else cv2.resize(square, (side, side), interpolation=method)


def png_size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG from its header (ISO/IEC 15948, IHDR); (0, 0) if the file is no PNG."""
    with path.open("rb") as file:
        head = file.read(24)
    if head[:8] != b"\x89PNG\r\n\x1a\n" or len(head) < 24:
        return 0, 0
    return int.from_bytes(head[16:20]), int.from_bytes(head[20:24])


def write_png(path: Path, image: Rgb) -> None:
    """Write an image without loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _, encoded = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 1])
    path.write_bytes(encoded.tobytes())


class ArrayRows:
    """Images of an HDF5 array, read in blocks, since single reads would unpack the same chunk many times."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self._start, self._block = 0, np.empty((0, 0, 0, 3), np.uint8)

    def row(self, index: int) -> Callable[[], Rgb]:
        """A function that reads one image."""
        return partial(self._read, index)

    def _read(self, index: int) -> Rgb:
        if not self._start <= index < self._start + len(self._block):
            self._start = index - index % BLOCK_ROWS
            self._block = self._array[self._start : self._start + BLOCK_ROWS]
        return self._block[index - self._start]


def cells_of(slide: Path, masks: Mapping[Path, Mapping[int, str]], mpp: float | None) -> Iterator[Cell]:
    """Label the patches of stage one's default grid (256 px at 0.5 um/px) from masks.

    A patch has the class that covers most of it, if that is at least `MIN_COVER`. On a tie it has the first one.

    Args:
        slide: The slide.
        masks: Mask files of the slide's level-0 size, each with its values and their classes.
        mpp: Micrometers per level-0 pixel, if the slide's header gives none.

    Yields:
        x, y in level-0 pixels and the class, row by row.

    Raises:
        ManifestError: A mask cannot be read, or has another size than the slide.
        SlideError: The slide cannot be opened or has no scale.
    """
    with open_slide(slide, manifest_mpp=mpp) as opened:
        side = patch_side_level0(GridSpec(), opened.mpp)
        size = opened.level0_size
    names = [name for values in masks.values() for name in values.values()]
    shares = np.concatenate([_shares(path, list(values), size, side) for path, values in masks.items()])
    best = shares.argmax(axis=0)
    for row, column in np.argwhere(shares.max(axis=0) >= MIN_COVER).tolist():
        yield column * side, row * side, names[best[row, column]]


def _shares(
    path: Path, values: Sequence[int], size: tuple[int, int], side: int
) -> Float64[np.ndarray, "value row column"]:
    """The fraction of each whole patch that has each value. Only one row of patches is in memory."""
    import tifffile
    import zarr

    columns, rows = size[0] // side, size[1] // side
    shares = np.empty((len(values), rows, columns))
    try:
        with tifffile.TiffFile(path) as file:
            mask = zarr.open_array(file.series[0].aszarr(level=0), mode="r")
            if mask.shape[:2] != size[::-1]:
                sizes = f"{mask.shape[1]} x {mask.shape[0]} px, its slide {size[0]} x {size[1]}"
                raise ManifestError(f"the mask {path} is {sizes}")
            for row in range(rows):
                band = np.asarray(mask[row * side : (row + 1) * side, : columns * side])
                band = (band[..., 0] if band.ndim == 3 else band).reshape(side, columns, side)
                shares[:, row] = [(band == value).mean(axis=(0, 2)) for value in values]
    except (OSError, ValueError, tifffile.TiffFileError) as error:
        raise ManifestError(f"cannot read the mask {path}: {error}") from error
    return shares

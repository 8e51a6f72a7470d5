"""Tissue that was annotated by people: one file for each slide, GeoJSON or a mask image."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from g2l_core.errors import ReadError
from g2l_core.slides.limits import opened_image, require_bytes
from g2l_core.slides.slide import Frame
from g2l_core.tissue.classes import ClassChoice
from g2l_core.tissue.geojson import EVERY_CLASS, mask_of, read_areas
from g2l_core.types import TissueMask

SUFFIXES = (".geojson", ".png")

ASPECT_TOLERANCE = 0.02
"""Maximum relative difference of proportions between a mask image, whose sides are rounded to pixels, and its slide."""


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """The annotation of one slide."""

    path: Path
    mask: TissueMask
    sha256: str
    left_out: Mapping[str, int] = field(default_factory=dict)
    """How many objects do not count, by what they are."""

    @property
    def facts(self) -> Mapping[str, str]:
        """The file's name and digest, which the slide's record keeps."""
        return {"tissue_file": self.path.name, "tissue_sha256": self.sha256}


def annotation_path(folder: Path, slide_id: str) -> Path | None:
    """The file of a slide, `<slide_id>.geojson` or `<slide_id>.png`; None if it has none.

    Raises:
        ReadError: It has both.
    """
    paths = [path for suffix in SUFFIXES if (path := folder / f"{slide_id}{suffix}").is_file()]
    if len(paths) > 1:
        raise ReadError(f"{folder} has two annotations of it, {paths[0].name} and {paths[1].name}: keep one")
    return paths[0] if paths else None


def annotation_sha256(folder: Path, slide_id: str) -> str | None:
    """The digest of a slide's file as it is now; None if it has none.

    Raises:
        ReadError: It has two files, or its file cannot be read.
    """
    path = annotation_path(folder, slide_id)
    return None if path is None else _sha256(_bytes(path))


def read_annotation(
    folder: Path, slide_id: str, level0_size: tuple[int, int], frame: Frame, choice: ClassChoice = EVERY_CLASS
) -> Annotation:
    """Read a slide's annotation as a mask.

    Args:
        folder: Holds `<slide_id>.geojson` or `<slide_id>.png`. Folders in the slide's id are sub-folders.
        slide_id: The slide.
        level0_size: Its width and height in level-0 pixels.
        frame: The mask's scale and size.
        choice: Which classes of a GeoJSON count.

    Raises:
        ReadError: The slide has no file or two, or its file cannot be read, or a mask image has other proportions
            or shall be read by classes.
    """
    path = annotation_path(folder, slide_id)
    if path is None:
        raise ReadError(
            f"{folder} has no annotation of it: expected {slide_id}.geojson (level-0 pixels) or {slide_id}.png"
        )
    content, left_out = _bytes(path), Counter[str]()
    try:
        if path.suffix == ".png" and choice != EVERY_CLASS:
            raise ReadError(f"a mask image has no classes: give the folder without :{choice}, or a GeoJSON")
        if path.suffix == ".png":
            mask = _mask_of_image(path, level0_size, frame)
        else:
            areas, left_out = read_areas(content.decode("utf-8-sig"), choice)
            mask = mask_of(areas, frame.downsample, frame.size[::-1])
    except (ReadError, UnicodeDecodeError) as error:
        raise ReadError(f"annotation {path}: {error}") from error
    return Annotation(path=path, mask=mask, sha256=_sha256(content), left_out=left_out)


def _mask_of_image(path: Path, level0_size: tuple[int, int], frame: Frame) -> TissueMask:
    """The image's pixel at the center of each mask pixel: true where any color, or the palette's index, is not 0."""
    try:
        with opened_image(path) as image:
            has_alpha = image.mode in {"LA", "RGBA"}
            values = np.asarray(image.convert(image.mode[:-1]) if has_alpha else image)  # alpha does not mean tissue
    except (OSError, ValueError, SyntaxError) as error:
        raise ReadError(f"Pillow cannot read it: {error}") from error
    height, width = values.shape[:2]
    across, down = level0_size[0] / width, level0_size[1] / height
    if abs(across / down - 1) > ASPECT_TOLERANCE:
        raise ReadError(
            f"it has {width} x {height} px and cannot cover {level0_size[0]} x {level0_size[1]} level-0 px: "
            "expected the same proportions"
        )
    filled = np.asarray(values if values.ndim == 2 else values.max(axis=2)) != 0
    columns, rows = ((np.arange(n) + 0.5) * frame.downsample for n in frame.size)
    column = np.minimum((columns / across).astype(np.int64), width - 1)
    row = np.minimum((rows / down).astype(np.int64), height - 1)
    return filled[np.ix_(row, column)]


def _bytes(path: Path) -> bytes:
    try:
        if path.suffix != ".png":
            require_bytes(path)
        return path.read_bytes()
    except OSError as error:
        raise ReadError(f"cannot read {path}: {error.strerror}") from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

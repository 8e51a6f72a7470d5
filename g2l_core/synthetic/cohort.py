"""Small H&E-like pyramidal slides with planted classes and centers.

They are for demonstrations and tests, here and in other projects. A whole cohort is drawn in seconds, the class of
every patch is known, and the two centers stain and scan differently on purpose. `tissue` has the drawing.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
from jaxtyping import Float, UInt8
from PIL import Image

from g2l_core.errors import ReadError, UsageError
from g2l_core.files import csv_row
from g2l_core.synthetic.tissue import CLASSES, MAP_UM, ClassMap, Look, draw_field
from g2l_core.types import Coords, Rgb

__all__ = (
    "CENTERS", "CLASSES", "MAP_UM", "CohortSpec", "draw_cohort", "draw_slide", "label_patches",
    "patch_classes", "read_class_map", "write_pyramid",
)  # fmt: skip

CENTERS = ("north", "south")

# Stain vectors: Ruifrok & Johnston (2001), its eosin warmed by a fifth of Macenko's, for the north;
# Macenko et al. (ISBI 2009) for the south. Strengths and glass are free.
LOOKS = {
    "north": Look(
        hematoxylin=(0.65, 0.70, 0.29),
        eosin=(0.08, 0.92, 0.30),
        strength=(1.0, 0.8),
        glass=(243.0, 242.0, 244.0),
        blur_um=0.25,
    ),
    "south": Look(
        hematoxylin=(0.56, 0.72, 0.41),
        eosin=(0.22, 0.80, 0.56),
        strength=(1.1, 0.9),
        glass=(245.0, 243.0, 237.0),
        blur_um=0.35,
    ),
}

MAP_COLORS = (255, 255, 255, 232, 160, 180, 120, 60, 150, 60, 70, 150)
"""Red, green and blue of glass and of each class in a class map's palette, for people who open the file."""

PURE = 0.9
"""Minimum fraction of a patch's tissue that must be of one class to label the patch."""


@dataclass(frozen=True, kw_only=True)
class CohortSpec:
    """What to draw. The same spec gives the same pixels."""

    patients: int = 12
    """At least 6. They come from the centers in turn."""
    slides_per_patient: int = 1
    size_um: tuple[float, float] = (1440.0, 960.0)
    """Width and height of every slide; multiples of 4 um."""
    mpp: tuple[float, float] = (0.5, 0.25)
    """Micrometers per pixel of the first and of the second center's scanner; each is 1 um over a whole number."""
    quality: int | None = 85
    """JPEG quality of the slides; None is lossless."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a cohort that cannot be drawn.

        Raises:
            UsageError: A field is out of its range.
        """
        _require(self.patients >= 6, "patients", "at least 6 (three a center)", self.patients)
        _require(self.slides_per_patient >= 1, "slides_per_patient", "at least 1", self.slides_per_patient)
        _require(self.seed >= 0, "seed", "0 or more", self.seed)
        fits = all(side >= 64 * MAP_UM and side % MAP_UM == 0 for side in self.size_um)
        _require(fits, "size_um", f"multiples of {MAP_UM:g} um, at least {64 * MAP_UM:g}", self.size_um)
        whole = all(0.1 <= m <= 1 and abs(1 / m - round(1 / m)) < 1e-9 for m in self.mpp)
        _require(whole, "mpp", "1 um over a whole number up to 10 (1, 0.5, 0.25, ...)", self.mpp)

    @property
    def slides(self) -> int:
        """How many slides there are."""
        return self.patients * self.slides_per_patient

    def patient(self, index: int) -> int:
        """The patient, 0 .. patients - 1, of a slide, 0 .. slides - 1."""
        return index // self.slides_per_patient

    def center(self, index: int) -> int:
        """The slide's center, as an index of `CENTERS`."""
        return self.patient(index) % len(CENTERS)

    def slide_id(self, index: int) -> str:
        """The slide's name: `p01-1` is the first slide of the first patient."""
        return f"{self.patient_id(index)}-{index % self.slides_per_patient + 1}"

    def patient_id(self, index: int) -> str:
        """The name of the slide's patient."""
        return f"p{self.patient(index) + 1:02d}"


def _require(holds: bool, field: str, wanted: str, got: object) -> None:
    if not holds:
        raise UsageError(f"CohortSpec.{field}: expected {wanted}, got {got!r}.")


# ---- slides -----------------------------------------------------------------------------------------------


def write_pyramid(
    path: Path,
    image: Rgb,
    *,
    mpp: float,
    downsamples: Sequence[int] = (1, 2, 4),
    tile_px: int = 256,
    quality: int | None = 90,
) -> None:
    """Write an image as a tiled, pyramidal TIFF that OpenSlide reads (its format `generic-tiff`).

    Args:
        path: The file to write; an existing one is replaced.
        image: Level 0, uint8 (height, width, 3), red green blue.
        mpp: Micrometers per pixel of level 0; written as pixels per centimeter.
        downsamples: Whole-number factors of the levels, from 1 upwards; they divide the image's sides, so that
            each pixel of a level is the mean of whole pixels of level 0.
        tile_px: Side of the tiles, a multiple of 16 (TIFF 6.0, section 15).
        quality: JPEG quality 1 .. 100 (4:2:0 chroma); None is lossless (deflate).

    Raises:
        UsageError: An argument is out of its range.
    """
    _check_pyramid(image, mpp, downsamples, tile_px, quality)
    with tifffile.TiffWriter(path, bigtiff=False) as tiff:
        for factor in downsamples:
            level = _area_mean(image, factor) if factor > 1 else image
            tiff.write(
                _tiles(level, tile_px),
                shape=level.shape,
                dtype=level.dtype,
                **_coding(quality),
                photometric="rgb",  # of the input: tifffile stores JPEG as YCbCr and tags it so
                tile=(tile_px, tile_px),
                resolution=(1e4 / (mpp * factor), 1e4 / (mpp * factor)),
                resolutionunit="CENTIMETER",
                subfiletype=int(factor > 1),  # bit 0: a reduced version of another image of the file
                metadata=None,
            )


def _coding(quality: int | None) -> dict[str, Any]:
    """New compression arguments for JPEG or deflate, since tifffile writes into them."""
    if quality is None:
        return {"compression": "adobe_deflate", "predictor": True}
    return {"compression": "jpeg", "subsampling": (2, 2), "compressionargs": {"level": quality}}


def _check_pyramid(image: Rgb, mpp: float, downsamples: Sequence[int], tile_px: int, quality: int | None) -> None:
    """Refuse what `write_pyramid` cannot write, with the name of the argument."""
    height, width, _ = image.shape
    rising = all(a < b for a, b in pairwise(downsamples))
    problem = ""
    if not (isfinite(mpp) and mpp > 0):
        problem = f"expected mpp above 0 um, got {mpp}"
    elif not downsamples or downsamples[0] != 1 or not rising:
        problem = f"expected downsamples that rise from 1, got {tuple(downsamples)}"
    elif not image.size or any(side % factor for side in (width, height) for factor in downsamples):
        problem = f"expected sides that {tuple(downsamples)} divide, got {width} x {height} px; pad the image"
    elif tile_px <= 0 or tile_px % 16:
        problem = f"expected tile_px as a multiple of 16, got {tile_px}"
    elif quality is not None and not 1 <= quality <= 100:
        problem = f"expected quality 1 .. 100 or None, got {quality}"
    if problem:
        raise UsageError(f"write_pyramid: {problem}.")


def _tiles(image: Rgb, tile_px: int) -> Iterator[UInt8[np.ndarray, "tile tile 3"]]:
    """The image's tiles, row by row. The last ones repeat their edge, since JPEG would smear black into them."""
    height, width, _ = image.shape
    for top in range(0, height, tile_px):
        for left in range(0, width, tile_px):
            tile = image[top : top + tile_px, left : left + tile_px]
            below, right = tile_px - tile.shape[0], tile_px - tile.shape[1]
            yield cv2.copyMakeBorder(tile, 0, below, 0, right, cv2.BORDER_REPLICATE)


def _area_mean(image: Rgb, factor: int) -> UInt8[np.ndarray, "level_height level_width 3"]:
    """Mean of each `factor` x `factor` block, rounded to the nearest."""
    height, width, _ = image.shape
    return cv2.resize(image, (width // factor, height // factor), interpolation=cv2.INTER_AREA)


# ---- a cohort ---------------------------------------------------------------------------------------------


def draw_slide(spec: CohortSpec, index: int) -> tuple[Rgb, ClassMap]:
    """Draw one slide of a cohort. Only the arguments decide its pixels.

    Args:
        spec: The cohort.
        index: Which slide, 0 .. `spec.slides` - 1.

    Returns:
        The image at its center's mpp, uint8 (height, width, 3), and its class map at `MAP_UM`, uint8
        (height, width): 0 glass, else the index in `CLASSES` plus 1.

    Raises:
        UsageError: There is no such slide.
    """
    if not 0 <= index < spec.slides:
        raise UsageError(f"draw_slide: expected a slide index 0 .. {spec.slides - 1}, got {index}.")
    rng = np.random.default_rng([spec.seed, index])
    center = spec.center(index)
    return draw_field(rng, spec.size_um, spec.mpp[center], _vary(rng, LOOKS[CENTERS[center]]))


def _vary(rng: np.random.Generator, look: Look) -> Look:
    """One slide's own stain: strengths by about 12 %, stain vectors by about 4 %, glass by 1 gray level."""

    def shaken(values: tuple[float, ...], relative: float, absolute: float = 0.0) -> Float[np.ndarray, " value"]:
        scale = relative * np.array(values) + absolute
        return np.array(values) + np.clip(rng.standard_normal(len(values)), -2, 2) * scale

    return Look(
        hematoxylin=tuple(shaken(look.hematoxylin, 0.04)),
        eosin=tuple(shaken(look.eosin, 0.04)),
        strength=tuple(shaken(look.strength, 0.12)),
        glass=tuple(shaken(look.glass, 0.0, 1.0)),
        blur_um=look.blur_um * rng.uniform(0.8, 1.25),
    )


def draw_cohort(folder: Path, spec: CohortSpec) -> Path:
    """Draw a cohort into a folder: slides, their class maps, and a manifest.

        folder/manifest.csv                      slide_id, path (relative to folder), patient_id, medical_center
        folder/slides/<slide_id>.tiff
        folder/truth/<slide_id>.classes.png      see `read_class_map`

    Args:
        folder: Created if it is missing. Files of the same names are replaced.
        spec: What to draw.

    Returns:
        The manifest.
    """
    for name in ("slides", "truth"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rows = [_draw_into(folder, spec, index) for index in range(spec.slides)]
    manifest = folder / "manifest.csv"
    with manifest.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("slide_id", "path", "patient_id", "medical_center"))
        writer.writerows(map(csv_row, rows))
    return manifest


def _draw_into(folder: Path, spec: CohortSpec, index: int) -> tuple[str, str, str, str]:
    """Write one slide and its class map. Returns its row of the manifest."""
    slide_id, center = spec.slide_id(index), spec.center(index)
    image, classes = draw_slide(spec, index)
    path = f"slides/{slide_id}.tiff"
    write_pyramid(folder / path, image, mpp=spec.mpp[center], quality=spec.quality)
    truth = Image.fromarray(classes)
    truth.putpalette(MAP_COLORS)
    truth.save(folder / "truth" / f"{slide_id}.classes.png")
    return slide_id, path, spec.patient_id(index), CENTERS[center]


# ---- truth ------------------------------------------------------------------------------------------------


def read_class_map(path: Path) -> ClassMap:
    """Read a class map that `draw_cohort` wrote.

    Args:
        path: A palette PNG, `MAP_UM` micrometers per pixel, which covers the whole slide.

    Returns:
        uint8 (height, width): 0 glass, else the index in `CLASSES` plus 1.

    Raises:
        ReadError: The file is not a class map.
    """
    try:
        with Image.open(path) as image:
            mode, values = image.mode, np.array(image)
    except OSError as error:
        raise ReadError(f"{path}: expected the PNG of a class map: {error}") from error
    if mode != "P" or values.max() > len(CLASSES):
        raise ReadError(f"{path}: expected palette indices 0 .. {len(CLASSES)}, got a PNG of mode {mode!r}.")
    return values


def label_patches(path: Path, coords: Coords, patch_px_level0: int, level0_size: tuple[int, int]) -> list[str]:
    """The class of each patch by name, from the class map of its slide.

    Args:
        path: The slide's class map.
        coords: int32 (patch, 2), x and y of the top-left corners in level-0 pixels.
        patch_px_level0: Side of a patch in level-0 pixels.
        level0_size: Width and height of the slide in level-0 pixels.

    Returns:
        For each patch one name of `CLASSES`, or "" where no class has 90 % of the patch's tissue.

    Raises:
        ReadError: The file is not a class map.
        UsageError: A size is not positive.
    """
    names = ("", *CLASSES)
    classes = patch_classes(read_class_map(path), coords, patch_px_level0, level0_size)
    return [names[index] for index in classes]


def patch_classes(
    classes: ClassMap, coords: Coords, patch_px_level0: int, level0_size: tuple[int, int]
) -> UInt8[np.ndarray, " patch"]:
    """The class that has at least 90 % of each patch's tissue.

    Args:
        classes: uint8 (height, width), the class map of the whole slide: 0 glass, else `CLASSES` index + 1.
        coords: int32 (patch, 2), x and y of the top-left corners in level-0 pixels.
        patch_px_level0: Side of a patch in level-0 pixels.
        level0_size: Width and height of the slide in level-0 pixels.

    Returns:
        uint8 (patch,): `CLASSES` index + 1; 0 where no class has that much, or there is no tissue at all.
        The outside of the slide is glass.

    Raises:
        UsageError: A size is not positive.
    """
    if patch_px_level0 <= 0 or min(level0_size) <= 0:
        raise UsageError(
            f"patch_classes: expected positive sizes, got patches of {patch_px_level0} px, slide {level0_size}."
        )
    scale = np.array(classes.shape[::-1]) / level0_size
    low, high = coords * scale, (coords + np.int64(patch_px_level0)) * scale
    areas = np.stack([_box_area(classes == index + 1, low, high) for index in range(len(CLASSES))])
    tissue = areas.sum(0)
    # The small term keeps a share of exactly 90 % from failing by rounding.
    pure = (tissue > 1e-9) & (areas.max(0) >= PURE * tissue - 1e-9)
    return np.where(pure, areas.argmax(0) + 1, 0).astype(np.uint8)


def _box_area(
    mask: np.ndarray, low: Float[np.ndarray, "patch 2"], high: Float[np.ndarray, "patch 2"]
) -> Float[np.ndarray, " patch"]:
    """Exact area of the mask in boxes with fractional corners.

    The integral image of a piecewise constant mask is bilinear within each pixel, so that interpolating it
    at the corners is exact.
    """
    integral = np.pad(mask.astype(np.float64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)

    def below(x: Float[np.ndarray, " patch"], y: Float[np.ndarray, " patch"]) -> Float[np.ndarray, " patch"]:
        x, y = np.clip(x, 0, mask.shape[1]), np.clip(y, 0, mask.shape[0])
        i, j = np.minimum(x.astype(int), mask.shape[1] - 1), np.minimum(y.astype(int), mask.shape[0] - 1)
        u, v = x - i, y - j
        top = integral[j, i] * (1 - u) + integral[j, i + 1] * u
        return top * (1 - v) + (integral[j + 1, i] * (1 - u) + integral[j + 1, i + 1] * u) * v

    (x0, y0), (x1, y1) = low.T, high.T
    return below(x1, y1) - below(x0, y1) - below(x1, y0) + below(x0, y0)

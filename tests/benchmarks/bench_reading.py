"""Reading 256 px patches at 0.5 um/px on one core: this library, and one OpenSlide region and resize a patch.

python tests/benchmarks/bench_reading.py [SLIDE]

A slide of 12288 x 12288 px at 0.25 um/px is made (JPEG tiles of 256 px, quality 85, levels 1, 4, 16) from the pixels
of SLIDE, enlarged twice and mirrored, or else from drawn ones. All read the same patches, cell by cell in stored
order, in turns.
"""

import sys
import tempfile
from pathlib import Path
from time import perf_counter

import cv2
import numpy as np
import openslide
from PIL import Image

from g2l_core.patches.grid import GridSpec, grid_coords, patch_side_level0
from g2l_core.slides.slide import open_slide
from g2l_core.synthetic.cohort import CohortSpec, draw_cohort, write_pyramid

ROUNDS = 3
SIDE = 12288


def main() -> None:
    """Print the best rate of each of a few rounds, and their ratio."""
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as work:
        path = large_slide(Path(work), Path(sys.argv[1]) if len(sys.argv) > 1 else None)
        with open_slide(path) as slide:
            side = patch_side_level0(GridSpec(), slide.mpp)
            coords = grid_coords(slide.level0_size, side, None, 1.0, GridSpec(), "slide")
        rates = {"this library": 0.0, "its OpenSlide path": 0.0, "OpenSlide and Pillow": 0.0}
        for _ in range(ROUNDS):
            for name in rates:
                begin = perf_counter()
                read_all(name, path, coords, side)
                rates[name] = max(rates[name], len(coords) / (perf_counter() - begin))
    for name, rate in rates.items():
        print(f"{name:22}{rate:7.0f} patches/s  {rate / rates['OpenSlide and Pillow']:.2f} x")


def large_slide(work: Path, pixels: Path | None) -> Path:
    """A slide of `SIDE` squared with the pixels of another one."""
    if pixels is None:
        draw_cohort(work, CohortSpec(patients=6))
        pixels = sorted((work / "slides").glob("*.tiff"))[0]
    with openslide.OpenSlide(pixels) as slide:
        image = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    image = cv2.resize(image, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    height, width, _ = image.shape
    image = np.pad(image, ((0, max(0, SIDE - height)), (0, max(0, SIDE - width)), (0, 0)), mode="symmetric")[
        :SIDE, :SIDE
    ]
    noise = np.random.default_rng(0).normal(0, 2, image.shape).astype(np.float32)
    image = np.clip(image + noise, 0, 255).astype(np.uint8)
    write_pyramid(work / "large.tiff", image, mpp=0.25, downsamples=(1, 4, 16), quality=85)
    return work / "large.tiff"


def read_all(name: str, path: Path, coords: np.ndarray, side: int) -> None:
    """Every patch once."""
    if name == "OpenSlide and Pillow":
        with openslide.OpenSlide(path) as read:
            for x, y in coords.tolist():
                region = read.read_region((x, y), 0, (side, side)).convert("RGB")
                np.asarray(region.resize((256, 256), Image.Resampling.BILINEAR))
        return
    with open_slide(path, own_tiles=name == "this library") as slide:
        for x, y in coords.tolist():
            slide.read_patch(x, y, side, 256)


if __name__ == "__main__":
    main()

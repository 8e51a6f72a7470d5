"""What `g2l predict --budget` loses: AUC of slides with planted classes, and how far scores of real slides are off.

python tests/benchmarks/bench_budget.py WORK [--pixels drawn real] [--slides 24] [--side 20] [--budgets 0.05 0.1 0.15]
    [--seeds 3] [--tolerance 0.01] [--compose 4000] [--csv FILE]

Tiles are cut from drawn slides, or are real ones (G2L_TEST_DATA: 7 classes of colorectal tissue). SLIDES mosaics of
SIDE x SIDE tiles with planted shares of tumor are written, and encoded by EfficientNet-Lite0 with the ImageNet weights
of its package at 64 px. A probe of tiles, a probe of slides and ABMIL are fitted on them as `g2l fit-head` does. Then
60 slides of as many patches as slides have (COMPOSE) are composed of these encoded patches, each with its look on its
mosaic's thumbnail. In "burden" a slide has 5 to 35 % of tumor and counts as positive above 20 %; in "focal" half of the
slides have 3 % of tumor and the others none. The figures are those of sampling alone: how well a head does on other
patients is not asked here.

Each slide is answered from all patches and, for every seed, from a budget: as `g2l predict` does ("strata"), and
from patches drawn at random alike ("random"), with the same rule of when to stop. "loss" is the AUC from all patches
less the mean AUC over seeds, "factor" the patches of all slides over those encoded, "error" the root mean square
difference of the score, "held" how often the interval holds the score from all patches (at least 0.95 is promised).
The two real slides, in patches of 96 px, have no classes: only their errors are given.
"""

import argparse
import csv
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from sklearn.metrics import roc_auc_score

from g2l_core.encoders.resolve import resolve_encoder
from g2l_core.heads.head import RECORD, Head, read_head
from g2l_core.heads.sampling import plan_sample, settle
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.views import ViewSpec
from g2l_core.store.features import FeatureStore, StoredSlide
from g2l_core.synthetic.cohort import CohortSpec, draw_cohort, label_patches, write_pyramid
from g2l_core.types import Rgb
from pipeline.budget import Budget, looks_of
from pipeline.cache_teacher import run_extraction
from pipeline.fit_head import run_fit_head
from pipeline.settings import ExtractionSettings
from pipeline.tables import table_text

ENCODER, TILE_PX, MPP = "efficientnet-lite0@64", 224, 0.5
SETTINGS = ExtractionSettings(views=0, pictures=False, accept_mpp=True, force_mpp=True)
KINDS = {"probe": "tiles", "slide_probe": "slides", "abmil": "slides"}
TASKS = """
[tasks.tiles]
labels = "tiles.csv"
missing = "note"
label = "tissue"
metrics = ["probe"]
probe_c = [0.1]
folds = 3

[tasks.slides]
labels = "slides.csv"
missing = "note"
label = "class"
metrics = ["slide_probe", "abmil"]
probe_c = [0.1]
folds = 3
abmil_folds = 3
"""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row of the table."""

    pixels: str
    task: str
    head: str
    way: str
    budget: float
    auc: str
    loss: str
    factor: str
    error: str
    held: str


# -- slides -------------------------------------------------------------------------------------------------


def real_tiles() -> dict[str, list[Rgb]]:
    """The real tiles, by class."""
    found: dict[str, list[Rgb]] = {}
    for path in sorted((Path(os.environ["G2L_TEST_DATA"]) / "patches/crc-val-he-7k-sample").glob("*.jpg")):
        found.setdefault(path.name.partition("___")[0], []).append(np.asarray(Image.open(path).convert("RGB")))
    return found


def drawn_tiles(folder: Path) -> dict[str, list[Rgb]]:
    """Tiles of one class of drawn slides, by class."""
    spec, found = CohortSpec(patients=8, size_um=(1792.0, 1792.0), mpp=(MPP, MPP)), dict[str, list[Rgb]]()
    draw_cohort(folder, spec)
    for path in sorted((folder / "slides").iterdir()):
        image = np.asarray(Image.open(path))
        places = [(x, y) for y in range(0, image.shape[0], TILE_PX) for x in range(0, image.shape[1], TILE_PX)]
        truth = folder / f"truth/{path.stem}.classes.png"
        names = label_patches(truth, np.array(places, np.int32), TILE_PX, image.shape[1::-1])
        for (x, y), name in zip(places, names, strict=True):
            tile = image[y : y + TILE_PX, x : x + TILE_PX]
            if name and tile.shape[:2] == (TILE_PX, TILE_PX):
                found.setdefault("TUM" if name == "tumor" else name, []).append(tile)
    return found


def clumps(rng: np.random.Generator, side: int) -> np.ndarray:
    """The places of a mosaic in an order in which neighbors come together."""
    noise = cv2.GaussianBlur(rng.standard_normal((side, side)), (0, 0), 2.0)
    return np.argsort(noise.ravel())


def mosaic(
    rng: np.random.Generator, tiles: Mapping[str, Sequence[Rgb]], side: int, tumor: int
) -> tuple[Rgb, list[str]]:
    """A slide with so many tiles of tumor, and the class of each tile."""
    others = sorted(set(tiles) - {"TUM"})
    shares = rng.dirichlet(np.full(len(others), 2.0))
    rest = np.repeat(others, rng.multinomial(side * side - tumor, shares))
    names = np.empty(side * side, object)
    places = clumps(rng, side)
    names[places[:tumor]], names[places[tumor:]] = "TUM", rest
    image = np.empty((side * TILE_PX, side * TILE_PX, 3), np.uint8)
    stain = rng.normal(1, 0.05, 3)
    for place, name in enumerate(names.tolist()):
        tile = tiles[name][rng.integers(len(tiles[name]))]
        tile = np.rot90(tile, rng.integers(4))[:: rng.choice([-1, 1])]
        y, x = divmod(place, side)
        shown = 255 * (tile / 255) ** (stain * rng.normal(1, 0.03))
        image[y * TILE_PX :, x * TILE_PX :][:TILE_PX, :TILE_PX] = np.clip(shown, 0, 255)
    return image, names.tolist()


def write_cohort(folder: Path, tiles: Mapping[str, Sequence[Rgb]], task: str, slides: int, side: int) -> None:
    """Write the slides of one task with the labels of slides and tiles."""
    (folder / "slides").mkdir(parents=True)
    of_slides, of_tiles = [["slide_id", "class"]], [["slide_id", "x", "y", "tissue"]]
    for number in range(slides):
        rng = np.random.default_rng([number, task == "focal"])
        positive = number % 2 == 1
        share = 0.05 + 0.15 * (rng.random() + positive) if task == "burden" else 0.03 * positive
        image, names = mosaic(rng, tiles, side, round(share * side * side))
        write_pyramid(folder / "slides" / f"s{number:03d}.tiff", image, mpp=MPP)
        of_slides.append([f"s{number:03d}", "positive" if positive else "negative"])
        for place, name in enumerate(names):
            y, x = divmod(place, side)
            of_tiles.append([f"s{number:03d}", x * TILE_PX, y * TILE_PX, "tumor" if name == "TUM" else "other"])
    for name, rows in (("slides", of_slides), ("tiles", of_tiles)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    (folder / "tasks.toml").write_text(TASKS)


# -- answers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cached:
    """A slide with all that answers are made from."""

    slide_id: str
    features: np.ndarray
    good: np.ndarray
    looks: np.ndarray


def cached(slide: StoredSlide, key: str) -> Cached:
    """Read a slide."""
    return Cached(
        slide_id=slide.slide_id,
        features=slide.features(key),
        good=slide.patch_status == 0,
        looks=looks_of(slide, icc=False),
    )


def composed(
    slides: Sequence[Cached], classes: Mapping[str, Sequence[str]], task: str, size: int
) -> tuple[list[Cached], list[bool]]:
    """Large slides of the patches of small ones, and which of them are positive."""
    kind = np.concatenate([classes[slide.slide_id] for slide in slides])
    features = np.concatenate([slide.features for slide in slides])
    looks = np.concatenate([slide.looks for slide in slides])
    found, positives = list[Cached](), list[bool]()
    for number in range(60):
        rng, positive = np.random.default_rng([number, 7]), number % 2 == 1
        share = 0.05 + 0.15 * (rng.random() + positive) if task == "burden" else 0.03 * positive
        tumor = round(share * size)
        rows = np.concatenate(
            [rng.choice(np.flatnonzero((kind == "tumor") == side), count)
             for side, count in ((True, tumor), (False, size - tumor))]
        )  # fmt: skip
        own = Cached(slide_id=f"c{number}", features=features[rows], good=np.ones(size, bool), looks=looks[rows])
        found.append(own)
        positives.append(positive)
    return found, positives


def score(values: np.ndarray) -> float:
    """The probability of the second class."""
    return float(values[1])


def lines(
    names: tuple[str, str, str],
    head: Head,
    slides: Sequence[Cached],
    positive: Sequence[bool],
    asked: argparse.Namespace,
) -> Iterator[Line]:
    """Rows of the table for one head."""
    whole = np.array([score(head.apply(slide.features[slide.good]).values) for slide in slides])
    patches = sum(len(slide.features) for slide in slides)
    auc = roc_auc_score(positive, whole) if positive else np.nan
    for share in asked.budgets:
        budget = Budget(share=share, tolerance=asked.tolerance)
        for way in ("strata", "random"):
            aucs, errors, held, encoded = [], [], [], 0
            for seed in range(asked.seeds):
                found = [_answer(head, slide, budget, way, seed) for slide in slides]
                scores = np.array([score(one.estimate.found.values) for one in found])
                aucs.append(roc_auc_score(positive, scores) if positive else np.nan)
                errors += (scores - whole).tolist()
                held += (np.abs(scores - whole) <= [one.estimate.margin[1] for one in found]).tolist()
                encoded += sum(one.encoded for one in found)
            line = Line(
                pixels=names[0], task=names[1], head=names[2], way=way, budget=share,
                auc=f"{auc:.3f}" if positive else "",
                loss=f"{auc - np.mean(aucs):.4f}" if positive else "",
                factor=f"{patches * asked.seeds / encoded:.1f}",
                error=f"{np.sqrt(np.mean(np.square(errors))):.4f}", held=f"{np.mean(held):.3f}",
            )  # fmt: skip
            print(line, file=sys.stderr)
            yield line


def _answer(head: Head, slide: Cached, budget: Budget, way: str, seed: int):
    looks = slide.looks if way == "strata" else slide.looks[:, :0]
    plan = plan_sample(looks, budget.most(len(looks)), seed, slide.slide_id)
    found = settle(head, plan, lambda rows: (slide.features[rows], slide.good[rows]), budget.tolerance)
    assert found is not None
    return found


def store_of(folder: Path, inputs: Path, patch_px: int, settings: ExtractionSettings) -> tuple[FeatureStore, str]:
    """All features of the slides in a folder."""
    grid = GridSpec(patch_px=patch_px, mpp=MPP, tissue="none")
    summary = run_extraction(
        [inputs], folder, [resolve_encoder(ENCODER)], grid, ViewSpec(patch_px=patch_px, crop_px=patch_px), settings
    )
    return FeatureStore.open(folder), summary.encoders[0]


def main() -> None:
    """Draw, encode, fit, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--pixels", nargs="+", default=["drawn", "real"])
    parser.add_argument("--slides", type=int, default=24)
    parser.add_argument("--side", type=int, default=20)
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.05, 0.1, 0.15])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tolerance", type=float, default=0.01)
    parser.add_argument("--compose", type=int, default=4000)
    parser.add_argument("--csv", type=Path)
    asked = parser.parse_args()
    found = list[Line]()
    for pixels in asked.pixels:
        tiles = drawn_tiles(asked.work / "drawn-tiles") if pixels == "drawn" else real_tiles()
        for task in ("burden", "focal"):
            folder = asked.work / f"{pixels}-{task}"
            if not folder.exists():
                write_cohort(folder, tiles, task, asked.slides, asked.side)
            test, key = store_of(folder / "slides.zarr", folder / "slides", TILE_PX, SETTINGS)
            with (folder / "tiles.csv").open() as file:
                named = {(row["slide_id"], int(row["x"]), int(row["y"])): row["tissue"] for row in csv.DictReader(file)}
            classes = {s.slide_id: [named[s.slide_id, *place] for place in s.coords.tolist()] for s in test.slides()}
            small = [cached(slide, key) for slide in test.slides()]
            slides, positive = composed(small, classes, task, asked.compose)
            for kind, of in KINDS.items():
                if not (folder / kind / RECORD).is_file():
                    stores = [folder / "slides.zarr"]
                    run_fit_head(folder / "tasks.toml", of, stores, ENCODER, folder / kind, kind=kind)
                head = read_head(folder / kind)
                found += lines((pixels, task, kind), head, slides, positive, asked)
                if pixels == "real":
                    found += real_lines(asked, task, kind, head)
    header = tuple(field.name for field in fields(Line))
    cells = [tuple(str(getattr(line, name)) for name in header) for line in found]
    print(table_text(cells, header=header, right=range(4, len(header)), width=120))
    if asked.csv:
        with asked.csv.open("w", newline="") as file:
            csv.writer(file).writerows([header, *cells])


def real_lines(asked: argparse.Namespace, task: str, kind: str, head: Head) -> Iterator[Line]:
    """The two real slides, whose classes nobody knows."""
    inputs = Path(os.environ["G2L_TEST_DATA"]) / "slides"
    settings = ExtractionSettings(views=0, pictures=False, accept_mpp=True, force_mpp=True, mpp_override=0.25)
    store, key = store_of(asked.work / "slides.zarr", inputs, 96, settings)
    slides = [cached(slide, key) for slide in store.slides()]
    return lines(("slides", task, kind), head, slides, [], asked)


if __name__ == "__main__":
    main()

"""Stage two: a step with three teachers against the same step with one, in one run, from the same store.

python tests/benchmarks/bench_teachers.py [--student vit_tiny_patch16_224] [--rounds 4] [--steps 12] [--device cpu]
    [--precision fp32] [--loss logsum] [--nested 64,128]

Features of three teachers are cached as in docs/distillation.md: of 1536, 1280 and 1024 dimensions, like H-optimus-0,
Virchow2's class token and UNI. They are drawn at random, since speed does not depend on them. The student sees drawn
slides at its own input size. Runs of one and of three teachers take turns, so that what else the machine does is
shared; the first steps of each are left out. Last, the loader alone is timed, with targets in memory and on the disk.
"""

import argparse
import itertools
import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np

from g2l_core.distillation.loader import Reading, ReplayDataset
from g2l_core.distillation.logs import read_log
from g2l_core.distillation.replay import ReplaySpec
from g2l_core.encoders.loading import load_encoder
from g2l_core.encoders.resolve import resolve_encoder
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.views import ViewSpec
from g2l_core.store.features import FeatureStore
from g2l_core.store.writer import FeatureWriter
from g2l_core.synthetic.cohort import CohortSpec, draw_cohort
from pipeline.cache_teacher import run_extraction
from pipeline.config import settings_of
from pipeline.distill import run_distill
from pipeline.settings import DistillHow, ExtractionSettings

TEACHERS = {"first": 1536, "second": 1280, "third": 1024}
SMALL = "timm:mobilenetv3_small_050@64"
WARM_UP = 4


def make_store(folder: Path) -> Path:
    """A store of drawn slides with the drawn features of three teachers, in two augmented views."""
    cohort = draw_cohort(folder / "cohort", CohortSpec(patients=6, size_um=(1024.0, 1024.0)))
    store = folder / "store.zarr"
    spec = resolve_encoder(SMALL, weights="random:0")
    run_extraction([cohort], store, [spec], GridSpec(), ViewSpec(), ExtractionSettings())
    opened, facts = FeatureStore.open(store, writable=True), load_encoder(spec, device="cpu").facts
    rng = np.random.default_rng(0)
    for name, dim in TEACHERS.items():
        opened.add_encoder(name, replace(facts, name=name, dim=dim, digest=name, weights_digest=name))
        for slide in opened.slides():
            writer = FeatureWriter.open(slide, name, digest=name, dim=dim, n_views=3)
            for shard in writer.missing(range(3)):
                rows = slice(shard.start, shard.stop)
                drawn = rng.normal(size=(shard.stop - shard.start, dim)).astype(np.float16)
                writer.write(shard, drawn, slide.pixel_hash[rows, shard.view], slide.patch_status[rows])
    return store


def step_seconds(store: Path, out: Path, teachers: list[str], given: argparse.Namespace) -> list[float]:
    """The seconds of every step of a short run, but the first."""
    nested = tuple(int(width) for width in given.nested.split(",") if width)
    options = {
        "steps": given.steps,
        "validate_every": given.steps,
        "checkpoint_every": given.steps,
        "early_stop": 0,
        "hold_out": "0.2",
        "precision": given.precision,
        "loss": given.loss,
        "nested": nested,
    }
    student = resolve_encoder(f"timm:{given.student}", weights="random:1")
    how = DistillHow(device=given.device, workers=given.workers)
    run_distill(store, teachers, student, out, settings_of(options)[0], how=how)
    return [row["seconds"] for row in read_log(out / "log.csv")[WARM_UP:]]


def loader_seconds(store: Path, teachers: tuple[str, ...], gb: float) -> float:
    """Seconds of one batch of 32, without a student."""
    opened = FeatureStore.open(store)
    spec = ReplaySpec(encoders=teachers, n_augmented=2)
    data = ReplayDataset(opened, dict.fromkeys(opened.slide_ids()), spec, Reading(workers=1, targets_gb=gb))
    begin = perf_counter()
    count = sum(1 for _ in itertools.islice(data.batches(), 3 * data.batches_per_epoch))
    return (perf_counter() - begin) / count


def main() -> None:
    """Print the median step with one and three teachers, their ratio, and what the loader takes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", default="vit_tiny_patch16_224")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--loss", default="logsum")
    parser.add_argument("--nested", default="")
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    names = list(TEACHERS)
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder))
        found: dict[int, list[float]] = {1: [], 3: []}
        for i in range(given.rounds):
            for n in (1, 3) if i % 2 else (3, 1):
                found[n] += step_seconds(store, Path(folder) / f"run-{i}-{n}", names[:n], given)
        one, three = (float(np.median(found[n])) for n in (1, 3))
        print(f"one teacher {one:.4f} s a step, three {three:.4f} s: {three / one:.3f} x")
        for gb, where in ((4.0, "memory"), (0.0, "disk")):
            one, three = (loader_seconds(store, tuple(names[:n]), gb) for n in (1, 3))
            print(f"loader alone, targets from {where}: {one:.4f} and {three:.4f} s a batch, {three / one:.3f} x")


if __name__ == "__main__":
    main()

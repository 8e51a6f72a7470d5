"""Stage one end to end against the encoder's bare forward rate, in one run.

python tests/benchmarks/bench_stage_one.py [--architecture vit_small_patch16_224] [--patches 400] [--rounds 3]

A 0.25 um/px JPEG slide is drawn (256 px tiles, levels 1, 4, 16), cut into 256 px patches at 0.5 um/px, and encoded
with one view in float32, batch 32; the bare rate is that of the same encoder on random pixels of the views' size, taken
before and after each round. Weights are random: speed does not depend on them.
"""

import argparse
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np

from g2l_core.encoders.loading import encode, load_encoder
from g2l_core.encoders.resolve import resolve_encoder
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.views import ViewSpec
from g2l_core.synthetic.cohort import CohortSpec, draw_cohort
from pipeline.cache_teacher import run_extraction
from pipeline.settings import ExtractionSettings

BATCH_SIZE = 32
BARE_BATCHES = 4


def bare_rate(encoder) -> float:
    """Views a second of the encoder alone."""
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH_SIZE, 224, 224, 3), np.uint8)
    encode(encoder, pixels)
    begin = perf_counter()
    for _ in range(BARE_BATCHES):
        encode(encoder, pixels)
    return BARE_BATCHES * BATCH_SIZE / (perf_counter() - begin)


def main() -> None:
    """Print both rates of every round, and the median ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--architecture", default="vit_small_patch16_224")
    parser.add_argument("--patches", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    asked = parser.parse_args()
    spec = resolve_encoder(f"timm:{asked.architecture}", weights="random:0")
    encoder = load_encoder(spec, device=asked.device, precision=asked.precision)
    ratios = []
    with tempfile.TemporaryDirectory() as work:
        draw_cohort(Path(work) / "cohort", CohortSpec(patients=6, size_um=(3072.0, 3072.0), mpp=(0.25, 0.25)))
        slide = sorted((Path(work) / "cohort/slides").glob("*.tiff"))[0]
        grid = GridSpec(tissue="none", max_patches=asked.patches)
        for i in range(asked.rounds):
            before = bare_rate(encoder)
            settings = ExtractionSettings(
                views=0, device=asked.device, precision=asked.precision, batch_size=BATCH_SIZE
            )
            store = Path(work) / f"{i}.zarr"
            summary = run_extraction([slide], store, [spec], grid, ViewSpec(), settings)
            bare = (before + bare_rate(encoder)) / 2
            whole = summary.encoded / summary.elapsed
            ratios.append(whole / bare)
            print(f"stage one {whole:.1f}/s, bare forward {bare:.1f}/s: {ratios[-1]:.2f}", flush=True)
    print(f"{asked.architecture}: {np.median(ratios):.2f} of the bare rate")


if __name__ == "__main__":
    main()

"""Time and peak memory of stage one as a cohort grows: 1, 10 and 100 slides.

python tests/benchmarks/bench_growth.py

The slides are links to six drawn ones of 36 patches each; two views; MobileNetV3-small at 64 px with random weights.
Each size runs in a process of its own; seconds are those of encoding, without start and tissue.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from g2l_core.store.features import FeatureStore
from g2l_core.synthetic.cohort import CohortSpec, draw_cohort
from tests.pipeline.test_memory import stage_one


def main() -> None:
    """Print patches, seconds, rate and peak memory of each size."""
    with tempfile.TemporaryDirectory() as work:
        cohort = draw_cohort(Path(work) / "cohort", CohortSpec(patients=6, size_um=(768.0, 768.0)))
        for n_slides in (1, 10, 100):
            found = stage_one(cohort, Path(work) / str(n_slides), n_slides)
            seconds = FeatureStore.open(Path(work) / f"{n_slides}.zarr").facts.runs[-1].elapsed
            rate = found["patches"] / seconds
            print(
                f"{n_slides:4} slides {found['patches']:6} patches {seconds:7.1f} s {rate:6.0f}/s"
                f"  peak {found['peak_mib']:.0f} MiB"
            )


if __name__ == "__main__":
    main()

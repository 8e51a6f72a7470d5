"""Stage two: a step from the cache against the same step with the teacher run live, in one run, and the wait for data.

python tests/benchmarks/bench_distill.py [--teacher vit_small_patch16_224] [--student vit_tiny_patch16_224]
    [--steps 40] [--device cpu] [--precision fp32]

A 0.25 um/px JPEG slide is drawn and its patches cached; weights are random, speed does not depend on them. The forward
cost of the teacher and the whole student step are measured alone, on pixels that are there: they predict what a step of
either kind should take. On a CPU the loader's one thread has a core of its own to read from.
"""

import argparse
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from g2l_core.distillation.distiller import Distiller
from g2l_core.distillation.logs import read_log
from g2l_core.distillation.objective import Objective
from g2l_core.distillation.spec import ObjectiveSpec
from g2l_core.encoders.loading import DTYPES, choose_device, features_of, load_encoder
from g2l_core.encoders.resolve import resolve_encoder
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.views import ViewSpec
from g2l_core.synthetic.cohort import CohortSpec, draw_cohort
from pipeline.cache_teacher import run_extraction
from pipeline.config import settings_of
from pipeline.distill import run_distill
from pipeline.settings import DistillHow, ExtractionSettings

BATCH_SIZE = 32
ALONE = 10
"""Steps of each part alone."""


def seconds_of(work, device: torch.device) -> float:
    """Median seconds of a piece of work, after one to warm up."""
    taken = []
    for i in range(ALONE + 1):
        begin = perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken += [perf_counter() - begin] if i else []
    return float(np.median(taken))


def parts(teacher, student, precision: str, device: torch.device) -> tuple[float, float]:
    """Seconds of the teacher's forward pass, and of a student step, on one batch."""
    live = load_encoder(teacher, device=str(device), precision=precision)
    loaded = load_encoder(student, device=str(device), precision=precision)
    distiller = Distiller(loaded.module.requires_grad_(True), loaded.dim, live.dim, 0).to(device)
    optimizer = torch.optim.AdamW(distiller.parameters())
    objective = Objective(ObjectiveSpec())
    pixels = torch.randint(0, 256, (BATCH_SIZE, 224, 224, 3), dtype=torch.uint8, device=device)
    targets = features_of(live, pixels)

    def step() -> None:
        with torch.autocast(device.type, DTYPES["bf16"], enabled=precision == "bf16"):
            projected = distiller(pixels)
        loss = objective(projected, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return seconds_of(lambda: features_of(live, pixels), device), seconds_of(step, device)


def main() -> None:
    """Print the parts, both kinds of step, the share of waiting, and what the parts predict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="vit_small_patch16_224")
    parser.add_argument("--student", default="vit_tiny_patch16_224")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    teacher = resolve_encoder(f"timm:{given.teacher}", weights="random:0")
    student = resolve_encoder(f"timm:{given.student}", weights="random:1")
    device = choose_device(given.device)
    with tempfile.TemporaryDirectory() as folder:
        cohort = draw_cohort(
            Path(folder) / "cohort", CohortSpec(patients=6, size_um=(1024.0, 1024.0), mpp=(0.25, 0.25))
        )
        store = Path(folder) / "store.zarr"
        how = ExtractionSettings(views=1, precision=given.precision, device=given.device)
        run_extraction([cohort], store, [teacher], GridSpec(), ViewSpec(), how)
        options = {"steps": given.steps, "early_stop": 0, "hold_out": "0.2", "validate_every": given.steps,
                   "checkpoint_every": given.steps, "precision": given.precision, "pool_blocks": 2}  # fmt: skip
        found = {}
        for online in (False, True):
            out = Path(folder) / f"run-{online}"
            settings, _ = settings_of({**options, "online": online})
            who = teacher if online else f"timm-{given.teacher}-random0"
            run_distill(store, who, student, out, settings, how=DistillHow(device=given.device, workers=given.workers))
            rows = read_log(out / "log.csv")[5:]
            found[online] = (np.median([r["seconds"] for r in rows]),
                             sum(r["seconds_waiting"] for r in rows) / sum(r["seconds"] for r in rows))  # fmt: skip
    forward, step = parts(teacher, student, given.precision, device)
    print(f"alone: teacher forward {forward:.3f} s, student step {step:.3f} s; so a live teacher should cost "
          f"{(forward + step) / step:.2f} x")  # fmt: skip
    for online, (seconds, waiting) in found.items():
        kind = "online" if online else "cached"
        print(f"{kind}: {seconds:.3f} s a step, {BATCH_SIZE / seconds:.1f} images/s, waiting {waiting:.1%}")
    ratio = found[True][0] / found[False][0]
    print(f"online over cached {ratio:.2f} x, of the predicted {ratio / ((forward + step) / step):.2f}")


if __name__ == "__main__":
    main()

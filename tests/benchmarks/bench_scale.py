"""What a store of many slides costs: time and memory to list it, to be ready to distill, and files and folders a slide.

    python tests/benchmarks/bench_scale.py --slides 100 1000 10000

One slide of 10,000 patches is written with features of 4 dimensions in 5 views, and copied under other ids: only the
numbers of slides, patches, views and files matter here, not what is in them. Each figure is of a process of its own, so
that memory is that of the one thing measured.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np

from g2l_core.patches.grid import GridSpec
from g2l_core.patches.views import COLUMNS, ViewSpec, sample_views
from g2l_core.slides.fingerprint import file_state
from g2l_core.store.documents import write_group
from g2l_core.store.facts import EncoderFacts, SlideFacts
from g2l_core.store.features import FeatureStore
from g2l_core.store.writer import FeatureWriter

PATCHES, VIEWS, DIM, ENCODER = 10_000, 5, 4, "toy"


def draw_store(folder: Path, n_slides: int) -> Path:
    """A store of so many equal slides."""
    source = folder / "slide.svs"
    source.write_bytes(b"not read")
    store = FeatureStore.create(folder / "s.zarr", grid=GridSpec().to_json(), views=ViewSpec().to_json())
    store.add_encoder(ENCODER, EncoderFacts(digest="0" * 64, dim=DIM))
    coords = np.stack(np.divmod(np.arange(PATCHES), 100), axis=1).astype(np.int32) * 512
    facts = SlideFacts(
        kind="slide", source=str(source), file_state=file_state(source), patch_px_level0=512, mpp=0.25,
        labels={"patient_id": "p0", "medical_center": "north"}, level0_size=(51200, 51200), fingerprint="0" * 32,
    )  # fmt: skip
    first = store.add_slide(
        "s00000", facts, coords=coords, view_params=sample_views(ViewSpec(), "s", coords, range(VIEWS)),
        columns=COLUMNS, patch_ids=None,
    )  # fmt: skip
    writer = FeatureWriter.open(first, ENCODER, digest="0" * 64, dim=DIM, n_views=VIEWS)
    rng = np.random.default_rng(0)
    for shard in writer.missing(range(VIEWS)):
        n = shard.stop - shard.start
        hashes = rng.integers(1, 2**63, n).astype(np.uint64)
        writer.write(shard, rng.normal(size=(n, DIM)).astype(np.float16), hashes, np.zeros(n, np.uint8))
    for i in range(1, n_slides):
        slide_id = f"s{i:05}"
        target = store.path / "slides" / slide_id
        shutil.copytree(first.folder, target, copy_function=os.link, ignore=shutil.ignore_patterns("zarr.json"))
        for path in first.folder.rglob("*/zarr.json"):
            os.link(path, target / path.relative_to(first.folder))
        labels = {"patient_id": f"p{i // 2}", "medical_center": "north" if i % 3 else "south"}
        write_group(target, replace(first.facts, slide_id=slide_id, labels=labels).to_json())
    return store.path


def index(path: Path) -> None:
    FeatureStore.open(path, writable=True).save_catalogue()


def list_slides(path: Path) -> None:
    assert sum(len(slide) for slide in FeatureStore.open(path).slides())


def loader(path: Path) -> None:
    from g2l_core.distillation.loader import Reading, ReplayDataset
    from g2l_core.distillation.replay import ReplaySpec

    store = FeatureStore.open(path)
    spec = ReplaySpec(encoders=(ENCODER,), n_augmented=VIEWS - 1)
    reading = Reading(targets_gb=0)  # with 1,536 dimensions they do not fit
    dataset = ReplayDataset(store, dict.fromkeys(store.slide_ids()), spec, reading)
    assert next(dataset._order.batches(0)).position == 0  # and the first batches are planned


MEASURED = {"first index": index, "list": list_slides, "loader ready": loader}


def measure(name: str, path: Path) -> dict[str, float]:
    """Seconds and MiB of one measured thing, in this process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = perf_counter()
    MEASURED[name](path)
    seconds = perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "MiB": peak / 1024, "MiB before": before / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--folder", type=Path, default=None, help="Where the stores are made.")
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "STORE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure[0], Path(arguments.measure[1]))))
        return
    print(f"{'slides':>7} {'':14} {'seconds':>8} {'MiB':>7} {'of it before':>13}")
    for n_slides in arguments.slides:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            path = draw_store(Path(folder), n_slides)
            for name in MEASURED:
                command = [sys.executable, __file__, "--measure", name, str(path)]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                print(f"{n_slides:7} {name:14} {found['seconds']:8.2f} {found['MiB']:7.0f} {found['MiB before']:13.0f}")
            inodes = sum(1 for _ in path.rglob("*"))
            print(f"{n_slides:7} files and folders a slide: {inodes / n_slides:.1f}")


if __name__ == "__main__":
    main()

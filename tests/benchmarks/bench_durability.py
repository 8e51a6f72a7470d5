"""What it costs that shards are on the disk before they count.

    python tests/benchmarks/bench_durability.py --folder DISK

Blocks of 4,096 patches in 5 views of 1,536 dimensions are written in turn with and without syncs, and slides of 10,000
patches are added. The share is that of the time in which an encoder of 1,000 views a second makes what is written.
"""

import argparse
import os
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from unittest.mock import patch

import numpy as np

from g2l_core.patches.grid import GridSpec
from g2l_core.patches.views import COLUMNS, ViewSpec, sample_views
from g2l_core.store.facts import EncoderFacts, SlideFacts
from g2l_core.store.features import FeatureStore, Shard
from g2l_core.store.schema import SHARD_ROWS
from g2l_core.store.writer import FeatureWriter

VIEWS, DIM, ROUNDS, RATE = 5, 1536, 8, 1000


def write_block(folder: Path, name: str) -> tuple[float, float]:
    """Seconds to add a slide of one block, and to write its features."""
    store = FeatureStore.create(folder / "s.zarr", grid=GridSpec().to_json(), views=ViewSpec().to_json())
    store.add_encoder("e", EncoderFacts(digest="0" * 64, dim=DIM))
    n, rng = SHARD_ROWS, np.random.default_rng(0)
    coords = np.stack(np.divmod(np.arange(n), 64), axis=1).astype(np.int32)
    params = sample_views(ViewSpec(), name, coords, range(VIEWS))
    features = rng.normal(size=(VIEWS, n, DIM)).astype(np.float16)
    hashes = rng.integers(1, 2**63, (VIEWS, n)).astype(np.uint64)
    begin = perf_counter()
    slide = store.add_slide(
        name, SlideFacts(kind="slide", source="/s.svs"), coords=coords, view_params=params, columns=COLUMNS,
        patch_ids=None,
    )  # fmt: skip
    laid = perf_counter()
    writer = FeatureWriter.open(slide, "e", digest="0" * 64, dim=DIM, n_views=VIEWS)
    writer.write_views([Shard(0, n, v) for v in range(VIEWS)], features, hashes, np.zeros(n, np.uint8))
    return laid - begin, perf_counter() - laid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    spent: dict[str, list[tuple[float, float]]] = {"synced": [], "not": []}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for i in range(ROUNDS):
            spent["synced"].append(write_block(Path(folder), f"a{i}"))
            with patch.object(os, "fsync", lambda _: None):
                spent["not"].append(write_block(Path(folder), f"b{i}"))
    for what, index in (("adding a slide", 0), ("writing a block", 1)):
        with_syncs, without = (median(times[index] for times in spent[how]) for how in ("synced", "not"))
        share = (with_syncs - without) / (SHARD_ROWS * VIEWS / RATE)
        print(f"{what}: {with_syncs * 1e3:.0f} ms, {without * 1e3:.0f} ms without syncs: {share:.2%} of encoding it")


if __name__ == "__main__":
    main()

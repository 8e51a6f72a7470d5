"""How quickly stored features are read, in order and at random, from shards, from a pack and by a bare memory map.

    python tests/benchmarks/bench_blocks.py --slides 20 --rounds 5

Slides of 10,000 patches with random features of 768 dimensions are written, packed, and read again while the page cache
has them: what is measured is the code, not the disk. "Zarr" is what reading the same shards through Zarr gives. Every
way is timed in each round, one after another, and the median over rounds is shown, also in rows for each second of the
processor, which other processes change less.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from unittest.mock import patch

import numpy as np

import g2l_core as g2l
from g2l_core.api.packs import FOLDER, pack_path
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.views import COLUMNS, ViewSpec, sample_views
from g2l_core.store import plain_shards
from g2l_core.store.facts import EncoderFacts, SlideFacts
from g2l_core.store.features import FeatureStore
from g2l_core.store.writer import FeatureWriter

PATCHES, DIM, ENCODER = 10_000, 768, "toy"
BLOCK, SINGLE_ROWS = 256, 2_000


def draw_store(path: Path, n_slides: int) -> None:
    """A store of random features."""
    store, rng = (
        FeatureStore.create(path, grid=GridSpec().to_json(), views=ViewSpec().to_json()),
        np.random.default_rng(0),
    )
    store.add_encoder(ENCODER, EncoderFacts(digest="0" * 64, dim=DIM))
    coords = np.stack(np.divmod(np.arange(PATCHES), 100), axis=1).astype(np.int32) * 512
    facts = SlideFacts(kind="slide", source="/s", patch_px_level0=512, mpp=0.25, labels={}, level0_size=(51200, 51200))
    for i in range(n_slides):
        params = sample_views(ViewSpec(), f"s{i:03}", coords, range(1))
        slide = store.add_slide(
            f"s{i:03}", facts, coords=coords, view_params=params, columns=COLUMNS, patch_ids=None
        )  # fmt: skip
        writer = FeatureWriter.open(slide, ENCODER, digest="0" * 64, dim=DIM, n_views=1)
        for shard in writer.missing([0]):
            n = shard.stop - shard.start
            features = rng.normal(size=(n, DIM)).astype(np.float16)
            writer.write(shard, features, np.arange(1, n + 1, dtype=np.uint64), np.zeros(n, np.uint8))
    store.save_catalogue()


def rows_a_second(read: Callable[[], int]) -> tuple[float, float]:
    """How many rows something reads in a second, and in a second of the processor's time."""
    begin, began = perf_counter(), process_time()
    rows = read()
    return rows / (perf_counter() - begin), rows / (process_time() - began)


def counted(blocks) -> int:
    return sum(len(block) for block in blocks)


def taken(read: Callable[[np.ndarray], np.ndarray], parts: list[np.ndarray]) -> int:
    return sum(len(read(rows)) for rows in parts)


def ways(cohort: g2l.Cohort, packed: np.ndarray, kind: str, rng: np.random.Generator) -> dict[str, Callable[[], int]]:
    """What is timed, by name: of shards or of a pack."""
    total = len(packed)
    starts = rng.permutation(total // BLOCK)[: 200_000 // BLOCK] * BLOCK
    blocks = [np.arange(a, a + BLOCK) for a in starts.tolist()]
    single = rng.choice(total, SINGLE_ROWS, replace=False)
    return {
        f"in order, {kind}": lambda: len(cohort.numpy(ENCODER)),
        f"blocks in order, {kind}": lambda: counted(cohort.blocks(ENCODER)),
        f"blocks at random, {kind}": lambda: counted(cohort.blocks(ENCODER, shuffle=True)),
        f"256 rows at random places, {kind}": lambda: taken(lambda rows: cohort.numpy(ENCODER, rows=rows), blocks),
        f"single rows at random, {kind}": lambda: len(cohort.numpy(ENCODER, rows=single)),
    }


def bare_ways(packed: np.ndarray, rng: np.random.Generator) -> dict[str, Callable[[], int]]:
    """The same by NumPy's memory map alone: nothing is checked, and one array knows no slides."""
    starts = (rng.permutation(len(packed) // BLOCK)[: 200_000 // BLOCK] * BLOCK).tolist()
    single = rng.choice(len(packed), SINGLE_ROWS, replace=False)
    return {
        "in order, memory map": lambda: len(np.array(packed)),
        "blocks in order, memory map": lambda: sum(
            len(packed[a : a + 4096].astype(np.float32)) for a in range(0, len(packed), 4096)
        ),
        "256 rows at random places, memory map": lambda: sum(len(np.array(packed[a : a + BLOCK])) for a in starts),
        "single rows at random, memory map": lambda: len(packed[single]),
    }


def main() -> None:
    """Time every way in every round, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slides", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {}
    os.fsync = lambda _: None  # the disk is not what is measured
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.zarr"
        draw_store(path, asked.slides)
        cohort, rng = g2l.open(path), np.random.default_rng(1)
        cohort.pack(ENCODER)
        packed, aside = np.load(pack_path(path, ENCODER, 0), mmap_mode="r"), path / f"{FOLDER}.aside"
        for _ in range(asked.rounds):
            timed = bare_ways(packed, rng) | ways(cohort, packed, "pack", rng)
            for name, read in timed.items():
                found.setdefault(name, []).append(rows_a_second(read))
            (path / FOLDER).rename(aside)
            for name, read in ways(cohort, packed, "shards", rng).items():
                found.setdefault(name, []).append(rows_a_second(read))
            with patch.object(plain_shards, "_plain_layout", lambda _: None):
                for name, read in ways(cohort, packed, "Zarr", rng).items():
                    found.setdefault(name, []).append(rows_a_second(read))
            aside.rename(path / FOLDER)
    for name, rates in found.items():
        wall, cpu = (median(of_kind) for of_kind in zip(*rates, strict=True))
        span = f"{min(rates)[0]:,.0f} to {max(rates)[0]:,.0f}"
        print(f"{name:40} {wall:12,.0f} rows/s ({span}), {cpu:12,.0f} rows per second of the processor")


if __name__ == "__main__":
    main()

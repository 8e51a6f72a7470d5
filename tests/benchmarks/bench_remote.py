"""Reading a store from an address against reading it from its folder, in one run.

python tests/benchmarks/bench_remote.py [ROWS]

A store of ROWS patches (131,072 if not given) of 768 features in slides of 8,192 is read through `Cohort.blocks`, in
stored order and in random order, from its folder, from a web server on the same machine that answers at once and after
20 ms, and from an S3 server. Both servers are Python's, in processes of their own: they cost more than the readers, so
the rates are what is reached at least. A memory map of the same rows is read beside them.
"""

import os
import subprocess
import sys
import tempfile
import urllib.request
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np

import g2l_core as g2l
from g2l_core.store.facts import EncoderFacts, SlideFacts
from g2l_core.store.features import FeatureStore
from g2l_core.store.upload import upload
from g2l_core.store.writer import FeatureWriter

DIM, PER_SLIDE, ROUNDS, DELAY_S = 768, 8192, 3, 0.02
ROOT = Path(__file__).resolve().parents[2]
S3_SERVER = (
    "import sys; from moto.server import ThreadedMotoServer as S; s = S('127.0.0.1', 0, verbose=False); s.start()"
    "; print('http://%s:%s' % s.get_host_and_port(), flush=True); sys.stdin.read()"
)


def main() -> None:
    """Print seconds to open, and rows a second, for each place."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 131_072
    with tempfile.TemporaryDirectory() as work, ExitStack() as servers:
        path = make_store(Path(work) / "s.zarr", rows)
        features = g2l.open(path).numpy("e")
        np.save(Path(work) / "all.npy", features)
        near, far = (
            servers.enter_context(served("-m", "tests.servers", work, str(delay_s))) for delay_s in (0, DELAY_S)
        )
        places = {
            "folder": path,
            "web server": f"{near}/s.zarr",
            f"web server, {1000 * DELAY_S:.0f} ms": f"{far}/s.zarr",
            "S3 server": uploaded(path, servers.enter_context(served("-c", S3_SERVER))),
        }
        best = {name: measure(place, rows) for name, place in places.items()}
        mapped = max(rows / timed(lambda: read_map(Path(work) / "all.npy")) for _ in range(ROUNDS))
    print(f"{'':24}{'open s':>8}{'sequential':>13}{'random':>13}   rows/s, best of {ROUNDS}")
    for name, (opening, sequential, shuffled) in best.items():
        print(f"{name:24}{opening:8.3f}{sequential:13,.0f}{shuffled:13,.0f}")
    print(f"{'memory map':24}{'':8}{mapped:13,.0f}")


def make_store(path: Path, rows: int) -> Path:
    """A store of random features."""
    store = FeatureStore.create(path, grid={"patch_px": 16, "mpp": 0.5}, views={"seed": 0, "crop_px": 16})
    store.add_encoder("e", EncoderFacts(digest="e", name="e", dim=DIM))
    rng = np.random.default_rng(0)
    for number in range(rows // PER_SLIDE):
        slide = store.add_slide(
            f"s{number:04}",
            SlideFacts(kind="slide", source="none", labels={"patient_id": str(number)}),
            coords=rng.integers(0, 99999, (PER_SLIDE, 2)).astype(np.int32),
            view_params=np.zeros((PER_SLIDE, 1, 2), np.float32),
            columns=["a", "b"],
            patch_ids=None,
        )
        writer = FeatureWriter.open(slide, "e", digest="e", dim=DIM, n_views=1)
        for shard in writer.missing([0]):
            n = shard.stop - shard.start
            hashes = np.arange(1, n + 1, dtype=np.uint64)
            writer.write(shard, rng.normal(size=(n, DIM)).astype(np.float32), hashes, np.zeros(n, np.uint8))
    store.save_catalogue()
    return path


@contextmanager
def served(*command: str):
    """The address of a server in a process of its own."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([sys.executable, *command], cwd=ROOT, text=True, **pipes)
    assert server.stdin
    assert server.stdout
    try:
        yield server.stdout.readline().strip()
    finally:
        server.stdin.close()
        server.wait()


def uploaded(path: Path, endpoint: str) -> str:
    """The address of the store in a new bucket."""
    settings = {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "REGION": "us-east-1", "ENDPOINT_URL": endpoint}
    os.environ.update({f"AWS_{name}": value for name, value in settings.items()})
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bucket", method="PUT")).close()
    for _ in upload(FeatureStore.open(path), "s3://bucket/s.zarr"):
        pass
    return "s3://bucket/s.zarr"


def measure(place: Path | str, rows: int) -> tuple[float, float, float]:
    """Seconds to open a store and list its slides, rows a second in stored order, and in random order."""
    opening = min(timed(lambda: g2l.open(place).slide_ids) for _ in range(ROUNDS))
    cohort = g2l.open(place)
    seconds = [min(timed(partial(read, cohort, rows, shuffle)) for _ in range(ROUNDS)) for shuffle in (False, True)]
    return opening, rows / seconds[0], rows / seconds[1]


def read(cohort: "g2l.Cohort", rows: int, shuffle: bool) -> None:
    """Every row once."""
    assert sum(map(len, cohort.blocks("e", shuffle=shuffle))) == rows


def read_map(path: Path) -> None:
    """Every row of a memory map, as float32, block by block."""
    mapped = np.load(path, mmap_mode="r")
    for start in range(0, len(mapped), 4096):
        mapped[start : start + 4096].astype(np.float32)


def timed(run) -> float:
    """Seconds."""
    begin = perf_counter()
    run()
    return perf_counter() - begin


if __name__ == "__main__":
    main()

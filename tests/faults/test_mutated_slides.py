"""Thousands of slides with mutated headers: each is read or fails by name, and none ends the process."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tifffile

from g2l_core.slides.ome_zarr import is_ome_zarr
from g2l_core.synthetic.cohort import write_pyramid
from tests.faults.test_untrusted_code import ome_zarr_2

ROOT = Path(__file__).resolve().parents[2]

READ_ALL = """
import json, os, sys
from pathlib import Path
from g2l_core.errors import SlideError
from g2l_core.extraction.patching import patch_sources
from g2l_core.patches.render import SlidePatches
from g2l_core.patches.spec import GridSpec
from g2l_core.slides.manifest import read_sources
from g2l_core.slides.slide import open_slide
from g2l_core.slides.under_way import UnderWay
from pipeline.audit import audit_sources

folder = Path(sys.argv[1])
sources, watch = read_sources([folder]), UnderWay(folder)
grid = GridSpec(tissue="otsu", min_tissue=0.0, max_patches=4, patch_px=64)
audit_sources(sources, mpp_override=0.5, workers=2, watch=watch, timeout=4)
ends = {}
for outcome in patch_sources(sources, grid, mpp_override=0.5, workers=2, watch=watch, timeout=4):
    ends[outcome.source.slide_id] = str(outcome.error or "")
    if outcome.error is not None:
        assert isinstance(outcome.error, SlideError)
        continue
    with watch.reading(outcome.source.slide_id):
        patched = outcome.patched
        reader = SlidePatches(
            open_slide(outcome.source.path, mpp_override=0.5), patched.coords, patched.facts.patch_px_level0, 64
        )
        for row in range(len(patched.coords)):
            try:
                reader.read(row)
            except SlideError as error:
                ends[outcome.source.slide_id] = "lost patch: " + str(error)
        reader.close()
print(json.dumps(ends), flush=True)
os._exit(0)  # as the command line does where threads are stuck: libraries may abort when they are torn down
"""

EXTREMES = (0, 1, 2, 3, 7, 255, 256, 32_767, 65_535, 1 << 20, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
ODD = (None, -1, 0, 1, 3.5, 1e308, 1 << 40, "", "x", "../x", [], {}, [[]], True, ["c", "y"], {"a": 1}, -(1 << 70))


def pixels(side: int) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 40, (side, side, 3), np.uint8)
    return noise + np.array([200, 80, 160], np.uint8)


def header_bytes(path: Path) -> np.ndarray:
    """Where the header is: the file's first bytes, every page's tags and what they point to, and every tile's start."""
    places = set(range(16))
    with tifffile.TiffFile(path) as tiff:
        for page in tiff.pages:
            places.update(range(page.offset, page.offset + 8 + 20 * len(page.tags)))
            for tag in page.tags:
                places.update(range(tag.valueoffset, tag.valueoffset + min(32, tag.valuebytecount)))
            for start in page.dataoffsets[:4]:
                places.update(range(start, start + 32))
    return np.array(sorted(places))


def mutated(content: bytes, places: np.ndarray, rng: np.random.Generator) -> bytes:
    """One to three changes of the header: a bit, a byte, a field of 2, 4 or 8 bytes; or a file that is cut short."""
    out = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        place = int(rng.choice(places[places < len(out)]))
        match rng.integers(8):
            case 0:
                out[place] ^= 1 << int(rng.integers(8))
            case 1:
                out[place] = int(rng.integers(256))
            case 2 if rng.random() < 0.3:
                del out[int(rng.integers(len(out) // 3, len(out))) :]
            case _:
                width = int(rng.choice([2, 4, 8]))
                value = int(rng.choice(EXTREMES)) % (1 << 8 * width)
                out[place : place + width] = value.to_bytes(width, "little")
    return bytes(out)


def leaves(value, path=()):
    """The places of all values in a JSON document."""
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[key], (*path, key))


def with_odd_value(document, rng):
    """A JSON document with one to two values in place of others, or keys left out."""
    document = json.loads(json.dumps(document))
    for _ in range(rng.integers(1, 3)):
        places = list(leaves(document))[1:]
        *path, last = places[int(rng.integers(len(places)))]
        parent = document
        for key in path:
            parent = parent[key]
        if rng.random() < 0.2 and isinstance(parent, dict):
            del parent[last]
        else:
            parent[last] = json.loads(json.dumps(ODD[int(rng.integers(len(ODD)))]))
        if not document:
            break
    return document


def read_all(folder: Path) -> dict[str, str]:
    """What became of every slide of a folder, read by a process of its own with 8 GB of address space."""
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n{READ_ALL}"
    done = subprocess.run(
        [sys.executable, "-c", limited, folder],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    marks = [json.loads(path.read_text()) for path in folder.parent.glob(f".{folder.name}.under-way/*.slide")]
    assert done.returncode == 0, f"ended by {done.returncode} at {marks}: {done.stderr[-2000:]}"
    return json.loads(done.stdout)


def require_all_told(ends: dict[str, str], n: int) -> Counter:
    assert len(ends) == n
    for reason in ends.values():
        assert "\n" not in reason.strip()
    return Counter(
        "read" if not reason else "lost patch" if "lost patch" in reason else "failed" for reason in ends.values()
    )


@pytest.mark.parametrize("seed", range(3))
def test_mutated_tiff_headers(tmp_path, seed):
    """Six hundred each of pyramids with tiles in JPEG and, for one seed, in Deflate."""
    rng = np.random.default_rng(seed)
    base = tmp_path / "base.tiff"
    write_pyramid(base, pixels(512), mpp=0.5, downsamples=(1, 2), quality=None if seed == 1 else 80)
    content, places = base.read_bytes(), header_bytes(base)
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(600):
        (folder / f"{i}.tiff").write_bytes(mutated(content, places, rng))
    counts = require_all_told(read_all(folder), 600)
    assert counts["read"] > 50
    assert counts["failed"] > 50


def test_mutated_real_headers(tmp_path, real_slide):
    rng = np.random.default_rng(3)
    content, places = real_slide.read_bytes(), header_bytes(real_slide)
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.svs").write_bytes(mutated(content, places, rng))
    require_all_told(read_all(folder), 30)


@pytest.mark.parametrize("seed", range(2))
def test_mutated_zarr_metadata(tmp_path, seed):
    rng = np.random.default_rng(seed)
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(150):
        path = ome_zarr_2(folder / f"{i}.zarr", (3, 256, 256))
        name = [".zattrs", "0/.zarray"][int(rng.integers(2))]
        document = with_odd_value(json.loads((path / name).read_text()), rng)
        text = json.dumps(document)
        if rng.random() < 0.2:
            place = int(rng.integers(len(text)))
            text = text[:place] + chr(int(rng.integers(1, 128))) + text[place + 1 :]
        (path / name).write_text(text)
    is_slide = [is_ome_zarr(path) for path in folder.iterdir()]  # others may be any Zarr, such as a store
    require_all_told(read_all(folder), sum(is_slide))
    assert sum(is_slide) > 130

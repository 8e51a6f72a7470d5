"""One slide has one id, however it is named; patch images are known again, however many of them were kept."""

import os
import shutil

import cv2
import numpy as np
import pytest

from g2l_core.patches.identity import images_fingerprint
from g2l_core.store.features import FeatureStore
from tests.pipeline.test_cli import cache, g2l, refused

FEW = ("--views", "0", "--max-patches", "2", "--tissue", "none", "--no-pictures")


@pytest.fixture
def data(cohort, tmp_path):
    """Three slides in two folders."""
    for folder, name in (("a", "p01-1"), ("b", "p02-1"), ("b", "p03-1")):
        (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(cohort.parent / f"slides/{name}.tiff", tmp_path / "data" / folder)
    return tmp_path / "data"


def labels(store):
    return {slide.slide_id: slide.labels for slide in FeatureStore.open(store).slides()}


def manifest(path, rows, header="path,label"):
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def test_labels_for_slides_that_were_cached_as_a_folder(data, tmp_path):
    """Beside the folder, by absolute paths, a part of it, moved slides: the ids of the store, and nothing encoded."""
    store = tmp_path / "s.zarr"
    assert cache(data, store, *FEW).returncode == 0
    paths = sorted(data.rglob("*.tiff"))
    beside = manifest(tmp_path / "m.csv", [(path.relative_to(tmp_path), i) for i, path in enumerate(paths)])
    absolute = manifest(tmp_path / "n.csv", [(path, i + 3) for i, path in enumerate(paths)])
    part = manifest(tmp_path / "o.csv", [(path, i + 6) for i, path in enumerate(paths) if path.parent.name == "b"])
    for source, expected, told in ((beside, "012", 0), (absolute, "345", 0), (part, "378", 2)):
        done = cache(source, store, *FEW)
        assert (done.returncode, "stored already" in done.stdout) == (0, True), done.stderr
        assert ("slides are stored under another id and keep it" in done.stderr) == bool(told)
        assert labels(store) == {
            i: {"label": v} for i, v in zip(("a/p01-1", "b/p02-1", "b/p03-1"), expected, strict=True)
        }

    (tmp_path / "else").mkdir()
    moved = paths[0].rename(tmp_path / "else/new-name.tiff")
    done = cache(moved, store, *FEW)
    refused(done, "new-name", f"{moved} is the slide a/p01-1, which would count twice", code=1)
    done = cache(manifest(tmp_path / "p.csv", [(moved, "moved")]), store, *FEW)
    assert done.returncode == 0, done.stderr
    assert labels(store)["a/p01-1"] == {"label": "moved"}
    assert FeatureStore.open(store).slide("a/p01-1").facts.source == str(moved)
    assert len(labels(store)) == 3


def test_one_file_under_two_ids_costs_the_second(data, tmp_path):
    """A copy, a hard link and a link to a slide in one run: the slide is stored once, and the others are named."""
    store, original = tmp_path / "s.zarr", data / "a/p01-1.tiff"
    shutil.copy(original, data / "b/copy.tiff")
    os.link(original, data / "b/hard.tiff")
    (data / "b/soft.tiff").symlink_to(original)
    done = cache(data, store, *FEW, "--accept-mpp")
    assert done.returncode == 1, done.stderr
    lost = [line for line in done.stderr.splitlines() if line.startswith("failed")]
    named = {name for line in lost for name in ("b/copy", "b/hard", "b/soft") if name in line}
    assert named == {"b/copy", "b/hard", "b/soft"}
    assert all("is the slide a/p01-1, which would count twice" in line for line in lost)
    assert sorted(labels(store)) == ["a/p01-1", "b/p02-1", "b/p03-1"]
    assert FeatureStore.open(store).failed_slides() == {}


def test_an_id_that_the_store_cannot_take_costs_that_slide(data, tmp_path):
    store = tmp_path / "s.zarr"
    assert cache(data / "a", store, *FEW).returncode == 0
    rows = [(data / "b/p02-1.tiff", "p01-1/inner"), (data / "b/p03-1.tiff", "other")]
    refused(
        cache(manifest(tmp_path / "m.csv", rows, "path,slide_id"), store, *FEW), "p01-1/inner", "lie inside", code=1
    )
    assert sorted(labels(store)) == ["other", "p01-1"]


def test_rows_of_one_file_under_two_ids_are_refused(data, tmp_path):
    source = manifest(tmp_path / "m.csv", [("data/a/p01-1.tiff", "x"), (data / "a/p01-1.tiff", "y")], "path,slide_id")
    refused(cache(source, tmp_path / "s.zarr", *FEW), "m.csv", "p01-1.tiff under two slide_id, 'x' and 'y'")
    assert not (tmp_path / "s.zarr").exists()


@pytest.fixture
def images(tmp_path):
    """Ten patch images in each of two folders, of equal names and sizes."""
    for folder in ("one", "two"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        for i in range(10):
            pixels = np.random.default_rng(i).integers(0, 255, (256, 256, 3), np.uint8)
            assert cv2.imwrite(str(tmp_path / "images" / folder / f"{i}.bmp"), pixels)
    return tmp_path / "images"


def cache_images(source, store, *more):
    return cache(source, store, "--views", "0", "--max-patches", "4", *more)


def test_some_of_the_patch_images(images, tmp_path):
    """Cached again, embedded and labelled; folders of equal names and sizes are not taken for one another."""
    store = tmp_path / "s.zarr"
    assert cache_images(images, store).returncode == 0
    again = cache_images(images, store)
    assert (again.returncode, "stored already" in again.stdout) == (0, True), again.stderr
    more = g2l("embed", images, "--store", store, "--encoder", "timm:resnet10t@64", "--weights", "random:0")
    assert more.returncode == 0, more.stderr
    rows = [(path.relative_to(tmp_path), path.parent.name) for path in sorted(images.rglob("*.bmp"))]
    done = cache_images(manifest(tmp_path / "m.csv", rows), store)
    assert (done.returncode, "stored already" in done.stdout) == (0, True), done.stderr
    assert labels(store) == {"one": {"label": "one"}, "two": {"label": "two"}}
    kept = images / "one" / FeatureStore.open(store).slide("one").patch_ids[0]
    kept.write_bytes(kept.read_bytes() + b"changed")
    refused(cache_images(images, store), "one", "is not the file that was cached", code=1)


def test_a_fingerprint_over_all_images_of_the_set_is_accepted_and_mended(images, tmp_path):
    """As version 0.1 wrote it. Where a manifest names the images, only it tells which were meant."""
    store = tmp_path / "s.zarr"
    assert cache_images(images, store).returncode == 0
    everything = [f"{i}.bmp" for i in range(10)]
    for slide in FeatureStore.open(store, writable=True).slides():
        slide.set_source(images / slide.slide_id, images_fingerprint(images / slide.slide_id, everything))
    verified = g2l("store", "verify", store, "--recompute", "4")
    assert verified.returncode == 0, verified.stdout
    again = cache_images(images, store)
    assert (again.returncode, "stored already" in again.stdout) == (0, True), again.stderr
    for slide in FeatureStore.open(store).slides():
        assert slide.facts.fingerprint == images_fingerprint(images / slide.slide_id, slide.patch_ids)

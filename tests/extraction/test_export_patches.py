"""Patches as images and tar files, read again with Pillow and tarfile, and compared with what OpenSlide reads."""

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import openslide
import pytest
from PIL import Image
from typer.testing import CliRunner

from g2l_core.errors import RunError
from g2l_core.extraction import export_patches as module
from g2l_core.extraction.export_patches import export_patches
from g2l_core.slides.fingerprint import file_state
from g2l_core.store.export import export_features
from g2l_core.store.features import FeatureStore
from pipeline.cli.main import app

SLIDE = "p01-1"
"""0.5 um/px: its patches are 256 level-0 pixels, and nothing is resampled."""


@pytest.fixture
def store(cached_store, tmp_path):
    return FeatureStore.open(shutil.copytree(cached_store, tmp_path / "s.zarr"), writable=True)


def region(store, x, y):
    with openslide.OpenSlide(store.slide(SLIDE).facts.source) as slide:
        return np.asarray(slide.read_region((x, y), 0, (256, 256)).convert("RGB"))


def test_png_files_are_the_patches(store, tmp_path):
    done = export_patches(store, tmp_path / "out", "png", where={"slide_id": SLIDE})
    assert (done.files, done.slides, done.left_out) == ((tmp_path / "out" / SLIDE,), 1, {})
    with (tmp_path / "out" / SLIDE / "patches.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["x"]), int(row["y"])) for row in rows] == [tuple(c) for c in store.slide(SLIDE).coords.tolist()]
    for row in rows[:3]:
        image = np.asarray(Image.open(tmp_path / "out" / SLIDE / row["file"]))
        assert np.array_equal(image, region(store, int(row["x"]), int(row["y"])))


def test_what_lies_in_the_folder_already_is_never_replaced(store, tmp_path):
    """A folder with a slide's name may hold its owner's images."""
    own = tmp_path / "own" / SLIDE / "patch.jpg"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"image")
    for export in (
        lambda: export_patches(store, tmp_path / "own", "png"),
        lambda: export_features(store, tmp_path / "own", "trident-h5"),
    ):
        with pytest.raises(RunError, match=f"holds {SLIDE} and no export"):
            export()
    assert [path for path in (tmp_path / "own").rglob("*") if path.is_file()] == [own]
    where = {"slide_id": SLIDE}
    export_patches(store, tmp_path / "out", "png", where=where)
    (tmp_path / "out/notes.txt").write_text("what its owner has put beside it")
    assert export_patches(store, tmp_path / "out", "png", where=where).slides == 1
    assert export_features(store, tmp_path / "out", "clam", where=where).slides == 1
    assert (tmp_path / "out/notes.txt").is_file()


def test_jpeg_files_are_near(store, tmp_path):
    export_patches(store, tmp_path / "out", "jpeg", where={"slide_id": SLIDE})
    x, y = store.slide(SLIDE).coords[0].tolist()
    image = Image.open(tmp_path / "out" / SLIDE / f"{x}_{y}.jpg")
    assert image.layer[0][1:3] == image.layer[1][1:3]  # colors are not subsampled
    assert np.abs(np.asarray(image).astype(int) - region(store, x, y)).mean() < 2


def test_shards(store, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_PATCHES", 10)
    done = export_patches(store, tmp_path / "out", "webdataset")
    assert done.slides == 6
    found = {}
    for path in (path for path in done.files if path.name.startswith(SLIDE)):
        with tarfile.open(path) as archive:
            members = archive.getmembers()
            assert len(members) <= 20
            found |= {member.name: archive.extractfile(member).read() for member in members}
    slide = store.slide(SLIDE)
    assert len(found) == 2 * len(slide)
    for x, y in slide.coords.tolist():
        facts = json.loads(found[f"{SLIDE}_{x}_{y}.json"])
        assert (facts["x"], facts["y"], facts["slide_id"], facts["labels"]) == (x, y, SLIDE, slide.labels)
        assert Image.open(io.BytesIO(found[f"{SLIDE}_{x}_{y}.jpg"])).size == (256, 256)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves files open
def test_webdataset_reads_them(store, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    done = export_patches(store, tmp_path / "out", "webdataset")
    samples = list(webdataset.WebDataset([str(path) for path in done.files], shardshuffle=False).decode("rgb8"))
    assert len(samples) == done.patches == sum(map(len, store.slides()))
    assert samples[0]["jpg"].shape == (256, 256, 3)
    assert samples[0]["__key__"] == "{}_{}_{}".format(*(samples[0]["json"][k] for k in ("slide_id", "x", "y")))


@pytest.mark.parametrize("layout", ["png", "webdataset"])
def test_again_and_without_a_slide(store, tmp_path, layout):
    source = store.slide(SLIDE).facts.source
    store.slide(SLIDE).set_source(tmp_path / "gone.tiff", store.slide(SLIDE).facts.fingerprint)
    command = ["store", "export", str(store.path), "--out", str(tmp_path / "out"), "--format", layout]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    assert f"left out  {SLIDE}: slide {SLIDE}: cannot read" in done.stderr
    assert not list((tmp_path / "out").rglob("*.partial"))
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir() if path.name[0] == "p"}
    store.slide(SLIDE).set_source(Path(source), store.slide(SLIDE).facts.fingerprint, file_state(Path(source)))
    assert CliRunner().invoke(app, command).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in first} == first
    assert list((tmp_path / "out").glob(f"{SLIDE}*"))


def test_options_that_mean_nothing_are_refused(store, tmp_path):
    command = ["store", "export", str(store.path), "--out", str(tmp_path / "out"), "--format", "png", "--view", "1"]
    done = CliRunner().invoke(app, command)
    assert "--format png writes whole patches: leave out --encoder, --view and --label" in str(done.exception)

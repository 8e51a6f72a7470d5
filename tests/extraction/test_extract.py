"""Stage one's stream on drawn slides: unreadable patches, failed slides, encoders beside each other, views added."""

import csv
import shutil

import numpy as np
import pytest
import tifffile

from g2l_core.encoders.resolve import resolve_encoder
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.views import ViewSpec
from g2l_core.store.features import FeatureStore
from g2l_core.store.verify import verify
from pipeline.cache_teacher import run_extraction
from pipeline.extract import ExtractionSettings
from tests.conftest import TEACHER

KEY = "timm-mobilenetv3_small_050-64-random0"


def cache(inputs, path, *, seed=0, views=1, retry_failed=False, **grid):
    spec = resolve_encoder(TEACHER, weights=f"random:{seed}")
    settings = ExtractionSettings(views=views, batch_size=8, retry_failed=retry_failed)
    return run_extraction(inputs, path, [spec], GridSpec(**grid), ViewSpec(), settings)


@pytest.fixture
def slides(cohort, tmp_path):
    """The cohort's first two slides, in folders of their own; both are called x."""
    for folder, name in (("a", "p01-1"), ("b", "p03-1")):
        (tmp_path / "slides" / folder).mkdir(parents=True)
        shutil.copy(cohort.parent / f"slides/{name}.tiff", tmp_path / f"slides/{folder}/x.tiff")
    return tmp_path / "slides"


def break_tile(path, column, row):
    """Overwrite one level-0 tile of 256 px with bytes that are no JPEG."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        tile = row * -(-page.imagewidth // 256) + column
        offset, count = page.dataoffsets[tile], page.databytecounts[tile]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\x00" * count)


def test_unreadable_patches_cost_nobody_else_anything(slides, tmp_path):
    sound = cache([slides], tmp_path / "sound.zarr", tissue="none")
    break_tile(slides / "a/x.tiff", 1, 2)
    summary = cache([slides], tmp_path / "s.zarr", tissue="none")
    assert sound.is_complete
    assert not summary.is_complete
    assert list(summary.unreadable) == ["a/x"]
    stores = FeatureStore.open(tmp_path / "sound.zarr"), FeatureStore.open(tmp_path / "s.zarr")
    for slide_id in ("a/x", "b/x"):
        wanted, found = (store.slide(slide_id) for store in stores)
        bad = (found.coords == (256, 512)).all(axis=1) if slide_id == "a/x" else np.zeros(len(found), bool)
        assert bad.sum() == (slide_id == "a/x")
        assert np.array_equal(found.patch_status, bad.astype(np.uint8))
        assert (found.pixel_hash[bad] == 0).all()
        assert np.array_equal(found.pixel_hash[~bad], wanted.pixel_hash[~bad])
        for view in (0, 1):
            features = found.features(KEY, view=view)
            assert np.isnan(features[bad]).all()
            assert np.array_equal(features[~bad], wanted.features(KEY, view=view)[~bad])
    assert list(verify(stores[1])) == []
    assert cache([slides], tmp_path / "s.zarr", tissue="none").encoded == 0  # what is recorded stays recorded


def test_patches_that_can_be_read_at_last_are_taken_up_alone(slides, tmp_path):
    cache([slides], tmp_path / "sound.zarr", tissue="none")
    other = (TEACHER, "random:1")
    whole = (slides / "a/x.tiff").read_bytes()
    break_tile(slides / "a/x.tiff", 1, 2)
    for seed in (0, 1):
        cache([slides], tmp_path / "s.zarr", seed=seed, tissue="none")
    again = cache([slides], tmp_path / "s.zarr", tissue="none")
    assert (again.encoded, list(again.unreadable)) == (0, ["a/x"])  # a loss is told at every call
    assert "row" in again.unreadable["a/x"][0]
    still = cache([slides], tmp_path / "s.zarr", retry_failed=True, tissue="none")
    assert (still.encoded, still.slides, len(still.unreadable["a/x"])) == (1, 1, 1)
    store = FeatureStore.open(tmp_path / "s.zarr")
    shutil.copy(slides / "b/x.tiff", slides / "a/x.tiff")
    wrong = cache([slides], tmp_path / "s.zarr", retry_failed=True, tissue="none")
    assert "do not show the same pixels" in wrong.failed_slides["a/x"]
    (slides / "a/x.tiff").write_bytes(whole)  # copied again, and whole this time
    mended = cache([slides], tmp_path / "s.zarr", retry_failed=True, tissue="none")
    assert (mended.encoded, mended.is_complete) == (1, True)
    kinds = {(problem.kind, problem.encoder) for problem in verify(store)}
    assert kinds == {("missing", encoder_key_of(store, other))}  # its NaN must not pass for features
    assert cache([slides], tmp_path / "s.zarr", seed=1, tissue="none").is_complete
    assert list(verify(FeatureStore.open(tmp_path / "s.zarr"))) == []
    sound = FeatureStore.open(tmp_path / "sound.zarr").slide("a/x")
    for view in (0, 1):
        found = store.slide("a/x").features(KEY, view=view)
        assert np.array_equal(found, sound.features(KEY, view=view))
    nothing = cache([slides], tmp_path / "s.zarr", retry_failed=True, tissue="none")
    assert (nothing.slides, nothing.encoded) == (0, 0)


def encoder_key_of(store, encoder):
    name, weights = encoder
    return next(k for k, facts in store.encoders.items() if (facts.name, facts.weights) == (name, weights))


def test_features_that_are_not_finite_stop_their_slide_and_name_the_patch(slides, tmp_path, monkeypatch):
    from g2l_core.extraction import batching

    encode, batches = batching.encode, []

    def sometimes_nan(encoder, pixels):
        features = encode(encoder, pixels)
        batches.append(len(features))
        if len(batches) == 1:
            features[3, 5] = np.inf
        return features

    monkeypatch.setattr(batching, "encode", sometimes_nan)
    summary = cache([slides], tmp_path / "s.zarr", views=0, tissue="none")
    store = FeatureStore.open(tmp_path / "s.zarr")
    x, y = store.slide("a/x").coords[3]
    assert list(summary.failed_slides) == ["a/x"]
    assert f"row 3 at ({x}, {y}), view 0" in summary.failed_slides["a/x"]
    assert store.slide("a/x").records(KEY) == {}
    assert store.slide("b/x").features(KEY).shape == (len(store.slide("b/x")), 1024)
    assert cache([slides], tmp_path / "s.zarr", views=0, tissue="none").is_complete


def test_the_store_keeps_where_the_time_went(slides, tmp_path):
    cache([slides], tmp_path / "s.zarr", max_patches=2)
    cache([slides], tmp_path / "s.zarr", max_patches=2)  # nothing to do, nothing to keep
    (run,) = FeatureStore.open(tmp_path / "s.zarr").facts.runs
    assert (run.patches, run.encoders, run.views) == (4, (KEY,), 2)
    assert set(run.seconds) == {"read", "augment", "encode", "write", "wait"}
    assert 0 < run.seconds["encode"] <= run.elapsed
    assert 0 < run.utilization <= 1


def test_a_failed_slide_is_recorded_and_tried_again(slides, tmp_path):
    whole = (slides / "a/x.tiff").read_bytes()
    (slides / "a/x.tiff").write_bytes(b"no slide")
    summary = cache([slides], tmp_path / "s.zarr")
    store = FeatureStore.open(tmp_path / "s.zarr")
    assert (summary.slides, list(summary.failed_slides)) == (1, ["a/x"])
    assert store.slide_ids() == ["a/x", "b/x"]
    assert store.failed_slides() == summary.failed_slides
    assert "OpenSlide" in store.failed_slides()["a/x"] or "neither a slide" in store.failed_slides()["a/x"]
    (slides / "a/x.tiff").write_bytes(whole)
    summary = cache([slides], tmp_path / "s.zarr")
    store = FeatureStore.open(tmp_path / "s.zarr")
    assert summary.is_complete
    assert store.failed_slides() == {}
    assert summary.encoded == len(store.slide("a/x"))  # the other slide was not encoded again


def test_an_encoder_and_views_added_later_equal_those_made_at_once(slides, tmp_path):
    cache([slides], tmp_path / "s.zarr", views=0, max_patches=5)
    cache([slides], tmp_path / "s.zarr", seed=1, views=0, max_patches=5)
    cache([slides], tmp_path / "s.zarr", views=2, max_patches=5)
    cache([slides], tmp_path / "once.zarr", views=2, max_patches=5)
    grown, once = FeatureStore.open(tmp_path / "s.zarr"), FeatureStore.open(tmp_path / "once.zarr")
    for slide in once.slides():
        other = grown.slide(slide.slide_id)
        assert other.encoder_keys == [KEY, KEY[:-1] + "1"]
        assert (other.n_views, other.features_array(KEY[:-1] + "1").shape[1]) == (3, 1)
        assert np.array_equal(other.view_params, slide.view_params)
        assert np.array_equal(other.pixel_hash, slide.pixel_hash)
        for view in range(3):
            assert np.array_equal(other.features(KEY, view=view), slide.features(KEY, view=view))
        assert not np.array_equal(other.features(KEY), other.features(KEY[:-1] + "1"))
    assert {problem.kind for problem in verify(grown)} == set()


def test_a_slide_that_changed_is_refused(slides, tmp_path):
    cache([slides], tmp_path / "s.zarr", max_patches=2)
    shutil.copy(slides / "b/x.tiff", slides / "a/x.tiff")
    summary = cache([slides], tmp_path / "s.zarr", max_patches=2)
    assert list(summary.failed_slides) == ["a/x"]
    assert "is not the file that was cached" in summary.failed_slides["a/x"]
    assert FeatureStore.open(tmp_path / "s.zarr").failed_slides() == {}  # what was stored of it stays


def test_slides_that_have_moved_are_read_from_where_they_are_now(slides, tmp_path):
    cache([slides], tmp_path / "s.zarr", views=0, max_patches=2)
    slides.rename(tmp_path / "archive")
    summary = cache([tmp_path / "archive"], tmp_path / "s.zarr", views=1, max_patches=2)
    assert (summary.is_complete, summary.encoded) == (True, 4)
    assert FeatureStore.open(tmp_path / "s.zarr").slide("a/x").facts.source == str(tmp_path / "archive/a/x.tiff")


def test_labels_are_updated_without_encoding(cohort, tmp_path):
    path = tmp_path / "s.zarr"
    cache([cohort], path, max_patches=1)
    rows = list(csv.DictReader(cohort.read_text().splitlines()))
    manifest = tmp_path / "manifest.csv"
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["slide_id", "path", "grade"])
        writer.writerows([row["slide_id"], cohort.parent / row["path"], i] for i, row in enumerate(rows))
    summary = cache([manifest], path, max_patches=1)
    assert summary.encoded == 0
    slide = FeatureStore.open(path).slide("p03-1")
    assert slide.labels == {"patient_id": "p03", "medical_center": "north", "grade": "2"}

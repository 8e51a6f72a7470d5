"""A cohort as one Dask array, and TRIDENT's files read as TRIDENT reads them."""

import pickle

import dask
import h5py
import numpy as np
import pytest

from g2l_core.errors import RunError, StoreCorruptError, StoreError, StoreMissingError, UnknownNameError
from g2l_core.metrics.cohort import lazy_cka_moments
from g2l_core.metrics.moments import cka_center, cka_moments
from g2l_core.metrics.similarity import linear_cka
from g2l_core.store.arrays import dask_features, dask_rows
from g2l_core.store.export import export_trident, magnification
from g2l_core.store.features import FeatureStore, Shard
from tests.store.toy import DIM, ENCODER, create, features_of, fill, lay

KEY = "timm-mobilenetv3_small_050-64-random0"


@pytest.fixture
def cohort_store(toy):
    """Three slides of 20, 20 and 37 rows; two patches of the last cannot be read."""
    status = np.zeros(37, np.uint8)
    status[[2, 33]] = 1
    fill(lay(toy, "e", n=37), status=status)
    return toy


def test_dask_array_is_the_cohort_in_row_order(cohort_store):
    rows = dask_rows(cohort_store)
    for view in (0, 1):
        array = dask_features(cohort_store, ENCODER, view=view)
        assert (array.shape, array.dtype) == ((77, DIM), np.float16)
        assert array.chunks == ((16, 4, 16, 4, 16, 16, 5), (DIM,))
        values = array.compute(scheduler="synchronous")
        for slide in cohort_store.slides():
            assert np.array_equal(values[rows.of(slide.slide_id)], slide.features(ENCODER, view=view), equal_nan=True)
        for row in (0, 19, 20, 39, 40, 76):
            slide_id, stored = rows.locate(row)
            wanted = cohort_store.slide(slide_id).features(ENCODER, view=view)[stored]
            assert np.array_equal(values[row], wanted, equal_nan=True)


def test_rows_are_a_bijection(cohort_store):
    rows = dask_rows(cohort_store)
    assert rows.slide_ids == ("a/x", "b/x", "e")
    places = [rows.locate(i) for i in range(len(rows))]
    assert places == [(s, r) for s, n in (("a/x", 20), ("b/x", 20), ("e", 37)) for r in range(n)]
    for beyond in (-1, 77):
        with pytest.raises(IndexError, match=f"row {beyond} of 77"):
            rows.locate(beyond)
    with pytest.raises(UnknownNameError):
        rows.of("nobody")


def test_dask_reads_only_what_is_computed(cohort_store):
    array = dask_features(cohort_store, ENCODER)
    path = cohort_store.slide("b/x").shard_path(ENCODER, Shard(0, 16, 0))
    path.write_bytes(path.read_bytes()[:-1])
    assert np.array_equal(array[:20].compute(scheduler="synchronous"), features_of("a/x", 20, 2)[:, 0])
    with pytest.raises(StoreCorruptError, match="slide b/x"):
        array[:21].compute(scheduler="synchronous")


def test_cka_of_a_cohort_leaves_unreadable_patches_out(cohort_store):
    lazy = lazy_cka_moments(dask_features(cohort_store, ENCODER), dask_features(cohort_store, ENCODER, view=1))
    found = lazy.compute(scheduler="threads")
    slides = list(cohort_store.slides())
    x, y = (np.concatenate([s.features(ENCODER, view=view) for s in slides]) for view in (0, 1))
    known = np.concatenate([s.patch_status == 0 for s in slides])
    expected = cka_moments(x[known], y[known], center=cka_center(x[known], y[known]))
    assert found.n == 75
    assert linear_cka(found, debiased=True) == pytest.approx(linear_cka(expected, debiased=True), abs=1e-10)


def test_dask_array_travels_and_computes_in_threads(cohort_store):
    mean = dask.array.nanmean(dask_features(cohort_store, ENCODER).astype(np.float64), axis=0)
    wanted = np.nanmean(np.concatenate([s.features(ENCODER) for s in cohort_store.slides()]).astype(np.float64), axis=0)
    traveled = pickle.loads(pickle.dumps(FeatureStore.open(cohort_store.path)))
    assert np.allclose(mean.compute(scheduler="threads"), wanted, rtol=1e-12)
    assert traveled.slide_ids() == cohort_store.slide_ids()


def test_what_is_not_complete_is_refused(cohort_store, tmp_path):
    with pytest.raises(UnknownNameError, match="unknown encoder 'tyo'"):
        dask_features(cohort_store, "tyo")
    with pytest.raises(StoreMissingError, match="view 2 of toy is not complete"):
        dask_features(cohort_store, ENCODER, view=2)
    lay(cohort_store, "d")
    for ask in (lambda: dask_features(cohort_store, ENCODER), lambda: export_trident(cohort_store, ENCODER, tmp_path)):
        with pytest.raises(StoreMissingError, match="slide d has no features of toy yet"):
            ask()
    with pytest.raises(StoreMissingError, match="no slide with patches"):
        dask_features(create(tmp_path / "empty.zarr"), ENCODER)


def as_trident_reads(path):
    """TRIDENT's own steps: read_coords, then load of features."""
    with h5py.File(path, "r") as file:
        attributes, coords = dict(file["coords"].attrs), file["coords"][:]
        features = file.get("features")
        return attributes, coords, None if features is None else (features[:], dict(features.attrs))


def test_trident_files_equal_the_store(cohort_store, tmp_path):
    written = export_trident(cohort_store, ENCODER, tmp_path / "job")
    job = tmp_path / "job" / "20x_256px_0px_overlap"
    assert written == [job / f"features_toy/{slide_id}.h5" for slide_id in ("a/x", "b/x", "e")]
    for slide, path in zip(cohort_store.slides(), written, strict=True):
        good = slide.patch_status == 0
        attributes, coords, (features, feature_attributes) = as_trident_reads(path)
        assert (features.dtype, coords.dtype) == (np.float32, np.int64)
        assert np.array_equal(features, slide.features(ENCODER)[good])
        assert np.array_equal(coords, slide.coords[good])
        name = slide.slide_id.split("/")[-1]
        assert feature_attributes == {"encoder": ENCODER, "name": name}
        assert attributes == {
            "patch_size": 256,
            "patch_size_level0": 257,
            "overlap": 0,
            "target_magnification": 20,
            "level0_magnification": 20,
            "level0_width": 4000,
            "level0_height": 3000,
            "name": name,
        }
        again, patches, nothing = as_trident_reads(job / f"patches/{slide.slide_id}_patches.h5")
        assert (again, nothing) == (attributes, None)
        assert np.array_equal(patches, coords)
    assert not list(tmp_path.rglob("*.partial"))


def test_trident_export_of_a_view_and_again(cohort_store, tmp_path):
    export_trident(cohort_store, ENCODER, tmp_path / "job")
    (first, *_) = export_trident(cohort_store, ENCODER, tmp_path / "job", view=1)
    assert np.array_equal(as_trident_reads(first)[2][0], features_of("a/x", 20, 2)[:, 1])


def test_trident_export_of_a_cached_cohort(cached_store, tmp_path):
    store = FeatureStore.open(cached_store)
    for slide, path in zip(store.slides(), export_trident(store, KEY, tmp_path), strict=True):
        attributes, coords, (features, _) = as_trident_reads(path)
        north = slide.labels["medical_center"] == "north"
        assert attributes["level0_magnification"] == (20 if north else 40)
        assert attributes["patch_size_level0"] == (256 if north else 512)
        assert np.array_equal(features, slide.features(KEY))
        assert np.array_equal(coords, slide.coords)


def test_patch_images_have_no_coordinates(cohort_store, tmp_path):
    fill(lay(cohort_store, "images", kind="patches"))
    with pytest.raises(StoreError, match="images is a set of patch images: TRIDENT's files need coordinates"):
        export_trident(cohort_store, ENCODER, tmp_path / "job")
    assert not (tmp_path / "job").exists()


def test_an_export_that_cannot_be_written_leaves_no_half_file(cohort_store, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"cannot write into .*file: it is no folder"):
        export_trident(cohort_store, ENCODER, tmp_path / "file")


@pytest.mark.parametrize(
    ("mpp", "wanted"),
    [(0.5, 20), (0.25, 40), (0.499, 20), (0.243, 40), (1.0, 10), (4.0, 2.5), (0.46, 21.74), (20, 0.5), (1 / 3, 30)],
)
def test_magnification(mpp, wanted):
    found = magnification(mpp)
    assert found == wanted
    assert isinstance(found, type(wanted))

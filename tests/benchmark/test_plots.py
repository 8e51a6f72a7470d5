"""Plots of tasks on stores with planted features: they agree with the metric values, and fail one by one."""

import numpy as np
import pytest

from g2l_core.benchmark.evaluate import BenchSpec, evaluate_task
from g2l_core.benchmark.plots import task_plots
from g2l_core.benchmark.rows import gather
from g2l_core.benchmark.spec import KnnOptions, TaskSpec
from tests.planted import PATCHES, PATIENTS, make_store, patch_labels, write_labels

SPEC = TaskSpec(
    name="t", label="kind", labels="labels.csv", split="split", metrics=("cka", "knn", "probe"), knn=KnnOptions(k=(5,))
)
BENCH = BenchSpec(encoders=("teacher", "by_class", "by_center"), draws=50)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plots")
    strength = {"teacher": (3.0, 0.0), "by_class": (4.0, 1.0), "by_center": (0.5, 4.0)}
    store = make_store(folder / "s.zarr", strength)
    write_labels(folder / "labels.csv", patch_labels())
    return folder, store


@pytest.fixture(scope="module")
def outcome(planted):
    folder, store = planted
    return evaluate_task([store], SPEC, BENCH, folder)


def test_the_matrix_repeats_the_cka_to_the_teacher(outcome):
    (matrix,) = outcome.pictures.cka
    values = {r.encoder: r.estimate.value for r in outcome.results if r.metric == "cka_debiased"}
    assert matrix.encoders == BENCH.encoders
    assert (matrix.rows, matrix.n, matrix.of) == ("test", PATIENTS // 2 * PATCHES, PATIENTS // 2 * PATCHES)
    assert list(matrix.values[0]) == pytest.approx([1.0, values["by_class"], values["by_center"]], abs=1e-9)


def test_confusions_give_the_accuracies(outcome):
    accuracies = {
        (r.metric.partition("_")[0], r.encoder): r.estimate.value
        for r in outcome.results
        if r.metric in ("knn_accuracy", "probe_accuracy")
    }
    found = {(m.classifier, m.encoder): np.trace(m.counts) / np.sum(m.counts) for m in outcome.pictures.confusions}
    assert found == pytest.approx(accuracies)
    assert len(found) == 6
    for matrix in outcome.pictures.confusions:
        assert matrix.classes == ("a", "b")
        assert [sum(row) for row in matrix.counts] == [PATIENTS // 2 * PATCHES // 2] * 2


def separation(plane, codes):
    """The distance of two groups' means over the spread within them."""
    points, codes = np.stack([plane.x, plane.y], axis=1), np.array(codes)
    groups = [points[codes == code] for code in (0, 1)]
    spread = np.sqrt(np.mean([group.var(axis=0).sum() for group in groups]))
    return np.linalg.norm(groups[0].mean(axis=0) - groups[1].mean(axis=0)) / spread


def test_projections_separate_what_the_features_separate(outcome):
    planes = {plane.encoder: plane for plane in outcome.pictures.projections if plane.method == "PCA"}
    assert list(planes) == list(BENCH.encoders)
    by_class, by_center = planes["by_class"], planes["by_center"]
    assert by_class.classes == ("a", "b")
    assert by_class.centers == ("north", "south")
    assert separation(by_class, by_class.class_of) > 2 > separation(by_class, by_class.center_of)
    assert separation(by_center, by_center.center_of) > 2 > separation(by_center, by_center.class_of)
    for plane in planes.values():
        assert len(plane.x) == len(plane.class_of) == len(plane.center_of) == plane.of
        assert max(map(abs, plane.x + plane.y)) == 1.0


def test_slide_maps_show_the_planted_stripes(outcome):
    maps = [m for m in outcome.pictures.slides if m.encoder == "by_class"]
    assert [m.slide for m in maps] == ["s4", "s5", "s6"]
    for drawn in maps:
        assert drawn.columns == tuple(range(PATCHES))
        assert set(drawn.rows) == {0}
        assert np.isnan(drawn.cell_mm)  # the store says no mpp
        red = np.array([int(color[0], 16) for color in drawn.colors])
        assert abs(red[::2].mean() - red[1::2].mean()) > 5


def test_the_same_input_gives_the_same_plots(planted, outcome):
    folder, store = planted
    again = evaluate_task([store], SPEC, BENCH, folder)
    assert repr(again.pictures) == repr(outcome.pictures)  # equal but for NaN


def test_a_plot_that_cannot_be_drawn_is_a_failure_and_others_are_drawn(planted):
    folder, store = planted
    rows = gather([store], SPEC, folder)
    teacher = rows.features("teacher")
    features = {"teacher": teacher, "flat": np.ones((len(rows), 4), np.float16)}
    plots, failures = task_plots("t", rows, np.ones(len(rows), bool), features, seed=0)
    assert [(f.encoder, f.reason.partition(":")[0]) for f in failures] == [
        ("flat", "projection"),
        ("flat", "slide maps"),
    ]
    assert {plane.encoder for plane in plots.projections} == {"teacher"}
    assert np.isnan(plots.cka[0].values[0][1])


def test_patch_images_have_no_slide_map(planted, tmp_path):
    store = make_store(tmp_path / "images.zarr", {"teacher": (2.0, 0.0)}, patients=4, kind="images")
    write_labels(tmp_path / "labels.csv", patch_labels(4))
    spec = TaskSpec(
        name="t", label="kind", labels="labels.csv", split="split", metrics=("knn",), knn=KnnOptions(k=(5,))
    )
    done = evaluate_task([store], spec, BenchSpec(encoders=("teacher",), draws=20), tmp_path)
    assert done.pictures.slides == ()
    assert done.pictures.cka == ()
    assert len(done.pictures.projections) >= 1
    assert not done.failures

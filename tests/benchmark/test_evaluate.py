"""Tasks on stores with planted features: joins, splits, leaks, duplicates, and metric values that move rightly."""

import json
from dataclasses import replace

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from g2l_core.benchmark.evaluate import BenchSpec, adjusted, evaluate_task
from g2l_core.benchmark.rows import gather, parts
from g2l_core.benchmark.spec import KnnOptions, RobustnessOptions, TaskSpec
from g2l_core.errors import LeakError, ManifestError, TaskError
from g2l_core.results import Comparison, Estimate
from g2l_core.store import schema
from g2l_core.store.facts import EncoderFacts
from g2l_core.store.writer import FeatureWriter
from tests.planted import PATCHES, PATIENTS, make_store, patch_labels, write_labels
from tests.store.toy import put_features

STRENGTH = {"teacher": (0.8, 0.0), "weak": (0.1, 0.8), "strong": (0.6, 0.1)}
SPEC = TaskSpec(
    name="t",
    labels="labels.csv",
    label="kind",
    split="split",
    knn=KnnOptions(k=(5,)),
    robustness=RobustnessOptions(k=(3, 5)),
)
BENCH = BenchSpec(encoders=("teacher", "weak", "strong"), baseline="weak", draws=300)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    store = make_store(folder / "s.zarr", STRENGTH)
    write_labels(folder / "labels.csv", patch_labels())
    return folder, store


@pytest.fixture(scope="module")
def outcome(planted):
    folder, store = planted
    return evaluate_task([store], SPEC, BENCH, folder)


def value(outcome, metric, encoder):
    return next(r.estimate for r in outcome.results if (r.metric, r.encoder) == (metric, encoder))


def gain(outcome, metric, encoder, reference):
    found = [c for c in outcome.comparisons if (c.metric, c.encoder, c.reference) == (metric, encoder, reference)]
    return found[0].difference


def test_planted_strength_moves_every_metric(outcome):
    assert not outcome.failures
    for metric in ("knn_balanced_accuracy", "probe_auc", "robustness_ratio_k5", "robustness_pathorob_k3"):
        assert value(outcome, metric, "weak").value < value(outcome, metric, "strong").value, metric
        assert value(outcome, metric, "strong").value <= value(outcome, metric, "teacher").value + 0.05, metric
    assert value(outcome, "cka_debiased", "weak").value < value(outcome, "cka_debiased", "strong").value


def test_gains_over_the_baseline_have_intervals_above_zero(outcome):
    for metric in ("cka_debiased", "knn_accuracy", "probe_accuracy", "robustness_ratio_k3"):
        difference = gain(outcome, metric, "strong", "weak")
        assert 0 < difference.low < difference.value < difference.high, metric
        assert "4 patients" in difference.method


def test_the_knn_accuracy_is_scikit_learn_s(planted, outcome):
    folder, store = planted
    rows = gather([store], SPEC, folder)
    (train, test) = parts(rows, SPEC, 0)[0]
    features = rows.features("weak").astype(np.float64)
    model = KNeighborsClassifier(5, metric="cosine", algorithm="brute").fit(features[train], rows.label[train])
    assert value(outcome, "knn_accuracy", "weak").value == pytest.approx(model.score(features[test], rows.label[test]))
    assert all(r.n == len(test) for r in outcome.results if r.metric.startswith("knn"))


def test_rows_belong_to_their_labels(planted):
    folder, store = planted
    rows = gather([store], SPEC, folder)
    for slide_id, row, label in zip(rows.slide_ids, rows.row, rows.label, strict=True):
        x = store.slide(slide_id).coords[row, 0]
        assert label == "ab"[(x // 16) % 2]


def test_folds_keep_patients_together_and_test_every_row_once(planted):
    folder, store = planted
    spec = replace(SPEC, split="", folds=4)
    rows = gather([store], spec, folder)
    tested = []
    for train, test in parts(rows, spec, seed=0):
        assert not set(rows.cluster[train]) & set(rows.cluster[test])
        tested += test.tolist()
    assert sorted(tested) == list(range(len(rows)))
    assert not evaluate_task([store], spec, BENCH, folder).failures


def test_the_same_input_gives_the_same_results(planted, outcome):
    folder, store = planted
    again = evaluate_task([store], SPEC, BENCH, folder)
    assert again.results == outcome.results
    assert again.comparisons == outcome.comparisons


def test_slide_labels_serve_without_a_label_file(planted):
    folder, store = planted
    spec = TaskSpec(name="t", label="medical_center", split="split", metrics=("knn",), knn=KnnOptions(k=(3,)))
    rows = gather([store], spec, folder)
    assert set(rows.label) == {"north", "south"}


def test_a_label_for_whole_slides_reaches_every_patch(planted, tmp_path):
    _, store = planted
    write_labels(tmp_path / "labels.csv", [{"slide_id": f"s{p}", "kind": "ab"[p % 2]} for p in range(PATIENTS)])
    rows = gather([store], SPEC, tmp_path)
    assert len(rows) == PATIENTS * PATCHES


def test_copies_across_the_split_leave_the_training_part(tmp_path):
    # patch (0, 3) of the training part has the same pixels as patch (7, 5) of the test part: same class
    store = make_store(tmp_path / "s.zarr", {"teacher": (1, 0)}, duplicates=[((0, 3), (7, 5))])
    write_labels(tmp_path / "labels.csv", patch_labels())
    rows = gather([store], SPEC, tmp_path)
    assert rows.duplicates_dropped == 1
    assert len(rows) == PATIENTS * PATCHES - 1
    assert (rows.part == "test").sum() == PATIENTS * PATCHES // 2


def test_copies_whose_labels_disagree_all_go(tmp_path):
    store = make_store(tmp_path / "s.zarr", {"teacher": (1, 0)}, duplicates=[((0, 2), (7, 5))])
    write_labels(tmp_path / "labels.csv", patch_labels())
    assert gather([store], SPEC, tmp_path).duplicates_dropped == 2


def test_a_shared_patient_is_a_leak(planted, tmp_path):
    _, store = planted
    rows = [{**row, "split": ("train", "test")[i % 2]} for i, row in enumerate(patch_labels())]
    write_labels(tmp_path / "labels.csv", rows)
    with pytest.raises(LeakError, match="8 patients are in train and test, first 'p0'. Split by patient_id"):
        gather([store], SPEC, tmp_path)


def test_a_label_file_that_is_elsewhere(planted, tmp_path):
    _, store = planted
    with pytest.raises(ManifestError, match=r"there is no label file .*labels\.csv; it lies beside the task file"):
        gather([store], SPEC, tmp_path)


def test_a_label_file_with_absent_slides(planted, tmp_path):
    _, store = planted
    write_labels(tmp_path / "labels.csv", [*patch_labels(), {"slide_id": "zz", "x": "0", "y": "0", "kind": "a"}])
    with pytest.raises(ManifestError, match="names slides that no store has: zz"):
        gather([store], SPEC, tmp_path)


def test_missing_column_names_those_there_are(planted):
    folder, store = planted
    with pytest.raises(TaskError, match="no column 'grade'; it has slide_id, x, y, kind"):
        gather([store], replace(SPEC, label="grade"), folder)


def test_a_failing_metric_group_leaves_the_others(planted):
    folder, store = planted
    found = evaluate_task([store], replace(SPEC, knn=KnnOptions(k=(5000,))), BENCH, folder)
    assert {(f.encoder) for f in found.failures} == {"teacher", "weak", "strong"}
    assert all("k = 5000" in f.reason for f in found.failures)
    assert any(r.metric == "probe_auc" for r in found.results)


def test_an_encoder_without_features_leaves_the_others(planted):
    folder, store = planted
    bench = replace(BENCH, encoders=("teacher", "strong", "absent"), baseline="")
    found = evaluate_task([store], SPEC, bench, folder)
    assert [f.encoder for f in found.failures] == ["absent"]
    assert {r.encoder for r in found.results} == {"teacher", "strong"}


def test_one_class_only(planted, tmp_path):
    _, store = planted
    write_labels(tmp_path / "labels.csv", [{**row, "kind": "a"} for row in patch_labels()])
    found = evaluate_task([store], SPEC, BENCH, tmp_path)
    assert any("one class" in f.reason or "two" in f.reason for f in found.failures)
    assert any(r.metric == "cka_debiased" for r in found.results)


def test_unreadable_patches_are_left_out(tmp_path):
    store = make_store(tmp_path / "s.zarr", {"teacher": (1, 0)})
    status = store.slide("s0").patch_status
    status[:5] = schema.STATUS["unreadable"]
    store.slide("s0").put_table("patch_status", status)
    write_labels(tmp_path / "labels.csv", patch_labels())
    assert len(gather([store], SPEC, tmp_path)) == PATIENTS * PATCHES - 5


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"metrics": ("knnn",)}, "unknown metric 'knnn'"),
        ({"split": ""}, "exactly one of"),
        ({"folds": 3}, "exactly one of"),
        ({"split": "", "train": "a=b"}, "come together"),
        ({"label": ""}, "give label"),
    ],
)
def test_specs_that_cannot_be_evaluated(fields, words):
    with pytest.raises(TaskError, match=words):
        replace(SPEC, **fields)


def test_patches_without_a_label_are_left_out_and_noted(planted, tmp_path):
    _, store = planted
    write_labels(tmp_path / "labels.csv", [{**row, "kind": row["kind"] * (row["x"] != "16")} for row in patch_labels()])
    found = evaluate_task([store], SPEC, BENCH, tmp_path)
    assert found.notes == ["task t: 8 of 320 patches have no kind and were left out"]
    assert not found.failures


def test_no_label_at_all(planted, tmp_path):
    _, store = planted
    write_labels(tmp_path / "labels.csv", [{**row, "kind": ""} for row in patch_labels()])
    found = evaluate_task([store], SPEC, BENCH, tmp_path)
    assert [f.reason for f in found.failures] == ["task t: no patch has a label 'kind' and a place in the split"]


def test_copies_across_the_split_are_noted(tmp_path):
    store = make_store(tmp_path / "s.zarr", {"teacher": (1, 0)}, duplicates=[((0, 3), (7, 5)), ((1, 1), (0, 5))])
    write_labels(tmp_path / "labels.csv", patch_labels())
    found = evaluate_task([store], SPEC, replace(BENCH, encoders=("teacher",), baseline=""), tmp_path)
    assert found.notes == ["task t: 2 copies of patches were left out, 1 of them training copies of test patches"]


def run_folder(path, slides):
    (path / "student").mkdir(parents=True)
    (path / "run.json").write_text(json.dumps({"rows": {"train": dict.fromkeys(slides, 40), "held_out": {}}}))
    return f"run:{path / 'student'}"


@pytest.mark.parametrize(
    ("trained", "notes"),
    [
        (("s0", "s1", "s2"), []),
        (("s0", "s7"), ["task t: 1 of 4 test slides were used to distill teacher: s7"]),
        (
            (f"s{p}" for p in range(8)),
            ["task t: 4 of 4 test slides were used to distill teacher: s4, s5, s6 and 1 more"],
        ),
    ],
)
def test_slides_of_the_distillation_in_a_test_part_are_named(tmp_path, trained, notes):
    store = make_store(tmp_path / "s.zarr", {"teacher": (1, 0)}, weights=run_folder(tmp_path / "run", trained))
    write_labels(tmp_path / "labels.csv", patch_labels())
    found = evaluate_task([store], SPEC, replace(BENCH, encoders=("teacher",), baseline=""), tmp_path)
    assert found.notes == notes


@pytest.mark.parametrize("content", [None, "{", "{}", "[]", '{"rows": 3}'])
def test_a_run_that_is_gone_cannot_tell_its_slides(tmp_path, content):
    store = make_store(tmp_path / "s.zarr", {"teacher": (1, 0)}, weights=f"run:{tmp_path / 'run' / 'student'}")
    if content:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "run.json").write_text(content)
    write_labels(tmp_path / "labels.csv", patch_labels())
    found = evaluate_task([store], SPEC, replace(BENCH, encoders=("teacher",), baseline=""), tmp_path)
    (note,) = found.notes
    assert note.endswith("run.json cannot be read to tell whether teacher was distilled on slides that it is tested on")


def test_rows_that_are_not_finite_are_one_failure_of_their_encoder(tmp_path):
    store = make_store(tmp_path / "s.zarr", {"teacher": (1, 0), "weak": (0.5, 0)})
    features = store.slide("s2").features("weak")
    features[3, 5] = np.nan
    put_features(store.slide("s2"), "weak", features)
    write_labels(tmp_path / "labels.csv", patch_labels())
    found = evaluate_task([store], SPEC, replace(BENCH, encoders=("teacher", "weak"), baseline=""), tmp_path)
    (failure,) = found.failures
    assert failure.encoder == "weak"
    assert "features of weak hold NaN or infinity in 1 of 320 rows, first in row 3 of slide s2" in failure.reason
    assert {r.encoder for r in found.results} == {"teacher"}


def test_an_encoder_that_has_fewer_slides(tmp_path):
    store = make_store(tmp_path / "s.zarr", {"teacher": (1, 0)})
    store.add_encoder("part", EncoderFacts(digest="part", name="part", weights="file:p", dim=3))
    writer = FeatureWriter.open(store.slide("s0"), "part", digest="part", dim=3, n_views=1)
    (shard,) = writer.missing([0])
    hashes = store.slide("s0").pixel_hash[:, 0]
    writer.write(shard, np.ones((PATCHES, 3), np.float32), hashes, np.zeros(PATCHES, np.uint8))
    write_labels(tmp_path / "labels.csv", patch_labels())
    found = evaluate_task([store], SPEC, replace(BENCH, encoders=("teacher", "part"), baseline=""), tmp_path)
    (failure,) = found.failures
    assert failure.encoder == "part"
    assert "part" in failure.reason
    assert "s1" in failure.reason
    assert "\n" not in failure.reason


def test_fewer_members_than_neighbors_or_folds(planted):
    folder, store = planted
    found = evaluate_task([store], replace(SPEC, split="", folds=9, metrics=("knn", "cka")), BENCH, folder)
    assert {f.reason for f in found.failures} == {
        "knn: task t: class a is in 8 patients, fewer than the 9 folds; use fewer"
    }
    assert any(r.metric == "cka_debiased" for r in found.results)


def test_a_class_with_fewer_patches_than_neighbors_is_noted(planted, tmp_path):
    _, store = planted
    rows = [
        {**row, "kind": "c" if row["slide_id"] in ("s0", "s7") and row["x"] == "0" else row["kind"]}
        for row in patch_labels()
    ]
    write_labels(tmp_path / "labels.csv", rows)
    found = evaluate_task([store], replace(SPEC, metrics=("knn",)), BENCH, tmp_path)
    assert found.notes == ["task t: training patches of class c number 1, fewer than the k = 5 that vote"]
    assert not found.failures


def test_p_values_are_adjusted():
    def compared(task, metric, p_value):
        nothing = Estimate(value=0.1)
        return Comparison(task=task, metric=metric, encoder="b", reference="a", difference=nothing, p_value=p_value)

    rows = [
        compared("x", "m", 0.01),
        compared("y", "m", 0.04),
        compared("x", "n", 0.04),
        compared("z", "m", float("nan")),
    ]
    found = adjusted([*rows, replace(compared("x", "m", 0.03), reference="c")])
    assert [row.p_holm for row in found[:3]] == pytest.approx([0.03, 0.08, 0.08])  # three metrics and tasks
    assert [row.tests for row in found] == [3, 3, 3, 3, 1]
    assert np.isnan(found[3].p_holm)
    assert found[4].p_holm == 0.03
    assert [row.p_value for row in found[:3]] == [0.01, 0.04, 0.04]

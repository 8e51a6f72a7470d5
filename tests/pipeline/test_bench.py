"""g2l bench from a task file to a report: every metric group at once, equal bytes, and tasks that fail one by one."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from g2l_core.benchmark.metric_groups import METRIC_GROUPS
from g2l_core.benchmark.spec import NEEDS
from g2l_core.benchmark.task_file import known_keys, read_tasks
from g2l_core.errors import TaskError, UnknownNameError, UsageError
from g2l_core.metrics.statistics import holm
from g2l_core.report.json import json_text
from g2l_core.report.tables import meaning_of
from g2l_core.report.write import read_report
from g2l_core.store.facts import ExtractionRunFacts
from g2l_core.store.features import FeatureStore
from pipeline.bench import content_digest, run_bench
from tests.benchmark.test_metric_groups import label_row
from tests.pipeline.test_cli import g2l
from tests.planted import PATCHES, make_store, write_labels

STRENGTH = {"teacher": (0.8, 0.0, 0.9), "weak": (0.1, 0.8, 0.1), "strong": (0.6, 0.1, 0.7)}

HEAD = 'labels = "labels.csv"\n'
EVERYTHING = f"""
title = "all"

[tasks.patches]
{HEAD}
label = "kind"
split = "split"
metrics = [
    "cka", "similarity", "knn", "probe", "prototypes", "retrieval", "robustness", "robustness_paired",
    "center", "bias_drop",
]
similarity_rows = 100
knn_k = [3, 9]
knn_votes = ["majority", "weighted"]
probe_c = 1
prototypes_shots = 2
prototypes_repeats = 3
robustness_k = [3, 5]
center_probe_folds = 4
bias_drop_slides_per_class = 2
bias_drop_rows_per_slide = 5
bias_drop_repeats = 2

[tasks.numbers]
{HEAD}
label = "score"
folds = 4
metrics = ["regression"]

[tasks.slides]
{HEAD}
label = "grade"
split = "split"
metrics = ["slide_probe", "slide_vote", "abmil", "survival"]
probe_c = [0.1, 1.0]
abmil_width = 8
abmil_most_epochs = 3
abmil_folds = 2
survival_event = "dead"
survival_time = "months"
survival_penalties = 1.0

[tasks.scanners]
{HEAD}
group = "specimen"
metrics = ["consistency"]
consistency_condition = "scanner"
consistency_patch = "spot"
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    make_store(folder / "s.zarr", STRENGTH, patients=16, mpp=0.5)
    write_labels(folder / "labels.csv", [label_row(p, i) for p in range(16) for i in range(PATCHES)])
    return folder


def bench(folder, tasks, out):
    path = folder / "tasks.toml"
    path.write_text(tasks)
    return run_bench(path, [folder / "s.zarr"], list(STRENGTH), out, baseline="weak", draws=50)


def test_the_same_input_gives_the_same_bytes_for_every_metric_group(planted, tmp_path):
    report = bench(planted, EVERYTHING, tmp_path / "one")
    assert not report.failures
    asked = {metric for spec in read_tasks(planted / "tasks.toml")[1] for metric in spec.metrics}
    assert asked == set(NEEDS)
    bench(planted, EVERYTHING, tmp_path / "two")
    for name in ("results.json", "results.csv", "comparisons.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert json_text(read_report(tmp_path / "one")) == json_text(report)  # NaN is not equal to itself
    assert all(result.settings for result in report.results)
    assert all(meaning_of(result.metric).sentence for result in report.results)


def test_tasks_that_cannot_be_read_or_evaluated_leave_the_others(planted, tmp_path):
    tasks = f"""
[tasks.unknown]
metrics = ["knnn"]

[tasks.option]
{HEAD}
label = "kind"
split = "split"
knn_k = 0

[tasks.several]
{HEAD}
label = "kind"
split = "split"
metrics = ["cka", "survival"]
survival_event = "dead"
survival_time = "scanner"

[tasks.one]
{HEAD}
metrics = ["cka"]
"""
    report = bench(planted, tasks, tmp_path / "out")
    assert {(r.task, r.metric) for r in report.results} == {
        (task, f"cka_{kind}") for task in ("several", "one") for kind in ("debiased", "biased")
    }
    reasons = {failure.task: failure.reason for failure in report.failures}
    assert reasons["unknown"].startswith("task unknown: unknown metric 'knnn'; known: cka, similarity, knn")
    assert reasons["option"] == "task option: knn_k must be different whole numbers of at least 1; got [0]"
    assert reasons["several"].startswith("survival: column 'scanner' must hold numbers")
    assert all("\n" not in reason for reason in reasons.values())


def test_p_values_are_adjusted_over_all_that_a_run_compares_of_two_encoders(planted, tmp_path):
    tasks = "".join(
        f'[tasks.{name}]\n{HEAD}label = "{label}"\nsplit = "split"\nmetrics = ["knn"]\nknn_k = 5\n'
        for name, label in (("a", "kind"), ("b", "grade"))
    )
    report = bench(planted, tasks, tmp_path / "out")
    rows = [c for c in report.comparisons if (c.encoder, c.reference) == ("strong", "weak")]
    assert len(rows) == 6  # three metrics on two tasks
    expected = holm(np.array([row.p_value for row in rows]))
    np.testing.assert_array_equal([row.p_holm for row in rows], expected)
    stored = json.loads((tmp_path / "out" / "results.json").read_text())["comparisons"]
    assert {row["tests"] for row in stored} == {6}


@pytest.mark.parametrize(
    ("line", "error", "words"),
    [
        ("knn_k = 'three'", UsageError, "knn_k must be a whole number, or a list of such, not 'three'"),
        ("knn_k = [3, 2.5]", UsageError, "knn_k must be a whole number, or a list of such"),
        ("knn_distance = 3", UsageError, "knn_distance must be text, not 3"),
        ("probe_c = true", UsageError, "probe_c must be a number"),
        ("abmil_class_balanced = 1", UsageError, "abmil_class_balanced must be true or false, not 1"),
        ("survival_event = ['a']", UsageError, "survival_event must be text"),
        ("knn_kk = 3", UnknownNameError, "Did you mean knn_k"),
        ("expected = 3", UsageError, "expected must be a table of metrics, not 3"),
        ("probe_folds = 1", TaskError, "task t: probe_folds must be at least 2; got 1"),
    ],
)
def test_keys_that_cannot_be_read(tmp_path, line, error, words):
    path = tmp_path / "tasks.toml"
    path.write_text(f'[tasks.t]\nmetrics = ["cka"]\n{line}\n')
    with pytest.raises(error) as refused:
        read_tasks(path)
    assert words in str(refused.value)


def test_every_key_is_in_the_page_about_tasks():
    page = Path(__file__).parents[2].joinpath("docs", "tasks.md").read_text(encoding="utf-8")
    for group in NEEDS:
        assert f"| `{group}` |" in page
    for key, (group, option, _) in known_keys().items():
        assert f"`{key}" in page or (group and f"`_{option}`" in page), key


@pytest.mark.parametrize(("metric", "group"), [("slide_probe_auc", "slide_probe"), ("survival_c_index", "survival")])
def test_published_values_of_every_metric_group_are_taken(tmp_path, metric, group):
    path = tmp_path / "tasks.toml"
    text = f'[tasks.t]\nmetrics = ["{group}"]\nlabel = "x"\nfolds = 3\nsurvival_event = "e"\nsurvival_time = "t"\n'
    published = '{ encoder = "g2l", value = 0.9, tolerance = 0.01, source = "the article" }'
    path.write_text(f"{text}expected.{metric} = {published}\n")
    assert read_tasks(path)[1][0].expected[0].metric == metric
    path.write_text(f"{text}expected.probe_auc = {published}\n")
    with pytest.raises(TaskError, match="expected.probe_auc is of none of its metrics"):
        read_tasks(path)


def test_reports_of_equal_stores_name_one_digest(planted, tmp_path):
    """Whatever the stores went through: when they were made, where they and their slides lie, how often they ran."""
    one, two = (
        FeatureStore.open(shutil.copytree(planted / "s.zarr", tmp_path / f"{i}.zarr"), writable=True) for i in "ab"
    )
    two._set_facts(created="2020-01-01", runs=(ExtractionRunFacts(ended="2020-01-02", elapsed=3.0),))
    for slide in two.slides():
        slide.set_source(Path("/elsewhere/x"), slide.facts.fingerprint)
    two = FeatureStore.open(two.path)
    assert content_digest(one) == content_digest(two)
    first = next(two.slides())
    changes = [
        lambda s: s.set_source(Path("/x"), "another fingerprint"),
        lambda s: s.set_labels({"grade": "another"}),
    ]
    for change in changes:
        before = content_digest(FeatureStore.open(two.path))
        change(FeatureStore.open(two.path, writable=True).slide(first.slide_id))
        assert content_digest(FeatureStore.open(two.path)) != before
    before = content_digest(FeatureStore.open(two.path))
    FeatureStore.open(two.path, writable=True)._set_facts(views={"seed": 5})
    assert content_digest(FeatureStore.open(two.path)) != before


FEW = {
    "abmil": "abmil_width = 8\nabmil_most_epochs = 2",
    "survival": 'survival_time = "months"\nsurvival_event = "dead"\nsurvival_penalties = 1.0',
    "consistency": 'group = "specimen"\nconsistency_condition = "scanner"\nconsistency_patch = "spot"',
}
"""Keys that a metric group needs, or that make it quick."""


@pytest.mark.parametrize("how", ["", 'split = "split"', "folds = 2"])
@pytest.mark.parametrize("patients", [1, 2, 3])
def test_a_first_trial_of_very_few_slides_gets_figures_or_reasons(tmp_path, patients, how):
    """Every metric group on one, two or three patients: no internal error, and no warning of NumPy's."""
    make_store(tmp_path / "s.zarr", {"teacher": (0.8, 0.0), "student": (0.3, 0.2)}, patients=patients)
    write_labels(tmp_path / "labels.csv", [label_row(p, i) for p in range(patients) for i in range(PATCHES)])
    tasks = [
        f'[tasks.{group}]\nlabels = "labels.csv"\nlabel = "{"score" if group == "regression" else "kind"}"\n{how}\n'
        f'metrics = ["{group}"]\n{FEW.get(group, "")}\n'
        for group in METRIC_GROUPS
    ]
    (tmp_path / "tasks.toml").write_text("".join(tasks))
    given = ["--store", tmp_path / "s.zarr", "--encoders", "teacher,student", "--draws", "100"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        done = g2l("bench", tmp_path / "tasks.toml", *given, "--out", tmp_path / "report")
    if patients == 1 and how.startswith("split"):
        assert done.returncode == 2
        assert "no figure could be computed: task cka: its train part is empty" in done.stderr
        return
    assert done.returncode in {0, 1}, done.stderr
    found = read_report(tmp_path / "report")
    tried = {row.task for row in found.results} | {row.task for row in found.failures}
    assert tried == set(METRIC_GROUPS)
    similar = {row.metric for row in found.results if row.task == "similarity" and row.encoder == "student"}
    assert "similarity_rbf_cka" in similar
    assert ("similarity_ridge_r2" in similar) == (patients > 1)
    if patients == 1:
        assert "Only one of the patients is tested" in (tmp_path / "report" / "report.html").read_text()
    if patients == 1 and how:
        assert "one of the patients alone, fewer than the 2 folds; two are needed at least" in done.stderr

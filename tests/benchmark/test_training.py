"""Intervals that hold the variation of the training patients too."""

from dataclasses import replace

import numpy as np
import pytest

from g2l_core.benchmark.evaluate import BenchSpec, evaluate_task
from g2l_core.benchmark.metric_groups import METRIC_GROUPS, TaskInput
from g2l_core.benchmark.rows import gather
from g2l_core.benchmark.spec import KnnOptions, ProbeOptions, TaskSpec
from g2l_core.benchmark.training import _left_out, with_training_variation
from g2l_core.errors import TaskError
from g2l_core.metrics.intervals import estimate
from tests.planted import make_store, patch_labels, write_labels

PATIENTS = 16
SPEC = TaskSpec(
    name="t",
    labels="labels.csv",
    label="kind",
    split="split",
    metrics=("knn", "probe"),
    knn=KnnOptions(k=(5,)),
    probe=ProbeOptions(c=(1.0,)),
    training_halves=8,
)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    store = make_store(folder / "s.zarr", {"teacher": (0.35, 0.1), "weak": (0.2, 0.4)}, patients=PATIENTS)
    write_labels(folder / "labels.csv", patch_labels(PATIENTS))
    return folder, store


@pytest.fixture
def task(planted):
    folder, store = planted
    rows = gather([store], SPEC, folder)
    features = rows.features("weak")
    return TaskInput(
        rows=rows, features=features, spec=SPEC, seed=0, teacher="teacher", device="cpu", reference=features
    )


def test_a_half_has_half_of_the_training_patients_and_all_that_are_tested(task):
    sides = []
    for number in range(6):
        gone = _left_out(task, number)
        dropped = set(task.rows.cluster[gone])
        assert len(dropped) == PATIENTS // 4
        assert not (gone & (task.rows.part == "test")).any()
        assert all(gone[task.rows.cluster == patient].all() for patient in dropped)
        sides.append(frozenset(dropped))
    assert len(set(sides)) > 3


def test_the_variance_over_halves_is_added(task):
    plain = {value.metric: value.figure for value in METRIC_GROUPS["probe"](task)}
    for value in with_training_variation(METRIC_GROUPS["probe"], task):
        (source,) = value.figure.more
        np.testing.assert_array_equal(value.figure.values, plain[value.metric].values)
        by_hand = []
        for number in range(SPEC.training_halves):
            kept = ~_left_out(task, number)
            half = replace(task, rows=task.rows.take(kept), features=task.features[kept], reference=None)
            found = {other.metric: other.figure for other in METRIC_GROUPS["probe"](half)}
            by_hand.append(found[value.metric].values[0])
        assert source.variance == pytest.approx(np.var(by_hand, ddof=1))
        if not value.figure.no_interval:
            wide, narrow = estimate(value.figure), estimate(plain[value.metric])
            assert "and 8 training halves" in wide.method
            assert wide.high - wide.low > narrow.high - narrow.low or wide.method != narrow.method


def test_comparisons_hold_both_sources(planted):
    folder, store = planted
    outcome = evaluate_task([store], SPEC, BenchSpec(encoders=("teacher", "weak")), folder)
    assert not outcome.failures
    assert {row.metric.split("_")[0] for row in outcome.comparisons} == {"knn", "probe"}
    assert all(
        "training halves" in r.difference.method for r in outcome.comparisons if r.difference.low == r.difference.low
    )


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"training_halves": 1}, "at least 2"),
        ({"training_halves": -3}, "at least 2"),
        ({"split": "", "folds": 3}, "needs a fixed split"),
    ],
)
def test_what_cannot_be_halved_is_refused(keys, words):
    with pytest.raises(TaskError, match=words):
        replace(SPEC, **keys)

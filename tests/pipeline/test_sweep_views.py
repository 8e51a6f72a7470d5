"""The law of views: which numbers a sweep means, what its runs cost, and its charts."""

import csv
import math
import re

import pytest
from scipy import stats

from g2l_core.errors import StoreMissingError, UsageError
from g2l_core.store.features import FeatureStore
from pipeline.distill import DistillHow
from pipeline.runs import read_run
from pipeline.sweep import read_sweep, run_sweep, sweep_text
from pipeline.sweep_views import in_numbers, over_seeds
from tests.conftest import TEACHER
from tests.pipeline.test_distill import KEY

SWEEP = """
[base]
epochs = 2
batch_size = 16
hold_out = "0.3"
where = ["slide_id=WHERE"]
[grid]
views = [1, "E/3", "E", "online"]
seed = [0, 1]
"""


@pytest.mark.parametrize(
    ("values", "base", "expected"),
    [
        ([1, 2, 4, "E/3", "E", "online"], {"epochs": 12}, [1, 2, 4, 12, "online"]),
        (["E", "E/3"], {"epochs": 30}, [10, 30]),
        ([1, "E/3"], {"epochs": 2}, [1]),
        (["online", "E"], {}, [10, "online"]),
        ([4, 1], {"steps": 100}, [1, 4]),
    ],
)
def test_what_the_words_mean(values, base, expected):
    assert in_numbers(values, base, 10) == expected


def test_the_interval_over_seeds_is_student_s():
    found = over_seeds([0.2, 0.5, 0.6])
    low, high = stats.t.interval(0.95, 2, found.value, stats.sem([0.2, 0.5, 0.6]))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert math.isnan(over_seeds([0.4]).low)


@pytest.fixture(scope="module")
def swept(cached_store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("views")
    slide = FeatureStore.open(cached_store).slide_ids()[0]
    (folder / "views.toml").write_text(SWEEP.replace("WHERE", slide))
    sweep = read_sweep(str(folder / "views.toml"), [])
    how = DistillHow(resume=True, workers=1)
    return folder, run_sweep(sweep, cached_store, KEY, TEACHER, "random:1", folder / "s", how)


def test_each_number_of_views_and_the_live_teacher_are_run(swept):
    folder, result = swept
    assert not result.failed
    with (folder / "s" / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["views"], row["seed"]) for row in table] == [
        (views, seed) for views in ("1", "2", "online") for seed in ("0", "1")
    ]
    for row in table:
        record = read_run(folder / "s" / row["run"])
        assert record.settings["online"] == (row["views"] == "online")
        assert record.replay["n_augmented"] == (0 if row["views"] == "online" else int(row["views"]))


def test_what_runs_cost(swept, cached_store):
    folder, result = swept
    store = FeatureStore.open(cached_store)
    patches = len(store.slide(store.slide_ids()[0]))
    [cached] = store.facts.runs
    for run in result.finished:
        with (folder / "s" / run.folder / "log.csv").open() as file:
            training = sum(float(row["seconds"]) for row in csv.DictReader(file)) / 3600
        views = 0 if run.varied.get("online") else 1 + run.varied["views"]
        assert run.cost.gigabytes == pytest.approx(patches * views * 1024 * 2 / 1e9)
        caching = cached.elapsed * patches * views / (cached.patches * 3) / 3600
        assert run.cost.hours == pytest.approx(training + caching)


def test_the_page_draws_quality_against_both_costs(swept):
    folder, result = swept
    page = (folder / "s" / "sweep.html").read_text()
    assert "GB of cached features" in page
    assert "hours of caching and training" in page
    assert len(re.findall(r"<svg", page)) >= 2
    for name in ("views 1", "views 2", "views online"):
        assert page.count(name) >= 3  # a row of each table, and both charts
    assert all(len(line) <= 80 for line in sweep_text(result, folder / "s").splitlines()[:-1])


def test_views_that_are_not_cached_are_refused_before_the_first_run(cached_store, tmp_path):
    sweep = read_sweep("views", [])
    with pytest.raises(StoreMissingError, match="up to 12 views, .* has 2 of .*--set epochs=2"):
        run_sweep(sweep, cached_store, KEY, TEACHER, "random:1", tmp_path / "s", DistillHow(resume=True))
    assert not (tmp_path / "s").exists()
    with pytest.raises(UsageError, match="E is the number of epochs"):
        read_sweep("views", ["steps=10"])

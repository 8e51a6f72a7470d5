"""What a report says first: the share of the teacher that is retained; and robustness never without its price."""

import csv

import pytest

from g2l_core.report.html import page
from g2l_core.report.markdown import markdown
from g2l_core.report.tables import beside, headline, meaning_of, task_parts
from g2l_core.report.write import terminal_table
from pipeline.bench import run_bench
from tests.benchmark.test_metric_groups import label_row
from tests.planted import PATCHES, make_store, write_labels

TASKS = """
[tasks.tissue]
labels = "labels.csv"
label = "kind"
split = "split"
metrics = ["cka", "knn", "probe", "robustness"]
probe_c = 1.0
robustness_k = [3, 5]

[tasks.bare]
labels = "labels.csv"
label = "kind"
split = "split"
metrics = ["cka", "robustness"]
robustness_k = 3
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("retained")
    make_store(folder / "s.zarr", {"teacher": (0.8, 0.0), "strong": (0.6, 0.1), "start": (0.1, 0.8)})
    write_labels(folder / "labels.csv", [label_row(p, i) for p in range(8) for i in range(PATCHES)])
    (folder / "tasks.toml").write_text(TASKS)
    out = folder / "report"
    return out, run_bench(
        folder / "tasks.toml", [folder / "s.zarr"], ["teacher", "strong"], out, baseline="start", draws=100
    )


def test_the_baseline_is_measured_though_only_the_option_names_it(report):
    assert {result.encoder for result in report[1].results} == {"teacher", "strong", "start"}


def test_shares_come_first_and_are_the_values_over_the_teacher_s(report):
    out, found = report
    part = next(part for part in task_parts(found) if part.name == "tissue")
    order = list(part.results)
    shares = [metric for metric in order if metric.startswith("retained_")]
    assert order[: len(shares)] == shares
    assert order[len(shares)] == "cka_debiased"
    assert set(shares) == {
        f"retained_{metric}" for metric in part.results
        if metric.startswith(("knn_", "probe_")) and not metric.endswith(("ece", "brier"))
    }  # fmt: skip
    for metric in shares:
        own = part.results[metric.removeprefix("retained_")]
        assert set(part.results[metric]) == {"strong", "start"}
        for key, result in part.results[metric].items():
            expected = own[key].estimate.value / own["teacher"].estimate.value
            assert result.estimate.value == pytest.approx(expected)
            assert result.estimate.low <= expected <= result.estimate.high
    assert headline(tuple(part.results)) == "knn_balanced_accuracy"
    assert headline(shares) is None
    assert found.summary[0].startswith("tissue: retained share of the teacher is ")
    assert all(meaning_of(metric).title.startswith("Retained share: ") for metric in shares)
    with (out / "results.csv").open() as file:
        assert next(csv.DictReader(file))["metric"].startswith(("retained_", "cka"))


def test_robustness_is_never_without_what_it_costs(report):
    _, found = report
    tissue, bare = task_parts(found)
    values = [f"{key} {tissue.results['probe_balanced_accuracy'][key].estimate.value:.3f}" for key in tissue.encoders]
    told = f"Probe balanced accuracy beside it: {', '.join(values)}"
    robust = [metric for metric in tissue.results if metric.startswith("robustness_")]
    assert robust
    assert all(beside(tissue, metric) == told for metric in robust)
    assert beside(tissue, "probe_accuracy") == beside(tissue, "cka_debiased") == ""
    missing = "the task has no probe or kNN, so what such robustness costs is not known"
    assert beside(bare, "robustness_ratio_k3") == missing
    rows = [line for line in markdown(found).splitlines() if line.startswith("| Robustness ratio, k=")]
    assert len([row for row in rows if told in row]) == 2
    assert len([row for row in rows if missing in row]) == 1
    html, terminal = page(found), " ".join(terminal_table(found).split())
    for text in (told, missing):
        assert text in html
        assert text in terminal

"""What a report says first: the share of the teacher that is retained; and robustness never without its price."""

import csv
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from g2l_core.report.html import page
from g2l_core.report.markdown import markdown
from g2l_core.report.tables import beside, beside_difference, headline, meaning_of, task_parts
from g2l_core.report.write import terminal_table
from g2l_core.results import Estimate, PublishedValue, Report, Result
from pipeline.bench import run_bench, summary_sentence
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
    probe = {key: row.estimate.value for key, row in tissue.results["probe_balanced_accuracy"].items()}
    values = [f"teacher {probe['teacher']:.3f}"]
    values += [f"{key} {probe[key]:.3f} ({probe[key] - probe['teacher']:+.3f})" for key in ("strong", "start")]
    told = f"Probe balanced accuracy beside it: {', '.join(values)}"
    robust = [metric for metric in tissue.results if metric.startswith("robustness_")]
    assert robust
    assert all(beside(tissue, metric) == told for metric in robust)
    assert beside(tissue, "probe_accuracy") == beside(tissue, "cka_debiased") == ""
    missing = "the task has no probe or kNN, so what such robustness costs is not known"
    assert beside(bare, "robustness_ratio_k3") == missing
    rows = [line for line in markdown(found).splitlines() if re.match(r"\| Robustness ratio, k=\d+ \|", line)]
    assert len([row for row in rows if told in row]) == 2
    assert len([row for row in rows if missing in row]) == 1
    html, terminal = page(found), " ".join(terminal_table(found).split())
    for text in (told, missing):
        assert text.replace("+", "&#43;") in html.replace("+", "&#43;")
        assert text in terminal


def test_a_difference_in_robustness_stands_beside_the_probe_s(report):
    """In the Markdown and under the plots of the page; a task without a probe says so in place."""
    _, found = report
    tissue, bare = task_parts(found)
    probe = {key: row.estimate.value for key, row in tissue.results["probe_balanced_accuracy"].items()}
    compared = [row for row in tissue.comparisons if row.metric == "robustness_ratio_k3"]
    assert compared
    rows = [line for line in markdown(found).splitlines() if line.startswith("| Robustness ratio, k=3 (")]
    for row in compared:
        told = f"Probe balanced accuracy beside it: {probe[row.encoder] - probe[row.reference]:+.3f}"
        assert beside_difference(tissue, row) == told
        assert len([r for r in rows if told in r and f"{row.encoder} - {row.reference}" in r]) == 1
        assert f"{row.encoder}: {told}" in page(found) or told in page(found)
    assert all("what such robustness costs is not known" in beside_difference(bare, r) for r in bare.comparisons
               if r.metric.startswith("robustness"))  # fmt: skip
    other = next(row for row in tissue.comparisons if row.metric == "probe_balanced_accuracy")
    assert beside_difference(tissue, other) == ""


def test_every_robustness_figure_of_a_page_has_its_price(report):
    """Wherever a page or a table names such a figure, the price stands in the same cell, row or caption."""
    out, found = report
    lines = (out / "results.md").read_text().splitlines()
    robust = [line for line in lines if line.startswith(("| Robustness", "| PathoROB"))]
    assert robust
    assert all("beside it" in line or "what such robustness costs is not known" in line for line in robust)
    html = re.sub(r"<details>.*?</details>", "", page(found), flags=re.DOTALL)  # how values were computed: it has none
    titles = re.findall(r"(?:Robustness ratio|PathoROB index), k=\d+.{0,400}", html, re.DOTALL)
    assert titles
    assert [text for text in titles if "beside it" not in text and "costs is not known" not in text] == []


def test_a_missing_probe_of_one_encoder_and_published_values_are_told_in_place():
    def of(metric, encoder, value):
        return Result(task="t", metric=metric, encoder=encoder, estimate=Estimate(value=value), n=9)

    rows = [of("center_balanced_accuracy", "a", 0.9), of("center_balanced_accuracy", "b", 0.4)]
    published = PublishedValue(
        task="t", metric="center_balanced_accuracy", encoder="a", value=0.9, tolerance=0.1, source="a paper"
    )
    empty = Report(title="", summary=(), encoders=(), results=(), comparisons=(), failures=(), provenance={})
    for quality in ("probe_auc", "slide_probe_accuracy", "regression_pearson"):
        found = replace(empty, results=(of(quality, "a", 0.8), *rows), expected=(published,))
        told = f"{meaning_of(quality).title} beside it: a 0.800, b not known"
        (part,) = task_parts(found)
        assert beside(part, "center_balanced_accuracy") == beside(part, "retained_center_balanced_accuracy") == told
        assert len([line for line in markdown(found).splitlines() if told in line]) == 2  # the value, the published one
        assert page(found).count(told) >= 2


def test_of_many_encoders_the_summary_tells_the_teacher_and_the_ends():
    """A sentence of a dozen values would say nothing."""
    values = {"uni": 0.9, "b": 0.7, "c": 0.8, "d": 0.4, "e": 0.6}
    results = [
        Result(
            task="t", metric=f"{prefix}knn_balanced_accuracy", encoder=key,
            estimate=Estimate(value=value / (0.9 if prefix else 1), low=value - 0.1, high=value + 0.1), n=50,
        )
        for prefix in ("", "retained_") for key, value in values.items() if not (prefix and key == "uni")
    ]  # fmt: skip
    told = summary_sentence("t", SimpleNamespace(encoders=tuple(values)), results)
    assert told == (
        "t: retained share of the teacher is from 0.444 [0.300, 0.500] (d) to 0.889 [0.700, 0.900] (c) for 4 others. "
        "kNN balanced accuracy (n = 50) is 0.900 [0.800, 1.000] for uni and from 0.400 [0.300, 0.500] (d) to 0.800 "
        "[0.700, 0.900] (c) for 4 others."
    )
    few = summary_sentence("t", SimpleNamespace(encoders=("uni", "b", "c")), results)
    assert few.endswith("0.900 [0.800, 1.000] for uni, 0.700 [0.600, 0.800] for b and 0.800 [0.700, 0.900] for c.")

"""The shipped task files, the figures they expect, and the page about the datasets."""

import tomllib
from dataclasses import fields
from itertools import chain
from pathlib import Path

import pytest

from g2l_core.benchmark.spec import TaskSpec
from g2l_core.benchmark.task_file import parse_expected, read_tasks
from g2l_core.datasets import breast, others, prostate
from g2l_core.datasets.page import page
from g2l_core.datasets.spec import Dataset
from g2l_core.datasets.table import DATASETS
from g2l_core.errors import TaskError, UsageError
from g2l_core.results import PublishedValue
from pipeline.bench import find_tasks, shipped_tasks

ROOT = Path(__file__).resolve().parents[2]
SUITES = ("breast", "colorectal", "lung", "lymph-node", "prostate")


def dataset_of(task):
    return next(c.removeprefix("dataset=") for c in task.where if c.startswith("dataset="))


@pytest.mark.parametrize("name", SUITES)
def test_every_shipped_task_fits_its_dataset(name):
    _, tasks = read_tasks(shipped_tasks()[name])
    assert {dataset_of(task) for task in tasks} == {d.name for d in DATASETS.values() if d.suite == name}
    for task in tasks:
        dataset = DATASETS[dataset_of(task)]
        assert task.label in {*dataset.labels, ""}
        needs_labels = dataset.label_file or dataset.cell_label == task.label != ""
        assert task.labels == (f"{dataset.name}-labels.csv" if needs_labels else "")


@pytest.mark.parametrize(
    ("name", "label", "classes"),
    [
        ("tcga-tils", "tils", breast.TILS),
        ("bracs-roi", "lesion", breast.BRACS),
        ("bracs-wsi", "lesion", breast.BRACS),
        ("breakhis", "tumor", tuple(breast.BREAKHIS)),
        ("breakhis", "tumor_type", tuple(chain.from_iterable(breast.BREAKHIS.values()))),
        ("tiger", "tissue", breast.TIGER_TISSUES),
        ("bach", "lesion", breast.BACH),
        ("gleason-arvaniti", "gleason", prostate.GLEASON),
        ("aggc22", "gleason", prostate.AGGC),
        ("chimera", "bcr", tuple(prostate.CHIMERA_BCR.values())),
        ("nct-crc", "tissue", others.NCT),
        ("tcga-crc-msi", "msi", others.MSI),
        ("lc25000", "tissue", tuple(chain.from_iterable(others.LC25000.values()))),
    ],
)
def test_the_table_has_the_classes_that_the_readers_give(name, label, classes):
    assert DATASETS[name].labels[label] == classes


def test_every_key_of_the_table_is_a_field():
    table = tomllib.loads((ROOT / "g2l_core" / "datasets" / "datasets.toml").read_text(encoding="utf-8"))
    assert set().union(*table["datasets"].values()) <= {field.name for field in fields(Dataset)}


def test_no_task_file_is_forgotten():
    assert tuple(shipped_tasks()) == SUITES
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["pipeline"]
    assert "tasks/*.toml" in packaged


def test_the_papers_figures_are_expected():
    """Some of arXiv 2510.11176's tables, written down anew."""
    figures = {
        (task.name, e.metric, e.encoder): e.value
        for name in SUITES
        for task in read_tasks(shipped_tasks()[name])[1]
        for e in task.expected
    }
    assert len(figures) == 6 * 4 + 5 * 4 + 5 * 2 + 4 * 4  # kNN, probe, CKA before and after, robustness
    assert figures["tils", "knn_accuracy", "g2l"] == 0.9362
    assert figures["tp53", "probe_auc", "uni-v2"] == 0.6795
    assert figures["idc", "knn_accuracy", "hibou-l"] == 0.9074
    assert figures["chimera", "knn_accuracy", "h-optimus-0"] == 0.7663
    assert figures["aggc", "probe_auc", "hibou-l"] == 0.9921
    assert figures["breakhis-200x", "cka_biased", "g2l"] == 0.9734
    assert figures["bracs-roi", "cka_biased", "hibou-l"] == 0.7594
    assert figures["tiger", "robustness_ratio_k20", "g2l"] == 2.0316
    assert figures["tiger", "robustness_ratio_k3", "hibou-l"] == 0.9056


FIGURE = {"encoder": "g2l", "value": 0.9, "tolerance": 0.01, "source": "the article, table 2"}


def test_expected_takes_one_figure_or_several():
    one = PublishedValue(task="t", metric="knn_accuracy", **FIGURE)
    assert parse_expected("t", {"knn_accuracy": FIGURE}) == (one,)
    several = parse_expected("t", {"knn_accuracy": [FIGURE, FIGURE | {"encoder": "hibou-l"}], "probe_auc": FIGURE})
    assert [(e.metric, e.encoder) for e in several] == [
        ("knn_accuracy", "g2l"),
        ("knn_accuracy", "hibou-l"),
        ("probe_auc", "g2l"),
    ]
    assert TaskSpec(name="t", label="c", folds=3, metrics=("knn",), expected=(one,)).expected == (one,)
    with pytest.raises(TaskError, match="expected.knn_accuracy is of none of its metrics"):
        TaskSpec(name="t", label="c", folds=3, metrics=("probe",), expected=(one,))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"value": "0.9"}, "value must be a number, not '0.9'"),
        ({"value": True}, "value must be a number, not True"),
        ({"value": float("nan")}, "value must be finite"),
        ({"tolerance": -0.1}, "tolerance must be 0 or more, not -0.1"),
        ({"tolerance": float("inf")}, "tolerance must be 0 or more"),
        ({"encoder": ""}, "encoder and source may not be empty"),
        ({"source": 7}, "source must be text, not 7"),
        (
            {"unit": "%"},
            "needs just the keys encoder, value, tolerance, source; found encoder, source, tolerance, unit",
        ),
    ],
)
def test_expected_refuses_figures_that_say_nothing(change, words):
    with pytest.raises(TaskError, match=f"task t: expected.knn_accuracy.*{words}"):
        parse_expected("t", {"knn_accuracy": FIGURE | change})


def test_expected_in_a_task_file(tmp_path):
    path = tmp_path / "tasks.toml"
    head = '[tasks.t]\nmetrics = ["cka"]\n'
    path.write_text(
        head + '[tasks.t.expected.cka_biased]\nencoder = "g2l"\nvalue = 1\ntolerance = 0\nsource = "by definition"\n'
    )
    assert read_tasks(path)[1][0].expected[0].value == 1
    path.write_text(head + "expected = 0.9\n")
    with pytest.raises(UsageError, match="expected must be a table of metrics, not 0.9"):
        read_tasks(path)
    path.write_text(head + "expected.cka_biased = 0.9\n")
    with pytest.raises(TaskError, match="needs just the keys .*; found 0.9"):
        read_tasks(path)


def test_task_files_go_by_path_or_shipped_name(tmp_path, monkeypatch):
    own = tmp_path / "mine.toml"
    own.write_text('[tasks.t]\nmetrics = ["cka"]\n')
    assert find_tasks(own) == (own, tmp_path)
    assert find_tasks(Path("breast")) == (ROOT / "pipeline" / "tasks" / "breast.toml", Path())
    with pytest.raises(UsageError, match="no such task file: brest. Shipped ones go by name: breast, colorectal, lung"):
        find_tasks(Path("brest"))
    monkeypatch.chdir(tmp_path)
    Path("breast").write_text(own.read_text())
    assert find_tasks(Path("breast")) == (Path("breast"), Path())  # a file of that name comes first


def test_the_page_is_made_from_the_table():
    found = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    assert found == page(), "python -m g2l_core.datasets.page > docs/datasets.md"
    assert all(f"\n## {name}\n" in found for name in DATASETS)

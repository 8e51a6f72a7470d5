"""ALIAS=ENCODER in g2l bench: the alias is the name everywhere, and published values stand beside it."""

import errno
import json
import re
from pathlib import Path

import pytest

from g2l_core.errors import RunError, UsageError
from g2l_core.report.write import FILES, read_report, require_report_folder
from pipeline.aliases import split_alias, split_names
from pipeline.bench import run_bench
from pipeline.cli.bench import _last_single
from tests.benchmark.test_metric_groups import label_row
from tests.planted import PATCHES, make_store, write_labels

KEYS = {"uni": (0.8, 0.0, 0.9), "uni2-h": (0.1, 0.8, 0.1), "run-ab12": (0.6, 0.1, 0.7)}
ASKED = ["teacher=uni", "uni-v2=uni2-h", "G2L=run-ab12"]
ALIASES = ("teacher", "uni-v2", "G2L")
TASKS = """
[tasks.uni]
labels = "labels.csv"
label = "kind"
split = "split"
metrics = ["cka", "knn"]
expected.knn_accuracy = [
    { encoder = "g2l", value = 0.5, tolerance = 1.0, source = "a paper" },
    { encoder = "UNI_v2", value = 5.0, tolerance = 0.1, source = "a paper" },
    { encoder = "uni", value = 0.5, tolerance = 1.0, source = "a paper" },
    { encoder = "conch", value = 0.5, tolerance = 1.0, source = "a paper" },
]
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aliases")
    make_store(folder / "s.zarr", KEYS, patients=8, mpp=0.5)
    write_labels(folder / "labels.csv", [label_row(p, i) for p in range(8) for i in range(PATCHES)])
    (folder / "tasks.toml").write_text(TASKS)
    return folder


@pytest.fixture(scope="module")
def aliased(planted, tmp_path_factory):
    out = tmp_path_factory.mktemp("aliased")
    return out, bench(planted, out, ASKED, baseline="uni-v2")


def bench(planted, out, encoders, **more):
    return run_bench(planted / "tasks.toml", [planted / "s.zarr"], encoders, out, draws=50, **more)


def test_an_alias_is_the_name_everywhere(aliased):
    out, report = aliased
    assert [(row.key, row.stored_key, row.name) for row in report.encoders] == [
        ("teacher", "uni", "uni"), ("uni-v2", "uni2-h", "uni2-h"), ("G2L", "run-ab12", "run-ab12"),
    ]  # fmt: skip
    assert {row.encoder for row in report.results} == set(ALIASES)
    assert {(row.encoder, row.reference) for row in report.comparisons} == {
        ("uni-v2", "teacher"), ("G2L", "teacher"), ("G2L", "uni-v2"),
    }  # fmt: skip
    assert report.pictures.encoders() == ALIASES
    assert {row.settings.get("to") for row in report.results if row.metric.startswith("cka")} == {"teacher"}
    assert "uni: " in report.summary[0]  # the task has the name of an encoder, and keeps it
    assert all(alias in report.summary[0] for alias in ALIASES)
    assert read_report(out).encoders == report.encoders


def test_nothing_but_the_names_changes(planted, aliased, tmp_path):
    out, report = aliased
    plain = bench(planted, tmp_path / "plain", list(KEYS))
    values = [[(r.task, r.metric, r.estimate.value, r.n) for r in of_each.results] for of_each in (report, plain)]
    assert values[0] == values[1]
    assert plain.encoders[0].stored_key == ""
    texts = {name: (out / name).read_text() for name in FILES}
    described = json.loads(texts["results.json"]).pop("encoders")
    assert [row["stored_key"] for row in described] == list(KEYS)
    texts["results.json"] = json.dumps({**json.loads(texts["results.json"]), "encoders": []})
    texts["results.md"] = texts["results.md"].partition("## Encoders")[0]
    texts["report.html"] = re.sub(r"<table[^>]*encoders.*?</table>", "", texts["report.html"], flags=re.DOTALL)
    for name, text in texts.items():
        assert not re.findall(r"(?<![\w-])(?:uni2-h|run-ab12)(?![\w-])", text), name


def test_published_values_stand_beside_the_encoders_that_they_mean(aliased):
    table = (aliased[0] / "results.md").read_text()
    rows = {row[1]: row for line in table.splitlines() if "a paper" in line for row in [line.strip("| ").split(" | ")]}
    verdicts = {encoder: re.search(r"within|off by|not run here", " ".join(row))[0] for encoder, row in rows.items()}
    assert verdicts == {"g2l": "within", "UNI_v2": "off by", "uni": "within", "conch": "not run here"}


def test_names_that_cannot_be_told_apart_are_refused(planted, tmp_path):
    for asked, words in {
        ("uni", "uni"): "names uni twice",
        ("uni", "G2L=uni"): "names uni twice",
        ("G2L=uni", "G2L=uni2-h"): "names G2L twice",
        ("uni2-h=uni", "uni2-h"): "names uni2-h twice",
        ("uni", "=uni2-h"): "ALIAS=ENCODER",
        ("uni", "G2L="): "ALIAS=ENCODER",
    }.items():
        with pytest.raises(UsageError, match=words):
            bench(planted, tmp_path / "report", list(asked))
    assert not (tmp_path / "report").exists()


def test_folders_of_a_sweep_are_no_aliases(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loss=mse").mkdir()
    for text in ("loss=mse", "loss=*", "runs/loss=mse", "uni"):
        assert split_alias(text) == ("", text)
    assert split_alias("G2L = runs/loss=mse") == ("G2L", "runs/loss=mse")
    assert split_alias("alpha=2") == ("alpha", "2")


def test_a_folder_of_something_else_is_refused_before_anything_is_computed(planted, tmp_path, monkeypatch):
    (tmp_path / "thesis.txt").write_text("chapter 1")
    with pytest.raises(RunError, match=r"holds thesis\.txt and no report"):
        bench(planted, tmp_path, list(KEYS))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    (tmp_path / "thesis.txt").unlink()
    require_report_folder(tmp_path)  # an empty one
    (tmp_path / ".results.json.partial").write_text("of a killed run")
    (tmp_path / ".locks").mkdir()
    require_report_folder(tmp_path)
    (tmp_path / "thesis.txt").write_text("chapter 2")
    (tmp_path / "results.json").write_text("{}")
    require_report_folder(tmp_path)  # a report, and what its owner has put beside it
    require_report_folder(tmp_path / "new")
    with pytest.raises(RunError, match="it is no folder"):
        require_report_folder(tmp_path / "thesis.txt")

    def refuses(_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuses)
    (tmp_path / "results.json").unlink()
    with pytest.raises(RunError, match="allow it"):
        require_report_folder(tmp_path)


def test_commas_in_the_names_of_folders_are_their_own(tmp_path, monkeypatch):
    """As g2l sweep makes them."""
    monkeypatch.chdir(tmp_path)
    for seed in range(2):
        (tmp_path / f"sweep/loss=mse,seed={seed}").mkdir(parents=True)
    assert split_names("a, b,") == ["a", "b"]
    assert split_names("teacher,sweep/loss=mse,seed=0,c") == ["teacher", "sweep/loss=mse,seed=0", "c"]
    assert split_names("teacher,G2L=sweep/loss=mse,seed=*") == ["teacher", "G2L=sweep/loss=mse,seed=*"]
    assert split_names("teacher,sweep/loss=mse,seed=7") == ["teacher", "sweep/loss=mse", "seed=7"]


def test_the_next_command_names_one_encoder_by_its_own_name():
    assert _last_single(["teacher", "run", "G2L=other", "seeds-*"]) == "run"
    assert _last_single(["G2L=run"]) == "ENCODER"

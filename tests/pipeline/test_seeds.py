"""Runs that differ in their seed alone are one encoder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from g2l_core.benchmark.evaluate import BenchSpec, evaluate_task
from g2l_core.benchmark.spec import KnnOptions, TaskSpec
from g2l_core.errors import EncoderError, RunError, UsageError
from pipeline.bench import find_encoders
from pipeline.seeds import grouped_by_seed
from tests.planted import make_store, patch_labels, write_labels

GOLDEN = Path(__file__).parents[1] / "golden/run"


def run_with(folder, seed, **train):
    """A run folder whose record says so."""
    shutil.copytree(GOLDEN, folder)
    record = json.loads((folder / "run.json").read_text())
    record["settings"]["train"] |= {"seed": seed, **train}
    (folder / "run.json").write_text(json.dumps(record))
    return str(folder)


def test_a_pattern_puts_seeds_together_and_settings_apart(tmp_path):
    same = [run_with(tmp_path / f"run-{seed}", seed) for seed in range(3)]
    other = run_with(tmp_path / "run-longer", 0, steps=9)
    (tmp_path / "run-none").mkdir()
    found = grouped_by_seed(["teacher", f"{tmp_path}/run-*"])
    assert found == [("teacher", ["teacher"]), ("run-0 (3 seeds)", same), (other, [other])]


def test_a_pattern_of_nothing_and_a_seed_twice_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no folder of g2l distill"):
        grouped_by_seed([f"{tmp_path}/run-*"])
    first, second = run_with(tmp_path / "run-0", 0), run_with(tmp_path / "run-1", 0)
    with pytest.raises(UsageError, match=f"{first}, {second}"):
        grouped_by_seed([f"{tmp_path}/run-*"])
    (tmp_path / "run-1/run.json").write_text("{}")
    with pytest.raises(RunError, match="restore it"):
        grouped_by_seed([f"{tmp_path}/run-*"])


def test_an_encoder_of_seeds_is_their_mean_with_a_wider_interval(tmp_path):
    strengths = {"teacher": (0.8, 0.0), "a": (0.30, 0.2), "b": (0.45, 0.2), "c": (0.6, 0.2)}
    store = make_store(tmp_path / "s.zarr", strengths)
    write_labels(tmp_path / "labels.csv", patch_labels())
    spec = TaskSpec(
        name="t", labels="labels.csv", label="kind", metrics=("cka", "knn"), knn=KnnOptions(k=(5,)), folds=2
    )
    one_by_one = evaluate_task([store], spec, BenchSpec(encoders=tuple(strengths)), tmp_path)
    bench = BenchSpec(encoders=("teacher", "student"), seeds={"student": ("a", "b", "c")})
    together = evaluate_task([store], spec, bench, tmp_path)
    assert not one_by_one.failures
    assert not together.failures
    for metric in ("cka_debiased", "knn_accuracy"):
        single = {r.encoder: r.estimate for r in one_by_one.results if r.metric == metric}
        (mean,) = (r.estimate for r in together.results if (r.metric, r.encoder) == (metric, "student"))
        assert mean.value == pytest.approx(np.mean([single[key].value for key in "abc"]))
        assert "and 3 seeds" in mean.method
    (gap,) = (c for c in together.comparisons if (c.metric, c.encoder) == ("knn_accuracy", "student"))
    assert gap.reference == "teacher"
    assert "3 seeds" in gap.difference.method
    assert {p.encoder for p in together.pictures.confusions} == {"teacher", "student"}


def test_a_seed_that_cannot_be_read_is_not_counted(tmp_path, monkeypatch):
    runs = [run_with(tmp_path / f"run-{seed}", seed) for seed in range(3)]

    def find(text, known):
        if text == runs[1]:
            raise EncoderError("no finished student")
        return Path(text).name

    monkeypatch.setattr("pipeline.bench.find_key", find)
    asked = find_encoders(["teacher", f"G2L={tmp_path}/run-*"], {})
    assert asked.keys == ("teacher", "run-0 (2 seeds)")
    assert asked.seeds == {"run-0 (2 seeds)": ("run-0", "run-2")}
    assert asked.aliases == {"run-0 (2 seeds)": "G2L"}
    assert asked.damaged == {runs[1]: "no finished student"}

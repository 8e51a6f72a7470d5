"""Baselines end to end: the distillation's patches and start, resuming, folders that are encoders, PCA, refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.decomposition import PCA
from typer.testing import CliRunner

from g2l_core.encoders.loading import load_encoder
from g2l_core.encoders.resolve import find_stored, resolve_encoder
from g2l_core.errors import G2LError, RunError, UnknownNameError, UsageError
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.views import ViewSpec
from g2l_core.store.features import FeatureStore
from pipeline.baseline import labeled_rows, prepare, run_baseline
from pipeline.bench import run_bench
from pipeline.cache_teacher import run_extraction
from pipeline.cli.main import app
from pipeline.distill import DistillHow, run_distill
from pipeline.extract import ExtractionSettings
from pipeline.pca import run_pca
from pipeline.settings import BaselineSettings
from pipeline.split import split_store
from tests.distillation.test_training import rows
from tests.pipeline.test_distill import KEY, settings, student


@pytest.fixture(scope="module")
def store(cached_store, tmp_path_factory):
    return Path(shutil.copytree(cached_store, tmp_path_factory.mktemp("baselines") / "store.zarr"))


@pytest.fixture(scope="module")
def distilled(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "student"
    run_distill(store, KEY, student(), out, settings(steps=6, validate_every=3), how=DistillHow(workers=1))
    return out


def make(distilled, out, resume=False, **asked):
    machine = DistillHow(workers=1, resume=resume)
    return run_baseline(prepare(distilled, BaselineSettings(**asked), machine), out)


@pytest.fixture(scope="module")
def simclr(distilled, tmp_path_factory):
    out = tmp_path_factory.mktemp("simclr") / "simclr"
    return out, make(distilled, out, kind="simclr")


def weights(folder):
    return load_file(folder / "student" / "model.safetensors")


def test_simclr_has_the_distillation_s_patches_steps_and_start(distilled, simclr):
    out, summary = simclr
    like, record = (json.loads((folder / "run.json").read_text()) for folder in (distilled, out))
    for name in ("rows", "student", "teacher", "store", "held_out"):
        assert record[name] == like[name]
    assert record["replay"] == {**like["replay"], "encoder": None, "at_once": 2}
    assert record["baseline"]["kind"] == "simclr"
    assert len(rows(out / "log.csv")) == len(rows(distilled / "log.csv")) == summary.steps == 6
    assert summary.before["cka_debiased"] == like["result"]["before"]["cka_debiased"]
    assert "r2_projected" not in summary.after
    card = (out / "student" / "README.md").read_text()
    assert "A baseline made by g2l baseline" in card
    assert "from which it did not learn" in card
    assert "distilled by G2L" not in card
    page = (out / "curves.html").read_text()
    assert "g2l baseline" in page
    assert "NT-Xent" in page


def test_simclr_pulls_views_of_a_patch_together(simclr):
    losses = [float(row["loss"]) for row in rows(simclr[0] / "log.csv")]
    assert losses[-1] < losses[0] < np.log(15) * 1.5


def test_the_folder_is_an_encoder(simclr, store, cohort, tmp_path):
    out, _ = simclr
    own = tmp_path / "store.zarr"
    shutil.copytree(store, own)
    spec = resolve_encoder(str(out))
    assert load_encoder(spec).digest == json.loads((out / "run.json").read_text())["result"]["exported"]["digest"]
    run_extraction([cohort], own, [spec], GridSpec(), ViewSpec(), ExtractionSettings(batch_size=16, views=0))
    tasks = tmp_path / "tasks.toml"
    tasks.write_text('[tasks.near]\nmetrics = ["cka"]\n')
    report = run_bench(tasks, [own], [KEY, str(out)], tmp_path / "report")
    assert {result.metric for result in report.results} >= {"cka_debiased"}


KILLED = """
import sys
from pathlib import Path
import g2l_core.distillation.training as training
from tests.pipeline.test_baseline import make
step = training.train_step
def slow(state, *rest):
    import time
    time.sleep(0.4)
    return step(state, *rest)
training.train_step = slow
make(Path(sys.argv[1]), Path(sys.argv[2]), kind="simclr")
"""


def test_kill_and_resume_give_the_same_weights(distilled, simclr, tmp_path):
    out = tmp_path / "simclr"
    killed = subprocess.Popen([sys.executable, "-c", KILLED, str(distilled), str(out)])
    while not list(out.glob("checkpoints/step-*.pt")) and killed.poll() is None:
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (out / "student").exists()
    with pytest.raises(RunError, match="was begun with other settings"):
        make(distilled, out, kind="simclr", temperature=0.5)
    make(distilled, out, kind="simclr")
    whole, resumed = weights(simclr[0]), weights(out)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert [row["loss"] for row in rows(out / "log.csv")] == [row["loss"] for row in rows(simclr[0] / "log.csv")]


def test_the_start_is_the_start(distilled, tmp_path):
    summary = make(distilled, tmp_path / "start", kind="start")
    assert summary.steps == 0
    assert summary.before == summary.after
    state, begun = weights(tmp_path / "start"), load_encoder(student()).module.network.state_dict()
    assert all(torch.equal(state[name], begun[name]) for name in state)
    assert rows(tmp_path / "start" / "log.csv") == []
    assert json.loads((tmp_path / "start" / "run.json").read_text())["rows"]["train"] == {}
    assert "Training loss" not in (tmp_path / "start" / "curves.html").read_text()
    make(distilled, tmp_path / "start", kind="start", resume=True)


def test_two_folders_with_one_start_are_told_apart(distilled, store, cohort, tmp_path):
    own = Path(shutil.copytree(store, tmp_path / "store.zarr"))
    for name in ("one", "two"):
        make(distilled, tmp_path / name, kind="start")
    specs = [resolve_encoder(str(tmp_path / name)) for name in ("one", "two")]
    run_extraction([cohort], own, specs, GridSpec(), ViewSpec(), ExtractionSettings(batch_size=16, views=0))
    stored = FeatureStore.open(own).encoders
    assert [stored[find_stored(str(tmp_path / name), stored)].name for name in ("one", "two")] == ["one", "two"]


# ---- labels -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labeled(distilled, store, tmp_path_factory):
    """The distillation's store where every slide has a class; those of held-out ones can be seen by nobody."""
    opened = FeatureStore.open(store, writable=True)
    for i, slide in enumerate(opened.slides()):
        slide.set_labels({**slide.labels, "tissue": "ab"[i % 2]})
    return distilled


def test_supervised_learns_its_labels(labeled, tmp_path):
    summary = make(labeled, tmp_path / "supervised", kind="supervised", label="tissue", lr=3e-3)
    record = json.loads((tmp_path / "supervised" / "run.json").read_text())
    assert record["baseline"]["classes"] == ["a", "b"]
    assert record["settings"]["train"]["optim"]["lr"] == 3e-3
    losses = [float(row["loss"]) for row in rows(tmp_path / "supervised" / "log.csv")]
    assert losses[0] == pytest.approx(np.log(2), rel=0.2)
    assert summary.steps == 6
    state, begun = weights(tmp_path / "supervised"), load_encoder(student()).module.network.state_dict()
    assert not torch.equal(state["conv_stem.weight"], begun["conv_stem.weight"])


def test_each_training_row_has_the_class_of_its_label(labeled, store):
    found = prepare(labeled, BaselineSettings(kind="supervised", label="tissue"), DistillHow())
    rows_of, given, classes = labeled_rows(found)
    opened = FeatureStore.open(store)
    assert classes == ["a", "b"]
    assert rows_of.keys() == found.split.train.keys()
    for slide_id, numbers in given.items():
        expected = "ab".index(opened.slide(slide_id).labels["tissue"])
        assert set(numbers[rows_of[slide_id], 0].tolist()) == {expected}


def test_labels_of_held_out_patches_are_never_touched(labeled, store, tmp_path):
    """The same weights, bit for bit, whatever the held-out patches are called."""
    own = tmp_path / "store.zarr"
    shutil.copytree(store, own)
    held = split_store(FeatureStore.open(own), (), "0.34", 0).held_out
    for slide in FeatureStore.open(own, writable=True).slides():
        if slide.slide_id in held:
            slide.set_labels({**slide.labels, "tissue": "another class"})
    asked = BaselineSettings(kind="supervised", label="tissue")
    for name, path in (("one", store), ("two", own)):
        run_baseline(prepare(labeled, asked, DistillHow(workers=1), path), tmp_path / name)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)


# ---- PCA --------------------------------------------------------------------------------------------------------


def test_pca_is_scikit_learn_s_over_what_the_distillation_learned_from(distilled, store, tmp_path):
    own = tmp_path / "store.zarr"
    shutil.copytree(store, own)
    found = prepare(distilled, BaselineSettings(kind="pca", width=5), DistillHow(), own)
    key, share = run_pca(found)
    opened = FeatureStore.open(own)
    trained = [opened.slide(i) for i in sorted(found.split.train)]
    views = [slide.features(KEY, view=view) for slide in trained for view in (1, 2)]
    reference = PCA(5, svd_solver="full").fit(np.concatenate(views).astype(np.float64))
    assert share == pytest.approx(reference.explained_variance_ratio_.sum())
    for slide in opened.slides():
        expected, written = reference.transform(slide.features(KEY).astype(np.float64)), slide.features(key)
        signs = np.sign((expected * written).sum(axis=0))
        np.testing.assert_allclose(written, expected * signs, atol=2e-3 * np.abs(expected).max())
    assert opened.encoders[key].dim == 5
    again = prepare(distilled, BaselineSettings(kind="pca", width=5), DistillHow(), own)
    before = (own / "zarr.json").read_bytes()
    assert run_pca(again) == (key, share)
    assert (own / "zarr.json").read_bytes() == before
    result = CliRunner().invoke(app, ["store", "verify", str(own)])
    assert result.exit_code == 0, result.output


# ---- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"kind": "moco"}, "moco"),
        ({"kind": "supervised"}, "expected the column of the labels"),
        ({"kind": "simclr", "label": "tissue"}, "--label is for --kind supervised"),
        ({"kind": "start", "lr": 1e-3}, "--lr is for --kind simclr or supervised"),
        ({"kind": "simclr", "temperature": -1.0}, "above 0"),
        ({"kind": "simclr", "width": 5}, "--width is for --kind pca"),
    ],
)
def test_settings_that_do_not_fit_are_refused(asked, words):
    with pytest.raises((UsageError, UnknownNameError), match=words):
        BaselineSettings(**asked)


def test_what_is_no_longer_as_it_was_is_refused(distilled, simclr, store, tmp_path):
    with pytest.raises(RunError, match="is a baseline itself"):
        make(simclr[0], tmp_path / "a", kind="start")
    with pytest.raises(UsageError, match="got 0. Columns of slides and patches are .*medical_center"):
        make(distilled, tmp_path / "b", kind="supervised", label="nothing")
    with pytest.raises(UsageError, match="are all of it"):
        run_pca(prepare(distilled, BaselineSettings(kind="pca"), DistillHow(), store))
    own = tmp_path / "store.zarr"
    shutil.copytree(store, own)
    grown = FeatureStore.open(own, writable=True)
    grown.remove_slide(sorted(split_store(grown, (), "0.34", 0).train)[0])
    with pytest.raises(G2LError, match="other patches|held out|same ones"):
        prepare(distilled, BaselineSettings(), DistillHow(), own)
    assert not (tmp_path / "b").exists()


def test_the_command_line(distilled, tmp_path):
    def run(*arguments):
        return CliRunner().invoke(app, ["baseline", str(distilled), *arguments])

    refused = [run("--kind", "start"), run("--kind", "pca", "--out", str(tmp_path / "x"))]
    assert all(isinstance(done.exception, UsageError) for done in refused)
    assert "expected the baseline's run folder" in str(refused[0].exception)
    assert "leave --out out" in str(refused[1].exception)
    done = run("--kind", "start", "--out", str(tmp_path / "start"), "--workers", "1")
    assert done.exit_code == 0, done.output
    assert "0 steps" in done.output
    written = run("--kind", "pca", "--width", "3")
    assert written.exit_code == 0, written.output
    assert f"{KEY}-pca3-" in written.output

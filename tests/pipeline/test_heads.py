"""Heads: what is fitted is what scikit-learn and stage three have, what travels is whole, and slides get answers."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from g2l_core.encoders.resolve import resolve_encoder
from g2l_core.errors import RunError, UsageError
from g2l_core.extraction import batching
from g2l_core.heads.calibration import fit_temperature, log_loss, tempered
from g2l_core.heads.head import read_head
from g2l_core.heads.heatmap import colors_of, heatmap_geojson
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.views import ViewSpec
from g2l_core.store.features import FeatureStore
from g2l_core.synthetic.cohort import CohortSpec, draw_cohort, label_patches
from pipeline.budget import Budget, budget_of
from pipeline.cache_teacher import run_extraction
from pipeline.fit_head import run_fit_head
from pipeline.predict import run_predict
from pipeline.settings import ExtractionSettings

ENCODER = "timm:mobilenetv3_small_050@64"
SETTINGS = ExtractionSettings(batch_size=16, views=0, pictures=False)

TASKS = """
[tasks.tissue]
labels = "labels.csv"
label = "tissue"
metrics = ["probe"]
probe_c = [0.1]
folds = 2

[tasks.slides]
labels = "labels.csv"
label = "grade"
metrics = ["slide_probe", "abmil"]
probe_c = [0.1]
folds = 2
abmil_folds = 2
abmil_most_epochs = 3

[tasks.number]
labels = "labels.csv"
label = "amount"
metrics = ["regression"]
folds = 2
regression_folds = 2
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Eight small drawn slides with their features, labels of patches and of slides, and a task file."""
    folder = tmp_path_factory.mktemp("study")
    manifest = draw_cohort(folder / "cohort", CohortSpec(patients=8, size_um=(640.0, 640.0)))
    encoder = resolve_encoder(ENCODER, weights="random:0")
    run_extraction([manifest], folder / "s.zarr", [encoder], GridSpec(), ViewSpec(), SETTINGS)
    with (folder / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["slide_id", "x", "y", "tissue", "grade", "amount"])
        for number, slide in enumerate(FeatureStore.open(folder / "s.zarr").slides()):
            truth = folder / f"cohort/truth/{slide.slide_id}.classes.png"
            side = slide.facts.patch_px_level0
            names = label_patches(truth, slide.coords, side, slide.facts.level0_size)
            for (x, y), name in zip(slide.coords.tolist(), names, strict=True):
                table.writerow([slide.slide_id, x, y, name, "high" if number % 2 else "low", float(x)])
    (folder / "tasks.toml").write_text(TASKS)
    return folder


def fit(study, out, task, **options):
    return run_fit_head(study / "tasks.toml", task, [study / "s.zarr"], ENCODER, out, **options)


@pytest.fixture(scope="module")
def tissue_head(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("head")
    fit(study, folder, "tissue")
    return folder


@given(st.integers(2, 5), st.floats(0.2, 5.0), st.integers(0, 1000))
def test_a_temperature_keeps_the_order_and_undoes_itself(classes, temperature, seed):
    logs = np.log(np.random.default_rng(seed).dirichlet(np.ones(classes), 6))
    found = tempered(logs, temperature)
    assert (found.argmax(axis=1) == logs.argmax(axis=1)).all()
    np.testing.assert_allclose(tempered(np.log(found), 1 / temperature), np.exp(logs), atol=1e-9)


def test_the_temperature_that_was_planted_is_found():
    rng = np.random.default_rng(0)
    honest = rng.dirichlet(np.ones(3), 20_000)
    codes = (honest.cumsum(axis=1) > rng.random((len(honest), 1))).argmax(axis=1)
    sure = np.log(tempered(np.log(honest), 0.4))
    assert fit_temperature(sure, codes) == pytest.approx(1 / 0.4, rel=0.03)
    assert log_loss(np.log(tempered(sure, 2.5)), codes) < log_loss(sure, codes)


def test_a_patch_head_is_scikit_learn_s(study, tissue_head):
    head = read_head(tissue_head)
    rows = {}
    with (study / "labels.csv").open() as file:
        for row in csv.DictReader(file):
            rows[row["slide_id"], int(row["x"]), int(row["y"])] = row["tissue"]
    features, labels = [], []
    store = FeatureStore.open(study / "s.zarr")
    (key,) = store.encoders
    for slide in store.slides():
        for place, feature in zip(slide.coords.tolist(), slide.features(key), strict=True):
            if rows[slide.slide_id, *place]:
                features.append(feature.astype(np.float64))
                labels.append(rows[slide.slide_id, *place])
    scaled = StandardScaler().fit(features)
    peer = LogisticRegression(C=0.1, tol=1e-8, max_iter=5000).fit(scaled.transform(features), labels)
    assert head.facts.classes == tuple(peer.classes_)
    one = next(store.slides())
    own = one.features(key).astype(np.float64)
    expected = tempered(peer.predict_log_proba(scaled.transform(own)), head.facts.temperature)
    found = head.apply(one.features(key))
    np.testing.assert_allclose(found.patches, expected, atol=2e-3)
    np.testing.assert_allclose(found.values, expected.mean(axis=0), atol=2e-3)
    assert {figure.metric for figure in head.facts.figures} >= {"probe_accuracy", "probe_auc"}
    assert head.facts.calibration["log_loss_after"] <= head.facts.calibration["log_loss_before"]
    assert head.facts.trained_on["count"] == 8


@pytest.mark.parametrize(("task", "kind"), [("slides", "slide_probe"), ("slides", "abmil"), ("number", "regression")])
def test_every_kind_travels_with_the_same_bits(study, tmp_path, task, kind):
    head = fit(study, tmp_path, task, kind=kind)
    again = read_head(tmp_path)
    assert again.facts == head.facts
    store = FeatureStore.open(study / "s.zarr")
    (key,) = store.encoders
    features = next(store.slides()).features(key)
    found, copied = head.apply(features), again.apply(features)
    np.testing.assert_array_equal(found.values, copied.values)
    assert len(found.patches) == len(features)
    if kind == "abmil":
        assert found.attention.sum() == pytest.approx(1)
    if kind != "regression":
        assert found.values.sum() == pytest.approx(1)


@pytest.mark.parametrize("file", ["head.json", "head.safetensors"])
def test_a_changed_head_is_refused(tissue_head, tmp_path, file):
    shutil.copytree(tissue_head, tmp_path / "head")
    path = tmp_path / "head" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UsageError, match="head"):
        read_head(tmp_path / "head")


def test_features_that_do_not_fit_are_refused(tissue_head):
    head = read_head(tissue_head)
    with pytest.raises(UsageError, match=f"takes features of {head.dim} values; these have 3"):
        head.apply(np.zeros((2, 3)))
    with pytest.raises(UsageError, match="NaN"):
        head.apply(np.full((2, head.dim), np.nan))
    with pytest.raises(UsageError, match="no patch"):
        head.apply(np.zeros((0, head.dim)))


def test_what_no_head_can_be_fitted_on_is_refused(study, tmp_path):
    with pytest.raises(UsageError, match="tissue, slides, number"):
        fit(study, tmp_path, "")
    with pytest.raises(UsageError, match="no task 'nothing'"):
        fit(study, tmp_path, "nothing")
    with pytest.raises(UsageError, match="one of probe"):
        fit(study, tmp_path, "tissue", kind="forest")
    assert not list(tmp_path.iterdir())


def predict(study, head, out, **options):
    return run_predict([study / "cohort/slides"], head, out, SETTINGS, **options)


def everything(out):
    """All that users read, by name."""
    files = [
        path for path in sorted(out.rglob("*")) if path.is_file() and not {"features.zarr", ".locks"} & set(path.parts)
    ]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def test_every_slide_has_a_row_a_picture_and_tiles_for_qupath(study, tissue_head, tmp_path):
    found = predict(study, tissue_head, tmp_path)
    assert not found.failed
    with (tmp_path / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    store = FeatureStore.open(study / "s.zarr")
    (key,) = store.encoders
    for row in rows:
        slide = store.slide(row["slide_id"])
        chances = read_head(tissue_head).apply(slide.features(key)[slide.patch_status == 0]).values
        names = read_head(tissue_head).facts.classes
        assert [float(row[f"p({name})"]) for name in names] == pytest.approx(chances.tolist(), abs=1e-5)
        assert row["trained_on"] == "yes"
        document = json.loads((tmp_path / f"heatmaps/{row['slide_id']}.geojson").read_text())
        assert document["type"] == "FeatureCollection"  # PathObjectCollectionTypeAdapter.read looks for `features`
        assert len(document["features"]) == int(row["patches"])
        for feature in document["features"]:
            require_tile(feature, names)
        with Image.open(tmp_path / f"heatmaps/{row['slide_id']}.png") as image:
            assert max(image.size) <= 1700
    assert any("no new evidence" in note for note in found.notes)


def require_tile(feature, names):
    """What QuPath's reader of objects takes, and makes a tile of.

    qupath.lib.io.QuPathTypeAdapters, PathObjectTypeAdapter.parseObject: `id`, if there is one, is a UUID, or the name
    of a class of version 0.2; `geometry` is needed; of `properties`, `name` and `objectType` are texts, and the type
    one that it knows, else it makes an annotation; `measurements` is an array or an object.
    MeasurementListTypeAdapter.read: of an object (since version 0.4) every value is cast to Double, so that anything
    but a number ends the import; NaN and infinity are no JSON. ROITypeAdapters: a polygon's rings are closed.
    """
    assert feature["type"] == "Feature"
    if "id" in feature:
        UUID(feature["id"])
    (ring,) = feature["geometry"]["coordinates"]
    assert feature["geometry"]["type"] == "Polygon"
    assert ring[0] == ring[-1]
    assert len(ring) == 5
    assert all(len(point) == 2 and all(isinstance(at, int) for at in point) for point in ring)
    properties = feature["properties"]
    assert isinstance(properties["name"], str)
    assert properties["objectType"] == "tile"
    assert set(properties) <= {"objectType", "name", "color", "classification", "isLocked", "measurements", "metadata"}
    assert isinstance(properties["measurements"], dict)
    assert set(properties["measurements"]) == set(names)
    assert all(type(value) is float and np.isfinite(value) for value in properties["measurements"].values())


def table(out):
    with (out / "predictions.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_budget_encodes_no_more_and_says_what_it_rests_on(study, tissue_head, tmp_path, monkeypatch):
    given = Budget(share=0.4, tolerance=0.01, seed=3)
    predict(study, tissue_head, tmp_path / "whole", budget=given)
    store, head = FeatureStore.open(study / "s.zarr"), read_head(tissue_head)
    (key,) = store.encoders
    for row in table(tmp_path / "whole"):
        slide = store.slide(row["slide_id"])
        assert int(row["patches"]) == len(slide)
        assert 1 <= int(row["encoded"]) <= 0.4 * len(slide)
        document = json.loads((tmp_path / f"whole/heatmaps/{row['slide_id']}.geojson").read_text())
        places = [tuple(tile["geometry"]["coordinates"][0][0]) for tile in document["features"]]
        rows = [slide.coords.tolist().index(list(place)) for place in places]
        assert len(set(rows)) == len(rows) <= int(row["encoded"])
        alone = head.apply(slide.features(key)[rows]).patches
        shown = [[tile["properties"]["measurements"][n] for n in head.facts.classes] for tile in document["features"]]
        np.testing.assert_allclose(shown, alone, atol=1e-3)
        assert sum(float(row[f"p({name})"]) for name in head.facts.classes) == pytest.approx(1, abs=1e-5)
        assert all(float(row[f"margin({name})"]) >= 0 for name in head.facts.classes)
    batches, encode = [0], batching.encode

    def interrupted(*arguments):
        batches[0] += 1
        if batches[0] == 4:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(batching, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict(study, tissue_head, tmp_path / "again", budget=given, pictures=False)
    predict(study, tissue_head, tmp_path / "again", budget=given, pictures=False)
    assert table(tmp_path / "again") == table(tmp_path / "whole")
    batches[0] = 100
    predict(study, tissue_head, tmp_path / "again", budget=given, pictures=False)
    assert batches[0] == 100  # all is kept


def test_a_budget_of_everything_is_the_whole_answer_and_leaves_it_to_the_next_run(study, tissue_head, tmp_path):
    some = predict(study, tissue_head, tmp_path / "out", pictures=False, budget=Budget(share=1.0))
    again = predict(study, tissue_head, tmp_path / "out", pictures=False)
    for mine, theirs in zip(some.rows, again.rows, strict=True):
        if mine["settled"] == "yes" and mine["encoded"] == mine["patches"]:
            assert float(mine["p(tumor)"]) == pytest.approx(float(theirs["p(tumor)"]), abs=1e-5)
        else:
            assert abs(float(mine["p(tumor)"]) - float(theirs["p(tumor)"])) <= float(mine["margin(tumor)"])
    stored = predict(study, tissue_head, tmp_path / "out", pictures=False, budget=Budget(share=0.4))
    assert not stored.failed


def test_budgets_that_mean_nothing_are_refused(study, tissue_head, tmp_path):
    for share in (0.0, -1.0, 1.5):
        with pytest.raises(UsageError, match="above 0 and at most 1"):
            Budget(share=share)
    with pytest.raises(UsageError, match="--tolerance"):
        Budget(share=0.1, tolerance=0.0)
    with pytest.raises(UsageError, match="--seed is for --budget"):
        budget_of(None, None, 3)
    assert budget_of(None, None, None) is None
    with pytest.raises(UsageError, match="leave --local-workers out"):
        run_predict([study], tissue_head, tmp_path, replace(SETTINGS, local_workers=2), budget=Budget(share=0.1))


def test_a_damaged_slide_is_named_and_the_others_are_answered(study, tissue_head, tmp_path):
    shutil.copytree(study / "cohort/slides", tmp_path / "slides")
    victim = sorted((tmp_path / "slides").iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:3000])
    found = run_predict([tmp_path / "slides"], tissue_head, tmp_path / "out", SETTINGS, pictures=False)
    assert list(found.failed) == [victim.stem]
    assert len(found.rows) == 7
    assert not (tmp_path / "out/heatmaps").exists()


def test_another_encoder_is_refused(study, tissue_head, tmp_path):
    shutil.copytree(tissue_head, tmp_path / "head")
    from g2l_core.heads.head import Head, write_head

    head = read_head(tissue_head)
    facts = replace(head.facts, encoder={**head.facts.encoder, "weights": "random:1"})
    write_head(Head(facts=facts, tensors=head.tensors), tmp_path / "head")
    with pytest.raises(UsageError, match="digest"):
        predict(study, tmp_path / "head", tmp_path / "out")


def test_killed_again_and_again_it_gives_the_same_files(study, tissue_head, tmp_path):
    base = [sys.executable, "-m", "pipeline.cli", "predict", str(study / "cohort/slides"), "--head", str(tissue_head)]
    base += ["--batch-size", "16", "--out"]
    whole, out = tmp_path / "whole", tmp_path / "killed"
    # In a process of its own as well: another number of BLAS threads adds in another order.
    subprocess.run([*base, str(whole)], check=True, capture_output=True)
    command = [*base, str(out)]
    kills = int(os.environ.get("G2L_KILLS", "2"))
    for kill in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(2.5 + 1.5 * kill)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, capture_output=True)
    assert everything(out) == everything(whole)


def test_colors_and_tiles_by_hand():
    assert colors_of(np.array([0.25])).tolist() == [[140, 148, 206]]
    text = heatmap_geojson(np.array([[10, 20]], np.int32), 5, [{"tumor": 0.5}], "t")
    assert json.loads(text)["features"][0]["geometry"]["coordinates"] == [
        [[10, 20], [15, 20], [15, 25], [10, 25], [10, 20]]
    ]


def test_the_command_line_says_what_comes_next(study, tmp_path):
    command = [sys.executable, "-m", "pipeline.cli", "fit-head", str(study / "tasks.toml"), "--task", "tissue"]
    command += ["--store", str(study / "s.zarr"), "--encoder", ENCODER, "--out", str(tmp_path / "head")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "next: g2l predict" in done.stdout
    missing = subprocess.run(
        [*command[:3], "predict", str(Path("nowhere.svs")), "--head", str(tmp_path / "no"), "--out", "o"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert missing.returncode == 2
    assert "g2l fit-head makes one" in missing.stderr


def test_a_folder_of_something_else_is_neither_emptied_nor_written_to(study, tissue_head, tmp_path):
    """Least of all the run whose student the head takes along."""
    run = tmp_path / "run"
    (run / "student").mkdir(parents=True)
    (run / "student/model.safetensors").write_bytes(b"weights")
    with pytest.raises(RunError, match="holds student and no head"):
        fit(study, run, "tissue")
    assert (run / "student/model.safetensors").read_bytes() == b"weights"
    assert [path.name for path in run.iterdir()] == ["student"]
    (tissue_head / "notes.txt").write_text("what its owner has put beside it")
    fit(study, tissue_head, "tissue")
    assert (tissue_head / "notes.txt").is_file()

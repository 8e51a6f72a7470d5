"""From a published folder to a report: g2l datasets, cache-teacher, embed, bench with the shipped task file."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from g2l_core.datasets.table import DATASETS
from g2l_core.errors import UnknownNameError, UsageError
from g2l_core.store.features import FeatureStore
from pipeline.cli.main import app
from tests.datasets.draw import mask, rows, slide
from tests.datasets.test_breast import draw_idc
from tests.datasets.test_others import draw_nct

TEACHER, STUDENT = "timm:test_vit@64", "timm:test_vit2@64"
PATIENTS = tuple(str(10253 + i) for i in range(6))


def g2l(*arguments, code=0):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exit_code == 1 and done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.stdout


def features(store, manifest, *more):
    common = ["--weights", "random:0", "--device", "cpu", "--batch-size", "16"]
    g2l("cache-teacher", manifest, "--store", store, "--teacher", TEACHER, "--views", "0", *common, *more)
    g2l("embed", manifest, "--store", store, "--encoder", STUDENT, *common)
    return ",".join(FeatureStore.open(store).encoders)


def results(out):
    report = json.loads((out / "results.json").read_text())
    return report, {(r["task"], r["metric"]): r for r in report["results"]}


def test_a_folder_of_images_becomes_a_benchmark(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_idc(tmp_path / "IDC_regular_ps50_idx5", PATIENTS, each=5)
    told = g2l("datasets", "idc", "--root", "IDC_regular_ps50_idx5")
    assert "idc.csv: 60 images of 277,524 published in 6 groups, 6 patients" in told
    (line,) = [line for line in told.splitlines() if line.startswith("next: ")]
    assert line.endswith("--views 0 --patch-px 50 --crop-px 50")
    encoders = features("idc.zarr", "idc.csv", "--patch-px", "50", "--crop-px", "50")
    store = FeatureStore.open("idc.zarr")
    assert store.slide("10253").labels == {"dataset": "idc", "patient_id": "10253"}
    named = [row["patch_id"] for row in rows(tmp_path / "idc-labels.csv") if row["slide_id"] == "10253"]
    assert sorted(store.slide("10253").patch_ids) == sorted(named)
    g2l("bench", "breast", "--store", "idc.zarr", "--encoders", encoders, "--out", "report", "--draws", "100", code=1)
    report, found = results(tmp_path / "report")
    assert {task for task, _ in found} == {"idc"}
    assert {"knn_accuracy", "probe_auc", "cka_debiased"} <= {metric for _, metric in found}
    assert found["idc", "knn_accuracy"]["n"] == found["idc", "cka_debiased"]["n"] == 60
    assert found["idc", "knn_accuracy"]["settings"]["split"] == "5 folds by patients"
    failed = {failure["task"]: failure["reason"] for failure in report["failures"]}
    assert "there is no label file tcga-tils-labels.csv" in failed["tils"]
    assert "idc" not in failed
    assert report["provenance"]["tasks"].startswith("breast (sha256 ")


def test_masks_become_labels_of_the_very_patches_that_stage_one_lays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "wsirois" / "wsi-level-annotations"
    names = ("100B", "101B", "TC_S01_P000001_C0001_B101", "TC_S01_P000002_C0001_B101")
    for seed, name in enumerate(names):
        slide(base / "images" / f"{name}.tif", 1100, 800, seed)
        tissue = np.zeros((800, 1100))
        tissue[:, :512], tissue[:512, 512:] = 1, 2
        mask(base / "annotations-tissue-cells-masks" / f"{name}.tif", tissue)
    told = g2l("datasets", "tiger", "--root", ".", "--out", "tiger.csv")
    assert "tiger.csv: 4 slides of 195 published, 4 patients" in told
    assert "tiger-labels.csv: 40 labeled patches" in told
    encoders = features("tiger.zarr", "tiger.csv", "--tissue", "none", "--artifacts", "none")
    g2l("bench", "breast", "--store", "tiger.zarr", "--encoders", encoders, "--out", "out", "--draws", "100", code=1)
    _, found = results(tmp_path / "out")
    assert found["tiger", "robustness_ratio_k3"]["n"] == 40  # of the 48 patches of the grid, those that have a label
    laid = {tuple(corner) for corner in FeatureStore.open("tiger.zarr").slide("100B").coords.tolist()}
    labeled = {(int(r["x"]), int(r["y"])) for r in rows(tmp_path / "tiger-labels.csv") if r["slide_id"] == "100B"}
    assert labeled == laid - {(512, 512), (768, 512)}


def test_tiff_images_and_an_official_split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_nct(tmp_path, "ABC")
    assert "nct-crc.csv: 54 images" in g2l("datasets", "nct-crc", "--root", ".")
    encoders = features("nct.zarr", "nct-crc.csv", "--patch-px", "224")
    g2l("bench", "colorectal", "--store", "nct.zarr", "--encoders", encoders, "--out", "out", "--draws", "100", code=1)
    report, found = results(tmp_path / "out")
    assert found["nct-crc", "probe_auc"]["n"] == found["nct-crc", "cka_biased"]["n"] == 27  # the test images
    assert found["nct-crc", "knn_accuracy"]["settings"]["split"] == "fixed, split"
    assert (
        found["nct-crc", "knn_accuracy"]["estimate"]["method"]
        == "jackknife over 27 images, t with 52.0 degrees of freedom"
    )
    assert {failure["task"] for failure in report["failures"]} == {"mhist", "tcga-crc-msi"}


def test_the_list_and_the_descriptions():
    assert [line.split()[0] for line in g2l("datasets").splitlines()] == list(DATASETS)
    told = g2l("datasets", "Gleason_Arvaniti")
    for words in ("10.7910/DVN/OCYCMP", "CC0", "22,752 x image of 750 px", "gleason 5", "patho_1", "none in the names"):
        assert words in told


def test_wrong_calls_and_folders(tmp_path):
    with pytest.raises(UnknownNameError, match="unknown dataset 'brakhis'. Did you mean breakhis"):
        g2l("datasets", "brakhis")
    with pytest.raises(UsageError, match="--root and --out need the NAME"):
        g2l("datasets", "--root", tmp_path)
    with pytest.raises(UsageError, match="--out needs --root"):
        g2l("datasets", "idc", "--out", tmp_path / "m.csv")


@pytest.mark.parametrize("name", list(DATASETS))
def test_another_folder_is_refused_in_one_line(name, tmp_path):
    (tmp_path / "holiday").mkdir()
    (tmp_path / "beach.jpg").touch()
    for root, found in ((tmp_path, "found beach.jpg, holiday/"), (tmp_path / "none", "which is no folder")):
        with pytest.raises(Exception, match="^expected ") as refused:
            g2l("datasets", name, "--root", root, "--out", tmp_path / "m.csv")
        told = str(refused.value)
        assert found in told
        assert "\n" not in told
        assert DATASETS[name].url in told
        assert f"g2l datasets {name} says more" in told
        assert not (tmp_path / "m.csv").exists()

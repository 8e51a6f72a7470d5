"""A student of imported features: its teacher has a name and is never built; slides show the pixels again."""

import json
import shutil

import numpy as np
import openslide
import pytest
import torch
from safetensors.torch import load_file

from g2l_core.distillation.replay import ReplaySource, ReplaySpec
from g2l_core.extraction.import_features import ImportSettings, import_features
from g2l_core.store.export import SLIDES_FILE, export_features
from g2l_core.store.features import FeatureStore
from tests.extraction.test_import import plain
from tests.faults.small_run import KEY, STUDENT, STUDENT_WEIGHTS
from tests.pipeline.test_cli import g2l, refused

NOBODY = "nobodys-teacher"
"""No encoder that G2L could build."""
IMPORTED = f"{NOBODY}-imported"


def bring(layout, source, out, **settings):
    done = import_features(layout, source, out, NOBODY, None, ImportSettings(**settings))
    assert (done.failed, done.known) == ({}, False)
    return done


def distill(store, teacher, out, *more):
    return g2l(
        "distill", "--store", store, "--teacher", teacher, "--student", STUDENT, "--weights", STUDENT_WEIGHTS,
        "--out", out, "--steps", 6, "--validate-every", 3, "--batch-size", 8, "--pool-blocks", 2, "--workers", 1,
        "--hold-out", "0.34", *more,
    )  # fmt: skip


def tensors(run):
    return load_file(run / "student" / "model.safetensors") | load_file(run / "projector.safetensors")


@pytest.fixture(scope="module")
def exported(cached_store, tmp_path_factory):
    job = tmp_path_factory.mktemp("export") / "job"
    export_features(FeatureStore.open(cached_store), job, "trident-h5")
    return job


def test_out_in_and_distilled_is_the_student_of_the_store_itself(cohort, cached_store, exported, tmp_path):
    """Bit for bit: the same pixels in the same order with the same targets."""
    bring("trident-h5", exported, tmp_path / "i.zarr", slides=cohort.parent / "slides", manifest=exported / SLIDES_FILE)
    done = distill(tmp_path / "i.zarr", IMPORTED, tmp_path / "run", "--views", "canonical")
    assert done.returncode == 0, done.stderr
    assert "nobody has compared them with it: g2l store verify --recompute N does" in done.stderr
    assert distill(cached_store, KEY, tmp_path / "own", "--views", "canonical").returncode == 0
    ours, theirs = tensors(tmp_path / "own"), tensors(tmp_path / "run")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    untrained = json.loads((tmp_path / "run/run.json").read_text())["student"]["weights_digest"]
    assert json.loads((tmp_path / "run/run.json").read_text())["result"]["exported"]["weights_digest"] != untrained
    card = (tmp_path / "run/student/README.md").read_text()
    assert "imported (trident-h5), and nobody has compared them with it" in card


def means(image):
    """A teacher of arithmetic alone: mean and deviation of the channels in each quarter of a patch."""
    quarters = image.reshape(2, 128, 2, 128, 3).astype(np.float64) / 255
    return np.concatenate([quarters.mean((1, 3)).ravel(), quarters.std((1, 3)).ravel()])


@pytest.fixture(scope="module")
def foreign(cohort, tmp_path_factory):
    """Whole patches of 256 px at 20x, overlapping and off every grid of ours; read and encoded without G2L."""
    folder, rng = tmp_path_factory.mktemp("foreign"), np.random.default_rng(5)
    for path in sorted((cohort.parent / "slides").glob("*.tiff")):
        with openslide.OpenSlide(path) as slide:
            step = round(0.5 / float(slide.properties["openslide.mpp-x"]))
            side = 256 * step
            corners = np.unique(rng.integers(0, np.array(slide.dimensions) - side, (40, 2)), axis=0)
            regions = (slide.read_region((x, y), 0, (side, side)).convert("RGB") for x, y in corners.tolist())
            images = [np.asarray(region).reshape(256, step, 256, step, 3).mean((1, 3)) for region in regions]
        plain(folder, path.stem, np.stack([means(image) for image in images]).astype(np.float32), corners)
    return folder


def test_a_student_of_a_foreign_grid_is_benched(cohort, foreign, tmp_path):
    slides, store = cohort.parent / "slides", tmp_path / "i.zarr"
    bring("plain", foreign, store, slides=slides, manifest=cohort, mpp=0.5, patch_px=256)
    opened = FeatureStore.open(store)
    assert (opened.grid["patch_px"], opened.views["crop_px"]) == (256, 256)
    spec = ReplaySpec(encoders=(IMPORTED,), n_augmented=None)
    for slide_id in ("p01-1", "p02-1"):  # scanned at 40x and at 20x
        pixels, targets = ReplaySource(opened, {slide_id: None}, spec).read(0, np.arange(10), epoch=7)
        assert pixels.shape == (10, 256, 256, 3)
        np.testing.assert_allclose(np.stack([means(image) for image in pixels]), targets.astype(float), atol=4e-3)

    done = distill(
        store, IMPORTED, tmp_path / "run", "--views", "canonical", "--steps", 40, "--lr", 2e-3,
        "--validate-every", 40, "--loss", "mse", "--batch-size", 16,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "run/validation.csv").read_text().splitlines()
    names, first, last = (line.split(",") for line in (rows[0], rows[1], rows[-1]))
    explained = names.index("r2_projected")  # .04 and .30 of held-out patients' variance when this was written
    assert float(last[explained]) > float(first[explained]) + 0.15

    done = g2l("embed", slides, "--store", store, "--encoder", tmp_path / "run", "--workers", 1)
    assert done.returncode == 0, done.stderr
    (tmp_path / "tasks.toml").write_text('[tasks.t]\nmetrics = ["cka"]\nlabel = "medical_center"\n')
    done = g2l(
        "bench", tmp_path / "tasks.toml", "--store", store, "--encoders", f"{IMPORTED},{tmp_path / 'run'}",
        "--out", tmp_path / "report",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report/results.json").read_text())
    assert not report["failures"]
    assert {result["encoder"].partition("-")[0] for result in report["results"]} == {"run"}
    assert len(report["encoders"]) == 2


def test_what_cannot_be_shown_again_is_refused_until_it_can(cohort, cached_store, exported, tmp_path):
    """Two slides are elsewhere at first; importing again with them completes the store, and the run goes on."""
    near = tmp_path / "near"
    near.mkdir()
    for path in sorted((cohort.parent / "slides").glob("*.tiff"))[2:]:
        shutil.copy(path, near)
    store = tmp_path / "i.zarr"
    labels = exported / SLIDES_FILE
    bring("trident-h5", exported, store, slides=near, manifest=labels)
    refused(
        distill(store, IMPORTED, tmp_path / "run", "--views", "canonical"),
        "2 of 6 slides were imported without their files, such as p01-1", "--slides FOLDER", "--where",
    )  # fmt: skip
    assert not (tmp_path / "run/run.json").exists()
    near_alone = distill(store, IMPORTED, tmp_path / "part", "--views", "canonical", "--where", "slide_id=p0[3-6]*")
    assert near_alone.returncode == 0, near_alone.stderr
    bring("trident-h5", exported, store, slides=cohort.parent / "slides", manifest=labels)
    refused(distill(store, IMPORTED, tmp_path / "run"), "only the canonical view", "--views canonical")
    assert distill(store, IMPORTED, tmp_path / "run", "--views", "canonical").returncode == 0


def test_a_scale_that_came_later_is_kept(cohort, foreign, tmp_path):
    """Imported by the patches' side alone, then with the slides: their um/px and size are known from then on."""
    import h5py

    job, store = tmp_path / "job", tmp_path / "i.zarr"
    job.mkdir()
    with h5py.File(job / "p01-1.h5", "w") as file:
        file["features"] = np.load(foreign / "p01-1.npy")
        corners = np.loadtxt(foreign / "p01-1.csv", delimiter=",", skiprows=1, dtype=np.int64)
        coords = file.create_dataset("coords", data=corners)
        coords.attrs.update(patch_size=256, patch_size_level0=256)
    bring("trident-h5", job, store, mpp=0.5)
    assert FeatureStore.open(store).slide("p01-1").facts.mpp is None
    bring("trident-h5", job, store, mpp=0.5, slides=cohort.parent / "slides")
    facts = FeatureStore.open(store).slide("p01-1").facts
    assert (facts.mpp, facts.level0_size) == (0.5, openslide.OpenSlide(cohort.parent / "slides/p01-1.tiff").dimensions)


def test_views_are_a_number_or_the_canonical_one(cached_store, tmp_path):
    refused(distill(cached_store, KEY, tmp_path / "run", "--views", "all"), "--views all", "or canonical")
    refused(distill(cached_store, KEY, tmp_path / "run", "--views", "0"), "--views must be at least 1")
    (tmp_path / "recipe.toml").write_text('views = "canonical"\nloss = "kl_queue"\n')
    done = distill(cached_store, KEY, tmp_path / "run", "--config", tmp_path / "recipe.toml")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/run.json").read_text())["replay"]["n_augmented"] is None

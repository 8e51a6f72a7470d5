"""What G2L 0.1.0 wrote is read by this version: a store, a run folder and a report (see golden/README.md)."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from typer.testing import CliRunner

from g2l_core.encoders.loading import encode, load_encoder
from g2l_core.encoders.resolve import resolve_encoder
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.views import ViewSpec
from g2l_core.report.write import read_report
from g2l_core.results import RETAINED
from g2l_core.slides.fingerprint import fingerprint
from g2l_core.store.features import FeatureStore
from g2l_core.store.upgrade import upgrade
from g2l_core.store.verify import verify
from g2l_core.synthetic.cohort import CohortSpec, draw_cohort
from pipeline.bench import run_bench
from pipeline.cli.main import app

GOLDEN = Path(__file__).parent / "golden"
FIRST_FEATURES = [0.740975, -0.774601, -0.621364, 1.625274, 0.853321, -1.746059, -0.170760, 0.094356]
"""Of a fixed image, by the student, as 0.1.0 computed them."""

TEACHER, STUDENT = "golden-teacher-random0", "run-feaa1f2f"


@pytest.fixture
def store(tmp_path) -> Path:
    """A copy, so that nothing is ever written into the golden store."""
    return Path(shutil.copytree(GOLDEN / "store", tmp_path / "store"))


@pytest.mark.parametrize("name", ["store", "store-format2"])
def test_the_store_is_whole(name):
    opened = FeatureStore.open(GOLDEN / name)
    assert [(p.kind, p.slide_id, p.encoder) for p in verify(opened)] == [
        ("failed", "broken", ""),
        ("missing", "images", TEACHER),
    ]
    assert opened.slide_ids() == ["broken", "images", *(f"p0{i}-1" for i in range(1, 7))]
    assert list(opened.failed_slides()) == ["broken"]
    assert GridSpec.from_json(opened.grid) == GridSpec(max_patches=6)
    assert ViewSpec.from_json(opened.views) == ViewSpec()


@pytest.mark.parametrize("name", ["store", "store-format2"])
def test_its_slides_say_what_they_said(name):
    slide = FeatureStore.open(GOLDEN / name).slide("p01-1")
    assert slide.labels == {"patient_id": "p01", "medical_center": "north"}
    assert slide.coords.tolist() == [[0, 256], [768, 256], [0, 512], [1024, 512], [1024, 768], [768, 1280]]
    assert slide.pixel_hash[0].tolist() == [11891193378896726608, 17032702187368938992]
    assert FeatureStore.open(GOLDEN / name).slide("images").patch_ids is not None


@pytest.mark.parametrize(
    ("encoder", "dim", "first"),
    [(TEACHER, 16, [-0.04367065, -1.16601562, -0.72851562]), (STUDENT, 8, [0.76757812, -0.79492188, -0.60302734])],
)
@pytest.mark.parametrize("name", ["store", "store-format2"])
def test_its_features_have_the_same_bits(name, encoder, dim, first):
    features = FeatureStore.open(GOLDEN / name).slide("p01-1").features(encoder)
    assert features.shape == (6, dim)
    np.testing.assert_array_equal(features[0, :3], np.float16(first))


def test_the_command_line_lists_it(store):
    done = CliRunner().invoke(app, ["store", "ls", str(store)])
    assert done.exit_code == 0
    assert TEACHER in done.output
    assert "broken" in done.output


def test_the_run_folder_is_an_encoder():
    student = load_encoder(resolve_encoder(str(GOLDEN / "run")), device="cpu")
    pixels = (np.arange(2 * 224 * 224 * 3) % 251).astype(np.uint8).reshape(2, 224, 224, 3)
    assert student.key == STUDENT
    np.testing.assert_allclose(encode(student, pixels)[0], FIRST_FEATURES, atol=1e-5)


@pytest.mark.slow
def test_the_run_goes_on_where_it_stopped(store, tmp_path):
    """From the checkpoint of step 2, on slides drawn again, to the weights that 0.1.0 ended with at step 4."""
    draw_cohort(tmp_path / "cohort", CohortSpec(patients=6, size_um=(768.0, 768.0)))
    shutil.rmtree(store / "slides" / "images")  # they came into the store after the run
    assert len(list(upgrade(store))) == 7
    drawn = FeatureStore.open(cached_anew(tmp_path))
    for slide in FeatureStore.open(store, writable=True).slides():
        path = tmp_path / "cohort" / "slides" / f"{slide.slide_id}.tiff"
        slide.set_source(path, fingerprint(path))
        # Another processor rounds a few drawn pixels the other way.
        slide.put_table("pixel_hash", drawn.slide(slide.slide_id).pixel_hash)
    run = Path(shutil.copytree(GOLDEN / "run", tmp_path / "run"))
    arguments = f"distill --store {store} --teacher golden-teacher --student {student_spec(tmp_path)} --steps 4"
    done = CliRunner().invoke(
        app, [*arguments.split(), "--batch-size", "4", "--checkpoint-every", "2", "--out", str(run), "--resume"]
    )
    assert done.exit_code == 0, done.output
    np.testing.assert_allclose(losses(run), losses(GOLDEN / "run"), rtol=1e-3)
    # The moments of Adam divide small gradients by their own size, so that another processor's rounding shows in single
    # weights. Against the way from step 2 to step 4 it must stay small.
    checkpoint = torch.load(run / "checkpoints" / "step-00000002.pt", weights_only=True)
    within = "student.network."
    start = weights(
        {name.removeprefix(within): w for name, w in checkpoint["model"].items() if name.startswith(within)}
    )
    before, after = (weights(load_file(folder / "student" / "model.safetensors")) for folder in (GOLDEN / "run", run))
    assert start.shape == before.shape == after.shape
    assert np.linalg.norm(after - before) <= 0.25 * np.linalg.norm(before - start)


def cached_anew(folder: Path) -> Path:
    store = folder / "drawn.zarr"
    options = "--teacher timm:mobilenetv3_small_050@64 --weights random:0 --views 1 --max-patches 6 --no-pictures"
    done = CliRunner().invoke(
        app, ["cache-teacher", str(folder / "cohort" / "manifest.csv"), "--store", str(store), *options.split()]
    )
    assert done.exit_code == 0, done.output
    return store


def losses(run: Path) -> list[float]:
    with (run / "log.csv").open() as lines:
        return [float(row["loss"]) for row in csv.DictReader(lines)]


def weights(state: dict) -> np.ndarray:
    return np.concatenate([np.ravel(state[name]) for name in sorted(state)])


def student_spec(folder: Path) -> Path:
    path = folder / "golden-student.toml"
    path.write_text(
        'architecture = "vit_tiny_patch16_224"\n'
        "arguments = { img_size = 64, patch_size = 16, embed_dim = 8, depth = 1, num_heads = 2 }\n"
        'weights = "random:1"\ninput_px = 64\nmean = [0.7, 0.6, 0.7]\nstd = [0.2, 0.2, 0.2]\npooling = "cls"\n'
        'licence = "Apache-2.0"\n'
    )
    return path


def test_the_report_is_read():
    report = read_report(GOLDEN / "report")
    assert {result.encoder for result in report.results} == {TEACHER, STUDENT}


def test_the_same_tasks_give_the_same_values(store, tmp_path):
    """Values, not intervals: those may be drawn by a better method one day."""
    run_bench(GOLDEN / "tasks.toml", [store], ["golden-teacher", STUDENT], tmp_path / "report", draws=100)
    before, after = (values(folder / "results.json") for folder in (GOLDEN / "report", tmp_path / "report"))
    assert before.keys() == {key for key in after if not key[2].startswith(RETAINED)}
    np.testing.assert_allclose([after[key] for key in before], list(before.values()), atol=1e-5)


def values(path: Path) -> dict[tuple[str, str, str], float]:
    results = json.loads(path.read_text())["results"]
    return {(r["task"], r["encoder"], r["metric"]): r["estimate"]["value"] for r in results}

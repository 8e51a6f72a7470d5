"""A benchmark on a damaged store goes on with the other slides and says which it left out; other commands refuse."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from g2l_core.errors import StoreCorruptError
from g2l_core.report.write import read_report
from g2l_core.store.arrays import dask_features
from g2l_core.store.features import FeatureStore, Shard
from pipeline.bench import run_bench
from pipeline.cli.main import app
from pipeline.split import split_store
from tests.faults.small_run import flipped
from tests.planted import PATCHES, PATIENTS, make_store, patch_labels, write_labels

TASKS = """
[tasks.patches]
labels = "labels.csv"
label = "kind"
folds = 2
metrics = ["cka", "knn"]

[tasks.centers]
label = "medical_center"
folds = 2
metrics = ["knn"]
"""
SLIDE = "s3"


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    make_store(folder / "s.zarr", {"teacher": (1, 0), "student": (0.5, 0)})
    write_labels(folder / "labels.csv", patch_labels())
    (folder / "tasks.toml").write_text(TASKS)
    return folder


@pytest.fixture
def folder(planted, tmp_path):
    return Path(shutil.copytree(planted, tmp_path / "copy"))


def shard(slide: Path, encoder: str) -> Path:
    store = FeatureStore.open(slide.parents[1])
    return store.slide(slide.name).shard_path(encoder, Shard(0, PATCHES, 0))


def change(path: Path, damage) -> None:
    path.write_bytes(damage(path.read_bytes()))


DAMAGES = {
    "document torn": lambda slide: change(slide / "zarr.json", lambda whole: whole[:100]),
    "document flipped": lambda slide: change(slide / "zarr.json", lambda whole: whole.replace(b"patient", b"patiens")),
    "document gone": lambda slide: (slide / "zarr.json").unlink(),
    "document of another slide": lambda slide: shutil.copy(slide.parent / "s4/zarr.json", slide / "zarr.json"),
    "coords flipped": lambda slide: change(slide / "coords/c.0.0", lambda whole: flipped(whole, 77)),
    "coords gone": lambda slide: (slide / "coords/c.0.0").unlink(),
    "hashes without description": lambda slide: (slide / "pixel_hash/zarr.json").unlink(),
    "status without description": lambda slide: change(slide / "patch_status/zarr.json", lambda whole: whole[:20]),
    "teacher's shard flipped": lambda slide: change(shard(slide, "teacher"), lambda whole: flipped(whole, 999)),
    "teacher's shard torn": lambda slide: change(shard(slide, "teacher"), lambda whole: whole[:-3]),
    "student's shard gone": lambda slide: shard(slide, "student").unlink(),
    "student's shard of another slide": lambda slide: shutil.copy(
        shard(slide.parent / "s5", "student"), shard(slide, "student")
    ),
    "student's array without description": lambda slide: (slide / "features/student/zarr.json").unlink(),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_other_slides_are_benchmarked_and_the_damaged_one_is_named(folder, damage):
    DAMAGES[damage](folder / "s.zarr/slides" / SLIDE)
    encoders = ("--encoders", "teacher,student", "--draws", "100")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = CliRunner().invoke(app, ["bench", "tasks.toml", "--store", "s.zarr", "--out", "report", *encoders])
    said = re.sub(r"\s+", " ", done.output)
    assert done.exit_code == 1, done.output
    assert f"slide {SLIDE} is damaged and left out" in said
    assert "--repair" in said
    if "document" in damage:
        assert f"slides/{SLIDE}/zarr.json" in said
    report = read_report(folder / "report")
    whole = {"coords": {"patches"}}.get(damage.split()[0], {"patches", "centers"})
    noted = {
        note.partition(":")[0].removeprefix("task ") for note in report.notes if f"slide {SLIDE} is damaged" in note
    }
    assert noted == whole
    sizes = {(r.task, r.encoder): r.n for r in report.results if r.metric.startswith("knn")}
    kept = (PATIENTS - 1) * PATCHES
    assert {sizes[task, encoder] for task in whole for encoder in ("teacher", "student")} == {kept}


def test_the_figures_are_those_of_a_store_without_that_slide(folder):
    shutil.copytree(folder / "s.zarr", folder / "fewer.zarr")
    FeatureStore.open(folder / "fewer.zarr", writable=True).remove_slide(SLIDE)
    write_labels(folder / "labels.csv", [row for row in patch_labels() if row["slide_id"] != SLIDE])
    DAMAGES["student's shard gone"](folder / "s.zarr/slides" / SLIDE)
    reports = [
        run_bench(folder / "tasks.toml", [folder / name], ["teacher", "student"], folder / f"of-{name}", draws=100)
        for name in ("s.zarr", "fewer.zarr")
    ]
    assert reports[0].results == reports[1].results
    assert reports[0].comparisons == reports[1].comparisons
    tasks = [failure.task for failure in reports[0].failures]
    assert tasks == ["centers"]  # in the other it has no labels, so it takes no part
    assert not reports[1].failures


def test_a_store_of_which_every_slide_is_damaged(folder):
    for p in range(PATIENTS):
        DAMAGES["hashes without description"](folder / "s.zarr/slides" / f"s{p}")
    report = run_bench(folder / "tasks.toml", [folder / "s.zarr"], ["teacher"], folder / "report", draws=100)
    assert not report.results
    assert len(report.failures) == 2 * (PATIENTS + 1)
    assert "every slide that takes part is damaged" in report.failures[-1].reason


@pytest.mark.parametrize("damage", ["document torn", "document gone"])
def test_work_that_must_not_leave_a_slide_out_refuses(folder, damage):
    DAMAGES[damage](folder / "s.zarr/slides" / SLIDE)
    store = FeatureStore.open(folder / "s.zarr")
    with pytest.raises(StoreCorruptError, match=f"slide {SLIDE}: .*zarr.json"):
        split_store(store, [], "0.2", 0)
    with pytest.raises(StoreCorruptError, match=f"slide {SLIDE}: .*zarr.json"):
        dask_features(store, "teacher")
    assert np.isfinite(store.slide("s4").features("teacher")).all()

"""Stain and center terms end to end: pairs of views from the store, logs, resuming, and what is refused."""

import csv
import json

import numpy as np
import pytest
from safetensors.torch import load_file

from g2l_core.distillation.loader import ReplayDataset
from g2l_core.distillation.replay import ReplaySpec
from g2l_core.encoders.resolve import resolve_encoder
from g2l_core.errors import G2LError, RunError, StoreMissingError, UsageError
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.views import COLUMNS, ViewSpec
from g2l_core.store.features import FeatureStore
from g2l_core.store.verify import verify
from pipeline.cache_teacher import run_extraction
from pipeline.distill import DistillHow, run_distill
from pipeline.row_labels import centers_of
from pipeline.settings import ExtractionSettings, require_stained_views
from tests.conftest import TEACHER
from tests.faults.small_run import KEY, STUDENT, STUDENT_WEIGHTS, settings

TERMS = {"stain_weight": 0.5, "center_weight": 0.5}


@pytest.fixture(scope="module")
def stained(cohort, tmp_path_factory):
    """Three augmented views of some patches, so that the last has no other to be paired with."""
    path = tmp_path_factory.mktemp("stained") / "store.zarr"
    grid, views = GridSpec(max_patches=12), ViewSpec(stain_jitter=0.1)
    how = ExtractionSettings(batch_size=16, views=3, pictures=False)
    run_extraction([cohort], path, [resolve_encoder(TEACHER, weights="random:0")], grid, views, how)
    return path


def distill(store, out, teacher=KEY, how=None, **changes):
    student = resolve_encoder(STUDENT, weights=STUDENT_WEIGHTS)
    return run_distill(store, teacher, student, out, settings(**changes), how=how or DistillHow(workers=1))


@pytest.fixture(scope="module")
def whole(stained, tmp_path_factory):
    out = tmp_path_factory.mktemp("robust") / "run"
    distill(stained, out, **TERMS)
    return out


def tensors(out):
    return load_file(out / "student" / "model.safetensors") | load_file(out / "projector.safetensors")


def same(a, b):
    a, b = tensors(a), tensors(b)
    return all(np.array_equal(a[name].numpy(), b[name].numpy()) for name in a.keys() | b.keys())


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_store_has_pairs_and_is_sound(stained):
    store = FeatureStore.open(stained)
    assert store.views["stain_jitter"] == 0.1
    slide = next(iter(store.slides()))
    assert slide.array("view_params").attrs["columns"][-6:] == [
        "scale_h", "scale_e", "scale_r", "shift_h", "shift_e", "shift_r",
    ]  # fmt: skip
    params, hashes = slide.view_params, slide.pixel_hash
    np.testing.assert_array_equal(params[:, 1, : len(COLUMNS)], params[:, 2, : len(COLUMNS)])
    assert (hashes[:, 1] != hashes[:, 2]).all()
    assert not list(verify(store))


def test_a_batch_shows_each_view_with_its_twin(stained):
    """The pixels were compared with the stored hashes; targets are the shown view's, the center comes behind."""
    store = FeatureStore.open(stained)
    chosen = {slide.slide_id: None for slide in store.slides()}
    spec = ReplaySpec(
        encoders=(KEY,), n_augmented=2, batch_size=8, pool_blocks=2, at_once=2, is_paired=True
    )  # fmt: skip
    paired = ReplayDataset(store, chosen, spec, given=centers_of(store, chosen, "medical_center"))
    alone = ReplayDataset(store, chosen, ReplaySpec(encoders=(KEY,), n_augmented=2, batch_size=8, pool_blocks=2))
    for two, one in zip(paired.batches(), alone.batches(), strict=False):
        np.testing.assert_array_equal(two.pixels[:, 0], one.pixels)
        np.testing.assert_array_equal(two.targets[:, :-1], one.targets)
        difference = np.abs(two.pixels[:, 0].astype(int) - two.pixels[:, 1])
        assert 0 < difference.mean() < 40
        assert set(two.targets[:, -1].tolist()) <= {0, 1, 2}
        if two.position == 3:
            break
    with pytest.raises(UsageError, match="cannot be paired"):
        ReplaySpec(encoders=(KEY,), n_augmented=3, at_once=2, is_paired=True)


def test_the_record_and_the_logs_tell_the_terms(whole):
    record = json.loads((whole / "run.json").read_text())
    assert record["settings"]["train"]["robustness"] == {**TERMS, "center_label": "medical_center"}
    assert (record["replay"]["n_augmented"], record["replay"]["is_paired"], record["replay"]["at_once"]) == (2, True, 2)
    for row in rows(whole / "log.csv"):
        assert 0 < float(row["term:stain"]) < 2
        assert abs(float(row["term:center"])) < 2 or row["term:center"] == "nan"
    assert "0.5 x distance of stains + 0.5 x distance of centers" in (whole / "student" / "README.md").read_text()
    assert "term of stain" in (whole / "curves.html").read_text()


class Killed(BaseException):
    """What nobody catches."""


def test_a_run_that_is_broken_off_goes_on_with_the_same_bits(stained, whole, tmp_path, monkeypatch):
    from g2l_core.distillation import training

    steps, real = [], training.train_step

    def until(state, *others):
        if len(steps) == 3 and state.step == 3:
            raise Killed
        steps.append(state.step)
        return real(state, *others)

    with monkeypatch.context() as patched:
        patched.setattr(training, "train_step", until)
        with pytest.raises(Killed):
            distill(stained, tmp_path / "run", **TERMS)
    distill(stained, tmp_path / "run", **TERMS)
    assert same(whole, tmp_path / "run")
    ours, theirs = rows(tmp_path / "run" / "log.csv"), rows(whole / "log.csv")
    for column in ("loss", "loss_per_element", "term:stain", "term:center"):
        assert [row[column] for row in ours] == [row[column] for row in theirs]


def test_a_resume_with_other_weights_is_refused(stained, whole):
    with pytest.raises(RunError, match="stain_weight"):
        distill(stained, whole, **{**TERMS, "stain_weight": 0.4})
    with pytest.raises(RunError, match="robustness"):
        distill(stained, whole)


def test_a_live_teacher_gives_the_same_terms(stained, whole, tmp_path):
    """Its features are those that are stored; one view of each pair is encoded for the targets."""
    teacher = resolve_encoder(TEACHER, weights="random:0")
    distill(stained, tmp_path / "run", teacher, online=True, views=2, **TERMS)
    for live, stored in zip(rows(tmp_path / "run" / "log.csv"), rows(whole / "log.csv"), strict=True):
        for column in ("loss", "term:stain", "term:center"):
            assert float(live[column]) == pytest.approx(float(stored[column]), abs=0.02, nan_ok=True)
    distill(stained, tmp_path / "new", teacher, online=True, views=0, steps=1, **TERMS)  # a new pair every epoch


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"views": 3}, UsageError, "even --views"),
        ({"views": 1}, UsageError, "even --views"),
        ({"views": "canonical"}, UsageError, "--views canonical"),
        ({"center_weight": 1.0, "center_label": "hospital"}, UsageError, "got 0. Columns of slides and patches are"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(stained, tmp_path, changes, error, says):
    with pytest.raises(error, match=says):
        distill(stained, tmp_path / "run", **{"stain_weight": 1.0, **changes})
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_store_without_stained_views_is_refused(cached_store, tmp_path):
    with pytest.raises(StoreMissingError, match="--stain-jitter"):
        distill(cached_store, tmp_path / "run", stain_weight=1.0)
    teacher = resolve_encoder(TEACHER, weights="random:0")
    with pytest.raises(G2LError, match="--stain-jitter"):
        distill(cached_store, tmp_path / "run", teacher, online=True, views=0, stain_weight=1.0)
    with pytest.raises(UsageError, match="--views 2 or more"):
        require_stained_views(ViewSpec(stain_jitter=0.1), ExtractionSettings(views=1))

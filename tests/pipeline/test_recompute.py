"""`g2l store verify --recompute`: sound stores agree with themselves, others are found out."""

import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from g2l_core.store.documents import read_group, write_group
from g2l_core.store.features import FeatureStore
from pipeline.cli.main import app
from pipeline.recompute import recompute

KEY = "timm-mobilenetv3_small_050-64-random0"


@pytest.fixture
def store(cached_store, tmp_path):
    return shutil.copytree(cached_store, tmp_path / "s.zarr")


def again(store, n=6):
    (found,) = recompute(FeatureStore.open(store), n, seed=1, device="cpu", batch_size=8)
    return found


def test_a_sound_store(store):
    found = again(store)
    assert (found.encoder, found.compared, found.problems) == (KEY, 6, ())
    assert 0.9999 <= found.min_cosine <= 1.0001
    assert again(store, 10**6).compared == sum(map(len, FeatureStore.open(store).slides())) * 3
    told = CliRunner().invoke(app, ["store", "verify", str(store), "--recompute", "5"])
    assert told.exit_code == 0
    assert "5 rows encoded again, least cosine 1.000" in told.stdout


def test_features_of_another_patch(store):
    opened = FeatureStore.open(store, writable=True)
    for slide in opened.slides():
        array = slide.features_array(KEY)
        array[:, 0] = np.roll(array[:, 0], 1, axis=0)  # every canonical feature stands in its neighbor's row
    found = again(store, 10**6)
    assert found.problems
    assert {problem.kind for problem in found.problems} == {"damaged"}
    assert "view 0: cosine 0." in found.problems[0].what
    told = CliRunner().invoke(app, ["store", "verify", str(store), "--recompute", "9"])
    assert told.exit_code == 1


def test_slides_that_have_gone_or_changed(store, cohort, tmp_path):
    opened = FeatureStore.open(store, writable=True)
    first, second, *_ = opened.slides()
    first.set_source(tmp_path / "gone.tiff", first.facts.fingerprint)
    second.set_source(cohort.parent / "slides/p06-1.tiff", second.facts.fingerprint)
    words = "\n".join(map(str, again(store, 10**6).problems))
    assert f"slide {first.slide_id} {KEY}: " in words
    assert f"slide {second.slide_id} {KEY}: row" in words
    assert "the pixels are not those that were encoded" in words


def test_other_weights(store):
    facts = read_group(store, checked=True)
    facts["encoders"][KEY]["weights"] = "random:7"
    write_group(store, facts)
    (problem,) = again(store).problems
    assert "other weights" in problem.what

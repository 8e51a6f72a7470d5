"""Commands on a damaged store: each names the file, goes on with the other slides, and ends with exit code 1."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from typer.testing import CliRunner

from g2l_core.errors import G2LError
from g2l_core.store.features import FeatureStore, Shard
from g2l_core.store.verify import verify
from pipeline.cli.main import app

KEY = "timm-mobilenetv3_small_050-64-random0"
SLIDE = "p02-1"


@pytest.fixture
def store(cached_store, tmp_path):
    return Path(shutil.copytree(cached_store, tmp_path / "s.zarr"))


def g2l(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def said(done):
    """What was printed, or would be as an error, without line breaks that depend on the width."""
    return re.sub(r"\s+", " ", f"{done.output} {done.exception or ''}")


def refused(done):
    """Whether the command ended with an error of G2L's own, for which `g2l` has exit code 2."""
    return isinstance(done.exception, G2LError)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "torn": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "flipped": lambda path: path.write_bytes(path.read_bytes().replace(b"north", b"nosth").replace(b"south", b"sputh")),
    "absent": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.fixture(params=DAMAGES.values(), ids=DAMAGES)
def damaged(store, request):
    request.param(store / "slides" / SLIDE / "zarr.json")
    return store


@pytest.mark.parametrize("command", ["ls", "info", "verify"])
def test_looking_at_a_store_names_the_document(damaged, command):
    done = g2l("store", command, damaged)
    assert done.exit_code == 1, done.output
    assert f"{SLIDE}/zarr.json" in said(done).replace(" ", "")
    assert "p03-1" in done.output or command != "ls"


def test_caching_goes_on_with_the_others(damaged, cohort):
    for path in (damaged / "slides/p03-1/features" / KEY).glob("c.*"):
        path.unlink()
    options = ("--teacher", "timm:mobilenetv3_small_050@64", "--weights", "random:0", "--views", "2", "--no-pictures")
    done = g2l("cache-teacher", cohort, "--store", damaged, *options)
    assert done.exit_code == 1, done.output
    assert f"slides/{SLIDE}/zarr.json" in said(done)
    assert FeatureStore.open(damaged).slide("p03-1").features(KEY, view=2).shape[1] == 1024


def test_a_damaged_table_costs_its_slide(store, cohort):
    (store / "slides" / SLIDE / "coords/c.0.0").unlink()
    shutil.rmtree(store / "slides" / SLIDE / "features" / KEY)
    done = g2l(
        "cache-teacher", cohort, "--store", store, "--teacher", "timm:mobilenetv3_small_050@64",
        "--weights", "random:0", "--views", "2", "--no-pictures",
    )  # fmt: skip
    assert done.exit_code == 1, done.output
    assert f"slide {SLIDE}: coords is not what was written" in said(done)


def test_repair_drops_what_is_damaged_and_the_next_run_fills_it(store, cohort):
    wanted = {s.slide_id: s.features(KEY, view=1).tobytes() for s in FeatureStore.open(store).slides()}
    slide = FeatureStore.open(store).slide("p01-1")
    path = slide.shard_path(KEY, Shard(0, len(slide), 1))
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    (store / "slides" / SLIDE / "zarr.json").write_bytes(b"{")
    (store / "slides/left.partial").mkdir()
    verified = g2l("store", "verify", store)
    assert verified.exit_code == 1
    assert "--repair drops it" in said(verified)
    assert (store / "slides/left.partial").exists()
    repaired = g2l("store", "verify", store, "--repair")
    assert repaired.exit_code == 0, repaired.output
    assert "put back from .catalogue" in said(repaired) or "the slide was removed" in said(repaired)
    assert not (store / "slides/left.partial").exists()
    kinds = [problem.kind for problem in verify(FeatureStore.open(store))]
    assert "damaged" not in kinds
    assert "missing" in kinds
    options = ("--teacher", "timm:mobilenetv3_small_050@64", "--weights", "random:0", "--views", "2", "--no-pictures")
    again = g2l("cache-teacher", cohort, "--store", store, *options)
    assert again.exit_code == 0, again.output
    assert "encoded now" in said(again)
    assert {s.slide_id: s.features(KEY, view=1).tobytes() for s in FeatureStore.open(store).slides()} == wanted


def test_a_shard_that_was_cut_short_is_computed_again_without_being_asked(store, cohort):
    slide = FeatureStore.open(store).slide("p01-1")
    wanted = slide.features(KEY, view=1)
    path = slide.shard_path(KEY, Shard(0, len(slide), 1))
    path.write_bytes(path.read_bytes()[:-9])
    options = ("--teacher", "timm:mobilenetv3_small_050@64", "--weights", "random:0", "--views", "2", "--no-pictures")
    done = g2l("cache-teacher", cohort, "--store", store, *options)
    assert done.exit_code == 0
    assert "encoded now" in said(done)
    assert np.array_equal(FeatureStore.open(store).slide("p01-1").features(KEY, view=1), wanted)


# ---- format 1 -------------------------------------------------------------------------------------------

GOLDEN = Path(__file__).parents[1] / "golden/store"


def test_an_upgrade_keeps_every_bit(tmp_path):
    path = Path(shutil.copytree(GOLDEN, tmp_path / "s.zarr"))
    before = {s.slide_id: s for s in FeatureStore.open(GOLDEN).slides()}
    done = g2l("store", "upgrade", path)
    assert done.exit_code == 0, done.output
    assert "8 slides are in the present format" in said(done)
    after = FeatureStore.open(path)
    assert after.facts.format == 2
    assert {s.slide_id for s in after.slides()} == set(before)
    assert after.failed_slides() == FeatureStore.open(GOLDEN).failed_slides()
    for slide in after.slides():
        old = before[slide.slide_id]
        for name in ("coords", "patch_status", "view_params", "pixel_hash"):
            assert np.array_equal(slide.read_table(name), old.read_table(name))
        assert (slide.labels, slide.patch_ids, slide.encoder_keys) == (old.labels, old.patch_ids, old.encoder_keys)
        for key in old.encoder_keys:
            for view in range(old.feature_facts(key).n_views):
                assert slide.features(key, view=view).tobytes() == old.features(key, view=view).tobytes()
    assert {p.kind for p in verify(after)} == {p.kind for p in verify(FeatureStore.open(GOLDEN))}
    assert FeatureStore.open(tmp_path / "s.zarr.format1").facts.format == 1
    again = g2l("store", "upgrade", path)
    assert refused(again)
    assert "has format 2 already" in said(again)


def test_a_store_of_format_1_is_read_and_not_written_to(tmp_path, cohort):
    path = Path(shutil.copytree(GOLDEN, tmp_path / "s.zarr"))
    assert g2l("store", "ls", path).exit_code == 0
    done = g2l(
        "cache-teacher", cohort, "--store", path, "--teacher", "timm:mobilenetv3_small_050@64", "--weights", "random:0"
    )
    assert refused(done)
    assert "g2l store upgrade" in said(done)


def test_an_upgrade_that_is_interrupted_begins_anew(tmp_path):
    from g2l_core.store.upgrade import upgrade

    path = Path(shutil.copytree(GOLDEN, tmp_path / "s.zarr"))
    for steps in (0, 1, 3):
        slides = upgrade(path)
        for _ in range(steps):
            next(slides)
        slides.close()
        assert FeatureStore.open(path).facts.format == 1
    assert len(list(upgrade(path))) == 8
    path.rename(tmp_path / "s.zarr.upgrade.partial")  # as if it had ended between the last two steps
    assert list(upgrade(path)) == []
    assert FeatureStore.open(path).facts.format == 2


def test_a_table_of_format_1_that_cannot_be_read_stops_the_upgrade(tmp_path):
    path = Path(shutil.copytree(GOLDEN, tmp_path / "s.zarr"))
    (path / "slides/p01-1/coords/zarr.json").write_bytes(b"{")
    done = g2l("store", "upgrade", path)
    assert refused(done)
    assert "slide p01-1: coords cannot be read" in said(done)
    assert FeatureStore.open(path).facts.format == 1


def test_zarr_alone_reads_a_store(cached_store):
    slide = zarr.open_group(cached_store, mode="r")[f"slides/{SLIDE}"]
    found = FeatureStore.open(cached_store).slide(SLIDE)
    assert np.array_equal(slide[f"features/{KEY}"][:, 2], found.features(KEY, view=2))

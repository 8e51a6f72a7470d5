"""`--coords` at the command line: stored, rerun, embedded, planned, refused, and repaired."""

import json
import shutil

import pytest

from g2l_core.store.features import FeatureStore
from tests.conftest import TEACHER
from tests.pipeline.test_cli import cache, g2l, refused, slides  # noqa: F401 - a fixture

OPTIONS = ("--views", "0", "--artifacts", "none", "--no-pictures")


@pytest.fixture
def given(slides, tmp_path):  # noqa: F811
    """Coordinates of the first slide, as CSV."""
    folder = tmp_path / "coords"
    folder.mkdir()
    first, second = sorted(path.stem for path in slides.glob("*.tiff"))
    (folder / f"{first}.csv").write_text("x,y\n" + "".join(f"{x},{x + 3}\n" for x in (0, 100, 201, 100)))
    return folder, first, second


def test_given_patches_are_stored_and_nothing_is_done_again(slides, given, tmp_path):  # noqa: F811
    folder, first, second = given
    store = tmp_path / "s.zarr"
    done = cache(slides, store, "--coords", folder, *OPTIONS)
    refused(done, f"{second}: {folder} has no coordinates of it: expected {second}.h5", code=1)
    assert "3 patches of 1 slides" in done.stdout
    assert "note: 1 slide: rows of the coordinates repeat another" in done.stdout
    opened = FeatureStore.open(store)
    assert opened.grid["tissue"] == "coordinates"
    assert sorted(opened.slide(first).coords.tolist()) == [[0, 3], [100, 103], [201, 204]]

    (folder / f"{second}.csv").write_text("x,y,width,height\n0,0,1100,600\n")  # boxes beside corners
    done = cache(slides, store, "--coords", folder, *OPTIONS, "--json")
    assert done.returncode == 0, done.stderr
    boxed = FeatureStore.open(store).slide(second)
    assert boxed.facts.patch_px_level0 == 512
    assert sorted(boxed.coords.tolist()) == [[0, 0], [512, 0]]
    assert json.loads(done.stdout)["encoded"] == 2
    assert "all of them were stored already\n" in cache(slides, store, "--coords", folder, *OPTIONS).stdout

    (folder / f"{first}.csv").write_text("x,y\n0,0\n")
    refused(cache(slides, store, "--coords", folder, *OPTIONS), "its coordinates have changed", first, code=1)
    refused(cache(slides, store, *OPTIONS), "tissue is 'coordinates' there, 'otsu' asked")


def test_other_commands_take_them(slides, given, tmp_path):  # noqa: F811
    folder, first, second = given
    shutil.copy(folder / f"{first}.csv", folder / f"{second}.csv")
    planned = g2l("plan", slides, "--teacher", TEACHER, "--weights", "random:0", "--coords", folder, "--json")
    assert json.loads(planned.stdout)["patches"] == {first: 3, second: 3}, planned.stderr
    store = tmp_path / "s.zarr"
    assert cache(slides / f"{first}.tiff", store, "--coords", folder, *OPTIONS).returncode == 0
    embed = ("embed", slides, "--store", store, "--encoder", TEACHER, "--weights", "random:0")
    refused(g2l(*embed), "give their folder or file again with --coords")
    done = g2l(*embed, "--coords", folder)
    assert done.returncode == 0, done.stderr
    assert len(FeatureStore.open(store).slide(second)) == 3


def test_what_cannot_be_meant(slides, given, tmp_path):  # noqa: F811
    folder, first, _ = given
    store = tmp_path / "s.zarr"
    refused(
        cache(slides, store, "--coords", folder, "--tissue", "color"), "--tissue color and --coords", "leave one out"
    )
    refused(cache(slides, store, "--coords", tmp_path / "none"), "expected a folder with a file a slide")
    refused(cache(slides, store, "--tissue", "coordinates"), "again with --coords")
    (tmp_path / "all.csv").write_text("slide_id,x\na,1,2\n")
    refused(cache(slides, store, "--coords", tmp_path / "all.csv"), "line 2: 3 fields where the header has 2")
    assert not store.exists()
    one = slides / f"{first}.tiff"
    (folder / f"{first}.csv").write_text("x,y,size\n0,0,64\n")
    refused(cache(one, store, "--coords", folder), "patches of 64 level-0 px", "--patch-px", "--mpp", code=1)


def test_damaged_coordinates_cannot_be_derived(slides, given, tmp_path):  # noqa: F811
    """As for a network or annotations: what was cached of the slide goes, and is cached anew with the coordinates."""
    folder, first, _ = given
    store, one = tmp_path / "s.zarr", slides / f"{first}.tiff"
    assert cache(one, store, "--coords", folder, *OPTIONS).returncode == 0
    before = FeatureStore.open(store).slide(first).coords.tolist()
    for file in (store / "slides" / first / "coords").glob("c.*"):
        file.write_bytes(b"")
    done = g2l("store", "verify", store, "--repair")
    assert "the slide was removed" in done.stdout + done.stderr
    assert "again with --coords" in done.stdout + done.stderr
    assert list(FeatureStore.open(store).slides()) == []
    assert list(FeatureStore.open(store).failed_slides()) == [first]
    assert cache(one, store, "--coords", folder, *OPTIONS).returncode == 0
    assert FeatureStore.open(store).slide(first).coords.tolist() == before

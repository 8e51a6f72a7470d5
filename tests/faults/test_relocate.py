"""Slides that were moved are found again by what they are; and what is stored already needs no weights."""

import shutil

import pytest
import torch

from g2l_core.encoders.loading import build_network
from g2l_core.encoders.resolve import resolve_encoder
from g2l_core.store.features import FeatureStore
from tests.conftest import TEACHER
from tests.faults.test_identity import FEW, cache_images, images  # noqa: F401  a fixture
from tests.pipeline.test_cli import KEY, distill, g2l, refused


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "teacher.pth"
    torch.save(build_network(resolve_encoder(TEACHER, weights="random:0")).state_dict(), path)
    return path


def cache_with(weights, source, store, *more):
    return g2l("cache-teacher", source, "--store", store, "--teacher", TEACHER, "--weights", weights, *FEW, *more)


@pytest.fixture
def slides(cohort, tmp_path):
    folder = tmp_path / "old/slides"
    folder.mkdir(parents=True)
    for name in ("p01-1", "p02-1", "p03-1"):
        shutil.copy(cohort.parent / f"slides/{name}.tiff", folder)
    return folder


def places(store):
    return {slide.slide_id: slide.facts.source for slide in FeatureStore.open(store).slides()}


def relocate(store, folder, *more, code=0):
    done = g2l("store", "relocate", store, folder, *more)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def test_moved_slides_are_found_without_weights(slides, weights, tmp_path):
    store, new = tmp_path / "s.zarr", tmp_path / "new"
    assert cache_with(weights, slides, store).returncode == 0
    weights.unlink()
    before = places(store)
    (new / "deep").mkdir(parents=True)
    (slides / "p01-1.tiff").rename(new / "deep/p01-1.tiff")
    (slides / "p02-1.tiff").rename(new / "another name.tiff")
    shutil.copy(slides / "p03-1.tiff", new / "p01-1.TIFF")  # a copy under a name that is nearly another's
    (new / "p02-1.tiff").write_bytes(b"no slide")

    told = relocate(store, new, "--dry-run")
    assert "3 found, 0 as before, 0 ambiguous, 0 missing; nothing is changed" in told
    assert places(store) == before
    relocate(store, new)
    assert places(store) == {
        "p01-1": str(new / "deep/p01-1.tiff"), "p02-1": str(new / "another name.tiff"),
        "p03-1": str(new / "p01-1.TIFF"),
    }  # fmt: skip


def test_copies_are_told_apart_by_their_folders_or_called_ambiguous(slides, tmp_path):
    store = tmp_path / "s.zarr"
    assert cache_with("random:0", slides, store).returncode == 0
    for folder in ("x/slides", "x/else"):
        shutil.copytree(slides, tmp_path / folder)
    relocate(store, tmp_path / "x")
    assert places(store)["p01-1"] == str(tmp_path / "x/slides/p01-1.tiff")
    for folder in ("y/one", "y/two"):
        shutil.copytree(slides, tmp_path / folder)
    (tmp_path / "x/slides/p03-1.tiff").unlink()
    (tmp_path / "y/one/p03-1.tiff").unlink()
    (tmp_path / "y/two/p03-1.tiff").unlink()
    (tmp_path / "y/two/p02-1.tiff").unlink()
    told = relocate(store, tmp_path / "y", code=1)
    assert "1 found, 0 as before, 1 ambiguous, 1 missing" in told
    assert "missing" in told
    assert f"was {tmp_path}/x/slides/p03-1.tiff" in told.replace("\n", "")
    assert places(store)["p01-1"] == str(tmp_path / "x/slides/p01-1.tiff")
    assert "1 as before" in relocate(store, tmp_path / "y/two", code=1)  # p02-1, still in x
    refused(g2l("store", "relocate", store, tmp_path / "absent"), "no such folder")
    refused(g2l("store", "relocate", tmp_path / "y", tmp_path), "there is no store")
    assert not (tmp_path / "y/.locks").exists()


def test_moved_patch_images_are_found(images, tmp_path):  # noqa: F811
    store = tmp_path / "s.zarr"
    assert cache_images(images, store).returncode == 0
    images.rename(tmp_path / "moved")
    told = g2l("store", "verify", store, "--recompute", "2")
    assert told.returncode == 1
    assert "g2l store relocate STORE FOLDER" in told.stdout
    relocate(store, tmp_path / "moved")  # the folders' names alone tell them apart
    assert places(store) == {name: str(tmp_path / "moved" / name) for name in ("one", "two")}
    assert g2l("store", "verify", store, "--recompute", "2").returncode == 0


def test_commands_that_miss_slides_name_the_way_out(slides, tmp_path):
    store = tmp_path / "s.zarr"
    assert cache_with("random:0", slides, store, "--views", "1", "--max-patches", "40").returncode == 0
    (slides / "p01-1.tiff").rename(tmp_path / "p01-1.tiff")
    way = "g2l store relocate STORE FOLDER"
    refused(distill(store, tmp_path / "run"), "p01-1", way)
    verified = g2l("store", "verify", store, "--recompute", "99")
    assert verified.returncode == 1
    assert way in verified.stdout
    manifest = tmp_path / "m.csv"
    manifest.write_text("".join(["path,slide_id\n", *(f"{path},{slide}\n" for slide, path in places(store).items())]))
    done = g2l("embed", manifest, "--store", store, "--encoder", "timm:resnet10t@64", "--weights", "random:0")
    refused(done, "p01-1", way, code=1)


def test_nothing_to_encode_needs_no_weights(slides, weights, tmp_path):
    """A rerun over stored slides, and over one that fails again; other weights in the same file are noticed."""
    store = tmp_path / "s.zarr"
    (slides / "broken.tiff").write_bytes(b"no slide")
    assert cache_with(weights, slides, store).returncode == 1
    known = list(FeatureStore.open(store).encoders)

    shutil.copy(weights, tmp_path / "kept.pth")
    weights.write_bytes(weights.read_bytes() + b"\0")
    changed = cache_with(weights, slides, store)  # another file, whatever it holds: it is read
    assert changed.returncode == 2 or "nothing was encoded now" in changed.stdout
    shutil.copy(tmp_path / "kept.pth", weights)
    import pipeline.cache_teacher

    def no_loading(*_, **__):
        raise AssertionError("weights are loaded")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.cache_teacher, "load_encoder", no_loading)
        for source in (slides, slides / "p01-1.tiff"):
            done = cache_with(weights, source, store)
            assert done.returncode == (1 if source == slides else 0), done.stderr
            assert "nothing was encoded now" in done.stdout or "stored already" in done.stdout
            assert known[0] in done.stdout
        loading = cache_with(weights, slides, store, "--views", "1")
        assert (loading.returncode, "weights are loaded" in loading.stderr) == (70, True)
    torch.save(build_network(resolve_encoder(TEACHER, weights="random:1")).state_dict(), weights)
    other = cache_with(weights, slides, store)
    assert other.returncode == 1
    assert "encoded now" in other.stdout
    assert len(FeatureStore.open(store).encoders) == 2


def test_a_store_that_random_weights_filled(slides, tmp_path):
    """Their spec says all: no network is built for nothing."""
    store = tmp_path / "s.zarr"
    assert cache_with("random:0", slides, store).returncode == 0
    assert list(FeatureStore.open(store).encoders) == [KEY]
    with pytest.MonkeyPatch.context() as patch:
        import pipeline.cache_teacher

        patch.delattr(pipeline.cache_teacher, "load_encoder")
        done = cache_with("random:0", slides, store)
    assert (done.returncode, "stored already" in done.stdout) == (0, True), done.stderr

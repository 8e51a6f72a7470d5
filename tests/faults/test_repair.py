"""Damaged tables of a store: derived again from the slides bit by bit, or the slide is cached anew."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from g2l_core.encoders.resolve import resolve_encoder
from g2l_core.extraction.repair import repair_tables
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.views import ViewSpec
from g2l_core.store.features import FeatureStore
from g2l_core.store.schema import STATUS
from g2l_core.store.verify import Problem, verify
from pipeline.cache_teacher import run_extraction
from pipeline.extract import ExtractionSettings
from tests.conftest import TEACHER
from tests.faults.small_run import KEY, flipped
from tests.pipeline.test_cli import cache, g2l
from tests.store.toy import change_facts
from tests.tissue.test_network import save_torchscript

TABLES = ("coords", "patch_status", "view_params", "pixel_hash")
SLIDE = "p02-1"


def content(path: Path, slide_id: str = SLIDE):
    """Everything that is stored of a slide."""
    slide = FeatureStore.open(path).slide(slide_id)
    tables = {name: slide.read_table(name).tobytes() for name in TABLES}
    features = [slide.features(KEY, view=view).tobytes() for view in range(slide.facts.features[KEY].n_views)]
    return tables, slide.patch_ids, features, slide.facts


def repaired(path: Path) -> list[tuple[Problem, str]]:
    store = FeatureStore.open(path, writable=True)
    return list(repair_tables(store, list(verify(store))))


def problems(path: Path):
    return [problem for problem in verify(FeatureStore.open(path)) if problem.kind == "damaged"]


@pytest.fixture
def store(cached_store, tmp_path):
    return Path(shutil.copytree(cached_store, tmp_path / "s.zarr"))


def files_of(path: Path, name: str) -> list[Path]:
    return sorted(p for p in (path / "slides" / SLIDE / name).rglob("*") if p.is_file())


def change(damage):
    """Damage the file with a table's values; a table of zeros alone has none."""

    def apply(folder: Path) -> None:
        for file in folder.glob("c.*"):
            file.write_bytes(damage(file.read_bytes()))

    return apply


DAMAGES = {
    "a file is gone": lambda folder: [file.unlink() for file in folder.glob("c.*")],
    "a file is empty": change(lambda _: b""),
    "a file is torn": change(lambda whole: whole[:-5]),
    "a bit flipped": change(lambda whole: flipped(whole, 99)),
    "its description is torn": lambda folder: (folder / "zarr.json").write_bytes(b'{"shape": '),
    "its description is gone": lambda folder: (folder / "zarr.json").unlink(),
    "it is gone": shutil.rmtree,
    "it is another slide's": lambda folder: (
        shutil.rmtree(folder), shutil.copytree(folder.parents[1] / "p03-1" / folder.name, folder),
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_table_is_derived_again(store, damage):
    before = content(store)
    for name in TABLES:
        DAMAGES[damage](store / "slides" / SLIDE / name)
    condemned = {problem.table for problem in problems(store)}
    assert condemned >= {"coords", "view_params", "pixel_hash"}
    done = repaired(store)
    assert {problem.table for problem, _ in done} == condemned
    assert {text for _, text in done} == {"derived again, with the checksums that were recorded"}
    assert problems(store) == []
    assert content(store) == before
    assert repaired(store) == []


@hypothesis_settings(max_examples=15)
@given(name=st.sampled_from(TABLES), data=st.data())
def test_one_flipped_bit_anywhere_in_a_table(cached_store, tmp_path_factory, name, data):
    store = Path(shutil.copytree(cached_store, tmp_path_factory.mktemp("flip") / "s.zarr"))
    before = content(store)
    file = data.draw(st.sampled_from(files_of(store, name)))
    file.write_bytes(flipped(file.read_bytes(), data.draw(st.integers(0, 8 * file.stat().st_size - 1))))
    repaired(store)
    assert problems(store) == []
    assert content(store)[0] == before[0]
    shutil.rmtree(store.parent)


def changed_view_seed(store):
    """The store's settings are others than those that the slide was written with."""
    opened = FeatureStore.open(store, writable=True)
    opened._set_facts(views={**opened.views, "seed": 99})


def test_a_slide_that_gives_something_else_is_removed_and_cached_anew(store, cohort, tmp_path):
    before = content(store)
    slide = FeatureStore.open(store, writable=True).slide(SLIDE)
    right, other = slide.facts.source, FeatureStore.open(store).slide("p03-1").facts.source
    change_facts(slide, source=other)
    shutil.rmtree(slide.folder / "pixel_hash")
    ((problem, text),) = repaired(store)
    assert (problem.slide_id, problem.table) == (SLIDE, "pixel_hash")
    assert text.startswith("pixel_hash cannot be derived as it was; what was cached of the slide was removed. The cach")
    withdrawn(store, slide.labels)
    teacher = resolve_encoder(TEACHER, weights="random:0")
    how = ExtractionSettings(batch_size=16, device="cpu", views=2)
    done = run_extraction([cohort], store, [teacher], GridSpec(), ViewSpec(), how)
    assert done.is_complete
    assert content(store)[:3] == before[:3]
    assert FeatureStore.open(store).slide(SLIDE).facts.source == right


def test_a_slide_that_cannot_be_read_is_left_as_it_is(store):
    change_facts(FeatureStore.open(store, writable=True).slide(SLIDE), source="/absent/slide.tiff")
    for name in ("coords", "pixel_hash"):
        shutil.rmtree(store / "slides" / SLIDE / name)
    done = repaired(store)
    assert len(done) == 2
    assert {text.startswith("not repaired: ") and "/absent/slide.tiff" in text for _, text in done} == {True}, done
    assert len(problems(store)) == 2


def test_what_needs_a_file_that_the_store_does_not_have_is_cached_anew(store):
    opened = FeatureStore.open(store, writable=True)
    opened._set_facts(grid={**opened.grid, "tissue": "network:n@sha256:0123"})
    labels = opened.slide(SLIDE).labels
    shutil.rmtree(store / "slides" / SLIDE / "coords")
    ((_, text),) = repaired(store)
    assert "give its file again with --tissue" in text
    assert "what was cached of the slide was removed. The caching command caches it anew" in text
    withdrawn(store, labels)


def withdrawn(store, labels):
    """The slide is not forgotten: it counts as failed, and keeps what the manifest said of it."""
    opened = FeatureStore.open(store)
    assert labels
    assert opened.failed_labels() == {SLIDE: labels}
    assert "removed by g2l store verify --repair" in opened.failed_slides()[SLIDE]
    assert SLIDE not in {slide.slide_id for slide in opened.slides()}
    assert [(problem.kind, problem.slide_id) for problem in verify(opened)] == [("failed", SLIDE)]


@pytest.mark.parametrize("tissue", ["annotations", "network"])
def test_patches_of_annotations_or_a_network_are_filled_by_the_next_run(cohort, tmp_path, tissue):
    store, method = tmp_path / "s.zarr", tissue_of(tissue, cohort, tmp_path)
    cache_again = partial(cache, cohort, store, "--views", "0", "--tissue", method)
    assert cache_again().returncode == 0
    before, features = FeatureStore.open(store).slide(SLIDE), content(store, SLIDE)[2]
    for file in files_of(store, "coords"):
        file.unlink()
    done = g2l("store", "verify", store, "--repair")
    assert done.returncode == 0, done.stdout
    told = " ".join(done.stdout.split())
    assert f"damaged slide {SLIDE}: " in told
    assert "again with --tissue); what was cached of the slide was removed. The caching command caches it anew" in told
    assert "1 slides are not complete: run the caching command again, which fills them" in told
    withdrawn(store, before.labels)
    assert g2l("store", "verify", store).returncode == 1
    again = cache_again()
    assert again.returncode == 0, again.stderr
    after = FeatureStore.open(store).slide(SLIDE)
    assert after.facts.labels == before.labels
    assert (after.facts.mpp, after.facts.tissue_sha256) == (before.facts.mpp, before.facts.tissue_sha256)
    assert np.array_equal(after.coords, before.coords)
    assert content(store, SLIDE)[2] == features
    assert g2l("store", "verify", store).returncode == 0


def tissue_of(kind, cohort, folder):
    """A `--tissue` whose file the store does not have: annotations of all slides, or a network."""
    if kind == "network":
        save_torchscript(folder / "green.pt")
        return folder / "green.pt"
    ring = [[0, 0], [1024, 0], [1024, 1024], [0, 1024], [0, 0]]
    area = {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [ring]}}
    (folder / "areas").mkdir()
    for path in (cohort.parent / "slides").glob("*.tiff"):
        text = json.dumps({"type": "FeatureCollection", "features": [area]})
        (folder / f"areas/{path.stem}.geojson").write_text(text)
    return folder / "areas"


def test_tables_that_only_the_settings_give(store):
    """A view table is not put back from other settings."""
    changed_view_seed(store)
    shutil.rmtree(store / "slides" / SLIDE / "view_params")
    ((_, text),) = repaired(store)
    assert text.startswith("view_params cannot be derived as it was; what was cached of the slide was removed")


def test_patches_that_could_not_be_read_are_still_counted_as_such(store):
    """The file may be readable by now: what was recorded then is what the features hold."""
    slide = FeatureStore.open(store, writable=True).slide(SLIDE)
    status, hashes = slide.patch_status, slide.pixel_hash
    status[3], hashes[3] = STATUS["unreadable"], 0
    slide.put_table("patch_status", status)
    slide.put_table("pixel_hash", hashes)
    slide.note_losses({3: "row 3: torn tile"})
    for name in ("patch_status", "pixel_hash"):
        shutil.rmtree(slide.folder / name)
    assert {text for _, text in repaired(store)} == {"derived again, with the checksums that were recorded"}
    slide = FeatureStore.open(store).slide(SLIDE)
    assert np.array_equal(slide.patch_status, status)
    assert np.array_equal(slide.pixel_hash, hashes)


def test_a_slide_of_which_nothing_is_encoded_yet(store):
    """Blocks that nobody has recorded are zeros again."""
    slide = FeatureStore.open(store, writable=True).slide(SLIDE)
    kept = {name: crcs for name, crcs in slide.facts.tables.items() if name in {"coords", "view_params"}}
    change_facts(slide, features={}, tables=kept)
    for name in ("pixel_hash", "patch_status"):
        shutil.rmtree(slide.folder / name)
    assert len(repaired(store)) == 2
    slide = FeatureStore.open(store).slide(SLIDE)
    assert slide.pixel_hash.shape == (len(slide), 3)
    assert not slide.pixel_hash.any()
    assert not slide.patch_status.any()


def test_patch_images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng, side = np.random.default_rng(0), GridSpec().patch_px
    for i in range(12):
        cv2.imwrite(str(folder / f"patch {i}.png"), rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
    path = tmp_path / "s.zarr"
    grid = replace(GridSpec(), max_patches=9)
    how = ExtractionSettings(batch_size=4, device="cpu", views=1)
    run_extraction([folder], path, [resolve_encoder(TEACHER, weights="random:0")], grid, ViewSpec(), how)
    before = content(path, "images")
    for name in (*TABLES, "patch_id"):
        shutil.rmtree(path / "slides/images" / name)
    assert {text for _, text in repaired(path)} == {"derived again, with the checksums that were recorded"}
    assert content(path, "images") == before
    (folder / "patch 99.png").write_bytes((folder / "patch 1.png").read_bytes())
    shutil.rmtree(path / "slides/images/patch_id")
    ((_, text),) = repaired(path)
    assert text.startswith("patch_id cannot be derived as it was; what was cached of the slide was removed")

"""`g2l view`: one small page that needs nothing else, with what the store and the slides at hand hold."""

import base64
import json
import re
import shutil
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from sklearn.neighbors import NearestNeighbors

from g2l_core.store.features import FeatureStore
from pipeline.settings import ViewSettings
from pipeline.view import FACE_PX, NEIGHBORS, run_view
from tests.pipeline.test_cli import KEY, g2l, refused


def data_of(page):
    return json.loads(re.search(r"const data = (\{.*\});", page.read_text())[1])


@pytest.fixture(scope="module")
def viewed(cached_store, tmp_path_factory):
    out = tmp_path_factory.mktemp("view") / "page.html"
    return run_view(cached_store, out, ViewSettings(patches=60, seed=3))


def test_the_page_is_small_and_needs_nothing_else(viewed):
    text = viewed.page.read_text()
    assert viewed.size == viewed.page.stat().st_size < 3_000_000
    assert "default-src 'none'" in text
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", text)
    assert "://" not in re.sub(r"data:image/jpeg;base64,[\w+/=]+", "", text)
    assert viewed.slides == viewed.with_pictures == 6
    assert text.count("<image ") == 6
    assert "medical_center" in text


def test_neighbors_are_those_of_the_stored_features(viewed, cached_store):
    data, store = data_of(viewed.page), FeatureStore.open(cached_store)
    assert len(data["patches"]) == 60
    of_slide = [patch["slide"] for patch in data["patches"]]
    # the patches of each slide, found again by their neighbors' similarities: draw them as the page did
    from g2l_core.rng import keyed_generator

    rows = []
    for slide_id in data["slides"]:
        slide = store.slide(slide_id)
        good = np.flatnonzero(slide.patch_status == 0)
        places = np.sort(keyed_generator("viewed patches", 3, slide_id).permutation(len(good))[:10])
        rows.append(slide.features(KEY)[good[places]].astype(np.float64))
    features = np.concatenate(rows)
    found = NearestNeighbors(n_neighbors=NEIGHBORS + 1, metric="cosine").fit(features).kneighbors(features)
    for i, patch in enumerate(data["patches"]):
        wanted = [1 - d for d, j in zip(found[0][i], found[1][i], strict=True) if j != i][:NEIGHBORS]
        assert np.allclose([similarity for _, similarity in patch["near"]], wanted, atol=2e-3)
        assert i not in [j for j, _ in patch["near"]]
        assert all(of_slide[j] != of_slide[i] for j, _ in patch["others"])
        assert len(patch["others"]) == NEIGHBORS


def test_a_face_shows_the_patch_itself(viewed, cached_store):
    """A patch read again through OpenSlide and shrunk by Pillow looks the same."""
    import openslide

    from g2l_core.rng import keyed_generator

    data, store = data_of(viewed.page), FeatureStore.open(cached_store)
    slide = store.slide(data["slides"][0])
    good = np.flatnonzero(slide.patch_status == 0)
    row = good[np.sort(keyed_generator("viewed patches", 3, slide.slide_id).permutation(len(good))[:10])[0]]
    side = slide.facts.patch_px_level0
    with openslide.OpenSlide(slide.facts.source) as opened:
        wanted = opened.read_region(tuple(map(int, slide.coords[row])), 0, (side, side)).convert("RGB")
    wanted = np.asarray(wanted.resize((FACE_PX, FACE_PX), Image.Resampling.BOX), int)
    image = Image.open(BytesIO(base64.b64decode(data["patches"][0]["image"].partition(",")[2])))
    assert np.abs(np.asarray(image, int) - wanted).mean() < 12
    assert np.corrcoef(np.asarray(image).ravel(), wanted.ravel())[0, 1] > 0.9


def test_without_slides_there_are_maps_of_colors_alone(cached_store, cohort, tmp_path):
    """A slide that is gone, and one that is another file now, are told; everything else is as before."""
    store = shutil.copytree(cached_store, tmp_path / "s.zarr")
    opened = FeatureStore.open(store, writable=True)
    first, second = opened.slide_ids()[:2]
    opened.slide(first).set_source(tmp_path / "gone.tiff", opened.slide(first).facts.fingerprint)
    opened.slide(second).set_source(cohort, opened.slide(second).facts.fingerprint)
    done = g2l("view", store, "--out", tmp_path / "v", "--slide", first, "--slide", second, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["slides"], facts["with_pictures"]) == (2, 0)
    assert "is not at hand" in facts["notes"][0]
    assert "not the file that was cached" in facts["notes"][1]
    page = tmp_path / "v" / "index.html"
    assert "<image " not in page.read_text()
    assert {patch["image"] for patch in data_of(page)["patches"]} == {""}
    assert 'class="colors cells"' in page.read_text()


def test_names_from_outside_stay_text(cached_store, tmp_path):
    """Labels of a store may be anything: none of them ends the script or becomes HTML."""
    store = shutil.copytree(cached_store, tmp_path / "s.zarr")
    nasty = "</script><script>alert(1)</script>"
    for slide in FeatureStore.open(store, writable=True).slides():
        slide.set_labels({"patient_id": nasty})
    made = run_view(store, tmp_path / "p.html", ViewSettings(patches=6, slides=2))
    text = made.page.read_text()
    assert "alert(1)" in text
    assert "<script>alert" not in text
    assert text.count("<script") == 1
    assert made.notes[0] == "2 of 6 slides, drawn by seed 0."


def test_patch_images_are_a_mosaic(crc_patches, tmp_path):
    done = g2l(
        *("cache-teacher", crc_patches, "--store", tmp_path / "s.zarr", "--teacher", "timm:mobilenetv3_small_050@64"),
        *("--weights", "random:0", "--views", "0", "--patch-px", "224", "--crop-px", "224"),
    )
    assert done.returncode == 0, done.stderr
    made = run_view(tmp_path / "s.zarr", tmp_path / "p.html", ViewSettings())
    data = data_of(made.page)
    assert made.with_pictures == made.slides
    assert len({patch["image"] for patch in data["patches"]}) > 60
    assert "images without places" in made.page.read_text()


def test_what_cannot_be_shown_is_refused(cached_store, tmp_path):
    refused(g2l("view", cached_store, "--out", tmp_path / "p.html", "--slide", "p99"), "p99", "g2l store ls")
    refused(g2l("view", cached_store, "--out", tmp_path / "p.html", "--encoder", "uni"), "uni")
    refused(
        g2l("view", cached_store, "--out", tmp_path / "p.html", "--patches", "99999"), "--patches 99999: at most 2000"
    )
    (tmp_path / "file").write_text("")
    refused(g2l("view", cached_store, "--out", tmp_path / "file" / "p.html"), "file")
    assert not (tmp_path / "p.html").exists()

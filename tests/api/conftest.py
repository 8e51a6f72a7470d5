"""A small store with whatever a cohort may meet, and a plain reader of it that knows nothing of G2L."""

import os

import numpy as np
import pytest
import zarr

from g2l_core.patches.views import COLUMNS, ViewSpec, sample_views
from g2l_core.store import schema
from g2l_core.store.facts import EncoderFacts
from tests.store.toy import DIM, ENCODER, create, facts, fill, lay

SECOND = "efficientnet-lite0-64"
SIZES = {"a/x": 37, "b": 20, "d": 5, "set": 6}


@pytest.fixture(scope="module", autouse=True)
def without_waiting():
    """Nothing here is about a loss of power, so no file is waited for until it is on the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of 16 rows and chunks of 4, so that a few rows make several files."""
    monkeypatch.setattr(schema, "SHARD_ROWS", 16)
    monkeypatch.setattr(schema, "CHUNK_ROWS", 4)


def lay_images(store, slide_id, n):
    """A set of patch images with labels of their own."""
    coords, names = np.zeros((n, 2), np.int32), [f"im{i}.png" for i in range(n)]
    params = sample_views(ViewSpec(), slide_id, coords, range(2), names)
    known = facts(kind="patches", labels={"medical_center": "C"})
    slide = store.add_slide(slide_id, known, coords=coords, view_params=params, columns=COLUMNS, patch_ids=names)
    slide.set_patch_labels([{"patient_id": f"q{i % 2}"} if i else {} for i in range(n)])
    return slide


def make_store(path):
    """Three slides of two patients and a set of images; some patches are unreadable; `d` lacks the second encoder."""
    store = create(path)
    store.add_encoder(SECOND, EncoderFacts(name="efficientnet-lite0@64", digest="0" * 64, dim=DIM))
    for slide_id, n in SIZES.items():
        labels = {"patient_id": "p2" if slide_id == "d" else "p1", "medical_center": "B" if slide_id == "d" else "A"}
        slide = lay_images(store, slide_id, n) if slide_id == "set" else lay(store, slide_id, n, labels=labels)
        status = (np.arange(n) % 9 == 4).astype(np.uint8)
        fill(slide, status=status)
        if slide_id != "d":
            fill(slide, n_views=1, encoder=SECOND, status=status)
    store.fail_slide("zz", "/zz.svs", "no tissue", {"patient_id": "p9"})
    store.save_catalogue()
    return path


@pytest.fixture
def stored(tmp_path, small_shards):
    return make_store(tmp_path / "s.zarr")


@pytest.fixture
def usual(tmp_path):
    """The same store with shards of the usual size, for other processes."""
    return make_store(tmp_path / "s.zarr")


def plain(path, encoder=ENCODER, view=0):
    """Every patch as (slide_id, row, x, y, status, features), by Zarr alone."""
    root = zarr.open_group(path, mode="r")
    rows = []
    for slide_id in sorted(SIZES):
        slide = root[f"slides/{slide_id}"]
        coords, status = slide["coords"][:], slide["patch_status"][:]
        features = slide[f"features/{encoder}"][:, view] if encoder in slide["features"] else None
        for row in range(len(status)):
            values = None if features is None else features[row]
            rows.append((slide_id, row, *coords[row].tolist(), int(status[row]), values))
    return rows

"""Stored features in torch: equal to the store, in worker processes of any start method."""

import shutil

import numpy as np
import pytest
import torch
import zarr
from torch.utils.data import DataLoader

from g2l_core.errors import ManifestError, StoreMissingError, UnknownNameError
from g2l_core.store.features import FeatureStore
from g2l_core.store.torch_dataset import SlideFeatures

KEY = "timm-mobilenetv3_small_050-64-random0"


def require_equal(items, store, view=0):
    slides = list(FeatureStore.open(store).slides())
    assert [item["slide_id"] for item in items] == [slide.slide_id for slide in slides]
    for item, slide in zip(items, slides, strict=True):
        assert (item["features"].dtype, item["coords"].dtype) == (torch.float32, torch.int32)
        assert np.array_equal(item["features"].numpy(), slide.features(KEY, view=view).astype(np.float32))
        assert np.array_equal(item["coords"].numpy(), slide.coords)


def test_items_equal_the_store(cached_store):
    for view in (0, 2):
        dataset = SlideFeatures(cached_store, KEY, view=view)
        assert len(dataset) == 6
        items = [dataset[i] for i in range(6)]
        require_equal(items, cached_store, view)
        assert all(set(item) == {"features", "coords", "slide_id"} for item in items)
    with pytest.raises(IndexError):
        dataset[6]


def test_in_spawned_workers(cached_store):
    dataset = SlideFeatures(cached_store, KEY, label="medical_center")
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    items = list(loader)
    require_equal(items, cached_store)
    assert [item["label"] for item in items] == ["north", "south"] * 3


def test_unreadable_patches_are_left_out(cached_store, tmp_path):
    copy = shutil.copytree(cached_store, tmp_path / "copy.zarr")
    stored = FeatureStore.open(copy, writable=True).slide("p01-1")
    status = stored.patch_status
    status[1] = 1
    stored.put_table("patch_status", status)
    slide = zarr.open_group(copy)["slides/p01-1"]
    item = SlideFeatures(copy, KEY)[0]
    kept = np.delete(np.arange(slide["coords"].shape[0]), 1)
    assert np.array_equal(item["coords"], slide["coords"][:][kept])
    assert np.array_equal(item["features"], slide[f"features/{KEY}"][:, 0][kept].astype(np.float32))


def test_labels_that_are_missing(cached_store):
    known = "labels here: medical_center, patient_id"
    with pytest.raises(ManifestError, match=rf"no label 'grade' for slide p01-1, p02-1, p03-1 and 3 more; {known}"):
        SlideFeatures(cached_store, KEY, label="grade")


def test_features_that_are_missing(cached_store, tmp_path):
    with pytest.raises(StoreMissingError, match="view 3 of"):
        SlideFeatures(cached_store, KEY, view=3)
    with pytest.raises(UnknownNameError):
        SlideFeatures(cached_store, "h-optimus-0")
    with pytest.raises(StoreMissingError, match="there is no store"):
        SlideFeatures(tmp_path / "none", KEY)

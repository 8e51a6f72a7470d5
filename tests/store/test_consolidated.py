"""The copy of a slide's metadata: one file opens all arrays, it is never outdated, and nobody depends on it."""

import json

import numpy as np
import pytest
import zarr
from zarr.storage import LocalStore

from g2l_core.store.columns import write_column
from g2l_core.store.consolidated import KEY, consolidate
from g2l_core.store.features import FeatureStore
from g2l_core.store.verify import verify
from tests.store.toy import ENCODER, create, fill, lay


class Unlisted(LocalStore):
    """A store that cannot be listed, as a plain web server's; keeps the metadata documents that are asked for."""

    asked: list[str]

    async def get(self, key, *more, **options):
        if key.endswith("zarr.json"):
            self.asked.append(key)
        return await super().get(key, *more, **options)

    async def list_dir(self, prefix):
        raise NotImplementedError("there is no listing")
        yield


@pytest.fixture
def store(tmp_path):
    opened = create(tmp_path / "s.zarr")
    fill(lay(opened, "deep/a", n=30))
    return opened


def document(store):
    return json.loads((store.path / "slides/deep/a/zarr.json").read_text())


def test_one_document_opens_all_arrays_without_a_listing(store):
    consolidate(store.slides())
    unlisted = Unlisted(store.path, read_only=True)
    unlisted.asked = []
    group = zarr.open_group(unlisted, path="slides/deep/a", mode="r")
    assert unlisted.asked == ["slides/deep/a/zarr.json"]
    assert sorted(group.array_keys()) == ["coords", "patch_status", "pixel_hash", "view_params"]
    slide = store.slide("deep/a")
    np.testing.assert_array_equal(group[f"features/{ENCODER}"][:, 1], slide.features(ENCODER, view=1))
    np.testing.assert_array_equal(group["coords"][:], slide.coords)
    assert group.attrs["g2l"]["n_patches"] == 30
    assert unlisted.asked == ["slides/deep/a/zarr.json"]


def test_every_change_drops_the_copy_and_a_run_s_end_makes_it_again(store):
    consolidate(store.slides())
    first = document(store)
    consolidate(store.slides())
    assert document(store) == first
    slide = store.slide("deep/a")
    write_column(slide, "score", np.arange(30.0))
    assert KEY not in document(store)
    consolidate(store.slides())
    assert "columns/score" in document(store)[KEY]["metadata"]
    assert zarr.open_group(store.path, path="slides/deep/a")["columns/score"][3] == 3
    assert list(verify(FeatureStore.open(store.path))) == []


@pytest.mark.parametrize("content", [b"", b"[", b"[1]", b"\xff", b'{"zarr_format": 3, "attributes": {}'])
def test_a_damaged_document_is_left_as_it_is(store, content):
    path = store.path / "slides/deep/a/coords/zarr.json"
    path.write_bytes(content)
    before = document(store)
    consolidate([store.slide("deep/a")])
    after = document(store)
    assert after.pop(KEY, None) is None or content == b"[1]"
    assert after == before


def test_xarray_reads_a_slide(store):
    xarray = pytest.importorskip("xarray")
    consolidate(store.slides())
    tables = xarray.open_zarr(store.path / "slides/deep/a", consolidated=True)
    assert tables["view_params"].dims == ("patch", "view", "parameter")

"""Small shards, and a small store made of them."""

import pytest

from g2l_core.store import schema
from tests.store.toy import create, fill, lay


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of 16 rows and chunks of 4, so that a few rows make several files."""
    monkeypatch.setattr(schema, "SHARD_ROWS", 16)
    monkeypatch.setattr(schema, "CHUNK_ROWS", 4)


@pytest.fixture
def toy(tmp_path, small_shards):
    """Two slides of 20 rows and two views, all written."""
    store = create(tmp_path / "toy.zarr")
    for slide_id in ("a/x", "b/x"):
        fill(lay(store, slide_id))
    return store

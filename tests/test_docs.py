"""The Python of the documentation runs, and gives what its words say."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from g2l_core.store import schema
from g2l_core.store.features import FeatureStore

DOCS = Path(__file__).resolve().parents[1] / "docs"
KEY = "timm-mobilenetv3_small_050-64-random0"


@pytest.fixture
def in_docs_folder(cached_store, tmp_path, monkeypatch):
    """A folder with the store that the documents speak of."""
    shutil.copytree(cached_store, tmp_path / "s.zarr")
    monkeypatch.chdir(tmp_path)


def python_blocks(name):
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), re.DOTALL)


def test_store_format_examples(in_docs_folder, capsys):
    names = {}
    blocks = python_blocks("store-format.md")
    assert len(blocks) == 8
    for block in blocks:
        exec(block.replace("h-optimus-0", KEY).replace("hibou-l", KEY), names)
    slide = FeatureStore.open("s.zarr").slide("p01-1")
    assert np.array_equal(names["features"], slide.features(KEY, view=1))
    assert np.array_equal(names["coords"], slide.coords)
    assert np.array_equal(names["one_slide"].compute(), slide.features(KEY))
    assert names["similarity"] == pytest.approx(1)
    assert (names["slide_id"], names["row"]) == ("p06-1", len(FeatureStore.open("s.zarr").slide("p06-1")) - 1)
    assert [path.stem for path in names["files"]] == [f"p0{i}-1" for i in range(1, 7)]
    printed = capsys.readouterr().out
    assert "p06-1 torch.Size([" in printed
    assert "damaged" not in printed


def test_store_format_names_everything_that_a_store_has(cached_store):
    text = (DOCS / "store-format.md").read_text(encoding="utf-8")
    root = zarr.open_group(cached_store, mode="r")
    slide = root["slides/p01-1"]
    facts = slide.attrs["g2l"]
    known = [*root.attrs["g2l"], *root.attrs["g2l"]["grid"], *facts, *facts["features"][KEY]]
    known += [*facts["features"][KEY]["shards"]["0.0"], *slide.array_keys(), "patch_id", "reason"]
    assert [name for name in known if not re.search(rf"\b{name}\b", text)] == []
    assert f"format version {schema.FORMAT}" in text
    assert f"shard {schema.SHARD_ROWS} rows, 1 view; chunk {schema.CHUNK_ROWS} rows" in text
    for name in ("coords", "patch_status", "view_params", "pixel_hash"):
        assert re.search(rf"{name} +{slide[name].dtype} ", text)


def test_architecture_names_what_there_is():
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    steps = re.findall(r"^\| (\d+) \| .* \| `(\S+)` \| `(\w+)` \|$", page, re.MULTILINE)
    assert [int(number) for number, _, _ in steps] == list(range(1, 21))
    for _, module, name in steps:
        path = DOCS.parent / "g2l_core" / module
        source = (path / "__init__.py" if path.is_dir() else path).read_text(encoding="utf-8")
        assert re.search(rf"^(def |class |){name}\b", source, re.MULTILINE), f"{module} has no {name}"

"""The examples of docs/python.md run on a small store, and do what their words say."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import g2l_core as g2l
from g2l_core.store.features import FeatureStore
from g2l_core.store.verify import verify

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"
KEY = "timm-mobilenetv3_small_050-64-random0"


@pytest.fixture(scope="module")
def ran(cached_store, tmp_path_factory):
    """The folder in which all examples but the last ran one after another, and the names that they left."""
    folder, here = tmp_path_factory.mktemp("docs"), Path.cwd()
    shutil.copytree(cached_store, folder / "s.zarr")
    (folder / "tp53.csv").write_text("slide_id,tp53\np01-1,mut\np02-1,wt\np03-1,\nelsewhere,mut\n")
    names = {}
    os.chdir(folder)
    try:
        *blocks, last = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
        assert "scanpy" in last
        for block in blocks:
            exec(
                block.replace("h-optimus-0", KEY).replace("range(5)", "range(40)").replace("range(20)", "range(3)"),
                names,
            )
        yield folder, names, last.replace("h-optimus-0", KEY)
    finally:
        os.chdir(here)


def test_labels_and_parts(ran):
    _, names, _ = ran
    assert names["mutated"].slide_ids == ["p01-1"]
    assert any("1 slide (elsewhere) left out" in note for note in names["labeled"].notes)
    assert any("no tp53 for 4 slides" in note for note in names["labeled"].notes)
    assert set(names["part"].patches()["medical_center"]) == {"north"}


def test_copies_are_whole(ran):
    folder, _, _ = ran
    for name, ids in {"small": "12", "rest": "3", "both": "123"}.items():
        store = FeatureStore.open(folder / f"{name}.zarr")
        assert store.slide_ids() == [f"p0{i}-1" for i in ids]
        assert [problem for problem in verify(store) if problem.kind != "missing"] == []


def test_models_learn(ran):
    """As far as features of random weights allow; padding has no weight."""
    _, names, _ = ran
    torch, bags = names["torch"], names["bags"]
    assert (bags.classes, len(bags)) == (("north", "south"), 6)
    with torch.no_grad():
        outputs = [(names["linear"](batch["features"]), batch["target"]) for batch in names["batches"]]
        logits, targets = (torch.cat(values) for values in zip(*outputs, strict=True))
        assert torch.nn.functional.cross_entropy(logits, targets) < 0.68  # chance is log(2)
        batch = g2l.collate_bags([bags[i] for i in range(6)])
        scores = names["attention"](batch["features"])[..., 0].masked_fill(~batch["mask"], -torch.inf)
        weights = scores.softmax(1)
        assert not weights[~batch["mask"]].any()


def test_clusters_are_a_fixed_point_of_lloyd(ran):
    _, names, _ = ran
    features = names["store"].numpy(KEY, drop_unreadable=True).astype(np.float64)
    table = names["store"].patches(drop_unreadable=True)
    squares = ((features[:, None] - names["centers"][None]) ** 2).sum(2)
    assigned = table["cluster"].to_numpy().astype(int)
    before = np.array(
        [features[assigned == c].mean(0) if (assigned == c).any() else names["centers"][c] for c in range(8)]
    )
    inertia = squares[np.arange(len(features)), assigned].sum()
    assert inertia <= ((features - features.mean(0)) ** 2).sum()
    assert ((features - before[assigned]) ** 2).sum() <= inertia * (1 + 1e-3)


def test_nearest_patches(ran):
    _, names, _ = ran
    features = names["store"].numpy(KEY).astype(np.float64)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosine = pd.Series(unit @ unit[0]).dropna().sort_values(ascending=False)
    np.testing.assert_allclose(cosine[names["similar"].index], cosine.iloc[:10], rtol=1e-4)
    assert names["similar"].index[0] == 0


def test_the_heatmap(ran):
    folder, names, _ = ran
    tiles = json.loads((folder / "p01-1.geojson").read_text())["features"]
    table = names["store"].where(slides=["p01-1"]).patches(drop_unreadable=True)
    side = FeatureStore.open(folder / "s.zarr").slide("p01-1").facts.patch_px_level0
    assert [tile["geometry"]["coordinates"][0][0] for tile in tiles] == table[["x", "y"]].to_numpy().tolist()
    assert tiles[0]["geometry"]["coordinates"][0][2] == [int(table["x"][0]) + side, int(table["y"][0]) + side]
    assert [tile["properties"]["measurements"]["cluster"] for tile in tiles] == table["cluster"].tolist()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_umap_with_scanpy(ran):
    pytest.importorskip("scanpy")
    _, names, block = ran
    exec(block, names)
    assert names["cells"].obsm["X_umap"].shape == (len(names["cells"]), 2)


def test_slides_open_in_xarray(ran):
    xarray = pytest.importorskip("xarray")
    folder, names, _ = ran
    slide = xarray.open_zarr(folder / "s.zarr", group="slides/p01-1/features", consolidated=False)
    assert slide[KEY].dims == ("patch", "view", "feature")
    np.testing.assert_array_equal(slide[KEY][:, 0], names["store"].where(slides=["p01-1"]).numpy(KEY))
    tables = xarray.open_zarr(folder / "s.zarr", group="slides/p01-1", consolidated=False)
    assert tables["view_params"].dims == ("patch", "view", "parameter")

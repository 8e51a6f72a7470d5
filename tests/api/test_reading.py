"""What a cohort gives is what plain reading of the store, slide by slide, gives."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

import g2l_core as g2l
from g2l_core.errors import (
    ManifestError,
    StoreCorruptError,
    StoreMissingError,
    UnknownNameError,
    UsageError,
)
from g2l_core.store.features import FeatureStore
from tests.api.conftest import SECOND, plain
from tests.store.toy import ENCODER


def heavy_after(code):
    heavy = "torch", "pandas", "dask", "xarray", "zarr", "numpy", "sklearn", "anndata"
    code = f"import sys; {code}; print(*[name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.split()


def test_importing_is_light(usual):
    assert heavy_after("import g2l_core as g2l; dir(g2l)") == []
    assert heavy_after(f"import g2l_core as g2l; repr(g2l.open({str(usual)!r}))") == ["zarr", "numpy"]
    assert "torch" not in heavy_after(f"import g2l_core as g2l; g2l.open({str(usual)!r}).patches()")


def test_every_public_name_is_there():
    assert all(getattr(g2l, name) is not None for name in g2l.__all__)
    assert set(g2l.__all__) <= set(dir(g2l))
    with pytest.raises(AttributeError, match="has no attribute 'opne'"):
        g2l.opne  # noqa: B018


def test_what_a_cohort_says_of_itself(stored):
    said = "4 slides, 68 patches, toy (2 views), efficientnet-lite0-64 (3 of 4 slides)"
    assert repr(g2l.open(stored)) == f"<Cohort s.zarr: {said}, 1 slides failed>"
    part = g2l.open(stored).where("medical_center=A", n_patches=3)
    assert "2 slides, 6 patches" in repr(part)
    assert "where medical_center=A, 3 patches a slide (seed 0)" in repr(part)
    assert g2l.open(stored).failed == {"zz": "no tissue"}


def test_what_lies_below_a_cohort_says_of_itself(stored):
    store = FeatureStore.open(stored)
    assert repr(store) == f"<FeatureStore {stored}: 5 slides, toy, {SECOND}>"
    assert repr(store.slide("d")) == "<StoredSlide d: 5 patches, toy>"
    assert repr(g2l.open(stored).blocks(ENCODER)) == "<RowBlocks: 68 patches of toy by 4,096, in stored order>"


def test_the_table_of_patches(stored):
    table = g2l.open(stored).patches()
    assert list(table) == ["slide_id", "row", "x", "y", "status", "patch_id", "medical_center", "patient_id"]
    wanted = [(i, row, x, y, ["ok", "unreadable"][status]) for i, row, x, y, status, _ in plain(stored)]
    assert list(table[["slide_id", "row", "x", "y", "status"]].itertuples(index=False, name=None)) == wanted
    images = table[table["slide_id"] == "set"]
    assert images["patch_id"].tolist() == [f"im{i}.png" for i in range(6)]
    assert images["patient_id"].tolist()[1:] == ["q1", "q0", "q1", "q0", "q1"]
    assert images["patient_id"].isna().tolist() == [True] + [False] * 5
    assert table[table["slide_id"] != "set"]["patch_id"].isna().all()
    assert set(table.loc[table["slide_id"] == "d", "patient_id"]) == {"p2"}
    good = g2l.open(stored).patches(drop_unreadable=True)
    pd.testing.assert_frame_equal(good, table[table["status"] == "ok"].reset_index(drop=True))


def test_the_table_of_slides(stored):
    table = g2l.open(stored).slides()
    assert table["slide_id"].tolist() == ["a/x", "b", "d", "set"]
    assert table["n_patches"].tolist() == [37, 20, 5, 6]
    assert table["kind"].tolist() == ["slide"] * 3 + ["patches"]
    assert table["patch_px_level0"].tolist() == [257] * 4
    assert table["medical_center"].tolist() == ["A", "A", "B", "C"]


@pytest.mark.parametrize("view", [0, 1])
@pytest.mark.parametrize("drop", [False, True])
def test_arrays_equal_plain_reading(stored, tmp_path, view, drop):
    cohort = g2l.open(stored)
    wanted = np.stack([row[-1] for row in plain(stored, view=view) if not (drop and row[-2])])
    for cut, chosen in ((cohort, wanted), (cohort.where("slide_id=a/*"), None), (cohort.where(n_patches=9), None)):
        if chosen is None:
            places = {(row[0], row[1]): row[-1] for row in plain(stored, view=view)}
            table = cut.patches(drop_unreadable=drop)
            chosen = np.stack([places[key] for key in zip(table["slide_id"], table["row"], strict=True)])
        np.testing.assert_array_equal(cut.numpy(ENCODER, view=view, drop_unreadable=drop), chosen)
        lazy = cut.dask(ENCODER, view=view, drop_unreadable=drop)
        assert lazy.dtype == np.float16
        np.testing.assert_array_equal(lazy.compute(scheduler="sync"), chosen)
        np.testing.assert_array_equal(lazy[3:8, 1:3].compute(scheduler="sync"), chosen[3:8, 1:3])
        out = tmp_path / f"x{len(chosen)}.npy"
        mapped = cut.numpy(ENCODER, view=view, drop_unreadable=drop, out=out, mmap=True)
        assert isinstance(mapped, np.memmap)
        np.testing.assert_array_equal(mapped, chosen)
        np.testing.assert_array_equal(np.load(out), chosen)


def test_names_as_the_command_line_takes_them(stored):
    cohort = g2l.open(stored).where(slides=["a/x", "b"])
    for name in (SECOND, "efficientnet-lite0@64", "EfficientNet_lite0@64"):
        np.testing.assert_array_equal(cohort.numpy(name), cohort.numpy(SECOND))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 16, 1000])
def test_blocks_have_every_readable_patch_once(stored, shuffle, rows):
    table, features = g2l.open(stored).patches(), g2l.open(stored).numpy(ENCODER)
    blocks = g2l.open(stored).blocks(ENCODER, rows=rows, label="patient_id", shuffle=shuffle)
    found = list(blocks)
    assert {len(block) for block in found[:-1]} <= {rows}
    index = np.concatenate([block.index for block in found])
    good = np.flatnonzero(table["status"] == "ok")
    np.testing.assert_array_equal(np.sort(index), good)
    assert (index.tolist() == good.tolist()) == (not shuffle)
    np.testing.assert_array_equal(np.concatenate([block.features for block in found]), features[index])
    labels = table["patient_id"].astype("string").fillna("")
    assert np.concatenate([block.labels for block in found]).tolist() == labels[index].tolist()
    again = np.concatenate([block.index for block in blocks])
    assert again.tolist() == index.tolist()
    blocks.set_epoch(1)
    assert (np.concatenate([block.index for block in blocks]).tolist() == index.tolist()) == (not shuffle)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_torch(usual, workers):
    cohort = g2l.open(usual)
    table, features = cohort.patches(), cohort.numpy(ENCODER)
    batches = cohort.torch(ENCODER, batch_size=8, label="patient_id")
    found = list(
        DataLoader(batches, batch_size=None, num_workers=workers, multiprocessing_context="spawn" if workers else None)
    )
    index = torch.cat([batch["index"] for batch in found]).numpy()
    np.testing.assert_array_equal(np.sort(index), np.flatnonzero(table["status"] == "ok"))
    np.testing.assert_array_equal(torch.cat([batch["features"] for batch in found]).numpy(), features[index])
    assert batches.classes == ("p1", "p2", "q0", "q1")
    targets = torch.cat([batch["target"] for batch in found]).tolist()
    names = table["patient_id"].astype("string").fillna("")[index]
    assert targets == [batches.classes.index(name) if name else -1 for name in names]


def test_bags_equal_plain_reading(stored):
    cohort = g2l.open(stored)
    table, features = cohort.patches(), cohort.numpy(ENCODER)
    bags = cohort.bags(ENCODER, by="patient_id", label="medical_center", missing="skip")
    assert bags.names == ("p1", "p2", "q0", "q1")
    assert bags.labels == {"p1": "A", "p2": "B", "q0": "C", "q1": "C"}
    assert bags.skipped == {"set": "patches without patient_id"}
    for item, name in zip(bags, bags.names, strict=False):
        members = np.flatnonzero((table["patient_id"] == name) & (table["status"] == "ok"))
        np.testing.assert_array_equal(item["index"], members)
        np.testing.assert_array_equal(item["features"], features[members].astype(np.float32))
        np.testing.assert_array_equal(item["coords"], table.loc[members, ["x", "y"]])
        assert (item["bag"], item["target"]) == (name, "ABC".index(bags.labels[name]))
    assert repr(bags) == "<PatchBags: 4 by patient_id of toy, medical_center: 1 A, 1 B, 2 C, 1 skipped>"


def test_drawn_bags(stored):
    whole = g2l.open(stored).bags(ENCODER)
    bags = g2l.open(stored).bags(ENCODER, max_patches=6)
    seen = set()
    for epoch in range(3):
        bags.set_epoch(epoch)
        items = [bags[i] for i in range(len(bags))]
        assert [len(item["index"]) for item in items] == [6, 6, 4, 5]
        for drawn, full in zip(items, whole, strict=False):
            places = torch.searchsorted(full["index"], drawn["index"])
            assert torch.equal(full["index"][places], drawn["index"])
            assert torch.equal(full["features"][places], drawn["features"])
            assert torch.equal(full["coords"][places], drawn["coords"])
        assert torch.equal(bags[0]["index"], items[0]["index"])
        seen.add(tuple(items[0]["index"].tolist()))
    assert len(seen) == 3


def test_collated_bags(stored):
    bags = g2l.open(stored).bags(ENCODER, label="medical_center")
    (batch,) = DataLoader(bags, batch_size=4, collate_fn=g2l.collate_bags)
    assert batch["mask"].sum(1).tolist() == [len(bags[i]["index"]) for i in range(4)]
    for i in range(4):
        n = len(bags[i]["index"])
        for key in ("features", "coords", "index"):
            assert torch.equal(batch[key][i, :n], bags[i][key])
        assert not batch["features"][i, n:].any()
        assert (batch["index"][i, n:] == -1).all()
    assert (batch["bag"], batch["target"].tolist()) == (["a/x", "b", "d", "set"], [0, 0, 1, 2])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_bags_in_worker_processes(usual, method):
    bags = g2l.open(usual).bags(ENCODER, max_patches=9)
    loader = DataLoader(bags, batch_size=None, num_workers=2, multiprocessing_context=method)
    for item, wanted in zip(loader, bags, strict=False):
        assert torch.equal(item["features"], wanted["features"])
        assert item["bag"] == wanted["bag"]


def test_a_bag_with_two_labels(stored):
    FeatureStore.open(stored, writable=True).slide("b").set_labels({"patient_id": "p1", "medical_center": "D"})
    with pytest.raises(ManifestError, match="each bag has one medical_center, but p1 has A and D"):
        g2l.open(stored).where("patient_id=p*").bags(ENCODER, by="patient_id", label="medical_center")


def test_features_that_are_missing(stored):
    cohort = g2l.open(stored)
    for read in (cohort.numpy, cohort.dask, cohort.blocks, cohort.bags, cohort.torch):
        with pytest.raises(
            StoreMissingError, match=r"slide d has no features of efficientnet-lite0-64 yet.*where\(enc"
        ):
            read(SECOND)
        with pytest.raises(StoreMissingError, match="slide a/x: view 5 of toy is not complete"):
            read(ENCODER, view=5)
        with pytest.raises(UnknownNameError, match="unknown encoder 'toyy'. Did you mean toy"):
            read("toyy")
    assert cohort.bags(SECOND, missing="skip").names == ("a/x", "b", "set")
    assert "slide d has no features" in cohort.bags(SECOND, missing="skip").skipped["d"]
    index = np.concatenate([block.index for block in cohort.blocks(SECOND, missing="skip")])
    table = cohort.patches()
    np.testing.assert_array_equal(index, np.flatnonzero((table["status"] == "ok") & (table["slide_id"] != "d")))
    assert cohort.where(encoders=["efficientnet-lite0@64"]).slide_ids == ["a/x", "b", "set"]
    with pytest.raises(StoreMissingError, match="no slide with features of efficientnet-lite0-64"):
        cohort.where(slides=["d"]).bags(SECOND, missing="skip")


def test_names_that_are_not_there(stored, tmp_path):
    cohort = g2l.open(stored)
    with pytest.raises(UnknownNameError, match="unknown column 'medical_centre'. Did you mean medical_center"):
        cohort.where("medical_centre=A")
    for read in (cohort.bags, cohort.blocks, cohort.torch):
        with pytest.raises(UnknownNameError, match="unknown column 'grade'"):
            read(ENCODER, label="grade")
    with pytest.raises(UnknownNameError, match="unknown slide 'bb'"):
        cohort.where(slides=["bb"])
    with pytest.raises(StoreMissingError, match="there is no store at"):
        g2l.open(tmp_path / "none.zarr")


def test_arguments_that_cannot_be_used(stored, tmp_path):
    cohort = g2l.open(stored)
    with pytest.raises(UsageError, match="expected COLUMN=PATTERN"):
        cohort.where("medical_center")
    with pytest.raises(UsageError, match="n_patches must be at least 1; got 0"):
        cohort.where(n_patches=0)
    with pytest.raises(UsageError, match="max_patches must be at least 1"):
        cohort.bags(ENCODER, max_patches=0)
    with pytest.raises(UsageError, match="a block has at least 1 row"):
        cohort.blocks(ENCODER, rows=0)
    with pytest.raises(UsageError, match="missing must be refuse or skip; got 'ignore'"):
        cohort.bags(ENCODER, missing="ignore")
    with pytest.raises(UsageError, match="mmap=True needs a file"):
        cohort.numpy(ENCODER, mmap=True)
    with pytest.raises(UsageError, match=r"must end in \.npy"):
        cohort.numpy(ENCODER, out=tmp_path / "x.bin")


def test_damage_is_noticed(stored):
    """The quick way of reading small tables sees what Zarr sees."""
    path = stored / "slides/b/coords/c.0.0"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreCorruptError, match="slide b: coords"):
        g2l.open(stored).patches()


def test_packages_that_are_not_there(stored, tmp_path, monkeypatch):
    for package in ("xarray", "anndata", "pyarrow"):
        monkeypatch.setitem(sys.modules, package, None)
    cohort = g2l.open(stored)
    with pytest.raises(UsageError, match=r'store.xarray needs xarray: pip install "g2l\[xarray\]"'):
        cohort.xarray(ENCODER)
    with pytest.raises(UsageError, match=r'pip install "g2l\[anndata\]"'):
        cohort.anndata(ENCODER)
    with pytest.raises(UsageError, match=r'pip install "g2l\[parquet\]"'):
        cohort.to_parquet(tmp_path / "x.parquet")


def test_as_xarray(stored):
    pytest.importorskip("xarray")
    cohort = g2l.open(stored)
    array = cohort.xarray(ENCODER)
    assert array.dims == ("patch", "feature")
    np.testing.assert_array_equal(array.values, cohort.numpy(ENCODER))
    assert array["slide_id"].values.tolist() == cohort.patches()["slide_id"].tolist()
    means = array.where(array["status"] == "ok", drop=True).astype("float64").groupby("slide_id").mean()
    wanted = np.mean([row[-1].astype(float) for row in plain(stored) if row[0] == "b" and not row[-2]], axis=0)
    np.testing.assert_allclose(means.sel(slide_id="b").values, wanted)


def test_as_anndata(stored):
    pytest.importorskip("anndata")
    cohort = g2l.open(stored).where("slide_id=[ab]*")
    cells = cohort.anndata([ENCODER, "efficientnet-lite0@64"])
    table = cohort.patches(drop_unreadable=True)
    np.testing.assert_array_equal(cells.X, cohort.numpy(ENCODER, drop_unreadable=True).astype(np.float32))
    np.testing.assert_array_equal(cells.obsm[f"X_{SECOND}"], cohort.numpy(SECOND, drop_unreadable=True))
    np.testing.assert_array_equal(cells.obsm["spatial"], table[["x", "y"]])
    assert cells.obs["slide_id"].tolist() == table["slide_id"].tolist()
    assert cells.obs_names[0] == "a/x#0"
    few = cohort.anndata(ENCODER, max_patches=10)
    assert (len(few), few.uns["g2l"]["patches_before_draw"]) == (10, len(cells))
    np.testing.assert_array_equal(few.X, cells[few.obs_names].X)


def test_as_parquet(stored, tmp_path):
    pytest.importorskip("pyarrow")
    cohort = g2l.open(stored)
    path = cohort.to_parquet(tmp_path / "x.parquet", encoder=ENCODER, drop_unreadable=True)
    table = pd.read_parquet(path)
    features = np.stack(table.pop("features").to_numpy())
    np.testing.assert_array_equal(features, cohort.numpy(ENCODER, drop_unreadable=True).astype(np.float32))
    wanted = cohort.patches(drop_unreadable=True)
    for name in wanted:
        assert table[name].astype("string").fillna("").tolist() == wanted[name].astype("string").fillna("").tolist()
    assert list(pd.read_parquet(cohort.to_parquet(tmp_path / "y.parquet"))) == list(wanted)

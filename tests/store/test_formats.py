"""Exports read again with h5py, NumPy, torch and Zarr, and by the readers of other tools that are installed."""

import csv

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from croma import CRoMa
from typer.testing import CliRunner

from g2l_core.errors import StoreMissingError, UnknownNameError, UsageError
from g2l_core.patches.views import COLUMNS, ViewSpec, sample_views
from g2l_core.store import export
from g2l_core.store.export import FORMATS, SLIDES_FILE, export_features
from g2l_core.store.facts import EncoderFacts
from g2l_core.store.features import Shard
from g2l_core.store.formats.journal import JOURNAL
from pipeline.cli.main import app
from tests.store.toy import DIM, ENCODER, create, facts, features_of, fill, lay

OTHER = "other"


@pytest.fixture
def store(tmp_path_factory, small_shards):
    """Slides a/x, b/x (20 patches) and e (37, two of them unreadable), the latter two with a second encoder."""
    store = create(tmp_path_factory.mktemp("store") / "s.zarr")
    labels = {"patient_id": "p1", "medical_center": "north", "grade": "low", "split": "train"}
    fill(lay(store, "a/x", labels=labels))
    fill(lay(store, "b/x", labels={**labels, "patient_id": "p2", "medical_center": "south", "grade": "high"}))
    status = np.zeros(37, np.uint8)
    status[2], status[33] = 1, 3
    fill(lay(store, "e", n=37, labels={**labels, "patient_id": "p3", "grade": "=high"}), status=status)
    return store


def add_images(store, slide_id="images"):
    names = ["one.png", "two.png", "../sub/three.png"]
    params = sample_views(ViewSpec(), slide_id, np.zeros((3, 2), np.int32), range(2), names)
    described = facts(kind="patches", source="/images", labels={"medical_center": "south"})
    slide = store.add_slide(
        slide_id,
        described,
        coords=np.zeros((3, 2), np.int32),
        view_params=params,
        columns=COLUMNS,
        patch_ids=names,
    )
    slide.set_patch_labels([{"grade": "low"}, {"grade": "high"}, {}])
    fill(slide)
    return slide


def add_other(store, *slide_ids):
    store.add_encoder(OTHER, EncoderFacts(digest="0" * 64, dim=DIM))
    for slide_id in slide_ids:
        slide = store.slide(slide_id)
        fill(slide, encoder=OTHER, status=slide.patch_status)


def good(store, slide_id, encoder=ENCODER):
    slide = store.slide(slide_id)
    rows = slide.patch_status == 0
    return slide.features(encoder)[rows], slide.coords[rows]


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


EVERY = {
    "encoder": ENCODER,
    "encoder_digest": "0" * 64,
    "mpp": 0.5,
    "patch_px": 256,
    "patch_size_level0": 257,
    "slide_mpp": 0.499,
    "view": 0,
    "view_px": 224,
    "view_is": "the 224 px center crop of the 256 px patch",
}


def require_said(attributes, slide_id, **expected):
    for key, value in {**EVERY, "slide_id": slide_id, **expected}.items():
        assert attributes[key] == value, key


def test_clam(store, tmp_path):
    done = export_features(store, tmp_path, "clam")
    assert (done.slides, done.patches, done.left_out) == (3, 75, {})
    assert done.unreadable == {"unreadable": 1, "black": 1}
    for slide_id in ("a/x", "b/x", "e"):
        features, coords = good(store, slide_id)
        folder = tmp_path / f"features_{ENCODER}"
        tensor = torch.load(folder / f"pt_files/{slide_id}.pt", weights_only=True)
        assert tensor.dtype == torch.float32
        assert np.array_equal(tensor.numpy(), features)
        with h5py.File(folder / f"h5_files/{slide_id}.h5") as file, h5py.File(tmp_path / f"patches/{slide_id}.h5") as p:
            assert np.array_equal(file["features"][:], features)
            assert file["features"].dtype == np.float32
            assert np.array_equal(file["coords"][:], coords)
            assert (file["coords"].dtype, p["coords"].dtype) == (np.int32, np.int32)
            assert np.array_equal(p["coords"][:], coords)
            assert (p["coords"].attrs["patch_size"], p["coords"].attrs["patch_level"]) == (257, 0)
            require_said(file.attrs, slide_id)
            assert p.attrs["view_px"] == 224


def test_stamp_coordinates_are_micrometers(store, tmp_path):
    export_features(store, tmp_path, "stamp-h5")
    features, coords = good(store, "e")
    with h5py.File(tmp_path / ENCODER / "e.h5") as file:
        assert np.array_equal(file["feats"][:], features)
        assert file["feats"].dtype == np.float16
        assert np.allclose(file["coords"][:], coords * 0.499)
        assert (file.attrs["unit"], file.attrs["tile_size_um"], file.attrs["tile_size_px"]) == ("um", 128.0, 256)
        assert (file.attrs["extractor"], file.attrs["feat_type"]) == (ENCODER, "tile")
        require_said(file.attrs, "e")


def test_stamp_leaves_out_slides_without_a_scale(store, tmp_path):
    fill(lay(store, "unscaled", mpp=None))
    done = export_features(store, tmp_path, "stamp-h5")
    assert done.left_out == {"unscaled": "its um/px is not known, and the coordinates of stamp-h5 are micrometers"}
    assert not (tmp_path / ENCODER / "unscaled.h5").exists()


def test_atlaspatch_has_all_encoders_in_one_file(store, tmp_path):
    add_other(store, "a/x", "b/x", "e")
    export_features(store, tmp_path, "atlaspatch-h5")
    features, coords = good(store, "e")
    with h5py.File(tmp_path / "patches/e.h5") as file:
        assert set(file["features"]) == {ENCODER, OTHER}
        assert np.array_equal(file[f"features/{ENCODER}"][:], features)
        assert file[f"features/{OTHER}"].attrs["encoder_digest"] == "0" * 64
        assert np.array_equal(file["coords"][:, :2], coords)
        assert (file["coords"][:, 2:] == [257, 257, 0]).all()
        assert (file.attrs["patch_size_level0"], file.attrs["patch_size"], file.attrs["target_magnification"]) == (
            257, 256, 20,
        )  # fmt: skip


def test_atlaspatch_reads_it(store, tmp_path):
    reader = pytest.importorskip("atlas_patch.utils.feature_h5")
    export_features(store, tmp_path, "atlaspatch-h5")
    found = reader.load_patch_feature_data(tmp_path / "patches/e.h5", ENCODER)
    features, coords = good(store, "e")
    assert np.array_equal(found.features, features)
    assert np.array_equal(found.coords[:, :2], coords)
    assert (found.patch_size_level0, found.patch_size, found.target_magnification) == (257, 256, 20)


def test_raw2features(store, tmp_path):
    add_other(store, "a/x", "b/x", "e")
    export_features(store, tmp_path, "raw2features")
    root = zarr.open_group(tmp_path / "e.embeddings.zarr", mode="r")
    grid = root["grids/mpp0.5_px256"]
    features, coords = good(store, "e")
    assert np.array_equal(grid["coords"][:], coords)
    assert np.array_equal(grid[f"features/{ENCODER}"][:], features)
    assert np.array_equal(grid[f"features/{OTHER}"][:], features)
    assert np.array_equal(grid["grid_index"][:], coords[:, ::-1] // 257)
    header = grid.attrs["raw2features"]
    assert (header["patching"]["level0_patch"], header["patching"]["n_patches"]) == (257, 35)
    assert root.attrs["raw2features"]["grids"]["mpp0.5_px256"]["models"] == [ENCODER, OTHER]
    assert header["g2l"]["view_px"] == 224


def test_raw2features_accepts_it(store, tmp_path):
    spec = pytest.importorskip("raw2features.spec")
    export_features(store, tmp_path, "raw2features")
    for slide_id in ("a/x", "b/x", "e"):
        assert spec.validate_store(str(tmp_path / f"{slide_id}.embeddings.zarr")) == []


def test_eva_slides_and_images(store, tmp_path):
    add_images(store)
    export_features(store, tmp_path, "eva", label="grade")
    rows = read(tmp_path / ENCODER / "manifest.csv")
    assert [row["grade"] for row in read(tmp_path / ENCODER / "classes.csv")] == ["'=high", "high", "low"]
    assert [(r["origin"], r["target"], r["split"], r["wsi_id"]) for r in rows[:3]] == [
        ("a/x", "2", "train", "a/x"), ("b/x", "1", "train", "b/x"), ("e", "0", "train", "e"),
    ]  # fmt: skip
    assert [r["target"] for r in rows[3:]] == ["2", "1", ""]
    for row in rows[:3]:
        values = torch.load(tmp_path / ENCODER / row["embeddings"], weights_only=True)
        assert np.array_equal(values.numpy(), good(store, row["wsi_id"])[0])
    images = [torch.load(tmp_path / ENCODER / row["embeddings"], weights_only=True).numpy() for row in rows[3:]]
    assert np.array_equal(np.stack(images), store.slide("images").features(ENCODER))
    assert (tmp_path / ENCODER / "images/up/sub/three.png.pt").exists()  # not outside of the folder


def test_eva_reads_it(store, tmp_path):
    from g2l_core.encoders.timm_compat import import_timm

    import_timm()
    datasets = pytest.importorskip("eva.core.data.datasets.classification")
    export_features(store, tmp_path, "eva", label="grade")
    dataset = datasets.MultiEmbeddingsClassificationDataset(str(tmp_path / ENCODER), "manifest.csv", split="train")
    dataset.setup()
    assert len(dataset) == 3
    assert np.array_equal(dataset.load_embeddings(2).numpy(), good(store, "e")[0])
    assert [int(dataset.load_target(i)) for i in range(3)] == [2, 1, 0]


def test_croma_computes_on_it(tmp_path, small_shards):
    store = create(tmp_path / "s.zarr")
    for i in range(8):
        fill(lay(store, f"s{i}", labels={"medical_center": "ns"[i % 2], "grade": "lh"[i // 4], "patient_id": f"p{i}"}))
    export_features(store, tmp_path / "out", "croma", label="grade")
    values = np.load(tmp_path / "out" / f"{ENCODER}.npy")
    manifest = pd.read_csv(tmp_path / "out" / f"{ENCODER}.csv", keep_default_na=False)
    assert np.array_equal(values, np.concatenate([good(store, f"s{i}")[0] for i in range(8)]))
    assert list(manifest.group_id.unique()) == [f"p{i}" for i in range(8)]
    assert manifest.sample_id.is_unique
    found = CRoMa.compute(values, manifest, confounder_column="medical_center", m=5)
    assert np.isfinite(found.value)


def test_pathorob_features_by_center(store, tmp_path):
    add_images(store)
    export_features(store, tmp_path, "pathorob", label="grade")
    rows = read(tmp_path / "metadata/cohort.csv")
    assert len(rows) == 20 + 20 + 35 + 2  # the third image has no class
    by_id = {}
    for center in ("north", "south"):
        with np.load(tmp_path / f"features/{ENCODER}/cohort/{center}.npz") as file:
            by_id |= dict(file)
    # FeatureDataManager.load_features: ids are slide_id-patch_id, in the order of the metadata
    features = np.stack([by_id[f"{row['slide_id']}-{row['patch_id']}"] for row in rows])
    wanted = [good(store, slide_id)[0] for slide_id in ("a/x", "b/x", "e", "images")]
    assert np.array_equal(features, np.concatenate(wanted)[:-1])
    assert len(by_id) == len(rows)


def test_npy_and_its_index(store, tmp_path):
    add_images(store)
    export_features(store, tmp_path, "npy", view=1)
    values = np.load(tmp_path / f"{ENCODER}.npy", mmap_mode="r")
    assert (values.dtype, values.shape) == (np.float16, (78, DIM))
    rows = read(tmp_path / f"{ENCODER}.csv")
    wanted = features_of("e", 37, 2)[store.slide("e").patch_status == 0, 1]
    of_e = [i for i, row in enumerate(rows) if row["slide_id"] == "e"]
    assert np.array_equal(values[of_e], wanted)
    assert np.array_equal([[int(rows[i]["x"]), int(rows[i]["y"])] for i in of_e], good(store, "e")[1])
    assert [row["grade"] for row in rows[-3:]] == ["low", "high", ""]
    assert rows[-1]["patch"] == "../sub/three.png"


def test_parquet(store, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    export_features(store, tmp_path, "parquet")
    table = parquet.read_table(tmp_path / f"{ENCODER}.parquet")
    assert table.schema.metadata[b"encoder_digest"] == b"0" * 64
    frame = table.to_pandas()
    of_e = frame[frame.slide_id == "e"]
    features, coords = good(store, "e")
    assert np.array_equal(np.stack(of_e.features), features)
    assert np.array_equal(of_e[["x", "y"]], coords)
    assert set(of_e.grade) == {"=high"}


# -- what is left out -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", sorted(set(FORMATS) - {"parquet"}))
def test_what_is_left_out_is_named(store, tmp_path, layout):
    add_other(store, "a/x", "b/x")
    store.fail_slide("gone", "/gone.svs", "no reader opens it", {"grade": "low"})
    path = store.slide("b/x").shard_path(ENCODER, Shard(0, 16, 0))
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    done = export_features(store, tmp_path / "out", layout, label="grade")
    assert list(done.left_out) == ["gone", f"b/x, {ENCODER}", f"e, {OTHER}"]
    assert done.left_out["gone"] == "it failed in stage one: no reader opens it"
    assert str(path) in done.left_out[f"b/x, {ENCODER}"] or "rows 0 to" in done.left_out[f"b/x, {ENCODER}"]
    assert done.slides == 3
    assert not list((tmp_path / "out").rglob("*partial*"))
    command = ["store", "export", store.path, "--out", tmp_path / "o", "--format", layout, "--label", "grade"]
    told = CliRunner().invoke(app, list(map(str, command)))
    assert told.exit_code == 1
    assert "left out  gone: it failed in stage one: no reader opens it" in told.stderr
    assert "patches that are not exported: 1 unreadable, 1 black" in told.stdout


def test_images_are_named_where_coordinates_are_needed(store, tmp_path):
    add_images(store)
    done = export_features(store, tmp_path, "clam")
    assert done.left_out == {"images": "it is a set of patch images: clam needs coordinates on a slide"}


def test_some_slides_and_some_encoders(store, tmp_path):
    add_other(store, "a/x")
    done = export_features(store, tmp_path, "npy", encoders=[OTHER], where={"grade": "l*", "slide_id": "a/*"})
    assert (done.slides, done.left_out) == (1, {})
    assert sorted(path.name for path in tmp_path.glob("o*")) == ["other.csv", "other.npy"]
    assert [row["slide_id"] for row in read(tmp_path / SLIDES_FILE)] == ["a/x"]


def test_refusals(store, tmp_path):
    for layout in ("croma", "pathorob"):
        with pytest.raises(UsageError, match=f"format {layout} asks for classes: name their column with --label"):
            export_features(store, tmp_path, layout)
    with pytest.raises(UsageError, match="--label stage: no slide has that column; there is grade, medical_center"):
        export_features(store, tmp_path, "eva", label="stage")
    with pytest.raises(UsageError, match="no slide of .* fits grade=none; its columns are grade, medical_center"):
        export_features(store, tmp_path, "eva", where={"grade": "none"})
    with pytest.raises(UnknownNameError, match="unknown format 'clan'. Did you mean clam"):
        export_features(store, tmp_path, "clan")
    with pytest.raises(UnknownNameError, match="unknown encoder 'tyo'"):
        export_features(store, tmp_path, "clam", encoders=["tyo"])
    with pytest.raises(StoreMissingError, match="no slide with patches"):
        export_features(create(tmp_path / "empty.zarr"), tmp_path / "out", "clam")


def test_slides_file_has_the_labels(store, tmp_path):
    export_features(store, tmp_path, "trident-h5")
    rows = read(tmp_path / SLIDES_FILE)
    assert [row["slide_id"] for row in rows] == ["a/x", "b/x", "e"]
    assert rows[2] == {"slide_id": "e", "grade": "'=high", "medical_center": "north", "patient_id": "p3",
                       "split": "train"}  # fmt: skip


# -- again ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [name for name, form in FORMATS.items() if form.write_slide])
def test_a_second_call_writes_only_what_changed(store, tmp_path, layout, monkeypatch):
    first = export_features(store, tmp_path / "out", layout)
    stamps = {path: path.stat().st_mtime_ns for path in first.files}
    second = export_features(store, tmp_path / "out", layout)
    assert (second.files, second.unreadable, second.patches) == (first.files, first.unreadable, first.patches)
    assert {path: path.stat().st_mtime_ns for path in second.files} == stamps
    file = next(path for path in first.files if path.parent.name == "b")
    if file.is_file():
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.rename(file.with_name("moved"))
    store.slide("e").set_labels({"grade": "new"})  # what a slide's facts say may stand in its files
    calls = []
    form = FORMATS[layout]

    def counted(item, cohort, folder):
        calls.append(item.slide_id)
        return form.write_slide(item, cohort, folder)

    monkeypatch.setitem(export.FORMATS, layout, export.Format(about="", write_slide=counted, needs_coords=True))
    third = export_features(store, tmp_path / "out", layout)
    assert third.files == first.files
    assert calls == ["b/x", "e"]


def test_another_view_or_encoder_is_another_export(store, tmp_path):
    (first, *_) = export_features(store, tmp_path, "trident-h5").files
    export_features(store, tmp_path, "trident-h5", view=1)
    with h5py.File(first) as file:
        assert np.array_equal(file["features"][:], features_of("a/x", 20, 2)[:, 1])
        assert file.attrs["view"] == 1
        assert file.attrs["view_is"].startswith("augmented view 1; view 0 is the 224 px center crop")


def test_an_export_that_stopped_goes_on(store, tmp_path, monkeypatch):
    form = FORMATS["clam"]

    def dies(item, cohort, folder):
        if item.slide_id == "b/x":
            raise KeyboardInterrupt
        return form.write_slide(item, cohort, folder)

    with monkeypatch.context() as patched:
        patched.setitem(export.FORMATS, "clam", export.Format(about="", write_slide=dies))
        with pytest.raises(KeyboardInterrupt):
            export_features(store, tmp_path / "out", "clam")
    with (tmp_path / "out" / JOURNAL).open("a") as file:
        file.write('{"content": "torn')
    done = export_features(store, tmp_path / "out", "clam")
    whole = export_features(store, tmp_path / "whole", "clam")
    assert [p.relative_to(tmp_path / "out") for p in done.files] == [
        p.relative_to(tmp_path / "whole") for p in whole.files
    ]
    for one, other in zip(done.files, whole.files, strict=True):
        assert one.read_bytes() == other.read_bytes()
    export_features(store, tmp_path / "out", "clam")
    lines = (tmp_path / "out" / JOURNAL).read_text().splitlines()
    assert sum("/e.h5" in line for line in lines) == 1

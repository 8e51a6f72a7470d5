"""Packs, archives and what is made ready for others: `g2l store pack`, `compact` and `publish`."""

import hashlib
import json
import pathlib
import re

import numpy as np
import pytest
import yaml
import zarr
from hypothesis import given
from hypothesis import strategies as st

import g2l_core as g2l_api
from g2l_core.api.archive import round_bits
from g2l_core.api.packs import pack_path
from g2l_core.errors import StoreCorruptError, StoreMissingError, UsageError
from g2l_core.store.export import export_features
from g2l_core.store.features import FeatureStore
from g2l_core.store.slide import StoredSlide
from g2l_core.store.verify import verify
from pipeline.store_edit import usage
from tests.api.conftest import SECOND, make_store
from tests.pipeline.test_cli import g2l, refused
from tests.store.toy import DIM, ENCODER, create, fill, lay, put_features


@pytest.fixture
def store(tmp_path):
    """Slides a/x (37 patches), b (20), d (5, without the second encoder) and a set of 6 images."""
    return make_store(tmp_path / "s.zarr")


def told(*arguments):
    done = g2l(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- packs --------------------------------------------------------------------------------------------------


def test_a_pack_has_every_row_and_is_what_is_read(store, monkeypatch):
    cohort = g2l_api.open(store)
    before, drawn = cohort.numpy(ENCODER), cohort.where(n_patches=3, seed=1).numpy(ENCODER)
    plan = told("store", "pack", store, "--encoder", ENCODER, "--dry-run")["packs"][ENCODER]
    assert (plan["rows"], plan["slides"], plan["bytes"]) == (68, 4, 68 * DIM * 2)
    assert not pack_path(store, ENCODER, 0).exists()
    assert "68 rows of 4 slides" in g2l("store", "pack", store, "--encoder", ENCODER).stdout
    plain = np.load(pack_path(store, ENCODER, 0), mmap_mode="r")
    np.testing.assert_array_equal(plain, before)

    monkeypatch.setattr(StoredSlide, "read_unproven_rows", lambda *_, **__: pytest.fail("a shard was read"))
    cohort = g2l_api.open(store)
    np.testing.assert_array_equal(cohort.numpy(ENCODER), before)
    np.testing.assert_array_equal(cohort.where(n_patches=3, seed=1).numpy(ENCODER), drawn)
    blocks = np.concatenate([block.features for block in cohort.blocks(ENCODER, rows=7)])
    np.testing.assert_array_equal(blocks, before[np.isfinite(before).all(1)].astype(np.float32))
    places = [67, 0, 12, 12, 40]
    np.testing.assert_array_equal(cohort.numpy(ENCODER, rows=places), before[places])
    monkeypatch.undo()
    assert usage(store)["packs"] > plain.nbytes
    assert [problem for problem in verify(FeatureStore.open(store)) if problem.kind == "damaged"] == []


def test_rows_without_a_pack_and_rows_that_are_not_there(store):
    cohort = g2l_api.open(store)
    everything = cohort.numpy(ENCODER)
    np.testing.assert_array_equal(cohort.numpy(ENCODER, rows=[50, 3]), everything[[50, 3]])
    assert cohort.numpy(ENCODER, rows=[]).shape == (0, DIM)
    for rows in ([68], [-1]):
        with pytest.raises(UsageError, match="there is no row"):
            cohort.numpy(ENCODER, rows=rows)


def test_slides_that_changed_since_are_read_from_their_shards(store):
    g2l_api.open(store).pack(ENCODER)
    opened = FeatureStore.open(store, writable=True)
    opened.remove_slide("b")
    slide = opened.slide("a/x")
    for shard in slide.shards([0]):
        slide.drop(ENCODER, shard)
    status = slide.patch_status
    wanted = fill(opened.slide("a/x"), status=status)[:, 0] * 2  # other features than were packed
    slide = opened.slide("a/x")
    put_features(slide, ENCODER, wanted)
    np.testing.assert_array_equal(g2l_api.open(store).where(slides=["a/x"]).numpy(ENCODER), wanted)
    assert g2l_api.open(store).numpy(ENCODER).shape == (48, DIM)


@pytest.mark.parametrize("harm", ["flip", "short", "index", "gone"])
def test_a_damaged_pack_never_gives_wrong_rows(store, harm):
    cohort = g2l_api.open(store)
    before, path = cohort.numpy(ENCODER), cohort.pack(ENCODER)
    content = path.read_bytes()
    if harm == "flip":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        with pytest.raises(StoreCorruptError, match="are not what was packed. Delete the file"):
            g2l_api.open(store).numpy(ENCODER)
        path.unlink()
        path.with_suffix(".json").unlink()
    elif harm == "short":
        path.write_bytes(content[:200])
    elif harm == "index":
        path.with_suffix(".json").write_text('{"slides": {}}')
    else:
        path.unlink()
    np.testing.assert_array_equal(g2l_api.open(store).numpy(ENCODER), before)


def test_slides_without_the_features_are_named(store):
    done = g2l("store", "pack", store)
    assert done.returncode == 1
    assert f"left out  d, {SECOND}: slide d has no features" in done.stderr
    assert len(np.load(pack_path(store, SECOND, 0))) == 63
    refused(g2l("store", "pack", store, "--encoder", ENCODER, "--view", 7), "no slide with view 7")
    with pytest.raises(StoreMissingError):
        g2l_api.open(store).pack(ENCODER, view=7)


# -- archives -----------------------------------------------------------------------------------------------


@given(st.lists(st.floats(width=16), min_size=1, max_size=30), st.integers(1, 9))
def test_rounding_is_to_the_nearest_of_so_many_bits(values, bits):
    """Against the definition: the nearest multiple of the last kept bit's value, and never infinity from a number."""
    given = np.array(values, np.float16)[None]
    found = round_bits(given, bits)
    assert np.array_equal(np.isfinite(found), np.isfinite(given))
    assert np.array_equal(found[~np.isfinite(given)], given[~np.isfinite(given)], equal_nan=True)
    exact = given[np.isfinite(given)].astype(float)
    rounded = found[np.isfinite(given)].astype(float)
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(exact), 2.0**-14))), -14)
    unit = 2.0 ** (exponent - bits)
    is_full = np.abs(rounded - exact) > unit / 2
    assert not (is_full & (np.abs(exact) < 65504 - 2.0 ** (15 - bits))).any()
    assert np.array_equal(np.signbit(rounded), np.signbit(exact))


def errors_of(before, after):
    """The figures anew, row by row in double precision."""
    good = np.isfinite(before).all(1)
    x, y = before[good].astype(float), after[good].astype(float)
    large = np.abs(x) >= 2.0**-14
    relative = np.abs(y - x)[large] / np.abs(x)[large]
    cosine = [a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in zip(x, y, strict=True)]
    return {
        "max_relative_error": relative.max(),
        "mean_relative_error": relative.mean(),
        "mean_cosine": np.mean(cosine),
        "min_cosine": np.min(cosine),
    }


def test_an_archive_says_its_error_and_is_read_by_all(store, tmp_path):
    out, untouched = tmp_path / "small.zarr", files(store / "slides")
    plan = told("store", "compact", store, out, "--encoder", ENCODER, "--dry-run")
    assert not out.exists()
    assert plan["dry_run"]
    done = told("store", "compact", store, out, "--encoder", ENCODER)
    whole, small = g2l_api.open(store), g2l_api.open(out)
    before = np.concatenate([whole.numpy(ENCODER, view=view) for view in (0, 1)])
    after = np.concatenate([small.numpy(ENCODER, view=view) for view in (0, 1)])
    for name, value in errors_of(before, after).items():
        assert done["errors"][ENCODER][name] == pytest.approx(value, rel=1e-9), name
    assert 0 < done["errors"][ENCODER]["max_relative_error"] <= 2.0**-8
    assert plan["errors"][ENCODER]["max_relative_error"] <= done["errors"][ENCODER]["max_relative_error"]

    opened = FeatureStore.open(out)
    assert [problem for problem in verify(opened) if problem.kind not in {"failed", "missing"}] == []
    np.testing.assert_array_equal(zarr.open_group(out)["slides/b/features"][ENCODER][:, 1], small.numpy(
        ENCODER, view=1)[37:57])  # fmt: skip
    facts = opened.encoders[ENCODER]
    assert facts.rounded_bits == 7
    assert re.search(r"rounded to 7 bits of mantissa: relative error at most 0\.003\d", facts.weights_notes[-1])
    export_features(opened, tmp_path / "job", "npy")
    good = np.isfinite(small.numpy(ENCODER)).all(1)
    (exported,) = (tmp_path / "job").rglob(f"*{ENCODER}*.npy")
    np.testing.assert_array_equal(np.load(exported), small.numpy(ENCODER)[good])
    assert files(store / "slides") == untouched

    refused(g2l("store", "compact", out, tmp_path / "again.zarr"), "compacted already, to 7 bits")
    copy = tmp_path / "copy.zarr"
    assert g2l("store", "subset", out, copy, "--slide", "b").returncode == 0
    refused(g2l("store", "compact", copy, tmp_path / "again.zarr"), "compacted already")
    refused(g2l("store", "merge", store, copy, "--out", tmp_path / "m.zarr"), "rounded_bits")
    refused(g2l("store", "compact", store, tmp_path / "none.zarr", "--bits", 10), "--bits 10: float16 has 10")
    assert not (tmp_path / "again.zarr").exists()


def test_fewer_bits_are_smaller(tmp_path):
    fill(lay(create(tmp_path / "s.zarr"), "big", n=2000))
    done = told("store", "compact", tmp_path / "s.zarr", tmp_path / "c.zarr")
    plan = told("store", "compact", tmp_path / "s.zarr", tmp_path / "d.zarr", "--bits", 3, "--dry-run")
    coarse = told("store", "compact", tmp_path / "s.zarr", tmp_path / "d.zarr", "--bits", 3)
    assert coarse["bytes"] < done["bytes"] < done["feature_bytes"] == 2000 * 2 * DIM * 2
    assert coarse["bytes"] == pytest.approx(plan["bytes"], rel=0.1)
    shards = (path.stat().st_size for path in (tmp_path / "c.zarr/slides/big/features/toy").glob("c.*"))
    assert sum(shards) == done["bytes"]


# -- for others ---------------------------------------------------------------------------------------------


def test_what_is_published_is_whole_and_says_nothing_of_this_machine(store, tmp_path):
    out, terms = tmp_path / "ready", ["--slides-license", "CC BY 4.0: their owner"]
    refused(g2l("store", "publish", store, out, *terms), "nothing says under which terms", "--encoder-license")
    more = [*terms, "--encoder-license", f"{ENCODER}=MIT", "--encoder", ENCODER, "--title", 'Lungs: "a" set', "--cite",
            "Somebody 2026", "--without", "patient_id", "--where", "slide_id=[abd]*"]  # fmt: skip
    plan = told("store", "publish", store, out, *more, "--dry-run")
    assert not out.exists()
    assert (plan["slides"], plan["labels"], plan["licenses"]) == (3, {"medical_center": 2}, {ENCODER: "MIT"})
    done = g2l("store", "publish", store, out, *more)
    assert done.returncode == 0, done.stderr
    assert "labels that others will see: medical_center (2 values)" in done.stdout
    assert f"huggingface-cli upload OWNER/NAME {out} ." in done.stdout

    sums = dict(line.split("  ")[::-1] for line in (out / "SHA256SUMS").read_text().splitlines())
    there = {path.as_posix(): content for path, content in files(out).items() if path.name != "SHA256SUMS"}
    assert sums == {path: hashlib.sha256(content).hexdigest() for path, content in there.items()}
    for content in there.values():
        assert str(tmp_path).encode() not in content
        assert b"/s.svs" not in content
        assert b"patient_id" not in content
    shown = FeatureStore.open(out / "store.zarr")
    assert [problem for problem in verify(shown) if problem.kind != "missing"] == []
    assert shown.slide("a/x").labels == {"medical_center": "A"}
    np.testing.assert_array_equal(
        shown.slide("b").features(ENCODER), FeatureStore.open(store).slide("b").features(ENCODER)
    )
    card = (out / "README.md").read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["pretty_name"] == 'Lungs: "a" set'
    assert header["license"] == "other"
    assert header["size_categories"] == ["n<1K"]
    assert "CC BY 4.0: their owner" in header["license_name"]
    for words in ("Somebody 2026", "62 patches of 3 slides", "| medical_center | 62 | A (57), B (5) |", "2510.11176"):
        assert words in card
    refused(g2l("store", "publish", store, out, *more), "is there already")
    refused(g2l("store", "publish", store, tmp_path / "x", *terms, "--without", "nobody"), "nobody")


def test_the_code_of_the_card_runs(store, tmp_path, monkeypatch):
    out = tmp_path / "ready"
    done = g2l(
        "store", "publish", store, out, "--slides-license", "CC0", "--encoder-license", f"{ENCODER}=MIT",
        "--encoder", ENCODER,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(out)
    names = {}
    exec(re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[1], names)
    assert names["features"].shape == (68, DIM)
    assert set(names["patches"]["patient_id"].dropna()) == {"p1", "p2", "q0", "q1"}


# -- the others ---------------------------------------------------------------------------------------------


def test_a_dry_run_writes_nothing_and_json_counts(store, tmp_path):
    (tmp_path / "t.csv").write_text("slide_id,tp53\nb,wt\n")
    before = files(tmp_path)
    out = tmp_path / "new.zarr"
    assert told("store", "subset", store, out, "--slide", "b", "--dry-run")["patches"] == 20
    both = told("store", "merge", store, store, "--out", out, "--dry-run")
    assert (both["slides"], both["encoders"]) == (4, sorted([ENCODER, SECOND]))
    assert told("store", "rm", store, "b", "--dry-run")["bytes"] > 0
    assert told("store", "label", store, tmp_path / "t.csv", "--dry-run")["slides"] == 1
    assert files(tmp_path) == before
    whole = told("store", "merge", store, "--out", out)
    assert whole["feature_bytes"] == 2 * DIM * (2 * 68 + 63)


@pytest.mark.parametrize("layout", ["trident-h5", "npy", "eva", "anndata"])
def test_a_dry_export_counts_what_the_export_has(store, tmp_path, layout):
    before = files(tmp_path)
    asked = ["store", "export", store, "--out", tmp_path / "job", "--format", layout, "--json"]
    plan, code = g2l(*asked, "--dry-run"), 1
    assert files(tmp_path) == before
    done = g2l(*asked)
    assert plan.returncode == done.returncode == code, done.stderr
    counted, written = json.loads(plan.stdout), json.loads(done.stdout)
    assert counted.pop("dry_run")
    assert not written.pop("dry_run")
    assert counted.pop("files") == []
    assert all(pathlib.Path(path).exists() for path in written.pop("files"))
    assert counted.keys() == written.keys()
    assert counted["left_out"].keys() == written["left_out"].keys()
    assert {k: v for k, v in counted.items() if k != "left_out"} == {
        k: v for k, v in written.items() if k != "left_out"
    }


def test_a_dry_import_refuses_what_the_import_refuses(store, tmp_path):
    export_features(FeatureStore.open(store), tmp_path / "job", "trident-h5", encoders=[ENCODER])
    folder = next((tmp_path / "job").rglob("a/x.h5")).parents[1]
    (folder / "bad.h5").write_bytes(b"no file")
    before = files(tmp_path)
    asked = ["store", "import", "trident-h5", tmp_path / "job", "--store", tmp_path / "i.zarr", "--encoder", "toy"]
    plan = g2l(*asked, "--dry-run", "--json")
    assert files(tmp_path) == before
    done = g2l(*asked, "--json")
    assert plan.returncode == done.returncode == 1, done.stderr
    counted, written = json.loads(plan.stdout), json.loads(done.stdout)
    assert counted.pop("dry_run") is not written.pop("dry_run")
    assert counted == written
    assert (written["slides"], written["patches"], list(written["failed"])) == (3, 55, ["bad"])
    before = files(tmp_path / "i.zarr")
    assert json.loads(g2l(*asked, "--dry-run", "--json").stdout)["slides"] == 3
    other = ["store", "import", "trident-h5", tmp_path / "job", "--store", tmp_path / "i.zarr", "--encoder", "x"]
    assert "--mpp" in g2l(*other, "--dry-run", "--mpp", "0.25", "--patch-px", "512").stderr
    assert files(tmp_path / "i.zarr") == before


def test_slides_as_anndata(store, tmp_path):
    anndata = pytest.importorskip("anndata")
    done = g2l("store", "export", store, "--out", tmp_path / "job", "--format", "anndata")
    assert done.returncode == 1
    assert f"left out  d, {SECOND}" in done.stderr
    assert (tmp_path / "job/slides.csv").exists()
    cells, whole = anndata.read_h5ad(tmp_path / "job/a/x.h5ad"), g2l_api.open(store).where(slides=["a/x"])
    wanted = whole.anndata([ENCODER, SECOND], max_patches=None)
    np.testing.assert_array_equal(cells.X, wanted.X)
    np.testing.assert_array_equal(cells.obsm[f"X_{SECOND}"], wanted.obsm[f"X_{SECOND}"])
    np.testing.assert_array_equal(cells.obsm["spatial"], wanted.obsm["spatial"])
    assert cells.obs["medical_center"].tolist() == ["A"] * 33
    images = anndata.read_h5ad(tmp_path / "job/set.h5ad")
    assert images.obs["patch_id"].tolist() == ["im0.png", "im1.png", "im2.png", "im3.png", "im5.png"]
    refused(
        g2l("store", "export", store, "--out", tmp_path / "x", "--format", "anndata", "--label", "grade"), "--label"
    )


@pytest.mark.filterwarnings("ignore")
def test_slides_as_spatialdata(store, tmp_path):
    """With SpatialData's own reader and joins; without the package the format is refused by its name."""
    try:
        import spatialdata
    except ImportError:
        refused(
            g2l("store", "export", store, "--out", tmp_path / "job", "--format", "spatialdata"),
            'needs spatialdata: pip install "g2l[spatialdata]"',
        )
        with pytest.raises(UsageError, match="g2l\\[spatialdata\\]"):
            g2l_api.open(store).spatialdata("b", ENCODER)
        return
    done = g2l("store", "export", store, "--out", tmp_path / "job", "--format", "spatialdata")
    assert "left out  set: it is a set of patch images" in done.stderr
    slide = spatialdata.read_zarr(tmp_path / "job/a/x.zarr")
    squares, cells = spatialdata.join_spatialelement_table(
        sdata=slide, spatial_element_names="patches", table_name="features"
    )
    corners = np.stack([square.bounds for square in squares["patches"].geometry])
    np.testing.assert_array_equal(corners[:, :2], cells.obsm["spatial"])
    np.testing.assert_array_equal(corners[:, 2:] - corners[:, :2], 257)
    whole = g2l_api.open(store).where(slides=["a/x"]).anndata(ENCODER, max_patches=None)
    np.testing.assert_array_equal(cells.X, whole.X)
    extent = spatialdata.get_extent(slide["patches"], coordinate_system="um")
    assert extent["x"][1] == pytest.approx(corners[:, 2].max() * 0.499)

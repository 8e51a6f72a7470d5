"""What other tools have written becomes a store that everything reads; what is wrong with it costs one slide."""

import csv
import shutil

import h5py
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from g2l_core.encoders.resolve import resolve_encoder
from g2l_core.errors import ReadError, StoreMissingError, UsageError
from g2l_core.extraction.import_features import UNPROVED, ImportSettings, import_features
from g2l_core.patches.identity import require_same_slide
from g2l_core.store.export import SLIDES_FILE, export_features
from g2l_core.store.features import FeatureStore
from g2l_core.store.verify import verify
from pipeline.bench import run_bench
from pipeline.cli.main import app
from pipeline.distill import run_distill
from tests.faults.small_run import settings
from tests.pipeline.test_broken_inputs import bytes_on_disk, remount, small_disk
from tests.pipeline.test_cli import g2l, refused
from tests.store.toy import DIM, ENCODER, create, fill, lay

KEY = f"{ENCODER}-imported"
BOTH = ["trident-h5", "clam", "stamp-h5", "raw2features"]


@pytest.fixture
def store(tmp_path):
    """Slides a/x, b/x (20 patches) and e (77, two of them unreadable) with labels."""
    store = create(tmp_path / "s.zarr")
    for i, slide_id in enumerate(("a/x", "b/x")):
        labels = {"patient_id": f"p{i}", "medical_center": "ns"[i], "grade": ["low", "=high"][i]}
        fill(lay(store, slide_id, labels=labels))
    status = np.zeros(77, np.uint8)
    status[[2, 73]] = 1
    fill(lay(store, "e", n=77, labels={"patient_id": "p3", "grade": "low"}), status=status)
    return store


def bring(layout, source, out, name=ENCODER, **settings):
    return import_features(layout, source, out, name, None, ImportSettings(**settings))


def by_corner(coords, features):
    order = np.lexsort(coords.T)
    return coords[order], features[order]


def require_equal(imported, store, slide_ids=("a/x", "b/x", "e")):
    opened = FeatureStore.open(imported)
    assert [slide.slide_id for slide in opened.slides()] == list(slide_ids)
    for slide_id in slide_ids:
        ours, theirs = store.slide(slide_id), opened.slide(slide_id)
        good = ours.patch_status == 0
        wanted = by_corner(ours.coords[good], ours.features(ENCODER)[good])
        found = by_corner(theirs.coords, theirs.features(KEY))
        assert np.array_equal(found[0], wanted[0])
        assert np.array_equal(found[1], wanted[1])
        assert (theirs.facts.patch_px_level0, theirs.facts.mpp) == (257, 0.499)
        assert not theirs.patch_status.any()
        assert not theirs.pixel_hash.any()
    return opened


@pytest.mark.parametrize("layout", BOTH)
def test_export_then_import_gives_the_same_store(store, tmp_path, layout):
    export_features(store, tmp_path / "job", layout)
    done = bring(layout, tmp_path / "job", tmp_path / "i.zarr", manifest=tmp_path / "job" / SLIDES_FILE)
    assert (done.slides, done.patches, done.failed, done.encoder) == (3, 115, {}, KEY)
    opened = require_equal(tmp_path / "i.zarr", store)
    for slide in store.slides():
        assert opened.slide(slide.slide_id).labels == slide.labels
    assert (opened.grid["mpp"], opened.grid["patch_px"], opened.views["crop_px"]) == (0.5, 256, 224)
    facts = opened.encoders[KEY]
    assert (facts.imported, facts.name, facts.weights_notes) == (layout, ENCODER, (UNPROVED,))
    assert list(verify(opened)) == []
    assert not list((tmp_path / "i.zarr").rglob("*.partial"))
    again = bring(layout, tmp_path / "job", tmp_path / "i.zarr")
    assert (again.slides, again.failed) == (3, {})
    assert opened.slide("e").labels == store.slide("e").labels


def test_clam_tensors_with_coordinates_elsewhere(store, tmp_path):
    export_features(store, tmp_path / "job", "clam")
    shutil.rmtree(tmp_path / f"job/features_{ENCODER}/h5_files")
    (tmp_path / "job/patches").rename(tmp_path / "coords")
    source = tmp_path / f"job/features_{ENCODER}"
    done = bring("clam", source, tmp_path / "i.zarr")
    assert not (tmp_path / "i.zarr/zarr.json").exists()
    assert "its coordinates are wanted in" in done.failed["e"]
    assert "Name their folder: --coords" in done.failed["e"]
    bring("clam", source, tmp_path / "i.zarr", coords=tmp_path / "coords")
    require_equal(tmp_path / "i.zarr", store)


def test_clams_own_files_have_their_sizes_in_the_patch_files(store, tmp_path):
    """CLAM: coords of features have no attributes; patch_size is in pixels of patch_level."""
    features = np.random.default_rng(0).normal(size=(3, DIM)).astype(np.float32)
    corners = np.array([[0, 0], [1024, 0], [0, 1024]], np.int32)
    for folder in ("f/h5_files", "f/patches"):
        (tmp_path / folder).mkdir(parents=True)
        with h5py.File(tmp_path / folder / "s.h5", "w") as file:
            coords = file.create_dataset("coords", data=corners)
            if folder.endswith("patches"):
                coords.attrs.update(patch_size=256, patch_level=1, downsample=np.array([4.0, 4.0]))
            else:
                file["features"] = features
    done = bring("clam", tmp_path / "f", tmp_path / "i.zarr")
    assert "its file does not say at which scale its patches were encoded: give --mpp" in done.failed["s"]
    bring("clam", tmp_path / "f", tmp_path / "i.zarr", mpp_override=0.25)
    opened = FeatureStore.open(tmp_path / "i.zarr")
    assert (opened.grid["mpp"], opened.grid["patch_px"], opened.views["crop_px"]) == (1.0, 256, 256)
    assert opened.slide("s").facts.patch_px_level0 == 1024


def plain(folder, slide_id, features, corners, ending=".npy"):
    path = folder / f"{slide_id}{ending}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if ending == ".npy":
        np.save(path, features)
    elif ending == ".npz":
        np.savez(path, features=features, coords=corners)
        return path
    else:
        torch.save(torch.from_numpy(features), path)
    with (folder / f"{slide_id}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["x", "y"])
        writer.writerows(np.asarray(corners).tolist())
    return path


SCALE = {"mpp": 0.5, "patch_px": 224, "mpp_override": 0.25}


@pytest.fixture
def sound():
    rng = np.random.default_rng(1)
    corners = np.stack(np.divmod(np.arange(30), 6), axis=1) * 448
    return rng.normal(size=(30, DIM)).astype(np.float32), corners


@pytest.mark.parametrize("ending", [".npy", ".npz", ".pt"])
def test_plain_files(tmp_path, sound, ending):
    plain(tmp_path / "f", "deep/s", *sound, ending)
    done = bring("plain", tmp_path / "f", tmp_path / "i.zarr", name="somebodys", **SCALE)
    assert (done.failed, done.known) == ({}, False)
    slide = FeatureStore.open(tmp_path / "i.zarr").slide("deep/s")
    wanted = by_corner(sound[1], sound[0].astype(np.float16))
    found = by_corner(slide.coords, slide.features("somebodys-imported"))
    assert np.array_equal(found[0], wanted[0])
    assert np.array_equal(found[1], wanted[1])
    assert slide.facts.patch_px_level0 == 448


# -- what is wrong with a file costs its slide ------------------------------------------------------------


def lose_coords(file, features, corners):
    del file["coords"]


def fewer(file, features, corners):
    del file["features"]
    file["features"] = features[:-1]


def half_pixels(file, features, corners):
    attributes = dict(file["coords"].attrs)
    del file["coords"]
    file.create_dataset("coords", data=corners + 0.5).attrs.update(attributes)


def nan(file, features, corners):
    file["features"][3, 1] = np.nan


def wide(file, features, corners):
    del file["features"]
    file["features"] = np.ones((20, DIM + 1), np.float32)


def huge(file, features, corners):
    file["features"][3] = 1e6


def pooled(file, features, corners):
    del file["features"]
    file["features"] = features[0]


def other_size(file, features, corners):
    file["coords"].attrs["patch_size_level0"] = 514
    file.attrs["patch_size_level0"] = 514


def outside(file, features, corners):
    file["coords"][0, 0] = 99_999


def elsewhere(file, features, corners):
    del file["features"]
    file["features"] = h5py.ExternalLink("/etc/passwd", "x")


def other_encoder(file, features, corners):
    file.attrs["encoder_digest"] = "1" * 64


def other_view(file, features, corners):
    file.attrs["view"] = 2


BAD = {
    lose_coords: "its coordinates are wanted in",
    fewer: "it has 19 features, but 20 coordinates: expected as many",
    half_pixels: r"row 0: coords is '\d+\.5', expected a whole number of level-0 pixels",
    nan: "1 of its 20 features hold NaN or infinity, first in row 3",
    wide: "it has 7 features a patch, the other slides have 6",
    huge: r"row 3 of its features, up to 1e\+06, is beyond float16",
    pooled: r"its features have the shape \(6,\), expected \(patches, dim\): an embedding of the whole slide",
    other_size: "its patches are 514 level-0 px of 0.499 um, that is 256.5 um, but 256 px at 0.5 um/px are 128 um",
    outside: "1 of its 20 coordinates lie outside of its 4000 x 3000 px, such as 99999, ",
    elsewhere: "it has no dataset features",
    other_encoder: "it was exported from features of another encoder than the other slides",
    other_view: "it holds augmented view 2, and what is imported is the canonical one",
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
def test_a_bad_file_costs_its_slide(store, tmp_path, spoil):
    export_features(store, tmp_path / "job", "trident-h5")
    job = tmp_path / "job/20x_256px_0px_overlap"
    shutil.rmtree(job / "patches")
    path = job / f"features_{ENCODER}/b/x.h5"
    with h5py.File(path, "r+") as file:
        spoil(file, file["features"][:], file["coords"][:])
    done = bring("trident-h5", tmp_path / "job", tmp_path / "i.zarr")
    assert list(done.failed) == ["b/x"]
    assert done.failed["b/x"].startswith(f"{path}: ")
    with pytest.raises(ReadError, match=BAD[spoil]):
        raise ReadError(done.failed["b/x"])
    opened = FeatureStore.open(tmp_path / "i.zarr")
    assert [slide.slide_id for slide in opened.slides()] == ["a/x", "e"]
    assert opened.failed_slides() == {"b/x": done.failed["b/x"]}


def test_files_that_are_no_hdf5_and_code_in_tensors(tmp_path, sound):
    (tmp_path / "h").mkdir()
    (tmp_path / "h/s.h5").write_bytes(b"x" * 100)
    assert "it cannot be read as HDF5" in bring("stamp-h5", tmp_path / "h", tmp_path / "i").failed["s"]
    path = plain(tmp_path / "f", "s", *sound, ".pt")
    torch.save({"features": print}, path)
    assert "weights_only" in bring("plain", tmp_path / "f", tmp_path / "i", **SCALE).failed["s"].lower().replace(
        " ", "_"
    )


def test_two_files_of_one_slide(tmp_path, sound):
    for ending in (".npy", ".pt"):
        plain(tmp_path / "f", "s", *sound, ending)
    plain(tmp_path / "f", "t", *sound)
    done = bring("plain", tmp_path / "f", tmp_path / "i.zarr", **SCALE)
    assert done.slides == 1
    assert "another file has features of slide 's' too: keep one" in done.failed["s"]


def test_refusals(store, tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        bring("clam", tmp_path / "nothing", tmp_path / "i")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="has no features in layout clam"):
        bring("clam", tmp_path / "empty", tmp_path / "i")
    assert not (tmp_path / "i").exists()
    for name in ("features_one", "features_two"):
        (tmp_path / "job" / name).mkdir(parents=True)
    with pytest.raises(
        UsageError, match="several folders of features: features_one, features_two. Give the one of uni"
    ):
        bring("trident-h5", tmp_path / "job", tmp_path / "i", name="uni")


def test_an_encoder_of_another_width(store, tmp_path):
    export_features(store, tmp_path / "job", "stamp-h5")
    spec = resolve_encoder("h-optimus-0")
    done = import_features("stamp-h5", tmp_path / "job" / ENCODER, tmp_path / "i", "h-optimus-0", spec)
    assert "it has 6 features a patch, h-optimus-0 gives 1536" in done.failed["e"]
    assert "the encoder is h-optimus-0+cls_mean" in done.failed["e"]


def test_a_full_disk_stops_the_import_which_goes_on_later(store, tmp_path):
    export_features(store, tmp_path / "job", "trident-h5")
    bring("trident-h5", tmp_path / "job", tmp_path / "whole.zarr")
    disk, command = tmp_path / "disk", ["store", "import", "trident-h5", str(tmp_path / "job"), "--encoder", "toy"]
    command += ["--store", str(disk / "i.zarr")]
    with small_disk(disk, bytes_on_disk(tmp_path / "whole.zarr") // 2):
        refused(g2l(*command), "No space left on device; free space")
        remount(disk, "size=1g")
        assert g2l(*command).returncode == 0
        opened = require_equal(disk / "i.zarr", store)
        assert {problem.kind for problem in verify(opened)} <= {"leftover"}


# -- an imported store is a store -------------------------------------------------------------------------


def test_two_encoders_of_the_same_patches(store, tmp_path):
    for name in ("one", "two"):
        export_features(store, tmp_path / name, "trident-h5")
        assert bring("trident-h5", tmp_path / name, tmp_path / "i.zarr", name=name).failed == {}
    slide = FeatureStore.open(tmp_path / "i.zarr").slide("e")
    assert slide.encoder_keys == ["one-imported", "two-imported"]
    assert np.array_equal(slide.features("one-imported"), slide.features("two-imported"))
    path = next((tmp_path / "two").rglob("e.h5"))
    with h5py.File(path, "r+") as file:
        file["coords"][:] = file["coords"][:][::-1]  # with features as they were: other patches of the same corners
        first = file["features"][0]
        corner = file["coords"][0]
    bring("trident-h5", tmp_path / "two", tmp_path / "i.zarr", name="three")
    (row,) = np.flatnonzero((slide.coords == corner).all(axis=1))
    assert np.array_equal(FeatureStore.open(tmp_path / "i.zarr").slide("e").features("three-imported")[row], first)


def test_bench_at_once(tmp_path, sound):
    rng = np.random.default_rng(2)
    for i in range(12):
        shift = np.zeros(DIM)
        shift[i % 2] = 4
        plain(tmp_path / "f", f"s{i}", (rng.normal(size=(30, DIM)) + shift).astype(np.float32), sound[1])
    bring("plain", tmp_path / "f", tmp_path / "i.zarr", name="somebodys", **SCALE)
    with (tmp_path / "labels.csv").open("w") as file:
        file.write("slide_id,label\n" + "".join(f"s{i},{'ab'[i % 2]}\n" for i in range(12)))
    (tmp_path / "tasks.toml").write_text(
        '[tasks.t]\nmetrics = ["probe"]\nlabels = "labels.csv"\nlabel = "label"\nfolds = 3\n'
    )
    report = run_bench(tmp_path / "tasks.toml", [tmp_path / "i.zarr"], ["somebodys"], tmp_path / "out", draws=100)
    assert not report.failures
    (encoder,) = report.encoders
    assert (encoder.precision, encoder.pooling, encoder.note) == ("unknown", "unknown", "imported")
    assert any("imported: nobody knows how its patches were preprocessed" in note for note in report.notes)
    assert max(r.estimate.value for r in report.results) > 0.8


def test_commands_on_an_imported_store(store, tmp_path):
    run = CliRunner()
    export_features(store, tmp_path / "job", "trident-h5")
    out = str(tmp_path / "i.zarr")
    job = str(tmp_path / "job")
    done = run.invoke(app, ["store", "import", "trident-h5", job, "--store", out, "--encoder", "toy"])
    assert done.exit_code == 0, done.stderr
    assert "115 patches of 3 slides imported as toy-imported; 0 slides are at hand" in done.stdout
    assert "unknown encoder 'toy'" in done.stderr
    info = run.invoke(app, ["store", "info", out])
    assert info.exit_code == 0
    assert "toy-imported: 6 features, precision unknown, pooling unknown" in info.stdout
    assert "imported from trident-h5; its preprocessing is not proved" in info.stdout
    assert run.invoke(app, ["store", "verify", out]).exit_code == 0
    with pytest.raises(ReadError, match="slide e was imported without its slide. g2l store import with --slides"):
        require_same_slide(FeatureStore.open(out).slide("e"), tmp_path)


def test_distilling_augmented_views_of_an_imported_teacher_is_refused(cohort, cached_store, tmp_path):
    key = "timm-mobilenetv3_small_050-64-random0"
    export_features(FeatureStore.open(cached_store), tmp_path / "job", "trident-h5")
    teacher = resolve_encoder("timm:mobilenetv3_small_050@64", weights="random:0")
    done = import_features(
        "trident-h5", tmp_path / "job", tmp_path / "i.zarr", "timm:mobilenetv3_small_050@64", teacher,
        ImportSettings(slides=cohort.parent),
    )  # fmt: skip
    assert (done.with_slides, done.failed, done.known) == (6, {}, True)
    with pytest.raises(StoreMissingError, match="was imported, and an import has only the canonical view"):
        run_distill(tmp_path / "i.zarr", done.encoder, teacher, tmp_path / "run", settings())
    assert key not in FeatureStore.open(tmp_path / "i.zarr").encoders


@pytest.mark.parametrize("layout", ["trident", "clam", "stamp"])
def test_files_that_raw2features_has_written(store, tmp_path, layout):
    """Its exporter is another program's writer of these layouts; its patch_size is in level-0 pixels."""
    written = pytest.importorskip("raw2features.export.h5")
    export_features(store, tmp_path / "r", "raw2features")
    for path in (tmp_path / "r").rglob("*.embeddings.zarr"):
        folder = tmp_path / "job" / path.relative_to(tmp_path / "r").parent
        written.export_h5(str(path), str(folder / "h5_files" if layout == "clam" else folder), layout=layout)
    if layout == "clam":  # it writes a folder for each call, CLAM one for all
        for path in list((tmp_path / "job").rglob("*.h5")):
            target = tmp_path / "all/h5_files" / path.relative_to(tmp_path / "job").as_posix().replace("h5_files/", "")
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    source = tmp_path / ("all" if layout == "clam" else "job")
    name = layout if layout == "clam" else f"{layout}-h5"
    scale = {"patch_px": 256, "mpp": 0.5, "mpp_override": 0.499}
    done = bring(name, source, tmp_path / "i.zarr", **scale)
    assert done.failed == {}
    opened = require_equal(tmp_path / "i.zarr", store)
    assert opened.views["crop_px"] == 256  # nothing says that the center crop was encoded

"""Manifests as people have them, through stage one and into a report: columns by patch, blanks, scales."""

import shutil

import cv2
import numpy as np
import pytest

from g2l_core.benchmark.evaluate import BenchSpec, evaluate_task
from g2l_core.benchmark.spec import TaskSpec
from g2l_core.slides.manifest import read_sources
from g2l_core.slides.mpp import Scale, ScaleFacts, audit_scale, audit_table, describe_unused_override, find_scale
from g2l_core.store.features import FeatureStore
from g2l_core.store.verify import verify
from pipeline.cache_teacher import other_scales
from pipeline.split import split_store
from tests.pipeline.test_cli import cache, g2l, refused

FEW = ("--views", "0", "--no-pictures")


@pytest.fixture
def images(tmp_path):
    """Eight patch images in the folders of two classes."""
    for i in range(8):
        folder = tmp_path / "data" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (256, 256, 3), np.uint8)
        assert cv2.imwrite(str(folder / f"{i}.png"), pixels)
    return tmp_path / "data"


def manifest(path, rows, header):
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def by_patient(images, tmp_path, **patients):
    """A manifest of the images, with patients that differ inside each folder."""
    rows = [
        (path.relative_to(tmp_path), path.parent.name, patients.get(f"i{path.stem}", f"p{int(path.stem) // 2}"))
        for path in sorted(images.rglob("*.png"))
    ]
    return manifest(tmp_path / "m.csv", rows, "path,kind,patient_id")


def patients(store):
    return {
        f"{slide.slide_id}/{name.rpartition('/')[2]}": labels.get("patient_id") or slide.labels.get("patient_id", "")
        for slide in FeatureStore.open(store).slides()
        for name, labels in zip(slide.patch_ids, slide.patch_labels, strict=True)
    }


def test_columns_that_differ_inside_a_set_are_kept_by_patch(images, tmp_path):
    store = tmp_path / "s.zarr"
    done = cache(by_patient(images, tmp_path), store, *FEW)
    assert done.returncode == 0, done.stderr
    assert patients(store) == {f"{'ab'[i % 2]}/{i}.png": f"p{i // 2}" for i in range(8)}
    assert FeatureStore.open(store).slide("a").labels == {"kind": "a"}
    assert not list(verify(FeatureStore.open(store)))
    split = split_store(FeatureStore.open(store), (), "0.3", 0)
    held = {patient for i, rows in split.held_out.items() for patient in held_patients(store, i, rows)}
    trained = {patient for i, rows in split.train.items() for patient in held_patients(store, i, rows)}
    assert (held | trained, held & trained) == ({"p0", "p1", "p2", "p3"}, set())
    (tmp_path / "t.toml").write_text('[tasks.t]\nlabel = "kind"\nfolds = 2\nmetrics = ["knn"]\nknn_k = 1\n')
    encoder = next(iter(FeatureStore.open(store).encoders))
    done = g2l("bench", tmp_path / "t.toml", "--store", store, "--encoders", encoder, "--out", tmp_path / "r", "--json")
    assert done.returncode == 0, done.stderr
    assert "2 folds by patients" in done.stdout


def held_patients(store, slide_id, rows):
    labels = FeatureStore.open(store).slide(slide_id).patch_labels
    return [labels[row]["patient_id"] for row in rows.tolist()]


def test_a_cell_that_changes_or_empties_takes_effect(images, tmp_path):
    """By patch, by slide, and from one to the other; columns that the manifest does not have stay."""
    store = tmp_path / "s.zarr"
    assert cache(by_patient(images, tmp_path), store, *FEW).returncode == 0
    done = cache(by_patient(images, tmp_path, i0="NA", i1="px"), store, *FEW)
    assert (done.returncode, "stored already" in done.stdout) == (0, True), done.stderr
    assert patients(store) == {
        **{f"{'ab'[i % 2]}/{i}.png": f"p{i // 2}" for i in range(2, 8)}, "a/0.png": "", "b/1.png": "px"
    }  # fmt: skip
    assert cache(by_patient(images, tmp_path, **{f"i{i}": "one" for i in range(8)}), store, *FEW).returncode == 0
    assert set(patients(store).values()) == {"one"}
    slide = FeatureStore.open(store).slide("a")
    assert (slide.labels, slide.has_patch_labels) == ({"kind": "a", "patient_id": "one"}, False)
    assert cache(images, store, *FEW).returncode == 0  # a folder says nothing
    rows = [(path.relative_to(tmp_path), "") for path in sorted(images.rglob("*.png"))]
    assert cache(manifest(tmp_path / "m.csv", rows, "path,kind"), store, *FEW).returncode == 0
    assert FeatureStore.open(store).slide("a").labels == {"patient_id": "one"}
    assert not list(verify(FeatureStore.open(store)))


def test_a_damaged_table_of_labels_is_found(images, tmp_path):
    store = tmp_path / "s.zarr"
    assert cache(by_patient(images, tmp_path), store, *FEW).returncode == 0
    (file,) = (store / "slides/a/patch_labels").glob("c*")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert [(p.kind, p.slide_id, p.table) for p in verify(FeatureStore.open(store))] == [
        ("damaged", "a", "patch_labels")
    ]


@pytest.mark.parametrize("own", [True, False])
def test_absolute_paths_and_own_patch_ids(images, tmp_path, own):
    rows = [(path, path.parent.name, f"tile {path.stem}" if own else path) for path in sorted(images.rglob("*.png"))]
    found = read_sources([manifest(tmp_path / "m.csv", rows, "path,slide_id,patch_id")])
    assert [source.patch_ids for source in found] == [
        ("0.png", "2.png", "4.png", "6.png"),
        ("1.png", "3.png", "5.png", "7.png"),
    ]
    assert [source.path for source in found] == [images / "a", images / "b"]
    expected = {"patch_id": ("tile 0", "tile 2", "tile 4", "tile 6")} if own else {}
    assert found[0].patch_labels == (expected or {"patch_id": tuple(str(row[2]) for row in rows[:4])} if own else {})


@pytest.mark.parametrize("twice", ["a/0.png", "./a/0.png", "b/../a/0.png"])
def test_one_image_twice_with_other_labels_is_refused(images, tmp_path, twice):
    path = manifest(images / "m.csv", [("a/0.png", "S", "x"), (twice, "S", "y")], "path,slide_id,kind")
    with pytest.raises(Exception, match=r"names .*a/0\.png more than once"):
        read_sources([path])


def test_blanks_of_a_manifest_are_told_once(images, tmp_path, caplog):
    done = cache(by_patient(images, tmp_path, i0="NA", i1="null", i2="NA"), tmp_path / "s.zarr", *FEW)
    assert done.returncode == 0, done.stderr
    told = [line for line in caplog.text.splitlines() if "missing values" in line]
    assert len(told) == 1
    assert "read as missing values: 'NA' in patient_id (2), 'null' in patient_id (1)" in told[0]


# ---- scales ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mpp", "told"), [(0.5, None), (0.505, None), (0.46, True), (0.25, False), (0.56, False), (1.0, False)]
)
def test_patch_images_at_another_scale_are_refused(images, tmp_path, mpp, told):
    rows = [(path.relative_to(tmp_path), mpp) for path in sorted(images.rglob("*.png"))]
    done = cache(manifest(tmp_path / "m.csv", rows, "path,mpp"), tmp_path / "s.zarr", *FEW)
    said = f"its manifest gives {mpp:g} um/px, the store's patches have 0.5"
    assert (done.returncode, said in done.stderr) == (1 if told is False else 0, told is not None), done.stderr
    assert (f"--mpp {mpp:g} into a store of their own" in done.stderr) == (told is False)


def test_an_override_that_does_not_fit_patch_images_is_refused(images, tmp_path):
    done = cache(images, tmp_path / "s.zarr", *FEW, "--mpp-override", "0.25")
    assert done.returncode == 1
    assert "its --mpp-override gives 0.25 um/px" in done.stderr
    assert cache(images, tmp_path / "s.zarr", *FEW, "--mpp-override", "0.5").returncode == 0


def facts(slide_id, header, manifest_mpp=None, override=None):
    properties = {} if header is None else {"openslide.mpp-x": str(header), "openslide.mpp-y": str(header)}
    scale = find_scale(properties, (4000, 3000), manifest_mpp=manifest_mpp, mpp_override=override)
    return ScaleFacts(
        slide_id=slide_id, scale=scale, objective_power=None, manifest_mpp=manifest_mpp, level0_size=(4000, 3000)
    )


@pytest.mark.parametrize(
    ("header", "given", "used", "told", "doubtful"),
    [
        (0.2525, 0.25, 0.2525, False, False), (0.2545, 0.25, 0.2545, False, False), (0.26, 0.25, 0.25, True, False),
        (0.25, 0.3, 0.3, True, False), (0.25, 0.32, 0.32, True, True), (0.25, 0.5, 0.5, True, True),
        (None, 0.5, 0.5, False, False), (2.5, 0.25, 0.25, True, False),
    ],
)  # fmt: skip
def test_manifest_against_header(header, given, used, told, doubtful):
    fact = facts("a", header, given)
    assert fact.scale.mpp == pytest.approx(used)
    findings = audit_scale([fact])
    table = audit_table([fact], findings)
    assert (f"  a: {given:.4g} um/px in place of {header}" in table.splitlines(), bool(findings)) == (told, doubtful)


def test_an_override_that_is_not_used_is_told():
    found = [facts("a", 0.25, override=0.5), facts("b", None, override=0.5), facts("c", 0.4995, override=0.5)]
    assert (
        "--mpp-override 0.5 is not used for 1 slides, whose header or manifest gives another um/px, such as a (0.25)"
        in (describe_unused_override(found, 0.5))
    )
    assert describe_unused_override(found, None) == describe_unused_override(found[1:], 0.5) == ""
    assert Scale(mpp_x=1, mpp_y=1, source="override").header is None


def test_a_scale_that_changes_after_the_slide_was_cached_is_told(cohort, tmp_path):
    shutil.copy(cohort.parent / "slides/p01-1.tiff", tmp_path / "p01-1.tiff")
    store = tmp_path / "s.zarr"
    few = (*FEW, "--max-patches", "2", "--tissue", "none")
    assert cache(tmp_path / "p01-1.tiff", store, *few).returncode == 0
    stored = FeatureStore.open(store).slide("p01-1").facts.mpp
    done = cache(manifest(tmp_path / "m.csv", [("p01-1.tiff", 2 * stored)], "path,mpp"), store, *few)
    assert done.returncode == 0, done.stderr
    assert f"such as p01-1 ({2 * stored:g}, stored {stored:g}): their patches stay as they are" in done.stderr
    assert other_scales([], {}) == ""


def test_a_scale_that_the_header_contradicts_stops_and_is_noted(cohort, tmp_path):
    for name in ("p01-1", "p02-1", "p03-1"):
        shutil.copy(cohort.parent / f"slides/{name}.tiff", tmp_path / f"{name}.tiff")
    rows = [("p01-1.tiff", 0.37, "a"), ("p02-1.tiff", 0.27, "b"), ("p03-1.tiff", "", "a")]
    path, store = manifest(tmp_path / "m.csv", rows, "path,mpp,kind"), tmp_path / "s.zarr"
    few = (*FEW, "--max-patches", "6", "--tissue", "none")
    refused(
        cache(path, store, *few), "a doubtful um/px: 1, the first is p01-1: the manifest's is about 1/1.4 of the 0.5"
    )
    done = cache(path, store, *few, "--accept-mpp")
    assert done.returncode == 0, done.stderr
    assert "p02-1: 0.27 um/px in place of 0.25" in done.stderr
    assert FeatureStore.open(store).slide("p01-1").facts.mpp == 0.37
    spec, opened = TaskSpec(name="t", label="kind", metrics=("cka",)), FeatureStore.open(store)
    outcome = evaluate_task([opened], spec, BenchSpec(encoders=tuple(opened.encoders)), tmp_path)
    note = "the um/px of 2 slides (p01-1, p02-1) is the manifest's, and the header gives another"
    assert outcome.notes == [f"task t: {note}"]

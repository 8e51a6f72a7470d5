"""Stores that a cohort writes are whole, and hold what they were written from."""

import shutil

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import g2l_core as g2l
from g2l_core.benchmark.rows import gather
from g2l_core.benchmark.spec import TaskSpec
from g2l_core.errors import StoreCorruptError, StoreError, StoreMismatchError, UnknownNameError, UsageError
from g2l_core.extraction.repair import repair_tables
from g2l_core.store import schema
from g2l_core.store.catalogue import load
from g2l_core.store.facts import EncoderFacts
from g2l_core.store.features import FeatureStore
from g2l_core.store.verify import verify
from tests.api.conftest import SECOND, SIZES, make_store
from tests.store.toy import ENCODER, create, facts, fill, lay

laws = settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "SHARD_ROWS", 16)
        patch.setattr(schema, "CHUNK_ROWS", 4)
        yield make_store(tmp_path_factory.mktemp("api") / "s.zarr")


def require_whole(path):
    assert [p for p in verify(FeatureStore.open(path)) if p.kind not in {"missing", "failed"}] == []
    assert set(load(path)) == set(FeatureStore.open(path).slide_ids())


def require_equal(one, other, encoders=(ENCODER, SECOND), views=2):
    pd.testing.assert_frame_equal(one.patches(), other.patches())
    for encoder in encoders:
        for view in range(views if encoder == ENCODER else 1):
            a, b = (cohort.where(encoders=[encoder]).numpy(encoder, view=view) for cohort in (one, other))
            np.testing.assert_array_equal(a, b)


@given(
    slides=st.lists(st.sampled_from(sorted(SIZES)), min_size=1, unique=True),
    encoders=st.sampled_from([None, [ENCODER], ["efficientnet-lite0@64"]]),
    views=st.sampled_from([None, 1, 2, 9]),
)
@laws
def test_a_copy_is_what_was_chosen(source, tmp_path, slides, encoders, views):
    shutil.rmtree(tmp_path / "o.zarr", ignore_errors=True)
    copied = g2l.open(source).copy(tmp_path / "o.zarr", slides=slides, encoders=encoders, views=views)
    require_whole(copied.path)
    kept = {None: (ENCODER, SECOND), ENCODER: (ENCODER,)}.get(encoders and encoders[0], (SECOND,))
    assert tuple(copied.encoders) == kept
    have = [key for key in kept if key == ENCODER or slides != ["d"]]
    require_equal(copied, g2l.open(source).where(slides=slides), have, min(views or 2, 2))
    wanted, found = FeatureStore.open(source), FeatureStore.open(copied.path)
    for slide_id in slides:
        one, other = wanted.slide(slide_id), found.slide(slide_id)
        n = min(views or 2, 2)
        assert other.n_views == n
        np.testing.assert_array_equal(other.view_params, one.view_params[:, :n])
        np.testing.assert_array_equal(other.pixel_hash, one.pixel_hash[:, :n])
        assert (other.labels, other.patch_labels, other.patch_ids) == (one.labels, one.patch_labels, one.patch_ids)
        assert other.facts.fingerprint == one.facts.fingerprint


def test_a_whole_copy_has_the_failed_slides_too(source, tmp_path):
    copied = g2l.open(source).copy(tmp_path / "o.zarr")
    require_equal(copied, g2l.open(source))
    assert copied.failed == {"zz": "no tissue"}
    assert FeatureStore.open(copied.path).failed_labels() == {"zz": {"patient_id": "p9"}}
    assert list(tmp_path.iterdir()) == [tmp_path / "o.zarr"]


def test_a_copy_keeps_labels_of_files(source, tmp_path):
    (tmp_path / "a.csv").write_text("slide_id,tp53,patient_id\nb,mut,p7\na/x,wt,\nd,,p2\nset,wt,p1\n")
    (tmp_path / "b.csv").write_text("slide_id,x,y,grade\nb,0,0,g1\nb,257,0,g2\n")
    labeled = g2l.open(source).with_labels(tmp_path / "a.csv").with_labels(tmp_path / "b.csv")
    copied = labeled.copy(tmp_path / "o.zarr")
    require_whole(copied.path)
    pd.testing.assert_frame_equal(copied.patches(), labeled.patches())
    assert FeatureStore.open(copied.path).slide("b").labels == {
        "tp53": "mut",
        "patient_id": "p7",
        "medical_center": "A",
    }


def test_copies_that_are_refused(source, tmp_path):
    cohort = g2l.open(source)
    with pytest.raises(UsageError, match="a store holds whole slides, but 3 of 37 patches of a/x are chosen"):
        cohort.where(n_patches=3).copy(tmp_path / "o.zarr")
    with pytest.raises(StoreError, match="is there already"):
        cohort.copy(source)
    with pytest.raises(UnknownNameError, match="unknown encoder"):
        cohort.copy(tmp_path / "o.zarr", encoders=["virchow"])
    with pytest.raises(UnknownNameError, match="unknown slide"):
        cohort.copy(tmp_path / "o.zarr", slides=["e"])
    with pytest.raises(UsageError, match="at least 1; got 0"):
        cohort.copy(tmp_path / "o.zarr", views=0)
    assert list(tmp_path.iterdir()) == []


def test_damage_is_not_copied(stored, tmp_path):
    path = stored / "slides/b/features/toy/c.0.1.0"
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreCorruptError, match="slide b"):
        g2l.open(stored).copy(tmp_path / "o.zarr")
    assert not (tmp_path / "o.zarr").exists()
    g2l.open(stored).copy(tmp_path / "o.zarr", views=1)


@given(split=st.lists(st.sampled_from(["one", "other", "both"]), min_size=4, max_size=4))
@laws
def test_what_is_parted_comes_together(source, tmp_path, split):
    for name in ("1.zarr", "2.zarr", "o.zarr"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    cohort = g2l.open(source)
    sides = [
        [i for i, side in zip(sorted(SIZES), split, strict=True) if side in {name, "both"}] for name in ("one", "other")
    ]
    parts = [cohort.copy(tmp_path / f"{n}.zarr", slides=ids) for n, ids in enumerate(sides, 1) if ids]
    merged = g2l.merge(parts, tmp_path / "o.zarr")
    require_whole(merged.path)
    require_equal(merged, cohort)


def test_encoders_and_views_come_together(source, tmp_path):
    cohort = g2l.open(source)
    parts = [
        cohort.copy(tmp_path / "1.zarr", encoders=[SECOND], views=1),
        cohort.copy(tmp_path / "2.zarr", encoders=[ENCODER], views=1),
        source,
    ]
    merged = g2l.merge(parts[:2], tmp_path / "o.zarr")
    require_whole(merged.path)
    require_equal(merged, cohort, views=1)
    require_equal(g2l.merge(parts, tmp_path / "p.zarr"), cohort)
    require_whole(tmp_path / "p.zarr")


def test_stores_that_do_not_fit(source, tmp_path, small_shards):
    other = create(tmp_path / "grid.zarr", mpp=1.0)
    fill(lay(other, "n1"))
    with pytest.raises(StoreMismatchError, match=r"grid.zarr does not fit .*s.zarr: grid.mpp is 0.5 there, 1.0 here"):
        g2l.merge([source, tmp_path / "grid.zarr"], tmp_path / "o.zarr")
    other = create(tmp_path / "encoder.zarr")
    other.add_encoder(SECOND, EncoderFacts(name="efficientnet-lite0@64", digest="1" * 64, dim=6))
    with pytest.raises(StoreMismatchError, match=f"features of another encoder under {SECOND} than .*: digest differ"):
        g2l.merge([source, tmp_path / "encoder.zarr"], tmp_path / "o.zarr")
    with pytest.raises(UsageError, match="at least one store"):
        g2l.merge([], tmp_path / "o.zarr")
    assert not (tmp_path / "o.zarr").exists()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"fingerprint": "g"}, "fingerprint"),
        ({"n": 21}, "n_patches"),
        ({"labels": {"patient_id": "p5"}}, "labels patient_id"),
        ({"mpp": 0.25}, "mpp"),
    ],
)
def test_equal_ids_of_different_slides(source, tmp_path, small_shards, change, what):
    other = create(tmp_path / "other.zarr")
    labels = {"patient_id": "p1", "medical_center": "A"}
    fill(
        lay(other, "b", **{"labels": labels, **change}),
        status=(np.arange(change.get("n", 20)) % 9 == 4).astype(np.uint8),
    )
    with pytest.raises(StoreMismatchError, match=f"slide b of .*other.zarr/slides/b is not that of .*: {what} differ"):
        g2l.merge([source, other.path], tmp_path / "o.zarr")


def test_equal_slides_with_different_features(source, tmp_path, small_shards):
    other = create(tmp_path / "other.zarr")
    fill(lay(other, "b", labels={"patient_id": "p1"}))  # its patches are all readable
    with pytest.raises(StoreMismatchError, match="slide b of .*: (patch_status|pixel_hash|features of toy) differ"):
        g2l.merge([source, other.path], tmp_path / "o.zarr")


def test_slides_inside_slides(source, tmp_path, small_shards):
    other = create(tmp_path / "other.zarr")
    fill(lay(other, "b/x"))
    with pytest.raises(StoreMismatchError, match="no slide can lie inside another"):
        g2l.merge([source, other.path], tmp_path / "o.zarr")


COLUMNS = {
    "float": st.floats(width=64),
    "whole": st.integers(-(2**62), 2**62),
    "truth": st.booleans(),
    "text": st.text("abcäöü 01,\n", max_size=4),
}


@given(data=st.data())
@laws
def test_columns_come_back(stored, tmp_path, data):
    cohort = g2l.open(stored).where(slides=["b", "d"])
    drawn = {kind: data.draw(st.lists(values, min_size=25, max_size=25)) for kind, values in COLUMNS.items()}
    for kind, values in drawn.items():
        cohort.write_column(kind, np.array(values, dtype=object) if kind == "text" else values)
    shutil.rmtree(tmp_path / "o.zarr", ignore_errors=True)
    for found in (cohort.patches(), cohort.copy(tmp_path / "o.zarr").patches()):
        assert found["text"].astype("string").fillna("").tolist() == drawn["text"]
        for kind in ("float", "whole", "truth"):
            np.testing.assert_array_equal(found[kind], np.array(drawn[kind]))
            assert found[kind].dtype == np.array(drawn[kind]).dtype
    require_whole(stored)


def test_a_column_of_some_patches(stored):
    cohort = g2l.open(stored)
    table = cohort.patches()
    part = cohort.where("medical_center=A", n_patches=4)
    part.write_column("cluster", [3] * 8)
    found = g2l.open(stored).patches()["cluster"]
    keys = set(zip(part.patches()["slide_id"], part.patches()["row"], strict=True))
    has = [key in keys for key in zip(table["slide_id"], table["row"], strict=True)]
    np.testing.assert_array_equal(found, np.where(has, 3, np.nan))
    cohort.where(slides=["d"]).write_column("cluster", [1] * 5)
    found = g2l.open(stored).patches()["cluster"]
    np.testing.assert_array_equal(found[table["slide_id"] == "d"], [1] * 5)
    assert (found == 3).sum() == 8


def test_series_and_mappings(stored):
    cohort = g2l.open(stored)
    table = cohort.patches()
    shuffled = (table["x"] * 1000 + table["row"]).sample(frac=0.5, random_state=0)
    cohort.write_column("code", shuffled)
    found = cohort.patches()["code"]
    np.testing.assert_array_equal(found, (table["x"] * 1000 + table["row"]).where(table.index.isin(shuffled.index)))
    cohort.write_column("stage", {"b": "II", "d": "III"})
    assert cohort.patches()["stage"].astype("string").fillna("").tolist() == [
        {"b": "II", "d": "III"}.get(slide_id, "") for slide_id in table["slide_id"]
    ]
    with pytest.raises(UsageError, match="the index of the series must be that of patches"):
        cohort.write_column("code", pd.Series([1, 2], index=[0, 68]))
    with pytest.raises(UsageError, match="expected 68 values, one for each row of patches.*got 3"):
        cohort.write_column("code", [1, 2, 3])
    with pytest.raises(UnknownNameError, match="unknown slide 'e'"):
        cohort.write_column("code", {"e": 1})
    for name in ("slide_id", "row", "status"):
        with pytest.raises(UsageError, match="no column can be called"):
            cohort.write_column(name, [0] * 68)
    with pytest.raises(StoreError, match="no column can be called 'a/b'"):
        cohort.write_column("a/b", [0] * 68)


def test_a_column_is_a_label(stored):
    """Where patches are chosen, in blocks, and in benchmark tasks."""
    cohort = g2l.open(stored)
    cohort.write_column("tumor", np.where(np.arange(68) % 3 == 0, "yes", "no").astype(object))
    part = cohort.where("tumor=yes")
    assert part.patches().index.size == 23
    assert set(np.concatenate([block.labels for block in part.blocks(ENCODER, label="tumor")])) == {"yes"}
    spec = TaskSpec(name="t", metrics=("robustness",), label="tumor", where=("tumor=*",))
    rows = gather([FeatureStore.open(stored)], spec, stored)
    assert set(rows.label) == {"yes", "no"}


def test_a_damaged_column_costs_that_column(stored):
    cohort = g2l.open(stored)
    cohort.write_column("score", np.arange(68.0))
    path = next((stored / "slides/b/columns/score").glob("c.*"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    (problem,) = [p for p in verify(FeatureStore.open(stored)) if p.kind == "damaged"]
    assert (problem.slide_id, problem.table) == ("b", "columns/score")
    with pytest.raises(StoreCorruptError, match="slide b: columns/score"):
        cohort.patches()
    store = FeatureStore.open(stored, writable=True)
    assert [done for _, done in repair_tables(store, [problem])] == [
        "dropped; who has added the column may write it again"
    ]
    assert cohort.patches()["score"].isna().sum() == 20
    require_whole(stored)


def test_relocating(stored, tmp_path):
    (tmp_path / "empty").mkdir()
    found = g2l.open(stored).relocate(tmp_path / "empty", dry_run=True)
    assert set(found.missing) == set(SIZES)
    with pytest.raises(UsageError, match="no such folder"):
        g2l.open(stored).relocate(tmp_path / "none")
    assert facts().source == "/s.svs"

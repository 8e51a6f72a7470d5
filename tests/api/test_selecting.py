"""Which patches `where` takes, and which labels `with_labels` gives them."""

import csv
from fnmatch import fnmatchcase

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import g2l_core as g2l
from g2l_core.errors import ManifestError, UsageError
from g2l_core.store import schema
from tests.api.conftest import SIZES, make_store, plain
from tests.store.toy import ENCODER

laws = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "SHARD_ROWS", 16)
        patch.setattr(schema, "CHUNK_ROWS", 4)
        yield g2l.open(make_store(tmp_path_factory.mktemp("api") / "s.zarr"))


def keys(cohort):
    table = cohort.patches()
    return list(zip(table["slide_id"], table["row"], strict=True))


def write_csv(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@given(pattern=st.sampled_from(["A", "B", "[AC]", "*", "?", "x", ""]), n=st.integers(1, 40), seed=st.integers(0, 3))
@laws
def test_where_takes_what_fits_and_draws_so_many(cohort, pattern, n, seed):
    table = cohort.patches()
    fits = table["medical_center"].astype("string").fillna("").map(lambda value: fnmatchcase(value, pattern))
    fitting = cohort.where(f"medical_center={pattern}")
    assert keys(fitting) == list(zip(table.loc[fits, "slide_id"], table.loc[fits, "row"], strict=True))
    drawn = cohort.where(f"medical_center={pattern}", n_patches=n, seed=seed)
    counts = pd.Series([slide_id for slide_id, _ in keys(drawn)], dtype=object).value_counts()
    good = table.loc[fits & (table["status"] == "ok"), "slide_id"].astype(object).value_counts()
    assert counts.to_dict() == good.clip(upper=n).to_dict()
    assert set(drawn.patches()["status"]) <= {"ok"}
    assert set(keys(drawn)) <= set(keys(fitting))
    assert keys(drawn) == keys(cohort.where(n_patches=n, seed=seed).where(f"medical_center={pattern}"))


@given(slides=st.lists(st.sampled_from(sorted(SIZES)), unique=True), n=st.integers(1, 10))
@laws
def test_a_draw_depends_on_seed_and_slide_alone(cohort, slides, n):
    alone = [key for key in keys(cohort.where(n_patches=n)) if key[0] in slides]
    assert keys(cohort.where(slides=slides, n_patches=n)) == alone
    assert keys(cohort.where(slides=slides).where(n_patches=n)) == alone


def test_another_seed_draws_others(cohort):
    draws = {tuple(keys(cohort.where(slides=["a/x"], n_patches=8, seed=seed))) for seed in range(5)}
    assert len(draws) == 5


def test_conditions_on_single_patches(cohort):
    part = cohort.where("patient_id=q1")
    assert keys(part) == [("set", 1), ("set", 3), ("set", 5)]
    wanted = [row[-1] for row in plain(cohort.path) if (row[0], row[1]) in set(keys(part))]
    np.testing.assert_array_equal(part.numpy(ENCODER), wanted)


@given(values=st.dictionaries(st.sampled_from(sorted(SIZES)), st.sampled_from(["wt", "mut", ""]), min_size=1))
@laws
def test_labels_by_slide(cohort, tmp_path, values):
    path = write_csv(tmp_path / "tp53.csv", ["slide_id", "tp53"], values.items())
    table = cohort.with_labels(path).patches()
    assert table["tp53"].astype("string").fillna("").tolist() == [values.get(i, "") for i in table["slide_id"]]
    pd.testing.assert_frame_equal(table.drop(columns="tp53"), cohort.patches())
    blank = [slide_id for slide_id in sorted(SIZES) if not values.get(slide_id)]
    notes = [note for note in cohort.with_labels(path).notes if "no tp53 for" in note]
    assert bool(notes) == bool(blank)
    assert not blank or f"no tp53 for {len(blank)} slide" in notes[0]


@given(rows=st.sets(st.integers(0, 19), min_size=1), shuffled=st.randoms())
@laws
def test_labels_by_corner(cohort, tmp_path, rows, shuffled):
    table = cohort.patches()
    of_slide = table[table["slide_id"] == "b"].set_index("row")
    lines = [("b", of_slide.loc[row, "x"], f"{of_slide.loc[row, 'y']}.0", f"g{row}") for row in sorted(rows)]
    shuffled.shuffle(lines)
    path = write_csv(tmp_path / "grade.csv", ["slide_id", "x", "y", "grade"], lines)
    labeled = cohort.with_labels(path)
    wanted = [f"g{row}" if slide_id == "b" and row in rows else "" for slide_id, row in keys(cohort)]
    assert labeled.patches()["grade"].astype("string").fillna("").tolist() == wanted
    assert keys(labeled.where("grade=g*")) == [("b", row) for row in sorted(rows)]


def test_labels_by_patch(cohort, tmp_path):
    path = write_csv(
        tmp_path / "l.csv", ["slide_id", "patch_id", "kind"], [("set", "im2.png", "t"), ("set", "im3", "n")]
    )
    table = cohort.with_labels(path).patches()
    assert table.set_index("patch_id")["kind"].astype("string").fillna("").loc[["im2.png", "im3.png"]].tolist() == [
        "t",
        "n",
    ]
    assert any("no kind for 4 patches" in note for note in cohort.with_labels(path).notes)


def test_a_newer_table_takes_precedence(cohort, tmp_path):
    first = write_csv(tmp_path / "1.csv", ["slide_id", "patient_id"], [("b", "x")])
    second = write_csv(tmp_path / "2.csv", ["slide_id", "patient_id"], [("a/x", "y")])
    one = cohort.with_labels(first)
    two = one.with_labels(second)
    assert one.where("patient_id=*?").slide_ids == ["b"]
    assert two.where("patient_id=*?").slide_ids == ["a/x"]
    assert one.where("patient_id=x").with_labels(second).slide_ids == ["b"]
    assert cohort.where("patient_id=p1").slide_ids == ["a/x", "b"]
    assert "labels of 1.csv, labels of 2.csv" in repr(two)


def test_contradictions_are_refused_by_their_lines(cohort, tmp_path):
    path = write_csv(tmp_path / "l.csv", ["slide_id", "a", "b"], [("b", "1", "2"), ("d", "1", "2"), ("b", "1", "3")])
    with pytest.raises(ManifestError, match="lines 2 and 4 give slide b different b, '2' and '3'; keep the right one"):
        cohort.with_labels(path)


def test_slides_that_the_store_does_not_have(cohort, tmp_path):
    path = write_csv(tmp_path / "l.csv", ["slide_id", "a"], [("b", "1"), ("n1", "1"), ("zz", "1")])
    with pytest.raises(ManifestError, match=r'names 1 slide \(n1\) that .* does not have.*missing="skip"'):
        cohort.with_labels(path)
    labeled = cohort.with_labels(path, missing="skip")
    assert labeled.where("a=1").slide_ids == ["b"]
    assert "l.csv: 1 slide (n1) left out, in no store" in labeled.notes
    assert "l.csv: 1 slide (zz) left out, failed in stage one" in labeled.notes
    with pytest.raises(UsageError, match="missing must be refuse or skip"):
        cohort.with_labels(path, missing="note")


def test_labels_called_as_the_table_s_own_columns(cohort, tmp_path):
    path = write_csv(tmp_path / "l.csv", ["slide_id", "status"], [("b", "dead"), ("d", "alive")])
    table = cohort.with_labels(path).patches()
    assert set(table["status"]) == {"ok", "unreadable"}
    assert set(table.loc[table["slide_id"] == "b", "status_label"]) == {"dead"}
    assert cohort.with_labels(path).where("status=alive").slide_ids == ["d"]

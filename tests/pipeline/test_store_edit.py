"""Stores that are changed after they were made: labels, parts, unions, slides taken out; and what takes room."""

import json
import sys

import numpy as np
import pytest

from g2l_core.store.features import FeatureStore
from g2l_core.store.verify import verify_slides
from pipeline.cli.main import main
from pipeline.store_edit import usage
from tests.planted import PATCHES, make_store

STRENGTH = {"teacher": (0.8, 0.0), "weak": (0.1, 0.8)}


@pytest.fixture
def store(tmp_path):
    make_store(tmp_path / "s.zarr", STRENGTH, patients=4)
    return tmp_path / "s.zarr"


def g2l(capsys, *arguments):
    """The exit code and what was printed on either stream."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["g2l", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
    printed = capsys.readouterr()
    return stopped.value.code or 0, printed.out + printed.err


def is_sound(path):
    return not any(checked.problems for checked in verify_slides(FeatureStore.open(path)))


def test_labels_of_slides_replace_those_of_the_manifest(store, tmp_path, capsys):
    table = tmp_path / "tp53.csv"
    table.write_text("slide_id,tp53,medical_center\ns0,mutated,east\ns1,wild,\n")
    code, told = g2l(capsys, "store", "label", store, table, "--dry-run")
    assert code == 0
    assert "nothing is changed" in told
    assert "tp53" not in FeatureStore.open(store).slide("s0").labels
    code, told = g2l(capsys, "store", "label", store, table)
    assert code == 0
    assert "2 slides" in told
    labels = {i: FeatureStore.open(store).slide(f"s{i}").labels for i in range(3)}
    assert labels[0] == {"patient_id": "p0", "split": "train", "tp53": "mutated", "medical_center": "east"}
    assert labels[1] == {"patient_id": "p1", "split": "train", "tp53": "wild"}
    assert "tp53" not in labels[2]
    assert is_sound(store)


def test_labels_of_patches_become_columns(store, tmp_path, capsys):
    table = tmp_path / "kinds.csv"
    rows = [f"s0,{i * 16},0,{'ab'[i % 2]}" for i in range(PATCHES)]
    table.write_text("\n".join(["slide_id,x,y,kind", *rows]))
    code, _ = g2l(capsys, "store", "label", store, table)
    assert code == 0
    from g2l_core.api.cohort import open_cohort

    frame = open_cohort(store).where(slides=["s0"]).patches()
    assert frame["kind"].tolist() == ["a", "b"] * (PATCHES // 2)
    assert is_sound(store)


@pytest.mark.parametrize(
    ("rows", "words"),
    [("s0,a\ns0,b\n", "line"), ("nobody,a\n", "nobody")],
)
def test_labels_that_contradict_or_fit_nothing_change_nothing(store, tmp_path, capsys, rows, words):
    table = tmp_path / "t.csv"
    table.write_text(f"slide_id,tp53\n{rows}")
    before = (store / "slides/s0/zarr.json").read_bytes()
    code, told = g2l(capsys, "store", "label", store, table)
    assert code == 2
    assert words in told
    assert (store / "slides/s0/zarr.json").read_bytes() == before


def test_a_subset_and_the_rest_merge_into_the_whole(store, tmp_path, capsys):
    north, south, both = tmp_path / "north.zarr", tmp_path / "south.zarr", tmp_path / "both.zarr"
    code, told = g2l(capsys, "store", "subset", store, north, "--where", "medical_center=north", "--encoder", "teacher")
    assert code == 0
    assert "2 slides" in told
    assert sorted(FeatureStore.open(north).encoders) == ["teacher"]
    assert g2l(capsys, "store", "subset", store, north)[0] == 2  # there is something
    assert (
        g2l(capsys, "store", "subset", store, south, "--slide", "s0", "--slide", "s2", "--encoder", "teacher")[0] == 0
    )
    code, told = g2l(capsys, "store", "merge", north, south, "--out", both)
    assert code == 0, told
    for i in range(4):
        mine, theirs = (FeatureStore.open(path).slide(f"s{i}") for path in (both, store))
        np.testing.assert_array_equal(mine.features("teacher"), theirs.features("teacher"))
        assert mine.labels == theirs.labels
    assert is_sound(both)


def test_slides_taken_out_are_gone_and_the_others_stay(store, capsys):
    whole = sum(usage(store).values())
    code, told = g2l(capsys, "store", "rm", store, "s1", "--dry-run")
    assert (code, "nothing is changed" in told) == (0, True)
    assert g2l(capsys, "store", "rm", store, "s1", "nobody")[0] == 2
    assert len(FeatureStore.open(store).slide_ids()) == 4
    assert g2l(capsys, "store", "rm", store, "s1")[0] == 0
    assert sorted(FeatureStore.open(store).slide_ids()) == ["s0", "s2", "s3"]
    assert sum(usage(store).values()) < whole
    assert is_sound(store)


def test_room_is_told_by_encoder(store, capsys):
    code, told = g2l(capsys, "store", "du", store)
    assert code == 0
    assert "in all" in told
    found = json.loads(g2l(capsys, "store", "du", store, "--json")[1])["bytes"]
    assert set(found) == {"teacher", "weak", "tables"}
    on_disk = sum(p.stat().st_size for p in (store / "slides").rglob("*") if p.is_file())
    slides = [store / "slides" / slide_id for slide_id in ("s0", "s1", "s2", "s3")]
    assert sum(found.values()) == sum(p.stat().st_size for s in slides for p in s.rglob("*") if p.is_file()) <= on_disk


@pytest.mark.parametrize("address", ["s3://bucket/x.zarr", "https://host/x.zarr", "gs://b/x"])
def test_an_address_is_not_written_to(address, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, told = g2l(capsys, "cache-teacher", tmp_path, "--store", address, "--teacher", "efficientnet-lite0@64")
    assert code == 2
    assert address in told
    assert list(tmp_path.iterdir()) == []

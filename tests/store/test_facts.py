"""What a store keeps about itself: the same JSON after reading and writing, whichever version wrote it."""

import json
from pathlib import Path

import pytest

from g2l_core.store.documents import read_group, write_group
from g2l_core.store.facts import EncoderFacts, ExtractionRunFacts, FeatureFacts, ShardRecord, SlideFacts, StoreFacts
from g2l_core.store.features import FeatureStore

GOLDEN = Path(__file__).resolve().parents[1] / "golden/store"


def kept(path):
    return json.loads((GOLDEN / path / "zarr.json").read_text())["attributes"]["g2l"]


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        (StoreFacts, ""),
        (SlideFacts, "slides/p01-1"),
        (SlideFacts, "slides/images"),
        (SlideFacts, "slides/broken"),
        (FeatureFacts, "slides/p01-1/features/golden-teacher-random0"),
    ],
)
def test_facts_of_an_earlier_version_are_written_as_they_were_read(kind, path):
    stored = kept(path)
    assert kind.from_json(stored).to_json() == stored
    later = {**stored, "of a later version": [1, {"a": None}]}
    assert kind.from_json(later).to_json() == later


def test_unknown_keys_inside_are_kept_too():
    stored = kept("")
    for inside in (*stored["encoders"].values(), *stored["runs"]):
        inside["of a later version"] = 1
    assert StoreFacts.from_json(stored).to_json() == stored
    shard = {"rows": 1, "failed": 0, "crc32c": 2, "sha256": "x"}
    assert ShardRecord.from_json(shard).to_json() == shard


def test_facts_have_names_and_types():
    store = StoreFacts.from_json(kept(""))
    teacher = store.encoders["golden-teacher-random0"]
    assert (teacher.name, teacher.dim, teacher.precision) == ("golden-teacher", 16, "fp32")
    assert teacher.extra["licence"] == "Apache-2.0"
    assert store.runs[0].utilization == 0.2709
    slide = SlideFacts.from_json(kept("slides/p01-1"))
    assert (slide.kind, slide.level0_size, slide.n_views) == ("slide", (1536, 1536), 2)
    assert SlideFacts.from_json(kept("slides/images")).mpp is None
    assert SlideFacts.from_json(kept("slides/broken")).reason.startswith("it is neither a slide")


def test_absent_keys_have_defaults():
    assert StoreFacts.from_json({"format": 1, "grid": {"mpp": 0.5}, "views": {}}).grid == {
        "artefacts": "none",
        "mpp": 0.5,
    }
    assert ExtractionRunFacts.from_json({"patches": 3}).patches == 3
    assert FeatureFacts.from_json({}) == FeatureFacts()
    assert SlideFacts.from_json({"source": "/s.svs", "status": "ok"}).labels == {}
    assert EncoderFacts.from_json({"digest": "0", "dim": 6}).to_json() == {"digest": "0", "dim": 6}


def test_a_store_keeps_what_a_later_version_wrote_through_changes(toy):
    write_group(toy.path, {**read_group(toy.path, checked=True), "later": 1})
    folder = toy.path / "slides/a/x"
    write_group(folder, {**read_group(folder, checked=True), "later": 2})
    store = FeatureStore.open(toy.path, writable=True)
    store.add_run(ExtractionRunFacts(patches=1))
    store.slide("a/x").set_labels({"grade": "1"})
    store.slide("a/x").forget(0)
    root = read_group(toy.path, checked=True)
    assert (root["later"], len(root["runs"])) == (1, 1)
    slide = read_group(folder, checked=True)
    assert (slide["later"], slide["labels"]) == (2, {"grade": "1"})
    assert set(slide["features"]["toy"]["shards"]) == {"1.0", "1.1"}

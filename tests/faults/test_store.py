"""A store under damage: every changed file is named or does no harm, and what is dropped is computed again."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from g2l_core.errors import G2LError, StoreCorruptError, StoreError
from g2l_core.patches.views import COLUMNS, ViewSpec, sample_views
from g2l_core.store import schema
from g2l_core.store.catalogue import CATALOGUE
from g2l_core.store.documents import read_group, write_group
from g2l_core.store.features import FeatureStore
from g2l_core.store.ids import refusals
from g2l_core.store.verify import repair_all, verify
from tests.store.toy import ENCODER, create, facts, fill, lay

N_MUTATIONS = int(os.environ.get("G2L_CHANGES", "200"))
"""Changes that are tried. docs/reliability.md has those of 440: `G2L_CHANGES=440 pytest tests/faults/test_store.py`."""
SEED = 3
TABLES = ("coords", "patch_status", "view_params", "pixel_hash")


def lay_images(store, slide_id):
    names = [f"{slide_id}-{i}.png" for i in range(18)]
    coords = np.zeros((18, 2), np.int32)
    params = sample_views(ViewSpec(), slide_id, coords, range(2), names)
    return store.add_slide(
        slide_id, facts(kind="patches"), coords=coords, view_params=params, columns=COLUMNS, patch_ids=names
    )


def stage_one(path):
    """What stage one does: lay what is missing, encode what is missing."""
    store = create(path)
    store.sweep()
    known = set(store.slide_ids())
    for slide_id, add in (("a/x", lay), ("b/x", lay), ("images", lay_images)):
        if slide_id not in known:
            add(store, slide_id)
    for slide in store.slides():
        fill(slide)
    store.save_catalogue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "SHARD_ROWS", 16)
        patch.setattr(schema, "CHUNK_ROWS", 4)
        path = tmp_path_factory.mktemp("whole") / "s.zarr"
        stage_one(path)
        yield path


def read_all(path):
    """Everything that a user could read, as bytes."""
    store = FeatureStore.open(path)
    store.require_undamaged()
    found = {"": (store.grid, store.views, sorted(store.encoders), store.slide_ids(), store.failed_slides())}
    for slide in store.slides():
        tables = {name: slide.read_table(name).tobytes() for name in TABLES}
        features = {view: slide.features(ENCODER, view=view).tobytes() for view in range(slide.n_views)}
        found[slide.slide_id] = (slide.labels, slide.facts.source, slide.patch_ids, tables, features)
    return found


def flip(content, rng):
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]


MUTATIONS = {
    "empty": lambda content, rng: b"",
    "torn": lambda content, rng: content[: rng.randrange(len(content))],
    "flipped": flip,
    "flipped again": flip,
    "zeros": lambda content, rng: bytes(len(content)),
    "noise": lambda content, rng: rng.randbytes(len(content)),
    "longer": lambda content, rng: content + rng.randbytes(7),
    "absent": None,
}


def mutations(path):
    """(Relative file, name, content) of many changes of one file each, and swaps of files between slides."""
    rng = random.Random(SEED)
    files = sorted(p.relative_to(path) for p in path.rglob("*") if p.is_file())
    singles = [(file, name) for file in files for name in MUTATIONS] * 2
    swaps = [(file, "swapped") for file in files if "a/x" in str(file)]
    for file, name in [*swaps, *rng.sample(singles, N_MUTATIONS - len(swaps))]:
        content = (path / file).read_bytes()
        if name == "swapped":
            yield file, name, (path / str(file).replace("a/x", "b/x")).read_bytes()
        else:
            change = MUTATIONS[name]
            yield file, name, change and change(content, rng)


def test_every_changed_file_is_named_or_does_no_harm(whole, tmp_path):
    """Silent is what reads otherwise than before without an error; internal is an error that is not G2L's."""
    wanted = read_all(whole)
    path = Path(shutil.copytree(whole, tmp_path / "s.zarr"))
    counts = {"named": 0, "harmless": 0, "healed": 0, "refused": 0}
    for i, (file, name, content) in enumerate(mutations(whole)):
        original, what = (path / file).read_bytes(), f"{file} {name}"
        put(path / file, content)
        unchanged, said = outcome(path, wanted)
        assert unchanged or said, f"{what}: silent"
        assert unchanged or path.name in said or "slide " in said, f"{what}: {said}"
        counts["harmless" if unchanged else "named"] += 1
        problems = problems_of(path)
        assert unchanged or problems, f"{what}: verify is content"
        if i % 10 == 0:
            copy = Path(shutil.copytree(path, tmp_path / f"{i}"))
            counts[heal(copy, problems, wanted, what)] += 1
            shutil.rmtree(copy)
        put(path / file, original)
    assert counts["named"] + counts["harmless"] == N_MUTATIONS
    assert counts["named"] > 0.45 * N_MUTATIONS
    assert counts["healed"] > 0.03 * N_MUTATIONS
    print(counts)


def outcome(path, wanted):
    """Whether everything reads as it should, and the error where there is one."""
    try:
        return read_all(path) == wanted, ""
    except G2LError as error:
        return False, str(error)


def put(path, content):
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)


def problems_of(path):
    try:
        return [problem for problem in verify(FeatureStore.open(path)) if problem.kind != "leftover"]
    except G2LError as error:
        return [error]


def heal(path, problems, wanted, what):
    """Repair, run stage one again, and find everything as it was; only the store's own document cannot be made anew."""
    if any(isinstance(problem, G2LError) for problem in problems):
        return "refused"
    store = FeatureStore.open(path, writable=True)
    for _, done in repair_all(store, problems):
        assert "not repaired" not in done, what
    if any(problem.table for problem in problems_of(path)):
        return "refused"  # tables are derived from the slides, which a toy store does not have
    stage_one(path)
    assert not problems_of(path), what
    assert read_all(path) == wanted, what
    return "healed"


# ---- documents ------------------------------------------------------------------------------------------


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copy.zarr"))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a":' * 5000, b'{"attributes": 3, "node_type": "group"}']
)
def test_one_damaged_document_costs_one_slide(copy, content):
    (copy / "slides/a/x/zarr.json").write_bytes(content)
    store = FeatureStore.open(copy)
    assert [slide.slide_id for slide in store.slides()] == ["b/x", "images"]
    assert list(store.damaged) == ["a/x"]
    assert str(copy / "slides/a/x/zarr.json") in store.damaged["a/x"]
    with pytest.raises(StoreCorruptError, match="slide a/x: .*zarr.json is damaged"):
        store.slide("a/x")
    with pytest.raises(StoreCorruptError, match="slide a/x"):
        store.complete_slides(ENCODER, view=0)


def test_a_document_of_another_slide_is_noticed(copy):
    shutil.copy(copy / "slides/b/x/zarr.json", copy / "slides/a/x/zarr.json")
    assert "it is the document of slide 'b/x'" in FeatureStore.open(copy).damaged["a/x"]


@pytest.mark.parametrize(
    "changes", [{"n_patches": -1}, {"n_patches": "20"}, {"n_views": None}, {"features": [1]}, {"tables": 3}]
)
def test_facts_of_other_types_are_damage_even_with_a_fitting_checksum(copy, changes):
    folder = copy / "slides/a/x"
    write_group(folder, {**read_group(folder, checked=True), **changes})
    with pytest.raises(G2LError, match="slide a/x"):
        read_all(copy)
    assert any(problem.slide_id == "a/x" for problem in verify(FeatureStore.open(copy)))


def test_a_lost_document_comes_back_from_the_catalogue(copy, whole):
    (copy / "slides/a/x/zarr.json").unlink()
    problems = list(verify(FeatureStore.open(copy)))
    assert [(p.kind, p.slide_id) for p in problems] == [("damaged", "a/x")]
    ((_, done),) = repair_all(FeatureStore.open(copy, writable=True), problems)
    assert "put back" in done
    assert read_all(copy) == read_all(whole)


def test_a_group_between_can_be_lost(copy, whole):
    (copy / "slides/a/zarr.json").unlink()
    assert read_all(copy) == read_all(whole)


# ---- the catalogue --------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, b"", b"{}\n", b"noise\n" * 10])
def test_the_catalogue_is_only_an_index(copy, whole, content):
    if content is None:
        shutil.rmtree((copy / CATALOGUE).parent)
    else:
        (copy / CATALOGUE).write_bytes(content)
    assert read_all(copy) == read_all(whole)


def test_a_stale_catalogue_is_noticed(copy):
    FeatureStore.open(copy, writable=True).slide("a/x").set_labels({"patient_id": "p9"})
    assert FeatureStore.open(copy).slide("a/x").labels == {"patient_id": "p9"}
    shutil.rmtree(copy / "slides/b")
    assert FeatureStore.open(copy).slide_ids() == ["a/x", "images"]


def test_good_patches_are_counted_block_by_block(copy):
    store = FeatureStore.open(copy, writable=True)
    slide = store.slide("a/x")
    status = np.array([1] * 3 + [0] * 17, np.uint8)
    slide.put_table("patch_status", status)
    store.save_catalogue()
    again = FeatureStore.open(copy)
    assert [again.good_by_block(s).tolist() for s in again.slides()] == [[17], [20], [18]]
    line = json.loads((copy / CATALOGUE).read_text().splitlines()[1])
    assert line[0] == "a/x"


# ---- ids ------------------------------------------------------------------------------------------------

IMPOSSIBLE = [
    "zarr.json", "c", "coords", "features", "patch_id", "a/coords", "features/x", "x.partial", "a\0b", "a\nb", "a\\b",
    "x" * 201, "é" * 101, "", "/x", "x/", "a//b", ".", "..", "../x", "a/../b", "c.0.0", "a\tb", "a\x7fb", "\u202eb",
]  # fmt: skip


@pytest.mark.parametrize("slide_id", IMPOSSIBLE)
def test_impossible_ids_are_refused_and_write_nothing(tmp_path, slide_id):
    store = create(tmp_path / "s.zarr")
    assert list(store.refusals([slide_id, "fine"])) == [slide_id]
    before = sorted(tmp_path.rglob("*"))
    for write in (lay, lambda s, i: s.fail_slide(i, "/s.svs", "broken")):
        with pytest.raises(StoreError, match="slide "):
            write(store, slide_id)
    assert sorted(tmp_path.rglob("*")) == before
    assert store.slide_ids() == []


@pytest.mark.parametrize(
    ("stored", "added"), [(["brca/x", "brca/y"], "brca"), (["z"], "z/inner"), (["z"], "z/a/b"), (["a/b/e"], "a/b")]
)
def test_no_slide_lies_inside_another(tmp_path, stored, added):
    store = create(tmp_path / "s.zarr")
    for slide_id in stored:
        fill(lay(store, slide_id))
    assert "no slide can lie inside another" in store.refusals([added])[added]
    with pytest.raises(StoreError):
        lay(store, added)
    with pytest.raises(StoreError):
        store.fail_slide(added, "/broken.svs", "a broken file of that name")
    store.sweep()
    assert FeatureStore.open(store.path).slide_ids() == sorted(stored)
    assert list(verify(FeatureStore.open(store.path))) == []


def test_ids_of_one_call_are_compared_with_each_other():
    assert list(refusals(["a/x", "a", "a/x/y", "b", "b/z"], [])) == ["a", "a/x/y", "b/z"]
    assert refusals(["a", "a/x"], ["a", "a/x"]) == {}


def test_a_folder_that_holds_anything_is_never_replaced(tmp_path):
    """Whatever lies where a slide would: a file of the user, a slide whose document is lost."""
    store = create(tmp_path / "s.zarr")
    (tmp_path / "s.zarr/slides/a").mkdir(parents=True)
    note = tmp_path / "s.zarr/slides/a/note.txt"
    note.write_text("mine")
    with pytest.raises(StoreError, match="cannot write slide a"):
        lay(store, "a")
    assert note.read_text() == "mine"


def test_many_slides_are_listed_quickly_and_read_only_once(tmp_path, monkeypatch):
    """The documents of slides that have not changed are not opened again."""
    store = create(tmp_path / "s.zarr")
    for i in range(30):
        lay(store, f"s{i:02}", n=3, n_views=1)
    store.save_catalogue()
    opened = FeatureStore.open(tmp_path / "s.zarr")
    from g2l_core.store import catalogue

    monkeypatch.setattr(catalogue, "read_slide", None)
    assert len(opened.slide_ids()) == 30
    assert sum(len(slide) for slide in opened.slides()) == 90

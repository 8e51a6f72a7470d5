"""Label tables as people have them: told apart, read, or refused with what to change; nothing is dropped in silence."""

from dataclasses import replace

import numpy as np
import pytest

from g2l_core.benchmark.evaluate import BenchSpec, evaluate_task
from g2l_core.benchmark.metric_groups.slides import event_of
from g2l_core.benchmark.notes import alike, notes_on
from g2l_core.benchmark.rows import gather
from g2l_core.benchmark.spec import KnnOptions, SurvivalOptions, TaskSpec
from g2l_core.benchmark.task_file import read_tasks
from g2l_core.errors import ManifestError, TaskError
from g2l_core.store import schema
from g2l_core.store.facts import EncoderFacts, SlideFacts
from g2l_core.store.features import FeatureStore
from g2l_core.store.writer import FeatureWriter
from tests.planted import PATCHES, PATIENTS, make_store, patch_labels, write_labels
from tests.store.toy import change_facts

SPEC = TaskSpec(name="t", labels="labels.csv", label="kind", split="split", metrics=("knn",), knn=KnnOptions(k=(3,)))
WHOLE = [{"slide_id": f"s{p}", "kind": "ab"[p % 2]} for p in range(PATIENTS)]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("planted") / "s.zarr", {"teacher": (1, 0)})


def joined(store, folder, rows, spec=SPEC):
    """The rows of the task on a label file of these rows, and its notes."""
    if rows:
        write_labels(folder / "labels.csv", rows)
    found = gather([store], spec, folder)
    return found, notes_on(found, spec, [store], ["teacher"])


def text_table(folder, text, encoding="utf-8"):
    (folder / "labels.csv").write_text(text, encoding=encoding)


def images(path, patch_ids=("a/01.png", "a/02.png", "b/03.png", "b/04.png"), labels=(), **shared):
    """A store with one set of patch images."""
    store = FeatureStore.create(path, grid={"patch_px": 16}, views={"seed": 0})
    store.add_encoder("teacher", EncoderFacts(digest="teacher", dim=4))
    n = len(patch_ids)
    facts = SlideFacts(kind="patches", source="none", patch_px_level0=16, level0_size=(16, 16), labels=shared)
    params = np.zeros((n, 1, 2), np.float32)
    slide = store.add_slide(
        "set", facts, coords=np.zeros((n, 2), np.int32), view_params=params, columns=["a", "b"], patch_ids=patch_ids
    )
    writer = FeatureWriter.open(slide, "teacher", digest="teacher", dim=4, n_views=1)
    (shard,) = writer.missing([0])
    features = np.random.default_rng(0).normal(size=(n, 4)).astype(np.float32)
    writer.write(shard, features, np.arange(1, n + 1, dtype=np.uint64), np.zeros(n, np.uint8))
    slide.set_patch_labels([dict(row) for row in labels] or [{}] * n)
    return FeatureStore.open(path, writable=True)


# ---- two rows of one thing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([*WHOLE, {"slide_id": "s1", "kind": "a"}], "lines 3 and 10 give slide s1 different kind, 'b' and 'a'"),
        ([*WHOLE, {"slide_id": "s1", "kind": ""}], "lines 3 and 10 give slide s1 different kind, 'b' and ''"),
        ([*WHOLE, {"slide_id": "S1.svs", "kind": "a"}], "lines 3 and 10 give slide s1 different kind"),
        (
            [*patch_labels(), {"slide_id": "s0", "x": "16", "y": "0", "kind": "a"}],
            "lines 3 and 322 give slide s0, patch 16,0 different kind, 'b' and 'a'",
        ),
        ([*patch_labels(), {"slide_id": "s0", "x": "16.0", "y": "0", "kind": "a"}], "lines 3 and 322"),
        ([*patch_labels(), {"slide_id": "s0", "x": "", "y": "", "kind": "a"}], "line 322 is of the whole slide s0"),
    ],
)
def test_rows_that_contradict_each_other_are_refused(store, tmp_path, rows, words):
    with pytest.raises(ManifestError, match=words):
        joined(store, tmp_path, rows)


def test_columns_other_than_the_label_may_not_differ_either(store, tmp_path):
    rows = [{**row, "split": ("train", "test")[p >= 4], "note": str(p)} for p, row in enumerate(WHOLE)]
    with pytest.raises(ManifestError, match="lines 2 and 10 give slide s0 different split, 'train' and 'test'"):
        joined(store, tmp_path, [*rows, {**rows[0], "split": "test"}])
    found, notes = joined(store, tmp_path, [*rows, {**rows[0], "note": "again"}])  # nobody reads it
    assert (len(found), notes) == (PATIENTS * PATCHES, [])


def test_equal_rows_count_once(store, tmp_path):
    assert len(joined(store, tmp_path, [*WHOLE, *WHOLE])[0]) == PATIENTS * PATCHES


# ---- blanks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "blank", ["NA", "NaN", "nan", "None", "null", "N/A", "#N/A", "-", "", "<NA>", "n.a.", "'--", "[Not Available]", "?"]
)
def test_what_stands_for_a_missing_value_is_no_class(store, tmp_path, blank):
    rows = [{**row, "kind": blank if row["slide_id"] in {"s0", "s5"} else row["kind"]} for row in WHOLE]
    found, notes = joined(store, tmp_path, rows)
    assert set(found.label.tolist()) == {"a", "b"}
    assert "task t: 80 of 320 patches have no kind and were left out" in notes
    if blank:
        assert f"read as missing values: {blank.removeprefix(chr(39))!r} in kind (2)" in notes[0]


@pytest.mark.parametrize("column", ["patient_id", "medical_center", "split"])
def test_blanks_are_no_patient_no_center_and_no_split(store, tmp_path, column):
    rows = [{**row, "patient_id": row["slide_id"], "medical_center": "c", "split": "train"} for row in WHOLE]
    for row in rows[4:]:
        row["split"] = "test"
    rows[0][column] = rows[7][column] = "NA"  # one patient NA would be on both sides
    found, notes = joined(store, tmp_path, rows)
    assert "NA" not in {*found.cluster.tolist(), *found.center.tolist(), *found.part.tolist()}
    assert any("read as missing values: 'NA'" in note for note in notes)


def test_an_id_is_never_a_blank(tmp_path):
    store = images(tmp_path / "s.zarr", ["none.png", "na", "a.png", "b.png"])
    rows = [{"slide_id": "set", "patch_id": i, "kind": k} for i, k in zip(("none.png", "na"), "ab", strict=True)]
    found, _ = joined(store, tmp_path, rows, replace(SPEC, split="", folds=0, metrics=("cka",)))
    assert found.label.tolist() == ["a", "b"]


# ---- one source a column --------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", ["blank", "no row"])
@pytest.mark.parametrize("column", ["medical_center", "split"])
def test_a_column_of_the_label_file_does_not_fall_back_to_the_manifest(store, tmp_path, absent, column):
    rows = [{**row, column: ("train", "test")[p >= 4]} for p, row in enumerate(WHOLE)]
    rows = [{**row, column: ""} if row["slide_id"] == "s0" else row for row in rows]
    spec = replace(SPEC, label=column) if column != "split" else SPEC
    found, notes = joined(store, tmp_path, rows[absent == "no row" :], spec)
    assert (len(found), "s0" in found.slide_ids) == (280, False)
    assert any("40 of 320 patches" in note for note in notes)


def test_other_columns_are_the_manifest_s(store, tmp_path):
    found, notes = joined(store, tmp_path, WHOLE)
    assert set(found.cluster.tolist()) == {f"p{p}" for p in range(PATIENTS)}
    assert (found.cluster_unit, notes) == ("patients", [])


@pytest.mark.parametrize("name", ["site", "Centre", "medical_center"])
def test_a_column_is_found_under_every_name(store, tmp_path, name):
    rows = [{**row, name: "ab"[p % 2]} for p, row in enumerate(WHOLE)]
    found, _ = joined(store, tmp_path, rows, replace(SPEC, label=name))
    assert found.label.tolist() == found.center.tolist() == ["ab"[p % 2] for p in range(8) for _ in range(PATCHES)]


# ---- columns by patch -----------------------------------------------------------------------------------------


def test_patients_that_differ_inside_a_set_are_never_separated(tmp_path):
    names = [f"{i:02}.png" for i in range(40)]
    labels = [{"patient_id": f"p{i // 4}", "kind": "ab"[i % 2]} for i in range(40)]
    store = images(tmp_path / "s.zarr", names, labels, medical_center="c")
    spec = TaskSpec(name="t", label="kind", folds=2, metrics=("knn",), knn=KnnOptions(k=(3,)))
    found, notes = joined(store, tmp_path, [], spec)
    assert (found.cluster_unit, notes) == ("patients", [])
    assert found.cluster.tolist() == [f"p{i // 4}" for i in range(40)]
    assert set(found.center.tolist()) == {"c"}
    outcome = evaluate_task([store], spec, BenchSpec(encoders=("teacher",), draws=100), tmp_path)
    assert outcome.results[0].settings["split"] == "2 folds by patients"


def test_a_column_by_patch_may_be_blank_in_places(tmp_path):
    store = images(tmp_path / "s.zarr", labels=[{"kind": "a", "patient_id": "p"}, {"kind": "b"}, {}, {"kind": ""}])
    found, notes = joined(store, tmp_path, [], TaskSpec(name="t", label="kind", metrics=("retrieval",)))
    assert (found.label.tolist(), found.cluster.tolist()) == (["a", "b"], ["p", "set#1"])
    assert "task t: 1 of 2 patches have no patient_id" in notes[1]


# ---- conditions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [
        {"split": "", "train": "fold=1", "test": "fold=2"},
        {"split": "", "train": "medical_center=*", "test": "slide_id=s[4-7]", "where": ("fold=[34]",)},
        {"split": "fold", "where": ("fold=t*",)},
    ],
)
def test_conditions_see_the_label_file_and_the_manifest(store, tmp_path, asked):
    values = ("1", "2") if "fold=1" in asked.values() else ("train", "test") if "fold" in asked.values() else ("3", "4")
    rows = [{**row, "fold": values[p >= 4]} for p, row in enumerate(WHOLE)]
    spec = replace(SPEC, **asked)
    if asked.get("train") == "medical_center=*":
        with pytest.raises(TaskError, match=r"slide s4 fits both train = 'medical_center=\*' and test = 'slide_id"):
            joined(store, tmp_path, rows, spec)
        return
    found, _ = joined(store, tmp_path, rows, spec)
    assert found.part.tolist() == ["train"] * 4 * PATCHES + ["test"] * 4 * PATCHES


def test_conditions_on_patches(store, tmp_path):
    rows = [{**row, "region": "in" if int(row["x"]) < 320 else "out"} for row in patch_labels()]
    found, _ = joined(store, tmp_path, rows, replace(SPEC, where=("region=in",)))
    assert len(found) == PATIENTS * 20


@pytest.mark.parametrize(
    "asked", [{"where": ("stian=x",)}, {"split": "fold"}, {"split": "", "train": "f=1", "test": "f=2"}]
)
def test_a_column_that_is_nowhere_is_named_with_those_there_are(store, tmp_path, asked):
    with pytest.raises(
        TaskError, match=r"neither labels\.csv nor the manifest has a column .*; there is kind, medical_"
    ):
        joined(store, tmp_path, WHOLE, replace(SPEC, **asked))


def test_what_is_outside_of_the_split_is_told(store, tmp_path):
    rows = [
        {**row, "split": ["train", "Train", "TEST", "test", "val", "", "train", "test"][p]}
        for p, row in enumerate(WHOLE)
    ]
    found, notes = joined(store, tmp_path, rows)
    assert (len(found), notes) == (240, ["task t: 80 of 320 patches do not have split train or test and were left out"])


# ---- coordinates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["{}.0", "{}.00", "+{}", " {} ", "{}e0"])
def test_coordinates_in_any_number_form(store, tmp_path, form):
    rows = [{**row, "x": form.format(row["x"]), "y": "0.0"} for row in patch_labels()]
    assert len(joined(store, tmp_path, rows)[0]) == PATIENTS * PATCHES


@pytest.mark.parametrize("x", ["16.5", "sixteen", "16,5", "inf", "nan", "1e300", "4294967296"])
def test_coordinates_that_are_none(store, tmp_path, x):
    with pytest.raises(
        ManifestError, match=r"labels\.csv, line 2: x is '.*', expected a whole number of level-0 pixels"
    ):
        joined(store, tmp_path, [{**patch_labels()[0], "x": x}])


def test_corners_are_told_apart_by_both_coordinates(store, tmp_path):
    """Also negative ones and those that are the other way around, none of which is a patch of the slide."""
    strays = [("0", "16"), ("-16", "0"), ("0", "-1"), ("16", "-0.5e1"), ("2147483647", "2147483647"), ("-1", "-1")]
    rows = patch_labels() + [{"slide_id": "s0", "x": x, "y": y, "kind": "c"} for x, y in strays]
    found, notes = joined(store, tmp_path, rows)
    assert found.label.tolist() == [row["kind"] for row in patch_labels()]
    assert notes == [f"task t: {len(strays)} rows of labels.csv match no stored patch of their slide, first line 322"]


def test_coordinates_with_capital_letters(store, tmp_path):
    rows = [{"slide_id": row["slide_id"], "X": row["x"], "Y": row["y"], "kind": row["kind"]} for row in patch_labels()]
    assert len(joined(store, tmp_path, rows)[0]) == PATIENTS * PATCHES


@pytest.mark.parametrize("label", ["x", "y", "X"])
def test_a_label_called_as_a_coordinate(store, tmp_path, label):
    rows = [{"slide_id": row["slide_id"], label: row["kind"]} for row in WHOLE]
    assert len(joined(store, tmp_path, rows, replace(SPEC, label=label))[0]) == PATIENTS * PATCHES
    both = [{"slide_id": row["slide_id"], "x": row["kind"], "y": "c"} for row in WHOLE]
    assert len(joined(store, tmp_path, both, replace(SPEC, label="x"))[0]) == PATIENTS * PATCHES


# ---- names of classes, centers and patients -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "together"),
    [
        (["1", "1.0", "2"], [["1", "1.0"]]),
        (["Low", "low", "high"], [["Low", "low"]]),
        (["low-grade", "low grade", "Low_Grade"], [["Low_Grade", "low grade", "low-grade"]]),
        (["caf\u00e9", "cafe\u0301"], [["cafe\u0301", "caf\u00e9"]]),
        (["1", "2", "a", "b"], []),
    ],
)
def test_names_that_differ_in_form_alone(names, together):
    assert alike(names) == together


def test_such_classes_are_noted_and_merged_on_demand(store, tmp_path):
    rows = [{**row, "kind": ("Low", "low", "high", "High")[p % 4]} for p, row in enumerate(WHOLE)]
    _, notes = joined(store, tmp_path, rows)
    assert "task t: classes 'Low' and 'low' differ in case or form alone; if they are one, write " in notes[1]
    assert notes[1].endswith('classes = {"low" = "Low"} in the task')
    (tmp_path / "tasks.toml").write_text(
        '[tasks.t]\nlabels = "labels.csv"\nlabel = "kind"\nsplit = "split"\nmetrics = ["knn"]\nknn_k = 3\n'
        'classes = {"low" = "Low", "high" = "High", "mid" = "High"}\n'
    )
    (spec,) = read_tasks(tmp_path / "tasks.toml")[1]
    found, notes = joined(store, tmp_path, rows, spec)
    assert set(found.label.tolist()) == {"Low", "High"}
    assert notes == ["task t: classes merges 'mid', which no patch has"]


def test_a_class_can_be_left_out_and_merged_rows_do_not_contradict(store, tmp_path):
    rows = [{**row, "kind": ("Low", "low", "high", "odd")[p % 4]} for p, row in enumerate(WHOLE)]
    spec = replace(SPEC, classes={"low": "Low", "odd": ""})
    found, notes = joined(store, tmp_path, [*rows, {"slide_id": "s0", "kind": "low"}], spec)
    assert set(found.label.tolist()) == {"Low", "high"}
    assert "task t: 80 of 320 patches have no kind and were left out" in notes


@pytest.mark.parametrize("column", ["patient_id", "medical_center"])
def test_centers_and_patients_that_differ_in_form_are_noted(store, tmp_path, column):
    rows = [{**row, column: ("A", "B", "C", "D", "a", "E", "F", "G")[p]} for p, row in enumerate(WHOLE)]
    _, notes = joined(store, tmp_path, rows)
    assert f"task t: {column} 'A' and 'a' differ in case or form alone, and count apart; write them alike" in notes[0]


# ---- tables and ids of other tools ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("delimiter", "encoding"),
    [(";", "utf-8"), ("\t", "utf-8-sig"), (",", "cp1252"), (";", "cp1252"), (",", "utf-8-sig")],
)
def test_tables_of_other_tools(store, tmp_path, delimiter, encoding):
    lines = [delimiter.join([f"s{p}", ("é", "ü")[p % 2]]) for p in range(PATIENTS)]
    text_table(tmp_path, "\n".join([delimiter.join(["Slide ID", "kind"]), *lines]), encoding)
    found, notes = joined(store, tmp_path, [])
    assert set(found.label.tolist()) == {"é", "ü"}
    assert bool(notes) == (encoding == "cp1252")
    assert all("is no utf-8 text" in note for note in notes)


@pytest.mark.parametrize("text", ["slide|kind\ns0|a\n", "case\tkind\ns0\ta\n"])
def test_a_table_without_the_column_says_what_it_has(store, tmp_path, text):
    text_table(tmp_path, text)
    with pytest.raises(ManifestError, match=r"needs a column slide_id and rows; its columns are (slide\|kind|case)"):
        joined(store, tmp_path, [])


@pytest.mark.parametrize("form", ["{}.svs", "slides/{}.TIFF", "C:\\slides\\{}.ndpi", "{}.ome.tif"])
def test_ids_with_suffixes_and_folders(store, tmp_path, form):
    found, notes = joined(store, tmp_path, [{**row, "slide_id": form.format(row["slide_id"])} for row in WHOLE])
    assert len(found) == PATIENTS * PATCHES
    (note,) = notes
    assert "taken for the same: 8, such as" in note


@pytest.mark.parametrize("asked", ["7", "7.0", "07", "007.svs"])
def test_numbers_that_lost_their_zeros(tmp_path, asked):
    store = images(tmp_path / "s.zarr", ["0007.png", "8.png"])
    rows = [{"slide_id": "set", "patch_id": asked, "kind": "a"}, {"slide_id": "set", "patch_id": "8.png", "kind": "b"}]
    found, notes = joined(
        store, tmp_path, rows, TaskSpec(name="t", labels="labels.csv", label="kind", metrics=("cka",))
    )
    assert found.label.tolist() == ["a", "b"]
    assert f"such as '{asked}' for '0007.png'" in notes[0]


def test_an_id_that_may_be_two_slides_is_refused(tmp_path):
    store = make_store(tmp_path / "s.zarr", {"teacher": (1, 0)}, patients=4)
    slide = store.slide("s0")
    for name in ("a/7", "b/07"):
        params = np.zeros((1, 1, 2), np.float32)
        store.add_slide(
            name, slide.facts, coords=slide.coords[:1], view_params=params, columns=["a", "b"], patch_ids=None
        )
    with pytest.raises(ManifestError, match="names the slide '007', which no store has; it may be a/7 or b/07"):
        joined(store, tmp_path, [{"slide_id": "007", "kind": "a"}])


# ---- slides and patches that are not there --------------------------------------------------------------------


def test_labeled_slides_that_failed_or_are_damaged_are_counted_by_class(tmp_path):
    store = make_store(tmp_path / "s.zarr", {"teacher": (1, 0)})
    store.fail_slide("f1", "/f1.svs", "no tissue")
    store.fail_slide("f2", "/f2.svs", "no tissue")
    document = tmp_path / "s.zarr/slides/s1/zarr.json"
    document.write_text(document.read_text()[:-5])
    rows = [*WHOLE, {"slide_id": "f1", "kind": "a"}, {"slide_id": "f2", "kind": "b"}, {"slide_id": "zz", "kind": "b"}]
    _, notes = joined(store, tmp_path, rows, replace(SPEC, missing="note"))
    assert notes == [
        "task t: left out, failed in stage one: 2 slides (f1, f2), 1 of a, 1 of b",
        "task t: left out, damaged in the store: 1 slide (s1), 1 of b",
        "task t: left out, in no store: 1 slide (zz), 1 of b",
    ]
    with pytest.raises(ManifestError, match=r'no store has: zz.*missing = "note" in the task leaves them out'):
        joined(store, tmp_path, rows)
    with pytest.raises(TaskError, match="missing must be refuse or note; got 'skip'"):
        replace(SPEC, missing="skip")


def test_slides_that_failed_keep_what_the_manifest_says(tmp_path):
    store = make_store(tmp_path / "s.zarr", {"teacher": (1, 0)})
    store.fail_slide("f1", "/f1.svs", "no tissue", {"medical_center": "north"})
    store.fail_slide("f2", "/f2.svs", "no tissue")
    _, notes = joined(store, tmp_path, [], replace(SPEC, labels="", label="medical_center"))
    assert notes == ["task t: left out, failed in stage one: 2 slides (f1, f2), 1 of north, 1 of unknown class"]
    _, notes = joined(
        store, tmp_path, [], replace(SPEC, labels="", label="medical_center", where=("medical_center=n*",))
    )
    assert "1 of north" in notes[0]


def test_patches_without_features_are_counted(tmp_path):
    store = make_store(tmp_path / "s.zarr", {"teacher": (1, 0)})
    status = store.slide("s0").patch_status
    status[:5], status[7] = schema.STATUS["unreadable"], schema.STATUS["pen"]
    store.slide("s0").put_table("patch_status", status)
    _, notes = joined(store, tmp_path, patch_labels())
    assert notes == ["task t: 6 patches have no features and were left out: 5 unreadable, 1 pen"]


def test_label_rows_that_match_no_patch_are_counted(store, tmp_path):
    stray = {"slide_id": "s0", "x": "7", "y": "7", "kind": "a"}
    _, notes = joined(store, tmp_path, [*patch_labels(), stray, {**stray, "x": "8"}])
    assert notes == ["task t: 2 rows of labels.csv match no stored patch of their slide, first line 322"]


@pytest.mark.parametrize("column", ["patch_id", "file"])
def test_patches_go_by_the_manifest_s_own_id_and_by_their_file(tmp_path, column):
    own = [{"patch_id": f"tile {i}"} for i in range(4)]
    store = images(tmp_path / "s.zarr", labels=own)
    ids = [row["patch_id"] for row in own] if column == "patch_id" else store.slide("set").patch_ids
    rows = [{"slide_id": "set", "patch_id": name, "kind": kind} for name, kind in zip(ids, "abab", strict=True)]
    found, notes = joined(
        store, tmp_path, rows, TaskSpec(name="t", labels="labels.csv", label="kind", metrics=("cka",))
    )
    assert (found.label.tolist(), notes) == (["a", "b", "a", "b"], [])


# ---- survival -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "event"),
    [
        ("1:DECEASED", True), ("0:LIVING", False), ("1", True), ("0.0", False), ("Yes", True), ("DECEASED", True),
        ("alive", False), ("1:Recurred/Progressed", True), ("0:DiseaseFree", False), ("2", None), ("2:x", None),
    ],
)  # fmt: skip
def test_spellings_of_events(text, event):
    assert event_of(text) is event


def test_blank_survival_times_are_told(store, tmp_path):
    rows = [
        {"slide_id": f"s{p}", "OS_MONTHS": "[Not Available]" if p == 3 else str(5 + p), "OS_STATUS": "1:DECEASED"}
        for p in range(PATIENTS)
    ]
    options = SurvivalOptions(event="OS_STATUS", time="OS_MONTHS", penalties=(1.0,))
    spec = TaskSpec(name="t", labels="labels.csv", folds=2, metrics=("survival",), survival=options)
    _, notes = joined(store, tmp_path, rows, spec)
    assert notes[-1] == (
        "task t: 40 of 320 patches, with 1 patients, have no OS_MONTHS or no OS_STATUS and were left out of survival"
    )
    outcome = evaluate_task([store], spec, BenchSpec(encoders=("teacher",), draws=100), tmp_path)
    assert not outcome.failures
    assert outcome.results[0].n == 7


def test_what_stage_one_noted_about_slides_is_in_the_report(tmp_path):
    store = make_store(tmp_path / "s.zarr", {"teacher": (1, 0)})
    for slide_id in ("s0", "s1"):
        change_facts(store.slide(slide_id), notes=("its glass is colored",))
    _, notes = joined(store, tmp_path, WHOLE)
    assert "task t: its glass is colored: 2 slides (s0, s1)" in notes

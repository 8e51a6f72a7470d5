"""Inputs: folders, manifests under several tools' column names, ids that collide, label tables, held-out groups."""

import re
from math import ceil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from g2l_core.errors import ManifestError, UsageError
from g2l_core.slides.manifest import (
    COLUMN_ALIASES,
    fits,
    held_out_groups,
    open_table,
    parse_condition,
    read_sources,
    read_table,
    refuse_colliding_ids,
)


def touch(root: Path, *names: str) -> Path:
    """Empty files under root: finding sources opens none of them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def ids(*inputs: Path) -> list[str]:
    return [source.slide_id for source in read_sources(inputs)]


# ---- slides and folders -------------------------------------------------------------------------------------


def test_equal_stems_in_subfolders_stay_apart(tmp_path):
    touch(tmp_path, "b/x.svs", "a/x.svs", "a/deep/x.NDPI", "top.tiff", ".hidden.svs", "notes.txt")
    sources = read_sources([tmp_path])
    assert [s.slide_id for s in sources] == ["a/deep/x", "a/x", "b/x", "top"]
    assert [s.path for s in sources] == [tmp_path / n for n in ("a/deep/x.NDPI", "a/x.svs", "b/x.svs", "top.tiff")]
    assert all(not s.patch_ids and s.mpp is None and not s.labels for s in sources)


def test_single_slides_are_named_by_their_stem(tmp_path):
    touch(tmp_path, "b/y.svs", "a/x.svs", "z.png")
    assert ids(tmp_path / "b/y.svs", tmp_path / "a/x.svs", tmp_path / "z.png") == ["x", "y", "z"]
    assert read_sources([tmp_path / "z.png"])[0].patch_ids == ()


def test_dots_in_names_belong_to_the_id(tmp_path):
    touch(tmp_path, "TCGA-01.A1B2.svs", "TCGA-01.C3D4.svs")
    assert ids(tmp_path) == ["TCGA-01.A1B2", "TCGA-01.C3D4"]


def test_order_does_not_depend_on_the_arguments(tmp_path):
    touch(tmp_path, "one/a.svs", "two/b.svs")
    assert read_sources([tmp_path / "two", tmp_path / "one"]) == read_sources([tmp_path / "one", tmp_path / "two"])


@pytest.mark.parametrize(
    ("names", "inputs", "message"),
    [
        (["a/x.svs", "b/x.svs"], ["a", "b"], r"2 inputs share the slide id 'x'.*common parent folder"),
        (["a/x.svs", "b/x.svs"], ["a/x.svs", "b/x.svs"], "2 inputs share the slide id 'x'"),
        (["a/x.svs", "a/x.tiff"], ["a"], "2 inputs share the slide id 'x'"),
        (["x.svs", "x/y.svs"], ["."], "slide id 'x' is also the folder of 'x/y': rename"),
        (["x.svs", "x/y/z/w.svs"], ["."], "slide id 'x' is also the folder of 'x/y/z/w'"),
    ],
)
def test_ids_that_collide_are_refused(tmp_path, names, inputs, message):
    touch(tmp_path, *names)
    with pytest.raises(ManifestError, match=message):
        read_sources([tmp_path / name for name in inputs])


@pytest.mark.parametrize("slide_id", ["", "a//b", "/a", "a/", "..", "a/../b", "./a"])
def test_ids_that_are_no_relative_path_are_refused(slide_id):
    with pytest.raises(ManifestError, match="not a plain relative path"):
        refuse_colliding_ids([slide_id])


@given(st.lists(st.text("ab/", min_size=1, max_size=5), max_size=6))
def test_ids_that_pass_can_all_be_folders_without_nesting(slide_ids):
    try:
        refuse_colliding_ids(slide_ids)
    except ManifestError:
        return
    assert len(set(slide_ids)) == len(slide_ids)
    assert all("//" not in s and s.strip("/") == s for s in slide_ids)
    assert not any(b.startswith(f"{a}/") for a in slide_ids for b in slide_ids)


def test_absent_and_empty_inputs(tmp_path):
    with pytest.raises(UsageError, match="no such file or folder: .*absent"):
        read_sources([tmp_path / "absent"])
    touch(tmp_path, "readme.txt")
    with pytest.raises(ManifestError, match=r"holds no slide \(.*\.svs.*\) and no patch image \(.*\.png.*\)"):
        read_sources([tmp_path])


# ---- patch images -------------------------------------------------------------------------------------------


def test_a_folder_of_patch_images_is_one_source_per_subfolder(tmp_path):
    touch(tmp_path, "train/Normal/b.png", "train/Normal/a.JPG", "train/OSCC/a.jpeg", "test/Normal/a.bmp", "read.me")
    sources = read_sources([tmp_path])
    assert [s.slide_id for s in sources] == ["test/Normal", "train/Normal", "train/OSCC"]
    assert sources[1].patch_ids == ("a.JPG", "b.png")
    assert sources[1].path == tmp_path / "train/Normal"


def test_images_right_in_the_folder_take_its_name(tmp_path):
    touch(tmp_path, "tiles/a.png", "tiles/b.png")
    (source,) = read_sources([tmp_path / "tiles"])
    assert (source.slide_id, source.patch_ids) == ("tiles", ("a.png", "b.png"))


def test_images_beside_slides_are_not_patches(tmp_path):
    touch(tmp_path, "a.svs", "a.jpg", "maps/a.png")
    assert ids(tmp_path) == ["a"]


def test_images_in_a_folder_and_in_its_subfolder_collide(tmp_path):
    touch(tmp_path, "a/x.png", "a/b/x.png")
    with pytest.raises(ManifestError, match="'a' is also the folder of 'a/b'"):
        read_sources([tmp_path])


def test_real_patch_folder(oscc_patches):
    sources = read_sources([oscc_patches])
    assert [s.slide_id for s in sources] == ["test/Normal", "test/OSCC", "train/Normal", "train/OSCC"]
    assert sum(len(s.patch_ids) for s in sources) == 1224


# ---- manifests ----------------------------------------------------------------------------------------------


def test_manifest_with_g2ls_own_columns(tmp_path):
    manifest = write(
        tmp_path / "m.csv",
        "slide_id,path,mpp,patient_id,medical_center,her2\n"
        "cohort/two,sub/b.svs,0.25,P2,south,\n"
        "one, a.svs ,,P1,north,positive\n",
    )
    one, two = sorted(read_sources([manifest]), key=lambda s: s.slide_id, reverse=True)
    assert (one.slide_id, one.path, one.mpp) == ("one", tmp_path / "a.svs", None)
    assert one.labels == {"patient_id": "P1", "medical_center": "north", "her2": "positive"}
    assert (two.slide_id, two.path, two.mpp) == ("cohort/two", tmp_path / "sub/b.svs", 0.25)
    assert two.labels == {"patient_id": "P2", "medical_center": "south"}


@pytest.mark.parametrize(
    ("header", "row", "expected"),
    [
        ("wsi,mpp", "s/a.svs,0.5", ("a", 0.5, {})),
        ("sample_id,image_path,spacing_at_level_0", "S1,s/a.svs,0.2528", ("S1", 0.2528, {})),
        ("case_id,slide_path", "TCGA-1,s/a.svs", ("a", None, {"patient_id": "TCGA-1"})),
        ("Slide_ID,Filename,Site,Grade", "S1,s/a.svs,A,3", ("S1", None, {"medical_center": "A", "Grade": "3"})),
        ("path", "s/a.svs", ("a", None, {})),
    ],
)  # fmt: skip
def test_manifests_of_other_tools(tmp_path, header, row, expected):
    (source,) = read_sources([write(tmp_path / "m.csv", f"{header}\n{row}\n")])
    assert (source.slide_id, source.mpp, source.labels) == expected
    assert source.path == tmp_path / "s/a.svs"


def test_a_folder_and_every_manifest_of_it_give_the_same_ids(tmp_path):
    slides, lists = tmp_path / "data/slides", tmp_path / "lists"
    for name in ("a/x.svs", "b/x.svs", "b/deep/y.svs"):
        touch(slides, name)
    lists.mkdir()
    expected = {"a/x": slides / "a/x.svs", "b/x": slides / "b/x.svs", "b/deep/y": slides / "b/deep/y.svs"}
    for folder, prefix in ((lists, "../data/slides/"), (tmp_path, "data/slides/"), (slides, ""), (lists, f"{slides}/")):
        rows = "".join(f"{prefix}{path.relative_to(slides)},x\n" for path in expected.values())
        manifest = write(folder / "m.csv", f"path,label\n{rows}")
        by_id = {source.slide_id: source.path.resolve() for source in read_sources([manifest])}
        manifest.unlink()
        assert by_id == {source.slide_id: source.path for source in read_sources([slides])} == expected


def test_rows_on_several_disks_have_ids_from_the_root(tmp_path):
    manifest = write(tmp_path / "m.csv", "path\na.svs\n/mnt/slides/c.svs\n")
    here = tmp_path.relative_to("/").as_posix()
    by_id = {source.slide_id: source.path for source in read_sources([manifest])}
    assert by_id == {f"{here}/a": tmp_path / "a.svs", "mnt/slides/c": Path("/mnt/slides/c.svs")}


def test_equal_rows_count_once(tmp_path):
    (source,) = read_sources([write(tmp_path / "m.csv", "path,label\na.svs,x\na.svs,x\n")])
    assert (source.slide_id, source.labels) == ("a", {"label": "x"})
    (source,) = read_sources([write(tmp_path / "m.csv", "path,slide_id\na.png,S\na.png,S\n")])
    assert source.patch_ids == ("a.png",)


def test_a_value_in_patch_id_makes_tiff_files_patch_images(tmp_path):
    text = "slide_id,path,patch_id,kind\nA,a/1.tif,a/1.tif,x\nA,a/2.tif,a/2.tif,x\nB,b/1.tif,b/1.tif,y\nC,c.tif,,z\n"
    (tmp_path / "m.csv").write_text(text)
    found = {source.slide_id: source for source in read_sources([tmp_path / "m.csv"])}
    assert {name: source.patch_ids for name, source in found.items()} == {
        "A": ("a/1.tif", "a/2.tif"),
        "B": ("b/1.tif",),
        "C": (),
    }
    assert found["A"].labels == {"kind": "x"}
    assert found["C"].path == tmp_path / "c.tif"


def test_patch_images_of_a_manifest_are_grouped_by_slide_or_folder(tmp_path):
    manifest = write(
        tmp_path / "m.csv",
        "path,slide_id,patient_id,class,mpp\n"
        "a/1.png,S1,P1,tumor,0.5\n"
        "b/1.png,S1,P1,stroma,0.5\n"
        "c/1.png,,P2,tumor,\n"
        "c/2.png,,P2,tumor,\n"
        "3.png,,P3,stroma,\n",
    )
    by_id = {source.slide_id: source for source in read_sources([manifest])}
    assert {k: v.patch_ids for k, v in by_id.items()} == {
        "S1": ("a/1.png", "b/1.png"),
        "c": ("c/1.png", "c/2.png"),
        "m": ("3.png",),
    }
    assert all(source.path == tmp_path for source in by_id.values())
    assert by_id["S1"].labels == {"patient_id": "P1"}  # the classes differ: they are patches', not the slide's
    assert by_id["c"].labels == {"patient_id": "P2", "class": "tumor"}
    assert (by_id["S1"].mpp, by_id["c"].mpp) == (0.5, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; expected a header line"),
        ("path\n", r"needs a header line with a column path \(or image_path, "),
        ("slide_id,mpp\na,0.5\n", r"needs a header line with a column path"),
        ("path,mpp\na.svs\n", "line 2: 1 fields where the header has 2"),
        ("path\na.svs\nb.svs,0.5\n", "line 3: 2 fields where the header has 1"),
        ("path,wsi\na.svs,b.svs\n", "two columns of one meaning: path, wsi"),
        ("path,Path\na.svs,b.svs\n", "two columns of one meaning"),
        ("path,mpp\na.svs,half\n", "mpp of 'a' is 'half', not a number"),
        ("path,mpp\na.svs,-0.5\n", "mpp of 'a' is '-0.5', not a number of um/px above 0"),
        ("path,mpp\na.svs,inf\n", "mpp of 'a' is 'inf'"),
        ("path,case_id\n,P1\n", "has a row without a path: P1"),
        ("path,slide_id\na.svs,S\nb.svs,S\n", "names slide_id 'S' more than once: .*a.svs, .*b.svs"),
        ("path,slide_id\na.svs,S\nb.png,S\n", "names slide_id 'S' more than once"),
        ("path,slide_id,class\na.png,S,x\na.png,S,y\n", "names a.png more than once"),
        ("path,slide_id\na.svs,S\nb/../a.svs,T\n", "names .*/a.svs under two slide_id, 'S' and 'T': keep one row"),
        ("path,slide_id,mpp\na.png,S,0.5\nb.png,S,0.25\n", "rows of 'S' give different mpp: 0.25, 0.5"),
        ("path,slide_id\na.svs,../S\n", "not a plain relative path"),
        ("path,slide_id\na.svs,S\nb.svs,S/T\n", "'S' is also the folder of 'S/T'"),
        ('path\n"' + "x" * 200_000 + '"\n', "no table of comma- or tab-separated values: field larger"),
    ],
)
def test_manifests_that_cannot_be_used(tmp_path, text, message):
    with pytest.raises(ManifestError, match=message):
        read_sources([write(tmp_path / "m.csv", text)])


def test_a_manifest_in_another_encoding_is_read_with_a_warning(tmp_path, caplog):
    (source,) = read_sources([write(tmp_path / "m.csv", "path,city\na.svs,Zürich\n", "cp1252")])
    assert source.labels == {"city": "Zürich"}
    assert re.search(r"m\.csv is no utf-8 text .* read as cp1252", caplog.text)


@pytest.mark.parametrize("content", ["path\na.svs\n".encode("utf-16"), b"PK\x03\x04\0\0"])
def test_a_manifest_that_is_no_text_is_refused(tmp_path, content):
    (tmp_path / "m.csv").write_bytes(content)
    with pytest.raises(ManifestError, match=r"cannot read the table .*m\.csv: it is no utf-8 text; save it as CSV"):
        read_sources([tmp_path / "m.csv"])


# ---- tables -------------------------------------------------------------------------------------------------


def test_table_with_byte_order_mark_windows_lines_blank_lines_and_quotes(tmp_path):
    text = '\ufeffSlide_ID,Note\r\n\r\n S1 ,"a, ""b""\nc"\r\n,\r\n  ,  \r\nS2,\u2028x\r\n'
    assert read_table(write(tmp_path / "t.csv", text)) == [
        {"slide_id": "S1", "Note": 'a, "b"\nc'},
        {"slide_id": "S2", "Note": "x"},
    ]


def test_a_table_that_is_read_in_many_parts_is_what_pandas_reads(tmp_path):
    """Blank lines, blanks and cells that recur in later parts; columns of few and of many values."""
    rng, n = np.random.default_rng(0), 1500
    frame = pd.DataFrame(
        {
            "slide_id": [f"s{i // 400}" for i in range(n)],
            "patch_id": [f"{i}.png" for i in range(n)],
            "kind": rng.choice(["a", " b", "NA", "na", ""], n),
            "note": ["n/a" if i == n - 1 else str(i) for i in range(n)],
        }
    )
    lines = frame.to_csv(index=False).splitlines()
    for at in (1200, 700, 300):
        lines[at:at] = ["", ",,, "]
    table = open_table(write(tmp_path / "t.csv", "\n".join(lines)))
    expected = frame.apply(lambda column: column.str.strip())
    expected["kind"] = expected["kind"].replace(["NA", "na"], "")
    expected.loc[n - 1, "note"] = ""
    pd.testing.assert_frame_equal(pd.DataFrame(dict(table.values)), expected)
    filled = [number for number, line in enumerate(lines, start=1) if line.strip(", ")]
    assert table.lines.tolist() == filled[1:]
    counts = frame["kind"].value_counts()
    assert f"'NA' in kind ({counts['NA']}), 'na' in kind ({counts['na']}), 'n/a' in note (1)." in table.notes[0]
    lines[1100] += ",x"
    with pytest.raises(ManifestError, match="line 1101: 5 fields where the header has 4"):
        open_table(write(tmp_path / "t.csv", "\n".join(lines)))


def test_tab_separated_table(tmp_path):
    text = "case_id\tslide\tremark\nP1\ta/x\tone, two\n"
    assert read_table(write(tmp_path / "t.tsv", text)) == [
        {"patient_id": "P1", "slide_id": "a/x", "remark": "one, two"}
    ]
    (source,) = read_sources([write(tmp_path / "m.TSV", "wsi\tmpp\na.svs\t0.5\n")])
    assert source.mpp == 0.5


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_the_header_tells_the_delimiter(tmp_path, delimiter, suffix):
    lines = (["slide", '"a,b"', "c"], ["S1", "na!", '"x;y,z\tw"'], ["S2", "", "007"])
    assert read_table(write(tmp_path / f"t{suffix}", "\n".join(delimiter.join(line) for line in lines))) == [
        {"slide_id": "S1", "a,b": "na!", "c": "x;y,z\tw"},
        {"slide_id": "S2", "a,b": "", "c": "007"},
    ]


def test_every_alias_means_one_column(tmp_path):
    seen = [alias for aliases in COLUMN_ALIASES.values() for alias in aliases]
    assert len(set(seen)) == len(seen)
    for canonical, aliases in COLUMN_ALIASES.items():
        for alias in aliases:
            (row,) = read_table(write(tmp_path / "t.csv", f" {alias.upper()} \nvalue\n"))
            assert row == {canonical: "value"}


# ---- conditions and held-out groups ---------------------------------------------------------------------------


def test_conditions():
    assert parse_condition("split=train") == ("split", "train")
    assert parse_condition("note=a=b") == ("note", "a=b")
    assert parse_condition("note=") == ("note", "")
    for text in ("train", "=train", ""):
        with pytest.raises(UsageError, match="expected COLUMN=PATTERN"):
            parse_condition(text)


def test_what_fits_a_condition():
    labels = {"medical_center": "north", "slide_id": "not this"}
    assert fits(("medical_center", "north"), "a/x", labels)
    assert fits(("medical_center", "n*"), "a/x", labels)
    assert not fits(("medical_center", "N*"), "a/x", labels)
    assert fits(("slide_id", "a/*"), "a/x", labels)
    assert not fits(("slide_id", "not this"), "a/x", labels)
    assert not fits(("absent", "north"), "a/x", labels)
    assert fits(("absent", ""), "a/x", labels)


@given(
    groups=st.lists(st.text("abcd", max_size=3), max_size=40),
    share=st.sampled_from([0.0, 0.05, 0.07, 0.1, 0.2, 0.25, 1 / 3, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 5),
)
def test_held_out_groups(groups, share, seed):
    held, distinct = held_out_groups(groups, share, seed), set(groups)
    assert held <= distinct
    assert held != distinct or not distinct
    exact = share * len(distinct)
    assert len(held) == max(0, min(ceil(exact - 1e-9), len(distinct) - 1))
    assert held == held_out_groups(sorted(groups, reverse=True) * 2, share, seed)


def test_a_whole_number_of_groups_is_not_rounded_up_by_floating_point():
    assert 0.07 * 100 > 7
    assert len(held_out_groups([f"p{i}" for i in range(100)], 0.07, 0)) == 7


def test_other_seeds_hold_out_others_and_each_as_often():
    groups = [f"p{i}" for i in range(10)]
    drawn = [held_out_groups(groups, 0.2, seed) for seed in range(1000)]
    often = [sum(group in held for held in drawn) for group in groups]
    assert len(set(drawn)) > 40
    assert min(often) > 140  # 200 expected, sigma 13
    assert max(often) < 260

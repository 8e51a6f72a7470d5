"""Which objects of a QuPath export count as tissue."""

import json

import numpy as np
import pytest
from PIL import Image

from g2l_core.errors import NoTissueError, ReadError, UsageError
from g2l_core.extraction.patching import patch_source
from g2l_core.patches.grid import GridSpec
from g2l_core.slides.manifest import Source
from g2l_core.slides.slide import Frame
from g2l_core.synthetic.cohort import write_pyramid
from g2l_core.tissue.annotations import read_annotation
from g2l_core.tissue.classes import ClassChoice
from g2l_core.tissue.geojson import mask_of, read_areas
from g2l_core.tissue.methods import resolve_tissue
from tests.inputs.drawn import picture

FRAME = Frame(size=(8, 4), downsample=10.0, mpp=5.0)
LEFT = [[0, 0], [40, 0], [40, 40], [0, 40], [0, 0]]
RIGHT = [[40, 0], [80, 0], [80, 40], [40, 40], [40, 0]]
CORNER = [[0, 0], [20, 0], [20, 40], [0, 40], [0, 0]]


def thing(ring, name=None, kind="annotation", **more):
    properties = {} if kind is None else {"objectType": kind}
    if name is not None:
        properties["classification"] = {"name": name}
    geometry = {"type": "Polygon", "coordinates": [ring]}
    return {"type": "Feature", "geometry": geometry, "properties": properties, **more}


def columns(features, choice=""):
    """For each quarter of the width whether it counts, as a text such as `##..`; and what was left out."""
    areas, left_out = read_areas(json.dumps(features), ClassChoice.parse(choice))
    mask = mask_of(areas, FRAME.downsample, FRAME.size[::-1])
    return "".join("#" if mask[:, i].all() else "." for i in range(0, 8, 2)), dict(left_out)


SUBTRACTED = [
    "Exclude", "exclude*", "Ignore*", "Ignore", "Fold", "Tissue fold", "Necrosis", "Necrosis: focal", "Necrotic",
    "Background", "Background*", "Artifact", "Pen",
]  # fmt: skip


@pytest.mark.parametrize("name", SUBTRACTED)
def test_classes_that_qupath_users_exclude_are_subtracted_and_told(name):
    assert columns([thing(LEFT, "Tissue"), thing(CORNER, name)]) == (".#..", {f"class {name} (subtracted)": 1})


@pytest.mark.parametrize("name", ["Region*", "Other*", "Stroma*"])
def test_other_ignored_classes_neither_count_nor_are_subtracted(name):
    assert columns([thing(LEFT, "Tumor"), thing(RIGHT, name)]) == ("##..", {f"class {name}": 1})
    assert columns([thing(LEFT, "Tumor"), thing(CORNER, name)]) == ("##..", {f"class {name}": 1})


@pytest.mark.parametrize("kind", ["cell", "detection", "tile", "tma_core", "root"])
def test_only_annotations_count(kind):
    assert columns([thing(LEFT), thing(RIGHT, "Tumor", kind=kind)]) == ("##..", {kind: 1})
    old = thing(RIGHT, kind=None) | {"properties": {"object_type": kind}}
    assert columns([thing(LEFT), old]) == ("##..", {kind: 1})


@pytest.mark.parametrize(("identity", "kind"), [("PathCellObject", "cell"), ("PathDetectionObject", "detection")])
def test_the_types_of_an_older_qupath(identity, kind):
    features = [thing(LEFT, kind=None, id="PathAnnotationObject"), thing(RIGHT, kind=None, id=identity)]
    assert columns(features) == ("##..", {kind: 1})


CHOICES = {
    "Tumor": ("##..", {"class Stroma": 1, "class none": 1}),
    "tumor,STROMA": ("####", {"class none": 1}),
    "T*": ("##..", {"class Stroma": 1, "class none": 1}),
    "!Stroma": ("##..", {"class Stroma (subtracted)": 1}),
    "Tumor,!Stroma": ("##..", {"class Stroma (subtracted)": 1, "class none": 1}),
    "!Tumor, !Stroma": ("....", {"class Tumor: Positive (subtracted)": 1, "class Stroma (subtracted)": 1}),
    "Mucin": ("....", {"class Stroma": 1, "class none": 1, "class Tumor: Positive": 1}),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_classes_that_are_chosen(choice):
    features = [thing(LEFT, "Tumor: Positive"), thing(RIGHT, "Stroma"), thing(CORNER)]
    assert columns(features, choice) == CHOICES[choice]


def test_an_excluded_class_that_is_asked_for_counts():
    assert columns([thing(LEFT, "Necrosis"), thing(RIGHT, "Region*")], "Necrosis,Region*") == ("####", {})


@pytest.mark.parametrize("choice", ["Tumor,,Stroma", "!", "Tumor,!Tumor", ","])
def test_choices_that_cannot_be_meant(tmp_path, choice):
    with pytest.raises(UsageError, match="expected classes by comma, such as Tumor,Stroma"):
        resolve_tissue(f"{tmp_path}:{choice}")


POINT, LINE = {"type": "Point", "coordinates": [1, 1]}, {"type": "LineString", "coordinates": [[1, 1], [9, 9]]}
AREA = {"type": "Polygon", "coordinates": [RIGHT]}
GEOMETRIES = {
    "point": (POINT, "##..", {"Point": 1}),
    "points": ({"type": "MultiPoint", "coordinates": [[1, 1]]}, "##..", {"MultiPoint": 1}),
    "line": (LINE, "##..", {"LineString": 1}),
    "lines": ({"type": "MultiLineString", "coordinates": [[[1, 1], [2, 2]]]}, "##..", {"MultiLineString": 1}),
    "null": (None, "##..", {"object without geometry": 1}),
    "collection": (
        {"type": "GeometryCollection", "geometries": [POINT, AREA, LINE, LINE]},
        "####",
        {"Point": 1, "LineString": 2},
    ),
    "nested": (
        {"type": "GeometryCollection", "geometries": [{"type": "GeometryCollection", "geometries": [AREA]}]},
        "####",
        {},
    ),
    "empty": ({"type": "GeometryCollection", "geometries": []}, "##..", {}),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries_that_enclose_nothing_are_counted(name):
    geometry, expected, left_out = GEOMETRIES[name]
    assert columns([thing(LEFT), thing(LEFT) | {"geometry": geometry}]) == (expected, left_out)


def test_a_mask_image_has_no_classes(tmp_path):
    Image.fromarray(np.ones((4, 8), np.uint8)).save(tmp_path / "x.png")
    with pytest.raises(ReadError, match=r"a mask image has no classes: give the folder without :Tumor"):
        read_annotation(tmp_path, "x", (80, 40), FRAME, ClassChoice.parse("Tumor"))


def test_a_slide_says_what_does_not_count_and_the_store_keeps_the_choice(tmp_path):
    image = picture(4, 4)
    write_pyramid(tmp_path / "x.tiff", image, mpp=1.0, downsamples=(1,))
    half = [[0, 0], [512, 0], [512, 1024], [0, 1024], [0, 0]]
    features = [thing(half, "Tumor"), thing(half, "Tumor", kind="cell"), thing([[x + 512, y] for x, y in half], "Fat")]
    (tmp_path / "outlines").mkdir()
    (tmp_path / "outlines" / "x.geojson").write_text(json.dumps(features))
    source = Source(slide_id="x", path=tmp_path / "x.tiff")
    found = {}
    for choice in ("", ":Tumor", ":!Fat", ":Mucin"):
        method = resolve_tissue(f"{tmp_path}/outlines{choice}")
        assert method.identity == f"annotations{choice}"
        grid = GridSpec(mpp=1.0, patch_px=256, tissue=method.identity)
        if choice == ":Mucin":
            with pytest.raises(NoTissueError, match=r"do not count as tissue \(1 cell, 1 class Fat, 1 class Tumor\)"):
                patch_source(source, grid, None, method)
            continue
        patched = patch_source(source, grid, None, method)
        found[choice] = len(patched.coords), [note.detail for note in patched.notes]
    assert found == {
        "": (16, ["1 cell"]),
        ":Tumor": (8, ["1 cell, 1 class Fat"]),
        ":!Fat": (8, ["1 cell, 1 class Fat (subtracted)"]),
    }
    with pytest.raises(UsageError, match="give its folder, with :Tumor behind it"):
        resolve_tissue("annotations:Tumor")

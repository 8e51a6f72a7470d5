"""Areas as GeoJSON and as mask images: exact round trips, QuPath's forms, what is refused, and slides laid by them."""

import json

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from g2l_core.errors import NoTissueError, ReadError, StoreMismatchError
from g2l_core.extraction.patching import patch_source, patch_sources, refresh_stored, store_patched
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.views import ViewSpec
from g2l_core.slides.manifest import Source, read_sources
from g2l_core.slides.slide import Frame, open_slide
from g2l_core.store.features import FeatureStore
from g2l_core.synthetic.cohort import CohortSpec, draw_slide, write_pyramid
from g2l_core.tissue.annotations import annotation_path, read_annotation
from g2l_core.tissue.geojson import areas_of, mask_of, read_areas
from g2l_core.tissue.methods import resolve_tissue
from g2l_core.tissue.thresholds import THUMBNAIL_MPP

SQUARE = [[0, 0], [40, 0], [40, 40], [0, 40], [0, 0]]
HOLE = [[10, 10], [10, 30], [30, 30], [30, 10], [10, 10]]


def mask_from(drawing: str) -> np.ndarray:
    return np.array([[mark == "#" for mark in line.strip()] for line in drawing.strip().splitlines()])


def feature(rings, *, name=None, kind="Polygon"):
    properties = {"objectType": "annotation"}
    if name is not None:
        properties["classification"] = {"name": name, "color": [200, 0, 0]}
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": rings}, "properties": properties}


def filled(document, *, downsample=10.0, shape=(6, 6)) -> np.ndarray:
    return mask_of(read_areas(json.dumps(document))[0], downsample, shape)


# ---- mask -> GeoJSON -> mask --------------------------------------------------------------------------------

noise = st.builds(
    lambda shape, seed, share: np.random.default_rng(seed).random(shape) < share,
    st.tuples(st.integers(1, 24), st.integers(1, 24)),
    st.integers(0, 10_000),
    st.floats(0, 1),
)
blobs = st.builds(
    lambda seed, level: cv2.GaussianBlur(np.random.default_rng(seed).normal(size=(60, 80)), (0, 0), 4) > level,
    st.integers(0, 10_000),
    st.floats(-0.1, 0.1),
)
downsamples = st.sampled_from([1.0, 1.5, 16, 32, 4.000281]) | st.floats(1, 200)


@given(mask=noise | blobs, downsample=downsamples)
def test_a_mask_comes_back_as_it_was(mask, downsample):
    document = areas_of(mask, downsample)
    assert np.array_equal(filled(document, downsample=downsample, shape=mask.shape), mask)


@given(mask=noise | blobs)
def test_polygons_are_simple_and_as_large_as_the_mask(mask):
    """One feature a part (connected by edges, as OpenCV counts them), and the signed areas sum up to the mask.

    No ring meets itself; the outline stands first, then the holes, which turn the other way.
    """
    features = areas_of(mask, 1.0)["features"]
    parts, _ = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    assert len(features) == parts - 1
    total = 0.0
    for found in features:
        rings = [np.array(ring) for ring in found["geometry"]["coordinates"]]
        areas = [cv2.contourArea(ring.astype(np.float32), oriented=True) for ring in rings]
        assert areas[0] > 0
        assert all(area < 0 for area in areas[1:])
        total += sum(areas)
        for ring in rings:
            assert np.array_equal(ring[0], ring[-1])
            assert len({tuple(corner) for corner in ring[:-1].tolist()}) == len(ring) - 1
            steps = np.diff(ring, axis=0)
            assert ((steps == 0).sum(axis=1) == 1).all()  # along the pixel edges, and no corner twice
    assert total == mask.sum()


def test_holes_and_corners_by_hand():
    mask = mask_from("""
        ###.
        #.#.
        ###.
        ...#
    """)
    features = areas_of(mask, 16)["features"]
    assert [[len(ring) - 1 for ring in f["geometry"]["coordinates"]] for f in features] == [[4, 4], [4]]
    outline, hole = features[0]["geometry"]["coordinates"]
    assert {tuple(corner) for corner in outline} == {(0, 0), (48, 0), (48, 48), (0, 48)}
    assert {tuple(corner) for corner in hole} == {(16, 16), (32, 16), (32, 32), (16, 32)}


def test_an_empty_mask_has_no_feature():
    assert areas_of(np.zeros((3, 3), bool), 16) == {"type": "FeatureCollection", "features": []}


# ---- reading what QuPath writes -----------------------------------------------------------------------------

RING_MASK = mask_from("""
    ####..
    #..#..
    #..#..
    ####..
    ......
    ......
""")
FORMS = {
    "collection": {"type": "FeatureCollection", "features": [feature([SQUARE, HOLE])]},
    "list": [feature([SQUARE, HOLE], name="Tissue")],
    "feature": feature([SQUARE, HOLE], name="Tumor"),
    "geometry": {"type": "Polygon", "coordinates": [SQUARE, HOLE]},
    "multi": [feature([[SQUARE, HOLE]], kind="MultiPolygon")],
    "no classification": [feature([SQUARE, HOLE]) | {"properties": None}],
    "third coordinate": [feature([[[x, y, 0] for x, y in ring] for ring in (SQUARE, HOLE)])],
    "the other way round": [feature([SQUARE[::-1], HOLE[::-1]])],
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_one_area(form):
    assert np.array_equal(filled(FORMS[form]), RING_MASK)


@pytest.mark.parametrize("name", ["Ignore*", "Artefact", "artifact", "Pen", "Pen blue", "Background", "Artifact: fold"])
def test_excluded_classes_are_taken_away_wherever_they_stand(name):
    hole = feature([HOLE[::-1]], name=name)
    for features in ([feature([SQUARE]), hole], [hole, feature([SQUARE])]):
        assert np.array_equal(filled(features), RING_MASK)


@pytest.mark.parametrize("name", ["Penumbra", "Tumor", "Stroma"])
def test_other_classes_count(name):
    assert filled([feature([SQUARE], name=name)])[:4, :4].all()


def test_classes_in_older_and_derived_forms():
    pen = feature([HOLE]) | {"properties": {"classification": "Pen"}}
    derived = feature([HOLE]) | {"properties": {"classification": {"names": ["Artefact", "fold"]}}}
    for excluded in (pen, derived):
        assert np.array_equal(filled([feature([SQUARE]), excluded]), RING_MASK)


def test_overlaps_unite_and_what_lies_outside_is_cut():
    wide = [[-100, 20], [500, 20], [500, 900], [-100, 900], [-100, 20]]
    found = filled([feature([SQUARE]), feature([wide])])
    assert found[2:].all()
    assert np.array_equal(found[:2], mask_from("####..\n####.."))
    away = [[900, 900], [990, 900], [990, 990], [900, 900]]
    assert not filled([feature([away])]).any()


@given(
    center=st.tuples(st.floats(5, 25), st.floats(5, 25)),
    corners=st.integers(3, 12),
    radius=st.floats(2, 20),
    turn=st.floats(0, 6),
)
def test_a_pixel_belongs_where_its_center_does(center, corners, radius, turn):
    """Against OpenCV's point-in-polygon test, but for centers on the outline itself."""
    angles = turn + np.arange(corners) * 2 * np.pi / corners
    ring = np.array(center) + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    found = mask_of([([ring], True)], 1.0, (30, 30))
    for y, x in np.ndindex(30, 30):
        distance = cv2.pointPolygonTest(ring.astype(np.float32), (x + 0.5, y + 0.5), True)
        if abs(distance) > 1e-3:
            assert found[y, x] == (distance > 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("3", "no GeoJSON: expected a FeatureCollection"),
        ("[3]", "feature 0 is no GeoJSON object but int"),
        (json.dumps([feature([SQUARE]), feature([0, 0], kind="Circle")]), "feature 1 is a Circle: expected Polygon"),
        (json.dumps([{"type": "Feature", "geometry": 3}]), "feature 0 is a thing without geometry"),
        (json.dumps([feature([[["a", "b"]]])]), "feature 0: the coordinates of its Polygon"),
        (json.dumps([feature([[0, 1]])]), "feature 0: the coordinates of its Polygon"),
        ('[{"type": "Polygon", "coordinates": [[[0, 0], [NaN, 1], [1, 1]]]}]', "not finite"),
        ('{"type": "Polygon"}', "coordinates of its Polygon"),
    ],
)
def test_what_is_no_area_is_refused(text, message):
    with pytest.raises(ReadError, match=message):
        read_areas(text)


# ---- files --------------------------------------------------------------------------------------------------

FRAME = Frame(size=(6, 4), downsample=10.0, mpp=5.0)


def annotation_of(folder, *, level0_size=(60, 40)) -> np.ndarray:
    return read_annotation(folder, "x", level0_size, FRAME).mask


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "P", "RGB", "RGBA", "LA"])
@pytest.mark.parametrize("scale", [1, 2, 7])
def test_mask_images_of_any_kind_and_scale(tmp_path, mode, scale):
    """In the palette's picture tissue is drawn black: the index counts, not the color. Opaque glass stays glass."""
    truth = mask_from("##....\n##..#.\n......\n.....#")
    large = np.kron(truth, np.ones((scale, scale), bool))
    if mode == "P":
        image = Image.fromarray(large.astype(np.uint8)).convert("P")
        image.putpalette([255, 255, 255, 0, 0, 0])
    elif mode == "I;16":
        image = Image.fromarray(large.astype(np.uint16) * 256)
    else:
        image = Image.fromarray(large.astype(np.uint8) * 255).convert(mode)
    image.save(tmp_path / "x.png")
    assert np.array_equal(annotation_of(tmp_path), truth)


def test_a_coarser_mask_image_is_read_at_pixel_centers(tmp_path):
    Image.fromarray(np.array([[255, 0, 0], [0, 255, 0]], np.uint8)).save(tmp_path / "x.png")
    assert np.array_equal(annotation_of(tmp_path), mask_from("##....\n##....\n..##..\n..##.."))


def test_files_that_cannot_be_used_name_themselves(tmp_path):
    with pytest.raises(ReadError, match=r"has no annotation of it: expected x.geojson .* or x.png"):
        annotation_of(tmp_path)
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(ReadError, match=r"annotation .*x.png: Pillow cannot read it"):
        annotation_of(tmp_path)
    Image.new("L", (40, 60)).save(tmp_path / "x.png")
    with pytest.raises(ReadError, match=r"has 40 x 60 px and cannot cover 60 x 40 level-0 px"):
        annotation_of(tmp_path)
    (tmp_path / "x.geojson").write_text("{}")
    with pytest.raises(ReadError, match=r"two annotations of it, x.geojson and x.png"):
        annotation_of(tmp_path)
    (tmp_path / "x.png").unlink()
    with pytest.raises(ReadError, match=r"annotation .*x.geojson: it is no GeoJSON"):
        annotation_of(tmp_path)
    (tmp_path / "x.geojson").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ReadError, match=r"annotation .*x.geojson: 'utf-8' codec"):
        annotation_of(tmp_path)


def test_ids_keep_their_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.1.geojson").write_text("[]")
    assert annotation_path(tmp_path, "a/x.1") == tmp_path / "a/x.1.geojson"
    assert annotation_path(tmp_path, "x.1") is None


# ---- slides -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn_slides(tmp_path_factory):
    """Two drawn slides of unlike scale, and where their pictures and outlines may go."""
    folder = tmp_path_factory.mktemp("slides")
    for index, name in enumerate(("a", "b")):
        spec = CohortSpec(size_um=(1024.0, 768.0), mpp=(1.0, 0.5), seed=5)
        write_pyramid(folder / f"{name}.tiff", draw_slide(spec, index)[0], mpp=spec.mpp[spec.center(index)])
    return folder


@pytest.mark.parametrize("method", ["otsu", "color"])
@pytest.mark.parametrize("least", [0.0, 0.25, 1.0])
def test_round_trip_through_the_written_outlines_keeps_the_patches(drawn_slides, tmp_path, method, least):
    first, again = (GridSpec(mpp=1.0, patch_px=64, tissue=name, min_tissue=least) for name in (method, "annotations"))
    sources = read_sources([drawn_slides])
    laid = list(patch_sources(sources, first, mpp_override=None, workers=2, qc=tmp_path))
    read = resolve_tissue(str(tmp_path))
    relaid = list(patch_sources(sources, again, mpp_override=None, workers=2, tissue=read))
    for one, other in zip(laid, relaid, strict=True):
        assert len(one.patched.coords) > 20
        assert np.array_equal(one.patched.coords, other.patched.coords)
        assert other.patched.facts.tissue_file == f"{one.source.slide_id}.geojson"


def test_round_trip_on_a_real_slide(real_slide, tmp_path):
    source = read_sources([real_slide])[0]
    for name in ("otsu", "color"):
        laid = patch_source(source, GridSpec(tissue=name), None, qc=tmp_path / name)
        read = resolve_tissue(str(tmp_path / name))
        relaid = patch_source(source, GridSpec(tissue="annotations"), None, read)
        assert np.array_equal(laid.coords, relaid.coords)
        with open_slide(real_slide) as slide:
            frame = slide.thumbnail_frame(THUMBNAIL_MPP)
            mask = resolve_tissue(name).find(slide, "x").mask
            found = read_annotation(tmp_path / name, source.slide_id, slide.level0_size, frame)
        assert np.array_equal(found.mask, mask)


def test_a_hole_drawn_in_qupath_drops_its_patches(drawn_slides, tmp_path):
    """The slide's own outline with an area of class Ignore* over its left half."""
    source = Source(slide_id="a", path=drawn_slides / "a.tiff")
    before = patch_source(source, GridSpec(mpp=1.0, patch_px=64), None, qc=tmp_path)
    path = tmp_path / "a.geojson"
    document = json.loads(path.read_text())
    left = [[0, 0], [512, 0], [512, 768], [0, 768], [0, 0]]
    path.write_text(json.dumps([*document["features"], feature([left], name="Ignore*")]))
    grid = GridSpec(mpp=1.0, patch_px=64, tissue="annotations")
    after = patch_source(source, grid, None, resolve_tissue(str(tmp_path)))
    wanted = {tuple(corner) for corner in before.coords.tolist() if corner[0] >= 512}
    assert {tuple(corner) for corner in after.coords.tolist()} == wanted
    assert 0 < len(wanted) < len(before.coords)


def test_a_missing_or_empty_annotation_costs_that_slide_alone(drawn_slides, tmp_path):
    (tmp_path / "b.geojson").write_text(json.dumps([feature([[[0, 0], [900, 0], [900, 900], [0, 900], [0, 0]]])]))
    read, grid = resolve_tissue(str(tmp_path)), GridSpec(mpp=1.0, patch_px=64, tissue="annotations")
    a, b = patch_sources(read_sources([drawn_slides]), grid, mpp_override=None, workers=2, tissue=read)
    assert isinstance(a.error, ReadError)
    assert "has no annotation of it: expected a.geojson" in str(a.error)
    assert len(b.patched.coords) > 0
    (tmp_path / "a.geojson").write_text("[]")
    a, _ = patch_sources(read_sources([drawn_slides]), grid, mpp_override=None, workers=2, tissue=read)
    assert isinstance(a.error, NoTissueError)


def test_a_changed_annotation_of_a_laid_slide_is_refused(drawn_slides, tmp_path):
    """The same file and one that has gone are fine: what is laid is laid."""
    folder, views = tmp_path / "drawn", ViewSpec()
    folder.mkdir()
    (folder / "a.geojson").write_text(json.dumps([feature([[[0, 0], [900, 0], [900, 900], [0, 900], [0, 0]]])]))
    read, grid = resolve_tissue(str(folder)), GridSpec(mpp=1.0, tissue="annotations")
    source = Source(slide_id="a", path=drawn_slides / "a.tiff")
    store = FeatureStore.create(tmp_path / "s.zarr", grid={"tissue": "annotations"}, views={})
    stored = store_patched(store, source, patch_source(source, grid, None, read), views, 1)
    assert refresh_stored(stored, source, views, 1, read).facts.tissue_file == "a.geojson"
    with (folder / "a.geojson").open("a") as file:
        file.write("\n")
    with pytest.raises(StoreMismatchError, match=r"slide a: its annotation has changed .* of a.geojson"):
        refresh_stored(stored, source, views, 1, read)
    (folder / "a.geojson").unlink()
    refresh_stored(stored, source, views, 1, read)

"""Patches that other tools have chosen: their files, the laws of their corners, and runs with them."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from g2l_core.errors import ManifestError, MppError, NoTissueError, ReadError, StoreMismatchError, UsageError
from g2l_core.extraction.patching import patch_source, patch_sources, refresh_stored, store_patched
from g2l_core.patches.grid import GridSpec, blocks, coords_in_boxes
from g2l_core.patches.render import open_patches
from g2l_core.patches.views import ViewSpec
from g2l_core.slides.limits import JSON_BYTES
from g2l_core.slides.manifest import Source
from g2l_core.store.features import FeatureStore
from g2l_core.synthetic.cohort import write_pyramid
from g2l_core.tissue.coord_files import patches_of
from g2l_core.tissue.coordinates import Coordinates
from g2l_core.tissue.methods import COORDINATES, resolve_coords, resolve_tissue
from tests.slides.test_tiff_tiles import picture

WIDTH, HEIGHT, MPP = 600, 500, 0.5
GRID = GridSpec(mpp=1.0, patch_px=32, tissue=COORDINATES, artifacts=())
SIDE = 64
CORNERS = np.array([[10, 20], [333, 77], [74, 20], [500, 400]])


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("slides") / "a.tif"
    write_pyramid(path, picture(WIDTH, HEIGHT), mpp=MPP, quality=None)
    return path


@pytest.fixture
def source(slide_path):
    return Source(slide_id="a", path=slide_path)


def trident(path, corners=CORNERS, **attributes):
    """As `WSIPatcher.save_as_h5` writes them."""
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("coords", data=np.asarray(corners))
        own = {"patch_size": 32, "patch_size_level0": SIDE, "level0_magnification": 20, "target_magnification": 10,
               "overlap": 0, "name": "a", "savetodir": ".", "level0_width": WIDTH, "level0_height": HEIGHT}  # fmt: skip
        dataset.attrs.update({name: value for name, value in (own | attributes).items() if value is not None})


def clam(path, corners=CORNERS, **attributes):
    """As `process_contour` writes them."""
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("coords", data=np.asarray(corners, np.int32), chunks=(1, 2), maxshape=(None, 2))
        own = {"patch_size": 32, "patch_level": 1, "downsample": (2.0, 2.0), "level_dim": (300, 250), "name": "a"}
        dataset.attrs.update(own | attributes)


def table(path, corners=CORNERS, header="x,y", more=""):
    path.write_text("\n".join([header, *(f"{x},{y}{more}" for x, y in np.asarray(corners).tolist())]) + "\n")


def parquet(path, corners=CORNERS, **columns):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet as pq

    corners = np.asarray(corners)
    pq.write_table(pa.table({"x": corners[:, 0], "y": corners[:, 1], **columns}), path)


WRITERS = {
    "TRIDENT": ("a_patches.h5", trident),
    "TRIDENT without the level-0 size": ("a.h5", lambda path: trident(path, patch_size_level0=None)),
    "CLAM": ("a.h5", clam),
    "CSV": ("a.csv", table),
    "CSV with sizes": ("a.csv", lambda path: table(path, header="X,Y,size", more=f",{SIDE}")),
    "TSV": ("a.tsv", lambda path: path.write_text("x\ty\n" + "".join(f"{x}\t{y}\n" for x, y in CORNERS.tolist()))),
    "numbers as they are written": ("a.csv", lambda p: p.write_text("x,y\n10,20\n333.0,77\n7.4e1,20\n5e2,400\n")),
    "Parquet": ("a.parquet", parquet),
}


def rows(coords):
    return sorted(map(tuple, coords.tolist()))


@pytest.mark.parametrize("kind", WRITERS)
def test_the_patches_are_at_the_corners_of_the_file(tmp_path, source, kind):
    name, write = WRITERS[kind]
    write(tmp_path / name)
    patched = patch_source(source, GRID, None, resolve_coords(tmp_path))
    assert rows(patched.coords) == rows(CORNERS)
    assert patched.facts.patch_px_level0 == SIDE
    assert patched.facts.tissue_file == name
    assert patched.facts.tissue_sha256 == patches_of(CORNERS).sha256
    assert patched.notes == ()


def test_the_pixels_are_those_of_the_slide_at_the_corners(tmp_path, source):
    table(tmp_path / "a.csv")
    store = stored(tmp_path / "s.zarr", source, resolve_coords(tmp_path))
    slide = store.slide("a")
    reader, image = open_patches(slide, GRID), picture(WIDTH, HEIGHT).astype(np.float64)
    for row, (x, y) in enumerate(slide.coords.tolist()):
        averaged = image[y : y + SIDE, x : x + SIDE].reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
        assert np.abs(reader.read(row) - averaged).max() <= 0.5


def stored(path, source, method, grid=GRID):
    store = FeatureStore.create(path, grid=grid.to_json(), views=ViewSpec(patch_px=32, crop_px=28).to_json())
    store_patched(store, source, patch_source(source, grid, None, method), ViewSpec(patch_px=32, crop_px=28), 1)
    return store


@pytest.mark.parametrize("folder", ["patches", "."])
def test_folders_of_results_and_slides_in_folders(tmp_path, slide_path, folder):
    """TRIDENT and CLAM have a folder `patches`; the id may have folders, or differ from the file's name."""
    (tmp_path / folder).mkdir(exist_ok=True)
    trident(tmp_path / folder / "a_patches.h5")
    for slide_id in ("a", "cohort/a", "another id"):
        patched = patch_source(Source(slide_id=slide_id, path=slide_path), GRID, None, resolve_coords(tmp_path))
        assert rows(patched.coords) == rows(CORNERS)


@pytest.mark.parametrize("name", ["all.csv", "all.parquet"])
@pytest.mark.parametrize("spelled", ["a", "a.tif"])
def test_one_table_of_all_slides(tmp_path, source, slide_path, name, spelled):
    path = tmp_path / name
    if path.suffix == ".csv":
        lines = [f"{spelled},{x},{y}" for x, y in CORNERS.tolist()]
        path.write_text("\n".join(["Slide ID,x,y", "b,0,0", *lines, "b,64,x"]) + "\n")
    else:
        both = np.concatenate([[[0, 0]], CORNERS])
        parquet(path, both, slide=["b", *[spelled] * len(CORNERS)])
    method = resolve_coords(path)
    assert rows(patch_source(source, GRID, None, method).coords) == rows(CORNERS)
    (missing,) = patch_sources([Source(slide_id="c", path=slide_path.with_name("c.tif"))], GRID, mpp_override=None,
                               workers=1, tissue=method)  # fmt: skip
    assert missing.patched is None


def test_a_slide_without_coordinates_fails_alone_by_its_name(tmp_path, slide_path):
    table(tmp_path / "a.csv")
    other = slide_path.with_name("b.tif")
    other.write_bytes(slide_path.read_bytes())
    sources = [Source(slide_id=path.stem, path=path) for path in (slide_path, other)]
    found = list(patch_sources(sources, GRID, mpp_override=None, workers=2, tissue=resolve_coords(tmp_path)))
    assert rows(found[0].patched.coords) == rows(CORNERS)
    assert "no coordinates of it: expected b.h5" in str(found[1].error)


# -- the laws of corners ----------------------------------------------------------------------------------


def test_repeated_rows_and_patches_over_the_edge_are_left_out_and_counted(tmp_path, source):
    edge = [[WIDTH - SIDE, HEIGHT - SIDE], [WIDTH - SIDE + 1, 0], [0, HEIGHT - 1]]
    table(tmp_path / "a.csv", [*CORNERS.tolist(), *CORNERS[:2].tolist(), *edge])
    patched = patch_source(source, GRID, None, resolve_coords(tmp_path))
    assert rows(patched.coords) == rows(np.concatenate([CORNERS, [edge[0]]]))
    assert [(note.text.partition(" are")[0], note.detail) for note in patched.notes] == [
        ("rows of the coordinates repeat another", "2"),
        ("given patches cross the slide's edge and", "2"),
    ]


@pytest.mark.parametrize("corner", [(-1, 0), (0, -64), (WIDTH, 0), (0, HEIGHT), (2 * WIDTH, 9)])
def test_corners_outside_of_the_slide_are_refused(tmp_path, source, corner):
    table(tmp_path / "a.csv", [*CORNERS.tolist(), corner])
    told = rf"1 of its 5 coordinates lie outside of its 600 x 500 px, such as {corner[0]}, {corner[1]}"
    with pytest.raises(ReadError, match=told):
        patch_source(source, GRID, None, resolve_coords(tmp_path))


@pytest.mark.parametrize("size", [SIDE * 0.985, SIDE * 1.015])
def test_a_size_within_two_percent_is_that_of_the_store(tmp_path, source, size):
    trident(tmp_path / "a.h5", patch_size_level0=size)
    patched = patch_source(source, GRID, None, resolve_coords(tmp_path))
    assert patched.facts.patch_px_level0 == SIDE


WRONG_SIZES = {
    "TRIDENT": ("a.h5", lambda path: trident(path, patch_size_level0=128)),
    "TRIDENT by magnification": ("a.h5", lambda p: trident(p, patch_size_level0=None, target_magnification=5)),
    "CLAM": ("a.h5", lambda path: clam(path, downsample=(4.0, 4.0))),
    "CSV": ("a.csv", lambda path: table(path, header="x,y,size", more=",128")),
    "CSV, one row": ("a.csv", lambda path: path.write_text("x,y,size\n0,0,64\n64,0,128\n")),
}


@pytest.mark.parametrize("kind", WRONG_SIZES)
def test_another_size_is_refused_with_what_matches(tmp_path, source, kind):
    name, write = WRONG_SIZES[kind]
    write(tmp_path / name)
    told = r"patches of 128 level-0 px, but --patch-px 32 at --mpp 1 means 64 .* is --patch-px 64, or --mpp 2;"
    with pytest.raises(MppError, match=told):
        patch_source(source, GRID, None, resolve_coords(tmp_path))
    for grid in (GridSpec(mpp=1.0, patch_px=64, tissue=COORDINATES), GridSpec(mpp=2.0, patch_px=32)):
        if kind != "CSV, one row":
            assert len(patch_source(source, grid, None, resolve_coords(tmp_path)).coords)


def test_coordinates_of_another_slide_are_refused(tmp_path, source):
    trident(tmp_path / "a.h5", level0_width=WIDTH + 1)
    with pytest.raises(ReadError, match="of a slide of 601 x 500 px, and it has 600 x 500"):
        patch_source(source, GRID, None, resolve_coords(tmp_path))


@pytest.mark.parametrize("value", ["16.5", "", "x", "nan", "inf", "1e10"])
def test_what_is_no_whole_number_is_refused_with_its_row(tmp_path, source, value):
    (tmp_path / "a.csv").write_text(f"x,y\n0,0\n64,{value}\n")
    with pytest.raises(ReadError, match=rf"a.csv: row 3: y is '{value}', expected a whole number of level-0 pixels"):
        patch_source(source, GRID, None, resolve_coords(tmp_path))


def test_fractions_in_hdf5(tmp_path, source):
    trident(tmp_path / "a.h5", CORNERS.astype(np.float64))
    assert rows(patch_source(source, GRID, None, resolve_coords(tmp_path)).coords) == rows(CORNERS)
    trident(tmp_path / "a.h5", CORNERS + 0.5)
    with pytest.raises(ReadError, match=r"row 0: coords is '10.5'"):
        patch_source(source, GRID, None, resolve_coords(tmp_path))


def test_at_most_so_many_patches_and_the_order_of_cells(tmp_path, source):
    grid = np.stack(np.meshgrid(np.arange(3, 530, 33), np.arange(5, 430, 33)), axis=-1).reshape(-1, 2)
    table(tmp_path / "a.csv", grid)
    some = GridSpec(mpp=1.0, patch_px=32, tissue=COORDINATES, max_patches=50, cell_patches=2)
    method = resolve_coords(tmp_path)
    coords = patch_source(source, some, None, method).coords
    assert len(coords) == len(set(rows(coords))) == 50
    assert set(rows(coords)) < set(rows(grid))
    cells = [tuple(coords[start] // (2 * SIDE)) for start, _ in blocks(coords, SIDE, some)]
    assert sum(stop - start for start, stop in blocks(coords, SIDE, some)) == 50
    assert all(len(set(map(tuple, (coords[a:b] // (2 * SIDE)).tolist()))) == 1 for a, b in blocks(coords, SIDE, some))
    assert len(cells) > 4
    table(tmp_path / "a.csv", grid[::-1])  # the order of the file decides nothing
    np.testing.assert_array_equal(patch_source(source, some, None, resolve_coords(tmp_path)).coords, coords)


def test_no_patch_left(tmp_path, source):
    table(tmp_path / "a.csv", [[WIDTH - 5, 0]])
    with pytest.raises(NoTissueError, match=r"its coordinates leave no patch of 64 level-0 px .*edge and are left out"):
        patch_source(source, GRID, None, resolve_coords(tmp_path))
    table(tmp_path / "a.csv", np.zeros((0, 2)))
    with pytest.raises(NoTissueError, match="leave no patch"):
        patch_source(source, GRID, None, resolve_coords(tmp_path))


# -- boxes ------------------------------------------------------------------------------------------------


def test_boxes_are_tiled_by_the_grid(tmp_path, source):
    (tmp_path / "a.csv").write_text("x,y,width,height\n64,64,128,64\n100,60,120,200\n550,450,500,500\n")
    patched = patch_source(source, GRID, None, resolve_coords(tmp_path))
    assert rows(patched.coords) == [(64, 64), (128, 64), (128, 128), (128, 192)]


@given(
    boxes=st.lists(st.tuples(*[st.integers(0, 700)] * 2, *[st.integers(1, 400)] * 2), min_size=1, max_size=5),
    side=st.integers(7, 90),
)
def test_boxes_hold_whole_patches_of_the_grid_and_all_of_them(boxes, side):
    found = rows(coords_in_boxes((WIDTH, HEIGHT), side, *np.split(np.array(boxes), 2, axis=1)))
    expected = {
        (x, y)
        for x in range(0, WIDTH - side + 1, side)
        for y in range(0, HEIGHT - side + 1, side)
        if any(x >= a and y >= b and x + side <= a + w and y + side <= b + h for a, b, w, h in boxes)
    }
    assert found == sorted(expected)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x,y,width,height\n0,0,64,0\n", "row 2: a box of 64 x 0 px"),
        ("x,y,width\n0,0,64\n", "expected columns x, y"),
        ("a,b\n0,0\n", "expected columns x, y.*It has a, b"),
        ("x,y,width,height\n700,0,64,64\n", "1 of its 1 coordinates lie outside"),
        ("x,y\n1\n", "1 fields where the header has 2"),
    ],
)
def test_broken_tables(tmp_path, source, text, told):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ReadError, match=told):
        patch_source(source, GRID, None, resolve_coords(tmp_path))


# -- files that cannot be used ----------------------------------------------------------------------------


def hdf5(path, **datasets):
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name] = values


def linked(path):
    hdf5(path.with_name("other.h5"), coords=CORNERS)
    with h5py.File(path, "w") as file:
        file["coords"] = h5py.ExternalLink("other.h5", "coords")


def external(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("coords", (4, 2), "i8", external=[(str(path.with_name("raw")), 0, 64)])


def level_alone(path):
    clam(path)
    with h5py.File(path, "r+") as file:
        del file["coords"].attrs["downsample"]


BROKEN = {
    "no HDF5": (lambda path: path.write_text("x"), "cannot be read as HDF5"),
    "no coords": (lambda path: hdf5(path, feats=np.zeros((4, 8))), "expected a dataset coords; it has feats"),
    "another shape": (lambda path: hdf5(path, coords=np.zeros((4, 5))), r"shape \(4, 5\); expected \(patches, 2\)"),
    "a link": (linked, "expected a dataset coords"),
    "pixels elsewhere": (external, "lies in another file"),
    "text": (lambda path: hdf5(path, coords=np.array([[b"a", b"b"]])), "expected a whole number|as HDF5"),
    "a level of unknown scale": (level_alone, "patches are of level 1, but it has no attribute downsample"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_hdf5(tmp_path, source, kind):
    write, told = BROKEN[kind]
    write(tmp_path / "a.h5")
    with pytest.raises(ReadError, match=told):
        patch_source(source, GRID, None, resolve_coords(tmp_path))


def test_a_dataset_that_declares_too_much(tmp_path, source, monkeypatch):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("coords", (1 << 40, 2), "i8", chunks=(1024, 2))
    with pytest.raises(ReadError, match=f"has 17,592,186,044,416 bytes. If it is sound, set {JSON_BYTES} to more"):
        patch_source(source, GRID, None, resolve_coords(tmp_path))
    table(tmp_path / "big" if (tmp_path / "big").mkdir() else tmp_path / "big" / "a.csv")
    monkeypatch.setenv(JSON_BYTES, "10")
    with pytest.raises(ReadError, match="more than 10 are not read"):
        patch_source(source, GRID, None, resolve_coords(tmp_path / "big"))


def test_two_files_of_a_slide(tmp_path, source):
    table(tmp_path / "a.csv")
    trident(tmp_path / "a_patches.h5")
    with pytest.raises(ReadError, match="two files of it, a_patches.h5 and a.csv: keep one"):
        patch_source(source, GRID, None, resolve_coords(tmp_path))


def test_two_slides_of_one_name_are_not_given_one_file(tmp_path):
    (tmp_path / "y").mkdir()
    sources = [Source(slide_id=f"{folder}/a", path=Path(folder, "a.svs")) for folder in ("x", "y")]
    table(tmp_path / "a.csv")
    with pytest.raises(UsageError, match="slides x/a and y/a would both take their coordinates from .*a.csv"):
        Coordinates(tmp_path).require_distinct(sources)
    table(tmp_path / "y" / "a.csv", CORNERS[:1])
    given = Coordinates(tmp_path)
    given.require_distinct(sources)
    assert [len(given.read(s.slide_id, s.path)[1].corners) for s in sources] == [4, 1]


def test_paths_that_cannot_be_used(tmp_path):
    for name in ("none", "a.txt"):
        (tmp_path / "a.txt").touch()
        with pytest.raises(UsageError, match="expected a folder with a file a slide"):
            resolve_coords(tmp_path / name)
    (tmp_path / "a.csv").touch()
    with pytest.raises(ManifestError, match="is empty"):
        resolve_coords(tmp_path / "a.csv")
    with pytest.raises(UsageError, match="give their folder or file again with --coords"):
        resolve_tissue(COORDINATES)


def test_parquet_without_pyarrow_names_the_remedy(tmp_path, source, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=r'needs pyarrow: pip install "g2l\[parquet\]"'):
        patch_source(source, GRID, None, resolve_coords(tmp_path))


def test_a_broken_parquet_file(tmp_path, source):
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ReadError, match="no Parquet file"):
        patch_source(source, GRID, None, resolve_coords(tmp_path))


# -- stores -----------------------------------------------------------------------------------------------


def test_a_stored_slide_refuses_other_coordinates(tmp_path, source):
    table(tmp_path / "a.csv")
    store = stored(tmp_path / "s.zarr", source, resolve_coords(tmp_path))
    assert store.grid["tissue"] == COORDINATES
    (tmp_path / "a.csv").unlink()
    trident(tmp_path / "a.h5", CORNERS[::-1])  # the same in another file and order
    refresh_stored(store.slide("a"), source, ViewSpec(), 1, resolve_coords(tmp_path))
    trident(tmp_path / "a.h5", CORNERS + 1)
    with pytest.raises(StoreMismatchError, match=r"its coordinates have changed .* of a.csv"):
        refresh_stored(store.slide("a"), source, ViewSpec(), 1, resolve_coords(tmp_path))
    (tmp_path / "a.h5").unlink()
    refresh_stored(store.slide("a"), source, ViewSpec(), 1, resolve_coords(tmp_path))
    with pytest.raises(StoreMismatchError, match="tissue"):
        FeatureStore.create(tmp_path / "s.zarr", grid={**store.grid, "tissue": "otsu"}, views=store.views)

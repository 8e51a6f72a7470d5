"""Slides that point out of their folder, what is no file, and text that a spreadsheet would run."""

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from g2l_core.datasets.manifest import _write as write_dataset_table
from g2l_core.errors import NotASlideError, ReadError
from g2l_core.files import csv_row, csv_value
from g2l_core.patches.render import read_image
from g2l_core.report.write import _csv_text
from g2l_core.slides.manifest import read_sources, read_table
from g2l_core.slides.slide import open_slide
from tests.faults.test_bombs import slide
from tests.faults.test_untrusted_code import ome_zarr_2
from tests.pipeline.test_cli import cache

# -- OME-Zarr ---------------------------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path):
    """A picture beside the slide's folder, that the slide would like to show."""
    folder = tmp_path / "secret"
    zarr.create_array(folder, shape=(3, 64, 64), chunks=(3, 64, 64), dtype="u1", zarr_format=2)[:] = 77
    return folder


def point_to(path: Path, name: str) -> None:
    facts = json.loads((path / ".zattrs").read_text())
    facts["multiscales"][0]["datasets"][0]["path"] = name
    (path / ".zattrs").write_text(json.dumps(facts))


@pytest.mark.parametrize("name", ["../secret", "0/../../secret", "ABSOLUTE", "..", "./../secret"])
def test_a_level_outside_of_the_folder(tmp_path, secret, name):
    path = ome_zarr_2(tmp_path / "x.zarr")
    point_to(path, str(secret) if name == "ABSOLUTE" else name)
    with pytest.raises(NotASlideError, match="leads out of the slide's folder"):
        open_slide(path)


def test_a_level_that_is_a_link_out_of_the_folder(tmp_path, secret):
    path = ome_zarr_2(tmp_path / "x.zarr")
    shutil.rmtree(path / "0")
    (path / "0").symlink_to(secret)
    with pytest.raises(NotASlideError, match="is a link out of the slide's folder"):
        open_slide(path)


@pytest.mark.parametrize("version", [2, 3])
def test_a_chunk_that_is_a_link_out_of_the_folder(tmp_path, secret, version):
    path = ome_zarr_2(tmp_path / "x.zarr")
    chunk = path / "0/0.0.0"
    if version == 3:
        shutil.rmtree(path / "0")
        zarr.create_array(path / "0", shape=(3, 64, 64), chunks=(3, 64, 64), dtype="u1", compressors=None)[:] = 200
        chunk = path / "0/c/0/0/0"
    with open_slide(path) as opened:
        assert (opened.read_patch(0, 0, 64, 64) == 200).all()
    chunk.unlink()
    chunk.symlink_to(secret / "0.0.0")
    with open_slide(path) as opened, pytest.raises(ReadError, match="is a link out of the slide's folder"):
        opened.read_patch(0, 0, 64, 64)


def test_links_inside_of_the_folder_and_to_it_are_followed(tmp_path):
    path = ome_zarr_2(tmp_path / "x.zarr")
    (path / "0").rename(path / "elsewhere")
    (path / "0").symlink_to("elsewhere")
    (tmp_path / "y.zarr").symlink_to(path)
    for name in ("x.zarr", "y.zarr"):
        with open_slide(tmp_path / name) as opened:
            assert (opened.read_patch(0, 0, 64, 64) == 200).all()


def test_a_chunk_that_is_a_pipe(tmp_path):
    path = ome_zarr_2(tmp_path / "x.zarr")
    (path / "0/0.0.0").unlink()
    os.mkfifo(path / "0/0.0.0")
    with open_slide(path) as opened, pytest.raises(ReadError, match="is a named pipe"):
        opened.read_patch(0, 0, 64, 64)


# -- what is no file --------------------------------------------------------------------------------------


def make_socket(path: Path) -> None:
    here = os.open(".", os.O_RDONLY)
    os.chdir(path.parent)  # the address of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.fchdir(here)
        os.close(here)


@pytest.mark.parametrize(("make", "word"), [(os.mkfifo, "named pipe"), (make_socket, "socket")])
def test_no_file_costs_itself_alone(tmp_path, make, word):
    (tmp_path / "in").mkdir()
    slide(tmp_path / "in/good.tiff")
    make(tmp_path / "in/bad.svs")
    make(tmp_path / "in/bad2.dcm")
    done = cache(tmp_path / "in", tmp_path / "s.zarr", "--views", "0", "--tissue", "none")
    assert done.returncode == 1
    for name in ("bad: ", "bad2: "):
        (line,) = [line for line in done.stderr.splitlines() if line.startswith(f"failed  {name}")]
        assert f"is a {word}; expected a file or a folder" in line
    assert "of 1 slides" in done.stdout


def test_a_device_and_a_pipe_as_the_input_itself(tmp_path):
    with pytest.raises(ReadError, match="/dev/zero is a device"):
        read_sources([Path("/dev/zero")])
    os.mkfifo(tmp_path / "list.csv")
    with pytest.raises(ReadError, match="list.csv is a named pipe"):
        read_sources([tmp_path / "list.csv"])


def test_a_pipe_among_patch_images(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ReadError, match="is a named pipe"):
        read_image(tmp_path / "a.png", 224)


# -- linked folders ---------------------------------------------------------------------------------------


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")


def ids(folder: Path) -> list[str]:
    return [source.slide_id for source in read_sources([folder])]


def test_linked_folders_are_followed_once(tmp_path):
    cohort, elsewhere = tmp_path / "cohort", tmp_path / "elsewhere"
    touch(cohort / "real/a.svs")
    touch(elsewhere / "b.svs")
    touch(elsewhere / "deep/c.svs")
    (cohort / "again").symlink_to(cohort / "real")  # named before "real", which still gives the id
    (cohort / "loop").symlink_to(cohort)
    (cohort / "real/up").symlink_to("..")
    (cohort / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(cohort)
    (elsewhere / "deep/self").symlink_to(elsewhere / "deep")
    (cohort / "linked-too").symlink_to(elsewhere)
    assert ids(cohort) == ["linked/b", "linked/deep/c", "real/a"]


def test_a_linked_folder_of_images(tmp_path):
    touch(tmp_path / "elsewhere/a.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/tumor").symlink_to(tmp_path / "elsewhere")
    (source,) = read_sources([tmp_path / "in"])
    assert (source.slide_id, source.patch_ids) == ("tumor", ("a.png",))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=6))
def test_any_loop_of_links_ends(tmp_path_factory, links):
    root = tmp_path_factory.mktemp("links")
    for i in range(5):
        touch(root / f"{i}" / f"{i}.svs")
    for number, (where, to) in enumerate(links):
        (root / str(where) / f"link{number}").symlink_to(root / str(to))
    assert ids(root) == [f"{i}/{i}" for i in range(5)]


# -- spreadsheets -----------------------------------------------------------------------------------------

FORMULAS = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "=HYPERLINK(1)", "'=1", "''=1", "'-5"]


@pytest.mark.parametrize("text", FORMULAS)
def test_formulas_are_quoted(text):
    (cell,) = csv_row([text])
    assert cell == f"'{text}"
    assert csv_value(cell) == text


@pytest.mark.parametrize("value", ["-1.5", "+3", "1e-5", "-inf", "a=b", "", "x@y.z", "O'Brien", "'tis", -1.5, 3, None])
def test_numbers_and_plain_text_stay(value):
    assert csv_row([value]) == [value]
    assert not isinstance(value, str) or csv_value(value) == value


@given(st.text("=+-@'\t\r1.e a", max_size=8))
def test_every_text_comes_back(text):
    (cell,) = csv_row([text])
    assert csv_value(cell) == text
    is_number = True
    try:
        float(text)
    except ValueError:
        is_number = False
    assert is_number or not cell.startswith(("=", "+", "-", "@", "\t", "\r"))


def test_tables_are_read_back_as_they_were(tmp_path):
    rows = [{"slide_id": "=a", "path": "-a.svs", "medical_center": "@x", "+label": "'=1"}]
    write_dataset_table(tmp_path / "t.csv", rows)
    assert read_table(tmp_path / "t.csv") == rows
    assert "'+label" in (tmp_path / "t.csv").read_text().partition("\n")[0]


def test_every_writer_quotes(tmp_path):
    text = _csv_text(["task", "=x"], [["@task", -1.5]])
    assert text == "task,'=x\n'@task,-1.5\n"

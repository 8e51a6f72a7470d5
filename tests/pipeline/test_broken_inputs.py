"""Stage one on broken slides and broken disks: nothing lost, nothing invented, every message clear."""

import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tifffile

from g2l_core.store.features import FeatureStore
from g2l_core.store.verify import verify
from tests.conftest import TEACHER
from tests.pipeline.test_cli import G2L, KEY, cache

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def sound(cohort, tmp_path_factory):
    """Two slides, victim and witness, and the store that they give when nothing is broken."""
    folder = tmp_path_factory.mktemp("sound") / "slides"
    folder.mkdir()
    for name, path in zip(("victim", "witness"), sorted((cohort.parent / "slides").glob("*.tiff")), strict=False):
        shutil.copy(path, folder / f"{name}.tiff")
    store = folder.parent / "s.zarr"
    assert cache(folder, store, "--views", "1", "--tissue", "none").returncode == 0
    return folder, FeatureStore.open(store)


@pytest.fixture
def slides(sound, tmp_path):
    return shutil.copytree(sound[0], tmp_path / "slides")


def truncate(share):
    def damage(path):
        with path.open("r+b") as file:
            file.truncate(int(path.stat().st_size * share))

    return damage


def empty(path):
    path.write_bytes(b"")


def zeros(path):
    path.write_bytes(b"\0" * path.stat().st_size)


def tile_ranges(path):
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        return list(zip(page.dataoffsets, page.databytecounts, strict=True))


def flip_bits(path):
    """A thousand flipped bits in the JPEG headers and data of three tiles."""
    rng = np.random.default_rng(0)
    tiles = tile_ranges(path)
    content = bytearray(path.read_bytes())
    for i in rng.choice(len(tiles), 3, replace=False):
        offset, count = tiles[i]
        for place in rng.integers(0, count, 1000):
            content[offset + place] ^= 1 << rng.integers(8)
    path.write_bytes(content)


def zero_tiles(path):
    content = bytearray(path.read_bytes())
    for offset, count in tile_ranges(path)[4:6]:
        content[offset : offset + count] = bytes(count)
    path.write_bytes(content)


def text(path):
    path.write_text("slide_id,path\n" * 100)


def other_image(path):
    path.unlink()
    shutil.copy(ROOT / "pyproject.toml", path)


def folder_of_that_name(path):
    path.unlink()
    path.mkdir()
    (path / "notes.txt").write_text("not a slide")


def dangling_link(path):
    path.unlink()
    path.symlink_to(path.with_name("gone.tiff"))


DAMAGES = {
    **{f"truncated at {share:.0%}": truncate(share) for share in (0.02, 0.25, 0.5, 0.75, 0.98)},
    "no bytes": empty,
    "zero bytes": zeros,
    "flipped bits": flip_bits,
    "zeroed tiles": zero_tiles,
    "text": text,
    "wrong extension": other_image,
    "a folder": folder_of_that_name,
    "a dangling link": dangling_link,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_slide_costs_what_is_broken(sound, slides, tmp_path, damage):
    DAMAGES[damage](slides / "victim.tiff")
    done = cache(slides, tmp_path / "s.zarr", "--views", "1", "--tissue", "none")
    store = FeatureStore.open(tmp_path / "s.zarr")
    require_equal_slide(store.slide("witness"), sound[1].slide("witness"))
    assert "Traceback" not in done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("failed  victim: ")]
    victim = store.slide("victim")
    if not victim.has_patches:
        assert (done.returncode, len(told)) == (1, 1)
        assert victim.facts.reason in told[0]
        assert len(victim.facts.reason) > 20
        return
    require_nothing_invented(victim, sound[1].slide("victim"), at_most=12 if damage == "flipped bits" else 0)
    lost = int((victim.patch_status != 0).sum())
    assert len(victim.unreadable) == lost
    assert (done.returncode, len(told)) == ((1, 1) if lost else (0, 0))
    assert not told or f"{lost} patches" in told[0]
    assert list(verify(store)) == []


def require_equal_slide(found, wanted):
    assert np.array_equal(found.coords, wanted.coords)
    for view in (0, 1):
        assert np.array_equal(found.features(KEY, view=view), wanted.features(KEY, view=view))


def require_nothing_invented(found, wanted, *, at_most):
    """Every patch has the sound slide's features or none, but for patches of tiles whose bits still decode."""
    assert np.array_equal(found.coords, wanted.coords)
    good = found.patch_status == 0
    other = (found.pixel_hash[:, 0] != wanted.pixel_hash[:, 0]) & good
    assert other.sum() <= at_most
    for view in (0, 1):
        ours, theirs = found.features(KEY, view=view), wanted.features(KEY, view=view)
        same = good & ~other
        assert np.array_equal(ours[same], theirs[same])
        assert np.isnan(ours[~good]).all()


def test_a_slide_that_may_not_be_read(sound, slides, tmp_path):
    (slides / "victim.tiff").chmod(0)
    command = [*G2L, "cache-teacher", slides, "--store", tmp_path / "s.zarr", "--teacher", TEACHER]
    command += ["--weights", "random:0", "--tissue", "none", "--views", "1"]
    if os.geteuid() == 0:  # who may read everything, but for this
        powers = "-dac_override,-dac_read_search"
        without = ["setpriv", f"--bounding-set={powers}", f"--inh-caps={powers}"]
        if not shutil.which("setpriv") or subprocess.run([*without, "true"], check=False).returncode:
            pytest.skip("root cannot give up its powers here")
        command = [*without, *command]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=120)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("failed  victim: ")]
    assert done.returncode == 1, done.stderr
    assert "Permission denied" in line
    require_equal_slide(FeatureStore.open(tmp_path / "s.zarr").slide("witness"), sound[1].slide("witness"))


@contextmanager
def small_disk(folder, size):
    """A disk of its own of `size` bytes; skipped where none can be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def remount(folder, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def bytes_on_disk(folder):
    return sum(path.stat().st_blocks * 512 if path.is_file() else 4096 for path in folder.rglob("*"))


@pytest.mark.parametrize("share", [0.02, 0.4, 0.9])
def test_a_disk_that_fills_up(sound, tmp_path, share):
    folder, wanted = sound
    disk = tmp_path / "disk"
    with small_disk(disk, int(share * bytes_on_disk(wanted.path))):
        done = cache(folder, disk / "s.zarr", "--views", "1", "--tissue", "none")
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert "No space left" in line
        remount(disk, "size=1g")
        assert cache(folder, disk / "s.zarr", "--views", "1", "--tissue", "none").returncode == 0
        store = FeatureStore.open(disk / "s.zarr")
        for name in ("victim", "witness"):
            require_equal_slide(store.slide(name), wanted.slide(name))
        assert {problem.kind for problem in verify(store)} <= {"leftover"}


def test_a_store_on_a_read_only_disk(sound, tmp_path):
    folder, wanted = sound
    disk = tmp_path / "disk"
    with small_disk(disk, 10**9):
        shutil.copytree(wanted.path, disk / "s.zarr")
        remount(disk, "ro")
        for store, views in ((disk / "new.zarr", "1"), (disk / "s.zarr", "2")):
            done = cache(folder, store, "--views", views, "--tissue", "none")
            assert done.returncode == 2, done.stderr
            assert "Traceback" not in done.stderr
            assert "Read-only file system" in done.stderr

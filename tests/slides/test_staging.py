"""Slides copied ahead to a fast disk: whole, bounded, deleted, and cleared away after a kill."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from g2l_core.slides import staging
from g2l_core.slides.staging import Stage, files_of, remove_dead
from g2l_core.store.features import FeatureStore
from tests.pipeline.test_cli import KEY, cache

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sources(tmp_path):
    """Six files of 1,000 bytes."""
    paths = [tmp_path / f"{i}.svs" for i in range(6)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 1000)
    return paths


def bytes_in(folder):
    """What lies in a folder in which another thread is at work."""
    total = 0
    for at, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += (Path(at) / name).stat().st_size
    return total


def until(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within five seconds")


def test_copies_are_made_ahead_and_deleted_after_use(sources, tmp_path):
    told = []
    with Stage(tmp_path / "ssd", 3000, sources, told.append) as stage:
        until(lambda: stage.staged_bytes == 3000)
        for source in sources:
            copy = stage.path_of(source)
            assert copy.read_bytes() == source.read_bytes()
            assert copy != source
            assert bytes_in(tmp_path / "ssd") <= 3000
            stage.release(source)
            assert not copy.exists()
        assert stage.staged_bytes == 0
    assert list((tmp_path / "ssd").iterdir()) == []
    assert told == []
    assert all(source.exists() for source in sources)


def test_what_does_not_fit_is_read_in_place(sources, tmp_path):
    sources[1].write_bytes(bytes(5000))
    with Stage(tmp_path / "ssd", 2000, sources, print) as stage:
        assert stage.path_of(sources[0]) != sources[0]
        assert stage.path_of(sources[1]) == sources[1]  # larger than the bound
        assert stage.path_of(sources[2]) != sources[2]
        assert stage.path_of(sources[3]) == sources[3]  # no room, and nobody will make any before this one is read
        assert stage.path_of(tmp_path / "unknown.svs") == tmp_path / "unknown.svs"
        assert stage.staged_bytes == 2000


def test_the_bound_holds_whatever_the_order_of_release(sources, tmp_path):
    most = []
    with Stage(tmp_path / "ssd", 2500, sources, print) as stage:
        watching = threading.Event()

        def watch():
            while not watching.is_set():
                most.append(bytes_in(tmp_path / "ssd"))

        watcher = threading.Thread(target=watch)
        watcher.start()
        held = []
        for source in sources:
            held.append(source)
            stage.path_of(source)
            if len(held) == 2:
                stage.release(held.pop(0))
        watching.set()
        watcher.join()
    assert max(most) <= 2500


def test_a_copy_that_fails_is_told_and_read_in_place(sources, tmp_path):
    sources[2].unlink()
    told = []
    with Stage(tmp_path / "ssd", 10_000, sources, told.append) as stage:
        assert stage.path_of(sources[2]) == sources[2]
        assert stage.path_of(sources[3]) != sources[3]
    assert len(told) == 1
    assert str(sources[2]) in told[0]
    assert "No such file" in told[0]


def test_formats_of_several_files(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a.mrxs", "a/Data0000.dat", "a/Slidedat.ini", "1.dcm", "2.dcm"):
        (tmp_path / name).write_bytes(b"x" * 100)
    mrxs, dicom, index = tmp_path / "a.mrxs", tmp_path / "1.dcm", tmp_path / "x.vms"
    index.write_text("[Virtual Microscope Specimen]")
    assert files_of(dicom) == [tmp_path / "1.dcm", tmp_path / "2.dcm"]
    with Stage(tmp_path / "ssd", 10_000, [mrxs, dicom, index, tmp_path / "a"], print) as stage:
        copy = stage.path_of(mrxs)
        assert sorted(p.name for p in copy.parent.rglob("*")) == ["Data0000.dat", "Slidedat.ini", "a", "a.mrxs"]
        assert sorted(p.name for p in stage.path_of(dicom).parent.iterdir()) == ["1.dcm", "2.dcm"]
        assert stage.path_of(index) == index
        assert (stage.path_of(tmp_path / "a") / "Slidedat.ini").exists()
        assert stage.staged_bytes == 300 + 200 + 200


HOLD = """
import sys, time
from pathlib import Path
from g2l_core.slides.staging import Stage
with Stage(Path(sys.argv[1]), 10_000, [Path(sys.argv[2])], print) as stage:
    print(stage.path_of(Path(sys.argv[2])), flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_is_deleted_and_what_a_living_one_holds_is_kept(sources, tmp_path):
    ssd = tmp_path / "ssd"
    command = [sys.executable, "-c", HOLD, str(ssd)]
    holders = [subprocess.Popen([*command, str(s)], cwd=ROOT, stdout=subprocess.PIPE, text=True) for s in sources[:2]]
    try:
        dead, living = (Path(holder.stdout.readline().strip()) for holder in holders)
        assert dead.exists()
        holders[0].send_signal(signal.SIGKILL)
        holders[0].wait()
        assert dead.exists()
        with Stage(ssd, 1000, sources[2:3], print):
            assert not dead.parent.parent.exists()
            assert living.exists()
    finally:
        for holder in holders:
            holder.kill()
            holder.communicate()
    assert remove_dead(ssd) == [living.parent.parent]
    assert list(ssd.iterdir()) == []


def test_a_copy_under_way_has_no_final_name(sources, tmp_path, monkeypatch):
    copying, go_on = threading.Event(), threading.Event()
    copyfile = shutil.copyfile

    def slow(source, target):
        copying.set()
        go_on.wait(5)
        return copyfile(source, target)

    monkeypatch.setattr(staging.shutil, "copyfile", slow)
    with Stage(tmp_path / "ssd", 10_000, sources[:1], print) as stage:
        copying.wait(5)
        assert [p.name for p in stage.folder.iterdir() if p.is_dir()] == ["0.partial"]
        go_on.set()
        assert stage.path_of(sources[0]).parent.name == "0"


def test_a_staged_run_gives_the_same_store_and_clears_up(cohort, tmp_path, monkeypatch):
    slides = cohort.parent / "slides"
    read, opened = [], staging.Stage.path_of
    monkeypatch.setattr(Stage, "path_of", lambda self, path: read.append(opened(self, path)) or read[-1])
    arguments = ["--views", "1", "--max-patches", "4"]
    assert cache(slides, tmp_path / "plain.zarr", *arguments).returncode == 0
    largest = max(path.stat().st_size for path in slides.iterdir())
    staged = ["--stage-dir", tmp_path / "ssd", "--stage-gb", 2.5 * largest / 1e9]
    done = cache(slides, tmp_path / "staged.zarr", *arguments, *staged)
    assert done.returncode == 0, done.stderr
    assert sum(tmp_path / "ssd" in path.parents for path in read) >= 3
    assert list((tmp_path / "ssd").iterdir()) == []
    plain, other = (FeatureStore.open(tmp_path / f"{name}.zarr") for name in ("plain", "staged"))
    for slide in plain.slides():
        assert np.array_equal(slide.features(KEY, view=1), other.slide(slide.slide_id).features(KEY, view=1))
        assert other.slide(slide.slide_id).facts.source == slide.facts.source

"""Full disks, limits of files and folders that cannot be written to, in every command after stage one.

Each says so in one line with the remedy, leaves nothing that looks whole, and the same command goes on once it can.
"""

import itertools
import os
import resource
import shutil
from contextlib import contextmanager
from functools import partial

import pytest
from PIL import Image

from g2l_core.patches.reader_pool import MAX_OPEN, default_max_open
from g2l_core.store.features import FeatureStore
from g2l_core.store.verify import verify
from tests.faults.small_run import KEY, OPTIONS, STUDENT, STUDENT_WEIGHTS
from tests.faults.test_repair import TABLES
from tests.pipeline.test_broken_inputs import bytes_on_disk, remount, small_disk
from tests.pipeline.test_cli import g2l, refused

SMALL = {**OPTIONS, "steps": 2, "validate_every": 2, "checkpoint_every": 1}


@pytest.fixture(scope="module")
def files(cached_store, tmp_path_factory):
    """Inputs of every command, among them a store with two encoders and a finished run."""
    folder = tmp_path_factory.mktemp("full")
    shutil.copytree(cached_store, folder / "s.zarr")
    base = "".join(f"{name} = {value!r}\n" for name, value in SMALL.items())
    (folder / "recipe.toml").write_text(base)
    (folder / "seeds.toml").write_text(f"[base]\n{base}[grid]\nseed = [0, 1]\n")
    assert g2l(*commands(folder)["distill"], "--out", folder / "run").returncode == 0
    manifest = (
        next(iter(FeatureStore.open(folder / "s.zarr").slides())).facts.source.rpartition("/")[0] + "/../manifest.csv"
    )
    (folder / "manifest").write_text(manifest)
    assert g2l("embed", manifest, "--store", folder / "s.zarr", "--encoder", folder / "run").returncode == 0
    (folder / "tasks.toml").write_text('[tasks.a]\nmetrics = ["cka"]\n')
    return folder


def commands(files):
    store = files / "s.zarr"
    student = ["--student", STUDENT, "--weights", STUDENT_WEIGHTS, "--device", "cpu", "--teacher", KEY]
    return {
        "distill": ["distill", "--store", store, *student, "--resume", "--config", files / "recipe.toml"],
        "bench": ["bench", files / "tasks.toml", "--store", store, "--encoders", f"{KEY},{files / 'run'}"],
        "sweep": ["sweep", files / "seeds.toml", "--store", store, *student],
        "export": ["store", "export", store, "--encoder", KEY],
        "export-timm": ["export-student", files / "run"],
        "export-torchscript": ["export-student", files / "run", "--format", "torchscript"],
    }


COMMANDS = ("distill", "bench", "sweep", "export", "export-timm", "export-torchscript")


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """What each command writes where nothing is in its way."""
    out = tmp_path_factory.mktemp("whole")
    for name, command in commands(files).items():
        assert g2l(*command, "--out", out / name).returncode == 0
    return out


def require_equal(found, wanted):
    """The files whose bytes are a function of the input."""
    for path in wanted.rglob("*"):
        if path.suffix in {".safetensors", ".h5"} or path.name in {"results.csv", "comparisons.csv", "validation.csv"}:
            other = found / path.relative_to(wanted)
            assert other.read_bytes() == path.read_bytes(), other


@pytest.mark.parametrize("share", [0.03, 0.5, 0.8])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_disk_that_fills_up(files, whole, tmp_path, command, share):
    disk = tmp_path / "disk"
    with small_disk(disk, max(8192, int(share * bytes_on_disk(whole / command)))):
        done = g2l(*commands(files)[command], "--out", disk / "out")
        assert done.returncode in {1, 2}, done.stderr  # of a sweep the first run may fit
        assert "Traceback" not in done.stderr
        assert "internal error" not in done.stderr
        assert "No space left on device; free space and run the same command again" in done.stderr
        if command.startswith("export-"):
            assert not (disk / "out").exists()
        remount(disk, "size=1g")
        done = g2l(*commands(files)[command], "--out", disk / "out")
        assert done.returncode == 0, done.stderr
        require_equal(disk / "out", whole / command)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_cannot_be_written_to(files, whole, tmp_path, command):
    disk = tmp_path / "disk"
    with small_disk(disk, 10**9):
        if not command.startswith("export-"):
            shutil.copytree(whole / command, disk / "out")
        remount(disk, "ro")
        for out in (disk / "out", disk / "new"):
            done = g2l(*commands(files)[command], "--out", out)
            refused(done, "Read-only file system; make it writable")
            assert "internal error" not in done.stderr


@contextmanager
def limited(kind, size):
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_limit_of_file_sizes(files, tmp_path, command):
    with limited(resource.RLIMIT_FSIZE, 400):
        done = g2l(*commands(files)[command], "--out", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert "internal error" not in done.stderr
    assert "File too large; raise the limit of file sizes (ulimit -f)" in done.stderr


def test_embedding_onto_a_full_disk(files, cached_store, tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, 10**9):
        store = shutil.copytree(cached_store, disk / "s.zarr")
        remount(disk, f"size={bytes_on_disk(store) + 8 * 4096}")
        command = ["embed", (files / "manifest").read_text(), "--store", store, "--encoder", files / "run"]
        refused(g2l(*command), "No space left on device; free space")
        remount(disk, "size=1g")
        done = g2l(*command)
        assert done.returncode == 0, done.stderr
        assert {problem.kind for problem in verify(FeatureStore.open(store))} <= {"leftover"}


def limit_for(more):
    """The limit at which this process can open so many more files; listing those that are open takes one."""
    Image.init()  # which leaves a file open where its plug-ins cannot be
    used = {int(name) for name in os.listdir("/proc/self/fd")}  # noqa: PTH208
    return next(itertools.islice((n for n in itertools.count() if n not in used), more - 1, None))


@pytest.mark.parametrize("more", [1, 2, 3])
@pytest.mark.parametrize("command", ["distill", "bench", "export", "export-timm", "sweep"])
def test_too_many_open_files(files, whole, tmp_path, command, more):
    with limited(resource.RLIMIT_NOFILE, limit_for(more)):
        done = g2l(*commands(files)[command], "--out", tmp_path / "out")
    if done.returncode == 0 and more > 1:  # that many were enough
        return
    assert done.returncode == 2 or (done.returncode == 1 and command == "sweep"), done.stderr
    require_said(done)
    assert g2l(*commands(files)[command], "--out", tmp_path / "out").returncode == 0
    require_equal(tmp_path / "out", whole / command)


def require_said(done):
    """Every line about it has the remedy, once, and takes no file for damaged."""
    told = done.stdout + done.stderr
    lines = [line for line in told.splitlines() if "Too many open files" in line]
    assert lines, told
    for line in lines:
        assert line.count("; raise the limit of open files (ulimit -n) and run the same command again") == 1, line
    for word in ("internal error", "Traceback", "writable", "damaged", "Restore", "complete?"):
        assert word not in told


def content(store):
    """All tables and features, by slide and name."""
    return {
        (slide.slide_id, name): read().tobytes()
        for slide in FeatureStore.open(store).slides()
        for name, read in [
            *((table, partial(slide.read_table, table)) for table in TABLES),
            *((f"{key}.{view}", partial(slide.features, key, view=view))
              for key in slide.encoder_keys for view in range(slide.feature_facts(key).n_views)),
        ]
    }  # fmt: skip


@pytest.mark.parametrize("more", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("command", ["embed", "cache-teacher"])
def test_too_many_open_files_in_stage_one(files, cached_store, cohort, tmp_path, command, more):
    store = tmp_path / "s.zarr"
    arguments = [command, cohort, "--store", store, "--teacher", STUDENT, "--weights", "random:0", "--views", "2"]
    if command == "embed":
        shutil.copytree(cached_store, store)
        arguments = [command, cohort, "--store", store, "--encoder", files / "run"]
    with limited(resource.RLIMIT_NOFILE, limit_for(more)):
        done = g2l(*arguments)
    if done.returncode == 0 and more > 1:
        return
    assert done.returncode in {1, 2}, done.stderr  # 1 where some slides could be opened
    require_said(done)
    done = g2l(*arguments)
    assert done.returncode == 0, done.stderr
    wanted = content(files / "s.zarr")  # the teacher's and the student's
    found = content(store)
    assert found == {place: wanted[place] for place in found}
    assert len(found) == len(wanted) or command == "cache-teacher"


@pytest.mark.parametrize("more", [1, 2, 3, 4])
def test_too_many_open_files_are_no_damage(cached_store, tmp_path, more):
    store = shutil.copytree(cached_store, tmp_path / "s.zarr")
    before = content(store)
    with limited(resource.RLIMIT_NOFILE, limit_for(more)):
        done = g2l("store", "verify", store, "--repair")
    assert done.returncode in {0, 2}
    if done.returncode:
        require_said(done)
    assert content(store) == before
    assert list(verify(FeatureStore.open(store))) == []


def test_the_pool_of_slides_follows_the_limit():
    assert default_max_open() <= MAX_OPEN
    with limited(resource.RLIMIT_NOFILE, 100):
        assert default_max_open() == 25

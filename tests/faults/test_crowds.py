"""Two commands at once: the second is refused in one line and has changed nothing."""

import errno
import fcntl
import multiprocessing
import os
import shutil
import signal
import time

import pytest

from g2l_core.errors import G2LError, RunError, StoreError
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.views import ViewSpec
from g2l_core.store import locks
from g2l_core.store.features import FeatureStore
from g2l_core.store.locks import LOCKS, holds_only_locks, locked, locked_output
from tests.faults.small_run import KEY, OPTIONS, STUDENT, STUDENT_WEIGHTS, distill
from tests.pipeline.test_cli import cache, g2l, refused

FORK = multiprocessing.get_context("fork")


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def files(cached_store, tmp_path):
    """The inputs of every command, with a finished output for those that replace or continue one."""
    (tmp_path / "tasks.toml").write_text('[tasks.a]\nmetrics = ["cka"]\n')
    options = "".join(f"{name} = {value!r}\n" for name, value in {**OPTIONS, "steps": 2}.items())
    (tmp_path / "seeds.toml").write_text(f"[base]\n{options}[grid]\nseed = [0]\n")
    return tmp_path


def commands(store, files):
    student = ["--student", STUDENT, "--weights", STUDENT_WEIGHTS, "--device", "cpu", "--teacher", KEY]
    return {
        "distill": ["distill", "--store", store, *student, "--resume", "--steps", "2", "--hold-out", "0.34"],
        "bench": ["bench", files / "tasks.toml", "--store", store, "--encoders", KEY],
        "sweep": ["sweep", files / "seeds.toml", "--store", store, *student],
        "export": ["store", "export", store],
    }


@pytest.mark.parametrize("command", ["distill", "bench", "sweep", "export"])
def test_a_second_command_into_one_folder_changes_nothing(cached_store, files, command):
    out = files / "out"
    out.mkdir()
    (out / "notes.txt").write_text("of the first")
    with locked_output(out):
        before = content(out)
        refused(g2l(*commands(cached_store, files)[command], "--out", out), f"{out} is in use: another g2l command")
        assert content(out) == before


def test_export_student_is_locked_too(cached_store, tmp_path):
    distill(cached_store, tmp_path / "run", steps=2)
    with locked_output(tmp_path / "out.partial"):
        refused(g2l("export-student", tmp_path / "run", "--out", tmp_path / "out"), "is in use: another g2l command")
    assert g2l("export-student", tmp_path / "run", "--out", tmp_path / "out").returncode == 0
    assert not (tmp_path / "out.partial").exists()
    assert not (tmp_path / "out" / LOCKS).exists()


def test_a_refused_second_call_of_stage_one_does_not_change_an_empty_store(cohort, tmp_path):
    store = tmp_path / "s.zarr"
    FeatureStore.create(store, grid=GridSpec().to_json(), views=ViewSpec().to_json())
    with locked(store / LOCKS / "writer", wait_s=0, holder="the first"):
        before = content(store)
        refused(cache(cohort, store, "--crop-px", "200"), "s.zarr is in use: another g2l command")
        assert content(store) == before


def test_a_command_that_is_refused_leaves_no_folder(cached_store, tmp_path):
    for command in ("distill", "bench"):
        done = g2l(
            *commands(cached_store, tmp_path)[command], "--out", tmp_path / "out",
        )  # fmt: skip
        if command == "bench":
            refused(done, "no such task file")
            assert not (tmp_path / "out").exists()
        else:
            assert done.returncode == 0, done.stderr
            shutil.rmtree(tmp_path / "out")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").write_text("x")
    refused(g2l(*commands(cached_store, tmp_path)["distill"], "--out", tmp_path / "theirs"), "is no run of g2l distill")
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["file"]


def create(path, crop, barrier, results):
    barrier.wait()
    views = ViewSpec().to_json() | {"crop_px": crop}
    try:
        with locked(path / LOCKS / "writer", wait_s=0, holder="another g2l command writes into it"):
            FeatureStore.create(path, grid=GridSpec().to_json(), views=views)
            time.sleep(0.2)
            results.put((crop, FeatureStore.open(path).views["crop_px"]))
    except G2LError as error:
        results.put((crop, str(error)))


def test_two_processes_that_create_one_store_at_once(tmp_path):
    """Ten times: one makes it, the other is refused, and it is never a mix."""
    for i in range(10):
        barrier, results = FORK.Barrier(2), FORK.SimpleQueue()
        path = tmp_path / f"{i}.zarr"
        both = [FORK.Process(target=create, args=(path, crop, barrier, results)) for crop in (200, 224)]
        for process in both:
            process.start()
        found = dict(results.get() for _ in both)
        for process in both:
            process.join()
        made = [crop for crop, got in found.items() if got == crop]
        assert len(made) == 1, found
        assert sum("is in use: another g2l command" in str(got) for got in found.values()) == 1
        assert FeatureStore.open(path).views["crop_px"] == made[0]


def hold_and_die(folder, counter):
    try:
        with locked_output(folder):
            with counter.get_lock():
                counter.value += 1
            assert counter.value == 1
            time.sleep(0.002)
            with counter.get_lock():
                counter.value -= 1
    except RunError:
        os._exit(3)


def test_a_lock_that_its_holder_removes_is_never_held_twice(tmp_path):
    """Who made the folder removes it; a process that had opened the file before must not believe that it holds it."""
    counter = FORK.Value("i", 0)
    codes = []
    for _ in range(20):
        crowd = [FORK.Process(target=hold_and_die, args=(tmp_path / "out", counter)) for _ in range(4)]
        for process in crowd:
            process.start()
        for process in crowd:
            process.join()
        codes += [process.exitcode for process in crowd]
    assert set(codes) <= {0, 3}
    assert codes.count(0) >= 20
    assert not (tmp_path / "out").exists() or holds_only_locks(tmp_path / "out")


def hold_for_ever(folder, held):
    with locked_output(folder):
        held.set()
        time.sleep(60)


def test_a_killed_holder_frees_its_folder(tmp_path):
    held = FORK.Event()
    process = FORK.Process(target=hold_for_ever, args=(tmp_path / "out", held))
    process.start()
    held.wait()
    with pytest.raises(RunError, match="is in use"), locked_output(tmp_path / "out"):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with locked_output(tmp_path / "out"):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_disk_without_locks_is_told_once(tmp_path, monkeypatch, capsys, code):
    def flock(_file, _how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(locks, "_warned", False)
    for _ in range(2):
        with locked_output(tmp_path / "out"):
            pass
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning  the disk of {tmp_path / 'out'} has no locks (")
    assert line.endswith("let only one command at a time write there")


def test_a_lock_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="it is no folder"), locked_output(tmp_path / "file"):
        pass
    with (
        pytest.raises(StoreError, match="it is no folder"),
        locked(tmp_path / "file" / LOCKS / "writer", wait_s=0, holder="nobody"),
    ):
        pass

"""Stage one on dask workers: the same bits as in one process, whatever dies."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from g2l_core.errors import StoreError
from g2l_core.store.features import FeatureStore
from g2l_core.store.locks import LOCKS, locked
from g2l_core.store.verify import verify
from pipeline.cluster import make_groups
from tests.conftest import TEACHER
from tests.extraction.test_extract import break_tile
from tests.pipeline.test_cli import G2L, KEY, cache, refused
from tests.pipeline.test_resume import require_equal_arrays

ROOT = Path(__file__).resolve().parents[2]
VIEWS = "8"


def cache_process(source, store, *more, views=VIEWS):
    command = [*G2L, "cache-teacher", source, "--store", store, "--teacher", TEACHER, "--weights", "random:0"]
    command += ["--views", views, "--batch-size", "8", "--workers", "1", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process):
    out, told = process.communicate(timeout=180)
    assert "Traceback" not in told, told
    return subprocess.CompletedProcess(process.args, process.returncode, out, told)


@pytest.fixture(scope="module")
def reference(cohort, tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "s.zarr"
    done = cache(cohort, path, "--views", VIEWS, "--batch-size", "8", "--workers", "1")
    assert done.returncode == 0, done.stderr
    return path


class Cluster:
    """A real scheduler and real worker processes on loopback. Its workers end with it."""

    def __init__(self, folder, **settings):
        self.folder, self.processes = folder, []
        self.settings = {f"DASK_DISTRIBUTED__{name.upper()}": value for name, value in settings.items()}
        file = folder / "scheduler.json"
        self.scheduler = self._start("scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file))
        while not (file.exists() and (text := file.read_text())):
            assert self.scheduler.poll() is None
            time.sleep(0.05)
        self.address = json.loads(text)["address"]

    def _start(self, program, *arguments):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **self.settings}
        quiet = {"env": environment, "cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        command = [sys.executable, "-m", f"distributed.cli.dask_{program}", *arguments, "--no-dashboard"]
        self.processes.append(subprocess.Popen(command, **quiet))
        return self.processes[-1]

    def add_workers(self, n, *more):
        """Start workers with one thread each, and wait until they are there."""
        from distributed import Client

        options = ["--nthreads", "1", "--local-directory", str(self.folder), *more]
        with Client(self.address, timeout=30) as client:
            added = [self._start("worker", self.address, *options) for _ in range(n)]
            client.wait_for_workers(len(client.nthreads()) + n, timeout=60)
        return added

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in reversed(self.processes):
            process.terminate()  # a nanny ends its worker, which a kill would leave behind
        for process in self.processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """One scheduler with two workers for all tests that leave them alive."""
    with Cluster(tmp_path_factory.mktemp("cluster")) as made:
        made.add_workers(2, "--no-nanny")
        yield made


def require_equal_stores(found, wanted):
    require_equal_arrays(found, wanted)
    assert list(verify(FeatureStore.open(found))) == []


@pytest.mark.slow
def test_local_workers_give_the_same_bits(cohort, reference, tmp_path):
    done = cache(cohort, tmp_path / "s.zarr", "--views", VIEWS, "--batch-size", "8", "--local-workers", "2")
    assert done.returncode == 0, done.stderr
    require_equal_stores(tmp_path / "s.zarr", reference)
    assert "encoder" in done.stderr
    again = cache(cohort, tmp_path / "s.zarr", "--views", VIEWS, "--local-workers", "2")
    assert "all of them were stored already" in again.stdout


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_of_a_slide_costs_nothing_but_time(cohort, reference, cluster, tmp_path):
    store = tmp_path / "s.zarr"
    (third,) = cluster.add_workers(1, "--no-nanny")
    running = cache_process(cohort, store, "--scheduler", cluster.address)
    while not list(store.glob(f"slides/*/features/{KEY}/zarr.json")):
        assert running.poll() is None
        time.sleep(0.02)
    time.sleep(0.3)
    third.send_signal(signal.SIGKILL)
    assert running.poll() is None  # it was not over yet
    done = ended(running)
    assert done.returncode == 0, done.stderr
    require_equal_stores(store, reference)


@pytest.mark.slow
def test_what_a_worker_loses_is_named(cohort, cluster, tmp_path):
    folder, store = tmp_path / "slides", tmp_path / "s.zarr"
    folder.mkdir()
    for name in ("p01-1", "p02-1"):
        shutil.copy(cohort.parent / f"slides/{name}.tiff", folder)
    break_tile(folder / "p01-1.tiff", 1, 2)
    done = cache(folder, store, "--views", "0", "--tissue", "none", "--scheduler", cluster.address)
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("failed")]
    assert "p01-1: 1 patches: row" in line
    assert FeatureStore.open(store).slide("p02-1").features(KEY).shape[1] == 1024


def test_there_is_no_scheduler(cohort, tmp_path):
    begin = time.monotonic()
    done = cache(cohort, tmp_path / "s.zarr", "--scheduler", "tcp://127.0.0.1:1", "--views", "0")
    refused(done, "--scheduler tcp://127.0.0.1:1", "no dask scheduler answers")
    assert time.monotonic() - begin < 60
    done = cache(cohort, tmp_path / "s.zarr", "--scheduler", "tcp://h:1", "--local-workers", "2")
    refused(done, "give one of them")


# -- groups -----------------------------------------------------------------------------------------------


@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=5), st.integers(0, 500)), st.integers(1, 30), st.integers(1, 99)
)
def test_groups_hold_every_slide_with_work_once(missing, count, least):
    groups = make_groups(missing, count, least)
    assert sorted(slide for group in groups for slide in group) == sorted(s for s, n in missing.items() if n)
    target = max(least, sum(missing.values()) / count)
    assert all(sum(missing[slide] for slide in group) >= target for group in groups[:-1])
    assert all(sum(missing[slide] for slide in group[:-1]) < target for group in groups)
    largest = [missing[group[0]] for group in groups]
    assert largest == sorted(largest, reverse=True)


# -- locks ------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from g2l_core.store.locks import locked
with locked(Path(sys.argv[1]), wait_s=0, holder="nobody"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_held_by_one_and_freed_by_death(tmp_path):
    path = tmp_path / "s.zarr" / LOCKS / "writer"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(StoreError, match=r"s\.zarr is in use: somebody"), locked(path, wait_s=0, holder="somebody"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with locked(path, wait_s=5, holder="somebody"):
        pass


def test_two_commands_do_not_write_into_one_store(cohort, tmp_path):
    store = tmp_path / "s.zarr"
    assert cache(cohort, store, "--max-patches", "1", "--views", "0").returncode == 0
    with locked(store / LOCKS / "writer", wait_s=0, holder="the first"):
        refused(cache(cohort, store, "--max-patches", "1", "--views", "1"), "another g2l command")
    assert np.array_equal(FeatureStore.open(store).slide("p01-1").n_views, 1)

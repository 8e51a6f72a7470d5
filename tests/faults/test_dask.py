"""Workers, schedulers and callers that die or hang: each costs its slides at most, and the same command goes on."""

import json
import os
import shutil
import signal
import time
from functools import partial
from threading import Thread

import dask
import distributed
import numpy as np
import pytest

import pipeline.cluster
from g2l_core.store.features import FeatureStore
from g2l_core.store.verify import verify
from tests.pipeline.test_cli import KEY, cache, refused
from tests.pipeline.test_cluster import Cluster, cache_process, ended

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def mortal(tmp_path_factory):
    """One death of a group is enough; a worker that is silent for 12 s counts as dead."""
    settings = {"scheduler__allowed_failures": "0", "scheduler__worker_ttl": "12s"}
    with Cluster(tmp_path_factory.mktemp("mortal"), **settings) as made:
        made.add_workers(1, "--nanny", "--preload", "tests.faults.poison")
        yield made


@pytest.fixture
def slides(cohort, tmp_path):
    folder = tmp_path / "slides"
    folder.mkdir()
    for name in ("p01-1", "p02-1", "p03-1"):
        shutil.copy(cohort.parent / f"slides/{name}.tiff", folder)
    return folder


def on(cluster, slides, store, *more, views="1"):
    return cache(slides, store, "--views", views, "--scheduler", cluster.address, *more)


def begun(store):
    """Whether some slide has features that are under way."""
    return bool(list(store.glob(f"slides/*/features/{KEY}/zarr.json")))


def until(reached, running=None):
    while not reached():
        assert running is None or running.poll() is None, running.communicate()
        time.sleep(0.02)


def require_complete(store, slides):
    opened = FeatureStore.open(store)
    assert [slide.slide_id for slide in opened.slides()] == sorted(path.stem for path in slides.iterdir())
    assert all(np.isfinite(slide.features(KEY)).all() for slide in opened.slides())
    assert [problem for problem in verify(opened) if problem.kind not in {"missing", "leftover"}] == []


def test_a_slide_that_kills_its_worker_is_lost_alone(mortal, slides, tmp_path):
    store = tmp_path / "s.zarr"
    (slides / "p02-1.tiff").rename(slides / "poison.tiff")
    done = on(mortal, slides, store, "--json")
    refused(done, "poison", "workers died of it", code=1)
    opened, summary = FeatureStore.open(store), json.loads(done.stdout)
    sizes = {slide.slide_id: len(slide) for slide in opened.slides()}
    assert summary["encoded"] == sizes["p01-1"] + sizes["p03-1"] == opened.facts.runs[-1].patches
    assert summary["patches"] == sum(sizes.values())
    for name in ("p01-1", "p03-1"):
        assert opened.slide(name).features(KEY, view=1).shape == (sizes[name], 1024)


@pytest.fixture
def small_workers(monkeypatch):
    """Workers of this machine with 1.2 GB each, which one death of a group is enough for."""
    monkeypatch.setattr(pipeline.cluster, "DEATHS", 1)
    monkeypatch.setattr(distributed, "LocalCluster", partial(distributed.LocalCluster, memory_limit="1.2GB"))
    with dask.config.set({"distributed.worker.preload": ["tests.faults.poison"]}):
        yield


@pytest.mark.parametrize("name", ["killed", "hungry"])
def test_a_slide_that_takes_all_memory_is_lost_alone(small_workers, slides, tmp_path, name):
    """Whether the system ends the worker or its nanny does."""
    store = tmp_path / "s.zarr"
    (slides / "p02-1.tiff").rename(slides / f"{name}.tiff")
    done = cache(slides, store, "--views", "1", "--local-workers", "1")
    refused(done, f"failed  {name}: workers died of it, for want of memory perhaps", "with more memory each", code=1)
    opened = FeatureStore.open(store)
    for neighbor in ("p01-1", "p03-1"):
        assert np.isfinite(opened.slide(neighbor).features(KEY, view=1)).all()
    again = cache(slides, store, "--views", "1")
    assert again.returncode == 0, again.stderr
    require_complete(store, slides)


def test_a_worker_that_pauses_for_memory_goes_on(small_workers, slides, tmp_path):
    store = tmp_path / "s.zarr"
    (slides / "p02-1.tiff").rename(slides / "heavy.tiff")
    done = cache(slides, store, "--views", "1", "--local-workers", "1")
    assert done.returncode == 0, done.stderr
    require_complete(store, slides)


def test_workers_that_pause_for_ever_end_the_run(small_workers, slides, tmp_path, monkeypatch):
    """One that holds memory after its slides were encoded takes no others."""
    monkeypatch.setattr(pipeline.cluster, "NO_WORKER_S", 1.0)
    monkeypatch.setattr(pipeline.cluster, "make_groups", lambda missing, *_: [[slide_id] for slide_id in missing])
    store = tmp_path / "s.zarr"
    (slides / "p01-1.tiff").rename(slides / "heavy.tiff")
    done = cache(slides, store, "--views", "1", "--local-workers", "1")
    refused(done, "has had no worker for 1 s", "pause for want of memory", "run the same command again")
    again = cache(slides, store, "--views", "1")
    assert again.returncode == 0, again.stderr
    require_complete(store, slides)


def test_a_worker_that_is_killed_under_its_nanny_costs_nothing(mortal, slides, tmp_path):
    """As the system does it where another process takes the memory: no slide is to blame."""
    store = tmp_path / "s.zarr"
    with distributed.Client(mortal.address, timeout=30) as client:
        (pid,) = client.run(os.getpid).values()
    running = cache_process(slides, store, "--scheduler", mortal.address, views="8")
    until(lambda: begun(store), running)
    os.kill(pid, signal.SIGKILL)
    done = ended(running)
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stderr
    require_complete(store, slides)


def test_a_caller_that_dies_is_followed_by_another(mortal, slides, tmp_path):
    """Its worker stops at the next block, for nobody wants what it does."""
    store = tmp_path / "s.zarr"
    running = cache_process(slides, store, "--scheduler", mortal.address, views="40")
    until(lambda: begun(store), running)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    begin = time.monotonic()
    done = on(mortal, slides, store, "--batch-size", "8")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begin < 60
    require_complete(store, slides)


def test_a_worker_that_hangs_costs_its_slides(mortal, slides, tmp_path):
    store = tmp_path / "s.zarr"
    (hanging,) = mortal.add_workers(1, "--no-nanny")
    running = cache_process(slides, store, "--scheduler", mortal.address, "--slide-timeout", "2", views="8")
    until(lambda: begun(store), running)
    hanging.send_signal(signal.SIGSTOP)
    done = ended(running)
    lost = [line for line in done.stderr.splitlines() if line.startswith("failed")]
    assert done.returncode == (1 if lost else 0), done.stderr
    assert all("a lost worker still writes slide" in line or "workers died of it" in line for line in lost)
    assert len(lost) < 3, done.stderr
    hanging.kill()
    again = cache(slides, store, "--views", "8", "--batch-size", "8")
    assert again.returncode == 0, again.stderr
    require_complete(store, slides)


def test_without_workers_and_without_a_scheduler_the_run_ends(slides, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.cluster, "NO_WORKER_S", 1.0)
    store, other = tmp_path / "s.zarr", tmp_path / "t.zarr"
    with Cluster(tmp_path) as cluster:
        (worker,) = cluster.add_workers(1, "--no-nanny")
        Thread(target=lambda: (until(lambda: begun(store)), worker.kill())).start()
        done = on(cluster, slides, store, views="8")
        refused(done, f"the dask scheduler {cluster.address} has had no worker for 1 s", "run the same command again")

        cluster.add_workers(1, "--no-nanny")
        running = cache_process(slides, other, "--scheduler", cluster.address, views="40")
        until(lambda: begun(other), running)
        cluster.scheduler.kill()
        done = ended(running)
        refused(done, f"the dask scheduler {cluster.address} is gone", "run the same command again")
    for path, views in ((store, "8"), (other, "1")):
        done = cache(slides, path, "--views", views, "--batch-size", "8")
        assert done.returncode == 0, done.stderr
        require_complete(path, slides)

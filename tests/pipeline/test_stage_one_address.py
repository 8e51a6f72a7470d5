"""Stage one, labels and imports at an address give what they give in a folder."""

import json
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from g2l_core.errors import StoreMissingError
from g2l_core.store import remote
from g2l_core.store.address_lock import LOCK
from g2l_core.store.features import FeatureStore
from g2l_core.store.location import locate
from g2l_core.store.verify import verify
from pipeline import spool
from pipeline.cli.main import app
from tests.conftest import TEACHER
from tests.faults.killed_process import start_g2l

pytest.importorskip("obstore", reason="needs obstore (extra remote)")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(spool, "LOOK_EVERY_S", 0.05)


def told(*words):
    """What a command prints as JSON."""
    done = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_commands_write_to_an_address_what_they_write_into_a_folder(
    cohort, cached_store, bucket, tmp_path, monkeypatch
):
    address, here = f"{bucket}/x.zarr", ["--spool", tmp_path / "spool"]
    caching = ["cache-teacher", cohort, "--store", address, *here, "--teacher", TEACHER, "--weights", "random:0"]
    planned = CliRunner().invoke(app, [*map(str, caching), "--dry-run"])
    assert f"store: {address}, through the spool {tmp_path}/spool/x.zarr" in planned.stderr
    assert not (tmp_path / "spool").exists()

    done = told(*caching, "--batch-size", 16)
    assert (done["store"], done["encoded"], done["failed_slides"]) == (address, done["patches"], {})
    there, folder = FeatureStore.open(address), FeatureStore.open(cached_store)
    (key,) = there.encoders
    assert there.slide_ids() == folder.slide_ids()
    for slide, other in zip(there.slides(), folder.slides(), strict=True):
        assert slide.facts == other.facts
        for view in range(3):
            np.testing.assert_array_equal(slide.features(key, view=view), other.features(key, view=view))
    assert not list(verify(there))

    assert told(*caching, "--retry-failed")["encoded"] == 0
    shutil.rmtree(tmp_path / "spool")  # as on another machine
    assert told(*caching)["encoded"] == 0
    embedding = ["embed", cohort, "--store", address, *here, "--encoder", TEACHER, "--weights", "random:1"]
    assert told(*embedding)["encoded"] == done["patches"]
    labels = tmp_path / "labels.csv"
    labels.write_text("slide_id,grade\n" + "".join(f"{slide_id},3\n" for slide_id in there.slide_ids()))
    assert told("store", "label", address, labels, *here, "--dry-run")["store"] == address
    assert "grade" not in next(FeatureStore.open(address).slides()).labels
    told("store", "label", address, labels, *here)
    there = FeatureStore.open(address)
    assert len(there.encoders) == 2
    assert {slide.labels["grade"] for slide in there.slides()} == {"3"}
    assert not list(verify(there))


def test_killed_it_leaves_whole_slides_and_goes_on(cohort, cached_store, bucket, tmp_path):
    address = f"{bucket}/k.zarr"
    words = ["cache-teacher", cohort, "--store", address, "--spool", tmp_path / "spool", "--teacher", TEACHER]
    words = [*map(str, words), "--weights", "random:0", "--batch-size", "16"]
    connection = locate(address).connection
    for objects in (1, 8, 25):  # the lock alone, the first slides
        process = start_g2l(words, {name: value for name, value in os.environ.items() if name.startswith("AWS_")})
        while process.exitcode is None and len(connection.listed().objects) < objects:
            time.sleep(0.01)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        with suppress(StoreMissingError):
            assert not list(verify(FeatureStore.open(address)))
    kept = len(FeatureStore.open(address).slide_ids())
    assert told(*words)["encoded"] < sum(map(len, FeatureStore.open(address).slides()))
    there, folder = FeatureStore.open(address), FeatureStore.open(cached_store)
    assert kept < len(there.slide_ids()) == len(folder.slide_ids())
    (key,) = there.encoders
    for slide, other in zip(there.slides(), folder.slides(), strict=True):
        for view in range(3):
            np.testing.assert_array_equal(slide.features(key, view=view), other.features(key, view=view))
    assert not list(verify(there))
    assert LOCK not in connection.listed().objects


def test_features_are_imported_at_an_address(cached_store, bucket, tmp_path):
    out, here = tmp_path / "h5", ["--spool", tmp_path / "spool"]
    told("store", "export", cached_store, "--out", out)
    given = ["store", "import", "trident-h5", out, "--store", f"{bucket}/i.zarr", "--encoder", "mine", *here]
    assert told(*given, "--dry-run")["slides"] == 6
    assert not (tmp_path / "spool").exists()
    done = told(*given)
    assert done["store"] == f"{bucket}/i.zarr"
    there = FeatureStore.open(f"{bucket}/i.zarr")
    assert there.encoders[done["encoder"]].imported == "trident-h5"
    assert len(list(there.slides())) == 6
    assert not list(verify(there))
    assert Path("s3:").exists() is False

"""A hub that is down, a model that is gated, a file that is not there: known before any slide is opened."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from g2l_core.encoders.loading import build_network
from g2l_core.encoders.resolve import resolve_encoder
from g2l_core.encoders.weights import require_weights
from g2l_core.errors import EncoderError
from tests.conftest import TEACHER
from tests.encoders.test_weights import closed_port, hub, settings_of_a_hub  # noqa: F401  a fixture

CACHE = """
import json, sys
from tests.pipeline.test_cli import g2l
for arguments in json.loads(sys.argv[1]):
    done = g2l("cache-teacher", *arguments)
    print(json.dumps([done.returncode, done.stdout, done.stderr]))
"""


@pytest.fixture
def slides(cohort, tmp_path):
    (tmp_path / "slides").mkdir()
    shutil.copy(cohort.parent / "slides/p01-1.tiff", tmp_path / "slides")
    return tmp_path / "slides"


def cache(slides, store, environment, *weights, views=0):
    """Exit code, stdout and stderr of a call for each weights, in a process whose hub client has these settings."""
    options = ["--store", store, "--teacher", TEACHER, "--views", views, "--max-patches", 1, "--weights"]
    calls = [[*map(str, [slides, *options]), source] for source in weights]
    done = subprocess.run(
        [sys.executable, "-c", CACHE, json.dumps(calls)], env=environment, cwd=Path(__file__).parents[2],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_hub_that_is_down_is_known_at_once(slides, tmp_path):
    environment = settings_of_a_hub(tmp_path / "home", closed_port())
    ((code, _, told),) = cache(slides, tmp_path / "s.zarr", environment, "hub:lab/open")
    assert code == 2
    assert told.startswith("error: timm:mobilenetv3_small_050@64: the hub cannot be reached and lab/open is not in")
    assert told.count("\n") == 1  # no audit, and none of the client's lines about its retries
    assert not (tmp_path / "s.zarr").exists()


def test_access_is_asked_for_before_the_slides_are_opened(hub, slides, tmp_path):  # noqa: F811
    store = tmp_path / "s.zarr"
    network = build_network(resolve_encoder(TEACHER, weights="random:0"))
    hub.files["/lab/locked/resolve/main/model.safetensors"] = save(network.state_dict())
    hub.files["/lab/open/resolve/main/model.safetensors"] = b"no weights"
    hub.token = "hf_of_the_test"
    closed = settings_of_a_hub(tmp_path / "home", hub.url)

    locked, absent, broken = cache(slides, store, closed, "hub:lab/locked", "hub:lab/open#w.bin", "hub:lab/open")
    assert (locked[0], absent[0], broken[0]) == (2, 2, 2)
    assert f"access to lab/locked is gated. Accept its license at {hub.url}/lab/locked, then set HF_TOKEN" in locked[2]
    assert "lab/open has no w.bin" in absent[2]
    assert locked[2].count("\n") == absent[2].count("\n") == 1
    assert hub.asked[:2] == ["HEAD /lab/locked/resolve/main/model.safetensors", "HEAD /lab/open/resolve/main/w.bin"]
    assert "is no weights file" in broken[2]  # which only loading can tell
    assert not store.exists()

    hub.asked.clear()
    ((code, _, told),) = cache(slides, store, {**closed, "HF_TOKEN": hub.token}, "hub:lab/locked")
    assert code == 0, told
    assert [asked.partition(" ")[0] for asked in hub.asked] == ["HEAD", "HEAD", "GET", "HEAD"]  # the last for its etag
    hub.asked.clear()
    ((code, _, told),) = cache(slides, store, {**closed, "HF_HUB_OFFLINE": "1"}, "hub:lab/locked", views=1)
    assert code == 0, told  # what is in the hub's cache needs no hub
    assert hub.asked == []


def test_weights_on_disk_are_looked_for(tmp_path):
    spec = resolve_encoder(TEACHER, weights="random:0")
    require_weights(spec)
    with pytest.raises(EncoderError, match=r"there is no weights file .*run/student/model\.safetensors"):
        require_weights(replace(spec, weights=f"run:{tmp_path / 'run/student'}"))
    torch.save(build_network(spec).state_dict(), tmp_path / "w.pth")
    require_weights(replace(spec, weights=f"file:{tmp_path / 'w.pth'}"))

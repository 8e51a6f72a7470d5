"""Weights from a model hub: a stand-in on a loopback address, the real client of it in processes of its own.

The hub's client reads its settings when it is imported, so each case of settings is one process.
"""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from g2l_core.encoders.loading import build_network, encode_all, load_encoder
from g2l_core.encoders.resolve import TABLE, EncoderSpec, spec_to_json
from g2l_core.encoders.weight_files import FILE_NAMES
from tests.encoders.test_weight_layouts import ARCHITECTURES, SMALL, in_dinov2_names, network_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"

SPEC = EncoderSpec(
    name="hubbed",
    architecture="vit_small_patch14_reg4_dinov2",
    arguments={"img_size": 56, "depth": 1, "embed_dim": 48, "num_heads": 3},
    weights="random:3",
    input_px=56,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    gated=True,
)

LOAD = """
import json, sys, time
time.sleep = lambda _: None  # the client waits half a minute in all before it gives up
from g2l_core.encoders.loading import load_encoder
from g2l_core.encoders.spec import spec_from_json
from g2l_core.errors import EncoderError
for spec in map(spec_from_json, json.loads(sys.argv[1])):
    try:
        outcome = load_encoder(spec, device="cpu").weights_digest
    except EncoderError as error:
        outcome = str(error)
    print(json.dumps(outcome))
"""


@dataclass
class Hub:
    """What the stand-in serves, and what it was asked."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    """Content by /REPOSITORY/resolve/REVISION/FILE."""
    cut: set[str] = field(default_factory=set)
    """Addresses whose content breaks off half-way."""
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Status and X-Error-Code by the beginning of the address."""
    token: str = ""
    """What opens /lab/locked/."""
    asked: list[str] = field(default_factory=list)

    def answer(self, path: str) -> tuple[int, str, bytes]:
        for beginning, (status, code) in self.refused.items():
            if path.startswith(beginning):
                return status, code, b""
        if path in self.files:
            return 200, "", self.files[path]
        _, lab, name, _, revision, _ = path.split("/")
        if any(file.startswith(f"/{lab}/{name}/resolve/{revision}/") for file in self.files):
            return 404, "EntryNotFound", b""
        known = any(file.startswith(f"/{lab}/{name}/") for file in self.files)
        return 404, "RevisionNotFound" if known else "RepoNotFound", b""


@pytest.fixture
def hub() -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def respond(self) -> None:
            state.asked.append(f"{self.command} {self.path}")
            status, code, content = state.answer(self.path)
            if self.path.startswith("/lab/locked/") and self.headers["Authorization"] != f"Bearer {state.token}":
                status, code, content = 401, "GatedRepo", b""
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{sha256(content).hexdigest()}"')
            if code:
                self.send_header("X-Error-Code", code)
                self.send_header("X-Error-Message", "refused by the stand-in")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content[: len(content) // 2] if self.path in state.cut else content)

        do_GET = do_HEAD = respond  # noqa: N815  the names that http.server looks for

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def closed_port() -> str:
    """The address of a loopback port on which nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{held.getsockname()[1]}"


def settings_of_a_hub(home: Path, endpoint: str, **settings: str) -> dict[str, str]:
    """The environment of a process whose hub client knows only this hub."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    return {
        **kept, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", **settings,
    }  # fmt: skip


def load(home: Path, endpoint: str, *weights: str, code: str = LOAD, **settings: str) -> list[str | None]:
    """What the code says of each spec: its weights digest, or the error. A process has these settings of the client."""
    specs = [spec_to_json(replace(SPEC, weights=source)) for source in weights]
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(specs)],
        env=settings_of_a_hub(home, endpoint, **settings), cwd=Path(__file__).parents[2],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")  # none of the client's lines about its retries
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_weights_from_a_hub(hub, tmp_path):
    """Downloaded once, then found without the hub; every refusal is one clear line."""
    network = build_network(SPEC)
    digest = load_encoder(SPEC).weights_digest
    hub.files["/lab/open/resolve/main/model.safetensors"] = save(network.state_dict())
    torch.save(build_network(replace(SPEC, weights="random:4")).state_dict(), tmp_path / "w.bin")
    hub.files["/lab/open/resolve/v2/pytorch_model.bin"] = (tmp_path / "w.bin").read_bytes()
    hub.files["/lab/other/resolve/main/readme.md"] = b"no weights"
    hub.refused["/lab/gated/"] = (403, "GatedRepo")
    hub.refused["/lab/login/"] = (401, "GatedRepo")
    hub.refused["/lab/broken/"] = (500, "")

    hub.files["/lab/cut/resolve/main/model.safetensors"] = bytes(5000)
    hub.cut.add("/lab/cut/resolve/main/model.safetensors")

    second = load_encoder(replace(SPEC, weights="random:4")).weights_digest
    sources = ["open", "open@v2", "gated", "login", "other", "absent", "open@v9", "broken", "cut"]
    outcomes = load(tmp_path / "home", hub.url, *(f"hub:lab/{name}" for name in sources))
    assert outcomes[:2] == [digest, second]
    assert digest != second
    gated = "access to lab/{0} is gated. Accept its license at " + hub.url + "/lab/{0}, then set HF_TOKEN"
    assert outcomes[2].startswith("hubbed: " + gated.format("gated"))
    assert outcomes[3].startswith("hubbed: " + gated.format("login"))
    assert outcomes[4] == f"hubbed: lab/other has neither {' nor '.join(FILE_NAMES)}"
    assert outcomes[5].startswith("hubbed: the hub has no lab/absent, or it is private")
    assert outcomes[6].startswith("hubbed: the hub's lab/open has no revision 'v9'")
    assert outcomes[7].startswith("hubbed: the hub cannot be reached and lab/broken is not in the cache")
    assert outcomes[8].startswith("hubbed: cannot download lab/cut: ")
    assert all("\n" not in outcome for outcome in outcomes)
    assert all(asked.split("/")[1:3] in [["lab", name.split("@")[0]] for name in sources] for asked in hub.asked)
    assert sum(asked.startswith("GET /lab/open/") for asked in hub.asked) == 2

    hub.asked.clear()
    cached, uncached = load(tmp_path / "home", hub.url, "hub:lab/open", "hub:lab/never", HF_HUB_OFFLINE="1")
    assert cached == digest
    assert uncached.startswith("hubbed: the hub cannot be reached and lab/never is not in the cache. Connect once")
    assert uncached.endswith("or give --weights FILE")
    assert hub.asked == []


def test_openmidnight_s_file_from_a_hub(hub, tmp_path):
    """The table's address, file, layout and registers, in a network that a test can hold.

    The checkpoint's names are those of the original DINOv2, and the features are the class token's.
    """
    network = network_of("swiglu")
    torch.save(in_dinov2_names(network.state_dict(), "", 0), tmp_path / "small.pt")
    hub.files["/SophontAI/OpenMidnight/resolve/main/teacher_checkpoint_load.pt"] = (tmp_path / "small.pt").read_bytes()
    small = replace(TABLE["openmidnight"], architecture=ARCHITECTURES["swiglu"], arguments=SMALL, input_px=56, dim=48)
    local = replace(small, weights=f"file:{tmp_path / 'small.pt'}")
    specs = json.dumps([spec_to_json(small)])
    done = subprocess.run(
        [sys.executable, "-c", LOAD, specs], env=settings_of_a_hub(tmp_path / "home", hub.url),
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    loaded = load_encoder(local)
    assert json.loads(done.stdout) == loaded.weights_digest
    pixels = np.random.default_rng(0).integers(0, 256, (2, 56, 56, 3), np.uint8)
    normalized = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - torch.tensor(small.mean).view(1, 3, 1, 1)) / (
        torch.tensor(small.std).view(1, 3, 1, 1)
    )
    with torch.inference_mode():
        expected = network.forward_features(normalized)[:, 0].numpy()
    np.testing.assert_allclose(encode_all(loaded, pixels, 2), expected, rtol=2e-3, atol=2e-3)


def serve_shards(hub, repository, folder=""):
    """A network in two shards with an index; returns its digest and the names of the shards."""
    state = build_network(SPEC).state_dict()
    shards = [f"model-{i}-of-2.safetensors" for i in (1, 2)]
    names = {key: shards[i % 2] for i, key in enumerate(state)}
    base = f"/lab/{repository}/resolve/main/{folder}"
    for shard in shards:
        hub.files[base + shard] = save({key: state[key] for key in state if names[key] == shard})
    hub.files[f"{base}model.safetensors.index.json"] = json.dumps({"weight_map": names}).encode()
    return load_encoder(SPEC).weights_digest, shards


def test_shards_from_a_hub(hub, tmp_path):
    """Each file is downloaded once; then neither the hub nor a look for the names that it lacks is needed."""
    digest, shards = serve_shards(hub, "shards")
    serve_shards(hub, "deep", "weights/")
    serve_shards(hub, "lacking")
    del hub.files[f"/lab/lacking/resolve/main/{shards[1]}"]
    sources = ["hub:lab/shards", "hub:lab/deep#weights/model.safetensors.index.json"]
    *found, lacking = load(tmp_path / "home", hub.url, *sources, "hub:lab/lacking")
    assert found == [digest, digest]
    assert lacking == f"hubbed: lab/lacking has no {shards[1]}"
    got = [asked.removeprefix("GET ") for asked in hub.asked if asked.startswith("GET ")]
    assert sorted(got) == sorted(hub.files)
    assert load(tmp_path / "home", closed_port(), *sources) == [digest, digest]
    hub.asked.clear()
    assert load(tmp_path / "home", hub.url, *sources, HF_HUB_OFFLINE="1") == [digest, digest]
    assert hub.asked == []


REQUIRE = LOAD.replace("encoders.loading import load_encoder", "encoders.weights import require_weights").replace(
    'load_encoder(spec, device="cpu").weights_digest', "require_weights(spec)"
)


def test_shards_that_are_not_all_in_the_cache_need_the_hub(hub, tmp_path):
    _, shards = serve_shards(hub, "shards")
    load(tmp_path / "home", hub.url, "hub:lab/shards")
    assert load(tmp_path / "home", hub.url, "hub:lab/shards", code=REQUIRE, HF_HUB_OFFLINE="1") == [None]
    (shard,) = (tmp_path / "home").rglob(shards[1])
    shard.unlink()
    for code in (REQUIRE, LOAD):
        (outcome,) = load(tmp_path / "home", hub.url, "hub:lab/shards", code=code, HF_HUB_OFFLINE="1")
        assert outcome.startswith("hubbed: the hub cannot be reached and lab/shards is not in the cache")
    assert load(tmp_path / "home", hub.url, "hub:lab/shards", code=REQUIRE) == [None]


def test_a_hub_that_is_down(tmp_path):
    (outcome,) = load(tmp_path / "home", closed_port(), "hub:lab/open")
    assert outcome.startswith("hubbed: the hub cannot be reached and lab/open is not in the cache")
    assert "--weights FILE" in outcome


def test_a_token_opens_what_is_gated_and_a_file_can_be_named(hub, tmp_path):
    hub.token = "hf_of_the_test"
    torch.save(build_network(SPEC).state_dict(), tmp_path / "w.pth")
    hub.files["/lab/locked/resolve/v1/weights.pth"] = (tmp_path / "w.pth").read_bytes()
    (closed,) = load(tmp_path / "home", hub.url, "hub:lab/locked@v1#weights.pth")
    assert closed.startswith("hubbed: access to lab/locked is gated")
    (other,) = load(tmp_path / "home", hub.url, "hub:lab/locked@v1#weights.pth", HF_TOKEN="hf_of_another")
    assert "the account of your token (HF_TOKEN or `hf auth login`) has none" in other
    assert f"Accept its license at {hub.url}/lab/locked with that account" in other
    opened, absent = load(
        tmp_path / "home", hub.url, "hub:lab/locked@v1#weights.pth", "hub:lab/locked@v1#other.pth", HF_TOKEN=hub.token
    )
    assert opened == load_encoder(SPEC).weights_digest
    assert absent == "hubbed: lab/locked has no other.pth"

"""A student for others: whole, checked, without places, and sent only where that is asked for."""

import base64
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch

from g2l_core.encoders.loading import encode, load_encoder
from g2l_core.encoders.resolve import read_student_record, resolve_encoder
from g2l_core.errors import EncoderError, StoreError, UsageError
from pipeline.publish import publish_student
from tests.small_student import TINY_VIT, make_run


class Hub:
    """The part of the model hub that takes a folder: what it was sent, and what it answers in its place."""

    def __init__(self) -> None:
        self.files, self.made, self.tokens, self.status = {}, [], set(), 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                outer.answer(self, {})

            def do_POST(self):
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length) if length else self.chunks()
                outer.answer(self, outer.take(self.path, body))

            def chunks(self):
                content = b""
                while size := int(self.rfile.readline() or b"0", 16):
                    content += self.rfile.read(size)
                    self.rfile.readline()
                return content

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request, content):
        self.tokens.add(request.headers.get("Authorization"))
        data = json.dumps(content if not self.status else {"error": "no"}).encode()
        request.send_response(self.status or 200)
        request.send_header("Content-Length", str(len(data)))
        request.send_header("Content-Type", "application/json")
        request.end_headers()
        request.wfile.write(data)

    def take(self, path, body):
        if path == "/api/repos/create":
            asked = json.loads(body)
            self.made.append(asked)
            return {"url": f"{self.url}/{asked.get('organization', 'ann')}/{asked['name']}", "name": asked["name"]}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        if "/commit/" in path:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return {
                "commitUrl": f"{self.url}/ann/student/commit/1",
                "commitOid": "1",
                "success": True,
                "hookOutput": "",
            }
        return {}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("publish")
    (folder / "tiny.toml").write_text(TINY_VIT.replace("[arguments]", 'license = "MIT"\n[arguments]'))
    return make_run(folder / "run", resolve_encoder(str(folder / "tiny.toml")))


@pytest.fixture
def hub():
    made = Hub()
    yield made
    made.server.shutdown()
    made.server.server_close()


def g2l(hub, home, *arguments):
    """The command in a process of its own: the hub's address is read when its client is imported."""
    of_hub = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))} | of_hub
    environment |= {"HF_TOKEN": "hf_secret"}
    command = [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment)


def test_the_folder_is_the_student_and_its_sums_are_right(run, tmp_path):
    done = publish_student(run, tmp_path / "hub")
    names = {path.name for path in (tmp_path / "hub").iterdir()}
    assert names == set(done.files) == {"README.md", "config.json", "encoder.json", "model.safetensors", "SHA256SUMS"}
    for line in (tmp_path / "hub/SHA256SUMS").read_text().splitlines():
        expected, name = line.split("  ")
        assert hashlib.sha256((tmp_path / "hub" / name).read_bytes()).hexdigest() == expected
    assert "## Terms" in (tmp_path / "hub/README.md").read_text()
    read_student_record(tmp_path / "hub/encoder.json")
    moved = tmp_path / "other"
    moved.mkdir()
    shutil.copy(run / "run.json", moved)
    shutil.copytree(tmp_path / "hub", moved / "student")
    pixels = torch.randint(0, 256, (2, 56, 56, 3), dtype=torch.uint8).numpy()
    first, second = (encode(load_encoder(resolve_encoder(str(folder))), pixels) for folder in (run, moved))
    assert (first == second).all()


def test_folders_of_this_machine_are_left_out(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    card = copy / "student/README.md"
    card.write_text(
        card.read_text() + "\npatches of /home/ann/secret/s.zarr, see https://example.org/a/b and 3 slides/h\n"
    )
    publish_student(copy, tmp_path / "hub")
    text = (tmp_path / "hub/README.md").read_text() + (tmp_path / "hub/encoder.json").read_text()
    assert "patches of s.zarr, see https://example.org/a/b and 3 slides/h" in text
    assert str(run.parent) not in text


def test_a_dry_run_writes_nothing_and_a_taken_place_is_refused(run, tmp_path):
    assert publish_student(run, tmp_path / "hub", dry_run=True).bytes > 0
    assert not list(tmp_path.iterdir())
    (tmp_path / "hub").mkdir()
    with pytest.raises(StoreError, match="is there already"):
        publish_student(run, tmp_path / "hub")


def test_what_is_no_whole_student_is_refused(run, tmp_path):
    with pytest.raises(UsageError, match="OWNER/NAME"):
        publish_student(run, tmp_path / "hub", repository="name")
    other = make_run(tmp_path / "other", resolve_encoder("timm:mobilenetv3_small_050@64", weights="random:3"))
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.copy(other / "student/model.safetensors", copy / "student/model.safetensors")
    with pytest.raises(EncoderError, match="has other weights than encoder.json records"):
        publish_student(copy, tmp_path / "hub")
    (copy / "student/model.safetensors").write_bytes(b"broken")
    with pytest.raises(EncoderError, match="cannot be read"):
        publish_student(copy, tmp_path / "hub")
    unknown = make_run(tmp_path / "unknown", resolve_encoder("timm:mobilenetv3_small_050@64", weights="random:3"))
    with pytest.raises(UsageError, match="nobody knows whether it may be passed on"):
        publish_student(unknown, tmp_path / "hub", repository="ann/student")
    assert not (tmp_path / "hub").exists()


def test_it_is_sent_whole_when_asked(run, tmp_path, hub):
    done = g2l(
        hub, tmp_path, "publish", run, "--out", tmp_path / "b", "--upload-to", "ann/student", "--private", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["uploaded_to"] == f"{hub.url}/ann/student"
    (made,) = hub.made
    assert made.get("private") is True or made.get("visibility") == "private"  # by the client's version
    assert hub.tokens == {"Bearer hf_secret"}
    sent = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    assert hub.files == sent
    assert b"hf-hub:ann/student" in sent["README.md"]


def test_a_hub_that_refuses_leaves_a_whole_folder(run, tmp_path, hub):
    hub.status = 403
    done = g2l(hub, tmp_path, "publish", run, "--out", tmp_path / "a", "--upload-to", "ann/student")
    assert done.returncode == 2
    assert "HTTP 403" in done.stderr
    assert "hf upload ann/student" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "a/SHA256SUMS").is_file()
    assert not hub.files


def test_without_a_token_nothing_is_asked(run, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(EncoderError, match=r"set HF_TOKEN.* is complete: hf upload ann/student"):
        publish_student(run, tmp_path / "a", repository="ann/student")
    assert (tmp_path / "a/SHA256SUMS").is_file()

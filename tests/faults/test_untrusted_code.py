"""Code that a file names runs only if the user trusts its module; pickles never run."""

import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from g2l_core.encoders.architectures import LOADING
from g2l_core.encoders.loading import load_encoder
from g2l_core.encoders.resolve import resolve_encoder, spec_from_json, spec_to_json
from g2l_core.encoders.spec import spec_digest
from g2l_core.encoders.weights import read_networks
from g2l_core.errors import EncoderError, NotASlideError, UsageError
from g2l_core.slides.slide import open_slide
from tests.pipeline.test_cli import cache, g2l, g2l_process

MODULE = """
from pathlib import Path
import torch
Path("it-ran").touch()

class Means(torch.nn.Module):
    mean, std, input_px = [0.5] * 3, [0.25] * 3, 64
    def forward(self, images):
        return images.mean(dim=(2, 3))

def make(**_):
    return Means()
"""

SPEC_FILE = """
architecture = "{code}"
weights = "module"
input_px = 64
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]
"""


@pytest.fixture
def lab(tmp_path, monkeypatch, request):
    """A module that leaves a file when it is imported, in the current folder under a name of its own."""
    monkeypatch.chdir(tmp_path)
    name = f"lab_{abs(hash(request.node.name)) % 10**8}"
    Path(f"{name}.py").write_text(MODULE)
    yield name
    sys.modules.pop(name, None)


def ran() -> bool:
    mark = Path("it-ran")
    was_there = mark.exists()
    mark.unlink(missing_ok=True)
    return was_there


def refused(done, lab, *words):
    assert done.returncode == 2, done.stderr
    assert f"--trust-code {lab}" in done.stderr
    assert all(word in done.stderr for word in words)
    assert "Traceback" not in done.stderr
    assert not ran()


@pytest.fixture
def small_cohort(cohort, tmp_path):
    folder = tmp_path / "slides"
    folder.mkdir()
    shutil.copy(sorted((cohort.parent / "slides").glob("*.tiff"))[0], folder)
    return folder


def run_folder(lab) -> Path:
    """A run folder as somebody else could have made it."""
    spec = spec_from_json(spec_to_json(resolve_encoder(f"{lab}:make")))
    ran()
    student = Path("run/student")
    student.mkdir(parents=True)
    Path("run/run.json").write_text("{}")
    record = {**spec_to_json(spec), "weights_digest": "0", "digest": spec_digest(spec, "0", "fp32")}
    (student / "encoder.json").write_text(json.dumps(record))
    sys.modules.pop(lab)
    return Path("run")


def test_code_that_a_spec_file_names(lab, small_cohort):
    Path("mine.toml").write_text(SPEC_FILE.format(code=f"{lab}:make"))
    stage_one = ["cache-teacher", small_cohort, "--store", "s.zarr", "--views", "0", "--teacher", "mine.toml"]
    refused(g2l(*stage_one), lab, "mine.toml", f"{lab}:make")
    refused(g2l(*stage_one, "--trust-code", f"{lab}_too"), lab)
    refused(g2l("plan", small_cohort, "--teacher", "mine.toml"), lab, "mine.toml")
    assert g2l("models", "mine.toml").returncode == 0
    assert not ran()
    done = g2l_process(*stage_one, "--trust-code", lab)
    assert done.returncode == 0, done.stderr
    assert f"mine.toml names the code {lab}:make: it is imported now" in done.stderr
    assert ran()


def test_code_that_a_user_types_is_stored_and_then_asked_for(lab, small_cohort):
    done = g2l("cache-teacher", small_cohort, "--store", "s.zarr", "--views", "0", "--teacher", f"{lab}:make")
    assert done.returncode == 0, done.stderr
    assert ran()
    sys.modules.pop(lab)
    verify = ["store", "verify", "s.zarr", "--recompute", "2"]
    refused(g2l(*verify), lab, "s.zarr/zarr.json", f"{lab}:make")
    assert g2l(*verify, "--trust-code", lab).returncode == 0
    assert ran()
    for command in (["store", "verify", "s.zarr"], ["store", "info", "s.zarr"], ["store", "ls", "s.zarr"]):
        assert g2l(*command).returncode == 0
    assert not ran()


def test_code_that_a_run_folder_names(lab, cached_store):
    run = run_folder(lab)
    distill = ["distill", "--store", cached_store, "--teacher", "timm:mobilenetv3_small_050@64", "--out", "new"]
    embed = ["embed", cached_store.parent, "--store", cached_store]
    refused(g2l(*embed, "--encoder", run), lab, "run/student/encoder.json")
    refused(g2l(*distill, "--student", run), lab, "run/student/encoder.json")
    refused(g2l("export-student", run, "--format", "onnx"), lab, "run/student/encoder.json")
    with pytest.raises(EncoderError, match="weights file"):
        load_encoder(resolve_encoder(str(run), trusted=[lab]))
    assert ran()


def test_code_that_a_recipe_names(lab, cached_store):
    Path("recipe.toml").write_text(f'student = "{lab}:make"\nsteps = 1\n')
    common = ["distill", "--store", cached_store, "--teacher", "timm:mobilenetv3_small_050@64", "--out", "new"]
    refused(g2l(*common, "--config", "recipe.toml"), lab, "recipe.toml")


def test_code_on_dask_workers(lab, small_cohort):
    pytest.importorskip("distributed")
    done = g2l_process(
        "cache-teacher", small_cohort, "--store", "s.zarr", "--views", "0", "--teacher", f"{lab}:make",
        "--local-workers", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    from pipeline.cluster import encode_group
    from pipeline.settings import ExtractionSettings

    store = zarr.open_group("s.zarr", mode="r")
    from g2l_core.store.facts import EncoderFacts

    facts = [EncoderFacts.from_json(fields) for fields in store.attrs["g2l"]["encoders"].values()]
    _, fatal = encode_group(Path("s.zarr"), [], facts, ExtractionSettings())
    assert f"--trust-code {lab}" in fatal


def test_loading_refuses_by_itself(lab):
    spec = spec_from_json({"name": "x", "architecture": f"{lab}:make", "weights": "", "mean": [0] * 3, "std": [1] * 3})
    with pytest.raises(EncoderError, match=f"a stored description names the code {lab}:make.*--trust-code {lab}"):
        load_encoder(spec)
    assert not ran()


@pytest.mark.parametrize("argument", LOADING)
def test_arguments_that_would_load_files(argument):
    spec = resolve_encoder("timm:mobilenetv3_small_050@64", weights="random:0")
    with pytest.raises(UsageError, match=f"the argument {argument} loads files"):
        load_encoder(replace(spec, arguments={argument: "evil.pth"}))


def test_a_package_of_weights_is_not_imported(lab):
    Path("pack").mkdir()
    shutil.copy(f"{lab}.py", "pack/__init__.py")
    spec = resolve_encoder("timm:mobilenetv3_small_050@64", weights="random:0")
    code = "from g2l_core.encoders.loading import load_encoder; from g2l_core.encoders.resolve import spec_from_json;"
    code += "import json, sys; load_encoder(spec_from_json(json.loads(sys.argv[1])))"
    fields = json.dumps(spec_to_json(replace(spec, weights="package:pack.inner/*")))
    done = subprocess.run([sys.executable, "-c", code, fields], capture_output=True, text=True, check=False)
    assert "needs the package pack.inner" in done.stderr
    assert not ran()


class Bomb:
    """Unpickles by leaving a file."""

    def __reduce__(self):
        return Path.touch, (Path("it-ran"),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", range(5))
def test_pickles_of_weights_do_not_run(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Bomb()}, "weights.pth", pickle_protocol=max(2, protocol))
    Path("plain.bin").write_bytes(pickle.dumps(Bomb(), protocol))
    for name in ("weights.pth", "plain.bin"):
        with pytest.raises(EncoderError):
            read_networks(Path(name))
        assert not ran()


@pytest.mark.parametrize("place", ["filters", "compressor"])
def test_a_pickle_codec_in_a_slide(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    slide = ome_zarr_2(tmp_path / "x.zarr")
    metadata = json.loads((slide / "0/.zarray").read_text())
    metadata[place] = [{"id": "pickle"}] if place == "filters" else {"id": "pickle"}
    (slide / "0/.zarray").write_text(json.dumps(metadata))
    (slide / "0/0.0.0").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(NotASlideError, match="object_codec_id.: .pickle"):
        open_slide(slide)
    assert not ran()


def ome_zarr_2(path: Path, shape=(3, 64, 64)) -> Path:
    """A small OME-Zarr 0.4 slide."""
    group = zarr.open_group(path, mode="w", zarr_format=2)
    level = group.create_array("0", shape=shape, chunks=shape, dtype="u1", compressors=None)
    level[:] = np.full(shape, 200, np.uint8)
    axes = [{"name": "c"}, *({"name": axis, "unit": "micrometer"} for axis in "yx")]
    steps = [{"type": "scale", "scale": [1, 0.5, 0.5]}]
    group.attrs["multiscales"] = [
        {"version": "0.4", "axes": axes, "datasets": [{"path": "0", "coordinateTransformations": steps}]}
    ]
    return path


@pytest.mark.parametrize("array", ["coords", "patch_status", "view_params", "pixel_hash"])
def test_a_pickle_codec_in_a_store(cohort, tmp_path, monkeypatch, array):
    """A store is of Zarr 3, whose registry has no pickle; a Zarr 2 array in its place is not opened."""
    monkeypatch.chdir(tmp_path)
    slide = sorted((cohort.parent / "slides").glob("*.tiff"))[0]
    cache(slide, "s.zarr", "--views", "0")
    (folder,) = [path for path in Path("s.zarr/slides").iterdir() if path.is_dir()]
    facts = json.loads((folder / array / "zarr.json").read_text())
    for codec in ("numcodecs.pickle", "pickle"):
        evil = {**facts, "codecs": [{"name": codec, "configuration": {}}]}
        (folder / array / "zarr.json").write_text(json.dumps(evil))
        for chunk in (folder / array / "c").rglob("0"):
            if chunk.is_file():
                chunk.write_bytes(pickle.dumps(Bomb()))
        g2l("store", "verify", "s.zarr")
        assert not ran()
    (folder / array / "zarr.json").unlink()
    (folder / array / ".zarray").write_text(
        json.dumps(
            {"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "order": "C", "fill_value": None,
             "compressor": None, "filters": [{"id": "pickle"}]}
        )
    )  # fmt: skip
    (folder / array / "0").write_bytes(pickle.dumps(np.array([Bomb()], object)))
    g2l("store", "verify", "s.zarr")
    assert not ran()

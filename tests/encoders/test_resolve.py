"""Names of encoders as users write them, and the keys under which stores keep their features."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from g2l_core.encoders.loading import build_network, encode, load_encoder
from g2l_core.encoders.resolve import TABLE, encoder_key, find_stored, resolve_encoder, run_encoder
from g2l_core.encoders.spec import WeightsSource, spec_digest, spec_from_json, spec_to_json
from g2l_core.encoders.weights import state_digest
from g2l_core.errors import EncoderError, UnknownNameError, UsageError
from g2l_core.store.facts import EncoderFacts
from tests.encoders.test_loading import VIT, saved, views

# ---- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["h-optimus-0", "H_optimus_0", "HOPTIMUS0", "h optimus 0", "H.Optimus-0"])
def test_names_match_without_case_and_separators(text):
    assert resolve_encoder(text) is TABLE["h-optimus-0"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h-optimus-2", "unknown encoder 'h-optimus-2'. Did you mean h-optimus-[01]"),
        ("hibou-x", "Did you mean hibou-[bl]"),
        ("efficientnet-lite3", "Did you mean efficientnet-lite"),
        ("something", "Known: h-optimus-0, h-optimus-1, .*g2l models lists them; timm:NAME is any timm architecture"),
        ("lab.models", "Known: h-optimus-0.*MODULE:FUNCTION"),
        ("", "Known: h-optimus-0"),
        ("timm:resnet81", "unknown timm architecture 'resnet81'. Did you mean resnet18"),
        ("timm:ResNet18", "Did you mean resnet18"),
        ("timm:", "unknown timm architecture ''"),
        ("timm:resnet18.a1_in1000", "unknown timm architecture.*Did you mean resnet18.a1_in1k"),
    ],
)
def test_unknown_names_suggest_the_nearest(text, message):
    with pytest.raises(UnknownNameError, match=message):
        resolve_encoder(text, weights="random:0")


def test_a_timm_architecture_brings_its_preprocessing_but_no_weights():
    spec = resolve_encoder("timm:vit_small_patch14_reg4_dinov2@56", weights="random:1")
    assert spec == resolve_encoder("TIMM:vit_small_patch14_reg4_dinov2@56", weights="random:1")
    assert spec.mean == (0.485, 0.456, 0.406)
    assert (spec.input_px, spec.arguments, spec.interpolation) == (56, {"img_size": 56}, "bicubic")
    assert spec.is_untrained
    assert spec.describe_weights() == "random, seed 1"
    with pytest.raises(UsageError, match="timm:resnet18 is an architecture without weights: give --weights FILE, or"):
        resolve_encoder("timm:resnet18")
    with pytest.raises(UsageError, match="give --weights FILE$"):
        resolve_encoder("timm:resnet18", seed_hint=False)


def test_another_input_size():
    small = resolve_encoder("efficientnet_lite0@96")
    assert (small.name, small.input_px, small.arguments) == ("efficientnet-lite0@96", 96, {})
    assert small.weights == TABLE["efficientnet-lite0"].weights
    assert resolve_encoder("h-optimus-0@112").arguments["img_size"] == 112
    for text in ("efficientnet-lite0@x", "efficientnet-lite0@9.5", "efficientnet-lite0@-3", "efficientnet-lite0@²"):
        with pytest.raises(UsageError, match="whole number of pixels"):
            resolve_encoder(text)
    with pytest.raises(UsageError, match="8 px is too small; at least 16"):
        resolve_encoder("efficientnet-lite0@8")


def test_bad_weights_arguments(tmp_path):
    for weights in ("random:", "random:x", "random:-1", "random:²"):
        with pytest.raises(UsageError, match="expected random:SEED with a whole number"):
            resolve_encoder("hibou-l", weights=weights)
    with pytest.raises(UsageError, match="no such file"):
        resolve_encoder("hibou-l", weights=str(tmp_path / "absent.pt"))
    assert not resolve_encoder("hibou-l").is_untrained
    assert resolve_encoder("hibou-l").describe_weights() == "1.1 M slides (histai/hibou-L)"
    assert resolve_encoder("hibou-l", weights="random:0").describe_weights() == "random, seed 0"


def test_specs_survive_json():
    for spec in (*TABLE.values(), VIT):
        fields = json.loads(json.dumps(spec_to_json(spec)))
        assert spec_from_json(fields) == spec
        assert spec_from_json({**fields, "of a later version": 1}) == spec


def test_keys_tell_apart_what_differs():
    digest = "0123456789abcdef"
    assert encoder_key(TABLE["h-optimus-0"], digest) == "h-optimus-0"
    assert encoder_key(replace(TABLE["h-optimus-0"], weights="random:7"), digest) == "h-optimus-0-random7"
    assert encoder_key(replace(TABLE["h-optimus-0"], weights="file:/w.pt"), digest) == "h-optimus-0-01234567"
    assert encoder_key(replace(VIT, name="timm:a/b.c@56"), digest) == "timm-a-b-c-56-random0"


def stored_as(name, weights_digest=""):
    return EncoderFacts(name=name, weights_digest=weights_digest, digest="0", dim=1)


def test_which_stored_encoder_is_meant():
    stored = {"a-random0": stored_as("timm:a"), "a-random1": stored_as("timm:a"), "b": stored_as("H-B")}
    assert find_stored("a-random0", stored) == "a-random0"
    assert find_stored("A_Random1", stored) == "a-random1"
    assert find_stored("hb", stored) == "b"
    with pytest.raises(UsageError, match="fits several stored encoders: a-random0, a-random1"):
        find_stored("timm:a", stored)
    with pytest.raises(UnknownNameError, match=r"Did you mean.*a-random0.*g2l store ls lists them"):
        find_stored("a-random2", stored)


def test_a_run_folder_is_an_encoder(tmp_path):
    run = tmp_path / "my run"
    (run / "student").mkdir(parents=True)
    assert run_folder_unknown(run)
    with pytest.raises(EncoderError, match=r"is no run folder: it has neither run\.json nor student/"):
        run_encoder(run)
    (run / "run.json").write_text("{}")
    with pytest.raises(EncoderError, match="has no finished student; run the same g2l distill"):
        run_encoder(run)
    saved(run / "student", VIT, "model.safetensors")
    tensors = state_digest(build_network(VIT).state_dict())
    record = {**spec_to_json(VIT), "weights_digest": tensors, "digest": spec_digest(VIT, tensors, "fp32")}
    (run / "student/encoder.json").write_text(json.dumps(record))
    spec = resolve_encoder(str(run))
    assert (spec.name, spec.weights) == ("my run", f"run:{run / 'student'}")
    np.testing.assert_array_equal(encode(load_encoder(spec), views(2)), encode(load_encoder(VIT), views(2)))
    stored = {"x-1": stored_as("x", tensors), "y": stored_as("my run", "def")}
    assert find_stored(str(run), stored) == "x-1"
    with pytest.raises(UnknownNameError, match="This run has no features here yet: g2l embed"):
        find_stored(str(run), {"y": stored_as("my run", "def")})


def run_folder_unknown(run: Path) -> bool:
    with pytest.raises(UnknownNameError):
        resolve_encoder(str(run))
    return True


# ---- pooling and weights by name ------------------------------------------------------------------------------


def test_another_pooling():
    spec = resolve_encoder("Virchow2@448+cls")
    assert (spec.name, spec.pooling, spec.dim) == ("virchow2@448+cls", "cls", None)
    assert (spec.input_px, spec.arguments["img_size"]) == (448, 448)
    assert resolve_encoder("virchow2+cls_mean") is TABLE["virchow2"]
    assert encoder_key(spec, "0123456789") == "virchow2-448-cls"
    assert find_stored("virchow2@448+cls", {"virchow2-448-cls": stored_as(spec.name)}) == "virchow2-448-cls"
    with pytest.raises(UnknownNameError, match="unknown pooling 'clss'. Did you mean cls"):
        resolve_encoder("virchow2+clss")


@pytest.mark.parametrize(
    ("text", "where", "revision", "file"),
    [
        ("hub:lab/model@v2#w.pt", "lab/model", "v2", "w.pt"),
        ("hub:lab/model#w.pt", "lab/model", "", "w.pt"),
        ("hub:lab/model", "lab/model", "", ""),
        ("package:a_package/*.pth", "a_package", "", "*.pth"),
        ("file:/a@b/c#d:e", "/a@b/c#d:e", "", ""),
        ("module:lab.nets:build", "lab.nets:build", "", ""),
        ("random:3", "3", "", ""),
        ("", "", "", ""),
    ],
)
def test_where_weights_come_from(text, where, revision, file):
    source = WeightsSource.parse(text)
    assert (source.kind, source.where, source.revision, source.file) == (text.partition(":")[0], where, revision, file)
    assert str(source) == text


def test_weights_from_another_repository_or_revision():
    spec = resolve_encoder("hibou-l", weights="hub:lab/mirror@v2#w.pt")
    assert (spec.weights, spec.layout, spec.trained_on) == ("hub:lab/mirror@v2#w.pt", "auto", "")
    assert encoder_key(spec, "0123456789abcdef") == "hibou-l-01234567"
    assert encoder_key(TABLE["hibou-l"], "0123456789abcdef") == "hibou-l"


# ---- spec files and functions ---------------------------------------------------------------------------------

SPEC_FILE = """
architecture = "vit_small_patch14_reg4_dinov2"
weights = "w.safetensors"
input_px = 56
mean = [0.7, 0.6, 0.5]
std = [0.2, 0.25, 0.3]
pooling = "cls"
mpp = 0.5
[arguments]
img_size = 56
depth = 2
embed_dim = 48
num_heads = 3
"""

MODULE = """
import torch

class Means(torch.nn.Module):
    mean, std, input_px, mpp = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 32, 0.5

    def __init__(self, gain=1.0):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(gain))

    def forward(self, images):
        return self.gain * images.mean(dim=(2, 3))

def build(gain=1.0):
    return Means(gain)

def silent():
    return torch.nn.Identity()

def nothing():
    return 3
"""


def test_a_spec_file_is_an_encoder(tmp_path):
    (tmp_path / "mine.toml").write_text(SPEC_FILE)
    saved(tmp_path, VIT)
    spec = resolve_encoder(str(tmp_path / "mine.toml"))
    assert (spec.name, spec.weights, spec.mpp) == ("mine", f"file:{tmp_path / 'w.safetensors'}", 0.5)
    found, wanted = load_encoder(spec), load_encoder(replace(VIT, pooling="cls"))
    assert found.digest == wanted.digest
    assert found.key == f"mine-{found.digest[:8]}"
    np.testing.assert_array_equal(encode(found, views(2)), encode(wanted, views(2)))
    assert resolve_encoder(f"{tmp_path}/mine.toml+cls_mean").pooling == "cls_mean"
    assert resolve_encoder(f"{tmp_path}/mine.toml", weights="random:4").weights == "random:4"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("mpp = 0.5", "mmp = 0.5", "unknown key in .*mine.toml 'mmp'. Did you mean mpp"),
        ("input_px = 56", "", "missing input_px; a spec file needs architecture, weights, mean, std, input_px"),
        ("input_px = 56", "input_px = 56.5", "input_px must be int, not 56.5"),
        ("mean = [0.7, 0.6, 0.5]", "mean = [0.7, 0.6]", "mean must be 3 numbers, not"),
        ("mean = [0.7, 0.6, 0.5]", 'mean = [0.7, 0.6, "x"]', "mean must be 3 numbers, not"),
        ("std = [0.2, 0.25, 0.3]", "std = [0.2, 0.25, 0]", "std must be above 0"),
        ('pooling = "cls"', 'pooling = "clas"', "unknown pooling 'clas'. Did you mean cls"),
        ('pooling = "cls"', 'interpolation = "nearest"', "unknown interpolation 'nearest'"),
        ('pooling = "cls"', 'card_precision = "fp8"', "unknown card_precision 'fp8'. Did you mean fp"),
        ("w.safetensors", "absent.safetensors", "no such file .*absent.safetensors"),
        ("w.safetensors", "module", 'weights = "module" is for an architecture MODULE:FUNCTION'),
        ("architecture =", "architecture", "cannot read the encoder's spec file"),
    ],
)
def test_spec_files_that_cannot_be_used(tmp_path, old, new, message):
    saved(tmp_path, VIT)
    (tmp_path / "mine.toml").write_text(SPEC_FILE.replace(old, new))
    with pytest.raises(UsageError, match=message):
        resolve_encoder(str(tmp_path / "mine.toml"))


def test_a_spec_file_names_layers(tmp_path):
    saved(tmp_path, VIT)
    (tmp_path / "mine.toml").write_text(SPEC_FILE.replace("depth = 2", 'depth = 2\nmlp_layer = "SwiGLUPack"'))
    with pytest.raises(UnknownNameError, match="unknown layer for mlp_layer 'SwiGLUPack'. Did you mean swiglupacked"):
        load_encoder(resolve_encoder(str(tmp_path / "mine.toml"), weights="random:0"))


def test_a_function_is_an_encoder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lab_of_tests.py").write_text(MODULE)
    encoder = load_encoder(resolve_encoder("lab_of_tests:build"))
    pixels = views(3, 32)
    wanted = (pixels.mean(axis=(1, 2)) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(encode(encoder, pixels), wanted, rtol=1e-4, atol=1e-5)
    assert (encoder.dim, encoder.key) == (3, f"build-{encoder.digest[:8]}")
    Path("mine.toml").write_text(
        'architecture = "lab_of_tests:build"\nweights = "module"\ninput_px = 32\nmean = [0.5, 0.5, 0.5]\n'
        "std = [0.25, 0.25, 0.25]\n[arguments]\ngain = 2.0\n"
    )
    doubled = load_encoder(resolve_encoder("mine.toml", trusted=["lab_of_tests"]))
    np.testing.assert_allclose(encode(doubled, pixels), 2 * wanted, rtol=1e-4, atol=1e-5)
    assert doubled.digest != encoder.digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no_lab:build", "no_lab:build: cannot import no_lab .*is it in this folder"),
        ("lab_of_errors:absent", "lab_of_errors has no absent"),
        (
            "lab_of_errors:silent",
            "must say its preprocessing in the attributes mean, std and input_px; missing: mean, ",
        ),
        ("lab_of_errors:nothing", "must return a torch.nn.Module, it returned int"),
        ("lab_of_errors:Means.no", "unknown encoder"),
    ],
)
def test_functions_that_cannot_be_used(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    Path("lab_of_errors.py").write_text(MODULE)
    with pytest.raises((EncoderError, UnknownNameError), match=message):
        resolve_encoder(text)

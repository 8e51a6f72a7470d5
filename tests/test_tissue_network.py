"""Tissue by a network of the user's: TorchScript and ONNX files of a network whose answer is known by arithmetic."""

import warnings

import cv2
import numpy as np
import pytest
import torch

from g2l_core.errors import UsageError
from g2l_core.slides import open_slide
from g2l_core.synthetic import write_pyramid
from g2l_core.tissue.methods import resolve_tissue
from g2l_core.tissue.network import load_network, segment_tile
from tests.test_views import he_patch

PLAIN = "mean = [0, 0, 0]\nstd = [1, 1, 1]\n"
TILE = 64


class Colourfulness(torch.nn.Module):
    """Largest less smallest of red, green and blue, in 0 .. 1: one channel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.amax(1, keepdim=True) - x.amin(1, keepdim=True)


class Classes(torch.nn.Module):
    """Three channels: bright, colourful, dark; glass, tissue and ink, say."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        colour = x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
        bright = x.mean(1, keepdim=True)
        return torch.cat([bright - 0.5, 2 * colour, 0.4 - bright], 1)


class Pooled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean([2, 3])


def torchscript(path, module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(module), path)
    return path


def field(number, content):
    """One field of a protobuf message: a number, a text, or a message."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    content = content.encode() if isinstance(content, str) else content
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value):
    out = b""
    while True:
        value, low = value >> 7, value & 127
        out += bytes([low | (128 if value else 0)])
        if not value:
            return out


def onnx_colourfulness(path):
    """`Colourfulness` as an ONNX file (opset 13), byte by byte after onnx.proto."""

    def node(op, inputs, output, reduces):
        axes = field(5, field(1, "axes") + field(8, 1) + field(20, 7)) if reduces else b""  # attribute of type INTS
        return field(1, b"".join(field(1, name) for name in inputs) + field(2, output) + field(4, op) + axes)

    def value(name, channels):
        shape = b"".join(field(1, field(1, size)) for size in (1, channels, TILE, TILE))
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, shape)))  # element type 1 is float

    graph = node("ReduceMax", ["x"], "high", True) + node("ReduceMin", ["x"], "low", True)
    graph += node("Sub", ["high", "low"], "y", False) + field(2, "graph")
    graph += field(11, value("x", 3)) + field(12, value("y", 1))
    path.write_bytes(field(1, 8) + field(8, field(1, "") + field(2, 13)) + field(7, graph))
    return path


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory):
    """1,536 px of H&E in the middle of 2,560 px of glass at 0.5 um/px."""
    image = np.full((2560, 2560, 3), 244, np.uint8)
    for i in range(36):
        y, x = 512 + 256 * (i // 6), 512 + 256 * (i % 6)
        image[y : y + 256, x : x + 256] = he_patch(i)
    path = tmp_path_factory.mktemp("network") / "x.tiff"
    write_pyramid(path, image, mpp=0.5)
    return path


FILES = {"x.pt": lambda path: torchscript(path, Colourfulness()), "x.onnx": onnx_colourfulness}


@pytest.mark.parametrize("name", FILES)
def test_a_tile_is_segmented_by_the_network_s_arithmetic(tmp_path, name):
    path = FILES[name](tmp_path / name)
    path.with_suffix(".toml").write_text(f"{PLAIN}tile_px = {TILE}\nthreshold = 0.2\n")
    tile = cv2.resize(he_patch(0), (TILE, TILE), interpolation=cv2.INTER_AREA)
    scaled = tile.astype(np.float32) / 255
    expected = scaled.max(axis=2) - scaled.min(axis=2) >= 0.2
    assert 0.05 < expected.mean() < 0.95
    assert np.array_equal(segment_tile(load_network(path), tile), expected)


@pytest.mark.parametrize("name", FILES)
def test_a_slide_is_segmented_tile_by_tile_without_seams(tmp_path, slide_path, name):
    path = FILES[name](tmp_path / name)
    path.with_suffix(".toml").write_text(f"{PLAIN}tile_px = {TILE}\nmpp = 8.0\nthreshold = 0.05\n")
    method = resolve_tissue(str(path))
    with open_slide(slide_path) as slide:
        found = method.find(slide, "x").mask
        thumbnail = slide.read_thumbnail(8.0).image.astype(np.float32) / 255
    expected = thumbnail.max(axis=2) - thumbnail.min(axis=2) >= 0.05
    assert found.shape == expected.shape == (160, 160)  # nine tiles of which the middle 48 px count, and more
    assert np.mean(found != expected) < 0.002
    assert method.identity.startswith(f"network:{name}@sha256:")


def test_a_network_finer_than_the_mask_is_averaged(tmp_path, slide_path):
    path = torchscript(tmp_path / "x.pt", Colourfulness())
    path.with_suffix(".toml").write_text(f"{PLAIN}tile_px = 256\nmpp = 2.0\nthreshold = 0.05\n")
    with open_slide(slide_path) as slide:
        found = resolve_tissue(str(path)).find(slide, "x").mask
    inside = np.zeros((160, 160), bool)
    inside[32:128, 32:128] = True
    assert not found[~cv2.dilate(inside.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)].any()
    assert found[34:126, 34:126].mean() > 0.95


def test_classes_are_chosen_by_number(tmp_path):
    path = torchscript(tmp_path / "x.pt", Classes())
    tile = np.full((TILE, TILE, 3), 244, np.uint8)
    tile[:, 20:40] = (150, 40, 120)
    tile[:, 40:] = (5, 5, 5)
    for classes, expected in (([1], (False, True, False)), ([1, 2], (False, True, True)), ([0], (True, False, False))):
        path.with_suffix(".toml").write_text(f"{PLAIN}tile_px = {TILE}\ntissue_classes = {classes}\n")
        found = segment_tile(load_network(path), tile)
        assert (found[0, 10], found[0, 30], found[0, 50]) == expected


def test_the_identity_holds_the_file_and_its_settings(tmp_path):
    path = torchscript(tmp_path / "x.pt", Colourfulness())
    path.with_suffix(".toml").write_text(f"{PLAIN}tile_px = {TILE}\nthreshold = 0.2\n")
    first = resolve_tissue(str(path)).identity
    assert resolve_tissue(str(path)).identity == first
    path.with_suffix(".toml").write_text(f"{PLAIN}tile_px = {TILE}\nthreshold = 0.3\n")
    assert resolve_tissue(str(path)).identity != first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("tile_pix = 64", "unknown key 'tile_pix'"),
        ("tile_px = 31", "tile_px must be a whole number from 32"),
        ("std = [1, 1, 0]", "std must be three numbers above 0"),
        ("tissue_classes = []", "tissue_classes must be a list"),
        ("tissue_classes = [3]\ntile_px = 64", r"it has 3 classes, tissue_classes asks for \[3\]"),
        ("tile_px = 64\nmpp = 0.5", "tile_px times mpp must be at least 64 um"),
        ("tile_px = ", "cannot read"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path, settings, message):
    path = torchscript(tmp_path / "x.pt", Classes())
    path.with_suffix(".toml").write_text(settings)
    with pytest.raises(UsageError, match=message):
        resolve_tissue(str(path))


def test_files_that_are_no_such_network(tmp_path):
    (tmp_path / "text.pt").write_text("no network")
    (tmp_path / "text.onnx").write_text("no network")
    torchscript(tmp_path / "pooled.pt", Pooled())
    onnx_colourfulness(tmp_path / "fixed.onnx")  # takes 64 px alone; the default is 512
    for name, message in (
        ("text.pt", "no TorchScript file"),
        ("text.onnx", "onnxruntime cannot load"),
        ("pooled.pt", r"expected an output of shape \(1, classes, 512, 512\), got \(1, 3\)"),
        ("fixed.onnx", "cannot take an input"),
        ("absent.pt", "cannot read"),
    ):
        with pytest.raises(UsageError, match=message):
            resolve_tissue(str(tmp_path / name))

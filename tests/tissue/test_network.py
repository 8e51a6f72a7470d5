"""Tissue networks: tiny TorchScript and ONNX files made here, tiles and seams against the whole picture, refusals."""

import struct
import sys
import warnings

import cv2
import numpy as np
import pytest

from g2l_core.errors import UsageError
from g2l_core.extraction.patching import patch_source
from g2l_core.patches.grid import GridSpec
from g2l_core.slides.manifest import Source
from g2l_core.slides.slide import open_slide
from g2l_core.synthetic.cohort import CohortSpec, draw_slide, write_pyramid
from g2l_core.tissue.methods import resolve_tissue
from g2l_core.tissue.network import Network, NetworkSettings, load_network, network_tissue, segment_tile
from g2l_core.tissue.thresholds import THUMBNAIL_MPP

GREEN_LIMIT = 200
"""The networks here call tissue what lets less green through than this."""

PLAIN = "mean = [0.0, 0.0, 0.0]\nstd = [1.0, 1.0, 1.0]\ntile_px = 64\nmpp = 2.0\n"


def weights(channels: int) -> tuple[np.ndarray, np.ndarray]:
    """A 1 x 1 convolution: channel 1 of two, or the one there is, is positive where green is under the limit."""
    kernel, bias = np.zeros((channels, 3, 1, 1), np.float32), np.zeros(channels, np.float32)
    kernel[-1, 1], bias[-1] = -1.0, (GREEN_LIMIT - 0.5) / 255
    return kernel, bias


# ---- files --------------------------------------------------------------------------------------------------


def save_torchscript(path, channels=2, module=None):
    import torch

    if module is None:
        module = torch.nn.Conv2d(3, channels, 1)
        for parameter, values in zip(module.parameters(), weights(channels), strict=True):
            parameter.data = torch.from_numpy(values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(module.eval(), torch.zeros(1, 3, 64, 64)), path)


def field(number: int, value: bytes | int) -> bytes:
    """A protobuf field: a varint, or bytes with their length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def save_onnx(path, channels=2, size=("height", "width"), outputs=1):
    """A model of one Conv (onnx.proto: ModelProto 1 ir_version, 7 graph, 8 opset), written by hand."""

    def tensor(name: bytes, values: np.ndarray) -> bytes:
        dims = b"".join(field(1, n) for n in values.shape)
        data = struct.pack(f"<{values.size}f", *values.ravel().tolist())
        return dims + field(2, 1) + field(8, name) + field(9, data)

    def value(name: bytes, n: int) -> bytes:
        dims = b"".join(field(1, field(1, d) if isinstance(d, int) else field(2, d.encode())) for d in (1, n, *size))
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, dims)))

    kernel, bias = weights(channels)
    graph = b"".join(
        field(1, field(1, b"x") + field(1, b"w") + field(1, b"b") + field(2, b"y%d" % i) + field(4, b"Conv"))
        for i in range(outputs)
    )
    graph += field(2, b"g") + field(5, tensor(b"w", kernel)) + field(5, tensor(b"b", bias)) + field(11, value(b"x", 3))
    graph += b"".join(field(12, value(b"y%d" % i, channels)) for i in range(outputs))
    path.write_bytes(field(1, 8) + field(7, graph) + field(8, field(1, b"") + field(2, 17)))


SAVERS = {".pt": save_torchscript, ".onnx": save_onnx}


@pytest.fixture(params=SAVERS)
def suffix(request) -> str:
    if request.param == ".onnx":
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the extra onnx)")
    return request.param


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("slide") / "x.tiff"
    write_pyramid(path, draw_slide(CohortSpec(size_um=(1024.0, 768.0), mpp=(0.5, 0.5), seed=3), 0)[0], mpp=0.5)
    return path


def expected_mask(path, mpp: float) -> np.ndarray:
    """The threshold on the whole slide at the network's scale, its mean over each pixel of the frame at least half."""
    with open_slide(path) as slide:
        image, frame = slide.read_thumbnail(mpp).image, slide.thumbnail_frame(THUMBNAIL_MPP)
    tissue = (image[..., 1] < GREEN_LIMIT).astype(np.float32)
    return cv2.resize(tissue, frame.size, interpolation=cv2.INTER_AREA) >= 0.5


# ---- tiles --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("mpp", [1.0, 2.0, 8.0])
def test_a_slide_in_tiles_is_the_whole_slide(tmp_path, slide_path, suffix, channels, mpp):
    SAVERS[suffix](tmp_path / f"net{suffix}", channels)
    threshold = "threshold = 0.0\n" if channels == 1 else ""
    (tmp_path / "net.toml").write_text(PLAIN.replace("mpp = 2.0", f"mpp = {mpp}") + threshold)
    method = resolve_tissue(str(tmp_path / f"net{suffix}"))
    with open_slide(slide_path) as slide:
        found = method.find(slide, "x").mask
    wanted = expected_mask(slide_path, mpp)
    assert 0.3 < wanted.mean() < 0.9
    assert (found != wanted).mean() < 0.001  # of ties at exactly half


def whole(slide, forward, **settings) -> np.ndarray:
    network = Network(name="n", digest="", settings=NetworkSettings(**settings), forward=forward)
    return network_tissue(network, slide, slide.thumbnail_frame(THUMBNAIL_MPP))


@pytest.mark.parametrize(("tile_px", "mpp"), [(64, 2.0), (128, 1.0), (48, 3.0), (32, 10.0)])
def test_what_a_network_says_at_a_tiles_edge_is_not_used(slide_path, tile_px, mpp):
    """It says tissue on the outer twelfth of each tile and nowhere else; an eighth is cut off."""

    def forward(batch):
        answer = np.ones((1, 1, tile_px, tile_px), np.float32)
        edge = tile_px // 12
        answer[..., edge:-edge, edge:-edge] = 0
        return answer

    with open_slide(slide_path) as slide:
        assert not whole(slide, forward, tile_px=tile_px, mpp=mpp).any()
        assert whole(slide, lambda _: np.ones((1, 1, tile_px, tile_px), np.float32), tile_px=tile_px, mpp=mpp).all()


def test_pixels_reach_the_network_in_order_and_scaled():
    seen = []

    def forward(batch):
        seen.append(batch)
        return np.zeros((1, 3, 64, 64), np.float32)

    settings = NetworkSettings(tile_px=64, mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0), tissue_classes=(0, 2))
    tile = np.zeros((64, 64, 3), np.uint8)
    tile[3, 5] = (255, 51, 102)
    mask = segment_tile(Network(name="n", digest="", settings=settings, forward=forward), tile)
    assert seen[0].shape == (1, 3, 64, 64)
    np.testing.assert_allclose(seen[0][0, :, 3, 5], [1.0, -0.05, 0.2], atol=1e-6)
    np.testing.assert_allclose(seen[0][0, :, 0, 0], [-1.0, -0.25, 0.0], atol=1e-6)
    assert mask.all()  # all channels equal: the first is the largest, and counts


def test_several_classes_count_together():
    scores = np.random.default_rng(0).normal(size=(1, 4, 64, 64)).astype(np.float32)
    settings = NetworkSettings(tile_px=64, tissue_classes=(1, 3))
    mask = segment_tile(
        Network(name="n", digest="", settings=settings, forward=lambda _: scores), np.zeros((64, 64, 3), np.uint8)
    )
    best = np.stack([scores[0, [1, 3]].max(axis=0), scores[0, [0, 2]].max(axis=0)])
    assert np.array_equal(mask, best[0] > best[1])


def test_memory_stays_at_a_tile(slide_path):
    """The slide is never read whole at the network's scale."""
    with open_slide(slide_path) as slide:
        read, windows = slide.read_thumbnail, []

        def reading(mpp, window=None):
            windows.append(window)
            return read(mpp, window)

        slide.read_thumbnail = reading
        whole(slide, lambda _: np.ones((1, 1, 64, 64), np.float32), tile_px=64, mpp=2.0)
    assert len(windows) > 50
    assert {window[2:] for window in windows} == {(64, 64)}


# ---- windows of a slide -------------------------------------------------------------------------------------


def test_a_window_is_a_part_of_the_thumbnail(slide_path):
    with open_slide(slide_path) as slide:
        image = slide.read_thumbnail(2.0).image
        assert slide.thumbnail_frame(2.0).size == image.shape[1::-1]
        part = slide.read_thumbnail(2.0, (30, 40, 50, 60))
        assert np.array_equal(part.image, image[40:100, 30:80])
        beyond = slide.read_thumbnail(2.0, (-10, -20, 30, 40)).image
        assert np.array_equal(beyond[20:, 10:], image[:20, :20])
        assert (beyond[:20] == 255).all()
        assert (beyond[:, :10] == 255).all()


# ---- identity and settings ----------------------------------------------------------------------------------


def test_identity_follows_the_bytes_and_the_settings(tmp_path, suffix):
    path, toml = tmp_path / f"net{suffix}", tmp_path / "net.toml"
    SAVERS[suffix](path)
    toml.write_text(PLAIN)
    first = resolve_tissue(str(path)).identity
    assert first.startswith(f"network:net{suffix}@sha256:")
    assert len(first.rsplit(":", 1)[1]) == 12
    toml.write_text("# a remark\n" + PLAIN)
    assert resolve_tissue(str(path)).identity == first
    toml.write_text(PLAIN + "threshold = 0.4\n")
    assert resolve_tissue(str(path)).identity != first
    toml.write_text(PLAIN)
    path.write_bytes(path.read_bytes())
    assert resolve_tissue(str(path)).identity == first
    SAVERS[suffix](path, channels=3)
    assert resolve_tissue(str(path)).identity != first


def test_defaults_are_those_stated(tmp_path):
    save_torchscript(tmp_path / "net.pt")
    settings = load_network(tmp_path / "net.pt").settings
    assert settings == NetworkSettings()
    assert (settings.mpp, settings.tile_px, settings.tissue_classes, settings.threshold) == (1.0, 512, (1,), 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mmp = 1.0", "unknown key 'mmp'; known: mean, mpp, std"),
        ("mpp = 0", "mpp must be a number from 0.1 to 50, not 0"),
        ("mpp = true", "mpp must be a number"),
        ("tile_px = 64.0", "tile_px must be a whole number from 32 to 8192"),
        ("mean = [0.5]", "mean must be three numbers, not"),
        ("std = [1.0, 0.0, 1.0]", "std must be three numbers above 0"),
        ("tissue_classes = []", "tissue_classes must be a list of channels from 0"),
        ("tissue_classes = 1", "tissue_classes must be a list"),
        ('threshold = "high"', "threshold must be a number"),
        ("tile_px = 32\nmpp = 1.0", "tile_px times mpp must be at least 64 um"),
        ("mpp 1.0", "cannot read .*net.toml"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path, text, message):
    save_torchscript(tmp_path / "net.pt")
    (tmp_path / "net.toml").write_text(text)
    with pytest.raises(UsageError, match=message):
        load_network(tmp_path / "net.pt")


# ---- refusals -----------------------------------------------------------------------------------------------


def test_files_that_are_no_networks(tmp_path, suffix):
    path = tmp_path / f"net{suffix}"
    with pytest.raises(UsageError, match="cannot read .*No such file"):
        resolve_tissue(str(path))
    path.write_bytes(b"no network")
    with pytest.raises(UsageError, match="no TorchScript file|onnxruntime cannot load"):
        resolve_tissue(str(path))


def test_classes_that_the_network_has_not(tmp_path, suffix):
    SAVERS[suffix](tmp_path / f"net{suffix}")
    (tmp_path / "net.toml").write_text(PLAIN + "tissue_classes = [2]\n")
    with pytest.raises(UsageError, match=r"it has 2 classes, tissue_classes asks for \[2\]"):
        resolve_tissue(str(tmp_path / f"net{suffix}"))


def test_outputs_of_another_shape(tmp_path):
    import torch

    class Halved(torch.nn.Module):
        def forward(self, x):
            return x[:, :, ::2, ::2]

    class Flat(torch.nn.Module):
        def forward(self, x):
            return x.mean(dim=(2, 3))

    class Pair(torch.nn.Module):
        def forward(self, x):
            return x, x

    (tmp_path / "net.toml").write_text(PLAIN)
    for module, got in ((Halved(), r"\(1, 3, 32, 32\)"), (Flat(), r"\(1, 3\)"), (Pair(), "tuple")):
        save_torchscript(tmp_path / "net.pt", module=module)
        with pytest.raises(UsageError, match=rf"of shape \(1, classes, 64, 64\), got {got}"):
            load_network(tmp_path / "net.pt")


def test_a_torch_network_that_cannot_take_the_input(tmp_path):
    import torch

    save_torchscript(tmp_path / "net.pt", module=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12288, 2)))
    with pytest.raises(UsageError, match=r"cannot take an input of \(1, 3, 512, 512\)"):
        load_network(tmp_path / "net.pt")


def test_onnx_with_another_input_size_or_two_outputs(tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the extra onnx)")
    (tmp_path / "net.toml").write_text(PLAIN)
    save_onnx(tmp_path / "net.onnx", size=(32, 32))
    with pytest.raises(UsageError, match=r"cannot take an input of \(1, 3, 64, 64\)"):
        load_network(tmp_path / "net.onnx")
    save_onnx(tmp_path / "net.onnx", outputs=2)
    with pytest.raises(UsageError, match="expected one input and one output, got 1 and 2"):
        load_network(tmp_path / "net.onnx")


def test_without_onnxruntime_it_says_what_to_install(tmp_path, monkeypatch):
    save_onnx(tmp_path / "net.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r'pip install "g2l\[onnx\]"'):
        resolve_tissue(str(tmp_path / "net.onnx"))


# ---- through patching -----------------------------------------------------------------------------------------


def test_a_slide_is_laid_by_a_network(tmp_path, slide_path, suffix):
    SAVERS[suffix](tmp_path / f"net{suffix}")
    (tmp_path / "net.toml").write_text(PLAIN)
    method = resolve_tissue(str(tmp_path / f"net{suffix}"))
    source = Source(slide_id="x", path=slide_path)
    laid = patch_source(source, GridSpec(tissue=method.identity), None, method)
    by_color = patch_source(source, GridSpec(), None)
    laid_set, color_set = ({tuple(c) for c in found.coords.tolist()} for found in (laid, by_color))
    assert len(laid_set & color_set) / len(laid_set | color_set) > 0.8
    with pytest.raises(UsageError, match="give its file again with --tissue"):
        patch_source(source, GridSpec(tissue=method.identity), None)

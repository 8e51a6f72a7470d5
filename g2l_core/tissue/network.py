"""Find tissue with a segmentation network of the user: TorchScript or ONNX, with a TOML file of settings beside it.

The defaults are the settings of HEST's DeepLab, of which `out` must be exported and not the dict that it returns.
GrandQC's tissue model needs `mpp = 10.0` and `tissue_classes = [0]`.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias, get_type_hints

import cv2
import numpy as np
from jaxtyping import Float32
from pydantic import Field, NonNegativeInt, PositiveFloat, TypeAdapter, ValidationError

from g2l_core.errors import UsageError
from g2l_core.files import parse_toml
from g2l_core.slides.slide import Frame, Slide
from g2l_core.store.provenance import canonical_json
from g2l_core.tissue.thresholds import THUMBNAIL_MPP
from g2l_core.types import Mpp, Rgb, TissueMask

SUFFIXES = (".onnx", ".pt")

OVERLAP = 1 / 8
"""Fraction of a tile's side, at each edge, whose output is not used, since a network sees too little around it."""

SMALLEST_TILE_UM = 8 * THUMBNAIL_MPP
"""Minimum side of a tile, of which something must be left when its edges are cut off."""

Forward: TypeAlias = Callable[[Float32[np.ndarray, "1 3 height width"]], Any]


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """The settings of a network: the keys of its TOML file."""

    mpp: Annotated[float, Field(ge=0.1, le=50, description="a number from 0.1 to 50")] = 1.0
    """Micrometers per pixel of its input."""
    tile_px: Annotated[int, Field(ge=32, le=8192, description="a whole number from 32 to 8192")] = 512
    """Side of its input."""
    mean: Annotated[tuple[float, float, float], Field(description="three numbers")] = (0.485, 0.456, 0.406)
    """Subtracted from red, green and blue, which are 0 to 1. The defaults are ImageNet's."""
    std: Annotated[tuple[PositiveFloat, PositiveFloat, PositiveFloat], Field(description="three numbers above 0")] = (
        0.229, 0.224, 0.225,
    )  # fmt: skip
    """Divides them after the mean is subtracted."""
    tissue_classes: Annotated[
        tuple[NonNegativeInt, ...], Field(min_length=1, description="a list of channels from 0")
    ] = (1,)
    """With two or more output channels: the channels that mean tissue where they are the largest."""
    threshold: Annotated[float, Field(description="a number")] = 0.5
    """With one output channel: the minimum value that means tissue. It is 0 for a network without a final sigmoid."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """A loaded network that has been run once on a blank tile."""

    name: str
    digest: str
    """sha256 over its file and its settings."""
    settings: NetworkSettings
    forward: Forward


def load_network(path: Path) -> Network:
    """Load FILE.onnx or FILE.pt with the settings in FILE.toml, if there is one, and run it once on a white tile.

    Raises:
        UsageError: A file cannot be read or loaded, a setting is unknown or impossible, onnxruntime is not
            installed, or the output does not have the shape (1, classes, tile_px, tile_px).
    """
    settings = _read_settings(path.with_suffix(".toml"))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"--tissue: cannot read {path}: {error.strerror}") from error
    digest = hashlib.sha256(content + canonical_json(asdict(settings)).encode()).hexdigest()
    forward = _load_onnx(path, settings.tile_px) if path.suffix.lower() == ".onnx" else _load_torchscript(path)
    network = Network(name=path.name, digest=digest, settings=settings, forward=forward)
    segment_tile(network, np.full((settings.tile_px, settings.tile_px, 3), 255, np.uint8))
    return network


def segment_tile(network: Network, tile: Rgb) -> TissueMask:
    """Find tissue on one tile of `tile_px` squared, bool (tile_px, tile_px).

    Raises:
        UsageError: The network cannot take it, or its output does not have the shape (1, classes, tile_px, tile_px).
    """
    s = network.settings
    mean, std = np.array(s.mean, np.float32), np.array(s.std, np.float32)
    scaled = (tile.astype(np.float32) / np.float32(255) - mean) / std
    output = network.forward(np.ascontiguousarray(scaled.transpose(2, 0, 1)[None]))
    wanted = f"(1, classes, {s.tile_px}, {s.tile_px})"
    if not isinstance(output, np.ndarray):
        raise UsageError(f"--tissue {network.name}: expected one output of shape {wanted}, got {type(output).__name__}")
    if output.ndim != 4 or output.shape != (1, output.shape[1] or 1, s.tile_px, s.tile_px):
        raise UsageError(f"--tissue {network.name}: expected an output of shape {wanted}, got {output.shape}")
    classes = output.shape[1]
    if classes == 1:
        return output[0, 0] >= s.threshold
    if max(s.tissue_classes) >= classes:
        raise UsageError(
            f"--tissue {network.name}: it has {classes} classes, tissue_classes asks for {list(s.tissue_classes)}"
        )
    return np.isin(output[0].argmax(axis=0), s.tissue_classes)


def network_tissue(network: Network, slide: Slide, frame: Frame) -> TissueMask:
    """Find tissue on a slide, bool (height, width) of the frame, from the middles of overlapping tiles.

    A tile covers a whole number of the frame's pixels, so its scale may differ from the wanted one by half of such a
    pixel. A pixel of the frame is tissue if at least half of the network's output in it is.

    Raises:
        ReadError: The slide cannot be decoded.
        UsageError: The network's output cannot be used.
    """
    s = network.settings
    side = max(round(s.tile_px * s.mpp / frame.mpp), 3)
    edge = max(1, round(side * OVERLAP))
    fine = slide.thumbnail_frame(Mpp(s.mpp))
    finer = frame.downsample / fine.downsample
    width, height = frame.size
    mask = np.zeros((height, width), bool)
    for left, top in _tile_corners(width, height, side - 2 * edge, edge):
        window = round(left * finer), round(top * finer), round(side * finer), round(side * finer)
        pixels = slide.read_thumbnail(Mpp(s.mpp), window).image
        tissue = segment_tile(network, _resized(pixels, s.tile_px)).astype(np.float32)
        share = _resized(tissue, side)[edge : side - edge, edge : side - edge]
        y, x = top + edge, left + edge
        part = mask[y : y + len(share), x : x + len(share)]
        part[:] = share[: part.shape[0], : part.shape[1]] >= 0.5
    return mask


def _tile_corners(width: int, height: int, step: int, edge: int) -> Iterator[tuple[int, int]]:
    """Upper left corners of the tiles whose middles, of side `step`, cover the frame."""
    for top in range(0, height, step):
        for left in range(0, width, step):
            yield left - edge, top - edge


def _resized(image: np.ndarray, side: int) -> np.ndarray:
    if image.shape[:2] == (side, side):
        return image
    interpolation = cv2.INTER_AREA if image.shape[0] > side else cv2.INTER_LINEAR
    return cv2.resize(image, (side, side), interpolation=interpolation)


# ---- files ------------------------------------------------------------------------------------------------------


def _read_settings(path: Path) -> NetworkSettings:
    """The settings in a TOML file, or the defaults if there is no file."""
    if not path.exists():
        return NetworkSettings()
    try:
        table = parse_toml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--tissue: cannot read {path}: {error}") from error
    known = get_type_hints(NetworkSettings, include_extras=True)
    if unknown := sorted(set(table) - set(known)):
        raise UsageError(f"{path}: unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")
    try:  # as JSON, whose lists are tuples and whose whole numbers are numbers even where types are strict
        TypeAdapter(NetworkSettings).validate_json(json.dumps(table, default=str), strict=True)
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        raise UsageError(
            f"{path}: {key} must be {known[key].__metadata__[0].description}, not {table[key]!r}"
        ) from error
    # Built from the values as they are written, since the network's digest tells 1 from 1.0.
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in table.items()}
    settings = NetworkSettings(**values)
    if settings.tile_px * settings.mpp < SMALLEST_TILE_UM:
        raise UsageError(f"{path}: tile_px times mpp must be at least {SMALLEST_TILE_UM:g} um")
    return settings


def _load_torchscript(path: Path) -> Forward:
    import warnings

    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # torch deprecates TorchScript, but its files are in use
            module = torch.jit.load(path, map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"--tissue: {path} is no TorchScript file (torch.jit.save): {reason}") from error

    def forward(batch: Float32[np.ndarray, "1 3 height width"]) -> Any:
        try:
            with torch.inference_mode():
                output = module(torch.from_numpy(batch))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UsageError(f"--tissue {path.name}: it cannot take an input of {batch.shape}: {reason}") from error
        return output.float().numpy() if isinstance(output, torch.Tensor) else output

    return forward


def _load_onnx(path: Path, tile_px: int) -> Forward:
    try:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as state
    except ImportError as error:
        raise UsageError(f'--tissue {path}: ONNX files need onnxruntime: pip install "g2l[onnx]"') from error
    refusals = (state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf, state.RuntimeException)
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except (*refusals, state.NotImplemented) as error:
        raise UsageError(f"--tissue: onnxruntime cannot load {path}: {error}") from error
    inputs = session.get_inputs()
    if len(inputs) != 1 or len(session.get_outputs()) != 1:
        raise UsageError(
            f"--tissue {path.name}: expected one input and one output, got {len(inputs)} and "
            f"{len(session.get_outputs())}"
        )

    def forward(batch: Float32[np.ndarray, "1 3 height width"]) -> Any:
        try:
            return session.run(None, {inputs[0].name: batch})[0]
        except refusals as error:
            raise UsageError(
                f"--tissue {path.name}: it cannot take an input of {(1, 3, tile_px, tile_px)}: {error}"
            ) from error

    return forward

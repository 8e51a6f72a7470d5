"""Build an encoder's network, fill it with its weights, and run it."""

import hashlib
import importlib.util
import os
import pickle
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from g2l_core.architectures import build_architecture
from g2l_core.encoders import EncoderSpec, encoder_key, spec_to_json
from g2l_core.errors import EncoderError, UnknownNameError, UsageError
from g2l_core.hub import hub_file
from g2l_core.layouts import state_dict_in_timm_layout
from g2l_core.store.provenance import digest

_UNREADABLE = (
    OSError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError,
    struct.error, SafetensorError,
)  # fmt: skip
"""What safetensors and torch's unpickler raise on bytes that are none of theirs; KeyError on plain text, say."""

COMPILED = "+compile"
"""Ending of a precision whose network went through torch.compile: it rounds otherwise, by about 1e-6 in float32."""

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class PatchEncoder(nn.Module):
    """From uint8 views to pooled features: resampling, normalisation, network, pooling."""

    def __init__(self, network: nn.Module, spec: EncoderSpec) -> None:
        super().__init__()
        self.network = network
        self.input_px = spec.input_px
        self.pooling = spec.pooling
        self.interpolation = spec.interpolation
        prefix = getattr(network, "num_prefix_tokens", 0)
        if spec.pooling != "native" and prefix < 1:
            raise EncoderError(
                f"{spec.name}: pooling {spec.pooling!r} needs class and patch tokens, which "
                f"{spec.architecture} has not; use native"
            )
        self.prefix_tokens = prefix
        self.register_buffer("mean", 255 * torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: UInt8[Tensor, "batch height width 3"]) -> Float[Tensor, "batch dim"]:
        """Features of a batch of views.

        Args:
            pixels: uint8, red green blue. Kept as channels_last memory, which convolutions prefer.
        """
        images = pixels.permute(0, 3, 1, 2).float()
        if images.shape[-1] != self.input_px:
            images = resample(images, self.input_px, self.interpolation)
        return self.pooled((images - self.get_buffer("mean")) / self.get_buffer("std"))

    def pooled(self, images: Float[Tensor, "batch 3 side side"]) -> Float[Tensor, "batch dim"]:
        """Features of normalised images of the network's own input size."""
        if self.pooling == "native":
            return self.network(images)
        tokens = self.network.forward_features(images)  # type: ignore[operator]
        class_token, patch_tokens = tokens[:, 0], tokens[:, self.prefix_tokens :]
        match self.pooling:
            case "cls":
                return class_token
            case "tokens":
                return patch_tokens.flatten(1)
            case "mean":
                return patch_tokens.mean(dim=1)
            case _:
                return torch.cat([class_token, patch_tokens.mean(dim=1)], dim=1)


def resample(
    images: Float[Tensor, "batch 3 height width"], side: int, interpolation: str
) -> Float[Tensor, "batch 3 side side"]:
    """Images of grey levels 0 to 255 at another size, as Pillow resizes them: that is what models were trained on.

    Pillow resamples the rows, then the columns, and rounds to whole levels within 0 to 255 after each; clipping only
    at the end differs from it by up to 7 levels where bright edges overshoot.
    """
    for size in ((images.shape[2], side), (side, side)):
        images = functional.interpolate(images, size=size, mode=interpolation, antialias=True)
        images = (images + 0.5).floor().clamp(0, 255)
    return images


@dataclass(frozen=True, kw_only=True)
class LoadedEncoder:
    """An encoder ready to run."""

    spec: EncoderSpec
    module: PatchEncoder
    dim: int
    precision: str
    weights_digest: str
    """sha256 of the tensors; equal for two files with equal tensors."""
    digest: str
    """sha256 of all that decides its features: weights, architecture, preprocessing, pooling, precision."""
    device: torch.device

    @property
    def key(self) -> str:
        """Its name in stores."""
        return encoder_key(self.spec, self.digest)

    @property
    def facts(self) -> dict[str, Any]:
        """What a store keeps of it."""
        return {
            **spec_to_json(self.spec),
            "dim": self.dim,
            "precision": self.precision,
            "weights_digest": self.weights_digest,
            "digest": self.digest,
        }


def load_encoder(spec: EncoderSpec, *, device: str = "auto", precision: str = "auto") -> LoadedEncoder:
    """Build the network, fill it, and check it.

    Args:
        spec: The encoder.
        device: auto, cpu or cuda.
        precision: auto (fp32 on CPU, the card's on a GPU), fp32, bf16 or fp16; each may end in `+compile`.

    Raises:
        EncoderError: The weights cannot be had or do not fit, or the feature size is not the card's.
        UsageError: The device or precision cannot be had.
    """
    where = choose_device(device)
    how = choose_precision(spec, where, precision)
    network = build_network(spec)
    weights_digest = state_digest(network.state_dict())
    module = PatchEncoder(network, spec).eval().requires_grad_(False)
    module = module.to(where).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    dim = _feature_size(module, where)
    if spec.dim not in {None, dim}:
        raise EncoderError(f"{spec.name} gives {dim} features, its card says {spec.dim}: wrong weights or pooling")
    if how.endswith(COMPILED):
        module.compile()
    return LoadedEncoder(
        spec=spec,
        module=module,
        dim=dim,
        precision=how,
        weights_digest=weights_digest,
        digest=spec_digest(spec, weights_digest, how),
        device=where,
    )


def spec_digest(spec: EncoderSpec, weights_digest: str, precision: str) -> str:
    """sha256 over all that decides an encoder's features."""
    deciding = ("architecture", "arguments", "input_px", "mean", "std", "interpolation", "pooling")
    fields = spec_to_json(spec)
    how = {"weights": weights_digest, "precision": precision, "resampling": "pillow"}
    return digest({**{f: fields[f] for f in deciding}, **how})


def choose_device(device: str) -> torch.device:
    """The device a user means.

    Raises:
        UsageError: It is unknown or absent.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("--device cuda: this torch sees no GPU; use --device cpu, or install a CUDA build of torch")
    here = ["cpu", "cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if device not in here:
        raise UnknownNameError("device", device, ["auto", *here])
    return torch.device(device)


def choose_precision(spec: EncoderSpec, device: torch.device, precision: str) -> str:
    """The precision a user means: auto is fp32 on CPU and the card's on a GPU.

    Raises:
        UnknownNameError: There is none of that name.
        UsageError: It is to be compiled, and there is no compiler.
    """
    asked, compiled = precision.removesuffix(COMPILED), precision.endswith(COMPILED)
    if asked == "auto":
        asked = spec.card_precision if device.type == "cuda" else "fp32"
    if asked not in DTYPES:
        raise UnknownNameError("precision", precision, ["auto", *DTYPES])
    if compiled and device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise UsageError("--compile on a CPU needs a C++ compiler: install g++, or leave --compile out")
    return asked + COMPILED if compiled else asked


def build_network(spec: EncoderSpec) -> nn.Module:
    """The network with its weights, on the CPU, in float32, without classifier.

    Raises:
        EncoderError: The weights cannot be had or do not fit.
    """
    source, _, where = spec.weights.partition(":")
    network = build_architecture(spec.architecture, spec.arguments, int(where) if source == "random" else 0)
    if source not in {"random", "module"}:
        tensors = read_tensors(weights_file(spec))
        state = state_dict_in_timm_layout(tensors, spec.layout, network.state_dict(), spec.name)
        network.load_state_dict(state, strict=True)
    return network


def weights_file(spec: EncoderSpec) -> Path:
    """The local file that holds the encoder's weights, downloaded if it comes from the hub.

    Raises:
        EncoderError: It cannot be had.
    """
    source, _, where = spec.weights.partition(":")
    match source:
        case "file":
            return Path(where)
        case "run":
            return Path(where) / "model.safetensors"
        case "package":
            return _package_file(spec, where)
        case _:
            return hub_file(spec, where)


def _package_file(spec: EncoderSpec, where: str) -> Path:
    package, _, pattern = where.partition("/")
    found = importlib.util.find_spec(package)
    files = sorted(Path(found.origin).parent.glob(pattern)) if found and found.origin else []
    if not files:
        raise EncoderError(f"{spec.name} needs the package {package.replace('_', '-')}: pip install it")
    return files[0]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or torch file, in the file's order.

    Raises:
        EncoderError: It is neither, or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise EncoderError(
            f"{path} is refused: its pickle is damaged, or holds more than tensors and could run code. "
            "Give safetensors, or a torch file of a plain state dict"
        ) from error
    except _UNREADABLE as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise EncoderError(
            f"{path} is no weights file that can be read (safetensors, or a torch file of tensors): {reason}"
        ) from error
    for wrapper in ("state_dict", "model", "teacher"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    named = isinstance(content, Mapping) and all(isinstance(name, str) for name in content)
    if not named or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise EncoderError(f"{path} holds no state dict (a mapping from names to tensors)")
    return dict(content)


def state_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of all tensors, in the order of their names."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _feature_size(module: PatchEncoder, device: torch.device) -> int:
    with torch.inference_mode():
        blank = torch.zeros(1, module.input_px, module.input_px, 3, dtype=torch.uint8, device=device)
        return int(module(blank).shape[1])


def encode(
    encoder: LoadedEncoder, pixels: UInt8[np.ndarray, "batch height width 3"]
) -> Float32[np.ndarray, "batch dim"]:
    """Features of a batch of views.

    A view's features do not depend on its neighbours in the batch, as long as the batch size stays the same:
    pad the last batch (see `padded_batches`).
    """
    batch = torch.from_numpy(pixels).to(encoder.device, non_blocking=True)
    return features_of(encoder, batch).cpu().numpy()


def features_of(encoder: LoadedEncoder, pixels: UInt8[Tensor, "batch height width 3"]) -> Float32[Tensor, "batch dim"]:
    """Features of a batch of views that is on the encoder's device already, without gradients."""
    dtype = DTYPES[encoder.precision.removesuffix(COMPILED)]
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(encoder.device.type, dtype)
    with torch.no_grad(), autocast:
        features: Tensor = encoder.module(pixels).float()
    return features


def padded_batches(n: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """Ranges [start, stop) of at most `batch_size` covering n rows."""
    for start in range(0, n, batch_size):
        yield start, min(start + batch_size, n)


def encode_all(
    encoder: LoadedEncoder, pixels: UInt8[np.ndarray, "n height width 3"], batch_size: int
) -> Float32[np.ndarray, "n dim"]:
    """Features of any number of views, in batches of one static size, the last one padded with blanks."""
    out = np.empty((len(pixels), encoder.dim), np.float32)
    for start, stop in padded_batches(len(pixels), batch_size):
        batch = np.zeros((batch_size, *pixels.shape[1:]), np.uint8)
        batch[: stop - start] = pixels[start:stop]
        out[start:stop] = encode(encoder, batch)[: stop - start]
    return out


def require_mpp(spec: EncoderSpec, mpp: float) -> None:
    """Refuse patches at a scale that the encoder's card does not name.

    Raises:
        UsageError: They differ by more than 10 % from every scale of the card.
    """
    if not spec.fits_mpp(mpp):
        others = "".join(f" or {known:g}" for known in spec.also_mpp)
        raise UsageError(
            f"{spec.name} expects {spec.mpp:g}{others} um/px, the store's patches have {mpp:g}. "
            f"Use --mpp {spec.mpp:g}, or --force-mpp to encode them all the same"
        )

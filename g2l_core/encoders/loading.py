"""Build an encoder's network, fill it with its weights, and run it."""

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor, nn

from g2l_core.encoders.architectures import build_architecture
from g2l_core.encoders.exported import RUNTIMES, export_digest, read_export_record, require_intact
from g2l_core.encoders.networks import choose_network
from g2l_core.encoders.patch_encoder import PatchEncoder, require_whole_steps, side_step
from g2l_core.encoders.resolve import (
    RESTORE,
    STUDENT_RECORD,
    EncoderSpec,
    encoder_key,
    read_student_record,
    spec_to_json,
)
from g2l_core.encoders.runtimes import SessionNetwork
from g2l_core.encoders.spec import spec_digest
from g2l_core.encoders.trust import code_of, require_trusted
from g2l_core.encoders.weight_files import preprocessing_beside
from g2l_core.encoders.weights import read_networks, state_digest, weights_content, weights_file
from g2l_core.errors import EncoderError, UnknownNameError, UsageError
from g2l_core.store.facts import EncoderFacts

_log = logging.getLogger(__name__)

COMPILED = "+compile"
"""Suffix of a precision with torch.compile, which changes features by about 1e-6 in float32."""

RUNTIME_FACTS = "runtime"
"""The key of `LoadedEncoder.runtime` in what a store keeps of an encoder."""

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class LoadedEncoder:
    """An encoder ready to run."""

    spec: EncoderSpec
    module: PatchEncoder
    dim: int
    precision: str
    weights_digest: str
    """sha256 of the tensors, which is equal for two files with equal tensors."""
    digest: str
    """sha256 of everything that decides its features: weights, architecture, preprocessing, pooling and precision."""
    device: torch.device
    notes: tuple[str, ...] = ()
    """What a reader of results must know of how the weights were read."""
    runtime: Mapping[str, Any] | None = None
    """Of an exported student: the runtime, its version, the form, the student's digest and how near its features are.
    None where torch runs it."""

    @property
    def key(self) -> str:
        """Its key in stores."""
        return encoder_key(self.spec, self.digest)

    @property
    def facts(self) -> EncoderFacts:
        """What a store keeps of it."""
        found: dict[str, Any] = {
            "precision": self.precision,
            "weights_digest": self.weights_digest,
            "digest": self.digest,
        }
        if self.runtime is not None:
            found[RUNTIME_FACTS] = dict(self.runtime)
        return EncoderFacts.from_json({**spec_to_json(self.spec), "dim": self.dim, **found})


def load_encoder(spec: EncoderSpec, *, device: str = "auto", precision: str = "auto") -> LoadedEncoder:
    """Build the network, fill it, and check it.

    Args:
        spec: The encoder.
        device: auto, cpu or cuda.
        precision: auto (fp32 on CPU, the card's on a GPU), fp32, bf16 or fp16; each may end in `+compile`. An exported
            student has its own, which ends in its runtime, as in `int8+onnx`.

    Raises:
        EncoderError: The weights cannot be read or do not fit, the number of features is not the card's, or a student's
            weights are not those that its record names.
        UsageError: The device or precision is unknown or not available.
    """
    target = _device_of(spec, device)
    precision = choose_precision(spec, target, precision)
    if spec.is_export:
        return _load_exported(spec, precision)
    network, notes = _network_and_notes(spec)
    weights_digest = state_digest(network.state_dict())
    if spec.source.kind == "run":
        _require_recorded(Path(spec.source.where), weights_digest)
    module = PatchEncoder(network, spec).eval().requires_grad_(False)
    module = module.to(target).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    dim = _feature_size(module, target)
    if spec.dim not in {None, dim}:
        raise EncoderError(f"{spec.name} gives {dim} features, its card says {spec.dim}: wrong weights or pooling")
    if precision.endswith(COMPILED):
        module.compile()
    return LoadedEncoder(
        spec=spec,
        module=module,
        dim=dim,
        precision=precision,
        weights_digest=weights_digest,
        digest=spec_digest(spec, weights_digest, precision),
        device=target,
        notes=notes,
    )


def _load_exported(spec: EncoderSpec, precision: str) -> LoadedEncoder:
    """An exported student in its runtime, on the CPU; pixels are prepared by torch as for any encoder."""
    folder = Path(spec.source.where)
    record = read_export_record(folder)
    require_intact(folder, record)
    network = SessionNetwork(folder / next(iter(record["files"])), record["runtime"], batch=record["batch"])
    module = PatchEncoder(network, replace(spec, pooling="native")).eval()  # the network pools
    weights_digest = export_digest(record)
    told = ("form", "student_digest", "gate")
    return LoadedEncoder(
        spec=spec,
        module=module,
        dim=_feature_size(module, torch.device("cpu")),
        precision=precision,
        weights_digest=weights_digest,
        digest=spec_digest(spec, weights_digest, precision),
        device=torch.device("cpu"),
        runtime={"name": record["runtime"], "version": network.version, **{key: record[key] for key in told}},
    )


WEIGHTS_CONTENT = "weights_content"
"""Key of `weights.weights_content` in what a store keeps of an encoder."""


def stored_facts(encoder: LoadedEncoder) -> EncoderFacts:
    """What a store keeps of an encoder, with what tells later whether its weights are still the same."""
    try:
        content = weights_content(encoder.spec)
    except EncoderError:
        content = None
    facts = replace(encoder.facts, weights_notes=encoder.notes)
    return replace(facts, extra={**facts.extra, WEIGHTS_CONTENT: content}) if content else facts


def stored_key(
    spec: EncoderSpec, stored: Mapping[str, EncoderFacts], *, device: str = "auto", precision: str = "auto"
) -> str | None:
    """The key of the stored encoder that `load_encoder` would give, found without loading it.

    Returns:
        None where it is not stored, or where only loading tells.

    Raises:
        UsageError: The device or precision is unknown or not available.
    """
    precision = choose_precision(spec, _device_of(spec, device), precision)
    fitting = [
        key
        for key, facts in stored.items()
        if (facts.weights, facts.precision) == (spec.weights, precision)
        and facts.digest == spec_digest(spec, facts.weights_digest, precision)
        and key == encoder_key(spec, facts.digest)
    ]
    if not fitting:
        return None
    try:
        content = weights_content(spec)
    except EncoderError:
        return None
    same = [key for key in fitting if stored[key].extra.get(WEIGHTS_CONTENT, "") == content]
    return same[0] if same else None


def _device_of(spec: EncoderSpec, device: str) -> torch.device:
    """The device that a user names; auto is the CPU for an exported student."""
    return choose_device("cpu" if device == "auto" and spec.is_export else device)


def _require_recorded(student: Path, weights_digest: str) -> None:
    """Refuse a student whose weights are not those that were written."""
    recorded = read_student_record(student / STUDENT_RECORD)["weights_digest"]
    if weights_digest != recorded:
        raise EncoderError(
            f"{student / 'model.safetensors'} does not hold the weights that {STUDENT_RECORD} names: their digest is "
            f"{weights_digest[:12]}, not {recorded[:12]}. {RESTORE}"
        )


def choose_device(device: str) -> torch.device:
    """The device that a user names; auto is a GPU if there is one.

    Raises:
        UsageError: The device is unknown or absent.
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
    """The precision that a user names; auto is fp32 on CPU and the card's on a GPU.

    Raises:
        UnknownNameError: There is no such precision.
        UsageError: The network is to be compiled, but there is no compiler.
    """
    if spec.is_export:
        return _export_precision(spec, device, precision)
    asked, compiled = precision.removesuffix(COMPILED), precision.endswith(COMPILED)
    if asked == "auto":
        asked = spec.card_precision if device.type == "cuda" else "fp32"
    if asked not in DTYPES:
        raise UnknownNameError("precision", precision, ["auto", *DTYPES])
    if compiled and device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise UsageError("--compile on a CPU needs a C++ compiler: install g++, or leave --compile out")
    return asked + COMPILED if compiled else asked


def _export_precision(spec: EncoderSpec, device: torch.device, precision: str) -> str:
    own = spec.card_precision
    number, _, runtime = own.rpartition("+")
    if precision not in {"auto", own, number}:
        raise UsageError(
            f"{spec.source.where} computes in {number} with {RUNTIMES[runtime]}; --precision {precision} and --compile "
            "are for torch. Leave them out"
        )
    if device.type != "cpu":
        raise UsageError(f"{spec.source.where} runs on the CPU; give --device cpu, or the run folder for the GPU")
    return own


def build_network(spec: EncoderSpec) -> nn.Module:
    """Build the network with its weights, on the CPU, in float32, without classifier.

    Raises:
        EncoderError: The weights cannot be read or do not fit, or a file names code that was not trusted.
    """
    return _network_and_notes(spec)[0]


def _network_and_notes(spec: EncoderSpec) -> tuple[nn.Module, tuple[str, ...]]:
    """The network with its weights, and what of the file was chosen or is doubtful, which is also logged."""
    require_trusted(code_of(spec), spec.named_in)
    source = spec.source
    network = build_architecture(spec.architecture, spec.arguments, int(source.where) if spec.is_untrained else 0)
    if source.kind in {"random", "module"}:
        return network, ()
    file = weights_file(spec)
    chosen = choose_network(
        read_networks(file),
        network.state_dict(),
        layout=spec.layout,
        name=spec.name,
        file=str(file),
        asked=source.network,
    )
    network.load_state_dict(chosen.state, strict=True)
    if chosen.key and not chosen.note:
        _log.warning("%s: the weights are those under %r in %s", spec.name, chosen.key, file)
    notes = tuple(filter(None, (chosen.note, *_other_preprocessing(spec, file))))
    for note in notes:
        _log.warning("%s: %s (%s)", spec.name, note, file)
    return network, notes


def _other_preprocessing(spec: EncoderSpec, file: Path) -> list[str]:
    """What the files beside the weights of a hub snapshot say otherwise than the encoder's spec, which is followed."""
    beside = preprocessing_beside(file) if spec.source.kind == "file" else {}
    return [
        f"{key} {list(getattr(spec, key))} is used, the files beside its weights say {values}"
        for key, values in beside.items()
        if not np.allclose(values, getattr(spec, key), atol=1e-3)
    ]


def _feature_size(module: PatchEncoder, device: torch.device) -> int:
    with torch.inference_mode():
        blank = torch.zeros(1, module.input_px, module.input_px, 3, dtype=torch.uint8, device=device)
        return int(module(blank).shape[1])


def encode(
    encoder: LoadedEncoder, pixels: UInt8[np.ndarray, "batch height width 3"]
) -> Float32[np.ndarray, "batch dim"]:
    """Compute the features of a batch of views.

    A view's features do not depend on the other views of its batch as long as the batch size stays the same. So pad the
    last batch (see `padded_batches`).
    """
    batch = torch.from_numpy(pixels).to(encoder.device, non_blocking=True)
    return features_of(encoder, batch).cpu().numpy()


def features_of(encoder: LoadedEncoder, pixels: UInt8[Tensor, "batch height width 3"]) -> Float32[Tensor, "batch dim"]:
    """Compute the features of a batch of views that is on the encoder's device already, without gradients."""
    dtype = DTYPES.get(encoder.precision.removesuffix(COMPILED), torch.float32)  # runtimes take and give float32
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(encoder.device.type, dtype)
    with torch.no_grad(), autocast:
        features: Tensor = encoder.module(pixels).float()
    return features


def padded_batches(n: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """Yield ranges [start, stop) of at most `batch_size` rows that cover n rows."""
    for start in range(0, n, batch_size):
        yield start, min(start + batch_size, n)


def encode_all(
    encoder: LoadedEncoder, pixels: UInt8[np.ndarray, "n height width 3"], batch_size: int
) -> Float32[np.ndarray, "n dim"]:
    """Compute the features of any number of views in batches of one size. The last batch is padded with zeros."""
    out = np.empty((len(pixels), encoder.dim), np.float32)
    for start, stop in padded_batches(len(pixels), batch_size):
        batch = np.zeros((batch_size, *pixels.shape[1:]), np.uint8)
        batch[: stop - start] = pixels[start:stop]
        out[start:stop] = encode(encoder, batch)[: stop - start]
    return out


def require_input_side(spec: EncoderSpec) -> None:
    """Refuse an input whose last pixels the network would not see, without its weights and without memory for them.

    Only `load_encoder` tells of networks that a user's function builds.

    Raises:
        UsageError: The side is no multiple of the network's step. The message names the next sizes.
    """
    if code_of(spec):
        return
    with suppress(NotImplementedError), torch.device("meta"):  # a network that computes with its weights as it is built
        step = side_step(build_architecture(spec.architecture, spec.arguments, seed=0))
        require_whole_steps(spec, step)


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

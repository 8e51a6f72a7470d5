"""Convert a student to the formats of other programs, and open what was written. `student_export` judges the result."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from g2l_core.encoders.loading import LoadedEncoder
from g2l_core.encoders.patch_encoder import PatchEncoder
from g2l_core.encoders.runtimes import require_runtime
from g2l_core.encoders.student_folder import write_json, write_tensors
from g2l_core.encoders.weight_layouts import state_dict_in_transformers_layout
from g2l_core.errors import EncoderError
from g2l_core.files import replacing

QUANTIZED = ("Conv", "MatMul", "Gemm")
"""Operators that get 8-bit integers. Norms, softmax and activations stay float32: they cost little time, and much of
the features of transformers if they are rounded."""

CALIBRATION_BATCH = 16


class NormalizedEncoder(nn.Module):
    """The exported network, from normalized images (batch, 3, px, px) to features; preprocessing.json says the rest."""

    def __init__(self, encoder: PatchEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        """Features, float32 (batch, dim)."""
        return self.encoder.pooled(images)


@dataclass(frozen=True, kw_only=True)
class LinearClassifier:
    """A head that is one linear layer on a patch's features, for programs that run classifiers."""

    classes: tuple[str, ...]
    weights: Float[np.ndarray, "class dim"]
    bias: Float[np.ndarray, " class"]
    mpp: float
    """Micrometers per pixel of its patches."""
    patch_px: int
    """Side of the pixels that the encoder sees of a patch."""


class Classifier(nn.Module):
    """From normalized images to the logits of classes."""

    def __init__(self, encoder: PatchEncoder, head: LinearClassifier) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(head.weights.shape[1], len(head.classes))
        self.head.load_state_dict({"weight": torch.from_numpy(head.weights), "bias": torch.from_numpy(head.bias)})
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 (batch, class)."""
        return self.head(self.encoder.pooled(images))


def example_images(encoder: LoadedEncoder) -> Float[Tensor, "2 3 side side"]:
    """Two random images as the network takes them."""
    px = encoder.spec.input_px
    return torch.randn(2, 3, px, px, generator=torch.Generator().manual_seed(0))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep exporters from warning of every shape that is a Python number, and from logging their stages."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def write_torchscript(module: nn.Module, images: Tensor, path: Path) -> None:
    """Trace a module and save it."""
    with _quiet(), torch.inference_mode():
        traced = torch.jit.trace(module, images)
        buffer = io.BytesIO()  # on a full disk torch.jit.save ends the process
        torch.jit.save(traced, buffer)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def open_torchscript(path: Path) -> nn.Module:
    """A traced module as a network."""
    with _quiet():
        return torch.jit.load(path)


def write_onnx(encoder: LoadedEncoder, path: Path) -> None:
    """Write an ONNX file that takes batches of any size.

    Raises:
        UsageError: A package is missing.
    """
    require_runtime("onnx", "onnx", "onnxscript")
    with _quiet(), torch.inference_mode():
        torch.onnx.export(
            NormalizedEncoder(encoder.module), (example_images(encoder),), str(path), dynamo=True, verbose=False,
            input_names=["images"], output_names=["features"], external_data=False,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        )  # fmt: skip


def quantize_onnx(source: Path, path: Path) -> None:
    """Write 8-bit matrix products whose inputs are scaled as they come ("dynamic").

    Raises:
        EncoderError: The network has none: those of a convolutional network are convolutions.
        UsageError: A package is missing.
    """
    require_runtime("onnx", "onnx")
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(
            str(_prepared(source)), str(path), op_types_to_quantize=list(QUANTIZED[1:]), per_channel=True,
            weight_type=QuantType.QInt8,
        )  # fmt: skip
    _require_quantized(path, "MatMulInteger", "onnx-int8-dynamic")


def calibrate_onnx(source: Path, path: Path, images: list[np.ndarray]) -> None:
    """Write 8-bit convolutions and matrix products whose inputs are scaled by what patches gave ("static").

    Args:
        source: The float32 network.
        path: The file to write.
        images: Batches of normalized patches, float32 (batch, 3, side, side).

    Raises:
        UsageError: A package is missing.
    """
    require_runtime("onnx", "onnx")
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Patches(CalibrationDataReader):
        def __init__(self) -> None:
            self._left = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self._left, None)
            return None if batch is None else {"images": batch}

    with _quiet():
        quantize_static(
            str(_prepared(source)), str(path), Patches(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, op_types_to_quantize=list(QUANTIZED),
        )  # fmt: skip
    _require_quantized(path, "QuantizeLinear", "onnx-int8")


def _prepared(source: Path) -> Path:
    """The network with its shapes inferred and its constants folded, which the quantizer wants."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = source.with_name("prepared.onnx")
    quant_pre_process(str(source), str(prepared))
    return prepared


def _require_quantized(path: Path, operator: str, form: str) -> None:
    import onnx

    if not any(node.op_type == operator for node in onnx.load(str(path)).graph.node):
        path.unlink()
        raise EncoderError(
            f"nothing of this network can be made 8-bit as {form}: it would be the float32 network. "
            "Convolutional networks take onnx-int8, or stay as onnx"
        )


def write_openvino(encoder: LoadedEncoder, path: Path) -> None:
    """Write OpenVINO's two files, .xml and .bin, in float32, for batches of any size.

    Raises:
        UsageError: The package is missing.
    """
    package = require_runtime("openvino")
    images = example_images(encoder)
    with _quiet(), torch.inference_mode():
        model = package.convert_model(
            NormalizedEncoder(encoder.module),
            example_input=images,
            input=[package.PartialShape([-1, *images.shape[1:]])],
        )
    model.inputs[0].get_tensor().set_names({"images"})
    model.outputs[0].get_tensor().set_names({"features"})
    package.save_model(model, str(path), compress_to_fp16=False)


def calibration_images(
    encoder: LoadedEncoder, pixels: UInt8[np.ndarray, "n height width 3"]
) -> list[Float[np.ndarray, "batch 3 side side"]]:
    """Patches as the network takes them, in batches."""
    starts = range(0, len(pixels), CALIBRATION_BATCH)
    with torch.inference_mode():
        return [
            encoder.module.normalized(torch.from_numpy(pixels[start : start + CALIBRATION_BATCH])).numpy()
            for start in starts
        ]


def write_wsinfer(encoder: LoadedEncoder, head: LinearClassifier, folder: Path) -> None:
    """Write the folder that WSInfer and its QuPath extension run: torchscript_model.pt and config.json.

    config.json follows `model-config.schema.json` of wsinfer-zoo 0.6.3, spec_version 1.0. Patches are of the side and
    scale that the head was fitted on, WSInfer makes probabilities of the logits by softmax.
    """
    spec = encoder.spec
    transform: list[dict[str, Any]] = [{"name": "ToTensor"}]
    transform.append({"name": "Normalize", "arguments": {"mean": list(spec.mean), "std": list(spec.std)}})
    if spec.input_px != head.patch_px:
        code = {"bilinear": 2, "bicubic": 3}[spec.interpolation]  # Pillow's, which torchvision's Resize takes
        transform.insert(0, {"name": "Resize", "arguments": {"size": spec.input_px, "interpolation": code}})
    write_torchscript(Classifier(encoder.module, head), example_images(encoder), folder / "torchscript_model.pt")
    write_json(
        folder / "config.json",
        {
            "spec_version": "1.0",
            "architecture": spec.architecture,
            "num_classes": len(head.classes),
            "patch_size_pixels": head.patch_px,
            "spacing_um_px": head.mpp,
            "class_names": list(head.classes),
            "transform": transform,
        },
    )


def write_transformers(encoder: LoadedEncoder, folder: Path) -> None:
    """Write a Dinov2WithRegistersModel, whose pooler gives the class token after the norm.

    Raises:
        EncoderError: The network is no DINOv2 with registers.
    """
    network, spec = encoder.module.network, encoder.spec
    tensors = {k: t.contiguous() for k, t in state_dict_in_transformers_layout(network.state_dict()).items()}
    layers = sum(key.endswith(".norm1.weight") for key in tensors)
    width = tensors["embeddings.cls_token"].shape[2]
    write_json(
        folder / "config.json",
        {
            "architectures": ["Dinov2WithRegistersModel"],
            "model_type": "dinov2_with_registers",
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": network.blocks[0].attn.num_heads,  # type: ignore[index,union-attr]
            "mlp_ratio": 4,
            "use_swiglu_ffn": any(".mlp.weights_in." in key for key in tensors),
            "num_register_tokens": tensors["embeddings.register_tokens"].shape[1],
            "image_size": spec.input_px,
            "patch_size": tensors["embeddings.patch_embeddings.projection.weight"].shape[-1],
            "qkv_bias": True,
            "layer_norm_eps": 1e-6,
            "hidden_act": "gelu",
            "torch_dtype": "float32",
        },
    )
    size = {"height": spec.input_px, "width": spec.input_px}
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "BitImageProcessor", "do_resize": True, "size": size, "do_center_crop": False,
            "resample": {"bilinear": 2, "bicubic": 3}[spec.interpolation], "do_rescale": True, "do_normalize": True,
            "rescale_factor": 1 / 255, "image_mean": list(spec.mean), "image_std": list(spec.std),
            "do_convert_rgb": True,
        },
    )  # fmt: skip
    write_tensors(folder / "model.safetensors", tensors)


def open_transformers(folder: Path) -> nn.Module | None:
    """The written network in transformers, from images to its pooler's features; None where that is not installed."""
    try:
        from transformers import AutoModel
    except ImportError:
        return None

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_pretrained(folder).eval()

        def forward(self, images: Tensor) -> Tensor:
            return self.model(images).pooler_output

    with _quiet():
        return Pooled()

"""Export a student to other programs' formats. Each export is checked against the student before it is kept."""

import io
import json
import shutil
import warnings
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from g2l_core.encoders.loading import LoadedEncoder, load_encoder
from g2l_core.encoders.patch_encoder import PatchEncoder
from g2l_core.encoders.resolve import RESTORE, STUDENT_FOLDER, STUDENT_RECORD, EncoderSpec, run_encoder, spec_to_json
from g2l_core.encoders.student_folder import timm_config, write_json, write_tensors
from g2l_core.encoders.trust import with_trusted_code
from g2l_core.encoders.weight_layouts import state_dict_in_transformers_layout
from g2l_core.errors import EncoderError, RunError, UnknownNameError, UsageError, refuse_open_files, writing
from g2l_core.files import replacing
from g2l_core.store.locks import locked_output

FORMATS = ("timm", "torchscript", "onnx", "transformers")
TOLERANCE = 1e-4
"""Maximum relative difference of features, in float32, between the student and its export."""


class NormalizedEncoder(nn.Module):
    """The exported network, from normalized images (batch, 3, px, px) to features; preprocessing.json says the rest."""

    def __init__(self, encoder: PatchEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        """Features, float32 (batch, dim)."""
        return self.encoder.pooled(images)


def export_student(run: Path, form: str, out: Path, trusted: Collection[str] = ()) -> Path:
    """Write the student of a run for other programs.

    Args:
        run: The run folder.
        form: timm (a folder for `local-dir:` or the hub), torchscript, onnx, or transformers (only a DINOv2 with
            registers, in Hibou's own layout).
        out: The folder to make.
        trusted: Modules whose code may run if the run's record names it.

    Raises:
        UnknownNameError: There is no such format.
        RunError: `out` exists, is being written, or cannot be written to.
        EncoderError: The format cannot hold the student, or the export does not give its features.
        UsageError: A package is missing.
    """
    if form not in FORMATS:
        raise UnknownNameError("format", form, FORMATS)
    unfinished = out.with_name(out.name + ".partial")
    with writing(out), locked_output(unfinished):
        if out.exists():
            raise RunError(f"{out} exists; give another --out")
        encoder = load_encoder(with_trusted_code(run_encoder(run), trusted), device="cpu", precision="fp32")
        temporary = unfinished / "student"
        shutil.rmtree(temporary, ignore_errors=True)
        if form == "timm":
            _timm(encoder, run, temporary)
        else:
            temporary.mkdir()
            {"torchscript": _torchscript, "onnx": _onnx, "transformers": _transformers}[form](encoder, temporary)
            write_json(temporary / "preprocessing.json", preprocessing(encoder.spec))
            shutil.copy(run / STUDENT_FOLDER / "README.md", temporary / "README.md")
        temporary.rename(out)
    return out


def _timm(encoder: LoadedEncoder, run: Path, folder: Path) -> None:
    """Copy the student's folder, whose weights were checked when they were loaded."""
    shutil.copytree(run / STUDENT_FOLDER, folder)
    path = run / STUDENT_FOLDER / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if ":" not in encoder.spec.architecture else None
    except (OSError, ValueError, RecursionError) as error:
        refuse_open_files(error, path, EncoderError)
        raise EncoderError(f"{path} cannot be read ({error}). {RESTORE}") from error
    if config is not None and config != timm_config(encoder.module.network, encoder.spec):
        raise EncoderError(f"{path} does not describe the student of {STUDENT_RECORD}. {RESTORE}")


def preprocessing(spec: EncoderSpec) -> dict[str, object]:
    """How a patch becomes the network's input, as values that JSON can hold."""
    wanted = ("name", "input_px", "mean", "std", "interpolation", "pooling", "mpp")
    fields = spec_to_json(spec)
    return {
        **{key: fields[key] for key in wanted},
        "input": "float32 (batch, 3, input_px, input_px), red green blue, (pixels / 255 - mean) / std",
        "output": "float32 (batch, features)",
    }


def _example(encoder: LoadedEncoder) -> Tensor:
    px = encoder.spec.input_px
    return torch.randn(2, 3, px, px, generator=torch.Generator().manual_seed(0))


def _require_same(exported: Tensor, encoder: LoadedEncoder, images: Tensor, form: str) -> None:
    with torch.inference_mode():
        wanted = encoder.module.pooled(images)
    error = float((exported - wanted).abs().max() / wanted.abs().max())
    if not error <= TOLERANCE:
        raise EncoderError(
            f"the {form} export differs from the student by {error:.1e} of the largest feature; not written"
        )


def _torchscript(encoder: LoadedEncoder, folder: Path) -> None:
    images = _example(encoder)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # tracing warns of every shape that is a Python number
        traced = torch.jit.trace(NormalizedEncoder(encoder.module), images)
        buffer = io.BytesIO()  # on a full disk torch.jit.save ends the process
        torch.jit.save(traced, buffer)
        with replacing(folder / "model.pt") as file:
            file.write(buffer.getbuffer())
        loaded = torch.jit.load(folder / "model.pt")
        _require_same(loaded(images), encoder, images, "torchscript")
        three = torch.cat([images, images[:1]])
        _require_same(loaded(three), encoder, three, "torchscript")


def _onnx(encoder: LoadedEncoder, folder: Path) -> None:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise UsageError('ONNX needs two packages: pip install "g2l[onnx]"') from error
    images = _example(encoder)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            NormalizedEncoder(encoder.module), (images,), str(folder / "model.onnx"), dynamo=True, verbose=False,
            input_names=["images"], output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        )  # fmt: skip
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    for batch in (images, images[:1]):
        features = session.run(["features"], {"images": batch.numpy()})[0]
        _require_same(torch.from_numpy(features), encoder, batch, "onnx")


def _transformers(encoder: LoadedEncoder, folder: Path) -> None:
    """Write a Dinov2WithRegistersModel, whose pooler gives the class token after the norm."""
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

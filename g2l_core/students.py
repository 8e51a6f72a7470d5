"""A distilled student on disk: a folder that timm, and whoever reads timm's layout, loads without G2L."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from g2l_core.encoder_loading import PatchEncoder, spec_digest, state_digest
from g2l_core.encoders import STUDENT_FOLDER, STUDENT_RECORD, EncoderSpec, spec_to_json
from g2l_core.timm_bridge import import_timm


def write_student(run: Path, module: PatchEncoder, spec: EncoderSpec, *, trained_on: str) -> dict[str, Any]:
    """Write RUN/student so that `timm.create_model("local-dir:RUN/student", pretrained=True, num_classes=0)` loads it.

    Args:
        run: The run folder.
        module: The trained student, on any device.
        spec: What it was before training.
        trained_on: In words, what made its weights what they are.

    Returns:
        What encoder.json says: the spec, the digest of the tensors, and of the encoder in float32.
    """
    network = module.network.cpu()
    tensors = {name: tensor.detach().contiguous() for name, tensor in network.state_dict().items()}
    weights_digest = state_digest(tensors)
    spec = replace(spec, layout="timm", trained_on=trained_on)
    record = {
        **spec_to_json(spec),
        "weights_digest": weights_digest,
        "digest": spec_digest(spec, weights_digest, "fp32"),
    }
    temporary = run / f"{STUDENT_FOLDER}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
    _write_json(temporary / "config.json", timm_config(network, spec))
    _write_json(temporary / STUDENT_RECORD, record)
    shutil.rmtree(run / STUDENT_FOLDER, ignore_errors=True)
    temporary.rename(run / STUDENT_FOLDER)
    return record


def timm_config(network: nn.Module, spec: EncoderSpec) -> dict[str, Any]:
    """The config.json that timm's `local-dir:` and hub loading read: architecture, arguments, preprocessing."""
    config = import_timm().get_pretrained_cfg(spec.architecture)
    size = [3, spec.input_px, spec.input_px]
    return {
        "architecture": spec.architecture,
        "num_classes": 0,
        "num_features": getattr(network, "head_hidden_size", None) or getattr(network, "num_features", None),
        "model_args": dict(spec.arguments),
        "pretrained_cfg": {
            "input_size": size,
            "fixed_input_size": bool(config.fixed_input_size),
            "interpolation": spec.interpolation,
            "crop_pct": 1.0,
            "mean": list(spec.mean),
            "std": list(spec.std),
            "num_classes": 0,
            "first_conv": config.first_conv,
            "classifier": config.classifier,
        },
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

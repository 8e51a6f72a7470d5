"""Import timm, also where torchvision does not load, and read what it knows of an architecture."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from g2l_core.errors import UnknownNameError

_torchvision_schemas: list[torch.library.Library] = []


def import_timm() -> ModuleType:
    """Import timm, also on CPU-only clusters.

    torchvision's wheels are compiled for CUDA. With a CPU build of torch their extension does not load, and importing
    torchvision (as timm does) fails because the schemas of its operators are missing. So they are defined here if the
    extension cannot load. The operators themselves are never called.
    """
    if not hasattr(torch.ops.torchvision, "nms") and not _torchvision_extension_loads():
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _torchvision_schemas.append(library)  # the schemas live as long as this object
    import timm

    return timm


def _torchvision_extension_loads() -> bool:
    module = importlib.util.find_spec("torchvision")
    if module is None or module.origin is None:
        return True
    for extension in Path(module.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(extension)
        except OSError:
            return False
    return True


def timm_preprocessing(architecture: str) -> dict[str, Any]:
    """Architecture, input size, mean, std and interpolation of a timm architecture, as EncoderSpec's fields.

    Raises:
        UnknownNameError: timm has no such architecture, or not with that tag of pretrained weights.
    """
    timm = import_timm()
    if not timm.is_model(architecture):
        raise UnknownNameError("timm architecture", architecture, timm.list_models())
    try:
        config = timm.get_pretrained_cfg(architecture)
    except RuntimeError as error:
        tags = timm.list_pretrained(f"{architecture.partition('.')[0]}.*")
        raise UnknownNameError("timm architecture", architecture, tags) from error
    fields: dict[str, Any] = {
        "architecture": architecture,
        "input_px": config.input_size[-1],
        "mean": tuple(config.mean),
        "std": tuple(config.std),
        "interpolation": config.interpolation,
    }
    if config.fixed_input_size:
        fields["arguments"] = {"img_size": config.input_size[-1]}
    return fields

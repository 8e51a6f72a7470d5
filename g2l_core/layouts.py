"""Weights under other libraries' names, brought into timm's layout; strict: every tensor must find its place."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from g2l_core.errors import EncoderError, UnknownNameError

LAYOUTS = ("timm", "in-order", "transformers-dinov2")

TRANSFORMERS_NAMES: tuple[tuple[str, str], ...] = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (r"^encoder\.layer\.(\d+)\.attention\.attention\.", r"blocks.\1.attn."),
    (r"^encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1$", r"blocks.\1.ls\2.gamma"),
    (r"^encoder\.layer\.(\d+)\.mlp\.weights_in\.", r"blocks.\1.mlp.fc1."),
    (r"^encoder\.layer\.(\d+)\.mlp\.weights_out\.", r"blocks.\1.mlp.fc2."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"^layernorm\.", "norm."),
)
"""Names of transformers' Dinov2 and Dinov2WithRegisters, and timm's; the first that fits is used."""


def state_dict_in_timm_layout(
    tensors: Mapping[str, Tensor], layout: str, wanted: Mapping[str, Tensor], name: str
) -> dict[str, Tensor]:
    """Rename and reshape a weights file's tensors to those that the network wants.

    Args:
        tensors: As the file has them, in its order.
        layout: One of `LAYOUTS`.
        wanted: The network's own state dict, for names and shapes.
        name: The encoder, for messages.

    Raises:
        EncoderError: A tensor is missing, surplus or of another shape; names it.
    """
    match layout:
        case "timm":
            found = dict(tensors)
        case "in-order":
            found = _in_order(tensors, wanted)
        case "transformers-dinov2":
            found = _from_transformers(tensors)
        case _:
            raise UnknownNameError("weights layout", layout, LAYOUTS)
    found = {key: tensor for key, tensor in found.items() if not _is_classifier(key, wanted)}
    _require_fit(found, wanted, name)
    return found


def _is_classifier(key: str, wanted: Mapping[str, Tensor]) -> bool:
    """Whether a tensor belongs to a classifier that the network was built without."""
    return key.split(".")[0] in {"head", "classifier", "fc", "_fc"} and key not in wanted


def _require_fit(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], name: str) -> None:
    problems = [f"{key} is missing" for key in wanted if key not in found]
    problems += [f"{key} has no place" for key in found if key not in wanted]
    problems += [
        f"{key} is {tuple(tensor.shape)}, expected {tuple(wanted[key].shape)}"
        for key, tensor in found.items()
        if key in wanted and tensor.shape != wanted[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise EncoderError(f"{name}: the weights do not fit the architecture: {'; '.join(problems[:3])}{more}")


def _in_order(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors matched by position; those left over keep their own names (and so must be a classifier's)."""
    values = list(tensors.items())
    renamed = {key: tensor for key, (_, tensor) in zip(wanted, values, strict=False)}
    return renamed | dict(values[len(wanted) :])


def _from_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The DINOv2 of transformers: separate query, key and value; the class token's position embedding apart.

    timm's `no_embed_class` models add position embeddings to patch tokens only, so the class token's own is
    added to the class token, once, here. The mask token serves training alone.
    """
    stripped = {re.sub(r"^(dinov2|model|backbone)\.", "", key): tensor for key, tensor in tensors.items()}
    found = {_timm_name(key): t for key, t in stripped.items() if key != "embeddings.mask_token"}
    for key in [k for k in found if ".attn.query." in k]:
        parts = [key.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(part in found for part in parts):
            found[key.replace(".query.", ".qkv.")] = torch.cat([found.pop(part) for part in parts])
    if "pos_embed" in found and "cls_token" in found:
        positions = found["pos_embed"]
        found["cls_token"] = found["cls_token"] + positions[:, :1]
        found["pos_embed"] = positions[:, 1:]
    return found


def _timm_name(key: str) -> str:
    for pattern, replacement in TRANSFORMERS_NAMES:
        renamed, count = re.subn(pattern, replacement, key)
        if count:
            return renamed
    return key

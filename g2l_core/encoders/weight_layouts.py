"""Rename weights from other libraries' layouts to timm's, and back. Every tensor must find its place.

Tensors that are used only in training, and are left out, are named in `_TRAINING_ONLY`. Position embeddings of another
grid are resampled by the rule of the library that the weights come from.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from g2l_core.errors import EncoderError, UnknownNameError

LAYOUTS = ("auto", "timm", "in-order", "transformers-dinov2", "transformers-vit", "dinov2", "swin")

Names = tuple[tuple[str, str], ...]

_TRANSFORMERS: Names = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (r"^encoder\.layer\.(\d+)\.attention\.attention\.", r"blocks.\1.attn."),
)

TRANSFORMERS_DINOV2: Names = (
    *_TRANSFORMERS,
    (r"^encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1$", r"blocks.\1.ls\2.gamma"),
    (r"^encoder\.layer\.(\d+)\.mlp\.weights_in\.", r"blocks.\1.mlp.fc1."),
    (r"^encoder\.layer\.(\d+)\.mlp\.weights_out\.", r"blocks.\1.mlp.fc2."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"^layernorm\.", "norm."),
)
"""Names in transformers' Dinov2 and Dinov2WithRegisters, and in timm. The first pattern that fits is used."""

TRANSFORMERS_VIT: Names = (
    *_TRANSFORMERS,
    (r"^encoder\.layer\.(\d+)\.intermediate\.dense\.", r"blocks.\1.mlp.fc1."),
    (r"^encoder\.layer\.(\d+)\.output\.dense\.", r"blocks.\1.mlp.fc2."),
    (r"^encoder\.layer\.(\d+)\.layernorm_before\.", r"blocks.\1.norm1."),
    (r"^encoder\.layer\.(\d+)\.layernorm_after\.", r"blocks.\1.norm2."),
    (r"^layernorm\.", "norm."),
)
"""transformers' ViT."""

DINOV2: Names = (
    (r"^register_tokens$", "reg_token"),
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # blocks in chunks, as its FSDP training saves them
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
"""The original DINOv2 (facebookresearch/dinov2)."""

_PREFIXES = re.compile(
    r"^((module|backbone|dinov2|dinov2_with_registers|vit|model|net|network|student|teacher|ema|model_ema|ema_model|"
    r"online_model|online_encoder|target_encoder|base_encoder|momentum_encoder|encoder_q|encoder_k)\.|"
    r"encoder\.(?!layer\.))+"
)
"""Prefixes of a network that was saved as a part of another, for example by DDP, Lightning, DINO, MoCo and I-JEPA."""

_WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|_fpw_module)\."
)
"""What torch.compile, FSDP, activation checkpointing, Lightning Fabric and fairscale put into names, at any depth."""

_TRAINING_ONLY = re.compile(
    r"^(embeddings\.mask_token|mask_token|pooler\.|dino_head\.|ibot_head\.)|relative_position_index$|attn_mask$"
)
_CLASSIFIERS = {"head", "classifier", "fc", "_fc"}


@dataclass(frozen=True)
class _Resampling:
    """How a library resamples position embeddings to another grid. All of them do it bicubically in float32."""

    antialias: bool
    offset: float = 0.0
    """Added to the side of the new grid when the scale is computed. With 0 the size itself is given."""


def state_dict_in_timm_layout(
    tensors: Mapping[str, Tensor], layout: str, wanted: Mapping[str, Tensor], name: str
) -> dict[str, Tensor]:
    """Rename and reshape a weights file's tensors to those that the network wants.

    Args:
        tensors: The tensors of the file, in its order.
        layout: One of `LAYOUTS`.
        wanted: The network's own state dict, for names and shapes.
        name: The encoder, for messages.

    Raises:
        EncoderError: A tensor is missing, surplus or of another shape. The message names it.
        UnknownNameError: There is no such layout.
    """
    if layout not in LAYOUTS:
        raise UnknownNameError("weights layout", layout, LAYOUTS)
    if layout == "in-order":
        found = _in_order(tensors, wanted)
    else:
        tensors = in_wanted_names(tensors, wanted)
        if not any(key in wanted for key in tensors):  # a network of the user's own may have such names itself
            tensors = {without_prefix(key): tensor for key, tensor in tensors.items()}
        layout = layout_of(tensors, wanted) if layout == "auto" else layout
        kept = {key: tensor for key, tensor in tensors.items() if key in wanted or not _TRAINING_ONLY.search(key)}
        found = _renamed(kept, layout)
        _fit_positions(found, wanted, _resampling(layout, found))
    found = {key: tensor for key, tensor in found.items() if not _is_classifier(key, wanted)}
    _require_fit(found, wanted, name)
    return found


def in_wanted_names(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without what wrappers of training put into their names, unless the network has such names itself.

    Raises:
        EncoderError: Two tensors have one name then.
    """
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key if key in wanted else _WRAPPERS.sub("", key)
        if name in found:
            raise EncoderError(f"the weights file holds {name} twice, once as {key}. Save one network alone")
        found[name] = tensor
    return found


def without_prefix(key: str) -> str:
    """The name of a tensor in the network that was saved as a part of another."""
    return _PREFIXES.sub("", key)


def layout_of(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """The library that named these tensors: `timm` unless the names that are not wanted show another."""
    foreign = [key for key in tensors if key not in wanted]
    if "embeddings.cls_token" in foreign:
        return "transformers-vit" if "encoder.layer.0.layernorm_before.weight" in foreign else "transformers-dinov2"
    if "layers.0.downsample.reduction.weight" in foreign:
        return "swin"
    marks = re.compile(r"^register_tokens$|^mask_token$|\.mlp\.w12\.|^blocks\.\d+\.\d+\.")
    return "dinov2" if any(marks.search(key) for key in foreign) else "timm"


def _renamed(tensors: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    match layout:
        case "transformers-dinov2":
            return _joined_qkv({_translated(k, TRANSFORMERS_DINOV2): t for k, t in tensors.items()})
        case "transformers-vit":
            return _joined_qkv({_translated(k, TRANSFORMERS_VIT): t for k, t in tensors.items()})
        case "dinov2":
            return {_all_translated(k, DINOV2): t for k, t in tensors.items()}
        case "swin":  # the original joins tokens at a stage's end, timm at the next one's beginning
            return {
                re.sub(r"^layers\.(\d)\.down", lambda m: f"layers.{int(m[1]) + 1}.down", k): tensors[k] for k in tensors
            }
        case _:
            return dict(tensors)


def _translated(key: str, names: Names) -> str:
    """The key as renamed by the first pattern that fits."""
    for pattern, replacement in names:
        renamed, count = re.subn(pattern, replacement, key)
        if count:
            return renamed
    return key


def _all_translated(key: str, names: Names) -> str:
    """The key as renamed by every pattern in turn."""
    for pattern, replacement in names:
        key = re.sub(pattern, replacement, key)
    return key


def _joined_qkv(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join query, key and value into one matrix where all three exist."""
    for key in [k for k in found if ".attn.query." in k]:
        parts = [key.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(part in found for part in parts):
            found[key.replace(".query.", ".qkv.")] = torch.cat([found.pop(part) for part in parts])
    return found


def _resampling(layout: str, found: Mapping[str, Tensor]) -> _Resampling:
    """The rule of timm 1.0, of transformers 4.48 and 5, or of DINOv2's hub models with and without registers."""
    match layout:
        case "transformers-dinov2":
            return _Resampling(antialias="reg_token" in found)
        case "transformers-vit":
            return _Resampling(antialias=False)
        case "dinov2":
            return _Resampling(antialias=True) if "reg_token" in found else _Resampling(antialias=False, offset=0.1)
        case _:
            return _Resampling(antialias=True)


def _fit_positions(found: dict[str, Tensor], wanted: Mapping[str, Tensor], rule: _Resampling) -> None:
    """Bring position embeddings to the network's form: with or without the class token's, on the network's grid.

    timm's `no_embed_class` networks add position embeddings to patch tokens only. In other libraries the class token
    has one too. It is added to the class token here, once. Embeddings that are no square grid are left unchanged, and
    refused later.
    """
    positions, target = found.get("pos_embed"), wanted.get("pos_embed")
    if positions is None or target is None or positions.ndim != 3:
        return
    prefix, target_prefix = (_prefix_of(tensor.shape[1]) for tensor in (positions, target))
    if prefix is None or target_prefix is None or positions.shape[2] != target.shape[2]:
        return
    grid = _resampled(positions[:, prefix:], isqrt(target.shape[1] - target_prefix), rule)
    if prefix == 1 and target_prefix == 0 and "cls_token" in found:
        if positions[:, :1].any():  # adding zero would lose the sign of -0
            found["cls_token"] = found["cls_token"] + positions[:, :1]
        prefix = 0
    found["pos_embed"] = torch.cat([positions[:, :prefix], grid], dim=1)


def _prefix_of(tokens: int) -> int | None:
    """The number of tokens before a square grid: class token and registers, at most 16."""
    return next((n for n in range(min(17, tokens)) if isqrt(tokens - n) ** 2 == tokens - n), None)


def _resampled(grid: Float[Tensor, "1 token dim"], side: int, rule: _Resampling) -> Float[Tensor, "1 new_token dim"]:
    old = isqrt(grid.shape[1])
    if old == side:
        return grid
    image = grid.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    size: dict[str, object] = {"scale_factor": (side + rule.offset) / old} if rule.offset else {"size": (side, side)}
    image = functional.interpolate(image, mode="bicubic", antialias=rule.antialias, **size)  # type: ignore[arg-type]
    return image.permute(0, 2, 3, 1).reshape(1, side * side, -1).to(grid.dtype)


def _is_classifier(key: str, wanted: Mapping[str, Tensor]) -> bool:
    """Whether a tensor belongs to a classifier, which the network is built without."""
    return key.split(".")[0] in _CLASSIFIERS and key not in wanted


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
    """Match tensors by position. The rest keep their names, and so must belong to a classifier."""
    values = list(tensors.items())
    renamed = {key: tensor for key, (_, tensor) in zip(wanted, values, strict=False)}
    return renamed | dict(values[len(wanted) :])


def state_dict_in_transformers_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a DINOv2 with registers from timm's layout to transformers' (`Dinov2WithRegistersModel`), Hibou's own.

    The class token's position embedding is zero, since timm's layout has added it to the class token. The mask token,
    which is used only in training, is zero too. Read back by `state_dict_in_timm_layout`, all tensors are identical.

    Raises:
        EncoderError: The network is no DINOv2 with registers. The message names a tensor.
    """
    width = state["cls_token"].shape[2] if "cls_token" in state else 0
    if "reg_token" not in state or state["pos_embed"].shape[1] != isqrt(state["pos_embed"].shape[1]) ** 2:
        raise EncoderError("transformers' layout is that of a DINOv2 with registers; this network has no reg_token")
    found = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.mask_token": torch.zeros(1, width),
        "embeddings.register_tokens": state["reg_token"],
        "embeddings.position_embeddings": torch.cat([torch.zeros(1, 1, width), state["pos_embed"]], dim=1),
    }
    swiglu = state["blocks.0.mlp.fc1.weight"].shape[0] != state["blocks.0.mlp.fc2.weight"].shape[1]
    up, down = ("weights_in", "weights_out") if swiglu else ("fc1", "fc2")
    names: Names = (
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^norm\.", "layernorm."),
        (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.output.dense."),
        (r"^blocks\.(\d+)\.ls(\d)\.gamma$", r"encoder.layer.\1.layer_scale\2.lambda1"),
        (r"^blocks\.(\d+)\.mlp\.fc1\.", rf"encoder.layer.\1.mlp.{up}."),
        (r"^blocks\.(\d+)\.mlp\.fc2\.", rf"encoder.layer.\1.mlp.{down}."),
        (r"^blocks\.(\d+)\.(norm\d)\.", r"encoder.layer.\1.\2."),
    )
    for key in [k for k in state if k not in {"cls_token", "reg_token", "pos_embed"}]:
        if fitting := re.match(r"^blocks\.(\d+)\.attn\.qkv\.(weight|bias)$", key):
            for part, tensor in zip(("query", "key", "value"), state[key].chunk(3), strict=True):
                found[f"encoder.layer.{fitting[1]}.attention.attention.{part}.{fitting[2]}"] = tensor.contiguous()
        elif (renamed := _translated(key, names)) != key:
            found[renamed] = state[key]
        else:
            raise EncoderError(f"transformers' DINOv2 with registers has no place for {key}")
    return found

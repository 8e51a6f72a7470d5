"""Build networks by name: timm's architectures with layers given by name, and modules from a user's function."""

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from g2l_core.encoders.timm_compat import import_timm
from g2l_core.errors import EncoderError, UnknownNameError, UsageError


class ConvStem(nn.Module):
    """The stem of CTransPath's Swin: two 3 x 3 convolutions of stride 2 and one of 1 x 1 in place of one of 4 x 4.

    See Wang et al. 2022 (doi 10.1016/j.media.2022.102559), section 3.2. It takes the arguments of timm's patch
    embedding and gives what timm's Swin expects of it: tokens as an image, channels last.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        norm_layer: Callable[[int], nn.Module] | None = None,
        **_unused: object,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.grid_size = (height // patch_size, width // patch_size)
        self.patch_size = (patch_size, patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        narrow, wide = embed_dim // 8, embed_dim // 4
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, narrow, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(narrow),
            nn.ReLU(inplace=True),
            nn.Conv2d(narrow, wide, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(inplace=True),
            nn.Conv2d(wide, embed_dim, 1),
        )
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch rows columns dim"]:
        """Compute the tokens, each of 4 x 4 pixels."""
        return self.norm(self.proj(images).permute(0, 2, 3, 1))


def _layers() -> dict[str, Any]:
    layers = import_timm().layers
    return {
        "SwiGLUPacked": layers.SwiGLUPacked,
        "SiLU": nn.SiLU,
        "ConvStem": ConvStem,
        "LayerNorm(1e-12)": partial(nn.LayerNorm, eps=1e-12),
    }


LAYERS = ("SwiGLUPacked", "SiLU", "ConvStem", "LayerNorm(1e-12)")
"""The names that arguments ending in `_layer` may have."""

LOADING = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
"""Arguments of `timm.create_model` that read files or the hub. A spec's weights come from its `weights` alone."""


def build_architecture(architecture: str, arguments: Mapping[str, Any], seed: int) -> nn.Module:
    """Build the network without classifier, on the CPU. Its random weights depend only on the seed.

    Args:
        architecture: timm's name, or MODULE:FUNCTION.
        arguments: Arguments of `timm.create_model` or of the function.
        seed: Seed of the random weights.

    Raises:
        EncoderError: The function cannot be found or called, or returns no torch module.
        UnknownNameError: There is no layer of that name.
        UsageError: An argument would load other weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if ":" in architecture:
            return call_function(architecture, arguments)
        if refused := sorted(set(arguments) & set(LOADING)):
            raise UsageError(f"{architecture}: the argument {refused[0]} loads files; name weights with `weights`")
        return import_timm().create_model(architecture, num_classes=0, **_with_layers(arguments))


def _with_layers(arguments: Mapping[str, Any]) -> dict[str, Any]:
    resolved = dict(arguments)
    for key, value in arguments.items():
        if key.endswith("_layer") and isinstance(value, str):
            if value not in LAYERS:
                raise UnknownNameError(f"layer for {key}", value, LAYERS)
            resolved[key] = _layers()[value]
    return resolved


def call_function(text: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The torch module that MODULE:FUNCTION returns. Modules are also looked for in the current folder.

    Raises:
        EncoderError: It cannot be imported, found or called, or returns no torch module.
    """
    module_name, _, function_name = text.partition(":")
    with _importable_from_here():
        try:
            function = getattr(importlib.import_module(module_name), function_name)
        except ImportError as error:
            raise EncoderError(f"{text}: cannot import {module_name} ({error}); is it in this folder?") from error
        except AttributeError as error:
            raise EncoderError(f"{text}: {module_name} has no {function_name}") from error
        try:
            network = function(**arguments)
        except TypeError as error:
            raise EncoderError(f"{text} cannot be called with {dict(arguments)}: {error}") from error
    if not isinstance(network, nn.Module):
        raise EncoderError(f"{text} must return a torch.nn.Module, it returned {type(network).__name__}")
    return network


@contextmanager
def _importable_from_here() -> Iterator[None]:
    """Put the current folder on the import path, as `python -m` does and an installed command does not."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)

"""The torch module of every encoder: resampling, normalization, network and pooling."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from g2l_core.encoders.resolve import EncoderSpec
from g2l_core.errors import EncoderError


class PatchEncoder(nn.Module):
    """From uint8 views to pooled features."""

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
        """Compute the features of a batch of views.

        Args:
            pixels: uint8, red green blue. They stay in channels_last memory, which convolutions prefer.
        """
        images = pixels.permute(0, 3, 1, 2).float()
        if images.shape[-1] != self.input_px:
            images = resample(images, self.input_px, self.interpolation)
        return self.pooled((images - self.get_buffer("mean")) / self.get_buffer("std"))

    def pooled(self, images: Float[Tensor, "batch 3 side side"]) -> Float[Tensor, "batch dim"]:
        """Compute the features of normalized images of the network's input size."""
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
    """Resize images of gray levels 0 to 255 as Pillow does, since models were trained on what it gives.

    Pillow resamples the rows, then the columns, and rounds to whole levels within 0 to 255 after each. Clipping only at
    the end would differ from it by up to 7 levels where bright edges overshoot.
    """
    for size in ((images.shape[2], side), (side, side)):
        images = functional.interpolate(images, size=size, mode=interpolation, antialias=True)
        images = (images + 0.5).floor().clamp(0, 255)
    return images

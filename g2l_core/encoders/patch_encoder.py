"""The torch module of every encoder: resampling, normalization, network and pooling."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from g2l_core.encoders.resolve import EncoderSpec
from g2l_core.encoders.spec import MIN_INPUT_PX
from g2l_core.errors import EncoderError, UsageError


class PatchEncoder(nn.Module):
    """From uint8 views to pooled features."""

    def __init__(self, network: nn.Module, spec: EncoderSpec) -> None:
        super().__init__()
        require_whole_steps(spec, side_step(network))
        self.network = network
        self.input_px = spec.input_px
        self.pooling = spec.pooling
        self.width = spec.width
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
        features = self.pooled(self.normalized(pixels))
        return features if self.width is None else features[:, : self.width]

    def normalized(self, pixels: UInt8[Tensor, "batch height width 3"]) -> Float[Tensor, "batch 3 side side"]:
        """Views as the network takes them: resampled to its input size, and normalized."""
        images = pixels.permute(0, 3, 1, 2).float()
        if images.shape[-1] != self.input_px:
            images = resample(images, self.input_px, self.interpolation)
        return (images - self.get_buffer("mean")) / self.get_buffer("std")

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


def side_step(network: nn.Module) -> int:
    """What the side of a network's input must be a multiple of: else its last pixels are never seen.

    This is the patch size of a transformer, and the reduction of a network whose first convolution cuts the image into
    patches (ConvNeXt). Convolutions that overlap and are padded see every pixel, and a network that pads by itself too.
    """
    embedding = getattr(network, "patch_embed", None)
    if size := getattr(embedding, "patch_size", None):
        pads = getattr(embedding, "dynamic_img_pad", False)
        return 1 if pads else max(size) if isinstance(size, tuple | list) else int(size)
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None or first.padding != (0, 0) or first.kernel_size != first.stride or first.stride[0] < 2:
        return 1
    stages = getattr(network, "feature_info", None) or [{}]
    return int(stages[-1].get("reduction", first.stride[0]))


def require_whole_steps(spec: EncoderSpec, step: int) -> None:
    """Refuse an input whose last pixels the network would not see.

    Raises:
        UsageError: The side is no multiple of the step. The message names the next sizes.
    """
    if spec.input_px % step:
        below = spec.input_px // step * step
        sizes = [side for side in (below, below + step) if side >= MIN_INPUT_PX]
        raise UsageError(
            f"{spec.name}: an input of {spec.input_px} px is no multiple of the network's {step} px, so that the last "
            f"{spec.input_px - below} px of each side would not be seen. The next sizes are "
            f"{' and '.join(map(str, sizes))}"
        )


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

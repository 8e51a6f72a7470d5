"""How fast GPUs run encoders, to forecast machines that are not at hand: figures of others, each with its source."""

from collections.abc import Sequence
from dataclasses import dataclass

from g2l_core.encoders.architectures import build_architecture
from g2l_core.encoders.spec import EncoderSpec
from g2l_core.errors import UnknownNameError, UsageError
from pipeline.forecast import Speeds

READ_S, AUGMENT_S = 1 / 985, 0.30e-3
"""Seconds a patch and a view in one thread, see `READ_SOURCE`."""
READ_SOURCE = "read, augment: measured on one core of an Intel Xeon from JPEG slides (docs/performance.md)"
LARGE = ("vit_base", "vit_large", "vit_huge", "vit_giant", "vit_so")
"""The networks that reach the speeds of this file; in smaller and convolutional ones, memory sets the pace."""
SHARE_OF_PEAK = 0.5
"""Of a data sheet's peak that is assumed to be reached. The runs of timm in `PUBLISHED` reach .7 to .9 of theirs; those
cards are slower relative to their memory."""

_TIMM = "timm's benchmarks, github.com/huggingface/pytorch-image-models, results/benchmark-infer-amp-"
_GMACS = 267.18
"""Of vit_giant_patch14_224, as timm's tables have it: of what they time at 224 px the nearest to giant teachers."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What is known of a GPU's speed."""

    tflops: float
    """TFLOP/s that a vision transformer reaches in half precision, a multiplication and an addition being two."""
    source: str
    """Where that comes from, in words."""


def _timed(images: float, table: str) -> Gpu:
    """By the images a second of vit_giant_patch14_224 in one of timm's tables."""
    return Gpu(
        tflops=images * 2 * _GMACS / 1e3,
        source=f"published: vit_giant_patch14_224 at {images:g} images/s ({_TIMM}{table}.csv)",
    )


def _by_peak(peak: float, sheet: str) -> Gpu:
    """By the dense half-precision peak of NVIDIA's data sheet."""
    return Gpu(
        tflops=SHARE_OF_PEAK * peak,
        source=f"assumed: {SHARE_OF_PEAK:.0%} of the {peak:g} TFLOP/s of NVIDIA's data sheet ({sheet}); not measured",
    )


GPUS = {
    "rtx3090": _timed(116.48, "nhwc-pt240-cu124-rtx3090"),
    "rtx4090": _timed(228.92, "nhwc-pt240-cu124-rtx4090"),
    "rtx5090": _timed(277.63, "nchw-pt291-cu130-5090"),
    "rtxpro6000-maxq": _timed(345.24, "nchw-pt291-cu130-pro6000maxq"),
    "t4": _by_peak(65, "T4, FP16"),
    "v100": _by_peak(125, "V100 SXM2, tensor performance"),
    "l4": _by_peak(121, "L4, FP16 without sparsity"),
    "a10": _by_peak(125, "A10, FP16 without sparsity"),
    "a100": _by_peak(312, "A100, BF16 without sparsity"),
    "l40s": _by_peak(362, "L40S, BF16 without sparsity"),
    "h100": _by_peak(989, "H100 SXM, BF16 without sparsity"),
    "h200": _by_peak(989, "H200 SXM, BF16 without sparsity"),
}
"""By the name that users write."""


def find_gpu(name: str) -> Gpu:
    """A GPU by its name, whatever its case and separators.

    Raises:
        UnknownNameError: Nothing is known of it.
    """
    plain = {known.replace("-", ""): gpu for known, gpu in GPUS.items()}
    wanted = name.lower().replace("-", "").replace(" ", "").replace("_", "")
    if wanted not in plain:
        raise UnknownNameError("GPU", name, GPUS, f"Known: {', '.join(GPUS)}. Or give slides, to measure this machine.")
    return plain[wanted]


def forward_tflop(spec: EncoderSpec) -> float:
    """TFLOP of one view's forward pass, counted on the architecture. No weights and no memory for them are needed.

    Matrix products, convolutions and attention are counted, a multiplication and an addition being two.

    Raises:
        UsageError: A function of the user builds the network, so that only running it could tell.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    if ":" in spec.architecture:
        raise UsageError(f"{spec.name}: no forecast without slides for networks that a function builds; give slides")
    with torch.device("meta"):
        network = build_architecture(spec.architecture, spec.arguments, seed=0).eval()
        pixels = torch.zeros(1, 3, spec.input_px, spec.input_px)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        network(pixels)
    return counter.get_total_flops() / 1e12


def published_speeds(specs: Sequence[EncoderSpec], gpu: Gpu) -> Speeds:
    """Seconds of a cohort's patches and views on a GPU, from the figures of this file."""
    encode = {spec.name: forward_tflop(spec) / gpu.tflops for spec in specs}
    return Speeds(patches=0, read=READ_S, augment=AUGMENT_S, encode=encode, shares_cores=False)

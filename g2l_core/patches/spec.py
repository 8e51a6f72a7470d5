"""The patches of a store and the views drawn of them, as plain values. Imports nothing heavy, for quick help pages."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from g2l_core.errors import UnknownNameError, UsageError
from g2l_core.options import PATCHES, option

_MAX_HUE = 1 / 6

MAX_STAIN_JITTER = 0.5
"""The largest spread: the sums of `stain.stain_jitter` fit int32 up to it, twice over."""

STORED_ARTIFACTS = "artefacts"
"""The key of `GridSpec.artifacts` in stores, from before the spelling was settled: names by comma, or `none`."""

ARTIFACTS = ("black", "pen", "blurred")
"""What a slide's patches can be left out for, in the order in which it is looked for."""


def parse_artifacts(names: str) -> tuple[str, ...]:
    """The artifacts that a user lists by comma; `none` and blanks stand for none."""
    return tuple(name for part in names.split(",") if (name := part.strip()) not in {"", "none"})


@dataclass(frozen=True, kw_only=True)
class GridSpec:
    """The patches of a store. Part of its identity."""

    mpp: float = option(0.5, panel=PATCHES, help="Micrometers per pixel of a patch; 20x is 0.5, 40x is 0.25.")
    patch_px: int = option(256, panel=PATCHES, help="Side of a patch in pixels at that scale; patches do not overlap.")
    tissue: str = option(
        "otsu",
        panel=PATCHES,
        help="How tissue is found: otsu, color, none, a network (FILE.onnx, FILE.pt), or a folder of GeoJSON or PNG "
        "masks; FOLDER:Tumor,Stroma chooses classes, FOLDER:!Necrosis leaves them out.",
    )
    """The identity of the method, as `tissue.methods.resolve_tissue` gives it, once that has read what users write."""
    min_tissue: float = option(0.25, panel=PATCHES, help="Minimum fraction of a patch that must be tissue.")
    max_patches: int | None = option(
        None, panel=PATCHES, help="Keep at most this many patches of a slide, drawn at random."
    )
    cell_patches: int = 8
    """Side of a cell: the cells stand in random order, the patches of one cell together."""
    artifacts: tuple[str, ...] = option(
        ARTIFACTS,
        panel=PATCHES,
        aliases=("artefacts",),
        parse=parse_artifacts,
        help="Leave out patches that show black, pen or blurred (by comma), or none.",
    )
    """Such patches keep their row and get no features. Patch images were chosen by somebody already and are never
    filtered."""
    seed: int = option(0, panel=PATCHES, help="Random seed.")
    icc: bool = option(
        False, panel=PATCHES, help="Convert colors to sRGB by the ICC profiles that slides and patch images carry."
    )
    """Stores from before there was any have no such key, nor have those without it."""

    def __post_init__(self) -> None:
        """Refuse a grid that no slide can have."""
        if unknown := sorted(set(self.artifacts) - set(ARTIFACTS)):
            raise UnknownNameError("artifact", unknown[0], [*ARTIFACTS, "none"])
        in_order = tuple(name for name in ARTIFACTS if name in self.artifacts)
        object.__setattr__(self, "artifacts", in_order)
        if not 0.05 <= self.mpp <= 50:
            raise UsageError(f"mpp must be between 0.05 and 50 um/px, not {self.mpp}; 20x is 0.5, 40x is 0.25")
        if self.patch_px < 16:
            raise UsageError(f"patch_px must be at least 16, not {self.patch_px}")
        if not 0 <= self.min_tissue <= 1:
            raise UsageError(f"min_tissue is a share between 0 and 1, not {self.min_tissue}")
        if self.max_patches is not None and self.max_patches < 1:
            raise UsageError(f"max_patches must be at least 1, not {self.max_patches}")
        if self.cell_patches < 1:
            raise UsageError(f"cell_patches must be at least 1, not {self.cell_patches}")

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "GridSpec":
        """The spec that `to_json` wrote."""
        known = {name: value for name, value in stored.items() if name in cls.__dataclass_fields__}
        return cls(**known, artifacts=parse_artifacts(stored.get(STORED_ARTIFACTS, "none")))

    def to_json(self) -> dict[str, Any]:
        """The spec as a store keeps it, in plain values."""
        fields = {**asdict(self), STORED_ARTIFACTS: ",".join(self.artifacts) or "none"}
        del fields["artifacts"]
        if not self.icc:
            del fields["icc"]
        return fields


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """How views are drawn; the defaults are the G2L paper's (arXiv 2510.11176).

    Raises:
        UsageError: a probability outside [0, 1], a crop larger than the patch, or another impossible value.
    """

    patch_px: int = 256
    """Side of the patches that come in."""
    crop_px: int = option(224, panel=PATCHES, help="Side of a view in pixels, cut from the patch.")
    hflip: float = 0.5
    """Probability of a left-right flip."""
    vflip: float = 0.5
    """Probability of an up-down flip."""
    jitter: float = 0.5
    """Probability of the color jitter, of all four factors together."""
    brightness: float = 0.15
    """The factor is uniform in 1 +- this; so are the next two."""
    contrast: float = 0.15
    saturation: float = 0.1
    hue: float = 0.05
    """The shift is uniform in 0 +- this, in turns of the color circle; at most 1/6."""
    blur: float = 0.1
    """Probability of the Gaussian blur."""
    blur_kernel_px: int = 9
    """Side of the blur's kernel, odd."""
    blur_sigma: Sequence[float] = (0.1, 2.0)
    """Bounds of the blur's standard deviation in pixels; kept as a tuple."""
    seed: int = 0
    """An unsigned 64-bit integer."""
    stain_jitter: float = option(
        0.0,
        panel=PATCHES,
        help="Views 2, 4, ... are views 1, 3, ... in other stains: amounts of hematoxylin and eosin scaled by 1 +- "
        "this, and shifted by 0 +- this; 0.05 is light, 0.2 strong, 0 none.",
    )
    """See `stain.stain_jitter`. Stores from before there was any have no such key, nor have those without it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "blur_sigma", tuple(self.blur_sigma))  # JSON gives a list
        reach = self.blur_kernel_px // 2
        chances = (self.hflip, self.vflip, self.jitter, self.blur)
        spreads = (self.brightness, self.contrast, self.saturation)
        rules = {
            "1 < crop_px <= patch_px": 1 < self.crop_px <= self.patch_px,
            "hflip, vflip, jitter and blur in [0, 1]": all(0 <= p <= 1 for p in chances),
            "brightness, contrast and saturation in [0, 1]": all(0 <= s <= 1 for s in spreads),
            "hue in [0, 1/6]": 0 <= self.hue <= _MAX_HUE,
            "an odd blur_kernel_px": self.blur_kernel_px % 2 == 1,
            "blur_kernel_px // 2 in [0, crop_px)": 0 <= reach < self.crop_px,
            "blur_sigma = (low, high) with 0 < low <= high < inf": _is_range(self.blur_sigma),
            "seed in [0, 2**64)": 0 <= self.seed < 2**64,
            f"stain_jitter in [0, {MAX_STAIN_JITTER}]": 0 <= self.stain_jitter <= MAX_STAIN_JITTER,
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise UsageError(f"view spec: expected {'; '.join(broken)}; got {self}. Change these settings.")

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "ViewSpec":
        """The spec that `to_json` wrote; keys that it does not know are left out."""
        return cls(**{name: value for name, value in stored.items() if name in cls.__dataclass_fields__})

    def to_json(self) -> dict[str, Any]:
        """The spec as a store keeps it, in plain values: without the stain jitter where there is none."""
        plain = {**asdict(self), "blur_sigma": list(self.blur_sigma)}
        if not self.stain_jitter:
            del plain["stain_jitter"]
        return plain


def _is_range(bounds: Sequence[float]) -> bool:
    return len(bounds) == 2 and 0 < bounds[0] <= bounds[1] < float("inf")

"""Augmented views of a patch: parameters from a counter-based generator, pixels from the parameters.

A view is described by one float32 row, whose columns `columns_of` names. The row is a function of (seed, slide, x,
y, patch id, view index) alone. The pixels are a function of the patch, the row and the sizes in the `ViewSpec` alone.
So a store that keeps the rows can be replayed by any process, in any order, even if a later version draws otherwise.

The pixels rest on integer and table arithmetic only (OpenCV's 8-bit routes are fixed-point), so they do not depend
on the processor's vector width, on threads, or on OpenCV's version: 4.10, 4.12 and 5.0 give the same bytes.
"""

import struct
from collections.abc import Callable, Sequence
from hashlib import blake2b
from itertools import permutations

import cv2
import numpy as np
import xxhash
from jaxtyping import Float, Float32, Int32, Int64, UInt8, UInt64

from g2l_core.errors import UsageError
from g2l_core.patches.color import brightness, contrast, hue, saturation
from g2l_core.patches.spec import MAX_STAIN_JITTER
from g2l_core.patches.spec import ViewSpec as ViewSpec
from g2l_core.patches.stain import stain_jitter

COLUMNS = (
    "crop_x",
    "crop_y",
    "hflip",
    "vflip",
    "jitter",
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "order",
    "blur",
    "sigma",
)
"""Names of a view's parameters. Crop offsets in patch pixels; flags 0 or 1; factors as torchvision's ColorJitter;
order indexes `itertools.permutations(range(4))` of (brightness, contrast, saturation, hue); sigma in pixels."""

STAIN_COLUMNS = ("scale_h", "scale_e", "scale_r", "shift_h", "shift_e", "shift_r")
"""Further parameters, where there is stain jitter: scales and shifts of `stain.STAINS`.

Two views of a patch differ only in stain if all their `COLUMNS` are equal. These are views 2i - 1 and 2i: the stains
of views with odd numbers, and of view 0, are as they are in the slide.
"""

_ORDERS = tuple(permutations(range(4)))
_NEUTRAL_FACTORS = (1.0, 1.0, 1.0, 0.0)
_NEUTRAL_STAINS = (1.0, 1.0, 1.0, 0.0, 0.0, 0.0)
_DRAWS = 16  # a blake2b digest of 64 bytes as uint32; column i uses draw i, the last four are spare


def columns_of(spec: ViewSpec) -> tuple[str, ...]:
    """The names of a view's parameters: `COLUMNS`, and `STAIN_COLUMNS` where there is stain jitter."""
    return COLUMNS + STAIN_COLUMNS if spec.stain_jitter else COLUMNS


def stain_twin(view: Int64[np.ndarray, " *_"]) -> Int64[np.ndarray, " *_"]:
    """The views that differ from augmented ones only in stain: 2 of 1, 1 of 2, 4 of 3."""
    return ((view - 1) ^ 1) + 1


def sample_views(
    spec: ViewSpec,
    slide_id: str,
    coords: Int32[np.ndarray, "patch 2"],
    view_indices: Sequence[int],
    patch_ids: Sequence[str] | None = None,
) -> Float32[np.ndarray, "patch view parameter"]:
    """Draw the parameters of some views of some patches of one slide.

    Each (patch, view) has its own 16 draws, the blake2b digest of (seed, slide_id, x, y, patch id, view index) in
    fixed-width or length-prefixed fields, so that no two keys share their bytes. Their upper 24 bits are exact
    in float32. A row thus depends on nothing but its key and the spec. With stain jitter, views 2i take theirs from
    the key of view 2i - 1, and only their stains from a digest of their own key.

    Args:
        spec: Probabilities, ranges, seed.
        slide_id: The slide's id in the store.
        coords: x and y of each patch's top-left corner in level-0 pixels.
        view_indices: Which views; 0 is the canonical one (center crop, nothing else).
        patch_ids: Names that distinguish patches with equal coords; None (which differs from empty names) if
            all coords differ.

    Returns:
        The columns of `columns_of` in float32. Parameters that are not used (no jitter, no blur) are neutral.

    Raises:
        UsageError: a view index outside [0, 2**32), or not one patch id for each patch.
    """
    if patch_ids is not None and len(patch_ids) != len(coords):
        raise UsageError(
            f"slide {slide_id}: expected one patch id for each of the {len(coords)} coords, got {len(patch_ids)}."
            " Give one for each row, or none at all."
        )
    if not all(0 <= view < 2**32 for view in view_indices):
        raise UsageError(
            f"slide {slide_id}: expected view indices in [0, 2**32), got {list(view_indices)}."
            " Use 0 for the canonical view and 1, 2, ... for augmented ones."
        )
    views = np.asarray(view_indices, dtype=np.int64)
    is_stained = (views > 0) & (views % 2 == 0) & (spec.stain_jitter > 0)
    params = _parameters(_draws(spec, slide_id, coords, (views - is_stained).tolist(), patch_ids), spec)
    params[:, views == 0] = _canonical(spec)
    if not spec.stain_jitter:
        return params
    stains = np.empty((*params.shape[:2], len(STAIN_COLUMNS)), np.float32)
    stains[:] = _NEUTRAL_STAINS
    draws = _draws(spec, slide_id, coords, views[is_stained].tolist(), patch_ids, person=b"g2l stains 1")
    stains[:, is_stained] += spec.stain_jitter * (2 * draws[..., : len(STAIN_COLUMNS)] - 1)
    return np.concatenate((params, stains), axis=-1)


def _draws(
    spec: ViewSpec,
    slide_id: str,
    coords: Int32[np.ndarray, "patch 2"],
    view_indices: Sequence[int],
    patch_ids: Sequence[str] | None,
    person: bytes = b"g2l views 1",
) -> Float[np.ndarray, "patch view 16"]:
    name = slide_id.encode("utf-8", "surrogatepass")
    slide = blake2b(struct.pack("<QQ", spec.seed, len(name)) + name, person=person)
    digests = []
    for row, (x, y) in enumerate(coords.tolist()):
        patch = slide.copy()
        patch.update(struct.pack("<ii", x, y) + _framed(None if patch_ids is None else patch_ids[row]))
        for view in view_indices:
            key = patch.copy()
            key.update(struct.pack("<I", view))
            digests.append(key.digest())
    words = np.frombuffer(b"".join(digests), dtype="<u4").reshape(len(coords), len(view_indices), _DRAWS)
    return (words >> 8) / np.float64(2**24)


def _framed(patch_id: str | None) -> bytes:
    if patch_id is None:
        return struct.pack("<q", -1)
    name = patch_id.encode("utf-8", "surrogatepass")
    return struct.pack("<q", len(name)) + name


def _parameters(draws: Float[np.ndarray, "patch view 16"], spec: ViewSpec) -> Float32[np.ndarray, "patch view 12"]:
    spread = np.array((spec.brightness, spec.contrast, spec.saturation, spec.hue))
    low, high = spec.blur_sigma
    jitter, blur = draws[..., 4:5] < spec.jitter, draws[..., 10:11] < spec.blur
    factors = np.array(_NEUTRAL_FACTORS) + spread * (2 * draws[..., 5:9] - 1)
    columns = (
        np.floor(draws[..., 0:2] * (spec.patch_px - spec.crop_px + 1)),
        draws[..., 2:4] < np.array((spec.hflip, spec.vflip)),
        jitter,
        np.where(jitter, factors, _NEUTRAL_FACTORS),
        np.where(jitter, np.floor(draws[..., 9:10] * len(_ORDERS)), 0),
        blur,
        np.where(blur, low + (high - low) * draws[..., 11:12], 0),
    )
    return np.concatenate(columns, axis=-1, dtype=np.float32)


def _canonical(spec: ViewSpec) -> Float32[np.ndarray, "12"]:
    center = round((spec.patch_px - spec.crop_px) / 2)  # torchvision's center_crop rounds the same way
    return np.array((center, center, 0, 0, 0, *_NEUTRAL_FACTORS, 0, 0, 0), dtype=np.float32)


def apply_views(
    patch: UInt8[np.ndarray, "patch patch 3"], params: Float32[np.ndarray, "view parameter"], spec: ViewSpec
) -> UInt8[np.ndarray, "view crop crop 3"]:
    """Replay several views of one patch; see `apply_view`.

    Args:
        patch: RGB, `spec.patch_px` square.
        params: One row of `columns_of` the spec for each view.
        spec: The spec that the parameters were drawn with.

    Returns:
        The views, RGB, `spec.crop_px` square, C-contiguous.

    Raises:
        UsageError: a patch of another size, or parameters that cannot be this spec's.
    """
    views = np.empty((len(params), spec.crop_px, spec.crop_px, 3), dtype=np.uint8)
    for view, row in zip(views, params, strict=True):
        view[:] = apply_view(patch, row, spec)
    return views


def apply_view(
    patch: UInt8[np.ndarray, "patch patch 3"], params: Float32[np.ndarray, " parameter"], spec: ViewSpec
) -> UInt8[np.ndarray, "crop crop 3"]:
    """Replay one view: crop, left-right flip, up-down flip, stains, color jitter in the stored order, blur.

    But for the stains, the semantics are those of torchvision's `transforms.v2.functional` on uint8 tensors, to a few
    gray levels.

    Args:
        patch: RGB, `spec.patch_px` square; not changed.
        params: The view's parameters, the columns of `columns_of`.
        spec: The spec that the parameters were drawn with; only its sizes, and whether there are stains, matter here.

    Returns:
        The view, RGB, `spec.crop_px` square, C-contiguous, sharing no memory with the patch.

    Raises:
        UsageError: a patch of another size, or parameters that cannot be this spec's.
    """
    _check(patch, params, spec)
    crop_x, crop_y, hflip, vflip, jitter, *factors, order, blur, sigma = params[: len(COLUMNS)].tolist()
    stains = tuple(params[len(COLUMNS) :].tolist())
    x, y, size = int(crop_x), int(crop_y), spec.crop_px
    view = _flip(patch[y : y + size, x : x + size], hflip > 0, vflip > 0)
    if stains and stains != _NEUTRAL_STAINS:
        view = stain_jitter(view, stains[:3], stains[3:])
    if jitter:
        view = _jitter(view, factors, _ORDERS[int(order)])
    if blur:
        kernel = (spec.blur_kernel_px, spec.blur_kernel_px)
        view = cv2.GaussianBlur(view, kernel, sigma, borderType=cv2.BORDER_REFLECT_101)
    return view


def _check(patch: UInt8[np.ndarray, "h w 3"], params: Float32[np.ndarray, " parameter"], spec: ViewSpec) -> None:
    if patch.shape != (spec.patch_px, spec.patch_px, 3):
        raise UsageError(
            f"view: expected a patch of {spec.patch_px} x {spec.patch_px} x 3 pixels, got {patch.shape}."
            " Read it at the view spec's patch_px."
        )
    columns = columns_of(spec)
    if len(params) != len(columns):
        raise UsageError(
            f"view: expected the {len(columns)} parameters {', '.join(columns)}, got {len(params)}."
            " Use the spec that they were drawn with."
        )
    x, y, order, stains = params[0], params[1], params[9], params[len(COLUMNS) :]
    margin = spec.patch_px - spec.crop_px
    fits = 0 <= x <= margin and 0 <= y <= margin and 0 <= order < len(_ORDERS) and np.isfinite(params).all()
    if not fits or (np.abs(stains - _NEUTRAL_STAINS[: len(stains)]) > MAX_STAIN_JITTER + 1e-6).any():
        raise UsageError(
            f"view: expected finite parameters with a crop offset in [0, {margin}], an order in [0, 24) and stains "
            f"changed by at most {MAX_STAIN_JITTER}, got {dict(zip(columns, params.tolist(), strict=True))}. Use the "
            "spec that they were drawn with."
        )


def _flip(image: UInt8[np.ndarray, "h w 3"], left_right: bool, up_down: bool) -> UInt8[np.ndarray, "h w 3"]:
    if not (left_right or up_down):
        return image.copy()
    return cv2.flip(image, -1 if left_right and up_down else int(left_right))


def _jitter(
    view: UInt8[np.ndarray, "h w 3"], factors: Sequence[float], order: Sequence[int]
) -> UInt8[np.ndarray, "h w 3"]:
    for adjustment in order:
        view = _ADJUSTMENTS[adjustment](view, factors[adjustment])
    return view


_ADJUSTMENTS: tuple[Callable[[np.ndarray, float], np.ndarray], ...] = (brightness, contrast, saturation, hue)


def pixel_hash(views: UInt8[np.ndarray, "view height width 3"]) -> UInt64[np.ndarray, " view"]:
    """Fingerprint views: xxh3-64 of each view's bytes in C order (the shape is not part of it).

    Args:
        views: RGB pixels.

    Returns:
        One hash for each view.
    """
    return np.array([xxhash.xxh3_64_intdigest(np.ascontiguousarray(view).data) for view in views], dtype=np.uint64)

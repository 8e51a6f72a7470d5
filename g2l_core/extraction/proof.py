"""Whether imported features are those that their encoder gives, and if not, which mistake would explain them.

Random patches are read from their slides and encoded as the encoder's card has it. Where the result is another one,
they are encoded again with one thing changed at a time: the candidate that comes nearest is the likeliest cause.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from g2l_core.encoders.loading import LoadedEncoder, encode, load_encoder, padded_batches
from g2l_core.encoders.patch_encoder import PatchEncoder
from g2l_core.encoders.spec import EncoderSpec
from g2l_core.errors import EncoderError, SlideError
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.identity import require_same_slide
from g2l_core.slides.slide import open_slide
from g2l_core.store.features import FeatureStore, StoredSlide
from g2l_core.types import Level0Px

Rows = Int64[np.ndarray, " row"]

MATCH = 0.1
"""A candidate explains features if it is nearer to them than this fraction of their own spread between patches."""

MIN_COSINE = 0.999
"""And if the cosine to none of them is lower. bf16 on another device stays above it."""

NEAR = 0.3
"""Up to this fraction, other resampling or decoding of the same pixels explains the rest, if nothing comes nearer. A
patch of a lower level in place of one that was averaged from level 0 has made 0.1 to 0.25."""

BEAM = 4
"""How many of the nearest single mistakes are combined with each other one."""

ROUNDING = 3e-4
"""Relative error of a feature by float16: 2 ** -11 at most, and the root mean square is 0.6 of it."""

NORMALIZATIONS: Mapping[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "0.5 and 0.5": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "CLIP's": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "none, values of 0 to 1": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "none, values of 0 to 255": ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),
}
"""Mean and standard deviation that are taken for the encoder's own by mistake."""

ASPECTS = "scale, offset, crop, channels, normalization, pooling and feature length"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """How patches may have been encoded."""

    cause: str
    """What would be the mistake, for people; empty where all is as it should be."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """What differs: scale and shift of the region in sides of a patch, crop_px, channels, precision, and fields of the
    encoder's spec."""

    def with_another(self, other: "Candidate") -> "Candidate | None":
        """Both at once; None where they are about the same thing."""
        if self.changes.keys() & other.changes.keys():
            return None
        return Candidate(cause=f"{self.cause}, and {other.cause}", changes={**self.changes, **other.changes})


@dataclass(frozen=True, kw_only=True)
class Judged:
    """How near a candidate's features are to the stored ones."""

    candidate: Candidate
    error: float
    """Root mean square distance of the unit vectors, over the spread of the stored ones."""
    min_cosine: float
    features: Float32[np.ndarray, "row dim"]

    @property
    def matches(self) -> bool:
        """Whether it explains the stored features."""
        return self.error < MATCH and self.min_cosine >= MIN_COSINE

    @property
    def is_near(self) -> bool:
        """Whether it explains them but for other resampling."""
        return self.matches or self.error < NEAR


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What came of it."""

    compared: int
    """Patches that were encoded; 0 where no slide is at hand."""
    min_cosine: float
    """Of the features as they should be; NaN where nothing was compared."""
    agrees: bool
    verdict: str
    """A sentence for people."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Slides that could not be read, with the reason."""


def prove(
    store: FeatureStore, key: str, spec: EncoderSpec, rows: Mapping[str, Rows], *, device: str, batch_size: int
) -> Proof:
    """Encode some patches of imported features again.

    Args:
        store: The store.
        key: Key of the encoder.
        spec: Its spec.
        rows: Stored rows by slide.
        device: auto, cpu or cuda.
        batch_size: Patches encoded together.

    Raises:
        EncoderError: The weights cannot be had.
    """
    opened, failed = _open(store, key, rows)
    if not opened:
        reason = f", as {next(iter(failed.values()))}" if failed else ": g2l store import with --slides FOLDER"
        return Proof(compared=0, min_cosine=np.nan, agrees=False, verdict=f"cannot be proved{reason}", failed=failed)
    encoder = load_encoder(replace(spec, dim=None), device=device, precision="fp32")
    trial = _Trial(opened, encoder, store.grid["patch_px"], store.views["crop_px"], batch_size)
    agrees, verdict = _verdict(trial)
    n = len(trial.stored)
    return Proof(compared=n, min_cosine=trial.base.min_cosine, agrees=agrees, verdict=verdict, failed=failed)


def _verdict(trial: "_Trial") -> tuple[bool, str]:
    """Whether the features are as they should be, and a sentence on it."""
    best, base = trial.best(), trial.base
    words = f"of {len(trial.stored)} patches encoded again, the lowest cosine is"
    length = _length_cause(best.features, trial.stored) if best.is_near else ""
    rest = "" if best.matches else ", but for differences as of other resampling or decoding"
    if best.is_near and not best.candidate.changes.keys() - {"precision"} and not length:
        precision = "" if rest else f", precision {best.candidate.changes.get('precision', 'fp32')}"
        return True, f"{ASPECTS} agree{precision}{rest}: {words} {best.min_cosine:.6f}"
    told = f"is not what the encoder gives: {words} {base.min_cosine:.5f}"
    if best.is_near:
        cause = ", and ".join(filter(None, (best.candidate.cause, length)))
        return False, f"{told}; likeliest cause: {cause}, with which it is {best.min_cosine:.5f}{rest}"
    if cause := trial.order_cause(base):
        return False, f"{told}; likeliest cause: {cause}"
    nearest = best.candidate.cause or "all as it should be"
    return False, f"{told}; no candidate explains it, and nearest is {nearest}, with which it is {best.min_cosine:.5f}"


def candidates(spec: EncoderSpec, patch_px: int, crop_px: int) -> Iterator[Candidate]:
    """Each mistake that is looked for.

    Args:
        spec: The encoder as it should be.
        patch_px: Side of a patch.
        crop_px: Side of the center crop that should have been encoded.
    """
    for scale, words in ((2.0, "twice"), (0.5, "half")):
        cause = f"patches of {words} the side: um/px off by 2"
        yield Candidate(cause=cause, changes={"scale": scale})
    for shift, words in ((-0.5, "centers were taken for corners"), (0.5, "corners were taken for centers")):
        yield Candidate(cause=f"patches half a side away: {words}", changes={"shift": shift})
    if crop_px < patch_px:
        cause = f"the whole patch of {patch_px} px, not its center crop of {crop_px} px"
        yield Candidate(cause=cause, changes={"crop_px": patch_px})
    elif spec.input_px < patch_px:
        cause = f"the center crop of {spec.input_px} px, not the whole patch of {patch_px} px"
        yield Candidate(cause=cause, changes={"crop_px": spec.input_px})
    yield Candidate(cause="channels in the order blue, green, red", changes={"channels": "bgr"})
    for name, (mean, std) in NORMALIZATIONS.items():
        if not np.allclose((*mean, *std), (*spec.mean, *spec.std), atol=1e-3):
            cause = f"normalization by another mean and standard deviation ({name}) than the encoder's own"
            yield Candidate(cause=cause, changes={"mean": mean, "std": std})
    for pooling, words in (("cls", "the class token"), ("mean", "the mean of the patch tokens"), ("cls_mean", "both")):
        if pooling != spec.pooling:
            cause = f"pooling {pooling} ({words}), not {spec.pooling}"
            yield Candidate(cause=cause, changes={"pooling": pooling})
    other = {"bicubic": "bilinear", "bilinear": "bicubic"}[spec.interpolation]
    yield Candidate(cause=f"{other} resizing, not {spec.interpolation}", changes={"interpolation": other})
    for precision in ("bf16", "fp16"):
        yield Candidate(cause=f"precision {precision}", changes={"precision": precision})


# -- the patches ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _OpenedSlide:
    """A slide, and those of its rows that are compared."""

    stored: StoredSlide
    rows: Rows
    features: Float32[np.ndarray, "stored dim"]
    """All that are stored."""
    icc: bool
    """Whether the store's pixels are in sRGB by the slide's profile."""

    def read(self, scale: float, shift: float, patch_px: int) -> UInt8[np.ndarray, "row side side 3"]:
        """The patches of the rows.

        Raises:
            SlideError: They cannot be read.
        """
        side = self.stored.facts.patch_px_level0
        corners = self.stored.coords[self.rows] + round(shift * side)
        with open_slide(Path(self.stored.facts.source), manifest_mpp=self.stored.facts.mpp, icc=self.icc) as slide:
            return np.stack(
                [slide.read_patch(x, y, Level0Px(round(side * scale)), patch_px) for x, y in corners.tolist()]
            )


def _open(store: FeatureStore, key: str, rows: Mapping[str, Rows]) -> tuple[list[_OpenedSlide], dict[str, str]]:
    """The slides that can be read, and why others cannot."""
    opened, failed = list[_OpenedSlide](), dict[str, str]()
    for slide_id, chosen in rows.items():
        stored = store.slide(slide_id)
        if not stored.facts.fingerprint:
            continue
        try:
            require_same_slide(stored, Path(stored.facts.source))
            features = stored.features(key).astype(np.float32)
            icc = GridSpec.from_json(store.grid).icc
            found = _OpenedSlide(stored=stored, rows=chosen, features=features, icc=icc)
            found.read(1.0, 0.0, store.grid["patch_px"])
        except SlideError as error:
            failed[slide_id] = str(error)
            continue
        opened.append(found)
    return opened, failed


# -- the candidates ---------------------------------------------------------------------------------------


class _Trial:
    """Encodes the patches as candidates have it, and compares them with the stored features."""

    def __init__(
        self, slides: Sequence[_OpenedSlide], encoder: LoadedEncoder, patch_px: int, crop_px: int, batch_size: int
    ) -> None:
        self._slides, self._encoder, self._batch_size = slides, encoder, batch_size
        self._patch_px, self._crop_px = patch_px, crop_px
        self._patches: dict[tuple[float, float], np.ndarray] = {}
        self.stored = np.concatenate([slide.features[slide.rows] for slide in slides])
        self._unit = _unit(self.stored)
        spread = float(np.sqrt(((self._unit - self._unit.mean(axis=0)) ** 2).sum(axis=1).mean()))
        self._spread = spread or 1.0

    @cached_property
    def base(self) -> Judged:
        """All as it should be."""
        judged = self.judge(Candidate(cause=""))
        nothing = np.full_like(self.stored, np.nan)  # the encoder gives another number of features
        return judged or Judged(candidate=Candidate(cause=""), error=np.inf, min_cosine=np.nan, features=nothing)

    def best(self) -> Judged:
        """The candidate that is nearest, of one change, or of two where no single one explains the features."""
        rounding = 3 * ROUNDING / self._spread
        if self.base.matches and self.base.error <= rounding:
            return self.base
        single = list(candidates(self._encoder.spec, self._patch_px, self._crop_px))
        judged = sorted([self.base, *self._judged(single)], key=lambda judged: judged.error)
        best = judged[0]
        if not best.matches:
            nearest = [found.candidate for found in judged[:BEAM] if found.candidate.changes]
            pairs = {
                frozenset(p.changes.items()): p for one in nearest for other in single if (p := one.with_another(other))
            }
            two = min(self._judged(list(pairs.values())), key=lambda judged: judged.error, default=best)
            best = two if two.error < best.error / 2 else best
        return self.base if self.base.matches and self.base.error <= 1.5 * best.error else best

    def _judged(self, found: Sequence[Candidate]) -> list[Judged]:
        return [judged for candidate in found if (judged := self.judge(candidate))]

    def judge(self, candidate: Candidate) -> Judged | None:
        """How near a candidate is; None if the encoder cannot do it, or gives another number of features."""
        try:
            features = self._encode(candidate)
        except (EncoderError, SlideError):
            return None
        if features.shape != self.stored.shape or not np.isfinite(features).all():
            return None
        unit = _unit(features)
        error = float(np.sqrt(((unit - self._unit) ** 2).sum(axis=1).mean())) / self._spread
        cosine = float((unit * self._unit).sum(axis=1).min())
        return Judged(candidate=candidate, error=error, min_cosine=cosine, features=features)

    def _encode(self, candidate: Candidate) -> Float32[np.ndarray, "row dim"]:
        changes = dict(candidate.changes)
        pixels = self._read(changes.pop("scale", 1.0), changes.pop("shift", 0.0))
        crop = changes.pop("crop_px", self._crop_px)
        first = round((self._patch_px - crop) / 2)
        pixels = pixels[:, first : first + crop, first : first + crop]
        if changes.pop("channels", "") == "bgr":
            pixels = pixels[..., ::-1]
        precision = changes.pop("precision", self._encoder.precision)
        encoder = replace(self._encoder, precision=precision)
        if changes:
            module = PatchEncoder(encoder.module.network, replace(encoder.spec, **changes)).eval()
            encoder = replace(encoder, module=module.to(encoder.device))
        batches = padded_batches(len(pixels), self._batch_size)
        return np.concatenate([encode(encoder, np.ascontiguousarray(pixels[a:b])) for a, b in batches])

    def _read(self, scale: float, shift: float) -> np.ndarray:
        if (scale, shift) not in self._patches:
            read = [slide.read(scale, shift, self._patch_px) for slide in self._slides]
            self._patches[scale, shift] = np.concatenate(read)
        return self._patches[scale, shift]

    def order_cause(self, judged: Judged) -> str:
        """That features stand in another order than the coordinates, if they do; else nothing."""
        units, start, moved = _unit(judged.features), 0, 0
        if not np.isfinite(units).all():
            return ""
        for slide in self._slides:
            there = _unit(slide.features)
            for row, unit in zip(slide.rows.tolist(), units[start:], strict=False):
                distance = np.linalg.norm(there - unit, axis=1)
                moved += int(distance.argmin() != row and distance.min() < MATCH * self._spread)
            start += len(slide.rows)
        return "the features stand in another order than the coordinates" if 2 * moved > len(units) else ""


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def _length_cause(features: np.ndarray, stored: np.ndarray) -> str:
    """That the stored features have another length than the encoder gives them, if they have; else nothing."""
    lengths = np.linalg.norm(stored, axis=1)
    ratio = float(np.median(lengths / np.maximum(np.linalg.norm(features, axis=1), 1e-12)))
    if abs(ratio - 1) < 0.02:
        return ""
    is_unit = np.allclose(lengths, 1, atol=0.01)
    return "features divided by their length" if is_unit else f"features multiplied by {ratio:.4g}"

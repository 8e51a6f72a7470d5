"""Features of fewer bits for archives: rounded by BitRound, shuffled by bytes and packed by Zstandard.

A reader needs nothing new: rounding leaves plain float16 values, and Blosc with Zstandard is a core codec of Zarr 3.
Rounding to the bits that bfloat16 has is the default, for encoders run in it give no more.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numcodecs import BitRound, Blosc
from zarr.codecs import BloscCodec, Crc32cCodec

from g2l_core.errors import StoreError, UsageError
from g2l_core.store import schema
from g2l_core.store.boundary import writing
from g2l_core.store.facts import EncoderFacts
from g2l_core.store.features import FeatureStore, StoredSlide
from g2l_core.store.writer import SMALLEST
from g2l_core.store.zarr_files import create_array
from g2l_core.types import Features

MANTISSA_BITS = 10
"""Of float16."""
KEPT_BITS = 7
"""The bits of the mantissa that bfloat16 has."""


@dataclass
class Errors:
    """What rounding has changed, over all rows that have features."""

    values: int = 0
    """Values of at least `SMALLEST`: those below have fewer bits in float16 already, and their relative errors say
    nothing."""
    total: float = 0.0
    max_relative: float = 0.0
    rows: int = 0
    total_cosine: float = 0.0
    min_cosine: float = 1.0

    def add(self, before: np.ndarray, after: np.ndarray) -> None:
        """Count some rows, (row, dim), whose values are finite."""
        exact, now = before.astype(np.float64), after.astype(np.float64)
        large = np.abs(exact) >= SMALLEST
        relative = np.abs(now[large] - exact[large]) / np.abs(exact[large])
        lengths = np.linalg.norm(exact, axis=1) * np.linalg.norm(now, axis=1)
        cosine = np.divide((exact * now).sum(axis=1), lengths, out=np.ones(len(exact)), where=lengths > 0)
        self.values, self.total = self.values + relative.size, self.total + float(relative.sum())
        self.max_relative = max(self.max_relative, float(relative.max(initial=0)))
        self.rows, self.total_cosine = self.rows + len(cosine), self.total_cosine + float(cosine.sum())
        self.min_cosine = min(self.min_cosine, float(cosine.min(initial=1)))

    def to_json(self) -> dict[str, float]:
        """The errors as plain values."""
        return {
            "max_relative_error": self.max_relative,
            "mean_relative_error": self.total / max(self.values, 1),
            "mean_cosine": min(1.0, self.total_cosine / max(self.rows, 1)),
            "min_cosine": self.min_cosine,
        }

    def __str__(self) -> str:
        found = self.to_json()
        lowest = math.floor(found["min_cosine"] * 1e6) / 1e6  # never better than it is
        return (
            f"relative error at most {found['max_relative_error']:.2g} and {found['mean_relative_error']:.2g} on "
            f"average, cosine at least {lowest:.6f}"
        )


@dataclass(frozen=True, kw_only=True)
class Archive:
    """How features become smaller, and what that has cost so far.

    Raises:
        UsageError: There are no such bits.
    """

    bits: int = KEPT_BITS
    """Bits of the mantissa that are kept, 1 to 9."""
    errors: Mapping[str, Errors] = field(default_factory=lambda: defaultdict(Errors))
    """By encoder."""

    def __post_init__(self) -> None:
        """Refuse a number of bits that rounds nothing, or everything, away."""
        if not 1 <= self.bits < MANTISSA_BITS:
            raise UsageError(f"--bits {self.bits}: float16 has {MANTISSA_BITS} bits of mantissa; keep 1 to 9 of them")

    def prepare(self, slide: StoredSlide, encoder: str, digest: str, n_views: int, dim: int) -> None:
        """Make the packed array of an encoder, float16 (patch, view, feature). Whoever writes opens the slide anew.

        Raises:
            StoreError: The disk is full, or cannot be written to.
        """
        slide.require_features(encoder, digest=digest, n_views=n_views, dim=dim)
        with writing(f"features of slide {slide.slide_id}"):
            create_array(slide.folder / schema.FEATURES / encoder, packed_layout(len(slide), n_views, dim))

    def rounded(self, encoder: str, features: Features) -> Features:
        """Features of fewer bits; the errors are counted. NaN and what would become infinite stay as they are."""
        rounded = round_bits(features, self.bits)
        good = np.isfinite(features).all(axis=1)
        self.errors[encoder].add(features[good], rounded[good])
        return rounded

    def marked(self, facts: EncoderFacts) -> EncoderFacts:
        """An encoder of whose features so many bits are kept."""
        return replace(facts, rounded_bits=self.bits)

    def describe(self, store: FeatureStore, encoders: Iterable[str]) -> None:
        """Keep in the store what rounding features of encoders has cost."""
        for encoder in encoders:
            facts = store.encoders[encoder]
            note = f"its features are rounded to {self.bits} bits of mantissa: {self.errors[encoder]}"
            store.set_proof(encoder, facts.proof, (*facts.weights_notes, note))


def round_bits(features: Features, bits: int) -> Features:
    """Float16 values with so many bits of mantissa, rounded to the nearest even, by numcodecs' BitRound."""
    rounded = np.asarray(BitRound(bits).encode(np.array(features))).view(np.float16).reshape(features.shape)
    return np.where(np.isfinite(features) & np.isfinite(rounded), rounded, features)


def packed_layout(n: int, n_views: int, dim: int) -> dict[str, object]:
    """As `schema.features_layout`, with bytes shuffled and packed."""
    pack = BloscCodec(cname="zstd", clevel=5, shuffle="shuffle", typesize=2)
    return {**schema.features_layout(n, n_views, dim), "compressors": [pack, Crc32cCodec()]}


def require_exact(encoders: Mapping[str, EncoderFacts]) -> None:
    """Refuse features that are rounded already: errors would add up, and the second be taken for the whole.

    Raises:
        StoreError: Some are.
    """
    rounded = {key: facts.rounded_bits for key, facts in encoders.items() if facts.rounded_bits}
    if rounded:
        key, bits = next(iter(rounded.items()))
        raise StoreError(
            f"features of {key} are compacted already, to {bits} bits of mantissa. Compact the store that they were "
            "made from, or name the other encoders with --encoder"
        )


def packed_bytes(features: Features) -> int:
    """How many bytes features have when they are packed, chunk by chunk."""
    pack = Blosc(cname="zstd", clevel=5, shuffle=Blosc.SHUFFLE)
    starts = range(0, len(features), schema.CHUNK_ROWS)
    return sum(len(pack.encode(np.ascontiguousarray(features[a : a + schema.CHUNK_ROWS]))) for a in starts)

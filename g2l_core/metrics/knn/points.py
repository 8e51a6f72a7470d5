"""Features as points whose Euclidean distances rank the pairs, and the distances of chosen pairs."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float64, Int64
from xxhash import xxh3_64_intdigest

from g2l_core.errors import TaskError
from g2l_core.metrics.rows import THREADS, over_blocks, require_finite, row_blocks

Metric = Literal["cosine", "euclidean"]

_BLOCK_VALUES = 1 << 18
"""Most values measured at a time by a thread: 2 MiB of float64, which its cache holds."""
_MOST_WIDE = 1 << 28
"""Bytes of a float32 copy that are little."""


@dataclass(frozen=True, kw_only=True)
class Points:
    """Features divided by a length, about a center; made anew for the rows that are asked for."""

    features: Float[np.ndarray, "row dim"]
    lengths: Float64[np.ndarray, " row"]
    """What each row is divided by: its own length (the distances then rank as the cosine does), or a common unit."""
    center: Float64[np.ndarray, " dim"]
    """The reference's mean after the division. Errors are relative to lengths, which a common part makes longer."""
    longest: float
    """The greatest length of a row after the division, before the center is taken away."""
    alike: Int64[np.ndarray, " row"]
    """The first row that holds the same bytes: blank patches come by the thousand, one is measured."""
    wide: Float[np.ndarray, "row dim"] | None
    """The features as float32, where that takes little: rows are measured some thirty times."""

    def widened(self, rows: Int64[np.ndarray, " chosen"] | slice) -> Float[np.ndarray, "chosen dim"]:
        """The features of some rows; float16 as float32."""
        return widened(self.features[rows]) if self.wide is None else self.wide[rows]

    def of(self, rows: Int64[np.ndarray, " chosen"] | slice) -> Float64[np.ndarray, "chosen dim"]:
        """The points of some rows."""
        points = self.widened(rows).astype(np.float64)
        points *= 1 / self.lengths[rows, None]
        points -= self.center
        return points


def widened(features: Float[np.ndarray, "row dim"]) -> Float[np.ndarray, "row dim"]:
    """Float16 as float32, seven times as fast as `astype`; other types as they are."""
    if features.dtype != np.float16:
        return features
    bits = features.view(np.int16).astype(np.int32)
    bits <<= 13  # the fraction and the exponent to their new places; the sign's copies fill what is above
    bits &= np.int32(-0x70002000)  # 0x8FFFE000: of those copies one stays
    wide = bits.view(np.float32)
    wide *= np.float32(2.0**112)  # the exponents' biases are 15 and 127
    return wide


def points_of(
    reference: Float[np.ndarray, "row dim"], queries: Float[np.ndarray, "query dim"] | None, metric: Metric
) -> tuple[Points, Points]:
    """The queries (None: the reference again) and the reference as points.

    Raises:
        TaskError: If a row holds NaN, or is zero where the metric is the cosine.
    """
    sides = {"the reference": reference} | ({} if queries is None else {"the queries": queries})
    for name, features in sides.items():
        require_finite(features, name)
    lengths = {name: _row_lengths(features) for name, features in sides.items()}
    longest = {name: float(own.max()) for name, own in lengths.items()}
    if metric == "cosine":
        longest = dict.fromkeys(sides, 1.0)
        for name, own in lengths.items():
            if not own.all():
                raise TaskError(f"{name} has rows of zeros, which have no cosine; leave them out")
    else:
        unit = _common_unit(reference)
        longest = {name: length / unit for name, length in longest.items()}
        lengths = {name: np.full(len(features), unit) for name, features in sides.items()}
    center = _mean(reference, lengths["the reference"])
    points = [
        Points(
            features=features,
            lengths=lengths[name],
            center=center,
            longest=longest[name],
            alike=_first_alike(features),
            wide=widened(features) if 4 * features.size <= _MOST_WIDE else None,
        )
        for name, features in sides.items()
    ]
    return points[-1], points[0]


def _row_lengths(features: Float[np.ndarray, "row dim"]) -> Float64[np.ndarray, " row"]:
    def lengths(rows: slice) -> Float64[np.ndarray, " row"]:
        return np.linalg.norm(widened(features[rows]).astype(np.float64), axis=1)

    return np.concatenate(over_blocks(lengths, len(features)))


def _common_unit(features: Float[np.ndarray, "row dim"]) -> float:
    """A power of two near the rows' deviation from their mean: dividing by it rounds nothing."""
    center = _mean(features, np.ones(len(features)))

    def squares(rows: slice) -> float:
        block = widened(features[rows]) - center
        return float(np.einsum("ij,ij->", block, block))

    deviation = np.sqrt(sum(over_blocks(squares, len(features))) / len(features))
    return float(2.0 ** np.round(np.log2(deviation))) if deviation else 1.0


def _mean(features: Float[np.ndarray, "row dim"], lengths: Float64[np.ndarray, " row"]) -> Float64[np.ndarray, " dim"]:
    def total(rows: slice) -> Float64[np.ndarray, " dim"]:
        return np.einsum("i,ij->j", 1 / lengths[rows], widened(features[rows]))

    return np.sum(over_blocks(total, len(features)), axis=0) / len(features)


def _first_alike(features: Float[np.ndarray, "row dim"]) -> Int64[np.ndarray, " row"]:
    digests = np.fromiter((xxh3_64_intdigest(row.tobytes()) for row in features), np.uint64, count=len(features))
    _, first, codes = np.unique(digests, return_index=True, return_inverse=True)
    alike, rows = first[codes], np.arange(len(features))
    copies = np.flatnonzero(alike != rows)
    for part in row_blocks(len(copies)):
        chosen = copies[part]
        chance = (features[chosen] != features[alike[chosen]]).any(axis=1)  # the same digest, by chance
        alike[chosen[chance]] = chosen[chance]
    return alike


def gaps(
    queries: Points,
    reference: Points,
    query: Int64[np.ndarray, " pair"],
    row: Int64[np.ndarray, " pair"],
    kind: type[np.float32] | type[np.float64],
) -> Float64[np.ndarray, " pair"]:
    """Squared distances between points, computed from their differences in float32 or float64.

    Args:
        queries: One side.
        reference: The other.
        query: Rows of the queries, ascending.
        row: Rows of the reference.
        kind: The type to compute in; features of float64 are divided before they are rounded to it.
    """
    squares = np.empty(len(query))
    step = max(1, _BLOCK_VALUES // queries.features.shape[1])

    def measure(start: int) -> None:
        part = slice(start, start + step)
        asked, first = np.unique(query[part], return_index=True)
        difference = _divided(reference, row[part], kind)
        for point, own in zip(_divided(queries, asked, kind), np.split(difference, first[1:]), strict=True):
            own -= point
        squares[part] = np.vecdot(difference, difference)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(measure, range(0, len(query), step)))
    return squares


def _divided(points: Points, rows: Int64[np.ndarray, " chosen"], kind: Any) -> Float[np.ndarray, "chosen dim"]:
    features, lengths = points.widened(rows), points.lengths[rows, None]
    if kind is np.float32 and features.dtype == np.float32:
        return features * (1 / lengths).astype(np.float32)
    divided = features.astype(np.float64)  # in one step with the product, NumPy takes a quarter longer
    divided *= 1 / lengths
    return divided.astype(kind, copy=False)


def gap_bounds(
    squares: Float64[np.ndarray, " pair"], queries: Points, reference: Points
) -> tuple[Float64[np.ndarray, " pair"], Float64[np.ndarray, " pair"]]:
    """Between what the true squared distances lie, given those computed in float32.

    Of each point, the reciprocal and the product round: 2^-23 of its length, and something for the next order;
    the difference, its square and the sum of dim terms round by (dim + 4) 2^-24 of the result (Higham, Accuracy and
    Stability of Numerical Algorithms, 2002, section 3.1).
    """
    shift = 2.0**-22 * (queries.longest + reference.longest)
    share = 1.01 * (queries.features.shape[1] + 4) * 2.0**-24
    low, high = np.sqrt(squares / (1 + share)) - shift, np.sqrt(squares / (1 - share)) + shift
    return np.maximum(low, 0.0) ** 2, high**2

"""The candidate filter: low-precision products that find the pairs which can be near neighbors, and never lose one.

1. `candidate_filter` rounds the normalized rows to low precision (`_Side`) and orders the reference so that a sample of
   every eighth row comes first. Extra columns hold each row's squared length, so that one matrix product gives
   *upper bounds* of the scores -|p - q|^2 / 2 (see `CandidateFilter`).
2. `CandidateFilter.pairs` multiplies each block of queries with the sample. The k best scores of a query give a
   threshold that the score of its true k-th neighbor reaches (`_start`).
3. It then goes through all tiles of products and keeps the pairs whose upper bound reaches the query's threshold
   (`_collect_rows`). Where queries are the reference, a tile also serves its columns as queries
   (`_collect_columns`), and half of the tiles suffice.
4. With all tiles of a block done, the k best of its pairs give a final, higher threshold; what is left is yielded
   (`_finish`). Queries with too many candidates are listed in `crowded` instead.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64, UInt

from g2l_core.metrics.knn.normalized import NormalizedRows
from g2l_core.metrics.rows import over_blocks

if TYPE_CHECKING:
    import torch

Precision = Literal["bfloat16", "float32"]
Pairs: TypeAlias = tuple[Int64[np.ndarray, "_"], Int64[np.ndarray, "_"]]
"""Rows of the queries, and as many rows of the reference."""
_Scores: TypeAlias = tuple[Int32[np.ndarray, " pair"], Int32[np.ndarray, " pair"], Float32[np.ndarray, " pair"]]
"""Row, column and upper bound of chosen elements of a tile."""

_TILE = 2048
"""Rows on either side of a product: the scores of a tile stay in the cache."""
_SAMPLE_STEP = 8
"""Every eighth reference row is in the sample that sets the first thresholds."""
_OFFSETS = 3
"""Low-precision columns that hold a squared length: 3 x 8 bits, as many as a float32 has."""


def bfloat16_is_fast() -> bool:
    """Return whether the processor multiplies bfloat16 faster than float32."""
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@dataclass(frozen=True, kw_only=True)
class _Side:
    """Queries or reference, rounded to low precision for the products."""

    values: "torch.Tensor"
    """(row, 3 + 3 + dim): the parts of the offset, ones, the rounded rows."""
    squares: Float64[np.ndarray, " row"]
    """Squared lengths of the normalized rows."""
    rows: Int64[np.ndarray, " row"]
    """Which row of the features each is."""
    codes: Int64[np.ndarray, " row"]
    """A query and a reference row of the same code never pair."""

    def left_factor(self, part: slice) -> "torch.Tensor":
        """Return a block of rows with ones where the other side has its offset, and the reverse."""
        import torch

        block = self.values[part]
        return torch.cat([block[:, _OFFSETS : 2 * _OFFSETS], block[:, :_OFFSETS], block[:, 2 * _OFFSETS :]], dim=1)


def _side(
    normalized: NormalizedRows,
    codes: Int64[np.ndarray, " row"],
    rows: Int64[np.ndarray, " chosen"],
    precision: Precision,
) -> tuple[_Side, float]:
    """Round some rows; return them with offsets still 0, and the largest relative rounding error."""
    import torch

    values = torch.zeros((len(rows), 2 * _OFFSETS + normalized.features.shape[1]), dtype=getattr(torch, precision))
    values[:, _OFFSETS : 2 * _OFFSETS] = 1
    squares, kept = np.empty(len(rows)), _bits(values)

    def fill(part: slice) -> float:
        block = normalized.take(rows[part])
        squares[part] = np.einsum("ij,ij->i", block, block)
        bits = _rounded_bits(block, precision)
        kept[part, 2 * _OFFSETS :] = bits
        block -= _floats(bits)
        lost = np.einsum("ij,ij->i", block, block)
        return float(np.divide(lost, squares[part], out=np.zeros(len(lost)), where=squares[part] > 0).max())

    error = max(over_blocks(fill, len(rows))) ** 0.5
    return _Side(values=values, squares=squares, rows=rows, codes=codes[rows]), error


def _rounded_bits(values: Float64[np.ndarray, "row dim"], precision: Precision) -> UInt[np.ndarray, "row dim"]:
    """Return the bits of the nearest low-precision numbers. Bfloat16 is rounded by way of float32."""
    bits = values.astype(np.float32).view(np.uint32)
    if precision == "float32":
        return bits
    bits += ((bits >> 16) & 1) + np.uint32(0x7FFF)  # ties go to the even number
    return (bits >> 16).astype(np.uint16)


def _set_offsets(values: "torch.Tensor", offsets: Float64[np.ndarray, " row"]) -> None:
    """Write the offsets as sums of low-precision numbers."""
    import torch

    rest = torch.from_numpy(offsets)
    for column in range(_OFFSETS):
        values[:, column] = rest.to(values.dtype)
        rest = rest - values[:, column].double()


@dataclass(kw_only=True)
class CandidateFilter:
    """One pass over all pairs. `pairs` yields those that may be near; `crowded` lists the queries it left out.

    For rows p and q with rounded copies of relative error r, products in float32 over m columns obey
    |product - p.q| <= rho (|p|^2 + |q|^2), rho = r + r^2 / 2 + m 2^-24: Cauchy-Schwarz, 2 |p| |q| <= |p|^2 + |q|^2,
    and Higham (Accuracy and Stability of Numerical Algorithms, 2002, section 3.1). With offsets
    -(1/2 - rho) |p|^2 on either side, the products are upper bounds of the scores -|p - q|^2 / 2, and lie at most
    2 rho (|p|^2 + |q|^2) above them. The smallest lower bound of any k rows bounds the k-th best score from below, and
    every pair whose upper bound reaches it may be near. Rounding the product to low precision is monotone.
    """

    k: int
    symmetric: bool
    """Queries are the reference: a tile serves its rows and its columns."""
    query: _Side
    reference: _Side
    rho: float
    sample: int
    """Number of reference rows, the first ones, that set the first thresholds."""
    max_candidates: int
    """A query with more candidates is crowded."""
    crowded: list[Int64[np.ndarray, " row"]] = field(default_factory=list)
    """Query rows left to a method of higher precision; complete once `pairs` is exhausted."""
    _thresholds: UInt[np.ndarray, " query"] = field(init=False)
    """Score that a candidate of each query must reach, as bits; 0 where the query is crowded."""
    _pending: list[list[_Scores]] = field(init=False)
    """Candidates of each block of queries so far."""

    def __post_init__(self) -> None:
        self._thresholds = np.zeros(len(self.query.rows), _bits(self.query.values[:0]).dtype)
        self._pending = [[] for _ in range(0, len(self.query.rows), _TILE)]

    def pairs(self) -> Iterator[Pairs]:
        """Yield (query rows, reference rows) that hold the k nearest of every query but the crowded ones.

        All pairs of a query come together, sorted by query.
        """
        queries, references = len(self.query.rows), len(self.reference.rows)
        blocks = [slice(start, min(start + _TILE, queries)) for start in range(0, queries, _TILE)]
        for block in blocks:
            self._start(block)
        for block in blocks:
            first = max(self.sample, block.start) if self.symmetric else self.sample
            done = self.symmetric and block.start < self.sample
            left = self.query.left_factor(block)
            for start in range(references if done else first, references, _TILE):
                columns = slice(start, min(start + _TILE, references))
                scores = self._scores(left, block, columns)
                self._collect_rows(scores, block, columns)
                if self.symmetric and start != block.start:
                    self._collect_columns(scores, block, columns)
            yield self._finish(block)

    def _scores(self, left: "torch.Tensor", block: slice, columns: slice) -> "torch.Tensor":
        """Return the upper bounds of a tile; -inf for pairs of one group."""
        import torch

        scores = _product(left, self.reference.values[columns])
        query_codes, codes = self.query.codes[block], self.reference.codes[columns]
        if query_codes[0] <= codes[-1] and codes[0] <= query_codes[-1]:  # both are sorted
            scores.masked_fill_(torch.from_numpy(query_codes[:, None] == codes), -torch.inf)
        return scores

    def _start(self, block: slice) -> None:
        """Set the first thresholds of a block of queries, and collect its pairs with the sample."""
        import torch

        scores = self._scores(self.query.left_factor(block), block, slice(0, self.sample))
        best, places = torch.topk(scores, self.k, dim=1)
        bounds = self._kth_lower_bounds(best.double().numpy(), places.numpy(), block)
        query, column, values = _where(scores, bounds[:, None])
        crowded = np.bincount(query, minlength=len(bounds)) > self.max_candidates
        self.crowded.append(self.query.rows[block][crowded])
        self._thresholds[block] = np.where(crowded, 0, bounds)
        kept = ~crowded[query]
        self._pending[block.start // _TILE].append((query[kept], column[kept], values[kept]))
        if self.symmetric and block.start >= self.sample:
            for start in range(0, self.sample, _TILE):
                part = slice(start, start + _TILE)
                self._collect_columns(scores[:, part], block, part)

    def _kth_lower_bounds(
        self, scores: Float64[np.ndarray, "query k"], rows: Int64[np.ndarray, "query k"], block: slice
    ) -> UInt[np.ndarray, " query"]:
        """Return, as bits, a score that each query's k-th best reaches, given k rows and their upper bounds."""
        import torch

        limits = torch.finfo(self.query.values.dtype)
        doubt = 2 * self.rho * (self.query.squares[block, None] + self.reference.squares[rows])
        lower = torch.from_numpy((scores - doubt - 0.51 * limits.eps * np.abs(scores)).min(axis=1))
        # Above -inf, the score of excluded pairs, and below 0, which marks a crowded query.
        return _bits(lower.to(self.query.values.dtype).clamp(min=limits.min, max=-limits.tiny))

    def _collect_rows(self, scores: "torch.Tensor", block: slice, columns: slice) -> None:
        """Add the pairs of a tile that reach the threshold of their row."""
        query, column, values = _where(scores, self._thresholds[block, None])
        self._pending[block.start // _TILE].append((query, column + np.int32(columns.start), values))

    def _collect_columns(self, scores: "torch.Tensor", block: slice, columns: slice) -> None:
        """Add the pairs of a tile that reach the threshold of their column, which is the query here."""
        row, query, values = _where(scores, self._thresholds[columns])
        self._pending[columns.start // _TILE].append((query, row + np.int32(block.start), values))

    def _finish(self, block: slice) -> Pairs:
        """Return the pairs of a block of queries, all tiles being in, under their final thresholds."""
        number, size = block.start // _TILE, block.stop - block.start
        query, column, values = (np.concatenate(parts) for parts in zip(*self._pending[number], strict=True))
        self._pending[number] = []
        order = np.argsort(query.astype(np.uint16), kind="stable")
        query, column, values = query[order], column[order], values[order]
        counts = np.bincount(query, minlength=size)
        width = max(self.k, int(counts.max()))
        place = np.arange(len(query)) - (np.cumsum(counts) - counts)[query]
        scores, columns = np.full((size, width), -np.inf, np.float32), np.zeros((size, width), np.int64)
        scores[query, place], columns[query, place] = values, column
        best = np.argpartition(scores, width - self.k, axis=1)[:, width - self.k :]
        top = np.take_along_axis(scores, best, axis=1).astype(np.float64)
        bounds = _floats(self._kth_lower_bounds(top, np.take_along_axis(columns, best, axis=1), block))
        near = (values >= bounds[query]) & (self._thresholds[block][query] > 0)
        crowded = np.bincount(query[near], minlength=size) > self.max_candidates
        self.crowded.append(self.query.rows[block][crowded])
        near &= ~crowded[query]
        return self.query.rows[block][query[near]], self.reference.rows[column[near]]


def _product(left: "torch.Tensor", right: "torch.Tensor") -> "torch.Tensor":
    """Return all products of rows. NumPy takes those of float32, as PyTorch can be set to round them further."""
    import torch

    if left.dtype == torch.float32:
        return torch.from_numpy(left.numpy() @ right.numpy().T)
    return left @ right.T


def _bits(values: "torch.Tensor") -> UInt[np.ndarray, "..."]:
    """View a tensor as unsigned integers. Among negative numbers, the greater number has the smaller integer."""
    import torch

    signed, unsigned = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}[values.element_size()]
    return values.view(signed).numpy().view(unsigned)


def _floats(bits: UInt[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """Return the numbers from their bits. A bfloat16 is the upper half of a float32."""
    wide = bits.astype(np.uint32) << np.uint32(16) if bits.dtype == np.uint16 else bits
    return wide.view(np.float32)


def _where(scores: "torch.Tensor", bounds: UInt[np.ndarray, "..."]) -> _Scores:
    """Return row, column and value of the scores that reach their bound, which is negative and given as bits.

    NumPy compares the bits at the speed of memory. A positive score has smaller bits than any negative bound. A bound
    of 0 lets nothing pass but 0.
    """
    bits = _bits(scores)
    flat = np.flatnonzero(bits <= bounds)
    row, column = np.divmod(flat.astype(np.int32), np.int32(bits.shape[1]))
    return row, column, _floats(bits[row, column])


def candidate_filter(
    sides: tuple[NormalizedRows, NormalizedRows],
    codes: tuple[Int64[np.ndarray, " query"], Int64[np.ndarray, " row"]],
    queries: Int64[np.ndarray, " chosen"] | None,
    k: int,
    *,
    precision: Precision,
    max_candidates: int,
) -> CandidateFilter:
    """Prepare a filter for the k nearest neighbors.

    Args:
        sides: The queries and the reference.
        codes: Of the queries and of the reference. A query and a reference row of the same code never pair; every query
            has at least k rows of other codes.
        queries: The query rows to search for. None: all, and they are the reference. Each product then serves its rows
            and its columns, and half of the products suffice.
        k: Number of neighbors.
        precision: Of the products.
        max_candidates: A query with more candidates than this is left out and listed in `crowded`.
    """
    by_code = np.argsort(codes[1], kind="stable")
    sampled = np.zeros(len(by_code), bool)
    sampled[::_SAMPLE_STEP] = True
    sample = min(len(by_code), _TILE * -(-max(int(sampled.sum()), 2 * k) // _TILE))
    sampled[np.flatnonzero(~sampled)[: sample - int(sampled.sum())]] = True
    reference, error = _side(sides[1], codes[1], np.concatenate([by_code[sampled], by_code[~sampled]]), precision)
    query, query_error = reference, error
    if queries is not None:
        query, query_error = _side(sides[0], codes[0], queries[np.argsort(codes[0][queries], kind="stable")], precision)
    error = max(error, query_error)
    rho = 1.001 * (error + error**2 / 2 + (reference.values.shape[1] + 8) * 2.0**-24)
    for side in [reference] if query is reference else [reference, query]:
        _set_offsets(side.values, -(0.5 - rho) * side.squares)
    return CandidateFilter(
        k=k,
        symmetric=queries is None,
        query=query,
        reference=reference,
        rho=rho,
        sample=sample,
        max_candidates=max_candidates,
    )

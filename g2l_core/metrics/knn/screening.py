"""Which pairs of rows can be near neighbors at all: a screen of low precision that never loses one.

Most of an exact search is one matrix product, and processors multiply bfloat16 at two to eight times the rate of
float32. So bfloat16 products rank all pairs, with bounds on their error, and only the few pairs that the bounds
leave in doubt are measured.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64

from g2l_core.metrics.knn.points import Points
from g2l_core.metrics.rows import over_blocks

Precision = Literal["bfloat16", "float32"]

_TILE = 2048
"""Rows on either side of a product: the scores of a tile stay in cache."""
_SAMPLED = 8
"""One reference row in so many sets each query's first threshold."""
_OFFSETS = 3
"""Low-precision columns that hold a squared length: 3 x 8 bits, as many as a float32 has."""


def bfloat16_is_fast() -> bool:
    """Whether the processor multiplies bfloat16 faster than float32."""
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@dataclass(frozen=True, kw_only=True)
class _Operand:
    """One side of the products. Scores are upper bounds of -|p - q|^2 / 2."""

    values: Any
    """(row, 3 + 3 + dim) tensor: the parts of the offset, ones, the rounded points."""
    squares: Float64[np.ndarray, " row"]
    """Squared lengths of the points."""
    rows: Int64[np.ndarray, " row"]
    """The features' row that each is."""
    codes: Int64[np.ndarray, " row"]
    """A query and a reference row of one code never pair."""

    def left(self, part: slice) -> Any:
        """The rows of a block with ones where the other side has its offset, and the reverse."""
        import torch

        block = self.values[part]
        return torch.cat([block[:, _OFFSETS : 2 * _OFFSETS], block[:, :_OFFSETS], block[:, 2 * _OFFSETS :]], dim=1)


def _rounded(
    points: Points, rows: Int64[np.ndarray, " row"], precision: Precision
) -> tuple[Any, Float64[np.ndarray, " row"], float]:
    """The operand's values (offsets still 0), the squared lengths, and the largest relative rounding error."""
    import torch

    values = torch.zeros((len(rows), 2 * _OFFSETS + points.features.shape[1]), dtype=getattr(torch, precision))
    values[:, _OFFSETS : 2 * _OFFSETS] = 1
    squares, kept = np.empty(len(rows)), _bits(values)

    def enter(part: slice) -> float:
        block = points.of(rows[part])
        squares[part] = np.einsum("ij,ij->i", block, block)
        bits = _rounded_bits(block, precision)
        kept[part, 2 * _OFFSETS :] = bits
        block -= _floats(bits)
        lost = np.einsum("ij,ij->i", block, block)
        return float(np.divide(lost, squares[part], out=np.zeros(len(lost)), where=squares[part] > 0).max())

    return values, squares, max(over_blocks(enter, len(rows))) ** 0.5


def _rounded_bits(points: Float64[np.ndarray, "row dim"], precision: Precision) -> Any:
    """The nearest numbers of low precision, as their bits; those of bfloat16 by way of float32."""
    bits = points.astype(np.float32).view(np.uint32)
    if precision == "float32":
        return bits
    bits += ((bits >> 16) & 1) + np.uint32(0x7FFF)  # ties to the even number
    return (bits >> 16).astype(np.uint16)


def _set_offsets(values: Any, offsets: Float64[np.ndarray, " row"]) -> None:
    """Writes the offsets as sums of low-precision numbers."""
    import torch

    rest = torch.from_numpy(offsets)
    for column in range(_OFFSETS):
        values[:, column] = rest.to(values.dtype)
        rest = rest - values[:, column].double()


@dataclass
class Screen:
    """A sweep over all pairs. `pairs` yields what may be near; `crowded` is what it could not decide cheaply.

    For points p and q with rounded copies of relative error r, products in float32 over m columns obey
    |product - p.q| <= rho (|p|^2 + |q|^2), rho = r + r^2 / 2 + m 2^-24: Cauchy-Schwarz, 2 |p| |q| <= |p|^2 + |q|^2,
    and Higham (Accuracy and Stability of Numerical Algorithms, 2002, section 3.1). With offsets
    -(1/2 - rho) |p|^2 on either side, the products are upper bounds of the scores -|p - q|^2 / 2, and lie at most
    2 rho (|p|^2 + |q|^2) above them. The least lower bound of any k rows bounds the k-th best score from below;
    what is above that, in the upper bound, may be near. Rounding of the result to the low precision is monotone.
    """

    k: int
    symmetric: bool
    """Queries are the reference: a tile serves both of its sides."""
    query: _Operand
    reference: _Operand
    rho: float
    sample: int
    """So many reference rows, the first, set the first thresholds."""
    most: int
    """A query with more candidates is crowded."""
    crowded: list[Int64[np.ndarray, " row"]] = field(default_factory=list)
    """Query rows left to a method of higher precision; complete once `pairs` is exhausted."""
    _thresholds: Any = None
    _pending: list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = field(default_factory=list)

    def pairs(self) -> Iterator[tuple[Int64[np.ndarray, " pair"], Int64[np.ndarray, " pair"]]]:
        """Yields (query rows, reference rows) that hold the k nearest of every query but the crowded ones.

        A query's pairs come together, sorted by query.
        """
        import torch

        queries, references = len(self.query.rows), len(self.reference.rows)
        blocks = [slice(start, min(start + _TILE, queries)) for start in range(0, queries, _TILE)]
        self._thresholds = _bits(torch.empty(queries, dtype=self.query.values.dtype))
        self._pending = [[] for _ in blocks]
        for block in blocks:
            self._begin(block)
        for block in blocks:
            first = max(self.sample, block.start) if self.symmetric else self.sample
            done = self.symmetric and block.start < self.sample
            left = self.query.left(block)
            for start in range(references if done else first, references, _TILE):
                columns = slice(start, min(start + _TILE, references))
                scores = self._scores(left, block, columns)
                self._collect(scores, block, columns)
                if self.symmetric and start != block.start:
                    self._collect_columns(scores, block, columns)
            yield self._finish(block)

    def _scores(self, left: Any, block: slice, columns: slice) -> Any:
        """Upper bounds; -inf for pairs of one group."""
        import torch

        scores = _product(left, self.reference.values[columns])
        mine, theirs = self.query.codes[block], self.reference.codes[columns]
        if mine[0] <= theirs[-1] and theirs[0] <= mine[-1]:  # both are sorted
            scores.masked_fill_(torch.from_numpy(mine[:, None] == theirs), -torch.inf)
        return scores

    def _begin(self, block: slice) -> None:
        """Thresholds of a block of queries, and its pairs with the sample."""
        import torch

        scores = self._scores(self.query.left(block), block, slice(0, self.sample))
        best, places = torch.topk(scores, self.k, dim=1)
        bounds = self._bounds(best.double().numpy(), places.numpy(), block)
        query, column, values = _where(scores, bounds[:, None])
        many = np.bincount(query, minlength=len(bounds)) > self.most
        self.crowded.append(self.query.rows[block][many])
        self._thresholds[block] = np.where(many, 0, bounds)
        few = ~many[query]
        self._pending[block.start // _TILE].append((query[few], column[few], values[few]))
        if self.symmetric and block.start >= self.sample:
            for start in range(0, self.sample, _TILE):
                part = slice(start, start + _TILE)
                self._collect_columns(scores[:, part], block, part)

    def _bounds(self, scores: Float64[np.ndarray, "query k"], rows: Int64[np.ndarray, "query k"], block: slice) -> Any:
        """Of each query, what k-th best score these k rows, with these upper bounds, are sure of; as bits."""
        import torch

        kind = torch.finfo(self.query.values.dtype)
        doubt = 2 * self.rho * (self.query.squares[block, None] + self.reference.squares[rows])
        lower = torch.from_numpy((scores - doubt - 0.51 * kind.eps * np.abs(scores)).min(axis=1))
        # Above -inf, which pairs that must not meet have, and below 0, which stands for no bound.
        return _bits(lower.to(self.query.values.dtype).clamp(min=kind.min, max=-kind.tiny))

    def _collect(self, scores: Any, block: slice, columns: slice) -> None:
        """Adds the pairs of a tile that reach the threshold of their row."""
        query, column, values = _where(scores, self._thresholds[block, None])
        self._pending[block.start // _TILE].append((query, column + np.int32(columns.start), values))

    def _collect_columns(self, scores: Any, block: slice, columns: slice) -> None:
        """Adds the pairs of a tile that reach the threshold of their column, the query this time."""
        row, query, values = _where(scores, self._thresholds[columns])
        self._pending[columns.start // _TILE].append((query, row + np.int32(block.start), values))

    def _finish(self, block: slice) -> tuple[Int64[np.ndarray, " pair"], Int64[np.ndarray, " pair"]]:
        """The pairs of a block of queries once all tiles are in, under their final thresholds."""
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
        bounds = _floats(self._bounds(top, np.take_along_axis(columns, best, axis=1), block))
        near = (values >= bounds[query]) & (self._thresholds[block][query] > 0)
        many = np.bincount(query[near], minlength=size) > self.most
        self.crowded.append(self.query.rows[block][many])
        near &= ~many[query]
        return self.query.rows[block][query[near]], self.reference.rows[column[near]]


def _product(left: Any, right: Any) -> Any:
    """All products of rows; those of float32 by NumPy, as PyTorch can be set to round them further."""
    import torch

    if left.dtype == torch.float32:
        return torch.from_numpy(left.numpy() @ right.numpy().T)
    return left @ right.T


def _bits(values: Any) -> Any:
    """The numbers of a tensor as unsigned integers: the greater a negative number, the smaller they are."""
    import torch

    kinds = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}
    signed, unsigned = kinds[values.element_size()]
    return values.view(signed).numpy().view(unsigned)


def _floats(bits: Any) -> Float32[np.ndarray, "..."]:
    """Back from bits: bfloat16 is the upper half of a float32."""
    wide = bits.astype(np.uint32) << np.uint32(16) if bits.dtype == np.uint16 else bits
    return wide.view(np.float32)


def _where(scores: Any, bounds: Any) -> tuple[Int32[np.ndarray, " pair"], Int32[np.ndarray, " pair"], Any]:
    """Row, column and value of the scores that reach their bound, which is negative and given as bits.

    Compared as bits, since NumPy does that at the speed of memory: a positive score has smaller ones than any negative
    bound. A bound of 0 lets nothing pass but 0.
    """
    bits = _bits(scores)
    flat = np.flatnonzero(bits <= bounds)
    row, column = np.divmod(flat.astype(np.int32), np.int32(bits.shape[1]))
    return row, column, _floats(bits[row, column])


def _operand(
    points: Points, codes: Int64[np.ndarray, " row"], rows: Int64[np.ndarray, " chosen"], precision: Precision
) -> tuple[_Operand, float]:
    values, squares, error = _rounded(points, rows, precision)
    return _Operand(values=values, squares=squares, rows=rows, codes=codes[rows]), error


def screen(
    points: tuple[Points, Points],
    codes: tuple[Int64[np.ndarray, " query"], Int64[np.ndarray, " row"]],
    queries: Int64[np.ndarray, " chosen"] | None,
    k: int,
    *,
    precision: Precision,
    most: int,
) -> Screen:
    """Prepares a sweep for the k nearest.

    Args:
        points: The queries and the reference.
        codes: A query and a reference row of one code never pair; k others are left to each query.
        queries: The rows of the queries to ask for. None: all, which are the reference; then each product
            serves both its rows and its columns, and half of them are needed.
        k: Neighbors wanted.
        precision: Of the products.
        most: A query with more candidates than this is left out, and named in `crowded`.
    """
    by_code = np.argsort(codes[1], kind="stable")
    sampled = np.zeros(len(by_code), bool)
    sampled[::_SAMPLED] = True
    sample = min(len(by_code), _TILE * -(-max(int(sampled.sum()), 2 * k) // _TILE))
    sampled[np.flatnonzero(~sampled)[: sample - int(sampled.sum())]] = True
    rows = np.concatenate([by_code[sampled], by_code[~sampled]])
    reference, error = _operand(points[1], codes[1], rows, precision)
    query, query_error = reference, error
    if queries is not None:
        asked = queries[np.argsort(codes[0][queries], kind="stable")]
        query, query_error = _operand(points[0], codes[0], asked, precision)
    error = max(error, query_error)
    rho = 1.001 * (error + error**2 / 2 + (reference.values.shape[1] + 8) * 2.0**-24)
    for side in [reference] if query is reference else [reference, query]:
        _set_offsets(side.values, -(0.5 - rho) * side.squares)
    return Screen(k=k, symmetric=queries is None, query=query, reference=reference, rho=rho, sample=sample, most=most)

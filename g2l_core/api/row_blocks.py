"""The features of a cohort block by block, in stored or in random order, in flat memory."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float32, Int64, Shaped

from g2l_core.api.selection import Part, whole_parts
from g2l_core.errors import UsageError
from g2l_core.rng import keyed_generator
from g2l_core.store import schema
from g2l_core.store.location import REQUESTS, SHARD_REQUESTS, read_ahead
from g2l_core.types import Features

POOL_BLOCKS = 4
"""Blocks that memory holds while rows are shuffled: rows are mixed within so many."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some patches with their features."""

    features: Float32[np.ndarray, "row dim"]
    index: Int64[np.ndarray, " row"]
    """Their places in the cohort's table of patches."""
    labels: Shaped[np.ndarray, " row"]
    """Their labels as texts; all are empty if none was asked for."""

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        return f"<Block: features {self.features.shape}>"


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """What the blocks of a cohort are; see `Cohort.blocks`."""

    rows: int = 4096
    label: str = ""
    view: int = 0
    shuffle: bool = False
    seed: int = 0
    missing: str = "refuse"

    def __post_init__(self) -> None:
        """Refuse blocks without rows."""
        if self.rows < 1:
            raise UsageError(f"a block has at least 1 row; got {self.rows}")


@dataclass
class RowBlocks:
    """The readable patches of a cohort, block by block. `Cohort.blocks` makes it; iterate over it as often as needed.

    In random order whole chunks of the store are read in the order of a permutation, and their rows are mixed among
    `POOL_BLOCKS` blocks; as a store's row order is itself random by cells of the grid, a block samples many slides.
    """

    parts: Sequence[Part]
    encoder: str
    options: BlockOptions
    epoch: int = 0
    """Another epoch is in another random order."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Why slides were left out, by id."""

    def __post_init__(self) -> None:
        """Leave out what is missing, if that is allowed."""
        starts = np.cumsum([0, *map(len, self.parts)]).tolist()
        first = dict(zip((part.slide_id for part in self.parts), starts, strict=False))
        self.parts, self.skipped = whole_parts(self.parts, self.encoder, self.options.view, self.options.missing)
        self._starts = [first[part.slide_id] for part in self.parts]
        self._place = self.parts[0].slide.folder
        self._at_once = REQUESTS if self.options.shuffle else SHARD_REQUESTS
        self._good: dict[int, Bool[np.ndarray, " row"]] = {}

    @property
    def classes(self) -> tuple[str, ...]:
        """The different labels, sorted. Reads the labels of all patches."""
        names = (part.columns.column(self.options.label, part.rows) for part in self.parts if self.options.label)
        return tuple(sorted(set().union(*(set(of_part.tolist()) for of_part in names)) - {""}))

    def set_epoch(self, epoch: int) -> None:
        """Take the patches in another random order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Block]:
        return self.share(0, 1)

    def share(self, worker: int, workers: int) -> Iterator[Block]:
        """The blocks that one of several workers has; together they have every patch once."""
        pieces = self._pieces()
        if self.options.shuffle:
            keyed_generator("blocks", self.options.seed, self.epoch).shuffle(pieces)
        read = read_ahead(self._read, pieces[worker::workers], self._place, at_once=self._at_once)
        yield from self._mixed(read, worker) if self.options.shuffle else self._in_order(read)

    def _in_order(self, read: Iterator["_Read"]) -> Iterator[Block]:
        held, rows = list[_Read](), self.options.rows
        for piece in read:
            held.append(piece)
            while (more := sum(map(len, held)) - rows) >= 0:
                last = held.pop()
                yield _joined([*held, last.taken(slice(0, len(last) - more))])
                held = [last.taken(slice(len(last) - more, None))]
        if any(map(len, held)):
            yield _joined(held)

    def _mixed(self, read: Iterator["_Read"], worker: int) -> Iterator[Block]:
        """Blocks drawn at random from a pool that is filled in the order of reading."""
        rows, pool = self.options.rows, None
        draw = keyed_generator("rows", self.options.seed, self.epoch, worker)
        for piece in read:
            pool = pool or _Pool(piece, POOL_BLOCKS * rows + schema.CHUNK_ROWS)
            pool.add(piece)
            while pool.size >= POOL_BLOCKS * rows:
                yield pool.drawn(rows, draw).block()
        while pool and pool.size:
            yield pool.drawn(min(rows, pool.size), draw).block()

    def _pieces(self) -> list[tuple[int, int, int]]:
        """(Part, first and last place among its rows) of what is read together: a chunk where rows are shuffled."""
        size = schema.CHUNK_ROWS if self.options.shuffle else schema.SHARD_ROWS
        found = list[tuple[int, int, int]]()
        for number, part in enumerate(self.parts):
            edges = np.searchsorted(part.rows, np.arange(0, len(part.slide) + size, size)).tolist()
            found += [(number, a, b) for a, b in pairwise(edges) if a < b]
        return found

    def _read(self, piece: tuple[int, int, int]) -> "_Read":
        number, start, stop = piece
        part = self.parts[number]
        if number not in self._good:
            self._good[number] = part.status == schema.STATUS["ok"]
        places = start + np.flatnonzero(self._good[number][start:stop])
        taken = replace(part, chosen=part.rows[places])
        label = self.options.label
        return _Read(
            features=taken.features(self.encoder, self.options.view),
            index=self._starts[number] + places,
            labels=taken.columns.column(label, taken.rows) if label else np.full(len(places), "", object),
        )

    def __repr__(self) -> str:
        order = f"shuffled with seed {self.options.seed}" if self.options.shuffle else "in stored order"
        patches = sum(map(len, self.parts))
        return f"<RowBlocks: {patches:,} patches of {self.encoder} by {self.options.rows:,}, {order}>"


@dataclass(frozen=True, kw_only=True)
class _Read:
    """What was read together, in the precision of the store."""

    features: Features
    index: Int64[np.ndarray, " row"]
    labels: Shaped[np.ndarray, " row"]

    def __len__(self) -> int:
        return len(self.index)

    def taken(self, rows: "slice | np.ndarray") -> "_Read":
        return _Read(features=self.features[rows], index=self.index[rows], labels=self.labels[rows])

    def block(self) -> Block:
        return Block(features=self.features.astype(np.float32), index=self.index, labels=self.labels)


class _Pool:
    """Rows that wait to be drawn, in arrays that are made once. Drawing moves no more rows than it takes."""

    def __init__(self, first: _Read, capacity: int) -> None:
        self.size = 0
        self._rows = _Read(
            features=np.empty((capacity, first.features.shape[1]), np.float16),
            index=np.empty(capacity, np.int64),
            labels=np.empty(capacity, object),
        )

    def add(self, read: _Read) -> None:
        """Put rows into the pool."""
        stop = self.size + len(read)
        for mine, theirs in self._columns(read):
            mine[self.size : stop] = theirs
        self.size = stop

    def drawn(self, n: int, draw: np.random.Generator) -> _Read:
        """Take some rows out, without replacement, in random order; rows from the end fill their places."""
        places = draw.choice(self.size, n, replace=False)
        taken, rest = self._rows.taken(places), self.size - n
        staying = np.ones(n, bool)
        staying[places[places >= rest] - rest] = False
        for mine, _ in self._columns(taken):
            mine[np.sort(places[places < rest])] = mine[rest : self.size][staying]
        self.size = rest
        return taken

    def _columns(self, other: _Read) -> list[tuple[np.ndarray, np.ndarray]]:
        mine = self._rows
        return [(mine.features, other.features), (mine.index, other.index), (mine.labels, other.labels)]


def _joined(reads: Sequence[_Read]) -> Block:
    """What was read as one block, each value copied once."""
    return Block(
        features=np.concatenate([read.features for read in reads], dtype=np.float32),
        index=np.concatenate([read.index for read in reads]),
        labels=np.concatenate([read.labels for read in reads]),
    )

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
        full = self.options.rows * (POOL_BLOCKS if self.options.shuffle else 1)
        held: list[Block] = []
        for block in read:
            held.append(block)
            while sum(map(len, held)) >= full:
                ready, rest = _split(self._mixed(_joined(held), worker), self.options.rows)
                held = [rest]
                yield ready
        if any(map(len, held)):
            rest = self._mixed(_joined(held), worker)
            while len(rest):
                ready, rest = _split(rest, self.options.rows)
                yield ready

    def _pieces(self) -> list[tuple[int, int, int]]:
        """(Part, first and last place among its rows) of what is read together: a chunk where rows are shuffled."""
        size = schema.CHUNK_ROWS if self.options.shuffle else schema.SHARD_ROWS
        found = list[tuple[int, int, int]]()
        for number, part in enumerate(self.parts):
            edges = np.searchsorted(part.rows, np.arange(0, len(part.slide) + size, size)).tolist()
            found += [(number, a, b) for a, b in pairwise(edges) if a < b]
        return found

    def _read(self, piece: tuple[int, int, int]) -> Block:
        number, start, stop = piece
        part = self.parts[number]
        if number not in self._good:
            self._good[number] = part.status == schema.STATUS["ok"]
        places = start + np.flatnonzero(self._good[number][start:stop])
        taken = replace(part, chosen=part.rows[places])
        label = self.options.label
        return Block(
            features=_widened(taken.features(self.encoder, self.options.view)),
            index=self._starts[number] + places,
            labels=taken.columns.column(label, taken.rows) if label else np.full(len(places), "", object),
        )

    def _mixed(self, block: Block, worker: int) -> Block:
        if not self.options.shuffle:
            return block
        first = int(block.index[0])
        order = keyed_generator("rows", self.options.seed, self.epoch, worker, first).permutation(len(block))
        return _taken(block, order)

    def __repr__(self) -> str:
        order = f"shuffled with seed {self.options.seed}" if self.options.shuffle else "in stored order"
        patches = sum(map(len, self.parts))
        return f"<RowBlocks: {patches:,} patches of {self.encoder} by {self.options.rows:,}, {order}>"


def _widened(features: Features) -> Float32[np.ndarray, "row dim"]:
    return features.astype(np.float32)


def _joined(blocks: Sequence[Block]) -> Block:
    if len(blocks) == 1:
        return blocks[0]
    return Block(
        features=np.concatenate([block.features for block in blocks]),
        index=np.concatenate([block.index for block in blocks]),
        labels=np.concatenate([block.labels for block in blocks]),
    )


def _split(block: Block, rows: int) -> tuple[Block, Block]:
    return _taken(block, slice(0, rows)), _taken(block, slice(rows, None))


def _taken(block: Block, rows: "slice | np.ndarray") -> Block:
    return Block(features=block.features[rows], index=block.index[rows], labels=block.labels[rows])

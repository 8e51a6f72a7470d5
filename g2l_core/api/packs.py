"""Packs: copies of features in one contiguous file each, from which any rows are read through a memory map.

A store keeps the file `.packed/<encoder>.<view>.npy`, float16 (patch, dim) of every slide that has these features, and
an index beside it. Like the catalogue a pack is never the truth: slides that have other features than were packed are
read from their shards. Each block of rows is compared with its checksum when it is read for the first time.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt32
from numcodecs.checksum32 import CRC32C
from numpy.lib.format import open_memmap

from g2l_core.errors import StoreCorruptError, StoreMissingError
from g2l_core.files import write_text, write_with
from g2l_core.store import schema
from g2l_core.store.boundary import reading, writing
from g2l_core.store.features import StoredSlide, require_whole
from g2l_core.store.location import Location
from g2l_core.store.locks import LOCKS, locked
from g2l_core.store.provenance import canonical_json
from g2l_core.types import Features

FOLDER = ".packed"
BLOCK_ROWS = schema.CHUNK_ROWS
"""Rows that have a checksum together."""


@dataclass(frozen=True, kw_only=True)
class PackedSlide:
    """Where a slide's features are, and which they are."""

    start: int
    """The row of the file that is its first."""
    shards: Mapping[str, int]
    """crc32c of its shards, by name, as the slide's facts record them."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What a command has packed, or would."""

    path: Path
    slides: int
    rows: int
    bytes: int
    left_out: Mapping[str, str]
    """Why slides are not in it, by id."""


def pack_path(store: Path, encoder: str, view: int) -> Path:
    """The file of a pack; its index has the ending .json."""
    return store / FOLDER / f"{encoder}.{view}.npy"


def write_pack(
    store: Path,
    slides: Sequence[StoredSlide],
    encoder: str,
    dim: int,
    *,
    view: int,
    dry_run: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Packed:
    """Write one view's features of all slides into a pack, in the place of one that is there.

    Args:
        store: The store.
        slides: Its slides, sorted by id.
        encoder: Key of the encoder.
        dim: Width of its features.
        view: Which view.
        dry_run: Only tell.
        report: Is told how many slides are written, and of how many.

    Raises:
        StoreMissingError: No slide has these features whole.
        StoreCorruptError: Features are not what was written.
        StoreError: The disk is full or cannot be written to, or another command writes into the store.
    """
    whole, left_out = list[StoredSlide](), dict[str, str]()
    for slide in slides:
        try:
            require_whole(slide, encoder, view=view)
            whole.append(slide)
        except StoreMissingError as error:
            left_out[slide.slide_id] = str(error)
    if not whole:
        raise StoreMissingError(f"{store} has no slide with view {view} of {encoder} whole")
    path, rows = pack_path(store, encoder, view), sum(map(len, whole))
    if not dry_run:
        with (
            locked(store / LOCKS / "writer", wait_s=0, holder="another g2l command writes into it"),
            writing(str(path)),
        ):
            path.parent.mkdir(exist_ok=True)
            path.with_suffix(".json").unlink(missing_ok=True)
            write_with(path, lambda temporary: _fill(temporary, whole, encoder, (rows, dim), view, report))
            _write_index(path, whole, encoder, view)
    return Packed(path=path, slides=len(whole), rows=rows, bytes=rows * dim * 2, left_out=left_out)


def _fill(
    path: Path,
    slides: Sequence[StoredSlide],
    encoder: str,
    shape: tuple[int, int],
    view: int,
    report: Callable[[int, int], None],
) -> None:
    packed, start = open_memmap(path, mode="w+", dtype=np.float16, shape=shape), 0
    for done, slide in enumerate(slides, start=1):
        packed[start : start + len(slide)] = slide.features(encoder, view=view)
        start += len(slide)
        report(done, len(slides))
    packed.flush()


def _write_index(path: Path, slides: Sequence[StoredSlide], encoder: str, view: int) -> None:
    starts = np.cumsum([0, *map(len, slides)]).tolist()
    entries = {
        slide.slide_id: asdict(PackedSlide(start=start, shards=_shards(slide, encoder, view)))
        for slide, start in zip(slides, starts, strict=False)
    }
    packed = np.load(path, mmap_mode="r")
    blocks = [int(CRC32C.checksum(packed[a : a + BLOCK_ROWS])) for a in range(0, len(packed), BLOCK_ROWS)]
    content = {"encoder": encoder, "view": view, "rows": len(packed), "slides": entries, "blocks": blocks}
    crc = int(CRC32C.checksum(canonical_json(content).encode()))
    write_text(path.with_suffix(".json"), json.dumps({**content, "crc32c": crc}) + "\n")


def _shards(slide: StoredSlide, encoder: str, view: int) -> dict[str, int]:
    records = slide.feature_facts(encoder).shards
    return {shard.name: records[shard.name].crc32c for shard in slide.shards([view]) if shard.name in records}


class Pack:
    """A pack that is open."""

    def __init__(self, path: Path, index: Mapping[str, Any]) -> None:
        self._path = path
        self._slides = {slide_id: PackedSlide(**entry) for slide_id, entry in index["slides"].items()}
        self._blocks: UInt32[np.ndarray, " block"] = np.array(index["blocks"], np.uint32)
        self._proven = np.zeros(len(self._blocks), bool)
        self._packed = np.load(path, mmap_mode="r")
        if self._packed.dtype != np.float16 or len(self._packed) != index["rows"]:
            raise ValueError(f"it has {self._packed.shape} {self._packed.dtype}, its index {index['rows']} rows")

    def start_of(self, slide: StoredSlide, encoder: str, view: int) -> int | None:
        """The first row of a slide; None if the slide has other features now than were packed."""
        entry = self._slides.get(slide.slide_id)
        if entry is None or encoder not in slide.facts.features or entry.shards != _shards(slide, encoder, view):
            return None
        return entry.start

    def read(self, rows: "Int64[np.ndarray, ' row'] | slice") -> Features:
        """Some rows of the file, in the given order.

        Raises:
            StoreCorruptError: They are not what was packed.
        """
        blocks = (
            np.arange(rows.start // BLOCK_ROWS, -(-rows.stop // BLOCK_ROWS))
            if isinstance(rows, slice)
            else np.unique(rows // BLOCK_ROWS)
        )
        for block in blocks[~self._proven[blocks]].tolist():
            found = CRC32C.checksum(np.ascontiguousarray(self._packed[block * BLOCK_ROWS : (block + 1) * BLOCK_ROWS]))
            if found != self._blocks[block]:
                raise StoreCorruptError(
                    f"{self._path}: rows {block * BLOCK_ROWS} to {(block + 1) * BLOCK_ROWS} are not what was packed. "
                    "Delete the file, or run g2l store pack again: it is a copy, and the store has the features"
                )
            self._proven[block] = True
        return np.array(self._packed[rows])


def packed_rows(
    store: Location, slide: StoredSlide, encoder: str, rows: Int64[np.ndarray, "_"] | None, *, view: int
) -> Features | None:
    """Some stored rows of a slide, or all, from the store's pack; None where it has none, or an outdated one.

    Raises:
        StoreCorruptError: They are not what was packed.
    """
    if not isinstance(store, Path):  # an upload leaves packs behind
        return None
    path = pack_path(store, encoder, view)
    try:
        state = path.with_suffix(".json").stat()
    except OSError:
        return None
    pack = _open(path, state.st_mtime_ns, state.st_ino)
    start = pack.start_of(slide, encoder, view) if pack else None
    if pack is None or start is None:
        return None
    with reading(str(path)):
        return pack.read(slice(start, start + len(slide)) if rows is None else start + rows)


@lru_cache(maxsize=16)
def _open(path: Path, _modified: int, _inode: int) -> Pack | None:
    """The pack in a file; None where its index is damaged, or it has none."""
    try:
        index = json.loads(path.with_suffix(".json").read_bytes())
        crc = index.pop("crc32c")
        if crc != CRC32C.checksum(canonical_json(index).encode()):
            return None
        return Pack(path, index)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None

"""The checksums of a slide's arrays: one for each block of `SHARD_ROWS` rows, and for each view where there are any."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numcodecs.checksum32 import CRC32C

from g2l_core.errors import StoreCorruptError
from g2l_core.store import schema


def block_name(start: int, view: int | None = None) -> str:
    """The key of a block's checksum: its number, and the view where there are views, as `0` or `0.1`."""
    block = str(start // schema.SHARD_ROWS)
    return block if view is None else f"{block}.{view}"


@dataclass(frozen=True, order=True)
class Shard:
    """One unit of writing: rows [start, stop) of one view."""

    start: int
    stop: int
    view: int

    @property
    def name(self) -> str:
        """Its key in the completion records: row block and view."""
        return block_name(self.start, self.view)


def checksum(values: np.ndarray) -> int:
    """crc32c of values: their bytes in C order, or for text its lines as UTF-8."""
    if values.dtype.kind in "OUT":
        return int(CRC32C.checksum("\n".join(map(str, values)).encode()))
    return int(CRC32C.checksum(np.ascontiguousarray(values)))


def block_checksums(values: np.ndarray, has_views: bool, *, first_row: int = 0, first_view: int = 0) -> dict[str, int]:
    """The checksum of every block of an array, by name.

    Args:
        values: Rows of the array from `first_row` on, which begins a block; their second axis is the views from
            `first_view` on, where the array has views.
        has_views: Whether it has.
        first_row: The stored row of the first value.
        first_view: The view of the first column.
    """
    return {name: checksum(block) for name, block in _blocks(values, has_views, first_row, first_view)}


def _blocks(values: np.ndarray, has_views: bool, first_row: int, first_view: int) -> Iterator[tuple[str, np.ndarray]]:
    for start in range(0, len(values), schema.SHARD_ROWS):
        rows = values[start : start + schema.SHARD_ROWS]
        if not has_views:
            yield block_name(first_row + start), rows
            continue
        for view in range(rows.shape[1]):
            yield block_name(first_row + start, first_view + view), rows[:, view]


def changed_blocks(
    name: str, values: np.ndarray, recorded: Mapping[str, int], *, first_row: int = 0, first_view: int = 0
) -> list[str]:
    """The blocks of an array whose checksum is recorded and is another one; arguments as for `block_checksums`."""
    has_views = name in schema.TABLES and schema.TABLES[name].has_views
    found = block_checksums(values, has_views, first_row=first_row, first_view=first_view)
    return [block for block, crc in found.items() if recorded.get(block, crc) != crc]


def require_unchanged(slide_id: str, name: str, changed: list[str]) -> None:
    """Refuse an array that is not what was written.

    Raises:
        StoreCorruptError: Some of its blocks have another checksum.
    """
    if changed:
        raise StoreCorruptError(
            f"slide {slide_id}: {name} is not what was written: the checksum of block {changed[0]} differs from the "
            "one that the slide's zarr.json records. g2l store verify --repair mends or drops it"
        )

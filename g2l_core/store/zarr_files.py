"""Zarr arrays in folders, written so that a file is on the disk before it takes the old one's place."""

import asyncio
from collections.abc import Mapping
from typing import Any

import zarr
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from g2l_core.files import write_bytes
from g2l_core.store.location import Location, folder_of
from g2l_core.store.remote import RemotePath


class DurableStore(LocalStore):
    """Zarr's local store, whose files survive a loss of power: Zarr's own neither syncs a file nor its folder."""

    async def set(self, key: str, value: Buffer) -> None:
        """Write a file."""
        await asyncio.to_thread(self.set_sync, key, value)

    def set_sync(self, key: str, value: Buffer) -> None:
        """Write a file."""
        self._check_writable()
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, memoryview(value.as_buffer_like()))


def open_array(folder: Location) -> zarr.Array:
    """The array in a folder, for reading and, where it is none at an address, for writing."""
    if isinstance(folder, RemotePath):
        return zarr.open_array(folder.connection.arrays, path=folder.key, mode="r", zarr_format=3)
    return zarr.open_array(DurableStore(folder), mode="r+", zarr_format=3)


def create_array(
    place: Location, layout: Mapping[str, Any], *, is_durable: bool = True, **attributes: object
) -> zarr.Array:
    """Make an array in a folder, in the place of one that is there.

    Args:
        place: Where; made if it is missing.
        layout: As `schema.table_layout` and its kin give it.
        is_durable: Whether what is written is on the disk when a write returns; if not, the caller syncs the files.
        attributes: The array's attributes.

    Raises:
        StoreError: The place is an address.
    """
    folder = folder_of(place)
    store = DurableStore(folder) if is_durable else LocalStore(folder)
    return zarr.create_array(store, attributes=attributes or None, zarr_format=3, overwrite=True, **layout)

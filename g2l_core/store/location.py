"""Where a store is: a folder, or an address that is read over the network. All reading of a store asks this file.

What both kinds of places have is called the same by `pathlib.Path` and `RemotePath`. The functions here are what each
answers in its own way. Only folders are written to.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeAlias, TypeVar

from g2l_core.concurrency import run_ahead
from g2l_core.errors import refuse_address, refuse_unread
from g2l_core.store.remote import RemotePath, remote_path

Location: TypeAlias = Path | RemotePath

FileState = tuple[int, int, int]
"""Bytes, modification time (ns) and inode of a file; of an object, a number made of its tag in place of the inode."""

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")

REQUESTS, SHARD_REQUESTS = 16, 4
"""What is asked for at a time where each costs a request: small things, and whole shards, which memory must hold."""

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(?:/+|$)")


def locate(path: Location | str) -> Location:
    """The place that a user names. An address that went through `pathlib.Path` has lost a slash, which is put back.

    Raises:
        StoreError: It is an address that cannot be read from.
    """
    if isinstance(path, RemotePath):
        return remote_path(str(path))  # anew: what was listed may have changed
    found = _ADDRESS.match(str(path))
    return remote_path(f"{found[1].lower()}://{str(path)[found.end() :]}") if found else Path(path)


def folder_of(place: Location) -> Path:
    """The folder that a place is, for writing.

    Raises:
        StoreError: It is an address.
    """
    refuse_address(place)
    assert isinstance(place, Path)
    return place


def can_list(place: Location) -> bool:
    """Whether what lies below a place can be listed."""
    return isinstance(place, Path) or place.connection.can_list


def state_of(path: Location) -> FileState | None:
    """Whether a file has changed is seen by this; None where there is no file. For places that can be listed.

    Raises:
        StoreUnreadError: Nobody can tell: a folder may not be looked into, or the disk fails.
    """
    if isinstance(path, RemotePath):
        known = path.connection.listing.objects.get(path.key)
        return known.state if known else None
    try:
        found = path.stat()
    except OSError as error:
        refuse_unread(error, path)
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


def size_of(path: Location) -> int | None:
    """The bytes of a file, 0 where there is none; None where it would take a request to know."""
    if not can_list(path):
        return None
    state = state_of(path)
    return state[0] if state else 0


def subfolders(folder: Location) -> list[str]:
    """The names of the folders in a folder, sorted; none where it is absent. For places that can be listed."""
    if isinstance(folder, RemotePath):
        return folder.connection.listing.folders.get(folder.key, [])
    if not folder.is_dir():
        return []
    with os.scandir(folder) as members:
        return sorted(member.name for member in members if member.is_dir())


def read_ahead(
    function: Callable[[Item], Outcome], items: Iterable[Item], place: Location, *, at_once: int = REQUESTS
) -> Iterator[Outcome]:
    """Yield function(item) in order: from an address several at a time, as each waits for answers; else one by one."""
    return run_ahead(function, items, workers=at_once if isinstance(place, RemotePath) else 0, lookahead=at_once)


def below(path: Location, folder: Location) -> str:
    """The path of a place below another one, with slashes."""
    if isinstance(path, RemotePath) and isinstance(folder, RemotePath):
        return path.relative_to(folder).as_posix()
    return folder_of(path).relative_to(folder_of(folder)).as_posix()


def sizes_below(folder: Location) -> Iterator[tuple[tuple[str, ...], int]]:
    """The path below a folder, and the bytes, of every file in it. For places that can be listed."""
    if isinstance(folder, RemotePath):
        start = f"{folder.key}/".lstrip("/")
        for key, known in folder.connection.listing.objects.items():
            if key.startswith(start):
                yield tuple(key[len(start) :].split("/")), known.size
        return
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            yield path.relative_to(folder).parts, path.stat().st_size

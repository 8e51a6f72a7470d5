"""Hollow files: shards whose content is at an address alone, while the folder that they were sent from goes on.

A hollow file has the name and the size of the shard and no content: a hole, which takes no room on most disks. So
everything that asks whether a shard is there gets the right answer, and whoever reads it finds that its checksum is
not the recorded one. No shard is like it: a shard ends with the places of its chunks and their checksum.
"""

import os
from pathlib import Path

from g2l_core.store import schema
from g2l_core.store.location import Location

TAIL_BYTES = 20
"""Where a shard's last chunk begins, its length, and the checksum of all of these, which cannot all be zero."""


MARK = ".catalogue/spool.json"
"""What a folder has whose hollow files are at an address, which it names; a file of zeros elsewhere is damaged."""


def is_shard(parts: tuple[str, ...]) -> bool:
    """Whether a file of a slide, by its path below the slide's folder, is a shard of features."""
    return len(parts) > 2 and parts[0] == schema.FEATURES and parts[-1].startswith("c.")


def is_hollow(path: Location) -> bool:
    """Whether a file is a hollow shard; False where there is none, it cannot be read, or is at an address."""
    if not isinstance(path, Path) or schema.FEATURES not in path.parts or not path.name.startswith("c."):
        return False
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            return size >= TAIL_BYTES and not any(file.read())
    except OSError:
        return False


def write_hollow(path: Path, size: int, aside: Path) -> None:
    """Put a hollow file in the place of a shard, in one step.

    Args:
        path: The shard, which may be there or not; its folder is.
        size: Its bytes.
        aside: A name on the same disk that nobody else uses.

    Raises:
        OSError: It cannot be written.
    """
    with aside.open("wb") as file:
        file.truncate(size)
    aside.replace(path)

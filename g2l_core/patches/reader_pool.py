"""A pool of slide readers, for more slides than may be open at a time."""

import resource
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

from g2l_core.patches.render import PatchReader

MAX_OPEN = 256


def default_max_open() -> int:
    """How many slides may stay open: each holds a file or three, and the limit of this process must hold for all."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_OPEN if soft == resource.RLIM_INFINITY else max(1, min(MAX_OPEN, soft // 4))


@dataclass
class _Entry:
    reader: PatchReader
    users: int = 0


class ReaderPool:
    """Opens slides when they are read, and closes those that were read longest ago. Safe in several threads."""

    def __init__(self, open_reader: Callable[[str], PatchReader], max_open: int | None = None) -> None:
        """Make an empty pool.

        Args:
            open_reader: Opens a slide by its id.
            max_open: How many stay open while nobody reads them; None takes what the process may have open.
        """
        self._open_reader, self._lock = open_reader, Lock()
        self._max_open = max_open if max_open is not None else default_max_open()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    @contextmanager
    def reading(self, slide_id: str) -> Iterator[PatchReader]:
        """The reader of a slide, which stays open as long as the block.

        Raises:
            SlideError: It cannot be opened.
        """
        entry = self._enter(slide_id)
        try:
            yield entry.reader
        finally:
            with self._lock:
                entry.users -= 1
                too_many = max(0, len(self._entries) - self._max_open)
                idle = [i for i, e in self._entries.items() if not e.users][:too_many]
                closing = [self._entries.pop(i).reader for i in idle]
            for reader in closing:
                reader.close()

    def _enter(self, slide_id: str) -> _Entry:
        with self._lock:
            entry = self._entries.get(slide_id)
            if entry is not None:
                entry.users += 1
                self._entries.move_to_end(slide_id)
                return entry
        opened = self._open_reader(slide_id)  # outside the lock, so that the others go on reading
        with self._lock:
            entry = self._entries.setdefault(slide_id, _Entry(opened))
            entry.users += 1
        if entry.reader is not opened:
            opened.close()
        return entry

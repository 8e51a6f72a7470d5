"""A cache of decoded patches on a fast local disk, for slides on slow ones. Processes share it and may be killed.

Each slide has two files: its patches' pixels, sparse, and a hash of each patch's pixels that says which are there. A
patch counts only if its pixels have its hash, so one that a kill tore is read from the slide again.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from threading import Lock

import numpy as np
import xxhash

from g2l_core.errors import UsageError
from g2l_core.patches.render import PatchReader
from g2l_core.types import Rgb


class PixelCache:
    """A folder of decoded patches that does not exceed a size. Nothing is evicted.

    An epoch reads every patch once, so an evicted patch would be needed again before the one that took its place.
    """

    def __init__(self, folder: Path, gb: float) -> None:
        """Make the folder, or use what earlier runs left there.

        Args:
            folder: On a fast disk.
            gb: Maximum size in GB (1e9 bytes).

        Raises:
            UsageError: The folder cannot be made.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make the pixel cache {folder}: {error.strerror}") from error
        self._folder, self._limit, self._lock = folder, gb * 1e9, Lock()
        self._held = sum(path.stat().st_blocks * 512 for path in folder.glob("*.pixels"))

    def wrap(self, open_reader: Callable[[], PatchReader], key: str, n: int, patch_px: int) -> "CachedPatches":
        """A reader that keeps what it reads.

        Args:
            open_reader: Opens the slide, when a patch is needed that is not in the cache.
            key: Identifies the content of the slide and its patches.
            n: Patches of the slide.
            patch_px: Their side.
        """
        name = hashlib.sha256(key.encode()).hexdigest()[:24]
        return CachedPatches(open_reader, self, self._folder / name, n, patch_px)

    def admit(self, size: int) -> bool:
        """Whether `size` more bytes fit. If they do, they are counted."""
        with self._lock:
            fits = self._held + size <= self._limit
            self._held += size if fits else 0
            return fits


class CachedPatches:
    """The patches of one slide, from the cache if they are in it."""

    def __init__(
        self, open_reader: Callable[[], PatchReader], cache: PixelCache, path: Path, n: int, patch_px: int
    ) -> None:
        self._open_reader, self._cache, self._lock = open_reader, cache, Lock()
        self._reader: PatchReader | None = None
        shape = (n, patch_px, patch_px, 3)
        self._pixels = _mapped(path.with_suffix(".pixels"), np.uint8, shape)
        self._hashes = _mapped(path.with_suffix(".hashes"), np.uint64, (n,))

    def read(self, row: int, max_absent: float = 1.0) -> Rgb:
        """The patch of a stored row, uint8 (patch_px, patch_px, 3).

        Raises:
            ReadError: It is not in the cache, and its pixels cannot be read.
        """
        known = int(self._hashes[row])
        if known:
            patch = np.array(self._pixels[row])
            if _hash(patch) == known:
                return patch
        patch = self._slide().read(row, max_absent)
        if self._cache.admit(0 if known else patch.nbytes):
            self._pixels[row] = patch
            self._hashes[row] = _hash(patch)
        return patch

    def _slide(self) -> PatchReader:
        with self._lock:
            self._reader = self._reader or self._open_reader()
            return self._reader

    def close(self) -> None:
        """Close the slide. The memory maps are closed with the last array that refers to them."""
        if self._reader is not None:
            self._reader.close()


def _mapped(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """A file as an array. A new file is sparse and holds zeros; one that is there is used as it is."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    try:
        with path.open("ab") as file:
            if file.tell() != size:
                file.truncate(size)
        return np.memmap(path, dtype, "r+", shape=shape)
    except OSError as error:
        raise UsageError(f"the pixel cache cannot write {path}: {error.strerror}") from error


def _hash(patch: Rgb) -> int:
    """xxh3-64 of the pixels, never 0."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(patch).data) or 1

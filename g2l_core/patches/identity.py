"""Check that a slide's files are still those that were cached."""

from collections.abc import Sequence
from pathlib import Path

import xxhash

from g2l_core.errors import ReadError, StoreMismatchError
from g2l_core.slides.fingerprint import file_state, fingerprint
from g2l_core.store.features import StoredSlide


def images_fingerprint(folder: Path, names: Sequence[str]) -> str:
    """Hexadecimal xxh3-128 over the images' names and sizes."""
    state = xxhash.xxh3_128()
    for name in sorted(names):
        try:
            state.update(f"{name}|{(folder / name).stat().st_size}\n".encode())
        except OSError as error:
            raise ReadError(f"cannot read {folder / name}: {error.strerror}") from error
    return state.hexdigest()


def require_same_slide(stored: StoredSlide, path: Path) -> None:
    """Refuse a slide whose file has changed since stage one.

    A file of the size and the time of change that it had then is not read again: the fingerprints of 100,000 slides
    are 300 GB of reading.

    Raises:
        StoreMismatchError: Its fingerprint differs.
        ReadError: It cannot be read.
    """
    if stored.facts.file_state is not None and file_state(path) == stored.facts.file_state:
        return
    names = stored.patch_ids
    current = fingerprint(path) if names is None else images_fingerprint(path, names)
    if current != stored.facts.fingerprint:
        raise StoreMismatchError(
            f"slide {stored.slide_id}: {path} is not the file that was cached (fingerprint {current[:12]}, "
            f"stored {stored.facts.fingerprint[:12]}). Restore it, or use another --store"
        )

"""Check that a slide's files are still those that were cached."""

from collections.abc import Sequence
from pathlib import Path

import xxhash

from g2l_core.errors import ReadError, StoreMismatchError
from g2l_core.slides.fingerprint import file_state, fingerprint
from g2l_core.slides.readers import IMAGE_SUFFIXES
from g2l_core.store.features import StoredSlide

RELOCATE = "`g2l store relocate STORE FOLDER`"


def images_fingerprint(folder: Path, names: Sequence[str]) -> str:
    """Hexadecimal xxh3-128 over the images' names and sizes."""
    state = xxhash.xxh3_128()
    for name in sorted(names):
        try:
            state.update(f"{name}|{(folder / name).stat().st_size}\n".encode())
        except OSError as error:
            raise ReadError(f"cannot read {folder / name}: {error.strerror}") from error
    return state.hexdigest()


def current_fingerprint(stored: StoredSlide, path: Path, names: Sequence[str] = ()) -> str:
    """The fingerprint of what lies at `path`, taken as the one in the store was.

    That of patch images covers the images in the store. In a store of version 0.1 it covers all images of the set, even
    those that --max-patches left out; it is accepted where it fits.

    Args:
        stored: The slide.
        path: The slide's file, or the folder of the patch images.
        names: All patch images of the set, where they are known; else they are looked for.

    Raises:
        ReadError: It cannot be read.
    """
    kept = stored.patch_ids
    if kept is None:
        return fingerprint(path)
    current = images_fingerprint(path, kept)
    if current == stored.facts.fingerprint:
        return current
    former = images_fingerprint(path, names or _images_in(path))
    return former if former == stored.facts.fingerprint else current


def _images_in(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]


def _is_untouched(stored: StoredSlide, path: Path) -> bool:
    known, place = stored.facts.file_state, str(path.resolve())
    return known is not None and place == stored.facts.source and file_state(path) == known


def require_same_slide(stored: StoredSlide, path: Path, names: Sequence[str] = ()) -> None:
    """Refuse a slide whose file has changed since stage one. The arguments are those of `current_fingerprint`.

    A file in its place, of the size and the time of change that it had then, is not read again: the fingerprints of
    100,000 slides are 300 GB of reading.

    Raises:
        StoreMismatchError: Its fingerprint differs.
        ReadError: It cannot be read.
    """
    if not stored.facts.fingerprint:
        raise ReadError(
            f"slide {stored.slide_id} was imported without its slide. g2l store import with --slides FOLDER, into the "
            "same store, finds it"
        )
    try:
        if _is_untouched(stored, path):
            return
        current = current_fingerprint(stored, path, names)
    except ReadError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise ReadError(
            f"slide {stored.slide_id}: {error}. Restore it; or if it was moved, {RELOCATE} finds it again"
        ) from error
    if current != stored.facts.fingerprint:
        raise StoreMismatchError(
            f"slide {stored.slide_id}: {path} is not the file that was cached (fingerprint {current[:12]}, "
            f"stored {stored.facts.fingerprint[:12]}). Restore it, or use another --store; if it was moved, {RELOCATE} "
            "finds it again"
        )

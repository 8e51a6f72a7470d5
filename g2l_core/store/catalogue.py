"""The catalogue of a store's slides: an index that makes a large store quick to open, and never the truth.

The truth is the slides' own documents. The catalogue file holds a copy of each, with the size, time and inode that the
document had when it was copied. A scan asks the file system for these of every document, and reads those that the
catalogue does not have as they are now: 10,000 slides take a quarter of a second, where reading them takes seconds. A
catalogue that is absent, damaged or stale costs time alone.
"""

import gc
import json
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numcodecs.checksum32 import CRC32C

from g2l_core.errors import StoreCorruptError, StoreError, refuse_open_files
from g2l_core.files import write_bytes
from g2l_core.store import format1, schema
from g2l_core.store.documents import GROUP_FILE, read_slide, slide_facts
from g2l_core.store.facts import SlideFacts
from g2l_core.store.location import FileState, Location, can_list, read_ahead, state_of, subfolders

CATALOGUE = ".catalogue/slides.jsonl"
"""The catalogue's file, below the store's folder. Its first line has the checksum of the others."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is known of one slide, or of a folder that ought to be one."""

    state: FileState
    """That of its document."""
    facts: SlideFacts | None = None
    """None where the document is damaged."""
    damage: str = ""
    """What is wrong with the document, for people."""
    good: UInt8[np.ndarray, " block"] | None = field(default=None, compare=False)
    """Good patches in each block of `REPLAY_ROWS` rows, where they have been counted."""


def scan(store: Location, store_format: int, known: Mapping[str, Entry]) -> dict[str, Entry]:
    """Every slide of a store, by id, sorted; those whose document has not changed are taken as they are known.

    Where nothing can be listed, over HTTP, the slides that are known are all there are. What is read of one is compared
    with checksums all the same, and its document is read anew where it does not fit.

    Args:
        store: Where the store is.
        store_format: Its format.
        known: Entries from before.
    """
    found = _scan(store / "slides", "", store_format, known) if can_list(store) else known.items()
    return dict(sorted(found))


def entry(store: Location, slide_id: str, store_format: int, known: Entry | None) -> Entry | None:
    """One slide as it stands now; None where there is none. Arguments as for `scan`."""
    return _entry(store / "slides" / slide_id, slide_id, store_format, known) if can_list(store) else known


def _scan(folder: Location, prefix: str, store_format: int, known: Mapping[str, Entry]) -> Iterator[tuple[str, Entry]]:
    names = list(filter(_is_finished, subfolders(folder)))

    def look(name: str) -> Entry | None:
        return _entry(folder / name, prefix + name, store_format, known.get(prefix + name))

    for name, entry in zip(names, read_ahead(look, names, folder), strict=True):
        slide_id, here = prefix + name, folder / name
        if entry is not None:
            yield slide_id, entry
        if not _is_slide_folder(here, entry):
            yield from _scan(here, f"{slide_id}/", store_format, known)


def _is_finished(name: str) -> bool:
    return not name.endswith(schema.LEFTOVER)


def _entry(folder: Location, slide_id: str, store_format: int, known: Entry | None) -> Entry | None:
    """The slide in a folder; None where the folder holds slides, or nothing that was ever finished."""
    state = state_of(folder / GROUP_FILE)
    if state is None:
        # At an address a slide's document is the last that is sent of it; in a folder all of it appears in one step.
        is_sent = isinstance(folder, Path) or known is not None
        is_damaged = is_sent and _has_tables(folder) and store_format > 1
        return Entry(state=(0, 0, 0), damage=_absent(folder)) if is_damaged else None
    if known is not None and known.state == state and store_format != format1.FORMAT:
        return known
    try:
        facts = read_slide(folder, slide_id, store_format)
    except FileNotFoundError:
        return None
    except StoreCorruptError as error:
        return Entry(state=state, damage=str(error)) if not _holds_slides(folder) else None
    return None if facts is None else Entry(state=state, facts=facts)


def _absent(folder: Location) -> str:
    return f"{folder / GROUP_FILE} is absent, but the slide's arrays are there. g2l store verify --repair restores it"


def _has_tables(folder: Location) -> bool:
    return _has_document(folder / "coords")


def _has_document(folder: Location) -> bool:
    return state_of(folder / GROUP_FILE) is not None


def _holds_slides(folder: Location) -> bool:
    """Whether a folder whose document is damaged holds slides, rather than a slide's arrays."""
    return not _has_tables(folder) and any(_has_document(folder / name) for name in subfolders(folder))


def _is_slide_folder(folder: Location, entry: Entry | None) -> bool:
    """Whether nothing below a folder can be another slide: it has arrays. A failed slide's folder has none."""
    return (entry is not None and entry.facts is not None and entry.facts.status == "ok") or _has_tables(folder)


def count_good(status: UInt8[np.ndarray, " patch"]) -> UInt8[np.ndarray, " block"]:
    """Good patches in each block of `REPLAY_ROWS` rows."""
    starts = np.arange(0, len(status), schema.REPLAY_ROWS)
    good = (status == schema.STATUS["ok"]).astype(np.uint8)
    return np.add.reduceat(good, starts, dtype=np.uint8) if len(starts) else np.zeros(0, np.uint8)


# -- the file -------------------------------------------------------------------------------------------------


def load(store: Location) -> dict[str, Entry]:
    """The entries of the catalogue file; none where it is absent or damaged.

    Raises:
        StoreError: Too many files are open; or it is absent or damaged where nothing tells the slides but it.
    """
    entries = _load(store)
    if entries is None and not can_list(store):
        raise StoreError(
            f"{store / CATALOGUE} is absent or damaged, and over HTTP nothing else tells which slides there are. Where "
            "the store's folder is, g2l store verify --repair writes it"
        )
    return entries or {}


def _load(store: Location) -> dict[str, Entry] | None:
    try:
        head, _, body = (store / CATALOGUE).read_bytes().partition(b"\n")
        if json.loads(head) != _head(body):
            return None
        with _without_collections():
            return dict(_entry_of(json.loads(line)) for line in body.splitlines())
    except (OSError, ValueError, RecursionError, TypeError, AttributeError, KeyError) as error:
        refuse_open_files(error, store / CATALOGUE, StoreError)
        return None


@contextmanager
def _without_collections() -> Iterator[None]:
    """Pause the garbage collector: over a million new objects it takes a third of the time, and finds nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def save(store: Path, entries: Mapping[str, Entry]) -> None:
    """Write the catalogue file. Entries of damaged documents are left out: they are looked at again.

    Raises:
        OSError: It cannot be written.
    """
    path = store / CATALOGUE
    path.parent.mkdir(exist_ok=True)
    write_bytes(path, content_of(entries))


def content_of(entries: Mapping[str, Entry]) -> bytes:
    """The content of a catalogue file."""
    body = b"".join(_line_of(slide_id, entry) for slide_id, entry in entries.items() if entry.facts is not None)
    return json.dumps(_head(body)).encode() + b"\n" + body


def _head(body: bytes) -> dict[str, int]:
    return {"format": schema.FORMAT, "crc32c": int(CRC32C.checksum(body))}


def _line_of(slide_id: str, entry: Entry) -> bytes:
    facts = entry.facts.to_json() if entry.facts else {}
    good = "" if entry.good is None else b64encode(entry.good.tobytes()).decode()
    return json.dumps([slide_id, entry.state, good, facts], separators=(",", ":")).encode() + b"\n"


def _entry_of(line: list[Any]) -> tuple[str, Entry]:
    slide_id, (size, time, inode), good, facts = line
    counts = np.frombuffer(b64decode(good), np.uint8) if good else None
    return slide_id, Entry(state=(size, time, inode), facts=slide_facts(facts, slide_id), good=counts)

"""Copy a store to an address, so that everything that reads stores can open it there.

An object is written in one step. The files of slides are written before their documents, these before the store's own,
and the catalogue last: a reader never sees a slide that is not whole. Until the store's own document is there, a mark
says whose upload it is. What is at the address already, the same, is not sent again.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import md5
from itertools import chain
from pathlib import Path

from g2l_core.concurrency import run_ahead
from g2l_core.errors import StoreCorruptError, StoreError, StoreMismatchError
from g2l_core.files import parse_json
from g2l_core.store import catalogue, format1, schema
from g2l_core.store.address_lock import LOCK
from g2l_core.store.catalogue import CATALOGUE
from g2l_core.store.documents import GROUP_FILE, parse_group
from g2l_core.store.features import FeatureStore
from g2l_core.store.hollow import is_hollow
from g2l_core.store.location import Location, locate, sizes_below
from g2l_core.store.provenance import differences
from g2l_core.store.remote import Connection, Listing, RemoteObject, RemotePath

UPLOADS = 8
"""Objects that are sent at a time; each is held in memory whole."""

MARK = ".catalogue/upload.json"
"""What is at an address before the store's own document is: the identity of the store that is being uploaded."""

FIRST = f"coords/{GROUP_FILE}"
"""What is sent of a slide before all else: readers know by it that what is in the folder is no slide of its own."""


@dataclass(frozen=True)
class Sent:
    """One file of an upload."""

    key: str
    """Its path below the store's folder."""
    size: int
    """In bytes."""
    is_new: bool
    """Whether it was sent; else the same was there."""
    total: int
    """How many files the upload has."""


def upload(store: FeatureStore, address: str) -> Iterator[Sent]:
    """Copy a store to an address; an upload that was interrupted goes on where it was.

    Slides at the address that the store does not have are left there, and are no part of the catalogue.

    Args:
        store: A store in a folder, which nobody else writes to meanwhile.
        address: Of s3:// or gs://; nobody else writes there meanwhile.

    Yields:
        Each file that is at the address now.

    Raises:
        StoreMismatchError: Another store is at the address.
        StoreCorruptError: A slide's document is damaged. Nothing has been sent.
        StoreError: The address cannot be written to or listed, a file cannot be read, or the objects are not what was
            sent.
    """
    folder, target = _folder_of(store), target_of(address)
    store.require_undamaged()
    connection = target.connection
    there = connection.listed()
    require_same_store(store, target, there)
    if GROUP_FILE not in there.objects:
        connection.put(MARK, json.dumps(_identity(store)).encode())
    stages = _in_order(store)
    total = sum(map(len, stages))

    def sent(key: str) -> Sent:
        known, is_new = send(folder, key, connection, there)
        return Sent(key, known.size, is_new, total)

    for keys in stages:  # one after another, and the next only once all of it is there
        yield from run_ahead(sent, keys, workers=UPLOADS, lookahead=UPLOADS)
    now = connection.listed()
    _require_all(folder, stages, target, now)
    connection.put(CATALOGUE, catalogue.content_of(_entries_there(store, now)))
    connection.delete(MARK)


def _identity(store: FeatureStore) -> dict[str, object]:
    """What tells a store from others."""
    facts = store.facts.to_json()
    return {name: facts.get(name) for name in ("created", "grid", "views")}


def _folder_of(store: FeatureStore) -> Path:
    if not isinstance(store.path, Path):
        raise StoreError(f"{store.path} is an address: g2l store subset copies it into a folder")
    format1.refuse_writing(store.facts.format, store.path)
    return store.path


def target_of(address: Location | str) -> RemotePath:
    """The place that a user names.

    Raises:
        StoreError: It is none that can be written to.
    """
    place = locate(address)
    if not isinstance(place, RemotePath):
        raise StoreError(f"{address} is a folder, and stores are uploaded to addresses of s3:// or gs://")
    if not place.connection.can_list:
        raise StoreError(f"{place}: a web server is only read from; write to an address of s3:// or gs://")
    return place


def send(folder: Path, key: str, connection: Connection, there: Listing) -> tuple[RemoteObject, bool]:
    """Have a file of a store at an address.

    Returns:
        What is there, and whether it was sent now; else the same was there.

    Raises:
        StoreError: The file cannot be read, the object cannot be written, or has another content afterwards.
    """
    if is_hollow(folder / key):
        return _require_there(folder / key, key, connection, there), False
    content = _content(folder / key)
    tag = md5(content, usedforsecurity=False).hexdigest()
    known = there.objects.get(key)
    if known and known.size == len(content) and (known.tag == tag or connection.read(key) == content):
        return known, False
    # The tag mostly is the MD5 of what the server has; where it is another, the object is read.
    now = connection.put(key, content)
    if now != tag and connection.read(key) != content:
        raise StoreError(
            f"{connection.address}/{key} is not what was sent: does another command write there? Run the same command "
            "again"
        )
    return RemoteObject(len(content), (len(content), 0, 0), now), True


def _require_there(path: Path, key: str, connection: Connection, there: Listing) -> RemoteObject:
    """The content of a hollow file, which is at the address."""
    size, known = path.stat().st_size, there.objects.get(key)
    if known is None or known.size != size:
        raise StoreError(
            f"{path} holds nothing but zeros: what was in it is at another address, was deleted at "
            f"{connection.address}, or is damaged. Run g2l store verify --repair, then the caching command"
        )
    return known


def require_same_store(store: FeatureStore, target: RemotePath, there: Listing) -> None:
    """Refuse an address at which there is something else.

    Raises:
        StoreMismatchError: There is.
    """
    key = GROUP_FILE if GROUP_FILE in there.objects else MARK
    if key not in there.objects:
        if strange := min((other for other in there.objects if other != LOCK), default=""):
            raise StoreMismatchError(f"{target} holds something else, such as {strange}; give another address")
        return
    try:
        content = target.connection.read(key)
        known = parse_group(content, checked=True) if key == GROUP_FILE else parse_json(content)
        told = {name: (known or {}).get(name) for name in ("created", "grid", "views")}
    except (ValueError, AttributeError) as error:
        raise StoreMismatchError(f"{target / key} is no store's: {error}; give another address") from error
    changed = [f"{name} is {a!r} there, {b!r} here" for name, a, b in differences(told, _identity(store))]
    if changed:
        raise StoreMismatchError(f"another store is at {target}: {'; '.join(changed)}. Give another address")


def _in_order(store: FeatureStore) -> Sequence[Sequence[str]]:
    """The keys of a store's files, in stages: what is in slides, then their documents, then the store's own."""
    slides = sorted(f"slides/{slide_id}/" for slide_id in store.slide_ids())
    documents = [f"{slide}{GROUP_FILE}" for slide in slides]
    names = {"/".join(("slides", *parts)) for parts, _ in sizes_below(store.path / "slides") if _is_kept(parts)}
    first = [key for slide in slides if (key := f"{slide}{FIRST}") in names]
    return first, sorted(names - {*first, *documents}), documents, [GROUP_FILE]


def _is_kept(parts: Sequence[str]) -> bool:
    return not any(part.endswith(schema.LEFTOVER) for part in parts)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoreError(
            f"cannot read {path}: {error.strerror}. Run g2l store verify, then the upload again"
        ) from error


def _require_all(folder: Path, stages: Sequence[Sequence[str]], target: RemotePath, now: Listing) -> None:
    """Refuse an address at which a file is absent, or of another size."""
    for key in chain.from_iterable(stages):
        size = (folder / key).stat().st_size
        found = now.objects.get(key)
        if found is None or found.size != size:
            had = "is absent" if found is None else f"has {found.size:,} bytes"
            raise StoreError(
                f"{target / key} {had} after the upload, and the file has {size:,}: does another command write there, "
                "or into the folder? Run the same command again"
            )


def _entries_there(store: FeatureStore, now: Listing) -> Mapping[str, catalogue.Entry]:
    """The store's slides, each with the state that its document has at the address."""
    for slide in store.slides():
        with suppress(StoreCorruptError):  # verify names it
            store.good_by_block(slide)
    states = {slide_id: now.objects[f"slides/{slide_id}/{GROUP_FILE}"].state for slide_id in store.entries}
    return {slide_id: replace(entry, state=states[slide_id]) for slide_id, entry in store.entries.items()}

"""The JSON documents in which a store keeps its facts: groups of Zarr with G2L's attribute, each with a checksum.

G2L writes them itself, not through Zarr: the new document is on the disk before it takes the old one's place, and a
document that is empty, torn or changed is an error that names its file.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numcodecs.checksum32 import CRC32C

from g2l_core.errors import StoreCorruptError, StoreError, refuse_open_files
from g2l_core.files import write_text
from g2l_core.store import format1, schema
from g2l_core.store.facts import OK, SlideFacts
from g2l_core.store.location import Location, folder_of
from g2l_core.store.provenance import canonical_json

GROUP_FILE = "zarr.json"
CHECKSUM = "crc32c"


def checksum(facts: Mapping[str, Any]) -> int:
    """crc32c of facts as canonical JSON, UTF-8, without their own `crc32c`."""
    content = {key: value for key, value in facts.items() if key != CHECKSUM}
    return int(CRC32C.checksum(canonical_json(content).encode()))


def read_group(folder: Location, *, checked: bool) -> dict[str, Any] | None:
    """G2L's facts of a group; None where it has none, being a folder of slides or of somebody else.

    Args:
        folder: The group's folder.
        checked: Whether the facts must carry their checksum, as format 2 writes it.

    Raises:
        FileNotFoundError: The folder is no group.
        StoreCorruptError: The document cannot be read, or is not what was written.
    """
    with _reading(folder / GROUP_FILE):
        return parse_group((folder / GROUP_FILE).read_bytes(), checked=checked)


def read_slide(folder: Location, slide_id: str, store_format: int) -> SlideFacts | None:
    """The facts of a slide; None where the folder is none, but holds slides.

    Raises:
        FileNotFoundError: The folder is no group.
        StoreCorruptError: The facts cannot be read, are not what was written, or are those of another slide.
    """
    is_old = store_format == format1.FORMAT
    stored = read_group(folder, checked=not is_old)
    if stored is None:
        return None
    with _reading(folder / GROUP_FILE):
        return slide_facts(stored, slide_id, folder_of(folder) if is_old else None)


def read_slide_again(folder: Location, known: SlideFacts, slide_id: str, store_format: int) -> SlideFacts:
    """The facts of a slide that is known; those that are known where its group has none.

    Raises:
        StoreCorruptError: The facts cannot be read, are not what was written, or are not there any more.
    """
    try:
        return read_slide(folder, slide_id, store_format) or known
    except FileNotFoundError as error:
        raise StoreCorruptError(f"{folder / GROUP_FILE} is absent. Restore it from a copy") from error


def slide_facts(stored: Mapping[str, Any], slide_id: str, old_folder: Path | None = None) -> SlideFacts:
    """The facts of a slide from their JSON values.

    Args:
        stored: The values.
        slide_id: Whose they must be.
        old_folder: The slide's folder, where the store has format 1.

    Raises:
        ValueError: They are those of another slide, or not of the types that facts have.
        OSError: Facts of format 1 cannot be read.
    """
    facts = SlideFacts.from_json(stored)
    if old_folder is not None:
        facts = format1.with_features(facts, old_folder)
    elif facts.slide_id != slide_id:
        raise ValueError(f"it is the document of slide {facts.slide_id!r}")
    if facts.status == OK and not (_is_count(facts.n_patches) and _is_count(facts.n_views)):
        raise ValueError(f"n_patches is {facts.n_patches!r} and n_views {facts.n_views!r}; expected whole numbers")
    return facts


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@contextmanager
def _reading(path: Location) -> Iterator[None]:
    """Translate the errors about a document that is damaged or cannot be read.

    Raises:
        FileNotFoundError: It is absent.
        StoreCorruptError: The block raised one of the others.
        StoreError: Too many files are open, so that nobody knows whether it is damaged.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError, TypeError, AttributeError, KeyError) as error:
        refuse_open_files(error, path, StoreError)
        said = error.strerror if isinstance(error, OSError) else str(error) or type(error).__name__
        raise StoreCorruptError(
            f"{path} is damaged: {said}. Restore it from a copy, or run g2l store verify"
        ) from error


def parse_group(content: bytes, *, checked: bool) -> dict[str, Any] | None:
    """G2L's facts in the content of a group's `zarr.json`; None where it has none.

    Raises:
        ValueError: The content is not what was written.
        RecursionError: It is nested too deeply to be a store's.
    """
    if not content.strip():
        raise ValueError("it is empty")
    document = json.loads(content)
    if not isinstance(document, dict) or document.get("node_type") != "group":
        raise ValueError("it does not describe a group of Zarr version 3")
    attributes = document.get("attributes", {})
    if not isinstance(attributes, dict):
        raise ValueError("its attributes are no JSON object")
    facts = attributes.get(schema.ATTRIBUTE)
    if facts is None:
        return None
    if not isinstance(facts, dict):
        raise ValueError(f"its attribute {schema.ATTRIBUTE} is no JSON object")
    if checked and facts.get(CHECKSUM) != checksum(facts):
        raise ValueError("its content does not have the checksum that was written with it")
    facts.pop(CHECKSUM, None)
    return facts


def write_group(place: Location, facts: Mapping[str, Any] | None = None) -> None:
    """Write a group's document with its facts, or an empty group; its folder is made if it is missing.

    The document is on the disk when this returns.

    Raises:
        OSError: The disk is full, or cannot be written to.
        StoreError: The place is an address.
    """
    folder = folder_of(place)
    attributes = {} if facts is None else {schema.ATTRIBUTE: {**facts, CHECKSUM: checksum(facts)}}
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    folder.mkdir(exist_ok=True)
    write_text(folder / GROUP_FILE, json.dumps(document, indent=1, allow_nan=False))

"""A lock at an address, so that one command at a time writes there.

An object store has no lock that its holder's death frees. This one is an object, which is written only where there is
none: of several commands at once, one gets it. It says which folder is sent from, so that a command that was killed
goes on there; from elsewhere it can be taken over, which somebody who knows that the other is dead must ask for.
"""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from g2l_core.errors import StoreError
from g2l_core.files import parse_json, write_text
from g2l_core.store.boundary import writing
from g2l_core.store.provenance import utc_now
from g2l_core.store.remote import Connection, RemotePath

LOCK = ".catalogue/writer.json"
"""The object; in a folder, the file that has the folder's own id."""


@dataclass(frozen=True)
class AddressLock:
    """The lock at an address, held."""

    target: RemotePath
    owner: str
    """The id of the folder that is sent from."""
    is_sure: bool
    """Whether the server writes an object only where there is none; if not, two commands may both hold the lock."""

    def require_held(self) -> None:
        """Refuse to go on writing once somebody else has taken the lock over.

        Raises:
            StoreError: Somebody has, or the lock cannot be read.
        """
        now = _holder(self.target.connection)
        if now.get("id") != self.owner:
            raise StoreError(
                f"{self.target} is written by another command now{_told(now)}, which took its lock over. End one of "
                "the two; the same command goes on"
            )


@contextmanager
def locked_address(target: RemotePath, folder: Path, *, take: bool = False) -> Iterator[AddressLock]:
    """Hold the lock at an address while something is sent there from a folder.

    Only for the one who holds a lock of the folder: a lock that was left by a killed command of the same folder is
    taken over.

    Args:
        target: The address.
        folder: The folder, which gets an id that outlives the command.
        take: Whether to take over the lock of another folder, whose command is known to be dead.

    Raises:
        StoreError: Another folder's command holds it, the address cannot be written to, or the folder cannot.
    """
    owner, connection = _own_id(folder), target.connection
    held = _holder(connection)
    if held and held.get("id") != owner and not take:
        raise _refusal(target, held)
    content = json.dumps({"id": owner, "host": socket.gethostname(), "since": utc_now()}).encode()
    if held or connection.create(LOCK, content) is None:
        connection.put(LOCK, content)
    now = _holder(connection)
    if now.get("id") != owner:  # another one was quicker
        raise _refusal(target, now)
    try:
        yield AddressLock(target, owner, is_sure=connection.create(LOCK, content) is False)
    finally:
        with suppress(StoreError):  # it stays, and whoever meets it is told what to do
            if _holder(connection).get("id") == owner:
                connection.delete(LOCK)


def _refusal(target: RemotePath, held: dict[str, Any]) -> StoreError:
    return StoreError(
        f"another g2l command writes to {target}{_told(held)}. Wait for it. If it was killed, and nobody writes there, "
        "run the same command where it ran, or with --take-lock"
    )


def _told(held: dict[str, Any]) -> str:
    return f" (on {held['host']}, since {held['since']})" if {"host", "since"} <= held.keys() else ""


def _holder(connection: Connection) -> dict[str, Any]:
    """What the lock says of its holder; empty where there is none."""
    try:
        found = parse_json(connection.read(LOCK))
    except FileNotFoundError:
        return {}
    except ValueError:
        return {"id": ""}
    return found if isinstance(found, dict) and found else {"id": ""}


def _own_id(folder: Path) -> str:
    """The id of a folder, made where it has none."""
    path = folder / LOCK
    with suppress(OSError, ValueError, AttributeError):
        if known := parse_json(path.read_bytes()).get("id"):
            return str(known)
    with writing(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"id": (made := uuid4().hex)}))
    return made

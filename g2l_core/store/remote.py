"""Objects below an address, read over the network: S3, Google Cloud Storage, and plain HTTP servers.

Everything goes through one `Connection`: what Zarr reads and what G2L reads itself, with the same timeouts, the same
tries after a cut connection, and the same words for what cannot be read. The package obstore, which does the work, is
an extra and is imported when the first object is asked for.
"""

import asyncio
import os
import random
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import PurePosixPath
from types import ModuleType
from typing import Any, TypeVar
from urllib.parse import urlsplit

from numcodecs.checksum32 import CRC32C
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore

from g2l_core.errors import StoreError, StoreMissingError, UsageError

Outcome = TypeVar("Outcome")

LISTED = frozenset({"s3", "gs"})
"""Schemes of addresses whose objects can be listed, and written."""
SCHEMES = (*sorted(LISTED, reverse=True), "https", "http")

TRIES = 5
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0
"""Before the second try, and at most; it doubles from try to try, and is drawn from its upper half."""
CONNECT_S, SILENCE_S, OBJECT_S = 10.0, 30.0, 900.0
"""How long a connection may take to open, send nothing, and need for one object."""

_reader = 0
"""The process that has read from an address; processes that are forked from it cannot."""

_PASSES = re.compile(r"status code: (?:408|429|5\d\d)")
_STATUS = re.compile(r"status code: \d")
_UNKNOWN = re.compile(r"status code: 501|NotImplemented")
"""What a server says to requests that it does not know."""
_NO_CREDENTIALS = ("/latest/api/token", "/latest/meta-data", "/computeMetadata/v1")
"""Where credentials are looked for when nobody has given any: what the servers of cloud machines answer to."""
_ACCESS: Mapping[str, str] = {
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "Set GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SKIP_SIGNATURE=true for a public bucket",
}


@dataclass(frozen=True)
class RemoteObject:
    """What a listing says of one object."""

    size: int
    """In bytes."""
    state: tuple[int, int, int]
    """Bytes, modification time (ns), and a number made of its tag: another content has another one."""
    tag: str
    """What the server calls this content; often its MD5, never something to rely on."""


@dataclass(frozen=True)
class Listing:
    """The objects below an address at one moment."""

    objects: Mapping[str, RemoteObject]
    """By key."""

    @cached_property
    def folders(self) -> Mapping[str, list[str]]:
        """The names of the folders in each folder, sorted; folders are the beginnings of keys."""
        found: dict[str, set[str]] = {}
        for key in self.objects:
            parts = key.split("/")[:-1]
            for depth, name in enumerate(parts):
                found.setdefault("/".join(parts[:depth]), set()).add(name)
        return {folder: sorted(names) for folder, names in found.items()}


class Connection:
    """The objects below one address. It is made without a request, and may be sent to other processes.

    Attributes:
        address: Without a slash at its end.
        scheme: Of the address.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self.scheme = urlsplit(address).scheme

    def __reduce__(self) -> tuple[Any, ...]:
        return Connection, (self.address,)

    @property
    def can_list(self) -> bool:
        """Whether the objects can be listed: a plain HTTP server has no way to ask."""
        return self.scheme in LISTED

    @property
    def store(self) -> Any:
        """The obstore store.

        Raises:
            UsageError: obstore is not installed.
            StoreError: The address or the environment's settings cannot be used, or this process was forked from one
                that has read already: its threads are gone, and a request would wait forever.
        """
        global _reader
        _reader = _reader or os.getpid()
        if _reader != os.getpid():
            raise StoreError(
                f"{self.address}: this process was forked from one that has read from an address, and cannot. Start "
                'processes by "spawn", such as DataLoader(multiprocessing_context="spawn")'
            )
        return self._opened

    @cached_property
    def _opened(self) -> Any:
        obstore = _obstore(self.address)
        options = {
            "allow_http": True,  # only where the address or the endpoint says http
            "connect_timeout": timedelta(seconds=CONNECT_S),
            "read_timeout": timedelta(seconds=SILENCE_S),
            "timeout": timedelta(seconds=OBJECT_S),
        }
        kind = obstore.store.HTTPStore if self.scheme in {"http", "https"} else obstore.store
        try:
            # It does not try again after a cut in the middle of an object, so all tries are made here.
            return kind.from_url(self.address, client_options=options, retry_config={"max_retries": 0})
        except (ValueError, obstore.exceptions.BaseError) as error:
            raise StoreError(f"{self.address} cannot be used: {_first_line(error)}") from error

    @cached_property
    def arrays(self) -> "RetryingStore":
        """The objects as Zarr reads them."""
        return RetryingStore(self)

    def read(self, key: str) -> bytes:
        """The content of an object.

        Raises:
            FileNotFoundError: There is none.
            StoreError: It cannot be read.
        """
        get = _obstore(self.address).get
        return self._tried(key, lambda: bytes(get(self.store, key).bytes()))

    def size(self, key: str) -> int | None:
        """The bytes of an object as they are now; None where there is none.

        Raises:
            StoreError: Nobody can tell.
        """
        head = _obstore(self.address).head
        try:
            return self._tried(key, lambda: int(head(self.store, key)["size"]))
        except FileNotFoundError:
            return None

    def put(self, key: str, content: bytes) -> str:
        """Write an object in one step: readers see the old one or the whole new one.

        Returns:
            What the server calls this content, see `RemoteObject.tag`.

        Raises:
            StoreError: It cannot be written.
        """
        put = _obstore(self.address).put
        made = self._tried(key, lambda: put(self.store, key, content, use_multipart=False), "write")
        return str(made["e_tag"] or "").strip('"')

    def create(self, key: str, content: bytes) -> bool | None:
        """Write an object only where there is none, of several writers for one alone.

        Returns:
            Whether it was written; None where the server does not know how to do that, and nothing was written.

        Raises:
            StoreError: It cannot be written.
        """
        obstore = _obstore(self.address)

        def attempt() -> bool | None:
            try:
                obstore.put(self.store, key, content, mode="create", use_multipart=False)
            except obstore.exceptions.AlreadyExistsError:
                return False
            except (obstore.exceptions.BaseError, NotImplementedError) as error:
                if isinstance(error, NotImplementedError) or _UNKNOWN.search(str(error)):
                    return None
                raise
            return True

        return self._tried(key, attempt, "write")

    def delete(self, key: str) -> None:
        """Delete an object, if it is there.

        Raises:
            StoreError: It cannot be deleted.
        """
        delete = _obstore(self.address).delete
        with suppress(FileNotFoundError):
            self._tried(key, lambda: delete(self.store, key), "delete")

    @cached_property
    def listing(self) -> Listing:
        """All objects, as they were when this was first asked for.

        Raises:
            StoreError: They cannot be listed.
        """
        return self.listed()

    def listed(self) -> Listing:
        """All objects as they are now. Raises as `listing`."""
        found = _obstore(self.address).list

        def everything() -> dict[str, RemoteObject]:
            return {meta["path"]: _object(meta) for batch in found(self.store) for meta in batch}

        try:
            return Listing(self._tried("", everything, "list"))
        except FileNotFoundError:
            return Listing({})

    def _tried(self, key: str, do: Callable[[], Outcome], verb: str = "read") -> Outcome:
        for tries in range(1, TRIES + 1):
            try:
                return do()
            except FileNotFoundError as error:
                self._refuse_absent_bucket(error)
                raise
            except _failures(self.address) as error:
                time.sleep(self.pause(error, tries, key, verb))
        raise AssertionError("the last try raises")

    def pause(self, error: Exception, tries: int, key: str, verb: str = "read") -> float:
        """How many seconds to wait before another try.

        Args:
            error: What the last one raised.
            tries: How many there were.
            key: Of the object.
            verb: What was tried, for people.

        Raises:
            StoreError: Another try is of no use, or enough were made.
        """
        if _is_passing(error) and tries < TRIES:
            return min(FIRST_PAUSE_S * 2 ** (tries - 1), LONGEST_PAUSE_S) * random.uniform(0.5, 1)
        raise self._refusal(error, tries, f"{self.address}/{key}".rstrip("/"), verb) from error

    def _refusal(self, error: Exception, tries: int, where: str, verb: str) -> StoreError:
        self._refuse_absent_bucket(error)
        errors = _obstore(self.address).exceptions
        what = _first_line(error)
        if any(place in what for place in _NO_CREDENTIALS):
            return StoreError(f"cannot {verb} {where}: there are no credentials. {_ACCESS[self.scheme]}")
        if isinstance(error, errors.PermissionDeniedError | errors.UnauthenticatedError):
            access = _ACCESS.get(self.scheme, "Ask whoever runs the server")
            return StoreError(f"cannot {verb} {where}: access is denied. {access}")
        if isinstance(error, errors.NotSupportedError) and verb == "read":
            return StoreError(
                f"cannot read {where}: the server does not send parts of files (it ignores the header Range), which "
                "reading a store needs. Use a server that does, such as nginx"
            )
        if not _is_passing(error):
            return StoreError(f"cannot {verb} {where}: {what}. Check the address, the endpoint and the region")
        return StoreError(
            f"cannot {verb} {where}: {what} ({tries} tries). Check the network and run the same command again"
        )

    def _refuse_absent_bucket(self, error: Exception) -> None:
        if "NoSuchBucket" in str(error):
            bucket = urlsplit(self.address).netloc
            raise StoreMissingError(f"{self.address}: there is no bucket {bucket} at this endpoint") from error


class RetryingStore(ObjectStore[Any]):
    """Zarr's store for obstore, read-only, with the tries and errors of a `Connection`."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection.store, read_only=True)
        self._connection = connection

    def __reduce__(self) -> tuple[Any, ...]:
        return RetryingStore, (self._connection,)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Read an object or a part of it; None where there is none."""
        assert self._connection.store  # refuses in a forked process
        for tries in range(1, TRIES + 1):
            try:
                return await super().get(key, prototype, byte_range)
            except _failures(self._connection.address) as error:
                await asyncio.sleep(self._connection.pause(error, tries, key))
        raise AssertionError("the last try raises")

    async def get_partial_values(self, prototype: BufferPrototype, key_ranges: Any) -> list[Buffer | None]:
        """Read parts of objects."""
        return list(await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges)))


@dataclass(frozen=True)
class RemotePath:
    """A place below an address, with what of `pathlib.Path` reading a store needs."""

    connection: Connection = field(compare=False, repr=False)
    address: str
    key: str = ""
    """Below the address; empty for the address itself."""

    def __str__(self) -> str:
        return f"{self.address}/{self.key}".rstrip("/")

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(self.connection, self.address, f"{self.key}/{name}".lstrip("/"))

    @property
    def name(self) -> str:
        """Its last part."""
        return str(self).rpartition("/")[2]

    @property
    def parents(self) -> list["RemotePath"]:
        """The folders around it, innermost first, up to the address."""
        around = PurePosixPath(self.key).parents if self.key else ()
        return [RemotePath(self.connection, self.address, "" if str(p) == "." else str(p)) for p in around]

    def relative_to(self, other: "RemotePath") -> PurePosixPath:
        """Its path below another one of the same address.

        Raises:
            ValueError: It does not lie below.
        """
        return PurePosixPath(self.key or ".").relative_to(other.key or ".")

    def resolve(self) -> "RemotePath":
        """Itself: an address is absolute."""
        return self

    def exists(self) -> bool:
        """Whether there is an object now. Raises StoreError where nobody can tell."""
        return self.connection.size(self.key) is not None

    def read_bytes(self) -> bytes:
        """The content of the object. Raises as `Connection.read`."""
        return self.connection.read(self.key)


def remote_path(address: str) -> RemotePath:
    """The place that an address names; no request is made.

    Raises:
        StoreError: The address has no host or bucket, is of a scheme that is not read, or has a password, ? or # in it.
    """
    parts = urlsplit(address)
    if parts.scheme not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise StoreError(f"{address}: a store is a folder, or an address of {known}; mount or copy this one")
    if not parts.netloc:
        raise StoreError(f"{address} names no {'bucket' if parts.scheme in LISTED else 'server'}")
    if "@" in parts.netloc:
        raise StoreError(f"an address with a password, as of {parts.hostname}, would be kept in reports: leave it out")
    if parts.query or parts.fragment:
        raise StoreError(f"an address of a store, as on {parts.netloc}, has no ? or #: each of its files has its own")
    connection = Connection(address)
    return RemotePath(connection, connection.address)


def _obstore(address: str) -> ModuleType:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError as error:
        raise UsageError(f'reading {address} needs obstore: pip install "g2l[remote]"') from error
    return obstore


def _failures(address: str) -> tuple[type[Exception], ...]:
    """What obstore raises where an object is there, or may be, and is not read."""
    return OSError, ValueError, _obstore(address).exceptions.BaseError


def _is_passing(error: Exception) -> bool:
    """Whether an error may be gone at the next try: no answer, half of one, or an answer that says so."""
    from obstore.exceptions import GenericError

    text = str(error)
    if not isinstance(error, GenericError | OSError) or any(place in text for place in _NO_CREDENTIALS):
        return False
    return not _STATUS.search(text) or bool(_PASSES.search(text))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(": ")


def _object(meta: Mapping[str, Any]) -> RemoteObject:
    size, tag = int(meta["size"]), str(meta["e_tag"] or "")
    time_ns = round(meta["last_modified"].timestamp() * 1e6) * 1000
    return RemoteObject(size, (size, time_ns, int(CRC32C.checksum(tag.encode()))), tag.strip('"'))

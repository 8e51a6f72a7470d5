"""Work on a store at an address, in a spool on this machine, from which each slide is sent once it is whole.

Whatever works on stores in folders works on the spool as it is: `at_place` gives it the folder. Meanwhile a thread
looks at the slides' documents, and sends those that are whole. The disk is the queue: nothing waits in memory. If the
network fails, the work goes on, and what is left is sent in the end.
"""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from time import monotonic

from g2l_core.errors import G2LError, StoreCorruptError, UnknownNameError, UsageError
from g2l_core.store.address_lock import LOCK, AddressLock, locked_address
from g2l_core.store.documents import GROUP_FILE
from g2l_core.store.features import FeatureStore
from g2l_core.store.location import FileState, Location, locate
from g2l_core.store.locks import LOCKS, locked
from g2l_core.store.remote import Listing, RemoteObject
from g2l_core.store.spool import fetch_shards, free_shards, is_whole, prepare, send_slide
from g2l_core.store.upload import send, target_of, upload
from pipeline.interruption import if_interrupted
from pipeline.progress import ProgressLine, say
from pipeline.settings import SpoolSettings

LOOK_EVERY_S, TRY_AGAIN_S = 2.0, 60.0
"""How often the slides are looked at, and how long after the network has failed."""
HELD = "another g2l command writes into it"


@contextmanager
def at_place(
    store: Path, settings: SpoolSettings, *, meanwhile: bool = False, reads_lost: bool = False
) -> Iterator[Path]:
    """The folder in which to work on a store: its own, or the spool of one at an address.

    When the block ends, what is new is sent.

    Args:
        store: A folder, or an address.
        settings: Where the spool is, and what stays of it.
        meanwhile: Whether slides are sent while the block runs: it leaves those alone that are whole.
        reads_lost: Whether it reads features of slides with unreadable patches again.

    Raises:
        UsageError: The store is a folder, and a setting is for addresses.
        StoreError: The address or the spool cannot be used, or something could not be sent.
    """
    place = locate(store)
    if isinstance(place, Path):
        if settings != SpoolSettings():
            raise UsageError(f"--store {store} is a folder: --spool, --keep-spool and --take-lock are for addresses")
        yield store
        return
    target = target_of(place)
    folder = spool_of(place, settings)
    with (
        locked(folder.parent / LOCKS / "spool", wait_s=0, holder="another g2l command sends from it to an address"),
        locked_address(target, folder, take=settings.take_lock) as lock,
    ):
        if not lock.is_sure:
            say(f"warning  the server of {target} cannot keep a lock: let only one command at a time write there")
        courier = _Courier(folder, lock, keep=settings.keep_spool)
        courier.begin(reads_lost=reads_lost)
        with if_interrupted(courier.left), courier.sending(meanwhile=meanwhile):
            yield folder


def spool_of(place: Location, settings: SpoolSettings) -> Path:
    """The folder of a store's spool."""
    address = str(place)
    if settings.spool:
        return settings.spool / place.name
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", address).strip("-")[-80:]
    return cache / "g2l" / "spool" / f"{words}-{sha256(address.encode()).hexdigest()[:8]}" / place.name


def told_place(store: Path, settings: SpoolSettings) -> str:
    """Where the features of a store at an address would go, for a plan; empty for a folder."""
    place = locate(store)
    if isinstance(place, Path):
        return ""
    return f"store: {target_of(place)}, through the spool {spool_of(place, settings)}"


class _Courier:
    """Sends slides from a spool to an address."""

    def __init__(self, folder: Path, lock: AddressLock, *, keep: bool) -> None:
        self._folder, self._lock, self._keep = folder, lock, keep
        self._target, self._connection = lock.target, lock.target.connection
        self._objects: dict[str, RemoteObject] = {}
        self._sent: dict[str, FileState] = {}
        """The state that the document of a slide had when the slide was sent, by id."""
        self._ids: tuple[str, ...] = ()
        self._store: FeatureStore | None = None
        self._end = threading.Event()

    def begin(self, *, reads_lost: bool) -> None:
        """Bring the spool to what is at the address."""
        self._objects = {key: known for key, known in self._connection.listed().objects.items() if key != LOCK}
        with (
            locked(self._folder / LOCKS / "writer", wait_s=0, holder=HELD),
            ProgressLine("fetching", "slides") as line,
        ):
            for done, total in prepare(self._folder, self._target, Listing(self._objects)):
                line.update(done, total)
            store = self._opened()
            self._ids = tuple(store.slide_ids()) if store else ()
            if store and reads_lost:
                fetch_shards(store, (slide for slide in store.slides() if slide.unreadable), self._connection)

    @contextmanager
    def sending(self, *, meanwhile: bool) -> Iterator[None]:
        """Send slides while the block runs, if `meanwhile`, and all that is left when it ends.

        If it fails, whole slides are sent all the same, and a line says what is where.
        """
        thread = threading.Thread(target=self._run, name="g2l-send", daemon=True)
        if meanwhile:
            thread.start()
        try:
            yield
        except G2LError:
            self._stop(thread)
            with suppress(G2LError, OSError):
                if meanwhile:
                    self._look(is_last=True)
            say(self.left())
            raise
        finally:
            self._stop(thread)
        try:
            self._send_all()
        except G2LError:
            say(self.left())
            raise

    def left(self) -> str:
        """What is at the address, and what is not, in words. It may be called from a signal handler."""
        whole = sum(f"slides/{slide_id}/{GROUP_FILE}" in self._objects for slide_id in self._ids)
        return (
            f"whole slides at {self._target}: {whole:,}; what else is done is in the spool {self._folder}, and the "
            "same command goes on with it"
        )

    def _opened(self) -> FeatureStore | None:
        """The store in the spool, once there is one."""
        if self._store is None and (self._folder / GROUP_FILE).exists():
            self._store = FeatureStore.open(self._folder)
        return self._store

    def _stop(self, thread: threading.Thread) -> None:
        self._end.set()
        if thread.is_alive():
            thread.join()

    def _run(self) -> None:
        """Look again and again until the end; a failure is told once, and what failed is tried again later."""
        wait_s, told = LOOK_EVERY_S, ""
        while not self._end.wait(wait_s):
            begin = monotonic()
            try:
                self._look()
                wait_s, told = max(LOOK_EVERY_S, 10 * (monotonic() - begin)), ""
            except (G2LError, OSError) as error:
                wait_s = TRY_AGAIN_S
                if str(error) != told:
                    say(f"warning  {error}. The work goes on in {self._folder}; it is sent later")
                told = str(error)

    def _look(self, *, is_last: bool = False) -> None:
        """Send the slides that are whole and have not been sent as they are.

        Raises:
            StoreError: Some could not be sent; the others are.
        """
        store = self._opened()
        entries = store.entries if store else {}
        self._ids = tuple(entries)
        due = {i: e.state for i, e in entries.items() if is_whole(e.facts) and self._sent.get(i) != e.state}
        if store is None or not due:
            return
        self._send_root()
        damage: StoreCorruptError | None = None
        for slide_id, state in due.items():
            if self._end.is_set() and not is_last:
                return
            try:
                slide = store.slide(slide_id)
                if send_slide(self._folder, slide, self._connection, self._objects, keep=self._keep):
                    self._sent[slide_id] = state
            except (FileNotFoundError, UnknownNameError):  # it was taken out in between
                continue
            except StoreCorruptError as error:
                damage = error
        if damage is not None:
            raise damage

    def _send_root(self) -> None:
        """Have the store's own document there as it is, so that every encoder is known before its features are."""
        self._lock.require_held()
        self._objects[GROUP_FILE], _ = send(self._folder, GROUP_FILE, self._connection, Listing(self._objects))

    def _send_all(self) -> None:
        """Make the address what the spool is: slides that are not whole too, so that nobody takes them for absent."""
        if self._opened() is None:
            return
        with (
            locked(self._folder / LOCKS / "writer", wait_s=0, holder=HELD),
            ProgressLine("sending", "files") as line,
        ):
            self._look(is_last=True)
            self._send_root()
            store, there = FeatureStore.open(self._folder), set[str]()
            for file in upload(store, str(self._target)):
                there.add(file.key)
                line.update(len(there), file.total)
            for slide in store.slides() if not self._keep else ():
                free_shards(self._folder, slide, there)

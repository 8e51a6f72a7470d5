"""A lock on every slide that a dask worker writes, so that a lost worker and its successor do not do so together."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from time import monotonic

from g2l_core.errors import StoreError
from g2l_core.store.locks import LOCKS, locked

LOST_WORKER_S = 600.0
"""How long to wait for slides that a lost worker still writes, unless --slide-timeout says less."""


@contextmanager
def locked_slides(
    store: Path, slide_ids: Sequence[str], timeout: float | None
) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Hold the locks of slides. Yield the slides that are held, and by id why others are not."""
    until = monotonic() + min(LOST_WORKER_S, timeout or LOST_WORKER_S)
    ready, held_back = [], dict[str, str]()
    with ExitStack() as held:
        for slide_id in sorted(slide_ids):
            try:
                held.enter_context(_locked(store, slide_id, until))
                ready.append(slide_id)
            except StoreError as error:
                held_back[slide_id] = str(error)
        yield ready, held_back


def await_lost_workers(store: Path, slide_ids: Sequence[str], timeout: float | None) -> dict[str, str]:
    """Wait until no worker of an earlier run writes any of the slides any more.

    Returns:
        By id, why slides are not free.
    """
    folder = store / LOCKS
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set[str]()
    until = monotonic() + min(LOST_WORKER_S, timeout or LOST_WORKER_S)
    held_back = {}
    for slide_id in slide_ids:
        try:
            if _name(slide_id) in names:
                with _locked(store, slide_id, until):
                    pass
        except StoreError as error:
            held_back[slide_id] = str(error)
    return held_back


@contextmanager
def _locked(store: Path, slide_id: str, until: float) -> Iterator[None]:
    holder = f"a lost worker still writes slide {slide_id}"
    with locked(store / LOCKS / _name(slide_id), wait_s=max(0.0, until - monotonic()), holder=holder):
        yield


def _name(slide_id: str) -> str:
    return sha256(slide_id.encode()).hexdigest()[:16]

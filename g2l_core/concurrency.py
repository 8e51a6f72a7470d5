"""Run one function over many items, some ahead of the consumer, and yield what came of each in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


def run_ahead(
    function: Callable[[Item], Outcome], items: Iterable[Item], *, workers: int, lookahead: int
) -> Iterator[Outcome]:
    """Yield function(item) in the order of the items, computed by threads ahead of the consumer.

    Threads serve here because decoding, OpenCV and hashing release the interpreter lock; no process is
    forked, so nothing can deadlock in Zarr's own threads.

    Args:
        function: Called once per item, in several threads at a time.
        items: Drawn lazily, in the consumer's thread, at most `lookahead` ahead.
        workers: Number of threads; 0 calls the function in the consumer's thread.
        lookahead: Most items that are computed or waiting to be consumed.

    Raises:
        Exception: Whatever the function raises, at its item's turn.
    """
    if workers == 0:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="g2l")
    pending: deque[Future[Outcome]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= lookahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_END = object()


def in_background(items: Generator[Item, None, None], *, depth: int) -> Generator[Item, None, None]:
    """Yield the items of a generator that a thread of its own keeps `depth` ahead; the order is the same.

    Raises:
        Exception: Whatever the generator raises, at its item's turn.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="g2l-ahead")
    pending = deque(pool.submit(next, items, _END) for _ in range(depth))
    try:
        while (item := pending.popleft().result()) is not _END:
            pending.append(pool.submit(next, items, _END))
            yield item  # type: ignore[misc]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        items.close()

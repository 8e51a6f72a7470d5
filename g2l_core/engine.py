"""Run one function over many items, some ahead of the consumer, and yield what came of each in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
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

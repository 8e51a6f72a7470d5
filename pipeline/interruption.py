"""What is true of a command that is interrupted at this moment: long work says it while it runs.

Ctrl-C ends the process at once (see `pipeline.cli.main`), so nothing can be tidied up then, only told.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_tellers: list[Callable[[], str]] = []


@contextmanager
def if_interrupted(tell: Callable[[], str]) -> Iterator[None]:
    """While the block runs, `tell` says what an interruption leaves behind and what the same command does then.

    It is called from a signal handler: it takes no lock and reads what is there.
    """
    _tellers.append(tell)
    try:
        yield
    finally:
        _tellers.remove(tell)


def what_is_left() -> str:
    """What the work under way says of itself, the innermost first; empty where it says nothing."""
    return "; ".join(tell() for tell in reversed(_tellers))

"""Where whatever goes wrong in one slide becomes an error of that slide, so that a run goes on with the others."""

import logging
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from g2l_core.errors import G2LError, ReadError, SlideError

_log = logging.getLogger(__name__)

Outcome = TypeVar("Outcome")


class SlideTimeoutError(ReadError):
    """Reading a slide takes longer than it may."""


@contextmanager
def slide_errors(kind: type[SlideError]) -> Iterator[None]:
    """Raise every exception of the block as an error of the slide, which says its type and place.

    Errors of G2L stay as they are. The traceback is logged, which `g2l --debug` shows.

    Raises:
        SlideError: The block raised something else; it is of the type `kind`.
    """
    try:
        yield
    except G2LError:
        raise
    except Exception as error:
        _log.debug("a slide fails", exc_info=True)
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}, line {place.lineno}"
        raise kind(f"{type(error).__name__} in {where}: {' '.join(str(error).split()) or 'no more is said'}") from error


def within(seconds: float | None, function: Callable[[], Outcome], what: str) -> Outcome:
    """Call a function that reads a slide, and wait no longer than a time for it.

    No thread can be ended from outside. So one that is stuck is left alone: nobody waits for it, also not at the end
    of the process.

    Args:
        seconds: The time; None calls the function in this thread.
        function: Raises what it likes, which is raised here.
        what: What it does, for the message.

    Raises:
        SlideTimeoutError: It takes longer.
    """
    if seconds is None:
        return function()
    ended: Future[Outcome] = Future()

    def run() -> None:
        try:
            ended.set_result(function())
        except Exception as error:  # noqa: BLE001 - raised again where it is waited for
            ended.set_exception(error)

    threading.Thread(target=run, name="g2l-slide", daemon=True).start()
    try:
        return ended.result(seconds)
    except TimeoutError:
        if ended.done():  # the function's own
            return ended.result()
        raise SlideTimeoutError(f"{what} takes longer than {seconds:g} s (--slide-timeout)") from None

"""Every error that G2L raises on purpose.

    G2LError
    ├── UsageError            an argument or a setting that cannot be used
    │   └── UnknownNameError  a name that is in no table; the message suggests the nearest
    ├── SlideError            one slide cannot be used; the others can
    │   ├── NotASlideError    no reader opens the file
    │   ├── MppError          micrometers per pixel are absent, implausible, or too coarse
    │   ├── NoTissueError     nothing is left after tissue detection
    │   └── ReadError         the file opens, but these pixels cannot be read
    ├── ManifestError         a slide list or label table is not usable
    ├── EncoderError          an encoder cannot be built, or gave features that are not finite
    ├── StoreError            a store, or something in it, cannot be used
    │   ├── StoreMismatchError   it was made with other settings; the message names the field
    │   ├── StoreMissingError    what was asked for is not in it
    │   └── StoreCorruptError    what is in it is not what was written
    ├── RunError              an output folder or a checkpoint cannot be used
    └── TaskError             a benchmark task cannot be evaluated
        └── LeakError         its training and test parts share a patient

A message says what was expected, what came, where, and what to do. The command line prints it as it is.
Errors of other libraries are translated once, in the module that calls them.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class G2LError(Exception):
    """Base of all errors that G2L raises on purpose."""


class UsageError(G2LError):
    """An argument or a setting cannot be used."""


class UnknownNameError(UsageError):
    """A name is in no table."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        names = list(known)
        near = get_close_matches(name.lower(), [n.lower() for n in names], n=3, cutoff=0.5)
        if near:
            advice = "Did you mean " + " or ".join(near) + "?"
        else:
            advice = "Known: " + ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") + "."
        super().__init__(f"unknown {kind} {name!r}. {advice} {hint}".rstrip())


class SlideError(G2LError):
    """One slide cannot be used."""


class NotASlideError(SlideError):
    """No reader opens the file."""


class MppError(SlideError):
    """Micrometers per pixel are absent, implausible, or too coarse for the wanted patches."""


class NoTissueError(SlideError):
    """Nothing is left of the slide after tissue detection."""


class ReadError(SlideError):
    """The slide opens, but these pixels cannot be read."""


class ManifestError(G2LError):
    """A slide list or a label table is not usable."""


class EncoderError(G2LError):
    """An encoder cannot be built, or its output cannot be used."""


class StoreError(G2LError):
    """A store, or something in it, cannot be used."""


class StoreMismatchError(StoreError):
    """The store was made with other settings."""


class StoreMissingError(StoreError):
    """What was asked for is not in the store."""


class StoreCorruptError(StoreError):
    """What is in the store is not what was written."""


class RunError(G2LError):
    """An output folder or a checkpoint cannot be used."""


class TaskError(G2LError):
    """A benchmark task cannot be evaluated."""


class LeakError(TaskError):
    """Training and test part of a task share a patient."""

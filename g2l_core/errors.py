"""Every error that G2L raises on purpose.

    G2LError
    ├── UsageError            an argument or a setting that cannot be used
    │   └── UnknownNameError  a name that is in no table; the message suggests the nearest
    ├── SlideError            one slide cannot be used; the others can
    │   ├── NotASlideError    no reader opens the file
    │   ├── MppError          micrometers per pixel are absent, implausible, or too coarse
    │   ├── NoTissueError     nothing is left after tissue detection
    │   └── ReadError         the file opens, but these pixels cannot be read
    │       └── AbsentPixelsError  the file does not have them
    ├── ManifestError         a slide list or label table is not usable
    ├── EncoderError          an encoder cannot be built, or gave features that are not finite
    ├── StoreError            a store, or something in it, cannot be used
    │   ├── StoreMismatchError   it was made with other settings; the message names the field
    │   ├── StoreMissingError    what was asked for is not in it
    │   ├── StoreCorruptError    what is in it is not what was written
    │   └── StoreUnreadError     this machine may not, or cannot, read a file, so nobody knows what is in it
    ├── RunError              an output folder or a checkpoint cannot be used
    └── TaskError             a benchmark task cannot be evaluated
        └── LeakError         its training and test parts share a patient

A message says what was expected, what came, where, and what to do. The command line prints it as it is.
Errors of other libraries are translated once, in the module that calls them.
"""

import errno
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path


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


class AbsentPixelsError(ReadError):
    """The slide was written without too many of these pixels."""


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


class StoreUnreadError(StoreError):
    """A file of the store is there and cannot be read here: nobody knows whether it is what was written."""


class RunError(G2LError):
    """An output folder or a checkpoint cannot be used."""


class TaskError(G2LError):
    """A benchmark task cannot be evaluated."""


class LeakError(TaskError):
    """Training and test part of a task share a patient."""


_FREE, _ALLOW = "free space", "allow it"

MACHINE_FAULTS: Mapping[int, str] = {
    errno.ENOSPC: _FREE,
    errno.EDQUOT: "free space, or have the quota raised",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or free space",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs, which hold all files that this machine can have open",
    errno.EROFS: "make it writable",
    errno.EACCES: _ALLOW,
    errno.EPERM: _ALLOW,
    errno.EIO: "check the disk",
}
"""What to do about errors of the operating system that are no fault of the program."""

_WRITING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})
_OPEN_FILES = frozenset({errno.EMFILE, errno.ENFILE})
_UNREAD = frozenset({errno.EACCES, errno.EPERM, errno.EIO})
_CODES = {os.strerror(code): code for code in sorted(MACHINE_FAULTS, key=lambda code: -len(os.strerror(code)))}
_IN_TEXT = re.compile("|".join(map(re.escape, _CODES)))


def machine_fault(error: BaseException) -> OSError | None:
    """The error of `MACHINE_FAULTS` that is behind an error, if there is one.

    torch, HDF5 and safetensors raise errors of their own in its place: then it is the context, or is in the text.
    """
    link: BaseException | None = error
    while link is not None:
        found = _IN_TEXT.search(str(link))
        code: int = getattr(link, "errno", None) or (_CODES[found[0]] if found else 0)
        if code in MACHINE_FAULTS:
            return link if isinstance(link, OSError) and link.filename else OSError(code, os.strerror(code))
        link = link.__cause__ or link.__context__
    return None


def machine_fault_text(error: OSError, where: object = "") -> str:
    """What happened, where, and what to do."""
    code, place = error.errno or 0, error.filename or where
    verb = "write" if code in _WRITING else "use"
    advice = f"{MACHINE_FAULTS[code]} and run the same command again: what is complete is kept"
    return f"cannot {verb} {place}: {error.strerror}; {advice}"


def with_remedy(text: str) -> str:
    """A message, and what to do about too many open files where that is behind it and is not said yet."""
    found = _IN_TEXT.search(text)
    code = _CODES[found[0]] if found else 0
    if code not in _OPEN_FILES or MACHINE_FAULTS[code] in text:
        return text
    return f"{text.rstrip('.')}; {MACHINE_FAULTS[code]} and run the same command again"


def refuse_open_files(error: BaseException, where: object, refusal: type[G2LError]) -> None:
    """Raise too many open files as what they are: whoever cannot open a file knows nothing about its content.

    Args:
        error: What was raised where a file was read.
        where: What was read, for people.
        refusal: The kind of error to raise.

    Raises:
        G2LError: Too many open files are behind the error; it is of the kind `refusal`.
    """
    fault = machine_fault(error)
    if fault and fault.errno in _OPEN_FILES:
        raise refusal(machine_fault_text(fault, where)) from error


def refuse_unread(error: BaseException, where: object) -> None:
    """Raise a fault of the machine at reading a store as what it is, see `refuse_open_files`: no damage is known.

    Raises:
        StoreError: Too many files are open.
        StoreUnreadError: The file may not be read, or the disk fails.
    """
    refuse_open_files(error, where, StoreError)
    fault = machine_fault(error)
    if fault and fault.errno in _UNREAD:
        raise StoreUnreadError(machine_fault_text(fault, where)) from error


@contextmanager
def writing(where: object, refusal: type[G2LError] = RunError) -> Iterator[None]:
    """Translate whatever a library raises where the disk is full, or cannot be written to, or too many files are open.

    Args:
        where: What is written, for people.
        refusal: The kind of error to raise.

    Raises:
        G2LError: The block raised such an error; it is of the kind `refusal`.
    """
    try:
        yield
    except G2LError:
        raise
    except Exception as error:
        fault = machine_fault(error)
        if fault is None:
            raise
        raise refusal(machine_fault_text(fault, where)) from error


_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+:)(?:/+|$)")


def refuse_address(path: object, refusal: type[G2LError] = StoreError) -> None:
    """Refuse an address where a folder is written to; as a path it would be a local folder `s3:`.

    Raises:
        G2LError: It is an address; of the kind `refusal`.
    """
    found = _ADDRESS.match(str(path))
    if found:
        raise refusal(
            f"{found[1]}//{str(path)[found.end() :]} is an address, and only folders are written to: write into a "
            "folder and copy it there; g2l store upload copies a store"
        )


def require_output_folder(folder: Path, own: Sequence[str], what: str) -> None:
    """Refuse a folder that holds something else, before anything is computed for it or replaced in it.

    What its owner has put beside our files is left alone, and so are hidden files: locks, and what a kill has left.

    Args:
        folder: Where a command is to write; it may be missing.
        own: The names that the command gives there; where the first one is, the folder is the command's own.
        what: What the command makes, in words.

    Raises:
        RunError: It holds something, and nothing of the command's; it is no folder, or may not be looked into.
    """
    with writing(folder):
        if not folder.exists():
            return
        if not folder.is_dir():
            raise RunError(f"cannot write into {folder}: it is no folder")
        if (folder / own[0]).exists():
            return
        others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if not set(others) <= {*own}:
        raise RunError(f"{folder} holds {others[0]} and no {what}: name an empty folder, or a new one, with --out")

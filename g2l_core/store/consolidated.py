"""Zarr's consolidated metadata of a slide: the documents of its arrays, copied into its own.

With it Zarr and xarray open all arrays of a slide by reading one file, and over plain HTTP, where nothing can be
listed. It is of slides and not of the whole store: that of 10,000 slides would be 100 MB, read by whoever opens the
store and replaced whenever it gains a fact. Whatever changes a slide writes its document without the copy, so that the
copy is never outdated; it is made again when a run ends.
"""

import json
from collections.abc import Iterable
from contextlib import suppress

from g2l_core.files import write_text
from g2l_core.store.documents import GROUP_FILE
from g2l_core.store.location import folder_of
from g2l_core.store.slide import StoredSlide

KEY = "consolidated_metadata"


def consolidate(slides: Iterable[StoredSlide]) -> None:
    """Write the copy into the document of each slide that has none. Only for the one who holds the store's lock.

    A slide whose documents cannot be read, or written, is passed over: nobody needs the copy, and `verify` names what
    is wrong with it.
    """
    for slide in slides:
        with suppress(OSError, ValueError, TypeError, RecursionError):
            _consolidate(slide)


def _consolidate(slide: StoredSlide) -> None:
    folder = folder_of(slide.folder)
    path = folder / GROUP_FILE
    document = json.loads(path.read_bytes())
    if KEY in document:
        return
    below = sorted(child for child in folder.rglob(GROUP_FILE) if child != path)
    copies = {child.parent.relative_to(folder).as_posix(): json.loads(child.read_bytes()) for child in below}
    document[KEY] = {"kind": "inline", "must_understand": False, "metadata": copies}
    write_text(path, json.dumps(document, indent=1, allow_nan=False))

"""Columns that users have added to the patches of a slide, such as scores: one array each, below `columns`."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Shaped

from g2l_core.errors import StoreError
from g2l_core.store import schema
from g2l_core.store.boundary import writing
from g2l_core.store.documents import GROUP_FILE, write_group
from g2l_core.store.facts import SlideFacts
from g2l_core.store.ids import why_impossible
from g2l_core.store.location import folder_of
from g2l_core.store.slide import StoredSlide

_PREFIX = f"{schema.COLUMNS}/"


def column_tables(facts: SlideFacts) -> Mapping[str, str]:
    """The array of each column of a slide, by the column's name."""
    return {name.removeprefix(_PREFIX): name for name in facts.tables if name.startswith(_PREFIX)}


def read_column(slide: StoredSlide, name: str) -> Shaped[np.ndarray, " patch"]:
    """The values of a column in stored order: numbers, truth values or, of dtype object, texts.

    Raises:
        StoreCorruptError: They are not what was written.
    """
    values: np.ndarray = slide.read_table(_PREFIX + name)
    return values if values.dtype.kind in "biuf" else values.astype(object)


def write_column(slide: StoredSlide, name: str, values: Shaped[np.ndarray, " patch"]) -> None:
    """Write a column, in the place of one of that name.

    Args:
        slide: Opened for writing.
        name: Its name; it becomes that of a folder.
        values: One for each stored patch: numbers, truth values or, of dtype object, texts.

    Raises:
        StoreError: The name is impossible, or the disk is full or cannot be written to.
    """
    problem = why_impossible(name) or ("it has a /" if "/" in name else "")
    if problem:
        raise StoreError(f"no column can be called {name!r}: {problem.replace('slide_id', 'name')}")
    folder = folder_of(slide.folder) / schema.COLUMNS
    if not (folder / GROUP_FILE).exists():
        with writing(f"{name} of slide {slide.slide_id}"):
            write_group(folder)
    slide.put_column(_PREFIX + name, values)

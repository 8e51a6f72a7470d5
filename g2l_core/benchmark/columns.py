"""The columns of stored patches: from label files, from what was added to the store, and from the manifest."""

from collections.abc import Callable, Collection
from fnmatch import fnmatchcase
from sys import intern
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int64, Shaped

from g2l_core.slides.manifest import canonical_column, parse_condition
from g2l_core.store.columns import column_tables, read_column
from g2l_core.store.slide import StoredSlide


@runtime_checkable
class Labels(Protocol):
    """Labels of slides and patches that do not come from the store."""

    @property
    def columns(self) -> frozenset[str]:
        """The columns that are taken from here alone."""
        ...

    def of(self, slide: StoredSlide) -> Int64[np.ndarray, " patch"]:
        """The row of each stored patch of a slide, in the file."""
        ...

    def texts(self, column: str, rows: Int64[np.ndarray, " row"]) -> Shaped[np.ndarray, " row"]:
        """What some rows of the file say in a column; empty where there is no row."""
        ...


class SlideColumns:
    """The values of one slide's stored patches, by column.

    A column is taken from the first label file that has it; else it is one that was added to the store, or one that the
    manifest gave, for single patches or for the slide.

    Attributes:
        slide: The slide.
        added: The columns that were added to the store, by the name of their array.
    """

    def __init__(self, slide: StoredSlide, *labels: Labels) -> None:
        self.slide, self.added = slide, column_tables(slide.facts)
        self._labels = [(of_file, of_file.of(slide)) for of_file in labels]
        self._of_slide, self._of_patch = slide.labels, slide.patch_labels if slide.has_patch_labels else []
        self._by_patch = {column for labels in self._of_patch for column in labels}

    @property
    def names(self) -> set[str]:
        """All columns that there are."""
        given = [column for of_file, _ in self._labels for column in of_file.columns]
        return {"slide_id", *self._of_slide, *self._by_patch, *self.added, *given}

    def column(self, name: str, rows: Int64[np.ndarray, " row"]) -> Shaped[np.ndarray, " row"]:
        """The values of some stored rows, as texts; empty where there is none."""
        name = spelled(name, self.names)
        for of_file, lines in self._labels:
            if name in of_file.columns:
                return of_file.texts(name, lines[rows])
        if self.is_typed(name):
            return np.array([intern(value_text(value)) for value in self.values(name)[rows].tolist()], dtype=object)
        if name in self._by_patch:
            return np.array([intern(self._of_patch[row].get(name, "")) for row in rows.tolist()], dtype=object)
        return np.full(len(rows), intern(self._of_whole(name)), dtype=object)

    def constant(self, name: str) -> str | None:
        """The value of the whole slide in a column; None where each patch may have its own."""
        name = spelled(name, self.names)
        for of_file, lines in self._labels:
            if name in of_file.columns:
                texts = of_file.texts(name, lines[:1]).tolist() or [""]
                return texts[0] if (lines == lines[:1]).all() else None
        return None if self.is_typed(name) or name in self._by_patch else self._of_whole(name)

    def _of_whole(self, name: str) -> str:
        return self.slide.slide_id if name == "slide_id" else self._of_slide.get(name, "")

    def is_typed(self, name: str) -> bool:
        """Whether a column was added to the store, which keeps it with its type."""
        return name in self.added and not any(name in of_file.columns for of_file, _ in self._labels)

    def values(self, name: str) -> Shaped[np.ndarray, " patch"]:
        """A column that was added to the store, as it was written."""
        return read_column(self.slide, name)

    def fitting(self, condition: str, rows: Int64[np.ndarray, " row"]) -> Bool[np.ndarray, " row"]:
        """Which of some stored rows fit COLUMN=PATTERN."""
        column, pattern = parse_condition(condition)
        return mapped(self.column(column, rows), lambda value: fnmatchcase(value, pattern)).astype(bool)


def value_text(value: object) -> str:
    """A stored value as a label is written; empty for NaN."""
    return "" if value != value else str(value)


def mapped(values: Shaped[np.ndarray, " row"], change: Callable[[str], object]) -> Shaped[np.ndarray, " row"]:
    """What becomes of each value, computed once for equal ones."""
    texts = values.tolist()
    changed = {text: change(text) for text in set(texts)}
    return np.array([changed[text] for text in texts], dtype=object)


def spelled(name: str, columns: Collection[str]) -> str:
    """A column as tables have it after `canonical_column`, where they do not have it as the task writes it."""
    return name if name in columns else canonical_column(name)

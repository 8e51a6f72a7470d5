"""Which file, or which rows of a table, have the coordinates of a slide."""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np

from g2l_core.errors import ManifestError, ReadError, UsageError
from g2l_core.slides.manifest import Source
from g2l_core.tissue.coord_files import (
    HDF5_SUFFIXES,
    TABLE_SUFFIXES,
    GivenPatches,
    Rows,
    patches_of_rows,
    read_patches,
    read_rows,
)

ENDINGS = (".h5", "_patches.h5", ".hdf5", ".csv", ".tsv", ".parquet")
"""What follows a slide's name in the name of its file; TRIDENT writes the second."""

SUB_FOLDER = "patches"
"""Where TRIDENT and CLAM put these files in their folders of results."""

SLIDE_COLUMN = "slide_id"


class Coordinates:
    """The coordinates that a user brings: a folder with a file a slide, or one file."""

    def __init__(self, path: Path) -> None:
        """Look at them; a table with a column of slides is read at once.

        Raises:
            UsageError: There is nothing, or a file of no known kind, or pyarrow is not installed.
            ManifestError: The table cannot be read.
        """
        self.path = path
        if path.is_dir():
            return
        if not path.is_file() or path.suffix.lower() not in HDF5_SUFFIXES | TABLE_SUFFIXES:
            raise UsageError(
                f"--coords {path}: expected a folder with a file a slide (<slide_id>{', <slide_id>'.join(ENDINGS)}), "
                f"or one CSV, TSV or Parquet file with a column {SLIDE_COLUMN}"
            )
        _ = self._table

    @cached_property
    def _table(self) -> Rows | None:
        """The table of all slides; None if the files are of one slide each."""
        if self.path.suffix.lower() not in TABLE_SUFFIXES or not self.path.is_file():
            return None
        try:
            rows = read_rows(self.path)
        except ReadError as error:
            raise ManifestError(f"coordinates {self.path}: {error}") from error
        return rows if SLIDE_COLUMN in rows.columns else None

    @cached_property
    def _rows_by_name(self) -> dict[str, np.ndarray]:
        """The places of each slide's rows in the table."""
        if self._table is None:
            return {}
        names = np.array([str(name) for name in self._table.columns[SLIDE_COLUMN]], dtype=object)
        order = np.argsort(names, kind="stable")
        found, starts = np.unique(names[order].astype(str), return_index=True)
        return dict(zip(found.tolist(), np.split(order, starts[1:]), strict=True))

    def read(self, slide_id: str, path: Path) -> tuple[str, GivenPatches]:
        """The name of the file that has a slide's coordinates, and the patches that it gives.

        Raises:
            ReadError: It has none or two files, or they cannot be read.
            UsageError: pyarrow is not installed.
        """
        place = self._place(slide_id, path)
        if place is None:
            expected = f"{slide_id}.h5, _patches.h5, .csv or .parquet" if self._table is None else f"rows of {slide_id}"
            raise ReadError(f"{self.path} has no coordinates of it: expected {expected}")
        file, name = place
        try:
            if self._table is None:
                return file.name, read_patches(file)
            return file.name, patches_of_rows(self._table.chosen(self._rows_by_name[name]))
        except ManifestError as error:
            raise ReadError(str(error)) from error
        except ReadError as error:
            raise ReadError(str(error) if self._table is None else f"coordinates {file}: {error}") from error

    def sha256(self, slide_id: str, path: Path) -> str | None:
        """The digest of a slide's coordinates as they are now; None if it has none. Errors are those of `read`."""
        return None if self._place(slide_id, path) is None else self.read(slide_id, path)[1].sha256

    def require_distinct(self, sources: Iterable[Source]) -> None:
        """Refuse two slides that would take the same coordinates, because their files have one name.

        Raises:
            UsageError: There are two.
        """
        owners: dict[tuple[Path, str], str] = {}
        for source in sources:
            place = None if source.patch_ids else self._place(source.slide_id, source.path)
            if place is not None and (other := owners.setdefault(place, source.slide_id)) != source.slide_id:
                what = f"{place[0]}, rows of {place[1]}" if place[1] else str(place[0])
                raise UsageError(
                    f"slides {other} and {source.slide_id} would both take their coordinates from {what}: "
                    "name them by the slides' ids, with their folders"
                )

    def _place(self, slide_id: str, path: Path) -> tuple[Path, str] | None:
        """The file of a slide, and in a table its name there: its id before the name of its file.

        Raises:
            ReadError: Two files have the same name.
        """
        names = dict.fromkeys((slide_id, path.name, path.stem, slide_id.rpartition("/")[2]))
        if self._table is not None:
            return next(((self.path, name) for name in names if name in self._rows_by_name), None)
        for name in names:
            if self.path.is_file():
                found = [self.path] if self.path.name in {f"{name}{ending}" for ending in ENDINGS} else []
            else:
                folders = (self.path, self.path / SUB_FOLDER)
                files = (folder / f"{name}{ending}" for folder in folders for ending in ENDINGS)
                found = [file for file in files if file.is_file()]
            if len(found) > 1:
                raise ReadError(f"{self.path} has two files of it, {found[0].name} and {found[1].name}: keep one")
            if found:
                return found[0], ""
        return None

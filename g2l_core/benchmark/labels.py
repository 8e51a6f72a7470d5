"""Label tables: rows of a CSV file by slide, by patch of a slide, or by corner of a patch."""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Shaped

from g2l_core.benchmark.columns import spelled
from g2l_core.benchmark.spec import TaskSpec
from g2l_core.errors import ManifestError, TaskError
from g2l_core.slides.manifest import fits, open_table, parse_condition
from g2l_core.slides.readers import IMAGE_SUFFIXES, slide_suffixes
from g2l_core.store.features import FeatureStore, StoredSlide

NAMED = 3
"""How many examples a note has."""

Key = str | int
"""What a label row is of: a patch image by its id, the patch at a corner by `_corners`, or `WHOLE`."""

WHOLE = ""
"""The key of a whole slide."""

NO_ROW = -1
"""The row of what has no label; all its values are empty."""

_BLANK = 1 << 31
"""In place of a coordinate that is blank; no coordinate is as large."""


class LabelTable:
    """Rows of a label file, found by slide, by patch of a slide, or by corner of a patch.

    Attributes:
        path: The file.
        columns: Its columns that hold labels. What the task reads of them is taken from here alone.
    """

    def __init__(
        self, path: Path, stores: Sequence[FeatureStore], spec: TaskSpec, *, compares_all: bool = False
    ) -> None:
        """Read a label file.

        Args:
            path: A CSV file with the column slide_id; and patch_id, or both x and y, where labels are of patches.
            stores: The cohorts, which must have all of its slides unless the task's `missing` is "note".
            spec: The task, whose label must be a column.
            compares_all: Whether two rows of one thing must agree in every column; if not, in those of the task alone.

        Raises:
            ManifestError: The file is absent, cannot be read, or names slides that no store has.
            TaskError: The label is no column.
        """
        if not path.is_file():
            raise ManifestError(
                f"there is no label file {path}; it lies beside the task file, for a shipped task in the current "
                "folder, where g2l datasets NAME --root DIR writes it"
            )
        table = open_table(path)
        if not len(table.lines) or "slide_id" not in table.columns:
            raise ManifestError(
                f"the label file {path} needs a column slide_id and rows; its columns are {', '.join(table.columns)}"
            )
        if spec.label and spelled(spec.label, table.columns) not in table.columns:
            raise TaskError(f"task {spec.name}: {path} has no column {spec.label!r}; it has {', '.join(table.columns)}")
        self.path, self._spec, self._table = path, spec, table
        self._corner = _corner_columns(table.columns, spec)
        self.columns = frozenset(table.columns) - {"slide_id", "patch_id", *self._corner}
        self._values = {name: np.append(texts, "") for name, texts in table.values.items()}
        compared = sorted(self.columns) if compares_all else [spelled(column, self.columns) for column in spec.columns]
        self._compared = [column for column in dict.fromkeys(compared) if column in self.columns]
        self._respelled: dict[str, str] = {}
        self._unmatched: list[int] = []
        self._numbers: dict[str, int] = {"": _BLANK}
        stored = [slide_id for store in stores for slide_id in store.slide_ids()]
        ids = table.values["slide_id"].tolist()
        if "" in ids:
            raise ManifestError(f"{path}, line {table.lines[ids.index('')]} has no slide_id")
        names = _stored_names(dict.fromkeys(ids), stored, path)
        self._rows = _rows_by_name([names[slide_id] for slide_id in ids])
        self._respelled |= {asked: found for asked, found in names.items() if asked != found}
        absent = sorted(self._rows.keys() - set(stored))
        if absent and spec.missing != "note":
            more = f" and {len(absent) - NAMED} more" if len(absent) > NAMED else ""
            raise ManifestError(
                f"the label file {path} names slides that no store has: {', '.join(absent[:NAMED])}{more}. "
                'g2l store ls lists the stored ids; missing = "note" in the task leaves them out'
            )

    @property
    def notes(self) -> list[str]:
        """What was read otherwise than it is written, and which rows have found no patch of the slides asked for."""
        notes = list(self._table.notes)
        if self._respelled:
            asked, found = next(iter(self._respelled.items()))
            notes.append(
                f"{self.path.name}: ids in another spelling than the stored ones were taken for the same: "
                f"{len(self._respelled):,}, such as {asked!r} for {found!r}"
            )
        if self._unmatched:
            notes.append(
                f"{len(self._unmatched):,} rows of {self.path.name} match no stored patch of their slide, first line "
                f"{self._lines[min(self._unmatched)]}"
            )
        return notes

    @property
    def n_rows(self) -> int:
        """Rows of the file."""
        return len(self._lines)

    def texts(self, column: str, rows: Int64[np.ndarray, " row"]) -> Shaped[np.ndarray, " row"]:
        """What some rows of the file say in a column; empty for `NO_ROW`."""
        return self._values[column][rows]

    def of(self, slide: StoredSlide) -> Int64[np.ndarray, " patch"]:
        """The row of each stored patch of a slide, in the file; `NO_ROW` where there is none.

        Raises:
            ManifestError: Two rows contradict each other, or say where a patch is without a number.
        """
        rows = self._rows.get(slide.slide_id)
        if rows is None:
            return np.full(len(slide), NO_ROW)
        keys, numbers = self._keys(slide, rows), rows.tolist()
        by_key = dict(zip(reversed(keys), reversed(numbers), strict=True))
        if len(by_key) < len(keys):
            for key, row in zip(keys, numbers, strict=True):
                self._require_equal(by_key[key], row, slide.slide_id, key)
        whole = by_key.pop(WHOLE, None)
        if not by_key:
            return np.full(len(slide), NO_ROW if whole is None else whole)
        if whole is not None:
            raise ManifestError(
                f"{self.path}: line {self._lines[whole]} is of the whole slide {slide.slide_id}, line "
                f"{self._lines[min(by_key.values())]} of a patch of it; keep one kind"
            )
        found = [by_key.get(key, NO_ROW) for key in self._stored_keys(slide, by_key)]
        self._unmatched += {*by_key.values()} - {*found}
        return np.array(found, np.int64)

    @property
    def _lines(self) -> Int64[np.ndarray, " row"]:
        return self._table.lines

    def _keys(self, slide: StoredSlide, rows: Int64[np.ndarray, " row"]) -> Sequence[Key]:
        """What some rows of one slide are of."""
        if not slide.has_patch_ids and self._corner:
            x, y = (self._whole_numbers(column, rows) for column in self._corner)
            keys: list[Key] = _corners(x, y).tolist()
            for blank in np.flatnonzero((x == _BLANK) | (y == _BLANK)).tolist():
                keys[blank] = WHOLE
            return keys
        return self._values["patch_id"][rows].tolist() if "patch_id" in self._values else [WHOLE] * len(rows)

    def _whole_numbers(self, column: str, rows: Int64[np.ndarray, " row"]) -> Int64[np.ndarray, " row"]:
        """Coordinates, also those that were written as 512.0; `_BLANK` where there is none."""
        texts = self._values[column][rows].tolist()
        for text in dict.fromkeys(texts):
            if text not in self._numbers:
                self._numbers[text] = self._whole_number(text, column, int(rows[texts.index(text)]))
        return np.fromiter(map(self._numbers.__getitem__, texts), np.int64, len(texts))

    def _whole_number(self, text: str, column: str, row: int) -> int:
        try:
            number = float(text)
            if number.is_integer() and abs(number) < 1 << 31:
                return int(number)
        except ValueError:
            pass
        raise ManifestError(
            f"{self.path}, line {self._lines[row]}: {column} is {text!r}, expected a whole number of level-0 pixels"
        )

    def _require_equal(self, first: int, second: int, slide_id: str, key: Key) -> None:
        """Refuse two rows of one thing that differ in what the task reads."""
        for column in self._compared:
            values = [self._value(row, column) for row in (first, second)]
            if values[0] != values[1]:
                corner = ",".join(self._values[axis][first] for axis in self._corner)
                patch = "" if key == WHOLE else f", patch {corner if isinstance(key, int) else key}"
                raise ManifestError(
                    f"{self.path}: lines {self._lines[first]} and {self._lines[second]} give slide {slide_id}{patch} "
                    f"different {column}, {values[0]!r} and {values[1]!r}; keep the right one"
                )

    def _value(self, row: int, column: str) -> str:
        text: str = self._values[column][row]
        return self._spec.class_of(text) if column == spelled(self._spec.label, self.columns) else text

    def _stored_keys(self, slide: StoredSlide, by_key: Collection[Key]) -> Sequence[Key]:
        """What each stored patch is called in the label file."""
        if not slide.has_patch_ids:
            x, y = slide.coords.astype(np.int64).T
            return _corners(x, y).tolist()
        files = slide.patch_ids or []
        own = [labels.get("patch_id", "") for labels in slide.patch_labels]
        keys = [name if name in by_key else file for name, file in zip(own, files, strict=True)]
        twice = next((name for name, count in Counter(own).items() if count > 1 and name and name in by_key), None)
        if twice is not None:
            raise ManifestError(
                f"{self.path}: the manifest gives several images of {slide.slide_id} the patch_id {twice!r}; "
                "name patches by their files"
            )
        return self._respelled_keys(keys, by_key)

    def _respelled_keys(self, keys: list[str], by_key: Collection[Key]) -> list[str]:
        """Find patches whose id lost its suffix, folder or leading zeros on the way, where only one can be meant."""
        missed = [key for key in by_key if isinstance(key, str)]
        missed = sorted(set(missed) - set(keys))
        if not missed:
            return keys
        asked, there = _by_loose_name(missed, _suffixes()), _by_loose_name(set(keys) - set(by_key), _suffixes())
        pairs = {there[n][0]: asked[n][0] for n in asked if len(asked[n]) == len(there.get(n, ())) == 1}
        self._respelled |= {written: stored for stored, written in pairs.items()}
        return [pairs.get(key, key) for key in keys]

    def lost(self, stores: Sequence[FeatureStore]) -> list[tuple[str, Mapping[str, list[str]]]]:
        """Slides of the file without patches: why, and the ids of each class.

        Args:
            stores: The cohorts.
        """
        with_patches = {slide.slide_id for store in stores for slide in store.slides()}
        failed = {slide_id for store in stores for slide_id in store.failed_slides()} - with_patches
        damaged = {slide_id for store in stores for slide_id in store.damaged} - with_patches
        reasons = ((failed, "failed in stage one"), (damaged, "damaged in the store"))
        absent = self._rows.keys() - with_patches - failed - damaged
        return [(reason, found) for ids, reason in (*reasons, (absent, "in no store")) if (found := self._classes(ids))]

    def _classes(self, slide_ids: Collection[str]) -> dict[str, list[str]]:
        read = [parse_condition(text)[0] for text in self._spec.where] + [spelled(self._spec.label, self.columns)]
        columns = [column for column in dict.fromkeys(["slide_id", *read]) if column in self._values]
        values = (
            (slide_id, dict(zip(columns, texts, strict=True)))
            for slide_id in sorted(self._rows.keys() & set(slide_ids))
            for texts in {
                *zip(*(self._values[column][self._rows[slide_id]].tolist() for column in columns), strict=True)
            }
        )
        return slides_by_class(values, self._spec)


def _rows_by_name(names: Sequence[str]) -> dict[str, Int64[np.ndarray, " row"]]:
    """Where each name stands."""
    codes = {name: code for code, name in enumerate(dict.fromkeys(names))}
    of_row = np.fromiter(map(codes.__getitem__, names), np.int64, len(names))
    order = np.argsort(of_row, kind="stable")
    return dict(zip(codes, np.split(order, np.searchsorted(of_row[order], np.arange(1, len(codes)))), strict=True))


def _corners(x: Int64[np.ndarray, " patch"], y: Int64[np.ndarray, " patch"]) -> Int64[np.ndarray, " patch"]:
    """One number for each corner, of coordinates of at most 32 bits: Python compares numbers faster than tuples."""
    return (x << 32) + y


def slides_by_class(values: Iterable[tuple[str, Mapping[str, str]]], spec: TaskSpec) -> dict[str, list[str]]:
    """The ids of slides that may take part, by class; a slide with several classes counts in each.

    Args:
        values: Ids with the values that are known of each.
        spec: The task. A condition on a column that is not known holds.
    """
    conditions = [parse_condition(text) for text in spec.where]
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for slide_id, row in values:
        known = [c for c in conditions if c[0] == "slide_id" or c[0] in row]
        label = spec.class_of(row.get(spelled(spec.label, row), ""))
        if (label or not spec.label) and all(fits(c, slide_id, row) for c in known):
            found[label][slide_id] = None
    return {label: list(ids) for label, ids in sorted(found.items())}


def _corner_columns(columns: Iterable[str], spec: TaskSpec) -> tuple[str, ...]:
    """The columns of x and y; none unless both are there, and none of them is the label."""
    by_name = {column.lower(): column for column in columns}
    corner = tuple(by_name[axis] for axis in "xy" if axis in by_name)
    return corner if len(corner) == 2 and spec.label not in corner else ()


def _stored_names(asked: Iterable[str], stored: Collection[str], path: Path) -> dict[str, str]:
    """The stored id of each id of a table: itself, or the only one that differs in spelling alone.

    Raises:
        ManifestError: Several stored ids differ from one of the table in spelling alone.
    """
    known, suffixes = set(stored), _suffixes()
    loose = _by_loose_name(known, suffixes)
    names = {}
    for slide_id in asked:
        candidates = [] if slide_id in known else loose.get(_loose_name(slide_id, suffixes), [])
        if len(candidates) > 1:
            raise ManifestError(
                f"{path} names the slide {slide_id!r}, which no store has; it may be {' or '.join(candidates)}. "
                "Write the stored id"
            )
        names[slide_id] = candidates[0] if candidates else slide_id
    return names


def _suffixes() -> frozenset[str]:
    return slide_suffixes() | IMAGE_SUFFIXES | {".zarr", ".ome"}


def _by_loose_name(names: Iterable[str], suffixes: Collection[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        found[_loose_name(name, suffixes)].append(name)
    return found


def _loose_name(text: str, suffixes: Collection[str]) -> str:
    """A name without folders, suffixes, leading zeros of a number, and case."""
    name = re.split(r"[/\\]", text)[-1].casefold()
    while (dot := name.rfind(".")) > 0 and name[dot:] in suffixes:
        name = name[:dot]
    number = re.fullmatch(r"0*(\d+)(\.0+)?", name)
    return number[1] if number else name

"""Labels that come after the fact: a label file, read once, by the rules of benchmark tasks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Shaped

from g2l_core.errors import ManifestError, UsageError
from g2l_core.store.features import FeatureStore, StoredSlide

MISSING = ("refuse", "skip")
NAMED = 3
"""How many examples a note has."""


def require_missing(missing: str) -> None:
    """Refuse another word for what is missing than those of `MISSING`.

    Raises:
        UsageError: It is another.
    """
    if missing not in MISSING:
        raise UsageError(f"missing must be {' or '.join(MISSING)}; got {missing!r}")


@dataclass(frozen=True, kw_only=True)
class FileLabels:
    """The labels of one file, joined with the slides of a store."""

    path: Path
    columns: frozenset[str]
    """Its columns; what they say is taken from here alone, also where it is blank."""
    values: Mapping[str, Shaped[np.ndarray, "_"]]
    """The texts of each column, with an empty one at the end."""
    lines: Mapping[str, int | Int64[np.ndarray, "_"]]
    """The row of each slide that has any, by id; where patches have labels of their own, that of each stored patch."""
    notes: tuple[str, ...]
    """What was read otherwise than it is written, left out or blank, one sentence each."""

    def of(self, slide: StoredSlide) -> Int64[np.ndarray, " patch"]:
        """The row of each stored patch of a slide; -1 where there is none."""
        lines = self.lines.get(slide.slide_id, -1)
        return np.full(len(slide), lines) if isinstance(lines, int) else lines

    def texts(self, column: str, rows: Int64[np.ndarray, " row"]) -> Shaped[np.ndarray, " row"]:
        """What some rows say in a column; empty for -1."""
        return self.values[column][rows]


def read_labels(path: Path, store: FeatureStore, *, missing: str) -> FileLabels:
    """Read a label file and find its slides, patches and corners in a store.

    Args:
        path: A table with slide_id; and patch_id, or x and y in level-0 pixels, where labels are of patches.
        store: The store.
        missing: What a slide of the file that the store does not have does: refuse the file, or be left out.

    Raises:
        ManifestError: The file cannot be read, contradicts itself (the message names both lines), or names slides
            that the store does not have.
        UsageError: `missing` is another word.
    """
    from g2l_core.benchmark.labels import LabelTable  # brings what evaluates tasks, and much with it
    from g2l_core.benchmark.spec import TaskSpec

    require_missing(missing)
    spec = TaskSpec(name=path.name, metrics=("cka",), missing="note")
    table = LabelTable(path, [store], spec, compares_all=True)
    lost = [(reason, sorted(i for ids in by_class.values() for i in ids)) for reason, by_class in table.lost([store])]
    for reason, slide_ids in lost:
        if reason == "in no store" and missing == "refuse":
            raise ManifestError(
                f"{path} names {_some(slide_ids)} that {store.path} does not have. Correct the file, or leave them out "
                'with missing="skip"'
            )
    slides = list(store.slides())
    lines = {slide.slide_id: _lines_of(table.of(slide)) for slide in slides}
    every = np.arange(table.n_rows + 1)
    every[-1] = -1
    found = FileLabels(
        path=path,
        columns=table.columns,
        values={column: table.texts(column, every) for column in table.columns},
        lines={slide_id: of_slide for slide_id, of_slide in lines.items() if not _is_absent(of_slide)},
        notes=(),
    )
    notes = [*table.notes, *(f"{path.name}: {_some(slide_ids)} left out, {reason}" for reason, slide_ids in lost)]
    return replace(found, notes=(*notes, *_blanks(found, slides)))


def _lines_of(rows: Int64[np.ndarray, " patch"]) -> int | Int64[np.ndarray, " patch"]:
    """One row where all patches have the same."""
    return int(rows[0]) if len(rows) and (rows == rows[0]).all() else rows


def _is_absent(lines: int | Int64[np.ndarray, " patch"]) -> bool:
    return isinstance(lines, int) and lines < 0


def _blanks(labels: FileLabels, slides: Sequence[StoredSlide]) -> Iterator[str]:
    """Say for each column how many slides and patches have no value."""
    for column in sorted(labels.columns):
        blank, patches = [], 0
        for slide in slides:
            lines = labels.lines.get(slide.slide_id, -1)
            if isinstance(lines, int):
                blank += [] if labels.values[column][lines] else [slide.slide_id]
            else:
                patches += int((labels.texts(column, lines) == "").sum())
        if blank:
            yield f"{labels.path.name}: no {column} for {_some(blank)}"
        if patches:
            yield f"{labels.path.name}: no {column} for {patches:,} patches of slides that have some"


def _some(slide_ids: Sequence[str]) -> str:
    named = ", ".join(slide_ids[:NAMED])
    more = f" and {len(slide_ids) - NAMED:,} more" if len(slide_ids) > NAMED else ""
    return f"{len(slide_ids):,} slide{'s' * (len(slide_ids) > 1)} ({named}{more})"

"""Label tables: rows of a CSV file by slide, by patch of a slide, or by corner of a patch."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from g2l_core.benchmark.spec import TaskSpec
from g2l_core.errors import ManifestError, TaskError
from g2l_core.slides.manifest import read_table
from g2l_core.store.features import FeatureStore, StoredSlide


class LabelTable:
    """Rows of a label file, found by slide, by patch of a slide, or by corner of a patch."""

    def __init__(self, path: Path, stores: Sequence[FeatureStore], spec: TaskSpec) -> None:
        """Read a label file.

        Args:
            path: A CSV file with the column slide_id, and patch_id, x or y where labels are of patches.
            stores: The cohorts, which must have all of its slides.
            spec: The task, whose label must be a column.

        Raises:
            ManifestError: The file is absent, cannot be read, or names slides that no store has.
            TaskError: The label is no column.
        """
        if not path.is_file():
            raise ManifestError(
                f"there is no label file {path}; it lies beside the task file, for a shipped task in the current "
                "folder, where g2l datasets NAME --root DIR writes it"
            )
        rows = read_table(path)
        if not rows or "slide_id" not in rows[0]:
            raise ManifestError(f"the label file {path} needs a column slide_id and rows")
        if spec.label and spec.label not in rows[0]:
            raise TaskError(f"task {spec.name}: {path} has no column {spec.label!r}; it has {', '.join(rows[0])}")
        _require_stored({row["slide_id"] for row in rows}, path, stores)
        self._keys = tuple(key for key in ("patch_id", "x", "y") if key in rows[0])
        self._rows: dict[str, dict[tuple[str, ...], dict[str, str]]] = defaultdict(dict)
        for row in rows:
            self._rows[row["slide_id"]][tuple(row[key] for key in self._keys)] = row

    def of(self, slide: StoredSlide) -> list[Mapping[str, str]]:
        """The label row of each stored row of a slide; empty where there is none."""
        of_slide = self._rows.get(slide.slide_id, {})
        if not self._keys:
            return [of_slide.get((), {})] * len(slide)
        x, y = slide.coords.T.astype(np.str_).tolist()
        columns = {"patch_id": slide.patch_ids or [""] * len(slide), "x": x, "y": y}
        return [of_slide.get(key, {}) for key in zip(*(columns[key] for key in self._keys), strict=True)]


def _require_stored(slide_ids: set[str], path: Path, stores: Sequence[FeatureStore]) -> None:
    absent = sorted(slide_ids - {slide_id for store in stores for slide_id in store.slide_ids()})
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise ManifestError(
            f"the label file {path} names slides that no store has: {', '.join(absent[:3])}{more}. "
            "g2l store ls lists the stored ids"
        )

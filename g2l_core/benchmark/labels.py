"""Label tables: rows of a CSV file by slide, by patch of a slide, or by corner of a patch."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from g2l_core.benchmark.spec import TaskSpec
from g2l_core.errors import ManifestError, TaskError
from g2l_core.slides.manifest import read_table
from g2l_core.store.features import FeatureStore, StoredSlide


class LabelTable:
    """Label rows by slide, by patch of a slide, or by corner of a patch."""

    def __init__(self, path: Path, stores: Sequence[FeatureStore], spec: TaskSpec) -> None:
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
        self._require_known(rows, path, stores)
        self._keys = tuple(key for key in ("patch_id", "x", "y") if key in rows[0])
        self._rows: dict[str, dict[tuple[str, ...], dict[str, str]]] = defaultdict(dict)
        for row in rows:
            self._rows[row["slide_id"]][tuple(row[key] for key in self._keys)] = row

    def _require_known(self, rows: Sequence[Mapping[str, str]], path: Path, stores: Sequence[FeatureStore]) -> None:
        known = {slide_id for store in stores for slide_id in store.slide_ids()}
        absent = sorted({row["slide_id"] for row in rows} - known)
        if absent:
            more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
            raise ManifestError(
                f"the label file {path} names slides that no store has: {', '.join(absent[:3])}{more}. "
                "g2l store ls lists the stored ids"
            )

    def of(self, slide: StoredSlide) -> list[Mapping[str, str]]:
        """One label row for each stored row of the slide; empty where there is none."""
        mine = self._rows.get(slide.slide_id, {})
        if not self._keys:
            return [mine.get((), {})] * len(slide)
        names = slide.patch_ids or [""] * len(slide)
        corners = slide.coords.tolist()
        place = {"patch_id": lambda i: names[i], "x": lambda i: str(corners[i][0]), "y": lambda i: str(corners[i][1])}
        return [mine.get(tuple(place[key](i) for key in self._keys), {}) for i in range(len(slide))]

"""The rows that a benchmark task speaks of: stored patches joined with labels, parted without leaks."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, Shaped, UInt64
from sklearn.model_selection import StratifiedGroupKFold

from g2l_core.errors import LeakError, ManifestError, TaskError
from g2l_core.manifest import fits, parse_condition, read_table
from g2l_core.store.features import FeatureStore, StoredSlide
from g2l_core.store.schema import STATUS, UNKNOWN_HASH
from g2l_core.types import Features

METRICS = ("cka", "knn", "probe", "robustness")


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A published figure that a task's result can be held against."""

    metric: str
    """As the results name it: knn_accuracy, probe_auc, robustness_ratio_k5, ..."""
    encoder: str
    """By its name, which need not be in the table of encoders."""
    value: float
    tolerance: float
    """How far a result may be off and still count as the same."""
    source: str
    """Where the figure is published, and what is not stated there."""


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One table of a task file."""

    name: str
    metrics: tuple[str, ...] = METRICS
    label: str = ""
    """Column of the biological class; not needed for CKA alone."""
    labels: str = ""
    """A CSV with that column, by slide_id, by slide_id and patch_id, or by slide_id, x and y. Relative to the task
    file. Columns that it has not are those that the store's manifest gave; empty, all are."""
    split: str = ""
    """Column that says train or test; other values are left out."""
    train: str = ""
    """COLUMN=PATTERN in place of a split column, with `test`."""
    test: str = ""
    folds: int = 0
    """Folds by group in place of a fixed split."""
    group: str = "patient_id"
    center: str = "medical_center"
    where: tuple[str, ...] = ()
    """Conditions COLUMN=PATTERN that a slide must fit to take part."""
    knn_k: int = 20
    robustness_k: tuple[int, ...] = (3, 5, 10, 20)
    probe_c: tuple[float, ...] = (1.0,)
    expected: tuple[Expected, ...] = ()
    """Published figures; nothing is computed from them."""

    def __post_init__(self) -> None:
        """Refuse a task that cannot be evaluated."""
        unknown = [metric for metric in self.metrics if metric not in METRICS]
        if unknown:
            raise TaskError(f"task {self.name}: unknown metric {unknown[0]!r}; known: {', '.join(METRICS)}")
        ways = [bool(self.split), bool(self.train or self.test), bool(self.folds)]
        needs_split = {"knn", "probe"} & set(self.metrics)
        if needs_split and sum(ways) != 1:
            raise TaskError(
                f"task {self.name}: {', '.join(sorted(needs_split))} need exactly one of split = COLUMN, "
                f"train and test = CONDITION, or folds = N; found {sum(ways)}"
            )
        if bool(self.train) != bool(self.test):
            raise TaskError(f"task {self.name}: train and test conditions come together")
        if set(self.metrics) - {"cka"} and not self.label:
            raise TaskError(f"task {self.name}: give label = COLUMN, the biological class")
        for figure in self.expected:
            if figure.metric.partition("_")[0] not in self.metrics:
                raise TaskError(f"task {self.name}: expected.{figure.metric} is of none of its metrics {self.metrics}")


def parse_expected(task: str, table: Mapping[str, Any]) -> tuple[Expected, ...]:
    """The published figures of a task file.

    Args:
        task: Names it in errors.
        table: {metric: {encoder, value, tolerance, source}}, or a list of such tables for several encoders.

    Raises:
        TaskError: A figure lacks a key, has another one, or a value of another kind.
    """
    figures = [(m, f) for m, given in table.items() for f in (given if isinstance(given, list) else [given])]
    return tuple(_expected(task, metric, figure) for metric, figure in figures)


def _expected(task: str, metric: str, figure: object) -> Expected:
    kinds: dict[str, Any] = {"encoder": str, "value": (int, float), "tolerance": (int, float), "source": str}
    where = f"task {task}: expected.{metric}"
    if not isinstance(figure, Mapping) or set(figure) != set(kinds):
        found = ", ".join(sorted(figure)) if isinstance(figure, Mapping) else repr(figure)
        raise TaskError(f"{where} needs just the keys {', '.join(kinds)}; found {found}")
    for key, kind in kinds.items():
        if not isinstance(figure[key], kind) or isinstance(figure[key], bool):
            raise TaskError(f"{where}: {key} must be {'text' if kind is str else 'a number'}, not {figure[key]!r}")
    if not figure["encoder"] or not figure["source"] or not isfinite(figure["value"]):
        raise TaskError(f"{where}: encoder and source may not be empty, and value must be finite")
    if not 0 <= figure["tolerance"] < inf:
        raise TaskError(f"{where}: tolerance must be 0 or more, not {figure['tolerance']}")
    return Expected(metric=metric, **figure)


@dataclass(frozen=True, kw_only=True)
class TaskRows:
    """The rows of a task; every array has one entry a row."""

    slides: tuple[StoredSlide, ...]
    slide_index: Int64[np.ndarray, " row"]
    row: Int64[np.ndarray, " row"]
    """Stored row in its slide."""
    label: Shaped[np.ndarray, " row"]
    center: Shaped[np.ndarray, " row"]
    cluster: Shaped[np.ndarray, " row"]
    """What is drawn together in a bootstrap, and never parted by a split: the patient if known."""
    cluster_unit: str
    """In the plural, for people."""
    part: Shaped[np.ndarray, " row"]
    """train, test, or empty where the split says neither or folds will part them."""
    pixel_hash: UInt64[np.ndarray, " row"]
    duplicates_dropped: int = 0

    def __len__(self) -> int:
        return len(self.row)

    @property
    def slide_ids(self) -> Shaped[np.ndarray, " row"]:
        """The slide of each row."""
        return np.array([slide.slide_id for slide in self.slides])[self.slide_index]

    def take(self, keep: Bool[np.ndarray, " row"] | Int64[np.ndarray, " kept"]) -> "TaskRows":
        """Some of the rows."""
        fields = ("slide_index", "row", "label", "center", "cluster", "part", "pixel_hash")
        return replace(self, **{field: getattr(self, field)[keep] for field in fields})

    def features(self, encoder: str) -> Features:
        """The canonical view's features of each row, float16.

        Raises:
            StoreMissingError: A slide has none of this encoder.
        """
        parts: list[np.ndarray] = []
        order: list[np.ndarray] = []
        for index in np.unique(self.slide_index).tolist():
            mine = np.flatnonzero(self.slide_index == index)
            parts.append(self.slides[index].features(encoder)[self.row[mine]])
            order.append(mine)
        out = np.empty((len(self), parts[0].shape[1]), np.float16)
        out[np.concatenate(order)] = np.concatenate(parts)
        return out


def gather(stores: Sequence[FeatureStore], spec: TaskSpec, folder: Path) -> TaskRows:
    """Join the stores' good patches with a task's labels, drop duplicates, and check the split.

    Args:
        stores: Cohorts, put one behind the other.
        spec: The task.
        folder: What `spec.labels` is relative to.

    Raises:
        TaskError: No rows are left, or a column is absent.
        LeakError: Training and test part share a patient.
        ManifestError: The label file is not usable or names slides that no store has.
    """
    slides = _taking_part(stores, spec)
    table = _LabelTable(folder / spec.labels, stores, spec) if spec.labels else None
    columns = [_columns_of(i, slide, spec, table) for i, slide in enumerate(slides)]
    arrays: dict[str, Any] = {name: np.concatenate([part[name] for part in columns]) for name in columns[0]}
    rows = TaskRows(slides=tuple(slides), cluster_unit=_cluster_unit(slides, spec), **arrays)
    if spec.label:
        rows = rows.take(rows.label != "")
    if spec.split or spec.train:
        rows = rows.take(rows.part != "")
    if not len(rows):
        raise TaskError(f"task {spec.name}: no patch has a label {spec.label!r} and a place in the split")
    rows = without_duplicates(rows)
    refuse_leaks(rows, spec)
    return rows


def _taking_part(stores: Sequence[FeatureStore], spec: TaskSpec) -> list[StoredSlide]:
    conditions = [parse_condition(text) for text in spec.where]
    slides = [s for store in stores for s in store.slides()]
    kept = [s for s in slides if all(fits(c, s.slide_id, s.labels) for c in conditions)]
    if not kept:
        raise TaskError(f"task {spec.name}: no slide fits {' and '.join(spec.where) or 'at all'}")
    return kept


def _cluster_unit(slides: Sequence[StoredSlide], spec: TaskSpec) -> str:
    if all(spec.group in slide.labels for slide in slides):
        return "patients" if spec.group == "patient_id" else f"groups of {spec.group}"
    return "slides" if all(slide.facts["kind"] == "slide" for slide in slides) else "images"


class _LabelTable:
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


def _columns_of(index: int, slide: StoredSlide, spec: TaskSpec, table: _LabelTable | None) -> dict[str, np.ndarray]:
    """A slide's contribution to the arrays of TaskRows; unreadable patches are left out."""
    good = np.flatnonzero(slide.patch_status == STATUS["ok"])
    labels = slide.labels
    own = table.of(slide) if table else [{}] * len(slide)

    def column(name: str) -> np.ndarray:
        return np.array([own[row].get(name) or labels.get(name, "") for row in good], dtype=np.str_)

    cluster = column(spec.group)
    if not cluster.all():
        names = [slide.slide_id if slide.facts["kind"] == "slide" else f"{slide.slide_id}#{row}" for row in good]
        cluster = np.where(cluster == "", np.array(names, dtype=np.str_), cluster)
    return {
        "slide_index": np.full(len(good), index),
        "row": good,
        "label": column(spec.label) if spec.label else np.full(len(good), "", dtype="<U1"),
        "center": column(spec.center),
        "cluster": cluster,
        "part": _part(spec, slide, column, len(good)),
        "pixel_hash": slide.pixel_hash[good, 0],
    }


def _part(spec: TaskSpec, slide: StoredSlide, column: Callable[[str], np.ndarray], n: int) -> np.ndarray:
    if spec.split:
        values = np.char.lower(column(spec.split))
        return np.where(np.isin(values, ["train", "test"]), values, "")
    if spec.train:
        labels = slide.labels
        if fits(parse_condition(spec.test), slide.slide_id, labels):
            return np.full(n, "test")
        if fits(parse_condition(spec.train), slide.slide_id, labels):
            return np.full(n, "train")
    return np.full(n, "", dtype="<U5")


def without_duplicates(rows: TaskRows) -> TaskRows:
    """Leave out copies of a patch (equal pixel hashes).

    Where the copies' labels disagree, all go: nobody knows which is right. Else one stays, in the test part if
    there is one there, so that nothing of the test part is trained on.
    """
    order = np.lexsort((rows.part != "test", rows.pixel_hash))
    hashes, labels = rows.pixel_hash[order], rows.label[order]
    starts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]]))
    keep = np.zeros(len(rows), bool)
    for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
        if hashes[start] == UNKNOWN_HASH:
            keep[order[start:stop]] = True
        elif (labels[start:stop] == labels[start]).all():
            keep[order[start]] = True
    return replace(rows.take(keep), duplicates_dropped=int((~keep).sum()))


def refuse_leaks(rows: TaskRows, spec: TaskSpec) -> None:
    """Refuse a split that puts one patient on both sides.

    Raises:
        LeakError: Names the patient.
        TaskError: A part is empty.
    """
    if not (spec.split or spec.train):
        return
    sides = {part: set(rows.cluster[rows.part == part].tolist()) for part in ("train", "test")}
    for part, clusters in sides.items():
        if not clusters:
            raise TaskError(f"task {spec.name}: its {part} part is empty")
    shared = sorted(sides["train"] & sides["test"])
    if shared:
        raise LeakError(
            f"task {spec.name}: {len(shared)} {rows.cluster_unit} are in train and test, first {shared[0]!r}. "
            f"Split by {spec.group}"
        )


def parts(
    rows: TaskRows, spec: TaskSpec, seed: int
) -> Iterator[tuple[Int64[np.ndarray, " train"], Int64[np.ndarray, " test"]]]:
    """Yield (training rows, test rows): the one fixed split, or the folds by cluster.

    Raises:
        TaskError: A class has fewer clusters than there are folds.
    """
    if not spec.folds:
        yield np.flatnonzero(rows.part == "train"), np.flatnonzero(rows.part == "test")
        return
    for name in np.unique(rows.label):
        members = len(np.unique(rows.cluster[rows.label == name]))
        if members < spec.folds:
            raise TaskError(
                f"task {spec.name}: class {name} is in {members} {rows.cluster_unit}, fewer than the "
                f"{spec.folds} folds; use fewer"
            )
    splitter = StratifiedGroupKFold(n_splits=spec.folds, shuffle=True, random_state=seed)
    yield from splitter.split(np.empty((len(rows), 0)), rows.label, rows.cluster)

"""The rows of a benchmark task: stored patches joined with labels, and split without leaks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, Shaped, UInt64

from g2l_core.benchmark.damage import Damages
from g2l_core.benchmark.join import EXTRA as _EXTRA
from g2l_core.benchmark.join import Joined
from g2l_core.benchmark.labels import LabelTable
from g2l_core.benchmark.spec import TaskSpec
from g2l_core.benchmark.widths import canonical_features
from g2l_core.errors import LeakError, StoreCorruptError, TaskError
from g2l_core.metrics.bags import bag_values
from g2l_core.metrics.folds import group_folds
from g2l_core.store.facts import EncoderFacts
from g2l_core.store.features import FeatureStore, StoredSlide
from g2l_core.store.schema import UNKNOWN_HASH
from g2l_core.types import Features


@dataclass(frozen=True, kw_only=True)
class TaskRows:
    """The rows of a task; every array has one entry a row.

    Texts are objects, of which equal ones are one: 8 bytes a row. Clusters that are single images are numbers.
    """

    slides: tuple[StoredSlide, ...]
    slide_index: Int64[np.ndarray, " row"]
    row: Int64[np.ndarray, " row"]
    """Stored row in its slide."""
    label: Shaped[np.ndarray, " row"]
    center: Shaped[np.ndarray, " row"]
    cluster: Shaped[np.ndarray, " row"]
    """What intervals leave out together and no split separates: the patient if known."""
    cluster_unit: str
    """What a cluster is, in the plural, for people."""
    part: Shaped[np.ndarray, " row"]
    """train, test, or empty where the split says neither or where there are folds."""
    pixel_hash: UInt64[np.ndarray, " row"]
    columns: Mapping[str, Shaped[np.ndarray, " row"]]
    """Further columns that the task's metric groups read, as text; empty where a patch has no value."""
    duplicates_dropped: int = 0
    crossing_duplicates: int = 0
    """How many of these are training patches whose copy is in the test part."""
    unlabeled: int = 0
    """Patches left out because they have no label."""
    outside_split: int = 0
    """Patches left out because the split says neither train nor test."""
    ungrouped: int = 0
    """Patches without a group, which count by slide or by image."""
    written: frozenset[str] = frozenset()
    """All labels as they are written, before `classes` of the task merged them."""
    notes: tuple[str, ...] = ()
    """What the join has left out, or read otherwise than it is written."""

    def __len__(self) -> int:
        return len(self.row)

    def tested(self, spec: TaskSpec) -> Bool[np.ndarray, " row"]:
        """Rows that nothing is trained on: the test part, or all where there is no fixed split."""
        return self.part == "test" if spec.has_fixed_split else np.ones(len(self), bool)

    @property
    def slide_ids(self) -> Shaped[np.ndarray, " row"]:
        """The slide of each row."""
        return np.array([slide.slide_id for slide in self.slides], dtype=object)[self.slide_index]

    def take(self, keep: Bool[np.ndarray, " row"] | Int64[np.ndarray, " kept"]) -> "TaskRows":
        """Some of the rows."""
        fields = ("slide_index", "row", "label", "center", "cluster", "part", "pixel_hash")
        columns = {name: values[keep] for name, values in self.columns.items()}
        return replace(self, columns=columns, **{field: getattr(self, field)[keep] for field in fields})

    def features(self, encoder: str) -> Features:
        """The canonical view's features of each row, float16.

        Raises:
            StoreMissingError: A slide has none of this encoder.
            TaskError: A row holds NaN or infinity.
        """
        parts: list[np.ndarray] = []
        order: list[np.ndarray] = []
        for index in np.unique(self.slide_index).tolist():
            of_slide = np.flatnonzero(self.slide_index == index)
            parts.append(canonical_features(self.slides[index], encoder)[self.row[of_slide]])
            order.append(of_slide)
        out = np.empty((len(self), parts[0].shape[1]), np.float16)
        out[np.concatenate(order)] = np.concatenate(parts)
        bad = np.flatnonzero(~np.isfinite(out).all(axis=1))
        if len(bad):
            slide = self.slides[self.slide_index[bad[0]]].slide_id
            raise TaskError(
                f"the features of {encoder} hold NaN or infinity in {len(bad):,} of {len(self):,} rows, first in row "
                f"{self.row[bad[0]]} of slide {slide}; g2l store verify finds all, g2l embed makes them anew"
            )
        return out


def stored_encoders(stores: Sequence[FeatureStore]) -> dict[str, EncoderFacts]:
    """What stores say of their encoders, by key; of stores that share a key, the first one's word."""
    return {key: facts for store in reversed(stores) for key, facts in store.encoders.items()}


def gather(stores: Sequence[FeatureStore], spec: TaskSpec, folder: Path, damages: Damages | None = None) -> TaskRows:
    """Join the stores' good patches with a task's labels, drop duplicates, and check the split.

    Args:
        stores: Cohorts, put one behind the other.
        spec: The task.
        folder: What `spec.labels` is relative to.
        damages: Slides that are left out; those whose tables are damaged are added. None lets these raise.

    Raises:
        StoreCorruptError: A table is damaged, and `damages` is None.
        TaskError: No rows are left, a column is absent, or a row fits both `train` and `test`.
        LeakError: Training and test part share a patient.
        ManifestError: The label file is not usable, contradicts itself, or names slides that no store has.
    """
    table = LabelTable(folder / spec.labels, stores, spec) if spec.labels else None
    joined = Joined(spec=spec, table=table)
    parts = _parts(stores, joined, damages)
    joined.require_columns(stores)
    if not parts:
        raise TaskError(f"task {spec.name}: no slide fits {' and '.join(spec.where) or 'at all'}")
    arrays: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    grouped = arrays.pop("grouped")
    columns = {name.removeprefix(_EXTRA): arrays.pop(name) for name in list(arrays) if name.startswith(_EXTRA)}
    if not grouped.any() and not any(slide.facts.kind == "slide" for slide in joined.slides):
        arrays["cluster"] = _ranks(arrays["cluster"])
    unit = _cluster_unit(joined.slides, spec, bool(grouped.all()))
    rows = TaskRows(slides=tuple(joined.slides), cluster_unit=unit, columns=columns, **arrays)
    kept = np.ones(len(rows), bool)
    if spec.has_fixed_split:
        kept &= rows.part != ""
    rows, grouped = replace(rows.take(kept), outside_split=int((~kept).sum())), grouped[kept]
    if spec.label:
        kept = rows.label != ""
        rows, grouped = replace(rows.take(kept), unlabeled=int((~kept).sum())), grouped[kept]
    if not len(rows):
        raise TaskError(f"task {spec.name}: no patch has a label {spec.label!r} and a place in the split")
    rows = without_duplicates(
        replace(rows, ungrouped=int((~grouped).sum()), notes=joined.notes(stores), written=frozenset(joined.written))
    )
    if not len(rows):
        raise TaskError(f"task {spec.name}: all patches are copies of one another with different {spec.label}")
    refuse_leaks(rows, spec)
    return rows


def _parts(stores: Sequence[FeatureStore], joined: Joined, damages: Damages | None) -> list[dict[str, np.ndarray]]:
    """Every slide's part of the arrays of TaskRows, of those that take part and can be read.

    Raises:
        TaskError: All that would take part are damaged.
    """
    parts = list[dict[str, np.ndarray]]()
    for slide in (slide for store in stores for slide in store.slides() if slide.folder not in (damages or {})):
        try:
            part = joined.add(slide)
        except StoreCorruptError as error:
            if damages is None:
                raise
            damages[slide.folder] = str(error)
            continue
        parts += [part] if part is not None else []
    if not parts and damages:
        raise TaskError(f"task {joined.spec.name}: every slide that takes part is damaged")
    return parts


def _cluster_unit(slides: Sequence[StoredSlide], spec: TaskSpec, grouped: bool) -> str:
    if grouped:
        return "patients" if spec.group == "patient_id" else f"groups of {spec.group}"
    return "slides" if all(slide.facts.kind == "slide" for slide in slides) else "images"


def _ranks(names: Shaped[np.ndarray, " row"]) -> Int64[np.ndarray, " row"]:
    """The place of each of many names in their order, which takes less room than the names."""
    ranks = np.empty(len(names), np.int64)
    ranks[np.argsort(names, kind="stable")] = np.arange(len(names))
    return ranks


def without_duplicates(rows: TaskRows) -> TaskRows:
    """Leave out copies of a patch (equal pixel hashes).

    If the labels of the copies disagree, all copies go, as nobody knows which label is right. Otherwise one stays:
    one of the test part if there is one, so that nothing of the test part is trained on.
    """
    order = np.lexsort((rows.part != "test", rows.pixel_hash))
    hashes, labels = rows.pixel_hash[order], _codes(rows.label)[order]
    starts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]]))
    agree = np.minimum.reduceat(labels, starts) == np.maximum.reduceat(labels, starts)
    keep = np.zeros(len(rows), bool)
    keep[order[starts[agree]]] = True
    keep[rows.pixel_hash == UNKNOWN_HASH] = True
    in_test = rows.pixel_hash[(rows.part == "test") & (rows.pixel_hash != UNKNOWN_HASH)]
    crossing = np.isin(rows.pixel_hash[~keep & (rows.part == "train")], in_test)
    return replace(rows.take(keep), duplicates_dropped=int((~keep).sum()), crossing_duplicates=int(crossing.sum()))


def _codes(values: Shaped[np.ndarray, " row"]) -> Int64[np.ndarray, " row"]:
    """A number for each value, the same for equal ones."""
    texts = values.tolist()
    codes = {text: code for code, text in enumerate(dict.fromkeys(texts))}
    return np.fromiter(map(codes.__getitem__, texts), np.int64, len(texts))


def refuse_leaks(rows: TaskRows, spec: TaskSpec) -> None:
    """Refuse a split that puts one patient on both sides.

    Raises:
        LeakError: Names the patient.
        TaskError: A part is empty.
    """
    if not spec.has_fixed_split:
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


def parts(rows: TaskRows, spec: TaskSpec, seed: int) -> list[tuple[Int64[np.ndarray, "_"], Int64[np.ndarray, "_"]]]:
    """(Training rows, test rows): the one fixed split, or the folds by cluster.

    Raises:
        TaskError: As `split_parts`.
    """
    return split_parts(rows.label, rows.cluster, rows.part, spec, rows.cluster_unit, seed)


def split_parts(
    strata: Shaped[np.ndarray, " item"],
    clusters: Shaped[np.ndarray, " item"],
    part: Shaped[np.ndarray, " item"],
    spec: TaskSpec,
    unit: str,
    seed: int,
) -> list[tuple[Int64[np.ndarray, "_"], Int64[np.ndarray, "_"]]]:
    """Parts patches, slides or patients: by the fixed split, or into folds that hold the strata about equally.

    Args:
        strata: The class of each.
        clusters: The patient of each; none is on both sides.
        part: train or test of each; not read where there are folds.
        spec: The task.
        unit: What a cluster is, in the plural, for the message.
        seed: Deals the clusters into folds.

    Raises:
        TaskError: A class has fewer clusters than there are folds.
    """
    if not spec.folds:
        return [(np.flatnonzero(part == "train"), np.flatnonzero(part == "test"))]

    def describe(name: object, members: int) -> str:
        held = f"{members} {unit}" if members > 1 else f"one of the {unit} alone"
        return f"task {spec.name}: class {name} is in {held}"

    return group_folds(strata, clusters, spec.folds, seed=seed, describe=describe)


@dataclass(frozen=True, kw_only=True)
class Bags:
    """Slides or patients, which share a label; in the order of their sorted names."""

    of_row: Shaped[np.ndarray, " row"]
    """The bag of each patch."""
    names: Shaped[np.ndarray, " bag"]
    label: Shaped[np.ndarray, " bag"]
    cluster: Shaped[np.ndarray, " bag"]
    part: Shaped[np.ndarray, " bag"]

    def __len__(self) -> int:
        return len(self.names)

    def rows(self, chosen: Int64[np.ndarray, " chosen"]) -> Int64[np.ndarray, " row"]:
        """The patches of some bags."""
        return np.flatnonzero(np.isin(self.of_row, self.names[chosen]))


def bags(rows: TaskRows, spec: TaskSpec) -> Bags:
    """The bags of a task.

    Raises:
        TaskError: The patches of a bag differ in label, patient or part.
    """
    of_row = rows.slide_ids if spec.bag == "slide" else rows.cluster
    return Bags(
        of_row=of_row,
        names=np.unique(of_row),
        label=bag_values(rows.label, of_row, spec.label),
        cluster=bag_values(rows.cluster, of_row, spec.group),
        part=bag_values(rows.part, of_row, "part of the split"),
    )

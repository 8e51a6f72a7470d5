"""Join stored slides with the columns that a task reads, slide by slide, and keep account of what is left out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from sys import intern

import numpy as np
from jaxtyping import Int64, Shaped

from g2l_core.benchmark.columns import SlideColumns, mapped, spelled
from g2l_core.benchmark.labels import NAMED, LabelTable, slides_by_class
from g2l_core.benchmark.spec import TaskSpec
from g2l_core.errors import TaskError
from g2l_core.store.features import FeatureStore, StoredSlide
from g2l_core.store.schema import STATUS

EXTRA = "extra: "
"""Begins the names of further columns among the arrays of a slide."""

_PARTS = ("train", "test")


@dataclass
class Joined:
    """What has been joined so far."""

    spec: TaskSpec
    table: LabelTable | None
    slides: list[StoredSlide] = field(default_factory=list)
    """The slides that take part."""
    columns: set[str] = field(default_factory=set)
    """Every column that some slide has."""
    lost: Counter[str] = field(default_factory=Counter)
    """Patches without features, by the name of their reason code."""
    written: set[str] = field(default_factory=set)
    """Labels as they are written, where the task merges classes."""
    noted: dict[str, list[str]] = field(default_factory=dict)
    """Slides by what stage one noted about them."""
    doubly_scaled: list[str] = field(default_factory=list)
    """Slides whose header gives another scale than the manifest's, which is used."""

    def add(self, slide: StoredSlide) -> dict[str, np.ndarray] | None:
        """One slide's part of the arrays of `TaskRows`; None if it does not fit the task.

        Patches that cannot be read, or show an artifact, are left out.

        Raises:
            TaskError: A patch fits both `train` and `test`.
            ManifestError: The label file contradicts itself.
        """
        values, spec = SlideColumns(slide, *([self.table] if self.table else [])), self.spec
        self.columns |= values.names
        chosen = np.arange(len(slide))
        for condition in spec.where:
            chosen = chosen[values.fitting(condition, chosen)]
        if not len(chosen):
            return None
        status, pixel_hash = slide.patch_status[chosen], slide.pixel_hash
        good = chosen[status == STATUS["ok"]]
        self.lost.update({name: int((status == code).sum()) for name, code in STATUS.items() if name != "ok"})
        if "(" in slide.facts.mpp_source:
            self.doubly_scaled.append(slide.slide_id)
        for text in slide.facts.notes:
            self.noted.setdefault(text, []).append(slide.slide_id)
        self.slides.append(slide)
        cluster = values.column(spec.group, good)
        grouped = cluster != ""
        if not grouped.all():
            cluster = np.where(grouped, cluster, _own_clusters(slide, good))
        label = values.column(spec.label, good) if spec.label else np.full(len(good), "", dtype=object)
        if spec.classes:
            self.written |= set(label.tolist())
            label = mapped(label, spec.class_of)
        further = [name for names in spec.extra_columns.values() for name in names]
        return {
            "slide_index": np.full(len(good), len(self.slides) - 1),
            "row": good,
            "label": label,
            "center": values.column(spec.center, good),
            "cluster": cluster,
            "grouped": grouped,
            "part": self._part(values, good),
            "pixel_hash": pixel_hash[good, 0],
            **{EXTRA + name: _extra(name, values.column(name, good), slide, good) for name in further},
        }

    def _part(self, values: SlideColumns, good: Int64[np.ndarray, " row"]) -> Shaped[np.ndarray, " row"]:
        spec = self.spec
        if spec.split:
            return mapped(values.column(spec.split, good), lambda text: text.lower() if text.lower() in _PARTS else "")
        part = np.full(len(good), "", dtype=object)
        if spec.train:
            in_train, in_test = values.fitting(spec.train, good), values.fitting(spec.test, good)
            if (in_train & in_test).any():
                raise TaskError(
                    f"task {spec.name}: slide {values.slide.slide_id} fits both train = {spec.train!r} and "
                    f"test = {spec.test!r}; conditions must exclude each other"
                )
            part[in_train], part[in_test] = _PARTS
        return part

    def require_columns(self, stores: Sequence[FeatureStore]) -> None:
        """Refuse a column of the label, of the split or of a condition that neither label file nor manifest has.

        Raises:
            TaskError: Names the columns that there are.
        """
        spec = self.spec
        needed = [text.partition("=")[0] for text in spec.conditions] + [spec.split, spec.label]
        absent = [name for name in needed if name and spelled(name, self.columns) not in self.columns]
        if absent and self.columns:
            where = f"neither {spec.labels} nor the manifest" if spec.labels else "the manifest does not"
            known = ", ".join(sorted(self.columns))
            raise TaskError(f"task {spec.name}: {where} has a column {absent[0]!r}; there is {known}")

    def notes(self, stores: Sequence[FeatureStore]) -> tuple[str, ...]:
        """What has been left out, or read otherwise than it is written, one sentence each."""
        notes = list(self.table.notes) if self.table else []
        notes += [self._describe_lost(reason, by_class) for reason, by_class in self._lost_slides(stores)]
        if total := self.lost.total():
            named = ", ".join(f"{count:,} {name}" for name, count in self.lost.items() if count)
            notes.append(f"{total:,} patches have no features and were left out: {named}")
        if self.doubly_scaled:
            notes.append(f"the um/px of {_some(self.doubly_scaled)} is the manifest's, and the header gives another")
        notes += [f"{text}: {_some(slide_ids)}" for text, slide_ids in self.noted.items()]
        return tuple(notes)

    def _lost_slides(self, stores: Sequence[FeatureStore]) -> list[tuple[str, Mapping[str, list[str]]]]:
        """Slides without patches: why, and the ids of each class, which is empty where it is not known."""
        if self.table:
            return self.table.lost(stores)
        taken = {slide.slide_id for store in stores for slide in store.slides()}
        failed = {i: labels for store in stores for i, labels in store.failed_labels().items() if i not in taken}
        damaged = sorted({i for store in stores for i in store.damaged} - taken)
        by_class = slides_by_class(((i, labels) for i, labels in failed.items() if labels), self.spec)
        unknown = [slide_id for slide_id, labels in failed.items() if not labels]
        lost = [("failed in stage one", {**by_class, **({"": unknown} if unknown else {})})] if failed else []
        return [*lost, *([("damaged in the store", {"": damaged})] if damaged else [])]

    def _describe_lost(self, reason: str, by_class: Mapping[str, list[str]]) -> str:
        ids = sorted({slide_id for of_class in by_class.values() for slide_id in of_class})
        counts = ", ".join(f"{len(of_class):,} of {label or 'unknown class'}" for label, of_class in by_class.items())
        return f"left out, {reason}: {_some(ids)}{f', {counts}' if self.spec.label else ''}"


def _some(slide_ids: Sequence[str]) -> str:
    """A number of slides with some of their names."""
    named = ", ".join(slide_ids[:NAMED])
    more = f" and {len(slide_ids) - NAMED:,} more" if len(slide_ids) > NAMED else ""
    return f"{len(slide_ids):,} slide{'s' * (len(slide_ids) > 1)} ({named}{more})"


def _own_clusters(slide: StoredSlide, good: Int64[np.ndarray, " row"]) -> Shaped[np.ndarray, " row"]:
    """A cluster for each patch whose group is not known: its slide, or itself if it is a patch image."""
    if slide.facts.kind == "slide":
        return np.full(len(good), intern(slide.slide_id), dtype=object)
    return np.array([f"{slide.slide_id}#{row}" for row in good.tolist()], dtype=object)


def _extra(
    name: str, values: Shaped[np.ndarray, " row"], slide: StoredSlide, good: Int64[np.ndarray, " row"]
) -> Shaped[np.ndarray, " row"]:
    """A column, or what the store itself knows of a patch where there is no column of that name."""
    if values.any():
        return values
    if name == "patch_id" and slide.patch_ids:
        return np.array(list(map(intern, slide.patch_ids)), dtype=object)[good]
    if name == "corner":
        return np.array([intern(f"{x},{y}") for x, y in slide.coords[good].tolist()], dtype=object)
    return values

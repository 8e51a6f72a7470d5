"""What a reader of a task's results must know of its rows: copies, missing labels, slides used in distillation."""

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from g2l_core.benchmark.rows import TaskRows, stored_encoders
from g2l_core.benchmark.spec import TaskSpec
from g2l_core.benchmark.widths import stored_key
from g2l_core.encoders.resolve import RUN_RECORD
from g2l_core.files import parse_json
from g2l_core.store.facts import EncoderFacts
from g2l_core.store.features import FeatureStore

_NAMED = 3


def notes_on(rows: TaskRows, spec: TaskSpec, stores: Sequence[FeatureStore], encoders: Sequence[str]) -> list[str]:
    """Notes on a task, of one sentence each; empty where there is nothing to note.

    Args:
        rows: The rows of the task.
        spec: The task.
        stores: They know which encoder came from which run of `g2l distill`.
        encoders: Keys of the encoders.
    """
    notes = list(rows.notes)
    labeled = len(rows) + rows.duplicates_dropped
    if rows.outside_split:
        total = labeled + rows.unlabeled + rows.outside_split
        asked = f"{spec.split} train or test" if spec.split else f"{spec.train} or {spec.test}"
        notes.append(f"{rows.outside_split:,} of {total:,} patches do not have {asked} and were left out")
    if rows.unlabeled:
        total = labeled + rows.unlabeled
        notes.append(f"{rows.unlabeled:,} of {total:,} patches have no {spec.label} and were left out")
    if rows.duplicates_dropped:
        across = f", {rows.crossing_duplicates:,} of them training copies of test patches"
        notes.append(
            f"{rows.duplicates_dropped:,} copies of patches were left out{across if rows.crossing_duplicates else ''}"
        )
    if 0 < rows.ungrouped < labeled:
        notes.append(
            f"{rows.ungrouped:,} of {labeled:,} patches have no {spec.group}; each of their slides or images counts as "
            "one of its own"
        )
    notes += _without_survival(rows, spec)
    notes += _alike_names(rows, spec)
    notes += _rare_classes(rows, spec)
    tested = set(rows.slide_ids[rows.tested(spec)].tolist())
    known = stored_encoders(stores)
    of_each = dict.fromkeys(key for encoder in encoders if (key := stored_key(encoder, known)) in known)
    notes += [note for key in of_each for note in _distilled(key, known[key], tested)]
    notes += [f"{key}: {note}" for key in of_each for note in known[key].weights_notes]
    return [f"task {spec.name}: {note}" for note in notes]


def _without_survival(rows: TaskRows, spec: TaskSpec) -> list[str]:
    """A note on patches whose patient has no time or event."""
    if "survival" not in spec.metrics:
        return []
    columns = [spec.survival.time, spec.survival.event]
    missing = (rows.columns[columns[0]] == "") | (rows.columns[columns[1]] == "")
    lost = set(rows.cluster[missing].tolist()) - set(rows.cluster[~missing].tolist())
    if not missing.any():
        return []
    return [
        f"{missing.sum():,} of {len(rows):,} patches, with {len(lost):,} {rows.cluster_unit}, have no "
        f"{' or no '.join(columns)} and were left out of survival"
    ]


def _alike_names(rows: TaskRows, spec: TaskSpec) -> list[str]:
    """Notes on classes, centers and patients whose names differ in case, number form, spaces or hyphens alone."""
    of_classes = [] if not spec.label or "regression" in spec.metrics else alike(set(rows.label.tolist()))
    notes = [
        f"classes {' and '.join(map(repr, names))} differ in case or form alone; if they are one, write "
        f"classes = {{{', '.join(f'{_key(name)} = {_key(names[0])}' for name in names[1:])}}} in the task"
        for names in of_classes
    ]
    absent = sorted(set(spec.classes) - rows.written)
    if absent:
        notes.append(f"classes merges {', '.join(map(repr, absent))}, which no patch has")
    for column, values in ((spec.center, set(rows.center.tolist())), (spec.group, _named_clusters(rows))):
        found = alike(values)
        if found:
            more = f", as do {len(found) - 1} more" if len(found) > 1 else ""
            notes.append(
                f"{column} {' and '.join(map(repr, found[0]))} differ in case or form alone{more}, and count apart; "
                "write them alike if they are one"
            )
    return notes


def _named_clusters(rows: TaskRows) -> set[str]:
    """The names of clusters that a table gave, not those of slides or images."""
    own = {slide.slide_id for slide in rows.slides}
    names = set(rows.cluster.tolist()) if rows.cluster.dtype == object else set()
    return {name for name in names if name not in own and name.partition("#")[0] not in own}


def _key(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def alike(names: Iterable[str]) -> list[list[str]]:
    """Names that differ in case, in number form, or in spaces, hyphens and underscores alone, together.

    Example:
        >>> alike(["Low", "low", "1", "1.0", "high"])
        [['1', '1.0'], ['Low', 'low']]
    """
    groups: dict[object, list[str]] = defaultdict(list)
    for name in sorted(names):
        groups[_form(name)].append(name)
    return [group for group in groups.values() if len(group) > 1]


def _form(name: str) -> object:
    try:
        return float(name.replace(",", "."))
    except ValueError:
        return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name)).strip().casefold()


def _rare_classes(rows: TaskRows, spec: TaskSpec) -> list[str]:
    """Notes on classes with fewer training patches than kNN has votes."""
    if "knn" not in spec.metrics:
        return []
    k = max(spec.knn.k)
    trained = rows.label[rows.part == "train"] if spec.has_fixed_split else rows.label
    counts = zip(*np.unique(trained, return_counts=True), strict=True)
    return [
        f"training patches of class {name} number {n:,}, fewer than the k = {k} that vote"
        for name, n in counts
        if n < k
    ]


def _distilled(key: str, facts: EncoderFacts, tested: set[str]) -> list[str]:
    """A note if an encoder was distilled on slides that it is tested on, or if nobody can know."""
    source, _, student = facts.weights.partition(":")
    if source != "run":
        return []
    path = Path(student).parent / RUN_RECORD
    try:
        trained = set(parse_json(path.read_text(encoding="utf-8"))["rows"]["train"])
    except (OSError, ValueError, KeyError, TypeError):
        return [f"{path} cannot be read to tell whether {key} was distilled on slides that it is tested on"]
    shared = sorted(tested & trained)
    if not shared:
        return []
    named = ", ".join(shared[:_NAMED]) + (f" and {len(shared) - _NAMED} more" if len(shared) > _NAMED else "")
    return [f"{len(shared)} of {len(tested)} test slides were used to distill {key}: {named}"]

"""What a reader of a task's results must know of its rows: copies, missing labels, slides used in distillation."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from g2l_core.benchmark.rows import TaskRows, stored_encoders
from g2l_core.benchmark.spec import TaskSpec
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
    notes = []
    if rows.unlabeled:
        total = len(rows) + rows.duplicates_dropped + rows.unlabeled
        notes.append(f"{rows.unlabeled:,} of {total:,} patches have no {spec.label} and were left out")
    if rows.duplicates_dropped:
        across = f", {rows.crossing_duplicates:,} of them training copies of test patches"
        notes.append(
            f"{rows.duplicates_dropped:,} copies of patches were left out{across if rows.crossing_duplicates else ''}"
        )
    notes += _rare_classes(rows, spec)
    tested = set(rows.slide_ids[rows.tested(spec)].tolist())
    known = stored_encoders(stores)
    notes += [note for key in encoders if key in known for note in _distilled(key, known[key], tested)]
    notes += [f"{key}: {note}" for key in encoders if key in known for note in known[key].weights_notes]
    return [f"task {spec.name}: {note}" for note in notes]


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

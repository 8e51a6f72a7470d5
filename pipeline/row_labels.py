"""A column of labels as numbers of the training patches' rows, which a batch has beside features or in their place."""

from collections.abc import Mapping, Sequence

import numpy as np

from g2l_core.distillation.replay import ChosenRows, Given, good_rows
from g2l_core.errors import UsageError
from g2l_core.store.features import FeatureStore

MOST_CLASSES = 2048
"""Whole numbers up to this are exact in float16, which batches have for targets."""

Texts = Mapping[str, Mapping[int, str]]
"""The label of each row that has one, by slide id and row."""


def labels_of_rows(store: FeatureStore, chosen: ChosenRows, column: str) -> Texts:
    """A column of the labels of some rows: the patch's own where it has one, else the slide's."""
    texts: dict[str, dict[int, str]] = {}
    for slide_id, rows in chosen.items():
        slide = store.slide(slide_id)
        own, of_slide = slide.patch_labels, slide.labels.get(column, "")
        trained = good_rows(slide) if rows is None else np.sort(rows)
        found = {row: own[row].get(column) or of_slide for row in trained.tolist()}
        texts[slide_id] = {row: text for row, text in found.items() if text}
    return texts


def require_classes(store: FeatureStore, texts: Texts, option: str, what: str = "classes") -> list[str]:
    """The different labels of some rows, sorted.

    Raises:
        UsageError: There are fewer than two, or too many.
    """
    classes = sorted({text for of_rows in texts.values() for text in of_rows.values()})
    if not 2 <= len(classes) <= MOST_CLASSES:
        slides = [store.slide(slide_id) for slide_id in texts]
        of_patches = {name for slide in slides if slide.has_patch_labels for row in slide.patch_labels for name in row}
        known = sorted(of_patches.union(*(slide.labels for slide in slides)))
        raise UsageError(
            f"{option}: expected 2 to {MOST_CLASSES} {what} among the training patches, got {len(classes)}. "
            f"Columns of slides and patches are {', '.join(known) or 'none'}; g2l store label adds some"
        )
    return classes


def as_targets(store: FeatureStore, texts: Texts, classes: Sequence[str]) -> Given:
    """The place of each label among some classes, a column of all stored rows; NaN where a row has none."""
    number = {name: i for i, name in enumerate(classes)}
    given = {}
    for slide_id, labeled in texts.items():
        given[slide_id] = np.full((len(store.slide(slide_id)), 1), np.nan, np.float16)
        given[slide_id][list(labeled), 0] = [number[text] for text in labeled.values()]
    return given


def centers_of(store: FeatureStore, chosen: ChosenRows, column: str) -> Given:
    """The center of each training row as a number; NaN where it has none.

    Raises:
        UsageError: There are fewer than two centers.
    """
    texts = labels_of_rows(store, chosen, column)
    return as_targets(store, texts, require_classes(store, texts, f"--center-label {column}", "centers"))

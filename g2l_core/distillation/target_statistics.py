"""Mean, deviation and a bank of a teacher's features over the training patches of a store."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float16

from g2l_core.distillation.objective import BANK_ROWS, TargetStatistics
from g2l_core.distillation.replay import ChosenRows, good_rows
from g2l_core.rng import keyed_generator
from g2l_core.store.features import FeatureStore

SAMPLE_ROWS = 1_000_000
"""More rows than this move a standard deviation by less than 0.1 %."""

SAMPLE_SLIDES = 1_000
"""Slides that the sample is of, at random where there are more."""


def target_statistics(store: FeatureStore, rows: ChosenRows, encoder: str, views: range) -> TargetStatistics:
    """Compute the statistics of the replayed views' features.

    Rows lie in a slide's store in the random order of its cells, so the first ones are a sample of the whole slide:
    each slide gives its first rows, at most a million in all, in every replayed view. The bank is spread in the same
    way, over the first of these views.

    Args:
        store: The store, with the teacher's features.
        rows: Training rows by slide id.
        encoder: The teacher's key.
        views: The replayed views.
    """
    count, total, squares = 0, np.float64(0), np.float64(0)
    for features in _first_rows(store, rows, encoder, views, SAMPLE_ROWS):
        values = features.astype(np.float64)
        count, total, squares = count + len(values), total + values.sum(0), squares + np.square(values).sum(0)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - np.square(mean), 0))
    bank = np.concatenate(list(_first_rows(store, rows, encoder, views[:1], BANK_ROWS)))
    return TargetStatistics(
        mean=torch.from_numpy(np.asarray(mean, np.float32)),
        deviation=torch.from_numpy(np.maximum(deviation, 1e-3 * deviation.max()).astype(np.float32)),
        bank=torch.from_numpy(bank.astype(np.float32)),
    )


def _first_rows(
    store: FeatureStore, rows: ChosenRows, encoder: str, views: range, max_rows: int
) -> Iterator[Float16[np.ndarray, "row dim"]]:
    """Yield the features of every slide's first chosen rows, view by view, at most `max_rows` rows in all."""
    chosen_slides = sorted(rows)
    if len(chosen_slides) > SAMPLE_SLIDES:
        order = keyed_generator("target statistics").permutation(len(chosen_slides))[:SAMPLE_SLIDES]
        chosen_slides = [chosen_slides[i] for i in np.sort(order)]
    per_slide = max(1, max_rows // (len(chosen_slides) * len(views)))
    for slide_id in chosen_slides:
        slide, chosen = store.slide(slide_id), rows[slide_id]
        first = (good_rows(slide) if chosen is None else np.sort(chosen))[:per_slide]
        if not len(first):
            continue
        for view in views:
            yield slide.read_rows(encoder, 0, int(first[-1]) + 1, view=view)[first]

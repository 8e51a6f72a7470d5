"""Mean, deviation, PHI-S and a bank of a teacher's features over the training patches of a store.

They are taken once. A run keeps them in `FILE`, so that it goes on with the same ones, and so that the projectors,
which map to standardized features, can be used later.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float16
from safetensors import SafetensorError, safe_open

from g2l_core.distillation.objective import BANK_ROWS, TargetStatistics
from g2l_core.distillation.phi_s import phi_s_matrix
from g2l_core.distillation.replay import ChosenRows, good_rows
from g2l_core.encoders.weights import state_digest
from g2l_core.errors import RunError, refuse_open_files
from g2l_core.files import write_with
from g2l_core.rng import keyed_generator
from g2l_core.store.features import FeatureStore

FILE = "standardization.safetensors"
_DIGEST = "sha256"

SAMPLE_ROWS = 1_000_000
"""More rows than this move a standard deviation by less than 0.1 %."""

SAMPLE_SLIDES = 1_000
"""Slides that the sample is of, at random where there are more."""


def target_statistics(
    store: FeatureStore, rows: ChosenRows, encoder: str, views: range, *, with_phi_s: bool = False
) -> TargetStatistics:
    """Compute the statistics of the replayed views' features.

    Rows lie in a slide's store in the random order of its cells, so the first ones are a sample of the whole slide:
    each slide gives its first rows, at most a million in all, in every replayed view. The bank is spread in the same
    way, over the first of these views.

    Args:
        store: The store, with the teacher's features.
        rows: Training rows by slide id.
        encoder: The teacher's key.
        views: The replayed views.
        with_phi_s: Whether the matrix of PHI-S is wanted, for which the covariance is summed.

    Raises:
        UsageError: PHI-S is wanted of features that do not vary.
    """
    count, total, squares = 0, np.float64(0), np.float64(0)
    products: np.ndarray | np.float64 = np.float64(0)
    for features in first_rows(store, rows, encoder, views, SAMPLE_ROWS):
        values = features.astype(np.float64)
        count, total, squares = count + len(values), total + values.sum(0), squares + np.square(values).sum(0)
        products = products + values.T @ values if with_phi_s else products
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - np.square(mean), 0))
    bank = np.concatenate(list(first_rows(store, rows, encoder, views[:1], BANK_ROWS)))
    return TargetStatistics(
        mean=torch.from_numpy(np.asarray(mean, np.float32)),
        deviation=torch.from_numpy(np.maximum(deviation, 1e-3 * deviation.max()).astype(np.float32)),
        phi_s=torch.from_numpy(phi_s_matrix(products / count - np.outer(mean, mean)).astype(np.float32))
        if with_phi_s
        else None,
        bank=torch.from_numpy(bank.astype(np.float32)),
    )


def write_statistics(folder: Path, statistics: Mapping[str, TargetStatistics]) -> None:
    """Write each teacher's statistics into a run folder, whole or not at all."""
    from safetensors.torch import save_file

    tensors = {
        f"{teacher}/{name}": tensor.contiguous()
        for teacher, found in statistics.items()
        for name in _parts()
        if (tensor := getattr(found, name)) is not None
    }
    metadata = {"format": "pt", _DIGEST: state_digest(tensors)}
    write_with(folder / FILE, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def read_statistics(folder: Path) -> dict[str, TargetStatistics]:
    """The statistics of a run, by teacher; none where it has no file of them.

    Raises:
        RunError: The file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return {}
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            is_whole = (file.metadata() or {}).get(_DIGEST) == state_digest(tensors)
    except (OSError, SafetensorError, ValueError) as error:
        refuse_open_files(error, path, RunError)
        raise RunError(f"{path} cannot be read ({error}): restore it from a copy, or begin again") from error
    if not is_whole:
        raise RunError(
            f"{path} is not what g2l distill wrote: restore it from a copy, or begin again with another --out"
        )
    teachers = dict.fromkeys(name.rpartition("/")[0] for name in tensors)
    return {
        teacher: TargetStatistics(**{n: tensors[f"{teacher}/{n}"] for n in _parts() if f"{teacher}/{n}" in tensors})
        for teacher in teachers
    }


def _parts() -> list[str]:
    return [field.name for field in fields(TargetStatistics)]


def first_rows(
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

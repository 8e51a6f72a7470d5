"""Folds that share no patient."""

import numpy as np
from jaxtyping import Int64, Shaped
from sklearn.model_selection import StratifiedGroupKFold

from g2l_core.errors import TaskError
from g2l_core.metrics.statistics import require_aligned


def stratified_group_folds(
    labels: Shaped[np.ndarray, " row"], groups: Shaped[np.ndarray, " group_row"], folds: int, *, seed: int
) -> list[tuple[Int64[np.ndarray, " fit"], Int64[np.ndarray, " held"]]]:
    """Deals groups into folds that hold the classes about equally, every class on the fitting side.

    Args:
        labels: The class of each row.
        groups: The patient or slide of each row; none is on both sides of a fold.
        folds: At least 2.
        seed: Of the deal.

    Returns:
        For each fold the rows to fit on and the rows held out.

    Raises:
        TaskError: If the lengths differ, there is one class only, a class has fewer groups than there are
            folds, or one would be missing from a fitting side.
    """
    require_aligned(labels=len(labels), groups=len(groups))
    classes = np.unique(labels)
    if len(classes) < 2 or folds < 2:
        raise TaskError(f"folds need two classes and two folds at least; got {classes.tolist()} and {folds} folds")
    for name in classes:
        members = len(np.unique(groups[labels == name]))
        if members < folds:
            raise TaskError(f"class {name} has {members} groups, fewer than the {folds} folds; use fewer")
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    parts = list(splitter.split(np.empty((len(labels), 0)), labels, groups))
    if any(len(np.unique(labels[fit])) < len(classes) for fit, _ in parts):
        raise TaskError(f"a class is missing from the fitting side of one of {folds} folds; use fewer")
    return parts

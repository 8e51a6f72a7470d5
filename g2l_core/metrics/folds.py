"""Folds for cross-validation that share no patient."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int64, Shaped
from sklearn.model_selection import StratifiedGroupKFold

from g2l_core.errors import TaskError
from g2l_core.metrics.statistics import require_aligned


def _describe_class(name: object, members: int) -> str:
    return f"class {name} has {members} groups"


def group_folds(
    labels: Shaped[np.ndarray, " row"],
    groups: Shaped[np.ndarray, " group_row"],
    folds: int,
    *,
    seed: int,
    describe: Callable[[object, int], str] = _describe_class,
) -> list[tuple[Int64[np.ndarray, " fit"], Int64[np.ndarray, " held"]]]:
    """Deal groups into folds that hold the classes about equally.

    Args:
        labels: (row,) class of each row; all may be the same.
        groups: (row,) patient or slide of each row. None is on both sides of a fold.
        folds: Number of folds.
        seed: Random seed.
        describe: Says in an error in how many groups a class is.

    Returns:
        For each fold the rows to fit on and the rows held out.

    Raises:
        TaskError: If the lengths differ, or a class has fewer groups than there are folds.

    Examples:
        >>> patients = np.array(["p1", "p1", "p2", "p3"])
        >>> parts = group_folds(np.array([0, 0, 0, 0]), patients, 3, seed=0)
        >>> sorted(held.tolist() for _, held in parts)
        [[0, 1], [2], [3]]
    """
    require_aligned(labels=len(labels), groups=len(groups))
    for name in np.unique(labels):
        members = len(np.unique(groups[labels == name]))
        if members < folds:
            remedy = "use fewer" if members > 1 else "two are needed at least, one to fit on and one to test on"
            raise TaskError(f"{describe(name, members)}, fewer than the {folds} folds; {remedy}")
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    return list(splitter.split(np.empty((len(labels), 0)), labels, groups))


def stratified_group_folds(
    labels: Shaped[np.ndarray, " row"], groups: Shaped[np.ndarray, " group_row"], folds: int, *, seed: int
) -> list[tuple[Int64[np.ndarray, " fit"], Int64[np.ndarray, " held"]]]:
    """Deal groups into folds for a classifier: as `group_folds`, with every class on each fitting side.

    Raises:
        TaskError: As `group_folds`, and if there is one class or one fold only, or a class would be missing from a
            fitting side.

    Examples:
        >>> parts = stratified_group_folds(np.array([0, 1, 0, 1]), np.array([7, 7, 8, 8]), 2, seed=0)
        >>> sorted(held.tolist() for _, held in parts)
        [[0, 1], [2, 3]]
    """
    require_aligned(labels=len(labels), groups=len(groups))
    classes = np.unique(labels)
    if len(classes) < 2 or folds < 2:
        raise TaskError(f"folds need two classes and two folds at least; got {classes.tolist()} and {folds} folds")
    parts = group_folds(labels, groups, folds, seed=seed)
    if any(len(np.unique(labels[fit])) < len(classes) for fit, _ in parts):
        raise TaskError(f"a class is missing from the fitting side of one of {folds} folds; use fewer")
    return parts

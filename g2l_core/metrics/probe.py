"""The linear probe, and the scores of any classifier's predictions.

Scores take a leading axis of draws, so that a bootstrap computes thousands at once (`statistics.of_sums`
for those of a confusion matrix, `statistics.of_weights` for the area under the ROC curve).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64, Num, Shaped

from g2l_core.errors import TaskError
from g2l_core.metrics import logistic
from g2l_core.metrics.folds import stratified_group_folds
from g2l_core.metrics.rows import require_finite
from g2l_core.metrics.statistics import Statistic, cluster_codes, of_weights, require_aligned

_COUNTED_CLUSTERS = 512
"""Up to so many clusters, counting the pairs of each two costs less than 1,000 draws."""


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What a linear probe says of the test rows."""

    classes: Shaped[np.ndarray, " class"]
    """Sorted; the columns of `probabilities`."""
    probabilities: Float64[np.ndarray, "test class"]
    c: float
    """The inverse penalty that was used: scikit-learn's C."""
    converged: bool
    """False where L-BFGS stopped before `logistic.GRADIENT_TOLERANCE` in any fit, those of the folds included."""

    @property
    def predictions(self) -> Shaped[np.ndarray, " test"]:
        """The most probable class of each test row."""
        return self.classes[self.probabilities.argmax(axis=1)]


def linear_probe(
    train: Float[np.ndarray, "train dim"],
    labels: Shaped[np.ndarray, " label"],
    test: Float[np.ndarray, "test test_dim"],
    *,
    c_values: Sequence[float] = (1.0,),
    groups: Shaped[np.ndarray, " group"] | None = None,
    folds: int = 5,
    max_iterations: int = 2000,
    seed: int,
) -> ProbeResult:
    """Multinomial logistic regression on features standardized with the training part's mean and deviation.

    Args:
        train: Features of the training rows: up to 4 million values are fitted in float64, more in float32.
        labels: The class of each.
        test: Features of the test rows.
        c_values: The inverse L2 penalty, against the *sum* of the training losses. Of several, the one with
            the least mean log loss over folds of the training part is taken, the smaller of equals.
        groups: The patient of each training row; no patient is on both sides of a fold. Needed only where
            there are several `c_values`.
        folds: Number of folds.
        max_iterations: Of L-BFGS, in each fit.
        seed: Deals the patients into folds.

    Raises:
        TaskError: If there is one class only, a row holds NaN, the lengths or widths differ, or a class has
            fewer patients than there are folds.
    """
    require_aligned(train=len(train), labels=len(labels))
    require_aligned(train_dim=train.shape[1], test_dim=test.shape[1])
    require_finite(train, "the training features")
    require_finite(test, "the test features")
    classes, codes = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise TaskError(f"a probe needs two classes at least; all {len(labels):,} labels are {classes[0]}")
    c, folds_converged = c_values[0], True
    if len(c_values) > 1:
        if groups is None:
            raise TaskError("to choose among several C, give the patient of each row: folds must not share one")
        parts = stratified_group_folds(labels, groups, folds, seed=seed)
        c, folds_converged = _choose_c(train, codes, parts, sorted(c_values), max_iterations)
    scaling = logistic.scaling_of(train)
    design = logistic.design_of(train, codes, len(classes), scaling)
    weights, converged = logistic.fit(design, c, max_iterations=max_iterations)
    return ProbeResult(
        classes=classes,
        probabilities=logistic.probabilities(test, scaling, weights),
        c=c,
        converged=converged and folds_converged,
    )


def _choose_c(
    features: Float[np.ndarray, "row dim"],
    codes: Int64[np.ndarray, " row"],
    parts: Sequence[tuple[Int64[np.ndarray, "_"], Int64[np.ndarray, "_"]]],
    c_values: Sequence[float],
    iterations: int,
) -> tuple[float, bool]:
    """The C with the least mean log loss, and whether every fit converged; each starts from the C before."""
    losses, converged = np.zeros(len(c_values)), True
    for fit, held in parts:
        scaling = logistic.scaling_of(features[fit])
        design = logistic.design_of(features[fit], codes[fit], int(codes.max()) + 1, scaling)
        weights = None
        for i, c in enumerate(c_values):
            weights, reached = logistic.fit(design, c, start=weights, max_iterations=iterations)
            logs = logistic.log_probabilities(features[held], scaling, weights)
            losses[i] -= logs[np.arange(len(held)), codes[held]].mean()
            converged &= reached
    return c_values[int(np.argmin(losses))], converged


def confusion(
    truth: Shaped[np.ndarray, " row"],
    predicted: Shaped[np.ndarray, " predicted_row"],
    clusters: Shaped[np.ndarray, " cluster_row"] | None = None,
) -> Int64[np.ndarray, "cluster class class"]:
    """Confusion matrices, [truth, predicted], one for each cluster.

    Args:
        truth: The class of each row.
        predicted: The predicted class of each.
        clusters: The patient or slide of each row; None is one cluster of all.

    Returns:
        Counts; classes are the sorted union of `truth` and `predicted`, clusters in sorted order.

    Raises:
        TaskError: If the lengths differ, or the truth has one class only.
    """
    clusters = np.zeros(len(truth), np.int64) if clusters is None else clusters
    require_aligned(truth=len(truth), predicted=len(predicted), clusters=len(clusters))
    _require_two_classes(truth)
    classes = np.unique(np.concatenate([truth, predicted]))
    row, column = np.searchsorted(classes, truth), np.searchsorted(classes, predicted)
    codes, count = cluster_codes(clusters)
    matrices = np.zeros((count, len(classes), len(classes)), np.int64)
    np.add.at(matrices, (codes, row, column), 1)
    return matrices


def _require_two_classes(truth: Shaped[np.ndarray, " row"]) -> None:
    if len(np.unique(truth)) < 2:
        raise TaskError(f"scores need two true classes at least; all {len(truth):,} rows are {truth[0]}")


def _mean_of_defined(
    above: Num[np.ndarray, "draw class"], below: Num[np.ndarray, "draw class"]
) -> Float64[np.ndarray, " draw"]:
    """Mean over classes of above / below, over those with below > 0; NaN where there is none."""
    defined = below > 0
    shares = np.divide(above, below, out=np.zeros(above.shape), where=defined)
    count = defined.sum(axis=1)
    return np.divide(shares.sum(axis=1), count, out=np.full(len(count), np.nan), where=count > 0)


def accuracy(matrices: Num[np.ndarray, "draw class class"]) -> Float64[np.ndarray, " draw"]:
    """The share of rows predicted right, of each confusion matrix."""
    return np.trace(matrices, axis1=1, axis2=2) / matrices.sum(axis=(1, 2))


def balanced_accuracy(matrices: Num[np.ndarray, "draw class class"]) -> Float64[np.ndarray, " draw"]:
    """The mean over the true classes that occur of the share predicted right, of each confusion matrix."""
    return _mean_of_defined(np.diagonal(matrices, axis1=1, axis2=2), matrices.sum(axis=2))


def macro_f1(matrices: Num[np.ndarray, "draw class class"]) -> Float64[np.ndarray, " draw"]:
    """The mean over classes, true or predicted, of 2 TP / (2 TP + FP + FN), of each confusion matrix."""
    hits = np.diagonal(matrices, axis1=1, axis2=2)
    return _mean_of_defined(2 * hits, matrices.sum(axis=1) + matrices.sum(axis=2))


def macro_auc(
    truth: Shaped[np.ndarray, " row"],
    probabilities: Float64[np.ndarray, "probability_row column"],
    classes: Shaped[np.ndarray, " class"],
    weights: Int64[np.ndarray, "draw row"] | None = None,
) -> Float64[np.ndarray, " draw"]:
    """The area under the ROC curve, each class against the rest, averaged over classes.

    The area is the chance that a row of the class scores above a row of the rest, ties counting one half
    (Hanley & McNeil 1982). With two classes it is that of the second class's probability.

    Args:
        truth: The class of each row.
        probabilities: Of each row and class; any score that grows with it will do.
        classes: The columns' classes.
        weights: How often each row counts, in each draw; None is one draw of all rows.

    Returns:
        The area of each draw, over the classes that occur in it; NaN where only one does.

    Raises:
        TaskError: If the lengths differ, a probability is NaN, the truth has one class only, or one that is
            not among `classes`.
    """
    require_aligned(truth=len(truth), probabilities=len(probabilities))
    require_aligned(columns=probabilities.shape[1], classes=len(classes))
    require_finite(probabilities, "the probabilities")
    _require_two_classes(truth)
    unknown = np.setdiff1d(truth, classes)
    if len(unknown):
        raise TaskError(f"classes {unknown.tolist()} occur in the truth but were not in the training part")
    weights = np.ones((1, len(truth)), np.int64) if weights is None else weights
    columns = [1] if len(classes) == 2 else range(len(classes))
    parts = [_pair_counts(truth == classes[c], probabilities[:, c], weights) for c in columns]
    concordant, pairs = (np.stack(values, axis=1) for values in zip(*parts, strict=True))
    return _mean_of_defined(concordant, pairs)


def auc_statistic(
    truth: Shaped[np.ndarray, " row"],
    probabilities: Float64[np.ndarray, "probability_row column"],
    classes: Shaped[np.ndarray, " class"],
    clusters: Shaped[np.ndarray, " cluster_row"],
) -> Statistic:
    """`macro_auc` for the cluster bootstrap.

    Of up to 512 clusters, the ordered pairs between each two are counted once; a draw that takes them u and v times
    has u v times as many. Of more, each draw counts anew.

    Raises:
        TaskError: As `macro_auc`.
    """
    macro_auc(truth, probabilities, classes)
    require_aligned(truth=len(truth), clusters=len(clusters))
    codes, count = cluster_codes(clusters)
    if count > _COUNTED_CLUSTERS:
        return of_weights(lambda weights: macro_auc(truth, probabilities, classes, weights), clusters)
    columns = [1] if len(classes) == 2 else range(len(classes))
    parts = [_cluster_pairs(truth == classes[c], probabilities[:, c], codes, count) for c in columns]
    concordant, pairs = (np.stack(values) for values in zip(*parts, strict=True))

    def statistic(drawn: Int64[np.ndarray, "draw cluster"]) -> Float64[np.ndarray, " draw"]:
        times = drawn.astype(np.float64)
        return _mean_of_defined(*(((times @ counts) * times).sum(axis=2).T for counts in (concordant, pairs)))

    return statistic


def _cluster_pairs(
    positive: Bool[np.ndarray, " row"],
    scores: Float64[np.ndarray, " row"],
    codes: Int64[np.ndarray, " row"],
    count: int,
) -> tuple[Float64[np.ndarray, "cluster cluster"], Float64[np.ndarray, "cluster cluster"]]:
    """Pairs of a positive row of one cluster and a negative of another: those in order (ties one half), and all."""
    order = np.argsort(scores)
    above = order[positive[order]]
    concordant = np.zeros((count, count))
    for cluster in range(count):
        below = np.sort(scores[~positive & (codes == cluster)])
        twice = np.searchsorted(below, scores[above]) + np.searchsorted(below, scores[above], side="right")
        concordant[:, cluster] = np.bincount(codes[above], weights=twice / 2, minlength=count)
    sizes = [np.bincount(codes[chosen], minlength=count).astype(np.float64) for chosen in (positive, ~positive)]
    return concordant, np.outer(*sizes)


def _pair_counts(
    positive: Bool[np.ndarray, " row"],
    scores: Float64[np.ndarray, " row"],
    weights: Int64[np.ndarray, "draw row"],
) -> tuple[Float64[np.ndarray, " draw"], Float64[np.ndarray, " draw"]]:
    """Of all (positive, negative) pairs: how many stand in order, ties counting one half; and how many are."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
    sorted_weights = weights[:, order].astype(np.float64)
    positives = np.add.reduceat(sorted_weights * positive[order], starts, axis=1)
    negatives = np.add.reduceat(sorted_weights * ~positive[order], starts, axis=1)
    below = negatives.cumsum(axis=1) - negatives / 2
    return (positives * below).sum(axis=1), positives.sum(axis=1) * negatives.sum(axis=1)

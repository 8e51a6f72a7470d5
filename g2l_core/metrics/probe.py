"""The linear probe, and the scores of any classifier's predictions.

Scores have a leading axis, so that they are computed for many sets of patients at once (`intervals.of_sums` for those
of a confusion matrix, `auc_figure` for the area under the ROC curve).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64, Num, Shaped
from scipy.stats import rankdata

from g2l_core.errors import TaskError
from g2l_core.metrics import logistic
from g2l_core.metrics.exchange import Exchangeable
from g2l_core.metrics.folds import stratified_group_folds
from g2l_core.metrics.intervals import Figure
from g2l_core.metrics.patients import MAX_SUMMED_GROUPS, Design, leave_out_groups
from g2l_core.metrics.rows import require_finite
from g2l_core.metrics.scales import ORDER
from g2l_core.metrics.statistics import cluster_codes, require_aligned


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Predictions of a linear probe for the test rows."""

    classes: Shaped[np.ndarray, " class"]
    """Sorted; the columns of `probabilities`."""
    probabilities: Float64[np.ndarray, "test class"]
    c: float
    """The inverse penalty that was used, scikit-learn's C."""
    converged: bool
    """False where the fit stopped before `logistic.PROBABILITY_TOLERANCE`, or one of the folds' before
    `logistic.GRADIENT_TOLERANCE`."""
    scaling: logistic.Scaling
    """By which features are scaled before the weights."""
    weights: Float64[np.ndarray, "column class"]
    """For scaled features; the last row is the intercepts."""

    @property
    def predictions(self) -> Shaped[np.ndarray, " test"]:
        """Return the (test,) most probable classes."""
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
    """Fit multinomial logistic regression on standardized features, and predict the test rows.

    Minimizes sum_i -log p(y_i | x_i) + |W|^2 / (2 C) with p = softmax(W'x + b), x being standardized with the training
    part's mean and deviation. With two classes, W is one vector.

    Args:
        train: (train, dim) features of the training rows. More than 17 million values are held in float32.
        labels: (train,) class of each.
        test: (test, dim) features of the test rows.
        c_values: C, one or several. Of several, the one with the least mean log loss over folds of the training part
            is taken, the smaller of equals.
        groups: (train,) patient of each training row; no patient is on both sides of a fold. Needed only where
            there are several `c_values`.
        folds: Number of folds.
        max_iterations: Of L-BFGS, in each fit.
        seed: Random seed that deals the patients into folds.

    Returns:
        The probabilities of the test rows, and the C that was used.

    Raises:
        TaskError: If there is one class only, a row holds NaN, the lengths or widths differ, or a class has
            fewer patients than there are folds.

    Examples:
        >>> train, labels = np.array([[0.0], [1.0], [4.0], [5.0]]), np.array(["n", "n", "t", "t"])
        >>> result = linear_probe(train, labels, np.array([[0.5], [2.5]]), seed=0)
        >>> result.predictions[0].item(), result.probabilities.round(3).tolist()
        ('n', [[0.728, 0.272], [0.5, 0.5]])
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
        scaling=scaling,
        weights=weights,
    )


def _choose_c(
    features: Float[np.ndarray, "row dim"],
    codes: Int64[np.ndarray, " row"],
    parts: Sequence[tuple[Int64[np.ndarray, "_"], Int64[np.ndarray, "_"]]],
    c_values: Sequence[float],
    iterations: int,
) -> tuple[float, bool]:
    """Return the C with the least mean log loss, and whether every fit converged; each starts where the last ended."""
    losses, converged = np.zeros(len(c_values)), True
    for fit, held in parts:
        scaling = logistic.scaling_of(features[fit])
        design = logistic.design_of(features[fit], codes[fit], int(codes.max()) + 1, scaling)
        weights = None
        for i, c in enumerate(c_values):
            weights, reached = logistic.fit(design, c, start=weights, max_iterations=iterations, rough=True)
            logs = logistic.log_probabilities(features[held], scaling, weights)
            losses[i] -= logs[np.arange(len(held)), codes[held]].mean()
            converged &= reached
    return c_values[int(np.argmin(losses))], converged


def confusion(
    truth: Shaped[np.ndarray, " row"],
    predicted: Shaped[np.ndarray, " predicted_row"],
    clusters: Shaped[np.ndarray, " cluster_row"] | None = None,
) -> Int64[np.ndarray, "cluster class class"]:
    """Count confusion matrices, [truth, predicted], one for each cluster.

    Args:
        truth: (row,) class of each row.
        predicted: (row,) predicted class of each.
        clusters: (row,) patient or slide of each row; None is one cluster of all.

    Returns:
        (cluster, class, class) counts; classes are the sorted union of `truth` and `predicted`, clusters are sorted.

    Raises:
        TaskError: If the lengths differ, or the truth has one class only.

    Examples:
        >>> confusion(np.array(["n", "n", "t"]), np.array(["n", "t", "t"])).tolist()
        [[[1, 1], [0, 1]]]
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
    """Average above / below over the classes with below > 0; NaN where there is none."""
    defined = below > 0
    shares = np.divide(above, below, out=np.zeros(above.shape), where=defined)
    count = defined.sum(axis=1)
    return np.divide(shares.sum(axis=1), count, out=np.full(len(count), np.nan), where=count > 0)


def accuracy(matrices: Num[np.ndarray, "draw class class"]) -> Float64[np.ndarray, " draw"]:
    """Compute the share of rows predicted right: trace / sum of each (class, class) matrix; (draw,).

    Examples:
        >>> accuracy(np.array([[[3, 1], [0, 2]]])).round(4).tolist()
        [0.8333]
    """
    return np.trace(matrices, axis1=1, axis2=2) / matrices.sum(axis=(1, 2))


def balanced_accuracy(matrices: Num[np.ndarray, "draw class class"]) -> Float64[np.ndarray, " draw"]:
    """Compute the mean over true classes of TP / (TP + FN) of each (class, class) matrix; (draw,).

    Classes that do not occur in the truth are left out.

    Examples:
        >>> balanced_accuracy(np.array([[[3, 1], [0, 2]]])).tolist()
        [0.875]
    """
    return _mean_of_defined(np.diagonal(matrices, axis1=1, axis2=2), matrices.sum(axis=2))


def macro_f1(matrices: Num[np.ndarray, "draw class class"]) -> Float64[np.ndarray, " draw"]:
    """Compute the mean over classes, true or predicted, of 2 TP / (2 TP + FP + FN) of each matrix; (draw,).

    Examples:
        >>> macro_f1(np.array([[[3, 1], [0, 2]]])).round(4).tolist()
        [0.8286]
    """
    hits = np.diagonal(matrices, axis1=1, axis2=2)
    return _mean_of_defined(2 * hits, matrices.sum(axis=1) + matrices.sum(axis=2))


def unanimous_variance(matrices: Num[np.ndarray, "group class class"]) -> float:
    """Compute the variance that classes hide whose patients are all right, or all wrong.

    Balanced accuracy is the mean of K recalls. The recall of a class all of whose n patients are right moves without
    none of them, and so it seems certain. By the rule of succession one of n + 2 patients is wrong; the variance of
    such a recall is p (1 - p) / n with p = 1 / (n + 2), and 1 / K^2 of it is that of the mean.

    Args:
        matrices: (group, class, class) confusion matrices, truth by prediction, one for each group of patients.

    Returns:
        The variance to add; 0 where no class is so.

    References:
        Agresti & Coull, Approximate Is Better than Exact for Interval Estimation of Binomial Proportions (1998).

    Examples:
        >>> two_patients_right = np.array([[[4, 0], [1, 2]], [[3, 0], [2, 1]]])
        >>> unanimous_variance(two_patients_right)  # p = 1 / 4, n = 2, K = 2
        0.0234375
    """
    rows = matrices.sum(axis=2)
    hits = np.diagonal(matrices, axis1=1, axis2=2)
    held = (rows > 0).sum(axis=0)
    whole = hits.sum(axis=0)
    unanimous = (held > 0) & ((whole == 0) | (whole == rows.sum(axis=0)))
    patients, wrong = held[unanimous], 1 / (held[unanimous] + 2)
    return float((wrong * (1 - wrong) / patients).sum()) / int((held > 0).sum()) ** 2


def macro_auc(
    truth: Shaped[np.ndarray, " row"],
    probabilities: Float64[np.ndarray, "probability_row column"],
    classes: Shaped[np.ndarray, " class"],
    weights: Int64[np.ndarray, "draw row"] | None = None,
) -> Float64[np.ndarray, " draw"]:
    """Compute the area under the ROC curve, each class against the rest, averaged over classes.

    The area is P(s+ > s-) + P(s+ = s-) / 2 for the scores of a row of the class and a row of the rest
    (Hanley & McNeil 1982). With two classes, the second class's probability is the score.

    Args:
        truth: (row,) class of each row.
        probabilities: (row, class) probabilities, or any scores that grow with them.
        classes: (class,) classes of the columns.
        weights: (draw, row) how often each row counts; None is one draw of all rows.

    Returns:
        The (draw,) areas, over the classes that occur in the draw; NaN where only one does.

    Raises:
        TaskError: If the lengths differ, a probability is NaN, the truth has one class only, or one that is
            not among `classes`.

    Examples:
        >>> scores = np.array([[0.9, 0.1], [0.4, 0.6], [0.6, 0.4], [0.2, 0.8]])
        >>> macro_auc(np.array([0, 0, 1, 1]), scores, np.array([0, 1])).tolist()
        [0.75]
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


@dataclass(frozen=True, kw_only=True)
class _Ranked(Exchangeable):
    """The scores of each class by their ranks among an encoder's own, so that those of two encoders can be mixed."""

    positive: Bool[np.ndarray, "column row"]
    ranks: Float64[np.ndarray, "column row"]
    codes: Int64[np.ndarray, " row"]
    count: int

    def differences(
        self, other: Exchangeable, exchanged: Bool[np.ndarray, "draw group"]
    ) -> Float64[np.ndarray, " draw"]:
        """See `Exchangeable.differences`."""
        assert isinstance(other, _Ranked)
        codes = np.concatenate([self.codes, self.codes + self.count])
        parts = [
            _cluster_pairs(np.tile(positive, 2), np.concatenate([mine, theirs]), codes, 2 * self.count)
            for positive, mine, theirs in zip(self.positive, self.ranks, other.ranks, strict=True)
        ]
        first = np.concatenate([~exchanged, exchanged], axis=1).astype(np.float64)
        return _areas(parts, first) - _areas(parts, 1 - first)


_Pairs: TypeAlias = tuple[Float64[np.ndarray, "group group"], Float64[np.ndarray, "group group"]]
"""Pairs of a positive row of one group and a negative row of another: those in order, ties half; and all."""


def _areas(parts: Sequence[_Pairs], taken: Float64[np.ndarray, "draw group"]) -> Float64[np.ndarray, " draw"]:
    """The mean area over classes, of the groups that are taken."""
    concordant, pairs = (np.stack(counts) for counts in zip(*parts, strict=True))
    return _mean_of_defined(*(((taken @ counts) * taken).sum(axis=2).T for counts in (concordant, pairs)))


def auc_figure(
    truth: Shaped[np.ndarray, " row"],
    probabilities: Float64[np.ndarray, "probability_row column"],
    classes: Shaped[np.ndarray, " class"],
    clusters: Shaped[np.ndarray, " cluster_row"],
    design: Design,
) -> Figure:
    """Return `macro_auc` on all patients and without each.

    The ordered pairs between each two groups of patients are counted once. Leaving out a patient removes its pairs as
    positive and as negative, which gives the variance of Obuchowski's clustered form of DeLong's. Two encoders are
    compared by exchanging the ranks of their scores. Arguments are those of `macro_auc`, and:

    Args:
        truth: (row,) class of each row.
        probabilities: (row, class) probabilities.
        classes: (class,) classes of the columns.
        clusters: (row,) patient or slide of each row.
        design: Of the same clusters, with at most `patients.MAX_SUMMED_GROUPS` groups; strata are classes.

    Returns:
        The figure.

    Raises:
        TaskError: As `macro_auc`.

    References:
        Obuchowski, Nonparametric Analysis of Clustered ROC Curve Data (1997).

    Examples:
        >>> scores, patients = np.array([[0.9, 0.1], [0.4, 0.6], [0.6, 0.4], [0.2, 0.8]]), np.array([1, 2, 3, 4])
        >>> from g2l_core.metrics.patients import design_of
        >>> truth, design = np.array([0, 0, 1, 1]), design_of(patients, np.array([0, 0, 1, 1]), unit="patients")
        >>> auc_figure(truth, scores, np.array([0, 1]), patients, design).values.tolist()
        [0.75, 0.5, 1.0, 1.0, 0.5]
    """
    macro_auc(truth, probabilities, classes)
    require_aligned(truth=len(truth), clusters=len(clusters))
    codes, count = leave_out_groups(clusters, MAX_SUMMED_GROUPS)
    columns = [1] if len(classes) == 2 else range(len(classes))
    positive = np.stack([truth == classes[c] for c in columns])
    parts = [_cluster_pairs(p, probabilities[:, c], codes, count) for p, c in zip(positive, columns, strict=True)]
    values = _areas(parts, np.concatenate([np.ones((1, count)), 1 - np.eye(count)]))
    ranks = np.stack([rankdata(probabilities[:, c]) for c in columns])
    exchange = _Ranked(positive=positive, ranks=ranks, codes=codes, count=count)
    return Figure(values=values, design=design, scale=ORDER, exchange=exchange)


def _cluster_pairs(
    positive: Bool[np.ndarray, " row"],
    scores: Float64[np.ndarray, " row"],
    codes: Int64[np.ndarray, " row"],
    count: int,
) -> tuple[Float64[np.ndarray, "cluster cluster"], Float64[np.ndarray, "cluster cluster"]]:
    """Count pairs of a positive row of one cluster and a negative of another: those in order (ties half), and all."""
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
    """Count (positive, negative) pairs: those in order, ties counting one half; and all."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
    sorted_weights = weights[:, order].astype(np.float64)
    positives = np.add.reduceat(sorted_weights * positive[order], starts, axis=1)
    negatives = np.add.reduceat(sorted_weights * ~positive[order], starts, axis=1)
    below = negatives.cumsum(axis=1) - negatives / 2
    return (positives * below).sum(axis=1), positives.sum(axis=1) * negatives.sum(axis=1)

"""Medical centers and probes: how well features predict the center, and the loss from a biased training set."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int64, Num, Shaped
from scipy.stats.contingency import association

from g2l_core.errors import TaskError
from g2l_core.metrics.folds import stratified_group_folds
from g2l_core.metrics.probe import balanced_accuracy, linear_probe
from g2l_core.metrics.statistics import cluster_codes, require_aligned
from g2l_core.rng import keyed_generator


def predict_centers(
    features: Float[np.ndarray, "row dim"],
    medical_centers: Shaped[np.ndarray, " center_row"],
    slides: Shaped[np.ndarray, " slide_row"],
    *,
    c: float = 1.0,
    folds: int = 5,
    seed: int,
) -> Shaped[np.ndarray, " row"]:
    """Predict the center of each row by a linear probe that was fitted on other slides.

    `probe.confusion(medical_centers, predicted, slides)` gives the sums for `probe.balanced_accuracy` and its
    interval over slides. By chance it is 1 / the number of centers; compare it with `centers_predicted_by_class`.
    (To predict by neighbors: `neighbors.nearest` with the slides as groups, then `neighbors.knn_predict`.)

    Args:
        features: (row, dim) features of any float type.
        medical_centers: (row,) center of each row.
        slides: (row,) slide, or better the patient, of each row. None is both fitted on and predicted.
        c: The probe's inverse penalty (`probe.linear_probe`).
        folds: Number of folds over slides.
        seed: Random seed that deals the slides into folds.

    Returns:
        The (row,) predicted centers.

    Raises:
        TaskError: If there is one center only, a center has fewer slides than folds, the lengths differ, or a
            feature is not finite.

    Examples:
        >>> features, centers = np.array([[0.0], [5.0]] * 4), np.array(["a", "b"] * 4)
        >>> predict_centers(features, centers, np.arange(8), folds=2, seed=0).tolist()
        ['a', 'b', 'a', 'b', 'a', 'b', 'a', 'b']
    """
    require_aligned(features=len(features), centers=len(medical_centers), slides=len(slides))
    predicted = np.empty_like(medical_centers)
    for fit, held in stratified_group_folds(medical_centers, slides, folds, seed=seed):
        probe = linear_probe(features[fit], medical_centers[fit], features[held], c_values=(c,), seed=seed)
        predicted[held] = probe.predictions
    return predicted


def centers_predicted_by_class(
    medical_centers: Shaped[np.ndarray, " row"], biological_classes: Shaped[np.ndarray, " class_row"]
) -> float:
    """Compute the best balanced accuracy of predicting the center from the class alone.

    Where centers have different classes, features that hold nothing but biology predict the center this well; what
    is above it cannot come from the class. It is 1 / centers where all centers have the same class shares.

    Args:
        medical_centers: (row,) center of each row.
        biological_classes: (row,) tissue class of each row.

    Returns:
        (1 / centers) sum over classes of max over centers of P(class | center): the mean over centers of the share of
        rows that are right if each class is assigned to the center with the greatest share of it.

    Raises:
        TaskError: If the lengths differ.

    Examples:
        >>> centers_predicted_by_class(np.array([1, 1, 2, 2]), np.array(["n", "n", "n", "t"]))
        0.75
    """
    require_aligned(centers=len(medical_centers), classes=len(biological_classes))
    center, centers = cluster_codes(medical_centers)
    klass, classes = cluster_codes(biological_classes)
    table = np.zeros((classes, centers))
    np.add.at(table, (klass, center), 1)
    return float((table / table.sum(axis=0)).max(axis=1).sum() / centers)


@dataclass(frozen=True, kw_only=True)
class BiasDesign:
    """Settings of training sets with growing center bias, all of the same size and class balance."""

    centers: Sequence[object]
    """Centers in the domain: trained and tested on. No more than there are classes, so that each can represent one."""
    slides_per_class: int
    """Number of slides of each class in every training set; a multiple of the number of centers."""
    rows_per_slide: int
    """Number of rows of each class taken from a slide. A slide with fewer is not used for the class."""
    test_slides: int = 1
    """Number of slides of each class and center that are held out."""
    levels: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Bias b, ascending from 0: a class takes the share (1 - b) / centers + b from the center that represents
    it, and (1 - b) / centers from every other."""
    repeats: int = 20
    """How many times slides are dealt and classes are assigned to centers."""


@dataclass(frozen=True, kw_only=True)
class BiasedProbes:
    """Predictions on unchanged test sets by probes fitted on training sets of growing bias."""

    cramers_v: Float64[np.ndarray, " level"]
    """Association of class and center in the training set, 0 to 1; the mean over repeats."""
    in_domain: Int64[np.ndarray, "slide level repeat class class"]
    """Counts [truth, predicted] on held-out slides of the training centers; slides in sorted order."""
    out_of_domain: Int64[np.ndarray, "slide level repeat class class"]
    """Counts on all rows of other centers; all 0 where there is none."""


def biased_probes(
    features: Float[np.ndarray, "row dim"],
    biological_classes: Shaped[np.ndarray, " class_row"],
    medical_centers: Shaped[np.ndarray, " center_row"],
    slides: Shaped[np.ndarray, " slide_row"],
    design: BiasDesign,
    *,
    c: float = 1.0,
    seed: int,
) -> BiasedProbes:
    """Fit a probe for the class at each level of center bias, and test all levels of a repeat on the same rows.

    In a repeat, every center holds out `test_slides` slides of each class. The rest are put in an order, and each
    level takes the first ones, as many as its shares say. So the number of slides, of rows and of rows of a class
    does not change with the bias, and test rows have every class equally often from every center.

    This is PathoROB's experiment for any numbers of classes and centers, with the probe of `probe.linear_probe`
    at a fixed penalty. PathoROB has a table of counts for each data set, does not standardize features, and
    chooses the penalty on rows as biased as the training set.

    Args:
        features: (row, dim) features of any float type.
        biological_classes: (row,) class that the probe predicts.
        medical_centers: (row,) center of each row.
        slides: (row,) slide, or better the patient, of each row. None is both fitted on and tested.
        design: Settings of the training sets.
        c: The probe's inverse penalty.
        seed: Random seed that deals slides, rows, and classes to centers.

    Returns:
        The counts of predictions at each level.

    Raises:
        TaskError: If the design cannot be met: the message says by which class in which center.

    References:
        Kömen et al. (2025), arXiv 2507.17845, section on the average performance drop.

    Examples:
        >>> classes, slides = np.tile([0, 1], 12), np.repeat(np.arange(12), 2)
        >>> design = BiasDesign(centers=(0, 1), slides_per_class=4, rows_per_slide=1, levels=(0.0, 1.0), repeats=1)
        >>> probes = biased_probes(classes[:, None] * 2.0, classes, slides % 2, slides, design, seed=0)
        >>> probes.cramers_v.tolist(), probes.in_domain[:, 1, 0].sum(axis=0).tolist()
        ([0.0, 1.0], [[2, 0], [0, 2]])
    """
    require_aligned(
        features=len(features), classes=len(biological_classes), centers=len(medical_centers), slides=len(slides)
    )
    classes, truth = np.unique(biological_classes, return_inverse=True)
    _require_design(design, classes)
    slide, count = cluster_codes(slides)
    shape = (count, len(design.levels), design.repeats, len(classes), len(classes))
    inside, outside = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    bias = np.zeros(len(design.levels))
    others = np.flatnonzero(~np.isin(medical_centers, np.array(design.centers)))
    for repeat in range(design.repeats):
        rng = keyed_generator("centre bias", seed, repeat)
        train, test = _deal(truth, medical_centers, slide, classes, design, rng)
        represented_by = rng.permutation(len(classes)) % len(design.centers)
        for level, b in enumerate(design.levels):
            shares = _slides_of_strata(b, represented_by, design)
            bias[level] += association(shares, method="cramer") / design.repeats
            fit = np.concatenate([train[stratum][: shares[stratum]].ravel() for stratum in train])
            rows = np.concatenate([test, others])
            probe = linear_probe(features[fit], truth[fit], features[rows], c_values=(c,), seed=seed)
            predicted = probe.predictions.astype(np.int64)
            np.add.at(inside[:, level, repeat], (slide[test], truth[test], predicted[: len(test)]), 1)
            np.add.at(outside[:, level, repeat], (slide[others], truth[others], predicted[len(test) :]), 1)
    return BiasedProbes(cramers_v=bias, in_domain=inside, out_of_domain=outside)


def _require_design(design: BiasDesign, classes: Shaped[np.ndarray, " class"]) -> None:
    centers, levels = len(set(design.centers)), np.array(design.levels, float)
    if not 2 <= centers <= len(classes) or centers < len(design.centers):
        raise TaskError(
            f"name 2 to {len(classes)} different centers, no more than there are classes; got {list(design.centers)}"
        )
    if design.slides_per_class < 1 or design.slides_per_class % centers:
        raise TaskError(f"slides_per_class is a multiple of the {centers} centers; got {design.slides_per_class}")
    if len(levels) < 2 or levels[0] != 0 or levels[-1] > 1 or (np.diff(levels) <= 0).any():
        raise TaskError(f"bias levels ascend from 0 to at most 1, with two at least; got {levels.tolist()}")
    if min(design.rows_per_slide, design.test_slides, design.repeats) < 1:
        raise TaskError("rows_per_slide, test_slides and repeats are at least 1")


def _slides_of_strata(
    b: float, represented_by: Int64[np.ndarray, " class"], design: BiasDesign
) -> Int64[np.ndarray, "class center"]:
    """Return how many slides of each class and center are trained on; every class has `slides_per_class`."""
    centers = len(design.centers)
    others = round(design.slides_per_class * (1 - b) / centers)
    slides = np.full((len(represented_by), centers), others, np.int64)
    slides[np.arange(len(represented_by)), represented_by] = design.slides_per_class - others * (centers - 1)
    return slides


def _deal(
    truth: Int64[np.ndarray, " row"],
    centers: Shaped[np.ndarray, " row"],
    slide: Int64[np.ndarray, " row"],
    classes: Shaped[np.ndarray, " class"],
    design: BiasDesign,
    rng: np.random.Generator,
) -> tuple[dict[tuple[int, int], Int64[np.ndarray, "slide each"]], Int64[np.ndarray, " test"]]:
    """Return the training rows of each (class, center), slide by slide in the order of use; and the test rows."""
    needed = int(_slides_of_strata(max(design.levels), np.zeros(1, np.int64), design).max())
    train, test = {}, []
    for number, center in enumerate(design.centers):
        rows = rng.permutation(np.flatnonzero(centers == center))
        order = rng.permutation(np.unique(slide[rows]))
        by_class = [_rows_of_slides(rows[truth[rows] == klass], slide, design) for klass in range(len(classes))]
        held = _held_out(order, by_class, design.test_slides)
        for klass, offered in enumerate(by_class):
            tested = [offered[s] for s in order if s in offered and s in held][: design.test_slides]
            fitted = [offered[s] for s in order if s in offered and s not in held]
            if len(tested) < design.test_slides or len(fitted) < needed:
                raise TaskError(
                    f"class {classes[klass]} in center {center} has {len(offered)} slides with "
                    f"{design.rows_per_slide} rows, of which {len(fitted)} are left to train on; wanted are "
                    f"{needed} and {design.test_slides} to test (lower slides_per_class, rows_per_slide or the bias)"
                )
            test += tested
            train[klass, number] = np.stack(fitted)
    return train, np.concatenate(test)


def _rows_of_slides(
    rows: Int64[np.ndarray, " class_row"], slide: Int64[np.ndarray, " row"], design: BiasDesign
) -> dict[int, Int64[np.ndarray, " each"]]:
    """Return the first rows of each slide that has enough."""
    order = np.argsort(slide[rows], kind="stable")
    names, starts = np.unique(slide[rows][order], return_index=True)
    parts = dict(zip(names.tolist(), np.split(rows[order], starts[1:]), strict=True)) if len(rows) else {}
    return {name: part[: design.rows_per_slide] for name, part in parts.items() if len(part) >= design.rows_per_slide}


def _held_out(
    order: Int64[np.ndarray, " slide"], by_class: Sequence[dict[int, Int64[np.ndarray, " each"]]], wanted: int
) -> set[int]:
    """Return the first slides in the order that give every class enough; one slide may serve several classes."""
    held: set[int] = set()
    for name in order.tolist():
        short = [offered for offered in by_class if sum(s in offered for s in held) < wanted]
        if any(name in offered for offered in short):
            held.add(name)
    return held


def average_performance_drop(
    matrices: Num[np.ndarray, "draw level repeat class class"],
) -> Float64[np.ndarray, " draw"]:
    """Compute PathoROB's APD: the mean over repeats of mean over levels b > 0 of accuracy(b) / accuracy(0), minus 1.

    Accuracy is the balanced accuracy over classes. The drop is 0 where the bias has no effect, and -0.3 where 30 % of
    the accuracy is lost. An interval over slides (`intervals.of_group_sums` of the counts of `BiasedProbes`) covers
    the choice of test slides; the probes are not fitted again.

    Args:
        matrices: (draw, level, repeat, class, class) counts [truth, predicted], summed over the slides of each draw.

    Returns:
        The (draw,) drops, over the repeats in which all accuracies are defined and that at b = 0 is not
        0; NaN where there is none.

    References:
        Kömen et al. (2025), arXiv 2507.17845, equation of the average performance drop.

    Examples:
        >>> unbiased, biased = [[8, 2], [2, 8]], [[6, 4], [4, 6]]
        >>> average_performance_drop(np.array([[[unbiased], [biased]]])).round(6).tolist()
        [-0.25]
    """
    draws, levels, repeats, classes, _ = matrices.shape
    values = balanced_accuracy(matrices.reshape(-1, classes, classes)).reshape(draws, levels, repeats)
    defined = np.isfinite(values).all(axis=1) & (values[:, 0] > 0)
    unbiased = np.where(defined, values[:, 0], 1.0)
    drops = np.where(defined, values[:, 1:].mean(axis=1) / unbiased - 1, 0.0)
    count = defined.sum(axis=1)
    return np.divide(drops.sum(axis=1), count, out=np.full(draws, np.nan), where=count > 0)

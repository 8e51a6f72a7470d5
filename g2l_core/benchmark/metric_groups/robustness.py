"""Metric groups of nuisances: `robustness`, `robustness_paired`, `center`, `bias_drop`, `consistency`."""

from dataclasses import replace

import numpy as np
from jaxtyping import Int64, Shaped

from g2l_core.benchmark.metric_groups.values import MetricValue, Settings, TaskInput, metric_values
from g2l_core.benchmark.rows import TaskRows
from g2l_core.errors import TaskError
from g2l_core.metrics.center_bias import (
    BiasDesign,
    average_performance_drop,
    biased_probes,
    centers_predicted_by_class,
    predict_centers,
)
from g2l_core.metrics.consistency import consistency_sums, median_over_pairs
from g2l_core.metrics.intervals import Figure, of_group_sums, of_neighbors
from g2l_core.metrics.patients import MAX_GROUPS, MAX_SUMMED_GROUPS, Design, leave_out_groups
from g2l_core.metrics.probe import balanced_accuracy, confusion, unanimous_variance
from g2l_core.metrics.robustness import (
    paired_combinations,
    paired_counts,
    pathorob_index,
    ratio_index,
    robustness_sums,
)
from g2l_core.metrics.scales import CORRELATION, POSITIVE, SHARE
from g2l_core.types import Features


def _tested(task: TaskInput, group: str) -> tuple[TaskRows, Features]:
    """The rows that nothing is trained on, each of which must have a center."""
    chosen = task.test_rows
    rows = task.rows.take(chosen)
    if not rows.center.astype(bool).all():
        raise TaskError(f"{group} needs the column {task.spec.center!r} for every slide; give it in the manifest")
    return rows, task.features[chosen]


def robustness(task: TaskInput) -> list[MetricValue]:
    """Both indices over k, with neighbors among all rows of other slides."""
    rows, features = _tested(task, "robustness")
    ks = task.spec.robustness.k
    totals, support = robustness_sums(features, rows.label, rows.center, rows.slide_ids, rows.cluster, ks=ks)
    design = task.design(rows.cluster, most=MAX_GROUPS)
    values = []
    for k in ks:
        settings: Settings = {
            "k": k,
            "distance": "cosine",
            "design": "all rows",
            "neighbors": "of other slides",
            "support": round(support[k], 4),
        }
        figures = {
            f"ratio_k{k}": of_neighbors(ratio_index(totals[k]), design, POSITIVE),
            f"pathorob_k{k}": of_neighbors(pathorob_index(totals[k]), design, SHARE),
        }
        values += metric_values("robustness", figures, settings, n=len(rows))
    return values


def robustness_paired(task: TaskInput) -> list[MetricValue]:
    """PathoROB's index over balanced pairs of classes and centers."""
    rows, features = _tested(task, "robustness_paired")
    options = task.spec.robustness
    design = paired_combinations(
        rows.label,
        rows.center,
        rows.slide_ids,
        k=max(options.k),
        rows_per_stratum=options.rows_per_stratum or None,
        seed=task.seed,
    )
    by_k = paired_counts(features, rows.label, rows.center, rows.slide_ids, design, ks=options.k, clusters=rows.cluster)
    patients, values = task.design(rows.cluster, most=MAX_GROUPS), []
    for k, counts in by_k.items():
        settings: Settings = {
            "k": k,
            "distance": "cosine",
            "design": f"2x2, {len(design)} combinations",
            "neighbors": "of other slides",
            "support": round(counts.support, 4),
            "class_accuracy": round(counts.class_accuracy, 4),
        }
        figure = of_neighbors(pathorob_index(counts.totals), patients, SHARE)
        values += metric_values("robustness_paired", {f"k{k}": figure}, settings, n=counts.occurrences)
    return values


def center(task: TaskInput) -> list[MetricValue]:
    """How well a linear probe predicts the center of patients that it was not fitted on; lower is better."""
    rows, features = _tested(task, "center")
    options = task.spec.center_probe
    predicted = predict_centers(features, rows.center, rows.cluster, c=options.c, folds=options.folds, seed=task.seed)
    settings: dict[str, str | int | float | bool] = {
        "C": options.c,
        "split": f"{options.folds} folds by {rows.cluster_unit}",
        "chance": round(1 / len(np.unique(rows.center)), 4),
    }
    if task.spec.label:
        settings["told_by_class"] = round(centers_predicted_by_class(rows.center, rows.label), 4)
    codes, _ = leave_out_groups(rows.cluster, MAX_SUMMED_GROUPS)
    by_center = task.design(rows.cluster, rows.center, stratum="center")
    matrices = confusion(rows.center, predicted, codes)
    figure = replace(
        of_group_sums(balanced_accuracy, matrices, by_center, SHARE), least_variance=unanimous_variance(matrices)
    )
    return metric_values("center", {"balanced_accuracy": figure}, settings, n=len(rows), better="lower")


def bias_drop(task: TaskInput) -> list[MetricValue]:
    """What probes lose when their training set ties class to center, on test sets that stay the same."""
    rows, features = _tested(task, "bias_drop")
    options = task.spec.bias_drop
    centers = options.centers or _largest_centers(rows)
    design = BiasDesign(
        centers=centers,
        slides_per_class=options.slides_per_class or 2 * len(centers),
        rows_per_slide=options.rows_per_slide,
        test_slides=options.test_slides,
        levels=options.levels,
        repeats=options.repeats,
    )
    counts = biased_probes(features, rows.label, rows.center, rows.cluster, design, c=options.c, seed=task.seed)
    settings: Settings = {
        "C": options.c,
        "centers": ", ".join(map(str, design.centers)),
        "levels": ", ".join(f"{level:g}" for level in design.levels),
        "cramers_v": ", ".join(f"{value:.2f}" for value in counts.cramers_v),
        "patients_per_class": design.slides_per_class,
        "rows_per_patient": design.rows_per_slide,
        "repeats": design.repeats,
    }
    values = []
    for domain, of_domain in (("in_domain", counts.in_domain), ("out_of_domain", counts.out_of_domain)):
        if of_domain.any():
            figure = _drop(of_domain, rows)
            values += metric_values("bias_drop", {domain: figure}, settings, n=int(of_domain[:, 0, 0].sum()))
    return values


def _drop(matrices: Int64[np.ndarray, "cluster level repeat class class"], rows: TaskRows) -> Figure:
    """The drop of the patients that are tested, whose rows are counted at the first level."""
    matrices = matrices[matrices.any(axis=(1, 2, 3, 4))]
    groups, count = leave_out_groups(np.arange(len(matrices)), MAX_SUMMED_GROUPS)
    sums = np.zeros((count, *matrices.shape[1:]))
    np.add.at(sums, groups, matrices)
    design = Design(
        counts=sums[:, 0].sum(axis=(1, 3)),
        strata=tuple(f"class {name}" for name in np.unique(rows.label).tolist()),
        unit=rows.cluster_unit,
        clusters=len(matrices),
    )
    return of_group_sums(average_performance_drop, sums, design)


def _largest_centers(rows: TaskRows) -> tuple[str, ...]:
    """The centers with most patients, as many as there are classes; of equals the first by name."""
    names = np.unique(rows.center)
    sizes = [len(np.unique(rows.cluster[rows.center == name])) for name in names]
    order = np.argsort(np.negative(sizes), kind="stable")[: len(np.unique(rows.label))]
    return tuple(names[np.sort(order)].tolist())


def consistency(task: TaskInput) -> list[MetricValue]:
    """Whether registered patches agree between scanners and stains; medians over pairs of conditions."""
    options = task.spec.consistency
    rows, features = task.rows, task.features
    conditions, keys = rows.columns[options.condition], rows.columns[options.patch]
    names = np.unique(conditions[conditions != ""])
    if len(names) < 2:
        raise TaskError(
            f"consistency needs two conditions at least in column {options.condition!r}; found {names.tolist()}"
        )
    by_key = {str(name): _by_key(np.flatnonzero((conditions == name) & (keys != "")), keys, name) for name in names}
    common = sorted(set.intersection(*(set(rows_of) for rows_of in by_key.values())))
    if not common:
        raise TaskError(
            f"no value of {options.patch!r} occurs under all {len(names)} conditions, so no patch registers"
        )
    aligned = {name: np.array([rows_of[key] for key in common]) for name, rows_of in by_key.items()}
    clusters = _one_cluster(rows, list(aligned.values()), common)
    pairs = consistency_sums({name: features[chosen] for name, chosen in aligned.items()}, clusters, ks=options.k)
    settings: Settings = {
        "conditions": len(names),
        "pairs": len(pairs.pairs),
        "patches_of_all_conditions": len(common),
        "distance": "cosine",
    }
    columns = {"cosine": pairs.column(), **{f"top_k{k}": pairs.column(k) for k in options.k}}
    design = task.design(clusters, most=MAX_GROUPS)
    figures = {
        name: of_neighbors(median_over_pairs(column)(pairs.sums), design, SHARE if column else CORRELATION)
        for name, column in columns.items()
    }
    return metric_values("consistency", figures, settings, n=len(clusters))


def _by_key(
    chosen: Int64[np.ndarray, " member"], keys: Shaped[np.ndarray, " row"], condition: object
) -> dict[str, int]:
    """The row of each patch key under one condition."""
    row_of: dict[str, int] = {}
    for row in chosen.tolist():
        key = str(keys[row])
        if key in row_of:
            raise TaskError(f"two patches have the key {key!r} under condition {condition}; keys must tell them apart")
        row_of[key] = row
    return row_of


def _one_cluster(
    rows: TaskRows, aligned: list[Int64[np.ndarray, " patch"]], common: list[str]
) -> Shaped[np.ndarray, " patch"]:
    """What each registered patch is drawn with, the same under every condition."""
    first = rows.cluster[aligned[0]]
    for chosen in aligned[1:]:
        differing = np.flatnonzero(rows.cluster[chosen] != first)
        if len(differing):
            i = int(differing[0])
            raise TaskError(
                f"the patch {common[i]!r} is of {first[i]} under one condition and of {rows.cluster[chosen[i]]} under "
                "another; give group = COLUMN, the specimen that all conditions share"
            )
    return first

"""Families about what should not decide: `robustness`, `robustness_paired`, `center`, `bias_drop`, `consistency`."""

import numpy as np
from jaxtyping import Int64, Shaped

from g2l_core.benchmark.families.figures import Drawn, Figure, Settings, TaskInput
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
from g2l_core.metrics.knn.neighbors import nearest
from g2l_core.metrics.probe import balanced_accuracy, confusion
from g2l_core.metrics.robustness import (
    paired_combinations,
    paired_counts,
    pathorob_index,
    ratio_index,
    robustness_counts,
)
from g2l_core.metrics.statistics import cluster_sums, of_sums
from g2l_core.types import Features


def _tested(given: TaskInput, family: str) -> tuple[TaskRows, Features]:
    """The rows that nothing was trained on, every one with its center."""
    chosen = given.test_rows
    rows = given.rows.take(chosen)
    if not rows.center.astype(bool).all():
        raise TaskError(f"{family} needs the column {given.spec.center!r} for every slide; give it in the manifest")
    return rows, given.features[chosen]


def robustness(given: TaskInput) -> list[Figure]:
    """Both indices over k, neighbors sought among all rows of other slides."""
    rows, features = _tested(given, "robustness")
    ks = given.spec.robustness.k
    found = nearest(features, None, max(ks), groups=rows.slide_ids)
    figures = []
    for k in ks:
        counts = robustness_counts(found, rows.label, rows.center, k=k)
        sums = cluster_sums(counts, rows.cluster)
        informative = float(counts[:, 1:].any(axis=1).mean())
        settings: Settings = {
            "k": k,
            "distance": "cosine",
            "design": "all rows",
            "neighbors": "of other slides",
            "support": round(informative, 4),
        }
        for name, index in (("ratio", ratio_index), ("pathorob", pathorob_index)):
            interval = Drawn(statistic=of_sums(index, sums), clusters=rows.cluster)
            figures.append(Figure(metric=f"robustness_{name}_k{k}", interval=interval, n=len(rows), settings=settings))
    return figures


def robustness_paired(given: TaskInput) -> list[Figure]:
    """PathoROB's index over balanced pairs of classes and centers."""
    rows, features = _tested(given, "robustness_paired")
    options = given.spec.robustness
    design = paired_combinations(
        rows.label,
        rows.center,
        rows.slide_ids,
        k=max(options.k),
        rows_per_stratum=options.rows_per_stratum or None,
        seed=given.seed,
    )
    found = paired_counts(features, rows.label, rows.center, rows.slide_ids, design, ks=options.k)
    return [
        Figure(
            metric=f"robustness_paired_k{k}",
            interval=Drawn(
                statistic=of_sums(pathorob_index, cluster_sums(counts.counts, rows.cluster)), clusters=rows.cluster
            ),
            n=counts.occurrences,
            settings={
                "k": k,
                "distance": "cosine",
                "design": f"2x2, {len(design)} combinations",
                "neighbors": "of other slides",
                "support": round(counts.support, 4),
                "class_accuracy": round(counts.class_accuracy, 4),
            },
        )
        for k, counts in found.items()
    ]


def center(given: TaskInput) -> list[Figure]:
    """How well a linear probe tells the center of patients that it was not fitted on; lower is better."""
    rows, features = _tested(given, "center")
    options = given.spec.center_probe
    predicted = predict_centers(features, rows.center, rows.cluster, c=options.c, folds=options.folds, seed=given.seed)
    settings: dict[str, str | int | float | bool] = {
        "C": options.c,
        "split": f"{options.folds} folds by {rows.cluster_unit}",
        "chance": round(1 / len(np.unique(rows.center)), 4),
    }
    if given.spec.label:
        settings["told_by_class"] = round(centers_predicted_by_class(rows.center, rows.label), 4)
    statistic = of_sums(balanced_accuracy, confusion(rows.center, predicted, rows.cluster))
    interval = Drawn(statistic=statistic, clusters=rows.cluster)
    metric = "center_balanced_accuracy"
    return [Figure(metric=metric, interval=interval, n=len(rows), settings=settings, better="lower")]


def bias_drop(given: TaskInput) -> list[Figure]:
    """What probes lose when their training set ties class to center, on test sets that stay the same."""
    rows, features = _tested(given, "bias_drop")
    options = given.spec.bias_drop
    design = BiasDesign(
        centers=options.centers or _largest_centers(rows),
        slides_per_class=options.slides_per_class or 2 * len(options.centers or _largest_centers(rows)),
        rows_per_slide=options.rows_per_slide,
        test_slides=options.test_slides,
        levels=options.levels,
        repeats=options.repeats,
    )
    found = biased_probes(features, rows.label, rows.center, rows.cluster, design, c=options.c, seed=given.seed)
    settings: Settings = {
        "C": options.c,
        "centers": ", ".join(map(str, design.centers)),
        "levels": ", ".join(f"{level:g}" for level in design.levels),
        "cramers_v": ", ".join(f"{value:.2f}" for value in found.cramers_v),
        "patients_per_class": design.slides_per_class,
        "rows_per_patient": design.rows_per_slide,
        "repeats": design.repeats,
    }
    domains = {"in_domain": found.in_domain, "out_of_domain": found.out_of_domain}
    return [
        Figure(
            metric=f"bias_drop_{name}",
            interval=Drawn(statistic=of_sums(average_performance_drop, counts), clusters=rows.cluster),
            n=int(counts[:, 0, 0].sum()),
            settings=settings,
        )
        for name, counts in domains.items()
        if counts.any()
    ]


def _largest_centers(rows: TaskRows) -> tuple[str, ...]:
    """The centers with most patients, as many as there are classes; of equals the first by name."""
    names = np.unique(rows.center)
    sizes = [len(np.unique(rows.cluster[rows.center == name])) for name in names]
    order = np.argsort(np.negative(sizes), kind="stable")[: len(np.unique(rows.label))]
    return tuple(names[np.sort(order)].tolist())


def consistency(given: TaskInput) -> list[Figure]:
    """Whether registered patches agree between scanners and stains; medians over pairs of conditions."""
    options = given.spec.consistency
    rows, features = given.rows, given.features
    conditions, keys = rows.columns[options.condition], rows.columns[options.patch]
    names = np.unique(conditions[conditions != ""])
    if len(names) < 2:
        raise TaskError(
            f"consistency needs two conditions at least in column {options.condition!r}; found {names.tolist()}"
        )
    members = {str(name): _by_key(np.flatnonzero((conditions == name) & (keys != "")), keys, name) for name in names}
    common = sorted(set.intersection(*(set(found) for found in members.values())))
    if not common:
        raise TaskError(
            f"no value of {options.patch!r} occurs under all {len(names)} conditions, so no patch registers"
        )
    aligned = {name: np.array([found[key] for key in common]) for name, found in members.items()}
    clusters = _one_cluster(rows, list(aligned.values()), common)
    found = consistency_sums({name: features[chosen] for name, chosen in aligned.items()}, clusters, ks=options.k)
    settings: Settings = {
        "conditions": len(names),
        "pairs": len(found.pairs),
        "patches_of_all_conditions": len(common),
        "distance": "cosine",
    }
    columns = {"cosine": found.column(), **{f"top_k{k}": found.column(k) for k in options.k}}
    return [
        Figure(
            metric=f"consistency_{name}",
            interval=Drawn(statistic=of_sums(median_over_pairs(column), found.sums), clusters=clusters),
            n=len(common),
            settings=settings,
        )
        for name, column in columns.items()
    ]


def _by_key(
    chosen: Int64[np.ndarray, " member"], keys: Shaped[np.ndarray, " row"], condition: object
) -> dict[str, int]:
    """The row of each patch key under one condition."""
    found: dict[str, int] = {}
    for row in chosen.tolist():
        key = str(keys[row])
        if key in found:
            raise TaskError(f"two patches have the key {key!r} under condition {condition}; keys must tell them apart")
        found[key] = row
    return found


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

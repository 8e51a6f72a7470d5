"""How often a 95 % interval holds the truth, and how often two equal encoders differ at p < 0.05: planted cohorts.

python tests/benchmarks/bench_coverage.py [--repeats 500] [--patients 6 10 20 50 100] [--models plain centers unequal]
    [--positive 0.5 0.15] [--processes 2] [--csv FILE]

Each repeat draws a new test cohort. Patients have 8 to 32 patches ("unequal": 2 to 150, log-normal) and an effect of
their own on every feature; in "centers" the center of a patient shifts its classes too. A third of the patients' effect
and all of the patches' noise differ between two encoders, which are otherwise the same, so that no figure truly
differs. Classifiers are fitted once, on 60 other patients, for both. The truth is the mean figure of
ten sets of 3,000 patients. Of figures that depend on how many patients there are to choose neighbors from, it is the
mean over the repeats.

Methods: "jackknife" is what reports print (`metrics.intervals`); the others draw patients with replacement, where sums
are all that is needed: "percentiles", "BCa" and "studentized". Width is the median. Power: one encoder has 0.6 times
the noise.
"""

import argparse
import csv
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from scipy.special import ndtr, ndtri

from g2l_core.errors import TaskError
from g2l_core.metrics.calibration import brier_score, brier_sums, expected_brier_variance
from g2l_core.metrics.consistency import consistency_sums, median_over_pairs
from g2l_core.metrics.exchange import OfSums
from g2l_core.metrics.fewshot import retrieval_sums
from g2l_core.metrics.intervals import Figure, compare, estimate, of_group_sums, of_neighbors, of_sums
from g2l_core.metrics.knn.leave_out import Search, leave_out_sums
from g2l_core.metrics.knn.neighbors import knn_predict, nearest
from g2l_core.metrics.logistic import design_of as probe_design
from g2l_core.metrics.logistic import fit, probabilities, scaling_of
from g2l_core.metrics.patients import MAX_GROUPS, design_of, leave_out_groups
from g2l_core.metrics.probe import accuracy, auc_figure, balanced_accuracy, confusion, macro_f1, unanimous_variance
from g2l_core.metrics.ridge import correlation_sums, pearson
from g2l_core.metrics.robustness import pathorob_index, ratio_index, robustness_sums
from g2l_core.metrics.scales import CORRELATION, ORDER, POSITIVE, SHARE, SQUARED_ERROR
from g2l_core.metrics.similarity import leave_out_each
from g2l_core.metrics.survival import concordance_index

DIM = 6
CLASSES = np.array([0, 1])
PLANTED = {"plain": (0.0, 0.6), "centers": (0.5, 1.0), "unequal": (0.0, 0.6)}
"""The shift of the classes' axis and of another one between two centers."""
COLUMNS = ["model", "positive", "patients", "figure", "method", "intervals", "none", "coverage", "error", "width"]
COLUMNS += ["false_positives", "power", "truth"]


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """Test patients, and the same patches' features by three encoders."""

    patient: np.ndarray
    label: np.ndarray
    center: np.ndarray
    number: np.ndarray
    """A label that is a number."""
    slide_label: np.ndarray
    """One a patient, as are the next two."""
    time: np.ndarray
    event: np.ndarray
    features: Mapping[str, np.ndarray]
    """By encoder: "one" and "other", which are equally good, "better", and "teacher"."""

    @property
    def patients(self) -> int:
        return len(self.slide_label)


def draw_cohort(rng: np.random.Generator, patients: int, model: str, positive: float) -> Cohort:
    """New patients of a planted population."""
    sizes = rng.integers(8, 33, patients)
    if model == "unequal":
        sizes = np.clip(np.exp(rng.normal(2.7, 1.0, patients)), 2, 150).astype(int)
    patient = np.repeat(np.arange(patients), sizes)
    label, slide_label = (rng.random(size) < positive for size in (len(patient), patients))
    center = rng.integers(2, size=patients)
    effect = rng.normal(0, 0.6, (patients, DIM))
    effect[:, :2] += np.outer(2 * center - 1, PLANTED[model])
    effect[:, 2] += np.where(slide_label, 0.7, -0.7)
    tissue = effect[patient]
    tissue[:, 0] += np.where(label, 0.9, -0.9)

    def encoded(noise: float) -> np.ndarray:
        own = rng.normal(0, 0.3, (patients, DIM))[patient]
        return tissue + noise / 0.8 * own + rng.normal(0, noise, (len(patient), DIM))

    return Cohort(
        patient=patient,
        label=label.astype(np.int64),
        center=center[patient],
        number=effect[patient, 3] + rng.normal(0, 0.5, len(patient)),
        slide_label=slide_label.astype(np.int64),
        time=rng.exponential(np.exp(-effect[:, 4])),
        event=rng.random(patients) < 0.7,
        features={"one": encoded(0.8), "other": encoded(0.8), "better": encoded(0.48), "teacher": encoded(0.5)},
    )


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Classifiers of patches and of slides, fitted once."""

    features: np.ndarray
    label: np.ndarray
    patches: Callable[[np.ndarray], np.ndarray]
    slides: Callable[[np.ndarray], np.ndarray]


def train(model: str, positive: float) -> Trained:
    cohort = draw_cohort(np.random.default_rng(7), 60, model, positive)
    features = cohort.features["one"]
    return Trained(
        features=features,
        label=cohort.label,
        patches=_probe(features, cohort.label),
        slides=_probe(slide_means(cohort, "one"), cohort.slide_label),
    )


def _probe(features: np.ndarray, label: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    scaling = scaling_of(features)
    weights, _ = fit(probe_design(features, label, 2, scaling), 1.0, max_iterations=500)
    return lambda rows: probabilities(rows, scaling, weights)


def slide_means(cohort: Cohort, encoder: str) -> np.ndarray:
    sums = np.zeros((cohort.patients, DIM))
    np.add.at(sums, cohort.patient, cohort.features[encoder])
    return sums / np.bincount(cohort.patient)[:, None]


def classified(name: str, truth: np.ndarray, chances: np.ndarray, predicted: np.ndarray, cluster: np.ndarray):
    """The figures of a classifier, as `benchmark.metric_groups` makes them."""
    by_row, by_class = design_of(cluster, unit="patients"), design_of(cluster, truth, unit="patients")
    codes, _ = leave_out_groups(cluster, len(by_row.counts))
    matrices = confusion(truth, predicted, codes)
    hidden = {"least_variance": unanimous_variance(matrices)}
    brier = brier_sums(truth, chances, CLASSES, codes)
    return {
        f"{name} accuracy": of_group_sums(accuracy, matrices, by_row, SHARE),
        f"{name} balanced accuracy": replace(of_group_sums(balanced_accuracy, matrices, by_class, SHARE), **hidden),
        f"{name} macro F1": replace(of_group_sums(macro_f1, matrices, by_class, SHARE), **hidden),
        f"{name} AUC": auc_figure(truth, chances, CLASSES, cluster, by_class),
        f"{name} Brier score": replace(
            of_group_sums(brier_score, brier, by_row, SQUARED_ERROR), expected_variance=expected_brier_variance(chances)
        ),
    }


def fixed_figures(cohort: Cohort, encoder: str, trained: Trained) -> dict[str, Figure]:
    """Figures of each patch alone."""
    features, patient = cohort.features[encoder], cohort.patient
    votes = knn_predict(nearest(trained.features, features, 5), trained.label, k=5)
    found = classified("patch", cohort.label, trained.patches(features), votes, patient)
    means = slide_means(cohort, encoder)
    chances = trained.slides(means)
    found |= classified("slide", cohort.slide_label, chances, chances.argmax(axis=1), np.arange(cohort.patients))
    guess = 0.6 * features[:, 3]
    errors = np.stack([(cohort.number - guess) ** 2, cohort.number**2], axis=1)
    by_number = design_of(patient, unit="patients", weights=(cohort.number - cohort.number.mean()) ** 2)
    correlations = correlation_sums(guess, cohort.number)
    found["regression Pearson"] = of_sums(pearson, correlations, patient, by_number, CORRELATION)
    found["regression R2"] = of_sums(lambda s: 1 - s[:, 0] / s[:, 1], errors, patient, by_number)
    here = (features[:, 1] > 0).astype(np.int64)
    by_center = design_of(patient, cohort.center, unit="patients", stratum="center")
    codes, _ = leave_out_groups(patient, len(by_center.counts))
    matrices = confusion(cohort.center, here, codes)
    found["center balanced accuracy"] = replace(
        of_group_sums(balanced_accuracy, matrices, by_center, SHARE), least_variance=unanimous_variance(matrices)
    )
    order = np.arange(cohort.patients)
    groups, count = leave_out_groups(order)
    weights = np.vstack([np.ones(len(order), np.int64), np.arange(count)[:, None] != groups]).astype(np.int64)
    risk = concordance_index(cohort.time, cohort.event, means[:, 4], weights)
    found["survival C-index"] = Figure(values=risk, design=design_of(order, unit="p", most=MAX_GROUPS), scale=ORDER)
    return found


def paired_figures(cohort: Cohort, encoder: str) -> dict[str, Figure]:
    """Figures of pairs of patches of different patients."""
    features, patient = cohort.features[encoder].astype(np.float32), cohort.patient
    groups, count = leave_out_groups(patient)
    design = design_of(patient, unit="patients", most=MAX_GROUPS)
    figure, neighbors = partial(Figure, design=design), partial(of_neighbors, design=design)
    found = {}
    teacher = cohort.features["teacher"]
    for name, debiased in (("CKA", True), ("CKA, biased", False)):
        found[name] = figure(values=leave_out_each(features, teacher, groups, debiased))
    totals, _ = robustness_sums(features, cohort.label, cohort.center, patient, patient, ks=[5])
    found["robustness ratio"] = neighbors(ratio_index(totals[5]), scale=POSITIVE)
    found["PathoROB index"] = neighbors(pathorob_index(totals[5]), scale=SHARE)
    search = Search(reference=features, k=5, groups=patient, left_out_with=groups)

    def retrieved(queries, graph):
        return np.column_stack(
            [retrieval_sums(graph, cohort.label, [1, 5], cohort.label[queries])[:, [0, 3]], np.ones(len(queries))]
        )

    sums = leave_out_sums([search], retrieved, groups, count).totals
    found["retrieval top 1"] = neighbors(sums[:, 0] / sums[:, 2], scale=SHARE)
    found["retrieval mAP 5"] = neighbors(sums[:, 1] / sums[:, 2], scale=SHARE)
    scans = consistency_sums({"a": features, "b": teacher.astype(np.float32)}, patient, ks=(1,))
    found["consistency cosine"] = neighbors(median_over_pairs(0)(scans.sums), scale=CORRELATION)
    found["consistency top 1"] = neighbors(median_over_pairs(1)(scans.sums), scale=SHARE)
    return found


def drawn_intervals(figure: Figure, rng: np.random.Generator, draws: int = 300) -> dict[str, tuple[float, float]]:
    """Intervals of a bootstrap over patients, for figures of sums: percentiles, BCa, and studentized by the jackknife.

    References: Efron & Tibshirani, An Introduction to the Bootstrap (1993), equations 14.9 to 14.15 and 12.22.
    """
    if not isinstance(figure.exchange, OfSums):
        return {}
    score, sums = figure.exchange.score, figure.exchange.sums
    count = len(sums)
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float64)
    totals = np.tensordot(drawn, sums, axes=1)
    values, whole = score(totals), figure.values[0]
    found = {"percentiles": tuple(np.nanpercentile(values, (2.5, 97.5)).tolist())}
    moves = figure.values[1:].mean() - figure.values[1:]
    share = np.clip(((values < whole).mean() + (values <= whole).mean()) / 2, 0.5 / draws, 1 - 0.5 / draws)
    acceleration = (moves**3).sum() / max(1e-300, 6 * (moves**2).sum() ** 1.5)
    z = ndtri(share) + np.array([-1.96, 1.96])
    levels = ndtr(ndtri(share) + z / (1 - acceleration * z))
    found["BCa"] = tuple(np.nanpercentile(values, 100 * levels).tolist())
    without = np.stack([score(totals - sums[i]) for i in range(count)])
    weight = np.where(np.isfinite(without), drawn.T / count, 0)  # a patient that was drawn twice is left out twice
    without = np.nan_to_num(without)
    with np.errstate(all="ignore"):
        errors = np.sqrt((count - 1) * (weight * (without - (weight * without).sum(axis=0)) ** 2).sum(axis=0))
        ratios = (values - whole) / errors
    high, low = np.percentile(ratios[np.isfinite(ratios)], (2.5, 97.5)) if np.isfinite(ratios).any() else (0.0, 0.0)
    error = np.sqrt((count - 1) / count * (moves**2).sum())
    found["studentized"] = (float(whole - low * error), float(whole - high * error))
    return found


@dataclass
class Tally:
    """What was found of one figure in one setting."""

    values: list[float]
    bounds: dict[str, list[tuple[float, float]]]
    none: int
    p_equal: list[float]
    p_better: list[float]


def simulate(setting: tuple[str, float, int], repeats: int, pairs_up_to: int) -> dict[str, Tally]:
    """Draw cohorts of one setting, and tally every figure."""
    model, positive, patients = setting
    trained, tallies = train(model, positive), defaultdict(lambda: Tally([], defaultdict(list), 0, [], []))
    for repeat in range(repeats):
        rng = np.random.default_rng([repeat, patients, round(100 * positive), sorted(PLANTED).index(model)])
        cohort = draw_cohort(rng, patients, model, positive)
        sets = [lambda e, c=cohort: fixed_figures(c, e, trained)]
        sets += [lambda e, c=cohort: paired_figures(c, e)] if patients <= pairs_up_to else []
        for figures in sets:
            try:
                one, other, better = (figures(encoder) for encoder in ("one", "other", "better"))
            except TaskError:  # one class only, or one center
                continue
            for name, figure in one.items():
                add(tallies[name], figure, other[name], better[name], rng)
    return {name: replace(tally, bounds=dict(tally.bounds)) for name, tally in tallies.items()}


def add(tally: Tally, figure: Figure, other: Figure, better: Figure, rng: np.random.Generator) -> None:
    if np.isnan(figure.values[0]):
        return
    found = estimate(figure)
    tally.values.append(found.value)
    if np.isnan(found.low):
        tally.none += 1
        return
    tally.bounds["jackknife"].append((found.low, found.high))
    for method, bounds in drawn_intervals(figure, rng).items():
        tally.bounds[method].append(bounds)
    tally.p_equal.append(compare(figure, other, seed=0, draws=500, margin=0.02).p_value)
    tally.p_better.append(compare(better, figure, seed=0, draws=500, margin=0.02).p_value)


def truths(model: str, positive: float, sets: int = 10) -> dict[str, float]:
    """The mean figures of sets of 3,000 patients, of those that do not depend on how many there are.

    One set is not enough: the share of slides that is right varies by 0.006 from one to the next, and a truth that is
    off by 0.02, as one was, takes 0.06 from the coverage of 100 patients.
    """
    trained = train(model, positive)
    cohorts = [draw_cohort(np.random.default_rng([99, number]), 3000, model, positive) for number in range(sets)]
    found = [fixed_figures(cohort, "one", trained) for cohort in cohorts]
    return {name: float(np.mean([figures[name].values[0] for figures in found])) for name in found[0]}


def rows_of(
    setting: tuple[str, float, int], tallies: Mapping[str, Tally], known: Mapping[str, float]
) -> Iterator[dict]:
    """One row of the table for each figure and method."""
    for name, tally in tallies.items():
        truth = known.get(name, float(np.mean(tally.values)))
        for method, bounds in tally.bounds.items():
            low, high = np.array(bounds).T
            held = float(((low <= truth) & (truth <= high)).mean())
            p_equal, p_better = np.array(tally.p_equal), np.array(tally.p_better)
            yield {
                **dict(zip(("model", "positive", "patients"), setting, strict=True)),
                "figure": name,
                "method": method,
                "intervals": len(bounds),
                "none": tally.none,
                "coverage": round(held, 3),
                "error": round(float(np.sqrt(held * (1 - held) / len(bounds))), 3),
                "width": round(float(np.median(high - low)), 3),
                "false_positives": round(float((p_equal < 0.05).mean()), 3) if method == "jackknife" else "",
                "power": round(float((p_better < 0.05).mean()), 3) if method == "jackknife" else "",
                "truth": round(truth, 3),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=500)
    parser.add_argument("--patients", type=int, nargs="+", default=[6, 10, 20, 50, 100])
    parser.add_argument("--models", nargs="+", default=list(PLANTED), choices=list(PLANTED))
    parser.add_argument("--positive", type=float, nargs="+", default=[0.5, 0.15])
    parser.add_argument("--pairs-up-to", type=int, default=50, help="Figures of pairs for so many patients at most.")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--csv", default="", help="A file for the table; default: standard output.")
    options = parser.parse_args()
    settings = list(product(options.models, options.positive, options.patients))
    known = {pair: truths(*pair) for pair in product(options.models, options.positive)}
    run = partial(simulate, repeats=options.repeats, pairs_up_to=options.pairs_up_to)
    with (
        ProcessPoolExecutor(options.processes) as pool,
        Path(options.csv).open("w", newline="") if options.csv else nullcontext(sys.stdout) as file,
    ):
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for setting, tallies in zip(settings, pool.map(run, settings), strict=True):
            table.writerows(rows_of(setting, tallies, known[setting[:2]]))
            file.flush()


if __name__ == "__main__":
    main()

"""Every figure of a benchmark on N patches and two encoders, timed part by part; and the peers' pace on 20,000 rows.

python tests/benchmarks/bench_metrics.py [--rows 100000] [--dims 1024 1536] [--peer-rows 20000]

Features are drawn: 9 classes, 6 centers, 80 patients with 4 slides each, 64 directions shared by all, and noise.
Parts: debiased CKA; votes of the neighbors of other slides, cosine, for four k up to 20; robustness indices;
a probe (C = 1) trained on four fifths of the patients; all with intervals over patients. The peers get the same
float16 rows: scikit-learn's brute force (as float32), and croma's robustness index. The peak is before the peers run.
"""

import argparse
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter, process_time

import numpy as np

from g2l_core.metrics.calibration import brier_score, brier_sums
from g2l_core.metrics.intervals import Figure, estimate, of_group_sums
from g2l_core.metrics.knn.neighbors import knn_predict, nearest
from g2l_core.metrics.patients import MAX_GROUPS, design_of
from g2l_core.metrics.probe import accuracy, auc_figure, balanced_accuracy, confusion, linear_probe, macro_f1
from g2l_core.metrics.robustness import pathorob_index, ratio_index, robustness_counts, robustness_sums
from g2l_core.metrics.scales import POSITIVE, SHARE
from g2l_core.metrics.similarity import leave_out_each

KS = (1, 5, 10, 20)
SCORES = (accuracy, balanced_accuracy, macro_f1)


def draw_cohort(rows: int, dims: list[int], seed: int = 0) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Features of each encoder on the same patches, and the patches' labels."""
    rng = np.random.default_rng(seed)
    slides = np.sort(rng.integers(320, size=rows))
    labels = {"class": rng.integers(9, size=rows), "slide": slides, "patient": slides // 4, "center": slides // 4 % 6}
    shared = rng.standard_normal((rows, 64), dtype=np.float32)
    shared += 0.3 * rng.standard_normal((9, 64), dtype=np.float32)[labels["class"]]
    shared *= np.arange(1, 65, dtype=np.float32) ** -0.5
    features = []
    for dim in dims:
        maps = {"slide": 320, "center": 6}
        means = {name: rng.standard_normal((count, dim), dtype=np.float32) for name, count in maps.items()}
        loadings = rng.standard_normal((64, dim), dtype=np.float32)
        drawn = np.empty((rows, dim), np.float16)
        for start in range(0, rows, 4096):
            part = slice(start, start + 4096)
            block = shared[part] @ loadings + 0.5 * rng.standard_normal((len(shared[part]), dim), dtype=np.float32)
            for name, strength in {"slide": 0.1, "center": 0.2}.items():
                block += strength * means[name][labels[name][part]]
            drawn[part] = block
        features.append(drawn)
    return features, labels


@contextmanager
def timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Adds the time of a part, and says it beside the processor's, which other processes lengthen less."""
    begin, begin_cpu = perf_counter(), process_time()
    yield
    seconds[name] = perf_counter() - begin
    print(f"{name:28s} {seconds[name]:7.1f} s, {process_time() - begin_cpu:7.1f} s of all cores", flush=True)


def evaluate(features: np.ndarray, labels: dict[str, np.ndarray], seconds: dict[str, float]) -> None:
    """Votes, robustness and probe of one encoder, each with its own search and with intervals."""
    width, patients = features.shape[1], labels["patient"]
    by_row, by_class = (design_of(patients, strata, unit="patients") for strata in (None, labels["class"]))
    with timed(f"neighbors and votes, {width}", seconds):
        graph = nearest(features, None, max(KS), groups=labels["slide"])
        for k in KS:
            matrices = confusion(labels["class"], knn_predict(graph, labels["class"], k=k), patients)
            votes = [estimate(of_group_sums(score, matrices, by_class, SHARE)) for score in SCORES]
    with timed(f"neighbors and robustness, {width}", seconds):
        of_slides = labels["class"], labels["center"], labels["slide"], patients
        totals, _ = robustness_sums(features, *of_slides, ks=KS)
        design = design_of(patients, unit="patients", most=MAX_GROUPS)
        indices = [
            estimate(Figure(values=index(totals[k]), design=design))
            for k in KS
            for index in (pathorob_index, ratio_index)
        ]
    with timed(f"probe, {width}", seconds):
        train = patients % 5 > 0
        result = linear_probe(features[train], labels["class"][train], features[~train], seed=0)
    with timed(f"probe's scores, {width}", seconds):
        truth, held = labels["class"][~train], patients[~train]
        given = truth, result.probabilities, result.classes, held
        by_row, by_class = (design_of(held, strata, unit="patients") for strata in (None, truth))
        matrices = confusion(truth, result.predictions, held)
        figures = [of_group_sums(score, matrices, by_class, SHARE) for score in SCORES]
        figures += [of_group_sums(brier_score, brier_sums(*given), by_row, POSITIVE), auc_figure(*given, by_class)]
        scores = [estimate(figure) for figure in figures]
    print(f"  kNN {votes[0].value:.3f}, PathoROB {indices[0].value:.3f}, probe {scores[0].value:.3f}", end="")
    print(f", AUC {scores[4].value:.4f}, Brier {scores[3].value:.4f}, converged {result.converged}")


def against(name: str, mine: Callable[[], object], peer: Callable[[], object]) -> None:
    """Prints both times and their ratio."""
    times = []
    for call in (mine, peer):
        begin = perf_counter()
        call()
        times.append(perf_counter() - begin)
    print(f"{name}: {times[0]:.1f} s here, {times[1]:.1f} s there: {times[1] / times[0]:.1f} times as fast", flush=True)


def compare(features: np.ndarray, labels: dict[str, np.ndarray]) -> None:
    """The peers on the same rows."""
    import pandas as pd
    from croma.metrics.ri import RobustnessIndex
    from sklearn.neighbors import NearestNeighbors

    def brute() -> object:
        wide = features.astype(np.float32)
        return NearestNeighbors(n_neighbors=max(KS) + 1, metric="cosine", algorithm="brute").fit(wide).kneighbors(wide)

    names = {"label": "class", "center": "center", "group_id": "slide"}
    table = pd.DataFrame({column: labels[name] for column, name in names.items()}).astype(str)
    table["sample_id"] = table["image_path"] = [f"p{i}" for i in range(len(features))]

    def croma() -> object:
        return RobustnessIndex.compute_curve(features, table, confounder_column="center", k_values=list(KS))

    def here() -> object:
        graph = nearest(features, None, max(KS), groups=labels["slide"])
        counts = [robustness_counts(graph, labels["class"], labels["center"], k=k) for k in KS]
        return [pathorob_index(count.sum(axis=0, keepdims=True)) for count in counts]

    print(f"on {len(features):,} rows of {features.shape[1]}:")
    against("neighbors, scikit-learn's brute force", lambda: nearest(features, None, max(KS)), brute)
    against("robustness index, croma's", here, croma)


def main() -> None:
    """Print the time of each part, the total, the peak memory, and the ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dims", type=int, nargs=2, default=[1024, 1536])
    parser.add_argument("--peer-rows", type=int, default=20_000)
    asked = parser.parse_args()
    features, labels = draw_cohort(asked.rows, asked.dims)
    print(f"{asked.rows:,} rows, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before", flush=True)
    seconds: dict[str, float] = {}
    with timed("CKA", seconds):
        values = leave_out_each(features[0], features[1], labels["patient"], debiased=True)
        design = design_of(labels["patient"], unit="patients", most=MAX_GROUPS)
        cka = estimate(Figure(values=values, design=design))
    print(f"  {cka.value:.4f} [{cka.low:.4f}, {cka.high:.4f}]")
    for values in features:
        evaluate(values, labels, seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"total {sum(seconds.values()):.1f} s, peak {peak:.2f} GB, load {os.getloadavg()[0]:.1f} after", flush=True)
    chosen = np.sort(np.random.default_rng(0).permutation(asked.rows)[: asked.peer_rows])
    compare(features[1][chosen], {name: values[chosen] for name, values in labels.items()})


if __name__ == "__main__":
    main()

"""Every metric group on a small store with planted features, compared with the pure functions."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.metrics import brier_score_loss, roc_auc_score

from g2l_core.benchmark.evaluate import BenchSpec, evaluate_task
from g2l_core.benchmark.metric_groups import METRIC_GROUPS
from g2l_core.benchmark.rows import bags, gather, parts
from g2l_core.benchmark.spec import (
    NEEDS,
    BiasDropOptions,
    CenterOptions,
    ConsistencyOptions,
    KnnOptions,
    ProbeOptions,
    PrototypeOptions,
    RegressionOptions,
    RetrievalOptions,
    RobustnessOptions,
    SimilarityOptions,
    SurvivalOptions,
    TaskSpec,
    metric_group,
)
from g2l_core.errors import TaskError
from g2l_core.metrics.alignment import central_rows, effective_rank, mutual_neighbors, procrustes_similarity, rbf_cka
from g2l_core.metrics.bags import mean_pool, patch_vote
from g2l_core.metrics.center_bias import (
    BiasDesign,
    average_performance_drop,
    biased_probes,
    centers_predicted_by_class,
    predict_centers,
)
from g2l_core.metrics.consistency import consistency_sums, pair_means
from g2l_core.metrics.intervals import Figure, estimate
from g2l_core.metrics.knn.neighbors import knn_predict, nearest
from g2l_core.metrics.mil import AbmilSettings, train_abmil
from g2l_core.metrics.moments import cka_center, cka_moments
from g2l_core.metrics.patients import design_of
from g2l_core.metrics.probe import balanced_accuracy, confusion, linear_probe
from g2l_core.metrics.ridge import fit_ridge
from g2l_core.metrics.robustness import paired_combinations, paired_counts, pathorob_index
from g2l_core.metrics.similarity import leave_out_each
from g2l_core.metrics.survival import concordance_index, fit_cox
from tests.planted import PATCHES, make_store, write_labels

PATIENTS = 16
STRENGTH = {"teacher": (0.8, 0.0, 0.9), "weak": (0.1, 0.8, 0.1), "strong": (0.6, 0.1, 0.7)}
BENCH = BenchSpec(encoders=("teacher", "weak", "strong"), baseline="weak", draws=100)


def label_row(p, i):
    """Patch i of patient p: patch class, slide class, a number that follows the patch class, and survival."""
    late = p // 2 % 2
    return {
        "slide_id": f"s{p}",
        "x": str(i * 16),
        "y": "0",
        "kind": "ab"[i % 2],
        "grade": "AB"[late],
        "score": f"{i % 2 + 0.1 * (i % 7):.1f}",
        "dead": str(int(p % 5 > 0)),
        "months": str(5 + p % 4 + 8 * late),
        "scanner": "north" if p % 2 else "south",
        "spot": f"{p // 2}-{i}",
        "specimen": f"sp{p // 2}",
        "organ": "breast",
        "x_class": "b" if p % 2 else "a",
    }


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("groups")
    store = make_store(folder / "s.zarr", STRENGTH, patients=PATIENTS)
    write_labels(folder / "labels.csv", [label_row(p, i) for p in range(PATIENTS) for i in range(PATCHES)])
    return folder, store


@pytest.fixture(scope="module")
def evaluated(planted):
    """Evaluates a task, by metrics and keys: the spec, its outcome, its rows, the weak encoder's features, truth."""
    folder, store = planted
    known = {}

    def evaluate(*metrics, **keys):
        spec = TaskSpec(name="t", labels="labels.csv", metrics=metrics, **keys)
        if spec not in known:
            outcome = evaluate_task([store], spec, BENCH, folder)
            assert not outcome.failures
            rows = gather([store], spec, folder)
            known[spec] = spec, outcome, rows, rows.features("weak"), rows.features("teacher")
        return known[spec]

    return evaluate


def value(outcome, metric, encoder="weak"):
    return result(outcome, metric, encoder).estimate.value


def result(outcome, metric, encoder="weak"):
    return next(r for r in outcome.results if (r.metric, r.encoder) == (metric, encoder))


def compared(outcome, metric):
    return {(c.encoder, c.reference) for c in outcome.comparisons if c.metric == metric}


PAIRS = {("weak", "teacher"), ("strong", "teacher"), ("strong", "weak")}


def test_every_group_has_its_needs_and_every_metric_one_group():
    assert list(METRIC_GROUPS) == list(NEEDS)
    assert metric_group("robustness_paired_k5") == "robustness_paired"
    assert metric_group("robustness_ratio_k5") == "robustness"
    assert metric_group("slide_probe_auc") == "slide_probe"
    assert metric_group("knnn_accuracy") == ""


# -- similarity ----------------------------------------------------------------------------------------------


def cka_estimate(values, rows):
    """All rows of the task are tested here."""
    return estimate(Figure(values=values, design=design_of(rows.cluster, unit="patients", most=32)))


def test_cka_is_the_pure_function_s_with_its_interval(evaluated):
    _, outcome, rows, weak, teacher = evaluated("cka")
    for kind in ("debiased", "biased"):
        pure = leave_out_each(weak, teacher, rows.cluster, debiased=kind == "debiased")
        assert result(outcome, f"cka_{kind}").estimate == cka_estimate(pure, rows)
    assert compared(outcome, "cka_debiased") == {("strong", "weak")}


def test_a_torch_device_takes_the_sums_of_every_cka_and_gives_the_same_values(evaluated, planted):
    """With as many rows as planted here the moments serve, not the kernels."""
    folder, store = planted
    spec, outcome, *_ = evaluated("cka", "similarity")
    again = evaluate_task([store], spec, replace(BENCH, device="cpu:0"), folder)
    assert not again.failures
    for found in (r for r in outcome.results if r.encoder == "strong"):
        other = next(r.estimate for r in again.results if (r.metric, r.encoder) == (found.metric, "strong"))
        assert (other.value, other.low) == pytest.approx((found.estimate.value, found.estimate.low), abs=1e-10)
    assert {r.metric for r in again.results} == {r.metric for r in outcome.results}
    for group in ("cka", "similarity"):  # the device is really asked for
        with pytest.raises(RuntimeError, match="nowhere"):
            evaluate_task([store], replace(spec, metrics=(group,)), replace(BENCH, device="nowhere"), folder)


def test_similarity(evaluated):
    options = SimilarityOptions(rows=5000, k=(5, 10), trim=0.02)
    _, outcome, rows, weak, teacher = evaluated("similarity", similarity=options)
    assert value(outcome, "similarity_rbf_cka") == pytest.approx(rbf_cka(weak, teacher, debiased=True, seed=0))
    kept = central_rows(weak, teacher, share=0.02)
    pure = leave_out_each(weak[kept], teacher[kept], rows.cluster[kept], debiased=True)
    assert result(outcome, "similarity_trimmed_cka").estimate == cka_estimate(pure, rows)
    graphs = [nearest(features, None, 10) for features in (weak, teacher)]
    shared = mutual_neighbors(*graphs, [5])
    assert value(outcome, "similarity_mutual_knn_k5") == pytest.approx(shared.mean() / 5)
    moments = cka_moments(weak, teacher, center=cka_center(weak, teacher))
    assert value(outcome, "similarity_procrustes") == pytest.approx(procrustes_similarity(moments))
    for encoder, features in (("weak", weak), ("teacher", teacher)):
        assert value(outcome, "similarity_effective_rank", encoder) == pytest.approx(effective_rank(features))
    for name in ("rbf_cka", "trimmed_cka", "mutual_knn_k10", "procrustes", "ridge_r2", "projected_cosine"):
        metric = f"similarity_{name}"
        assert value(outcome, metric, "weak") < value(outcome, metric, "strong"), metric
        assert compared(outcome, metric) == {("strong", "weak")}
    assert compared(outcome, "similarity_effective_rank") == PAIRS


def test_the_ridge_map_is_scored_on_other_patients(evaluated):
    spec, outcome, rows, weak, teacher = evaluated("similarity", split="split")
    ((train, test),) = parts(rows, spec, 0)
    found = fit_ridge(weak[train], teacher[train], rows.cluster[train], folds=5, seed=0)
    truth = teacher[test].astype(np.float64)
    errors, spread = found.predict(weak[test]) - truth, truth - teacher[train].mean(axis=0, dtype=np.float64)
    assert value(outcome, "similarity_ridge_r2") == pytest.approx(1 - (errors**2).sum() / (spread**2).sum())
    assert result(outcome, "similarity_ridge_r2").n == len(test)


def test_drawn_rows_are_the_same_for_every_encoder_and_told(evaluated):
    _, outcome, *_ = evaluated("similarity", similarity=SimilarityOptions(rows=100))
    drawn = [r for r in outcome.results if "rows_drawn" in r.settings]
    assert {r.metric for r in drawn} == {
        "similarity_rbf_cka",
        "similarity_mutual_knn_k10",
        "similarity_effective_rank",
    }
    assert all(r.n == r.settings["rows_drawn"] == 100 for r in drawn)


# -- patches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("distance", "weights"), [("cosine", "similarity"), ("euclidean", "distance")])
def test_knn_for_several_k_and_votes(evaluated, distance, weights):
    options = KnnOptions(k=(3, 9), distance=distance, votes=("majority", "weighted"))
    spec, outcome, rows, weak, _ = evaluated("knn", label="kind", split="split", knn=options)
    ((train, test),) = parts(rows, spec, 0)
    graph = nearest(weak[train], weak[test], 9, metric=distance)
    for prefix, how in (("knn", "uniform"), ("knn_weighted", weights)):
        said = knn_predict(graph, rows.label[train], k=3, weights=how)
        assert value(outcome, f"{prefix}_accuracy_k3") == pytest.approx((said == rows.label[test]).mean())
    assert result(outcome, "knn_weighted_f1_k9").settings["k"] == 9
    assert compared(outcome, "knn_f1_k9") == PAIRS


def test_probe_scores_are_scikit_learn_s(evaluated):
    spec, outcome, rows, weak, _ = evaluated("probe", label="kind", split="split", probe=ProbeOptions(c=(0.1, 1.0)))
    ((train, test),) = parts(rows, spec, 0)
    probe = linear_probe(
        weak[train], rows.label[train], weak[test], c_values=(0.1, 1.0), groups=rows.cluster[train], folds=5, seed=0
    )
    truth = rows.label[test] == "b"
    assert value(outcome, "probe_auc") == pytest.approx(roc_auc_score(truth, probe.probabilities[:, 1]))
    assert value(outcome, "probe_brier") == pytest.approx(2 * brier_score_loss(truth, probe.probabilities[:, 1]))
    shown = result(outcome, "probe_ece")
    assert shown.settings["C"] == probe.c
    assert shown.settings["C_chosen_by"] == "log loss on 5 folds of the training part"
    assert shown.better == "lower"
    assert result(outcome, "probe_auc").better == "higher"


def test_one_training_patient_of_a_class_leaves_no_choice_of_c(planted, tmp_path):
    _, store = planted
    write_labels(tmp_path / "labels.csv", [{"slide_id": f"s{p}", "kind": "ab"[p == 2 or p > 11]} for p in range(16)])
    spec = TaskSpec(name="t", labels="labels.csv", label="kind", split="split", metrics=("probe",))
    found = evaluate_task([store], spec, BENCH, tmp_path)
    assert {r.settings["C"] for r in found.results} == {1.0}
    assert found.results[0].settings["C_chosen_by"] == "1, as a class has one training patient"
    refused = evaluate_task([store], replace(spec, probe=ProbeOptions(c=(0.1, 1.0))), BENCH, tmp_path)
    assert all("every class needs two training patients; give one C" in f.reason for f in refused.failures)


def test_prototypes_gain_from_shots(evaluated):
    options = PrototypeOptions(shots=(1, 16), repeats=10)
    _, outcome, *_ = evaluated("prototypes", label="kind", split="split", prototypes=options)
    one, many = (f"prototypes_accuracy_shots{shots}" for shots in (1, 16))
    assert value(outcome, one, "strong") < value(outcome, many, "strong")
    assert value(outcome, many, "weak") < value(outcome, many, "strong")
    assert result(outcome, many).n == PATIENTS * PATCHES // 2
    assert result(outcome, many).settings["repeats"] == 10


def test_regression_is_pearson_s(evaluated):
    options = RegressionOptions(penalties=(0.1,))
    spec, outcome, rows, weak, _ = evaluated("regression", label="score", split="split", regression=options)
    ((train, test),) = parts(rows, spec, 0)
    truth = rows.label.astype(float)
    found = fit_ridge(weak[train], truth[train, None], rows.cluster[train], penalties=(0.1,), seed=0)
    said = found.predict(weak[test])[:, 0]
    assert value(outcome, "regression_pearson") == pytest.approx(pearsonr(said, truth[test]).statistic)
    spread = ((truth[test] - truth[train].mean()) ** 2).sum()
    assert value(outcome, "regression_r2") == pytest.approx(1 - ((said - truth[test]) ** 2).sum() / spread)
    assert value(outcome, "regression_r2", "weak") < value(outcome, "regression_r2", "strong")


def test_regression_over_folds_tests_every_patch_once(evaluated):
    _, outcome, *_ = evaluated("regression", label="score", folds=4)
    assert result(outcome, "regression_r2").n == PATIENTS * PATCHES


def test_retrieval_seeks_among_other_patients(evaluated):
    options = RetrievalOptions(k=(1, 5))
    _, outcome, rows, weak, _ = evaluated("retrieval", label="kind", retrieval=options)
    graph = nearest(weak, None, 5, groups=rows.cluster)
    hits = rows.label[graph.indices] == rows.label[:, None]
    assert value(outcome, "retrieval_top_k5") == pytest.approx(hits.any(axis=1).mean())
    assert value(outcome, "retrieval_map_k1") == pytest.approx(hits[:, 0].mean())
    assert value(outcome, "retrieval_map_k5", "weak") < value(outcome, "retrieval_map_k5", "strong")


# -- slides and patients -----------------------------------------------------------------------------------

SLIDES = {"label": "grade", "split": "split", "probe": ProbeOptions(c=(1.0,))}


def test_slide_probe_is_the_probe_of_mean_features(evaluated):
    spec, outcome, rows, weak, _ = evaluated("slide_probe", **SLIDES)
    whole = bags(rows, spec)
    names, means = mean_pool(weak, rows.slide_ids)
    assert names.tolist() == whole.names.tolist()
    train, test = whole.part == "train", whole.part == "test"
    said = linear_probe(means[train], whole.label[train], means[test], seed=0).predictions
    assert value(outcome, "slide_probe_accuracy") == pytest.approx((said == whole.label[test]).mean())
    assert value(outcome, "slide_probe_auc", "teacher") == 1
    assert result(outcome, "slide_probe_auc").n == PATIENTS // 2
    assert result(outcome, "slide_probe_auc").settings["bag"] == "slide"


def test_slide_vote_is_the_vote_of_a_patch_probe(evaluated):
    spec, outcome, rows, weak, _ = evaluated("slide_vote", **SLIDES)
    ((train, test),) = parts(rows, spec, 0)
    probe = linear_probe(weak[train], rows.label[train], weak[test], seed=0)
    vote = patch_vote(probe.probabilities, probe.classes, rows.slide_ids[test])
    whole = bags(rows, spec)
    truth = whole.label[whole.part == "test"]
    assert value(outcome, "slide_vote_accuracy") == pytest.approx((vote.majority == truth).mean())
    assert value(outcome, "slide_vote_accuracy", "teacher") == 1


def test_abmil_is_the_pure_function_s(evaluated):
    settings = AbmilSettings(width=16, attention_width=8, most_epochs=8, folds=2)
    spec, outcome, rows, weak, _ = evaluated("abmil", label="grade", split="split", abmil=settings, bag="patient")
    whole = bags(rows, spec)
    train, test = (np.flatnonzero(whole.part == part) for part in ("train", "test"))
    fit, asked = whole.rows(train), whole.rows(test)
    found = train_abmil(
        *(weak[fit], rows.cluster[fit], whole.label[train], whole.cluster[train], weak[asked], rows.cluster[asked]),
        settings=settings,
        seed=0,
    )
    truth = whole.label[test] == "B"
    assert value(outcome, "abmil_auc") == pytest.approx(roc_auc_score(truth, found.probabilities[:, 1]))
    shown = result(outcome, "abmil_auc").settings
    assert (shown["width"], shown["bag"], shown["epochs"]) == (16, "patient", str(found.epochs))


def test_folds_of_bags_test_every_bag_once(evaluated):
    _, outcome, *_ = evaluated("slide_probe", label="grade", folds=4)
    assert result(outcome, "slide_probe_f1").n == PATIENTS


SURVIVAL = SurvivalOptions(event="dead", time="months", penalties=(1.0,))


def test_survival_is_harrell_s_c_of_a_cox_model(evaluated):
    _, outcome, rows, weak, _ = evaluated("survival", split="split", survival=SURVIVAL)
    names, means = mean_pool(weak, rows.cluster)
    people = [label_row(int(name[1:]), 0) for name in names]
    times, events = (np.array([float(person[key]) for person in people]) for key in ("months", "dead"))
    test = np.array([int(name[1:]) >= PATIENTS // 2 for name in names])
    model = fit_cox(means[~test], times[~test], events[~test] > 0, penalty=1.0)
    pure = concordance_index(times[test], events[test] > 0, model.risks(means[test]))
    assert value(outcome, "survival_c_index") == pytest.approx(pure[0])
    assert value(outcome, "survival_c_index", "teacher") > 0.65
    shown = result(outcome, "survival_c_index")
    assert (shown.n, shown.settings["events"]) == (PATIENTS // 2, int(events[test].sum()))


def test_survival_over_folds_pairs_within_them(evaluated):
    _, outcome, *_ = evaluated("survival", folds=3, survival=replace(SURVIVAL, penalties=(0.1, 1.0), folds=2))
    assert result(outcome, "survival_c_index").n == PATIENTS
    assert value(outcome, "survival_c_index", "teacher") > 0.65


# -- centers and conditions --------------------------------------------------------------------------------


def test_the_paired_index(evaluated):
    options = RobustnessOptions(k=(3, 5))
    _, outcome, rows, weak, _ = evaluated("robustness", "robustness_paired", label="kind", robustness=options)
    design = paired_combinations(rows.label, rows.center, rows.slide_ids, k=5, seed=0)
    pure = paired_counts(weak, rows.label, rows.center, rows.slide_ids, design, ks=(3, 5))[5]
    shown = result(outcome, "robustness_paired_k5")
    assert shown.estimate.value == pytest.approx(pathorob_index(pure.counts.sum(axis=0)[None])[0])
    assert shown.settings["support"] == pytest.approx(pure.support, abs=1e-4)
    assert shown.settings["design"] == "2x2, 1 combinations"
    assert value(outcome, "robustness_paired_k5", "weak") < 0.5 < value(outcome, "robustness_paired_k5", "strong")
    assert compared(outcome, "robustness_paired_k3") == PAIRS


def test_the_center_is_told_beside_chance(evaluated):
    options = CenterOptions(folds=4)
    _, outcome, rows, weak, _ = evaluated("center", label="kind", center_probe=options)
    said = predict_centers(weak, rows.center, rows.cluster, folds=4, seed=0)
    shown = result(outcome, "center_balanced_accuracy")
    assert shown.estimate.value == pytest.approx(balanced_accuracy(confusion(rows.center, said))[0])
    assert shown.settings["chance"] == 0.5
    assert shown.settings["told_by_class"] == pytest.approx(centers_predicted_by_class(rows.center, rows.label))
    assert shown.better == "lower"
    assert shown.estimate.value > value(outcome, "center_balanced_accuracy", "teacher")


def test_the_drop_under_bias(evaluated):
    options = BiasDropOptions(rows_per_slide=8, repeats=4)
    _, outcome, rows, weak, _ = evaluated("bias_drop", label="kind", bias_drop=options)
    design = BiasDesign(centers=("north", "south"), slides_per_class=4, rows_per_slide=8, repeats=4)
    pure = biased_probes(weak, rows.label, rows.center, rows.cluster, design, seed=0)
    drop = average_performance_drop(pure.in_domain.sum(axis=0)[None])[0]
    assert value(outcome, "bias_drop_in_domain") == pytest.approx(drop)
    assert not [r for r in outcome.results if r.metric == "bias_drop_out_of_domain"]  # there is no other center


def test_an_encoder_that_knows_the_center_loses_under_bias(planted, tmp_path):
    folder, _ = planted
    strength = {"teacher": (0.4, 0.0), "weak": (0.4, 1.5), "strong": (0.4, 0.1)}
    store = make_store(tmp_path / "s.zarr", strength, patients=PATIENTS)
    options = BiasDropOptions(rows_per_slide=8, repeats=2)
    spec = TaskSpec(name="t", labels="labels.csv", label="kind", metrics=("bias_drop",), bias_drop=options)
    outcome = evaluate_task([store], spec, BENCH, folder)
    drops = {r.encoder: r.estimate.value for r in outcome.results}
    assert drops["weak"] < -0.1 < drops["strong"]


def test_consistency_between_conditions(evaluated):
    options = ConsistencyOptions(condition="scanner", patch="spot", k=(1, 5))
    _, outcome, rows, weak, _ = evaluated("consistency", group="specimen", consistency=options)
    spots, scanners = rows.columns["spot"], rows.columns["scanner"]
    order = [sorted(np.flatnonzero(scanners == name), key=lambda row: spots[row]) for name in ("north", "south")]
    pure = consistency_sums({str(i): weak[o] for i, o in enumerate(order)}, rows.cluster[order[0]], ks=(1, 5))
    means = pair_means(pure.sums)[0, 0]
    shown = [value(outcome, f"consistency_{name}") for name in ("cosine", "top_k1", "top_k5")]
    assert shown == pytest.approx(means.tolist())
    assert "8 groups of specimen" in result(outcome, "consistency_cosine").estimate.method


def test_places_and_names_register_patches_without_a_column(planted, tmp_path):
    _, store = planted
    write_labels(tmp_path / "labels.csv", [{"slide_id": f"s{p}", "scanner": "AB"[p]} for p in range(2)])
    options = ConsistencyOptions(condition="scanner", patch="corner", k=(1,))
    spec = TaskSpec(name="t", labels="labels.csv", metrics=("consistency",), group="split", consistency=options)
    found = evaluate_task([store], spec, BENCH, tmp_path)
    assert result(found, "consistency_cosine").n == PATCHES
    assert not found.failures


# -- what cannot be evaluated ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"metrics": ("probe", "regression")}, "regression takes the label for a number, probe for a class"),
        ({"metrics": ("survival",)}, "survival needs survival_event and survival_time"),
        ({"metrics": ("consistency",)}, "consistency needs consistency_condition"),
        ({"metrics": ()}, "unknown metric ''; known: cka, similarity"),
        ({"bag": "block"}, "bag must be slide or patient; got 'block'"),
        ({"split": "", "folds": 1}, "folds must be at least 2; got 1"),
    ],
)
def test_tasks_that_mean_nothing(keys, words):
    with pytest.raises(TaskError, match=words):
        TaskSpec(**{"name": "t", "metrics": ("probe",), "label": "kind", "split": "split", **keys})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (lambda: KnnOptions(k=(0,)), r"knn_k must be different whole numbers of at least 1; got \[0\]"),
        (lambda: KnnOptions(k=(5, 5)), r"knn_k must be different whole numbers .*; got \[5, 5\]"),
        (lambda: KnnOptions(distance="manhattan"), "knn_distance must be cosine or euclidean; got 'manhattan'"),
        (lambda: KnnOptions(votes=("loud",)), "knn_votes must be among majority, weighted"),
        (lambda: ProbeOptions(c=()), "probe_c must be positive numbers"),
        (lambda: ProbeOptions(folds=1), "probe_folds must be at least 2; got 1"),
        (lambda: PrototypeOptions(shots=(0,)), "prototypes_shots must be"),
        (lambda: RetrievalOptions(distance=""), "retrieval_distance must be"),
        (lambda: RegressionOptions(penalties=(0.0,)), "regression_penalties must be positive"),
        (lambda: SurvivalOptions(penalties=(float("inf"),)), "survival_penalties must be positive"),
        (lambda: SimilarityOptions(rows=3), "similarity_rows must be at least 4"),
        (lambda: SimilarityOptions(trim=0.5), "similarity_trim must be in"),
        (lambda: RobustnessOptions(rows_per_stratum=1), "robustness_rows_per_stratum must be 0 or at least 2"),
        (lambda: CenterOptions(c=-1.0), "center_probe_c must be positive"),
        (lambda: BiasDropOptions(repeats=0), "bias_drop_repeats must be"),
        (lambda: ConsistencyOptions(k=()), "consistency_k must be"),
    ],
)
def test_options_that_mean_nothing(options, words):
    with pytest.raises(TaskError, match=words):
        options()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"metrics": ("slide_probe",), "label": "kind"}, "each bag has one kind, but s0 has"),
        ({"metrics": ("regression",), "label": "kind"}, "column 'kind' must hold numbers"),
        ({"metrics": ("prototypes",), "prototypes": PrototypeOptions(shots=(999,))}, "fewer than the 999 shots"),
        (
            {"metrics": ("retrieval",), "label": "organ"},
            "retrieval needs two classes at least; all 320 rows are breast",
        ),
        ({"metrics": ("survival",), "survival": SurvivalOptions(event="kind", time="months")}, "has"),
        ({"metrics": ("survival",), "survival": SurvivalOptions(event="grade", time="months")}, "must be 1 or 0"),
        ({"metrics": ("survival",), "survival": SurvivalOptions(event="dead", time="scanner")}, "must hold numbers"),
        ({"metrics": ("survival",), "survival": SurvivalOptions(event="no", time="months")}, "both 'no' and 'months'"),
        ({"metrics": ("probe",), "split": "", "folds": 20}, "class a is in 16 patients, fewer than the 20 folds"),
        ({"metrics": ("center",), "center": "hospital"}, "center needs the column 'hospital' for every slide"),
        (
            {"metrics": ("robustness_paired",), "label": "x_class"},
            "needs two classes that both occur in two centers",
        ),
        ({"metrics": ("bias_drop",), "bias_drop": BiasDropOptions(slides_per_class=5)}, "a multiple of the 2 centers"),
        (
            {"metrics": ("consistency",), "consistency": ConsistencyOptions(condition="organ")},
            "found ['breast']",
        ),
        (
            {"metrics": ("consistency",), "consistency": ConsistencyOptions(condition="scanner", patch="kind")},
            "two patches have the key 'a' under condition north",
        ),
        (
            {"metrics": ("consistency",), "consistency": ConsistencyOptions(condition="scanner", patch="none")},
            "no value of 'none' occurs under all 2 conditions",
        ),
        (
            {"metrics": ("consistency",), "consistency": ConsistencyOptions(condition="scanner", patch="spot")},
            "give group = COLUMN, the specimen that all conditions share",
        ),
    ],
)
def test_one_line_of_what_cannot_be_evaluated(planted, keys, words):
    folder, store = planted
    spec = TaskSpec(**{"name": "t", "labels": "labels.csv", "label": "kind", "split": "split", **keys})
    found = evaluate_task([store], spec, BENCH, folder)
    assert not found.results
    assert {f.encoder for f in found.failures} == {"teacher", "weak", "strong"}
    for failure in found.failures:
        assert failure.reason.startswith(f"{spec.metrics[0]}: ")
        assert words in failure.reason
        assert "\n" not in failure.reason

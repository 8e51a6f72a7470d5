"""The probe against a direct minimizer, scores against scikit-learn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from g2l_core.errors import TaskError
from g2l_core.metrics import logistic
from g2l_core.metrics.patients import design_of
from g2l_core.metrics.probe import (
    accuracy,
    auc_figure,
    balanced_accuracy,
    confusion,
    linear_probe,
    macro_auc,
    macro_f1,
)


def problem(seed, classes=3, n=150, dim=6, noise=1.5):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    means = rng.standard_normal((classes, dim))
    features = (means[labels] + noise * rng.standard_normal((n, dim))) * np.geomspace(1, 100, dim) + 10
    return features.astype(np.float32), labels


def softmax_reference(train, labels, test, c):
    """Minimizes sum of losses + |W|^2 / (2 C) directly, with one weight vector a class."""
    mean, deviation = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64)
    x, held = (train - mean) / deviation, (test - mean) / deviation
    hot = np.eye(labels.max() + 1)[labels]

    def logp(w, rows):
        scores = rows @ w[:-1] + w[-1]
        return scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)

    def loss(flat):
        w = flat.reshape(-1, hot.shape[1])
        log = logp(w, x)
        residual = np.exp(log) - hot
        slope = np.vstack([x.T @ residual + w[:-1] / c, residual.sum(0)])
        return -(log * hot).sum() + (w[:-1] ** 2).sum() / (2 * c), slope.ravel()

    start = np.zeros((x.shape[1] + 1) * hot.shape[1])
    best = minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-5})
    return np.exp(logp(best.x.reshape(-1, hot.shape[1]), held))


@pytest.mark.parametrize("c", [0.01, 1.0])
def test_probabilities_are_those_of_the_penalized_maximum(c):
    features, labels = problem(0)
    result = linear_probe(features[:100], labels[:100], features[100:], c_values=(c,), seed=0)
    expected = softmax_reference(features[:100], labels[:100], features[100:], c)
    np.testing.assert_allclose(result.probabilities, expected, atol=1e-4)
    assert result.converged
    assert result.c == c


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("doubles", [0, 1 << 22])
def test_equals_scikit_learn_in_either_precision(classes, c, doubles, monkeypatch):
    monkeypatch.setattr(logistic, "_DOUBLE_VALUES", doubles)
    features, labels = problem(8, classes, n=400, dim=20, noise=2.0)
    features = features.astype(np.float16)
    result = linear_probe(features[:300], labels[:300], features[300:], c_values=(c,), seed=0)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, tol=1e-9, max_iter=5000))
    expected = model.fit(features[:300].astype(np.float64), labels[:300]).predict_proba(features[300:].astype(float))
    assert result.converged
    np.testing.assert_allclose(result.probabilities, expected, atol=1e-4)


@pytest.mark.parametrize(("classes", "rows", "dim"), [(2, 300, 512), (2, 300, 64), (5, 500, 100)])
def test_separable_classes_with_a_weak_penalty_are_fitted_to_the_end(classes, rows, dim):
    """L-BFGS alone says that it has converged with probabilities that are off by several percent."""
    rng = np.random.default_rng(0)
    labels, mixing = rng.integers(classes, size=rows), 0.3 * rng.standard_normal((dim, dim))
    features = rng.standard_normal((rows, dim)) @ mixing + rng.standard_normal((classes, dim))[labels]
    others = rng.standard_normal((500, dim)) @ mixing
    result = linear_probe(features, labels, others, c_values=(1000.0,), seed=0)
    solver = "newton-cholesky" if classes == 2 else "newton-cg"
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1000.0, tol=1e-10, max_iter=10_000, solver=solver))
    assert result.converged
    np.testing.assert_allclose(result.probabilities, model.fit(features, labels).predict_proba(others), atol=5e-3)


def test_nearly_collinear_features_take_few_iterations():
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=600)
    shared = rng.standard_normal((600, 1)) * 30
    features = (shared + rng.standard_normal((600, 40)) + rng.standard_normal((3, 40))[labels]).astype(np.float32)
    assert linear_probe(features, labels, features, max_iterations=60, seed=0).converged


def test_scale_and_shift_of_a_feature_do_not_matter():
    features, labels = problem(1)
    moved = features.astype(np.float64) * np.array([1, 10, 1e3, 1e-3, 5, 1.0]) - 7
    plain, other = (linear_probe(f[:100], labels[:100], f[100:], seed=0) for f in (features, moved))
    np.testing.assert_allclose(plain.probabilities, other.probabilities, atol=1e-5)


def test_names_as_labels():
    features, labels = problem(2)
    names = np.array(["tumor", "stroma", "fat"])[labels]
    result = linear_probe(features[:100], names[:100], features[100:], seed=0)
    np.testing.assert_array_equal(result.classes, ["fat", "stroma", "tumor"])
    assert np.mean(result.predictions == names[100:]) > 0.5


def test_penalty_is_the_best_on_folds_that_share_no_patient():
    features, labels = problem(3, noise=4.0)
    patients = np.arange(150) % 15
    grid = (10.0, 0.001, 0.1)
    result = linear_probe(features, labels, features[:10], c_values=grid, groups=patients, folds=3, seed=4)
    parts = list(StratifiedGroupKFold(3, shuffle=True, random_state=4).split(features, labels, patients))
    losses = {
        c: sum(sk.log_loss(labels[h], softmax_reference(features[f], labels[f], features[h], c)) for f, h in parts)
        for c in grid
    }
    assert result.c == min(losses, key=losses.get)
    assert all(not set(patients[f]) & set(patients[h]) for f, h in parts)


def test_of_equal_penalties_the_strongest_is_taken():
    _, labels = problem(3)
    patients = np.arange(150) % 15
    result = linear_probe(
        np.ones((150, 6)), labels, np.ones((2, 6)), c_values=(10.0, 0.1, 1.0), groups=patients, seed=0
    )
    assert result.c == 0.1


def test_stopping_early_is_reported_and_not_warned():
    features, labels = problem(4)
    result = linear_probe(features, labels, features, c_values=(1e6,), max_iterations=2, seed=0)
    assert not result.converged


def test_a_constant_feature_is_harmless():
    features, labels = problem(5)
    features[:, 2] = 3.0
    assert np.isfinite(linear_probe(features, labels, features, seed=0).probabilities).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": np.zeros(150, int)}, "all 150 labels are"),
        ({"labels": np.zeros(149, int)}, "train 150, labels 149"),
        ({"test": np.ones((3, 5), np.float32)}, "train_dim 6, test_dim 5"),
        ({"test": np.full((3, 6), np.nan, np.float32)}, "3 of 3 rows of the test features"),
        ({"c_values": (0.1, 1.0)}, "give the patient of each row"),
        ({"c_values": (0.1, 1.0), "groups": np.arange(150) % 4}, "4 groups, fewer than the 5 folds"),
        ({"c_values": (0.1, 1.0), "groups": np.arange(10)}, "labels 150, groups 10"),
    ],
)
def test_bad_input_is_refused(change, said):
    features, labels = problem(6)
    arguments = {"train": features, "labels": labels, "test": features[:3], "seed": 0} | change
    with pytest.raises(TaskError, match=said):
        linear_probe(**arguments)


labelings = (
    st.integers(2, 4)
    .flatmap(lambda c: st.lists(st.tuples(st.integers(0, c - 1), st.integers(0, c - 1)), min_size=2, max_size=40))
    .filter(lambda pairs: len({t for t, _ in pairs}) > 1)
)


@given(pairs=labelings)
def test_scores_of_predictions_equal_scikit_learn(pairs):
    truth, predicted = (np.array(column) for column in zip(*pairs, strict=True))
    matrix = confusion(truth, predicted)
    np.testing.assert_array_equal(matrix[0], sk.confusion_matrix(truth, predicted))
    assert accuracy(matrix)[0] == pytest.approx(sk.accuracy_score(truth, predicted), abs=1e-15)
    recalls = sk.recall_score(truth, predicted, average=None, labels=np.unique(truth), zero_division=0)
    assert balanced_accuracy(matrix)[0] == pytest.approx(recalls.mean(), abs=1e-15)
    assert macro_f1(matrix)[0] == pytest.approx(sk.f1_score(truth, predicted, average="macro"), abs=1e-15)


def test_balanced_accuracy_equals_scikit_learn():
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(3, size=(2, 200))
    assert balanced_accuracy(confusion(truth, predicted))[0] == pytest.approx(
        sk.balanced_accuracy_score(truth, predicted), abs=1e-15
    )


@given(seed=st.integers(0, 2**32 - 1), classes=st.integers(2, 5), decimals=st.sampled_from([1, 2, 9]))
def test_auc_equals_scikit_learn_with_ties_and_weights(seed, classes, decimals):
    rng = np.random.default_rng(seed)
    truth = np.r_[np.arange(classes), rng.integers(classes, size=60)]
    scores = np.round(rng.dirichlet(np.ones(classes), size=len(truth)), decimals)
    weights = rng.integers(1, 4, size=(3, len(truth)))
    got = macro_auc(truth, scores, np.arange(classes), weights)
    for value, weight in zip(got, weights, strict=True):
        repeated = np.repeat(np.arange(len(truth)), weight)
        columns = [1] if classes == 2 else range(classes)
        expected = np.mean([sk.roc_auc_score(truth[repeated] == c, scores[repeated, c]) for c in columns])
        assert value == pytest.approx(expected, abs=1e-12)


def test_macro_auc_equals_scikit_learns_own():
    features, labels = problem(7)
    result = linear_probe(features[:100], labels[:100], features[100:], seed=0)
    expected = sk.roc_auc_score(labels[100:], result.probabilities, multi_class="ovr", average="macro")
    assert macro_auc(labels[100:], result.probabilities, result.classes)[0] == pytest.approx(expected, abs=1e-12)


@given(seed=st.integers(0, 2**32 - 1), classes=st.integers(2, 4), decimals=st.sampled_from([1, 9]))
def test_areas_without_each_patient_equal_those_of_the_other_rows(seed, classes, decimals):
    rng = np.random.default_rng(seed)
    truth = np.r_[np.arange(classes), rng.integers(classes, size=50)]
    scores = np.round(rng.dirichlet(np.ones(classes), size=len(truth)), decimals)
    patients = rng.integers(6, size=len(truth))
    names = np.unique(patients)
    design = design_of(patients, truth, unit="patients")
    got = auc_figure(truth, scores, np.arange(classes), patients, design).values
    kept = [np.ones(len(truth), bool), *(patients != name for name in names)]
    weights = np.stack(kept).astype(np.int64)
    np.testing.assert_allclose(got, macro_auc(truth, scores, np.arange(classes), weights), atol=1e-12)


def test_exchanging_all_patients_exchanges_the_encoders():
    rng = np.random.default_rng(0)
    truth, patients = rng.integers(3, size=90), np.arange(90) % 9
    design = design_of(patients, truth, unit="patients")
    one, other = (
        auc_figure(truth, rng.dirichlet(np.ones(3), size=90), np.arange(3), patients, design) for _ in range(2)
    )
    nobody, everyone = one.exchange.differences(other.exchange, np.array([[False] * 9, [True] * 9]))
    assert nobody == pytest.approx(one.values[0] - other.values[0], abs=1e-12)
    assert everyone == pytest.approx(-nobody, abs=1e-12)


def test_of_two_classes_the_second_ones_score_counts():
    truth = np.array([0, 0, 1, 1])
    scores = np.array([[0.1, 0.2], [0.3, 0.3], [0.5, 0.4], [0.4, 0.1]])
    assert macro_auc(truth, scores, np.arange(2))[0] == 0.5
    assert macro_auc(truth, scores[:, ::-1], np.arange(2))[0] == sk.roc_auc_score(truth, scores[:, 0])


def test_draws_that_lack_a_class():
    truth = np.array([0, 0, 1, 2])
    scores = np.array([[0.8, 0.1, 0.1], [0.2, 0.5, 0.3], [0.1, 0.7, 0.2], [0.3, 0.3, 0.4]])
    weights = np.array([[1, 1, 1, 0], [2, 0, 0, 0]])
    got = macro_auc(truth, scores, np.arange(3), weights)
    assert got[0] == pytest.approx((1.0 + 1.0) / 2)
    assert np.isnan(got[1])


def test_confusion_by_cluster():
    truth, predicted = np.array(list("aabb")), np.array(list("abbc"))
    matrices = confusion(truth, predicted, np.array([5, 9, 5, 9]))
    np.testing.assert_array_equal(matrices[0], [[1, 0, 0], [0, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(matrices[1], [[0, 1, 0], [0, 0, 1], [0, 0, 0]])


def test_scores_that_cannot_be_had():
    probabilities = np.full((4, 2), 0.5)
    with pytest.raises(TaskError, match="two true classes"):
        confusion(np.zeros(4, int), np.ones(4, int))
    with pytest.raises(TaskError, match="truth 4, predicted 3"):
        confusion(np.arange(4), np.arange(3))
    with pytest.raises(TaskError, match="two true classes"):
        macro_auc(np.zeros(4, int), probabilities, np.arange(2))
    with pytest.raises(TaskError, match=r"classes \[2, 3\] occur in the truth"):
        macro_auc(np.arange(4), probabilities, np.arange(2))
    with pytest.raises(TaskError, match="columns 2, classes 3"):
        macro_auc(np.arange(4), probabilities, np.arange(3))

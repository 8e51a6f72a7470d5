"""Survival against lifelines, by hand, and on planted truth."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lifelines import CoxPHFitter
from lifelines.utils import concordance_index as lifelines_concordance
from scipy.optimize import minimize
from sklearn.model_selection import StratifiedKFold

from g2l_core.errors import TaskError
from g2l_core.metrics.survival import choose_cox_penalty, concordance_index, fit_cox


def cohort(seed, n=150, dim=4, effect=1.0, tied=True):
    """Exponential survival whose hazard follows the first feature, with censoring and (if asked) tied times."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((n, dim)) * np.geomspace(1, 50, dim) + 3
    signal = (features[:, 0] - 3) * effect
    death, leaves = rng.exponential(np.exp(-signal)), rng.exponential(1.5, n)
    times = np.minimum(death, leaves)
    return features, np.ceil(times * 8) if tied else times, death <= leaves


def by_lifelines(features, times, events, penalty):
    table = pd.DataFrame(features).assign(time=times, event=events)
    table.columns = table.columns.astype(str)
    exact = {"precision": 1e-12, "r_precision": 1e-15}
    return CoxPHFitter(penalizer=penalty).fit(table, "time", "event", fit_options=exact).params_.to_numpy()


@given(
    rows=st.lists(st.tuples(st.integers(0, 6), st.booleans(), st.integers(-3, 3), st.integers(0, 3)), min_size=3),
)
def test_concordance_equals_lifelines_with_ties_everywhere_and_copies(rows):
    times, events, risks, weights = (np.array(column) for column in zip(*rows, strict=True))
    copies = np.repeat(np.arange(len(rows)), weights)
    try:
        expected = lifelines_concordance(times[copies], -risks[copies], events[copies])
    except ZeroDivisionError:
        expected = np.nan
    try:
        got = concordance_index(times, events, risks.astype(np.float32), weights[None])
    except TaskError:  # no event, or no pair even without weights
        got = [np.nan]
    np.testing.assert_array_equal(got, [expected])


@given(seed=st.integers(0, 2**32 - 1))
def test_only_the_order_of_risks_counts_and_the_reverse_order_gives_the_rest(seed):
    features, times, events = cohort(seed, n=40)
    risks = features[:, 0]
    (value,) = concordance_index(times, events, risks)
    assert concordance_index(times, events, np.exp(risks / 3))[0] == value
    assert concordance_index(times, events, -risks)[0] == pytest.approx(1 - value, abs=1e-12)
    assert concordance_index(times, events, np.zeros(40))[0] == 0.5


def test_concordance_by_hand():
    """Pairs: A-B, A-C, A-D; B-D (B dies at 3, D is censored then); B and C die together, C-D as B-D."""
    times, events = np.array([1, 3, 3, 3]), np.array([True, True, True, False])
    np.testing.assert_array_equal(concordance_index(times, events, np.array([4.0, 2.0, 1.0, 1.0])), [4.5 / 5])
    draws = np.array([[1, 1, 1, 1], [2, 1, 0, 0], [0, 1, 1, 0]])
    np.testing.assert_array_equal(
        concordance_index(times, events, np.array([1.0, 2.0, 1.0, 0.0]), draws), [3.5 / 5, 0, np.nan]
    )


def test_blocks_do_not_matter(monkeypatch):
    features, times, events = cohort(0)
    weights = np.random.default_rng(0).integers(0, 3, (5, 150))
    whole = concordance_index(times, events, features[:, 0], weights)
    monkeypatch.setattr("g2l_core.metrics.survival._BLOCK_PAIRS", 7 * 150)
    np.testing.assert_array_equal(concordance_index(times, events, features[:, 0], weights), whole)


@pytest.mark.parametrize("penalty", [0.01, 0.3])
@pytest.mark.parametrize("tied", [True, False])
def test_coefficients_equal_lifelines(penalty, tied):
    """To 1e-7 of the coefficients of standardized features; lifelines stops at its own tolerance."""
    features, times, events = cohort(2, tied=tied)
    assert tied == (len(np.unique(times[events])) < events.sum())
    model = fit_cox(features, times, events, penalty=penalty)
    expected = by_lifelines(features, times, events, penalty) * features.std(axis=0, ddof=1)
    np.testing.assert_allclose(model.coefficients, expected, atol=1e-7)
    assert model.converged
    risks = model.risks(features)
    np.testing.assert_allclose(risks - risks[0], (features - features[0]) @ (expected / model.scale), atol=1e-5)


def efron(x, times, events, penalty, beta):
    """The penalized likelihood event time by event time, as Efron's formula is written."""
    total = 0.0
    for time in np.unique(times[events]):
        dying = events & (times == time)
        d = dying.sum()
        everyone, they = np.exp(x[times >= time] @ beta).sum(), np.exp(x[dying] @ beta).sum()
        total += (x[dying] @ beta).sum() - sum(np.log(everyone - share / d * they) for share in range(d))
    return total - len(x) * penalty * beta @ beta / 2


def test_more_features_than_patients_reach_the_maximum_of_the_formula():
    features, times, events = cohort(3, n=25, dim=40)
    model = fit_cox(features, times, events, penalty=0.2)
    x = (features - features.mean(axis=0)) / features.std(axis=0, ddof=1)
    best = minimize(lambda beta: -efron(x, times, events, 0.2, beta), np.zeros(40), method="BFGS", tol=1e-6)
    np.testing.assert_allclose(model.coefficients, best.x, atol=1e-4)
    assert efron(x, times, events, 0.2, model.coefficients) >= -best.fun - 1e-9


def test_components_are_those_of_the_standardized_features():
    features, times, events = cohort(4, dim=8)
    x = (features - features.mean(axis=0)) / features.std(axis=0, ddof=1)
    axes = np.linalg.svd(x, full_matrices=False)[2][:2]
    kept = fit_cox(features, times, events, penalty=0.1, components=2).coefficients
    np.testing.assert_allclose(axes.T @ (axes @ kept), kept, atol=1e-10)
    whole, all_of_them = (fit_cox(features, times, events, penalty=0.1, components=c) for c in (None, 8))
    np.testing.assert_array_equal(whole.coefficients, all_of_them.coefficients)


def test_a_constant_feature_has_no_weight():
    features, times, events = cohort(5)
    constant = np.column_stack([features, np.full(150, 0.1)])
    model = fit_cox(constant, times, events, penalty=0.1)
    assert model.coefficients[-1] == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(model.coefficients[:-1], fit_cox(features, times, events, penalty=0.1).coefficients)


def test_held_out_concordance_rises_with_the_planted_effect():
    values = []
    for effect in (0.0, 0.3, 0.8, 2.0):
        features, times, events = cohort(6, n=600, effect=effect)
        model = fit_cox(features[:300], times[:300], events[:300], penalty=0.01)
        values.append(concordance_index(times[300:], events[300:], model.risks(features[300:]))[0])
    assert (np.diff(values) > 0.03).all()
    assert values[0] == pytest.approx(0.5, abs=0.05)


@settings(deadline=None, max_examples=3)
@given(seed=st.integers(0, 2**32 - 1))
def test_penalty_is_that_of_the_greatest_cross_validated_likelihood(seed):
    features, times, events = cohort(seed, n=60, dim=10)
    grid = (0.01, 0.1, 1.0, 10.0)
    got = choose_cox_penalty(features, times, events, penalties=grid, folds=3, seed=5)
    gains = dict.fromkeys(grid, 0.0)
    for fit, _ in StratifiedKFold(3, shuffle=True, random_state=5).split(features, events):
        for penalty in grid:
            model = fit_cox(features[fit], times[fit], events[fit], penalty=penalty)
            x = (features - model.mean) / model.scale
            gains[penalty] += efron(x, times, events, 0, model.coefficients)
            gains[penalty] -= efron(x[fit], times[fit], events[fit], 0, model.coefficients)
    assert got == max(gains, key=gains.get)


def test_noise_asks_for_a_strong_penalty():
    features, times, events = cohort(7, n=80, dim=60, effect=0.0)
    assert choose_cox_penalty(features, times, events, penalties=(0.01, 0.1, 10.0), seed=0) == 10.0
    features, times, events = cohort(7, n=200, dim=1, effect=2.0)
    assert choose_cox_penalty(features, times, events, penalties=(0.01, 0.1, 10.0), seed=0) == 0.01


def test_what_cannot_be_evaluated_is_refused():
    features, times, events = cohort(8, n=20)
    with pytest.raises(TaskError, match="none of 20 patients has an event"):
        fit_cox(features, times, np.zeros(20, bool), penalty=0.1)
    with pytest.raises(TaskError, match="1 of 20 are not, the first is -2"):
        concordance_index(np.where(np.arange(20) == 3, -2.0, times), events, features[:, 0])
    with pytest.raises(TaskError, match="5 folds need at least 2 folds.*got 4 patients"):
        choose_cox_penalty(features[:4], times[:4], np.ones(4, bool), penalties=(1.0, 2.0), seed=0)
    with pytest.raises(TaskError, match="20 patients, 2 events"):
        choose_cox_penalty(features, times, np.arange(20) < 2, penalties=(1.0, 2.0), folds=3, seed=0)
    with pytest.raises(TaskError, match="no two patients"):
        concordance_index(np.array([1, 2, 2]), np.array([False, True, True]), np.zeros(3))
    with pytest.raises(TaskError, match="events 19"):
        concordance_index(times, events[1:], features[:, 0])
    with pytest.raises(TaskError, match="the risks hold NaN"):
        concordance_index(times, events, np.full(20, np.nan))
    with pytest.raises(TaskError, match="penalty above 0"):
        fit_cox(features, times, events, penalty=0.0)
    with pytest.raises(TaskError, match="20 patients are alike"):
        fit_cox(np.ones((20, 3)), times, events, penalty=0.1)

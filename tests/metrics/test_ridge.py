"""Ridge maps against scikit-learn, its choice of the penalty, and planted maps."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import pearsonr
from sklearn.linear_model import Ridge

from g2l_core.errors import TaskError
from g2l_core.metrics.intervals import estimate, of_sums
from g2l_core.metrics.patients import design_of
from g2l_core.metrics.ridge import correlation_sums, explained_share, fit_ridge, mean_cosine, pearson, ridge_sums

SEEDS = st.integers(0, 2**32 - 1)


def planted(seed, n=200, dim_x=8, dim_y=5, noise=1.0):
    """Targets that are a linear map of x, plus noise; both far from the origin."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, dim_x)) * np.geomspace(0.1, 10, dim_x) + 50
    y = (x - 50) @ rng.standard_normal((dim_x, dim_y)) / 5 + noise * rng.standard_normal((n, dim_y)) - 20
    return x, y, np.arange(n) // 10


def sklearn_ridge(x, y, penalty):
    return Ridge(alpha=penalty * len(x) * x.var(axis=0).mean()).fit(x, y)


@pytest.mark.parametrize("penalty", [1e-6, 0.1, 10.0])
@given(seed=SEEDS)
def test_predictions_equal_scikit_learn(penalty, seed):
    x, y, slides = planted(seed)
    found = fit_ridge(x[:150], y[:150], slides[:150], penalties=(penalty,), seed=0)
    np.testing.assert_allclose(found.predict(x[150:]), sklearn_ridge(x[:150], y[:150], penalty).predict(x[150:]))


@pytest.mark.parametrize("noise", [0.1, 30.0])
def test_the_penalty_is_the_best_on_folds_that_share_no_slide(noise):
    x, y, slides = planted(1, noise=noise)
    grid = (1e-3, 1e-1, 10.0)
    found = fit_ridge(x, y, slides, penalties=grid, folds=4, seed=5)
    fold = (np.random.default_rng(5).permutation(20) % 4)[slides]
    errors = {
        t: sum(
            ((sklearn_ridge(x[fold != f], y[fold != f], t).predict(x[fold == f]) - y[fold == f]) ** 2).sum()
            for f in range(4)
        )
        for t in grid
    }
    assert found.penalty == min(errors, key=errors.get) == (1e-3 if noise < 1 else 10.0)


def test_scores_on_held_out_slides():
    x, y, slides = planted(2)
    found = fit_ridge(x[:150], y[:150], slides[:150], seed=0)
    held, truth = found.predict(x[150:]), y[150:]
    sums = ridge_sums(found, x[150:], y[150:])
    total = sums.sum(axis=0, keepdims=True)
    baseline = ((truth - y[:150].mean(axis=0)) ** 2).sum()
    assert explained_share(total)[0] == pytest.approx(1 - ((held - truth) ** 2).sum() / baseline, abs=1e-12)
    cosines = (held * truth).sum(1) / np.linalg.norm(held, axis=1) / np.linalg.norm(truth, axis=1)
    assert mean_cosine(total)[0] == pytest.approx(cosines.mean(), abs=1e-12)
    design = design_of(slides[150:], unit="slides")
    interval = estimate(of_sums(explained_share, sums, slides[150:], design))
    assert interval.low < interval.value < interval.high < 1


def test_more_shared_variance_explains_more_and_none_explains_nothing():
    shares = []
    for noise in (0.5, 5.0, 50.0):
        x, y, slides = planted(3, n=400, noise=noise)
        found = fit_ridge(x[:300], y[:300], slides[:300], seed=0)
        shares.append(explained_share(ridge_sums(found, x[300:], y[300:]).sum(axis=0, keepdims=True))[0])
    assert shares[0] > 0.9
    assert shares[0] > shares[1] > shares[2]
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((400, 20)), rng.standard_normal((400, 4))
    found = fit_ridge(x[:300], y[:300], np.arange(300) // 10, seed=0)
    assert abs(explained_share(ridge_sums(found, x[300:], y[300:]).sum(axis=0, keepdims=True))[0]) < 0.05


@given(seed=SEEDS)
def test_pearson_equals_scipy(seed):
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal(50) + 1000
    predicted = truth + rng.standard_normal(50)
    got = pearson(correlation_sums(predicted, truth).sum(axis=0, keepdims=True))[0]
    assert got == pytest.approx(pearsonr(predicted, truth).statistic, abs=1e-10)
    rows = rng.integers(50, size=50)
    drawn = pearson(correlation_sums(predicted, truth)[rows].sum(axis=0, keepdims=True))[0]
    assert drawn == pytest.approx(pearsonr(predicted[rows], truth[rows]).statistic, abs=1e-10)


def test_one_continuous_label():
    x, y, slides = planted(4)
    found = fit_ridge(x[:150], y[:150, :1], slides[:150], seed=0)
    predicted = found.predict(x[150:])[:, 0]
    assert pearson(correlation_sums(predicted, y[150:, 0]).sum(axis=0, keepdims=True))[0] > 0.5


def test_what_cannot_be_fitted():
    x, y, slides = planted(0)
    found = fit_ridge(x, y, slides, seed=0)
    for call, said in (
        (lambda: fit_ridge(x, y[1:], slides, seed=0), "x 200, y 199"),
        (lambda: fit_ridge(x, y, slides // 5, seed=0), "got 5 folds, 4 groups"),
        (lambda: fit_ridge(x, y, slides, penalties=(0.0,), seed=0), "penalties are positive"),
        (lambda: fit_ridge(np.ones_like(x), y, slides, penalties=(1.0,), seed=0), "are alike"),
        (lambda: ridge_sums(found, x[:, 1:], y), "x_dim 7, map_x_dim 8"),
    ):
        with pytest.raises(TaskError, match=said):
            call()

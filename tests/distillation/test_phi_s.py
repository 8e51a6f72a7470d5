"""PHI-S: Hadamard matrices, one variance for every dimension, and a way back, against independent ways to get them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import hadamard as sylvester

from g2l_core.distillation.objective import Objective, TargetStatistics
from g2l_core.distillation.phi_s import equalizing_rotation, hadamard, phi_s_matrix
from g2l_core.distillation.spec import ObjectiveSpec
from g2l_core.errors import UsageError


def features(n, dim, seed=0):
    """Correlated, of very different variances, off center."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, dim)) * np.logspace(-2, 1, dim) @ np.linalg.qr(rng.normal(size=(dim, dim)))[0] + 5


def statistics(x):
    covariance = np.cov(x.T, bias=True)
    return TargetStatistics(
        mean=torch.from_numpy(x.mean(0).astype(np.float32)),
        deviation=torch.from_numpy(x.std(0).astype(np.float32)),
        phi_s=torch.from_numpy(phi_s_matrix(covariance).astype(np.float32)),
    )


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 36, 192, 384, 576, 768, 1280, 1536])
def test_hadamard_matrices_of_encoders_widths(order):
    found = hadamard(order)
    assert set(np.unique(found)) <= {-1, 1}
    assert np.array_equal(found.astype(np.float32) @ found.T.astype(np.float32), order * np.eye(order))


def test_orders_without_one():
    """There is none where the order is above 2 and no multiple of 4; of 92, these constructions know none."""
    assert all(hadamard(order) is None for order in (3, 6, 10, 30, 92))


def test_it_is_what_radio_computes():
    """(H / sqrt(d)) U^T / sqrt(mean eigenvalue), with SciPy's Hadamard matrix, as in the authors' program."""
    x = features(300, 16)
    eigenvalues, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    wanted = sylvester(16) / 4 @ vectors.T / np.sqrt(eigenvalues.mean())
    np.testing.assert_allclose(phi_s_matrix(np.cov(x.T, bias=True)), wanted, atol=1e-9)


@given(dim=st.integers(1, 40), seed=st.integers(0, 1000))
def test_every_dimension_gets_variance_one_and_directions_keep_their_proportions(dim, seed):
    x = features(3 * dim + 5, dim, seed)
    matrix = phi_s_matrix(np.cov(x.T, bias=True).reshape(dim, dim))
    y = (x - x.mean(0)) @ matrix.T
    np.testing.assert_allclose(y.var(axis=0), 1, rtol=1e-6)
    before, after = (np.linalg.norm(z[1:] - z[0], axis=1) for z in (x, y))
    np.testing.assert_allclose(after / after[0], before / before[0], rtol=1e-6)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=30))
def test_rotations_equalize_any_eigenvalues(values):
    eigenvalues = np.array(values)
    found = equalizing_rotation(eigenvalues)
    np.testing.assert_allclose(found @ found.T, np.eye(len(values)), atol=1e-9)
    np.testing.assert_allclose(
        np.diag(found @ np.diag(eigenvalues) @ found.T), eigenvalues.mean(), atol=1e-9 * (1 + eigenvalues.max())
    )


@pytest.mark.parametrize("dim", [24, 30, 768])
def test_the_way_back_is_exact_to_1e_5(dim):
    x = features(dim + 50, dim).astype(np.float16).astype(np.float32)
    found = statistics(x.astype(np.float64))
    objective = Objective(ObjectiveSpec(loss="mse", teacher_norm="phi-s"), found)
    y = objective._compared(torch.zeros(len(x), dim), torch.from_numpy(x))[1]
    back = found.restored(y)
    assert float((back - torch.from_numpy(x)).abs().max()) < 1e-5 * float(np.abs(x).max())


def test_features_that_do_not_vary():
    with pytest.raises(UsageError, match="the teacher's features are the same for all training patches"):
        phi_s_matrix(np.zeros((8, 8)))
    with pytest.raises(UsageError, match="no matrix of PHI-S"):
        TargetStatistics(mean=torch.zeros(2), deviation=torch.ones(2)).restored(torch.zeros(1, 2))

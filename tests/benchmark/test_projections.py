"""What reports plot, against definitions written out and cases drawn by hand."""

from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from g2l_core.benchmark.projections import (
    cells_of,
    chosen_rows,
    cka_matrix,
    coded,
    component_colors,
    means_of_cells,
    principal_components,
    umap_plane,
    within_unit,
)
from g2l_core.errors import TaskError


def drawn(rows, dim, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, dim)) * np.arange(1, dim + 1) + 5


def debiased_cka(x, y):
    """Song et al. (2012), equation 5, with whole kernels."""

    def hsic(k, other):
        n = len(k)
        k, other = k - np.diag(np.diag(k)), other - np.diag(np.diag(other))
        one = np.ones(n)
        mixed = (one @ k @ one) * (one @ other @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ other @ one)
        return np.trace(k @ other) + mixed

    k, other = x @ x.T, y @ y.T
    return hsic(k, other) / np.sqrt(hsic(k, k) * hsic(other, other))


def test_the_matrix_holds_the_cka_of_every_pair():
    x = drawn(40, 6)
    features = {"a": x, "b": x[:, :3] @ drawn(3, 5, seed=1), "c": drawn(40, 4, seed=2)}
    matrix = cka_matrix(features)
    expected = [[debiased_cka(one, other) for other in features.values()] for one in features.values()]
    np.testing.assert_allclose(matrix, expected, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(matrix, matrix.T)


def test_a_constant_encoder_has_no_cka_and_the_other_pairs_have():
    matrix = cka_matrix({"a": drawn(20, 3), "flat": np.ones((20, 2)), "b": drawn(20, 3, seed=1)})
    np.testing.assert_array_equal(np.isnan(matrix), [[False, True, False], [True, True, True], [False, True, False]])


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"a": drawn(9, 2), "b": drawn(8, 2)}, "same length"),
        ({"a": drawn(3, 2), "b": drawn(3, 2)}, "at least 4 rows"),
        ({"a": drawn(9, 2), "b": np.full((9, 2), np.nan)}, "9 of 9 rows of b hold NaN"),
    ],
)
def test_the_matrix_refuses_what_has_no_cka(features, message):
    with pytest.raises(TaskError, match=message):
        cka_matrix(features)


@pytest.mark.parametrize(("rows", "dim"), [(200, 7), (12, 30)])
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_components_are_the_eigenvectors_of_the_covariance(rows, dim, dtype):
    features = drawn(rows, dim).astype(dtype)
    found = principal_components(features, 3)
    centered = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    variances, axes = np.linalg.eigh(np.cov(centered.T))
    axes = axes[:, ::-1][:, :3]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(3)])
    np.testing.assert_allclose(found.components_.T, axes, atol=1e-8)
    np.testing.assert_allclose(found.explained_variance_ratio_, variances[::-1][:3] / variances.sum(), atol=1e-10)
    np.testing.assert_allclose(found.transform(features), centered @ axes, rtol=1e-6, atol=1e-6)


def test_all_directions_are_found_where_they_are_few():
    np.testing.assert_allclose(principal_components(drawn(50, 2), 2).explained_variance_ratio_.sum(), 1)


def test_components_need_directions_to_vary_along():
    flat = np.outer(np.arange(9.0), [1.0, 2.0, 3.0])
    with pytest.raises(TaskError, match="fewer than 2 directions"):
        principal_components(flat, 2)
    with pytest.raises(TaskError, match="fewer than 3 directions"):
        principal_components(drawn(9, 2), 3)
    with pytest.raises(TaskError, match="fewer than 1 directions"):
        principal_components(np.ones((9, 2)), 1)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 3))
def test_chosen_rows_are_distinct_sorted_and_a_function_of_the_seed(rows, most, seed):
    chosen = chosen_rows(rows, most, seed)
    assert len(chosen) == min(rows, most)
    assert (np.diff(chosen) > 0).all()
    assert 0 <= chosen.min() <= chosen.max() < rows
    np.testing.assert_array_equal(chosen, chosen_rows(rows, most, seed))


def test_another_seed_chooses_other_rows():
    assert set(chosen_rows(1000, 50, 0)) != set(chosen_rows(1000, 50, 1))


def test_points_keep_their_shape_within_the_unit_square():
    points = np.array([[0.0, 0.0], [4.0, 0.0], [2.0, 3.0]])
    inside = within_unit(points)
    np.testing.assert_allclose(inside, (points - [2.0, 1.0]) / 2)
    np.testing.assert_array_equal(within_unit(np.ones((3, 2))), np.zeros((3, 2)))


def test_names_are_sorted_and_numbered():
    names, codes = coded(np.array(["b", "a", "b"]))
    assert names == ("a", "b")
    assert codes.tolist() == [1, 0, 1]


def test_cells_are_patches_where_they_are_few_enough():
    coords = np.array([[100, 50], [150, 50], [100, 150]], np.int32)
    cells = cells_of(coords, 50, max_cells=3)
    assert cells.side == 50
    assert list(zip(cells.columns.tolist(), cells.rows.tolist(), strict=True)) == [(0, 0), (0, 2), (1, 0)]
    assert cells.of_patch.tolist() == [0, 2, 1]


def test_cells_grow_until_they_are_few_enough_and_hold_means():
    x, y = np.meshgrid(np.arange(4) * 10, np.arange(4) * 10)
    coords = np.stack([x.ravel(), y.ravel()], axis=1).astype(np.int32)
    cells = cells_of(coords, 10, max_cells=4)
    assert cells.side == 20
    means = means_of_cells(coords.astype(np.float64), cells.of_patch)
    np.testing.assert_array_equal(means, [[5, 5], [5, 25], [25, 5], [25, 25]])


def test_colors_grow_with_their_component():
    scores = np.stack([np.linspace(-3, 5, 101), np.zeros(101), -np.linspace(0, 1, 101)], axis=1)
    colors = component_colors(scores)
    red, green, blue = (np.array([int(color[i], 16) for color in colors]) for i in range(3))
    assert (red[0], red[50], red[-1]) == (0, 8, 15)
    assert (np.diff(red) >= 0).all()
    assert set(green) == {0}
    np.testing.assert_array_equal(blue, red[::-1])


def test_one_odd_patch_does_not_dim_the_others():
    scores = np.concatenate([np.linspace(0, 1, 400), [1e6]])[:, None].repeat(3, axis=1)
    colors = component_colors(scores)
    assert colors[0] == "000"
    assert colors[398] == colors[400] == "fff"


def test_without_umap_there_is_no_such_plane(monkeypatch):
    def absent(name):
        assert name == "umap-learn"
        raise PackageNotFoundError(name)

    monkeypatch.setattr("g2l_core.benchmark.projections.version", absent)
    assert umap_plane(drawn(30, 4), seed=0) is None


def test_umap_separates_distant_groups_and_repeats_itself():
    try:
        version("umap-learn")
    except PackageNotFoundError:
        pytest.skip("umap-learn is not installed")
    features = np.concatenate([drawn(40, 4), drawn(40, 4) + 100]).astype(np.float16)
    plane = umap_plane(features, seed=0)
    np.testing.assert_array_equal(plane, umap_plane(features, seed=0))
    means = plane[:40].mean(axis=0), plane[40:].mean(axis=0)
    assert np.linalg.norm(means[0] - means[1]) > 2 * plane[:40].std()
    assert umap_plane(features[:15], seed=0) is None

"""Multinomial logistic regression on many wide rows: L-BFGS on whitened weights.

The features of encoders are strongly correlated, which makes plain L-BFGS take hundreds of steps. Here rows are turned
to their principal axes once, and each axis has its own scale, in which the objective is nearly round. The penalty has
no preferred direction, so turning changes nothing else. Fewer rows than columns span few axes, which suffice: the best
weights are a sum of rows. Decision 17
(docs/decisions/17-logistic-solver.md) compares it with scikit-learn's solvers; tests hold its probabilities to those of
`sklearn.linear_model.LogisticRegression`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int64
from scipy.linalg import eigh, svd
from scipy.optimize import OptimizeResult, minimize

from g2l_core.metrics.knn.normalized import widened
from g2l_core.metrics.rows import row_blocks

GRADIENT_TOLERANCE = 1e-7
"""L-BFGS stops where the mean objective's gradient is no larger along any principal axis; scikit-learn: 1e-4."""

PROBABILITY_TOLERANCE = 1e-5
"""A fit has converged where Newton's step would change no training row's probability by more."""
_NEWTON_STEPS = 20
_ROWS = 1024
"""Rows taken at a time: their float64 copies stay in the processor's cache."""
_DOUBLE_VALUES = 1 << 24
"""Up to this many scaled values are kept in float64 (128 MiB), more in float32. All arithmetic is in float64, because
the noise of a float32 loss ends line searches far from the minimum."""


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Scales columns to mean 0 and variance 1; constant ones only to mean 0."""

    mean: Float64[np.ndarray, " dim"]
    deviation: Float64[np.ndarray, " dim"]

    def apply(self, features: Float[np.ndarray, "row dim"], dtype: Any = np.float64) -> Float[np.ndarray, "row dim"]:
        """Return the (row, dim) scaled features."""
        scaled = np.empty(features.shape, dtype)
        for rows in row_blocks(len(features), _ROWS):
            scaled[rows] = (widened(features[rows]) - self.mean) / self.deviation
        return scaled


def scaling_of(features: Float[np.ndarray, "row dim"]) -> Scaling:
    """Return the scaling by the features' own mean and deviation.

    Examples:
        >>> scaling_of(np.array([[0.0, 7.0], [2.0, 7.0]])).apply(np.array([[3.0, 8.0]])).tolist()
        [[2.0, 1.0]]
    """
    blocks = list(row_blocks(len(features)))
    mean = sum(widened(features[b]).sum(axis=0, dtype=np.float64) for b in blocks) / len(features)
    squares = sum(np.square(widened(features[b]) - mean).sum(axis=0) for b in blocks)
    deviation = np.sqrt(squares / len(features))
    constant = deviation <= 10 * np.finfo(np.float64).eps * np.abs(mean)
    return Scaling(mean=mean, deviation=np.where(constant, 1.0, deviation))


@dataclass(frozen=True, kw_only=True)
class Design:
    """Training rows ready for fits with any penalty."""

    rows: Float[np.ndarray, "row axis"]
    """Scaled features along their principal axes. Their means are 0, so that the intercepts do not mix with the
    weights."""
    codes: Int64[np.ndarray, " row"]
    """The class of each row, from 0."""
    classes: int
    axes: Float64[np.ndarray, "dim axis"]
    """Orthonormal columns: the principal axes, which span all rows."""
    spread: Float64[np.ndarray, " axis"]
    """Mean square of the rows along each axis."""


def design_of(
    features: Float[np.ndarray, "row dim"], codes: Int64[np.ndarray, " row"], classes: int, scaling: Scaling
) -> Design:
    """Scale the training rows and turn them to their principal axes.

    Args:
        features: (row, dim) features of the training rows.
        codes: (row,) class of each row, from 0.
        classes: Number of classes.
        scaling: From `scaling_of`.

    Returns:
        The design, which serves fits with any penalty.
    """
    rows = scaling.apply(features, np.float64 if features.size <= _DOUBLE_VALUES else np.float32)
    if len(rows) < rows.shape[1]:
        turned, lengths, axes = svd(rows.astype(np.float64, copy=False), full_matrices=False, check_finite=False)
        spread = np.square(lengths) / len(rows)
        return Design(rows=turned * lengths, codes=codes, classes=classes, axes=axes.T, spread=spread)
    gram = np.zeros((rows.shape[1], rows.shape[1]))
    for part in row_blocks(len(rows)):
        gram += rows[part].T @ rows[part]
    spread, axes = eigh(gram / len(rows), check_finite=False)
    for part in row_blocks(len(rows), _ROWS):
        rows[part] = rows[part] @ axes
    # Rounding leaves an axis without rows a little below 0.
    return Design(rows=rows, codes=codes, classes=classes, axes=axes, spread=np.maximum(spread, 0.0))


def fit(
    design: Design,
    c: float,
    *,
    start: Float64[np.ndarray, "column class"] | None = None,
    max_iterations: int,
    rough: bool = False,
) -> tuple[Float64[np.ndarray, "column class"], bool]:
    """Minimize the sum of the log losses + |W|^2 / (2 C), intercepts not penalized.

    With two classes, one weight vector is fitted, as in scikit-learn, and returned as two opposite halves. L-BFGS works
    on V = D W, W being the weights along the principal axes and D^2 = S / K + 1 / (n C), S their mean squares: the
    Hessian where all K classes are equally likely (with two classes, 4 in place of K) is D^2.

    Args:
        design: The training rows.
        c: The inverse penalty.
        start: (dim + 1, class) weights to start from, such as those of a neighboring C; None is 0.
        max_iterations: Maximum number of L-BFGS iterations, and of those in each step of Newton's.
        rough: Stop after L-BFGS: enough to choose C, but with a weak penalty probabilities may be off by some percent.

    Returns:
        The (dim + 1, class) weights, the last row being the intercepts; and whether the last step of Newton's method,
        which follows L-BFGS, changed all probabilities by at most `PROBABILITY_TOLERANCE` (a rough fit: whether the
        gradient reached `GRADIENT_TOLERANCE`).

    References:
        Böhning, Multinomial Logistic Regression Algorithm (1992), for the bound on the Hessian; Nocedal & Wright,
        Numerical Optimization (2006), section 7.2.

    Examples:
        >>> features, codes = np.array([[0.0], [1.0], [4.0], [5.0]]), np.array([0, 0, 1, 1])
        >>> scaling = scaling_of(features)
        >>> weights, converged = fit(design_of(features, codes, 2, scaling), 1.0, max_iterations=100)
        >>> probabilities(np.array([[0.5], [2.5]]), scaling, weights).round(3).tolist(), converged
        ([[0.728, 0.272], [0.5, 0.5]], True)
    """
    problem = _Problem(design, c)
    v = problem.whitened(start) if start is not None else np.zeros(problem.size)
    last: dict[str, float] = {}

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope, last["steepest"] = problem.value_and_slope(flat)
        return value, slope

    def stop(intermediate_result: OptimizeResult) -> None:
        if last["steepest"] <= GRADIENT_TOLERANCE:
            raise StopIteration

    options = {"maxiter": max_iterations, "maxfun": 2 * max_iterations, "gtol": 0.0, "ftol": 0.0, "maxcor": 20}
    v = minimize(objective, v, jac=True, method="L-BFGS-B", callback=stop, options=options).x
    if rough:
        return problem.turned_back(v), problem.value_and_slope(v)[2] <= GRADIENT_TOLERANCE
    v, moved = _newton(problem, v, max_iterations)
    return problem.turned_back(v), moved <= PROBABILITY_TOLERANCE


class _Problem:
    """The objective as a function of whitened weights, flattened."""

    def __init__(self, design: Design, c: float) -> None:
        self.design, self.ridge = design, 1 / (len(design.rows) * c)
        self.contrast = np.array([[-0.5, 0.5]]) if design.classes == 2 else np.eye(design.classes)
        flatness = 4 if design.classes == 2 else design.classes
        self.scale = np.append(np.sqrt(design.spread / flatness + self.ridge), flatness**-0.5)[:, None]
        self.shape = len(self.scale), len(self.contrast)
        self.size = self.shape[0] * self.shape[1]

    def weights(self, flat: np.ndarray) -> Float64[np.ndarray, "column free"]:
        """Undo the whitening: weights along the principal axes, and intercepts."""
        return flat.reshape(self.shape) / self.scale

    def turned_back(self, flat: np.ndarray) -> Float64[np.ndarray, "column class"]:
        """The weights of each class in the columns of the features."""
        weights = self.weights(flat) @ self.contrast
        return np.vstack([self.design.axes @ weights[:-1], weights[-1:]])

    def whitened(self, start: Float64[np.ndarray, "column class"]) -> np.ndarray:
        """Flat whitened weights of some class weights."""
        weights = np.vstack([self.design.axes.T @ start[:-1], start[-1:]]) @ np.linalg.pinv(self.contrast)
        return (weights * self.scale).ravel()

    def _back(self, slope: Float64[np.ndarray, "column free"]) -> np.ndarray:
        """The flat derivative by whitened weights."""
        return (slope / self.scale).ravel()

    def value_and_slope(self, flat: np.ndarray) -> tuple[float, np.ndarray, float]:
        """The objective, its flat derivative, and the largest element of the one by the weights along axes."""
        weights = self.weights(flat)
        value, slope = _mean_loss(self.design, weights, self.contrast)
        value += self.ridge / 2 * float(np.vdot(weights[:-1], weights[:-1]))
        slope[:-1] += self.ridge * weights[:-1]
        steepest = float(np.abs(slope).max())
        return value, self._back(slope), steepest

    def probabilities(self, flat: np.ndarray) -> Float64[np.ndarray, "row class"]:
        """Of the training rows."""
        weights = self.weights(flat)
        scores = np.empty((len(self.design.rows), self.design.classes))
        for part in row_blocks(len(scores), _ROWS):
            scores[part] = (self.design.rows[part] @ weights[:-1] + weights[-1]) @ self.contrast
        return np.exp(_log_softmax(scores))

    def curvature(self, chances: Float64[np.ndarray, "row class"], flat: np.ndarray) -> np.ndarray:
        """The Hessian at these probabilities, times a direction."""
        direction = self.weights(flat)
        slope = np.zeros(self.shape)
        for part in row_blocks(len(chances), _ROWS):
            rows, p = self.design.rows[part].astype(np.float64, copy=False), chances[part]
            moved = p * ((rows @ direction[:-1] + direction[-1]) @ self.contrast)
            moved = (moved - p * moved.sum(axis=1, keepdims=True)) @ self.contrast.T
            slope[:-1] += rows.T @ moved
            slope[-1] += moved.sum(axis=0)
        slope /= len(chances)
        slope[:-1] += self.ridge * direction[:-1]
        return self._back(slope)


def _newton(problem: _Problem, v: np.ndarray, max_iterations: int) -> tuple[np.ndarray, float]:
    """Go on by Newton's steps until one would move no training row's probability by more than the tolerance.

    A flat objective is near its minimum long before the weights are: where classes are separable and the penalty is
    weak, a gradient of 1e-7 leaves probabilities off by several percent. Newton's step is the distance that is left, to
    first order, and conjugate gradients find it in the whitened weights.

    Returns:
        The weights, and the largest change of a probability in the last step; infinite where there was no descent.
    """
    value, slope, _ = problem.value_and_slope(v)
    chances, moved = problem.probabilities(v), np.inf
    for _ in range(_NEWTON_STEPS):
        step = _conjugate_gradients(partial(problem.curvature, chances), -slope, max_iterations)
        size = 1.0
        while True:
            tried, downhill, _ = problem.value_and_slope(v + size * step)
            if tried <= value + 1e-4 * size * float(slope @ step) or size < 1e-6:
                break
            size /= 2
        if size < 1e-6:  # rounding hides any descent: the step says how far the minimum is
            return v, float(np.abs(problem.probabilities(v + step) - chances).max())
        v, value, slope = v + size * step, tried, downhill
        after = problem.probabilities(v)
        moved, chances = float(np.abs(after - chances).max()) / size, after
        if moved <= PROBABILITY_TOLERANCE:
            break
    return v, moved


def _conjugate_gradients(
    curvature: Callable[[np.ndarray], np.ndarray], target: np.ndarray, max_iterations: int
) -> np.ndarray:
    """Solve curvature(step) = target to a millionth of the target's length."""
    step, residual = np.zeros_like(target), target.copy()
    direction, squared = residual.copy(), float(residual @ residual)
    enough = squared * 1e-12
    for _ in range(max_iterations):
        if squared <= enough:
            break
        bent = curvature(direction)
        bend = float(direction @ bent)
        if bend <= 0:  # rounding: the objective is convex
            break
        step += squared / bend * direction
        residual -= squared / bend * bent
        squared, before = float(residual @ residual), squared
        direction = residual + squared / before * direction
    return step


def _mean_loss(
    design: Design, weights: Float64[np.ndarray, "column free"], contrast: Float64[np.ndarray, "free class"]
) -> tuple[float, Float64[np.ndarray, "column free"]]:
    """Return the mean log loss of the class weights `weights @ contrast`, and its gradient by `weights`."""
    slope, loss = np.zeros(weights.shape), 0.0
    for part in row_blocks(len(design.rows), _ROWS):
        rows, codes = design.rows[part].astype(np.float64, copy=False), design.codes[part]
        logs = _log_softmax((rows @ weights[:-1] + weights[-1]) @ contrast)
        own = np.arange(len(codes)), codes
        loss -= float(logs[own].sum())
        residuals = np.exp(logs)
        residuals[own] -= 1
        residuals = residuals @ contrast.T
        slope[:-1] += rows.T @ residuals
        slope[-1] += residuals.sum(axis=0)
    return loss / len(design.rows), slope / len(design.rows)


def _log_softmax(scores: Float64[np.ndarray, "row class"]) -> Float64[np.ndarray, "row class"]:
    scores = scores - scores.max(axis=1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))


def log_probabilities(
    features: Float[np.ndarray, "row dim"], scaling: Scaling, weights: Float64[np.ndarray, "column class"]
) -> Float64[np.ndarray, "row class"]:
    """Return the (row, class) logarithms of the probabilities."""
    logs = np.empty((len(features), weights.shape[1]))
    for rows in row_blocks(len(features)):
        logs[rows] = _log_softmax(scaling.apply(features[rows]) @ weights[:-1] + weights[-1])
    return logs


def probabilities(
    features: Float[np.ndarray, "row dim"], scaling: Scaling, weights: Float64[np.ndarray, "column class"]
) -> Float64[np.ndarray, "row class"]:
    """Return the (row, class) probabilities, softmax(W'x + b)."""
    return np.exp(log_probabilities(features, scaling, weights))

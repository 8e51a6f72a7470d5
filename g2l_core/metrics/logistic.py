"""Multinomial logistic regression on many wide rows: L-BFGS on whitened weights."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int64
from scipy.linalg import cholesky, solve_triangular
from scipy.optimize import OptimizeResult, minimize

from g2l_core.metrics.knn.normalized import widened
from g2l_core.metrics.rows import row_blocks

GRADIENT_TOLERANCE = 1e-7
"""L-BFGS stops where no element of the mean objective's gradient is larger; scikit-learn's default is 1e-4."""

_ROWS = 1024
"""Taken at a time: their float64 copies stay in the processor's cache."""
_DOUBLE_VALUES = 1 << 22
"""Up to so many scaled values are kept in float64 (32 MiB), more in float32. All arithmetic is in float64: a loss with
the noise of float32 ends line searches far from the minimum."""


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Columns brought to mean 0 and variance 1; constant ones only to 0."""

    mean: Float64[np.ndarray, " dim"]
    deviation: Float64[np.ndarray, " dim"]

    def apply(self, features: Float[np.ndarray, "row dim"], kind: Any = np.float64) -> Float[np.ndarray, "row dim"]:
        """The scaled features, in the type `kind`."""
        scaled = np.empty(features.shape, kind)
        for rows in row_blocks(len(features), _ROWS):
            scaled[rows] = (widened(features[rows]) - self.mean) / self.deviation
        return scaled


def scaling_of(features: Float[np.ndarray, "row dim"]) -> Scaling:
    """The scaling by the features' own mean and deviation."""
    blocks = list(row_blocks(len(features)))
    mean = sum(widened(features[b]).sum(axis=0, dtype=np.float64) for b in blocks) / len(features)
    squares = sum(np.square(widened(features[b]) - mean).sum(axis=0) for b in blocks)
    deviation = np.sqrt(squares / len(features))
    constant = deviation <= 10 * np.finfo(np.float64).eps * np.abs(mean)
    return Scaling(mean=mean, deviation=np.where(constant, 1.0, deviation))


@dataclass(frozen=True, kw_only=True)
class Design:
    """Training rows ready for fits with any penalty."""

    rows: Float[np.ndarray, "row dim"]
    """Scaled features: their columns' means are 0, so that the intercepts do not mix with the weights."""
    codes: Int64[np.ndarray, " row"]
    """The class of each row, from 0."""
    classes: int
    gram: Float64[np.ndarray, "dim dim"]
    """Mean of x x'."""


def design_of(
    features: Float[np.ndarray, "row dim"], codes: Int64[np.ndarray, " row"], classes: int, scaling: Scaling
) -> Design:
    """Scales the training rows and gathers their second moments."""
    kind = np.float64 if features.size <= _DOUBLE_VALUES else np.float32
    rows = scaling.apply(features, kind)
    gram = np.zeros((features.shape[1], features.shape[1]))
    for part in row_blocks(len(rows)):
        gram += rows[part].T @ rows[part]
    return Design(rows=rows, codes=codes, classes=classes, gram=gram / len(rows))


def fit(
    design: Design, c: float, *, start: Float64[np.ndarray, "column class"] | None = None, max_iterations: int
) -> tuple[Float64[np.ndarray, "column class"], bool]:
    """Minimizes the sum of the log losses + |W|^2 / (2 C), intercepts not penalized.

    Of two classes, one weight vector is penalized, as in scikit-learn: the same as two opposite halves at C / 2.
    L-BFGS works on V = R'W with R R' = X'X / (n K) + I / (n C), the Hessian where all K classes are equally likely:
    correlated features, which slow it down, are no longer so.

    Args:
        design: The training rows.
        c: The inverse penalty.
        start: Weights to start from, those of a neighboring C for instance; None is 0.
        max_iterations: Of L-BFGS.

    Returns:
        The weights, the last row being the intercepts; and whether the gradient reached `GRADIENT_TOLERANCE`.

    References:
        Böhning, Multinomial Logistic Regression Algorithm (1992), for the bound on the Hessian; Nocedal & Wright,
        Numerical Optimization (2006), section 7.2.
    """
    n, dim, classes = len(design.rows), design.rows.shape[1], design.classes
    ridge = (2 if classes == 2 else 1) / (n * c)
    factor = cholesky(design.gram / classes + ridge * np.eye(dim), lower=True)
    last: dict[str, Any] = {}

    def weights_of(flat: np.ndarray) -> np.ndarray:
        v = flat.reshape(dim + 1, classes)
        return np.vstack([solve_triangular(factor, v[:-1], lower=True, trans="T"), v[-1:] * classes**0.5])

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = weights_of(flat)
        value, slope = _mean_loss(design, weights)
        value += ridge / 2 * float(np.vdot(weights[:-1], weights[:-1]))
        slope[:-1] += ridge * weights[:-1]
        last.update(weights=weights, steepest=float(np.abs(slope).max()))
        slope[:-1] = solve_triangular(factor, slope[:-1], lower=True)
        slope[-1] *= classes**0.5
        return value, slope.ravel()

    def stop(intermediate_result: OptimizeResult) -> None:
        if last["steepest"] <= GRADIENT_TOLERANCE:
            raise StopIteration

    whitened = np.zeros((dim + 1, classes))
    if start is not None:
        whitened = np.vstack([factor.T @ start[:-1], start[-1:] / classes**0.5])
    options = {"maxiter": max_iterations, "maxfun": 2 * max_iterations, "gtol": 0.0, "ftol": 0.0, "maxcor": 20}
    best = minimize(objective, whitened.ravel(), jac=True, method="L-BFGS-B", callback=stop, options=options)
    objective(best.x)
    return last["weights"], last["steepest"] <= GRADIENT_TOLERANCE


def _mean_loss(
    design: Design, weights: Float64[np.ndarray, "column class"]
) -> tuple[float, Float64[np.ndarray, "column class"]]:
    """The mean log loss and its gradient."""
    slope, loss = np.zeros(weights.shape), 0.0
    for part in row_blocks(len(design.rows), _ROWS):
        rows, codes = design.rows[part].astype(np.float64, copy=False), design.codes[part]
        logs = _log_softmax(rows @ weights[:-1] + weights[-1])
        own = np.arange(len(codes)), codes
        loss -= float(logs[own].sum())
        residuals = np.exp(logs)
        residuals[own] -= 1
        slope[:-1] += rows.T @ residuals
        slope[-1] += residuals.sum(axis=0)
    return loss / len(design.rows), slope / len(design.rows)


def _log_softmax(scores: Float64[np.ndarray, "row class"]) -> Float64[np.ndarray, "row class"]:
    scores = scores - scores.max(axis=1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))


def log_probabilities(
    features: Float[np.ndarray, "row dim"], scaling: Scaling, weights: Float64[np.ndarray, "column class"]
) -> Float64[np.ndarray, "row class"]:
    """The logarithm of the probability of each class for each row."""
    found = np.empty((len(features), weights.shape[1]))
    for rows in row_blocks(len(features)):
        found[rows] = _log_softmax(scaling.apply(features[rows]) @ weights[:-1] + weights[-1])
    return found


def probabilities(
    features: Float[np.ndarray, "row dim"], scaling: Scaling, weights: Float64[np.ndarray, "column class"]
) -> Float64[np.ndarray, "row class"]:
    """The probability of each class for each row."""
    return np.exp(log_probabilities(features, scaling, weights))

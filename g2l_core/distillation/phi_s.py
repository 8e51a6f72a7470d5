"""PHI-S: one rotation and one scale that give every dimension of a teacher's features the same variance.

Ranzinger et al. 2024 (arXiv 2410.01680): with mean mu and covariance U Lambda U^T of the features x (d dimensions), and
H a Hadamard matrix over sqrt(d), which is orthogonal,

    phi_s(x) = H U^T (x - mu) / phi,    phi^2 = trace(Lambda) / d.

H U^T spreads the variance evenly: each diagonal entry of H Lambda H^T is the mean eigenvalue, since all entries of H
have the same size. In contrast to standardizing each dimension, distances keep their proportions, so that the error of
a direction counts as much as the teacher's features vary along it; and unlike whitening nothing is divided by a small
eigenvalue. Several teachers then have targets of one scale.
"""

from math import isqrt, sqrt

import numpy as np
from jaxtyping import Float64, Int64

from g2l_core.errors import UsageError

Matrix = Float64[np.ndarray, "dim dim"]


def phi_s_matrix(covariance: Matrix) -> Matrix:
    """The matrix M = H U^T / phi of a covariance, so that phi_s(x) = M (x - mu).

    M M^T is the identity over phi^2, so the way back is x = mu + M^T y / |m|^2, with |m| the norm of any row of M.
    Where no Hadamard matrix of the order is known to `hadamard` (most orders that are no multiple of 4), H comes from
    `equalizing_rotation`, which has the one property that PHI-S needs.

    Raises:
        UsageError: The features do not vary.
    """
    eigenvalues, vectors = np.linalg.eigh(covariance)
    eigenvalues = np.maximum(eigenvalues, 0)
    scale = sqrt(float(eigenvalues.mean()))
    if not scale > 0:
        raise UsageError("teacher-norm phi-s: the teacher's features are the same for all training patches")
    signs = hadamard(len(eigenvalues))
    spread = equalizing_rotation(eigenvalues) if signs is None else signs / sqrt(len(signs))
    return spread @ vectors.T / scale


def hadamard(order: int) -> Int64[np.ndarray, "order order"] | None:
    """A matrix of +1 and -1 whose rows are orthogonal; None where these constructions have none.

    Sylvester's doubling of a matrix of Paley (1933): his first of order q + 1 for primes q = 3 mod 4, or his second of
    order 2 (q + 1) for primes q = 1 mod 4. Below 200 these leave out eight multiples of 4, of which 52 is the first;
    the widths of published encoders are all among them.
    """
    halvings = next(i for i in range(order.bit_length()) if order >> i & 1)
    for doublings in range(halvings, -1, -1):
        found = _small_hadamard(order >> doublings)
        if found is not None:
            for _ in range(doublings):
                found = np.block([[found, found], [found, -found]])
            return found
    return None


def _small_hadamard(order: int) -> Int64[np.ndarray, "order order"] | None:
    if order == 1:
        return np.ones((1, 1), np.int64)
    if _is_prime(order - 1) and order % 4 == 0:
        residues = _residues(order - 1)
        skew = np.block([[np.zeros((1, 1), np.int64), np.ones((1, order - 1), np.int64)],
                         [-np.ones((order - 1, 1), np.int64), residues]])  # fmt: skip
        return skew + np.eye(order, dtype=np.int64)
    q = order // 2 - 1
    if order % 2 == 0 and q % 4 == 1 and _is_prime(q):
        conference = np.block([[np.zeros((1, 1), np.int64), np.ones((1, q), np.int64)],
                               [np.ones((q, 1), np.int64), _residues(q)]])  # fmt: skip
        pair, single = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
        return np.kron(conference, pair) + np.kron(np.eye(q + 1, dtype=np.int64), single)
    return None


def _residues(q: int) -> Int64[np.ndarray, "q q"]:
    """chi(i - j) for all i and j, with chi(a) = 1 for squares modulo the prime q, -1 for others, and 0 for 0."""
    chi = -np.ones(q, np.int64)
    chi[np.arange(1, q) ** 2 % q] = 1
    chi[0] = 0
    return chi[(np.arange(q)[:, None] - np.arange(q)) % q]


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, isqrt(n) + 1))


def equalizing_rotation(eigenvalues: Float64[np.ndarray, " dim"]) -> Matrix:
    """A rotation R that makes every diagonal entry of R diag(eigenvalues) R^T their mean.

    Bendel and Mickey 1978: each of d - 1 rotations in a plane gives one entry the mean. The plane is that of the
    largest and the smallest entry left, so that the angle exists.
    """
    a, rotation, mean = np.diag(eigenvalues), np.eye(len(eigenvalues)), float(eigenvalues.mean())
    left = np.ones(len(eigenvalues), bool)
    for _ in range(len(eigenvalues) - 1):
        diagonal = np.where(left, np.diag(a), mean)
        i, j = int(diagonal.argmax()), int(diagonal.argmin())
        if not diagonal[j] < mean < diagonal[i]:
            break  # all are equal to the last bit
        over, under, across = a[i, i] - mean, a[j, j] - mean, a[i, j]
        # The root of under t^2 - 2 across t + over = 0, with the tangent t, that loses no digits.
        root = across + np.copysign(np.sqrt(across**2 - over * under), across)
        t = over / root
        c = 1 / np.sqrt(1 + t * t)
        plane = np.array([[c, -c * t], [c * t, c]])
        a[[i, j]] = plane @ a[[i, j]]
        a[:, [i, j]] = a[:, [i, j]] @ plane.T
        rotation[[i, j]] = plane @ rotation[[i, j]]
        left[i] = False
    return rotation

"""The terms beside the loss: their formulas against a few lines of NumPy, and what they do to a loss."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from g2l_core.distillation.objective import Objective
from g2l_core.distillation.robustness import RobustObjective, center_mmd, stain_consistency
from g2l_core.distillation.spec import ObjectiveSpec, RobustnessSpec
from g2l_core.errors import UsageError

NAN = float("nan")


def drawn(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def tensor(values):
    return torch.tensor(np.asarray(values), dtype=torch.float32)


def mmd_by_loops(z, centers):
    """Equation 3 of Gretton et al., one kernel value after the other, in float64."""
    rows = [i for i, c in enumerate(centers) if not math.isnan(c)]
    distances = sorted(math.dist(z[i], z[j]) for i, j in combinations(rows, 2))
    s = distances[(len(distances) - 1) // 2]
    of = {c: [i for i in rows if centers[i] == c] for c in {centers[i] for i in rows}}

    def mean(a, b):
        pairs = [(i, j) for i in a for j in b if i != j]
        return sum(math.exp(-(math.dist(z[i], z[j]) ** 2) / (2 * s * s)) for i, j in pairs) / len(pairs)

    groups = [of[c] for c in sorted(of) if len(of[c]) > 1]
    found = [mean(x, x) + mean(y, y) - 2 * mean(x, y) for x, y in combinations(groups, 2)]
    return sum(found) / len(found)


@given(st.integers(0, 10_000), st.integers(2, 4), st.floats(-100, 100))
def test_mmd_is_gretton_s(seed, n_centers, shift):
    rng = np.random.default_rng(seed)
    centers = np.concatenate([np.repeat(np.arange(n_centers), 2), rng.integers(0, n_centers, 7), [NAN, 9]])
    z = rng.normal(size=(len(centers), 5)) + np.nan_to_num(centers)[:, None] + shift
    assert float(center_mmd(tensor(z), tensor(centers))) == pytest.approx(mmd_by_loops(z, centers), abs=2e-3)


def test_mmd_is_zero_on_average_where_centers_are_alike_and_grows_with_their_distance():
    centers = tensor(np.arange(24) % 2)
    alike = [float(center_mmd(tensor(drawn(seed, 24, 8)), centers)) for seed in range(300)]
    assert abs(np.mean(alike)) < 4 * np.std(alike) / 300**0.5
    apart = [
        float(center_mmd(tensor(drawn(0, 24, 8) + d * centers.numpy()[:, None]), centers)) for d in (0.5, 1.0, 2.0)
    ]
    assert max(alike) < apart[1] < apart[2]
    assert apart[0] < apart[1]


def test_mmd_hangs_on_neither_scale_nor_rows_without_a_center():
    z, centers = tensor(drawn(1, 12, 6)), tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, NAN, NAN, 2])
    known = float(center_mmd(z, centers))
    assert float(center_mmd(1000 * z, centers)) == pytest.approx(known, abs=1e-4)
    changed = z.clone()
    changed[9:11] = 1e3
    assert float(center_mmd(changed, centers)) == pytest.approx(known, abs=1e-6)


@pytest.mark.parametrize("centers", [[0] * 6, [NAN] * 6, [0, 0, 0, 0, 0, 1], [0, 1, 2, 3, 4, 5]])
def test_mmd_of_a_batch_without_two_centers_is_not_known(centers):
    assert math.isnan(float(center_mmd(tensor(drawn(0, 6, 4)), tensor(centers))))


def test_a_step_down_mmd_brings_centers_together():
    centers = tensor(np.arange(32) % 2)
    z = tensor(drawn(2, 32, 4) + 2 * centers.numpy()[:, None]).requires_grad_()
    before = center_mmd(z, centers)
    (gradient,) = torch.autograd.grad(before, z)
    assert center_mmd(z.detach() - 10 * gradient, centers) < before.detach()


@given(st.integers(0, 10_000), st.floats(0, 3))
def test_consistency_is_one_minus_the_intraclass_correlation(seed, noise):
    a = drawn(seed, 12, 5) * 7 + 3
    b = a + noise * drawn(seed + 1, 12, 5)
    both = np.stack([a, b])
    mean, variance = both.mean(axis=(0, 1)), both.var(axis=(0, 1))
    r = ((a - mean) * (b - mean)).mean(axis=0) / variance  # Fisher's, of pairs without an order
    assert float(stain_consistency(tensor(a), tensor(b))) == pytest.approx((1 - r).mean(), abs=1e-4)


def test_consistency_of_equal_and_of_unrelated_views():
    a, b = tensor(drawn(0, 4000, 3)), tensor(drawn(1, 4000, 3))
    assert float(stain_consistency(a, a)) == 0
    assert float(stain_consistency(a, b)) == pytest.approx(1, abs=0.05)
    assert float(stain_consistency(1e3 * a + 5, 1e3 * b + 5)) == pytest.approx(float(stain_consistency(a, b)), abs=1e-4)


def test_the_whole_is_the_loss_plus_weighted_terms():
    inner = Objective(ObjectiveSpec(loss="logsum"))
    whole = RobustObjective(inner, RobustnessSpec(stain_weight=0.3, center_weight=0.7))
    projected, targets, features = tensor(drawn(0, 8, 6)), tensor(drawn(1, 8, 6)), tensor(drawn(2, 16, 5))
    centers = tensor([0, 0, 1, 1, 2, 2, NAN, 0])
    alone = inner(projected, targets)
    stain, center = stain_consistency(features[::2], features[1::2]), center_mmd(features[::2], centers)
    loss = whole(projected, torch.cat([targets, centers[:, None]], dim=1), features)
    assert float(loss) == pytest.approx(float(alone + 0.3 * stain + 0.7 * center), rel=1e-6)
    logged = {name: float(value) for name, value in whole.logged().items()}
    assert list(logged) == ["loss_per_element", "term:stain", "term:center"]
    assert logged["loss_per_element"] == pytest.approx(float(alone) - math.log(8 * 6), rel=1e-6)
    assert (logged["term:stain"], logged["term:center"]) == pytest.approx((float(stain), float(center)))


def test_a_batch_of_one_center_has_no_term_and_no_bad_gradient():
    whole = RobustObjective(Objective(ObjectiveSpec()), RobustnessSpec(center_weight=1.0))
    features = tensor(drawn(2, 8, 5)).requires_grad_()
    projected, targets = features @ tensor(drawn(0, 5, 6)), tensor(drawn(1, 8, 6))
    loss = whole(projected, torch.cat([targets, torch.zeros(8, 1)], dim=1), features)
    loss.backward()
    alone = Objective(ObjectiveSpec())(projected, targets)
    assert float(loss.detach()) == pytest.approx(float(alone.detach()))
    assert features.grad.isfinite().all()
    assert math.isnan(float(whole.logged()["term:center"]))


@pytest.mark.parametrize("weights", [{"stain_weight": -1.0}, {"center_weight": NAN}, {"stain_weight": math.inf}])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(UsageError, match="of at least 0"):
        RobustnessSpec(**weights)


def test_a_column_that_nothing_reads_is_refused():
    with pytest.raises(UsageError, match="--center-weight"):
        RobustnessSpec(center_label="hospital")

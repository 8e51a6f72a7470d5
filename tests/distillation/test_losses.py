"""Losses against their textbook expressions in float64, and the laws they obey."""

import math
from functools import partial
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from g2l_core.distillation.losses import LOSSES, cosine, logsum, loss_by_name, mse, rkd, smooth_l1, standardize
from g2l_core.distillation.spec import ObjectiveSpec
from g2l_core.errors import UnknownNameError, UsageError

COMPARABLE = ObjectiveSpec().comparable


def gaussians(n: int, d: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator), torch.randn(n, d, generator=generator)


def loss_of(name: str, d: int):
    """The loss by its name; kl_queue with a bank of as many dimensions."""
    if name != "kl_queue":
        return LOSSES[name]
    return partial(LOSSES[name], bank=torch.randn(50, d, generator=torch.Generator().manual_seed(9)))


def gradient(loss_fn, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    leaf = student.clone().requires_grad_()
    loss_fn(leaf, teacher).backward()
    assert leaf.grad is not None
    return leaf.grad


def textbook(student: torch.Tensor, teacher: torch.Tensor, alpha: float) -> torch.Tensor:
    return torch.log(((student.double() - teacher.double()).abs() ** alpha).sum())


# --- values


@pytest.mark.parametrize("seed", range(5))
def test_independent_gaussians_have_the_known_loss(seed):
    student, teacher = gaussians(32, 1536, seed)
    loss = float(logsum(standardize(student), standardize(teacher)))
    assert 13.2 < loss < 13.3
    assert COMPARABLE(loss, 32, 1536) == pytest.approx(2.47, abs=0.03)


def test_the_comparable_loss_does_not_depend_on_the_batch_size():
    sizes = (32, 64, 128, 256, 512)
    losses = [float(logsum(*map(standardize, gaussians(n, 1536, n)))) for n in sizes]
    figures = [COMPARABLE(loss, n, 1536) for loss, n in zip(losses, sizes, strict=True)]
    assert max(figures) - min(figures) < 0.05
    assert figures[-1] == pytest.approx(math.log(12), abs=0.02)
    assert losses[-1] - losses[0] == pytest.approx(math.log(16), abs=0.05)


def test_logsum_by_hand():
    student, teacher = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    assert float(logsum(student, teacher)) == pytest.approx(math.log(1 + 16 + 81))
    assert float(logsum(student, teacher, alpha=2.0)) == pytest.approx(math.log(1 + 4 + 9))
    assert float(logsum(student, teacher, alpha=1.0)) == pytest.approx(math.log(1 + 2 + 3))
    assert COMPARABLE(math.log(98), 2, 2) == pytest.approx(math.log(98 / 4))


def test_baselines_by_hand():
    student, teacher = torch.tensor([[3.0, 4.0], [0.5, 0.0]]), torch.tensor([[4.0, 3.0], [0.0, 0.0]])
    assert float(mse(student, teacher)) == pytest.approx((1 + 1 + 0.25) / 4)
    assert float(smooth_l1(student, teacher)) == pytest.approx((0.5 + 0.5 + 0.125) / 4)
    assert float(cosine(student[:1], teacher[:1])) == pytest.approx(1 - 24 / 25)
    assert float(cosine(student[:1], -student[:1])) == pytest.approx(2)


# --- standardize


def test_standardize_is_the_biased_batch_statistics_in_float64():
    z = gaussians(32, 50, 0)[0] * 7 + 3
    z[:, 4] = 0.0
    wide = z.double().numpy()
    expected = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    np.testing.assert_allclose(standardize(z), expected, atol=2e-6)
    np.testing.assert_array_equal(standardize(z)[:, 4], np.zeros(32))
    np.testing.assert_allclose(standardize(z, eps=1.0), (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1), atol=2e-6)


def test_standardize_refuses_a_single_row():
    with pytest.raises(UsageError, match="at least 2 rows, got 1"):
        standardize(torch.zeros(1, 8))


# --- gradients and precision


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0, 4.0, 6.0])
def test_gradient_is_that_of_the_textbook_expression(alpha):
    student, teacher = map(standardize, gaussians(32, 384, 1))
    ours = gradient(lambda s, t: logsum(s, t, alpha=alpha), student, teacher).double()
    exact = gradient(lambda s, t: textbook(s, t, alpha), student.double(), teacher)
    assert float((ours - exact).abs().max() / exact.abs().max()) < 1e-6
    np.testing.assert_allclose(ours, exact, rtol=3e-6)


def test_gradient_reaches_the_unstandardized_student():
    raw, teacher = gaussians(16, 24, 2)

    def exact_loss(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        z = (z - z.mean(0)) / torch.sqrt(z.var(0, unbiased=False) + 1e-5)
        return textbook(z, t, 4)

    teacher = standardize(teacher)
    ours = gradient(lambda z, t: logsum(standardize(z), t), raw, teacher).double()
    exact = gradient(exact_loss, raw.double(), teacher)
    assert float((ours - exact).abs().max() / exact.abs().max()) < 1e-5


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_float32_under_autocast_and_from_half_inputs(name, dtype):
    student, teacher = gaussians(32, 256, 3)
    low = student.to(dtype), teacher.to(dtype)
    wide = low[0].float(), low[1].float()
    loss = loss_of(name, 256)
    expected = loss(*wide), loss(*map(standardize, wide))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(*low), loss(*map(standardize, low))
    assert [value.dtype for value in found] == [torch.float32, torch.float32]
    assert list(map(torch.equal, found, expected)) == [True, True]


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 4.0, 8.0])
def test_a_perfect_student_has_a_finite_loss_and_no_gradient(alpha):
    features = standardize(gaussians(8, 16, 4)[0])
    assert math.isfinite(logsum(features, features, alpha=alpha))
    np.testing.assert_array_equal(
        gradient(lambda s, t: logsum(s, t, alpha=alpha), features, features), torch.zeros(8, 16)
    )


@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("error", [1e-30, 1e-10, 1e-5, 1e-2])
def test_gradients_near_a_perfect_student_are_finite(alpha, error):
    student = torch.zeros(8, 16)
    student[0, 0] = error
    assert gradient(lambda s, t: logsum(s, t, alpha=alpha), student, torch.zeros(8, 16)).isfinite().all()


def test_the_floor_does_not_move_the_loss_of_a_good_student():
    teacher = standardize(gaussians(32, 1536, 5)[0])
    student = teacher + 0.01 * gaussians(32, 1536, 6)[0]
    assert float(logsum(student, teacher)) == pytest.approx(float(textbook(student, teacher, 4)), abs=1e-6)


# --- laws

seeds = st.integers(0, 2**32 - 1)


@given(seeds, st.sampled_from([1.0, 2.0, 4.0]))
def test_logsum_ignores_the_order_of_rows_and_dimensions(seed, alpha):
    student, teacher = gaussians(9, 7, seed)
    rows = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    columns = torch.randperm(7, generator=torch.Generator().manual_seed(seed + 1))
    mixed = logsum(student[rows][:, columns], teacher[rows][:, columns], alpha=alpha)
    assert float(mixed) == pytest.approx(float(logsum(student, teacher, alpha=alpha)), abs=1e-5)
    assert float(logsum(teacher, student, alpha=alpha)) == float(logsum(student, teacher, alpha=alpha))


@given(seeds, st.floats(0.5, 20), st.floats(-5, 5))
def test_standardized_loss_ignores_shift_and_scale_of_each_side(seed, scale, shift):
    student, teacher = gaussians(32, 12, seed)
    expected = float(logsum(standardize(student, eps=1e-12), standardize(teacher, eps=1e-12)))
    moved = standardize(student * scale + shift, eps=1e-12), standardize(teacher / scale - shift, eps=1e-12)
    assert float(logsum(*moved)) == pytest.approx(expected, abs=1e-3)


@given(seeds, st.floats(0.5, 8))
def test_logsum_is_alpha_times_the_log_of_the_alpha_norm(seed, alpha):
    student, teacher = gaussians(6, 5, seed)
    norm = torch.linalg.vector_norm((student - teacher).double(), ord=alpha)
    assert float(logsum(student, teacher, alpha=alpha)) == pytest.approx(alpha * math.log(norm), abs=1e-5)


@given(seeds)
def test_alpha_two_is_the_log_of_the_sum_of_squares(seed):
    student, teacher = gaussians(6, 5, seed)
    assert float(logsum(student, teacher, alpha=2.0)) == pytest.approx(
        math.log(30 * float(mse(student, teacher))), abs=1e-5
    )


@given(seeds)
def test_every_loss_prefers_the_closer_student(seed):
    teacher, noise = (standardize(z) for z in gaussians(16, 12, seed))
    for name in LOSSES:
        loss_fn = loss_of(name, 12)
        assert loss_fn(teacher + 0.1 * noise, teacher) < loss_fn(teacher + 0.5 * noise, teacher)


# --- refusals


def test_losses_are_found_by_name_and_unknown_names_are_refused():
    assert all(loss_by_name(name) is loss_fn for name, loss_fn in LOSSES.items())
    with pytest.raises(UnknownNameError, match="Did you mean logsum"):
        loss_by_name("log_sum")


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_alpha_is_refused(alpha):
    with pytest.raises(UsageError, match="alpha"):
        logsum(*gaussians(2, 2, 0), alpha=alpha)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_shapes_that_would_broadcast_are_refused(name):
    with pytest.raises(UsageError, match="one shape"):
        LOSSES[name](
            torch.zeros(4, 3), torch.zeros(4, 1), **({"bank": torch.zeros(5, 3)} if name == "kl_queue" else {})
        )


def test_rkd_is_the_mean_over_pairs_and_triples_of_different_patches():
    """As the sums of the paper's equations have them, not over all n^2 and n^3 as the authors' program divides."""
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 4), torch.randn(5, 4)

    def relations(rows):
        pairs = list(permutations(range(5), 2))
        distances = torch.stack([(rows[i] - rows[j]).norm() for i, j in pairs])
        angles = [
            torch.cosine_similarity(rows[j] - rows[i], rows[k] - rows[i], dim=0)
            for i, j, k in permutations(range(5), 3)
        ]
        return distances / distances.mean(), torch.stack(angles)

    (d, a), (d_teacher, a_teacher) = relations(student), relations(teacher)
    expected = functional.smooth_l1_loss(d, d_teacher) + 2 * functional.smooth_l1_loss(a, a_teacher)
    torch.testing.assert_close(rkd(student, teacher), expected)

"""The share of a teacher that a student retains: against recomputation by hand, and how often its interval holds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from g2l_core.errors import TaskError
from g2l_core.metrics.intervals import Figure, Source, averaged, estimate, of_sums, ratio
from g2l_core.metrics.patients import design_of
from g2l_core.metrics.scales import LINE, SHARE


def mean_of(values, patients=None, scale=LINE):
    patients = np.arange(len(values)) if patients is None else patients
    rows = np.stack([values, np.ones(len(values))], axis=1)
    return of_sums(lambda s: s[:, 0] / s[:, 1], rows, patients, design_of(patients, unit="patients"), scale)


def planted(seed, n=12):
    """A teacher's and a student's figure of each patient, which depend on how hard the patient is."""
    rng = np.random.default_rng(seed)
    ease = rng.normal(0.7, 0.1, n)
    return ease + rng.normal(0, 0.03, n), 0.9 * ease + rng.normal(0, 0.03, n)


@given(st.integers(0, 10_000), st.integers(4, 15))
def test_the_interval_leaves_a_patient_out_of_both(seed, n):
    teacher, student = planted(seed, n)
    found = estimate(ratio(mean_of(student, scale=SHARE), mean_of(teacher, scale=SHARE)))
    share = student.mean() / teacher.mean()
    without = np.array([np.delete(student, i).mean() / np.delete(teacher, i).mean() for i in range(n)])
    error = np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum()) / share
    half = stats.t.ppf(0.975, n - 1) * error
    assert found.value == pytest.approx(share)
    assert (found.low, found.high) == pytest.approx((share * np.exp(-half), share * np.exp(half)))


@given(st.integers(0, 10_000), st.floats(0.1, 10))
def test_a_common_factor_cancels_and_equals_retain_all(seed, factor):
    teacher, student = planted(seed)
    found = estimate(ratio(mean_of(student), mean_of(teacher)))
    scaled = estimate(ratio(mean_of(factor * student), mean_of(factor * teacher)))
    assert (scaled.low, scaled.value, scaled.high) == pytest.approx((found.low, found.value, found.high))
    same = estimate(ratio(mean_of(teacher), mean_of(teacher)))
    assert (same.low, same.value, same.high) == (1.0, 1.0, 1.0)


def test_the_interval_holds_and_is_narrower_than_that_of_two_apart():
    held, narrower = 0, 0
    for seed in range(400):
        teacher, student = planted(seed)
        figures = mean_of(student), mean_of(teacher)
        found = estimate(ratio(*figures))
        held += found.low <= 0.9 <= found.high
        apart = [estimate(figure) for figure in figures]
        widest = apart[0].high / apart[1].low - apart[0].low / apart[1].high
        narrower += found.high - found.low < widest
    assert 0.92 <= held / 400 <= 0.98
    assert narrower == 400


def test_seeds_of_the_student_widen_it():
    teacher, student = planted(1)
    seeds = [mean_of(student + shift) for shift in (-0.05, 0.0, 0.05)]
    one, several = (
        estimate(ratio(seeds[1], mean_of(teacher))),
        estimate(ratio(averaged(seeds, "seeds"), mean_of(teacher))),
    )
    assert several.value == pytest.approx(one.value)
    assert several.low < one.low
    assert several.high > one.high
    assert "3 seeds" in several.method


def test_what_both_train_on_is_paired():
    halves = np.array([0.6, 0.7, 0.8, 0.65, 0.75])

    def figure(values, paired):
        source = Source(what="halves", values=values, share=1.0, paired=paired)
        return Figure(values=np.full(6, values.mean()), design=design_of(np.arange(5), unit="slides"), more=(source,))

    together = estimate(ratio(figure(0.9 * halves, True), figure(halves, True)))
    alone = estimate(ratio(figure(0.9 * halves, False), figure(halves, False)))
    assert together.high - together.low == pytest.approx(0, abs=1e-9)
    error = np.sqrt(2 * halves.var(ddof=1)) / halves.mean()
    half = stats.t.ppf(0.975, 8) * error
    assert (alone.low, alone.high) == pytest.approx((0.9 * np.exp(-half), 0.9 * np.exp(half)))


def test_nothing_is_shared_of_a_teacher_that_has_nothing():
    design = design_of(np.arange(4), unit="slides")
    zero, some = (Figure(values=np.full(5, value), design=design) for value in (0.0, 0.5))
    with pytest.raises(TaskError, match="needs figures above 0"):
        ratio(some, zero)
    found = estimate(ratio(zero, some))
    assert (found.low, found.value, found.high) == (0.0, 0.0, 0.0)

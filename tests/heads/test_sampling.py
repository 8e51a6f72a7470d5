"""Answers from some patches: all patches give the whole answer, some an honest one, and never more than allowed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from g2l_core.heads.appearance import appearance, groups_of
from g2l_core.heads.head import Head, HeadFacts, answers, patch_terms
from g2l_core.heads.sampling import LOOKS, estimate, first_sizes, further_sizes, plan_sample, settle
from g2l_core.metrics.mil import AbmilSettings, train_abmil

DIM = 6


def head_of(kind, tensors, classes=("a", "b")):
    facts = HeadFacts(
        kind=kind, task="t", label="l", classes=classes, bag="slide", temperature=1.5, calibration={}, encoder={},
        grid={}, views={}, figures=(), figures_of="", trained_on={"slides": []}, license="MIT", versions={},
    )  # fmt: skip
    return Head(facts=facts, tensors=tensors)


@pytest.fixture(scope="module")
def heads():
    rng = np.random.default_rng(0)
    scale = {"mean": np.zeros(DIM), "deviation": np.ones(DIM)}
    weights = rng.normal(size=(DIM + 1, 2))
    bags = np.repeat(np.arange(12), 8)
    features = rng.normal(size=(96, DIM)) + (bags % 2)[:, None]
    settings = AbmilSettings(width=8, attention_width=4, most_epochs=10, folds=2)
    abmil = train_abmil(
        features, bags, np.arange(12) % 2, np.arange(12), features, bags, settings=settings, seed=0
    ).network.to_arrays()
    return {
        "probe": head_of("probe", {**scale, "weights": weights}),
        "slide_probe": head_of("slide_probe", {**scale, "weights": weights}),
        "abmil": head_of("abmil", abmil),
        "regression": head_of(
            "regression", {"mean": np.zeros(DIM), "weights": rng.normal(size=(DIM, 1)), "offset": np.ones(1)}, ("l",)
        ),
    }


def slide(seed, n=600, rare=0.04):
    """Patches of three looks; a few of a rare look have features of their own, and looks tell only part of it."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(3, n, p=[0.6, 0.4 - rare, rare])
    features = 0.5 * rng.normal(size=(n, DIM)) + 2.5 * np.eye(3, DIM)[kind]
    looks = np.eye(3)[np.where(rng.random(n) < 0.8, kind, rng.integers(0, 3, n))] + 0.1 * rng.normal(size=(n, 3))
    return features.astype(np.float16), looks


def taking(features):
    return lambda rows: (features[rows], np.ones(len(rows), bool))


@pytest.mark.parametrize("kind", ["probe", "slide_probe", "abmil", "regression"])
def test_all_patches_give_the_answer_of_all_patches(heads, kind):
    head, (features, looks) = heads[kind], slide(1)
    whole = head.apply(features)
    found = settle(head, plan_sample(looks, len(looks), 0), taking(features), 1e-9)
    assert found.encoded == len(looks)
    assert found.settled
    np.testing.assert_allclose(found.estimate.found.values, whole.values, atol=1e-5)
    np.testing.assert_allclose(found.estimate.margin, 0, atol=1e-12)
    np.testing.assert_array_equal(np.sort(found.rows), np.arange(len(looks)))
    if kind == "abmil":
        np.testing.assert_allclose(found.estimate.found.attention, whole.attention[found.rows], rtol=1e-3, atol=1e-7)
    means = patch_terms(head, features).mean(axis=0, keepdims=True)
    np.testing.assert_allclose(answers(head, means)[0], whole.values, atol=1e-5)


@given(st.integers(1, 300), st.floats(0.001, 1), st.integers(0, 50))
def test_never_more_than_allowed_and_never_a_patch_twice(n, share, seed):
    looks = np.random.default_rng(seed).normal(size=(n, 2)).round(1)
    most = max(1, int(share * n))
    plan = plan_sample(looks, most, seed)
    np.testing.assert_array_equal(np.sort(np.concatenate(plan.rows)), np.arange(n))
    first = before = first_sizes(plan)
    for look in range(1, len(LOOKS)):
        told = np.random.default_rng(seed).exponential(size=len(first)) * (seed % 3)
        sizes = further_sizes(plan, first, told, look)
        assert (before <= sizes).all()
        assert (sizes <= plan.sizes).all()
        assert sizes.sum() <= most
        before = sizes
    assert before.sum() == most
    assert (first >= 1).all()


@given(st.integers(0, 50), st.integers(1, 3))
def test_a_half_is_told_by_the_other_half_alone(seed, look):
    looks = np.random.default_rng(seed).normal(size=(400, 2))
    plan = plan_sample(looks, 80, seed)
    first, rng = first_sizes(plan), np.random.default_rng(seed)
    told = rng.exponential(size=len(first))
    other = np.where(plan.half == 0, rng.exponential(size=len(first)), told)
    sizes, again = (further_sizes(plan, first, values, look) for values in (told, other))
    np.testing.assert_array_equal(sizes[plan.half == 0], again[plan.half == 0])
    assert (plan.twin[plan.twin] == np.arange(len(first))).all()
    assert ((plan.half != plan.half[plan.twin]) | (plan.twin == np.arange(len(first)))).all()


def test_the_mean_has_no_bias_and_the_interval_holds(heads):
    """A rare kind of patch decides; sizes from a cell's own values would find it too seldom."""
    head, (features, looks) = heads["probe"], slide(2)
    whole = head.apply(features).values[1]
    plans = [plan_sample(looks, 60, seed) for seed in range(200)]
    found = [settle(head, plan, taking(features), 1e-9).estimate for plan in plans]
    errors = np.array([one.found.values[1] for one in found]) - whole
    assert abs(errors.mean()) < 3.5 * errors.std() / np.sqrt(len(errors))
    assert np.mean(np.abs(errors) <= [one.margin[1] for one in found]) > 0.94
    uniform = [settle(head, plan_sample(looks[:, :0], 60, seed), taking(features), 1e-9) for seed in range(200)]
    alike = np.array([one.estimate.found.values[1] for one in uniform]) - whole
    assert errors.std() < alike.std()


def test_bad_patches_count_for_nothing(heads):
    head, (features, looks) = heads["probe"], slide(3)
    good = looks[:, 0] < 0.5
    broken = np.where(good[:, None], features, np.float16(np.nan))
    whole = head.apply(features[good])

    def take(rows):
        return broken[rows], good[rows]

    every = settle(head, plan_sample(looks, len(looks), 0), take, 1e-9)
    np.testing.assert_allclose(every.estimate.found.values, whole.values, atol=1e-9)
    assert len(every.rows) == good.sum()
    errors = [
        settle(head, plan_sample(looks, 90, seed), take, 1e-9).estimate.found.values[1] - whole.values[1]
        for seed in range(40)
    ]
    assert abs(np.mean(errors)) < 0.02
    assert settle(head, plan_sample(looks, 20, 0), lambda rows: (broken[rows], rows < 0), 0.1) is None


def test_a_slide_that_is_all_alike_is_settled_early_and_a_number_never_is(heads):
    features = np.tile(np.full(DIM, 1.0, np.float16), (500, 1)) + np.arange(500)[:, None].astype(np.float16) * 1e-4
    looks = np.zeros((500, 3))
    found = settle(heads["probe"], plan_sample(looks, 400, 0), taking(features), 0.05)
    assert found.settled
    assert found.encoded == int(LOOKS[0] * 400)
    few = settle(heads["probe"], plan_sample(looks, 50, 0), taking(features), 0.05)  # another kind may be unseen
    assert (few.encoded, few.settled) == (50, False)
    number = settle(heads["regression"], plan_sample(looks, 100, 0), taking(features), 0.9)
    assert (number.encoded, number.settled) == (100, False)


def test_one_patch_is_an_answer_without_an_interval(heads):
    features, looks = slide(4, n=30)
    found = settle(heads["probe"], plan_sample(looks, 1, 0), taking(features), 0.5)
    assert (found.encoded, found.settled) == (1, False)
    assert np.isinf(found.estimate.margin).all()


def test_weights_stand_for_the_whole_slide(heads):
    features, looks = slide(5)
    plan = plan_sample(looks, 60, 0)
    sizes = first_sizes(plan)
    rows = plan.chosen(sizes)
    found = estimate(heads["abmil"], plan, sizes, features[rows], np.ones(len(rows), bool))
    assert found.weights.sum() == pytest.approx(len(looks))
    assert (found.found.attention @ found.weights) == pytest.approx(1)


def test_looks_are_of_the_right_place_and_alike_patches_come_together():
    thumbnail = np.full((20, 40, 3), 240, np.uint8)
    thumbnail[:, 20:30] = (120, 60, 150)
    thumbnail[::2, 30:] = 90
    coords = np.array([[x, y] for x in (0, 40, 80, 120) for y in (0, 40)], np.int32)
    looks = appearance(thumbnail, 4.0, coords, 40)
    group = groups_of(looks, 3, 0)
    assert len(set(group.tolist())) == 3
    np.testing.assert_array_equal(group[0], group[:4])
    assert group[4] == group[5] != group[6] == group[7]
    np.testing.assert_allclose(looks.mean(axis=0), 0, atol=1e-9)
    assert groups_of(np.zeros((7, 2)), 4, 0).tolist() == [0] * 7

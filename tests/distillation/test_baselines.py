"""NT-Xent against its formula written out, and pairs of views from the loader."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from g2l_core.distillation.baselines import BaselineObjective, contrast_head, nt_xent
from g2l_core.distillation.loader import Reading, ReplayDataset
from g2l_core.distillation.replay import ReplaySpec, good_rows
from g2l_core.errors import UsageError
from g2l_core.store.features import FeatureStore
from tests.pipeline.test_distill import KEY


def written_out(z, temperature):
    """Equation 1 of arXiv 2002.05709, row by row."""
    rows = [[float(value) for value in row] for row in z]

    def cosine(a, b):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))

    losses = []
    for i, row in enumerate(rows):
        partner = i + 1 if i % 2 == 0 else i - 1
        others = sum(math.exp(cosine(row, rows[k]) / temperature) for k in range(len(rows)) if k != i)
        losses.append(-math.log(math.exp(cosine(row, rows[partner]) / temperature) / others))
    return sum(losses) / len(losses)


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(2, 5), st.floats(0.05, 2.0))
def test_nt_xent_is_its_formula(seed, pairs, dim, temperature):
    z = np.random.default_rng(seed).normal(size=(2 * pairs, dim))
    found = float(nt_xent(torch.from_numpy(z), temperature))
    assert found == pytest.approx(written_out(z, temperature), rel=1e-6, abs=1e-8)


@given(st.integers(0, 10_000), st.floats(0.1, 10.0))
def test_nt_xent_sees_directions_of_pairs_alone(seed, scale):
    z = torch.from_numpy(np.random.default_rng(seed).normal(size=(8, 3)))
    loss = nt_xent(z, 0.5)
    shuffled = z.reshape(4, 2, 3)[torch.randperm(4)].flip(1).reshape(8, 3)
    torch.testing.assert_close(nt_xent(scale * z, 0.5), loss)
    torch.testing.assert_close(nt_xent(shuffled, 0.5), loss)


def test_rows_that_are_all_alike_cost_as_a_guess_does():
    assert float(nt_xent(torch.ones(10, 4), 0.1)) == pytest.approx(math.log(9))


def test_cross_entropy_takes_its_classes_from_the_targets():
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    loss = BaselineObjective("supervised", 0.1)(logits, torch.tensor([[0.0], [2.0]]))
    first = -math.log(math.exp(2) / (math.exp(2) + 1 + math.exp(1)))
    assert float(loss) == pytest.approx((first + math.log(3)) / 2)


def test_the_head_is_a_function_of_its_seed_and_leaves_the_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, same, other = (contrast_head(8, seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one[0].weight, same[0].weight)
    assert not torch.equal(one[0].weight, other[0].weight)


def stream(store, n, given=None, **spec):
    chosen = {slide.slide_id: good_rows(slide) for slide in store.slides()}
    spec = ReplaySpec(**{"encoders": (), "n_augmented": 2, "batch_size": 8, "pool_blocks": 2, **spec})
    return list(itertools.islice(ReplayDataset(store, chosen, spec, Reading(workers=1), given).batches(0), n))


@pytest.mark.parametrize("views", [2, 0])
def test_pairs_are_two_views_of_a_patch_and_the_first_is_the_distillation_s(cached_store, views):
    store = FeatureStore.open(cached_store)
    pairs, alone = stream(store, 3, n_augmented=views, at_once=2), stream(store, 3, n_augmented=views)
    for pair, one in zip(pairs, alone, strict=True):
        assert pair.pixels.shape == (8, 2, *one.pixels.shape[1:])
        assert np.array_equal(pair.pixels[:, 0], one.pixels)
        assert not (pair.pixels[:, 0] == pair.pixels[:, 1]).all(axis=(1, 2, 3)).any()
        assert pair.targets.shape == (8, 0)


def test_given_targets_follow_their_patches(cached_store):
    store = FeatureStore.open(cached_store)
    features = {s.slide_id: s.features(KEY, view=1)[:, :3] for s in store.slides()}
    stored = stream(store, 3, encoders=(KEY,), n_augmented=1)
    for batch, expected in zip(stream(store, 3, features, n_augmented=1), stored, strict=True):
        assert np.array_equal(batch.targets, expected.targets[:, :3])


def test_more_views_at_once_than_there_are_is_refused():
    with pytest.raises(UsageError, match="3 different views of a patch need as many; there are 2"):
        ReplaySpec(encoders=(), n_augmented=2, at_once=3)

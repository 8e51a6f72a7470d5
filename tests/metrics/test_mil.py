"""Gated attention: its formula, planted witnesses, invariance, repeatability, refusals."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from g2l_core.errors import TaskError
from g2l_core.metrics import mil
from g2l_core.metrics.bags import bag_values, mean_pool
from g2l_core.metrics.mil import AbmilSettings, train_abmil
from g2l_core.metrics.probe import linear_probe

QUICK = AbmilSettings(width=32, attention_width=16, most_epochs=40, patience=10, learning_rate=3e-3)


def witness_bags(seed, bags, witnesses=2, dim=16, names="bag"):
    """A positive bag holds a few patches of a rare look; the bag's own shift hides them from the mean."""
    rng = np.random.default_rng(seed)
    rare = np.random.default_rng(99).standard_normal(dim)
    rare *= 5 / np.linalg.norm(rare)
    features, members, labels = [], [], []
    for number in range(bags):
        size = int(rng.integers(30, 60))
        patches = rng.standard_normal((size, dim)) + 0.7 * rng.standard_normal(dim)
        patches[: witnesses * (number % 2)] += rare
        features.append(rng.permutation(patches))
        members += [f"{names} {number:03d}"] * size
        labels += ["tumor" if number % 2 else "benign"] * size
    members = np.array(members)
    return np.concatenate(features).astype(np.float16), members, bag_values(np.array(labels), members, "label")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Bags this small are slower with more, by far on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def task():
    train, train_bags, labels = witness_bags(0, 100)
    test, test_bags, truth = witness_bags(1, 60, names="test")
    return train, train_bags, labels, test, test_bags, truth


@pytest.fixture(scope="module")
def result(task):
    train, bags, labels, test, test_bags, _ = task
    return train_abmil(train, bags, labels, np.arange(100), test, test_bags, settings=QUICK, seed=0)


def test_witnesses_are_found_where_the_mean_is_weak(task, result):
    train, bags, labels, test, test_bags, truth = task
    positive = truth == "tumor"
    mean = linear_probe(mean_pool(train, bags)[1], labels, mean_pool(test, test_bags)[1], c_values=(0.1,), seed=0)
    assert roc_auc_score(positive, mean.probabilities[:, 1]) < 0.8
    assert roc_auc_score(positive, result.probabilities[:, 1]) > 0.95
    assert result.classes.tolist() == ["benign", "tumor"]
    assert result.bags.tolist() == np.unique(test_bags).tolist()
    assert np.mean(result.predictions == truth) > 0.85


def test_attention_is_a_share_of_the_bag_and_rests_on_the_witnesses(task, result):
    test, test_bags, truth = task[3:]
    sums = [result.attention[test_bags == bag].sum() for bag in result.bags]
    np.testing.assert_allclose(sums, 1, atol=1e-5)
    rare = np.random.default_rng(99).standard_normal(16)
    hits = []
    for bag in result.bags[truth == "tumor"]:
        patches = test[test_bags == bag].astype(float)
        looks = (patches - np.median(patches, axis=0)) @ rare
        hits.append(looks.argmax() in np.argsort(result.attention[test_bags == bag])[-2:])
    assert np.mean(hits) > 0.8


def test_probabilities_are_those_of_the_formula():
    """Equations 7 and 9 written out in float64 for one bag."""
    network = mil._first_weights(6, 3, QUICK, seed=3)
    bag = torch.randn(11, 6, generator=torch.Generator().manual_seed(0))
    w = {name: value.detach().numpy().astype(np.float64) for name, value in network.items()}
    h = np.maximum(bag.numpy() @ w["embed"].T, 0)
    scores = [
        w["w"][0] @ (np.tanh(w["V"] @ patch) / (1 + np.exp(-w["U"] @ patch)))  # tanh * sigmoid
        for patch in h
    ]
    expected = np.exp(scores) / np.exp(scores).sum()
    logits, attention = mil._forward(network, torch.cat([bag[:4] + 1, bag]), [4, 11])
    np.testing.assert_allclose(attention.detach()[4:], expected, atol=1e-6)
    np.testing.assert_allclose(logits.detach()[1], w["classify"] @ (expected @ h), atol=1e-5)


def test_same_seed_same_bits_and_other_seed_other_weights(task, result):
    train, bags, labels, test, test_bags, _ = task
    np.random.seed(7)  # noqa: NPY002 - global states must not matter
    torch.manual_seed(7)
    again = train_abmil(train, bags, labels, np.arange(100), test, test_bags, settings=QUICK, seed=0)
    np.testing.assert_array_equal(again.probabilities, result.probabilities)
    np.testing.assert_array_equal(again.attention, result.attention)
    short = replace(QUICK, most_epochs=2)
    other = train_abmil(train, bags, labels, np.arange(100), test, test_bags, settings=short, seed=1)
    assert not np.array_equal(other.probabilities, result.probabilities)


def test_order_of_patches_does_not_matter(task):
    train, bags, labels, test, test_bags, _ = task
    short = replace(QUICK, most_epochs=3)
    plain = train_abmil(train, bags, labels, np.arange(100), test, test_bags, settings=short, seed=0)
    rng = np.random.default_rng(0)
    one, two = rng.permutation(len(train)), rng.permutation(len(test))
    mixed = train_abmil(
        train[one], bags[one], labels, np.arange(100), test[two], test_bags[two], settings=short, seed=0
    )
    np.testing.assert_allclose(mixed.probabilities, plain.probabilities, atol=1e-3)
    np.testing.assert_allclose(mixed.attention, plain.attention[two], atol=1e-4)


def test_scale_and_shift_of_a_feature_do_not_matter(task):
    train, bags, labels, test, test_bags, _ = task
    short, size = replace(QUICK, most_epochs=3), np.append(np.geomspace(0.01, 100, 15), 0)
    plain, moved = (
        train_abmil(
            (train * a + b).astype(np.float32),
            bags,
            labels,
            np.arange(100),
            (test * a + b).astype(np.float32),
            test_bags,
            settings=short,
            seed=0,
        )
        for a, b in ((size > 0, 0), (size, 3 * size + 1))
    )
    np.testing.assert_allclose(moved.probabilities, plain.probabilities, atol=1e-3)


def test_large_bags_are_drawn_from_and_small_ones_kept(task):
    rows = np.arange(10, 50)
    drawn = mil._drawn(rows, 8, 0, 3)
    assert len(drawn) == 8
    assert set(drawn) <= set(rows)
    np.testing.assert_array_equal(drawn, mil._drawn(rows, 8, 0, 3))
    assert not np.array_equal(drawn, mil._drawn(rows, 8, 1, 3))
    np.testing.assert_array_equal(mil._drawn(rows, 40, 0, 3), rows)
    train, bags, labels, test, test_bags, _ = task
    few = replace(QUICK, most_patches=8, most_epochs=2)
    got = train_abmil(train, bags, labels, np.arange(100), test, test_bags, settings=few, seed=0)
    assert len(got.attention) == len(test)


def test_training_stops_after_its_patience_with_the_best_weights(task, monkeypatch):
    """Labels without meaning: the validation loss soon rises."""
    train, bags, _, test, test_bags, _ = task
    labels = np.random.default_rng(0).permutation(np.arange(100) % 2)
    losses, real = [], mil._losses

    def kept(network, work, numbers):
        loss = real(network, work, numbers)
        if not loss.requires_grad:
            losses.extend(loss.tolist())
        return loss

    monkeypatch.setattr(mil, "_losses", kept)
    got = train_abmil(train, bags, labels, np.arange(100), test, test_bags, settings=replace(QUICK, patience=3), seed=0)
    by_epoch = np.array(losses).reshape(-1, 20).mean(axis=1)
    assert len(by_epoch) == got.epochs + 3 < 40
    assert by_epoch.argmin() + 1 == got.epochs
    assert by_epoch.min() == pytest.approx(got.validation_loss, rel=1e-6)
    up_to = replace(QUICK, most_epochs=got.epochs)
    there = train_abmil(train, bags, labels, np.arange(100), test, test_bags, settings=up_to, seed=0)
    np.testing.assert_array_equal(there.probabilities, got.probabilities)


def test_rare_class_weighs_the_same_when_balanced():
    """One positive bag in eight, told by nothing: a balanced loss gives one half, a plain one the share."""
    rng = np.random.default_rng(0)
    features, bags = rng.standard_normal((640, 4)).astype(np.float32), np.repeat(np.arange(160), 4)
    labels = (np.arange(160) % 8 == 0).astype(int)
    means = {}
    for balanced in (True, False):
        choice = replace(QUICK, class_balanced=balanced, learning_rate=1e-3)
        got = train_abmil(features, bags, labels, np.arange(160), features, bags, settings=choice, seed=0)
        means[balanced] = got.probabilities[:, 1].mean()
    assert means[True] == pytest.approx(0.5, abs=0.1)
    assert means[False] == pytest.approx(1 / 8, abs=0.06)


def test_validation_shares_no_patient_with_training(task, monkeypatch):
    train, bags, labels, test, test_bags, _ = task
    patients = np.arange(100) // 4
    seen, real = [], mil._train
    monkeypatch.setattr(mil, "_train", lambda work, *rest: seen.append(work) or real(work, *rest))
    train_abmil(train, bags, labels, patients, test, test_bags, settings=replace(QUICK, most_epochs=1), seed=0)
    (work,) = seen
    assert not set(patients[work.fit]) & set(patients[work.held])
    assert len(work.fit) + len(work.held) == 100


def test_what_cannot_be_trained_is_refused(task):
    train, bags, labels, test, test_bags, _ = task
    patients = np.arange(100)
    with pytest.raises(TaskError, match="two classes"):
        train_abmil(train, bags, np.zeros(100), patients, test, test_bags, seed=0)
    with pytest.raises(TaskError, match="class rare has 3 groups, fewer than the 5 folds"):
        train_abmil(train, bags, np.where(patients < 3, "rare", "common"), patients, test, test_bags, seed=0)
    with pytest.raises(TaskError, match="training_bags 100, labels 99"):
        train_abmil(train, bags, labels[1:], patients, test, test_bags, seed=0)
    with pytest.raises(TaskError, match="test_dim 15"):
        train_abmil(train, bags, labels, patients, test[:, 1:], test_bags, seed=0)
    for change, message in (({"most_epochs": 0}, "at least 1"), ({"learning_rate": 1e30}, "never finite")):
        choice = replace(QUICK, **change)
        with pytest.raises(TaskError, match=message):
            train_abmil(train, bags, labels, patients, test, test_bags, settings=choice, seed=0)
    broken = test.copy()
    broken[0] = np.nan
    with pytest.raises(TaskError, match="1 of .* rows of the test features"):
        train_abmil(train, bags, labels, patients, broken, test_bags, seed=0)


def test_importing_metrics_does_not_import_torch():
    modules = "bags center_bias consistency folds mil robustness survival".split()
    code = f"import sys; from g2l_core.metrics import {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

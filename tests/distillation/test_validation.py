"""Held-out figures against scikit-learn, and the warnings of a run's curves, drawn by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score
from sklearn.neighbors import NearestNeighbors

from g2l_core.distillation.distiller import Distiller
from g2l_core.distillation.held_out import HeldOutSet
from g2l_core.distillation.validation import Curves, held_out_metrics, neighbor_overlap, training_warnings
from g2l_core.encoders.loading import load_encoder
from g2l_core.encoders.resolve import resolve_encoder


def overlap_by_sklearn(x, y, k):
    def near(z):
        z = z / np.linalg.norm(z, axis=1, keepdims=True)
        found = NearestNeighbors(n_neighbors=k + 1, algorithm="brute").fit(z).kneighbors(z, return_distance=False)
        return [set(row.tolist()) - {i} for i, row in enumerate(found)]

    return np.mean([len(a & b) / k for a, b in zip(near(x), near(y), strict=True)])


def test_neighbor_overlap_is_sklearn_s():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 8)).astype(np.float32)
    y = (x @ rng.normal(size=(8, 5)) + 0.5 * rng.normal(size=(60, 5))).astype(np.float32)
    assert neighbor_overlap(x, y, 10) == pytest.approx(overlap_by_sklearn(x, y, 10))
    assert neighbor_overlap(x, 2 * x, 10) == 1
    assert neighbor_overlap(x[:4], y[:4], 10) == 1  # no more than three others


def test_figures_of_held_out_patches():
    student = load_encoder(resolve_encoder("timm:mobilenetv3_small_050@64", weights="random:0"))
    distiller = Distiller(student.module, student.dim, 16, seed=0).train()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 64, 64, 3), np.uint8)
    with torch.inference_mode():
        distiller.eval()
        projected = distiller(torch.from_numpy(pixels)).numpy()
        distiller.train()
    targets = (projected + projected.std(0) * rng.normal(size=projected.shape)).astype(np.float16)
    found = held_out_metrics(distiller, HeldOutSet(pixels=pixels, targets=targets), torch.device("cpu"), 16)
    assert distiller.training
    s, t = ((z - z.mean(0)) / z.std(0) for z in (projected, targets.astype(np.float32)))
    calibrated = [LinearRegression().fit(s[:, [d]], t[:, d]).predict(s[:, [d]]) for d in range(16)]
    assert found["r2_projected"] == pytest.approx(r2_score(t, np.stack(calibrated, axis=1)), abs=1e-3)
    cosines = (s * t).sum(1) / np.linalg.norm(s, axis=1) / np.linalg.norm(t, axis=1)
    assert found["cosine_projected"] == pytest.approx(cosines.mean(), abs=1e-3)
    assert found["cka_debiased"] < found["cka_biased"] <= 1


def curves(cka, r2=None, losses=None, steps=1000, every=100):
    r2 = r2 if r2 is not None else np.linspace(0, 0.5, len(cka))
    rows = [
        {"step": float(every * i), "cka_debiased": c, "r2_projected": float(r)}
        for i, (c, r) in enumerate(zip(cka, r2, strict=True))
    ]
    losses = losses if losses is not None else np.linspace(2, 1, every * max(0, len(cka) - 1)).tolist()
    return Curves(validations=rows, losses=losses, steps=steps)


def test_a_healthy_run_warns_of_nothing():
    assert training_warnings(curves([0.1, 0.3, 0.4, 0.5, 0.55, 0.6, 0.64])) == []
    assert training_warnings(curves([0.1])) == []
    assert training_warnings(curves([])) == []


def test_a_stalled_cka_is_told():
    flat = [0.1, 0.3, 0.301, 0.299, 0.302, 0.3, 0.301]
    assert "CKA to the teacher has stalled at 0.301" in training_warnings(curves(flat))[0]
    assert training_warnings(curves(flat, steps=700)) == []  # the annealed end leaves no room
    assert (
        training_warnings(curves([0.95 + 0.001 * (i % 2) for i in range(7)])) == []
    )  # near the top there is none either


def test_curves_that_part_are_told():
    cka, falling = [0.1, 0.2, 0.3, 0.4, 0.5], [0.1, 0.4, 0.35, 0.3, 0.2]
    assert "training loss falls while held-out R^2 has fallen 3 times" in training_warnings(curves(cka, falling))[0]
    rising_loss = np.linspace(1, 2, 400).tolist()
    assert training_warnings(curves(cka, falling, rising_loss)) == []
    assert training_warnings(curves(cka, [0.1, 0.4, 0.35, 0.36, 0.2])) == []


def test_learning_by_heart_needs_something_learned():
    """Before CKA has gained anything, a falling R^2 is noise."""
    falling = [0.1, 0.4, 0.35, 0.3, 0.2]
    assert training_warnings(curves([0.3, 0.302, 0.303, 0.301, 0.3], falling)) == []
    assert len(training_warnings(curves([0.3, 0.31, 0.303, 0.301, 0.3], falling))) == 1


def over(cka, losses=None):
    drawn = curves(cka, losses=losses, steps=100 * (len(cka) - 1))
    return training_warnings(replace(drawn, is_over=True))


def test_a_run_that_ends_below_its_start_is_told():
    (warning,) = over([0.089, 0.05, 0.012])
    assert warning.startswith(
        "nothing was learned: CKA to the teacher was 0.089 before training and is 0.012 at the end, best at step 0. "
    )
    assert "Lower --lr" in warning
    (warning,) = over([0.1, 0.4, 0.05])
    assert warning.startswith("what was learned is lost again: CKA to the teacher was 0.100 before")
    assert "best at step 100" in warning
    (warning,) = over([0.1, 0.4, float("nan")])
    assert "is nan at the end, best at step 100" in warning
    assert over([0.1, 0.2, 0.3]) == []
    assert training_warnings(curves([0.089, 0.05, 0.012], steps=1000)) == []  # it may still rise


def test_a_loss_that_never_fell_is_told():
    (warning,) = over([0.1, 0.2, 0.3], losses=[2.0] * 200)
    assert warning.startswith("loss has not fallen: 2.000 over the first 20 steps, 2.000 over the last. Change --lr")
    (warning,) = over([0.1, 0.2, 0.3], losses=[2.0] * 180 + [float("nan")] * 20)
    assert "nan over the last" in warning
    assert over([0.1, 0.2], losses=[2.0, 2.0, 2.0]) == []  # too few steps to tell

"""The loss of several teachers and widths, against a few lines of NumPy for each way to balance it."""

import numpy as np
import pytest
import torch

from g2l_core.distillation import joint
from g2l_core.distillation.distiller import HeadLayout, Projectors, head_layout
from g2l_core.distillation.joint import Balance, JointObjective
from g2l_core.distillation.objective import Objective, TargetStatistics
from g2l_core.distillation.spec import ObjectiveSpec, TeachersSpec, TrainSettings, read_widths
from g2l_core.errors import UnknownNameError, UsageError

DIMS, WIDTHS, N = (6, 10, 4), (3, 8), 12
LAYOUT = HeadLayout(teachers=("a", "b", "c"), dims=DIMS, widths=WIDTHS)
NONE = {"teacher_norm": "none"}


def draw(seed=0):
    generator = torch.Generator().manual_seed(seed)
    projected = torch.randn(N, sum(DIMS) * len(WIDTHS), generator=generator, requires_grad=True)
    return projected, torch.randn(N, sum(DIMS), generator=generator)


def build(losses=("mse", "mse", "cosine"), kind="fixed", weights=(1.0, 2.0, 0.5), *, masked=False, **more):
    objectives = [Objective(ObjectiveSpec(loss=loss, **{**NONE, **more})) for loss in losses]
    return JointObjective(LAYOUT, objectives, Balance(kind=kind, weights=weights, masked=masked))


def parts_of(projected, targets):
    """[teacher][width] -> (student, teacher), cut by hand."""
    s, t = projected.detach().double().numpy(), targets.double().numpy()
    cuts, start, first = [], 0, 0
    for dim in DIMS:
        cuts.append([(s[:, start + dim * m : start + dim * (m + 1)], t[:, first : first + dim]) for m in range(2)])
        start, first = start + 2 * dim, first + dim
    return cuts


def row_losses(loss, s, t):
    if loss == "mse":
        return np.square(s - t).mean(axis=1)
    return 1 - (s * t).sum(axis=1) / np.linalg.norm(s, axis=1) / np.linalg.norm(t, axis=1)


def by_rows(projected, targets, losses=("mse", "mse", "cosine")):
    """(teacher, width, row)."""
    cuts = parts_of(projected, targets)
    return np.array([[row_losses(loss, s, t) for s, t in of] for loss, of in zip(losses, cuts, strict=True)])


def test_fixed_weights_and_the_mean_over_widths():
    projected, targets = draw()
    objective = build()
    rows = by_rows(projected, targets)
    wanted = np.average(rows.mean(axis=(1, 2)), weights=[1, 2, 0.5])
    assert float(objective(projected, targets).detach()) == pytest.approx(wanted, rel=1e-5)
    logged = {name: float(value) for name, value in objective.logged().items()}
    assert logged["loss_per_element"] == pytest.approx(wanted, rel=1e-5)
    assert [logged[f"loss:{name}"] for name in "abc"] == pytest.approx(rows.mean(axis=(1, 2)), rel=1e-5)
    assert [logged[f"loss@{width}"] for width in WIDTHS] == pytest.approx(rows.mean(axis=(0, 2)), rel=1e-5)


def test_one_teacher_at_one_width_is_its_own_objective_to_the_bit():
    student, teacher = torch.randn(N, 6), torch.randn(N, 6)
    layout = HeadLayout(teachers=("a",), dims=(6,), widths=(8,))
    alone = Objective(ObjectiveSpec())
    found = JointObjective(layout, [alone], Balance(kind="fixed", weights=(1.0,)))(student, teacher)
    assert torch.equal(found, alone(student, teacher))


def test_a_comparable_value_of_log_sum_losses():
    """L - log(n d) of each teacher, as for one teacher."""
    projected, targets = draw()
    objective = build(("logsum",) * 3, weights=(1.0, 1.0, 1.0), teacher_norm="batch")
    loss = float(objective(projected, targets).detach())
    offset = np.mean([np.log(N * dim) for dim in DIMS])
    assert float(objective.logged()["loss_per_element"]) == pytest.approx(loss - offset, rel=1e-5)


def test_running_divides_by_the_corrected_running_mean():
    objective = build(kind="running").train()
    means, wanted = np.zeros(3), []
    for step in range(1, 6):
        projected, targets = draw(step)
        losses = by_rows(projected, targets).mean(axis=(1, 2))
        means = 0.99 * means + 0.01 * losses
        scale = means / (1 - 0.99**step)
        wanted = np.average(losses / scale, weights=[1, 2, 0.5])
        assert float(objective(projected, targets).detach()) == pytest.approx(wanted, rel=1e-5)
    shares = np.array([1, 2, 0.5]) / scale
    logged = [float(objective.logged()[f"share:{name}"]) for name in "abc"]
    assert logged == pytest.approx(shares / shares.sum(), rel=1e-4)


def test_a_log_sum_among_others_is_not_divided():
    projected, targets = draw()
    objective = build(("logsum", "mse", "mse"), kind="running", weights=(1.0, 1.0, 1.0))
    value = float(objective(projected, targets).detach())
    alone = float(build(("logsum",) * 3, weights=(1.0, 1e-9, 1e-9))(projected, targets).detach())
    assert value == pytest.approx((alone + 1 + 1) / 3, rel=1e-4)  # others are divided by themselves at the first step


def test_dropping_is_unic_s(monkeypatch):
    """Their program in loops: the largest stays, every other goes with probability 1/2, kept ones are averaged."""
    projected, targets = draw()
    draws = torch.rand(3, N, generator=torch.Generator().manual_seed(9))
    monkeypatch.setattr(joint.torch, "rand", lambda shape: draws)
    objective = build(kind="dropping", weights=(1.0, 1.0, 1.0))
    losses = by_rows(projected, targets).mean(axis=1)
    coefficients = np.ones((3, N))
    for n in range(N):
        for i in range(3):
            if i != losses[:, n].argmax() and float(draws[i, n]) < 0.5:
                coefficients[i, n] = 0
    wanted = (coefficients * losses).sum() / coefficients.sum()
    loss = objective(projected, targets)
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-5)
    shares = [float(objective.logged()[f"share:{name}"]) for name in "abc"]
    assert shares == pytest.approx(coefficients.sum(axis=1) / coefficients.sum(), rel=1e-5)
    loss.backward()
    dropped = projected.grad[:, : 2 * DIMS[0]][coefficients[0] == 0]
    assert len(dropped)
    assert not dropped.any()


@pytest.mark.parametrize(
    ("loss", "more"),
    [
        ("mse", {}), ("smooth_l1", {}), ("cosine", {}), ("kl", {}), ("mse", {"teacher_norm": "batch"}),
        ("logsum", {"reduce": "per-sample", "teacher_norm": "batch"}), ("kl_queue", {}),
    ],
)  # fmt: skip
def test_the_losses_of_patches_average_to_the_loss(loss, more):
    spec = ObjectiveSpec(loss=loss, **{**NONE, **more})
    objective = Objective(spec, TargetStatistics(mean=torch.zeros(6), deviation=torch.ones(6), bank=torch.randn(9, 6)))
    student, teacher = torch.randn(N, 6), torch.randn(N, 6)
    found = objective.by_patch(student, teacher)
    assert found.shape == (N,)
    whole = spec.comparable(float(objective(student, teacher)), N, 6)
    assert float(found.mean()) == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("kind", ["fixed", "running", "dropping"])
def test_a_missing_target_is_ignored(kind, monkeypatch):
    """The other rows give the same as if the missing ones had never been in that teacher's loss."""
    monkeypatch.setattr(joint.torch, "rand", torch.ones)  # dropping drops nothing
    projected, targets = draw()
    masked = targets.clone()
    masked[:5, : DIMS[0]] = float("nan")
    objective = build(kind=kind, weights=(1.0, 1.0, 1.0), masked=True)
    loss = objective(projected, masked)
    rows = by_rows(projected, targets).mean(axis=1)
    losses = np.array([rows[0, 5:].mean(), rows[1].mean(), rows[2].mean()])
    shares = np.array([7 / 12, 1, 1])
    wanted = 1.0 / shares.sum() * (shares.sum() if kind == "running" else (shares * losses).sum())
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-5)
    loss.backward()
    assert torch.isfinite(projected.grad).all()
    assert not projected.grad[:5, : 2 * DIMS[0]].any()
    assert projected.grad[5:, : 2 * DIMS[0]].abs().sum() > 0


@pytest.mark.parametrize("kind", ["fixed", "running", "dropping"])
def test_a_teacher_that_no_patch_has(kind):
    projected, targets = draw()
    targets[:, : DIMS[0]] = float("nan")
    objective = build(kind=kind, weights=(1.0, 1.0, 1.0), masked=True)
    loss = objective(projected, targets)
    loss.backward()
    assert float(loss.detach()) > 0
    assert projected.grad is not None
    assert not projected.grad[:, : 2 * DIMS[0]].any()
    assert np.isnan(float(objective.logged()["loss:a"]))


def test_each_width_has_a_projector_of_its_own_on_the_first_features():
    features = torch.randn(N, 8)
    projectors = Projectors(LAYOUT, "linear", seed=0)
    parts = LAYOUT.split(projectors(features))
    for i, dim in enumerate(DIMS):
        for m, width in enumerate(WIDTHS):
            head = projectors.heads[2 * i + m]
            assert tuple(head.weight.shape) == (dim, width)
            torch.testing.assert_close(parts[i][m], features[:, :width] @ head.weight.T + head.bias)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build(("logsum", "mse", "mse"), kind="dropping"), "logsum has none: use mse"),
        (lambda: build(("rkd", "mse", "mse"), kind="dropping"), "rkd has none"),
        (lambda: build(("logsum",) * 3, kind="running"), "running changes nothing of Log-Sum losses"),
        (lambda: TeachersSpec(balance="droping"), "unknown balance 'droping'. Did you mean dropping"),
        (lambda: TeachersSpec(missing="ignore"), "unknown missing 'ignore'"),
        (lambda: TeachersSpec(balance="dropping", weights=("a=2",)), "has no weights"),
        (lambda: TeachersSpec(weights=("a",)), "--teacher-weight a: expected TEACHER=NUMBER"),
        (lambda: TeachersSpec(weights=("a=0",)), "a number above 0"),
        (lambda: TeachersSpec(weights=("a=nan",)), "a number above 0"),
        (lambda: TeachersSpec(weights=("a=1", "a=2")), "gives a two weights"),
        (lambda: ObjectiveSpec(loss="mse,cosine"), "expected one loss for all teachers that it does not name"),
        (lambda: ObjectiveSpec(loss="a=mse,a=cosine"), "gives a two losses"),
        (lambda: ObjectiveSpec(loss="mse,a=mze"), "unknown loss 'mze'. Did you mean mse"),
        (lambda: ObjectiveSpec(loss="mse,a=cosine", temperature=2.0), "a temperature is for kl, kl_queue"),
        (lambda: ObjectiveSpec(loss="mse,a=logsum_corr", teacher_norm="phi-s"), "needs teacher-norm batch"),
        (lambda: TrainSettings(steps=1, nested=(64, 128, 64)), "names the width 64 twice"),
        (lambda: TrainSettings(steps=1, nested=(0,)), "widths of at least 1"),
        (lambda: read_widths("64,x"), "expected whole numbers by comma.*not 'x'"),
        (lambda: head_layout(["a"], [4], [64, 600], 576), "a width of 600 is more than the 576 features"),
        (
            lambda: TrainSettings(
                steps=1, objective=ObjectiveSpec(reduce="global"), teachers=TeachersSpec(missing="mask")
            ),
            "global statistics and reductions cannot join",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises((UsageError, UnknownNameError), match=message):
        make()


def test_all_features_are_always_among_the_widths():
    assert head_layout(["a"], [4], [128, 64], 576).widths == (64, 128, 576)
    assert head_layout(["a"], [4], [], 576).is_single
    assert read_widths(" 64, 128") == (64, 128)
    assert read_widths("none") == ()


def test_a_loss_for_some_teachers_and_one_for_all_others():
    spec = ObjectiveSpec(loss="logsum, uni = kl", temperature=2.0)
    assert spec.losses_by_teacher() == ({"uni": "kl"}, "logsum")
    assert spec.with_loss("kl").temperature == 2.0
    assert spec.with_loss("logsum").temperature is None

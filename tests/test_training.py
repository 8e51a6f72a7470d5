"""The loop: its rules one by one, checkpoints that survive anything, and a student that learns."""

import csv
import itertools
import math

import numpy as np
import pytest
import torch

from g2l_core.encoder_loading import load_encoder
from g2l_core.encoders import resolve_encoder
from g2l_core.errors import RunError, UnknownNameError, UsageError
from g2l_core.loader import Batch
from g2l_core.training import CsvLog, Distiller, EarlyStop, TrainSettings, cosine, load_checkpoint, train

STUDENT = "timm:mobilenetv3_small_050@64"
DIM = 24


def settings(**changes):
    return TrainSettings(**{"steps": 6, "lr": 1e-3, "validate_every": 3, "checkpoint_every": 2, **changes})


def distiller():
    student = load_encoder(resolve_encoder(STUDENT, weights="random:0"))
    return Distiller(student.module.requires_grad_(True), student.dim, DIM, seed=0)


def batches(start=0):
    """An endless stream whose batch is a function of its position; targets are a function of the pixels."""
    mixing = np.random.default_rng(0).normal(size=(3, DIM))
    while True:
        rng = np.random.default_rng(1000 + start)
        colours = rng.integers(0, 256, (8, 1, 1, 3))
        noise = rng.integers(-20, 20, (8, 64, 64, 3))
        targets = np.tanh((colours[:, 0, 0] / 128 - 1) @ mixing).astype(np.float16)
        yield Batch(position=start, epoch=0, pixels=np.clip(colours + noise, 0, 255).astype(np.uint8), targets=targets)
        start += 1


def run(folder, model=None, **changes):
    folder.mkdir(exist_ok=True)
    model = model or distiller()
    outcome = train(
        model,
        batches,
        settings(**changes),
        folder,
        device=torch.device("cpu"),
        autocast=None,
        validate=lambda step: {"figure": float(step)},
        report=lambda step, loss: None,
    )
    return model, outcome


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_it_learns_and_logs_every_step(tmp_path):
    _, outcome = run(tmp_path, steps=40, early_stop_patience=0)
    log = rows(tmp_path / "log.csv")
    assert [int(row["step"]) for row in log] == list(range(40))
    losses = [float(row["loss"]) for row in log]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 1
    assert float(log[0]["loss_per_element"]) == pytest.approx(losses[0] - math.log(8 * DIM))
    assert (outcome.steps, outcome.stopped_early) == (40, False)
    assert [int(row["step"]) for row in rows(tmp_path / "validation.csv")] == [0, *range(3, 40, 3), 40]


def test_rates_are_cosine_annealed_together(tmp_path):
    run(tmp_path)
    for row in rows(tmp_path / "log.csv"):
        factor = 0.5 * (1 + math.cos(math.pi * int(row["step"]) / 6))
        assert float(row["lr"]) == pytest.approx(1e-3 * factor)
        assert float(row["weight_decay"]) == pytest.approx(0.05 * factor)
    assert cosine(0, 6) == 1
    assert 0 < cosine(5, 6) < 0.1


def test_the_annealed_decay_is_what_adamw_applies(tmp_path):
    """A weight without gradient shrinks by the product of 1 - lr_t wd_t, and by nothing else."""
    model = distiller()
    model.register_parameter("idle", torch.nn.Parameter(torch.ones(1)))
    original = model.forward
    model.forward = lambda pixels: original(pixels) + 0 * model.idle
    run(tmp_path, model, weight_decay=0.5, lr=1e-2)
    expected = math.prod(1 - 1e-2 * 0.5 * cosine(t, 6) ** 2 for t in range(6))
    assert float(model.idle.detach()) == pytest.approx(expected, rel=1e-6)


def test_stopping_at_any_step_and_resuming_gives_the_same_weights(tmp_path):
    whole, _ = run(tmp_path / "whole")
    for stop in (1, 2, 5):
        folder = tmp_path / f"stopped-{stop}"
        with pytest.raises(KeyboardInterrupt):
            interrupted(folder, stop)
        again, _ = run(folder)
        assert same_weights(whole, again)
        ours, theirs = rows(folder / "log.csv"), rows(tmp_path / "whole" / "log.csv")
        assert [row["loss"] for row in ours] == [row["loss"] for row in theirs]
        assert rows(folder / "validation.csv") == rows(tmp_path / "whole" / "validation.csv")


def interrupted(folder, stop):
    def report(step, _loss):
        if step == stop:
            raise KeyboardInterrupt

    folder.mkdir()
    train(
        distiller(),
        batches,
        settings(),
        folder,
        device=torch.device("cpu"),
        autocast=None,
        validate=lambda step: {"figure": float(step)},
        report=report,
    )


def test_a_torn_checkpoint_is_passed_over(tmp_path):
    whole, _ = run(tmp_path / "whole")
    run(tmp_path / "torn", steps=6)
    newest = sorted((tmp_path / "torn" / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    again, _ = run(tmp_path / "torn")
    assert same_weights(whole, again)


def test_two_checkpoints_are_kept_and_a_finished_run_stays(tmp_path):
    model, _ = run(tmp_path)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000004.pt", "step-00000006.pt"]
    again, outcome = run(tmp_path)
    assert outcome.steps == 6
    assert same_weights(model, again)


def test_early_stop_needs_a_full_window_and_more_than_patience_in_a_row():
    rule = EarlyStop(window=3, patience=2)
    assert not any(rule.update(loss) for loss in (1.0, 1.0, 1.0))
    assert not rule.update(2.0)  # above the mean, once
    assert not rule.update(1.0)  # below it: the count begins anew
    assert [rule.update(loss) for loss in (5.0, 6.0, 7.0)] == [False, False, True]


def test_early_stop_can_be_off():
    rule = EarlyStop(window=2, patience=0)
    assert not any(rule.update(float(loss)) for loss in range(100))


def test_early_stop_ends_the_run(tmp_path):
    steps = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainSettings, "loss_of", lambda self, s, t: (s * 0).sum() + next(steps))
        _, outcome = run(tmp_path, steps=50, early_stop_window=5, early_stop_patience=3)
    assert outcome.stopped_early
    assert outcome.steps == 5 + 4


def test_a_loss_that_is_no_number_ends_the_run_with_a_clear_line(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainSettings, "loss_of", lambda self, s, t: (s * float("nan")).sum())
        with pytest.raises(RunError, match="loss of step 0 is nan. Lower --lr"):
            run(tmp_path)


def test_a_line_cut_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("step,loss\n0,1.5\n1,1.25\n2")
    log = CsvLog(path, keep_below=5)
    log.write({"step": 2, "loss": 1.0})
    assert path.read_text().split() == ["step,loss", "0,1.5", "1,1.25", "2,1.0"]


def test_unknown_loss_and_bad_settings():
    with pytest.raises(UnknownNameError, match="unknown loss 'logsumm'. Did you mean logsum"):
        settings(loss="logsumm")
    for bad in ({"steps": 0}, {"lr": 0.0}, {"weight_decay": -1.0}):
        with pytest.raises(UsageError):
            settings(**bad)


@pytest.mark.parametrize("loss", ["logsum", "mse", "cosine", "smooth_l1"])
def test_every_loss_trains_under_bfloat16(tmp_path, loss):
    model = distiller()
    outcome = train(
        model,
        batches,
        settings(steps=2, loss=loss),
        tmp_path,
        device=torch.device("cpu"),
        autocast=torch.bfloat16,
        validate=lambda step: {"figure": 0.0},
        report=lambda step, loss: None,
    )
    assert math.isfinite(outcome.last_loss)


def test_a_projector_is_a_function_of_the_seed_alone():
    torch.manual_seed(5)
    first = distiller()
    torch.manual_seed(6)
    assert same_weights(first, distiller())


def test_no_checkpoint_is_step_zero(tmp_path):
    model = distiller()
    optimizer = torch.optim.AdamW(model.parameters())
    step, stopped, _ = load_checkpoint(tmp_path, model, optimizer, EarlyStop(3, 3))
    assert (step, stopped) == (0, False)

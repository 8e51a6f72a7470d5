"""The loop: its rules one by one, checkpoints that survive anything, and a student that learns."""

import csv
import itertools
import math
from dataclasses import fields

import numpy as np
import pytest
import torch

from g2l_core.distillation.checkpoints import RunState, restore, restore_best
from g2l_core.distillation.distiller import Distiller, checkpoint_gradients
from g2l_core.distillation.loader import Batch
from g2l_core.distillation.logs import CsvLog
from g2l_core.distillation.objective import Objective, ObjectiveSpec
from g2l_core.distillation.optim import EarlyStop, OptimSpec, build_optimizer, cosine
from g2l_core.distillation.training import TrainerHooks, TrainSettings, train
from g2l_core.encoders.loading import load_encoder
from g2l_core.encoders.resolve import resolve_encoder
from g2l_core.errors import RunError, UnknownNameError, UsageError

STUDENT = "timm:mobilenetv3_small_050@64"
DIM = 24


OPTIM = {field.name for field in fields(OptimSpec)}


def settings(**changes):
    """Settings with some changed; those of the optimizer and the loss may be given beside the others."""
    given = {"steps": 6, "lr": 1e-3, "validate_every": 3, "checkpoint_every": 2, "best_by": "figure", **changes}
    optim = OptimSpec(**{name: given.pop(name) for name in list(given) if name in OPTIM})
    return TrainSettings(optim=optim, objective=ObjectiveSpec(loss=given.pop("loss", "logsum")), **given)


def distiller(projector="linear"):
    student = load_encoder(resolve_encoder(STUDENT, weights="random:0"))
    return Distiller(student.module.requires_grad_(True), student.dim, DIM, seed=0, projector=projector)


def batches(start=0):
    """An endless stream whose batch is a function of its position; targets are a function of the pixels."""
    mixing = np.random.default_rng(0).normal(size=(3, DIM))
    while True:
        rng = np.random.default_rng(1000 + start)
        colors = rng.integers(0, 256, (8, 1, 1, 3))
        noise = rng.integers(-20, 20, (8, 64, 64, 3))
        targets = np.tanh((colors[:, 0, 0] / 128 - 1) @ mixing).astype(np.float16)
        yield Batch(position=start, epoch=0, pixels=np.clip(colors + noise, 0, 255).astype(np.uint8), targets=targets)
        start += 1


def hooks(**changes):
    defaults = {
        "batches": batches, "validate": lambda _: {"figure": 1.0}, "warn": lambda state, folder: None,
        "report": lambda step, loss: None,
    }  # fmt: skip
    return TrainerHooks(**{**defaults, **changes})


def run(folder, model=None, calls=None, **changes):
    folder.mkdir(exist_ok=True)
    model = model or distiller()
    chosen = settings(**changes)
    outcome, _ = train(model, Objective(chosen.objective), chosen, folder, calls or hooks())
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


def interrupted(folder, stop, **changes):
    def report(step, _loss):
        if step == stop:
            raise KeyboardInterrupt

    run(folder, calls=hooks(report=report), **changes)


def test_a_torn_checkpoint_is_passed_over(tmp_path):
    whole, _ = run(tmp_path / "whole")
    run(tmp_path / "torn", steps=6)
    newest = sorted((tmp_path / "torn" / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    again, _ = run(tmp_path / "torn")
    assert same_weights(whole, again)


def test_two_checkpoints_are_kept_and_a_finished_run_stays(tmp_path):
    model, _ = run(tmp_path)
    kept = [path.name for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert kept == ["best.pt", "step-00000004.pt", "step-00000006.pt"]
    again, outcome = run(tmp_path)
    assert outcome.steps == 6
    assert same_weights(model, again)


def test_early_stop_needs_a_full_window_and_more_than_patience_in_a_row():
    rule = EarlyStop(window=3, patience=2)
    assert not any(rule.update(loss) for loss in (1.0, 1.0, 1.0))
    assert not rule.update(2.0)  # above the mean, once
    assert not rule.update(1.0)  # below it: the count begins again
    assert [rule.update(loss) for loss in (5.0, 6.0, 7.0)] == [False, False, True]


def test_early_stop_can_be_off():
    rule = EarlyStop(window=2, patience=0)
    assert not any(rule.update(float(loss)) for loss in range(100))


def test_early_stop_ends_the_run(tmp_path):
    steps = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "forward", lambda self, s, t: (s * 0).sum() + next(steps))
        _, outcome = run(tmp_path, steps=50, early_stop_window=5, early_stop_patience=3)
    assert outcome.stopped_early
    assert outcome.steps == 5 + 4


def test_a_loss_that_is_no_number_ends_the_run_with_a_clear_line(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "forward", lambda self, s, t: (s * float("nan")).sum())
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


@pytest.mark.parametrize("loss", ["logsum", "logsum_corr", "mse", "cosine", "smooth_l1", "kl", "rkd"])
def test_every_loss_trains_under_bfloat16(tmp_path, loss):
    _, outcome = run(tmp_path, calls=hooks(autocast=torch.bfloat16), steps=2, loss=loss)
    assert math.isfinite(outcome.last_loss)


def test_a_projector_is_a_function_of_the_seed_alone():
    torch.manual_seed(5)
    first = distiller()
    torch.manual_seed(6)
    assert same_weights(first, distiller())


def state_of(model, **optim):
    return RunState(distiller=model, optimizer=build_optimizer(model, OptimSpec(**optim)), early_stop=EarlyStop(3, 3))


def test_no_checkpoint_is_step_zero(tmp_path):
    state = state_of(distiller())
    notes = []
    restore(tmp_path, state, notes.append)
    assert ((state.step, state.stopped), notes) == ((0, False), [])
    assert restore_best(tmp_path, state.distiller, notes.append) is None
    assert "best.pt cannot be used" in notes[0]


# ---- what is off by default -----------------------------------------------------------------------------------


def test_warm_up_scales_the_learning_rate_alone(tmp_path):
    run(tmp_path, warmup=3)
    for row in rows(tmp_path / "log.csv"):
        step = int(row["step"])
        assert float(row["lr"]) == pytest.approx(1e-3 * cosine(step, 6) * min(1, (step + 1) / 3))
        assert float(row["weight_decay"]) == pytest.approx(0.05 * cosine(step, 6))


def test_accumulated_batches_make_one_step(tmp_path):
    """Two batches a step: positions advance by two, and the gradient is the mean of theirs."""
    model, _ = run(tmp_path / "two", steps=1, accumulate=2, weight_decay=0.0)
    by_hand, objective = distiller(), Objective(ObjectiveSpec())
    by_hand.train()
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=1e-3, weight_decay=0.0)
    for batch in itertools.islice(batches(), 2):
        loss = objective(by_hand(torch.from_numpy(batch.pixels)), torch.from_numpy(batch.targets))
        (loss / 2).backward()
    optimizer.step()
    assert same_weights(model, by_hand)
    whole, _ = run(tmp_path / "whole", accumulate=2)
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "stopped", 3, accumulate=2)
    again, _ = run(tmp_path / "stopped", accumulate=2)
    assert same_weights(whole, again)


def test_clipping_bounds_the_gradient(tmp_path):
    norms = []
    original = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.stack([g.norm() for g in grads]).norm()))
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        run(tmp_path / "free")
        free, norms[:] = max(norms), []
        run(tmp_path / "clipped", clip=free / 10)
    assert max(norms) <= free / 10 * 1.001


def test_layers_near_the_input_learn_more_slowly():
    vit = resolve_encoder("timm:vit_tiny_patch16_224@32", weights="random:0")
    student = load_encoder(vit)
    model = Distiller(student.module.requires_grad_(True), student.dim, DIM, seed=0)
    groups = build_optimizer(model, OptimSpec(layer_decay=0.5)).param_groups
    share = {id(p): group["share"] for group in groups for p in group["params"]}
    assert len(share) == sum(1 for _ in model.parameters())
    network = model.student.network
    shares = [share[id(block.norm1.weight)] for block in network.blocks]
    assert shares == pytest.approx([0.5 ** (11 - i) for i in range(12)])
    assert share[id(network.patch_embed.proj.weight)] == pytest.approx(0.5**12)
    assert share[id(model.projector.weight)] == 1


def test_averaged_weights_are_validated_and_kept(tmp_path):
    eval_model = []
    model = distiller()
    chosen = settings(ema=0.5, steps=3, validate_every=1)
    seen = []

    def report(_step, _loss):
        seen.append(model.projector.weight.detach().clone())

    first = model.projector.weight.detach().clone()
    calls = hooks(validate=lambda w: eval_model.append(w.projector.weight.clone()) or {"figure": 1.0}, report=report)
    _, state = train(model, Objective(chosen.objective), chosen, tmp_path, calls)
    average = first
    for weight in seen:
        average = average.lerp(weight, 0.5)
    torch.testing.assert_close(state.eval_model.projector.weight, average)
    torch.testing.assert_close(eval_model[-1], average)
    whole = state.eval_model
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "stopped", 2, ema=0.5)
    again = distiller()
    chosen = settings(ema=0.5)
    _, resumed = train(again, Objective(chosen.objective), chosen, tmp_path / "stopped", hooks())
    uninterrupted = distiller()
    (tmp_path / "whole").mkdir()
    _, straight = train(uninterrupted, Objective(chosen.objective), chosen, tmp_path / "whole", hooks())
    assert same_weights(resumed.eval_model, straight.eval_model)
    assert not same_weights(resumed.eval_model, whole)


def test_gradient_checkpointing_changes_nothing_but_memory():
    vit = resolve_encoder("timm:vit_tiny_patch16_224@32", weights="random:0")
    gradients = []
    for saves in (False, True):
        student = load_encoder(vit)
        model = Distiller(student.module.requires_grad_(True), student.dim, DIM, seed=0).train()
        if saves:
            checkpoint_gradients(model.student)
        pixels = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        model(pixels).square().sum().backward()
        gradients.append(model.student.network.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_best_checkpoint_is_that_of_the_highest_figure(tmp_path):
    figures = iter([0.1, 0.5, 0.3, 0.4])
    model, outcome = run(tmp_path, calls=hooks(validate=lambda _: {"figure": next(figures)}), steps=6, validate_every=2)
    assert outcome.best_step == 2
    best = distiller()
    assert restore_best(tmp_path, best, print) == 2
    assert not same_weights(best, model)


def test_a_live_teacher_replaces_stored_targets(tmp_path):
    """The same targets, computed from the pixels, give the same weights bit for bit."""
    stored = {batch.pixels.tobytes(): batch.targets for batch in itertools.islice(batches(), 6)}

    def teacher(pixels):
        return torch.from_numpy(stored[pixels.numpy().tobytes()]).float()

    live, _ = run(tmp_path / "live", calls=hooks(teacher=teacher))
    cached, _ = run(tmp_path / "cached")
    assert same_weights(live, cached)


@pytest.mark.parametrize(
    "bad",
    [{"warmup": -1}, {"clip": -1.0}, {"accumulate": 0}, {"layer_decay": 0.0}, {"ema": 1.0}, {"early_stop_window": 0}],
)
def test_settings_of_the_optimizer_that_cannot_run(bad):
    with pytest.raises(UsageError):
        settings(**bad)


def test_tensorboard_has_the_figures_and_a_resumed_run_hides_what_it_writes_again(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed (the extra board)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path, 5)
    run(tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = {event.step: event.value for event in events.Scalars("train/loss")}
    log = {int(row["step"]): float(row["loss"]) for row in rows(tmp_path / "log.csv")}
    assert found.keys() == log.keys()
    assert all(found[step] == pytest.approx(loss, rel=1e-6) for step, loss in log.items())
    assert {event.step for event in events.Scalars("held out/figure")} == {0, 3, 6}


def test_without_tensorboard_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("g2l_core.distillation.tensorboard.importlib.util.find_spec", lambda _: None)
    run(tmp_path)
    assert not (tmp_path / "tensorboard").exists()

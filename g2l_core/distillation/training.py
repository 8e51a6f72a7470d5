"""Stage two's loop: student and projector learn a teacher's features of the very pixels that they see."""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn

from g2l_core.concurrency import in_background
from g2l_core.distillation.checkpoints import RunState, restore, save, save_best
from g2l_core.distillation.distiller import Average, Distiller
from g2l_core.distillation.loader import Batch
from g2l_core.distillation.logs import TrainingLogs
from g2l_core.distillation.objective import Objective
from g2l_core.distillation.optim import EarlyStop, anneal, build_optimizer
from g2l_core.distillation.spec import TrainSettings
from g2l_core.errors import RunError

Figures = Mapping[str, float]

BATCHES_AHEAD = 2
"""Batches put together while one is trained on."""


@dataclass(frozen=True, kw_only=True)
class TrainerHooks:
    """What the loop is given from outside: data, devices, and whoever watches."""

    batches: Callable[[int], Generator[Batch, None, None]]
    """Gives the stream of batches from a position on; the position of step s is s times `accumulate`."""
    device: torch.device
    autocast: torch.dtype | None
    """The student's forward precision; None is float32. The loss is always float32."""
    validate: Callable[[Distiller], Figures]
    """Figures of validation.csv, of the watched network."""
    warn: Callable[[RunState, Path], None]
    """Called after every validation."""
    report: Callable[[int, float], None]
    """Called after every step with its number and loss."""
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module
    """Makes the trained module data-parallel where several ranks train."""
    mean_over_ranks: Callable[[float], float] = lambda value: value
    leads: bool = True
    """Whether this rank writes logs and checkpoints."""
    world: int = 1
    """Ranks that train together."""
    targets_of: Callable[[Tensor], Tensor] | None = None
    """The teacher itself, from pixels on the device to features; None takes the batch's stored ones."""


@dataclass(frozen=True, kw_only=True)
class TrainOutcome:
    """How training ended."""

    steps: int
    stopped_early: bool
    last_loss: float
    best_step: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A batch ready for the device."""

    epoch: int
    pixels: Tensor
    targets: Tensor


class DistillationStep(nn.Module):
    """From pixels and targets to the loss: the whole of what data-parallel training must wrap."""

    def __init__(self, distiller: Distiller, objective: Objective, loop: TrainerHooks) -> None:
        super().__init__()
        self.distiller, self.objective = distiller, objective
        self._device, self._autocast = loop.device.type, loop.autocast

    def forward(self, pixels: Tensor, targets: Tensor) -> Tensor:
        """The batch's loss; statistics and loss in float32 whatever the autocast."""
        with torch.autocast(self._device, self._autocast or torch.bfloat16, enabled=self._autocast is not None):
            projected = self.distiller(pixels)
        loss: Tensor = self.objective(projected, targets)
        return loss


def train(
    distiller: Distiller, objective: Objective, settings: TrainSettings, folder: Path, loop: TrainerHooks
) -> tuple[TrainOutcome, RunState]:
    """Train, from the last good checkpoint in `folder` if there is one.

    Args:
        distiller: Student and projector, on the loop's device.
        objective: The loss.
        settings: The schedule.
        folder: Gets log.csv, validation.csv and checkpoints/.
        loop: Data, devices and watchers.

    Raises:
        RunError: The loss is not finite, or a checkpoint cannot be written.
    """
    torch.manual_seed(settings.seed)  # dropout and drop path, where a student has them
    state = _begin(distiller, settings, folder)
    step_module = loop.wrap(DistillationStep(distiller, objective, loop).to(loop.device))
    logs = TrainingLogs(folder, state.step) if loop.leads else None
    if state.step == 0 and logs:
        _validate(state, logs, settings, folder, loop)
    prepared = _prepared(loop.batches(state.step * settings.optim.accumulate), loop.device)
    stream = in_background(prepared, depth=BATCHES_AHEAD)
    while state.step < settings.steps and not state.stopped:
        row = train_step(state, step_module, stream, settings, loop)
        state.stopped = state.early_stop.update(state.loss)
        state.step += 1
        if logs:
            logs.step(row)
        done = state.stopped or state.step == settings.steps
        if logs and (done or state.step % settings.validate_every == 0):
            _validate(state, logs, settings, folder, loop)
        if logs and (done or state.step % settings.checkpoint_every == 0):
            save(folder, state)
        loop.report(state.step, state.loss)
    stream.close()
    if logs:
        logs.close()
    outcome = TrainOutcome(
        steps=state.step, stopped_early=state.stopped, last_loss=state.loss, best_step=state.best_step,
        warnings=tuple(state.said),
    )  # fmt: skip
    return outcome, state


def _begin(distiller: Distiller, settings: TrainSettings, folder: Path) -> RunState:
    optim = settings.optim
    state = RunState(
        distiller=distiller,
        optimizer=build_optimizer(distiller, optim),
        early_stop=EarlyStop(optim.early_stop_window, optim.early_stop_patience),
        average=Average(distiller, optim.ema) if optim.ema else None,
    )
    restore(folder, state)
    return state


def train_step(
    state: RunState, step_module: nn.Module, stream: Iterator[Prepared], settings: TrainSettings, loop: TrainerHooks
) -> dict[str, float]:
    """One update from `accumulate` batches: forward in training mode, backward, clip, step. Returns its log row."""
    begin, waited, total = perf_counter(), 0.0, 0.0
    optim = settings.optim
    lr, weight_decay = anneal(state.optimizer, optim, state.step, settings.steps)
    step_module.train()
    state.optimizer.zero_grad(set_to_none=True)
    for i in range(optim.accumulate):
        asked = perf_counter()
        batch = next(stream)
        waited += perf_counter() - asked
        with _without_sync(step_module) if i + 1 < optim.accumulate else nullcontext():
            pixels, targets = _on_device(batch, loop)
            loss = step_module(pixels, targets) / optim.accumulate
            loss.backward()
        total += float(loss.detach())
    if optim.clip:
        nn.utils.clip_grad_norm_(state.distiller.parameters(), optim.clip)
    state.optimizer.step()
    if state.average:
        state.average.update(state.distiller)
    state.loss = _finite(loop.mean_over_ranks(total), state.step)
    rows, width = len(targets) * (loop.world if settings.objective.reduce == "global" else 1), targets.shape[1]
    return {
        "step": state.step,
        "epoch": batch.epoch,
        "loss": state.loss,
        "loss_per_element": settings.objective.comparable(state.loss, rows, width),
        "lr": lr,
        "weight_decay": weight_decay,
        "seconds": round(perf_counter() - begin, 4),
        "seconds_waiting": round(waited, 4),
    }


def _prepared(batches: Generator[Batch, None, None], device: torch.device) -> Generator[Prepared, None, None]:
    """Batches as tensors, in page-locked memory where a GPU takes them: its copies then need not wait."""
    pinned = device.type == "cuda"
    try:
        for batch in batches:
            pixels, targets = torch.from_numpy(batch.pixels), torch.from_numpy(batch.targets)
            if pinned:
                pixels, targets = pixels.pin_memory(), targets.pin_memory()
            yield Prepared(epoch=batch.epoch, pixels=pixels, targets=targets)
    finally:
        batches.close()


def _on_device(batch: Prepared, loop: TrainerHooks) -> tuple[Tensor, Tensor]:
    """A batch's pixels and its targets: stored ones, or the teacher's of these pixels."""
    pixels = batch.pixels.to(loop.device, non_blocking=True)
    if loop.targets_of is not None:
        return pixels, loop.targets_of(pixels)
    return pixels, batch.targets.to(loop.device, non_blocking=True).float()


def _without_sync(step_module: nn.Module) -> AbstractContextManager[None]:
    """Leave gradients on their rank: they are summed over ranks once a step."""
    no_sync = getattr(step_module, "no_sync", None)
    return no_sync() if no_sync else nullcontext()


def _finite(loss: float, step: int) -> float:
    """The loss itself, if it is a number.

    Raises:
        RunError: It is not.
    """
    if not isfinite(loss):
        raise RunError(f"the loss of step {step} is {loss}. Lower --lr; the checkpoints before it are kept")
    return loss


def _validate(state: RunState, logs: TrainingLogs, settings: TrainSettings, folder: Path, loop: TrainerHooks) -> None:
    """Measure the watched network on held-out patches; keep it if it is the best so far."""
    figures = loop.validate(state.eval_model)
    logs.validation({"step": state.step, **figures})
    if figures[settings.best_by] > state.best:
        state.best, state.best_step = figures[settings.best_by], state.step
        save_best(folder, state)
    loop.warn(state, folder)

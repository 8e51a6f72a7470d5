"""The training loop: student and projector learn a teacher's features of the very pixels that they see."""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn

from g2l_core.concurrency import in_background
from g2l_core.distillation.baselines import Minimized
from g2l_core.distillation.checkpoints import RunState, restore, save, save_best
from g2l_core.distillation.distiller import Average, Distiller
from g2l_core.distillation.distributed import ProcessGroup
from g2l_core.distillation.loader import Batch
from g2l_core.distillation.logs import TrainingLogs
from g2l_core.distillation.optim import EarlyStop, anneal, build_optimizer
from g2l_core.distillation.robustness import RobustObjective
from g2l_core.distillation.spec import TrainSettings
from g2l_core.distillation.trackers import Tracking
from g2l_core.errors import RunError
from g2l_core.store.facts import Facts

MetricValues = Mapping[str, float]

BATCHES_AHEAD = 2
"""Batches that are prepared while one is trained on."""


@dataclass(frozen=True, kw_only=True)
class TrainerHooks:
    """What the training loop gets from its caller: the data, the processes and devices, and what to call when."""

    batches: Callable[[int], Generator[Batch, None, None]]
    """Called with a position, returns the endless stream of batches from there on. Step s begins at position s times
    `accumulate`."""
    group: ProcessGroup = field(default_factory=ProcessGroup)
    """Where to train, and with which other processes. The main one writes logs and checkpoints."""
    autocast: torch.dtype | None = None
    """Precision of the student's forward pass; None is float32. The loss is always float32."""
    validate: Callable[[Distiller], MetricValues]
    """Called with the network to evaluate, returns a row of validation.csv without its step."""
    warn: Callable[[RunState, Path], None]
    """Called after every validation with the state and the run folder."""
    report: Callable[[int, float], None]
    """Called after every step with its number and loss."""
    note: Callable[[str], None] = lambda _text: None
    """Called with what the user must know of the checkpoints."""
    teacher: Callable[[Tensor], Tensor] | None = None
    """A teacher that runs live, from pixels on the device to features. None takes the batch's stored features."""
    tracking: Tracking = field(default_factory=Tracking)
    """Where metric values go beside the run folder's tables."""


@dataclass(frozen=True, kw_only=True)
class TrainOutcome(Facts):
    """How training ended, as run.json keeps it."""

    steps: int
    stopped_early: bool
    last_loss: float
    best_step: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A batch as tensors, ready to be copied to the device."""

    epoch: int
    pixels: Tensor
    targets: Tensor


class DistillationStep(nn.Module):
    """From pixels and targets to the loss: everything that data-parallel training must wrap."""

    def __init__(self, distiller: Distiller, objective: Minimized, hooks: TrainerHooks) -> None:
        super().__init__()
        self.distiller, self.objective = distiller, objective
        self._device, self._autocast = hooks.group.device.type, hooks.autocast

    def forward(self, pixels: Tensor, targets: Tensor) -> Tensor:
        """The batch's loss. Statistics and loss are in float32 whatever the autocast."""
        with torch.autocast(self._device, self._autocast or torch.bfloat16, enabled=self._autocast is not None):
            if isinstance(self.objective, RobustObjective):
                features = self.distiller.student(pixels)
                projected = self.distiller.projector(features[:: len(features) // len(targets)])
            else:
                projected = self.distiller(pixels)
        loss: Tensor = (
            self.objective(projected, targets, features)
            if isinstance(self.objective, RobustObjective)
            else self.objective(projected, targets)
        )
        return loss


def train(
    distiller: Distiller,
    objective: Minimized,
    settings: TrainSettings,
    folder: Path,
    hooks: TrainerHooks,
) -> tuple[TrainOutcome, RunState]:
    """Train, from the last good checkpoint in `folder` if there is one.

    Args:
        distiller: Student and projector, on the group's device.
        objective: The loss.
        settings: The schedule.
        folder: The run folder, which gets log.csv, validation.csv and checkpoints/.
        hooks: Data, processes, and what to call when.

    Returns:
        How training ended, and the state that it ended in.

    Raises:
        RunError: The loss is not finite, no checkpoint of a begun run can be used, a log is damaged, or the folder
            cannot be written to.
    """
    torch.manual_seed(settings.seed)  # dropout and drop path, where a student has them
    group = hooks.group
    objective.to(group.device)
    state = _begin(distiller, objective, settings, folder, hooks)
    step_module = group.wrap(DistillationStep(distiller, objective, hooks).to(group.device))
    logs = TrainingLogs(folder, state.step, hooks.tracking, hooks.note) if group.is_main else None
    with closing(logs) if logs else nullcontext():
        if logs and logs.lost:
            hooks.note(f"{folder / 'log.csv'} has lost {logs.lost:,} of {state.step:,} steps: its curve has a gap")
        if state.step == 0 and logs:
            _validate(state, logs, settings, folder, hooks)
        prepared = _prepare(hooks.batches(state.step * settings.optim.accumulate), group.device)
        stream = in_background(prepared, depth=BATCHES_AHEAD)
        while state.step < settings.steps and not state.stopped:
            row = train_step(state, step_module, stream, settings, hooks)
            state.stopped = state.early_stop.update(state.loss)
            state.step += 1
            if logs:
                logs.step(row)
            done = state.stopped or state.step == settings.steps
            if logs and (done or state.step % settings.validate_every == 0):
                _validate(state, logs, settings, folder, hooks)
            if logs and (done or state.step % settings.checkpoint_every == 0):
                save(folder, state)
            hooks.report(state.step, state.loss)
        stream.close()
    outcome = TrainOutcome(
        steps=state.step, stopped_early=state.stopped, last_loss=state.loss, best_step=state.best_step,
        warnings=tuple(state.warnings),
    )  # fmt: skip
    return outcome, state


def _begin(
    distiller: Distiller,
    objective: Minimized,
    settings: TrainSettings,
    folder: Path,
    hooks: TrainerHooks,
) -> RunState:
    optim = settings.optim
    state = RunState(
        distiller=distiller,
        objective=objective,
        optimizer=build_optimizer(distiller, optim),
        early_stop=EarlyStop(optim.early_stop_window, optim.early_stop_patience),
        average=Average(distiller, optim.ema) if optim.ema else None,
    )
    restore(folder, state, hooks.note)
    return state


def train_step(
    state: RunState, step_module: nn.Module, stream: Iterator[Prepared], settings: TrainSettings, hooks: TrainerHooks
) -> dict[str, float]:
    """Make one update from `accumulate` batches: forward in training mode, backward, clip, step.

    Returns:
        The step's row of log.csv.

    Raises:
        RunError: The loss is not finite.
    """
    begin, waited, total = perf_counter(), 0.0, 0.0
    logged = dict[str, float]()
    optim = settings.optim
    lr, weight_decay = anneal(state.optimizer, optim, state.step, settings.steps)
    step_module.train()
    state.optimizer.zero_grad(set_to_none=True)
    for i in range(optim.accumulate):
        asked = perf_counter()
        batch = next(stream)
        waited += perf_counter() - asked
        with _without_sync(step_module) if i + 1 < optim.accumulate else nullcontext():
            pixels, targets = _to_device(batch, hooks, has_center=settings.robustness.center_weight > 0)
            loss = step_module(pixels, targets) / optim.accumulate
            loss.backward()
        total += float(loss.detach())
        if parts := state.objective.logged():
            for name, value in zip(parts, torch.stack(list(parts.values())).tolist(), strict=True):
                logged[name] = logged.get(name, 0.0) + value / optim.accumulate
    if optim.clip:
        nn.utils.clip_grad_norm_(state.distiller.parameters(), optim.clip)
    state.optimizer.step()
    if state.average:
        state.average.update(state.distiller)
    state.loss = hooks.group.mean(total)
    if not isfinite(state.loss):
        raise RunError(f"the loss of step {state.step} is {state.loss}. Lower --lr; the checkpoints before it are kept")
    rows = len(targets) * (hooks.group.world if settings.objective.reduce == "global" else 1)
    logged = {name: hooks.group.mean(value) for name, value in logged.items()}
    if not logged:
        logged["loss_per_element"] = settings.objective.comparable(state.loss, rows, targets.shape[1])
    return {
        "step": state.step,
        "epoch": batch.epoch,
        "loss": state.loss,
        "loss_per_element": logged.pop("loss_per_element"),
        "lr": lr,
        "weight_decay": weight_decay,
        "seconds": round(perf_counter() - begin, 4),
        "seconds_waiting": round(waited, 4),
        **logged,
    }


def _prepare(batches: Generator[Batch, None, None], device: torch.device) -> Generator[Prepared, None, None]:
    """Yield batches as tensors, in page-locked memory for a GPU, so that copies to it need not wait."""
    pin = device.type == "cuda"
    try:
        for batch in batches:
            pixels, targets = torch.from_numpy(batch.pixels), torch.from_numpy(batch.targets)
            if pin:
                pixels, targets = pixels.pin_memory(), targets.pin_memory()
            yield Prepared(epoch=batch.epoch, pixels=pixels, targets=targets)
    finally:
        batches.close()


def _to_device(batch: Prepared, hooks: TrainerHooks, *, has_center: bool) -> tuple[Tensor, Tensor]:
    """A batch's pixels and targets: the stored ones, or a live teacher's features of each patch's first view.

    With `has_center`, the last column of the targets is the center's number, which a live teacher does not replace.
    Several views of a patch become rows behind one another.
    """
    pixels = batch.pixels.flatten(0, -4).to(hooks.group.device, non_blocking=True)
    targets = batch.targets.to(hooks.group.device, non_blocking=True).float()
    if hooks.teacher is not None:
        features = hooks.teacher(pixels[:: len(pixels) // len(targets)])
        targets = torch.cat([features, targets[:, -1:]], dim=1) if has_center else features
    return pixels, targets


def _without_sync(step_module: nn.Module) -> AbstractContextManager[None]:
    """Keep gradients on their rank for now: they are averaged over ranks once a step."""
    no_sync = getattr(step_module, "no_sync", None)
    return no_sync() if no_sync else nullcontext()


def _validate(state: RunState, logs: TrainingLogs, settings: TrainSettings, folder: Path, hooks: TrainerHooks) -> None:
    """Evaluate the network on held-out patches, and keep it if it is the best so far."""
    values = hooks.validate(state.eval_model)
    logs.validation({"step": state.step, **values})
    if values[settings.best_by] > state.best:
        state.best, state.best_step = values[settings.best_by], state.step
        save_best(folder, state)
    hooks.warn(state, folder)

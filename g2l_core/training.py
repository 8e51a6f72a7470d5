"""Stage two's loop: student and projector learn the stored features of a teacher that is never loaded."""

import csv
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import cos, isfinite, pi
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from g2l_core.encoder_loading import PatchEncoder
from g2l_core.errors import RunError, UsageError
from g2l_core.loader import Batch
from g2l_core.losses import loss_by_name, per_element, standardize

KEPT_CHECKPOINTS = 2


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How the student is trained. Defaults are the paper's (arXiv 2510.11176) where it gives them."""

    steps: int
    loss: str = "logsum"
    alpha: float = 4.0
    """The Log-Sum loss's exponent."""
    lr: float = 1e-4
    weight_decay: float = 0.05
    early_stop_window: int = 100
    """Steps whose mean loss is the early stop's bar."""
    early_stop_patience: int = 10
    """Stop after more than this many steps in a row above the bar; 0 never stops early."""
    validate_every: int = 200
    checkpoint_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a loop that cannot run."""
        if self.steps < 1 or self.validate_every < 1 or self.checkpoint_every < 1:
            raise UsageError("steps, validate_every and checkpoint_every must be at least 1")
        if self.lr <= 0 or self.weight_decay < 0:
            raise UsageError(f"expected lr > 0 and weight decay >= 0, not {self.lr} and {self.weight_decay}")
        loss_by_name(self.loss)

    def loss_of(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of a batch of projected student and teacher features, both standardised over the batch."""
        function = loss_by_name(self.loss)
        s, t = standardize(student), standardize(teacher)
        return function(s, t, alpha=self.alpha) if self.loss == "logsum" else function(s, t)

    def comparable(self, loss: float, n: int, dim: int) -> float:
        """The loss as a figure that does not grow with the batch: L - log(n dim) for the Log-Sum loss."""
        return per_element(loss, n, dim) if self.loss == "logsum" else loss


class Distiller(nn.Module):
    """The student and the projector W_p on top of it; the projector is dropped after training (paper, 4)."""

    def __init__(self, student: PatchEncoder, student_dim: int, teacher_dim: int, seed: int) -> None:
        super().__init__()
        self.student = student
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projector = nn.Linear(student_dim, teacher_dim)
            nn.init.trunc_normal_(self.projector.weight, std=0.02)
            nn.init.zeros_(self.projector.bias)

    def forward(self, pixels: Tensor) -> Float[Tensor, "batch dim"]:
        """Projected features, in the teacher's space, before the affine-free BatchNorm."""
        return self.projector(self.student(pixels))


@dataclass
class EarlyStop:
    """The paper's rule: the loss above the mean of the last `window` steps, more than `patience` times in a row."""

    window: int
    patience: int
    recent: deque[float] = field(default_factory=deque)
    above: int = 0

    def update(self, loss: float) -> bool:
        """Take one step's loss; True when training should stop."""
        if self.patience and len(self.recent) == self.window:
            self.above = self.above + 1 if loss > sum(self.recent) / self.window else 0
        self.recent.append(loss)
        if len(self.recent) > self.window:
            self.recent.popleft()
        return bool(self.patience) and self.above > self.patience


@dataclass(frozen=True, kw_only=True)
class TrainOutcome:
    """How training ended."""

    steps: int
    stopped_early: bool
    last_loss: float


def cosine(step: int, steps: int) -> float:
    """The annealing factor of a step: 1 at the first, towards 0 at the last."""
    return 0.5 * (1 + cos(pi * step / steps))


def train(
    distiller: Distiller,
    batches: Callable[[int], Iterator[Batch]],
    settings: TrainSettings,
    folder: Path,
    *,
    device: torch.device,
    autocast: torch.dtype | None,
    validate: Callable[[int], Mapping[str, float]],
    report: Callable[[int, float], None],
) -> TrainOutcome:
    """Train, from the last good checkpoint in `folder` if there is one.

    Args:
        distiller: Student and projector, on `device`.
        batches: Gives the stream of batches from a position on; position and step are one number.
        settings: The loop.
        folder: Gets log.csv, validation.csv and checkpoints/.
        device: Where to train.
        autocast: The student's forward precision; None is float32. The loss is always float32.
        validate: Called with the step; gives the figures of validation.csv.
        report: Called after every step with its number and loss.

    Raises:
        RunError: The loss is not finite.
    """
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    early_stop = EarlyStop(settings.early_stop_window, settings.early_stop_patience)
    torch.manual_seed(settings.seed)  # dropout and drop path, where a student has them
    step, stopped, loss = load_checkpoint(folder, distiller, optimizer, early_stop)
    log = CsvLog(folder / "log.csv", keep_below=step)
    validation = CsvLog(folder / "validation.csv", keep_below=step + 1 if step else 0)
    if step == 0:
        validation.write({"step": 0, **validate(0)})
    stream = batches(step)
    while step < settings.steps and not stopped:
        begin = perf_counter()
        batch = next(stream)
        waited = perf_counter() - begin
        factor = anneal(optimizer, settings, step)
        loss = finite(train_step(distiller, optimizer, batch, settings, device, autocast), step)
        stopped = early_stop.update(loss)
        log.write(log_row(batch, loss, settings, factor, perf_counter() - begin, waited))
        step += 1
        done = stopped or step == settings.steps
        if done or step % settings.validate_every == 0:
            validation.write({"step": step, **validate(step)})
        if done or step % settings.checkpoint_every == 0:
            save_checkpoint(folder, distiller, optimizer, early_stop, step, stopped, loss)
        report(step, loss)
    return TrainOutcome(steps=step, stopped_early=stopped, last_loss=loss)


def finite(loss: float, step: int) -> float:
    """The loss itself, if it is a number.

    Raises:
        RunError: It is not.
    """
    if not isfinite(loss):
        raise RunError(f"the loss of step {step} is {loss}. Lower --lr; the checkpoints before it are kept")
    return loss


def log_row(
    batch: Batch, loss: float, settings: TrainSettings, factor: float, seconds: float, waited: float
) -> dict[str, float]:
    """One row of log.csv. `loss_per_element` is the figure that compares across batch sizes."""
    return {
        "step": batch.position,
        "epoch": batch.epoch,
        "loss": loss,
        "loss_per_element": settings.comparable(loss, *batch.targets.shape),
        "lr": settings.lr * factor,
        "weight_decay": settings.weight_decay * factor,
        "seconds": round(seconds, 4),
        "seconds_waiting": round(waited, 4),
    }


def anneal(optimizer: torch.optim.Optimizer, settings: TrainSettings, step: int) -> float:
    """Set learning rate and weight decay, both cosine-annealed (paper, 6); return their common factor."""
    factor = cosine(step, settings.steps)
    for group in optimizer.param_groups:
        group["lr"] = settings.lr * factor
        group["weight_decay"] = settings.weight_decay * factor
    return factor


def train_step(
    distiller: Distiller,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    settings: TrainSettings,
    device: torch.device,
    autocast: torch.dtype | None,
) -> float:
    """One step: forward in training mode, batch statistics on both sides, backward, update. Returns the loss."""
    distiller.train()
    pixels = torch.from_numpy(batch.pixels).to(device, non_blocking=True)
    targets = torch.from_numpy(batch.targets).to(device, non_blocking=True).float()
    with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        projected = distiller(pixels)
    loss = settings.loss_of(projected, targets)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


class CsvLog:
    """A CSV that survives a kill: each row is flushed, and a resumed run drops what it will write again."""

    def __init__(self, path: Path, *, keep_below: int) -> None:
        self._path = path
        rows = [row for row in self._read() if int(row["step"]) < keep_below]
        self._columns: tuple[str, ...] = tuple(rows[0]) if rows else ()
        self._rewrite(rows)

    def _read(self) -> list[dict[str, str]]:
        if not self._path.exists():
            return []
        with self._path.open(newline="", encoding="utf-8") as file:
            # A kill can leave half a line, which then lacks its last field.
            return [row for row in csv.DictReader(file) if None not in row.values() and (row["step"] or "").isdigit()]

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        temporary = self._path.with_suffix(".partial")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            if rows:
                writer = csv.DictWriter(file, self._columns)
                writer.writeheader()
                writer.writerows(rows)
        temporary.replace(self._path)

    def write(self, row: Mapping[str, float]) -> None:
        """Append one row; the first one names the columns."""
        empty = self._path.stat().st_size == 0
        with self._path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, tuple(row) if empty else self._columns)
            if empty:
                self._columns = tuple(row)
                writer.writeheader()
            writer.writerow(row)


def save_checkpoint(
    folder: Path,
    distiller: Distiller,
    optimizer: torch.optim.Optimizer,
    early_stop: EarlyStop,
    step: int,
    stopped: bool,
    loss: float,
) -> None:
    """Write checkpoints/step-N.pt atomically; keep the last two."""
    state: dict[str, Any] = {
        "step": step,
        "stopped": stopped,
        "loss": loss,
        "model": distiller.state_dict(),
        "optimizer": optimizer.state_dict(),
        "early_stop": {"recent": list(early_stop.recent), "above": early_stop.above},
        "rng": torch.get_rng_state(),
        "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    temporary = checkpoints / "step.partial"
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(checkpoints / f"step-{step:08d}.pt")
    for old in sorted(checkpoints.glob("step-*.pt"))[:-KEPT_CHECKPOINTS]:
        old.unlink()


def load_checkpoint(
    folder: Path, distiller: Distiller, optimizer: torch.optim.Optimizer, early_stop: EarlyStop
) -> tuple[int, bool, float]:
    """Restore the newest checkpoint that can be read, and return its step, whether it had stopped, and its loss.

    Step 0 where there is none.
    """
    for path in sorted((folder / "checkpoints").glob("step-*.pt"), reverse=True):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, ValueError):  # torn by a lost disk; the one before it serves
            continue
        distiller.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        early_stop.recent = deque(state["early_stop"]["recent"])
        early_stop.above = state["early_stop"]["above"]
        torch.set_rng_state(state["rng"])
        if state["rng_cuda"]:
            torch.cuda.set_rng_state_all(state["rng_cuda"])
        return state["step"], state["stopped"], state["loss"]
    return 0, False, float("nan")

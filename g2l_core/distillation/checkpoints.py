"""A run's state on disk: written atomically, the last two and the best kept, a torn one passed over."""

import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from g2l_core.distillation.distiller import Average, Distiller
from g2l_core.distillation.optim import EarlyStop
from g2l_core.errors import RunError

KEPT = 2
BEST = "best.pt"


@dataclass
class RunState:
    """All that a run needs to go on as if it had never stopped."""

    distiller: Distiller
    optimizer: torch.optim.Optimizer
    early_stop: EarlyStop
    average: Average | None = None
    step: int = 0
    stopped: bool = False
    loss: float = float("nan")
    best: float = float("-inf")
    """The best held-out figure so far."""
    best_step: int = 0
    said: list[str] = field(default_factory=list)
    """Warnings already given."""

    @property
    def eval_model(self) -> Distiller:
        """The network that is watched and kept: the average of the weights, or the weights."""
        return self.average.network if self.average else self.distiller


def save(folder: Path, state: RunState) -> None:
    """Write checkpoints/step-N.pt; keep the last two."""
    content: dict[str, Any] = {
        "step": state.step,
        "stopped": state.stopped,
        "loss": state.loss,
        "best": state.best,
        "best_step": state.best_step,
        "said": state.said,
        "model": state.distiller.state_dict(),
        "average": state.average.network.state_dict() if state.average else None,
        "optimizer": state.optimizer.state_dict(),
        "early_stop": {"recent": list(state.early_stop.recent), "above": state.early_stop.above},
        "rng": torch.get_rng_state(),
        "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    checkpoints = folder / "checkpoints"
    _write(checkpoints / f"step-{state.step:08d}.pt", content)
    for old in sorted(checkpoints.glob("step-*.pt"))[:-KEPT]:
        old.unlink()


def save_best(folder: Path, state: RunState) -> None:
    """Write checkpoints/best.pt: the watched weights and the step that they are of."""
    _write(folder / "checkpoints" / BEST, {"step": state.step, "model": state.eval_model.state_dict()})


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".partial")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}. Free space, then go on with --resume") from error


def restore(folder: Path, state: RunState) -> None:
    """Bring `state` to the newest checkpoint that can be read; leave it as it is where there is none."""
    for path in sorted((folder / "checkpoints").glob("step-*.pt"), reverse=True):
        content = _read(path)
        if content is None:
            continue
        state.distiller.load_state_dict(content["model"])
        if state.average:
            state.average.network.load_state_dict(content["average"])
        state.optimizer.load_state_dict(content["optimizer"])
        state.early_stop.recent = deque(content["early_stop"]["recent"])
        state.early_stop.above = content["early_stop"]["above"]
        state.step, state.stopped, state.loss = content["step"], content["stopped"], content["loss"]
        state.best, state.best_step, state.said = content["best"], content["best_step"], content["said"]
        torch.set_rng_state(content["rng"])
        if content["rng_cuda"]:
            torch.cuda.set_rng_state_all(content["rng_cuda"])
        return


def restore_best(folder: Path, distiller: Distiller) -> int | None:
    """Load the best weights into `distiller`; their step, or None where no best was kept or it cannot be read."""
    path = folder / "checkpoints" / BEST
    content = _read(path) if path.exists() else None
    if content is None:
        return None
    distiller.load_state_dict(content["model"])
    step: int = content["step"]
    return step


def _read(path: Path) -> dict[str, Any] | None:
    """A checkpoint's content; None where a lost disk tore it, and the one before it must serve."""
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError):
        return None
    return content

"""A run's state on disk. Checkpoints are written atomically; the last two and the best are kept."""

from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from g2l_core.distillation.distiller import Average, Distiller
from g2l_core.distillation.optim import EarlyStop
from g2l_core.errors import RunError
from g2l_core.files import replacing

KEPT = 2
BEST = "best.pt"


@dataclass
class RunState:
    """Everything that a run needs to continue as if it had never stopped."""

    distiller: Distiller
    optimizer: torch.optim.Optimizer
    early_stop: EarlyStop
    average: Average | None = None
    step: int = 0
    stopped: bool = False
    loss: float = float("nan")
    best: float = float("-inf")
    """The best held-out metric value so far."""
    best_step: int = 0
    warnings: list[str] = field(default_factory=list)
    """Warnings that were printed already."""

    @property
    def eval_model(self) -> Distiller:
        """The network that is validated and kept: with averaged weights where there are any, else the trained one."""
        return self.average.network if self.average else self.distiller


def save(folder: Path, state: RunState) -> None:
    """Write checkpoints/step-N.pt, and delete all but the last two."""
    content: dict[str, Any] = {
        "step": state.step,
        "stopped": state.stopped,
        "loss": state.loss,
        "best": state.best,
        "best_step": state.best_step,
        "said": state.warnings,
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
    """Write checkpoints/best.pt: the weights of `eval_model` and their step."""
    _write(folder / "checkpoints" / BEST, {"step": state.step, "model": state.eval_model.state_dict()})


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    try:
        with replacing(path) as file:
            torch.save(content, file)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}. Free space, then go on with --resume") from error


def restore(folder: Path, state: RunState) -> None:
    """Load the newest checkpoint that can be read into `state`; change nothing where there is none."""
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
        state.best, state.best_step, state.warnings = content["best"], content["best_step"], content["said"]
        torch.set_rng_state(content["rng"])
        if content["rng_cuda"]:
            torch.cuda.set_rng_state_all(content["rng_cuda"])
        return


def restore_best(folder: Path, distiller: Distiller) -> int | None:
    """Load the best weights into `distiller`.

    Returns:
        Their step; None, with `distiller` unchanged, where there is no best checkpoint that can be read.
    """
    path = folder / "checkpoints" / BEST
    content = _read(path) if path.exists() else None
    if content is None:
        return None
    distiller.load_state_dict(content["model"])
    step: int = content["step"]
    return step


def _read(path: Path) -> dict[str, Any] | None:
    """A checkpoint's content; None where a lost disk tore it, so that the one before it must be used."""
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError):
        return None
    return content

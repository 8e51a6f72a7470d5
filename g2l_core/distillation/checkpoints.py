"""A run's state on disk. Checkpoints are written atomically; the last two and the best are kept.

A checkpoint is a file of `torch.save`, which reads it, followed by `SEAL` and the sha256 of all bytes before. So a
single flipped bit is noticed. The checkpoints of older versions have no digest, nor the key `sealed` that asks for it.
"""

import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import torch

from g2l_core.distillation.baselines import Minimized
from g2l_core.distillation.distiller import Average, Distiller
from g2l_core.distillation.objective import Objective
from g2l_core.distillation.optim import EarlyStop
from g2l_core.distillation.spec import ObjectiveSpec
from g2l_core.errors import RunError, refuse_open_files, writing
from g2l_core.files import replacing

KEPT = 2
BEST = "best.pt"
SEAL = b"g2l sha256"
_TAIL = len(SEAL) + hashlib.sha256().digest_size
_AT_A_TIME = 1 << 24

Note = Callable[[str], None]
"""Is called with what the user must know."""


@dataclass
class RunState:
    """Everything that a run needs to continue as if it had never stopped."""

    distiller: Distiller
    optimizer: torch.optim.Optimizer
    early_stop: EarlyStop
    objective: Minimized = field(default_factory=lambda: Objective(ObjectiveSpec()))
    """The loss; that of several teachers has running means, which a checkpoint holds."""
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
        "objective": state.objective.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "early_stop": {"recent": list(state.early_stop.recent), "above": state.early_stop.above},
        "rng": torch.get_rng_state(),
        "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    checkpoints = folder / "checkpoints"
    _write(checkpoints / f"step-{state.step:08d}.pt", content)
    for old in sorted(checkpoints.glob("step-*.pt"))[:-KEPT]:
        old.unlink()


def last_step(folder: Path) -> int | None:
    """The step of the newest checkpoint in a run folder; None where there is none."""
    names = [path.stem for path in (folder / "checkpoints").glob("step-*.pt")]
    return max((int(name.removeprefix("step-")) for name in names), default=None)


def save_best(folder: Path, state: RunState) -> None:
    """Write checkpoints/best.pt: the weights of `eval_model` and their step."""
    _write(folder / "checkpoints" / BEST, {"step": state.step, "model": state.eval_model.state_dict()})


class _Hashed:
    """A file that is written from begin to end, and the sha256 of what was written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.sha = file, hashlib.sha256()

    def write(self, content: memoryview | bytes) -> int:
        self.sha.update(content)
        return self._file.write(content)

    def flush(self) -> None:
        self._file.flush()


def _write(path: Path, content: dict[str, Any]) -> None:
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as file:
            hashed = _Hashed(file)
            torch.save({**content, "sealed": True}, cast("IO[bytes]", hashed))
            file.write(SEAL + hashed.sha.digest())


def restore(folder: Path, state: RunState, note: Note) -> None:
    """Load the newest checkpoint that is whole into `state`; change nothing where there is none.

    Args:
        folder: The run folder.
        state: Gets everything that the checkpoint holds.
        note: Is told of each checkpoint that is passed over, and of one that has no digest.

    Raises:
        RunError: There are checkpoints, and none of them can be used; or too many files are open.
    """
    paths = sorted((folder / "checkpoints").glob("step-*.pt"), reverse=True)
    for path in paths:
        if _load(path, lambda content: _take(state, content), note):
            return
    if paths:
        raise RunError(
            f"none of the {len(paths)} checkpoints in {folder / 'checkpoints'} can be used: restore one from a copy, "
            "or begin again with another --out"
        )


def _take(state: RunState, content: dict[str, Any]) -> None:
    state.distiller.load_state_dict(content["model"])
    if state.average:
        state.average.network.load_state_dict(content["average"])
    state.objective.load_state_dict(content.get("objective", {}))
    state.optimizer.load_state_dict(content["optimizer"])
    state.early_stop.recent = deque(content["early_stop"]["recent"])
    state.early_stop.above = content["early_stop"]["above"]
    state.step, state.stopped, state.loss = content["step"], content["stopped"], content["loss"]
    state.best, state.best_step, state.warnings = content["best"], content["best_step"], content["said"]
    torch.set_rng_state(content["rng"])
    if content["rng_cuda"]:
        torch.cuda.set_rng_state_all(content["rng_cuda"])


def restore_best(folder: Path, distiller: Distiller, note: Note) -> int | None:
    """Load the best weights into `distiller`.

    Returns:
        Their step; None where there is no best checkpoint that is whole, of which `note` is told.

    Raises:
        RunError: Too many files are open.
    """
    path = folder / "checkpoints" / BEST
    steps: list[int] = []

    def take(content: dict[str, Any]) -> None:
        distiller.load_state_dict(content["model"])
        steps.append(content["step"])

    return steps[0] if _load(path, take, note) else None


def _load(path: Path, take: Callable[[dict[str, Any]], None], note: Note) -> bool:
    """Whether `take` could take a checkpoint's content. Reading a damaged file can raise anything."""
    try:
        is_sealed = _require_whole(path)
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if content.get("sealed") and not is_sealed:
            raise RunError("its digest is missing")
        take(content)
    except Exception as error:  # noqa: BLE001
        refuse_open_files(error, path, RunError)
        reason = str(error).partition("\n")[0] or type(error).__name__
        note(f"the checkpoint {path} cannot be used and is passed over: {reason}")
        return False
    if not is_sealed:
        note(f"the checkpoint {path} is of an older version and has no digest: it is used unchecked")
    return True


def _require_whole(path: Path) -> bool:
    """Whether a file ends in its digest.

    Raises:
        RunError: It does, and is not what was written.
    """
    size = path.stat().st_size - _TAIL
    with path.open("rb") as file:
        file.seek(max(0, size))
        tail = file.read()
        if not tail.startswith(SEAL):
            return False
        file.seek(0)
        sha = hashlib.sha256()
        while size > 0:
            block = file.read(min(_AT_A_TIME, size))
            sha.update(block)
            size -= len(block)
    if sha.digest() != tail[len(SEAL) :]:
        raise RunError("its content is not what its digest says")
    return True

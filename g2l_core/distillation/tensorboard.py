"""A run's metric values for TensorBoard, where it is installed."""

import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TensorBoardLog:
    """Writes to RUN/tensorboard. It writes nothing where TensorBoard is not installed."""

    def __init__(self, folder: Path, step: int) -> None:
        """Begin, or continue at `step`: later points of a run that was killed are hidden."""
        self._writer: Any = None
        if importlib.util.find_spec("tensorboard") is None:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step or None)

    def add(self, group: str, row: Mapping[str, float]) -> None:
        """Add a row's values at its step."""
        if self._writer is None:
            return
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(f"{group}/{name}", value, int(row["step"]))

    def close(self) -> None:
        """Write what is buffered, and close the log."""
        if self._writer is not None:
            self._writer.close()

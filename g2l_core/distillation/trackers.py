"""A run's metric values for TensorBoard, W&B and MLflow, whichever are asked for. None of them can end a training."""

import importlib.util
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any, Protocol, TypeVar, runtime_checkable

from g2l_core.distillation.tensorboard import TensorBoardLog
from g2l_core.errors import RunError, UnknownNameError, UsageError
from g2l_core.files import write_text

AUTO = "auto"
"""The word for TensorBoard where it is installed, and nothing where it is not."""
EXTRAS = {"tensorboard": "board", "wandb": "wandb", "mlflow": "mlflow"}
"""The extra of the package that brings each tracker's module, which has its name."""
PROJECT = "g2l"
"""W&B's project and MLflow's experiment, where WANDB_PROJECT and MLFLOW_EXPERIMENT_NAME say nothing."""
CLOSE_S = 60.0
"""How long the end of a training waits for a tracker to send what is left."""
_BATCH = 500
"""Values that MLflow is sent at a time; its servers take 1,000."""
_RUN_IDS = "{}-run.txt"
T = TypeVar("T")


@runtime_checkable
class Tracker(Protocol):
    """Takes the rows of a run's logs."""

    def add(self, group: str, row: Mapping[str, float]) -> None:
        """Take a row's values at its step; `group` is `train` or `held out`."""

    def close(self) -> None:
        """Send what is left."""


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """Where metric values go beside the CSV files."""

    names: tuple[str, ...] = (AUTO,)
    config: Mapping[str, Any] = field(default_factory=dict)
    """The run's settings, which W&B and MLflow show and filter by."""


def parse_trackers(text: str) -> tuple[str, ...]:
    """Read names as users write them: `auto`, `none`, or some of tensorboard, wandb, mlflow with commas.

    Raises:
        UsageError: A name is none of these, or auto and none stand with others.

    Examples:
        >>> parse_trackers("tensorboard,mlflow"), parse_trackers("none")
        (('tensorboard', 'mlflow'), ())
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if names in {(AUTO,), ("none",)}:
        return () if names == ("none",) else names
    for name in names:
        if name in {AUTO, "none"}:
            raise UsageError(f"--log-to {text}: {name} stands alone, or give the names: {', '.join(EXTRAS)}")
        if name not in EXTRAS:
            raise UnknownNameError("tracker", name, (*EXTRAS, AUTO, "none"))
    return names


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose package is not installed.

    Raises:
        UsageError: Names the extra.
    """
    for name in set(names) - {AUTO}:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f'--log-to {name}: it is not installed; pip install "g2l[{EXTRAS[name]}]"')


def open_trackers(tracking: Tracking, folder: Path, step: int, note: Callable[[str], None]) -> list[Tracker]:
    """Open what is asked for, to begin or to continue at `step`.

    Args:
        tracking: What is asked for.
        folder: The run folder, which keeps what the trackers write here, and under which id they know the run.
        step: The first step that will be written.
        note: Is told once of a tracker that fails later.

    Raises:
        UsageError: A package is not installed.
        RunError: A tracker refuses the run, such as for want of a login.
    """
    require_trackers(tracking.names)
    make: Mapping[str, Callable[[], Tracker]] = {
        AUTO: lambda: TensorBoardLog(folder, step),
        "tensorboard": lambda: TensorBoardLog(folder, step),
        "wandb": lambda: _Wandb(folder, tracking.config),
        "mlflow": lambda: _Mlflow(folder, tracking.config),
    }
    opened = list[Tracker]()
    for name in tracking.names:
        tracker, error = _tried(make[name])
        if tracker is None or error:
            raise RunError(
                f"--log-to {name}: it cannot begin ({_line(error)}). Mend that, set it to work without a server "
                "(WANDB_MODE=offline; no MLFLOW_TRACKING_URI), or leave it out"
            ) from error
        opened.append(_Apart(name, tracker, note))
    return opened


def _tried(call: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What a call into a tracker's package gives, or what it raises: these packages do not name all of their errors."""
    try:
        return call(), None
    except Exception as error:  # noqa: BLE001
        return None, error


def _line(error: Exception | None) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class _Apart:
    """A tracker in a thread of its own: training neither waits for it nor ends with it."""

    def __init__(self, name: str, tracker: Tracker, note: Callable[[str], None]) -> None:
        self._name, self._tracker, self._note = name, tracker, note
        self._rows: Queue[tuple[str, Mapping[str, float]] | None] = Queue()
        self._thread = Thread(target=self._run, name=f"g2l-{name}", daemon=True)
        self._thread.start()

    def add(self, group: str, row: Mapping[str, float]) -> None:
        """Hand a row to the thread."""
        if self._thread.is_alive():
            self._rows.put((group, dict(row)))

    def close(self) -> None:
        """Wait until all is sent, but not for ever."""
        self._rows.put(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            self._note(f"{self._name} has not taken all values after {CLOSE_S:.0f} s; log.csv has them")

    def _run(self) -> None:
        _, error = _tried(self._take_all)
        if error:
            self._note(
                f"{self._name} failed and gets no more values ({_line(error)}); training goes on, log.csv has all"
            )

    def _take_all(self) -> None:
        while (found := self._rows.get()) is not None:
            self._tracker.add(*found)
        self._tracker.close()


class _Wandb:
    """A run of W&B; WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY and WANDB_API_KEY mean what they mean to it."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        kept = folder / _RUN_IDS.format("wandb")
        known = kept.read_text(encoding="utf-8").strip() if kept.is_file() else None
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT, name=folder.resolve().name, dir=str(folder),
            config=dict(config), id=known, resume="allow",
        )  # fmt: skip
        write_text(kept, f"{self._run.id}\n")

    def add(self, group: str, row: Mapping[str, float]) -> None:
        """Log a row; W&B leaves out steps that it has already."""
        values = {f"{group}/{name}": value for name, value in row.items() if name != "step"}
        self._run.log(values, step=int(row["step"]))

    def close(self) -> None:
        """End the run."""
        self._run.finish()


class _Mlflow:
    """A run of MLflow; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME mean what they mean to it.

    Without the first it goes to RUN/mlruns: `MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri RUN/mlruns`.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric: Any = Metric
        where = os.environ.get("MLFLOW_TRACKING_URI")
        if not where:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # else version 3 refuses folders
            where = (folder.resolve() / "mlruns").as_uri()
        self._client: Any = MlflowClient(tracking_uri=where)
        kept = folder / _RUN_IDS.format("mlflow")
        if kept.is_file():
            self._id = kept.read_text(encoding="utf-8").strip()
            self._client.update_run(self._id, status="RUNNING")
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
            experiment = self._client.get_experiment_by_name(name)
            experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
            self._id = self._client.create_run(experiment_id, run_name=folder.resolve().name).info.run_id
            texts = {_name(key): str(value)[:500] for key, value in _flat(config).items()}
            self._client.log_batch(self._id, params=[Param(key, text) for key, text in texts.items() if text][:100])
            write_text(kept, f"{self._id}\n")
        self._waiting = list[Any]()

    def add(self, group: str, row: Mapping[str, float]) -> None:
        """Gather a row; enough of them are sent together."""
        from time import time

        now, step = int(1000 * time()), int(row["step"])
        self._waiting += [
            self._metric(_name(f"{group}/{name}"), float(value), now, step)
            for name, value in row.items()
            if name != "step"
        ]
        if len(self._waiting) >= _BATCH or group != "train":
            self._send()

    def _send(self) -> None:
        for start in range(0, len(self._waiting), _BATCH):
            self._client.log_batch(self._id, metrics=self._waiting[start : start + _BATCH])
        self._waiting.clear()

    def close(self) -> None:
        """Send what is left and end the run."""
        self._send()
        self._client.set_terminated(self._id)


def _name(text: str) -> str:
    """A name as MLflow takes it."""
    return re.sub(r"[^\w\-. /]", "_", text)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat

"""The logs of a run: `log.csv`, `validation.csv`, and the trackers that get the same."""

import csv
import io
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from g2l_core.distillation.trackers import Tracking, open_trackers
from g2l_core.errors import RunError, refuse_open_files
from g2l_core.files import replacing

RESTORE = "restore it from a copy, or begin again with another --out"


class TrainingLogs:
    """All logs of a run. Opening them drops what a run resumed at `step` will write again.

    Raises:
        RunError: A log is damaged, or lacks the held-out metric values from before training, or a tracker cannot begin.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        tracking: Tracking | None = None,
        note: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self._steps = CsvLog(folder / "log.csv", keep_below=step)
        self.lost = step - self._steps.kept
        """How many steps before `step` have no row."""
        self._validation = CsvLog(folder / "validation.csv", keep_below=step + 1 if step else 0)
        if step:
            row_of_step(folder / "validation.csv", read_log(folder / "validation.csv"), 0)
        self._trackers = open_trackers(tracking or Tracking(), folder, step, note)

    def step(self, row: Mapping[str, float]) -> None:
        """Add a step's row."""
        self._steps.write(row)
        for tracker in self._trackers:
            tracker.add("train", row)

    def validation(self, row: Mapping[str, float]) -> None:
        """Add a validation's row."""
        self._validation.write(row, durable=True)  # a run cannot be continued without its first row
        for tracker in self._trackers:
            tracker.add("held out", row)

    def close(self) -> None:
        """Close the logs."""
        for tracker in self._trackers:
            tracker.close()


class CsvLog:
    """A CSV that survives a kill: each row is flushed. Opening it drops a torn row, and steps from `keep_below` on.

    Raises:
        RunError: The file is damaged.
    """

    def __init__(self, path: Path, *, keep_below: int) -> None:
        self._path = path
        rows = [row for row in read_csv(path) if int(row["step"]) < keep_below]
        self.kept = len(rows)
        self._columns: tuple[str, ...] = tuple(rows[0]) if rows else ()
        self._rewrite(rows)

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        with replacing(self._path, "w", newline="", encoding="utf-8") as file:
            if rows:
                writer = csv.DictWriter(file, self._columns)
                writer.writeheader()
                writer.writerows(rows)

    def write(self, row: Mapping[str, float], *, durable: bool = False) -> None:
        """Append a row, and wait until it is on the disk if it is to be durable. The first row decides the columns.

        Raises:
            RunError: The row has others.
        """
        empty = self._path.stat().st_size == 0
        if not empty and tuple(row) != self._columns:
            raise RunError(f"{self._path} has the columns {', '.join(self._columns)}, not {', '.join(row)}: {RESTORE}")
        with self._path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, tuple(row) if empty else self._columns)
            if empty:
                self._columns = tuple(row)
                writer.writeheader()
            writer.writerow(row)
            if durable:
                file.flush()
                os.fsync(file.fileno())


def read_csv(path: Path) -> list[dict[str, str]]:
    """The complete rows of a log; none where there is no log. A kill can leave half a line, which is left out.

    Raises:
        RunError: The file is damaged; names the line.
    """
    if not path.exists():
        return []
    try:
        text = path.read_bytes().decode()
        rows = list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        refuse_open_files(error, path, RunError)
        raise RunError(f"{path} is no log of g2l distill ({error}): {RESTORE}") from error
    for line, row in enumerate(rows, start=2):
        if None in row or None in row.values() or not row.get("step", "").isdecimal():
            raise RunError(f"{path}, line {line} is no row of a log of g2l distill: {RESTORE}")
    return rows


def read_log(path: Path, needs: Collection[str] = ()) -> list[dict[str, float]]:
    """The complete rows of a log as numbers; empty where there is no log.

    Raises:
        RunError: The file is damaged, or lacks a column that is needed.
    """
    rows = read_csv(path)
    if rows and (missing := set(needs) - set(rows[0])):
        raise RunError(f"{path} has no column {', '.join(sorted(missing))}: {RESTORE}")
    try:
        return [{name: float(value) for name, value in row.items()} for row in rows]
    except ValueError as error:
        raise RunError(f"{path} holds a value that is no number ({error}): {RESTORE}") from error


def row_of_step(path: Path, rows: Collection[Mapping[str, float]], step: int) -> Mapping[str, float]:
    """The row of one step.

    Raises:
        RunError: There is none.
    """
    found = next((row for row in rows if row["step"] == step), None)
    if found is None:
        raise RunError(f"{path} has no row of step {step}: {RESTORE}")
    return found

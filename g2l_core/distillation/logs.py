"""The logs of a run: `log.csv`, `validation.csv`, and TensorBoard where it is installed."""

import csv
from collections.abc import Mapping
from pathlib import Path

from g2l_core.distillation.tensorboard import TensorBoardLog
from g2l_core.files import replacing


class TrainingLogs:
    """All logs of a run. Opening them drops what a run resumed at `step` will write again."""

    def __init__(self, folder: Path, step: int) -> None:
        self._steps = CsvLog(folder / "log.csv", keep_below=step)
        self._validation = CsvLog(folder / "validation.csv", keep_below=step + 1 if step else 0)
        self._tensorboard = TensorBoardLog(folder, step)

    def step(self, row: Mapping[str, float]) -> None:
        """Add a step's row."""
        self._steps.write(row)
        self._tensorboard.add("train", row)

    def validation(self, row: Mapping[str, float]) -> None:
        """Add a validation's row."""
        self._validation.write(row)
        self._tensorboard.add("held out", row)

    def close(self) -> None:
        """Close the logs."""
        self._tensorboard.close()


class CsvLog:
    """A CSV that survives a kill: each row is flushed. Opening it drops a torn row, and steps from `keep_below` on."""

    def __init__(self, path: Path, *, keep_below: int) -> None:
        self._path = path
        rows = [row for row in read_csv(path) if int(row["step"]) < keep_below]
        self._columns: tuple[str, ...] = tuple(rows[0]) if rows else ()
        self._rewrite(rows)

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        with replacing(self._path, "w", newline="", encoding="utf-8") as file:
            if rows:
                writer = csv.DictWriter(file, self._columns)
                writer.writeheader()
                writer.writerows(rows)

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row. The first row of a file decides its columns."""
        empty = self._path.stat().st_size == 0
        with self._path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, tuple(row) if empty else self._columns)
            if empty:
                self._columns = tuple(row)
                writer.writeheader()
            writer.writerow(row)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The complete rows of a log. A kill can leave half a line, which lacks its last field and is left out."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row.values() and (row["step"] or "").isdigit()]


def read_log(path: Path) -> list[dict[str, float]]:
    """The complete rows of a log as numbers; empty where there is no log."""
    return [{name: float(value) for name, value in row.items()} for row in read_csv(path)]

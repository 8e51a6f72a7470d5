"""The logs of a run: `log.csv` and `validation.csv`, which survive a kill, and TensorBoard where it is installed."""

import csv
from collections.abc import Mapping
from pathlib import Path

from g2l_core.distillation.tensorboard import TensorBoardLog


class TrainingLogs:
    """log.csv and validation.csv, cut back to where a resumed run goes on, and TensorBoard where it is installed."""

    def __init__(self, folder: Path, step: int) -> None:
        self._steps = CsvLog(folder / "log.csv", keep_below=step)
        self._validation = CsvLog(folder / "validation.csv", keep_below=step + 1 if step else 0)
        self._board = TensorBoardLog(folder, step)

    def step(self, row: Mapping[str, float]) -> None:
        """One step."""
        self._steps.write(row)
        self._board.add("train", row)

    def validation(self, row: Mapping[str, float]) -> None:
        """One validation."""
        self._validation.write(row)
        self._board.add("held out", row)

    def close(self) -> None:
        """No more comes."""
        self._board.close()


class CsvLog:
    """A CSV that survives a kill: each row is flushed, and a resumed run drops what it will write again."""

    def __init__(self, path: Path, *, keep_below: int) -> None:
        self._path = path
        rows = [row for row in read_csv(path) if int(row["step"]) < keep_below]
        self._columns: tuple[str, ...] = tuple(rows[0]) if rows else ()
        self._rewrite(rows)

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


def read_csv(path: Path) -> list[dict[str, str]]:
    """The whole rows of a log; a kill can leave half a line, which then lacks its last field."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row.values() and (row["step"] or "").isdigit()]


def read_figures(path: Path) -> list[dict[str, float]]:
    """The rows of a log as numbers."""
    return [{name: float(value) for name, value in row.items()} for row in read_csv(path)]

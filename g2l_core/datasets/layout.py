"""Read folders and tables as published. Errors say in one line what was expected and what is there."""

import csv
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from io import StringIO
from itertools import islice, zip_longest
from pathlib import Path

from g2l_core.errors import ManifestError, UsageError

SHOWN = 5
TCGA_PATIENT = re.compile(r"TCGA-\w{2}-\w{4}")


def wrong(root: Path, expected: str) -> ManifestError:
    """The error for a folder with another layout: what was expected, and what is there."""
    if not root.is_dir():
        return ManifestError(f"expected {expected} in {root}, which is no folder")
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in root.iterdir())
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ManifestError(f"expected {expected} in {root}; found {', '.join(names[:SHOWN]) or 'nothing'}{more}")


def base_folder(root: Path, *inside: str, holding: str) -> Path:
    """Find the folder that holds `holding`: the root, or one of the folders that the archive unpacks to.

    Args:
        root: What the user gave.
        inside: Folders of the archive to search, relative to the root.
        holding: A glob pattern, relative to the folder, that must match a file or folder.

    Raises:
        ManifestError: None of the folders holds it.
    """
    for base in (root, *(root / name for name in inside)):
        if base.is_dir() and next(base.glob(holding), None) is not None:
            return base
    raise wrong(root, f"{' or '.join([holding, *(f'{name}/{holding}' for name in inside)])}")


def files(folder: Path, *suffixes: str) -> list[Path]:
    """The files with one of the suffixes anywhere below a folder, sorted, without hidden ones."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    return sorted(path for path in found if not path.name.startswith(".") and path.is_file())


def class_folders(folder: Path, classes: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """Yield the classes and their folders in a folder.

    Raises:
        ManifestError: A class has no folder.
    """
    names = list(classes)
    for name in names:
        if not (folder / name).is_dir():
            raise wrong(folder, f"the class folders {', '.join(names)}")
        yield name, folder / name


def some(found: Sequence[Path], folder: Path, expected: str) -> Sequence[Path]:
    """Return the files, if there are any.

    Raises:
        ManifestError: There are no files.
    """
    if not found:
        raise wrong(folder, expected)
    return found


def table(path: Path, columns: Sequence[str], delimiter: str = ",", comment: str = "\0") -> list[dict[str, str]]:
    """Read a published table, with its own column names.

    Raises:
        ManifestError: It cannot be read, or lacks a column.
    """
    if not path.is_file():
        raise wrong(path.parent, path.name)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"cannot read {path}: {error}") from error
    lines = (line for line in StringIO(text, newline="") if not line.startswith(comment))
    try:
        rows = list(csv.DictReader(lines, delimiter=delimiter))
    except csv.Error as error:
        raise ManifestError(f"{path} is no table: {error}") from error
    have = list(rows[0]) if rows else []
    missing = [column for column in columns if column not in have]
    if missing:
        raise ManifestError(f"{path} has no column {missing[0]!r}; found {', '.join(map(str, have)) or 'no rows'}")
    short = next((i for i, row in enumerate(rows) if any(row[column] is None for column in columns)), None)
    if short is not None:
        raise ManifestError(f"{path}: row {short + 1} is cut short; is the file complete?")
    return rows


def require_files(paths: Sequence[Path], listed_in: Path) -> None:
    """Refuse a dataset whose table names files that are not there.

    Raises:
        ManifestError: Files are missing. The message gives their number and the first of them.
    """
    absent = list(islice((path for path in paths if not path.is_file()), 1))
    if absent:
        count = sum(not path.is_file() for path in paths)
        raise ManifestError(f"{listed_in} names {count} of {len(paths)} files that are not there, first {absent[0]}")


def spreadsheet(path: Path, sheet: str, columns: Sequence[str]) -> list[dict[str, str]]:
    """Read one sheet of an .xlsx file, with the names in its first row. All values are text.

    Raises:
        ManifestError: It cannot be read, or lacks the sheet or a column.
        UsageError: openpyxl is not installed.
    """
    try:
        import openpyxl
    except ImportError as error:
        raise UsageError(f"reading {path} needs a package: pip install 'g2l[xlsx]'") from error
    try:
        with closing(openpyxl.load_workbook(path, read_only=True, data_only=True)) as book:
            grid = [
                ["" if v is None else str(v).strip() for v in row] for row in book[sheet].iter_rows(values_only=True)
            ]
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise ManifestError(f"cannot read the sheet {sheet} of {path}: {error}") from error
    header, *rows = grid or [[]]
    missing = [column for column in columns if column not in header]
    if missing:
        raise ManifestError(f"sheet {sheet} of {path} has no column {missing[0]!r}; found {', '.join(header)}")
    return [dict(zip_longest(header, row[: len(header)], fillvalue="")) for row in rows]


def tcga_labels(name: str) -> dict[str, str]:
    """patient_id (TCGA-XX-XXXX) and medical_center (the tissue source site XX) of a file or barcode.

    The barcode: https://docs.gdc.cancer.gov/Encyclopedia/pages/TCGA_Barcode.

    Raises:
        ManifestError: The name has no TCGA barcode.
    """
    found = TCGA_PATIENT.search(name)
    if not found:
        raise ManifestError(f"{name!r} has no TCGA barcode such as TCGA-A2-A0CM")
    return {"patient_id": found[0], "medical_center": found[0].split("-")[1]}

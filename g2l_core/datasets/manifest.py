"""Write the manifest of a dataset's folder for stage one, and its label file for stage three.

The manifest has one row for each slide or image. The label file `NAME-labels.csv` has what differs between the images
or patches of one slide, by `slide_id` and `patch_id`, or by `slide_id`, `x` and `y`.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from g2l_core.datasets.layout import wrong
from g2l_core.datasets.pixels import write_png
from g2l_core.datasets.spec import Dataset, Record
from g2l_core.errors import ManifestError, UsageError
from g2l_core.files import csv_row, replacing

FIRST = ("slide_id", "path", "patch_id", "mpp", "dataset", "patient_id", "medical_center")


@dataclass(frozen=True, kw_only=True)
class Written:
    """The files that were written, and what they hold."""

    manifest: Path
    labels: Path | None
    """The label file; None if every slide has one label."""
    images: Path | None
    """The folder of images that had to be written; None if the published files are used."""
    rows: int
    slides: int
    patients: int
    """0 if patients are not known."""
    cells: int
    """Number of labeled patches of slides."""
    left_out: tuple[str, ...]


def write_manifest(dataset: Dataset, root: Path, out: Path) -> Written:
    """Read a dataset's folder and write its manifest, its labels if they differ within a slide, and images if needed.

    Args:
        dataset: The dataset.
        root: Its folder, as published.
        out: The manifest to write. Its label file and the folder of images that must be written go beside it.

    Raises:
        ManifestError: The folder has another layout. The message says what was expected, what is there and where to
            get the dataset.
        SlideError: A slide whose masks are read cannot be opened.
        UsageError: `out` is a file already, and no manifest.
    """
    _refuse_overwriting(out)
    try:
        if not root.is_dir():
            raise wrong(root, dataset.title)
        # folders are resolved here, once; files that are links keep their names, which say what they are
        reading = dataset.read(root.resolve())
        images = out.parent.resolve() / f"{out.stem}-images"
        rows = [_row(record, dataset, images) for record in reading.records]
        _refuse_differing([row for row, _ in rows], dataset)
        cells = [cell for row in rows for cell in _cell_rows(row, dataset)]
    except ManifestError as error:
        raise ManifestError(f"{error}. {dataset.title}: {dataset.url}; g2l datasets {dataset.name} says more") from None
    out.parent.mkdir(parents=True, exist_ok=True)
    table = [row for row, _ in rows]
    _write(out, table)
    labels = cells or _by_image(table, dataset)
    path = out.with_name(f"{dataset.name}-labels.csv")
    if labels:
        _write(path, labels)
    return Written(
        manifest=out,
        labels=path if labels else None,
        images=images if any(record.pixels for _, record in rows) else None,
        rows=len(table),
        slides=len({row["slide_id"] for row in table}),
        patients=len({row["patient_id"] for row in table} - {""}),
        cells=len(cells),
        left_out=reading.left_out,
    )


def _refuse_overwriting(out: Path) -> None:
    """Refuse to write over a table of the dataset itself."""
    if out.exists() and not (out.is_file() and out.read_bytes().startswith(b"slide_id,path,")):
        raise UsageError(f"{out} is there already and is no manifest of slides; give another --out")


def _row(record: Record, dataset: Dataset, images: Path) -> tuple[dict[str, str], Record]:
    path = record.path
    if record.pixels is not None:
        path = images / f"{record.path}.png"
        write_png(path, record.pixels())
    beside = images.parent
    name = path.relative_to(beside).as_posix() if path.is_relative_to(beside) else path.as_posix()
    fixed = {
        "slide_id": record.slide_id,
        "path": name,
        "patch_id": name if record.is_image else "",
        "mpp": "" if record.mpp is None else f"{record.mpp:.6g}",
        "dataset": dataset.name,
        "patient_id": "",
    }
    return fixed | dict(record.labels), record


def _cell_rows(row: tuple[Mapping[str, str], Record], dataset: Dataset) -> Iterable[dict[str, str]]:
    values, record = row
    for x, y, label in record.cells() if record.cells else ():
        yield {"slide_id": values["slide_id"], "x": str(x), "y": str(y), dataset.cell_label: label}


def _by_image(rows: Sequence[Mapping[str, str]], dataset: Dataset) -> list[dict[str, str]]:
    """The rows of the label file with label columns and split of each image; empty if the dataset needs no file."""
    if not dataset.label_file:
        return []
    columns = [column for column in rows[0] if column not in FIRST]
    return [{column: row.get(column, "") for column in ("slide_id", "patch_id", *columns)} for row in rows]


def _refuse_differing(rows: Sequence[Mapping[str, str]], dataset: Dataset) -> None:
    """Refuse images of one slide that differ in a column of no label file, since stage one keeps what all share."""
    first: dict[str, Mapping[str, str]] = {}
    free = {"path", "patch_id"}
    for row in rows:
        known = first.setdefault(row["slide_id"], row)
        for column, value in row.items():
            may_differ = column in free or (dataset.label_file and column not in FIRST)
            if not may_differ and value != known.get(column, ""):
                raise ManifestError(
                    f"expected one {column} for all files of {row['slide_id']}; "
                    f"found {known.get(column, '')!r} and {value!r}"
                )


def _write(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write a CSV of the columns that are not empty, with those of every manifest first and split last."""
    used = {column: None for row in rows for column, value in row.items() if value}
    own = [c for c in FIRST if c in used]
    others = [c for c in used if c not in FIRST and c != "split"]
    columns = [*own, *others, *(["split"] if "split" in used else [])]
    with replacing(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(csv_row(columns))
        writer.writerows(csv_row(row.get(column, "") for column in columns) for row in rows)

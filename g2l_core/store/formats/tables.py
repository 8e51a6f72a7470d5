"""Layouts of a whole cohort: features of all slides beside a table of their patches."""

import csv
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from g2l_core.errors import UsageError
from g2l_core.files import csv_row
from g2l_core.store.formats.item import CENTER, ExportCohort, ExportItem, NpyWriter, whole_file, write_tensor

INDEX = ("slide_id", "patch", "x", "y")
"""The columns of a patch: its slide, its file or corner, and its top-left corner in level-0 pixels."""


class _Csv:
    """A CSV file; cells that a spreadsheet would run begin with an apostrophe."""

    def __init__(self, file: Any, header: Sequence[str]) -> None:
        self._writer = csv.writer(file, lineterminator="\n")
        self._writer.writerow(header)

    def rows(self, rows: Iterable[Sequence[object]]) -> None:
        self._writer.writerows(map(csv_row, rows))


def _open_csv(stack: ExitStack, path: Path, header: Sequence[str]) -> _Csv:
    file = stack.enter_context(whole_file(path, "w", encoding="utf-8", newline=""))
    return _Csv(file, header)


def _places(item: ExportItem) -> Iterator[tuple[str, str, int, int]]:
    for name, (x, y) in zip(item.names, item.coords.tolist(), strict=True):
        yield item.slide_id, name, x, y


def write_npy(items: Iterable[ExportItem], cohort: ExportCohort, folder: Path) -> Iterator[Path]:
    """One array a cohort and encoder: folder/<encoder>.npy, float16 (n, dim), for `numpy.load(mmap_mode="r")`.

    folder/<encoder>.csv has a line for each row: slide_id, patch, x, y, and the labels.
    """
    yield from _rows_and_table(items, cohort, folder, "float16")


def _rows_and_table(items: Iterable[ExportItem], cohort: ExportCohort, folder: Path, dtype: str) -> Iterator[Path]:
    paths = [folder / f"{encoder}{ending}" for encoder in cohort.encoders for ending in (".npy", ".csv")]
    with ExitStack() as stack:
        arrays = {e: NpyWriter(stack.enter_context(whole_file(folder / f"{e}.npy")), dtype) for e in cohort.encoders}
        header = (*INDEX, *cohort.columns)
        tables = {e: _open_csv(stack, folder / f"{e}.csv", header) for e in cohort.encoders}
        for item in items:
            labels = [item.values(column) for column in cohort.columns]
            rows = [(*place, *of_row) for place, *of_row in zip(_places(item), *labels, strict=True)]
            for encoder, features in item.features.items():
                arrays[encoder].append(features)
                tables[encoder].rows(rows)
        for array in arrays.values():
            array.close()
    yield from paths


def write_croma(items: Iterable[ExportItem], cohort: ExportCohort, folder: Path) -> Iterator[Path]:
    """The inputs of croma: folder/<encoder>.npy, float32 (n, dim), and folder/<encoder>.csv, aligned by row.

    The columns are sample_id, image_path, label, group_id (the patient, or the slide or image), medical_center, which
    is the confounder, and subset, which is empty. Features are not normalized.
    """
    header = ("sample_id", "image_path", "label", "group_id", CENTER, "subset")
    with ExitStack() as stack:
        arrays = {
            e: NpyWriter(stack.enter_context(whole_file(folder / f"{e}.npy")), "float32") for e in cohort.encoders
        }
        tables = {e: _open_csv(stack, folder / f"{e}.csv", header) for e in cohort.encoders}
        for item in items:
            samples = [f"{item.slide_id}#{name}" for name in item.names]
            images = [item.facts.source if item.patch_ids is None else f"{item.facts.source}/{n}" for n in item.names]
            values = (item.values(cohort.label), item.groups(), item.values(CENTER), [""] * len(item))
            rows = list(zip(samples, images, *values, strict=True))
            for encoder, features in item.features.items():
                arrays[encoder].append(features)
                tables[encoder].rows(rows)
        for array in arrays.values():
            array.close()
    for encoder in cohort.encoders:
        yield from (folder / f"{encoder}.npy", folder / f"{encoder}.csv")


def write_eva(items: Iterable[ExportItem], cohort: ExportCohort, folder: Path) -> Iterator[Path]:
    """The offline data of eva: folder/<encoder>/manifest.csv with origin, embeddings, target, split and wsi_id.

    A slide is one .pt file, float32 (n, dim), for eva's multi-embeddings datasets; of patch images each is one,
    float32 (dim,). target is the place of the class among the sorted classes, which folder/<encoder>/classes.csv lists;
    where no label column is named, or a patch has no class, it is empty. split is the label of that name.
    """
    rows: dict[str, list[tuple[str, str, str, str, str]]] = defaultdict(list)
    for item in items:
        for encoder, features in item.features.items():
            for path, values, row in _eva_files(item, features, cohort):
                write_tensor(folder / encoder / path, values)
                yield folder / encoder / path
                rows[encoder].append(row)
    for encoder in cohort.encoders:
        classes = sorted({row[2] for row in rows[encoder]} - {""})
        number = {name: i for i, name in enumerate(classes)}
        with ExitStack() as stack:
            table = _open_csv(stack, folder / encoder / "classes.csv", ("target", cohort.label or "class"))
            table.rows(enumerate(classes))
            header = ("origin", "embeddings", "target", "split", "wsi_id")
            manifest = _open_csv(stack, folder / encoder / "manifest.csv", header)
            manifest.rows((origin, path, number.get(c, ""), *rest) for origin, path, c, *rest in rows[encoder])
        yield from (folder / encoder / "classes.csv", folder / encoder / "manifest.csv")


def _eva_files(
    item: ExportItem, features: np.ndarray, cohort: ExportCohort
) -> Iterator[tuple[str, np.ndarray, tuple[str, str, str, str, str]]]:
    """Path, tensor and manifest row of each file of a slide."""
    if item.patch_ids is None:
        path = f"{item.slide_id}.pt"
        yield path, features, (item.slide_id, path, item.value(cohort.label), item.value("split"), item.slide_id)
        return
    labels, splits = item.values(cohort.label), item.values("split")
    for name, values, label, split in zip(item.names, features, labels, splits, strict=True):
        path = f"{item.slide_id}/{_inside(name)}.pt"
        yield path, values, (f"{item.slide_id}/{name}", path, label, split, item.slide_id)


def _inside(name: str) -> str:
    """The name of a file without what would lead out of the folder."""
    return "/".join("up" if part == ".." else part for part in name.split("/") if part)


def write_pathorob(items: Iterable[ExportItem], cohort: ExportCohort, folder: Path) -> Iterator[Path]:
    """PathoROB's features and metadata.

        folder/features/<encoder>/cohort/<medical_center>.npz   one float32 (dim,) a patch, named slide_id-patch_id
        folder/metadata/cohort.csv                              subset, slide_id, patch_id, biological_class,
                                                                medical_center

    A patch is left out of both where its class or center is not known, for PathoROB asks for both.
    """
    header = ("subset", "slide_id", "patch_id", "biological_class", CENTER)
    paths: dict[Path, zipfile.ZipFile] = {}
    with ExitStack() as stack:
        table = _open_csv(stack, folder / "metadata" / "cohort.csv", header)
        for item in items:
            slide = item.slide_id.replace("/", "_")  # a slash in an id would be a folder in the archive
            known = list(zip(item.names, item.values(cohort.label), item.values(CENTER), strict=True))
            table.rows(("all", slide, name, label, center) for name, label, center in known if label and center)
            for encoder, features in item.features.items():
                for (name, label, center), values in zip(known, features.astype(np.float32), strict=True):
                    if label and center:
                        place = folder / "features" / encoder / "cohort" / f"{_inside(center.replace(' ', '_'))}.npz"
                        if place not in paths:
                            file = stack.enter_context(whole_file(place))
                            paths[place] = stack.enter_context(zipfile.ZipFile(file, "w"))
                        _write_member(paths[place], f"{slide}-{name}", values)
    yield from (*paths, folder / "metadata" / "cohort.csv")


def _write_member(archive: zipfile.ZipFile, name: str, values: np.ndarray) -> None:
    member = zipfile.ZipInfo(f"{name}.npy")  # its date is fixed, so that equal features give equal bytes
    with archive.open(member, "w") as file:
        np.lib.format.write_array(file, values)


def write_parquet(items: Iterable[ExportItem], cohort: ExportCohort, folder: Path) -> Iterator[Path]:
    """One table an encoder: folder/<encoder>.parquet with slide_id, patch, x, y, the labels, and features.

    features are lists of fixed length of float32; a row group is a slide.

    Raises:
        UsageError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError('--format parquet needs pyarrow: pip install "g2l[parquet]"') from error

    with ExitStack() as stack:
        writers = {}
        for encoder, facts in cohort.encoders.items():
            told = {"encoder_digest": facts.digest, "mpp": str(cohort.mpp), "view": str(cohort.view)}
            told |= {"view_px": str(cohort.crop_px), "patch_px": str(cohort.patch_px)}
            fields = [("slide_id", pa.string()), ("patch", pa.string()), ("x", pa.int32()), ("y", pa.int32())]
            fields += [(column, pa.string()) for column in cohort.columns if column not in INDEX]
            fields += [("features", pa.list_(pa.float32(), facts.dim))]
            file = stack.enter_context(whole_file(folder / f"{encoder}.parquet"))
            layout = pa.schema(fields, metadata=told)
            writers[encoder] = stack.enter_context(parquet.ParquetWriter(file, layout))
        for item in items:
            for encoder, features in item.features.items():
                writers[encoder].write_table(_arrow_table(pa, writers[encoder].schema, item, features))
    yield from (folder / f"{encoder}.parquet" for encoder in cohort.encoders)


def _arrow_table(pa: Any, layout: Any, item: ExportItem, features: np.ndarray) -> Any:
    values = pa.FixedSizeListArray.from_arrays(pa.array(features.astype(np.float32).ravel()), features.shape[1])
    known = {"slide_id": [item.slide_id] * len(item), "patch": item.names, "features": values}
    known |= {"x": item.coords[:, 0], "y": item.coords[:, 1]}
    return pa.table([known.get(name, None) if name in known else item.values(name) for name in layout.names], layout)

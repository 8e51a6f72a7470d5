"""Read the patches of slides that another tool has chosen: TRIDENT's and CLAM's HDF5, CSV, Parquet, boxes.

TRIDENT (mahmoodlab/TRIDENT, `WSIPatcher.save_as_h5`) and CLAM (mahmoodlab/CLAM, `process_contour`) keep corners in
level-0 pixels in a dataset `coords`, and the size of their patches in its attributes.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from g2l_core.errors import ReadError, UsageError
from g2l_core.slides.limits import JSON_BYTES, limit, require_bytes
from g2l_core.slides.manifest import canonical_column, open_table

HDF5_SUFFIXES = frozenset({".h5", ".hdf5"})
TABLE_SUFFIXES = frozenset({".csv", ".tsv", ".parquet"})

SIZES = "size", "patch_size_level0"
"""Columns of a table that give the side of a patch in level-0 pixels."""

_LARGEST = 2**31 - 1
"""Of a coordinate, as stores keep them."""


@dataclass(frozen=True, kw_only=True)
class GivenPatches:
    """The patches of one slide that a file gives, or the boxes that they shall lie in. All are level-0 pixels."""

    corners: np.ndarray
    """int64 (n, 2): x, y of the upper left corners, without repetitions, row by row."""
    box_sizes: np.ndarray | None = None
    """int64 (n, 2): width and height, if the corners are of boxes."""
    sides: tuple[float, ...] = ()
    """The sides of the patches, as far as the file gives them."""
    level0_size: tuple[int, int] | None = None
    """Width and height of the slide that the file is of, if it says so."""
    repeated: int = 0
    """How many rows were left out because they repeat another."""

    @property
    def sha256(self) -> str:
        """The digest of the corners and boxes, whatever file they are in and in whatever order."""
        parts = [self.corners] if self.box_sizes is None else [self.corners, self.box_sizes]
        return hashlib.sha256(np.hstack(parts).astype("<i8").tobytes()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Some rows of a table."""

    columns: Mapping[str, np.ndarray]
    """The values by column, in lower case; text or numbers."""
    lines: np.ndarray
    """The number of each row in the file, for messages."""

    def chosen(self, rows: np.ndarray) -> "Rows":
        """Those rows alone."""
        return Rows(columns={name: values[rows] for name, values in self.columns.items()}, lines=self.lines[rows])


def patches_of(
    rows: np.ndarray, sides: Sequence[float] = (), level0_size: tuple[int, int] | None = None
) -> GivenPatches:
    """Patches without repetitions, row by row.

    Args:
        rows: int64 (n, 2), x and y of patches; or (n, 4), x, y, width and height of boxes.
        sides: Of the patches.
        level0_size: Width and height of the slide that they are of.
    """
    is_boxes = rows.shape[1] == 4
    unique = np.unique(rows[:, [1, 0, *range(2, rows.shape[1])]], axis=0)
    return GivenPatches(
        corners=unique[:, [1, 0]],
        box_sizes=unique[:, 2:] if is_boxes else None,
        sides=tuple(sorted(set(sides))),
        level0_size=level0_size,
        repeated=len(rows) - len(unique),
    )


def read_patches(path: Path) -> GivenPatches:
    """The patches that a file of one slide gives.

    Raises:
        ReadError: It cannot be read, or its coordinates are not whole level-0 pixels.
        UsageError: pyarrow is not installed.
    """
    try:
        return read_hdf5(path) if path.suffix.lower() in HDF5_SUFFIXES else patches_of_rows(read_rows(path))
    except ReadError as error:
        raise ReadError(f"coordinates {path}: {error}") from error


# -- HDF5 -------------------------------------------------------------------------------------------------


def read_hdf5(path: Path) -> GivenPatches:
    """The patches of TRIDENT's or CLAM's file. The errors are those of `read_patches`."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            rows, attributes = hdf5_corners(file)
            return patches_of(rows, hdf5_side(attributes), hdf5_level0_size(attributes))
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ReadError(f"it cannot be read as HDF5 with a dataset coords: {error}") from error


def hdf5_corners(file: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """The corners in an open file as they stand, int64 (n, 2), and the attributes of the file and of its coordinates.

    Raises:
        ReadError: There are none, or they are no whole numbers.
    """
    dataset = _coords_dataset(file)
    rows = whole_numbers(np.asarray(dataset[:]).reshape(-1), "coords", np.arange(dataset.size) // 2)
    return rows.reshape(-1, 2), {**file.attrs, **dataset.attrs}


def _coords_dataset(file: Any) -> Any:
    """The dataset of the corners.

    Raises:
        ReadError: There is none, it is in another file, too large, or has another shape.
    """
    import h5py

    if not isinstance(file.get("coords", getlink=True), h5py.HardLink) or not isinstance(file["coords"], h5py.Dataset):
        raise ReadError(f"expected a dataset coords; it has {', '.join(file) or 'nothing'}")
    dataset = file["coords"]
    if dataset.external:
        raise ReadError("its dataset coords lies in another file")
    if dataset.ndim != 2 or dataset.shape[1] != 2:
        raise ReadError(f"its dataset coords has the shape {dataset.shape}; expected (patches, 2), x and y")
    if dataset.nbytes > limit(JSON_BYTES):
        raise ReadError(f"its dataset coords has {dataset.nbytes:,} bytes. If it is sound, set {JSON_BYTES} to more")
    return dataset


def hdf5_side(attributes: Mapping[str, Any]) -> list[float]:
    """The side of the patches in level-0 pixels, by what TRIDENT or CLAM say; empty if they say nothing.

    Raises:
        ReadError: CLAM's level is not level 0, and its scale is not given.
    """
    found = {
        name: float(np.ravel(value)[0]) for name, value in attributes.items() if np.size(value) and _is_number(value)
    }
    if "patch_size_level0" in found:
        return [found["patch_size_level0"]]
    if "patch_size" not in found:
        return []
    if found.get("target_magnification") and found.get("level0_magnification"):
        return [found["patch_size"] * found["level0_magnification"] / found["target_magnification"]]
    if found.get("patch_level", 0) > 0 and "downsample" not in found:
        raise ReadError(f"its patches are of level {found['patch_level']:g}, but it has no attribute downsample")
    return [found["patch_size"] * found.get("downsample", 1.0)]


def _is_number(value: Any) -> bool:
    return np.asarray(value).dtype.kind in "iuf"


def hdf5_level0_size(attributes: Mapping[str, Any]) -> tuple[int, int] | None:
    """Width and height of the slide in level-0 pixels; None where they are not given."""
    width, height = (attributes.get(f"level0_{side}") for side in ("width", "height"))
    return None if width is None or height is None else (int(width), int(height))


# -- tables -----------------------------------------------------------------------------------------------


def read_rows(path: Path) -> Rows:
    """The rows of a CSV, TSV or Parquet file.

    Raises:
        ReadError: It cannot be read.
        ManifestError: It is no table.
        UsageError: pyarrow is not installed.
    """
    try:
        require_bytes(path)
        if path.suffix.lower() == ".parquet":
            return _parquet_rows(path)
    except OSError as error:
        raise ReadError(f"it cannot be read: {error.strerror or error}") from error
    table = open_table(path)
    return Rows(columns={name.lower(): values for name, values in table.values.items()}, lines=table.lines)


def _parquet_rows(path: Path) -> Rows:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UsageError(f'{path} is Parquet, which needs pyarrow: pip install "g2l[parquet]"') from error
    try:
        table = parquet.read_table(path)
    except ArrowException as error:
        raise ReadError(f"it is no Parquet file: {error}") from error
    columns = {
        canonical_column(name).lower(): np.array(table[name].to_pylist(), dtype=object) for name in table.column_names
    }
    return Rows(columns=columns, lines=np.arange(1, table.num_rows + 1))


def patches_of_rows(rows: Rows) -> GivenPatches:
    """The patches, or with columns width and height the boxes, of rows with the columns x and y.

    Raises:
        ReadError: A column is not there, a value is no whole number, or a box is empty.
    """
    columns = rows.columns
    if not {"x", "y"} <= columns.keys() or ("width" in columns) != ("height" in columns):
        raise ReadError(
            f"expected columns x, y and, if you like, {SIZES[0]}; or x, y, width, height of boxes. "
            f"It has {', '.join(columns)}"
        )
    names = ["x", "y", *(name for name in ("width", "height") if name in columns)]
    numbers = np.stack([whole_numbers(columns[name], name, rows.lines) for name in names], axis=1)
    if len(names) == 4:
        empty = np.flatnonzero((numbers[:, 2:] < 1).any(axis=1))
        if len(empty):
            raise ReadError(f"row {rows.lines[empty[0]]}: a box of {numbers[empty[0], 2]} x {numbers[empty[0], 3]} px")
        return patches_of(numbers)
    sizes = [whole_numbers(columns[name], name, rows.lines) for name in SIZES if name in columns]
    return patches_of(numbers, [float(side) for values in sizes for side in np.unique(values)])


def whole_numbers(values: np.ndarray, name: str, lines: np.ndarray) -> np.ndarray:
    """Values as int64, which may be written as 512, 512.0 or 5e2.

    Args:
        values: Text or numbers, (n,).
        name: Of the column, for messages.
        lines: The row of each value, for messages.

    Raises:
        ReadError: A value is no whole number, or too large.
    """
    is_numeric = values.dtype.kind in "iuf"
    numbers = values.astype(np.float64) if is_numeric else np.array([_number(v) for v in values.tolist()], np.float64)
    wrong = np.flatnonzero(~np.isfinite(numbers) | (numbers != np.rint(numbers)) | (np.abs(numbers) > _LARGEST))
    if len(wrong):
        row, value = lines[wrong[0]], values[wrong[0]]
        raise ReadError(f"row {row}: {name} is {str(value)!r}, expected a whole number of level-0 pixels")
    return numbers.astype(np.int64)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return np.nan

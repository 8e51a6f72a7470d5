"""The facts of a public dataset, and what its reader finds in its folder."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from g2l_core.types import Rgb

Cell = tuple[int, int, str]
"""Top-left corner of a patch in level-0 pixels, x and y, and its label."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One slide or one image of a dataset."""

    slide_id: str
    path: Path
    """The file. For an image that has to be written first, its path in the folder of images, without suffix."""
    labels: Mapping[str, str]
    """patient_id, medical_center, split and the label columns, by their manifest names. Unknown values are empty."""
    is_image: bool = True
    """Whether it is a patch image, or else a slide that stage one cuts into patches."""
    mpp: float | None = None
    """Micrometers per pixel of the file, if its authors state it."""
    pixels: Callable[[], Rgb] | None = None
    """Gives the patch, uint8 (side, side, 3), if stage one cannot read the published file."""
    cells: Callable[[], Iterable[Cell]] | None = None
    """Gives the labeled patches of a slide, from its masks."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a reader finds in a folder."""

    records: Iterable[Record]
    left_out: tuple[str, ...] = ()
    """What is not in the manifest, and why."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The facts of a public dataset: a table of datasets.toml."""

    name: str
    title: str
    organ: str
    suite: str
    """The shipped task file that has its tasks; empty if none has."""
    url: str
    """Where to get it."""
    license: str
    unit: str
    """What one row of the manifest is."""
    published: int
    """Number of such rows of the whole dataset; 0 if that depends on what was downloaded."""
    labels: Mapping[str, tuple[str, ...]]
    """Label columns, each with its classes, or with none if the values are numbers."""
    split: str
    """Origin of the column `split`."""
    patients: str
    """What `patient_id` is, or which unit replaces it."""
    layout: str
    """The tree that --root must have."""
    source: str
    """Where the layout is documented."""
    reader: str
    """The function that reads its folder: MODULE.FUNCTION of this package."""
    patch_px: int = 0
    """Side of its patch images in pixels; 0 for slides, which stage one cuts into patches."""
    mpp: float | None = None
    """Micrometers per pixel of the published files, if stated."""
    label_file: bool = False
    """Whether images of one slide differ in label or split, so that stage three needs a label file."""
    cell_label: str = ""
    """The label column that masks give by patch. Its slides must be cut with stage one's default grid."""
    notes: tuple[str, ...] = ()
    """What users must know before they trust a metric value."""

    def read(self, root: Path) -> Reading:
        """Read the dataset's folder as its authors publish it.

        Raises:
            ManifestError: The folder has another layout.
        """
        module, _, function = self.reader.partition(".")
        reading: Reading = getattr(import_module(f"{__package__}.{module}"), function)(root)
        return reading

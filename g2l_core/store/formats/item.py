"""What every layout is made from: the cohort as a whole, and one slide's features at a time."""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Float16, Int32

import g2l_core
from g2l_core.errors import StoreError, writing
from g2l_core.files import replacing
from g2l_core.store.facts import EncoderFacts, SlideFacts

POWERS = (1.25, 2.5, 5, 10, 20, 40, 80)
"""Objectives that have a name; a magnification within 5 % of one is called so, as a scanner's 0.243 um/px is 40x."""

CENTER, PATIENT = "medical_center", "patient_id"


def magnification(mpp: float) -> int | float:
    """The nominal magnification of micrometers per pixel: 10 / mpp, or the objective of `POWERS` that is near.

    Magnifications appear in exports and nowhere else: 20x is 0.5 um/px, 40x is 0.25.
    """
    exact = 10 / mpp
    value = next((power for power in POWERS if abs(exact - power) <= 0.05 * power), round(exact, 2))
    return int(value) if value == int(value) else value


@dataclass(frozen=True, kw_only=True)
class ExportCohort:
    """What is the same for all slides of an export."""

    encoders: Mapping[str, EncoderFacts]
    """The encoders that are exported, by key."""
    patch_px: int
    """Side of a patch in pixels at `mpp`."""
    mpp: float
    """Micrometers per pixel of a patch."""
    crop_px: int
    """Side of a view: the center crop of the patch."""
    view: int = 0
    label: str = ""
    """The column of classes; empty where none is named."""
    columns: tuple[str, ...] = ()
    """All columns of labels that some slide has, sorted."""

    def attributes(self, item: "ExportItem", encoder: str = "") -> dict[str, Any]:
        """What files say beside their layout's own attributes: what was encoded, at which scale, by which encoder."""
        crop = f"the {self.crop_px} px center crop of the {self.patch_px} px patch"
        found: dict[str, Any] = {
            "slide_id": item.slide_id,
            "view": self.view,
            "view_px": self.crop_px,
            "view_is": crop if self.view == 0 else f"augmented view {self.view}; view 0 is {crop}",
            "patch_px": self.patch_px,
            "patch_size_level0": item.facts.patch_px_level0,
            "mpp": self.mpp,
            "written_by": f"g2l {g2l_core.__version__}",
        }
        if item.facts.mpp:
            found["slide_mpp"] = item.facts.mpp
        if encoder:
            found |= {"encoder": encoder, "encoder_digest": self.encoders[encoder].digest}
        return found


@dataclass(frozen=True, kw_only=True)
class ExportItem:
    """One slide, or one set of patch images: its readable patches, in stored order."""

    slide_id: str
    facts: SlideFacts
    coords: Int32[np.ndarray, "patch 2"]
    """Top-left corners, level-0 pixels; zeros for patch images."""
    patch_ids: Sequence[str] | None
    """File names of patch images; None for a slide."""
    patch_labels: Sequence[Mapping[str, str]]
    """Values of single patch images, by column; empty mappings for a slide."""
    features: Mapping[str, Float16[np.ndarray, "patch dim"]]
    """By encoder."""

    def __len__(self) -> int:
        return len(self.coords)

    @property
    def name(self) -> str:
        """The id without its folders."""
        return self.slide_id.rpartition("/")[2]

    @cached_property
    def names(self) -> list[str]:
        """What each patch is called: its file, or its corner as x_y."""
        return list(self.patch_ids) if self.patch_ids is not None else [f"{x}_{y}" for x, y in self.coords.tolist()]

    def value(self, column: str) -> str:
        """The value that the whole slide has in a column; empty where it has none."""
        return self.facts.labels.get(column, "")

    def values(self, column: str) -> list[str]:
        """The value that each patch has in a column: its own, else the slide's."""
        return [labels.get(column) or self.value(column) for labels in self.patch_labels]

    def groups(self) -> list[str]:
        """The patient of each patch; where none is known, the slide, or of patch images the image."""
        own = self.names if self.patch_ids is not None else [""] * len(self)
        alone = [f"{self.slide_id}#{name}" if name else self.slide_id for name in own]
        return [patient or other for patient, other in zip(self.values(PATIENT), alone, strict=True)]


@contextmanager
def whole_file(path: Path, mode: str = "wb", **options: Any):  # type: ignore[no-untyped-def]  # noqa: ANN201
    """A file that takes its place when the block ends without an error; its folder is made.

    Raises:
        StoreError: It cannot be written; a full disk and the like say what to do.
    """
    try:
        with writing(path, StoreError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, mode, **options) as file:
                yield file
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error


def write_tensor(path: Path, values: np.ndarray) -> None:
    """Write a float32 tensor as `torch.load` reads it with weights_only.

    Raises:
        StoreError: It cannot be written.
    """
    import torch

    content = BytesIO()  # torch does not say which file it could not write
    torch.save(torch.from_numpy(values.astype(np.float32)), content)
    with whole_file(path) as file:
        file.write(content.getbuffer())


class NpyWriter:
    """Appends rows to a .npy file whose number of rows is not known before; its header has room for any."""

    def __init__(self, file: IO[bytes], dtype: str) -> None:
        self._file, self._dtype, self._rows, self._dim = file, np.dtype(dtype), 0, 0
        file.write(b" " * 128)

    def append(self, values: np.ndarray) -> None:
        """Add rows (n, dim)."""
        self._rows, self._dim = self._rows + len(values), values.shape[1]
        self._file.write(np.ascontiguousarray(values, self._dtype).data)

    def close(self) -> None:
        """Write the header, as NumPy's format 1.0 has it."""
        header = f"{{'descr': {self._dtype.str!r}, 'fortran_order': False, 'shape': ({self._rows}, {self._dim})}}"
        self._file.seek(0)
        self._file.write(b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + header.ljust(117).encode() + b"\n")

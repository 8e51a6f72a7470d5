"""The readers that open slides: installed plug-ins, OME-Zarr, OME-TIFF, OpenSlide, other TIFFs, and plain images.

This is the only module that opens slides with OpenSlide. A reader of another format is a plug-in: see docs/readers.md.
"""

import errno
import os
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import openslide
from PIL import Image, UnidentifiedImageError

from g2l_core.errors import NotASlideError, ReadError, UsageError, machine_fault_text, refuse_open_files
from g2l_core.slides.images import read_plain_image, turned_notes
from g2l_core.slides.limits import require_file_or_folder, require_pixels
from g2l_core.slides.notes import Note
from g2l_core.slides.ome_zarr import is_ome_zarr, open_ome_zarr
from g2l_core.slides.tiff_slide import open_ome_tiff, open_tiff, plain_resolution

SLIDE_SUFFIXES = frozenset(".svs .tif .tiff .ndpi .mrxs .scn .bif .vms .vmu .svslide .dcm .qptiff .czi .avs".split())
"""Suffixes of the files in a folder that are taken for slides, in lower case. Plug-ins add to them."""

IMAGE_SUFFIXES = frozenset(".png .jpg .jpeg .bmp .webp".split())

PLUG_IN_GROUP = "g2l.readers"

_UNKNOWN_COMPRESSION = "Unsupported TIFF compression"
"""How OpenSlide's error begins for a TIFF whose tiles it cannot decode."""


@runtime_checkable
class SlideHandle(Protocol):
    """An open slide, with the names of OpenSlide's Python class. Several threads read it at a time."""

    @property
    def dimensions(self) -> tuple[int, int]:
        """Width and height of level 0."""

    @property
    def level_dimensions(self) -> Sequence[tuple[int, int]]:
        """Width and height of each level, the finest first."""

    @property
    def level_downsamples(self) -> Sequence[float]:
        """Level-0 pixels per pixel of each level."""

    @property
    def properties(self) -> Mapping[str, str]:
        """The header: `openslide.mpp-x` and `-y`, `openslide.objective-power` and others, if they are known."""

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        """RGBA pixels of a level, transparent outside of the slide.

        Args:
            location: Left and top in level-0 pixels.
            level: Number of the level; 0 is the finest.
            size: Width and height in pixels of that level.

        Raises:
            OSError: The pixels cannot be read.
            ValueError: The pixels cannot be decoded.
        """

    def close(self) -> None:
        """Free the file."""


@runtime_checkable
class SlideReader(Protocol):
    """A plug-in. Files in a folder whose suffix is in its attribute `suffixes`, if it has one, are taken for slides."""

    def __call__(self, path: Path) -> SlideHandle | None:
        """Open a slide. None if this reader does not know its format.

        Raises:
            NotASlideError: This reader knows its format, but cannot open it.
        """


@cache
def installed_readers() -> tuple[tuple[str, SlideReader], ...]:
    """The names of the plug-ins and the plug-ins, sorted by name.

    Raises:
        UsageError: A plug-in cannot be imported.
    """
    readers = []
    for entry in sorted(entry_points(group=PLUG_IN_GROUP), key=lambda entry: entry.name):
        try:
            readers.append((entry.name, entry.load()))
        except (ImportError, AttributeError) as error:
            raise UsageError(
                f"the slide reader {entry.name!r} ({entry.value}) cannot be imported: {error}. Mend or uninstall it"
            ) from error
    return tuple(readers)


@cache
def slide_suffixes() -> frozenset[str]:
    """`SLIDE_SUFFIXES` and those of the plug-ins, in lower case.

    Raises:
        UsageError: A plug-in cannot be imported.
    """
    declared = (suffix.lower() for _, reader in installed_readers() for suffix in getattr(reader, "suffixes", ()))
    return SLIDE_SUFFIXES.union(declared)


def open_handle(path: Path) -> SlideHandle:
    """Open a slide with the first reader that knows it.

    Raises:
        NotASlideError: No reader knows it, the file is broken or no file, or its tiles are too large to be decoded.
        UsageError: A plug-in cannot be imported.
    """
    try:
        require_file_or_folder(path)
    except ReadError as error:
        raise NotASlideError(str(error)) from error
    if (handle := _plugged_in(path) or open_ome_tiff(path)) is not None:
        return handle
    if is_ome_zarr(path):
        return open_ome_zarr(path)
    try:
        slide = openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError:
        if openslide.OpenSlide.detect_format(path):  # which it does not where it could open no file
            raise NotASlideError(machine_fault_text(OSError(errno.EMFILE, os.strerror(errno.EMFILE)), path)) from None
        return open_tiff(path) or _open_image(path)
    except openslide.OpenSlideError as error:
        refuse_open_files(error, path, NotASlideError)
        if str(error).startswith(_UNKNOWN_COMPRESSION) and (tiff := open_tiff(path)) is not None:
            return tiff
        reason = " ".join(str(error).split())
        raise NotASlideError(f"OpenSlide cannot open it ({reason}); is the file complete?") from error
    try:
        _require_decodable(slide)
    except ReadError as error:
        slide.close()
        raise NotASlideError(str(error)) from error
    return slide


def _plugged_in(path: Path) -> SlideHandle | None:
    """The slide as the first plug-in that knows it opens it.

    Raises:
        NotASlideError: A plug-in knows its format, but cannot open it.
    """
    for name, reader in installed_readers():
        try:
            handle = reader(path)
        except (OSError, ValueError) as error:
            raise NotASlideError(f"the reader {name!r} cannot open it: {error}") from error
        if handle is not None:
            return handle
    return None


def _require_decodable(slide: openslide.OpenSlide) -> None:
    """Refuse tiles that are too large: OpenSlide ends the whole process where it finds no memory for one."""
    for level in range(slide.level_count):
        width, height = (slide.properties.get(f"openslide.level[{level}].tile-{side}") for side in ("width", "height"))
        if width and height:
            require_pixels(int(width), int(height), f"a tile of its level {level}")


def dicom_series(path: Path) -> str:
    """The series that a file of a DICOM slide belongs to. Empty if OpenSlide does not open the file.

    The levels of a slide are the files of one series in one folder. OpenSlide opens all of them by any of them.
    """
    try:
        require_file_or_folder(path)
        with openslide.OpenSlide(path) as slide:
            return str(slide.properties.get("dicom.SeriesInstanceUID", ""))
    except (openslide.OpenSlideError, ReadError) as error:
        refuse_open_files(error, path, ReadError)
        return ""


class PlainImage(openslide.ImageSlide):
    """A plain image as a slide, with notes about it and the resolution that a TIFF gives."""

    notes: tuple[Note, ...] = ()
    properties: Mapping[str, str] = MappingProxyType({})


def _open_image(path: Path) -> SlideHandle:
    try:
        image, orientation = read_plain_image(path)
    except UnidentifiedImageError as error:
        raise NotASlideError(
            "it is neither a slide that OpenSlide reads (SVS, NDPI, MRXS, SCN, BIF, tiled TIFF, DICOM) "
            "nor OME-TIFF or OME-Zarr, nor an image that Pillow reads"
        ) from error
    except OSError as error:
        refuse_open_files(error, path, NotASlideError)
        raise NotASlideError(f"it cannot be read: {error.strerror or error}") from error
    except ReadError as error:
        raise NotASlideError(str(error)) from error
    except (ValueError, SyntaxError) as error:
        raise NotASlideError(f"Pillow cannot decode it ({error}); is the file complete?") from error
    slide = PlainImage(image)
    slide.notes, slide.properties = turned_notes(orientation), plain_resolution(path)
    return slide

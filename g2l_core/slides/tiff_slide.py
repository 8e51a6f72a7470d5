"""TIFF slides that OpenSlide does not read: OME-TIFF, images in strips, and compressions that it does not know.

An OME-TIFF has its lower levels in SubIFDs and its scale in XML; OpenSlide would read level 0 alone, without a scale.
Of its images, the largest one that is 8-bit RGB is the slide. All pixels come from `tiff_tiles`.
"""

from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image, ImageCms

from g2l_core.errors import NotASlideError, ReadError, refuse_open_files
from g2l_core.slides.icc import TIFF_TAG
from g2l_core.slides.images import UPRIGHT
from g2l_core.slides.limits import require_pixels
from g2l_core.slides.notes import Note
from g2l_core.slides.ome_xml import OmeImage, is_ome_xml, read_ome_xml
from g2l_core.slides.tiff_codecs import is_rgb
from g2l_core.slides.tiff_tiles import UNREADABLE, TilePyramid, pyramid_of

VENDOR, OME_VENDOR = "tiff", "ome-tiff"

RESOLUTION_UNITS: Mapping[int, str] = {1: "none", 2: "inch", 3: "centimeter"}

REDUCED = 1
"""The bit of the tag NewSubfileType for an image that is a smaller version of another."""


class TiffSlide:
    """An open TIFF with the interface of OpenSlide. Safe to read from several threads.

    Attributes:
        tiles: Where the pixels come from.
        level_dimensions: Width and height of every level.
        level_downsamples: Level-0 pixels per pixel of each level, the mean of x and y.
        properties: openslide.vendor, and the scale by the OME-XML or the resolution tags.
        notes: What of the file is not read.
    """

    def __init__(
        self,
        tiles: TilePyramid,
        level_dimensions: Sequence[tuple[int, int]],
        properties: Mapping[str, str],
        notes: tuple[Note, ...] = (),
        profile: bytes = b"",
    ) -> None:
        self.tiles = tiles
        self.level_dimensions = tuple(level_dimensions)
        self.dimensions = width, height = self.level_dimensions[0]
        self.level_downsamples = tuple((width / w + height / h) / 2 for w, h in self.level_dimensions)
        self.properties = dict(properties)
        self.notes = notes
        self._profile = profile

    @property
    def color_profile(self) -> ImageCms.ImageCmsProfile | None:
        """The ICC profile of level 0; None if it has none.

        Raises:
            PyCMSError: It is damaged.
        """
        return ImageCms.getOpenProfile(BytesIO(self._profile)) if self._profile else None

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        """RGBA pixels of a level, transparent where the file has none; `location` in level-0 pixels.

        Raises:
            ValueError: A tile is damaged.
        """
        left, top = (round(at / self.level_downsamples[level]) for at in location)
        columns, rows = self.level_dimensions[level]
        right, bottom = min(left + size[0], columns), min(top + size[1], rows)
        region = np.zeros((size[1], size[0], 4), np.uint8)
        for x, y, width, height in self.tiles.present(level, max(left, 0), max(top, 0), right, bottom):
            pixels = self.tiles.read(level, x, y, width, height)
            if pixels is None:
                raise ValueError(f"a tile of level {level} is damaged")
            inside = region[y - top : y - top + height, x - left : x - left + width]
            inside[..., :3], inside[..., 3] = pixels, 255
        return Image.fromarray(region, "RGBA")

    def close(self) -> None:
        """Free the file."""
        self.tiles.close()


def open_ome_tiff(path: Path) -> TiffSlide | None:
    """Open an OME-TIFF; None for any other file.

    Raises:
        NotASlideError: Its XML is broken, it has no 8-bit RGB in this file, or its pixels cannot be decoded.
    """
    try:
        with tifffile.TiffFile(path) as tiff:
            first = tiff.pages.first
            if not is_ome_xml(first.description):
                return None
            images = read_ome_xml(first.description, path.name)
            if not images:  # the XML is in a companion file
                return _slide(path, tiff, first, {"openslide.vendor": OME_VENDOR, **resolution_properties(first)})
            page, image = _largest_rgb(tiff, images)
            scale = image.properties or resolution_properties(page)
            return _slide(path, tiff, page, {"openslide.vendor": OME_VENDOR, **scale}, _notes(images, image))
    except UNREADABLE as error:
        refuse_open_files(error, path, NotASlideError)
        return None  # whoever reads it next says what is wrong


def open_tiff(path: Path) -> TiffSlide | None:
    """Open a TIFF of 8-bit RGB in tiles or strips; None for any other file, and for one that EXIF turns.

    The first tiled page is level 0, else the first page. Lower levels are those in its SubIFDs, and the pages behind it
    that say they are smaller versions.

    Raises:
        NotASlideError: Its pixels cannot be decoded.
    """
    try:
        with tifffile.TiffFile(path) as tiff:
            pages = [page.aspage() for page in tiff.pages]
            page = next((page for page in pages if page.is_tiled), pages[0])
            if not is_rgb(page) or int(page.tags.valueof(274, UPRIGHT)) != UPRIGHT:
                return None
            properties = {"openslide.vendor": VENDOR, **resolution_properties(page)}
            behind = pages[pages.index(page) + 1 :]
            return _slide(path, tiff, page, properties, lower=(p for p in behind if p.subfiletype & REDUCED))
    except UNREADABLE as error:
        refuse_open_files(error, path, NotASlideError)
        return None


def resolution_properties(page: Any) -> dict[str, str]:
    """The resolution tags of a page, under OpenSlide's names; empty if it has none."""
    found: dict[str, str] = {}
    for name in ("XResolution", "YResolution"):
        numerator, denominator = page.tags.valueof(name, (0, 1))
        if numerator and denominator:
            found[f"tiff.{name}"] = f"{numerator / denominator:.12g}"
    unit = page.tags.valueof("ResolutionUnit", 2)
    return {**found, "tiff.ResolutionUnit": RESOLUTION_UNITS.get(int(unit), "none")} if len(found) == 2 else {}


def plain_resolution(path: Path) -> dict[str, str]:
    """The resolution tags of a file's first page; empty if it is no TIFF."""
    try:
        with tifffile.TiffFile(path) as tiff:
            return resolution_properties(tiff.pages.first)
    except UNREADABLE as error:
        refuse_open_files(error, path, NotASlideError)
        return {}


def _slide(
    path: Path,
    tiff: tifffile.TiffFile,
    page: Any,
    properties: Mapping[str, str],
    notes: tuple[Note, ...] = (),
    lower: Iterable[Any] = (),
) -> TiffSlide:
    below = [*(sub.aspage() for sub in page.pages or ()), *lower]
    smaller = [sub for sub in below if is_rgb(sub) and sub.imagewidth < page.imagewidth]
    levels = [page, *sorted(smaller, key=lambda sub: -sub.imagewidth)]
    for level in levels:
        _require_decodable(level)
    sizes = [(level.imagewidth, level.imagelength) for level in levels]
    profile = page.tags.valueof(TIFF_TAG, b"")
    return TiffSlide(pyramid_of(path, tiff, levels), sizes, properties, notes, bytes(profile))


def _require_decodable(page: Any) -> None:
    what = f"level of {page.imagewidth:,} x {page.imagelength:,} px"
    try:
        if page.is_tiled:
            require_pixels(page.tilewidth, page.tilelength, f"a tile of its {what}")
        else:
            require_pixels(page.imagewidth, page.imagelength, "it")
    except ReadError as error:
        strips = (
            "" if page.is_tiled else ", or convert it to a tiled TIFF: its pixels lie in strips, which are all held"
        )
        raise NotASlideError(f"{error}{strips}") from error


# -- the images of an OME-TIFF ----------------------------------------------------------------------------


def _largest_rgb(tiff: tifffile.TiffFile, images: Sequence[OmeImage]) -> tuple[Any, OmeImage]:
    """The page and the description of the largest image that is 8-bit RGB in this file.

    Raises:
        NotASlideError: There is none.
    """
    by_size = sorted(images, key=lambda image: -image.size[0] * image.size[1])
    for image in by_size:
        page = _page(tiff, image)
        if page is not None and is_rgb(page):
            return page, image
    raise NotASlideError(_no_rgb(tiff, by_size[0]))


def _page(tiff: tifffile.TiffFile, image: OmeImage) -> Any:
    """The page of an image's first plane; None if it is in another file.

    Raises:
        NotASlideError: There is no such page, or it has another size.
    """
    if image.file:
        return None
    if not 0 <= image.page < len(tiff.pages):
        raise NotASlideError(
            f"its OME-XML has {image.name!r} on page {image.page} of {len(tiff.pages)}; is it complete?"
        )
    page = tiff.pages[image.page].aspage()
    if (page.imagewidth, page.imagelength) != image.size:
        raise NotASlideError(
            f"its OME-XML gives {image.name!r} {image.size[0]} x {image.size[1]} px, but its page has "
            f"{page.imagewidth} x {page.imagelength}; convert it again"
        )
    return page


def _no_rgb(tiff: tifffile.TiffFile, image: OmeImage) -> str:
    """Why the largest image is no slide."""
    page = _page(tiff, image)
    if page is None:
        return f"the pixels of {image.name!r} are in another file, {image.file}: give that one"
    if page.samplesperpixel == 1 and image.channels > 1:
        return (
            f"it is a fluorescence image: {image.name!r} has {image.channels} separate channels of {image.kind}. "
            "Expected 8-bit RGB of a stained slide"
        )
    return (
        f"{image.name!r} has {page.samplesperpixel} samples of {page.bitspersample} bits a pixel. Expected 8-bit RGB: "
        "convert it"
    )


def _notes(images: Sequence[OmeImage], chosen: OmeImage) -> tuple[Note, ...]:
    others = [image for image in images if image is not chosen]
    kinds = {
        "the largest RGB image is the slide, and others of the file are not read": [i for i in others if not i.file],
        "a part of a multi-file OME-TIFF: images in other files are not read": [i for i in others if i.file],
    }
    return tuple(Note(text=text, detail=", ".join(i.name for i in found)) for text, found in kinds.items() if found)

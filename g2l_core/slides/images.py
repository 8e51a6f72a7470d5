"""Plain images: one rule for a slide and for a patch that is one.

Samples of more than 8 bits are refused, because nothing in such a file says how many of the bits are used. The
orientation of EXIF is applied. Transparent pixels lie over white.
"""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps

from g2l_core.errors import ReadError, refuse_open_files
from g2l_core.slides.limits import opened_image
from g2l_core.slides.notes import Note

ORIENTATION = 0x112
UPRIGHT = 1
TURNED = "turned upright as EXIF says"
"""The note about an image that was turned."""

TILE_WIDTH = 322


TIFF_SUFFIXES = frozenset({".tif", ".tiff"})

PATCH_PX = 1024
"""Maximum side of TIFF files that are taken for patch images."""

FIELD_PX = 4096
"""Maximum side of what is rather a field of view than a slide."""


def are_patch_images(paths: Sequence[Path]) -> bool:
    """Whether files are TIFF images without tiles and lower levels, square, of one size and at most `PATCH_PX`."""
    sizes = set[tuple[int, int] | None]()
    for path in paths:
        size = _plain_tiff_size(path)
        sizes.add(size)
        if size is None or len(sizes) > 1 or not size[0] == size[1] <= PATCH_PX:
            return False
    return len(paths) > 1


def is_small_tiff(path: Path) -> bool:
    """Whether a file is a TIFF image without tiles and lower levels, of at most `FIELD_PX`."""
    size = _plain_tiff_size(path)
    return size is not None and max(size) <= FIELD_PX


def _plain_tiff_size(path: Path) -> tuple[int, int] | None:
    """The size of a TIFF image without tiles and lower levels; None for any other file."""
    if path.suffix.lower() not in TIFF_SUFFIXES or not path.is_file():
        return None
    try:
        with opened_image(path) as image:
            is_plain = TILE_WIDTH not in getattr(image, "tag_v2", {}) and getattr(image, "n_frames", 1) == 1
            return image.size if is_plain else None
    except (OSError, ValueError, SyntaxError, ReadError) as error:
        refuse_open_files(error, path, ReadError)
        return None


def read_plain_image(source: Path | BytesIO) -> tuple[Image.Image, int]:
    """An image, decoded and upright, as RGB or RGBA; and the orientation that EXIF gives it, `UPRIGHT` if none.

    It is decoded at once: Pillow's lazy decoding mixes up pixels when two threads begin it.

    Raises:
        ReadError: Its samples have more than 8 bits, or it has too many pixels.
        OSError: It cannot be read, or is no image.
        ValueError, SyntaxError: It cannot be decoded.
    """
    with opened_image(source) as image:
        require_8_bits(image)
        orientation = orientation_of(image)
        image.load()
        upright = ImageOps.exif_transpose(image)
    return upright.convert("RGBA" if upright.has_transparency_data else "RGB"), orientation


def orientation_of(image: Image.Image) -> int:
    """The orientation that EXIF, or the tag of a TIFF, gives an image."""
    return int(image.getexif().get(ORIENTATION, UPRIGHT))


def turned_notes(orientation: int) -> tuple[Note, ...]:
    """The note about an image that is turned."""
    if orientation == UPRIGHT:
        return ()
    return (Note(text=TURNED, detail=f"orientation {orientation}"),)


def require_8_bits(image: Image.Image) -> None:
    """Refuse an image that is opened, but not yet loaded, if a sample of it has more than 8 bits.

    Raises:
        ReadError: It has.
    """
    raw_modes = [args if isinstance(args, str) else args[0] for *_, args in getattr(image, "tile", ()) if args]
    if image.mode[0] in "IF" or (image.format != "BMP" and any(";16" in str(raw) for raw in raw_modes)):
        raise ReadError(
            f"its samples have more than 8 bits (Pillow's mode {image.mode}), and how many of them are used is not "
            "known: convert it to 8-bit RGB"
        )


def over_white(image: Image.Image) -> Image.Image:
    """An image as RGB, with white behind what is transparent."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image)
    return canvas.convert("RGB")

"""Which color space a tile is coded in, by its own markers, and whether the slide's header contradicts it.

OpenSlide converts a tile as the header of the slide says. Some writers put another color space into the tiles, and
then every pixel comes out wrong without any error.
"""

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

from g2l_core.errors import NotASlideError, refuse_open_files

RGB, YCBCR = "RGB", "YCBCR"

_ADOBE_TRANSFORMS = {0: RGB, 1: YCBCR}
_COD = 0xFF52
_CODESTREAM = b"\xff\x4f\xff\x51"
_PIXEL_DATA = b"\xe0\x7f\x10\x00O"
"""How the element of the pixels begins in a DICOM file: its tag, and the first letter of OB or OW."""

_DICOM_SPACES: Mapping[str, str] = {"RGB": RGB, "YBR_FULL_422": YCBCR, "YBR_ICT": YCBCR, "YBR_RCT": YCBCR}


def jpeg_space(tile: bytes) -> str | None:
    """The color space of a JPEG of three components by libjpeg's rules; None where nothing in it decides.

    JFIF means YCbCr, then Adobe's marker decides, then components that are named R, G, B, and last a chroma that has
    fewer samples. Components 1, 2, 3 decide nothing, since writers of TIFF give them to RGB as well.
    """
    adobe = None
    for marker, body in _segments(tile):
        if marker == 0xFFE0 and body.startswith(b"JFIF\0"):
            return YCBCR
        if marker == 0xFFEE and body.startswith(b"Adobe") and len(body) >= 12:
            adobe = _ADOBE_TRANSFORMS.get(body[11])
        if 0xFFC0 <= marker <= 0xFFC2 and len(body) >= 15 and body[5] == 3:
            names, samples = body[6:15:3], body[7:15:3]
            return adobe or (RGB if names == b"RGB" else None) or (YCBCR if samples[0] > samples[1] else None)
    return adobe


def jpeg2000_is_transformed(codestream: bytes) -> bool | None:
    """Whether the codestream itself turns color differences into RGB; None if it does not say so."""
    start = codestream.find(_CODESTREAM)
    for marker, body in _segments(codestream[max(start, 0) :]):
        if marker == _COD and len(body) >= 5:
            return body[4] == 1
    return None


def require_dicom_space(path: Path, photometric: str) -> None:
    """Refuse a DICOM file whose first frame is coded in another color space than the header says.

    Args:
        path: The file.
        photometric: Its photometric interpretation.

    Raises:
        NotASlideError: The two differ, or a transform that the header names is not in the frame.
    """
    frame, expected = _first_frame(path), _DICOM_SPACES.get(photometric)
    if frame.startswith(_CODESTREAM):
        if expected == YCBCR and jpeg2000_is_transformed(frame) is False:
            raise NotASlideError(
                f"its header says {photometric}, but the JPEG 2000 codestream has no component transform, so its "
                "colors are not known: correct PhotometricInterpretation, or convert the slide again"
            )
    elif expected and (found := jpeg_space(frame)) not in {None, expected}:
        raise NotASlideError(
            f"its header says {photometric}, but its JPEG frames are {found} by their own markers: "
            "correct PhotometricInterpretation, or convert the slide again"
        )


def _first_frame(path: Path) -> bytes:
    """The beginning of the first compressed frame; empty if there is none."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            pixels = content.rfind(_PIXEL_DATA, 0, 1 << 24)
            starts = [content.find(code, pixels, pixels + (1 << 20)) for code in (_CODESTREAM, b"\xff\xd8\xff")]
            found = [start for start in starts if pixels >= 0 and start >= 0]
            return content[min(found) : min(found) + (1 << 16)] if found else b""
    except (OSError, ValueError) as error:
        refuse_open_files(error, path, NotASlideError)
        return b""  # whoever reads the pixels says why


def _segments(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Markers of a JPEG or a JPEG 2000 codestream with their bodies, up to the coded pixels."""
    at = 2
    while at + 4 <= len(content):
        marker, length = int.from_bytes(content[at : at + 2]), int.from_bytes(content[at + 2 : at + 4])
        if marker < 0xFF01 or length < 2:
            return
        yield marker, content[at + 4 : at + 2 + length]
        if marker in {0xFFDA, 0xFF90}:
            return
        at += 2 + length

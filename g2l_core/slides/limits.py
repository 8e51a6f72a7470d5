"""What may be decoded: limits that a file's header is held against, so that a small file cannot fill the memory.

Each limit can be raised with an environment variable, which the error names.
"""

import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from PIL import Image

from g2l_core.errors import ReadError, UsageError

PIXELS = "G2L_MAX_IMAGE_PIXELS"
JSON_BYTES = "G2L_MAX_JSON_BYTES"

DEFAULTS = {PIXELS: 1 << 28, JSON_BYTES: 1 << 28}
"""16,384 squared pixels of one image, tile, chunk or thumbnail, and 256 MiB of JSON."""

_KINDS = {stat.S_ISFIFO: "named pipe", stat.S_ISSOCK: "socket", stat.S_ISCHR: "device", stat.S_ISBLK: "device"}


def limit(variable: str) -> int:
    """The limit that an environment variable sets, or its default.

    Raises:
        UsageError: The variable is not a whole number above 0.
    """
    text = os.environ.get(variable, "")
    if text and (not text.isdecimal() or not int(text)):
        raise UsageError(f"{variable}={text}: expected a whole number above 0")
    return int(text or DEFAULTS[variable])


def require_pixels(width: int, height: int, what: str) -> None:
    """Refuse an image that is too large to be decoded at once.

    Raises:
        ReadError: It has no pixels, or more than the limit.
    """
    if width < 1 or height < 1:
        raise ReadError(f"{what} has {width:,} x {height:,} px by its header; is the file damaged?")
    if width * height > limit(PIXELS):
        raise ReadError(
            f"{what} has {width:,} x {height:,} px by its header, more than {limit(PIXELS):,} px at once are not "
            f"decoded. If the file is sound, set {PIXELS} to more"
        )


def require_bytes(path: Path, variable: str = JSON_BYTES) -> None:
    """Refuse a file that is too large to be parsed.

    Raises:
        ReadError: It is larger than the limit.
        OSError: It cannot be looked at.
    """
    size = path.stat().st_size
    if size > limit(variable):
        raise ReadError(
            f"{path} has {size:,} bytes, more than {limit(variable):,} are not read. "
            f"If it is sound, set {variable} to more"
        )


def require_file_or_folder(path: Path) -> None:
    """Refuse a pipe, a socket or a device, on which a program could wait for ever. Nothing happens if there is nothing.

    Raises:
        ReadError: It is one of them.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # whoever opens it says why
    for is_kind, name in _KINDS.items():
        if is_kind(mode):
            raise ReadError(f"{path} is a {name}; expected a file or a folder")


@contextmanager
def opened_image(source: Path | BytesIO) -> Iterator[Image.Image]:
    """An image whose header Pillow has read, if it may be decoded.

    Raises:
        ReadError: It has no pixels, or more than the limit.
        OSError: It cannot be read, or is no image.
    """
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, limit(PIXELS))  # Pillow's own limit is half of ours
    try:
        with Image.open(source) as image:
            require_pixels(*image.size, "it")
            yield image
    except Image.DecompressionBombError as error:
        raise ReadError(f"{error} If the file is sound, set {PIXELS} to more") from error


# -- compressed chunks ------------------------------------------------------------------------------------

_ZSTD, _GZIP, _ZLIB = b"\x28\xb5\x2f\xfd", b"\x1f\x8b", b"\x78"
_DEFLATE_RATIO = 1032
"""Deflate makes at most so many bytes of one."""


def require_unpacked(content: bytes, what: str) -> None:
    """Refuse a compressed chunk that unpacks to more bytes than an image within the limit has.

    Zstandard and Blosc declare the size in their headers (RFC 8878, 3.1.1.1; nbytes of the Blosc header). Deflate
    declares none, so a stream that is long enough to be too large is unpacked piece by piece and counted.

    Raises:
        ReadError: It unpacks to more.
    """
    most = 3 * limit(PIXELS)
    size = _declared_size(content)
    if size is None and (content[:2] == _GZIP or content[:1] == _ZLIB):
        size = _inflated_size(content, most)
    if size is not None and size > most:
        raise ReadError(
            f"{what} unpacks to more than {most:,} bytes, which are not decoded at once. If the file is sound, set "
            f"{PIXELS} to more"
        )


def _declared_size(content: bytes) -> int | None:
    """The bytes that a chunk of Zstandard or Blosc says that it unpacks to; None where it says nothing."""
    if content[:4] == _ZSTD and len(content) > 5:
        descriptor = content[4]
        is_single = bool(descriptor & 0x20)
        dictionary = (0, 1, 2, 4)[descriptor & 3]
        width = (1 if is_single else 0, 2, 4, 8)[descriptor >> 6]
        start = 5 + (0 if is_single else 1) + dictionary
        size = int.from_bytes(content[start : start + width], "little")
        return size + 256 if width == 2 else size if width else None
    if len(content) >= 16 and content[0] == 2 and int.from_bytes(content[12:16], "little") == len(content):
        return int.from_bytes(content[4:8], "little")
    return None


def _inflated_size(content: bytes, most: int) -> int | None:
    """The bytes of a deflate stream, counted no further than `most` is passed; None where it is no such stream."""
    if len(content) * _DEFLATE_RATIO <= most:
        return None
    stream, total, rest = zlib.decompressobj(wbits=47), 0, content  # 47: a header of gzip or of zlib
    try:
        while rest and not stream.eof and total <= most:
            total += len(stream.decompress(rest, 1 << 24))
            rest = stream.unconsumed_tail
    except zlib.error:
        return None  # its reader says what is wrong
    return total

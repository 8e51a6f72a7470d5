"""Slides in OME-Zarr: multiscales of version 0.4 (Zarr 2) and 0.5 (Zarr 3), RGB, 8 bits.

The format: https://ngff.openmicroscopy.org/0.4 and /0.5. The layout of bioformats2raw, which puts the slide beside its
label into numbered groups, is followed to group 0.

To Zarr, a chunk that is not stored has the fill value. Here its pixels are absent, as those of a tile that a TIFF file
does not have. Each level is opened twice, with fill values that differ: a pixel is absent where the two give different
values. So all layouts are told alike, also shards that have some of their chunks.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from math import ceil, prod
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from g2l_core.errors import NotASlideError, ReadError
from g2l_core.files import parse_json
from g2l_core.slides.limits import require_bytes, require_file_or_folder, require_pixels, require_unpacked

SUFFIX = ".zarr"
METADATA_NAMES = frozenset({"zarr.json", ".zattrs", ".zgroup", ".zarray", ".zmetadata"})

UM_PER_UNIT = {"nanometer": 1e-3, "micrometer": 1.0, "millimeter": 1e3}
"""The units in which a scale is understood. With any other unit, or without one, um/px is unknown."""

FILLS = (1, 2)
"""The fill values that the two arrays of a level are opened with; few pixels of a slide have the first by chance."""

LOOKED_AT = 16
"""Maximum number of columns, and of rows, of a level's chunks that are looked for to tell how many are absent."""

_MALFORMED = (KeyError, TypeError, IndexError, ValueError, AttributeError)
"""What reading metadata raises if the JSON has not the shape of the format."""


class OmeZarr:
    """An open OME-Zarr slide with the interface of OpenSlide.

    Attributes:
        dimensions: Width and height of level 0.
        level_dimensions: Width and height of every level.
        level_downsamples: Level-0 pixels per pixel of each level, the mean of x and y.
        declared_downsamples: The same by the scales in the metadata; None where they do not say.
        absent_shares: The fraction of each level's chunks (where there are shards, of its shards) that are not stored,
            among those that were looked for.
        properties: openslide.vendor, and openslide.mpp-x and -y if the axes have a length unit.
    """

    def __init__(
        self,
        levels: Sequence[Any],
        axes: Sequence[str],
        properties: Mapping[str, str],
        declared: Sequence[float | None] = (),
    ) -> None:
        self._levels = [{fill: _with_fill(array, fill) for fill in FILLS} for array in levels]
        self._axes = axes
        x, y = axes.index("x"), axes.index("y")
        self.level_dimensions = tuple((int(array.shape[x]), int(array.shape[y])) for array in levels)
        self.dimensions = self.level_dimensions[0]
        width, height = self.dimensions
        self.level_downsamples = tuple((width / w + height / h) / 2 for w, h in self.level_dimensions)
        self.declared_downsamples = list(declared)
        self.properties = dict(properties)
        self.absent_shares = {level: _absent_share(array, axes) for level, array in enumerate(levels)}

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        """RGBA pixels of a level, transparent outside of it and where a chunk is not stored.

        `location` is in level-0 pixels, `size` in the level's.

        Raises:
            ValueError: A chunk cannot be decoded.
            OSError: A chunk cannot be read.
        """
        downsample = self.level_downsamples[level]
        left, top = (round(place / downsample) for place in location)
        columns, rows = self.level_dimensions[level]
        x = slice(max(left, 0), max(min(left + size[0], columns), 0))
        y = slice(max(top, 0), max(min(top + size[1], rows), 0))
        region = np.zeros((size[1], size[0], 4), np.uint8)
        if x.start < x.stop and y.start < y.stop:
            inside = region[y.start - top : y.stop - top, x.start - left : x.stop - left]
            inside[..., :3] = pixels = self._pixels(level, x, y, FILLS[0])
            inside[..., 3] = 255
            if self._may_be_absent(level, x, y, pixels):
                absent = pixels != self._pixels(level, x, y, FILLS[1])
                inside[absent.any(axis=2)] = 0
        return Image.fromarray(region, "RGBA")

    def close(self) -> None:
        """Does nothing, since no file is kept open."""

    def _pixels(self, level: int, x: slice, y: slice, fill: int) -> np.ndarray:
        """uint8 (height, width, 3) of t and z 0, with one of `FILLS` where no chunk is stored."""
        index = {"x": x, "y": y, "c": slice(None)}
        kept = [axis for axis in self._axes if axis in index]
        try:
            pixels = self._levels[level][fill][tuple(index.get(axis, 0) for axis in self._axes)]
        except (RuntimeError, EOFError, zlib.error) as error:  # as numcodecs' decoders have it
            raise ValueError(f"a chunk of level {level} does not decode: {error}") from error
        return np.asarray(pixels).transpose([kept.index(axis) for axis in "yxc"])

    def _may_be_absent(self, level: int, x: slice, y: slice, pixels: np.ndarray) -> bool:
        """Whether the first pixel of some chunk's part in a region has the fill value."""
        sides = dict(zip(self._axes, self._levels[level][FILLS[0]].chunks, strict=True))
        firsts = (
            [0, *range(sides[axis] - at.start % sides[axis], at.stop - at.start, sides[axis])]
            for axis, at in (("y", y), ("x", x), ("c", slice(0, 3)))
        )
        return bool((pixels[np.ix_(*firsts)] == FILLS[0]).any())


def _with_fill(array: Any, fill: int) -> Any:
    """The array with another fill value, which chunks read as that are not stored."""
    import zarr

    metadata = replace(array.metadata, fill_value=np.uint8(fill))
    return zarr.Array(zarr.AsyncArray(metadata=metadata, store_path=array.store_path, config=array.config))


def _absent_share(array: Any, axes: Sequence[str]) -> float:
    """The fraction of places in x and y for which a channel's chunk, or shard, is no file of the array."""
    grid = dict(zip(axes, map(ceil, np.divide(array.shape, array.shards or array.chunks)), strict=True))
    x, y = (np.unique(np.linspace(0, grid[axis] - 1, LOOKED_AT).astype(int)).tolist() for axis in "xy")
    folder = Path(array.store.root, array.path)

    def is_stored(**place: int) -> bool:
        key = array.metadata.encode_chunk_key(tuple(place.get(axis, 0) for axis in axes))
        return (folder / key).exists()

    stored = [all(is_stored(x=column, y=row, c=c) for c in range(grid["c"])) for column in x for row in y]
    return 1 - sum(stored) / len(stored)


def is_ome_zarr(path: Path) -> bool:
    """Whether a path is a folder named .zarr that holds an OME-Zarr image, also a broken one."""
    if path.suffix.lower() != SUFFIX or not path.is_dir():
        return False
    try:
        return _find_image(path) is not None
    except NotASlideError:
        return True  # opening it raises the error


def open_ome_zarr(path: Path) -> OmeZarr:
    """Open the OME-Zarr image of a folder.

    Raises:
        NotASlideError: Its metadata or arrays are broken, or it is not 8-bit RGB.
    """
    import zarr

    located = _find_image(path)
    if located is None:
        raise NotASlideError("it has no multiscales of OME-Zarr 0.4 or 0.5")
    group, image = located
    try:
        axes = [axis["name"] for axis in image["axes"]]
        names = [dataset["path"] for dataset in image["datasets"]]
        properties = {"openslide.vendor": "ome-zarr", **_mpp_properties(image)}
        declared = _declared_downsamples(image, axes.index("x"))
    except _MALFORMED as error:
        raise NotASlideError(f"its multiscales are not those of OME-Zarr 0.4 or 0.5: {error!r}") from error
    try:
        inside = group.relative_to(path)
        store = _folder_store()(path.resolve(), read_only=True)
        levels = [zarr.open_array(store, path=(inside / _relative(name)).as_posix(), mode="r") for name in names]
    except (OSError, RecursionError, *_MALFORMED) as error:
        raise NotASlideError(f"its levels {', '.join(map(str, names))} cannot be opened: {error}") from error
    _require_rgb(levels, axes)
    for array in levels:
        try:
            require_pixels(prod(array.chunks) // 3, 1, f"a chunk of its level {array.path}")
        except ReadError as error:
            raise NotASlideError(str(error)) from error
    return OmeZarr(levels, axes, properties, declared)


def _relative(name: str) -> PurePosixPath:
    """The path of a level below the group of the image.

    Raises:
        ValueError: It leads out of it.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"the path {name!r} leads out of the slide's folder")
    return path


def _require_inside(root: Path, key: str) -> None:
    """Refuse a file of the slide that is a link out of its folder, no plain file, or too large to be read.

    Raises:
        ValueError: It is one of these.
    """
    path = root / key
    if not path.resolve().is_relative_to(root):
        raise ValueError(f"{path} is a link out of the slide's folder")
    try:
        require_file_or_folder(path)
        if path.exists():
            require_bytes(path)
    except ReadError as error:
        raise ValueError(str(error)) from error


def _bounded(buffer: Any, key: str) -> Any:
    """A chunk as it was read, if it may be unpacked.

    Raises:
        ValueError: It unpacks to more than the limit.
    """
    if buffer is not None and PurePosixPath(key).name not in METADATA_NAMES:
        try:
            require_unpacked(buffer.to_bytes(), f"the chunk {key}")
        except ReadError as error:
            raise ValueError(str(error)) from error
    return buffer


@cache
def _folder_store() -> type:
    """The class of stores that read a slide's folder, and nothing outside of it."""
    from zarr.storage import LocalStore

    class FolderStore(LocalStore):
        """A folder whose links may not lead out of it."""

        async def get(self, key: str, *arguments: Any, **options: Any) -> Any:
            _require_inside(self.root, key)
            return _bounded(await super().get(key, *arguments, **options), key)

        def get_sync(self, key: str, *arguments: Any, **options: Any) -> Any:
            _require_inside(self.root, key)
            return _bounded(super().get_sync(key, *arguments, **options), key)

        async def get_partial_values(self, prototype: Any, key_ranges: Any) -> Any:
            ranges = list(key_ranges)
            for key, _ in ranges:
                _require_inside(self.root, key)
            found = await super().get_partial_values(prototype, ranges)
            return [_bounded(buffer, key) for buffer, (key, _) in zip(found, ranges, strict=True)]

    return FolderStore


def _require_rgb(levels: Sequence[Any], axes: Sequence[str]) -> None:
    if not levels or len(set(axes)) < len(axes) or not {"x", "y"} <= set(axes) <= set("tczyx"):
        raise NotASlideError(f"expected levels of axes t, c, z, y, x; its {len(levels)} levels have {', '.join(axes)}")
    for array in levels:
        channels = array.shape[axes.index("c")] if "c" in axes and array.ndim == len(axes) else 0
        if channels != 3 or array.dtype != np.uint8:
            raise NotASlideError(
                f"expected 3 channels of uint8 (RGB) on axis c; it has {channels} of {array.dtype} "
                f"(shape {array.shape}, axes {', '.join(axes)})"
            )


def _find_image(folder: Path) -> tuple[Path, Mapping[str, Any]] | None:
    """The group of the image and its first multiscales; None if it has none."""
    try:
        attributes = _attributes(folder)
        if "bioformats2raw.layout" in attributes:
            folder = folder / "0"
            attributes = _attributes(folder)
        multiscales = attributes.get("multiscales")
        return (folder, {**multiscales[0]}) if multiscales else None
    except OSError as error:
        raise NotASlideError(f"its metadata cannot be read: {error}") from error
    except _MALFORMED as error:
        raise NotASlideError(f"its metadata in {folder} are broken: {error!r}") from error


def _attributes(group: Path) -> dict[str, Any]:
    """The OME attributes of a Zarr group, empty if it has none: `.zattrs`, or `ome` in `zarr.json`."""
    if (group / "zarr.json").exists():
        return _json(group / "zarr.json").get("attributes", {}).get("ome", {})
    if (group / ".zattrs").exists():
        return _json(group / ".zattrs")
    return {}


def _json(path: Path) -> dict[str, Any]:
    _require_inside(path.parent.resolve(), path.name)
    return parse_json(path.read_bytes())


def _mpp_properties(image: Mapping[str, Any]) -> dict[str, str]:
    """openslide.mpp-x and -y of level 0. Empty without units, where a scale of 1 means that it is unknown."""
    steps = [*image["datasets"][0]["coordinateTransformations"], *image.get("coordinateTransformations", [])]
    scales = [step["scale"] for step in steps if step["type"] == "scale"]
    mpp = {}
    for place, axis in enumerate(image["axes"]):
        um = UM_PER_UNIT.get(axis.get("unit", ""))
        if axis["name"] in ("x", "y") and um is not None:
            mpp[f"openslide.mpp-{axis['name']}"] = f"{np.prod([scale[place] for scale in scales]) * um:.12g}"
    return mpp if len(mpp) == 2 else {}


def _declared_downsamples(image: Mapping[str, Any], x: int) -> list[float | None]:
    """Level-0 pixels per pixel of each level along x by the datasets' scales; None where they are all the same."""
    scales = [
        float(prod(step["scale"][x] for step in dataset["coordinateTransformations"] if step["type"] == "scale"))
        for dataset in image["datasets"]
    ]
    return [scale / scales[0] if scales[0] > 0 and scale != scales[0] else None for scale in scales]

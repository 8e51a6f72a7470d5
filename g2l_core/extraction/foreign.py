"""Features and coordinates that other tools have written, read slide by slide as they stand.

A layout is a function that finds the files of every slide, and one that reads them; `LAYOUTS` lists them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from g2l_core.encoders.resolve import normalized
from g2l_core.errors import ReadError, SlideError, UsageError, refuse_open_files
from g2l_core.slides.boundary import slide_errors
from g2l_core.tissue.coord_files import (
    HDF5_SUFFIXES,
    hdf5_corners,
    hdf5_level0_size,
    hdf5_side,
    read_rows,
    whole_numbers,
)

COORDINATE_ENDINGS = ("_patches.h5", ".h5", ".hdf5", ".csv", ".tsv", ".parquet")
PLAIN_SUFFIXES = (".npy", ".npz", ".pt", ".pth")
ZARR_ENDING = ".embeddings.zarr"


@dataclass(frozen=True, kw_only=True)
class ForeignFile:
    """Where a slide's features are."""

    slide_id: str
    features: Path
    coords: tuple[Path, ...] = ()
    """Folders that may have the coordinates, where they are not beside the features."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What a file says about the size of its patches; None is what it does not say."""

    patch_px: int | None = None
    """Side of a patch in pixels at `mpp`."""
    mpp: float | None = None
    """Micrometers per pixel of a patch."""
    side: float | None = None
    """Side of a patch in level-0 pixels."""
    slide_mpp: float | None = None
    """Micrometers per level-0 pixel."""
    level0_size: tuple[int, int] | None = None
    """Width and height of the slide in level-0 pixels."""
    view_px: int | None = None
    """Side of the center crop that was encoded, in pixels at `mpp`; None is the whole patch."""


@dataclass(frozen=True, kw_only=True)
class ForeignSlide:
    """One slide's features as another tool wrote them, not checked yet."""

    features: np.ndarray
    """Floats (n, dim)."""
    corners: np.ndarray
    """(n, 2), x and y of the top-left corners: level-0 pixels, int64; or micrometers, float64."""
    in_um: bool = False
    """Whether the corners are micrometers."""
    scale: Scale = field(default_factory=Scale)
    encoder: str = ""
    """The encoder's name, if the file says it."""
    encoder_digest: str = ""
    """The digest of the encoder in the store that the file was exported from, if it was."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How another tool keeps features."""

    find: Callable[[Path, str, Path | None], list[ForeignFile]]
    """The files below a folder, given the encoder's name and the folder of the coordinates, if the user names one."""
    read: Callable[[ForeignFile, str], ForeignSlide]
    """Reads one slide of an encoder."""


def read_slide(layout: Layout, file: ForeignFile, encoder: str) -> ForeignSlide:
    """Read one slide, and check that it is one: finite features, one for each corner.

    Raises:
        ReadError: It cannot be read, or is not as the layout has it; names the file.
    """
    try:
        with slide_errors(ReadError):
            found = layout.read(file, encoder)
            _require_sound(found)
            return found
    except SlideError as error:
        refuse_open_files(error, file.features, ReadError)
        raise ReadError(f"{file.features}: {error}") from error


def _require_sound(found: ForeignSlide) -> None:
    features, corners = found.features, found.corners
    if features.ndim != 2:
        hint = ": an embedding of the whole slide?" if features.ndim == 1 else ""
        raise ReadError(f"its features have the shape {features.shape}, expected (patches, dim){hint}")
    if features.dtype.kind != "f":
        raise ReadError(f"its features are {features.dtype}, expected floats")
    if corners.ndim != 2 or corners.shape[1] != 2:
        raise ReadError(f"its coordinates have the shape {corners.shape}; expected (patches, 2), x and y")
    if len(features) != len(corners):
        raise ReadError(f"it has {len(features):,} features, but {len(corners):,} coordinates: expected as many")
    if not len(features):
        raise ReadError("it has no patch")
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise ReadError(f"{len(bad):,} of its {len(features):,} features hold NaN or infinity, first in row {bad[0]}")


# -- finding files ----------------------------------------------------------------------------------------


def _below(folder: Path, endings: Sequence[str]) -> dict[str, list[Path]]:
    """Files below a folder by their path in it, without the ending."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        ending = next((e for e in endings if path.name.lower().endswith(e)), None)
        if ending and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            name = path.relative_to(folder).as_posix()[: -len(ending)]
            found.setdefault(name, []).append(path)
    return found


def _files(folder: Path, endings: Sequence[str], coords: Sequence[Path]) -> list[ForeignFile]:
    return [
        ForeignFile(slide_id=slide_id, features=path, coords=tuple(coords))
        for slide_id, paths in _below(folder, endings).items()
        for path in paths
    ]


def _folder_of_encoder(source: Path, encoder: str, prefix: str) -> Path:
    """The folder of an encoder's features: the source itself, or the one below whose name says the encoder.

    Raises:
        UsageError: There are several, and none or many have the encoder's name.
    """
    if source.name.startswith(prefix):
        return source
    found = sorted(path for path in source.rglob(f"{prefix}*") if path.is_dir())
    named = [path for path in found if normalized(path.name.removeprefix(prefix)) == normalized(encoder)]
    if len(named) == 1 or len(found) == 1:
        return (named or found)[0]
    if not found:
        return source
    names = ", ".join(path.relative_to(source).as_posix() for path in (named or found))
    raise UsageError(f"{source} has several folders of features: {names}. Give the one of {encoder} as the source")


def _find_trident(source: Path, encoder: str, coords: Path | None) -> list[ForeignFile]:
    folder = _folder_of_encoder(source, encoder, "features_")
    return _files(folder, (".h5", ".hdf5"), [coords] if coords else [folder.parent / "patches"])


def _find_clam(source: Path, encoder: str, coords: Path | None) -> list[ForeignFile]:
    """The h5_files, and of slides that have none the pt_files."""
    folder = source
    if not any((source / name).is_dir() for name in ("h5_files", "pt_files")):
        folder = _folder_of_encoder(source, encoder, "features_")
    places = [coords] if coords else [folder / "patches", folder.parent / "patches"]
    whole = _files(folder / "h5_files", (".h5",), places)
    known = {file.slide_id for file in whole}
    return whole + [f for f in _files(folder / "pt_files", (".pt",), places) if f.slide_id not in known]


def _find_stamp(source: Path, encoder: str, coords: Path | None) -> list[ForeignFile]:
    named = [path for path in source.iterdir() if path.is_dir() and normalized(path.name) == normalized(encoder)]
    return _files(named[0] if len(named) == 1 else source, (".h5",), [])


def _find_zarr(source: Path, encoder: str, coords: Path | None) -> list[ForeignFile]:
    if source.name.endswith(ZARR_ENDING):
        return [ForeignFile(slide_id=source.name.removesuffix(ZARR_ENDING), features=source)]
    return _files(source, (ZARR_ENDING,), [])


def _find_plain(source: Path, encoder: str, coords: Path | None) -> list[ForeignFile]:
    return _files(source, PLAIN_SUFFIXES, [coords] if coords else [source, source / "coords", source / "patches"])


# -- reading them -----------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, RuntimeError) as error:
        raise ReadError(f"it cannot be read as HDF5: {error}") from error


def _values(file: Any, name: str) -> np.ndarray:
    """A dataset of features.

    Raises:
        ReadError: There is none, or it is in another file.
    """
    import h5py

    if not isinstance(file.get(name, getlink=True), h5py.HardLink) or not isinstance(file[name], h5py.Dataset):
        raise ReadError(f"it has no dataset {name}; it has {', '.join(file) or 'nothing'}")
    if file[name].external:
        raise ReadError(f"its dataset {name} lies in another file")
    return np.asarray(file[name][:])


def _read_trident(file: ForeignFile, encoder: str) -> ForeignSlide:
    with _opened(file.features) as hdf5:
        features = _values(hdf5, "features")
        attributes = {**hdf5.attrs, **hdf5["features"].attrs}
        inside = hdf5_corners(hdf5) if "coords" in hdf5 else None
    corners, of_coords = inside or _read_corners(file)
    return _described(features, corners, {**of_coords, **attributes})


def _read_clam(file: ForeignFile, encoder: str) -> ForeignSlide:
    """As TRIDENT's, but a feature file's coordinates have no attributes, which are those of the patch file."""
    if file.features.suffix == ".h5":
        found = _read_trident(file, encoder)
        if found.scale.side is not None or not any(_coordinate_file(file)):
            return found
        _, attributes = _read_corners(file)
        return _described(found.features, found.corners, attributes)
    corners, attributes = _read_corners(file)
    return _described(_read_tensor(file.features), corners, attributes)


def _read_stamp(file: ForeignFile, encoder: str) -> ForeignSlide:
    with _opened(file.features) as hdf5:
        features, attributes = _values(hdf5, "feats"), dict(hdf5.attrs)
        corners = _values(hdf5, "coords").astype(np.float64)
    if not np.isfinite(corners).all():
        raise ReadError("its coords hold NaN or infinity; expected x and y in um")
    if attributes.get("unit") != "um":
        raise ReadError("its coordinates have no unit um: they are of a STAMP before version 2. Extract them again")
    um = _number(attributes, "tile_size_um") or _number(attributes, "tile_size")
    px = _number(attributes, "tile_size_px")
    found = _described(features, corners, attributes)
    scale = replace(found.scale, patch_px=round(px) if px else None, mpp=um / px if um and px else None)
    return replace(found, in_um=True, encoder=str(attributes.get("extractor", "")), scale=scale)


def _read_zarr(file: ForeignFile, encoder: str) -> ForeignSlide:
    import zarr

    root = zarr.open_group(file.features, mode="r")
    grids = [root[f"grids/{key}"] for key in sorted(root["grids"].group_keys())]
    names = sorted({name for grid in grids for name in grid["features"].array_keys()})
    wanted = [name for name in names if normalized(name) == normalized(encoder)] or (names if len(names) == 1 else [])
    having = [grid for grid in grids if wanted and wanted[0] in grid["features"]]
    if len(having) != 1:
        raise ReadError(f"expected one grid with features of {encoder}; its encoders are {', '.join(names)}")
    header = dict(having[0].attrs).get("raw2features", {})
    patching, source = header.get("patching", {}), header.get("source", {})
    sizes = source.get("level_dimensions") or [None]
    told = {
        "patch_px": patching.get("patch_px"),
        "mpp": patching.get("target_mpp"),
        "patch_size_level0": patching.get("level0_patch"),
        "slide_mpp": source.get("mpp_level0"),
        "encoder": wanted[0],
        "encoder_digest": header.get("models", {}).get(wanted[0], {}).get("encoder_digest", ""),
        **{name: value for name, value in header.get("g2l", {}).items() if name in {"view", "view_px"}},
    }
    if sizes[0]:
        told |= {"level0_width": sizes[0][0], "level0_height": sizes[0][1]}
    corners = np.asarray(having[0]["coords"][:], dtype=np.int64)
    return _described(np.asarray(having[0][f"features/{wanted[0]}"][:]), corners, told)


def _read_plain(file: ForeignFile, encoder: str) -> ForeignSlide:
    if file.features.suffix.lower() == ".npz":
        with np.load(file.features, allow_pickle=False) as archive:
            names = [name for name in ("features", "embeddings", "feats") if name in archive] or archive.files
            if len(names) != 1 and names[0] not in {"features", "embeddings", "feats"}:
                raise ReadError(f"expected an array features; it has {', '.join(names) or 'nothing'}")
            features, own = archive[names[0]], archive.get("coords")
        if own is not None:
            rows = whole_numbers(own.reshape(-1), "coords", np.arange(own.size) // 2)
            return _described(features, rows.reshape(own.shape), {})
    elif file.features.suffix.lower() == ".npy":
        features = np.load(file.features, allow_pickle=False)
    else:
        features = _read_tensor(file.features)
    corners, attributes = _read_corners(file)
    return _described(features, corners, attributes)


def _read_tensor(path: Path) -> np.ndarray:
    """A tensor, or the only one of a dictionary; code in the file is never run."""
    import torch

    content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, dict):
        content = content.get("features", next(iter(content.values())) if len(content) == 1 else None)
    if not isinstance(content, torch.Tensor):
        raise ReadError(f"expected a tensor, or a dictionary with the key features; it holds {type(content).__name__}")
    return content.float().numpy()


def _coordinate_file(file: ForeignFile) -> list[Path]:
    names = dict.fromkeys((file.slide_id, file.slide_id.rpartition("/")[2]))
    for name in names:
        places = [folder / f"{name}{ending}" for folder in file.coords for ending in COORDINATE_ENDINGS]
        if found := [path for path in places if path.is_file() and path != file.features]:
            return found
    return []


def _read_corners(file: ForeignFile) -> tuple[np.ndarray, dict[str, Any]]:
    """The corners, in the order of the file, and what it says of the patches' size."""
    found = _coordinate_file(file)
    if len(found) != 1:
        expected = f"{file.slide_id}{{{','.join(COORDINATE_ENDINGS)}}}"
        where = " or ".join(map(str, file.coords)) or "the file itself"
        many = f"found {', '.join(path.name for path in found)}" if found else "found none"
        raise ReadError(
            f"its coordinates are wanted in {where} as one of {expected}: {many}. Name their folder: --coords"
        )
    if found[0].suffix.lower() in HDF5_SUFFIXES:
        with _opened(found[0]) as hdf5:
            return hdf5_corners(hdf5)
    rows = read_rows(found[0])
    if not {"x", "y"} <= rows.columns.keys():
        raise ReadError(f"{found[0]}: expected columns x and y; it has {', '.join(rows.columns)}")
    corners = np.stack([whole_numbers(rows.columns[axis], axis, rows.lines) for axis in ("x", "y")], axis=1)
    return corners, {}


def _described(features: np.ndarray, corners: np.ndarray, attributes: Mapping[str, Any]) -> ForeignSlide:
    """Features with what the attributes of TRIDENT, CLAM and G2L say of them.

    Raises:
        ReadError: They are of an augmented view.
    """
    if view := _number(attributes, "view"):
        raise ReadError(f"it holds augmented view {view:g}, and what is imported is the canonical one: export view 0")
    target, level0 = (_number(attributes, f"{name}_magnification") for name in ("target", "level0"))
    patch_px, view_px = (_number(attributes, name) for name in ("patch_px", "view_px"))
    patch_px = patch_px or _number(attributes, "patch_size")
    sides = hdf5_side(attributes)
    scale = Scale(
        patch_px=round(patch_px) if patch_px else None,
        mpp=_number(attributes, "mpp") or (10 / target if target else None),
        side=sides[0] if sides else None,
        slide_mpp=_number(attributes, "slide_mpp") or (10 / level0 if level0 else None),
        level0_size=hdf5_level0_size(attributes),
        view_px=round(view_px) if view_px else None,
    )
    name, digest = (attributes.get(key, "") for key in ("encoder", "encoder_digest"))
    return ForeignSlide(features=features, corners=corners, scale=scale, encoder=str(name), encoder_digest=str(digest))


def _number(attributes: Mapping[str, Any], name: str) -> float | None:
    value = attributes.get(name)
    if value is None or np.asarray(value).dtype.kind not in "iuf" or np.size(value) != 1:
        return None
    number = float(np.ravel(value)[0])
    return number if isfinite(number) else None


LAYOUTS: Mapping[str, Layout] = {
    "trident-h5": Layout(find=_find_trident, read=_read_trident),
    "clam": Layout(find=_find_clam, read=_read_clam),
    "stamp-h5": Layout(find=_find_stamp, read=_read_stamp),
    "raw2features": Layout(find=_find_zarr, read=_read_zarr),
    "plain": Layout(find=_find_plain, read=_read_plain),
}
"""Every layout that can be imported, by the name that users write."""

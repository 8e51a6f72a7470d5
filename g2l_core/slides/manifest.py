"""Find the slides and patch images that inputs name (files, folders, manifests), and read label tables.

A *source* is one slide, or the patch images that belong together. Its id is its path relative to the folder that was
given, or to the common folder of a manifest's rows, so that `a/x.svs` and `b/x.svs` stay apart, and that a slide has
one id whether a folder or a manifest names it.
"""

import csv
import logging
import os
import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from io import StringIO
from itertools import islice
from math import ceil, isfinite
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Shaped

from g2l_core.errors import ManifestError, UsageError
from g2l_core.files import csv_value
from g2l_core.rng import keyed_generator
from g2l_core.slides.images import are_patch_images, is_small_tiff
from g2l_core.slides.limits import require_file_or_folder
from g2l_core.slides.ome_zarr import SUFFIX, is_ome_zarr
from g2l_core.slides.readers import IMAGE_SUFFIXES, dicom_series, slide_suffixes
from g2l_core.types import SlideId

_log = logging.getLogger(__name__)

_NAMED = 4
"""How many examples a note has."""

_ROWS_AT_ONCE = 256
"""Rows of a table that are split into columns together: so few that they are gone before Python's garbage collector
has counted enough of them to look through all objects, which takes most of the time with 4,096."""

COLUMN_ALIASES: Mapping[str, tuple[str, ...]] = {
    "path": ("path", "image_path", "slide_path", "wsi", "file", "filename"),
    "slide_id": ("slide_id", "sample_id", "slide"),
    "patch_id": ("patch_id",),
    "mpp": ("mpp", "spacing_at_level_0"),
    "patient_id": ("patient_id", "case_id", "patient"),
    "medical_center": ("medical_center", "center", "centre", "site"),
}
"""G2L's column names, each with what other tools call it. Case does not matter, nor do spaces and hyphens."""

BLANKS = frozenset(
    """
    na n/a #n/a n.a. n.a #na <na> nan -nan nat none null nil - -- --- \u2013 \u2014 ? missing
    #value! #ref! #div/0! #name? #null! #num!
    """.split()
) | frozenset(
    f"{left}not {word}{right}"
    for left, right in (("", ""), ("[", "]"))
    for word in ("available", "applicable", "evaluated", "reported", "known")
)
"""What tables write for a value that is missing, in lower case: pandas, R, spreadsheets, TCGA, GDC and cBioPortal."""

_IDS = frozenset({"path", "slide_id", "patch_id", "x", "y"})
"""Columns that say which slide or patch a row is of. Their values are never read as missing."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One slide, or one set of patch images."""

    slide_id: SlideId
    path: Path
    """The slide, or the folder that the patch ids are relative to."""
    patch_ids: tuple[str, ...] = ()
    """File names of patch images; empty for a slide."""
    mpp: float | None = None
    """Micrometers per level-0 pixel, if the manifest gives it."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """patient_id, medical_center and any other column that is the same for the whole source."""
    patch_labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Columns that differ inside a set of patch images, with a value for each of `patch_ids`; it may be empty."""
    columns: tuple[str, ...] = ()
    """All columns of labels that the manifest has: one without a value here takes back what it said before."""


def read_sources(inputs: Sequence[Path]) -> list[Source]:
    """Find the sources that the INPUT arguments name: slides, folders and manifests. They are sorted by id.

    A .zarr folder with an OME-Zarr image is a slide. Any other folder that holds a slide anywhere is a folder of
    slides; else, one that holds images is a folder of patch images, one source per sub-folder. TIFF files are patch
    images if all are as `are_patch_images` says.

    Raises:
        UsageError: An input does not exist.
        ReadError: An input is a pipe, a socket or a device.
        ManifestError: An input holds nothing usable, or two sources would share an id.
    """
    sources = [source for path in inputs for source in _sources_of(path)]
    refuse_colliding_ids([source.slide_id for source in sources])
    return sorted(sources, key=lambda source: source.slide_id)


def _sources_of(path: Path) -> list[Source]:
    if not path.exists():
        raise UsageError(f"no such file or folder: {path}")
    require_file_or_folder(path)
    if path.suffix.lower() in {".csv", ".tsv"}:
        return _from_manifest(path)
    if path.is_dir() and not is_ome_zarr(path):
        return _from_folder(path)
    return [Source(slide_id=SlideId(path.stem), path=path)]


def _from_folder(folder: Path) -> list[Source]:
    files = sorted(files_below(folder))
    suffixes = slide_suffixes() | {SUFFIX}
    slides = list(_one_a_series(p for p in files if p.suffix.lower() in suffixes))
    if slides and not _told_patch_images(slides, folder):
        return [Source(slide_id=_id_of(p.relative_to(folder)), path=p) for p in slides]
    images = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES] + slides
    if not images:
        raise ManifestError(
            f"{folder} holds no slide ({' '.join(sorted(suffixes))}) "
            f"and no patch image ({' '.join(sorted(IMAGE_SUFFIXES))})"
        )
    by_folder: dict[Path, list[str]] = defaultdict(list)
    for image in images:
        by_folder[image.parent].append(image.name)
    return [
        Source(
            slide_id=SlideId(parent.relative_to(folder).as_posix() if parent != folder else folder.resolve().name),
            path=parent,
            patch_ids=tuple(names),
        )
        for parent, names in by_folder.items()
    ]


def _told_patch_images(slides: Sequence[Path], folder: Path) -> bool:
    """Whether files with the suffix of slides are patch images; a line says so, or how to say so."""
    if are_patch_images(slides):
        _log.warning(
            "%s: its %d TIFF files are small, square and of one size: they are taken for patch images. If they are "
            "slides, name them in a manifest", folder, len(slides)
        )  # fmt: skip
        return True
    if all(map(is_small_tiff, slides)):
        _log.warning(
            "%s: its %d TIFF files are small, and are taken for slides. If they are patch images, name them in a "
            "manifest with a column patch_id; all must have the size of --patch-px", folder, len(slides)
        )  # fmt: skip
    return False


def files_below(folder: Path) -> Iterator[Path]:
    """The files of a folder and its sub-folders, broken links, and folders that are or should be slides.

    Everything that looks like a slide is listed, so that a slide that cannot be opened fails by its name. Folders that
    end in .zarr are not searched. Every other folder is searched once, by its own path if it is not linked alone.
    """
    searched = set[tuple[int, int]]()
    waiting = deque([folder])
    while waiting:
        for root, folders, names in os.walk(waiting.popleft()):
            inode = Path(root).stat()
            identity = inode.st_dev, inode.st_ino
            if identity in searched:
                folders.clear()
                continue
            searched.add(identity)
            yield from (Path(root, name) for name in names if not name.startswith("."))
            below = [Path(root, name) for name in sorted(folders) if not name.startswith(".")]
            yield from (path for path in below if is_ome_zarr(path) or _is_hollow(path))
            folders[:] = [name for name in folders if not name.lower().endswith(SUFFIX)]
            waiting += (path for path in below if path.is_symlink() and path.name in folders)


def _one_a_series(paths: Iterable[Path]) -> Iterator[Path]:
    """The slides, with only the first file of each DICOM series in a folder."""
    seen = set[tuple[Path, str]]()
    for path in paths:
        series = dicom_series(path) if path.suffix.lower() == ".dcm" else ""
        if not series or (path.parent, series) not in seen:
            yield path
        seen.add((path.parent, series))


def _is_hollow(folder: Path) -> bool:
    """Whether a folder has a slide's name but holds no slide."""
    suffixes = slide_suffixes()
    return folder.suffix.lower() in suffixes and not any(p.suffix.lower() in suffixes for p in folder.rglob("*"))


def _id_of(relative: Path) -> SlideId:
    return SlideId(relative.with_suffix("").as_posix())


def _from_manifest(path: Path) -> list[Source]:
    table = open_table(path)
    table.log_notes()
    if not len(table.lines) or "path" not in table.columns:
        raise ManifestError(
            f"{path} needs a header line with a column path (or {', '.join(COLUMN_ALIASES['path'][1:])}) and rows; "
            f"its columns are {', '.join(table.columns)}"
        )
    rows = [dict(items) for items in dict.fromkeys(tuple(row.items()) for row in table.rows())]
    for row in rows:
        if not row["path"]:
            raise ManifestError(
                f"{path} has a row without a path: {', '.join(value for value in row.values() if value)}"
            )
    places = [_place(row["path"], path) for row in rows]
    common = Path(os.path.commonpath([place.parent for place in places]))
    groups: dict[SlideId, list[dict[str, str]]] = defaultdict(list)
    ids: dict[Path, SlideId] = {}
    for row, place in zip(rows, places, strict=True):
        slide_id = SlideId(row.get("slide_id") or _id_of_place(place, common, path))
        if (other := ids.setdefault(place, slide_id)) != slide_id:
            raise ManifestError(f"{path} names {place} under two slide_id, {other!r} and {slide_id!r}: keep one row")
        groups[slide_id].append(row)
    return [_manifest_source(slide_id, group, path) for slide_id, group in groups.items()]


def _place(text: str, manifest: Path) -> Path:
    """Where a row's file is, as an absolute path without `..`."""
    return Path(os.path.normpath(manifest.absolute().parent / text))


def _id_of_place(place: Path, common: Path, manifest: Path) -> SlideId:
    """The id of a row that gives none: of patch images, it is the one of their folder."""
    relative = place.relative_to(common)
    if place.suffix.lower() not in IMAGE_SUFFIXES:
        return _id_of(relative)
    if relative.parts[:-1]:
        return SlideId(relative.parent.as_posix())
    return SlideId(manifest.stem if common == _place("", manifest) else common.name)


def _manifest_source(slide_id: SlideId, rows: Sequence[Mapping[str, str]], manifest: Path) -> Source:
    paths = [manifest.parent / row["path"] for row in rows]
    columns = tuple(column for column in rows[0] if column not in {"slide_id", "path", "patch_id", "mpp"})
    labels = {c: rows[0][c] for c in columns if rows[0][c] and len({row[c] for row in rows}) == 1}
    mpp = _mpp_of(rows, slide_id, manifest)
    images = [_is_image(row) for row in rows]
    if len(paths) == 1 and not images[0]:
        return Source(slide_id=slide_id, path=paths[0], mpp=mpp, labels=labels, columns=columns)
    if not all(images):
        raise ManifestError(f"{manifest} names slide_id {slide_id!r} more than once: {paths[0]}, {paths[1]}")
    root, names = _image_names(rows, manifest)
    own_ids = any(row.get("patch_id", "") not in {"", row["path"], name} for row, name in zip(rows, names, strict=True))
    differing = [c for c in columns if len({row[c] for row in rows}) > 1] + ["patch_id"] * own_ids
    return Source(
        slide_id=slide_id,
        path=root,
        patch_ids=names,
        mpp=mpp,
        labels=labels,
        patch_labels={column: tuple(row[column] for row in rows) for column in differing},
        columns=columns,
    )


def _image_names(rows: Sequence[Mapping[str, str]], manifest: Path) -> tuple[Path, tuple[str, ...]]:
    """A folder and the names of patch images in it: as the manifest writes them, unless one is an absolute path."""
    places = [_place(row["path"], manifest) for row in rows]
    place, count = Counter(places).most_common(1)[0]
    if count > 1:
        raise ManifestError(f"{manifest} names {rows[places.index(place)]['path']} more than once")
    if any(Path(row["path"]).is_absolute() for row in rows):
        root = Path(os.path.commonpath([place.parent for place in places]))
        return root, tuple(place.relative_to(root).as_posix() for place in places)
    return manifest.parent, tuple(row["path"] for row in rows)


def _is_image(row: Mapping[str, str]) -> bool:
    """Whether a row is a patch image: by its suffix, or, as a TIFF may be either, by a value in patch_id."""
    return bool(row.get("patch_id")) or Path(row["path"]).suffix.lower() in IMAGE_SUFFIXES


def _mpp_of(rows: Sequence[Mapping[str, str]], slide_id: str, manifest: Path) -> float | None:
    values = {row.get("mpp", "") for row in rows} - {""}
    if not values:
        return None
    if len(values) > 1:
        raise ManifestError(f"{manifest}: the rows of {slide_id!r} give different mpp: {', '.join(sorted(values))}")
    text = values.pop()
    try:
        mpp = float(text)
    except ValueError:
        mpp = 0.0
    if not (isfinite(mpp) and mpp > 0):
        raise ManifestError(f"{manifest}: mpp of {slide_id!r} is {text!r}, not a number of um/px above 0")
    return mpp


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with a header, by column. Every value is text, and one that is missing is an empty string."""

    path: Path
    values: Mapping[str, Shaped[np.ndarray, " row"]]
    """The texts of each column; equal cells of one share their text."""
    lines: Int64[np.ndarray, " row"]
    """The line of each row, as a spreadsheet counts them."""
    notes: tuple[str, ...]
    """What was read otherwise than it is written, one sentence each."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns."""
        return tuple(self.values)

    def rows(self) -> list[dict[str, str]]:
        """Each row by column, which takes much more room than the columns."""
        texts = (column.tolist() for column in self.values.values())
        return [dict(zip(self.values, row, strict=True)) for row in zip(*texts, strict=True)]

    def log_notes(self) -> None:
        """Log each note as a warning."""
        for note in self.notes:
            _log.warning("%s", note)


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a table, as `open_table` reads them; its notes are logged as warnings.

    Raises:
        ManifestError: As `open_table`.
    """
    table = open_table(path)
    table.log_notes()
    return table.rows()


def open_table(path: Path) -> Table:
    """Read a table of separated values with a header. Columns get G2L's names, and values are stripped.

    The header tells whether commas, semicolons or tabs separate the fields. A value among `BLANKS` is missing. A file
    that is not UTF-8 is read as Western European (cp1252).

    Raises:
        ManifestError: It cannot be read, has no header, or a row has another number of fields.
    """
    text, notes = _table_text(path)
    if not text.strip():
        raise ManifestError(f"the table {path} is empty; expected a header line")
    delimiter = _delimiter(text, "\t" if path.suffix.lower() == ".tsv" else ",")
    reader = csv.reader(StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = next(reader)
        header = [canonical_column(csv_value(name.strip())) for name in names]
        if len(set(header)) < len(header):
            raise ManifestError(f"{path} has two columns of one meaning: {', '.join(names)}")
        columns, lines = _read_columns(header, reader, path)
    except csv.Error as error:
        raise ManifestError(f"{path} is no table of comma- or tab-separated values: {error}") from error
    blanks = {(column.name, value): count for column in columns for value, count in column.blanks.items()}
    return Table(
        path=path,
        values={column.name: np.array(column.texts, dtype=object) for column in columns},
        lines=np.array(lines, np.int64),
        notes=(*notes, *([_describe_blanks(path, blanks)] if blanks else [])),
    )


class _Column:
    """A column whose cells come in parts: what each says, found once for equal ones; how often each blank is met."""

    def __init__(self, name: str) -> None:
        self.name, self.texts = name, list[str]()
        self.blanks = Counter[str]()
        self._known = dict[str, str]()
        self._missing = dict[str, str]()

    def add(self, cells: Sequence[str]) -> None:
        """Take further cells."""
        for cell in set(cells).difference(self._known):
            text = csv_value(cell.strip())
            if self.name not in _IDS and text.lower() in BLANKS:
                self._missing[cell], text = text, ""
            self._known[cell] = text
        self.texts += map(self._known.__getitem__, cells)
        for cell, value in self._missing.items():
            self.blanks[value] += cells.count(cell)


def _read_columns(header: Sequence[str], rows: Iterable[list[str]], path: Path) -> tuple[list[_Column], list[int]]:
    """The columns, and the line of each row.

    Raises:
        ManifestError: A row has another number of fields than the header.
    """
    columns, lines = [_Column(name) for name in header], list[int]()
    filled = ((line, row) for line, row in enumerate(rows, start=2) if any(map(str.strip, row)))
    while part := list(
        islice(filled, _ROWS_AT_ONCE)
    ):  # spreadsheets leave lines of commas behind, which are not filled
        numbers, records = zip(*part, strict=True)
        for line, row in part if {*map(len, records)} != {len(header)} else ():
            if len(row) != len(header):
                raise ManifestError(f"{path}, line {line}: {len(row)} fields where the header has {len(header)}")
        lines += numbers
        for column, cells in zip(columns, zip(*records, strict=True), strict=True):
            column.add(cells)
    return columns, lines


def _describe_blanks(path: Path, blanks: Mapping[tuple[str, str], int]) -> str:
    named = ", ".join(
        f"{value!r} in {column} ({count:,})" for (column, value), count in sorted(blanks.items())[:_NAMED]
    )
    more = f" and {len(blanks) - _NAMED} more kinds" if len(blanks) > _NAMED else ""
    return f"{path.name}: read as missing values: {named}{more}. If one of them is a class, write another word for it"


def _table_text(path: Path) -> tuple[str, list[str]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ManifestError(f"cannot read the table {path}: {error}") from error
    if b"\0" in content:
        raise ManifestError(f"cannot read the table {path}: it is no utf-8 text; save it as CSV in UTF-8")
    try:
        return content.decode("utf-8-sig"), []
    except UnicodeDecodeError as error:
        note = f"{path} is no utf-8 text ({error}) and is read as cp1252; check the letters with accents"
        return content.decode("cp1252", errors="replace"), [note]


def _delimiter(text: str, usual: str) -> str:
    """The separator that occurs most often in the header, outside of quotes; the usual one where none does."""
    header = re.sub(r'"[^"]*"', "", text.partition("\n")[0])
    return max((usual, ",", ";", "\t"), key=header.count)


def canonical_column(name: str) -> str:
    """G2L's name of a column, or the name as it is if it has none. See `COLUMN_ALIASES`."""
    plain = name.strip()
    for canonical, aliases in COLUMN_ALIASES.items():
        if re.sub(r"[\s_-]+", "_", plain).lower() in aliases:
            return canonical
    return plain


def refuse_colliding_ids(slide_ids: Sequence[str]) -> None:
    """Refuse ids that cannot be in one store.

    Raises:
        ManifestError: Two ids are equal, or one is a folder of another, or one is no relative path.
    """
    counts = Counter(slide_ids)
    for slide_id, count in counts.items():
        parts = slide_id.split("/")
        if any(part in {"", ".", ".."} for part in parts):
            raise ManifestError(f"slide id {slide_id!r} is not a plain relative path such as 'folder/slide'")
        if count > 1:
            raise ManifestError(
                f"{count} inputs share the slide id {slide_id!r}. "
                "Give their common parent folder as the one INPUT, or a manifest with distinct slide_id"
            )
        for i in range(1, len(parts)):
            folder = "/".join(parts[:i])
            if folder in counts:
                raise ManifestError(f"slide id {folder!r} is also the folder of {slide_id!r}: rename one of them")


def parse_condition(text: str) -> tuple[str, str]:
    """Split COLUMN=PATTERN into the column and the pattern.

    Raises:
        UsageError: There is no `=`.
    """
    column, equals, pattern = text.partition("=")
    if not equals or not column:
        raise UsageError(f"{text!r}: expected COLUMN=PATTERN, such as split=train or 'slide_id=train/*'")
    return column, pattern


def fits(condition: tuple[str, str], slide_id: str, labels: Mapping[str, str]) -> bool:
    """Whether a slide's label (or its slide_id) fits a shell-style pattern."""
    column, pattern = condition
    value = slide_id if column == "slide_id" else labels.get(column, "")
    return fnmatchcase(value, pattern)


def held_out_groups(groups: Iterable[str], share: float, seed: int) -> frozenset[str]:
    """Draw a fraction of the distinct groups at random, rounded up, but never all of them.

    Args:
        groups: For example patient ids. Repetitions count once.
        share: The fraction, between 0 and 1.
        seed: Random seed.
    """
    distinct = sorted(set(groups))
    count = min(ceil(share * len(distinct) - 1e-9), len(distinct) - 1)  # 0.07 * 100 is 7, not 7.000000000000001
    order = keyed_generator("held out", seed).permutation(len(distinct))
    return frozenset(distinct[i] for i in order[:count])

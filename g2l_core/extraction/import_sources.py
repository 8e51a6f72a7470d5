"""Where the slides of imported features are, and what a manifest says of them."""

from collections.abc import Mapping
from pathlib import Path

from g2l_core.errors import ReadError, UsageError
from g2l_core.slides.manifest import files_below, open_table
from g2l_core.slides.readers import slide_suffixes


class Places:
    """The slides below a folder, by their path without suffix and by their name alone."""

    def __init__(self, folder: Path | None) -> None:
        self._by_name: dict[str, list[Path]] = {}
        self._taken: dict[Path, str] = {}
        if folder is None:
            return
        if not folder.is_dir():
            raise UsageError(f"--slides {folder}: no such folder")
        suffixes = slide_suffixes() | {".zarr"}
        for path in sorted(files_below(folder)):
            if path.suffix.lower() in suffixes:
                relative = path.relative_to(folder).with_suffix("").as_posix()
                for name in dict.fromkeys((relative, relative.removesuffix(".ome"), path.stem, path.name)):
                    self._by_name.setdefault(name, []).append(path)

    def find(self, slide_id: str, row: Mapping[str, str]) -> Path | None:
        """The file of a slide: the manifest's, or the one of its name.

        Raises:
            ReadError: Several files have its name, or the file is another slide's already.
        """
        names = dict.fromkeys((slide_id, slide_id.rpartition("/")[2]))
        found = [Path(row["path"])] if row.get("path") else next(filter(None, map(self._by_name.get, names)), [])
        if len(found) > 1:
            raise ReadError(f"two slides have its name, {found[0]} and {found[1]}: name its path in a --manifest")
        if not found:
            return None
        if (other := self._taken.setdefault(found[0], slide_id)) != slide_id:
            raise ReadError(f"{found[0]} is the slide of {other!r} already: name its own in a --manifest")
        return found[0]


def manifest_rows(manifest: Path | None) -> dict[str, dict[str, str]]:
    """The rows of a manifest by slide; its paths are relative to it.

    Raises:
        ManifestError: It cannot be read.
        UsageError: It has neither slide_id nor path.
    """
    if manifest is None:
        return {}
    table = open_table(manifest)
    table.log_notes()
    if not {"slide_id", "path"} & {*table.columns}:
        raise UsageError(
            f"--manifest {manifest}: expected a column slide_id or path; it has {', '.join(table.columns)}"
        )
    rows = {}
    for row in table.rows():
        path = manifest.absolute().parent / row["path"] if row.get("path") else None
        slide_id = row.get("slide_id") or (path.stem if path else "")
        rows[slide_id] = {**row, "path": str(path or "")}
    return rows

"""Write the patches of a store as image files, or as WebDataset shards: `g2l store export --format png`."""

import csv
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from g2l_core.concurrency import run_ahead
from g2l_core.errors import ReadError, SlideError, StoreCorruptError, StoreError, refuse_open_files, writing
from g2l_core.files import csv_row, sync_tree
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.identity import require_same_slide
from g2l_core.patches.render import PatchReader, open_patches
from g2l_core.store import schema
from g2l_core.store.export import (
    SLIDES_FILE,
    Exported,
    Report,
    chosen_slides,
    count_unreadable,
    reporting,
    write_slides,
)  # fmt: skip
from g2l_core.store.features import FeatureStore, StoredSlide
from g2l_core.store.formats.item import whole_file
from g2l_core.store.formats.journal import Journal, Written, claim_export_folder
from g2l_core.store.locks import locked_output

QUALITY = 95
"""Of JPEG, whose colors are not subsampled."""

SHARD_PATCHES = 4096
"""Patches of a tar file."""

WORKERS = 4
"""Threads that read and encode patches."""

LOST = "unreadable now"
"""Patches that stage one has read, and that cannot be read any more."""


@dataclass(frozen=True, kw_only=True)
class _Patch:
    """One patch as an image file."""

    x: int
    y: int
    image: bytes


@dataclass(frozen=True, kw_only=True)
class PatchFormat:
    """How patches are kept."""

    suffix: str
    write: Callable[[StoredSlide, Iterator[_Patch], Mapping[str, Any], str, Path], Iterator[Path]]
    """Writes one slide's patches, given what is the same for all of them and the suffix of their images."""


def export_patches(
    store: FeatureStore,
    folder: Path,
    layout: str,
    *,
    where: Mapping[str, str] | None = None,
    report: Report = lambda done, total: None,
) -> Exported:
    """Write the whole patches, whatever part of them was encoded, of all slides that are at hand.

    Args:
        store: The cohort.
        folder: Where to write; made where it is missing.
        layout: A name of `PATCH_FORMATS`.
        where: As for `store.export.export_features`.
        report: Is told how many slides are done, and of how many.

    Raises:
        UsageError: No slide fits the conditions.
        StoreMissingError: There is nothing to export.
        StoreError: The files cannot be written.
        RunError: Another command writes into the folder, or it cannot be made.
    """
    files, counts, unreadable = list[Path](), [0, 0], Counter[str]()
    with locked_output(folder):
        slides, left_out = chosen_slides(store, where or {})
        claim_export_folder(folder)
        journal = Journal(folder, f"{layout} {store.grid}")
        for slide in reporting(slides, report):
            facts = {key: value for key, value in slide.facts.to_json().items() if key != "features"}
            written = journal.entry(facts)
            if written is None:
                try:
                    written = _write_slide(store, slide, PATCH_FORMATS[layout], folder)
                except (SlideError, StoreCorruptError) as error:
                    left_out[slide.slide_id] = str(error)
                    continue
                journal.note(facts, written)
            files += written.files
            counts = [counts[0] + 1, counts[1] + written.patches]
            unreadable.update(written.unreadable)
        if files:
            write_slides(folder / SLIDES_FILE, slides)
    return Exported(
        files=tuple(files), slides=counts[0], patches=counts[1], left_out=left_out, unreadable=dict(unreadable)
    )


def plan_patches(store: FeatureStore, *, where: Mapping[str, str] | None = None) -> Exported:
    """What `export_patches` would write, as far as the store and the slides' files tell; errors as there."""
    counts, unreadable = [0, 0], Counter[str]()
    slides, left_out = chosen_slides(store, where or {})
    for slide in slides:
        try:
            _require_slide(slide)
            status = slide.patch_status
        except (SlideError, StoreCorruptError) as error:
            left_out[slide.slide_id] = str(error)
            continue
        counts = [counts[0] + 1, counts[1] + int((status == schema.STATUS["ok"]).sum())]
        unreadable.update(count_unreadable(status))
    return Exported(files=(), slides=counts[0], patches=counts[1], left_out=left_out, unreadable=dict(unreadable))


def _require_slide(slide: StoredSlide) -> None:
    if slide.facts.kind != "slide":
        raise ReadError("it is a set of patch images, which are files already")
    require_same_slide(slide, Path(slide.facts.source))


def _write_slide(store: FeatureStore, slide: StoredSlide, form: PatchFormat, folder: Path) -> Written:
    """Write one slide.

    Raises:
        SlideError: It cannot be opened, or is a set of images already.
        StoreCorruptError: Its tables are damaged.
        StoreError: It cannot be written.
    """
    _require_slide(slide)
    status, coords, lost = slide.patch_status, slide.coords, Counter[str]()
    rows = np.flatnonzero(status == schema.STATUS["ok"]).tolist()
    reader = open_patches(slide, GridSpec.from_json(store.grid))
    try:
        images = run_ahead(partial(_image, reader, form.suffix), rows, workers=WORKERS, lookahead=4 * WORKERS)
        patches = _readable(zip(rows, images, strict=True), coords, lost)
        files = tuple(form.write(slide, patches, _facts(store, slide), form.suffix, folder))
    finally:
        reader.close()
    if lost[LOST] == len(rows):
        raise ReadError("none of its patches can be read")
    return Written(files=files, patches=len(rows) - lost[LOST], unreadable={**count_unreadable(status), **lost})


def _facts(store: FeatureStore, slide: StoredSlide) -> dict[str, Any]:
    """What is the same for all patches of a slide."""
    facts = {"slide_id": slide.slide_id, "patch_px": store.grid["patch_px"], "mpp": store.grid["mpp"]}
    return {**facts, "patch_size_level0": slide.facts.patch_px_level0, "labels": dict(slide.labels)}


def _image(reader: PatchReader, suffix: str, row: int) -> bytes | None:
    """A patch as a file; None if it cannot be read any more."""
    try:
        patch = reader.read(row)
    except ReadError as error:
        refuse_open_files(error, f"the patch of row {row}", StoreError)
        return None
    full_color = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    options = [cv2.IMWRITE_JPEG_QUALITY, QUALITY, *full_color] if suffix == ".jpg" else []
    return bytes(cv2.imencode(suffix, cv2.cvtColor(patch, cv2.COLOR_RGB2BGR), options)[1])


def _readable(rows: Iterator[tuple[int, bytes | None]], coords: np.ndarray, lost: Counter[str]) -> Iterator[_Patch]:
    for row, image in rows:
        if image is None:
            lost[LOST] += 1
            continue
        x, y = coords[row].tolist()
        yield _Patch(x=x, y=y, image=image)


def write_images(
    slide: StoredSlide, patches: Iterator[_Patch], facts: Mapping[str, Any], suffix: str, folder: Path
) -> Iterator[Path]:
    """One file a patch: folder/<slide_id>/<x>_<y>.png, and patches.csv beside them with file, x and y.

    The folder of a slide takes its place when all of its patches are written.

    Raises:
        StoreError: It cannot be written.
    """
    target = folder / slide.slide_id
    aside = target.with_name(f".{target.name}.partial")
    try:
        with writing(target, StoreError):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            with (aside / "patches.csv").open("w", encoding="utf-8", newline="") as file:
                table = csv.writer(file, lineterminator="\n")
                table.writerow(("slide_id", "file", "x", "y", "patch_size_level0"))
                for patch in patches:
                    name = f"{patch.x}_{patch.y}{suffix}"
                    (aside / name).write_bytes(patch.image)
                    table.writerow(csv_row((slide.slide_id, name, patch.x, patch.y, facts["patch_size_level0"])))
            sync_tree(aside)
            shutil.rmtree(target, ignore_errors=True)
            aside.rename(target)
    except OSError as error:
        raise StoreError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    yield target


def write_shards(
    slide: StoredSlide, patches: Iterator[_Patch], facts: Mapping[str, Any], suffix: str, folder: Path
) -> Iterator[Path]:
    """Tar files for WebDataset: folder/<slide_id>-000000.tar with <slide_id>_<x>_<y>.jpg and .json of each patch.

    Slashes and dots of the id are written as underscores in keys, for WebDataset parts a key from its suffix at the
    first dot. The JSON has slide_id, x, y, patch_px, mpp, patch_size_level0 and labels.

    Raises:
        StoreError: They cannot be written.
    """
    key = slide.slide_id.replace("/", "_").replace(".", "_")
    number, batch = 0, list[_Patch]()
    for patch in patches:
        batch.append(patch)
        if len(batch) == SHARD_PATCHES:
            yield _write_shard(folder / f"{slide.slide_id}-{number:06d}.tar", batch, facts, key, suffix)
            number, batch = number + 1, []
    if batch:
        yield _write_shard(folder / f"{slide.slide_id}-{number:06d}.tar", batch, facts, key, suffix)


def _write_shard(path: Path, patches: Sequence[_Patch], facts: Mapping[str, Any], key: str, suffix: str) -> Path:
    with whole_file(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for patch in patches:
            described = json.dumps({**facts, "x": patch.x, "y": patch.y}).encode()
            for ending, content in ((suffix, patch.image), (".json", described)):
                member = tarfile.TarInfo(f"{key}_{patch.x}_{patch.y}{ending}")
                member.size = len(content)
                archive.addfile(member, BytesIO(content))
    return path


PATCH_FORMATS: Mapping[str, PatchFormat] = {
    "png": PatchFormat(suffix=".png", write=write_images),
    "jpeg": PatchFormat(suffix=".jpg", write=write_images),
    "webdataset": PatchFormat(suffix=".jpg", write=write_shards),
}
"""How patches can be written, by the name that users write."""

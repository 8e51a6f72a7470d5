"""One file a slide for scverse's tools: AnnData (.h5ad) and SpatialData (.zarr). They need packages of their own."""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from g2l_core.api.frames import slide_frame
from g2l_core.api.optional import require
from g2l_core.api.scverse import annotated_data, spatial_data
from g2l_core.api.selection import Part
from g2l_core.errors import StoreCorruptError, StoreMissingError
from g2l_core.files import write_with
from g2l_core.store import schema
from g2l_core.store.boundary import writing
from g2l_core.store.export import (
    SLIDES_FILE,
    Exported,
    chosen_slides,
    count_unreadable,
    reporting,
    write_slides,
)  # fmt: skip
from g2l_core.store.features import FeatureStore, StoredSlide, require_whole
from g2l_core.store.formats.journal import claim_export_folder
from g2l_core.store.locks import locked_output

SUFFIXES = {"anndata": ".h5ad", "spatialdata": ".zarr"}
"""The ending of each format's files."""


def export_scverse(
    store: FeatureStore,
    folder: Path,
    layout: str,
    *,
    encoders: Sequence[str] = (),
    view: int = 0,
    where: Mapping[str, str] | None = None,
    dry_run: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Exported:
    """Write each slide as `Cohort.anndata` or `Cohort.spatialdata` gives it: folder/<slide_id>.h5ad or .zarr.

    Args:
        store: The cohort.
        folder: Where to write; made where it is missing. Files of the same names are replaced.
        layout: anndata or spatialdata.
        encoders: Their keys; empty for all. A slide that lacks some is written with the others, and named.
        view: Which view.
        where: As for `store.export.export_features`.
        dry_run: Only count, by what the store records.
        report: Is told how many slides are done, and of how many.

    Raises:
        UsageError: The package of the format is not installed, or no slide fits the conditions.
        StoreMissingError: There is nothing to export.
        StoreError: The files cannot be written.
        RunError: Another command writes into the folder, or it cannot be made.
    """
    require(layout, layout, f"--format {layout}")
    if not store.encoders:
        raise StoreMissingError(f"{store.path} has no features of any encoder yet")
    files, patches, unreadable = list[Path](), list[int](), Counter[str]()
    with nullcontext() if dry_run else locked_output(folder):
        slides, left_out = chosen_slides(store, where or {})
        if not dry_run:
            claim_export_folder(folder)
        for slide in reporting(slides, report):
            if layout == "spatialdata" and slide.facts.kind != "slide":
                left_out[slide.slide_id] = "it is a set of patch images: spatialdata needs coordinates on a slide"
                continue
            whole = _whole(slide, encoders or tuple(store.encoders), view, left_out)
            if not whole:
                continue
            try:
                status = slide.patch_status
                if not dry_run:
                    files.append(_write_slide(store, slide, folder, layout, whole, view))
            except StoreCorruptError as error:
                left_out[slide.slide_id] = f"it is damaged: {error}"
                continue
            patches.append(int((status == schema.STATUS["ok"]).sum()))
            unreadable.update(count_unreadable(status))
        if files:
            write_slides(folder / SLIDES_FILE, slides)
    return Exported(
        files=tuple(files),
        slides=len(patches),
        patches=sum(patches),
        left_out=left_out,
        unreadable=dict(unreadable),
    )


def _whole(slide: StoredSlide, encoders: Sequence[str], view: int, left_out: dict[str, str]) -> list[str]:
    """The encoders of which a slide holds the view whole; the others are named."""
    whole = []
    for encoder in encoders:
        try:
            require_whole(slide, encoder, view=view)
            whole.append(encoder)
        except StoreMissingError as error:
            left_out[f"{slide.slide_id}, {encoder}"] = str(error)
    return whole


def _write_slide(
    store: FeatureStore, slide: StoredSlide, folder: Path, layout: str, encoders: Sequence[str], view: int
) -> Path:
    part = Part(store=store.path, slide=slide, labels=())
    cells = annotated_data(store, [part], encoders, view=view, max_patches=None, seed=0)
    path = folder / f"{slide.slide_id}{SUFFIXES[layout]}"
    with writing(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        if layout == "anndata":
            cells.obs = cells.obs.dropna(axis="columns", how="all")
            write_with(path, cells.write_h5ad)
        else:
            squares = spatial_data(cells, slide_frame([part]))
            with _new_folder(path) as aside:
                squares.write(aside)
    return path


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder aside that takes the place of `target` when the block ends without an error."""
    aside = target.with_name(f"{target.name}.{os.getpid()}{schema.LEFTOVER}")
    try:
        yield aside
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)

"""Mend what a slide can prove: a file that was copied again, and tables of the store that are damaged."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from g2l_core.concurrency import run_ahead
from g2l_core.errors import ReadError, SlideError, StoreError, StoreMismatchError, UsageError
from g2l_core.extraction.given_coords import patch_coords
from g2l_core.patches.artifacts import ArtifactSpec
from g2l_core.patches.grid import GridSpec, blocks, image_order
from g2l_core.patches.render import PatchReader, RenderedBlock, open_patches, render_block
from g2l_core.patches.views import ViewSpec, columns_of, sample_views
from g2l_core.rng import keyed_generator
from g2l_core.slides.boundary import slide_errors
from g2l_core.slides.fingerprint import fingerprint
from g2l_core.slides.readers import IMAGE_SUFFIXES
from g2l_core.slides.slide import open_slide
from g2l_core.store.boundary import writing
from g2l_core.store.columns import column_tables
from g2l_core.store.features import FeatureStore, StoredSlide
from g2l_core.store.format1 import refuse_writing
from g2l_core.store.schema import PATCH_ID, SHARD_ROWS, STATUS, table_layout, text_layout
from g2l_core.store.tables import changed_blocks
from g2l_core.store.verify import Problem
from g2l_core.store.zarr_files import create_array
from g2l_core.tissue.methods import resolve_tissue
from g2l_core.types import Coords, Level0Px

COMPARED_PATCHES = 64
"""How many good patches are read again from the new file: as many as one cell has."""


def adopt_repaired(stored: StoredSlide, path: Path, grid: GridSpec, views: ViewSpec) -> None:
    """Accept `path` for a slide with unreadable patches, if it shows the known pixels wherever they are compared.

    Nothing happens if the file is the one that was cached.

    Raises:
        StoreMismatchError: Some pixels differ, or no patch was ever readable, so that nothing can be compared.
        SlideError: The file cannot be opened.
    """
    if stored.patch_ids is not None or fingerprint(path) == stored.facts.fingerprint:
        return
    good = np.flatnonzero(stored.patch_status == STATUS["ok"])
    rows = np.sort(keyed_generator("repair", grid.seed, stored.slide_id).permutation(good)[:COMPARED_PATCHES])
    if not len(rows) or not _shows_the_same(open_patches(stored, grid, path), stored, rows, views):
        raise StoreMismatchError(
            f"slide {stored.slide_id}: {path} is not the file that was cached, and the {len(rows)} patches that were "
            "compared do not show the same pixels. Cache it under another slide_id, or into another --store"
        )
    stored.set_source(path, fingerprint(path))


def _shows_the_same(reader: PatchReader, stored: StoredSlide, rows: np.ndarray, views: ViewSpec) -> bool:
    params = stored.view_params[rows][:, :1]
    block = render_block(reader, rows.tolist(), params, np.zeros(len(rows), np.uint8), views)
    return bool((block.hashes[:, 0] == stored.pixel_hash[rows, 0]).all())


# -- damaged tables ---------------------------------------------------------------------------------------

THREADS = 4

_ORDER = (PATCH_ID, "coords", "view_params", "patch_status", "pixel_hash")
"""The tables in the order in which they are derived: each from the slide and those before it."""


def repair_tables(store: FeatureStore, problems: Iterable[Problem]) -> Iterator[tuple[Problem, str]]:
    """Derive damaged tables again from their slides; what is derived counts only if its checksums are those recorded.

    A slide that is readable but does not give what was recorded is withdrawn, so that stage one caches it anew; so is
    one whose patches a network or annotations gave. One that cannot be read is left as it is.

    Args:
        store: Opened for writing, and locked by the caller.
        problems: What `verify` has found; those of tables are repaired.

    Yields:
        Each problem of a table, with what was done about it.
    """
    damaged: dict[str, list[Problem]] = {}
    for problem in problems:
        if problem.kind == "damaged" and problem.table:
            damaged.setdefault(problem.slide_id, []).append(problem)
    for slide_id, of_slide in damaged.items():
        done = _repair_slide(store, slide_id, {problem.table for problem in of_slide})
        yield from ((problem, done) for problem in of_slide)


def _repair_slide(store: FeatureStore, slide_id: str, names: set[str]) -> str:
    """Derive some tables of a slide again, or withdraw the slide; says what was done."""
    try:
        refuse_writing(store.facts.format, store.path)
        added = names.intersection(column_tables(store.slide(slide_id).facts).values())
        for name in added:  # nothing else follows from them
            store.slide(slide_id).forget_table(name)
        if names == added:
            return "dropped; who has added the column may write it again"
        underived = sorted(names.difference(_ORDER, added))
        if underived:  # labels by patch come from the manifest, which only the caching command has
            return _withdrawn(store, slide_id, f"{underived[0]} cannot be derived")
        for name in filter(names.__contains__, _ORDER):
            slide = store.slide(slide_id)
            with slide_errors(SlideError):
                fitting = (values for values in _derived(store, slide, name) if _is_recorded(slide, name, values))
                values = next(fitting, None)
            if values is None:
                return _withdrawn(store, slide_id, f"{name} cannot be derived as it was")
            _write_table(slide, name, values, columns_of(ViewSpec.from_json(store.views)))
    except UsageError as error:
        return _withdrawn(store, slide_id, f"its patches cannot be found again ({error})")
    except SlideError as error:
        source = store.slide(slide_id).facts.source
        advice = "Make it readable, or point to it with g2l store relocate, and repair again"
        return f"not repaired: {source}: {error}. {advice}"
    except StoreError as error:
        return f"not repaired: {error}"
    return "derived again, with the checksums that were recorded"


def _withdrawn(store: FeatureStore, slide_id: str, why: str) -> str:
    try:
        store.withdraw_slide(slide_id, f"{why}; what was cached of it was removed by g2l store verify --repair")
    except StoreError as error:
        return f"not repaired: {why}: {error}"
    return f"{why}; what was cached of the slide was removed. {NEXT}"


NEXT = "The caching command caches it anew, with the same inputs and options; until then it counts as failed"


def _derived(store: FeatureStore, slide: StoredSlide, name: str) -> Iterator[np.ndarray]:
    """A table as it follows from the slide and the store's settings. There may be several ways, likeliest first."""
    grid, views = GridSpec.from_json(store.grid), ViewSpec.from_json(store.views)
    match name:
        case "coords":
            yield _derived_coords(slide, grid)
        case "view_params":
            yield sample_views(views, slide.slide_id, slide.coords, range(slide.n_views), slide.patch_ids)
        case "patch_status" | "pixel_hash":
            yield from _rendered(slide, name, grid, views)
        case _:
            yield _derived_names(slide, grid)


def _derived_names(slide: StoredSlide, grid: GridSpec) -> np.ndarray:
    """The file names of patch images that are all in their folder, in stored order."""
    try:
        names = sorted(
            path.name for path in Path(slide.facts.source).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES
        )
    except OSError as error:
        raise ReadError(f"cannot read {slide.facts.source}: {error.strerror}") from error
    order = image_order(len(names), grid, slide.slide_id)[: grid.max_patches]
    return np.array([names[i] for i in order], dtype=object)


def _derived_coords(slide: StoredSlide, grid: GridSpec) -> Coords:
    facts = slide.facts
    if slide.has_patch_ids:
        return np.zeros((len(slide), 2), np.int32)
    with open_slide(Path(facts.source), manifest_mpp=facts.mpp, icc=grid.icc) as opened:
        found = resolve_tissue(grid.tissue).find(opened, slide.slide_id)
        coords, _ = patch_coords(opened, Level0Px(facts.patch_px_level0), found, grid, slide.slide_id)
        return coords


def _rendered(slide: StoredSlide, name: str, grid: GridSpec, views: ViewSpec) -> Iterator[np.ndarray]:
    """The reason codes or the pixel hashes of all recorded blocks, from the slide's pixels.

    Patches that could not be read then may be readable now, so the second way takes them as unreadable still.
    """
    wants_hashes = name == "pixel_hash"
    recorded = slide.facts.tables.get(name, {})
    known = sorted({int(block.partition(".")[2]) for block in recorded}) if wants_hashes else []
    status = slide.patch_status if wants_hashes else np.zeros(len(slide), np.uint8)
    params = slide.view_params[:, known]
    artifacts = None
    if not wants_hashes and slide.facts.kind == "slide":
        artifacts = ArtifactSpec(names=grid.artifacts, mpp=grid.mpp)
    hashes = np.zeros((len(slide), slide.n_views), np.uint64)
    reader = open_patches(slide, grid)

    def render(rows: np.ndarray) -> tuple[np.ndarray, RenderedBlock]:
        return rows, render_block(reader, rows.tolist(), params[rows], status[rows], views, artifacts)

    cells = blocks(slide.coords, Level0Px(slide.facts.patch_px_level0), grid)
    found = status.copy()
    for rows, block in run_ahead(render, (np.arange(*cell) for cell in cells), workers=THREADS, lookahead=2 * THREADS):
        found[rows] = block.status
        hashes[rows[:, None], known] = block.hashes
    reader.close()
    table = hashes if wants_hashes else found
    yield _only_recorded(table, recorded, wants_hashes)
    if not wants_hashes:
        found[[int(row) for row in slide.facts.unreadable]] = STATUS["unreadable"]
        yield _only_recorded(found, recorded, wants_hashes)


def _only_recorded(table: np.ndarray, recorded: Mapping[str, int], has_views: bool) -> np.ndarray:
    """The table with zeros where nothing has been recorded yet."""
    kept = np.zeros_like(table)
    for block in recorded:
        number, _, view = block.partition(".")
        rows = slice(int(number) * SHARD_ROWS, (int(number) + 1) * SHARD_ROWS)
        place = (rows, int(view)) if has_views else (rows,)
        kept[place] = table[place]
    return kept


def _is_recorded(slide: StoredSlide, name: str, values: np.ndarray) -> bool:
    """Whether a table is what was written, as far as that was recorded."""
    return len(values) == len(slide) and not changed_blocks(name, values, slide.facts.tables.get(name, {}))


def _write_table(slide: StoredSlide, name: str, values: np.ndarray, columns: Sequence[str]) -> None:
    """Make the array anew, for its own description may be what was damaged. Its checksums are recorded already."""
    layout = text_layout(len(values)) if name == PATCH_ID else table_layout(name, values.shape)
    attributes: dict[str, Any] = {"columns": list(columns)} if name == "view_params" else {}
    with writing(f"{name} of slide {slide.slide_id}"):
        create_array(slide.folder / name, layout, **attributes)[:] = values

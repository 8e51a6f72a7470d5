"""`g2l cache-teacher` and `g2l embed`: stage one."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from g2l_core.errors import UsageError, with_remedy
from g2l_core.options import OUTPUT, PATCHES
from g2l_core.patches.spec import GridSpec, ViewSpec
from pipeline.cli import EXIT_DONE, EXIT_SOME_FAILED
from pipeline.cli.options import Coordinates, Inputs, Json, Store, Weights, WeightsOfEach, from_specs, resolve_patches
from pipeline.cli.plan import EPOCHS, print_plan
from pipeline.cli.printing import show, tell
from pipeline.settings import ExtractionSettings, SpoolSettings, require_stained_views

if TYPE_CHECKING:
    from g2l_core.encoders.resolve import EncoderSpec
    from g2l_core.tissue.methods import TissueMethod
    from pipeline.cache_teacher import ExtractionSummary

SHOWN_REASONS = 20


@from_specs(without=("runtime",))
def cache_teacher(
    inputs: Inputs,
    store: Store,
    teacher: Annotated[str, typer.Option(help="The encoder; g2l models lists them.", show_default=False)],
    grid: GridSpec,
    views: ViewSpec,
    settings: ExtractionSettings,
    through: SpoolSettings,
    weights: Weights = None,
    coords: Coordinates = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only plan: patches, bytes, hours. See g2l plan.", rich_help_panel=OUTPUT),
    ] = False,
    as_json: Json = False,
) -> None:
    """Stage one: tile slides, run the teacher once over every patch and view, store its features.

    Interrupt it at any time: the same command again goes on where it stopped.
    """
    from g2l_core.encoders.resolve import resolve_encoder
    from pipeline.spool import told_place

    require_stained_views(views, settings)
    tissue = resolve_patches(grid.tissue, coords)
    grid = replace(grid, tissue=tissue.identity)
    specs = [resolve_encoder(teacher, weights=weights, trusted=settings.trust_code)]
    if dry_run:
        if where := told_place(store, through):
            show(where, err=True)
        raise typer.Exit(print_plan(inputs, specs, grid, tissue, views, settings, EPOCHS, as_json))
    raise typer.Exit(_extract(inputs, store, specs, grid, tissue, views, settings, through, as_json, is_teacher=True))


@from_specs(without=("pictures",), views=0)
def embed(
    inputs: Inputs,
    store: Store,
    encoder: Annotated[list[str], typer.Option(help="An encoder or run folder; repeatable.", show_default=False)],
    settings: ExtractionSettings,
    through: SpoolSettings,
    weights: WeightsOfEach = None,
    tissue: Annotated[
        str | None,
        typer.Option(
            help="The store's network or folder again, for new slides.", show_default=False, rich_help_panel=PATCHES
        ),
    ] = None,
    coords: Coordinates = None,
    dim: Annotated[
        list[int] | None,
        typer.Option(
            help="Of a run with nested features, the first so many alone; repeatable.", min=1, show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Cache any encoder's features beside the teacher's, all of them in one decode of the slides.

    The store's own grid and views are used; make it with g2l cache-teacher first.
    """
    from g2l_core.encoders.resolve import resolve_encoder
    from g2l_core.store.features import FeatureStore
    from pipeline.config import weights_by_encoder

    existing = FeatureStore.open(store)
    grid = GridSpec.from_json(existing.grid)
    method = resolve_patches(tissue or GridSpec.tissue, coords) if tissue or coords else None
    if method and method.identity != grid.tissue:
        asked = f"--coords {coords}" if coords else f"--tissue {tissue}"
        raise UsageError(f"{asked}: the store's tissue method is {grid.tissue!r}, not {method.identity!r}")
    names = [f"{name}+{width}" for name in encoder for width in dim] if dim else encoder
    given = weights_by_encoder(encoder, weights or ())
    specs = [resolve_encoder(name, weights=given.get(name), trusted=settings.trust_code) for name in names]
    views = ViewSpec.from_json(existing.views)
    raise typer.Exit(_extract(inputs, store, specs, grid, method, views, settings, through, as_json, is_teacher=False))


def _extract(
    inputs: Sequence[Path],
    store: Path,
    specs: "Sequence[EncoderSpec]",
    grid: GridSpec,
    tissue: "TissueMethod | None",
    views: ViewSpec,
    settings: ExtractionSettings,
    through: SpoolSettings,
    as_json: bool,
    *,
    is_teacher: bool,
) -> int:
    """Run stage one, print what it did, and return the exit code."""
    from g2l_core.store.location import locate
    from pipeline.cache_teacher import run_extraction
    from pipeline.spool import at_place

    again = settings.retry_failed
    with at_place(store, through, meanwhile=not again, reads_lost=again) as folder:
        summary = run_extraction(inputs, folder, specs, grid, views, settings, tissue=tissue)
    summary = replace(summary, store=locate(store))
    then = _next(summary, is_teacher=is_teacher) if summary.patches else ""
    tell(_summary_text(summary), _summary_json(summary), as_json=as_json, then=then)
    _list_losses(summary.failed_slides, {s: f"{len(r)} patches: {r[0]}" for s, r in summary.unreadable.items()})
    return EXIT_DONE if summary.is_complete else EXIT_SOME_FAILED


def _next(summary: "ExtractionSummary", *, is_teacher: bool) -> str:
    """The command that most people call next."""
    if is_teacher:
        return f"g2l distill --store {summary.store} --teacher {summary.encoders[0]} --student hibou-l --out RUN"
    return f"g2l bench TASKS --store {summary.store} --encoders TEACHER,{','.join(summary.encoders)} --out REPORT"


def _summary_json(summary: "ExtractionSummary") -> dict[str, Any]:
    return {
        "store": str(summary.store),
        "encoders": list(summary.encoders),
        "slides": summary.slides,
        "patches": summary.patches,
        "encoded": summary.encoded,
        "failed_slides": summary.failed_slides,
        "unreadable": summary.unreadable,
        "left_out": summary.left_out,
        "notes": list(summary.notes),
        "seconds": {part: round(seconds, 3) for part, seconds in summary.seconds.items()},
    }


def _summary_text(summary: "ExtractionSummary") -> str:
    done = f"{summary.store}: {summary.patches:,} patches of {summary.slides} slides for {', '.join(summary.encoders)}"
    lines = [f"{done}; {_encoded(summary)}"]
    if summary.left_out:
        lines.append("left out: " + ", ".join(f"{count:,} {name}" for name, count in summary.left_out.items()))
    return "\n".join([*lines, *(f"note: {note}" for note in summary.notes)])


def _encoded(summary: "ExtractionSummary") -> str:
    lost = [f"{len(summary.failed_slides):,} slides failed"] if summary.failed_slides else []
    if summary.unreadable:
        lost.append(f"{sum(map(len, summary.unreadable.values())):,} patches are unreadable")
    if summary.encoded:
        return ", ".join([f"{summary.encoded:,} encoded now", *lost])
    if not summary.patches:
        return ", ".join(["nothing is stored", *lost])
    return ", ".join(["nothing was encoded now", *lost]) if lost else "all of them were stored already"


def _list_losses(*losses: dict[str, str]) -> None:
    """Name on stderr everything that was lost, with its reason; slides that share a reason are one line."""
    from pipeline.cache_teacher import some

    for group in losses:
        shared: dict[str, list[str]] = {}
        for slide_id, reason in group.items():
            shared.setdefault(re.sub(rf"(?<!\w){re.escape(slide_id)}(?!\w)", "", reason), []).append(slide_id)
        for names in list(shared.values())[:SHOWN_REASONS]:
            count = f"{len(names):,} slides, " if len(names) > 1 else ""
            show(f"failed  {count}{some(names)}: {with_remedy(group[names[0]])}", err=True)
        if len(shared) > SHOWN_REASONS:
            rest = sum(map(len, list(shared.values())[SHOWN_REASONS:]))
            show(f"failed  and {rest} more; g2l store info lists all", err=True)

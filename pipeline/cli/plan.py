"""`g2l plan`, and `g2l cache-teacher --dry-run`: what stage one would do and cost."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from g2l_core.errors import UsageError
from g2l_core.options import PATCHES
from g2l_core.patches.spec import GridSpec, ViewSpec
from pipeline.cli import EXIT_DONE, EXIT_SOME_FAILED
from pipeline.cli.options import Coordinates, Json, Weights, from_specs, resolve_patches
from pipeline.cli.printing import show, tell
from pipeline.settings import ExtractionSettings, require_stained_views

if TYPE_CHECKING:
    from g2l_core.encoders.resolve import EncoderSpec
    from g2l_core.tissue.methods import TissueMethod

EPOCHS = 10
NOT_PLANNED = (
    "accept_mpp", "force_mpp", "retry_failed", "local_workers", "scheduler", "stage_dir", "stage_gb", "pictures",
    "runtime",
)  # fmt: skip
"""Settings of stage one that change nothing in a plan."""


@from_specs(without=NOT_PLANNED)
def plan(
    teacher: Annotated[list[str], typer.Option(help="The encoder; repeatable.", show_default=False)],
    grid: GridSpec,
    views: ViewSpec,
    settings: ExtractionSettings,
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(
            help="As of g2l cache-teacher. Without any: --slides, --patches-per-slide, --gpu.", show_default=False
        ),
    ] = None,
    slides: Annotated[
        int | None, typer.Option(min=1, help="Forecast so many slides that are not at hand.", show_default=False)
    ] = None,
    patches_per_slide: Annotated[
        int | None, typer.Option(min=1, help="Patches of each of them.", show_default=False)
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="The GPU that they would be encoded on, such as h200 or rtx4090.", show_default=False),
    ] = None,
    weights: Weights = None,
    coords: Coordinates = None,
    epochs: Annotated[
        int, typer.Option(min=1, help="Epochs of distillation that the views are for.", rich_help_panel=PATCHES)
    ] = EPOCHS,
    as_json: Json = False,
) -> None:
    """Patches, gigabytes, hours and bottleneck of g2l cache-teacher, before anything is written.

    Thumbnails are read to count patches; a few hundred patches are read and encoded to measure this machine. Without
    slides, speeds are published ones, or data sheets' where there are none; the plan says which.
    """
    from g2l_core.encoders.resolve import resolve_encoder

    if given := [value for value in (slides, patches_per_slide, gpu) if value is not None]:
        if inputs or len(given) < 3 or slides is None or patches_per_slide is None or gpu is None:
            raise UsageError(
                "a forecast without slides needs all of --slides, --patches-per-slide and --gpu, and no INPUT"
            )
        raise typer.Exit(_print_forecast(teacher, slides, patches_per_slide, gpu, settings, epochs, as_json))
    if not inputs:
        raise UsageError("expected INPUT, your slides; or --slides, --patches-per-slide and --gpu in their place")
    require_stained_views(views, settings)
    tissue = resolve_patches(grid.tissue, coords)
    specs = [resolve_encoder(name, weights=weights, trusted=settings.trust_code) for name in teacher]
    grid = replace(grid, tissue=tissue.identity)
    raise typer.Exit(print_plan(inputs, specs, grid, tissue, views, settings, epochs, as_json))


def _print_forecast(
    teachers: Sequence[str],
    slides: int,
    patches_per_slide: int,
    gpu: str,
    settings: ExtractionSettings,
    epochs: int,
    as_json: bool,
) -> int:
    """Forecast slides that are not at hand. Encoders need no weights for it."""
    from g2l_core.encoders.resolve import resolve_encoder
    from pipeline.plan import plan_json, plan_text, plan_without_slides

    specs = [
        resolve_encoder(
            name, weights="random:0" if name.lower().startswith("timm:") else None, trusted=settings.trust_code
        )
        for name in teachers
    ]
    made = plan_without_slides(specs, slides, patches_per_slide, gpu, settings, epochs)
    tell(plan_text(made), plan_json(made), as_json=as_json)
    return EXIT_DONE


def print_plan(
    inputs: Sequence[Path],
    specs: "Sequence[EncoderSpec]",
    grid: GridSpec,
    tissue: "TissueMethod | None",
    views: ViewSpec,
    settings: ExtractionSettings,
    epochs: int,
    as_json: bool,
) -> int:
    """Make the plan, print it, and return the exit code."""
    from g2l_core.encoders.loading import require_input_side
    from g2l_core.slides.manifest import read_sources
    from g2l_core.slides.mpp import audit_table
    from pipeline.audit import audit_sources
    from pipeline.plan import make_plan, plan_json, plan_text

    for spec in specs:
        require_input_side(spec)
    sources = read_sources(inputs)
    facts, findings, _ = audit_sources(
        sources, mpp_override=settings.mpp_override, workers=settings.workers, timeout=settings.slide_timeout
    )
    if facts:
        show(audit_table(facts, findings), err=True)
    made = make_plan(sources, specs, grid, views, settings, tissue=tissue, epochs=epochs)
    tell(plan_text(made), plan_json(made), as_json=as_json)
    return EXIT_SOME_FAILED if made.failed_slides else EXIT_DONE

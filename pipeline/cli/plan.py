"""`g2l plan`, and `--dry-run`: know before you run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import (
    Artifacts,
    BatchSize,
    Compile,
    CropPx,
    Device,
    Inputs,
    Json,
    MaxPatches,
    MinTissue,
    Mpp,
    MppOverride,
    PatchPx,
    Precision,
    Seed,
    Tissue,
    Weights,
    Workers,
    grid_of,
)

if TYPE_CHECKING:
    from g2l_core.encoders.resolve import EncoderSpec
    from g2l_core.patches.grid import GridSpec
    from g2l_core.patches.views import ViewSpec
    from g2l_core.tissue.methods import TissueMethod
    from pipeline.extract import ExtractionSettings

EPOCHS = 10


def plan(
    inputs: Inputs,
    teacher: Annotated[list[str], typer.Option(help="The encoder; repeatable.", show_default=False)],
    views: Annotated[int, typer.Option(min=0, help="Augmented views beside the canonical one.")] = 2,
    weights: Weights = None,
    mpp: Mpp = 0.5,
    patch_px: PatchPx = 256,
    crop_px: CropPx = 224,
    max_patches: MaxPatches = None,
    tissue: Tissue = "otsu",
    min_tissue: MinTissue = 0.25,
    artifacts: Artifacts = "black,pen,blurred",
    seed: Seed = 0,
    mpp_override: MppOverride = None,
    device: Device = "auto",
    precision: Precision = "auto",
    compiled: Compile = False,
    batch_size: BatchSize = 32,
    workers: Workers = 2,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of distillation that the views are for.")] = EPOCHS,
    as_json: Json = False,
) -> None:
    """Patches, gigabytes, hours and bottleneck of g2l cache-teacher, before anything is written.

    Thumbnails are read to count patches; a few hundred patches are read and encoded to measure this machine.
    """
    from g2l_core.encoders.resolve import resolve_encoder
    from g2l_core.patches.views import ViewSpec
    from pipeline.extract import ExtractionSettings

    grid, method = grid_of(
        mpp=mpp,
        patch_px=patch_px,
        tissue=tissue,
        artifacts=artifacts,
        min_tissue=min_tissue,
        max_patches=max_patches,
        seed=seed,
    )
    settings = ExtractionSettings(
        views=views,
        device=device,
        precision=f"{precision}+compile" if compiled else precision,
        batch_size=batch_size,
        workers=workers,
        mpp_override=mpp_override,
    )
    view_spec = ViewSpec(patch_px=patch_px, crop_px=crop_px, seed=seed)
    specs = [resolve_encoder(name, weights=weights) for name in teacher]
    tell(inputs, specs, grid, method, view_spec, settings, epochs, as_json)


def tell(
    inputs: Sequence[Path],
    specs: "Sequence[EncoderSpec]",
    grid: "GridSpec",
    tissue: "TissueMethod | None",
    views: "ViewSpec",
    settings: "ExtractionSettings",
    epochs: int,
    as_json: bool,
) -> None:
    """Make the plan, print it, and leave with the exit code."""
    from g2l_core.slides.manifest import read_sources
    from g2l_core.slides.mpp import audit_table
    from pipeline.audit import audit_sources
    from pipeline.plan import make_plan, plan_json, plan_text

    sources = read_sources(inputs)
    facts, findings, _ = audit_sources(sources, mpp_override=settings.mpp_override, workers=settings.workers)
    if facts:
        typer.echo(audit_table(facts, findings), err=True)
    found = make_plan(sources, specs, grid, views, settings, tissue=tissue, epochs=epochs)
    typer.echo(json.dumps(plan_json(found), indent=2) if as_json else plan_text(found))
    raise typer.Exit(1 if found.failed_slides else 0)

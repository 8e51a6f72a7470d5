"""The command line: parse, call a stage, print. Stages are imported inside the commands, so that help is quick."""

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from g2l_core import __version__
from g2l_core.errors import G2LError, UsageError
from pipeline.cli import datasets as cli_datasets
from pipeline.cli import distill as cli_distill
from pipeline.cli import models as cli_models
from pipeline.cli import plan as cli_plan
from pipeline.cli import store as cli_store
from pipeline.cli.options import (
    AcceptMpp,
    Artifacts,
    BatchSize,
    Compile,
    CropPx,
    Device,
    DryRun,
    ForceMpp,
    Inputs,
    Json,
    LocalWorkers,
    MaxPatches,
    MinTissue,
    Mpp,
    MppOverride,
    PatchPx,
    Pictures,
    Precision,
    RetryFailed,
    Scheduler,
    Seed,
    StageDir,
    StageGb,
    Store,
    Tissue,
    Weights,
    Workers,
    grid_of,
)

if TYPE_CHECKING:
    from g2l_core.patches.grid import GridSpec
    from g2l_core.tissue.methods import TissueMethod
    from pipeline.cache_teacher import ExtractionSummary

EXIT_DONE, EXIT_SOME_FAILED, EXIT_REFUSED, EXIT_INTERRUPTED = 0, 1, 2, 130
SHOWN_REASONS = 20

app = typer.Typer(
    name="g2l",
    help="Cache a giga-scale pathology teacher once, distill a cancer-specific student, benchmark both.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def show_version(asked: bool) -> None:
    """Print the version and leave; before the parser misses a command."""
    if asked:
        typer.echo(f"g2l {__version__}")
        raise typer.Exit


@app.callback()
def settings(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    _version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=show_version, is_eager=True),
    ] = False,
) -> None:
    """Options before the command."""
    sys.excepthook = sys.__excepthook__ if debug else explain


@app.command(name="cache-teacher")
def cache_teacher(
    inputs: Inputs,
    store: Store,
    teacher: Annotated[str, typer.Option(help="The encoder; g2l models lists them.", show_default=False)],
    views: Annotated[int, typer.Option(min=0, help="Augmented views beside the canonical one.")] = 2,
    weights: Weights = None,
    mpp: Mpp = 0.5,
    patch_px: PatchPx = 256,
    crop_px: CropPx = 224,
    max_patches: MaxPatches = None,
    tissue: Tissue = "otsu",
    min_tissue: MinTissue = 0.25,
    artifacts: Artifacts = "black,pen,blurred",
    pictures: Pictures = True,
    seed: Seed = 0,
    mpp_override: MppOverride = None,
    accept_mpp: AcceptMpp = False,
    force_mpp: ForceMpp = False,
    device: Device = "auto",
    precision: Precision = "auto",
    compiled: Compile = False,
    batch_size: BatchSize = 32,
    workers: Workers = 2,
    local_workers: LocalWorkers = 0,
    scheduler: Scheduler = None,
    stage_dir: StageDir = None,
    stage_gb: StageGb = 50.0,
    retry_failed: RetryFailed = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Stage one: tile slides, run the teacher once over every patch and view, store its features.

    Interrupt it at any time: the same command again goes on where it stopped.
    """
    grid, method = grid_of(
        mpp=mpp,
        patch_px=patch_px,
        tissue=tissue,
        artifacts=artifacts,
        min_tissue=min_tissue,
        max_patches=max_patches,
        seed=seed,
    )
    how = {"views": views, "device": device, "precision": precision, "batch_size": batch_size, "workers": workers}
    how["precision"] = f"{precision}+compile" if compiled else precision
    how |= {"mpp_override": mpp_override, "accept_mpp": accept_mpp, "force_mpp": force_mpp}
    how |= {"stage_dir": stage_dir, "stage_gb": stage_gb, "local_workers": local_workers, "scheduler": scheduler}
    how |= {"retry_failed": retry_failed}
    how |= {"pictures": pictures}
    _run_cache(inputs, store, [teacher], weights, grid, method, {"crop_px": crop_px}, how, dry_run, as_json)


@app.command()
def embed(
    inputs: Inputs,
    store: Store,
    encoder: Annotated[list[str], typer.Option(help="An encoder or run folder; repeatable.", show_default=False)],
    views: Annotated[int, typer.Option(min=0, help="Augmented views beside the canonical one.")] = 0,
    weights: Weights = None,
    tissue: Annotated[
        str | None, typer.Option(help="The store's network or folder again, for new slides.", show_default=False)
    ] = None,
    mpp_override: MppOverride = None,
    accept_mpp: AcceptMpp = False,
    force_mpp: ForceMpp = False,
    device: Device = "auto",
    precision: Precision = "auto",
    compiled: Compile = False,
    batch_size: BatchSize = 32,
    workers: Workers = 2,
    local_workers: LocalWorkers = 0,
    scheduler: Scheduler = None,
    stage_dir: StageDir = None,
    stage_gb: StageGb = 50.0,
    retry_failed: RetryFailed = False,
    as_json: Json = False,
) -> None:
    """Cache any encoder's features beside the teacher's, all of them in one decode of the slides.

    The store's own grid and views are used; make it with g2l cache-teacher first.
    """
    from g2l_core.patches.grid import GridSpec
    from g2l_core.store.features import FeatureStore
    from g2l_core.tissue.methods import resolve_tissue

    existing = FeatureStore.open(store)
    how = {"views": views, "device": device, "precision": precision, "batch_size": batch_size, "workers": workers}
    how["precision"] = f"{precision}+compile" if compiled else precision
    how |= {"mpp_override": mpp_override, "accept_mpp": accept_mpp, "force_mpp": force_mpp}
    how |= {"stage_dir": stage_dir, "stage_gb": stage_gb, "local_workers": local_workers, "scheduler": scheduler}
    how |= {"retry_failed": retry_failed}
    grid = GridSpec.from_json(existing.grid)
    method = resolve_tissue(tissue) if tissue else None
    if method and method.identity != grid.tissue:
        raise UsageError(f"--tissue {tissue}: the store's tissue method is {grid.tissue!r}, not {method.identity!r}")
    _run_cache(inputs, store, encoder, weights, grid, method, existing.views, how, False, as_json)


def _run_cache(
    inputs: Sequence[Path],
    store: Path,
    encoders: Sequence[str],
    weights: str | None,
    grid: "GridSpec",
    tissue: "TissueMethod | None",
    views: dict[str, Any],
    how: dict[str, Any],
    dry_run: bool,
    as_json: bool,
) -> None:
    from g2l_core.encoders.resolve import resolve_encoder
    from g2l_core.patches.views import ViewSpec
    from pipeline.cache_teacher import run_extraction
    from pipeline.extract import ExtractionSettings

    if how["local_workers"] and how["scheduler"]:
        raise UsageError("--local-workers starts processes here, --scheduler uses those of others: give one of them")
    specs = [resolve_encoder(name, weights=weights) for name in encoders]
    if len(specs) > 1 and weights is not None:
        raise UsageError("--weights speaks of one encoder; embed them one after the other")
    view_spec = ViewSpec(**{"patch_px": grid.patch_px, "seed": grid.seed, **views})
    if dry_run:
        cli_plan.tell(inputs, specs, grid, tissue, view_spec, ExtractionSettings(**how), cli_plan.EPOCHS, as_json)
    summary = run_extraction(inputs, store, specs, grid, view_spec, ExtractionSettings(**how), tissue=tissue)
    typer.echo(json.dumps(_cache_json(summary), indent=2) if as_json else _cache_text(summary))
    _list_losses(summary.failed_slides, {s: f"{len(r)} patches: {r[0]}" for s, r in summary.unreadable.items()})
    raise typer.Exit(EXIT_DONE if summary.is_complete else EXIT_SOME_FAILED)


def _cache_json(summary: "ExtractionSummary") -> dict[str, Any]:
    return {
        "store": str(summary.store),
        "encoders": list(summary.encoders),
        "slides": summary.slides,
        "patches": summary.patches,
        "encoded": summary.encoded,
        "failed_slides": summary.failed_slides,
        "unreadable": summary.unreadable,
        "left_out": summary.left_out,
        "seconds": {part: round(seconds, 3) for part, seconds in summary.seconds.items()},
    }


def _cache_text(summary: "ExtractionSummary") -> str:
    done = f"{summary.store}: {summary.patches:,} patches of {summary.slides} slides for {', '.join(summary.encoders)}"
    done += f"; {summary.encoded:,} encoded now" if summary.encoded else "; all of them were stored already"
    left_out = ", ".join(f"{count:,} {name}" for name, count in summary.left_out.items())
    return f"{done}\nleft out: {left_out}" if left_out else done


def _list_losses(*losses: dict[str, str]) -> None:
    """Name on stderr everything that was lost, with its reason."""
    for group in losses:
        for slide_id, reason in list(group.items())[:SHOWN_REASONS]:
            typer.echo(f"failed  {slide_id}: {reason}", err=True)
        if len(group) > SHOWN_REASONS:
            typer.echo(f"failed  and {len(group) - SHOWN_REASONS} more; g2l store info lists all", err=True)


app.command()(cli_distill.distill)


@app.command()
def bench(
    tasks: Annotated[Path, typer.Argument(help="The task file (TOML), or a shipped one's name.", show_default=False)],
    store: Annotated[list[Path], typer.Option(help="A feature store; repeatable.", show_default=False)],
    encoders: Annotated[
        str, typer.Option(help="Names, keys or run folders, by comma; the teacher first.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The report's folder.", show_default=False)],
    baseline: Annotated[
        str, typer.Option(help="An encoder to take further differences from.", show_default=False)
    ] = "",
    draws: Annotated[int, typer.Option(min=100, help="Bootstrap resamples.")] = 1000,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="Where CKA's sums are taken: cpu, cuda or auto.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Stage three: CKA, kNN, linear probe and robustness from stored features alone, with intervals."""
    from g2l_core.report.write import terminal_table
    from pipeline.bench import refuse_no_results, run_bench

    names = [name.strip() for name in encoders.split(",") if name.strip()]
    report = run_bench(tasks, store, names, out, baseline=baseline, draws=draws, seed=seed, device=device)
    for failure in report.failures:
        who = f" ({failure.encoder})" if failure.encoder else ""
        typer.echo(f"failed  {failure.task}{who}: {failure.reason}", err=True)
    refuse_no_results(report)
    typer.echo((out / "results.json").read_text(encoding="utf-8") if as_json else terminal_table(report))
    if not as_json:
        typer.echo(f"report: {out / 'report.html'}")
    raise typer.Exit(EXIT_SOME_FAILED if report.failures else EXIT_DONE)


app.command()(cli_distill.sweep)
app.command(name="export-student")(cli_distill.export_student)
app.command()(cli_plan.plan)
app.command()(cli_models.models)
app.command()(cli_datasets.datasets)
app.add_typer(cli_store.app, name="store")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("g2l-demo"),
    slides: Annotated[
        Path | None, typer.Option(help="Your own slides in place of drawn ones.", show_default=False)
    ] = None,
    teacher: Annotated[str, typer.Option(help="The teacher.")] = "efficientnet-lite0@128",
    student: Annotated[str, typer.Option(help="The student, untrained.")] = "timm:mobilenetv3_small_100@128",
    steps: Annotated[int, typer.Option(min=20, help="Steps of distillation.")] = 400,
    mpp_override: MppOverride = None,
    seed: Seed = 0,
    workers: Workers = 2,
) -> None:
    """All three stages on a small drawn cohort, or on your slides: before and after distillation, in minutes."""
    from pipeline.demo import DemoSettings, run_demo

    found = DemoSettings(
        teacher=teacher, student=student, steps=steps, mpp_override=mpp_override, seed=seed, workers=workers
    )
    typer.echo(run_demo(out, slides, found))


def explain(kind: type[BaseException], error: BaseException, _trace: TracebackType | None) -> None:
    """One clear line in place of a traceback."""
    if issubclass(kind, G2LError):
        typer.echo(f"error: {error}", err=True)
    else:
        typer.echo(f"internal error: {kind.__name__}: {error}\nrun g2l --debug ... for the traceback", err=True)


def main() -> None:
    """The console script: runs the command line, turns errors into exit codes."""
    sys.excepthook = explain
    signal.signal(signal.SIGINT, interrupt)
    try:
        app()
    except G2LError as error:
        sys.excepthook(type(error), error, error.__traceback__)
        raise SystemExit(EXIT_REFUSED) from None


def interrupt(_signal: int, _frame: FrameType | None) -> None:
    """Leave on Ctrl-C at once, with the exit code that says so.

    As after `kill -9`, what is recorded is kept; an orderly shutdown would wait for batches under way in other
    threads, or tear Zarr's event loop from under them.
    """
    typer.echo("\ninterrupted; what is recorded is kept, and the same call goes on from there", err=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()

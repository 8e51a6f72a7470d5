"""`g2l fit-head` and `g2l predict`: from a student to a slide's answer."""

from pathlib import Path
from typing import Annotated

import typer

from g2l_core.options import OUTPUT, PATCHES
from pipeline.cli import EXIT_DONE, EXIT_SOME_FAILED
from pipeline.cli.options import Inputs, Json, Seed, from_specs
from pipeline.cli.printing import show, show_next, tell
from pipeline.settings import ExtractionSettings


def fit_head(
    tasks: Annotated[Path, typer.Argument(help="The task file (TOML), or a shipped one's name.", show_default=False)],
    store: Annotated[list[Path], typer.Option(help="A feature store; repeatable.", show_default=False)],
    encoder: Annotated[
        str, typer.Option(help="A run folder, whose student goes with the head; or a name.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The head's folder.", show_default=False)],
    task: Annotated[str, typer.Option(help="The task, if the file has several.", show_default=False)] = "",
    kind: Annotated[
        str,
        typer.Option(
            help="probe, slide_probe, abmil or regression; without it the first that the task evaluates.",
            show_default=False,
        ),
    ] = "",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Fit a classifier of a task on stored features, calibrated, to travel with its student.

    The folder holds all that g2l predict needs: head, student, and its figures with intervals.
    """
    from g2l_core.heads.head import RECORD, describe
    from pipeline.fit_head import run_fit_head

    head = run_fit_head(tasks, task, store, encoder, out, kind=kind, seed=seed)
    if as_json:
        typer.echo((out / RECORD).read_text(encoding="utf-8"))
        return
    show("\n".join([*describe(head.facts), f"figures are of {head.facts.figures_of}", f"head: {out}"]))
    show_next(f"g2l predict SLIDES --head {out} --out FOLDER")


@from_specs(without=("views", "precision", "pictures"))
def predict(
    inputs: Inputs,
    head: Annotated[Path, typer.Option(help="The folder of g2l fit-head.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The folder of predictions.csv and heatmaps.", show_default=False)],
    settings: ExtractionSettings,
    store: Annotated[
        Path | None,
        typer.Option(help="Keep features in this store, in place of OUT/features.zarr.", show_default=False),
    ] = None,
    tissue: Annotated[
        str | None,
        typer.Option(help="The head's network or folder of tissue again.", show_default=False, rich_help_panel=PATCHES),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Encode at most this share of each slide's patches, such as 0.1, and estimate its answer; all if not "
            "given.",
            show_default=False,
            rich_help_panel=PATCHES,
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="With --budget: stop a slide once its probabilities are known to this difference, and its class; "
            "0.01 if not given.",
            show_default=False,
            rich_help_panel=PATCHES,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="With --budget: random seed of the patches that are encoded; 0 if not given.",
            show_default=False,
            rich_help_panel=PATCHES,
        ),
    ] = None,
    pictures: Annotated[
        bool, typer.Option("--pictures/--no-pictures", help="Draw heatmaps.", rich_help_panel=OUTPUT)
    ] = True,
    as_json: Json = False,
) -> None:
    """Answer for every slide: tissue, patches, student and head in one go, with heatmaps for QuPath.

    Interrupt it at any time: the same command again goes on where it stopped.
    """
    from pipeline.budget import budget_of
    from pipeline.cli.options import resolve_patches
    from pipeline.predict import run_predict, summary_json, summary_text

    some = budget_of(budget, tolerance, seed)
    method = resolve_patches(tissue, None) if tissue else None
    summary = run_predict(inputs, head, out, settings, store=store, tissue=method, pictures=pictures, budget=some)
    tell(summary_text(summary), summary_json(summary), as_json=as_json)
    for slide_id, reason in summary.failed.items():
        show(f"failed  {slide_id}: {reason}", err=True)
    raise typer.Exit(EXIT_SOME_FAILED if summary.failed else EXIT_DONE)

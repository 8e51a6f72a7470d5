"""`g2l run` and `g2l init`: a whole study from one file."""

import json
from pathlib import Path
from typing import Annotated

import typer

from g2l_core.options import OUTPUT
from pipeline.cli import EXIT_DONE, EXIT_SOME_FAILED
from pipeline.cli.options import Json, TrustCode, from_specs

NEXT = {
    "oscc": "the images as published, and the commands of docs/reproduce.md",
    "crc": "the images as published, and the commands of docs/reproduce.md",
    "slurm": "sbatch cache-teacher.sbatch, as its first lines say; see docs/howto/cluster.md",
    "nextflow": "nextflow run main.nf, as its first lines say; see docs/howto/cluster.md",
}
"""What one does with the files of an example that is no study."""


@from_specs()
def run(
    study: Annotated[str, typer.Argument(help="A study file (TOML), or demo, breast or prostate.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="The study's folder; its name here if not given.", show_default=False)
    ] = None,
    trust_code: TrustCode = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Only tell what would be done: steps, hours, gigabytes.", rich_help_panel=OUTPUT
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a study: cache the teacher, distill, cache what is compared, benchmark; all of it in one folder.

    Interrupt it at any time: the same command goes on where it stopped, and skips what is done.
    """
    from pipeline.study_file import find_study, read_study
    from pipeline.study_settings import resolve_study

    folder = out or Path(find_study(study).stem)
    resolved = resolve_study(read_study(study), folder, trust_code or ())
    if dry_run:
        from pipeline.study_plan import plan_study, plan_text

        plan = plan_study(resolved)
        typer.echo(json.dumps(plan.to_json(), indent=2) if as_json else plan_text(plan))
        return
    from g2l_core.report.write import terminal_table
    from pipeline.bench import refuse_no_results
    from pipeline.study import run_study

    outcome = run_study(resolved)
    for slide_id, reason in outcome.failed_slides.items():
        typer.echo(f"failed  {slide_id}: {reason}", err=True)
    for failure in outcome.report.failures:
        typer.echo(f"failed  {failure.task}: {failure.reason}", err=True)
    refuse_no_results(outcome.report)
    page = resolved.report / "report.html"
    typer.echo(
        (resolved.report / "results.json").read_text(encoding="utf-8")
        if as_json
        else f"{terminal_table(outcome.report)}\nreport: {page}"
    )
    raise typer.Exit(EXIT_SOME_FAILED if outcome.failed_slides or outcome.report.failures else EXIT_DONE)


@from_specs()
def init(
    folder: Annotated[Path, typer.Argument(help="Where to; made if it is missing.")] = Path(),
    example: Annotated[
        str | None,
        typer.Option(
            help="Write a shipped example in place of a blank study: its files, for data that you have; nothing is "
            "downloaded. demo, breast, prostate, oscc, crc, slurm or nextflow.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write study.toml, a study file with every key explained, for g2l run; or the files of a shipped example."""
    from pipeline.study_template import write_example, write_template

    written = write_example(example, folder) if example else [write_template(folder)]
    if as_json:
        typer.echo(json.dumps({"written": list(map(str, written))}, indent=2))
        return
    for path in written:
        typer.echo(f"{path}")
    typer.echo(f"next: {NEXT.get(example or '', f'edit it, then g2l run {written[0]} --dry-run')}")

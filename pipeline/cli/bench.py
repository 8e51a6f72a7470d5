"""`g2l bench`: stage three."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from g2l_core.options import MACHINE
from pipeline.cli import EXIT_DONE, EXIT_SOME_FAILED
from pipeline.cli.options import Json, Seed, from_specs
from pipeline.cli.printing import show, show_next


@from_specs()
def bench(
    tasks: Annotated[Path, typer.Argument(help="The task file (TOML), or a shipped one's name.", show_default=False)],
    store: Annotated[list[Path], typer.Option(help="A feature store; repeatable.", show_default=False)],
    encoders: Annotated[
        str,
        typer.Option(
            help="Names, keys or run folders, by comma; the teacher first. ALIAS=NAME is called ALIAS in the report. "
            "Runs that a pattern names and that differ in their seed alone are one encoder: a mean over seeds.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="The report's folder: an empty one, a new one, or one with a report, which is replaced.",
            show_default=False,
        ),
    ],
    baseline: Annotated[
        str, typer.Option(help="An encoder to take further differences from.", show_default=False)
    ] = "",
    draws: Annotated[
        int, typer.Option(min=100, help="Random exchanges of two encoders, where there are too many to try all.")
    ] = 1000,
    margin: Annotated[
        float, typer.Option(min=0.0, help="By how much encoders may differ and still count as equally good.")
    ] = 0.02,
    seed: Seed = 0,
    device: Annotated[
        str, typer.Option(help="Where CKA's sums are taken: cpu, cuda or auto.", rich_help_panel=MACHINE)
    ] = "cpu",
    as_json: Json = False,
) -> None:
    """Stage three: CKA, kNN, linear probe and robustness from stored features alone, with intervals."""
    from g2l_core.report.write import terminal_table
    from pipeline.aliases import split_names
    from pipeline.bench import refuse_no_results, run_bench

    names = split_names(encoders)
    report = run_bench(
        tasks, store, names, out, baseline=baseline, draws=draws, margin=margin, seed=seed, device=device
    )
    for failure in report.failures:
        who = f" ({failure.encoder})" if failure.encoder else ""
        show(f"failed  {failure.task}{who}: {failure.reason}", err=True)
    refuse_no_results(report)
    typer.echo((out / "results.json").read_text(encoding="utf-8") if as_json else terminal_table(report))
    if not as_json:
        show(f"report: {out / 'report.html'}")
        show_next(f"g2l fit-head {tasks} --store {store[0]} --encoder {_last_single(names)} --out HEAD")
    raise typer.Exit(EXIT_SOME_FAILED if report.failures else EXIT_DONE)


def _last_single(names: Sequence[str]) -> str:
    """The last of the encoders that is named by its own name, not by an alias or a pattern of seeds."""
    return next((name for name in reversed(names) if not set("*?[=") & set(name)), "ENCODER")

"""`g2l demo`: all three stages in minutes."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import from_specs
from pipeline.settings import DemoSettings


@from_specs()
def demo(
    settings: DemoSettings,
    out: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("g2l-demo"),
    slides: Annotated[
        Path | None, typer.Option(help="Your own slides in place of drawn ones.", show_default=False)
    ] = None,
) -> None:
    """All three stages on a small drawn cohort, or on your slides: before and after distillation, in minutes."""
    from pipeline.demo import run_demo

    typer.echo(run_demo(out, slides, settings))

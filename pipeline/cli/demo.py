"""`g2l demo`: all three stages in minutes."""

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import Json, from_specs
from pipeline.cli.printing import tell
from pipeline.settings import DemoSettings


@from_specs()
def demo(
    settings: DemoSettings,
    out: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("g2l-demo"),
    slides: Annotated[
        Path | None, typer.Option(help="Your own slides in place of drawn ones.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """All three stages on a small drawn cohort, or on your slides: before and after distillation, in minutes."""
    from pipeline.demo import run_demo

    text = run_demo(out, slides, settings)
    results = {} if not as_json else json.loads((out / "report" / "results.json").read_text(encoding="utf-8"))
    tell(text, results, as_json=as_json, then="g2l plan YOUR-SLIDES --teacher h-optimus-0")

"""`g2l view`: a store as a page to send."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import Json, from_specs
from pipeline.cli.printing import show, tell
from pipeline.settings import ViewSettings


@from_specs()
def view(
    store: Annotated[Path, typer.Argument(help="The store.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The page: FILE.html, or a folder for index.html.", show_default=False)],
    settings: ViewSettings,
    slide: Annotated[
        list[str] | None, typer.Option(help="A slide to show, by its id; repeatable.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a store as one page without a server: slides, colors of their features, labels, similar patches.

    The page holds everything and is made to be sent. Slides are read where they are at hand; no network is run.
    """
    from pipeline.tables import bytes_text
    from pipeline.view import run_view

    made = run_view(store, out, settings, slide or ())
    for note in made.notes:
        show(f"note  {note}", err=True)
    text = f"{made.page}: slides by {made.encoder}, {made.with_pictures} of {made.slides} with pictures"
    tell(f"{text}, {bytes_text(made.size)}; open it in a browser, or send it", asdict(made), as_json=as_json)

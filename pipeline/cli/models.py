"""`g2l models`: the encoders that have names."""

from typing import Annotated

import typer

from pipeline.cli.options import from_specs


@from_specs()
def models(
    name: Annotated[str | None, typer.Argument(help="Show all about one encoder.", show_default=False)] = None,
) -> None:
    """List the encoders that have names, or show one."""
    from g2l_core.encoders.resolve import resolve_encoder
    from g2l_core.encoders.tables import encoder_lines, setting_lines

    if name is None:
        lines = encoder_lines()
    else:
        weights = "random:0" if name.lower().startswith("timm:") else None
        lines = setting_lines(resolve_encoder(name, weights=weights, trusted=None))
    typer.echo("\n".join(lines))

"""`g2l models`: the encoders that have names."""

from typing import Annotated

import typer

from pipeline.cli.options import Json, from_specs
from pipeline.cli.printing import tell


@from_specs()
def models(
    name: Annotated[str | None, typer.Argument(help="Show all about one encoder.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """List the encoders that have names, or show one."""
    from g2l_core.encoders.registry import TABLE
    from g2l_core.encoders.resolve import resolve_encoder
    from g2l_core.encoders.spec import spec_to_json
    from g2l_core.encoders.tables import encoder_lines, setting_lines

    if name is None:
        lines, facts = encoder_lines(), {key: spec_to_json(spec) for key, spec in TABLE.items()}
    else:
        weights = "random:0" if name.lower().startswith("timm:") else None
        spec = resolve_encoder(name, weights=weights, trusted=None)
        lines, facts = setting_lines(spec), spec_to_json(spec)
    tell("\n".join(lines), facts, as_json=as_json)

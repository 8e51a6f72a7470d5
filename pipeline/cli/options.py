"""Options made from the fields of specs, and the few that several commands share beside them."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo

from g2l_core.errors import UsageError
from g2l_core.options import ENCODER, OUTPUT, PANELS, PATCHES, Entry, build, entries
from g2l_core.patches.spec import GridSpec
from pipeline.settings import TRUST_CODE

if TYPE_CHECKING:
    from g2l_core.tissue.methods import TissueMethod

Command = Callable[..., None]

Inputs = Annotated[
    list[Path],
    typer.Argument(
        help="Slides, folders of slides or of patch images, or a manifest CSV.",
        show_default=False,
    ),
]
Store = Annotated[
    Path, typer.Option(help="The feature store, a Zarr folder or an address; made or completed.", show_default=False)
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="In place of the encoder's own weights: FILE or FILE#NETWORK, hub:REPOSITORY@REVISION, or random:SEED.",
        rich_help_panel=ENCODER,
    ),
]
WeightsOfEach = Annotated[
    list[str] | None,
    typer.Option(
        "--weights",
        help="In place of an encoder's own weights, see g2l cache-teacher; of several encoders ENCODER=WEIGHTS, "
        "repeatable.",
        show_default=False,
        rich_help_panel=ENCODER,
    ),
]
TrustCode = Annotated[
    list[str] | None, typer.Option(help=TRUST_CODE, metavar="TEXT", rich_help_panel=ENCODER, show_default=False)
]
Coordinates = Annotated[
    Path | None,
    typer.Option(
        "--coords",
        help="Given patches, in place of tissue and grid: a folder with a file a slide (H5 of TRIDENT or CLAM, CSV, "
        "Parquet), or one table with a column slide_id. Columns: x, y; or x, y, width, height of boxes.",
        show_default=False,
        rich_help_panel=PATCHES,
    ),
]
Seed = Annotated[int, typer.Option(help="Random seed.")]
Json = Annotated[bool, typer.Option("--json", help="Print the summary as JSON on stdout.", rich_help_panel=OUTPUT)]


def resolve_patches(tissue: str, coordinates: Path | None) -> "TissueMethod":
    """The method that finds patches: that of `--coords` if it is given, else that of `--tissue`.

    Raises:
        UsageError: Both are given, or one of them cannot be used.
        ManifestError: The coordinates are a table that cannot be read.
    """
    from g2l_core.tissue.methods import COORDINATES, resolve_coords, resolve_tissue

    if coordinates is None:
        return resolve_tissue(tissue)
    if tissue not in {GridSpec.tissue, COORDINATES}:
        raise UsageError(f"--tissue {tissue} and --coords {coordinates}: given patches need no tissue; leave one out")
    return resolve_coords(coordinates)


_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH", bool: ""}


def from_specs(*, without: Collection[str] = (), **defaults: Any) -> Callable[[Command], Command]:
    """Give a command the options of its specs.

    A parameter whose type is a spec, a dataclass with fields made by `g2l_core.options.option`, stands for all options
    of that spec; the command gets the spec built from them. `Annotated[dict[str, Any], Spec]` asks for their values by
    name in its place. An option that two specs have, or a spec and the command, is one option: the command's or the
    first spec's.

    Args:
        without: Names of options that this command does not have.
        defaults: Defaults of this command that differ from the spec's.
    """

    def decorate(command: Command) -> Command:
        hints = get_type_hints(command, include_extras=True)
        specs = {name: spec for name, hint in hints.items() if (spec := _spec_of(hint))}
        own = {
            name: parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=_with_metavar(hints[name]))
            for name, parameter in signature(command).parameters.items()
            if name not in specs
        }
        known = {entry.name for spec in specs.values() for entry in entries(spec)}
        if unknown := {*without, *defaults} - known:
            raise TypeError(f"no such option: {', '.join(sorted(unknown))}")
        made, aliases = dict(own), dict[str, str]()
        for entry in (entry for spec in specs.values() for entry in entries(spec)):
            if entry.name not in made and entry.name not in without:
                made |= {p.name: p for p in _parameters(entry, defaults.get(entry.name, entry.default))}
                aliases |= dict.fromkeys(entry.option.aliases, entry.name)

        @wraps(command)
        def with_options(**values: Any) -> None:
            for alias, name in aliases.items():
                if (value := values.pop(alias)) is not None:
                    values[name] = value
            arguments = {name: values[name] for name in own}
            for name, spec in specs.items():
                arguments[name] = build(spec, values) if is_dataclass(hints[name]) else _values(spec, values)
            command(**arguments)

        ordered = sorted(made.values(), key=_place)
        with_options.__signature__ = Signature(ordered)  # type: ignore[attr-defined]
        with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in ordered}
        return with_options

    return decorate


def _spec_of(hint: Any) -> type | None:
    candidates = get_args(hint)[1:] if get_origin(hint) is Annotated else [hint]
    return next((kind for kind in candidates if isinstance(kind, type) and is_dataclass(kind)), None)


def _values(spec: type, values: Mapping[str, Any]) -> dict[str, Any]:
    return {entry.name: values[entry.name] for entry in entries(spec)}


def _parameters(entry: Entry, default: Any) -> Iterator[Parameter]:
    """An option's parameter of the command, then a hidden one for each former name of it."""
    name, kind, option = entry.name, entry.kind, entry.option
    flag = f"--{name.replace('_', '-')}"
    if kind is bool and default:
        flag += f"/--no-{name.replace('_', '-')}"
    if option.parse:
        kind, default = (str | None, None) if default is None else (str, ",".join(default) or "none")
    elif get_origin(kind) is tuple:
        kind, default = list[get_args(kind)[0]] | None, None  # type: ignore[misc]
    shown = {"help": option.help, "rich_help_panel": option.panel, "metavar": _metavar(kind), "min": option.min}
    hidden = option.recipe_only
    info = typer.Option(flag, show_default=default is not None, hidden=hidden, **shown)  # type: ignore[arg-type]
    yield Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])
    for alias in option.aliases:
        info = typer.Option(f"--{alias.replace('_', '-')}", hidden=True)
        yield Parameter(alias, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info])


def _with_metavar(annotation: Any) -> Any:
    kind, info = get_args(annotation)
    if isinstance(info, OptionInfo):
        info.metavar = _metavar(kind)
    return annotation


def _metavar(kind: Any) -> str | None:
    """The word for a value: that of the type, or of the first in a union or a list."""
    if kind in _METAVARS or not get_args(kind):
        return _METAVARS.get(kind)
    return _metavar(get_args(kind)[0])


def _place(parameter: Parameter) -> int:
    """Options without a panel first, then panel by panel."""
    panel = get_args(parameter.annotation)[1].rich_help_panel
    return PANELS.index(panel) if panel else -1

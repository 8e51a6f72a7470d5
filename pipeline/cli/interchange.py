"""`g2l store export` and `g2l store import`: features to and from the files of other tools."""

from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli import EXIT_DONE, EXIT_SOME_FAILED
from pipeline.cli.options import Json, Store, Weights, from_specs
from pipeline.cli.printing import list_left_out, show, tell
from pipeline.cli.store import StorePath
from pipeline.cli.store_copies import DryRun
from pipeline.settings import SpoolSettings

if TYPE_CHECKING:
    from g2l_core.store.export import Exported
    from g2l_core.store.features import FeatureStore


class ExportFormat(StrEnum):
    """Layouts that features can be exported to; the last three are of the patches themselves."""

    TRIDENT_H5 = "trident-h5"
    CLAM = "clam"
    STAMP_H5 = "stamp-h5"
    ATLASPATCH_H5 = "atlaspatch-h5"
    RAW2FEATURES = "raw2features"
    EVA = "eva"
    CROMA = "croma"
    PATHOROB = "pathorob"
    PARQUET = "parquet"
    NPY = "npy"
    ANNDATA = "anndata"
    SPATIALDATA = "spatialdata"
    PNG = "png"
    JPEG = "jpeg"
    WEBDATASET = "webdataset"


@from_specs()
def export(
    store: StorePath,
    out: Annotated[Path, typer.Option(help="Folder to write to.", show_default=False)],
    to: Annotated[ExportFormat, typer.Option("--format", help="Layout to write.")] = ExportFormat.TRIDENT_H5,
    encoder: Annotated[
        list[str] | None, typer.Option(help="Which encoder; repeatable; all if not given.", show_default=False)
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(help="COLUMN=PATTERN that slides must fit; repeatable.", metavar="TEXT", show_default=False),
    ] = None,
    view: Annotated[int, typer.Option(min=0, help="Which view; 0 is canonical.")] = 0,
    label: Annotated[
        str, typer.Option(help="The column of classes, for eva, croma, pathorob.", show_default=False)
    ] = "",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write features as other tools read them, or the patches themselves: png, jpeg, webdataset.

    Patches without features are left out and counted. Exit code 1 if slides are left out: each is named.
    """
    from g2l_core.encoders.resolve import find_stored
    from g2l_core.slides.manifest import parse_condition
    from g2l_core.store.features import FeatureStore

    opened = FeatureStore.open(store)
    keys = list(dict.fromkeys(find_stored(name, opened.encoders) for name in encoder or ()))
    conditions = dict(parse_condition(text) for text in where or ())
    asked = {"encoders": keys, "view": view, "where": conditions, "label": label}
    done = _exported(opened, out, to, asked, dry_run=dry_run)
    names = "" if to in OF_PATCHES else f" for {', '.join(keys or opened.encoders)}"
    files = "files of each encoder" if dry_run else f"{len(done.files):,} files"
    lines = [f"{files} with {done.patches:,} patches of {done.slides:,} slides{names} under {out}, layout {to.value}"]
    if done.unreadable:
        counts = ", ".join(f"{count:,} {name}" for name, count in done.unreadable.items())
        lines.append(f"patches that are not exported: {counts}")
    facts = {"files": [str(path) for path in done.files], "slides": done.slides, "patches": done.patches}
    facts |= {"left_out": dict(done.left_out), "unreadable": dict(done.unreadable)}
    tell("\n".join(lines), {"folder": str(out), "format": to.value, **facts}, dry_run=dry_run, as_json=as_json)
    list_left_out(done.left_out)
    raise typer.Exit(EXIT_SOME_FAILED if done.left_out else EXIT_DONE)


OF_PATCHES = (ExportFormat.PNG, ExportFormat.JPEG, ExportFormat.WEBDATASET)
OF_SCVERSE = (ExportFormat.ANNDATA, ExportFormat.SPATIALDATA)


def _exported(
    store: "FeatureStore", out: Path, to: ExportFormat, asked: dict[str, Any], *, dry_run: bool
) -> "Exported":
    """Export with the function that knows the format."""
    from g2l_core.errors import UsageError
    from pipeline.progress import ProgressLine

    if to in OF_PATCHES and (asked["encoders"] or asked["view"] or asked["label"]):
        raise UsageError(f"--format {to.value} writes whole patches: leave out --encoder, --view and --label")
    with ProgressLine("export", "slides") as line:
        if to in OF_PATCHES:
            from g2l_core.extraction.export_patches import export_patches, plan_patches

            if dry_run:
                return plan_patches(store, where=asked["where"])
            return export_patches(store, out, to.value, where=asked["where"], report=line.update)
        if to in OF_SCVERSE:
            from g2l_core.api.export_scverse import export_scverse

            if asked.pop("label"):
                raise UsageError(f"--format {to.value} has all labels as columns: leave out --label")
            return export_scverse(store, out, to.value, **asked, dry_run=dry_run, report=line.update)
        from g2l_core.store.export import export_features

        return export_features(store, out, to.value, **asked, dry_run=dry_run, report=line.update)


class ImportLayout(StrEnum):
    """Layouts that features can be imported from."""

    TRIDENT_H5 = "trident-h5"
    CLAM = "clam"
    STAMP_H5 = "stamp-h5"
    RAW2FEATURES = "raw2features"
    PLAIN = "plain"


@from_specs()
def import_features(
    layout: Annotated[ImportLayout, typer.Argument(help="How the features are kept.", show_default=False)],
    source: Annotated[Path, typer.Argument(help="Their folder.", show_default=False)],
    store: Store,
    encoder: Annotated[
        str, typer.Option(help="The encoder that made them; g2l models lists those that G2L knows.", show_default=False)
    ],
    through: SpoolSettings,
    weights: Weights = None,
    slides: Annotated[
        Path | None, typer.Option(help="Folder of the slides, at any depth, so that features can be proved.")
    ] = None,
    manifest: Annotated[
        Path | None, typer.Option(help="A table with slide_id and labels; path and mpp if you like.")
    ] = None,
    coords: Annotated[
        Path | None, typer.Option(help="Folder of the coordinates, where they are in files of their own.")
    ] = None,
    mpp: Annotated[float | None, typer.Option(min=0.05, help="Um/px of a patch, where files do not say it.")] = None,
    patch_px: Annotated[int | None, typer.Option(min=16, help="Side of a patch in pixels at that scale.")] = None,
    mpp_override: Annotated[
        float | None, typer.Option(min=0.01, help="Um/px of level 0, where neither slide nor file says it.")
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Make a store of features that another tool has extracted, or add them to one.

    They are marked as imported: g2l store verify --recompute N compares them with what the encoder gives, where the
    slides are at hand. Exit code 1 if slides could not be imported: each is named.
    """
    from g2l_core.encoders.resolve import resolve_encoder
    from g2l_core.errors import UnknownNameError
    from g2l_core.extraction.import_features import ImportSettings
    from g2l_core.extraction.import_features import import_features as run_import
    from g2l_core.store.location import locate
    from pipeline.progress import ProgressLine
    from pipeline.spool import at_place

    spec, unknown = None, ""
    try:
        spec = resolve_encoder(encoder, weights=weights)
    except UnknownNameError as error:
        unknown = f"{error} It is imported all the same, and cannot be proved"
    settings = ImportSettings(
        mpp=mpp, patch_px=patch_px, mpp_override=mpp_override, slides=slides, coords=coords, manifest=manifest
    )
    place = locate(store)
    opened = nullcontext(store) if dry_run else at_place(store, through)
    with opened as folder, ProgressLine("import", "files") as line:
        done = run_import(layout.value, source, folder, encoder, spec, settings, dry_run=dry_run, report=line.update)
    if unknown:
        show(f"note  {unknown}", err=True)
    text = (
        f"{place}: {done.patches:,} patches of {done.slides:,} slides imported as {done.encoder or encoder}; "
        f"{done.with_slides:,} slides are at hand"
    )
    facts = {"encoder": done.encoder, "slides": done.slides, "patches": done.patches, "with_slides": done.with_slides}
    facts |= {"known": done.known, "failed": dict(done.failed)}
    then = f"g2l store verify {place} --recompute 50" if done.with_slides else f"g2l store info {place}"
    tell(text, {"store": str(place), **facts}, dry_run=dry_run, as_json=as_json, then=then)
    list_left_out(done.failed)
    raise typer.Exit(EXIT_SOME_FAILED if done.failed else EXIT_DONE)

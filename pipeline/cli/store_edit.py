"""`g2l store label`, `subset`, `merge`, `rm`, `du` and `upload`. None of them loads weights or opens slides."""

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import Json

StorePath = Annotated[Path, typer.Argument(help="The store.", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only tell what would be done.")]


def label(
    store: StorePath,
    table: Annotated[
        Path,
        typer.Argument(
            help="A table with slide_id, and patch_id or x and y for labels of patches.", show_default=False
        ),
    ],
    missing: Annotated[str, typer.Option(help="Slides that the store does not have: refuse or skip.")] = "refuse",
    dry_run: DryRun = False,
) -> None:
    """Give a store labels after the fact: by slide, by patch or by corner.

    A column replaces one of the same name, also where it is blank. Two rows that contradict each other are refused.
    """
    from pipeline.store_edit import label_store

    done = label_store(store, table, missing=missing, dry_run=dry_run)
    for note in done.notes:
        typer.echo(f"note  {note}", err=True)
    typer.echo(
        f"{store}: {', '.join(done.columns)} for {done.slides} slides as a whole and the patches of {done.by_patch}"
        + _only_told(dry_run)
    )


def subset(
    store: StorePath,
    out: Annotated[Path, typer.Argument(help="The new store.", show_default=False)],
    where: Annotated[
        list[str] | None, typer.Option(help="COLUMN=PATTERN that slides fit; repeatable, all must hold.")
    ] = None,
    slide: Annotated[list[str] | None, typer.Option(help="A slide's id; repeatable.")] = None,
    encoder: Annotated[list[str] | None, typer.Option(help="An encoder to keep; repeatable. Default: all.")] = None,
    views: Annotated[int | None, typer.Option(min=1, help="Views to keep, the canonical one first.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Write some of the slides, encoders or views into a new store, checked as they are read."""
    from g2l_core.api.cohort import open_cohort

    chosen = open_cohort(store).where(*(where or ()), slides=slide or None)
    if not dry_run:
        chosen.copy(out, encoders=encoder or None, views=views)
    typer.echo(f"{out}: {len(chosen.slide_ids)} slides of {store}" + _only_told(dry_run))


def merge(
    stores: Annotated[list[Path], typer.Argument(help="Stores of the same grid and views.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The new store.", show_default=False)],
) -> None:
    """Write several stores into a new one. A slide that several have is taken once, with the encoders of all."""
    from g2l_core.api.cohort import merge as merged

    now = merged(stores, out)
    typer.echo(f"{out}: {len(now.slide_ids)} slides, {', '.join(now.encoders) or 'no encoder'}")


def rm(
    store: StorePath,
    slides: Annotated[list[str], typer.Argument(help="The ids of slides.", show_default=False)],
    dry_run: DryRun = False,
) -> None:
    """Delete slides with all that was cached of them. The slides' own files are not touched."""
    from pipeline.store_edit import remove_slides
    from pipeline.tables import bytes_text

    freed = remove_slides(store, slides, dry_run=dry_run)
    typer.echo(f"{store}: {len(slides)} slides deleted, {bytes_text(freed)}" + _only_told(dry_run))


def du(store: StorePath, as_json: Json = False) -> None:
    """Show what takes room in a store: the features of each encoder, and the tables."""
    from pipeline.store_edit import usage
    from pipeline.tables import bytes_text, table_text

    found = usage(store)
    if as_json:
        typer.echo(json.dumps({"bytes": found}, indent=1))
        return
    rows = [(bytes_text(size), name) for name, size in found.items()]
    typer.echo(table_text([*rows, (bytes_text(sum(found.values())), "in all")], right=[0]))


def upload(
    store: StorePath,
    address: Annotated[str, typer.Argument(help="Where to: s3://BUCKET/NAME or gs://BUCKET/NAME.", show_default=False)],
) -> None:
    """Copy a store to a bucket, where every command can read it. Run it again to go on, or to send what is new.

    Let nobody else write there meanwhile. g2l store verify ADDRESS reads everything back and compares it.
    """
    from pipeline.progress import ProgressLine
    from pipeline.store_edit import upload_store
    from pipeline.tables import bytes_text

    with ProgressLine("upload", "files") as line:
        sent, kept = upload_store(store, address, line.update)
    typer.echo(f"{address}: {bytes_text(sent)} sent, {bytes_text(kept)} were there already")


def _only_told(dry_run: bool) -> str:
    return "; nothing is changed, as --dry-run asks" if dry_run else ""

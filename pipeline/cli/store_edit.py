"""`g2l store label`, `rm`, `du` and `upload`. None of them loads weights or opens slides."""

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import Json, from_specs
from pipeline.cli.printing import show, tell
from pipeline.cli.store import StorePath
from pipeline.cli.store_copies import DryRun
from pipeline.settings import SpoolSettings


@from_specs()
def label(
    store: StorePath,
    table: Annotated[
        Path,
        typer.Argument(
            help="A table with slide_id, and patch_id or x and y for labels of patches.", show_default=False
        ),
    ],
    through: SpoolSettings,
    missing: Annotated[str, typer.Option(help="Slides that the store does not have: refuse or skip.")] = "refuse",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Give a store labels after the fact: by slide, by patch or by corner.

    A column replaces one of the same name, also where it is blank. Two rows that contradict each other are refused.
    """
    from g2l_core.store.location import locate
    from pipeline.progress import ProgressLine
    from pipeline.spool import at_place
    from pipeline.store_edit import label_store

    opened = nullcontext(store) if dry_run else at_place(store, through)
    with opened as place, ProgressLine("label", "slides") as line:
        done = label_store(place, table, missing=missing, dry_run=dry_run, report=line.update)
    for note in done.notes:
        show(f"note  {note}", err=True)
    where = str(locate(store))
    text = f"{where}: {', '.join(done.columns)} for {done.slides} slides as a whole and the patches of {done.by_patch}"
    tell(text, {"store": where, **asdict(done)}, dry_run=dry_run, as_json=as_json)


def rm(
    store: StorePath,
    slides: Annotated[list[str], typer.Argument(help="The ids of slides.", show_default=False)],
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Delete slides with all that was cached of them. The slides' own files are not touched."""
    from pipeline.progress import ProgressLine
    from pipeline.store_edit import remove_slides
    from pipeline.tables import bytes_text

    with ProgressLine("rm", "slides") as line:
        freed = remove_slides(store, slides, dry_run=dry_run, report=line.update)
    text = f"{store}: {len(slides)} slides deleted, {bytes_text(freed)}"
    tell(text, {"store": str(store), "slides": slides, "bytes": freed}, dry_run=dry_run, as_json=as_json)


def du(store: StorePath, as_json: Json = False) -> None:
    """Show what takes room in a store: the features of each encoder, and the tables."""
    from pipeline.store_edit import usage
    from pipeline.tables import bytes_text, table_text

    found = usage(store)
    rows = [(bytes_text(size), name) for name, size in found.items()]
    text = table_text([*rows, (bytes_text(sum(found.values())), "in all")], right=[0])
    tell(text, {"bytes": found}, as_json=as_json)


def upload(
    store: StorePath,
    address: Annotated[str, typer.Argument(help="Where to: s3://BUCKET/NAME or gs://BUCKET/NAME.", show_default=False)],
    take_lock: Annotated[
        bool, typer.Option("--take-lock", help="Take over the lock at the address of a command that was killed.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Copy a store to a bucket, where every command can read it. Run it again to go on, or to send what is new.

    g2l store verify ADDRESS reads everything back and compares it.
    """
    from pipeline.progress import ProgressLine
    from pipeline.store_edit import upload_store
    from pipeline.tables import bytes_text

    with ProgressLine("upload", "files") as line:
        sent, kept = upload_store(store, address, line.update, take_lock=take_lock)
    text = f"{address}: {bytes_text(sent)} sent, {bytes_text(kept)} were there already"
    facts = {"address": address, "bytes_sent": sent, "bytes_kept": kept}
    tell(text, facts, as_json=as_json, then=f"g2l store verify {address}")

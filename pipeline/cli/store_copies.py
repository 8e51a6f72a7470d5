"""`g2l store subset`, `merge`, `pack`, `compact` and `publish`: stores from stores. No weights, no slides."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli import EXIT_DONE, EXIT_SOME_FAILED
from pipeline.cli.options import Json, from_specs
from pipeline.cli.printing import list_left_out, tell
from pipeline.cli.store import StorePath

DryRun = Annotated[bool, typer.Option("--dry-run", help="Only tell what would be done.")]
NewStore = Annotated[Path, typer.Argument(help="The new store.", show_default=False)]
Where = Annotated[
    list[str] | None,
    typer.Option(help="COLUMN=PATTERN that slides fit; repeatable, all must hold.", show_default=False),
]
SlideIds = Annotated[list[str] | None, typer.Option("--slide", help="A slide's id; repeatable.", show_default=False)]
Encoders = Annotated[
    list[str] | None,
    typer.Option("--encoder", help="An encoder to keep; repeatable. Default: all.", show_default=False),
]
Views = Annotated[int | None, typer.Option(min=1, help="Views to keep, the canonical one first.", show_default=False)]


@from_specs()
def subset(
    store: StorePath,
    out: NewStore,
    where: Where = None,
    slide: SlideIds = None,
    encoder: Encoders = None,
    views: Views = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write some of the slides, encoders or views into a new store, checked as they are read."""
    from g2l_core.api.copies import Kept, write_store
    from pipeline.progress import ProgressLine

    chosen, keys = _chosen(store, where, slide, encoder)
    with ProgressLine("subset", "slides") as line:
        kept = Kept(encoders=keys, n_views=views, report=line.update)
        copied = write_store([chosen], out, kept, dry_run=dry_run)
    text = f"{out}: {copied.slides} slides of {store}"
    facts = {"store": str(out), **copied.to_json()}
    tell(text, facts, dry_run=dry_run, as_json=as_json, then=f"g2l store info {out}")


@from_specs()
def merge(
    stores: Annotated[list[Path], typer.Argument(help="Stores of the same grid and views.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The new store.", show_default=False)],
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write several stores into a new one. A slide that several have is taken once, with the encoders of all."""
    from g2l_core.api.copies import Kept, write_store
    from g2l_core.api.selection import Selection
    from g2l_core.store.features import FeatureStore
    from pipeline.progress import ProgressLine

    selections = [Selection(store=FeatureStore.open(path)) for path in stores]
    with ProgressLine("merge", "slides") as line:
        copied = write_store(selections, out, Kept(report=line.update), dry_run=dry_run)
    text = f"{out}: {copied.slides} slides, {', '.join(copied.encoders) or 'no encoder'}"
    facts = {"store": str(out), **copied.to_json()}
    tell(text, facts, dry_run=dry_run, as_json=as_json, then=f"g2l store info {out}")


@from_specs()
def pack(
    store: StorePath,
    encoder: Annotated[
        list[str] | None, typer.Option(help="Which encoder; repeatable. Default: all.", show_default=False)
    ] = None,
    view: Annotated[int, typer.Option(min=0, help="Which view; 0 is canonical.")] = 0,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Keep a copy of each encoder's features in one contiguous .npy, in .packed of the store, for random access.

    Notebooks and loaders read it through a memory map from then on; it may be deleted at any time. Exit code 1 if
    slides lack the features: each is named.
    """
    from pipeline.progress import ProgressLine
    from pipeline.store_archive import pack_store
    from pipeline.tables import bytes_text

    with ProgressLine("pack", "slides") as line:
        done = pack_store(store, encoder or (), view, dry_run=dry_run, report=line.update)
    lines = [f"{p.path}: {p.rows:,} rows of {p.slides:,} slides, {bytes_text(p.bytes)}" for p in done.values()]
    found = {
        key: {"path": str(p.path), "rows": p.rows, "slides": p.slides, "bytes": p.bytes, "left_out": dict(p.left_out)}
        for key, p in done.items()
    }
    tell("\n".join(lines), {"packs": found}, dry_run=dry_run, as_json=as_json)
    left_out = {f"{slide}, {key}": reason for key, p in done.items() for slide, reason in p.left_out.items()}
    list_left_out(left_out)
    raise typer.Exit(EXIT_SOME_FAILED if left_out else EXIT_DONE)


@from_specs()
def compact(
    store: StorePath,
    out: NewStore,
    encoder: Encoders = None,
    bits: Annotated[int, typer.Option(help="Bits of the mantissa that are kept, of float16's 10; bfloat16 has 7.")] = 7,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write a smaller copy for an archive: features rounded (BitRound) and packed (Zstandard); tells the error.

    Everything that reads stores reads it. With --dry-run, size and error are measured on a few shards.
    """
    from pipeline.progress import ProgressLine
    from pipeline.store_archive import compact_store
    from pipeline.tables import bytes_text

    with ProgressLine("compact", "slides") as line:
        done = compact_store(store, out, encoder or (), bits, dry_run=dry_run, report=line.update)
    about = "about " if dry_run else ""
    lines = [
        f"{out}: features of {done.copied.slides:,} slides in {about}{bytes_text(done.bytes)}, {about}{done.ratio:.2f} "
        f"times smaller, with {bits} of 10 bits of mantissa",
        *(f"{key}: {words}" for key, words in done.words.items()),
    ]
    facts = {"store": str(out), **done.copied.to_json(), "bits": bits, "bytes": done.bytes, "ratio": done.ratio}
    tell("\n".join(lines), {**facts, "errors": dict(done.errors)}, dry_run=dry_run, as_json=as_json)


@from_specs()
def publish(
    store: StorePath,
    out: Annotated[Path, typer.Argument(help="The folder to make.", show_default=False)],
    slides_license: Annotated[
        str, typer.Option(help="Terms of the slides, as their owner has them.", show_default=False)
    ],
    encoder_license: Annotated[
        list[str] | None,
        typer.Option(help="ENCODER=TERMS, where the store does not know them; repeatable.", show_default=False),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Title of the card.", show_default=False)] = None,
    cite: Annotated[
        list[str] | None, typer.Option(help="What to cite for the slides; repeatable.", show_default=False)
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option(help="A label to leave out; repeatable.", show_default=False)
    ] = None,
    where: Where = None,
    slide: SlideIds = None,
    encoder: Encoders = None,
    views: Views = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Make a part of a store ready for others: store, card and checksums in a folder. Nothing is sent anywhere.

    The card says what is in it, the terms of encoders and slides, and how to cite. Places on this machine are left out.
    Look at the labels that it lists before you upload: patients must not be known by them.
    """
    from g2l_core.api.copies import Kept
    from g2l_core.api.publish import CardFacts
    from g2l_core.api.publish import publish as make_ready
    from pipeline.progress import ProgressLine

    chosen, keys = _chosen(store, where, slide, encoder)
    for column in without or ():
        chosen.require_column(column)
    facts = CardFacts(
        title=title or f"Features of {store.resolve().stem}",
        slides_license=slides_license,
        encoder_licenses={chosen.encoder(key): terms for key, terms in map(_terms, encoder_license or ())},
        cite=tuple(cite or ()),
    )
    with ProgressLine("publish", "slides") as line:
        kept = Kept(encoders=keys, n_views=views, without=frozenset(without or ()), is_public=True, report=line.update)
        done = make_ready(chosen, out, kept, facts, dry_run=dry_run)
    lines = [
        f"{out}: {done.copied.slides:,} slides with README.md and SHA256SUMS",
        "labels that others will see: "
        + (", ".join(f"{name} ({count:,} values)" for name, count in done.columns.items()) or "none"),
    ]
    if not dry_run:
        lines.append(f"to upload it: huggingface-cli upload OWNER/NAME {out} . --repo-type dataset")
    found = {"folder": str(out), **done.copied.to_json(), "labels": dict(done.columns), "licenses": dict(done.licenses)}
    tell("\n".join(lines), found, dry_run=dry_run, as_json=as_json)


def _terms(text: str) -> tuple[str, str]:
    from g2l_core.errors import UsageError

    key, equals, terms = text.partition("=")
    if not equals or not terms.strip():
        raise UsageError(f"--encoder-license {text}: expected ENCODER=TERMS")
    return key, terms.strip()


def _chosen(store: Path, where: list[str] | None, slides: list[str] | None, encoders: list[str] | None) -> Any:
    """The slides that are asked for, and the keys of the encoders; None for all of them."""
    from g2l_core.api.selection import Selection
    from g2l_core.store.features import FeatureStore

    selection = Selection(store=FeatureStore.open(store))
    if where or slides:
        selection = selection.where(where or (), slides or None, (), None, 0)
    return selection, frozenset(map(selection.encoder, encoders)) if encoders else None

"""`g2l store ...`: look at a store, check it, repair and move it. Imports no torch."""

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli import EXIT_DONE, EXIT_SOME_FAILED
from pipeline.cli.options import Json, Seed, TrustCode, from_specs
from pipeline.cli.printing import show, tell

if TYPE_CHECKING:
    from g2l_core.store.features import FeatureStore, StoredSlide
    from g2l_core.store.verify import Problem

app = typer.Typer(help="Look at a store, check it, export it.", no_args_is_help=True)

StorePath = Annotated[Path, typer.Argument(help="The store.", show_default=False)]


@app.command(name="ls")
def list_slides(store: StorePath, as_json: Json = False) -> None:
    """List the slides and, for each, its patches and the encoders that are complete.

    Exit code 1 if a slide's document is damaged; its file is named.
    """
    from g2l_core.store.features import FeatureStore
    from pipeline.tables import stdout_width, table_text

    opened = FeatureStore.open(store)
    rows = [
        (f"{len(slide):,}", slide.slide_id, ", ".join(_coverage(slide)) or "no features yet")
        for slide in opened.slides()
    ]
    rows += [("failed", slide_id, reason) for slide_id, reason in opened.failed_slides().items()]
    rows += [("damaged", slide_id, damage) for slide_id, damage in opened.damaged.items()]
    slides = {slide.slide_id: {"patches": len(slide), "features": _complete_views(slide)} for slide in opened.slides()}
    facts = {"slides": slides, "failed": opened.failed_slides(), "damaged": opened.damaged}
    if rows or as_json:
        tell(table_text(rows, right=[0], width=stdout_width()), facts, as_json=as_json)
    raise typer.Exit(_exit_code(opened))


def _exit_code(store: "FeatureStore") -> int:
    return EXIT_SOME_FAILED if store.damaged else EXIT_DONE


def _coverage(slide: "StoredSlide") -> list[str]:
    """Encoders of a slide with the views that are complete, in words."""
    return [
        f"{encoder} {n if complete == n else f'{complete}/{n}'} views"
        for encoder, (complete, n) in _complete_views(slide).items()
    ]


def _complete_views(slide: "StoredSlide") -> dict[str, tuple[int, int]]:
    """By encoder of a slide how many views are complete, and of how many."""
    found = {}
    for encoder, facts in sorted(slide.facts.features.items()):
        records = slide.records(encoder)
        complete = sum(all(s.name in records for s in slide.shards([view])) for view in range(facts.n_views))
        found[encoder] = complete, facts.n_views
    return found


@app.command()
def info(store: StorePath, as_json: Json = False) -> None:
    """Show what a store was made with: grid, views, encoders, software, and what failed.

    Exit code 1 if a slide's document is damaged; its file is named.
    """
    from g2l_core.store.features import FeatureStore
    from pipeline.tables import table_text

    def as_option(key: str) -> str:
        """A setting under the name that it has on the command line."""
        return key.replace("_", "-").replace("artefacts", "artifacts")

    opened = FeatureStore.open(store)
    slides = list(opened.slides())
    facts = opened.facts
    rows = [("created", str(facts.created))]
    rows += [
        (title, ", ".join(f"{as_option(key)} {'none' if value is None else value}" for key, value in values.items()))
        for title, values in (("grid", facts.grid), ("views", facts.views), ("software", facts.software))
    ]
    for key, spec in opened.encoders.items():
        unknown = "unknown"
        of_features = f"{spec.dim} features, precision {spec.precision or unknown}, pooling {spec.pooling or unknown}"
        rows.append(("encoder", f"{key}: {of_features}"))
        rows.append(("", f"weights {spec.weights or unknown}, digest {spec.digest[:12]}"))
        if spec.imported:
            rows.append(("", f"imported from {spec.imported}; {spec.proof or 'its preprocessing is not proved'}"))
    rows += [("failed", f"{slide_id}: {reason}") for slide_id, reason in opened.failed_slides().items()]
    rows += [("damaged", f"{slide_id}: {damage}") for slide_id, damage in opened.damaged.items()]
    patches = sum(map(len, slides))
    text = f"{opened.path}: format {facts.format}, {len(slides)} slides, {patches:,} patches\n{table_text(rows)}"
    found = {"store": str(opened.path), "slides": len(slides), "patches": patches, **facts.to_json()}
    found |= {"failed": opened.failed_slides(), "damaged": opened.damaged}
    tell(text, found, as_json=as_json)
    raise typer.Exit(_exit_code(opened))


@app.command()
@from_specs()
def verify(
    store: StorePath,
    repair: Annotated[bool, typer.Option("--repair", help="Drop or mend what is damaged.")] = False,
    recompute: Annotated[
        int, typer.Option(min=0, help="Also encode this many random rows of every encoder again.")
    ] = 0,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    trust_code: TrustCode = None,
    as_json: Json = False,
) -> None:
    """Read everything again and compare it with its checksums.

    With --recompute, features of an imported encoder are compared with what it gives; where they differ, the likeliest
    cause is looked for: um/px, offset, crop, channels, normalization, pooling, resizing, precision.

    With --repair, what is damaged is dropped, and the caching command computes that alone again; tables are derived
    from the slides, and a slide's document comes back from the catalogue. Where a network or annotations found the
    patches, these cannot be derived: then all of the slide is dropped but its labels, to be cached anew.

    Exit code 1 if anything is damaged, missing or failed, and not repaired or dropped; leftovers of killed writers are
    harmless.
    """
    from g2l_core.store.features import FeatureStore

    opened, to_cache = FeatureStore.open(store), set[str]()
    problems, said, done = _verified(opened), list[str](), list[str]()
    if recompute:
        problems += _recompute(opened, recompute, seed, device, trust_code or (), said)
    if repair:
        left = _repaired(store, problems, done)
        problems = [problem for problem in left if problem.kind in {"damaged", "unread"}]
        to_cache = {problem.slide_id for problem in left if problem.kind in {"missing", "failed"}}
    wrong = sum(problem.kind != "leftover" for problem in problems)
    lines = [*said, *(done if repair else map(str, problems))]
    lines.append(f"{opened.path}: " + (f"{wrong} problems" if wrong else "every recorded shard is as it was written"))
    if to_cache:
        lines.append(f"{len(to_cache)} slides are not complete: run the caching command again, which fills them")
    elif wrong and not repair and isinstance(opened.path, Path):  # nothing is repaired at an address
        lines.append(f"next: g2l store verify {store} --repair, which drops or mends what is damaged")
    facts = {"store": str(opened.path), "problems": [asdict(problem) for problem in problems], "repaired": done}
    tell("\n".join(lines), {**facts, "recomputed": said, "to_cache": sorted(to_cache)}, as_json=as_json)
    raise typer.Exit(EXIT_SOME_FAILED if wrong else EXIT_DONE)


def _verified(store: "FeatureStore") -> "list[Problem]":
    from g2l_core.store.verify import verify_slides
    from pipeline.progress import ProgressLine

    problems: list[Problem] = []
    total = sum(1 for _ in store.slides())
    with ProgressLine("verify", "slides") as line:
        for done, checked in enumerate(verify_slides(store)):
            problems += checked.problems
            line.update(done, total)
    return problems


def _repaired(path: Path, problems: "list[Problem]", lines: list[str]) -> "list[Problem]":
    """Repair what can be repaired, add to the lines what was done, and return what is still wrong."""
    from g2l_core.store.features import FeatureStore
    from g2l_core.store.locks import LOCKS, locked
    from pipeline.repair import repair_store

    with locked(path / LOCKS / "writer", wait_s=0, holder="another g2l command writes into it"):
        store = FeatureStore.open(path, writable=True)
        for problem, done in repair_store(store, problems):
            lines.append(f"{problem}" + (f"\n         {done}" if done else ""))
        left = _verified(store)
        store.save_catalogue()
    return left


def _recompute(
    store: "FeatureStore", n: int, seed: int, device: str, trusted: Collection[str], lines: list[str]
) -> "list[Problem]":
    """Encode random rows again, add to the lines how they compare, and return what is wrong."""
    from g2l_core.errors import StoreError
    from pipeline.recompute import MIN_COSINE, keep_proof
    from pipeline.recompute import recompute as encode_again

    problems: list[Problem] = []
    for result in encode_again(store, n, seed=seed, device=device, trusted=trusted):
        if result.verdict:
            lines.append(f"{result.encoder}: {result.verdict}")
            problems += result.problems
            try:
                keep_proof(store.path, result)
            except StoreError as error:
                show(f"note  this is not kept in the store: {error}", err=True)
            continue
        lines.append(
            f"{result.encoder}: {result.compared} rows encoded again, least cosine {result.min_cosine:.6f} "
            f"(expected {MIN_COSINE})"
        )
        problems += result.problems
    return problems


@app.command()
def relocate(
    store: StorePath,
    folder: Annotated[Path, typer.Argument(help="Where the slides are now, at any depth.", show_default=False)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be found.")] = False,
    as_json: Json = False,
) -> None:
    """Point a store at its slides in another folder. They are known by their fingerprints; no weights are needed.

    Exit code 1 if slides are missing, or if several files may be one.
    """
    from g2l_core.patches.relocate import relocate as find_again
    from pipeline.tables import stdout_width, table_text

    now = find_again(store, folder, dry_run=dry_run)
    rows = [("found", slide_id, str(place)) for slide_id, place in now.found.items()]
    rows += [("as before", slide_id, "not below the folder, but where it was") for slide_id in now.kept]
    rows += [("ambiguous", slide_id, " or ".join(map(str, places))) for slide_id, places in now.ambiguous.items()]
    rows += [("missing", slide_id, f"was {place}") for slide_id, place in now.missing.items()]
    table = table_text(rows, width=stdout_width()) + "\n" if rows else ""
    counts = f"{len(now.found)} found, {len(now.kept)} as before, {len(now.ambiguous)} ambiguous, {len(now.missing)}"
    facts = {"store": str(store), **asdict(now)}
    tell(f"{table}{store}: {counts} missing", facts, dry_run=dry_run, as_json=as_json)
    raise typer.Exit(EXIT_DONE if now.is_complete else EXIT_SOME_FAILED)


@app.command()
def upgrade(store: StorePath, as_json: Json = False) -> None:
    """Make a store of an earlier version one of the present format. Nothing is encoded again.

    The old store stays beside it, under a name that ends in .format1, until you delete it. Both share the bytes of
    features where the disk has hard links.
    """
    from g2l_core.store.locks import LOCKS, locked
    from g2l_core.store.upgrade import UpgradePaths
    from g2l_core.store.upgrade import upgrade as upgrade_slides
    from pipeline.progress import ProgressLine

    with (
        locked(store / LOCKS / "writer", wait_s=0, holder="another g2l command writes into it"),
        ProgressLine("upgrade", "slides") as line,
    ):
        done = 0
        for done, _ in enumerate(upgrade_slides(store), start=1):
            line.update(done, done)
    old = UpgradePaths(store).old
    text = f"{store}: {done} slides are in the present format; the old store is {old}"
    facts = {"store": str(store), "slides": done, "old": str(old)}
    tell(text, facts, as_json=as_json, then=f"g2l store verify {store}")

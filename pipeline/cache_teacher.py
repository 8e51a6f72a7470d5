"""Stage one: from slides to stored features. Behind `g2l cache-teacher` and `g2l embed`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from g2l_core.encoders.exported import with_runtime
from g2l_core.encoders.loading import (
    LoadedEncoder,
    load_encoder,
    require_input_side,
    require_mpp,
    stored_facts,
    stored_key,
)  # fmt: skip
from g2l_core.encoders.resolve import EncoderSpec
from g2l_core.encoders.weights import require_weights
from g2l_core.errors import SlideError, StoreCorruptError, StoreMismatchError
from g2l_core.extraction.extract import ExtractionProgress, missing_patches
from g2l_core.extraction.patching import patch_sources, refresh_stored, store_patched
from g2l_core.extraction.repair import adopt_repaired
from g2l_core.patches.artifacts import count_artifacts
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.views import ViewSpec
from g2l_core.slides.boundary import within
from g2l_core.slides.icc import NO_PROFILE
from g2l_core.slides.images import TURNED
from g2l_core.slides.manifest import Source, read_sources
from g2l_core.slides.mpp import audit_table, describe_unused_override, differs
from g2l_core.slides.under_way import UnderWay
from g2l_core.store.consolidated import consolidate
from g2l_core.store.facts import ExtractionRunFacts
from g2l_core.store.features import FeatureStore, StoredSlide
from g2l_core.store.location import Location, folder_of
from g2l_core.store.locks import LOCKS, locked
from g2l_core.store.provenance import utc_now
from g2l_core.tissue.methods import TissueMethod
from g2l_core.tissue.overview import overview_folder
from pipeline.audit import audit_sources, require_plausible
from pipeline.extract import encode_slides
from pipeline.interruption import if_interrupted
from pipeline.killers import Trial, without_killers
from pipeline.progress import ProgressLine, clock, say
from pipeline.recognize import recognize, same_slide
from pipeline.settings import ExtractionSettings
from pipeline.slide_locks import await_lost_workers

Encode = Callable[
    [FeatureStore, Sequence[str], Sequence[LoadedEncoder], ExtractionSettings],
    ExtractionProgress,
]
"""Encodes what slides miss, with encoders that are loaded; there are none where nothing is missing."""

SHOWN_SLIDES = 5
"""Slides that a sentence names."""


@dataclass(frozen=True, kw_only=True)
class ExtractionSummary:
    """What stage one did."""

    store: Location
    encoders: tuple[str, ...]
    slides: int
    patches: int
    encoded: int
    """Patches that this call encoded; 0 if everything was stored already, or everything failed."""
    failed_slides: dict[str, str]
    unreadable: dict[str, list[str]]
    left_out: dict[str, int]
    """Patches without features, by the artifact that they show. They are not losses."""
    seconds: dict[str, float]
    notes: tuple[str, ...]
    """What is not as expected about slides and images that this call has read, a sentence for each kind."""
    elapsed: float
    """Seconds from the first patch asked for to the last shard written."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing was lost."""
        return not self.failed_slides and not self.unreadable


def run_extraction(
    inputs: Sequence[Path],
    store_path: Path,
    encoder_specs: Sequence[EncoderSpec],
    grid: GridSpec,
    views: ViewSpec,
    settings: ExtractionSettings,
    *,
    tissue: TissueMethod | None = None,
    encode: Encode | None = None,
) -> ExtractionSummary:
    """Find the patches of all inputs and store their features of all encoders.

    `tissue` is the method that `grid.tissue` names; a threshold is found by that name alone. `encode` is called in the
    place of `encode_cohort`, while the store is locked.

    Raises:
        G2LError: Nothing could be started: bad inputs, settings or encoders.
    """
    encoder_specs = [with_runtime(spec, settings.runtime) for spec in encoder_specs]
    for spec in encoder_specs if not settings.force_mpp else ():
        require_mpp(spec, grid.mpp)
    with locked(store_path / LOCKS / "writer", wait_s=0, holder="another g2l command writes into it"):
        sources, refused = recognized_sources(inputs, store_path, settings)
        if tissue is not None:
            tissue.require_distinct(sources)
        trial = without_killers(sources, store_path, grid, settings)
        keys = stored_keys(store_path, encoder_specs, settings)
        needed = encoder_specs if has_work(trial.sources, store_path, keys, settings) else ()
        for spec in needed:
            require_input_side(spec)
            require_weights(spec)
        audit_new(trial.sources, store_path, settings)
        encoders = load_encoders(needed, settings)  # before the store: a failure leaves no empty one behind
        store = FeatureStore.create(store_path, grid=grid.to_json(), views=views.to_json())
        store.sweep()
        add_encoders(store, encoders)
        sources = list(trial.sources)
        if settings.retry_failed:
            wanted = lost_slides(store) | trial.acquitted
            sources = [source for source in sources if source.slide_id in wanted]
        notes: dict[str, list[str]] = {}
        failed = refused | blame(store, trial) | patch_cohort(store, sources, grid, views, settings, tissue, notes)
        ready = [source.slide_id for source in sources if source.slide_id not in failed]
        if not encoders and count_missing(store, ready, keys, settings):
            encoders = load_encoders(encoder_specs, settings)
            add_encoders(store, encoders)
        keys = [encoder.key for encoder in encoders] or keys
        progress = (encode or encode_cohort)(store, ready, encoders, settings)
        summary = _finish(store, ready, failed, keys, encoders, progress, settings)
        return replace(summary, notes=(*_told(notes), *summary.notes))


def _told(notes: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """A sentence for each kind of note, with the slides that have it."""
    return tuple(
        f"{len(slides):,} slide{'s' * (len(slides) > 1)}: {text}: {some(slides)}" for text, slides in notes.items()
    )


def _told_images(counts: Mapping[str, int], text: str) -> tuple[str, ...]:
    """A sentence on patch images that were turned, or lack a profile, if there are some; with how many of each set."""
    count = sum(counts.values())
    named = some([f"{slide_id} ({n:,})" for slide_id, n in counts.items()])
    return (f"{count:,} image{'s' * (count > 1)} {text}: {named}",) if count else ()


def some(names: Sequence[str]) -> str:
    """The first names, and how many there are beyond."""
    more = len(names) - SHOWN_SLIDES
    return ", ".join(names[:SHOWN_SLIDES]) + (f" and {more:,} more" if more > 0 else "")


def blame(store: FeatureStore, trial: Trial) -> dict[str, str]:
    """Record the slides that ended processes as failed, and return their reasons.

    If patches of one are stored, but no encoder has features of all, they go: nothing will ever be read of them, and a
    benchmark would wait for them.
    """
    stored = {slide.slide_id: slide for slide in store.slides()}
    for source in trial.left_out:
        slide = stored.get(source.slide_id)
        if slide is not None and not any(_has_features(slide, key) for key in slide.encoder_keys):
            store.remove_slide(slide.slide_id)
        store.fail_slide(source.slide_id, str(source.path.resolve()), trial.blamed[source.slide_id], source.labels)
    return trial.blamed


def _has_features(slide: StoredSlide, key: str) -> bool:
    return slide.records(key, [0]).keys() >= {shard.name for shard in slide.shards([0])}


def _finish(
    store: FeatureStore,
    ready: Sequence[str],
    failed: dict[str, str],
    keys: Sequence[str],
    encoders: Sequence[LoadedEncoder],
    progress: ExtractionProgress,
    settings: ExtractionSettings,
) -> ExtractionSummary:
    note_run(store, encoders, progress, settings)
    consolidate(store.slides())
    store.save_catalogue()
    damaged = store.damaged
    stored = [store.slide(slide_id) for slide_id in ready if slide_id not in damaged]
    sound = [slide for slide in stored if slide.slide_id not in progress.failed_slides]
    unfinished = [slide_id for slide_id in ready if slide_id in progress.failed_slides]
    still_missing = count_missing(store, unfinished, keys, settings)
    return ExtractionSummary(
        store=folder_of(store.path),
        encoders=tuple(keys),
        slides=len(ready),
        patches=sum(map(len, stored)),
        encoded=max(0, progress.patches_total - still_missing),
        failed_slides=failed | progress.failed_slides,
        unreadable={slide.slide_id: lost for slide in sound if (lost := list(slide.unreadable.values()))},
        left_out=count_artifacts(np.concatenate([np.zeros(0, np.uint8), *(slide.patch_status for slide in sound)])),
        seconds=progress.seconds,
        notes=(*_told_images(progress.turned, TURNED), *_told_images(progress.unprofiled, NO_PROFILE)),
        elapsed=progress.elapsed,
    )


def recognized_sources(
    inputs: Sequence[Path], store_path: Path, settings: ExtractionSettings
) -> tuple[list[Source], dict[str, str]]:
    """The sources that the inputs name, under the ids that the store has for them, and why others are left out."""
    sources = read_sources(inputs)
    if (store := _stored(store_path)) is None:
        return sources, {}
    found = recognize(store, sources, workers=settings.workers)
    if found.renamed:
        asked, slide_id = next(iter(found.renamed.items()))
        say(f"{len(found.renamed)} slides are stored under another id and keep it, such as {asked}: {slide_id}")
    return list(found.sources), dict(found.refused)


def _stored(path: Path) -> FeatureStore | None:
    return FeatureStore.open(path) if (path / "zarr.json").exists() else None


def stored_keys(store_path: Path, specs: Sequence[EncoderSpec], settings: ExtractionSettings) -> list[str]:
    """The keys of the encoders in the store; none if one of them is not there, or if only its weights can tell."""
    if (store := _stored(store_path)) is None:
        return []
    device, precision = settings.device, settings.encoder_precision
    keys = [stored_key(spec, store.encoders, device=device, precision=precision) for spec in specs]
    return [] if None in keys else [key for key in keys if key]


def has_work(sources: Sequence[Source], store_path: Path, keys: Sequence[str], settings: ExtractionSettings) -> bool:
    """Whether something is to be encoded, as far as that is known before slides are opened.

    Slides that failed before are no work: they are tried again, but without need for the weights, as they may well fail
    again.
    """
    store = _stored(store_path)
    if store is None or not keys:
        return True
    stored, asked = {slide.slide_id for slide in store.slides()}, {source.slide_id for source in sources}
    if not settings.retry_failed and asked - stored - store.failed_slides().keys():
        return True
    return count_missing(store, sorted(asked & stored), keys, settings) > 0


def count_missing(
    store: FeatureStore, slide_ids: Sequence[str], keys: Sequence[str], settings: ExtractionSettings
) -> int:
    """How many patches of these slides are to be encoded."""
    return missing_patches(store, slide_ids, keys, 1 + settings.views, retry_unreadable=settings.retry_failed)


def add_encoders(store: FeatureStore, encoders: Sequence[LoadedEncoder]) -> None:
    """Make encoders known to the store.

    Raises:
        StoreMismatchError: Another encoder has the key of one of them.
    """
    for encoder in encoders:
        store.add_encoder(encoder.key, encoder.facts if encoder.key in store.encoders else stored_facts(encoder))


def load_encoders(specs: Sequence[EncoderSpec], settings: ExtractionSettings) -> list[LoadedEncoder]:
    """Load the encoders as the settings have it."""
    return [load_encoder(spec, device=settings.device, precision=settings.encoder_precision) for spec in specs]


def audit_new(sources: Sequence[Source], store_path: Path, settings: ExtractionSettings) -> None:
    """Show the scales of the slides that the store does not have yet, and stop at doubtful ones.

    Raises:
        MppError: Some are doubtful, and that was not accepted.
    """
    known = set[str]()
    if (store_path / "zarr.json").exists():
        known = {slide.slide_id for slide in FeatureStore.open(store_path).slides()}
    new = [source for source in sources if source.slide_id not in known]
    facts, findings, _ = audit_sources(
        new,
        mpp_override=settings.mpp_override,
        workers=settings.workers,
        watch=UnderWay(store_path),
        timeout=settings.slide_timeout,
    )
    if facts:
        say(audit_table(facts, findings))
        if unused := describe_unused_override(facts, settings.mpp_override):
            say(unused)
    require_plausible(findings, accept_mpp=settings.accept_mpp)


def lost_slides(store: FeatureStore) -> set[str]:
    """The slides that failed, and those with patches that could not be read."""
    return {*store.failed_slides(), *(slide.slide_id for slide in store.slides() if slide.unreadable)}


def note_run(
    store: FeatureStore, encoders: Sequence[LoadedEncoder], progress: ExtractionProgress, settings: ExtractionSettings
) -> None:
    """Keep in the store what this call did and where its time went, unless there was nothing to do."""
    if not progress.patches_total:
        return
    store.add_run(
        ExtractionRunFacts(
            ended=utc_now(),
            encoders=tuple(encoder.key for encoder in encoders),
            patches=progress.patches_done,
            views=1 + settings.views,
            workers=settings.workers,
            batch_size=settings.batch_size,
            device=str(encoders[0].device),
            elapsed=round(progress.elapsed, 3),
            seconds={part: round(spent, 3) for part, spent in progress.seconds.items()},
            utilization=round(progress.utilization, 4),
        )
    )


def patch_cohort(
    store: FeatureStore,
    sources: Sequence[Source],
    grid: GridSpec,
    views: ViewSpec,
    settings: ExtractionSettings,
    tissue: TissueMethod | None,
    notes: dict[str, list[str]],
) -> dict[str, str]:
    """Store the patches of every source, and return the reasons of those that failed.

    `notes` gains what is not as expected about the others: for each kind, the slides.
    """
    n_views = 1 + settings.views
    failed = dict(store.damaged)
    known = {slide.slide_id: slide for slide in store.slides()}
    if other := other_scales(sources, known):
        say(other)
    failed |= refresh_known(known, sources, grid, views, settings, tissue)
    new = [source for source in sources if source.slide_id not in known and source.slide_id not in failed]
    failed |= store.refusals(source.slide_id for source in new)
    new = [source for source in new if source.slide_id not in failed]
    stored = {slide.facts.fingerprint: slide_id for slide_id, slide in known.items()}
    outcomes = patch_sources(
        new,
        grid,
        mpp_override=settings.mpp_override,
        workers=settings.workers,
        tissue=tissue,
        qc=overview_folder(folder_of(store.path)) if settings.pictures else None,
        watch=UnderWay(folder_of(store.path)),
        timeout=settings.slide_timeout,
    )
    with ProgressLine("tissue", "slides") as line:
        for done, outcome in enumerate(outcomes, start=1):
            source, patched = outcome.source, outcome.patched
            if patched is None:
                failed[source.slide_id] = str(outcome.error)
                store.fail_slide(source.slide_id, str(source.path.resolve()), str(outcome.error), source.labels)
            elif source.path.is_file() and (same := stored.get(patched.facts.fingerprint)) is not None:
                failed[source.slide_id] = same_slide(source.path, same)
            else:
                stored[patched.facts.fingerprint] = source.slide_id
                store_patched(store, source, patched, views, n_views)
                for remark in patched.remarks:
                    say(remark)
                for note in patched.notes:
                    detail = f" ({note.detail})" if note.detail else ""
                    notes.setdefault(note.text, []).append(f"{source.slide_id}{detail}")
            line.update(done, len(new))
    return failed


def refresh_known(
    known: Mapping[str, StoredSlide],
    sources: Sequence[Source],
    grid: GridSpec,
    views: ViewSpec,
    settings: ExtractionSettings,
    tissue: TissueMethod | None,
) -> dict[str, str]:
    """Update the slides that the store has already, and return the reasons of those that cannot be used any more."""
    failed: dict[str, str] = {}
    for source in (source for source in sources if source.slide_id in known):
        slide = known[source.slide_id]
        try:
            if settings.retry_failed:
                compare = partial(adopt_repaired, slide, source.path, grid, views)
                within(settings.slide_timeout, compare, "comparing it with what was cached")
            refresh_stored(slide, source, views, 1 + settings.views, tissue, settings.slide_timeout)
        except (SlideError, StoreMismatchError, StoreCorruptError) as error:
            failed[source.slide_id] = str(error)
    return failed


def other_scales(sources: Sequence[Source], known: Mapping[str, StoredSlide]) -> str:
    """A line on stored slides that the manifest gives another scale now; empty if there are none."""
    stored = {s.slide_id: known[s.slide_id].facts.mpp for s in sources if s.slide_id in known}
    other = [s for s in sources if s.mpp and (mpp := stored.get(s.slide_id)) and differs(s.mpp, mpp)]
    if not other:
        return ""
    first = other[0]
    return (
        f"the manifest gives {len(other)} slides another um/px than they were cached with, such as {first.slide_id} "
        f"({first.mpp:g}, stored {stored[first.slide_id]:g}): their patches stay as they are; cache them into another "
        "--store"
    )


def encode_cohort(
    store: FeatureStore, slide_ids: Sequence[str], encoders: Sequence[LoadedEncoder], settings: ExtractionSettings
) -> ExtractionProgress:
    """Encode what the slides still miss, with a progress line."""
    if not encoders:
        return ExtractionProgress()
    keys = [encoder.key for encoder in encoders]
    line = ProgressLine(" + ".join(keys) if len(keys) <= 2 else f"{len(keys)} encoders", "patches")
    latest = ExtractionProgress()

    def report(progress: ExtractionProgress) -> None:
        nonlocal latest
        latest = progress
        note = f"encoder {progress.utilization:.0%} busy  bottleneck: {progress.bottleneck}"
        line.update(progress.patches_done, progress.patches_total, note)

    with line, if_interrupted(lambda: patches_left(latest)):
        if settings.local_workers or settings.scheduler:
            from pipeline.cluster import encode_on_workers

            progress = encode_on_workers(store, slide_ids, encoders, settings, report)
        else:
            held_back = await_lost_workers(folder_of(store.path), slide_ids, settings.slide_timeout)
            free = [slide_id for slide_id in slide_ids if slide_id not in held_back]
            progress = encode_slides(store, free, encoders, settings, report)
            progress.failed_slides |= held_back
    if progress.patches_total:
        say(time_spent(progress))
    return progress


def patches_left(progress: ExtractionProgress) -> str:
    """What an interrupted call leaves to the next one."""
    counts = (
        f"{progress.patches_kept:,} of {progress.patches_total:,} patches are kept" if progress.patches_total else ""
    )
    return f"{counts or 'the patches that were found are kept'}; the same command goes on from there"


def time_spent(progress: ExtractionProgress) -> str:
    """Where the time went, in one line: reading and augmenting are sums over threads."""
    parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in progress.seconds.items())
    return f"{clock(progress.elapsed)}: {parts}; encoder {progress.utilization:.0%} busy"

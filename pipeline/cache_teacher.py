"""Stage one: from slides to stored features. Behind `g2l cache-teacher` and `g2l embed`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from g2l_core.encoders.loading import LoadedEncoder, load_encoder, require_mpp
from g2l_core.encoders.resolve import EncoderSpec
from g2l_core.errors import SlideError, StoreMismatchError
from g2l_core.extraction.extract import ExtractionProgress
from g2l_core.extraction.patching import patch_sources, refresh_stored, store_patched
from g2l_core.extraction.repair import adopt_repaired
from g2l_core.patches.artifacts import count_artifacts
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.views import ViewSpec
from g2l_core.slides.manifest import Source, read_sources
from g2l_core.slides.mpp import audit_table
from g2l_core.store.facts import ExtractionRunFacts
from g2l_core.store.features import FeatureStore
from g2l_core.store.locks import LOCKS, locked
from g2l_core.store.provenance import utc_now
from g2l_core.tissue.methods import TissueMethod
from g2l_core.tissue.overview import overview_folder
from pipeline.audit import audit_sources, require_plausible
from pipeline.extract import encode_slides
from pipeline.progress import ProgressLine, clock, say
from pipeline.settings import ExtractionSettings


@dataclass(frozen=True, kw_only=True)
class ExtractionSummary:
    """What stage one did."""

    store: Path
    encoders: tuple[str, ...]
    slides: int
    patches: int
    encoded: int
    """Patches that this call had to encode; 0 if everything was stored already."""
    failed_slides: dict[str, str]
    unreadable: dict[str, list[str]]
    left_out: dict[str, int]
    """Patches without features, by the artifact that they show. They are not losses."""
    seconds: dict[str, float]
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
) -> ExtractionSummary:
    """Find the patches of all inputs and store their features of all encoders.

    `tissue` is the method that `grid.tissue` names; a threshold is found by that name alone.

    Raises:
        G2LError: Nothing could be started: bad inputs, settings or encoders.
    """
    sources = read_sources(inputs)
    for spec in encoder_specs if not settings.force_mpp else ():
        require_mpp(spec, grid.mpp)
    with locked(store_path / LOCKS / "writer", wait_s=0, holder="another g2l command writes into it"):
        audit_new(sources, store_path, settings)
        store = FeatureStore.create(store_path, grid=grid.to_json(), views=views.to_json())
        return _fill(store, sources, encoder_specs, grid, views, settings, tissue)


def _fill(
    store: FeatureStore,
    sources: Sequence[Source],
    encoder_specs: Sequence[EncoderSpec],
    grid: GridSpec,
    views: ViewSpec,
    settings: ExtractionSettings,
    tissue: TissueMethod | None,
) -> ExtractionSummary:
    if settings.retry_failed:
        wanted = lost_slides(store)
        sources = [source for source in sources if source.slide_id in wanted]
    encoders = [
        load_encoder(spec, device=settings.device, precision=settings.encoder_precision) for spec in encoder_specs
    ]
    for encoder in encoders:
        store.add_encoder(encoder.key, encoder.facts)
    failed = patch_cohort(store, sources, grid, views, settings, tissue)
    ready = [source.slide_id for source in sources if source.slide_id not in failed]
    progress = encode_cohort(store, ready, encoders, settings)
    note_run(store, encoders, progress, settings)
    return ExtractionSummary(
        store=store.path,
        encoders=tuple(encoder.key for encoder in encoders),
        slides=len(ready),
        patches=sum(len(store.slide(slide_id)) for slide_id in ready),
        encoded=progress.patches_total,
        failed_slides=failed | progress.failed_slides,
        unreadable={slide_id: lost for slide_id in ready if (lost := list(store.slide(slide_id).unreadable.values()))},
        left_out=count_artifacts(
            np.concatenate([np.zeros(0, np.uint8), *(store.slide(i).patch_status for i in ready)])
        ),
        seconds=progress.seconds,
        elapsed=progress.elapsed,
    )


def audit_new(sources: Sequence[Source], store_path: Path, settings: ExtractionSettings) -> None:
    """Show the scales of the slides that the store does not have yet, and stop at doubtful ones.

    Raises:
        MppError: Some are doubtful, and that was not accepted.
    """
    known = set[str]()
    if (store_path / "zarr.json").exists():
        known = {slide.slide_id for slide in FeatureStore.open(store_path).slides()}
    new = [source for source in sources if source.slide_id not in known]
    facts, findings, _ = audit_sources(new, mpp_override=settings.mpp_override, workers=settings.workers)
    if facts:
        say(audit_table(facts, findings))
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
) -> dict[str, str]:
    """Store the patches of every source, and return the reasons of those that failed."""
    failed: dict[str, str] = {}
    n_views = 1 + settings.views
    known = {slide.slide_id: slide for slide in store.slides()}
    for source in sources:
        if source.slide_id in known:
            try:
                if settings.retry_failed:
                    adopt_repaired(known[source.slide_id], source.path, grid, views)
                refresh_stored(known[source.slide_id], source, views, n_views, tissue)
            except (SlideError, StoreMismatchError) as error:
                failed[source.slide_id] = str(error)
    new = [source for source in sources if source.slide_id not in known]
    outcomes = patch_sources(
        new,
        grid,
        mpp_override=settings.mpp_override,
        workers=settings.workers,
        tissue=tissue,
        qc=overview_folder(store.path) if settings.pictures else None,
    )
    with ProgressLine("tissue", "slides") as line:
        for done, outcome in enumerate(outcomes, start=1):
            if outcome.patched is not None:
                store_patched(store, outcome.source, outcome.patched, views, n_views)
                for remark in outcome.patched.remarks:
                    say(remark)
            else:
                failed[outcome.source.slide_id] = str(outcome.error)
                store.fail_slide(outcome.source.slide_id, str(outcome.source.path.resolve()), str(outcome.error))
            line.update(done, len(new))
    return failed


def encode_cohort(
    store: FeatureStore, slide_ids: Sequence[str], encoders: Sequence[LoadedEncoder], settings: ExtractionSettings
) -> ExtractionProgress:
    """Encode what the slides still miss, with a progress line."""
    line = ProgressLine(" + ".join(encoder.key for encoder in encoders), "patches")

    def report(progress: ExtractionProgress) -> None:
        note = f"encoder {progress.utilization:.0%} busy  bottleneck: {progress.bottleneck}"
        line.update(progress.patches_done, progress.patches_total, note)

    with line:
        if settings.local_workers or settings.scheduler:
            from pipeline.cluster import encode_on_workers

            progress = encode_on_workers(store, slide_ids, encoders, settings, report)
        else:
            progress = encode_slides(store, slide_ids, encoders, settings, report)
    if progress.patches_total:
        say(time_spent(progress))
    return progress


def time_spent(progress: ExtractionProgress) -> str:
    """Where the time went, in one line: reading and augmenting are sums over threads."""
    parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in progress.seconds.items())
    return f"{clock(progress.elapsed)}: {parts}; encoder {progress.utilization:.0%} busy"

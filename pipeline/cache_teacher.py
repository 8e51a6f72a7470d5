"""Stage one: from slides to stored features. Behind `g2l cache-teacher` and `g2l embed`."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from g2l_core.caching import CacheProgress, cache_features, missing_patches
from g2l_core.encoder_loading import LoadedEncoder, load_encoder, require_mpp
from g2l_core.encoders import EncoderSpec
from g2l_core.errors import SlideError, StoreMismatchError
from g2l_core.grid import GridSpec
from g2l_core.laying import lay_sources, refresh_stored, store_laid
from g2l_core.manifest import Source, read_sources
from g2l_core.repair import adopt_repaired
from g2l_core.scale import audit_table
from g2l_core.staging import Stage
from g2l_core.store.features import FeatureStore
from g2l_core.views import ViewSpec
from pipeline.audit import audit_sources, require_plausible
from pipeline.progress import ProgressLine, clock, say


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """How stage one runs. None of it changes the features, but for the precision."""

    views: int = 2
    """Augmented views of each patch, beside the canonical one."""
    device: str = "auto"
    precision: str = "auto"
    batch_size: int = 32
    workers: int = 2
    mpp_override: float | None = None
    accept_mpp: bool = False
    """Go on with scales that look implausible."""
    stage_dir: Path | None = None
    """A fast local folder that the next slides are copied to."""
    stage_gb: float = 50.0
    """Most GB (1e9 bytes) of copies at a time."""
    retry_failed: bool = False
    """Take up only slides that failed and patches that could not be read."""


@dataclass(frozen=True, kw_only=True)
class CacheSummary:
    """What stage one did."""

    store: Path
    encoders: tuple[str, ...]
    slides: int
    patches: int
    encoded: int
    """Patches that this call had to encode; 0 where everything was stored already."""
    failed_slides: dict[str, str]
    unreadable: dict[str, list[str]]
    seconds: dict[str, float]
    elapsed: float
    """Seconds from the first patch asked for to the last shard written."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing was lost."""
        return not self.failed_slides and not self.unreadable


def run_cache(
    inputs: Sequence[Path],
    store_path: Path,
    encoder_specs: Sequence[EncoderSpec],
    grid: GridSpec,
    views: ViewSpec,
    settings: CacheSettings,
) -> CacheSummary:
    """Lay the patches of all inputs and cache the features of all encoders.

    Raises:
        G2LError: Nothing could be started: bad inputs, settings or encoders.
    """
    sources = read_sources(inputs)
    for spec in encoder_specs:
        require_mpp(spec, grid.mpp)
    audit_new(sources, store_path, settings)
    store = FeatureStore.create(store_path, grid=asdict(grid), views=asdict(views))
    if settings.retry_failed:
        wanted = lost_slides(store)
        sources = [source for source in sources if source.slide_id in wanted]
    encoders = [load_encoder(spec, device=settings.device, precision=settings.precision) for spec in encoder_specs]
    for encoder in encoders:
        store.add_encoder(encoder.key, encoder.facts)
    failed = lay_cohort(store, sources, grid, views, settings)
    ready = [source.slide_id for source in sources if source.slide_id not in failed]
    progress = encode_cohort(store, ready, encoders, settings)
    note_run(store, encoders, progress, settings)
    return CacheSummary(
        store=store_path,
        encoders=tuple(encoder.key for encoder in encoders),
        slides=len(ready),
        patches=sum(len(store.slide(slide_id)) for slide_id in ready),
        encoded=progress.patches_total,
        failed_slides=failed | progress.failed_slides,
        unreadable={slide_id: lost for slide_id in ready if (lost := list(store.slide(slide_id).unreadable.values()))},
        seconds=progress.seconds,
        elapsed=progress.elapsed,
    )


def audit_new(sources: Sequence[Source], store_path: Path, settings: CacheSettings) -> None:
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
    store: FeatureStore, encoders: Sequence[LoadedEncoder], progress: CacheProgress, settings: CacheSettings
) -> None:
    """Keep in the store what this call did and where its time went; nothing where there was nothing to do."""
    if not progress.patches_total:
        return
    seconds = {part: round(spent, 3) for part, spent in progress.seconds.items()}
    store.add_run(
        {
            "encoders": [encoder.key for encoder in encoders],
            "patches": progress.patches_done,
            "views": 1 + settings.views,
            "workers": settings.workers,
            "batch_size": settings.batch_size,
            "device": str(encoders[0].device),
            "elapsed": round(progress.elapsed, 3),
            "seconds": seconds,
            "utilisation": round(progress.utilisation, 4),
        }
    )


def lay_cohort(
    store: FeatureStore, sources: Sequence[Source], grid: GridSpec, views: ViewSpec, settings: CacheSettings
) -> dict[str, str]:
    """Bring every source's patches into the store; return the reasons of those that failed."""
    failed: dict[str, str] = {}
    n_views = 1 + settings.views
    known = {slide.slide_id: slide for slide in store.slides()}
    for source in sources:
        if source.slide_id in known:
            try:
                if settings.retry_failed:
                    adopt_repaired(known[source.slide_id], source.path, grid, views)
                refresh_stored(known[source.slide_id], source, views, n_views)
            except (SlideError, StoreMismatchError) as error:
                failed[source.slide_id] = str(error)
    new = [source for source in sources if source.slide_id not in known]
    line = ProgressLine("tissue", "slides")
    outcomes = lay_sources(new, grid, mpp_override=settings.mpp_override, workers=settings.workers)
    for done, outcome in enumerate(outcomes, start=1):
        if outcome.laid is not None:
            store_laid(store, outcome.source, outcome.laid, views, n_views)
        else:
            failed[outcome.source.slide_id] = str(outcome.error)
            store.fail_slide(outcome.source.slide_id, str(outcome.source.path.resolve()), str(outcome.error))
        line.update(done, len(new))
    line.close()
    return failed


def encode_cohort(
    store: FeatureStore, slide_ids: Sequence[str], encoders: Sequence[LoadedEncoder], settings: CacheSettings
) -> CacheProgress:
    """Encode what the slides still miss, with a progress line."""
    line = ProgressLine(" + ".join(encoder.key for encoder in encoders), "patches")

    def report(progress: CacheProgress) -> None:
        note = f"encoder {progress.utilisation:.0%} busy  bottleneck: {progress.bottleneck}"
        line.update(progress.patches_done, progress.patches_total, note)

    with _stage(store, slide_ids, encoders, settings) as stage:
        progress = cache_features(
            store,
            slide_ids,
            encoders,
            n_views=1 + settings.views,
            batch_size=settings.batch_size,
            workers=settings.workers,
            report=report,
            retry_unreadable=settings.retry_failed,
            stage=stage,
        )
    line.close()
    if progress.patches_total:
        say(time_spent(progress))
    return progress


def _stage(
    store: FeatureStore, slide_ids: Sequence[str], encoders: Sequence[LoadedEncoder], settings: CacheSettings
) -> AbstractContextManager[Stage | None]:
    """Copies of the slides that still have something to be read, ahead of their turn; None where none are asked for."""
    if settings.stage_dir is None:
        return nullcontext()
    n_views, again = 1 + settings.views, settings.retry_failed
    slides = [
        store.slide(i) for i in slide_ids if missing_patches(store, [i], encoders, n_views, retry_unreadable=again)
    ]
    paths = [Path(slide.facts["source"]) for slide in slides if slide.patch_ids is None]
    return Stage(settings.stage_dir, int(settings.stage_gb * 1e9), paths, say)


def time_spent(progress: CacheProgress) -> str:
    """Where the time went, in one line: reading and augmenting are sums over threads."""
    parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in progress.seconds.items())
    return f"{clock(progress.elapsed)}: {parts}; encoder {progress.utilisation:.0%} busy"

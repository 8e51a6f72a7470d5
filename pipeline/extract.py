"""The second half of stage one: encode what the slides of a store still miss, in this process."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from g2l_core.encoders.loading import LoadedEncoder
from g2l_core.extraction.extract import ExtractionProgress, extract_features, missing_patches
from g2l_core.slides.staging import Stage
from g2l_core.store.features import FeatureStore
from pipeline.progress import say
from pipeline.settings import ExtractionSettings


def encode_slides(
    store: FeatureStore,
    slide_ids: Sequence[str],
    encoders: Sequence[LoadedEncoder],
    settings: ExtractionSettings,
    report: Callable[[ExtractionProgress], None],
) -> ExtractionProgress:
    """Encode what the slides still miss in this process."""
    with _stage(store, slide_ids, encoders, settings) as stage:
        return extract_features(
            store,
            slide_ids,
            encoders,
            n_views=1 + settings.views,
            batch_size=settings.batch_size,
            workers=settings.workers,
            report=report,
            retry_unreadable=settings.retry_failed,
            stage=stage,
            timeout=settings.slide_timeout,
        )


def _stage(
    store: FeatureStore, slide_ids: Sequence[str], encoders: Sequence[LoadedEncoder], settings: ExtractionSettings
) -> AbstractContextManager[Stage | None]:
    """Copies of the slides that still have something to be read, ahead of their turn; None where none are asked for."""
    if settings.stage_dir is None:
        return nullcontext()
    keys, n_views, again = [encoder.key for encoder in encoders], 1 + settings.views, settings.retry_failed
    slides = [store.slide(i) for i in slide_ids if missing_patches(store, [i], keys, n_views, retry_unreadable=again)]
    paths = [Path(slide.facts.source) for slide in slides if slide.patch_ids is None]
    return Stage(settings.stage_dir, int(settings.stage_gb * 1e9), paths, say)

"""The second half of stage one: encode what the slides of a store still miss, in this process."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from g2l_core.encoders.loading import LoadedEncoder
from g2l_core.extraction.extract import ExtractionProgress, extract_features, missing_patches
from g2l_core.slides.staging import Stage
from g2l_core.store.features import FeatureStore
from pipeline.progress import say


@dataclass(frozen=True, kw_only=True)
class ExtractionSettings:
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
    force_mpp: bool = False
    """Encode patches at a scale that the encoder's card does not name."""
    pictures: bool = True
    """Whether every slide gets a picture and GeoJSON of its tissue beside the store."""
    stage_dir: Path | None = None
    """A fast local folder that the next slides are copied to."""
    stage_gb: float = 50.0
    """Most GB (1e9 bytes) of copies at a time."""
    local_workers: int = 0
    """Processes on this machine that share the encoding; 0 encodes in this one."""
    scheduler: str | None = None
    """Address of a dask scheduler whose workers share the encoding."""
    retry_failed: bool = False
    """Take up only slides that failed and patches that could not be read."""


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
        )


def _stage(
    store: FeatureStore, slide_ids: Sequence[str], encoders: Sequence[LoadedEncoder], settings: ExtractionSettings
) -> AbstractContextManager[Stage | None]:
    """Copies of the slides that still have something to be read, ahead of their turn; None where none are asked for."""
    if settings.stage_dir is None:
        return nullcontext()
    n_views, again = 1 + settings.views, settings.retry_failed
    slides = [
        store.slide(i) for i in slide_ids if missing_patches(store, [i], encoders, n_views, retry_unreadable=again)
    ]
    paths = [Path(slide.facts.source) for slide in slides if slide.patch_ids is None]
    return Stage(settings.stage_dir, int(settings.stage_gb * 1e9), paths, say)

"""Answers from some of the patches of each slide: what `g2l predict --budget` encodes, and when it stops."""

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from time import perf_counter

import numpy as np
from jaxtyping import Bool, Float64, Int64

from g2l_core.encoders.loading import LoadedEncoder
from g2l_core.errors import EncoderError, SlideError, StoreError, UsageError
from g2l_core.extraction.extract import ExtractionProgress
from g2l_core.extraction.some_rows import SomeRows
from g2l_core.heads.appearance import appearance
from g2l_core.heads.head import Head
from g2l_core.heads.sampling import Sampled, plan_sample, settle
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.render import open_patches
from g2l_core.slides.boundary import within
from g2l_core.slides.slide import open_slide
from g2l_core.slides.under_way import UnderWay
from g2l_core.store.features import FeatureStore, StoredSlide
from g2l_core.store.location import folder_of
from g2l_core.store.schema import STATUS
from g2l_core.tissue.thresholds import THUMBNAIL_MPP
from g2l_core.types import Features
from pipeline.progress import ProgressLine
from pipeline.settings import ExtractionSettings

TOLERANCE = 0.01
"""Of probabilities. docs/predicting.md has what it costs."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many patches may be encoded."""

    share: float
    """Of the patches of each slide, above 0 and at most 1; a slide has at least one."""
    tolerance: float = TOLERANCE
    """Half the width of an interval that counts as settled, of probabilities."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse shares and tolerances that mean nothing."""
        if not 0 < self.share <= 1:
            raise UsageError(f"--budget {self.share:g}: expected a share of the patches, above 0 and at most 1")
        if not 0 < self.tolerance < 1:
            raise UsageError(f"--tolerance {self.tolerance:g}: expected a difference of probabilities, from 0 to 1")

    def most(self, patches: int) -> int:
        """How many of so many patches may be encoded."""
        return max(1, int(self.share * patches + 1e-9))


def budget_of(share: float | None, tolerance: float | None, seed: int | None) -> Budget | None:
    """The budget that options ask for; None where they ask for all patches.

    Raises:
        UsageError: A value means nothing, or the others are given without the share.
    """
    if share is None:
        for name, value in (("tolerance", tolerance), ("seed", seed)):
            if value is not None:
                raise UsageError(f"--{name} is for --budget: leave it out, or give --budget as well")
        return None
    return Budget(share=share, tolerance=TOLERANCE if tolerance is None else tolerance, seed=seed or 0)


@dataclass
class BudgetRun:
    """Encodes patches of slides and keeps the answers."""

    head: Head
    budget: Budget
    settings: InitVar[ExtractionSettings]
    answers: dict[str, Sampled] = field(default_factory=dict)
    """By slide."""

    def __post_init__(self, settings: ExtractionSettings) -> None:
        """Refuse ways of encoding that a budget does not have."""
        for name in ("local_workers", "scheduler", "stage_dir", "retry_failed"):
            if getattr(settings, name):
                option = f"--{name.replace('_', '-')}"
                raise UsageError(f"--budget encodes a few patches of each slide in this process: leave {option} out")

    def encode(
        self,
        store: FeatureStore,
        slide_ids: Sequence[str],
        key: str,
        encoder: LoadedEncoder | None,
        settings: ExtractionSettings,
    ) -> ExtractionProgress:
        """Answer for every slide; those that fail are named in the progress. Without encoder all must be stored."""
        progress, begin = ExtractionProgress(), perf_counter()
        with ProgressLine("budget", "slides") as line:
            for done, slide_id in enumerate(slide_ids, start=1):
                try:
                    slide = store.slide(slide_id)
                    self.answers[slide_id], new = answer(self, store, slide, key, encoder, settings)
                    progress.patches_done += new
                except (SlideError, StoreError, EncoderError, UsageError) as error:
                    progress.failed_slides[slide_id] = str(error)
                line.update(done, len(slide_ids), f"{progress.patches_done:,} patches encoded")
        progress.patches_total, progress.elapsed = progress.patches_done, perf_counter() - begin
        return progress


def answer(
    run: BudgetRun,
    store: FeatureStore,
    slide: StoredSlide,
    key: str,
    encoder: LoadedEncoder | None,
    settings: ExtractionSettings,
) -> tuple[Sampled, int]:
    """Encode patches of a slide until its answer is settled or the budget is spent.

    Returns:
        The answer, and how many patches were encoded now.

    Raises:
        G2LError: The slide cannot be read, or none of the patches that were encoded is good.
    """
    watch, timeout = UnderWay(folder_of(store.path)), settings.slide_timeout
    with watch.reading(slide.slide_id):
        grid = GridSpec.from_json(store.grid)
        looks = within(timeout, lambda: looks_of(slide, icc=grid.icc), "reading its thumbnail")
        reader = within(timeout, lambda: open_patches(slide, grid), "opening it")
    source = SomeRows(
        store=store, slide=slide, key=key, encoder=encoder, reader=reader, batch_size=settings.batch_size,
        workers=settings.workers, timeout=timeout,
    )  # fmt: skip
    plan = plan_sample(looks, run.budget.most(len(slide)), run.budget.seed, slide.slide_id)
    encoded = 0

    def take(rows: Int64[np.ndarray, " row"]) -> tuple[Features, Bool[np.ndarray, " row"]]:
        nonlocal encoded
        features, status, new = source.features(rows)
        encoded += new
        return features, status == STATUS["ok"]

    try:
        found = settle(run.head, plan, take, run.budget.tolerance)
    finally:
        reader.close()
    if found is None:
        raise SlideError(f"{slide.slide_id}: none of the {plan.most:,} patches that were encoded is good")
    return found, encoded


def looks_of(slide: StoredSlide, *, icc: bool) -> Float64[np.ndarray, "patch look"]:
    """How the patches look on the thumbnail; nothing is known of patch images before they are read."""
    if slide.facts.kind != "slide":
        return np.zeros((len(slide), 0))
    with open_slide(Path(slide.facts.source), mpp_override=slide.facts.mpp, icc=icc) as opened:
        thumbnail = opened.read_thumbnail(THUMBNAIL_MPP)
    return appearance(thumbnail.image, thumbnail.downsample, slide.coords, slide.facts.patch_px_level0)

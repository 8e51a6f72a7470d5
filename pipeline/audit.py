"""Read the scales of all slides before anything is cached, and stop at those that cannot be true."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

from g2l_core.concurrency import run_ahead
from g2l_core.errors import MppError, SlideError
from g2l_core.slides.boundary import within
from g2l_core.slides.manifest import Source
from g2l_core.slides.mpp import ScaleFacts, ScaleFinding, audit_scale
from g2l_core.slides.slide import read_scale
from g2l_core.slides.under_way import UnderWay
from pipeline.progress import ProgressLine


def audit_sources(
    sources: Sequence[Source],
    *,
    mpp_override: float | None,
    workers: int,
    watch: UnderWay | None = None,
    timeout: float | None = None,
) -> tuple[list[ScaleFacts], list[ScaleFinding], dict[str, str]]:
    """The scale of every slide, from headers alone; sets of patch images have none and are left out.

    Args:
        sources: The slides.
        mpp_override: Micrometers per level-0 pixel where header and manifest give none.
        workers: Threads.
        watch: Where each slide is marked while it is open.
        timeout: Seconds that opening a slide may take.

    Returns:
        The facts in the sources' order, what is doubtful among them, and by id why others could not be read.
    """

    def read(source: Source) -> ScaleFacts | str:
        find = partial(read_scale, source.path, source.slide_id, manifest_mpp=source.mpp, mpp_override=mpp_override)
        try:
            with watch.reading(source.slide_id) if watch else nullcontext():
                return within(timeout, find, "opening it")
        except SlideError as error:
            return str(error)

    slides = [source for source in sources if not source.patch_ids]
    facts: list[ScaleFacts] = []
    failed: dict[str, str] = {}
    outcomes = run_ahead(read, slides, workers=workers, lookahead=2 * max(1, workers))
    with ProgressLine("scale", "slides") as line:
        for done, (source, outcome) in enumerate(zip(slides, outcomes, strict=True), start=1):
            if isinstance(outcome, str):
                failed[source.slide_id] = outcome
            else:
                facts.append(outcome)
            line.update(done, len(slides))
    return facts, audit_scale(facts), failed


def require_plausible(findings: Sequence[ScaleFinding], *, accept_mpp: bool) -> None:
    """Refuse a cohort with doubtful scales, unless they are accepted. Print `mpp.audit_table` first.

    Raises:
        MppError: There are findings.
    """
    if findings and not accept_mpp:
        raise MppError(
            "look at the table of um/px; then give mpp in the manifest, or --accept-mpp to go on with its figures. "
            f"Slides with a doubtful um/px: {len(findings)}, the first is {findings[0].slide_id}: "
            f"{'; '.join(findings[0].reasons)}"
        )

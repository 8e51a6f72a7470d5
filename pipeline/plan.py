"""`g2l plan`: what stage one would do and cost, from thumbnails and a few hundred patches. Writes nothing."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from g2l_core.encoders.loading import LoadedEncoder, encode, encode_all, load_encoder
from g2l_core.encoders.resolve import EncoderSpec
from g2l_core.encoders.weights import require_weights
from g2l_core.errors import EncoderError, SlideError
from g2l_core.extraction.patching import PatchedSlide, patch_sources
from g2l_core.patches.grid import GridSpec, blocks
from g2l_core.patches.render import ImagePatches, PatchReader, RenderedBlock, SlidePatches, render_block
from g2l_core.patches.views import ViewSpec, sample_views
from g2l_core.rng import keyed_generator
from g2l_core.slides.manifest import Source
from g2l_core.slides.slide import open_slide
from g2l_core.tissue.methods import TissueMethod
from g2l_core.types import Level0Px
from pipeline.forecast import RUNS, STEP_RATIO, Forecast, Speeds, forecast, gigabytes, speed_up, view_choices
from pipeline.gpus import LARGE, READ_SOURCE, find_gpu, published_speeds
from pipeline.progress import ProgressLine
from pipeline.settings import ExtractionSettings
from pipeline.tables import table_text

MEASURED_PATCHES = 256
LISTED_SLIDES = 20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a call of stage one would do."""

    patches: dict[str, int]
    failed_slides: dict[str, str]
    dims: dict[str, int | None]
    """Feature size by encoder; None where it is not known before its weights are there."""
    views: int
    workers: int
    epochs: int
    speeds: Speeds | None
    keys: Mapping[str, str] = field(default_factory=dict)
    """The key of each encoder that was measured, by its name."""
    why_not: str = ""
    """Why nothing was measured."""
    assumed: tuple[int, int] | None = None
    """Slides and patches of each, where there are none to look at."""
    sources: tuple[str, ...] = ()
    """Where speeds that were not measured here come from, in words."""

    @property
    def total(self) -> int:
        """Patches in all."""
        return self.assumed[0] * self.assumed[1] if self.assumed else sum(self.patches.values())

    def seconds_of(self, encoder: str) -> float:
        """Seconds a view of an encoder that was measured, by its name."""
        assert self.speeds is not None
        return self.speeds.encode[self.keys[encoder]]

    def with_views(self, views: int) -> Forecast | None:
        """The cost with another number of augmented views; None where nothing was measured."""
        return forecast(self.speeds, self.total, 1 + views, self.workers) if self.speeds else None

    def gigabytes(self, n_views: int) -> float | None:
        """Size of the features, None where a feature size is not known."""
        dims = [dim for dim in self.dims.values() if dim is not None]
        return gigabytes(self.total, n_views, dims) if len(dims) == len(self.dims) else None


def make_plan(
    sources: Sequence[Source],
    encoder_specs: Sequence[EncoderSpec],
    grid: GridSpec,
    views: ViewSpec,
    settings: ExtractionSettings,
    *,
    tissue: TissueMethod | None,
    epochs: int,
) -> Plan:
    """Find the patches of all sources on their thumbnails, and measure reading and encoding on some of them."""
    patched, failed = find_patches(sources, grid, settings, tissue)
    dims = {spec.name: spec.dim for spec in encoder_specs}
    keys: dict[str, str] = {}
    speeds, why_not = None, "no patch to measure with"
    if patched:
        try:
            for spec in encoder_specs:
                require_weights(spec)
            encoders = [
                load_encoder(s, device=settings.device, precision=settings.encoder_precision) for s in encoder_specs
            ]
            dims = {encoder.spec.name: encoder.dim for encoder in encoders}
            keys = {encoder.spec.name: encoder.key for encoder in encoders}
            speeds, why_not = measure(patched, encoders, grid, views, settings), ""
        except (EncoderError, SlideError) as error:
            why_not = str(error)
    return Plan(
        patches={source.slide_id: len(slide.coords) for source, slide in patched},
        failed_slides=failed,
        dims=dims,
        views=settings.views,
        workers=settings.workers,
        epochs=epochs,
        speeds=speeds,
        keys=keys,
        why_not=why_not,
    )


def plan_without_slides(
    specs: Sequence[EncoderSpec],
    slides: int,
    patches_per_slide: int,
    gpu: str,
    settings: ExtractionSettings,
    epochs: int,
) -> Plan:
    """The plan of a cohort that is not at hand, on a GPU that is not at hand, from published figures.

    Raises:
        UsageError: Nothing is known of the GPU, or of the network's cost.
    """
    found = find_gpu(gpu)
    speeds = published_speeds(specs, found)
    doubts = [
        f"{spec.name}: takes longer than that, as the speed is that of large vision transformers"
        for spec in specs
        if not spec.architecture.startswith(LARGE)
    ]
    counted = ", ".join(f"{spec.name} {found.tflops * speeds.encode[spec.name]:.3g}" for spec in specs)
    return Plan(
        patches={},
        failed_slides={},
        dims={spec.name: spec.dim for spec in specs},
        views=settings.views,
        workers=settings.workers,
        epochs=epochs,
        speeds=speeds,
        assumed=(slides, patches_per_slide),
        sources=(
            f"encode: TFLOP a view, counted on the architecture ({counted}), at {found.tflops:.0f} TFLOP/s",
            f"TFLOP/s: {found.source}",
            READ_SOURCE,
            *doubts,
        ),
    )


def find_patches(
    sources: Sequence[Source], grid: GridSpec, settings: ExtractionSettings, tissue: TissueMethod | None
) -> tuple[list[tuple[Source, PatchedSlide]], dict[str, str]]:
    """The patches of all sources, found on their thumbnails, and why others failed."""
    if tissue is not None:
        tissue.require_distinct(sources)
    patched: list[tuple[Source, PatchedSlide]] = []
    failed: dict[str, str] = {}
    outcomes = patch_sources(
        sources,
        grid,
        mpp_override=settings.mpp_override,
        workers=settings.workers,
        tissue=tissue,
        timeout=settings.slide_timeout,
    )
    with ProgressLine("tissue", "slides") as line:
        for done, outcome in enumerate(outcomes, start=1):
            if outcome.patched is not None:
                patched.append((outcome.source, outcome.patched))
            else:
                failed[outcome.source.slide_id] = str(outcome.error)
            line.update(done, len(sources))
    return patched, failed


def measure(
    patched: Sequence[tuple[Source, PatchedSlide]],
    encoders: Sequence[LoadedEncoder],
    grid: GridSpec,
    views: ViewSpec,
    settings: ExtractionSettings,
) -> Speeds:
    """Read, augment and encode about `MEASURED_PATCHES` patches, cells of as many slides as that takes.

    Raises:
        SlideError: A slide cannot be opened.
    """
    rendered, wanted = [], min(MEASURED_PATCHES, sum(len(slide.coords) for _, slide in patched))
    count = 0
    with ProgressLine("measuring", "patches") as line:
        for block in _sample(patched, grid, views, settings):
            rendered.append(block)
            count += len(block.pixels)
            line.update(min(count, wanted), wanted)
            if count >= wanted:
                break
    pixels = np.concatenate([block.pixels.reshape(-1, *block.pixels.shape[2:]) for block in rendered])
    return Speeds(
        patches=count,
        read=sum(block.seconds_read for block in rendered) / count,
        augment=sum(block.seconds_augment for block in rendered) / len(pixels),
        encode={encoder.key: _seconds_a_view(encoder, pixels, settings.batch_size) for encoder in encoders},
        shares_cores=encoders[0].device.type == "cpu",
    )


def _seconds_a_view(encoder: LoadedEncoder, pixels: np.ndarray, batch_size: int) -> float:
    """Whole batches after a first one that warms up; a padded one where there are too few views."""
    whole = pixels[: len(pixels) // batch_size * batch_size]
    first = np.zeros((batch_size, *pixels.shape[1:]), np.uint8)
    encode(encoder, first)
    begin = perf_counter()
    encode_all(encoder, whole if len(whole) else first, batch_size)
    return (perf_counter() - begin) / max(len(whole), batch_size)


def _sample(
    patched: Sequence[tuple[Source, PatchedSlide]], grid: GridSpec, views: ViewSpec, settings: ExtractionSettings
) -> Iterator[RenderedBlock]:
    """One cell of each slide after the other, in keyed random order, as stage one would render it."""
    runs = [(i, cell) for i, (_, slide) in enumerate(patched) for cell in enumerate(_cells(slide, grid))]
    order = keyed_generator("plan", grid.seed).permutation(len(patched))
    rank = {int(slide): place for place, slide in enumerate(order)}
    for i, (_, (start, stop)) in sorted(runs, key=lambda run: (run[1][0], rank[run[0]])):
        source, slide = patched[i]
        ids = None if slide.patch_ids is None else slide.patch_ids[start:stop]
        params = sample_views(views, source.slide_id, slide.coords[start:stop], range(1 + settings.views), ids)
        reader = _reader(source, slide, grid, settings.mpp_override)
        yield render_block(reader, range(start, stop), params, np.zeros(stop - start, np.uint8), views)


def _cells(slide: PatchedSlide, grid: GridSpec) -> list[tuple[int, int]]:
    return blocks(slide.coords, _side(slide), grid)


def _side(slide: PatchedSlide) -> Level0Px:
    return Level0Px(slide.facts.patch_px_level0)


def _reader(source: Source, slide: PatchedSlide, grid: GridSpec, mpp_override: float | None) -> PatchReader:
    if slide.patch_ids is not None:
        return ImagePatches(source.path, slide.patch_ids, grid.patch_px, icc=grid.icc)
    opened = open_slide(source.path, manifest_mpp=source.mpp, mpp_override=mpp_override, icc=grid.icc)
    return SlidePatches(opened, slide.coords, _side(slide), grid.patch_px)


# -- printing ---------------------------------------------------------------------------------------------


def plan_json(plan: Plan) -> dict[str, Any]:
    """Everything of the plan as plain values."""
    return {
        "patches": plan.patches,
        "failed_slides": plan.failed_slides,
        "dims": plan.dims,
        "views": plan.views,
        "workers": plan.workers,
        "gigabytes_per_view": plan.gigabytes(1),
        "gigabytes": plan.gigabytes(1 + plan.views),
        "total": plan.total,
        "assumed": plan.assumed,
        "measured": None if plan.speeds is None else {**vars(plan.speeds), "encode": dict(plan.speeds.encode)},
        "sources": list(plan.sources),
        "not_measured": plan.why_not,
        "forecast": None if plan.speeds is None else vars(plan.with_views(plan.views)),
        "views_table": _choices(plan),
    }


def _choices(plan: Plan) -> list[dict[str, Any]]:
    """What other numbers of augmented views would cost and gain."""
    rows = []
    for views in view_choices(plan.epochs):
        cost = plan.with_views(views)
        gains = {f"speed_up_{runs}_runs": speed_up(views, plan.epochs, runs) for runs in RUNS}
        hours = None if cost is None else cost.hours
        rows.append({"views": views, "gigabytes": plan.gigabytes(1 + views), "hours": hours, **gains})
    return rows


def plan_text(plan: Plan) -> str:
    """The plan at 80 columns."""
    if plan.assumed:
        slides = [(f"{plan.total:,}", f"patches: {plan.assumed[0]:,} slides of {plan.assumed[1]:,}, as you say")]
        return _plan_parts(plan, slides)
    slides = [(f"{patches:,}", slide_id) for slide_id, patches in list(plan.patches.items())[:LISTED_SLIDES]]
    if len(plan.patches) > LISTED_SLIDES:
        slides.append(("", f"and {len(plan.patches) - LISTED_SLIDES:,} more slides"))
    slides += [("failed", f"{slide_id}: {reason}") for slide_id, reason in plan.failed_slides.items()]
    failed = f", {len(plan.failed_slides):,} failed" if plan.failed_slides else ""
    slides.append((f"{plan.total:,}", f"patches of {len(plan.patches):,} slides{failed}"))
    return _plan_parts(plan, slides)


def _plan_parts(plan: Plan, slides: Sequence[tuple[str, str]]) -> str:
    facts = [("encoders", f"{name}: {dim or 'unknown number of'} features") for name, dim in plan.dims.items()]
    parts = [table_text(slides, right=[0]), table_text([*facts, *_cost_rows(plan)]), _choice_text(plan)]
    return "\n\n".join(parts)


def _cost_rows(plan: Plan) -> list[tuple[str, str]]:
    size, view = plan.gigabytes(1 + plan.views), plan.gigabytes(1)
    rows = []
    if size is not None and view is not None:
        rows.append(("store", f"{size_text(view)} a view, {size_text(size)} with {plan.views} augmented views"))
    if plan.speeds is None:
        return [*rows, ("time", f"not measured: {plan.why_not}")]
    speeds, cost = plan.speeds, forecast(plan.speeds, plan.total, 1 + plan.views, plan.workers)
    encode = " + ".join(f"{1e3 * seconds:.1f}" for seconds in speeds.encode.values())
    measured = (
        f"{f'on {speeds.patches} patches' if speeds.patches else 'not here'}: read {1e3 * speeds.read:.1f} ms a patch, "
        f"augment {1e3 * speeds.augment:.2f} and encode {encode} ms a view"
    )
    readers = (
        f"{cost.patches_needed:,.0f} patches/s keep the encoder busy; {plan.workers} workers read "
        f"{cost.patches_read:,.0f}/s"
    )
    if cost.enough_workers > plan.workers:
        readers += f"; --workers {cost.enough_workers} would be enough"
    time = f"{time_text(cost.hours)}; {cost.bottleneck} sets the pace"
    rows += [("speeds" if plan.sources else "measured", measured), ("time", time), ("readers", readers)]
    return [*rows, *(("source", source) for source in plan.sources)]


def _choice_text(plan: Plan) -> str:
    rows = [
        (
            str(row["views"]),
            "?" if row["gigabytes"] is None else size_text(row["gigabytes"]),
            "?" if row["hours"] is None else time_text(row["hours"]),
            *(f"{row[f'speed_up_{runs}_runs']:.2f} x" for runs in RUNS),
        )
        for row in _choices(plan)
    ]
    rows.append(("online", size_text(0.0), "none first", *("1.00 x" for _ in RUNS)))
    return (
        f"A teacher cached with V views, against one run live in {plan.epochs} epochs of distillation\n"
        f"(its forward pass costing {STEP_RATIO:g} of a student's step, as H-optimus-0 for Hibou-L):\n"
        + table_text(rows, header=("V", "store", "time", "one run", "five runs"), right=range(5))
    )


def size_text(gb: float) -> str:
    """Gigabytes for people."""
    return f"{gb:,.1f} GB" if gb >= 0.1 else f"{1e3 * gb:,.1f} MB"


def time_text(hours: float) -> str:
    """Hours for people."""
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} s"
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"

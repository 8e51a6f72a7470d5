"""`g2l run --dry-run`: what a study still has to do, with hours and gigabytes measured on this machine."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import wrap
from typing import Any

from g2l_core.encoders.loading import stored_key
from g2l_core.encoders.resolve import RUN_RECORD, EncoderSpec
from g2l_core.extraction.extract import missing_patches
from g2l_core.slides.manifest import read_sources
from g2l_core.store.features import FeatureStore
from pipeline.demo import draw_split_cohort
from pipeline.forecast import Speeds, forecast, gigabytes
from pipeline.plan import Plan, find_patches, make_plan, size_text, time_text
from pipeline.study import is_distilled
from pipeline.study_settings import DRAWN, Study, StudyCohort
from pipeline.tables import COLUMNS, table_text

BENCHMARK = "benchmark"
FORWARDS = 3
"""A training step costs about as much as so many forward passes: the backward pass has two matrix products for each one
of the forward pass (Kaplan et al. 2020, arXiv 2001.08361, section 2.1)."""


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """A step of a study."""

    name: str
    state: str
    """done, begun or to do."""
    what: str
    """What it works on, in words."""
    hours: float | None = None
    """What is left of it; None where that is not known."""
    gigabytes: float | None = None
    """What it leaves on the disk, of features alone."""


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """What a study still has to do."""

    title: str
    out: Path
    steps: tuple[PlannedStep, ...]
    failed_slides: Mapping[str, str]
    why_not: str = ""
    """Why no hours are known."""

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values."""
        return {**asdict(self), "out": str(self.out), "steps": [asdict(step) for step in self.steps]}


def plan_study(study: Study) -> StudyPlan:
    """Look at what is there, count patches on thumbnails, and measure reading and encoding. Writes nothing.

    Raises:
        G2LError: The slides or encoders cannot be used.
    """
    with TemporaryDirectory(prefix="g2l-") as scratch:
        cohort = study.cohort
        if study.drawn and not (study.out / DRAWN).is_dir():
            manifest = draw_split_cohort(Path(scratch) / DRAWN, study.drawn, cohort.grid.seed)
            cohort = replace(cohort, inputs=(manifest,))
        others = {each.spec.name: each.spec for each in study.compared if each.spec}
        specs = {spec.name: spec for spec in (*study.teachers, study.student)} | others
        made = make_plan(
            read_sources(cohort.inputs),
            list(specs.values()),
            cohort.grid,
            cohort.views,
            cohort.settings,
            tissue=cohort.tissue,
            epochs=study.epochs or 1,
        )
    steps = [_cache_step(study, made), _distill_step(study, made)]
    failed = dict(made.failed_slides)
    for store, other in study.evaluated.items():
        cached = {spec.name for spec in study.teachers} if store == study.store else set[str]()
        compared = [spec for spec in others.values() if spec.name not in cached]
        patches = made.patches
        if store != study.store:
            patched, lost = find_patches(read_sources(other.inputs), other.grid, other.settings, other.tissue)
            patches, failed = {source.slide_id: len(slide.coords) for source, slide in patched}, failed | lost
        steps.append(_embed_step(study, made, store, other, patches, compared))
    steps.append(
        PlannedStep(name=BENCHMARK, state="to do", what=f"tasks: {study.bench.tasks or 'made for these slides'}")
    )
    return StudyPlan(
        title=study.file.title, out=study.out, steps=tuple(steps), failed_slides=failed, why_not=made.why_not
    )


def _cache_step(study: Study, made: Plan) -> PlannedStep:
    views = 1 + study.cohort.settings.views
    left = _left(study.store, study.cohort, study.teachers, views, made.patches)
    names = " and ".join(spec.name for spec in study.teachers)
    return PlannedStep(
        name="cache the teacher",
        state=_state(left, made.total),
        what=f"{names}: {_patches(left, made.total)} of {len(made.patches):,} slides, {views} views",
        hours=_hours(made, study.teachers, left, views, study.cohort),
        gigabytes=_gigabytes(made, study.teachers, made.total, views),
    )


def _distill_step(study: Study, made: Plan) -> PlannedStep:
    train, batch = study.distill.train, study.distill.batch_size * study.distill.train.optim.accumulate
    views = study.epochs * made.total if study.epochs else train.steps * batch
    asked = f"{study.epochs} epochs" if study.epochs else f"{train.steps:,} steps of {batch}"
    is_begun = (study.run / RUN_RECORD).is_file()
    state = "done" if is_distilled(study) else "begun" if is_begun else "to do"
    hours = 0.0 if state == "done" else _hours(made, [study.student] * FORWARDS, views, 1, study.cohort)
    return PlannedStep(name="distill", state=state, what=f"{study.student.name}: at most {asked}", hours=hours)


def _embed_step(
    study: Study,
    made: Plan,
    store: Path,
    cohort: StudyCohort,
    patches: Mapping[str, int],
    others: Sequence[EncoderSpec],
) -> PlannedStep:
    total = sum(patches.values())
    left = _left(store, cohort, others, 1, patches) if is_distilled(study) else total
    specs = [*others, study.student]
    names = ", ".join([*(spec.name for spec in others), "the student"])
    return PlannedStep(
        name="cache what is compared",
        state=_state(left, total),
        what=f"{names}: {_patches(left, total)} of {len(patches):,} slides, in {store.name}",
        hours=_hours(made, specs, left, 1, cohort),
        gigabytes=_gigabytes(made, specs, total, 1),
    )


def _patches(left: int, total: int) -> str:
    return f"{left:,} of {total:,} patches" if 0 < left < total else f"{total:,} patches"


def _state(left: int, total: int) -> str:
    return "to do" if left == total else "begun" if left else "done"


def _left(
    path: Path, cohort: StudyCohort, specs: Sequence[EncoderSpec], n_views: int, patches: Mapping[str, int]
) -> int:
    """How many patches some encoder has still to encode."""
    if not (path / "zarr.json").exists():
        return sum(patches.values())
    store, settings = FeatureStore.open(path), cohort.settings
    device, precision = settings.device, settings.encoder_precision
    keys = [stored_key(spec, store.encoders, device=device, precision=precision) for spec in specs]
    if None in keys:
        return sum(patches.values())
    stored = {slide.slide_id for slide in store.slides()}
    there = [slide_id for slide_id in patches if slide_id in stored]
    new = sum(count for slide_id, count in patches.items() if slide_id not in stored)
    return new + missing_patches(store, there, [key for key in keys if key], n_views, retry_unreadable=False)


def _hours(made: Plan, specs: Sequence[EncoderSpec], patches: int, n_views: int, cohort: StudyCohort) -> float | None:
    """What encoding takes, by the speeds that were measured on the first cohort."""
    if made.speeds is None:
        return None
    seconds = sum(made.seconds_of(spec.name) for spec in specs)
    speeds: Speeds = replace(made.speeds, encode={"all": seconds})
    return forecast(speeds, patches, n_views, cohort.settings.workers).hours


def _gigabytes(made: Plan, specs: Sequence[EncoderSpec], patches: int, n_views: int) -> float | None:
    dims = [made.dims.get(spec.name) for spec in specs]
    known = [dim for dim in dims if dim is not None]
    return gigabytes(patches, n_views, known) if len(known) == len(dims) else None


def plan_text(plan: StudyPlan) -> str:
    """The plan at 80 columns."""
    rows = [(step.name, step.state, _time_left(step), _size(step)) for step in plan.steps]
    head, *cells = table_text(rows, header=("step", "state", "time left", "features"), right=(2, 3)).splitlines()
    lines = [*_wrapped(f"{plan.title}, in {plan.out}: nothing is written, as --dry-run asks"), "", head]
    for line, step in zip(cells, plan.steps, strict=True):
        lines += [line, *_wrapped(step.what, "    ")]
    if plan.why_not:
        lines += ["", *_wrapped(f"no hours are known: {plan.why_not}")]
    else:
        total = time_text(sum(step.hours or 0.0 for step in plan.steps))
        lines += ["", *_wrapped(f"in all about {total} before the benchmark, at the speeds of this machine")]
    lines += [f"failed  {slide_id}: {reason}" for slide_id, reason in plan.failed_slides.items()]
    return "\n".join(lines)


def _time_left(step: PlannedStep) -> str:
    if step.state == "done":
        return ""
    return "minutes" if step.name == BENCHMARK else "?" if step.hours is None else time_text(step.hours)


def _size(step: PlannedStep) -> str:
    return "" if step.gigabytes is None else size_text(step.gigabytes)


def _wrapped(text: str, indent: str = "") -> list[str]:
    return wrap(
        text, COLUMNS, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )

"""`g2l demo`: the three stages on a small drawn cohort, or on the user's own slides, with one table at the end."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from textwrap import fill

from g2l_core.distillation.spec import OptimSpec, TrainSettings
from g2l_core.encoders.resolve import EncoderSpec, resolve_encoder
from g2l_core.errors import UsageError
from g2l_core.files import csv_row
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.views import ViewSpec
from g2l_core.results import Comparison, Report, Result
from g2l_core.slides.manifest import read_table
from g2l_core.store.features import FeatureStore
from g2l_core.store.locks import holds_only_locks, locked_output
from g2l_core.synthetic.cohort import CohortSpec, draw_cohort, label_patches
from pipeline.bench import refuse_no_results, run_bench
from pipeline.cache_teacher import run_extraction
from pipeline.distill import run_distill
from pipeline.progress import say
from pipeline.settings import DemoSettings, DistillHow, DistillSettings, ExtractionSettings

PATIENTS, HELD_OUT = 12, 4
VIEWS = 3
HEADLINES = {
    "cka_debiased": "CKA to the teacher",
    "knn_accuracy": "kNN accuracy",
    "robustness_pathorob_k5": "robustness index",
}


@dataclass(frozen=True, kw_only=True)
class _Cohort:
    """What goes in: inputs of stage one, and whether patches have planted classes."""

    inputs: tuple[Path, ...]
    hold_out: str
    truth: Path | None = None


def run_demo(out: Path, slides: Path | None, settings: DemoSettings) -> str:
    """Run everything and return what to print.

    Args:
        out: Gets cohort/, store.zarr, run/, tasks.toml and report/; must be empty or absent.
        slides: The user's slides; None draws a cohort.
        settings: The rest.

    Raises:
        G2LError: `out` is not empty, or in use; or a stage fails.
    """
    with locked_output(out):
        return _run_demo(out, slides, settings)


def _run_demo(out: Path, slides: Path | None, settings: DemoSettings) -> str:
    if not holds_only_locks(out):
        raise UsageError(f"{out} is not empty: the demo makes everything anew. Remove it, or give another --out")
    before = resolve_encoder(settings.student, weights=f"random:{settings.seed}")
    teacher = resolve_encoder(settings.teacher)
    cohort = _user_cohort(slides) if slides else _drawn_cohort(out, settings.seed)
    store = out / "store.zarr"
    say(f"1/3  caching the teacher: {teacher.name} ({teacher.describe_weights()})")
    _cache(cohort, store, teacher, VIEWS, settings)
    _cache(cohort, store, before, 0, settings)
    say(f"2/3  distilling into {before.name} ({before.describe_weights()})")
    run = out / "run"
    run_distill(
        store,
        settings.teacher,
        before,
        run,
        DistillSettings(train=_training(settings), hold_out=cohort.hold_out),
        how=DistillHow(workers=settings.workers),
    )
    _cache(cohort, store, resolve_encoder(str(run)), 0, settings)
    say("3/3  benchmarking from stored features")
    tasks = write_tasks(out, cohort.truth, FeatureStore.open(store), run)
    keys = [_key(store, teacher), _key(store, before), str(run)]
    report = run_bench(tasks, [store], keys, out / "report", baseline=keys[1], seed=settings.seed)
    for failure in report.failures:
        say(f"failed  {failure.task}: {failure.reason}")
    refuse_no_results(report)
    return demo_table(report, out / "report" / "report.html")


def _training(settings: DemoSettings) -> TrainSettings:
    # A small untrained network on a thousand patches wants a larger rate than the paper's fine-tuning, and noise
    # of so small a cohort would trip the early stop.
    return TrainSettings(
        steps=settings.steps,
        optim=OptimSpec(lr=1e-3, early_stop_patience=0),
        validate_every=max(1, settings.steps // 4),
        checkpoint_every=settings.steps,
        seed=settings.seed,
    )


def _drawn_cohort(out: Path, seed: int) -> _Cohort:
    manifest = draw_split_cohort(out / "cohort", PATIENTS, seed)
    return _Cohort(inputs=(manifest,), hold_out="split=test", truth=out / "cohort" / "truth")


def draw_split_cohort(folder: Path, patients: int, seed: int) -> Path:
    """Draw a cohort whose manifest, which is returned, has a column split: the last four patients are test."""
    say(f"drawing {patients} slides of {patients} patients, 2 centers, 3 tissue classes")
    manifest = draw_cohort(folder, CohortSpec(patients=patients, seed=seed))
    rows = read_table(manifest)
    held_out = sorted({row["patient_id"] for row in rows})[-HELD_OUT:]
    _write_csv(manifest, [{**row, "split": "test" if row["patient_id"] in held_out else "train"} for row in rows])
    return manifest


def _user_cohort(slides: Path) -> _Cohort:
    return _Cohort(inputs=(slides,), hold_out="0.3")


def _cache(cohort: _Cohort, store: Path, spec: EncoderSpec, views: int, settings: DemoSettings) -> None:
    how = ExtractionSettings(views=views, workers=settings.workers, mpp_override=settings.mpp_override)
    grid = GridSpec(seed=settings.seed, min_tissue=0.5)
    summary = run_extraction(cohort.inputs, store, [spec], grid, ViewSpec(seed=settings.seed), how)
    for slide_id, reason in summary.failed_slides.items():
        say(f"failed  {slide_id}: {reason}")
    if not summary.patches:
        raise UsageError("no slide could be used; see the reasons above")


def _key(store: Path, spec: EncoderSpec) -> str:
    return next(key for key, facts in FeatureStore.open(store).encoders.items() if facts.name == spec.name)


def write_tasks(out: Path, truth_folder: Path | None, store: FeatureStore, run: Path) -> Path:
    """A task file for slides of which nobody has labels but, of drawn ones, the classes that they were drawn with.

    Args:
        out: Gets tasks.toml, and of drawn slides labels.csv.
        truth_folder: The class maps of drawn slides; None for others, on whose held-out ones similarity is measured.
        store: The store of the slides.
        run: The run folder, which knows what was held out.
    """
    path = out / "tasks.toml"
    if truth_folder is None:
        path.write_text(_similarity_task(store, run), encoding="utf-8")
        return path
    rows: list[dict[str, str]] = []
    for slide in store.slides():
        side = slide.facts.patch_px_level0
        truth = truth_folder / f"{slide.slide_id.rpartition('/')[2]}.classes.png"
        classes = label_patches(truth, slide.coords, side, slide.facts.level0_size)
        for (x, y), name in zip(slide.coords.tolist(), classes, strict=True):
            rows.append({"slide_id": slide.slide_id, "x": str(x), "y": str(y), "tissue": name})
    _write_csv(out / "labels.csv", rows)
    path.write_text(TISSUE_TASK, encoding="utf-8")
    return path


TISSUE_TASK = """\
title = "G2L demo: drawn slides"

[tasks.tissue]
labels = "labels.csv"     # slide_id, x, y, tissue: the class each patch was drawn with
label = "tissue"
split = "split"           # from the manifest: eight patients train, four test
metrics = ["cka", "knn", "probe", "robustness"]
knn_k = 10
robustness_k = [3, 5, 10]
"""


def _similarity_task(store: FeatureStore, run: Path) -> str:
    """CKA on the slides that the run held out; without labels there is no class to vote on."""
    from pipeline.runs import read_run

    held_out = sorted(read_run(run).rows["held_out"])
    all_slides = [slide.slide_id for slide in store.slides()]
    where = "" if held_out == all_slides else f"where = {_any_of(held_out)}\n"
    return f'title = "G2L demo: your slides"\n\n[tasks.similarity]\nmetrics = ["cka"]\n{where}'


def _any_of(slide_ids: Sequence[str]) -> str:
    return "[" + ", ".join(f'"slide_id={slide_id}"' for slide_id in slide_ids) + "]"


def demo_table(report: Report, page: Path) -> str:
    """Before and after distillation at 80 columns, with the paired difference and its interval."""
    teacher, before, after = (encoder.key for encoder in report.encoders)
    lines = [
        "",
        _wrapped(f"teacher  {teacher}: {report.encoders[0].weights}"),
        _wrapped(f"student  {before}: {report.encoders[1].weights}"),
        "",
        f"{'on held-out slides':22}{'teacher':>9}{'before':>9}{'after':>9}   gain [95 % interval]",
    ]
    for metric, title in HEADLINES.items():
        found = {r.encoder: r for r in report.results if r.metric == metric}
        if after not in found:
            continue
        values = [f"{found[key].estimate.value:.3f}" if key in found else "1" for key in (teacher, before, after)]
        gain = next((c for c in report.comparisons if _is_gain(c, metric, before, after)), None)
        lines.append(f"{title:22}{values[0]:>9}{values[1]:>9}{values[2]:>9}   {_interval(gain)}")
    method = _method(report.results, after)
    return "\n".join([*lines, "", *([_wrapped(method)] if method else []), f"report   {page}"])


def _wrapped(line: str) -> str:
    return fill(line, width=80, subsequent_indent=" " * 9, break_on_hyphens=False)


def _is_gain(comparison: Comparison, metric: str, before: str, after: str) -> bool:
    return (comparison.metric, comparison.encoder, comparison.reference) == (metric, after, before)


def _interval(gain: Comparison | None) -> str:
    if gain is None:
        return ""
    d = gain.difference
    return f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]" if d.low == d.low else f"{d.value:+.3f} (no interval)"


def _method(results: Sequence[Result], after: str) -> str:
    """How the intervals were made: the same for all but for the degrees of freedom, which are left to the report."""
    found = [r.estimate.method for r in results if r.encoder == after and not isnan(r.estimate.low)]
    names = dict.fromkeys(method.partition(", t with")[0] for method in found)
    return f"95 %     {'; '.join(names)}, t; see docs/intervals.md" if found else ""


def _write_csv(path: Path, rows: Sequence[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(csv_row(rows[0]))
        writer.writerows(csv_row(row.values()) for row in rows)

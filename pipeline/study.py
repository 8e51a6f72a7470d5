"""`g2l run`: a study from its file to its report, in one folder.

A study takes or draws slides, caches its teachers, distills, caches what is compared, and benchmarks. Each step goes on
by itself where it was interrupted and is skipped where it is done, so that the same command always continues.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from g2l_core.benchmark.task_file import task_tables
from g2l_core.encoders.loading import stored_key
from g2l_core.encoders.resolve import RUN_RECORD, EncoderSpec, resolve_encoder
from g2l_core.encoders.weights import require_weights
from g2l_core.errors import RunError, UsageError, writing
from g2l_core.files import parse_json, write_text
from g2l_core.options import entries
from g2l_core.report.write import FILES, read_report
from g2l_core.results import Report
from g2l_core.store.features import FeatureStore
from g2l_core.store.locks import locked_output
from g2l_core.store.provenance import differences, digest, software
from pipeline.bench import content_digest, find_tasks, run_bench
from pipeline.cache_teacher import run_extraction
from pipeline.demo import draw_split_cohort, write_tasks
from pipeline.distill import run_distill
from pipeline.progress import say
from pipeline.runs import read_run
from pipeline.settings import DistillHow
from pipeline.study_file import STUDENT
from pipeline.study_settings import DRAWN, Compared, Study, StudyCohort

COPY, DONE = "study.toml", "steps.json"
"""In a study's folder: the study file as it was last run, and what is done of it."""


@dataclass(frozen=True, kw_only=True)
class StudyOutcome:
    """What a study has come to."""

    report: Report
    failed_slides: Mapping[str, str]
    """Why slides could not be used, by id."""


@dataclass
class _Progress:
    """What the steps so far have found."""

    failed_slides: dict[str, str] = field(default_factory=dict)
    keys: dict[tuple[str, str], str] = field(default_factory=dict)
    """The key of each stored encoder, by its name and weights."""
    reports: list[Report] = field(default_factory=list)

    def key_of(self, spec: EncoderSpec) -> str:
        """The key of an encoder that a step has stored."""
        return self.keys[spec.name, spec.weights]


Step = Callable[[Study, _Progress], str]
"""Does a step and returns what is to be told of it."""


def run_study(study: Study) -> StudyOutcome:
    """Do what is left to do of a study.

    Raises:
        G2LError: The folder holds something else, a step cannot be done, or one was done with other settings.
    """
    with writing(study.out), locked_output(study.out):
        _claim(study)
        require_all_weights(study)
        progress = _Progress()
        steps: dict[str, Step] = {"drawing slides": _draw} if study.drawn else {}
        steps |= {"caching the teacher": _cache, "distilling the student": _distill}
        steps |= {"caching what is compared": _embed, "benchmarking": _bench}
        for number, (name, step) in enumerate(steps.items(), start=1):
            say(f"{number}/{len(steps)}  {name}")
            if told := step(study, progress):
                say(f"     {told}")
        return StudyOutcome(report=progress.reports[-1], failed_slides=progress.failed_slides)


def _claim(study: Study) -> None:
    """Take the folder, unless it is something else's, and keep the study file there.

    Raises:
        RunError: The folder holds something and no study.
    """
    copy = study.out / COPY
    others = sorted(path.name for path in study.out.iterdir() if not path.name.startswith("."))
    if others and not copy.is_file():
        raise RunError(f"{study.out} holds {others[0]} and no study: name an empty folder, or a new one, with --out")
    if not copy.is_file() or copy.read_text(encoding="utf-8") != study.file.text:
        write_text(copy, study.file.text)


def require_all_weights(study: Study) -> None:
    """Refuse encoders whose weights cannot be had, before the first of them has worked for hours.

    Those whose features are stored already, and the start of a student that is finished, are not asked for.

    Raises:
        EncoderError: The message says why, and what to do.
    """
    used: list[tuple[Path, StudyCohort, Sequence[EncoderSpec]]] = [(study.store, study.cohort, study.teachers)]
    others = [each.spec for each in study.compared if each.spec]
    used += [(store, cohort, others) for store, cohort in study.evaluated.items()]
    if not is_distilled(study):
        used.append((study.store, study.cohort, [study.student]))
    for store, cohort, specs in used:
        for spec in specs:
            if not is_stored(store, spec, cohort):
                require_weights(spec)


def is_distilled(study: Study) -> bool:
    """Whether the student is finished."""
    return (study.run / RUN_RECORD).is_file() and read_run(study.run).result is not None


def is_stored(store: Path, spec: EncoderSpec, cohort: StudyCohort) -> bool:
    """Whether a store knows an encoder; not told of one whose weights a function brings."""
    if not (store / "zarr.json").exists():
        return False
    settings, known = cohort.settings, FeatureStore.open(store).encoders
    return stored_key(spec, known, device=settings.device, precision=settings.encoder_precision) is not None


# -- steps -------------------------------------------------------------------------------------------------


def _draw(study: Study, _progress: _Progress) -> str:
    folder = study.out / DRAWN
    if folder.is_dir():
        return "drawn already"
    partial = study.out / f"{DRAWN}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    draw_split_cohort(partial, study.drawn, study.cohort.grid.seed)
    partial.rename(folder)
    return ""


def _cache(study: Study, progress: _Progress) -> str:
    return _extract(study.store, study.cohort, study.teachers, progress)


def _extract(store: Path, cohort: StudyCohort, specs: Sequence[EncoderSpec], progress: _Progress) -> str:
    done = run_extraction(cohort.inputs, store, specs, cohort.grid, cohort.views, cohort.settings, tissue=cohort.tissue)
    progress.failed_slides |= done.failed_slides
    progress.keys |= {(spec.name, spec.weights): key for spec, key in zip(specs, done.encoders, strict=True)}
    if not done.patches:
        reason = next(iter(done.failed_slides.values()), "there is none")
        raise UsageError(f"no slide of {', '.join(map(str, cohort.inputs))} could be used: {reason}")
    for note in done.notes:
        say(f"     note: {note}")
    now = f"{done.encoded:,} encoded now" if done.encoded else "all of them were stored already"
    return f"{store}: {done.patches:,} patches of {done.slides:,} slides for {', '.join(done.encoders)}; {now}"


def _distill(study: Study, progress: _Progress) -> str:
    keys = [progress.key_of(spec) for spec in study.teachers]
    asked = _deciding(study, keys)
    if is_distilled(study) and (made := _done(study).get("distill")):
        if changed := list(differences(made, asked)):
            words = "; ".join(f"{name} was {old!r}, now {new!r}" for name, old, new in changed)
            raise RunError(
                f"{study.run} was distilled with other settings: {words}. Use them, give another --out, or remove "
                f"{study.run} to distill again"
            )
        return f"{study.run}: distilled already"
    teachers = list(study.teachers) if study.distill.online else keys
    done = run_distill(
        study.store, teachers, study.student, study.run, study.distill, epochs=study.epochs, how=study.how
    )
    _note_done(study, distill=asked)
    return f"{study.run}: {done.steps:,} steps; curves: {study.run / 'curves.html'}"


def _deciding(study: Study, teachers: Sequence[str]) -> dict[str, Any]:
    """What decides the student, as the study file has it, in plain values."""
    machine = {entry.name for entry in entries(DistillHow)}
    plain = {name: value for name, value in study.file.student.items() if name not in {*machine, "config"}}
    return {**json.loads(json.dumps(plain)), "teacher": list(teachers)}


def _embed(study: Study, progress: _Progress) -> str:
    student = resolve_encoder(str(study.run), trusted=study.how.trust_code)
    told = []
    for store, cohort in study.evaluated.items():
        cached = {spec.name for spec in study.teachers} if store == study.store else set[str]()
        specs = {each.spec.name: each.spec for each in study.compared if each.spec and each.spec.name not in cached}
        once = replace(cohort, settings=replace(cohort.settings, views=0))
        told.append(_extract(store, once, [*specs.values(), student], progress))
    return "\n     ".join(told)


def _bench(study: Study, progress: _Progress) -> str:
    stores = list(study.evaluated)
    tasks = Path(study.bench.tasks) if study.bench.tasks else _written_tasks(study)
    encoders = [_asked(study, each, progress) for each in study.compared]
    baseline = next((each for each in study.compared if each.fits(study.bench.baseline)), None)
    options = {name: getattr(study.bench, name) for name in ("draws", "margin", "seed", "device")}
    given = _digest_of_bench(study, stores, tasks, encoders)
    if _done(study).get("bench") == given and all((study.report / name).is_file() for name in FILES):
        progress.reports.append(read_report(study.report))
        return f"{study.report}: written already, from the same features and tasks"
    report = run_bench(
        tasks,
        stores,
        encoders,
        study.report,
        baseline=(baseline.alias or _asked(study, baseline, progress)) if baseline else "",
        **options,
    )
    progress.reports.append(report)
    _note_done(study, bench=given)
    return ""


def _asked(study: Study, each: Compared, progress: _Progress) -> str:
    """An encoder as `g2l bench --encoders` takes it."""
    width = each.name.rstrip("/").removeprefix(STUDENT)
    name = progress.key_of(each.spec) if each.spec else f"{study.run}{width}"
    return f"{each.alias}={name}" if each.alias else name


def _written_tasks(study: Study) -> Path:
    truth = study.out / DRAWN / "truth" if study.drawn else None
    return write_tasks(study.out, truth, FeatureStore.open(study.store), study.run)


def _digest_of_bench(study: Study, stores: Sequence[Path], tasks: Path, encoders: Sequence[str]) -> str:
    """sha256 of everything that the report is made from."""
    file, folder = find_tasks(tasks)
    labels = {folder / table["labels"] for table in task_tables(file)[1].values() if table.get("labels")}
    return digest(
        {
            "stores": [content_digest(FeatureStore.open(store)) for store in stores],
            "tasks": file.read_text(encoding="utf-8"),
            "labels": [digest(path.read_bytes().hex()) for path in sorted(labels) if path.is_file()],
            "encoders": list(encoders),
            "bench": json.loads(json.dumps(vars(study.bench))),
            "software": software(),
        }
    )


def _done(study: Study) -> Mapping[str, Any]:
    """What is noted as done. A note that cannot be read is none: the step is looked at again."""
    try:
        noted = parse_json((study.out / DONE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def _note_done(study: Study, **steps: Any) -> None:
    write_text(study.out / DONE, json.dumps({**_done(study), **steps}, indent=1, sort_keys=True) + "\n")

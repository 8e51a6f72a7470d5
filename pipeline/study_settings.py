"""What a study file means: cohorts, encoders and settings, all of it checked before anything starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from g2l_core.benchmark.task_file import task_tables
from g2l_core.encoders.loading import require_input_side, require_mpp
from g2l_core.encoders.resolve import EncoderSpec, normalized, resolve_encoder
from g2l_core.errors import G2LError, UnknownNameError, UsageError
from g2l_core.patches.spec import GridSpec, ViewSpec
from g2l_core.slides.manifest import read_sources
from g2l_core.tissue.methods import TissueMethod, resolve_coords, resolve_tissue
from pipeline.aliases import require_distinct, split_alias
from pipeline.bench import find_tasks
from pipeline.config import settings_of, weights_by_encoder
from pipeline.distill import training_precision
from pipeline.settings import DistillHow, DistillSettings, ExtractionSettings, require_stained_views
from pipeline.study_file import COHORTS, STUDENT, BenchTable, StudyFile, shipped_studies

DRAWN = "cohort"
"""The folder of drawn slides in a study's folder."""


@dataclass(frozen=True, kw_only=True)
class StudyCohort:
    """Slides and how their patches are cut."""

    inputs: tuple[Path, ...]
    """Of drawn slides, the manifest that is still to be written."""
    grid: GridSpec
    views: ViewSpec
    settings: ExtractionSettings
    tissue: TissueMethod


@dataclass(frozen=True, kw_only=True)
class Compared:
    """An encoder of the benchmark."""

    alias: str
    """What the report calls it; empty where that is its key."""
    name: str
    """As the study file names it."""
    spec: EncoderSpec | None
    """None for the study's student, which is still to be made."""

    def fits(self, text: str) -> bool:
        """Whether a text means this encoder."""
        return bool(text) and normalized(text) in {normalized(self.alias), normalized(self.name)}


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study, ready to run."""

    file: StudyFile
    out: Path
    """The folder that gets everything."""
    cohort: StudyCohort
    """The slides to distill on."""
    drawn: int
    """Of how many patients slides are drawn; 0 where the user has slides."""
    cohorts: Mapping[str, StudyCohort]
    """Other slides to benchmark on, each with a store of its own; without any, the first are used."""
    teachers: tuple[EncoderSpec, ...]
    student: EncoderSpec
    """The student before training."""
    distill: DistillSettings
    epochs: int | None
    how: DistillHow
    bench: BenchTable
    compared: tuple[Compared, ...]
    """What the benchmark compares."""

    @property
    def store(self) -> Path:
        """The store of the slides to distill on."""
        return self.out / "store.zarr"

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.out / "run"

    @property
    def report(self) -> Path:
        """The report's folder."""
        return self.out / "report"

    @property
    def evaluated(self) -> dict[Path, StudyCohort]:
        """The stores that the benchmark reads, with their slides; the user's further ones are not among them."""
        if not self.cohorts:
            return {self.store: self.cohort}
        return {self.out / COHORTS / f"{name}.zarr": cohort for name, cohort in self.cohorts.items()}


def resolve_study(file: StudyFile, out: Path, trusted: Sequence[str] = ()) -> Study:
    """Find everything that a study names: slides, encoders, tissue methods, tasks.

    Args:
        file: The study file.
        out: The folder that gets everything.
        trusted: Modules whose code may run although the file names it.

    Raises:
        G2LError: Something does not exist, or cannot be used; the message names file and table.
    """
    drawn = file.slides.get("drawn", 0)
    if bool(drawn) == bool(file.slides.get("inputs")):
        raise UsageError(f"{file.path}, [slides]: expected either inputs, your slides, or drawn, a number of patients")
    asked = file.teacher.get("teacher", ())
    if not asked or not file.student.get("student"):
        table = "student" if asked else "teacher"
        raise UsageError(f'{file.path}, [{table}]: expected {table} = "ENCODER"; g2l models lists them')
    resolver = _Resolver(file=file, trusted=tuple(trusted))
    teachers = resolver.encoders("teacher", asked, file.teacher.get("weights", ()))
    student = resolver.encoder("student", file.student["student"], file.student.get("weights"))
    if any(spec.name == student.name and spec != student for spec in teachers.values()):
        raise UsageError(
            f"{file.path}, [student]: teacher and student are both called {student.name} and have other weights: give "
            "one of them as a spec file (.toml) with a name of its own"
        )
    distill, epochs, how = _distillation(file, trusted)
    bench = file.built("bench", BenchTable, file.bench)
    _require_tasks(file, bench)
    cohort = resolver.cohort("slides", file.slides, drawn=out / DRAWN / "manifest.csv" if drawn else None)
    study = Study(
        file=file,
        out=out,
        cohort=cohort,
        drawn=drawn,
        cohorts={name: resolver.cohort(f"bench.{COHORTS}.{name}", {**values}) for name, values in file.cohorts.items()},
        teachers=tuple(teachers.values()),
        student=student,
        distill=distill,
        epochs=epochs,
        how=how,
        bench=bench,
        compared=(),
    )
    study = replace(study, compared=_compared(study, resolver, {**teachers, file.student["student"]: student}))
    _require_fitting(study)
    return study


@dataclass(frozen=True, kw_only=True)
class _Resolver:
    """Finds what a study file names, with the file and the table in every message."""

    file: StudyFile
    trusted: tuple[str, ...]

    def encoder(self, table: str, name: str, weights: str | None) -> EncoderSpec:
        try:
            return resolve_encoder(name, weights=weights, named_in=str(self.file.path), trusted=self.trusted)
        except G2LError as error:
            raise UsageError(f"{self.file.path}, [{table}]: {error}") from error

    def encoders(self, table: str, names: Sequence[str], weights: Sequence[str]) -> dict[str, EncoderSpec]:
        try:
            given = weights_by_encoder(names, weights)
        except UsageError as error:
            raise UsageError(f"{self.file.path}, [{table}]: {error}") from error
        return {name: self.encoder(table, name, given.get(name)) for name in names}

    def cohort(self, table: str, values: Mapping[str, Any], drawn: Path | None = None) -> StudyCohort:
        file, is_first = self.file, table == "slides"
        if not is_first and (values.get("drawn") or not values.get("inputs")):
            raise UsageError(f"{file.path}, [{table}]: expected inputs, slides or a manifest")
        inputs = (drawn,) if drawn else tuple(map(Path, values["inputs"]))
        extraction = {**file.teacher, **values, **({} if is_first else {"views": 0}), "trust_code": self.trusted}
        grid = file.built(table, GridSpec, values)
        views, settings = file.built(table, ViewSpec, values), file.built(table, ExtractionSettings, extraction)
        try:
            if is_first:
                require_stained_views(views, settings)
            coords = values.get("coords")
            tissue = resolve_coords(coords) if coords else resolve_tissue(grid.tissue)
            if not drawn:
                tissue.require_distinct(read_sources(inputs))
        except G2LError as error:
            raise UsageError(f"{file.path}, [{table}]: {error}{_where_looked(file)}") from error
        return StudyCohort(
            inputs=inputs,
            grid=replace(grid, tissue=tissue.identity),
            views=views,
            settings=settings,
            tissue=tissue,
        )


def _where_looked(file: StudyFile) -> str:
    """What to do where a shipped study does not find its slides."""
    name = file.path.stem
    if shipped_studies().get(name) != file.path:
        return ""
    return f". A shipped study looks for slides in this folder: g2l init --example {name} writes it here, to be edited"


def _distillation(file: StudyFile, trusted: Sequence[str]) -> tuple[DistillSettings, int | None, DistillHow]:
    try:
        distill, epochs = settings_of(file.student)
        training_precision(distill.precision)
    except G2LError as error:
        raise UsageError(f"{file.path}, [student]: {error}") from error
    how = file.built("student", DistillHow, {**file.student, "resume": True, "trust_code": tuple(trusted)})
    return distill, epochs, how


def _require_tasks(file: StudyFile, bench: BenchTable) -> None:
    if not bench.tasks:
        if file.cohorts:
            raise UsageError(f"{file.path}, [bench]: expected tasks, as there are cohorts to benchmark on")
        return
    try:
        task_tables(find_tasks(Path(bench.tasks))[0])
    except UsageError as error:
        raise UsageError(f"{file.path}, [bench]: {error}") from error


def _compared(study: Study, resolver: _Resolver, known: Mapping[str, EncoderSpec]) -> tuple[Compared, ...]:
    """The encoders of [bench]; without any, the teachers, the student before and the student."""
    specs: dict[str, EncoderSpec | None] = {normalized(name): spec for name, spec in known.items()}
    asked = [split_alias(text) for text in study.bench.encoders or (*known, f"G2L={STUDENT}")]
    others = [name for _, name in asked if not is_student(name) and normalized(name) not in specs]
    found = resolver.encoders("bench", others, study.bench.weights)
    specs |= {normalized(name): spec for name, spec in found.items()}
    compared = tuple(
        Compared(alias=alias, name=name, spec=None if is_student(name) else specs[normalized(name)])
        for alias, name in asked
    )
    called = [each.alias or each.name for each in compared]
    try:
        require_distinct(called)
        if study.bench.baseline and not any(each.fits(study.bench.baseline) for each in compared):
            raise UnknownNameError("baseline", study.bench.baseline, called)
    except UsageError as error:
        raise UsageError(f"{study.file.path}, [bench]: {error}") from error
    return compared


def is_student(name: str) -> bool:
    """Whether a name is the study's student: `run`, or with nested features `run+64` or `run+all`."""
    return name.partition("+")[0].rstrip("/") == STUDENT


def _require_fitting(study: Study) -> None:
    """Refuse encoders that cannot take the patches that they would get."""
    others = [each.spec for each in study.compared if each.spec]
    used = [
        (study.cohort, study.teachers),
        *((cohort, (*others, study.student)) for cohort in study.evaluated.values()),
    ]
    for spec in {spec.name: spec for _, specs in used for spec in specs}.values():
        require_input_side(spec)
    for cohort, specs in used:
        for spec in specs if not cohort.settings.force_mpp else ():
            require_mpp(spec, cohort.grid.mpp)

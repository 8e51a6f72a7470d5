"""Study files of `g2l run`: the tables [slides], [teacher], [student] and [bench], with the options' own keys.

The keys are the fields of the specs that the command line is made from, and of four small ones here.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

from g2l_core.errors import G2LError, UnknownNameError, UsageError
from g2l_core.files import parse_toml
from g2l_core.options import PATCHES, SLIDES, Entry, build, entries, option
from g2l_core.patches.spec import GridSpec, ViewSpec
from pipeline.config import check_kind, read_recipe
from pipeline.settings import DistillHow, ExtractionSettings, Recipe

STUDIES = Path(__file__).parent / "studies"
STUDENT = "run"
"""The word for the study's student among the encoders of [bench]."""
COHORTS = "slides"
"""The tables [bench.slides.NAME] have the keys of [slides]."""

_NOT_IN_STUDIES = frozenset({"trust_code", "resume", "retry_failed"})

Spec = TypeVar("Spec")


@dataclass(frozen=True, kw_only=True)
class SlidesTable:
    """What [slides] says beside the options of patches."""

    inputs: tuple[str, ...] = option((), help="Slides, folders of slides or of patch images, or a manifest CSV.")
    drawn: int = option(0, min=6, help="Draw a small cohort of so many patients, for a trial, in place of inputs.")
    coords: Path | None = option(None, help="Given patches, in place of tissue and grid, as --coords.")


@dataclass(frozen=True, kw_only=True)
class TeacherTable:
    """What [teacher] says beside the options of extraction."""

    teacher: tuple[str, ...] = option((), help="The teacher, or a list of several.")
    weights: tuple[str, ...] = option((), help="In place of its own weights; of several teachers TEACHER=WEIGHTS.")


@dataclass(frozen=True, kw_only=True)
class StudentTable:
    """What [student] says beside the options of g2l distill."""

    student: str = option("", help="The encoder to train.")
    weights: str | None = option(None, help="In place of its own weights: FILE, FILE#NETWORK, or random:SEED.")
    config: str | None = option(None, help="A recipe: breast, prostate, or a TOML file. Keys here go before its own.")


@dataclass(frozen=True, kw_only=True)
class BenchTable:
    """What [bench] says: the options of g2l bench."""

    tasks: str = option("", help="A task file, or a shipped one's name. Without one: CKA on held-out slides.")
    encoders: tuple[str, ...] = option(
        (),
        help="ENCODER or ALIAS=ENCODER, the teacher first; run is the study's student. If not given: teachers, the "
        "student before, G2L=run.",
    )
    weights: tuple[str, ...] = option((), help="ENCODER=WEIGHTS for encoders that are only here.")
    baseline: str = option("", help="An encoder to take further differences from.")
    draws: int = option(1000, min=100, help="Random exchanges of two encoders, where there are too many to try all.")
    margin: float = option(0.02, min=0, help="By how much encoders may differ and still count as equally good.")
    seed: int = option(0, help="Random seed.")
    device: str = option("cpu", help="Where CKA's sums are taken: cpu, cuda or auto.")


def _of_extraction(*, of_slides: bool) -> Iterator[Entry]:
    """The options of stage one that belong to slides and their patches, or the others."""
    for entry in entries(ExtractionSettings):
        if (entry.option.panel in {SLIDES, PATCHES} and entry.name != "views") == of_slides:
            yield entry


def _by_name(*groups: Iterator[Entry]) -> dict[str, Entry]:
    """Options by name, each from the first group that has it.

    Without `trust_code`, as a file cannot trust the code that it names, and without what makes a call a single one:
    a study always goes on, and takes all slides.
    """
    found: dict[str, Entry] = {}
    for group in groups:
        for entry in group:
            found.setdefault(entry.name, entry)
    return {name: entry for name, entry in found.items() if name not in _NOT_IN_STUDIES}


TABLES: Mapping[str, Mapping[str, Entry]] = {
    "slides": _by_name(entries(SlidesTable), entries(GridSpec), entries(ViewSpec), _of_extraction(of_slides=True)),
    "teacher": _by_name(entries(TeacherTable), _of_extraction(of_slides=False)),
    "student": _by_name(entries(StudentTable), entries(Recipe), entries(DistillHow)),
    "bench": _by_name(entries(BenchTable)),
}
"""The keys of each table."""


@dataclass(frozen=True, kw_only=True)
class StudyFile:
    """A study file with checked values, by table and option name; what is not given is absent."""

    path: Path
    text: str
    title: str
    slides: Mapping[str, Any]
    teacher: Mapping[str, Any]
    student: Mapping[str, Any]
    bench: Mapping[str, Any]
    cohorts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """[bench.slides.NAME]: the slides of other cohorts to benchmark on, as `slides`."""

    def built(self, table: str, spec: type[Spec], values: Mapping[str, Any]) -> Spec:
        """A spec from a table's values.

        Raises:
            UsageError: The spec refuses a value; the message names file and table.
        """
        try:
            return build(spec, values)
        except G2LError as error:
            raise UsageError(f"{self.path}, [{table}]: {error}") from error


def shipped_studies() -> dict[str, Path]:
    """The studies that come with G2L, by name."""
    return {path.stem: path for path in sorted(STUDIES.glob("*.toml"))}


def find_study(name: str) -> Path:
    """A study file by its path, or a shipped one by its name.

    Raises:
        UnknownNameError: It is neither.
    """
    shipped = shipped_studies()
    if Path(name).is_file():
        return Path(name)
    if name in shipped:
        return shipped[name]
    raise UnknownNameError("study", name, shipped, "Or give a TOML file: g2l init writes one.")


def read_study(name: str) -> StudyFile:
    """Read a study and check every key and value. Nothing is opened yet.

    Raises:
        UsageError: It cannot be read, or has a key that no option has, or a value that its option does not take. The
            message names the line, and the nearest key.
    """
    path = find_study(name)
    try:
        text = path.read_text(encoding="utf-8")
        content = parse_toml(text)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the study {path}, which must be TOML: {error}") from error
    for key in content:
        if key not in {"title", *TABLES}:
            raise UnknownNameError(f"table in {path}{_line(text, '', key)}:", key, ["title", *TABLES])
    tables = {table: _table(content.get(table, {}), f"[{table}] in {path}") for table in TABLES}
    bench = {**tables["bench"]}
    cohorts = _table(bench.pop(COHORTS, {}), f"[bench.{COHORTS}] in {path}")
    checked = {
        table: _checked(path, text, table, TABLES[table], bench if table == "bench" else values)
        for table, values in tables.items()
    }
    if config := checked["student"].get("config"):
        recipe = {key: value for key, value in read_recipe(config).items() if key != "teacher"}
        checked["student"] = {**recipe, **checked["student"]}
    return StudyFile(
        path=path,
        text=text,
        title=check_kind(f"{path}: title", content.get("title", path.stem), str),
        **checked,
        cohorts={name: _cohort(path, text, name, values) for name, values in cohorts.items()},
    )


def _cohort(path: Path, text: str, name: str, values: object) -> dict[str, Any]:
    table = f"bench.{COHORTS}.{name}"
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        raise UsageError(f"{path}, [{table}]: expected a name of letters, digits, hyphens and points, for its store")
    return _checked(path, text, table, TABLES["slides"], _table(values, f"[{table}] in {path}"))


def _table(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{where} must be a table of keys, not {value!r}")
    return value


def _checked(
    path: Path, text: str, table: str, known: Mapping[str, Entry], values: Mapping[str, Any]
) -> dict[str, Any]:
    """The values of a table by option name, each of its option's kind and range."""
    former = {alias: name for name, entry in known.items() for alias in entry.option.aliases}
    found = {}
    for key, value in values.items():
        line = _line(text, table, key)
        name = former.get(key, key)
        if name not in known:
            more = f"[bench.{COHORTS}.NAME] are tables of further slides." if table == "bench" else ""
            raise UnknownNameError(f"key of [{table}] in {path}{line}:", key, known, more)
        found[name] = _value(f"{path}{line}, [{table}]: {key}", value, known[name])
    return found


def _value(where: str, value: object, entry: Entry) -> Any:
    given = entry.option
    if given.parse and isinstance(value, str):
        try:
            given.parse(value)
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from error
        return value
    one_for_a_list = entry.kind == tuple[str, ...] and isinstance(value, str)
    checked = (value,) if one_for_a_list else check_kind(where, value, entry.kind)
    if given.min is not None and isinstance(checked, int | float) and checked < given.min:
        raise UsageError(f"{where} must be at least {given.min:g}, not {value!r}")
    return Path(checked) if isinstance(checked, str) and Path in get_args(entry.kind) else checked


def _line(text: str, table: str, key: str) -> str:
    """`, line 7` where a key of a table, or a table, stands; empty where it is written in another way."""
    here = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[+\s*([^\]]+?)\s*\]", line):
            here = header[1].replace('"', "").replace(" ", "")
            if not table and here.split(".")[0] == key:
                return f", line {number}"
        elif here == table and re.match(rf"""\s*["']?{re.escape(key)}["']?\s*[.=]""", line):
            return f", line {number}"
    return ""

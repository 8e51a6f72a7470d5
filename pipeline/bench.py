"""Stage three: a task file and stores in, a report out. Behind `g2l bench`; opens nothing but stores."""

import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from g2l_core.encoders import find_stored, spec_from_json
from g2l_core.errors import TaskError, UnknownNameError, UsageError
from g2l_core.metrics.results import EncoderFacts, ExpectedFigure, Failure, Report, Result
from g2l_core.report import write_report
from g2l_core.report_tables import headline, listed, meaning_of
from g2l_core.store.features import FeatureStore
from g2l_core.store.provenance import digest, software
from g2l_core.task_spec import Expected, TaskSpec, parse_expected
from g2l_core.tasks import BenchSpec, TaskOutcome, adjusted_over_tasks, evaluate_task

SHIPPED = Path(__file__).parent / "tasks"


def shipped_tasks() -> dict[str, Path]:
    """The task files that come with G2L, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.toml"))}


def find_tasks(given: Path) -> tuple[Path, Path]:
    """A task file by its path, or a shipped one by its name.

    Returns:
        The file, and the folder that its label files are relative to: its own, or, as nobody writes into a package,
        the current one for a shipped file.

    Raises:
        UsageError: It is neither; lists the shipped names.
    """
    shipped = shipped_tasks()
    if given.is_file():
        return given, given.parent
    if str(given) in shipped:
        return shipped[str(given)], Path()
    raise UsageError(f"no such task file: {given}. Shipped ones go by name: {', '.join(shipped)}")


def read_tasks(path: Path) -> tuple[str, list[TaskSpec]]:
    """The title and the tasks of a task file.

    Raises:
        UsageError: It is no TOML, has no task, or a key that no task has.
        TaskError: A task cannot be evaluated.
    """
    title, tables = task_tables(path)
    return title, [read_task(path, name, table) for name, table in tables.items()]


def task_tables(path: Path) -> tuple[str, dict[str, Mapping[str, Any]]]:
    """The title of a task file and the table of each task, not yet read.

    Raises:
        UsageError: It is no TOML, or has no task.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot read the task file {path}: {error}") from error
    unknown = set(content) - {"title", "tasks"}
    tables = content.get("tasks")
    if unknown or not isinstance(tables, dict) or not tables or not all(isinstance(t, dict) for t in tables.values()):
        found = f"; found {', '.join(sorted(unknown))}" if unknown else ""
        raise UsageError(f"{path} needs one table [tasks.NAME] for each task, and may have a title{found}")
    return content.get("title", path.stem), tables


def read_task(path: Path, name: str, table: Mapping[str, Any]) -> TaskSpec:
    """One task.

    Args:
        path: The task file, for messages.
        name: The task's.
        table: Its keys. Those of a family's options begin with the field's name: knn_k.

    Raises:
        UsageError: A key that no task has, or a value of another kind.
        TaskError: It cannot be evaluated.
    """
    where = f"{path}, [tasks.{name}]"
    known = known_keys()
    plain: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {}
    expected = table.get("expected", {})
    if not isinstance(expected, dict):
        raise UsageError(f"{where}: expected must be a table of metrics, not {expected!r}")
    for key, value in table.items():
        if key not in known:
            raise UnknownNameError(f"key of [tasks.{name}] in {path}:", key, known)
        group, option, default = known[key]
        if key != "expected":
            given = plain if not group else groups.setdefault(group, {})
            given[option] = _value(f"{where}: {key}", value, default)
    try:
        options = {group: type(_DEFAULTS[group])(**given) for group, given in groups.items()}
    except TaskError as error:
        raise TaskError(f"task {name}: {error}") from error
    return TaskSpec(name=name, expected=parse_expected(name, expected), **plain, **options)


_DEFAULTS: Mapping[str, Any] = {field.name: field.default for field in fields(TaskSpec) if field.name != "name"}


def known_keys() -> dict[str, tuple[str, str, Any]]:
    """What each key of a task sets: the group of options (empty for the task itself), the field, its default."""
    found: dict[str, tuple[str, str, Any]] = {}
    for name, default in _DEFAULTS.items():
        if is_dataclass(default):
            for option in fields(default):
                found[f"{name}_{option.name}"] = (name, option.name, getattr(default, option.name))
        else:
            found[name] = ("", name, default)
    return found


def _value(where: str, value: object, default: object) -> object:
    """A value of the default's kind; one in place of a list is a list of one.

    Raises:
        UsageError: It is of another kind.
    """
    if isinstance(default, tuple):
        kind = type(default[0]) if default else str
        listed = value if isinstance(value, list) else [value]
        if all(_fits(item, kind) for item in listed):
            return tuple(kind(item) for item in listed)
        raise UsageError(f"{where} must be {_WORDS[kind]}, or a list of such, not {value!r}")
    if not _fits(value, type(default)):
        raise UsageError(f"{where} must be {_WORDS[type(default)]}, not {value!r}")
    return value


_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def _fits(value: object, kind: type) -> bool:
    """TOML's whole numbers are numbers too; its booleans are not."""
    if isinstance(value, bool) or kind is bool:
        return kind is bool and isinstance(value, bool)
    return isinstance(value, (int, float) if kind is float else kind)


def run_bench(
    tasks_path: Path,
    store_paths: Sequence[Path],
    encoders: Sequence[str],
    out: Path,
    *,
    baseline: str = "",
    draws: int = 1000,
    seed: int = 0,
    device: str = "cpu",
) -> Report:
    """Evaluate all tasks and write the report.

    Args:
        tasks_path: The task file, or the name of a shipped one.
        store_paths: Cohorts, put one behind the other.
        encoders: As users name them; the first is the teacher.
        out: The report's folder; results.json, .csv, .md and report.html are replaced there.
        baseline: A second encoder to take differences from.
        draws: Bootstrap resamples.
        seed: Of folds and bootstrap.
        device: Where CKA's sums over rows are taken: cpu, cuda, or auto, which is the GPU where there is one.

    Raises:
        G2LError: Nothing could be started. A task that fails is a `Failure` of the report instead.
    """
    tasks_file, folder = find_tasks(tasks_path)
    title, tables = task_tables(tasks_file)
    stores = [FeatureStore.open(path) for path in store_paths]
    known = {key: facts for store in reversed(stores) for key, facts in store.encoders.items()}
    keys = tuple(find_stored(text, known) for text in encoders)
    bench = BenchSpec(
        encoders=keys,
        baseline=find_stored(baseline, known) if baseline else "",
        draws=draws,
        seed=seed,
        device=_sums_device(device),
    )
    if len(set(keys)) < len(keys):
        raise UsageError(f"--encoders names one encoder twice: {', '.join(keys)}")
    found, expected = TaskOutcome(), list[ExpectedFigure]()
    for name, table in tables.items():
        try:
            task = read_task(tasks_file, name, table)
        except TaskError as error:
            found.failures.append(Failure(task=name, reason=str(error)))
            continue
        found += evaluate_task(stores, task, bench, folder)
        expected += [expected_figure(name, figure) for figure in task.expected]
    report = Report(
        title=title,
        summary=tuple(s for name in tables if (s := summary_sentence(name, bench, found.results))),
        encoders=tuple(encoder_facts(key, known[key]) for key in keys),
        results=tuple(found.results),
        comparisons=tuple(adjusted_over_tasks(found.comparisons)),
        failures=tuple(found.failures),
        provenance=provenance(tasks_path, tasks_file, stores),
        notes=tuple(found.notes),
        expected=tuple(expected),
        pictures=found.pictures,
    )
    write_report(report, out)
    return report


def _sums_device(asked: str) -> str:
    """The device a user means; the CPU's answer costs no import of torch.

    Raises:
        UsageError: It is unknown or absent.
    """
    if asked == "cpu":
        return asked
    from g2l_core.encoder_loading import choose_device

    return str(choose_device(asked))


def encoder_facts(key: str, facts: Mapping[str, Any]) -> EncoderFacts:
    """What the report says of an encoder."""
    spec = spec_from_json(facts)
    return EncoderFacts(
        key=key,
        name=spec.name,
        weights=spec.weights_in_words,
        dim=facts["dim"],
        pooling=spec.pooling,
        precision=facts["precision"],
        digest=facts["digest"],
        note="untrained" if spec.is_untrained else "",
    )


def expected_figure(task: str, figure: Expected) -> ExpectedFigure:
    """A published figure as the report has it."""
    return ExpectedFigure(task=task, **asdict(figure))


def summary_sentence(task: str, bench: BenchSpec, results: Sequence[Result]) -> str:
    """One sentence on a task: its headline metric, every encoder."""
    mine = [result for result in results if result.task == task]
    metric = headline([result.metric for result in mine])
    if metric is None:
        return ""
    found = {result.encoder: result for result in mine if result.metric == metric}
    words = [f"{_figure(found[key])} for {key}" for key in bench.encoders if key in found]
    first = next(iter(found.values()))
    support = ", ".join(filter(None, (f"k = {k}" if (k := first.settings.get("k")) else "", f"n = {first.n:,}")))
    return f"{task}: {meaning_of(metric).title} ({support}) is {listed(words)}."


def _figure(result: Result) -> str:
    estimate = result.estimate
    if np.isnan(estimate.low):
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def provenance(given: Path, tasks_path: Path, stores: Sequence[FeatureStore]) -> dict[str, str]:
    """Command, inputs and software. No time of day: the same input gives the same bytes."""
    found = {
        "command": " ".join(["g2l", *sys.argv[1:]]),
        "tasks": f"{given} (sha256 {digest(tasks_path.read_text(encoding='utf-8'))[:12]})",
    }
    for i, store in enumerate(stores):
        found[f"store {i + 1}"] = f"{store.path} (sha256 of its specs {digest(store.facts)[:12]})"
    return found | {f"version of {name}": version for name, version in software().items()}


def refuse_no_results(report: Report) -> None:
    """Refuse to call a run without a single figure a benchmark.

    Raises:
        TaskError: There is none; gives the first reason.
    """
    if not report.results:
        reason = report.failures[0].reason if report.failures else "the task file asks for none"
        raise TaskError(f"no figure could be computed: {reason}")

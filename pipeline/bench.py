"""Stage three: a task file and stores in, a report out. Behind `g2l bench`; opens nothing but stores."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from g2l_core.benchmark.evaluate import BenchSpec, TaskOutcome, adjusted_over_tasks, evaluate_task
from g2l_core.benchmark.spec import Expected, TaskSpec
from g2l_core.benchmark.task_file import read_task, task_tables
from g2l_core.encoders.resolve import find_stored, spec_from_json
from g2l_core.errors import TaskError, UsageError
from g2l_core.report.tables import headline, listed, meaning_of
from g2l_core.report.write import write_report
from g2l_core.results import EncoderSummary, ExpectedFigure, Failure, Report, Result
from g2l_core.store.facts import EncoderFacts
from g2l_core.store.features import FeatureStore
from g2l_core.store.provenance import digest, software

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
        encoders=tuple(encoder_summary(key, known[key]) for key in keys),
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
    from g2l_core.encoders.loading import choose_device

    return str(choose_device(asked))


def encoder_summary(key: str, facts: EncoderFacts) -> EncoderSummary:
    """What the report says of an encoder."""
    spec = spec_from_json(facts.to_json())
    return EncoderSummary(
        key=key,
        name=spec.name,
        weights=spec.describe_weights(),
        dim=facts.dim,
        pooling=spec.pooling,
        precision=facts.precision,
        digest=facts.digest,
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
        found[f"store {i + 1}"] = f"{store.path} (sha256 of its specs {digest(store.facts.to_json())[:12]})"
    return found | {f"version of {name}": version for name, version in software().items()}


def refuse_no_results(report: Report) -> None:
    """Refuse to call a run without a single figure a benchmark.

    Raises:
        TaskError: There is none; gives the first reason.
    """
    if not report.results:
        reason = report.failures[0].reason if report.failures else "the task file asks for none"
        raise TaskError(f"no figure could be computed: {reason}")

"""Stage three: a task file and stores in, a report out. Behind `g2l bench`; opens nothing but stores."""

import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from g2l_core.encoders import find_stored, spec_from_json
from g2l_core.errors import TaskError, UnknownNameError, UsageError
from g2l_core.metrics.results import Comparison, EncoderFacts, Failure, Pictures, Report, Result
from g2l_core.report import write_report
from g2l_core.report_tables import HEADLINES, listed, meaning_of
from g2l_core.store.features import FeatureStore
from g2l_core.store.provenance import digest, software
from g2l_core.task_data import TaskSpec
from g2l_core.tasks import BenchSpec, evaluate_task


def read_tasks(path: Path) -> tuple[str, list[TaskSpec]]:
    """The title and the tasks of a task file.

    Raises:
        UsageError: It is no TOML, has no task, or a key that no task has.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot read the task file {path}: {error}") from error
    unknown = set(content) - {"title", "tasks"}
    if unknown or not isinstance(content.get("tasks"), dict) or not content["tasks"]:
        found = f"; found {', '.join(sorted(unknown))}" if unknown else ""
        raise UsageError(f"{path} needs one table [tasks.NAME] for each task, and may have a title{found}")
    return content.get("title", path.stem), [_task(path, name, table) for name, table in content["tasks"].items()]


def _task(path: Path, name: str, table: Mapping[str, Any]) -> TaskSpec:
    known = {field.name: field for field in fields(TaskSpec)}
    for key in table:
        if key not in known or key == "name":
            raise UnknownNameError(f"key of [tasks.{name}] in {path}:", key, [k for k in known if k != "name"])
    plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    for key, value in plain.items():
        default = known[key].default
        if not isinstance(value, type(default)):
            raise UsageError(f"{path}, [tasks.{name}]: {key} must be {_words(default)}, not {value!r}")
    return TaskSpec(name=name, **plain)


def _words(default: object) -> str:
    return {str: "text", int: "a whole number", tuple: "a list"}[type(default)]


def run_bench(
    tasks_path: Path,
    store_paths: Sequence[Path],
    encoders: Sequence[str],
    out: Path,
    *,
    baseline: str = "",
    draws: int = 1000,
    seed: int = 0,
) -> Report:
    """Evaluate all tasks and write the report.

    Args:
        tasks_path: The task file.
        store_paths: Cohorts, put one behind the other.
        encoders: As users name them; the first is the teacher.
        out: The report's folder; results.json, .csv, .md and report.html are replaced there.
        baseline: A second encoder to take differences from.
        draws: Bootstrap resamples.
        seed: Of folds and bootstrap.

    Raises:
        G2LError: Nothing could be started. A task that fails is a `Failure` of the report instead.
    """
    title, tasks = read_tasks(tasks_path)
    stores = [FeatureStore.open(path) for path in store_paths]
    known = {key: facts for store in reversed(stores) for key, facts in store.encoders.items()}
    keys = tuple(find_stored(text, known) for text in encoders)
    bench = BenchSpec(encoders=keys, baseline=find_stored(baseline, known) if baseline else "", draws=draws, seed=seed)
    if len(set(keys)) < len(keys):
        raise UsageError(f"--encoders names one encoder twice: {', '.join(keys)}")
    results: list[Result] = []
    comparisons: list[Comparison] = []
    failures: list[Failure] = []
    pictures = Pictures()
    for task in tasks:
        outcome = evaluate_task(stores, task, bench, tasks_path.parent)
        results += outcome.results
        comparisons += outcome.comparisons
        failures += outcome.failures
        pictures += outcome.pictures
    report = Report(
        title=title,
        summary=tuple(s for task in tasks if (s := summary_sentence(task.name, bench, results))),
        encoders=tuple(encoder_facts(key, known[key]) for key in keys),
        results=tuple(results),
        comparisons=tuple(comparisons),
        failures=tuple(failures),
        provenance=provenance(tasks_path, stores),
        pictures=pictures,
    )
    write_report(report, out)
    return report


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


def summary_sentence(task: str, bench: BenchSpec, results: Sequence[Result]) -> str:
    """One sentence on a task: its headline metric, every encoder."""
    mine = [result for result in results if result.task == task]
    for metric in HEADLINES:
        found = {result.encoder: result for result in mine if result.metric == metric}
        if found:
            words = [f"{_figure(found[key])} for {key}" for key in bench.encoders if key in found]
            first = next(iter(found.values()))
            support = ", ".join(
                filter(None, (f"k = {k}" if (k := first.settings.get("k")) else "", f"n = {first.n:,}"))
            )
            dropped = next((r.settings["duplicates_dropped"] for r in mine if "duplicates_dropped" in r.settings), 0)
            copies = f" {dropped} copies of patches were left out." if dropped else ""
            return f"{task}: {meaning_of(metric).title} ({support}) is {listed(words)}.{copies}"
    return ""


def _figure(result: Result) -> str:
    estimate = result.estimate
    if np.isnan(estimate.low):
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def provenance(tasks_path: Path, stores: Sequence[FeatureStore]) -> dict[str, str]:
    """Command, inputs and software. No time of day: the same input gives the same bytes."""
    found = {
        "command": " ".join(["g2l", *sys.argv[1:]]),
        "tasks": f"{tasks_path} (sha256 {digest(tasks_path.read_text(encoding='utf-8'))[:12]})",
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

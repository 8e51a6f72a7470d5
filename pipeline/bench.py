"""Stage three: a task file and stores in, a report out. Behind `g2l bench`; opens stores and measure.json only."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from g2l_core.benchmark.evaluate import BenchSpec, TaskOutcome, adjusted, evaluate_task
from g2l_core.benchmark.rows import stored_encoders
from g2l_core.benchmark.task_file import read_task, task_tables
from g2l_core.encoders.resolve import EncoderSpec, spec_from_json
from g2l_core.errors import EncoderError, TaskError, UsageError, writing
from g2l_core.report.tables import ROBUSTNESS, headline, listed, meaning_of
from g2l_core.report.write import require_report_folder, write_report
from g2l_core.results import RETAINED, EncoderSummary, Failure, Report, Result
from g2l_core.store.facts import EncoderFacts
from g2l_core.store.features import FeatureStore
from g2l_core.store.locks import locked_output
from g2l_core.store.provenance import digest, software
from g2l_core.store.schema import PATCH_LABELS
from pipeline.aliases import require_distinct, split_alias, with_aliases
from pipeline.seeds import grouped_by_seed
from pipeline.speed import recorded_speed
from pipeline.widths import facts_of_widths, find_key, nested_in, with_all_widths

SHIPPED = Path(__file__).parent / "tasks"
MOST_TOLD = 3
"""Values of encoders that a sentence holds."""

COMPONENTS_OF = "components_of"
"""What a store keeps of principal components, beside other encoders' facts: whose they are."""


def run_bench(
    tasks_path: Path,
    store_paths: Sequence[Path],
    encoders: Sequence[str],
    out: Path,
    *,
    baseline: str = "",
    draws: int = 1000,
    margin: float = 0.02,
    seed: int = 0,
    device: str = "cpu",
) -> Report:
    """Evaluate all tasks and write the report.

    Args:
        tasks_path: The task file, or the name of a shipped one.
        store_paths: Cohorts, put one behind the other.
        encoders: Names as users write them, or ALIAS=NAME; the first is the teacher.
        out: The report's folder; results.json, .csv, .md and report.html are replaced there.
        baseline: A second encoder to take differences from.
        draws: Random exchanges of two encoders, where there are too many patients to try all.
        margin: By how much two encoders may differ and still count as equally good, in each metric's own unit.
        seed: The random seed of folds and exchanges.
        device: Where CKA's sums over rows are taken: cpu, cuda, or auto, which is the GPU where there is one.

    Raises:
        G2LError: Nothing could be started. A task that fails is a `Failure` of the report instead.
    """
    with writing(out), locked_output(out):
        require_report_folder(out)
        statistics = {"draws": draws, "margin": margin, "seed": seed}
        return _run_bench(tasks_path, store_paths, encoders, out, baseline, statistics, device)


def _run_bench(
    tasks_path: Path,
    store_paths: Sequence[Path],
    encoders: Sequence[str],
    out: Path,
    baseline: str,
    statistics: Mapping[str, Any],
    device: str,
) -> Report:
    tasks_file, folder = find_tasks(tasks_path)
    title, tables = task_tables(tasks_file)
    stores = [FeatureStore.open(path) for path in store_paths]
    known = stored_encoders(stores)
    asked = find_encoders(encoders, known)
    against, seeds = _with_baseline(baseline, asked, known)
    keys = (*asked.keys, against) if against and against not in asked.keys else asked.keys
    known |= facts_of_widths((*keys, *(key for members in seeds.values() for key in members)), known)
    bench = BenchSpec(
        encoders=keys,
        seeds=seeds,
        baseline=against,
        **statistics,
        device=_sums_device(device),
    )
    failures = [Failure(task=name, reason=why, encoder=text) for name in tables for text, why in asked.damaged.items()]
    outcome = TaskOutcome(failures=failures)
    for name, table in tables.items():
        outcome += _evaluate(tasks_file, name, table, stores, bench, folder)
    report = Report(
        title=title,
        summary=tuple(s for name in tables if (s := summary_sentence(name, bench, outcome.results))),
        encoders=tuple(_summary(key, bench, known) for key in keys),
        results=tuple(outcome.results),
        comparisons=tuple(adjusted(outcome.comparisons)),
        failures=tuple(outcome.failures),
        provenance=provenance(tasks_path, tasks_file, stores),
        notes=tuple(outcome.notes),
        expected=tuple(outcome.expected),
        pictures=outcome.pictures,
    )
    report = with_aliases(report, asked.aliases)
    write_report(report, out)
    return report


@dataclass(frozen=True, kw_only=True)
class AskedEncoders:
    """The encoders that a user names."""

    keys: tuple[str, ...]
    """Their keys in the store; of one that is a mean over seeds (see `pipeline.seeds`), its name."""
    damaged: Mapping[str, str]
    """Why run folders among them cannot be read."""
    seeds: Mapping[str, tuple[str, ...]]
    """The keys of the runs of each that is a mean over seeds."""
    aliases: Mapping[str, str]
    """The names that the user gave some of them, by key."""


def find_encoders(texts: Sequence[str], known: Mapping[str, EncoderFacts]) -> AskedEncoders:
    """The stored encoders that a user names, each as ENCODER or ALIAS=ENCODER.

    Raises:
        G2LError: A name is unknown or means several, one stands there twice, or the first, which the others are
            compared with, cannot be read.
    """
    keys: list[str] = []
    damaged: dict[str, str] = {}
    seeds: dict[str, tuple[str, ...]] = {}
    aliases: dict[str, str] = {}
    for alias, asked in map(split_alias, texts):
        groups = grouped_by_seed(with_all_widths(asked))
        for name, members in groups:
            found = []
            for text in members:
                try:
                    found.append(find_key(text, known))
                except EncoderError as error:
                    if not keys:
                        raise
                    damaged[text] = str(error)
            suffix = name.removeprefix(groups[0][0])  # G2L=run/+all: G2L, G2L+64, G2L+128
            name = name.replace(f"({len(members)} seeds)", f"({len(found)} seeds)")  # without those that cannot be read
            key = name if len(found) > 1 else found[0] if found else members[0]
            if len(found) > 1:
                seeds[name] = tuple(found)
            if alias:
                aliases[key] = alias + suffix
            keys += [key] if found else []
        if alias and len(groups) > 1 and not asked.endswith("+all"):
            raise UsageError(f"{alias}={asked}: the pattern names runs of {len(groups)} settings, an alias one encoder")
    require_distinct(keys)
    require_distinct([aliases.get(key, key) for key in keys])
    return AskedEncoders(keys=tuple(keys), damaged=damaged, seeds=seeds, aliases=aliases)


def _with_baseline(
    baseline: str, asked: AskedEncoders, known: Mapping[str, EncoderFacts]
) -> tuple[str, dict[str, tuple[str, ...]]]:
    """The name of the baseline, empty without one, and the seeds with its own. It may be a mean over seeds too.

    Raises:
        UsageError: It is several encoders, or has the name of other runs among the encoders.
    """
    seeds = dict(asked.seeds)
    if not baseline:
        return "", seeds
    by_alias = {alias: key for key, alias in asked.aliases.items()}
    if baseline in by_alias:
        return by_alias[baseline], seeds
    own = find_encoders([baseline], known)
    if len(own.keys) > 1:
        raise UsageError(f"--baseline {baseline} is several encoders, {', '.join(own.keys)}: give one of them")
    name = own.keys[0]
    if name in seeds and own.seeds.get(name) != seeds[name]:
        raise UsageError(f"--baseline {baseline} and other runs are both called {name}: rename a folder of runs")
    return name, {**seeds, **own.seeds}


def _evaluate(
    tasks_file: Path,
    name: str,
    table: Mapping[str, Any],
    stores: Sequence[FeatureStore],
    bench: BenchSpec,
    folder: Path,
) -> TaskOutcome:
    """Read and evaluate one task. If its table asks for what cannot be evaluated, only this task fails."""
    try:
        task = read_task(tasks_file, name, table)
    except TaskError as error:
        return TaskOutcome(failures=[Failure(task=name, reason=str(error))])
    return evaluate_task(stores, task, bench, folder)


def shipped_tasks() -> dict[str, Path]:
    """The task files that come with G2L, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.toml"))}


def find_tasks(path: Path) -> tuple[Path, Path]:
    """A task file by its path, or a shipped one by its name.

    Returns:
        The file, and the folder that its label files are relative to. That is the file's own folder. For a shipped
        file it is the current one, as nobody writes into a package.

    Raises:
        UsageError: It is neither; lists the shipped names.
    """
    shipped = shipped_tasks()
    if path.is_file():
        return path, path.parent
    if str(path) in shipped:
        return shipped[str(path)], Path()
    raise UsageError(f"no such task file: {path}. Shipped ones go by name: {', '.join(shipped)}")


def _sums_device(device: str) -> str:
    """The device a user means. For the CPU torch is not imported.

    Raises:
        UsageError: It is unknown or absent.
    """
    if device == "cpu":
        return device
    from g2l_core.encoders.loading import choose_device

    return str(choose_device(device))


def _summary(key: str, bench: BenchSpec, known: Mapping[str, EncoderFacts]) -> EncoderSummary:
    """What the report says of an encoder, or of the first of several seeds."""
    members = bench.members(key)
    facts = known[members[0]]
    summary = replace(encoder_summary(members[0], facts), key=key, nested_in=nested_in(facts))
    if len(members) == 1:
        return summary
    words = f"mean over {len(members)} seeds; digest of the first"
    return replace(summary, note=", ".join(filter(None, (summary.note, words))))


def encoder_summary(key: str, facts: EncoderFacts) -> EncoderSummary:
    """What the report says of an encoder; of an imported one that G2L does not know, that is little."""
    if "architecture" not in facts.extra:
        unknown = "unknown"
        return EncoderSummary(
            key=key,
            name=facts.name or key,
            weights=facts.weights or unknown,
            dim=facts.dim,
            pooling=facts.pooling or unknown,
            precision=facts.precision or unknown,
            digest=facts.digest,
            note="" if COMPONENTS_OF in facts.extra else "imported",
        )
    spec = spec_from_json(facts.to_json())
    return EncoderSummary(
        key=key,
        name=spec.name,
        weights=spec.describe_weights(),
        dim=facts.dim,
        pooling=spec.pooling,
        precision=facts.precision or "unknown",
        digest=facts.digest,
        note=", ".join(["untrained"] * spec.is_untrained + ["imported"] * bool(facts.imported)),
        speed=_speed(spec, facts),
    )


def _speed(spec: EncoderSpec, facts: EncoderFacts) -> str:
    """What was measured of a student, if its run folder is still where it was encoded from."""
    return recorded_speed(Path(spec.source.where).parent, facts.weights_digest) if spec.source.kind == "run" else ""


def summary_sentence(task: str, bench: BenchSpec, results: Sequence[Result]) -> str:
    """What a task's headline metric says: the share of the teacher that others retain, then every encoder's value."""
    of_task = [result for result in results if result.task == task]
    metric = headline([result.metric for result in of_task])
    if metric is None:
        return ""
    by_encoder = {result.encoder: result for result in of_task if result.metric == metric}
    first, *others = [by_encoder[key] for key in bench.encoders if key in by_encoder]
    shares = {r.encoder: r for r in of_task if r.metric == f"{RETAINED}{metric}"}
    retained = [shares[key] for key in bench.encoders if key in shares]
    lead = f"{task}: retained share of the teacher is {listed(_told(retained))}. " if retained else f"{task}: "
    aside = "; what such robustness costs is not known, as the task has no probe or kNN"
    aside = aside if metric.startswith(ROBUSTNESS) else ""
    support = ", ".join(filter(None, (f"k = {k}" if (k := first.settings.get("k")) else "", f"n = {first.n:,}")))
    return f"{lead}{meaning_of(metric).title} ({support}) is {listed([*_told([first]), *_told(others)])}{aside}."


def _told(results: Sequence[Result]) -> list[str]:
    """The value of each encoder; of many, the least and the greatest."""
    if len(results) <= MOST_TOLD:
        return [f"{_value_text(result)} for {result.encoder}" for result in results]
    least, *_, greatest = sorted(results, key=lambda result: result.estimate.value)
    ends = [f"{_value_text(result)} ({result.encoder})" for result in (least, greatest)]
    return [f"from {ends[0]} to {ends[1]} for {len(results)} others"]


def _value_text(result: Result) -> str:
    estimate = result.estimate
    if np.isnan(estimate.low):
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def provenance(asked: Path, tasks_file: Path, stores: Sequence[FeatureStore]) -> dict[str, str]:
    """Command, inputs and software. There is no time of day, so that the same input gives the same bytes."""
    facts = {
        "command": " ".join(["g2l", *sys.argv[1:]]),
        "tasks": f"{asked} (sha256 {digest(tasks_file.read_text(encoding='utf-8'))[:12]})",
    }
    for i, store in enumerate(stores):
        facts[f"store {i + 1}"] = f"{store.path} (sha256 of its content {content_digest(store)[:12]})"
    return facts | {f"version of {name}": version for name, version in software().items()}


def content_digest(store: FeatureStore) -> str:
    """sha256 of what decides a store's results: grid, views, encoders, and of each slide its pixels and labels.

    It leaves out where slides lie, when the store was made, and how often it was added to.
    """
    deciding = ("kind", "fingerprint", "mpp", "tissue_sha256", "n_patches", "labels", "unreadable")
    slides = {slide.slide_id: slide.facts.to_json() for slide in store.slides()}
    by_patch = {slide.slide_id: slide.facts.tables[PATCH_LABELS] for slide in store.slides() if slide.has_patch_labels}
    return digest(
        {
            "grid": store.grid,
            "views": store.views,
            "encoders": {key: facts.digest for key, facts in store.encoders.items()},
            "slides": {slide_id: {name: facts.get(name) for name in deciding} for slide_id, facts in slides.items()},
            **({"patch_labels": by_patch} if by_patch else {}),
        }
    )


def refuse_no_results(report: Report) -> None:
    """Refuse to call a run without a single metric value a benchmark.

    Raises:
        TaskError: There is none; gives the first reason.
    """
    if not report.results:
        reason = report.failures[0].reason if report.failures else "the task file asks for none"
        raise TaskError(f"no figure could be computed: {reason}")

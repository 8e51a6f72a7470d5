"""Many distillations from one cache: every combination of some options, resumable, in one table."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import isnan
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from urllib.parse import quote

from g2l_core.distillation.spec import ALPHA_LOSSES
from g2l_core.encoders.resolve import RUN_RECORD, resolve_encoder
from g2l_core.errors import G2LError, RunError, UsageError, require_output_folder, with_remedy, writing
from g2l_core.files import csv_row, parse_toml, replacing, write_text
from g2l_core.report.page import render
from g2l_core.report.plots import ForestGroup, Row, curves, forest
from g2l_core.report.tables import estimate_text
from g2l_core.store.features import FeatureStore
from g2l_core.store.locks import locked_output
from pipeline.config import NAMES, OPTIONS, check_option, find_recipe, read_toml, settings_of
from pipeline.distill import CURVES_PAGE, run_distill
from pipeline.progress import say
from pipeline.run_page import HELD_OUT, curve
from pipeline.runs import read_run
from pipeline.settings import DistillHow
from pipeline.sweep_views import (
    ONLINE,
    VIEWS,
    Cost,
    cost_charts,
    cost_of,
    in_numbers,
    live_specs,
    over_seeds,
    require_views,
    with_live_teacher,
)
from pipeline.tables import table_text

RESULTS = "results.csv"
PAGE = "sweep.html"
SHOWN = {"cka_debiased": "CKA", "r2_projected": "R2", "knn_overlap": "kNN overlap"}
"""The metrics on the terminal, with their titles."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is run."""

    title: str
    base: Mapping[str, Any]
    """Options of every run."""
    grid: Mapping[str, tuple[Any, ...]]
    """Options with the values that they take, all with all."""

    def runs(self) -> list[dict[str, Any]]:
        """The varied options of each run; an alpha for a loss that has none is left out, and counts once."""
        runs: list[dict[str, Any]] = []
        for values in product(*self.grid.values()):
            run = dict(zip(self.grid, values, strict=True))
            run = with_live_teacher(run)
            if {**self.base, **run}.get("loss", "logsum") not in ALPHA_LOSSES:
                run.pop("alpha", None)
            if run not in runs:
                runs.append(run)
        return runs


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One finished run."""

    varied: Mapping[str, Any]
    folder: str
    before: Mapping[str, float]
    after: Mapping[str, float]
    steps: int
    cost: Cost


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """All of a sweep."""

    sweep: Sweep
    finished: tuple[RunResult, ...]
    failed: Mapping[str, str]
    """Why runs failed, by folder."""


def read_sweep(name: str, changes: Sequence[str]) -> Sweep:
    """A sweep's file, or a shipped one by its name, with NAME=VALUE changes to its base.

    Raises:
        UsageError: It cannot be read, or has something that is no option; names it.
    """
    path = find_recipe(name, "sweeps")
    content = read_toml(path)
    for key in content:
        if key not in {"title", "base", "grid"}:
            raise UsageError(f"{path}: unknown table or key {key!r}; a sweep has title, [base] and [grid]")
    base, grid = dict(content.get("base", {})), dict(content.get("grid", {}))
    if not grid:
        raise UsageError(f"{path}: [grid] is missing: options with lists of values, such as seed = [0, 1, 2]")
    for change in changes:
        option, equals, value = change.partition("=")
        if not equals:
            raise UsageError(f"--set {change}: expected NAME=VALUE")
        grid.pop(option, None)
        base[option] = _value(value)
    for option, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UsageError(f"{path}: {option} in [grid] must be a list of values, not {values!r}")
    if VIEWS in grid:
        grid[VIEWS] = in_numbers(grid[VIEWS], base, OPTIONS["epochs"].default)
    if taken := [option for option in NAMES if option in base or (option in grid and option != "teacher")]:
        raise UsageError(f"{path}: {taken[0]} is given on the command line, not in a sweep")
    return Sweep(
        title=content.get("title", path.stem),
        base={option: check_option(option, value, path) for option, value in base.items()},
        grid={
            option: tuple(v if (option, v) == (VIEWS, ONLINE) else check_option(option, v, path) for v in values)
            for option, values in grid.items()
        },
    )


def _value(text: str) -> Any:
    """A value as TOML reads it; a bare word is text."""
    try:
        return parse_toml(f"value = {text}")["value"]
    except ValueError:
        return text


def run_sweep(
    sweep: Sweep,
    store: Path,
    teacher: str | Sequence[str],
    student: str,
    weights: str | None,
    out: Path,
    how: DistillHow,
) -> SweepResult:
    """Distill every run that is not finished yet. Where a run fails only that run is lost; the result names it.

    Args:
        sweep: What is run.
        store: The store.
        teacher: The teacher or teachers of every run; none where the sweep's grid has `teacher`, sets of them.
        student: The student.
        weights: Its weights, in place of its own.
        out: The folder of the sweep.
        how: Device, workers and caches.

    Raises:
        G2LError: Nothing could be started.
    """
    spec = resolve_encoder(student, weights=weights, trusted=how.trust_code)
    runs = sweep.runs()
    if bool(teacher) == ("teacher" in sweep.grid):
        raise UsageError(
            "the sweep's grid has sets of teachers already: leave --teacher out"
            if teacher
            else "expected a teacher: give --teacher, or sets of them as teacher in the sweep's [grid]"
        )
    for run in runs:  # what cannot be used is refused before the first run starts
        settings_of({**sweep.base, **run})
    opened = FeatureStore.open(store)
    named = [teacher] if isinstance(teacher, str) else list(teacher)
    if VIEWS in sweep.grid:
        require_views(opened, runs, named)
    with writing(out), locked_output(out):
        require_output_folder(out, (PAGE, RESULTS, *map(name_of, runs)), "sweep")
        finished: list[RunResult] = []
        failed: dict[str, str] = {}
        for i, run in enumerate(runs, start=1):
            folder = out / name_of(run)
            try:
                done = _finished(folder, run, opened)
                if done is None:
                    say(f"run {i}/{len(runs)}  {folder.name}")
                    settings, epochs = settings_of({**sweep.base, **run})
                    teachers: Any = run.get("teacher", teacher)
                    if settings.online:
                        names = [teachers] if isinstance(teachers, str) else teachers
                        teachers = live_specs(opened, names, how.trust_code)
                    run_distill(store, teachers, spec, folder, settings, epochs=epochs, how=how)
                    done = _finished(folder, run, opened)
                finished += [done] if done else []
            except G2LError as error:
                failed[folder.name] = with_remedy(str(error))
                say(f"failed  {folder.name}: {failed[folder.name]}")
        if not finished:
            raise RunError(f"no run of the sweep finished: {next(iter(failed.values()))}")
        result = SweepResult(sweep=sweep, finished=tuple(finished), failed=failed)
        _write(result, out)
        return result


def name_of(run: Mapping[str, Any]) -> str:
    """A run's folder: its varied options."""
    return ",".join(f"{name}={shown(value)}" for name, value in run.items()).replace("/", "_") or "run"


def shown(value: Any) -> str:
    """An option's value in one word; a set of teachers or widths is joined by plus signs."""
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _finished(folder: Path, run: Mapping[str, Any], store: FeatureStore) -> RunResult | None:
    result = read_run(folder).result if (folder / RUN_RECORD).is_file() else None
    if result is None:
        return None
    if missing := [name for name in HELD_OUT if name not in result.before or name not in result.after]:
        raise RunError(f"{folder / RUN_RECORD} lacks {', '.join(missing)}: remove the folder and sweep again")
    return RunResult(
        varied=run,
        folder=folder.name,
        before=result.before,
        after=result.after,
        steps=result.outcome.steps,
        cost=cost_of(folder, store),
    )


def groups_of(result: SweepResult) -> dict[tuple[tuple[str, Any], ...], list[RunResult]]:
    """Runs that differ only in their seed, by their other varied options."""
    groups: dict[tuple[tuple[str, Any], ...], list[RunResult]] = {}
    for run in result.finished:
        key = tuple((name, value) for name, value in run.varied.items() if name != "seed")
        groups.setdefault(key, []).append(run)
    return groups


def _spread(values: Sequence[float]) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    return f"{mean(values):z.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def sweep_text(result: SweepResult, out: Path) -> str:
    """The table for a terminal of 80 columns: the varied options and three metrics, mean and spread over seeds."""
    first = result.finished[0].before
    rows = [("before", "", *(f"{first[name]:z.3f}" for name in SHOWN))]
    rows += [
        (_words(key), str(len(runs)), *(_spread([run.after[name] for run in runs]) for name in SHOWN))
        for key, runs in groups_of(result).items()
    ]
    table = table_text(rows, header=("", "runs", *SHOWN.values()), right=range(1, 2 + len(SHOWN)))
    end = f"{len(result.failed)} runs failed" if result.failed else f"page: {out / PAGE}  runs: {out / RESULTS}"
    return f"{result.sweep.title}\n{table}\n{end}"


def _words(key: Sequence[tuple[str, Any]]) -> str:
    if (ONLINE, True) in key:
        key = [(VIEWS, ONLINE), *((name, value) for name, value in key if name not in {VIEWS, ONLINE})]
    return ", ".join(f"{name} {shown(value)}" for name, value in key) or "all"


def _write(result: SweepResult, out: Path) -> None:
    varied = list(result.sweep.grid)
    costly = VIEWS in varied  # hours differ from run to run, and the tables of other sweeps do not
    with replacing(out / RESULTS, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                *csv_row(varied), "run", "steps", *(("gigabytes", "hours") if costly else ()),
                *(f"{name}_{when}" for name in HELD_OUT for when in ("before", "after")),
            ]
        )  # fmt: skip
        for run in result.finished:
            figures = [values[name] for name in HELD_OUT for values in (run.before, run.after)]
            values = [
                ONLINE if name == VIEWS and run.varied.get(ONLINE) else run.varied.get(name, "") for name in varied
            ]
            cost = (run.cost.gigabytes, run.cost.hours) if costly else ()
            cells = (*map(shown, values), run.folder, run.steps, *cost, *figures)
            writer.writerow(csv_row(cells))
    write_text(out / PAGE, _page(result, out))


def _page(result: SweepResult, out: Path) -> str:
    first = result.finished[0].before
    rows = [["before", "", *(f"{first[name]:z.3f}" for name in HELD_OUT)]]
    rows += [
        [_words(key), str(len(runs)), *(_spread([run.after[name] for run in runs]) for name in HELD_OUT)]
        for key, runs in groups_of(result).items()
    ]
    groups = groups_of(result) if VIEWS in result.sweep.grid else {}
    costs = [[_words(key), *_costs(runs)] for key, runs in groups.items()]
    has_seeds = "seed" in result.sweep.grid
    return render(
        "sweep.html",
        title=result.sweep.title,
        facts=_facts(result, out),
        runs=[_link(run) for run in result.finished],
        over_seeds=has_seeds,
        failed=result.failed,
        header=("", "runs", *HELD_OUT.values()),
        rows=rows,
        overview=_overview(result),
        overview_caption="CKA, debiased, on held-out patches; the line is the student before training"
        + has_seeds * "; bars are 95 % intervals over seeds. g2l bench has intervals over patients and seeds",
        plots={option: _plot(result, option) for option in _numeric_options(result.sweep)},
        costs=costs,
        cost_charts=cost_charts(
            [
                (_words(key), [run.after["cka_debiased"] for run in runs], [run.cost for run in runs])
                for key, runs in groups.items()
            ]
        ),
        settings=[[name, shown(value)] for name, value in result.sweep.base.items()],
    )


def _facts(result: SweepResult, out: Path) -> dict[str, str]:
    """What all runs have in common, for people."""
    record = read_run(out / result.finished[0].folder)
    teachers = "as the table says" if "teacher" in result.sweep.grid else " and ".join(t.name for t in record.teachers)
    return {
        "Store": str(record.about.get("store", "unknown")),
        "Teacher": teachers,
        "Student": f"{record.student.name}: {record.student.weights}",
        "Held out": record.held_out,
    }


def _link(run: RunResult) -> dict[str, Any]:
    """A run and its page, relative to the sweep's."""
    return {
        "words": _words(tuple(run.varied.items())),
        "steps": run.steps,
        "cka": f"{run.after['cka_debiased']:z.3f}",
        "link": f"{quote(run.folder)}/{CURVES_PAGE}",
    }


def _overview(result: SweepResult) -> str:
    """CKA of each setting as a mark, with its interval over seeds."""
    rows = []
    for i, (key, runs) in enumerate(groups_of(result).items()):
        values = [run.after["cka_debiased"] for run in runs]
        rows.append(Row(label=_words(key), series=i, estimate=over_seeds(values), text=_spread(values)))
    before = result.finished[0].before["cka_debiased"]
    group = ForestGroup(title="CKA, debiased", rows=tuple(rows))
    return forest([group], neutral=before, label="CKA of every setting")


def _costs(runs: Sequence[RunResult]) -> list[str]:
    """CKA, gigabytes and hours of the runs of one number of views, as means over seeds."""
    quality = over_seeds([run.after["cka_debiased"] for run in runs])
    size, hours = (mean(values) for values in zip(*((run.cost.gigabytes, run.cost.hours) for run in runs), strict=True))
    return [estimate_text(quality, 3), f"{size:.4g}", "not known" if isnan(hours) else f"{hours:.3g}"]


def _numeric_options(sweep: Sweep) -> list[str]:
    """The varied options that are numbers, each of which gets a chart."""
    return [
        name for name, values in sweep.grid.items()
        if name != "seed" and len(values) > 1
        and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    ]  # fmt: skip


def _plot(result: SweepResult, option: str) -> str:
    """CKA over a varied option, a curve for each combination of the others."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for key, runs in groups_of(result).items():
        options = dict(key)
        if option in options:
            point = (float(options.pop(option)), mean(run.after["cka_debiased"] for run in runs))
            lines.setdefault(_words(tuple(options.items())), []).append(point)
    drawn = [
        curve("CKA" if words == "all" else words, i, sorted(points)) for i, (words, points) in enumerate(lines.items())
    ]
    return curves(drawn, x_label=option, label=f"CKA over {option}")

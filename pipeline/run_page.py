"""The curves of a run as one self-contained HTML page."""

import json
from collections.abc import Iterable, Mapping, Sequence
from math import isnan
from pathlib import Path

import numpy as np

from g2l_core.distillation.logs import read_log
from g2l_core.report.page import render
from g2l_core.report.plots import Curve, curves
from g2l_core.report.tables import number, proper
from g2l_core.results import Estimate
from pipeline.runs import RunRecord, RunResult

POINTS = 300
"""Points that a curve of many steps is averaged to."""

HELD_OUT = {
    "cka_debiased": "CKA, debiased",
    "cka_debiased_projected": "CKA, projected",
    "r2_projected": "explained variance",
    "cosine_projected": "cosine, projected",
    "knn_overlap": "kNN overlap, k = 10",
}


PARTS = ("loss:", "loss@", "term:")
"""How columns of log.csv begin that are of one teacher, of one width, or of a term beside the loss."""

CKA_PARTS = ("cka_debiased:", "cka_debiased@")
"""The same of validation.csv."""


def training_page(title: str, folder: Path, record: RunRecord, result: RunResult) -> str:
    """The page of a run folder: what was trained, its loss, its held-out metrics, and its warnings."""
    steps, validations = read_log(folder / "log.csv"), read_log(folder / "validation.csv")
    measured = _measured(result)
    held_out = [curve(words, i, _points(validations, name)) for i, (name, words) in enumerate(measured.items())]
    names = [name for name in (steps[0] if steps else {}) if name.startswith(PARTS)]
    losses = {
        "loss": "loss_per_element",
        **{name.replace(":", " of ", 1).replace("@", ", width "): name for name in names},
    }
    loss = [
        curve(words, i, _averaged(_points(steps, name)), is_marked=False)
        for i, (words, name) in enumerate(losses.items())
    ]
    each = [name for name in (validations[0] if validations else {}) if name.startswith(CKA_PARTS)]
    parts = [curve(_words(name), i, _points(validations, name)) for i, name in enumerate(each)]
    return render(
        "run.html",
        title=title,
        summary=_summary(record, result),
        warnings=result.outcome.warnings,
        held_out=f"{record.held_out}; {_kept(result)}",
        held_out_plot=curves(held_out, x_label="step", label="Held-out metrics over the steps"),
        before_after=_before_after(result),
        command="g2l baseline" if record.baseline else "g2l distill",
        loss=record.baseline.get("loss") or record.settings["train"]["objective"]["loss"],
        parts_plot=curves(parts, x_label="step", label="CKA to each teacher and at each width") if parts else "",
        loss_plot=curves(loss, x_label="step", label="Training loss over the steps") if steps else "",
        share_waiting=result.share_waiting,
        settings=_settings(record),
    )


def curve(label: str, series: int, points: Iterable[tuple[float, float]], *, is_marked: bool = True) -> Curve:
    """A line of values without intervals."""
    places = tuple((x, Estimate(value=y)) for x, y in points)
    return Curve(label=label, series=series, points=places, is_marked=is_marked)


def _summary(record: RunRecord, result: RunResult) -> str:
    outcome, rows = result.outcome, record.rows["train"]
    teachers = " and ".join(teacher.name for teacher in record.teachers)
    early = ", stopped early" if outcome.stopped_early else ""
    if record.baseline:
        return (
            f"{record.baseline['what'].capitalize()}: {outcome.steps:,} steps on {sum(rows.values()):,} patches. "
            f"Its held-out metrics are against {teachers}, which it did not learn from."
        )
    return (
        f"{record.student.name} from {teachers}: {outcome.steps:,} steps{early} on "
        f"{sum(rows.values()):,} patches of {len(rows)} slides."
    )


def _kept(result: RunResult) -> str:
    best = result.outcome.best_step
    return f"kept: the {result.kept} weights, step {result.kept_step:,}; best CKA at step {best:,}"


def _words(name: str) -> str:
    """What a column of one teacher or width is called."""
    _, colon, teacher = name.partition(":")
    return teacher if colon else f"width {name.partition('@')[2]}"


def _points(rows: Iterable[Mapping[str, float]], name: str) -> tuple[tuple[float, float], ...]:
    """A column over the steps, without steps where a teacher had no patch."""
    return tuple((row["step"], row[name]) for row in rows if not isnan(row[name]))


def _averaged(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """At most `POINTS` points, each the mean of its neighbors."""
    if len(points) <= POINTS:
        return tuple(points)
    parts = np.array_split(np.asarray(points), POINTS)
    return tuple((float(part[:, 0].mean()), float(part[:, 1].mean())) for part in parts)


def _before_after(result: RunResult) -> list[list[str]]:
    both, measured = (result.before, result.after), _measured(result)
    return [[words, *(proper(number(f[name], 3)) for f in both)] for name, words in measured.items()]


def _measured(result: RunResult) -> dict[str, str]:
    """The held-out metrics that a run has: without a teacher there are none of projected features."""
    return {name: words for name, words in HELD_OUT.items() if name in result.after}


def _settings(record: RunRecord) -> str:
    content = record.to_json()
    return json.dumps({key: content[key] for key in ("settings", "replay", "ranks", "about")}, indent=2, sort_keys=True)

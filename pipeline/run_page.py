"""The curves of a run as one self-contained HTML page."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from g2l_core.distillation.logs import read_figures
from g2l_core.report.page import document, table
from g2l_core.report.svg import WIDTH, axis_for, line_to, picture, shape, text_at
from g2l_core.report.tables import number, proper

POINTS = 300
"""Points that a curve of many steps is averaged to."""

HELD_OUT = {
    "cka_debiased": "CKA, debiased",
    "cka_debiased_projected": "CKA, projected",
    "r2_projected": "explained variance",
    "cosine_projected": "cosine, projected",
    "knn_overlap": "kNN overlap, k = 10",
}

_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 690, 14, 280


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve."""

    label: str
    series: int
    """Its color and mark on the page."""
    points: tuple[tuple[float, float], ...]
    marked: bool = False
    """Whether each point gets a mark."""


def line_chart(lines: Sequence[Line], *, x_label: str, label: str) -> str:
    """Curves over a linear axis, named at their right ends.

    Args:
        lines: At least one with at least one finite point.
        x_label: What the axis below says.
        label: What the picture shows, for screen readers.
    """
    finite = [[p for p in line.points if isfinite(p[1])] for line in lines]
    ys = axis_for((y for points in finite for _, y in points), _BOTTOM, _TOP)
    xs = axis_for((x for points in finite for x, _ in points), _LEFT, _RIGHT)
    parts = [line_to(_LEFT, ys.at(tick), _RIGHT, ys.at(tick), "grid") for tick in ys.ticks]
    parts += [text_at(_LEFT - 10, ys.at(t) + 4, proper(number(t, ys.digits)), "tick end") for t in ys.ticks]
    parts += [text_at(xs.at(t), _BOTTOM + 20, f"{t:,.{xs.digits}f}", "tick middle") for t in xs.ticks]
    parts.append(text_at((_LEFT + _RIGHT) / 2, _BOTTOM + 42, x_label, "tick middle"))
    ends = sorted((ys.at(points[-1][1]), i) for i, points in enumerate(finite) if points)
    for line, points in zip(lines, finite, strict=True):
        if points:
            track = "L".join(f"{xs.at(x)} {ys.at(y)}" for x, y in points)
            parts.append(f'<path d="M{track}" class="track e{line.series}"/>')
        parts += [shape(line.series, xs.at(x), ys.at(y), 4) for x, y in points if line.marked]
    for y, (_, i) in zip(_spread([y for y, _ in ends]), ends, strict=True):
        parts += [shape(lines[i].series, _RIGHT + 16, y), text_at(_RIGHT + 28, y + 5, lines[i].label, "label")]
    return f'<div class="scroll" tabindex="0">{picture(WIDTH, _BOTTOM + 48, label, parts)}</div>'


def _spread(heights: Sequence[float]) -> list[float]:
    """Ascending heights at least a row of text apart, pushed up again where they leave the chart."""
    placed: list[float] = []
    for y in heights:
        placed.append(max(y, placed[-1] + 20) if placed else y)
    over = max(0.0, placed[-1] - _BOTTOM) if placed else 0.0
    return [y - over for y in placed]


def training_page(title: str, folder: Path, record: Mapping[str, Any]) -> str:
    """The page of a run folder: what was trained, its loss, its held-out figures, and what they warn of."""
    steps, validations = read_figures(folder / "log.csv"), read_figures(folder / "validation.csv")
    result, loss = record["result"], record["settings"]["train"]["objective"]["loss"]
    body = [
        f"<header><p class=over>g2l distill</p><h1>{escape(title)}</h1>",
        f"<p class=lead>{escape(_summary(record))}</p></header>",
        *(f'<p class="note">{escape(warning)}</p>' for warning in result["outcome"]["warnings"]),
        "<section><h2>Held-out patches</h2>",
        f"<p class=quiet>{escape(record['held_out'])}; {escape(_kept(result))}</p>",
        line_chart(
            [
                Line(label=words, series=i, points=_points(validations, name), marked=True)
                for i, (name, words) in enumerate(HELD_OUT.items())
            ],
            x_label="step", label="Held-out figures over the steps",
        ),
        _before_after(result),
        "</section><section><h2>Training loss</h2>",
        f"<p class=quiet>{escape(loss)}, as a figure that compares across batch sizes</p>",
        line_chart(
            [Line(label="loss", series=0, points=_averaged(_points(steps, "loss_per_element")))],
            x_label="step", label="Training loss over the steps",
        ),
        f"<p class=quiet>{result['share_waiting']:.1%} of the training time waiting for data.</p></section>",
        f"<section><h2>Settings</h2><details><summary>run.json</summary><pre>{escape(_settings(record))}</pre></details></section>",
    ]  # fmt: skip
    return document(title, "\n".join(body))


def _summary(record: Mapping[str, Any]) -> str:
    outcome, rows = record["result"]["outcome"], record["rows"]["train"]
    early = ", stopped early" if outcome["stopped_early"] else ""
    return (
        f"{record['student']['name']} from {record['teacher']['name']}: {outcome['steps']:,} steps{early} on "
        f"{sum(rows.values()):,} patches of {len(rows)} slides."
    )


def _kept(result: Mapping[str, Any]) -> str:
    best = result["outcome"]["best_step"]
    return f"kept: the {result['kept']} weights, step {result['kept_step']:,}; best CKA at step {best:,}"


def _points(rows: Iterable[Mapping[str, float]], name: str) -> tuple[tuple[float, float], ...]:
    return tuple((row["step"], row[name]) for row in rows)


def _averaged(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """At most `POINTS` points, each the mean of its neighbors."""
    if len(points) <= POINTS:
        return tuple(points)
    parts = np.array_split(np.asarray(points), POINTS)
    return tuple((float(part[:, 0].mean()), float(part[:, 1].mean())) for part in parts)


def _before_after(result: Mapping[str, Any]) -> str:
    before, after = result["before"], result["after"]
    rows = ([escape(words), *(proper(number(f[name], 3)) for f in (before, after))] for name, words in HELD_OUT.items())
    return table(("figure", "before", "after"), rows)


def _settings(record: Mapping[str, Any]) -> str:
    return json.dumps({key: record[key] for key in ("settings", "replay", "ranks", "about")}, indent=2, sort_keys=True)

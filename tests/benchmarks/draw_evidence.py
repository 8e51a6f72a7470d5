"""Draw the pictures of docs/evidence.md: what every encoder retains of the teacher, and quality over cached views.

python tests/benchmarks/draw_evidence.py REPORT OUT.svg METRIC...    # a report of g2l bench
python tests/benchmarks/draw_evidence.py SWEEP/results.csv OUT.svg   # a sweep over views
"""

import csv
import sys
from collections import defaultdict
from math import isnan
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from g2l_core.report.tables import encoder_order, meaning_of
from g2l_core.report.write import read_report


def draw(folder: Path, out: Path, metrics: list[str]) -> None:
    """A panel for each metric: a point and its 95 % interval for each encoder, and a line where all is retained."""
    report = read_report(folder)
    keys = [key for key in encoder_order(report) if any(r.encoder == key for r in report.results)][1:]
    figure = Figure(figsize=(4.2 * len(metrics) + 1.6, 0.42 * len(keys) + 1.1), layout="constrained")
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        shares = {r.encoder: r.estimate for r in report.results if r.metric == f"retained_{metric}"}
        for y, key in enumerate(keys):
            if key not in shares:
                continue
            found = shares[key]
            if not isnan(found.low):
                axes.plot([found.low, found.high], [y, y], color="#33608c", lw=2)
            axes.plot([found.value], [y], "o", color="#33608c")
        axes.axvline(1.0, color="#777777", lw=1)
        axes.set_yticks(range(len(keys)), keys, fontsize=9)
        axes.set_title(meaning_of(metric).title, fontsize=10)
        axes.set_xlabel("share of the teacher")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.savefig(out, metadata={"Date": None})


def draw_views(table: Path, out: Path) -> None:
    """Held-out values over the number of cached views: a dot for each seed, the mean, and its 95 % t interval.

    A teacher that ran live on new views in every epoch stands apart, to the right.
    """
    shown = {"cka_debiased_after": "CKA to the teacher", "knn_overlap_after": "neighbors shared with the teacher"}
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in shown}
    with table.open() as file:
        for row in csv.DictReader(file):
            for name in shown:
                found[name][row["views"]].append(float(row[name]))
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
        cached = sorted((v for v in found[name] if v.isdigit()), key=int)
        places = {v: float(int(v)) for v in cached}
        places |= {v: 2.2 * int(cached[-1]) for v in found[name] if v not in places}
        means = {v: float(np.mean(found[name][v])) for v in places}
        for v, x in places.items():
            values = np.array(found[name][v])
            half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
            axes.plot([x] * len(values), values, ".", color="#9bb3cb", ms=5)
            axes.plot([x, x], [means[v] - half, means[v] + half], color="#33608c", lw=2)
            axes.plot([x], [means[v]], "o", color="#33608c")
        axes.plot([places[v] for v in cached], [means[v] for v in cached], color="#33608c", lw=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(places.values()), list(places))
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("augmented views in the cache")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    source, picture = Path(sys.argv[1]), Path(sys.argv[2])
    if source.suffix == ".csv":
        draw_views(source, picture)
    else:
        draw(source, picture, sys.argv[3:])

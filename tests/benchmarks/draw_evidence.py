"""Draw docs/images/evidence-retained.svg from a report of `g2l bench`: what every encoder retains of the teacher.

python tests/benchmarks/draw_evidence.py REPORT docs/images/evidence-retained.svg METRIC...
"""

import sys
from math import isnan
from pathlib import Path

from matplotlib.figure import Figure

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


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])

"""Pictures in proportion, axes that enclose their values, and colors that every eye can tell apart."""

import html
import math
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from g2l_core.report import page
from g2l_core.report.page import COLORS, SHAPES
from g2l_core.report.plots import Curve, ForestGroup, Row, curves, forest, ticks
from g2l_core.results import Estimate

STYLE = (Path(page.__file__).parent / "templates" / "style.css").read_text()
_LIGHT, _DARK = (re.findall(r"--e\d: (#\w+);", line) for line in re.findall(r"--e0:.*", STYLE))


def estimate(value, half=math.nan):
    return Estimate(value=value, low=value - half, high=value + half)


def test_a_forest_places_values_and_bounds_in_proportion():
    rows = tuple(
        Row(label=str(i), series=i, estimate=estimate(v, 0.25), text="") for i, v in enumerate([1.0, 2.0, 4.0])
    )
    svg = ElementTree.fromstring(forest([ForestGroup(title="t", rows=rows)], neutral=0.0, label="f"))
    paths = [(p.get("class"), p.get("d"), p.get("transform")) for p in svg.iter("path")]
    marks = [float(re.search(r"translate\((\S+)", t)[1]) for style, _, t in paths if style.startswith("mark")][1::2]
    bars = [tuple(map(float, re.findall(r"[ML] (\S+) ", d))) for style, d, _ in paths if style.startswith("bar")]
    [zero] = {float(re.search(r"M (\S+) ", d)[1]) for style, d, _ in paths if style == "neutral"}
    unit = marks[1] - marks[0]
    assert unit > 0
    assert marks[2] - marks[1] == pytest.approx(2 * unit, abs=0.2)
    assert marks[0] - zero == pytest.approx(unit, abs=0.2)
    for mark, (low, high) in zip(marks, bars, strict=True):
        assert [mark - low, high - mark] == pytest.approx([unit / 4] * 2, abs=0.2)


def test_curves_are_logarithmic_in_k_and_label_their_ends_apart():
    lines = [
        Curve(label=name, series=i, points=tuple((k, estimate(value)) for k in (2, 4, 8)))
        for i, (name, value) in enumerate({"low": 1.0, "alike": 1.001, "high": 3.0, "top": 3.001}.items())
    ]
    svg = ElementTree.fromstring(curves(lines, x_label="k", label="c", is_log=True))
    tracks = [p.get("d") for p in svg.iter("path") if p.get("class").startswith("track")]
    first, second, third = (float(x) for x in re.findall(r"[ML] (\S+)", tracks[0]))
    assert third - second == pytest.approx(second - first, abs=0.2)
    heights = {t.text: float(t.get("y")) for t in svg.iter("text") if t.get("class").startswith("label")}
    assert sorted(heights, key=heights.get) == ["top", "high", "alike", "low"]
    assert min(np.diff(sorted(heights.values()))) >= 20


def test_what_is_not_finite_is_not_drawn():
    rows = tuple(Row(label="r", series=0, estimate=estimate(v), text="") for v in (math.nan, math.inf, 1.0))
    svg = ElementTree.fromstring(forest([ForestGroup(title="t", rows=rows)], neutral=None, label="f"))
    marks = [p for p in svg.iter("path") if p.get("class").startswith("mark")]
    assert len(marks) == 3 + 1  # one beside each name, one on the axis
    assert "nan" not in ElementTree.tostring(svg, encoding="unicode")


@given(st.lists(st.floats(-1e11, 1e11), min_size=1, max_size=5))
def test_ticks_are_few_round_and_enclose_the_values(values):
    places, labels = ticks(values)
    steps = np.diff(places)
    mantissa = steps[0] / 10 ** np.floor(np.log10(steps[0]) + 1e-9)
    assert len(labels) == len(places)
    assert 2 <= len(places) <= 8
    assert steps == pytest.approx(np.full(len(steps), steps[0]), rel=1e-3)
    assert mantissa == pytest.approx(min((1, 2, 5), key=lambda m: abs(m - mantissa)), rel=1e-3)
    margin = 1e-6 * steps[0]
    assert places[0] <= min(values) + margin
    assert max(values) <= places[-1] + margin


# Simulation of the three kinds of color blindness at full severity: Machado, Oliveira & Fernandes (2009), table 1.
SEEN = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(color):
    channels = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(light):
    scaled = XYZ @ np.clip(light, 0, 1) / [0.9505, 1, 1.089]
    f = np.where(scaled > 0.008856, np.cbrt(scaled), 7.787 * scaled + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("sight", SEEN)
@pytest.mark.parametrize("palette", [_LIGHT, _DARK], ids=["light", "dark"])
def test_colors_differ_to_every_eye(palette, sight):
    seen = [lab(np.array(SEEN[sight]) @ linear(color)) for color in palette]
    assert min(np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i]) > 14


@pytest.mark.parametrize(("palette", "paper"), [(_LIGHT, "#ffffff"), (_DARK, "#14171b")], ids=["light", "dark"])
def test_colors_stand_out_from_the_page(palette, paper):
    bright = [float(XYZ[1] @ linear(color)) + 0.05 for color in (*palette, paper)]
    assert min(max(b, bright[-1]) / min(b, bright[-1]) for b in bright[:-1]) > 3


def test_color_and_shape_together_repeat_late():
    assert math.lcm(COLORS, len(SHAPES)) == 42
    assert COLORS == len(_LIGHT) == len(_DARK)


def some_plots(label="r", values=(1.0, 2.0, 4.0)):
    rows = tuple(Row(label=label, series=i, estimate=estimate(v, 0.5), text=str(v)) for i, v in enumerate(values))
    lines = [Curve(label=label, series=0, points=tuple((k, estimate(v, 0.5)) for k, v in enumerate(values, 1)))]
    forests = forest([ForestGroup(title=label, rows=rows)], neutral=0.0, label=label)
    return [forests, *(curves(lines, x_label=label, label=label, is_log=is_log) for is_log in (True, False))]


def test_the_users_own_matplotlib_settings_change_nothing():
    plain = some_plots()
    with matplotlib.rc_context({"svg.fonttype": "path", "font.size": 30, "savefig.bbox": "tight", "axes.grid": True}):
        assert some_plots() == plain


@pytest.mark.parametrize("name", ["$\\frac$", "a\x00\x1b b", "\udce4", "<b>&\"'", "\u6f22\u5b57", "", "5", "\n"])
def test_a_name_may_be_anything(name):
    for svg in some_plots(name):
        shown = [html.unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)", svg)]
        assert name in shown
        assert set(re.findall(r"<(\w+)", svg)) <= {"svg", "path", "text"}


def test_a_plot_has_no_ids_and_stays_small():
    values = tuple(float(v) for v in range(60))
    for svg in some_plots(values=values):
        assert " id=" not in svg
        assert len(svg) < 30_000


def test_the_report_imports_matplotlib_only_when_it_draws():
    code = "import sys, g2l_core.report.write; sys.exit('matplotlib' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

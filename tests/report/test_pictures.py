"""Pictures in proportion: points, shades, squares and scale bars in their places, and tables that judge rightly."""

import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from g2l_core.report.html import page
from g2l_core.report.pictures import pictures_of
from g2l_core.report.tables import (
    against_published,
    listed,
    reasons,
    settings_text,
    shortened,
    support,
    task_parts,
)
from g2l_core.results import Comparison, Failure, Plots, PublishedValue
from tests.report.test_report import cka, confusion, estimate, facts, projection, report, result, slide_map

ORDER = ("teacher", "before", "after")


def svgs(html, style):
    return [ElementTree.fromstring(svg) for svg in re.findall(rf'<svg class="{style}".*?</svg>', html)]


def text_of(html):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def test_points_stand_in_proportion_in_both_panels():
    by_class, by_center = svgs(pictures_of(Plots(projections=(projection(),)), ORDER), "plane")
    dots = {
        (int(path.get("class")[-1]), tuple(map(int, place)))
        for path in by_class.iter("path")
        for place in re.findall(r"M(\d+) (\d+)", path.get("d"))
    }
    assert dots == {(0, (200, 200)), (1, (12, 106)), (1, (294, 388))}  # y grows upwards
    assert {path.get("class") for path in by_center.iter("path")} == {"dots e0"}


def test_legends_name_and_count_once_where_all_encoders_agree():
    two = (projection(), projection(encoder="after"))
    text = text_of(pictures_of(Plots(projections=two), ORDER))
    assert text.count("Class benign 1 tumor 2") == 1
    assert text.count("Center north 3") == 1
    apart = (projection(), projection(encoder="after", classes=("benign", "else")))
    text = text_of(pictures_of(Plots(projections=apart), ORDER))
    assert text.count("Class benign 1") == 2
    assert "3 of 300 patches, drawn by seed" in text


def test_a_plane_without_classes_and_centers_is_one_panel():
    plain = projection(classes=("",), class_of=(0, 0, 0), centers=("",))
    assert len(svgs(pictures_of(Plots(projections=(plain,)), ORDER), "plane")) == 1


def test_points_that_are_not_finite_are_left_out():
    odd = projection(x=(math.nan, 0.0, math.inf), y=(0.0, 0.0, 0.0))
    for svg in svgs(pictures_of(Plots(projections=(odd,)), ORDER), "plane"):
        assert sum(len(re.findall("M", path.get("d"))) for path in svg.iter("path")) == 1


def test_each_method_has_its_own_section_and_caution():
    html = pictures_of(Plots(projections=(projection(), projection(method="UMAP", shares=()))), ORDER)
    assert re.findall(r"<h3>(.*?)</h3>", html) == ["PCA of the features", "UMAP of the features"]
    assert "50 % and 25 % of the variance" in html
    assert html.count("of the variance") == 1
    assert html.count("Distances between clusters mean little") == 1


def test_heat_cells_are_shaded_by_what_they_say():
    html = pictures_of(Plots(cka=(cka(values=((1.0, -0.25), (-0.25, math.nan))),)), ORDER)
    cells = re.findall(r'<td style="--share:([\d.]+)">(.*?)</td>', html)
    assert cells == [("1.00", "1.00"), ("0.00", "\u22120.25"), ("0.00", "\u22120.25"), ("0", "n/a")]
    assert "9 of 40 test patches, drawn by seed" in html
    assert "all 40 patches" in pictures_of(Plots(cka=(cka(n=40, rows="all"),)), ORDER)


def test_confusions_show_the_share_of_the_true_class():
    html = pictures_of(Plots(confusions=(confusion(counts=((3, 1), (0, 0))),)), ORDER)
    cells = re.findall(r'<td style="--share:([\d.]+)">(.*?)<span class="sub">(.*?)</span></td>', html)
    assert cells == [("0.75", "0.75", "3"), ("0.25", "0.25", "1"), ("0", "n/a", "0"), ("0", "n/a", "0")]
    assert "teacher</span> kNN vote" in html
    assert "k = 20" in html


def test_a_slide_is_drawn_cell_by_cell():
    (svg,) = svgs(pictures_of(Plots(slides=(slide_map(),)), ORDER), "map")
    squares = {
        (path.get("fill"), tuple(map(int, place)))
        for path in svg.iter("path")
        if path.get("fill")
        for place in re.findall(r"M(\d+) (\d+)h1v1h-1z", path.get("d"))
    }
    assert squares == {("#f00", (0, 0)), ("#0f0", (1, 0)), ("#f00", (0, 1))}


@given(st.floats(1e-4, 50), st.integers(1, 60), st.integers(1, 60))
def test_the_scale_bar_is_as_long_as_it_says(cell_mm, across, down):
    drawn = slide_map(cell_mm=cell_mm, columns=(0, across - 1), rows=(0, down - 1), colors=("123", "456"))
    (svg,) = svgs(pictures_of(Plots(slides=(drawn,)), ORDER), "map")
    unit = float(re.search(r"scale\((.*?)\)", svg.find("g").get("transform"))[1])
    bar = next(path for path in svg.iter("path") if path.get("class") == "scalebar")
    pixels = float(re.search(r"L(\S+) ", bar.get("d"))[1])
    [length] = [float(text.text.removesuffix(" mm")) for text in svg.iter("text")]
    assert pixels <= 100.05
    assert pixels >= 39.9  # the next of 1, 2 and 5 is at most 2.5 times as long
    assert length == pytest.approx(pixels / unit * cell_mm, rel=0.01)


@pytest.mark.parametrize("cell_mm", [math.nan, 0.0, math.inf])
def test_a_slide_of_unknown_scale_has_no_bar(cell_mm):
    (svg,) = svgs(pictures_of(Plots(slides=(slide_map(cell_mm=cell_mm),)), ORDER), "map")
    assert not list(svg.iter("text"))


def expected(metric="knn_accuracy", encoder="teacher", value=0.7, tolerance=0.05):
    return PublishedValue(
        task="oral", metric=metric, encoder=encoder, value=value, tolerance=tolerance, source="Table 2"
    )


def test_published_figures_are_judged_by_their_tolerance():
    published = (
        expected(value=0.75),
        expected(value=0.76),
        expected(encoder="Teacher"),
        expected(encoder="H-optimus-0"),
        expected(metric="probe_auc"),
    )
    told = report(encoders=(facts(),), results=(result(value=0.7),), expected=published)
    (part,) = task_parts(told)
    verdicts = [held.verdict for held in against_published(part, told)]
    assert verdicts == ["within", "off by -0.060", "within", "not run here", "not run here"]
    html = page(told)
    assert html.count('<span class="within">within</span>') == 2
    assert html.count('<span class="beyond">off by \u22120.060</span>') == 1


def test_a_figure_that_is_no_number_is_not_judged():
    told = report(results=(result(value=math.nan),), expected=(expected(),))
    (part,) = task_parts(told)
    assert [held.within for held in against_published(part, told)] == [None]


def test_the_overview_has_one_figure_a_task_and_encoder():
    rows = (
        result(task="oral", metric="probe_auc", value=0.9),
        result(task="oral", metric="knn_balanced_accuracy", value=0.8),
        result(task="breast", metric="my_own", encoder="after", value=0.3),
    )
    html = page(report(results=rows))
    table = html[html.index("<h2>Overview</h2>") :].partition("</section>")[0]
    told = text_of(table)
    assert "kNN balanced accuracy" in told
    assert "my_own" in told
    assert "Probe AUC" not in told
    assert re.findall(r"<td>(.*?)<", table) == ["0.800", "\u2013", "\u2013", "0.300"]
    assert "Overview" not in page(report(results=rows[:2]))


def test_notes_stand_above_the_tasks():
    html = page(report(notes=("Beware <b>",), results=(result(),)))
    assert html.index("Beware &lt;b&gt;") < html.index("<h2>oral</h2>")
    assert "Before you read" not in page(report(results=(result(),)))


def test_support_tells_what_all_encoders_share():
    row = {
        "a": result(encoder="a", settings={"k": 5, "C": 0.1, "converged": True, "duplicates_dropped": 3}),
        "b": replace(result(encoder="b", settings={"k": 5, "C": 1.0, "converged": True}), n=1200),
    }
    assert support(row) == "n = 100 to 1,200; converged; k = 5"
    named = {"a": result(metric="robustness_ratio_k5", settings={"k": 5})}
    assert support(named) == "n = 100"
    assert settings_text({"is_paired": False, "split": "fixed"}) == "not is paired; split: fixed"


def test_each_rows_support_is_said_once_for_rows_alike():
    rows = (
        result(metric="knn_accuracy", settings={"k": 5}),
        result(metric="knn_f1", settings={"k": 5}),
        result(metric="probe_auc", settings={"C": 1.0}),
    )
    html = page(report(results=rows))
    assert html.count('<span class="sub">n = 100; k = 5</span>') == 1
    assert html.count('<span class="sub">n = 100; C = 1.0</span>') == 1


def test_failures_alike_are_told_together():
    alike = [Failure(task="oral", reason="alike", encoder=key) for key in "abc"]
    assert reasons([*alike, Failure(task="oral", reason="whole")]) == [("oral, a, b and c", "alike"), ("oral", "whole")]
    assert [listed(words) for words in ([], ["a"], ["a", "b"])] == ["", "a", "a and b"]


@given(st.text(max_size=60), st.integers(3, 40))
def test_shortened_names_keep_both_ends(text, chars):
    short = shortened(text, chars)
    assert len(short) <= chars
    if short != text:
        head, tail = short.split("\u2026")[0], short[chars - (chars - 1) // 2 :]
        assert text.startswith(head)
        assert text.endswith(tail)


def test_differences_stand_under_their_own_reference():
    pairs = [("cka_debiased", "before"), ("knn_accuracy", "teacher"), ("knn_accuracy", "before")]
    rows = tuple(
        Comparison(task="oral", metric=m, encoder="after", reference=r, difference=estimate(0.1, 0.05), p_value=0.1)
        for m, r in pairs
    )
    html = page(report(comparisons=rows))
    found = re.findall(r'Difference from (\w+)</h3>|aria-label="Differences from (\w+)"', html)
    assert found == [("before", ""), ("", "before"), ("", "before"), ("teacher", ""), ("", "teacher")]

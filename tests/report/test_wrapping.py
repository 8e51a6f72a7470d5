"""Tables and names in lines: nothing is lost, and nothing is broken that people would not break."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from g2l_core.report.html import page
from g2l_core.report.wrapping import WHOLE, narrowest, wrapped
from g2l_core.report.write import terminal_table
from pipeline.tables import table_text
from tests.report.test_report import facts, report, result

NAME = "timm-mobilenetv3_small_100-128-random0"
TEXTS = st.text(st.sampled_from("ab c-_1./"), max_size=60)


@given(TEXTS, st.integers(1, 40))
def test_no_letter_is_lost_and_no_line_longer_than_it_must_be(text, width):
    lines = wrapped(text, width)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    least = max((len(line) for line in wrapped(text, 1)), default=0)
    assert max(map(len, lines)) <= max(width, least)
    assert max(map(len, wrapped(text, max(1, narrowest(text))))) <= max(1, narrowest(text))


def test_words_stay_whole_and_so_do_paths():
    short = "b" * WHOLE
    assert narrowest(f"{short} a-b") == WHOLE
    assert wrapped("runs/a-long-path/of-what", 8) == ["runs/a-long-path/of-what"]


@given(st.lists(st.lists(TEXTS, min_size=3, max_size=3), min_size=1, max_size=4), st.integers(20, 100))
def test_a_table_loses_nothing(rows, width):
    text = table_text(rows, right=(1,), width=width)
    assert sorted(text.replace(" ", "").replace("\n", "")) == sorted("".join(map("".join, rows)).replace(" ", ""))


def test_long_names_do_not_widen_a_table_or_cut_what_stands_beside_them():
    rows = [(f"{NAME} and {NAME}", "0.2 [0.1, 0.3]", "2.5 MB", "3 of 4"), ("b", "1", "22", "4")]
    text = table_text(rows, header=("encoder", "patches a second", "memory", "slides"), right=(1, 2))
    assert max(map(len, text.splitlines())) <= 80
    for cell in ("0.2 [0.1, 0.3]", "2.5 MB", "3 of 4", "patches a second", NAME):
        assert cell in text


def test_a_page_breaks_long_names_where_people_would():
    key = NAME.replace("100", "1<0")
    text = page(report(encoders=(facts(key),), results=(result(encoder=key),)))
    assert "timm-<wbr>mobilenetv3_<wbr>small_<wbr>1&lt;0-<wbr>128-<wbr>random0" in text


def test_the_table_of_a_benchmark_breaks_names_at_their_signs():
    keys = ("efficientnet-lite0-128", NAME, "run-f2b221c7")
    shown = report(encoders=tuple(map(facts, keys)), results=tuple(result(encoder=key) for key in keys))
    text = terminal_table(replace(shown, notes=(), failures=()))
    assert max(map(len, text.splitlines())) <= 80
    head = text[: text.index("kNN accuracy")]
    assert head.split()[1:] == ["timm-mobilenetv3_", "efficientnet-", "small_100-128-", "lite0-128", "random0", keys[2]]

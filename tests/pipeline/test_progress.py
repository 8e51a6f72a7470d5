"""The progress line: one live line on a terminal, log lines elsewhere."""

import io

from hypothesis import given
from hypothesis import strategies as st

from pipeline.progress import ProgressLine, clock, fitted


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_live_line_is_drawn_over_itself_and_fits(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    terminal = Terminal()
    line = ProgressLine("timm-mobilenetv3_small_100-128-random0", "patches", stream=terminal)
    for done in range(1, 11):
        line.update(done, 10, "encoder 97% busy  bottleneck: encode")
    line.close()
    drawn = terminal.getvalue().split("\r\x1b[K")
    assert drawn[0] == ""
    assert drawn[-1].endswith("10/10 patches  encoder 97% busy  bottleneck: encode\n")
    assert "…" in drawn[-1]
    assert all(len(part.rstrip("\n")) <= 59 for part in drawn)


def test_elsewhere_it_logs_whole_lines():
    log = io.StringIO()
    line = ProgressLine("tissue", "slides", stream=log)
    for done in range(1, 1001):
        line.update(done, 1000)
    line.close()
    assert log.getvalue().splitlines() == ["tissue  1/1,000 slides", "tissue  1,000/1,000 slides"]


def test_nothing_to_do_is_not_shown():
    log = io.StringIO()
    ProgressLine("tissue", "slides", stream=log).update(0, 0)
    assert log.getvalue() == ""


@given(st.text(max_size=50), st.text(max_size=90), st.integers(20, 120))
def test_a_fitted_line_never_wraps_and_keeps_the_state(title, state, columns):
    line = fitted(title, state, columns)
    assert len(line) <= columns
    assert len(state) > columns or line.endswith(state)


def test_clock():
    assert [clock(s) for s in (0.4, 59.4, 60, 3599, 7800)] == ["0 s", "59 s", "1:00 min", "59:59 min", "2:10 h"]

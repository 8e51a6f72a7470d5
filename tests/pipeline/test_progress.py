"""The progress line: one live line on a terminal, log lines elsewhere."""

import io
import re
import time

import pytest

from pipeline.progress import ProgressLine, clock

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_live_line_is_drawn_over_itself_and_fits(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    with ProgressLine("timm-mobilenetv3_small_100-128-random0", "patches", stream=terminal) as line:
        for done in range(1, 11):
            line.update(done, 10, "encoder 97% busy  bottleneck: encode")
    drawn = ESCAPES.sub("", terminal.getvalue()).split("\r")
    assert drawn[-1].rstrip().endswith("10/10 patches  encoder 97% busy  bottleneck: encode")
    assert ("…" in drawn[-1]) == (columns < 120)
    assert ("━" in drawn[-1]) == (columns == 120)
    assert all(len(part.rstrip("\n")) <= columns for part in drawn)
    assert terminal.getvalue().count("\n") == 1
    assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("\x1b[?25l")


def test_the_cursor_stays_visible_while_the_line_is_live(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    line = ProgressLine("tissue", "slides", stream=terminal)
    line.update(1, 2)
    assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("\x1b[?25l")
    line.close()


def test_elsewhere_it_logs_whole_lines():
    log = io.StringIO()
    line = ProgressLine("tissue", "slides", stream=log)
    for done in range(1, 1001):
        line.update(done, 1000)
    line.close()
    assert log.getvalue().splitlines() == ["tissue  1/1,000 slides", "tissue  1,000/1,000 slides"]


def test_rate_and_time_left(monkeypatch):
    monkeypatch.setattr("pipeline.progress.LOG_EVERY_S", 0)
    log = io.StringIO()
    line = ProgressLine("reading", "patches", stream=log)
    line.update(1000, 4000)  # what was done before does not count
    time.sleep(0.55)
    for done in (2000, 4000):
        line.update(done, 4000, "bottleneck: read")
    begun, under_way, ended = log.getvalue().splitlines()
    assert begun == "reading  1,000/4,000 patches"
    shown = re.fullmatch(r"reading  2,000/4,000 patches  ([\d,]+)/s  (\d+) s left  bottleneck: read", under_way)
    rate, left = shown.groups()
    assert 200 < int(rate.replace(",", "")) < 2000
    assert 1 <= int(left) <= 10
    assert re.fullmatch(r"reading  4,000/4,000 patches  [\d,]+/s  in \d+ s  bottleneck: read", ended)


def test_nothing_to_do_is_not_shown():
    log = io.StringIO()
    ProgressLine("tissue", "slides", stream=log).update(0, 0)
    assert log.getvalue() == ""


def test_clock():
    assert [clock(s) for s in (0.4, 59.4, 60, 3599, 7800)] == ["0 s", "59 s", "1:00 min", "59:59 min", "2:10 h"]

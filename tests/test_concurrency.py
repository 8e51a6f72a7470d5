"""Running ahead: order, a bounded lookahead, failures at their turn, and no thread left behind."""

import threading
import time
from itertools import count, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from g2l_core.concurrency import in_background, run_ahead
from g2l_core.errors import ReadError


def engine_threads() -> int:
    """Threads of the pools; those of slides that hang on purpose in other tests are called g2l-slide."""
    names = [thread.name for thread in threading.enumerate()]
    return sum(name.startswith("g2l") and name != "g2l-slide" for name in names)


@given(items=st.lists(st.integers()), workers=st.integers(0, 4), lookahead=st.integers(1, 6))
def test_outcomes_come_in_the_order_of_the_items(items, workers, lookahead):
    assert list(run_ahead(lambda i: i * 2, items, workers=workers, lookahead=lookahead)) == [i * 2 for i in items]
    assert engine_threads() == 0


def test_slow_items_do_not_lose_their_place():
    def work(i: int) -> int:
        time.sleep(0.02 if i % 5 == 0 else 0)
        return i

    assert list(run_ahead(work, range(20), workers=4, lookahead=8)) == list(range(20))


@pytest.mark.parametrize(("workers", "lookahead"), [(0, 3), (1, 1), (1, 3), (4, 3), (2, 7)])
def test_at_most_lookahead_items_are_drawn_before_their_turn(workers, lookahead):
    drawn = 0

    def items():
        nonlocal drawn
        for i in count():
            drawn += 1
            yield i

    for consumed, outcome in enumerate(
        islice(run_ahead(lambda i: i, items(), workers=workers, lookahead=lookahead), 30)
    ):
        assert outcome == consumed
        assert drawn - consumed == (lookahead if workers else 1)
    assert engine_threads() == 0


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_failure_comes_at_its_items_turn(workers):
    def work(i: int) -> int:
        if i == 3:
            raise ReadError("item 3")
        return i

    outcomes = run_ahead(work, range(9), workers=workers, lookahead=6)
    assert [next(outcomes) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ReadError, match="item 3"):
        next(outcomes)
    assert list(outcomes) == []
    assert engine_threads() == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failure_of_the_items_comes_through(workers):
    def items():
        yield from (0, 1)
        raise ReadError("no more items")

    found = []
    with pytest.raises(ReadError, match="no more items"):
        found.extend(run_ahead(lambda i: i, items(), workers=workers, lookahead=2))
    assert engine_threads() == 0


def test_items_are_drawn_in_the_consumers_thread_and_worked_on_in_others():
    drawn_in, worked_in = set(), set()

    def items():
        for i in range(10):
            drawn_in.add(threading.current_thread())
            yield i

    def work(_: int) -> None:
        worked_in.add(threading.current_thread())

    for workers in (0, 2):
        drawn_in.clear()
        worked_in.clear()
        list(run_ahead(work, items(), workers=workers, lookahead=4))
        assert drawn_in == {threading.current_thread()}
        assert (threading.current_thread() in worked_in) == (workers == 0)
        assert len(worked_in) <= max(1, workers)


def test_workers_work_at_the_same_time():
    """Two items that wait for each other: with one thread only, the barrier would break."""
    together = threading.Barrier(2, timeout=10)
    outcomes = list(run_ahead(lambda i: (together.wait(), i)[1], range(6), workers=2, lookahead=4))
    assert outcomes == list(range(6))


def test_a_consumer_that_stops_early_stops_the_work():
    started = []

    def work(i: int) -> int:
        started.append(i)
        time.sleep(0.01)
        return i

    outcomes = run_ahead(work, count(), workers=2, lookahead=50)
    assert next(outcomes) == 0
    outcomes.close()
    assert engine_threads() == 0
    assert len(started) < 50


def test_a_background_keeps_the_order_and_is_ahead():
    made = []

    def items():
        for i in range(20):
            made.append(i)
            yield i

    stream = in_background(items(), depth=3)
    assert next(stream) == 0
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made == [0, 1, 2, 3]
    assert list(stream) == list(range(1, 20))


def test_a_background_raises_at_its_item_s_turn_and_closes_what_it_reads():
    closed = []

    def items(fails):
        try:
            for i in range(5):
                if i == fails:
                    raise ReadError("the third")
                yield i
        finally:
            closed.append(True)

    stream = in_background(items(3), depth=2)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ReadError, match="the third"):
        next(stream)
    stream = in_background(items(9), depth=2)
    next(stream)
    stream.close()
    assert closed == [True, True]

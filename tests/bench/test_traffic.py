"""Callers of a real engine: what they asked for is what they got, and when."""

import math
import threading
import time

import pytest

from csm_core.bench.subject import Subject
from csm_core.bench.traffic import Load, closed_loop, open_loop


def test_closed_loop_speaks_everything_once(subject: Subject) -> None:
    asked: list[int] = []

    def order(number: int):
        asked.append(number)
        return subject.prompt(number), subject.params(5 + number)

    with subject.engine() as engine:
        lines = closed_loop(engine, order, callers=2, each=3)
    assert sorted(asked) == list(range(6))
    assert sorted(line.frames for line in lines) == [5, 6, 7, 8, 9, 10]
    for line in lines:
        times = [when for when, _ in line.arrivals]
        assert line.outcome == "length"
        assert line.submitted < times[0] <= times[-1] <= (line.ended or math.nan)
        assert times == sorted(times)


def test_callers_wait_for_their_own_answer_only(subject: Subject) -> None:
    """Two callers: always two requests under way, and never more."""
    with subject.engine() as engine:
        lines = closed_loop(engine, lambda n: (subject.prompt(n), subject.params(20)), callers=2, each=4)
    for line in lines:
        assert sum(other.submitted < line.submitted < (other.ended or 0) for other in lines) <= 1
        assert any(o is not line and o.submitted < line.ended and line.submitted < o.ended for o in lines)


def test_arrivals_are_poisson_and_repeat(subject: Subject) -> None:
    load = Load(rate=50, lead_in=5, window=100, patience=5, seed=3)
    times = load.times()
    assert times == load.times() != Load(rate=50, lead_in=5, window=100, patience=5, seed=4).times()
    gaps = [after - before for before, after in zip([0.0, *times], times, strict=False)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.05)
    assert variance == pytest.approx(mean**2, rel=0.15)  # as an exponential distribution has it
    assert times == sorted(times)
    assert 104 < times[-1] < 110


def test_open_loop_counts_the_window_and_leaves_nothing_behind(subject: Subject) -> None:
    load = Load(rate=20, lead_in=0.3, window=0.6, patience=60, seed=1)
    counted = [time for time in load.times() if 0.3 <= time < 0.9]
    with subject.engine() as engine:
        lines = open_loop(engine, lambda n: (subject.prompt(n), subject.params(2, seed=n)), load)
        assert len(lines) == len(counted)
        assert all(line.complete and line.frames == 2 and line.ttfa > 0 for line in lines)
        again = closed_loop(engine, lambda n: (subject.prompt(n), subject.params(3)), 4)
        assert all(line.complete for line in again)


def test_open_loop_does_not_wait_for_a_slow_engine(subject: Subject) -> None:
    """Far too many, far too long: they are sent all the same, and those that did not end are failures."""
    load = Load(rate=40, lead_in=0, window=0.5, patience=0.2, seed=1)
    started = time.perf_counter()
    with subject.engine(slots=1, queue_size=3) as engine:
        lines = open_loop(engine, lambda n: (subject.prompt(n), subject.params(400)), load)
        assert time.perf_counter() - started < 30
    assert len(lines) == sum(time < 0.5 for time in load.times())
    assert {"EngineBusyError", "cancelled"} >= {line.outcome for line in lines if not line.complete}
    assert sum(line.outcome == "EngineBusyError" for line in lines) >= len(lines) - 10
    assert threading.active_count() < 20


def test_a_late_sender_does_not_hide_the_wait(subject: Subject) -> None:
    """Each request takes 0.1 s to write, and they are due every 0.02 s: the time since they were due counts."""
    load = Load(rate=50, lead_in=0, window=0.3, patience=5, seed=1)

    def order(number: int):
        time.sleep(0.1)
        return subject.prompt(number), subject.params(1)

    with subject.engine() as engine:
        lines = open_loop(engine, order, load)
    assert len(lines) > 5
    assert max(line.ttfa for line in lines) > 0.1 * len(lines) - 0.3

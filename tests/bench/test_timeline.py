"""What a listener lives through, on timelines written by hand."""

import math

import numpy as np
import pytest

from csm_core.bench.timeline import Timeline, percentile, percentiles, step_seconds, summary

FRAME = 0.08


def line(*arrivals: tuple[float, float], submitted: float = 0.0, outcome: str = "length") -> Timeline:
    return Timeline(submitted, list(arrivals), arrivals[-1][0] if arrivals else submitted, outcome)


def test_times_of_one_speech() -> None:
    speech = line((1.1, 1), (1.2, 2), (1.5, 7), submitted=1.0)
    assert speech.ttfa == pytest.approx(0.1)
    assert speech.frames == 10
    assert speech.rtf(FRAME) == pytest.approx(0.5 / 0.8)
    assert speech.complete


@pytest.mark.parametrize(
    ("arrivals", "gaps"),
    [
        ([(5.0, 1)], 0),
        ([(5.0, 1), (5.08, 1)], 0),  # at the last moment
        ([(5.0, 1), (5.081, 1)], 1),
        ([(5.0, 1), (5.04, 2), (5.24, 4)], 0),  # 3 frames since 5.0 last until 5.24
        ([(5.0, 1), (5.04, 2), (5.25, 4)], 1),
        ([(5.0, 1), (6.0, 1), (6.08, 1), (6.16, 1)], 1),  # late once; the player goes on from there
        ([(5.0, 1), (6.0, 1), (7.0, 1)], 2),
        ([(5.0, 100), (12.9, 1), (13.0, 1)], 0),  # far ahead
        ([], 0),
    ],
)
def test_underruns(arrivals: list[tuple[float, float]], gaps: int) -> None:
    assert line(*arrivals).underruns(FRAME + 1e-9) == gaps  # 0.08 has no exact sum


def test_a_chunk_schedule_needs_steps_faster_than_real_time() -> None:
    """(1, 2, 4, 8): the second chunk of two frames has to be made while one frame plays, 40 ms a frame."""

    def speak(step: float, schedule: tuple[int, ...]) -> Timeline:
        made, arrivals = 0, []
        for frames in schedule:
            made += frames
            arrivals.append((made * step, frames))
        return line(*arrivals)

    growing, even = (1, 2, 4, 8, 8), (1,) * 20
    assert speak(0.0399, growing).underruns(FRAME) == 0
    assert speak(0.0401, growing).underruns(FRAME) > 0
    assert speak(0.0799, even).underruns(FRAME) == 0
    assert speak(0.0801, even).underruns(FRAME) > 0


def test_nothing_came() -> None:
    refused = line(outcome="EngineBusyError")
    assert (refused.ttfa, refused.rtf(FRAME), refused.frames) == (math.inf, math.inf, 0)
    assert not refused.complete


@pytest.mark.parametrize("count", [1, 2, 3, 10, 99, 100])
def test_percentiles_are_numpys(count: int) -> None:
    values = np.random.default_rng(count).normal(size=count)
    for percent in (0, 50, 95, 99, 100):
        assert percentile(values.tolist(), percent) == pytest.approx(np.percentile(values, percent))


def test_percentiles_with_some_that_never_came() -> None:
    assert percentile([1.0, 2.0, math.inf], 50) == 2.0
    assert percentile([1.0, 2.0, math.inf], 95) == math.inf
    assert percentile([math.inf], 50) == math.inf
    assert math.isnan(percentile([], 95))
    assert percentiles([0.1, 0.3], 0.001) == {"p50": 200, "p95": pytest.approx(290), "p99": pytest.approx(298), "n": 2}


def test_summary() -> None:
    smooth = line((0.1, 1), (0.15, 9))
    gap = line((0.2, 1), (0.9, 9))
    refused = line(outcome="EngineBusyError")
    cut = line((0.1, 1), outcome="cancelled")
    heard = summary([smooth, gap, refused, cut], FRAME)
    assert (heard["requests"], heard["failed"], heard["with_underruns"], heard["underruns"]) == (4, 2, 1, 1)
    assert heard["ttfa_ms"]["p99"] == math.inf
    assert heard["ttfa_ms"]["n"] == 4
    assert heard["rtf"]["p50"] == pytest.approx((0.15 + 0.9) / 2 / 0.8)
    assert heard["audio_seconds"] == pytest.approx(21 * FRAME)


def test_step_is_taken_where_all_speak() -> None:
    """The first one speaks alone, and fast, until 1.0: that is no step of two."""
    early = line((0.1, 1), (0.2, 5), (1.0, 2), (2.0, 10), (3.0, 10), (3.1, 50))
    late = line((1.0, 1), (2.0, 10), (3.0, 10))
    assert step_seconds([early, late]) == pytest.approx(0.1)
    assert step_seconds([line((0.5, 1), (1.5, 20))]) == pytest.approx(0.05)
    assert math.isnan(step_seconds([line((0.1, 1), (0.2, 1)), line((0.3, 1), (0.4, 1))]))

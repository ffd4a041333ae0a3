"""What a listener lives through: when each chunk of a speech came, and whether playback ever ran dry. Pure arithmetic.

Times are seconds of one clock. Knows no engine, no model and no clock.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

PERCENTILES = (50, 95, 99)


@dataclass(eq=False)
class Timeline:
    """One request: ``arrivals`` are (when, frames) of its chunks; ``outcome`` why it ended, or the error's name."""

    submitted: float
    arrivals: list[tuple[float, float]] = field(default_factory=list)
    ended: float | None = None
    outcome: str = ""

    @property
    def frames(self) -> float:
        return sum(frames for _, frames in self.arrivals)

    @property
    def complete(self) -> bool:
        """Whether it came to the end that its caller wanted."""
        return self.outcome in ("eos", "length", "silence") and bool(self.arrivals)

    @property
    def ttfa(self) -> float:
        """Seconds to the first audio; infinite when none came."""
        return self.arrivals[0][0] - self.submitted if self.arrivals else math.inf

    def rtf(self, frame_seconds: float) -> float:
        """Time from the request to the last audio, per second of audio."""
        if not self.arrivals:
            return math.inf
        return (self.arrivals[-1][0] - self.submitted) / (self.frames * frame_seconds)

    def underruns(self, frame_seconds: float) -> int:
        """How often a player that starts with the first chunk has nothing to play when the next one comes.

        After a gap it goes on with what came late, as players do.
        """
        count, plays_until = -1, -math.inf  # the first chunk is always waited for
        for when, frames in self.arrivals:
            count += when > plays_until
            plays_until = max(when, plays_until) + frames * frame_seconds
        return max(count, 0)


def percentile(values: Sequence[float], percent: float) -> float:
    """Between the two nearest ranks, linearly (numpy's default). Infinite values count as the largest; NaN of none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low, share = int(rank), rank % 1
    if share == 0 or ordered[low + 1] == math.inf:
        return ordered[low + math.ceil(share)]
    return ordered[low] + (ordered[low + 1] - ordered[low]) * share


def percentiles(values: Sequence[float], unit: float = 1.0) -> dict[str, float]:
    """``{"p50": .., "p95": .., "p99": .., "n": ..}`` in parts of ``unit`` (0.001: milliseconds)."""
    return {**{f"p{p}": percentile(values, p) / unit for p in PERCENTILES}, "n": len(values)}


def summary(timelines: Sequence[Timeline], frame_seconds: float) -> dict[str, Any]:
    """What many listeners lived through: TTFA in milliseconds, RTF, the share that had a gap, the share that failed."""
    complete = [timeline for timeline in timelines if timeline.complete]
    gaps = [timeline for timeline in complete if timeline.underruns(frame_seconds)]
    return {
        "requests": len(timelines),
        "failed": len(timelines) - len(complete),
        "ttfa_ms": percentiles([timeline.ttfa for timeline in timelines], 0.001),
        "rtf": percentiles([timeline.rtf(frame_seconds) for timeline in complete]),
        "with_underruns": len(gaps),
        "underruns": sum(timeline.underruns(frame_seconds) for timeline in complete),
        "audio_seconds": sum(timeline.frames for timeline in timelines) * frame_seconds,
    }


def step_seconds(timelines: Sequence[Timeline]) -> float:
    """Seconds per frame while all of ``timelines`` were being spoken: their common step, prefill of none in between.

    The median over the streams of time per frame between the first and the last chunk inside the common window. NaN
    when no two chunks of one stream lie in it: then the speeches were too short, or did not overlap.
    """
    start = max(timeline.arrivals[0][0] for timeline in timelines)
    stop = min(timeline.arrivals[-1][0] for timeline in timelines)
    steps = []
    for timeline in timelines:
        inside = [(when, frames) for when, frames in timeline.arrivals if start <= when <= stop]
        made = sum(frames for _, frames in inside[1:])
        if made:
            steps.append((inside[-1][0] - inside[0][0]) / made)
    return median(steps) if steps else math.nan

"""Streams per device: how many people can listen at once before somebody waits too long or hears a gap.

Requests come at random (Poisson), whatever the engine is doing: callers in a closed loop would wait for a slow engine
and so hide that it is slow. A load of n streams asks for n seconds of speech every second.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from csm_core.bench.subject import Subject
from csm_core.bench.timeline import summary
from csm_core.bench.traffic import Load, open_loop
from csm_core.engine.engine import Engine

SHARES = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0, 1.15, 1.3)  # of the speed at full batch, which nothing can pass for long
CONTINUITY = 0.99  # of the streams have to play without a gap; below a hundred of them that is all of them
SECONDS = (2.0, 6.0)  # of a speech, evenly distributed
STAGES = 8  # that a budget is shared by
EXPECTED = 8  # requests in a window, if three times its share of the budget is enough for that


@dataclass(frozen=True)
class Limits:
    """What callers accept: the first sound at the 95th percentile, in milliseconds. ``seed`` is of the arrivals."""

    ttfa_ms: float
    seed: int = 0


def find_streams(engine: Engine, subject: Subject, speed: float, seconds: float, limits: Limits) -> dict[str, Any]:
    """Raise the load until it does not hold, then try once between the two.

    ``speed``: seconds of speech a second at full batch.
    """
    until = time.monotonic() + seconds
    window = min(max(0.55 * seconds / STAGES, 1.0), 30.0)
    stages: list[dict[str, Any]] = []
    held, broken = 0.0, math.inf
    for share in SHARES:
        if stages and time.monotonic() + 1.5 * window > until:
            break
        stages.append(stage(engine, subject, share * speed, window, limits))
        if stages[-1]["holds"]:
            held = stages[-1]["streams"]
        elif stages[-1]["requests"]:
            broken = stages[-1]["streams"]
            break
    if held and broken < math.inf and time.monotonic() + 1.5 * window < until:
        stages.append(stage(engine, subject, (held + broken) / 2, window, limits))
        held = stages[-1]["streams"] if stages[-1]["holds"] else held
    why = "the highest load that held" if broken < math.inf else "the highest load that was tried; none broke"
    return {
        "streams": held,
        "why": why if held else "the lowest load that was tried did not hold",
        "ttfa_limit_ms": limits.ttfa_ms,
        "continuity": CONTINUITY,
        "stages": stages,
    }


def stage(engine: Engine, subject: Subject, load: float, window: float, limits: Limits) -> dict[str, Any]:
    """One load for one window: what its callers lived through, and whether that holds."""
    frame_seconds = subject.frame_seconds
    rate = load / (sum(SECONDS) / 2)
    window = min(max(window, EXPECTED / rate), 3 * window)
    arrivals = Load(rate, lead_in=min(window / 2, SECONDS[1]), window=window, patience=window / 2, seed=limits.seed)
    heard = summary(open_loop(engine, _orders(subject, limits.seed), arrivals), frame_seconds)
    requests = heard["requests"]
    facts = {"streams": load, "requests_per_second": rate, "window_seconds": window, **heard}
    smooth = 1 - heard["with_underruns"] / max(requests, 1)
    holds = heard["ttfa_ms"]["p95"] <= limits.ttfa_ms and smooth >= CONTINUITY and not heard["failed"]
    return {**facts, "smooth": smooth, "holds": holds}  # by chance nobody came: TTFA is NaN, and that holds nothing


def _orders(subject: Subject, seed: int) -> Any:
    """Texts without a voice, of 2 to 6 seconds."""

    def one(number: int) -> Any:
        dice = torch.Generator().manual_seed(seed * 1_000_003 + number)
        low, high = (round(second / subject.frame_seconds) for second in SECONDS)
        frames = int(torch.randint(low, high + 1, (1,), generator=dice))
        return subject.prompt(seed * 1_000_003 + number), subject.params(frames, seed=number)

    return one

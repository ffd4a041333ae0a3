"""Callers of an engine: some that speak one after another (closed loop), or many that come when they come (open loop).

Every request becomes a Timeline. Times are of ``time.perf_counter``; the only thread besides the engine's is the
caller's own.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from torch import Tensor

from csm_core.bench.timeline import Timeline
from csm_core.engine.engine import Engine
from csm_core.engine.request import Chunk, End, Event, Request, SamplingParams
from csm_core.errors import EngineBusyError

Order = Callable[[int], tuple[Tensor, SamplingParams]]  # number of a request -> what it asks for


def submit(
    engine: Engine, order: tuple[Tensor, SamplingParams], done: SimpleQueue[Timeline]
) -> tuple[Request, Timeline]:
    """Send one request; its timeline goes to ``done`` at its end, at once when the engine refuses it."""
    timeline = Timeline(time.perf_counter())

    def emit(event: Event) -> None:
        if isinstance(event, Chunk):
            timeline.arrivals.append((time.perf_counter(), len(event.codes)))
            return
        timeline.ended = time.perf_counter()
        timeline.outcome = event.reason if isinstance(event, End) else type(event.error).__name__
        done.put(timeline)

    request = Request(order[0], order[1], emit)
    try:
        engine.submit(request)
    except EngineBusyError as error:
        timeline.ended, timeline.outcome = timeline.submitted, type(error).__name__
        done.put(timeline)
    return request, timeline


def closed_loop(engine: Engine, order: Order, callers: int, each: int = 1) -> list[Timeline]:
    """``callers`` at once, each sending its next request when its last one ended, ``each`` times."""
    done: SimpleQueue[Timeline] = SimpleQueue()
    total, finished = callers * each, []
    for number in range(callers):
        submit(engine, order(number), done)
    for number in range(callers, total + callers):
        finished.append(done.get())
        if number < total:
            submit(engine, order(number), done)
    return finished


@dataclass(frozen=True)
class Load:
    """Arrivals of an open loop: Poisson at ``rate`` a second; those of ``window`` seconds count, after ``lead_in``."""

    rate: float
    lead_in: float
    window: float
    patience: float  # seconds after the window in which those that count may end; what has not is cancelled and failed
    seed: int = 0

    def times(self) -> list[float]:
        """Seconds of all arrivals; they go on through ``patience``, so that the last ones that count are not alone."""
        dice = random.Random(self.seed)  # noqa: S311 -- arrivals, not secrets
        times, now = [], dice.expovariate(self.rate)
        while now < self.lead_in + self.window + self.patience:
            times.append(now)
            now += dice.expovariate(self.rate)
        return times


def open_loop(engine: Engine, order: Order, load: Load) -> list[Timeline]:
    """Send requests when they are due, however busy the engine is; the timelines of those that count.

    A request's time starts when it was due: that a busy sender was late is part of what its caller lives through.
    """
    done: SimpleQueue[Timeline] = SimpleQueue()
    counted: list[Timeline] = []
    requests: list[Request] = []
    waiting: set[int] = set()
    start = time.perf_counter()
    end_of_window = load.lead_in + load.window
    for number, due in enumerate(load.times()):
        _listen(done, waiting, start + due)
        if due >= end_of_window and not waiting:
            break
        request, timeline = submit(engine, order(number), done)
        timeline.submitted = start + due
        requests.append(request)
        if load.lead_in <= due < end_of_window:
            counted.append(timeline)
            if timeline.ended is None:
                waiting.add(id(timeline))
    _listen(done, waiting, start + end_of_window + load.patience, until_done=True)
    _stop(requests, counted, done)
    return counted


def _listen(done: SimpleQueue[Timeline], waiting: set[int], until: float, until_done: bool = False) -> None:
    """Take in ends until a moment comes, or, if so asked, nobody is waited for."""
    while not (until_done and not waiting):
        rest = until - time.perf_counter()
        try:  # a sender that is late still takes in what has ended
            ended = done.get(timeout=rest) if rest > 0 else done.get_nowait()
        except Empty:
            return
        waiting.discard(id(ended))


def _stop(requests: Sequence[Request], counted: Sequence[Timeline], done: SimpleQueue[Timeline]) -> None:
    """Cancel what still runs, and wait until the engine has dropped what counts."""
    for request in requests:
        request.cancelled = True
    while any(timeline.ended is None for timeline in counted):
        done.get()

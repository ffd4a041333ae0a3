"""What ``csm bench`` measures, section by section, within a budget of seconds. Each section is a function.

A section gets the seconds it may take and does as much as fits; what does not fit at all is named, with the reason.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from csm_core.bench import machine
from csm_core.bench.floor import frame_bytes
from csm_core.bench.parts import part_times
from csm_core.bench.peers import Peer, race
from csm_core.bench.streams import Limits, find_streams
from csm_core.bench.subject import TEXT_TOKENS, Subject
from csm_core.bench.timeline import percentiles, step_seconds, summary
from csm_core.bench.trace import trace
from csm_core.bench.traffic import closed_loop
from csm_core.bench.voices import speak_texts
from csm_core.engine.engine import Engine
from csm_core.engine.memory import Shapes, plan

Say = Callable[[str], None]
FRAMES = (16, 125)  # of a speech in the batch section: least and most, 1.3 and 10 seconds
REPEATS = (3, 100)  # of a TTFA, least and most


class Skipped(Exception):  # noqa: N818 -- an answer of a section, not an error
    """A section that cannot be measured here, and why."""


@dataclass(frozen=True)
class Plan:
    """What to measure. ``ttfa_ms``: the first sound that callers still accept at the 95th percentile."""

    budget: float = 480.0
    ttfa_ms: float = 300.0
    voice_seconds: float = 20.0
    seed: int = 0
    only: tuple[str, ...] = ()


@dataclass(eq=False)
class Bench:
    """One run: the subject, what is known so far, and the engine that the sections share."""

    subject: Subject
    plan: Plan
    peers: Mapping[str, Peer] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    engine: Engine | None = None
    engine_bytes: int = 0
    _prompts: int = 0

    @property
    def shared(self) -> Engine:
        assert self.engine is not None
        return self.engine

    def order(self, frames: int, voice_frames: int = 0, voice: int = 0) -> Any:
        """Requests for texts that no engine has heard yet."""
        self._prompts += 1
        number = 1_000 * self._prompts

        def one(index: int) -> Any:
            prompt = self.subject.prompt(number + index, voice_frames, voice)
            return prompt, self.subject.params(frames, seed=number + index)

        return one

    def step(self, callers: int = 1, frames: int = 16) -> float:
        """Seconds per frame of some callers at once, in a short run of their own."""
        return step_seconds(closed_loop(self.shared, self.order(frames), callers))


# --- sections --------------------------------------------------------------------------------------------------------


def floor(bench: Bench, _seconds: float) -> dict[str, Any]:
    """Bytes of a frame, the memory's bandwidth, and the time that follows."""
    rate = machine.bandwidth(bench.subject.codec.device)
    parts = frame_bytes(bench.subject.model.config, bench.subject.precision, 1, TEXT_TOKENS)
    total = sum(parts.values())
    return {"bandwidth": rate, "bytes_per_frame": parts, "total_bytes": total, "ms": 1000 * total / rate}


def batch(bench: Bench, seconds: float) -> dict[str, Any]:
    """ms per frame and RTF at 1, 2, 4 ... callers, who all start at once and speak equally long."""
    started, slots = time.monotonic(), bench.subject.settings.engine.slots
    sizes = sorted({1, *(2**i for i in range(1, slots.bit_length()) if 2**i <= slots), slots})
    step = bench.step(frames=FRAMES[0])
    frames = int(min(max(seconds / len(sizes) / (2 * step), FRAMES[0]), FRAMES[1]))
    rows: list[dict[str, Any]] = []
    for callers in sizes:
        left = seconds - (time.monotonic() - started)
        if rows and 1.6 * step * frames > left:
            rows.append({"callers": callers, "skipped": f"needs about {1.6 * step * frames:.0f} s, {left:.0f} s left"})
            continue
        closed_loop(bench.shared, bench.order(3), callers)  # the first time of a batch may allocate
        timelines = closed_loop(bench.shared, bench.order(frames), callers)
        step = step_seconds(timelines)
        rows.append(_batch_row(bench, callers, step, summary(timelines, bench.subject.frame_seconds)))
    return {"frames": frames, "rows": rows}


def _batch_row(bench: Bench, callers: int, step: float, heard: dict[str, Any]) -> dict[str, Any]:
    row = {
        "callers": callers,
        "ms_per_frame": 1000 * step,
        "frames_per_second": callers / step,
        "times_real_time": callers / step * bench.subject.frame_seconds,
        **{key: heard[key] for key in ("rtf", "ttfa_ms", "with_underruns", "failed")},
    }
    if rate := bench.results.get("floor", {}).get("bandwidth"):
        sizes = frame_bytes(bench.subject.model.config, bench.subject.precision, callers, TEXT_TOKENS)
        row["floor_ms"] = 1000 * sum(sizes.values()) / rate
        row["times_floor"] = row["ms_per_frame"] / row["floor_ms"]
    return row


def ttfa(bench: Bench, seconds: float) -> dict[str, Any]:
    """Request to first chunk for a lone caller: without a voice, with a new one, with one that was heard before."""
    subject, config = bench.subject, bench.subject.settings.engine
    frames = config.chunk_schedule[0]
    room = subject.model.config.max_seq_len - 2 * TEXT_TOKENS - frames - 1
    voice_frames = int(min(bench.plan.voice_seconds / subject.frame_seconds, room))
    found: dict[str, Any] = {"voice_seconds": voice_frames * subject.frame_seconds, "first_frames": frames}
    voices: dict[str, Callable[[int], tuple[int, int]]] = {
        "no_voice": lambda _: (0, 0),
        "new_voice": lambda number: (voice_frames, 1 + number),
        "known_voice": lambda _: (voice_frames, 0),
    }
    if not config.prefix_cache_bytes:
        del voices["known_voice"]
        found["known_voice_skipped"] = "the prefix cache is off"
    for name, voice_of in voices.items():
        until = time.monotonic() + seconds / len(voices)
        times: list[float] = []
        number = -1  # one that warms up, and fills the cache
        while number < REPEATS[0] or (number < REPEATS[1] and time.monotonic() < until):
            (timeline,) = closed_loop(bench.shared, bench.order(frames, *voice_of(number + 1)), 1)
            if number >= 0:
                times.append(timeline.ttfa)
            number += 1
        found[name] = percentiles(times, 0.001)
    return found


def streams(bench: Bench, seconds: float) -> dict[str, Any]:
    """How many listeners at once the device carries, found with Poisson arrivals at rising rates."""
    rows = [row for row in bench.results.get("batch", {}).get("rows", []) if "skipped" not in row]
    slots, real_time = bench.subject.settings.engine.slots, bench.subject.frame_seconds
    speed = max((row["times_real_time"] for row in rows), default=0.0) or slots / bench.step(slots) * real_time
    if speed < 1:
        return {"streams": 0, "why": f"all callers together get {speed:.2f} s of speech a second", "stages": []}
    return find_streams(bench.shared, bench.subject, speed, seconds, Limits(bench.plan.ttfa_ms, bench.plan.seed))


def launches(bench: Bench, seconds: float) -> dict[str, Any]:
    """Operations, launches and waits per frame of a lone caller."""
    rows = bench.results.get("batch", {}).get("rows")
    step = rows[0]["ms_per_frame"] / 1000 if rows else bench.step()
    if (needed := 20 * step + 5) > max(2 * seconds, 15):  # the profiler's own work included
        raise Skipped(f"needs about {needed:.0f} s, {seconds:.0f} s are its share")
    return trace(bench.shared, bench.subject)


def parts(bench: Bench, seconds: float) -> dict[str, Any]:
    """Where the time of a frame goes, alone and with all slots taken."""
    rows = {row["callers"]: row for row in bench.results.get("batch", {}).get("rows", []) if "skipped" not in row}
    if not rows:
        raise Skipped("needs the section batch")
    found = []
    for callers in sorted({min(rows), max(rows)}):
        frame = rows[callers]["ms_per_frame"]
        repeats = int(min(max(seconds * 1000 / 8 / frame, 2), 20))
        times = part_times(bench.subject, callers, TEXT_TOKENS, repeats)
        found.append({"callers": callers, "frame_ms": frame, **times, "rest": frame - sum(times.values())})
    return {"rows": found}


def speech(bench: Bench, seconds: float) -> dict[str, Any]:
    """The whole way, as a program has it: sentences through Generator.stream, alone and eight at once."""
    if bench.subject.tokenizer is None:
        raise Skipped("random weights have nothing to say")
    return speak_texts(bench.subject, min(8, bench.subject.settings.engine.slots), seconds)


def peers(bench: Bench, seconds: float) -> dict[str, Any]:
    """Other implementations, in turns with this one."""
    if not bench.peers:
        raise Skipped("no --peer was asked for")
    return race(bench.subject, bench.peers, seconds)


def memory(bench: Bench, _seconds: float) -> dict[str, Any]:
    """The plan of what is allocated, what this process holds, and the most it has held. Bytes."""
    subject = bench.subject
    shapes = Shapes(subject.model.config, subject.codec.config, subject.codec_bytes)
    planned = plan(shapes, subject.settings.engine, subject.precision)
    held = machine.memory(subject.codec.device)
    return {"planned": asdict(planned), "engine": bench.engine_bytes, **held}


Section = Callable[[Bench, float], dict[str, Any]]
# With their weights in the budget. The first ones share an engine, which is closed before the last ones run.
ENGINE_SECTIONS: Mapping[str, tuple[Section, float]] = {
    "floor": (floor, 1),
    "batch": (batch, 6),
    "ttfa": (ttfa, 4),
    "launches": (launches, 2),
    "streams": (streams, 10),
    "memory": (memory, 0.1),
}
OTHER_SECTIONS: Mapping[str, tuple[Section, float]] = {"parts": (parts, 2), "speech": (speech, 4), "peers": (peers, 6)}
NAMES = (*ENGINE_SECTIONS, *OTHER_SECTIONS)


# --- the run ---------------------------------------------------------------------------------------------------------


def run(bench: Bench, say: Say) -> dict[str, Any]:
    """Measure everything that was asked for; what was not measured is under ``skipped``, with the reason."""
    started = time.monotonic()
    wanted = [name for name in NAMES if not bench.plan.only or name in bench.plan.only]
    weights = {name: (ENGINE_SECTIONS | OTHER_SECTIONS)[name][1] for name in wanted}  # type: ignore[operator]
    skipped: list[dict[str, str]] = []

    def measure(name: str, section: Section) -> None:
        left = bench.plan.budget - (time.monotonic() - started)
        share = left * weights[name] / sum(weights[later] for later in wanted[wanted.index(name) :])
        if left <= 0:
            skipped.append({"section": name, "reason": f"the budget of {bench.plan.budget:.0f} s is used up"})
            return
        say(name)
        try:
            bench.results[name] = section(bench, share)
        except Skipped as reason:
            skipped.append({"section": name, "reason": str(reason)})

    with _engine(bench):
        for name, (section, _) in ENGINE_SECTIONS.items():
            if name in wanted:
                measure(name, section)
    for name, (section, _) in OTHER_SECTIONS.items():
        if name in wanted:
            measure(name, section)
    return {**bench.results, "skipped": skipped, "seconds": time.monotonic() - started}


@contextmanager
def _engine(bench: Bench) -> Iterator[None]:
    before = machine.memory(bench.subject.codec.device)
    with bench.subject.engine() as engine:
        after = machine.memory(bench.subject.codec.device)
        key = "device" if "device" in after else "rss"
        bench.engine_bytes = after[key] - before[key]
        bench.engine = engine
        closed_loop(engine, bench.order(3), 1)
        yield
        bench.engine = None


def finite(value: Any) -> Any:
    """The same, with None for numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, torch.dtype) else value

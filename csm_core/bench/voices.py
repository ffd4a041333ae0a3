"""Whole sentences through ``Generator.stream``: the time that a program sees, with text, silence gate and threads."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from typing import Any

from csm_core.bench.subject import Subject
from csm_core.bench.timeline import Timeline, summary
from csm_core.generator import Generator

SENTENCES = (
    "The train leaves at half past seven.",
    "Good morning. The kettle is on.",
    "Did you close the window before the rain came?",
    "It will not be long now.",
    "Then we can leave it as it is.",
)


def speak_texts(subject: Subject, callers: int, seconds: float) -> dict[str, Any]:
    """One caller sentence after sentence, then ``callers`` of them at once. Raises what ``Generator.stream`` raises."""
    assert subject.tokenizer is not None
    found: dict[str, Any] = {}
    with Generator(subject.model, subject.codec, subject.tokenizer, subject.profile, subject.settings) as generator:
        started = time.monotonic()
        speak(generator, SENTENCES[:1])
        took = time.monotonic() - started
        each = int(min(max(seconds / 3 / took, 2), 4 * len(SENTENCES)))
        for count in sorted({1, callers}):
            if count > 1 and (needed := 2 * count * took) > 2 * seconds:  # as if nothing were gained by a batch
                found[f"callers_{count}"] = {"skipped": f"may need {needed:.0f} s, {seconds:.0f} s are its share"}
                continue
            texts = list(islice(cycle(SENTENCES), each if count == 1 else max(2, each // 4)))
            with ThreadPoolExecutor(count) as pool:
                spoken = list(pool.map(lambda _, t=texts: speak(generator, t), range(count)))
            found[f"callers_{count}"] = summary([line for lines in spoken for line in lines], subject.frame_seconds)
    return found


def speak(generator: Generator, texts: Sequence[str]) -> list[Timeline]:
    """One sentence after another; a chunk's frames may be parts of frames, for the edges are cut."""
    lines = []
    for seed, text in enumerate(texts):
        line = Timeline(time.perf_counter())
        with generator.stream(text, seed=seed) as stream:
            for chunk in stream:
                line.arrivals.append((time.perf_counter(), chunk.numel() / generator.codec.frame_size))
            line.outcome = stream.finish_reason or ""
        line.ended = time.perf_counter()
        lines.append(line)
    return lines

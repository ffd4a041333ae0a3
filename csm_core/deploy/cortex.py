"""Between Cerebrium's default runtime and the generator: a call in, plain dicts or server-sent events out.

Nothing raises for what a caller did: a dict with ``status_code`` sets the HTTP status and says what to do (call.py
lists the statuses). Knows no HTTP.
"""

import time
from collections.abc import Iterator
from typing import Any

from csm_core.audio import encode_wav, pcm16_bytes
from csm_core.call import (
    RETRY_AFTER_SECONDS,
    Call,
    about_speech,
    event,
    not_implemented,
    refusal,
    sound_event,
    speech_result,
)
from csm_core.errors import CsmError
from csm_core.generator import Generator

__all__ = ["RETRY_AFTER_SECONDS", "Call", "generate_audio", "health", "not_implemented", "refusal", "stream_audio"]

DEADLINE_SECONDS = 570.0  # an answer of our own before the platform cuts the call off (response_grace_period = 600)


def generate_audio(generator: Generator, call: Call) -> dict[str, Any]:
    """One complete speech as base64 WAV, or a refusal."""
    try:
        speech = generator.speak(**call.arguments(generator.sample_rate, DEADLINE_SECONDS))
    except CsmError as error:
        return refusal(error)
    about = about_speech(speech, generator.model_name, speech.processing_time_seconds)
    wav = encode_wav(speech.audio, speech.sample_rate)
    return speech_result(wav, speech.duration_seconds, {"sample_rate": speech.sample_rate, **about})


def stream_audio(generator: Generator, call: Call) -> dict[str, Any] | Iterator[str]:
    """Server-sent events with base64 PCM, or a refusal if there is nothing to send.

    Returns an iterator rather than being one, so that bad input, silence and a full queue still have a status.
    """
    events = _events(generator, call)
    try:
        next(events)  # runs to the first sound; from there, closing the iterator stops the engine's work
    except CsmError as error:
        return refusal(error)
    return events


def _events(generator: Generator, call: Call) -> Iterator[str]:
    started, samples = time.monotonic(), 0
    with generator.stream(**call.arguments(generator.sample_rate, DEADLINE_SECONDS)) as stream:
        chunk = next(stream, None)
        yield ""
        try:
            while chunk is not None:
                if chunk.numel():
                    samples += chunk.numel()
                    yield sound_event(pcm16_bytes(chunk), generator.sample_rate)
                chunk = next(stream, None)
        except CsmError as error:
            yield event(**refusal(error), done=True)
            return
        about = about_speech(stream, generator.model_name, time.monotonic() - started)
        yield event(duration_seconds=round(samples / generator.sample_rate, 3), **about, done=True)


def health(generator: Generator) -> dict[str, Any]:
    """What runs here. 503 once the engine has broken down: such a replica only fails calls."""
    about = {"model": generator.model_name, "sample_rate": generator.sample_rate, "device": generator.device}
    if not generator.alive:
        return {"status": "failed", **about, "status_code": 503}
    return {"status": "ok", **about}

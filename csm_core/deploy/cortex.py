"""Between the JSON of Cerebrium's default runtime and the generator: checks on the way in, plain dicts on the way out.

Nothing raises for what a caller did: a dict with ``status_code`` sets the HTTP status and says what to do. Statuses:
422 input that the caller can mend; 501 not built; 502 only silence came out (it was already retried: not worth
repeating unchanged); 503 no room, with ``retry_after`` in seconds; 504 too slow; 500 the engine failed. Knows no HTTP.
"""

import base64
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from csm_core.audio import decode_base64_audio, pcm16_bytes, wav_base64
from csm_core.errors import (
    CsmError,
    EngineBusyError,
    InvalidInputError,
    RequestTimeoutError,
    SilentOutputError,
)
from csm_core.generator import Generator
from csm_core.prompt import Segment

DEADLINE_SECONDS = 570.0  # an answer of our own before the platform cuts the call off (response_grace_period = 600)
MAX_SEGMENTS = 64  # no window holds more; bounds how much audio is decoded before the budget is known
RETRY_AFTER_SECONDS = 2  # about one sentence

STATUS: dict[type[CsmError], int] = {
    InvalidInputError: 422,
    SilentOutputError: 502,
    EngineBusyError: 503,
    RequestTimeoutError: 504,
}


@dataclass(frozen=True)
class Call:
    """What one call asks for, as JSON brings it: unchecked. None always means the default, also where 0 is meant."""

    text: Any = None
    speaker: Any = None
    max_audio_length_ms: Any = None
    temperature: Any = None
    topk: Any = None
    context: Any = None
    voice: Any = None
    seed: Any = None

    def arguments(self, sample_rate: int) -> dict[str, Any]:
        """Keyword arguments for the generator, which checks the rest. Raises InvalidInputError."""
        if self.text is None:
            raise InvalidInputError("text is missing: send the words to speak.", "text")
        return {
            "text": self.text,
            "speaker": 0 if self.speaker is None else self.speaker,
            "context": read_context(self.context, sample_rate),
            "max_audio_length_ms": self.max_audio_length_ms,
            "temperature": self.temperature,
            "topk": self.topk,
            "seed": self.seed,
            "voice": self.voice,
            "timeout": DEADLINE_SECONDS,
        }


def read_context(context: Any, sample_rate: int) -> list[Segment]:
    """``[{"text", "speaker", "audio": base64}]``, oldest first. Raises InvalidInputError that names the item."""
    if context is None:
        return []
    if not isinstance(context, list) or not all(isinstance(item, dict) for item in context):
        raise InvalidInputError('context must be a list of {"text", "speaker", "audio"}, oldest first.', "context")
    if len(context) > MAX_SEGMENTS:
        raise InvalidInputError(f"context has {len(context)} turns; send the last {MAX_SEGMENTS} at most.", "context")
    return [_read_segment(item, f"context[{index}]", sample_rate) for index, item in enumerate(context)]


def _read_segment(item: dict[str, Any], where: str, sample_rate: int) -> Segment:
    if unknown := [key for key in item if key not in ("text", "speaker", "audio")]:
        raise InvalidInputError(f"{unknown[0][:40]!a} is unknown here; a turn has text, speaker and audio.", where)
    for name in ("text", "audio"):
        if not isinstance(item.get(name), str):
            raise InvalidInputError(f"A turn needs {name}, as a string.", f"{where}.{name}")
    try:
        return Segment(item.get("speaker", 0), item["text"], decode_base64_audio(item["audio"], sample_rate))
    except InvalidInputError as error:
        error.param = f"{where}.{error.param}"
        raise


def generate_audio(generator: Generator, call: Call) -> dict[str, Any]:
    """One complete speech as base64 WAV, or a refusal."""
    try:
        speech = generator.speak(**call.arguments(generator.sample_rate))
    except CsmError as error:
        return refusal(error)
    return {
        "audio_data": wav_base64(speech.audio, speech.sample_rate),
        "format": "wav",
        "encoding": "base64",
        "duration_seconds": round(speech.duration_seconds, 3),
        "processing_time_seconds": round(speech.processing_time_seconds, 3),
        "sample_rate": speech.sample_rate,
        "model": generator.model_name,
        "seed": speech.seed,
        "finish_reason": speech.finish_reason,
        "takes": len(speech.takes),
    }


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
    with generator.stream(**call.arguments(generator.sample_rate)) as stream:
        chunk = next(stream, None)
        yield ""
        try:
            while chunk is not None:
                if chunk.numel():
                    audio = base64.b64encode(pcm16_bytes(chunk)).decode("ascii")
                    samples += chunk.numel()
                    yield _event(audio=audio, encoding="pcm_s16le", sample_rate=generator.sample_rate, done=False)
                chunk = next(stream, None)
        except CsmError as error:
            yield _event(**refusal(error), done=True)
            return
        yield _event(
            duration_seconds=round(samples / generator.sample_rate, 3),
            processing_time_seconds=round(time.monotonic() - started, 3),
            model=generator.model_name,
            seed=stream.seed,
            finish_reason=stream.finish_reason,
            takes=len(stream.takes),
            done=True,
        )


def _event(**fields: Any) -> str:
    return f"data: {json.dumps(fields, allow_nan=False)}\n\n"


def health(generator: Generator) -> dict[str, Any]:
    """What runs here. 503 once the engine has broken down: such a replica only fails calls."""
    about = {"model": generator.model_name, "sample_rate": generator.sample_rate, "device": generator.device}
    if not generator.alive:
        return {"status": "failed", **about, "status_code": 503}
    return {"status": "ok", **about}


def refusal(error: CsmError) -> dict[str, Any]:
    """What a caller gets instead of speech."""
    status = next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)
    details: dict[str, Any] = {"code": error.code, "message": str(error), "param": getattr(error, "param", None)}
    if status == 503:
        details["retry_after"] = RETRY_AFTER_SECONDS
    return {"status_code": status, "error": details}


def not_implemented(message: str) -> dict[str, Any]:
    """The answer of a function that the contract has and this version has not."""
    return {"status_code": 501, "error": {"code": "not_implemented", "message": message, "param": None}}

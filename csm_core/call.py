"""One call as JSON brings it: unchecked fields -> the generator's arguments; speech, or a refusal -> plain dicts.

Shared by main.py on a platform and by the server. Statuses of a refusal: 422 input that the caller can mend; 501 not
built; 502 only silence came out (it was already retried: not worth repeating unchanged); 503 no room, with
``retry_after`` in seconds; 504 too slow; 500 the engine failed. Knows no HTTP and no platform.
"""

import base64
import json
from dataclasses import dataclass
from typing import Any

from csm_core.audio import decode_base64_audio
from csm_core.errors import (
    AudioDecodeError,
    CsmError,
    EngineBusyError,
    InvalidInputError,
    RequestTimeoutError,
    SilentOutputError,
)
from csm_core.prompt import Segment
from csm_core.takes import Speech, SpeechStream
from csm_core.voices import Voice

MAX_SEGMENTS = 64  # no window holds more; bounds how much audio is decoded before the budget is known
MAX_CONTEXT_SECONDS = 600.0  # of all turns together, 58 MB of samples: CSM-1B's window holds 164 s
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
    voice_prompt: Any = None  # base64 audio of somebody who is to speak, instead of a voice that is known here
    voice_prompt_text: Any = None  # what is said in it

    def arguments(self, sample_rate: int, timeout: float) -> dict[str, Any]:
        """Keyword arguments for the generator, which checks the rest; decodes the context, so it takes its time.

        Raises InvalidInputError.
        """
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
            "voice": self.voice if self.voice_prompt is None else self._prompted_voice(sample_rate),
            "timeout": timeout,
        }

    def _prompted_voice(self, sample_rate: int) -> Voice:
        if self.voice is not None:
            raise InvalidInputError("Send voice or voice_prompt, not both.", "voice")
        if not isinstance(self.voice_prompt_text, str):
            raise InvalidInputError("voice_prompt needs voice_prompt_text: its words, exactly.", "voice_prompt_text")
        turn = {"audio": self.voice_prompt, "text": self.voice_prompt_text, "speaker": self.speaker or 0}
        return Voice("voice_prompt", (_read_segment(turn, "voice_prompt", sample_rate),))


def read_context(context: Any, sample_rate: int) -> list[Segment]:
    """``[{"text", "speaker", "audio": base64}]``, oldest first. Raises InvalidInputError that names the item."""
    if context is None:
        return []
    if not isinstance(context, list) or not all(isinstance(item, dict) for item in context):
        raise InvalidInputError('context must be a list of {"text", "speaker", "audio"}, oldest first.', "context")
    if len(context) > MAX_SEGMENTS:
        raise InvalidInputError(f"context has {len(context)} turns; send the last {MAX_SEGMENTS} at most.", "context")
    segments: list[Segment] = []
    seconds = 0.0
    for index, item in enumerate(context):
        segments.append(_read_segment(item, f"context[{index}]", sample_rate))
        seconds += segments[-1].audio.numel() / sample_rate
        if seconds > MAX_CONTEXT_SECONDS:
            raise AudioDecodeError(
                f"The turns of context last more than {MAX_CONTEXT_SECONDS:.0f} s together: send the last ones only.",
                "context",
            )
    return segments


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


def speech_result(wav: bytes, seconds: float, about: dict[str, Any]) -> dict[str, Any]:
    """The answer with a complete speech: its WAV file as base64, how long it is, and ``about`` it."""
    return {
        "audio_data": base64.b64encode(wav).decode("ascii"),
        "format": "wav",
        "encoding": "base64",
        "duration_seconds": round(seconds, 3),
        **about,
    }


def about_speech(speech: Speech | SpeechStream, model: str, took: float) -> dict[str, Any]:
    """What an answer says of a speech that is complete, besides its sound. ``took`` in seconds."""
    return {
        "processing_time_seconds": round(took, 3),
        "model": model,
        "seed": speech.seed,
        "finish_reason": speech.finish_reason,
        "takes": len(speech.takes),
    }


def sound_event(pcm: bytes, sample_rate: int) -> str:
    """A server-sent event with the next piece of sound, 16-bit PCM."""
    audio = base64.b64encode(pcm).decode("ascii")
    return event(audio=audio, encoding="pcm_s16le", sample_rate=sample_rate, done=False)


def event(**fields: Any) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(fields, allow_nan=False)}\n\n"


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

"""OpenAI's routes: speech, models and voices, as its clients and their imitators use them.

Decided here: WAV is streamed like every format, with open sizes as OpenAI's is, because clients that ask for it
(wyoming_openai) play it while it comes; ``"stream": false`` buffers any format, and then the sizes are true.
"""

import re
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from csm_core.audio.formats import FORMATS
from csm_core.call import Call
from csm_core.errors import InvalidInputError
from csm_core.server.answers import SSE, StreamedSpeech, openai_events, plain, while_connected, whole
from csm_core.server.desk import Desk
from csm_core.server.refusals import RefusedError, check_length, json_response
from csm_core.server.schemas import SpeechBody, body_schema, read_body
from csm_core.server.speaking import Order
from csm_core.voices import is_installed, list_voices

# OpenAI's names, each as the speaker who sounds more like it: of the bundled voice 0 is low, 1 is higher. Clients
# (Pipecat) refuse every other name themselves, so these always work; a voice that is installed under one goes first.
ALIASES = {
    "alloy": 1, "ash": 0, "ballad": 0, "coral": 1, "echo": 0, "fable": 0, "onyx": 0, "nova": 1, "sage": 1,
    "shimmer": 1, "verse": 0, "marin": 1, "cedar": 0,
}  # fmt: skip
MODELS = ("tts-1", "tts-1-hd", "gpt-4o-mini-tts", "gpt-4o-mini-tts-2025-12-15", "csm-1b")
_SPEAKER = re.compile(r"[0-9]{1,2}")

router = APIRouter(prefix="/v1")


@router.post("/audio/speech", openapi_extra=body_schema(SpeechBody))
async def speech(request: Request) -> Response:
    """Speak a text."""
    desk: Desk = request.state.desk
    body = await read_body(request, SpeechBody)
    _check(body, desk)
    order = Order(
        call=body.call(),
        format=body.response_format or "mp3",
        speed=body.speed or 1.0,
        whole=body.stream is False and body.stream_format != "sse",
        find_voice=partial(_find_voice, voices_dir=desk.settings.voices),
    )
    spoken = desk.speak(order, request.state.caller)
    media_type = FORMATS[order.format]
    if body.stream_format == "sse":
        events = openai_events(len(body.input), desk.ready().codec.config.frame_rate * order.speed)
        return StreamedSpeech(spoken, events, SSE, desk.settings.write_timeout)
    if not order.whole:
        return StreamedSpeech(spoken, plain, media_type, desk.settings.write_timeout)
    done, data = await while_connected(request.receive, whole(spoken))
    return Response(data, headers={"x-audio-seconds": f"{done.seconds:.3f}"}, media_type=media_type)


def _check(body: SpeechBody, desk: Desk) -> None:
    generator = desk.ready()
    known = _models(generator.model_name)
    if body.model not in known:
        message = f"There is no model {body.model[:80]!a} here; there are: {', '.join(known)}."
        raise RefusedError(404, "model_not_found", message, "model")
    check_length(body.input, desk.settings.max_text, "input", 400)


def _find_voice(call: Call, voices_dir: Path | None) -> Call:
    """The call with its voice as the generator knows it. Reads the disk. Raises InvalidInputError."""
    if is_installed(call.voice, voices_dir):
        return call
    if call.voice in ALIASES:
        speaker = ALIASES[call.voice]
    elif _SPEAKER.fullmatch(call.voice):
        speaker = int(call.voice)
    else:
        names = ", ".join([*list_voices(voices_dir), *ALIASES])
        message = f"There is no voice {call.voice[:64]!a}; there are: {names}, or the number of a speaker."
        raise InvalidInputError(message, "voice")
    return replace(call, voice=None, speaker=speaker if call.speaker is None else call.speaker)


@router.get("/models")
async def models(request: Request) -> Response:
    """What may be sent as ``model``."""
    names = _models(request.state.desk.ready().model_name)
    return json_response({"object": "list", "data": [_model(name) for name in names]})


@router.get("/models/{model:path}")
async def model(request: Request, model: str) -> Response:
    """One of them."""
    if model not in _models(request.state.desk.ready().model_name):
        raise RefusedError(404, "model_not_found", f"There is no model {model[:80]!a} here.", "model")
    return json_response(_model(model))


@router.get("/audio/models")
async def audio_models(request: Request) -> Response:
    """The same for Open WebUI."""
    return json_response({"models": [{"id": name} for name in _models(request.state.desk.ready().model_name)]})


@router.get("/audio/voices")
async def voices(request: Request) -> Response:
    """What may be sent as ``voice``: for Open WebUI under ``voices``, in OpenAI's list form under ``data``."""
    installed = await run_in_threadpool(list_voices, request.state.desk.settings.voices)
    listed = [{"id": name, "name": name} for name in dict.fromkeys([*installed, *ALIASES])]
    data = [{"object": "audio.voice", **voice} for voice in listed]
    return json_response({"voices": listed, "object": "list", "data": data})


def _models(own: str) -> list[str]:
    return list(dict.fromkeys([own, *MODELS]))


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": _STARTED, "owned_by": "csm"}


_STARTED = int(time.time())

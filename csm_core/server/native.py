"""The seeds' routes: one call in JSON, one answer in JSON, plain or in Cerebrium's envelope.

The bodies are those of main.py's functions, so a client that calls a deployment calls this server unchanged.
"""

import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from csm_core.call import Call, speech_result
from csm_core.errors import CsmError
from csm_core.server.answers import SSE, StreamedSpeech, native_events, while_connected, whole
from csm_core.server.desk import Desk
from csm_core.server.refusals import RefusedError, check_length, json_response, refused
from csm_core.server.schemas import CallBody, GenerateBody, body_schema, read_body
from csm_core.server.speaking import Order

ENVELOPED = "/v4/{project}/{app}"

router = APIRouter()


@router.post("/generate", openapi_extra=body_schema(GenerateBody))
async def generate(request: Request) -> Response:
    """Speak a text, with the voice of a sample if one is sent."""
    body = await read_body(request, GenerateBody)
    return json_response(await _speech(request, body.call()))


@router.post("/generate_audio", openapi_extra=body_schema(CallBody))
@router.post(ENVELOPED + "/generate_audio", openapi_extra=body_schema(CallBody))
async def generate_audio(request: Request) -> Response:
    """Speak a text; answers in Cerebrium's envelope, also what it refuses."""
    started = time.monotonic()
    result: dict[str, Any]
    status, headers = 200, {}
    try:
        body = await read_body(request, CallBody)
        result = await _speech(request, body.call())
    except (CsmError, RefusedError) as error:
        known = error if isinstance(error, RefusedError) else refused(error, openai=False)
        status, headers = known.status, known.headers
        result = {"status_code": status, "error": known.error}
    took = round((time.monotonic() - started) * 1000, 2)
    envelope = {"run_id": request.state.request_id, "result": result, "run_time_ms": took}
    return json_response(envelope, status, headers)


@router.post("/stream_audio", openapi_extra=body_schema(CallBody))
@router.post(ENVELOPED + "/stream_audio", openapi_extra=body_schema(CallBody))
async def stream_audio(request: Request) -> Response:
    """Speak a text in server-sent events while it is made."""
    desk: Desk = request.state.desk
    body = await read_body(request, CallBody)
    _check(body.call(), desk)
    spoken = desk.speak(Order(body.call(), "pcm"), request.state.caller)
    return StreamedSpeech(spoken, native_events, SSE, desk.settings.write_timeout)


async def _speech(request: Request, call: Call) -> dict[str, Any]:
    desk: Desk = request.state.desk
    _check(call, desk)
    spoken = whole(desk.speak(Order(call, "wav", whole=True), request.state.caller))
    speech, wav = await while_connected(request.receive, spoken)
    return speech_result(wav, speech.seconds, {"sample_rate": speech.sample_rate, **speech.about()})


def _check(call: Call, desk: Desk) -> None:
    if isinstance(call.text, str):
        check_length(call.text, desk.settings.max_text, "text", 422)

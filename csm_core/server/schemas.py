"""The bodies that routes take, checked by pydantic from the bytes themselves.

Its JSON parser is the only one here: it refuses lone surrogates, more than 200 levels and numbers of thousands of
digits. Fields that are Any are checked by the generator, which says what is wrong in the same way everywhere.
"""

from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema
from starlette.requests import Request

from csm_core.call import Call
from csm_core.server.refusals import RefusedError

_Body = TypeVar("_Body", bound="JsonBody")
_VOICE = {
    "anyOf": [
        {"type": "string"},
        {"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"]},
    ]
}


class JsonBody(BaseModel):
    """Strict: "1" is no number and true is not 1. What is unknown is ignored: clients send fields of other servers."""

    model_config = ConfigDict(strict=True, extra="ignore")


class VoiceId(JsonBody):
    """A voice as OpenAI's custom voices are named."""

    id: str


class OptionsBody(JsonBody):
    """How to speak, apart from what and in which voice: the same on every route."""

    speaker: Any = None
    context: Any = None
    seed: Any = None
    temperature: Any = None
    topk: Any = None
    max_audio_length_ms: Any = None

    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in OptionsBody.model_fields}


class SpeechBody(OptionsBody):
    """POST /v1/audio/speech: OpenAI's fields, then ours, which its clients send as ``extra_body``."""

    model: str
    input: str
    voice: Annotated[str | VoiceId, WithJsonSchema(_VOICE)]
    instructions: str | None = None
    response_format: Literal["mp3", "opus", "aac", "flac", "wav", "pcm"] | None = None
    speed: Annotated[float, Field(ge=0.25, le=4.0)] | None = None
    stream_format: Literal["audio", "sse"] | None = None
    stream: bool | None = None

    def call(self) -> Call:
        voice = self.voice if isinstance(self.voice, str) else self.voice.id
        return Call(text=self.input, voice=voice, **self.options())


class CallBody(OptionsBody):
    """POST /generate_audio and /stream_audio, as main.py's functions take it."""

    text: Any = None
    voice: Any = None

    def call(self) -> Call:
        return Call(text=self.text, voice=self.voice, **self.options())


class GenerateBody(CallBody):
    """POST /generate: the same, and a sample of the voice with what is said in it. ``max_length`` in milliseconds."""

    max_length: Any = None
    voice_prompt: Any = None
    voice_prompt_text: Any = None

    def call(self) -> Call:
        length = self.max_length if self.max_audio_length_ms is None else self.max_audio_length_ms
        return replace(
            super().call(),
            max_audio_length_ms=length,
            voice_prompt=self.voice_prompt,
            voice_prompt_text=self.voice_prompt_text,
        )


async def read_body(request: Request, kind: type[_Body]) -> _Body:
    """The checked body of a request. Raises RefusedError 400 (or 415 for what says that it is no JSON)."""
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        # A page in a browser may send text/plain or a form anywhere without asking; JSON it may not.
        raise RefusedError(415, "unsupported_media_type", "Send the body with `Content-Type: application/json`.")
    try:
        return kind.model_validate_json(await request.body())
    except ValidationError as error:
        raise _complaint(error) from None


def _complaint(error: ValidationError) -> RefusedError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return RefusedError(400, "invalid_json", f"The body cannot be read as JSON. {first['msg']}.")
    param = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "missing":
        return RefusedError(400, "missing_required_parameter", f"{param} is missing.", param)
    return RefusedError(400, "invalid_value", f"{param or 'The body'}: {first['msg']}.", param)


def body_schema(kind: type[JsonBody]) -> dict[str, Any]:
    """What the OpenAPI document says of such a body."""
    content = {"application/json": {"schema": kind.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}

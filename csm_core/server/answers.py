"""How a speech goes out: while it is made, or whole. Watches the client either way and stops speaking when it has gone.

The status waits for the first sound, so that whatever fails before it is an ordinary HTTP error; what fails later cuts
the body, which a client notices. Knows no route.
"""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from csm_core import call
from csm_core.errors import CsmError
from csm_core.server.refusals import refused
from csm_core.server.speaking import Piece, Speaking

PING_SECONDS = 15.0  # LiveKit gives up when it hears nothing for 30
PING = b": ping\n\n"
SSE = "text/event-stream"

OpenSpeech = AbstractAsyncContextManager[Speaking]
Body = Callable[[Speaking], AsyncIterator[bytes]]
_Result = TypeVar("_Result")


class BodyCutError(Exception):
    """Ends a response that has begun without completing it. Its cause is what went wrong."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of ``work``, which is cancelled when the client goes: then ClientDisconnect."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class StreamedSpeech(Response):
    """A response that sends what ``body`` makes of a speech. Its head goes with the first bytes of the body.

    ``write_timeout`` in seconds: for a client that takes nothing.
    """

    def __init__(self, speech: OpenSpeech, body: Body, media_type: str, write_timeout: float) -> None:
        super().__init__(media_type=media_type)
        del self.headers["content-length"]
        self._speech = speech
        self._body = body
        self._write_timeout = write_timeout

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._answer(send))
        except ClientDisconnect:
            return

    async def _answer(self, send: Send) -> None:
        begun = False
        try:
            async with self._speech as speech, aclosing(self._body(speech)) as body:  # type: ignore[type-var]
                async for data in body:
                    if not begun:
                        begun = True
                        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                        await send(head)
                    async with asyncio.timeout(self._write_timeout):
                        await send({"type": "http.response.body", "body": data, "more_body": True})
        except (CsmError, TimeoutError) as error:
            if begun:
                raise BodyCutError(f"cut off: {type(error).__name__}") from error
            raise
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def whole(opened: OpenSpeech) -> tuple[Speaking, bytes]:
    """A speech to its end: its facts, its bytes."""
    async with opened as speech:
        data = bytearray()
        while piece := await speech.next():
            data += piece.data
        return speech, bytes(data)


# --- bodies ----------------------------------------------------------------------------------------------------------


async def plain(speech: Speaking) -> AsyncIterator[bytes]:
    """The bytes of the format."""
    while piece := await speech.next():
        yield piece.data


def openai_events(characters: int, frame_rate: float) -> Body:
    """OpenAI's server-sent events. Usage counts what there is: characters in, frames out, ``frame_rate`` per second."""

    async def body(speech: Speaking) -> AsyncIterator[bytes]:
        begun = False
        try:
            async for piece in _with_pings(speech):
                begun = True
                if piece is None:
                    yield PING
                    continue
                yield _event({"type": "speech.audio.delta", "audio": base64.b64encode(piece.data).decode("ascii")})
        except CsmError as error:
            if not begun:
                raise
            yield _event({"type": "speech.audio.error", "error": refused(error, openai=True).error})
            return
        frames = round(speech.seconds * frame_rate)
        usage = {"input_tokens": characters, "output_tokens": frames, "total_tokens": characters + frames}
        yield _event({"type": "speech.audio.done", "usage": usage})

    return body


async def native_events(speech: Speaking) -> AsyncIterator[bytes]:
    """The events of main.py's ``stream_audio``; its format is pcm."""
    begun = False
    try:
        async for piece in _with_pings(speech):
            begun = True
            yield PING if piece is None else call.sound_event(piece.data, speech.sample_rate).encode()
    except CsmError as error:
        if not begun:
            raise
        yield call.event(**call.refusal(error), done=True).encode()
        return
    yield call.event(duration_seconds=round(speech.seconds, 3), **speech.about(), done=True).encode()


async def _with_pings(speech: Speaking) -> AsyncIterator[Piece | None]:
    """The pieces; None whenever there was none for PING_SECONDS."""
    while True:
        try:
            async with asyncio.timeout(PING_SECONDS):
                piece = await speech.next()
        except TimeoutError:
            yield None
            continue
        if piece is None:
            return
        yield piece


def _event(fields: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(fields, allow_nan=False)}\n\n".encode()

"""The application: routes, what stands before them, and the life of the model behind them.

The same for every way to run it: ``csm serve``, or any ASGI server that is given ``create_app(...)``.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from csm_core.config import ServerSettings
from csm_core.errors import CsmError
from csm_core.generator import Generator
from csm_core.server import native, openai, operations
from csm_core.server.desk import Desk
from csm_core.server.meters import Meters
from csm_core.server.refusals import RefusedError, refused
from csm_core.server.security import CLIENT_GONE, Edge, Gate, read_rate

logger = logging.getLogger(__name__)

_REASONS = {
    404: ("not_found", "There is nothing at this address."),
    405: ("method_not_allowed", "This address is called with another method."),
}


def create_app(settings: ServerSettings, generator: Generator | Callable[[], Generator]) -> FastAPI:
    """The ASGI application. A ``generator`` stays its owner's; a callable is called on a thread once the application
    starts (until then it is not ready), and what it made is closed with the application.

    ``app.state.desk`` knows the state. Raises InvalidInputError for a ``key_rate`` that cannot be read.
    """
    desk = Desk(settings, Meters())
    outside = [Middleware(Edge, desk=desk)]
    if settings.cors_origins:
        methods = ["GET", "POST", "DELETE"]
        outside.append(
            Middleware(CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=methods, allow_headers=["*"])
        )
    app = FastAPI(
        title="csm",
        docs_url=None,  # it would load its page from somebody else's server
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan(desk, generator),
        middleware=[*outside, Middleware(Gate, desk=desk, rate=read_rate(settings.key_rate))],
        exception_handlers={
            RefusedError: _answer_refused,
            CsmError: _answer_error,
            HTTPException: _answer_http,
            ClientDisconnect: _answer_nobody,
            Exception: _answer_unforeseen,
        },
    )
    app.state.desk = desk
    for routes in (openai, native, operations):
        app.include_router(routes.router)
    return app


def _lifespan(
    desk: Desk, generator: Generator | Callable[[], Generator]
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if isinstance(generator, Generator):
            desk.generator = generator
            loading = None
        else:
            loading = asyncio.create_task(desk.load(generator))
            loading.add_done_callback(_note_load)
        yield
        if loading is not None:
            loading.cancel()
            await asyncio.wait([loading])
            if desk.generator is not None:
                await asyncio.to_thread(desk.generator.close)
        await asyncio.to_thread(desk.close)

    return lifespan


def _note_load(loading: "asyncio.Task[None]") -> None:
    if not loading.cancelled() and (error := loading.exception()):
        logger.error("the model cannot be loaded: %s", error, exc_info=None if isinstance(error, CsmError) else error)


async def _answer_refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return error.response()


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, CsmError)
    return refused(error, openai=request.url.path.startswith("/v1/")).response()


async def _answer_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code, message = _REASONS.get(error.status_code, ("invalid_request", str(error.detail)))
    response = RefusedError(error.status_code, code, message).response()
    response.headers.update(error.headers or {})
    return response


async def _answer_nobody(_: Request, error: Exception) -> Response:  # noqa: ARG001  starlette's signature
    return Response(status_code=CLIENT_GONE)


async def _answer_unforeseen(request: Request, error: Exception) -> Response:
    """A mistake of ours: the log has it (it is raised on, to the server), the client gets its request's id."""
    logger.error("a request failed: %s", type(error).__name__)
    request_id = request.state.request_id
    response = RefusedError(500, "internal_error", f"The server failed; its log knows request {request_id}.").response()
    response.headers["x-request-id"] = request_id
    return response

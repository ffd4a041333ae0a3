"""What every request passes before a route sees it: an id and a log line (Edge), then key, rate and body size (Gate).

Both are plain ASGI, because a layer that buffers responses would hide a client's going. Knows no route's body.
"""

import asyncio
import hashlib
import hmac
import logging
import math
import re
import secrets
import time
import uuid

from limits import RateLimitItem, parse
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import MovingWindowRateLimiter
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from csm_core.config import ServerSettings
from csm_core.errors import InvalidInputError
from csm_core.server.desk import Desk
from csm_core.server.operations import PUBLIC
from csm_core.server.refusals import RefusedError

logger = logging.getLogger(__name__)

LISTS = ("/v1/models", "/v1/audio/models", "/v1/audio/voices")
CLIENT_GONE = 499  # nginx's status for a request whose client did not wait
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,100}")


class Edge:
    """Gives every request its id (the caller's own, if it is plain), measures it and writes one line about it."""

    def __init__(self, app: ASGIApp, desk: Desk) -> None:
        self._app = app
        self._desk = desk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {}).update(desk=self._desk, request_id=request_id, caller="-")
        status, started = CLIENT_GONE, time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["x-content-type-options"] = "nosniff"
                headers.setdefault("cache-control", "no-store")
            await send(message)

        with bound_contextvars(request_id=request_id):
            failed = True
            try:
                await self._app(scope, receive, send_with_id)
                failed = False
            finally:
                status = 500 if failed and status == CLIENT_GONE else status
                self._note(scope, status, time.monotonic() - started)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")  # never the path itself: it is the caller's text
        method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE", "OPTIONS", "HEAD") else "other"
        self._desk.meters.requests.labels(route, method, status).inc()
        self._desk.meters.latency.labels(route).observe(seconds)
        level = logging.DEBUG if route in PUBLIC else logging.INFO
        figures = {"route": route, "method": method, "status": status, "seconds": round(seconds, 3)}
        logger.log(level, "request", extra={**figures, "caller": scope["state"]["caller"]})


class Gate:
    """Lets pass who has a key, within the limits. What is not on the public list needs one, also what is not there."""

    def __init__(self, app: ASGIApp, desk: Desk, rate: RateLimitItem | None) -> None:
        self._app = app
        self._desk = desk
        self._settings = desk.settings
        self._public = public_paths(desk.settings)
        self._rate = _Rate(rate) if rate else None
        self._salt = secrets.token_bytes(16)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            if (scope["method"], scope["path"]) not in self._public:
                await self._admit(scope)
            body = CountedBody(receive, self._settings)
            body.check_length(Headers(scope=scope).get("content-length", ""))
        except RefusedError as refused:
            await refused.response()(scope, receive, send)
            return
        await self._app(scope, body, send)

    async def _admit(self, scope: Scope) -> None:
        caller = scope["state"]["caller"] = self._caller(scope)
        if self._rate is not None and (wait := await self._rate.hit(caller)):
            self._desk.meters.refused.labels("key_rate").inc()
            message = f"More than {self._settings.key_rate} with this key: wait {wait} s."
            raise RefusedError(429, "rate_limit_exceeded", message, None, wait)

    def _caller(self, scope: Scope) -> str:
        """A short name for whoever calls, that says nothing about them. Raises RefusedError 401."""
        if self._settings.no_auth:
            address = scope["client"][0] if scope.get("client") else ""
            return hashlib.sha256(self._salt + address.encode()).hexdigest()[:8]
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise RefusedError(401, "invalid_api_key", "Send your key in the header `Authorization: Bearer <key>`.")
        digest = hashlib.sha256(key.strip().encode("latin-1")).hexdigest()
        # Every one is compared, to its end, so that the time says nothing.
        if not sum(hmac.compare_digest(digest, known) for known in self._settings.keys):
            raise RefusedError(401, "invalid_api_key", "This key is not known here.")
        return digest[:8]


def read_rate(text: str | None) -> RateLimitItem | None:
    """A rate as "60/minute", or none. Raises InvalidInputError."""
    try:
        return parse(text) if text else None
    except ValueError as error:
        raise InvalidInputError(f"{text!r:.40} is not a rate: write it as 60/minute.", "key_rate") from error


def public_paths(settings: ServerSettings) -> set[tuple[str, str]]:
    """Method and path of what needs no key."""
    lists = LISTS if settings.public_lists else ()
    metrics = ("/metrics",) if settings.public_metrics else ()
    return {("GET", path) for path in (*PUBLIC, *lists, *metrics)}


class _Rate:
    """A moving window for each caller."""

    def __init__(self, item: RateLimitItem) -> None:
        self._item = item
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    async def hit(self, caller: str) -> int:
        """0, or the seconds until it is worth trying again."""
        if await self._limiter.hit(self._item, caller):
            return 0
        window = await self._limiter.get_window_stats(self._item, caller)
        return max(1, math.ceil(window.reset_time - time.time()))


class CountedBody:
    """``receive`` of a request whose body may neither be too long nor take too long. Raises RefusedError 413, 408."""

    def __init__(self, receive: Receive, settings: ServerSettings) -> None:
        self._receive = receive
        self._limit = settings.max_body_bytes
        self._deadline = time.monotonic() + settings.body_timeout
        self._received = 0
        self._complete = False

    def check_length(self, header: str) -> None:
        """What the client announces; 413 before anything is read."""
        if header.isdecimal() and int(header[:20]) > self._limit:
            raise self._too_long()

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            raise RefusedError(408, "body_timeout", "The body did not arrive in time.") from None
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
            if self._received > self._limit:
                raise self._too_long()
        return message

    def _too_long(self) -> RefusedError:
        return RefusedError(413, "body_too_large", f"The body is too large: at most {self._limit:,} bytes are read.")

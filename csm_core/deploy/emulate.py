"""A local stand-in for Cerebrium's default runtime: runs main.py as the platform does, without account or network.

Imitated, from the platform's documentation: main.py is imported on a worker thread; its public functions are at
``POST /v4/{project}/{app}/{function}``; the JSON body's keys are keyword arguments and ``run_id`` is added where a
function asks for it; answers are ``{"run_id", "result", "run_time_ms"}``; ``status_code`` in a returned dict sets the
HTTP status; iterators become server-sent events; a bearer token. Decided here, because it is not documented: what
wrong parameters (422), wrong bodies (400, 413) and exceptions (500) answer. Knows nothing of speech.
"""

import hmac
import importlib.util
import inspect
import json
import logging
import socket
import sys
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import anyio
import uvicorn
from anyio.to_thread import run_sync
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 32 * 1024 * 1024  # the platform publishes no limit; this is some minutes of WAV in base64
NO_BODY_STATUS = (204, 205, 304)  # HTTP forbids a body there, and every answer here has one
_END = object()


class _RefusalError(Exception):
    """An answer that is not the function's result: a status, a code and one sentence for the caller."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.result = {"status_code": status, "error": {"code": code, "message": message, "param": param}}


def import_main(path: str | Path) -> ModuleType:
    """Import a main.py on a worker thread with its folder on the import path, as the platform does.

    Whatever the import raises is raised here: an app whose model cannot be loaded does not start.
    """
    path = Path(path).resolve()
    spec = importlib.util.spec_from_file_location(f"emulated_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    with ThreadPoolExecutor(1, thread_name_prefix="import-main") as worker:
        worker.submit(spec.loader.exec_module, module).result()
    return module


def public_functions(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """What the platform publishes: functions without a leading underscore, also imported ones; no class or module."""
    return {name: f for name, f in vars(module).items() if inspect.isfunction(f) and not name.startswith("_")}


class Emulator:
    """The ASGI application. ``token`` None leaves the app open, like ``disable_auth = true``."""

    def __init__(
        self,
        main_path: str | Path,
        token: str | None = None,
        project: str = "p-local",
        app: str = "csm",
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        self.functions = public_functions(import_main(main_path))
        self.base_path = f"/v4/{project}/{app}"
        self._token = token
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        run_id, started = str(uuid.uuid4()), time.perf_counter()
        try:
            function = self._find(request)
            body = _parse(await self._read(request))
            result = await _call(function, _bind(function, body, run_id))
            if isinstance(result, Iterator | AsyncIterator):
                await _stream(result, function.__name__, run_id, scope, receive, send)
                return
            response = _answer(run_id, result, _status(result, function.__name__), started)
        except _RefusalError as refusal:
            response = _answer(run_id, refusal.result, refusal.status, started)
        except ClientDisconnect:
            return
        await response(scope, receive, send)

    def _find(self, request: Request) -> Callable[..., Any]:
        if self._token is not None:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not given.strip():
                raise _RefusalError(401, "unauthorized", "Send the header `Authorization: Bearer <token>`.")
            if not hmac.compare_digest(given.strip().encode("latin-1"), self._token.encode()):
                raise _RefusalError(403, "forbidden", "This token is not the app's token.")
        base, _, name = request.scope["path"].rpartition("/")
        if base != self.base_path:
            raise _RefusalError(
                404, "not_found", f"There is no such app here; the path is {self.base_path}/<function>."
            )
        if name not in self.functions:
            names = ", ".join(self.functions) or "none"
            raise _RefusalError(404, "not_found", f"main.py has no public function of that name; it has: {names}.")
        if request.method != "POST":
            raise _RefusalError(405, "method_not_allowed", "Functions are called with POST.")
        return self.functions[name]

    async def _read(self, request: Request) -> bytes:
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > self._max_body_bytes:  # uvicorn takes and drops the rest, so the client gets to read this
                limit = f"{self._max_body_bytes:,}"
                raise _RefusalError(413, "body_too_large", f"The body is too large; at most {limit} bytes are read.")
        return bytes(body)


def _parse(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body) if body.strip() else {}
    except (ValueError, RecursionError) as error:
        raise _RefusalError(400, "invalid_json", "The body is not readable as JSON.") from error
    if not isinstance(value, dict):
        raise _RefusalError(
            400, "invalid_json", "The body must be a JSON object: one key per parameter of the function."
        )
    return value


def _bind(function: Callable[..., Any], body: Mapping[str, Any], run_id: str) -> dict[str, Any]:
    """The keyword arguments of one call; ``run_id`` is the platform's, whatever the body says."""
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    names = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    arguments = {**body, "run_id": run_id} if "run_id" in names else dict(body)
    for name in arguments:
        if name not in names and not takes_any:
            known = ", ".join(n for n in names if n != "run_id") or "none"
            raise _RefusalError(
                422, "unknown_parameter", f"Unknown parameter {name[:80]!r}; there are: {known}.", name[:80]
            )
    for name in names:
        if name not in arguments and parameters[name].default is inspect.Parameter.empty:
            raise _RefusalError(422, "missing_parameter", f"The parameter {name!r} is missing.", name)
    return arguments


@contextmanager
def _users_code(name: str) -> Iterator[None]:
    """The boundary to main.py: whatever a function raises ends its own call and nothing else."""
    try:
        yield
    except (Exception, SystemExit) as error:
        logger.exception("%s failed", name)
        message = f"{name} raised {type(error).__name__}; the traceback is in the log of the app."
        raise _RefusalError(500, "exception", message) from error


async def _call(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    with _users_code(function.__name__):
        if inspect.iscoroutinefunction(function):
            return await function(**arguments)
        return await run_sync(partial(function, **arguments))


def _status(result: object, name: str) -> int:
    status = result.get("status_code", 200) if isinstance(result, dict) else 200
    if type(status) is not int or not 200 <= status <= 599 or status in NO_BODY_STATUS:
        raise _RefusalError(500, "invalid_status_code", f"{name} returned a status_code that HTTP cannot send.")
    return status


def _answer(run_id: str, result: object, status: int, started: float) -> Response:
    envelope = {"run_id": run_id, "result": result, "run_time_ms": round((time.perf_counter() - started) * 1000, 2)}
    try:
        content = json.dumps(envelope, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        logger.warning("the result of run %s cannot be written as JSON: %s", run_id, error)
        refusal = _RefusalError(500, "invalid_result", "The function's result cannot be written as JSON.")
        return _answer(run_id, refusal.result, refusal.status, started)
    headers = {"x-request-id": run_id}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(content, status, headers, media_type="application/json")


async def _stream(
    result: Iterator[Any] | AsyncIterator[Any], name: str, run_id: str, scope: Scope, receive: Receive, send: Send
) -> None:
    async with aclosing(_items(result, name)) as items:
        first = await anext(items, _END)  # a function that fails before its first event is a plain 500
        headers = {"x-request-id": run_id, "cache-control": "no-cache"}
        response = StreamingResponse(_events(first, items), 200, headers, media_type="text/event-stream")
        await response(scope, receive, send)


async def _items(result: Iterator[Any] | AsyncIterator[Any], name: str) -> AsyncGenerator[Any, None]:
    """The items of either kind of iterator. It is closed at the end, also when the client has gone."""
    try:
        while True:
            with _users_code(name):
                if isinstance(result, AsyncIterator):
                    item = await anext(result, _END)
                else:
                    item = await run_sync(next, result, _END)
            if item is _END:
                return
            yield item
    finally:
        close = getattr(result, "aclose", None) or getattr(result, "close", None)
        if close is not None:
            with anyio.CancelScope(shield=True), _users_code(name):
                await (close() if isinstance(result, AsyncIterator) else run_sync(close))


async def _events(first: object, items: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    try:
        if first is not _END:
            yield _event(first)
            async for item in items:
                yield _event(item)
    except _RefusalError as refusal:
        yield b"event: error\n" + _event(refusal.result)


def _event(item: object) -> bytes:
    """One item as an event: ready-made ``data:`` text as it is, other text line by line, everything else as JSON."""
    if isinstance(item, bytes | bytearray):
        item = item.decode("utf-8", "replace")
    if not isinstance(item, str):
        try:
            item = json.dumps(item, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise _RefusalError(500, "invalid_result", "An item of the stream cannot be written as JSON.") from error
    if not item.startswith(("data:", "event:", "id:", "retry:", ":")):
        item = "".join(f"data: {line}\n" for line in item.splitlines() or [""])
    return (item.rstrip("\n") + "\n\n").encode("utf-8", "backslashreplace")


def _server(emulator: Emulator, host: str, port: int) -> tuple[uvicorn.Server, socket.socket, str]:
    listener = socket.create_server((host, port))
    config = uvicorn.Config(emulator, lifespan="off", ws="none", log_config=None, timeout_graceful_shutdown=5)
    address, bound_port = listener.getsockname()[:2]
    return uvicorn.Server(config), listener, f"http://{address}:{bound_port}{emulator.base_path}"


def serve(
    main_path: str | Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    project: str = "p-local",
    app: str = "csm",
) -> None:
    """Run main.py at ``host:port`` until interrupted. Raises what its import raises, or OSError for a taken port."""
    emulator = Emulator(main_path, token, project, app)
    server, listener, url = _server(emulator, host, port)
    logger.info("ready: POST %s/{%s}", url, ",".join(emulator.functions))
    with listener:
        server.run([listener])


@contextmanager
def running(emulator: Emulator, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """The emulator on a background thread for the length of a ``with`` block; yields the URL of its functions."""
    server, listener, url = _server(emulator, host, port)
    thread = threading.Thread(target=server.run, args=([listener],), name="emulator", daemon=True)
    with listener:
        thread.start()
        try:
            yield url  # the socket already listens: a call made before the loop runs waits in its queue
        finally:
            server.should_exit = True
            thread.join(timeout=10)

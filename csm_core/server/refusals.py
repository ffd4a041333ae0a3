"""What a caller gets instead of an answer: a status, OpenAI's error envelope, and when to come back, if ever.

Everything that can go wrong becomes one ``RefusedError`` here. Knows no route.
"""

import json
from typing import Any

from starlette.responses import Response

from csm_core.call import refusal
from csm_core.errors import CsmError

_TYPES = {401: "invalid_request_error", 403: "permission_error", 429: "rate_limit_error"}
# Generating again costs as much as before and ends the same way; OpenAI's client would do it twice.
_PERMANENT = (500, 501, 502, 504)


class RefusedError(Exception):
    """An answer that is not what was asked for. ``retry_after`` in seconds, for those who come back."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"message": self.message, "type": kind, "param": self.param, "code": self.code}

    @property
    def headers(self) -> dict[str, str]:
        headers: dict[str, str] = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, self.retry_after))
        if self.status in _PERMANENT and self.code != "engine_error":  # that one may be over with the next speech
            headers["x-should-retry"] = "false"
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers

    def response(self) -> Response:
        return json_response({"error": self.error}, self.status, self.headers)


def check_length(text: str, limit: int, name: str, status: int) -> None:
    """Raises RefusedError ``status`` for a text of more than ``limit`` characters, which the client calls ``name``."""
    if len(text) > limit:
        message = f"{name} has {len(text):,} characters; at most {limit:,} are spoken at once."
        raise RefusedError(status, "string_above_max_length", message, name)


def refused(error: CsmError, openai: bool) -> RefusedError:
    """An error of the package as an answer; OpenAI's routes have 400 for bad input, and call the text ``input``."""
    known = refusal(error)
    status, details = known["status_code"], known["error"]
    if openai:
        status = 400 if status == 422 else status
        details["param"] = "input" if details["param"] == "text" else details["param"]
    return RefusedError(status, details["code"], details["message"], details["param"], details.get("retry_after"))


def json_response(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """ASCII only, so that nothing a caller sent can fail to be encoded."""
    return Response(json.dumps(content, allow_nan=False), status, headers, media_type="application/json")

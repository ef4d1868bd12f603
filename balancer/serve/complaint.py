"""Errors of our own, in the shape that clients of OpenAI's API (on /v1/messages: Anthropic's) can read. Pure."""

from __future__ import annotations

import orjson

from balancer.errors import NoRank, NoRankReason
from balancer.serve.wire import Headers

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    408: "request_timeout",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_JSON = (b"Content-Type", b"application/json")
RETRY_AFTER_S = 1


def complaint(
    status: int, message: str, code: str | None = None, path: bytes = b"", request_id: str = ""
) -> tuple[Headers, bytes]:
    """Headers and body of an error answer; `code` is a word for programs."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    error: dict[str, object]
    if path.startswith(b"/v1/messages"):
        error = {"type": "error", "error": {"type": kind, "message": message}}
    else:
        error = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    headers = [_JSON]
    if request_id:
        headers.append((b"X-Request-Id", request_id.encode()))
    if status in (429, 503):
        headers.append((b"Retry-After", b"%d" % RETRY_AFTER_S))
    if status == 401:
        headers.append((b"WWW-Authenticate", b"Bearer"))
    return headers, orjson.dumps(error)


def status_of(no_rank: NoRank) -> int:
    """429 where the pool is full, 503 where there is nobody to ask."""
    return 429 if no_rank.reason is NoRankReason.ALL_FULL else 503

"""The wire protocol between a client and a rank: one JSON object per line, both ways, over one loopback TCP
connection.

Pure: bytes to values and back, used by `rank` and `client` alike; it opens no socket.

Client to rank:
    {"request_id": "r1", "input_tokens": 900, "output_tokens": 120}
    {"abort": "r1"}                      a request that is not there (any more) is no error

Rank to client, one line per step for all requests of the connection that got a token, left or were aborted:
    {"step": 12, "t": 81.25, "tokens": [["r1", 3]], "finished": [], "aborted": []}
    {"error": "input_tokens must be …", "request_id": "r1"}     request_id is null when there was none to read

`step` numbers the engine's steps, `t` is when the step ended: seconds of the host's monotonic clock
(`time.monotonic`), the same for all ranks. A token is [request id, tokens generated so far]. After
`finished` or `aborted` a request id is free again. Closing the connection aborts its requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

MAX_REQUEST_ID_BYTES = 512
MAX_LINE_BYTES = 64 * 1024
"""Longest line a rank accepts; its own lines grow with the requests of a connection."""


class BadMessage(ValueError):
    """A line that is no message; the text says why, `request_id` is the one it named, if it did."""

    def __init__(self, reason: str, request_id: str | None = None) -> None:
        super().__init__(reason)
        self.request_id = request_id


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request for this rank; tokens >= 1."""

    request_id: str
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Abort:
    """The client no longer wants this request."""

    request_id: str


@dataclass(frozen=True, slots=True)
class RankEvent:
    """One line of a rank as its client sees it. `error` is None on a step's line; `step` is 0 on an error."""

    step: int
    t: float
    tokens: Sequence[tuple[str, int]] = ()
    finished: Sequence[str] = ()
    aborted: Sequence[str] = ()
    error: str | None = None
    request_id: str | None = None


def parse_message(line: bytes) -> Arrival | Abort:
    """Read a client's line; raises `BadMessage`."""
    try:
        message = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise BadMessage(f"not a line of JSON: {error}") from None
    if not isinstance(message, dict):
        raise BadMessage("a message is a JSON object")
    if "abort" in message:
        return Abort(_request_id(message, "abort"))
    request_id = _request_id(message, "request_id")
    return Arrival(
        request_id,
        _tokens(message, "input_tokens", request_id),
        _tokens(message, "output_tokens", request_id),
    )


def arrival_line(request_id: str, input_tokens: int, output_tokens: int) -> bytes:
    """The line that sends a request."""
    return _line({"request_id": request_id, "input_tokens": input_tokens, "output_tokens": output_tokens})


def abort_line(request_id: str) -> bytes:
    """The line that takes a request back."""
    return _line({"abort": request_id})


def step_line(
    step: int, t: float, tokens: Sequence[tuple[str, int]], finished: Sequence[str], aborted: Sequence[str]
) -> bytes:
    """What a step meant to the requests of one connection; `t` in seconds of the monotonic clock."""
    return _line({"step": step, "t": t, "tokens": tokens, "finished": finished, "aborted": aborted})


def error_line(reason: str, request_id: str | None) -> bytes:
    """The answer to a line that was no message, or to a request that was rejected."""
    return _line({"error": reason, "request_id": request_id})


def parse_event(line: bytes) -> RankEvent:
    """Read a rank's line."""
    fields = orjson.loads(line)
    if "error" in fields:
        return RankEvent(0, 0.0, error=fields["error"], request_id=fields["request_id"])
    return RankEvent(fields["step"], fields["t"], fields["tokens"], fields["finished"], fields["aborted"])


def _line(message: dict[str, Any]) -> bytes:
    return orjson.dumps(message, option=orjson.OPT_APPEND_NEWLINE)


def _request_id(message: dict[str, Any], field: str) -> str:
    value = message.get(field)
    if not isinstance(value, str) or not 1 <= len(value.encode()) <= MAX_REQUEST_ID_BYTES:
        raise BadMessage(f"{field} must be text of 1 to {MAX_REQUEST_ID_BYTES} bytes")
    return value


def _tokens(message: dict[str, Any], field: str, request_id: str) -> int:
    value = message.get(field)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadMessage(f"{field} must be a whole number of at least 1", request_id)
    return value

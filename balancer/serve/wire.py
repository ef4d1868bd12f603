"""How rank and request id travel to each kind of engine, and what of a head goes on. Pure: bytes in, bytes out.

    kind    rank                                              request id, as the engine's hook will see it
    sglang  X-Data-Parallel-Rank; on /generate the field      field `rid` (`request_id` on /v1/responses); none on
            `routed_dp_rank`                                  /v1/messages, nor where the engine makes several of one
    vllm    X-data-parallel-rank, counted within the address  X-Request-Id with a mark (`balancer.marker`); on
                                                              /v1/responses the mark in the field `vllm_xargs`
    openai  none: one rank for each address                   X-Request-Id

A field is spliced in as bytes behind the body's opening brace; every other byte of the body stays as it is. A client's
own rank header goes, and so do SGLang's X-Override-...: the rank is ours to say.
"""

from __future__ import annotations

import re

from balancer.marker import marked
from balancer.serve.endpoints import Asked
from balancer.serve.options import Engine, EngineKind

Headers = list[tuple[bytes, bytes]]

HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"te", b"trailer", b"upgrade", b"expect")
)
_OURS = HOP_BY_HOP | {b"host", b"content-length", b"x-data-parallel-rank", b"x-request-id"}
_OVERRIDE = b"x-override-"
_KEYS = frozenset((b"authorization", b"x-api-key"))
_ANSWERS_HOPS = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"upgrade"))
_BRACE = re.compile(rb"\s*\{\s*")
_CONNECTION = len(b"connection")
_NONE: frozenset[bytes] = frozenset()
SAFE_ID = re.compile(rb"[A-Za-z0-9._:@/+=-]{1,128}")
_XARGS = "dp_balancer"


def safe_request_id(value: bytes | None) -> str | None:
    """A client's X-Request-Id if it can stand in a header, a log line and a booking as it is, else None.

    Without `~`, of which marks are made.
    """
    return value.decode("ascii") if value is not None and SAFE_ID.fullmatch(value) else None


def can_match(engine: Engine, path: bytes, asked: Asked) -> bool:
    """Whether the engine's hook will know the request by our id, and so end its booking when it is received."""
    if not engine.hooked:
        return False
    if engine.kind is EngineKind.SGLANG:
        return not asked.fans_out and path != b"/v1/messages" and (asked.rid is not None or not asked.has_rid)
    if engine.kind is EngineKind.VLLM:
        return path != b"/v1/responses" or not asked.has_xargs
    return False


def body_for(engine: Engine, path: bytes, asked: Asked, booking_id: str, index: int | None, body: bytes) -> bytes:
    """The body with what this engine must find in it; `index` is the rank within the address, None to leave it open."""
    fields: list[bytes] = []
    if engine.kind is EngineKind.SGLANG:
        if not asked.has_rid and not asked.fans_out and path != b"/v1/messages":
            key = b"request_id" if path == b"/v1/responses" else b"rid"
            fields.append(b'"%b":"%b"' % (key, booking_id.encode()))
        if path == b"/generate" and index is not None and engine.dp > 1:
            fields.append(b'"routed_dp_rank":%d' % index)
    elif engine.kind is EngineKind.VLLM and engine.hooked and path == b"/v1/responses" and not asked.has_xargs:
        fields.append(b'"vllm_xargs":{"%b":"%b"}' % (_XARGS.encode(), marked(booking_id).encode()))
    return splice(body, fields) if fields else body


def splice(body: bytes, fields: list[bytes]) -> bytes:
    """`fields` behind the opening brace of a JSON object, all else byte for byte."""
    found = _BRACE.match(body)
    assert found, "read_body has seen an object"
    comma = b"" if body[found.end() : found.end() + 1] == b"}" else b","
    return body[: found.end()] + b",".join(fields) + comma + body[found.end() :]


def rank_headers(engine: Engine, path: bytes, index: int | None) -> Headers:
    """The header by which this engine learns the rank, where it does by a header."""
    if index is None or engine.dp == 1 or engine.kind is EngineKind.OPENAI:
        return []
    if engine.kind is EngineKind.SGLANG and path == b"/generate":
        return []
    return [(b"X-Data-Parallel-Rank", b"%d" % index)]


def id_header(engine: Engine, request_id: str) -> bytes:
    """What X-Request-Id says to this engine."""
    return (marked(request_id) if engine.kind is EngineKind.VLLM and engine.hooked else request_id).encode()


def request_head(
    engine: Engine,
    method: str,
    target: bytes,
    headers: Headers,
    more: Headers,
    body_length: int | None,
    drop_authorization: bool = False,
) -> bytes:
    """A request's head as it goes to the engine. `body_length` None: the request had no body."""
    named = named_by_connection(headers)
    lines = [b"%b %b HTTP/1.1\r\nHost: %b\r\n" % (method.encode(), target, engine.address.encode())]
    for name, value in headers:
        low = name.lower()
        if low in _OURS or low in named or (drop_authorization and low in _KEYS) or low.startswith(_OVERRIDE):
            continue
        lines.append(b"%b: %b\r\n" % (name, value))
    for name, value in more:
        lines.append(b"%b: %b\r\n" % (name, value))
    if body_length is not None:
        lines.append(b"Content-Length: %d\r\n" % body_length)
    lines.append(b"\r\n")
    return b"".join(lines)


def named_by_connection(headers: Headers) -> frozenset[bytes]:
    """Names that a Connection header declares to be of this hop only."""
    said = [value for name, value in headers if len(name) == _CONNECTION and name.lower() == b"connection"]
    if not said:
        return _NONE
    return frozenset(part.strip().lower() for value in said for part in value.split(b",")) - {b"close", b"keep-alive"}


def without_address(engine: Engine, headers: Headers) -> Headers:
    """An answer's headers with a location at the engine's own address made one at the front door: its path alone."""
    own = engine.url.encode()

    def told(name: bytes, value: bytes) -> bytes:
        path = value.removeprefix(own)
        # Behind two slashes a client would look for a host.
        return path if name.lower() == b"location" and path[:1] == b"/" and path[1:2] not in (b"/", b"\\") else value

    return [(name, told(name, value)) for name, value in headers]


def answer_head(
    status_line: bytes, headers: Headers, more: Headers, closes: bool, drop: frozenset[bytes] = _NONE
) -> bytes:
    """An answer's head as it goes to the client: the engine's, without what was meant for us alone."""
    named = named_by_connection(headers)
    lines = [b"HTTP/1.1", status_line[8:], b"\r\n"]
    for name, value in headers:
        low = name.lower()
        if low not in _ANSWERS_HOPS and low not in named and low not in drop:
            lines.append(b"%b: %b\r\n" % (name, value))
    for name, value in more:
        lines.append(b"%b: %b\r\n" % (name, value))
    lines.append(b"Connection: close\r\n\r\n" if closes else b"\r\n")
    return b"".join(lines)

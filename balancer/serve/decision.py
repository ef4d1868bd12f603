"""The decision alone, for people who keep their own proxy.

    POST /balancer/v1/dispatch   {"request_id", "tokens"} or {"path", "body"}  ->  rank, address, the headers to send
    POST /balancer/v1/release    {"request_id"} or {"request_ids"}             ->  {"released": n}
    any  /balancer/v1/authorize  the same decision for nginx' auth_request and Envoy's ext_authz: 200 and headers

`authorize` makes the request's id of X-Request-Id and a suffix, since clients may send one and the same, and says it in
X-Balancer-Request-Id: that is what to release. It takes the tokens from X-Balancer-Tokens, else from the body where the
proxy sends it along (Envoy's with_request_body), else from the length that it names (X-Original-Content-Length).
X-Balancer-Keeps-Key in its answer means that the client's key opened this door and is nothing for an engine. A booking
ends as always: the engine's hook acknowledges it, the proxy releases it, or its lease ends.
"""

from __future__ import annotations

from typing import Any

import orjson

from balancer.errors import BalancerError, InvalidInput, NoRank
from balancer.model import MAX_TOKENS, Placement, checked_count, checked_request_id
from balancer.serve import wire
from balancer.serve.access_log import Entry
from balancer.serve.complaint import complaint, status_of
from balancer.serve.desk import Desk
from balancer.serve.endpoints import Malformed, is_placed, path_of, written
from balancer.serve.ids import booking_id, new_id
from balancer.serve.inbound import Inbound
from balancer.serve.options import Engine

PREFIX = b"/balancer/v1/"
_DISPATCH, _RELEASE, _AUTHORIZE = "/balancer/v1/dispatch", "/balancer/v1/release", "/balancer/v1/authorize"
_MOST_DIGITS = 10
Answered = tuple[int, wire.Headers, bytes]


def endpoint_of(path: bytes) -> str:
    """Which of the paths above a request asks for, `other` where none."""
    asked = path.decode("latin-1")
    if asked.startswith(f"{_AUTHORIZE}/"):
        return _AUTHORIZE
    return asked if asked in (_DISPATCH, _RELEASE, _AUTHORIZE) else "other"


async def decide(desk: Desk, request: Inbound, entry: Entry) -> Answered:
    """Answer a request to one of the paths above; what is decided is noted in `entry`."""
    try:
        endpoint = endpoint_of(request.path)
        if endpoint == _DISPATCH:
            return await _dispatch(desk, request, entry) if request.method == "POST" else _wrong_method()
        if endpoint == _RELEASE:
            return await _release(desk, request) if request.method == "POST" else _wrong_method()
        if endpoint == _AUTHORIZE:
            return await _authorize(desk, request, entry)
    except NoRank as error:
        status = status_of(error)
        desk.metrics.decided("", error.reason.value)
        return (status, *complaint(status, str(error), error.reason.value))
    except (InvalidInput, Malformed) as error:
        return (400, *complaint(400, str(error), "invalid_body"))
    except BalancerError:
        return (503, *complaint(503, "the dispatcher's store refuses to place requests", "store_refused"))
    return (404, *complaint(404, "there are dispatch, release and authorize", "unknown_path"))


async def _dispatch(desk: Desk, request: Inbound, entry: Entry) -> Answered:
    fields = await _fields(desk, request)
    path = path_of(str(fields.get("path", "/v1/completions")).encode())
    request_id = _given_id(fields.get("request_id"))
    tokens = fields.get("tokens")
    if tokens is None:
        if not isinstance(fields.get("body"), dict):
            raise InvalidInput("give the prompt's tokens, or path and body of the request")
        if not is_placed("POST", path):
            raise InvalidInput("the path must be one that is placed: /v1/chat/completions for one")
        tokens = (await desk.tokens.read(path, written(fields["body"])))[1].tokens
    tokens = checked_count(tokens, "tokens", 1, MAX_TOKENS)
    placement, engine, index = await _place(desk, entry, request_id, tokens)
    answer = {
        "request_id": request_id,
        "rank": placement.rank,
        "engine": engine.name,
        "index": index,
        "url": engine.url,
        "outcome": placement.outcome.value,
        "load_tokens": placement.load_tokens,
        "tokens": tokens,
        "headers": {name.decode(): value.decode() for name, value in _headers(engine, path, index, request_id)},
    }
    return 200, [(b"Content-Type", b"application/json")], orjson.dumps(answer)


async def _release(desk: Desk, request: Inbound) -> Answered:
    fields = await _fields(desk, request) if request.body else {}
    ids = fields.get(
        "request_ids", [fields.get("request_id") or (request.header(b"x-request-id") or b"").decode("latin-1")]
    )
    if not isinstance(ids, list) or not 1 <= len(ids) <= 1000:
        raise InvalidInput("give request_id, or request_ids: a list of up to 1,000")
    for request_id in ids:
        checked_request_id(request_id)
    released = await desk.bookings.dispatcher.release(*ids)
    return 200, [(b"Content-Type", b"application/json")], orjson.dumps({"released": released})


async def _authorize(desk: Desk, request: Inbound, entry: Entry) -> Answered:
    original = request.header(b"x-original-uri") or request.path[len(_AUTHORIZE) :]
    path = path_of(original)
    method = (request.header(b"x-original-method") or request.method.encode()).decode("latin-1")
    if not is_placed(method, path):
        return 200, [], b""  # not placed: the proxy sends it anywhere
    request_id = booking_id(wire.safe_request_id(request.header(b"x-request-id")))
    placement, engine, index = await _place(desk, entry, request_id, await _tokens(desk, request, path))
    headers = [
        *_headers(engine, path, index, request_id),
        (b"X-Balancer-Request-Id", request_id.encode()),
        (b"X-Balancer-Rank", placement.rank.encode()),
        (b"X-Balancer-Address", engine.address.encode()),
    ]
    if desk.options.api_keys or desk.options.engine_key:
        headers.append((b"X-Balancer-Keeps-Key", b"1"))
    return 200, headers, b""


async def _tokens(desk: Desk, request: Inbound, path: bytes) -> int:
    if told := request.header(b"x-balancer-tokens"):
        if not _is_number(told):
            raise InvalidInput("X-Balancer-Tokens must be a whole number")
        return checked_count(int(told), "X-Balancer-Tokens", 1, MAX_TOKENS)
    counter = desk.tokens
    if request.body:
        return (counter.of_compressed(path, request) or await counter.read(path, request.body))[1].tokens
    length = request.header(b"x-original-content-length") or b""
    return counter.of_size(int(length) if _is_number(length) else 0).tokens


def _is_number(told: bytes) -> bool:
    """Whether it is one of tokens or bytes: `int` would raise for one of thousands of digits."""
    return told.isdigit() and len(told) <= _MOST_DIGITS


async def _place(desk: Desk, entry: Entry, request_id: str, tokens: int) -> tuple[Placement, Engine, int]:
    entry.request_id, entry.tokens = request_id, tokens
    placement, target, index = await desk.place(request_id, tokens)
    entry.place(placement, target.engine.name)
    desk.metrics.decided(placement.rank, placement.outcome.value)
    return placement, target.engine, index


def _headers(engine: Engine, path: bytes, index: int, request_id: str) -> wire.Headers:
    return [*wire.rank_headers(engine, path, index), (b"X-Request-Id", wire.id_header(engine, request_id))]


async def _fields(desk: Desk, request: Inbound) -> dict[str, Any]:
    return await desk.tokens.beside(request.body, lambda: _object(request.body))


def _object(body: bytes) -> dict[str, Any]:
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise InvalidInput("the body is not JSON") from None
    if not isinstance(fields, dict):
        raise InvalidInput("the body must be a JSON object")
    return fields


def _given_id(given: object) -> str:
    if given is None:
        return new_id()
    safe = wire.safe_request_id(given.encode("utf-8", "replace")) if isinstance(given, str) else None
    if safe is None:
        raise InvalidInput("request_id must be 1 to 128 characters of A-Z a-z 0-9 . _ : @ / + = -")
    return safe


def _wrong_method() -> Answered:
    headers, body = complaint(405, "POST it", "wrong_method")
    return 405, [*headers, (b"Allow", b"POST")], body

"""Rank and id as each kind of engine takes them; every other byte of a request as the client sent it."""

from __future__ import annotations

import json

import pytest

from balancer import in_flight_id
from balancer.marker import received_id
from balancer.serve import parse_engine, wire
from balancer.serve.endpoints import PLACED, read_body

SGLANG = parse_engine("http://h:1,kind=sglang,dp=4,hook=e")
VLLM = parse_engine("http://h:1,kind=vllm,dp=4,hook=e")
ALONE = parse_engine("http://h:1,kind=vllm,hook=e/3")
OTHER = parse_engine("http://h:1")
CHAT, GENERATE, RESPONSES = b"/v1/chat/completions", b"/generate", b"/v1/responses"
BODY = b' {\n "model": "m",  "x_unknown": [1.50, 1e3, "\\u00e9"], "messages": [] }\r\n'


def sent(engine: object, path: bytes, body: bytes, booking: str = "b-1", index: int | None = 2) -> bytes:
    return wire.body_for(engine, path, read_body(path, body), booking, index, body)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", sorted(PLACED))
def test_nothing_is_added_to_the_body_for_an_engine_of_another_kind(path: bytes) -> None:
    assert sent(OTHER, path, BODY) == BODY


def test_vllm_gets_the_body_byte_for_byte_but_for_responses_which_ignore_the_header() -> None:
    assert sent(VLLM, CHAT, BODY) == BODY
    body = sent(VLLM, RESPONSES, b'{"input":"a"}')
    assert body.endswith(b'"input":"a"}')
    assert received_id(json.loads(body)["vllm_xargs"]["dp_balancer"]) == in_flight_id("b-1")
    with_args = b'{"input":"a","vllm_xargs":{"k":1}}'
    assert sent(VLLM, RESPONSES, with_args) == with_args


def test_sglang_gets_the_id_spliced_in_and_all_else_byte_for_byte() -> None:
    body = sent(SGLANG, CHAT, BODY)
    assert body == BODY.replace(b"{\n ", b'{\n "rid":"b-1",', 1)
    assert json.loads(body) == {**json.loads(BODY), "rid": "b-1"}
    assert json.loads(sent(SGLANG, CHAT, b"{}")) == {"rid": "b-1"}
    assert json.loads(sent(SGLANG, RESPONSES, b'{"input":"a"}')) == {"request_id": "b-1", "input": "a"}


def test_generate_is_told_the_rank_in_the_body_and_no_header() -> None:
    assert json.loads(sent(SGLANG, GENERATE, b'{"text":"a"}')) == {"rid": "b-1", "routed_dp_rank": 2, "text": "a"}
    assert wire.rank_headers(SGLANG, GENERATE, 2) == []
    assert json.loads(sent(SGLANG, GENERATE, b'{"text":"a"}', index=None)) == {"rid": "b-1", "text": "a"}


def test_an_id_that_the_client_has_given_stays_alone() -> None:
    own = b'{"text":"a","rid":"mine"}'
    assert json.loads(sent(SGLANG, GENERATE, own, booking="mine")) == {"routed_dp_rank": 2, "text": "a", "rid": "mine"}
    assert sent(SGLANG, CHAT, b'{"messages":[],"rid":null}') == b'{"messages":[],"rid":null}'


def test_what_fans_out_in_sglang_is_given_no_id_that_it_would_throw_away() -> None:
    assert b"rid" not in sent(SGLANG, CHAT, b'{"messages":[],"n":2}')


@pytest.mark.parametrize(
    ("engine", "path", "body", "matches"),
    [
        (SGLANG, CHAT, b'{"messages":[]}', True),
        (SGLANG, CHAT, b'{"messages":[],"rid":"mine"}', True),
        (SGLANG, CHAT, b'{"messages":[],"rid":null}', False),
        (SGLANG, CHAT, b'{"messages":[],"n":2}', False),
        (SGLANG, b"/v1/completions", b'{"prompt":["a"]}', False),
        (SGLANG, b"/v1/messages", b'{"messages":[]}', False),
        (VLLM, CHAT, b'{"messages":[],"n":2}', True),
        (VLLM, RESPONSES, b'{"input":"a"}', True),
        (VLLM, RESPONSES, b'{"input":"a","vllm_xargs":{}}', False),
        (parse_engine("http://h:1,kind=sglang,dp=2"), CHAT, b'{"messages":[]}', False),
    ],
)
def test_it_is_known_where_a_hook_can_know_the_request_by_our_id(
    engine: object, path: bytes, body: bytes, matches: bool
) -> None:
    assert wire.can_match(engine, path, read_body(path, body)) is matches  # type: ignore[arg-type]


def test_the_rank_header_is_the_rank_behind_this_address_and_absent_where_there_is_one_only() -> None:
    assert wire.rank_headers(VLLM, CHAT, 2) == [(b"X-Data-Parallel-Rank", b"2")]
    assert wire.rank_headers(ALONE, CHAT, 0) == []
    assert wire.rank_headers(VLLM, CHAT, None) == []


def test_vllms_id_carries_the_mark_by_which_its_hook_knows_the_request_again() -> None:
    rewritten = f"chatcmpl-{wire.id_header(VLLM, 'b-1').decode()}-86f184e6"
    assert received_id(rewritten) == in_flight_id("b-1")
    assert wire.id_header(SGLANG, "b-1") == b"b-1"


def test_a_head_goes_on_without_what_was_meant_for_us() -> None:
    headers = [
        (b"Host", b"front"),
        (b"Connection", b"keep-alive, X-Mine"),
        (b"X-Mine", b"1"),
        (b"x-data-parallel-rank", b"7"),
        (b"X-Request-ID", b"theirs"),
        (b"X-Override-Routed-Dp-Rank", b"3"),
        (b"Transfer-Encoding", b"chunked"),
        (b"traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        (b"Authorization", b"Bearer key"),
        (b"X-MiXed", b"as it is"),
    ]
    head = wire.request_head(VLLM, "POST", b"/v1/%7Efoo?a=b%20c", headers, [(b"X-Request-Id", b"ours")], 5)
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /v1/%7Efoo?a=b%20c HTTP/1.1"
    assert lines[1:3] == [b"Host: h:1", b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"]
    assert lines[3:] == [
        b"Authorization: Bearer key",
        b"X-MiXed: as it is",
        b"X-Request-Id: ours",
        b"Content-Length: 5",
        b"",
        b"",
    ]
    headers.append((b"x-API-key", b"key"))
    without_key = wire.request_head(VLLM, "GET", b"/", headers, [], None, drop_authorization=True)
    assert b"key" not in without_key
    assert b"Content-Length" not in without_key


@pytest.mark.parametrize(
    ("location", "told"),
    [
        (b"http://h:1/v1/models?a=b", b"/v1/models?a=b"),
        (b"http://h:1/", b"/"),
        (b"http://h:10/x", b"http://h:10/x"),
        (b"https://h:1/x", b"https://h:1/x"),
        (b"http://h:1//other/x", b"http://h:1//other/x"),
        (b"http://h:1/\\other/x", b"http://h:1/\\other/x"),
        (b"/x", b"/x"),
    ],
)
def test_a_redirect_to_the_engines_own_address_is_one_to_the_front_door(location: bytes, told: bytes) -> None:
    """Where the path alone would name another host, the location stays what it is."""
    headers = [(b"X-Other", b"http://h:1/"), (b"location", location)]
    assert wire.without_address(VLLM, headers) == [(b"X-Other", b"http://h:1/"), (b"location", told)]


@pytest.mark.parametrize("value", [b"", b"a b", b"a\tb", b"x" * 129, b"caf\xc3\xa9", b"a~0123456789abcdef~", b'a"b'])
def test_an_id_that_could_break_a_line_a_body_or_a_mark_is_replaced(value: bytes) -> None:
    assert wire.safe_request_id(value) is None


def test_an_ordinary_id_is_kept() -> None:
    assert wire.safe_request_id(b"0af7651916cd43dd8448eb211c80319c-1:2/3@x") is not None

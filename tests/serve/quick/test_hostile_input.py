"""Whoever sends rubbish gets a clear answer or none, uses up nothing, and is not noticed by other clients."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import redis

from tests.serve.conftest import Standing
from tests.serve.engine import Engine
from tests.serve.replica import Raw, Replica, is_openai_error, post

Wait = Callable[[], None]

CHAT = b'{"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}'


@pytest.fixture
def engine(standing: Standing) -> Engine:
    return standing.engine


@pytest.fixture
def replica(standing: Standing) -> Replica:
    return standing.replica


@pytest.fixture
def client(standing: Standing) -> redis.Redis:
    """The standing replica's Redis, which no test empties."""
    return standing.client


@pytest.fixture(autouse=True)
def others_are_served(replica: Replica) -> Iterator[None]:
    """After whatever a test did, a plain client gets its answer, and nothing is in flight."""
    yield
    assert replica.chat()[0] == 200


SMUGGLING = {
    "two lengths": b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nContent-Length: 40\r\n\r\n{}xx",
    "length and chunks": b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and length": b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
    b"Content-Length: 4\r\n\r\n0\r\n\r\n",
    "a coding that only looks like chunked": b"POST /generate HTTP/1.1\r\nHost: x\r\n"
    b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked, then another coding": b"POST /generate HTTP/1.1\r\nHost: x\r\n"
    b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "a space before the colon": b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "a folded header": b"POST /generate HTTP/1.1\r\nHost: x\r\nX: a\r\n Content-Length: 9\r\n\r\n",
    "a negative length": b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    "a length with a sign": b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: +2\r\n\r\n{}",
    "a length in hexadecimal": b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 0x2\r\n\r\n{}",
    "a length beyond 64 bits": b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n",
    "a chunk size with a sign": b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"-2\r\n{}\r\n0\r\n\r\n",
    "a chunk size that is none": b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"zz\r\n{}\r\n0\r\n\r\n",
    "a chunk longer than its size": b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"2\r\n{}GET /admin HTTP/1.1\r\n\r\n",
    "a chunk size beyond 64 bits": b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"10000000000000002\r\n{}\r\n0\r\n\r\n",
    "bare line feeds": b"POST /v1/completions HTTP/1.1\nHost: x\nContent-Length: 2\n\n{}",
    "a zero byte in a header": b"POST /generate HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\nContent-Length: 2\r\n\r\n{}",
    "no host": b"POST /generate HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}",
    "two hosts": b"POST /generate HTTP/1.1\r\nHost: x\r\nHost: y\r\nContent-Length: 2\r\n\r\n{}",
    "another protocol": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
    "HTTP/2 with prior knowledge": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "both, and an upgrade": b"POST /generate HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n"
    b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "another coding, and an upgrade": b"POST /generate HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n"
    b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a target with a line break": b"POST /v1/completions\r\nX: y HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}",
}


@pytest.mark.parametrize("what", SMUGGLING)
def test_a_request_of_which_two_readers_could_make_two_things_is_refused_and_the_connection_ends(
    what: str, replica: Replica, engine: Engine
) -> None:
    with replica.raw(SMUGGLING[what] + b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n") as raw:
        seen = raw.all()
    assert not seen or seen[9:12] in (b"400", b"413", b"501", b"505"), seen[:200]
    assert len(re.findall(rb"HTTP/1\.1 \d", seen)) <= 1, "what follows is not read as a request"
    assert engine.seen == []


JAVAS = (b"Connection: Upgrade, HTTP2-Settings", b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
         b"Upgrade: h2c", b"User-Agent: Java-http-client/21.0.1")  # fmt: skip
"""What every JDK's HttpClient adds to its requests to http:// addresses: Spring AI's and LangChain4j's."""


@pytest.mark.parametrize("form", ["length", "chunked"])
def test_a_java_client_that_offers_http2_is_served_by_http1(form: str, replica: Replica, engine: Engine) -> None:
    one = post(CHAT, *JAVAS)
    if form == "chunked":
        head = one.removesuffix(CHAT).replace(b"Content-Length: %d" % len(CHAT), b"Transfer-Encoding: chunked")
        one = head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(CHAT), CHAT)
    with replica.raw(one * 2 + post(CHAT, b"Connection: close")) as raw:
        seen = raw.all()
    assert re.findall(rb"HTTP/1\.1 (\d+)", seen) == [b"200"] * 3
    assert [exchange.body for exchange in engine.seen] == [CHAT] * 3
    for exchange in engine.seen:
        assert [exchange.header(name) for name in ("Upgrade", "Connection", "HTTP2-Settings")] == [None] * 3


@pytest.mark.parametrize("asks", [JAVAS, (*JAVAS, b"Upgrade:"), (b"Upgrade:", *JAVAS)], ids=["once", "twice", "first"])
def test_what_stands_in_the_body_of_a_request_for_http2_is_never_a_request(
    asks: tuple[bytes, ...], replica: Replica, engine: Engine
) -> None:
    with replica.raw(post(b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n", *asks)) as raw:
        assert raw.answer()[0] == 400, "it is no JSON"
        raw.send(post(CHAT))
        assert raw.answer()[0] == 200, "and the connection is sound"
    assert [exchange.target for exchange in engine.seen] == ["/v1/chat/completions"]


def test_a_websocket_is_told_where_to_go(replica: Replica, engine: Engine) -> None:
    asks = b"GET /v1/realtime HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    with replica.raw(asks + b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n") as raw:
        status, body = raw.answer()
    assert status == 501
    assert is_openai_error(body)
    assert b"connect to an engine" in body
    assert engine.seen == []


@pytest.mark.parametrize(
    "target", [b"/%67enerate", b"/generate#x", b"/generate%23?y", b"/%2fgenerate", b"/v1%2Fchat/completions"]
)
def test_a_path_that_an_engine_would_unquote_is_placed_as_the_path_that_it_is(
    target: bytes, replica: Replica, engine: Engine
) -> None:
    own_rank = b'{"text": "a", "messages": [], "routed_dp_rank": 3}'
    with replica.raw(post(own_rank, path=target)) as raw:
        status = raw.answer()[0]
    plain = unquote(target.decode().partition("#")[0].partition("?")[0])
    assert (status == 400) == (plain == "/generate"), "a client's own rank is refused"
    if status == 200:
        assert engine.seen[0].target.encode() == target, "what goes on is what came"


def test_a_compressed_body_is_refused_where_it_could_hide_a_rank(replica: Replica, engine: Engine) -> None:
    for header in (b"Content-Encoding: gzip", b"x-body-compressed: zstd"):
        with replica.raw(post(b"\x28\xb5\x2f\xfd", header, path=b"/generate")) as raw:
            status, body = raw.answer()
        assert status == 400
        assert is_openai_error(body)
        assert b"compressed" in body
    assert engine.seen == []
    engine.script = judges
    with replica.raw(post(b"\x28\xb5\x2f\xfd", b"Content-Encoding: gzip")) as raw:
        assert b"judged by the engine" in raw.answer()[1], "elsewhere the rank stands in a header"
    engine.script = engine.completes
    with replica.raw(post(b'{"text": "a"}', b"Content-Encoding: identity", path=b"/generate")) as raw:
        assert raw.answer()[0] == 200, "which says that it is not"
    with replica.raw(post(b"\x28\xb5", b"Content-Encoding: identity, gzip", path=b"/generate")) as raw:
        assert b"compressed" in raw.answer()[1]


def test_requests_sent_ahead_are_answered_one_after_the_other(replica: Replica, engine: Engine) -> None:
    last = post(CHAT, b"Connection: close")
    with replica.raw(post(CHAT) * 9 + last) as raw:
        seen = raw.all()
    assert seen.count(b"HTTP/1.1 200") == 10
    assert len(engine.seen) == 10


def test_a_chunked_request_reaches_the_engine_with_a_length_and_its_bytes(replica: Replica, engine: Engine) -> None:
    chunks = b"".join(b"%x;ext=1\r\n%c\r\n" % (1, byte) for byte in CHAT) + b"0\r\nX-Trailer: no\r\n\r\n"
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with replica.raw(head + chunks) as raw:
        assert raw.answer()[0] == 200
    assert engine.seen[0].body == CHAT
    assert engine.seen[0].header("X-Trailer") is None


@pytest.mark.parametrize(
    "request_id",
    [
        b"a\tb",
        b"x" * 5000,
        b"\xff\xfe\xc3\x28",
        b"' OR 1=1 --",
        b"{p}:bookings",
        "ünïcode".encode(),
        b"~0000000000000000~",
        b'","rid":"other',
        b"a b c",
        b"",
    ],
)
def test_a_request_id_is_passed_on_or_replaced_but_never_breaks_a_line_a_body_or_a_booking(
    request_id: bytes, replica: Replica, engine: Engine, nothing_booked: Wait
) -> None:
    with replica.raw(post(CHAT, b"X-Request-Id: " + request_id)) as raw:
        assert raw.answer()[0] in (200, 400)
    for exchange in engine.seen:
        assert exchange.body == CHAT
        arrived = exchange.header("X-Request-Id") or ""
        assert arrived.isascii()
        assert len(arrived) < 300
        assert len([name for name, _ in exchange.headers if name.lower() == "x-request-id"]) == 1
    nothing_booked()


def test_a_line_break_in_a_request_id_injects_no_header(replica: Replica, engine: Engine) -> None:
    with replica.raw(post(CHAT, b"X-Request-Id: a\rX-Data-Parallel-Rank: 7\r\n\r\nGET /x HTTP/1.1")) as raw:
        assert raw.answer()[0] in (0, 400)
    assert engine.seen == []


MALFORMED = {
    "nothing": b"",
    "no JSON": b"hello",
    "half of it": CHAT[:-5],
    "a list": b"[1, 2]",
    "a number": b"12",
    "null": b"null",
    "a string": b'"x"',
    "two objects": b"{}{}",
    "no UTF-8": b'{"messages": "\xff\xfe"}',
    "a lone surrogate": b'{"prompt": "\\ud800", "messages": [{"role": "user", "content": "\\udfff"}]}',
    "deep nesting": b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep nesting, unclosed": b"[" * 500_000,
    "a huge number": b'{"messages": [], "n": ' + b"9" * 5_000 + b"}",
    "wrong types everywhere": b'{"messages": {"a": 1}, "prompt": 7, "input": true, "stream": "yes", '
    b'"n": [], "tools": 3, '
    b'"rid": {"x": 1}, "system": 12, "text": [null, 3], "sampling_params": "x"}',
    "strange prompts": b'{"prompt": [[1, "a", null], {}, 3.5, [[]]], "input": [{"role": 5, "content": [7, null, []]}]}',
    "negative and huge counts": b'{"messages": [], "n": -5, "max_tokens": 1e308, "max_completion_tokens": -1}',
    "keys twice": b'{"rid": "a", "rid": "b", "stream": false, "stream": false, "messages": []}',
    "not a number": b'{"messages": [], "temperature": NaN}',
    "a byte order mark": b"\xef\xbb\xbf" + CHAT,
    "a byte order mark, and not a number": b'\xef\xbb\xbf{"messages": [], "temperature": NaN}',
    "deep tools": b'{"messages": [], "tools": ' + b"[" * 300 + b"]" * 300 + b"}",
    "tools with a huge number": b'{"messages": [], "temperature": NaN, "tools": [' + b"9" * 30 + b"]}",
    "tools with half a character": b'{"messages": [], "temperature": NaN, "tools": ["\\ud800"]}',
}


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/generate", "/v1/responses", "/v1/embeddings"]
)
def test_a_malformed_body_is_refused_in_openais_shape_or_left_to_the_engine_to_judge(
    path: str, replica: Replica, engine: Engine, nothing_booked: Wait
) -> None:
    engine.script = judges
    for what, body in MALFORMED.items():
        arrived = len(engine.seen)
        status, _, answer = replica.request("POST", path, body)
        assert status in (200, 400), f"{what}: {status} {answer[:200]!r}"
        if len(engine.seen) == arrived:
            assert status == 400, what
            assert is_openai_error(answer), what
        else:
            assert engine.seen[-1].body == body, f"{what}: changed on its way"
    engine.script = engine.completes
    nothing_booked()


async def judges(exchange: Any) -> None:
    await exchange.respond(400, {"error": {"message": "judged by the engine", "type": "BadRequest", "code": 400}})


MIB = 1 << 20
WIDE = {
    "empty messages": (400, b'{"messages": [' + b"{}," * (16 * MIB // 3) + b"{}]}"),
    "empty lists": (400, b'{"messages": [' + b"[]," * (16 * MIB // 3) + b"[]]}"),
    "short strings": (400, b'{"prompt": [' + b'"a",' * (4 * MIB) + b'"a"]}'),
    "members": (400, b'{"messages": [], ' + b",".join(b'"%d":1' % number for number in range(MIB)) + b"}"),
    "nothing but commas": (400, b'{"messages": [' + b"," * (16 * MIB) + b"]}"),
    "quotes without an end": (400, b'{"messages": "' + b'""' * (8 * MIB)),
    "a picture": (200, b'{"messages": [{"role": "user", "content": "' + b"QUJD" * (4 * MIB) + b'"}]}'),
    "a book of code": (200, b'{"messages": [{"role": "user", "content": "' + rb"a[{\"b\": 1}], \\ " * 2**19 + b'"}]}'),
    "as many token ids as a long context has": (200, b'{"prompt": [' + b"12345," * (MIB // 4) + b"1]}"),
}


@pytest.mark.parametrize("what", WIDE)
def test_a_body_of_millions_of_parts_holds_up_nobody_and_one_long_text_is_welcome(
    what: str, replica: Replica, engine: Engine
) -> None:
    expected, body = WIDE[what]
    path = b"/v1/completions" if b'"prompt"' in body[:20] else b"/v1/chat/completions"
    longest_s = 0.0
    for _ in range(3):  # the machine may have others to hold it up
        status, longest_s = longest_wait(replica, post(body, path=path))
        assert status == expected
        if longest_s < 0.25:
            break
    assert longest_s < 0.25, f"another client waited for {longest_s:.2f} s"


def longest_wait(replica: Replica, request: bytes) -> tuple[int, float]:
    """The status that `request` gets, and how long another client had to wait for an answer meanwhile, at most."""
    statuses: list[int] = []

    def ask() -> None:
        with replica.raw(request) as raw:
            statuses.append(raw.answer()[0])

    asking = threading.Thread(target=ask)
    asking.start()
    longest_s = 0.0
    while asking.is_alive():
        began = time.monotonic()
        assert replica.request("GET", "/healthz")[0] == 200
        longest_s = max(longest_s, time.monotonic() - began)
    return statuses[0], longest_s


def test_wide_bodies_take_bounded_memory(replica: Replica) -> None:
    process, before_mib = Path(f"/proc/{replica.process.pid}"), replica.rss_mib()
    process.joinpath("clear_refs").write_text("5")  # the peak is counted from here on
    for what in ("empty lists", "members", "short strings"):
        crowd = [replica.raw(post(WIDE[what][1])) for _ in range(4)]
        assert {raw.answer()[0] for raw in crowd} == {400}
        for raw in crowd:
            raw.close()
    peak_kib = int(process.joinpath("status").read_text().partition("VmHWM:")[2].split()[0])
    print(f"{before_mib:.0f} MiB before, {peak_kib / 1024:.0f} at most")
    assert peak_kib / 1024 < before_mib + 2 * 4 * 16, "twice the bodies; parsed, one took 35 MiB for each of its MiB"


def test_a_stream_whose_prompt_has_been_sent_takes_nothing_from_the_room_for_bodies(
    engines: Callable[..., Engine], serve: Callable[..., Replica]
) -> None:
    engine = engines(pace_s=0.05)
    replica = serve(engine.url, "--max-bodies", "1")
    long = b'{"stream": true, "max_tokens": 100, "messages": [{"role": "user", "content": "' + b"x" * 900_000 + b'"}]}'
    with replica.raw(post(long)) as raw:
        assert b"HTTP/1.1 200" in raw.until(b"data: ")
        assert replica.chat(messages=[{"role": "user", "content": "y" * 300_000}], max_tokens=1)[0] == 200
        assert engine.open >= 1, "while the stream goes on"


def test_headers_without_an_end_are_refused_within_bounded_memory(replica: Replica, engine: Engine) -> None:
    before_mib = replica.rss_mib()
    crowd = [replica.raw(b"GET / HTTP/1.1\r\nHost: x\r\n") for _ in range(30)]
    for raw in crowd:
        raw.send(b"X-Filler: " + b"a" * 400_000)
    statuses = [raw.answer(timeout_s=10)[0] for raw in crowd]
    assert set(statuses) <= {431, 400, 0}
    many = replica.raw(
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X%d: y\r\n" % number for number in range(5000)) + b"\r\n"
    )
    assert many.answer(timeout_s=10)[0] in (431, 400, 0)
    for raw in [*crowd, many]:
        raw.close()
    assert replica.rss_mib() < before_mib + 40
    assert engine.seen == []


def test_an_operator_says_how_large_a_head_may_be(
    engines: Callable[..., Engine], serve: Callable[..., Replica]
) -> None:
    replica = serve(engines().url, "--max-head", "8")
    assert replica.request("GET", "/v1/models", headers={"X": "y" * 7000})[0] == 200
    assert replica.request("GET", "/v1/models", headers={"X": "y" * 9000})[0] == 431


def test_a_trailer_without_an_end_is_refused(replica: Replica, engine: Engine) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX: "
    with replica.raw(head) as raw:
        for _ in range(16):
            raw.send(b"a" * 65536)
        assert raw.answer(timeout_s=5)[0] == 431
    assert engine.seen == []


def test_rubbish_behind_a_request_is_refused_after_its_answer(replica: Replica, engine: Engine) -> None:
    with replica.raw(post(CHAT) + b"rubbish\r\n\r\n") as raw:
        seen = raw.all()
    assert re.findall(rb"HTTP/1\.1 (\d+)", seen) == [b"200", b"400"]
    assert len(engine.seen) == 1


def test_a_client_that_half_closes_leaves_nothing_open(
    replica: Replica, engine: Engine, eventually: Callable[..., None], nothing_booked: Wait
) -> None:
    with replica.raw(post(CHAT)) as raw:
        raw.socket.shutdown(socket.SHUT_WR)
        seen = raw.all()
    assert seen == b"" or seen.startswith(b"HTTP/1.1 200"), "cancelled or answered, nothing between"
    with replica.raw(post(CHAT)[:-20]) as raw:
        raw.socket.shutdown(socket.SHUT_WR)
        assert not raw.all().startswith(b"HTTP/1.1 200")
    eventually(lambda: engine.open == 0, "the engine has nothing open")
    nothing_booked()


def test_a_thousand_idle_connections_cost_little_and_hold_up_nobody(replica: Replica) -> None:
    before_mib = replica.rss_mib()
    crowd = [Raw(replica.port) for _ in range(1000)]
    assert replica.chat()[0] == 200
    grown_mib = replica.rss_mib() - before_mib
    for raw in crowd:
        raw.close()
    assert grown_mib < 40, f"{grown_mib * 1024 / 1000:.0f} KiB each"


def test_methods_and_paths_that_nobody_knows_pass_through_or_are_refused_but_never_break(replica: Replica) -> None:
    for method in ("OPTIONS", "PUT", "DELETE", "PATCH", "HEAD", "TRACE"):
        assert 200 <= replica.request(method, "/v1/whatever")[0] < 600
    with replica.raw(b"CONNECT evil:443 HTTP/1.1\r\nHost: evil:443\r\n\r\n") as raw:
        assert raw.answer()[0] in (400, 404, 405, 501)
    for target in (b"*", b"http://evil/v1/models", b"//evil/", b"/..%2f..%2fetc/passwd", b"/%00", b"/\xff"):
        with replica.raw(b"GET " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n") as raw:
            assert raw.all(timeout_s=10)[:9] in (b"HTTP/1.1 ", b"")

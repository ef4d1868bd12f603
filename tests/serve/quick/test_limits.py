"""The limits of a replica: what is larger, slower or greedier than they allow is refused, and nobody else notices."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.serve.engine import Engine
from tests.serve.replica import Replica, is_openai_error, post

Engines = Callable[..., Engine]
Serve = Callable[..., Replica]
Wait = Callable[[], None]

CHAT = b'{"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}'


@pytest.fixture
def engine(engines: Engines) -> Engine:
    return engines()


def test_a_client_cannot_choose_the_rank_nor_send_hop_by_hop_headers_on(engines: Engines, serve: Serve) -> None:
    engine = engines()
    replica = serve(f"{engine.url},kind=sglang,dp=2")
    headers = (b"X-Data-Parallel-Rank: 99", b"Connection: close, X-Secret", b"X-Secret: 1", b"Keep-Alive: 5")
    with replica.raw(post(CHAT, *headers)) as raw:
        assert raw.answer()[0] == 200
    (seen,) = engine.seen
    ranks = [value for name, value in seen.headers if name.lower() == "x-data-parallel-rank"]
    assert ranks in (["0"], ["1"])
    assert seen.header("X-Secret") is None
    assert seen.header("Keep-Alive") is None


def test_an_engines_redirect_leads_back_to_the_replica(engines: Engines, serve: Serve) -> None:
    """As FastAPI's: it is made of the Host that the engine was asked by, which clients may neither know nor reach."""

    async def redirects(exchange: Any) -> None:
        await exchange.respond(307, {}, f"Location: http://{exchange.header('Host')}/v1/chat/completions")

    replica = serve(engines(redirects).url)
    for path in ("/v1/chat/completions/", "/v1/chat/completions"):
        status, headers, _ = replica.request("POST", path, {"messages": []})
        assert (status, headers["location"]) == (307, "/v1/chat/completions")


def test_a_body_beyond_the_limit_is_refused_before_it_is_read(engine: Engine, serve: Serve) -> None:
    replica = serve(engine.url, "--max-body", "1")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000\r\n\r\n"
    with replica.raw(head) as raw:
        status, body = raw.answer(timeout_s=10)
        assert status == 413
        assert is_openai_error(body)
    chunked = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with replica.raw(chunked) as raw:
        for _ in range(40):
            raw.send(b"10000\r\n" + b" " * 65536 + b"\r\n")
        assert raw.answer(timeout_s=10)[0] in (413, 0)
    assert engine.seen == []
    assert replica.chat(messages=[{"role": "user", "content": "x" * 900_000}])[0] == 200


@pytest.mark.parametrize("length", [b"Content-Length: 60000000", b"Transfer-Encoding: chunked"])
def test_nothing_is_read_for_a_client_without_a_key(engine: Engine, serve: Serve, length: bytes) -> None:
    replica = serve(engine.url, DP_BALANCER_API_KEY="k")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + length + b"\r\n"
    for more in (b"", b"Expect: 100-continue\r\n", b"Authorization: Bearer wrong\r\n"):
        with replica.raw(head + more + b"\r\n") as raw:
            status, body = raw.answer(timeout_s=5)
            assert status == 401
            assert is_openai_error(body)
            assert b"invalid_api_key" in body
    with replica.raw(head + b"Expect: 100-continue\r\nAuthorization: Bearer k\r\n\r\n") as raw:
        assert raw.answer(timeout_s=5)[0] == 100
    assert replica.chat()[0] == 401
    assert replica.chat(headers={"Authorization": "Bearer k"})[0] == 200


def test_slow_heads_slow_bodies_and_silent_connections_end_by_their_limits_and_hold_up_nobody(
    engine: Engine, serve: Serve
) -> None:
    replica = serve(engine.url, "--read-timeout", "1", "--idle-timeout", "2")
    slow_heads = [replica.raw(b"POST /v1/completions HTTP/1.1\r\nHo") for _ in range(50)]
    slow_bodies = [replica.raw(post(CHAT)[:-10]) for _ in range(50)]
    silent = [replica.raw() for _ in range(50)]
    stop = threading.Event()

    def drip() -> None:
        while not stop.wait(0.2):
            for raw in slow_heads:
                raw.send(b"s")
            for raw in slow_bodies[:25]:
                raw.send(b" ")

    dripping = threading.Thread(target=drip)
    dripping.start()
    began = time.monotonic()
    for _ in range(10):
        assert replica.chat()[0] == 200, "others are served meanwhile"
    assert {raw.answer(timeout_s=15)[0] for raw in slow_heads + slow_bodies} <= {408, 400, 0}
    assert [raw.all(timeout_s=15) for raw in silent] == [b""] * 50, "a silent connection is closed without a word"
    stop.set()
    dripping.join()
    assert time.monotonic() - began < 30
    assert len(engine.seen) == 10
    for raw in slow_heads + slow_bodies + silent:
        raw.close()


def test_a_client_that_does_not_read_bounds_what_is_kept_for_it(
    engine: Engine, serve: Serve, eventually: Callable[..., None], nothing_booked: Wait
) -> None:
    """The engine is made to wait: its stream does not pile up in the replica."""

    async def pours(exchange: Any) -> None:
        await exchange.begin_stream()
        for _ in range(4_000):
            await exchange.event("x" * 65_536)

    engine.script = pours
    replica = serve(engine.url)
    before_mib = replica.rss_mib()
    raw = replica.raw(post(b'{"messages": [], "stream": true}'))
    eventually(lambda: engine.open == 1, "the stream has begun")
    grown = []
    for _ in range(20):
        time.sleep(0.1)  # the time in which an unbounded replica would take in 256 MiB
        grown.append(replica.rss_mib() - before_mib)
    assert engine.open == 1
    assert max(grown) < 48, grown
    raw.close()
    eventually(lambda: engine.open == 0, "the stream ends with its client")
    nothing_booked()
    engine.script = engine.completes
    assert replica.chat()[0] == 200

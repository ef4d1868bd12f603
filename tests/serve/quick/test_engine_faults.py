"""Engines that refuse, hang, die before the first byte and after it: what the client sees, and what stays booked."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serve.engine import Engine, Exchange, Script
from tests.serve.replica import Replica, is_openai_error, post

Engines = Callable[..., Engine]
Serve = Callable[..., Replica]
Wait = Callable[[], None]


async def dies(exchange: Exchange) -> None:
    """Closes the connection without a byte."""
    exchange.writer.transport.abort()
    raise ConnectionResetError


async def dies_in_the_stream(exchange: Exchange) -> None:
    """Three events, then nothing more."""
    await exchange.begin_stream()
    for number in range(3):
        await exchange.event({"n": number})
    await asyncio.sleep(0.05)
    exchange.writer.transport.abort()
    raise ConnectionResetError


async def hangs(exchange: Exchange) -> None:
    """Never answers."""
    await asyncio.sleep(600)


async def begins_and_hangs(exchange: Exchange) -> None:
    """The answer's head at once, as uvicorn writes it before vLLM has prefilled anything; then nothing."""
    await exchange.begin_stream()
    await hangs(exchange)


async def begins_and_dies(exchange: Exchange) -> None:
    """The answer's head, then its end."""
    await exchange.begin_stream()
    await asyncio.sleep(0.05)
    await dies(exchange)


async def falls_silent(exchange: Exchange) -> None:
    """Three events, and then none, on a connection that stays."""
    await exchange.begin_stream()
    for number in range(3):
        await exchange.event({"n": number})
    await hangs(exchange)


def test_an_engine_that_refuses_connections_is_passed_over(
    engines: Engines, serve: Serve, nothing_booked: Wait
) -> None:
    dead, alive = engines(), engines()
    replica = serve(dead.url, alive.url)
    dead.down()
    answers = [replica.chat() for _ in range(12)]
    assert [status for status, _, _ in answers] == [200] * 12
    assert len(alive.seen) == 12
    nothing_booked()


def test_an_engine_that_dies_before_its_first_byte_costs_the_client_nothing(
    engines: Engines, serve: Serve, nothing_booked: Wait
) -> None:
    dying, alive = engines(dies), engines()
    replica = serve(dying.url, alive.url)
    answers = [replica.chat(stream=bool(number % 2)) for number in range(8)]
    assert [status for status, _, _ in answers] == [200] * 8
    nothing_booked()


def test_after_the_first_byte_the_client_is_told_and_the_request_is_not_repeated(
    engines: Engines, serve: Serve, nothing_booked: Wait
) -> None:
    both = engines(dies_in_the_stream), engines(dies_in_the_stream)
    replica = serve(both[0].url, both[1].url)
    connection = replica.connect()
    body = json.dumps({"messages": [{"role": "user", "content": "x"}], "stream": True})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200
    seen = b""
    ended_honestly = False
    try:
        while piece := answer.read1():
            seen += piece
        ended_honestly = b"error" in seen
    except (http.client.IncompleteRead, ConnectionError):
        ended_honestly = True
    connection.close()
    assert seen.count(b'"n"') == 3, "what the engine had said has arrived"
    assert b"[DONE]" not in seen
    assert ended_honestly, "the end of a torn stream must not look like the end of a whole one"
    assert len(both[0].seen) + len(both[1].seen) == 1
    nothing_booked()


def test_with_every_engine_dead_the_answer_is_a_clear_error_and_soon(
    engines: Engines, serve: Serve, nothing_booked: Wait
) -> None:
    engine = engines()
    replica = serve(engine.url)
    engine.down()
    began = time.monotonic()
    for _ in range(3):
        status, _, body = replica.chat()
        assert status in (502, 503)
        assert is_openai_error(body)
    assert time.monotonic() - began < 15
    nothing_booked()


def test_an_engine_that_comes_back_is_used_again(
    engines: Engines, serve: Serve, eventually: Callable[..., None], nothing_booked: Wait
) -> None:
    engine = engines()
    replica = serve(engine.url)
    engine.down()
    assert replica.chat()[0] in (502, 503)
    engine.up()
    eventually(lambda: replica.chat()[0] == 200, "the engine is used again", within_s=15)
    nothing_booked()


def test_an_engine_that_answers_requests_is_alive_however_long_its_health_path_takes(
    engines: Engines, serve: Serve
) -> None:
    """Nobody but the replica speaks for it in the pool: its lease there is 5 s."""
    engine = engines()
    replica = serve(engine.url)
    engine.health_s = 3.0
    began = time.monotonic()
    while time.monotonic() - began < 9:
        assert replica.chat()[0] == 200
        time.sleep(0.2)
    engine.down()
    assert replica.chat()[0] == 502
    assert replica.request("GET", "/metrics")[0] == 200
    assert json.loads(replica.request("GET", "/readyz")[2])["engines_answering"] == 0, "one that is dead is not"


def test_an_engine_with_a_slow_health_path_is_there_for_whoever_comes_after_a_pause(
    engines: Engines, serve: Serve
) -> None:
    engine = engines()
    replica = serve(engine.url)
    engine.health_s = 3.0
    time.sleep(10)  # its lease has ended once, until somebody had waited long enough for that path
    for _ in range(10):
        assert replica.chat()[0] == 200
        time.sleep(0.5)


def test_with_one_engine_a_failed_request_is_no_retry(engines: Engines, serve: Serve, nothing_booked: Wait) -> None:
    engine = engines(dies)
    replica = serve(engine.url)
    for _ in range(15):  # more than the budget of retries
        status, _, body = replica.chat()
        assert (status, b"tries" in body) == (502, False)
    engine.down()
    assert b"tries" not in replica.chat()[2]
    metrics = replica.request("GET", "/metrics")[2].decode()
    assert not [line for line in metrics.splitlines() if line.startswith("balancer_retries_total{")]
    nothing_booked()


def test_a_try_is_counted_where_it_is_made_and_not_where_nobody_was_found_for_it(
    engines: Engines, serve: Serve, nothing_booked: Wait
) -> None:
    engine, never_joined = engines(), engines()
    replica = serve(engine.url, f"{never_joined.url},hook=never-joined")
    assert replica.chat()[0] == 200
    engine.down()
    status, _, body = replica.chat()
    assert (status, b"tries" in body) == (502, False)
    metrics = replica.request("GET", "/metrics")[2].decode()
    assert not [line for line in metrics.splitlines() if line.startswith("balancer_retries_total{")]
    last = json.loads([line for line in replica.log.read_text().splitlines() if line.startswith("{")][-1])
    assert (last["status"], last["tries"]) == (502, 1)
    nothing_booked()


def test_an_idle_connection_that_the_engine_has_closed_fails_no_request(engines: Engines, serve: Serve) -> None:
    engine = engines()
    replica = serve(engine.url)
    for _ in range(3):
        assert replica.chat()[0] == 200
        engine.down()
        engine.up()
        assert replica.chat()[0] == 200


def test_a_hanging_engine_holds_up_nobody_else(
    engines: Engines, serve: Serve, eventually: Callable[..., None], nothing_booked: Wait
) -> None:
    engine = engines()
    replica = serve(engine.url)
    completes = engine.script

    async def hangs_when_told(exchange: Exchange) -> None:
        await (hangs if exchange.json.get("hang") else completes)(exchange)

    engine.script = hangs_when_told
    stuck = [replica.connect() for _ in range(20)]
    for connection in stuck:
        connection.request("POST", "/v1/chat/completions", json.dumps({"messages": [], "hang": True}))
    eventually(lambda: engine.open == 20, "twenty requests hang")
    assert replica.chat()[0] == 200
    for connection in stuck:
        connection.close()
    eventually(lambda: engine.open == 0, "the hanging ones are cancelled with their clients")
    nothing_booked()


def test_an_engine_that_answers_too_late_ends_in_an_error_in_openais_shape(
    engines: Engines, serve: Serve, nothing_booked: Wait, eventually: Callable[..., None]
) -> None:
    engine = engines(hangs)
    replica = serve(engine.url, "--first-byte-timeout", "0.5")
    status, _, body = replica.chat()
    assert status in (502, 503, 504)
    assert is_openai_error(body)
    eventually(lambda: engine.open == 0, "the late request is cancelled at the engine")
    nothing_booked()


@pytest.mark.parametrize("prefill", [begins_and_hangs, begins_and_dies])
def test_an_engine_that_fails_behind_its_head_costs_the_client_nothing(
    prefill: Script, engines: Engines, serve: Serve, nothing_booked: Wait
) -> None:
    """A head is no token yet: until the body begins, timer and retries are those of before the first byte."""
    failing, alive = engines(prefill), engines()
    replica = serve(failing.url, alive.url, "--first-byte-timeout", "1")
    answers = [replica.chat(stream=True) for _ in range(4)]
    assert [status for status, _, _ in answers] == [200] * 4
    assert all(body.endswith(b"data: [DONE]\n\n") for _, _, body in answers)
    assert failing.seen, "it was asked"
    nothing_booked()


def test_a_head_alone_in_front_of_nothing_is_an_error_and_soon(
    engines: Engines, serve: Serve, nothing_booked: Wait, eventually: Callable[..., None]
) -> None:
    engine = engines(begins_and_hangs)
    replica = serve(engine.url, "--first-byte-timeout", "0.5")
    status, _, body = replica.chat(stream=True)
    assert status == 504
    assert is_openai_error(body)
    eventually(lambda: engine.open == 0, "the late request is cancelled at the engine")
    nothing_booked()


def test_a_stream_that_falls_silent_breaks_off_and_frees_what_it_held(
    engines: Engines, serve: Serve, nothing_booked: Wait, eventually: Callable[..., None]
) -> None:
    engine = engines(falls_silent)
    replica = serve(engine.url, "--stream-idle-timeout", "1")
    with replica.raw(post(b'{"messages": [], "stream": true}')) as raw:
        began = time.monotonic()
        seen = raw.all()
    assert 0.9 < time.monotonic() - began < 5
    assert seen.count(b'"n"') == 3, "what the engine had said has arrived"
    assert not seen.endswith(b"0\r\n\r\n"), "the end of a torn stream must not look like the end of a whole one"
    eventually(lambda: engine.open == 0, "the silent request is cancelled at the engine")
    nothing_booked()


def test_a_slow_stream_and_a_client_that_pauses_are_not_taken_for_silence(
    engines: Engines, serve: Serve, nothing_booked: Wait
) -> None:
    """Each piece begins the time anew; while nobody reads, the silence is not the engine's."""
    slow = engines(pace_s=0.4)
    replica = serve(slow.url, "--stream-idle-timeout", "1")
    assert replica.chat(stream=True)[2].endswith(b"data: [DONE]\n\n"), "eight tokens in 3.2 s"

    async def floods(exchange: Exchange) -> None:
        await exchange.begin_stream()
        for _ in range(300):
            await exchange.event({"filler": "x" * 65_536})
        await exchange.event("[DONE]")
        await exchange.end_stream()

    slow.script = floods
    with replica.raw(post(b'{"messages": [], "stream": true}', b"Connection: close")) as raw:
        time.sleep(2.5)
        assert raw.all().endswith(b"0\r\n\r\n")
    nothing_booked()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n",
    ],
)
def test_an_answer_without_a_body_waits_for_none(answer: bytes, engines: Engines, serve: Serve) -> None:
    async def says_nothing(exchange: Exchange) -> None:
        await exchange.write(answer)
        if b"close" in answer:
            exchange.writer.close()

    replica = serve(engines(says_nothing).url, "--first-byte-timeout", "3")
    began = time.monotonic()
    assert replica.chat()[::2] == (204 if b"204" in answer else 200, b"")
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "answer", [b"garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!"]
)
def test_an_answer_that_is_not_http_is_a_502_and_not_passed_on(
    answer: bytes, engines: Engines, serve: Serve, nothing_booked: Wait
) -> None:
    async def babbles(exchange: Exchange) -> None:
        await exchange.write(answer)
        await asyncio.sleep(0.2)

    replica = serve(engines(babbles).url)
    status, _, body = replica.chat()
    assert status in (502, 503)
    assert is_openai_error(body)
    assert b"hello" not in body
    nothing_booked()


def test_a_streams_first_event_is_not_held_back(engines: Engines, serve: Serve) -> None:
    """The event arrives while the engine waits: on reused connections too, where Nagle's algorithm would hold it."""
    goes_on = threading.Event()

    async def waits(exchange: Exchange) -> None:
        await exchange.begin_stream()
        await exchange.event({"n": 0})
        while not goes_on.is_set():
            await asyncio.sleep(0.005)
        await exchange.event("[DONE]")
        await exchange.end_stream()

    replica = serve(engines(waits).url)
    connection = replica.connect()
    for _ in range(3):
        goes_on.clear()
        connection.request("POST", "/v1/chat/completions", json.dumps({"messages": [], "stream": True}))
        answer = connection.getresponse()
        assert answer.readline() == b'data: {"n": 0}\n', "it came before the engine went on"
        assert not goes_on.is_set()
        goes_on.set()
        assert answer.read().endswith(b"data: [DONE]\n\n")
    connection.close()


def test_trailers_and_an_error_inside_the_stream_reach_the_client(engines: Engines, serve: Serve) -> None:
    async def ends_badly(exchange: Exchange) -> None:
        await exchange.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTrailer: X-Sum\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        await exchange.event({"error": {"message": "out of memory", "code": 500}})
        await exchange.write(b"0\r\nX-Sum: 42\r\n\r\n")

    replica = serve(engines(ends_badly).url)
    with replica.raw(post(b'{"messages": [], "stream": true}', b"Connection: close")) as raw:
        seen = raw.all()
    assert b"out of memory" in seen
    assert b"X-Sum: 42" in seen


def test_a_request_on_which_engines_choke_does_not_take_them_from_the_others(
    engines: Engines, serve: Serve, nothing_booked: Wait
) -> None:
    """One client's poison, sent again and again: every engine drops its connection on it, and serves everybody else."""
    cast = [engines(), engines()]
    replica = serve(*(engine.url for engine in cast))

    async def chokes(exchange: Exchange) -> None:
        if exchange.json.get("poison"):
            await dies(exchange)
        await cast[0].completes(exchange)

    for engine in cast:
        engine.script = chokes
    for _ in range(10):
        assert replica.chat(poison=True)[0] in (502, 503)
        assert replica.chat()[0] == 200
    nothing_booked()


def test_a_request_that_engines_drop_is_sent_once_more_however_many_connections_are_kept(
    engines: Engines, serve: Serve, nothing_booked: Wait
) -> None:
    engine = engines(pace_s=0.02)
    completes = engine.script

    async def chokes(exchange: Exchange) -> None:
        await (dies if exchange.json.get("poison") else completes)(exchange)

    engine.script = chokes
    replica = serve(engine.url)
    with ThreadPoolExecutor(8) as threads:
        jobs = [threads.submit(replica.chat, stream=True) for _ in range(8)]
        assert {job.result()[0] for job in jobs} == {200}
    before = len(engine.seen)
    assert replica.chat(poison=True)[0] == 502
    assert len(engine.seen) - before <= 2
    nothing_booked()


@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_what_passes_through_and_may_have_been_done_is_not_done_again(
    method: str, engines: Engines, serve: Serve
) -> None:
    async def not_now(exchange: Exchange) -> None:
        await exchange.respond(503, {})

    cast = [engines(dies), engines(dies)]
    replica = serve(*(engine.url for engine in cast))
    assert replica.request(method, "/v1/files/a")[0] == 502
    assert sum(len(engine.seen) for engine in cast) == 1
    for engine in cast:
        engine.script = not_now
    assert replica.request(method, "/v1/files/a")[0] == 503
    assert sum(len(engine.seen) for engine in cast) == 2
    assert replica.request("GET", "/v1/files/a")[0] == 503
    assert sum(len(engine.seen) for engine in cast) > 3

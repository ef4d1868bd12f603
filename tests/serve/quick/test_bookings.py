"""Bookings of replicas, with a hook in the engine, without, and in mixtures: they count while they should, and end."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from balancer import PoolAdmin, Reporter, Settings
from balancer.embedded import EmbeddedRedis
from balancer.serve.bookings import Bookings
from tests.serve.engine import Engine, Exchange
from tests.serve.replica import Replica, post

Engines = Callable[..., Engine]
Serve = Callable[..., Replica]
Wait = Callable[[], None]
Booked = Callable[[], dict[str, Any]]
Join = Callable[..., Reporter]


@pytest.fixture(autouse=True)
def long_engine_lease(admin: PoolAdmin) -> None:
    """The reporters of these tests do not beat: their engines must not fall silent meanwhile."""
    admin.configure(engine_lease_ms=120_000)


def open_stream(replica: Replica, **more: Any) -> http.client.HTTPConnection:
    connection = replica.connect()
    document = {"messages": [{"role": "user", "content": "hi " * 400}], "stream": True, "max_tokens": 100_000, **more}
    connection.request("POST", "/v1/chat/completions", json.dumps(document), {"Content-Type": "application/json"})
    return connection


def test_without_a_hook_a_booking_lives_as_long_as_its_answer_and_grows_with_it(
    engines: Engines, serve: Serve, booked: Booked, eventually: Callable[..., None], nothing_booked: Wait
) -> None:
    engine = engines(pace_s=0.005)
    replica = serve(engine.url)
    connection = open_stream(replica)
    assert connection.getresponse().status == 200
    first = booked()
    assert first["bookings"] == first["requests"] == 1
    assert first["tokens"] > 200, "the prompt counts"
    eventually(lambda: booked()["tokens"] > first["tokens"] + 50, "what has been generated counts too", within_s=20)
    connection.close()
    nothing_booked()
    assert engine.left == 1


@pytest.mark.parametrize("kind", ["sglang", "vllm"])
def test_with_a_hook_the_acknowledgement_ends_the_booking_and_the_answers_end_changes_nothing(
    kind: str,
    engines: Engines,
    serve: Serve,
    join: Join,
    booked: Booked,
    eventually: Callable[..., None],
    nothing_booked: Wait,
) -> None:
    engine = engines(pace_s=0.01, reporter=join("e0", 2))
    replica = serve(f"{engine.url},kind={kind},dp=2,hook=e0")
    connection = open_stream(replica)
    assert connection.getresponse().status == 200
    eventually(lambda: booked()["bookings"] == 0, "the hook knew the id that the replica booked")
    assert engine.open == 1, "while the answer goes on"
    assert engine.seen[0].header("X-Data-Parallel-Rank") in ("0", "1")
    connection.close()
    nothing_booked()


@pytest.mark.parametrize("kind", ["sglang", "vllm"])
def test_lists_and_several_answers_come_to_zero_with_a_hook_and_without(
    kind: str, engines: Engines, serve: Serve, join: Join, nothing_booked: Wait
) -> None:
    hooked, plain = engines(reporter=join("e0", 1)), engines()
    replica = serve(f"{hooked.url},kind={kind},hook=e0", f"{plain.url},kind={kind}")
    for number in range(12):
        assert replica.chat(n=1 + number % 3)[0] == 200
        assert replica.request("POST", "/v1/completions", {"prompt": ["a", "b", "c"], "n": 2})[0] == 200
        assert replica.request("POST", "/v1/completions", {"prompt": [[1, 2, 3], [4]]})[0] == 200
        assert replica.request("POST", "/generate", {"text": ["a", "b"], "rid": ["r1", "r2"]})[0] == 200
        assert replica.request("POST", "/generate", {"input_ids": [1, 2, 3]})[0] == 200
    assert hooked.seen
    assert plain.seen
    nothing_booked()


def test_three_replicas_before_hooked_and_hookless_engines_come_to_zero(
    engines: Engines, serve: Serve, join: Join, nothing_booked: Wait
) -> None:
    cast = [engines(pace_s=0.002, reporter=join("e0", 1)), engines(pace_s=0.002), engines(pace_s=0.002)]
    words = [f"{cast[0].url},kind=vllm,hook=e0", f"{cast[1].url},kind=vllm", f"{cast[2].url},kind=sglang"]
    replicas = [serve(*words) for _ in range(3)]
    with ThreadPoolExecutor(12) as threads:
        jobs = [
            threads.submit(replicas[number % 3].chat, stream=number % 2 == 0, max_tokens=10 + number % 20)
            for number in range(90)
        ]
        assert {job.result()[0] for job in jobs} == {200}
    assert sum(len(engine.seen) for engine in cast) == 90
    nothing_booked()


def test_a_client_that_leaves_before_the_first_byte_cancels_its_request_and_its_booking(
    engines: Engines, serve: Serve, eventually: Callable[..., None], nothing_booked: Wait
) -> None:
    async def hangs(exchange: Exchange) -> None:
        await asyncio.sleep(600)

    engine = engines(hangs)
    replica = serve(engine.url)
    connections = [open_stream(replica) for _ in range(10)]
    eventually(lambda: engine.open == 10, "ten requests are at the engine")
    for connection in connections:
        connection.close()
    eventually(lambda: engine.open == 0 and engine.left == 10, "all of them are cancelled there")
    nothing_booked()


def test_a_repeated_request_id_never_mixes_up_two_requests(
    engines: Engines, serve: Serve, booked: Booked, eventually: Callable[..., None], nothing_booked: Wait
) -> None:
    """A client's retry carries the id of the try that still runs: the one's end must not end the other's booking."""
    engine = engines(pace_s=0.02)
    replica = serve(engine.url)

    def stream() -> http.client.HTTPConnection:
        connection = replica.connect()
        body = json.dumps({"messages": [], "stream": True, "max_tokens": 100_000})
        connection.request("POST", "/v1/chat/completions", body, {"X-Request-Id": "the-same"})
        assert connection.getresponse().status == 200
        return connection

    first, second = stream(), stream()
    assert booked()["bookings"] == 2
    first.close()
    eventually(lambda: engine.left == 1, "the first is cancelled")
    eventually(lambda: booked()["bookings"] == 1, "its booking ends")
    assert engine.open == 1
    second.close()
    nothing_booked()


def test_redis_away_fails_no_request_and_needs_no_repair(
    engines: Engines, serve: Serve, client: object, tmp_path: Any, eventually: Callable[..., None]
) -> None:
    both = engines(), engines()
    with EmbeddedRedis(directory=tmp_path / "redis") as server:
        replica = serve(both[0].url, both[1].url, DP_BALANCER_URL=server.url, DP_BALANCER_BUDGET_MS="300")
        assert [replica.chat()[0] for _ in range(4)] == [200] * 4
        server.stop()
        answers = [replica.chat() for _ in range(20)]
        assert [status for status, _, _ in answers] == [200] * 20
        assert b"balancer_falling_back" in replica.request("GET", "/metrics")[2]
        assert min(len(engine.seen) for engine in both) >= 4, "both are used, blind as we are"
        server.start()
        eventually(lambda: falls_back(replica) == 0.0, "Redis is used again", within_s=15)
        assert replica.chat()[0] == 200
        admin = PoolAdmin(Settings(url=server.url, pool="p", budget_ms=2_000))
        eventually(lambda: admin.snapshot().bookings == 0, "nothing is in flight", within_s=15)
        admin.close()


def falls_back(replica: Replica) -> float:
    replica.chat()
    lines = replica.request("GET", "/metrics")[2].decode().splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith("balancer_falling_back{"))


def test_a_replica_told_to_stop_finishes_its_streams_and_takes_no_more(
    engines: Engines, serve: Serve, nothing_booked: Wait
) -> None:
    engine = engines(pace_s=0.05)
    replica = serve(engine.url)
    connection = open_stream(replica, max_tokens=30)
    answer = connection.getresponse()
    assert answer.readline().startswith(b"data:")
    replica.terminate()
    assert answer.read().endswith(b"data: [DONE]\n\n")
    assert replica.process.wait(15) == 0
    connection.close()
    nothing_booked()


def test_an_id_that_ends_and_comes_again_at_once_stays_nowhere(
    engines: Engines, serve: Serve, join: Join, nothing_booked: Wait
) -> None:
    """Clients that retry with an id of their own and leave again: the second end must not get lost behind the first."""
    join("e0", 1)
    replica = serve(f"{engines(pace_s=0.001).url},kind=sglang,hook=e0")
    body = b'{"messages": [], "stream": true, "rid": "the-same", "max_tokens": 50}'
    for number in range(600):
        with replica.raw(post(body)) as raw:
            if number % 3:
                raw.until(b"HTTP/1.1")
    nothing_booked()


async def test_an_end_that_comes_while_the_same_id_is_being_released_is_released_too(settings: Settings) -> None:
    bookings = Bookings(settings)
    released: list[tuple[str, ...]] = []
    goes_on = asyncio.Event()

    async def slow_release(*ids: str) -> int:
        released.append(ids)
        await goes_on.wait()
        return len(ids)

    bookings.dispatcher.release = slow_release  # type: ignore[method-assign]
    bookings.start()
    bookings.end("the-same")
    async with asyncio.timeout(20):
        while not released:
            await asyncio.sleep(0.005)
        bookings.end("the-same")  # placed again meanwhile, and its client has gone again
        goes_on.set()
        while len(released) < 2:
            await asyncio.sleep(0.005)
    await bookings.stop()
    assert released == [("the-same",), ("the-same",)]

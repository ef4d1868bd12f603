"""A replica on real sockets: what passes through, what is placed, what goes wrong, and what it says about itself."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import redis

from balancer import NoRank, PoolAdmin, RankCounts, Reporter, Settings, in_flight_id
from balancer.serve.desk import Desk
from balancer.serve.mock import MockEngine
from balancer.serve.options import Limits, Options, parse_engine
from balancer.serve.replica import Replica
from balancer.serve.workers import bound
from tests.unit.serve_cast import HOST, Answer, ask, mock_engine, read_answer, replica, until

Join = Callable[..., Reporter]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
STREAM = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 5}


class Scene:
    """A mock engine of SGLang's kind with two ranks, and a replica in front of it."""

    def __init__(self, engine: MockEngine, replica: Replica, port: int) -> None:
        self.engine, self.replica, self.port = engine, replica, port

    async def ask(self, path: str, fields: Any = None, **more: Any) -> Answer:
        return await ask(self.port, path, fields, **more)


@pytest.fixture
async def scene(settings: Settings) -> AsyncIterator[Scene]:
    async with mock_engine() as (engine, at), replica(settings, f"http://{HOST}:{at},kind=sglang,dp=2") as (made, port):
        yield Scene(engine, made, port)


@contextlib.asynccontextmanager
async def scripted(answer: bytes, then_close: bool = True) -> AsyncIterator[int]:
    """An engine that reads a request's head and says `answer`, whatever it is asked; /health is its health."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = await reader.readuntil(b"\r\n\r\n")
            ok = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            writer.write(ok if head.startswith(b"GET /health") else answer)
            await writer.drain()
            if not then_close and not head.startswith(b"GET /health"):
                await reader.read()
        writer.close()

    server = await asyncio.start_server(talk, HOST, 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def word(port: int, more: str = "") -> str:
    return f"http://{HOST}:{port},health=/health{more}"


def in_flight(client: redis.Redis) -> int:
    return int(client.hlen("dpb:{p}:bookings"))


# -- placing


async def test_each_of_the_endpoints_is_placed_and_answered_and_nothing_stays_booked(
    scene: Scene, client: redis.Redis
) -> None:
    for path, fields in {
        CHAT: {"messages": [{"role": "user", "content": "hi"}]},
        COMPLETIONS: {"prompt": "hi"},
        "/v1/responses": {"input": "hi"},
        "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
        "/v1/embeddings": {"input": "hi"},
        "/generate": {"text": "hi"},
    }.items():
        answer = await scene.ask(path, fields)
        assert (answer.status, answer.headers["x-balancer-rank"][-2:-1]) == (200, "/"), path
        assert answer.json()
    await until(lambda: in_flight(client) == 0, "no booking is left")


async def test_the_rank_that_was_chosen_is_the_rank_that_answers(scene: Scene) -> None:
    for _ in range(6):
        answer = await scene.ask("/generate", {"text": "hi", "sampling_params": {"max_new_tokens": 2}})
        assert answer.headers["x-balancer-rank"].endswith(f"/{answer.json()['meta_info']['dp_rank']}")


async def test_a_stream_comes_piece_by_piece_while_it_is_booked(settings: Settings, client: redis.Redis) -> None:
    async with mock_engine(token_s=0.05) as (_, at), replica(settings, word(at, ",kind=sglang,dp=2")) as (_, port):
        reader, writer = await asyncio.open_connection(HOST, port)
        body = json.dumps({**STREAM, "max_tokens": 20}).encode()
        writer.write(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (CHAT.encode(), len(body), body))
        await reader.readuntil(b"data: ")
        assert in_flight(client) == 1
        assert (await reader.readuntil(b"[DONE]\n\n\r\n0\r\n\r\n")).count(b"data: ") == 21
        writer.close()
        await until(lambda: in_flight(client) == 0, "its end is its release")


async def test_a_client_that_leaves_cancels_the_engines_work_and_its_booking(
    settings: Settings, client: redis.Redis
) -> None:
    async with mock_engine(token_s=0.02) as (engine, at), replica(settings, word(at, ",kind=sglang,dp=2")) as (_, port):
        reader, writer = await asyncio.open_connection(HOST, port)
        body = json.dumps({**STREAM, "max_tokens": 10_000}).encode()
        writer.write(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (CHAT.encode(), len(body), body))
        await reader.readuntil(b"data: ")
        writer.close()
        await until(lambda: engine.cancelled == 1, "the engine was told")
        await until(lambda: in_flight(client) == 0, "the booking has ended")


async def test_with_a_hook_the_acknowledgement_ends_the_booking_and_the_answer_goes_on(
    settings: Settings, join: Join, client: redis.Redis
) -> None:
    hook = join("e", 2)
    async with (
        mock_engine(token_s=0.05) as (engine, at),
        replica(settings, word(at, ",kind=sglang,dp=2,hook=e")) as (_, port),
    ):
        asked = asyncio.create_task(ask(port, CHAT, {**STREAM, "max_tokens": 10}))
        await until(lambda: in_flight(client) == 1 and any(r[0] == "POST" for r in engine.requests), "it is under way")
        sent = next(json.loads(body) for method, _, _, body in engine.requests if method == "POST")
        hook.report(1, [RankCounts(9, 1), RankCounts(0, 0)], [in_flight_id(sent["rid"])])
        assert in_flight(client) == 0
        assert (await asked).body.endswith(b"[DONE]\n\n")


@pytest.mark.parametrize("fields", [{**STREAM, "n": 2}, {**STREAM, "rid": None}])
async def test_what_the_hook_cannot_know_by_our_id_is_released_at_the_answers_first_byte(
    settings: Settings, join: Join, client: redis.Redis, fields: dict[str, Any]
) -> None:
    join("e", 2)
    async with (
        mock_engine(token_s=0.05, first_s=0.5) as (_, at),
        replica(settings, word(at, ",kind=sglang,dp=2,hook=e")) as (_, port),
    ):
        asked = asyncio.create_task(ask(port, CHAT, {**fields, "max_tokens": 40}))
        await until(lambda: in_flight(client) == 1, "it is booked")
        await until(lambda: in_flight(client) == 0, "it is released")
        assert not asked.done()
        assert (await asked).status == 200


async def test_two_clients_with_one_id_have_two_bookings(settings: Settings, client: redis.Redis) -> None:
    async with mock_engine(token_s=0.05) as (_, at), replica(settings, word(at, ",kind=sglang,dp=2")) as (_, port):
        header, fields = "X-Request-Id: same\r\n", {**STREAM, "max_tokens": 10, "rid": "same"}
        both = [asyncio.create_task(ask(port, CHAT, fields, headers=header)) for _ in range(2)]
        await until(lambda: in_flight(client) == 2, "both are booked")
        assert [(await one).headers["x-request-id"] for one in both] == ["same", "same"]


# -- passing through


async def test_a_path_that_is_not_placed_passes_through_as_it_is(scene: Scene) -> None:
    answer = await scene.ask("/v1/models?x=%7E%2F", headers="X-Custom: Yes\r\n")
    assert answer.json()["data"][0]["id"] == "mock"
    _, target, headers, body = next(seen for seen in scene.engine.requests if b"models" in seen[1])
    assert (target, body) == (b"/v1/models?x=%7E%2F", b"")
    assert (b"X-Custom", b"Yes") in headers
    assert (await scene.ask("/v1/models", method="HEAD")).headers["content-length"] != "0"


async def test_the_body_arrives_byte_for_byte_and_the_trace_goes_with_it(settings: Settings) -> None:
    raw = b'{ "messages":[],\t"unknown_field":1.500,  "\\u00e9":"\xc3\xa9" }\n'
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with mock_engine() as (engine, at), replica(settings, word(at)) as (_, port):
        answer = await ask(port, CHAT, raw=raw, headers=f"traceparent: {trace}\r\ntracestate: a=b\r\n")
        assert answer.status == 200
        seen = next(seen for seen in engine.requests if seen[0] == "POST")
        assert seen[3] == raw
        assert (b"traceparent", trace.encode()) in seen[2]
        assert (b"tracestate", b"a=b") in seen[2]


async def test_chunk_extensions_and_trailers_pass_through(settings: Settings) -> None:
    answer = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\nX-Engine: 1\r\n\r\n"
        b"5;a=b\r\nhello\r\n0\r\nX-Sum: 42\r\n\r\n"
    )
    async with scripted(answer) as at, replica(settings, word(at)) as (_, port):
        got = await ask(port, COMPLETIONS, {"prompt": "hi"})
        assert (got.body, got.trailers, got.headers["x-engine"]) == (b"hello", b"X-Sum: 42\r\n", "1")


async def test_an_old_client_gets_the_body_without_chunks(scene: Scene) -> None:
    reader, writer = await asyncio.open_connection(HOST, scene.port)
    body = json.dumps(STREAM).encode()
    writer.write(b"POST %b HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (CHAT.encode(), len(body), body))
    answer = await reader.read()
    assert b"Transfer-Encoding" not in answer
    assert answer.endswith(b"\n\ndata: [DONE]\n\n")
    assert b"\r\n\r\ndata: {" in answer
    writer.close()


async def test_a_connection_serves_many_requests_and_those_sent_ahead_in_order(scene: Scene) -> None:
    reader, writer = await asyncio.open_connection(HOST, scene.port)
    for count in range(1, 5):
        body = json.dumps({"prompt": "hi", "max_tokens": count}).encode()
        writer.write(
            b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (COMPLETIONS.encode(), len(body), body)
        )
    for count in range(1, 5):
        assert (await read_answer(reader)).json()["usage"]["completion_tokens"] == count
    writer.close()


async def test_an_answer_that_breaks_off_breaks_off_at_the_client_too(settings: Settings, client: redis.Redis) -> None:
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\ndata: \r\n"
    async with scripted(answer) as at, replica(settings, word(at)) as (_, port):
        with pytest.raises((asyncio.IncompleteReadError, ValueError, ConnectionError)):
            await ask(port, COMPLETIONS, {"prompt": "hi"})
        await until(lambda: in_flight(client) == 0, "the booking has ended")


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_torn_answer_that_ends_with_its_connection_ends_in_a_reset(settings: Settings, version: str) -> None:
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\ndata: \r\n"
    async with scripted(answer) as at, replica(settings, word(at)) as (_, port):
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(
            b"POST %b HTTP/%b\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}" % (COMPLETIONS.encode(), version.encode())
        )
        if version == "1.0":
            with pytest.raises(ConnectionResetError):
                await reader.read()
        else:
            assert not (await reader.read()).endswith(b"0\r\n\r\n")
        writer.close()


# -- engines that fail


async def test_a_dead_engine_costs_no_request_while_another_lives(settings: Settings) -> None:
    async with mock_engine() as (_, dead):
        pass
    async with mock_engine() as (_, at), replica(settings, word(dead), word(at, ",kind=sglang,dp=2")) as (made, port):
        for target in made.targets:  # as if both had been well a moment ago
            target.stand_in.answers = True
        answers = [await ask(port, COMPLETIONS, {"prompt": "hi"}) for _ in range(8)]
        assert {answer.status for answer in answers} == {200}


async def test_an_engine_that_is_not_ready_is_passed_over_and_its_word_stands_where_it_is_the_only_one(
    settings: Settings,
) -> None:
    refusal = b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\nX-Engine: busy\r\nConnection: close\r\n\r\nbusy"
    async with scripted(refusal) as busy:
        async with mock_engine() as (_, at), replica(settings, word(busy), word(at)) as (_, port):
            assert {(await ask(port, COMPLETIONS, {"prompt": "hi"})).status for _ in range(6)} == {200}
        async with replica(settings, word(busy)) as (_, port):
            answer = await ask(port, COMPLETIONS, {"prompt": "hi"})
            assert (answer.status, answer.body, answer.headers["x-engine"]) == (503, b"busy", "busy")
        async with scripted(refusal) as second, replica(settings, word(busy), word(second)) as (_, port):
            answer = await ask(port, COMPLETIONS, {"prompt": "hi"})
            assert (answer.status, answer.body) == (503, b"busy"), "the last one's word, where all say it"


async def test_with_no_engine_left_the_error_has_openais_shape(settings: Settings) -> None:
    async with mock_engine() as (_, at):
        made = replica(settings, word(at))
        _, port = await made.__aenter__()
    try:
        answer = await ask(port, COMPLETIONS, {"prompt": "hi"})
        assert answer.status == 502
        assert answer.json()["error"]["code"] == "engine_failed"
        assert answer.headers["x-request-id"].startswith("req-")
    finally:
        await made.__aexit__(None, None, None)


async def test_an_engine_that_is_too_late_is_a_504(settings: Settings, client: redis.Redis) -> None:
    async with (
        scripted(b"", then_close=False) as at,
        replica(settings, word(at), first_byte_s=0.2, tries=1) as (_, port),
    ):
        assert (await ask(port, COMPLETIONS, {"prompt": "hi"})).status == 504
        await until(lambda: in_flight(client) == 0, "the booking has ended")


async def test_a_full_pool_is_a_429_and_an_empty_one_a_503_with_a_time_to_come_back(
    settings: Settings, join: Join
) -> None:
    async with mock_engine() as (_, at), replica(settings, word(at, ",kind=sglang,hook=e"), ready=False) as (_, port):
        empty = await ask(port, COMPLETIONS, {"prompt": "hi"})
        assert (empty.status, empty.json()["error"]["code"]) == (503, "nobody_joined")
        join("e", 1, capacity_tokens=100)
        full = await ask(port, COMPLETIONS, {"prompt": [1] * 101})
        assert (full.status, full.json()["error"]["type"]) == (429, "rate_limit_error")
        assert {empty.headers["retry-after"], full.headers["retry-after"]} == {"1"}
        anthropic = await ask(port, "/v1/messages", {"messages": [], "system": "x" * 1000})
        assert anthropic.json()["error"]["type"] == "rate_limit_error"
        assert anthropic.json()["type"] == "error"


async def test_a_refused_request_has_nothing_to_release(
    settings: Settings, join: Join, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool is full when Redis is busiest: a refusal costs the one EVAL that refuses."""
    join("e", 1, capacity_tokens=100)
    async with mock_engine() as (_, at), replica(settings, word(at, ",kind=sglang,hook=e")) as (made, port):
        released: list[str] = []
        release = made.bookings.dispatcher.release

        async def noted(*ids: str) -> int:
            released.extend(ids)
            return await release(*ids)

        monkeypatch.setattr(made.bookings.dispatcher, "release", noted)
        for _ in range(5):
            assert (await ask(port, COMPLETIONS, {"prompt": [1] * 101})).status == 429
        served = await ask(port, COMPLETIONS, {"prompt": [1]})
        await until(lambda: in_flight(client) == 0, "the one that was placed has ended")
        assert released == [served.headers["x-request-id"]]


async def test_a_rank_of_an_engine_that_is_not_ours_is_passed_over(settings: Settings, join: Join) -> None:
    join("elsewhere", 4)
    async with mock_engine() as (_, at), replica(settings, word(at, ",name=here")) as (made, port):
        await until(lambda: made.targets[0].stand_in.has_joined, "ours has joined")
        answers = [await ask(port, COMPLETIONS, {"prompt": "hi"}) for _ in range(5)]
        assert {answer.headers.get("x-balancer-rank") for answer in answers} == {"here/0"}


# -- Redis away


@pytest.mark.parametrize("away", ["last_known", "engine"])
async def test_without_redis_requests_are_answered_by_the_operators_rule(settings: Settings, away: str) -> None:
    async with (
        mock_engine() as (engine, at),
        replica(settings, word(at, ",kind=sglang,dp=2"), redis_away=away) as (made, port),
    ):
        made.bookings.dispatcher._placing.breaker.failed()
        answer = await ask(port, CHAT, {"messages": []})
        assert answer.status == 200
        told = [value for name, value in engine.requests[-1][2] if name.lower() == b"x-data-parallel-rank"]
        assert bool(told) is (away == "last_known")
        assert ("x-balancer-rank" in answer.headers) is (away == "last_known")


# -- the front door


async def test_without_a_key_nobody_comes_in_and_the_key_goes_no_further(settings: Settings) -> None:
    async with (
        mock_engine() as (engine, at),
        replica(settings, word(at), api_keys=("front-1", "front-2"), engine_key="inner") as (_, port),
    ):
        for given in ("", "Bearer wrong", "front-1", "Bearer", "Basic front-1", "Bearer front-1x"):
            headers = given and f"Authorization: {given}\r\n"
            refused = await ask(port, COMPLETIONS, {"prompt": "hi"}, headers=headers)
            assert (refused.status, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert (await ask(port, "/metrics")).status == 401
        assert (await ask(port, "/healthz")).status == 200
        for given in ("Authorization: Bearer front-2", "Authorization: bearer  front-1", "X-Api-Key: front-1"):
            headers = f"{given}\r\n"
            assert (await ask(port, COMPLETIONS, {"prompt": "hi"}, headers=headers)).status == 200
        sent = [(name.lower(), value) for seen in engine.requests if seen[0] == "POST" for name, value in seen[2]]
        assert (b"authorization", b"Bearer inner") in sent
        assert not any(b"front" in value for name, value in sent if name != b"host")


async def test_limits_are_kept_with_a_clear_word(settings: Settings) -> None:
    limits = Limits(body=1000, head=2000, connections=2, read_s=0.2, idle_s=0.2)
    async with mock_engine() as (_, at), replica(settings, word(at), limits=limits) as (made, port):
        assert (await ask(port, COMPLETIONS, raw=b"x" * 2000)).status == 413
        await until(lambda: not made.server.clients, "they have gone")
        assert (await ask(port, "/healthz", headers=f"X: {'y' * 3000}\r\n")).status == 431
        await until(lambda: not made.server.clients, "they have gone")
        slow_reader, slow = await asyncio.open_connection(HOST, port)
        slow.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n123")
        _, idle = await asyncio.open_connection(HOST, port)
        await until(lambda: len(made.server.clients) == 2, "two are here")
        assert (await ask(port, "/healthz")).status == 503
        assert (await read_answer(slow_reader)).status == 408
        await until(lambda: not made.server.clients, "the idle one was closed too")
        assert made.server.held.total == 0
        for writer in (slow, idle):
            writer.close()


# -- what it says about itself


async def test_the_metrics_tell_what_happened(scene: Scene) -> None:
    for _ in range(3):
        await scene.ask(CHAT, STREAM)
        await scene.ask(COMPLETIONS, {"prompt": "hi there " * 50})
    await scene.ask(COMPLETIONS, raw=b"{")
    text = (await scene.ask("/metrics")).body.decode()
    placed = [line for line in text.splitlines() if line.startswith("balancer_decisions_total{")]
    assert sum(float(line.split()[-1]) for line in placed) == 6
    assert 'policy="envelope",pool="p",rank=' in placed[0]
    assert 'balancer_http_requests_total{code="4xx",endpoint="/v1/completions",pool="p"} 1.0' in text
    assert 'balancer_dispatch_seconds_count{pool="p"} 6.0' in text
    assert 'balancer_prompt_tokens_ratio_count{pool="p",source="estimate"} 3.0' in text
    assert 'balancer_in_flight_requests{pool="p"} 0.0' in text
    assert 'balancer_falling_back{pool="p"} 0.0' in text


async def test_ready_means_that_there_is_somebody_to_send_to(settings: Settings, join: Join) -> None:
    async with mock_engine() as (_, at), replica(settings, word(at, ",kind=vllm,hook=e"), ready=False) as (made, port):
        assert (await ask(port, "/readyz")).status == 503
        join("e", 1)
        await until(lambda: made.bookings.is_rank_known, "its rank is known")
        assert (await ask(port, "/readyz")).status == 200


async def test_ready_means_that_there_is_a_rank_of_an_engine_of_its_own(settings: Settings, join: Join) -> None:
    join("elsewhere", 2)
    async with mock_engine() as (_, at), replica(settings, word(at, ",hook=e"), ready=False) as (made, port):
        await until(lambda: made.bookings.ranks == {"elsewhere/0", "elsewhere/1"}, "the others are known")
        assert (await ask(port, "/readyz")).status == 503
        refused = await ask(port, COMPLETIONS, {"prompt": "hi"})
        assert (refused.status, refused.json()["error"]["code"]) == (503, "nobody_joined")
        join("e", 1)
        await until(lambda: made.bookings.is_rank_known, "its rank is known", within_s=3)
        assert (await ask(port, "/readyz")).status == 200
        assert (await ask(port, COMPLETIONS, {"prompt": "hi"})).headers["x-balancer-rank"] == "e/0"


async def test_an_engine_that_cannot_be_reached_is_not_said_to_drain(settings: Settings, join: Join) -> None:
    async with mock_engine() as (_, down):
        pass
    join("down", 1)
    async with (
        mock_engine() as (_, at),
        replica(settings, word(down, ",hook=down"), word(at, ",hook=e")) as (made, port),
    ):
        await until(lambda: not made.targets[0].stand_in.answers, "it does not answer")
        refused = await ask(port, COMPLETIONS, {"prompt": "hi"})
        assert (refused.status, refused.json()["error"]["code"]) == (503, "nobody_joined"), (
            "the other's hook is missing"
        )


async def test_ranks_are_named_only_where_not_every_rank_will_do(settings: Settings) -> None:
    many = [f"http://{HOST}:{port},kind=sglang,dp=8,name=e{port}" for port in range(1, 131)]
    made = Desk(Options(tuple(parse_engine(word) for word in many[:4])), settings)
    everywhere = tuple(f"e{engine}/{index}" for engine in range(1, 5) for index in range(8))
    assert made.among() == ()
    assert made.among(everywhere[:8]) == everywhere[8:]
    made.targets[1].stand_in.answers = False
    assert made.among() == everywhere[:8] + everywhere[16:]
    assert made.among((*everywhere[:8], *everywhere[16:])) == everywhere[8:16], "the silent one, where no other is left"
    with pytest.raises(NoRank, match="all_silent"):
        made.among(everywhere)
    for target in made.targets:
        target.stand_in.answers = False
    assert made.among() == (), "a wrong look must not turn everybody away"
    large = Desk(Options(tuple(parse_engine(word) for word in many)), settings)
    large.targets[0].stand_in.answers = False
    assert large.among() == (), "more than a dispatch may name"


@pytest.mark.parametrize(("redis_away", "status"), [("last_known", 503), ("engine", 200)])
async def test_without_redis_ready_means_that_requests_are_answered(redis_away: str, status: int) -> None:
    """One that has never seen a rank has none to fall back on, and is not ready once it has noticed that."""
    with contextlib.closing(bound(HOST, 0)) as nobody:
        alone = Settings(url=f"redis://{HOST}:{nobody.getsockname()[1]}/0", pool="p", budget_ms=200)
        async with mock_engine() as (_, at), replica(alone, word(at), ready=False, redis_away=redis_away) as (_, port):
            assert (await ask(port, "/readyz")).status == 503
            assert (await ask(port, COMPLETIONS, {"prompt": "hi"})).status == status
            answer = await ask(port, "/readyz")
            assert (answer.status, answer.json()["redis"]) == (status, "away")


async def test_the_access_log_says_who_where_and_how_long_but_never_what(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with caplog.at_level(logging.DEBUG):
        await scene.ask(
            f"{COMPLETIONS}?secret=1",
            {"prompt": "top secret words", "max_tokens": 2},
            headers=f"X-Request-Id: mine\r\nAuthorization: Bearer sk-1\r\ntraceparent: {trace}\r\n",
        )
        await until(lambda: any(r.name == "balancer.access" for r in caplog.records), "the line is written")
    line = json.loads(next(r.getMessage() for r in caplog.records if r.name == "balancer.access"))
    assert (line["request_id"], line["path"], line["status"], line["ended"]) == ("mine", COMPLETIONS, 200, "whole")
    assert line["rank"].rpartition("/")[0] == line["engine"]
    assert line["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
    assert 0 < line["placed_ms"] <= line["first_byte_ms"] <= line["total_ms"]
    assert not any(word in caplog.text for word in ("secret", "sk-1"))


@pytest.mark.parametrize(
    ("how", "ended", "gone"),
    [("it leaves", "client_gone", 1), ("it does not read", "cut_by_us", 0), ("we stop", "cut_by_us", 0)],
)
async def test_a_client_that_we_cut_off_is_not_said_to_have_left(
    settings: Settings, caplog: pytest.LogCaptureFixture, how: str, ended: str, gone: int
) -> None:
    caplog.set_level(logging.INFO, "balancer.access")
    endless = b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n" + b"x" * 20_000_000
    limits = Limits(write_s=0.1 if how == "it does not read" else 60.0)
    async with scripted(endless, then_close=False) as at, replica(settings, word(at), limits=limits) as (made, port):
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
        await reader.readuntil(b"\r\n\r\n")
        if how == "it leaves":
            writer.close()
        elif how == "we stop":
            await made.server.stop(0.1)
        await until(lambda: caplog.records, "the line is written")
        (line,) = (json.loads(record.message) for record in caplog.records if record.name == "balancer.access")
        assert line["ended"] == ended
        assert f'balancer_client_gone_total{{pool="p"}} {gone}.0'.encode() in made.metrics.text()
        writer.close()


@pytest.mark.parametrize(
    ("raw", "status", "path"),
    [
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", 401, "/v1/completions"),
        (b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n", 401, "/v1/models"),
        (b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n", 413, "/generate"),
        (b"GET /long HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 70_000 + b"\r\n\r\n", 431, "/long"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400, ""),
        (b"GET ftp://x/ HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\r\n\r\n", 400, "ftp://x/"),
    ],
    ids=["no key, a body", "no key", "body too large", "head too large", "two lengths", "no path"],
)
async def test_what_is_turned_away_stands_in_the_access_log_and_in_the_metrics(
    settings: Settings, caplog: pytest.LogCaptureFixture, raw: bytes, status: int, path: str
) -> None:
    caplog.set_level(logging.INFO, "balancer.access")
    limits = Limits(body=1000)
    async with (
        mock_engine() as (_, at),
        replica(settings, word(at, ",kind=sglang,dp=2"), api_keys=("key",), limits=limits) as (made, port),
    ):
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(raw)
        assert (await read_answer(reader)).status == status
        writer.close()
        (line,) = (json.loads(record.message) for record in caplog.records if record.name == "balancer.access")
        assert (line["status"], line["ended"], line["path"]) == (status, "refused", path)
        assert b'code="4xx"' in made.metrics.text()


async def test_a_defect_of_ours_is_a_500_in_the_clients_shape_and_no_success_in_the_log(
    scene: Scene, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def breaks(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(scene.replica, "place", breaks)
    caplog.set_level(logging.INFO, "balancer.access")
    answer = await scene.ask("/v1/messages", {"messages": []})
    assert (answer.status, answer.json()["type"]) == (500, "error")
    (line,) = (json.loads(record.message) for record in caplog.records if record.name == "balancer.access")
    assert (line["status"], line["ended"]) == (500, "defect")
    text = scene.replica.metrics.text()
    assert b'balancer_http_requests_total{code="5xx",endpoint="/v1/messages",pool="p"} 1.0' in text


# -- stopping


async def test_a_replica_that_drains_is_not_ready_and_serves_each_request_as_its_connections_last(scene: Scene) -> None:
    reader, writer = await asyncio.open_connection(HOST, scene.port)
    scene.replica.drain()
    ready = await scene.ask("/readyz")
    assert (ready.status, ready.json()["status"]) == (503, "stopping")
    assert (await scene.ask("/healthz")).status == 200, "it is well: nobody should kill it"
    body = b'{"prompt":"hi","max_tokens":1}'
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    answer = await read_answer(reader)
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    assert await reader.read() == b""
    writer.close()


async def test_a_stop_lets_streams_end_and_takes_nothing_new(settings: Settings, client: redis.Redis) -> None:
    async with mock_engine(token_s=0.05) as (engine, at):
        made = replica(settings, word(at, ",kind=sglang,dp=2"))
        _, port = await made.__aenter__()
        under_way = asyncio.create_task(ask(port, CHAT, {**STREAM, "max_tokens": 20}))
        await until(lambda: sum(engine.running) == 1, "a stream is under way")
        stopping = asyncio.create_task(made.__aexit__(None, None, None))
        await asyncio.sleep(0.1)
        with pytest.raises(ConnectionError):
            await ask(port, "/healthz")
        assert (await under_way).body.endswith(b"[DONE]\n\n")
        await stopping
        assert in_flight(client) == 0


# -- the decision alone


async def test_the_decision_alone_books_and_says_what_to_send(settings: Settings, join: Join, admin: PoolAdmin) -> None:
    hook = join("e", 4)
    async with mock_engine() as (_, at), replica(settings, word(at, ",kind=vllm,dp=4,hook=e")) as (_, port):
        hook.report(1, [RankCounts(5, 1), RankCounts(5, 1), RankCounts(0, 0), RankCounts(5, 1)])
        answer = (await ask(port, "/balancer/v1/dispatch", {"request_id": "r-1", "tokens": 50})).json()
        assert (answer["rank"], answer["index"], answer["outcome"]) == ("e/2", 2, "placed")
        assert answer["url"] == f"http://{HOST}:{at}"
        assert answer["headers"]["X-Data-Parallel-Rank"] == "2"
        assert f"{in_flight_id('r-1'):016x}" in answer["headers"]["X-Request-Id"]
        again = (await ask(port, "/balancer/v1/dispatch", {"request_id": "r-1", "tokens": 50})).json()
        assert (again["rank"], again["outcome"]) == ("e/2", "repeated")
        assert admin.snapshot().bookings == 1
        assert (await ask(port, "/balancer/v1/release", {"request_id": "r-1"})).json() == {"released": 1}
        assert (await ask(port, "/balancer/v1/release", {"request_ids": ["r-1", "x"]})).json() == {"released": 0}
        body = {"path": "/v1/completions", "body": {"prompt": [1, 2, 3]}}
        assert (await ask(port, "/balancer/v1/dispatch", body)).json()["tokens"] == 3


async def test_decisions_alone_stand_in_the_access_log_and_in_the_metrics(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "balancer.access")
    doors = "/balancer/v1"
    body = b'{"prompt":[1,2,3]}'
    placed = await scene.ask(f"{doors}/dispatch", {"request_id": "r-1", "tokens": 50})
    allowed = await scene.ask(f"{doors}/authorize/v1/completions", raw=body, headers="X-Request-Id: r-9\r\n")
    for path, fields in {
        "authorize/v1/models": None,
        "release": {"request_id": "r-1"},
        "dispatch": [],
        "x": None,
    }.items():
        await scene.ask(f"{doors}/{path}", fields)
    await scene.ask(f"{doors}/dispatch")
    lines = [json.loads(record.message) for record in caplog.records if record.name == "balancer.access"]
    assert [(line["status"], line["ended"]) for line in lines] == [
        (200, "whole"),
        (200, "whole"),
        (200, "whole"),
        (200, "whole"),
        (400, "refused"),
        (404, "refused"),
        (405, "refused"),
    ]
    names = ("request_id", "rank", "outcome", "prompt_tokens")
    own = allowed.headers["x-balancer-request-id"]
    assert [lines[0][name] for name in names] == ["r-1", placed.json()["rank"], "placed", 50]
    assert [lines[1][name] for name in names] == [own, allowed.headers["x-balancer-rank"], "placed", 3]
    text = scene.replica.metrics.text().decode()
    for code, endpoint, count in (
        ("2xx", f"{doors}/dispatch", 1),
        ("4xx", f"{doors}/dispatch", 2),
        ("2xx", f"{doors}/authorize", 2),
        ("2xx", f"{doors}/release", 1),
        ("4xx", "other", 1),
    ):
        assert f'balancer_http_requests_total{{code="{code}",endpoint="{endpoint}",pool="p"}} {count}.0' in text
    assert 'balancer_dispatch_seconds_count{pool="p"} 2.0' in text


DEEP = {"body": {"tools": json.loads("[" * 300 + "]" * 300)}}


@pytest.mark.parametrize(
    "fields", [[], {}, {"tokens": 0}, {"tokens": "x"}, {"tokens": 5, "request_id": "a\r\nb: c"}, DEEP]
)
async def test_a_decision_that_is_asked_for_wrongly_is_a_400(scene: Scene, fields: object) -> None:
    assert (await scene.ask("/balancer/v1/dispatch", fields)).status == 400
    assert (await scene.ask("/balancer/v1/nothing")).status == 404
    wrong_method = await scene.ask("/balancer/v1/dispatch")
    assert (wrong_method.status, wrong_method.headers["allow"]) == (405, "POST")


async def test_the_decision_reads_a_path_as_engines_do_and_takes_no_body_for_one_that_is_not_placed(
    scene: Scene,
) -> None:
    async def told(path: object) -> Answer:
        return await scene.ask("/balancer/v1/dispatch", {"path": path, "body": {"text": "hello " * 100}})

    plain = (await told("/generate")).json()
    assert (plain["tokens"], plain["headers"].get("X-Data-Parallel-Rank")) == (151, None)
    for path in ("/generate?x=1", "/%67enerate", "/generate#x"):
        spelled = (await told(path)).json()
        assert (spelled["tokens"], spelled["headers"].keys()) == (151, plain["headers"].keys())
    for path in ("/nope", "", 7, None):
        assert (await told(path)).status == 400


async def test_a_proxys_question_is_read_as_a_request_is(scene: Scene, admin: PoolAdmin) -> None:
    async def booked(headers: str, raw: bytes | None = None, path: str = COMPLETIONS) -> int:
        answer = await scene.ask(f"/balancer/v1/authorize{path}", raw=raw, headers=headers, method="POST")
        if answer.status != 200:
            return -answer.status
        own = answer.headers["x-balancer-request-id"]
        tokens = sum(view.load_tokens for view in admin.snapshot().ranks)
        assert (await scene.ask("/balancer/v1/release", {"request_id": own})).json() == {"released": 1}
        return tokens

    packed = gzip.compress(json.dumps({"prompt": list(range(70))}).encode())
    assert await booked("Content-Encoding: gzip\r\n", packed) == len(packed) // 4 + 1, "by its size"
    assert await booked("Content-Encoding: gzip\r\n", packed, "/generate") == -400, "it could hide a rank"
    assert await booked("Content-Encoding: Identity\r\n", b'{"prompt":[1,2,3]}') == 3, "which is not compressed"
    assert await booked("X-Balancer-Tokens: 12\r\n") == 12
    assert await booked(f"X-Balancer-Tokens: {'9' * 5000}\r\n") == -400
    assert await booked("X-Original-Content-Length: 400\r\n") == 101
    assert await booked("X-Original-Content-Length: 9999999999\r\n") == 2**31 - 1
    assert await booked(f"X-Original-Content-Length: {'9' * 5000}\r\n") == 1, "no length that anybody would send"


async def test_envoys_question_is_answered_with_headers(scene: Scene, admin: PoolAdmin) -> None:
    body = json.dumps({"prompt": list(range(70))}).encode()
    answer = await scene.ask("/balancer/v1/authorize/v1/completions?x=1", raw=body, headers="X-Request-Id: r-9\r\n")
    assert (answer.status, answer.body) == (200, b"")
    rank = answer.headers["x-balancer-rank"]
    assert answer.headers["x-data-parallel-rank"] == rank[-1]
    assert answer.headers["x-balancer-address"].startswith(HOST)
    assert next(view.load_tokens for view in admin.snapshot().ranks if view.rank == rank) == 70
    again = await scene.ask("/balancer/v1/authorize/v1/completions?x=1", raw=body, headers="X-Request-Id: r-9\r\n")
    assert again.headers["x-balancer-rank"] != rank, "clients that send one id share neither rank nor release"
    own = answer.headers["x-balancer-request-id"]
    assert own.startswith("r-9.")
    assert (await scene.ask("/balancer/v1/release", {"request_id": own})).json() == {"released": 1}
    spelled = await scene.ask("/balancer/v1/authorize", raw=body, headers="X-Original-URI: /v1/%63ompletions?x=1\r\n")
    assert "x-balancer-rank" in spelled.headers, "an engine would unquote it"
    not_placed = await scene.ask("/balancer/v1/authorize/v1/models")
    assert (not_placed.status, "x-balancer-rank" in not_placed.headers) == (200, False)

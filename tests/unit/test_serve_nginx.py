"""docker/nginx/nginx.conf, in a real nginx: it asks the replica where to, sends the request there, and releases it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
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
CONF = Path(__file__).parents[2] / "docker" / "nginx" / "nginx.conf"


def replaced(text: str, old: str, new: str) -> str:
    assert old in text, f"nginx.conf does not say {old!r} any more"
    return text.replace(old, new)


@contextlib.asynccontextmanager
async def nginx(replica_port: int, tmp: Path) -> AsyncIterator[int]:
    """nginx with our configuration, but for its ports and folders."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        message = "nginx is not installed: apt-get install nginx-light"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    with contextlib.closing(bound(HOST, 0)) as probe:
        port = probe.getsockname()[1]
    text = replaced(CONF.read_text(), "127.0.0.1:8080", f"127.0.0.1:{replica_port}")
    text = replaced(text, "listen 127.0.0.1:8000", f"listen 127.0.0.1:{port}")
    text = replaced(text, "/dev/stdout", str(tmp / "access.log"))
    folders = "".join(
        f"{kind}_temp_path {tmp}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    text = replaced(text, "http {\n", f"http {{\n{folders}\n")
    (tmp / "nginx.conf").write_text(text)
    tmp.chmod(0o777)
    tmp.parent.chmod(0o755)
    user = "user root;" if os.geteuid() == 0 else ""
    words = ["-p", str(tmp), "-c", str(tmp / "nginx.conf"), "-e", str(tmp / "error.log")]
    process = await asyncio.create_subprocess_exec(program, *words, "-g", f"daemon off; pid {tmp}/pid; {user}")
    try:

        def listens() -> bool:
            assert process.returncode is None, (tmp / "error.log").read_text()
            return (tmp / "pid").exists()

        await until(listens, "nginx listens")
        yield port
    finally:
        process.terminate()
        await process.wait()


async def test_nginx_sends_each_request_to_the_rank_that_the_replica_names(
    settings: Settings, client: redis.Redis, tmp_path: Path
) -> None:
    PoolAdmin(settings).configure(policy="round_robin")  # so that each rank has its turn
    async with (
        mock_engine(4) as (engine, at),
        replica(settings, f"http://{HOST}:{at},kind=sglang,dp=4") as (_, behind),
        nginx(behind, tmp_path) as port,
    ):
        for _ in range(12):
            assert (await ask(port, "/v1/completions", COMPLETIONS)).status == 200
        sent = posts(engine)
        assert {headers["x-data-parallel-rank"] for headers in sent} == {"0", "1", "2", "3"}
        assert all(headers["host"] == f"{HOST}:{at}" for headers in sent)
        await until(lambda: in_flight(client) == 0, "post_action has released them")
        assert (await ask(port, "/v1/models")).json()["data"][0]["id"] == "mock"
        for path in ("/balancer/v1/release", "/balancer/v1/dispatch", "/metrics"):
            assert (await ask(port, path)).status == 404, "not for clients"
        assert (await ask(port, "/v1/completions", method="OPTIONS")).status not in (500, 503)
        assert (engine.requests[-1][0], engine.requests[-1][1]) == ("OPTIONS", b"/v1/completions")


async def test_a_stream_through_nginx_is_booked_until_its_client_leaves(
    settings: Settings, client: redis.Redis, tmp_path: Path
) -> None:
    async with (
        mock_engine(2, token_s=0.02) as (engine, at),
        replica(settings, f"http://{HOST}:{at},kind=sglang,dp=2") as (_, behind),
        nginx(behind, tmp_path) as port,
    ):
        reader, writer = await asyncio.open_connection(HOST, port)
        body = b'{"messages":[],"stream":true,"max_tokens":10000}'
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        await reader.readuntil(b"data: ")
        assert in_flight(client) == 1
        writer.close()
        await until(lambda: engine.cancelled == 1, "the engine was told")
        await until(lambda: in_flight(client) == 0, "the booking has ended")


async def test_vllms_hook_knows_the_request_again_behind_nginx(
    settings: Settings, join: Join, client: redis.Redis, tmp_path: Path
) -> None:
    hook = join("e", 2)
    hook.report(1, [RankCounts(0, 0), RankCounts(10, 1)])
    async with (
        mock_engine(2) as (engine, at),
        replica(settings, f"http://{HOST}:{at},kind=vllm,dp=2,hook=e") as (_, behind),
        nginx(behind, tmp_path) as port,
    ):
        assert (await ask(port, "/v1/completions", COMPLETIONS, headers="X-Request-Id: mine\r\n")).status == 200
        (headers,) = posts(engine)
        assert headers["x-data-parallel-rank"] == "0"
        placed = headers["x-override-rid"]
        assert placed.startswith("mine.")
        assert received_id(f"cmpl-{headers['x-request-id']}-0-86f184e6") == in_flight_id(placed)


async def test_only_headers_that_are_named_go_on_to_the_engine(settings: Settings, tmp_path: Path) -> None:
    """SGLang, where it is told to, takes the rank and more from X-Override-...: nobody's but ours may reach it."""
    async with (
        mock_engine(2) as (engine, at),
        replica(settings, f"http://{HOST}:{at},kind=sglang,dp=2") as (_, behind),
        nginx(behind, tmp_path) as port,
    ):
        sent = {
            "X-Override-Routed-DP-Rank": "7",
            "x-override-rid": "theirs",
            "X-Data-Parallel-Rank": "7",
            "Authorization": "Bearer key",
            "Content-Type": "application/json",
            "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in sent.items())
        assert (await ask(port, "/v1/completions", COMPLETIONS, headers=lines)).status == 200
        (headers,) = posts(engine)
        assert "x-override-routed-dp-rank" not in headers
        assert headers["x-override-rid"] != "theirs"
        assert headers["x-data-parallel-rank"] in ("0", "1")
        assert headers["authorization"] == "Bearer key"
        assert headers["content-type"] == "application/json"
        assert headers["traceparent"] == sent["traceparent"]


async def test_a_refusal_keeps_its_meaning_behind_nginx(settings: Settings, join: Join, tmp_path: Path) -> None:
    async with (
        mock_engine() as (_, at),
        replica(settings, f"http://{HOST}:{at},kind=vllm,hook=e", ready=False) as (_, behind),
        nginx(behind, tmp_path) as port,
    ):
        empty = await ask(port, "/v1/completions", COMPLETIONS)
        assert (empty.status, empty.json()["error"]["code"], empty.headers["retry-after"]) == (503, "no_rank", "1")
        join("e", 1, capacity_tokens=10)
        full = await ask(port, "/v1/completions", COMPLETIONS)
        assert (full.status, full.json()["error"]["code"], full.headers["retry-after"]) == (429, "all_full", "1")


@pytest.mark.parametrize("key", ["Authorization: Bearer secret", "X-Api-Key: secret"])
async def test_with_a_key_on_the_replica_bookings_are_released_and_engines_do_not_get_it(
    key: str, settings: Settings, client: redis.Redis, tmp_path: Path
) -> None:
    await keeps_the_replicas_key(nginx, key, settings, client, tmp_path)


async def test_without_one_a_clients_key_is_the_engines(settings: Settings, tmp_path: Path) -> None:
    await passes_the_engines_key(nginx, settings, tmp_path)

"""The cast of serve's tests: replicas and mock engines on real sockets of the test's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import redis

from balancer import Settings
from balancer.serve import Options, parse_engine
from balancer.serve.mock import MockEngine
from balancer.serve.replica import Replica
from balancer.serve.workers import bound

HOST = "127.0.0.1"


async def until(condition: Callable[[], object], what: str, within_s: float = 15.0) -> None:
    """Wait for a condition."""
    deadline = asyncio.get_running_loop().time() + within_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"not within {within_s} s: {what}"
        await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def mock_engine(
    dp: int = 2, token_s: float = 0.001, port: int = 0, first_s: float = 0.001
) -> AsyncIterator[tuple[MockEngine, int]]:
    """A mock engine and its port."""
    engine = MockEngine(dp, first_s, token_s)
    sock = bound(HOST, port)
    await engine.start(sock)
    try:
        yield engine, sock.getsockname()[1]
    finally:
        await engine.stop()


@contextlib.asynccontextmanager
async def replica(
    settings: Settings, *engines: str, ready: bool = True, **options: Any
) -> AsyncIterator[tuple[Replica, int]]:
    """A replica and its port; waits until it has ranks to give."""
    given = Options(tuple(parse_engine(word) for word in engines), stop_s=5.0, show_rank=True, **options)
    made = Replica(given, replace(settings))
    sock = bound(HOST, 0)
    await made.start(sock)
    try:
        if ready:
            await until(lambda: made.bookings.is_rank_known, "the pool has a rank for it")
        yield made, sock.getsockname()[1]
    finally:
        await made.stop()


def posts(engine: MockEngine) -> list[dict[str, str]]:
    """Headers of the requests that were placed on a mock engine."""
    return [
        {name.decode().lower(): value.decode() for name, value in headers}
        for method, _, headers, _ in engine.requests
        if method == "POST"
    ]


def in_flight(client: redis.Redis) -> int:
    """How many requests of the tests' pool are booked."""
    return int(client.hlen("dpb:{p}:bookings"))


class Answer:
    """An answer as read from a socket."""

    def __init__(self, head: bytes, body: bytes, trailers: bytes = b"") -> None:
        lines = head.decode("latin-1").split("\r\n")
        self.status = int(lines[0].split(" ")[1])
        self.headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines[1:] if line)}
        self.body, self.trailers = body, trailers

    def json(self) -> Any:
        return json.loads(self.body)


async def ask(
    port: int,
    path: str,
    fields: Any = None,
    method: str | None = None,
    headers: str = "",
    raw: bytes | None = None,
) -> Answer:
    """One request on a connection of its own."""
    body = raw if raw is not None else b"" if fields is None else json.dumps(fields).encode()
    method = method or ("POST" if body else "GET")
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        length = f"Content-Length: {len(body)}\r\n" if body else ""
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: front\r\n{length}{headers}\r\n".encode() + body)
        return await read_answer(reader, method == "HEAD")
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def read_answer(reader: asyncio.StreamReader, is_head: bool = False) -> Answer:
    """The next answer on a connection."""
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20))[:-2]
    answer = Answer(head.rstrip(b"\r\n"), b"")
    if is_head:
        return answer
    if answer.headers.get("transfer-encoding") == "chunked":
        while size := int((await asyncio.wait_for(reader.readline(), 20)).split(b";")[0], 16):
            answer.body += await reader.readexactly(size)
            await reader.readexactly(2)
        while (line := await reader.readline()) != b"\r\n":
            answer.trailers += line
    elif "content-length" in answer.headers:
        answer.body = await reader.readexactly(int(answer.headers["content-length"]))
    else:
        answer.body = await reader.read()
    return answer


# -- a proxy of theirs before a replica; what is told of each is told here once

COMPLETIONS = {"prompt": "hello " * 100, "max_tokens": 5}
Proxy = Callable[[int, Path], contextlib.AbstractAsyncContextManager[int]]
"""From a replica's port and a folder to the port of a proxy that asks it."""


async def keeps_the_replicas_key(proxy: Proxy, key: str, settings: Settings, client: redis.Redis, folder: Path) -> None:
    """With a key on the replica bookings are released, and engines do not get it."""
    async with (
        mock_engine(2) as (engine, at),
        replica(settings, f"http://{HOST}:{at},kind=sglang,dp=2", api_keys=("secret",)) as (_, behind),
        proxy(behind, folder) as port,
    ):
        assert (await ask(port, "/v1/completions", COMPLETIONS)).status == 401
        for _ in range(4):
            assert (await ask(port, "/v1/completions", COMPLETIONS, headers=f"{key}\r\n")).status == 200
        assert len(posts(engine)) == 4
        assert not any({"authorization", "x-api-key"} & headers.keys() for headers in posts(engine))
        await until(lambda: in_flight(client) == 0, "the key came along to release them")


async def passes_the_engines_key(proxy: Proxy, settings: Settings, folder: Path) -> None:
    """Without one a client's key is the engine's."""
    async with (
        mock_engine(2) as (engine, at),
        replica(settings, f"http://{HOST}:{at},kind=sglang,dp=2") as (_, behind),
        proxy(behind, folder) as port,
    ):
        keys = "Authorization: Bearer theirs\r\nX-Api-Key: theirs\r\n"
        assert (await ask(port, "/v1/completions", COMPLETIONS, headers=keys)).status == 200
        (headers,) = posts(engine)
        assert (headers["authorization"], headers["x-api-key"]) == ("Bearer theirs", "theirs")

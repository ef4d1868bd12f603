"""Connections of `balancer serve` over real sockets: clients that do not read, engines that say too much."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tracemalloc
from collections.abc import AsyncIterator

import pytest

from balancer.serve.answer import UpstreamError
from balancer.serve.front import Client, Server
from balancer.serve.inbound import HeldBytes, Inbound, RequestReader
from balancer.serve.options import Engine, Limits
from balancer.serve.upstream import Connection
from balancer.serve.upstream_pool import Pool
from tests.unit.serve_cast import until

LARGE = bytes(16 << 20)
"""More than the kernel takes for a client that does not read."""
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


@contextlib.asynccontextmanager
async def serving(
    limits: Limits, answered: list[Inbound], answer: bytes = LARGE
) -> AsyncIterator[tuple[Server, socket.socket]]:
    """A front door whose answers are all the same, large if nothing is said, and a client's connection to it."""

    async def responds(client: Client, request: Inbound) -> None:
        answered.append(request)
        client.respond(request, 200, [], answer)

    server = Server(responds, limits)
    listening = socket.create_server(("127.0.0.1", 0))
    await server.start(listening)
    with socket.create_connection(listening.getsockname()) as raw:
        raw.setblocking(False)
        yield server, raw
    await server.stop(0)


async def read(raw: socket.socket, size: int) -> None:
    while size > 0:
        size -= len(await asyncio.get_running_loop().sock_recv(raw, min(size, 1 << 20)))


async def test_the_next_request_waits_until_the_client_has_read_its_answer() -> None:
    answered: list[Inbound] = []
    async with serving(Limits(), answered) as (_, raw):
        raw.send(GET)
        await until(lambda: len(answered) == 1, "the first is answered")
        raw.send(GET + GET)
        await asyncio.sleep(0.2)
        assert len(answered) == 1, "nothing is added to an answer that nobody reads"
        await read(raw, 2 * len(LARGE))
        await until(lambda: len(answered) == 3, "the others are answered in their turn")


async def test_a_client_that_does_not_read_its_answer_is_cut_off_though_nothing_is_asked_any_more() -> None:
    answered: list[Inbound] = []
    async with serving(Limits(write_s=0.3, idle_s=0.3), answered) as (server, raw):
        raw.send(GET)
        await until(lambda: len(answered) == 1, "it is answered")
        await until(lambda: not server.clients, "the connection has ended")


async def test_a_connection_that_was_slow_once_ends_when_it_is_idle() -> None:
    answered: list[Inbound] = []
    async with serving(Limits(idle_s=0.3), answered) as (server, raw):
        raw.send(GET)
        await until(lambda: len(answered) == 1, "it is answered")
        await read(raw, len(LARGE))
        await until(lambda: not server.clients, "the connection has ended")


async def test_line_breaks_behind_a_request_begin_no_other_and_keep_nobody() -> None:
    """RFC 9112, 2.2: a server ignores them."""
    answered: list[Inbound] = []
    async with serving(Limits(idle_s=0.5, read_s=60), answered, answer=b"ok") as (server, raw):
        raw.send(GET)
        loop, seen = asyncio.get_running_loop(), b""
        while not seen.endswith(b"ok"):
            seen += await loop.sock_recv(raw, 1000)
        deadline = loop.time() + 20
        with contextlib.suppress(ConnectionError):
            while server.clients and loop.time() < deadline:
                raw.send(b"\r\n")
                await asyncio.sleep(0.05)
            assert await loop.sock_recv(raw, 1000) == b"", "it was idle, and ended without a word"
        assert not server.clients, "however many came"


async def test_line_breaks_behind_a_request_do_not_hold_up_the_end() -> None:
    answered: list[Inbound] = []
    async with serving(Limits(), answered, answer=b"ok") as (server, raw):
        raw.send(GET)
        await until(lambda: len(answered) == 1, "it is answered")
        raw.send(b"\r\n")
        await asyncio.sleep(0.1)
        assert await server.stop(within_s=5) == 0
        assert not server.clients


SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
JAVAS = (
    b"Connection: Upgrade, HTTP2-Settings\r\nHost: x\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n"
)
JAVAS = b"POST /v1/chat/completions HTTP/1.1\r\n" + JAVAS + b"Upgrade: h2c\r\nUser-Agent: Java-http-client/21.0.1\r\n"
WITH_A_LENGTH = JAVAS + b"Content-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED
IN_CHUNKS = JAVAS + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)


def read_in_pieces(data: bytes, size: int, most: int = 1000) -> tuple[list[Inbound], RequestReader]:
    """The requests that a reader makes of `data` when it comes in pieces of `size` bytes."""
    reader, requests = RequestReader(Limits(body=most), HeldBytes(), lambda: None), list[Inbound]()
    for start in range(0, len(data), size):
        left = data[start : start + size]
        while left and reader.refusal is None:
            left = reader.feed(left)
            requests += reader.ready
            reader.ready.clear()
    return requests, reader


@pytest.mark.parametrize("size", [1, 2, 7, 100, 5000])
def test_a_request_that_asks_for_http2_is_read_with_its_body_and_so_are_those_behind_it(size: int) -> None:
    requests, reader = read_in_pieces(WITH_A_LENGTH + IN_CHUNKS + GET + IN_CHUNKS + WITH_A_LENGTH + GET, size)
    assert [request.method for request in requests] == ["POST", "POST", "GET", "POST", "POST", "GET"]
    assert [request.body for request in requests] == [SMUGGLED, SMUGGLED, b"", SMUGGLED, SMUGGLED, b""]
    assert all(request.path == b"/v1/chat/completions" for request in requests if request.method == "POST")
    assert reader.refusal is None
    assert not reader.is_reading


@pytest.mark.parametrize("upgrades", [b"h2c,", b",h2c", b",", b"", b"h2c,x", b"x,,h2c", b"h2c, ,websock,et"])
@pytest.mark.parametrize("one", [WITH_A_LENGTH, IN_CHUNKS, GET])
def test_however_a_request_asks_for_another_protocol_its_body_is_its_body(upgrades: bytes, one: bytes) -> None:
    headers = b"\r\nConnection: upgrade" + b"".join(b"\r\nUpgrade: " + value for value in upgrades.split(b","))
    asks = one.replace(b"\r\nUpgrade: h2c", b"").replace(b" HTTP/1.1", b" HTTP/1.1" + headers, 1)
    requests, reader = read_in_pieces(asks + GET, 5000)
    assert [request.body for request in requests] == [b"" if one is GET else SMUGGLED, b""]
    assert reader.refusal is None


def test_a_body_behind_a_request_for_http2_keeps_to_the_limits() -> None:
    for data in (WITH_A_LENGTH, IN_CHUNKS):
        requests, reader = read_in_pieces(data, 5000, most=len(SMUGGLED) - 1)
        assert requests == []
        assert reader.refusal is not None
        assert reader.refusal[0] == 413


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"/%67enerate?x=%67", b"/generate"),
        (b"/v1%2Fchat%2fcompletions", b"/v1/chat/completions"),
        (b"/v1/completions#x", b"/v1/completions"),
        (b"/generate%23", b"/generate%23"),
        (b"/%2567enerate", b"/%2567enerate"),
        (b"/v1/%2e%2e/generate", b"/v1/%2e%2e/generate"),
        (b"//generate", b"//generate"),
        (b"/%62alancer/v1/dispatch", b"/%62alancer/v1/dispatch"),
        (b"/%", b"/%"),
    ],
)
def test_a_path_is_taken_for_a_placed_one_where_an_engine_would_and_else_for_what_it_is(
    target: bytes, path: bytes
) -> None:
    ((request,), _) = read_in_pieces(b"POST " + target + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", 5000)
    assert (request.path, request.target) == (path, target)


@pytest.mark.parametrize(
    ("target", "plain", "path"),
    [
        (b"http://front:8080/v1/models?a=b", b"/v1/models?a=b", b"/v1/models"),
        (b"HTTPS://u:p@[::1]/%67enerate", b"/%67enerate", b"/generate"),
        (b"http://front", b"/", b"/"),
        (b"http://front?a=/b", b"/?a=/b", b"/"),
        (b"http://front//balancer/v1/dispatch", b"//balancer/v1/dispatch", b"//balancer/v1/dispatch"),
        (b"/http://front/generate", b"/http://front/generate", b"/http://front/generate"),
        (b"ftp://front/generate", b"ftp://front/generate", b"ftp://front/generate"),
    ],
)
def test_a_target_that_names_the_host_too_is_the_path_that_it_names(target: bytes, plain: bytes, path: bytes) -> None:
    """RFC 9112, 3.2.2: a server takes the absolute form; 3.2.1: what goes on to the engine is the origin form."""
    ((request,), _) = read_in_pieces(b"POST " + target + b" HTTP/1.1\r\nHost: other\r\n\r\n", 7)
    assert (request.target, request.path) == (plain, path)


def test_what_follows_a_whole_request_is_not_parsed_before_its_turn() -> None:
    data = b"GET / HTTP/1.1\r\nHost:x\r\n\r\n" * 10_000
    reader = RequestReader(Limits(), HeldBytes(), lambda: None)
    left, seen = data, 0
    while left:
        left = reader.feed(left)
        assert len(reader.ready) <= 4096 // 26 + 1
        seen += len(reader.ready)
        reader.ready.clear()
    assert seen == 10_000


async def test_a_client_that_sends_ten_thousand_requests_ahead_costs_their_bytes_and_waits() -> None:
    answered, go = [0], asyncio.Event()

    async def answer(client: Client, request: Inbound) -> None:
        await go.wait()
        answered[0] += 1
        client.respond(request, 204, [], b"")

    server = Server(answer, Limits())
    listening = socket.create_server(("127.0.0.1", 0))
    await server.start(listening)
    data = b"GET / HTTP/1.1\r\nHost:x\r\n\r\n" * 10_000
    reader, writer = await asyncio.open_connection(*listening.getsockname())
    tracemalloc.start()
    try:
        writer.write(data)
        await until(lambda: any(not client.transport.is_reading() for client in server.clients), "it has to wait")
        assert tracemalloc.get_traced_memory()[1] < 5 * len(data), "where each request once took 688 bytes for its 26"
    finally:
        tracemalloc.stop()
    go.set()
    seen = b""
    while seen.count(b"HTTP/1.1 ") < 10_000:  # a read may end within a status line
        seen += await asyncio.wait_for(reader.read(1 << 20), 20)
    assert answered == [10_000]
    writer.close()
    await server.stop(0)


def test_a_body_in_the_smallest_pieces_is_held_in_its_size() -> None:
    size, held = 1 << 18, HeldBytes()
    reader = RequestReader(Limits(), held, lambda: None)
    reader.feed(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    data = b"2\r\n{}\r\n" * (size // 2)
    tracemalloc.start()
    try:
        reader.feed(data)
        assert tracemalloc.get_traced_memory()[1] < 2 * size
    finally:
        tracemalloc.stop()
    reader.feed(b"0\r\n\r\n")
    request = reader.ready.popleft()
    assert (request.body, held.total) == (b"{}" * (size // 2), size)
    reader.free(request)
    assert held.total == 0


@contextlib.asynccontextmanager
async def engine_saying(*answers: bytes) -> AsyncIterator[Pool]:
    """A pool before an engine that answers so, one after the other."""
    left, open_ones = list(answers), []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_ones.append(writer)
        with contextlib.suppress(ConnectionError):
            while await reader.read(65536):
                writer.write(left.pop(0))
        writer.transport.abort()
        open_ones.remove(writer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    pool = Pool(Engine(host, port, "e"), connect_s=2.0)
    yield pool
    pool.close()
    server.close()
    await until(lambda: not open_ones, "no connection is left")


async def ask(connection: Connection, method: bytes = b"GET") -> bytes:
    body: list[bytes] = []
    try:
        await connection.send(method + b" / HTTP/1.1\r\n\r\n", method == b"HEAD")
        await connection.relay(body.append)
    finally:
        connection.give_back()
    return b"".join(body)


@pytest.mark.parametrize(
    ("method", "head"),
    [
        (b"HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n"),
        (b"GET", b"HTTP/1.1 204 No Content\r\n\r\n"),
        (b"GET", b"HTTP/1.1 304 Not Modified\r\n\r\n"),
        (b"GET", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
    ],
)
async def test_a_connection_with_bytes_behind_an_answer_without_a_body_serves_no_other(
    method: bytes, head: bytes
) -> None:
    async with engine_saying(head, head + b"HTTP/1.1 200 OK\r\n") as pool:
        connection, _ = await pool.acquire()
        assert await ask(connection, method) == b""
        connection, is_reused = await pool.acquire()
        assert is_reused, "nothing was behind the first"
        assert await ask(connection, method) == b""
        connection, is_reused = await pool.acquire()
        assert not is_reused
        connection.give_back()


async def test_a_chunked_answer_whose_head_is_no_http_breaks_off() -> None:
    async with engine_saying(b"HTTP/1.1 200 OK\r\nA b: c\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n") as pool:
        connection, _ = await pool.acquire()
        with pytest.raises(UpstreamError):
            await ask(connection)


async def test_an_engine_that_is_gone_without_a_word_is_noticed() -> None:
    async with engine_saying() as pool:
        connection, _ = await pool.acquire()
        sock = connection.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000
        connection.give_back()

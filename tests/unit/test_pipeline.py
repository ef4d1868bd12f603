"""One connection for all: replies find who asked, whoever gives up takes nothing from the others, silence ends it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from balancer.pipeline import Opened, PipelinedClient

Answer = Callable[[int, asyncio.StreamWriter], None]
PATIENCE_S = 0.3


class Node:
    """A server that answers command after command as `answer` says; it knows RESP well enough to count commands."""

    def __init__(self) -> None:
        self.answer: Answer = lambda number, writer: writer.write(b":%d\r\n" % number)
        self.port = 0
        self.commands = 0
        self.connections = 0
        self.writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                for _ in range(2 * int(line[1:])):
                    await reader.readline()
                self.commands += 1
                self.answer(self.commands, writer)
        writer.close()


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    node = Node()
    server = await asyncio.start_server(node.serve, "127.0.0.1", 0)
    node.port = server.sockets[0].getsockname()[1]
    yield node
    server.close()
    for writer in node.writers:
        writer.close()


@pytest.fixture
async def client(node: Node) -> AsyncIterator[PipelinedClient]:
    async def opened() -> Opened:
        _, writer = await asyncio.open_connection("127.0.0.1", node.port)
        writers.append(writer)  # as the driver's connection keeps it

        async def close() -> None:
            with contextlib.suppress(OSError):
                await writer.wait_closed()

        return Opened(writer.transport, RuntimeError, lambda reply: "READONLY" in str(reply), close)

    writers: list[asyncio.StreamWriter] = []
    client = PipelinedClient(opened, PATIENCE_S)
    yield client
    await client.aclose()


async def ask(client: PipelinedClient, *words: str | int) -> Any:
    """As somebody with time enough."""
    return await client.execute_command(*words, until_s=time.monotonic() + 10)


async def test_all_that_ask_at_once_share_one_connection_and_get_their_own_replies(
    node: Node, client: PipelinedClient
) -> None:
    assert await asyncio.gather(*(ask(client, "PING", n) for n in range(50))) == [*range(1, 51)]
    assert node.connections == 1


async def test_a_reply_that_comes_byte_by_byte_is_whole(node: Node, client: PipelinedClient) -> None:
    def dribble(number: int, writer: asyncio.StreamWriter) -> None:
        async def write() -> None:
            for byte in b"*2\r\n$2\r\nok\r\n:7\r\n":
                writer.write(bytes([byte]))
                await asyncio.sleep(0)

        tasks.append(asyncio.ensure_future(write()))

    tasks: list[asyncio.Future[None]] = []
    node.answer = dribble
    assert await ask(client, "LOOK") == [b"ok", 7]


async def test_who_gives_up_waiting_takes_no_reply_from_the_others(node: Node, client: PipelinedClient) -> None:
    held = asyncio.Event()

    def later(number: int, writer: asyncio.StreamWriter) -> None:
        async def write() -> None:
            await held.wait()
            writer.write(b":%d\r\n" % number)

        tasks.append(asyncio.ensure_future(write()))

    tasks: list[asyncio.Future[None]] = []
    node.answer = later
    asked = [asyncio.ensure_future(ask(client, "GET", n)) for n in range(3)]
    while node.commands < 3:
        await asyncio.sleep(0.001)
    asked[1].cancel()
    held.set()
    assert (await asked[0], await asked[2]) == (1, 3)
    assert node.connections == 1


async def test_an_error_reply_is_raised_where_it_was_asked_for(node: Node, client: PipelinedClient) -> None:
    node.answer = lambda number, writer: writer.write(b"-ERR no\r\n" if number == 1 else b"+OK\r\n")
    first, second = await asyncio.gather(ask(client, "BAD"), ask(client, "GOOD"), return_exceptions=True)
    assert isinstance(first, RuntimeError)
    assert second == b"OK"


async def test_a_silent_node_is_given_up_with_all_that_is_under_way_and_a_new_connection_serves(
    node: Node, client: PipelinedClient
) -> None:
    node.answer = lambda number, writer: None
    began = asyncio.get_running_loop().time()
    results: list[Any] = await asyncio.gather(*(ask(client, "GET", n) for n in range(3)), return_exceptions=True)
    assert all(isinstance(result, TimeoutError) for result in results)
    assert PATIENCE_S * 0.9 < asyncio.get_running_loop().time() - began < PATIENCE_S + 1
    node.answer = lambda number, writer: writer.write(b"+OK\r\n")
    assert await ask(client, "GET", "again") == b"OK"
    assert node.connections == 2


async def test_a_slow_node_that_answers_each_in_time_is_not_given_up(node: Node, client: PipelinedClient) -> None:
    """The clock runs for the oldest command without a reply, not from the first one on."""

    def late(number: int, writer: asyncio.StreamWriter) -> None:
        asyncio.get_running_loop().call_later(PATIENCE_S / 2, writer.write, b":%d\r\n" % number)

    node.answer = late
    for number in range(1, 5):
        assert await ask(client, "GET") == number
    assert node.connections == 1


async def test_a_node_that_closes_fails_what_is_under_way_at_once(node: Node, client: PipelinedClient) -> None:
    node.answer = lambda number, writer: writer.close()
    with pytest.raises(ConnectionError):
        await asyncio.wait_for(ask(client, "GET"), PATIENCE_S)


async def test_what_is_asked_of_a_connection_that_was_given_up_fails_at_once(
    node: Node, client: PipelinedClient
) -> None:
    """As where it is lost between its opening and the turn of whoever waited for that."""
    await ask(client, "GET")
    line = client._line
    assert line is not None
    line.give_up(ConnectionError("lost"))
    with pytest.raises(ConnectionError):
        await asyncio.wait_for(line.ask("GET"), PATIENCE_S / 2)


async def test_a_client_that_is_closed_opens_no_connection_for_those_who_ask_again(
    node: Node, client: PipelinedClient
) -> None:
    """As the store does for whoever was waiting for a reply."""
    node.answer = lambda number, writer: None
    waiting = asyncio.ensure_future(ask(client, "GET"))
    while not node.commands:
        await asyncio.sleep(0.001)
    await client.aclose()
    with pytest.raises(ConnectionError):
        await waiting
    with pytest.raises(ConnectionError, match="closed by ourselves"):
        await ask(client, "GET")
    assert node.connections == 1


@pytest.mark.parametrize("words", [b"!nonsense\r\n", b"+OK\r\n+OK\r\n"])
async def test_what_is_no_reply_or_one_too_many_ends_the_connection(
    node: Node, client: PipelinedClient, words: bytes
) -> None:
    """Otherwise each later command would get the reply of the one before it."""
    node.answer = lambda number, writer: writer.write(words if number == 1 else b":%d\r\n" % number)
    with contextlib.suppress(OSError):
        await ask(client, "GET")
    assert await ask(client, "GET") == 2
    assert node.connections == 2

"""An engine for the tests of `balancer serve`: HTTP/1.1 on raw streams; it does what a test tells it, faults too.

It runs in a thread of the test's process, so that a test can look at what reached it (`seen`), who left before the end
(`left`), and what is open now (`open`). It computes nothing: a completion is `max_tokens` words, one event each.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from balancer import RankCounts, Reporter
from balancer.marker import received_id

HEALTH_PATHS = frozenset(("/health", "/ready", "/health_generate", "/v1/models", "/get_model_info"))


@dataclass
class Exchange:
    """One request as it arrived, and the pen for its answer."""

    method: str
    target: str
    head: bytes
    headers: list[tuple[str, str]]
    body: bytes
    writer: asyncio.StreamWriter = field(repr=False)

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")  # type: ignore[no-any-return]

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)

    async def write(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def respond(self, status: int, document: object, *headers: str) -> None:
        """A whole answer as JSON."""
        body = json.dumps(document).encode()
        lines = [f"HTTP/1.1 {status} Stub", "Content-Type: application/json", f"Content-Length: {len(body)}", *headers]
        await self.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    async def begin_stream(self) -> None:
        await self.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
            b"X-Engine: scripted\r\n\r\n"
        )

    async def event(self, document: object) -> None:
        text = document if isinstance(document, str) else json.dumps(document)
        data = f"data: {text}\n\n".encode()
        await self.write(b"%x\r\n%b\r\n" % (len(data), data))

    async def end_stream(self) -> None:
        await self.write(b"0\r\n\r\n")


Script = Callable[[Exchange], Awaitable[None]]


class Engine:
    """One address. `script` answers a placed request; everything else gets a healthy engine's answer."""

    def __init__(self, script: Script | None = None, pace_s: float = 0.0, reporter: Reporter | None = None) -> None:
        self.script: Script = script or self.completes
        self.pace_s = pace_s
        self.reporter = reporter
        self.is_healthy = True
        self.health_s = 0.0
        self.seen: list[Exchange] = []
        self.left = 0
        self.open = 0
        self.port = 0
        self._step = 0
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine", daemon=True)
        self._thread.start()
        self.up()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def up(self) -> None:
        """Accept connections, on the port that it had before if it had one."""
        self._do(self._listen())

    def down(self) -> None:
        """Die: no new connections, and those that are open end in the middle of whatever they carry."""
        self._do(self._cut())

    def close(self) -> None:
        self.down()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- scripts

    async def completes(self, exchange: Exchange) -> None:
        """What an engine that is well answers."""
        asked = exchange.json
        words = [f" w{number}" for number in range(asked.get("max_tokens") or asked.get("max_completion_tokens") or 8)]
        usage = {"prompt_tokens": 7, "completion_tokens": len(words), "total_tokens": 7 + len(words)}
        is_chat = "messages" in asked
        if not asked.get("stream"):
            await exchange.respond(200, _whole(asked, is_chat, words, usage), "X-Engine: scripted")
            return
        await exchange.begin_stream()
        for document in _pieces(asked, is_chat, words):
            await exchange.event(document)
            await asyncio.sleep(self.pace_s)
        if (asked.get("stream_options") or {}).get("include_usage"):
            await exchange.event(_envelope(is_chat, True) | {"choices": [], "usage": usage})
        await exchange.event("[DONE]")
        await exchange.end_stream()

    # -- how it listens

    def _do(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=2**24, backlog=2048)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _cut(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in tuple(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    exchange = await _read(reader, writer)
                    if exchange.target.partition("?")[0] in HEALTH_PATHS:
                        await self._tell_health(exchange)
                    else:
                        await self._answer(exchange, reader)
        except asyncio.CancelledError:
            pass
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _tell_health(self, exchange: Exchange) -> None:
        models = {"object": "list", "data": [{"id": "tiny", "object": "model", "owned_by": "tests"}]}
        await asyncio.sleep(self.health_s)
        await exchange.respond(200 if self.is_healthy else 503, models)

    async def _answer(self, exchange: Exchange, reader: asyncio.StreamReader) -> None:
        self.seen.append(exchange)
        self._acknowledge(exchange)
        self.open += 1
        answer = asyncio.ensure_future(self.script(exchange))
        peer = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait((answer, peer), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                self.left += 1
                raise ConnectionResetError
            await answer
        finally:
            self.open -= 1
            for task in (answer, peer):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                    await task

    def _acknowledge(self, exchange: Exchange) -> None:
        """What a hook does at once when its engine has received a request: by the id that the engine was given."""
        if self.reporter is None:
            return
        rid = exchange.json.get("rid") if exchange.body else None
        self._step += 1
        counts = [RankCounts(0, 0)] * self.reporter.incarnation.size
        self.reporter.report(
            step=self._step, counts=counts, received=[received_id(rid or exchange.header("x-request-id") or "")]
        )


async def _read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Exchange:
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    method, target, _ = first.split(" ", 2)
    headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    lengths = [value for name, value in headers if name.lower() == "content-length"]
    assert len(lengths) <= 1, f"a request with {len(lengths)} lengths reached the engine"
    assert not any(name.lower() == "transfer-encoding" for name, _ in headers), "a chunked request reached the engine"
    body = await reader.readexactly(int(lengths[0])) if lengths else b""
    return Exchange(method, target, head, headers, body, writer)


def _envelope(is_chat: bool, is_stream: bool) -> dict[str, Any]:
    kind = ("chat.completion" if is_chat else "text_completion") + (".chunk" if is_chat and is_stream else "")
    return {"id": "cmpl-1", "object": kind, "created": 1, "model": "tiny"}


def _tool_calls(asked: dict[str, Any], in_pieces: bool) -> list[dict[str, Any]]:
    function = {"name": asked["tools"][0]["function"]["name"], "arguments": '{"city": "Zürich"}'}
    call = {"id": "call_1", "type": "function", "function": function}
    if not in_pieces:
        return [call]
    pieces: list[dict[str, Any]] = [{"index": 0, **call, "function": {**function, "arguments": ""}}]
    pieces += [{"index": 0, "function": {"arguments": letter}} for letter in function["arguments"]]
    return pieces


def _whole(asked: dict[str, Any], is_chat: bool, words: list[str], usage: dict[str, int]) -> dict[str, Any]:
    if "input" in asked:
        return {"object": "list", "model": "tiny", "usage": {"prompt_tokens": 3, "total_tokens": 3},
                "data": [{"object": "embedding", "index": 0, "embedding": [0.5, -0.25]}]}  # fmt: skip
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "logprobs": None}
    if not is_chat:
        choice["text"] = "".join(words)
    elif asked.get("tools"):
        message = {"role": "assistant", "content": None, "tool_calls": _tool_calls(asked, False)}
        choice |= {"message": message, "finish_reason": "tool_calls"}
    else:
        choice["message"] = {"role": "assistant", "content": "".join(words)}
    return _envelope(is_chat, False) | {"choices": [choice], "usage": usage}


def _pieces(asked: dict[str, Any], is_chat: bool, words: list[str]) -> Iterator[dict[str, Any]]:
    envelope = _envelope(is_chat, True)
    deltas: list[dict[str, Any]] = [{"content": word} for word in words]
    if asked.get("tools"):
        deltas = [{"tool_calls": [piece]} for piece in _tool_calls(asked, True)]
    last = len(deltas) - 1
    for number, delta in enumerate(deltas):
        finish = ("tool_calls" if asked.get("tools") else "stop") if number == last else None
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
        choice |= {"delta": delta} if is_chat else {"text": delta["content"]}
        yield envelope | {"choices": [choice]}

"""One connection to an engine: a request goes out, an answer comes in.

An answer's body is not rebuilt: its bytes go to the client as the engine wrote them, chunk sizes, extensions and
trailers included, in the same loop turn in which they came. All that is read of them is where they end.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Protocol

import httptools

from balancer.serve.answer import Answer, UpstreamError

_MOST_HEAD = 256 * 1024
_KEEPALIVE = (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 60_000))
"""A host that is gone without a word is noticed within about a minute, however long its answer may take."""
_FORBIDDEN_BODY = frozenset((204, 304))
_LOOKS = 8
"""A silence is noticed by so many looks at it: to an eighth, for one number set for each piece."""


class Keeper(Protocol):
    """Who has opened a connection."""

    def keep(self, connection: Connection) -> None:
        """It may serve another exchange."""

    def lost(self, connection: Connection) -> None:
        """It has ended."""


class Connection(asyncio.Protocol):
    """One connection to an engine; one exchange at a time."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self.transport: asyncio.Transport = None  # type: ignore[assignment]
        self.idle_since = 0.0
        self._loop = asyncio.get_running_loop()
        self._reset()

    def _reset(self) -> None:
        self._buffer = b""
        self._head: asyncio.Future[Answer] | None = None
        self._told: Answer | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._silent_looks = 0
        self._done: asyncio.Future[None] | None = None
        self._sink: Callable[[bytes], None] | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._chunked_head = b""
        self._left: int | None = None
        self._is_whole = False
        self._keeps = True
        self._no_body = False
        self._lost: UpstreamError | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        self.transport = transport  # type: ignore[assignment]
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE:
            if (option := getattr(socket, name, None)) is not None:  # not every system has each
                sock.setsockopt(socket.IPPROTO_TCP, option, value)

    def send(self, data: bytes, no_body: bool, within_s: float | None = None) -> asyncio.Future[Answer]:
        """Send a request; the future is its answer's head, or `UpstreamError` where the answer does not come in time.

        A head is held until a body's first byte: servers write it before the engine has begun. `no_body`: the method is
        HEAD.
        """
        self._reset()
        self._no_body = no_body
        self._head = head = self._loop.create_future()
        if within_s is not None:
            self._timer = self._loop.call_later(within_s, self._too_late, within_s)
        self.transport.write(data)
        return head

    def _too_late(self, within_s: float) -> None:
        if self._head is not None and not self._head.done():
            self._answered(UpstreamError(f"no answer within {within_s:g} s", True, is_late=True))

    def _answered(self, answer: Answer | UpstreamError) -> None:
        """The answer has begun, or will not."""
        assert self._head is not None
        if self._timer is not None:
            self._timer.cancel()
        if isinstance(answer, UpstreamError):
            self._head.set_exception(answer)
        else:
            self._head.set_result(answer)

    @property
    def has_begun(self) -> bool:
        """Whether anything of an answer has come."""
        return self._told is not None or bool(self._buffer)

    @property
    def has_more(self) -> bool:
        """Whether some of the answer's body has come with its head, and is its body's."""
        return bool(self._buffer) and not self._no_body and self._left != 0

    def relay(
        self, sink: Callable[[bytes], None], plain: bool = False, idle_s: float | None = None
    ) -> asyncio.Future[None]:
        """Give the body to `sink`, what has come of it at once; the future is its end.

        The bytes are as on the wire, or, `plain`, without the chunks' sizes. Raises `UpstreamError` by the future,
        where nothing has come for `idle_s` too.
        """
        self._done = self._loop.create_future()
        self._sink = sink
        if self._chunked_head:
            if plain:
                self._sink = None
            self._parser = httptools.HttpResponseParser(_Chunks(self, sink) if plain else _ChunksEnd(self))
            try:
                self._parser.feed_data(self._chunked_head)
            except httptools.HttpParserError as error:
                self._fail(UpstreamError(f"the engine's answer is not HTTP/1.1: {error}", True))
                return self._done
        data, self._buffer = self._buffer, b""
        if self._no_body or self._left == 0:
            self._keeps = self._keeps and not data  # bytes that nobody asked for may be the next answer's
            self._end()
        elif data:
            self._body(data)
        if not self._done.done():
            if self._is_whole:
                self._end()
            elif self._lost is not None:
                self._fail(self._lost)
            elif idle_s is not None:
                self._listen(idle_s)
        return self._done

    def _listen(self, idle_s: float) -> None:
        """Look at the silence; while reading is paused it is the client's."""
        if self._done is None or self._done.done():
            return
        if self._silent_looks >= _LOOKS:
            self._fail(UpstreamError(f"the engine has been silent for {idle_s:g} s", True, is_late=True))
            return
        self._silent_looks = self._silent_looks + 1 if self.transport.is_reading() else 0
        self._timer = self._loop.call_later(idle_s / _LOOKS, self._listen, idle_s)

    def data_received(self, data: bytes) -> None:
        """Bytes of an answer."""
        if self._done is not None and not self._done.done():
            self._silent_looks = 0
            self._body(data)
        elif self._head is None or self._is_whole:
            self.transport.abort()  # nobody asked
        else:
            self._buffer += data
            if self._head.done():
                return
            if self._told is None:
                self._read_head()
            else:
                self._answered(self._told)

    def eof_received(self) -> bool:
        """The engine has ended: so has an answer without a length."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The engine is gone."""
        self._keeper.lost(self)
        error = UpstreamError(f"the engine closed the connection{f': {exc}' if exc else ''}", True)
        is_end = exc is None and self._ends_by_close
        if is_end:
            self._keeps, self._is_whole = False, True
        if self._head is not None and not self._head.done():
            self._answered(self._told if is_end and self._told is not None else error)
        elif self._done is not None and not self._done.done():
            self._end() if is_end else self._fail(error)
        else:
            self._lost = error

    @property
    def _ends_by_close(self) -> bool:
        return self._told is not None and self._left is None and not self._chunked_head and not self._no_body

    def pause(self) -> None:
        """Read no more for now."""
        if not self.transport.is_closing():
            self.transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def give_back(self) -> None:
        """The exchange is over: kept for another one if the answer was whole, else closed."""
        self._head = None
        if self._timer is not None:  # the client went before there was an answer, or the answer has ended
            self._timer.cancel()
        if self._is_whole and self._keeps and not self.transport.is_closing():
            if not self.transport.is_reading():
                self.transport.resume_reading()
            self._keeper.keep(self)
        else:
            self.transport.abort()

    def _read_head(self) -> None:
        assert self._head is not None
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            try:
                answer = Answer(self._buffer[:end])
            except UpstreamError as error:
                self._answered(error)
                self.transport.abort()
                return
            head, self._buffer = self._buffer[: end + 4], self._buffer[end + 4 :]
            if 100 <= answer.status < 200 and answer.status != 101:
                continue
            self._prepare(answer, head)
            self._told = answer
            if self._buffer or self._no_body or self._left == 0:
                self._answered(answer)
            return
        if len(self._buffer) > _MOST_HEAD:
            self._answered(UpstreamError("the head of the engine's answer has no end", True))
            self.transport.abort()

    def _prepare(self, answer: Answer, head: bytes) -> None:
        tokens = (answer.header(b"connection") or b"").lower()
        self._keeps = b"close" not in tokens and (answer.status_line.startswith(b"HTTP/1.1") or b"keep-alive" in tokens)
        self._no_body = self._no_body or answer.status in _FORBIDDEN_BODY
        if self._no_body:
            return
        if answer.is_chunked:
            self._chunked_head = head
        else:
            self._left = answer.length

    def _body(self, data: bytes) -> None:
        if self._parser is not None:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserError as error:
                self._fail(UpstreamError(f"the engine's chunks are broken: {error}", True))
                return
            if self._sink is not None:
                self._sink(data)
            if self._is_whole:
                self._end()
            return
        if self._left is not None:
            if len(data) > self._left:
                data, self._keeps = data[: self._left], False
            self._left -= len(data)
        assert self._sink is not None
        self._sink(data)
        if self._left == 0:
            self._end()

    def _end(self) -> None:
        self._is_whole = True
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _fail(self, error: UpstreamError) -> None:
        assert self._done is not None
        self._done.set_exception(error)
        self.transport.abort()


class _ChunksEnd:
    """What is asked of the parser of a chunked answer: where it ends. What would follow it is nobody's."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._begun = False

    def on_message_begin(self) -> None:
        """An answer begins; a second one was not asked for."""
        if self._begun:
            raise httptools.HttpParserError("bytes behind the last chunk")
        self._begun = True

    def on_message_complete(self) -> None:
        """The last chunk and its trailers have come."""
        self._connection._is_whole = True


class _Chunks(_ChunksEnd):
    """The same, and the body's bytes, for a client that takes no chunks."""

    def __init__(self, connection: Connection, sink: Callable[[bytes], None]) -> None:
        super().__init__(connection)
        self.on_body = sink

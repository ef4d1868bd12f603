"""The front door: HTTP/1.1 from clients, one protocol object for each connection.

It hands each request that `inbound` has read to `Server.answer`, writes what it is given, and knows when the client is
gone. It decides nothing about engines. One request at a time is answered on a connection; what a client sends ahead
waits. A client that has closed its sending side counts as gone: a closed socket looks the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import socket
import termios
import time
from collections.abc import Callable, Coroutine
from typing import Any

from balancer.serve.complaint import complaint
from balancer.serve.inbound import HeldBytes, Inbound, RequestReader
from balancer.serve.options import Limits
from balancer.serve.wire import Headers

log = logging.getLogger("balancer.serve")

_REASONS = {
    200: b"OK",
    204: b"No Content",
    400: b"Bad Request",
    401: b"Unauthorized",
    404: b"Not Found",
    405: b"Method Not Allowed",
    408: b"Request Timeout",
    413: b"Content Too Large",
    429: b"Too Many Requests",
    431: b"Request Header Fields Too Large",
    500: b"Internal Server Error",
    501: b"Not Implemented",
    502: b"Bad Gateway",
    503: b"Service Unavailable",
    504: b"Gateway Timeout",
    505: b"HTTP Version Not Supported",
}
_MOST_AHEAD = 64 * 1024
"""Bytes that a client may send ahead of an answer before we stop reading."""
_SWEEP_S = 0.5
_LINGER_S = 1.0


class Server:
    """All connections of one listening socket, and who answers their requests."""

    def __init__(
        self,
        answer: Callable[[Client, Inbound], Coroutine[Any, Any, None]],
        limits: Limits,
        lets_in: Callable[[Inbound], bool] | None = None,
    ) -> None:
        self.answer = answer
        self.lets_in = lets_in
        self.limits = limits
        self.clients: set[Client] = set()
        self.draining = False
        """Answers are the last on their connections: clients come back to another replica."""
        self.stopping = False
        self.held = HeldBytes()
        self.refused: Callable[[Inbound, int], None] = lambda request, status: None
        """Told of each request that is refused here, before anybody was asked to answer it."""
        self._sweeper: asyncio.Task[None] | None = None
        self._listening: asyncio.Server | None = None

    async def start(self, sock: socket.socket, **tls: Any) -> None:
        """Serve on a bound socket."""
        loop = asyncio.get_running_loop()
        self._listening = await loop.create_server(lambda: Client(self), sock=sock, backlog=4096, **tls)
        self._sweeper = asyncio.create_task(self._sweep())

    async def stop(self, within_s: float) -> int:
        """No new connections and requests; those under way may end within the time. Returns how many were cut off."""
        self.stopping = True
        if self._listening:
            self._listening.close()
        for client in tuple(self.clients):
            client.close_if_idle()
        deadline = time.monotonic() + within_s
        while self.clients and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        cut_off = len(self.clients)
        for client in tuple(self.clients):
            client.abort()
        if self._sweeper:
            self._sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeper
        await asyncio.sleep(0)  # the cut off exchanges release their bookings
        return cut_off

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = time.monotonic()
            for client in tuple(self.clients):
                if client.deadline <= now:
                    client.overdue()


class Client(asyncio.Protocol):
    """One connection from a client."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._limits = server.limits
        self._reader = RequestReader(server.limits, server.held, self._continue, server.lets_in)
        self._ahead = b""
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._is_over = False
        self.begun = False
        self.is_gone = False
        self.is_cut = False
        """Whether it is we who ended the connection, in the middle of whatever there was."""
        self.is_paused = False
        self.deadline = time.monotonic() + self._limits.idle_s
        self._cut_off = 0.0
        """When a client that does not read the end of its last answer is cut off."""
        self.transport: asyncio.Transport = None  # type: ignore[assignment]
        self.on_pause: Callable[[], None] | None = None
        self.on_resume: Callable[[], None] | None = None

    # -- the connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has come."""
        self.transport = transport  # type: ignore[assignment]
        server = self._server
        server.clients.add(self)
        if server.stopping or len(server.clients) > self._limits.connections:
            self._refuse(503, "this replica has all the connections that it may have")

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone, or we have closed."""
        self.is_gone = self._is_over = True
        self._server.clients.discard(self)
        self._reader.close()
        if self._task is not None:
            self._task.cancel()

    def eof_received(self) -> bool:
        """Half-closed is closed: see the module."""
        return False

    def pause_writing(self) -> None:
        """The client reads more slowly than the engine writes."""
        self.is_paused = True
        self.deadline = time.monotonic() + self._limits.write_s
        if self.on_pause:
            self.on_pause()

    def resume_writing(self) -> None:
        """It has caught up."""
        self.is_paused = False
        if self._is_over or self.transport.is_closing():
            return
        if self._task is None:
            self._go_on()
            return
        self.deadline = float("inf")
        if self.on_resume:
            self.on_resume()

    def overdue(self) -> None:
        """The deadline has passed: of an idle connection, of a request being read, of an answer nobody reads."""
        now = time.monotonic()
        if now < self._cut_off:
            if not self._has_unread():
                self._cut_off = now  # at the next look: until then the rest of what is written has gone out
        elif self._task is not None or self._is_over or self.is_paused:
            self.abort()
        elif self._reader.is_reading:
            self._refuse(408, "the request did not arrive in time")
        else:
            self._end()

    def close_if_idle(self) -> None:
        """The server stops: end now, or after the answer under way."""
        self._closing = True
        if self._task is None and not self._reader.is_reading:
            self._end()

    def abort(self) -> None:
        """End without ceremony."""
        self.is_cut = True
        self.transport.abort()

    # -- reading

    def data_received(self, data: bytes) -> None:
        """Bytes of a request, or sent ahead of an answer."""
        if self._is_over:
            return
        if self._task is not None or self.is_paused:
            self._ahead += data
            self._hold_back()
            return
        self._feed(data)

    def _feed(self, data: bytes) -> None:
        reader = self._reader
        was_reading = reader.is_reading
        self._ahead = reader.feed(data)
        if reader.is_reading and not was_reading:
            self.deadline = time.monotonic() + self._limits.read_s
        self._hold_back()
        if reader.ready:
            self._begin()
        elif reader.refusal is not None:
            self._refuse(*reader.refusal)

    def _hold_back(self) -> None:
        """A client that has sent much ahead waits until its answers have caught up."""
        transport = self.transport
        if len(self._ahead) > _MOST_AHEAD:
            transport.pause_reading()
        elif not transport.is_reading() and not transport.is_closing():
            transport.resume_reading()

    def _continue(self) -> None:
        if self._task is None and not self._is_over:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    # -- answering

    def _begin(self) -> None:
        self.begun = False
        self.deadline = float("inf")
        request = self._reader.ready.popleft()
        self._task = asyncio.get_running_loop().create_task(self._answer(request))

    async def _answer(self, request: Inbound) -> None:
        try:
            await self._server.answer(self, request)
        except asyncio.CancelledError:
            self.abort()
        except Exception:
            log.exception("a request could not be answered: a defect")
            if self.begun or self.is_gone:
                self.abort()
            else:
                self.respond(request, 500, *complaint(500, "a defect in the dispatcher", path=request.path))
        finally:
            self.on_pause = self.on_resume = None
            self._reader.free(request)
            self._task = None
            if not self._is_over:
                self._next(request)

    def _next(self, request: Inbound) -> None:
        if self.closes_after(request):
            self._end()
        elif not self.is_paused:  # else once the client has read
            self._go_on()

    def _go_on(self) -> None:
        self.deadline = time.monotonic() + self._limits.idle_s
        if self._reader.ready:
            self._begin()
        elif self._reader.refusal is not None:
            self._refuse(*self._reader.refusal)
        elif self._ahead:
            data, self._ahead = self._ahead, b""
            self._feed(data)

    def _end(self) -> None:
        """Close, once what was written has gone out: a client has `Limits.write_s` to read it. Over TLS it should say
        goodbye too, which an idle one does not: there it is enough that it has got everything."""
        self._is_over = True
        now = time.monotonic()
        self.deadline, self._cut_off = now + _LINGER_S, now + self._limits.write_s
        self.transport.close()

    def _has_unread(self) -> bool:
        """Whether there are bytes that the client's side has not acknowledged."""
        try:
            unread = fcntl.ioctl(self.transport.get_extra_info("socket"), termios.TIOCOUTQ, bytes(4))
        except OSError:  # not every system tells it of a socket
            return True
        return any(unread)

    def let_go(self, request: Inbound) -> None:
        """A request's body will not be needed again: others may be held instead of it."""
        request.body = b""
        self._reader.free(request)

    def closes_after(self, request: Inbound) -> bool:
        """Whether this answer is the connection's last."""
        server = self._server
        return self._closing or server.draining or server.stopping or not request.keep_alive

    def respond(self, request: Inbound, status: int, headers: Headers, body: bytes) -> None:
        """A whole answer of our own."""
        if self.transport.is_closing():
            return
        lines = [b"HTTP/1.1 %d %b\r\n" % (status, _REASONS.get(status, b"-"))]
        lines += [b"%b: %b\r\n" % header for header in headers]
        lines.append(b"Content-Length: %d\r\n" % len(body))
        if self.closes_after(request):
            lines.append(b"Connection: close\r\n")
        elif request.is_http_10:
            lines.append(b"Connection: keep-alive\r\n")
        lines.append(b"\r\n")
        if request.method != "HEAD":
            lines.append(body)
        self.begun = True
        self.transport.write(b"".join(lines))

    def write(self, data: bytes) -> None:
        """Bytes of an answer, at once; for a client that has just gone, nothing."""
        self.begun = True
        if not self.transport.is_closing():
            self.transport.write(data)

    def break_off(self) -> None:
        """An answer cannot be finished: what there is of it goes out, and the connection ends without its end."""
        self._end()

    def _refuse(self, status: int, why: str, code: str | None = None) -> None:
        """Say why, and end the connection: what follows on it cannot be understood, or is not wanted."""
        if self._is_over:
            return
        if self._task is not None:  # an answer is under way on this connection: nothing may come into it
            self.abort()
            return
        request = self._reader.request
        headers, body = complaint(status, why, code, request.path)
        request.keep_alive = False
        self.respond(request, status, headers, body)
        self._server.refused(request, status)
        self._is_over = True
        if self.transport.can_write_eof():
            if not self.transport.is_reading():
                self.transport.resume_reading()
            # What the client still sends is read and thrown away for a moment: a reset would take the answer from it.
            self.transport.write_eof()
            self.deadline = time.monotonic() + _LINGER_S
        else:
            self._end()

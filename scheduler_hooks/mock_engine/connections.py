"""A rank's door: the TCP connections of its clients, read and written without ever blocking.

Bytes arrive whenever they do and are seen when the rank's loop asks, at a step boundary, as SGLang's
scheduler sees its socket. It knows lines, not what they mean (`wire`), and a connection by a number that is
never used twice.
"""

from __future__ import annotations

import selectors
import socket
from dataclasses import dataclass, field

from scheduler_hooks.mock_engine.wire import MAX_LINE_BYTES

MAX_UNSENT_BYTES = 32 * 1024 * 1024
"""A client that lets this much pile up has stopped reading: it is cut off."""

_READ_BYTES = 1024 * 1024
"""Read from one connection per boundary at most; the rest waits for the next one."""

_ROUNDS = 2
"""Looks per boundary: the first may accept a connection whose first lines are there already."""


@dataclass(slots=True)
class Seen:
    """What came in: whole lines by connection, in order, and the connections that have ended since."""

    lines: list[tuple[int, bytes]] = field(default_factory=list)
    closed: list[int] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Connection:
    number: int
    socket: socket.socket
    unread: bytes = b""
    unsent: bytearray = field(default_factory=bytearray)


class ClientConnections:
    """All connections of one rank's listener."""

    def __init__(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._connections: dict[int, _Connection] = {}
        self._accepted = 0
        self._cut_off: list[int] = []

    def fileno(self) -> int:
        """A descriptor (epoll or kqueue) that poll finds readable when `see` has something to do."""
        return self._selector.fileno()

    def see(self) -> Seen:
        """Take what has come in by now; flushes what could not be sent before."""
        seen = Seen(closed=self._cut_off)
        self._cut_off = []
        done: set[int] = set()
        for _ in range(_ROUNDS):
            for key, events in self._selector.select(0):
                connection: _Connection | None = key.data
                if connection is None:
                    self._accept()
                    continue
                if events & selectors.EVENT_WRITE:
                    self._flush(connection)
                if events & selectors.EVENT_READ and connection.number not in done:
                    done.add(connection.number)
                    self._read(connection, seen)
        return seen

    def send(self, number: int, lines: bytes) -> None:
        """Send as much as goes now, keep the rest; does nothing for a connection that has ended."""
        connection = self._connections.get(number)
        if connection is None:
            return
        connection.unsent += lines
        self._flush(connection)

    def close(self) -> None:
        """Close the listener and all connections."""
        for connection in list(self._connections.values()):
            self._drop(connection)
        self._selector.close()
        self._listener.close()

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.accept()
        except OSError:
            return  # the client was gone before we looked
        accepted.setblocking(False)
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._accepted += 1
        connection = _Connection(self._accepted, accepted)
        self._connections[connection.number] = connection
        self._selector.register(accepted, selectors.EVENT_READ, connection)

    def _read(self, connection: _Connection, seen: Seen) -> None:
        try:
            received = connection.socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        *lines, connection.unread = (connection.unread + received).split(b"\n")
        seen.lines.extend((connection.number, line) for line in lines if line)
        if not received or len(connection.unread) > MAX_LINE_BYTES:
            seen.closed.append(connection.number)
            self._drop(connection)

    def _flush(self, connection: _Connection) -> None:
        try:
            sent = connection.socket.send(connection.unsent)
        except BlockingIOError:
            sent = 0
        except OSError:
            sent = 0
            connection.unsent.clear()  # reading will report the end
        del connection.unsent[:sent]
        if len(connection.unsent) > MAX_UNSENT_BYTES:
            self._cut_off.append(connection.number)
            self._drop(connection)
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.unsent else 0)
        if self._selector.get_key(connection.socket).events != events:
            self._selector.modify(connection.socket, events, connection)

    def _drop(self, connection: _Connection) -> None:
        self._selector.unregister(connection.socket)
        connection.socket.close()
        del self._connections[connection.number]

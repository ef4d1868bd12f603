"""Connections to a node for threads: one for each command under way, kept for the next.

The driver opens a connection (names, TLS, password, database) and hands its socket over; hiredis packs and parses. The
driver's own way takes as long again around a command, most of it with the interpreter's lock held, for which an
engine's step waits. (Event loops have one connection for all: `pipeline`.)

To open one takes as many round trips as there is to say, and the look-up of a name, which may always be more than a
caller has time for, or leave too little of it. Then a thread of its own opens one for the next who asks.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import hiredis

_NOTHING_YET = object()
_MOST_AT_ONCE = 65_536
"""Bytes that are read at once."""

BESIDE_S = 2.0
"""What is worth waiting for where no caller waits: a look-up or a handshake longer than a budget. It delays whoever
comes when the way is good again, so it is no more than a few probes."""


class Line:
    """An open connection; one thread uses it at a time. `error` makes an exception of an error reply."""

    def __init__(self, opened: socket.socket, error: Callable[[str], Exception], close: Callable[[], None]) -> None:
        self.close = close
        self.has_answered = False
        self._socket = opened
        self._limit_s = opened.gettimeout() or 0.0
        self._reader = hiredis.Reader(replyError=error, notEnoughData=_NOTHING_YET)
        self._news = select.poll()
        self._news.register(opened, select.POLLIN)

    def is_quiet(self) -> bool:
        """Whether nothing has come that nobody has asked for: the end above all. What TLS tells itself is nothing."""
        return not self._reader.has_data() and (not self._news.poll(0) or self._has_nothing_for_us())

    def ask(self, words: tuple[str | int, ...], until_s: float) -> Any:
        """Send a command; returns its reply, which may be an exception. Raises OSError where none comes by then."""
        self._wait_until(until_s)
        self._socket.sendall(hiredis.pack_command(words))  # type: ignore[arg-type]  # its stub says: of one word
        try:
            while (reply := self._reader.gets()) is _NOTHING_YET:
                self._wait_until(until_s)
                if not (data := self._socket.recv(_MOST_AT_ONCE)):
                    raise ConnectionError("Connection closed by server.")
                self._reader.feed(data)
        except hiredis.ProtocolError:
            raise ConnectionError("the answer is not Redis'") from None
        self.has_answered = True
        return reply

    def _has_nothing_for_us(self) -> bool:
        """Whether what has come is TLS' own: a session's tickets, which follow the handshake."""
        self._socket.setblocking(False)
        self._limit_s = 0.0
        try:
            self._socket.recv(1)
        except OSError as error:
            return isinstance(error, BlockingIOError | ssl.SSLWantReadError)
        return False

    def _wait_until(self, until_s: float) -> None:
        """The socket waits for what is left; where that is about as much as before it need not be told."""
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("no time is left")
        if abs(left_s - self._limit_s) > self._limit_s / 16:
            self._socket.settimeout(left_s)
            self._limit_s = left_s


class BlockingClient:
    """The client of one node. Shared between threads, and across fork: a child opens its own connections.

    `open_` opens a connection, by the given time or not at all; `is_farewell` says which error replies mean that the
    node is not to be asked again. Times are of the monotonic clock.
    """

    def __init__(self, open_: Callable[[float], Line], is_farewell: Callable[[Exception], bool]) -> None:
        self._open, self._is_farewell = open_, is_farewell
        self._begin()

    def _begin(self) -> None:
        """With no connections; whoever forgets to close has them closed all the same."""
        self._idle: list[Line] = []
        self._late: list[Future[Line]] = []  # opened beside, and nobody waits for them
        self._pid = os.getpid()
        weakref.finalize(self, _close_all, self._idle, self._late).atexit = False

    def execute_command(self, *words: str | int, until_s: float) -> Any:
        """One command and its reply; raises what opening raises, the node's errors, or OSError where no reply comes."""
        line = self._taken(until_s)
        is_kept = False
        try:
            reply = line.ask(words, until_s)
            is_kept = not (isinstance(reply, Exception) and self._is_farewell(reply))
        finally:
            if is_kept:
                self._idle.append(line)
            else:  # what may still come on it is nobody's reply, and the idle ones lead where it led
                line.close()
                _close_all(self._idle)
                if not line.has_answered:  # to open it may have left too little time to ask
                    self._open_beside()
        try:
            if isinstance(reply, Exception):
                raise reply
            return reply
        finally:
            del reply  # an exception whose traceback holds it would keep this connection until the next collection

    def close(self) -> None:
        """Close the connections that nobody uses now."""
        _close_all(self._idle, self._late)

    def _taken(self, until_s: float) -> Line:
        if self._pid != os.getpid():
            self._begin()
        with suppress(IndexError):  # none is idle
            while not (line := self._idle.pop()).is_quiet():
                line.close()
            return line
        with suppress(IndexError):  # none is late
            while not _is_promising(late := self._late.pop()):
                pass
            return self._awaited(late, until_s)
        try:
            return self._open(until_s)
        except Exception:
            if time.monotonic() >= until_s:
                self._open_beside()
            raise

    def _awaited(self, late: Future[Line], until_s: float) -> Line:
        try:
            return late.result(until_s - time.monotonic())
        except TimeoutError:
            if _is_promising(late):
                self._late.append(late)
            raise

    def _open_beside(self) -> None:
        late: Future[Line] = Future()

        def begin() -> None:
            try:
                late.set_result(self._open(time.monotonic() + BESIDE_S))
            except Exception as error:
                late.set_exception(error)

        with suppress(RuntimeError):  # no thread to be had: too many, or the interpreter ends
            threading.Thread(target=begin, name="dp-balancer connects", daemon=True).start()
            self._late.append(late)


def _is_promising(opening: Future[Line]) -> bool:
    """Whether it is under way, or has led to a connection that is still good."""
    return not opening.done() or (opening.exception() is None and opening.result().is_quiet())


def _close_all(idle: list[Line], late: list[Future[Line]] | None = None) -> None:
    with suppress(IndexError):  # none is left, for others take them too
        while True:
            idle.pop().close()
    with suppress(IndexError):
        while late:
            late.pop().add_done_callback(_close)


def _close(opening: Future[Line]) -> None:
    if opening.exception() is None:
        opening.result().close()

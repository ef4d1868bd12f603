"""One connection to a node for all that an event loop asks of it: commands go out as they come, replies come in order.

The driver opens the connection (names, TLS, password, database) and hands its socket over; hiredis packs and parses. An
operation costs a write and a look at what came, where the driver's own asyncio client makes tasks, timers and locks for
each. A node that leaves a command without a reply for `patience_s` is given up, and with it all that is under way on
the connection: whoever wants may ask again on a new one.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import hiredis

_NOTHING_YET = object()


@dataclass(frozen=True, slots=True)
class Opened:
    """A connection that has been opened: its socket, how its error replies become exceptions, which of these mean that
    the node is not to be asked again, how it is ended."""

    transport: asyncio.Transport
    error: Callable[[str], Exception]
    is_farewell: Callable[[Exception], bool]
    close: Callable[[], Awaitable[None]]


class Pipeline(asyncio.Protocol):
    """A connection in use. `ask` raises by its future: what the node answers, or an OSError where it does not."""

    def __init__(self, opened: Opened, patience_s: float) -> None:
        self.is_lost = False
        self.opened = opened
        self._transport, self._patience_s = opened.transport, patience_s
        self._reader = hiredis.Reader(replyError=opened.error, notEnoughData=_NOTHING_YET)
        self._waiting: deque[tuple[asyncio.Future[Any], float]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._before = opened.transport.get_protocol()  # who opened it waits for its end
        opened.transport.set_protocol(self)

    def ask(self, *words: str | int) -> asyncio.Future[Any]:
        """Send a command; the future is its reply, passed over where it has been cancelled by then."""
        answer: asyncio.Future[Any] = self._loop.create_future()
        if self.is_lost:
            answer.set_exception(ConnectionError("the connection has been given up"))
            return answer
        due = self._loop.time() + self._patience_s
        self._waiting.append((answer, due))
        if self._timer is None:
            self._timer = self._loop.call_at(due, self._look)
        self._transport.write(hiredis.pack_command(words))  # type: ignore[arg-type]  # its stub says: of one word
        return answer

    def data_received(self, data: bytes) -> None:
        """Replies, whole and in part."""
        try:
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not _NOTHING_YET:
                answer, _ = self._waiting.popleft()
                if answer.done():
                    continue
                if isinstance(reply, Exception):
                    answer.set_exception(reply)
                    if self.opened.is_farewell(reply):
                        self.give_up(ConnectionError("the node is no primary any more"))
                        break
                else:
                    answer.set_result(reply)
        except (hiredis.ProtocolError, IndexError):  # no reply, or one that nobody has asked for
            self.give_up(ConnectionError("the answer is not Redis'"))

    def eof_received(self) -> bool:
        """The node has ended."""
        self.give_up(ConnectionError("Connection closed by server."))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The node is gone, or was given up."""
        self.give_up(exc if isinstance(exc, OSError) else ConnectionError("Connection closed by server."))
        self._before.connection_lost(exc)

    def give_up(self, why: OSError) -> None:
        """End it, and with it all that is under way."""
        if self.is_lost:
            return
        self.is_lost = True
        self._transport.abort()
        if self._timer is not None:
            self._timer.cancel()
        while self._waiting:
            answer, _ = self._waiting.popleft()
            if not answer.done():
                answer.set_exception(why)

    def _look(self) -> None:
        """One timer for all: for the oldest command without a reply."""
        self._timer = None
        if not self._waiting:
            return
        due = self._waiting[0][1]
        if due <= self._loop.time():
            self.give_up(TimeoutError("no reply in time"))
        else:
            self._timer = self._loop.call_at(due, self._look)


class PipelinedClient:
    """The client of one node: connects when it is first asked, and again when a connection is lost."""

    def __init__(self, open_: Callable[[], Awaitable[Opened]], patience_s: float) -> None:
        self._open, self._patience_s = open_, patience_s
        self._line: Pipeline | None = None
        self._opening: asyncio.Task[Pipeline] | None = None
        self._is_closed = False

    @property
    def line(self) -> Pipeline | None:
        """The connection, where it is open."""
        return None if self._line is None or self._line.is_lost else self._line

    async def execute_command(self, *words: str | int, until_s: float) -> Any:
        """One command and its reply; raises what opening raises, the node's errors, or OSError where no reply comes.

        `until_s` is a time of the monotonic clock.
        """
        left_s = until_s - time.monotonic()
        line = self.line
        if line and left_s > self._patience_s * 15 / 16:
            return await line.ask(*words)  # its own patience ends the wait
        async with asyncio.timeout(left_s):
            line = line or await self._opened()
            return await line.ask(*words)

    async def aclose(self) -> None:
        """Close the connection for good: who is asking now, or asks later, gets an error and opens no other."""
        self._is_closed = True
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait((self._opening,))
        if self._line is not None:
            line, self._line = self._line, None
            line.give_up(ConnectionError("closed"))
            await line.opened.close()

    async def _opened(self) -> Pipeline:
        """One opens for all; whoever gives up waiting takes it from nobody."""
        if self._is_closed:
            raise ConnectionError("closed by ourselves")
        if self._opening is None:
            self._opening = asyncio.create_task(self._begin())
            self._opening.add_done_callback(self._is_open)
        return await asyncio.shield(self._opening)

    async def _begin(self) -> Pipeline:
        if self._line is not None:
            lost, self._line = self._line, None
            await lost.opened.close()
        self._line = Pipeline(await self._open(), self._patience_s)
        return self._line

    def _is_open(self, opening: asyncio.Task[Pipeline]) -> None:
        self._opening = None
        if not opening.cancelled():
            opening.exception()  # seen, also where nobody waits any more
